"""Pixels where they belong: reading, resizing, geometry, each against PIL, torchvision,
scipy or a literal loop.
"""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torchvision import transforms

from consilience import images
from consilience.images import Placement
from consilience.types import Box, ConsilienceError

# ---- reading


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


def test_rgb_is_read_as_it_is(tmp_path):
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read, notes = images.read_pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(read, pixels)
    assert notes == ()


def test_grey_is_repeated(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(grey).save(tmp_path / "a.png")
    read, _ = images.read_pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(read, np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    grey = np.array(
        [[0, 128, 256, 1000], [32768, 40000, 65407, 65535]], dtype=np.uint16
    )
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    read, notes = images.read_pixels(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read[..., 0], np.rint(grey / 257.0))
    assert notes == ("16-bit grey scaled to 8 bits",)


def test_one_bit_image_is_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        images.read_pixels(tmp_path / "a.png")[0][..., 1], bits * 255
    )


def test_cmyk_is_converted(tmp_path):
    """C = 255 alone is cyan: no red, all green and blue."""
    plane = np.zeros((16, 16, 4), dtype=np.uint8)
    plane[..., 0] = 255
    Image.frombytes("CMYK", (16, 16), plane.tobytes()).save(
        tmp_path / "a.jpg", quality=100
    )
    read, _ = images.read_pixels(tmp_path / "a.jpg")
    assert np.abs(read.astype(int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """The corner that is top left to a person is marked; each orientation stores it
    elsewhere.
    """
    seen = np.zeros((16, 24, 3), dtype=np.uint8)
    seen[:8, :8] = 255
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen),
        7: np.rot90(seen, 2).transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    read, notes = images.read_pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(read, seen)
    assert notes == (
        () if orientation == 1 else ("turned upright by its EXIF orientation",)
    )


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.array(
        [[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8
    )
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    read, notes = images.read_pixels(tmp_path / "a.png")
    expected = [
        [200, 100, 0],
        [255, 255, 255],
        [0.2 * 200 + 0.8 * 255, 0.2 * 100 + 0.8 * 255, 0.8 * 255],
    ]
    np.testing.assert_allclose(read[0], expected, atol=1)
    assert notes == ("transparency composited on white",)


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    read, notes = images.read_pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(read[0], [[10, 20, 30], [255, 255, 255]])
    assert notes == ("transparency composited on white",)


def test_first_frame_of_an_animation_and_said_so(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read, notes = images.read_pixels(tmp_path / "a.gif")
    assert (read == (255, 0, 0)).all()
    assert notes == ("first of 3 frames",)


def test_format_is_found_by_content_not_by_name(tmp_path):
    pixels = noise(4, 4)
    Image.fromarray(pixels).save(tmp_path / "a b ü.txt", format="PNG")
    np.testing.assert_array_equal(
        images.read_pixels(tmp_path / "a b ü.txt")[0], pixels
    )


def bomb(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body))
            + kind
            + body
            + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


REFUSED = {
    "empty.jpg": (lambda: b"", "the file is empty"),
    "text.jpg": (
        lambda: b"this is not an image",
        "not an image in any format read here",
    ),
    "svg.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "bomb.png": (lambda: bomb(60000, 60000), "pixels"),
    "large.png": (
        lambda: bomb(9000, 9000),
        "claims 9000 x 9000 pixels; the limit is 64,000,000",
    ),
    "short.png": (lambda: bomb(100, 100), "damaged or truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_that_names_the_file(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ConsilienceError) as caught:
        images.read_pixels(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_jpeg_is_refused(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(ConsilienceError, match=r"cut\.jpg: damaged or truncated"):
        images.read_pixels(tmp_path / "cut.jpg")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ConsilienceError, match="no agreed range"):
        images.read_pixels(tmp_path / "a.tif")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConsilienceError, match="no such file"):
        images.read_pixels(tmp_path / "a.png")
    with pytest.raises(ConsilienceError, match="a folder, not an image"):
        images.read_pixels(tmp_path)


def test_the_limit_is_checked_before_a_pixel_is_decoded(tmp_path):
    Image.fromarray(noise(10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ConsilienceError, match="the limit is 99"):
        images.read_pixels(tmp_path / "a.png", max_pixels=99)


GOOD = {
    "grey.png": (),
    "cmyk.jpg": (),
    "grey16.png": ("16-bit grey scaled to 8 bits",),
    "alpha.png": ("transparency composited on white",),
    "palette.gif": (),
    "exif-rotated.jpg": ("turned upright by its EXIF orientation",),
    "with space & ünïcode.jpg": (),
    "wrong-extension.txt": (),
    "one-pixel.png": (),
    "sliver.png": (),
    "flat.png": (),
}


@pytest.mark.parametrize("name", GOOD)
def test_hostile_but_readable(shared, name):
    pixels, notes = images.read_pixels(shared / "hostile" / name)
    with Image.open(shared / "hostile" / name) as image:
        width, height = image.size
    expected = (width, height, 3) if name.startswith("exif") else (height, width, 3)
    assert pixels.shape == expected
    assert notes == GOOD[name]


def test_hostile_grey16_is_not_clipped(shared):
    with Image.open(shared / "hostile" / "grey16.png") as image:
        raw = np.asarray(image).astype(float)
    pixels, _ = images.read_pixels(shared / "hostile" / "grey16.png")
    assert raw.max() > 255
    np.testing.assert_allclose(pixels[..., 0], raw / 257, atol=0.51)


def test_hostile_animation_is_its_first_frame(shared):
    pixels, notes = images.read_pixels(shared / "hostile" / "anim.gif")
    with Image.open(shared / "hostile" / "anim.gif") as image:
        assert notes[0] == f"first of {image.n_frames} frames"
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "name", ["truncated.jpg", "empty.jpg", "not-an-image.jpg", "bomb.png"]
)
def test_hostile_and_refused(shared, name):
    with pytest.raises(ConsilienceError, match=name):
        images.read_pixels(shared / "hostile" / name)


# ---- resizing as torchvision does

SHAPES = [
    (300, 400),
    (400, 300),
    (224, 224),
    (257, 999),
    (1001, 333),
    (256, 640),
    (100, 61),
    (1, 1),
    (37, 2),
    (255, 257),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_torchvisions_resize_and_centre_crop(shape, interpolation):
    pixels = noise(*shape)
    mode = transforms.InterpolationMode(interpolation)
    peer = transforms.Compose(
        [transforms.Resize(256, mode), transforms.CenterCrop(224)]
    )
    ours = images.place(pixels, Placement.crop(shape, 256, (224, 224)), interpolation)
    np.testing.assert_array_equal(ours, np.asarray(peer(Image.fromarray(pixels))))


@pytest.mark.parametrize(
    ("short", "size"), [(224, 224), (235, 224), (232, 225), (256, 227), (30, 17)]
)
def test_odd_crops_round_as_torchvision_does(short, size):
    for shape in [(300, 401), (99, 98), (64, 333)]:
        pixels = noise(*shape)
        peer = transforms.Compose(
            [transforms.Resize(short), transforms.CenterCrop(size)]
        )
        ours = images.place(
            pixels, Placement.crop(shape, short, (size, size)), "bilinear"
        )
        np.testing.assert_array_equal(ours, np.asarray(peer(Image.fromarray(pixels))))


@pytest.mark.parametrize("shape", [(10, 13), (11, 10), (9, 30)])
def test_a_crop_larger_than_the_image_is_padded_as_torchvision_pads(shape):
    pixels = noise(*shape)
    peer = transforms.Compose([transforms.Resize(9), transforms.CenterCrop((14, 15))])
    ours = images.place(
        pixels, Placement.crop(shape, 9, (14, 15)), "bilinear", pad=0.0
    )
    np.testing.assert_array_equal(ours, np.asarray(peer(Image.fromarray(pixels))))


def test_squash_is_torchvisions_resize_to_a_pair():
    pixels = noise(123, 77)
    ours = images.place(pixels, Placement.squash((123, 77), (40, 56)), "bilinear")
    np.testing.assert_array_equal(
        ours, np.asarray(transforms.Resize((40, 56))(Image.fromarray(pixels)))
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(60, 3000), (3000, 60), (500, 375), (200, 2500)])
def test_sliver_gives_what_plain_placement_gives(shape, interpolation, monkeypatch):
    """Within one grey level; two where the filter overshoots, as Pillow may take (and
    round) the axes in another order.

    Images are kept from black and white, where overshoot is clipped between the axes.
    """
    smooth = ndimage.gaussian_filter(noise(*shape).astype(float), (3, 3, 0)).astype(
        np.uint8
    )
    placement = Placement.crop(shape, 256, (224, 224))
    for pixels in (smooth, 40 + noise(*shape) // 2):
        monkeypatch.setattr(images, "MAX_PIXELS", 10**9)
        plain = images.place(pixels, placement, interpolation).astype(int)
        monkeypatch.setattr(images, "MAX_PIXELS", 1)
        sliver = images.place(pixels, placement, interpolation).astype(int)
        assert sliver.shape == plain.shape
        assert np.abs(sliver - plain).max() <= (
            1 if interpolation == "bilinear" else 2
        )


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (2, 30000)])
def test_extreme_slivers_are_placed_without_their_resized_whole(shape):
    pixels = np.full((*shape, 3), 90, dtype=np.uint8)
    placement = Placement.crop(shape, 256, (224, 224))
    assert placement.resized[0] * placement.resized[1] > images.MAX_PIXELS
    assert (images.place(pixels, placement, "bilinear") == 90).all()


def test_an_extreme_sliver_narrower_than_the_crop_is_padded():
    pixels = np.full((1, 500_000, 3), 90, dtype=np.uint8)
    placement = Placement.crop((1, 500_000), 200, (224, 224))
    placed = images.place(pixels, placement, "bilinear", pad=1.0)
    assert placed.shape == (224, 224, 3)
    assert (placed[12:212] == 90).all()
    assert (placed[:12] == 255).all()
    assert (placed[212:] == 255).all()


# ---- geometry

PLACEMENTS = {
    "crop": Placement.crop((300, 400), 256, (224, 224)),
    "crop, tall": Placement.crop((401, 250), 256, (224, 224)),
    "crop, small": Placement.crop((20, 31), 256, (224, 224)),
    "squash": Placement.squash((300, 400), (224, 224)),
    "squash, odd": Placement.squash((33, 71), (17, 23)),
    "padded": Placement.crop((50, 60), 40, (56, 48)),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_impulse_lands_where_the_geometry_says(name):
    """A large bright square: the centre of its light in the input is that of the moved
    box.
    """
    placement = PLACEMENTS[name]
    height, width = placement.image
    y0, x0, side = (
        round(height * 0.45),
        round(width * 0.42),
        max(2, min(placement.image) // 6),
    )
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y0 : y0 + side, x0 : x0 + side] = 255
    light = images.place(pixels, placement, "bilinear", pad=0.0)[..., 0].astype(float)
    box = placement.to_input(Box(3, x0, y0, x0 + side, y0 + side))
    rows, columns = (np.arange(length) + 0.5 for length in placement.size)
    assert light.sum(axis=1) @ rows / light.sum() == pytest.approx(
        (box.y0 + box.y1) / 2, abs=0.05
    )
    assert light.sum(axis=0) @ columns / light.sum() == pytest.approx(
        (box.x0 + box.x1) / 2, abs=0.05
    )
    assert light.sum() / 255 == pytest.approx(
        (box.x1 - box.x0) * (box.y1 - box.y0), rel=0.01
    )
    assert box.index == 3


def literal_to_input(thing, placement):
    """Slow twin of `to_input` for label maps: which label lies under the centre of each
    input pixel?
    """
    moved = np.zeros(placement.size, dtype=thing.dtype)
    for y in range(placement.size[0]):
        for x in range(placement.size[1]):
            v = (y + 0.5 + placement.offset[0]) / placement.resized[0]
            u = (x + 0.5 + placement.offset[1]) / placement.resized[1]
            if 0 <= v < 1 and 0 <= u < 1:
                moved[y, x] = thing[int(v * thing.shape[0]), int(u * thing.shape[1])]
    return moved


def literal_to_image(values, placement):
    """Slow twin of `to_image`: bilinear between the centres of cells, held at the
    edges.
    """
    height, width = values.shape
    moved = np.full(placement.image, np.nan)
    for y in range(placement.image[0]):
        for x in range(placement.image[1]):
            v = (y + 0.5) * placement.resized[0] / placement.image[
                0
            ] - placement.offset[0]
            u = (x + 0.5) * placement.resized[1] / placement.image[
                1
            ] - placement.offset[1]
            if not (0 <= v <= placement.size[0] and 0 <= u <= placement.size[1]):
                continue
            i = min(max(v / placement.size[0] * height - 0.5, 0), height - 1)
            j = min(max(u / placement.size[1] * width - 0.5, 0), width - 1)
            a, b = min(int(i), max(height - 2, 0)), min(int(j), max(width - 2, 0))
            c, d = min(a + 1, height - 1), min(b + 1, width - 1)
            s, t = i - a, j - b
            top = values[a, b] * (1 - t) + values[a, d] * t
            moved[y, x] = (
                top * (1 - s) + (values[c, b] * (1 - t) + values[c, d] * t) * s
            )
    return moved


SMALL = {
    "crop": Placement.crop((30, 43), 26, (22, 22)),
    "tall": Placement.crop((43, 21), 26, (22, 20)),
    "squash": Placement.squash((33, 21), (17, 23)),
    "padded": Placement.crop((9, 12), 10, (14, 15)),
    "one pixel": Placement.crop((1, 1), 10, (8, 8)),
    "sliver": Placement.crop((2, 90), 10, (8, 8)),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_labels_move_to_the_input_by_their_nearest(name, scale):
    placement = SMALL[name]
    shape = tuple(max(1, int(side * scale)) for side in placement.image)
    labels = np.random.default_rng(1).integers(1, 9, shape)
    np.testing.assert_array_equal(
        placement.to_input(labels), literal_to_input(labels, placement)
    )


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (2, 5), None])
def test_maps_move_to_the_image_bilinearly(name, grid):
    placement = SMALL[name]
    values = np.random.default_rng(2).normal(size=grid or placement.size)
    np.testing.assert_allclose(
        placement.to_image(values), literal_to_image(values, placement), atol=1e-5
    )


def test_masks_stay_masks():
    mask = np.zeros((30, 43), dtype=bool)
    mask[10:20, 20:30] = True
    assert SMALL["crop"].to_input(mask).dtype == bool


def test_half_pixel_centres():
    """Twice as large: input pixel i lies at (i + .5) / 2 of the image, so a ramp keeps
    its slope and its centre.
    """
    placement = Placement.squash((4, 4), (8, 8))
    ramp = np.tile(np.arange(8) + 0.5, (8, 1))
    np.testing.assert_allclose(placement.to_image(ramp)[0], [1, 3, 5, 7])


def test_what_the_crop_leaves_out_is_nan():
    """A 10 x 20 image at its own size, middle ten columns seen."""
    placement = Placement.crop((10, 20), 10, (10, 10))
    moved = placement.to_image(np.ones((10, 10)))
    assert np.isnan(moved[:, :5]).all()
    assert np.isnan(moved[:, 15:]).all()
    assert (moved[:, 5:15] == 1).all()


def test_boxes_move_by_hand():
    """300 x 400 to 256 x 341, cut at (16, 58): scale .8533 and .8525, then clipped to
    the frame.
    """
    placement = PLACEMENTS["crop"]
    assert (placement.resized, placement.offset) == ((256, 341), (16, 58))
    moved = placement.to_input(Box(None, 100, 60, 400, 240))
    assert moved.x0 == pytest.approx(100 * 341 / 400 - 58)
    assert moved.y0 == pytest.approx(60 * 256 / 300 - 16)
    assert (moved.x1, moved.y1) == (224, pytest.approx(240 * 256 / 300 - 16))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    short=st.integers(1, 60),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_any_geometry_keeps_its_promises(height, width, short, size):
    placement = Placement.crop((height, width), short, size)
    placed = images.place(
        np.full((height, width, 3), 7, dtype=np.uint8),
        placement,
        "bilinear",
        pad=7 / 255,
    )
    assert placed.shape == (*size, 3)
    assert (placed == 7).all()
    assert Placement.from_dict(placement.as_dict()) == placement
    back = placement.to_image(np.full(size, 2.5))
    assert back.shape == (height, width)
    assert np.isnan(back).any() or (back == 2.5).all()
    assert (back[~np.isnan(back)] == 2.5).all()


def test_there_and_back_again():
    """A smooth map of the image, moved to the input and back, is itself where the model
    looked.
    """
    placement = PLACEMENTS["crop"]
    y, x = np.mgrid[:300, :400]
    smooth = np.sin(y / 40) + np.cos(x / 50)
    back = placement.to_image(placement.to_input(smooth))
    seen = ~np.isnan(back)
    assert seen.mean() == pytest.approx(224 * 224 / (256 * 341), abs=0.01)
    assert np.abs(back - smooth)[seen].max() < 0.03


# ---- maps and tensors


def test_enlarge_is_the_literal_bilinear():
    values = np.random.default_rng(3).normal(size=(4, 6))
    oracle = literal_to_image(values, Placement.squash((9, 20), (9, 20)))
    ours = images.enlarge(torch.from_numpy(values)[None, None], (9, 20))
    np.testing.assert_allclose(ours[0, 0].numpy(), oracle, atol=1e-12)


def test_enlarge_keeps_leading_axes_and_differs_with_aligned_corners():
    maps = torch.rand(2, 3, 4, 4)
    assert images.enlarge(maps, (8, 8)).shape == (2, 3, 8, 8)
    aligned = images.enlarge(maps, (7, 7), align_corners=True)
    torch.testing.assert_close(aligned[..., ::2, ::2], maps)


def test_tensor_and_array_are_inverse():
    pixels = noise(5, 7)
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (1, 3, 5, 7)
    assert tensor[0, 2, 4, 1] == pytest.approx(pixels[4, 1, 2] / 255)
    np.testing.assert_array_equal(np.rint(images.to_array(tensor) * 255), pixels)


def literal_gaussian(values, sigma):
    """Separable Gaussian cut at four deviations, mirrored at the borders (the edge
    sample repeated).
    """
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(
            values,
            [(radius, radius) if axis == each else (0, 0) for each in (0, 1)],
            mode="symmetric",
        )
        values = sum(
            w * np.take(padded, range(k, k + values.shape[axis]), axis=axis)
            for k, w in enumerate(weights)
        )
    return values


@pytest.mark.parametrize("sigma", [0.7, 2.0, 5.5])
def test_blur_is_the_literal_gaussian(sigma):
    pixels = torch.rand(2, 3, 31, 24, dtype=torch.float64)
    blurred = images.blur(pixels, sigma)
    for n in range(2):
        for c in range(3):
            np.testing.assert_allclose(
                blurred[n, c].numpy(),
                literal_gaussian(pixels[n, c].numpy(), sigma),
                atol=1e-12,
            )


@pytest.mark.parametrize(("bits", "whole"), [(10, 1023), (12, 4095), (14, 16383)])
def test_greys_of_fewer_bits_use_their_own_range(tmp_path, bits, whole):
    """A 12-bit image in a file of 16 bits is not sixteen greys."""
    values = np.linspace(0, whole, 600).round().astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels, notes = images.read_pixels(tmp_path / "a.png")
    right = np.floor(values.astype(float) * 255 / whole + 0.5)
    assert np.abs(pixels[:, :, 0] - right).max() <= 1
    assert len(np.unique(pixels)) == 256
    assert notes == (f"{bits}-bit grey scaled to 8 bits",)
