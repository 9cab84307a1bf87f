"""Numbers and verdicts in words: how a report says what a table holds.

Nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from markupsafe import Markup

DASH = "–"
NBSP = "\N{NO-BREAK SPACE}"
"""Keeps a number and its unit on one line."""
VerdictKind = Literal["better", "even", "worse", "open"]
SummaryRow = Mapping[Any, Any]


# ---- numbers


def missing(value: Any) -> bool:
    """None and NaN: JSON and pandas disagree on what is not there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_number(value: Any) -> str:
    """Three decimals, or three significant digits where those would be lost; a dash
    where there is no number.
    """
    if missing(value):
        return DASH
    shown = f"{value:.3g}" if abs(value) < 0.0995 else f"{value:.3f}"
    return shown.replace("-", "−")


def format_share(value: Any) -> str:
    """A share or a difference of shares, three decimals, with a true minus sign."""
    return (
        DASH
        if missing(value)
        else f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")
    )


def format_percent(value: Any) -> str:
    """A share as per cent, three significant digits."""
    return DASH if missing(value) else f"{100 * value:.3g}{NBSP}%".replace("-", "−")


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
    "excess_of_possible": "these areas leave nothing between chance and the largest IoU",
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
    "better": "agree better than chance",
    "even": "agree no better than chance",
    "worse": "agree less than chance would",
}
_BADGE = {
    "better": "better than chance",
    "even": "not better than chance",
    "worse": "worse than chance",
    "open": "not testable",
}


def verdict_kind(verdict: Any) -> VerdictKind:
    """Which of the four a verdict is, from its wording in the summary."""
    text = str(verdict).lower()
    if text.startswith(("worse", "below")):
        return "worse"
    if text.startswith("better"):
        return "better"
    return "even" if text.startswith(("not better", "no better")) else "open"


def verdict_badge(which: VerdictKind) -> str:
    """The verdict in three words."""
    return _BADGE[which]


def verdict_sentence(row: SummaryRow, pairs: int = 1) -> Markup:
    """One pair over all images in a sentence, from a row of the summary; ``pairs`` is
    the size of its family of tests.
    """
    which, names = verdict_kind(row.get("verdict")), {"a": row["a"], "b": row["b"]}
    if not row["n"]:
        return Markup(
            "<b>{a}</b> and <b>{b}</b> have no image on which their IoU is defined."
        ).format(**names)
    numbers = _numbers(row)
    if which == "open":
        reason = row.get("why") or row.get("reason") or "the summary gives no reason"
        text = Markup(
            "Whether <b>{a}</b> and <b>{b}</b> agree better than chance cannot be tested this "
            "way ({reason}). "
        )
        return text.format(**names, reason=reason) + Markup(
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
