"""Explanations as arrays and plain data, and back: what a file of one keeps, and what a
run keeps of many.

Arrays go by name into an ``.npz``, everything else as JSON under ``meta``. Nothing is
pickled. The image is kept whole, or by its digest and the file it came from: then it is
read again when somebody looks at it, and refused if it has changed.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from consilience import images, targets
from consilience.files import json_ready, write_bytes
from consilience.images import Placement
from consilience.types import Array, Box, ConsilienceError, Explanation, Sample

EXPLANATION_SCHEMA = "explanation 1"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy, zipfile and json raise on a damaged file."""


class SavedSample(Sample):
    """A sample whose pixels are read when somebody looks at them.

    Only its digest is known from the start. ``read`` gives the pixels; other pixels
    than those that were explained raise `ConsilienceError`.
    """

    @classmethod
    def of(
        cls, facts: Mapping[str, Any], read: Callable[[], Array] | None = None
    ) -> SavedSample:
        """A sample from `sample_facts`; without ``read`` its source is read."""
        sample = object.__new__(cls)
        # the fields of a frozen dataclass, without its check of pixels
        sample.__dict__.update(
            name=facts["name"],
            label=facts.get("label"),
            boxes=tuple(Box(**box) for box in facts.get("boxes", ())),
            masks={},
            notes=tuple(facts.get("notes", ())),
            source=facts.get("source", ""),
            value_range=tuple(facts["value_range"])
            if facts.get("value_range")
            else None,
            display=None,
            digest=facts["digest"],
            _read_for=int(facts.get("read_for", 3)),
            _read=read or sample._from_source,
        )
        return sample

    def __getattr__(self, name: str) -> Any:
        if name != "pixels":
            raise AttributeError(name)
        self.__dict__["pixels"] = pixels = self._read()
        return pixels

    def _from_source(self) -> Array:
        if not self.source:
            raise ConsilienceError(
                f"the image {self.name!r} was not saved, only its digest"
            )
        if not Path(self.source).is_file():
            raise ConsilienceError(
                f"the image {self.source} is not where it was when it was explained"
            )
        read = images.read_sample(
            self.source, self.name, self._read_for, self.value_range
        )
        if read.digest != self.digest:
            raise ConsilienceError(
                f"{self.name} is another image than the one that was explained "
                f"({self.source})"
            )
        return read.pixels


def sample_facts(sample: Sample) -> dict[str, Any]:
    """What is kept of a sample besides its pixels and masks."""
    return {
        "name": sample.name,
        "digest": sample.digest,
        "label": sample.label,
        "boxes": [asdict(box) for box in sample.boxes],
        "notes": list(sample.notes),
        "source": str(Path(sample.source).resolve()) if sample.source else "",
    } | _other_than_plain(sample)


def _other_than_plain(sample: Sample) -> dict[str, Any]:
    """What is kept of a sample that is not an 8-bit RGB image: how its file is read
    again, and which values are 0 and 1.
    """
    if isinstance(sample, SavedSample):
        channels = int(sample._read_for)
    elif sample.plain:
        channels = 3
    else:
        channels = sample.channels
    if channels == 3 and sample.value_range is None:
        return {}
    return {"read_for": channels, "value_range": sample.value_range}


def explanation_facts(explanation: Explanation) -> dict[str, Any]:
    """Everything of an explanation that is not an array and not its sample."""
    target = explanation.target
    return {
        "model_id": explanation.model_id,
        "explainer": explanation.explainer,
        "target": {
            "index": target.index,
            "name": target.name,
            **targets.target_facts(target),
        },
        "geometry": explanation.geometry.as_dict(),
        "provenance": dict(explanation.provenance),
    }


def explanation_arrays(
    explanation: Explanation, prefix: str = ""
) -> dict[str, Array]:
    """Its raw map and extras by name."""
    extras = {
        f"{prefix}extras.{key}": np.asarray(value)
        for key, value in explanation.extras.items()
    }
    return {f"{prefix}values": explanation.values, **extras}


def explanation_from(
    sample: Sample,
    facts: Mapping[str, Any],
    arrays: Mapping[str, Array],
    prefix: str = "",
) -> Explanation:
    """Inverse of `explanation_facts` and `explanation_arrays`."""
    target = facts["target"]
    start = f"{prefix}extras."
    provenance = dict(facts["provenance"])
    for name in ("score", "seconds"):  # JSON has no NaN
        if name in provenance and provenance[name] is None:
            provenance[name] = float("nan")
    return Explanation(
        sample,
        facts["model_id"],
        facts["explainer"],
        targets.target_from_facts(target["index"], target["name"], target),
        Placement.from_dict(dict(facts["geometry"])),
        arrays[f"{prefix}values"],
        {
            key.removeprefix(start): value
            for key, value in arrays.items()
            if key.startswith(start)
        },
        provenance,
    )


# ---- files


def arrays_as_bytes(
    arrays: Mapping[str, Array],
    meta: Mapping[str, Any],
    packed_already: Collection[str] = (),
) -> bytes:
    """An ``.npz`` of arrays and plain data; the same things give the same bytes. Arrays
    that are ``packed_already`` are not compressed again.

    Float32 maps are kept as `planes` where that is smaller: it halves a smooth one.
    """
    kept: dict[str, Array] = {}
    for name, array in arrays.items():
        coded = planes(array) if _is_map(array) else None
        if coded is not None and _squeezed(coded[:, ::ROWS]) < _squeezed(
            array[::ROWS]
        ):
            kept[f"{name}{PLANES}"] = coded
        else:
            kept[name] = array
    text = json.dumps(json_ready(meta), ensure_ascii=False, allow_nan=False).encode()
    kept["meta"] = np.frombuffer(text, dtype=np.uint8)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as into:
        for name, array in kept.items():
            content = io.BytesIO()
            np.lib.format.write_array(
                content, np.asanyarray(array), allow_pickle=False
            )
            packed = name not in packed_already
            into.writestr(
                zipfile.ZipInfo(f"{name}.npy"),  # without a date
                content.getbuffer(),
                zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED,
                LEVEL,
            )
    return file.getvalue()


LEVEL = 4
"""How hard is compressed: at 6 a map takes a tenth less and twice the time."""
PLANES = ":planes"
"""What the name of an array ends with that is kept as `planes`."""


ROWS = 16
"""Which rows of a map tell whether `planes` makes it smaller."""


def _is_map(array: Array) -> bool:
    return array.dtype == np.float32 and array.ndim == 2 and array.size > 1


def _squeezed(array: Array) -> int:
    return len(zlib.compress(np.ascontiguousarray(array).tobytes(), 1))


def planes(values: Array) -> Array:
    """A map (h, w) float32 as (4, h, w) uint8, without loss: the differences of its bit
    patterns down and across, byte by byte. Neighbours of a smooth map share their high
    bytes, so that most are 0.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    across = bits.copy()
    across[:, 1:] -= bits[:, :-1]
    down = across.copy()
    down[1:] -= across[:-1]
    low_first = down.astype("<u4").view(np.uint8).reshape(*values.shape, 4)
    return np.ascontiguousarray(low_first.transpose(2, 0, 1))


def from_planes(coded: Array) -> Array:
    """Inverse of `planes`."""
    low_first = np.ascontiguousarray(coded.transpose(1, 2, 0))
    down = low_first.view("<u4")[:, :, 0].astype(np.uint32)
    across = np.cumsum(down, axis=0, dtype=np.uint32)
    return np.cumsum(across, axis=1, dtype=np.uint32).view(np.float32)


def write_arrays(
    path: Path, arrays: Mapping[str, Array], meta: Mapping[str, Any]
) -> None:
    """An ``.npz`` of arrays and plain data, whole or not at all."""
    write_bytes(path, arrays_as_bytes(arrays, meta))


def read_arrays(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inverse of `write_arrays`; `ConsilienceError` where the file is missing or
    damaged.
    """
    if not path.is_file():
        raise ConsilienceError(f"{path} does not exist")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConsilienceError(f"{path} cannot be read: {one_line(error)}") from None
    return arrays_from_bytes(content, str(path))


def arrays_from_bytes(
    content: bytes, where: str, only: Callable[[str], bool] = lambda _: True
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inverse of `arrays_as_bytes`, of those arrays whose name is wanted; ``where`` is
    for the error.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {
                name.removesuffix(PLANES): from_planes(file[name])
                if name.endswith(PLANES)
                else file[name]
                for name in file.files
                if name != "meta" and only(name.removesuffix(PLANES))
            }
            meta = json.loads(file["meta"].tobytes())
    except (*UNREADABLE, AttributeError, TypeError, RecursionError) as error:
        raise ConsilienceError(
            f"{where} is damaged or no file of explanations: {one_line(error)}"
        ) from None
    if not isinstance(meta, dict):
        raise ConsilienceError(f"{where} is damaged or no file of explanations")
    return arrays, meta


def one_line(error: BaseException) -> str:
    """An exception's words without line breaks, at most 160 letters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def save_explanation(explanation: Explanation, path: str | Path, image: bool) -> Path:
    """`Explanation.save`."""
    file = Path(path)
    file = file if file.suffix == ".npz" else file.with_name(f"{file.name}.npz")
    arrays = explanation_arrays(explanation)
    if image:
        arrays["image"] = explanation.sample.pixels
        if explanation.sample.display is not None:
            arrays["display"] = explanation.sample.display
        arrays |= {
            f"mask.{name}": on for name, on in explanation.sample.masks.items()
        }
    meta = {
        "schema": EXPLANATION_SCHEMA,
        "sample": sample_facts(explanation.sample),
        **explanation_facts(explanation),
    }
    write_arrays(file, arrays, meta)
    return file


def load_explanation(path: str | Path) -> Explanation:
    """`Explanation.load`."""
    arrays, meta = read_arrays(Path(path))
    if meta.get("schema") != EXPLANATION_SCHEMA:
        raise ConsilienceError(
            f"{path} is not one explanation that this version reads (schema "
            f"{meta.get('schema')!r}; it reads {EXPLANATION_SCHEMA!r})"
        )
    try:
        return explanation_from(_saved_sample(meta["sample"], arrays), meta, arrays)
    except UNREADABLE as error:
        raise ConsilienceError(f"{path} is damaged: {one_line(error)}") from None


def _saved_sample(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> Sample:
    if "image" not in arrays:
        return SavedSample.of(facts)
    return Sample(
        facts["name"],
        arrays["image"],
        facts["label"],
        tuple(Box(**box) for box in facts["boxes"]),
        {
            key.removeprefix("mask."): on
            for key, on in arrays.items()
            if key.startswith("mask.")
        },
        tuple(facts["notes"]),
        facts["source"],
        tuple(facts["value_range"]) if facts.get("value_range") else None,
        arrays.get("display"),
    )
