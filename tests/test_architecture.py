"""The direction of imports: a module imports what stands above it, or its own folder."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "consilience"

ORDER = (
    "types",
    "spec",
    "options",
    "registry",
    "catalogue",
    "progress",
    "files",
    "image_files",
    "images",
    "data",
    "stats",
    "models",
    "targets",
    "perturb",
    "explainers",
    "agreement",
    "metrics",
    "api",
    "study",
    "dissection",
    "evaluation",
    "show",
    "runs",
    "demo",
    "cli",
)


def rooms_imported(file):
    """Top-level rooms of consilience that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "consilience"
        ):
            rest = node.module.split(".")[1:]
            rooms |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            rooms |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("consilience.")
            }
    return rooms


def room_of(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_only_from_above(file):
    room = room_of(file)
    assert room in ORDER, f"{room} is a new room: give it its place in ORDER"
    allowed = {*ORDER[: ORDER.index(room)], room}
    assert rooms_imported(file) <= allowed


def test_order_names_only_rooms_that_exist():
    there = {room_of(file) for file in FILES}
    assert there == set(ORDER)


@pytest.mark.parametrize(
    "room",
    [
        "types",
        "spec",
        "options",
        "registry",
        "catalogue",
        "progress",
        "image_files",
        "cli",
        "stats",
    ],
)
def test_light_rooms_do_not_import_torch_at_the_top(room):
    tree = ast.parse((SOURCE / f"{room}.py").read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(name and name.split(".")[0] == "torch" for name in names)
