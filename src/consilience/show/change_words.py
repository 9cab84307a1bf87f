"""What a check of a network says: in a sentence, and in Markdown for a pull request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from consilience.diagnosis.change import Change, Criterion
from consilience.show.words import count_of, format_number, format_p

MOST, FEW = 10, 3


def likeness(value: float) -> str:
    """A likeness of maps, or a difference of two, to four decimals: what is less is
    rounding.
    """
    return format_number(value if math.isnan(value) else round(value, 4) + 0.0)


def verdict_sentence(found: Change) -> str:
    """What was shown, in one sentence."""
    images = count_of(len(found.images), "image")
    if found.verdict == "changed":
        named = [one.name for one in found.criteria if one.answer == "beyond"]
        if found.beyond:
            named.append(f"maps of images of {_first_few(found.beyond)}")
        names = ", ".join(named)
        return f"Changed: {names} beyond what was allowed, over {images}."
    if found.verdict == "same":
        return (
            f"The same within the limits: shown for everything asked, over {images}."
        )
    names = ", ".join(one.name for one in found.criteria if one.answer == "not shown")
    return f"Not shown either way over {images}: {names}. More images would tell."


def _first_few(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - FEW} more classes" if len(names) > FEW else ""
    return f"{', '.join(names[:FEW])}{more}"


def classes_sentence(found: Change) -> str:
    """Whether the maps of any class are beyond the margin."""
    margin = f"{found.limits.maps:g}"
    if not found.beyond:
        return f"maps of no class are shown to be beyond {margin}"
    return (
        f"maps of images of {_first_few(found.beyond)}: shown to be beyond {margin}"
    )


def criterion_sentence(one: Criterion) -> str:
    """One number, its bounds and its margin."""
    bounds = f"({likeness(one.low)} to {likeness(one.high)})"
    value = f"{likeness(one.value)} {bounds}"
    said = {
        "within": "shown to be within",
        "beyond": "shown to be beyond",
        "not shown": "not shown to be within or beyond",
    }[one.answer]
    if one.name == "flips":
        return f"share of first classes that differ {value}: {said} {one.margin:g}"
    if one.name == "score":
        return (
            f"mean shift of the old class's score {value} standard deviations: {said} "
            f"{one.margin:g} either way"
        )
    if one.name == "marks" and math.isnan(one.value):
        return f"answers to marks were not compared: {said} {one.margin:g}"
    if one.name == "marks":
        return (
            f"largest growth of an answer to a mark ({one.held} in {one.n} images) "
            f"{value} standard deviations: {said} {one.margin:g}"
        )
    floor = ""
    if not math.isnan(one.floor):
        held = f"the noise floor ({one.held})" if one.held else "equal maps"
        floor = f" than {held} of {format_number(one.floor)}"
    return f"{one.name} {value} less alike{floor}: {said} {one.margin:g}"


def markdown(found: Change) -> str:
    """A summary for a pull request."""
    mark = {"same": "✅", "changed": "❌", "not shown": "❔"}[found.verdict]
    lines = [
        f"### {mark} consilience check",
        "",
        f"`{found.new_id}` against `{found.old_id}`. {verdict_sentence(found)}",
        "",
        "| | value | bounds | margin | |",
        "|---|--:|--:|--:|---|",
    ]
    lines += [
        f"| {one.name} | {likeness(one.value)} | {likeness(one.low)} to "
        f"{likeness(one.high)} | {one.margin:g} | {one.answer} |"
        for one in found.criteria
    ]
    lines += [
        "",
        "How alike maps are:",
        "",
        "| method | against | alike | 95 % | least |",
    ]
    lines += ["|---|---|--:|--:|--:|"]
    lines += [
        f"| `{row['method']}` | {row['against']} | {format_number(row['alike'])} | "
        f"{format_number(row['low'])} to {format_number(row['high'])} | "
        f"{format_number(row['least'])} |"
        for row in found.floors.to_dict("records")
    ]
    if len(found.marks):
        lines += [
            "",
            "Answers to marks, in standard deviations of a class's score:",
            "",
            "| mark | class | old | new | difference | bounds |",
            "|---|---|--:|--:|--:|--:|",
        ]
    lines += [
        f"| `{row['mark']}` | {_cell(row['class'])} | {likeness(row['old'])} | "
        f"{likeness(row['new'])} | {likeness(row['difference'])} | "
        f"{likeness(row['low'])} to {likeness(row['high'])} |"
        for row in found.marks.head(MOST).to_dict("records")
    ]
    lines += [
        "",
        "Classes, worst first:",
        "",
        "| class | images | flips | less alike | p |",
    ]
    lines += ["|---|--:|--:|--:|--:|"]
    lines += [
        f"| {_cell(row['class'])} | {row['images']} | {row['flips']} | "
        f"{likeness(row['drop'])} | {format_p(row['p'])} |"
        for row in found.by_class.head(MOST).to_dict("records")
    ]
    lines += ["", "Images, worst first:", "", "| image | old | new | less alike |"]
    lines += ["|---|---|---|--:|"]
    lines += [
        f"| {_cell(row['image'])} | {_cell(row['old'])} | {_cell(row['new'])} | "
        f"{likeness(row['drop'])} |"
        for row in found.images.head(MOST).to_dict("records")
    ]
    lines += [f"\n{note}." for note in found.notes]
    if found.failures:
        name, why = found.failures[0]
        count = count_of(len(found.failures), "image")
        lines += [
            "",
            f"{count} could not be asked about: {_cell(name)}: {_cell(why)}",
        ]
    return "\n".join([*lines, ""])


def _cell(text: object) -> str:
    """Text in a table: no row ends and no bars."""
    return " ".join(str(text).split()).replace("|", "\\|")
