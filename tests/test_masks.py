import numpy as np
import pytest
from oracles_agreement import (
    explanation,
    lime_mask,
    literal_top,
    superpixel_explanation,
)

from consilience import registry
from consilience.agreement.masks import (
    FLAT_MAP,
    NONE_POSITIVE,
    Superpixels,
    Top,
    default_cutter,
    matched,
    pixels_of,
)
from consilience.agreement.overlap import compare_pair
from consilience.types import ConsilienceError, NotApplicable

BLOCKS = np.repeat(
    np.repeat(np.arange(16).reshape(4, 4), 3, axis=0), 2, axis=1
)  # 12 x 8, sixteen superpixels of 6 pixels


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.145, 0.5, 1.0, 0.001])
@pytest.mark.parametrize("kind", ["continuous", "ties", "signs", "zeros"])
def test_top_takes_what_a_full_sort_takes(fraction, kind):
    rng = np.random.default_rng(3)
    draw = {
        "continuous": rng.normal(size=(20, 10)),
        "ties": rng.integers(0, 4, (20, 10)),
        "signs": -rng.random((20, 10)),
        "zeros": np.maximum(rng.normal(size=(20, 10)) - 1.5, 0),
    }
    values = draw[kind]
    cut = Top(fraction).cut(explanation(values))
    taken = literal_top(values, fraction)
    edge = values[taken].min() if taken.any() else np.inf
    inside = bool(((values == edge) & ~taken).any())
    right = values > edge if inside else taken
    np.testing.assert_array_equal(cut.on, right)
    assert cut.tied == (np.count_nonzero(values == edge) if inside else 0)


@pytest.mark.parametrize(
    ("fraction", "pixels", "count"),
    [
        (0.2, 50176, 10035),
        (0.1, 50176, 5018),
        (0.145, 100, 15),
        (0.25, 50, 13),
        (0.35, 10, 4),
        (0.05, 10, 1),
        (1.0, 7, 7),
    ],
)
def test_the_area_is_rounded_half_up_as_the_decimal_reads(fraction, pixels, count):
    assert pixels_of(fraction, pixels) == count


def test_ties_at_the_cut_are_counted_only_where_the_choice_was_arbitrary():
    values = [[5, 3, 3, 3], [1, 1, 0, 0]]
    assert [
        Top(share).cut(explanation(values)).tied
        for share in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    ] == [0, 3, 3, 0, 2, 0]
    np.testing.assert_array_equal(
        Top(0.375).cut(explanation(values)).on, [[1, 0, 0, 0], [0, 0, 0, 0]]
    )


def test_a_flat_map_has_an_empty_mask():
    cut = Top(0.2).cut(explanation(np.zeros((10, 10))))
    assert (cut.area, cut.share, cut.tied, cut.note) == (0, 0.0, 100, FLAT_MAP)
    assert Top(0.2).cut(explanation(np.arange(100).reshape(10, 10))).note == ""


def test_negative_values_rank_below_zero_and_nothing_is_scaled():
    on = Top(0.25).cut(explanation([[-9.0, 0.0], [-1.0, -2.0]])).on
    np.testing.assert_array_equal(on, [[0, 1], [0, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_cannot_be_cut(bad):
    with pytest.raises(NotApplicable, match="1 of 4 values are not finite"):
        Top().cut(explanation([[1.0, bad], [0.0, 2.0]]))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 20, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(
        ConsilienceError, match=r"fraction (must be above 0|is a number)"
    ):
        Top(fraction)


@pytest.mark.parametrize("k", [1, 3, 5, 10, 16])
@pytest.mark.parametrize("seed", range(5))
def test_superpixels_are_those_of_lime(seed, k):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=16)
    selected = np.argsort(-np.abs(weights), kind="stable")[:10]
    refit = np.zeros(16)
    refit[selected] = rng.normal(size=10).round(
        1
    )  # rounded: ties, which lime breaks by the order of selection
    cut = Superpixels(k).cut(superpixel_explanation(BLOCKS, weights, refit, selected))
    np.testing.assert_array_equal(
        cut.on, lime_mask(BLOCKS, [(i, refit[i]) for i in selected], k)
    )


def test_without_a_refit_the_weights_decide_as_in_lime():
    weights = np.random.default_rng(1).normal(size=16).round(1)
    cut = Superpixels(4).cut(superpixel_explanation(BLOCKS, weights))
    np.testing.assert_array_equal(
        cut.on, lime_mask(BLOCKS, list(enumerate(weights)), 4)
    )


def test_k_counts_positive_superpixels_only():
    weights = np.zeros(16)
    weights[[0, 1, 2, 3]] = [0.1, -5, 3, 2]
    cut = Superpixels(2).cut(superpixel_explanation(BLOCKS, weights))
    assert set(BLOCKS[cut.on]) == {2, 3}
    assert cut.area == 12
    assert cut.rule == "superpixels:k=2"


def test_ties_at_place_k_are_counted_in_superpixels():
    weights = np.zeros(16)
    weights[[4, 7, 9, 12]] = [3, 2, 2, 2]
    ties = [
        Superpixels(k).cut(superpixel_explanation(BLOCKS, weights)).tied
        for k in (1, 2, 3, 4, 5)
    ]
    assert ties == [0, 3, 3, 0, 0]


def test_a_tie_where_lime_chose_what_to_refit_is_counted():
    weights = np.zeros(16)
    weights[[2, 5, 8]] = [3.0, -1.0, 1.0]
    refit = np.where(np.arange(16) == 2, 3.0, np.where(np.arange(16) == 5, -1.0, 0.0))
    cut = Superpixels().cut(superpixel_explanation(BLOCKS, weights, refit, [2, 5]))
    assert cut.tied == 2
    assert set(BLOCKS[cut.on]) == {2}


def test_no_positive_superpixel_gives_an_empty_mask_and_says_so():
    cut = Superpixels().cut(superpixel_explanation(BLOCKS, -np.ones(16)))
    assert (cut.area, cut.note) == (0, NONE_POSITIVE)


def test_superpixels_of_a_plain_map_do_not_apply():
    with pytest.raises(
        NotApplicable, match="gradcam has no superpixels; cut its map with top"
    ):
        Superpixels().cut(explanation(np.eye(4)))


def test_the_default_follows_the_explanation():
    assert default_cutter(explanation(np.eye(4))) == Top(0.2)
    assert default_cutter(superpixel_explanation(BLOCKS, np.ones(16))) == Superpixels(
        10
    )


@pytest.mark.parametrize(
    "text", ["top", "top:fraction=0.3", "superpixels", "superpixels:k=12"]
)
def test_cutters_are_spelled_as_they_are_read(text):
    assert registry.spell(registry.cutters.build(text)) == text


def test_the_positional_value_is_the_one_that_matters():
    assert registry.cutters.build("top:.3") == Top(0.3)
    assert registry.cutters.build("superpixels:12") == Superpixels(12)


def test_two_maps_are_matched_at_exactly_the_fraction():
    rng = np.random.default_rng(0)
    a, b = (explanation(rng.normal(size=(12, 8))) for _ in range(2))
    one, two = matched(a, b, 0.3)
    np.testing.assert_array_equal(one.on, literal_top(a.values, 0.3))
    np.testing.assert_array_equal(two.on, literal_top(b.values, 0.3))
    assert one.area == two.area == 29


@pytest.mark.parametrize("swapped", [False, True])
def test_whole_superpixels_set_the_area_of_the_other_map(swapped):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=16)
    lime, cam = (
        superpixel_explanation(BLOCKS, weights),
        explanation(rng.normal(size=(12, 8))),
    )
    pair = matched(cam, lime, 0.3)[::-1] if swapped else matched(lime, cam, 0.3)
    best = np.argsort(-weights)[
        :5
    ]  # 4 x 6 = 24 pixels are fewer than .3 * 96, 5 x 6 = 30 are not
    np.testing.assert_array_equal(pair[0].on, np.isin(BLOCKS, best))
    np.testing.assert_array_equal(pair[1].on, literal_top(cam.values, 30 / 96))
    assert [mask.tied for mask in pair] == [0, 0]


def test_superpixels_that_fit_exactly_are_not_overfilled():
    lime, cam = (
        superpixel_explanation(BLOCKS, np.arange(16)),
        explanation(np.random.default_rng(0).normal(size=(12, 8))),
    )
    assert [mask.area for mask in matched(lime, cam, 0.25)] == [24, 24]


def test_of_two_partitions_the_last_superpixel_of_the_second_is_filled_row_by_row():
    rows = np.repeat(np.arange(3), 4).reshape(3, 4)  # superpixels of 4 pixels
    halves = np.tile([0, 0, 1, 1], (3, 1))  # of 6
    a, b = (
        superpixel_explanation(rows, [1, 3, 2]),
        superpixel_explanation(halves, [0, 1]),
    )
    one, two = matched(a, b, 0.6)
    np.testing.assert_array_equal(one.on, np.isin(rows, [1, 2]))
    # the right half whole, then two pixels of the left half
    np.testing.assert_array_equal(two.on, [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    assert (one.tied, two.tied) == (0, 6)


def test_a_tie_at_an_equal_area_has_no_number():
    lime, cam = (
        superpixel_explanation(BLOCKS, np.zeros(16)),
        explanation(np.random.default_rng(0).normal(size=(12, 8))),
    )
    with pytest.raises(NotApplicable, match="96 pixels share the value at the cut"):
        matched(lime, cam, 0.1)
    spot = np.zeros((12, 8))
    spot[:2, :2] = [[4, 3], [2, 1]]
    with pytest.raises(NotApplicable, match="92 pixels share the value at the cut"):
        matched(explanation(spot), cam, 0.2)
    assert matched(explanation(spot), cam, 4 / 96)[0].area == 4


@pytest.mark.parametrize("seed", range(4))
def test_what_is_tied_never_looks_like_agreement(seed):
    """Disjoint spots on a blank ground, and two blank maps: fillers are no evidence."""
    rng = np.random.default_rng(seed)
    a, b = np.zeros((64, 64)), np.zeros((64, 64))
    a[40:53, 2:15] = rng.random((13, 13)) + 0.1
    b[40:53, 45:58] = rng.random((13, 13)) + 0.1
    pair = compare_pair(explanation(a), explanation(b, "rise"))
    assert pair.iou == 0
    assert pair.p > 0.5
    assert np.isnan([pair.iou_at_10, pair.iou_at_20, pair.iou_at_30]).all()
    blank = np.zeros((64, 64))
    pair = compare_pair(explanation(blank), explanation(blank, "rise"))
    assert np.isnan([pair.iou, pair.excess, pair.p]).all()


def test_frames_of_different_shape_cannot_be_matched():
    with pytest.raises(
        ConsilienceError,
        match="maps of 4 x 4 and 5 x 5 cannot be laid over each other",
    ):
        matched(explanation(np.eye(4)), explanation(np.eye(5)), 0.2)
