"""A run on disk: one folder, one job; arrays first, the manifest last, each file
written whole or not at all.

``job.json`` says what was asked and is there from the start, so that a killed run
continues and another job is refused. ``maps/NAME.npz`` holds everything of one image,
and is what makes an image done. ``run.json`` is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilience.agreement.audit import Finding
from consilience.files import (
    _read_json,
    digest_of_data,
    file_stem,
    json_ready,
    write_atomically,
    write_json,
    write_table,
)
from consilience.types import Array, ConsilienceError

RUN_SCHEMA = 1
MAPS, PANELS = "maps", "panels"
EXPLANATIONS, AGREEMENT, MANIFEST, JOB = (
    "explanations.parquet",
    "agreement.parquet",
    "run.json",
    "job.json",
)
RUN_FILES = frozenset(
    {MAPS, PANELS, EXPLANATIONS, AGREEMENT, MANIFEST, JOB, "report.html"}
)


@dataclass(frozen=True, eq=False)
class Item:
    """One explanation of an image as it is kept: raw values, the mask cut from them,
    and how it was made.
    """

    column: str
    explainer: str
    model: str
    target: int | None
    target_name: str
    score: float
    seconds: float
    passes: int
    key: str
    values: Array
    mask: Array | None = None
    mask_rule: str = ""
    extras: Mapping[str, Array] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    geometry: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stored:
    """Everything of one image: what the model was shown (uint8), what it said, and the
    explanations.
    """

    name: str
    digest: str
    image: Array
    prediction: Mapping[str, Any]
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


# ---- writing


class Writer:
    """Opens a folder for one job: a new folder, or the same job's own, to be continued."""

    def __init__(self, folder: str | Path, job: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.job = json.loads(json.dumps(json_ready(job)))
        self.digest = digest_of_data(self.job)
        self._claim()

    def _claim(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConsilienceError(
                f"{self.folder} is a file; -o names the run's folder"
            )
        known = self.folder / JOB
        if known.is_file():
            self._same_job(_read_json(known))
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConsilienceError(
                f"{self.folder} is not empty and holds no run; name another folder with -o"
            )
        else:
            (self.folder / MAPS).mkdir(parents=True, exist_ok=True)
            write_json(known, self.job)

    def _same_job(self, there: dict[str, Any]) -> None:
        if digest_of_data(there) == self.digest:
            return
        differ = ", ".join(
            sorted(
                key
                for key in {**there, **self.job}
                if there.get(key) != self.job.get(key)
            )
        )
        raise ConsilienceError(
            f"{self.folder} holds another job ({differ} differ); name another folder with -o"
        )

    def done(self, name: str, digest: str) -> Stored | None:
        """What an earlier try of this job kept of an image, if the image is still the
        same.
        """
        path = self.folder / MAPS / f"{file_stem(name)}.npz"
        if not path.is_file():
            return None
        stored = read_stored(path)
        return stored if stored.digest == digest else None

    def put(self, stored: Stored) -> None:
        """Keep one image."""
        write_stored(self.folder / MAPS / f"{file_stem(stored.name)}.npz", stored)

    def finish(
        self,
        manifest: Mapping[str, Any],
        explanations: pd.DataFrame,
        agreement: pd.DataFrame,
    ) -> Run:
        """Write the tables, then the manifest."""
        write_table(self.folder / EXPLANATIONS, explanations)
        write_table(self.folder / AGREEMENT, agreement)
        write_json(
            self.folder / MANIFEST,
            {"schema": RUN_SCHEMA, "job": self.digest, **manifest},
        )
        return Run(self.folder)


def write_stored(path: Path, stored: Stored) -> None:
    """One image as a compressed .npz: arrays by name, everything else as JSON in
    ``meta``.
    """
    arrays: dict[str, Array] = {"image": stored.image}
    rows = []
    for number, item in enumerate(stored.items):
        arrays[f"{number}.values"] = item.values
        if item.mask is not None:
            arrays[f"{number}.mask"] = np.packbits(item.mask)
        arrays |= {
            f"{number}.extras.{key}": np.asarray(value)
            for key, value in item.extras.items()
        }
        plain_fields = {
            key: value
            for key, value in vars(item).items()
            if key not in ("values", "mask", "extras")
        }
        rows.append(
            {**plain_fields, "shape": None if item.mask is None else item.mask.shape}
        )
    meta = {
        "name": stored.name,
        "digest": stored.digest,
        "prediction": stored.prediction,
        "notes": stored.notes,
        "items": rows,
    }
    arrays["meta"] = np.frombuffer(
        json.dumps(json_ready(meta)).encode(), dtype=np.uint8
    )
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_stored(path: Path) -> Stored:
    """Inverse of `write_stored`; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(arrays["meta"].tobytes())
    items = tuple(
        _read_item(number, row, arrays) for number, row in enumerate(meta["items"])
    )
    return Stored(
        meta["name"],
        meta["digest"],
        arrays["image"],
        meta["prediction"],
        items,
        tuple(meta["notes"]),
    )


def _read_item(number: int, row: dict[str, Any], arrays: dict[str, Array]) -> Item:
    shape = row.pop("shape")
    mask = None
    if shape is not None:
        bits = np.unpackbits(arrays[f"{number}.mask"], count=int(np.prod(shape)))
        mask = bits.astype(bool).reshape(shape)
    prefix = f"{number}.extras."
    extras = {
        key.removeprefix(prefix): value
        for key, value in arrays.items()
        if key.startswith(prefix)
    }
    for name in ("score", "seconds"):
        row[name] = float("nan") if row[name] is None else row[name]
    return Item(values=arrays[f"{number}.values"], mask=mask, extras=extras, **row)


class Run:
    """A finished run, read from its folder as far as it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            unfinished = (self.folder / JOB).is_file()
            hint = (
                "give the same command again to finish it"
                if unfinished
                else f"there is no {MANIFEST} in it"
            )
            raise ConsilienceError(f"{self.folder} holds no finished run: {hint}")
        if self.manifest.get("schema") != RUN_SCHEMA:
            raise ConsilienceError(
                f"{self.folder} has schema {self.manifest.get('schema')}; this version reads "
                f"{RUN_SCHEMA}"
            )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was asked, what ran, what failed."""
        return _read_json(self.folder / MANIFEST)

    @cached_property
    def explanations(self) -> pd.DataFrame:
        """A row an explanation."""
        return pd.read_parquet(self.folder / EXPLANATIONS)

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """A row a pair and image."""
        return pd.read_parquet(self.folder / AGREEMENT)

    @property
    def summary(self) -> pd.DataFrame:
        """A row a pair, over images."""
        return pd.DataFrame(self.manifest["summary"])

    @property
    def audit(self) -> list[Finding]:
        """What makes the numbers doubtful."""
        return [Finding(**row) for row in self.manifest["audit"]]

    @property
    def samples(self) -> list[str]:
        """Names of the images, in the order they were given."""
        return list(dict.fromkeys(self.explanations["sample"]))

    @property
    def predictions(self) -> dict[str, dict[str, Any]]:
        """By image what the (first) model said."""
        first = self.explanations.drop_duplicates("sample").set_index("sample")
        rows = first[["predicted_name", "probability", "true_name"]].itertuples()
        return {
            name: {
                "label": label,
                "probability": p,
                "true": None if pd.isna(true) else true or None,
            }  # no class is read as NaN
            for name, label, p, true in rows
        }

    def load(self, name: str) -> Stored:
        """Everything kept of one image."""
        path = self.folder / MAPS / f"{file_stem(name)}.npz"
        if not path.is_file():
            raise ConsilienceError(f"{self.folder} has no image {name!r}")
        return read_stored(path)

    def __iter__(self) -> Iterator[Stored]:
        return (self.load(name) for name in self.samples)


def findings_as_rows(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings as plain data for the manifest."""
    return [asdict(finding) for finding in findings]
