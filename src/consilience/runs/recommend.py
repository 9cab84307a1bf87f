"""Which explainers to use for a network, in a folder: a run of candidates on one's own
images, its evaluation on several kinds of evidence, and what that shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from consilience import api, data, inputs, progress, registry
from consilience.evaluation.columns import is_control
from consilience.evaluation.recommendation import (
    Cost,
    Recommendation,
    recommendation,
)
from consilience.files import json_ready, write_bytes, write_json
from consilience.metrics.suites import asked_metrics
from consilience.models.load import as_model
from consilience.runs.evaluate import Asked, evaluate_images
from consilience.runs.explain import job_from_specs
from consilience.runs.folder import Run
from consilience.runs.scores import Evaluation
from consilience.types import (
    ConsilienceError,
    Explainer,
    Model,
    Sample,
    unexpected,
)

CANDIDATES = (
    "gradcam",
    "hirescam",
    "layercam",
    "ablationcam",
    "integrated-gradients:steps=20",
    "smoothgrad:samples=20",
    "occlusion",
    "lime:samples=256",
    "attnlrp",
    "generic-attention",
)
"""A few of each kind; methods of attention are for transformers, the others that fail
on one are said.
"""
METRICS = (
    "planted-mark",
    "grid-pointing:sure=0.7",
    "insertion:steps=10",
    "deletion:steps=10",
)
SUITE = "recommend"
PAGE, DATA, TABLE = "recommend.html", "recommendation.json", "recommendation.csv"
TRIED = 8
"""Images of which the first that can be read shows what works on a network."""


def recommend(
    model: Any,
    images: Any,
    by: Sequence[str | Explainer] = CANDIDATES,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Recommendation:
    """Which of the explainers ``by`` to use for a network, as far as its own images
    show: evidence planted in its own features, mosaics, edited images, and cost.

    ``model`` and ``images`` are those of `explain`. Explainers that do not work on the
    network are left out and named in ``refused``. ``metrics`` are the kinds of evidence;
    no score adds them up. ``folder`` keeps the run, its report and the page; the same
    call goes on where it stopped. Raises `ConsilienceError` where fewer than two
    explainers work.
    """
    network = as_model(model)
    again = inputs.Again.of(images, inputs.Shown.of(network))
    with ExitStack() as kept:
        if folder is None:
            temporary = Path(kept.enter_context(tempfile.TemporaryDirectory()))
            place = temporary / "run"
        else:
            place = Path(folder)
        return _made(network, (), again, by, metrics, seed, place, "")[0]


def run_recommend(
    model: Model,
    paths: Sequence[str | Path],
    by: Sequence[str],
    metrics: Sequence[str],
    folder: str | Path,
    seed: int = 0,
    command: str = "",
) -> tuple[Recommendation, Path]:
    """`recommend` of files into a folder; returns what was found and the page."""
    return _made(model, paths, None, by, metrics, seed, Path(folder), command)


def _made(
    model: Model,
    paths: Sequence[str | Path],
    again: inputs.Again | None,
    by: Sequence[str | Explainer],
    metrics: Sequence[str],
    seed: int,
    folder: Path,
    command: str,
) -> tuple[Recommendation, Path]:
    from consilience.show.recommend_page import recommend_page

    asked = Asked(asked_metrics(metrics), SUITE, seed)
    shown = inputs.Shown.of(model)
    samples = again or data.read_samples(
        list(paths), classes=shown.classes, channels=shown.channels
    )
    working, refused = _that_work(model, _first_of(samples), by)
    job = job_from_specs(working)
    evaluation = evaluate_images(
        asked,
        job,
        paths,
        folder,
        command=command,
        models=[model] * len(job.columns),
        again=again,
    )
    assert evaluation is not None
    found = recommendation(evaluation.summary, _costs(evaluation), refused)
    write_json(evaluation.folder / DATA, as_dict(found))
    table = found.table().to_csv(index=False)
    write_bytes(evaluation.folder / TABLE, table.encode())
    page = evaluation.folder / PAGE
    version = api.versions()["consilience"]
    text = recommend_page(
        found, model.id, evaluation.summary["images"], version, command
    )
    write_bytes(page, text.encode())
    return found, page


def _first_of(samples: Any) -> Sample:
    """The first image that can be read."""
    for one in islice(iter(samples), TRIED):
        if isinstance(one, Sample):
            return one
    raise ConsilienceError(f"none of the first {TRIED} images could be read")


def _that_work(
    model: Model, sample: Sample, by: Sequence[str | Explainer]
) -> tuple[list[str | Explainer], dict[str, str]]:
    """Explainers that explain an image, and why the others do not."""
    working: list[str | Explainer] = []
    refused: dict[str, str] = {}
    with progress.task("trying explainers", len(by)) as running:
        for spec in dict.fromkeys(by):
            name = registry.spell(registry.explainers.build(spec))
            if is_control(name):
                raise ConsilienceError(
                    f"{name} is a control: it is held against every explainer and is none "
                    "to choose"
                )
            try:
                api.explain(model, sample, spec)
                working.append(spec)
            except ConsilienceError as error:
                refused[name] = str(error)
            except progress.Cancelled:
                raise
            except Exception as error:
                refused[name] = unexpected(error)
            running.advance()
    if len(working) < 2:
        why = "; ".join(f"{name}: {said}" for name, said in refused.items())
        raise ConsilienceError(
            f"recommend compares explainers, and {len(working)} of {len(by)} "
            f"{'works' if len(working) == 1 else 'work'} on {model.id}"
            + (f" ({why})" if why else "")
        )
    return working, refused


def _costs(evaluation: Evaluation) -> dict[str, Cost]:
    """Medians over the run's images."""
    table = Run(evaluation.folder).explanations
    return {
        str(label): Cost(
            float(part["passes"].median()), float(part["seconds"].median())
        )
        for label, part in table.groupby("column")
    }


def as_dict(found: Recommendation) -> dict[str, Any]:
    """A recommendation as plain data."""
    told: dict[str, Any] = json_ready(
        {
            "left": list(found.left),
            "unproven": list(found.unproven),
            "undecided": [list(pair) for pair in found.undecided()],
            "reachable": found.reachable,
            "methods": list(_methods(found)),
            "contests": [asdict(one) for one in found.contests],
            "metrics": [dict(one) for one in found.metrics],
            "refused": dict(found.refused),
        }
    )
    return told


def _methods(found: Recommendation) -> Iterator[dict[str, Any]]:
    for one in found.standings:
        cells = {
            name: {key: cell[key] for key in ("n", "mean", "low", "high", "above")}
            for name, cell in one.cells.items()
        }
        yield {
            "method": one.label,
            "spec": one.spec,
            "passes": one.cost.passes,
            "seconds": one.cost.seconds,
            "above_controls": list(one.above),
            "beaten_by": {name: list(on) for name, on in one.beaten_by.items()},
            "numbers": cells,
        }
