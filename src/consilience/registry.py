"""Names of what there is: explainers, metrics, fills and the rest, and plug-ins.

A registered frozen dataclass is the schema of its options (see `options`): its first
field is the positional one. A class is checked when it registers: what its kind must
have, and that its options can be checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from consilience import options
from consilience.options import (
    as_spec as as_spec,
)
from consilience.options import (
    construct as construct,
)
from consilience.options import (
    option as option,
)
from consilience.options import (
    options_of as options_of,
)
from consilience.options import (
    spell as spell,
)
from consilience.options import (
    spelled_default as spelled_default,
)
from consilience.spec import Spec as Spec
from consilience.spec import parse as parse
from consilience.spec import render as render
from consilience.types import ConsilienceError

C = TypeVar("C", bound=type)

ENTRY_POINTS = "consilience.plugins"


class Registry:
    """Names of one kind.

    ``packages`` and their modules are imported, and plugins loaded, when a name is
    first asked for.
    """

    def __init__(
        self, kind: str, *packages: str, contract: tuple[str, ...] = ()
    ) -> None:
        self.kind, self.packages, self.contract = kind, packages, contract
        self._entries: dict[str, type] = {}
        self._loaded = False
        options.BUILDERS[kind] = self

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: ``name`` is what users type.

        The class is a frozen dataclass and has what its kind needs (``contract``), or
        `ConsilienceError` names all that is missing. From then on its constructor
        checks its options.
        """

        def add(cls: C) -> C:
            self._check_contract(name, cls)
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ConsilienceError(
                    f"{self.kind} {name!r} is registered by {known.__module__} and by "
                    f"{cls.__module__}"
                )
            cls.spelled = name  # type: ignore[attr-defined]
            cls.registry = self  # type: ignore[attr-defined]
            self._entries[name] = cls
            options.install_checks(cls)
            return cls

        return add

    def _check_contract(self, name: str, cls: type) -> None:
        """Everything that a class of this kind lacks, in one line."""
        where = f"{self.kind} {name!r} ({cls.__module__}.{cls.__qualname__})"
        if not isinstance(cls, type):
            raise ConsilienceError(f"{self.kind} {name!r} is not a class: {cls!r}")
        frozen = getattr(cls, "__dataclass_params__", None)
        lacks = [] if frozen and frozen.frozen else ["@dataclass(frozen=True)"]
        fields = getattr(cls, "__dataclass_fields__", {})
        lacks += [
            part
            for part in self.contract
            if not hasattr(cls, part) and part not in fields
        ]
        if lacks:
            raise ConsilienceError(f"{where} lacks {', '.join(lacks)}")

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def get(self, name: str) -> type:
        """The class behind a name, or an error that lists what there is."""
        self._load()
        if name not in self._entries:
            raise ConsilienceError(unknown(self.kind, name, self.names()))
        return self._entries[name]

    def build(self, spec: str | Spec | Any) -> Any:
        """An instance from its spelling; an instance is returned as it is."""
        if isinstance(spec, str):
            spec = parse(spec)
        if not isinstance(spec, Spec):
            lacks = [part for part in self.contract if not hasattr(spec, part)]
            if lacks or isinstance(spec, type):
                raise ConsilienceError(
                    f"not the spelling of one {self.kind}, nor one that was made: "
                    f"{repr(spec)[:80]}"
                )
            return spec
        return construct(self.get(spec.name), spec)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports, which may ask for names themselves
        try:
            self._import_all()
        except BaseException:
            self._loaded = False
            raise

    def _import_all(self) -> None:
        for name in self.packages:
            package = importlib.import_module(name)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{name}.{module.name}")
        load_entry_points()


explainers = Registry("explainer", "consilience.explainers", contract=("explain",))
metrics = Registry(
    "metric", "consilience.metrics", contract=("score", "higher_is_better", "bounds")
)
segmenters = Registry(
    "segmenter",
    "consilience.perturb.superpixels",
    "consilience.perturb.quickshift",
    contract=("labels",),
)
fills = Registry(
    "fill", "consilience.perturb.fills", "consilience.study", contract=("image",)
)
cutters = Registry(
    "mask", "consilience.agreement.masks", "consilience.study", contract=("cut",)
)
marks = Registry("mark", "consilience.marks", contract=("paint", "doses"))


def summary_of(cls: type) -> str:
    """What a class says of itself: the first paragraph of its docstring, on one line."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def has_plugins() -> bool:
    """Whether anything comes, or has come, from outside the program."""
    registered = (
        made.__module__
        for registry in (explainers, metrics, segmenters, fills, cutters, marks)
        for made in registry._entries.values()
    )
    return bool(entry_points(group=ENTRY_POINTS)) or any(
        module.partition(".")[0] != "consilience" for module in registered
    )


@cache
def load_entry_points() -> None:
    """Import what other installed packages offer under the entry point group
    ``consilience.plugins``.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def load_plugin(path: str | Path) -> None:
    """Import a Python file that registers explainers or metrics (the user's own code:
    it runs as such).
    """
    file = Path(path)
    if not file.is_file():
        raise ConsilienceError(f"plugin {str(path)!r} is not a file")
    name = f"consilience_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConsilienceError(f"plugin {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, ConsilienceError):
            raise
        raise ConsilienceError(
            f"plugin {str(path)!r} does not load: {type(error).__name__}: {error}"
        ) from error


def source_digest(*built: Any) -> str | None:
    """Digest of the files that define classes from outside the program, those of nested
    options too; None where there are none.
    """
    files = sorted({file for one in built for file in _outside(one)})
    if not files:
        return None
    state = blake2b(digest_size=16)
    for file in files:
        state.update(Path(file).read_bytes())
    return state.hexdigest()


def _outside(built: Any) -> typing.Iterator[str]:
    """Files of an object's class and of the objects in its fields."""
    if isinstance(built, tuple | list):
        for part in built:
            yield from _outside(part)
    fields = getattr(type(built), "__dataclass_fields__", None)
    if fields is None:
        return
    if type(built).__module__.partition(".")[0] != "consilience":
        module = sys.modules.get(type(built).__module__)
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_file():
            yield str(file)
    for name in fields:
        yield from _outside(getattr(built, name))


def unknown(kind: str, got: str, there: typing.Iterable[str], limit: int = 60) -> str:
    """The one error for names: what was got, the nearest, what there is."""
    names = list(there)
    near = get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    limit = 12 if near and len(names) > limit else limit
    shown = ", ".join(names[:limit]) + (
        f", ... ({len(names)} in all)" if len(names) > limit else ""
    )
    return (
        f"no {kind} {got!r}{hint} There is: {shown}"
        if hint
        else f"no {kind} {got!r}; there is: {shown}"
    )
