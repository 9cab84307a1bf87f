import math

import numpy as np
import pytest
import torch
from oracles_lime import textured, view_of

from consilience import registry
from consilience.types import ConsilienceError

CONTROLS = ("random", "centre", "edges", "constant")
SHAPE = (20, 14)
VIEW = view_of(textured(shape=SHAPE))


def values(spec, view=VIEW):
    return registry.explainers.build(spec).explain(None, view, None).values


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_ask_neither_model_nor_target(name):
    found = registry.explainers.build(name).explain(None, VIEW, None)
    assert registry.explainers.get(name).needs == frozenset()
    assert found.facts["passes"] == 0
    assert found.values.dtype == torch.float32
    assert "cannot beat it" in " ".join(registry.explainers.get(name).__doc__.split())


def test_random_is_the_images_own_noise():
    first, again, other = (
        values("random"),
        values("random"),
        values("random", view_of(textured(seed=9, shape=SHAPE))),
    )
    assert first.shape == (7, 7)
    assert first.numpy().tobytes() == again.numpy().tobytes()
    assert abs(np.corrcoef(first.numpy().ravel(), other.numpy().ravel())[0, 1]) < 0.6
    assert not torch.equal(first, values("random:seed=1"))


def test_random_is_blind_to_a_devices_rounding():
    for off in (-1e-6, 1e-6):
        view = view_of(textured(shape=SHAPE))
        view.pixels.mul_(1 + off)
        assert torch.equal(values("random", view), values("random"))


def test_random_is_standard_normal():
    noise = values("random:grid=200").double().numpy().ravel()
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=4 * math.sqrt(2 / noise.size))
    assert np.mean(np.abs(noise) < 1) == pytest.approx(0.6827, abs=0.01)


def test_centre_is_a_gaussian_in_shares_of_the_frame():
    blob = values("centre:sigma=.2").double().numpy()
    for y in range(SHAPE[0]):
        for x in range(SHAPE[1]):
            down, across = (y + 0.5) / SHAPE[0] - 0.5, (x + 0.5) / SHAPE[1] - 0.5
            assert blob[y, x] == pytest.approx(
                math.exp(-(down**2 + across**2) / (2 * 0.2**2)), rel=1e-5
            )
    np.testing.assert_allclose(blob, blob[::-1, ::-1], rtol=1e-6)


def test_edges_are_sobels_of_luminance():
    image = VIEW.pixels[0].double().numpy()
    grey = 0.2125 * image[0] + 0.7154 * image[1] + 0.0721 * image[2]
    edges = values("edges").double().numpy()
    assert edges.shape == SHAPE
    for y in range(1, SHAPE[0] - 1):
        for x in range(1, SHAPE[1] - 1):
            near = grey[y - 1 : y + 2, x - 1 : x + 2]
            across = (near[:, 2] - near[:, 0]) @ [1, 2, 1] / 4
            down = (near[2] - near[0]) @ [1, 2, 1] / 4
            assert edges[y, x] == pytest.approx(
                math.sqrt((across**2 + down**2) / 2), abs=1e-6
            )


def test_edges_of_a_flat_image_are_none():
    assert (
        values("edges", view_of(np.full((9, 9, 3), 90, dtype=np.uint8))).abs().max()
        < 1e-6
    )


def test_constant_is_one_everywhere():
    assert torch.equal(values("constant"), torch.ones(SHAPE))


@pytest.mark.parametrize(
    "spec", ["random:seed=-1", "random:grid=0", "centre:sigma=0", "centre:sigma=nan"]
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        registry.explainers.build(spec)
