"""Engines: every one says what torch says, is kept by content, and gives way to torch where it cannot."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from consilience import progress
from consilience.models import engines
from consilience.models.adapter import wrap
from consilience.types import ConsilienceError

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
    """Normalisation and module in double precision, picture by picture."""
    double = make(width=module[0].out_channels).double().eval()
    double.load_state_dict(module.state_dict())
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        return torch.cat([double((one[None].double() - mean) / std) for one in pixels]).float()


def pictures(count: int, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("engine", ["torch", "openvino", "auto"])
@pytest.mark.parametrize("count", [1, 8, 9, 31, 32, 33, 45, 70])
def test_scores_are_those_of_each_picture_alone(engine, count):
    module = make()
    model = wrap(module, size=24, engine=engine)
    pixels = pictures(count)
    scores = model.scores(pixels)
    assert (scores.shape, scores.dtype, scores.requires_grad) == ((count, 7), torch.float32, False)
    torch.testing.assert_close(scores, oracle(module, pixels), atol=2e-6, rtol=1e-4)


def test_no_pictures_have_no_scores():
    assert wrap(make(), size=24).scores(pictures(1)[:0]).shape == (0, 7)


def test_a_picture_of_another_size_goes_to_torch():
    module = make()
    pixels = pictures(32, size=40)
    torch.testing.assert_close(wrap(module, size=24).scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4)


def test_scores_do_not_depend_on_what_ran_before():
    """The same bytes from a fresh adapter and from one that has its engine already."""
    module, few, many = make(), pictures(5), pictures(40)
    fresh = wrap(module, size=24).scores(few)
    used = wrap(module, size=24)
    used.scores(many)
    assert torch.equal(used.scores(few), fresh)
    assert torch.equal(used.scores(many), wrap(module, size=24).scores(many))


def test_facts_resolve_auto():
    model = wrap(make(), size=24)
    planned = model.facts
    model.scores(pictures(32))
    assert model.facts == planned
    assert (planned["engine"], planned["precision"], planned["device"]) == ("openvino", "f32", "cpu")
    assert planned["threads"] == torch.get_num_threads()
    assert model.using(engine="torch").facts["engine"] == "torch"


def test_precision_is_recorded_as_it_ran(monkeypatch):
    monkeypatch.setattr(engines, "_openvino_capabilities", lambda: ("FP32",))
    model = wrap(make(), size=24, engine="openvino", precision="bf16")
    assert (model.facts["precision"], model.facts["note"]) == ("f32", "this cpu has no bf16 arithmetic")
    low = wrap(make(), size=24, engine="torch", precision="bf16")
    error = (low.scores(pictures(4)) - oracle(make(), pictures(4))).abs().max()
    assert low.facts["precision"] == "bf16"
    assert 1e-5 < error < 0.05


def test_weights_changed_after_the_first_scores_count():
    module, pixels = make(), pictures(32)
    model = wrap(module, size=24)
    model.scores(pixels)
    with torch.no_grad():
        module[6].bias += 1
    torch.testing.assert_close(model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4)


def test_a_converted_model_is_found_again_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    conversions = []
    convert = engines._convert
    monkeypatch.setattr(engines, "_convert", lambda network: conversions.append(1) or convert(network))
    pixels = pictures(32)
    first = wrap(make(), size=24).scores(pixels)
    assert torch.equal(wrap(make(), size=24).scores(pixels), first)
    assert len(conversions) == 1
    wrap(make(seed=1), size=24).scores(pixels)
    wrap(make(), size=24, mean=(0.5, 0.5, 0.5)).scores(pixels)
    assert len(conversions) == 3
    blobs = list(tmp_path.rglob("*.blob"))
    assert len(blobs) == 3
    assert not [file for file in tmp_path.rglob("*") if "making" in file.name]
    assert all(file.suffix in (".blob", ".xml", ".bin") for file in tmp_path.rglob("*") if file.is_file())
    for file in blobs:
        file.write_bytes(b"damaged")
    assert torch.equal(wrap(make(), size=24).scores(pixels), first)
    assert len(conversions) == 3


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "file"))
    model, pixels = wrap(make(), size=24), pictures(32)
    torch.testing.assert_close(model.scores(pixels), oracle(make(), pixels), atol=2e-6, rtol=1e-4)
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


@pytest.mark.parametrize(("kind", "reason"), [(Deceptive, "away from torch's"), (Stubborn, "cannot be traced")])
def test_where_openvino_cannot_torch_does_and_it_is_said_once(kind, reason):
    torch.manual_seed(0)
    module = kind().train()
    pixels = torch.cat([torch.ones(20, 3, 24, 24) - 0.01 * pictures(20), torch.ones(20, 3, 24, 24)])
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
    with pytest.raises(ConsilienceError, match="engine openvino cannot run this model"):
        model.using(engine="openvino").scores(pixels)


def test_conversion_leaves_the_module_as_it_was():
    module = make().train()
    hooks = {name: len(part._forward_hooks) for name, part in module.named_modules()}
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    wrap(module, size=24, engine="openvino").scores(pictures(32))
    assert all(part.training for part in module.modules())
    assert hooks == {name: len(part._forward_hooks) for name, part in module.named_modules()}
    assert attributes == {name: set(vars(part)) for name, part in module.named_modules()}


def test_the_batch_keeps_to_the_memory():
    model = wrap(make(width=64), size=224)
    largest = 64 * 111 * 111
    assert model.largest == largest
    assert model.batch == 32
    assert model.using(memory=40_000_000).batch == 40_000_000 // (12 * largest) == 4
    assert model.using(memory=1 << 20).batch == 1


def test_one_picture_a_batch_works():
    module, pixels = make(width=64), pictures(3, size=96)
    model = wrap(module, size=96, memory=2_000_000, engine="openvino")
    assert model.batch == 1
    torch.testing.assert_close(model.scores(pixels), oracle(module, pixels), atol=2e-6, rtol=1e-4)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "own"))
    assert engines.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CONSILIENCE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert engines.cache_folder() == tmp_path / "xdg" / "consilience"


def test_architecture_tells_what_a_repr_does_not():
    one, other = make(), make()
    assert engines.architecture(one) == engines.architecture(other)
    one.train(), other.eval()
    assert engines.architecture(one) == engines.architecture(other)
    other[1].momentum = 0.3
    assert engines.architecture(one) != engines.architecture(other)
    assert "return out + 3" in engines.architecture(Deceptive())


def test_digests_are_not_computed_twice():
    module = nn.Linear(4000, 2000)
    began = time.perf_counter()
    first = engines.weights_digest(module)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    assert engines.weights_digest(module) == first
    assert time.perf_counter() - began < cold / 3
