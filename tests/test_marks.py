"""Marks: what they change, what they leave, and what their controls keep of them."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from consilience import ConsilienceError, registry
from consilience.marks import painting
from consilience.marks.painting import ELSEWHERE, corner, overlaid, scattered_change
from consilience.marks.watermark import watermark_font

HAS_WATERMARK = watermark_font() is not None
DRAWN = [
    name
    for name in registry.marks.names()
    if name != "png" and (name != "imagenet-w" or HAS_WATERMARK)
]
OVERLAYS = [
    name
    for name in DRAWN
    if name not in ("cast", "vignette", "jpeg", "noise", "blur")
]


def photographs(count=3, side=64, channels=3, seed=0):
    """Smooth random images: what JPEG and blur change little but do change."""
    source = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 8, 8, generator=source)
    return torch.nn.functional.interpolate(small, (side, side), mode="bilinear")


def logo_file(folder):
    """A logo of two halves, transparent in its corners."""
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[2:18, 2:15] = (255, 0, 0, 255)
    pixels[2:18, 15:28] = (0, 0, 255, 128)
    Image.fromarray(pixels).save(folder / "logo.png")
    return folder / "logo.png"


@pytest.mark.parametrize("name", DRAWN)
def test_a_mark_is_seen_and_its_controls_are_other_images(name):
    images = photographs()
    painted = registry.marks.build(name).paint(images, 0)
    assert painted.marked.shape == images.shape
    assert painted.where.shape == images.shape[-2:]
    assert painted.where.min() >= 0
    assert painted.where.max() <= 1
    assert painted.where.any()
    shown = [images, painted.marked, *painted.controls.values()]
    for one in shown:
        assert one.min() >= 0
        assert one.max() <= 1
    for a, b in itertools.combinations(shown, 2):
        assert (a - b).abs().amax(dim=(1, 2, 3)).min() > 1e-3, name
    assert len([one for one in painted.controls if one != ELSEWHERE]) >= 1


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_gives_the_same_marks_and_another_one_other_controls(name):
    images, mark = photographs(), registry.marks.build(name)
    first, again, other = (mark.paint(images, seed) for seed in (0, 0, 100))
    assert torch.equal(first.marked, again.marked)
    for control in first.controls:
        assert torch.equal(first.controls[control], again.controls[control])
    if name != "cast":  # nothing of it is drawn
        control = next(iter(first.controls))
        assert not torch.equal(first.controls[control], other.controls[control])


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_a_mark_does_not_cover_stays(name):
    images = photographs()
    painted = registry.marks.build(name).paint(images, 0)
    free = torch.from_numpy(painted.where == 0)
    assert free.any()
    assert torch.equal(painted.marked[:, :, free], images[:, :, free])


@pytest.mark.parametrize("name", OVERLAYS)
def test_scattered_pixels_are_the_marks_own_and_flat_ink_is_as_much(name):
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    mark, moved = registry.marks.build(name), []
    for ground in (black, white):
        painted = mark.paint(ground, 0)
        own = painted.marked[0].flatten(1).T.tolist()
        other = painted.controls["scattered"][0].flatten(1).T.tolist()
        assert sorted(own) == sorted(other)
        moved.append(own != other)
    assert any(moved)  # a black border on black is not seen
    dark = mark.paint(black, 0)
    whites = mark.paint(white, 0)
    # how much light of the ground comes through is the ink; on black its colour shows
    through = (whites.marked - dark.marked).mean(dim=(0, 2, 3))
    flat = (whites.controls["flat"] - dark.controls["flat"]).mean(dim=(0, 2, 3))
    assert torch.allclose(through, flat, atol=2e-5)
    assert torch.allclose(
        dark.marked.mean(dim=(0, 2, 3)),
        dark.controls["flat"].mean(dim=(0, 2, 3)),
        atol=2e-5,
    )


def test_images_take_scatterings_in_turn():
    images = torch.zeros(2 * painting.DRAWS, 3, 64, 64)
    scattered = registry.marks.build("logo").paint(images, 0).controls["scattered"]
    kinds = {one.numpy().tobytes() for one in scattered}
    assert len(kinds) == painting.DRAWS
    assert torch.equal(scattered[0], scattered[painting.DRAWS])


def test_a_patch_is_laid_over_by_hand():
    images = photographs(2, 16)
    rng = np.random.default_rng(0)
    patch = rng.random((4, 6, 4)).astype(np.float32)
    painted = overlaid(images, patch, "top-right", 0)
    top, left = 0, 16 - 6  # a margin of .02 of 16 is none
    wanted = images.clone().numpy()
    for n, c, y, x in itertools.product(range(2), range(3), range(4), range(6)):
        before, alpha = wanted[n, c, top + y, left + x], patch[y, x, 3]
        wanted[n, c, top + y, left + x] = before + alpha * (patch[y, x, c] - before)
    assert np.allclose(painted.marked.numpy(), wanted, atol=1e-6)
    assert painted.where[:4, 10:].tolist() == patch[..., 3].tolist()
    assert painted.where.sum() == pytest.approx(patch[..., 3].sum())
    away = painted.controls[ELSEWHERE]
    assert not torch.equal(away[:, :, 12:, :6], images[:, :, 12:, :6])
    assert torch.equal(away[:, :, :12], images[:, :, :12])


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("top-left", (2, 2)),
        ("top", (2, 40)),
        ("top-right", (2, 78)),
        ("left", (45, 2)),
        ("centre", (45, 40)),
        ("right", (45, 78)),
        ("bottom-left", (88, 2)),
        ("bottom", (88, 40)),
        ("bottom-right", (88, 78)),
    ],
)
def test_places_by_hand(place, wanted):
    assert corner(place, (10, 20), (100, 100)) == wanted


def test_a_mark_too_large_to_be_elsewhere_is_not():
    painted = registry.marks.build("border").paint(photographs(), 0)
    assert set(painted.controls) == {"scattered", "flat"}


def test_changes_are_scattered_not_lost():
    images = photographs(3, 16) * 0.5
    changed = images + 0.3 * photographs(3, 16, seed=1)
    scattered = scattered_change(images, changed, 0)
    for one, own, other in zip(images, changed, scattered, strict=True):
        change = (own - one).flatten(1).T
        moved = (other - one).flatten(1).T
        assert torch.allclose(
            change[change[:, 0].argsort()], moved[moved[:, 0].argsort()], atol=1e-6
        )
        assert not torch.allclose(change, moved)


@pytest.mark.parametrize("name", DRAWN)
def test_doses_grow(name):
    images, mark = photographs(side=160), registry.marks.build(name)
    assert mark.doses
    for option, values in mark.doses.items():
        sizes = []
        for value in values:
            painted = replace(mark, **{option: value}).paint(images, 0)
            sizes.append(float((painted.marked - images).pow(2).mean()))
        assert len(set(sizes)) == len(sizes), (name, option)
        if option != "place":
            assert sizes == sorted(sizes), (name, option)


@pytest.mark.parametrize("name", DRAWN)
def test_every_option_matters(name):
    mark, images = registry.marks.build(name), photographs(side=160)
    own = mark.paint(images, 0).marked
    others = {
        "words": "georgian" if name == "text" else "abc",
        "colour": "lime",
        "second": "lime",
        "place": "top",
        "count": 3,
        "quality": 30,
        "font": str(painting.font_file("", 10).path).replace(
            "DejaVuSans", "DejaVuSerif"
        ),
    }
    for item in fields(mark):
        value = others.get(item.name, getattr(mark, item.name))
        if isinstance(value, float):
            value = value / 2
        assert value != getattr(mark, item.name)
        changed = replace(mark, **{item.name: value}).paint(images, 0).marked
        assert not torch.equal(changed, own), item.name


@pytest.mark.parametrize("name", [*DRAWN, "text:georgian,size=0.3"])
def test_marks_are_spelled_and_read(name):
    mark = registry.marks.build(name)
    assert registry.marks.build(registry.spell(mark, full=True)) == mark


@pytest.mark.parametrize("name", DRAWN)
def test_grey_images_take_marks_and_five_channels_do_not(name):
    grey, many = photographs(channels=1), photographs(channels=5)
    mark = registry.marks.build(name)
    if name == "cast":
        with pytest.raises(ConsilienceError, match="1 channel"):
            mark.paint(grey, 0)
    else:
        assert not torch.equal(mark.paint(grey, 0).marked, grey)
    if name in ("noise", "blur", "vignette"):  # they have no colour
        assert not torch.equal(mark.paint(many, 0).marked, many)
    else:
        with pytest.raises(ConsilienceError, match="5"):
            mark.paint(many, 0)


def test_grey_is_the_luma_of_the_colour():
    black = torch.zeros(1, 1, 32, 32)
    painted = registry.marks.build("border:colour=#ff8000").paint(black, 0)
    wanted = 0.299 + 0.587 * 128 / 255
    assert float(painted.marked[0, 0, 0, 0]) == pytest.approx(wanted, abs=1e-5)


def test_a_picture_of_ones_own(tmp_path):
    file = logo_file(tmp_path)
    mark = registry.marks.build(f"png:{file},size=0.5,place=bottom-right")
    painted = mark.paint(torch.zeros(1, 3, 64, 64), 0)
    rows, columns = np.nonzero(painted.where > 0.01)
    assert columns.max() - columns.min() + 1 == 32  # half of 64, its empty edges cut
    assert rows.max() - rows.min() + 1 == 20  # 16 : 26 of 32
    left = painted.marked[0, :, rows.min() + 10, columns.min() + 5]
    right = painted.marked[0, :, rows.min() + 10, columns.max() - 5]
    assert left.tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert right.tolist() == pytest.approx([0, 0, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("png:no-such.png", "no such file"),
        ("text:捷径", "font"),
        ("text:a,font=no-such.ttf", "cannot be read"),
        ("stamp:colour=nocolour", "no colour"),
        ('text:" "', "empty"),
    ],
)
def test_what_cannot_be_painted_is_said(spec, words):
    with pytest.raises(ConsilienceError, match=words):
        registry.marks.build(spec).paint(photographs(), 0)


@pytest.mark.parametrize(
    "spec", ["stamp:size=0", "stamp:opacity=2", "jpeg:quality=0"]
)
def test_options_out_of_bounds_are_refused(spec):
    with pytest.raises(ConsilienceError):
        registry.marks.build(spec)


def test_every_script_is_in_the_font():
    from consilience.marks.text import WORDS

    for script, words in WORDS.items():
        own = registry.marks.build(f"text:{script}").paint(photographs(), 0)
        said = replace(registry.marks.build("text"), words=words).paint(
            photographs(), 0
        )
        assert torch.equal(own.marked, said.marked)


@pytest.mark.skipif(not HAS_WATERMARK, reason="imagenet-w is not installed")
def test_the_watermark_is_the_packages():
    from imagenet_w import AddWatermark

    image = torch.zeros(3, 224, 224)
    theirs = (AddWatermark(224)(image) > 0).any(0).numpy()
    ours = registry.marks.build("imagenet-w").paint(image[None], 0).where > 0
    corners = [np.argwhere(one).min(0) for one in (theirs, ours)]
    apart = corners[0] - corners[1]
    moved = np.roll(ours, tuple(apart), axis=(0, 1))
    both = (moved & theirs).sum() / (moved | theirs).sum()
    assert both > 0.97  # the last letter ends at the frame in theirs
