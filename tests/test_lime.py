from dataclasses import replace

import numpy as np
import pytest
import torch
from lime.lime_base import LimeBase
from lime.lime_image import LimeImageExplainer
from lime.wrappers.scikit_image import SegmentationAlgorithm
from oracles_lime import (
    Linear,
    cosine_kernel,
    normal_equations,
    random_model,
    target,
    textured,
    view_of,
    weighted_r2,
)
from oracles_surrogate import jackknife, mean_jaccard, told_from_the_others
from skimage import data, transform
from sklearn.linear_model import Ridge

from consilience import images, registry
from consilience.perturb.designs import draws, groups
from consilience.perturb.surrogate import (
    Scored,
    certainty,
    effective,
    fit_surrogate,
    forward,
    least_squares,
    looks,
)
from consilience.types import ConsilienceError

STUDY = "lime:samples=700,segments=quickshift(kernel_size=5,max_dist=150,ratio=.3),fill=percentile,refit_alpha=.5,draw=lime"


def lime(spec):
    return registry.explainers.build(spec)


def chelsea(size=200):
    return (
        transform.resize(data.chelsea(), (size, size), anti_aliasing=True) * 255
    ).astype(np.uint8)


IMAGES = {"textured": textured(shape=(160, 150)), "chelsea": chelsea()}


def bent(logits):
    """Something curved, so that no surrogate is exact and most superpixels matter."""
    return 4 * torch.sin(logits) + logits**2 / 3


def curved(shape, seed=0, batch=32):
    return random_model(shape, seed, batch, scale=0.02, bend=bent)


def run_peer(
    model, view, seed, segmenter, hide=None, samples=700, features=10, ridge=None
):
    """lime itself, on the image as float64 in [0, 1] and the same scores."""

    def classify(base_images):
        batch = torch.from_numpy(base_images.transpose(0, 3, 1, 2)).float()
        return model.scores(batch).softmax(dim=-1).numpy()

    return LimeImageExplainer(random_state=seed).explain_instance(
        images.to_array(view.pixels),
        classify,
        labels=(0,),
        top_labels=None,
        hide_color=hide,
        num_features=features,
        num_samples=samples,
        batch_size=32,
        segmentation_fn=segmenter,
        model_regressor=ridge,
        random_seed=seed,
    )


def assert_is_limes(extras, peer, features=10):
    assert len(extras["weights"]) > 15
    assert np.abs(extras["refit"]).max() > 0.01
    np.testing.assert_array_equal(extras["segments"], peer.segments)
    assert list(extras["selected"]) == [index for index, _ in peer.local_exp[0]]
    for index, weight in peer.local_exp[0]:
        assert extras["refit"][index] == pytest.approx(weight, abs=1e-6)
    assert np.count_nonzero(extras["refit"]) == len(peer.local_exp[0])
    assert float(extras["r2_refit"]) == pytest.approx(peer.score, abs=1e-6)
    _, mask = peer.get_image_and_mask(0, positive_only=True, num_features=features)
    np.testing.assert_array_equal(
        (extras["refit"] > 0)[extras["segments"]], mask == 1
    )


# ---- against lime


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("image", IMAGES)
def test_the_study_is_limes(image, seed):
    view = view_of(IMAGES[image])
    model = curved(IMAGES[image].shape[:2])
    heat = lime(f"{STUDY},seed={seed}").explain(model, view, target())
    segmenter = SegmentationAlgorithm(
        "quickshift", kernel_size=5, max_dist=150, ratio=0.3
    )
    hide = np.percentile(images.to_array(view.pixels), 20, axis=(0, 1))
    assert_is_limes(
        heat.extras,
        run_peer(model, view, seed, segmenter, hide, ridge=Ridge(alpha=0.5)),
    )


@pytest.mark.parametrize("features", [5, 6, 7, 100000])
def test_defaults_are_limes_whatever_the_number_of_features(features):
    view, model = view_of(IMAGES["chelsea"]), curved((200, 200))
    heat = lime(f"lime:300,features={features},draw=lime,seed=5").explain(
        model, view, target()
    )
    peer = run_peer(model, view, 5, None, samples=300, features=features)
    assert_is_limes(heat.extras, peer, features)


def test_the_fit_over_all_is_limes_on_many_superpixels():
    view, model = view_of(textured(shape=(80, 72))), curved((80, 72))
    spec = "lime:400,segments=quickshift(kernel_size=2,max_dist=6),features=1000,alpha=.3,refit_alpha=.3,draw=lime,seed=2"
    heat = lime(spec).explain(model, view, target())
    peer = run_peer(
        model,
        view,
        2,
        SegmentationAlgorithm("quickshift", kernel_size=2, max_dist=6, ratio=0.2),
        samples=400,
        features=1000,
        ridge=Ridge(alpha=0.3),
    )
    weights = dict(peer.local_exp[0])
    assert len(weights) == len(heat.extras["weights"]) > 40
    np.testing.assert_allclose(
        heat.extras["weights"],
        [weights[index] for index in range(len(weights))],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        heat.extras["weights"], heat.extras["refit"], atol=1e-9
    )
    assert float(heat.extras["intercept"]) == pytest.approx(
        peer.intercept[0], abs=1e-6
    )
    assert float(heat.extras["r2"]) == pytest.approx(peer.score, abs=1e-6)


def test_lime_cuts_means_of_whole_numbers_and_ours_are_exact():
    pixels = textured(shape=(24, 24))
    view, labels = view_of(pixels), np.zeros((24, 24), dtype=int)
    seen = []
    LimeImageExplainer(random_state=0).data_labels(
        pixels,
        pixels.copy(),
        labels,
        lambda batch: seen.append(batch) or np.zeros((len(batch), 1)),
        2,
    )
    assert (
        seen[0].dtype == np.uint8
    )  # so whatever is written into its image is cut to whole numbers
    exact = (
        registry.fills.build("mean").image(view, labels)[0, :, 0, 0].double().numpy()
        * 255
    )
    np.testing.assert_allclose(exact, pixels.mean(axis=(0, 1)), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_forward_selection_chooses_what_lime_chooses(seed):
    rng = np.random.default_rng(seed)
    on = rng.integers(0, 2, (60, 14))
    on[:, 9] = on[:, 2]  # a twin: the first of equals
    on[:, 11] = 1  # says nothing
    scores = (
        on @ rng.normal(size=14) + 0.3 * rng.normal(size=60) + on[:, 0] * on[:, 1]
    )
    weights = rng.random(60)
    theirs = LimeBase(None).forward_selection(on, scores, weights, 6)
    np.testing.assert_array_equal(
        forward(on.astype(float), scores, weights, 6), theirs
    )


def test_forward_selection_never_chooses_twice():
    rng = np.random.default_rng(0)
    on = rng.integers(0, 2, (4, 9)).astype(float)
    assert sorted(forward(on, rng.normal(size=4), np.ones(4), 9)) == list(range(9))
    assert list(forward(on, np.ones(4), np.ones(4), 3)) == [0, 1, 2]


# ---- against formulas


def test_effective_sample_size():
    assert effective(np.ones(8)) == pytest.approx(8)
    assert effective(np.array([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective(np.array([3.0, 1.0])) == pytest.approx(16 / 10)


@pytest.mark.parametrize("draw", ["independent", "antithetic", "hadamard", "lime"])
def test_extras_are_what_the_normal_equations_say(draw):
    view, model = view_of(textured(shape=(30, 30))), curved((30, 30))
    heat = lime(
        f"lime:150,segments=grid(5),features=8,alpha=.02,refit_alpha=.7,draw={draw},seed=4"
    ).explain(model, view, target())
    extras = heat.extras
    on = draws(draw, 150, 25, 4)
    fill = registry.fills.build("mean").image(view, extras["segments"])
    keep = torch.from_numpy(on[:, extras["segments"]])[:, None]
    scores = (
        target()
        .of(model.scores(torch.where(keep, view.pixels, fill)))
        .double()
        .numpy()
    )
    weights = cosine_kernel(on, 0.25)
    coefficients, intercept = normal_equations(on, scores, weights, 0.02)
    np.testing.assert_allclose(extras["weights"], coefficients, atol=1e-9)
    assert float(extras["intercept"]) == pytest.approx(intercept, abs=1e-9)
    assert float(extras["r2"]) == pytest.approx(
        weighted_r2(on, scores, weights, coefficients, intercept), abs=1e-9
    )
    assert float(extras["ess"]) == pytest.approx(
        sum(weights) ** 2 / sum(w * w for w in weights)
    )
    kept = sorted(range(25), key=lambda index: -abs(coefficients[index]))[:8]
    part, part_intercept = normal_equations(on[:, kept], scores, weights, 0.7)
    np.testing.assert_allclose(extras["refit"][kept], part, atol=1e-9)
    assert set(extras["selected"]) == set(kept)
    np.testing.assert_allclose(
        np.abs(extras["refit"][extras["selected"]]),
        sorted(np.abs(part), reverse=True),
        atol=1e-9,
    )
    assert np.count_nonzero(extras["refit"]) == 8
    expected = weighted_r2(on[:, kept], scores, weights, part, part_intercept)
    assert float(extras["r2_refit"]) == pytest.approx(expected, abs=1e-9)
    np.testing.assert_array_equal(
        heat.values.numpy(), extras["weights"][extras["segments"]].astype(np.float32)
    )


def additive(segments, coefficients, pixels):
    """A linear model that says the sum of the coefficients of the superpixels that are
    there, on a black fill.
    """
    planes = np.zeros((2, *pixels.shape[1:]))
    for number, coefficient in enumerate(coefficients):
        inside = segments == number
        planes[0][:, inside] = coefficient / pixels[0][:, inside].double().sum()
    return Linear(planes)


@pytest.mark.parametrize("draw", ["independent", "antithetic", "hadamard", "lime"])
def test_weights_of_a_linear_model_are_its_weights(draw):
    view = view_of(np.maximum(textured(shape=(48, 48)), 1))
    segments = registry.segmenters.build("grid:5").labels(
        images.to_array(view.pixels)
    )
    truth = np.random.default_rng(0).normal(size=25)
    spec = f"lime:samples=400,segments=grid(5),alpha=1e-9,refit_alpha=1e-9,fill=black,features=25,score=logit,draw={draw}"
    heat = lime(spec).explain(
        additive(segments, truth, view.pixels), view, target("logit")
    )
    np.testing.assert_allclose(heat.extras["weights"], truth, atol=1e-5)
    np.testing.assert_allclose(heat.extras["refit"], truth, atol=1e-5)
    assert float(heat.extras["intercept"]) == pytest.approx(0, abs=1e-5)
    assert float(heat.extras["r2"]) == pytest.approx(1, abs=1e-9)
    assert list(heat.extras["selected"]) == sorted(
        range(25), key=lambda index: -abs(truth[index])
    )


def test_permuted_labels_permute_the_weights(monkeypatch):
    """The same edited images under other names: labels and columns of the draw are
    permuted together.
    """
    order = np.random.default_rng(8).permutation(16)
    view, model = view_of(textured(shape=(32, 32))), curved((32, 32))
    plain = lime("lime:200,segments=grid(4)").explain(model, view, target()).extras

    class Permuted:
        def labels(self, image):
            return order[registry.segmenters.build("grid:4").labels(image)]

    on = np.ascontiguousarray(draws("antithetic", 200, 16, 0)[:, np.argsort(order)])
    monkeypatch.setattr("consilience.explainers.lime.draws", lambda *_: on)
    explainer = registry.explainers.get("lime")(200, segments=Permuted())
    moved = explainer.explain(model, view, target()).extras
    np.testing.assert_allclose(moved["weights"][order], plain["weights"], atol=1e-9)
    np.testing.assert_allclose(moved["refit"][order], plain["refit"], atol=1e-9)
    np.testing.assert_array_equal(moved["selected"], order[plain["selected"]])
    assert float(moved["r2"]) == pytest.approx(float(plain["r2"]))


# ---- how sure it is


def additive_and_noise(segments, coefficients, pixels, bend):
    """A sum of coefficients of the superpixels that are there, bent: interactions of
    every order.
    """
    linear = additive(segments, coefficients, pixels)
    linear.bend = bend
    return linear


def scores_of(model, view, segments, on, fill="black"):
    made = registry.fills.build(fill).image(view, segments)
    keep = torch.from_numpy(on[:, segments])[:, None]
    return (
        target("logit")
        .of(model.scores(torch.where(keep, view.pixels, made)))
        .double()
        .numpy()
    )


def bent_case(gaps=(9, 8, 7, 6, 5, 1, 1, 1, 1, 1, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1)):
    view = view_of(np.maximum(textured(shape=(32, 32)), 1))
    segments = registry.segmenters.build("grid:4").labels(
        images.to_array(view.pixels)
    )
    return (
        view,
        segments,
        additive_and_noise(
            segments, np.array(gaps), view.pixels, lambda x: x + 0.02 * x**2
        ),
    )


SPEC = "lime:segments=grid(4),fill=black,score=logit,features=5"


@pytest.mark.parametrize(
    ("draw", "pairs"), [("independent", 1), ("antithetic", 2), ("lime", 1)]
)
def test_stderr_and_r2_out_are_those_of_deletion(draw, pairs):
    view, segments, model = bent_case()
    extras = (
        lime(f"{SPEC},samples=150,draw={draw},seed=3")
        .explain(model, view, target("logit"))
        .extras
    )
    on = draws(draw, 150, 16, 3)
    together = np.arange(150).reshape(-1, pairs)
    case = (
        on,
        scores_of(model, view, segments, on),
        cosine_kernel(on, 0.25),
        0.01,
        together,
    )
    np.testing.assert_allclose(
        extras["stderr"], np.sqrt(np.diag(jackknife(*case))), rtol=1e-6
    )
    assert float(extras["r2_out"]) == pytest.approx(
        told_from_the_others(*case), abs=1e-9
    )
    assert extras["p_top"].sum() == pytest.approx(5)
    np.testing.assert_array_equal(extras["p_top"][:5], 1)


def test_it_stops_where_the_top_is_known_and_shows_no_more_images():
    view, _, model = bent_case()
    heat = lime(f"{SPEC},samples=2000,until=stable").explain(
        model, view, target("logit")
    )
    assert heat.facts["passes"] == sum(model.sizes) == 128
    assert (heat.facts["stable"], heat.facts["verdict"]) == (
        True,
        {"code": "stable", "draws": 128},
    )
    assert float(heat.extras["p_set"]) > 1 - 0.05 / 5
    short = lime(f"{SPEC},samples=128").explain(model, view, target("logit"))
    for name in short.extras:
        assert short.extras[name].tobytes() == heat.extras[name].tobytes()


def test_a_tie_is_never_called_stable_and_is_named():
    view, _, model = bent_case((9, 8, 7, 6, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    heat = lime(f"{SPEC},samples=600,until=stable").explain(
        model, view, target("logit")
    )
    assert heat.facts["passes"] == sum(model.sizes) == 600
    assert not heat.facts["stable"]
    verdict = heat.facts["verdict"]
    assert sorted(verdict.pop("rivals")) == [4, 6]
    assert verdict == {"code": "not-told-apart", "draws": 600, "place": 5}
    np.testing.assert_array_equal(heat.extras["p_top"][:4], 1)
    assert 0.02 < heat.extras["p_top"][4] < 0.98


def test_where_all_superpixels_are_selected_nothing_is_called_stable_or_sure():
    view, _, model = bent_case()
    heat = lime(
        "lime:segments=grid(4),fill=black,score=logit,features=16,samples=500,until=stable"
    ).explain(model, view, target("logit"))
    assert (heat.facts["stable"], heat.facts["passes"]) == (False, 500)
    assert heat.facts["verdict"] == {
        "code": "nothing-left-out",
        "draws": 500,
        "superpixels": 16,
    }
    assert np.isnan(heat.extras["p_top"]).all()
    assert np.isfinite(heat.extras["stderr"]).all()


def test_orthogonal_draws_do_not_say_how_sure_they_are():
    view, _, model = bent_case()
    heat = lime(f"{SPEC},samples=512,draw=hadamard").explain(
        model, view, target("logit")
    )
    assert heat.facts["verdict"]["code"] == "design-cannot-tell"
    assert not heat.facts["stable"]
    for name in ("stderr", "p_top", "p_set"):
        assert np.isnan(heat.extras[name]).all()
    with pytest.raises(ConsilienceError, match="draw=antithetic does"):
        lime("lime:draw=hadamard,until=stable")


def three_at_once(bits):
    """f = .2 + .5 [x0 and x1 and x2] + .05 x3, as a superpixel model says it."""
    return 0.2 + 0.5 * bits[:, :3].all(axis=1) + 0.05 * bits[:, 3]


@pytest.mark.parametrize("count", [20, 30])
def test_strong_interactions_are_not_called_stable_of_a_wrong_set(count):
    """In an orthogonal array the product of three columns is a fourth one. Pairs of
    fair coins have no aliases: 100 runs of up to 512 draws.
    """
    wrong = said = covered = told = 0
    exact = draws("independent", 100_000, count, 77)
    truth = literal_fit(exact, three_at_once(exact), cosine_kernel(exact, 0.25))
    right = {0, 1, 2}
    for seed in range(100):
        on = draws("antithetic", 512, count, seed)
        scores = three_at_once(on)
        stops = looks(512, count)
        for stop in stops:
            data = Scored(
                on[:stop].astype(float),
                scores[:stop],
                cosine_kernel(on[:stop], 0.25),
                groups("antithetic", stop),
            )
            fit = least_squares(data, 0.01)
            sure = certainty(fit, scores[:stop], 3, seed)
            if sure.p_set >= 1 - 0.05 / len(stops):
                said += 1
                best = set(np.argsort(-np.abs(fit.coefficients))[:3])
                wrong += best != right
                break
        covered += (np.abs(fit.coefficients - truth) <= 1.96 * sure.stderr).sum()
        told += count
    assert wrong <= 5
    assert said > 80
    assert covered / told > 0.92


def literal_fit(on, scores, weights):
    """Weighted least squares with a constant, by the normal equations."""
    design = np.column_stack([np.ones(len(on)), on])
    weighed = design * weights[:, None]
    return np.linalg.solve(design.T @ weighed, weighed.T @ scores)[1:]


def test_repeats_are_the_seeds_after_and_are_fitted_together():
    view, segments, model = bent_case(
        (9, 8, 7, 2, 1.9, 1.8, 1.7, 1.6, 1, 1, 1, 1, 1, 1, 1, 1)
    )
    heat = lime(f"{SPEC},samples=81,repeats=3,seed=4").explain(
        model, view, target("logit")
    )
    assert heat.facts["passes"] == 243
    parts = [draws("antithetic", 81, 16, seed) for seed in (4, 5, 6)]
    scores = [scores_of(model, view, segments, part) for part in parts]
    on = np.concatenate(parts)
    coefficients, _ = normal_equations(
        on, np.concatenate(scores), cosine_kernel(on, 0.25), 0.01
    )
    np.testing.assert_allclose(heat.extras["weights"], coefficients, atol=1e-6)
    tops = []
    for part, score in zip(parts, scores, strict=True):
        alone, _ = normal_equations(part, score, cosine_kernel(part, 0.25), 0.01)
        tops.append(sorted(range(16), key=lambda index: -abs(alone[index]))[:5])
    assert heat.facts["jaccard"] == pytest.approx(mean_jaccard(tops))
    assert heat.facts["jaccard"] < 1
    pairs = np.concatenate(
        [
            np.where((at := np.arange(82)) < 81, at + 81 * run, -1).reshape(-1, 2)
            for run in range(3)
        ]
    )
    expected = jackknife(
        on, np.concatenate(scores), cosine_kernel(on, 0.25), 0.01, pairs
    )
    np.testing.assert_allclose(
        heat.extras["stderr"], np.sqrt(np.diag(expected)), rtol=1e-6
    )


@pytest.mark.parametrize("surrogate", ["wls", "lasso", "bayesian-ridge"])
def test_other_surrogates(surrogate):
    view, segments, model = bent_case()
    extras = (
        lime(f"{SPEC},samples=200,surrogate={surrogate}")
        .explain(model, view, target("logit"))
        .extras
    )
    on = draws("antithetic", 200, 16, 0)
    data = Scored(
        on.astype(float),
        scores_of(model, view, segments, on),
        cosine_kernel(on, 0.25),
        np.arange(200).reshape(-1, 2),
    )
    np.testing.assert_allclose(
        extras["weights"],
        fit_surrogate(surrogate, data, 0.01, 5)[0].coefficients,
        atol=1e-9,
    )
    assert set(extras["selected"]) == {0, 1, 2, 3, 4}
    if surrogate == "lasso":
        assert np.count_nonzero(extras["weights"]) == 5
        assert extras["path"].shape == (len(extras["path_alpha"]), 16)


# ---- seeds and edges


def test_same_seed_same_bytes_whatever_the_chunks():
    view = view_of(textured(shape=(30, 30)))
    found = [
        lime("lime:300,segments=grid(4),seed=2,until=stable").explain(
            curved((30, 30), batch=batch), view, target()
        )
        for batch in (1, 7, 32, 500)
    ]
    for heat in found[1:]:
        assert heat.values.numpy().tobytes() == found[0].values.numpy().tobytes()
        assert heat.extras.keys() == found[0].extras.keys()
        for name in heat.extras:
            assert heat.extras[name].tobytes() == found[0].extras[name].tobytes()


def test_the_seed_moves_the_weights_and_never_the_superpixels():
    view, model = view_of(textured(shape=(80, 72))), curved((80, 72))
    first, second = (
        lime(f"lime:100,seed={seed}").explain(model, view, target()).extras
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first["segments"], second["segments"])
    assert (first["weights"] != second["weights"]).all()


def test_the_segmenters_seed_never_reaches_the_draws():
    view, model = view_of(np.full((30, 30, 3), 77, dtype=np.uint8)), curved((30, 30))
    one = (
        "lime:60,fill=black,segments=quickshift(kernel_size=40,max_dist=200,seed={})"
    )
    first, second = (
        lime(one.format(seed)).explain(model, view, target()).extras
        for seed in (1, 2)
    )
    assert first["segments"].max() == second["segments"].max() == 0
    assert first["weights"].tobytes() == second["weights"].tobytes()


def test_facts_tell_what_was_done():
    facts = (
        lime("lime:50,segments=grid(4),seed=6")
        .explain(curved((30, 30)), view_of(textured(shape=(30, 30))), target())
        .facts
    )
    assert (facts["passes"], facts["seed"], facts["superpixels"]) == (50, 6, 16)
    assert {"segmentation_seconds", "model_seconds", "fit_seconds"} < facts.keys()
    assert "notes" not in facts


def test_one_superpixel_is_its_own_difference():
    view, model = view_of(textured(shape=(20, 20))), curved((20, 20))
    heat = lime("lime:40,segments=grid(1),alpha=1e-12,fill=black").explain(
        model, view, target()
    )
    on, off = (
        target()
        .of(model.scores(torch.cat([view.pixels, torch.zeros_like(view.pixels)])))
        .double()
        .tolist()
    )
    np.testing.assert_allclose(heat.values, on - off, atol=1e-6)
    assert list(heat.extras["selected"]) == [0]


def test_a_flat_image_has_nothing_to_explain():
    view = view_of(np.full((24, 24, 3), 128, dtype=np.uint8))
    for segments in ("felzenszwalb", "grid(4)"):
        heat = lime(f"lime:40,segments={segments}").explain(
            curved((24, 24)), view, target()
        )
        assert np.abs(heat.values.numpy()).max() < 1e-12
        assert np.isnan(heat.extras["r2"])
        assert np.isnan(heat.extras["r2_refit"])
        assert "same score" in heat.facts["notes"][0]


@pytest.mark.parametrize("selection", ["highest", "forward", "none"])
def test_fewer_samples_than_superpixels_are_noted_and_finite(selection):
    view, model = view_of(textured(shape=(40, 40))), curved((40, 40))
    heat = lime(f"lime:20,segments=grid(6),selection={selection}").explain(
        model, view, target()
    )
    assert torch.isfinite(heat.values).all()
    assert "20 samples for 36 superpixels" in heat.facts["notes"][0]
    assert np.isnan([*heat.extras["stderr"], *heat.extras["p_top"]]).all()
    assert heat.facts["verdict"] == {
        "code": "too-few-draws",
        "draws": 20,
        "superpixels": 36,
    }
    on = draws("antithetic", 20, 36, 0)
    keep = torch.from_numpy(on[:, heat.extras["segments"]])[:, None]
    fill = registry.fills.build("mean").image(view, heat.extras["segments"])
    scores = (
        target()
        .of(model.scores(torch.where(keep, view.pixels, fill)))
        .double()
        .numpy()
    )
    expected, _ = normal_equations(on, scores, cosine_kernel(on, 0.25), 0.01)
    np.testing.assert_allclose(heat.extras["weights"], expected, atol=1e-8)


def test_a_narrow_kernel_leaves_few_draws_and_no_nan():
    view, model = view_of(textured(shape=(24, 24))), curved((24, 24))
    heat = lime("lime:40,segments=grid(4),kernel_width=.006").explain(
        model, view, target()
    )
    assert np.isfinite(heat.values).all()
    weights = cosine_kernel(draws("antithetic", 40, 16, 0), 0.006)
    right = weights.sum() ** 2 / (weights**2).sum()
    assert float(heat.extras["ess"]) == pytest.approx(right, rel=1e-9)
    assert right < 40 / 10
    with pytest.raises(
        ConsilienceError, match="so narrow that no edited image has any weight"
    ):
        lime("lime:40,segments=grid(4),kernel_width=1e-4").explain(
            model, view, target()
        )


@pytest.mark.parametrize(
    ("features", "selection", "kept"),
    [
        (3, "none", 16),
        (3, "highest", 3),
        (3, "forward", 3),
        (99, "auto", 16),
        (2, "auto", 2),
    ],
)
def test_how_many_are_kept(features, selection, kept):
    spec = f"lime:60,segments=grid(4),features={features},selection={selection}"
    extras = (
        lime(spec)
        .explain(curved((24, 24)), view_of(textured(shape=(24, 24))), target())
        .extras
    )
    assert len(extras["selected"]) == len(set(extras["selected"])) == kept


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lime:0", "lime: samples must be at least 2; got 0"),
        ("lime:features=0", "lime: features must be at least 1; got 0"),
        ("lime:kernel_width=0", "lime: kernel_width must be above 0; got 0"),
        ("lime:kernel_width=nan", "lime: kernel_width is a number; got nan"),
        ("lime:alpha=-1", "lime: alpha must be at least 0; got -1"),
        ("lime:refit_alpha=-1", "lime: refit_alpha must be at least 0; got -1"),
        ("lime:seed=-1", "lime: seed must be at least 0; got -1"),
        ("lime:repeats=0", "lime: repeats must be at least 1; got 0"),
        (
            "lime:repeats=2,until=stable",
            "lime: until=stable stops a single run; got repeats=2",
        ),
        ("lime:seed=4294967295,repeats=2", "lime: seed lies in"),
        ("lime:kernel=shap", "lime: kernel is one of cosine, uniform; got 'shap'"),
        (
            "lime:surrogate=forest",
            "surrogate is one of ridge, wls, lasso, bayesian-ridge",
        ),
        ("lime:draw=dice", "draw is one of independent, antithetic, hadamard, lime"),
        ("lime:segments=tiles", "no segmenter 'tiles'"),
        ("lime:sample=3", "lime has no option 'sample'"),
    ],
)
def test_options_out_of_range_are_refused(spec, said):
    with pytest.raises(ConsilienceError) as error:
        lime(spec)
    assert said in str(error.value)


def test_spellings():
    study = lime(STUDY)
    assert registry.explainers.build(registry.spell(study)) == study
    assert registry.spell(lime("lime:samples=1000")) == "lime"
    assert (
        "segments=quickshift(kernel_size=4,max_dist=200,ratio=0.2,seed=42)"
        in registry.spell(lime("lime"), full=True)
    )


@pytest.mark.parametrize(("until", "stable"), [("samples", True), ("stable", False)])
def test_every_look_pays_for_the_others(until, stable, monkeypatch):
    """p = .96 is enough for one look at .05, not for one of five."""
    from consilience.explainers import lime as module

    view, _, model = bent_case()
    plain = module.certainty

    def told(*given):
        return replace(plain(*given), p_set=0.96)

    monkeypatch.setattr(module, "certainty", told)
    heat = lime(f"{SPEC},samples=2000,until={until}").explain(
        model, view, target("logit")
    )
    assert heat.facts["stable"] is stable
    assert heat.facts["passes"] == 2000  # and it did not stop for it
