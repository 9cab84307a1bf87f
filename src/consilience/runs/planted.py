"""The planted suite in a folder: numbers and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consilience import api, registry
from consilience.evaluation import planted_suite
from consilience.files import write_bytes
from consilience.runs.folder import REPORT, RunFolder
from consilience.show.planted_page import planted_page


def run_planted(
    by: Sequence[str],
    metrics: Sequence[str],
    folder: str | Path,
    seed: int = 0,
    command: str = "",
) -> tuple[dict[str, Any], Path]:
    """Score methods and metrics on the planted suite into a folder, ``planted.json``
    and a page; returns the numbers and the page's path.

    Raises `ConsilienceError` where the folder holds anything but this job.
    """
    version = api.versions()["consilience"]
    explainers = [registry.explainers.build(spec) for spec in by]
    scorers = [registry.metrics.build(spec) for spec in metrics]
    place = RunFolder(
        folder,
        "planted",
        {
            "explainers": [registry.spell(one, full=True) for one in explainers],
            "metrics": [registry.spell(one, full=True) for one in scorers],
            "plug-in digest": registry.source_digest(explainers, scorers),
            "seed": seed,
            "version": version,
        },
        {"command": command},
    )
    found = planted_suite.evaluate_planted(by, metrics, seed=seed)
    place.finish({"version": version, "command": command, **found})
    page = place.path / REPORT
    write_bytes(page, planted_page(found, version, command).encode())
    return found, page
