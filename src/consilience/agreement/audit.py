"""What makes a comparison invalid, found and said: each finding has a stable code and
one plain sentence.

An `Auditor` sees image after image, keeps a few numbers of each and no arrays, and
merges what it found over images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from consilience import images, registry
from consilience.agreement.masks import Mask
from consilience.agreement.overlap import excess, expected_iou, iou
from consilience.images import Placement
from consilience.perturb.surrogate import settled
from consilience.stats import mean_interval
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

UNIFORM_LEAD = 0.1
UNIFORM_TIMES = 4
"""A first class of at most ``1/K + min(UNIFORM_LEAD, UNIFORM_TIMES / K)`` is what networks
say before training: .6 of two classes, .005 of a thousand."""

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "class activation maps": (
        *("cam", "gradcam", "gradcam++", "xgradcam", "hirescam"),
        *("gradcam-elementwise", "layercam", "eigencam", "eigengradcam"),
        *("smoothgradcam++", "scorecam", "iscam", "sscam", "ablationcam"),
        *("reciprocam", "finercam", "opticam", "dff"),
    ),
    "made of gradients at the pixels": (
        *("gradient", "input-x-gradient", "smoothgrad", "squaregrad", "vargrad"),
        *("integrated-gradients", "expected-gradients", "guided-ig", "blur-ig"),
        *("guided-backprop", "deconvnet", "xrai", "fullgrad"),
    ),
    "games of superpixels": ("lime", "kernelshap", "shapley", "banzhaf", "ablation"),
    "made by hiding regions": ("occlusion", "rise", "sobol", "hsic", "minimal"),
    "made of attention": (
        *("attention", "rollout", "gradient-rollout", "generic-attention"),
        *("legrad", "transformer-attribution"),
    ),
    "rules of relevance": ("lrp", "excitation-backprop", "deeplift", "attnlrp"),
}
"""Explainers that read the same thing of a network, so that they may agree whether or not
they are right; `Auditor` compares no further than this."""


@dataclass(frozen=True)
class Finding:
    """Something that makes numbers doubtful: an ``error`` invalidates them, a
    ``warning`` limits what they say.

    ``facts`` are what the sentence is made of: in how many of ``total`` images it was
    found (``count``, the first of them by name in ``images``), the ranges ``first`` and
    ``second`` of its numbers, and what else was ``seen``.
    """

    code: str
    severity: Severity
    where: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """The finding in a sentence."""
        from consilience.show.words import finding_sentence

        return finding_sentence(self)

    @property
    def advice(self) -> str:
        """What to do about it, in a sentence."""
        from consilience.show.words import ADVICE

        return ADVICE[self.code]


SEVERITIES: Mapping[str, Severity] = {
    "rendered-mask": "error",
    "mixed-weights": "error",
    "mixed-views": "error",
    "mixed-targets": "error",
    "fill-truncated": "error",
    "fill-out-of-range": "error",
    "seed-without-effect": "error",
    "outputs-uniform": "warning",
    "empty-mask": "warning",
    "flat-map": "warning",
    "completeness-gap": "warning",
    "ties-at-cut": "warning",
    "unstable-superpixels": "warning",
    "below-chance": "warning",
    "chance-level": "warning",
    "size-unknown": "warning",
    "area-varies": "warning",
    "few-images": "warning",
    "shift-explains": "warning",
    "centre-explains": "warning",
    "one-family": "warning",
    "prediction-wrong": "warning",
    "prediction-unsure": "note",
    "fill-black": "note",
}
"""Every finding there is, most serious first."""


@dataclass(frozen=True)
class Event:
    """One rule met in one image: numbers to be spanned and what was seen."""

    sample: str
    first: float = math.nan
    second: float = math.nan
    seen: Any = None


# ---- the auditor


class Auditor:
    """Takes the explanations of image after image, then says what it found.

    Keeps numbers, no arrays.
    """

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], list[Event]] = {}
        self._areas: dict[str, list[float]] = {}
        self._central: dict[tuple[str, str], float] = {}
        self._families: dict[str, str] = {}
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
        if explanations:
            self.take(seen_of(explanations, masks, prediction, labels))

    def take(self, seen: Mapping[str, Any]) -> None:
        """Take in what was seen of an image elsewhere (`seen_of`)."""
        sample = str(seen["sample"])
        self._samples.append(sample)
        for name, area, central, family in seen["columns"]:
            self._areas.setdefault(name, []).append(_number(area))
            self._central[name, sample] = _number(central)
            self._families[name] = family
        for code, where, first, second, what in seen["events"]:
            self._note(
                code, where, Event(sample, _number(first), _number(second), what)
            )

    def findings(
        self, table: pd.DataFrame | None = None, summary: pd.DataFrame | None = None
    ) -> list[Finding]:
        """Everything found, merged over images, most serious first; ``table`` and
        ``summary`` are those of `Agreement`.
        """
        rows: list[Any] = [] if summary is None else summary.to_dict("records")
        across = [
            *_of_areas(self._areas),
            *(found for row in rows for found in _of_pair(row)),
            *(found for row in rows for found in self._of_relatives(row)),
            *(found for row in rows for found in self._of_centre(table, row)),
            *_of_published(table, rows),
        ]
        merged = [
            self._merged(code, where, events)
            for (code, where), events in self._events.items()
        ]
        order = {code: place for place, code in enumerate(SEVERITIES)}
        severities = ("error", "warning", "note")
        return sorted(
            [*merged, *across],
            key=lambda found: (
                severities.index(found.severity),
                order[found.code],
                found.where,
            ),
        )

    def _of_relatives(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        families = [self._families.get(str(row[side]), "") for side in ("a", "b")]
        if row.get("verdict") == "shown" and families[0] and len(set(families)) == 1:
            yield _finding(
                "one-family", f"{row['a']} | {row['b']}", seen=[families[0]]
            )

    def _of_centre(
        self, table: pd.DataFrame | None, row: Mapping[str, Any]
    ) -> Iterator[Finding]:
        """Where two maps agree no more with each other than each does with a disc in
        the middle, what they share may be the middle.
        """
        if table is None or not row["excess_low"] > 0:
            return
        if not {"a", "b", "sample", "excess"} <= set(table.columns):
            return
        pairs = table[(table["a"] == row["a"]) & (table["b"] == row["b"])]
        beyond, central = [], []
        for sample, above in zip(pairs["sample"], pairs["excess"], strict=True):
            least = min(
                self._central.get((str(row[side]), sample), math.nan)
                for side in ("a", "b")
            )
            if not math.isnan(above - least):
                beyond.append(above - least)
                central.append(least)
        if len(beyond) > 1 and not mean_interval(beyond).low > 0:
            yield _finding(
                "centre-explains",
                f"{row['a']} | {row['b']}",
                first=_span([_number(row["excess_mean"])]),
                second=_span([float(np.mean(central))]),
            )

    def _note(self, code: str, where: str, event: Event) -> None:
        self._events.setdefault((code, where), []).append(event)

    def _merged(self, code: str, where: str, events: Sequence[Event]) -> Finding:
        seen: list[Any] = []
        for event in events:
            if event.seen is not None and event.seen not in seen:
                seen.append(event.seen)
        names = [event.sample for event in events]
        return _finding(
            code,
            where,
            images=names[:NAMED],
            count=len(names),
            total=len(self._samples),
            first=_span([event.first for event in events]),
            second=_span([event.second for event in events]),
            seen=seen[:NAMED],
            more=len(seen) > NAMED,
        )


def seen_of(
    explanations: Sequence[Explanation],
    masks: Sequence[Mask],
    prediction: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `Auditor.add` looks for in one image, as plain data."""
    names = (
        list(labels)
        if labels is not None
        else [one.explainer for one in explanations]
    )
    sample = explanations[0].sample.name
    columns = [
        [name, mask.share, central_excess(mask.on), family_of(explanation.name)]
        for name, explanation, mask in zip(names, explanations, masks, strict=True)
    ]
    met = [
        (code, name, event)
        for name, explanation, mask in zip(names, explanations, masks, strict=True)
        for code, event in _of_one(explanation, mask)
    ]
    met += [
        (code, " | ".join(names), event)
        for code, event in _of_columns(names, explanations)
    ]
    met += [
        (code, "", event) for code, event in _of_prediction(sample, prediction or {})
    ]
    return {
        "sample": sample,
        "columns": columns,
        "events": [
            [code, where, event.first, event.second, event.seen]
            for code, where, event in met
        ],
    }


def _finding(code: str, where: str, **facts: Any) -> Finding:
    return Finding(code, SEVERITIES[code], where, facts)


def _span(values: Sequence[float]) -> list[float] | None:
    known = [value for value in values if not math.isnan(value)]
    return [min(known), max(known)] if known else None


def family_of(explainer: str) -> str:
    """The family of an explainer by its name; nothing for one that is in none."""
    return next((family for family, of in FAMILIES.items() if explainer in of), "")


def central_excess(on: Array) -> float:
    """Excess of a mask (h, w) over chance with a disc of its area in the middle, as the
    control `centre` gives it.
    """
    area = int(np.count_nonzero(on))
    disc = np.zeros(on.size, dtype=bool)
    disc[_from_the_middle(on.shape)[:area]] = True
    return excess(iou(on, disc.reshape(on.shape)), expected_iou(on.size, area, area))


@lru_cache(maxsize=8)
def _from_the_middle(shape: tuple[int, ...]) -> Array:
    """Pixels of a frame, the middle first; distances are in sides of the frame."""
    down, across = (((np.arange(side) + 0.5) / side - 0.5) ** 2 for side in shape)
    order: Array = np.argsort(np.add.outer(down, across).ravel(), kind="stable")
    return order


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
            Event(
                sample, seen=str(explanation.provenance.get("seed", "not recorded"))
            ),
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
                seen="superpixels" if rule == "superpixels" else "pixels",
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
    verdict = explanation.provenance.get("verdict")
    yield (
        "unstable-superpixels",
        Event(explanation.sample.name, share, seen=verdict),
    )


def _of_fill(explanation: Explanation) -> Iterator[tuple[str, Event]]:
    """The explainer's fill, made again on the image and compared with what it is called."""
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
            Event(sample, seen=[float(made.min()), float(made.max())]),
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
            Event(sample, seen={"got": got.tolist(), "wanted": wanted.tolist()}),
        )
    elif got.max() == 0:
        yield "fill-black", Event(sample)


def _view(explanation: Explanation) -> View:
    """The image in the model's frame; where the model resizes by another filter, as
    near as this question needs.
    """
    placement = Placement.from_dict(explanation.geometry.as_dict())
    sample = explanation.sample
    pixels, _ = images.as_channels(sample, sample.channels)
    shown = images.place(pixels, placement, "bilinear")
    return View(images.to_tensor(shown), placement, "crop")


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
            seen = [
                [name, shown] for name, (_, shown) in zip(names, found, strict=True)
            ]
            yield code, Event(explanations[0].sample.name, seen=seen)


def _frame(explanation: Explanation) -> Any:
    return explanation.values.shape, sorted(explanation.geometry.as_dict().items())


def _class(explanation: Explanation) -> Any:
    """Logit and probability of one class are one target: methods have their own score
    by definition.
    """
    target = explanation.target
    return target.name if target.index is None else target.index


def _of_prediction(
    sample: str, said: Mapping[str, Any]
) -> Iterator[tuple[str, Event]]:
    if not said:
        return
    true = said.get("true")
    if true is not None and true not in (said["index"], *said.get("also", ())):
        yield (
            "prediction-wrong",
            Event(
                sample,
                seen={"true": said.get("true_name") or true, "called": said["name"]},
            ),
        )
    probability, margin, uniform = (
        _number(said.get(key)) for key in ("probability", "margin", "uniform")
    )
    if probability <= uniform + min(UNIFORM_LEAD, UNIFORM_TIMES * uniform):
        yield (
            "outputs-uniform",
            Event(sample, seen={"p": probability, "classes": round(1 / uniform)}),
        )
    elif not math.isnan(probability) and (
        probability < UNSURE_PROBABILITY or margin < UNSURE_MARGIN
    ):
        yield (
            "prediction-unsure",
            Event(
                sample,
                seen={"name": said["name"], "p": probability, "lead": margin},
            ),
        )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# ---- all images


def _of_areas(areas: Mapping[str, Sequence[float]]) -> Iterator[Finding]:
    for name, shares in areas.items():
        if max(shares) - min(shares) > AREA_SPREAD:
            yield _finding("area-varies", name, first=_span(shares))


def _of_pair(row: Mapping[str, Any]) -> Iterator[Finding]:
    where = f"{row['a']} | {row['b']}"
    shown = row.get("verdict") == "shown"
    if row["iou_mean"] < row["expected_mean"]:
        yield _finding(
            "below-chance",
            where,
            first=_span([row["iou_mean"]]),
            second=_span([row["expected_mean"]]),
        )
    elif math.isnan(_number(row["excess_low"])):
        pass  # no interval: too few images, or equal values; said below and in the table
    elif shown and not row["excess_low"] > 0:
        # exchanging images asks whether agreement depends on the image; the interval how
        # large it is: both are said, and neither against the other
        ends = [_number(row["excess_low"]), _number(row["excess_high"])]
        yield _finding("size-unknown", where, first=ends)
    elif row["iou_mean"] >= row["expected_mean"] and not row["excess_low"] > 0:
        yield _finding(
            "chance-level",
            where,
            first=_span([row["iou_mean"]]),
            second=_span([row["expected_mean"]]),
        )
    if _is_few(row):
        half = (_number(row["excess_high"]) - _number(row["excess_low"])) / 2
        yield _finding(
            "few-images",
            where,
            count=int(row["n"]),
            mean=_number(row["excess_mean"]),
            half=half,
            few=FEW_IMAGES,
        )
    share = _number(row.get("share_p05"))
    if row["excess_low"] > 0 and share < 0.5:
        yield _finding("shift-explains", where, first=_span([share]))


def _of_published(
    table: pd.DataFrame | None, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """What a study printed, compared with the chance level of the masks of this run."""
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
            first=_span([published]),
            second=_span([expected]),
        )


def _is_few(row: Mapping[str, Any]) -> bool:
    """Whether the images are too few, or tell nothing of the sign of the excess."""
    half = (_number(row["excess_high"]) - _number(row["excess_low"])) / 2
    unknown = (
        half > abs(_number(row["excess_mean"])) and row.get("verdict") != "shown"
    )
    return int(row["n"]) < FEW_IMAGES or unknown
