import numpy as np
import pytest
import torch
from oracles_lime import Linear, random_model, target, textured, view_of
from oracles_sampling import (
    Table,
    constrained_least_squares,
    exact_banzhaf,
    exact_shapley,
    hsic_of,
    kernel_weight,
    logit,
    random_table,
    rise_mask,
    shapley_over_orders,
    white,
)

from consilience import registry
from consilience.agreement import masks
from consilience.explainers import rise, sensitivity, shapley, soft_masks
from consilience.explainers.shapley import (
    Played,
    efficient,
    fitted,
    gains,
    moderated_stderr,
    player_orders,
    shapley_draws,
    steps,
)
from consilience.perturb.probe import probe
from consilience.types import ConsilienceError, Explanation

COALITIONS = ["kernelshap", "shapley", "banzhaf", "ablation"]
MASKED = ["rise", "occlusion", "sobol", "hsic"]


def build(spec):
    return registry.explainers.build(spec)


def play(spec, side, table=None, seed=0, batch=32):
    """Explain a game of side^2 players on a white image whose superpixels are the cells
    of a grid, black when off.
    """
    segments = registry.segmenters.build(f"grid:{side}").labels(
        np.zeros((3 * side, 3 * side, 3))
    )
    table = random_table(side**2, seed) if table is None else table
    colon = "," if ":" in spec else ":"
    explainer = build(f"{spec}{colon}segments=grid({side}),fill=black,score=logit")
    model = Table(table, segments, batch)
    return explainer.explain(model, view_of(white(3 * side)), logit()), table, model


# ---- exact values


def test_two_oracles_agree():
    table = random_table(4)
    np.testing.assert_allclose(
        exact_shapley(table, 4), shapley_over_orders(table, 4), atol=1e-12
    )


@pytest.mark.parametrize("side", [1, 2, 3])
def test_kernelshap_of_all_coalitions_is_shapleys_value(side):
    heat, table, model = play("kernelshap:600", side)
    np.testing.assert_allclose(
        heat.extras["weights"], exact_shapley(table, side**2), atol=1e-6
    )
    assert heat.facts["exact"]
    assert (heat.extras["stderr"] == 0).all()
    assert heat.facts["passes"] == model.seen == 2 ** (side**2)


@pytest.mark.parametrize("estimator", ["regression", "msr"])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_banzhaf_of_all_coalitions(side, estimator):
    heat, table, _ = play(f"banzhaf:600,estimator={estimator}", side)
    np.testing.assert_allclose(
        heat.extras["weights"], exact_banzhaf(table, side**2), atol=1e-6
    )
    assert heat.facts["exact"]


def test_all_orders_give_shapleys_value(monkeypatch):
    from itertools import permutations

    monkeypatch.setattr(
        shapley, "player_orders", lambda *_: np.array(list(permutations(range(4))))
    )
    heat, table, _ = play("shapley:24", 2)
    np.testing.assert_allclose(
        heat.extras["weights"], exact_shapley(table, 4), atol=1e-6
    )


def test_ablation_is_the_loss_of_each():
    heat, table, _ = play("ablation", 3)
    whole = 2**9 - 1
    expected = [
        float(table[whole]) - float(table[whole - 2**player]) for player in range(9)
    ]
    np.testing.assert_allclose(heat.extras["weights"], expected, atol=1e-6)


@pytest.mark.parametrize("name", COALITIONS)
def test_an_additive_game_has_its_own_effects(name):
    """Every one of them, whatever the draw: even with few samples."""
    effects = np.random.default_rng(3).normal(size=16)
    on = np.arange(2**16)[:, None] >> np.arange(16) & 1
    few = {
        "kernelshap": "kernelshap:80",
        "shapley": "shapley:16",
        "banzhaf": "banzhaf:80",
        "ablation": "ablation",
    }[name]
    heat, _, _ = play(few, 4, table=on @ effects + 2)
    np.testing.assert_allclose(heat.extras["weights"], effects, atol=2e-6)
    np.testing.assert_array_equal(
        heat.values.numpy(),
        heat.extras["weights"][heat.extras["segments"]].astype(np.float32),
    )
    assert (float(heat.extras["none"]), float(heat.extras["all"])) == pytest.approx(
        (2, 2 + effects.sum()), abs=1e-5
    )
    if name in ("kernelshap", "shapley", "banzhaf"):
        np.testing.assert_allclose(heat.extras["stderr"], 0, atol=1e-5)


# ---- draws


@pytest.mark.parametrize(
    "spec",
    ["kernelshap:20", "kernelshap:60", "kernelshap:300", "shapley:2", "shapley:10"],
)
def test_values_sum_to_the_gain_whatever_the_draw(spec):
    heat, table, _ = play(spec, 4, table=random_table(16))
    gain = float(table[-1]) - float(table[0])
    assert heat.extras["weights"].sum() == pytest.approx(gain, abs=1e-9)


def test_gains_of_every_order_sum_to_the_gain():
    table = random_table(9)
    places = shapley.player_orders(9, 6, 0)
    played = shapley.Played(
        np.zeros((1, 1)), 0.25, 1.75, np.random.default_rng(0).normal(size=6 * 8)
    )
    np.testing.assert_allclose(
        shapley.gains(played, places).sum(axis=1), 1.5, atol=1e-12
    )
    heat, _, _ = play("shapley:6", 3, table=table)
    found = np.zeros(9)
    for order in np.argsort(places, axis=1):
        there = 0
        for player in order:
            found[player] += float(table[there | 1 << player]) - float(table[there])
            there |= 1 << player
    np.testing.assert_allclose(heat.extras["weights"], found / 6, atol=1e-6)


def test_every_second_order_is_the_reverse():
    places = shapley.player_orders(7, 8, 5)
    np.testing.assert_array_equal(places[1::2], 6 - places[::2])
    np.testing.assert_array_equal(shapley.player_orders(7, 4, 5), places[:4])
    assert all(sorted(row) == list(range(7)) for row in places)


@pytest.mark.parametrize("budget", [18, 40, 150, 400])
def test_the_draw_of_kernelshap_carries_shapleys_kernel(budget):
    """Sizes carry the kernel's mass; whole ones are complete, the others come in
    complementary pairs.
    """
    players = 10
    drawn = shapley.shapley_draws(players, budget, seed=1)
    sizes = drawn.on.sum(axis=1)
    assert len(drawn.on) <= budget
    assert drawn.weights.sum() == pytest.approx(1)
    mass = np.array(
        [
            kernel_weight(players, k) * len(list(shapley.of_size(players, k)))
            for k in range(1, players)
        ]
    )
    got = np.array([drawn.weights[sizes == k].sum() for k in range(1, players)])
    pairs = max(1, int(drawn.groups.max()) + 1)
    np.testing.assert_allclose(got, mass / mass.sum(), atol=1.01 / pairs)
    for group in range(int(drawn.groups.max()) + 1):
        one, other = drawn.on[drawn.groups == group]
        np.testing.assert_array_equal(one, ~other)
    certain = drawn.on[drawn.groups < 0]
    assert len(np.unique(certain, axis=0)) == len(certain)
    taken = shapley.whole_sizes(players, budget)
    assert len(certain) == sum(
        2 * len(shapley.of_size(players, k)) for k in range(1, taken + 1)
    )
    assert taken == {18: 0, 40: 0, 150: 1, 400: 2}[budget] or taken > 0


def test_drawn_kernelshap_is_the_constrained_fit():
    table = random_table(9)
    heat, _, _ = play("kernelshap:100,seed=3", 3, table=table)
    drawn = shapley.shapley_draws(9, 98, 3)
    values = [
        float(table[sum(1 << int(player) for player in np.flatnonzero(row))])
        for row in drawn.on
    ]
    expected = constrained_least_squares(
        drawn.on, values, drawn.weights, float(table[0]), float(table[-1] - table[0])
    )
    np.testing.assert_allclose(heat.extras["weights"], expected, atol=1e-6)
    assert not heat.facts["exact"]


def test_banzhaf_by_sample_reuse_is_two_means():
    table = random_table(9)
    heat, _, _ = play("banzhaf:102,estimator=msr,seed=4", 3, table=table)
    on = np.random.default_rng(4).integers(0, 2, (50, 9), dtype=bool)
    on = np.concatenate([on, ~on])
    values = np.array(
        [
            float(table[sum(1 << int(player) for player in np.flatnonzero(row))])
            for row in on
        ]
    )
    expected = [
        values[on[:, player]].mean() - values[~on[:, player]].mean()
        for player in range(9)
    ]
    np.testing.assert_allclose(heat.extras["weights"], expected, atol=1e-6)


EXACT = {
    "kernelshap:120": exact_shapley,
    "shapley:16": exact_shapley,
    "banzhaf:120": exact_banzhaf,
}


@pytest.mark.parametrize("spec", [*EXACT, "banzhaf:120,estimator=msr"])
def test_the_standard_error_is_the_spread_over_seeds(spec):
    """Over 60 seeds the values centre on the exact ones, as far from them as their
    standard errors say.
    """
    table = random_table(9, seed=2)
    exact = EXACT.get(spec, exact_banzhaf)(table, 9)
    runs = [
        play(f"{spec},seed={seed}", 3, table=table)[0].extras for seed in range(60)
    ]
    weights, stderr = (
        np.array([run["weights"] for run in runs]),
        np.array([run["stderr"] for run in runs]),
    )
    spread = weights.std(axis=0, ddof=1)
    assert (np.abs(weights.mean(axis=0) - exact) < 4 * spread / np.sqrt(60)).all()
    assert np.sqrt((stderr**2).mean() / (spread**2).mean()) == pytest.approx(
        1, abs=0.2
    )


def test_regression_is_surer_than_sample_reuse():
    table = random_table(9, seed=2, linear=3.0)
    regression, reuse = (
        play(f"banzhaf:200,estimator={one}", 3, table=table)[0]
        for one in ("regression", "msr")
    )
    assert (regression.extras["stderr"] < reuse.extras["stderr"] / 2).all()


@pytest.mark.parametrize("spec", ["kernelshap:10", "banzhaf:10"])
def test_too_few_samples_are_noted(spec):
    heat, _, _ = play(spec, 4, table=random_table(16))
    assert np.isfinite(heat.values).all()
    assert np.isnan(heat.extras["stderr"]).all()
    assert "cannot tell 16 superpixels apart" in heat.facts["notes"][0]


def test_standard_errors_of_a_regression_are_those_of_leaving_a_pair_out():
    """HC3 by its definition: what each pair misses of a fit made without it."""
    players = 6
    drawn = shapley_draws(12, 90, seed=3)
    on, weights, groups = drawn.on[:, :players], drawn.weights, drawn.groups
    rng = np.random.default_rng(0)
    values, design = rng.normal(size=len(on)), on - on.mean(axis=1)[:, None]
    design = design + rng.normal(0, 0.1, design.shape)
    found = fitted(design, values, weights, groups, players)

    def slopes(kept):
        scaled = design[kept] * weights[kept, None]
        return np.linalg.solve(scaled.T @ design[kept], scaled.T @ values[kept])

    whole = slopes(np.ones(len(on), dtype=bool))
    np.testing.assert_allclose(found.coefficients, whole, atol=1e-9)
    count = groups.max() + 1
    bread = np.linalg.inv((design * weights[:, None]).T @ design)
    scores = []
    for group in range(count):
        mine = groups == group
        missed = values[mine] - design[mine] @ slopes(~mine)
        scores.append(bread @ (design[mine] * weights[mine, None]).T @ missed)
    scores = np.array(scores)
    scores -= scores.mean(axis=0)
    expected = np.sqrt((scores**2).sum(axis=0) * count / (count - 1))
    np.testing.assert_allclose(found.stderr, expected, rtol=1e-8)


def hard_game(name, count):
    """Coalitions (n, count) to what they earn, where few decide and rarely."""
    weights = np.random.default_rng(7).normal(size=count)
    return {
        "three together": lambda on: (
            0.2 + 0.5 * on[:, :3].all(axis=1) + 0.05 * on[:, 3]
        ),
        "saturated": lambda on: (
            1 / (1 + np.exp(4 - 6 * (on @ weights - weights.sum() / 2)))
        ),
    }[name]


@pytest.mark.parametrize("name", ["three together", "saturated"])
@pytest.mark.parametrize(("players", "budget"), [(20, 64), (20, 200), (30, 128)])
def test_regression_intervals_cover_at_small_budgets(name, players, budget):
    game = hard_game(name, players)
    ends = game(np.array([[False] * players, [True] * players]))

    def fit(seed, samples):
        drawn = shapley_draws(players, samples, seed)
        return efficient(drawn, game(drawn.on) - ends[0], ends[1] - ends[0])

    limit = np.mean(
        [fit(1000 + seed, 20_000).coefficients for seed in range(4)], axis=0
    )
    held = []
    for seed in range(40):
        found = fit(seed, budget)
        if np.isfinite(found.stderr).all():
            held.append(
                np.abs(found.coefficients - limit) <= 1.96 * found.stderr + 1e-9
            )
    # without the hat matrix .75, .89 and .77 (three together)
    assert len(held) >= 30
    assert np.mean(held) >= 0.92


def test_no_standard_error_below_three_drawn_rows_a_coefficient():
    rng = np.random.default_rng(1)
    for pairs, told in ((14, False), (15, True)):
        half = rng.normal(size=(pairs, 10))
        design = np.stack([half, -half], axis=1).reshape(-1, 10)
        found = fitted(
            design,
            rng.normal(size=2 * pairs),
            np.ones(2 * pairs),
            np.repeat(np.arange(pairs), 2),
            10,
        )
        assert np.isfinite(found.stderr).all() == told
        assert not found.undecided


@pytest.mark.parametrize("count", [16, 32])
def test_intervals_of_orders_cover_where_few_decide_and_rarely(count):
    players, game = 30, hard_game("saturated", 30)
    none, whole = game(np.array([[False] * players, [True] * players]))

    def orders(seed, number):
        places = player_orders(players, number, seed)
        earned = game(steps(places)(0, number * (players - 1)))
        played = Played(np.arange(players), none, whole, earned)
        return gains(played, places).reshape(-1, 2, players).mean(axis=1)

    limit = orders(999, 6000).mean(axis=0)
    held = []
    for seed in range(60):
        pairs = orders(seed, count)
        error = np.abs(pairs.mean(axis=0) - limit)
        held.append(error <= 1.96 * moderated_stderr(pairs) + 1e-9)
    # each player's own variance alone: .74 and .84
    assert np.mean(held) >= 0.915


def test_the_moderated_standard_error_by_hand():
    samples = np.zeros((9, 2))
    samples[:, 0] = np.arange(9)  # variance 7.5, the other's 0: their mean 3.75
    own = np.sqrt((8 * 7.5 + 4 * 3.75) / 12 / 9)
    other = np.sqrt(4 * 3.75 / 12 / 9)
    assert moderated_stderr(samples).tolist() == pytest.approx([own, other])
    assert np.isnan(moderated_stderr(samples[:7])).all()
    assert np.isfinite(moderated_stderr(samples[:8])).all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shapley:14", "14 orders are too few to say how sure"),
        ("banzhaf:62,estimator=msr", "30 pairs are too few to say how sure"),
    ],
)
def test_where_too_few_were_drawn_no_standard_error_is_given(spec, words):
    heat, _, _ = play(spec, 4, table=random_table(16))
    assert np.isnan(heat.extras["stderr"]).all()
    assert words in heat.facts["notes"][0]
    enough = spec.replace("14", "16").replace("62", "64")
    assert np.isfinite(
        play(enough, 4, table=random_table(16))[0].extras["stderr"]
    ).all()


# ---- against peers


def test_shap_agrees():
    import shap

    table = random_table(9)
    powers = 1 << np.arange(9)

    def earned(rows):
        return table[(rows.astype(int) @ powers)].astype(float)

    peer = shap.KernelExplainer(earned, np.zeros((1, 9)))
    theirs = peer.shap_values(
        np.ones((1, 9)), nsamples=2000, l1_reg=False, silent=True
    )[0]
    heat, _, _ = play("kernelshap:600", 3, table=table)
    np.testing.assert_allclose(heat.extras["weights"], theirs, atol=1e-6)


def test_captum_agrees():
    from captum.attr import FeatureAblation, ShapleyValues

    heat, table, model = play("kernelshap:100", 2)
    segments = torch.from_numpy(heat.extras["segments"])[None, None]
    image = view_of(white(6)).pixels
    for peer, spec in (
        (ShapleyValues, "kernelshap:100"),
        (FeatureAblation, "ablation"),
    ):
        theirs = peer(lambda pixels: model.scores(pixels)[:, 0]).attribute(
            image, feature_mask=segments
        )[0, 0]
        np.testing.assert_allclose(
            play(spec, 2, table=table)[0].values, theirs, atol=1e-6
        )


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (6, 3), (8, 2), (5, 5)])
def test_captums_occlusion_agrees(window, stride):
    from captum.attr import Occlusion

    side = window + 3 * stride
    view, model = (
        view_of(textured(shape=(40, 40))[:side, :side]),
        curved((side, side)),
    )
    heat = build(
        f"occlusion:{window},stride={stride},fill=black,score=logit"
    ).explain(model, view, logit())
    theirs = Occlusion(lambda pixels: model.scores(pixels)[:, 0]).attribute(
        view.pixels,
        sliding_window_shapes=(3, window, window),
        strides=(3, stride, stride),
        baselines=0,
    )
    np.testing.assert_allclose(heat.values, theirs[0, 0], atol=1e-5)


# ---- RISE


def curved(shape, seed=0, batch=32):
    return random_model(
        shape,
        seed,
        batch,
        scale=0.02,
        bend=lambda logits: 4 * torch.sin(logits) + logits**2 / 3,
    )


@pytest.mark.parametrize(
    ("shape", "grid", "p"), [((21, 21), 7, 0.5), ((20, 13), 3, 0.3), ((5, 8), 1, 0.5)]
)
def test_rise_is_the_loop(shape, grid, p):
    view, model = (
        view_of(textured(shape=(40, 40))[: shape[0], : shape[1]]),
        curved(shape),
    )
    heat = build(f"rise:23,grid={grid},p={p},seed=4,fill=white").explain(
        model, view, target()
    )
    on = np.random.default_rng([4, 0]).random((23, grid, grid)) < p
    shift = np.random.default_rng([4, 1]).integers(
        0, [-(-side // grid) for side in shape], (23, 2)
    )
    image, total = view.pixels[0].double().numpy(), np.zeros(shape)
    for coins, offset in zip(on, shift, strict=True):
        mask = rise_mask(coins, offset, shape)
        edited = torch.from_numpy(image * mask + 1.0 * (1 - mask))[None]
        total += float(target().of(model.scores(edited.float()))[0]) * mask
    np.testing.assert_allclose(heat.values, total / (23 * p), atol=1e-5)
    assert heat.facts["passes"] == 23


def test_rise_hides_with_the_normalisations_mean():
    from dataclasses import replace

    assert registry.spell(build("rise").fill) == "neutral"
    view = replace(view_of(textured(shape=(14, 14))), neutral=(0.2, 0.4, 0.6))
    model = curved((14, 14))
    plain, named = (
        build(f"rise:20{more}").explain(model, view, target()).values
        for more in ("", ",fill=colour(.2+.4+.6)")
    )
    torch.testing.assert_close(plain, named)


def test_rise_masks_keep_p_on_average():
    drawn = rise.Shifted.draw(2000, 5, 0.3, (23, 17), 0)
    made = drawn.masks(0, 2000)
    assert (made.min(), made.max()) == (0, 1)
    np.testing.assert_allclose(made.mean(dim=0), 0.3, atol=0.06)
    weights = np.random.default_rng(0).normal(size=2000)
    np.testing.assert_allclose(
        drawn.summed(weights),
        np.einsum("n,nhw->hw", weights, made.double()),
        atol=1e-3,
    )


def test_rise_until_stable_stops_where_the_halves_agree():
    shape = (24, 24)
    planes = np.zeros((2, 3, *shape))
    planes[0][:, 4:12, 4:12] = 0.1
    view = view_of(np.full((*shape, 3), 200, dtype=np.uint8))
    heat = build("rise:20000,until=stable,agreement=.9,score=logit").explain(
        Linear(planes), view, logit()
    )
    passes = heat.facts["passes"]
    assert heat.facts["stable"]
    assert 1000 <= passes < 20000
    assert passes % 500 == 0
    drawn = rise.Shifted.draw(20000, 7, 0.5, shape, 0)
    scores = probe(
        Linear(planes),
        view,
        soft_masks.Soft(passes, drawn.masks),
        logit(),
        torch.zeros_like(view.pixels),
    ).double()
    agreements = []
    for count in range(500, passes + 1, 500):
        halves = [
            torch.einsum(
                "n,nhw->hw",
                scores[half:count:2],
                drawn.masks(0, count)[half::2].double(),
            ).ravel()
            for half in (0, 1)
        ]
        agreements.append(agreed := float(np.corrcoef(*halves)[0, 1]))
    enough = [both >= 0.9 for both in map(min, agreements, agreements[1:])]
    assert enough[-1]
    assert not any(enough[:-1])
    assert heat.facts["agreement"] == pytest.approx(agreed, abs=1e-3)
    assert heat.facts["reliability"] == pytest.approx(
        2 * agreed / (1 + agreed), abs=1e-3
    )
    same = build(f"rise:{passes},score=logit").explain(Linear(planes), view, logit())
    np.testing.assert_allclose(heat.values, same.values, rtol=1e-6)


def test_rise_of_nothing_never_stabilises():
    view = view_of(textured(shape=(14, 14)))
    heat = build("rise:1200,until=stable").explain(
        Linear(np.zeros((2, 3, 14, 14))), view, target()
    )
    assert heat.facts["passes"] == 1200
    assert "same score" in heat.facts["notes"][0]


# ---- occlusion


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [((12, 12), 4, 2), ((13, 10), 5, 3), ((9, 9), 20, 7), ((6, 7), 1, 1)],
)
def test_occlusion_is_the_loop(shape, window, stride):
    view, model = (
        view_of(textured(shape=(30, 30))[: shape[0], : shape[1]]),
        curved(shape),
    )
    heat = build(f"occlusion:{window},stride={stride}").explain(model, view, target())
    whole = float(target().of(model.scores(view.pixels))[0])
    total, covered = np.zeros(shape), np.zeros(shape)
    starts = [
        sorted({*range(0, max(side - window, 0), stride), max(side - window, 0)})
        for side in shape
    ]
    for y in starts[0]:
        for x in starts[1]:
            edited = view.pixels.clone()
            edited[:, :, y : y + window, x : x + window] = 0.5
            total[y : y + window, x : x + window] += whole - float(
                target().of(model.scores(edited))[0]
            )
            covered[y : y + window, x : x + window] += 1
    assert covered.min() > 0
    np.testing.assert_allclose(heat.values, total / covered, atol=1e-6)
    assert heat.facts["passes"] == 1 + len(starts[0]) * len(starts[1])


# ---- Sobol


def ishigami(points, a=7.0, b=0.1):
    x = 2 * np.pi * points - np.pi
    return (
        np.sin(x[:, 0])
        + a * np.sin(x[:, 1]) ** 2
        + b * x[:, 2] ** 4 * np.sin(x[:, 0])
    )


def test_jansen_finds_ishigamis_indices():
    a, b = sensitivity.sobol_design(3, 4096, 0)
    found = sensitivity.jansen(
        ishigami(sensitivity.jansen_rows(a, b, 0, 4096 * 5)), 4096
    )
    first = 0.5 * (1 + 0.1 * np.pi**4 / 5) ** 2
    second = 7**2 / 8
    both = 0.1**2 * np.pi**8 * (1 / 18 - 1 / 50)
    variance = first + second + both
    np.testing.assert_allclose(
        found,
        [(first + both) / variance, second / variance, both / variance],
        atol=0.01,
    )


def test_jansens_formula_and_rows():
    a, b = sensitivity.sobol_design(5, 8, 2)
    rows = sensitivity.jansen_rows(a, b, 0, 8 * 7)
    np.testing.assert_array_equal(rows[:8], a)
    np.testing.assert_array_equal(rows[8:16], b)
    for variable in range(5):
        mixed = a.copy()
        mixed[:, variable] = b[:, variable]
        np.testing.assert_array_equal(
            rows[16 + 8 * variable : 24 + 8 * variable], mixed
        )
    np.testing.assert_array_equal(sensitivity.jansen_rows(a, b, 5, 29), rows[5:29])
    scores = np.random.default_rng(0).normal(size=56)
    variance = np.var(scores[:16], ddof=1)
    expected = [
        sum((scores[row] - scores[16 + 8 * variable + row]) ** 2 for row in range(8))
        / (2 * 8 * variance)
        for variable in range(5)
    ]
    np.testing.assert_allclose(sensitivity.jansen(scores, 8), expected)


def test_sobol_of_an_additive_model():
    """Of sum c_i x_i with x uniform the total index is c_i^2 / sum c^2."""
    effects = np.random.default_rng(1).normal(size=(3, 3))
    planes = np.zeros((2, 3, 9, 9))
    planes[0] = np.kron(effects, np.ones((3, 3))) / 27
    heat = build("sobol:3,design=1024,fill=black,score=logit").explain(
        Linear(planes), view_of(white(9)), logit()
    )
    np.testing.assert_allclose(
        heat.values, effects**2 / (effects**2).sum(), atol=0.02
    )
    assert heat.facts["passes"] == 1024 * 11


# ---- HSIC


@pytest.mark.parametrize("count", [30, 601])
def test_hsic_is_the_centred_gram_matrices(count, monkeypatch):
    monkeypatch.setattr(sensitivity, "HSIC_ROWS", 7 if count < 100 else 512)
    on = sensitivity.hypercube(4, count, 0)
    rng = np.random.default_rng(0)
    scores = on[:, 0] + np.where(on[:, 1], 2.0, 0.2) * rng.normal(
        size=count
    )  # of the second cell only the spread depends
    differences = [abs(scores[i] - scores[j]) for i in range(count) for j in range(i)]
    width = float(np.median(differences))
    assert sensitivity.bandwidth(scores) == pytest.approx(width)
    expected = [hsic_of(on[:, cell], scores, width) for cell in range(4)]
    np.testing.assert_allclose(sensitivity.hsic(on, scores), expected, atol=1e-12)
    assert (
        sensitivity.hsic(on, scores)[2:].max()
        < sensitivity.hsic(on, scores)[:2].min()
        or count < 100
    )


def test_hypercube_has_every_cell_in_half():
    on = sensitivity.hypercube(9, 500, 3)
    assert (on.sum(axis=0) == 250).all()
    assert np.abs(np.corrcoef(on.T) - np.eye(9)).max() < 0.2


def test_hsic_asks_the_model_of_its_masks():
    planes = np.zeros((2, 3, 8, 8))
    planes[0][:, 2:4, 6:8] = 1 / 12
    heat = build("hsic:100,grid=4,fill=black,score=logit").explain(
        Linear(planes), view_of(white(8)), logit()
    )
    on = sensitivity.hypercube(16, 100, 0)
    np.testing.assert_allclose(
        heat.values.ravel(), sensitivity.hsic(on, on[:, 7].astype(float)), atol=1e-6
    )
    assert heat.values.argmax() == 7


def test_bandwidth_of_scores_that_mostly_agree():
    assert sensitivity.bandwidth(np.zeros(20)) == 0
    assert sensitivity.bandwidth(np.r_[np.zeros(20), 3.0]) == 3


# ---- all of them

QUICK = {
    "kernelshap": "kernelshap:60,segments=grid(4)",
    "shapley": "shapley:4,segments=grid(4)",
    "banzhaf": "banzhaf:60,segments=grid(4)",
    "ablation": "ablation:grid(4)",
    "rise": "rise:60,grid=4",
    "occlusion": "occlusion:8,stride=4",
    "sobol": "sobol:3,design=4",
    "hsic": "hsic:60,grid=4",
}


@pytest.mark.parametrize("name", [*COALITIONS, *MASKED])
def test_same_bytes_whatever_the_chunks(name):
    view = view_of(textured(shape=(30, 28)))
    found = [
        build(QUICK[name]).explain(curved((30, 28), batch=batch), view, target())
        for batch in (1, 7, 32, 500)
    ]
    for heat in found[1:]:
        assert heat.values.numpy().tobytes() == found[0].values.numpy().tobytes()
        assert all(
            heat.extras[key].tobytes() == found[0].extras[key].tobytes()
            for key in heat.extras
        )


@pytest.mark.parametrize("name", [*COALITIONS, *MASKED])
def test_no_chunk_is_larger_than_the_model_likes(name):
    model = curved((30, 28), batch=6)
    heat = build(QUICK[name]).explain(
        model, view_of(textured(shape=(30, 28))), target()
    )
    assert max(model.sizes) <= 6
    assert sum(model.sizes) == heat.facts["passes"]


@pytest.mark.parametrize(
    "name", [name for name in QUICK if name not in ("ablation", "occlusion")]
)
def test_the_seed_moves_the_map(name):
    view, model = view_of(textured(shape=(30, 28))), curved((30, 28))
    first, second = (
        build(f"{QUICK[name]},seed={seed}").explain(model, view, target()).values
        for seed in (0, 1)
    )
    assert (first != second).any()


@pytest.mark.parametrize("name", [*COALITIONS, *MASKED])
def test_nothing_is_needed_but_scores(name):
    assert registry.explainers.get(name).needs == frozenset()
    view = view_of(np.full((24, 24, 3), 90, dtype=np.uint8))
    heat = build(QUICK[name]).explain(
        Linear(np.zeros((2, 3, 24, 24))), view, target()
    )
    if name == "rise":
        assert "same score" in heat.facts["notes"][0]
    else:
        assert heat.values.abs().max() < 1e-12


@pytest.mark.parametrize("name", COALITIONS)
def test_superpixels_can_be_cut_from_it(name):
    view, model = view_of(textured(shape=(30, 28))), curved((30, 28))
    heat = build(QUICK[name]).explain(model, view, target())
    weights = heat.extras["weights"]
    explanation = Explanation(
        None, "", name, target(), view.geometry, heat.values.numpy(), heat.extras
    )
    mask = masks.default_cutter(explanation).cut(explanation)
    best = [index for index in np.argsort(-np.abs(weights)) if weights[index] > 0][
        :10
    ]
    np.testing.assert_array_equal(mask.on, np.isin(heat.extras["segments"], best))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kernelshap:3", "kernelshap: samples must be at least 4; got 3"),
        ("shapley:1", "shapley: permutations must be at least 2; got 1"),
        ("shapley:5", "shapley: permutations come in pairs; got 5"),
        ("banzhaf:2", "banzhaf: samples must be at least 4; got 2"),
        ("banzhaf:seed=-1", "banzhaf: seed must be at least 0; got -1"),
        ("rise:1", "rise: masks must be at least 2; got 1"),
        ("rise:p=1", "rise: p must be above 0 and below 1; got 1"),
        ("rise:agreement=2", "rise: agreement must be above 0 and below 1; got 2"),
        ("rise:grid=0", "rise: grid must be at least 1; got 0"),
        (
            "occlusion:8,stride=9",
            "occlusion: a stride above the window leaves gaps; got 9 and 8",
        ),
        ("occlusion:stride=0", "occlusion: stride must be at least 1; got 0"),
        ("sobol:design=12", "sobol: design is a power of two; got 12"),
        ("sobol:200", "sobol: grid is at most 102; got 200"),
        ("hsic:3", "hsic: masks must be at least 4; got 3"),
    ],
)
def test_options_out_of_range_are_refused(spec, said):
    with pytest.raises(ConsilienceError) as error:
        build(spec)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["sobol", "hsic"])
def test_a_grid_finer_than_the_frame_is_refused(name):
    with pytest.raises(ConsilienceError, match=f"{name}: a grid of 20 cells"):
        build(f"{name}:grid=20").explain(
            curved((12, 12)), view_of(textured(shape=(40, 40))[:12, :12]), target()
        )


def test_the_standard_error_of_a_difference_of_means_by_hand():
    rng = np.random.default_rng(0)
    signs, swings = rng.choice([-1.0, 1.0], (40, 3)), rng.normal(size=40)
    found = shapley.Banzhaf(estimator="msr")._fit(signs, swings, exact=False)
    each = signs * swings[:, None]
    mean = each.sum(axis=0) / 40
    variance = ((each - mean) ** 2).sum(axis=0) / 39
    np.testing.assert_allclose(found.coefficients, mean)
    np.testing.assert_allclose(found.stderr, np.sqrt(variance / 40))
