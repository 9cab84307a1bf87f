"""The made pages of the documentation: nothing is left out, and what they say is so."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from consilience import registry
from consilience.cli import build_parser
from consilience.options import options_of
from consilience.show.citations import CITED

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {"explainer": registry.explainers, "metric": registry.metrics}


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "pages.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def own(kind):
    """Names that this library registers: tests add their own."""
    return [
        name
        for name in KINDS[kind].names()
        if KINDS[kind].get(name).__module__.startswith("consilience.")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_page_with_every_part(pages, kind):
    for name in own(kind):
        page = pages.page_of(kind, name)
        assert page.startswith("# ")
        assert f"`{name}`" in page.partition("\n")[0] or page.startswith(
            f"# {name}\n"
        )
        for heading in ("Use it", "What it needs", "Known failures"):
            assert f"\n## {heading}\n" in page, (name, heading)
        told = page.partition("## Known failures")[2].partition("##")[0]
        assert re.search(r"\n- .+ \(.+\)", told), name
        for item in options_of(KINDS[kind].get(name)):
            assert f"| `{item.name}` |" in page
        for key in CITED.get(name, ()):
            assert f"{{{key}," in page
        command = re.search(r"```sh\n(.+)\n```", page)[1]
        build_parser().parse_args(command.split()[1:])
        assert "``" not in page.partition("## Source")[0].replace("```", "")


def test_every_explainer_has_a_picture_or_a_reason_and_its_cost(pages):
    known = pages.gallery()["methods"]
    assert set(known) == set(own("explainer"))
    for name, made in known.items():
        page = pages.page_of("explainer", name)
        if "why" in made:
            assert made["why"] in page
            assert pages.picture_of(name) is None
            continue
        picture = re.search(r"!\[.*\]\(\.\./(gallery/.+?)\)", page)[1]
        assert (DOCS / picture).is_file()
        assert f"{made['forwards']:,} times a bare forward pass" in page
    drawn = {path.stem for path in (DOCS / "gallery").glob("*.webp")}
    named = {pages.file_of(name) for name, made in known.items() if "why" not in made}
    assert drawn == named | {"photograph"}


def test_prose_is_markdown_and_no_html(pages):
    assert pages.prose("a < b, ``x < y``, <b>, `c < d`") == (
        "a &lt; b, `x < y`, &lt;b>, `c < d`"
    )


def test_needs_are_said(pages):
    assert "Scores alone" in pages.page_of("explainer", "lime")
    assert "Gradients and the layers of the network." in pages.page_of(
        "explainer", "gradcam"
    )
    assert "Lower is better; values lie from 0 to 1." in pages.page_of(
        "metric", "deletion"
    )


def test_failures_are_of_names_that_there_are():
    told = tomllib.loads((DOCS / "known-failures.toml").read_text("utf-8"))
    for kind in KINDS:
        assert {name for one in told[kind] for name in one["names"]} == set(own(kind))
        for one in told[kind]:
            assert one["text"].endswith(".")
            assert one["source"]
            for page in re.findall(r"docs/([\w-]+\.md)", one["source"]):
                assert (DOCS / page).is_file()


def test_the_gallery_shows_what_was_drawn(pages):
    page = pages.gallery_page()
    for name, made in pages.gallery()["methods"].items():
        address = f"explainers/{pages.file_of(name)}.md"
        assert f"({address})" in page
        assert ("why" in made) == (f"- [`{name}`]({address})" in page)


def test_programs_are_told_where_everything_is(pages):
    config = {
        "site_name": "consilience",
        "site_description": "what it is",
        "nav": [
            {"Start": ["index.md", "install.md"]},
            {"More": [{"x": ["lime.md"]}]},
        ],
    }
    text = pages.llms_text(config)
    assert text.startswith("# consilience\n\n> what it is\n")
    assert "## Start\n\n- [consilience](./)\n- [Installing](install/)\n" in text
    assert "## More\n\n- [LIME, and how sure it is](lime/)" in text


def test_links_within_the_site_are_followed(pages, tmp_path):
    errors = pytest.importorskip("mkdocs.exceptions")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text(
        '<a href="../b/#x">b</a><a href="https://there">out</a><a href="#y">own</a>'
        '<img src="../p%20q.png"><a href="mailto:x@y">mail</a>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text("")
    (tmp_path / "p q.png").write_text("")
    config = {"site_dir": str(tmp_path)}
    pages.on_post_build(config)
    (tmp_path / "b" / "index.html").write_text('<a href="../c/">c</a>')
    with pytest.raises(errors.PluginError, match=r"b/index.html: \.\./c/"):
        pages.on_post_build(config)


def test_links_out_of_the_docs_are_pages_or_names(pages):
    from types import SimpleNamespace

    page = SimpleNamespace(file=SimpleNamespace(src_uri="decisions/001.md"))
    text = "[a](../../benchmarks/README.md), [b](../../src/x.py), [c](../lime.md#d)"
    made = pages.on_page_markdown(text, page, None, None)
    assert made == "[a](../benchmarks.md), b, [c](../lime.md#d)"
