"""What makes a comparison invalid, found and said: each finding has a stable code and
one plain sentence.

An `Auditor` sees image after image, keeps a few numbers of each and no arrays, and
merges what it found over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from consilience import images, registry
from consilience.agreement.masks import Mask
from consilience.images import Placement
from consilience.perturb.surrogate import settled
from consilience.types import Array, Explanation, View

if TYPE_CHECKING:
    import pandas as pd

Severity = Literal["error", "warning", "note"]

UNSURE_PROBABILITY = 0.5
UNSURE_MARGIN = 0.1
AREA_SPREAD = 0.05
FEW_IMAGES = 5
INCOMPLETE_SHARE = 0.01
NAMED = 3


@dataclass(frozen=True)
class Finding:
    """Something that makes numbers doubtful: an ``error`` invalidates them, a
    ``warning`` limits what they say.
    """

    code: str
    severity: Severity
    message: str
    where: str = ""


@dataclass(frozen=True)
class FindingRule:
    """How a code reads: ``text`` with places for ``images`` (where found), ``first``
    and ``second`` (ranges), ``words``.
    """

    severity: Severity
    text: str


FINDING_RULES: Mapping[str, FindingRule] = {
    "rendered-mask": FindingRule(
        "error",
        "the mask is cut from the luminance of a saved figure, not from the map{images}: it "
        "covers {first} of the frame, "
        "and {second} of the frame share the value of the cut, as the white of a page does; "
        "it says nothing about the map",
    ),
    "mixed-weights": FindingRule(
        "error",
        "different weights are compared{images}: {words}; no difference can be laid to the "
        "methods",
    ),
    "mixed-views": FindingRule(
        "error",
        "different views of the image are compared{images}: {words}; the frames do not "
        "coincide",
    ),
    "mixed-targets": FindingRule(
        "error", "different classes are explained{images}: {words}"
    ),
    "fill-truncated": FindingRule(
        "error",
        "the fill is not the percentile that was asked for{images}: {words}; cast to a whole "
        "number, what lies in [0, 1] "
        "is black",
    ),
    "fill-out-of-range": FindingRule(
        "error",
        "the fill has values outside of [0, 1]{images}: {words}; the model never saw such "
        "pixels",
    ),
    "seed-without-effect": FindingRule(
        "error",
        "the draws are unseeded{images}: lime's random_seed reaches only its own default "
        "segmentation, so a seed has no "
        "effect here and the numbers will not come out again (seeds drawn this time: {words})",
    ),
    "empty-mask": FindingRule(
        "warning",
        "the mask is empty{images}: its IoU is 0 or undefined whatever the other one shows",
    ),
    "flat-map": FindingRule(
        "warning",
        "the map has one value everywhere{images}: it ranks no pixel, and a mask cut from it "
        "is arbitrary",
    ),
    "completeness-gap": FindingRule(
        "warning",
        "the attributions do not add up to what they explain{images}: the gap is {first} of "
        "it; more steps may close it, or "
        "part of the score does not go through what is explained",
    ),
    "ties-at-cut": FindingRule(
        "warning",
        "{first} {words} share the value at the cut{images}: which of them the mask holds is "
        "arbitrary",
    ),
    "unstable-superpixels": FindingRule(
        "warning",
        "which superpixels weigh most is not settled{images}: {first} of the top ones are "
        "sure; another seed may show others "
        "({words})",
    ),
    "below-chance": FindingRule(
        "warning",
        "mean IoU {first} is below chance: independent masks of the same areas reach {second}",
    ),
    "chance-level": FindingRule(
        "warning",
        "by its interval over images the mean IoU of {first} is not clearly above chance: "
        "independent masks of the same "
        "areas reach {second}",
    ),
    "area-varies": FindingRule(
        "warning",
        "the masks cover {first} of the frame from image to image: IoU mixes their size with "
        "their place",
    ),
    "few-images": FindingRule("warning", "{words}"),
    "shift-explains": FindingRule(
        "warning",
        "the masks overlap more than independent ones, but in only {first} of the images more "
        "than when one of them is "
        "shifted (p at most .05): smooth shapes may explain it",
    ),
    "prediction-wrong": FindingRule(
        "warning", "the model's first class is not the true one{images}: {words}"
    ),
    "prediction-unsure": FindingRule("note", "the model is unsure{images}: {words}"),
    "fill-black": FindingRule(
        "note",
        "the percentile asked for as fill is black{images}: the images themselves are that "
        "dark",
    ),
}
"""Every finding there is, most serious first."""


@dataclass(frozen=True)
class Event:
    """One rule met in one image: numbers to be spanned and a word to be listed."""

    sample: str
    first: float = math.nan
    second: float = math.nan
    word: str = ""


# ---- the auditor


class Auditor:
    """Takes the explanations of image after image, then says what it found.

    Keeps numbers, no arrays.
    """

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], list[Event]] = {}
        self._areas: dict[str, list[float]] = {}
        self._samples: list[str] = []

    def add(
        self,
        explanations: Sequence[Explanation],
        masks: Sequence[Mask],
        prediction: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Look at all explanations of one image with the masks cut from them.

        ``prediction`` has ``index``, ``name``, ``probability``, ``margin`` and, where
        known, ``true`` and ``true_name``; ``labels`` name the explanations: their
        spelling unless given.
        """
        if not explanations:
            return
        names = (
            list(labels)
            if labels is not None
            else [one.explainer for one in explanations]
        )
        self._samples.append(explanations[0].sample.name)
        for name, explanation, mask in zip(names, explanations, masks, strict=True):
            self._areas.setdefault(name, []).append(mask.share)
            for code, event in _of_one(explanation, mask):
                self._note(code, name, event)
        for code, event in _of_columns(names, explanations):
            self._note(code, " | ".join(names), event)
        for code, event in _of_prediction(self._samples[-1], prediction or {}):
            self._note(code, "", event)

    def findings(
        self, table: pd.DataFrame | None = None, summary: pd.DataFrame | None = None
    ) -> list[Finding]:
        """Everything found, merged over images, most serious first; ``summary`` is that
        of `Agreement`.

        Of ``table`` only a column ``published_iou`` is read; what else it holds by
        image was seen in `add`.
        """
        rows: list[Any] = [] if summary is None else summary.to_dict("records")
        across = [
            *_of_areas(self._areas),
            *(found for row in rows for found in _of_pair(row)),
            *_of_published(table, rows),
        ]
        merged = [
            self._merged(code, where, events)
            for (code, where), events in self._events.items()
        ]
        order = {code: place for place, code in enumerate(FINDING_RULES)}
        severities = ("error", "warning", "note")
        return sorted(
            [*merged, *across],
            key=lambda found: (
                severities.index(found.severity),
                order[found.code],
                found.where,
            ),
        )

    def _note(self, code: str, where: str, event: Event) -> None:
        self._events.setdefault((code, where), []).append(event)

    def _merged(self, code: str, where: str, events: Sequence[Event]) -> Finding:
        return _finding(
            code,
            where,
            images=_images([event.sample for event in events], len(self._samples)),
            first=_span([event.first for event in events], _UNITS.get(code, _per_cent)),
            second=_span([event.second for event in events], _per_cent),
            words=_listed(
                list(dict.fromkeys(event.word for event in events if event.word))
            ),
        )


def _finding(code: str, where: str, **parts: str) -> Finding:
    text = FINDING_RULES[code].text.format(
        **{"images": "", "first": "", "second": "", "words": "", **parts}
    )
    return Finding(
        code, FINDING_RULES[code].severity, f"{where}: {text}" if where else text, where
    )


def _images(names: Sequence[str], total: int) -> str:
    if total == 1:
        return ""
    if len(names) == total:
        return f" in all {total} images"
    return f" in {len(names)} of {total} images ({_listed(names)})"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:NAMED]) + (", ..." if len(words) > NAMED else "")


def _span(values: Sequence[float], shown: Callable[[float], str]) -> str:
    low, high = shown(min(values)), shown(max(values))
    if low == high:
        return high
    return f"{low.removesuffix(' %')}-{high}"


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _whole(count: float) -> str:
    return f"{count:,.0f}"


_UNITS: Mapping[str, Callable[[float], str]] = {"ties-at-cut": _whole}


# ---- one explanation


def _of_one(explanation: Explanation, mask: Mask) -> Iterator[tuple[str, Event]]:
    sample = explanation.sample.name
    if explanation.values.min() == explanation.values.max():
        yield "flat-map", Event(sample)
    if not mask.on.any():
        yield "empty-mask", Event(sample)
    yield from _of_cut(sample, mask)
    yield from _of_fill(explanation)
    yield from _of_certainty(explanation)
    share = _number(explanation.provenance.get("completeness_share"))
    if share > INCOMPLETE_SHARE:
        yield "completeness-gap", Event(sample, share)
    if explanation.provenance.get("unseeded"):
        yield (
            "seed-without-effect",
            Event(sample, word=str(explanation.provenance.get("seed", "not recorded"))),
        )


def _of_cut(sample: str, mask: Mask) -> Iterator[tuple[str, Event]]:
    rule = mask.rule.partition(":")[0]
    if rule == "luminance":
        yield "rendered-mask", Event(sample, mask.share, mask.tied / mask.on.size)
    elif mask.tied:
        yield (
            "ties-at-cut",
            Event(
                sample,
                mask.tied,
                word="superpixels" if rule == "superpixels" else "pixels",
            ),
        )


def _of_certainty(explanation: Explanation) -> Iterator[tuple[str, Event]]:
    """Whether an explainer of superpixels found its top ones unsettled; one that cannot
    tell says nothing.
    """
    chances, stable = (
        explanation.extras.get("p_top"),
        explanation.provenance.get("stable"),
    )
    if chances is None or stable is not False:
        return
    sure, top = settled(chances)
    share = len(sure) / len(top) if len(top) else 0.0
    said = str(explanation.provenance.get("verdict", "not stable"))
    yield (
        "unstable-superpixels",
        Event(
            explanation.sample.name,
            share,
            word=said.removeprefix("not stable").lstrip(": "),
        ),
    )


def _of_fill(explanation: Explanation) -> Iterator[tuple[str, Event]]:
    """The explainer's fill, made again on the image and held against what it is called."""
    fill = _fill_asked(explanation.explainer)
    if fill is None:
        return
    view = _view(explanation)
    made = (
        fill.image(view, explanation.extras.get("segments"))[0].cpu().double().numpy()
    )
    sample = explanation.sample.name
    if made.min() < 0 or made.max() > 1:
        yield (
            "fill-out-of-range",
            Event(sample, word=f"{made.min():g} to {made.max():g}"),
        )
    percentile = getattr(fill, "q", getattr(fill, "percentile", None))
    if percentile is not None:
        yield from _of_percentile(sample, percentile, made, view)


@cache
def _fill_asked(explainer: str) -> Any:
    """The fill that an explainer's spelling asks for; None where it asks for none."""
    spelled = dict(registry.parse(explainer).options).get("fill")
    return None if spelled is None else registry.fills.build(spelled)


def _of_percentile(
    sample: str, percentile: float, made: Array, view: View
) -> Iterator[tuple[str, Event]]:
    wanted = np.percentile(images.to_array(view.pixels), percentile, axis=(0, 1))
    got = made.mean(axis=(1, 2))
    if np.abs(wanted - got).max() > 0.5 / 255:
        yield (
            "fill-truncated",
            Event(sample, word=f"{_colour(got)} instead of {_colour(wanted)}"),
        )
    elif got.max() == 0:
        yield "fill-black", Event(sample)


def _colour(channels: Array) -> str:
    return "(" + " ".join(f"{channel:.2f}" for channel in channels) + ")"


def _view(explanation: Explanation) -> View:
    """The image in the model's frame; where the model resizes by another filter, as
    near as this question needs.
    """
    placement = Placement.from_dict(explanation.geometry.as_dict())
    return View(
        images.to_tensor(
            images.place(explanation.sample.pixels, placement, "bilinear")
        ),
        placement,
        "crop",
    )


# ---- one image


def _of_columns(
    names: Sequence[str], explanations: Sequence[Explanation]
) -> Iterator[tuple[str, Event]]:
    sides: dict[str, list[tuple[Any, str]]] = {
        "mixed-weights": [(one.model_id, one.model_id) for one in explanations],
        "mixed-views": [
            (_frame(one), str(one.provenance.get("view", "another part")))
            for one in explanations
        ],
        "mixed-targets": [(_class(one), one.target.name) for one in explanations],
    }
    for code, found in sides.items():
        if len({repr(key) for key, _ in found}) > 1:
            word = " against ".join(
                f"{name} {shown}" for name, (_, shown) in zip(names, found, strict=True)
            )
            yield code, Event(explanations[0].sample.name, word=word)


def _frame(explanation: Explanation) -> Any:
    return explanation.values.shape, sorted(explanation.geometry.as_dict().items())


def _class(explanation: Explanation) -> Any:
    """Logit and probability of one class are one target: methods have their own score
    by definition.
    """
    target = explanation.target
    return target.name if target.index is None else target.index


def _of_prediction(sample: str, said: Mapping[str, Any]) -> Iterator[tuple[str, Event]]:
    if not said:
        return
    true = said.get("true")
    if true is not None and true != said["index"]:
        yield (
            "prediction-wrong",
            Event(
                sample, word=f"{said.get('true_name') or true} is called {said['name']}"
            ),
        )
    probability, margin = (_number(said.get(key)) for key in ("probability", "margin"))
    if not math.isnan(probability) and (
        probability < UNSURE_PROBABILITY or margin < UNSURE_MARGIN
    ):
        yield (
            "prediction-unsure",
            Event(
                sample,
                word=f"{said['name']} at {probability:.2f}, {margin:.2f} before the next",
            ),
        )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# ---- all images


def _of_areas(areas: Mapping[str, Sequence[float]]) -> Iterator[Finding]:
    for name, shares in areas.items():
        if max(shares) - min(shares) > AREA_SPREAD:
            yield _finding("area-varies", name, first=_span(shares, _per_cent))


def _of_pair(row: Mapping[str, Any]) -> Iterator[Finding]:
    where = f"{row['a']} | {row['b']}"
    if row["iou_mean"] < row["expected_mean"]:
        yield _finding(
            "below-chance",
            where,
            first=f"{row['iou_mean']:.3f}",
            second=f"{row['expected_mean']:.3f}",
        )
    elif row["iou_mean"] >= row["expected_mean"] and not row["excess_low"] > 0:
        yield _finding(
            "chance-level",
            where,
            first=f"{row['iou_mean']:.3f}",
            second=f"{row['expected_mean']:.3f}",
        )
    few = _few(row)
    if few:
        yield _finding("few-images", where, words=few)
    share = _number(row.get("share_p05"))
    if row["excess_low"] > 0 and share < 0.5:
        yield _finding("shift-explains", where, first=_per_cent(share))


def _of_published(
    table: pd.DataFrame | None, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """What a study printed, held against the chance level of the masks of this run."""
    if table is None or "published_iou" not in table or len(rows) != 1:
        return
    there = table[table["published_iou"].notna()]
    published, expected = (
        float(there["published_iou"].mean()),
        float(there["expected_iou"].mean()),
    )
    if published < expected:
        yield _finding(
            "below-chance",
            "as published",
            first=f"{published:.3f}",
            second=f"{expected:.3f}",
        )


def _few(row: Mapping[str, Any]) -> str:
    """Why the images are too few, or nothing."""
    count, mean = int(row["n"]), _number(row["excess_mean"])
    half = (_number(row["excess_high"]) - _number(row["excess_low"])) / 2
    if count == 0:
        return "no image has a defined IoU"
    if count == 1:
        return "one image has no interval: nothing can be said of others"
    if count < FEW_IMAGES:
        return f"{count} images are too few: the 95 % interval of the mean excess rests on {count} numbers"
    if half > abs(mean):
        return f"{count} images give a mean excess of {mean:.3f} +- {half:.3f}: more are needed to tell its sign"
    return ""
