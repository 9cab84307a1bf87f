"""Newer class activation maps against their formulas in slow loops, and a peer."""

import numpy as np
import oracles_cam
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


# ---- Shapley-CAM and Refine-CAM


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_shapleycam_by_the_whole_hessian(score):
    """The Hessian by cells, entry by entry, and its product with the activations."""
    module = Small(relu=False)
    target = 4

    def asked(a):
        said = module.back(a[None])[0]
        return said[target] if score == "logit" else said.softmax(0)[target]

    a = module.front(input_of())[0].detach()
    first = torch.autograd.functional.jacobian(asked, a).double().numpy()
    second = torch.autograd.functional.hessian(asked, a).double().numpy()
    channels, height, width = a.shape
    values = a.double().numpy()
    wanted = np.zeros((height, width))
    size = 0.0
    for k in range(channels):
        weight = 0.0
        for y in range(height):
            for x in range(width):
                along = (second[k, y, x] * values).sum()
                size += (along / 2) ** 2
                weight += (first[k, y, x] - along / 2) / (height * width)
        wanted += weight * values[k]
    spec = f"shapleycam:layer=act,relu=false,score={score}"
    made = cs.explain(network(module), IMAGE, spec, target)
    assert grid(made) == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    plain = cs.explain(
        network(module), IMAGE, f"gradcam:layer=act,relu=false,score={score}", target
    )
    assert not np.allclose(grid(plain), wanted, rtol=1e-2)
    curved = np.sqrt(size) / np.linalg.norm(first)
    assert made.provenance["curved"] == pytest.approx(curved, rel=1e-3)


def test_shapleycam_is_the_peers():
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    module = Small(relu=False)
    theirs = peer.ShapleyCAM(module, [module.act])
    maps = theirs(input_of(), [ClassifierOutputTarget(2)])[0]
    made = cs.explain(network(module), IMAGE, "shapleycam:layer=act", 2).values
    made = (made - made.min()) / (made.max() - made.min())
    assert np.corrcoef(made.ravel(), maps.ravel())[0, 1] > 0.999


def test_shapleycam_is_grad_cam_where_nothing_is_curved():
    module = Small()
    module.between = nn.Identity()
    made = cs.explain(network(module), IMAGE, "shapleycam:layer=act", 1)
    plain = cs.explain(network(module), IMAGE, "gradcam:layer=act", 1)
    assert made.provenance["curved"] == 0
    assert made.values == pytest.approx(plain.values, abs=1e-7)


def test_shapleycam_of_two_layers_and_several_images():
    module = Small(relu=False)
    there = network(module)
    other = Sample("other", IMAGE.pixels[::-1].copy())
    spec = "shapleycam:layer=first+act"
    both = cs.explain(there, [IMAGE, other], spec, 3)
    for one, sample in zip(both, (IMAGE, other), strict=True):
        alone = cs.explain(there, sample, spec, 3)
        assert one.values == pytest.approx(alone.values, abs=1e-6)
        assert set(one.provenance["curved"]) == {"first", "act"}
    assert both[0].provenance["curved"] != both[1].provenance["curved"]


def test_shapleycam_of_attention():
    there = cs.load_model("vit_b_32:weights=random")
    with torch.no_grad():
        there.module.heads.head.weight.normal_()  # torchvision begins with zeros
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    made = cs.explain(there, pixels, "shapleycam")
    assert made.provenance["curved"] > 0


def test_refinecam_by_loops():
    """Grad-CAM++ of two grids, from 0 to 1, the coarse one enlarged, multiplied."""
    module = Small()
    there = network(module)
    maps = []
    for layer in ("first", "act"):
        one = cs.explain(there, IMAGE, f"gradcam++:layer={layer},relu=true", 0)
        raw = grid(one).astype(float)
        low, high = raw.min(), raw.max()
        maps.append((raw - low) / (high - low))
    coarse = oracles_cam.enlarged(maps[1], maps[0].shape)
    wanted = np.zeros(maps[0].shape)
    for y in range(wanted.shape[0]):
        for x in range(wanted.shape[1]):
            wanted[y, x] = maps[0][y, x] * coarse[y][x]
    made = cs.explain(there, IMAGE, "refinecam:layer=first+act", 0)
    assert grid(made) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    mean = cs.explain(there, IMAGE, "refinecam:layer=first+act,fuse=mean", 0)
    assert not np.allclose(grid(mean), wanted, atol=1e-2)


def test_refinecam_is_the_peers_where_grids_are_the_frame():
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    with torch.no_grad():
        module[6].weight.mul_(400)  # gradients that the peer's 1e-6 does not drown
    theirs = peer.RefineCAM(module, [module[1], module[3]])
    maps = theirs(input_of(), [ClassifierOutputTarget(1)])[0]
    made = cs.explain(network(module), IMAGE, "refinecam:layer=1+3", 1).values
    made = (made - made.min()) / (made.max() - made.min())
    assert made == pytest.approx(maps, abs=2e-3)


def test_refinecam_takes_the_coarsest_grids():
    there = cs.load_model("resnet18:weights=random")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for grids, wanted in (
        (1, "layer4"),
        (2, "layer3+layer4"),
        (3, "layer2+layer3+layer4"),
        (9, "relu+layer1+layer2+layer3+layer4"),
    ):
        made = cs.explain(there, image, f"refinecam:grids={grids}")
        assert made.provenance["layer"] == wanted
