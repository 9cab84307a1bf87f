"""What a run will take, told by a short probe of this machine.

A few of the job's own images are made in a folder that is thrown away: their time, passes
and bytes are those of the rest.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consilience import progress
from consilience.runs.explain import channels_of, load_models, run_explanations
from consilience.runs.folder import Run
from consilience.runs.jobfile import Work
from consilience.runs.sources import source_of
from consilience.show import words
from consilience.types import ConsilienceError, Sample

PROBED = 8
"""Images of a probe: a pass of the methods that take several at a time."""


@dataclass(frozen=True)
class Estimate:
    """What one run will take.

    ``seconds`` of making with the workers that were asked for (tables and report come
    after), ``passes`` through the network, ``memory`` bytes of one process, ``disk``
    bytes in all; ``probed`` images were made in ``took`` seconds.
    """

    folder: str
    images: int
    columns: tuple[str, ...]
    network: str
    metrics: int
    seconds: float
    passes: float
    memory: int
    disk: int
    probed: int
    took: float


def estimate(work: Work) -> list[Estimate]:
    """An estimate of each run of a job."""
    return [_of_run(work, folder, job) for folder, job in work.jobs]


def _of_run(work: Work, folder: str, job: Any) -> Estimate:
    models = load_models(job, work.options)
    source = source_of(
        work.images,
        work.truth,
        models[0].classes,
        channels_of(models),
        value_range=job.value_range,
    )
    samples = _readable(source)
    place = Path(tempfile.mkdtemp(prefix="consilience-probe-"))
    probed = words.count_of(len(samples), "image")
    progress.say(f"{folder}: a probe with {probed} of {len(source.names)}")
    start = time.perf_counter()
    try:
        with progress.silent():
            _made(work, job, models, samples[:1], place / "first")
            again = samples[1:] or samples[:1]
            made = _made(work, job, models, again, place / "again")
        seconds = float(made.manifest["seconds"])
        passes = float(made.explanations["passes"].sum()) / len(again)
        kept = sum(
            file.stat().st_size
            for name in ("maps", "panels", "metrics", "times")
            for file in (place / "again" / name).rglob("*")
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    count = len(source.names)
    workers = max(1, work.how.workers)
    return Estimate(
        folder,
        count,
        tuple(column.label for column in job.columns),
        models[0].id,
        0 if work.asked is None else len(work.asked.metrics),
        seconds / len(again) * count / workers,
        passes * count,
        _peak_memory(),
        int(kept / len(again) * count),
        len(samples),
        time.perf_counter() - start,
    )


def _readable(source: Any) -> list[Sample]:
    """The first images that can be read."""
    found: list[Sample] = []
    for place in range(min(len(source.names), 4 * PROBED)):
        sample = source.read(place)
        if isinstance(sample, Sample):
            found.append(sample)
        if len(found) > PROBED:
            break
    if not found:
        raise ConsilienceError(
            f"none of the first images can be read: {source.read(0).reason}"
        )
    return found


def _made(
    work: Work, job: Any, models: Any, samples: Sequence[Sample], folder: Path
) -> Run:
    from consilience.runs.evaluate import scoring_of

    how = replace(
        work.how, workers=1, cluster=None, shard=None, reuse=(), panels=False
    )
    after = None
    if work.asked is not None:
        models, after = scoring_of(work.asked, folder, job, models)
    made = run_explanations(
        job,
        samples,
        folder,
        options=work.options,
        models=models,
        after=after,
        how=how,
    )
    assert made is not None, "a whole run, not a part"
    return made


def _peak_memory() -> int:
    """The most bytes that this process has had; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
