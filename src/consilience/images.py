"""Reading, resizing and blurring: the only module that resamples pixels.

Images are untrusted: their claimed size is checked before a pixel is decoded, and only
well-known formats are tried. All geometry uses half-pixel centres: pixel i covers [i, i
+ 1) and is sampled at i + .5.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from consilience import formats
from consilience.formats import RawImage
from consilience.older import say_older
from consilience.types import WHOLE_RANGE, Array, Box, ConsilienceError, Sample

MAX_PIXELS = 64_000_000
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    "PPM",
    "AVIF",
    "HEIF",
    "JPEG2000",
    "QOI",
    "DIB",
)
"""Read by Pillow; those with a decoder for bytes from anywhere and a signature of their
own.
"""

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that Pillow has a reader for here: AVIF and JPEG 2000 are built
    in or not, HEIF comes with pillow-heif.
    """
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


SHARES = (0.0, 1.0)
"""The range of what was seen through a window when it was read."""


# ---- reading


def read_sample(
    path: str | Path,
    name: str | None = None,
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
) -> Sample:
    """An image file as a `Sample` for a network of so many ``channels``, named by its
    stem unless told.

    With three it is 8-bit RGB wherever its format allows; else it is read as it is: grey
    as one channel, 16 bits as such, transparency as a fourth channel where four are
    wanted, every band of a TIFF. ``value_range`` are the values that are 0 and 1; it too
    has the file read as it is. Raises `ConsilienceError` where it cannot be read.
    """
    # a range is of the file's own values, not of the 8 bits that they are shown in
    own = channels == 3 and value_range is not None
    raw = _read_raw(Path(path), 0 if own else channels, MAX_PIXELS)
    if value_range is not None and raw.value_range == SHARES:
        raise ConsilienceError(
            f"{path}: a DICOM image is seen through its window; a value range is not for it"
        )
    return Sample(
        name if name is not None else Path(path).stem,
        raw.pixels,
        notes=raw.notes,
        source=str(path),
        value_range=value_range or raw.value_range,
    )


def sample_of_pil(image: Image.Image, name: str, channels: int = 3) -> Sample:
    """A PIL image as a `Sample`, turned upright; as `read_sample` reads a file."""
    given = str(getattr(image, "filename", "") or "")
    file = Path(given or name)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ConsilienceError(
            f"{file}: claims {width} x {height} pixels; the limit is {MAX_PIXELS:,}"
        )
    try:
        raw = _raw_of_pil(image, file, channels)
    except ConsilienceError:
        raise
    except (
        Exception
    ) as error:  # a file is decoded now; decoders raise anything at all
        raise ConsilienceError(f"{file}: {_damaged(error)}") from None
    called = file.stem if name == "image" and given else name
    return Sample(called, raw.pixels, notes=raw.notes, value_range=raw.value_range)


def sample_of_stream(stream: Any, name: str, channels: int = 3) -> Sample:
    """The bytes of an image file, or an open file, as a `Sample`."""
    content = io.BytesIO(stream) if isinstance(stream, bytes) else stream
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(content, formats=_known_formats())
    except Exception as error:  # decoders raise anything at all on foreign bytes
        raise ConsilienceError(
            f"{name}: the bytes are not an image ({_one_line(error)})"
        ) from None
    return sample_of_pil(image, name, channels)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _damaged(error: Exception) -> str:
    return f"damaged or truncated ({_one_line(error)})"


def _raw_of_pil(image: Image.Image, file: Path, channels: int) -> RawImage:
    if channels == 3:
        pixels, notes = _decode(image, file)
        return RawImage(pixels, None, notes)
    upright, notes = _upright(image)
    return _as_it_is(upright, file, channels, notes)


def _read_raw(file: Path, channels: int, most: int) -> RawImage:
    reader = formats.reader_of(file)
    if reader is None:
        return _read_by_pillow(file, channels, most)
    if reader is not formats.read_tiff:
        return reader(file, channels, most)
    if channels != 3:
        raw = reader(file, channels, most)
        return _by_its_bits(raw) if raw.pixels.shape[2] == 1 else raw
    try:
        return _read_by_pillow(file, channels, most)
    except ConsilienceError as error:
        other = _or_none(reader, file, channels, most)
        if other is None or (
            other.pixels.shape[2] in (1, 3) and other.pixels.dtype == np.uint8
        ):
            raise error from None
        return other


def _or_none(
    reader: formats.Reader, file: Path, channels: int, most: int
) -> RawImage | None:
    try:
        return reader(file, channels, most)
    except ConsilienceError as error:
        if "a volume" in str(error):
            raise
        return None


def _read_by_pillow(file: Path, channels: int, most: int) -> RawImage:
    with opened_image(file, most) as image:
        return _raw_of_pil(image, file, channels)


def _as_it_is(
    image: Image.Image, file: Path, channels: int, notes: tuple[str, ...]
) -> RawImage:
    clear = "transparency" not in image.info
    if image.mode in ("1", "L") and clear:
        return RawImage(np.array(image.convert("L"))[:, :, None], None, notes)
    if image.mode == "F":
        return RawImage(np.array(image)[:, :, None], None, notes)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            return RawImage(values.astype(np.float32)[:, :, None], None, notes)
        grey = RawImage(values.astype(np.uint16)[:, :, None], None, notes)
        return _by_its_bits(grey)
    if image.mode == "RGBA" and channels == 4:
        return RawImage(np.array(image), None, notes)
    pixels, more = _to_rgb(image, file)
    return RawImage(pixels, None, notes + tuple(more))


def _by_its_bits(raw: RawImage) -> RawImage:
    """Grey of 16 bits with the range of the bits that it fills."""
    if raw.pixels.dtype != np.uint16:
        return raw
    bits = _bits_filled(int(raw.pixels.max()))
    whole = float((1 << bits) - 1)
    return RawImage(raw.pixels, (0.0, whole), (*raw.notes, f"{bits}-bit grey"))


def read_pixels(
    path: str | Path, max_pixels: int = MAX_PIXELS
) -> tuple[Array, tuple[str, ...]]:
    """Read an image as (H, W, 3) uint8 RGB, upright, with notes on what had to be
    decided.

    The format is found from the content, not from the name. Greys of more
    than 8 bits are scaled by the bits that they fill, transparency is composited on white, and of several frames the first is
    taken. Raises `ConsilienceError` with one line on anything else.
    """
    with opened_image(path, max_pixels) as image:
        return _decode(image, Path(path))


def read_label_map(
    path: str | Path, image: str | Path, max_pixels: int = MAX_PIXELS
) -> Array:
    """A label map or mask as data, (H, W) or (H, W, 3) int64: palettes by index, 16
    bits kept, 0 where it is transparent, and turned as its ``image`` is.

    Raises `ConsilienceError` where it cannot be read, or lies across its image.
    """
    with opened_image(path, max_pixels) as label:
        values = _label_values(label, Path(path))
    return turned_like(values, path, image)


def turned_like(values: Array, what: str | Path, image: str | Path) -> Array:
    """Labels (H, W, ...) turned as reading turns their image upright.

    They are taken as the image is stored, but where their shape says that they are
    upright already. `ConsilienceError` where they have the shape of neither.
    """
    stored, orientation = _stored(str(image))
    height, width = values.shape[:2]
    tall, lies = height / width, stored[0] / stored[1]
    if orientation in ACROSS and _nearer(tall, 1 / lies, lies):  # upright already
        return values
    if orientation == 1 and _nearer(tall, 1 / lies, lies) and _near(tall, 1 / lies):
        raise ConsilienceError(
            f"{what} is {width} x {height} and lies across its image of {stored[1]} x "
            f"{stored[0]}"
        )
    turn = _TURNS.get(orientation)
    return values if turn is None else np.ascontiguousarray(turn(values))


ACROSS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_TURNS: dict[int, Callable[[Array], Array]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
"""What makes an array upright that is stored in an EXIF orientation."""


def _near(a: float, b: float) -> bool:
    return abs(math.log(a / b)) < 0.05


def _nearer(a: float, one: float, other: float) -> bool:
    return abs(math.log(a / one)) < abs(math.log(a / other)) - 0.05


def _stored(image: str) -> tuple[tuple[int, int], int]:
    """Height and width of an image as it is stored, and its EXIF orientation."""
    with opened_image(image) as known:
        return (known.size[1], known.size[0]), int(known.getexif().get(0x0112, 1))


def _label_values(label: Image.Image, file: Path) -> Array:
    mode = label.mode
    if mode in ("1", "L", "P") or mode.startswith("I"):
        return np.array(label).astype(np.int64)
    if mode == "F":
        raise ConsilienceError(f"{file}: labels are whole numbers; it holds floats")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        whole = np.array(label.convert("RGBA")).astype(np.int64)
        return whole[:, :, :3] * (whole[:, :, 3:] > 0)
    return np.array(label.convert("RGB")).astype(np.int64)


@contextmanager
def opened_image(
    path: str | Path, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """An image file within the limits, or `ConsilienceError` in one line, whatever the
    file holds.
    """
    file = Path(path)
    if not file.exists():
        raise ConsilienceError(f"{file}: no such file")
    if file.is_dir():
        raise ConsilienceError(f"{file}: a folder, not an image")
    if file.stat().st_size == 0:
        raise ConsilienceError(f"{file}: the file is empty")
    heif = formats.heif_ready(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_known_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ConsilienceError(
                        f"{file}: claims {width} x {height} pixels; the limit is "
                        f"{max_pixels:,}"
                    )
                yield image
    except ConsilienceError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join((*FORMATS, "DICOM", "NPY"))
        said = (
            "damaged or truncated"
            if heif
            else f"not an image in any format read here ({kinds})"
        )
        raise ConsilienceError(f"{file}: {said}") from None
    except Image.DecompressionBombError:
        raise ConsilienceError(
            f"{file}: claims more pixels than the limit of {max_pixels:,}"
        ) from None
    except MemoryError:
        raise ConsilienceError(f"{file}: too large for the memory") from None
    except Exception as error:
        # decoders raise anything at all on mutated bytes (TypeError, KeyError, struct.error)
        raise ConsilienceError(f"{file}: {_damaged(error)}") from None


def _decode(image: Image.Image, file: Path) -> tuple[Array, tuple[str, ...]]:
    upright, notes = _upright(image)
    pixels, note = _to_rgb(upright, file)
    return pixels, notes + tuple(note)


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame, turned as its EXIF orientation says."""
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
        notes.append("turned upright by its EXIF orientation")
    return upright, tuple(notes)


def _to_rgb(image: Image.Image, file: Path) -> tuple[Array, list[str]]:
    if image.mode.startswith("I"):
        grey, bits = _scaled_grey(np.asarray(image), file)
        return grey, [f"{bits}-bit grey scaled to 8 bits"]
    if image.mode == "F":
        raise ConsilienceError(
            f"{file}: floating-point pixels have no agreed range; save it with 8 or 16 bits"
        )
    if (
        image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
        or "transparency" in image.info
    ):
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, whole).convert("RGB")), [
            "transparency composited on white"
        ]
    return np.array(image.convert("RGB")), []


def _scaled_grey(values: Array, file: Path) -> tuple[Array, int]:
    """Greys of 8 to 16 bits as (H, W, 3) uint8, and how many bits they fill."""
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ConsilienceError(
            f"{file}: grey values from {wide.min()} to {wide.max()}; at most 16 bits are read"
        )
    bits = _bits_filled(int(wide.max()))
    whole = (1 << bits) - 1
    grey = ((wide * 255 + whole // 2) // whole).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), bits


def _bits_filled(largest: int) -> int:
    """How many bits grey values fill: cameras and scanners keep 10, 12 or 14 in files of
    16, and by these a 12-bit image would be sixteen greys.
    """
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 1 << bits)


# ---- resizing


def resize(
    pixels: Array, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Array:
    """Resize (H, W, C) uint8 or float32 to ``size`` (height, width) with antialiasing,
    as torchvision and timm do on PIL images.
    """
    return _resampled(pixels, size, interpolation)


def _resampled(
    pixels: Array,
    size: tuple[int, int],
    interpolation: Interpolation,
    box: tuple[float, float, float, float] | None = None,
) -> Array:
    """Pillow's resampling of a part of an image, channel by channel where it is not
    RGB; its filters do the same to each channel.
    """
    wanted, method = (size[1], size[0]), _FILTERS[interpolation]
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).resize(wanted, method, box=box))
    channels = [
        np.array(
            Image.fromarray(np.ascontiguousarray(pixels[:, :, place])).resize(
                wanted, method, box=box
            )
        )
        for place in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=2)


def place(
    pixels: Array,
    placement: Placement,
    interpolation: Interpolation,
    pad: float | tuple[float, ...] = 0.5,
) -> Array:
    """The model's input (h, w, C): resized as a whole, then the window cut out; outside
    the image it is ``pad``, in [0, 1]. ``pixels`` are (H, W, C) uint8, or float32 in
    [0, 1], where a filter that overshoots is held to it.
    """
    (top, left), (height, width), resized = (
        placement.offset,
        placement.size,
        placement.resized,
    )
    y0, x0, y1, x1 = (
        max(top, 0),
        max(left, 0),
        min(top + height, resized[0]),
        min(left + width, resized[1]),
    )
    if resized[0] * resized[1] > MAX_PIXELS:
        part = _resize_part(pixels, resized, ((y0, y1), (x0, x1)), interpolation)
    else:
        part = (
            pixels
            if resized == pixels.shape[:2]
            else resize(pixels, resized, interpolation)
        )[y0:y1, x0:x1]
    if part.dtype != np.uint8:
        part = part.clip(0, 1)
    if part.shape[:2] == (height, width):
        return np.ascontiguousarray(part)
    whole = np.rint(255 * np.asarray(pad)) if part.dtype == np.uint8 else pad
    canvas = np.full((height, width, part.shape[2]), whole, dtype=part.dtype)
    canvas[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return canvas


def _resize_part(
    pixels: Array,
    resized: tuple[int, int],
    window: tuple[tuple[int, int], tuple[int, int]],
    interpolation: Interpolation,
) -> Array:
    """A window (rows, columns) of the resized whole, which is never made: for shapes of
    which it would not fit in memory.

    Pillow's filters reach beyond the box into the rest of the image, so that its
    borders are right. It may take the axes in another order than for the whole, which
    shows where a bicubic filter overshoots and is clipped between them.
    """
    (y0, y1), (x0, x1) = window
    down, across = (resized[axis] / pixels.shape[axis] for axis in (0, 1))
    box = (x0 / across, y0 / down, x1 / across, y1 / down)
    return _resampled(pixels, (y1 - y0, x1 - x0), interpolation, box)


def as_channels(sample: Sample, channels: int) -> tuple[Array, tuple[str, ...]]:
    """A sample's pixels (H, W, C) with the channels that a network takes, uint8 or
    float32 in [0, 1], and notes on what was done to them.

    Colour becomes grey by its luminance (ITU-R 601), grey becomes colour by repetition;
    anything else raises `ConsilienceError`.
    """
    pixels = sample.pixels
    if pixels.dtype != np.uint8 or sample.range != WHOLE_RANGE["u1"]:
        pixels = _shares(pixels, *sample.range)
    if sample.channels == channels:
        return pixels, ()
    if (sample.channels, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2), ("grey repeated as red, green and blue",)
    if (sample.channels, channels) != (3, 1):
        raise ConsilienceError(
            f"{sample.name} has {_channels(sample.channels)}, and the network takes "
            f"{_channels(channels)}"
        )
    if not (np.ptp(pixels, axis=2)).any():
        return pixels[:, :, :1], ()
    luminance = ("colour converted to grey (its luminance, ITU-R 601)",)
    if pixels.dtype == np.uint8:
        grey = np.array(Image.fromarray(pixels).convert("L"))
    else:
        grey = (pixels @ np.array(LUMINANCE)).astype(np.float32)
    return grey[:, :, None], luminance


def _shares(pixels: Array, low: float, high: float) -> Array:
    """Values as float32 shares of their range, channel by channel, so that float64 is
    held of one alone.
    """
    shares = np.empty(pixels.shape, dtype=np.float32)
    for place in range(pixels.shape[2]):
        shares[:, :, place] = (pixels[:, :, place].astype(np.float64) - low) / (
            high - low
        )
    return shares


def _channels(count: int) -> str:
    return f"{count} channel" + ("s" if count != 1 else "")


LUMINANCE = (0.299, 0.587, 0.114)
"""Red, green and blue in the luminance of ITU-R 601, as Pillow's mode L has them."""


@dataclass(frozen=True)
class Placement:
    """Where a model's input lies on an image: the whole is resized to ``resized``, then
    ``size`` is cut at ``offset``.

    All pairs are (height, width) or (top, left). A negative offset means padding. It is
    the `Geometry` of every view.
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @staticmethod
    def crop(
        image: tuple[int, int], short_side: int, size: tuple[int, int]
    ) -> Placement:
        """Shorter side to ``short_side``, then the centre of ``size``, rounded as
        torchvision does.
        """
        height, width = image
        if height <= width:
            resized = (short_side, max(1, int(short_side * width / height)))
        else:
            resized = (max(1, int(short_side * height / width)), short_side)
        return Placement.centred(image, resized, size)

    @staticmethod
    def centred(
        image: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]
    ) -> Placement:
        """The centre of ``size`` after resizing to ``resized``; where that is smaller,
        padded as torchvision does.
        """
        extra = [resized[axis] - size[axis] for axis in (0, 1)]
        top, left = (
            round(more / 2.0) if more >= 0 else -(-more // 2) for more in extra
        )
        return Placement(image, resized, (top, left), size)

    @staticmethod
    def squash(image: tuple[int, int], size: tuple[int, int]) -> Placement:
        """The whole image to ``size``, whatever its shape."""
        return Placement(image, size, (0, 0), size)

    @staticmethod
    def from_dict(numbers: dict[str, Any]) -> Placement:
        """Inverse of `as_dict`."""
        pairs = {
            key: (int(value[0]), int(value[1])) for key, value in numbers.items()
        }
        return Placement(**pairs)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, enough to build the same geometry again."""
        return {key: list(value) for key, value in asdict(self).items()}

    @overload
    def to_input(self, thing: Box) -> Box: ...
    @overload
    def to_input(self, thing: Array) -> Array: ...
    def to_input(self, thing: Box | Array) -> Box | Array:
        """Move a box (clipped to the frame) or a mask or label map (nearest, 0 outside)
        into the model's frame.

        A label map may have any resolution: it is taken to cover the image.
        """
        if isinstance(thing, Box):
            y0, y1 = (self._box_edge(edge, 0) for edge in (thing.y0, thing.y1))
            x0, x1 = (self._box_edge(edge, 1) for edge in (thing.x0, thing.x1))
            return Box(thing.index, x0, y0, x1, y1)
        rows, inside_y = self._nearest(0, thing.shape[0])
        columns, inside_x = self._nearest(1, thing.shape[1])
        moved = thing[np.ix_(rows, columns)]
        return np.where(
            np.outer(inside_y, inside_x), moved, np.zeros((), dtype=thing.dtype)
        )

    def to_image(self, values: Array) -> Array:
        """Move a map that covers the input (any resolution) onto the image: bilinear,
        NaN where the model did not look.
        """
        down, seen_y = self._linear(0, values.shape[0])
        across, seen_x = self._linear(1, values.shape[1])
        moved = down @ values.astype(np.float64) @ across.T
        moved[~np.outer(seen_y, seen_x)] = np.nan
        return moved.astype(np.float32)

    def to_frame(self, values: Array, other: Placement) -> Array:
        """Move a map that covers the input (any resolution) into another frame of the
        same image: bilinear, NaN where this model did not look and beside the image.
        """
        moved, seen = [], []
        for axis in (0, 1):
            cells = np.arange(other.size[axis]) + 0.5 + other.offset[axis]
            shares = cells / other.resized[axis]
            rows, saw = self._at(shares, axis, values.shape[axis])
            moved.append(rows)
            seen.append(saw & (shares >= 0) & (shares <= 1))
        placed = moved[0] @ values.astype(np.float64) @ moved[1].T
        placed[~np.outer(*seen)] = np.nan
        return placed.astype(np.float32)

    def to_picture(self, values: Array) -> Array:
        """The older name of `to_image`."""
        say_older("to_picture", "to_image")
        return self.to_image(values)

    def _box_edge(self, edge: float, axis: int) -> float:
        moved = edge * self.resized[axis] / self.image[axis] - self.offset[axis]
        return float(min(max(moved, 0.0), self.size[axis]))

    def _nearest(self, axis: int, length: int) -> tuple[Array, Array]:
        centres = np.arange(self.size[axis]) + 0.5 + self.offset[axis]
        share = centres / self.resized[axis]
        return np.clip(np.floor(share * length).astype(int), 0, length - 1), (
            share >= 0
        ) & (share < 1)

    def _linear(self, axis: int, length: int) -> tuple[Array, Array]:
        """Interpolation matrix (image pixels, map cells) of one axis, and which image
        pixels the model saw.
        """
        shares = (np.arange(self.image[axis]) + 0.5) / self.image[axis]
        return self._at(shares, axis, length)

    def _at(self, shares: Array, axis: int, length: int) -> tuple[Array, Array]:
        """Interpolation matrix (shares, map cells) of places along the image, given as
        shares of its length, and which of them the model saw.
        """
        centres = shares * self.resized[axis] - self.offset[axis]
        seen = (centres >= 0) & (centres <= self.size[axis])
        return _hat(centres / self.size[axis] * length - 0.5, length), seen


def _hat(at: Array, length: int) -> Array:
    """Rows of linear-interpolation weights for positions in units of cells, held at the
    edges.
    """
    at = np.clip(at, 0, length - 1)
    low = np.minimum(np.floor(at).astype(int), max(length - 2, 0))
    share = at - low
    weights = np.zeros((len(at), length))
    rows = np.arange(len(at))
    weights[rows, low] += 1 - share
    weights[rows, np.minimum(low + 1, length - 1)] += share
    return weights


# ---- maps and tensors


def enlarge(
    maps: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """Bilinear resampling of maps (..., h, w) to (..., height, width); half-pixel
    centres unless ``align_corners``.
    """
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return functional.interpolate(
        flat, size, mode="bilinear", align_corners=align_corners
    ).reshape(*maps.shape[:-2], *size)


def to_tensor(pixels: Array) -> Tensor:
    """(H, W, C) uint8, or floats in [0, 1], to (1, C, H, W) float32 in [0, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    scaled = values.unsqueeze(0).float()
    return scaled.div_(255) if pixels.dtype == np.uint8 else scaled


def to_array(pixels: Tensor) -> Array:
    """(1, C, H, W) in [0, 1] to (H, W, C) float64."""
    return pixels[0].detach().cpu().double().permute(1, 2, 0).numpy()


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, h, w), standard deviation in pixels, mirrored at the
    borders.
    """
    array = ndimage.gaussian_filter(
        pixels.detach().cpu().numpy(), sigma=(0, 0, sigma, sigma), mode="reflect"
    )
    return torch.from_numpy(array).to(pixels)


def mirrored_kernel(side: int, sigma: float) -> Array:
    """A Gaussian (side,) held within ``side`` cells, what would lie outside mirrored
    into them; it sums to 1.
    """
    one = np.zeros(side)
    one[side // 2] = 1.0
    kernel: Array = ndimage.gaussian_filter1d(one, sigma, mode="reflect")
    kernel /= kernel.sum()
    return kernel


def convolved(pixels: Tensor, kernel: Tensor) -> Tensor:
    """(N, C, h, w) convolved down and across with an odd symmetric kernel (k,), zeros
    outside the image.
    """
    half = len(kernel) // 2
    flat = pixels.reshape(-1, 1, *pixels.shape[-2:])
    down = functional.conv2d(flat, kernel.reshape(1, 1, -1, 1), padding=(half, 0))
    return functional.conv2d(
        down, kernel.reshape(1, 1, 1, -1), padding=(0, half)
    ).reshape(pixels.shape)
