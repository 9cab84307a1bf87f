"""Network dissection from end to end: two passes over the images, whatever the number
of layers, then the null.

The first pass finds the quantile of every unit and its top images, the second counts.
Both go through the images in pieces that depend on their number alone; what is found of
a piece is merged in the order of the pieces, whoever made it, so that one process and
many workers end in the same numbers. Sums, top images and exact quantiles are the same
however the images are cut; a sketch that is not exact is merged within its bound.

Images are read ahead by two threads. Memory: twice `SKETCHES` bytes of quantile
sketches, counts (units x concepts), one batch of maps, two batches of images, and what
the null gathers; none of it but the last grows with the number of images, and that ends
at ``null_images``.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import files, progress
from consilience.ahead import ahead
from consilience.dissection.coarse import Gatherer, chosen_images, finest_grid
from consilience.dissection.concepts import (
    ConceptSet,
    Labels,
    concept_digest,
    load_concepts,
)
from consilience.dissection.nulls import results, with_random_weights
from consilience.dissection.quantiles import (
    EMPTY,
    LEAST_VALUES,
    FloorError,
    TailSketch,
)
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
from consilience.models.engines.threads import steady_threads
from consilience.models.features import Features
from consilience.older import say_older
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

PIECE_IMAGES, MOST_PIECES = 64, 64
"""A piece has so many images at least, and there are so many pieces at most."""
PILOT_IMAGES, PILOT_TIMES = 256, 8
"""Pieces that stand alone leave out what lies below a floor: of so many images at most,
the value that is passed so many times as often as the quantile."""

PASSES = ("quantiles", "counting")
State = dict[str, Array]
Share = Callable[["Job", str, Sequence[int]], Iterator[tuple[int, State]]]
"""Has pieces made elsewhere: the job, the pass and the numbers of the pieces, to the state
of each in the order of the numbers."""


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
    share: Share | None = None,
    **options: Any,
) -> Dissection:
    """Which unit of ``layers`` detects which concept: Network Dissection (Bau et al.,
    CVPR 2017), with a null.

    ``options`` are the fields of `Options`. ``against="random"`` dissects the same
    architecture with random weights too, for comparison. ``state`` names a file (under
    200 MB) from which a dissection that was killed goes on; it is removed at the end.
    ``share`` has the pieces made elsewhere.
    Raises `ConsilienceError` for what cannot be dissected, `NotApplicable` for a model
    that cannot be opened.
    """
    if "layers" not in getattr(model, "can", ()):
        raise NotApplicable(code="not-opened", model=model.id)
    chosen, found = _options(options), load_concepts(concepts)
    if against not in (None, "random"):
        raise ConsilienceError(f"against is random or nothing; got {against!r}")
    names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
    file = files.place(state) if state is not None else None
    whole, found = found, without_unreadable(found, _skipped(file))
    job = Job(model, layers_of(model, names), found, chosen, file)
    try:
        result = job.run(share)
    except UnreadableError:
        # rare enough that nothing is looked at twice where all is well
        found = without_unreadable(whole, unreadable(whole, model, chosen.view))
        job = Job(model, layers_of(model, names), found, chosen, file)
        job.begin_again()
        result = job.run(share)
    if against is None:
        return result
    blank = with_random_weights(model, chosen.seed)
    plain = replace(chosen, permutations=0)
    return replace(
        result, random=Job(blank, layers_of(blank, names), found, plain, None).run()
    )


class UnreadableError(ConsilienceError):
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
    arrays = read_state(file)
    reasons = json.loads(str(arrays.get("reasons", "{}")))
    return {int(index): str(reason) for index, reason in reasons.items()}


OLDER_NAMES = {"min_pictures": "min_images", "null_pictures": "null_images"}
"""Options by the names they had; still taken."""


def _options(given: Mapping[str, Any]) -> DissectionOptions:
    for name in given:
        if name in OLDER_NAMES:
            say_older(name, OLDER_NAMES[name])
    given = {OLDER_NAMES.get(name, name): value for name, value in given.items()}
    fields = DissectionOptions.__dataclass_fields__
    wrong = [name for name in given if name not in fields]
    if wrong:
        raise ConsilienceError(
            f"dissect has no option {wrong[0]!r}; it has {', '.join(fields)}, against, state"
        )
    return DissectionOptions(**given)


def layers_of(model: Network, names: Sequence[str]) -> tuple[Layer, ...]:
    """Layers by name. Raises `ConsilienceError` for none, and for one there is not."""
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
    indices: Sequence[int],
) -> Iterator[Batch]:
    """The images ``indices``, ``size`` at a time; one batch is read while one is looked
    at.
    """

    def one(index: int) -> tuple[Tensor, Labels | None]:
        try:
            seen = model.view(concepts.sample(index), view)
            geometry = seen.geometry if view == "crop" else None
            return seen.pixels, concepts.labels(index, geometry) if labels else None
        except ConsilienceError as error:
            raise UnreadableError(str(error)) from error

    with closing(ahead(one, indices, READERS, 2 * size)) as reading:
        for start in range(0, len(indices), size):
            read = list(itertools.islice(reading, size))
            yield Batch(
                indices[start],
                torch.cat([pixels for pixels, _ in read]),
                tuple(one for _, one in read if one is not None),
            )


# ---- the work


class Job:
    """One dissection, piece by piece, so that it can be put down and taken up, and
    pieces made elsewhere.
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
        count = len(concepts)
        size = max(PIECE_IMAGES, -(-count // MOST_PIECES))
        self.pieces = [
            range(start, min(start + size, count)) for start in range(0, count, size)
        ]
        self.done = dict.fromkeys(PASSES, 0)
        self.floors: list[Array | None] = [None] * len(layers)
        self.cuts: list[Array] = []
        starts = np.concatenate(
            [[0], np.cumsum([layer.channels for layer in layers])]
        )
        self.slices = [
            slice(int(low), int(high)) for low, high in itertools.pairwise(starts)
        ]
        self.chosen = chosen_images(
            count if options.permutations else 0, options.null_images, options.seed
        )
        self.null_grid = self._null_grid(int(starts[-1]), len(self.chosen))
        self.parts: dict[str, Any] = self._fresh("quantiles")

    def run(self, share: Share | None = None) -> Dissection:
        """Both passes, the null, and what was found."""
        self._restore()
        alone = share is not None or not all(one.exact for one in self._sketches)
        if alone and not self.done["quantiles"]:
            self._set_floors(self._timed("pilot", self._pilot))
        read = self._timed("quantiles", lambda: self._quantiles(share))
        if not self.done["counting"]:
            self.cuts = [cuts for cuts, _ in read]
            self.parts |= self._fresh("counting")
        self._timed("counting", lambda: self._pass("counting", share))
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

    # -- what is kept of a pass

    def _fresh(self, name: str) -> dict[str, Any]:
        """What a pass, or a piece of it, fills."""
        layers, options, concepts = self.layers, self.options, self.concepts
        count = len(concepts)
        if name == "quantiles":
            units = sum(layer.channels for layer in layers)
            room = max(LEAST_VALUES, SKETCHES // (4 * units))
            parts: dict[str, Any] = {}
            for place, layer in enumerate(layers):
                cells = layer.spatial[0] * layer.spatial[1] if layer.spatial else 1
                parts[f"sketch{place}"] = TailSketch(
                    layer.channels,
                    count * cells,
                    options.quantile,
                    room,
                    self.floors[place],
                )
                parts[f"tops{place}"] = Tops(layer.channels, min(options.top, count))
            return parts
        gatherer = Gatherer(
            concepts.grid,
            self.slices[-1].stop,
            len(concepts.concepts),
            len(concepts.categories),
            self.chosen,
            self.null_grid,
        )
        return {"labels": LabelCounts(concepts), "gatherer": gatherer} | {
            f"counts{place}": Counts(cuts, concepts, options.upsample, options.union)
            for place, cuts in enumerate(self.cuts)
        }

    def _each(self, name: str) -> list[Any]:
        return [self.parts[f"{name}{place}"] for place in range(len(self.layers))]

    @property
    def _sketches(self) -> list[TailSketch]:
        return self._each("sketch")

    @property
    def _filled_by(self) -> dict[str, list[str]]:
        """The names of what each pass fills."""
        numbers = range(len(self.layers))
        return {
            "quantiles": [
                f"{name}{n}" for n in numbers for name in ("sketch", "tops")
            ],
            "counting": ["labels", "gatherer", *(f"counts{n}" for n in numbers)],
        }

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

    def _pass(self, name: str, share: Share | None) -> None:
        """All pieces that are left, merged in order."""
        label = {"quantiles": "finding thresholds", "counting": "counting pixels"}
        left = range(self.done[name], len(self.pieces))
        kept = time.monotonic()
        with progress.task(label[name], len(self.concepts)) as running:
            running.advance(sum(len(one) for one in self.pieces[: left.start]))
            made = (
                self._made_here(name, left, running.advance)
                if share is None
                else self._made_there(share, name, left, running.advance)
            )
            for number, parts in made:
                for key in self._filled_by[name]:
                    if parts[key] is not self.parts[key]:
                        self.parts[key].merge(parts[key])
                self.done[name] = number + 1
                if self.file is not None and time.monotonic() - kept > KEEP_EVERY:
                    self._keep()
                    kept = time.monotonic()

    def _made_here(
        self, name: str, numbers: Sequence[int], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Pieces made by this process, straight into the whole where that is the same."""
        for number in numbers:
            parts = dict(self.parts)
            fresh = self._fresh(name) if name == "quantiles" else {}
            parts |= {
                key: part
                for key, part in fresh.items()
                if isinstance(part, TailSketch) and not part.exact
            }
            self.look(name, number, parts, advance)
            yield number, parts

    def _made_there(
        self,
        share: Share,
        name: str,
        numbers: Sequence[int],
        advance: Callable[[int], None],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, arrays in share(self, name, numbers):
            advance(len(self.pieces[number]))
            yield number, self._restored(self._fresh(name), arrays)

    def told(self, name: str) -> State:
        """What a piece of a pass needs that only the whole has: floors, thresholds."""
        several = self.floors if name == "quantiles" else self.cuts
        return {
            f"{name}{place}": one
            for place, one in enumerate(several)
            if one is not None
        }

    def piece(self, name: str, number: int, told: State) -> State:
        """A piece as its state, made from `told`."""
        several = [told.get(f"{name}{place}") for place in range(len(self.layers))]
        if name == "quantiles":
            self.floors = several
        else:
            self.cuts = [one for one in several if one is not None]
        parts = self._fresh(name)
        self.look(name, number, parts, lambda count: None)
        return _state(parts)

    def look(
        self,
        name: str,
        number: int,
        parts: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> None:
        """Fill ``parts`` with the images of a piece."""
        with torch.no_grad(), steady_threads():
            for batch in self._batches(name == "counting", self.pieces[number]):
                maps = self.features(batch.pixels)
                take = self._take_values if name == "quantiles" else self._count
                take(batch, maps, parts)
                advance(len(batch.pixels))

    def _batches(self, labels: bool, indices: Sequence[int]) -> Iterator[Batch]:
        size, view = self.features.batch, self.options.view
        return batches(self.model, self.concepts, size, view, labels, indices)

    def _take_values(
        self, batch: Batch, maps: Mapping[str, Tensor], parts: Mapping[str, Any]
    ) -> None:
        for place, layer in enumerate(self.layers):
            peaks = maps[layer.name].amax(dim=(2, 3))
            parts[f"sketch{place}"].add(maps[layer.name], peaks)
            parts[f"tops{place}"].add(batch.first, peaks)

    def _count(
        self, batch: Batch, maps: Mapping[str, Tensor], parts: Mapping[str, Any]
    ) -> None:
        peaks = {name: values.amax(dim=(2, 3)) for name, values in maps.items()}
        gatherer = parts["gatherer"]
        for order, labels in enumerate(batch.labels):
            index = batch.first + order
            shown = ShownLabels.of(labels, batch.pixels.device)
            parts["labels"].add(labels)
            gatherer.add_labels(index, labels)
            for place, layer in enumerate(self.layers):
                watch = gatherer.watch(index, self.slices[place].start)
                parts[f"counts{place}"].add(
                    maps[layer.name][order], peaks[layer.name][order], shown, watch
                )

    # -- thresholds

    def _quantiles(self, share: Share | None) -> list[tuple[Array, Array]]:
        """Thresholds and their bounds; once more without the floors that were too high."""
        while True:
            self._pass("quantiles", share)
            lacking = {}
            read = []
            for place, sketch in enumerate(self._sketches):
                try:
                    read.append(sketch.result())
                except FloorError as error:
                    lacking[place] = error.units
            if not lacking:
                return read
            for place, units in lacking.items():
                floor = self.floors[place]
                assert floor is not None
                floor[units] = EMPTY
            self._set_floors(self.floors)

    def _set_floors(self, floors: list[Array | None]) -> None:
        """Begin the first pass with floors."""
        self.floors, self.done = floors, dict.fromkeys(PASSES, 0)
        self.parts = self._fresh("quantiles")

    def _pilot(self) -> list[Array | None]:
        """Of images spread over the set, the values (U,) of each layer that are passed
        `PILOT_TIMES` as often as its quantile; None where too few pass them to tell.
        """
        count, share = len(self.concepts), PILOT_TIMES * (1 - self.options.quantile)
        looked = min(PILOT_IMAGES, count // 16)
        if looked < 1 or share > 0.5:
            return [None] * len(self.layers)
        spread = np.linspace(0, count - 1, looked).round().astype(int).tolist()
        tails = [torch.zeros(layer.channels, 0) for layer in self.layers]
        sizes = [
            int(share * looked * (layer.spatial[0] * layer.spatial[1]))
            if layer.spatial
            else int(share * looked)
            for layer in self.layers
        ]
        with torch.no_grad(), steady_threads():
            for batch in self._batches(False, spread):
                maps = self.features(batch.pixels)
                for place, layer in enumerate(self.layers):
                    new = maps[layer.name].transpose(0, 1).flatten(1).float().cpu()
                    both = torch.cat([tails[place], new], dim=1)
                    most = min(sizes[place], both.shape[1])
                    tails[place] = both.topk(most, dim=1).values
        return [
            tail[:, -1].numpy().copy() if size >= LEAST_VALUES else None
            for tail, size in zip(tails, sizes, strict=True)
        ]

    # -- what was found

    def _concept_facts(self) -> tuple[ConceptFacts, ...]:
        units = np.concatenate([one.unit_pixels for one in self._each("counts")])
        return concept_facts(
            self.concepts.concepts,
            self.parts["labels"].pixels,
            self.parts["labels"].images,
            units[:, self.concepts.category_of],
            area=len(self.concepts) * self.concepts.grid[0] * self.concepts.grid[1],
            least=self.options.min_images,
            threshold=self.options.threshold,
        )

    def _layer(self, place: int, facts: tuple[ConceptFacts, ...]) -> LayerResult:
        layer, counts = self.layers[place], self.parts[f"counts{place}"]
        tops = self.parts[f"tops{place}"]
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
            self.parts["gatherer"].gathered(),
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
        return {
            **asdict(self.options),
            "grid": list(self.concepts.grid),
            "quantile_rank_error": ranks,
            "quantile_error": {
                layer.name: ranks[layer.name] / sketch.total
                for layer, sketch in zip(self.layers, self._sketches, strict=True)
            },
            "null_images": len(self.chosen),
            "null_grid": list(self.null_grid),
            "engine": dict(self.features.facts),
            "seconds": dict(self.seconds),
            "notes": list(self.concepts.notes),
        }

    # -- putting down and taking up

    def _keep(self) -> None:
        """Write the resume state, whole or not at all."""
        assert self.file is not None
        done = np.array([self.done[name] for name in PASSES])
        reasons = np.array(json.dumps(dict(self.concepts.skipped)))
        told = self.told("quantiles") | self.told("counting")
        write_state(
            self.file,
            {"key": np.array(self.key), "done": done, "reasons": reasons}
            | {f"told.{key}": value for key, value in told.items()}
            | _state(self.parts),
        )

    def _restore(self) -> None:
        """Go on from the state of an earlier try of this very job."""
        if self.file is None or not self.file.is_file():
            return
        arrays = read_state(self.file)
        if str(arrays.get("key")) != self.key:
            raise ConsilienceError(
                f"{self.file} is the state of another dissection; name another file, or "
                f"remove it"
            )
        told = _of(arrays, "told")
        places = range(len(self.layers))
        self.floors = [told.get(f"quantiles{place}") for place in places]
        self.cuts = [
            told[f"counting{place}"] for place in places if f"counting{place}" in told
        ]
        self.done = dict(zip(PASSES, map(int, arrays["done"]), strict=True))
        self.parts = self._restored(self._fresh("quantiles"), arrays)
        if self.done["counting"]:
            self.parts |= self._restored(self._fresh("counting"), arrays)

    def _restored(
        self, parts: dict[str, Any], arrays: Mapping[str, Array]
    ) -> dict[str, Any]:
        for name, part in parts.items():
            part.restore(_of(arrays, name))
        return parts


def _state(parts: Mapping[str, Any]) -> State:
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state().items()
    }


def write_state(file: Path, arrays: State) -> None:
    """Arrays as a file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(file, lambda stream: stream.write(content.getbuffer()))


def _of(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {
        key.partition(".")[2]: value
        for key, value in arrays.items()
        if key.partition(".")[0] == name
    }


def read_state(file: Path) -> State:
    """Inverse of `write_state`. Raises `ConsilienceError` for any other file."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
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
