"""Whatever people hold an image in, as samples: files, PIL images, arrays, tensors,
batches, lists, data sets and loaders.

Arrays have their channels last and tensors first, unless the other axis alone has as
many as an image can have. Values are 0 to 255, 0 to 65535 or shares of 1: the network
normalises them itself.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from consilience import data, images
from consilience.classnames import classes_named
from consilience.data import Failure
from consilience.types import Array, ConsilienceError, Sample

KINDS = (
    "a path, a folder, a glob, a PIL image, an array, a tensor, a batch, a Sample, a list "
    "of these, a data set or a loader"
)
IMAGE_KEYS = ("image", "img", "pixel_values", "jpg", "png", "webp")
LABEL_KEYS = ("label", "labels", "fine_label", "cls", "target")
USUAL_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Shown:
    """The network that samples are made for: how many channels it takes, and its
    classes.
    """

    channels: int = 3
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> Shown:
        """What a model is shown."""
        return cls(
            int(getattr(model, "channels", 3)), tuple(getattr(model, "classes", ()))
        )


def is_single(given: Any) -> bool:
    """Whether what was given is one image and no collection, of one or of many."""
    if isinstance(given, str | Path):
        return data.is_one_file(given)
    if isinstance(given, Sample | bytes | io.IOBase) or _is_pil(given):
        return True
    if _is_pair(given):
        return is_single(_parted(given)[0])
    if _is_array(given):
        return len(given.shape) < 4 and _as_batch(given) is None
    return False


def one_sample(given: Any, shown: Shown, name: str = "image") -> Sample:
    """One image as a `Sample`; raises `ConsilienceError` for what is none."""
    if isinstance(given, Sample):
        return given
    if _is_pair(given):
        image, label = _parted(given)
        return _labelled(
            one_sample(image, shown, name), label, Labels.of(given, shown)
        )
    if isinstance(given, str | Path):
        refuse_url(given)
        path = Path(given).expanduser()
        sample = data.read_image(path, channels=shown.channels)
        return data.labelled(sample, path, None, shown.classes)
    if isinstance(given, bytes | io.IOBase):
        return images.sample_of_stream(given, name, shown.channels)
    if _is_pil(given):
        return images.sample_of_pil(given, name, shown.channels)
    if _is_array(given):
        return _sample_of_array(given, name, shown.channels)
    raise ConsilienceError(f"an image is {KINDS}; got {_described(given)}")


def refuse_url(given: Any) -> None:
    """Addresses are not fetched."""
    if str(given).startswith(("http:/", "https:/", "ftp:/", "s3:/", "gs:/")):
        raise ConsilienceError(
            f"{given} is an address; images are read from this machine: download it first"
        )


def samples_from(given: Any, shown: Shown) -> Iterator[Sample | Failure]:
    """Every image of a collection, one after the other; one that cannot be read is a
    `Failure`, and the rest goes on.

    Raises `ConsilienceError` where what was given holds no images at all.
    """
    if isinstance(given, str | Path):
        refuse_url(given)
        yield from data.read_samples(
            [given], classes=shown.classes, channels=shown.channels
        )
        return
    if is_single(given):
        yield one_sample(given, shown)
        return
    if _is_array(given):
        yield from _of_batch(given, shown)
        return
    yield from _of_items(given, shown)


@dataclass(frozen=True)
class Again:
    """A collection whose samples are made anew each time that it is gone through, so
    that none of them has to stay in memory.
    """

    given: Any
    shown: Shown

    def __iter__(self) -> Iterator[Sample | Failure]:
        yield from samples_from(self.given, self.shown)

    @classmethod
    def of(cls, given: Any, shown: Shown) -> Again:
        """What was given; a loader's own data set, whose order does not change; what can
        be gone through only once, as a list.
        """
        if hasattr(given, "dataset") and hasattr(given, "batch_size"):
            given = given.dataset
        fixed = hasattr(given, "__getitem__") or is_single(given)
        return cls(given if fixed else list(samples_from(given, shown)), shown)


def _of_items(given: Any, shown: Shown) -> Iterator[Sample | Failure]:
    names, labels = _names_within(given), Labels.of(given, shown)
    count = 0
    for place, (item, name) in enumerate(_items(given)):
        called = name or (
            names[place] if place < len(names) else f"image-{place:04d}"
        )
        for made in _of_item(item, called, count, shown, labels):
            count += 1
            yield made
    if not count:
        raise ConsilienceError(f"no images: {_described(given)} is empty")


def _items(given: Any) -> Iterator[tuple[Any, str]]:
    """Items of a collection, with their names where it has some."""
    if _is_pair(given):
        yield given, ""
        return
    if isinstance(given, Mapping) and not _is_record(given):
        for name, item in given.items():
            yield item, str(name)
        return
    if _is_record(given):
        yield given, ""
        return
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        for place in range(len(given)):
            yield given[place], ""
        return
    if not isinstance(given, Iterable):
        raise ConsilienceError(f"images are {KINDS}; got {_described(given)}")
    for item in given:
        yield item, ""


def _of_item(
    item: Any, name: str, count: int, shown: Shown, labels: Labels
) -> Iterator[Sample | Failure]:
    """Samples of one item: an image, an image with its label, a record, or a batch of
    either.
    """
    image, label = _parted(item)
    batch = _as_batch(image) if _is_array(image) else None
    if batch is None and isinstance(image, list | tuple) and image:
        batch = list(image)
    if batch is not None:
        many = _labels_of_batch(label, len(batch))
        for place, (part, known) in enumerate(zip(batch, many, strict=True)):
            called = f"image-{count + place:04d}"
            yield _one_of(part, called, known, shown, labels)
        return
    yield _one_of(image, name, label, shown, labels)


def labelled_sample(
    item: Any, name: str, shown: Shown, labels: Labels
) -> Sample | Failure:
    """One item of a data set, an image or one with its label, as a sample."""
    image, label = _parted(item)
    return _one_of(image, name, label, shown, labels)


def _one_of(
    image: Any, name: str, label: Any, shown: Shown, labels: Labels
) -> Sample | Failure:
    if isinstance(image, Failure):
        return image
    try:
        sample = one_sample(image, shown, name)
    except ConsilienceError as error:
        return Failure(name, str(error))
    return _labelled(sample, label, labels)


def _labelled(sample: Sample, label: Any, labels: Labels) -> Sample:
    """The sample with a label that its own file does not give."""
    if label is None or sample.label is not None:
        return sample
    known, note = labels.label(label)
    notes = (*sample.notes, note) if note else sample.notes
    return replace(sample, label=known, notes=notes)


# ---- what an item holds


def _is_record(item: Any) -> bool:
    """A mapping with an image under one of its usual names."""
    return isinstance(item, Mapping) and any(key in item for key in IMAGE_KEYS)


def _parted(item: Any) -> tuple[Any, Any]:
    """An item's image and its label."""
    if _is_record(item):
        image = next(item[key] for key in IMAGE_KEYS if key in item)
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
        return image, label
    if _is_pair(item):
        return item[0], item[1]
    if isinstance(item, tuple) and len(item) == 1:
        return item[0], None
    return item, None


def _is_pair(item: Any) -> bool:
    """An image and its label, or a batch of images and theirs, as data sets give them;
    what follows (a file, a weight) is not read.
    """
    if not (isinstance(item, tuple | list) and len(item) >= 2):
        return False
    if isinstance(item[0], str | Path) or _is_label(item[0]):
        return isinstance(item, tuple) and isinstance(item[1], int | np.integer)
    return _is_label(item[1]) and not isinstance(item[1], str | Path)


def _is_label(value: Any) -> bool:
    """A class, by number or name, or one for each image of a batch."""
    if isinstance(value, str | int | np.integer):
        return True
    if isinstance(value, Tensor | np.ndarray):
        whole = not (
            value.dtype.is_floating_point
            if isinstance(value, Tensor)
            else value.dtype.kind == "f"
        )
        return whole and value.ndim <= 1
    return False


def _labels_of_batch(label: Any, count: int) -> list[Any]:
    if label is None:
        return [None] * count
    many = label.tolist() if hasattr(label, "tolist") else label
    many = list(many) if isinstance(many, list | tuple) else [many]
    if len(many) != count:
        raise ConsilienceError(f"{len(many)} labels for a batch of {count} images")
    return many


@dataclass(frozen=True)
class Labels:
    """A data set's labels as numbers of the network's classes: by name where any name is
    shared, by number where none is and both have as many, or the data set has no names.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, given: Any, shown: Shown) -> Labels:
        """The names that a data set gives its labels."""
        holder = getattr(given, "dataset", given)
        named = getattr(holder, "classes", None)
        features = getattr(holder, "features", None)
        if isinstance(features, Mapping):
            kinds = [features[key] for key in LABEL_KEYS if key in features]
            named = next(
                (kind.names for kind in kinds if hasattr(kind, "names")), named
            )
        whole = isinstance(named, Sequence) and all(
            isinstance(one, str) for one in named
        )
        return cls(tuple(named) if whole and named else (), shown.classes)

    def label(self, value: Any) -> tuple[int | None, str]:
        """The network's class that a label means, and a note where none does."""
        if isinstance(value, str):
            return self._by_name(value)
        index = int(value)
        if self.names and (self._share or len(self.names) != len(self.classes)):
            if 0 <= index < len(self.names):
                return self._by_name(self.names[index])
            return None, f"label {index} is none of the data set's {len(self.names)}"
        if 0 <= index < len(self.classes):
            return index, ""
        return (
            None,
            f"label {index} is none of the network's {len(self.classes)} classes",
        )

    @cached_property
    def _share(self) -> bool:
        """Whether any name means one of the network's classes."""
        return any(self._by_name(name)[0] is not None for name in self.names)

    def _by_name(self, name: str) -> tuple[int | None, str]:
        fit = classes_named(name, self.classes)
        if len(fit) == 1:
            return fit[0], ""
        why = "none" if not fit else "several"
        return None, f"label {name!r} is {why} of the network's classes"


def _names_within(given: Any) -> list[str]:
    """Names of a data set's images, by the files that it lists (torchvision's folders)."""
    if isinstance(given, list | tuple) and any(
        isinstance(item, str | Path) for item in given
    ):
        files = [
            Path(item) if isinstance(item, str | Path) else Path(f"image-{place:04d}")
            for place, item in enumerate(given)
        ]
        return data.names_of(files)
    listed = getattr(given, "samples", None) or getattr(given, "imgs", None)
    if not isinstance(listed, list) or not listed:
        return []
    first = listed[0]
    if not (isinstance(first, tuple) and isinstance(first[0], str | Path)):
        return []
    return data.names_of([Path(item[0]) for item in listed])


# ---- arrays and tensors


def _is_pil(given: Any) -> bool:
    from PIL import Image

    return isinstance(given, Image.Image)


def _is_array(given: Any) -> bool:
    if isinstance(given, np.ndarray | Tensor):
        return True
    kind = type(given)
    return (
        hasattr(kind, "__array__") and not _is_pil(given) and hasattr(given, "shape")
    )


def _as_array(given: Any) -> Array:
    if isinstance(given, Tensor):
        values = given.detach().cpu()
        if values.is_floating_point():
            values = values.float()
        return np.asarray(values.numpy())
    return np.asarray(given)


def _as_batch(given: Any) -> list[Any] | None:
    """The images of an array of many; None where it is one."""
    if len(given.shape) == 4:
        return [given[place] for place in range(given.shape[0])]
    return None


def _of_batch(given: Any, shown: Shown) -> Iterator[Sample | Failure]:
    batch = _as_batch(given) or []
    if not batch:
        raise ConsilienceError(
            f"no images: a batch of {tuple(given.shape)} holds none"
        )
    for place, part in enumerate(batch):
        name = f"image-{place:04d}"
        try:
            yield _sample_of_array(part, name, shown.channels)
        except ConsilienceError as error:
            yield Failure(name, str(error))


def _sample_of_array(given: Any, name: str, channels: int) -> Sample:
    array = _as_array(given)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ConsilienceError(
            f"an image is (H, W), (H, W, C) or a tensor (C, H, W), a batch has one axis "
            f"more; {name} is {array.shape}"
        )
    if _channels_first(array.shape, channels, isinstance(given, Tensor)):
        array = array.transpose(1, 2, 0)
    return Sample(name, _values_of(np.ascontiguousarray(array), name))


def _channels_first(shape: tuple[int, ...], channels: int, tensor: bool) -> bool:
    """Whether an image's first axis is its channels."""
    able = {*USUAL_CHANNELS, channels}
    first, last = shape[0] in able, shape[2] in able
    if first != last:
        return first
    if not first:
        raise ConsilienceError(
            f"which axis of {shape} are channels cannot be told: neither has 1, 3 or 4, nor "
            f"the {channels} of the network"
        )
    if (shape[0] == channels) != (shape[2] == channels):
        return shape[0] == channels
    return tensor


def _values_of(array: Array, name: str) -> Array:
    """Values as a sample has them: whole numbers up to 255 in eight bits, floats as
    shares of 1.
    """
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype in (np.uint8, np.uint16):
        return array
    if np.issubdtype(array.dtype, np.integer):
        if array.size and array.min() >= 0 and array.max() <= 255:
            return array.astype(np.uint8)
        raise ConsilienceError(
            f"{name} has whole numbers from {array.min()} to {array.max()}; images are "
            f"uint8, uint16 or floats from 0 to 1"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ConsilienceError(f"{name} has {array.dtype}; images are numbers")
    _check_shares(array, name)
    return _as_eight_bits(array.astype(np.float32))


def _as_eight_bits(shares: Array) -> Array:
    """Shares that are all some n / 255 as the 8-bit image that they were made of, which
    is resized as its file would be.
    """
    whole = shares * np.float32(255)
    rounded = np.rint(whole)
    if np.abs(whole - rounded).max(initial=0) < EIGHT_BIT_ROUNDING:
        return rounded.astype(np.uint8)
    return shares


EIGHT_BIT_ROUNDING = 1e-4
"""A share's float32 rounding, times 255, is a sixth of it."""


def _check_shares(array: Array, name: str) -> None:
    if not array.size:
        return
    least, most = float(array.min()), float(array.max())
    if least >= 0 and most <= 1:
        return
    span = f"{name} has values from {least:.3g} to {most:.3g}"
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ConsilienceError(f"{span}: not an image")
    if least >= 0 and most <= 255:
        raise ConsilienceError(
            f"{span}; floats are shares from 0 to 1: divide by 255, or give uint8"
        )
    raise ConsilienceError(
        f"{span}: normalised already? give the image itself, from 0 to 1 or as uint8 (the "
        f"model normalises it), or a Sample with its value_range"
    )


def _described(given: Any) -> str:
    shape = getattr(given, "shape", None)
    return f"{type(given).__name__}{f' {tuple(shape)}' if shape is not None else ''}"
