"""Every class activation map against its paper's formula in loops, and against
pytorch-grad-cam where that is right.
"""

import copy
import subprocess
import sys

import numpy as np
import oracles_cam as oracle
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from consilience import api
from consilience.explainers.cam_gradient_free import channel_masks
from consilience.explainers.fullgrad import Biases, FullGrad
from consilience.explainers.guided import GuidedReLUs, guided_gradients
from consilience.models.load import load_model
from consilience.models.network import TorchNetwork, wrap
from consilience.types import ConsilienceError, NotApplicable, Sample

# ---- a small network with everything awkward in it

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CLASSES = tuple("abcde")


class OddNet(nn.Module):
    """In-place and functional ReLUs, ReLU6, a residual, biases, and a layer `mid` (8,
    6, 6) with negative activations, one channel that is flat and not zero, and one
    that is zero.
    """

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.two = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.mid = nn.BatchNorm2d(8)
        self.three = nn.Conv2d(8, 8, 3, padding=1)
        self.six = nn.ReLU6(inplace=True)
        self.last = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(8, 7)
        self.head = nn.Linear(7, 5)
        for part in (self.norm, self.mid):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
        with torch.no_grad():
            self.mid.weight[3] = 0.0
            self.mid.bias[3] = 0.7
            self.mid.weight[5] = self.mid.bias[5] = 0.0
            self.three.weight *= 12

    def front(self, x):
        return self.mid(self.two(self.act(self.norm(self.one(x)))))

    def back(self, a):
        b = self.six(self.three(functional.relu(a))) + a
        b = functional.relu(self.last(b)).mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(b)))

    def forward(self, x):
        return self.back(self.front(x))


class Pooled(nn.Module):
    """Convolution, global average pooling and one linear layer, with negative
    activations.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean(dim=(2, 3)))


def network(kind, seed=0):
    torch.manual_seed(seed)
    model = wrap(
        kind().eval(),
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        size=12,
        name=kind.__name__,
    )
    return model.using(engine="torch")


@pytest.fixture(scope="module")
def odd():
    return network(OddNet)


def noise_image(seed=0, size=12):
    rng = np.random.default_rng(seed)
    return Sample(
        f"noise{seed}", rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def normalised(view, mean=MEAN, std=STD):
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))
    return (view.pixels - mean) / std


def grid_of(explanation):
    """The raw map at its own resolution."""
    return explanation.extras.get("grid", explanation.values)


class Twin:
    """The odd network in float64, cut by hand after `mid`: what the oracles ask."""

    def __init__(self, model, sample, target):
        self.net = copy.deepcopy(model.module).double()
        self.index = model.classes.index(target)
        self.image = normalised(model.view(sample)).double()
        with torch.no_grad():
            self.activations = self.net.front(self.image)[0].numpy()

    def of_layer(self, activations, probability=False):
        outputs = self.net.back(torch.as_tensor(activations)[None].clone())
        return (outputs.softmax(dim=1) if probability else outputs)[0, self.index]

    def of_image(self, image):
        with torch.no_grad():
            return float(
                self.net(torch.as_tensor(image)[None].clone())[0, self.index]
            )

    def number(self, activations):
        with torch.no_grad():
            return float(self.of_layer(activations))

    def chance(self, activations):
        with torch.no_grad():
            return float(self.of_layer(activations, probability=True))

    def gradients(self, image=None):
        with torch.no_grad():
            before = self.net.front(self.image if image is None else image)[0]
        before.requires_grad_()
        return torch.autograd.grad(self.of_layer(before), before)[0].numpy()


def in_threes(monkeypatch):
    """Three images a pass from now on."""
    monkeypatch.setattr(TorchNetwork, "batch", property(lambda self: 3))


def close(got, expected, rtol=2e-4):
    np.testing.assert_allclose(
        got, expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )


# ---- gradient CAMs against their formulas

FORMULAS = {
    "gradcam": oracle.gradcam,
    "gradcam++": oracle.gradcam_plus_plus,
    "xgradcam": oracle.xgradcam,
    "hirescam": oracle.hirescam,
    "gradcam-elementwise": oracle.gradcam_elementwise,
    "layercam": oracle.layercam,
    "eigencam": lambda activations, gradients: oracle.eigen(activations),
    "eigengradcam": lambda activations, gradients: oracle.eigen(
        activations * gradients
    ),
    "eigencam:centre=true": lambda activations, gradients: oracle.eigen(
        activations, centre=True
    ),
    "eigengradcam:centre=true": lambda activations, gradients: oracle.eigen(
        activations * gradients, centre=True
    ),
}


@pytest.mark.parametrize("target", ["a", "d"])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_cam_is_its_formula(odd, name, target):
    sample = noise_image()
    twin = Twin(odd, sample, target)
    assert twin.activations.min() < 0
    expected = FORMULAS[name](twin.activations, twin.gradients())
    both = name + ("," if ":" in name else ":") + "layer=mid,relu={}"
    close(
        grid_of(api.explain(odd, sample, both.format("false"), target=target)),
        expected,
    )
    close(
        grid_of(api.explain(odd, sample, both.format("true"), target=target)),
        np.maximum(expected, 0),
    )


@pytest.mark.parametrize(
    "name", ["gradcam++", "xgradcam", "hirescam", "gradcam-elementwise", "layercam"]
)
def test_gradient_cam_is_its_formula_on_the_red_model(red_model, planted, name):
    twin = copy.deepcopy(red_model.module).double()
    with torch.no_grad():
        pooled = twin.pool(
            twin.act(twin.colours(red_model.view(planted).pixels.double()))
        )
        activations = twin.last(twin.mix(pooled))[0].numpy()
    gradients = np.broadcast_to(
        twin.head.weight[1].detach().numpy()[:, None, None] / 64, activations.shape
    )
    explanation = api.explain(
        red_model, planted, f"{name}:layer=last,relu=false", target="red"
    )
    close(grid_of(explanation), FORMULAS[name](activations, gradients))


def test_gradcam_plus_plus_by_hand():
    """One channel A = (1 2; 3 4), S = sum A = 10, gradients g = (1 2; -1 0).

    alpha = g^2 / (2 g^2 + 10 g^3) = 1 / (2 + 10 g): 1/12, 1/22, (not needed, relu(g) =
    0), 0. w = 1/12 * 1 + 1/22 * 2 = 1/12 + 1/11 = 23/132, and the map is w A.
    """
    from consilience.explainers.cam import GradCAMPlusPlus

    activations = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    gradients = torch.tensor([[[[1.0, 2.0], [-1.0, 0.0]]]])
    got = GradCAMPlusPlus().map(activations, gradients)
    np.testing.assert_allclose(got[0], 23 / 132 * activations[0, 0], rtol=1e-6)


def test_gradcam_plus_plus_does_not_fade_with_small_gradients():
    """alpha = 1 / (2 + g S): as g goes to 0 the map goes to the mean of relu(g) / 2,
    not to 0 as with a constant added.
    """
    from consilience.explainers.cam import GradCAMPlusPlus

    activations, gradients = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4) * 1e-12
    expected = torch.einsum(
        "nc,nchw->nhw", gradients.sum(dim=(2, 3)) / 2, activations
    )
    torch.testing.assert_close(
        GradCAMPlusPlus().map(activations, gradients), expected, rtol=1e-5, atol=0
    )


def test_gradcam_plus_plus_says_where_it_is_unstable(odd):
    """S = -2 and g = 1: the denominator 2 g^2 + g^3 S is 0."""
    from consilience.explainers.cam import GradCAMPlusPlus

    activations = torch.full((1, 1, 1, 2), -1.0)
    gradients = torch.tensor([[[[1.0, 3.0]]]])
    assert GradCAMPlusPlus().notes(activations, gradients) == {"unstable_share": 0.5}
    assert torch.isfinite(GradCAMPlusPlus().map(activations, gradients)).all()
    facts = api.explain(
        odd, noise_image(), "gradcam++:layer=act+mid", target="a"
    ).provenance
    assert set(facts["unstable_share"]) == {"act", "mid"}


def test_smooth_gradcam_plus_plus_is_its_formula(odd, monkeypatch):
    sample = noise_image()
    view, twin = odd.view(sample), Twin(odd, sample, "b")
    generator = torch.Generator().manual_seed(5)
    copies = []
    for _ in range(4):
        noisy = view.pixels + 0.15 * torch.randn(3, 12, 12, generator=generator)
        copies.append(
            twin.gradients(
                (
                    (noisy - torch.tensor(MEAN).view(3, 1, 1))
                    / torch.tensor(STD).view(3, 1, 1)
                ).double()
            )
        )
    expected = oracle.smooth_gradcam_plus_plus(twin.activations, copies)
    spec = "smoothgradcam++:layer=mid,samples=4,noise=.15,seed=5,relu=false"
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)
    in_threes(monkeypatch)
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)


def test_smooth_gradcam_plus_plus_without_noise_is_gradcam_plus_plus(odd):
    sample = noise_image()
    smooth, plain = (
        api.explain(odd, sample, spec, target="b").values
        for spec in (
            "smoothgradcam++:layer=mid,samples=2,noise=0",
            "gradcam++:layer=mid",
        )
    )
    close(smooth, plain, rtol=1e-5)


# ---- CAM


def test_cam_is_the_class_weights_times_activations():
    model, sample = network(Pooled), noise_image()
    module = model.module
    with torch.no_grad():
        activations = module.conv(normalised(model.view(sample)))[0].double().numpy()
    expected = oracle.weighted_sum(
        module.head.weight[2].detach().double().numpy(), activations
    )
    assert expected.min() < 0
    explanation = api.explain(model, sample, "cam", target="c")
    close(grid_of(explanation), expected)
    close(
        grid_of(api.explain(model, sample, "gradcam:relu=false", target="c"))
        * expected.size,
        expected,
    )


def test_cam_adds_up_to_the_logit():
    model, sample = network(Pooled), noise_image()
    explanation = api.explain(model, sample, "cam", target="c")
    bias = model.module.head.bias[2].item()
    assert grid_of(explanation).mean() + bias == pytest.approx(
        explanation.provenance["score"], rel=1e-5
    )


def test_cam_is_refused_where_more_follows(odd):
    with pytest.raises(
        NotApplicable, match="global average pooling and one linear layer after 'mid'"
    ):
        api.explain(odd, noise_image(), "cam:mid", target="a")
    with pytest.raises(ConsilienceError, match="score is one of logit"):
        api.explain(odd, noise_image(), "cam:score=probability", target="a")


# ---- Score-CAM and its kin


@pytest.mark.parametrize("align", [False, True])
def test_scorecam_is_algorithm_1(odd, align):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    expected = oracle.scorecam(
        twin.activations, twin.image[0].numpy(), twin.of_image, align
    )
    spec = f"scorecam:layer=mid,relu=false,align_corners={str(align).lower()}"
    explanation = api.explain(odd, sample, spec, target="b")
    close(grid_of(explanation), expected)
    close(
        grid_of(
            api.explain(
                odd, sample, spec.replace("relu=false", "relu=true"), target="b"
            )
        ),
        np.maximum(expected, 0),
    )
    # Two flat channels share one image: 6 masks, the empty one, and the pass for the
    # activations.
    assert explanation.provenance["passes"] == 8
    assert explanation.provenance["left_out"] == 0


def test_scorecam_softmax_counts_every_flat_channel(odd):
    """Two of eight channels are flat; had their share in the softmax been one, the map
    would be another.
    """
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    scores = [
        twin.of_image(twin.image[0].numpy() * oracle.mask(c, (12, 12)))
        for c in twin.activations
    ]
    flat = [
        k
        for k, channel in enumerate(twin.activations)
        if channel.max() == channel.min()
    ]
    assert flat == [3, 5]
    once = np.delete(np.arange(8), 5)
    wrong = oracle.weighted_sum(
        oracle.softmax([scores[k] for k in once]), twin.activations[once]
    )
    got = grid_of(
        api.explain(odd, sample, "scorecam:layer=mid,relu=false", target="b")
    )
    close(got, oracle.weighted_sum(oracle.softmax(scores), twin.activations))
    assert np.abs(got - wrong).max() > 1e-2


def test_masks_run_from_0_to_1_after_enlarging():
    channels = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    channels[2] = 1 / 3  # flat, and rounding would make a mask of it
    masks = channel_masks(channels, (20, 20), False, 2)
    shown = functional.interpolate(masks.keep[:, None], (20, 20), mode="bilinear")[
        :, 0
    ]
    assert masks.row.tolist() == [0, 1, 4, 2, 3]
    for row, channel in zip(masks.row, channels, strict=True):
        np.testing.assert_allclose(
            shown[row], oracle.mask(channel.double().numpy(), (20, 20)), atol=1e-6
        )


def test_scorecam_fill_is_the_normalised_zero_or_what_is_asked(odd):
    sample = noise_image()
    view = odd.view(sample)
    assert view.neutral == MEAN
    neutral, colour, black = (
        api.explain(odd, sample, f"scorecam:layer=mid{fill}", target="b").values
        for fill in ("", ",fill=colour(.4+.5+.6)", ",fill=black")
    )
    np.testing.assert_array_equal(neutral, colour)
    assert np.abs(neutral - black).max() > 1e-3


def test_scorecam_of_the_strongest_channels(odd):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    strength = np.abs(twin.activations).sum(axis=(1, 2))
    best = sorted(np.argsort(-strength)[:3])
    expected = oracle.scorecam(
        twin.activations[best], twin.image[0].numpy(), twin.of_image
    )
    explanation = api.explain(
        odd, sample, "scorecam:layer=mid,channels=3,relu=false", target="b"
    )
    close(grid_of(explanation), expected)
    assert explanation.provenance["left_out"] == pytest.approx(
        1 - strength[best].sum() / strength.sum(), rel=1e-5
    )
    every = api.explain(odd, sample, "scorecam:layer=mid,channels=99", target="b")
    np.testing.assert_array_equal(
        every.values,
        api.explain(odd, sample, "scorecam:layer=mid", target="b").values,
    )


def test_iscam_is_its_formula(odd):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    expected = oracle.iscam(twin.activations, twin.image[0].numpy(), twin.of_image, 3)
    explanation = api.explain(
        odd, sample, "iscam:layer=mid,samples=3,relu=false", target="b"
    )
    close(grid_of(explanation), expected)
    assert explanation.provenance["passes"] == 1 + 3 * 7


def test_sscam_is_its_formula(odd, monkeypatch):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    generator = torch.Generator().manual_seed(4)
    fields = [
        0.3 * torch.randn(1, 12, 12, generator=generator)[0].double().numpy()
        for _ in range(3)
    ]
    expected = oracle.sscam_map(
        twin.activations, twin.image[0].numpy(), twin.of_image, fields
    )
    spec = "sscam:layer=mid,samples=3,noise=.3,seed=4,relu=false"
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)
    in_threes(monkeypatch)
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)


def test_sscam_on_the_image_is_its_formula(odd):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    generator = torch.Generator().manual_seed(4)
    std = np.array(STD)[:, None, None]
    fields = [
        0.3 * torch.randn(3, 12, 12, generator=generator).double().numpy() / std
        for _ in range(3)
    ]
    expected = oracle.sscam_image(
        twin.activations, twin.image[0].numpy(), twin.of_image, fields
    )
    spec = "sscam:layer=mid,samples=3,noise=.3,seed=4,on=image,relu=false"
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)


@pytest.mark.parametrize(
    "spec",
    [
        "iscam:samples=1",
        "sscam:samples=2,noise=0",
        "sscam:samples=2,noise=0,on=image",
    ],
)
def test_without_steps_or_noise_it_is_scorecam(odd, spec):
    sample = noise_image()
    got = api.explain(odd, sample, f"{spec},layer=mid", target="b").values
    close(
        got,
        api.explain(odd, sample, "scorecam:layer=mid", target="b").values,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "spec",
    [
        "scorecam:channels=-1",
        "iscam:samples=0",
        "sscam:samples=0",
        "sscam:noise=-1",
        "sscam:noise=nan",
    ],
)
def test_options_out_of_range_are_refused(odd, spec):
    with pytest.raises(ConsilienceError, match=spec.partition(":")[0]):
        api.explain(odd, noise_image(), spec, target="b")


# ---- Ablation-CAM and Recipro-CAM


@pytest.mark.parametrize("target", CLASSES)
def test_ablationcam_is_its_formula(odd, target):
    sample = noise_image()
    twin = Twin(odd, sample, target)
    expected = oracle.ablationcam(twin.activations, twin.number)
    explanation = api.explain(
        odd, sample, "ablationcam:layer=mid,relu=false", target=target
    )
    close(grid_of(explanation), expected, rtol=1e-3)
    assert explanation.provenance["tail"] == "split"


def test_ablationcam_has_the_same_sign_for_a_negative_score(odd):
    """Of the classes explained above some have a negative logit; a map that divides by
    it would be turned round.
    """
    sample = noise_image()
    scores = {name: Twin(odd, sample, name) for name in CLASSES}
    negative = [
        name for name, twin in scores.items() if twin.number(twin.activations) < 0
    ]
    assert negative
    twin = scores[negative[0]]
    lost = [
        twin.number(twin.activations)
        - twin.number(np.where(np.arange(8)[:, None, None] == k, 0, twin.activations))
        for k in range(8)
    ]
    got = grid_of(
        api.explain(
            odd, sample, "ablationcam:layer=mid,relu=false", target=negative[0]
        )
    )
    assert (
        np.corrcoef(got.ravel(), oracle.weighted_sum(lost, twin.activations).ravel())[
            0, 1
        ]
        > 0.999
    )


def test_ablationcam_of_pooling_and_a_linear_layer_is_closed():
    """There y - y_k = w_k mean(A_k), by hand."""
    model, sample = network(Pooled), noise_image()
    with torch.no_grad():
        activations = (
            model.module.conv(normalised(model.view(sample)))[0].double().numpy()
        )
        score = float(model.module(normalised(model.view(sample)))[0, 1])
    weights = (
        model.module.head.weight[1].detach().double().numpy()
        * activations.mean(axis=(1, 2))
        / abs(score)
    )
    explanation = api.explain(model, sample, "ablationcam:relu=false", target="b")
    close(grid_of(explanation), oracle.weighted_sum(weights, activations))
    assert explanation.provenance["tail"] == "closed"
    assert explanation.provenance["passes"] == 1


@pytest.mark.parametrize("gaussian", [False, True])
def test_reciprocam_is_its_formula(odd, gaussian, monkeypatch):
    sample = noise_image()
    twin = Twin(odd, sample, "b")
    expected = oracle.reciprocam(twin.activations, twin.chance, gaussian)
    spec = f"reciprocam:layer=mid,gaussian={str(gaussian).lower()}"
    explanation = api.explain(odd, sample, spec, target="b")
    assert explanation.target.score == "probability"
    close(grid_of(explanation), expected)
    in_threes(monkeypatch)
    close(grid_of(api.explain(odd, sample, spec, target="b")), expected)


def test_reciprocam_of_logits_behind_pooling_is_cam():
    """There a cell alone gives w . A / (h w) + b: CAM's map, scaled and shifted."""
    model, sample = network(Pooled), noise_image()
    cam, recipro = (
        grid_of(api.explain(model, sample, spec, target="c")).astype(np.float64)
        for spec in ("cam", "reciprocam:score=logit")
    )
    close(recipro, cam / cam.size + model.module.head.bias[2].item(), rtol=1e-5)


# ---- FullGrad


def tapped_terms(twin):
    """Bias times gradient at every place where a bias enters the odd network: by adding
    zeros there and asking for their gradient. The ReLU6's part is 6 times the
    gradient where it is full.
    """
    net, taps = twin.net, []
    x = twin.image.clone().requires_grad_()

    def tap(value, bias):
        zero = torch.zeros_like(value, requires_grad=True)
        taps.append((zero, bias))
        return value + zero

    def column(vector):
        return vector.detach()[:, None, None]

    def norm(part, value):
        slope = part.weight / (part.running_var + part.eps).sqrt()
        return tap(part(value), column(part.bias - part.running_mean * slope))

    a = norm(
        net.mid,
        tap(
            net.two(
                torch.relu(norm(net.norm, tap(net.one(x), column(net.one.bias))))
            ),
            column(net.two.bias),
        ),
    )
    full = tap(net.three(torch.relu(a)), column(net.three.bias))
    b = tap(full.clamp(0, 6), 6.0 * (full >= 6).double()) + a
    b = torch.relu(tap(net.last(b), column(net.last.bias))).mean(dim=(2, 3))
    y = tap(
        net.head(torch.relu(tap(net.hidden(b), net.hidden.bias.detach()))),
        net.head.bias.detach(),
    )[0, twin.index]
    gradients = torch.autograd.grad(y, [x, *(zero for zero, _ in taps)])
    terms = [
        x.detach() * gradients[0],
        *(g * bias for g, (_, bias) in zip(gradients[1:], taps, strict=True)),
    ]
    assert bool((full >= 6).any())
    return y.item(), [term[0].detach().numpy() for term in terms]


@pytest.mark.parametrize("rescale", ["layer", "channel", "none"])
def test_fullgrad_is_its_formula(odd, rescale):
    sample = noise_image()
    score, terms = tapped_terms(Twin(odd, sample, "b"))
    assert sum(term.sum() for term in terms) == pytest.approx(score, rel=1e-10)
    explanation = api.explain(odd, sample, f"fullgrad:rescale={rescale}", target="b")
    close(
        explanation.values,
        oracle.fullgrad(
            [term for term in terms if term.ndim == 3], (12, 12), rescale
        ),
        rtol=1e-3,
    )
    assert explanation.provenance["terms"] == len(terms)
    assert abs(explanation.provenance["completeness_gap"]) < 1e-5 * max(1, abs(score))
    assert "notes" not in explanation.provenance


@pytest.mark.parametrize("target", CLASSES)
def test_fullgrad_is_complete(odd, target):
    explanation = api.explain(odd, noise_image(3), "fullgrad", target=target)
    assert abs(explanation.extras["completeness_gap"]) < 1e-5 * max(
        1, abs(explanation.provenance["score"])
    )


def test_fullgrad_is_complete_with_batch_norm_residuals_and_other_activations():
    """ResNet-18 with statistics that are not trivial; the embedded network with its
    ReLU6 in the batch norm's own module; and smooth activations, whose implicit bias
    is not 0.
    """
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    shake(resnet)
    smooth = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.SiLU(inplace=True),
        nn.Conv2d(5, 5, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(320, 4),
    )
    for model in (
        wrap(resnet, size=64),
        wrap(smooth.eval(), size=12),
        load_model("efficientnet_lite0", engine="torch"),
    ):
        explanation = api.explain(model, noise_image(0, 64), "fullgrad", target=1)
        assert (
            abs(explanation.provenance["completeness_gap"])
            < 1e-3 * abs(explanation.provenance["score"]) + 1e-5
        )


def test_fullgrad_says_what_is_missing():
    """A product of activations is not a sum of linear pieces: its gradient counts it
    twice.
    """

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x):
            pooled = self.conv(x).mean(dim=(2, 3))
            return pooled * pooled

    model = wrap(Gated().eval(), size=8, mean=(0, 0, 0), std=(1, 1, 1)).using(
        engine="torch"
    )
    explanation = api.explain(model, noise_image(0, 8), "fullgrad", target=1)
    assert explanation.provenance["completeness_gap"] == pytest.approx(
        -explanation.provenance["score"], rel=1e-5
    )
    assert "not every part is known" in explanation.provenance["notes"][0]


def test_fullgrad_of_probabilities_or_of_nothing(odd):
    assert np.isfinite(
        api.explain(
            odd, noise_image(), "fullgrad:score=probability", target="b"
        ).values
    ).all()

    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x).mean(dim=(2, 3)).detach() * 0 + torch.tensor(
                [1.0, 2.0]
            )

    model = wrap(Deaf().eval(), size=8).using(engine="torch")
    view = model.view(noise_image(0, 8))
    heat = FullGrad().explain(
        model, view, api.target_of_image(model, noise_image(), 1, torch.zeros(1, 2))
    )
    assert not heat.values.any()


def shake(module):
    """Batch norms as if the network had been trained: every bias and statistic
    something.
    """
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.running_mean.copy_(
                    torch.randn(part.running_mean.shape, generator=generator) * 0.3
                )
                part.running_var.copy_(
                    torch.rand(part.running_var.shape, generator=generator) + 0.5
                )
                part.weight.copy_(
                    torch.rand(part.weight.shape, generator=generator) + 0.5
                )
                part.bias.copy_(
                    torch.randn(part.bias.shape, generator=generator) * 0.3
                )


# ---- guided backpropagation


def test_guided_backpropagation_by_hand():
    """y = 2 relu(u) - 3 relu(v), u = relu(x1) - relu(x2), v = relu(x2); x = (3, 1, -1)
    in the three colours.

    u = 2, v = 1. Back: at u 2, at v -3, which is not let through. At relu(x1) 2, at
    relu(x2) -2: not let through. So dx = (2, 0, 0); the plain gradient is (2, -5, 0).
    """

    class Hand(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.relu, self.mark = relu, nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = x.mean(dim=(2, 3)) * 1.0
            first = self.relu(x)
            u, v = first[:, :1] - first[:, 1:2], first[:, 1:2] * 1.0
            y = 2 * self.relu(u) - 3 * self.relu(v)
            return torch.cat([y, -y], dim=1)

    ways = {
        "module": nn.ReLU(),
        "module in place": nn.ReLU(inplace=True),
        "relu6": nn.ReLU6(),
        "relu6 in place": nn.ReLU6(inplace=True),
        "functional": functional.relu,
        "functional in place": lambda x: functional.relu(x, inplace=True),
        "torch": torch.relu,
        "torch in place": torch.relu_,
        "method": torch.Tensor.relu,
        "method in place": torch.Tensor.relu_,
        "functional relu6": functional.relu6,
        "functional relu_": functional.relu_,
    }
    pixels = (
        torch.tensor([3.0, 1.0, -1.0])
        .view(1, 3, 1, 1)
        .expand(1, 3, 4, 4)
        .contiguous()
    )
    for name, relu in ways.items():
        model = wrap(Hand(relu).eval(), size=4, mean=(0, 0, 0), std=(1, 1, 1)).using(
            engine="torch"
        )
        target = api.target_of_image(model, noise_image(), 0, torch.zeros(1, 2))
        got = guided_gradients(model, pixels, target).sum(dim=(2, 3))[0]
        np.testing.assert_allclose(got, (2, 0, 0), atol=1e-6, err_msg=name)
        plain = (
            model.trace(pixels, ["pixels"], target)
            .gradients["pixels"]
            .sum(dim=(2, 3))[0]
        )
        np.testing.assert_allclose(plain, (2, -5, 0), atol=1e-6, err_msg=name)


def test_a_relu6_that_is_full_lets_nothing_back():
    with GuidedReLUs() as relus:
        x = torch.tensor([-1.0, 3.0, 7.0], requires_grad=True)
        y = functional.relu6(x)
        functional.hardtanh(x, -1.0, 1.0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0, 3, 6]
    assert gradient.tolist() == [0, 1, 0]
    assert relus.count == 1


def test_a_guided_relu_in_place_overwrites_what_it_is_given():
    """A network may call one and go on with what it gave to it."""
    x = torch.tensor([-1.0, 3.0], requires_grad=True)
    with GuidedReLUs():
        y = x * 2
        functional.relu(y, inplace=True)
        z = (y * torch.tensor([1.0, -1.0])).sum()
    assert y.tolist() == [0, 6]
    assert torch.autograd.grad(z, x)[0].tolist() == [0, 0]


def test_watching_ends_with_an_exception():
    with pytest.raises(RuntimeError), GuidedReLUs():
        raise RuntimeError
    with pytest.raises(RuntimeError), Biases(lambda term, axis: None):
        raise RuntimeError
    x = torch.tensor([1.0], requires_grad=True)
    assert torch.autograd.grad(-functional.relu(x).sum(), x)[0].tolist() == [-1]


def test_guided_backpropagation_is_refused_without_a_relu():
    with pytest.raises(NotApplicable, match="has none"):
        api.explain(network(Pooled), noise_image(), "guided-gradcam", target="a")


@pytest.mark.parametrize("reduce", ["largest", "sum"])
def test_guided_gradcam_is_the_product(odd, reduce):
    sample = noise_image()
    view, twin = odd.view(sample), Twin(odd, sample, "b")
    coarse = oracle.enlarged(
        np.maximum(oracle.gradcam(twin.activations, twin.gradients()), 0), (12, 12)
    )
    target = api.target_of_image(odd, sample, "b", torch.zeros(1, 5))
    colours = guided_gradients(odd, view.pixels, target)[0].double().numpy() * coarse
    expected = colours.sum(axis=0) if reduce == "sum" else np.abs(colours).max(axis=0)
    close(
        api.explain(
            odd, sample, f"guided-gradcam:layer=mid,reduce={reduce}", target="b"
        ).values,
        expected,
    )


# ---- batches, layers


BATCHED = ["cam", "gradcam++", "eigencam", "layercam", "guided-gradcam"]


@pytest.mark.parametrize("name", BATCHED)
def test_many_are_many_times_one_whatever_the_batch(name, monkeypatch):
    model = network(Pooled if name == "cam" else OddNet)
    explainer = api.resolve_explainer(model, name)
    samples = [noise_image(seed) for seed in range(5)]
    targets = [
        api.target_of_image(model, sample, index, torch.zeros(1, 5))
        for index, sample in enumerate(samples)
    ]
    views = [model.view(sample) for sample in samples]
    whole = explainer.explain_batch(model, views, targets)
    in_threes(monkeypatch)
    for together in (whole, explainer.explain_batch(model, views, targets)):
        assert len(together) == 5
        for heat, view, target in zip(together, views, targets, strict=True):
            alone = explainer.explain(model, view, target).values
            torch.testing.assert_close(
                heat.values, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max())
            )


@pytest.mark.parametrize(
    "name", ["scorecam", "ablationcam", "reciprocam", "eigencam", "smoothgradcam++"]
)
def test_several_layers_become_one_map(odd, name):
    sample = noise_image()
    apart = [
        grid_of(api.explain(odd, sample, f"{name}:layer={layer}", target="b"))
        for layer in ("two", "norm")
    ]
    both = api.explain(odd, sample, f"{name}:layer=two+norm,fuse=max", target="b")
    fine = [oracle.enlarged(each.astype(np.float64), (12, 12)) for each in apart]
    close(both.values, np.maximum(*fine), rtol=1e-4)
    assert both.provenance["grid"] == {"two": [6, 6], "norm": [12, 12]}


# ---- against pytorch-grad-cam


def peer(method, module, layer, pixels, index, **options):
    """pytorch-grad-cam's map: ReLU, scaled to [0, 1], enlarged, scaled again."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(pytorch_grad_cam, method)(
        model=module, target_layers=[layer], **options
    ) as cam:
        return cam(input_tensor=pixels, targets=[ClassifierOutputTarget(index)])[0]


def scaled(values):
    values = values - values.min()
    return values / (1e-7 + values.max())


SIZE = 64
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    module = torchvision.models.resnet18(num_classes=10).eval()
    shake(module)
    return wrap(module, mean=IMAGENET[0], std=IMAGENET[1], size=SIZE).using(
        engine="torch"
    )


@pytest.fixture(scope="module")
def lite():
    return wrap(
        load_model("efficientnet_lite0").module,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        size=64,
    ).using(engine="torch")


def against(model, layer, spec, method, index, norm, **options):
    """Ours and the peer's map of the same image."""
    import skimage.data

    sample = Sample("cat", skimage.data.chelsea())
    view = model.view(sample)
    ours = api.explain(model, sample, spec, target=index).values
    return scaled(ours), peer(
        method,
        model.module,
        model.module.get_submodule(layer),
        normalised(view, *norm),
        index,
        **options,
    )


PEERS = {
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "gradcam-elementwise": "GradCAMElementWise",
    "hirescam:relu=true": "HiResCAM",
    # The peer enlarges masks with corners on corners. Its softmax over channels is the
    # paper's.
    "scorecam:align_corners=true": "ScoreCAM",
    # The peer is an oracle where the layer's minimum is 0 and the score is positive.
    "ablationcam": "AblationCAM",
}


@pytest.mark.parametrize("spec", PEERS)
def test_equals_the_peer_on_resnet18(resnet, spec):
    index = best_class(resnet)
    # The peer enlarges with OpenCV, whose bilinear coefficients are rounded to 1/2048.
    np.testing.assert_allclose(
        *against(resnet, "layer4", spec, PEERS[spec], index, IMAGENET), atol=1e-3
    )


@pytest.mark.parametrize("spec", PEERS)
def test_equals_the_peer_on_the_embedded_network(lite, spec):
    layer = {"scorecam": "blocks.6", "ablationcam": "blocks.3.0.bn1"}.get(
        spec.partition(":")[0], "bn2"
    )
    index = best_class(lite)
    comma = "," if ":" in spec else ":"
    pair = against(
        lite,
        layer,
        f"{spec}{comma}layer={layer}",
        PEERS[spec],
        index,
        ((0.5,) * 3, (0.5,) * 3),
    )
    np.testing.assert_allclose(*pair, atol=1e-3)


def best_class(model):
    import skimage.data

    outputs = model.scores(model.view(Sample("cat", skimage.data.chelsea())).pixels)[
        0
    ]
    assert outputs.max() > 0
    return int(outputs.argmax())


@pytest.mark.parametrize(
    ("spec", "method"), [("eigencam", "EigenCAM"), ("eigengradcam", "EigenGradCAM")]
)
def test_eigen_maps_are_the_peers_when_centred(resnet, spec, method):
    """The paper does not centre the activations; the peer does, and leaves the sign to
    the decomposition.
    """
    index = best_class(resnet)
    pairs = [
        against(
            resnet, "layer4", f"{spec}:centre=true,relu=true", method, index, IMAGENET
        )
    ]
    import skimage.data

    sample = Sample("cat", skimage.data.chelsea())
    turned = -torch.from_numpy(
        grid_of(
            api.explain(
                resnet, sample, f"{spec}:centre=true,relu=false", target=index
            )
        )
    )
    from consilience.images import enlarge

    pairs.append((scaled(enlarge(turned.relu(), (SIZE, SIZE)).numpy()), pairs[0][1]))
    assert min(np.abs(ours - theirs).max() for ours, theirs in pairs) < 1e-3


def test_gradcam_plus_plus_is_the_peers_only_with_its_constant(resnet):
    """The peer adds 1e-6 to Grad-CAM++'s denominator 2 g^2 + g^3 sum A, which is no
    smaller: its weights fade with g.
    """
    import skimage.data

    sample = Sample("cat", skimage.data.chelsea())
    index = best_class(resnet)
    ours, theirs = against(
        resnet, "layer4", "gradcam++", "GradCAMPlusPlus", index, IMAGENET
    )
    trace = resnet.trace(
        resnet.view(sample).pixels,
        ["layer4"],
        api.target_of_image(resnet, sample, index, torch.zeros(1, 10)),
    )
    a, g = (
        each["layer4"][0].double().numpy()
        for each in (trace.activations, trace.gradients)
    )
    alpha = g**2 / (2 * g**2 + g**3 * a.sum(axis=(1, 2), keepdims=True) + 1e-6)
    faded = oracle.weighted_sum((alpha * np.maximum(g, 0)).sum(axis=(1, 2)), a)
    np.testing.assert_allclose(
        scaled(torch_enlarged(np.maximum(faded, 0))), theirs, atol=1e-3
    )
    right = np.maximum(oracle.gradcam_plus_plus(a, g), 0)
    np.testing.assert_allclose(ours, scaled(torch_enlarged(right)), atol=1e-4)


def torch_enlarged(grid):
    from consilience.images import enlarge

    return enlarge(torch.from_numpy(grid), (SIZE, SIZE)).numpy()


def test_ablationcam_is_not_the_peers_where_activations_are_negative(lite):
    """There the peer sets a channel to the minimum less 1e7.

    The paper's zero, by the oracle through a hook, is ours.
    """
    layer = "blocks.1.0.bn3"
    import skimage.data

    sample = Sample("cat", skimage.data.chelsea())
    index = best_class(lite)
    part = lite.module.get_submodule(layer)
    acts = lite.activations(lite.view(sample).pixels, [layer])[layer]
    assert acts.min() < 0
    pixels = normalised(lite.view(sample), (0.5,) * 3, (0.5,) * 3)

    def score(replaced):
        handle = part.register_forward_hook(
            lambda *_: torch.as_tensor(replaced, dtype=torch.float32)[None].clone()
        )
        try:
            with torch.no_grad():
                return float(lite.module(pixels)[0, index])
        finally:
            handle.remove()

    few = api.explain(lite, sample, f"ablationcam:{layer},relu=false", target=index)
    expected = oracle.ablationcam(acts[0].numpy(), score)
    close(grid_of(few), expected, rtol=5e-3)


def test_fullgrad_is_the_peers_by_channel(resnet):
    """The peer scales every channel, by its range and 1e-7, which is not much of it if
    the score is large.
    """
    module = copy.deepcopy(resnet.module)
    with torch.no_grad():
        module.fc.weight *= 1000
    model = resnet.with_module(module)
    ours, theirs = against(
        model,
        "layer4",
        "fullgrad:rescale=channel",
        "FullGrad",
        best_class(resnet),
        IMAGENET,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_guided_backpropagation_is_the_peers(resnet):
    import skimage.data
    from pytorch_grad_cam import GuidedBackpropReLUModel

    sample = Sample("cat", skimage.data.chelsea())
    view, index = resnet.view(sample), best_class(resnet)
    target = api.target_of_image(resnet, sample, index, torch.zeros(1, 10))
    ours = guided_gradients(resnet, view.pixels, target)[0]
    twin = copy.deepcopy(resnet.module)
    theirs = GuidedBackpropReLUModel(twin, device="cpu")(
        normalised(view, *IMAGENET), index
    )  # of normalised pixels
    close(
        (ours * torch.tensor(IMAGENET[1])[:, None, None]).permute(1, 2, 0).numpy(),
        theirs,
        rtol=1e-3,
    )


# ---- memory

SCORE = """
import resource, sys, torch, numpy as np
from torch import nn
from consilience import api
from consilience.models.network import TorchNetwork, wrap
from consilience.types import Sample
torch.set_num_threads(1)
class Wide(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool, self.conv, self.head = nn.AvgPool2d(32), nn.Conv2d(3, channels, 1), nn.Linear(channels, 2)
    def forward(self, x):
        return self.head(torch.relu(self.conv(self.pool(x))).mean(dim=(2, 3)))
torch.manual_seed(0)
model = wrap(Wide(int(sys.argv[1])).eval(), size=224, memory=1 << 26).using(engine="torch")
sample = Sample("s", np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
api.explain(model, sample, "scorecam:layer=conv,channels=200", target=0)
model.tail(model.view(sample).pixels, "conv")
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
api.explain(model, sample, sys.argv[2], target=0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "scorecam:conv",
        "iscam:conv,samples=2",
        "sscam:conv,samples=1",
        "ablationcam:conv",
        "reciprocam:conv",
    ],
)
def test_memory_does_not_grow_with_channels_times_frame(spec):
    """1536 masks of 224 x 224 are 294 MiB, the masked images 882 MiB; beyond what 200
    channels take, far less is used.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCORE, "1536", spec],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100
