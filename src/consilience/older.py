"""Names that went out of use: taken for at least one minor version more, with a warning."""

from __future__ import annotations

import warnings

GOES = "0.4"
"""The version without the names that were older in 0.2."""


class OlderNameWarning(DeprecationWarning):
    """A name is used that will go."""


def say_older(older: str, newer: str, goes: str = GOES, level: int = 3) -> None:
    """Warn that ``older`` is now ``newer``; ``level`` is as of `warnings.warn`."""
    warnings.warn(
        f"{older} is now {newer}; the older name goes in {goes}",
        OlderNameWarning,
        stacklevel=level,
    )
