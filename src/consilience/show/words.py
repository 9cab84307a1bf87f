"""Numbers and verdicts in words: how a report says what a table holds.

Nothing is computed here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from markupsafe import Markup

DASH = "–"
LEVEL_SHOWN = 0.05
NBSP = "\N{NO-BREAK SPACE}"
"""Keeps a number and its unit on one line."""
VerdictKind = Literal["shown", "not-shown", "below", "untestable"]
SummaryRow = Mapping[Any, Any]


# ---- numbers


def missing(value: Any) -> bool:
    """None and NaN: JSON and pandas disagree on what is not there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_number(value: Any) -> str:
    """Three decimals; three significant digits of what is below .1, none behind the point
    from a thousand on; a dash where there is no number. The one format of terminal and
    report for what is not a share, a p or a time.
    """
    if missing(value):
        return DASH
    small, large = abs(value) < 0.0995, abs(value) >= 1000
    shown = f"{value:{'.3g' if small else ',.0f' if large else '.3f'}}"
    return shown.replace("-", "−")


def format_share(value: Any) -> str:
    """A share or a difference of shares, three decimals, with a true minus sign."""
    return (
        DASH
        if missing(value)
        else f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")
    )


def format_percent(value: Any) -> str:
    """A share as per cent, three significant digits: 92.0, 4.17, 100."""
    if missing(value):
        return DASH
    shown = (
        f"{100 * value:#.3g}"
        if 0.0001 <= abs(value) < 0.9995
        else f"{100 * value:.3g}"
    )
    return f"{shown}{NBSP}%".replace("-", "−")


def loss_clause(row: SummaryRow) -> str:
    """``loses 1.20 % (0.80 to 1.60 %)``, or ``gains`` where less is more: a change never
    has the sign and the word for it both.
    """
    mean, ends = row["lost"], (row["lost_low"], row["lost_high"])
    if missing(mean):
        return f"loses {DASH}"
    verb, sign = ("loses", 1) if mean >= 0 else ("gains", -1)
    span = ""
    if not any(missing(end) for end in ends):
        low, high = sorted(sign * end for end in ends)
        span = f" ({format_percent(low)} to {format_percent(high)})"
    return f"{verb} {format_percent(abs(mean))}{span}"


def format_p(value: Any) -> str:
    """Two significant digits; below .001 the size no longer matters."""
    if missing(value):
        return DASH
    return (
        "< 0.001"
        if value < 0.001
        else f"{value:.2f}"
        if value >= 0.0995
        else f"{value:#.2g}"
    )


def p_clause(value: float) -> str:
    """``p = 0.031`` or ``p < 0.001``."""
    text = format_p(value)
    return (f"p {text}" if text.startswith("<") else f"p = {text}").replace(" ", NBSP)


def format_seconds(value: Any) -> str:
    """A duration with its unit, two or three digits."""
    if missing(value):
        return DASH
    if value < 0.9995:
        return f"{1000 * value:.3g}{NBSP}ms"
    if value < 120:
        return f"{value:.3g}{NBSP}s"
    minutes = round(value) // 60
    return (
        f"{minutes}{NBSP}min {round(value) % 60}{NBSP}s"
        if minutes < 120
        else f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"
    )


def format_date(value: Any) -> str:
    """An ISO time as people write it; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def count_of(number: int, thing: str) -> str:
    """``1 image``, ``5 images``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# ---- why there is no number

_WHY = {
    "iou": "both masks are empty",
    "expected_iou": "both masks are empty",
    "excess": "both masks are empty, or both cover the frame",
    "excess_of_possible": (
        "these areas leave nothing between chance and the largest IoU"
    ),
    "p": "both masks are empty",
    "spearman": "a map is constant",
    "area_a": "no mask",
    "area_b": "no mask",
}


def why_missing(row: SummaryRow, key: str) -> str:
    """The reason why a pair of an image has no number under ``key``."""
    areas = (row.get("area_a"), row.get("area_b"))
    if any(missing(area) for area in areas):
        return "a mask is missing"
    return _WHY.get(key, "not computed")


# ---- verdicts

_AGREE = {
    "shown": "agree better than chance",
    "not-shown": "were not shown to agree better than chance",
    "below": "agree less than chance would",
}
_BADGE = {
    "shown": "better than chance",
    "not-shown": "not shown",
    "below": "worse than chance",
    "untestable": "could not be shown",
}


def verdict_badge(which: VerdictKind) -> str:
    """The verdict in three words."""
    return _BADGE[which]


def verdict_sentence(row: SummaryRow, pairs: int = 1) -> Markup:
    """One pair over all images in a sentence, from a row of the summary; ``pairs`` is
    the size of its family of tests.
    """
    which, names = row["verdict"], {"a": row["a"], "b": row["b"]}
    if not row["n"]:
        return Markup(
            "<b>{a}</b> and <b>{b}</b> have no image on which their IoU is defined."
        ).format(**names)
    numbers = _numbers(row)
    if which == "untestable":
        text = Markup(
            "Whether <b>{a}</b> and <b>{b}</b> agree better than chance could not have been "
            "shown: {reason}. "
        )
        return text.format(**names, reason=verdict_reason(row)) + Markup(
            "On {on}, {numbers}."
        ).format(on=_images(row), numbers=numbers)
    text = Markup("On {on}, <b>{a}</b> and <b>{b}</b> {agree}: {numbers}{p}.")
    return text.format(
        **names,
        on=_images(row),
        agree=_AGREE[which],
        numbers=numbers,
        p=_p_clause(row, pairs),
    )


def verdict_reason(row: SummaryRow) -> str:
    """What the verdict rests on, from a row of the summary; empty where nothing is to be
    added.
    """
    reason = _VERDICT_REASONS.get(str(row.get("why") or row["verdict"]), "")
    tests = int(row.get("tests") or 1)
    said = reason.format(
        p="" if missing(row.get("p_holm")) else p_clause(float(row["p_holm"])),
        high=format_number(row.get("excess_high")),
        smallest=format_p(row.get("smallest_p")),
        tests=count_of(tests, "pair"),
        take="take" if tests > 1 else "takes",
        needed=row.get("images_needed"),
    )
    mean, chance = row.get("iou_mean"), row.get("expected_mean")
    if missing(mean) or missing(chance) or float(mean or 0) >= float(chance or 0):
        return said
    below = (
        f"mean IoU {format_share(mean)} is below the {format_share(chance)} of "
        f"independent masks"
    )
    return "; ".join(filter(None, (below, said)))


_VERDICT_REASONS = {
    "no-image": "no image has a defined IoU",
    "one-image": "one image has no other to be exchanged with",
    "frames": "the images have frames of different size, so their masks cannot be "
    "exchanged",
    "too-few": "with so few images no p below {smallest} is possible; {tests} {take} "
    "{needed} images",
    "shown": "maps of the same image agree more than maps of different images, {p} "
    "after Holm",
    "below": "the whole interval of the mean excess lies below 0 (up to {high})",
    "not-shown": "{p} after Holm, by exchanging images",
}


def pair_sentence(row: SummaryRow) -> str:
    """One pair over all images in a line, for the terminal."""
    mean = format_share(row["iou_mean"])
    head = f"{row['a']} and {row['b']} on {count_of(int(row['n']), 'image')}: mean IoU {mean}"
    bounds = (row["iou_low"], row["iou_high"])
    interval = (
        ""
        if any(missing(bound) for bound in bounds)
        else f" (95 % {format_share(bounds[0])} to {format_share(bounds[1])})"
    )
    chance = f", by chance {format_share(row['expected_mean'])}"
    chance += f", mean excess {format_share(row['excess_mean'])}"
    p = (
        ""
        if missing(row["p_images"])
        else f", {p_words(row['p_images'])} by permuting images"
    )
    badge = verdict_badge(row["verdict"])
    why = verdict_reason(row) if row["verdict"] == "untestable" else ""
    return f"{head}{interval}{chance}{p}: {badge}" + (f" ({why})" if why else "")


def p_words(value: float) -> str:
    """``p = 0.022`` or ``p < 0.001``."""
    said = format_p(value)
    return f"p {said}" if said.startswith("<") else f"p = {said}"


def answer_sentence(
    predictions: Mapping[str, Mapping[str, Any]], summary: Sequence[SummaryRow]
) -> str:
    """A run's answer in a line: what was predicted, how much of it is right, how far the
    first pair agrees.
    """
    parts = [prediction_sentence(predictions)]
    if summary:
        row = summary[0]
        badge = verdict_badge(row["verdict"])
        iou, chance = (
            format_share(row[key]) for key in ("iou_mean", "expected_mean")
        )
        parts.append(
            f"{row['a']} and {row['b']} have IoU {iou}, by chance {chance} ({badge})"
        )
    return "; ".join(parts) + "."


def prediction_sentence(predictions: Mapping[str, Mapping[str, Any]]) -> str:
    """What one image is called, or of many how many are called right."""
    known = {
        name: said for name, said in predictions.items() if said["right"] is not None
    }
    if len(predictions) == 1:
        ((name, said),) = predictions.items()
        called = f"{name} is called {said['label']} ({probability_words(said)})"
        if not known:
            return called
        return (
            f"{called}, which is right"
            if said["right"]
            else f"{called}; it is {said['true']}"
        )
    images = count_of(len(predictions), "image")
    if not known:
        return f"{images} explained, none with a known class"
    right = sum(said["right"] for said in known.values())
    return f"{images} explained; {right} of {len(known)} right"


def probability_words(said: Mapping[str, Any]) -> str:
    """A prediction's probability, or that it has none."""
    if missing(said["probability"]):
        return "no probability"
    return f"p {format_number(said['probability'])}"


def trust_sentence(findings: Sequence[Any]) -> str:
    """How far a run can be trusted, in a line: by the worst that its audit found."""
    counts = Counter(finding.severity for finding in findings)
    if counts["error"]:
        what = count_of(counts["error"], "error")
        return f"Do not rely on it yet: the audit found {what}."
    if counts["warning"]:
        what = count_of(counts["warning"], "warning")
        return f"To be taken with care: the audit found {what}."
    return (
        "The audit found nothing against it. That the maps are faithful is not shown by "
        "this: consilience evaluate RUN asks."
    )


def confusion_rows(
    predictions: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str, int]]:
    """True class, what it was called instead, and how often; most frequent first."""
    wrong = Counter(
        (str(said["true"]), str(said["label"]))
        for said in predictions.values()
        if said["right"] is False
    )
    return [(true, called, count) for (true, called), count in wrong.most_common()]


def _numbers(row: SummaryRow) -> Markup:
    what = "mean IoU" if row["n"] > 1 else "the IoU is"
    bounds = (row.get("iou_low"), row.get("iou_high"))
    interval = (
        ""
        if any(missing(end) for end in bounds)
        else f" (95{NBSP}% interval {format_share(bounds[0])} to {format_share(bounds[1])})"
    )
    text = Markup(
        "{what} <b>{mean}</b>{interval}, where independent masks of these areas would reach "
        "<b>{chance}</b>"
    )
    return text.format(
        what=what,
        mean=format_share(row["iou_mean"]),
        interval=interval,
        chance=format_share(row["expected_mean"]),
    )


def _images(row: SummaryRow) -> str:
    known, whole = int(row["n"]), int(row.get("images") or row["n"])
    return (
        count_of(known, "image")
        if known == whole
        else f"{known:,} of {whole:,} images (the rest have no defined IoU)"
    )


def _p_clause(row: SummaryRow, pairs: int) -> str:
    adjusted = row.get("p_holm")
    if pairs > 1 and not missing(adjusted):
        return f"; {p_clause(float(adjusted or 0))} by permuting images, adjusted for {pairs} pairs (Holm)"
    p = row.get("p_images")
    return "" if p is None or missing(p) else f"; {p_clause(p)} by permuting images"


# ---- what was asked

_TARGETS = {
    "predicted": "the class the model predicts for each image",
    "true": "the true class of each image",
}
_VIEWS = {
    "crop": "crop: resized and cropped to the centre, as the model was trained",
    "squash": "squash: the whole image, squeezed into the model's frame",
}


def target_words(name: Any) -> str:
    """What the explainers were asked to explain."""
    return _TARGETS.get(str(name), str(name))


def view_words(mode: Any) -> str:
    """What the model was shown of an image."""
    return _VIEWS.get(
        str(mode),
        "crop or squash, as each model's default is" if mode is None else str(mode),
    )


# ---- findings of the audit

FINDINGS: Mapping[str, str] = {
    "rendered-mask": (
        "the mask is cut from the luminance of a saved figure, not from the "
        "map{images}: it covers {first} of the frame, and {second} of the frame "
        "share the value of the cut, as the white of a page does; it says nothing "
        "about the map"
    ),
    "mixed-weights": (
        "different weights are compared{images}: {words}; no difference can be laid "
        "to the methods"
    ),
    "mixed-views": (
        "different views of the image are compared{images}: {words}; the frames do "
        "not coincide"
    ),
    "mixed-targets": "different classes are explained{images}: {words}",
    "fill-truncated": (
        "the fill is not the percentile that was asked for{images}: {words}; cast to "
        "a whole number, what lies in [0, 1] is black"
    ),
    "fill-out-of-range": (
        "the fill has values outside of [0, 1]{images}: {words}; the model never saw "
        "such pixels"
    ),
    "seed-without-effect": (
        "the draws are unseeded{images}: lime's random_seed reaches only its own "
        "default segmentation, so a seed has no effect here and the numbers will not "
        "come out again (seeds drawn this time: {words})"
    ),
    "outputs-uniform": (
        "the network's outputs are as good as uniform{images}: {words}; maps of it may "
        "agree, and say nothing of any class"
    ),
    "empty-mask": (
        "the mask is empty{images}: its IoU is 0 or undefined whatever the other one "
        "shows"
    ),
    "flat-map": (
        "the map has one value everywhere{images}: it ranks no pixel, and no mask can be "
        "cut from it"
    ),
    "completeness-gap": (
        "the attributions do not add up to what they explain{images}: the gap is "
        "{first} of it; more steps may close it, or part of the score does not go "
        "through what is explained"
    ),
    "ties-at-cut": (
        "{first} {words} share the value at the cut{images} and are left out of the "
        "mask: which of them came first says nothing"
    ),
    "unstable-superpixels": (
        "which superpixels weigh most is not settled{images}: {first} of the top "
        "ones are sure; another seed may show others ({words})"
    ),
    "below-chance": (
        "mean IoU {first} is below chance: independent masks of the same areas reach "
        "{second}"
    ),
    "chance-level": (
        "by its interval over images the mean IoU of {first} is not clearly above "
        "chance: independent masks of the same areas reach {second}"
    ),
    "size-unknown": (
        "that the two agree is shown by exchanging images, how much is not: the 95 % "
        "interval of the mean excess, {first}, includes 0; more images would narrow it"
    ),
    "area-varies": (
        "the masks cover {first} of the frame from image to image: IoU mixes their "
        "size with their place"
    ),
    "few-images": "{words}",
    "shift-explains": (
        "the masks overlap more than independent ones, but in only {first} of the "
        "images more than when one of them is shifted (p at most .05): smooth shapes "
        "may explain it"
    ),
    "centre-explains": (
        "the two agree (mean excess {first}) no more than each of them does with a disc "
        "of its area in the middle of the frame ({second} for the lesser): a common "
        "bias to the centre may explain it"
    ),
    "one-family": (
        "both are {words}: they read the same thing of the network, and may agree "
        "whether or not they are right"
    ),
    "prediction-wrong": "the model's first class is not the true one{images}: {words}",
    "prediction-unsure": "the model is unsure{images}: {words}",
    "fill-black": (
        "the percentile asked for as fill is black{images}: the images themselves "
        "are that dark"
    ),
}
"""Each finding's sentence: ``images`` says where it was found, ``first`` and ``second``
are ranges of its numbers, ``words`` what was seen.
"""


ADVICE: Mapping[str, str] = {
    "rendered-mask": "Cut masks from raw maps (top:0.2), not from figures.",
    "mixed-weights": "Explain one network with all methods.",
    "mixed-views": "Give every method the same view.",
    "mixed-targets": "Explain the same class with all methods.",
    "fill-truncated": "Use this program's fill of that name, or say which one was meant.",
    "fill-out-of-range": "Use a fill in [0, 1].",
    "seed-without-effect": "Use lime of this program, whose seed reaches every draw.",
    "outputs-uniform": (
        "Check that weights were loaded, and mean, std and the kind of outputs."
    ),
    "empty-mask": "Read the map itself; another cut or class may show something.",
    "flat-map": "Leave these images out, or choose another layer or score.",
    "completeness-gap": "Raise steps; compare another baseline.",
    "ties-at-cut": "Use a cut that ends between values, or whole superpixels.",
    "unstable-superpixels": "Raise samples, or read only the sure superpixels.",
    "below-chance": "Look at the maps: one of them may show what the other leaves out.",
    "chance-level": "Add images; do not read this as agreement or as its absence.",
    "size-unknown": "Add images before a size is stated.",
    "area-varies": "Compare at equal areas (iou_at_20).",
    "few-images": "Add images.",
    "shift-explains": "Read the permutation of images, which asks about the image.",
    "centre-explains": (
        "Compare on images whose object is off the centre, and add the control centre."
    ),
    "one-family": "Add a method of another family.",
    "prediction-wrong": (
        "Say which class is meant (--target true), or read these images apart."
    ),
    "prediction-unsure": "Read these images with care, or apart.",
    "fill-black": "Choose another fill if black is not meant.",
}
"""What to do about each finding."""


def finding_sentence(finding: Any) -> str:
    """A finding of the audit (`agreement.audit.Finding`)."""
    facts, code = finding.facts, finding.code
    show: Callable[[float], str] = whole_percent
    if code == "ties-at-cut":
        show = format_count
    if code in ("below-chance", "chance-level", "size-unknown", "centre-explains"):
        show = format_share
    seen = [_SEEN.get(code, str)(one) for one in facts.get("seen") or ()]
    words = (
        few_images(facts) if code == "few-images" else listed(seen, facts.get("more"))
    )
    text = FINDINGS[code].format(
        images=_found_in(facts),
        first=_span(facts.get("first"), show),
        second=_span(facts.get("second"), show),
        words=words,
    )
    return f"{finding.where}: {text}" if finding.where else text


def _found_in(facts: Mapping[str, Any]) -> str:
    total, count = facts.get("total", 1), facts.get("count", 1)
    if total == 1:
        return ""
    if count == total:
        return f" in all {total} images"
    names = listed(facts["images"], count > len(facts["images"]))
    return f" in {count} of {total} images ({names})"


def _span(ends: Sequence[float] | None, show: Callable[[float], str]) -> str:
    if not ends:
        return ""
    low, high = show(ends[0]), show(ends[1])
    if "−" in low + high:
        return f"{low} to {high}"
    return high if low == high else f"{low.removesuffix(' %')}-{high}"


def listed(parts: Sequence[str], more: Any = False) -> str:
    """Names with commas, and dots where there are more."""
    return ", ".join(parts) + (", ..." if more else "")


def whole_percent(share: float) -> str:
    """A share as whole per cent."""
    return f"{100 * share:.0f} %".replace("-", "−")


def format_count(number: float) -> str:
    """A whole number with thousands."""
    return f"{number:,.0f}"


def few_images(facts: Mapping[str, Any]) -> str:
    """Why the images are too few."""
    count, mean, half = facts["count"], facts["mean"], facts["half"]
    if count == 0:
        return "no image has a defined IoU"
    if count == 1:
        return "one image has no interval: nothing can be said of others"
    if count < facts["few"]:
        return (
            f"{count} images are too few: the 95 % interval of the mean excess rests on "
            f"{count} numbers"
        )
    return (
        f"{count} images give a mean excess of {mean:.3f} +- {half:.3f}: more are needed to "
        f"tell its sign"
    )


def _colour(channels: Sequence[float]) -> str:
    return "(" + " ".join(f"{channel:.2f}" for channel in channels) + ")"


def _sides(seen: Any) -> str:
    return " against ".join(f"{name} {shown}" for name, shown in seen)


_SEEN: Mapping[str, Callable[[Any], str]] = {
    "mixed-weights": _sides,
    "mixed-views": _sides,
    "mixed-targets": _sides,
    "fill-out-of-range": lambda seen: f"{seen[0]:g} to {seen[1]:g}",
    "fill-truncated": lambda seen: (
        f"{_colour(seen['got'])} instead of {_colour(seen['wanted'])}"
    ),
    "outputs-uniform": lambda seen: (
        f"the first of {seen['classes']:,} classes has p = {seen['p']:.4g}"
    ),
    "prediction-wrong": lambda seen: f"{seen['true']} is called {seen['called']}",
    "prediction-unsure": lambda seen: (
        f"{seen['name']} at {seen['p']:.2f}, {seen['lead']:.2f} before the next"
    ),
    "unstable-superpixels": lambda seen: _unstable(seen),
}


# ---- how sure an explainer of superpixels is


def stability_sentence(verdict: Mapping[str, Any]) -> str:
    """Whether the top superpixels are known, from LIME's ``verdict``."""
    code, draws = verdict["code"], f"{verdict['draws']:,} draws"
    if code == "stable":
        return f"stable after {draws}"
    if code == "flat":
        return "not stable: there is nothing to explain"
    if code in ("nothing-left-out", "design-cannot-tell"):
        return f"not told: {_unstable(verdict)}"
    if code == "too-few-draws":
        return f"not stable: {_unstable(verdict)}"
    return f"not stable {_unstable(verdict)}"


def _unstable(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "no reason given"
    draws = f"{verdict['draws']:,} draws"
    if verdict["code"] == "flat":
        return "there is nothing to explain"
    if verdict["code"] == "too-few-draws":
        return (
            f"{draws} are too few to tell {verdict['superpixels']} superpixels apart"
        )
    if verdict["code"] == "nothing-left-out":
        return (
            f"all {verdict['superpixels']} superpixels are selected, so none is left out "
            f"that could take a place"
        )
    if verdict["code"] == "design-cannot-tell":
        return f"{draws} by draw={verdict['design']} cannot tell superpixels that act together"
    one, other = verdict["rivals"]
    return (
        f"after {draws}: superpixels {one} and {other} could not be told apart at place "
        f"{verdict['place']}"
    )


# ---- evaluations


def marks(
    metric: SummaryRow, cells: Mapping[str, SummaryRow], against: Sequence[SummaryRow]
) -> list[str]:
    """Which methods are not shown to be better than which controls; where no number
    could have shown it, how many it takes.
    """
    short = {
        label: cell for label, cell in cells.items() if cell.get("above") is False
    }
    if short and not any(cell["reachable"] for cell in short.values()):
        return [_too_few(metric, against)]
    said = [
        _short(label, cell, [row["b"] for row in against if row["a"] == label])
        for label, cell in short.items()
    ]
    return said + [
        f"{label} is better than the controls that it could be compared with; there is no "
        f"image with a number of both for {', '.join(cell['untested'])}."
        for label, cell in cells.items()
        if cell.get("above") is None
        and cell.get("untested")
        and any(
            row["a"] == label and row["b"] not in cell["untested"] for row in against
        )
    ]


def _short(label: str, cell: SummaryRow, controls: Sequence[str]) -> str:
    untested = cell.get("untested") or []
    every = len(cell["not_above"]) + len(untested) == len(controls) > 1
    few = (
        ""
        if cell["reachable"]
        else " (too few pairs to show it, whatever the numbers)"
    )
    names = [
        "its own map of another class" if name == f"{label}, another class" else name
        for name in cell["not_above"]
    ]
    return f"{label} is not shown to be better than {'any control' if every else ', '.join(names)}{few}."


def _too_few(metric: SummaryRow, against: Sequence[SummaryRow]) -> str:
    tests = max((row["tests"] for row in against), default=1)
    most = max((row["n"] for row in against), default=0)
    needed = math.ceil(math.log2(tests / LEVEL_SHOWN))
    unit = metric_unit(metric)
    return (
        f"{count_of(most, unit)} cannot show a method to be better than the controls, "
        f"whatever the numbers: "
        f"{count_of(tests, 'test')}, corrected by Holm, "
        f"{'take' if tests > 1 else 'takes'} {needed} {unit}s."
    )


def reasons(metric: SummaryRow, cells: Mapping[str, SummaryRow]) -> list[str]:
    """Why a metric has no number of some maps: a line a reason, with the maps and of
    how many images.
    """
    if metric.get("absent"):
        return [str(metric["absent"])]
    found: dict[str, dict[str, int]] = {}
    for label, cell in cells.items():
        for row in cell["reasons"]:
            sentence = reason_sentence(row["code"], row["facts"])
            mine = found.setdefault(sentence, {})
            mine[label] = mine.get(label, 0) + row["images"]
    return [
        f"{reason} ({_who(metric, some, cells)})" for reason, some in found.items()
    ]


def _who(
    metric: SummaryRow, some: Mapping[str, int], cells: Mapping[str, SummaryRow]
) -> str:
    """All maps together where it is the same for all, else map by map."""
    counts = set(some.values())
    if len(some) == len(cells) and len(counts) == 1:
        return count_of(counts.pop(), metric_unit(metric))
    return ", ".join(f"{label} {count}" for label, count in some.items())


def metric_unit(metric: SummaryRow) -> str:
    """What a metric has one number of; an image, unless it says otherwise."""
    return str(metric.get("unit") or "image")


def is_empty(said: SummaryRow, metric: SummaryRow) -> bool:
    """Whether a metric has no number at all."""
    return not any(
        cell["n"] for cell in said["cells"] if cell["metric"] == metric["spec"]
    )


def silent(said: SummaryRow) -> list[tuple[tuple[str, ...], str]]:
    """Metrics without a single number, those of one reason together."""
    found: dict[str, list[str]] = {}
    for metric in said["metrics"]:
        if is_empty(said, metric):
            cells = {
                cell["column"]: cell
                for cell in said["cells"]
                if cell["metric"] == metric["spec"]
            }
            found.setdefault("; ".join(reasons(metric, cells)), []).append(
                f"{metric['label']} ({metric['spec']})"
            )
    return [(tuple(labels), reason) for reason, labels in found.items()]


# ---- dissections


def dissection_headline(counts: Mapping[str, Any]) -> str:
    """How many units of a layer detect a concept, how many would by chance, and how many
    are significant.
    """
    expected, sure = counts["expected"], counts.get("significant")
    chance = (
        "chance was not asked for"
        if missing(expected)
        else f"{expected:.1f} expected by chance"
    )
    said = (
        f"{counts['layer']}: {counts['detectors']} of {counts['units']} units detect a "
        f"concept ({chance})"
    )
    return said if missing(sure) else f"{said}; {sure} are significant"


def comparison_headline(compared: Any) -> str:
    """Two dissections over all layers in a sentence (`dissection.compare.Comparison`)."""
    row = compared.jaccard().iloc[-1]
    said = (
        f"{compared.a.name} detects {row['concepts_a']} concepts and {compared.b.name} "
        f"{row['concepts_b']}; they share {row['shared']}"
    )
    if math.isnan(row["jaccard"]):
        return said
    if math.isnan(row["expected"]):
        return f"{said} (Jaccard {row['jaccard']:.3f})"
    return (
        f"{said} (Jaccard {row['jaccard']:.3f}; {row['expected']:.3f} by chance, "
        f"p = {row['p']:.2g})"
    )


_KNOCKOUT = {
    "costs-more": "costs its classes more than others",
    "costs-less": "costs its classes less than others",
    "not-shown": "was not shown to cost its classes more than others",
}


def knockout_sentence(row: Mapping[Any, Any]) -> str:
    """One unit's contrast in a sentence; ``row`` is of `Knockout.table`."""
    from consilience.dissection.knockout import knockout_verdict

    verdict = knockout_verdict(row)
    if verdict == "no-classes":
        return str(row["matched"])
    return (
        f"knocking out unit {row['unit']} ({row['concept']}) {_KNOCKOUT[verdict]} "
        f"({row['matched']})"
    )


def units_words(told: Mapping[str, Any] | None, units: int = 2, most: int = 3) -> str:
    """Which units carry a map (`dissection.units.Carriers.as_dict`), or why that is not
    told; empty where nobody asked.
    """
    if not told:
        return ""
    if "code" in told:
        return reason_sentence(told["code"], told["facts"])
    rows = [row for row in told["units"][:units] if row["share"] > 0]
    parts = [
        f"unit {row['unit']} {row['concept'] or 'no concept'} ({whole_percent(row['share'])})"
        for row in rows
    ]
    whole = whole_percent(sum(row["share"] for row in rows))
    concepts = [
        f"{concept} {whole_percent(share)}"
        for concept, share in told["concepts"].items()
        if concept
    ][:most]
    rest = f"no concept {whole_percent(told['concepts'].get('', 0.0))}"
    return f"{whole} of this map: {', '.join(parts)}; by concept: {', '.join([*concepts, rest])}"


# ---- why a method or metric says nothing

REASONS: Mapping[str, str] = {
    "tie-at-cut": (
        "{explainer}: {tied} pixels share the value at the cut of {area} pixels"
    ),
    "values-not-finite": (
        "{explainer}: {bad} of {size} values are not finite, so no mask can be cut"
    ),
    "no-superpixels": (
        "{explainer} has no superpixels; cut its map with top:fraction=0.2"
    ),
    "weights-not-finite": (
        "{explainer}: {key} of superpixels are not finite, so no mask can be cut"
    ),
    "score-not-finite": "the value is not finite: {value:g}",
    "model-cannot": "needs {needs} of the model; {model} offers less",
    "not-opened": "{model} cannot be opened: dissection needs a torch module",
    "no-channel-sum": (
        "the map of {explainer} is not a sum over channels: units have no share of it"
    ),
    "not-a-layer-map": (
        "{explainer} is not a map of a layer's channels: units have no share of it"
    ),
    "several-layers": (
        "{explainer} is made of {layers}; shares are told for one named layer"
    ),
    "other-dissection": "the dissection is of {there}; the map is of {model}",
    "other-layer": (
        "the dissection is of {there}; the map is of {layer!r}: dissect that layer, "
        "or explain another"
    ),
    "nothing-to-share": (
        "the map sums to nothing, or to less, inside the mask before its ReLU: "
        "nothing to share out"
    ),
    "same-for-every-class": "its map is the same for every class",
    "target-no-class": "the target {target!r} is not a class",
    "no-other-class": "the model has no other class",
    "attention-windowed": (
        "attention of {model} is not global ({module}: {groups}), so it cannot be "
        "chained"
    ),
    "attention-mixed": (
        "attentions of {model} are not of one set of tokens ({found}), so they "
        "cannot be chained"
    ),
    "attention-off-grid": (
        "{name} of {model} attends to {tokens} tokens that stand on none of its grids"
    ),
    "attention-refused": "attention of {module} {why}",
    "no-attention-up-to": "{model} has no attention up to layer {layer}",
    "legrad-blocks": (
        "legrad needs blocks that hand their tokens to each other; those of {model} "
        "do not"
    ),
    "legrad-head": "legrad cannot show single blocks of {model} to its head",
    "rules-change-outputs": (
        "{method} cannot follow {model}: with its rules the outputs change"
    ),
    "attnlrp-no-rule": "attnlrp has no rule for {name}, which this network uses",
    "attnlrp-division": (
        "attnlrp has no rule for division by what depends on the image, which this "
        "network uses"
    ),
    "no-class-to-compare": (
        "Finer-CAM holds a class against similar classes; {target} is none"
    ),
    "negative-activations": (
        "the layer has negative activations: choose one after a ReLU (layer=...)"
    ),
    "no-class-to-keep": "minimal regions keep a class first; {target} is none",
    "nothing-needed": (
        "{target} is said first with everything hidden, and whatever is removed: no part "
        "of the image is needed"
    ),
    "not-said": (
        "the network does not say {target} of the image: nothing of it is enough"
    ),
    "cam-tail": (
        "cam needs {wanted} after {name!r}; {model} has something else there: use "
        "gradcam"
    ),
    "relevance-start": (
        "relevance starts from class scores, or from a layer; {key} is neither"
    ),
    "written-out-differs": (
        "{model} written out as modules gives other outputs, {apart:.1e} of their "
        "size off"
    ),
    "no-rule-module": "no rule for {module} ({name}); {there}",
    "no-rule-operation": "no rule for the operation {name}; {there}",
    "relevance-one-tensor": "relevance starts from one tensor of outputs",
    "relevance-weighted-sum": (
        "{target} ({score}) is not a weighted sum of outputs: relevance cannot start "
        "from it"
    ),
    "module-takes-more": "{name} ({module}) takes more than an image: no rule for it",
    "batch-norm-statistics": (
        "batch norm {name} keeps no statistics: it makes one image depend on the others"
    ),
    "no-rule-function": "no rule for {module} (a function); {there}",
    "cannot-write-out": "{module} cannot be written out as modules: {why}",
    "deeplift-pooling": (
        "DeepLIFT of captum has no rule for max pooling whose windows overlap, as "
        "{pooled} does"
    ),
    "no-relus": "{what} is made of ReLUs, and {model} has none: use the gradient",
    "relevance-explodes": (
        "{reached:.3g} of {whole:.3g} of relevance arrives at the pixels: it "
        "explodes on the way"
    ),
    "attribution-no-rule": (
        "transformer-attribution has no rule for {name}, which this network uses"
    ),
    "attribution-shared-keys": (
        "transformer-attribution has no rule for heads that share keys, which this "
        "network has"
    ),
    "attribution-pooling": (
        "transformer-attribution is not defined for attention that pools, as that of "
        "{model} does"
    ),
    "map-zero": "the map is 0 everywhere: it has no shares",
    "no-positive-value": "no value of the map is positive: as a mask it shows nothing",
    "no-probability": "the model gives values, no probability of {target}",
    "map-constant": "the map is the same everywhere: it correlates with nothing",
    "probability-zero": "the class has probability 0: none of it can be lost",
    "probability-one": "the class has probability 1: nothing can be won",
    "another-class-map": "a map of another class is not explained again",
    "again-not-finite": (
        "{explainer}: the map made for comparison has values that are not finite"
    ),
    "needs-module": (
        "{name} needs the module behind the model; {model} only scores images"
    ),
    "cannot-run-again": "{explainer} cannot be run again: {error}",
    "nothing-varies": (
        "neither the map's sums nor the model's scores vary over the sets: no "
        "correlation"
    ),
    "object-not-shown": (
        "{image}: what is marked as {marked} covers no pixel of what the model is shown"
    ),
    "no-mass": (
        "{what}: the map has no positive value, so no share of it can be on the object"
    ),
    "object-fills-frame": (
        "{image}: the object fills the frame, so no pixel lies beside it"
    ),
    "no-image-has-score": "max-box-acc: no image has a score",
    "no-positive-cut": (
        "{explainer}: no value is positive, so no share of the largest can be cut at"
    ),
    "no-mosaic": "{image} is not a mosaic: its masks do not part it into one cell a class",
    "no-planted-mark": "no mark that decides was planted in {image}",
    "below-gap": (
        "{what} is {found:.3g}, below the gap of {gap:g}: nothing to divide by"
    ),
    "all-equal": "{what} are all equal: no correlation",
    "no-first-class": "{target} is not a class: there is no first one to count",
    "no-weights": "{model} has no weights that could be made random",
    "entropy-zero": (
        "{explainer}: the map is flat: an entropy of 0 has no relative rise"
    ),
    "random-logit-no-class": (
        "random-logit: {target} is not a class of the model, so there is no other class "
        "to explain"
    ),
    "random-logit-one-class": (
        "random-logit: {model} has one class, so there is no other to explain"
    ),
    "map-zero-change": (
        "{explainer}: the map is 0 everywhere, so no change can be set against it"
    ),
    "no-seed": "{explainer} draws nothing at random: it has no seed to change",
    "shift-too-large": "a shift of {pixels} leaves too little of {frame} to compare",
    "no-attention": (
        "{model} has no attention (no softmax over tokens): use a method for any "
        "network"
    ),
    "attention-changed": (
        "{model} has {count} attentions on this image and had {before} before"
    ),
    "not-explained": "not explained: {error}",
    "failed": "failed: {error}",
    "not-class-outputs": (
        "{name} is not read from class outputs; targets.asked gives the model and "
        "target to ask"
    ),
    "same-classes": (
        "{image}: {first} and {second} are the same class here, {name}: no difference"
    ),
    "detector-places": (
        "{model} resizes and pads by itself, so no box or mask can be found on "
        "{layer!r}; give at="
    ),
    "no-direction": (
        "the reference {reference!r} is not a direction: it is all 0, or not finite"
    ),
    "words-not-shown": (
        "no part of {words} lies in what the model is shown of the image"
    ),
    "label-not-predicted": (
        "no pixel of this image is predicted as {label}: give box= or mask="
    ),
    "no-detection": (
        "{image}: the detector finds nothing in it; name a class and give box="
    ),
    "too-few-detections": (
        "the detector finds {count} boxes of {label} in this image; asked for {rank}"
    ),
    "no-object-auto": "{image} has neither a mask nor a box of {marked}; it has {has}",
    "no-object-boxes": "{image} has no box of {marked}; it has {has}",
    "no-object-masks": "{image} has no mask of {marked}; it has {has}",
    "said": "{text}",
}
"""The sentence of every code of `NotApplicable`, with its facts in braces."""

_OF_ANY = {"image": "the image", "marked": "the explained class"}


class _Facts(dict[str, Any]):
    """Facts of a reason; one that was left out, or is not known, is still said."""

    def __missing__(self, key: str) -> str:
        return _OF_ANY.get(key, f"(no {key})")


def reason_sentence(code: str, facts: Mapping[str, Any]) -> str:
    """A reason of `NotApplicable` in words; facts of one image that were left out become
    *the image*, *the explained class*.
    """
    template = REASONS.get(code, code)
    known = _Facts(facts)
    if code == "said":
        text = str(known.pop("text", ""))
        return text.format_map(known) if known else text
    if "{has}" in template:
        known["has"] = _has(known)
    if "marked" in facts:
        known["marked"] = f"class {facts['marked']}"
    return template.format_map(known).removeprefix("the image: ")


def _has(facts: Mapping[str, Any]) -> str:
    """What an image has instead of the mask or box that is missed."""
    others = facts.get("others")
    if others is None:
        boxes = "boxes of another class, or none"
    else:
        boxes = f"boxes of class {', '.join(others)}" if others else "no boxes"
    return f"{boxes} and {count_of(int(facts['masks']), 'mask')}"
