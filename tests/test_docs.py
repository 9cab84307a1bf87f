"""The docs are true: their Python runs, their commands parse, their links lead
somewhere.
"""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from consilience import registry
from consilience.cli import VERB_EXAMPLES, VERBS, build_parser

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(page, language):
    """Code of a language, also where it stands indented in a list."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^\1```",
        page.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    return [textwrap.dedent(code) for _, code in found]


PYTHON = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]
COMMANDS = [
    (page, line.partition("   #")[0].partition("  #")[0].strip())
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("consilience ")
]


@pytest.mark.parametrize(
    ("page", "number", "code"), PYTHON, ids=lambda value: getattr(value, "name", None)
)
def test_python_runs(page, number, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for needed in re.findall(r"^# needs: (\w+)$", code, flags=re.MULTILINE):
        pytest.importorskip(needed)
    try:
        exec(compile(code, f"{page.name}[{number}]", "exec"), {"__name__": "docs"})
    finally:
        registry.explainers._entries.pop("example-gradient", None)
        registry.metrics._entries.pop("example-share", None)
    out = capsys.readouterr().out
    if (page.name, number) == ("README.md", 0):
        assert out == blocks(page, "text")[0]
    printed = out.splitlines()
    for line in re.findall(r"print\(.*  # prints (.+)$", code, flags=re.MULTILINE):
        assert line in printed


@pytest.mark.parametrize(
    ("page", "command"),
    COMMANDS,
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_commands_parse(page, command):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    for spec in getattr(arguments, "by", None) or []:
        if "example" not in spec:
            registry.explainers.build(spec)
    for spec in getattr(arguments, "metric", None) or []:
        registry.metrics.build(spec)


def test_there_are_examples_to_check():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(
        r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")
    ):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_page_of_names_is_as_it_is_made():
    spec = importlib.util.spec_from_file_location(
        "names", ROOT / "benchmarks" / "names.py"
    )
    names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(names)
    assert names.PAGE.read_text(encoding="utf-8") == names.page()


def test_every_verb_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"consilience {verb}" in text or f"make {verb}" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_three_examples(verb):
    examples = VERB_EXAMPLES[verb]
    assert len(examples) == 3
    for line in examples:
        command = line.partition(" > ")[0]
        arguments = build_parser().parse_args(shlex.split(command)[1:])
        assert arguments.call.__name__ == f"{verb}_verb"
