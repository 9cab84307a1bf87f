"""The versions that the tests passed with, as a constraints file for pip.

    python benchmarks/constraints.py > constraints.txt

Everything that `consilience[all]` brings in the environment of the tests, and nothing
that belongs to one platform alone (CUDA's libraries).
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

PLATFORM = re.compile(r"^(nvidia|cuda|triton)")


def plain(name: str) -> str:
    """A distribution's name as indices spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """Versions of what is required, and of what that requires."""
    found: dict[str, str] = {}
    while wanted:
        one = wanted.pop()
        try:
            there = distribution(one.name)
        except PackageNotFoundError:
            continue
        new = plain(one.name) not in found
        found[plain(one.name)] = there.version.partition("+")[0]
        if not (new or one.extras):
            continue
        for line in there.requires or ():
            inner = Requirement(line)
            told = [{"extra": extra} for extra in (*one.extras, "")]
            if inner.marker is None or any(map(inner.marker.evaluate, told)):
                wanted.append(inner)
    return found


def main() -> None:
    """Print the file."""
    found = closure([Requirement("consilience[all]")])
    found.pop("consilience")
    print("# Versions that the tests passed with:")
    print("# pip install consilience -c constraints.txt")
    print("# Made by python benchmarks/constraints.py.")
    for name, version in sorted(found.items()):
        if not PLATFORM.match(name):
            print(f"{name}=={version}")


if __name__ == "__main__":
    sys.exit(main())
