"""Many small records in a folder: a file each while they are made, then many in a file.

A shard is a zip of records that are stored as they are, in the order of the run, with no
date: the same records give the same bytes whoever made them. Every record has the
checksum that zip gives it; one that is damaged is no record. A loose file is newer than
the same record in a shard.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from consilience.files import write_atomically, write_bytes
from consilience.types import ConsilienceError

MOST_IN_A_SHARD = 1000
LEAST_SHARDS = 16
_DAMAGED = (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError)


def per_shard(count: int) -> int:
    """Records a shard of so many in all: a thousand, fewer where that would leave fewer
    than sixteen shards for several machines to make.
    """
    return max(1, min(MOST_IN_A_SHARD, -(-count // LEAST_SHARDS)))


@dataclass
class Shelf:
    """The records of a folder, by name; ``ending`` is that of a record's file."""

    folder: Path
    ending: str
    _places: dict[str, Path] | None = field(default=None, repr=False)
    _open: tuple[Path, zipfile.ZipFile] | None = field(default=None, repr=False)

    def loose(self, name: str) -> Path:
        """Where a record stands by itself."""
        return self.folder / f"{name}{self.ending}"

    def write(self, name: str, content: bytes, durable: bool = True) -> None:
        """Keep a record, whole or not at all."""
        write_bytes(self.loose(name), content, durable)

    def read(self, name: str) -> bytes | None:
        """A record, or None where there is none.

        Raises `ConsilienceError` where it is damaged.
        """
        file = self.loose(name)
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise ConsilienceError(
                f"{file} cannot be read: {error.strerror or error}"
            ) from None
        shard = self._shards().get(name)
        if shard is None:
            return None
        try:
            return self._opened(shard).read(f"{name}{self.ending}")
        except _DAMAGED as error:
            why = " ".join(str(error).split())[:160]
            raise ConsilienceError(
                f"{shard}: {name}{self.ending} is damaged: {why}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            self.loose(name).is_file() or name in self._shards()
        )

    def _opened(self, shard: Path) -> zipfile.ZipFile:
        """The shard that was read last stays open."""
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = (shard, zipfile.ZipFile(shard.open("rb")))
        return self._open[1]

    def close(self) -> None:
        """Let go of files and of what is known of them."""
        if self._open is not None:
            file = self._open[1]
            stream = file.fp
            file.close()
            if stream is not None:
                stream.close()
        self._open, self._places = None, None

    def _shards(self) -> dict[str, Path]:
        """In which shard each record is; a shard that cannot be read has none."""
        if self._places is None:
            self._places = {}
            for shard in self.shards():
                with suppress(*_DAMAGED), zipfile.ZipFile(shard.open("rb")) as file:
                    for name in file.namelist():
                        self._places[name.removesuffix(self.ending)] = shard
        return self._places

    def shards(self) -> list[Path]:
        """The shards there are, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if path.suffix == ".zip"), key=str
        )

    def names(self) -> list[str]:
        """Names of all records, loose and in shards, in order of their names."""
        loose = (
            [
                path.name.removesuffix(self.ending)
                for path in self.folder.iterdir()
                if path.name.endswith(self.ending) and not path.name.startswith(".")
            ]
            if self.folder.is_dir()
            else []
        )
        return sorted({*loose, *self._shards()})

    def pack(self, number: int, names: Sequence[str]) -> None:
        """Put records into shard ``number``, in this order; those that are missing are
        left out. Nothing is done where they are there already.
        """
        there = [name for name in names if name in self]
        loose = [name for name in there if self.loose(name).is_file()]
        shard = self.folder / f"{number:05d}.zip"
        if there and (loose or self._members(shard) != there):
            write_atomically(shard, lambda file: self._fill(file, there))
        self.close()
        for name in loose:
            self.loose(name).unlink()

    def _members(self, shard: Path) -> list[str]:
        if not shard.is_file():
            return []
        try:
            with zipfile.ZipFile(shard.open("rb")) as file:
                return [name.removesuffix(self.ending) for name in file.namelist()]
        except _DAMAGED:
            return []

    def _fill(self, file: object, names: Iterable[str]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as shard:  # type: ignore[call-overload]
            for name in names:
                content = self.read(name)
                assert content is not None
                shard.writestr(zipfile.ZipInfo(f"{name}{self.ending}"), content)

    def pack_all(self, names: Sequence[str]) -> None:
        """Put all records into shards, in this order; no shard that is no longer needed
        stays.
        """
        size = per_shard(len(names))
        count = -(-len(names) // size)
        for number in range(count):
            self.pack(number, names[number * size : (number + 1) * size])
        for shard in self.shards()[count:]:
            shard.unlink()
