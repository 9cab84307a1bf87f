"""Planted truth: what decides is what was planted, shown by intervention; the right map
scores and ranks as by hand.
"""

import html
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from consilience import ConsilienceError, api
from consilience.cli import main
from consilience.evaluation import planted, planted_suite
from consilience.evaluation.planted import BLUE, GREEN, RED, WORLDS, verify
from consilience.models.callable import wrap_callable
from consilience.runs import planted as planted_run

NAMES = sorted(WORLDS)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_evidence_turns_the_decision(name):
    world = WORLDS[name]
    for sample in world.samples(4, seed=5):
        found = verify(world, sample, seed=3)
        assert found.holds, found


@pytest.mark.parametrize("name", ["patch", "colour", "shortcut"])
def test_a_wrong_truth_does_not_pass(name):
    """The proof can fail: with the mask anywhere else, taking it away turns nothing."""
    world = WORLDS[name]
    sample = world.samples(1)[0]
    away = planted.wrong_maps(sample)["elsewhere"] > 0
    assert not verify(
        world, replace(sample, masks={"1": away & ~sample.masks["1"]})
    ).holds


def test_a_mark_that_is_not_needed_does_not_pass_for_one_of_two():
    """A red and a blue mark are the truth; red and green are not, though removing
    both turns the decision.
    """
    world = WORLDS["both"]
    sample = world.samples(1)[0]
    wrong = np.any(
        [(sample.pixels == colour).all(axis=2) for colour in (RED, GREEN)], axis=0
    )
    found = verify(world, replace(sample, masks={"1": wrong}))
    assert found.without < 0.5
    assert not found.holds


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_exact(name):
    """The mask is where the image has the colour that decides, and nothing else is."""
    for sample in WORLDS[name].samples(3, seed=1):
        colours = {
            "patch": [RED],
            "colour": [BLUE],
            "both": [RED, BLUE],
            "shortcut": [RED],
        }[name]
        marked = np.any(
            [(sample.pixels == colour).all(axis=2) for colour in colours], axis=0
        )
        np.testing.assert_array_equal(marked, sample.masks["1"])


def test_one_of_two_marks_is_not_enough_and_a_green_one_is_nothing():
    world = WORLDS["both"]
    sample = world.samples(1)[0]
    model = world.model()
    blank = planted.background(np.random.default_rng(7))

    def said(*colours):
        keep = np.any(
            [(sample.pixels == colour).all(axis=2) for colour in colours], axis=0
        )
        shown = replace(
            sample, pixels=np.where(keep[..., None], sample.pixels, blank)
        )
        return float(model.scores(model.view(shown).pixels).softmax(dim=1)[0, 1])

    assert said(RED, BLUE) > 0.9
    assert (
        max(said(RED), said(BLUE), said(RED, GREEN), said(BLUE, GREEN), said(GREEN))
        < 0.1
    )


def test_logits_of_one_mark_by_hand():
    """Red .902, .078, .078 gives .902 - .157 - .1 a pixel; 256 of 4,096 pixels; gain
    and threshold as written.
    """
    world = WORLDS["patch"]
    view = world.model().view(world.samples(1)[0])
    red = 230 / 255 - 2 * 20 / 255 - 0.1
    mean = red * 16**2 / 64**2
    amount = 0.55 * 16**2 / 64**2
    expected = 10 / amount * (mean - amount / 2)
    with torch.no_grad():
        logits = world.model().logits(view.pixels)[0]
    assert float(logits[1] - logits[0]) == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_world():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = planted.trained_on_shortcut(3, 4)
        torch.manual_seed(0)
        second = planted.trained_on_shortcut(3, 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    images = [
        [s.digest for s in WORLDS["colour"].samples(3, seed=2)] for _ in range(2)
    ]
    assert images[0] == images[1]
    assert len(set(images[0])) == 3


def test_building_a_world_leaves_the_random_state_alone():
    planted._built.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    WORLDS["patch"].model()
    assert torch.equal(torch.rand(1), expected)


def test_the_suite_by_hand(monkeypatch):
    """One world of two images: shares as the maps have them, the right map above the
    wrong ones where a metric says so.
    """
    monkeypatch.setattr(planted, "WORLDS", {"patch": WORLDS["patch"]})
    found = planted_suite.evaluate_planted(
        ["gradcam"], ["energy", "sparseness"], images=2
    )
    methods = {row["method"]: row for row in found["methods"]}
    world = WORLDS["patch"]
    shares = []
    for sample in world.samples(2):
        values = np.maximum(
            api.explain(world.model(), sample, "gradcam", 1).values.astype(float), 0
        )
        shares.append(values[sample.masks["1"]].sum() / values.sum())
    assert methods["gradcam"]["patch"] == pytest.approx(np.mean(shares))
    assert methods["(area of the evidence)"]["patch"] == 16**2 / 64**2
    assert methods["constant"]["patch"] == pytest.approx(16**2 / 64**2)
    metrics = {row["metric"]: row for row in found["metrics"]}
    assert (
        metrics["energy"]["all"] == 1.0
    )  # all of the right map is on the evidence, of no wrong one
    assert (
        metrics["sparseness"]["above elsewhere"] == 0.5
    )  # as sparse in a wrong place: a tie
    assert metrics["energy"]["comparisons"] == 2 * 4
    assert found["verified"][0].startswith("patch: ")


def test_the_suite_is_kept_with_a_page(monkeypatch, tmp_path):
    """The page shows the numbers of the results; a fill that hides nothing is said; a
    folder of something else is refused.
    """
    monkeypatch.setattr(planted, "WORLDS", {"patch": WORLDS["patch"]})
    by = [
        "gradient",
        "lime:samples=64,segments=grid(4)",
        "lime:samples=64,segments=grid(4),fill=grey",
    ]
    found = planted_suite.evaluate_planted(by, ["energy"], images=2)
    assert [
        note.startswith("lime:samples=64,segments=grid(4): the fill")
        for note in found["notes"]
    ] == [True]
    rows = {row["method"]: row for row in found["methods"]}
    world = WORLDS["patch"]
    sizes = [
        np.abs(api.explain(world.model(), world.samples(1)[0], spec, 1).values).max()
        for spec in by[1:]
    ]
    assert (
        sizes[0] < 1e-6 * sizes[1]
    )  # the mark is of one colour: its mean hides nothing, and what is left is rounding
    assert rows[by[2]]["mean"] > 0.5
    monkeypatch.setattr(planted_suite, "evaluate_planted", lambda *_, **__: found)
    asked = (by, ["energy"], tmp_path / "suite")
    _, page = planted_run.run_planted(*asked, command="asked so")
    text = page.read_text(encoding="utf-8")
    assert f"{rows[by[2]]['mean']:.3f}" in text
    assert found["notes"][0] in html.unescape(text)
    assert "asked so" in text
    assert text.count("<img") == 2
    kept = json.loads(
        (tmp_path / "suite" / "planted.json").read_text(encoding="utf-8")
    )
    assert kept["methods"][1]["method"] == "gradient"
    planted_run.run_planted(*asked)  # its own results may be written again
    with pytest.raises(ConsilienceError, match=r"another job \(seed was 0, is 1\)"):
        planted_run.run_planted(*asked, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    with pytest.raises(ConsilienceError, match="is not empty and holds no run"):
        planted_run.run_planted(by, ["energy"], tmp_path / "mine")


def test_the_verb_scores_the_suite(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(planted, "WORLDS", {"patch": WORLDS["patch"]})
    asked = [
        "evaluate",
        "--suite",
        "planted",
        "--by",
        "gradient",
        "--metric",
        "energy",
        "-o",
        str(tmp_path / "suite"),
    ]
    assert main([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(tmp_path / "suite" / "report.html")
    row = next(row for row in said["methods"] if row["method"] == "gradient")
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert f"{row['mean']:.3f}" in printed
    assert "report: " in printed
    assert main([*asked, "--truth", "boxes.csv"]) == 1
    assert "--truth goes with images" in capsys.readouterr().err


def test_an_unverified_world_is_refused(monkeypatch):
    broken = replace(
        WORLDS["patch"],
        draw=lambda rng: (planted.background(rng), np.eye(64, dtype=bool)),
    )
    with pytest.raises(
        ConsilienceError, match="does not show that the evidence decides"
    ):
        planted_suite._verified(broken, broken.samples(1), 0)
    with pytest.raises(ConsilienceError, match="no planted world 'sky'"):
        planted.world_named("sky")


def test_metrics_that_are_better_when_low_are_ranked_so(monkeypatch):
    monkeypatch.setattr(planted, "WORLDS", {"patch": WORLDS["patch"]})
    found = planted_suite.evaluate_planted(
        ["gradcam"], ["deletion:steps=16", "insertion:steps=16"], images=2
    )
    rows = {row["metric"].partition(":")[0]: row for row in found["metrics"]}
    assert rows["deletion"]["all"] > 0.7
    assert rows["insertion"]["all"] > 0.7


def test_what_needs_the_rest_as_a_whole_does_not_pass():
    """As much as the mark of the rest is not missed; all of the rest is."""
    world = WORLDS["patch"]
    sample = world.samples(1)[0]
    mask = sample.masks["1"]
    own = torch.from_numpy(sample.pixels).permute(2, 0, 1) / 255

    def says(pixels):
        same = ((pixels - own).abs().amax(dim=1) < 0.01).float()
        red = same[:, torch.from_numpy(mask)].mean(dim=1)
        rest = same[:, torch.from_numpy(~mask)].mean(dim=1)
        planted_too = ((red > 0.5) & (rest > 0.5)).float()
        return torch.stack([0 * planted_too, 80 * planted_too - 40], dim=1)

    size = mask.shape[0]
    names = ("nothing", "planted")
    model = wrap_callable(says, classes=names, size=size, outputs="logits")
    found = verify(world, sample, model)
    seen = (found.whole, found.without, found.elsewhere)
    assert seen == pytest.approx((1, 0, 0), abs=1e-6)
    assert not found.holds


def test_parts_are_taken_away_one_by_one():
    """Without either mark of two it is nothing, which is not what both at once show."""
    world = WORLDS["both"]
    sample = world.samples(1)[0]
    found = verify(world, sample)
    assert len(found.parts) == 2
    assert max(found.parts) < 0.5
    assert len({*found.parts, found.without}) == 3
