"""Tails: resumed, split and closed passes compared with whole passes with the layer's
output replaced by a plain hook.
"""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torchvision
from torch import nn

from consilience import progress
from consilience.models import tail as tails
from consilience.models.network import wrap
from consilience.types import ConsilienceError, Tail

# ---- the oracle: nothing of the library but the module


def shown(network, pixels):
    return network.recipe.normalised(pixels)


def said_by(network, pixels, layer):
    """What the module's layer returns, as it returns it."""
    kept = []
    part = dict(network.module.named_modules())[layer]
    handle = part.register_forward_hook(
        lambda _m, _i, output: kept.append(output.clone())
    )
    try:
        with torch.no_grad():
            network.module(shown(network, pixels))
    finally:
        handle.remove()
    return kept[0]


def replaced(network, pixels, layer, raw):
    """The module's outputs, one whole pass a row, with the layer returning that row
    instead.
    """
    part = dict(network.module.named_modules())[layer]
    rows = []
    for row in raw:
        handle = part.register_forward_hook(
            lambda _m, _i, _o, row=row: row[None].clone()
        )
        try:
            with torch.no_grad():
                rows.append(network.module(shown(network, pixels))[0])
        finally:
            handle.remove()
    return torch.stack(rows)


def changed(raw, seed=0):
    """The layer's output otherwise: noise of its size, and its own with parts gone."""
    generator = torch.Generator().manual_seed(seed)
    noise = raw.mean() + raw.std(correction=0) * torch.randn(
        raw.shape, generator=generator
    )
    return torch.cat(
        [raw, noise, raw * torch.randint(0, 2, raw.shape, generator=generator)]
    )


def off(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def image(size, seed=0):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network_of(module, size=64):
    return wrap(module.eval(), size=size, engine="torch")


def randomised(module, seed=0):
    """Every parameter away from its start, so that no zero of an initialisation hides a
    part.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = (
                0.5 / max(1, parameter[0].numel()) ** 0.5
                if parameter.dim() > 1
                else 0.2
            )
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return module


def family(name, size=64, **options):
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        return network_of(
            randomised(timm.create_model(name[5:], pretrained=False, **options)), size
        )
    return network_of(
        randomised(getattr(torchvision.models, name)(weights=None, **options)), size
    )


# ---- networks with one difficulty each


class Pooled(nn.Module):
    """conv, ReLU, mean, linear: the closed form."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = (
            nn.Conv2d(3, 6, 3, stride=4),
            nn.ReLU(inplace=True),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean(dim=(2, 3)))


class Shared(nn.Module):
    """A residual with a ReLU and a convolution that both run twice, in place, written
    into the skip.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.both, self.relu = (
            nn.Conv2d(3, 6, 3, stride=4),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.side, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        skip = self.both(x)
        out = self.side(x)
        skip += out
        out = self.both(self.relu(skip)) * skip
        return self.head(out.amax(dim=(2, 3)))


class Deciding(nn.Module):
    """Python decides on the values: no graph."""

    def __init__(self):
        super().__init__()
        self.conv, self.next, self.head = (
            nn.Conv2d(3, 6, 3, stride=4),
            nn.Conv2d(6, 6, 1),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.conv(x)
        if float(x.mean()) > 1e6:
            x = -x
        return self.head(self.next(x).relu().mean(dim=(2, 3)))


class Failing(nn.Module):
    """Fails when told to, after it noted what it saw."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.fails = (
            nn.Conv2d(3, 6, 3, stride=4),
            nn.Linear(6, 4),
            False,
        )
        self.noted = None

    def forward(self, x):
        x = self.conv(x)
        self.noted = x.sum(dim=1)
        if self.fails:
            raise RuntimeError("out of order")
        return self.head((x * torch.tensor([2.0]).exp()).relu().amax(dim=(2, 3)))


class Boundary(nn.Module):
    """A map read by one convolution of a stated shape, then a non-linear rest."""

    def __init__(self, **shape):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 5, 3, stride=2), nn.ReLU()
        self.reads, self.head = nn.Conv2d(5, 7, **shape), nn.Linear(7, 4)

    def forward(self, x):
        return self.head(
            torch.tanh(self.reads(self.act(self.stem(x)))).pow(2).mean(dim=(2, 3))
        )


# ---- every way gives what a whole pass gives

FAST = [
    (
        "resnet18",
        64,
        ["layer2.0.bn1", "layer3.0.conv2", "layer3.0.downsample.0", "layer4"],
    ),
    (
        "mobilenet_v3_small",
        64,
        ["features.4.block.2.avgpool", "features.11.block.0.0", "features"],
    ),
    ("densenet121", 64, ["features.denseblock3.denselayer4.conv1", "features"]),
    ("shufflenet_v2_x0_5", 64, ["stage3.1.branch2.3", "conv5"]),
    ("squeezenet1_1", 64, ["features.7.expand1x1_activation", "features"]),
    ("timm:tf_efficientnet_lite0", 64, ["blocks.4.1.bn1.act", "blocks.6", "bn2"]),
    ("timm:vit_tiny_patch16_224", 64, ["blocks.1.attn", "blocks.11.norm1"]),
    ("timm:swin_tiny_patch4_window7_224", 56, ["layers.1.blocks.1.norm1", "norm"]),
]
WIDE = [
    ("alexnet", 64, ["features.9", "features"]),
    ("vgg11", 96, ["features.8", "avgpool"]),
    ("resnet50", 64, ["layer3.0.conv2", "layer3.0.bn3", "layer4"]),
    ("googlenet", 64, ["inception4b.branch3.1.bn", "inception5b"]),
    ("inception_v3", 299, ["Mixed_6d.branch7x7dbl_1.conv", "Mixed_7c"]),
    ("mobilenet_v2", 64, ["features.8.conv.1", "features"]),
    ("mnasnet0_5", 64, ["layers.11.0.layers.2", "layers"]),
    ("efficientnet_b0", 64, ["features.4.2.block.2", "features"]),
    ("regnet_y_400mf", 64, ["trunk_output.block3.block3-2.f.a", "trunk_output"]),
    ("resnext50_32x4d", 64, ["layer3.0.conv2", "layer4"]),
    ("wide_resnet50_2", 64, ["layer3.0.conv2", "layer4"]),
    ("convnext_tiny", 64, ["features.5.4.block.5", "features"]),
    (
        "vit_b_16",
        64,
        [
            "encoder.layers.encoder_layer_3.mlp.1",
            "encoder.layers.encoder_layer_11.ln_1",
        ],
    ),
    ("swin_t", 64, ["features.3.1.norm2", "features.5.0", "norm"]),
    ("swin_v2_t", 64, ["features.3.1.attn", "norm"]),
    ("maxvit_t", 224, ["blocks.2.layers.0.layers.MBconv.layers.conv_a", "blocks.3"]),
    ("timm:convnext_atto", 64, ["stages.1.blocks.1.norm", "stages"]),
    ("timm:levit_128s", 224, ["stages.1.blocks.1.attn", "stages"]),
    ("timm:efficientformer_l1", 224, ["stages.2.blocks.1.ls1", "norm"]),
    (
        "timm:mobilevit_xxs",
        256,
        ["stages.2.0.conv1_1x1.bn.act", "stages.3.1.conv_proj.conv", "final_conv"],
    ),
    ("timm:nf_resnet26", 64, ["stages.1.1.conv3", "final_act"]),
    (
        "timm:deit_tiny_distilled_patch16_224",
        224,
        ["blocks.6.mlp.fc1", "blocks.11.norm1"],
    ),
    ("timm:xcit_nano_12_p16_224", 224, ["blocks.3.attn.qkv", "cls_attn_blocks.0"]),
    ("timm:poolformer_s12", 64, ["stages.2.blocks.1.norm1", "stages"]),
    ("timm:resmlp_12_224", 224, ["blocks.5.norm2", "norm"]),
    ("timm:regnety_002", 64, ["s3.b2.conv2.bn.act", "s4"]),
    ("timm:repvgg_a0", 64, ["stages.2.3.identity", "stages"]),
    ("timm:ghostnet_050", 64, ["blocks.4.0.se", "blocks"]),
    ("timm:coatnet_nano_rw_224", 224, ["stages.2.blocks.1.mlp.fc1", "norm"]),
    ("timm:eva02_tiny_patch14_224", 224, ["blocks.5.attn.norm", "norm"]),
]
OPTIONS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
    "timm:vit_tiny_patch16_224": {"img_size": 64},
    "timm:swin_tiny_patch4_window7_224": {"img_size": 56},
}
UNCUT = {("timm:mobilevit_xxs", "stages.3.1.conv_proj.conv")}
CLOSED = {
    "resnet18": "layer4",
    "resnet50": "layer4",
    "shufflenet_v2_x0_5": "conv5",
    "timm:tf_efficientnet_lite0": "bn2",
    "timm:swin_tiny_patch4_window7_224": "norm",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "mnasnet0_5": "layers",
    "mobilenet_v2": "features",
    "efficientnet_b0": "features",
    "regnet_y_400mf": "trunk_output",
    "swin_t": "norm",
    "resnext50_32x4d": "layer4",
    "wide_resnet50_2": "layer4",
    "swin_v2_t": "norm",
    "timm:resmlp_12_224": "norm",
    "timm:mobilevit_xxs": "final_conv",
    "timm:nf_resnet26": "final_act",
    "timm:regnety_002": "s4",
    "timm:repvgg_a0": "stages",
    "timm:coatnet_nano_rw_224": "norm",
}


def check_family(name, size, layers):
    network = family(name, size, **OPTIONS.get(name, {}))
    pixels = image(size)
    with torch.no_grad():
        logits = network.module(shown(network, pixels))
    for layer in layers:
        raw = said_by(network, pixels, layer)
        other = changed(raw)
        expected = replaced(network, pixels, layer, other)
        form = network.anatomy.forms[layer]
        if form.prefix:  # class tokens stay the image's own
            other[:, : form.prefix] = raw[:, : form.prefix]
            expected = replaced(network, pixels, layer, other)
        best = network.tail(pixels, layer)
        wanted = (
            "closed"
            if CLOSED.get(name) == layer
            else "replay"
            if (name, layer) in UNCUT
            else "split"
        )
        assert best.kind == wanted, (layer, best.kind)
        for kind in dict.fromkeys(
            [wanted, "replay", *(["split"] if wanted == "closed" else [])]
        ):
            resumed = network.tail(pixels, layer, kind=kind)
            assert resumed.kind == kind
            assert off(resumed.logits, logits) < 1e-5
            assert (
                off(resumed(network.activations(pixels, [layer])[layer]), logits)
                < 1e-5
            ), (layer, kind)
            assert off(resumed(form.as_map(other)), expected) < 1e-5, (layer, kind)
            check_without(network, pixels, layer, resumed, raw)


def check_without(network, pixels, layer, resumed, raw):
    form = network.anatomy.forms[layer]
    count = form.as_map(raw).shape[1]
    channels = [0, count - 1, count // 2]
    zeroed = raw.expand(3, *raw.shape[1:]).clone()
    for row, channel in enumerate(channels):
        form.as_map(zeroed)[row, channel] = 0
    assert (
        off(resumed.without(channels), replaced(network, pixels, layer, zeroed))
        < 1e-5
    ), (layer, resumed.kind)


@pytest.mark.parametrize(
    ("name", "size", "layers"), FAST, ids=[each[0] for each in FAST]
)
def test_every_way_is_a_whole_pass_with_the_layer_replaced(name, size, layers):
    check_family(name, size, layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "layers"), WIDE, ids=[each[0] for each in WIDE]
)
def test_every_way_is_a_whole_pass_with_the_layer_replaced_wide(name, size, layers):
    check_family(name, size, layers)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", ["stem", "side"])
def test_what_runs_twice_and_writes_in_place(layer, layout):
    network = network_of(randomised(Shared()))
    pixels = image(64)
    for kind in ("split", "replay"):
        resumed = network.tail(pixels, layer, kind=kind)
        raw = said_by(network, pixels, layer)
        other = changed(raw)
        given = other.contiguous(memory_format=layout)
        expected = replaced(network, pixels, layer, other)
        for _ in range(2):  # what is kept must not be written to
            assert off(resumed(given), expected) < 1e-5
            assert torch.equal(given, other)
            check_without(network, pixels, layer, resumed, raw)


def test_a_layer_that_runs_twice_has_no_tail():
    with pytest.raises(ConsilienceError, match="runs 2 times"):
        network_of(Shared()).tail(image(64), "both")


def test_what_cannot_be_traced_is_replayed():
    network = network_of(randomised(Deciding()))
    pixels = image(64)
    resumed = network.tail(pixels, "conv")
    assert resumed.kind == "replay"
    raw = changed(said_by(network, pixels, "conv"))
    assert off(resumed(raw), replaced(network, pixels, "conv", raw)) < 1e-5
    with pytest.raises(ConsilienceError, match="split"):
        network.tail(pixels, "conv", kind="split")
    with pytest.raises(ConsilienceError, match="pooling and one linear"):
        network.tail(pixels, "conv", kind="closed")


# ---- the closed form


def test_closed_form_by_hand():
    network = network_of(randomised(Pooled()))
    pixels = image(64)
    resumed = network.tail(pixels, "act")
    assert resumed.kind == "closed"
    maps = said_by(network, pixels, "act")[0]
    head = network.module.head
    rows = []
    for channel in range(6):
        means = torch.tensor(
            [
                0.0 if each == channel else maps[each].mean().item()
                for each in range(6)
            ]
        )
        rows.append(head.weight.detach() @ means + head.bias.detach())
    assert torch.allclose(
        resumed.without(range(6)), torch.stack(rows), rtol=1e-5, atol=1e-6
    )


def test_a_relu_before_the_pooling_is_seen_though_the_image_does_not_show_it():
    """The layer's own values are positive already, so only other activations tell."""

    class Twice(Pooled):
        def forward(self, x):
            return self.head(self.act(self.conv(x)).sqrt().relu().mean(dim=(2, 3)))

    class Positive(Pooled):
        def __init__(self):
            super().__init__()
            self.shift = nn.Identity()

        def forward(self, x):
            return self.head(
                self.shift(self.act(self.conv(x)) + 1).relu().mean(dim=(2, 3))
            )

    assert network_of(randomised(Twice())).tail(image(64), "act").kind == "split"
    assert network_of(randomised(Positive())).tail(image(64), "shift").kind == "split"


# ---- zero ablation

SHAPES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)},
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_channel_less_behind_a_convolution_is_one_product_less(
    shape, channels_last, monkeypatch
):
    network = network_of(randomised(Boundary(**shape)))
    object.__setattr__(network.anatomy, "channels_last", channels_last)
    pixels = image(64)
    resumed = network.tail(pixels, "act", kind="split")
    raw = said_by(network, pixels, "act")
    zeroed = torch.stack(
        [raw[0] * (torch.arange(5) != channel)[:, None, None] for channel in range(5)]
    )
    with torch.no_grad():
        assert resumed.way._reader is not None
    monkeypatch.setattr(
        tails.Seen, "without", lambda *_: pytest.fail("zeroed copies")
    )
    assert (
        off(resumed.without(range(5)), replaced(network, pixels, "act", zeroed))
        < 1e-5
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 1, "groups": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_other_convolutions_run_on_zeroed_copies(shape):
    network = network_of(randomised(Boundary(**shape)))
    resumed = network.tail(image(64), "act", kind="split")
    with torch.no_grad():
        assert resumed.way._reader is None
    check_without(
        network, image(64), "act", resumed, said_by(network, image(64), "act")
    )


def test_channels_that_are_zero_already_are_not_run(monkeypatch):
    network = network_of(randomised(Boundary(kernel_size=3)))
    with torch.no_grad():
        network.module.stem.weight[[1, 3]] = 0
        network.module.stem.bias[[1, 3]] = -1
    resumed = network.tail(image(64), "act", kind="split")
    ran = []
    ablated = resumed.way.ablated
    monkeypatch.setattr(
        resumed.way,
        "ablated",
        lambda channels: ran.extend(channels.tolist()) or ablated(channels),
    )
    outputs = resumed.without([3, 4, 1, 0, 2, 4])
    assert ran == [4, 0, 2, 4]
    assert torch.equal(outputs[[0, 2]], resumed.logits.expand(2, -1))
    assert torch.allclose(outputs[1], outputs[5], rtol=1e-5)
    assert not torch.allclose(outputs[1], resumed.logits[0])


def test_chunks_change_nothing_and_are_reported():
    network = network_of(randomised(Boundary(kernel_size=3, padding=1)))
    resumed = network.tail(image(64), "act", kind="split")
    seen = []

    class Listener:
        def start(self, label, total):
            seen.append((label, total))
            return 0

        def advance(self, task, steps):
            seen.append(steps)

        def finish(self, task):
            seen.append("done")

        def say(self, message):
            pass

    whole = resumed.without(range(5))
    with progress.listening(Listener()):
        assert off(resumed.without(range(5), batch=2), whole) < 1e-6
    assert seen == [("zeroing channels", 5), 2, 2, 1, "done"]


def test_chunks_stay_within_the_memory():
    network = network_of(Boundary(kernel_size=3, padding=1))
    small = network.using(memory=1 << 20).tail(image(64), "act", kind="split")
    assert 3 * 4 * small.way.largest * small.chunk <= 1 << 20
    assert small.chunk < network.tail(image(64), "act", kind="split").chunk <= 64


def test_what_is_refused():
    network = network_of(Pooled())
    resumed = network.tail(image(64), "act")
    for call, words in [
        (lambda: resumed(torch.zeros(2, 5, 16, 16)), "gives"),
        (lambda: resumed.without([6]), "channels 0 to 5; got 6"),
        (lambda: resumed.without([-1]), "got -1"),
        (lambda: resumed.without([0.5]), "whole numbers"),
        (lambda: resumed.without([0], batch=0), "at least 1"),
        (lambda: network.tail(torch.cat([image(64)] * 2), "act"), "one image"),
        (
            lambda: network.tail(image(64), "act", kind="fast"),
            "closed, split, replay",
        ),
        (lambda: network.tail(image(64), "akt"), "akt"),
    ]:
        with pytest.raises(ConsilienceError, match=words):
            call()
    assert resumed.without([]).shape == (0, 5)
    assert resumed(torch.zeros(0, *resumed.activations.shape[1:])).shape == (0, 5)


# ---- the user's module


def state_of(module):
    parts = [
        (
            name,
            part.training,
            dict(vars(part)),
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
        )
        for name, part in module.named_modules()
    ]
    return parts, {name: value.clone() for name, value in module.state_dict().items()}


def same_state(one, two):
    assert [each[:2] + each[3:] for each in one[0]] == [
        each[:2] + each[3:] for each in two[0]
    ]
    assert [set(each[2]) for each in one[0]] == [set(each[2]) for each in two[0]]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_the_module_comes_back_as_it_was():
    network = network_of(randomised(Failing()))
    network.module.train()
    network.module.head.eval()
    network.layers()
    before = state_of(network.module)
    for kind in ("split", "replay"):
        resumed = network.tail(image(64), "conv", kind=kind)
        resumed.without([0, 1])
        same_state(before, state_of(network.module))
        assert not isinstance(network.module.noted, torch.fx.Proxy)
        assert all(
            parameter.grad is None for parameter in network.module.parameters()
        )
    network.module.fails = True
    for call in (
        lambda: network.tail(image(64), "conv"),
        lambda: resumed.without([0]),
    ):
        with pytest.raises(RuntimeError, match="out of order"):
            call()
        same_state(before, state_of(network.module))


def test_tracing_leaves_nothing_in_the_module():
    from consilience.models import graph

    module = Failing().eval()
    module.noted = noted = torch.zeros(1)
    before = state_of(module)
    traced = graph.trace_graph(module, graph.dialects(module, "conv")[0])
    assert module.noted is noted
    assert traced.constants
    same_state(before, state_of(module))
    module.fails = True
    with pytest.raises(graph.Uncut, match="out of order"):
        graph.trace_graph(module, graph.dialects(module, "conv")[0])
    assert module.noted is noted
    same_state(before, state_of(module))


class Noting(nn.Module):
    """Keeps what it made in containers, as LeViT keeps its position biases."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.made, self.seen = {"first": [torch.ones(1)]}, [1]
        self.made["itself"] = self.made
        self.names = {"a"}

    def forward(self, x):
        key = str(x.device)
        if key not in self.made:
            self.made[key] = x * 2
            self.made["first"].append(x)
            self.seen[0] = x
            self.names.add(key)
        return self.conv(self.made[key]).mean((2, 3))


def test_tracing_leaves_nothing_in_the_containers_of_a_module():
    from consilience.models import graph

    module = Noting().eval()
    made, first, seen, names = (
        module.made,
        module.made["first"],
        module.seen,
        module.names,
    )
    one = first[0]
    graph.trace_graph(module, graph.Dialect())
    assert module.made is made
    assert list(made) == ["first", "itself"]
    assert made["first"] is first
    assert made["itself"] is made
    assert len(first) == 1
    assert first[0] is one
    assert module.seen is seen
    assert seen == [1]
    assert module.names is names
    assert names == {"a"}
    copy.deepcopy(module)  # a proxy in it could not be copied


def test_other_threads_run_while_a_module_is_traced():
    from consilience.models import graph

    class Meanwhile(Pooled):
        def forward(self, x):
            worker = threading.Thread(target=lambda: found.append(other(image(16))))
            worker.start()
            worker.join()
            return super().forward(x)

    found, other = [], nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval()
    traced = graph.trace_graph(Meanwhile().eval(), graph.Dialect())
    assert torch.equal(found[0], other(image(16)))
    assert "conv" in {node.target for node in traced.nodes}


def test_outputs_can_be_used_in_gradients_though_they_carry_none():
    network = network_of(randomised(Boundary(kernel_size=3)))
    with torch.inference_mode():
        resumed = network.tail(image(64), "act", kind="split")
    for outputs in (resumed.without([0, 1]), resumed(resumed.activations)):
        assert not outputs.requires_grad
        scale = torch.ones(1, requires_grad=True)
        (outputs * scale).sum().backward()
        assert scale.grad is not None


def test_a_module_is_traced_once_for_many_images_and_let_go():
    from consilience.models import graph

    traced = []
    with pytest.MonkeyPatch.context() as patch:
        original = graph.trace_graph
        patch.setattr(
            graph, "trace_graph", lambda *given: traced.append(1) or original(*given)
        )
        network = network_of(randomised(Boundary(kernel_size=3)))
        for seed in range(3):
            for layer in ("act", "stem"):
                assert network.tail(image(64, seed), layer).kind == "split"
        other = wrap(network.module, size=64, engine="torch")
        other.tail(image(64), "act")
    assert len(traced) == 1
    gone = weakref.ref(network.module)
    del network, other
    gc.collect()
    assert gone() is None


def test_new_weights_and_new_parts_are_followed():
    network = network_of(randomised(Pooled()))
    pixels = image(64)

    def agrees(layer, kind):
        resumed = network.tail(pixels, layer)
        assert resumed.kind == kind
        raw = changed(said_by(network, pixels, layer))
        assert off(resumed(raw), replaced(network, pixels, layer, raw)) < 1e-5

    agrees("conv", "split")
    agrees("act", "closed")
    randomised(network.module, seed=5)
    agrees("conv", "split")
    agrees("act", "closed")
    network.module.head = nn.Sequential(
        nn.ReLU(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)
    )
    agrees("conv", "split")
    agrees("act", "split")
    network.module.forward = lambda x: 2 * Pooled.forward(network.module, x)
    agrees("act", "replay")


def test_it_is_a_tail():
    resumed: Tail = network_of(Pooled()).tail(image(64), "act")
    assert resumed.logits.shape == (1, 5)
