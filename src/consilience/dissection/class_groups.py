"""Concepts and classes that share a name: simple matching of words, with what was
matched said, and no WordNet.

ImageNet-1k orders its classes by WordNet, so that some groups (dogs, birds, snakes) are
runs of classes: these few are known here by the names of their first and last class.
All else goes by the words of the names; a file of groups overrules both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from consilience.classnames import classes_named, plain_class_name
from consilience.files import read_csv_records
from consilience.registry import unknown
from consilience.types import ConsilienceError

Groups = Mapping[str, tuple[int, ...]]

RUNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "dog": (("Chihuahua", "Mexican hairless"),),
    "cat": (("tabby", "cheetah"),),
    "bird": (
        ("cock", "great grey owl"),
        ("black grouse", "black swan"),
        ("white stork", "albatross"),
    ),
    "fish": (("tench", "stingray"), ("barracouta", "puffer")),
    "snake": (("thunder snake", "sidewinder"),),
    "frog": (("bullfrog", "tailed frog"),),
    "lizard": (("banded gecko", "Komodo dragon"),),
    "turtle": (("loggerhead", "box turtle"),),
    "spider": (("black and gold garden spider", "wolf spider"),),
    "bear": (("brown bear", "sloth bear"),),
    "insect": (("tiger beetle", "lycaenid"),),
    "butterfly": (("admiral", "lycaenid"),),
    "monkey": (("guenon", "squirrel monkey"),),
    "elephant": (("Indian elephant", "African elephant"),),
}
"""Runs of ImageNet-1k's classes, by the first spelling of their first and last class
(torchvision's and timm's are the same up to synonyms).
"""


# ---- words of names


def comparable_name(name: str) -> str:
    """A concept's or class's name for comparison: lower case, no underscores, without
    Broden's suffix (``black-c``).
    """
    return plain_class_name(
        re.sub(r"-[cs]$", "", name.strip().lower().lstrip("/")).replace("/", " ")
    )


@cache
def words_of(name: str) -> tuple[str, ...]:
    """The words of one spelling, each in the singular."""
    return tuple(
        singular(word) for word in re.findall(r"[^\W_]+", comparable_name(name))
    )


def singular(word: str) -> str:
    """A plural without its ending, by the regular rules; what is not a plural stays.

    >>> [singular(word) for word in ("dogs", "buses", "butterflies", "grass", "glasses", "bus")]
    ['dog', 'bus', 'butterfly', 'grass', 'glass', 'bus']
    """
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(s|x|z|ch|sh)es$", word):
        return word[:-2]
    return (
        word[:-1]
        if len(word) > 3
        and word.endswith("s")
        and not word.endswith(("ss", "us", "is"))
        else word
    )


def spellings(name: str) -> tuple[str, ...]:
    """The synonyms of a class that lists them with commas."""
    return tuple(part.strip() for part in name.split(",") if part.strip())


def same_name(a: str, b: str) -> bool:
    """Whether one name ends with the other in whole words: ``sports car`` and ``car``,
    not ``car wheel`` and ``car``.
    """
    return any(
        _ends(words_of(one), words_of(two))
        for one in spellings(a)
        for two in spellings(b)
    )


def _ends(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    short = min(len(a), len(b))
    return short > 0 and a[-short:] == b[-short:]


# ---- classes of a concept


@dataclass(frozen=True)
class Match:
    """The classes that go with a concept, and how they were found: ``file``, ``run``
    (of ImageNet), ``name``, or ``none``.
    """

    concept: str
    classes: tuple[int, ...]
    how: Literal["file", "run", "name", "none"]

    def said(self, names: Sequence[str], most: int = 6) -> str:
        """What was matched, in words."""
        if not self.classes:
            return f"no class goes with {self.concept!r} by name"
        shown = ", ".join(names[index] for index in self.classes[:most])
        more = (
            f" and {len(self.classes) - most} more"
            if len(self.classes) > most
            else ""
        )
        how = {
            "file": "as the file of groups says",
            "run": "a run of ImageNet's classes",
            "name": "by name",
        }[self.how]
        return f"{self.concept}: {shown}{more} ({how})"


def match(
    concept: str, classes: Sequence[str], groups: Groups | None = None
) -> Match:
    """The classes that a concept means: as ``groups`` say, by a run of ImageNet's, or
    those whose name ends with it.
    """
    for known, indices in (groups or {}).items():
        if words_of(known) == words_of(concept):
            return Match(concept, tuple(indices), "file")
    run = _run(concept, classes)
    if run:
        return Match(concept, run, "run")
    wanted = words_of(concept)
    named = tuple(
        index
        for index, name in enumerate(classes)
        if any(_is_a(words_of(part), wanted) for part in spellings(name))
    )
    return Match(concept, named, "name" if named else "none")


def _is_a(name: tuple[str, ...], concept: tuple[str, ...]) -> bool:
    """``sports car`` is a car; a car is no ``sports car``."""
    return 0 < len(concept) <= len(name) and name[-len(concept) :] == concept


def _run(concept: str, classes: Sequence[str]) -> tuple[int, ...]:
    """Classes of a known run, where every end of it is one class of this model, in
    order.
    """
    words = words_of(concept)
    ends = RUNS.get(words[0], ()) if len(words) == 1 and len(classes) == 1000 else ()
    found: list[int] = []
    for first, last in ends:
        low, high = _place(first, classes), _place(last, classes)
        if low is None or high is None or high < low:
            return ()
        found += range(low, high + 1)
    return tuple(found)


def _place(name: str, classes: Sequence[str]) -> int | None:
    fit = classes_named(name, classes)
    return fit[0] if len(fit) == 1 else None


# ---- a file of groups


def read_groups(
    path: str | Path, classes: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Groups of classes from a CSV with the columns ``concept`` and ``class`` (an index
    or a name), a row a class.
    """
    file = Path(path).expanduser()
    rows = read_csv_records(file, "groups")
    if not rows or not {"concept", "class"} <= rows[0].keys():
        has = ", ".join(rows[0]) if rows else "nothing"
        raise ConsilienceError(
            f"{file}: a file of groups has the columns concept and class; this has {has}"
        )
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 2):
        groups.setdefault(row["concept"].strip(), []).append(
            _index(row["class"] or "", classes, f"{file}, line {number}")
        )
    return {
        concept: tuple(dict.fromkeys(indices)) for concept, indices in groups.items()
    }


def _index(text: str, classes: Sequence[str], where: str) -> int:
    found = classes_named(text, classes)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConsilienceError(
            f"{where}: class {text!r} is number {' and '.join(map(str, found))}; give the "
            f"number"
        )
    if not text.strip().isdecimal():
        raise ConsilienceError(
            f"{where}: {unknown('class', text, classes, limit=12)}"
        )
    if int(text) >= len(classes):
        raise ConsilienceError(
            f"{where}: classes are 0 to {len(classes) - 1}; got {text}"
        )
    return int(text)
