"""Image files that are more than 8-bit pictures: TIFF of many bands or bits, DICOM, and
arrays. Each is read as it is, with the values that its file says are black and white.

Files are untrusted: what one claims to hold is checked before its pixels are decoded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consilience.types import Array, ConsilienceError

ARRAY_MAGIC = b"\x93NUMPY"
DICOM_MAGIC = b"DICM"
DICOM_PREAMBLE = 128
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_QUIET = logging.NullHandler()
HEIF_BRANDS = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")


@dataclass(frozen=True)
class RawImage:
    """An image as its file has it: (H, W, C) uint8, uint16 or float32, the values that
    are 0 and 1 where its file says so, and notes.
    """

    pixels: Array
    value_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


Reader = Callable[[Path, int, int], RawImage]
"""File, channels that are wanted, and how many pixels an image may have."""


def reader_of(file: Path) -> Reader | None:
    """What reads a file that Pillow does not read to the full, by its first bytes; None
    for all others.
    """
    start = first_bytes(file)
    if start.startswith(ARRAY_MAGIC):
        return read_array_file
    if start[DICOM_PREAMBLE:].startswith(DICOM_MAGIC):
        return read_dicom
    return read_tiff if start.startswith(TIFF_MAGIC) else None


def first_bytes(file: Path) -> bytes:
    """Enough of a file to tell its format by; nothing where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(DICOM_PREAMBLE + len(DICOM_MAGIC))
    except OSError:
        return b""


def _check_size(file: Path, height: int, width: int, most: int) -> None:
    if height * width > most:
        raise ConsilienceError(
            f"{file}: claims {width} x {height} pixels; the limit is {most:,}"
        )


# ---- arrays


def read_array_file(file: Path, channels: int, most: int) -> RawImage:
    """A ``.npy`` file (H, W) or (H, W, C), never one with objects in it."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConsilienceError(
            f"{file}: not an array that is read here ({error})"
        ) from None
    if array.ndim not in (2, 3):
        raise ConsilienceError(
            f"{file}: an image is (H, W) or (H, W, C); the array is {array.shape}"
        )
    _check_size(file, array.shape[0], array.shape[1], most)
    return RawImage(_whole_values(np.array(array), file))


def _whole_values(array: Array, what: Any) -> Array:
    """Values as a sample may have them, without loss."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    for kind in (np.uint8, np.uint16):
        if array.dtype == kind:
            return array.astype(kind)
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.float32)
    raise ConsilienceError(f"{what}: pixels are numbers; got {array.dtype}")


# ---- TIFF


def read_tiff(file: Path, channels: int, most: int) -> RawImage:
    """A TIFF file of any number of bands, 8 or 16 bits or floats.

    Bands may lie beside each other or one after the other; pages count as bands where
    there are as many as ``channels``, else the first is taken. Stacks in depth or time
    raise `ConsilienceError`.
    """
    import tifffile

    # What it has to say of damaged bytes is in the error below; without this, where no
    # log is kept, each remark goes to stderr.
    logging.getLogger("tifffile").addHandler(_QUIET)
    try:
        with tifffile.TiffFile(file) as opened:
            series = opened.series[0]
            return _tiff_series(file, series, opened, channels, most)
    except ConsilienceError:
        raise
    except Exception as error:  # tifffile raises of many kinds on damaged bytes
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConsilienceError(f"{file}: damaged or truncated ({why})") from None


def _tiff_series(
    file: Path, series: Any, opened: Any, channels: int, most: int
) -> RawImage:
    axes, shape = str(series.axes), tuple(series.shape)
    sides = dict(zip(axes, shape, strict=True))
    height, width = sides.get("Y", 1), sides.get("X", 1)
    _check_size(file, height, width, most)
    deep = [(axis, size) for axis, size in sides.items() if axis in "ZT" and size > 1]
    if deep:
        kind = "slices" if deep[0][0] == "Z" else "frames"
        raise ConsilienceError(
            f"{file}: a volume of {deep[0][1]} {kind}, not an image; give one of them as a file"
        )
    bands = [axis for axis in axes if axis in "SC"]
    others = [axis for axis in axes if axis not in "SCYX" and sides[axis] > 1]
    pages = math.prod(sides[axis] for axis in others)
    if pages * height * width * math.prod(sides[axis] for axis in bands) > most * 16:
        raise ConsilienceError(
            f"{file}: {pages} pages of {shape}: too large to be read"
        )
    as_bands = bool(others) and not bands and pages == channels
    notes: tuple[str, ...] = ()
    if others and not as_bands:
        notes = (f"first of {pages} frames",)
        array, axes = np.asarray(opened.pages[0].asarray()), opened.pages[0].axes
    else:
        array = np.asarray(series.asarray())
        notes = (f"{pages} pages read as channels",) if as_bands else ()
    ordered = _channels_last(array, axes)
    return RawImage(_whole_values(ordered, file), None, notes)


def _channels_last(array: Array, axes: str) -> Array:
    """(H, W, C) of an array with named axes; all but Y and X are channels."""
    places = [axes.index("Y"), axes.index("X")]
    rest = [place for place in range(array.ndim) if place not in places]
    turned = array.transpose(*places, *rest)
    return turned.reshape(*turned.shape[:2], -1)


# ---- DICOM


def read_dicom(file: Path, channels: int, most: int) -> RawImage:
    """One DICOM image, its stored values rescaled and seen through its window (PS3.3
    C.11.1 and C.11.2): grey float32 in [0, 1], or RGB.

    Without a window, all its values. Several frames raise `ConsilienceError`.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_rescale
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise ConsilienceError(
            f"{file}: a DICOM file needs pydicom: pip install 'consilience[dicom]'"
        ) from None
    try:
        found = pydicom.dcmread(file)
        frames = int(found.get("NumberOfFrames", 1) or 1)
        if frames > 1:
            raise ConsilienceError(
                f"{file}: a volume of {frames} frames, not an image; give one of them as a "
                f"file"
            )
        _check_size(file, int(found.Rows), int(found.Columns), most)
        stored = pixel_array(found)
        if stored.ndim == 3:
            return RawImage(_whole_values(stored, file))
        values = apply_rescale(stored, found).astype(np.float64)
        share, note = _windowed(values, found)
    except ConsilienceError:
        raise
    except Exception as error:  # pydicom raises of many kinds on what is not there
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConsilienceError(f"{file}: not a DICOM image ({why})") from None
    if (
        found.get("PhotometricInterpretation") == "MONOCHROME1"
    ):  # low values are white
        share = 1 - share
    return RawImage(share.astype(np.float32)[:, :, None], (0.0, 1.0), (note,))


def _windowed(values: Array, found: Any) -> tuple[Array, str]:
    """Shares of the window that a file names, and which it was."""
    centres, widths = found.get("WindowCenter"), found.get("WindowWidth")
    if centres is None or widths is None:
        low, high = float(values.min()), float(values.max())
        note = f"no window: values {low:g} to {high:g} shown as black to white"
        return (values - low) / max(high - low, 1e-12), note
    centre, width = float(_first(centres)), float(_first(widths))
    kind = str(found.get("VOILUTFunction", "LINEAR") or "LINEAR")
    note = f"window {centre:g}, width {width:g}"
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width)), f"{note}, sigmoid"
    if kind == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1), note
    if width <= 1:
        return (values > centre - 0.5).astype(np.float64), note
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1), note


def _first(value: Any) -> Any:
    """The first of several windows."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return value[0] if several else value


# ---- HEIF


def heif_ready(file: Path) -> bool:
    """Whether a file is HEIF and Pillow can read it now; `ConsilienceError` where the
    reader is not installed.
    """
    start = first_bytes(file)[4:12]
    if not start.startswith(HEIF_BRANDS):
        return False
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ConsilienceError(
            f"{file}: a HEIF file needs pillow-heif: pip install 'consilience[heif]'"
        ) from None
    register_heif_opener()
    return True
