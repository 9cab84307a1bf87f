import itertools
import math

import numpy as np
import oracles_metrics as slow
import pytest
import torch
from conftest import RedFinder, planted_image
from oracles_lime import Eavesdropper, random_model, textured, view_of
from oracles_metrics import Shown, explanation

from consilience import api, registry
from consilience.metrics.curves import RISE, patches_of
from consilience.metrics.faithfulness import Squares, drawn
from consilience.metrics.perturbation import (
    VIEWS_AT_ONCE,
    Ranked,
    ranks,
    removal_stops,
)
from consilience.metrics.road import Imputed, imputed
from consilience.models.network import wrap
from consilience.perturb.superpixels import Grid
from consilience.types import (
    ClassTarget,
    ConsilienceError,
    NotApplicable,
    Sample,
    View,
)

SHAPE = (12, 10)
VIEW = view_of(textured(seed=3, shape=(40, 30))[5:17, 11:21])
IMAGE = VIEW.pixels[0].double().numpy()
PLANES = np.random.default_rng(3).normal(0, 0.05, size=(2, 3, *SHAPE))
VALUES = (
    np.random.default_rng(4).normal(size=SHAPE).astype(np.float32).astype(np.float64)
)
TIED = np.round(VALUES)
MAPS = {"distinct": VALUES, "tied": TIED, "flat": np.ones(SHAPE)}
MODEL = random_model(SHAPE)
MODEL.planes = torch.as_tensor(PLANES)
PROBING = (
    "insertion",
    "deletion",
    "pixel-flipping",
    "region-perturbation",
    "irof",
    "road",
    "average-drop",
    "increase",
    "average-gain",
    "infidelity",
    "sensitivity-n",
    "faithfulness-correlation",
    "faithfulness-estimate",
    "monotonicity",
    "sufficiency",
    "comprehensiveness",
)


def build(spec):
    return registry.metrics.build(spec)


def score(spec, values, model=MODEL, view=VIEW):
    return build(spec).score(model, view, explanation(values))


def fill_of(spec, view=VIEW):
    return registry.fills.build(spec).image(view, None)[0].double().numpy()


F, G = Shown(PLANES), Shown(PLANES, "logit")


# ---- against the formulas


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize(
    ("spec", "f", "fill", "places"),
    [
        ("steps=7,fill=black", F, "black", slow.points(120, 7)),
        ("steps=7,fill=blur(2),reads=logit", G, "blur(2)", slow.points(120, 7)),
        ("step=25,fill=noise,seed=5", F, "noise", [0, 25, 50, 75, 100, 120]),
    ],
)
def test_insertion_and_deletion_are_the_areas_of_their_curves(
    spec, f, fill, places, values
):
    seed = 5 if "seed=5" in spec else 0
    fill = fill_of(registry.render(registry.Spec(*_named(fill))))
    for name, formula in (("insertion", slow.insertion), ("deletion", slow.deletion)):
        found = score(f"{name}:{spec}", values)
        expected, heights = formula(f, IMAGE, fill, values, places, seed)
        assert found.value == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(
            found.curve[0], [place / 120 for place in places], atol=1e-12
        )
        np.testing.assert_allclose(found.curve[1], heights, atol=1e-5)


def _named(spec):
    name, _, rest = spec.rstrip(")").partition("(")
    return (name, (rest,) if rest else ())


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
def test_normalised_areas(values):
    f, fill, second = (
        Shown(PLANES, index=1),
        np.zeros_like(IMAGE),
        ClassTarget(1, "second"),
    )
    for name, formula in (("insertion", slow.insertion), ("deletion", slow.deletion)):
        auc, _ = formula(f, IMAGE, fill, values, slow.points(120, 6))
        metric = build(f"{name}:steps=6,fill=black,normalised=true,gap=.01")
        found = metric.score(MODEL, VIEW, explanation(values, target=second))
        assert found.value == pytest.approx(
            (auc - f(fill)) / (f(IMAGE) - f(fill)), abs=1e-4
        )
        assert found.facts["auc"] == pytest.approx(auc, abs=1e-5)
        assert metric.bounds == (-np.inf, np.inf)
        assert build(name).bounds == (0, 1)


def test_nothing_to_normalise_by_is_not_applicable():
    with pytest.raises(NotApplicable, match="gap"):
        score("insertion:steps=3,fill=black,normalised=true,gap=.9", VALUES)
    model = random_model(SHAPE)
    model.planes = torch.zeros(2, 3, *SHAPE, dtype=torch.float64)
    with pytest.raises(NotApplicable, match="nothing to divide by"):
        score("deletion:steps=3,normalised=true,gap=0", VALUES, model)
    assert score("deletion:steps=3", VALUES, model).value == pytest.approx(0.5)


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_pixel_flipping_is_the_mean_score_while_pixels_are_inverted(values, order):
    found = score(f"pixel-flipping:steps=8,order={order},share=.5", values)
    ordered = values if order == "morf" else -values
    places = [round(60 * k / 8) for k in range(9)]
    area, heights = slow.deletion(F, IMAGE, 1 - IMAGE, ordered, places)
    assert found.value == pytest.approx(area / 0.5, abs=1e-5)
    np.testing.assert_allclose(found.curve[1], heights, atol=1e-5)


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize(
    ("side", "regions", "order"),
    [(3, 6, "morf"), (4, 100, "lerf"), (5, 3, "morf"), (1, 9, "morf")],
)
def test_region_perturbation_is_aopc(values, side, regions, order):
    found = score(
        f"region-perturbation:regions={regions},patch={side},order={order}", values
    )
    expected = slow.aopc(
        F, IMAGE, fill_of("noise"), values, side, regions, lerf=order == "lerf"
    )
    assert found.value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
def test_irof_is_the_area_over_the_curve(values):
    segments = Grid(3).labels(np.zeros((*SHAPE, 3)))
    found = score("irof:segments=grid(3),fill=black", values)
    assert found.value == pytest.approx(
        slow.irof(F, IMAGE, np.zeros_like(IMAGE), values, segments), abs=1e-5
    )
    assert found.facts["superpixels"] == 9
    with pytest.raises(NotApplicable, match="below the gap"):
        score("irof:segments=grid(3),gap=1.1", values)


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("order", ["combined", "morf", "lerf"])
def test_road_is_the_papers(values, order):
    found = score(f"road:order={order},shares=.2+.55+.9,noise=.05,seed=2", values)
    assert found.value == pytest.approx(
        slow.road(F, IMAGE, values, (0.2, 0.55, 0.9), 0.05, 2, order), abs=1e-5
    )
    assert found.curve.shape == (3 if order == "combined" else 2, 3)


def test_road_accuracy_counts_the_first_class():
    found = score(
        "road:order=morf,shares=.2+.5+.9,reads=accuracy,noise=0", VALUES
    ).curve[1]
    order = slow.order_of(VALUES, 0)
    for share, hit in zip((0.2, 0.5, 0.9), found, strict=True):
        gone = np.zeros(120, dtype=bool)
        gone[order[: round(share * 120)]] = True
        image = slow.imputed(IMAGE, gone.reshape(SHAPE))
        assert hit == float(F(image) > 0.5)
    assert set(found) <= {0.0, 1.0}


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_imputation_is_the_dense_systems(share):
    gone = np.random.default_rng(int(share * 100)).random(SHAPE) < share
    gone[0, 0], gone[-1, -1] = False, True
    np.testing.assert_allclose(
        imputed(IMAGE, gone), slow.imputed(IMAGE, gone), atol=1e-10
    )
    block = np.zeros(SHAPE, dtype=bool)
    block[: round(12 * share) + 1, :7] = True
    np.testing.assert_allclose(
        imputed(IMAGE, block), slow.imputed(IMAGE, block), atol=1e-10
    )


def test_imputation_of_nothing_and_of_a_plane():
    np.testing.assert_array_equal(imputed(IMAGE, np.zeros(SHAPE, dtype=bool)), IMAGE)
    flat = np.full_like(IMAGE, 0.25)
    gone = np.ones(SHAPE, dtype=bool)
    gone[5, 5] = False
    np.testing.assert_allclose(imputed(flat, gone), flat, atol=1e-12)


def test_roads_noise_is_on_what_was_removed_alone():
    image = torch.full((1, 3, 60, 60), 0.5)
    rank = ranks(np.random.default_rng(0).normal(size=(60, 60)), 0)
    keeps = Imputed(rank, np.array([0, 0]), np.array([1800, 2700]), noise=0.1, seed=1)
    first, second = (
        torch.cat(list(keeps.chunks(image, image, 1))).double().numpy() - 0.5
    )
    assert np.abs(first[:, rank >= 1800]).max() < 1e-6
    drawn_ones = first[:, rank < 1800]
    assert drawn_ones.std() == pytest.approx(0.1, rel=0.03)
    assert abs(np.corrcoef(drawn_ones)[0, 1]) < 0.1  # each channel has its own
    both = rank < 1800
    assert abs(np.corrcoef(first[0, both], second[0, both])[0, 1]) < 0.1
    whole = torch.cat(list(keeps.chunks(image, image, 7)))
    assert (
        whole.numpy().tobytes()
        == torch.cat(list(keeps.chunks(image, image, 1))).numpy().tobytes()
    )


@pytest.mark.parametrize("fill", ["black", "blur(2)"])
@pytest.mark.parametrize(
    "values", [VALUES, np.abs(VALUES), TIED], ids=["signed", "positive", "tied"]
)
def test_drops_are_of_the_image_times_the_map(values, fill):
    y, o = (
        F(IMAGE),
        F(slow.masked(IMAGE, fill_of(fill.replace("(", ":").rstrip(")")), values)),
    )
    found = {
        name: score(f"{name}:fill={fill}", values)
        for name in ("average-drop", "increase", "average-gain")
    }
    assert found["average-drop"].value == pytest.approx(max(0, y - o) / y, abs=1e-5)
    assert found["increase"].value == float(y < o)
    assert found["average-gain"].value == pytest.approx(
        max(0, o - y) / (1 - y), abs=1e-5
    )
    assert found["average-drop"].facts["masked"] == pytest.approx(o, abs=1e-5)


def test_drops_rise_and_fall_with_the_class():
    for index in (0, 1):
        f = Shown(PLANES, index=index)
        y, o = f(IMAGE), f(slow.masked(IMAGE, np.zeros_like(IMAGE), VALUES))
        given = explanation(VALUES, target=ClassTarget(index, "one"))
        gain, drop = (
            build(name).score(MODEL, VIEW, given).value
            for name in ("average-gain", "average-drop")
        )
        assert gain == pytest.approx(max(0, o - y) / (1 - y), abs=1e-5)
        assert drop == pytest.approx(max(0, y - o) / y, abs=1e-5)
        assert (gain > 0.01) != (drop > 0.01)  # what one class loses the other gains


def test_a_flat_map_games_average_drop_and_an_empty_one_is_no_mask():
    assert score("average-drop", np.ones(SHAPE)).value == 0
    assert score("increase", np.ones(SHAPE)).value == 0
    with pytest.raises(NotApplicable, match="positive"):
        score("average-drop", -np.abs(VALUES))


def test_drops_need_a_probability():
    values = explanation(VALUES, target=ClassTarget(0, "first", "value", "values"))
    with pytest.raises(NotApplicable, match="no probability"):
        build("average-gain").score(MODEL, VIEW, values)


def test_adcc_is_the_harmonic_mean_of_its_three(red_model, planted):
    explained = api.explain(red_model, planted, "gradcam", target="red")
    view = red_model.view(planted)
    found = build("adcc").score(red_model, view, explained)
    scaled = np.maximum(explained.values, 0).astype(np.float64)
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    hidden = View(
        view.pixels * torch.from_numpy(scaled).float(), view.geometry, view.mode
    )
    again = (
        api.resolve_explainer(red_model, "gradcam")
        .explain(red_model, hidden, explained.target)
        .values
    )
    again = (
        torch.nn.functional.interpolate(again[None, None], (64, 64), mode="bilinear")[
            0, 0
        ]
        .double()
        .numpy()
    )
    y, o = (
        float(red_model.scores(one.pixels).softmax(1)[0, 1]) for one in (view, hidden)
    )
    coherency = (
        1
        + slow.correlation(
            scaled.ravel().tolist(), np.maximum(again, 0).ravel().tolist()
        )
    ) / 2
    parts = [coherency, 1 - scaled.mean(), 1 - max(0, y - o) / y]
    assert found.value == pytest.approx(3 / sum(1 / part for part in parts), rel=1e-4)
    assert found.facts["complexity"] == pytest.approx(scaled.mean(), rel=1e-6)


def test_adcc_of_a_flat_map_is_not_applicable(red_model, planted):
    flat = api.explain(red_model, planted, "constant", target="red")
    with pytest.raises(NotApplicable, match="correlates with nothing"):
        build("adcc").score(red_model, red_model.view(planted), flat)


def some_sets(sizes, seed=0):
    keeps = drawn(sizes, SHAPE, seed)
    return [np.flatnonzero(row).tolist() for part in keeps.sets(7) for row in part]


def test_random_sets_have_their_size_and_are_uniform():
    sets = some_sets((0, *[30] * 400))
    assert [len(some) for some in sets] == [0] + [30] * 400
    counts = np.bincount(np.concatenate(sets).astype(int), minlength=120)
    spread = math.sqrt(400 * 0.25 * 0.75)
    assert np.abs(counts - 100).max() < 4.5 * spread
    assert counts.std() == pytest.approx(spread, rel=0.25)
    assert some_sets((0, 30)) == sets[:2]
    assert some_sets((0, 30), seed=1) != sets[:2]


@pytest.mark.parametrize("values", [VALUES, TIED], ids=["distinct", "tied"])
def test_faithfulness_correlation(values):
    found = score(
        "faithfulness-correlation:subsets=20,share=.1,fill=black,seed=3", values
    )
    sets = some_sets((0, *[12] * 20), seed=3)[1:]
    assert found.value == pytest.approx(
        slow.set_correlation(F, IMAGE, np.zeros_like(IMAGE), values, sets), abs=1e-4
    )


def test_sensitivity_n_is_the_mean_over_sizes():
    found = score(
        "sensitivity-n:sizes=3,subsets=15,low=.05,high=.8,fill=blur(2)", VALUES
    )
    counts = [6, 24, 96]
    np.testing.assert_allclose(found.curve[0], [count / 120 for count in counts])
    sets = some_sets((0, *np.repeat(counts, 15).tolist()))[1:]
    for place, part in enumerate(
        itertools.batched(sets, 15)
        if hasattr(itertools, "batched")
        else _fifteens(sets)
    ):
        expected = slow.set_correlation(F, IMAGE, fill_of("blur:2"), VALUES, part)
        assert found.curve[1, place] == pytest.approx(expected, abs=1e-4)
    assert found.value == pytest.approx(found.curve[1].mean())


def _fifteens(items):
    return [items[start : start + 15] for start in range(0, len(items), 15)]


@pytest.mark.parametrize(
    "name", ["sensitivity-n:subsets=9,sizes=2", "faithfulness-correlation:subsets=9"]
)
def test_what_does_not_vary_has_no_correlation(name):
    with pytest.raises(NotApplicable, match="no correlation"):
        score(name, np.ones(SHAPE))
    model = random_model(SHAPE)
    model.planes = torch.zeros(2, 3, *SHAPE, dtype=torch.float64)
    with pytest.raises(NotApplicable, match="no correlation"):
        score(name, VALUES, model)


@pytest.mark.parametrize("values", [VALUES, TIED], ids=["distinct", "tied"])
def test_faithfulness_estimate(values):
    found = score("faithfulness-estimate:groups=11,fill=black", values)
    assert found.value == pytest.approx(
        slow.estimate(F, IMAGE, np.zeros_like(IMAGE), values, slow.points(120, 11)),
        abs=1e-4,
    )


@pytest.mark.parametrize("kind", ["contribution", "gradient"])
@pytest.mark.parametrize("scaled", [True, False])
def test_infidelity(kind, scaled):
    found = score(
        f"infidelity:squares=25,size=.3,values={kind},scaled={str(scaled).lower()},fill=blur(2),seed=4",
        VALUES,
    )
    corners = Squares.draw(25, 3, SHAPE, 4).corners.tolist()
    expected = slow.infidelity(
        F, IMAGE, fill_of("blur:2"), VALUES, corners, 3, kind == "gradient", scaled
    )
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert (
        score("infidelity:squares=25", np.zeros(SHAPE)).value
        == score("infidelity:squares=25", VALUES).facts["nothing"]
    )


def test_infidelity_is_captums():
    from captum.metrics import infidelity

    class Linear(torch.nn.Module):
        def forward(self, pixels):
            return torch.einsum(
                "nchw,kchw->nk", pixels.double(), torch.as_tensor(PLANES)
            ).softmax(dim=1)[:, 0]

    squares = Squares.draw(30, 3, SHAPE, 0)
    turn = iter(squares.corners.tolist())

    def removed(inputs):
        moved = []
        for image in inputs:
            top, left = next(turn)
            change = torch.zeros_like(image)
            change[:, top : top + 3, left : left + 3] = image[
                :, top : top + 3, left : left + 3
            ]
            moved.append(change)
        change = torch.stack(moved)
        return change, inputs - change

    attribution = torch.from_numpy(VALUES).expand(1, 3, *SHAPE)
    theirs = infidelity(
        Linear(), removed, VIEW.pixels.double(), attribution, n_perturb_samples=30
    )
    ours = score(
        "infidelity:squares=30,size=.3,values=gradient,scaled=false,fill=black",
        VALUES,
    )
    assert ours.value == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
def test_monotonicity(values):
    found = score("monotonicity:steps=13,fill=black", values)
    expected = slow.monotonicity(
        F, IMAGE, np.zeros_like(IMAGE), values, slow.points(120, 13)
    )
    assert found.value == pytest.approx(expected)
    assert 0 < expected < 1
    assert score("monotonicity:steps=13,fill=black,strict=true", values).value == 0
    assert build("monotonicity:strict=true").binary
    assert not build("monotonicity").binary


@pytest.mark.parametrize("values", MAPS.values(), ids=MAPS)
def test_sufficiency_and_comprehensiveness(values):
    for name, formula in (
        ("sufficiency", slow.sufficiency),
        ("comprehensiveness", slow.comprehensiveness),
    ):
        found = score(f"{name}:shares=.05+.3+1,fill=blur(2)", values)
        assert found.value == pytest.approx(
            formula(F, IMAGE, fill_of("blur:2"), values, (0.05, 0.3, 1)), abs=1e-5
        )


# ---- complexity


@pytest.mark.parametrize(
    "values", [*MAPS.values(), -np.abs(VALUES) * 1e-30], ids=[*MAPS, "tiny"]
)
def test_complexity(values):
    values = values.astype(np.float32).astype(np.float64)
    assert score("sparseness", values).value == pytest.approx(
        slow.gini(values), abs=1e-9
    )
    assert score("entropy", values).value == pytest.approx(
        slow.entropy(values), abs=1e-9
    )
    shares = np.abs(values) / np.abs(values).sum()
    assert score("effective-pixels", values).value == pytest.approx(
        1 / (shares**2).sum(), rel=1e-9
    )
    assert score("effective-pixels:order=1", values).value == pytest.approx(
        math.exp(slow.entropy(values)), rel=1e-9
    )
    assert score("effective-pixels:order=0", values).value == sum(
        1 for share in shares.ravel() if share > 1e-5 * shares.max()
    )
    for order in (0.5, 3, 200):
        powers = sum((share / shares.max()) ** order for share in shares.ravel())
        log = (math.log(powers) + order * math.log(shares.max())) / (1 - order)
        assert score(
            f"effective-pixels:order={order}", values
        ).value == pytest.approx(math.exp(log), rel=1e-6)


@pytest.mark.parametrize("name", ["sparseness", "entropy", "effective-pixels"])
def test_complexity_of_extremes(name):
    one = np.zeros(SHAPE)
    one[3, 4] = -2
    least, most = {
        "sparseness": (1 - 1 / 120, 0),
        "entropy": (0, math.log(120)),
        "effective-pixels": (1, 120),
    }[name]
    assert score(name, one).value == pytest.approx(least)
    assert score(name, np.full(SHAPE, 3.0)).value == pytest.approx(most)
    with pytest.raises(NotApplicable, match="0 everywhere"):
        score(name, np.zeros(SHAPE))


# ---- by hand


class Hand:
    """Four pixels that say .4, .3, .2 and .1 for the first class if they are white."""

    outputs, batch = "probabilities", 32

    def __init__(self, weights=(0.4, 0.3, 0.2, 0.1)):
        self.weights = torch.tensor(weights)

    def scores(self, pixels):
        share = (pixels.mean(dim=1).flatten(1) * self.weights).sum(dim=1)
        return torch.stack([share, 1 - share], dim=1)


WHITE = view_of(np.full((2, 2, 3), 255, dtype=np.uint8))
FIRST = ClassTarget(0, "first", "probability", "probabilities")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("insertion:steps=4,fill=black", (0.4 + 0.7 + 0.9 + 1 / 2) / 4),
        ("deletion:steps=4,fill=black", (1 / 2 + 0.6 + 0.3 + 0.1) / 4),
        ("deletion:steps=4,fill=black,normalised=true", 0.375),
        ("pixel-flipping:steps=4", 0.375),
        ("pixel-flipping:steps=4,order=lerf", (1 / 2 + 0.9 + 0.7 + 0.4) / 4),
        (
            "region-perturbation:regions=4,patch=1,fill=black",
            (0 + 0.4 + 0.7 + 0.9 + 1) / 5,
        ),
        ("region-perturbation:regions=2,patch=1,fill=black", (0 + 0.4 + 0.7) / 3),
        ("irof:segments=grid(2),fill=black", 1 - 0.375),
        ("average-drop", 1 - (0.4 + 0.3 * 2 / 3 + 0.2 / 3)),
        ("increase", 0),
        ("monotonicity:steps=4,fill=black", 1),
        ("monotonicity:steps=4,fill=black,strict=true", 1),
        ("sufficiency:shares=.25+.5,fill=black", (0.6 + 0.3) / 2),
        ("comprehensiveness:shares=.25+.5,fill=black", (0.4 + 0.7) / 2),
        ("infidelity:squares=50,size=.5,fill=black", 0),
        ("faithfulness-estimate:groups=4,fill=black", 1),
        ("faithfulness-correlation:subsets=30,share=.25,fill=black", 1),
        ("sensitivity-n:sizes=2,subsets=30,low=.25,high=.5,fill=black", 1),
        ("sparseness", 0.25),
        (
            "entropy",
            -(
                0.4 * math.log(0.4)
                + 0.3 * math.log(0.3)
                + 0.2 * math.log(0.2)
                + 0.1 * math.log(0.1)
            ),
        ),
        ("effective-pixels", 1 / 0.3),
    ],
)
def test_by_hand(spec, expected):
    found = build(spec).score(
        Hand(), WHITE, explanation([[4, 3], [2, 1]], target=FIRST)
    )
    assert found.value == pytest.approx(expected, abs=1e-6)


def test_road_by_hand():
    pixels = np.repeat(np.array([[1.0, 0.8], [0.6, 0.2]])[:, :, None], 3, axis=2)
    view = view_of(np.rint(pixels * 255).astype(np.uint8))
    given = explanation([[4, 3], [2, 1]], target=FIRST)
    first = (
        2 * 0.8 + 2 * 0.6 + 0.2
    ) / 5  # neighbours beside count twice the one at the corner
    morf = 0.4 * first + 0.3 * 0.8 + 0.2 * 0.6 + 0.1 * 0.2
    lerf = 0.4 + 0.3 * 0.8 + 0.2 * 0.6 + 0.1 * (2 * 0.8 + 2 * 0.6 + 1) / 5
    for spec, expected in (
        ("order=morf,", morf),
        ("order=lerf,", lerf),
        ("", (lerf - morf) / 2),
    ):
        assert build(f"road:{spec}shares=.25,noise=0").score(
            Hand(), view, given
        ).value == pytest.approx(expected, abs=1e-6)


def test_average_gain_by_hand():
    model, values = Hand((0.5, 0.2, 0.1, -0.3)), [[1, 1], [1, 0]]
    found = build("average-gain").score(
        model, WHITE, explanation(values, target=FIRST)
    )
    assert found.value == pytest.approx((0.8 - 0.5) / (1 - 0.5), abs=1e-6)
    assert (
        build("increase").score(model, WHITE, explanation(values, target=FIRST)).value
        == 1
    )
    with pytest.raises(NotApplicable, match="probability 1"):
        build("average-gain").score(
            Hand((1.0, 0, 0, 0)), WHITE, explanation(values, target=FIRST)
        )


def test_a_wrong_map_by_hand():
    backwards = explanation([[1, 2], [3, 4]], target=FIRST)
    found = {
        name: build(name).score(Hand(), WHITE, backwards).value
        for name in (
            "insertion:steps=4,fill=black",
            "deletion:steps=4,fill=black",
            "faithfulness-estimate:groups=4,fill=black",
        )
    }
    assert list(found.values()) == pytest.approx(
        [(0.1 + 0.3 + 0.6 + 0.5) / 4, (0.5 + 0.9 + 0.7 + 0.4) / 4, -1], abs=1e-6
    )


# ---- the order of pixels


def test_ties_come_in_one_order_for_all_methods():
    flat, other = ranks(np.zeros(SHAPE), 0), ranks(np.full(SHAPE, 7.5), 0)
    np.testing.assert_array_equal(flat, other)
    half = np.zeros(SHAPE)
    half[:6] = 1
    found = ranks(half, 0)
    assert found[:6].max() < 60 <= found[6:].min()
    np.testing.assert_array_equal(
        np.argsort(found[:6].ravel()), np.argsort(flat[:6].ravel())
    )
    assert (ranks(np.zeros(SHAPE), 1) != flat).mean() > 0.9
    assert sorted(flat.ravel().tolist()) == list(range(120))
    assert (
        abs(np.corrcoef(flat.ravel(), np.arange(120))[0, 1]) < 0.3
    )  # not the order of memory


def test_ranks_are_those_of_a_literal_sort():
    for values in MAPS.values():
        order = slow.order_of(values, 9)
        assert ranks(values, 9).ravel()[order].tolist() == list(range(120))


def test_stops():
    assert removal_stops(10, 4).tolist() == [0, 2, 5, 8, 10]
    assert removal_stops(10, 4, step=4).tolist() == [0, 4, 8, 10]
    assert removal_stops(3, 100).tolist() == [0, 1, 2, 3]
    assert removal_stops(50176, 100, step=224).tolist() == list(range(0, 50177, 224))


def test_patches_are_cut_at_the_borders():
    assert patches_of((3, 5), 2).tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
    ]


@pytest.mark.parametrize("reveal", [False, True])
def test_edits_by_rank_show_the_model_what_the_loop_makes(reveal):
    fill = torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    start, stop = np.array([0, 0, 5, 50, 119]), np.array([0, 120, 9, 100, 120])
    keeps = Ranked(ranks(VALUES, 0), start, stop, reveal)
    shown = torch.cat(list(keeps.chunks(VIEW.pixels, fill, 2))).double().numpy()
    order, other = slow.order_of(VALUES, 0), fill[0].double().numpy()
    inside, outside = (IMAGE, other) if reveal else (other, IMAGE)
    for image, low, high in zip(shown, start, stop, strict=True):
        np.testing.assert_array_equal(
            image, slow.replaced(outside, inside, order[low:high])
        )


# ---- many images, chunks, channels


def others(count):
    rng = np.random.default_rng(8)
    views = [
        view_of(textured(seed=number, shape=(40, 30))[5:17, 11:21])
        for number in range(count)
    ]
    given = [
        explanation(rng.normal(size=SHAPE), target=ClassTarget(number % 2, "some"))
        for number in range(count)
    ]
    return views, given


@pytest.mark.parametrize("name", [*PROBING, "sparseness"])
def test_many_images_are_many_of_one(name):
    metric = build(name)
    views, given = others(3)
    alone = [metric.score(MODEL, *pair) for pair in zip(views, given, strict=True)]
    if not hasattr(metric, "score_batch"):
        return
    together = metric.score_batch(MODEL, views, given)
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)


def test_chunks_are_full_across_images():
    model = Eavesdropper(PLANES, batch=8)
    views, given = others(3)
    build("deletion:steps=5").score_batch(model, views, given)
    assert model.sizes == [8, 8, 2]
    shown = torch.cat(model.seen)
    for number, view in enumerate(views):
        torch.testing.assert_close(shown[6 * number], view.pixels[0], rtol=0, atol=0)


def test_a_long_batch_is_taken_in_groups_and_says_what_is_not_applicable():
    views, given = others(VIEWS_AT_ONCE + 3)
    given[5] = explanation(-np.ones(SHAPE))
    found = build("average-drop").score_batch(MODEL, views, given)
    assert len(found) == VIEWS_AT_ONCE + 3
    assert [
        number for number, one in enumerate(found) if isinstance(one, NotApplicable)
    ] == [5]
    alone = build("average-drop").score(MODEL, views[-1], given[-1])
    assert found[-1].value == pytest.approx(alone.value, abs=1e-6)


@pytest.mark.parametrize("name", PROBING)
def test_chunks_change_nothing(name):
    spec = {
        "sensitivity-n": "sensitivity-n:sizes=3,subsets=10",
        "infidelity": "infidelity:squares=30",
    }.get(name, name)
    found = []
    for batch in (1, 7, 100):
        model = random_model(SHAPE, batch=batch)
        model.planes = torch.as_tensor(PLANES)
        found.append(score(spec, VALUES, model).value)
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize(
    "name", [name for name in PROBING if name != "region-perturbation"]
)
def test_every_channel_counts_alike(name):
    spec = name if name != "road" else "road:noise=0"
    turn = [2, 0, 1]
    model = random_model(SHAPE)
    model.planes = torch.as_tensor(PLANES[:, turn].copy())
    view = View(VIEW.pixels[:, turn], VIEW.geometry, VIEW.mode)
    assert score(spec, VALUES, model, view).value == pytest.approx(
        score(spec, VALUES).value, abs=1e-5
    )
    for channel in range(3):
        only = np.zeros_like(PLANES)
        only[:, channel] = PLANES[:, channel] * 3
        model.planes = torch.as_tensor(only)
        assert np.isfinite(score(spec, VALUES, model).value)


@pytest.mark.parametrize(
    "name",
    [
        "insertion",
        "deletion",
        "road",
        "pixel-flipping",
        "monotonicity",
        "sufficiency",
    ],
)
def test_only_the_order_of_the_map_matters(name):
    assert score(name, np.exp(VALUES) * 3).value == score(name, VALUES).value


@pytest.mark.parametrize(
    "name",
    [
        "sensitivity-n",
        "faithfulness-correlation",
        "infidelity",
        "sparseness",
        "entropy",
    ],
)
def test_the_scale_of_the_map_does_not_matter(name):
    assert score(name, 8 * VALUES).value == pytest.approx(
        score(name, VALUES).value, rel=1e-5
    )


def test_a_linear_models_own_weights_are_perfect():
    weights = (PLANES[0] * IMAGE).sum(axis=0)
    for name in (
        "sensitivity-n:subsets=20",
        "faithfulness-correlation",
        "faithfulness-estimate:groups=20",
    ):
        spec = name + ("," if ":" in name else ":") + "reads=logit,fill=black"
        assert score(spec, weights).value == pytest.approx(1, abs=1e-4)
    plain = score("infidelity:reads=logit,fill=black,scaled=false", weights)
    assert plain.value < 1e-6 * plain.facts["nothing"]


def test_directions_and_bounds_follow_the_options():
    assert build("road").higher_is_better
    assert not build("road:order=morf").higher_is_better
    assert build("road:order=lerf").bounds == (0, 1)
    assert build("pixel-flipping:order=lerf").higher_is_better
    assert not build("region-perturbation:order=lerf").higher_is_better
    assert build("insertion:reads=logit").bounds == (-np.inf, np.inf)
    assert registry.metrics.get("road").higher_is_better is True
    assert registry.spell(build("road:order=morf")) == "road:order=morf"


@pytest.mark.parametrize(
    "spec",
    [
        "insertion:steps=0",
        "insertion:seed=-1",
        "deletion:step=-3",
        "road:shares=1",
        "road:shares=0+.5",
        "road:noise=-1",
        "pixel-flipping:share=0",
        "region-perturbation:patch=0",
        "irof:gap=0",
        "infidelity:squares=1",
        "infidelity:size=2",
        "sensitivity-n:subsets=2",
        "faithfulness-estimate:groups=2",
        "monotonicity:slack=-1",
        "sufficiency:shares=1.5",
        "effective-pixels:order=-1",
        "effective-pixels:least=1",
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        build(spec)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ConsilienceError, match="the map is"):
        score("insertion", np.ones((3, 3)))
    with pytest.raises(ConsilienceError, match="not finite"):
        score("sparseness", np.full(SHAPE, np.nan))


# ---- RISE's protocol


def test_the_blur_of_rise():
    view = View(VIEW.pixels, VIEW.geometry, VIEW.mode, (0.485, 0.456, 0.406))
    for spec, side, sigma in (
        ("rise-blur", 11, 5.0),
        ("rise-blur:side=5,sigma=1", 5, 1.0),
    ):
        expected = slow.rise_blur(IMAGE, view.neutral, side, sigma)
        np.testing.assert_allclose(fill_of(spec, view), expected, atol=1e-5)


def test_rises_own_metric_gives_the_same_numbers():
    """Its loop: pixels a row's worth at a time on normalised tensors, the area summed
    with halves at the ends.
    """
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
    )
    pixels = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    planes = torch.as_tensor(
        np.random.default_rng(1).normal(0, 0.02, (2, 3, 20, 20)), dtype=torch.float32
    )
    saliency = np.random.default_rng(2).normal(size=(20, 20)).astype(np.float32)

    def network(normalised):
        return torch.einsum("nchw,kchw->nk", normalised, planes).softmax(dim=1)[:, 0]

    class Model:
        outputs, batch = "probabilities", 4

        def scores(self, shown):
            first = network((shown - mean) / std)
            return torch.stack([first, 1 - first], dim=1)

    view = View(pixels, None, "squash", (0.485, 0.456, 0.406))
    normalised = (pixels - mean) / std
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    from scipy.ndimage import gaussian_filter

    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).float()
    blurred = torch.nn.functional.conv2d(
        normalised,
        torch.stack(
            [torch.stack([kernel * (a == b) for b in range(3)]) for a in range(3)]
        ),
        padding=5,
    )
    order = np.flip(np.argsort(saliency.ravel()))
    for spec, start, finish in (
        (RISE[0], blurred.clone(), normalised),
        (RISE[1], normalised.clone(), torch.zeros_like(normalised)),
    ):
        steps = -(-400 // 20)
        scores = np.empty(steps + 1)
        for number in range(steps + 1):
            scores[number] = float(network(start))
            some = order[20 * number : 20 * (number + 1)].copy()
            start.view(3, -1)[:, some] = finish.reshape(3, -1)[:, some]
        expected = (scores.sum() - scores[0] / 2 - scores[-1] / 2) / steps
        found = build(spec.replace("224", "20")).score(
            Model(), view, explanation(saliency, target=FIRST)
        )
        assert found.value == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(found.curve[1], scores, atol=1e-5)


# ---- peers

quantus = pytest.importorskip("quantus")
CLASSES = ("nothing", "red")
PEER = {
    "normalise": False,
    "abs": False,
    "return_aggregate": False,
    "disable_warnings": True,
    "display_progressbar": False,
}


@pytest.fixture(scope="module")
def red():
    """Two images of 48 x 48, maps without ties, and what Quantus wants of them.

    It takes only steps that divide the number of pixels, and steps of whole pixels are
    multiples of three: a frame of 64 or 224 pixels has none.
    """
    red_model = wrap(
        RedFinder().eval(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=48,
    ).using(engine="torch")
    samples = [
        Sample("small", np.ascontiguousarray(planted_image(seed).pixels[:48, 16:]))
        for seed in range(2)
    ]
    views = [red_model.view(sample) for sample in samples]
    maps = [
        np.random.default_rng(seed).normal(size=(48, 48)).astype(np.float32)
        for seed in range(2)
    ]
    for one in maps:
        one[8:24, 24:40] += 1
    given = [explanation(one, target=ClassTarget(1, "red")) for one in maps]
    call = {
        "model": red_model.module,
        "x_batch": torch.cat([view.pixels for view in views]).numpy(),
        "y_batch": np.array([1, 1]),
        "a_batch": np.stack(maps)[:, None],
        "softmax": True,
        "channel_first": True,
        "device": "cpu",
    }
    return red_model, views, given, call


def ours(red, spec):
    model, views, given, _ = red
    return build(spec).score_batch(model, views, given)


def test_pixel_flipping_is_quantus_where_whole_pixels_are_flipped(red):
    metric = quantus.PixelFlipping(
        features_in_step=3 * 128,
        perturb_baseline=0.0,
        return_auc_per_sample=False,
        **PEER,
    )
    theirs = np.array(metric(**red[3]))
    for found, row in zip(
        ours(red, "pixel-flipping:steps=18,fill=black"), theirs, strict=True
    ):
        np.testing.assert_allclose(found.curve[1, 1:], row, atol=1e-5)


def test_a_step_between_pixels_flips_whole_ones(red):
    """54 steps of 2,304 pixels do not come out even: the paper flips pixels, not
    elements of channels (as some versions of Quantus do).
    """
    model, views, given, _ = red
    for view, one in zip(views, given, strict=True):
        image, values = view.pixels[0].double().numpy(), one.values.astype(np.float64)

        def f(base_image):
            return float(
                model.scores(torch.from_numpy(base_image)[None].float()).softmax(1)[
                    0, 1
                ]
            )

        places = [round(2304 * k / 54) for k in range(9)]
        _, heights = slow.deletion(f, image, np.zeros_like(image), values, places)
        found = build("pixel-flipping:steps=54,fill=black").score(model, view, one)
        np.testing.assert_allclose(found.curve[1, :9], heights, atol=1e-5)


def test_region_perturbation_is_quantus(red):
    metric = quantus.RegionPerturbation(
        patch_size=8, regions_evaluation=20, perturb_baseline=0.0, **PEER
    )
    for found, losses in zip(
        ours(red, "region-perturbation:regions=20,patch=8,fill=black"),
        metric(**red[3]),
        strict=True,
    ):
        np.testing.assert_allclose(
            found.curve[1, 0] - found.curve[1, 1:], losses, atol=1e-5
        )
        assert found.value == pytest.approx(np.sum(losses) / 21, abs=1e-5)


def test_irof_is_quantus_but_for_its_ends(red, monkeypatch):
    """Quantus: S - area(f_1 .. f_S) with steps of 1; with the image itself and steps of
    1/S it is the paper's mean.
    """
    from quantus.helpers import utils

    broken = quantus.IROF(segmentation_method="slic", perturb_baseline=0.0, **PEER)
    with pytest.raises(
        AssertionError, match="same as the mask shape"
    ):  # its own mask does not fit RGB
        broken(**red[3])
    whole = quantus.IROF(
        segmentation_method="slic",
        perturb_func=lambda arr, mask, **_: np.where(mask, 0, arr),
        **PEER,
    )
    monkeypatch.setattr(
        np, "trapz", getattr(np, "trapezoid", None), raising=False
    )  # gone from numpy since its 0.6
    theirs = whole(
        **red[3], batch_size=1
    )  # in a batch, an image of fewer superpixels is taken to fall to 0 after its last

    class Theirs:
        def __init__(self, base_image):
            self.image = base_image

        def labels(self, image):
            return np.asarray(
                utils.get_superpixel_segments(self.image.astype("double"), "slic"),
                dtype=np.int64,
            )

    model, views, given, call = red
    for view, one, value, x in zip(
        views, given, theirs, call["x_batch"], strict=True
    ):
        metric = build("irof:fill=black")
        object.__setattr__(metric, "segments", Theirs(np.moveaxis(x, 0, -1)))
        found = metric.score(model, view, one)
        count, heights = found.facts["superpixels"], found.curve[1]
        assert value == pytest.approx(
            count - np.sum((heights[1:-1] + heights[2:]) / 2), abs=1e-3
        )
        assert found.value == pytest.approx(
            1 - (np.sum((heights[:-1] + heights[1:]) / 2)) / count, abs=1e-9
        )


def test_faithfulness_correlation_is_quantus_on_the_same_sets(red, monkeypatch):
    sets = [
        np.flatnonzero(row)
        for part in drawn((0, *[115] * 12), (48, 48), 0).sets(5)
        for row in part
    ][1:]
    whole = iter(
        [
            np.concatenate([some + channel * 2304 for channel in range(3)])
            for some in sets
            for _ in range(2)
        ]
    )
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=12, subset_size=345, perturb_baseline=0.0, **PEER
    )
    monkeypatch.setattr(np.random, "choice", lambda *args, **more: next(whole))
    theirs = metric(**red[3])
    monkeypatch.undo()
    for found, value in zip(
        ours(red, "faithfulness-correlation:subsets=12,share=.05,fill=black"),
        theirs,
        strict=True,
    ):
        assert found.value == pytest.approx(value, abs=1e-4)


def test_faithfulness_estimate_is_quantus(red):
    metric = quantus.FaithfulnessEstimate(
        features_in_step=3 * 64, perturb_baseline=0.0, **PEER
    )
    for found, value in zip(
        ours(red, "faithfulness-estimate:groups=36,fill=black"),
        metric(**red[3]),
        strict=True,
    ):
        assert found.value == pytest.approx(value, abs=1e-4)


def test_quantus_monotonicity_is_always_true(red):
    """It replaces fill by fill; brought back by the formula, the score of a map of
    noise falls somewhere.
    """
    assert quantus.Monotonicity(
        features_in_step=3 * 64, perturb_baseline=0.0, **PEER
    )(**red[3]) == [True, True]
    model, views, given, _ = red
    for view, one, found in zip(
        views, given, ours(red, "monotonicity:steps=36,fill=black"), strict=True
    ):

        def f(base_image):
            return float(
                model.scores(torch.from_numpy(base_image)[None].float()).softmax(1)[
                    0, 1
                ]
            )

        image = view.pixels[0].double().numpy()
        values = one.values.astype(np.float64)
        expected = slow.monotonicity(
            f, image, np.zeros_like(image), values, slow.points(2304, 36)
        )
        assert found.value == expected < 1


def test_quantus_road_takes_elements_of_channels_for_pixels(red):
    """On RGB its indices run over three channels of a plane that it fills as one."""
    metric = quantus.ROAD(percentages=[20, 50], noise=0, **PEER)
    with pytest.raises(
        IndexError
    ):  # where it does not fail it fills the wrong pixels
        metric(**red[3])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_is_that_of_peers(share):
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer
    from quantus.functions.perturb_func import noisy_linear_imputation

    gone = ranks(VALUES, 0) < round(share * 120)
    mine = imputed(IMAGE, gone)
    theirs = noisy_linear_imputation(
        IMAGE.copy(), np.flatnonzero(gone.ravel()), noise=0.0
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-9)
    torch.manual_seed(0)
    cam = NoisyLinearImputer(noise=0.0)(
        torch.from_numpy(IMAGE).float(), torch.from_numpy(~gone).float()
    )
    np.testing.assert_allclose(mine, cam.numpy(), atol=1e-5)


def test_complexity_is_quantus_on_positive_maps(red):
    model, views, _, call = red
    positive = (
        np.random.default_rng(5).random((2, 1, 48, 48)).astype(np.float64) + 0.1
    )
    call = {
        key: value for key, value in call.items() if key not in ("softmax", "a_batch")
    }
    peers = {"sparseness": quantus.Sparseness, "entropy": quantus.Complexity}
    for name, peer in peers.items():
        for value, view, values in zip(
            peer(**PEER)(**call, a_batch=positive.copy()),
            views,
            positive,
            strict=True,
        ):
            assert build(name).score(
                model, view, explanation(values[0])
            ).value == pytest.approx(value, abs=1e-5)
    theirs = quantus.EffectiveComplexity(eps=0.5, **PEER)(
        **call, a_batch=positive.copy()
    )
    for value, view, values in zip(theirs, views, positive, strict=True):
        spec = f"effective-pixels:order=0,least={0.5 / np.float32(values.max())}"
        assert build(spec).score(
            model, view, explanation(values[0])
        ).value == pytest.approx(value, abs=1)


def test_a_fill_that_scores_higher_leaves_nothing_to_normalise_by():
    """The image at .2, its fill at .9: no gap of .05 upwards."""
    rising = np.array([[0.0, 0.5, 1.0], [0.2, 0.4, 0.9]])
    falling = np.array([[0.0, 0.5, 1.0], [0.9, 0.4, 0.2]])
    insertion = build("insertion:normalised=true")
    assert insertion._finish(rising).value == pytest.approx((0.475 - 0.2) / 0.7)
    with pytest.raises(NotApplicable, match="gap"):
        insertion._finish(falling)
    deletion = build("deletion:normalised=true")
    assert deletion._finish(falling).value == pytest.approx((0.475 - 0.2) / 0.7)
    with pytest.raises(NotApplicable, match="gap"):
        deletion._finish(rising)


def test_fills_that_papers_name_are_the_defaults():
    fills = {
        name: registry.spell(build(name).fill)
        for name in (
            "insertion",
            "deletion",
            "average-drop",
            "irof",
            "pixel-flipping",
        )
    }
    assert fills == {
        "insertion": "blur",
        "deletion": "neutral",
        "average-drop": "black",
        "irof": "neutral",
        "pixel-flipping": "inverted",
    }


def test_a_full_mask_shows_the_image_itself_whatever_rounding_says():
    class Wavering(type(MODEL)):
        """The same image scores a little less where it comes first in a pass."""

        def scores(self, pixels):
            said = super().scores(pixels)
            said[0] -= torch.tensor([0.0, 1e-3])
            return said

    wavering = Wavering(MODEL.planes, MODEL.batch, MODEL.bend)
    for name in ("average-drop", "average-gain", "increase"):
        assert score(name, np.ones(SHAPE), wavering).value == 0
    found = score("average-drop", np.ones(SHAPE), wavering)
    assert found.facts["masked"] == found.facts["whole"]


def test_sizes_at_which_nothing_varies_are_left_out_of_the_mean(monkeypatch):
    """Of three correlations .5, nothing and .1 the mean is .3."""
    from consilience.metrics import faithfulness

    told = iter([0.5, float("nan"), 0.1])
    monkeypatch.setattr(faithfulness, "_or_nan", lambda *_: next(told))
    found = score("sensitivity-n:sizes=3,subsets=8", VALUES)
    assert found.value == pytest.approx(0.3)


def test_squares_reach_every_corner_of_the_frame():
    from consilience.metrics.faithfulness import Squares

    drawn = Squares.draw(4000, 3, (5, 6), 0).corners
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}
    assert set(drawn[:, 1].tolist()) == {0, 1, 2, 3}
