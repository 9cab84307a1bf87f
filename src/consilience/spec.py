"""The one grammar in which everything is spelled.

``name[:positional][,key=value...]``; nested values as
``segments=quickshift(kernel_size=5)``, lists with ``+``, quotes round what needs them.
This module knows the grammar alone: `parse` and `render` are inverse, and what a name
means is not its business (see `options`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from consilience.types import ConsilienceError

Value = Union[str, "Spec", tuple["str | Spec", ...]]


class Quoted(str):
    """A text that stood in quotes: it is never read as ``none`` or as a number."""

    __slots__ = ()


@dataclass(frozen=True)
class Spec:
    """A parsed specification, before it is known what the name means."""

    name: str
    args: tuple[Value, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()


_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"""|(?P<mark>[,+()=])|(?P<word>[^,+()="']+))""",
    re.DOTALL,
)
_PLAIN = re.compile(r"""[^,+()="'\s\\][^,+()="'\\]*(?<!\s)""")
Tokens = list[tuple[str, str]]


def parse(text: str) -> Spec:
    """Parse ``name[:positional][,key=value...]``.

    >>> parse("lime:700,segments=grid(8)").options
    (('segments', Spec(name='grid', args=('8',), options=())),)
    """
    if not isinstance(text, str):
        raise ConsilienceError(
            f"a specification is text, name[:value][,key=value...]; got {type(text).__name__}"
        )
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if not name or re.search(r"""[,()="'\s]""", name):
        raise ConsilienceError(
            f"{text!r} is not a specification; one is name[:value][,key=value...]"
        )
    if not colon:
        return Spec(name)
    tokens = _tokens(rest, text)
    args, options = _items(tokens, text, closing=None)
    return Spec(name, args, options)


def _tokens(rest: str, text: str) -> Tokens:
    tokens: Tokens = []
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
    tokens: Tokens, text: str, closing: str | None
) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
    """Items up to ``closing`` (a bracket) or the end, consumed from the front."""
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
                f"{text!r}: a value without a name comes after a named one, "
                f"at {tokens[0][1]!r}"
            )
        else:
            args.append(_value(tokens, text))
        if tokens[0] == stop:
            tokens.pop(0)
            return tuple(args), tuple(options)
        if tokens[0] != ("mark", ","):
            raise ConsilienceError(
                f"{text!r} is not a specification: {tokens[0][1] or 'its end'!r} "
                "was not expected there"
            )
        tokens.pop(0)


def _value(tokens: Tokens, text: str) -> Value:
    atoms = [_atom(tokens, text)]
    while tokens[0] == ("mark", "+"):
        tokens.pop(0)
        atoms.append(_atom(tokens, text))
    return atoms[0] if len(atoms) == 1 else tuple(atoms)


def _atom(tokens: Tokens, text: str) -> str | Spec:
    kind, word = tokens.pop(0)
    if kind == "quoted":
        return Quoted(re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL))
    if kind != "word":
        raise ConsilienceError(
            f"{text!r} is not a specification: a value is missing before "
            f"{word or 'its end'!r}"
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
    """A parsed specification as text again."""
    inner = render_items(spec)
    return f"{spec.name}:{inner}" if inner else spec.name


def render_items(spec: Spec) -> str:
    """What stands behind the name."""
    named = [f"{key}={render_value(value)}" for key, value in spec.options]
    return ",".join([render_value(arg) for arg in spec.args] + named)


def render_value(value: Value) -> str:
    """One value as text: plain where it can be, quoted where it must be."""
    if isinstance(value, tuple):
        return "+".join(render_value(item) for item in value)
    if isinstance(value, Spec):
        return f"{value.name}({render_items(value)})"
    if _PLAIN.fullmatch(value) and not isinstance(value, Quoted):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
