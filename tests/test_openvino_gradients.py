"""Backward passes written in ordinary operations: against autograd, operation by operation,
in torch and in OpenVINO; when they are taken, and when not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import small_cnn
from torch import nn
from torch.nn import functional

import consilience as cs
from consilience.models import backward
from consilience.models import network as network_module
from consilience.models.backward import GradientPlan
from consilience.models.engines import openvino_gradients as written
from consilience.models.engines import runner
from consilience.models.engines.plan import Ran, recorded_passes
from consilience.models.network import wrap
from consilience.targets.differences import DifferenceTarget
from consilience.types import (
    PIXELS,
    ClassTarget,
    Sample,
)

SIZE = (21, 18)


class Through(nn.Module):
    """One operation between two convolutions, then three classes; the kernel is no
    multiple of what is before it.
    """

    def __init__(self, between, channels=6, after=None):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.between = between
        self.head = nn.LazyLinear(3) if after is None else after

    def forward(self, x):
        x = self.between(self.first(x))
        return self.head(x.flatten(1))


class Called(nn.Module):
    """A function as a part."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(q, k, v).mean(1)


def residual(x):
    y = x * 2
    y += x.tanh()
    return functional.relu_(y)


def tied(x):
    """Many equal maxima, at 0, within windows that overlap."""
    return functional.max_pool2d(
        torch.relu(x - x.mean((1, 2, 3), keepdim=True)), 3, 2, 1
    )


def convolution(*given, **more):
    torch.manual_seed(2)
    return nn.Conv2d(*given, **more)


OPERATIONS = {
    "3x3": lambda: convolution(6, 6, 3, padding=1),
    "5x3": lambda: convolution(6, 4, (5, 3), padding=(2, 0)),
    "more padding than kernel": lambda: convolution(6, 4, 1, padding=1),
    "groups": lambda: convolution(6, 8, 3, groups=2, padding=1),
    "depthwise": lambda: convolution(6, 12, 3, groups=6, padding=1),
    "dilated": lambda: convolution(6, 5, 3, dilation=2, padding=2),
    "stride 2": lambda: convolution(6, 6, 3, stride=2, padding=1),
    "stride 2, 1x1": lambda: convolution(6, 6, 1, stride=2),
    "stride 2, 7x7": lambda: convolution(6, 5, 7, stride=2, padding=3),
    "stride 2, 2x4": lambda: convolution(6, 5, (2, 4), stride=2),
    "stride 3": lambda: convolution(6, 6, 5, stride=3, padding=1),
    "stride 3, 2x2": lambda: convolution(6, 6, 2, stride=3),
    "strides 2, 1": lambda: convolution(6, 6, 3, stride=(2, 1), padding=1),
    "stride 2, groups": lambda: convolution(6, 6, 3, stride=2, padding=1, groups=3),
    "stride 2, depthwise": lambda: convolution(
        6, 6, 5, stride=2, padding=2, groups=6
    ),
    "stride 2, dilated": lambda: convolution(
        6, 6, 3, stride=2, padding=2, dilation=2
    ),
    "maximum": lambda: nn.MaxPool2d(3, 2, 1),
    "maximum, ceiling": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "maximum, side by side": lambda: nn.MaxPool2d(2),
    "maximum, gaps": lambda: nn.MaxPool2d(2, 3),
    "maximum, ties": lambda: Called(tied),
    "mean": lambda: nn.AvgPool2d(2),
    "mean, overlapping": lambda: nn.AvgPool2d(3, 2, 1),
    "adaptive mean": lambda: nn.AdaptiveAvgPool2d((7, 6)),
    "global mean": lambda: nn.AdaptiveAvgPool2d(1),
    "relu6": lambda: nn.ReLU6(),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "relu6 at its kinks": lambda: nn.Sequential(
        Called(lambda x: 20 * x), nn.ReLU6(inplace=True)
    ),
    "clamp": lambda: Called(lambda x: (10 * x).clamp(-1, 2)),
    "residual in place": lambda: Called(residual),
    "hard swish": lambda: nn.Hardswish(),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "softmax": lambda: Called(lambda x: x.softmax(1)),
    "layer norm": lambda: nn.LayerNorm([6, *SIZE]),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "attention": lambda: Attending(),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()),
    "mean and norm": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 7, padding=3, groups=6),
        nn.AdaptiveAvgPool2d(1),
        Called(lambda x: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(6),
        Called(lambda x: x.permute(0, 3, 1, 2)),
    ),
    "concatenated": lambda: Called(lambda x: torch.cat([x, x[:, 1:3]], 1)),
}


NOT_COMPILED = {
    "more padding than kernel",
    "softmax",  # OpenVINO 2026.4 ends with an error over sums of channels: torch's then
}


COMPILED = {
    *("stride 2", "stride 2, depthwise", "dilated"),
    *("maximum, ties", "relu6 in place", "attention"),
}
"""Which are compiled in every run of the tests; the others in the slow one."""


def network_of(operation):
    module = Through(operation)
    module(torch.zeros(1, 3, *SIZE))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    network = wrap(module.eval(), size=SIZE, mean=(0.5,) * 3, std=(0.2,) * 3)
    return network._planned(GradientPlan(False, 2))


def images(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *SIZE, generator=generator)


def by_autograd(network, pixels, weights, read="logit"):
    """The module itself, normalised by hand."""
    leaf = pixels.clone().requires_grad_()
    outputs = network.module((leaf - 0.5) / 0.2)
    scores = outputs.softmax(1) if read == "probability" else outputs
    (gradients,) = torch.autograd.grad((scores * weights).sum(), [leaf])
    return outputs.detach(), gradients


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_written_backward_pass_is_autograds(name):
    network = network_of(OPERATIONS[name]())
    pixels, weights = images(), torch.tensor([[1.0, -2, 0.5], [0, 3, 1]])
    if name == "more padding than kernel":
        with pytest.raises(written.UnwrittenError, match="border"):
            written.traced(network, "logit", pixels)
        return
    graph, _ = written.traced(network, "logit", pixels)
    # another image than the one that was traced
    pixels = images(seed=5)
    with torch.no_grad():
        outputs, gradients = graph(pixels, weights)
    expected = by_autograd(network, pixels, weights)
    torch.testing.assert_close(outputs, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients, expected[1], atol=1e-5, rtol=1e-3)
    assert float(expected[1].abs().max()) > 1e-4
    called = (node for node in graph.graph.nodes if node.op == "call_function")
    names = {str(node.target) for node in called}
    assert not [
        one for one in names if "backward" in one or one.endswith("_.default")
    ]


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow)
        for name in OPERATIONS
        if name not in NOT_COMPILED
    ],
)
def test_openvino_gives_what_the_graph_gives(name, monkeypatch, tmp_path):
    pytest.importorskip("openvino")
    # functions are no part of a digest, and some networks here differ in nothing else
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    network = network_of(OPERATIONS[name]())
    made = written.OpenVINOGradients(network, "probability", 2)
    for count in (2, 1):  # a short batch is filled up
        pixels = images(count, seed=3)
        weights = torch.tensor([[1.0, -2, 0.5], [0, 3, 1]])[:count]
        outputs, gradients = made(pixels, weights)
        expected = by_autograd(network, pixels, weights, "probability")
        assert outputs.shape == (count, 3)
        torch.testing.assert_close(outputs, expected[0], atol=1e-4, rtol=1e-3)
        apart = float((gradients - expected[1]).norm() / expected[1].norm())
        assert apart < 1e-3


@pytest.mark.parametrize(
    ("groups", "out", "into", "size"),
    [(1, 4, 3, (3, 2)), (2, 4, 6, (1, 3)), (3, 6, 3, (2, 2))],
)
def test_a_kernel_turned_round_in_slow_loops(groups, out, into, size):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(out, into // groups, *size))
    found = written.turned_round(torch.tensor(weight), groups).numpy()
    assert found.shape == (into, out // groups, *size)
    for o in range(out):
        group = o // (out // groups)
        for i in range(into // groups):
            for row in range(size[0]):
                for column in range(size[1]):
                    there = found[
                        group * (into // groups) + i,
                        o % (out // groups),
                        size[0] - 1 - row,
                        size[1] - 1 - column,
                    ]
                    assert there == weight[o, i, row, column]


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, x):
        return self.up(x).mean((2, 3))


class Written(nn.Module):
    """Writes over a part of what is used again."""

    def forward(self, x):
        y = x * 2
        y[:, 0] += 1
        return y.mean((2, 3)) + x.mean((2, 3))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Transposed(), "transposed"),
        (Written(), "writes over"),
        (Through(nn.AvgPool2d(2, ceil_mode=True), after=nn.LazyLinear(3)), "ceiling"),
        (Through(nn.AdaptiveAvgPool2d(5), after=nn.LazyLinear(3)), "several sizes"),
        (Through(nn.MaxPool2d(3, (2, 1)), after=nn.LazyLinear(3)), "two strides"),
        (Through(nn.MaxPool2d(3, 2, dilation=2), after=nn.LazyLinear(3)), "dilation"),
    ],
)
def test_what_cannot_be_written_is_refused(module, why):
    module.eval()(torch.zeros(1, 3, *SIZE))
    network = wrap(module, size=SIZE)._planned(GradientPlan(False, 2))
    with pytest.raises(written.UnwrittenError, match=why):
        written.traced(network, "logit", images())


def test_the_module_comes_back_as_it_was():
    network = network_of(nn.ReLU6(inplace=True))
    before = {
        key: value.clone() for key, value in network.module.state_dict().items()
    }
    written.traced(network, "logit", images())
    assert network.module.between.inplace is True
    assert all(one.requires_grad for one in network.module.parameters())
    for key, value in network.module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


# ---- when it is taken


def planned(network, batch=4):
    return network._planned(GradientPlan(True, batch, engine="openvino"))


@pytest.fixture
def seen(monkeypatch):
    """How many images OpenVINO's gradients were asked for."""
    found = []
    call = written.OpenVINOGradients.__call__

    def counting(self, pixels, weights):
        found.append(len(pixels))
        return call(self, pixels, weights)

    monkeypatch.setattr(written.OpenVINOGradients, "__call__", counting)
    return found


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        (ClassTarget(1, "b", "logit"), True),
        (ClassTarget(1, "b", "probability"), True),
        (ClassTarget(1, "b", "value", "values"), True),
        (ClassTarget(1, "b", "probability", "sigmoid"), False),
        (
            DifferenceTarget("1", "2"),
            False,
        ),
    ],
)
def test_a_trace_is_torchs_whoever_made_it(target, taken, seen):
    network = wrap(small_cnn(), size=SIZE)
    pixels = images(4)
    expected = network.trace(pixels, [PIXELS], target)
    found = planned(network).trace(pixels, [PIXELS], target)
    assert bool(seen) is taken
    torch.testing.assert_close(found.outputs, expected.outputs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.activations[PIXELS], pixels)
    torch.testing.assert_close(
        found.gradients[PIXELS], expected.gradients[PIXELS], atol=1e-6, rtol=1e-3
    )


def test_few_images_other_layers_and_other_sizes_are_torchs(seen):
    network = planned(wrap(small_cnn(), size=SIZE))
    goal = ClassTarget(0, "a", "logit")
    network.trace(images(1), [PIXELS], goal)
    network.trace(images(4), ["2"], goal)
    network.trace(images(4), [PIXELS, "2"], goal)
    network.trace(torch.rand(4, 3, 30, 30), [PIXELS], goal)
    network.trace(images(5), [PIXELS], goal)
    assert seen == []
    network.trace(images(2), [PIXELS], goal)
    assert seen[-1] == 2


def test_new_weights_are_followed():
    network = planned(wrap(small_cnn(), size=SIZE))
    goal = ClassTarget(0, "a", "logit")
    network.trace(images(4), [PIXELS], goal)
    with torch.no_grad():
        network.module[0].weight.mul_(-1)
    found = network.trace(images(4), [PIXELS], goal).gradients[PIXELS]
    plain = wrap(network.module, size=SIZE).trace(images(4), [PIXELS], goal)
    torch.testing.assert_close(found, plain.gradients[PIXELS], atol=1e-6, rtol=1e-3)


def test_what_ran_is_what_is_recorded():
    network = planned(wrap(small_cnn(), size=SIZE))
    goal = ClassTarget(0, "a", "logit")
    for count, ran in (
        (4, Ran("openvino", "f32", "openvino, f32, 4 a pass")),
        (1, Ran("torch", "f32", "channels-last, f32, 4 a pass")),
    ):
        network.trace(images(4), [PIXELS], goal)  # made and compared
        with recorded_passes() as found:
            network.trace(images(count), [PIXELS], goal)
        assert found == {ran}


def test_what_differs_from_torch_is_not_taken(monkeypatch, seen):
    """Also not where only the gradients do."""
    said = []
    monkeypatch.setattr(runner, "say", said.append)
    right = written.by_torch

    def others(*given):
        outputs, gradients = right(*given)
        return outputs, gradients * 1.05

    monkeypatch.setattr(runner, "by_torch", others)
    network = wrap(small_cnn(), size=SIZE)
    goal = ClassTarget(0, "a", "logit")
    found = planned(network).trace(images(4), [PIXELS], goal)
    expected = network.trace(images(4), [PIXELS], goal)
    torch.testing.assert_close(found.gradients[PIXELS], expected.gradients[PIXELS])
    assert len(said) == 1
    assert "away from torch's" in said[0]
    assert "stay with torch" in said[0]


GOAL = ClassTarget(0, "a", "logit")


def test_torch_takes_over_in_parts_that_it_has_room_for(monkeypatch):
    """Where the engine fails in this process: no more images at once than torch's own."""
    monkeypatch.setattr(runner, "_make_gradients", lambda *_: None)
    network = wrap(small_cnn(), size=SIZE)
    plan = GradientPlan(True, 10, engine="openvino", torch_batch=4)
    seen = []
    network.module.register_forward_pre_hook(
        lambda _, given: seen.append(len(given[0]))
    )
    chosen = network._planned(plan)
    seen.clear()
    found = chosen.trace(images(10), [PIXELS], GOAL)
    assert max(seen) == 4
    expected = wrap(small_cnn(), size=SIZE).trace(images(10), [PIXELS], GOAL)
    torch.testing.assert_close(found.outputs, expected.outputs)
    torch.testing.assert_close(
        found.gradients[PIXELS], expected.gradients[PIXELS], rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(found.activations[PIXELS], images(10))


def rates(by_engine):
    def rate(network, one, run):
        run(one, torch.rand(one.batch, 3, *SIZE))  # as it would be timed
        return by_engine[one.engine]

    return rate


@pytest.mark.parametrize(
    ("by_engine", "engine"),
    [
        ({"torch": 10, "openvino": 12}, "openvino"),
        ({"torch": 10, "openvino": 11}, "torch"),
        ({"torch": 500, "openvino": 5000}, "torch"),
    ],
)
def test_the_faster_engine_is_found_once(by_engine, engine, monkeypatch, tmp_path):
    monkeypatch.setattr(backward, "_rate", rates(by_engine))
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    network = wrap(small_cnn(), size=SIZE)
    chosen = network.for_gradients(50, [PIXELS], GOAL)
    assert chosen.gradient_plan.engine == engine
    tried = [one for one in chosen.gradient_plan.rates if one.startswith("openvino")]
    assert bool(tried) is (by_engine["torch"] < backward.FAST)
    assert chosen.gradient_plan.channels_last is True  # of what torch runs
    left = DifferenceTarget("1", "2")
    for other in (
        network.for_gradients(50),
        network.for_gradients(50, [PIXELS], left),
        network.for_gradients(50, ["0"], GOAL),
    ):
        assert other.gradient_plan == chosen.gradient_plan.by_torch
        assert other.gradient_plan.engine == "torch"
        assert other.gradient_batch == 2  # a larger one was no faster
    again = wrap(small_cnn(), size=SIZE).for_gradients(50, [PIXELS], GOAL)
    assert again.gradient_plan == chosen.gradient_plan
    plain = wrap(small_cnn(), size=SIZE, engine="torch").for_gradients(
        50, [PIXELS], GOAL
    )
    assert plain.gradient_plan.engine == "torch"


def test_what_torch_keeps_bounds_every_engine(monkeypatch, tmp_path):
    """Twice as many images by an engine that keeps half of each; torch's own where it
    falls back; more than that on disk is no plan.
    """
    told = {"torch": 10, "openvino": 20}
    monkeypatch.setattr(backward, "_rate", lambda _, one, run: told[one.engine])
    for most, size in ((1, 2), (3, 6), (5, 10), (40, 10)):
        monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / str(most)))
        network = wrap(small_cnn(), size=SIZE)
        found = backward.plan_gradients(
            network,
            most,
            GradientPlan(True, 1),
            [GradientPlan(True, 1, engine="openvino")],
            network._timed,
        )
        assert (found.engine, found.batch) == ("openvino", size)
        assert found.by_torch.batch == min(2, most)
        kept = backward.asdict(found)
        allowed = [GradientPlan(True, 1, engine="openvino")]
        assert backward._plan(kept, most, allowed) == found
        for key, value in (("batch", size + 1), ("torch_batch", most + 1)):
            with pytest.raises(ValueError, match=key):
                backward._plan({**kept, key: value}, most, allowed)


def test_networks_with_many_weights_stay_with_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(backward, "_rate", rates({"torch": 10, "openvino": 20}))
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    network = wrap(small_cnn(), size=SIZE)
    count = sum(one.numel() for one in network.module.parameters())
    monkeypatch.setattr(network_module, "WRITTEN_WEIGHTS", count - 1)
    assert network.for_gradients(50, [PIXELS], GOAL).gradient_plan.engine == "torch"
    monkeypatch.setattr(network_module, "WRITTEN_WEIGHTS", count)
    assert (
        network.for_gradients(50, [PIXELS], GOAL).gradient_plan.engine == "openvino"
    )


def test_integrated_gradients_by_openvino_are_torchs_and_say_so(
    monkeypatch, tmp_path, seen
):
    monkeypatch.setattr(backward, "_rate", rates({"torch": 10, "openvino": 20}))
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    sample = Sample("noise", pixels)
    maps = [
        cs.explain(
            wrap(small_cnn(), size=SIZE, engine=engine),
            sample,
            "integrated-gradients:steps=30",
        )
        for engine in ("torch", "auto")
    ]
    assert sum(seen) > 30
    np.testing.assert_allclose(maps[1].values, maps[0].values, rtol=1e-3, atol=1e-6)
    assert "openvino, f32" in str(maps[1].provenance)
    assert "openvino, f32" not in str(maps[0].provenance)
