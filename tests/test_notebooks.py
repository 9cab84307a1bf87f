"""Notebooks: the examples run from top to bottom, and what `show` and `slider` display
works in a browser.
"""

import json
from pathlib import Path

import pytest
import skimage
from browser import opened, shot, slide

import consilience as cs
from consilience.agreement.masks import matched
from consilience.agreement.overlap import iou

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def made():
    model = cs.load_model("efficientnet_lite0")
    return {
        (name, by): cs.explain(model, str(PHOTOGRAPHS / f"{name}.png"), by)
        for name in ("chelsea", "coffee")
        for by in ("gradcam", "input-x-gradient")
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_from_top_to_bottom(path, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    book = nbformat.read(path, 4)
    if path.stem == "study":  # fewer draws than a reader takes
        for cell in book.cells:
            cell.source = cell.source.replace("SAMPLES = 300", "SAMPLES = 40")
    nbclient.NotebookClient(
        book,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    shown = [
        output.data.get("text/html", "")
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    assert any("srcdoc=" in text for text in shown)  # the maps are there


def test_examples_are_kept_without_their_outputs():
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs")


def test_a_shown_page_has_a_row_an_image_and_a_map_each(made, tmp_path):
    page_file = tmp_path / "shown.html"
    shown = cs.show(list(made.values()))
    page_file.write_text(shown.html, encoding="utf-8")
    assert "srcdoc=" in shown._repr_html_()
    assert repr(shown) == "<4 explanations; a notebook shows them>"
    with opened() as page:
        page.goto(page_file.as_uri())
        page.wait_for_selector(".live-pair .numbers-line b")
        assert page.locator(".image h3").all_text_contents() == ["chelsea", "coffee"]
        assert page.locator(".tile.map").count() == 4
        page.check("input[value=area]")
        slide(page, "[name=level]", 30)
        page.wait_for_timeout(300)
        one, two = matched(
            made["chelsea", "gradcam"], made["chelsea", "input-x-gradient"], 0.3
        )
        said = page.locator(".live-pair .numbers-line").first.text_content()
        got = float(said.split()[1])
        assert got == pytest.approx(iou(one.on, two.on), abs=2e-3)
        shot(page, "notebook")


def test_titles_tell_maps_apart(made):
    from consilience.show.notebook import _labels

    model = cs.load_model("efficientnet_lite0")
    image = str(PHOTOGRAPHS / "chelsea.png")
    two = [cs.explain(model, image, by) for by in ("gradcam", "gradcam:relu=false")]
    assert len(set(_labels(two))) == 2
    other = cs.explain(model, image, "gradcam", target="tabby")
    both = _labels([two[0], other])
    assert len(set(both)) == 2
    assert len(set(_labels([two[0], two[0]]))) == 2
    assert _labels([made["chelsea", "gradcam"]]) == ["Grad-CAM"]


def test_what_is_no_explanation_is_refused(made):
    with pytest.raises(cs.ConsilienceError, match="got int"):
        cs.show(3)
    with pytest.raises(cs.ConsilienceError, match="got str"):
        cs.show("run")
    with pytest.raises(cs.ConsilienceError, match="no explanation"):
        cs.show([])
    one = made["chelsea", "gradcam"]
    with pytest.raises(cs.ConsilienceError, match="up to 60"):
        cs.show([one] * 61)
    with pytest.raises(cs.ConsilienceError, match="of one image"):
        cs.slider(list(made.values()))


def test_the_name_is_both_the_call_and_the_package():
    import consilience.show

    assert callable(cs.show)
    assert callable(consilience.show)
    assert consilience.show.words.format_share(0.5) == "0.500"


def test_the_slider_tells_python_what_it_shows(made, tmp_path):
    """Its script in a browser, with the model that a notebook would give it."""
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    pair = [made["chelsea", "gradcam"], made["chelsea", "input-x-gradient"]]
    widget = cs.slider(pair)
    assert (widget.level, widget.cut, widget.a, widget.b) == (20, "area", 0, 1)
    state = {
        name: getattr(widget, name) for name in ("tiles", "cut", "level", "a", "b")
    }
    (tmp_path / "page.html").write_text(
        "<!DOCTYPE html><meta charset=utf-8><div id=el></div>"
    )
    with opened() as page:
        page.goto((tmp_path / "page.html").as_uri())
        page.evaluate(
            """async ([script, state]) => {
              const from = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
              const { default: widget } = await import(from);
              const heard = {};
              window.model = {
                get: (name) => state[name], set(name, value) { state[name] = value; (heard[name] || []).forEach((call) => call()); },
                save_changes() { window.saved = { ...state, tiles: "" }; },
                on: (name, call) => (heard[name.slice(7)] ||= []).push(call),
              };
              widget.render({ model: window.model, el: document.getElementById("el") });
            }""",
            [str(widget._esm), state],
        )
        page.wait_for_function("() => window.saved && window.saved.iou !== undefined")
        for level in (20, 45):
            slide(page, "[name=level]", level)
            page.wait_for_function(f"() => window.saved.level === {level}")
            page.wait_for_timeout(200)
            saved = page.evaluate("window.saved")
            one, two = matched(*pair, level / 100)
            assert saved["iou"] == pytest.approx(iou(one.on, two.on), abs=2e-3)
            assert 0 < saved["expected"] < 1
        page.evaluate("model.set('level', 10)")  # from Python
        page.wait_for_timeout(300)
        assert page.input_value("[name=level]") == "10"
        one, two = matched(*pair, 0.1)
        assert page.evaluate("window.saved.iou") == pytest.approx(
            iou(one.on, two.on), abs=2e-3
        )


def test_without_anywidget_it_says_what_to_install(made, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(cs.ConsilienceError, match=r"consilience\[notebook\]"):
        cs.slider(made["chelsea", "gradcam"])
