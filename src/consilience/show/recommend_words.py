"""What a recommendation says: which methods are left, what beats the others, and between
which no difference was shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from consilience.evaluation.recommendation import Contest, Recommendation, Standing
from consilience.show.words import (
    count_of,
    format_number,
    format_p,
    format_seconds,
    missing,
)


def headline(found: Recommendation) -> str:
    """What may be said, in two sentences at most."""
    methods = count_of(len(found.standings), "method")
    if found.left:
        names = _named(found.left)
        first = found.left[0]
        if len(found.left) == 1:
            return (
                f"Of {methods} {names} is left: none was shown to beat it, and it is above "
                "every control on some kind of evidence."
            )
        return (
            f"Of {methods} {names} are left: none was shown to beat them, and each is "
            f"above every control on some kind of evidence. {first} takes least time."
        )
    if not found.unproven:
        return (
            f"None of {methods} is left: each is beaten by another on some kind of "
            "evidence, in a circle."
        )
    few = (
        ""
        if found.reachable
        else " So few images could not have shown it in any case."
    )
    return (
        "No method that nothing beats was shown to be above every control on any kind of "
        f"evidence: {_named(found.unproven)}.{few}"
    )


def lines(found: Recommendation) -> Iterator[str]:
    """Everything else, a sentence a line."""
    if found.left and found.unproven:
        yield (
            f"Not beaten, but not shown to be above every control on any kind of evidence "
            f"either: {_named(found.unproven)}."
        )
    for spec in found.out_of_reach:
        metric = next(one for one in found.metrics if one["spec"] == spec)
        units = count_of(int(metric["units"]), str(metric["unit"]))
        yield (
            f"{metric['label']}: {units} could not show a difference over "
            f"{len(found.contests)} comparisons: take more images, or fewer explainers."
        )
    yield from _trade_offs(found)
    for pair in found.undecided():
        yield _no_difference(found, pair)
    for one in found.standings:
        if one.beaten_by:
            yield _beaten(one, found)
    for metric in found.metrics:
        if metric.get("absent"):
            yield f"No number of {metric['label']}: {metric['absent']}."
    for name, why in found.refused.items():
        yield f"Left out, for it failed on the first image: {name} ({why})."


def _trade_offs(found: Recommendation) -> Iterator[str]:
    """Differences among those that are left: each wins on something."""
    for one in found.contests:
        if one.better and {one.a, one.b} <= set(found.left):
            other = one.b if one.better == one.a else one.a
            yield (
                f"{one.better} is better than {other} by {_label(found, one.metric)} "
                f"({_bounds(one)}, {format_p(one.p_holm)} after Holm)."
            )


def _no_difference(found: Recommendation, pair: tuple[str, str]) -> str:
    told = ", ".join(
        f"{_label(found, one.metric)} {_bounds(one)}"
        for one in found.contests
        if (one.a, one.b) == pair
    )
    return f"No difference was shown between {pair[0]} and {pair[1]}: {told}."


def _beaten(one: Standing, found: Recommendation) -> str:
    others = sorted(one.beaten_by, key=lambda name: (name not in found.left, name))
    said = [
        f"{name} ({', '.join(_label(found, spec) for spec in one.beaten_by[name])})"
        for name in others[:3]
    ]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{one.label} is beaten by {', '.join(said)}{more}."


def _bounds(one: Contest) -> str:
    """A difference with its bounds, turned so that above 0 speaks for the better one,
    or for the first.
    """
    sign = -1 if one.better == one.b else 1
    low, high = sorted((sign * one.low, sign * one.high))
    mean = format_number(sign * one.mean)
    return f"{mean}, {format_number(low)} to {format_number(high)}"


def _label(found: Recommendation, spec: str) -> str:
    return next(
        (str(one["label"]) for one in found.metrics if one["spec"] == spec), spec
    )


def _named(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def passes_words(value: float) -> str:
    """A number of passes; a dash where a method does not say."""
    return "–" if missing(value) else f"{value:,.0f}"


def cost_words(one: Standing) -> str:
    """Passes and seconds of one explanation."""
    return f"{passes_words(one.cost.passes)} / {format_seconds(one.cost.seconds)}"
