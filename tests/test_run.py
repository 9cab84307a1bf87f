"""Jobs: what low precision did to the maps is measured against f32, and what ran is
kept.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import RedFinder, planted_image
from PIL import Image
from scipy import stats
from torch import nn

from consilience import api
from consilience.models import load
from consilience.models.network import wrap
from consilience.runs import explain
from consilience.runs.folder import Run
from consilience.show import console

BY = ("gradcam", "lime:samples=60,segments=grid(5),seed=1", "random")


class Coarse(nn.Module):
    """A red finder whose sums depend on how they are rounded: bf16 changes LIME's order
    of superpixels.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = RedFinder()
        self.more = nn.Linear(192, 2)

    def forward(self, x):
        cells = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        return self.net(x) + self.more(cells)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of three columns on two images; ``job(precision)`` runs it and gives its
    folder.
    """
    images = tmp_path / "images"
    images.mkdir()
    for seed in (0, 1):
        Image.fromarray(planted_image(seed).pixels).save(images / f"p{seed}.png")
    made = wrap(
        Coarse(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
        name="coarse",
    )
    monkeypatch.setattr(load, "_from_factory", lambda *_: made)

    def call(precision, folder="run"):
        options = explain.LoadOptions(precision=precision, engine="torch")
        return explain.run_explanations(
            explain.job_from_specs(BY, ["my:coarse"], "red"),
            [images],
            tmp_path / folder,
            None,
            options,
        )

    return call


def test_how_far_bf16_moved_each_map_of_the_first_image(job, capsys):
    finished = job("bf16")
    rows = {row["column"]: row for row in finished.manifest["precision"]}
    assert [*rows] == [column["name"] for column in finished.manifest["columns"]]
    assert {row["image"] for row in rows.values()} == {"p0"}
    low, exact = (api_maps(precision) for precision in ("bf16", "f32"))
    for row, one, other in zip(rows.values(), low, exact, strict=True):
        k = round(0.2 * one.size)
        tops = [
            set(np.argsort(-values.ravel(), kind="stable")[:k])
            for values in (one, other)
        ]
        assert row["spearman"] == pytest.approx(
            stats.spearmanr(
                *(m.ravel().astype(float) for m in (one, other))
            ).statistic,
            abs=1e-9,
        )
        assert row["iou_at_20"] == pytest.approx(
            len(tops[0] & tops[1]) / len(tops[0] | tops[1])
        )
    first, second, third = rows.values()
    assert (first["precision"], second["precision"]) == (
        "f32",
        "bf16",
    )  # gradients always run in f32
    assert first["spearman"] == third["spearman"] == pytest.approx(1)
    assert second["spearman"] < 1
    assert finished.manifest["model"]["facts"]["precision"] == "bf16+f32"
    console.show_run(finished, console.output())
    said = capsys.readouterr().out
    assert (
        f"in bf16 against f32 on p0: Spearman {second['spearman']:.3f}, IoU of the top 20 %"
        in said
    )
    assert (
        f"{finished.manifest['columns'][0]['name']} was made in f32 all the same"
        in said
    )
    assert len(console.as_json(finished)["precision"]) == 3
    page = (finished.folder / "report.html").read_text()
    assert "Did the precision change the explanation?" in page
    assert f"{second['spearman']:.3f}" in page


def api_maps(precision):
    model = wrap(
        Coarse(), classes=("nothing", "red"), mean=(0, 0, 0), std=(1, 1, 1), size=64
    )
    model = model.using(engine="torch", precision=precision)
    return [
        api.explain(model, planted_image(0), by, target="red").values.astype(
            np.float64
        )
        for by in BY
    ]


def test_f32_has_nothing_to_report(job, capsys):
    finished = job("f32")
    assert finished.manifest["precision"] == []
    console.show_run(finished, console.output())
    assert "against f32" not in capsys.readouterr().out
    assert "Did the precision" not in (finished.folder / "report.html").read_text()
    assert finished.manifest["model"]["facts"]["precision"] == "f32"


def test_a_run_that_continues_reports_the_same(job):
    first = job("bf16").manifest["precision"]
    assert job("bf16").manifest["precision"] == first


def test_runs_of_before_have_no_precision(job):
    finished = job("f32")
    manifest = json.loads((finished.folder / "run.json").read_text())
    del manifest["precision"]
    (finished.folder / "run.json").write_text(json.dumps(manifest))
    old = Run(finished.folder)
    assert console.as_json(old)["precision"] is None
    console.show_run(old, console.output())


def test_provenance_is_what_ran():
    model = wrap(
        RedFinder(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
    )
    sample = planted_image()
    cam = api.explain(model, sample, "gradcam", target="red").provenance
    assert (cam["engine"], cam["precision"]) == ("torch", "f32")
    lime = api.explain(
        model, sample, "lime:samples=64,segments=grid(5)", target="red"
    ).provenance
    if model.facts["engine"] == "openvino":
        assert "openvino" in lime["engine"].split("+")
        assert lime["batch"] == 32


def test_the_area_of_a_mask_is_a_share_of_the_frame(job):
    finished = job("f32")
    table = finished.explanations
    for row in table.to_dict("records"):
        mask = next(
            item.cut
            for item in finished.load(row["sample"]).items
            if item.column == row["column"]
        )
        assert row["mask_area"] == pytest.approx(mask.on.mean())
    assert table["mask_area"].between(0.01, 0.6).all()
