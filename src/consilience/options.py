"""Options of what is registered: a frozen dataclass is the schema, and it checks itself.

`option` declares a field with its bounds; `install_checks` makes the constructor check
type, choice and bounds of every value, whoever calls it. `construct` builds a class from
a parsed specification and `spell` is its inverse, so that for everything that can be
built ``build(spell(thing)) == thing``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import types
import typing
from dataclasses import MISSING, Field
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Protocol, Union

import numpy as np

from consilience.older import say_older
from consilience.spec import Quoted, Spec, Value, render, render_items, render_value
from consilience.types import ConsilienceError


class Builder(Protocol):
    """What builds nested values: a registry of one kind."""

    kind: str
    contract: tuple[str, ...]

    def build(self, spec: Any) -> Any:
        """An instance from its specification."""


BUILDERS: dict[str, Builder] = {}
"""Every registry by its kind; each enters itself."""


# ---- declaring


def option(
    default: Any = MISSING,
    *,
    kind: str | None = None,
    help: str = "",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    formerly: str | None = None,
) -> Any:
    """A dataclass field that is an option.

    ``kind`` names the registry of a nested value. ``least`` and ``most`` may be reached,
    ``above`` and ``below`` may not; in a list they hold for every item. A bounded number
    is finite unless a bound is infinite. ``formerly`` is an older name that is still read.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    given = {name: value for name, value in bounds.items() if value is not None}
    metadata = {"kind": kind, "help": help, "bounds": given, "formerly": formerly}
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> tuple[Field[Any], ...]:
    """The fields a user may set."""
    known = [item for item in dataclasses.fields(cls) if item.init]
    return tuple(sorted(known, key=lambda item: bool(item.kw_only)))


def range_in_words(bounds: typing.Mapping[str, float]) -> str:
    """Bounds for people: ``at least 1``, ``above 0 and at most 1``."""
    words = {
        "least": "at least",
        "above": "above",
        "most": "at most",
        "below": "below",
    }
    parts = [
        f"{words[name]} {bounds[name]:g}"
        for name in words
        if name in bounds and math.isfinite(bounds[name])
    ]
    return " and ".join(parts)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


# ---- the constructor


def install_checks(cls: type) -> None:
    """Make the constructor of a dataclass check its options before it stores them."""
    store = cls.__init__  # type: ignore[misc]

    @functools.wraps(store)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        store(self, **_bound(type(self), args, kwargs))

    cls.__init__ = checked  # type: ignore[misc]


def _bound(
    cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by option, each as its field is typed."""
    name, fields = spelled_name(cls), {item.name: item for item in options_of(cls)}
    if len(args) > len(fields):
        raise ConsilienceError(
            f"{name} takes {len(fields)} values at most; got {len(args)}"
        )
    given = dict(zip(fields, args, strict=False))
    for key, value in kwargs.items():
        item = option_called(name, fields, key)
        if item in given:
            raise ConsilienceError(f"{name} is given {item!r} twice")
        given[item] = value
    _check_required(name, fields, given)
    hints = _hints(cls)
    return {
        key: checked_value(value, hints[key], fields[key], f"{name}: {key}")
        for key, value in given.items()
    }


def spelled_name(cls: type) -> str:
    """What users type for a class; the class's own name where it is not registered."""
    return str(getattr(cls, "spelled", cls.__name__))


def option_called(
    name: str, fields: typing.Mapping[str, Field[Any]], key: str
) -> str:
    """The option that ``key`` means, also by an older name."""
    older = {item.metadata.get("formerly"): item.name for item in fields.values()}
    plain = key.replace("-", "_")
    if plain in older:
        say_older(f"{name}:{plain}", f"{name}:{older[plain]}")
        return older[plain]
    return option_name(name, fields, key)


def option_name(name: str, there: typing.Iterable[str], key: str) -> str:
    """The option called ``key``, or an error that lists what there is."""
    names, plain = list(there), key.replace("-", "_")
    if plain in names:
        return plain
    near = get_close_matches(plain, names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    has = ", ".join(names) or "no options"
    raise ConsilienceError(f"{name} has no option {key!r}{hint}; it has {has}")


def _check_required(
    name: str, fields: typing.Mapping[str, Field[Any]], given: typing.Container[str]
) -> None:
    for key, item in fields.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and key not in given:
            raise ConsilienceError(f"{name} needs {key}: {name}:{key.upper()}")


# ---- one value


def checked_value(value: Any, hint: Any, item: Field[Any], where: str) -> Any:
    """A Python value as its field is typed and within its bounds, or one line why not."""
    kind = item.metadata.get("kind")
    if kind is not None:
        return _nested(value, hint, BUILDERS[kind], where)
    typed = _typed(value, hint, where)
    _check_bounds(typed, item.metadata.get("bounds") or {}, where)
    return typed


def _nested(value: Any, hint: Any, builder: Builder, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, tuple | list) else (value,)
        return tuple(_built(one, builder, where) for one in items)
    if isinstance(value, tuple | list):
        shown = "+".join(map(str, value))
        raise ConsilienceError(f"{where} is one {builder.kind}, got a list: {shown}")
    return _built(value, builder, where)


def _built(value: Any, builder: Builder, where: str) -> Any:
    if isinstance(value, str | Spec):
        return builder.build(value)
    missing = [name for name in builder.contract if not hasattr(value, name)]
    if missing or isinstance(value, type):
        raise ConsilienceError(
            f"{where} is a {builder.kind}; got {shown_value(value)}"
        )
    return value


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fit(value, args, where)
    if origin is Literal:
        return _choice(value, args, where)
    if origin is tuple:
        return _several(value, args, where)
    return _scalar(value, hint, where)


def _first_fit(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    complaints = []
    for hint in hints:
        try:
            return _typed(value, hint, where)
        except ConsilienceError as error:
            complaints.append(str(error))
    raise ConsilienceError(complaints[0])


def _choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if (
            type(choice) is bool
            and isinstance(value, bool | np.bool_)
            and choice == value
        ):
            return choice
        if (
            type(choice) is not bool
            and isinstance(value, type(choice))
            and choice == value
        ):
            return choice
    listed = ", ".join(map(str, choices))
    raise ConsilienceError(f"{where} is one of {listed}; got {shown_value(value)}")


def _several(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    inner = hints[:-1] * len(items) if hints[-1] is Ellipsis else hints
    if len(inner) != len(items):
        raise ConsilienceError(
            f"{where} takes {len(inner)} values joined by +; got {shown_value(value)}"
        )
    pairs = zip(items, inner, strict=True)
    return tuple(_typed(one, kind, where) for one, kind in pairs)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    checks: dict[Any, tuple[str, Any]] = {
        str: ("a text", _as_text),
        bool: ("true or false", _as_flag),
        int: ("a whole number", _as_integer),
        float: ("a number", _as_number),
        type(None): ("none", _as_none),
    }
    if hint not in checks:
        return value
    what, convert = checks[hint]
    converted = convert(value)
    if converted is MISSING:
        may = "may be" if hint is type(None) else "is"
        raise ConsilienceError(f"{where} {may} {what}; got {shown_value(value)}")
    return converted


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, str) else MISSING


def _as_flag(value: Any) -> Any:
    return bool(value) if isinstance(value, bool | np.bool_) else MISSING


def _as_integer(value: Any) -> Any:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return int(value) if whole else MISSING


def _as_number(value: Any) -> Any:
    number = isinstance(value, int | float | np.integer | np.floating)
    if not number or isinstance(value, bool) or math.isnan(value):
        return MISSING
    return float(value)


def _as_none(value: Any) -> Any:
    return None if value is None else MISSING


def shown_value(value: Any) -> str:
    """A value in an error: short, and on one line."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    if isinstance(value, Spec):
        text = repr(f"{value.name}({render_items(value)})")
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _check_bounds(value: Any, bounds: typing.Mapping[str, float], where: str) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_bounds(item, bounds, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    unlimited = not bounds or any(math.isinf(bound) for bound in bounds.values())
    if math.isinf(value) and not unlimited:
        raise ConsilienceError(f"{where} is finite; got {value:g}")
    tests = {
        "least": operator.ge,
        "above": operator.gt,
        "most": operator.le,
        "below": operator.lt,
    }
    if not all(tests[name](value, bound) for name, bound in bounds.items()):
        allowed = range_in_words(bounds)
        raise ConsilienceError(f"{where} must be {allowed}; got {value:g}")


# ---- from and to specifications


def construct(cls: type, spec: Spec) -> Any:
    """Build a registered class from a parsed specification."""
    fields = {item.name: item for item in options_of(cls)}
    if len(spec.args) > len(fields):
        raise ConsilienceError(
            f"{spec.name} takes {len(fields)} values at most; got {len(spec.args)}: "
            f"{render_items(spec)}"
        )
    given: dict[str, Value] = dict(zip(fields, spec.args, strict=False))
    for key, value in spec.options:
        name = option_called(spec.name, fields, key)
        if name in given:
            raise ConsilienceError(f"{spec.name} is given {name!r} twice")
        given[name] = value
    _check_required(spec.name, fields, given)
    hints = _hints(cls)
    return cls(
        **{
            name: _read(value, hints[name], fields[name], f"{spec.name}: {name}")
            for name, value in given.items()
        }
    )


def _read(value: Value, hint: Any, item: Field[Any], where: str) -> Any:
    """What a parsed value means to a field; the constructor checks the rest."""
    if item.metadata.get("kind") is None:
        return read_value(value, hint, where)
    if isinstance(value, tuple):
        return tuple(one if isinstance(one, Spec) else Spec(one) for one in value)
    return value if isinstance(value, Spec) else Spec(value)


def read_value(value: Value, hint: Any, where: str) -> Any:
    """A parsed value as a type: ``none``, a number, true or false, a text, a list."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_read(value, args, where)
    if origin is Literal:
        return _read_choice(value, args)
    if origin is tuple:
        if _is_none(value):
            return ()
        items = value if isinstance(value, tuple) else (value,)
        inner = args[:-1] * len(items) if args[-1] is Ellipsis else args
        if len(inner) != len(items):
            raise ConsilienceError(
                f"{where} takes {len(inner)} values joined by +; "
                f"got {render_value(value)!r}"
            )
        pairs = zip(items, inner, strict=True)
        return tuple(read_value(one, kind, where) for one, kind in pairs)
    if not isinstance(value, str):
        raise ConsilienceError(
            f"{where} takes one plain value; got {render_value(value)!r}"
        )
    return _read_scalar(value, hint, where)


def _is_none(value: Value) -> bool:
    plain = isinstance(value, str) and not isinstance(value, Quoted)
    return plain and str(value).lower() == "none"


def _first_read(value: Value, hints: tuple[Any, ...], where: str) -> Any:
    if type(None) in hints and _is_none(value):
        return None
    complaints = []
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return _typed(read_value(value, hint, where), hint, where)
        except ConsilienceError as error:
            complaints.append(str(error))
    raise ConsilienceError(complaints[0])


def _read_choice(value: Value, choices: tuple[Any, ...]) -> Any:
    by_text = {str(choice): choice for choice in choices}
    return by_text.get(value, value) if isinstance(value, str) else value


_FLAGS = {
    "true": True,
    "yes": True,
    "1": True,
    "false": False,
    "no": False,
    "0": False,
}


def _read_scalar(text: str, hint: Any, where: str) -> Any:
    if hint is str:
        return str(text)
    if hint is bool:
        if text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        raise ConsilienceError(f"{where} is true or false; got {str(text)!r}")
    try:
        return hint(text)
    except ValueError:
        names = {int: "a whole number", float: "a number"}
        what = names.get(hint, f"a {hint.__name__}")
        raise ConsilienceError(f"{where} is {what}; got {str(text)!r}") from None


def spell(thing: Any, full: bool = False) -> str:
    """The specification of a registered instance as text.

    Defaults are left out; ``full`` names every field, for keys.
    """
    return render(as_spec(thing, full))


def as_spec(thing: Any, full: bool = False) -> Spec:
    """The parsed specification of a registered instance."""
    cls: Any = type(thing)
    hints = _hints(cls)
    pairs = []
    for item in options_of(cls):
        value = getattr(thing, item.name)
        if full or item.default is MISSING or value != item.default:
            pairs.append((item.name, _spelled(value, hints[item.name], full)))
    return Spec(cls.spelled, (), tuple(pairs))


def spelled_default(item: Field[Any]) -> str:
    """A field's default as users would type it; empty where it must be given."""
    if item.default is MISSING:
        return ""
    return render_value(_spelled(item.default, None, full=False))


def _spelled(value: Any, hint: Any, full: bool) -> Value:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = as_spec(value, full)
        return inner if inner.options else inner.name
    if isinstance(value, tuple):
        if not value:
            return "none"
        several = tuple(_spelled_item(item, full) for item in value)
        only = str(several[0]) if len(several) == 1 else ""
        alone = only.lower() == "none"
        return (Quoted(only),) if alone else several
    return _spelled_scalar(value, hint)


def _spelled_item(value: Any, full: bool) -> str | Spec:
    return typing.cast("str | Spec", _spelled(value, None, full))


def _spelled_scalar(value: Any, hint: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        short = format(value, "g").replace("e+", "e")
        return short if float(short) == value else repr(value).replace("e+", "e")
    text = str(value)
    # a text that would be read as no value must stand in quotes
    optional = type(None) in typing.get_args(hint)
    return Quoted(text) if optional and text.lower() == "none" else text
