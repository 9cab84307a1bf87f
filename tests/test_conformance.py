"""What every registered explainer keeps to, just by existing."""

import copy

import numpy as np
import pytest
import torch
from conftest import PATCH, planted_image

from consilience import api, registry
from consilience.types import NotApplicable

NAMES = registry.explainers.names()
SMALL = {
    "ablation": "ablation:segments=grid(8),fill=grey",
    "banzhaf": "banzhaf:samples=200,segments=grid(8),fill=grey",
    "guided-ig": "guided-ig:steps=30",
    "hsic": "hsic:masks=200",
    "kernelshap": "kernelshap:samples=200,segments=grid(8),fill=grey",
    "lime": "lime:samples=200,segments=grid(8),fill=grey",
    "occlusion": "occlusion:window=8,stride=4",
    "rise": "rise:masks=3000",
    "shapley": "shapley:permutations=2,segments=grid(8),fill=grey",
    "sobol": "sobol:grid=8,design=4",
    "xrai": "xrai:steps=10,segments=grid(8)+grid(4),grow=0",
}
"""Spellings that make a slow explainer quick on a 64 x 64 image."""
ELSEWHERE = {
    "deconvnet": "it sees the image through the switches of max pooling alone, and the red finder has none",
    "vargrad": "it marks where the gradient changes; in the patch the red unit is always on, and the gradient constant",
}
"""Methods that by their definition point elsewhere than at the evidence, and why."""


def spec(name):
    return SMALL.get(name, name)


def is_control(name):
    return bool(getattr(registry.explainers.get(name), "control", False))


def of_attention(name):
    return bool(getattr(registry.explainers.get(name), "attention", False))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name, request):
    """The network with planted evidence that the method is for: a transformer for those
    that read attention, else a CNN.
    """
    return request.getfixturevalue(
        "red_transformer" if of_attention(name) else "red_model"
    )


def test_attention_is_not_made_up(name, red_model, planted):
    if not of_attention(name):
        pytest.skip(f"{name} needs no attention")
    with pytest.raises(NotApplicable, match="no attention"):
        api.explain(red_model, planted, spec(name), target="red")


def test_spelling_round_trips(name):
    explainer = registry.explainers.build(spec(name))
    assert registry.explainers.build(registry.spell(explainer)) == explainer
    assert (
        registry.explainers.build(registry.spell(explainer, full=True)) == explainer
    )
    assert registry.spell(registry.explainers.build(name)) == name


def test_docstring_names_the_method(name):
    first = (registry.explainers.get(name).__doc__ or "").strip().partition("\n")[0]
    assert len(first) > 20


def test_map_fills_the_frame_and_is_finite(name, model, planted):
    explanation = api.explain(model, planted, spec(name), target="red")
    assert explanation.values.shape == (64, 64)
    assert explanation.values.dtype == np.float32
    assert np.isfinite(explanation.values).all()


def test_flat_image_gives_finite_maps(name, model, planted):
    flat = type(planted)("flat", np.full((64, 64, 3), 128, dtype=np.uint8))
    if name == "minimal":
        with pytest.raises(NotApplicable, match="does not say red of the image"):
            api.explain(model, flat, spec(name), target="red")
        return
    assert np.isfinite(
        api.explain(model, flat, spec(name), target="red").values
    ).all()


def test_same_seed_same_bytes(name, model, planted):
    first, second = (
        api.explain(model, planted, spec(name), target="red") for _ in range(2)
    )
    assert first.values.tobytes() == second.values.tobytes()
    assert first.provenance["key"] == second.provenance["key"]


def test_a_batch_is_many_batches_of_one(name, model):
    explainer = api.resolve_explainer(model, spec(name))
    if not hasattr(explainer, "explain_batch"):
        pytest.skip(f"{name} takes one image at a time")
    samples = [planted_image(seed) for seed in range(3)]
    views = [model.view(sample) for sample in samples]
    targets = [
        api.target_of_image(model, sample, "red", torch.zeros(1, 2))
        for sample in samples
    ]
    together = explainer.explain_batch(model, views, targets)
    for heat, view, target in zip(together, views, targets, strict=True):
        alone = explainer.explain(model, view, target)
        torch.testing.assert_close(heat.values, alone.values, rtol=1e-4, atol=1e-6)


def test_model_comes_back_as_it_was(name, model, planted):
    module = model.module
    module.train()
    module.last.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    before = state_of(module)
    try:
        api.explain(model, planted, spec(name), target="red")
        assert state_of(module) == before
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


def test_finds_planted_evidence(name, model, planted):
    if is_control(name):
        pytest.skip(f"{name} is a control: it knows nothing of the model")
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    values = api.explain(model, planted, spec(name), target="red").values
    inside = np.zeros(values.shape, dtype=bool)
    inside[PATCH] = True
    assert values[inside].mean() > values[~inside].mean() + 2 * values[~inside].std()


def test_flipped_image_flips_the_map(name, model, planted):
    if name == "minimal":
        pytest.skip("of regions alike in size and margin the first is taken")
    if is_control(name) or "seed=" in registry.spell(
        registry.explainers.build(name), full=True
    ):
        pytest.skip(f"{name} is drawn at random or knows nothing of the model")
    flipped = type(planted)("flipped", np.ascontiguousarray(planted.pixels[:, ::-1]))
    straight, mirrored = (
        api.explain(model, one, spec(name), target="red").values
        for one in (planted, flipped)
    )
    np.testing.assert_allclose(
        mirrored[:, ::-1],
        straight,
        rtol=1e-4,
        atol=1e-6 + 1e-4 * np.abs(straight).max(),
    )


def test_refused_for_a_model_that_cannot(name, planted):
    needs = registry.explainers.get(name).needs
    if not needs:
        pytest.skip(f"{name} needs nothing of the model but scores")

    class ScoresOnly:
        id, can = "black-box", frozenset()

    with pytest.raises(ValueError, match="needs"):
        api.explain(ScoresOnly(), planted, name)


def test_a_file_dropped_into_the_folder_is_found(tmp_path, monkeypatch):
    import sys

    import consilience.explainers as folder

    text = """
from dataclasses import dataclass
from typing import ClassVar

from consilience.registry import explainers
from consilience.types import Heat


@explainers.register("dropped-in")
@dataclass(frozen=True)
class DroppedIn:
    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        return Heat(view.pixels[0].mean(dim=0))
"""
    (tmp_path / "dropped_in.py").write_text(text)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    monkeypatch.setattr(registry.explainers, "_loaded", False)
    try:
        assert "dropped-in" in registry.explainers.names()
        assert registry.spell(registry.explainers.build("dropped-in")) == "dropped-in"
    finally:
        registry.explainers._entries.pop("dropped-in", None)
        sys.modules.pop("consilience.explainers.dropped_in", None)
