"""Drawings: colours follow values exactly, masks are exact, and what is flat is drawn
flat.
"""

import io
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from consilience.progress import printable
from consilience.show import colours, figures, tiles
from consilience.types import ConsilienceError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (24, 30, 3)).astype(np.uint8)


def ramp(low, high, shape=(24, 30)):
    return (
        np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(np.float32)
    )


# ---- limits and colours


def test_limits_of_a_plain_map_are_its_percentiles():
    values = np.arange(1001, dtype=np.float32).reshape(7, 143)
    scale = colours.limits(values)
    assert (scale.low, scale.high, scale.signed, scale.flat) == (
        5.0,
        995.0,
        False,
        False,
    )


def test_limits_of_a_signed_map_are_symmetric_round_zero():
    values = np.arange(-200, 801, dtype=np.float32).reshape(7, 143)
    scale = colours.limits(values)
    assert scale.signed
    assert scale.low == -scale.high
    assert scale.high == pytest.approx(np.sort(np.abs(values.ravel()))[995])


def test_one_hot_pixel_does_not_darken_the_rest():
    values = ramp(0, 1)
    hot = values.copy()
    hot[0, 0] = 1e6
    assert colours.limits(hot).high < 1.01


def test_a_map_of_one_hot_pixel_alone_still_has_limits():
    values = np.zeros((40, 40), np.float32)
    values[3, 4] = 2.0
    assert (colours.limits(values).high, colours.limits(values).flat) == (2.0, False)
    values[3, 4] = -2.0
    assert (colours.limits(values).high, colours.limits(values).signed) == (2.0, True)


def test_rounding_below_zero_does_not_make_a_map_signed():
    values = ramp(0, 1)
    values[0, 0] = -1e-7
    assert not colours.limits(values).signed


def test_zero_is_the_neutral_centre_and_opposites_are_mirrored():
    values = ramp(-1, 3)
    values[5, 5] = 0.0
    painted = colours.map_colours(values)
    assert tuple(painted[5, 5]) == colours.NEUTRAL
    table = matplotlib.colormaps["coolwarm"].resampled(511)
    scale = colours.limits(values)
    share = np.clip((values[20, 20] + scale.high) / (2 * scale.high), 0, 1)
    np.testing.assert_allclose(
        painted[20, 20], np.array(table(round(share * 510))[:3]) * 255, atol=0.5
    )


def test_both_arms_of_the_signed_map_are_equally_light():
    lightness = rgb2lab(
        colours.map_colours(
            np.linspace(-1, 1, 401).reshape(1, -1), scale=colours.Scale(-1, 1, True)
        )
    )[0, :, 0]
    np.testing.assert_allclose(lightness, lightness[::-1], atol=1.0)
    assert (np.diff(lightness[:200]) > -0.2).all()


def test_plain_maps_get_lighter_with_the_value():
    lightness = rgb2lab(
        colours.map_colours(
            np.linspace(0, 1, 400).reshape(1, -1), scale=colours.Scale(0, 1, False)
        )
    )[0, :, 0]
    assert (np.diff(lightness) > -0.2).all()
    assert lightness[-1] - lightness[0] > 90


def test_equal_values_get_equal_colours_and_more_get_other_ones():
    values = np.repeat(np.arange(12, dtype=np.float32), 60).reshape(24, 30)
    painted = colours.map_colours(values)
    seen = {
        value: {tuple(colour) for colour in painted[values == value]}
        for value in range(12)
    }
    assert all(len(found) == 1 for found in seen.values())
    assert len(set.union(*seen.values())) == 12


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30])
def test_a_flat_map_is_flat_whatever_its_level_and_rounding(value):
    values = np.full((24, 30), value, np.float32) * (
        1 + 1e-7 * RNG.standard_normal((24, 30))
    )
    assert colours.limits(values).flat
    assert (colours.map_colours(values) == colours.NEUTRAL).all()
    assert (colours.overlay(IMAGE, values) == IMAGE).all()


def test_what_is_no_number_is_neutral_and_leaves_the_image():
    values = ramp(0, 1)
    values[2, 3], values[4, 5] = np.nan, np.inf
    assert tuple(colours.map_colours(values)[2, 3]) == colours.NEUTRAL
    assert tuple(colours.overlay(IMAGE, values)[2, 3]) == tuple(IMAGE[2, 3])
    assert colours.limits(values).high < 1
    assert colours.limits(np.full((3, 3), np.nan)).flat


# ---- over the image


@pytest.mark.parametrize("low", [0, -1])
def test_overlay_is_the_blend_written_out(low):
    values, alpha = ramp(low, 1), 0.6
    scale, painted, drawn = (
        colours.limits(values),
        colours.map_colours(values),
        colours.overlay(IMAGE, values, alpha),
    )
    for y, x in [(0, 0), (3, 7), (12, 15), (23, 29)]:
        value = min(max(float(values[y, x]), scale.low), scale.high)
        strength = (
            abs(value) / scale.high
            if scale.signed
            else (value - scale.low) / (scale.high - scale.low)
        )
        for channel in range(3):
            expected = (1 - alpha * strength) * IMAGE[
                y, x, channel
            ] + alpha * strength * painted[y, x, channel]
            assert drawn[y, x, channel] == pytest.approx(expected, abs=0.51)


def test_superpixels_paint_weights_and_draw_borders():
    segments = np.zeros((24, 30), int)
    segments[:, 10:20], segments[:, 20:] = 1, 2
    drawn = colours.superpixels(
        IMAGE, segments, np.array([0.0, 2.0, -1.0]), alpha=1.0
    )
    assert (drawn[:, :9] == IMAGE[:, :9]).all()
    assert (
        drawn[:, 12:18]
        == colours.map_colours(np.array([[1.0]]), scale=colours.Scale(-1, 1, True))[
            0, 0
        ]
    ).all()
    half = (
        IMAGE[:, 22:].astype(float)
        + colours.map_colours(np.array([[-0.5]]), scale=colours.Scale(-1, 1, True))[
            0, 0
        ]
    ) / 2
    np.testing.assert_allclose(drawn[:, 22:], half, atol=1)
    assert (drawn[:, 9].astype(int) >= IMAGE[:, 9]).all()
    assert (drawn[:, 9] != IMAGE[:, 9]).any()


def test_sure_superpixels_have_a_thick_border_and_unsure_ones_are_hatched():
    segments = np.zeros((60, 90), int)
    segments[:, 30:60], segments[:, 60:] = 1, 2
    image = np.full((60, 90, 3), 90, np.uint8)
    plain = colours.superpixels(image, segments, np.array([1.0, 0.8, 0.5]))
    drawn = colours.superpixels(
        image,
        segments,
        np.array([1.0, 0.8, 0.5]),
        sure=np.array([0]),
        unsure=np.array([1]),
    )
    assert (drawn[:, 60:] == plain[:, 60:]).all()
    for y in range(60):
        for x in range(30):
            depth = min(y + 1, 60 - y, x + 1, 30 - x)
            if depth <= 2:
                assert tuple(drawn[y, x]) == colours.CONTOUR
            else:
                assert tuple(drawn[y, x]) == (
                    (0, 0, 0) if depth == 3 else tuple(plain[y, x])
                )
    for y, x in np.ndindex(60, 30):
        hatched = (y + x + 30) % 4 == 0
        assert tuple(drawn[y, x + 30]) == (
            colours.CONTOUR if hatched else tuple(plain[y, x + 30])
        )


def test_a_tile_says_how_sure_its_superpixels_are():
    segments = np.arange(30)[None].repeat(24, axis=0) // 10
    weights, p_top = np.array([0.3, -0.2, 0.1]), np.array([1.0, 0.7, 0.3])
    sure = item(
        "LIME", weights[segments], segments=segments, weights=weights, p_top=p_top
    )
    sure.provenance = {
        "verdict": {
            "code": "not-told-apart",
            "draws": 700,
            "rivals": [1, 2],
            "place": 2,
        }
    }
    (_, tile) = tiles.tiles(shown(sure))
    assert tile.lines == (
        "not stable after 700 draws: superpixels 1 and 2 could not be told apart at place 2",
        "thick border: surely among the top 2 (1 of them)",
        "hatched: may not be among them (1)",
    )
    expected = colours.superpixels(
        IMAGE, segments, weights, sure=np.array([0]), unsure=np.array([1])
    )
    assert (tile.image == expected).all()
    without = item("LIME", weights[segments], segments=segments, weights=weights)
    assert tiles.tiles(shown(without))[1].lines == ()


def test_superpixels_refuse_labels_without_weight():
    with pytest.raises(
        ConsilienceError, match="run from 0 to 2; there are 2 weights"
    ):
        colours.superpixels(
            IMAGE, np.full((24, 30), 2) * (np.arange(30) > 4), np.zeros(2)
        )


def test_mask_leaves_the_inside_and_greys_the_outside():
    on = np.zeros((24, 30), bool)
    on[5:12, 8:20] = True
    drawn = colours.mask(IMAGE, on)
    assert (drawn[on] == IMAGE[on]).all()
    far = np.ones_like(on)
    far[4:13, 7:21] = False
    grey = 0.38 * np.round(IMAGE[far] @ [0.299, 0.587, 0.114])
    for channel in range(3):
        np.testing.assert_allclose(drawn[far][:, channel], grey, atol=0.51)
    ring = ~far & ~on
    assert (drawn[4, 10] == colours.CONTOUR).all()
    assert (drawn[ring] == colours.CONTOUR).all(axis=1).sum() >= 2 * (7 + 12)


@pytest.mark.parametrize("on", [np.zeros((24, 30), bool), np.ones((24, 30), bool)])
def test_empty_and_full_masks_have_no_contour(on):
    drawn = colours.mask(IMAGE, on)
    assert (drawn == IMAGE).all() if on.all() else (drawn.max() <= 97)


def test_both_colours_exactly_the_parts():
    grey = np.full((24, 30, 3), 128, np.uint8)
    a, b = RNG.random((24, 30)) < 0.4, RNG.random((24, 30)) < 0.5
    drawn = colours.both(grey, a, b, alpha=1.0)
    for part, colour in (
        (a & ~b, colours.ONLY_A),
        (~a & b, colours.ONLY_B),
        (a & b, colours.SHARED),
    ):
        assert ((drawn == colour).all(axis=2) == part).all()
    assert (drawn[~a & ~b] == round(0.38 * 128)).all()


DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
PROTANOPIA = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)


@pytest.mark.parametrize(
    "sight",
    [np.eye(3), DEUTERANOPIA, PROTANOPIA],
    ids=["normal", "deuteranopia", "protanopia"],
)
def test_the_colours_of_two_masks_are_apart_for_every_sight(sight):
    """Machado et al. 2009, severity 1, on linear RGB; a difference of 10 is seen at a
    glance.
    """
    drawn = (
        colours.both(
            np.full((1, 4, 3), 128, np.uint8),
            np.array([[1, 0, 1, 0]]) > 0,
            np.array([[0, 1, 1, 0]]) > 0,
        )[0]
        / 255
    )
    linear = (
        np.where(drawn <= 0.04045, drawn / 12.92, ((drawn + 0.055) / 1.055) ** 2.4)
        @ sight.T
    )
    seen = np.clip(linear, 0, 1)
    seen = np.where(
        seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055
    )
    lab = rgb2lab(seen[None])[0]
    assert (
        min(deltaE_ciede2000(lab[i], lab[j]) for i, j in combinations(range(4), 2))
        > 20
    )


@pytest.mark.parametrize("draw", [colours.overlay, colours.mask])
def test_frames_must_agree(draw):
    with pytest.raises(
        ConsilienceError, match=r"frame is \(24, 30\); the map or mask is \(10, 10\)"
    ):
        draw(IMAGE, np.zeros((10, 10), bool))
    with pytest.raises(ConsilienceError, match="uint8; got float64"):
        draw(IMAGE / 255.0, np.zeros((24, 30), bool))


# ---- tiles and panels


def item(column, values, mask=None, **extras):
    return SimpleNamespace(column=column, values=values, mask=mask, extras=extras)


def shown(*items, name="an image", image=IMAGE):
    return SimpleNamespace(name=name, image=image, items=items)


def test_tiles_are_image_maps_masks_and_pairs_with_their_numbers():
    a, b = np.zeros((24, 30), bool), np.zeros((24, 30), bool)
    a[:, :6], b[:, 4:14] = True, True
    found = tiles.tiles(
        shown(
            item("A", ramp(0, 1), a), item("B", ramp(-1, 1), b), item("C", ramp(0, 1))
        )
    )
    assert [tile.title for tile in found] == [
        "image",
        "A",
        "B",
        "C",
        "A mask",
        "B mask",
        "A & B",
    ]
    assert found[4].lines == ("20 % of the frame",)
    assert found[5].lines == ("33.3 % of the frame",)
    assert found[-1].lines == ("IoU 0.143",)  # 2 of 14 columns
    assert (found[0].image == IMAGE).all()
    assert [found[2].scale.signed, found[1].scale.signed] == [True, False]


def test_a_flat_map_says_so():
    (_, tile) = tiles.tiles(shown(item("A", np.full((24, 30), 0.25, np.float32))))
    assert tile.lines == ("flat: every value is 0.25",)
    assert tile.scale is None


def test_two_empty_masks_have_no_iou():
    empty = np.zeros((24, 30), bool)
    assert tiles.tiles(
        shown(item("A", ramp(0, 1), empty), item("B", ramp(0, 1), empty))
    )[-1].lines == ("IoU –: both masks are empty",)


def test_a_map_of_another_frame_gets_the_image_in_its_frame():
    (_, tile) = tiles.tiles(shown(item("A", ramp(0, 1, (48, 60)))))
    assert tile.image.shape == (48, 60, 3)


@pytest.mark.parametrize("frame", [(24, 30), (224, 224), (384, 200), (30, 400)])
def test_panel_is_a_png_that_holds_the_image_at_its_height(frame):
    base_image = RNG.integers(0, 256, (*frame, 3)).astype(np.uint8)
    data = figures.panel(
        shown(item("A", ramp(0, 1, frame), ramp(0, 1, frame) > 0.8), image=base_image)
    )
    image = np.array(Image.open(io.BytesIO(data)))
    assert image.shape[0] > 300
    width = max(48, round(300 * frame[1] / frame[0]))
    assert image.shape[1] == 2 * 16 + 3 * width + 2 * 14


def test_a_tile_of_the_panels_height_is_kept_pixel_by_pixel():
    base_image = RNG.integers(0, 256, (300, 320, 3)).astype(np.uint8)
    image = np.array(
        Image.open(
            io.BytesIO(
                figures.figure_png(
                    figures.tiles_figure([tiles.Tile(base_image, "t", "t")])
                )
            )
        )
    )
    rows = [
        y
        for y in range(image.shape[0] - 300)
        if (image[y : y + 300, 16:336] == base_image).all()
    ]
    assert len(rows) == 1
    outside = image.copy()
    outside[rows[0] : rows[0] + 300, 16:336] = 255
    assert (outside[rows[0] :] == 255).all()


def test_text_stays_inside_the_panel():
    """Long and hostile words are wrapped: the margins stay white."""
    hostile = "x" * 300 + "\n<b>\x00$a$ " + "слово " * 40
    a = ramp(0, 1) > 0.5
    data = figures.panel(
        shown(item(hostile, ramp(-1, 1), a), item("B", ramp(0, 1), a), name=hostile)
    )
    image = np.array(Image.open(io.BytesIO(data)))
    for margin in (image[:, :12], image[:, -12:], image[:12], image[-8:]):
        assert (margin == 255).all()


# ---- the plot


SVG = "http://www.w3.org/2000/svg"


def tables(count, a="A", b="B", **more):
    iou = np.linspace(0.1, 0.6, count)
    agreement = pd.DataFrame(
        {
            "sample": [f"s{i}" for i in range(count)],
            "a": a,
            "b": b,
            "iou": iou,
            "expected_iou": 0.3,
            **more,
        }
    )
    mean = {
        "a": a,
        "b": b,
        "n": count,
        "iou_mean": iou.mean(),
        "iou_low": 0.3,
        "iou_high": 0.4,
        "expected_mean": 0.3,
    }
    return agreement, pd.DataFrame([mean])


def marks(svg, name):
    """x positions of the marks of that name, from below upwards."""
    (group,) = [
        group
        for group in ET.fromstring(svg).iter(f"{{{SVG}}}g")
        if re.fullmatch(f"p[0-9a-f]+-{name}", group.get("id", ""))
    ]
    used = [float(use.get("x")) for use in group.iter(f"{{{SVG}}}use")]
    paths = [
        path for path in group.iter(f"{{{SVG}}}path") if "clip-path" in path.attrib
    ]
    drawn = [
        np.array(re.findall(r"([\d.]+) [\d.]+", path.get("d")), float)
        for path in paths
    ]
    return used or [(x.min() + x.max()) / 2 for x in drawn]


def test_plot_places_every_image_by_its_iou():
    agreement, summary = tables(6)
    agreement["expected_iou"] = 0.05
    svg = figures.agreement_plot(agreement, summary)
    x = np.array(marks(svg, "iou-above"))
    assert np.corrcoef(x, agreement["iou"])[0, 1] > 0.999999
    chance = np.array(marks(svg, "chance"))
    slope = (x[-1] - x[0]) / 0.5
    np.testing.assert_allclose(chance, x[0] - slope * 0.05, atol=0.01)


def test_plot_is_the_same_twice_and_two_plots_share_no_id():
    one = figures.agreement_plot(*tables(5))
    assert one == figures.agreement_plot(*tables(5))
    other = figures.agreement_plot(*tables(6))
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1]
    for svg, known in zip((one, other), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= known


def test_plot_follows_the_ink_of_the_page_and_carries_no_metadata():
    svg = figures.agreement_plot(*tables(5))
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "metadata" not in svg
    assert set(re.findall(r"https?://[^\"\s]+", svg)) == {
        "http://www.w3.org/2000/svg"
    }


def test_plot_shows_published_values_as_a_third_mark():
    agreement, summary = tables(
        8, published_iou=[0.2, np.nan, 0.4, 0.5, 0.15, 0.25, 0.35, 0.45]
    )
    svg = figures.agreement_plot(agreement, summary)
    below, above = marks(svg, "iou-below"), marks(svg, "iou-above")
    unit = (above[-1] - below[0]) / 0.5
    np.testing.assert_allclose(
        marks(svg, "published"),
        [
            below[0] + unit * (x - 0.1)
            for x in (0.2, 0.4, 0.5, 0.15, 0.25, 0.35, 0.45)
        ],
        atol=0.01,
    )
    with pytest.raises(ValueError):
        marks(figures.agreement_plot(*tables(8)), "published")


@pytest.mark.parametrize("count", [1, 2, 40, 41, 300])
def test_plot_of_any_number_of_images_clips_no_label(count):
    agreement, summary = tables(count)
    agreement["sample"] = [
        f"a $very$ long {'w' * 40} name <{i}>" for i in range(count)
    ]
    if count == 1:
        summary[["iou_low", "iou_high"]] = np.nan
    svg = figures.agreement_plot(agreement, summary)
    figure = figures._figure(agreement, summary.iloc[0].to_dict(), 0)
    figure.draw_without_rendering()
    inked = figure.get_tightbbox()
    assert inked.x0 >= 0
    assert inked.y0 >= 0
    assert inked.x1 <= figure.get_figwidth()
    assert inked.y1 <= figure.get_figheight()
    ET.fromstring(svg)


def test_plot_leaves_out_what_has_no_number():
    agreement, summary = tables(5)
    agreement["iou"] = agreement["iou"].astype(object)
    agreement.loc[2, "iou"] = None
    agreement["expected_iou"] = 0.0
    assert len(marks(figures.agreement_plot(agreement, summary), "iou-above")) == 4


def test_plot_of_a_pair_that_is_not_there():
    with pytest.raises(ConsilienceError, match="no pair 'A', 'X'"):
        figures.agreement_plot(*tables(3), pair=("A", "X"))
    with pytest.raises(ConsilienceError, match="no pair of explainers"):
        figures.agreement_plot(pd.DataFrame(), pd.DataFrame())


def test_a_no_break_space_stays_and_a_control_character_shows():
    assert printable("92.4\xa0s\u202e\x00") == "92.4\xa0s\ufffd\ufffd"


@pytest.mark.parametrize(("spread", "flat"), [(0.9e-5, True), (1.5e-5, False)])
def test_a_hundred_thousandth_of_the_value_is_no_relief(spread, flat):
    values = np.full((8, 8), 100.0)
    values[:4] += 100 * spread
    assert colours.limits(values).flat == flat
    assert colours.limits(values - 100, signed=True).flat is False
