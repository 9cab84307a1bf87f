"""From map to units: shares against slow sums, and a network whose carriers are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PATCH, planted_image
from torch import nn

import consilience as cs
from consilience import api
from consilience.agreement.masks import default_cutter
from consilience.dissection import units
from consilience.dissection.units import (
    carriers,
    cell_weights,
    channel_maps,
    explain_by_units,
)
from consilience.images import enlarge
from consilience.models.network import wrap
from consilience.registry import explainers
from consilience.show import words
from consilience.types import ConsilienceError, NotApplicable, Sample

ADDITIVE = (
    "gradcam",
    "hirescam",
    "xgradcam",
    "gradcam++",
    "layercam",
    "gradcam-elementwise",
)
CONCEPTS = pd.DataFrame(
    {
        "layer": "last",
        "unit": [0, 1, 2, 3],
        "concept": ["red", "green", "", "light"],
        "iou": [0.9, 0.3, 0.01, 0.1],
    }
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=4), nn.Tanh(), nn.Conv2d(6, 5, 3), nn.Tanh()
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.body(x)
        return self.head((x + 0.4 * x**2).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(9)
    return wrap(Small().eval(), classes=("a", "b", "c"), size=40, name="small").using(
        engine="torch"
    )


@pytest.fixture(scope="module")
def image():
    return Sample(
        "noise",
        np.random.default_rng(2).integers(0, 255, (50, 60, 3), dtype=np.uint8),
    )


def shares_slowly(model, explanation, explainer, mask, layer):
    """Enlarge what each channel adds, sum over the mask's pixels one by one, divide."""
    view = model.view(explanation.sample, explanation.provenance["view"])
    trace = model.trace(view.pixels, [layer], explanation.target)
    A, G = (
        trace.activations[layer][0].double().numpy(),
        trace.gradients[layer][0].double().numpy(),
    )
    sums = []
    for a, g in zip(A, G, strict=True):
        added = {
            "gradcam": g.mean() * a,
            "hirescam": g * a,
            "xgradcam": (g * a).sum() / a.sum() * a,
        }[explainer]
        large = enlarge(torch.from_numpy(added), mask.shape).numpy()
        sums.append(sum(large[y, x] for y, x in zip(*np.nonzero(mask), strict=True)))
    return np.array(sums) / sum(sums)


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "xgradcam"])
def test_shares_are_those_of_the_slow_sum(name, small, image):
    explanation = cs.explain(small, image, f"{name}:layer=body")
    dissection = pd.DataFrame({"layer": ["body"], "unit": [0], "concept": ["x"]})
    mask = default_cutter(explanation).cut(explanation).on
    found = carriers(small, explanation, dissection)
    np.testing.assert_allclose(
        found.shares,
        shares_slowly(small, explanation, name, mask, "body"),
        rtol=1e-4,
        atol=1e-6,
    )
    assert found.shares.sum() == pytest.approx(1)
    assert found.area == pytest.approx(mask.mean())
    assert found.cancelled >= 1


@pytest.mark.parametrize("name", ADDITIVE)
def test_channels_add_up_to_the_map(name, small, image):
    explanation = cs.explain(small, image, f"{name}:layer=body,relu=false")
    explainer = explainers.build(f"{name}:layer=body,relu=false")
    parts = channel_maps(
        small, small.view(image), explainer, explanation.target, "body"
    )
    assert parts.shape == (5, 7, 7)
    np.testing.assert_allclose(
        parts.sum(dim=0).numpy(), explanation.extras["grid"], rtol=1e-4, atol=1e-6
    )


def test_shares_do_not_depend_on_the_maps_relu(small, image):
    dissection = pd.DataFrame({"layer": ["body"], "unit": [0], "concept": ["x"]})
    maps = [
        cs.explain(small, image, f"gradcam:layer=body,relu={relu}")
        for relu in ("true", "false")
    ]
    mask = maps[1].values > 0
    mask[np.unravel_index(maps[1].values.argmin(), mask.shape)] = (
        True  # a pixel that the ReLU silences
    )
    assert maps[1].values.min() < 0
    with_relu, without = (
        carriers(small, one, dissection, mask).shares for one in maps
    )
    np.testing.assert_allclose(with_relu, without)
    assert (without < 0).any()


@pytest.mark.parametrize(
    ("grid", "size"),
    [((7, 7), (40, 40)), ((3, 5), (31, 22)), ((1, 1), (9, 9)), ((8, 8), (8, 8))],
)
def test_cell_weights_are_the_enlargement_transposed(grid, size):
    rng = np.random.default_rng(0)
    mask = rng.random(size) < 0.3
    cells = torch.from_numpy(rng.normal(size=grid))
    inside = float(enlarge(cells, size).numpy()[mask].sum())
    weights = cell_weights(mask, grid)
    assert float((weights * cells).sum()) == pytest.approx(inside)
    assert float(weights.sum()) == pytest.approx(mask.sum())


def test_the_red_unit_carries_the_red_map(red_model):
    explanation = cs.explain(
        red_model, planted_image(), "gradcam:layer=last", target="red"
    )
    found = carriers(red_model, explanation, CONCEPTS)
    np.testing.assert_allclose(found.shares, [1, 0, 0, 0], atol=1e-6)
    assert found.sentence().startswith("100 % of this map: unit 0 red (100 %); by")
    assert found.by_concept()["red"] == pytest.approx(1)
    first = found.table().iloc[0]
    assert (first["unit"], first["concept"], first["iou"]) == (0, "red", 0.9)
    image = np.zeros((64, 64), bool)
    image[PATCH] = True
    assert carriers(red_model, explanation, CONCEPTS, image).area == image.mean()


def test_the_sentence_names_the_largest_shares():
    from consilience.dissection.units import Carried

    shares = np.array([0.41, -0.2, 0.27, 0.52])
    found = Carried(
        "l",
        "gradcam",
        shares,
        ("wheel", "sky", "", "road"),
        CONCEPTS.drop(columns="layer"),
        0.2,
    )
    assert found.sentence() == (
        "93 % of this map: unit 3 road (52 %), unit 0 wheel (41 %); by concept: "
        "road 52 %, wheel 41 %, sky −20 %, no concept 27 %"
    )
    assert "unit 2 no concept (27 %)" in words.units_words(found.as_dict(), units=3)
    assert found.cancelled == pytest.approx(1.4)
    assert words.units_words(found.as_dict(), most=2).endswith(
        "by concept: road 52 %, wheel 41 %, no concept 27 %"
    )
    assert sum(found.by_concept().values()) == pytest.approx(1)
    assert list(found.table()["unit"]) == [3, 0, 2, 1]


def test_a_method_that_mixes_channels_has_no_shares(small, image):
    explanation = cs.explain(small, image, "eigengradcam:layer=body")
    with pytest.raises(NotApplicable, match="is not a sum over channels"):
        carriers(small, explanation, CONCEPTS.assign(layer="body"))


@pytest.mark.parametrize(
    "spec", ["centre", "gradcam:layer=mix+last", "eigencam:layer=last"]
)
def test_what_has_no_channels_has_no_shares(spec, red_model):
    explanation = cs.explain(red_model, planted_image(), spec, target="red")
    with pytest.raises(NotApplicable):
        carriers(red_model, explanation, CONCEPTS)


def test_an_empty_map_is_not_shared_out(red_model):
    grey = Sample("black", np.zeros((64, 64, 3), np.uint8))
    explanation = cs.explain(red_model, grey, "gradcam:layer=last", target="red")
    with pytest.raises(NotApplicable, match="sums to nothing"):
        carriers(red_model, explanation, CONCEPTS)


def test_what_does_not_belong_together_is_refused(red_model, small, image):
    explanation = cs.explain(
        red_model, planted_image(), "gradcam:layer=last", target="red"
    )
    with pytest.raises(
        ConsilienceError, match="the dissection is of mix; the map is of 'last'"
    ):
        carriers(red_model, explanation, CONCEPTS.assign(layer="mix"))
    with pytest.raises(ConsilienceError, match="the model is small"):
        carriers(small, explanation, CONCEPTS)
    with pytest.raises(NotApplicable, match="the dissection is of other@1"):
        carriers(red_model, explanation, CONCEPTS.assign(model="other@1"))
    with pytest.raises(ConsilienceError, match="column unit"):
        carriers(red_model, explanation, CONCEPTS.drop(columns="unit"))
    other = replace(explanation, values=explanation.values + 1)
    with pytest.raises(ConsilienceError, match="not the one at hand"):
        carriers(red_model, other, CONCEPTS)


def test_explanations_get_their_units_or_the_reason(red_model):
    target = api.target_of_image(red_model, planted_image(), "red", torch.zeros(1, 2))
    made = [
        cs.explain(red_model, planted_image(), spec, target)
        for spec in ("gradcam:layer=last", "centre")
    ]
    with_units, without = explain_by_units(red_model, made, CONCEPTS)
    assert with_units.provenance["units"]["units"][0]["concept"] == "red"
    assert without.provenance["units"]["code"] == "not-a-layer-map"
    np.testing.assert_array_equal(with_units.values, made[0].values)


@pytest.mark.parametrize(("gap", "apart"), [(0.5e-4, False), (2e-4, True)])
def test_channels_may_miss_the_map_by_a_ten_thousandth(gap, apart):
    whole = torch.tensor([[1.0, -4.0], [2.0, 0.5]])
    sums = whole.clone()
    sums[0, 0] += 4 * gap
    assert units._apart(sums, whole) == apart


@pytest.mark.parametrize(
    ("sums", "shared"), [((5, -4.95), True), ((5, -4.995), False)]
)
def test_a_sum_that_is_the_rest_of_rounding_is_not_shared_out(sums, shared):
    """.05 of 9.95 are 5 in a thousand, .005 half of one."""
    parts = torch.tensor(sums, dtype=torch.float32)[:, None, None].expand(2, 2, 2)
    mask = np.ones((4, 4), dtype=bool)
    if shared:
        shares = units._shares(parts, mask)
        np.testing.assert_allclose(shares, np.array(sums) / 0.05, rtol=1e-4)
    else:
        with pytest.raises(NotApplicable):
            units._shares(parts, mask)
