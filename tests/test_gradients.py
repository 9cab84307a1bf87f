"""Gradients, averages over noise and sums along paths, against slow loops, axioms,
captum and PAIR's saliency.
"""

import copy

import numpy as np
import oracles_gradients as slow
import pytest
import torch
from conftest import planted_image
from torch import nn

from consilience import api, registry
from consilience.explainers import gradients, integrated
from consilience.explainers.xrai import regions, taken
from consilience.models import backward
from consilience.models.engines import plan
from consilience.models.network import wrap
from consilience.perturb.superpixels import Felzenszwalb, segment
from consilience.types import PIXELS, ClassTarget, ConsilienceError, Sample

SIDE = 12


class Curved(nn.Module):
    """Smooth (softplus), so that quadrature has something to converge to; a ReLU in
    place in between.
    """

    def __init__(self, smooth=True):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.Softplus() if smooth else nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.last = nn.Softplus(beta=3) if smooth else nn.ReLU(inplace=True)
        self.head = nn.Linear(5 * (SIDE // 2) ** 2, 4)

    def forward(self, x):
        x = self.pool(self.act(self.first(x)))
        return self.head(self.last(self.second(x)).flatten(1))


class Linear(nn.Module):
    """A linear score of the pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * SIDE**2, 4)

    def forward(self, x):
        return self.head(x.flatten(1))


def network(module, **more):
    torch.manual_seed(1)
    made = module.eval() if isinstance(module, nn.Module) else module()
    return wrap(
        made.eval(), mean=(0, 0, 0), std=(1, 1, 1), size=SIDE, name="tiny", **more
    ).using(engine="torch")


@pytest.fixture(scope="module")
def curved():
    torch.manual_seed(3)
    return network(Curved())


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(4)
    return network(Linear())


@pytest.fixture(scope="module")
def sample():
    return Sample(
        "noise",
        np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
    )


def exact(model):
    """The module in float64."""
    return copy.deepcopy(model.module).double()


def image_of(sample):
    return sample.pixels.transpose(2, 0, 1) / 255.0


def explained(model, sample, by, target=2):
    return api.explain(model, sample, by, target=target)


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


# ---- channels, one pass


def test_channels_by_hand():
    colours = torch.tensor([3.0, -4.0, 0.0]).reshape(3, 1, 1)
    found = {
        how: float(gradients.reduced(colours, how))
        for how in ("sum", "l1", "l2", "largest")
    }
    assert found == {"sum": -1.0, "l1": 7.0, "l2": 5.0, "largest": 4.0}


@pytest.mark.parametrize("smooth", [True, False])
def test_gradient_is_the_difference_quotient(sample, smooth):
    torch.manual_seed(6)
    model = network(Curved(smooth))
    wanted = slow.difference_quotients(
        slow.score_function(exact(model), 2), image_of(sample)
    )
    close(explained(model, sample, "gradient:sum").values, wanted.sum(axis=0), 1e-4)
    close(
        explained(model, sample, "gradient").values, np.abs(wanted).max(axis=0), 1e-4
    )
    close(
        explained(model, sample, "input-x-gradient:black").values,
        (image_of(sample) * wanted).sum(axis=0),
        1e-4,
    )


def test_probability_can_be_differentiated(curved, sample):
    module = nn.Sequential(exact(curved), nn.Softmax(dim=1))
    wanted = slow.difference_quotients(
        slow.score_function(module, 2), image_of(sample)
    )
    close(
        explained(curved, sample, "gradient:sum,score=probability").values,
        wanted.sum(axis=0),
        1e-3,
    )


def test_input_counts_from_what_the_network_takes_as_zero(sample):
    torch.manual_seed(4)
    module = Linear().eval()
    model = wrap(module, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), size=SIDE).using(
        engine="torch"
    )
    given = model.recipe.normalised(model.view(sample).pixels)[0]
    weights = module.head.weight[2].reshape(3, SIDE, SIDE)
    close(
        explained(model, sample, "input-x-gradient").values,
        (given * weights).sum(dim=0).detach().numpy(),
    )


# ---- noise


@pytest.mark.parametrize("by", ["smoothgrad", "squaregrad"])
def test_without_noise_it_is_the_gradient(curved, sample, by):
    plain = slow.gradient(exact(curved), image_of(sample), 2)
    wanted = plain.sum(axis=0) if by == "smoothgrad" else (plain**2).sum(axis=0)
    close(
        explained(curved, sample, f"{by}:samples=5,noise=0,channels=sum").values,
        wanted,
    )


def test_vargrad_without_noise_or_curvature_is_nothing(curved, linear, sample):
    assert (
        np.abs(explained(curved, sample, "vargrad:samples=5,noise=0").values).max()
        < 1e-12
    )
    assert np.abs(explained(linear, sample, "vargrad:samples=9").values).max() < 1e-12


def test_moments_are_those_of_the_draws(curved, sample):
    """Draws made again, one by one, in float64."""
    image = image_of(sample)
    sigma = 0.3 * (image.max() - image.min())
    generator = torch.Generator().manual_seed(7)
    drawn = [
        image
        + sigma * torch.randn(3, SIDE, SIDE, generator=generator).double().numpy()
        for _ in range(11)
    ]
    every = np.stack([slow.gradient(exact(curved), one, 2) for one in drawn])
    options = "samples=11,noise=.3,seed=7,channels=sum"
    close(
        explained(curved, sample, f"smoothgrad:{options}").values,
        every.mean(axis=0).sum(axis=0),
    )
    close(
        explained(curved, sample, f"squaregrad:{options}").values,
        (every**2).mean(axis=0).sum(axis=0),
    )
    close(
        explained(curved, sample, f"vargrad:{options}").values,
        every.var(axis=0).sum(axis=0),
        1e-4,
    )


def test_noise_tunnel_of_captum(curved, sample, monkeypatch):
    """captum's own noise, handed to ours."""
    from captum.attr import NoiseTunnel, Saliency

    pixels = curved.view(sample).pixels
    sigma = 0.2 * float(pixels.max() - pixels.min())
    for by, kind in (
        ("smoothgrad", "smoothgrad"),
        ("squaregrad", "smoothgrad_sq"),
        ("vargrad", "vargrad"),
    ):
        torch.manual_seed(8)
        tunnel = NoiseTunnel(Saliency(curved.module))
        wanted = tunnel.attribute(
            pixels, nt_type=kind, nt_samples=6, stdevs=sigma, target=2, abs=False
        )
        torch.manual_seed(8)
        noise = torch.normal(0.0, sigma, (6, 3, SIDE, SIDE))
        rows = iter(noise)
        monkeypatch.setattr(
            gradients,
            "_draws",
            lambda image, *_, rows=rows: (
                lambda count: torch.stack(
                    [image[0] + next(rows) for _ in range(count)]
                )
            ),
        )
        found = explained(
            curved, sample, f"{by}:samples=6,noise=.2,channels=sum"
        ).values
        close(found, wanted[0].sum(dim=0).detach().numpy(), 1e-3)


def test_a_longer_draw_begins_with_the_shorter_and_chunks_do_not_matter(sample):
    view = torch.from_numpy(image_of(sample)).float()[None]
    whole = gradients._draws(view, 0.5, 3)(7)
    pieces = gradients._draws(view, 0.5, 3)
    assert torch.equal(whole, torch.cat([pieces(2), pieces(1), pieces(4)]))


# ---- integrated gradients


def test_rules_integrate_what_they_should():
    for rule in integrated.QUADRATURE_RULES:
        places, weights = integrated.nodes(rule, 6)
        assert weights.sum() == pytest.approx(1)
        assert 0 <= places.min() <= places.max() <= 1
    places, weights = integrated.nodes("gauss-legendre", 3)
    assert (weights * places**5).sum() == pytest.approx(1 / 6)
    places, weights = integrated.nodes("riemann-left", 4)
    assert (weights * places).sum() == pytest.approx(0.375)


@pytest.mark.parametrize("rule", integrated.QUADRATURE_RULES)
@pytest.mark.parametrize("smooth", [True, False])
def test_integrated_gradients_are_the_formula(sample, rule, smooth):
    torch.manual_seed(9)
    model = network(Curved(smooth))
    image = image_of(sample)
    spans = [
        slow.integrated(
            exact(model),
            image,
            np.full(image.shape, start),
            2,
            *integrated.nodes(rule, 7),
        )
        for start in (0.0, 1.0)
    ]
    found = explained(
        model,
        sample,
        f"integrated-gradients:steps=7,baseline=black+white,rule={rule}",
    )
    close(found.values, np.mean(spans, axis=0).sum(axis=0))
    assert found.provenance["passes"] == 14


@pytest.mark.parametrize(
    ("rule", "theirs", "share"),
    [
        ("gauss-legendre", "gausslegendre", 1),
        ("riemann-left", "riemann_left", 1),
        ("riemann-right", "riemann_right", 1),
        ("riemann-middle", "riemann_middle", 1),
        ("trapezoid", "riemann_trapezoid", 9 / 8),  # its weights add up to 1 - 1/n
    ],
)
def test_integrated_gradients_of_captum(curved, sample, rule, theirs, share):
    from captum.attr import IntegratedGradients

    pixels = curved.view(sample).pixels
    wanted = IntegratedGradients(curved.module).attribute(
        pixels, torch.ones_like(pixels), target=2, n_steps=9, method=theirs
    )
    found = explained(
        curved, sample, f"integrated-gradients:steps=9,baseline=white,rule={rule}"
    ).values
    close(found, share * wanted[0].sum(dim=0).detach().numpy())


def test_completeness_is_what_it_says(curved, sample):
    score = slow.score_function(exact(curved), 2)
    explained_score = score(image_of(sample)) - score(np.zeros((3, SIDE, SIDE)))
    fine = explained(curved, sample, "integrated-gradients:steps=32")
    assert fine.values.sum() == pytest.approx(explained_score, rel=1e-4)
    assert fine.provenance["explained"] == pytest.approx(explained_score, rel=1e-4)
    assert fine.extras["completeness_share"] < 1e-4
    rough = explained(
        curved, sample, "integrated-gradients:steps=1,rule=riemann-left"
    )
    gap = explained_score - float(rough.values.astype(np.float64).sum())
    assert rough.provenance["completeness_gap"] == pytest.approx(gap, rel=1e-3)
    assert rough.provenance["completeness_share"] == pytest.approx(
        abs(gap / explained_score), rel=1e-3
    )
    assert rough.provenance["completeness_share"] > 0.01


def test_completeness_by_hand():
    assert gradients.completeness(3.0, 6.0, 2.0) == {
        "explained": 4.0,
        "completeness_gap": 1.0,
        "completeness_share": 0.25,
    }
    assert gradients.completeness(1e-8, 5.0, 5.0)["completeness_share"] == 0.0
    assert gradients.completeness(0.0, 0.0, 0.0)["completeness_share"] == 0.0
    assert (
        1 < gradients.completeness(1.0, 5.0, 5.0)["completeness_share"] < float("inf")
    )


@pytest.mark.parametrize(
    "by",
    [
        "integrated-gradients:steps=1",
        "expected-gradients:samples=8",
        "guided-ig:steps=7",
        "blur-ig:steps=3",
        "xrai:steps=2",
    ],
)
def test_of_a_linear_model_every_path_gives_the_weights(linear, sample, by):
    found = explained(linear, sample, by)
    assert found.provenance["completeness_share"] < 1e-4
    if by.startswith("xrai"):
        return
    weights = linear.module.head.weight[2].detach().numpy().reshape(3, SIDE, SIDE)
    image = image_of(sample)
    starts = {
        "expected-gradients": (0.0 + 1.0 + 0.0 + slow.blurred(image, 10)) / 4,
        "blur-ig": slow.blurred(image, 50),
    }.get(by.partition(":")[0], np.zeros(image.shape))
    close(found.values, ((image - starts) * weights).sum(axis=0), 1e-4)


def test_the_same_whatever_the_memory(curved, sample, monkeypatch):
    specs = [
        "integrated-gradients:steps=9,baseline=black+white",
        "smoothgrad:samples=9",
        "blur-ig:steps=9",
        "guided-ig:steps=4",
    ]
    specs += ["integrated-gradients:steps=9,layer=first+second+pixels"]
    many = [explained(curved, sample, by).values for by in specs]
    monkeypatch.setattr(plan, "backward_batch_within", lambda *_: 1)
    for by, wanted in zip(specs, many, strict=True):
        close(explained(curved, sample, by).values, wanted)


# ---- layers


@pytest.mark.parametrize("layer", ["first", "second", "last"])
def test_conductance_of_captum(sample, layer):
    """captum's trapezoid is the sum with the gradient on the left; turned round, on the
    right.
    """
    from captum.attr import LayerConductance

    torch.manual_seed(10)
    model = network(Curved())
    pixels = model.view(sample).pixels
    peer = LayerConductance(model.module, model.module.get_submodule(layer))
    options = {"target": 2, "n_steps": 8, "method": "riemann_trapezoid"}
    left = (
        peer.attribute(pixels, torch.zeros_like(pixels), **options)[0]
        .sum(dim=0)
        .detach()
        .numpy()
    )
    right = (
        -peer.attribute(torch.zeros_like(pixels), pixels, **options)[0]
        .sum(dim=0)
        .detach()
        .numpy()
    )
    for rule, wanted in (
        ("riemann-left", left),
        ("riemann-right", right),
        ("trapezoid", (left + right) / 2),
    ):
        found = explained(
            model, sample, f"integrated-gradients:steps=8,layer={layer},rule={rule}"
        )
        close(found.extras.get("grid", found.values), wanted)
        assert found.provenance["passes"] == 9


def test_every_layer_that_all_goes_through_is_complete(curved, sample):
    found = explained(
        curved, sample, "integrated-gradients:steps=60,layer=pixels+first+second+last"
    )
    assert found.provenance["completeness_share"] < 1e-3
    assert set(found.provenance["completeness_gap"]) == {
        PIXELS,
        "first",
        "second",
        "last",
    }
    assert found.values.sum() == pytest.approx(
        found.provenance["explained"], rel=1e-3
    )


def test_a_residual_beside_the_layer_shows_as_a_gap(sample):
    class Beside(Curved):
        def forward(self, x):
            x = self.pool(self.act(self.first(x)))
            return self.head((self.last(self.second(x)) + x[:, :5]).flatten(1))

    torch.manual_seed(11)
    found = explained(
        network(Beside()), sample, "integrated-gradients:steps=20,layer=second"
    )
    assert found.provenance["completeness_share"] > 0.01


def test_pixels_as_a_layer_are_the_trapezoid(curved, sample):
    on_pixels = explained(
        curved, sample, "integrated-gradients:steps=10,rule=trapezoid"
    ).values
    other = integrated.IntegratedGradients(9, layer=(PIXELS,), rule="trapezoid")
    heat = other._on_layers(
        curved,
        curved.view(sample),
        torch.zeros(1, 3, SIDE, SIDE),
        ClassTarget(2, "2"),
    )
    close(heat.values.numpy(), on_pixels)


# ---- expected gradients


def test_expected_gradients_are_the_mean_over_the_draws(curved, sample):
    image = image_of(sample)
    places = integrated.stratified(2, 5, 3)
    even = np.full(5, 0.2)
    each = [
        slow.integrated(exact(curved), image, start, 2, row, even)
        for start, row in zip((image * 0, image * 0 + 1), places, strict=True)
    ]
    found = explained(
        curved, sample, "expected-gradients:samples=10,baseline=black+white,seed=3"
    )
    close(found.values, np.mean(each, axis=0).sum(axis=0))
    ends = [
        slow.score_function(exact(curved), 2)(start)
        for start in (image * 0, image * 0 + 1)
    ]
    assert found.provenance["explained"] == pytest.approx(
        slow.score_function(exact(curved), 2)(image) - np.mean(ends), rel=1e-4
    )


def test_gradient_shap_of_captum(curved, sample):
    """The same expectation: captum draws baselines and places independently, so many
    draws are needed.
    """
    from captum.attr import GradientShap

    pixels = curved.view(sample).pixels
    starts = torch.cat([torch.zeros_like(pixels), torch.ones_like(pixels)])
    torch.manual_seed(12)
    wanted = GradientShap(curved.module).attribute(
        pixels, starts, n_samples=3000, stdevs=0.0, target=2
    )
    found = explained(
        curved, sample, "expected-gradients:samples=400,baseline=black+white"
    ).values
    spread = wanted[0].sum(dim=0).detach().numpy()
    assert np.corrcoef(found.ravel(), spread.ravel())[0, 1] > 0.995
    assert found.sum() == pytest.approx(
        spread.sum(), abs=0.02 * float(np.abs(spread).sum())
    )


def test_places_are_one_in_each_part():
    drawn = integrated.stratified(3, 8, 0)
    np.testing.assert_array_equal(np.floor(drawn * 8), np.tile(np.arange(8), (3, 1)))
    assert not np.array_equal(drawn, integrated.stratified(3, 8, 1))


# ---- guided and blurred paths


def caller(model, index):
    """A model as PAIR's saliency wants it: (n, h, w, 3) arrays to gradients."""

    def call(batch, call_model_args=None, expected_keys=None):
        leaf = (
            torch.as_tensor(np.asarray(batch))
            .permute(0, 3, 1, 2)
            .double()
            .requires_grad_()
        )
        model(leaf)[:, index].sum().backward()
        return {"INPUT_OUTPUT_GRADIENTS": leaf.grad.permute(0, 2, 3, 1).numpy()}

    return call


@pytest.mark.parametrize(
    ("distance", "fraction"), [(0.02, 0.25), (0.3, 0.1), (1.0, 0.5), (0.0, 0.25)]
)
def test_guided_ig_of_saliency(curved, sample, distance, fraction, monkeypatch):
    from saliency.core import GuidedIG

    quantile = np.quantile  # it asks by a name that numpy no longer has
    monkeypatch.setattr(
        np,
        "quantile",
        lambda values, share, interpolation: quantile(
            values, share, method=interpolation
        ),
    )
    image = image_of(sample).transpose(1, 2, 0)
    wanted = GuidedIG().GetMask(
        image,
        caller(exact(curved), 2),
        x_steps=15,
        max_dist=distance,
        fraction=fraction,
        x_baseline=np.zeros_like(image),
    )
    found = explained(
        curved, sample, f"guided-ig:steps=15,distance={distance},fraction={fraction}"
    )
    close(found.values, wanted.sum(axis=2), 1e-3)


def test_guided_ig_without_distance_is_the_straight_way(curved, sample):
    straight = explained(
        curved, sample, "integrated-gradients:steps=12,rule=riemann-left"
    ).values
    close(
        explained(curved, sample, "guided-ig:steps=12,distance=0").values,
        straight,
        1e-4,
    )


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 30.0])
def test_blurs_are_those_of_scipy(sigma):
    image = torch.rand(1, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    close(
        integrated.Blurs(image).at(sigma)[0].numpy(),
        slow.blurred(image[0].double().numpy(), sigma),
        1e-5,
    )


@pytest.mark.parametrize("spacing", ["sigma", "root"])
@pytest.mark.parametrize("side", integrated.SIDES)
def test_blur_ig_is_the_sum_of_its_steps(curved, sample, side, spacing):
    shares = [(1 - step / 6) ** (1 if spacing == "sigma" else 2) for step in range(7)]
    images = [slow.blurred(image_of(sample), 8 * share) for share in shares]
    wanted = slow.by_steps(exact(curved), images, 2, side)
    found = explained(
        curved, sample, f"blur-ig:steps=6,sigma=8,rule={side},spacing={spacing}"
    )
    close(found.values, wanted.sum(axis=0), 1e-4)


def test_blur_ig_of_saliency(curved, sample, monkeypatch):
    """Its derivative taken over a whole step, and its blur mirrored, is our sum with
    the gradient at the sharper end.
    """
    from saliency.core import BlurIG, blur_ig

    def mirrored(image, sigma):
        return slow.blurred(image.transpose(2, 0, 1), sigma).transpose(1, 2, 0)

    monkeypatch.setattr(blur_ig, "gaussian_blur", mirrored)
    image = image_of(sample).transpose(1, 2, 0)
    wanted = BlurIG().GetMask(
        image, caller(exact(curved), 2), max_sigma=6, steps=12, grad_step=0.5
    )
    found = explained(
        curved, sample, "blur-ig:steps=12,sigma=6,spacing=sigma,rule=riemann-right"
    ).values
    close(found, wanted.sum(axis=2), 1e-4)


# ---- XRAI


def masks_of(candidates, shape):
    return [
        np.asarray(row.todense(), dtype=bool).reshape(shape) for row in candidates
    ]


def blobs(seed=0, side=40):
    rng = np.random.default_rng(seed)
    colours = (
        rng.random((4, 4, 3)).repeat(side // 4, axis=0).repeat(side // 4, axis=1)
    )
    return np.clip(colours + rng.normal(0, 0.05, colours.shape), 0, 1)


def test_candidates_are_those_of_saliency():
    from saliency.core.xrai import _get_segments_felzenszwalb

    image = blobs()
    found = masks_of(
        regions(image, registry.explainers.build("xrai").segments, 5), image.shape[:2]
    )
    wanted = _get_segments_felzenszwalb(image, resize_image=False)
    assert sorted(mask.tobytes() for mask in found) == sorted(
        np.asarray(mask, dtype=bool).tobytes() for mask in wanted
    )


@pytest.mark.parametrize("least", [1, 50])
def test_regions_are_taken_as_in_saliency_and_by_the_algorithm(least):
    from saliency.core import XRAI

    image = blobs(1)
    values = np.random.default_rng(2).normal(size=image.shape[:2])
    candidates = regions(
        image, [Felzenszwalb(25, 0.8, 20), Felzenszwalb(250, 0.8, 20)], 2
    )
    masks = masks_of(candidates, values.shape)
    found, rank = taken(values, candidates, least)
    np.testing.assert_allclose(found, slow.xrai(values, masks, least), atol=1e-12)
    theirs, _ = XRAI._xrai(values, masks, min_pixel_diff=least)
    np.testing.assert_allclose(found, theirs, atol=1e-12)
    assert found.sum() == pytest.approx(values.sum())
    assert [rank.min(), len(np.unique(rank))] == [0, rank.max() + 1]


def test_growing_is_a_disk():
    from skimage.morphology import dilation, disk

    labels = segment(Felzenszwalb(50, 0.8, 30), blobs(3))
    for region, mask in enumerate(
        masks_of(regions(blobs(3), [Fixed(labels)], 4), labels.shape)
    ):
        np.testing.assert_array_equal(mask, dilation(labels == region, disk(4)))


class Fixed:
    """A segmentation that is given."""

    def __init__(self, found):
        self.found = found

    def labels(self, image):
        return self.found


def test_xrai_shares_out_the_integrated_gradients(curved, sample):
    whole = explained(
        curved, sample, "xrai:steps=20,segments=grid(3)+grid(2),grow=0,least=1"
    )
    fine = explained(
        curved, sample, "integrated-gradients:steps=20,baseline=black+white"
    )
    assert whole.values.sum() == pytest.approx(fine.values.sum(), rel=1e-4)
    cell = (slice(0, 4), slice(0, 4))
    assert len(np.unique(whole.values[cell])) <= 4


# ---- memory, options, the user's model


def test_kept_bytes_by_hand():
    """What the backward pass needs: the convolution's input, the ReLU's result, the linear
    layer nothing but its weight.
    """

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.head = nn.Linear(8 * SIDE**2, 4, bias=False)

        def forward(self, x):
            return self.head(self.conv(x).relu().flatten(1))

    model = wrap(Small().eval(), mean=(0, 0, 0), std=(1, 1, 1), size=SIDE).using(
        engine="torch"
    )
    floats = 3 * SIDE**2 + 8 * SIDE**2
    assert (
        4 * floats <= model._kept <= 4 * (floats + 16)
    )  # and the mean and std of the normalisation


def test_a_pass_is_as_large_as_memory_allows():
    frame, cpu, cuda = (10, 10), torch.device("cpu"), torch.device("cuda")
    one = 1_000_000 + 4 * (3 * 1000 + 1800)
    assert plan.backward_batch_within(5 * one, 1_000_000, 1000, frame, cpu) == 5
    assert plan.backward_batch_within(one - 1, 1_000_000, 1000, frame, cpu) == 1
    assert plan.backward_batch_within(1 << 40, 90_000_000, 1000, frame, cpu) == 5
    assert plan.backward_batch_within(1 << 40, 1_000_000, 1000, frame, cuda) == 128


def test_no_more_images_stand_than_allowed(curved, sample, monkeypatch):
    seen = []
    trace = type(curved).trace
    monkeypatch.setattr(
        type(curved),
        "trace",
        lambda self, pixels, *rest: (
            seen.append(len(pixels)) or trace(self, pixels, *rest)
        ),
    )
    small = curved.using(memory=1 << 20)
    monkeypatch.setattr(
        plan,
        "backward_batch_within",
        lambda memory, *_: 3 if memory == 1 << 20 else 8,
    )
    monkeypatch.setattr(backward, "_rate", lambda _network, one, _run: one.batch)
    explained(small, sample, "integrated-gradients:steps=10,baseline=black+white")
    assert seen == [3] * 6 + [2]


def test_parameters_ask_for_no_gradient_within_and_do_again_after(curved, sample):
    asked = []
    handle = curved.module.second.register_forward_hook(
        lambda module, *_: asked.append(
            [parameter.requires_grad for parameter in module.parameters()]
        )
    )
    curved.module.first.bias.requires_grad_(False)
    try:
        explained(curved, sample, "gradient")
        assert [True, True] in asked  # the plain pass of the prediction
        assert [False, False] in asked
        after = [parameter.requires_grad for parameter in curved.module.parameters()]
        assert after == [True, False, True, True, True, True]
    finally:
        handle.remove()
        curved.module.first.bias.requires_grad_(True)


def test_frozen_gives_back_after_an_error(curved):
    from consilience.models.layers import frozen

    with pytest.raises(RuntimeError), frozen(curved.module):
        raise RuntimeError
    assert all(parameter.requires_grad for parameter in curved.module.parameters())


def test_spellings(curved):
    spec = "integrated-gradients:baseline=black+blur(sigma=4)+noise(seed=1)"
    built = registry.explainers.build(spec)
    assert [registry.spell(fill) for fill in built.baseline] == [
        "black",
        "blur:sigma=4",
        "noise:seed=1",
    ]
    assert registry.spell(built) == spec
    full = registry.spell(
        api.resolve_explainer(curved, "integrated-gradients:layer=auto"), full=True
    )
    assert "layer=last" in full
    assert "rule=trapezoid" in full


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("integrated-gradients:steps=0", "steps must be at least 1; got 0"),
        (
            "integrated-gradients:steps=1,rule=trapezoid",
            "steps must be at least 2 for the trapezoid rule; got 1",
        ),
        (
            "integrated-gradients:layer=second,rule=gauss-legendre",
            "on layers the rule is one of riemann-left",
        ),
        ("integrated-gradients:layer=secnd", "did you mean 'second'"),
        ("integrated-gradients:baseline=blck", "no fill 'blck'"),
        ("integrated-gradients:baseline=mean", "needs superpixels"),
        ("smoothgrad:noise=-1", "noise must be at least 0; got -1"),
        ("expected-gradients:samples=2", "4 baselines need as many samples; got 2"),
        ("guided-ig:fraction=0", "fraction must be above 0 and at most 1"),
        ("guided-ig:distance=2", "distance must be"),
        ("blur-ig:sigma=0", "sigma must be above 0; got 0"),
        ("xrai:least=0", "least must be at least 1; got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(curved, sample, by, said):
    with pytest.raises(ConsilienceError, match=said) as caught:
        explained(curved, sample, by)
    assert "\n" not in str(caught.value)


def test_many_images_at_once(red_model):
    samples = [planted_image(seed) for seed in range(10)]
    views = [red_model.view(sample) for sample in samples]
    targets = [ClassTarget(1, "red")] * 10
    for by in (
        "gradient",
        "input-x-gradient",
        "guided-ig:steps=3,baseline=black+white",
    ):
        explainer = api.resolve_explainer(red_model, by)
        together = explainer.explain_batch(red_model, views, targets)
        assert len(together) == 10
        for heat, view in zip(together, views, strict=True):
            torch.testing.assert_close(
                heat.values,
                explainer.explain(red_model, view, targets[0]).values,
                rtol=1e-4,
                atol=1e-7,
            )


def test_noise_is_a_share_of_the_range_not_of_the_maximum(curved, monkeypatch):
    """Smilkov et al., section 4: sigma / (x_max - x_min)."""

    asked = []
    plain = gradients._draws

    def draws(image, sigma, seed):
        asked.append(sigma)
        return plain(image, sigma, seed)

    monkeypatch.setattr(gradients, "_draws", draws)
    pale = Sample("pale", np.full((40, 40, 3), 180, np.uint8))
    pale.pixels[:20] = 230
    explained(curved, pale, "smoothgrad:samples=2,noise=0.5")
    assert asked == [pytest.approx(0.5 * 50 / 255, abs=1e-6)]


@pytest.mark.parametrize(("gap", "noted"), [(0.009, False), (0.011, True)])
def test_a_missing_hundredth_of_the_score_is_noted(gap, noted):
    from consilience.explainers.fullgrad import FullGrad, Terms

    terms = Terms((4, 4), "layer")
    terms.sums = [10 * (1 - gap)]
    _, facts = FullGrad()._facts(10.0, terms)
    assert facts["completeness_gap"] == pytest.approx(10 * gap)
    assert ("notes" in facts) == noted


def test_the_worst_layer_speaks_for_completeness(curved, sample):
    found = explained(
        curved, sample, "integrated-gradients:steps=2,layer=pixels+first+last"
    ).provenance
    gaps = [abs(gap) for gap in found["completeness_gap"].values()]
    assert max(gaps) > 2 * min(gaps)
    assert found["completeness_share"] == pytest.approx(
        max(gaps) / abs(found["explained"]), rel=1e-6
    )
