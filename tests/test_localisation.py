import math

import numpy as np
import pytest
import quantus
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from consilience import api, registry
from consilience.images import Placement
from consilience.metrics import localisation, mosaic
from consilience.models.network import wrap
from consilience.types import (
    Box,
    ClassTarget,
    ConsilienceError,
    Explanation,
    NotApplicable,
    Sample,
)

OBJECT = (slice(3, 13), slice(0, 10))
CROP = Placement((40, 60), (20, 30), (2, 5), (16, 20))
"""An image of 40 x 60, halved, of which 16 x 20 are shown from row 2 and column 5."""


def located(
    values, boxes=(), masks=None, geometry=None, index=3, label=3, name="dog", seed=0
):
    """An explanation of class ``index`` with these values, of a noise image with boxes
    and masks.
    """
    values = np.asarray(values, dtype=np.float32)
    geometry = geometry or Placement.squash(values.shape, values.shape)
    pixels = np.random.default_rng(seed).integers(
        0, 256, (*geometry.image, 3), dtype=np.uint8
    )
    sample = Sample(name, pixels, label, tuple(boxes), masks or {})
    return Explanation(
        sample, "net@1", "toy", ClassTarget(index, "dog"), geometry, values
    )


def score(spec, explanation):
    return registry.metrics.build(spec).score(None, None, explanation)


def value(spec, explanation):
    return score(spec, explanation).value


def drawn(seed, size=12, levels=None):
    """A signed map, whole numbers with ties where ``levels``, and an object mask."""
    rng = np.random.default_rng(seed)
    values = (
        rng.normal(size=(size, size))
        if levels is None
        else rng.integers(-levels, levels + 1, (size, size))
    )
    on = rng.random((size, size)) < 0.3
    return values.astype(np.float32), on


# ---- where the object is


def test_a_box_is_moved_into_the_frame_and_cut_there():
    place = localisation.place_of(
        located(np.zeros((16, 20)), [Box(3, 10, 10, 30, 30)], geometry=CROP)
    )
    expected = np.zeros((16, 20), dtype=bool)
    expected[OBJECT] = (
        True  # x: 10 / 2 - 5 to 30 / 2 - 5, y: 10 / 2 - 2 to 30 / 2 - 2
    )
    np.testing.assert_array_equal(place.on, expected)
    assert place.boxes == (Box(3, 0, 3, 10, 13),)
    assert place.facts == {"truth": "boxes", "object": 100 / 320}


def test_a_pixel_is_in_a_box_by_its_centre():
    on = localisation.in_boxes([Box(3, 1.5, 0.6, 3.6, 2.5)], (4, 5))
    assert np.argwhere(on).tolist() == [[1, 1], [1, 2], [1, 3]]


def test_boxes_of_the_class_are_joined_and_others_left_out():
    boxes = [
        Box(3, 0, 0, 2, 2),
        Box(5, 4, 4, 6, 6),
        Box(3, 6, 0, 8, 2),
        Box(None, 0, 6, 1, 8),
    ]
    place = localisation.place_of(located(np.zeros((8, 8)), boxes))
    assert place.on.sum() == 4 + 4 + 2  # a box without a class is of the label's
    unlabelled = localisation.place_of(located(np.zeros((8, 8)), boxes, label=None))
    assert unlabelled.on.sum() == 4 + 4


def test_masks_come_before_boxes_by_number_or_name():
    by_number, by_name = np.zeros((2, 8, 8), dtype=bool)
    by_number[0, 0], by_name[1, 1:3] = True, True
    both = located(
        np.zeros((8, 8)),
        [Box(3, 0, 0, 8, 4)],
        {"3": by_number, "dog": by_name, "cat": ~by_name},
    )
    np.testing.assert_array_equal(localisation.place_of(both).on, by_number | by_name)
    assert localisation.place_of(both, "boxes").on.sum() == 32
    assert localisation.place_of(both).boxes == (
        Box(None, 0, 0, 3, 2),
    )  # the two touch at a corner


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([], "neither a mask nor a box of class 3 dog; it has no boxes and 0 masks"),
        ([Box(5, 0, 0, 9, 9)], "it has boxes of class 5"),
        ([Box(3, 0, 0, 9, 9)], "covers no pixel of what the model is shown"),
        ([Box(3, 20.1, 20.1, 20.9, 20.9)], "covers no pixel"),
    ],
)
def test_where_there_is_nothing_to_find_it_says_so(boxes, reason):
    explanation = located(np.zeros((16, 20)), boxes, geometry=CROP)
    for name in (
        "pointing-game",
        "energy",
        "relevance-mass",
        "relevance-rank",
        "iou",
        "best-iou",
        "auc",
        "max-box-acc",
    ):
        with pytest.raises(NotApplicable, match=reason):
            score(name, explanation)


def test_masks_that_are_asked_for_and_absent_are_said():
    with pytest.raises(NotApplicable, match="no mask of class 3"):
        score("energy:truth=masks", located(np.ones((8, 8)), [Box(3, 0, 0, 2, 2)]))


# ---- pointing


def literal_pointing(explanation, on, tolerance):
    """Every pixel of the object, every distance, in the image."""
    geometry, values = explanation.geometry, explanation.values
    y, x = np.unravel_index(values.argmax(), values.shape)
    row = math.floor(
        (y + 0.5 + geometry.offset[0]) / geometry.resized[0] * geometry.image[0]
    )
    column = math.floor(
        (x + 0.5 + geometry.offset[1]) / geometry.resized[1] * geometry.image[1]
    )
    if not (0 <= row < geometry.image[0] and 0 <= column < geometry.image[1]):
        return 0.0
    return float(
        any(math.hypot(row - i, column - j) <= tolerance for i, j in np.argwhere(on))
    )


GEOMETRIES = [
    CROP,
    Placement((30, 22), (16, 20), (0, 0), (16, 20)),
    Placement((33, 47), (10, 14), (-3, -3), (16, 20)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["crop", "squash", "padded"])
@pytest.mark.parametrize("tolerance", [0, 2, 4.5, 15])
def test_pointing_by_masks_and_boxes_is_the_literal_rule(geometry, tolerance):
    hits = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        height, width = geometry.image
        y0, x0 = rng.integers(0, height - 10), rng.integers(0, width - 10)
        box = Box(
            3,
            float(x0),
            float(y0),
            float(x0 + rng.integers(6, 10)),
            float(y0 + rng.integers(6, 10)),
        )
        on = np.zeros((height, width), dtype=bool)
        on[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
        if not geometry.to_input(on).any():
            continue
        values = rng.normal(size=(16, 20))
        for truth in ({"boxes": [box]}, {"masks": {"3": on}}):
            explanation = located(values, geometry=geometry, **truth)
            found = value(f"pointing-game:tolerance={tolerance}", explanation)
            hits.append(found)
            assert found == literal_pointing(explanation, on, tolerance)
    assert tolerance == 15 or 0 < np.mean(hits) < 1


def test_tolerance_can_count_pixels_of_the_frame():
    values = np.zeros((16, 20))
    values[8, 13] = (
        1  # the object ends at column 9: 4 pixels of the frame, 8 of the image away
    )
    explanation = located(values, [Box(3, 10, 10, 30, 30)], geometry=CROP)
    assert value("pointing-game:tolerance=4,at=input", explanation) == 1
    assert value("pointing-game:tolerance=3.9,at=input", explanation) == 0
    assert (
        value("pointing-game:tolerance=8,at=image", explanation) == 1
    )  # pixel 37 of the image, the object ends at 29
    assert value("pointing-game:tolerance=7,at=image", explanation) == 0
    assert (
        score("pointing-game", explanation).facts["tolerance"] == "15 px of the image"
    )


def test_of_equal_maxima_one_is_drawn_whatever_the_method():
    boxes, spec = [Box(3, 0, 0, 8, 4)], "pointing-game:tolerance=0"
    runs = [
        [
            score(spec, located(np.full((8, 8), level), boxes, seed=seed))
            for level in (1, 5)
        ]
        for seed in range(200)
    ]
    assert all(one.value == other.value for one, other in runs)
    assert all(
        one.facts["tied"] == 64 and one.facts["share"] == 0.5 for one, _ in runs
    )
    assert np.mean([one.value for one, _ in runs]) == pytest.approx(
        0.5, abs=4 * 0.5 / math.sqrt(200)
    )
    again = [
        score(f"{spec},seed=1", located(np.ones((8, 8)), boxes, seed=seed)).value
        for seed in range(200)
    ]
    assert again != [one.value for one, _ in runs]


def test_shares_of_ties_agree_between_masks_and_boxes():
    values, on = np.zeros((16, 20)), np.zeros((40, 60), dtype=bool)
    values[2:9, 6:15] = 1
    on[10:30, 10:30] = True
    by_box = score(
        "pointing-game:tolerance=3",
        located(values, [Box(3, 10, 10, 30, 30)], geometry=CROP),
    )
    by_mask = score(
        "pointing-game:tolerance=3", located(values, masks={"3": on}, geometry=CROP)
    )
    assert 0 < by_box.facts["share"] == by_mask.facts["share"] < 1


def test_quantus_counts_any_of_equal_maxima_as_a_hit():
    """So a map that is all but flat is perfect there; Zhang et al.

    point at one place.
    """
    on, values = np.zeros((8, 8), dtype=bool), np.full((8, 8), 2.0)
    on[0, 0], values[7, 7] = True, 0.0
    assert by_quantus(quantus.PointingGame, values[None], on[None]) == [True]
    found = [
        value(
            "pointing-game:tolerance=0", located(values, masks={"3": on}, seed=seed)
        )
        for seed in range(40)
    ]
    assert np.mean(found) < 0.2


# ---- shares, ranks, overlap


def literal_energy(values, on, pooled):
    inside = total = 0.0
    for place in np.ndindex(values.shape):
        weight = (
            max(float(values[place]), 0.0)
            if pooled == "positive"
            else abs(float(values[place]))
        )
        total += weight
        inside += weight if on[place] else 0.0
    return inside / total


def literal_rank(values, on, rounds=4000):
    """The mean over random orders of equal pixels."""
    rng, count, found = np.random.default_rng(0), int(on.sum()), []
    for _ in range(rounds):
        order = sorted(
            range(values.size), key=lambda place: (-values.flat[place], rng.random())
        )
        found.append(sum(on.flat[place] for place in order[:count]) / count)
    return float(np.mean(found))


def literal_best_iou(values, on):
    return max(
        float(((values >= t) & on).sum() / ((values >= t) | on).sum())
        for t in np.unique(values)
    )


def literal_auc(values, on):
    wins = [float(p > q) + float(p == q) / 2 for p in values[on] for q in values[~on]]
    return float(np.mean(wins))


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_localisation_is_its_literal_formula(seed, levels):
    values, on = drawn(seed, levels=levels)
    explanation = located(values, masks={"3": on})
    assert value("energy", explanation) == pytest.approx(
        literal_energy(values, on, "positive")
    )
    assert value("energy:part=absolute", explanation) == pytest.approx(
        literal_energy(values, on, "absolute")
    )
    assert value("relevance-mass", explanation) == pytest.approx(
        literal_energy(values, on, "absolute")
    )
    assert value("best-iou", explanation) == pytest.approx(
        literal_best_iou(values, on)
    )
    assert value("auc", explanation) == pytest.approx(literal_auc(values, on))
    assert value("auc", explanation) == pytest.approx(
        roc_auc_score(on.ravel(), values.ravel())
    )
    assert value("auc:part=absolute", explanation) == pytest.approx(
        literal_auc(np.abs(values), on)
    )


def test_rank_counts_equal_pixels_by_their_share():
    values, on = drawn(7, size=8, levels=1)
    found = score("relevance-rank", located(values, masks={"3": on}))
    assert found.value == pytest.approx(literal_rank(values, on), abs=0.005)
    assert found.facts["tied"] > 1
    smooth, on = drawn(7, size=8)
    assert value("relevance-rank", located(smooth, masks={"3": on})) == literal_rank(
        smooth, on, rounds=1
    )


def test_hand_example():
    values = np.array([[4, -3, 0], [2, 1, 0], [0, 0, -1]], dtype=float)
    on = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)
    explanation = located(values, masks={"3": on})
    assert value("energy", explanation) == pytest.approx(5 / 7)
    assert value("relevance-mass", explanation) == pytest.approx(8 / 11)
    assert value("relevance-rank", explanation) == pytest.approx(
        2 / 3
    )  # 4, 2, 1 are the largest three
    assert value("best-iou", explanation) == pytest.approx(
        2 / 4
    )  # of 4, 2, 1 against three pixels
    assert value("auc", explanation) == pytest.approx((6 + 5 + 0) / 18)
    assert value("iou:at=.3", explanation) == pytest.approx(
        2 / 4
    )  # 2.7 pixels are three
    assert value("iou:at=.5,by=maximum", explanation) == pytest.approx(
        1 / 4
    )  # 4 and 2 reach half of 4


def test_best_iou_says_that_it_is_an_oracle_and_where_it_cut():
    facts = score(
        "best-iou",
        located(
            [[4, -3, 0], [2, 1, 0]],
            masks={"3": np.array([[1, 0, 0], [1, 0, 0]], dtype=bool)},
        ),
    ).facts
    assert facts["oracle"] is True
    assert (facts["threshold"], facts["area"]) == (2, pytest.approx(2 / 6))
    assert "oracle bound" in registry.metrics.get("best-iou").__doc__


def test_a_constant_map_scores_what_the_object_covers():
    on = np.zeros((16, 16), dtype=bool)
    on[4:12, 2:10] = True
    explanation = located(np.full((16, 16), 7.0), masks={"3": on})
    for name in ("energy", "relevance-mass", "relevance-rank", "best-iou"):
        assert value(name, explanation) == pytest.approx(0.25), name
    assert value("auc", explanation) == 0.5
    shares = [
        value("iou:at=.25", located(np.ones((16, 16)), masks={"3": on}, seed=seed))
        for seed in range(100)
    ]
    assert np.mean(shares) == pytest.approx(
        0.143, abs=0.01
    )  # E[X / (128 - X)], X hypergeometric of mean 16


@pytest.mark.parametrize("name", ["energy", "relevance-mass", "iou:by=maximum"])
def test_maps_without_mass_are_not_scored(name):
    with pytest.raises(NotApplicable, match="positive"):
        score(name, located(np.zeros((8, 8)), [Box(3, 0, 0, 2, 2)]))


def test_auc_needs_something_beside_the_object():
    with pytest.raises(NotApplicable, match="fills the frame"):
        score("auc", located(np.ones((8, 8)), [Box(3, 0, 0, 8, 8)]))


ALL = (
    "pointing-game",
    "energy",
    "relevance-mass",
    "relevance-rank",
    "iou",
    "best-iou",
    "auc",
    "max-box-acc:thresholds=20",
)


@pytest.mark.parametrize("spec", ALL)
def test_scale_does_not_matter_and_a_mirror_neither(spec):
    values, on = drawn(11)
    straight = value(spec, located(values, masks={"3": on}))
    assert value(spec, located(4 * values, masks={"3": on})) == pytest.approx(
        straight
    )
    assert value(
        spec, located(values[:, ::-1], masks={"3": on[:, ::-1]})
    ) == pytest.approx(straight)


@pytest.mark.parametrize("spec", ALL)
def test_the_object_itself_is_the_best_map(spec):
    on = np.zeros((16, 16), dtype=bool)
    on[5:11, 2:10] = True
    at = "iou:at=.1875" if spec == "iou" else spec
    assert value(at, located(on.astype(float), masks={"3": on})) == 1
    cls = registry.metrics.get(spec.partition(":")[0])
    assert cls.higher_is_better
    assert cls.bounds == (0, 1)


# ---- against Quantus


def by_quantus(metric, maps, on):
    """Scores of maps (n, h, w) against masks (n, h, w)."""
    images = np.zeros((len(maps), 3, *maps.shape[1:]))
    call = metric(abs=False, normalise=False, disable_warnings=True)
    labels = np.zeros(len(maps), dtype=int)
    return call(
        model=None,
        x_batch=images,
        y_batch=labels,
        a_batch=maps[:, None],
        s_batch=on[:, None],
        channel_first=True,
    )


@pytest.mark.parametrize(
    ("spec", "peer", "signed"),
    [
        ("relevance-mass", quantus.RelevanceMassAccuracy, False),
        ("relevance-rank", quantus.RelevanceRankAccuracy, True),
        ("auc", quantus.AUC, True),
        ("pointing-game:tolerance=0", quantus.PointingGame, True),
    ],
)
def test_equals_quantus_where_it_is_right(spec, peer, signed):
    maps, on = (
        np.stack(parts)
        for parts in zip(*[drawn(seed) for seed in range(6)], strict=True)
    )
    maps = maps if signed else np.abs(maps)
    ours = [
        value(spec, located(one, masks={"3": mask}))
        for one, mask in zip(maps, on, strict=True)
    ]
    np.testing.assert_allclose(
        ours,
        np.asarray(by_quantus(peer, maps.astype(np.float64), on), dtype=float),
        rtol=1e-6,
    )


def test_quantus_leaves_the_bounds_on_signed_maps():
    """Arras et al. define relevance mass for relevances that are not negative; signed
    sums cancel.
    """
    values, on = (
        np.array([[3.0, -2.0], [-2.0, 1.5]]),
        np.array([[1, 0], [0, 0]], dtype=bool),
    )
    assert by_quantus(quantus.RelevanceMassAccuracy, values[None], on[None])[
        0
    ] == pytest.approx(6)
    assert value("relevance-mass", located(values, masks={"3": on})) == pytest.approx(
        3 / 8.5
    )


# ---- boxes from maps


def flood_boxes(on):
    """Tight boxes and sizes of connected parts, corners included, by walking from pixel
    to pixel.
    """
    left, found = {tuple(place) for place in np.argwhere(on)}, []
    while left:
        walk, part = [min(left)], set()
        while walk:
            y, x = walk.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                walk += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        ys, xs = zip(*part, strict=True)
        found.append((len(part), (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
    return found


def box_iou(a, b):
    """By counting half pixels, in which all edges here are whole."""
    halves = [[round(2 * edge) for edge in box] for box in (a, b)]
    cells = [
        {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
        for x0, y0, x1, y1 in halves
    ]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


@pytest.mark.parametrize("which", ["all", "largest"])
@pytest.mark.parametrize("seed", range(3))
def test_max_box_acc_is_a_walk_over_the_pixels(seed, which):
    values, _ = drawn(seed, size=14)
    truth = [Box(3, 1, 2, 7, 9), Box(3, 8.5, 6, 13, 12.5)]
    found = score(f"max-box-acc:thresholds=10,boxes={which}", located(values, truth))
    stretched = (values.astype(float) - values.min()) / (values.max() - values.min())
    for level, fit in enumerate(found.curve):
        parts = flood_boxes(stretched >= level / 10)
        if which == "largest":
            parts = [max(parts, key=lambda part: part[0])]
        expected = max(
            box_iou(box, (one.x0, one.y0, one.x1, one.y1))
            for _, box in parts
            for one in truth
        )
        assert fit == pytest.approx(expected)
    assert found.value == np.mean(
        [found.curve.max() >= delta for delta in (0.3, 0.5, 0.7)]
    )


def test_the_data_sets_threshold_is_one_for_all():
    """Each image fits at a threshold of its own, no threshold fits both."""
    metric = registry.metrics.build("max-box-acc:thresholds=4,delta=.9")
    wide, narrow = np.zeros((8, 8)), np.zeros((8, 8))
    wide[:4, :4] = 1.0
    wide[0, 0] = 4.0  # the object at a quarter, a pixel above
    narrow[:] = 2.0
    narrow[7, 7] = 0.0
    narrow[:4, :4] = 4.0  # the object only above a half
    scores = [
        metric.score(None, None, located(one, [Box(3, 0, 0, 4, 4)]))
        for one in (wide, narrow)
    ]
    assert [one.value for one in scores] == [1, 1]
    both = metric.gather(scores)
    assert both.value == 0.5
    assert both.curve.tolist() == [0, 0.5, 0, 0.5]
    assert both.facts == {
        "n": 2,
        "threshold": {"0.9": 0.25},
        "accuracy": {"0.9": 0.5},
    }


def test_gathered_accuracy_is_the_papers():
    """mean over delta of the largest mean over images, in loops."""
    rng = np.random.default_rng(0)
    metric = registry.metrics.build("max-box-acc:thresholds=7,delta=.3+.5")
    curves = rng.random((9, 7))
    found = metric.gather([localisation.Score(0.0, curve) for curve in curves])
    per_delta = [
        max(sum(curve[t] >= delta for curve in curves) / 9 for t in range(7))
        for delta in (0.3, 0.5)
    ]
    assert found.value == pytest.approx(sum(per_delta) / 2)
    assert list(found.facts["accuracy"].values()) == per_delta
    by_hand = [
        localisation.Score(0.0, np.array(curve))
        for curve in ([0.35, 0.0], [0.35, 0.0], [0.35, 0.6])
    ]
    two = registry.metrics.build("max-box-acc:thresholds=2,delta=.3+.5")
    # at .3 the first threshold fits all three, at .5 the second fits one: each delta
    # has its own best
    assert two.gather(by_hand).value == pytest.approx((1 + 1 / 3) / 2)
    with pytest.raises(NotApplicable, match="no image"):
        metric.gather([])


@pytest.mark.parametrize(
    "spec",
    [
        "pointing-game:tolerance=-1",
        "pointing-game:seed=-1",
        "iou:at=0",
        "iou:at=1.1",
        "iou:seed=-1",
        "max-box-acc:thresholds=0",
        "max-box-acc:delta=0+.5",
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        registry.metrics.build(spec)


# ---- mosaics


class Colours(nn.Module):
    """Ten classes, each a colour; a class's logit is how much of the image has its
    colour.
    """

    def __init__(self):
        super().__init__()
        palette = torch.tensor(
            [[r, g, b] for r in (0.1, 0.9) for g in (0.1, 0.9) for b in (0.1, 0.9)]
            + [[0.5] * 3, [0.3] * 3]
        )
        self.near = nn.Conv2d(3, 10, 1)
        self.act = nn.ReLU()
        self.head = nn.Linear(10, 10)
        with torch.no_grad():
            self.near.weight[:, :, 0, 0] = 8 * palette - 4
            self.near.bias[:] = -(8 * palette - 4).clamp(min=0).sum(dim=1) * 0.8
            self.head.weight[:] = 40 * torch.eye(10)
            self.head.bias[:] = 0

    def forward(self, x):
        return self.head(self.act(self.near(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def colours():
    network = wrap(
        Colours(),
        classes=[f"colour {i}" for i in range(10)],
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
    )
    return network.using(engine="torch")


def plain_images(per_class=3):
    """Plain images in the eight corner colours, a little noisy."""
    rng = np.random.default_rng(1)
    for number in range(per_class):
        for index, colour in enumerate(
            [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
        ):
            pixels = np.clip(
                np.array(colour) + rng.integers(-5, 6, (64, 64, 3)), 0, 255
            ).astype(np.uint8)
            yield Sample(f"{index}-{number}", pixels)


def test_the_colour_model_is_sure_of_seven_colours(colours):
    firsts = [
        api.predict(colours, api.raw_outputs(colours, colours.view(one)))
        for one in plain_images(1)
    ]
    assert sum(first.probability > 0.9 for first in firsts) == 7  # of black it is not


@pytest.mark.parametrize(("cells", "sides"), [(4, [32, 32]), (9, [22, 21, 21])])
def test_a_mosaic_is_its_images_reduced(colours, cells, sides):
    images = list(plain_images(4))
    if cells == 9:
        with pytest.raises(
            ConsilienceError,
            match="a mosaic of 9 cells needs images of as many classes",
        ):
            mosaic.mosaics(colours, images, 9)
        return
    made = mosaic.mosaics(colours, images, cells, seed=3)
    assert len(made) == 28 // 4
    used = []
    for one in made:
        assert one.pixels.shape == (64, 64, 3)
        assert len(one.masks) == cells
        assert str(one.label) in one.masks
        np.testing.assert_array_equal(
            sum(mask.astype(int) for mask in one.masks.values()), 1
        )
        names = one.notes[0].partition(": ")[2].split(", ")
        used += names
        for place, (name, (index, mask)) in enumerate(
            zip(names, one.masks.items(), strict=True)
        ):
            assert name.startswith(f"{index}-")
            down, across = divmod(place, 2)
            cell = one.pixels[
                32 * down : 32 * down + 32, 32 * across : 32 * across + 32
            ]
            assert mask[
                32 * down : 32 * down + 32, 32 * across : 32 * across + 32
            ].all()
            source = next(image.pixels for image in images if image.name == name)
            halved = source.reshape(32, 2, 32, 2, 3).astype(float).mean(axis=(1, 3))
            assert (
                np.abs(cell - halved).max() < 6
            )  # bilinear with antialiasing weighs the next pixels a little
    assert len(used) == len(set(used))
    assert "cells of 32 x 32 pixels" in made[0].notes[0]


def test_nine_cells_fill_the_frame():
    assert [part.stop - part.start for part in mosaic._edges(64, 3)] == [22, 21, 21]
    assert [part.stop - part.start for part in mosaic._edges(224, 3)] == [75, 75, 74]
    cells = [
        mosaic.MosaicCell(
            str(i), np.full((22, 22, 3), i, dtype=np.uint8), i, (64, 64)
        )
        for i in range(9)
    ]
    made = mosaic._mosaic(cells, (64, 64), 0, 0)
    assert np.bincount(made.pixels[:, :, 0].ravel()).tolist() == [
        484,
        462,
        462,
        462,
        441,
        441,
        462,
        441,
        441,
    ]
    assert all(
        (made.pixels[mask][:, 0] == int(name)).all()
        for name, mask in made.masks.items()
    )


def test_mosaics_follow_the_seed_and_take_what_is_sure_and_right(colours):
    images = list(plain_images(2))
    first, again, other = (
        mosaic.mosaics(colours, images, seed=seed) for seed in (0, 0, 1)
    )
    assert (
        [one.digest for one in first]
        == [one.digest for one in again]
        != [one.digest for one in other]
    )
    assert len({one.label for one in first}) > 1
    wrong = [Sample(one.name, one.pixels, 9) for one in images]
    with pytest.raises(
        ConsilienceError,
        match="of 16 images 0, of 0 classes, have a probability of 0",
    ):
        mosaic.mosaics(colours, wrong)
    assert len(mosaic.mosaics(colours, images, count=1)) == 1


def test_reading_stops_when_there_are_enough(colours):
    read = []

    def images():
        for one in plain_images(40):
            read.append(one.name)
            yield one

    mosaic.mosaics(colours, images(), count=2)
    assert len(read) <= 2 * max(colours.batch, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 5}, "4, 9, 16"),
        ({"cells": 1}, "4, 9, 16"),
        ({"sure": 2}, "sure is from 0"),
        ({"count": 0}, "count from 1"),
    ],
)
def test_mosaic_options_out_of_range_are_refused(colours, options, message):
    with pytest.raises(ConsilienceError, match=message):
        mosaic.mosaics(colours, plain_images(1), **options)


def most_groups(counts, size):
    """The most groups of ``size`` different classes, by trying everything."""
    from itertools import combinations

    there = [index for index, count in enumerate(counts) if count]
    best = 0
    for chosen in combinations(there, size):
        left = [count - (index in chosen) for index, count in enumerate(counts)]
        best = max(best, 1 + most_groups(left, size))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_groups_are_as_many_as_can_be_and_never_repeat_a_class(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, 5).tolist()
    cells = [
        mosaic.MosaicCell(f"{i}-{n}", np.zeros((1, 1, 3)), i, (2, 2))
        for i, count in enumerate(counts)
        for n in range(count)
    ]
    groups = mosaic.grouped(cells, 3, 99, rng)
    assert len(groups) == most_groups(counts, 3)
    assert all(
        len({cell.index for cell in group}) == 3 == len(group) for group in groups
    )
    names = [cell.name for group in groups for cell in group]
    assert len(names) == len(set(names))


def test_grid_pointing_by_hand_and_as_energy(colours):
    one = mosaic.mosaics(colours, plain_images(2))[0]
    values = np.full((64, 64), -1.0, dtype=np.float32)
    values[10:20, 5:9], values[40:50, 40:44] = 3.0, 1.0
    geometry = Placement.squash((64, 64), (64, 64))
    names = list(one.masks)
    for place, expected in ((0, 0.75), (3, 0.25), (1, 0.0)):
        target = ClassTarget(int(names[place]), "")
        found = score(
            "grid-pointing",
            Explanation(one, "net@1", "toy", target, geometry, values),
        )
        assert found.value == pytest.approx(expected)
        assert found.facts["shares"] == pytest.approx(
            dict(zip(names, (0.75, 0, 0, 0.25), strict=True))
        )
        assert (found.facts["cells"], found.facts["chance"]) == (4, 0.25)
        assert found.value == value(
            "energy:truth=masks",
            Explanation(one, "net@1", "toy", target, geometry, values),
        )


def test_local_evidence_wins_the_grid_pointing_game(colours):
    """Grad-CAM on the one map before the pooling sees each cell's colour by itself."""
    made = mosaic.mosaics(colours, plain_images(2))
    shares = {}
    for by in ("hirescam", "constant", "random"):
        explained = [
            api.explain(colours, one, by, target="true", view="squash")
            for one in made
        ]
        shares[by] = [value("grid-pointing", one) for one in explained]
    assert min(shares["hirescam"]) > 0.95
    assert shares["constant"] == [0.25] * len(made)
    assert np.mean(shares["random"]) < 0.6


def test_grid_pointing_is_for_mosaics():
    on = np.zeros((8, 8), dtype=bool)
    on[:4] = True
    for masks in ({}, {"3": on}, {"3": on, "4": on}):
        with pytest.raises(NotApplicable, match="is not a mosaic"):
            score(
                "grid-pointing", located(np.ones((8, 8)), [Box(3, 0, 0, 2, 2)], masks)
            )
    with pytest.raises(NotApplicable, match="no mask of class 3"):
        score("grid-pointing", located(np.ones((8, 8)), masks={"4": on, "5": ~on}))


def test_a_model_of_bare_values_has_no_mosaics(colours):
    from dataclasses import replace

    with pytest.raises(ConsilienceError, match="bare values"):
        mosaic.mosaics(replace(colours, outputs="values"), plain_images(1))


def test_any_cell_of_a_mosaic_may_be_asked_for(colours):
    images = list(plain_images(2))
    made = [
        one
        for seed in range(12)
        for one in mosaic.mosaics(colours, images, seed=seed)
    ]
    places = {
        tuple(np.argwhere(one.masks[str(one.label)]).min(axis=0).tolist())
        for one in made
    }
    assert len(places) == 4
