"""The direction of imports: a module imports what stands above it, or its own folder."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "consilience"

ORDER = (
    "types",
    "spec",
    "older",
    "options",
    "registry",
    "catalogue",
    "progress",
    "ahead",
    "files",
    "classnames",
    "image_files",
    "formats",
    "images",
    "data",
    "inputs",
    "stats",
    "simultaneous",
    "models",
    "targets",
    "saved",
    "perturb",
    "marks",
    "explainers",
    "agreement",
    "metrics",
    "explanations",
    "exports",
    "api",
    "study",
    "dissection",
    "evaluation",
    "diagnosis",
    "show",
    "runs",
    "web",
    "demo",
    "cli",
    "pytest_plugin",
    "__main__",
)


RESULTS = {
    "types.py": {"Explanation", "NotApplicable"},
    "api.py": {"Scores", "ScoreTable"},
    "explanations.py": {"Explanations"},
    "agreement/audit.py": {"Finding"},
    "agreement/overlap.py": {"Agreement"},
    "dissection/compare.py": {"Comparison"},
    "dissection/result.py": {"Dissection"},
    "dissection/units.py": {"Carried"},
}
"""What users hold in their hands: `save`, `figure` and the like import the room that
does it when they are called, in two lines that compute nothing (decision 006).
"""


def is_shortcut(node):
    """A method that imports and returns or calls, and does nothing else."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    imports = [part for part in body if isinstance(part, ast.ImportFrom)]
    return bool(imports) and len(body) <= 3


def nodes_of(file):
    """The file's syntax nodes, without the shortcuts of results."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    results = RESULTS.get(str(file.relative_to(SOURCE)), set())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in results:
            node.body = [
                part
                for part in node.body
                if not (isinstance(part, ast.FunctionDef) and is_shortcut(part))
            ]
        yield from ast.walk(node)


def rooms_imported(file):
    """Top-level rooms of consilience that a file imports, anywhere in it."""
    rooms = set()
    for node in nodes_of(file):
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


FILES = sorted(
    file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py"
)


@pytest.mark.parametrize(
    "file", FILES, ids=lambda file: str(file.relative_to(SOURCE))
)
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
