"""Planted marks in a network of one's own: the last layer found and fitted, the images,
what is given of them, and the score.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import consilience as cs
from consilience import api, registry
from consilience.evaluation import marked
from consilience.evaluation.summary import unit_of
from consilience.marks.painting import laid, patch_of
from consilience.metrics.planted_mark import DECOY, PlantedMark
from consilience.models import heads
from consilience.models.network import wrap
from consilience.runs import evaluate, explain
from consilience.runs.evaluate import Asked

SIDE = 64
METRIC = PlantedMark("logo:size=0.3,opacity=1", "barcode:size=0.3", count=8)


class Pooled(nn.Module):
    """Twelve channels of a random first layer, their means, and what ``end`` makes."""

    def __init__(self, end, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=4), nn.ReLU(), nn.Conv2d(12, 32, 3), nn.ReLU()
        )
        self.head = (
            nn.Conv2d(32, classes, 1) if end == "conv" else nn.Linear(32, classes)
        )
        self.end = end

    def forward(self, x):
        means = self.maps(x).mean(dim=(2, 3))
        if self.end == "conv":
            return self.head(means[:, :, None, None]).flatten(1)
        said = self.head(means)
        if self.end == "softmax":
            return said.softmax(1)
        return said * 2 if self.end == "scaled" else said


def network(end="linear", classes=5):
    names = tuple(f"c{i}" for i in range(classes))
    kind = "probabilities" if end == "softmax" else "logits"
    return wrap(
        Pooled(end, classes), classes=names, size=SIDE, outputs=kind, name=end
    ).using(engine="torch")


def noise_images(count, seed=0):
    """Coloured blocks, no two alike."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(60, 200, (count, 8, 8, 3)).astype(np.uint8)
    return [
        cs.Sample(f"image-{i:02d}", one.repeat(8, axis=0).repeat(8, axis=1))
        for i, one in enumerate(blocks)
    ]


# ---- the last layer


@pytest.mark.parametrize("end", ["linear", "conv", "softmax"])
def test_a_head_is_found_read_and_replaced(end):
    there = network(end)
    head = heads.class_head(there)
    assert head == heads.ClassHead("head", squashed=end == "softmax")
    pixels = torch.rand(7, 3, SIDE, SIDE)
    rows = heads.features_before(there, head, pixels)
    with torch.no_grad():
        means = there.module.maps(there.prepared(pixels)).mean(dim=(2, 3))
    np.testing.assert_allclose(rows, means.double().numpy(), rtol=1e-6)
    before = {k: v.clone() for k, v in there.module.state_dict().items()}
    weights = np.linspace(-2, 3, 32)
    made = heads.with_head(there, head, weights, -0.7, ("no", "yes"), "reads")
    with torch.no_grad():
        outputs = made.scores(pixels).double()
    rule = rows @ weights - 0.7
    if end == "softmax":
        np.testing.assert_allclose(outputs[:, 1], 1 / (1 + np.exp(-rule)), atol=1e-6)
    else:
        np.testing.assert_allclose(outputs[:, 1], rule / 2, atol=1e-5)
        np.testing.assert_allclose(outputs[:, 0], -rule / 2, atol=1e-5)
    assert made.classes == ("no", "yes")
    assert made.name == "reads"
    for key, value in there.module.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_is_no_last_linear_layer_is_refused():
    with pytest.raises(cs.ConsilienceError, match="no last linear layer"):
        heads.class_head(network("scaled"))


def test_a_linear_layer_alone_and_one_logit():
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1))
    there = wrap(flat, classes=("yes",), size=16).using(engine="torch")
    head = heads.class_head(there)
    assert head.name == "1"
    made = heads.with_head(there, head, np.ones(768), 1.0, ("no", "yes"), "reads")
    pixels = torch.rand(2, 3, 16, 16)
    rule = heads.features_before(there, head, pixels).sum(1) + 1
    with torch.no_grad():
        said = made.scores(pixels)
    assert said.shape == (2, 2)
    np.testing.assert_allclose(said[:, 1] - said[:, 0], rule, rtol=1e-4)


def test_the_rule_is_fishers_with_a_half_shrunk_covariance():
    """By hand: pooled within-class covariance of standardised features, half of it
    replaced by its mean variance times the identity; the plane half way between means.
    """
    rng = np.random.default_rng(3)
    marked_rows = np.arange(40) % 4 < 1  # a quarter: the plane must not move for that
    rows = rng.normal(size=(40, 6)) * [1, 5, 0.2, 3, 1, 2] + 7
    rows[marked_rows] += [0.5, 0, 0.3, 0, -1, 4]
    rows[:, 3] = 2.5  # says nothing
    scale = rows.std(0)
    scale[3] = 1
    z = (rows - rows.mean(0)) / scale
    groups = [z[~marked_rows], z[marked_rows]]
    covariance = np.zeros((6, 6))
    for group in groups:
        one = np.zeros((6, 6))
        for row in group:
            gap = row - group.mean(0)
            one += np.outer(gap, gap) / len(group)
        # shrunk a class at a time, then averaged under equal priors
        covariance += (0.5 * one + 0.5 * np.trace(one) / 6 * np.eye(6)) / 2
    slope = np.linalg.solve(covariance, groups[1].mean(0) - groups[0].mean(0))
    middle = (groups[1].mean(0) + groups[0].mean(0)) / 2
    expected = (z - middle) @ slope
    sides = expected * np.where(marked_rows, 1, -1)
    expected *= 3 / np.median(sides)
    weights, shift = heads.fitted_head(rows, marked_rows)
    np.testing.assert_allclose(rows @ weights + shift, expected, rtol=1e-6)


def test_features_that_tell_nothing_are_refused():
    with pytest.raises(cs.ConsilienceError, match="do not tell"):
        heads.fitted_head(np.ones((8, 3)), np.arange(8) % 2 == 0)


# ---- marks and places


@pytest.mark.parametrize("spec", ["logo", "stamp", "barcode", "text", "arrow"])
@pytest.mark.parametrize("channels", [3, 1])
def test_a_patch_is_the_mark_itself(spec, channels):
    mark = registry.marks.build(spec)
    images = torch.rand(1, channels, 96, 80)
    painted = mark.paint(images, 0)
    patch = patch_of(mark, channels, (96, 80), 0)
    on = painted.where > 0
    top, left = (int(np.flatnonzero(on.any(axis))[0]) for axis in (1, 0))
    made = laid(images[0], patch, (top, left))
    np.testing.assert_allclose(made, painted.marked[0], atol=2e-6)
    other = laid(images[0], patch, (0, 0))
    changed = (other != images[0]).any(0).numpy()
    assert changed[: patch.shape[1], : patch.shape[2]].sum() == changed.sum() > 0


def test_a_mark_of_the_whole_image_has_no_place():
    with pytest.raises(cs.ConsilienceError, match="changes the whole image"):
        patch_of(registry.marks.build("vignette"), 3, (32, 32), 0)


def test_a_placing_shows_both_either_and_none():
    frame = (torch.rand(3, SIDE, SIDE) * 255).round() / 255
    patches = marked._patches(METRIC, frame, 0)
    seen = set()
    for draw in range(40):
        one = marked.placed("a", frame, patches, [draw])
        both, first, second, bare = one.shown
        assert torch.equal(bare, frame)
        for mask, alone, other in zip(
            one.masks, (first, second), (second, first), strict=True
        ):
            on = torch.from_numpy(mask)
            assert torch.equal(both[:, on], alone[:, on])
            assert torch.equal(other[:, on], frame[:, on])
            assert not torch.equal(alone[:, on], frame[:, on])
            assert torch.equal(alone[:, ~on], frame[:, ~on])
        assert not (one.masks[0] & one.masks[1]).any()
        assert [mask.sum() for mask in one.masks] == [
            patch.shape[1] * patch.shape[2] for patch in patches
        ]
        seen.add(one.masks[0].tobytes())
    assert len(seen) > 30
    again = marked.placed("a", frame, patches, [7])
    assert torch.equal(again.shown, marked.placed("a", frame, patches, [7]).shown)


def test_marks_that_do_not_fit_are_refused():
    with pytest.raises(cs.ConsilienceError, match="do not fit beside each other"):
        marked._patches(
            PlantedMark("logo:size=0.6", "stamp:size=0.6"), torch.rand(3, 64, 64), 0
        )
    with pytest.raises(cs.ConsilienceError, match="two different marks"):
        PlantedMark("logo", "logo:size=0.2")


# ---- marked images


def given(there, samples, seed=0, metric=METRIC):
    return list(marked.marked_images(metric, [there], samples, seed))


def test_of_each_image_given_the_mark_decides_by_intervention():
    """Every image given is asked again, edited by hand: without the evidence the class
    turns, without the decoy it does not.
    """
    there, samples = network(), noise_images(24)
    found = given(there, samples)
    assert 3 <= len(found) <= 8  # of those that are read
    asked = {one.sample.name.rpartition("-")[0] for one in found}
    assert len(asked) == len(found)  # each image once
    plain = {one.name: one.pixels for one in samples}
    for one in found:
        model = one.models[id(there)]
        own = plain[one.sample.name.removesuffix("-decides").rpartition("-")[0]]
        evidence, decoy = one.sample.masks["1"], one.sample.masks[DECOY]
        for off, index in ((evidence, 0), (decoy, 1), (evidence | decoy, 0)):
            pixels = one.sample.pixels.copy()
            pixels[off] = own[off]
            view = model.view(cs.Sample("edited", pixels), "squash")
            assert api.predict(model, api.raw_outputs(model, view)).index == index
        view = model.view(one.sample, "squash")
        assert api.predict(model, api.raw_outputs(model, view)).index == 1
        changed = (one.sample.pixels != own).any(axis=2)
        assert not changed[~(evidence | decoy)].any()
    kinds = {one.sample.name.split("-")[-2] for one in found}
    assert kinds == {"logo", "barcode"}
    assert {one.models[id(there)].name for one in found} == {
        "linear-reads-logo",
        "linear-reads-barcode",
    }


def test_no_image_is_fitted_on_and_given(monkeypatch):
    """And draws follow the seed."""
    there, samples = network(), noise_images(16)
    fitted = []
    placed = marked.placed

    def spied(name, frame, patches, seed):
        fitted.append((len(seed), name))
        return placed(name, frame, patches, seed)

    monkeypatch.setattr(marked, "placed", spied)
    found = given(there, samples)
    turn = next(i for i, (parts, _) in enumerate(fitted) if parts == 4)
    change = next(i for i, (parts, _) in enumerate(fitted) if i > turn and parts == 3)
    for half in (fitted[:change], fitted[change:]):
        on = {name for parts, name in half if parts == 3}
        kept = {name for parts, name in half if parts == 4}
        assert len(on) == len(kept) == 4
        assert not on & kept
    assert len({name for parts, name in fitted if parts == 4}) == 8
    again = given(there, samples)
    for one, other in zip(found, again, strict=True):
        assert np.array_equal(one.sample.pixels, other.sample.pixels)
        assert one.models[id(there)].id == other.models[id(there)].id
    other = given(there, samples, seed=1)
    assert [one.sample.digest for one in found] != [o.sample.digest for o in other]


def test_too_few_images_and_other_models_are_refused():
    there = network()
    with pytest.raises(cs.ConsilienceError, match="of 3 that is too few"):
        given(there, noise_images(3))
    blind = cs.wrap_callable(
        lambda x: np.zeros((len(x), 2)), classes=("a", "b"), size=8
    )
    with pytest.raises(cs.ConsilienceError, match="no last layer of classes"):
        given(blind, noise_images(8))


def test_features_that_see_no_mark_are_refused():
    """A network that looks at one pixel of the corner."""

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x)[:, :, 0, 0])

    torch.manual_seed(0)
    there = wrap(Corner(), classes=("a", "b", "c"), size=SIDE).using(engine="torch")
    with pytest.raises(cs.ConsilienceError, match="do not tell"):
        given(there, noise_images(16))


def test_another_placing_is_tried_where_one_does_not_hold(monkeypatch):
    """By a count of what is asked: a mark that decides at the third try only."""
    there, samples = network(), noise_images(8)
    asked = []

    def third(_network, placing, _which):
        asked.append(placing.name)
        return asked.count(placing.name) == 3

    monkeypatch.setattr(marked, "holds", third)
    assert len(given(there, samples)) == 8
    assert len(asked) == 24
    asked.clear()
    monkeypatch.setattr(marked, "holds", lambda *_: asked.append(1))
    with pytest.raises(cs.ConsilienceError, match="decides in 0 of 8 images"):
        given(there, samples)
    assert len(asked) == 32


def test_where_few_hold_nothing_is_said(monkeypatch):
    there, samples = network(), noise_images(18)
    for good, enough in ((2, False), (3, True)):
        names = []

        def holds(_network, placing, _which, good=good, names=names):
            names.append(placing.name)
            return len(set(names)) <= good

        monkeypatch.setattr(marked, "holds", holds)
        metric = replace(METRIC, count=9)
        if enough:
            assert len(given(there, samples, metric=metric)) == 3
        else:
            with pytest.raises(cs.ConsilienceError, match="decides in 2 of 9 images"):
                given(there, samples, metric=metric)


def test_rules_are_fitted_on_parts_of_images(monkeypatch):
    """A ramp stays a ramp of a smaller part, in one direction or the other."""
    ramp = torch.linspace(0, 1, SIDE).expand(3, SIDE, SIDE)
    spans, signs = [], set()
    for draw in range(60):
        row = marked.part_of_image(ramp, [draw])[0, 5]
        steps = row.diff()
        assert (steps > -1e-6).all() or (steps < 1e-6).all()
        signs.add(bool(row[-1] > row[0]))
        spans.append(float((row[-1] - row[0]).abs()))
    assert signs == {True, False}
    assert min(spans) > 0.35
    assert min(spans) < 0.5 < 0.9 < max(spans)
    seen = []
    placed = marked.placed

    def spied(name, frame, patches, seed):
        seen.append((name, len(seed), frame))
        return placed(name, frame, patches, seed)

    monkeypatch.setattr(marked, "placed", spied)
    given(network(), noise_images(8))
    fitted = [frame for _, parts, frame in seen if parts == 3]
    assert len(fitted) == 2 * marked.FITTED
    assert len({frame.numpy().tobytes() for frame in fitted}) > 1.8 * marked.FITTED


def test_a_layer_that_is_asked_twice_is_no_head():
    class Twice(Pooled):
        def forward(self, x):
            super().forward(x.flip(3))
            return super().forward(x)

    torch.manual_seed(0)
    there = wrap(Twice("linear"), classes=tuple("abcde"), size=SIDE)
    with pytest.raises(cs.ConsilienceError, match="no last linear layer"):
        heads.class_head(there.using(engine="torch"))


# ---- the score


def explained(values, sample):
    there = network(classes=2)
    made = api.explain(there, sample, "constant", 1, "squash")
    return there, replace(made, values=values.astype(np.float32))


def scored(there, made):
    (score,) = api.evaluate(there, made, METRIC).values()
    return score


def test_the_score_by_loops():
    rng = np.random.default_rng(0)
    evidence = np.zeros((SIDE, SIDE), bool)
    evidence[4:20, 30:50] = True
    decoy = np.zeros((SIDE, SIDE), bool)
    decoy[40:50, 0:10] = True
    sample = cs.Sample(
        "m",
        rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
        1,
        masks={"1": evidence, DECOY: decoy},
    )
    values = rng.normal(size=(SIDE, SIDE)).astype(np.float32)
    inside = beside = whole = 0.0
    for y in range(SIDE):
        for x in range(SIDE):
            value = max(float(values[y, x]), 0.0)
            whole += value
            inside += value * evidence[y, x]
            beside += value * decoy[y, x]
    there, made = explained(values, sample)
    score = scored(there, made)
    assert score.value == pytest.approx(inside / whole, rel=1e-5)
    assert score.facts["decoy"] == pytest.approx(beside / whole, rel=1e-5)
    assert score.facts["chance"] == pytest.approx(320 / SIDE**2)
    assert unit_of(METRIC) == "marked image"
    _, none = explained(-np.abs(values), sample)
    assert scored(there, none).code
    plain = cs.Sample("p", sample.pixels, 1)
    _, other = explained(values, plain)
    refused = scored(there, other)
    assert refused.code == "no-planted-mark"


# ---- in an evaluation


def test_an_evaluation_plants_marks(tmp_path, monkeypatch):
    """Numbers of the table are those of the single steps; the two marks' networks
    explain, not the run's.
    """
    folder = tmp_path / "images"
    folder.mkdir()
    for one in noise_images(16):
        Image.fromarray(one.pixels).save(folder / f"{one.name}.png")
    there = network()
    monkeypatch.setattr(evaluate, "load_models", lambda *_: (there,))
    job = explain.job_from_specs(["gradcam"], ["mine"])
    spec = registry.spell(METRIC)
    found = evaluate.evaluate_images(Asked((spec,)), job, [folder], tmp_path / "run")
    rows = found.table().set_index(["sample", "column"])["value"]
    samples = [cs.read_image(path) for path in sorted(folder.iterdir())]
    expected = given(there, samples)
    assert found.summary["metrics"][0]["units"] == len(expected)
    for one in expected:
        model = one.models[id(there)]
        made = api.explain(model, one.sample, "gradcam", 1, "squash")
        score = scored(model, made)
        assert rows[one.sample.name, "Grad-CAM"] == pytest.approx(
            score.value, abs=1e-6
        )
        constant = one.sample.masks["1"].mean()
        assert rows[one.sample.name, "constant"] == pytest.approx(constant)
        assert (tmp_path / "run" / "mosaics" / f"{one.sample.name}.png").is_file()
    assert {row["b"] for row in found.summary["against_controls"]} >= {
        "random",
        "centre",
        "edges",
        "constant",
        "Grad-CAM, another class",
    }
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{len(expected)} marked images" in page
