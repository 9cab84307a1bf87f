"""The command line on real images and a real (small) model: what is printed, what is
kept, how it fails.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import consilience as cs
from consilience.cli import main
from consilience.runs.folder import Run

FACTORY = """
from conftest import RedFinder

def red():
    return RedFinder()
"""
PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from consilience.registry import explainers, option
from consilience.types import Heat


@explainers.register("brightness")
@dataclass(frozen=True)
class Brightness:
    """The image's own brightness, as an explanation nobody needs."""

    gain: float = option(1.0)

    needs: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[bool] = True

    def explain(self, model, view, target):
        return Heat(view.pixels[0].mean(dim=0) * self.gain)
'''
QUICK = ("--by", "gradcam", "--by", "lime:samples=60,segments=grid(5)")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        low = rng.integers(0, 255, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(low).resize((90, 70), Image.Resampling.BICUBIC).save(
            folder / f"{name}.png"
        )
    return folder


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_models", None)
    return "my_models:red"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_explain_keeps_a_run_and_prints_what_it_found(
    images, factory, tmp_path, capsys
):
    out = tmp_path / "run"
    assert (
        run(
            "explain",
            images,
            "-m",
            factory,
            *QUICK,
            "--target",
            "1",
            "--engine",
            "torch",
            "--panels",
            "-o",
            out,
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "mean IoU" in printed
    finished = Run(out)
    assert finished.samples == ["one", "three", "two"]
    assert len(finished.explanations) == 6
    assert len(finished.agreement) == 3
    assert set(finished.explanations["target"]) == {1}
    assert (out / "panels" / "one.png").stat().st_size > 5000
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    kept = finished.load("two")
    assert kept.items[0].values.dtype == np.float32
    again = pd.read_parquet(out / "explanations.parquet")
    assert list(again["key"]) == [
        item.provenance["key"]
        for name in finished.samples
        for item in finished.load(name).items
    ]


def test_json_is_the_only_thing_on_stdout(images, factory, tmp_path, capsys):
    code = run(
        "explain",
        images / "one.png",
        "-m",
        factory,
        *QUICK,
        "--engine",
        "torch",
        "-o",
        tmp_path / "r",
        "--json",
    )
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["agreement"][0]["sample"] == "one"
    assert 0 <= result["agreement"][0]["iou"] <= 1
    assert result["summary"][0]["verdict"] == "untestable"


def test_a_bad_image_is_named_and_the_rest_is_done(images, factory, tmp_path, capsys):
    (images / "broken.jpg").write_bytes(b"not an image")
    out = tmp_path / "run"
    assert (
        run("explain", images, "-m", factory, *QUICK, "--engine", "torch", "-o", out)
        == 1
    )
    captured = capsys.readouterr()
    assert "broken.jpg: not an image in any format" in captured.err
    assert "1 of 4 images failed" in captured.err
    assert Run(out).samples == ["one", "three", "two"]
    assert Run(out).manifest["failures"][0]["name"] == "broken"


def test_a_killed_run_continues_where_it_was(images, factory, tmp_path, monkeypatch):
    from consilience import api

    arguments = (
        "explain",
        images,
        "-m",
        factory,
        *QUICK,
        "--engine",
        "torch",
        "-o",
        tmp_path / "run",
    )
    plain = api.explain_one
    calls, stops = [], ["three"]

    def dies_at_three(model, sample, *given, **named):
        calls.append(sample.name)
        if sample.name in stops:
            raise KeyboardInterrupt
        return plain(model, sample, *given, **named)

    monkeypatch.setattr(api, "explain_one", dies_at_three)
    assert run(*arguments) == 130
    kept = {path.stem for path in (tmp_path / "run" / "maps").glob("*.npz")}
    assert "one" in kept
    assert "three" not in kept
    calls.clear()
    stops.clear()
    assert run(*arguments) == 0
    assert set(calls) == {"one", "two", "three"} - kept
    assert len(Run(tmp_path / "run").explanations) == 6
    whole = tmp_path / "whole"
    assert run(*arguments[:-1], whole) == 0
    pd.testing.assert_frame_equal(
        Run(whole).agreement, Run(tmp_path / "run").agreement
    )


def test_another_job_in_the_folder_is_refused(images, factory, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(
            "explain",
            images,
            "-m",
            factory,
            "--by",
            "gradcam",
            "--engine",
            "torch",
            "-o",
            out,
        )
        == 0
    )
    assert (
        run(
            "explain",
            images,
            "-m",
            factory,
            "--by",
            "centre",
            "--engine",
            "torch",
            "-o",
            out,
        )
        == 1
    )
    assert (
        "another job (columns Grad-CAM gone; columns centre added)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--by", "grad-cam"), "did you mean 'gradcam'"),
        (("--by", "lime:sample=5"), "did you mean samples"),
        (("--by", "gradcam:layer=nowhere"), "no layer"),
        (("--target", "zebra"), "no class 'zebra'"),
        (("--preset", "nothing"), "study-published"),
        (("--preset", "study-published", "--by", "lime"), "not both"),
        (("--truth", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_bad_words_are_one_line(arguments, said, images, factory, tmp_path, capsys):
    code = run(
        "explain",
        images,
        "-m",
        factory,
        "--engine",
        "torch",
        "-o",
        tmp_path / "run",
        *arguments,
    )
    captured = capsys.readouterr()
    assert code == 1
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_unknown_model_and_nothing_found(images, tmp_path, capsys):
    assert run("explain", images, "-m", "resnet5", "-o", tmp_path / "r") == 1
    assert "resnet50" in capsys.readouterr().err
    assert run("explain", tmp_path / "nowhere" / "*.jpg", "-o", tmp_path / "r") == 1
    assert "nowhere" in capsys.readouterr().err


def test_wrong_usage_is_exit_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explain"])
    assert stopped.value.code == 2


def test_a_plugin_is_found_listed_and_run(images, factory, tmp_path, capsys):
    plugin = tmp_path / "bright.py"
    plugin.write_text(PLUGIN)
    from consilience import registry

    try:
        assert run("list", "explainers", "--plugin", plugin, "--json") == 0
        assert "brightness" in {
            row["explainer"] for row in json.loads(capsys.readouterr().out)
        }
        out = tmp_path / "run"
        code = run(
            "explain",
            images / "one.png",
            "-m",
            factory,
            "--plugin",
            plugin,
            "--by",
            "brightness:2",
            "-o",
            out,
        )
        assert code == 0
        item = Run(out).load("one").items[0]
        view = cs.load_model(factory).view(item.explanation.sample)
        np.testing.assert_allclose(item.values, view.rgb.mean(axis=2) * 2, atol=1e-6)
        shown = Run(out).load("one").image.astype(float)  # for people, as a JPEG
        assert np.abs(shown - 255 * view.rgb).mean() < 4
    finally:
        registry.explainers._entries.pop("brightness", None)


@pytest.mark.parametrize(
    "what", ["models", "explainers", "segmenters", "fills", "masks", "presets"]
)
def test_lists(what, capsys):
    assert run("list", what, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(next(iter(row.values())) for row in rows)


def test_layers_are_listed_with_the_choice_marked(factory, capsys):
    assert run("list", "layers", "-m", factory, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows if row["auto"]] == ["last"]


def test_report_is_written_anew(images, factory, tmp_path, capsys):
    out = tmp_path / "run"
    run("explain", images, "-m", factory, *QUICK, "--engine", "torch", "-o", out)
    first = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    capsys.readouterr()
    assert run("report", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert (out / "report.html").read_text(encoding="utf-8") == first
    assert run("report", tmp_path) == 1


def test_help_answers_without_torch():
    code = "import sys; from consilience.cli import build_parser as b; b().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demo_does_the_main_job(tmp_path, capsys, monkeypatch):
    from consilience import demo

    assert len(demo.demo_job().columns) == 2
    # a third of its draws: every one costs a pass on one core
    fewer = tuple(one.replace("700", "200") for one in demo.DEMO_EXPLAINERS)
    monkeypatch.setattr(demo, "DEMO_EXPLAINERS", fewer)
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    labels = {name: said["label"] for name, said in result["predictions"].items()}
    assert len(labels) >= 5
    assert labels["coffee"] in ("espresso", "cup", "coffee mug")
    assert "cat" in labels["chelsea"].lower()
    assert Path(result["report"]).stat().st_size > 100_000
    assert result["summary"][0]["n"] == len(labels)
    assert all(row["iou"] > 0 for row in result["agreement"])


def test_the_demo_ends_with_a_second_network(tmp_path, capsys, monkeypatch):
    from consilience import cli, demo

    two = demo.demo_images()[:2]
    monkeypatch.setattr(demo, "demo_images", lambda: two)
    monkeypatch.setattr(cli, "_run_and_print", lambda *given: 0)
    monkeypatch.chdir(tmp_path)
    assert run("demo") == 0
    said = capsys.readouterr().out
    page = Path("consilience-demo/efficientnet_lite1-against-efficientnet_lite0")
    assert "a second network, efficientnet_lite1 against efficientnet_lite0: " in said
    assert f"a second network's report: {page / 'report.html'}" in said
    made = (page / "report.html").stat().st_mtime_ns
    assert run("demo") == 0  # nothing is done twice
    assert f"report: {page / 'report.html'}" in capsys.readouterr().out
    assert (page / "report.html").stat().st_mtime_ns == made
    assert run("demo", "--json") == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.second_opinion() is None
    assert run("demo") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["explainers", "metrics", "fills", "segmenters"])
def test_what_a_list_says_of_a_name_is_a_whole_sentence(kind):
    from consilience import registry

    known = getattr(registry, kind)
    for name in known.names():
        if known.get(name).__module__.startswith("consilience."):
            assert registry.summary_of(known.get(name))[-1] in ".?", name
