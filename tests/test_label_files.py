"""Label maps and masks are data: no colour management, no turn of one without the
other.
"""

import random
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from consilience import images
from consilience.dissection.concepts import load_concepts
from consilience.files import file_stem
from consilience.types import ConsilienceError

RNG = np.random.default_rng(0)


def photograph(path, orientation=1, size=(12, 20)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = RNG.integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 3])
def test_labels_turn_as_their_image_does(tmp_path, orientation, scale):
    """Pillow's own turn of a photograph is the oracle."""
    image = photograph(tmp_path / "p.png", orientation)
    labels = RNG.integers(0, 9, (12 * scale, 20 * scale), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    Image.fromarray(labels).save(buffer, "PNG", exif=exif)
    right = np.array(ImageOps.exif_transpose(Image.open(buffer)))
    found = images.read_label_map(tmp_path / "l.png", image)
    np.testing.assert_array_equal(found, right)
    assert found.dtype == np.int64


def test_labels_that_are_upright_already_stay(tmp_path):
    image = photograph(tmp_path / "p.png", 6)
    labels = RNG.integers(0, 9, (20, 12), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    np.testing.assert_array_equal(
        images.read_label_map(tmp_path / "l.png", image), labels
    )


def test_labels_that_lie_across_their_image_are_refused(tmp_path):
    image = photograph(tmp_path / "p.png")
    Image.fromarray(np.zeros((20, 12), np.uint8)).save(tmp_path / "l.png")
    with pytest.raises(
        ConsilienceError, match="is 12 x 20 and lies across its image"
    ):
        images.read_label_map(tmp_path / "l.png", image)
    Image.fromarray(np.zeros((15, 15), np.uint8)).save(tmp_path / "l.png")
    assert images.read_label_map(tmp_path / "l.png", image).shape == (15, 15)


def saved(tmp_path, image, **more):
    image.save(tmp_path / "l.png", **more)
    return images.read_label_map(
        tmp_path / "l.png", photograph(tmp_path / "p.png", size=(2, 3))
    )


def test_values_are_kept_as_they_are(tmp_path):
    numbers = np.array([[0, 1, 200], [255, 3, 0]], np.uint8)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(numbers)), numbers)
    wide = numbers.astype(np.uint16) * 257
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(wide)), wide)
    palette = Image.fromarray(numbers)
    palette = palette.convert("P")
    palette.putdata(numbers.ravel().tolist())
    palette.putpalette([number * 7 % 256 for number in range(768)])
    np.testing.assert_array_equal(saved(tmp_path, palette), numbers)
    np.testing.assert_array_equal(saved(tmp_path, palette, transparency=3), numbers)
    bits = Image.fromarray(numbers > 0)
    np.testing.assert_array_equal(saved(tmp_path, bits), numbers > 0)
    colour = RNG.integers(0, 255, (2, 3, 4), dtype=np.uint8)
    colour[0, 1, 3] = 0
    colour[1, 1, 3] = 9
    expected = colour[:, :, :3].astype(int)
    expected[0, 1] = 0
    found = saved(tmp_path, Image.fromarray(colour))
    shown = colour[:, :, 3] > 0
    np.testing.assert_array_equal(found[shown], expected[shown])
    assert (found[~shown] == 0).all()


def test_a_map_of_classes_in_colour_is_refused(tmp_path):
    folder = tmp_path / "ade"
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\tsky\n2\tsea\n")
    photograph(folder / "images/p.jpg", size=(8, 8))
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[0, 0] = (1, 2, 0)
    Image.fromarray(colour).save(folder / "annotations/p.png")
    with pytest.raises(ConsilienceError, match="has one channel; it is in colour"):
        load_concepts(folder).labels(0)
    Image.fromarray(np.full((8, 8, 3), 2, np.uint8)).save(
        folder / "annotations/p.png"
    )
    assert load_concepts(folder).labels(0).present.tolist() == [1]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP", "GIF", "BMP"])
def test_whatever_a_file_holds_is_one_line(tmp_path, kind):
    """Forty mutations of each format: read, or refused in one line."""
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "text"
    more = {"exif": exif} if kind in ("JPEG", "TIFF", "PNG", "WEBP") else {}
    Image.fromarray(RNG.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(
        buffer, kind, **more
    )
    whole = bytearray(buffer.getvalue())
    file, refused = tmp_path / f"x.{kind.lower()}", []
    for seed in range(40):
        drawn = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(drawn.choice((1, 5, 40))):
            damaged[drawn.randrange(min(len(damaged), 600))] = drawn.randrange(256)
        if drawn.random() < 0.3:
            damaged = damaged[: drawn.randrange(1, len(damaged))]
        file.write_bytes(bytes(damaged))
        for read in (
            images.read_pixels,
            lambda path: images.read_label_map(path, path),
        ):
            try:
                read(file)
            except ConsilienceError as error:
                refused.append(str(error))
    assert not [line for line in refused if "\n" in line or str(file) not in line]


def test_names_of_any_letters_fit_into_a_file_name():
    names = ["𠀀" * 62, "文" * 83, "n" * 251, "𠀀" * 40 + "1/" + "𠀀" * 60, "ab"]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert stems[-1] == "ab"
    for stem in stems:
        assert len(f".{stem}.npz.12345678.part".encode()) <= 255
