"""An evaluation on disk, inside its run's folder.

``metrics/NAME.json`` holds every number of one image, with curves and facts, and is
what makes an image done: written whole or not at all, metric by column, each under a
key that changes with all it depends on. ``metrics.parquet`` is the table of what was
asked (sample, column, metric, value, reason ...), ``evaluation.json`` the summary,
written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from consilience import progress
from consilience.evaluation.summary import as_table
from consilience.files import (
    file_stem,
    json_ready,
    read_json,
    read_table,
    write_bytes,
    write_table,
)
from consilience.runs.folder import MANIFESTS, SCHEMAS, read_manifest, write_manifest
from consilience.show import evaluation_page, words
from consilience.types import Array, ConsilienceError, NotApplicable, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES, TABLE = "metrics", "metrics.parquet"
DIGITS = 7


@dataclass(frozen=True, eq=False)
class KeptScore:
    """One number as it is kept; ``value`` is None where the metric does not apply, and
    then ``code`` and ``reason`` say why (see `NotApplicable`).
    """

    key: str
    value: float | None
    code: str = ""
    reason: Mapping[str, Any] = field(default_factory=dict)
    curve: Array | None = None
    facts: Mapping[str, Any] | None = None


def as_kept(key: str, score: Score | NotApplicable) -> KeptScore:
    """A score, or why there is none."""
    if isinstance(score, NotApplicable):
        return KeptScore(key, None, score.code, _plain_facts(score.facts))
    return KeptScore(
        key, float(score.value), curve=score.curve, facts=dict(score.facts)
    )


class ImageScores:
    """The numbers of one image: read from its file, added to, written again."""

    def __init__(self, folder: Path, name: str, digest: str) -> None:
        self.path = folder / IMAGES / f"{file_stem(name)}.json"
        self.name, self.digest = name, digest
        self._scores = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """What is there and of this image; a damaged file is said and made anew."""
        if not self.path.is_file():
            return {}
        try:
            there = read_json(self.path)
        except ConsilienceError as error:
            progress.say(f"{error}; made anew")
            return {}
        same = there.get("schema") == SCHEMAS["evaluation"]
        scores = there.get("scores") if there.get("digest") == self.digest else None
        return scores if same and isinstance(scores, dict) else {}

    def get(
        self, metric: str, column: str, key: str | None = None
    ) -> KeptScore | None:
        """A number under its metric's full spelling and its column, if it is there and,
        with ``key``, was made of the same.
        """
        row = self._scores.get(metric, {}).get(column)
        if row is None or (key is not None and row["key"] != key):
            return None
        curve = (
            None
            if row.get("curve") is None
            else np.array(row["curve"], dtype=np.float64)
        )
        return KeptScore(
            row["key"],
            row["value"],
            row.get("code", ""),
            row.get("reason") or {},
            curve,
            row.get("facts"),
        )

    def put(self, metric: str, column: str, kept: KeptScore) -> None:
        """Add a number; `write` keeps it."""
        row: dict[str, Any] = {
            "key": kept.key,
            "value": kept.value,
        }
        if kept.code:
            row |= {"code": kept.code, "reason": dict(kept.reason)}
        if kept.curve is not None:
            row["curve"] = _rounded(kept.curve)
        if kept.facts:
            row["facts"] = _plain_facts(kept.facts)
        self._scores.setdefault(metric, {})[column] = row

    def write(self) -> None:
        """The file, whole or not at all."""
        thing = {
            "schema": SCHEMAS["evaluation"],
            "name": self.name,
            "digest": self.digest,
            "scores": self._scores,
        }
        text = json.dumps(
            json_ready(thing),
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        write_bytes(self.path, text.encode())


def _rounded(curve: Array) -> Any:
    """A curve as lists of numbers of seven digits; NaN becomes null."""
    return json_ready(
        np.array(
            [
                float(f"{value:.{DIGITS}g}")
                for value in np.asarray(curve, dtype=np.float64).ravel()
            ]
        ).reshape(np.shape(curve))
    )


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that JSON can hold: numbers, words, short lists."""
    return {
        str(key): json_ready(value)
        for key, value in facts.items()
        if not (isinstance(value, np.ndarray) and value.size > 1000)
    }


class Evaluation:
    """A finished evaluation, read from its run's folder as far as it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFESTS["evaluation"]).is_file():
            raise ConsilienceError(
                f"{self.folder} holds no evaluation; make one with consilience evaluate "
                f"{self.folder}"
            )
        self.summary = read_manifest(self.folder, "evaluation")
        """What was asked and found; see `evaluation.summary`."""

    def table(self) -> pd.DataFrame:
        """A row an image, column and metric: ``value`` (NaN where it does not apply)
        and ``reason``.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        return read_table(self.folder / TABLE)

    def figure(self, metric: str | None = None) -> Figure:
        """Means with 95 % intervals of every map by one metric (the first with a number
        unless given), controls in grey.
        """
        return evaluation_page.metric_figure(self.summary, metric)

    def _repr_html_(self) -> str:
        return evaluation_page.evaluation_html(self.summary)

    def images(self) -> Iterator[ImageScores]:
        """The images' own files, one after the other."""
        rows = self._table.drop_duplicates("sample")
        for name, digest in zip(rows["sample"], rows["digest"], strict=True):
            yield ImageScores(self.folder, str(name), str(digest))


def finish_evaluation(
    folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Evaluation:
    """Write the table, with the reasons in words, then the summary."""
    table = as_table(rows)
    facts = [json.loads(text) for text in table["facts"]]
    table["reason"] = [
        words.reason_sentence(code, known) if code else ""
        for code, known in zip(table["code"], facts, strict=True)
    ]
    write_table(folder / TABLE, table)
    write_manifest(folder, "evaluation", summary)
    return Evaluation(folder)
