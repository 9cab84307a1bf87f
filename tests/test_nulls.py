"""The null: permutations and resamples against slow loops, and units that know nothing."""

import numpy as np
import pytest
import torch
from oracles_dissection import small_broden, small_model, stacks_of
from scipy import ndimage

from consilience.dissection.coarse import (
    Gatherer,
    GrowingRows,
    cell_starts,
    chosen_images,
    finest_grid,
)
from consilience.dissection.concepts import load_concepts
from consilience.dissection.measure import dissect
from consilience.dissection.nulls import (
    Coarse,
    _wins,
    alternatives,
    permutation_null,
    permuted,
    results,
    strata,
    with_random_weights,
)
from consilience.dissection.quantiles import TailSketch
from consilience.dissection.tally import Counts, LabelCounts, ShownLabels, unit_masks
from consilience.types import ConsilienceError

# ---- on a coarse grid


def tallied(maps, concepts, labels, quantile=0.995, side=14, most=5000):
    """Maps (N, U, h, w) through the parts of a dissection: counts, label counts and
    what the null gathers.
    """
    count, units = maps.shape[:2]
    sketch = TailSketch(
        units, count * maps.shape[2] * maps.shape[3], quantile, 100_000
    )
    sketch.add(maps)
    counts, known = (
        Counts(sketch.result()[0], concepts, "half-pixel", "paper"),
        LabelCounts(concepts),
    )
    gatherer = Gatherer(
        concepts.grid,
        units,
        len(concepts.concepts),
        len(concepts.categories),
        chosen_images(count, most, 0),
        (min(side, concepts.grid[0]), min(side, concepts.grid[1])),
    )
    for index in range(count):
        known.add(labels[index])
        gatherer.add_labels(index, labels[index])
        shown = ShownLabels.of(labels[index], maps.device)
        counts.add(
            maps[index], maps[index].amax(dim=(1, 2)), shown, gatherer.watch(index, 0)
        )
    return counts, known, gatherer.gathered()


def test_rows_are_what_was_added_however_often_the_block_doubles():
    rng, rows, added = np.random.default_rng(0), GrowingRows(3), []
    for count in (0, 1, 40_000, 50_000, 7, 400_000):
        column, number = rng.integers(0, 1 << 30, count), int(rng.integers(0, 9))
        rows.add(column, number, column[::-1])
        added.append(np.stack([column, np.full(count, number), column[::-1]], axis=1))
    np.testing.assert_array_equal(rows.all, np.concatenate(added))
    assert rows.all.dtype == np.int32


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    concepts = load_concepts(
        small_broden(tmp_path_factory.mktemp("broden") / "set", count=14)
    )
    maps = torch.randn(14, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    labels = [concepts.labels(index) for index in range(14)]
    counts, _, gathered = tallied(maps, concepts, labels, quantile=0.9, side=6)
    eligible = np.array([0, 1, 3, 5, 6, 8])
    return (
        concepts,
        maps,
        counts,
        Coarse(gathered, eligible, concepts.category_of[eligible]),
    )


def blocks(pixels, cells=6):
    """Pixels whose place, in cells, has the same whole part."""
    return [
        [pixel for pixel in range(pixels) if pixel * cells // pixels == cell]
        for cell in range(cells)
    ]


def literal_best(few, order, weights=None):
    """IoU (U, E) by loops over images and cells; image n shows the labels of image
    ``order[n]``. In a cell two masks share the product of their shares of it.
    """
    concepts, maps, counts, coarse = few
    stacks = stacks_of(concepts)
    weights = np.ones(len(stacks)) if weights is None else weights
    iou = np.zeros((maps.shape[1], len(coarse.eligible)))
    for unit in range(len(iou)):
        cuts = torch.from_numpy(counts.thresholds[[unit]])
        masks = [
            unit_masks(one[[unit]], cuts, concepts.grid)[0].numpy() for one in maps
        ]
        for place, concept in enumerate(coarse.eligible):
            both = either = 0.0
            for image, mask in enumerate(masks):
                stack = stacks[order[image]]
                label = stack.get(concept, np.zeros(concepts.grid, dtype=bool))
                shown = any(
                    concepts.category_of[key] == concepts.category_of[concept]
                    for key in stack
                )
                shared = sum(
                    mask[np.ix_(rows, columns)].sum()
                    * label[np.ix_(rows, columns)].mean()
                    for rows in blocks(concepts.grid[0])
                    for columns in blocks(concepts.grid[1])
                )
                both += weights[image] * shared
                either += weights[image] * (
                    (mask.sum() if shown else 0) + label.sum() - shared
                )
            iou[unit, place] = both / either if either else 0
    return iou


def test_the_best_iou_is_the_literal_one_for_any_permutation(few):
    coarse = few[3]
    groups = strata(coarse.gathered.annotated)
    assert np.allclose(coarse.best(), literal_best(few, np.arange(14)).max(axis=1))
    for number in range(3):
        order = permuted(groups, 14, 5, number)
        assert sorted(order) == list(range(14))
        assert np.array_equal(
            coarse.gathered.annotated[order], coarse.gathered.annotated
        )
        assert np.allclose(coarse.best(order), literal_best(few, order).max(axis=1))
    assert len(groups) == 4
    assert not np.array_equal(permuted(groups, 14, 5, 0), permuted(groups, 14, 5, 1))


def test_p_counts_the_permutations_that_do_as_well(few):
    coarse = few[3]
    p, expected, over = permutation_null(
        coarse, [slice(0, 1), slice(1, 3)], 0.1, 20, seed=5
    )
    groups, observed = strata(coarse.gathered.annotated), coarse.best()
    best = np.stack(
        [coarse.best(permuted(groups, 14, 5, number)) for number in range(20)]
    )
    assert p.tolist() == ((1 + (best >= observed).sum(axis=0)) / 21).tolist()
    assert np.allclose(expected, best.mean(axis=0))
    assert over == [(best[:, :1] > 0.1).sum() / 20, (best[:, 1:] > 0.1).sum() / 20]
    again = permutation_null(coarse, [slice(0, 1), slice(1, 3)], 0.1, 20, seed=5)
    assert again[0].tobytes() == p.tobytes()


def test_resamples_are_the_literal_ones(few):
    coarse = few[3]
    wins = _wins(coarse, 8, seed=3)
    drawn = np.random.default_rng((3, 2)).multinomial(14, np.full(14, 1 / 14), 8)
    expected = np.zeros_like(wins)
    for weights in drawn:
        iou = literal_best(few, np.arange(14), weights)
        expected[np.arange(3), iou.argmax(axis=1)] += iou.max(axis=1) > 0
    assert np.array_equal(wins, expected)


def test_alternatives_are_the_fewest_that_win_nearly_always(few):
    coarse = few[3]
    wins = _wins(coarse, 40, seed=0)
    own = coarse.eligible[wins.argmax(axis=1)]
    for unit, several in enumerate(alternatives(coarse, own, 40, seed=0)):
        places = [list(coarse.eligible).index(one) for one in several]
        assert several[0] == own[unit]
        assert wins[unit, places].sum() >= 38
        assert wins[unit, places[:-1]].sum() < 38
    assert alternatives(coarse, np.full(3, -1), 40, 0) == [(), (), ()]


def test_cells_are_blocks_of_pixels(few):
    assert cell_starts(112, 14).tolist() == list(range(0, 112, 8))
    assert cell_starts(5, 5).tolist() == [0, 1, 2, 3, 4]
    for pixels in (16, 20, 31):
        starts = [block[0] for block in blocks(pixels)]
        assert cell_starts(pixels, 6).tolist() == starts
    areas = few[3].gathered.areas
    sides = [len(block) for block in blocks(few[0].grid[0])]
    assert areas.tolist() == np.outer(sides, sides).ravel().tolist()


def test_on_the_label_grid_the_null_counts_as_detectors_are_counted(few):
    concepts, maps, counts = few[:3]
    labels = [concepts.labels(index) for index in range(14)]
    known, gathered = tallied(maps, concepts, labels, 0.9, 10_000)[1:]
    assert gathered.grid == concepts.grid
    eligible = np.array([0, 1, 3, 5, 6, 8])
    coarse = Coarse(gathered, eligible, concepts.category_of[eligible])
    iou = counts.intersections / np.maximum(counts.unions(known.pixels), 1)
    np.testing.assert_allclose(
        coarse.best(), iou[:, eligible].max(axis=1), rtol=1e-12
    )


def test_the_finest_grid_that_fits():
    # 200 units x 239 images x 12,544 pixels x .005 are 2.998 million covered pixels
    assert finest_grid(200, 239, (112, 112), 0.005) == (112, 112)
    assert finest_grid(200, 240, (112, 112), 0.005) == (79, 79)
    rows, columns = finest_grid(900, 1800, (112, 112), 0.005)
    assert rows == columns
    assert 2 * 900 * 1800 * 0.005 * rows**2 <= 3_000_000
    assert 2 * 900 * 1800 * 0.005 * (rows + 1) ** 2 > 3_000_000
    assert finest_grid(10**6, 10**6, (64, 32), 0.5) == (1, 1)


@pytest.mark.parametrize("side", [4, 16])
def test_as_many_are_expected_as_noise_finds(side):
    # small masks on a fine grid of units that know nothing: what the labels' own grid
    # counts, the null expects, on that grid and on one of 8 x 8 pixels a cell
    concepts = load_concepts("drawn:images=60,size=32,seed=4")
    labels = [concepts.labels(index) for index in range(60)]
    found, expected, best, usual = 0, 0.0, [], []
    for seed in range(6):
        maps = torch.randn(
            60, 20, 16, 16, generator=torch.Generator().manual_seed(seed)
        )
        counts, known, gathered = tallied(maps, concepts, labels, 0.9, 2 * side)
        eligible = np.flatnonzero(known.images >= 5)
        iou = counts.intersections / np.maximum(counts.unions(known.pixels), 1)
        over = iou[:, eligible].max(axis=1)
        cut = 0.017
        found += int((over > cut).sum())
        coarse = Coarse(gathered, eligible, concepts.category_of[eligible])
        _, means, number = permutation_null(coarse, [slice(0, 20)], cut, 49, seed)
        expected += number[0]
        best.append(over.mean())
        usual.append(means.mean())
    assert 5 < found < 60
    assert abs(found - expected) < 3 * np.sqrt(expected)
    assert np.mean(best) == pytest.approx(np.mean(usual), rel=0.1)


def test_only_so_many_images_are_gathered(few):
    concepts, maps = few[0], few[1]
    labels = [concepts.labels(index) for index in range(14)]
    whole = tallied(maps, concepts, labels, 0.9, 6)[2]
    some = tallied(maps, concepts, labels, 0.9, 6, most=5)[2]
    chosen = chosen_images(14, 5, 0)
    assert some.images == 5
    kept = np.isin(whole.places, chosen)
    assert np.array_equal(chosen[some.places], whole.places[kept])
    assert np.array_equal(some.cells, whole.cells[kept])


# ---- what it is for


def smooth_noise(seed, count, units):
    """Maps that have nothing to do with any image: noise, blurred to a fifth of its
    side.
    """
    noise = np.random.default_rng(seed).normal(size=(count, units, 8, 8))
    return torch.from_numpy(
        ndimage.gaussian_filter(noise, (0, 0, 1.6, 1.6), mode="reflect").astype(
            np.float32
        )
    )


def test_noise_is_significant_no_more_often_than_stated():
    concepts = load_concepts("drawn:images=40,size=32,seed=4")
    labels = [concepts.labels(index) for index in range(40)]
    units, p, found, expected, detectors = 4, [], 0, 0.0, 0
    for seed in range(20):
        _, known, gathered = tallied(
            smooth_noise(seed, 40, units), concepts, labels, quantile=0.98
        )
        eligible = np.flatnonzero(known.images >= 5)
        how = {"threshold": 0.04, "permutations": 99, "resamples": 0, "seed": seed}
        null = results(
            gathered,
            eligible,
            concepts.category_of,
            [slice(0, units)],
            np.zeros(units, dtype=int),
            **how,
        )[0]
        p += null.p.tolist()
        found += bool((null.q <= 0.05).any())
        expected += null.expected_detectors
        detectors += int(
            (
                Coarse(gathered, eligible, concepts.category_of[eligible]).best()
                > 0.04
            ).sum()
        )
    p = np.array(p)
    # of 80 units 4 are expected at .05 and 40 at .5: three standard deviations allow 9,
    # and 27 to 53
    assert (p <= 0.05).sum() <= 9
    assert 27 <= (p <= 0.5).sum() <= 53
    # one layer in twenty may have a false discovery; four or more of twenty happen with
    # probability .016
    assert found <= 3
    # the same noise passes IoU .04 often, and the null says how often
    assert detectors > 8
    assert abs(detectors - expected) < 3 * np.sqrt(expected)


def test_a_unit_that_knows_is_told_from_noise():
    concepts = load_concepts("drawn:images=60,size=32,seed=4")
    labels = [concepts.labels(index) for index in range(60)]
    maps = smooth_noise(0, 60, 4)
    target = next(one.index for one in concepts.concepts if one.name == "cross")
    for index, one in enumerate(labels):
        for place in np.flatnonzero(one.present == target):
            shown = torch.from_numpy(
                one.masks[place].reshape(8, 4, 8, 4).mean(axis=(1, 3))
            ).float()
            maps[index, 1] += 6 * shown
    counts, known, gathered = tallied(maps, concepts, labels, quantile=0.98)
    eligible = np.flatnonzero(known.images >= 5)
    iou = counts.intersections / np.maximum(counts.unions(known.pixels), 1)
    own = eligible[iou[:, eligible].argmax(axis=1)]
    how = {"threshold": 0.04, "permutations": 199, "resamples": 40, "seed": 0}
    null = results(
        gathered, eligible, concepts.category_of, [slice(0, 4)], own, **how
    )[0]
    assert null.p[1] == 1 / 200
    assert null.q[1] <= 0.05
    assert (null.q[[0, 2, 3]] > 0.05).all()
    assert null.alternatives[1] == (target,)
    assert sum(len(null.alternatives[unit]) for unit in (0, 2, 3)) > 3


def test_too_few_images_for_any_concept(tmp_path):
    concepts = load_concepts(small_broden(tmp_path / "set"))
    found = dissect(small_model(), "act", concepts, quantile=0.9, permutations=9)
    rows = found.table()
    assert not any(one.eligible for one in found.concepts)
    assert all(one.why.endswith("20 are needed") for one in found.concepts)
    assert (rows["concept"] == "").all()
    assert (rows["p"] == 1).all()
    assert not rows["significant"].any()


def test_a_dead_unit_detects_nothing(tmp_path):
    concepts = load_concepts(small_broden(tmp_path / "set"))
    model = small_model()
    with torch.no_grad():
        model.module.stem.weight[2] = 0
        model.module.stem.bias[2] = -1
    row = (
        dissect(
            model,
            "act",
            concepts,
            quantile=0.9,
            min_images=1,
            permutations=9,
            resamples=5,
        )
        .table()
        .loc[2]
    )
    assert (row["concept"], row["iou"], row["p"], row["alternatives"]) == (
        "",
        0,
        1,
        "",
    )


def test_random_weights_leave_the_model_and_change_everything():
    model = small_model()
    before = {
        name: value.clone() for name, value in model.module.state_dict().items()
    }
    blank, again, other = (with_random_weights(model, seed) for seed in (0, 0, 1))
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(blank.module.state_dict()[name], value)
        assert torch.equal(
            blank.module.state_dict()[name], again.module.state_dict()[name]
        )
        assert not torch.equal(
            blank.module.state_dict()[name], other.module.state_dict()[name]
        )
    assert blank.id != model.id


def test_a_null_needs_permutations(few):
    with pytest.raises(ConsilienceError, match="at least one permutation"):
        permutation_null(few[3], [slice(0, 3)], 0.04, 0, 0)


def test_another_seed_permutes_otherwise(few):
    groups = strata(few[3].gathered.annotated)
    orders = [permuted(groups, 14, seed, 3).tolist() for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]
