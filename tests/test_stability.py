import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from conftest import planted_image
from scipy import stats
from skimage.metrics import structural_similarity

from consilience import api, images, registry
from consilience.metrics import explained_again, stability
from consilience.metrics.similarity import MEASURES, alike
from consilience.models.callable import wrap_callable
from consilience.types import ConsilienceError, Heat, NotApplicable

NAMES = (
    "max-sensitivity",
    "average-sensitivity",
    "local-lipschitz",
    "seed-agreement",
    "flip-consistency",
    "shift-consistency",
)


@dataclass(frozen=True)
class Brightness:
    """The image itself, its colours summed: moves with the image, and steps as it does."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        return Heat(view.pixels[0].sum(dim=0))


@dataclass(frozen=True)
class Columns:
    """How far to the right a pixel is, whatever the image."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        return Heat(
            torch.arange(view.pixels.shape[-1])
            .float()
            .expand(view.pixels.shape[-2:])
            .clone()
        )


@dataclass(frozen=True)
class Nothing:
    """Zero everywhere."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        return Heat(torch.zeros(view.pixels.shape[-2:]))


@pytest.fixture(scope="module", autouse=True)
def toys():
    """Explainers of known answers, registered as long as these tests run."""
    kinds = {
        "toy-brightness": Brightness,
        "toy-columns": Columns,
        "toy-nothing": Nothing,
    }
    registry.explainers.names()
    for name, kind in kinds.items():
        registry.explainers.register(name)(kind)
    yield
    for name in kinds:
        registry.explainers._entries.pop(name)


def explained(model, by, seed=0):
    sample = planted_image(seed)
    return model.view(sample), api.explain(model, sample, by, target="red")


def score(spec, model, by, seed=0):
    return registry.metrics.build(spec).score(model, *explained(model, by, seed))


def literal_copies(view, samples, radius, seed):
    """Noise as it is documented: a generator of [seed, number] for each copy."""
    for number in range(samples):
        noise = np.random.default_rng([seed, number]).uniform(
            -radius, radius, (1, 3, 64, 64)
        )
        yield torch.clamp(
            view.pixels + torch.tensor(noise, dtype=torch.float32), 0, 1
        )


def literal_map(model, view, pixels, by, target):
    heat = registry.explainers.build(by).explain(
        model, replace(view, pixels=pixels), target
    )
    return images.enlarge(heat.values, (64, 64))


# ---- similarity


def pair(seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(16, 12))
    return a.astype(np.float32), (a + rng.normal(size=a.shape)).astype(np.float32)


def test_similarities_are_scipys_and_scikit_images():
    a, b = pair()
    x, y = a.ravel().astype(float), b.ravel().astype(float)
    assert alike(a, b, "spearman") == pytest.approx(stats.spearmanr(x, y).statistic)
    assert alike(a, b, "pearson") == pytest.approx(stats.pearsonr(x, y).statistic)
    assert alike(a, b, "cosine") == pytest.approx(
        sum(x * y) / math.sqrt(sum(x * x) * sum(y * y))
    )
    scaled = (a.astype(float) / np.abs(a).max(), b.astype(float) / np.abs(b).max())
    assert alike(a, b, "ssim") == pytest.approx(
        structural_similarity(*scaled, data_range=2.0)
    )
    assert alike(a, b, "ssim", magnitude=True) == pytest.approx(
        structural_similarity(*map(np.abs, scaled), data_range=1.0)
    )
    top = [
        set(np.argsort(-values.ravel())[:38].tolist()) for values in (a, b)
    ]  # a fifth of 192
    assert alike(a, b, "iou-at-20") == pytest.approx(
        len(top[0] & top[1]) / len(top[0] | top[1])
    )
    assert alike(a, b, "cosine", magnitude=True) == pytest.approx(
        alike(abs(a), abs(b), "cosine")
    )


@pytest.mark.parametrize("by", MEASURES)
def test_a_map_is_like_itself_and_flat_maps_are_like_each_other_alone(by):
    a, b = pair()
    assert alike(a, a, by) == pytest.approx(1)
    assert alike(a, 3 * a, by) == pytest.approx(1)
    assert alike(a, b, by) == pytest.approx(alike(b, a, by))
    assert alike(np.zeros((5, 5)), np.full((5, 5), 2.0), by) == 1
    assert alike(a, np.full(a.shape, 2.0), by) == 0
    assert alike(a[:5, :4], b[:5, :4], by) <= 1  # smaller than SSIM's window


# ---- sensitivity


@pytest.mark.parametrize("by", ["hirescam", "gradcam", "toy-brightness"])
def test_max_sensitivity_is_captums(red_model, by):
    view, explanation = explained(red_model, by)
    copies = torch.cat(list(literal_copies(view, 6, 0.05, 2)))

    def explain(inputs):
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        return (
            torch.stack(
                [
                    literal_map(red_model, view, one[None], by, explanation.target)
                    for one in images
                ]
            ),
        )

    def perturb(inputs):
        return (copies,)

    expected = sensitivity_max(
        explain, view.pixels, perturb, n_perturb_samples=6, max_examples_per_batch=6
    )
    found = registry.metrics.build(
        "max-sensitivity:samples=6,radius=.05,seed=2"
    ).score(red_model, view, explanation)
    assert found.value == pytest.approx(float(expected), rel=1e-4)
    assert found.value > 0


def test_average_sensitivity_and_lipschitz_by_hand(red_model):
    view, explanation = explained(red_model, "toy-brightness")
    moves, slopes = [], []
    whole = view.pixels[0].double().numpy()
    for pixels in literal_copies(view, 5, 0.02, 0):
        step = pixels[0].double().numpy() - whole
        moves.append(math.sqrt((step.sum(axis=0) ** 2).sum()))
        slopes.append(moves[-1] / math.sqrt((step**2).sum()))
    norm = math.sqrt((whole.sum(axis=0) ** 2).sum())
    options = "samples=5"
    average = registry.metrics.build(f"average-sensitivity:{options}").score(
        red_model, view, explanation
    )
    raw = registry.metrics.build(f"local-lipschitz:{options},scale=raw").score(
        red_model, view, explanation
    )
    unit = registry.metrics.build(f"local-lipschitz:{options}").score(
        red_model, view, explanation
    )
    assert average.value == pytest.approx(np.mean(moves) / norm, rel=1e-4)
    np.testing.assert_allclose(average.curve, np.array(moves) / norm, rtol=1e-4)
    assert raw.value == pytest.approx(max(slopes), rel=1e-4)
    assert unit.value == pytest.approx(max(slopes) / norm, rel=1e-4)
    assert raw.value <= math.sqrt(3)  # the norm of summing three colours


@pytest.mark.parametrize(
    "name", ["max-sensitivity", "average-sensitivity", "local-lipschitz"]
)
def test_what_knows_nothing_of_the_image_does_not_move(red_model, name):
    assert score(name, red_model, "toy-columns").value == 0
    assert score(name, red_model, "constant").value == 0
    assert (
        score(name, red_model, "random").value
        > 10 * score(name, red_model, "hirescam").value
    )
    with pytest.raises(NotApplicable, match="0 everywhere"):
        score(name, red_model, "toy-nothing")


def test_more_draws_begin_with_the_same_and_can_only_raise_the_maximum(red_model):
    few, many = (
        score(f"max-sensitivity:samples={n}", red_model, "hirescam") for n in (3, 8)
    )
    np.testing.assert_allclose(many.curve[:3], few.curve, rtol=1e-6)
    assert many.value >= few.value
    assert (
        score(
            "max-sensitivity:samples=3,seed=1", red_model, "hirescam"
        ).curve.tolist()
        != few.curve.tolist()
    )


def test_noise_stays_in_the_ball_and_in_the_image(red_model):
    view = red_model.view(planted_image())
    for copy in stability.noisy(view, 3, 0.3, 0):
        assert float((copy.pixels - view.pixels).abs().max()) <= 0.3 + 1e-6
        assert 0 <= float(copy.pixels.min()) <= float(copy.pixels.max()) <= 1
    spread = next(
        iter(
            stability.noisy(
                replace(view, pixels=torch.full_like(view.pixels, 0.5)),
                1,
                0.05,
                0,
                "normal",
            )
        )
    )
    assert float(spread.pixels.std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    "spec",
    ["max-sensitivity:samples=5", "local-lipschitz:samples=5", "shift-consistency"],
)
def test_the_size_of_batches_does_not_show(red_model, spec):
    small = red_model.using(memory=1 << 20)
    assert small.batch < 5 < red_model.batch
    for by in ("gradcam", "toy-brightness"):
        assert score(spec, small, by).value == pytest.approx(
            score(spec, red_model, by).value, rel=1e-5
        )


def test_images_on_which_the_model_changes_its_mind_are_counted():
    """A model that says "bright" from a mean of .5, and an image a hair below."""

    def bright(pixels):
        mean = pixels.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)

    model = wrap_callable(bright, size=64, outputs="logits")
    sample = replace(
        planted_image(), pixels=np.full((64, 64, 3), 127, dtype=np.uint8)
    )
    view, explanation = (
        model.view(sample),
        api.explain(model, sample, "toy-brightness"),
    )
    found = registry.metrics.build("max-sensitivity:samples=30,radius=.4").score(
        model, view, explanation
    )
    expected = sum(
        float(pixels.mean()) > 0.5 for pixels in literal_copies(view, 30, 0.4, 0)
    )
    assert 0 < expected < 30
    assert found.facts["changed"] == expected


# ---- seeds, flips, shifts


def test_agreement_across_seeds_is_the_mean_over_pairs(red_model):
    view, explanation = explained(red_model, "rise:masks=60,seed=4")
    found = registry.metrics.build("seed-agreement:seeds=2").score(
        red_model, view, explanation
    )
    maps = [
        api.explain(
            red_model, planted_image(), f"rise:masks=60,seed={seed}", target="red"
        ).values
        for seed in (4, 5, 6)
    ]
    pairs = [
        stats.spearmanr(maps[i].ravel(), maps[j].ravel()).statistic
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    np.testing.assert_allclose(found.curve, pairs, atol=1e-6)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.facts["seeds"] == [4, 5, 6]


def test_more_masks_agree_better_across_seeds_and_noise_does_not(red_model):
    spec = "seed-agreement:similarity=pearson"
    few, many = (
        score(spec, red_model, f"rise:masks={masks}").value for masks in (30, 800)
    )
    assert many > few + 0.1
    assert abs(score("seed-agreement:seeds=4", red_model, "random").value) < 0.3
    with pytest.raises(NotApplicable, match="no seed"):
        score("seed-agreement", red_model, "gradcam")


def test_flips_by_hand(red_model):
    assert score(
        "flip-consistency", red_model, "toy-brightness"
    ).value == pytest.approx(1)
    assert score("flip-consistency", red_model, "centre").value == pytest.approx(1)
    assert score("flip-consistency", red_model, "hirescam").value == pytest.approx(
        1, abs=1e-3
    )
    assert score("flip-consistency", red_model, "toy-columns").value == pytest.approx(
        -1
    )
    assert score("flip-consistency", red_model, "constant").value == 1
    assert abs(score("flip-consistency", red_model, "random").value) < 0.6


def test_shifts_by_hand(red_model):
    """The image's own brightness moves with it; what stands still does not."""
    assert score(
        "shift-consistency", red_model, "toy-brightness"
    ).value == pytest.approx(1)
    assert score("shift-consistency", red_model, "constant").value == 1
    view, explanation = explained(red_model, "centre")
    found = registry.metrics.build(
        "shift-consistency:pixels=5,similarity=cosine"
    ).score(red_model, view, explanation)
    blob = explanation.values.astype(float)
    windows = [
        (blob[:-5], blob[5:]),
        (blob[5:], blob[:-5]),
        (blob[:, :-5], blob[:, 5:]),
        (blob[:, 5:], blob[:, :-5]),
    ]
    expected = [
        float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))
        for a, b in windows
    ]
    np.testing.assert_allclose(found.curve, expected, rtol=1e-6)
    with pytest.raises(NotApplicable, match="leaves too little"):
        score("shift-consistency:pixels=32", red_model, "centre")


def test_a_shift_repeats_the_border(red_model):
    view = red_model.view(planted_image())
    moved = stability.shifted(view, 3, -2).pixels[0].numpy()
    still = view.pixels[0].numpy()
    for y in (0, 2, 3, 40, 63):
        for x in (0, 5, 61, 62, 63):
            np.testing.assert_array_equal(
                moved[:, y, x], still[:, max(y - 3, 0), min(x + 2, 63)]
            )


def test_a_whole_cell_is_the_shift_that_a_grid_can_follow(red_model):
    """The network's grid has cells of 8: evidence moved by 8 moves by one, evidence
    moved by 4 is spread over two.
    """
    spec = "shift-consistency:similarity=pearson,pixels="
    whole, part = (
        score(f"{spec}{pixels}", red_model, "hirescam").value for pixels in (8, 4)
    )
    assert whole > 0.99
    assert part < whole - 0.01


@pytest.mark.parametrize(
    "spec", ["seed-agreement", "flip-consistency:ssim", "shift-consistency:iou-at-20"]
)
def test_the_line_of_chance_is_the_similarity_to_random_maps(red_model, spec):
    by = "rise:masks=60"
    found = score(spec, red_model, by)
    values = api.explain(red_model, planted_image(), by, target="red").values
    controls = [f"random:seed={seed}" for seed in range(1000, 1010)]
    noise = [
        api.explain(red_model, planted_image(), control, target="red").values
        for control in controls
    ]
    against = [alike(values, one, found.facts["similarity"]) for one in noise]
    assert found.facts["random"] == pytest.approx(np.mean(against))
    assert found.facts["random_sd"] == pytest.approx(np.std(against, ddof=1))


# ---- all of them


@pytest.mark.parametrize("name", NAMES)
def test_numbers_come_back_the_same_and_the_model_too(red_model, name):
    module = red_model.module
    module.train()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        first, second = (score(name, red_model, "rise:masks=10") for _ in range(2))
        assert (first.value, first.curve.tolist()) == (
            second.value,
            second.curve.tolist(),
        )
        assert module.training
        assert all(
            torch.equal(one, other)
            for one, other in zip(before, module.parameters(), strict=True)
        )
        low, high = registry.metrics.get(name).bounds
        assert low <= first.value <= high
    finally:
        module.eval()


def test_what_auto_became_is_explained_again(red_model):
    view, explanation = explained(red_model, "gradcam")
    assert explained_again.explainer_of(explanation).layer == (
        red_model.target_layer(),
    )
    lost = replace(explanation, explainer="gone:1", provenance={})
    with pytest.raises(NotApplicable, match="cannot be run again"):
        registry.metrics.build("flip-consistency").score(red_model, view, lost)


def test_a_map_that_is_not_finite_has_no_score(red_model):
    view, explanation = explained(red_model, "toy-brightness")
    broken = replace(view, pixels=torch.full_like(view.pixels, float("nan")))
    with pytest.raises(NotApplicable, match="not finite"):
        registry.metrics.build("flip-consistency").score(
            red_model, broken, explanation
        )


@pytest.mark.parametrize(
    "spec",
    [
        "max-sensitivity:samples=0",
        "average-sensitivity:radius=0",
        "local-lipschitz:radius=2",
        "max-sensitivity:seed=-1",
        "seed-agreement:seeds=0",
        "shift-consistency:pixels=0",
        "flip-consistency:similarity=likeness",
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        registry.metrics.build(spec)
