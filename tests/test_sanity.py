import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import quantus
import torch
from captum.attr import LayerGradCam
from conftest import planted_image
from scipy import stats
from torch import nn

from consilience import api, registry
from consilience.dissection.nulls import with_random_weights
from consilience.metrics import sanity
from consilience.metrics.similarity import alike
from consilience.models.callable import wrap_callable
from consilience.models.layers import weights_changed
from consilience.models.network import wrap
from consilience.types import PIXELS, ConsilienceError, Heat, NotApplicable, Sample

NAMES = ("mprt", "smooth-mprt:samples=2", "emprt", "random-logit")


class Net(nn.Module):
    """Two convolutions with a norm, and parts in another order than they run in; one
    part does not matter.
    """

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.spare = nn.Linear(6, 4)
        self.second = nn.Conv2d(5, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.first = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.second(x).relu() * self.scale
        pooled = x.mean(dim=(2, 3))
        return self.head(pooled) + 0 * self.spare(pooled)


@dataclass(frozen=True)
class Gradient:
    """The gradient of the score, its colours summed."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def explain(self, model, view, target):
        return Heat(
            model.trace(view.pixels, [PIXELS], target).gradients[PIXELS][0].sum(dim=0)
        )


@dataclass(frozen=True)
class Product:
    """Gradient times how far a pixel is from grey, its colours summed: of both signs."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def explain(self, model, view, target):
        gradients = model.trace(view.pixels, [PIXELS], target).gradients[PIXELS]
        return Heat((gradients * (view.pixels - 0.5))[0].sum(dim=0))


@dataclass(frozen=True)
class Fails:
    """Raises in the middle of explaining a network that is not the first."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        if model.spec is None and "given" in str(model.facts.get("weights")):
            raise RuntimeError("on purpose")
        return Heat(view.pixels[0].mean(dim=0))


@pytest.fixture(scope="module", autouse=True)
def toys():
    kinds = {"toy-gradient": Gradient, "toy-product": Product, "toy-fails": Fails}
    registry.explainers.names()
    for name, kind in kinds.items():
        registry.explainers.register(name)(kind)
    yield
    for name in kinds:
        registry.explainers._entries.pop(name)


def network(module=None, size=16, classes=4, outputs=None):
    torch.manual_seed(3)
    made = module or Net()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    names = [f"class {index}" for index in range(classes)]
    how = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": size, "outputs": outputs}
    return wrap(made, classes=names, **how).using(engine="torch")


@pytest.fixture
def net():
    return network()


def explained(model, by, target=1, seed=0):
    sample = planted_image(seed)
    return model.view(sample), api.explain(model, sample, by, target=target)


def score(spec, model, by, **more):
    return registry.metrics.build(spec).score(model, *explained(model, by, **more))


def tensors(module):
    return {
        name: value.detach().clone() for name, value in module.state_dict().items()
    }


# ---- random weights


def test_layers_stand_in_the_order_in_which_a_pass_reaches_them(net):
    view = net.view(planted_image())
    assert sanity.randomised_layers(net, view) == [
        "",
        "first",
        "norm",
        "second",
        "head",
        "spare",
    ]  # "" holds the scale


def test_a_part_that_is_never_called_comes_with_its_holder():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.patches = nn.Conv2d(3, 4, 8, stride=8)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x)[0].mean(dim=1))

    model = network(Attends(), classes=2)
    order = sanity.randomised_layers(model, model.view(planted_image()))
    assert order == ["patches", "attention", "attention.out_proj", "head"]


@pytest.mark.parametrize("how", ["reset", "normal", "permute"])
def test_a_layer_draws_by_its_name_and_seed_alone(how):
    def drawn(name, seed, before=0):
        torch.manual_seed(before)
        made = network().module
        torch.rand(before + 1)
        sanity.randomise(made.second, name, how, seed)
        return made.second.weight.detach().clone()

    first = drawn("second", 0)
    assert torch.equal(first, drawn("second", 0, before=7))
    assert not torch.equal(first, drawn("other", 0))
    assert not torch.equal(first, drawn("second", 1))


def test_what_each_way_keeps(net):
    original = net.module.second.weight.detach().clone()
    made = copy.deepcopy(net.module)
    sanity.randomise(made.second, "second", "permute", 0)
    assert torch.equal(
        made.second.weight.flatten().sort().values, original.flatten().sort().values
    )
    assert not torch.equal(made.second.weight, original)
    wide = nn.Linear(200, 200)
    mean, spread = (
        float(wide.weight.detach().mean()),
        float(wide.weight.detach().std()),
    )
    sanity.randomise(wide, "wide", "normal", 0)
    assert float(wide.weight.detach().mean()) == pytest.approx(
        mean, abs=5 * spread / 200
    )
    assert float(wide.weight.detach().std()) == pytest.approx(spread, rel=0.02)
    assert (
        stats.kstest(
            (wide.weight.detach().flatten()[:2000].numpy() - mean) / spread, "norm"
        ).pvalue
        > 0.01
    )
    sanity.randomise(made.norm, "norm", "normal", 0)
    assert (made.norm.running_var > 0).all()
    sanity.randomise(made.norm, "norm", "reset", 0)
    assert torch.equal(made.norm.running_mean, torch.zeros(5))  # as a norm is made


def test_reset_is_the_layers_own_initialisation(net):
    made = copy.deepcopy(net.module)
    sanity.randomise(made.second, "second", "reset", 0)
    bound = 1 / np.sqrt(
        5 * 9
    )  # torch's own: uniform within 1 / sqrt(inputs of a unit)
    assert 0.9 * bound < float(made.second.weight.detach().abs().max()) <= bound
    sanity.randomise(
        made, "", "reset", 0
    )  # a bare parameter of ones has no way to reset, and no spread
    assert torch.equal(made.scale, torch.ones(6, 1, 1))


def test_both_cascades_end_in_the_same_network(net):
    view = net.view(planted_image())
    ends = []
    for order in ("top-down", "bottom-up"):
        seen = [
            (stage.layers, tensors(stage.model.module))
            for stage in sanity.stages(net, view, order, 0, "reset", 5)
        ]
        last = [layers[-1] for layers, _ in seen]
        assert last[:: 1 if order == "bottom-up" else -1] == [
            "",
            "first",
            "norm",
            "second",
            "head",
            "spare",
        ]
        ends.append(seen[-1][1])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Biased(nn.Module):
    """Attention's position biases as timm keeps them: made once in eval mode."""

    def __init__(self):
        super().__init__()
        self.biases, self.kept = nn.Parameter(torch.zeros(4)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.biases[[3, 2, 1, 0]]
        return x + self.kept[str(x.device)][:, None, None]


def test_what_a_part_made_of_its_weights_is_made_of_the_random_ones():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), Biased(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        module[1].biases.normal_()
    network = wrap(module, size=(16, 16))
    view = network.view(Sample("a", np.zeros((16, 16, 3), np.uint8)))
    network.logits(view.pixels)
    assert module[1].kept
    for order in ("top-down", "independent"):
        for stage in sanity.stages(network, view, order, 0, "normal", 3):
            fresh = nn.Sequential(
                nn.Conv2d(3, 4, 3),
                Biased(),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ).eval()
            fresh.load_state_dict(stage.model.module.state_dict())
            expected = wrap(fresh, size=(16, 16)).logits(view.pixels)
            torch.testing.assert_close(stage.model.logits(view.pixels), expected)
    random = with_random_weights(network, 1)
    fresh.load_state_dict(random.module.state_dict())
    weights_changed(fresh)
    assert not fresh.training
    assert not fresh[1].training
    expected = wrap(fresh, size=(16, 16)).logits(view.pixels)
    torch.testing.assert_close(random.logits(view.pixels), expected)
    assert module[1].kept  # of the user's own network


def test_independent_stages_change_one_group_and_put_it_back(net):
    view, original = net.view(planted_image()), tensors(net.module)
    for stage in sanity.stages(net, view, "independent", 0, "normal", 0):
        now = tensors(stage.model.module)
        changed = {
            name.rpartition(".")[0]
            for name in now
            if not torch.equal(now[name], original[name])
        }
        assert changed <= set(stage.layers)
        assert changed == set(stage.layers) or stage.layers == ("",)
        assert len(stage.layers) == 1


# ---- MPRT


def literal_gradcam(module, pixels, index):
    """By captum, enlarged by scipy-free bilinear weights of torch."""
    found = LayerGradCam(module.eval(), module.second).attribute(
        pixels, target=index, relu_attributions=True
    )
    return nn.functional.interpolate(
        found.detach(), size=(16, 16), mode="bilinear", align_corners=False
    )[0, 0].numpy()


def literal_cascade(module, seed):
    """Copies of the network with one more random layer each, from the output."""
    for count in range(1, 7):
        made = copy.deepcopy(module)
        for name in ["spare", "head", "second", "norm", "first", ""][:count]:
            sanity.randomise(
                made.get_submodule(name) if name else made, name, "reset", seed
            )
        yield made


def test_mprt_is_gradcams_rank_correlation_along_the_cascade(net):
    view, explanation = explained(net, "gradcam:layer=second,relu=true")
    metric = registry.metrics.build("mprt:steps=0,seed=2")
    found = metric.score(net, view, explanation)
    still = literal_gradcam(net.module, view.pixels, 1)
    np.testing.assert_allclose(explanation.values, still, rtol=1e-4, atol=1e-7)
    expected = []
    for made in literal_cascade(net.module, 2):
        values = literal_gradcam(made, view.pixels, 1)
        flat = np.ptp(values) == 0
        expected.append(
            0.0 if flat else stats.spearmanr(still.ravel(), values.ravel()).statistic
        )
    np.testing.assert_allclose(found.curve, expected, atol=2e-3)
    assert found.value == pytest.approx(np.mean(expected), abs=2e-3)
    assert found.facts["last"] == found.curve[-1]
    assert found.facts["layers"] == ["spare", "head", "second", "norm", "first", ""]


def test_a_layer_that_does_not_matter_changes_nothing(net):
    found = score("mprt:order=independent,steps=0,how=normal", net, "toy-gradient")
    same = dict(zip(found.facts["layers"], found.curve, strict=True))
    assert same["spare"] == pytest.approx(1, abs=1e-9)
    assert same[""] == pytest.approx(1, abs=1e-9)  # ones of no spread stay ones
    assert all(same[name] < 0.99 for name in ("first", "norm", "second", "head"))


def test_fewer_steps_are_points_of_the_whole_curve(net):
    for order in ("top-down", "bottom-up"):
        whole = score(f"mprt:steps=0,order={order}", net, "toy-gradient")
        some = score(f"mprt:steps=3,order={order}", net, "toy-gradient")
        by_layer = dict(zip(whole.facts["layers"], whole.curve, strict=True))
        assert len(some.curve) == 3
        np.testing.assert_array_equal(
            some.curve, [by_layer[name] for name in some.facts["layers"]]
        )
        assert some.facts["last"] == whole.facts["last"]


@pytest.mark.parametrize("by", ["constant", "centre", "edges", "random"])
def test_what_does_not_look_at_the_network_fails(net, by):
    assert score("mprt", net, by).value == pytest.approx(1)
    assert score(
        "mprt:order=independent,similarity=ssim", net, by
    ).value == pytest.approx(1)
    assert score("random-logit", net, by).value == pytest.approx(1)
    if by != "constant":
        assert score("emprt", net, by).value == 0


def as_quantus_draws(monkeypatch, seed):
    """Quantus seeds torch anew before every layer; the numbers are then the same."""

    def randomise(part, name, how, _seed):
        if hasattr(part, "reset_parameters"):
            torch.manual_seed(seed + 1)
            part.reset_parameters()

    monkeypatch.setattr(sanity, "randomise", randomise)


def plain_net():
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
    ]
    return network(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    )


def products(model, inputs, targets, **_):
    """`Product` as Quantus asks for explanations: (n, 1, h, w)."""
    pixels = torch.as_tensor(inputs, dtype=torch.float32).requires_grad_()
    outputs = model(pixels)
    outputs[torch.arange(len(pixels)), torch.as_tensor(targets)].sum().backward()
    return (pixels.grad * (pixels.detach() - 0.5)).sum(dim=1, keepdim=True).numpy()


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
def test_mprt_is_quantus_layer_by_layer(monkeypatch, order):
    model = plain_net()
    view, explanation = explained(model, "toy-product")
    as_quantus_draws(monkeypatch, 42)
    found = registry.metrics.build(
        f"mprt:steps=0,order={order.replace('_', '-')}"
    ).score(model, view, explanation)
    peer = quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_spearman,
        layer_order=order,
        seed=42,
        normalise=False,
        abs=False,
        disable_warnings=True,
        return_average_correlation=False,
        return_last_correlation=False,
    )
    theirs = peer(
        model=copy.deepcopy(model.module).eval(),
        x_batch=view.pixels.numpy(),
        y_batch=np.array([1]),
        explain_func=products,
        channel_first=True,
    )
    theirs = {
        name: scores[0] for name, scores in theirs.items() if name != "original"
    }
    assert list(theirs) == found.facts["layers"]
    np.testing.assert_allclose(found.curve, list(theirs.values()), atol=1e-5)


def test_efficient_mprt_is_quantus(monkeypatch):
    model = plain_net()
    view, explanation = explained(model, "toy-product")
    as_quantus_draws(monkeypatch, 42)
    found = registry.metrics.build("emprt").score(model, view, explanation)
    peer = quantus.EfficientMPRT(
        complexity_func=quantus.complexity_func.discrete_entropy,
        complexity_func_kwargs={"n_bins": 100},
        layer_order="bottom_up",
        seed=42,
        normalise=False,
        abs=False,
        disable_warnings=True,
        skip_layers=True,
    )
    theirs = peer(
        model=copy.deepcopy(model.module).eval(),
        x_batch=view.pixels.numpy(),
        y_batch=np.array([1]),
        explain_func=products,
        channel_first=True,
        softmax=True,
    )
    assert found.value == pytest.approx(theirs[0], rel=1e-3)


def test_entropy_of_a_histogram_by_hand():
    values = np.array(
        [[0.0, 0.0, 0.9], [3.1, 4.0, 2.9]]
    )  # quarters of [0, 4]: three, none, one, two
    p = np.array([3, 1, 2]) / 6
    assert sanity.histogram_entropy(values, 4) == pytest.approx(
        -(p * np.log(p)).sum()
    )
    assert sanity.histogram_entropy(-5 * values + 2, 4) != 0
    assert sanity.histogram_entropy(5 * values + 2, 4) == pytest.approx(
        sanity.histogram_entropy(values, 4)
    )
    assert sanity.histogram_entropy(np.ones((3, 3)), 4) == 0


def test_efficient_mprt_keeps_what_the_model_lost(net):
    facts = score("emprt", net, "toy-gradient").facts
    view = net.view(planted_image())
    p = net.logits(view.pixels).softmax(dim=1).detach().double().numpy()[0]
    assert facts["model_before"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    assert facts["model_after"] != facts["model_before"]
    with pytest.raises(NotApplicable, match="flat"):
        score("emprt", net, "constant")


def test_smooth_mprt_without_noise_is_mprt(net):
    plain = score("mprt:steps=3", net, "toy-gradient")
    smooth = score("smooth-mprt:steps=3,noise=0,samples=2", net, "toy-gradient")
    np.testing.assert_allclose(smooth.curve, plain.curve, atol=1e-6)


def test_smooth_mprt_compares_means_over_noise(net):
    view, explanation = explained(net, "toy-product")
    found = registry.metrics.build(
        "smooth-mprt:steps=1,samples=3,noise=.2,seed=4"
    ).score(net, view, explanation)
    random = copy.deepcopy(net.module)
    for name in ("first", "norm", "second", "head", "spare"):
        sanity.randomise(random.get_submodule(name), name, "reset", 4)
    means = []
    for module in (net.module.eval(), random.eval()):
        total = 0
        for number in range(3):
            noise = 0.2 * np.random.default_rng([4, number]).standard_normal(
                (1, 3, 16, 16)
            )
            pixels = (view.pixels + torch.tensor(noise, dtype=torch.float32)).clamp(
                0, 1
            )
            total = total + products(module, pixels, [1])[0, 0]
        means.append(total / 3)
    assert found.value == pytest.approx(
        stats.spearmanr(means[0].ravel(), means[1].ravel()).statistic, abs=1e-3
    )


# ---- another class


class Linear(nn.Module):
    """Logits linear in the pixels: the gradient of a class is its weights, whatever the
    image.
    """

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, bias=False)  # a layer that gives a map
        self.head = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return self.head(self.mix(x).flatten(1))


def test_random_logit_of_a_linear_model_compares_its_weights():
    model = network(Linear())
    found = score("random-logit:similarity=cosine", model, "toy-gradient", target=2)
    mix, head = (
        model.module.mix.weight.detach().double()[:, :, 0, 0],
        model.module.head.weight.detach().double(),
    )
    maps = (
        torch.einsum("kchw,ci->khw", head.view(4, 3, 16, 16), mix).flatten(1).numpy()
    )

    def cosine(a, b):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    assert sorted(found.facts["classes"]) == [0, 1, 3]
    expected = [cosine(maps[2], maps[other]) for other in found.facts["classes"]]
    np.testing.assert_allclose(found.curve, expected, atol=1e-5)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-5)


def test_random_logit_draws_classes_the_same_for_every_method(net):
    drawn = [
        score("random-logit:classes=2", net, by).facts["classes"]
        for by in ("gradcam", "toy-gradient", "centre")
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 2
    assert 1 not in drawn[0]
    others = [
        score(f"random-logit:classes=2,seed={seed}", net, "centre").facts["classes"]
        for seed in range(6)
    ]
    assert len({tuple(one) for one in others}) > 1


def test_a_method_blind_to_the_class_fails_and_one_that_sees_it_does_not(net):
    assert score("random-logit", net, "eigencam").value == pytest.approx(1)
    assert score("random-logit:similarity=pearson", net, "hirescam").value < 0.9


def test_random_logit_works_on_black_boxes_and_mprt_does_not():
    rng = np.random.default_rng(0)
    weights = torch.tensor(rng.normal(size=(4, 3 * 16 * 16)), dtype=torch.float32)
    model = wrap_callable(
        lambda pixels: pixels.flatten(1) @ weights.T, size=16, outputs="logits"
    )
    view, explanation = explained(model, "occlusion:window=4,stride=4")
    assert (
        -1
        <= registry.metrics.build("random-logit")
        .score(model, view, explanation)
        .value
        < 0.9
    )
    for name in ("mprt", "smooth-mprt", "emprt"):
        with pytest.raises(NotApplicable, match="only scores images"):
            registry.metrics.build(name).score(model, view, explanation)


def test_random_logit_needs_another_class(net):
    view, explanation = explained(net, "gradcam")
    alone = network(
        nn.Sequential(
            nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1)
        ),
        classes=1,
        outputs="values",
    )
    with pytest.raises(NotApplicable, match="one class"):
        score("random-logit", alone, "gradcam", target=0)

    class Difference:
        index, name, score = None, "class 1 - class 0", "logit"

        def of(self, outputs):
            return outputs[:, 1] - outputs[:, 0]

    with pytest.raises(NotApplicable, match="is not a class of the model"):
        registry.metrics.build("random-logit").score(
            net, view, replace(explanation, target=Difference())
        )


# ---- the user's model


def state(module):
    hooks = [
        (
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            len(part._backward_hooks),
        )
        for part in module.modules()
    ]
    grads = [parameter.grad is None for parameter in module.parameters()]
    return (
        hooks,
        grads,
        [part.training for part in module.modules()],
        [t.numpy().tobytes() for t in tensors(module).values()],
    )


@pytest.mark.parametrize("spec", NAMES)
def test_the_users_network_is_not_touched(net, spec):
    net.module.train()
    net.module.norm.eval()
    before = state(net.module)
    first, second = (score(spec, net, "gradcam") for _ in range(2))
    assert state(net.module) == before
    assert first.value == second.value
    low, high = registry.metrics.get(spec.partition(":")[0]).bounds
    assert low <= first.value <= high


def test_nor_where_explaining_fails(net):
    view, explanation = explained(net, "toy-fails")
    before = state(net.module)
    for name in ("mprt", "emprt"):
        with pytest.raises(RuntimeError, match="on purpose"):
            registry.metrics.build(name).score(net, view, explanation)
    assert state(net.module) == before


@pytest.mark.parametrize(
    "spec", ["mprt:similarity=ssim", "random-logit:similarity=spearman"]
)
def test_the_line_of_chance_stands_beside_the_similarity(net, spec):
    found = score(spec, net, "toy-gradient")
    assert found.facts["random_sd"] > 0
    assert abs(found.facts["random"]) < 4 * found.facts["random_sd"]
    assert found.facts["similarity"] in spec


@pytest.mark.parametrize("similarity", ["pearson", "cosine", "ssim", "iou-at-20"])
@pytest.mark.parametrize("magnitude", ["true", "false"])
def test_every_similarity_can_be_asked_for(net, similarity, magnitude):
    """The value is that similarity of the two maps, made apart."""
    view, explanation = explained(net, "toy-product")
    spec = f"random-logit:classes=1,similarity={similarity},magnitude={magnitude}"
    found = registry.metrics.build(spec).score(net, view, explanation)
    other = api.explain(
        net, planted_image(), "toy-product", target=found.facts["classes"][0]
    ).values
    assert found.value == pytest.approx(
        alike(explanation.values, other, similarity, magnitude == "true"), abs=1e-6
    )


@pytest.mark.parametrize(
    "spec",
    [
        "mprt:steps=-1",
        "mprt:seed=-1",
        "mprt:order=sideways",
        "mprt:similarity=likeness",
        "mprt:how=zero",
        "smooth-mprt:samples=0",
        "smooth-mprt:noise=-1",
        "emprt:bins=1",
        "emprt:seed=-1",
        "random-logit:classes=0",
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        registry.metrics.build(spec)


def test_a_network_without_weights_cannot_be_made_random():
    class Bare(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    model = network(Bare(), classes=3)
    view = model.view(planted_image())
    with pytest.raises(NotApplicable, match="no weights"):
        list(sanity.stages(model, view, "top-down", 4, "reset", 0))


def test_the_line_of_chance_compares_as_the_metric_does(net):
    """Absolute values of noise are alike otherwise than signed ones."""
    from consilience.metrics.explained_again import alike, in_frame

    found = {
        magnitude: score(f"random-logit:magnitude={magnitude}", net, "toy-gradient")
        for magnitude in ("true", "false")
    }
    view, explanation = explained(net, "toy-gradient")
    for magnitude, one in found.items():
        similar = []
        for seed in range(1000, 1010):
            control = registry.explainers.build(f"random:seed={seed}")
            noise = in_frame(
                control.explain(None, view, explanation.target), view, control
            )
            similar.append(
                alike(explanation.values, noise, "ssim", magnitude == "true")
            )
        assert one.facts["random"] == pytest.approx(np.mean(similar), abs=1e-6)
        assert one.facts["random_sd"] == pytest.approx(
            np.std(similar, ddof=1), abs=1e-6
        )
    assert found["true"].facts["random"] != found["false"].facts["random"]
