"""A run on disk: one folder, one job; arrays first, the manifest last, each file
written whole or not at all.

``job.json`` says what was asked and is there from the start, so that a killed run
continues and another job is refused, with what differs. What makes a job this job is
content: a file is known by its digest, never by its path. ``run.json`` (or the file of
another kind) is the manifest. Of explanations, ``maps/NAME.npz`` holds everything of
one image, and is what makes an image done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from consilience import progress
from consilience.agreement.audit import Finding
from consilience.agreement.masks import Mask
from consilience.files import (
    digest_of_data,
    file_stem,
    json_ready,
    read_json,
    read_table,
    write_json,
    write_table,
)
from consilience.registry import unknown
from consilience.saved import (
    SavedSample,
    explanation_arrays,
    explanation_facts,
    explanation_from,
    one_line,
    read_arrays,
    sample_facts,
    write_arrays,
)
from consilience.types import Array, ConsilienceError, Explanation, Geometry, Sample

MAPS, PANELS, REPORT = "maps", "panels", "report.html"
EXPLANATIONS, AGREEMENT, MANIFEST, JOB = (
    "explanations.parquet",
    "agreement.parquet",
    "run.json",
    "job.json",
)
RUN_FILES = frozenset({MAPS, PANELS, EXPLANATIONS, AGREEMENT, MANIFEST, JOB, REPORT})
MANIFESTS = {
    "explanations": MANIFEST,
    "dissection": MANIFEST,
    "evaluation": "evaluation.json",
    "comparison": "comparison.json",
    "planted": "planted.json",
}
"""Where each kind of run says what it did, written last."""
SCHEMAS = {
    "job": 2,
    "explanations": 2,
    "dissection": 2,
    "evaluation": 2,
    "comparison": 1,
    "planted": 1,
}
CALLED = {
    "explanations": "run of explanations",
    "dissection": "dissection",
    "evaluation": "evaluation",
    "comparison": "comparison",
    "planted": "planted suite",
}
NAMES_SHOWN = 3


# ---- what makes a job this job


def file_content(path: str | Path | None) -> dict[str, str] | None:
    """A file as part of a job: its name for people, the digest of its bytes."""
    if path is None:
        return None
    file = Path(path)
    try:
        with file.open("rb") as stream:
            digest = blake2b(digest_size=16)
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        why = "no such file" if not file.exists() else one_line(error)
        raise ConsilienceError(f"{file}: {why}") from None
    return {"file": file.name, "digest": digest.hexdigest()}


def files_content(paths: Sequence[Path], names: Sequence[str]) -> dict[str, str]:
    """Files as part of a job, by name; one that cannot be read is part of it too."""
    digests = {}
    for path, name in zip(paths, names, strict=True):
        try:
            digests[name] = (file_content(path) or {})["digest"]
        except ConsilienceError:
            digests[name] = "unreadable"
    return digests


def differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between two jobs, a phrase each."""
    if there == asked:
        return []
    if isinstance(there, dict) and isinstance(asked, dict):
        return _of_parts(there, asked, name)
    if name.endswith("digest"):
        return [f"{name.removesuffix('digest').strip()} changed"]
    if _is_part(there) or _is_part(asked):
        return [f"{name} {'added' if there is None else 'gone'}"]
    return [f"{name} was {_short(there)}, is {_short(asked)}"]


def _is_part(value: Any) -> bool:
    """Several parts under one name; a file is one part."""
    return isinstance(value, dict) and "file" not in value


def _of_parts(there: dict[str, Any], asked: dict[str, Any], name: str) -> list[str]:
    if set(there) == set(asked) == {"file", "digest"}:
        renamed = "" if there["file"] == asked["file"] else f", was {there['file']}"
        if there["digest"] == asked["digest"]:
            return []  # the same content under another name
        return [f"{name} ({asked['file']}{renamed}) changed"]
    if name == "images":
        return [_of_images(there, asked)]
    phrases = []
    for key in dict.fromkeys([*there, *asked]):
        inner = f"{name} {key}".strip()
        phrases += differences(there.get(key), asked.get(key), inner)
    return phrases


def _of_images(there: Mapping[str, str], asked: Mapping[str, str]) -> str:
    changed = [name for name in asked if there.get(name, asked[name]) != asked[name]]
    groups = {
        "changed": changed,
        "added": [name for name in asked if name not in there],
        "missing": [name for name in there if name not in asked],
    }
    said = [
        f"{len(names)} {what} ({_listed(names)})"
        for what, names in groups.items()
        if names
    ]
    return f"images: {', '.join(said) or 'another order'}"


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _short(value: Any) -> str:
    if isinstance(value, dict) and "file" in value:
        return str(value["file"])
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- a folder and its job


class RunFolder:
    """A folder that belongs to one job: new, empty, or the same job's own, to be
    continued.

    ``parts`` are what makes the job this job, ``about`` what else its folder should
    say. A folder in which nothing was finished takes any job.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        parts: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.kind = Path(folder), kind
        self.parts = json.loads(json.dumps(json_ready({"kind": kind, **parts})))
        self.digest = digest_of_data(_identity(self.parts))
        self._claim({"schema": SCHEMAS["job"], "parts": self.parts, **(about or {})})

    def _claim(self, job: Mapping[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConsilienceError(
                f"{self.path} is a file; -o names the run's folder"
            )
        known = self.path / JOB
        if known.is_file() and _has_work(self.path):
            self._check_same(known)
        elif self.path.is_dir() and not known.is_file() and any(self.path.iterdir()):
            raise ConsilienceError(
                f"{self.path} is not empty and holds no run; name another folder with -o"
            )
        write_json(known, job)

    def _check_same(self, known: Path) -> None:
        """Refuse another job; a job that cannot be read any more is written anew, and
        what does not belong to this one is made again.
        """
        try:
            there = read_json(known)
        except ConsilienceError as error:
            progress.say(f"{error}; written anew")
            return
        if there.get("schema") != SCHEMAS["job"]:
            raise ConsilienceError(
                f"{self.path} holds a run of another version; name another folder with -o"
            )
        differ = differences(there.get("parts"), self.parts)
        if differ:
            raise ConsilienceError(
                f"{self.path} holds another job ({'; '.join(differ)}); name another folder "
                f"with -o"
            )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest: from then on the run is finished."""
        write_manifest(self.path, self.kind, {"job": self.digest, **manifest})


def _identity(parts: Any) -> Any:
    """Parts without the names of files, which are for people."""
    if not isinstance(parts, dict):
        return parts
    if set(parts) == {"file", "digest"}:
        return parts["digest"]
    return {key: _identity(value) for key, value in parts.items()}


def _has_work(folder: Path) -> bool:
    """Whether anything was finished in it: a file besides the job's own."""
    return any(
        path.is_file() and path.name != JOB and not path.name.endswith(".part")
        for path in folder.rglob("*")
    ) or any(folder.glob("state.part"))


def write_manifest(folder: Path, kind: str, manifest: Mapping[str, Any]) -> None:
    """What a run of a kind did, under its name and schema."""
    head = {"schema": SCHEMAS[kind], "kind": kind}
    write_json(folder / MANIFESTS[kind], {**head, **manifest})


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """What a run of a kind did; `ConsilienceError` where there is none, or it is of
    another version, or damaged.
    """
    path = folder / MANIFESTS[kind]
    if not path.is_file():
        raise ConsilienceError(
            f"{folder} holds no finished {CALLED[kind]}: {_hint(folder)}"
        )
    manifest = read_json(path)
    if manifest.get("kind", kind) != kind:
        it = CALLED.get(str(manifest["kind"]), "another kind")
        raise ConsilienceError(
            f"{folder} holds no {CALLED[kind]}: it holds a {it}; {_hint(folder)}"
        )
    if manifest.get("schema") != SCHEMAS[kind]:
        raise ConsilienceError(
            f"{folder} has schema {manifest.get('schema')}; this version reads "
            f"{SCHEMAS[kind]}: make it again in another folder"
        )
    return manifest


def _hint(folder: Path) -> str:
    """What to do about a folder without the run that was meant."""
    if (folder / JOB).is_file() and not (folder / MANIFEST).is_file():
        return "give the same command again to finish it"
    near = [parent for parent in (folder, folder.parent) if parent.is_dir()]
    runs = [path.parent for place in near for path in place.glob(f"*/{MANIFEST}")]
    there = sorted({f"{path} ({run_kind(path)})" for path in runs if path != folder})
    if there:
        return f"there is: {', '.join(there[:12])}"
    none = "there is no run near it"
    return none if folder.is_dir() else f"the folder does not exist, and {none}"


def run_kind(folder: str | Path) -> str | None:
    """What a folder's run is of (explanations, dissection); None where it is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        return str(read_json(path).get("kind"))
    except ConsilienceError:
        return None


# ---- one image


@dataclass(frozen=True, eq=False)
class KeptExplanation:
    """An explanation in a run: the column it stands in, and the mask cut from it."""

    column: str
    explanation: Explanation
    cut: Mask

    @property
    def mask(self) -> Array:
        """(h, w) bool, in the model's frame."""
        return self.cut.on

    @property
    def values(self) -> Array:
        """The explanation's raw map."""
        return self.explanation.values

    @property
    def extras(self) -> Mapping[str, Array]:
        """The explanation's."""
        return self.explanation.extras

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The explanation's."""
        return self.explanation.provenance

    @property
    def geometry(self) -> Geometry:
        """The explanation's."""
        return self.explanation.geometry


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Everything a run keeps of one image: what the model was shown (uint8), what it
    said, and the explanations in the order of the columns.
    """

    sample: Sample
    image: Array
    prediction: Mapping[str, Any]
    items: tuple[KeptExplanation, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The sample's."""
        return self.sample.name

    @property
    def explanations(self) -> list[Explanation]:
        """In the order of the columns."""
        return [item.explanation for item in self.items]

    @property
    def masks(self) -> list[Mask]:
        """In the order of the columns."""
        return [item.cut for item in self.items]


def map_file(folder: Path, name: str) -> Path:
    """Where a run keeps an image."""
    return folder / MAPS / f"{file_stem(name)}.npz"


def write_result(path: Path, result: ImageResult, job: str = "") -> None:
    """One image as a compressed .npz; ``job`` is the digest of the job it belongs to."""
    arrays: dict[str, Array] = {"image": result.image}
    rows = []
    for number, item in enumerate(result.items):
        arrays |= explanation_arrays(item.explanation, f"{number}.")
        arrays[f"{number}.mask"] = np.packbits(item.cut.on)
        mask = {key: value for key, value in vars(item.cut).items() if key != "on"}
        facts = explanation_facts(item.explanation)
        rows.append(
            {"column": item.column, **facts, "mask": mask, "shape": item.cut.on.shape}
        )
    meta = {
        "job": job,
        "sample": sample_facts(result.sample),
        "prediction": result.prediction,
        "notes": result.notes,
        "items": rows,
    }
    write_arrays(path, arrays, meta)


def read_result(path: Path, job: str | None = None) -> ImageResult:
    """Inverse of `write_result`; the image's own pixels are read again when somebody
    looks at them. `ConsilienceError` where the file is damaged, or of another ``job``.
    """
    arrays, meta = read_arrays(path)
    if job is not None and meta.get("job") != job:
        raise ConsilienceError(f"{path} belongs to another job")
    try:
        sample = SavedSample.of(meta["sample"])
        items = tuple(
            _read_item(sample, number, row, arrays)
            for number, row in enumerate(meta["items"])
        )
        return ImageResult(
            sample, arrays["image"], meta["prediction"], items, tuple(meta["notes"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConsilienceError(f"{path} is damaged: {one_line(error)}") from None


def _read_item(
    sample: Sample, number: int, row: Mapping[str, Any], arrays: Mapping[str, Array]
) -> KeptExplanation:
    shape = row["shape"]
    bits = np.unpackbits(arrays[f"{number}.mask"], count=int(np.prod(shape)))
    mask = Mask(bits.astype(bool).reshape(shape), **row["mask"])
    explanation = explanation_from(sample, row, arrays, f"{number}.")
    return KeptExplanation(row["column"], explanation, mask)


class Writer(RunFolder):
    """A run of explanations that is being made."""

    def __init__(
        self,
        folder: str | Path,
        parts: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, "explanations", parts, about)

    def done(self, name: str, digest: str) -> ImageResult | None:
        """What an earlier try of this job kept of an image, if the image is still the
        same and the file whole.
        """
        path = map_file(self.path, name)
        if not path.is_file():
            return None
        try:
            result = read_result(path, self.digest)
        except ConsilienceError as error:
            progress.say(f"{error}; made anew")
            return None
        return result if result.sample.digest == digest else None

    def put(self, result: ImageResult) -> None:
        """Keep one image."""
        write_result(map_file(self.path, result.name), result, self.digest)

    def finish_tables(
        self,
        manifest: Mapping[str, Any],
        explanations: pd.DataFrame,
        agreement: pd.DataFrame,
    ) -> Run:
        """Write the tables, then the manifest."""
        write_table(self.path / EXPLANATIONS, explanations)
        write_table(self.path / AGREEMENT, agreement)
        self.finish(manifest)
        return Run(self.path)


# ---- reading


class Run(Sequence[Explanation]):
    """A finished run, read from its folder as far as it is asked for.

    A sequence of its explanations, image after image in the order of the columns, and a
    mapping: ``run["cat", "LIME"]`` is one, ``run["cat"]`` a dict by column.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, "explanations")
        self._last: ImageResult | None = None

    # -- explanations

    def keys(self) -> list[tuple[str, str]]:
        """Image and column of every explanation, in order."""
        return self._keys

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        table = self.explanations
        return list(zip(table["sample"], table["column"], strict=True))

    def items(self) -> Iterator[tuple[tuple[str, str], Explanation]]:
        """Image and column, and the explanation, one in memory at a time."""
        return ((key, self[key]) for key in self.keys())

    def __len__(self) -> int:
        return len(self.explanations)

    def __contains__(self, key: object) -> bool:
        return key in self.keys() or key in self.samples

    @overload
    def __getitem__(self, key: int | tuple[str, str]) -> Explanation: ...
    @overload
    def __getitem__(self, key: slice) -> list[Explanation]: ...
    @overload
    def __getitem__(self, key: str) -> dict[str, Explanation]: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[name] for name in self.keys()[key]]
        if isinstance(key, str):
            return {item.column: item.explanation for item in self.load(key).items}
        sample, column = key if isinstance(key, tuple) else self.keys()[key]
        columns: dict[str, Explanation] = self[str(sample)]
        if column not in columns:
            raise ConsilienceError(unknown("column", column, columns))
        return columns[column]

    def load(self, name: str) -> ImageResult:
        """Everything kept of one image; the last one stays in memory."""
        if self._last is None or self._last.name != name:
            if name not in self.samples:
                raise ConsilienceError(
                    f"{self.folder}: {unknown('image', name, self.samples, limit=12)}"
                )
            self._last = read_result(map_file(self.folder, name))
        return self._last

    # -- tables

    def table(self) -> pd.DataFrame:
        """A row an explanation."""
        return self.explanations

    @cached_property
    def explanations(self) -> pd.DataFrame:
        """A row an explanation."""
        return read_table(self.folder / EXPLANATIONS)

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """A row a pair and image."""
        return read_table(self.folder / AGREEMENT)

    @property
    def summary(self) -> pd.DataFrame:
        """A row a pair, over images."""
        return pd.DataFrame(self.manifest["summary"])

    @property
    def audit(self) -> list[Finding]:
        """What makes the numbers doubtful."""
        return [Finding(**row) for row in self.manifest["audit"]]

    @cached_property
    def samples(self) -> list[str]:
        """Names of the images, in the order they were given."""
        return list(dict.fromkeys(self.explanations["sample"]))

    @property
    def predictions(self) -> dict[str, dict[str, Any]]:
        """By image what the (first) model said."""
        first = self.explanations.drop_duplicates("sample").set_index("sample")
        names = ["predicted_name", "probability", "true_name", "predicted", "true"]
        return {
            name: {
                "label": label,
                "probability": p,
                "true": None if pd.isna(true_name) else true_name or None,
                # by number: two classes may have one name
                "right": None if pd.isna(true) else bool(predicted == true),
            }  # no class is read as NaN
            for name, label, p, true_name, predicted, true in first[
                names
            ].itertuples()
        }

    def report(self) -> Path:
        """Write the report anew; returns its path."""
        from consilience.show.html import write_report

        return write_report(self)

    def __repr__(self) -> str:
        images, made = len(self.samples), len(self)
        return f"Run({str(self.folder)!r}: {made} explanations of {images} images)"


def findings_as_rows(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings as plain data for the manifest."""
    return [asdict(finding) for finding in findings]
