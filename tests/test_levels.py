"""Maps as levels: what a page embeds cuts the same masks as the map itself."""

import base64
import zlib

import numpy as np
import pytest
from fakes_report import blob

from consilience.agreement.masks import above_cut
from consilience.show import levels


def smooth():
    return blob((90, 130), (224, 224), 3)


def heavy():
    """A gradient's tail: most pixels lie in a thousandth of the range."""
    values = np.random.default_rng(1).standard_t(2, (160, 200)).astype(np.float32)
    return np.abs(values) ** 3


def signed():
    return smooth() - 1.2


@pytest.mark.parametrize("make", [smooth, heavy, signed])
def test_packing_is_without_loss_and_keeps_the_order(make):
    values = make()
    coded = levels.levels_of(values)
    again = levels.unpacked(levels.packed(coded.levels), values.shape)
    np.testing.assert_array_equal(again, coded.levels)
    order = np.argsort(values.ravel(), kind="stable")
    assert (np.diff(coded.levels.ravel()[order].astype(int)) >= 0).all()
    assert coded.levels.min() == 0
    assert coded.levels.max() == 65535


@pytest.mark.parametrize("make", [smooth, heavy, signed])
def test_no_level_holds_more_than_its_share_of_frame_and_range(make):
    values = make()
    coded = levels.levels_of(values)
    widths, counts = [], []
    for level in np.unique(coded.levels):
        there = values[coded.levels == level]
        widths.append(np.ptp(there))
        counts.append(len(np.unique(there)))
    assert max(widths) <= np.ptp(values) / 32767 * 1.001
    assert max(counts) <= values.size / 32767 + 1


@pytest.mark.parametrize("make", [smooth, heavy, signed])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_cut_by_area_is_the_cut_of_the_map(make, share):
    """By sorting the levels themselves, apart from how the page searches them."""
    values = make()
    area = round(share * values.size)
    coded = levels.levels_of(values).levels
    least = np.sort(coded.ravel())[-area]
    on = coded >= least
    if on.sum() != area:
        on = coded > least
    wanted, _ = above_cut(values, area)
    assert np.count_nonzero(on ^ wanted) <= 4


@pytest.mark.parametrize("make", [smooth, heavy, signed])
def test_values_are_read_to_a_hundred_and_twenty_eighth_of_the_range(make):
    values = make()
    coded = levels.levels_of(values)
    assert np.abs(coded.values - values).max() <= np.ptp(values) / 128
    assert coded.knots[0] == values.min()
    assert coded.knots[-1] == values.max()


def test_a_flat_map_and_what_is_not_finite():
    flat = levels.levels_of(np.full((3, 5), 0.25, np.float32))
    assert not flat.levels.any()
    assert (flat.knots == 0.25).all()
    holes = np.array([[np.nan, 1.0], [3.0, -np.inf]])
    coded = levels.levels_of(holes)
    np.testing.assert_array_equal(coded.levels, [[0, 0], [65535, 0]])


def test_equal_values_share_a_level_by_hand():
    """Ranks 0, 1/4 (two of them) and 1; shares of the range 0, 1/2, 1."""
    coded = levels.levels_of(np.array([[0.0, 1.0, 1.0, 2.0, 2.0]]))
    middle = round(
        65535 * (1 / 3 + 1 / 2) / 2
    )  # one of three pixels below the highest
    np.testing.assert_array_equal(coded.levels, [[0, middle, middle, 65535, 65535]])


def test_a_mask_is_eight_pixels_a_byte():
    on = np.zeros((2, 5), bool)
    on[0, 0] = on[1, 4] = True
    content = zlib.decompress(base64.b64decode(levels.packed_mask(on)))
    assert content == bytes([0b10000000, 0b01000000])
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(levels.floats(np.array([1.5, -2.0]))), "<f4"),
        [1.5, -2.0],
    )
