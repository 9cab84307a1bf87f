"""One rule for names of classes, wherever a person writes one: targets, truth files,
groups, names of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache


def plain_class_name(name: str) -> str:
    """A class name without what spellings differ in: case, underscores, hyphens,
    apostrophes, spaces.

    >>> plain_class_name("jack-o'-lantern"), plain_class_name("Jack_o_lantern")
    ('jack o lantern', 'jack o lantern')
    """
    return " ".join(
        re.sub(r"['’`.]", "", re.sub(r"[_\-\s]+", " ", name)).casefold().split()
    )


def spellings_of(known: str) -> set[str]:
    """A class's name as it is compared, and each of its synonyms where they are listed
    with commas.
    """
    return {
        plain_class_name(known),
        *(plain_class_name(part) for part in known.split(",")),
    } - {""}


def classes_named(name: str, classes: Sequence[str]) -> list[int]:
    """The numbers of the classes that a name means: those called exactly so, else those
    of that name as it is compared, else those with it among their synonyms.

    >>> classes_named("0", ("2", "0", "1")), classes_named("Hen", ("cock", "hen, biddy"))
    ([1], [1])
    """
    exact, compared, synonyms = _index(tuple(classes))
    plain = plain_class_name(name)
    return list(exact.get(name) or compared.get(plain) or synonyms.get(plain) or ())


@lru_cache(maxsize=16)
def _index(classes: tuple[str, ...]) -> tuple[Mapping[str, list[int]], ...]:
    """Numbers of classes by exact name, by compared name and by synonym: a run asks for
    every image.
    """
    exact: dict[str, list[int]] = {}
    compared: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, known in enumerate(classes):
        exact.setdefault(known, []).append(index)
        compared.setdefault(plain_class_name(known), []).append(index)
        for spelling in spellings_of(known):
            synonyms.setdefault(spelling, []).append(index)
    return exact, compared, synonyms
