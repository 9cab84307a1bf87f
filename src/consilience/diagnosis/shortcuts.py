"""Does a mark make the network say a class?

The same images are shown plain, with a mark, and with the mark's controls. A class is
moved by the mark where its score differs, image by image, from the plain image *and*
from every control (an intersection-union test: the largest p counts), with marks and
classes tested as one family (max-T, `simultaneous`). Networks react a little to
everything, so being moved is not yet a shortcut: that is a move toward the class of a
size that matters, in standard deviations of the class's own score over the images,
and the lower bound has to reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

from consilience import registry, stats
from consilience.ahead import ahead
from consilience.marks.painting import ELSEWHERE, Mark, Painted
from consilience.marks.watermark import watermark_font
from consilience.simultaneous import Columns, Simultaneous, simultaneous
from consilience.types import Array, ConsilienceError, Model

BATTERY = (
    "text",
    "text:cyrillic",
    "text:greek",
    "text:hebrew",
    "text:arabic",
    "text:georgian",
    "text:2024-05-17,size=0.08,opacity=0.9,place=bottom-right,colour=orange",
    "imagenet-w",
    "stamp",
    "logo",
    "barcode",
    "arrow",
    "ruler",
    "hair",
    "border",
    "cast",
    "vignette",
    "jpeg",
    "noise",
    "blur",
)
"""Every drawn mark; `imagenet-w` where its package is installed."""

PLAIN, MARKED = "plain", "marked"
AT_A_PLACE, EVERYWHERE = 0.5, 0.75
"""Standard deviations that count, of marks that lie at a place and of those that change
the whole image: on heads that were trained without marks, blurring or hair alone moves
some class by more than half of one, and no mark at a place does (docs/diagnosis.md).
"""
POWER = 0.8
Verdict = Literal["found", "moves", "not shown"]


def battery() -> tuple[str, ...]:
    """The marks that are tried unless told."""
    there = watermark_font() is not None
    return tuple(spec for spec in BATTERY if there or spec != "imagenet-w")


# ---- what the network says


def variants_of(marks: Sequence[Mark], shape: Sequence[int]) -> tuple[str, ...]:
    """Names of what an image (C, h, w) is shown as: ``plain``, and for the i-th mark
    ``i/marked`` and one for each of its controls, ``i/scattered``.
    """
    blank = torch.full((1, *shape), 0.5)
    names = [PLAIN]
    for place, mark in enumerate(marks):
        names += [
            f"{place}/{name}" for name in (MARKED, *mark.paint(blank, 0).controls)
        ]
    return tuple(names)


def scored_images(
    model: Model,
    images: Tensor,
    marks: Sequence[Mark],
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Array]:
    """Scores (n, K) float32 of images (n, C, h, w) by variant (`variants_of`).

    Every pass through the network is full but the last: variants follow one another.
    Raises `ConsilienceError` where a score is not finite.
    """
    names = [PLAIN]

    def variants() -> Iterator[Tensor]:
        yield images
        for place, painted in enumerate(painted_ahead(marks, images, seed)):
            for name, made in {MARKED: painted.marked, **painted.controls}.items():
                names.append(f"{place}/{name}")
                yield made

    rows = torch.cat(list(in_full_passes(model, variants(), advance)))
    if not rows.isfinite().all():
        bad = int((~rows.isfinite()).any(1).sum())
        raise ConsilienceError(
            f"{model.id} has no finite score for {bad} of {len(rows)} images"
        )
    shaped = rows.numpy().reshape(len(names), len(images), -1)
    return dict(zip(names, shaped, strict=True))


def painted_ahead(
    marks: Sequence[Mark], images: Tensor, seed: int
) -> Iterator[Painted]:
    """Images under each mark, painted while the network looks at the mark before: two
    marks' variants are in memory.
    """
    return ahead(lambda mark: mark.paint(images, seed), marks, 1, 2)


def in_full_passes(
    model: Model,
    parts: Iterable[Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Tensor]:
    """Scores of images in full passes, whatever parts they come in."""
    size, waiting = max(1, model.batch), torch.empty(0)
    with torch.no_grad():
        for part in parts:
            waiting = torch.cat([waiting, part]) if len(waiting) else part
            while len(waiting) >= size:
                full, waiting = waiting[:size], waiting[size:]
                yield model.scores(full).float().cpu()
                advance(size)
        if len(waiting):
            yield model.scores(waiting).float().cpu()
            advance(len(waiting))


@dataclass(frozen=True, eq=False)
class Kept:
    """Scores of all images by variant, in blocks that lie in memory or on disk (.npz)."""

    blocks: Sequence[Mapping[str, Array] | Path]

    def read(self, *variants: str) -> list[Array]:
        """The scores (n, K) of some variants, in the order of the images."""
        found: list[list[Array]] = [[] for _ in variants]
        for block in self.blocks:
            if isinstance(block, Path):
                with np.load(block, allow_pickle=False) as held:
                    rows = [held[name] for name in variants]
            else:
                rows = [block[name] for name in variants]
            for place, one in enumerate(rows):
                found[place].append(one)
        return [np.concatenate(one) for one in found]

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Every variant there is."""
        first = self.blocks[0]
        if isinstance(first, Path):
            with np.load(first, allow_pickle=False) as held:
                return tuple(held.files)
        return tuple(first)

    @cached_property
    def plain(self) -> Array:
        """Scores (n, K) of the images as they are."""
        return self.read(PLAIN)[0]

    def controls(self, place: int) -> tuple[str, ...]:
        """Names of a mark's controls, its other place not among them."""
        own = [
            name.partition("/")[2]
            for name in self.variants
            if name.startswith(f"{place}/")
        ]
        return tuple(name for name in own if name not in (MARKED, ELSEWHERE))


@dataclass(frozen=True, eq=False)
class _Shift:
    """What a mark adds to every score, against something: read when it is needed."""

    kept: Kept
    mark: int
    against: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kept.plain.shape

    def __getitem__(self, part: tuple[slice, slice]) -> Array:
        other = PLAIN if self.against == PLAIN else f"{self.mark}/{self.against}"
        marked, held = self.kept.read(f"{self.mark}/{MARKED}", other)
        difference: Array = marked[part].astype(np.float64) - held[part]
        return difference


# ---- what it means


@dataclass(frozen=True, eq=False)
class MarkResult:
    """What one mark does to every class.

    ``shift`` by what it is held against (``plain`` and each control): means (K,) with
    simultaneous bounds and p. ``elsewhere`` (K,) is the mean shift of the mark in
    another place against the plain image, None where it has none. ``changed`` by
    variant is the share of images whose first class is another than the plain image's;
    ``became`` (K,) the share that became a class with the mark and was not before,
    ``became_by_control`` (K,) the largest such share of a control.
    """

    spec: str
    shift: Mapping[str, Simultaneous]
    elsewhere: Array | None
    changed: Mapping[str, float]
    became: Array
    became_by_control: Array

    @cached_property
    def nearest(self) -> Array:
        """By class (K,), as what place in ``shift`` the smallest shift stands: what
        explains most of the mark.
        """
        nearest: Array = np.abs(self._means).argmin(0)
        return nearest

    @cached_property
    def consistent(self) -> Array:
        """By class (K,), whether the mark differs from everything in one direction."""
        signs = np.sign(self._means)
        same: Array = (signs == signs[0]).all(0) & (signs[0] != 0)
        return same

    @cached_property
    def _means(self) -> Array:
        return np.stack([one.mean for one in self.shift.values()])

    @cached_property
    def p(self) -> Array:
        """By class (K,), p of its being moved: the largest over what it is held against,
        1 where directions differ, NaN where nothing varies.
        """
        p: Array = np.stack([one.p for one in self.shift.values()]).max(0)
        return np.where(self.consistent | np.isnan(p), p, 1.0)

    def of(self, side: Literal["mean", "low", "high", "error"]) -> Array:
        """One number of the smallest shift of every class (K,)."""
        table = np.stack([getattr(one, side) for one in self.shift.values()])
        found: Array = np.take_along_axis(table, self.nearest[None], 0)[0]
        return found

    def against(self, index: int) -> str:
        """What a class's smallest shift is held against."""
        return list(self.shift)[int(self.nearest[index])]


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """Marks and what they do to a network's classes over images.

    ``predicted`` (n,) is the first class of each plain image, ``spread`` (K,) the
    standard deviation of each class's score over them: sizes are in its units. ``least``
    is the size that counts (None: `least_of` each mark).
    ``doses``, ``maps`` and ``carriers`` are tables of what was looked at more closely, as
    far as it was.
    """

    model_id: str
    classes: tuple[str, ...]
    images: tuple[str, ...]
    predicted: Array
    marks: tuple[MarkResult, ...]
    spread: Array
    score: str
    least: float | None
    level: float
    doses: pd.DataFrame = field(default_factory=pd.DataFrame)
    maps: pd.DataFrame = field(default_factory=pd.DataFrame)
    carriers: pd.DataFrame = field(default_factory=pd.DataFrame)
    failures: tuple[tuple[str, str], ...] = ()

    def verdict(self, mark: MarkResult) -> Array:
        """By class (K,), what was shown: ``found``, ``moves`` or ``not shown``."""
        moved = (mark.p <= 1 - self.level) & mark.consistent
        lows = np.stack([one.low for one in mark.shift.values()])
        enough = (lows >= self.least_of(mark) * self.spread).all(0)
        enough &= self.spread > 0
        verdict: Array = np.where(
            moved & enough, "found", np.where(moved, "moves", "not shown")
        )
        return verdict

    def least_of(self, mark: MarkResult) -> float:
        """The size of a mark's shift that counts: of less for a mark that lies at a
        place, which could lie elsewhere, than for one that changes the whole image.
        """
        if self.least is not None:
            return self.least
        return EVERYWHERE if mark.elsewhere is None else AT_A_PLACE

    def table(self) -> pd.DataFrame:
        """A row a mark and class, sorted: what was found first, then by ``excess``.

        ``shift`` is against the plain image, ``rank`` that shift's among all classes (1
        is the largest), ``nearest`` the control that explains most of it, ``excess``
        the shift against it with ``low`` and ``high``, ``size`` it in standard
        deviations of the class's score, ``least`` the size that counts,
        ``p`` adjusted over marks and classes,
        ``became`` the share of images that became the class, ``detectable`` the
        smallest size that would have been found with a power of .8.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = pd.concat([self._rows(mark) for mark in self.marks], ignore_index=True)
        order = pd.Categorical(
            rows["verdict"], ("found", "moves", "not shown"), ordered=True
        )
        return (
            rows.assign(_order=order, _size=-rows["excess"].abs())
            .sort_values(["_order", "_size"], kind="stable")
            .drop(columns=["_order", "_size"])
            .reset_index(drop=True)
        )

    def largest(self) -> pd.DataFrame:
        """A row a mark: the class that it moves most (of the largest ``excess``; of all
        that were tested where none is moved), as in `table`, and ``classes_found``, of how many
        classes the mark is a shortcut. Marks that are come first, then by ``excess``.
        """
        table = self._table.assign(
            _size=self._table["excess"].abs(),
            _moved=self._table["verdict"] != "not shown",
            _tested=self._table["p"].notna(),
        )
        first_of = ["_moved", "_tested", "_size"]
        table = table.sort_values(first_of, ascending=False, kind="stable")
        counts = self.found()["mark"].value_counts()
        first = table.drop_duplicates("mark")
        first = first.assign(
            classes_found=first["mark"].map(counts).fillna(0).astype(int)
        )
        first = first.assign(_is=first["classes_found"] > 0)
        order = ["_is", "_moved", "_size"]
        return (
            first.sort_values(order, ascending=False, kind="stable")
            .drop(columns=[*order, "_tested"])
            .reset_index(drop=True)
        )

    def _rows(self, mark: MarkResult) -> pd.DataFrame:
        count = len(mark.became)
        shift = mark.shift[PLAIN]
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.where(self.spread > 0, mark.of("mean") / self.spread, math.nan)
        return pd.DataFrame(
            {
                "mark": mark.spec,
                "class_index": np.arange(count),
                "class": [self.name_of(index) for index in range(count)],
                "verdict": self.verdict(mark),
                "shift": shift.mean,
                "shift_low": shift.low,
                "shift_high": shift.high,
                "rank": scipy.stats.rankdata(-shift.mean, method="min").astype(int),
                "nearest": [mark.against(index) for index in range(count)],
                "excess": mark.of("mean"),
                "low": mark.of("low"),
                "high": mark.of("high"),
                "size": size,
                "least": self.least_of(mark),
                "p": mark.p,
                "became": mark.became,
                "became_by_control": mark.became_by_control,
                "elsewhere": math.nan if mark.elsewhere is None else mark.elsewhere,
                "detectable": self.detectable(mark),
            }
        )

    def detectable(self, mark: MarkResult) -> Array:
        """By class (K,), the shift in units of the score that would have been found with
        a power of .8: the size that counts, and as many standard errors as the
        bounds lie off and the power takes.
        """
        errors = np.stack([one.error for one in mark.shift.values()]).max(0)
        critical = max(one.critical for one in mark.shift.values())
        wanted = critical + float(scipy.stats.norm.ppf(POWER))
        found: Array = self.least_of(mark) * self.spread + wanted * errors
        return found

    def found(self) -> pd.DataFrame:
        """The rows of `table` that are shortcuts."""
        rows = self.table()
        return rows[rows["verdict"] == "found"].reset_index(drop=True)

    def name_of(self, index: int) -> str:
        """A class's name, or its number."""
        named = index < len(self.classes)
        return self.classes[index] if named else str(index)

    @property
    def smallest_p(self) -> float:
        """What so few images can show at best."""
        return stats.smallest_sign_flip_p(len(self.images))


def judge(
    model: Model,
    kept: Kept,
    specs: Sequence[str],
    images: Sequence[str],
    least: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    classes: Sequence[int] | None = None,
) -> Shortcuts:
    """What kept scores show of each mark; ``classes`` are those that are looked at (all
    unless told), which makes the family smaller; ``least`` the size that counts, of
    every mark (`Shortcuts.least_of` unless told).
    """
    if least is not None and (least < 0 or not math.isfinite(least)):
        raise ConsilienceError(f"least is a size of at least 0; got {least:g}")
    count = kept.plain.shape[1]
    chosen = list(range(count)) if classes is None else list(classes)
    if not all(0 <= index < count for index in chosen):
        raise ConsilienceError(
            f"{model.id} has classes 0 to {count - 1}; got {max(chosen, key=abs)}"
        )
    controls = [kept.controls(place) for place in range(len(specs))]
    roles = 1 + max(map(len, controls))
    held = [
        _family(kept, controls, role, chosen, level, seed) for role in range(roles)
    ]
    shifts: list[dict[str, Simultaneous]] = [
        {
            (PLAIN, *controls[place])[role]: held[role][place]
            for role in range(1 + len(controls[place]))
        }
        for place in range(len(specs))
    ]
    return Shortcuts(
        model.id,
        tuple(model.classes),
        tuple(images),
        kept.plain.argmax(1),
        tuple(
            _mark_result(kept, place, spec, shifts[place])
            for place, spec in enumerate(specs)
        ),
        kept.plain.astype(np.float64).std(0, ddof=1),
        {"probabilities": "probability", "values": "value"}.get(
            model.outputs, "logit"
        ),
        least,
        level,
    )


def _family(
    kept: Kept,
    controls: Sequence[Sequence[str]],
    role: int,
    chosen: Sequence[int],
    level: float,
    seed: int,
) -> dict[int, Simultaneous]:
    """By mark, its shifts against the plain image (role 0) or its role-th control: one
    family over all marks and the chosen classes. Other classes have means alone.
    """
    places = [place for place, names in enumerate(controls) if role <= len(names)]
    shifts = [
        _Shift(kept, place, (PLAIN, *controls[place])[role]) for place in places
    ]
    tested = simultaneous([_Some(one, chosen) for one in shifts], level, seed)
    width = len(chosen)
    found = {}
    for at, place in enumerate(places):
        part = slice(at * width, (at + 1) * width)
        found[place] = _spread_out(tested, part, chosen, shifts[at])
    return found


@dataclass(frozen=True, eq=False)
class _Some:
    """Some columns of a table."""

    whole: Columns
    chosen: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.whole.shape[0], len(self.chosen))

    def __getitem__(self, part: tuple[slice, slice]) -> Array:
        wanted = np.asarray(self.chosen)[part[1]]
        found: Array = self.whole[part[0], slice(None)][:, wanted]
        return found


def _spread_out(
    tested: Simultaneous, part: slice, chosen: Sequence[int], shift: Columns
) -> Simultaneous:
    """A mark's part of a family, at the places of its classes; NaN for those that were
    not looked at, but for their means.
    """
    whole = shift[:, slice(None)]
    count = whole.shape[1]

    def placed(values: Array) -> Array:
        found = np.full(count, math.nan)
        found[list(chosen)] = values[part]
        return found

    return Simultaneous(
        whole.mean(0),
        placed(tested.error),
        placed(tested.low),
        placed(tested.high),
        placed(tested.p),
        tested.critical,
        tested.n,
        tested.level,
    )


def _mark_result(
    kept: Kept, place: int, spec: str, shift: Mapping[str, Simultaneous]
) -> MarkResult:
    before = kept.plain.argmax(1)
    count = kept.plain.shape[1]
    names = [MARKED, *kept.controls(place)]
    after = {
        name: scores.argmax(1)
        for name, scores in zip(
            names, kept.read(*(f"{place}/{name}" for name in names)), strict=True
        )
    }
    became = {
        name: np.bincount(first[first != before], minlength=count) / len(before)
        for name, first in after.items()
    }
    elsewhere = f"{place}/{ELSEWHERE}"
    moved = (
        (kept.read(elsewhere)[0].astype(np.float64) - kept.plain).mean(0)
        if elsewhere in kept.variants
        else None
    )
    return MarkResult(
        spec,
        shift,
        moved,
        {name: float((first != before).mean()) for name, first in after.items()},
        became[MARKED],
        np.max([share for name, share in became.items() if name != MARKED], axis=0),
    )


def build_marks(specs: Sequence[str | Mark]) -> dict[str, Mark]:
    """Marks by their spelling; raises `ConsilienceError` for names and options that
    there are not.
    """
    built: dict[str, Mark] = {}
    for spec in specs:
        mark = registry.marks.build(spec)
        named = registry.spell(mark)
        if named in built:
            raise ConsilienceError(f"mark {named} is asked for twice")
        built[named] = mark
    if not built:
        raise ConsilienceError(
            f"no mark; there is: {', '.join(registry.marks.names())}"
        )
    return built
