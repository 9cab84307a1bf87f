"""Names, and the one grammar in which everything is spelled.

``name[:positional][,key=value...]``; nested values as
``segments=quickshift(kernel_size=5)``, lists with ``+``, quotes round what needs them.
A registered frozen dataclass is the schema: its first field is the positional one, its
fields are the options. `build` and `spell` are inverse.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from consilience.types import ConsilienceError

C = TypeVar("C", bound=type)
Value = Union[str, "Spec", tuple["str | Spec", ...]]

ENTRY_POINTS = "consilience.plugins"


@dataclass(frozen=True)
class Spec:
    """A parsed spelling, before anybody knows what the name means."""

    name: str
    args: tuple[Value, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()


# ---- parsing

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<mark>[,+()=])|(?P<word>[^,+()="']+))"""
)
_PLAIN = re.compile(r"""[^,+()="'\s\\][^,+()="'\\]*(?<!\s)""")


def parse(text: str) -> Spec:
    """Parse ``name[:positional][,key=value...]``.

    >>> parse("lime:700,segments=grid(8)")
    Spec(name='lime', args=('700',), options=(('segments', Spec(name='grid', args=('8',), options=())),))
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if not name or re.search(r"""[,()="'\s]""", name):
        raise ConsilienceError(
            f"{text!r} is no spec; a spec is name[:value][,key=value...]"
        )
    if not colon:
        return Spec(name)
    tokens = _tokens(rest, text)
    args, options = _items(tokens, text, closing=None)
    return Spec(name, args, options)


def _tokens(rest: str, text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(rest) and rest[at:].strip():
        match = _TOKEN.match(rest, at)
        if match is None:
            raise ConsilienceError(
                f"{text!r}: a quote is opened and not closed at {rest[at:]!r}"
            )
        kind = str(match.lastgroup)
        tokens.append((kind, match.group(kind)))
        at = match.end()
    tokens.append(("end", ""))
    return tokens


def _items(
    tokens: list[tuple[str, str]], text: str, closing: str | None
) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
    """Items up to ``closing`` (a bracket) or the end; ``tokens`` is consumed from the
    front.
    """
    args: list[Value] = []
    options: list[tuple[str, Value]] = []
    stop = ("mark", ")") if closing else ("end", "")
    while True:
        if tokens[0][0] == "word" and tokens[1] == ("mark", "="):
            key = tokens.pop(0)[1].strip()
            tokens.pop(0)
            if key in dict(options):
                raise ConsilienceError(f"{text!r} gives {key!r} twice")
            options.append((key, _value(tokens, text)))
        elif options:
            raise ConsilienceError(
                f"{text!r}: a value without a name comes after a named one, at {tokens[0][1]!r}"
            )
        else:
            args.append(_value(tokens, text))
        if tokens[0] == stop:
            tokens.pop(0)
            return tuple(args), tuple(options)
        if tokens[0] != ("mark", ","):
            raise ConsilienceError(
                f"{text!r} is no spec: {tokens[0][1] or 'its end'!r} was not expected there"
            )
        tokens.pop(0)


def _value(tokens: list[tuple[str, str]], text: str) -> Value:
    atoms = [_atom(tokens, text)]
    while tokens[0] == ("mark", "+"):
        tokens.pop(0)
        atoms.append(_atom(tokens, text))
    return atoms[0] if len(atoms) == 1 else tuple(atoms)


def _atom(tokens: list[tuple[str, str]], text: str) -> str | Spec:
    kind, word = tokens.pop(0)
    if kind == "quoted":
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    if kind != "word":
        raise ConsilienceError(
            f"{text!r} is no spec: a value is missing before {word or 'its end'!r}"
        )
    if tokens[0] != ("mark", "("):
        return word.strip()
    tokens.pop(0)
    if tokens[0] == ("mark", ")"):
        tokens.pop(0)
        return Spec(word.strip())
    args, options = _items(tokens, text, closing=")")
    return Spec(word.strip(), args, options)


def render(spec: Spec) -> str:
    """A parsed spec as text again."""
    inner = _render_items(spec)
    return f"{spec.name}:{inner}" if inner else spec.name


def _render_items(spec: Spec) -> str:
    named = [f"{key}={_render_value(value)}" for key, value in spec.options]
    return ",".join([_render_value(arg) for arg in spec.args] + named)


def _render_value(value: Value) -> str:
    if isinstance(value, tuple):
        return "+".join(_render_value(item) for item in value)
    if isinstance(value, Spec):
        return f"{value.name}({_render_items(value)})"
    return (
        value
        if _PLAIN.fullmatch(value)
        else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )


# ---- the registry


class Registry:
    """Names of one kind.

    ``packages`` and their modules are imported, and plugins loaded, when a name is
    first asked for.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind, self.packages = kind, packages
        self._entries: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: ``name`` is what users type.

        The class is a frozen dataclass.
        """

        def add(cls: C) -> C:
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
            return cls

        return add

    def names(self) -> tuple[str, ...]:
        """Every registered name, in order of the alphabet."""
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


explainers = Registry("explainer", "consilience.explainers")
metrics = Registry("metric", "consilience.metrics")
segmenters = Registry(
    "segmenter", "consilience.perturb.superpixels", "consilience.perturb.quickshift"
)
fills = Registry("fill", "consilience.perturb.fills", "consilience.study")
cutters = Registry("mask", "consilience.agreement.masks", "consilience.study")

_by_kind = {
    registry.kind: registry
    for registry in (explainers, metrics, segmenters, fills, cutters)
}


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
        raise ConsilienceError(f"plugin {str(path)!r} is no file")
    name = f"consilience_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConsilienceError(f"plugin {str(path)!r} is no Python file")
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


# ---- dataclasses as schemas


def option(default: Any, *, kind: str | None = None, help: str = "") -> Any:
    """A dataclass field with what the CLI and the web say of it; ``kind`` names the
    registry of a nested value.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def options_of(cls: type) -> tuple[Field[Any], ...]:
    """The fields a user may set."""
    return tuple(item for item in dataclasses.fields(cls) if item.init)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def construct(cls: type, spec: Spec) -> Any:
    """Build a registered class from a parsed spec, converting each value as its field
    is typed.
    """
    fields = {item.name: item for item in options_of(cls)}
    if len(spec.args) > len(fields):
        raise ConsilienceError(
            f"{spec.name} takes {len(fields)} values at most; got {len(spec.args)}: "
            f"{_render_items(spec)}"
        )
    given: dict[str, Value] = dict(zip(fields, spec.args, strict=False))
    for key, value in spec.options:
        name = key.replace("-", "_")
        if name not in fields:
            near = get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            has = ", ".join(fields) or "no options"
            raise ConsilienceError(
                f"{spec.name} has no option {key!r}{hint}; it has {has}"
            )
        if name in given:
            raise ConsilienceError(f"{spec.name} is given {name!r} twice")
        given[name] = value
    required = [
        name
        for name, item in fields.items()
        if item.default is MISSING and item.default_factory is MISSING
    ]
    for name in required:
        if name not in given:
            raise ConsilienceError(
                f"{spec.name} needs {name}: {spec.name}:{name.upper()}"
            )
    hints = _hints(cls)
    return cls(
        **{
            name: _convert(value, hints[name], fields[name], f"{spec.name}: {name}")
            for name, value in given.items()
        }
    )


def _convert(value: Value, hint: Any, item: Field[Any], where: str) -> Any:
    kind = item.metadata.get("kind")
    if kind is not None:
        registry = _by_kind[kind]
        if typing.get_origin(hint) is tuple:
            several = value if isinstance(value, tuple) else (value,)
            return tuple(
                registry.build(one if isinstance(one, Spec) else Spec(one))
                for one in several
            )
        if isinstance(value, tuple):
            raise ConsilienceError(
                f"{where} is one {kind}, got a list: {_render_value(value)}"
            )
        return registry.build(value if isinstance(value, Spec) else Spec(value))
    return _typed(value, hint, where)


def _typed(value: Value, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fit(value, args, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConsilienceError(
            f"{where} is one of {', '.join(map(str, args))}; got {_render_value(value)!r}"
        )
    if origin is tuple:
        items = value if isinstance(value, tuple) else (value,)
        inner = args[:-1] * len(items) if args[-1] is Ellipsis else args
        if len(inner) != len(items):
            raise ConsilienceError(
                f"{where} takes {len(inner)} values joined by +; got {_render_value(value)!r}"
            )
        return tuple(
            _typed(one, kind, where) for one, kind in zip(items, inner, strict=True)
        )
    if not isinstance(value, str):
        raise ConsilienceError(
            f"{where} takes one plain value; got {_render_value(value)!r}"
        )
    return _scalar(value, hint, where)


def _first_fit(value: Value, hints: tuple[Any, ...], where: str) -> Any:
    complaints = []
    for hint in hints:
        try:
            return _typed(value, hint, where)
        except ConsilienceError as error:
            complaints.append(str(error))
    raise ConsilienceError(complaints[0])


def _scalar(text: str, hint: Any, where: str) -> Any:
    if hint is str:
        return text
    if hint is type(None):
        if text.lower() == "none":
            return None
        raise ConsilienceError(f"{where} may be none; got {text!r}")
    if hint is bool:
        flags = {
            "true": True,
            "yes": True,
            "1": True,
            "false": False,
            "no": False,
            "0": False,
        }
        if text.lower() in flags:
            return flags[text.lower()]
        raise ConsilienceError(f"{where} is true or false; got {text!r}")
    try:
        return hint(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(
            hint, f"a {hint.__name__}"
        )
        raise ConsilienceError(f"{where} is {what}; got {text!r}") from None


# ---- spelling


def spell(thing: Any, full: bool = False) -> str:
    """The spelling of a registered instance, without its defaults; ``full`` names every
    field, for keys.
    """
    return render(as_spec(thing, full))


def as_spec(thing: Any, full: bool = False) -> Spec:
    """The parsed spec of a registered instance."""
    pairs = []
    for item in options_of(type(thing)):
        value = getattr(thing, item.name)
        if full or item.default is MISSING or value != item.default:
            pairs.append((item.name, _spelled(value, full)))
    return Spec(type(thing).spelled, (), tuple(pairs))


def spelled_default(item: Field[Any]) -> str:
    """A field's default as users would type it; empty where it must be given."""
    return (
        ""
        if item.default is MISSING
        else _render_value(_spelled(item.default, full=False))
    )


def _spelled(value: Any, full: bool) -> Value:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = as_spec(value, full)
        return inner if inner.options else inner.name
    if isinstance(value, tuple):
        return tuple(typing.cast("str | Spec", _spelled(item, full)) for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        short = format(value, "g").replace("e+", "e")
        return short if float(short) == value else repr(value).replace("e+", "e")
    return str(value)
