"""Most draws asked of a cheaper network: by hand, unbiased and with standard errors that hold
where the cheap network is wrong about the very thing that is looked for.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import small_cnn
from oracles_metrics import explanation
from torch import nn

from consilience import explain, wrap
from consilience.explainers import lime, shapley
from consilience.metrics import perturbation
from consilience.models import cheap as cheap_module
from consilience.models import trials
from consilience.models.engines import plan
from consilience.perturb import fidelity
from consilience.perturb.designs import draws, groups
from consilience.perturb.fidelity import PILOT, STRATUM, ask, points, summed
from consilience.perturb.surrogate import Scored, certainty, fit_surrogate
from consilience.registry import metrics
from consilience.types import Cheaper, ClassTarget, ConsilienceError, Sample

S = 12
TRUE = np.linspace(-1, 1, S)


class Told:
    """Says what a function says of the rows that are kept, and remembers which."""

    def __init__(self, says):
        self.says, self.rows, self.copy = says, [], None

    def cheaper(self, fidelity):
        return self.copy


def exact_says(on):
    """Linear, with interactions that no linear fit can follow."""
    three = on[:, 1] & on[:, 4] & on[:, 8]  # pairs cancel what only two make
    return on @ TRUE + 0.6 * (on[:, 0] & on[:, 5]) - (on[:, 2] ^ on[:, 7]) + 2 * three


def cheap_says(on):
    """Another scale; superpixel 3 is not seen at all, and some of it is noise."""
    noise = np.sin(1e3 * (on @ np.sqrt(np.arange(2.0, S + 2))))
    return 5 + 2 * (exact_says(on) - TRUE[3] * on[:, 3] + 0.3 * noise)


def models(says=cheap_says, cost=0.3):
    model = Told(exact_says)
    model.copy = Cheaper("bf16", Told(says), cost)
    return model


def scoring(on):
    def score(model, rows):
        model.rows += list(rows)
        return model.says(on[rows]).astype(np.float64)

    return score


def asked_of(how="antithetic", n=1000, seed=0, kind="bf16", model=None):
    model = model or models()
    on = draws(how, n, S, seed)
    together = groups(how, n)
    return on, model, ask(kind, model, scoring(on), on, together, seed)


def test_exact_asks_one_network_and_says_nothing():
    on, model, found = asked_of(kind="exact")
    np.testing.assert_array_equal(found.scores, exact_says(on))
    assert found.facts == {}
    assert model.copy.model.rows == []


@pytest.mark.parametrize("how", ["independent", "antithetic"])
def test_by_hand(how):
    on, model, found = asked_of(how)
    both, cheap = sorted(model.rows), model.copy.model.rows
    assert sorted(cheap) == list(range(1000))
    assert len(set(both)) == len(both) < 1000
    if how == "antithetic":
        assert {row ^ 1 for row in both} == set(both)  # a pair is asked as one
    y = {row: float(exact_says(on[[row]])[0]) for row in both}
    c = [float(cheap_says(on[[row]])[0]) for row in range(1000)]
    mean_y = sum(y.values()) / len(both)
    mean_c = sum(c[row] for row in both) / len(both)
    xy = sum((c[row] - mean_c) * (y[row] - mean_y) for row in both)
    xx = sum((c[row] - mean_c) ** 2 for row in both)
    yy = sum((y[row] - mean_y) ** 2 for row in both)
    for row in range(1000):
        said = mean_y + xy / xx * (c[row] - mean_c)
        wanted = said + (y[row] - said) * 1000 / len(both) if row in y else said
        assert found.scores[row] == pytest.approx(wanted, abs=1e-9)
    facts = found.facts["fidelity"]
    assert facts["correlation"] == pytest.approx(xy / math.sqrt(xx * yy))
    assert facts["exact_passes"] == len(both)
    assert facts["cheap_passes"] == 1000
    assert (facts["kind"], facts["cheap_cost"]) == ("bf16", 0.3)


@pytest.mark.parametrize("n", [200, 448, 1000])
def test_what_the_first_draws_tell_is_enough_where_more_does_not_pay(n):
    """A nearly perfect copy: no more than the pilot, whatever share of the draws it is."""
    model = models(lambda on: exact_says(on) + 1e-3 * on[:, 3], cost=0.5)
    found = asked_of(n=n, model=model)[2]
    assert found.facts["fidelity"]["exact_passes"] == PILOT == 64
    # a poor copy that costs little: more are worth it, where they are not many already
    poor = asked_of(n=n, model=models(cost=0.05))[2].facts["fidelity"]
    assert (poor["exact_passes"] > PILOT) is (n > 200)


def test_a_cheap_network_that_is_right_changes_nothing():
    on, model, found = asked_of(model=models(lambda on: 3 - 2 * exact_says(on)))
    np.testing.assert_allclose(found.scores, exact_says(on), atol=1e-9)
    assert len(model.rows) == 2 * math.ceil(
        1000 / 2 / 16
    )  # the least share that is worth it


def test_rows_that_were_not_drawn_are_asked_of_the_exact_network():
    on = draws("antithetic", 1002, S, 0)
    model = models()
    together = groups("antithetic", 1000) + 2
    found = ask("bf16", model, scoring(on), on, together, 0)
    np.testing.assert_array_equal(found.scores[:2], exact_says(on[:2]))
    assert not {0, 1} & set(model.copy.model.rows)
    assert found.facts["fidelity"]["exact_passes"] == len(model.rows)


def fit(on, scores, how):
    data = Scored(
        on.astype(np.float64), scores, np.ones(len(on)), groups(how, len(on))
    )
    whole, told, _ = fit_surrogate("ridge", data, 0.01, 10)
    return whole.coefficients, certainty(told, scores, 10, 0).stderr


@pytest.mark.parametrize("how", ["independent", "antithetic"])
@pytest.mark.parametrize("n", [256, 1000])
def test_weights_are_those_of_the_exact_network_and_as_sure_as_they_say(how, n):
    """Superpixel 3, of which the cheap network says nothing, and 9, which both know: over
    400 draws the mean is the exact one's, and intervals of 95 % hold it.
    """
    limit = fit(draws(how, 40_000, S, 99), exact_says(draws(how, 40_000, S, 99)), how)
    runs = []
    for seed in range(400):
        on, _, found = asked_of(how, n, seed + 1)
        runs.append(fit(on, found.scores, how))
    weights, stderr = (np.array(one) for one in zip(*runs, strict=True))
    wanted = limit[0]
    z = (weights.mean(axis=0) - wanted) / (weights.std(axis=0) / 20)
    assert np.abs(z).max() < 4.5
    inside = np.abs(weights - wanted) <= 1.96 * stderr
    assert inside[:, [3, 9]].mean(axis=0).min() > 0.90
    assert inside.mean() > 0.92
    ratio = stderr.mean(axis=0) / weights.std(axis=0)
    assert 0.9 < ratio.mean() < 1.15


def test_auto_takes_what_pays_and_else_the_exact_network():
    on, model, found = asked_of(kind="auto", model=models(cost=0.95))
    np.testing.assert_array_equal(found.scores, exact_says(on))
    facts = found.facts["fidelity"]
    assert (facts["kind"], facts["tried"]) == ("exact", "bf16")
    assert facts["why"] == "bf16 would not pay"
    assert sorted(model.rows) == list(range(1000))
    slightly = models(lambda on: exact_says(on) + 1e-3 * on[:, 3], cost=0.5)
    _, _, found = asked_of(kind="auto", model=slightly)
    assert found.facts["fidelity"]["kind"] == "bf16"
    # s2 over itself, for half a pass and the least share of both
    assert found.facts["fidelity"]["relative_time"] == pytest.approx(0.5625, abs=2e-3)


def test_the_share_is_the_best_of_those_tried():
    """``(s2 + e2 / f) (c + f) / (s2 + e2)`` by hand, from draws that stand alone: ``s2`` and
    ``e2`` are known, since the cheap network's error is another coin.
    """
    rng = np.random.default_rng(0)
    on = rng.random((4000, S)) < 0.5
    left, error = rng.normal(0, 1, 4000), rng.normal(0, 0.5, 4000)
    exact = on @ TRUE + left + error
    said = on @ TRUE + left
    alone = np.arange(4000)[:, None]
    share, time = fidelity._best_share(0.4, exact, said, on, alone)
    by_hand = {
        f: (1 + 0.25 / f) * (0.4 + f) / 1.25
        for f in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    }
    assert share == min(by_hand, key=by_hand.get) == 0.25
    assert time == pytest.approx(by_hand[0.25], rel=0.05)


def test_few_draws_and_networks_without_a_copy_are_exact_and_say_why():
    on, model, found = asked_of(n=3 * PILOT - 2)
    np.testing.assert_array_equal(found.scores, exact_says(on))
    assert (
        found.facts["fidelity"]["why"] == "190 draws are too few to ask two networks"
    )
    model = models()
    model.copy = "this cpu has no bf16 arithmetic"
    _, _, found = asked_of(model=model)
    assert found.facts["fidelity"] == {
        "kind": "exact",
        "why": "this cpu has no bf16 arithmetic",
    }


# ---- in the methods


class Counting(nn.Module):
    def __init__(self, error=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
        )
        self.head, self.error, self.seen = nn.Linear(128, 5), error, 0

    def forward(self, x):
        self.seen += len(x)
        said = self.head(self.body(x).flatten(1))
        return said + self.error * torch.sin(40 * said.flip(1))


def pair(error=0.002):
    made = [
        wrap(
            Counting(one).eval(),
            size=32,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            engine="torch",
        )
        for one in (0.0, error)
    ]
    for one in made:
        _ = one.anatomy
        one.module.seen = 0
    copy = Cheaper("bf16", made[1], 0.4)
    object.__setattr__(made[0], "cheaper", lambda fidelity: copy)
    return made


IMAGE = Sample(
    "noise", np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
)


@pytest.mark.parametrize(
    "spelled",
    [
        "lime:samples=600,segments=grid(4)",
        "lime:samples=300,segments=grid(4),repeats=2",
        "kernelshap:samples=600,segments=grid(5)",
        "rise:masks=600,grid=4",
    ],
)
def test_methods_ask_most_of_the_copy(spelled):
    exact, cheap = pair()
    found = explain(exact, IMAGE, f"{spelled},fidelity=bf16", target=1)
    facts = found.provenance["fidelity"]
    assert facts["kind"] == "bf16"
    assert facts["correlation"] > 0.8
    # beside the prediction, and two that show that the network is not random
    assert exact.module.seen - 3 == facts["exact_passes"] < 330
    assert cheap.module.seen == facts["cheap_passes"] >= 500
    plain = explain(exact, IMAGE, spelled, target=1)
    assert "fidelity" not in plain.provenance
    assert not np.array_equal(found.values, plain.values)
    assert np.corrcoef(found.values.ravel(), plain.values.ravel())[0, 1] > 0.9


def test_kernelshap_still_sums_to_the_exact_gain():
    exact, _ = pair(0.02)
    spelled = "kernelshap:samples=600,segments=grid(5)"
    found = explain(exact, IMAGE, f"{spelled},fidelity=bf16", target=1)
    plain = explain(exact, IMAGE, spelled, target=1)
    for name in ("none", "all"):
        assert found.extras[name] == pytest.approx(
            float(plain.extras[name]), abs=1e-7
        )
    gain = float(plain.extras["all"] - plain.extras["none"])
    assert found.extras["weights"].sum() == pytest.approx(gain, abs=1e-7)
    assert (found.extras["stderr"] > plain.extras["stderr"]).mean() > 0.9


def test_kernelshaps_pairs_are_asked_as_one(monkeypatch):
    """What stands together are complements; nothing, all and whole sizes stand alone."""
    seen = []
    monkeypatch.setattr(
        shapley, "ask", lambda *given: seen.append(given) or fidelity.ask(*given)
    )
    explain(pair()[0], IMAGE, "kernelshap:samples=600,segments=grid(5)", target=1)
    ((_, _, _, on, together, _),) = seen
    np.testing.assert_array_equal(on[together[:, 0]], ~on[together[:, 1]])
    alone = np.setdiff1d(np.arange(len(on)), together)
    assert sorted(set(on[alone].sum(axis=1))) == [0, 1, 24, 25]


@pytest.mark.parametrize("repeats", [1, 2])
def test_limes_own_first_row_is_the_image_and_no_draw(monkeypatch, repeats):
    seen = []
    monkeypatch.setattr(
        lime, "ask", lambda *given: seen.append(given) or fidelity.ask(*given)
    )
    by = f"lime:samples=300,segments=grid(4),draw=lime,repeats={repeats}"
    explain(pair()[0], IMAGE, by, target=1)
    ((_, _, _, on, together, _),) = seen
    alone = np.setdiff1d(np.arange(len(on)), together)
    assert alone.tolist() == [0, 300][:repeats]
    assert on[alone].all()


def test_until_stable_adds_up_what_each_look_asked():
    exact, cheap = pair()
    found = explain(
        exact,
        IMAGE,
        "lime:samples=2000,segments=grid(4),until=stable,features=15,fidelity=bf16",
        target=1,
    )
    facts = found.provenance["fidelity"]
    assert exact.module.seen - 3 == facts["exact_passes"]
    assert cheap.module.seen == facts["cheap_passes"]


# ---- copies of a network


def small():
    torch.manual_seed(0)
    return wrap(
        Counting().eval(), size=32, mean=(0, 0, 0), std=(1, 1, 1), engine="torch"
    )


def test_there_is_no_copy_where_the_machine_has_no_low_precision(monkeypatch):
    monkeypatch.setattr(plan, "native_bf16", lambda device: False)
    assert small().cheaper("bf16") == "this cpu has no bf16 arithmetic"


def test_there_is_no_copy_of_what_runs_in_low_precision(monkeypatch):
    monkeypatch.setattr(plan, "native_bf16", lambda device: True)
    assert small().using(precision="bf16").cheaper("auto") == (
        "the network runs in bf16 itself"
    )


def test_a_copys_cost_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    monkeypatch.setattr(plan, "native_bf16", lambda device: True)
    times = iter([2.0, 1.2345])
    monkeypatch.setattr(cheap_module, "seconds_of", lambda run, device: next(times))
    model = small()
    found = model.cheaper("bf16")
    assert (found.kind, found.cost, found.model.precision) == ("bf16", 0.62, "bf16")
    assert model.cheaper("bf16").cost == 0.62
    assert model.cheaper("bf16").model is found.model  # with its engine
    (file,) = (tmp_path / "cheaper").iterdir()
    for broken in ("{", '{"cost": -1}', '{"cost": "x"}', "{}"):
        file.write_text(broken)
        times = iter([1.0, 0.5])
        assert model.cheaper("bf16").cost == 0.5
    monkeypatch.setattr(trials, "machine", lambda device: ("another",))
    times = iter([1.0, 0.25])
    assert model.cheaper("bf16").cost == 0.25


def test_what_ran_instead_is_a_note(monkeypatch):
    monkeypatch.setattr(plan, "native_bf16", lambda device: False)
    by = "lime:samples=300,segments=grid(4),fidelity=bf16"
    found = explain(small(), IMAGE, by, target=1).provenance
    said = (
        "every draw was asked of the network itself: this cpu has no bf16 arithmetic"
    )
    assert said in found["notes"]


def test_an_unknown_fidelity_is_named():
    with pytest.raises(ValueError, match="fidelity"):
        explain(small(), IMAGE, "lime:fidelity=half", target=1)


# ---- curves: sums over points that are no draws

TARGET = ClassTarget(1, "second", "logit")
CURVES = (
    "insertion:steps=40,fill=black",
    "deletion:steps=40,normalised=true,gap=0,reads=logit,fill=black",
    "pixel-flipping:steps=40,reads=logit",
    "region-perturbation:regions=36,patch=4,fill=black",
    "irof:segments=grid(6),gap=.001,fill=black",
)


@pytest.mark.parametrize("count", [2, 3, 5, 14, 15, 40, 101])
def test_points_are_the_ends_and_two_of_each_run(count):
    asked = points(count, [1])
    assert list(asked.inner) == list(range(1, count - 1))
    assert list(np.concatenate([run for run, _ in asked.runs])) == list(asked.inner)
    assert {0, count - 1} <= set(asked.exact)
    for run, both in asked.runs:
        assert len(run) <= STRATUM
        assert len(both) == len(set(both)) == min(2, len(run))
        assert set(both) <= set(run)
    assert len(asked.exact) == 2 + sum(len(both) for _, both in asked.runs)
    wanted = (len(asked.exact) + 0.25 * (count - 2)) / count
    assert asked.relative_time(0.25) == pytest.approx(wanted)


def test_a_weighted_sum_by_hand_is_unbiased_and_as_sure_as_it_says():
    """Unequal weights and errors that grow along the curve: two of each run stand for it,
    and over all choices the mean is the exact sum and the variance the stated one.
    """
    rng = np.random.default_rng(0)
    n = 32
    weights = rng.uniform(0.2, 2, n)
    exact = np.sort(rng.random(n))
    cheap = exact + 0.3 * np.linspace(0, 1, n) ** 2 + 0.05 * rng.normal(size=n)
    wanted = float(weights @ exact)
    sums, variances = [], []
    for seed in range(4000):
        asked = points(n, [seed])
        seen = np.full(n, np.nan)
        seen[asked.exact] = exact[asked.exact]
        found = summed(
            asked, weights, np.where(np.arange(n) % (n - 1), cheap, np.nan), seen
        )
        if seed == 0:
            total, variance = weights[0] * exact[0] + weights[-1] * exact[-1], 0.0
            for run, both in asked.runs:
                total += sum(weights[i] * cheap[i] for i in run)
                wrong = [weights[i] * (exact[i] - cheap[i]) for i in both]
                total += len(run) / 2 * sum(wrong)
                spread = (wrong[0] - wrong[1]) ** 2 / 2
                variance += len(run) ** 2 * (1 - 2 / len(run)) * spread / 2
            assert weights @ found.scores == pytest.approx(total)
            assert found.facts["stderr"] == pytest.approx(math.sqrt(variance))
        sums.append(weights @ found.scores)
        variances.append(found.facts["stderr"] ** 2)
    assert np.mean(sums) == pytest.approx(wanted, abs=4 * np.std(sums) / 4000**0.5)
    assert np.mean(variances) == pytest.approx(np.var(sums), rel=0.1)
    assert np.std(sums) > 0.05  # the regime is no mild one


class Wrong(nn.Module):
    """A network whose every output is off by what is in the image."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, pixels):
        off = self.size * (1 + pixels[:, :, 6:18, 6:18].mean((1, 2, 3)))
        return self.network(pixels) + off[:, None] * torch.tensor([-1.0, 1.0, 0.5])


def two_networks(size, seen):
    made = [
        wrap(one, size=(24, 24), mean=(0, 0, 0), std=(1, 1, 1), engine="torch")
        for one in (small_cnn(), Wrong(small_cnn(), size))
    ]
    for one, name in zip(made, ("exact", "cheap"), strict=True):
        one.module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(
                name, seen.get(name, 0) + len(out)
            )
        )
    return made


def curve_score(spec, model, map_seed=0):
    image = np.random.default_rng(5).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    view = model.view(Sample("noise", image))
    values = np.random.default_rng(map_seed).random((24, 24))
    return metrics.build(spec).score(model, view, explanation(values, target=TARGET))


@pytest.mark.parametrize("spec", CURVES)
def test_a_curve_of_two_networks_is_the_exact_ones(spec, monkeypatch):
    """Over many maps the errors of a cheap network that is far off go, and what is left
    is as large as it is said to be.
    """
    seen = {}
    model, cheap = two_networks(1.0, seen)
    copy = Cheaper("bf16", cheap, 0.3)
    monkeypatch.setattr(perturbation, "cheaper_of", lambda _model, _fidelity: copy)
    wrong, sizes, plain_wrong = [], [], []
    for seed in range(24):
        plain = curve_score(spec, model, seed)
        seen.clear()
        found = curve_score(f"{spec},fidelity=bf16", model, seed)
        facts = found.facts["fidelity"]
        assert seen == {
            "exact": facts["exact_passes"],
            "cheap": facts["cheap_passes"],
        }
        count = plain.curve.shape[1]
        assert facts["cheap_passes"] == count - 2
        assert facts["exact_passes"] < count / 2
        assert found.curve[1, [0, -1]] == pytest.approx(plain.curve[1, [0, -1]])
        assert found.curve[0] == pytest.approx(plain.curve[0])
        wrong.append(found.value - plain.value)
        sizes.append(facts["stderr"])
        plain_wrong.append(curve_score(spec, cheap, seed).value - plain.value)
    stated = math.sqrt(np.mean(np.square(sizes)))
    assert abs(np.mean(wrong)) < 3.5 * stated / 24**0.5
    assert 0.6 * stated < np.sqrt(np.mean(np.square(wrong))) < 1.6 * stated
    if "normalised" not in spec:  # which divides by the copy's own gap
        assert np.sqrt(np.mean(np.square(plain_wrong))) > 3 * stated  # the copy alone


@pytest.mark.parametrize("spec", CURVES)
def test_a_copy_that_is_right_changes_no_curve(spec, monkeypatch):
    model, _ = two_networks(0.0, {})
    copy = Cheaper("bf16", model, 0.3)
    monkeypatch.setattr(perturbation, "cheaper_of", lambda _model, _fidelity: copy)
    plain, found = (
        curve_score(spec + more, model) for more in ("", ",fidelity=bf16")
    )
    assert found.value == pytest.approx(plain.value, abs=1e-6)
    assert found.facts["fidelity"]["stderr"] < 1e-6
    assert found.facts["fidelity"]["relative_time"] < 0.7


@pytest.mark.parametrize(
    ("kind", "cost", "why"),
    [
        ("bf16", 0.9, "42 points are too few"),
        ("auto", 0.75, "42 points are too few"),
        ("bf16", None, "no bf16 here"),
    ],
)
def test_a_copy_that_does_not_pay_is_not_asked_for_a_curve(
    kind, cost, why, monkeypatch
):
    model, cheap = two_networks(1.0, {})
    copy = "no bf16 here" if cost is None else Cheaper("bf16", cheap, cost)
    monkeypatch.setattr(perturbation, "cheaper_of", lambda _model, _fidelity: copy)
    plain = curve_score("insertion:steps=41", model)
    found = curve_score(f"insertion:steps=41,fidelity={kind}", model)
    np.testing.assert_array_equal(found.curve, plain.curve)
    assert found.value == plain.value
    assert found.facts["fidelity"]["kind"] == "exact"
    assert why in found.facts["fidelity"]["why"]
    assert "fidelity" not in plain.facts


def test_metrics_that_are_no_sums_have_no_such_option():
    for spec in ("road:fidelity=bf16", "average-drop:fidelity=bf16"):
        with pytest.raises(ConsilienceError, match="fidelity"):
            metrics.build(spec)
