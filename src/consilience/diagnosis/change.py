"""Did a network change what it says, and why it says it?

A new network is held against an old one on the same images, toward the class that the
old one says. Each number has a margin, and three answers are possible: shown to lie
within it, shown to lie beyond it, or neither, where there are too few images to tell.
Maps are not held against 1 but against how alike two maps of the *old* network are that
were made again with another seed, batch or engine: the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy
import torch

from consilience import api, registry, stats
from consilience.data import Failure
from consilience.diagnosis import marked_change
from consilience.diagnosis.shortcuts import battery, build_marks
from consilience.images import Placement
from consilience.metrics.similarity import MapSimilarity, alike
from consilience.options import install_checks
from consilience.registry import option
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Model,
    Sample,
    View,
)

Answer = Literal["within", "beyond", "not shown"]
Verdict = Literal["same", "changed", "not shown"]
FLOORS = ("seed", "batch", "engine", "precision")
SEED = 0
EVERY, NONE = "all", "none"


@dataclass(frozen=True)
class Limits:
    """What counts as a change; every limit is part of a margin that has to be shown.

    ``flips`` is the share of images whose first class may differ; ``score`` how far the
    mean score of the old class may shift, either way, in standard deviations of the old
    network's over images; ``maps`` by how much less alike than the noise floor maps may
    be on average, by ``alike`` (see `metrics.similarity`). ``floors`` are what the
    noise floor is measured with. ``marks`` are planted for both networks (``all``:
    every drawn one that they can see; ``none``) in at most ``marked`` of the images, and
    ``mark`` is how much more than the old one the new one may answer to one, in
    standard deviations of a class's score. ``level`` is the confidence of a bound on
    one side.
    ``undecided`` says what becomes of what was not shown either way.
    """

    flips: float = option(0.05, help="share of images", above=0, below=1)
    score: float = option(0.25, help="standard deviations", above=0)
    maps: float = option(0.1, help="of the similarity", above=0, most=1)
    alike: MapSimilarity = option("spearman", help="how maps are compared")
    floors: tuple[str, ...] = option(("seed", "batch", "engine"), help="noise floor")
    marks: tuple[str, ...] = option((EVERY,), help="marks that are planted")
    marked: int = option(64, help="images that they are planted in, at most", least=2)
    mark: float = option(0.4, help="standard deviations", above=0)
    level: float = option(0.95, help="of one side", above=0.5, below=1)
    undecided: Literal["fail", "pass"] = option("fail", help="what is not shown")

    def __post_init__(self) -> None:
        if bad := [name for name in self.floors if name not in FLOORS]:
            raise ConsilienceError(registry.unknown("noise floor", bad[0], FLOORS))
        if len(self.marks) > 1 and {EVERY, NONE} & set(self.marks):
            raise ConsilienceError(
                f"marks are {EVERY}, {NONE} or some by name; got {', '.join(self.marks)}"
            )
        marks = () if self.marks == (NONE,) else self.marks
        if marks and marks != (EVERY,):
            marks = tuple(build_marks(marks))
        object.__setattr__(self, "marks", marks)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Limits:
        """Limits of plain data; raises `ConsilienceError` for names there are not."""
        known = [item.name for item in fields(cls)]
        if bad := [name for name in told if name not in known]:
            raise ConsilienceError(registry.unknown("limit", bad[0], known))
        ready: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in told.items()
        }
        return cls(**ready)

    def seen_by(self, *models: Model) -> tuple[Limits, tuple[str, ...]]:
        """The same with the marks that are tried by name, and what has to be said of
        them: of all, those are left out that have a colour and a network sees none.
        """
        if self.marks != (EVERY,):
            return self, ()
        there: list[str] = []
        why: dict[str, list[str]] = {}
        for spec, mark in build_marks(battery()).items():
            try:
                for model in models:
                    channels = getattr(model, "channels", 3)
                    mark.paint(torch.full((1, channels, 64, 64), 0.5), SEED)
            except ConsilienceError as error:
                why.setdefault(str(error), []).append(spec)
            else:
                there.append(spec)
        notes = [
            f"{reason}: not planted: {', '.join(specs)}"
            for reason, specs in why.items()
        ]
        return replace(self, marks=tuple(there) or (NONE,)), tuple(notes)


UNMARKED = "no marks were planted: on images without it, a mark that was learnt need not show"
install_checks(Limits)


# ---- one image at a time


@dataclass(frozen=True)
class ImageChange:
    """What differs on one image: first classes, scores of the old network's class, and
    by method how alike the maps are (``maps``) and by method and floor how alike the
    old network's own (``floors``). ``moved`` says that the networks' frames differ.
    ``answers`` are scores (1 + marks, K) of the new and the old network, where marks
    are planted; ``ran`` is by method in which precision and engine the new and the old
    network's maps were made.
    """

    name: str
    old: int
    new: int
    old_score: float
    new_score: float
    maps: Mapping[str, float]
    floors: Mapping[str, Mapping[str, float]]
    moved: bool = False
    answers: tuple[Array, Array] | None = None
    ran: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def changes(
    new: Model,
    old: Model,
    samples: Sequence[Sample],
    by: Sequence[str],
    limits: Limits,
    planted: Sequence[bool] | None = None,
) -> Iterator[ImageChange | Failure]:
    """What differs on each of some images, which are shown in full batches; one that a
    network cannot be shown is a `Failure`. ``planted`` says of each whether marks are
    planted in it (None: in all).
    """
    views, shown, kept, asked_marks = [], [], [], []
    for place, sample in enumerate(samples):
        try:
            pair = (old.view(sample), new.view(sample))
        except ConsilienceError as error:
            yield Failure(sample.name, str(error))
            continue
        views.append(pair[0])
        shown.append(pair[1])
        kept.append(sample)
        asked_marks.append(planted is None or planted[place])
    if not kept:
        return
    samples = kept
    said = old.scores(torch.cat([one.pixels for one in views])).float().cpu()
    says = new.scores(torch.cat([one.pixels for one in shown])).float().cpu()
    if said.shape[1] != says.shape[1]:
        raise ConsilienceError(
            f"the networks cannot be compared: {new.id} has {says.shape[1]} classes, "
            f"{old.id} has {said.shape[1]}"
        )
    chosen = [place for place, asked in enumerate(asked_marks) if asked]
    marked: dict[int, tuple[Array, Array]] = {}
    if limits.marks and chosen:
        marks = list(build_marks(limits.marks).values())
        sides = [
            marked_change.answers(
                model,
                torch.cat([seen[place].pixels for place in chosen]),
                marks,
                SEED,
            )
            for model, seen in ((new, shown), (old, views))
        ]
        marked = dict(zip(chosen, zip(*sides, strict=True), strict=True))
    first = said.argmax(1).tolist()
    asked = [
        replace(sample, label=index)
        for sample, index in zip(samples, first, strict=True)
    ]
    maps: list[dict[str, float]] = [{} for _ in samples]
    floors: list[dict[str, dict[str, float]]] = [{} for _ in samples]
    ran: list[dict[str, tuple[str, str]]] = [{} for _ in samples]
    failed: dict[int, str] = {}
    for spec in by:
        own = _maps(old, asked, spec)
        others = {"": _maps(new, asked, spec)}
        others |= {
            name: _again(old, asked, spec, name)
            for name in floors_of(old, spec, limits.floors)
        }
        for place in range(len(samples)):
            made = [own[place], *(one[place] for one in others.values())]
            for one in made:
                if isinstance(one, Failure):
                    failed.setdefault(place, one.reason)
            if place in failed:
                continue
            base, after, *again = made
            maps[place][spec] = _alike_where_both_looked(base, after, limits.alike)  # type: ignore[arg-type]
            ran[place][spec] = (_way(after), _way(base))  # type: ignore[arg-type]
            floors[place][spec] = {
                name: alike(base.values, one.values, limits.alike)  # type: ignore[union-attr]
                for name, one in zip(list(others)[1:], again, strict=True)
            }
    for place, sample in enumerate(samples):
        if place in failed:
            yield Failure(sample.name, failed[place])
            continue
        yield ImageChange(
            sample.name,
            first[place],
            int(says[place].argmax()),
            float(said[place, first[place]]),
            float(says[place, first[place]]),
            maps[place],
            floors[place],
            _frame(views[place]) != _frame(shown[place]),
            marked.get(place),
            ran[place],
        )


def _way(made: Explanation) -> str:
    """How a map was made."""
    return f"{made.provenance.get('precision')} by {made.provenance.get('engine')}"


def _frame(view: View) -> dict[str, Any]:
    return view.geometry.as_dict()


def _alike_where_both_looked(
    old: Explanation, new: Explanation, by: MapSimilarity
) -> float:
    """How alike the maps of two networks are; where those look at different parts of
    the image or at other sizes, in the old one's frame and where both looked.
    """
    frames = old.geometry.as_dict(), new.geometry.as_dict()
    if frames[0] == frames[1]:
        return alike(old.values, new.values, by)
    placed = Placement.from_dict(frames[1]).to_frame(
        new.values, Placement.from_dict(frames[0])
    )
    seen = np.isfinite(placed)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        raise ConsilienceError(
            f"the networks look at parts of {old.sample.name} that share nothing"
        )
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return alike(old.values[part], placed[part], by)


Made = Sequence[Explanation | Failure]


def _maps(model: Model, samples: Sequence[Sample], by: Any) -> Made:
    """A map of every sample toward its label, as a batch where that works."""
    return api.explain_part(model, samples, by, "true")


def floors_of(model: Model, by: str, asked: Sequence[str]) -> tuple[str, ...]:
    """Which noise floors there are for a method: a seed where it has one, a batch where
    it takes one, another engine where it asks for scores and the network has one.
    """
    explainer = registry.explainers.build(by)
    there = {
        "seed": hasattr(explainer, "seed"),
        "batch": hasattr(explainer, "explain_batch"),
        "engine": "gradients" not in explainer.needs
        and "module" in model.can
        and model.facts.get("engine") != "torch",
        "precision": "gradients" not in explainer.needs  # which run in f32 anyway
        and "module" in model.can
        and model.facts.get("precision") == "f32"
        and _has_bf16(model),
    }
    return tuple(name for name in asked if there[name])


def _has_bf16(model: Model) -> bool:
    """Whether asking for bf16 gives bf16."""
    return bool(model.using(precision="bf16").facts.get("precision") == "bf16")


def _again(old: Model, samples: Sequence[Sample], by: str, how: str) -> Made:
    """The old network's maps made again in another way."""
    if how == "seed":
        explainer = registry.explainers.build(by)
        return _maps(old, samples, replace(explainer, seed=explainer.seed + 1))
    if how == "batch":
        return [one for sample in samples for one in _maps(old, [sample], by)]
    if how == "engine":
        return _maps(old.using(engine="torch"), samples, by)
    return _maps(old.using(precision="bf16"), samples, by)


# ---- what it shows


@dataclass(frozen=True)
class Criterion:
    """One number and its margin: the ``value`` with its bounds, each at the level of
    one side, and what they show.

    ``floor`` is what a map's similarity was held against (NaN elsewhere) and ``held``
    which floor that is; of marks it is the one of which the number is.
    """

    name: str
    value: float
    low: float
    high: float
    margin: float
    answer: Answer
    p_within: float
    p_beyond: float
    n: int
    floor: float = math.nan
    held: str = ""


@dataclass(frozen=True, eq=False)
class Change:
    """Whether a network changed: criteria, and rows of classes and images, worst first."""

    new_id: str
    old_id: str
    limits: Limits
    criteria: tuple[Criterion, ...]
    by_class: pd.DataFrame
    images: pd.DataFrame
    floors: pd.DataFrame
    failures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    marks: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def verdict(self) -> Verdict:
        """``changed`` where anything is shown to lie beyond its margin, a class's maps
        too (Holm over criteria and classes), ``same`` where every criterion is shown to
        lie within, else ``not shown``.
        """
        if any(one.answer == "beyond" for one in self.criteria) or self.beyond:
            return "changed"
        if all(one.answer == "within" for one in self.criteria):
            return "same"
        return "not shown"

    @property
    def beyond(self) -> list[str]:
        """Classes whose maps are shown to lie beyond the margin, worst first."""
        return list(self.by_class["class"][self.by_class["beyond"].astype(bool)])

    @property
    def passed(self) -> bool:
        """Whether a pipeline may go on."""
        undecided = self.limits.undecided == "pass"
        return self.verdict == "same" or (self.verdict == "not shown" and undecided)


def judge(
    new: Model,
    old: Model,
    found: Sequence[ImageChange],
    by: Sequence[str],
    limits: Limits,
    failures: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Change:
    """What differences of images show; ``limits`` name their marks (`Limits.seen_by`).
    Raises `ConsilienceError` for fewer than two images.
    """
    if len(found) < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in failures[:1])
        raise ConsilienceError(
            f"a check needs two images that both networks can be asked about; got "
            f"{len(found)}{why}"
        )
    held = {spec: _worst_floor(found, spec) for spec in by}
    drops = {spec: _drops(found, spec, held[spec]) for spec in by}
    criteria = [_flips(found, limits), _score(found, limits)]
    for spec in by:
        floor = float(_floor_values(found, spec, held[spec]).mean())
        one = _mean_within(
            f"maps of {spec}", drops[spec], limits.maps, limits.level, True
        )
        criteria.append(replace(one, floor=floor, held=held[spec]))
    marks, said = pd.DataFrame(), list(notes)
    if limits.marks:
        try:
            answered = _answered(found, limits)
        except ConsilienceError as error:
            said.append(f"answers to marks were not compared: {error}")
            criteria.append(_unanswered(found, limits))
        else:
            marks = answered.table(lambda index: api.class_name(old, index))
            criteria.append(_marks(answered, limits))
    else:
        said.append(UNMARKED)
    by_class = _by_class(old, found, drops, limits)
    adjusted, by_class["p"] = _adjusted(criteria, list(by_class["p"]), limits.level)
    by_class["beyond"] = by_class["p"] <= 1 - limits.level
    return Change(
        new.id,
        old.id,
        limits,
        adjusted,
        by_class,
        _by_image(old, found, drops),
        _floor_table(found, by),
        tuple(failures),
        (
            *_notes(new, old),
            *_frame_notes(found),
            *_way_notes(new, old, found),
            *said,
        ),
        marks,
    )


def _way_notes(new: Model, old: Model, found: Sequence[ImageChange]) -> Iterator[str]:
    """Which maps do not show what another precision or engine does, since they were made
    in neither.
    """
    asked = [
        (one.facts.get("precision"), one.facts.get("engine")) for one in (new, old)
    ]
    if new.id != old.id or asked[0] == asked[1]:
        return
    for spec, (after, before) in found[0].ran.items():
        if after == before:
            ways = " and ".join(
                f"{precision} by {engine}" for precision, engine in asked
            )
            yield (
                f"maps of {spec} were made in {after} for both networks: they do not "
                f"show what {ways} do to them"
            )


def _notes(new: Model, old: Model) -> Iterator[str]:
    """What has to be known of how the two ran."""
    for model in (new,) if new is old else (new, old):
        if "note" in model.facts:
            yield f"{model.id}: {model.facts['note']}"
    same = ("engine", "precision", "device")
    if new.id == old.id and all(new.facts.get(k) == old.facts.get(k) for k in same):
        if new is old:
            yield "both are one network, run the same way: nothing could have changed"
        else:
            yield (
                "both have the same weights and ran the same way: only their code could "
                "have changed anything"
            )


def _frame_notes(found: Sequence[ImageChange]) -> Iterator[str]:
    """Whether the networks were shown the same part of the images."""
    count = sum(one.moved for one in found)
    if count:
        yield (
            f"the networks look at {count} of {len(found)} images in different frames: "
            f"maps are compared where both look, so that part of the difference is of "
            f"the frame"
        )


def _adjusted(
    criteria: Sequence[Criterion], classes: Sequence[float], level: float
) -> tuple[tuple[Criterion, ...], list[float]]:
    """Answers, and the p of classes (each already adjusted for the others): of beyond by
    Holm over all criteria and the classes as one more, since one is enough to fail; of
    within each at its own level, since all are needed to pass.
    """
    each = [one.p_beyond for one in criteria]
    known = [p for p in classes if not math.isnan(p)]
    beyond = stats.holm([*each, min(known)] if known else each)[: len(criteria)]
    ready = [
        p if math.isnan(p) else float(stats.holm([*each, p])[-1]) for p in classes
    ]
    found = []
    for one, p in zip(criteria, beyond, strict=True):
        answer: Answer = "not shown"
        if one.p_within <= 1 - level:
            answer = "within"
        elif p <= 1 - level:
            answer = "beyond"
        found.append(replace(one, answer=answer))
    return tuple(found), ready


def _answered(
    found: Sequence[ImageChange], limits: Limits
) -> marked_change.MarkAnswers:
    told = [one.answers for one in found if one.answers is not None]
    if len(told) < 2:
        raise ConsilienceError(f"they need two images; got {len(told)}")
    new, old = (np.stack(side) for side in zip(*told, strict=True))
    return marked_change.compared(
        new, old, limits.marks, limits.mark, limits.level, SEED
    )


def _unanswered(found: Sequence[ImageChange], limits: Limits) -> Criterion:
    """Marks of which nothing can be shown."""
    count = sum(one.answers is not None for one in found)
    nothing, p = (math.nan,) * 3, 1.0
    return Criterion("marks", *nothing, limits.mark, "not shown", p, p, count)


def _marks(answered: marked_change.MarkAnswers, limits: Limits) -> Criterion:
    """The mark and class whose answer grew most, and what is shown of all of them."""
    at = answered.largest
    return Criterion(
        "marks",
        float(answered.difference[at]),
        float(answered.low[at]),
        float(answered.high[at]),
        limits.mark,
        "not shown",
        answered.p_within,
        answered.p_beyond,
        answered.n,
        held=answered.specs[at[0]],
    )


def _flips(found: Sequence[ImageChange], limits: Limits) -> Criterion:
    """The share of images whose first class differs, with exact bounds (Clopper and
    Pearson 1934).
    """
    n, count = len(found), sum(one.old != one.new for one in found)
    beta, tail = scipy.stats.beta, 1 - limits.level
    low = float(beta.ppf(tail, count, n - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, n - count)) if count < n else 1.0
    binomial = scipy.stats.binom
    return Criterion(
        "flips",
        count / n,
        low,
        high,
        limits.flips,
        "not shown",
        float(binomial.cdf(count, n, limits.flips)),
        float(binomial.sf(count - 1, n, limits.flips)),
        n,
    )


def _score(found: Sequence[ImageChange], limits: Limits) -> Criterion:
    """The mean shift of the old class's score in standard deviations of it over images:
    two one-sided tests (Schuirmann 1987).
    """
    old = np.array([one.old_score for one in found])
    new = np.array([one.new_score for one in found])
    spread = float(old.std(ddof=1))
    shift = (
        (new - old) / spread if spread > 0 else np.where(new == old, 0.0, math.inf)
    )
    if not np.isfinite(shift).all():
        raise ConsilienceError(
            "the old network says the same score of every image; its shift has no unit"
        )
    return _mean_within("score", shift, limits.score, limits.level, False)


def _mean_within(
    name: str, values: Array, margin: float, level: float, one_sided: bool
) -> Criterion:
    """Whether a mean is shown to lie within a margin: below it, or on both sides."""
    interval = stats.mean_interval(values, level=2 * level - 1)
    low, high = interval.low, interval.high
    if math.isnan(low):  # equal values: there is nothing to estimate
        low = high = interval.mean
    above = _p(values, margin, "greater")
    below = _p(values, margin, "less")
    if one_sided:
        within, beyond = below, above
    else:
        within = max(below, _p(values, -margin, "greater"))
        beyond = min(1.0, 2 * min(above, _p(values, -margin, "less")))
    return Criterion(
        name,
        interval.mean,
        low,
        high,
        margin,
        "not shown",
        within,
        beyond,
        len(values),
    )


def _p(values: Array, at: float, alternative: stats.Alternative) -> float:
    """p that the mean is at the margin or on its other side."""
    shifted = values - at
    if (shifted == shifted[0]).all():  # no variance: signs alone would need n images
        on_side = shifted[0] > 0 if alternative == "greater" else shifted[0] < 0
        return 0.0 if on_side else 1.0
    return stats.paired_test(shifted, alternative=alternative)


# ---- the noise floor


def _floor_values(found: Sequence[ImageChange], spec: str, held: str) -> Array:
    """By image, how alike the old network's own maps are by a floor; 1 without one."""
    return np.array([one.floors[spec][held] if held else 1.0 for one in found])


def _worst_floor(found: Sequence[ImageChange], spec: str) -> str:
    """The floor of the least alike maps; none where nothing of the method is noise."""
    names = list(found[0].floors[spec])
    means = [np.mean([one.floors[spec][name] for one in found]) for name in names]
    return names[int(np.argmin(means))] if names else ""


def _drops(found: Sequence[ImageChange], spec: str, held: str) -> Array:
    """By image, how much less alike the new map is than the floor."""
    floor = _floor_values(found, spec, held)
    drops: Array = floor - np.array([one.maps[spec] for one in found])
    return drops


def _floor_table(found: Sequence[ImageChange], by: Sequence[str]) -> pd.DataFrame:
    rows = []
    for spec in by:
        for name in ("", *found[0].floors[spec]):
            values = [
                one.floors[spec][name] if name else one.maps[spec] for one in found
            ]
            interval = stats.mean_interval(values)
            rows.append(
                {
                    "method": spec,
                    "against": name or "the new network",
                    "alike": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "least": float(np.min(values)),
                    "n": interval.n,
                }
            )
    return pd.DataFrame(rows)


# ---- classes and images, worst first


def _by_class(
    old: Model,
    found: Sequence[ImageChange],
    drops: Mapping[str, Array],
    limits: Limits,
) -> pd.DataFrame:
    """A row a class of the old network: images, flips, the largest mean drop of any
    method, and p that it is not beyond the margin (Holm over classes and methods; NaN
    for fewer than two images).
    """
    classes = sorted({one.old for one in found})
    rows, p = [], []
    for index in classes:
        mine = [place for place, one in enumerate(found) if one.old == index]
        means = {spec: float(values[mine].mean()) for spec, values in drops.items()}
        worst = max(means, key=lambda spec: means[spec]) if means else ""
        few = len(mine) < 2 or not worst
        p.append(math.nan if few else _p(drops[worst][mine], limits.maps, "greater"))
        rows.append(
            {
                "class_index": index,
                "class": api.class_name(old, index),
                "images": len(mine),
                "flips": sum(found[place].new != index for place in mine),
                "method": worst,
                "drop": means.get(worst, math.nan),
            }
        )
    count = max(1, len(drops))  # the worst of so many methods was chosen
    adjusted = stats.holm([min(1.0, one * count) if one == one else one for one in p])
    return (
        pd.DataFrame(rows)
        .assign(p=adjusted)
        .sort_values(["drop", "flips"], ascending=False, kind="stable")
        .reset_index(drop=True)
    )


def _by_image(
    old: Model, found: Sequence[ImageChange], drops: Mapping[str, Array]
) -> pd.DataFrame:
    rows = []
    for place, one in enumerate(found):
        by_method = {spec: float(values[place]) for spec, values in drops.items()}
        worst = max(by_method, key=lambda spec: by_method[spec], default="")
        rows.append(
            {
                "image": one.name,
                "old": api.class_name(old, one.old),
                "new": api.class_name(old, one.new),
                "flipped": one.old != one.new,
                "score_shift": one.new_score - one.old_score,
                "method": worst,
                "drop": by_method.get(worst, math.nan),
                **{f"alike {spec}": one.maps[spec] for spec in drops},
            }
        )
    return (
        pd.DataFrame(rows)
        .sort_values(["flipped", "drop"], ascending=False, kind="stable")
        .reset_index(drop=True)
    )
