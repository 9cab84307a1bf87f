"""A fixture for pytest: a test that fails where a network's explanations changed.

def test_the_new_export_explains_as_the_old_one(explanations_unchanged):
    explanations_unchanged(new, old, "photos/", by=["gradcam"], maps=0.05)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


@pytest.fixture
def explanations_unchanged() -> Callable[..., Any]:
    """A function that checks ``new`` against ``old`` (`consilience.check`) and fails the
    test with what changed; limits by keyword.
    """

    def unchanged(
        new: Any,
        old: Any,
        images: Any,
        by: Sequence[str] = ("gradcam",),
        **limits: Any,
    ) -> Any:
        from consilience.runs.check import check
        from consilience.show.change_words import criterion_sentence, verdict_sentence

        found = check(new, old, images, by, limits)
        if not found.passed:
            lines = [criterion_sentence(one) for one in found.criteria]
            pytest.fail("\n".join([verdict_sentence(found), *lines]), pytrace=False)
        return found

    return unchanged
