"""Targets beyond a class: their gradients by hand and by finite differences, their
grammar, and how a run keeps them.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import PATCH, RedFinder, planted_image
from PIL import Image
from torch import nn
from torch.nn import functional

import consilience as cs
from consilience import api, registry, targets
from consilience.images import Placement
from consilience.models import load
from consilience.models.readouts import ReadNetwork
from consilience.models.tasks import overlap
from consilience.runs import explain
from consilience.targets.differences import DifferenceTarget
from consilience.targets.layers import CosineTarget, UnitTarget, WholeLayer
from consilience.targets.places import GridPlace, read_mask
from consilience.targets.regions import DetectionTarget, PixelsTarget
from consilience.types import (
    PIXELS,
    ClassTarget,
    ConsilienceError,
    NotApplicable,
    Sample,
)

# ---- tools


class Smooth(nn.Module):
    """Twice differentiable, with an in-place activation, a skip, a vector before the
    head.
    """

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.second = nn.Conv2d(5, 5, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(5, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        x = self.first(x)
        x = x.tanh_() + self.second(x)
        x = self.pool(x).flatten(1)
        return self.head(self.hidden(x).tanh())


class Labels(nn.Module):
    """Labels pixels at half resolution; what it returns is wrapped by ``give``."""

    def __init__(
        self, classes=3, give=lambda logits: {"out": logits, "aux": logits * 0}
    ):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.last = nn.Conv2d(6, classes, 3, padding=1)
        self.give = give

    def forward(self, x):
        return self.give(self.last(self.body(x).tanh()) * 5)


class Boxes(nn.Module):
    """Finds two boxes of class 1 and one of class 2, with scores that depend on what is
    inside; another that never moves.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)
        )
        self.where = torch.tensor(
            [[2.0, 2.0, 10.0, 10.0], [6.0, 8.0, 16.0, 16.0], [0.0, 0.0, 16.0, 16.0]]
        )

    def forward(self, images):
        return [self._found(image) for image in images]

    def _found(self, image):
        seen = self.backbone(image[None])[0]
        means = torch.stack(
            [seen[:, 1:5, 1:5].mean(), seen[:, 4:, 3:].mean(), seen.mean()]
        )
        shift = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]) * (
            means[0] - means[0].detach()
        )
        return {
            "boxes": self.where + shift,
            "labels": torch.tensor([1, 1, 2]),
            "scores": (3 * means).sigmoid(),
        }


def image(seed=0, size=16):
    return Sample(
        f"p{seed}",
        np.random.default_rng(seed)
        .integers(0, 256, (size, size, 3))
        .astype(np.uint8),
    )


def wrapped(module, size=16, **options):
    return cs.wrap(
        module,
        mean=(0.3, 0.4, 0.5),
        std=(0.5, 0.6, 0.7),
        size=size,
        engine="torch",
        **options,
    )


def gradient(model, sample, target):
    """d target / d pixels (3, h, w) as explainers have it."""
    goal, asked, view = posed(model, sample, target)
    return asked.trace(view.pixels, [PIXELS], goal).gradients[PIXELS][0]


def posed(model, sample, target, view=None):
    shown = model.view(sample, view)
    goal = targets.resolve_target(
        model, sample, target, api.raw_outputs(model, shown)
    )
    asked, bound = targets.ask_where_read(model, shown, goal)
    return bound, asked, shown


def difference_quotients(model, sample, target, eps=1e-2, count=4):
    """Central differences of the score along random directions, and what the gradient
    says of them.
    """
    goal, asked, view = posed(model, sample, target)
    found = gradient(model, sample, target).double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        along = torch.randn(view.pixels.shape, generator=generator)
        with torch.no_grad():
            up, down = (
                float(goal.of(asked.logits(view.pixels + sign * eps * along))[0])
                for sign in (1, -1)
            )
        yield (up - down) / (2 * eps), float((found * along[0].double()).sum())


def assert_gradient(model, sample, target):
    pairs = list(difference_quotients(model, sample, target))
    assert max(abs(expected) for expected, _ in pairs) > 1e-4
    for expected, got in pairs:
        assert got == pytest.approx(expected, rel=2e-2, abs=2e-5)


# ---- a difference


def test_difference_is_gradient_a_less_gradient_b():
    model, sample = wrapped(Smooth(), classes=("a", "b", "c")), image()
    a, b = (gradient(model, sample, name) for name in ("a", "b"))
    torch.testing.assert_close(
        gradient(model, sample, "difference:a,b"), a - b, rtol=1e-5, atol=1e-8
    )
    torch.testing.assert_close(
        gradient(model, sample, "difference:1,0"), b - a, rtol=1e-5, atol=1e-8
    )


def test_difference_words_and_names():
    model, sample = wrapped(Smooth(), classes=("a", "b, or so", "c")), image()
    outputs = torch.tensor([[0.1, 3.0, 2.0]])
    goal = targets.resolve_target(
        model, sample, "difference:predicted,second", outputs
    )
    assert (goal.a, goal.b, goal.name, goal.index) == ("1", "2", "b, or so - c", None)
    assert (
        targets.resolve_target(model, sample, 'difference:"b, or so",a', outputs).a
        == "1"
    )
    labelled = Sample("l", sample.pixels, label=2)
    assert (
        targets.resolve_target(
            model, labelled, "difference:true,predicted", outputs
        ).name
        == "c - b, or so"
    )
    with pytest.raises(NotApplicable, match="same class here"):
        targets.resolve_target(model, labelled, "difference:predicted,1", outputs)
    with pytest.raises(
        ConsilienceError, match=r"no class 'cat'.*here is: a, b, or so, c"
    ):
        targets.resolve_target(model, sample, "difference:a,cat", outputs)


@pytest.mark.parametrize(
    ("score", "outputs", "expected"),
    [
        ("logit", "logits", 1.5),
        ("probability", "logits", None),
        ("probability", "probabilities", 1.5),
        ("logit", "values", 1.5),
    ],
)
def test_difference_is_read_as_an_explainer_reads(score, outputs, expected):
    rows = torch.tensor([[0.5, 2.0, -1.0]])
    goal = DifferenceTarget("1", "0", outputs=outputs).scored(score)
    if expected is None:
        powers = np.exp([0.5, 2.0, -1.0])
        expected = (powers[1] - powers[0]) / powers.sum()
    assert float(goal.of(rows)[0]) == pytest.approx(expected)
    assert (
        goal.score
        == {"logits": score, "probabilities": "probability", "values": "value"}[
            outputs
        ]
    )


def test_difference_works_on_a_black_box_and_in_lime(planted):
    black = cs.wrap_callable(
        lambda pixels: torch.stack(
            [pixels[:, 1].mean((1, 2)), pixels[:, 0].mean((1, 2))], 1
        ),
        size=64,
    )
    map_ = api.explain(
        black,
        planted,
        "lime:samples=100,segments=grid(8),fill=grey",
        target="difference:1,0",
    )
    assert map_.target.score == "probability"
    inside = np.zeros((64, 64), dtype=bool)
    inside[PATCH] = True
    assert (
        map_.values[inside].mean()
        > map_.values[~inside].mean() + 2 * map_.values[~inside].std()
    )


# ---- units and layers


def by_hand(pixels):
    """d mean(relu(2R - 2G - 2B)) / d pixels of the red finder's first channel, and of
    what is before the ReLU.
    """
    said = 2 * pixels[0] - 2 * pixels[1] - 2 * pixels[2]
    colours = torch.tensor([2.0, -2.0, -2.0])[:, None, None]
    return colours * (said > 0) / said.numel(), colours.expand(
        3, *said.shape
    ) / said.numel()


def test_a_units_gradient_by_hand(red_model, planted):
    after, before = by_hand(red_model.view(planted).pixels[0])
    torch.testing.assert_close(gradient(red_model, planted, "unit:mix,0"), after)
    # What `colours` said is overwritten in place by the ReLU after it: the unit is what
    # the layer said.
    torch.testing.assert_close(gradient(red_model, planted, "unit:colours,0"), before)


def test_a_units_score_is_its_mean_activation(red_model, planted):
    view = red_model.view(planted)
    maps = red_model.activations(view.pixels, ["pool", "colours"])
    for layer, unit in (("pool", 3), ("colours", 1)):
        told = api.explain(
            red_model, planted, "gradcam", target=f"unit:{layer},{unit}"
        ).provenance["score"]
        assert told == pytest.approx(float(maps[layer][0, unit].mean()), rel=1e-5)
    told = api.explain(
        red_model, planted, "gradcam", target="unit:pool,3,at=2+5"
    ).provenance["score"]
    assert told == pytest.approx(float(maps["pool"][0, 3, 2, 5]), rel=1e-5)


def test_a_unit_at_a_place_sees_that_place_alone(red_model, planted):
    found = gradient(red_model, planted, "unit:pool,0,at=1+5")
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[8:16, 40:48] = True
    assert not found[:, ~inside].any()
    torch.testing.assert_close(
        found[:, inside], torch.tensor([2.0, -2.0, -2.0])[:, None].expand(3, 64) / 64
    )


def test_a_layers_mean_is_the_mean_of_its_units():
    model, sample = wrapped(Smooth()), image(1)
    units = torch.stack(
        [
            gradient(model, sample, f"unit:second,{unit},box=2+3+12+9")
            for unit in range(5)
        ]
    )
    torch.testing.assert_close(
        gradient(model, sample, "layer:second,box=2+3+12+9"),
        units.mean(dim=0),
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize(
    "target",
    [
        "unit:second,2",
        "unit:first,1,at=3+4",
        "layer:second,box=1+1+7.5+15",
        "unit:hidden,3",
        "difference:0,2",
    ],
)
def test_finite_differences(target):
    assert_gradient(wrapped(Smooth()), image(2), target)


def test_gradcam_at_the_units_own_layer_is_its_map(red_model, planted):
    made = api.explain(red_model, planted, "gradcam", target="unit:pool,0")
    map_ = red_model.activations(red_model.view(planted).pixels, ["pool"])["pool"][
        0, 0
    ]
    assert made.provenance["layer"] == "pool"
    np.testing.assert_allclose(made.extras["grid"], map_.numpy() / 64, rtol=1e-5)


def test_a_layer_behind_the_unit_has_no_say(red_model, planted):
    made = api.explain(red_model, planted, "gradcam:layer=last", target="unit:pool,0")
    assert not made.values.any()


@pytest.mark.parametrize(
    "by",
    [
        "rise:masks=2000",
        "lime:samples=200,segments=grid(8),fill=grey",
        "occlusion:window=8,stride=4",
        "ablationcam",
        "scorecam",
        "layercam",
        "guided-gradcam",
    ],
)
@pytest.mark.parametrize("target", ["unit:mix,0", "difference:red,nothing"])
def test_explainers_run_unchanged(by, target, red_model, planted):
    values = api.explain(red_model, planted, by, target=target).values
    inside = np.zeros((64, 64), dtype=bool)
    inside[PATCH] = True
    assert values[inside].mean() > values[~inside].mean() + 2 * values[~inside].std()


def test_engines_say_the_same_of_a_unit(red_model, planted):
    goal, asked, view = posed(
        red_model.using(engine="openvino"), planted, "unit:colours,2"
    )
    pixels = torch.rand(
        asked.batch + 9, 3, 64, 64, generator=torch.Generator().manual_seed(0)
    )
    plain = red_model.activations(pixels, ["colours"])["colours"][:, 2].mean(
        dim=(1, 2)
    )
    torch.testing.assert_close(
        goal.of(asked.scores(pixels)), plain, rtol=1e-4, atol=1e-5
    )
    assert asked.facts["engine"] == "openvino"
    again, _ = targets.ask_where_read(red_model, view, goal.goal)
    assert (
        targets.ask_where_read(red_model, view, goal.goal)[0] is again
    )  # its engine and anatomy are kept


def test_metrics_ask_the_network_that_is_read(red_model, planted):
    """Deletion of a unit's evidence starts at the unit's own mean, whatever the class
    outputs are.
    """
    made = api.explain(red_model, planted, "gradcam", target="unit:mix,0")
    score = api.evaluate(red_model, made, ["deletion:steps=8,fill=black"])
    (found,) = score.values()
    assert not isinstance(found, NotApplicable), found
    assert np.isfinite(found.value)
    assert made.target == UnitTarget("mix", 0)


def test_class_outputs_are_refused(red_model, planted):
    """A unit's number taken from class outputs would be another number, said without a
    word.
    """
    made = api.explain(red_model, planted, "gradcam", target="unit:mix,0")
    with pytest.raises(
        NotApplicable, match="mix unit 0 is not read from class outputs"
    ):
        made.target.of(red_model.scores(red_model.view(planted).pixels))


def test_tokens_of_a_transformer():
    model = cs.load_model("timm:vit_tiny_patch16_224,weights=random", engine="torch")
    sample = image(3, 224)
    made = api.explain(model, sample, "gradcam", target="unit:blocks.5,17,at=3+4")
    tokens = model.activations(model.view(sample).pixels, ["blocks.5"])["blocks.5"]
    assert made.provenance["score"] == pytest.approx(
        float(tokens[0, 17, 3, 4]), rel=1e-4
    )


# ---- places


def slow_weights(grid, geometry, inside, fine=120):
    """Shares of cells by asking ``inside(x, y)``, in pixels of the image, of many
    points of each cell.
    """
    height, width = geometry.size
    found = np.zeros(grid)
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        for i, j in itertools.product(range(fine), repeat=2):
            y, x = (
                (row + (i + 0.5) / fine) * height / grid[0],
                (column + (j + 0.5) / fine) * width / grid[1],
            )
            py = (y + geometry.offset[0]) * geometry.image[0] / geometry.resized[0]
            px = (x + geometry.offset[1]) * geometry.image[1] / geometry.resized[1]
            found[row, column] += inside(px, py)
    return found / found.sum()


@pytest.mark.parametrize(
    "placement",
    [Placement.squash((30, 44), (24, 24)), Placement.crop((30, 44), 28, (24, 24))],
)
def test_a_box_weighs_cells_by_how_much_of_them_it_holds(placement):
    weights = GridPlace(box=(9.0, 4.0, 31.0, 17.0)).weights((4, 3), placement)
    expected = slow_weights(
        (4, 3), placement, lambda x, y: 9 <= x < 31 and 4 <= y < 17
    )
    np.testing.assert_allclose(weights.numpy(), expected, atol=4e-3)
    assert float(weights.sum()) == pytest.approx(1)


def test_a_mask_weighs_cells_as_a_box_of_the_same_pixels(tmp_path):
    placement = Placement.squash((24, 24), (24, 24))
    mask = np.zeros((24, 24), dtype=np.uint8)
    mask[5:17, 3:20] = 255
    np.save(tmp_path / "mask.npy", mask)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    expected = GridPlace(box=(3.0, 5.0, 20.0, 17.0)).weights((5, 7), placement)
    for name in ("mask.npy", "mask.png"):
        assert read_mask(tmp_path / name).sum() == 12 * 17
        torch.testing.assert_close(
            GridPlace(mask=str(tmp_path / name)).weights((5, 7), placement), expected
        )


def test_places_that_are_none(tmp_path):
    placement = Placement.crop((40, 80), 20, (20, 20))
    np.save(tmp_path / "m.npy", np.ones((8, 8)))
    np.save(tmp_path / "cube.npy", np.ones((2, 8, 8)))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(
        NotApplicable,
        match="no part of box 0, 0, 10, 10 lies in what the model is shown",
    ):
        GridPlace(box=(0.0, 0.0, 10.0, 10.0)).weights((4, 4), placement)
    with pytest.raises(ConsilienceError, match="is 8 x 8; the image is 40 x 80"):
        GridPlace(mask=str(tmp_path / "m.npy")).weights((4, 4), placement)
    with pytest.raises(
        ConsilienceError, match="4 rows and 4 columns; row 4, column 0 is outside"
    ):
        GridPlace(at=(4, 0)).weights((4, 4), placement)
    with pytest.raises(ConsilienceError, match=r"a mask is \(H, W\)"):
        read_mask(tmp_path / "cube.npy")
    with pytest.raises(ConsilienceError, match="is not an array"):
        read_mask(tmp_path / "pickle.npy")
    with pytest.raises(
        ConsilienceError, match=r"given once; got at 1, 1 and box 0, 0, 3, 3"
    ):
        GridPlace((1, 1), (0.0, 0.0, 3.0, 3.0)).check()


# ---- an embedding


@pytest.fixture
def vector(tmp_path):
    np.save(tmp_path / "direction.npy", np.array([1.0, -2.0, 0.5, 0.25, 3.0]))
    return str(tmp_path / "direction.npy")


def test_cosine_to_a_vector(vector):
    model, sample = wrapped(Smooth()), image(4)
    target = f'cosine:"{vector}",layer=second'
    means = (
        model.activations(model.view(sample).pixels, ["second"])["second"][0]
        .mean(dim=(1, 2))
        .double()
        .numpy()
    )
    reference = np.load(vector)
    expected = means @ reference / np.linalg.norm(means) / np.linalg.norm(reference)
    goal, asked, view = posed(model, sample, target)
    assert float(goal.of(asked.logits(view.pixels)).detach()[0]) == pytest.approx(
        expected, rel=1e-5
    )
    assert_gradient(model, sample, target)


def test_cosine_to_an_image_in_the_same_view(tmp_path):
    model = wrapped(Smooth(), outputs="values")
    other = Image.fromarray(
        np.random.default_rng(9).integers(0, 256, (20, 40, 3)).astype(np.uint8)
    )
    other.save(tmp_path / "other.png")
    target = f'cosine:"{tmp_path / "other.png"}"'
    sample = image(5)
    for mode in ("crop", "squash"):
        goal, asked, view = posed(model, sample, target, mode)
        assert goal.goal.layer == "outputs"
        one = model.logits(view.pixels)[0].detach()
        two = model.logits(
            model.view(cs.read_image(tmp_path / "other.png"), mode).pixels
        )[0].detach()
        expected = float(functional.cosine_similarity(one, two, dim=0))
        assert float(goal.of(asked.logits(view.pixels)).detach()[0]) == pytest.approx(
            expected, rel=1e-5
        )
    assert_gradient(model, sample, target)
    itself = posed(model, cs.read_image(tmp_path / "other.png"), target)
    assert float(
        itself[0].of(itself[1].logits(itself[2].pixels)).detach()[0]
    ) == pytest.approx(1)


def test_cosine_of_a_classifier_is_read_where_a_cam_looks(
    vector, red_model, planted, tmp_path
):
    np.save(tmp_path / "four.npy", np.ones(4))
    goal, _, _ = posed(red_model, planted, f'cosine:"{tmp_path / "four.npy"}"')
    assert goal.goal.layer == red_model.target_layer() == "last"
    with pytest.raises(
        ConsilienceError, match="has 5 numbers; the embedding at last has 4"
    ):
        posed(red_model, planted, f'cosine:"{vector}"')
    np.save(tmp_path / "nothing.npy", np.zeros(4))
    with pytest.raises(NotApplicable, match="is not a direction"):
        posed(red_model, planted, f'cosine:"{tmp_path / "nothing.npy"}"')


def test_another_reference_is_another_target(vector):
    model, sample = wrapped(Smooth()), image(4)
    first = api.explain(
        model, sample, "layercam", target=f'cosine:"{vector}",layer=second'
    )
    np.save(vector, np.array([1.0, 2.0, 0.5, 0.25, 3.0]))
    second = api.explain(
        model, sample, "layercam", target=f'cosine:"{vector}",layer=second'
    )
    assert first.provenance["key"] != second.provenance["key"]
    with pytest.raises(
        ConsilienceError, match="another file than when this target was made"
    ):
        api.explain(model, sample, "layercam", target=first.target)


# ---- pixels of a segmentation network


def segmenter(**options):
    return cs.wrap_segmentation(
        Labels(**options),
        mean=(0.3, 0.4, 0.5),
        std=(0.5, 0.6, 0.7),
        size=16,
        engine="torch",
    )


def slow_logits(model, sample):
    x = (
        model.view(sample).pixels[0].double()
        - torch.tensor([0.3, 0.4, 0.5])[:, None, None]
    ) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    module = copy.deepcopy(model.module).double()
    with torch.no_grad():
        return (module.last(torch.tanh(module.body(x[None]))) * 5)[0].numpy()


def test_a_class_is_its_share_of_the_frame():
    model, sample = segmenter(), image(6)
    powers = np.exp(slow_logits(model, sample))
    shares = (powers / powers.sum(axis=0)).mean(axis=(1, 2))
    np.testing.assert_allclose(
        api.raw_outputs(model, model.view(sample))[0].numpy(), shares, rtol=1e-5
    )
    made = api.explain(model, sample, "gradcam")
    assert made.target.index == int(shares.argmax())
    assert made.provenance["prediction"]["probability"] == pytest.approx(
        shares.max(), rel=1e-5
    )
    assert_gradient(model, sample, "1")


def test_pixels_predicted_so():
    model, sample = segmenter(), image(6)
    logits = slow_logits(model, sample)
    for category in np.unique(logits.argmax(axis=0)):
        on = logits.argmax(axis=0) == category
        made = api.explain(model, sample, "layercam", target=f"pixels:{category}")
        assert made.provenance["score"] == pytest.approx(
            logits[category][on].mean(), rel=1e-4
        )
        assert made.provenance["layer"] == "body"
        powers = np.exp(logits)
        read = api.explain(
            model,
            sample,
            "lime:samples=40,segments=grid(4)",
            target=f"pixels:{category}",
        )
        assert read.provenance["score"] == pytest.approx(
            (powers / powers.sum(axis=0))[category][on].mean(), rel=1e-4
        )
        assert read.target.score == "probability"
        assert_gradient(model, sample, f"pixels:{category}")
    assert_gradient(model, sample, "pixels:predicted")


def test_pixels_of_a_box_and_of_a_mask(tmp_path):
    model, sample = segmenter(), image(6)
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:12, 2:14] = True
    np.save(tmp_path / "mask.npy", mask)
    expected = slow_logits(model, sample)[2, 2:6, 1:7].mean()
    for where in ("box=2+4+14+12", f'mask="{tmp_path / "mask.npy"}"'):
        goal, asked, view = posed(model, sample, f"pixels:2,{where}")
        assert float(goal.of(asked.logits(view.pixels)).detach()[0]) == pytest.approx(
            expected, rel=1e-4
        )
        assert_gradient(model, sample, f"pixels:2,{where}")


class Result:
    def __init__(self, logits):
        self.logits = logits


def test_what_segmentation_networks_return():
    same = [
        segmenter(give=give)
        for give in (
            lambda x: {"out": x},
            lambda x: x,
            Result,
            lambda x: {"logits": x},
        )
    ]
    rows = [api.raw_outputs(model, model.view(image(6))) for model in same]
    assert all(torch.equal(row, rows[0]) for row in rows)
    one = segmenter(classes=1, give=lambda x: x)
    sigmoid = 1 / (1 + np.exp(-slow_logits(one, image(6))[0]))
    np.testing.assert_allclose(
        api.raw_outputs(one, one.view(image(6)))[0].numpy(),
        [1 - sigmoid.mean(), sigmoid.mean()],
        rtol=1e-5,
    )
    with pytest.raises(
        ConsilienceError, match="2 class names for a module with 3 channels"
    ):
        cs.wrap_segmentation(Labels(), classes=("a", "b"), size=16)
    with pytest.raises(
        ConsilienceError,
        match=r"returns logits \(N, K, H, W\).*returns shape \(1, 3\)",
    ):
        cs.wrap_segmentation(Smooth(), size=16, classes=("a", "b", "c"))
    with pytest.raises(ConsilienceError, match="outputs= is for wrap"):
        cs.wrap_segmentation(Labels(), size=16, outputs="logits")


def test_no_pixel_predicted_so(monkeypatch):
    model, sample = segmenter(), image(6)
    with torch.no_grad():
        model.module.last.bias[1] = -100
    with pytest.raises(
        NotApplicable, match="no pixel of this image is predicted as class 1"
    ):
        api.explain(model, sample, "layercam", target="pixels:1")


def test_torchvisions_segmentation():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    module = lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    ).eval()
    model = cs.wrap_segmentation(module, classes=tuple("abcd"), size=64)
    made = api.explain(model, image(7, 64), "gradcam", target="pixels:predicted")
    assert made.values.any()
    assert np.isfinite(made.values).all()
    with torch.no_grad():
        logits = module(model.recipe.normalised(model.view(image(7, 64)).pixels))[
            "out"
        ][0]
    label = int(made.target.category)
    assert made.provenance["score"] == pytest.approx(
        float(logits[label][logits.argmax(0) == label].mean()), rel=1e-3
    )


# ---- boxes of a detector


def detector():
    return cs.wrap_detector(Boxes(), classes=("ground", "cat", "dog"), size=16)


def test_a_class_is_its_surest_detection():
    model, sample = detector(), image(8)
    found = model.module(list(model.view(sample).pixels))[0]
    expected = [
        0.0,
        float(found["scores"][:2].max().detach()),
        float(found["scores"][2].detach()),
    ]
    np.testing.assert_allclose(
        api.raw_outputs(model, model.view(sample))[0].numpy(), expected, rtol=1e-6
    )
    assert_gradient(model, sample, "cat")


def test_one_detection():
    model, sample = detector(), image(8)
    found = model.module(list(model.view(sample).pixels))[0]
    order = found["scores"][:2].argsort(descending=True)
    for rank, row in enumerate(order.tolist(), start=1):
        target = f"detection:cat,rank={rank}"
        made = api.explain(model, sample, "layercam", target=target)
        assert made.provenance["score"] == pytest.approx(
            float(found["scores"][row]), rel=1e-5
        )
        assert made.target.name == f"cat (detection {rank})"
        assert_gradient(model, sample, target)
    best = api.explain(model, sample, "layercam", target="detection:predicted")
    assert best.provenance["score"] == pytest.approx(
        float(found["scores"].max()), rel=1e-5
    )


def test_a_box_of_truth_counts_by_its_overlap():
    model, sample = detector(), image(8)
    found = model.module(list(model.view(sample).pixels))[0]
    boxes, scores = (
        found["boxes"][:2].detach().numpy(),
        found["scores"][:2].detach().numpy(),
    )
    truth = np.array([5.0, 7.0, 15.0, 16.0])

    def iou(one):
        width, height = (
            min(one[i + 2], truth[i + 2]) - max(one[i], truth[i]) for i in (0, 1)
        )
        shared = max(width, 0) * max(height, 0)
        return shared / ((one[2] - one[0]) * (one[3] - one[1]) + 90 - shared)

    expected = max(iou(box) * score for box, score in zip(boxes, scores, strict=True))
    made = api.explain(
        model, sample, "layercam", target="detection:cat,box=5+7+15+16"
    )
    assert made.provenance["score"] == pytest.approx(expected, rel=1e-5)
    assert (
        float(
            overlap(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([2.0, 2, 3, 3]))[0]
        )
        == 0
    )


def test_detections_that_are_not_there():
    model, sample = detector(), image(8)
    with pytest.raises(
        NotApplicable, match="finds 1 boxes of dog in this image; asked for 2"
    ):
        api.explain(model, sample, "layercam", target="detection:dog,rank=2")
    with pytest.raises(
        ConsilienceError, match="no class 'cow'; there is: ground, cat, dog"
    ):
        api.explain(model, sample, "layercam", target="detection:cow")
    with pytest.raises(NotApplicable, match="the detector finds nothing in it"):
        targets.resolve_target(
            model, sample, "detection:predicted", torch.zeros(1, 3)
        )
    with pytest.raises(ConsilienceError, match="gives label 2; 2 classes are named"):
        api.raw_outputs(
            cs.wrap_detector(Boxes(), classes=("ground", "cat"), size=16),
            model.view(sample),
        )
    with pytest.raises(
        ConsilienceError, match="engine openvino cannot run what is read"
    ):
        model.using(engine="openvino")
    wrong = cs.wrap_detector(nn.Flatten(0), classes=("a",), size=16)
    wrong.module.forward = lambda images: images
    with pytest.raises(
        ConsilienceError, match="a list of dicts with boxes, labels and scores"
    ):
        api.raw_outputs(wrong, model.view(sample))


def test_torchvisions_detector():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        box_score_thresh=0.0,
        min_size=64,
        max_size=64,
        rpn_score_thresh=0.0,
    ).eval()
    model = cs.wrap_detector(module, classes=("ground", "a", "b"), size=64)
    sample = image(9, 64)
    found = module(list(model.view(sample).pixels))[0]
    best = int(found["scores"].argmax())
    made = api.explain(model, sample, "gradcam", target="detection:predicted")
    assert made.provenance["score"] == pytest.approx(
        float(found["scores"][best]), rel=1e-4
    )
    assert made.provenance["layer"].startswith("backbone.body.")
    goal, asked, view = posed(model, sample, "detection:predicted")
    (expected,) = torch.autograd.grad(
        asked.logits(leaf := view.pixels.clone().requires_grad_())[0, 0], leaf
    )
    again = module(list(leaf))[0]
    score = again["scores"][again["labels"] == int(goal.goal.category)][0]
    (own,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(expected, own, rtol=1e-4, atol=1e-7)
    assert made.values.any()


# ---- the grammar


@pytest.mark.parametrize(
    "goal",
    [
        DifferenceTarget("1", "2", "a, b", 'c "d"', "probability"),
        UnitTarget("layer4.1", 412, (3, 4)),
        UnitTarget("layer4", 0, mask="some mask, (1).png", digest="ab"),
        WholeLayer("layer4", box=(0.5, 1.0, 20.25, 30.0)),
        CosineTarget("cat.jpg", "layer4", "ff00"),
        PixelsTarget("3", (0.0, 0.0, 9.0, 9.0), label="cat"),
        DetectionTarget("predicted", 2),
    ],
    ids=lambda goal: type(goal).spelled,
)
def test_full_spelling_is_the_whole_target(goal):
    assert targets.build_target(targets.target_spelling(goal)) == goal
    assert targets.build_target(registry.spell(goal)) == goal
    assert (
        targets.target_from_facts(goal.index, goal.name, targets.target_facts(goal))
        == goal
    )


def test_classes_come_back_from_facts():
    goal = ClassTarget(3, "cat", "probability", "probabilities")
    assert targets.target_from_facts(3, "cat", targets.target_facts(goal)) == goal
    assert targets.target_spelling(goal) == ""
    assert targets.target_from_facts(
        3, "cat", {"target_score": "logit"}
    ) == ClassTarget(3, "cat")
    kept = targets.target_from_facts(
        None, "my own", {"target_score": "value", "target_spelled": ""}
    )
    assert (kept.name, kept.index, kept.score) == ("my own", None, "value")
    with pytest.raises(ConsilienceError, match="was made in Python"):
        kept.of(torch.zeros(1, 2))


def test_a_class_may_be_called_like_a_target(planted):
    model = wrapped(RedFinder(), size=64, classes=("unit:mix,0", "red: dark"))
    assert posed(model, planted, "unit:mix,0")[0].index == 0
    assert posed(model, planted, "red: dark")[0].index == 1
    assert isinstance(posed(model, planted, "unit:mix,1")[0].goal, UnitTarget)


ERRORS = {
    "unit:layer9,3": r"no layer 'layer9'.*colours, act, pool, mix, last",
    "unit:mix,4": "'mix' of red-finder@.* has units 0 to 3; got 4",
    "unit:mix": "unit needs unit",
    "unit:mix,one": "a whole number; got 'one'",
    "unit:mix,1,place=3": "unit has no option 'place'.*layer, unit, at, box, mask",
    "unit:mix,1,at=1+1,box=1+1+4+4": "a place is given once",
    "unit:mix,1,mask=nowhere.png": "'nowhere.png' cannot be read",
    "layer:deep": "no layer 'deep'",
    "cosine:nowhere.npy": "'nowhere.npy' cannot be read",
    "difference:red": "difference needs b",
    "difference:red,blue": "no class 'blue'; there is: nothing, red",
    "pixels:red": "needs a network of wrap_segmentation",
    "detection:red": "needs a network of wrap_detector",
    "units:mix,3": "no class 'units:mix,3'",
}


@pytest.mark.parametrize("target", ERRORS)
def test_refused_before_any_image(target, red_model):
    with pytest.raises(ConsilienceError, match=ERRORS[target]):
        api.check_target_name(red_model, target)


def test_refused_with_the_image(red_model, planted):
    with pytest.raises(
        ConsilienceError, match="is a vector: it has no place at 0, 0"
    ):
        api.explain(red_model, planted, "gradcam", target="unit:head,0,at=0+0")
    with pytest.raises(
        ConsilienceError, match=r"is out of range: red-finder@.* has classes 0 to 1"
    ):
        api.explain(red_model, planted, "gradcam", target="difference:0,2")
    black = cs.wrap_callable(lambda pixels: pixels.mean((2, 3)), size=64)
    with pytest.raises(
        ConsilienceError, match="target unit needs the layers of a torch network"
    ):
        api.explain(black, planted, "random", target="unit:mix,0")


# ---- what is kept


def test_the_key_covers_the_whole_target(tmp_path, red_model, planted):
    mask = np.zeros((64, 64))
    keys = []
    for corner in (8, 16):
        mask[:corner] = 1
        np.save(tmp_path / "m.npy", mask)
        keys.append(
            api.explain(
                red_model,
                planted,
                "gradcam",
                target=f'unit:mix,0,mask="{tmp_path / "m.npy"}"',
            )
        )
    others = (
        "unit:mix,0",
        "unit:mix,1",
        "unit:mix,0,at=1+1",
        "unit:mix,0,box=0+0+9+9",
        "layer:mix",
        "difference:0,1",
        "0",
    )
    keys += [
        api.explain(red_model, planted, "gradcam", target=target) for target in others
    ]
    found = [one.provenance["key"] for one in keys]
    assert len({*found}) == len(found)
    again = api.explain(red_model, planted, "gradcam", target="unit:mix,0,at=1+1")
    assert again.provenance["key"] == found[4]
    assert {one.model_id for one in keys} == {red_model.id}


def test_the_model_comes_back_also_after_an_exception(planted):
    model = wrapped(RedFinder(), size=64)
    hooks = [part._forward_hooks for part in model.module.modules()]
    _, asked, view = posed(model, planted, "unit:mix,0")
    model.module.head.weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(RuntimeError):
        asked.logits(view.pixels)
    assert not any(hooks)
    assert isinstance(asked, ReadNetwork)
    assert asked.module is model.module


def test_with_module_reads_the_same_place(red_model, planted):
    goal, asked, view = posed(red_model, planted, "unit:colours,0")
    other = copy.deepcopy(red_model.module)
    with torch.no_grad():
        other.colours.weight *= 3
    twin = asked.with_module(other)
    torch.testing.assert_close(
        goal.of(twin.logits(view.pixels)), 3 * goal.of(asked.logits(view.pixels))
    )
    assert asked.id != twin.id != red_model.id


@pytest.fixture
def red_job(tmp_path, monkeypatch, red_model):
    images = tmp_path / "images"
    images.mkdir()
    for seed in (0, 1):
        Image.fromarray(planted_image(seed).pixels).save(images / f"p{seed}.png")
    monkeypatch.setattr(load, "_from_factory", lambda *_: red_model)

    def call(target, by=("gradcam:layer=pool", "random"), folder="run", columns=None):
        job = explain.job_from_specs(by, ["my:red"], target)
        if columns:
            job = explain.replace(
                job,
                allow_mismatch=True,
                columns=tuple(
                    explain.replace(c, target=t)
                    for c, t in zip(job.columns, columns, strict=True)
                ),
            )
        return explain.run_explanations(
            job,
            [images],
            tmp_path / folder,
            None,
            explain.LoadOptions(engine="torch"),
        )

    return call


def test_a_run_keeps_its_targets(red_job):
    done = red_job("unit:mix,0,box=0+0+63+63")
    assert len(done) >= len(done.samples) > 0
    for one in done:
        assert one.target == UnitTarget("mix", 0, box=(0.0, 0.0, 63.0, 63.0))
    assert not [
        row for row in done.manifest["audit"] if row["code"] == "mixed-targets"
    ]
    again = red_job(
        "unit:mix,0,box=0+0+63+63"
    )  # continues: nothing is explained twice
    assert again.manifest["failures"] == []
    with pytest.raises(ConsilienceError):
        red_job("unit:mix,1")


def test_units_and_classes_are_different_targets(red_job):
    done = red_job(None, columns=("1", "unit:mix,1"), folder="mixed")
    (found,) = [one for one in done.audit if one.code == "mixed-targets"]
    assert "red" in found.message
    assert "mix unit 1" in found.message


def test_another_file_is_another_job(red_job, tmp_path):
    np.save(tmp_path / "m.npy", np.ones((64, 64)))
    red_job(f'unit:mix,0,mask="{tmp_path / "m.npy"}"')
    np.save(tmp_path / "m.npy", np.eye(64))
    with pytest.raises(ConsilienceError):
        red_job(f'unit:mix,0,mask="{tmp_path / "m.npy"}"')
