"""Concept sets: images with per-pixel labels, read one image at a time.

A concept is a label within a category: what is labelled both as an object and as a part
is two concepts. Label maps live on a common ``grid`` that covers the image; they move
into a model's frame through its `Geometry`, nearest neighbour throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from consilience.images import Placement, read_label_map
from consilience.older import say_older
from consilience.registry import Registry, spell
from consilience.types import Array, ConsilienceError, Geometry, Sample

LABEL_GRID = (112, 112)
"""The label grid where a set has none of its own."""

NAMELESS = ("", "-")

concept_sets = Registry(
    "concept set",
    "consilience.dissection.sets.broden",
    "consilience.dissection.sets.folders",
    "consilience.dissection.sets.indexed",
    "consilience.dissection.sets.coco",
    "consilience.dissection.sets.drawn",
)


# ---- what is labelled


@dataclass(frozen=True)
class Concept:
    """A label within a category: ``index`` is its place among the set's concepts,
    ``number`` what label maps hold for it.
    """

    index: int
    name: str
    category: str
    number: int


@dataclass(frozen=True, eq=False)
class Plane:
    """One label map of an image: numbers (H, W) of a category, 0 where unlabelled; or
    one number for the whole image.
    """

    category: int
    numbers: Array | int


@dataclass(frozen=True, eq=False)
class Labels:
    """What an image shows, on the label grid.

    ``masks`` (L, h, w) bool belong to the concepts ``present`` (L,); ``whole`` are
    concepts of the image as a whole. ``annotated`` (K,) says of which categories
    anything at all is labelled.
    """

    masks: Array
    present: Array
    whole: tuple[int, ...]
    annotated: Array


class Source(Protocol):
    """Where images and their label maps come from."""

    def image(self, index: int) -> Array:
        """Pixels (H, W, 3) uint8 RGB."""

    def planes(self, index: int) -> Sequence[Plane]:
        """The label maps of an image, each of any size that covers it."""


class ImageSource:
    """A source that answers to the older name of `image` too."""

    def image(self, index: int) -> Array:
        """Pixels (H, W, 3) uint8 RGB."""
        raise NotImplementedError

    def files(self, index: int) -> Sequence[Path]:
        """What image ``index`` and its labels are read from; none where they are made."""
        return ()

    def picture(self, index: int) -> Array:
        """The older name of `image`."""
        say_older("picture", "image")
        return self.image(index)


class ConceptSpec(Protocol):
    """A registered concept set: a frozen dataclass that can be opened."""

    def open(self) -> ConceptSet:
        """Read its index and check it."""


# ---- the set


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """Images with concepts.

    Images and label maps are read when asked for, and not kept.

    ``spec`` opens the set again with `load_concepts`; ``digest`` is of its index: names
    of images, label maps and concepts. ``notes`` say what of it is not used,
    ``largest`` is the largest number of a label map where that is not a concept's,
    ``skipped`` why images of the whole set were left out, by their index in it.
    """

    spec: str
    digest: str
    concepts: tuple[Concept, ...]
    categories: tuple[str, ...]
    names: tuple[str, ...]
    source: Source = field(repr=False)
    grid: tuple[int, int] = LABEL_GRID
    notes: tuple[str, ...] = ()
    largest: int = 0
    skipped: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names:
            raise ConsilienceError(f"concept set {self.spec} has no images")
        if not self.concepts:
            raise ConsilienceError(
                f"concept set {self.spec} has no concepts with a name"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def id(self) -> str:
        """Kind and digest."""
        return f"{self.spec.partition(':')[0]}@{self.digest}"

    def content(self) -> str:
        """Digest of the set with all its images and labels, which are read for it."""
        state = blake2b(self.id.encode(), digest_size=16)
        files = getattr(self.source, "files", lambda _: ())
        for index in range(len(self)):
            for file in files(index):
                state.update(_bytes_of(file))
        return state.hexdigest()

    def sample(self, index: int) -> Sample:
        """Image ``index`` as a sample named as in the set."""
        return Sample(self.names[index], self.source.image(index))

    @property
    def samples(self) -> Samples:
        """All images as a sequence that reads each when asked for it."""
        return Samples(self)

    def only(self, names: Sequence[str]) -> ConceptSet:
        """The images of these names, in their order; itself where that is all."""
        if tuple(names) == self.names:
            return self
        places = {name: index for index, name in enumerate(self.names)}
        return self.subset(places[name] for name in names)

    def subset(self, indices: Iterable[int]) -> ConceptSet:
        """The same concepts over some of the images; it has no spec of its own that
        opens it again.
        """
        kept = tuple(int(index) for index in indices)
        names = tuple(self.names[index] for index in kept)
        return replace(
            self,
            names=names,
            digest=concept_digest(self.digest, kept),
            source=_Some(self.source, kept),
        )

    def labels(self, index: int, geometry: Geometry | None = None) -> Labels:
        """What image ``index`` shows, on the grid; with a ``geometry``, the grid covers
        the model's frame.

        Raises `ConsilienceError` for numbers that are not a label of the set.
        """
        masks: dict[int, Array] = {}
        whole: set[int] = set()
        for plane in self.source.planes(index):
            if isinstance(plane.numbers, int):
                whole |= set(
                    self._known(
                        index, plane.category, np.array([plane.numbers])
                    ).values()
                )
            else:
                self._add(
                    masks,
                    index,
                    plane.category,
                    self._placed(plane.numbers, geometry),
                )
        present = sorted(set(masks) - whole)
        stack = (
            np.stack([masks[one] for one in present])
            if present
            else np.zeros((0, *self.grid), dtype=bool)
        )
        return Labels(
            stack,
            np.array(present, dtype=np.int64),
            tuple(sorted(whole)),
            self._annotated({*present, *whole}),
        )

    def _placed(self, numbers: Array, geometry: Geometry | None) -> Array:
        if geometry is not None:
            numbers = geometry.to_input(numbers)
        if numbers.shape == self.grid:
            return numbers
        return Placement.squash(
            (numbers.shape[0], numbers.shape[1]), self.grid
        ).to_input(numbers)

    def _add(
        self, masks: dict[int, Array], index: int, category: int, numbers: Array
    ) -> None:
        for number, concept in self._known(index, category, numbers).items():
            mask = numbers == number
            masks[concept] = masks[concept] | mask if concept in masks else mask

    def _known(self, index: int, category: int, numbers: Array) -> dict[int, int]:
        """Concept by number, of those that occur."""
        column = self._columns[category]
        if numbers.min() < 0 or numbers.max() >= len(column):
            wrong = numbers.min() if numbers.min() < 0 else numbers.max()
            raise ConsilienceError(
                f"{self.names[index]}: its {self.categories[category]} labels hold number "
                f"{wrong}; "
                f"the set's labels go from 1 to {len(column) - 1}"
            )
        there = np.flatnonzero(np.bincount(numbers.ravel()))
        return {
            int(number): int(column[number])
            for number in there
            if column[number] >= 0
        }

    @cached_property
    def _columns(self) -> tuple[Array, ...]:
        """By category: the concept of every number, -1 where it has none."""
        largest = max(concept.number for concept in self.concepts)
        columns = np.full(
            (len(self.categories), max(largest, self.largest) + 1), -1, dtype=np.int64
        )
        for concept in self.concepts:
            columns[self.categories.index(concept.category), concept.number] = (
                concept.index
            )
        return tuple(columns)

    @cached_property
    def category_of(self) -> Array:
        """Category index (C,) of every concept."""
        return np.array(
            [self.categories.index(concept.category) for concept in self.concepts],
            dtype=np.int64,
        )

    def _annotated(self, shown: set[int]) -> Array:
        annotated = np.zeros(len(self.categories), dtype=bool)
        annotated[self.category_of[sorted(shown)]] = True
        return annotated


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """The images of a set, read one at a time."""

    concepts: ConceptSet

    def __len__(self) -> int:
        return len(self.concepts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [
                self.concepts.sample(one) for one in range(*index.indices(len(self)))
            ]
        return self.concepts.sample(range(len(self))[index])


@dataclass(frozen=True, eq=False)
class _Some(ImageSource):
    whole: Source
    kept: tuple[int, ...]

    def image(self, index: int) -> Array:
        return self.whole.image(self.kept[index])

    def planes(self, index: int) -> Sequence[Plane]:
        return self.whole.planes(self.kept[index])

    def files(self, index: int) -> Sequence[Path]:
        files = getattr(self.whole, "files", lambda _: ())
        found: Sequence[Path] = files(self.kept[index])
        return found


def _bytes_of(file: Path) -> bytes:
    """A file's bytes; one that cannot be read is part of the content too."""
    try:
        return blake2b(file.read_bytes(), digest_size=16).digest()
    except OSError:
        return b"unreadable"


# ---- opening


def load_concepts(source: str | Path | ConceptSet | ConceptSpec) -> ConceptSet:
    """A concept set from a folder, a COCO file, or its spelling; raises
    `ConsilienceError` with what is wrong with it.

    A folder with ``index.csv`` has the Broden layout; one with ``objectInfo150.txt`` or
    ``*_seg.png`` files is ADE20K; one with ``images`` and ``masks`` has a mask an image
    and concept; one with ``labels`` or ``SegmentationClass`` a mask of class numbers an
    image; a ``.json`` file is COCO's. Spelled out: ``broden:DIR``, ``ade20k:DIR``,
    ``folder:DIR``, ``indexed:DIR``, ``coco:FILE,images=DIR``,
    ``drawn:images=240,seed=0``.
    """
    if isinstance(source, ConceptSet):
        return source
    spec: ConceptSpec = (
        _of_path(Path(source))
        if isinstance(source, str | Path) and Path(source).exists()
        else _spelled(source)
    )
    return spec.open()


def _spelled(source: Any) -> ConceptSpec:
    if isinstance(source, Path) or (
        isinstance(source, str)
        and ("/" in source or "." in source)
        and ":" not in source
    ):
        raise ConsilienceError(f"concepts {str(source)!r}: no such file or folder")
    spec: ConceptSpec = concept_sets.build(source)
    return spec


def _of_path(path: Path) -> ConceptSpec:
    name = _kind(path)
    cls: Any = concept_sets.get(name)
    spec: ConceptSpec = cls(str(path))
    return spec


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix.lower() != ".json":
            raise ConsilienceError(
                f"concepts {path}: a file of concepts is COCO's .json; a folder is Broden, "
                f"ADE20K or masks"
            )
        return "coco"
    if (path / "index.csv").is_file():
        return "broden"
    if (path / "masks").is_dir():
        return "folder"
    if (path / "labels").is_dir() or (path / "SegmentationClass").is_dir():
        return "indexed"
    if (path / "objectInfo150.txt").is_file() or next(
        (path / "images").rglob("*_seg.png"), None
    ) is not None:
        return "ade20k"
    raise ConsilienceError(
        f"concepts {path}: no index.csv (Broden), no images and masks folders, no "
        f"labels (masks of class numbers) or SegmentationClass (VOC), no "
        f"objectInfo150.txt or *_seg.png (ADE20K)"
    )


def spec_of(spec: Any) -> str:
    """How a registered set is spelled."""
    return spell(spec)


def concept_digest(*parts: Any) -> str:
    """Short digest of plain data and bytes."""
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(part if isinstance(part, bytes) else repr(part).encode())
    return state.hexdigest()


def numbered(rows: Iterable[tuple[str, str, int]]) -> tuple[Concept, ...]:
    """Concepts of (name, category, number) rows in their order, without those that have
    no name.
    """
    named = [
        (name.strip(), category, number)
        for name, category, number in rows
        if name.strip() not in NAMELESS
    ]
    return tuple(Concept(index, *row) for index, row in enumerate(named))


def one_channel(file: Path, image: Path) -> Array:
    """A map of class numbers (H, W) int64: grey of 8 or 16 bits, or a palette's indices."""
    values = read_label_map(file, image)
    if values.ndim == 3:
        if (values != values[:, :, :1]).any():
            raise ConsilienceError(
                f"{file}: a map of class numbers has one channel; it is in colour"
            )
        values = values[:, :, 0]
    return values


def refuse_missing(what: str, files: Iterable[Path]) -> None:
    """Raise one line that counts the files that are not there and names the first."""
    known: dict[Path, set[str]] = {}
    missing = []
    for file in files:
        if file.parent not in known:
            known[file.parent] = (
                {entry.name for entry in file.parent.iterdir()}
                if file.parent.is_dir()
                else set()
            )
        if file.name not in known[file.parent]:
            missing.append(file)
    if missing:
        count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        raise ConsilienceError(
            f"{what}: {count} that its index names do not exist; the first is {missing[0]}"
        )
