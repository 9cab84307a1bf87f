"""The columns of a job: methods, for one or several networks and classes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product


def titles(
    labels: Sequence[str], models: Sequence[str], targets: Sequence[str]
) -> list[str]:
    """Titles of the columns, network by network, class by class, method by method; what
    there is one of is not named.
    """
    found = []
    for model, target, label in product(models, targets, labels):
        more = [model] * (len(models) > 1) + [target] * (len(targets) > 1)
        found.append(f"{label} ({', '.join(more)})" if more else label)
    return found
