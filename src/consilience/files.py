"""Files written whole or not at all, JSON, digests, and safe names."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path, PosixPath, WindowsPath
from typing import IO, Any, cast

import numpy as np
import pandas as pd

from consilience.types import ConsilienceError


class CannotWriteError(ConsilienceError):
    """A disk that is full, a folder that takes no files: no fault of the image at hand,
    so a batch ends with it.
    """


LocalPath = (PosixPath, WindowsPath)
"""A path of this machine; other storage has paths of its own class."""


def digest_of_data(thing: Any) -> str:
    """Digest of plain data, whatever the order of its keys."""
    return blake2b(
        json.dumps(thing, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


def file_stem(name: str) -> str:
    """A file name for a sample's name: as it is where that is safe, else cleaned and
    made unique by a digest.
    """
    clean = re.sub(r"[^\w.\- ]", "_", name).strip(". ")
    clean = clean.encode()[:STEM_BYTES].decode(errors="ignore").strip(". ")
    return (
        clean
        if clean == name
        else f"{clean}-{blake2b(name.encode(), digest_size=4).hexdigest()}"
    )


STEM_BYTES = 90
"""A file's name has at most 255 bytes, of which a letter may take four."""


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], durable: bool = True
) -> None:
    """Write a file beside its place and move it there; nothing half-written is ever
    seen under its name.

    ``durable`` waits until the disk has it, so that it outlives a loss of power. On
    other than local storage an object appears whole by itself.
    """
    if not isinstance(path, LocalPath):
        _write_elsewhere(path, write)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{_writer()}-", suffix=PART
        )
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from None
        raise


PART = ".part"
"""The ending of a file that is being written."""


def _writer() -> str:
    """Who writes: the machine and the process."""
    return f"{platform.node()[:40]}-{os.getpid()}"


def _sync_folder(folder: Path) -> None:
    """Have the disk know a folder's names; some systems cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what processes that are no more left half-written below a folder: of this
    machine's those that do not run, of others' what is a day old.
    """
    if not isinstance(folder, LocalPath):
        return
    for file in folder.rglob(f".*{PART}"):
        if not _is_being_written(file):
            with suppress(OSError):
                file.unlink()


def _is_being_written(file: Path) -> bool:
    machine = file.name[1:].rpartition("-")[0]
    machine, _, process = machine.rpartition("-")
    if machine != platform.node()[:40] or not process.isdecimal():
        with suppress(OSError):
            return time.time() - file.stat().st_mtime < A_DAY
        return False
    if int(process) == os.getpid():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


A_DAY = 86_400


def _write_elsewhere(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    content = io.BytesIO()
    write(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise _cannot_write(path, error) from None


def place(folder: str | Path) -> Path:
    """A folder: a path, or an address of storage that fsspec knows (``s3://bucket/run``,
    ``gs://``, ``memory://``), which needs the extra ``remote``.
    """
    text = str(folder)
    if not isinstance(folder, str):
        return folder
    if "://" not in text:
        return Path(folder)
    try:
        from upath import UPath
    except ImportError:
        raise ConsilienceError(
            f"{text}: storage by its address needs pip install 'consilience[remote]'"
        ) from None
    try:
        found = UPath(text)
        found.fs  # noqa: B018 - the file system is found when it is asked for
    except (ImportError, ValueError, KeyError) as error:
        raise ConsilienceError(f"{text}: {' '.join(str(error).split())}") from None
    local = getattr(found, "protocol", "") in ("", "file", "local")
    return Path(found.path) if local else cast(Path, found)


def _cannot_write(path: Path, error: OSError) -> CannotWriteError:
    return CannotWriteError(
        f"{path} cannot be written: {error.strerror or error}; what was finished is kept, "
        f"and the same command goes on"
    )


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """A file's content, whole or not at all."""
    write_atomically(path, lambda file: file.write(content), durable)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A table as Parquet, whole or not at all."""
    write_atomically(path, lambda file: table.to_parquet(file, index=False))


def write_json(path: Path, thing: Any) -> None:
    """Plain data as readable JSON; NaN, which JSON has not, becomes null."""
    text = json.dumps(
        json_ready(thing), indent=2, ensure_ascii=False, allow_nan=False
    )
    write_atomically(path, lambda file: file.write(text.encode()))


def json_ready(thing: Any) -> Any:
    """Numpy scalars, tuples and NaN as what JSON can hold."""
    if isinstance(thing, Mapping):
        return {str(key): json_ready(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [json_ready(value) for value in thing]
    if isinstance(thing, np.generic):
        return json_ready(thing.item())
    if isinstance(thing, np.ndarray):
        return json_ready(thing.tolist())
    if isinstance(thing, float) and not np.isfinite(thing):
        return None
    return thing


def spreadsheet_safe(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before text that a spreadsheet would take for a
    formula (``= + - @``, tab, carriage return at its start).
    """
    return table.map(
        lambda cell: (
            f"'{cell}" if isinstance(cell, str) and cell[:1] in FORMULA else cell
        )
    )


FORMULA = tuple("=+-@\t\r")
"""How a cell begins that Excel and LibreOffice run (OWASP, CSV injection)."""


# ---- reading


def read_text(path: Path, what: str = "") -> str:
    """A text file in UTF-8, with or without a byte order mark; ``what`` names it in the
    error.
    """
    named = f"{what} {path}".strip()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConsilienceError(
            f"{named} cannot be read: byte {error.start} is not UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConsilienceError(f"{named} cannot be read: {reason}") from None


def read_csv(
    path: Path, what: str = "", delimiter: str = ","
) -> list[tuple[int, list[str]]]:
    """Rows of a CSV file, each with the number of its last line. ``delimiter`` is one,
    or several of which the first line says the most frequent.
    """
    text = read_text(path, what)
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter=max(delimiter, key=first.count))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ConsilienceError(
            f"{what} {path} cannot be read: line {reader.line_num}: {error}".strip()
        ) from None


def read_csv_records(path: Path, what: str = "") -> list[dict[str, str]]:
    """Rows of a CSV file by the names in its first line; cells that a row lacks are
    empty, those beyond the header are left out.
    """
    rows = [row for _, row in read_csv(path, what) if row]
    header = rows[0] if rows else []
    return [
        {
            name: row[place] if place < len(row) else ""
            for place, name in enumerate(header)
        }
        for row in rows[1:]
    ]


def read_json_data(path: Path, what: str = "") -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise ConsilienceError(
            f"{what} {path} cannot be read as JSON: {error}".strip()
        ) from None


def inside(folder: Path, name: str, where: str) -> Path:
    """A file of ``folder`` that a list names; ``where`` is the list, for the error.

    Raises `ConsilienceError` for one outside of it: lists come from elsewhere.
    """
    parts = Path(name.replace("\\", "/")).parts
    if ".." in parts or Path(name).is_absolute() or "\0" in name:
        raise ConsilienceError(
            f"{where} names {name!r}, which is not in {folder}; files are given relative to "
            f"it"
        )
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; `ConsilienceError` where it is damaged."""
    thing = read_json_data(path)
    if not isinstance(thing, dict):
        raise ConsilienceError(f"{path} is damaged: it holds no JSON object")
    return thing


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet table; `ConsilienceError` where it is missing or damaged."""
    if path.is_dir():  # which pandas would take for a data set of many files
        raise ConsilienceError(f"{path} is a folder; a table stood here")
    try:
        with path.open("rb") as file:
            return pd.read_parquet(file)
    except Exception as error:  # pyarrow raises of many kinds on damaged bytes
        why = " ".join(str(error).split())[:160]
        raise ConsilienceError(
            f"{path} does not read as a table: {why}; give the same command again to make "
            f"it anew"
        ) from None
