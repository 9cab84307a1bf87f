"""Files written whole or not at all, JSON, digests, and safe names."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from consilience.types import ConsilienceError


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place and move it there; nothing half-written is ever
    seen under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """A file's content, whole or not at all."""
    write_atomically(path, lambda file: file.write(content))


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


# ---- reading


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; `ConsilienceError` where it is damaged."""
    try:
        thing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConsilienceError(f"{path} does not read as JSON: {error}") from None
    if not isinstance(thing, dict):
        raise ConsilienceError(f"{path} is damaged: it holds no JSON object")
    return thing


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet table; `ConsilienceError` where it is missing or damaged."""
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow raises of many kinds on damaged bytes
        why = " ".join(str(error).split())[:160]
        raise ConsilienceError(
            f"{path} does not read as a table: {why}; give the same command again to make "
            f"it anew"
        ) from None
