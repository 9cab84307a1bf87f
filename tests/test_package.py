"""What people install and build on: metadata, extras, completion, the public names."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import consilience as cs
from consilience.cli import SHELLS, VERBS, main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
EXTRAS = PROJECT["optional-dependencies"]
OF_USERS = set(EXTRAS) - {"test", "bench", "docs"}


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in text
    assert f"\nlicense: {PROJECT['license']}\n" in text
    assert f'name: "{PROJECT["authors"][0]["name"]}"' in text


def test_every_extra_is_in_the_table():
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1] for line in text.splitlines() if line.startswith("| `")
    ]
    named = {name.strip(" `") for row in rows for name in row.split(",")}
    assert named == OF_USERS


def test_all_is_every_extra_but_ray():
    (everything,) = EXTRAS["all"]
    inside = everything.removeprefix("consilience[").removesuffix("]").split(",")
    assert set(inside) == OF_USERS - {"all", "ray"}


def test_an_extra_that_a_message_names_is_there():
    """Every "pip install 'consilience[X]'" in the source."""
    import re

    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= set(re.findall(r"consilience\[(\w+)\]", path.read_text("utf-8")))
    assert found
    assert found <= OF_USERS


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_verb(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb in VERBS:
        assert verb in script
    if shell == "bash":
        assert "--against" in script
        checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
        assert checked.returncode == 0


def test_completion_without_its_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'consilience[completion]'" in capsys.readouterr().err


def test_the_public_names():
    """A name goes only after a release in which it was deprecated: then it leaves this
    list too.
    """
    assert set(cs.__all__) == {
        *("Agreement", "Box", "ConsilienceError", "Explanation", "Explanations"),
        *("How", "NotApplicable", "Run", "Sample", "Score", "agree", "check"),
        *("clusters", "compare_layers", "dissect", "evaluate", "explain"),
        *("load_concepts", "load_model", "merge_run", "read_image", "recommend"),
        *("run", "run_job", "shortcuts", "show", "slider", "wrap", "wrap_callable"),
        *("wrap_detector", "wrap_segmentation"),
    }
    for name in cs.__all__:
        assert getattr(cs, name).__doc__


def test_the_site_has_every_page_and_every_public_name():
    """`make docs` builds it strictly; that nothing is left out is seen here."""
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(part):
        if isinstance(part, str):
            return [part]
        inside = part.values() if isinstance(part, dict) else part
        return [page for one in inside for page in pages(one)]

    there = {
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert set(pages(told["nav"])) == there
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith(":::")]
    assert sorted(line.rpartition(".")[2] for line in listed) == sorted(cs.__all__)


def test_constraints_are_versions_that_the_project_takes():
    from packaging.requirements import Requirement
    from packaging.version import Version

    rows = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(row.split("==") for row in rows if not row.startswith("#"))
    wanted = [*PROJECT["dependencies"]]
    for extra in OF_USERS - {"all", "ray"}:
        wanted += EXTRAS[extra]
    for one in map(Requirement, wanted):
        version = pinned[one.name.lower().replace("_", "-")]
        assert one.specifier.contains(Version(version)), one


def test_the_conda_recipe_asks_for_what_the_project_does():
    from packaging.requirements import Requirement

    text = (ROOT / "conda" / "meta.yaml").read_text("utf-8")
    assert f'version = "{PROJECT["version"]}"' in text
    called = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    for one in map(Requirement, PROJECT["dependencies"]):
        name = called.get(one.name, one.name)
        if name.startswith("efficientnet"):
            assert f'pip install "{one.name}{one.specifier}"' in text
        else:
            assert f"\n    - {name} {one.specifier}\n" in text
