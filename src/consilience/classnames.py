"""One rule for names of classes, wherever a person writes one: targets, truth files,
groups, names of files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


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
    wanted = plain_class_name(name)
    ways = (
        [known == name for known in classes],
        [plain_class_name(known) == wanted for known in classes],
        [wanted in spellings_of(known) for known in classes],
    )
    found = next((way for way in ways if any(way)), ())
    return [index for index, fits in enumerate(found) if fits]
