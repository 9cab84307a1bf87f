"""Runs that earlier versions left are read, shown and gone on with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import consilience as cs
from consilience.cli import main
from consilience.runs.dissect import DissectionRun

KEPT = Path(__file__).parent / "kept"
VERSIONS = sorted(path.name for path in KEPT.iterdir() if (path / "run").is_dir())
COMMAND = [
    *("explain", "photos", "-m", "kept_network:network"),
    *("--by", "gradcam", "--by", "lime:samples=60,segments=grid(4)", "--by", "edges"),
    *("--truth", "labels.csv", "-o", "run"),
]


@pytest.fixture(params=VERSIONS)
def kept(request, tmp_path, monkeypatch):
    """A copy of what a version left, beside its images, with its network at hand."""
    shutil.copytree(KEPT / request.param, tmp_path, dirs_exist_ok=True)
    shutil.copytree(KEPT / "photos", tmp_path / "photos")
    shutil.copy(KEPT / "labels.csv", tmp_path)
    monkeypatch.syspath_prepend(KEPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_minor_version_is_kept():
    major, minor, *_ = (int(part) for part in cs.__version__.split(".")[:2])
    last = f"{major}.{minor - 1}" if minor else None
    assert VERSIONS
    assert last is None or last in VERSIONS


def test_a_kept_run_says_what_it_said(kept):
    run = cs.Run(kept / "run")
    assert run.samples == ["disc0", "disc1", "disc2"]
    assert list(run.table()["column"].unique()) == ["Grad-CAM", "LIME", "edges"]
    items = {(one.sample.name, one.explainer.partition(":")[0]): one for one in run}
    assert len(items) == 9
    assert all(one.values.shape == (48, 48) for one in items.values())
    assert {one.target.name for one in items.values()} == {"blue"}
    rows = run.agreement
    for row in rows.to_dict("records"):
        a, b = (
            run[(row["sample"], name)].mask(None) for name in (row["a"], row["b"])
        )
        overlap = np.logical_and(a, b).sum() / np.logical_or(a, b).sum()
        assert row["iou"] == pytest.approx(overlap, abs=1e-6)
    scores = pd.read_parquet(kept / "run" / "metrics.parquet")
    assert {"insertion", "sparseness"} <= set(scores["metric"].str.partition(":")[0])


def test_a_kept_run_is_what_the_same_command_gives_today(kept, capsys):
    before = {
        (one.sample.name, one.explainer): one.values for one in cs.Run(kept / "run")
    }
    maps = sorted((kept / "run" / "maps").iterdir())
    times = [path.stat().st_mtime_ns for path in maps]
    assert main(COMMAND) == 1  # one run is of one version
    assert "run holds another job (version was 0.1.0, is" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in maps] == times
    assert main([*COMMAND[:-1], "again"]) == 0
    anew = {(one.sample.name, one.explainer): one.values for one in cs.Run("again")}
    assert anew.keys() == before.keys()
    for key, values in before.items():
        assert anew[key] == pytest.approx(
            values, abs=2e-5 * float(np.abs(values).max())
        )


def test_a_kept_run_is_evaluated_further_and_reported(kept, capsys):
    assert main(["report", "run"]) == 0
    page = (kept / "run" / "report.html").read_text()
    assert "Grad-CAM" in page
    assert "disc2" in page
    assert main(["evaluate", "run", "--metric", "deletion", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n")[2] or "{}")
    assert "deletion" in json.dumps(told)
    assert main(["status", "run"]) == 0
    counted = cs.Run("run").query("select count(*) from explanations")
    assert counted.fetchall() == [(9,)]


def test_a_kept_dissection_says_what_it_said(kept, capsys):
    units = DissectionRun(kept / "units")
    summary = units.dissection.summary().iloc[0]
    assert (summary["units"], summary["detectors"]) == (4, 3)
    assert main(["report", "units"]) == 0
    assert "circle" in (kept / "units" / "report.html").read_text()
    shutil.copytree("units", "other")
    assert main(["compare", "units", "other", "-o", "compared"]) == 0


def test_the_record_of_a_kept_check_is_shown(kept):
    from consilience.runs.folder import read_manifest

    told = read_manifest(kept / "check", "check")
    assert told["verdict"] == "not shown"
    assert [one["name"] for one in told["criteria"]] == [
        "flips",
        "score",
        "maps of gradcam",
    ]
