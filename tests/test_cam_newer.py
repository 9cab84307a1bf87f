"""Newer class activation maps against their formulas in slow loops, and a peer."""

import numpy as np
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import NotApplicable, Sample
from consilience.explainers.cam_newer import DFF


class Small(nn.Module):
    """Two convolutions; the second's output passes a ReLU unless told."""

    def __init__(self, relu=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.second = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.between = nn.Tanh()
        self.head = nn.Linear(7, 6)

    def front(self, x):
        return self.act(self.second(torch.tanh(self.first(x))))

    def back(self, a):
        return self.head(torch.tanh(a).mean((2, 3)))

    def forward(self, x):
        return self.head(self.between(self.front(x)).mean((2, 3)))


SIDE = 24
IMAGE = Sample(
    "noise",
    np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
)


def network(module):
    return cs.wrap(module.eval(), size=SIDE, mean=0.5, std=0.25, engine="torch")


def input_of():
    x = torch.from_numpy(IMAGE.pixels).permute(2, 0, 1)[None].float() / 255
    return (x - 0.5) / 0.25


def grid(explanation):
    return np.asarray(explanation.extras.get("grid", explanation.values))


def gradients_of(module, score):
    a = module.front(input_of()).detach().requires_grad_()
    return a.detach()[0].numpy(), torch.autograd.grad(score(module.back(a)[0]), a)[0][
        0
    ].numpy()


@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize(("classes", "alpha"), [(3, 1.0), (1, 0.6), (9, 1.0)])
def test_finercam_is_grad_cam_of_differences(target, classes, alpha):
    module = Small()
    with torch.no_grad():
        said = module(input_of())[0]
    others = sorted(
        (k for k in range(6) if k != target),
        key=lambda k: abs(said[k] - said[target]),
    )[:classes]
    wanted = 0
    for other in others:  # a difference at a time: Grad-CAM is linear in the score
        a, g = gradients_of(
            module, lambda y, other=other: y[target] - alpha * y[other]
        )
        for channel in range(len(a)):
            wanted = wanted + g[channel].mean() * a[channel] / len(others)
    spec = f"finercam:layer=act,relu=false,classes={classes},alpha={alpha}"
    got = grid(cs.explain(network(module), IMAGE, spec, target))
    assert got == pytest.approx(
        wanted, rel=1e-4, abs=1e-6 * float(np.abs(wanted).max())
    )
    cut = grid(
        cs.explain(
            network(module), IMAGE, spec.replace("relu=false", "relu=true"), target
        )
    )
    assert cut == pytest.approx(np.maximum(wanted, 0), rel=1e-4, abs=1e-6)


def test_finercam_without_similar_classes_is_grad_cam():
    model = network(Small())
    a, b = (
        cs.explain(model, IMAGE, spec, 2).values
        for spec in ("finercam:layer=act,alpha=0", "gradcam:layer=act")
    )
    assert a == pytest.approx(b, rel=1e-5)
    c = cs.explain(model, IMAGE, "finercam:layer=act", 2).values
    assert not np.allclose(b / max(b.max(), 1e-9), c / max(c.max(), 1e-9), atol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_finercam_weighted_by_probability_is_the_peers(alpha):
    """pytorch-grad-cam's own target, differentiated at the layer."""
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    module = Small()
    with torch.no_grad():
        said = module(input_of())[0]
    target = int(said.argmax())
    near = (said - said[target]).abs().argsort()[1:4].tolist()
    theirs = targets.FinerWeightedTarget(target, near, alpha)
    a, g = gradients_of(module, theirs)
    wanted = sum(g[k].mean() * a[k] for k in range(len(a)))
    spec = f"finercam:layer=act,relu=false,weights=probability,alpha={alpha}"
    got = grid(cs.explain(network(module), IMAGE, spec, target))
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    equal = spec.replace("weights=probability,", "")
    assert not np.allclose(
        grid(cs.explain(network(module), IMAGE, equal, target)), wanted, rtol=1e-3
    )


def test_finercam_is_of_classes():
    with pytest.raises(NotApplicable, match="is none"):
        cs.explain(network(Small()), IMAGE, "finercam:layer=act", "unit:act,2")


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.1), (5, 0.5)])
def test_opticam_by_its_equations(steps, rate):
    module = Small()
    a = module.front(input_of()).detach()[0]
    u, first, second = torch.zeros(7), torch.zeros(7), torch.zeros(7)

    def mask_of(u):
        weights = torch.exp(u) / torch.exp(u).sum()
        summed = sum(weights[k] * a[k] for k in range(7))
        return (summed - summed.min()) / (summed.max() - summed.min())

    def score(u):
        mask = torch.nn.functional.interpolate(
            mask_of(u)[None, None], (SIDE, SIDE), mode="bilinear", align_corners=False
        )
        return module(input_of() * mask)[0, 4]

    for step in range(1, steps + 1):  # Adam (Kingma and Ba 2015, algorithm 1)
        v = u.clone().requires_grad_()
        g = torch.autograd.grad(-score(v), v)[0]
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        m, s = first / (1 - 0.9**step), second / (1 - 0.999**step)
        u = u - rate * m / (s.sqrt() + 1e-8)
    spec = f"opticam:layer=act,steps={steps},rate={rate}"
    made = cs.explain(network(module), IMAGE, spec, 4)
    assert grid(made) == pytest.approx(mask_of(u).numpy(), abs=2e-4)
    assert made.provenance["masked_score"][0] == pytest.approx(
        float(score(u)), abs=1e-3
    )
    assert made.provenance["passes"] == steps + 1


def test_opticam_gains_score_by_its_steps():
    model = network(Small())
    few, many = (
        cs.explain(model, IMAGE, f"opticam:layer=act,steps={n}", 4).provenance[
            "masked_score"
        ][0]
        for n in (1, 60)
    )
    assert many > few


def test_dff_recovers_factors_that_are_there():
    """Activations of two blobs with channels of their own are these blobs."""
    y, x = np.mgrid[:8, :8]
    blobs = [
        np.exp(-((y - 2) ** 2 + (x - 2) ** 2) / 4),
        np.exp(-((y - 5) ** 2 + (x - 6) ** 2) / 3),
    ]
    channels = np.array([[1.0, 0.5, 0, 0], [0, 0, 2.0, 1.0]])
    a = sum(
        np.einsum("hw,c->chw", b, c) for b, c in zip(blobs, channels, strict=True)
    )
    for gradient, wins in (([1, 1, -1, -1], 0), ([-1, -1, 1, 1], 1)):
        g = np.broadcast_to(np.array(gradient, float)[:, None, None], a.shape)
        tensors = [
            torch.from_numpy(np.ascontiguousarray(one))[None].float()
            for one in (a, g)
        ]
        found = DFF(factors=2).map(*tensors)[0].numpy()
        assert np.corrcoef(found.ravel(), blobs[wins].ravel())[0, 1] > 0.999
        notes = DFF(factors=2).notes(*tensors)
        assert notes["explained"] > 0.999
        # all of the score is in the factors: their shares are Grad-CAM's sum
        wanted = (g.mean((1, 2))[:, None, None] * a).sum()
        assert sum(notes["shares"]) == pytest.approx(wanted, rel=1e-3)
        assert notes["shares"] == sorted(notes["shares"], reverse=True)


def test_dff_of_a_network():
    model = network(Small())
    two, four = (
        cs.explain(model, IMAGE, f"dff:layer=act,factors={k}", 1) for k in (2, 4)
    )
    assert len(four.provenance["shares"]) == 4
    assert two.provenance["explained"] < four.provenance["explained"] <= 1
    assert (grid(four) >= 0).all()
    with pytest.raises(NotApplicable, match="negative activations"):
        cs.explain(network(Small(relu=False)), IMAGE, "dff:layer=act", 1)
