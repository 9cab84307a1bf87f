"""Libraries imported as fast as they can be: torchvision and timm without torch's compiler,
which takes seconds and is not used; nothing looked through for garbage meanwhile.
"""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


def import_libraries(*names: str) -> None:
    """Import torchvision or timm as fast as they can be.

    Of torch's compiler they want two things when they are imported: a function to be
    called when a region is pooled in a compiled network, and a mark for functions that
    are not to be compiled. Where the compiler is not imported yet, the first imports it
    when it is called, and the second marks as the compiler itself does. Nothing is done
    beside other threads, who might import the compiler meanwhile.
    """
    wanted = [name for name in names if name not in sys.modules]
    if not wanted or _COMPILER in sys.modules or threading.active_count() > 1:
        return
    for name in wanted:
        before = set(sys.modules)
        try:
            with uncollected(), _standing_in():
                importlib.import_module(name)
        except (ImportError, AttributeError):  # another version asks for more
            for made in set(sys.modules) - before:
                if made.partition(".")[0] == name:
                    del sys.modules[made]


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for. What an import makes stays, hundreds of thousands of
    objects, and looking through them again and again is a fifth of its time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _standing_in() -> Iterator[None]:
    package, utils = ModuleType(_COMPILER), ModuleType(f"{_COMPILER}.utils")
    told: Any = package
    told.__path__, told.utils, told.disable = [], utils, _disable
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    modules = {one.__name__: one for one in (package, utils)}
    torch = importlib.import_module("torch")
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        vars(torch).pop("_dynamo", None)


def _is_compile_supported(kind: str) -> Any:
    return importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(kind)


def _disable(
    fn: Callable[..., Any] | None = None, recursive: bool = True, **_: Any
) -> Any:
    if fn is None:
        return lambda given: _disable(given, recursive)
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    return fn
