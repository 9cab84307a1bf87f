"""Engines: every one says what torch says, is kept by content, and gives way to torch
where it cannot.
"""

from __future__ import annotations

import time
import weakref
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from consilience import progress
from consilience.models import digest
from consilience.models.engines import openvino, plan
from consilience.models.engines import runner as engine_runner
from consilience.models.network import wrap
from consilience.perturb.probe import Bits, Grids, probe
from consilience.types import ClassTarget, ConsilienceError, Sample

pytest.importorskip("openvino")


class Listener:
    def __init__(self):
        self.said = []

    def start(self, label, total):
        return 0

    def advance(self, task, steps):
        pass

    def finish(self, task):
        pass

    def say(self, message):
        self.said.append(message)


def make(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, 7),
    )


def oracle(module: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalisation and module in double precision, image by image."""
    double = make(width=module[0].out_channels).double().eval()
    double.load_state_dict(module.state_dict())
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        return torch.cat(
            [double((one[None].double() - mean) / std) for one in pixels]
        ).float()


def images(count: int, size: int = 24) -> torch.Tensor:
    return torch.rand(
        count, 3, size, size, generator=torch.Generator().manual_seed(count)
    )


@pytest.mark.parametrize("engine", ["torch", "openvino", "auto"])
@pytest.mark.parametrize("count", [1, 8, 9, 31, 32, 33, 45, 70])
def test_scores_are_those_of_each_image_alone(engine, count):
    module = make()
    model = wrap(module, size=24, engine=engine)
    pixels = images(count)
    scores = model.scores(pixels)
    assert (scores.shape, scores.dtype, scores.requires_grad) == (
        (count, 7),
        torch.float32,
        False,
    )
    torch.testing.assert_close(scores, oracle(module, pixels), atol=2e-6, rtol=1e-4)


def test_no_images_have_no_scores():
    assert wrap(make(), size=24).scores(images(1)[:0]).shape == (0, 7)


def test_a_image_of_another_size_goes_to_torch():
    module = make()
    pixels = images(32, size=40)
    torch.testing.assert_close(
        wrap(module, size=24).scores(pixels),
        oracle(module, pixels),
        atol=2e-6,
        rtol=1e-4,
    )


def test_scores_do_not_depend_on_what_ran_before():
    """The same bytes from a fresh adapter and from one that has its engine already."""
    module, few, many = make(), images(5), images(40)
    fresh = wrap(module, size=24).scores(few)
    used = wrap(module, size=24)
    used.scores(many)
    assert torch.equal(used.scores(few), fresh)
    assert torch.equal(used.scores(many), wrap(module, size=24).scores(many))


def test_facts_resolve_auto():
    model = wrap(make(), size=24)
    planned = model.facts
    assert (planned["engine"], planned["precision"], planned["device"]) == (
        "openvino",
        "f32",
        "cpu",
    )
    model.scores(images(32))
    ran = model.facts
    assert {key: ran[key] for key in planned} == planned
    assert (ran["batch"], ran["openvino"]) == (32, version("openvino"))
    assert ran["threads"] >= 1
    plain = model.using(engine="torch")
    plain.scores(images(32))
    assert (plain.facts["engine"], plain.facts["torch"]) == (
        "torch",
        torch.__version__,
    )


def test_openvino_in_bf16_runs_as_f32_where_the_cpu_has_none(monkeypatch):
    """Also the few images that go straight to torch; and it is what the compiled
    network itself says.
    """
    monkeypatch.setattr(plan, "_openvino_capabilities", lambda: ("FP32",))
    model = wrap(make(), size=24, precision="bf16")
    assert model.facts["precision"] == "f32"
    assert "no bf16 arithmetic, so f32 runs" in model.facts["note"]
    for count in (4, 32):
        with plan.recorded_passes() as ran:
            scores = model.scores(images(count))
        assert ran == {plan.Ran("torch" if count == 4 else "openvino", "f32")}
        torch.testing.assert_close(
            scores, oracle(make(), images(count)), atol=2e-6, rtol=1e-4
        )
    assert model.facts["precision"] == "f32"
    compiled = model._runner._engine._compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


@pytest.mark.parametrize("native", [True, False])
def test_torch_in_bf16_says_where_it_is_emulated(monkeypatch, native):
    monkeypatch.setattr(plan, "native_bf16", lambda device: native)
    low = wrap(make(), size=24, engine="torch", precision="bf16")
    error = (low.scores(images(32)) - oracle(make(), images(32))).abs().max()
    assert low.facts["precision"] == "bf16"
    assert 1e-5 < error < 0.05
    assert ("torch emulates it" in low.facts.get("note", "")) is not native


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"precision": "f16"},
            "precision f16 needs an accelerator .*; the model is on cpu, which has f32 and "
            "bf16",
        ),
        (
            {"precision": "f16", "engine": "openvino"},
            "precision f16 needs an accelerator",
        ),
        ({"precision": "fp8"}, "precision is one of f32, bf16, f16; got 'fp8'"),
        (
            {"engine": "tensorrt"},
            "engine is one of auto, torch, torch-compile, openvino; got 'tensorrt'",
        ),
    ],
)
def test_what_the_device_cannot_do_is_refused(asked, message):
    with pytest.raises(ConsilienceError, match=message):
        wrap(make(), size=24, **asked)


@pytest.mark.slow
def test_torch_compile_says_what_torch_says():
    """Nine networks: torch compiles one piece of code for eight at most, and then stops
    in silence.
    """
    pixels = images(32)
    for seed in range(9):
        model = wrap(make(seed), size=24, engine="torch-compile")
        torch.testing.assert_close(
            model.scores(pixels[:20]),
            oracle(make(seed), pixels[:20]),
            atol=2e-6,
            rtol=1e-4,
        )
        assert (model.facts["engine"], model.facts["batch"]) == ("torch-compile", 32)
        assert "note" not in model.facts
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(
                model.scores(pixels), oracle(make(seed), pixels), atol=2e-6, rtol=1e-4
            )


def test_a_compiled_network_follows_its_weights(monkeypatch):
    """Traced for real, run by torch's own operators: no C++ compiler is waited for."""
    compiled = []
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch,
        "compile",
        lambda run, **options: compiled.append(options) or eager(run, **options),
    )
    module, pixels = make(), images(33)
    model = wrap(module, size=24, engine="torch-compile")
    torch.testing.assert_close(
        model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4
    )
    assert model.facts["engine"] == "torch-compile"
    with torch.no_grad():
        module[6].bias += 1
    torch.testing.assert_close(
        model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4
    )
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 2
    assert all(part.training for part in module.modules())


def test_where_torch_compile_cannot_torch_does_and_it_is_said_once(monkeypatch):
    def broken(run, **_):
        def call(pixels):
            raise RuntimeError("no compiler found\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, pixels, listener = (
        wrap(make(), size=24, engine="torch-compile"),
        images(32),
        Listener(),
    )
    with progress.listening(listener):
        for _ in range(2):
            torch.testing.assert_close(
                model.scores(pixels), oracle(make(), pixels), atol=2e-6, rtol=1e-4
            )
    assert [line for line in listener.said if "cannot run" in line] == [
        "torch-compile cannot run this model, torch does: no compiler found"
    ]
    assert (model.facts["engine"], model.facts["note"]) == (
        "torch",
        "torch-compile was tried: no compiler found",
    )


def test_passes_are_recorded_as_they_ran():
    model = wrap(make(), size=24)
    with plan.recorded_passes() as ran:
        assert not ran
        model.scores(images(40))
        assert ran == {
            plan.Ran("openvino", "f32"),
            plan.Ran("torch", "f32"),
        }  # 32, and a rest of 8
    with plan.recorded_passes() as ran:
        model.activations(images(1), ["0"])
    assert ran == {plan.Ran("torch", "f32")}
    model.logits(images(1))
    assert len(ran) == 1


def test_weights_changed_after_the_first_scores_count():
    module, pixels = make(), images(32)
    model = wrap(module, size=24)
    model.scores(pixels)
    with torch.no_grad():
        module[6].bias += 1
    torch.testing.assert_close(
        model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4
    )


def test_a_converted_model_is_found_again_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    conversions = []
    convert = openvino._convert
    monkeypatch.setattr(
        openvino,
        "_convert",
        lambda network: conversions.append(1) or convert(network),
    )
    pixels = images(32)
    first = wrap(make(), size=24).scores(pixels)
    assert torch.equal(wrap(make(), size=24).scores(pixels), first)
    assert len(conversions) == 1
    wrap(make(seed=1), size=24).scores(pixels)
    wrap(make(), size=24, mean=(0.5, 0.5, 0.5)).scores(pixels)
    assert len(conversions) == 3
    blobs = list(tmp_path.rglob("*.blob"))
    assert len(blobs) == 3
    assert not [file for file in tmp_path.rglob("*") if "making" in file.name]
    assert all(
        file.suffix in (".blob", ".xml", ".bin")
        for file in tmp_path.rglob("*")
        if file.is_file()
    )
    for file in blobs:
        file.write_bytes(b"damaged")
    assert torch.equal(wrap(make(), size=24).scores(pixels), first)
    assert len(conversions) == 3


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "file"))
    model, pixels = wrap(make(), size=24), images(32)
    torch.testing.assert_close(
        model.scores(pixels), oracle(make(), pixels), atol=2e-6, rtol=1e-4
    )
    assert model.facts["engine"] == "openvino"


class Deceptive(nn.Module):
    """Traced wrongly by any tracer: a Python decision on the data."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        out = self.fc(x.mean((2, 3)))
        return out + 3 if float(x.mean()) > 1 else out - 3


class Stubborn(Deceptive):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("cannot be traced")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Deceptive, "away from torch's"), (Stubborn, "cannot be traced")],
)
def test_where_openvino_cannot_torch_does_and_it_is_said_once(kind, reason):
    torch.manual_seed(0)
    module = kind().train()
    pixels = torch.cat(
        [torch.ones(20, 3, 24, 24) - 0.01 * images(20), torch.ones(20, 3, 24, 24)]
    )
    model = wrap(module, size=24)
    expected = module.eval()(model.recipe.normalised(pixels)).detach()
    module.train()
    listener = Listener()
    with progress.listening(listener):
        for _ in range(2):
            torch.testing.assert_close(model.scores(pixels), expected)
    complaints = [line for line in listener.said if reason in line]
    assert len(complaints) == 1
    assert model.facts["engine"] == "torch"
    assert reason in model.facts["note"]
    assert module.training
    with pytest.raises(
        ConsilienceError, match="engine openvino cannot run this model"
    ):
        model.using(engine="openvino").scores(pixels)


def test_conversion_leaves_the_module_as_it_was():
    module = make().train()
    hooks = {name: len(part._forward_hooks) for name, part in module.named_modules()}
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    wrap(module, size=24, engine="openvino").scores(images(32))
    assert all(part.training for part in module.modules())
    assert hooks == {
        name: len(part._forward_hooks) for name, part in module.named_modules()
    }
    assert attributes == {
        name: set(vars(part)) for name, part in module.named_modules()
    }


def test_the_batch_keeps_to_the_memory():
    model = wrap(make(width=64), size=224)
    largest = 64 * 111 * 111
    assert model.largest == largest
    assert model.batch == 32
    assert (
        model.using(memory=40_000_000).batch
        == 40_000_000 // (12 * (largest + 3 * 224 * 224))
        == 3
    )
    assert model.using(memory=1 << 20).batch == 1


def test_one_image_a_batch_works():
    module, pixels = make(width=64), images(3, size=96)
    model = wrap(module, size=96, memory=2_000_000, engine="openvino")
    assert model.batch == 1
    torch.testing.assert_close(
        model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4
    )


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "own"))
    assert plan.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CONSILIENCE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plan.cache_folder() == tmp_path / "xdg" / "consilience"


def test_architecture_tells_what_a_repr_does_not():
    one, other = make(), make()
    assert digest.architecture(one) == digest.architecture(other)
    one.train(), other.eval()
    assert digest.architecture(one) == digest.architecture(other)
    other[1].momentum = 0.3
    assert digest.architecture(one) != digest.architecture(other)
    assert "return out + 3" in digest.architecture(Deceptive())

    def times(factor, spare):
        class Times(nn.Module):
            def forward(self, x):
                return (
                    self.spare(x * factor) if hasattr(self, "spare") else x * factor
                )

        Times.made_of = spare
        return Times()

    # what a pass reads from the function around its class is part of it
    assert digest.architecture(times(2, 0)) == digest.architecture(times(2, 1))
    assert digest.architecture(times(2, 0)) != digest.architecture(times(3, 0))
    assert "factor=3" in digest.architecture(times(3, 0))


def test_digests_are_not_computed_twice():
    module = nn.Linear(4000, 2000)
    began = time.perf_counter()
    first = digest.weights_digest(module)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    assert digest.weights_digest(module) == first
    assert time.perf_counter() - began < cold / 3


def slow_digest(module: nn.Module) -> str:
    digest._weights.clear()
    return digest.module_digest(module, "")


CHANGES = {
    "in place": lambda module: module[0].weight.detach().mul_(2),
    "through .data": lambda module: module[1].running_var.data.add_(1),
    "another tensor under .data": lambda module: setattr(
        module[0].weight, "data", module[0].weight.data + 1
    ),
    "another parameter": lambda module: setattr(
        module[6], "bias", nn.Parameter(torch.full((7,), 3.0))
    ),
    "another part": lambda module: module.__setitem__(2, nn.GELU()),
    "one part more": lambda module: module.append(nn.ReLU()),
    "a setting": lambda module: setattr(module[1], "eps", 0.5),
    "a list": lambda module: module.sizes.append(3),
    "a buffer": lambda module: module.register_buffer("more", torch.ones(2)),
    "loaded": lambda module: module.load_state_dict(make(seed=1).state_dict()),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_change_is_seen(what, layout):
    """The watch against the digest itself, which reads everything."""
    module = make().to(memory_format=layout)
    module.sizes = [1, 2]
    runner, before = engine_runner.Runner(), slow_digest(module)
    assert runner.digest(module, "") == before
    assert runner._watch.same()
    CHANGES[what](module)
    assert runner.digest(module, "") == slow_digest(module) != before
    assert runner._watch.same()


def test_a_watch_looks_no_closer_than_it_has_to(monkeypatch):
    module = make()
    calls = []
    compute = digest.module_digest
    monkeypatch.setattr(
        engine_runner,
        "module_digest",
        lambda *given: calls.append(1) or compute(*given),
    )
    model = wrap(module, size=24)
    for _ in range(3):
        model.scores(images(32))
        model.logits(images(1))
        assert model.id
    assert len(calls) == 1
    module.train()
    assert model.id.endswith(model.digest)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500M", 500 << 20),
        ("2G", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("64000000", 64_000_000),
        ("7 kb", 7168),
        (12, 12),
    ],
)
def test_sizes_in_bytes(text, size):
    assert plan.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1T", "1,5G", "two"])
def test_what_is_no_size(text):
    with pytest.raises(
        ConsilienceError,
        match="memory is a number of bytes, or one with K, M or G: 500M, 2G; got",
    ):
        plan.bytes_of(text)


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive at once that operations inside made."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, size)
        return made

    def drop(self, size):
        self.now -= size


def peak(memory: int, masks: int, soft: bool) -> int:
    model = wrap(make(width=16), size=64, engine="torch", memory=memory)
    view = model.view(Sample("p", np.full((64, 64, 3), 100, np.uint8)))
    generator = torch.Generator().manual_seed(0)
    if soft:
        keeps = Grids(torch.rand(masks, 4, 4, generator=generator))
    else:
        segments = np.arange(64 * 64).reshape(64, 64) // 512
        keeps = Bits(
            segments, (torch.rand(masks, 8, generator=generator) > 0.5).numpy()
        )
    model.anatomy  # noqa: B018 - made outside
    with Peak() as watched:
        probe(
            model, view, keeps, ClassTarget(1, "one"), torch.zeros_like(view.pixels)
        )
    return watched.most


@pytest.mark.parametrize("soft", [False, True])
def test_memory_follows_the_budget_and_not_the_number_of_masks(soft):
    budgets = [1 << 20, 2 << 20, 4 << 20]
    few, many = (
        [peak(budget, masks, soft) for budget in budgets] for masks in (96, 384)
    )
    assert all(most <= budget for most, budget in zip(many, budgets, strict=True))
    assert all(
        big <= 1.02 * small + 384 * 64 for big, small in zip(many, few, strict=True)
    )
    assert many[2] > 2 * many[0]


class Impatient(Listener):
    def __init__(self, patience):
        super().__init__()
        self.left, self.closed = patience, 0

    def advance(self, task, steps):
        self.left -= steps
        if self.left <= 0:
            raise progress.Cancelled

    def finish(self, task):
        self.closed += 1


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_cancelling_stops_at_once_and_leaves_everything_as_it_was(engine):
    module = make().train()
    scored = []
    model = wrap(module, size=24, engine=engine)
    view = model.view(Sample("p", np.full((24, 24, 3), 100, np.uint8)))
    fill, target, keeps = (
        torch.zeros_like(view.pixels),
        ClassTarget(1, "one"),
        Grids(torch.rand(320, 3, 3)),
    )
    whole = probe(model, view, keeps, target, fill)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    keep_count = keeps.chunks
    object.__setattr__(
        keeps,
        "chunks",
        lambda *given: (
            scored.append(len(chunk)) or chunk for chunk in keep_count(*given)
        ),
    )
    listener = Impatient(64)
    with progress.listening(listener), pytest.raises(progress.Cancelled):
        probe(model, view, keeps, target, fill)
    assert (scored, listener.closed) == ([32, 32], 1)
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks for part in module.modules())
    assert all(
        torch.equal(value, state[name]) for name, value in module.state_dict().items()
    )
    assert torch.is_grad_enabled()
    assert torch.equal(probe(model, view, keeps, target, fill), whole)
