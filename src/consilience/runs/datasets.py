"""Lists of images that stand in files: tables of paths, WebDataset's tar shards, data sets
of torchvision and of Hugging Face's ``datasets`` by their spelling.
"""

from __future__ import annotations

import glob
import importlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from consilience import data, inputs
from consilience.files import LocalPath, place, read_csv, read_table
from consilience.image_files import SUFFIXES, is_data_set
from consilience.runs.folder import file_content
from consilience.runs.sources import content_of
from consilience.types import Box, ConsilienceError, Sample

PATH_COLUMNS = ("image", "path", "file", "filepath", "filename")
MOST_BYTES = 1 << 28
"""No file of an image is longer."""
LABEL_COLUMNS = ("class_index", "class", "label", "cls", "target")


def listed_source(
    given: str | Path,
    classes: Sequence[str],
    channels: int,
    value_range: tuple[float, float] | None,
) -> Any:
    """The source behind a table (``.csv``, ``.tsv``, ``.parquet``), shards (``.tar``, or a
    pattern of them) or a data set (``torchvision:NAME,root=DIR``, ``datasets:PATH``); None
    for anything else.
    """
    text = str(given)
    if is_data_set(text):
        return Dataset(text, classes, channels)
    lowered = text.lower()
    if lowered.endswith((".csv", ".tsv", ".parquet", ".pq")):
        return Table(text, classes, channels, value_range)
    if lowered.endswith((".tar", ".tar.gz", ".tgz")):
        return Shards(text, classes, channels, value_range)
    return None


# ---- tables of paths


class Table:
    """Images that a table names, a row an image, or a row a box: ``image`` (or ``path``),
    ``class_index`` or ``class``, ``x0 y0 x1 y1``. Paths are relative to the table.
    """

    def __init__(
        self,
        file: str,
        classes: Sequence[str],
        channels: int,
        value_range: tuple[float, float] | None,
    ) -> None:
        self._file = place(file)
        if not self._file.is_file():
            raise ConsilienceError(f"{file} does not exist")
        rows = _rows(self._file)
        columns = rows[0] if rows else {}
        path = next((name for name in PATH_COLUMNS if name in columns), None)
        if path is None:
            there = ", ".join(columns) or "none"
            raise ConsilienceError(
                f"{file} names no images: it needs a column {' or '.join(PATH_COLUMNS[:2])}; "
                f"its columns are {there}"
            )
        self._channels, self._range, self._classes = channels, value_range, classes
        known: dict[str, list[tuple[int, Box | None]]] = {}
        for number, row in enumerate(rows, 2):
            self._take(known, f"{file}, row {number}", row, path)
        if not known:
            raise ConsilienceError(f"{file} has no rows")
        self.files = [_beside(self._file, name) for name in known]
        self.names = data.names_of([Path(str(one)) for one in self.files])
        self._labels = list(known.values())

    def _take(
        self,
        known: dict[str, list[tuple[int, Box | None]]],
        where: str,
        row: Mapping[str, str],
        path: str,
    ) -> None:
        if not row[path]:
            raise ConsilienceError(f"{where} names no image")
        found = known.setdefault(row[path], [])
        named = {
            "class_index" if cell.isdecimal() else "class": cell
            for cell in (row.get(key, "") for key in reversed(LABEL_COLUMNS))
            if cell
        }
        if named:
            label = data.class_of_row(where, named, self._classes)
            found.append((label, data.box_of_row(where, row, label)))
        elif any(row.get(edge) for edge in data.EDGES):
            raise ConsilienceError(f"{where} has a box and no class")

    def parts(self) -> dict[str, Any]:
        """The table's own bytes, and those of the images that it names."""
        table = {self._file.name: _digest(self._file)}
        return {
            "images": {**table, **content_of(self.files, self.names)},
            "truth": None,
        }

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""
        name, labels = self.names[place], self._labels[place]
        truth = data.TruthTable({name: data.known_of(labels)} if labels else {})
        try:
            sample = data.read_image(
                self.files[place], name, self._channels, self._range
            )
            return data.labelled(sample, Path(name), truth, ())
        except ConsilienceError as error:
            return data.Failure(name, str(error))


def _rows(file: Path) -> list[dict[str, str]]:
    """Rows by the names of the columns in lower case, every cell as text."""
    if file.suffix.lower() in (".parquet", ".pq"):
        rows = read_table(file).to_dict("records")
        return [
            {str(key).lower(): _text(cell) for key, cell in row.items()}
            for row in rows
        ]
    lines = [row for _, row in read_csv(file, "table", ",;\t") if row]
    names = [name.strip().lower() for name in lines[0]] if lines else []
    return [
        dict(
            zip_longest(
                names, (cell.strip() for cell in row[: len(names)]), fillvalue=""
            )
        )
        for row in lines[1:]
    ]


def _text(cell: Any) -> str:
    """A cell as a table of text has it: nothing for what is missing, whole numbers
    without a point.
    """
    if cell is None or (isinstance(cell, float) and not np.isfinite(cell)):
        return ""
    if isinstance(cell, float) and cell == int(cell):
        return str(int(cell))
    return str(cell).strip()


def _beside(file: Path, name: str) -> Path:
    """A path as a table means it: as it stands, or beside the table."""
    named = Path(name)
    return named if named.is_absolute() else file.parent / name


def label_of(where: str, cell: Any, classes: Sequence[str]) -> int:
    """A class by its number or name."""
    text = _text(cell)
    row = {"class_index" if text.isdecimal() else "class": text}
    return data.class_of_row(where, row, classes)


def _digest(file: Path) -> str:
    if isinstance(file, LocalPath):
        return (file_content(file) or {})["digest"]
    return blake2b(file.read_bytes(), digest_size=16).hexdigest()


# ---- WebDataset


class Shards:
    """WebDataset's tar shards: files of one name and several endings are one example
    (``0001.jpg``, ``0001.cls``, ``0001.json``). A shard is listed once; an image is read
    from its place in the file.
    """

    def __init__(
        self,
        pattern: str,
        classes: Sequence[str],
        channels: int,
        value_range: tuple[float, float] | None,
    ) -> None:
        self._shards = _tars(pattern)
        self._classes, self._channels, self._range = classes, channels, value_range
        self.names: list[str] = []
        self._members: list[dict[str, Any]] = []
        for number, shard in enumerate(self._shards):
            self._list(number, shard)
        if not self.names:
            raise ConsilienceError(f"{pattern} holds no image")

    def _list(self, number: int, shard: Path) -> None:
        found: dict[str, dict[str, Any]] = {}
        prefix = f"{shard.stem}/" if len(self._shards) > 1 else ""
        try:
            with tarfile.open(fileobj=shard.open("rb")) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    entry = found.setdefault(key, {"shard": number})
                    ending = ending.lower()
                    at = (member.offset_data, member.size)
                    if f".{ending.rpartition('.')[2]}" in SUFFIXES:
                        entry.setdefault("image", at)
                    elif ending in ("cls", "json"):
                        entry[ending] = at
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ConsilienceError(
                f"{shard} cannot be read as a tar: {' '.join(str(error).split())}"
            ) from None
        if shard.suffix in (".gz", ".tgz") and found:
            raise ConsilienceError(
                f"{shard} is compressed: its images have no place of their own; gunzip it"
            )
        for key, entry in found.items():
            if "image" in entry:
                self.names.append(prefix + key)
                self._members.append(entry)

    def parts(self) -> dict[str, Any]:
        """The shards' own bytes."""
        return {
            "images": {shard.name: _digest(shard) for shard in self._shards},
            "truth": None,
        }

    def read(self, place: int) -> Sample | data.Failure:
        """One of them, labelled by its ``.cls``, or by ``label``, ``cls`` or ``class`` of
        its ``.json``.
        """
        name, entry = self.names[place], self._members[place]
        try:
            with self._shards[entry["shard"]].open("rb") as file:
                parts: dict[str, bytes] = {
                    key: _part(file, *entry[key])
                    for key in ("image", "cls", "json")
                    if key in entry
                }
            shown = inputs.Shown(self._channels)
            sample = inputs.one_sample(parts["image"], shown, name)
            label = _label_of_parts(parts, self._classes, name)
            return replace(sample, label=label)
        except (ConsilienceError, OSError) as error:
            return data.Failure(
                name, f"{name}: {error}" if name not in str(error) else str(error)
            )


def _part(file: Any, start: int, size: int) -> bytes:
    if size > MOST_BYTES:
        raise ConsilienceError(f"an image of {size:,} bytes is too large")
    file.seek(start)
    return bytes(file.read(size))


def _label_of_parts(
    parts: dict[str, bytes], classes: Sequence[str], name: str
) -> int | None:
    if "cls" in parts:
        text = parts["cls"].decode("utf-8", "replace").strip()
        return label_of(name, text, classes)
    with suppress(ValueError):
        said = json.loads(parts.get("json", b"{}"))
        for key in ("label", "cls", "class", "class_index"):
            if isinstance(said, dict) and said.get(key) is not None:
                return label_of(name, said[key], classes)
    return None


def _tars(pattern: str) -> list[Path]:
    if "://" in pattern:
        return [place(pattern)]
    found = sorted(glob.glob(str(Path(pattern).expanduser())))  # noqa: PTH207
    if not found:
        raise ConsilienceError(f"{pattern} does not exist")
    return [Path(name) for name in found]


# ---- data sets by their spelling


class Dataset:
    """``torchvision:NAME,root=DIR[,split=S]`` or ``datasets:FOLDER``: what is there on
    disk; nothing is downloaded.
    """

    def __init__(self, spelled: str, classes: Sequence[str], channels: int) -> None:
        self._spelled = spelled
        self._set = _torchvision(spelled) if spelled[0] == "t" else _hub(spelled)
        self._shown = inputs.Shown(channels, tuple(classes))
        self._labels = inputs.Labels.of(self._set, self._shown)
        self._one_at_a_time = Lock()
        self.names = [f"{place:07d}" for place in range(len(self._set))]
        if not self.names:
            raise ConsilienceError(f"{spelled} is empty")

    def parts(self) -> dict[str, Any]:
        """Its spelling and length: every image's digest is in its record."""
        return {"images": {self._spelled: len(self.names)}, "truth": None}

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""
        try:
            with self._one_at_a_time:  # somebody else's code may not be for threads
                item = self._set[place]
            found = inputs.labelled_sample(
                item, self.names[place], self._shown, self._labels
            )
        except Exception as error:  # whatever a data set raises is one image's
            return data.Failure(self.names[place], f"{self.names[place]}: {error}")
        return found


def _torchvision(spelled: str) -> Any:
    import torchvision

    name, _, rest = spelled.partition(":")[2].partition(",")
    kind = getattr(torchvision.datasets, name, None)
    if kind is None:
        raise ConsilienceError(f"torchvision has no data set {name!r}")
    options: dict[str, Any] = {}
    for one in filter(None, rest.split(",")):
        key, _, value = one.partition("=")
        options[key] = _option(value)
    try:
        return kind(**options)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ConsilienceError(f"{spelled}: {why}") from None


def _option(text: str) -> Any:
    """A value as it is meant: true, a number, numbers (``3x32x32``), else a text."""
    if text in ("true", "false"):
        return text == "true"
    parts = text.split("x")
    if all(part.isdecimal() for part in parts):
        numbers = tuple(int(part) for part in parts)
        return numbers if len(numbers) > 1 else numbers[0]
    return text


def _hub(spelled: str) -> Any:
    try:
        load_from_disk = importlib.import_module("datasets").load_from_disk
    except ImportError:
        raise ConsilienceError(
            f"{spelled} needs the package datasets: pip install datasets"
        ) from None
    folder = spelled.partition(":")[2]
    try:
        return load_from_disk(folder)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ConsilienceError(f"{spelled}: {why}") from None
