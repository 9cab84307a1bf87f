"""Minimal regions against every subset of a 4 x 4 grid."""

from itertools import combinations

import numpy as np
import pytest

import consilience as cs
from consilience import NotApplicable, Sample, registry
from consilience.perturb.minimal import irreducible, smallest

CELLS = 16
CODES = (1 << np.arange(CELLS)).astype(np.int64)


def table(seed, monotone, need=6):
    """Margins of all 65,536 subsets: sums of weights against a bar, and, where it is not
    monotone, noise that makes more parts less.
    """
    rng = np.random.default_rng(seed)
    bits = (np.arange(2**CELLS)[:, None] >> np.arange(CELLS)) & 1
    weights = rng.exponential(1, CELLS)
    bar = np.sort(weights)[-need:].sum() * 0.9
    margins = bits @ weights - bar
    if not monotone:
        margins += rng.normal(0, 1.5, len(margins))
    margins[-1], margins[0] = 1.0, -1.0
    return margins


def asking(margins):
    return lambda subsets: margins[subsets @ CODES]


def least(margins, free):
    """The smallest size that is enough and its largest margin, subset by subset."""
    places = [int(at) for at in np.flatnonzero(free)]
    for size in range(len(places) + 1):
        found = [
            margins[sum(1 << at for at in members)]
            for members in combinations(places, size)
        ]
        enough = [one for one in found if one > 0]
        if enough:
            return size, max(enough)
    return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("monotone", [True, False])
def test_the_smallest_is_the_smallest_of_all_subsets(seed, monotone):
    margins = table(seed, monotone)
    free = np.ones(CELLS, bool)
    found = smallest(asking(margins), free)
    size, margin = least(margins, free)
    assert found.size == size
    assert found.margin == margin == margins[found.on @ CODES]
    assert found.smallest
    free[np.flatnonzero(found.on)[0]] = False
    again = smallest(asking(margins), free)
    wanted = least(margins, free)
    assert (again is None) == (wanted is None)
    if again is not None:
        assert (again.size, again.margin) == wanted
        assert not again.on[~free].any()


@pytest.mark.parametrize("monotone", [True, False])
def test_the_greedy_one_is_enough_and_cannot_lose_a_part(monotone):
    equal = 0
    for seed in range(12):
        margins, free = table(seed, monotone), np.ones(CELLS, bool)
        found = irreducible(asking(margins), free)
        assert found.margin == margins[found.on @ CODES] > 0
        assert not found.smallest
        for part in np.flatnonzero(found.on):
            fewer = found.on.copy()
            fewer[part] = False
            assert margins[fewer @ CODES] <= 0
        size, _ = least(margins, free)
        assert found.size >= size
        equal += found.size == size
    if monotone:  # of sums of weights the largest first are the fewest
        assert equal == 12


def test_nothing_is_enough():
    margins = -np.ones(2**CELLS)
    free = np.ones(CELLS, bool)
    assert irreducible(asking(margins), free) is None
    free[4:] = False
    assert smallest(asking(margins), free) is None


SIDE = 16


def saying(margins):
    """ "Yes" by the margin of the cells that are white."""

    def said(pixels):
        cells = pixels.reshape(len(pixels), 4, 4, 4, 4, 3).mean((2, 4, 5)) > 0.75
        margin = margins[cells.reshape(len(pixels), CELLS) @ CODES]
        return np.stack([margin / 2, -margin / 2], 1).astype(np.float32)

    return said


def network_of(said):
    return cs.wrap_callable(
        said, classes=["yes", "no"], size=SIDE, layout="nhwc", outputs="logits"
    )


def network(margins):
    return network_of(saying(margins))


WHITE = Sample("white", np.full((SIDE, SIDE, 3), 255, np.uint8))
SPEC = "minimal:segments=grid(4),fills=grey+black"


def cells_of(region):
    return region.reshape(4, 4, 4, 4).all((1, 3)).ravel()


@pytest.mark.parametrize("search", ["exact", "greedy"])
def test_regions_of_a_network_by_every_subset(search):
    margins = table(3, True, need=4)
    model = network(margins)
    made = cs.explain(model, WHITE, f"{SPEC},search={search}", "yes")
    facts, extras = made.provenance, made.extras
    free = np.ones(CELLS, bool)
    for place, (region, said) in enumerate(
        zip(extras["sufficient"], facts["sufficient"], strict=True), start=1
    ):
        on = cells_of(region)
        assert said["members"] == np.flatnonzero(on).tolist()
        assert said["parts"] == on.sum() == least(margins, free)[0]
        assert said["margin"] == pytest.approx(margins[on @ CODES], abs=1e-5)
        assert said["smallest"] == (search == "exact")
        assert not (on & ~free).any()  # disjoint of those before
        free &= ~on
        assert (made.values[region] == np.float32(1 / place)).all()
    assert len(facts["sufficient"]) == 3 or least(margins, free) is None
    # without the necessary part, the class is not first any more
    [region] = extras["necessary"]
    removed = cells_of(region)
    assert margins[~removed @ CODES] < 0
    flipped = -margins[::-1]  # the margin of a subset's complement, turned round
    assert removed.sum() == least(flipped, np.ones(CELLS, bool))[0]
    assert facts["necessary"]["parts"] == removed.sum()
    assert facts["parts"] == CELLS
    assert facts["fills"] == ["grey", "black"]


def test_every_fill_counts():
    """A network that takes grey for white: with grey alone nothing has to be kept."""
    margins = table(3, True, need=4)

    model = network_of(
        lambda pixels: saying(margins)(np.where(pixels > 0.3, 1.0, pixels))
    )
    with pytest.raises(NotApplicable) as alone:
        cs.explain(model, WHITE, "minimal:segments=grid(4),fills=grey", "yes")
    assert alone.value.code == "nothing-needed"
    both = cs.explain(model, WHITE, SPEC, "yes")
    assert both.provenance["sufficient"][0]["parts"] > 0
    assert both.provenance["necessary"] is None  # under grey it never flips


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 2), (9, 4)])
def test_how_many_disjoint_regions(most, count):
    bits = (np.arange(2**CELLS)[:, None] >> np.arange(CELLS)) & 1
    margins = bits.sum(1) - 3.5  # any four cells are enough
    made = cs.explain(network(margins), WHITE, f"{SPEC},most={most}", "yes")
    assert len(made.provenance["sufficient"]) == count


def test_auto_asks_all_subsets_of_few_parts():
    margins = table(3, True, need=4)
    few, many = (
        cs.explain(
            network(margins), WHITE, f"{SPEC},most_exact={n}", "yes"
        ).provenance
        for n in (16, 15)
    )
    assert few["sufficient"][0]["smallest"]
    assert not many["sufficient"][0]["smallest"]
    assert many["passes"] < few["passes"]


def test_passes_are_counted():
    asked = []
    margins = table(3, True, need=4)

    def said(pixels):
        asked.append(len(pixels))
        return saying(margins)(pixels)

    model = network_of(said)
    view, target = model.view(WHITE), registry.explainers.build(SPEC)
    from consilience.targets.classes import class_target

    asked.clear()
    heat = target.explain(model, view, class_target(model, 0))
    assert heat.facts["passes"] == sum(asked)


def test_what_is_not_said_has_no_minimal_region():
    model = network(table(3, True))
    with pytest.raises(NotApplicable, match="does not say no of the image"):
        cs.explain(model, WHITE, SPEC, "no")


@pytest.mark.parametrize("search", ["exact", "greedy"])
def test_a_class_that_is_said_of_anything_needs_nothing(search):
    """A map of zeros would not tell this from a search that found nothing."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    model = cs.wrap_callable(
        lambda x: np.asarray(x).reshape(len(x), -1).mean(1, keepdims=True),
        classes=("score",),
        size=16,
        outputs="logits",
    )
    with pytest.raises(NotApplicable, match="no part of the image is needed") as why:
        cs.explain(model, image, f"minimal:segments=grid(2),search={search}")
    assert why.value.code == "nothing-needed"
