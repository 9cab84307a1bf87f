"""Which explainer: what an evaluation's numbers show of methods against each other,
how often noise alone shows something, and the whole on a small network.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import registry, stats
from consilience.cli import main
from consilience.evaluation import summary
from consilience.evaluation.columns import TableColumn
from consilience.evaluation.recommendation import Cost, recommendation
from consilience.models.network import wrap
from consilience.runs import recommend
from consilience.show import recommend_words
from consilience.show.recommend_page import recommend_page
from consilience.show.words import format_number

SPECS = ("insertion:steps=10", "deletion:steps=10")


def evaluated(values, methods, seed=0):
    """An evaluation's summary of values (metric, column, image); one control is last."""
    columns = [
        *(TableColumn(name, "method", name.lower()) for name in methods),
        TableColumn("random", "control", "random"),
    ]
    metrics = {spec: registry.metrics.build(spec) for spec in SPECS}
    rows = [
        {
            "sample": f"i{image}",
            "digest": str(image),
            "column": column.label,
            "metric": spec,
            "kind": column.kind,
            "value": float(values[m, c, image]),
            "code": "",
            "facts": "",
        }
        for m, spec in enumerate(SPECS)
        for c, column in enumerate(columns)
        for image in range(values.shape[2])
    ]
    return json.loads(
        json.dumps(
            summary.summarise(rows, metrics, columns, seed),
            default=lambda x: x.tolist() if hasattr(x, "tolist") else vars(x),
        )
    )


def planted(gaps, count=30, noise=0.05, seed=0):
    """Noise with a shift by (metric, column); a common part of each image goes out."""
    rng = np.random.default_rng(seed)
    gaps = np.asarray(gaps, float)
    common = rng.normal(0.5, 0.2, (2, 1, count))
    return common + gaps[:, :, None] + rng.normal(0, noise, (*gaps.shape, count))


COSTS = {
    "A": Cost(1, 0.3),
    "B": Cost(500, 2.0),
    "C": Cost(20, 0.1),
    "D": Cost(2, 0.2),
}


def test_beaten_left_and_unproven():
    """A is better than C by insertion, B than A by deletion (where less is better) and A
    than B by insertion: A and B are left, C is beaten by both, D is no better than the
    control.
    """
    gaps = [[0.5, 0.3, 0.1, 0, 0], [-0.1, -0.4, -0.1, 0, 0]]
    found = recommendation(
        evaluated(planted(gaps), "ABCD"), COSTS, {"x": "no layers"}
    )
    assert [one.label for one in found.standings] == ["C", "D", "A", "B"]
    assert found.left == ("A", "B")
    assert found.unproven == ()
    by = {one.label: one for one in found.standings}
    assert set(by["A"].above) == set(SPECS)
    assert by["D"].above == ()
    assert by["A"].beaten_by == by["B"].beaten_by == {}
    assert by["C"].beaten_by == {"A": SPECS[:1], "B": SPECS}
    assert by["D"].beaten_by == {"A": SPECS, "B": SPECS, "C": SPECS}
    assert found.undecided() == ()
    contests = {(one.metric, one.a, one.b): one for one in found.contests}
    assert len(contests) == 12
    assert contests[SPECS[0], "A", "B"].better == "A"
    assert contests[SPECS[1], "A", "B"].better == "B"
    assert contests[SPECS[1], "A", "B"].mean < 0
    assert contests[SPECS[1], "A", "C"].better == ""
    table = found.table().set_index("method")
    assert table["left"].to_dict() == {"A": True, "B": True, "C": False, "D": False}
    assert table.loc["B", "passes"] == 500
    assert table.loc["C", "beaten_by"] == "A, B"
    assert table.loc["A", "above_controls"] == 2
    assert table.loc["A", SPECS[0]] == pytest.approx(by["A"].cells[SPECS[0]]["mean"])


def test_contests_are_one_family_over_pairs_and_metrics():
    """Holm by hand over the raw p of `stats.paired_test`."""
    values = planted([[0.02, 0.0, 0.03, 0], [0.0, 0.03, -0.02, 0]], count=14)
    found = recommendation(evaluated(values, "ABC"), COSTS)
    raw = []
    for m, sign in ((0, 1), (1, -1)):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            gap = sign * (values[m, a] - values[m, b])
            raw.append(stats.paired_test(gap, 0))
    np.testing.assert_allclose([one.p for one in found.contests], raw)
    order = np.argsort(raw)
    running, adjusted = 0.0, np.zeros(6)
    for place, at in enumerate(order):
        running = max(running, min(1.0, raw[at] * (6 - place)))
        adjusted[at] = running
    np.testing.assert_allclose([one.p_holm for one in found.contests], adjusted)
    for one in found.contests:
        expected = (one.a if one.mean > 0 else one.b) if one.p_holm <= 0.05 else ""
        assert one.better == expected


def test_no_difference_is_said_as_not_shown():
    gaps = [[0.5, 0.5, 0], [-0.5, -0.5, 0]]
    found = recommendation(evaluated(planted(gaps), "AB"), COSTS)
    assert found.left == ("A", "B")
    assert found.undecided() == (("A", "B"),)
    said = "\n".join(recommend_words.lines(found))
    assert "No difference was shown between A and B: Insertion " in said
    assert "A and B are left" in recommend_words.headline(found)
    assert "A takes least time" in recommend_words.headline(found)


def test_maps_that_know_nothing_are_not_recommended():
    found = recommendation(evaluated(planted(np.zeros((2, 3))), "AB"), COSTS)
    assert found.left == ()
    assert found.unproven == ("A", "B")
    assert recommend_words.headline(found).startswith("No method that nothing beats")
    assert "could not have shown" not in recommend_words.headline(found)
    assert found.reachable


def test_intervals_end_where_the_metric_does():
    """Deletion is from 0 to 1: Student's t of three values goes beyond."""
    values = np.zeros((2, 3, 3))
    values[:, 0] = [0.0, 0.9, 1.0]
    found = recommendation(evaluated(values, "AB"), COSTS)
    cell = found.standings[0].cells[SPECS[1]]
    free = stats.mean_interval([0.0, 0.9, 1.0])
    assert free.low < 0 < 1 < free.high
    assert (cell["low"], cell["high"]) == (0.0, 1.0)
    assert cell["mean"] == pytest.approx(1.9 / 3)


def test_few_images_are_said():
    values = planted([[0.5, 0.3, 0], [0, 0, 0]], count=4)
    found = recommendation(evaluated(values, "AB"), COSTS)
    assert not found.reachable
    assert not any(one.better for one in found.contests)
    assert "could not have shown it" in recommend_words.headline(found)
    assert found.out_of_reach == SPECS
    lines = list(recommend_words.lines(found))
    assert lines[0].startswith(
        "Insertion: 4 images could not show a difference over 2 comparisons"
    )


def test_a_kind_of_evidence_of_one_unit_has_no_interval():
    """Of few images there may be a single mosaic."""
    from consilience.files import json_ready

    values = planted([[0.5, 0.3, 0], [0, 0, 0]], count=1)
    told = json_ready(evaluated(values, "AB"))
    assert told["between"][0]["low"] is None  # as an evaluation's file says it
    found = recommendation(told, COSTS)
    assert [one.n for one in found.contests] == [1, 1]
    for one in found.contests:
        assert math.isnan(one.low)
        assert math.isnan(one.high)
        assert one.better == ""
    assert found.out_of_reach == SPECS
    assert recommend.as_dict(found)["contests"][0]["low"] is None
    page = recommend_page(found, "net@1", 1, "1.0")
    assert "nan" not in page.partition("</style>")[2]
    assert next(iter(recommend_words.lines(found))).startswith(
        "Insertion: 1 image could not show a difference over 2 comparisons"
    )
    assert len(found.table()) == 2


def test_one_left_and_a_circle():
    gaps = [[0.5, 0.2, 0], [-0.5, -0.2, 0]]
    found = recommendation(evaluated(planted(gaps), "AB"), COSTS, {"x": "no layers"})
    assert found.left == ("A",)
    assert "Of 2 methods A is left" in recommend_words.headline(found)
    lines = list(recommend_words.lines(found))
    assert lines == [
        "B is beaten by A (Insertion, Deletion).",
        "Left out, for it failed on the first image: x (no layers).",
    ]
    told = evaluated(planted(gaps), "AB")
    ring = [("A", "B", 1), ("B", "C", 1), ("A", "C", -1)]
    told["columns"].insert(2, {"label": "C", "kind": "method", "spec": "c"})
    like = next(one for one in told["between"])
    told["between"] = [
        {**like, "metric": SPECS[0], "a": a, "b": b, "mean": sign, "p": 1e-4}
        for a, b, sign in ring
    ]
    found = recommendation(told, COSTS)
    assert (found.left, found.unproven) == ((), ())
    assert "in a circle" in recommend_words.headline(found)


def test_methods_that_are_alike_are_seldom_told_apart():
    """Three methods of one distribution (skewed: squares), 60 evaluations of 12 images:
    in how many any of them is said to be better. 7 or more of 60 at a rate of .05 would
    come in 3 of 100.
    """
    rng = np.random.default_rng(5)
    wrong = 0
    for draw in range(60):
        values = rng.normal(size=(2, 4, 12)) ** 2
        found = recommendation(evaluated(values, "ABC", seed=draw), COSTS)
        wrong += any(one.better for one in found.contests)
    assert wrong <= 6


# ---- the whole


class Spots(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=4), nn.ReLU(), nn.Conv2d(12, 32, 3), nn.ReLU()
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.maps(x).mean(dim=(2, 3)))


def network():
    made = wrap(Spots(), classes=tuple("abcd"), size=64, name="spots")
    return made.using(engine="torch")


def some_images(count):
    rng = np.random.default_rng(0)
    blocks = rng.integers(60, 200, (count, 8, 8, 3)).astype(np.uint8)
    return list(blocks.repeat(8, axis=1).repeat(8, axis=2))


METRICS = (
    "planted-mark:first='logo:size=0.3,opacity=1',second='barcode:size=0.3'",
    "deletion:steps=4",
    "grid-pointing:sure=0.999999",
)


def test_recommend_on_a_network(tmp_path):
    found = cs.recommend(
        network(),
        some_images(16),
        by=("gradcam", "gradient", "rollout"),
        metrics=METRICS,
        folder=tmp_path / "run",
    )
    assert {one.label for one in found.standings} == {"Grad-CAM", "Gradient"}
    assert list(found.refused) == ["rollout"]
    assert all(one.cost.passes == 1 for one in found.standings)
    assert all(0 < one.cost.seconds < 60 for one in found.standings)
    spec = found.metrics[0]["spec"]
    cell = found.standings[0].cells[spec]
    assert 6 <= cell["n"] <= 16
    absent = found.metrics[2]["absent"]
    assert "a mosaic of 4 cells needs" in absent
    lines = list(recommend_words.lines(found))
    assert f"No number of Grid pointing game: {absent}." in lines
    told = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert told == json.loads(json.dumps(recommend.as_dict(found)))
    assert told["methods"][0]["numbers"][spec]["n"] == cell["n"]
    table = pd.read_csv(tmp_path / "run" / "recommendation.csv")
    expected = found.table().replace("", np.nan)
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    page = (tmp_path / "run" / "recommend.html").read_text(encoding="utf-8")
    assert recommend_words.headline(found).replace("'", "&#39;") in page
    assert 'href="report.html"' in page
    # the same call goes on from what is there
    again = cs.recommend(
        network(),
        some_images(16),
        by=("gradcam", "gradient", "rollout"),
        metrics=METRICS,
        folder=tmp_path / "run",
    )
    pd.testing.assert_frame_equal(again.table(), found.table())


def test_what_cannot_be_compared_is_refused():
    images = some_images(4)
    with pytest.raises(cs.ConsilienceError, match="edges is a control"):
        cs.recommend(network(), images, by=("gradcam", "edges"))
    with pytest.raises(
        cs.ConsilienceError, match=r"1 of 2 works on spots.*rollout: "
    ):
        cs.recommend(network(), images, by=("gradcam", "rollout"))
    with pytest.raises(cs.ConsilienceError, match="no metric 'insertio'"):
        cs.recommend(network(), images, metrics=("insertio",))


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for number, one in enumerate(some_images(3)):
        Image.fromarray(one).save(folder / f"{number}.png")
    asked = ["--by", "gradient", "--by", "gradcam", "--metric", "deletion:steps=2"]
    out = ["-o", str(tmp_path / "run")]
    assert main(["recommend", str(folder), *asked, *out]) == 0
    said = capsys.readouterr().out
    assert "could not have shown" in " ".join(said.split())
    assert "recommend.html" in said
    assert main(["recommend", str(folder), *asked, *out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reachable"] is False
    assert {one["method"] for one in told["methods"]} == {"Gradient", "Grad-CAM"}
    assert all(not math.isnan(one["seconds"]) for one in told["methods"])


def test_the_page_shows_every_number():
    gaps = [[0.5, 0.3, 0.1, 0], [-0.1, -0.4, -0.1, 0]]
    found = recommendation(evaluated(planted(gaps), "ABC"), COSTS)
    page = recommend_page(found, "net@1", 30, "1.0", "consilience recommend")
    assert page.count("★") == 1 + sum(len(one.above) for one in found.standings)
    assert page.count("<td>not shown</td>") == sum(
        not one.better for one in found.contests
    )
    assert "What 30 images show" in page
    assert page.count("▸ ") == len(found.left) == 2
    for one in found.standings:
        for cell in one.cells.values():
            assert format_number(cell["mean"]) in page
    for one in found.contests:
        assert format_number(one.mean) in page
    assert "net@1" in page
