"""A run on disk: one folder, one job; arrays first, the manifest last, each file
written whole or not at all.

``job.json`` says what was asked and is there from the start, so that a killed run
continues and another job is refused, with what differs. What makes a job this job is
content: a file is known by its digest, never by its path. ``run.json`` (or the file of
another kind) is the manifest. Of explanations, ``maps/NAME.npz`` holds everything of
one image, and is what makes an image done.
"""

from __future__ import annotations

import io
import json
import os
import platform
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from PIL import Image

from consilience import progress
from consilience.agreement.audit import Finding
from consilience.agreement.masks import Mask
from consilience.agreement.overlap import Packed, PairAgreement
from consilience.explanations import KeptExplanation
from consilience.files import (
    PART,
    CannotWriteError,
    LocalPath,
    digest_of_data,
    file_stem,
    json_ready,
    place,
    read_json,
    read_table,
    sweep,
    write_bytes,
    write_json,
    write_table,
)
from consilience.registry import unknown
from consilience.runs.shelf import Shelf
from consilience.saved import (
    SavedSample,
    arrays_as_bytes,
    arrays_from_bytes,
    explanation_arrays,
    explanation_facts,
    explanation_from,
    one_line,
    sample_facts,
)
from consilience.types import Array, ConsilienceError, Explanation, Sample

MAPS, PANELS, REPORT = "maps", "panels", "report.html"
TIMES, FAILED, TIMINGS, RECORD = "times", "failed", "timings.parquet", ".npz"
LOCK, LOG = "job.lock", "log.jsonl"
EXPLANATIONS, AGREEMENT, MANIFEST, JOB = (
    "explanations.parquet",
    "agreement.parquet",
    "run.json",
    "job.json",
)
RUN_FILES = frozenset(
    {
        *(MAPS, PANELS, TIMES, FAILED),
        *(EXPLANATIONS, AGREEMENT, TIMINGS, MANIFEST, JOB, REPORT, LOCK, LOG),
    }
)
MANIFESTS = {
    "explanations": MANIFEST,
    "dissection": MANIFEST,
    "evaluation": "evaluation.json",
    "comparison": "comparison.json",
    "planted": "planted.json",
    "shortcuts": "shortcuts.json",
    "check": "check.json",
    "clusters": "clusters.json",
}
"""Where each kind of run says what it did, written last."""
RECORDS = tuple(dict.fromkeys(MANIFESTS.values()))
SCHEMAS = {
    "job": 2,
    "explanations": 2,
    "dissection": 2,
    "evaluation": 2,
    "comparison": 1,
    "planted": 1,
    "shortcuts": 1,
    "check": 1,
    "clusters": 1,
}
CALLED = {
    "explanations": "run of explanations",
    "dissection": "dissection",
    "evaluation": "evaluation",
    "comparison": "comparison",
    "planted": "planted suite",
    "shortcuts": "search for shortcuts",
    "check": "check of a network",
    "clusters": "search for groups",
}
NAMES_SHOWN = 3
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


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
        self.path, self.kind = place(folder), kind
        self.parts = json.loads(json.dumps(json_ready({"kind": kind, **parts})))
        self.digest = digest_of_data(_identity(self.parts))
        self._claim({"schema": SCHEMAS["job"], "parts": self.parts, **(about or {})})

    def _claim(self, job: Mapping[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConsilienceError(
                f"{self.path} is a file; -o names the run's folder"
            )
        known = self.path / JOB
        if self._is_claimed(known):
            return
        self._refuse_held()
        if known.is_file() and _has_work(self.path):
            self._check_same(known)
        elif self.path.is_dir() and not known.is_file() and any(self.path.iterdir()):
            raise ConsilienceError(
                f"{self.path} is not empty and holds no run; name another folder with -o"
            )
        write_json(known, job)

    def _is_claimed(self, known: Path) -> bool:
        """Whether the folder is this job's already: then nothing has to be written."""
        if not known.is_file():
            return False
        try:
            there = read_json(known)
        except ConsilienceError:
            return False
        return (
            there.get("schema") == SCHEMAS["job"] and there.get("parts") == self.parts
        )

    def _refuse_held(self) -> None:
        """A folder that is being made is nobody else's, even if nothing is finished."""
        if fcntl is None or not isinstance(self.path, LocalPath):
            return
        if (self.path / LOCK).is_file():
            with ExitStack() as held:
                self._hold(held, LOCK, shared=False)

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

    @contextmanager
    def locked(self, part: str = "") -> Iterator[None]:
        """Nobody else writes here meanwhile; several who make a ``part`` of it may, each
        its own. What dead processes left half-written is removed: before, that of earlier
        tries, and after, that of workers which were lost on the way.

        The system lets go of the lock with the process, however that ends. On other than
        local storage there is no lock: records are whole and the same whoever makes them.
        """
        if fcntl is None or not isinstance(self.path, LocalPath):
            yield
            return
        with ExitStack() as held:
            self._hold(held, LOCK, shared=bool(part))
            if part:
                self._hold(held, f"job.{part}.lock", shared=False)
            sweep(self.path)
            try:
                yield
            finally:
                sweep(self.path)

    def _hold(self, held: ExitStack, name: str, shared: bool) -> None:
        file = self.path / name
        try:
            stream = held.enter_context(file.open("a+"))
        except OSError as error:
            raise CannotWriteError(
                f"{file} cannot be written: {error.strerror or error}"
            ) from None
        try:
            how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(stream, how | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            who = stream.read().strip() or "another process"
            raise ConsilienceError(
                f"{self.path} is being made by {who}; wait for it, or name another folder "
                f"with -o"
            ) from None
        except OSError:  # a file system without locks
            return
        if not shared:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()}")
            stream.flush()

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
        path.is_file()
        and path.name not in (JOB, LOCK, LOG)
        and path.parent.name != FAILED
        and not path.name.endswith(PART)
        for path in folder.rglob("*")
    )


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
    """What a folder's run is of (explanations, dissection, shortcuts, ...); None where
    it is none.
    """
    path = record_path(folder)
    if path is None:
        return None
    try:
        return str(read_json(path).get("kind"))
    except ConsilienceError:
        return None


def record_path(folder: str | Path) -> Path | None:
    """Where a folder's run says what it did: one of explanations also holds its
    evaluation's. None where it is no run.
    """
    there = (place(folder) / name for name in RECORDS)
    return next((path for path in there if path.is_file()), None)


# ---- one image


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
    found: Mapping[str, Any] = field(default_factory=dict)
    """What is said of the image in the run's tables: ``rows``, ``pairs``, ``seen``."""

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
    """Where a run keeps an image by itself."""
    return folder / MAPS / f"{file_stem(name)}{RECORD}"


def is_volatile(key: str) -> bool:
    """Whether a fact of an explanation is of the machine and the moment: it is kept
    beside the record, so that the same work gives the same bytes.
    """
    return key.endswith("seconds") or key in MACHINE


MACHINE = frozenset({"threads", "batch", "openvino", "torch", "note", "device"})


HALF, SCALE = "values:half", "values:scale"


def halved(values: Array) -> tuple[Array, Array, float]:
    """A map in 16 bits: (shares of its largest size as float16, that size, the largest
    difference as a share of it), at most 2**-12.
    """
    scale = float(np.abs(values).max()) or 1.0
    half = (values / np.float32(scale)).astype(np.float16)
    back = half.astype(np.float32) * np.float32(scale)
    return half, np.array(scale), float(np.abs(back - values).max()) / scale


def _whole_maps(arrays: dict[str, Array]) -> dict[str, Array]:
    """With maps of 16 bits as float32 again."""
    whole = {key: it for key, it in arrays.items() if not key.endswith((HALF, SCALE))}
    for key, half in arrays.items():
        if key.endswith(HALF):
            prefix = key.removesuffix(HALF)
            scale = np.float32(float(arrays[f"{prefix}{SCALE}"]))
            whole[f"{prefix}values"] = half.astype(np.float32) * scale
    return whole


def result_bytes(result: ImageResult, job: str = "", half: bool = False) -> bytes:
    """One image as a compressed .npz, without what `is_volatile`; ``job`` is the digest
    of the job it belongs to, ``half`` keeps maps in 16 bits (`halved`).
    """
    arrays: dict[str, Array] = {"image": result.image}
    rows = []
    for number, item in enumerate(result.items):
        arrays |= explanation_arrays(item.explanation, f"{number}.")
        error = {}
        if half:
            small, scale, lost = halved(arrays.pop(f"{number}.values"))
            arrays |= {f"{number}.{HALF}": small, f"{number}.{SCALE}": scale}
            error = {"map_error": lost}
        arrays[f"{number}.mask"] = np.packbits(item.cut.on)
        mask = {key: value for key, value in vars(item.cut).items() if key != "on"}
        facts = explanation_facts(item.explanation)
        facts["provenance"] = {
            key: value
            for key, value in (facts["provenance"] | error).items()
            if not is_volatile(key)
        }
        rows.append(
            {"column": item.column, **facts, "mask": mask, "shape": item.cut.on.shape}
        )
    meta = {
        "job": job,
        "sample": sample_facts(result.sample),
        "prediction": result.prediction,
        "notes": result.notes,
        "items": rows,
        "found": result.found,
    }
    coded = _image_coded(arrays)
    packed = ("image",) if coded is not arrays else ()
    return arrays_as_bytes(coded, meta, packed)


def times_of(result: ImageResult) -> dict[str, dict[str, Any]]:
    """By column what `is_volatile` of its explanation."""
    return {
        item.column: {
            key: value for key, value in item.provenance.items() if is_volatile(key)
        }
        for item in result.items
    }


LOSSY_FROM = 1 << 14
"""Bytes from which what the model was shown is kept as a JPEG of quality 90: it is for
people, the maps are not touched."""


def _image_coded(arrays: dict[str, Array]) -> dict[str, Array]:
    image = arrays["image"]
    if image.nbytes < LOSSY_FROM or max(image.shape) > JPEG_SIDE:
        return arrays
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    coded = np.frombuffer(file.getvalue(), dtype=np.uint8)
    return {**arrays, "image": coded}


JPEG_SIDE = 65_500


def _image_decoded(image: Array) -> Array:
    if image.ndim == 3:
        return image
    with Image.open(io.BytesIO(image.tobytes()), formats=["JPEG", "WEBP"]) as file:
        return np.asarray(file.convert("RGB"))


def result_from(content: bytes, where: str, job: str | None = None) -> ImageResult:
    """Inverse of `result_bytes`; the image's own pixels are read again when somebody
    looks at them. `ConsilienceError` where it is damaged, or of another ``job``.
    """
    arrays, meta = arrays_from_bytes(content, where)
    if job is not None and meta.get("job") != job:
        raise ConsilienceError(f"{where} belongs to another job")
    try:
        arrays = _whole_maps(arrays)
        sample = SavedSample.of(meta["sample"])
        items = tuple(
            _read_item(sample, number, row, arrays)
            for number, row in enumerate(meta["items"])
        )
        return ImageResult(
            sample,
            _image_decoded(arrays["image"]),
            meta["prediction"],
            items,
            tuple(meta["notes"]),
            meta.get("found") or {},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ConsilienceError(f"{where} is damaged: {one_line(error)}") from None


def write_result(path: Path, result: ImageResult, job: str = "") -> None:
    """`result_bytes` as a file."""
    write_bytes(path, result_bytes(result, job))


def read_result(path: Path, job: str | None = None) -> ImageResult:
    """`result_from` of a file."""
    if not path.is_file():
        raise ConsilienceError(f"{path} does not exist")
    return result_from(path.read_bytes(), str(path), job)


def _read_item(
    sample: Sample, number: int, row: Mapping[str, Any], arrays: Mapping[str, Array]
) -> KeptExplanation:
    shape = row["shape"]
    bits = np.unpackbits(arrays[f"{number}.mask"], count=int(np.prod(shape)))
    mask = Mask(bits.astype(bool).reshape(shape), **row["mask"])
    explanation = explanation_from(sample, row, arrays, f"{number}.")
    return KeptExplanation(row["column"], explanation, mask)


@dataclass(frozen=True, eq=False)
class Found:
    """What a run's tables and audit need of a record: no maps."""

    name: str
    digest: str
    rows: list[dict[str, Any]]
    pairs: list[PairAgreement]
    seen: Mapping[str, Any]
    masks: Mapping[str, tuple[Packed, str]]


def found_in(content: bytes, where: str, masks: bool = True) -> Found:
    """The part of a record that goes into tables, without its maps."""
    arrays, meta = arrays_from_bytes(
        content, where, lambda name: masks and name.endswith(".mask")
    )
    try:
        found = meta["found"]
        packed = {
            row["column"]: (
                Packed(
                    arrays[f"{number}.mask"],
                    int(np.unpackbits(arrays[f"{number}.mask"]).sum()),
                    tuple(row["shape"]),
                ),
                row["model_id"],
            )
            for number, row in enumerate(meta["items"])
            if masks
        }
        return Found(
            meta["sample"]["name"],
            meta["sample"]["digest"],
            [_with_nan(row) for row in found["rows"]],
            [_pair_from(row) for row in found["pairs"]],
            found["seen"],
            packed,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConsilienceError(f"{where} is damaged: {one_line(error)}") from None


def _with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        key: float("nan") if value is None and key in FLOATS else value
        for key, value in row.items()
    }


FLOATS = frozenset({"score", "probability", "mask_area"})


def _pair_from(row: Mapping[str, Any]) -> PairAgreement:
    told: dict[str, Any] = {
        key: float("nan") if value is None else value for key, value in row.items()
    }
    return PairAgreement(**{**told, "notes": tuple(row["notes"])})


class Writer(RunFolder):
    """A run of explanations that is being made."""

    def __init__(
        self,
        folder: str | Path,
        parts: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, "explanations", parts, about)
        self._shelve()

    half = False
    """Whether maps are kept in 16 bits."""

    def _shelve(self) -> None:
        self.maps = Shelf(self.path / MAPS, RECORD)
        self.times = Shelf(self.path / TIMES, ".json")
        self.failed = Shelf(self.path / FAILED, ".json")

    @classmethod
    def joining(cls, folder: str | Path, digest: str) -> Writer:
        """For a worker: the folder is another process's, who has claimed it."""
        made = cls.__new__(cls)
        made.path, made.kind, made.digest = place(folder), "explanations", digest
        made.parts = {}
        made._shelve()
        return made

    def done(self, name: str, digest: str | None = None) -> bool:
        """Whether an earlier try of this job kept the image whole (and, with ``digest``,
        this very one).
        """
        stem = file_stem(name)
        try:
            content = self.maps.read(stem)
            if content is None:
                return False
            meta = checked_meta(content, str(self.maps.loose(stem)))
        except ConsilienceError as error:
            progress.say(f"{error}; made anew")
            self._forget(stem)
            return False
        if meta.get("job") != self.digest:
            return False
        return digest is None or meta["sample"]["digest"] == digest

    def _forget(self, stem: str) -> None:
        """A damaged file stands in the way of nothing."""
        with suppress(OSError):
            self.maps.loose(stem).unlink()

    def put(self, result: ImageResult, durable: bool = True) -> None:
        """Keep one image."""
        stem = file_stem(result.name)
        self.times.write(stem, as_json(times_of(result)), durable=False)
        content = result_bytes(result, self.digest, self.half)
        self.maps.write(stem, content, durable)
        with suppress(OSError):
            self.failed.loose(stem).unlink()

    def fail(self, name: str, reason: str) -> None:
        """Keep that an image failed; the next try tries it again."""
        self.failed.write(
            file_stem(name), as_json({"name": name, "reason": reason}), durable=False
        )

    def failure(self, name: str) -> str | None:
        """Why an image failed, where it did."""
        content = self.failed.read(file_stem(name))
        return None if content is None else str(json.loads(content)["reason"])

    def finish_tables(
        self,
        manifest: Mapping[str, Any],
        explanations: pd.DataFrame,
        agreement: pd.DataFrame,
        timings: pd.DataFrame | None = None,
    ) -> Run:
        """Write the tables, then the manifest."""
        write_table(self.path / EXPLANATIONS, explanations)
        write_table(self.path / AGREEMENT, agreement)
        if timings is not None:
            write_table(self.path / TIMINGS, timings)
        self.finish(manifest)
        return Run(self.path)


def checked_meta(content: bytes, where: str) -> dict[str, Any]:
    """The plain data of a record whose every part has its checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ConsilienceError(f"{where} is damaged: {one_line(error)}") from None
    if bad is not None:
        raise ConsilienceError(f"{where} is damaged: {bad} has another checksum")
    return arrays_from_bytes(content, where, lambda _: False)[1]


def as_json(thing: Any) -> bytes:
    """Plain data in as few bytes as JSON takes."""
    return json.dumps(
        json_ready(thing),
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    ).encode()


# ---- reading


class Run(Sequence[Explanation]):
    """A finished run, read from its folder as far as it is asked for.

    A sequence of its explanations, image after image in the order of the columns, and a
    mapping: ``run["cat", "LIME"]`` is one, ``run["cat"]`` a dict by column.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = place(folder)
        self.manifest = read_manifest(self.folder, "explanations")
        self._maps = Shelf(self.folder / MAPS, RECORD)
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
            stem = file_stem(name)
            content = self._maps.read(stem)
            if content is None:
                raise ConsilienceError(f"{self._maps.loose(stem)} does not exist")
            result = result_from(content, str(self._maps.loose(stem)))
            self._last = self._timed(result)
        return self._last

    def _timed(self, result: ImageResult) -> ImageResult:
        """With the times of its explanations, which are kept beside it."""
        known = self._times.get(result.name) or {}
        items = tuple(
            replace(
                item,
                explanation=replace(
                    item.explanation,
                    provenance={**item.provenance, **known.get(item.column, {})},
                ),
            )
            for item in result.items
        )
        return replace(result, items=items)

    @cached_property
    def _times(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By image and column, what is of the machine and the moment."""
        if not (self.folder / TIMINGS).is_file():
            return {}
        times: dict[str, dict[str, dict[str, Any]]] = {}
        rows = self.timings
        for sample, column, facts in zip(
            rows["sample"], rows["column"], rows["facts"], strict=True
        ):
            times.setdefault(sample, {})[column] = json.loads(facts)
        return times

    # -- tables

    def table(self) -> pd.DataFrame:
        """A row an explanation."""
        return self.explanations

    @cached_property
    def explanations(self) -> pd.DataFrame:
        """A row an explanation, with the seconds it took."""
        table = read_table(self.folder / EXPLANATIONS)
        if "seconds" in table or not (self.folder / TIMINGS).is_file():
            return table
        times = self.timings[["sample", "column", "seconds"]]
        return table.merge(times, on=["sample", "column"], how="left")

    @cached_property
    def timings(self) -> pd.DataFrame:
        """A row an explanation: ``seconds``, and as JSON in ``facts`` what else is of the
        machine and the moment, not of the work.
        """
        return read_table(self.folder / TIMINGS)

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

    def query(self, sql: str) -> Any:
        """The answer to a question in SQL, as DuckDB's relation (``.df()``, ``.pl()``,
        ``.arrow()``): see `runs.query.query`.
        """
        from consilience.runs.query import query

        return query(self.folder, sql)

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
