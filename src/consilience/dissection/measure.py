"""Network dissection from end to end: two passes over the images, whatever the number
of layers, then the null.

The first pass finds the quantile of every unit and its top images, the second counts.
Images are read ahead by two threads. Memory: `SKETCHES` bytes of quantile sketches,
counts (units x concepts), one batch of maps, two batches of images, and what the null
gathers; none of it but the last grows with the number of images, and that ends at
``null_images``.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import progress
from consilience.dissection.coarse import Gatherer, chosen_images, finest_grid
from consilience.dissection.concepts import (
    ConceptSet,
    Labels,
    concept_digest,
    load_concepts,
)
from consilience.dissection.nulls import results, with_random_weights
from consilience.dissection.quantiles import LEAST_VALUES, TailSketch
from consilience.dissection.result import (
    ConceptFacts,
    Dissection,
    LayerResult,
    NullResult,
    concept_facts,
)
from consilience.dissection.tally import (
    Counts,
    LabelCounts,
    ShownLabels,
    Tops,
    Union,
    Upsample,
)
from consilience.files import write_atomically
from consilience.models.features import Features
from consilience.registry import option, unknown
from consilience.types import (
    Array,
    ConsilienceError,
    Layer,
    Network,
    NotApplicable,
    ViewMode,
)

SKETCHES = 96 << 20
"""Bytes that the sketches of all layers keep at most."""

READERS = 2
KEEP_EVERY = 30.0
"""Seconds between two writings of the resume state."""


@dataclass(frozen=True)
class DissectionOptions:
    """What can be chosen of a dissection."""

    min_images: int = option(20, help="images a concept needs to be a label")
    quantile: float = option(
        0.995,
        help="a unit's mask is above this quantile of its activations over all images",
    )
    threshold: float = option(0.04, help="a detector's IoU is over this")
    level: float = option(
        0.05, help="false discovery rate of a layer's significant units"
    )
    upsample: Upsample = option(
        "half-pixel",
        help="how maps are enlarged: half-pixel, align_corners, netdissect",
    )
    union: Union = option(
        "paper",
        help="images that count: annotated for the category (paper), or hit there too (lite)",
    )
    view: ViewMode = option("squash", help="how images are shown: squash or crop")
    top: int = option(10, help="top images kept for every unit")
    permutations: int = option(999, help="permutations of the null; 0 for none")
    null_grid: int = option(
        0,
        help="cells a side of the null's grid; 0 for that of the labels, or the finest "
        "that fits into memory",
    )
    null_images: int = option(5000, help="images that the null looks at, at most")
    resamples: int = option(200, help="bootstrap resamples for alternative labels")
    seed: int = option(0, help="of permutations, resamples and random weights")

    def __post_init__(self) -> None:
        if (
            min(self.top, self.permutations, self.resamples, self.null_grid) < 0
            or self.null_images < 1
        ):
            raise ConsilienceError(
                "dissect: top, permutations, resamples and null_grid from 0, null_images "
                "from 1"
            )
        if not (
            0 < self.quantile < 1 and 0 <= self.threshold < 1 and 0 < self.level < 1
        ):
            raise ConsilienceError(
                f"dissect: quantile, threshold and level lie between 0 and 1; "
                f"got {self.quantile:g}, {self.threshold:g}, {self.level:g}"
            )


def dissect(
    model: Network,
    layers: Sequence[str] | str,
    concepts: str | Path | ConceptSet,
    *,
    against: Literal["random"] | None = None,
    state: str | Path | None = None,
    **options: Any,
) -> Dissection:
    """Which unit of ``layers`` detects which concept: Network Dissection (Bau et al.,
    CVPR 2017), with a null.

    ``options`` are the fields of `Options`. ``against="random"`` dissects the same
    architecture with random weights too, for comparison. ``state`` names a file (under
    200 MB) from which a dissection that was killed goes on; it is removed at the end.
    Raises `ConsilienceError` for what cannot be dissected, `NotApplicable` for a model
    that cannot be opened.
    """
    if "layers" not in getattr(model, "can", ()):
        raise NotApplicable(code="not-opened", model=model.id)
    chosen, found = _options(options), load_concepts(concepts)
    if against not in (None, "random"):
        raise ConsilienceError(f"against is random or nothing; got {against!r}")
    names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
    file = Path(state) if state is not None else None
    whole, found = found, without_unreadable(found, _skipped(file))
    job = _Job(model, _layers(model, names), found, chosen, file)
    try:
        result = job.run()
    except _UnreadableError:
        # rare enough that nothing is looked at twice where all is well
        found = without_unreadable(whole, unreadable(whole, model, chosen.view))
        job = _Job(model, _layers(model, names), found, chosen, file)
        job.begin_again()
        result = job.run()
    if against is None:
        return result
    blank = with_random_weights(model, chosen.seed)
    plain = replace(chosen, permutations=0)
    return replace(
        result, random=_Job(blank, _layers(blank, names), found, plain, None).run()
    )


class _UnreadableError(ConsilienceError):
    """An image or its labels that cannot be read, found on the way."""


def unreadable(
    concepts: ConceptSet, model: Network, view: ViewMode
) -> dict[int, str]:
    """Why images of a set, or their labels, cannot be read, by index; every one is
    read for it.
    """
    reasons: dict[int, str] = {}

    def look(index: int) -> None:
        try:
            seen = model.view(concepts.sample(index), view)
            concepts.labels(index, seen.geometry if view == "crop" else None)
        except ConsilienceError as error:
            reasons[index] = str(error)

    with (
        progress.task("looking for what cannot be read", len(concepts)) as running,
        ThreadPoolExecutor(READERS) as pool,
    ):
        for _ in pool.map(look, range(len(concepts))):
            running.advance()
    for index in sorted(reasons):
        progress.say(f"left out: {concepts.names[index]}: {reasons[index]}")
    return reasons


def without_unreadable(
    concepts: ConceptSet, reasons: Mapping[int, str]
) -> ConceptSet:
    """The set without some of its images, which its notes name."""
    if not reasons:
        return concepts
    kept = [index for index in range(len(concepts)) if index not in reasons]
    if not kept:
        raise ConsilienceError(
            f"no image of {concepts.spec} can be read: {next(iter(reasons.values()))}"
        )
    left = tuple(
        f"left out: {concepts.names[index]}: {reasons[index]}"
        for index in sorted(reasons)
    )
    part = concepts.subset(kept)
    return replace(part, notes=(*concepts.notes, *left), skipped=dict(reasons))


def _skipped(file: Path | None) -> dict[int, str]:
    """Images that an earlier try of this dissection left out."""
    if file is None or not file.is_file():
        return {}
    arrays = _arrays(file)
    reasons = json.loads(str(arrays.get("reasons", "{}")))
    return {int(index): str(reason) for index, reason in reasons.items()}


OLDER_NAMES = {"min_pictures": "min_images", "null_pictures": "null_images"}
"""Options by the names they had; still taken."""


def _options(given: Mapping[str, Any]) -> DissectionOptions:
    given = {OLDER_NAMES.get(name, name): value for name, value in given.items()}
    fields = DissectionOptions.__dataclass_fields__
    wrong = [name for name in given if name not in fields]
    if wrong:
        raise ConsilienceError(
            f"dissect has no option {wrong[0]!r}; it has {', '.join(fields)}, against, state"
        )
    return DissectionOptions(**given)


def _layers(model: Network, names: Sequence[str]) -> tuple[Layer, ...]:
    known = {layer.name: layer for layer in model.layers()}
    if not names:
        raise ConsilienceError("dissect: name at least one layer")
    for name in names:
        if name not in known:
            raise ConsilienceError(unknown("layer", name, known))
    return tuple(known[name] for name in names)


# ---- reading ahead


@dataclass(frozen=True, eq=False)
class Batch:
    """Images ``first`` and on: pixels (N, 3, h, w), and their labels where they were
    asked for.
    """

    first: int
    pixels: Tensor
    labels: tuple[Labels, ...]


def batches(
    model: Network,
    concepts: ConceptSet,
    size: int,
    view: ViewMode,
    labels: bool,
    start: int = 0,
) -> Iterator[Batch]:
    """All images from ``start`` on, ``size`` at a time; one batch is read while one is
    looked at.
    """

    def one(index: int) -> tuple[Tensor, Labels | None]:
        try:
            seen = model.view(concepts.sample(index), view)
            geometry = seen.geometry if view == "crop" else None
            return seen.pixels, concepts.labels(index, geometry) if labels else None
        except ConsilienceError as error:
            raise _UnreadableError(str(error)) from error

    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[tuple[Tensor, Labels | None]]] = deque()
        ahead = iter(range(start, len(concepts)))
        try:
            for first in range(start, len(concepts), size):
                waiting.extend(
                    pool.submit(one, index)
                    for index in itertools.islice(ahead, 2 * size - len(waiting))
                )
                read = [
                    waiting.popleft().result()
                    for _ in range(min(size, len(concepts) - first))
                ]
                yield Batch(
                    first,
                    torch.cat([pixels for pixels, _ in read]),
                    tuple(one for _, one in read if one is not None),
                )
        finally:
            for future in waiting:
                future.cancel()


# ---- the work


class _Job:
    """One dissection: what is kept between batches, so that it can be put down and
    taken up.
    """

    def __init__(
        self,
        model: Network,
        layers: tuple[Layer, ...],
        concepts: ConceptSet,
        options: DissectionOptions,
        state: Path | None,
    ) -> None:
        self.model, self.layers, self.concepts, self.options, self.file = (
            model,
            layers,
            concepts,
            options,
            state,
        )
        self.features = Features(model, [layer.name for layer in layers])  # type: ignore[arg-type]
        self.key = concept_digest(
            model.id,
            concepts.id,
            len(concepts),
            [layer.name for layer in layers],
            options,
        )
        self.seconds: dict[str, float] = {}
        self.done = {"quantiles": 0, "counting": 0}
        count = len(concepts)
        totals = [
            count * (layer.spatial[0] * layer.spatial[1] if layer.spatial else 1)
            for layer in layers
        ]
        room = max(
            LEAST_VALUES, SKETCHES // (4 * sum(layer.channels for layer in layers))
        )
        self.sketches = [
            TailSketch(layer.channels, total, options.quantile, room)
            for layer, total in zip(layers, totals, strict=True)
        ]
        self.tops = [
            Tops(layer.channels, min(options.top, count)) for layer in layers
        ]
        self.labels = LabelCounts(concepts)
        starts = np.concatenate(
            [[0], np.cumsum([layer.channels for layer in layers])]
        )
        self.slices = [
            slice(int(low), int(high)) for low, high in itertools.pairwise(starts)
        ]
        chosen = chosen_images(
            count if options.permutations else 0, options.null_images, options.seed
        )
        kinds = len(concepts.concepts), len(concepts.categories)
        self.gatherer = Gatherer(
            concepts.grid,
            int(starts[-1]),
            *kinds,
            chosen,
            self._null_grid(int(starts[-1]), len(chosen)),
        )
        self.counts: list[Counts] = []

    def run(self) -> Dissection:
        """Both passes, the null, and what was found."""
        kept = self._kept()
        self._timed("quantiles", lambda: self._pass("quantiles", self._quantiles))
        read = [sketch.result() for sketch in self.sketches]
        self.counts = [
            Counts(cuts, self.concepts, self.options.upsample, self.options.union)
            for cuts, _ in read
        ]
        if kept is not None:
            self._restore_counts(kept)
        self._timed("counting", lambda: self._pass("counting", self._counting))
        self.features.release()
        facts = self._concept_facts()
        found = [self._layer(place, facts) for place in range(len(self.layers))]
        nulls = (
            self._timed("null", lambda: self._nulls(found, facts))
            if self.options.permutations
            else [None] * len(found)
        )
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        return Dissection(
            self.model.id,
            self.model.spec,
            self.concepts.id,
            self.concepts.spec,
            facts,
            self.concepts.categories,
            self.concepts.names,
            tuple(
                replace(one, null=null)
                for one, null in zip(found, nulls, strict=True)
            ),
            self.options.threshold,
            self.options.level,
            self._facts([bound for _, bound in read]),
        )

    def _null_grid(self, units: int, images: int) -> tuple[int, int]:
        pixels, side = self.concepts.grid, self.options.null_grid
        if side:
            return min(side, pixels[0]), min(side, pixels[1])
        return finest_grid(units, images, pixels, 1 - self.options.quantile)

    def _timed(self, name: str, work: Any) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = time.perf_counter() - start

    def begin_again(self) -> None:
        """Forget what another try of other images kept."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    # -- the two passes

    def _pass(self, name: str, take: Any) -> None:
        total, kept = len(self.concepts), time.monotonic()
        label = {"quantiles": "finding thresholds", "counting": "counting pixels"}[
            name
        ]
        with progress.task(label, total) as running, torch.no_grad():
            running.advance(self.done[name])
            size, start = self.features.batch, self.done[name]
            for batch in batches(
                self.model,
                self.concepts,
                size,
                self.options.view,
                name == "counting",
                start,
            ):
                take(batch, self.features(batch.pixels))
                self.done[name] = batch.first + len(batch.pixels)
                if self.file is not None and time.monotonic() - kept > KEEP_EVERY:
                    self._keep()
                    kept = time.monotonic()
                running.advance(len(batch.pixels))

    def _quantiles(self, batch: Batch, maps: Mapping[str, Tensor]) -> None:
        for layer, sketch, tops in zip(
            self.layers, self.sketches, self.tops, strict=True
        ):
            peaks = maps[layer.name].amax(dim=(2, 3))
            sketch.add(maps[layer.name], peaks)
            tops.add(batch.first, peaks)

    def _counting(self, batch: Batch, maps: Mapping[str, Tensor]) -> None:
        peaks = {name: values.amax(dim=(2, 3)) for name, values in maps.items()}
        for place, labels in enumerate(batch.labels):
            index = batch.first + place
            shown = ShownLabels.of(labels, batch.pixels.device)
            self.labels.add(labels)
            self.gatherer.add_labels(index, labels)
            for layer, counts, units in zip(
                self.layers, self.counts, self.slices, strict=True
            ):
                watch = self.gatherer.watch(index, units.start)
                counts.add(
                    maps[layer.name][place], peaks[layer.name][place], shown, watch
                )

    # -- what was found

    def _concept_facts(self) -> tuple[ConceptFacts, ...]:
        units = np.concatenate([counts.unit_pixels for counts in self.counts])
        return concept_facts(
            self.concepts.concepts,
            self.labels.pixels,
            self.labels.images,
            units[:, self.concepts.category_of],
            area=len(self.concepts) * self.concepts.grid[0] * self.concepts.grid[1],
            least=self.options.min_images,
            threshold=self.options.threshold,
        )

    def _layer(self, place: int, facts: tuple[ConceptFacts, ...]) -> LayerResult:
        layer, counts, tops = self.layers[place], self.counts[place], self.tops[place]
        pixels = np.array([one.pixels for one in facts])
        return LayerResult(
            layer.name,
            layer.spatial,
            counts.thresholds,
            counts.intersections,
            counts.unions(pixels),
            counts.unit_pixels,
            tops.indices,
            tops.values,
        )

    def _nulls(
        self, found: Sequence[LayerResult], facts: tuple[ConceptFacts, ...]
    ) -> list[NullResult]:
        eligible = np.array(
            [one.index for one in facts if one.eligible], dtype=np.int64
        )
        options = self.options
        return results(
            self.gatherer.gathered(),
            eligible,
            self.concepts.category_of,
            self.slices,
            _own(found, eligible),
            threshold=options.threshold,
            permutations=options.permutations,
            resamples=options.resamples,
            seed=options.seed,
        )

    def _facts(self, bounds: Sequence[Array]) -> dict[str, Any]:
        ranks = {
            layer.name: int(bound.max(initial=0))
            for layer, bound in zip(self.layers, bounds, strict=True)
        }
        chosen = self.gatherer.chosen
        return {
            **asdict(self.options),
            "grid": list(self.concepts.grid),
            "quantile_rank_error": ranks,
            "quantile_error": {
                layer.name: ranks[layer.name] / sketch.total
                for layer, sketch in zip(self.layers, self.sketches, strict=True)
            },
            "null_images": len(chosen),
            "null_grid": list(self.gatherer.grid),
            "engine": dict(self.features.facts),
            "seconds": dict(self.seconds),
            "notes": list(self.concepts.notes),
        }

    # -- putting down and taking up

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"labels": self.labels, "gatherer": self.gatherer}
        for name, several in (
            ("sketch", self.sketches),
            ("tops", self.tops),
            ("counts", self.counts),
        ):
            parts |= {f"{name}{place}": one for place, one in enumerate(several)}
        return parts

    def _keep(self) -> None:
        """Write the resume state, whole or not at all."""
        assert self.file is not None
        arrays = {
            f"{name}.{key}": value
            for name, part in self._parts().items()
            for key, value in part.state().items()
        }
        content = io.BytesIO()
        done = np.array([self.done["quantiles"], self.done["counting"]])
        reasons = np.array(json.dumps(dict(self.concepts.skipped)))
        key = np.array(self.key)
        np.savez(content, key=key, done=done, reasons=reasons, **arrays)
        write_atomically(self.file, lambda file: file.write(content.getbuffer()))

    def _kept(self) -> dict[str, Array] | None:
        """The state of an earlier try of this very job, taken over as far as it does
        not need the thresholds.
        """
        if self.file is None or not self.file.is_file():
            return None
        arrays = _arrays(self.file)
        if str(arrays.get("key")) != self.key:
            raise ConsilienceError(
                f"{self.file} is the state of another dissection; name another file, or "
                f"remove it"
            )
        self.done = {
            "quantiles": int(arrays["done"][0]),
            "counting": int(arrays["done"][1]),
        }
        for name, part in self._parts().items():
            part.restore(_of(arrays, name))
        return arrays

    def _restore_counts(self, arrays: dict[str, Array]) -> None:
        for place, counts in enumerate(self.counts):
            state = _of(arrays, f"counts{place}")
            if state:
                counts.restore(state)


def _of(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {
        key.partition(".")[2]: value
        for key, value in arrays.items()
        if key.partition(".")[0] == name
    }


def _arrays(file: Path) -> dict[str, Array]:
    try:
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConsilienceError(
            f"{file} is not a state of a dissection: {error}"
        ) from None


def _own(found: Sequence[LayerResult], eligible: Array) -> Array:
    """The label (U,) of every unit of all layers, -1 where it has none."""
    own = []
    for layer in found:
        if not len(eligible):
            own.append(np.full(layer.units, -1))
            continue
        iou = layer.iou[:, eligible]
        own.append(np.where(iou.max(axis=1) > 0, eligible[iou.argmax(axis=1)], -1))
    return np.concatenate(own)
