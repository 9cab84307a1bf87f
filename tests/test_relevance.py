"""LRP, excitation backpropagation, DeepLIFT, guided backpropagation, deconvnet: by
hand, against libraries, and refused.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import consilience as cs
from consilience import api
from consilience.types import ConsilienceError, NotApplicable, Sample

SIDE = 4


class Modules(nn.Module):
    """Two convolutions and a linear layer, every ReLU a module of its own."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(11)
        self.one = nn.Conv2d(3, 5, 2, stride=2, bias=bias)
        self.act1 = nn.ReLU()
        self.two = nn.Conv2d(5, 6, 1, bias=bias)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(24, 3, bias=bias)

    def forward(self, x):
        return self.head(self.act2(self.two(self.act1(self.one(x)))).flatten(1))


class Functional(Modules):
    def forward(self, x):
        x = functional.relu(self.one(x), inplace=True)
        return self.head(torch.relu_(self.two(x)).flatten(1))


class Reused(Modules):
    def forward(self, x):
        act = self.act1
        act.inplace = True
        return self.head(torch.flatten(act(self.two(act(self.one(x)))), 1))


class Methods(Modules):
    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu_().reshape(x.shape[0], -1))


SPELLED = (Modules, Functional, Reused, Methods)


def wrapped(module, size=SIDE, **options):
    return cs.wrap(
        module.eval(),
        mean=(0.4, 0.4, 0.4),
        std=(0.3, 0.3, 0.3),
        size=size,
        engine="torch",
        **options,
    )


def image(size=SIDE, seed=0):
    return Sample(
        f"p{seed}",
        np.random.default_rng(seed)
        .integers(0, 256, (size, size, 3))
        .astype(np.uint8),
    )


def taken(model, sample):
    return model.recipe.normalised(model.view(sample).pixels)


def close(got, expected, rtol=1e-4):
    np.testing.assert_allclose(
        got, expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )


# ---- by hand, in slow loops


def dense(conv, side):
    """A convolution as a matrix (outputs, inputs) and what it adds to each output."""
    cells = conv.in_channels * side * side
    with torch.no_grad():
        zero = conv(torch.zeros(1, conv.in_channels, side, side)).flatten()
        rows = [
            conv(torch.eye(cells)[i].reshape(1, -1, side, side)).flatten() - zero
            for i in range(cells)
        ]
    return torch.stack(rows, dim=1).double().numpy(), zero.double().numpy()


def back(z, bias, relevance, eps=1e-6):
    """``R_j = sum_k z_kj / (sum_j z_kj + b_k) R_k``, the sum moved by eps away from 0."""
    found = np.zeros(z.shape[1])
    for k in range(z.shape[0]):
        total = z[k].sum() + bias[k]
        total += eps * (1 if total >= 0 else -1)
        for j in range(z.shape[1]):
            found[j] += z[k, j] / total * relevance[k]
    return found


def by_hand(module, x, index, composite, bias="ignored", gamma=0.25):
    keep = 1.0 if bias == "absorbs" else 0.0
    one, bias1 = dense(module.one, SIDE)
    two, bias2 = dense(module.two, 2)
    head, bias3 = (
        module.head.weight.detach().double().numpy(),
        module.head.bias.detach().double().numpy(),
    )
    x = x.flatten().double().numpy()
    a1 = np.maximum(one @ x + bias1, 0)
    a2 = np.maximum(two @ a1 + bias2, 0)
    top = np.zeros(3)
    top[index] = (head @ a2 + bias3)[index]
    at2 = back(head * a2, keep * bias3, top)
    up = lambda w: np.maximum(w, 0)  # noqa: E731
    if composite == "epsilon-gamma-box":
        at1 = back(
            (two + gamma * up(two)) * a1, keep * (bias2 + gamma * up(bias2)), at2
        )
        low, high = (np.full(x.shape, (edge - 0.4) / 0.3) for edge in (0.0, 1.0))
        # b - b+ - b- is nothing: the box rule has no bias.
        return back(one * x - up(one) * low + up(-one) * high, 0 * bias1, at1)

    def rule(w, a, b, relevance):
        plus, minus = up(w * a), -up(-w * a)
        if "alpha2" in composite:
            return 2 * back(plus, keep * up(b), relevance) - back(
                minus, -keep * up(-b), relevance
            )
        return back(plus, keep * up(b), relevance)

    at1 = rule(two, a1, bias2, at2)
    if composite.endswith("flat"):
        return back((one != 0).astype(float), 0 * bias1, at1)
    return rule(one, x, bias1, at1)


@pytest.mark.parametrize("bias", ["ignored", "absorbs"])
@pytest.mark.parametrize(
    "composite",
    [
        "epsilon-plus",
        "epsilon-plus-flat",
        "epsilon-gamma-box",
        "epsilon-alpha2-beta1",
        "epsilon-alpha2-beta1-flat",
    ],
)
@pytest.mark.parametrize("kind", [Modules, Functional])
def test_lrp_by_hand(kind, composite, bias):
    if bias == "absorbs" and composite.endswith("flat"):
        pytest.skip("zennit's flat rule has a bias of its own")
    model, sample = wrapped(kind()), image()
    made = api.explain(
        model, sample, f"lrp:composite={composite},bias={bias}", target=1
    )
    expected = (
        by_hand(model.module, taken(model, sample), 1, composite, bias)
        .reshape(3, SIDE, SIDE)
        .sum(axis=0)
    )
    close(made.values, expected)
    assert made.provenance["relevance"] == pytest.approx(expected.sum(), rel=1e-4)


def test_excitation_by_hand():
    model, sample = wrapped(Functional()), image()
    one, bias1 = dense(model.module.one, SIDE)
    two, bias2 = dense(model.module.two, 2)
    x = taken(model, sample).flatten().double().numpy()
    a1 = np.maximum(one @ x + bias1, 0)
    a2 = np.maximum(two @ a1 + bias2, 0)
    won = np.array([0.0, 0.0, 1.0])
    for weights, given in (
        (model.module.head.weight.detach().double().numpy(), a2),
        (two, a1),
        (one, x),
    ):
        won = back(np.maximum(weights * given, 0), np.zeros(len(weights)), won)
    made = api.explain(model, sample, "excitation-backprop", target=2)
    close(made.values, won.reshape(3, SIDE, SIDE).sum(axis=0))
    assert made.provenance["conservation"] == pytest.approx(1, abs=1e-3)


def test_deeplift_by_hand():
    """Multipliers by the rescale rule, from the differences of every activation."""
    model, sample = wrapped(Functional()), image()
    module = model.module
    x, other = taken(model, sample), torch.zeros(1, 3, SIDE, SIDE)
    one, bias1 = dense(module.one, SIDE)
    two, bias2 = dense(module.two, 2)
    pair = [values.flatten().double().numpy() for values in (x, other)]
    z1 = [one @ values + bias1 for values in pair]
    z2 = [two @ np.maximum(z, 0) + bias2 for z in z1]
    slope = [
        (np.maximum(z[0], 0) - np.maximum(z[1], 0)) / (z[0] - z[1]) for z in (z1, z2)
    ]
    head = (
        module.head.weight.detach().double().numpy()[0]
        - module.head.weight.detach().double().numpy()[2]
    )
    multipliers = ((head * slope[1]) @ two * slope[0]) @ one
    made = api.explain(model, sample, "deeplift", target="difference:0,2")
    close(
        made.values,
        (multipliers * (pair[0] - pair[1])).reshape(3, SIDE, SIDE).sum(axis=0),
    )
    assert made.provenance["completeness_share"] < 1e-4


# ---- however it is written

METHODS = (
    "lrp",
    "lrp:composite=epsilon-gamma-box",
    "excitation-backprop",
    "deeplift",
    "guided-backprop",
    "deconvnet",
)


@pytest.mark.parametrize("by", METHODS)
def test_functional_reused_and_in_place_relus_give_the_same(by):
    maps = [
        api.explain(wrapped(kind()), image(), by, target=1).values for kind in SPELLED
    ]
    assert maps[0].any()
    for other in maps[1:]:
        close(other, maps[0], rtol=1e-5)


def test_zennit_alone_does_not_see_functions():
    """What this guards against: an addition and a pooling without rules go back as
    gradients do.
    """
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat

    def alone(model, sample):
        score = float(model.logits(model.view(sample).pixels)[0, 1].detach())
        with Gradient(
            model=copy.deepcopy(model.module),
            composite=EpsilonPlusFlat(zero_params=["bias"]),
        ) as attributor:
            _, relevance = attributor(
                taken(model, sample).requires_grad_(), torch.eye(3)[[1]] * score
            )
        return relevance.sum(dim=1)[0].detach().numpy(), score

    clean = wrapped(Modules()), image()
    close(
        alone(*clean)[0],
        api.explain(*clean, "lrp:bias=ignored", target=1).values,
        rtol=1e-3,
    )
    block = wrapped(Block(), 12), image(12)
    theirs, score = alone(*block)
    assert abs(theirs.sum() / score - 1) > 0.2
    ours = api.explain(*block, "lrp:bias=ignored", target=1).values
    assert ours.sum() == pytest.approx(score, rel=5e-3)


@pytest.mark.parametrize(
    ("by", "captums"),
    [
        ("guided-backprop:channels=sum", "GuidedBackprop"),
        ("deconvnet:channels=sum", "Deconvolution"),
        ("deeplift", "DeepLift"),
    ],
)
def test_captum_says_the_same_of_modules(by, captums):
    import captum.attr

    model, sample = wrapped(Modules()), image()
    given = taken(model, sample).requires_grad_()
    theirs = getattr(captum.attr, captums)(copy.deepcopy(model.module)).attribute(
        given, target=1
    )
    if by != "deeplift":
        theirs = theirs / 0.3  # theirs by what the network takes, ours by pixels
    close(
        api.explain(model, sample, by, target=1).values,
        theirs.sum(dim=1)[0].detach().numpy(),
    )


class Block(nn.Module):
    """A residual block with batch norms, one ReLU for all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.again = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)
        for norm in (self.norm, self.again):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        out = self.again(self.conv(x))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


def test_a_residual_block_conserves():
    model, sample = wrapped(Block(), 12), image(12)
    for by in (
        "lrp:bias=ignored",
        "lrp:composite=epsilon-gamma-box,bias=ignored",
        "excitation-backprop",
    ):
        assert api.explain(model, sample, by, target=1).provenance[
            "conservation"
        ] == pytest.approx(1, abs=5e-3)
    made = api.explain(model, sample, "deeplift", target=1)
    assert made.provenance["completeness_share"] < 1e-3
    view = model.view(sample)
    with torch.no_grad():
        scores = [
            float(model.module(x)[0, 1])
            for x in (taken(model, sample), torch.zeros(1, 3, 12, 12))
        ]
    assert made.values.sum() == pytest.approx(scores[0] - scores[1], rel=1e-3)
    assert view.pixels.grad is None


def test_torchvisions_resnet_as_zennit_canonizes_it():
    from torchvision.models import resnet18
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    torch.manual_seed(0)
    module = resnet18(num_classes=5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.bias, std=0.1)
    model, sample = wrapped(module, 32), image(32)
    score = float(model.logits(model.view(sample).pixels)[0, 2].detach())
    composite = EpsilonPlusFlat(canonizers=[ResNetCanonizer()])
    with Gradient(model=copy.deepcopy(module), composite=composite) as attributor:
        _, theirs = attributor(
            taken(model, sample).requires_grad_(), torch.eye(5)[[2]] * score
        )
    close(
        api.explain(model, sample, "lrp", target=2).values,
        theirs.sum(dim=1)[0].detach().numpy(),
        rtol=1e-3,
    )
    with pytest.raises(NotApplicable, match="max pooling whose windows overlap"):
        api.explain(model, sample, "deeplift", target=2)


@pytest.mark.parametrize(("side", "step", "adds_up"), [(2, 2, True), (3, 1, False)])
def test_captum_loses_contributions_where_windows_overlap(side, step, adds_up):
    """Why they are refused: of several windows with the same maximum one is counted."""
    from captum.attr import DeepLift

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(side, step), nn.Flatten(), nn.LazyLinear(2)
    )
    pixels = torch.rand(1, 3, 16, 16)
    change = (module(pixels) - module(torch.zeros_like(pixels)))[0, 1]
    found = DeepLift(module).attribute(pixels, torch.zeros_like(pixels), target=1)
    assert (abs(float(found.sum() - change)) < 1e-3 * abs(float(change))) == adds_up


def test_relu6_is_rescaled():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(inplace=True), nn.Flatten(), nn.Linear(32, 2)
    )
    with torch.no_grad():
        module[0].weight *= 12
    model = wrapped(module)
    assert (
        api.explain(model, image(), "deeplift", target=1).provenance[
            "completeness_share"
        ]
        < 1e-4
    )


class Before(nn.Module):
    """An activation before the addition: what it is given goes round it, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 6, 1),
            nn.Linear(24, 2),
        )
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.conv(self.act(x))).flatten(1))


def test_deeplift_where_what_a_relu_is_given_is_read_elsewhere():
    import captum.attr

    model, sample = wrapped(Before()), image()
    made = api.explain(model, sample, "deeplift", target=1)
    assert made.provenance["completeness_share"] < 1e-4
    given = taken(model, sample).requires_grad_()
    _, delta = captum.attr.DeepLift(copy.deepcopy(model.module)).attribute(
        given, target=1, return_convergence_delta=True
    )
    assert (
        abs(float(delta[0])) > 0.05 * abs(made.values).max()
    )  # captum alone, on the same modules, does not add up


# ---- other targets


def test_relevance_of_a_difference_is_the_difference():
    model, sample = wrapped(Functional()), image()
    for by in ("lrp", "excitation-backprop", "deeplift"):
        one, two, both = (
            api.explain(model, sample, by, target=goal).values
            for goal in (0, 2, "difference:0,2")
        )
        close(both, one - two)


def test_relevance_of_a_unit(red_model, planted):
    made = api.explain(
        red_model, planted, "lrp:composite=epsilon-plus", target="unit:mix,0"
    )
    whole = api.explain(
        red_model, planted, "lrp:composite=epsilon-plus", target="red"
    )
    assert made.values.sum() == pytest.approx(made.provenance["score"], rel=1e-3)
    close(
        20 * made.values, whole.values
    )  # the class is twenty times the unit, after a ReLU that does nothing
    lifted = api.explain(red_model, planted, "deeplift", target="unit:mix,0")
    assert lifted.provenance["completeness_share"] < 1e-4


def test_no_start(red_model, planted, tmp_path):
    np.save(tmp_path / "v.npy", np.ones(4))
    with pytest.raises(NotApplicable, match="is neither"):
        api.explain(
            red_model, planted, "lrp", target=f'cosine:"{tmp_path / "v.npy"}"'
        )
    from consilience.types import ClassTarget

    with pytest.raises(NotApplicable, match="is not a weighted sum of outputs"):
        api.explain(
            red_model, planted, "lrp", target=ClassTarget(1, "red", "probability")
        )


# ---- refusals


class Gated(Modules):
    def forward(self, x):
        x = self.act1(self.one(x))
        return self.head(self.two(x * x.mean((2, 3), keepdim=True)).flatten(1))


class Branching(Modules):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def replaced(part, name="act2"):
    module = Modules()
    setattr(module, name, part)
    return module


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


REFUSED = {
    "silu": (lambda: replaced(nn.SiLU()), "no rule for SiLU"),
    "gelu": (lambda: replaced(nn.GELU()), "no rule for GELU"),
    "norm": (lambda: replaced(nn.GroupNorm(1, 6)), "no rule for GroupNorm"),
    "softmax": (
        lambda: nn.Sequential(Modules(), nn.Softmax(dim=1)),
        "no rule for Softmax",
    ),
    "gate": (Gated, "no rule for the operation mul"),
    "branching": (Branching, "cannot be written out as modules"),
    "attention": (
        Attending,
        "no rule for MultiheadAttention|takes more than an image",
    ),
}


@pytest.mark.parametrize("by", ["lrp", "excitation-backprop", "deeplift"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name, by):
    make, why = REFUSED[name]
    with pytest.raises(NotApplicable, match=why):
        api.explain(wrapped(make()), image(), by, target=1)


def test_no_relu_no_guide():
    model = wrapped(
        nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2))
    )
    for by in ("guided-backprop", "deconvnet"):
        with pytest.raises(NotApplicable, match="made of ReLUs"):
            api.explain(model, image(), by)


def test_options_out_of_range():
    for by in ("lrp:epsilon=0", "lrp:gamma=-1"):
        with pytest.raises(
            ConsilienceError,
            match=r"epsilon must be above 0|gamma must be at least 0",
        ):
            api.explain(wrapped(Modules()), image(), by)


def test_relevance_that_is_lost_is_said():
    """A linear layer of negative products alone excites nothing below: the probability
    has nowhere to go.
    """
    module = Modules(bias=False)
    with torch.no_grad():
        module.head.weight.abs_().neg_()
    made = api.explain(wrapped(module), image(), "excitation-backprop", target=1)
    assert not made.values.any()
    assert made.provenance["conservation"] == 0
    assert any(
        "0 of 1 of relevance arrives" in note for note in made.provenance["notes"]
    )


class Cancelling(Modules):
    """Two branches that all but cancel, one of which holds what it is sent."""

    def __init__(self):
        super().__init__(bias=False)
        self.minus = nn.Conv2d(5, 5, 1, bias=False)
        with torch.no_grad():
            self.minus.weight.copy_(-(1 - 1e-4) * torch.eye(5)[:, :, None, None])

    def forward(self, x):
        x = self.act1(self.one(x))
        return self.head(self.act2(self.two(x + self.minus(x))).flatten(1))


def test_relevance_that_explodes_is_refused():
    with pytest.raises(NotApplicable, match="it explodes on the way"):
        api.explain(wrapped(Cancelling()), image(), "excitation-backprop", target=1)
