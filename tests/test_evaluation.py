"""Evaluations: means, marks and tests against hand-checked tables, controls, resuming,
what is refused, the verb.
"""

import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PATCH, planted_image
from PIL import Image
from scipy import stats as scipy_stats
from torch import nn

import consilience as cs
from consilience import api, registry
from consilience.cli import main
from consilience.evaluation import columns, summary
from consilience.evaluation import mosaics as grid
from consilience.evaluation.columns import TableColumn
from consilience.evaluation.memory import remembering
from consilience.metrics import suites
from consilience.metrics.mosaic import mosaics
from consilience.models import load
from consilience.models.network import wrap
from consilience.registry import option
from consilience.runs import evaluate, explain
from consilience.runs.evaluate import Asked
from consilience.runs.scores import Evaluation
from consilience.show import console, html, words
from consilience.types import Heat, NotApplicable, Score

CALLS = []


@registry.metrics.register("test-in-patch")
@dataclass(frozen=True)
class InPatch:
    """Mean of the map in the red patch."""

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    scale: float = option(1.0)

    def score(self, model, view, explanation):
        CALLS.append(explanation.explainer)
        if explanation.sample.name == "p1" and explanation.name == "edges":
            raise NotApplicable(
                "{image} has no edges today", image=explanation.sample.name
            )
        return Score(
            self.scale * float(explanation.values[PATCH].mean()),
            np.array([[0.0, 1.0], [1.0, 0.0]]),
        )


@registry.metrics.register("test-hit")
@dataclass(frozen=True)
class Hit:
    """1 where the map's maximum is in the patch."""

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    binary: ClassVar[bool] = True

    def score(self, model, view, explanation):
        inside = np.zeros(explanation.values.shape, dtype=bool)
        inside[PATCH] = True
        return Score(float(inside.ravel()[explanation.values.argmax()]))


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


@pytest.fixture(scope="module", autouse=True)
def _only_here():
    yield
    for name in ("test-in-patch", "test-hit"):
        registry.metrics._entries.pop(name, None)
    registry.explainers._entries.pop("test-left", None)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in (0, 1, 2):
        Image.fromarray(planted_image(seed).pixels).save(folder / f"p{seed}.png")
    return folder


@pytest.fixture
def loaded(red_model, monkeypatch):
    made = replace(red_model, source="my:red")
    monkeypatch.setattr(load, "_from_factory", lambda *_: made)
    return made


BY = ("gradcam", "lime:samples=64,segments=grid(4)")
OPTIONS = explain.LoadOptions(engine="torch")


def evaluated(images, tmp_path, metrics=("test-in-patch", "test-hit"), folder="run"):
    job = explain.job_from_specs(BY, ["my:red"], "red")
    return evaluate.evaluate_images(
        Asked(metrics), job, [images], tmp_path / folder, None, OPTIONS
    )


# ---- tables by hand

COLUMNS = (
    TableColumn("m", "method", "gradcam"),
    TableColumn("c", "control", "random"),
    TableColumn("d", "control", "edges"),
)


@dataclass(frozen=True)
class Low:
    """Less is better."""

    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    spelled: ClassVar[str] = "low"


def rows(values, metric="low", names=("m", "c", "d")):
    found = []
    for number, row in enumerate(values):
        for name, value in zip(names, row, strict=True):
            lost = math.isnan(value)
            facts = {"text": "why", "image": f"s{number}"} if lost else {}
            cell = {
                "code": "said" if lost else "",
                "facts": json.dumps(facts),
                "sample": f"s{number}",
                "digest": "",
                "column": name,
                "metric": metric,
                "kind": "",
            }
            found.append({**cell, "value": value})
    return found


def test_a_table_by_hand():
    """Six images; the method is lower (better) than c by .5 on each, and than d by .1
    on half of them.
    """
    values = [[0.1, 0.6, 0.2 if i % 2 else 0.1] for i in range(6)]
    found = summary.summarise(rows(values), {"low": Low()}, COLUMNS)
    against = {row["b"]: row for row in found["against_controls"]}
    assert against["c"]["mean"] == pytest.approx(0.5)
    assert against["d"]["mean"] == pytest.approx(0.05)
    assert against["c"]["p"] == pytest.approx(
        1 / 64
    )  # all six positive: one of 2^6 flips reaches their sum
    assert against["d"]["p"] == pytest.approx(
        8 / 64
    )  # three are 0: any sign; three must stay
    assert against["c"]["p_holm"] == pytest.approx(2 / 64)
    assert against["d"]["p_holm"] == pytest.approx(8 / 64)
    assert against["c"]["tests"] == 2
    assert "low" in against["c"]["family"]
    cell = found["cells"][0]
    assert cell["above"] is False
    assert cell["not_above"] == ["d"]
    assert cell["reachable"] is True


def test_a_method_above_every_control_is_not_marked():
    values = [[0.1, 0.6, 0.5 + 0.01 * i] for i in range(8)]
    cell = summary.summarise(rows(values), {"low": Low()}, COLUMNS)["cells"][0]
    assert cell["above"] is True
    assert cell["not_above"] == []


def test_too_few_images_are_said_to_be_too_few():
    cell = summary.summarise(rows([[0.1, 0.6, 0.5]] * 3), {"low": Low()}, COLUMNS)[
        "cells"
    ][0]
    assert cell["above"] is False
    assert cell["reachable"] is False


def test_what_does_not_apply_is_counted_and_its_reason_said():
    values = [[0.1, math.nan, 0.5], [0.2, math.nan, 0.6], [0.3, math.nan, 0.4]]
    found = summary.summarise(rows(values), {"low": Low()}, COLUMNS)
    control = found["cells"][1]
    assert (control["n"], control["not_applicable"], control["reasons"]) == (
        0,
        3,
        [{"code": "said", "facts": {"text": "why"}, "images": 3}],
    )
    assert found["cells"][0]["untested"] == ["c"]
    assert found["cells"][0]["above"] is not True
    many = [[0.1, math.nan, 0.5 + 0.01 * i] for i in range(8)]
    found = summary.summarise(rows(many), {"low": Low()}, COLUMNS)
    cell = found["cells"][0]  # better than d, and never compared with c
    assert (cell["above"], cell["not_above"], cell["untested"]) == (None, [], ["c"])
    lines = words.marks(
        found["metrics"][0],
        {one["column"]: one for one in found["cells"]},
        found["against_controls"],
    )
    assert lines == [
        "m is better than the controls that it could be compared with; there is no image "
        "with a number of both for c."
    ]
    found = summary.summarise(rows(values), {"low": Low()}, COLUMNS)
    assert (
        found["against_controls"][0]["tests"] == 1
    )  # the family holds what could be tested


def test_intervals_are_wilson_for_outcomes_and_students_for_few_values():
    values = [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    hit = summary.summarise(rows(values, "hit"), {"hit": Hit()}, COLUMNS)["cells"][0]
    n, p, z = 3, 2 / 3, scipy_stats.norm.ppf(0.975)
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)),
    )
    assert (hit["low"], hit["high"]) == pytest.approx((centre - half, centre + half))
    low = summary.summarise(rows(values), {"low": Low()}, COLUMNS)["cells"][0]
    expected = scipy_stats.t.interval(
        0.95, 2, np.mean([1, 1, 0]), scipy_stats.sem([1, 1, 0])
    )
    assert (low["low"], low["high"]) == pytest.approx(expected)


def test_nothing_is_added_up_over_metrics():
    found = summary.summarise(rows([[1.0, 0.0, 1.0]] * 3), {"low": Low()}, COLUMNS)
    assert {cell["metric"] for cell in found["cells"]} == {"low"}
    assert not any("score" in key or "overall" in key for key in found)


def test_metrics_of_opposite_sense_correlate_as_turned():
    both = rows([[0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0]]) + rows(
        [[0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0]], "hit"
    )
    found = summary.summarise(both, {"low": Low(), "hit": Hit()}, COLUMNS)[
        "correlations"
    ]
    assert found[0]["mean"] == pytest.approx(
        1.0
    )  # low falls where hit rises: both call s0 best


# ---- images and runs


def test_images_are_explained_and_scored_beside_all_controls(
    images, loaded, tmp_path
):
    found = evaluated(images, tmp_path)
    table = found.table()
    labels = [
        "Grad-CAM",
        "LIME",
        "random",
        "centre",
        "edges",
        "constant",
        "Grad-CAM, another class",
        "LIME, another class",
    ]
    assert list(dict.fromkeys(table["column"])) == labels
    assert len(table) == 3 * 8 * 2
    by_hand = (
        api.explain(loaded, planted_image(1), "gradcam", "red").values[PATCH].mean()
    )
    mine = table[
        (table["sample"] == "p1") & (table["metric"] == "test-in-patch")
    ].set_index("column")
    assert mine.loc["Grad-CAM", "value"] == pytest.approx(by_hand, rel=1e-6)
    assert mine.loc["constant", "value"] == 1.0
    assert math.isnan(mine.loc["edges", "value"])
    assert mine.loc["edges", "reason"] == "p1 has no edges today"
    assert json.loads(mine.loc["edges", "facts"])["image"] == "p1"
    other = api.explain(loaded, planted_image(1), "gradcam", 0).values[PATCH].mean()
    assert mine.loc["Grad-CAM, another class", "value"] == pytest.approx(
        other, rel=1e-6
    )
    curve = next(one for one in found.summary["curves"] if one["column"] == "LIME")
    assert curve["mean"][0] == 1.0
    assert curve["mean"][-1] == 0.0


def test_a_finished_run_gives_the_same_numbers(images, loaded, tmp_path):
    first = evaluated(images, tmp_path)
    job = explain.job_from_specs(BY, ["my:red"], "red")
    explain.run_explanations(job, [images], tmp_path / "again", None, OPTIONS)
    second = evaluate.evaluate_run(
        Asked(("test-in-patch", "test-hit")), tmp_path / "again", None, OPTIONS
    )
    pd.testing.assert_frame_equal(first.table(), second.table())


def test_what_is_kept_is_not_scored_again(images, loaded, tmp_path):
    evaluated(images, tmp_path)
    count = len(CALLS)
    again = evaluate.evaluate_run(
        Asked(("test-in-patch", "test-hit")), tmp_path / "run", None, OPTIONS
    )
    assert len(CALLS) == count
    (tmp_path / "run" / "metrics" / "p2.json").unlink()
    evaluate.evaluate_run(Asked(("test-in-patch",)), tmp_path / "run", None, OPTIONS)
    assert len(CALLS) == count + 8  # one image, eight columns
    more = evaluate.evaluate_run(
        Asked(("test-in-patch:scale=2",)), tmp_path / "run", None, OPTIONS
    )
    merged = more.table().merge(
        again.table()[again.table()["metric"] == "test-in-patch"],
        on=["sample", "column"],
    )
    known = merged.dropna(subset=["value_x"])
    assert np.allclose(known["value_x"], 2 * known["value_y"])


def test_a_image_killed_halfway_keeps_the_metrics_that_were_done(
    images, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "PATIENCE", 0.0)
    monkeypatch.setattr(Hit, "score", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        evaluated(images, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(load, "_from_factory", lambda *_: loaded)
    assert CALLS.count("centre") == 1
    found = evaluated(images, tmp_path)
    assert CALLS.count("centre") == 3  # the first image's are not made again
    assert len(found.table()) == 3 * 8 * 2
    axes = found.figure("test-in-patch").axes[0]
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    cells = [
        c for c in found.summary["cells"] if c["metric"] == "test-in-patch" and c["n"]
    ]
    assert sorted(dots) == pytest.approx(sorted(cell["mean"] for cell in cells))
    assert "test-in-patch" in found._repr_html_()
    with pytest.raises(
        cs.ConsilienceError, match="no metric with a number 'test-hat'"
    ):
        found.figure("test-hat")


def test_a_image_that_changed_or_went_is_refused(images, loaded, tmp_path):
    evaluated(images, tmp_path)
    asked = Asked(("test-hit",))
    Image.fromarray(planted_image(9).pixels).save(images / "p1.png")
    with pytest.raises(cs.ConsilienceError, match="p1 is another image"):
        evaluate.evaluate_run(asked, tmp_path / "run", None, OPTIONS)
    (images / "p1.png").unlink()
    with pytest.raises(cs.ConsilienceError, match="is not where it was"):
        evaluate.evaluate_run(asked, tmp_path / "run", None, OPTIONS)


def test_a_number_of_another_precision_is_another_number(images, loaded, tmp_path):
    """What was scored in f32 is not given out for bf16, nor the other way round."""
    evaluated(images, tmp_path, ("test-in-patch",))
    asked, counts = Asked(("test-in-patch",)), []
    for precision in ("f32", "bf16", "bf16", "f32"):
        CALLS.clear()
        options = replace(OPTIONS, precision=precision)
        evaluate.evaluate_run(asked, tmp_path / "run", None, options)
        counts.append(len(CALLS))
    assert counts[0] == 0
    assert counts[1] > 0
    assert counts[2] == 0


def test_the_truth_of_an_image_is_its_content():
    one, other = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    one[:2], other[6:] = True, True
    pixels = np.zeros((8, 8, 3), np.uint8)
    digests = {
        columns.truth_digest(cs.Sample("a", pixels, masks={"dog": mask}))
        for mask in (one, other)
    }
    assert len(digests) == 2


def test_other_weights_are_refused(images, loaded, tmp_path, monkeypatch):
    evaluated(images, tmp_path)
    other = replace(loaded, name="other")
    monkeypatch.setattr(load, "_from_factory", lambda *_: other)
    with pytest.raises(cs.ConsilienceError, match="was made with red-finder@"):
        evaluate.evaluate_run(Asked(("test-hit",)), tmp_path / "run", None, OPTIONS)


# ---- controls


def test_a_map_that_knows_no_class_has_no_map_of_another(red_model, planted):
    like = api.explain(red_model, planted, "centre", "red")
    with pytest.raises(NotApplicable, match="same for every class"):
        columns.another_class(red_model, like, 0)


def test_another_class_is_neither_explained_nor_predicted_nor_true(
    red_model, planted
):
    like = api.explain(red_model, replace(planted, label=3), "gradcam", 1)
    drawn = {columns.drawn_class(like, 6, seed) for seed in range(60)}
    assert drawn == {0, 2, 4, 5}
    assert columns.drawn_class(like, 6, 7) == columns.drawn_class(like, 6, 7)


def test_a_remembering_model_says_the_same_and_asks_once(red_model, planted):
    model = remembering(red_model)
    plain = [
        api.explain(red_model, planted, "rise:masks=40", target).values
        for target in (0, 1)
    ]
    passes = []
    engine = model._runner
    asked = engine.scores

    def counted(network, pixels):
        passes.append(len(pixels))
        return asked(network, pixels)

    engine.scores = counted
    try:
        model.remember()
        first = api.explain(model, planted, "rise:masks=40", 0).values
        count = sum(passes)
        second = api.explain(model, planted, "rise:masks=40", 1).values
        assert sum(passes) == count
        model.forget()
        api.explain(model, planted, "rise:masks=40", 1)
        assert sum(passes) > count
    finally:
        del engine.scores
    np.testing.assert_array_equal(first, plain[0])
    np.testing.assert_array_equal(second, plain[1])


def test_a_copy_of_a_remembering_model_remembers_nothing(red_model):
    model = remembering(red_model)
    model.remember()
    assert not model.with_module(model.module)._memory


# ---- the library's verb


def test_evaluate_scores_one_explanation(red_model, planted):
    cam = cs.explain(red_model, planted, "gradcam", "red")
    found = cs.evaluate(
        red_model, cam, ["test-in-patch", "test-in-patch:scale=2", "pointing-game"]
    )
    assert found["test-in-patch"].value == pytest.approx(cam.values[PATCH].mean())
    assert found["test-in-patch:scale=2"].value == pytest.approx(
        2 * found["test-in-patch"].value
    )
    assert isinstance(found["pointing-game"], cs.NotApplicable)  # no box, no mask
    with pytest.raises(cs.ConsilienceError, match="the model given is"):
        cs.evaluate(red_model, replace(cam, model_id="another@1"), "test-hit")
    with pytest.raises(cs.ConsilienceError, match="no metric"):
        cs.evaluate(red_model, cam, "test-nothing")


def test_evaluate_says_what_the_model_lacks(red_model, planted):
    blind = cs.wrap_callable(
        lambda pixels: np.tile([0.3, 0.7], (len(pixels), 1)),
        classes=("a", "b"),
        size=64,
    )
    flat = cs.explain(blind, planted, "centre")
    found = cs.evaluate(blind, flat, "mprt")["mprt"]
    assert isinstance(found, cs.NotApplicable)
    assert "module" in str(found)


# ---- suites, report, command line


def test_suites_name_metrics_that_there_are():
    for name, specs in suites.SUITES.items():
        assert suites.asked_metrics((), name)
        assert len({*specs}) == len(specs)
    assert suites.asked_metrics(("test-hit", "test-hit"), None) == ("test-hit",)
    with pytest.raises(cs.ConsilienceError, match="planted"):
        suites.asked_metrics((), "nothing")


def test_the_report_shows_the_table_and_links_numbers_to_images(
    images, loaded, tmp_path
):
    found = evaluated(images, tmp_path)
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert 'id="evaluation"' in page
    assert 'href="#metric-1-values"' in page
    assert 'id="metric-1-values"' in page
    values = page.partition('id="metric-1-values"')[2]
    assert '<a href="#image-2">p1</a>' in values
    assert 'id="image-2"' in page
    assert "3 images cannot show a method to be better than the controls" in page
    assert page.count('class="untold"') > 1
    assert (
        page.count('class="below"') == 1
    )  # in the legend: three images tell nothing
    assert "critical difference" in page
    section = page.partition('id="evaluation"')[2].partition('id="asked-heading"')[0]
    assert not re.search(
        r"(src|href)=\"(?!#)", section
    )  # nothing is loaded, every link stays on the page


def test_a_run_without_evaluation_has_no_such_section(images, loaded, tmp_path):
    found = evaluated(images, tmp_path)
    (found.folder / "evaluation.json").unlink()
    page = html.report_page(cs.Run(found.folder))
    assert 'id="evaluation"' not in page


def test_the_verb_on_images_then_on_its_run(images, loaded, tmp_path, capsys):
    out = str(tmp_path / "run")
    given = ["-m", "my:red", "--target", "red", "--engine", "torch", "--by", BY[0]]
    assert (
        main(["evaluate", str(images), "--metric", "test-hit", *given, "-o", out])
        == 0
    )
    printed = capsys.readouterr().out
    assert "Grad-CAM, another class" in printed
    assert "cannot show a method to be better" in printed
    assert (
        main(["evaluate", out, "--metric", "test-hit", "--engine", "torch", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert len(said["values"]) == 3 * 6
    assert Evaluation(out).summary["metrics"][0]["spec"] == "test-hit"
    assert main(["evaluate", out, "--metric", "test-hit", "--by", "gradcam"]) == 1
    assert "is a run and has its own" in capsys.readouterr().err
    shutil.rmtree(out)
    assert main(["evaluate"]) == 1


def test_a_remembering_model_still_offers_everything_else(red_model, planted):
    model = remembering(red_model)
    assert model.id == red_model.id
    assert model.gradient_batch == red_model.gradient_batch
    assert model.target_layer() == red_model.target_layer()


# ---- the grid pointing game

LEFT = {(0, 0): 0.75, (1, 0): 0.25, (0, 1): 0.0, (1, 1): 0.0}
"""Share of a map that is 3 in the upper left quarter, 1 in the lower left one, by row
and column of a quarter.
"""


@registry.explainers.register("test-left")
@dataclass(frozen=True)
class Left:
    """The same map for every class: 3 in the upper left quarter, 1 in the lower left
    one.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        LEFTS.append(target.index)
        return Heat(
            torch.tensor([[3.0, 0.0], [1.0, 0.0]])
            .repeat_interleave(32, 0)
            .repeat_interleave(32, 1)
        )


LEFTS = []


class Brightest(nn.Module):
    """How red, green, blue and grey an image is; very sure of it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.mix.weight[:, :, 0, 0] = 20 * torch.tensor(
                [[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.5, 0.5, 0.5]]
            )
            self.mix.bias.zero_()

    def forward(self, x):
        return self.mix(x).mean(dim=(2, 3))


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


@pytest.fixture
def brightest(monkeypatch):
    made = wrap(
        Brightest(),
        classes=("red", "green", "blue", "white"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
        name="brightest",
    )
    made = replace(made.using(engine="torch"), source="my:brightest")
    monkeypatch.setattr(load, "_from_factory", lambda *_: made)
    yield made
    LEFTS.clear()


@pytest.fixture
def coloured(tmp_path):
    folder = tmp_path / "coloured"
    folder.mkdir()
    for index, colour in enumerate(COLOURS):
        for shade in range(3):
            level = np.array(colour) * (255 - 4 * shade) // 255
            Image.new("RGB", (64, 64), tuple(level.tolist())).save(
                folder / f"{index}-{shade}.png"
            )
    return folder


def gridded(folder, out, metrics=("grid-pointing", "sparseness")):
    job = explain.job_from_specs(["test-left"], ["my:brightest"])
    return evaluate.evaluate_images(Asked(metrics), job, [folder], out, None, OPTIONS)


def test_mosaics_are_made_of_the_images_and_scored_beside_controls(
    brightest, coloured, tmp_path
):
    """Twelve images of four colours make three mosaics; where a class lies is read off
    their pixels.
    """
    found = gridded(coloured, tmp_path / "run")
    rows = found.table()[found.table()["metric"] == "grid-pointing"]
    assert rows["sample"].nunique() == 3
    assert found.summary["images"] == 12
    left = rows[rows["column"] == "test-left"].set_index("sample")["value"]
    asked = LEFTS[-6::2]  # of each mosaic the class that was drawn, then another one
    assert asked == [
        one.label for one in mosaics(brightest, cs.data.read_samples([coloured]))
    ]
    for (name, value), index in zip(left.items(), asked, strict=True):
        pixels = np.asarray(Image.open(found.folder / "mosaics" / f"{name}.png"))
        means = pixels.reshape(2, 32, 2, 32, 3).mean(axis=(1, 3)).reshape(4, 3)
        lit = (means > 128).sum(axis=1)
        place = (
            int(lit.argmax())
            if index == 3
            else int(np.where(lit == 1, means[:, index], 0).argmax())
        )
        assert value == pytest.approx(LEFT[divmod(place, 2)], abs=1e-6)
    constant = rows[rows["column"] == "constant"]["value"]
    np.testing.assert_allclose(constant, 0.25)
    cell = next(
        c
        for c in found.summary["cells"]
        if c["metric"] == "grid-pointing" and c["column"] == "test-left"
    )
    assert (cell["n"], cell["mean"]) == (3, pytest.approx(left.mean()))
    other = next(
        c for c in found.summary["cells"] if c["column"] == "test-left, another class"
    )
    assert other["reasons"][0]["code"] == "same-for-every-class"
    metric = found.summary["metrics"][0]
    assert (metric["unit"], metric["units"]) == ("mosaic", 3)
    assert {
        row["b"]
        for row in found.summary["against_controls"]
        if row["metric"] == "grid-pointing"
    } > {"random", "constant"}
    assert all(row["a"] != "grid-pointing" for row in found.summary["correlations"])
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "3 mosaics" in page
    assert page.count('class="mosaic"') == 3


def test_mosaics_are_kept_and_come_of_a_run_too(brightest, coloured, tmp_path):
    first = gridded(coloured, tmp_path / "run")
    LEFTS.clear()
    again = evaluate.evaluate_run(
        Asked(("grid-pointing", "sparseness")), tmp_path / "run", None, OPTIONS
    )
    assert not LEFTS  # nothing is explained again
    pd.testing.assert_frame_equal(first.table(), again.table())
    name = (
        first.table()
        .loc[first.table()["metric"] == "grid-pointing", "sample"]
        .iloc[0]
    )
    (tmp_path / "run" / "metrics" / f"{name}.json").unlink()
    evaluate.evaluate_run(Asked(("grid-pointing",)), tmp_path / "run", None, OPTIONS)
    assert len(LEFTS) == 2  # one mosaic: its class and another one


def test_too_few_sure_images_are_one_line(brightest, coloured, tmp_path, capsys):
    for path in coloured.glob("3-*.png"):
        path.unlink()
    found = gridded(coloured, tmp_path / "run")
    assert set(found.table()["metric"]) == {"sparseness"}
    console.show_evaluation(found, console.output())
    said = " ".join(capsys.readouterr().out.split())
    line = "No number of Grid pointing game (grid-pointing): a mosaic of 4 cells needs images of as many classes that"
    assert said.count(line) == 1
    assert "of 9 images 9, of 3 classes, have a probability of 0.9" in said
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("a mosaic of 4 cells needs") == 1
    alone = evaluate.evaluate_run(
        Asked(("grid-pointing",)), tmp_path / "run", None, OPTIONS
    )
    assert len(alone.table()) == 0
    assert alone.summary["metrics"][0]["absent"].startswith(
        "a mosaic of 4 cells needs"
    )


def test_mosaics_are_of_images_that_every_model_is_sure_of(brightest, coloured):
    """A second model that is sure of no white: the white images are left out, and three
    classes make no mosaic.
    """
    network = Brightest()
    with torch.no_grad():
        network.mix.weight[3] = -10.0
    other = wrap(
        network,
        classes=brightest.classes,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
        name="other",
    ).using(engine="torch")
    samples = list(cs.data.read_samples([coloured]))
    metric = registry.metrics.build("grid-pointing:count=2")
    assert len(list(grid.mosaics_of(metric, [brightest], samples, 0))) == 2
    with pytest.raises(cs.ConsilienceError, match="of 3 classes"):
        list(grid.mosaics_of(metric, [brightest, other], samples, 0))


def test_a_data_sets_number_is_named_as_such(images, loaded, tmp_path, capsys):
    """MaxBoxAcc of three images by hand: one threshold for all, from the kept curves;
    below the mean of their own bounds.
    """
    truth = tmp_path / "truth.csv"
    edges = ["40,8,56,24", "36,8,60,24", "40,0,56,40"]
    truth.write_text(
        "image,class_index,x0,y0,x1,y1\n"
        + "".join(f"p{i}.png,1,{edge}\n" for i, edge in enumerate(edges))
    )
    job = explain.job_from_specs(BY, ["my:red"], "red")
    found = evaluate.evaluate_images(
        Asked(("max-box-acc",)), job, [images], tmp_path / "run", truth, OPTIONS
    )
    spec = registry.spell(registry.metrics.build("max-box-acc"), full=True)
    curves = np.array([one.get(spec, "Grad-CAM").curve for one in found.images()])
    best = [
        max(float(np.mean([row[t] >= delta for row in curves])) for t in range(100))
        for delta in (0.3, 0.5, 0.7)
    ]
    said = next(
        row for row in found.summary["gathered"] if row["column"] == "Grad-CAM"
    )
    assert said["value"] == pytest.approx(np.mean(best))
    cell = next(row for row in found.summary["cells"] if row["column"] == "Grad-CAM")
    assert said["value"] <= cell["mean"]
    console.show_evaluation(found, console.output())
    assert "of the data set" in capsys.readouterr().out
    assert "MaxBoxAcc of the data set" in (found.folder / "report.html").read_text(
        encoding="utf-8"
    )


def test_reasons_of_many_classes_are_one_line(images, loaded, tmp_path):
    from consilience.show import words

    facts = {"image": "a.jpg", "marked": "3 tabby", "others": ["4", "5"], "masks": 0}
    assert words.reason_sentence("no-object-boxes", facts) == (
        "a.jpg has no box of class 3 tabby; it has boxes of class 4, 5 and 0 masks"
    )
    assert words.reason_sentence("no-object-boxes", {"masks": 0}) == (
        "the image has no box of the explained class; it has boxes of another class, or "
        "none and 0 masks"
    )
    assert words.reason_sentence("object-not-shown", {}) == (
        "what is marked as the explained class covers no pixel of what the model is shown"
    )
    found = evaluated(images, tmp_path, ("energy", "pointing-game"))
    lines = words.silent(found.summary)
    assert len(lines) == 1
    assert len(lines[0][0]) == 2
    assert lines[0][1].endswith("(3 images)")


def test_a_mark_stands_on_the_corrected_p():
    """Five images: each p is 1/32, of two tests 2/32, above .05."""
    values = [[0.1, 0.6, 0.5]] * 5
    cell = summary.summarise(rows(values), {"low": Low()}, COLUMNS)["cells"][0]
    assert cell["above"] is False
    assert cell["not_above"] == ["c", "d"]
    assert cell["reachable"] is False


def test_the_seed_reaches_every_interval():
    values = np.random.default_rng(2).exponential(size=(12, 3)).tolist()
    cells = [
        summary.summarise(rows(values), {"low": Low()}, COLUMNS, seed=seed)
        for seed in (0, 0, 1)
    ]
    highs = [[cell["high"] for cell in found["cells"]] for found in cells]
    gaps = [[row["high"] for row in found["against_controls"]] for found in cells]
    assert highs[0] == highs[1] != highs[2]
    assert gaps[0] == gaps[1] != gaps[2]


def test_maps_of_another_class_are_not_ranked():
    other = TableColumn("m, another class", "other", "gradcam", "m")
    values = np.random.default_rng(3).random((8, 4)).tolist()
    names = ("m", "c", "d", "m, another class")
    found = summary.summarise(
        rows(values, names=names), {"low": Low()}, (*COLUMNS, other)
    )
    (orders,) = found["orders"]
    assert orders["columns"] == ["m", "c", "d"]


def test_a_number_that_failed_is_tried_again(images, loaded, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Hit, "score", broken)
        evaluated(images, tmp_path)
        failed = evaluate.evaluate_run(
            Asked(("test-hit",)), tmp_path / "run", None, OPTIONS
        ).table()
        assert failed["value"].isna().all()
        assert "RuntimeError: out of memory" in failed["reason"].iloc[0]
    again = evaluate.evaluate_run(
        Asked(("test-hit",)), tmp_path / "run", None, OPTIONS
    ).table()
    assert again["value"].notna().any()
