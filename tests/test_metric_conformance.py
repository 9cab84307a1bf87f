"""What every registered metric keeps to, just by existing."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PATCH, planted_image

from consilience import api, registry
from consilience.types import Box, NotApplicable, Score

NAMES = [name for name in registry.metrics.names() if not name.startswith("test-")]
"""Without what other test files register for their own use."""
SMALL = {
    "average-sensitivity": "average-sensitivity:samples=4",
    "infidelity": "infidelity:squares=40",
    "local-lipschitz": "local-lipschitz:samples=4",
    "max-sensitivity": "max-sensitivity:samples=4",
    "sensitivity-n": "sensitivity-n:sizes=3,subsets=20",
}
"""Spellings that make a slow metric quick."""
MAPS = ("gradcam", "random", "occlusion:window=16,stride=8")
"""A method that finds the patch, one that draws at random, and one that needs nothing
but scores.
"""


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def annotated():
    """The planted image with its label, box and mask."""
    mask = np.zeros((64, 64), dtype=bool)
    mask[PATCH] = True
    box = Box(1, PATCH[1].start, PATCH[0].start, PATCH[1].stop, PATCH[0].stop)
    return replace(planted_image(), label=1, boxes=(box,), masks={"red": mask})


@pytest.fixture(scope="module")
def explained(red_model, annotated):
    return [api.explain(red_model, annotated, by, target="red") for by in MAPS]


def build(name):
    return registry.metrics.build(SMALL.get(name, name))


def scored(metric, model, explanation):
    """The score, or the reason why there is none."""
    missing = metric.needs - model.can
    if missing:
        return NotApplicable(f"needs {missing}")
    try:
        return metric.score(model, model.view(explanation.sample), explanation)
    except NotApplicable as reason:
        return reason


def applicable(name, model, explained):
    """Scores of the maps that the metric can say something of; where there are none,
    the test is skipped for its reason.
    """
    found = [(one, scored(build(name), model, one)) for one in explained]
    scores = [(one, score) for one, score in found if isinstance(score, Score)]
    if not scores:
        pytest.skip(f"{name}: {found[0][1]}")
    return scores


def test_spelling_round_trips(name):
    metric = build(name)
    assert registry.metrics.build(registry.spell(metric)) == metric
    assert registry.metrics.build(registry.spell(metric, full=True)) == metric
    assert registry.spell(registry.metrics.build(name)) == name


def test_says_what_it_is(name):
    metric = registry.metrics.get(name)
    text = (metric.__doc__ or "").strip()
    assert len(text.partition("\n")[0]) > 20
    assert "``" in text, "a definition, as a formula"
    assert isinstance(metric.higher_is_better, bool)
    assert isinstance(metric.needs, frozenset)
    assert metric.bounds[0] < metric.bounds[1]
    assert metric.cost
    assert isinstance(getattr(metric, "binary", False), bool)


def test_value_is_finite_and_within_bounds(name, red_model, explained):
    for explanation, found in applicable(name, red_model, explained):
        low, high = build(name).bounds
        assert math.isfinite(found.value), explanation.explainer
        assert low - 1e-9 <= found.value <= high + 1e-9
        if getattr(build(name), "binary", False):
            assert found.value in (0, 1)


def test_flat_maps_get_a_number_or_a_reason(name, red_model, annotated):
    for by in ("constant", "centre"):
        flat = api.explain(red_model, annotated, by, target="red")
        for values in (flat.values, np.zeros_like(flat.values), -flat.values):
            found = scored(build(name), red_model, replace(flat, values=values))
            assert (
                str(found)
                if isinstance(found, NotApplicable)
                else math.isfinite(found.value)
            )


def test_same_spelling_same_number(name, red_model, explained):
    for explanation, first in applicable(name, red_model, explained):
        again = scored(build(name), red_model, explanation)
        assert again.value == first.value
        if first.curve is not None:
            np.testing.assert_array_equal(again.curve, first.curve)


# a histogram has steps: where rounding moves one value over the edge of a bin, the
# entropy of some hundred values moves by about log(n) / n
BATCH_TOLERANCE = {"emprt": 0.02}


def test_the_size_of_batches_does_not_matter(name, red_model, explained):
    frugal = red_model.using(memory=1 << 20)
    assert frugal.batch < red_model.batch
    for explanation, found in applicable(name, red_model, explained):
        assert scored(build(name), frugal, explanation).value == pytest.approx(
            found.value, rel=BATCH_TOLERANCE.get(name, 1e-3), abs=1e-5
        )


def test_many_are_many_of_one(name, red_model, explained):
    metric = build(name)
    if not hasattr(metric, "score_batch"):
        pytest.skip(f"{name} takes one image at a time")
    views = [red_model.view(one.sample) for one in explained]
    for explanation, found in zip(
        explained, metric.score_batch(red_model, views, explained), strict=True
    ):
        alone = scored(metric, red_model, explanation)
        assert type(found) is type(alone)
        if isinstance(found, Score):
            assert found.value == pytest.approx(alone.value, rel=1e-4, abs=1e-5)


def test_model_and_explanation_come_back_as_they_were(name, red_model, explained):
    module = red_model.module
    module.train()
    module.last.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    before, maps = state_of(module), [one.values.copy() for one in explained]
    try:
        for one in explained:
            scored(build(name), red_model, one)
        assert state_of(module) == before
        for one, values in zip(explained, maps, strict=True):
            np.testing.assert_array_equal(one.values, values)
    finally:
        module.eval()


def state_of(module):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in module.modules()
    ]
    modes = [m.training for m in module.modules()]
    parameters = [
        (p.requires_grad, p.grad is None, p.detach().numpy().tobytes())
        for p in module.parameters()
    ]
    return copy.deepcopy((hooks, modes, parameters))


def test_torchs_own_random_numbers_are_left_alone(name, red_model, explained):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that users may rely on
    scored(build(name), red_model, explained[0])
    drawn = torch.rand(1), np.random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert drawn == (torch.rand(1), np.random.random())  # noqa: NPY002
