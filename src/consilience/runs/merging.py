"""From the records of a run to its tables, its audit and its report.

Records are read in the order of the run, without their maps, whoever made them: one
process, several or a cluster give the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import pandas as pd

from consilience import api, progress, registry, study
from consilience.agreement.audit import Auditor
from consilience.agreement.masks import largest, pixels_of
from consilience.agreement.overlap import Agreement, iou, spearman
from consilience.files import file_stem
from consilience.runs.folder import (
    Found,
    Run,
    Writer,
    findings_as_rows,
    found_in,
    result_from,
)
from consilience.runs.sources import Source
from consilience.show import html
from consilience.study import RunColumn
from consilience.types import (
    ConsilienceError,
    Explanation,
    Model,
    Sample,
)

LOW = ("bf16", "f16")
APART = 32
"""Images up to which each keeps a file of its own; more are put into shards."""
MASKS_KEPT = 5000
"""Images whose masks the permutation of images looks at: of more, those with the lowest
digests, which no order of work changes."""


@dataclass(frozen=True)
class Merged:
    """What records say together."""

    rows: list[dict[str, Any]]
    agreement: Agreement
    auditor: Auditor
    timings: pd.DataFrame
    failures: list[dict[str, str]]
    digest: str


def missing_of(source: Source, writer: Writer) -> list[int]:
    """Places of the images that no try has kept yet."""
    return [place for place, name in enumerate(source.names) if not writer.done(name)]


def merge_records(source: Source, writer: Writer, allow_mismatch: bool) -> Merged:
    """Read every record once, in order."""
    agreement, auditor = Agreement(allow_mismatch=allow_mismatch), Auditor()
    rows: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    digest = blake2b(digest_size=16)
    kept = _with_masks(source.names)
    with progress.task("merging", len(source.names)) as running:
        for place, name in enumerate(source.names):
            found = _found(writer, name, kept is None or place in kept)
            if found is None:
                reason = writer.failure(name) or "was not made"
                failures.append({"name": name, "reason": reason})
            else:
                digest.update(found[1])
                one = found[0]
                auditor.take(one.seen)
                agreement.take(one.name, one.pairs, one.masks)
                rows += one.rows
                timings += list(_timings(writer, one))
            running.advance()
    return Merged(
        rows,
        agreement,
        auditor,
        pd.DataFrame(timings, columns=["sample", "column", "seconds", "facts"]),
        failures,
        digest.hexdigest(),
    )


def _with_masks(names: Sequence[str]) -> set[int] | None:
    """Places of the images whose masks are kept; None for all."""
    if len(names) <= MASKS_KEPT:
        return None
    drawn = sorted(
        range(len(names)),
        key=lambda place: blake2b(names[place].encode(), digest_size=8).digest(),
    )
    return set(drawn[:MASKS_KEPT])


def _found(writer: Writer, name: str, masks: bool) -> tuple[Found, bytes] | None:
    stem = file_stem(name)
    try:
        content = writer.maps.read(stem)
        if content is None:
            return None
        found = found_in(content, str(writer.maps.loose(stem)), masks)
    except ConsilienceError as error:
        progress.say(str(error))
        return None
    return found, blake2b(content, digest_size=16).digest()


def _timings(writer: Writer, found: Found) -> Iterator[dict[str, Any]]:
    content = writer.times.read(file_stem(found.name))
    known: Mapping[str, Any] = json.loads(content) if content is not None else {}
    for row in found.rows:
        facts = known.get(row["column"]) or {}
        seconds = facts.get("seconds")
        yield {
            "sample": found.name,
            "column": row["column"],
            "seconds": float("nan") if seconds is None else float(seconds),
            "facts": json.dumps(facts, sort_keys=True, ensure_ascii=False),
        }


def pack_records(source: Source, writer: Writer) -> None:
    """Many small files become few: shards in the order of the run."""
    if len(source.names) <= APART:
        return
    stems = [file_stem(name) for name in source.names]
    for shelf in (writer.maps, writer.times):
        shelf.pack_all(stems)


# ---- the run as a whole


def finish_run(
    merged: Merged,
    source: Source,
    writer: Writer,
    models: Sequence[Model],
    job: Any,
    record: Mapping[str, Any],
    command: str,
) -> Run:
    """Tables, audit, manifest and report."""
    if not merged.rows:
        reasons = "; ".join(one["reason"] for one in merged.failures[:3])
        raise ConsilienceError(
            f"none of {len(merged.failures)} images could be explained: {reasons}"
        )
    table, summary = merged.agreement.table(), merged.agreement.summary()
    if job.published:
        table = study.with_published(table)
    pack_records(source, writer)
    manifest = {
        "version": api.versions()["consilience"],
        "versions": api.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "title": job.title,
        "note": job.note,
        "preset": job.preset,
        "target": job.target,
        "allow_mismatch": job.allow_mismatch,
        "model": model_facts(models[0], merged.rows),
        "models": [
            model_facts(model, merged.rows) for model in dict.fromkeys(models)
        ],
        "precision": _precision(merged, source, writer, models, job.columns),
        "columns": _columns(job.columns, merged.rows),
        "seconds": record.get("seconds"),
        "record": dict(record),
        "content": merged.digest,
        "failures": merged.failures,
        "summary": summary.to_dict("records"),
        "audit": findings_as_rows(merged.auditor.findings(table, summary)),
    }
    finished = writer.finish_tables(
        manifest, pd.DataFrame(merged.rows), table, merged.timings
    )
    html.write_report(finished)
    return finished


def _columns(
    columns: Sequence[RunColumn], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    first = {row["column"]: row for row in reversed(rows)}
    return [
        {
            "name": column.label,
            "explainer": column.by,
            "full": registry.spell(column.explainer, full=True),
            "model": first[column.label]["model"],
            "view": first[column.label]["view"],
            "mask": first[column.label]["mask_rule"],
            "unseeded": column.unseeded,
        }
        for column in columns
    ]


def model_facts(model: Model, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a model; engine and precision are those of the
    explanations that were made with it.
    """
    mine = [row for row in rows if row["model"] == model.id and row["passes"]]
    ran = {
        key: "+".join(sorted({part for row in mine for part in row[key].split("+")}))
        for key in ("engine", "precision")
    }
    facts = model.facts | {key: said for key, said in ran.items() if said}
    return {
        "spec": model.spec,
        "id": model.id,
        "facts": facts,
        "classes_count": len(model.classes),
    }


# ---- did the precision change the explanation?


def _precision(
    merged: Merged,
    source: Source,
    writer: Writer,
    models: Sequence[Model],
    columns: Sequence[RunColumn],
) -> list[dict[str, Any]]:
    """`precision_shifts` of the first image that was explained."""
    if not any(model.facts.get("precision") in LOW for model in models):
        return []
    name = merged.rows[0]["sample"]
    content = writer.maps.read(file_stem(name))
    sample = source.read(list(source.names).index(name))
    if content is None or not isinstance(sample, Sample):
        return []
    kept = result_from(content, name)
    made = [replace(item.explanation, sample=sample) for item in kept.items]
    return precision_shifts(columns, models, made)


def precision_shifts(
    columns: Sequence[RunColumn],
    models: Sequence[Model],
    explanations: Sequence[Explanation],
) -> list[dict[str, Any]]:
    """Rows for the explanations of one image by models of low precision: how far each
    lies from the same made in f32.
    """
    low = [model.facts.get("precision") in LOW for model in models]
    exact = {
        model: model.using(precision="f32")
        for model, is_low in zip(models, low, strict=True)
        if is_low
    }
    return [
        precision_shift(column, exact[model], explanation)
        for column, model, explanation, is_low in zip(
            columns, models, explanations, low, strict=True
        )
        if is_low
    ]


def precision_shift(
    column: RunColumn, exact: Model, explanation: Explanation
) -> dict[str, Any]:
    """Rank correlation, and IoU of the top 20 %, of a map with that of the ``exact``
    model for the same target.
    """
    sample = explanation.sample
    outputs = api.raw_outputs(exact, exact.view(sample, column.view))
    index = explanation.target.index
    target = api.target_of_image(
        exact, sample, explanation.target if index is None else int(index), outputs
    )
    again = api.explain(exact, sample, column.explainer, target, column.view)
    maps = [one.values for one in (explanation, again)]
    tops = [largest(values, pixels_of(0.2, values.size)) for values in maps]
    return {
        "column": column.label,
        "spearman": spearman(*maps),
        "iou_at_20": iou(*tops),
        "image": sample.name,
        "precision": explanation.provenance["precision"],
        "exact": again.provenance["precision"],
    }
