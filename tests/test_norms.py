"""Batch norms folded into convolutions on the way to a gradient, and how passes are found
to be fastest: against torch's own gradients in double precision, and by hand.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from consilience import explain, wrap
from consilience.models import backward, norms, trials
from consilience.models.backward import GradientPlan
from consilience.models.engines import plan
from consilience.targets.classes import ClassTarget
from consilience.types import PIXELS, Sample

SIDE = 16


class Net(nn.Module):
    """Convolutions with a norm behind, and everything that looks like it and is not."""

    def __init__(self):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.b_norm = nn.BatchNorm2d(4, affine=False)
        self.seen, self.seen_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.alone = nn.Conv2d(4, 4, 1)
        self.own, self.own_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.own_norm.track_running_stats = False
        self.own_norm.running_mean = self.own_norm.running_var = None
        self.head = nn.Linear(4, 3)
        self.peek = False

    def forward(self, x):
        x = self.a_norm(self.a(x)).relu()
        inner = self.b(x)
        if self.peek:
            x = x + inner
        x = self.b_norm(inner) + x
        x = self.own_norm(self.own(x)).relu() + x
        inner = self.seen(x)
        x = self.seen_norm(inner).relu() + inner
        x = self.one(self.shared(x)) + self.two(self.shared(x))
        x = self.twice_norm(self.twice(x)).relu()
        x = self.twice_norm(self.twice(x)).relu()
        return self.head(self.alone(x).relu().mean(dim=(2, 3)))


def made(dtype=torch.float32):
    torch.manual_seed(3)
    net = Net()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 3)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return net.eval().to(dtype)


def model_of(net):
    return wrap(net, size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))


PIXEL_ROWS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
TARGET = ClassTarget(1, "one")


def torchs(net, layers=()):
    """Outputs, and gradients of pixels and layers, by torch in double precision."""
    double = made(torch.float64)
    double.load_state_dict(net.state_dict())
    double.peek = net.peek
    kept = {}
    for name in layers:
        double.get_submodule(name).register_forward_hook(
            lambda _part, _given, said, name=name: kept.update({name: said})
        )
    leaf = PIXEL_ROWS.double().requires_grad_()
    outputs = double(leaf)
    wanted = [leaf, *(kept[name] for name in layers)]
    found = torch.autograd.grad(outputs[:, 1].sum(), wanted)
    return outputs.detach(), dict(zip((PIXELS, *layers), found, strict=True)), kept


def assert_torchs(model, layers=()):
    outputs, gradients, kept = torchs(model.module, layers)
    found = model.trace(PIXEL_ROWS, [PIXELS, *layers], TARGET)
    torch.testing.assert_close(found.outputs.double(), outputs, rtol=1e-4, atol=1e-5)
    for name, expected in gradients.items():
        torch.testing.assert_close(
            found.gradients[name].double(), expected, rtol=1e-4, atol=1e-5
        )
    for name in layers:
        torch.testing.assert_close(
            found.activations[name].double(),
            kept[name].detach(),
            rtol=1e-4,
            atol=1e-5,
        )


def folded_by(model):
    return {
        one.name
        for made in norms._folds[model.module].values()
        for one in made.convolutions.values()
    }


def test_pairs_are_those_whose_output_goes_nowhere_else():
    model = model_of(made())
    assert model.anatomy.norms == (
        ("a", "a_norm"),
        ("b", "b_norm"),
        ("twice", "twice_norm"),
    )


def test_gradients_are_torchs():
    model = model_of(made())
    assert_torchs(model)
    assert folded_by(model) == {"a", "b", "twice"}


def test_a_folded_pass_runs_no_norm(monkeypatch):
    calls = []
    plain = norms._scale_and_shift
    monkeypatch.setattr(
        norms, "_scale_and_shift", lambda call: calls.append(call) or plain(call)
    )
    model = model_of(made())
    model.trace(PIXEL_ROWS, [PIXELS], TARGET)
    calls.clear()  # folding has taken each pair's
    model.trace(PIXEL_ROWS, [PIXELS], TARGET)
    # seen_norm, one, two and own_norm; a_norm, b_norm and both of twice_norm are folded
    assert len(calls) == 4


@pytest.mark.parametrize("layer", ["a", "b", "a_norm", "seen", "seen_norm"])
def test_a_layer_says_what_it_says_itself(layer):
    model = model_of(made())
    assert_torchs(model, [layer])
    assert_torchs(model)


@pytest.mark.parametrize("how", ["hook", "norm's hook", "norm's pre-hook"])
def test_somebodys_hooks_see_the_convolution_itself(how):
    net, seen = made(), []
    if how == "hook":
        net.a.register_forward_hook(
            lambda _part, _given, said: seen.append(said.clone())
        )
    elif how == "norm's hook":
        net.a_norm.register_forward_hook(
            lambda _part, given, _said: seen.append(given[0].clone())
        )
    else:
        net.a_norm.register_forward_pre_hook(
            lambda _part, given: seen.append(given[0].clone())
        )
    model = model_of(net)
    assert model._gradients_arrive
    seen.clear()
    model.trace(PIXEL_ROWS, [PIXELS], TARGET)
    with torch.no_grad():
        expected = nn.functional.conv2d(
            PIXEL_ROWS, net.a.weight, net.a.bias, padding=1
        )
    torch.testing.assert_close(seen[0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_change_are_folded_anew():
    model = model_of(made())
    assert_torchs(model)
    with torch.no_grad():
        model.module.a.weight.mul_(-1.5)
    assert_torchs(model)
    model.module.b_norm.running_var.data.mul_(3)
    assert_torchs(model)
    model.module.a.weight = nn.Parameter(model.module.a.weight.detach() + 0.5)
    assert_torchs(model)


def test_a_norm_that_is_called_otherwise_is_not_the_one_that_was_folded():
    """Another tensor in its place, of which the watch of the old ones sees nothing."""
    model = model_of(made())
    assert_torchs(model)
    norm = model.module.a_norm
    norm.register_buffer("running_mean", norm.running_mean.clone() + 2)
    assert_torchs(model)


def test_a_pass_that_looks_between_runs_without_that_pair():
    model = model_of(made())
    assert_torchs(model)
    model.module.peek = True
    assert_torchs(model)
    assert norms._unfolded[model.module] == {"b"}


def test_a_norm_whose_scale_is_not_finite_is_left_as_it_is():
    net = made()
    with torch.no_grad():
        net.a_norm.running_var.fill_(0)
        net.a_norm.eps = 0.0
    model = model_of(net)
    model.trace(PIXEL_ROWS, [PIXELS], TARGET)
    assert folded_by(model) == {"b", "twice"}


def test_what_is_kept_is_less_and_leaves_folded_weights_out():
    model = model_of(made())
    with torch.no_grad():
        kept = model._kept
    maps = 4 * 4 * SIDE**2
    # by hand: the pixels, and what each operation keeps of its input or result
    assert kept < 4 * 3 * SIDE**2 + 14 * maps
    folded = sum(tensor.numel() * 4 for tensor in norms.folded_tensors(model.module))
    assert folded == 4 * (4 * 3 * 9 + 4 + 4 * 2 * 9 + 4 + 4 * 4 + 4)  # a, b, twice


# ---- the trial


@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    return model_of(made())


def trial(network, monkeypatch, rates, most=6, others=None):
    """What is found where passes run at these rates, and what was tried."""
    tried = []
    others = [GradientPlan(False, 1)] if others is None else others

    def rate(_network, plan, _run):
        tried.append(plan.said)
        return rates[plan.said]

    monkeypatch.setattr(backward, "_rate", rate)
    found = backward.plan_gradients(
        network, most, GradientPlan(True, 1), others, lambda *_: None
    )
    return found, tried


LAST, FIRST = "channels-last, f32, {} a pass", "channels-first, f32, {} a pass"


def test_the_fastest_layout_and_batch_are_taken(network, monkeypatch):
    rates = {LAST.format(2): 10, FIRST.format(2): 20, FIRST.format(3): 20.5}
    rates |= {FIRST.format(5): 22, FIRST.format(6): 22.9}
    found, tried = trial(network, monkeypatch, rates)
    # 20.5 is not clearly faster than 20; 22 is; 22.9 is not clearly faster than 22
    assert found == GradientPlan(False, 5)
    assert found.rates == rates
    assert tried == list(rates)


def test_another_layout_must_be_clearly_faster(network, monkeypatch):
    rates = {LAST.format(2): 20, FIRST.format(2): 20.8}
    found, _ = trial(network, monkeypatch, rates, most=2)
    assert found == GradientPlan(True, 2)


def test_a_slow_network_is_tried_no_further(network, monkeypatch):
    monkeypatch.setattr(backward, "TRIAL_SECONDS", -1.0)
    rates = {LAST.format(2): 20, FIRST.format(2): 10}
    found, tried = trial(network, monkeypatch, rates)
    assert found == GradientPlan(True, 2)
    assert tried == list(rates)


def test_what_was_found_is_kept_by_network_and_machine(
    network, monkeypatch, tmp_path
):
    rates = {LAST.format(2): 20, FIRST.format(2): 10}
    first, _ = trial(network, monkeypatch, rates, most=2)
    again, tried = trial(network, monkeypatch, rates, most=2)
    assert (again, again.rates, tried) == (first, first.rates, [])
    (file,) = (tmp_path / "gradients").iterdir()
    for broken in ("{", "[]", json.dumps({"channels_last": True, "batch": 99})):
        file.write_text(broken)
        again, tried = trial(network, monkeypatch, rates, most=2)
        assert (again, tried) == (first, list(rates)), broken
    assert trial(network, monkeypatch, rates, most=2, others=[])[1] == list(rates)[:1]
    with torch.no_grad():
        network.module.head.bias.add_(1)
    assert trial(network, monkeypatch, rates, most=2)[1] == list(rates)
    monkeypatch.setattr(trials, "machine", lambda device: ("another",))
    assert trial(network, monkeypatch, rates, most=2)[1] == list(rates)


def test_low_precision_is_tried_where_it_is_asked_for(network, monkeypatch):
    low = GradientPlan(True, 1, "bf16")
    rates = {LAST.format(2): 20, "channels-last, bf16, 2 a pass": 40}
    found, _ = trial(network, monkeypatch, rates, most=2, others=[low])
    assert found == GradientPlan(True, 2, "bf16")


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_the_shift_of_low_precision_is_measured_and_said(
    network, monkeypatch, precision
):
    """SmoothGrad without noise: every pass is the same gradient, so that its shift is that
    of the map.
    """
    monkeypatch.setattr(plan, "native_low", lambda *_: True)
    monkeypatch.setattr(plan, "check_engine", lambda *_: None)
    fast = f"channels-last, {precision}, 2 a pass"
    monkeypatch.setattr(
        backward, "_rate", lambda _network, one, _run: 9 if one.said == fast else 1
    )
    object.__setattr__(network, "precision", precision)
    sample = Sample(
        "noise", np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    )
    spelled = "smoothgrad:noise=0,samples=10,channels=sum"
    low = explain(network, sample, spelled, target=1)
    exact = explain(model_of(network.module), sample, spelled, target=1)
    gradients = [
        model.trace(network.view(sample).pixels, [PIXELS], TARGET).gradients[PIXELS]
        for model in (network._planned(GradientPlan(True, 2, precision)), network)
    ]
    shift = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert 1e-5 < shift < 0.3
    assert low.provenance["gradient_shift"] == pytest.approx(shift, rel=1e-3)
    assert low.provenance["gradients"] == fast
    assert low.provenance["precision"] == f"{precision}+f32"
    (note,) = [note for note in low.provenance["notes"] if "gradients in" in note]
    assert f"{shift:.2%} of their size away from f32's" in note
    assert not np.array_equal(low.values, exact.values)
    assert "gradient_shift" not in exact.provenance
    assert exact.provenance["precision"] == "f32"


def test_few_passes_are_not_worth_a_trial(network, monkeypatch):
    monkeypatch.setattr(
        backward, "_rate", lambda *_: pytest.fail("a trial for few passes")
    )
    assert network.for_gradients(9) is network


def test_a_planned_network_runs_as_planned(network):
    shapes = []
    assert network._gradients_arrive
    planned = network._planned(GradientPlan(False, 2))
    network.module.a.register_forward_pre_hook(
        lambda _part, given: shapes.append(
            given[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    planned.trace(PIXEL_ROWS, [PIXELS], TARGET)
    network._planned(GradientPlan(True, 2)).trace(PIXEL_ROWS, [PIXELS], TARGET)
    assert shapes == [False, True]
    assert planned.gradient_batch == 2
    assert planned.for_gradients(1000) is planned
    assert planned.using(engine="torch").gradient_plan is None
    assert planned.with_module(made()).gradient_plan is None


def test_whether_gradients_arrive_is_found_out_once(network):
    """Not by each planned copy anew: that is a forward and backward pass a map."""
    calls = []
    network.module.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        network._planned(GradientPlan(True, 2)).trace(PIXEL_ROWS, [PIXELS], TARGET)
    first = len(calls)
    network._planned(GradientPlan(False, 2)).trace(PIXEL_ROWS, [PIXELS], TARGET)
    assert len(calls) - first == 1


def test_a_run_finds_out_before_its_images_are_made(network, monkeypatch):
    """Threads and workers find what is kept; methods of one pass ask for no trial."""
    from consilience.runs import explain as runs

    monkeypatch.setattr(backward, "_rate", lambda _network, one, _run: one.batch)
    asked = []
    ask = type(network).for_gradients
    monkeypatch.setattr(
        type(network),
        "for_gradients",
        lambda self, count, *rest: asked.append(count) or ask(self, count, *rest),
    )
    job = runs.job_from_specs(
        [
            "gradcam:b",
            "smoothgrad:samples=20",
            "integrated-gradients:steps=30",
            "lime",
        ],
        ["my:net"],
        "red",
    )
    runs._find_out_first(job, [network] * 4)
    assert asked == [0, 20, 30]
    monkeypatch.setattr(backward, "_rate", lambda *_: pytest.fail("found out again"))
    with runs.steady_threads():
        assert network.for_gradients(20).gradient_plan.batch == network.gradient_batch
