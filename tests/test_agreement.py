import math
from dataclasses import replace

import numpy as np
import pytest
from oracles_agreement import (
    decimal_iou,
    enumerated_iou,
    explanation,
    literal_bootstrap_t,
    literal_excess,
    literal_iou,
    literal_permutation_p,
    literal_shift_test,
    literal_spearman,
    smooth,
    superpixel_explanation,
)
from scipy import ndimage

from consilience.agreement import overlap
from consilience.agreement.masks import Mask, matched
from consilience.agreement.overlap import (
    Agreement,
    agree,
    compare_pair,
    excess_matrix,
    excess_of_possible,
    expected_by_moments,
    expected_iou,
    expected_matrix,
    iou,
    iou_max,
    mismatches,
    pack,
    permutation_p,
    shift_test,
    smallest_p,
    spearman,
)
from consilience.show import words
from consilience.stats import mean_interval
from consilience.types import ClassTarget, ConsilienceError


def blob(rng, shape, share=0.3):
    """A smooth random mask."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2, mode="wrap")
    return field > np.quantile(field, 1 - share)


# ---- overlap and its chance


def test_iou_by_hand():
    a, b = (
        np.array([[1, 1, 0], [0, 0, 0]], bool),
        np.array([[0, 1, 1], [1, 0, 0]], bool),
    )
    assert iou(a, b) == 1 / 4
    assert (iou(a, a), iou(a, ~a), iou(a, np.zeros_like(a))) == (1, 0, 0)
    assert math.isnan(iou(np.zeros_like(a), np.zeros_like(a)))
    with pytest.raises(ConsilienceError, match="frames of 2 x 3 and 3 x 2"):
        iou(a, a.T)


@pytest.mark.parametrize("pixels", [1, 2, 5, 9])
def test_expected_iou_is_the_mean_over_all_masks(pixels):
    for a in range(pixels + 1):
        for b in range(pixels + 1):
            if a or b:
                assert expected_iou(pixels, a, b) == pytest.approx(
                    float(enumerated_iou(pixels, a, b)), abs=1e-14
                )
    assert math.isnan(expected_iou(pixels, 0, 0))


@pytest.mark.parametrize(
    ("pixels", "a", "b"),
    [
        (50176, 10035, 10035),
        (50176, 10035, 22579),
        (50176, 5, 7),
        (50176, 1, 1),
        (50176, 50000, 49000),
        (200, 50, 80),
        (262144, 52429, 26000),
    ],
)
def test_expected_iou_holds_to_twelve_digits_on_real_frames(pixels, a, b):
    assert expected_iou(pixels, a, b) == pytest.approx(
        decimal_iou(pixels, a, b), rel=1e-12
    )
    assert expected_iou(pixels, a, b) == pytest.approx(
        expected_iou(pixels, b, a), rel=1e-12
    )


def test_expected_iou_against_masks_thrown_at_random():
    rng = np.random.default_rng(0)
    base = np.arange(400) < 90
    ious = [literal_iou(base, rng.permutation(400) < 130) for _ in range(3000)]
    assert expected_iou(400, 90, 130) == pytest.approx(
        np.mean(ious), abs=4 * np.std(ious) / math.sqrt(3000)
    )


def test_the_chance_levels_that_the_study_missed():
    # .111 for .2 / .2 and .16 for .2 / .45; a mean of .1198 is not evidence of agreement
    assert expected_iou(50176, 10035, 10035) == pytest.approx(1 / 9, abs=1e-4)
    assert expected_iou(50176, 10035, 22579) == pytest.approx(0.16, abs=1e-3)


def test_full_and_empty_masks():
    assert expected_iou(100, 100, 40) == pytest.approx(0.4, abs=1e-15)
    assert expected_iou(100, 0, 40) == 0
    assert expected_iou(100, 100, 100) == 1
    assert math.isnan(overlap.excess(1, 1))
    assert iou_max(20, 45) == 20 / 45
    assert math.isnan(
        excess_of_possible(0.4, expected_iou(100, 100, 40), iou_max(100, 40))
    )


@pytest.mark.parametrize(("pixels", "a", "b"), [(10, 11, 1), (10, -1, 1), (0, 0, 0)])
def test_masks_that_do_not_fit_are_refused(pixels, a, b):
    with pytest.raises(ConsilienceError, match="do not fit"):
        expected_iou(pixels, a, b)


@pytest.mark.parametrize("pixels", [2500, 50176])
def test_the_series_stays_within_its_proven_bound(pixels):
    rng = np.random.default_rng(1)
    areas = np.unique(
        np.concatenate(
            [
                [1, 2, 10, pixels - 1, pixels],
                rng.integers(1, pixels, 12),
                rng.integers(1, 300, 6),
            ]
        )
    )
    series, bound = expected_by_moments(
        pixels, areas[:, None].astype(float), areas[None, :].astype(float)
    )
    exact = np.array(
        [[decimal_iou(pixels, int(a), int(b)) for b in areas] for a in areas[:8]]
    )
    assert (np.abs(series[:8] - exact) <= bound[:8] + 1e-13).all()
    usual = (
        areas >= pixels / 100
    )  # below one per cent of the frame the bound is wider, and the exact sum short
    assert bound[np.ix_(usual, usual)].max() < (2e-6 if pixels == 2500 else 1e-8)


def test_many_areas_give_what_single_calls_give(monkeypatch):
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 2501, 9), rng.integers(0, 2501, 7)
    single = np.array([[expected_iou(2500, int(x), int(y)) for y in b] for x in a])
    np.testing.assert_array_equal(expected_matrix(2500, a, b), single)
    monkeypatch.setattr(overlap, "EXACT_PAIRS", 1)
    np.testing.assert_allclose(expected_matrix(2500, a, b), single, atol=1e-6)


def test_pairs_without_a_proof_are_computed_exactly(monkeypatch):
    monkeypatch.setattr(overlap, "EXACT_PAIRS", 1)
    found = expected_matrix(16, np.array([0, 1, 8, 16]), np.array([0, 3, 16]))
    single = np.array(
        [[expected_iou(16, a, b) for b in (0, 3, 16)] for a in (0, 1, 8, 16)]
    )
    np.testing.assert_allclose(found, single, atol=1e-15)


# ---- shifts and ranks


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (1, 9), (13, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_shift_test_is_that_of_every_shift(shape, seed):
    rng = np.random.default_rng(seed)
    a, b = blob(rng, shape), blob(rng, shape, 0.5)
    for one, other in ((a, b), (b, a), (a, a)):
        found = shift_test(one, other)
        p, positions = literal_shift_test(one, other)
        assert found.p == pytest.approx(p, abs=1e-12)
        assert found.positions == pytest.approx(positions, rel=1e-9)


def test_the_shift_test_at_its_ends():
    a = np.zeros((6, 7), bool)
    a[2, 3] = True
    assert shift_test(a, ~a).p == 1.0
    for flat in (np.ones_like(a), np.zeros_like(a)):
        assert shift_test(a, flat).p == shift_test(flat, a).p == 1.0
        assert math.isnan(shift_test(a, flat).positions)
    assert math.isnan(shift_test(np.zeros_like(a), np.zeros_like(a)).p)
    across, down = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    across[:4], down[:, :4] = True, True
    assert shift_test(across, down).p == 1.0


def test_whether_shifting_could_show_anything():
    assert not overlap.ShiftTest(0.06, 18.9).can_show
    assert overlap.ShiftTest(0.06, 19.1).can_show
    assert not overlap.ShiftTest(1.0, math.nan).can_show


def field(rng, sigma, side=28):
    """A smooth Gaussian field, cut out of a larger one."""
    margin = 4 * sigma
    noise = rng.normal(size=(side + 2 * margin, side + 2 * margin))
    return ndimage.gaussian_filter(noise, sigma)[margin:-margin, margin:-margin]


def grid(rng, side=28):
    """A map on 7 x 7, enlarged as class activation maps are."""
    return ndimage.zoom(
        rng.normal(size=(7, 7)), side / 7, order=1, grid_mode=True, mode="nearest"
    )


@pytest.mark.parametrize("kind", ["grids", "narrow fields", "wide fields"])
def test_independent_smooth_maps_keep_the_level_of_the_shift_test(kind):
    rng = np.random.default_rng(3)
    draw = {
        "grids": lambda: grid(rng),
        "narrow fields": lambda: field(rng, 2),
        "wide fields": lambda: field(rng, 7),
    }[kind]
    p = []
    for _ in range(400):
        maps = [draw() for _ in range(2)]
        p.append(shift_test(*(one > np.quantile(one, 0.8) for one in maps)).p)
    # .05 of 400 and three standard errors; cyclic shifts give .09 of the first and last
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_shift_test_sees_what_agrees():
    rng = np.random.default_rng(4)
    found = []
    for _ in range(60):
        one = grid(rng)
        other = one / one.std() + 0.6 * grid(rng)
        found.append(
            shift_test(*(x > np.quantile(x, 0.8) for x in (one, other))).p <= 0.05
        )
    assert np.mean(found) > 0.8


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_that_of_literal_ranks(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(6, 7)), rng.integers(0, 4, (6, 7))
    assert spearman(a, b) == pytest.approx(literal_spearman(a, b), abs=1e-12)
    assert spearman(a + b, b) == pytest.approx(literal_spearman(a + b, b), abs=1e-12)


def test_spearman_by_hand():
    assert spearman(
        np.array([[1.0, 5.0], [9.0, 70.0]]), np.array([[-3.0, 0.0], [0.5, 0.6]])
    ) == pytest.approx(1)
    # ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * 2 / (4 * 15)
    assert spearman(
        np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 2.0, 4.0, 3.0]])
    ) == pytest.approx(0.8)
    assert math.isnan(spearman(np.zeros((3, 3)), np.eye(3)))


# ---- one pair


def test_every_number_of_a_pair():
    rng = np.random.default_rng(4)
    a, b = (
        explanation(rng.normal(size=(12, 10))),
        explanation(rng.normal(size=(12, 10)), "rise:masks=50"),
    )
    pair = compare_pair(a, b, "top:.3", "top:.25")
    on_a, on_b = (
        a.values > np.sort(a.values.ravel())[-37],
        b.values > np.sort(b.values.ravel())[-31],
    )
    expected, largest = decimal_iou(120, 36, 30), 30 / 36
    observed = literal_iou(on_a, on_b)
    assert (pair.sample, pair.a, pair.b, pair.rule_a, pair.rule_b) == (
        "dog",
        "gradcam",
        "rise:masks=50",
        "top:fraction=0.3",
        "top:fraction=0.25",
    )
    assert (pair.area_a, pair.area_b, pair.tied_a, pair.mismatch, pair.notes) == (
        0.3,
        0.25,
        0,
        "",
        (),
    )
    assert pair.iou == pytest.approx(observed)
    assert pair.expected_iou == pytest.approx(expected, rel=1e-12)
    assert pair.excess == pytest.approx(
        (observed - expected) / (1 - expected), rel=1e-9
    )
    assert pair.excess_of_possible == pytest.approx(
        (observed - expected) / (largest - expected), rel=1e-9
    )
    assert (pair.p, pair.positions) == pytest.approx(literal_shift_test(on_a, on_b))
    assert pair.spearman == pytest.approx(
        literal_spearman(a.values, b.values), abs=1e-12
    )
    for share, area in ((10, 12), (20, 24), (30, 36)):
        one, two = (x.values > np.sort(x.values.ravel())[-area - 1] for x in (a, b))
        assert getattr(pair, f"iou_at_{share}") == pytest.approx(
            literal_iou(one, two)
        )
        assert getattr(pair, f"expected_at_{share}") == pytest.approx(
            decimal_iou(120, area, area), rel=1e-12
        )
        assert getattr(pair, f"area_at_{share}") == share / 100


def test_equal_areas_follow_whole_superpixels():
    segments = np.repeat(np.arange(5), 20).reshape(10, 10)
    rng = np.random.default_rng(0)
    lime, cam = (
        superpixel_explanation(segments, [0.5, -1, 2, 1, 0]),
        explanation(rng.normal(size=(10, 10))),
    )
    pair = compare_pair(cam, lime)
    assert (pair.rule_a, pair.rule_b, pair.area_b) == ("top", "superpixels", 0.6)
    assert (pair.area_at_10, pair.area_at_20, pair.area_at_30) == (0.2, 0.2, 0.4)
    masks = matched(cam, lime, 0.3)
    assert masks[0].area == masks[1].area == 40
    assert pair.iou_at_30 == literal_iou(masks[0].on, np.isin(segments, [2, 3]))
    assert pair.expected_at_30 == pytest.approx(decimal_iou(100, 40, 40), rel=1e-12)


def test_a_map_and_itself_agree_wholly():
    one = explanation(np.random.default_rng(0).normal(size=(10, 10)))
    pair = compare_pair(one, one)
    assert (pair.iou, pair.excess) == (1, 1)
    assert pair.excess_of_possible == pytest.approx(1)
    assert 1 / (1 + pair.positions) < pair.p < 0.03
    assert pair.spearman == pytest.approx(1)


def test_swapping_two_maps_swaps_only_the_names():
    rng = np.random.default_rng(1)
    a, b = explanation(smooth(rng, 20)), explanation(smooth(rng, 20), "rise")
    one, two = (
        compare_pair(a, b, "top:.1", "top:.3"),
        compare_pair(b, a, "top:.3", "top:.1"),
    )
    renamed = replace(
        one,
        a=one.b,
        b=one.a,
        rule_a=one.rule_b,
        rule_b=one.rule_a,
        area_a=one.area_b,
        area_b=one.area_a,
    )
    for key, value in two.row().items():
        same = (
            pytest.approx(renamed.row()[key], rel=1e-12)
            if isinstance(value, float)
            else renamed.row()[key]
        )
        assert value == same, key


def test_not_every_fraction_is_needed_nor_known():
    rng = np.random.default_rng(0)
    a, b = (explanation(rng.random((10, 10)), name) for name in ("gradcam", "rise"))
    pair = compare_pair(a, b, fractions=(0.2,))
    assert math.isnan(pair.iou_at_10)
    assert pair.iou_at_20 == compare_pair(a, b).iou_at_20
    with pytest.raises(ConsilienceError, match=r"had at 0.1, 0.2, 0.3; got 0.5"):
        compare_pair(a, b, fractions=(0.5,))


def test_flat_and_empty_maps_are_noted():
    segments = np.repeat(np.arange(4), 4).reshape(4, 4)
    empty, flat = (
        superpixel_explanation(segments, -np.arange(4)),
        explanation(np.zeros((4, 4))),
    )
    pair = compare_pair(flat, empty)
    assert math.isnan(pair.iou)
    assert pair.notes == (
        "gradcam: flat map: it ranks no pixel, so the mask is empty",
        "lime: no superpixel has a positive weight: the mask is empty",
        "both masks are empty: their IoU is undefined",
    )
    slope = explanation(np.arange(16.0).reshape(4, 4), "rise")
    pair = compare_pair(flat, slope)
    assert (pair.iou, pair.expected_iou, pair.excess, pair.p) == (0, 0, 0, 1)
    assert math.isnan(pair.spearman)
    both = compare_pair(empty, replace(empty, explainer="kernelshap"))
    assert math.isnan(both.iou)
    assert math.isnan(both.excess)
    assert both.notes[-1] == "both masks are empty: their IoU is undefined"


# ---- what cannot be compared

BASE = explanation(np.arange(100.0).reshape(10, 10))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "cat"}, "different images (dog and cat)"),
        (
            {"model": "net@9f9f"},
            "different weights of one model (net@1a2b and net@9f9f)",
        ),
        ({"model": "other@1a2b"}, "different models (net@1a2b and other@1a2b)"),
        ({"index": 4}, "different classes explained (3 class 3 and 4 class 4)"),
        ({"view": "crop"}, "different views of the image (squash and crop)"),
    ],
)
def test_each_mismatch_is_found_and_only_it(changes, words):
    other = explanation(BASE.values, **{"explainer": "rise", **changes})
    assert mismatches(BASE, other) == (words,)
    with pytest.raises(ConsilienceError) as caught:
        compare_pair(BASE, other)
    assert words in str(caught.value)
    marked = compare_pair(BASE, other, allow_mismatch=True)
    assert (marked.mismatch, marked.iou) == (words, 1.0)
    assert marked.row()["mismatch"] == words


def test_a_different_score_of_the_same_class_is_allowed_and_noted():
    other = explanation(BASE.values, "lime", score="probability")
    assert mismatches(BASE, other) == ()
    assert compare_pair(BASE, other).notes == (
        "scores differ: logit and probability of the same class",
    )


def test_images_of_one_name_are_told_apart_by_their_pixels():
    assert mismatches(BASE, explanation(BASE.values, shade=1)) == (
        "different images (dog and dog)",
    )


def test_the_same_class_may_be_named_differently():
    renamed = replace(BASE, target=ClassTarget(3, "hound"))
    assert mismatches(BASE, renamed) == ()


def test_frames_that_differ_can_never_be_laid_over_each_other():
    other = explanation(np.eye(12), shade=sum(b"dog") % 256)
    assert len(mismatches(BASE, other)) == 2
    with pytest.raises(ConsilienceError, match="frames of 10 x 10 and 12 x 12"):
        compare_pair(BASE, other, allow_mismatch=True)


# ---- many images


def two_methods(rng, count, shared, centred=False, size=24):
    """Maps of two methods for ``count`` images; ``shared`` is how much of an image's
    own field both show.
    """
    found = []
    for place in range(count):
        own = smooth(rng, size, 3)
        maps = [
            shared * own + (1 - shared) * smooth(rng, size, 3, centred)
            for _ in range(2)
        ]
        found += [
            explanation(maps[0], "gradcam", f"p{place}"),
            explanation(maps[1], "rise", f"p{place}"),
        ]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_permutation_test_is_the_literal_one(seed, count):
    rng = np.random.default_rng(seed)
    a = [blob(rng, (9, 8), rng.uniform(0.1, 0.6)) for _ in range(count)]
    b = (
        [one | blob(rng, (9, 8), 0.2) for one in a]
        if seed % 2
        else [blob(rng, (9, 8)) for _ in a]
    )
    assert permutation_p(
        [pack(one) for one in a], [pack(one) for one in b]
    ) == pytest.approx(literal_permutation_p(a, b))


def test_drawn_permutations_estimate_the_exact_p(monkeypatch):
    rng = np.random.default_rng(7)
    a = [blob(rng, (12, 12)) for _ in range(7)]
    b = [
        np.roll(one, 2, 0) if i < 2 else blob(rng, (12, 12))
        for i, one in enumerate(a)
    ]
    a, b = [pack(one) for one in a], [pack(one) for one in b]
    exact = permutation_p(a, b)
    monkeypatch.setattr(overlap, "ALL_PERMUTATIONS", 1)
    drawn = permutation_p(a, b, seed=1)
    assert 0.005 < exact < 0.5
    assert drawn == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999)
    )
    assert drawn == permutation_p(a, b, seed=1)


def test_excesses_of_all_exchanges_are_literal_ones():
    rng = np.random.default_rng(8)
    a, b = (
        [blob(rng, (9, 7), share) for share in rng.uniform(0.05, 0.9, 6)]
        for _ in range(2)
    )
    found = excess_matrix([pack(one) for one in a], [pack(one) for one in b])
    np.testing.assert_allclose(
        found, [[literal_excess(x, y) for y in b] for x in a], atol=1e-12
    )


def test_excesses_in_several_blocks_are_those_in_one(monkeypatch):
    rng = np.random.default_rng(9)
    masks = [
        pack(rng.random((1500, 1000)) < share) for share in np.linspace(0.1, 0.9, 12)
    ]  # blocks of five masks
    found = excess_matrix(masks, masks)
    bits = [np.unpackbits(mask.bits).astype(bool) for mask in masks]
    for i, j in ((0, 0), (0, 11), (4, 5), (11, 3)):
        observed, expected = (
            literal_overlap(bits[i], bits[j]),
            expected_iou(1_500_000, masks[i].area, masks[j].area),
        )
        assert found[i, j] == pytest.approx(
            (observed - expected) / (1 - expected), abs=1e-6
        )


def literal_overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_empty_and_full_masks_count_nothing_when_exchanged():
    empty, full, half = (
        pack(np.zeros((4, 4), bool)),
        pack(np.ones((4, 4), bool)),
        pack(np.eye(4, dtype=bool)),
    )
    found = excess_matrix([empty, full, half], [empty, full, half])
    np.testing.assert_allclose(found[:2], 0, atol=1e-15)
    assert found[2, 2] == 1


def test_one_mask_for_all_images_is_never_better_than_chance():
    """A centred control agrees with centred maps far above the chance of areas;
    exchanging images sees through it.
    """
    rng = np.random.default_rng(10)
    y, x = np.mgrid[:24, :24] - 11.5
    centre = -(x**2 + y**2)
    maps = [smooth(rng, 24, 3, centred=True) for _ in range(12)]
    named = [(f"p{i}", one) for i, one in enumerate(maps)]
    found = agree(
        [explanation(one, "gradcam", name) for name, one in named]
        + [explanation(centre, "centre", n) for n, _ in named]
    )
    row = found.summary().iloc[0]
    assert row.excess_low > 0.2
    assert row.p_images == 1.0
    assert row.verdict == "not-shown"


def test_permutations_within_groups_find_what_is_there_and_nothing_else(monkeypatch):
    monkeypatch.setattr(overlap, "PERMUTATIONS_AT_ONCE", 10)
    rng = np.random.default_rng(11)
    a = [blob(rng, (10, 10)) for _ in range(25)]
    near = [pack(one & blob(rng, (10, 10), 0.8)) for one in a]
    assert permutation_p([pack(one) for one in a], near) == 1 / 10_000
    p = [
        permutation_p(
            [pack(one) for one in a],
            [pack(blob(rng, (10, 10))) for _ in a],
            draws=200,
        )
        for _ in range(120)
    ]
    assert np.mean(p) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("count", [5, 9])
def test_calibration_of_independent_smooth_maps(count, centred):
    """With nothing shared beyond what all maps of a method share, p is uniform; the
    chance of areas alone is not.
    """
    rng = np.random.default_rng(12)
    p, above = [], []
    for _ in range(200):
        maps = [[smooth(rng, 16, 2, centred) for _ in range(count)] for _ in range(2)]
        masks = [
            [pack(one > np.quantile(one, 0.8)) for one in method] for method in maps
        ]
        p.append(permutation_p(*masks, draws=199))
        above.append(np.mean(np.diag(excess_matrix(*masks))))
    p = np.array(p)
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(p <= level) == pytest.approx(
            level, abs=4 * math.sqrt(level * (1 - level) / 200)
        )
    assert (np.mean(above) > 0.2) == centred


def test_agreement_that_is_there_is_found():
    row = (
        agree(two_methods(np.random.default_rng(13), 8, shared=0.7)).summary().iloc[0]
    )
    assert (row.verdict, row.n, row.images) == ("shown", 8, 8)
    assert row.p_images <= 0.001
    assert row.excess_low > 0


def test_masks_that_avoid_each_other_are_worse_than_chance():
    rng = np.random.default_rng(14)
    maps = [(f"p{i}", smooth(rng, 24, 3)) for i in range(8)]
    found = agree(
        [
            x
            for name, one in maps
            for x in (
                explanation(one, "gradcam", name),
                explanation(-one, "rise", name),
            )
        ]
    )
    row = found.summary().iloc[0]
    assert row.verdict == "below"
    assert row.excess_method == "no interval: all 8 values are equal"
    # of five equal numbers below 0 p is 1/32, above .025; of six 1/64
    excesses = found.table().excess.to_numpy()
    nothing = mean_interval(excesses)
    assert not overlap._below_chance(excesses[:5], nothing)
    assert overlap._below_chance(excesses[:6], nothing)
    assert not overlap._below_chance(-excesses, nothing)
    assert row.iou_mean == 0
    assert row.p_images == 1.0
    assert (
        f"mean IoU 0.000 is below the {decimal_iou(576, 115, 115):.3f} of independent masks"
        in words.verdict_reason(row)
    )


@pytest.mark.parametrize(
    ("count", "verdict"),
    [
        (1, "untestable"),
        (3, "untestable"),
        (4, "shown"),
    ],
)
def test_few_images_can_prove_nothing(count, verdict):
    row = (
        agree(two_methods(np.random.default_rng(0), count, shared=0.9))
        .summary()
        .iloc[0]
    )
    assert row.verdict == verdict
    if count == 1:
        assert (row.iou_method, row.why) == (
            "one value: no interval",
            "one-image",
        )
        assert math.isnan(row.p_images)
    if count == 3:
        assert row.p_images == pytest.approx(1 / 6)
        assert (row.why, row.images_needed, row.tests) == ("too-few", 4, 1)
        assert row.smallest_p == pytest.approx(1 / 6)
        assert words.verdict_reason(row) == (
            "with so few images no p below 0.17 is possible; 1 pair takes 4 images"
        )
    if count == 4:
        assert row.p_images == smallest_p(4) == 1 / 24


def test_several_pairs_are_paid_for():
    explanations = two_methods(np.random.default_rng(0), 4, shared=0.9)
    more = [
        replace(one, explainer="scorecam")
        for one in explanations
        if one.explainer == "rise"
    ]
    rows = agree(explanations + more).summary()
    assert len(rows) == 3
    np.testing.assert_allclose(rows.p_images, 1 / 24)
    np.testing.assert_allclose(rows.p_holm, 3 / 24)
    assert set(rows.verdict) == {"untestable"}
    assert set(rows.images_needed) == {5}  # 3 / 5! = .025


def test_images_of_different_frames_cannot_be_exchanged():
    rng = np.random.default_rng(15)
    sizes = [20, 20, 24, 24, 20]
    maps = [(f"p{i}", smooth(rng, size, 3)) for i, size in enumerate(sizes)]
    found = agree(
        [
            x
            for name, one in maps
            for x in (explanation(one, "a", name), explanation(one + 1, "b", name))
        ]
    )
    row = found.summary().iloc[0]
    assert (row.verdict, row.n) == ("untestable", 5)
    assert row.why == "frames"


def test_the_summary_is_the_mean_over_images():
    found = agree(two_methods(np.random.default_rng(16), 6, shared=0.4))
    table, row = found.table(), found.summary().iloc[0]
    assert row.iou_mean == pytest.approx(table.iou.mean())
    for name, values in (("iou", table.iou), ("excess", table.excess)):
        half = 2.570582 * values.std(ddof=1) / math.sqrt(6)  # t(.975, 5)
        low, high, _ = literal_bootstrap_t(values.tolist(), 0.95, 20_000, 1)
        mean = values.mean()
        ends = min(low, mean - half), max(high, mean + half)
        slack = pytest.approx(ends, abs=0.05 * (ends[1] - ends[0]))
        assert (row[f"{name}_low"], row[f"{name}_high"]) == slack
        assert row[f"{name}_method"] == "Student's t and bootstrap-t"
    assert row.expected_mean == pytest.approx(table.expected_iou.mean())
    assert row.excess_mean == pytest.approx(table.excess.mean())
    assert row.share_p05 == (table.p <= 0.05).mean()
    assert row.spearman_mean == pytest.approx(table.spearman.mean())
    masks = {
        name: [
            x.values > np.quantile(x.values, 0.8)
            for x in two_methods(np.random.default_rng(16), 6, 0.4)
            if x.explainer == name
        ]
        for name in ("gradcam", "rise")
    }
    assert row.p_images == pytest.approx(
        literal_permutation_p(masks["gradcam"], masks["rise"])
    )


def test_an_undefined_image_is_left_out_and_counted():
    segments = np.repeat(np.arange(4), 36).reshape(12, 12)
    rng = np.random.default_rng(17)
    weights = [rng.normal(size=4) for _ in range(5)] + [-np.ones(4)]
    group = [
        superpixel_explanation(segments, one, explainer=name, name=f"p{i}")
        for i, one in enumerate(weights)
        for name in ("lime", "kernelshap")
    ]
    row = agree(group).summary().iloc[0]
    assert (row.images, row.n) == (6, 5)
    assert row.iou_mean == 1.0


def test_one_by_one_is_all_at_once():
    explanations = two_methods(np.random.default_rng(18), 5, shared=0.5)
    whole, stream = agree(explanations), Agreement()
    for place in range(5):
        pairs = stream.add(explanations[2 * place : 2 * place + 2])
        assert pairs == (stream.pairs[-1],)
    assert whole.pairs == stream.pairs
    assert whole.summary().equals(stream.summary())


def test_the_order_of_explanations_does_not_split_a_pair():
    explanations = two_methods(np.random.default_rng(19), 4, shared=0.5)
    explanations[2], explanations[3] = explanations[3], explanations[2]
    assert [(pair.a, pair.b) for pair in agree(explanations).pairs] == [
        ("gradcam", "rise")
    ] * 4


def test_masks_that_were_cut_before_are_taken_as_they_are():
    a, b = explanation(np.eye(8)), explanation(np.eye(8), "rise")
    left, top = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[:, :4], top[:4] = True, True
    (pair,) = Agreement().add(
        [a, b],
        [Mask(left, "hand:1"), Mask(top, "hand:2", tied=3, note="by hand")],
        ["one", "two"],
    )
    assert (pair.a, pair.b, pair.rule_b, pair.tied_b, pair.iou) == (
        "one",
        "two",
        "hand:2",
        3,
        1 / 3,
    )
    assert pair.notes == ("two: by hand",)


def test_cutters_are_found_by_spelling_by_name_or_for_all():
    a, b = (
        explanation(np.arange(100.0).reshape(10, 10)),
        explanation(np.arange(100.0).reshape(10, 10).T, "rise:masks=9"),
    )
    for cutters, areas in (
        ("top:.3", (0.3, 0.3)),
        ({"gradcam": "top:.1", "rise": "top:.4"}, (0.1, 0.4)),
        ({"rise:masks=9": "top:.5", "rise": "top:.4"}, (0.2, 0.5)),
    ):
        pair = agree([a, b], cutters).pairs[0]
        assert (pair.area_a, pair.area_b) == areas


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"model": "net@9f9f"}, ["gradcam @ net@1a2b", "gradcam @ net@9f9f"]),
        ({"index": 4}, ["gradcam for 3 class 3", "gradcam for 4 class 4"]),
        ({}, ["gradcam (1)", "gradcam (2)"]),
    ],
)
def test_one_spelling_twice_is_told_apart(changes, labels):
    other = explanation(BASE.values, **changes)
    (pair,) = Agreement(allow_mismatch=True).add([BASE, other])
    assert [pair.a, pair.b] == labels


def test_the_table_has_the_columns_of_the_stored_one():
    table = agree([BASE, replace(BASE, explainer="rise")]).table()
    promised = "sample a b area_a area_b iou expected_iou excess p spearman iou_at_10 iou_at_20 iou_at_30 rule_a rule_b mismatch"
    assert set(promised.split()) <= set(table.columns)
    assert len(table) == 1
    assert list(Agreement().table().columns) == list(table.columns)
    assert Agreement().summary().empty


def test_what_cannot_be_added_leaves_nothing_behind():
    found = Agreement()
    found.add([BASE, replace(BASE, explainer="rise")])
    for group, said in (
        ([BASE, replace(BASE, explainer="rise")], "dog: this image was added before"),
        (
            [
                explanation(BASE.values, name="cat"),
                explanation(BASE.values, "rise", "cat", index=7),
            ],
            "different classes",
        ),
        (
            [
                explanation(BASE.values, n, "cat", model="net@77")
                for n in ("gradcam", "rise")
            ],
            "gradcam is of net@1a2b in images",
        ),
    ):
        with pytest.raises(ConsilienceError, match=said):
            found.add(group)
    with pytest.raises(ConsilienceError, match="as many masks and different labels"):
        found.add(
            [explanation(BASE.values, n, "cat") for n in ("gradcam", "rise")],
            labels=["x", "x"],
        )
    assert (len(found.pairs), found.summary().n.tolist()) == (1, [1])
    found.add([explanation(BASE.values, n, "cat") for n in ("gradcam", "rise")])
    assert found.summary().n.tolist() == [2]


def test_mismatches_that_are_allowed_mark_the_summary():
    group = [BASE, explanation(BASE.values, "rise", model="net@9f9f")]
    row = agree(group, allow_mismatch=True).summary().iloc[0]
    assert row.mismatch == "different weights of one model (net@1a2b and net@9f9f)"


def test_single_explanations_of_different_images_are_no_pair():
    with pytest.raises(
        ConsilienceError, match="nothing to compare: one explanation each of dog, cat"
    ):
        agree([BASE, explanation(BASE.values, "rise", "cat")])


def test_only_images_with_a_defined_excess_are_exchanged():
    """Two masks of the whole frame have none; three images are left, whose least p is
    1/3!.
    """
    rng = np.random.default_rng(20)
    found = Agreement()
    for number in range(5):
        maps = [
            explanation(smooth(rng, 12, 2), by, f"p{number}") for by in ("a", "b")
        ]
        masks = [
            Mask(one.values > np.quantile(one.values, 0.7), "top") for one in maps
        ]
        if number > 2:
            masks = [Mask(np.ones((12, 12), dtype=bool), "top")] * 2
        found.add(maps, masks, ("a", "b"))
    row = found.summary().iloc[0]
    assert (row.images, row.n) == (5, 5)
    assert row.smallest_p == 1 / 6
    kept = found._exchangeable(found.pairs)
    assert [len(side) for side in kept] == [3, 3]


def test_the_seed_draws_the_permutations():
    rng = np.random.default_rng(21)
    maps = two_methods(rng, 9, shared=0.15)
    p = [agree(maps, seed=seed).summary().iloc[0].p_images for seed in (0, 0, 1)]
    assert p[0] == p[1] != p[2]
    assert p[0] == pytest.approx(p[2], abs=0.03)


@pytest.mark.parametrize(
    ("mean", "worse", "verdict"),
    [(0.1, False, "shown"), (-0.1, False, "not-shown"), (-0.1, True, "below")],
)
def test_agreement_is_not_shown_where_masks_lie_apart(mean, worse, verdict):
    """Less apart on the same image than on others is no agreement."""
    test = overlap._Test(0.001, 0.0001)
    assert overlap._verdict(test, 0.001, 1, mean, worse) == (verdict, "")


def test_images_that_could_not_have_shown_an_overlap_do_not_count():
    """Of four images two have positions enough, and one of these shows it."""

    def pair(p, positions):
        one = explanation(np.arange(100.0).reshape(10, 10))
        return replace(compare_pair(one, one), p=p, positions=positions)

    pairs = [pair(0.01, 99), pair(0.5, 60), pair(0.2, 4), pair(1.0, math.nan)]
    assert overlap._share_shown(pairs) == 0.5
    assert math.isnan(overlap._share_shown(pairs[2:]))
