"""The accelerator: the same maps as the CPU, batches, half precision, memory, two devices.

Run by ``make test-cuda``; where there is no accelerator they skip by name.
"""

import numpy as np
import pytest
import torch
from conftest import planted_image
from torch import nn

import consilience as cs
from consilience import api
from consilience.models.load import load_model, wrap
from consilience.runs import explain
from consilience.runs.explain import How
from consilience.runs.folder import Run

pytestmark = pytest.mark.cuda
METHODS = (
    "gradcam",
    "gradcam++",
    "layercam",
    "eigencam",
    "scorecam:channels=16",
    "gradient",
    "integrated-gradients:steps=8",
    "smoothgrad:samples=4,seed=1",
    "guided-backprop",
    "occlusion:window=64,stride=32",
    "rise:masks=64,seed=1",
    "lime:samples=64,segments=slic,seed=1",
    "kernelshap:samples=64,segments=slic,seed=1",
)


def accelerators():
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]


@pytest.fixture(scope="module")
def device():
    there = accelerators()
    if not there:
        pytest.skip("no accelerator (CUDA or MPS) is here")
    return there[0]


@pytest.fixture(scope="module")
def cpu():
    return load_model("efficientnet_lite0", engine="torch", device="cpu")


@pytest.fixture(scope="module")
def there(device):
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_model("efficientnet_lite0", engine="torch", device=device)


def close(one, other, tolerance=1e-4):
    """Largest difference as a share of the largest value."""
    scale = max(float(np.abs(other).max()), 1e-12)
    return float(np.abs(one - other).max()) / scale < tolerance


@pytest.mark.parametrize("by", METHODS)
def test_maps_are_those_of_the_cpu(by, cpu, there):
    image = cs.Sample("planted", planted_image(1).pixels)
    here = cs.explain(cpu, image, by, target=3)
    far = cs.explain(there, image, by, target=3)
    assert far.provenance["device"] != "cpu"
    assert close(far.values, here.values), by


@pytest.mark.parametrize(
    "by", ["gradcam", "gradient", "integrated-gradients:steps=4"]
)
def test_a_batch_is_its_images(by, there):
    samples = [cs.Sample(f"s{seed}", planted_image(seed).pixels) for seed in range(5)]
    many = cs.explain(there, samples, by, target=3)
    for sample, made in zip(samples, many, strict=True):
        alone = cs.explain(there, sample, by, target=3)
        assert close(made.values, alone.values)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_half_precision_says_how_far_it_moved(precision, device, tmp_path):
    model = load_model(
        "efficientnet_lite0", engine="torch", device=device, precision=precision
    )
    samples = [cs.Sample(f"s{seed}", planted_image(seed).pixels) for seed in range(2)]
    run = cs.run(model, samples, ["rise:masks=64,seed=1"], output=tmp_path / "run")
    (row,) = run.manifest["precision"]
    assert row["precision"] == precision
    assert row["exact"] == "f32"
    assert 0.8 < row["spearman"] <= 1


def test_memory_stays_within_its_bound(device):
    if not device.startswith("cuda"):
        pytest.skip("only CUDA counts its memory")
    memory = 500 << 20
    model = load_model(
        "efficientnet_lite0", engine="torch", device=device, memory=memory
    )
    weights = sum(value.nbytes for value in model.module.state_dict().values())
    image = cs.Sample("planted", planted_image(1).pixels)
    cs.explain(model, image, "gradcam")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    cs.explain(model, image, "rise:masks=512,seed=1")
    cs.explain(model, image, "integrated-gradients:steps=64")
    assert torch.cuda.max_memory_allocated() < 1.3 * memory + weights


def test_a_recurrent_network_in_eval_mode_has_gradients(device):
    """cuDNN refuses the backward pass of an LSTM in eval mode."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rows = nn.LSTM(3 * 16, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            rows = x.permute(0, 2, 1, 3).flatten(2)
            return self.head(self.rows(rows)[0][:, -1])

    module = Rows().eval()
    made = {}
    for name in ("cpu", device):
        model = wrap(
            module.to(name), classes=("a", "b", "c"), mean=0.0, std=1.0, size=16
        )
        image = cs.Sample("noise", np.full((16, 16, 3), 90, np.uint8))
        made[name] = cs.explain(model, image, "gradient", target=1).values
        assert not module.training
    assert close(made[device], made["cpu"], 1e-3)


def test_a_run_on_it_has_the_same_bytes_whatever_its_batches(device, tmp_path):
    samples = [cs.Sample(f"s{seed}", planted_image(seed).pixels) for seed in range(5)]
    model = load_model("efficientnet_lite0", engine="torch", device=device)
    contents = {
        cs.run(
            model,
            samples,
            ["gradcam", "rise:masks=32,seed=1"],
            output=tmp_path / str(batch),
            how=How(batch=batch),
        ).manifest["content"]
        for batch in (1, 2, 5)
    }
    assert len(contents) == 1


def test_two_devices_share_a_run(device, tmp_path):
    if len(accelerators()) < 2:
        pytest.skip("one accelerator is here; this needs two")
    from PIL import Image

    (tmp_path / "images").mkdir()
    for seed in range(6):
        Image.fromarray(planted_image(seed).pixels).save(
            tmp_path / "images" / f"{seed}.png"
        )
    job = explain.job_from_specs(["gradcam"], ["efficientnet_lite0"])
    images = [str(tmp_path / "images")]
    explain.run_explanations(job, images, tmp_path / "two", how=How(workers=2))
    one = explain.run_explanations(job, images, tmp_path / "one")
    two = Run(tmp_path / "two")
    for key in one.keys():  # noqa: SIM118 - a sequence too
        assert close(two[key].values, one[key].values)


def test_predictions_are_those_of_the_cpu(cpu, there):
    sample = cs.Sample("planted", planted_image(2).pixels)
    one, other = (
        api.raw_outputs(model, model.view(sample)) for model in (cpu, there)
    )
    assert close(other.numpy(), one.numpy())
