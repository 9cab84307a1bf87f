"""What people see: words, figures, pages, the terminal."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Show(ModuleType):
    """This package, which can be called: ``consilience.show(...)`` is both the package and
    what a notebook calls.
    """

    def __call__(self, *made: Any) -> Any:
        """`notebook.show`."""
        from consilience.show.notebook import show

        return show(*made)


sys.modules[__name__].__class__ = _Show
