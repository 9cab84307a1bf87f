"""Knocking units out: against a network with the unit's weights zeroed, and one whose
dog unit feeds dogs alone.
"""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import planted_image
from scipy import stats as scipy_stats
from torch import nn

from consilience import stats
from consilience.dissection.knockout import knock_out
from consilience.models.network import wrap
from consilience.show.words import knockout_sentence
from consilience.types import ConsilienceError, Sample

CLASSES = (
    "Eskimo dog, husky",
    "hot rod",
    "Bernese mountain dog",
    "car",
    "sports car",
    "tree",
)


class Kennel(nn.Module):
    """Unit 0 (red) feeds the dogs, unit 1 (green) the cars, unit 2 (blue) every class
    alike; unit 3 is never on.
    """

    def __init__(self):
        super().__init__()
        self.eyes = nn.Conv2d(3, 4, 1)
        self.on = nn.ReLU()
        self.mix = nn.Conv2d(4, 4, 1)
        self.end = nn.ReLU()
        self.head = nn.Linear(4, 6)
        with torch.no_grad():
            for part in (self.eyes, self.mix, self.head):
                part.weight.zero_()
                part.bias.zero_()
            self.eyes.weight[:3, :, 0, 0] = torch.eye(3)
            self.eyes.bias[3] = -9
            self.mix.weight[:, :, 0, 0] = torch.eye(4)
            self.head.weight[[0, 2], 0] = 2.0
            self.head.weight[[3, 4], 1] = 3.0
            self.head.weight[:, 2] = 1.0
            self.head.weight[:, 3] = 5.0

    def forward(self, x):
        return self.head(self.end(self.mix(self.on(self.eyes(x)))).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def kennel():
    return wrap(
        Kennel().eval(),
        classes=CLASSES,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=16,
        name="kennel",
    ).using(engine="torch")


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    labels = [0, 3, 2, 4] * 6
    return [
        Sample(
            f"s{i}",
            rng.integers(0, 255, (16, 16, 3), dtype=np.uint8),
            label=labels[i],
        )
        for i in range(24)
    ]


def outputs_without(model, samples, unit):
    """A copy of the network whose head no longer reads the unit."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.head.weight[:, unit] = 0
    changed = model.with_module(module)
    return np.stack(
        [
            changed.logits(changed.view(sample).pixels)[0].detach().double().numpy()
            for sample in samples
        ]
    )


@pytest.fixture(scope="module")
def found(kennel, samples):
    return knock_out(
        kennel, "end", [0, 1, 2, 3], samples, ["dog", "cars", "tree", ""]
    )


def test_losses_are_those_of_a_network_without_the_unit(kennel, samples, found):
    whole = np.stack(
        [
            kennel.logits(kennel.view(sample).pixels)[0].detach().double().numpy()
            for sample in samples
        ]
    )
    for unit in range(4):
        gone = outputs_without(kennel, samples, unit)
        np.testing.assert_allclose(
            found.means[unit], (whole - gone).mean(axis=0), atol=1e-6
        )
        np.testing.assert_allclose(
            found.deviations[unit], (whole - gone).std(axis=0, ddof=1), atol=1e-6
        )
        probabilities = [
            np.exp(each) / np.exp(each).sum(axis=1, keepdims=True)
            for each in (whole, gone)
        ]
        first = whole.argmax(axis=1)
        lost = [
            probabilities[0][i, c] - probabilities[1][i, c]
            for i, c in enumerate(first)
        ]
        np.testing.assert_allclose(found.lost[:, unit], lost, atol=1e-6)
        np.testing.assert_array_equal(
            found.flipped[:, unit], gone.argmax(axis=1) != first
        )
        np.testing.assert_array_equal(
            found.correct[:, unit],
            gone.argmax(axis=1) == [sample.label for sample in samples],
        )


def test_the_dog_unit_hurts_dogs(found):
    table = found.table().set_index("unit")
    assert (
        table.loc[0, "matched"]
        == "dog: Eskimo dog, husky, Bernese mountain dog (by name)"
    )
    assert table.loc[1, "classes"] == 2
    red = np.array([float(value) for value in found.contrast[:, 0]])
    assert table.loc[0, "contrast"] == pytest.approx(red.mean())
    expected = stats.mean_interval(red)
    assert (table.loc[0, "contrast_low"], table.loc[0, "contrast_high"]) == (
        expected.low,
        expected.high,
    )
    assert table.loc[0, "p"] < 0.001
    assert table.loc[0, "contrast_rank"] == 1
    assert "costs its classes more than others" in knockout_sentence(
        table.reset_index().loc[lambda t: t["unit"] == 0].iloc[0]
    )


def test_a_unit_that_hurts_all_alike_hurts_none_more(found):
    table = found.table()
    row = table[table["unit"] == 2].iloc[0]
    assert (found.contrast[:, 2] == 0).all()
    assert row["p"] == 1
    assert "was not shown to cost its classes more" in knockout_sentence(row)
    assert row["lost"] == pytest.approx(0, abs=1e-6)


def test_contrast_by_hand(kennel):
    red = Sample("red", np.full((16, 16, 3), (255, 0, 0), np.uint8))
    found = knock_out(kennel, "end", [0], [red], ["dog"])
    assert found.contrast[0, 0] == pytest.approx(
        2.0
    )  # both dogs lose 2, the others nothing
    assert found.lost[0, 0] == pytest.approx(
        math.exp(2) / (2 * math.exp(2) + 4) - 1 / 6
    )
    np.testing.assert_allclose(found.means[0], [2, 0, 2, 0, 0, 0], atol=1e-6)


def test_a_silent_unit_loses_nothing(found):
    row = found.table().set_index("unit").loc[3]
    assert row["lost"] == 0
    assert row["flips"] == 0
    assert row["active"] == 0
    assert math.isnan(row["p"])
    assert row["matched"] == "no class goes with '' by name" or row["classes"] == 0


def test_p_is_holms_over_units_with_classes(found):
    table = found.table()
    tested = table[table["classes"] > 0]
    assert len(tested) == 3
    np.testing.assert_allclose(tested["p_holm"], stats.holm(tested["p"].to_numpy()))
    assert table[table["classes"] == 0]["p_holm"].isna().all()


def test_units_are_ranked_by_their_loss(found):
    table = found.table()
    assert table["lost"].is_monotonic_decreasing
    assert set(table["unit"]) == {0, 1, 2, 3}


def test_accuracy_on_its_own_classes(kennel, samples, found):
    row = found.table().set_index("unit").loc[0]
    dogs = [sample for sample in samples if sample.label in (0, 2)]
    whole = [
        int(kennel.logits(kennel.view(sample).pixels).argmax()) == sample.label
        for sample in dogs
    ]
    gone = [
        int(out.argmax()) == sample.label
        for out, sample in zip(outputs_without(kennel, dogs, 0), dogs, strict=True)
    ]
    assert row["own_images"] == len(dogs) == 12
    assert row["own_accuracy_lost"] == pytest.approx(np.mean(whole) - np.mean(gone))


def test_the_classes_hurt_most_with_an_interval_for_all(found, samples):
    hurt = found.hurt(1, 3)
    assert set(hurt["class"][:2]) == {"car", "sports car"}
    losses = found.means[1][3]
    quantile = scipy_stats.t.ppf(1 - 0.05 / 12, len(samples) - 1)
    half = quantile * found.deviations[1][3] / math.sqrt(len(samples))
    row = hurt[hurt["class_index"] == 3].iloc[0]
    assert (row["lost_low"], row["lost_high"]) == (
        pytest.approx(losses - half),
        pytest.approx(losses + half),
    )
    with pytest.raises(ConsilienceError, match="unit 9"):
        found.hurt(9)


def test_groups_overrule_names(kennel, samples):
    found = knock_out(kennel, "end", [0], samples[:3], ["dog"], groups={"dogs": (5,)})
    assert found.matches[0].classes == (5,)
    assert found.contrast[:, 0].max() < 0


def test_the_model_comes_back(red_model):
    before = copy.deepcopy(red_model.module.state_dict())
    knock_out(red_model, "mix", [0, 3], [planted_image(0), planted_image(1)])
    assert all(
        torch.equal(value, before[name])
        for name, value in red_model.module.state_dict().items()
    )
    assert not any(part._forward_hooks for part in red_model.module.modules())


@pytest.mark.parametrize(
    ("units", "concepts", "said"),
    [
        ([], None, "0 units"),
        ([0, 0], None, "twice"),
        ([0], ["a", "b"], "2 concepts for 1"),
        ([77], None, "channels 0 to 3"),
    ],
)
def test_what_cannot_be_knocked_out_is_refused(
    kennel, samples, units, concepts, said
):
    with pytest.raises(ConsilienceError, match=said):
        knock_out(kennel, "end", units, samples[:1], concepts)


def test_p_is_that_of_a_cost_not_of_any_difference(kennel, samples):
    """A unit whose loss spares its classes has a p near 1, and the other way round half
    of what two sides would have.
    """
    spared = knock_out(
        kennel, "end", [0], samples[:5], ["dog"], groups={"dogs": (5,)}
    )
    assert (spared.contrast[:, 0] < 0).all()
    assert spared.table()["p"][0] == 1.0
    hurt = knock_out(kennel, "end", [0], samples[:5], ["dog"])
    assert (hurt.contrast[:, 0] > 0).all()
    values = hurt.contrast[:, 0]
    one, two = (
        stats.paired_test(values, alternative=side)
        for side in ("greater", "two-sided")
    )
    assert hurt.table()["p"][0] == one < two
