"""What the program's own explainers, metrics and fills are called, read from the source.

Importing them takes seconds, because torch does. A misspelled name or option is to be
refused at once, so names and options are read from the syntax trees of the modules that
would be imported. What comes from plug-ins is not known here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from consilience.options import BUILDERS, option_name
from consilience.registry import Registry, Spec, parse, unknown
from consilience.types import ConsilienceError


@dataclass(frozen=True)
class ListedClass:
    """A class as its source says: its bases, its options, and the kinds of nested ones."""

    bases: tuple[str, ...]
    options: dict[str, str | None]
    registered: tuple[str, ...]


def check_specification(of: Registry, text: str) -> None:
    """Refuse a name or an option that the program does not have, in one line.

    What cannot be told from the source (a plug-in's class, a base from elsewhere) passes.
    """
    _check(of.kind, parse(text))


def _check(kind: str, spec: Spec) -> None:
    listed = _listed(kind)
    if spec.name not in listed:
        raise ConsilienceError(unknown(kind, spec.name, sorted(listed)))
    options = _all_options(kind, listed[spec.name])
    if options is None:
        return
    formerly = {name: name for name in options}
    given = dict(zip(options, spec.args, strict=False))
    for key, value in spec.options:
        given[option_name(spec.name, formerly, key)] = value
    for name, value in given.items():
        nested = options.get(name)
        for item in value if isinstance(value, tuple) else (value,):
            if nested is not None:
                _check(nested, item if isinstance(item, Spec) else Spec(str(item)))


def _all_options(kind: str, made: ListedClass) -> dict[str, str | None] | None:
    """Options in the order of the constructor; None where a base is not in sight."""
    known = _classes(kind)
    gathered: dict[str, str | None] = {}
    for base in made.bases:
        if base in ("Protocol", "object"):
            continue
        if base not in known:
            return None
        inherited = _all_options(kind, known[base])
        if inherited is None:
            return None
        gathered |= inherited
    return gathered | made.options


@cache
def _listed(kind: str) -> dict[str, ListedClass]:
    """The registered classes of a kind by the name that users type."""
    return {
        name: made for made in _classes(kind).values() for name in made.registered
    }


@cache
def _classes(kind: str) -> dict[str, ListedClass]:
    """Every class in the modules of a registry, by its own name."""
    builder = BUILDERS[kind]
    assert isinstance(builder, Registry)
    variable = {
        "explainer": "explainers",
        "metric": "metrics",
        "fill": "fills",
        "segmenter": "segmenters",
        "mask": "cutters",
        "mark": "marks",
    }
    name = variable.get(kind, "")
    return {
        node.name: _read_class(node, name)
        for file in _files(builder)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def _files(of: Registry) -> Iterator[Path]:
    for package in of.packages:
        found = find_spec(package)
        if found is None:
            continue
        folders = found.submodule_search_locations
        if folders:
            yield from sorted(Path(folders[0]).glob("*.py"))
        elif found.origin:
            yield Path(found.origin)


def _read_class(node: ast.ClassDef, registry_variable: str) -> ListedClass:
    bases = tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
    registered = [
        str(decorator.args[0].value)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and ast.unparse(decorator.func).endswith(f"{registry_variable}.register")
        and isinstance(decorator.args[0], ast.Constant)
    ]
    options = {
        part.target.id: _nested_kind(part.value)
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and "ClassVar" not in ast.unparse(part.annotation)
    }
    return ListedClass(bases, options, tuple(registered))


def _nested_kind(value: ast.expr | None) -> str | None:
    """The registry that ``option(kind=...)`` names."""
    if not isinstance(value, ast.Call):
        return None
    kinds = [word.value for word in value.keywords if word.arg == "kind"]
    return (
        str(kinds[0].value) if kinds and isinstance(kinds[0], ast.Constant) else None
    )
