import math

import numpy as np
import pytest
import torch
from lime.wrappers.scikit_image import SegmentationAlgorithm
from oracles_lime import textured
from skimage import color, data, segmentation, transform

from consilience import registry
from consilience.perturb import quickshift as quickshift_module
from consilience.perturb.quickshift import Quickshift
from consilience.perturb.superpixels import Grid, relabelled, segment
from consilience.types import ConsilienceError

NAMES = registry.segmenters.names()
IMAGE = textured() / 255.0


def images():
    rng = np.random.default_rng(0)
    small = {
        name: transform.resize(getattr(data, name)(), (150, 141), anti_aliasing=True)
        for name in ("chelsea", "astronaut")
    }
    return {
        **small,
        "coffee": np.rint(data.coffee()[100:220, 200:330] / 255.0 * 64)
        / 64,  # few colours: many equal distances
        "noise": rng.random((60, 71, 3)),
        "blocks": np.kron(rng.integers(0, 3, (9, 7, 3)) / 2, np.ones((11, 11, 1))),
        "flat": np.full((80, 64, 3), 0.3),
        "thin": rng.random((2, 90, 3)),
        "pixel": rng.random((1, 1, 3)),
    }


IMAGES_OF_QUICKSHIFT = images()


def gapless(labels):
    return np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


def test_what_there_is():
    assert {"quickshift", "slic", "felzenszwalb", "grid"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_labels_count_from_zero_without_gaps(name):
    labels = segment(registry.segmenters.build(name), IMAGE)
    assert (labels.shape, labels.dtype) == (IMAGE.shape[:2], np.dtype(np.int64))
    assert gapless(labels)
    assert labels.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_spelling_round_trips(name):
    segmenter = registry.segmenters.build(name)
    assert (
        registry.segmenters.build(registry.spell(segmenter, full=True)) == segmenter
    )
    assert registry.spell(segmenter) == name


@pytest.mark.parametrize("name", NAMES)
def test_numpys_global_seed_changes_nothing(name):
    segmenter = registry.segmenters.build(name)
    np.random.seed(1)  # noqa: NPY002 - the legacy state is what must not matter
    first = segmenter.labels(IMAGE)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(segmenter.labels(IMAGE), first)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grid"])
def test_flat_image_is_legal(name):
    labels = segment(registry.segmenters.build(name), np.full((40, 40, 3), 0.5))
    assert labels.shape == (40, 40)
    assert gapless(labels)


def test_flat_image_may_be_one_superpixel():
    assert (
        segment(
            registry.segmenters.build("felzenszwalb"), np.full((40, 40, 3), 0.5)
        ).max()
        == 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5, "max_dist": 150, "ratio": 0.3},
        {"kernel_size": 2, "max_dist": 6},
    ],
)
@pytest.mark.parametrize("base_image", ["textured", "chelsea"])
def test_quickshift_is_limes(base_image, options):
    image = (
        textured(shape=(150, 130)) / 255.0
        if base_image == "textured"
        else transform.resize(data.chelsea(), (144, 150), anti_aliasing=True)
    )
    peer = SegmentationAlgorithm(
        "quickshift",
        **{
            "kernel_size": 4,
            "max_dist": 200,
            "ratio": 0.2,
            "random_seed": 7,
            **options,
        },
    )
    labels = Quickshift(**options).labels(image)
    np.testing.assert_array_equal(labels, peer(image))
    assert labels.max() > 5


QUICKSHIFTS = (
    {},
    {"kernel_size": 5, "max_dist": 150, "ratio": 0.3},
    {"kernel_size": 1, "max_dist": 3, "ratio": 1.0, "seed": 7},
    {"kernel_size": 2.5, "max_dist": 6, "ratio": 0.5, "seed": 0},
    {"kernel_size": 3, "max_dist": 20, "ratio": 0.0},
)


@pytest.mark.parametrize("options", QUICKSHIFTS, ids=str)
@pytest.mark.parametrize("name", IMAGES_OF_QUICKSHIFT)
def test_quickshift_has_the_very_labels_of_scikit_image(name, options, monkeypatch):
    image, ours = IMAGES_OF_QUICKSHIFT[name], Quickshift(**options)
    peer = {
        "kernel_size": ours.kernel_size,
        "max_dist": ours.max_dist,
        "ratio": ours.ratio,
        "rng": ours.seed,
    }
    expected = segmentation.quickshift(image, **peer)
    monkeypatch.setattr(
        "consilience.perturb.quickshift.CLOSE", -1.0
    )  # so that scikit-image is not asked, however close a comparison is
    np.testing.assert_array_equal(ours.labels(image), expected)


def test_quickshift_asks_scikit_image_where_a_comparison_is_too_close(monkeypatch):
    asked = []
    monkeypatch.setattr("consilience.perturb.quickshift.CLOSE", np.inf)
    monkeypatch.setattr(
        Quickshift,
        "_asked",
        lambda self, image: (
            asked.append(image) or np.zeros(image.shape[:2], dtype=int)
        ),
    )
    assert Quickshift().labels(IMAGE).max() == 0
    assert asked[0] is IMAGE
    monkeypatch.undo()
    np.testing.assert_array_equal(
        Quickshift()._asked(IMAGE),
        segmentation.quickshift(IMAGE, kernel_size=4, max_dist=200, ratio=0.2),
    )


@pytest.mark.parametrize("pairs", [50, 1 << 21])
@pytest.mark.parametrize("how", ["all", "settled"])
def test_quickshifts_densities_are_the_sums_of_the_window(how, pairs, monkeypatch):
    monkeypatch.setattr(quickshift_module, "PAIRS", pairs)
    monkeypatch.setattr(quickshift_module, "STRIP", pairs)
    image = IMAGE[:9, :8]
    field = quickshift_module._Field.of(image, 3)
    if how == "all":
        found = field.inner(quickshift_module._sums(field, 1.0, torch.float64))
    else:
        monkeypatch.setattr(quickshift_module, "MANY", 2.0)
        made = quickshift_module._Densities.of(field, 1.0, np.zeros((9, 8)))
        apart = np.abs(made.values[field.pixels()])
        made._settle(field.pixels())
        apart = np.abs(made.values[field.pixels()] - apart)
        assert 0 < apart.max() < 1e-4  # float32 before
        assert made.exact.all()
        found = field.inner(made.values)
    for y in range(9):
        for x in range(8):
            total = 0.0
            for v in range(max(y - 3, 0), min(y + 4, 9)):
                for u in range(max(x - 3, 0), min(x + 4, 8)):
                    distance = (
                        ((image[y, x] - image[v, u]) ** 2).sum()
                        + (y - v) ** 2
                        + (x - u) ** 2
                    )
                    total += np.exp(-distance / 2)
            assert found[y, x] == pytest.approx(
                total, abs=quickshift_module.CLOSE / 10
            )


@pytest.mark.parametrize("kernel_size", [1.0, 3.0, 4.0, 8.0])
@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_densities_in_float32_are_further_from_doubt_than_from_the_sum(
    kernel_size, ratio
):
    """Two errors of half of it would have to add up before an order is wrong."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(60, 50, 3)), axis=0) % 1
    for image in (rng.random((60, 50, 3)), smooth, np.full((60, 50, 3), 0.4), IMAGE):
        field = quickshift_module._Field.of(
            color.rgb2lab(image) * ratio, math.ceil(3 * kernel_size)
        )
        exact, low = (
            field.inner(quickshift_module._sums(field, kernel_size, dtype))
            for dtype in (torch.float64, torch.float32)
        )
        assert (np.abs(low - exact) / exact).max() < quickshift_module.DOUBT / 2


@pytest.mark.parametrize("many", [0.0, 0.1, 2.0])
def test_flat_images_have_the_labels_of_scikit_image(many, monkeypatch):
    """Where everything is in doubt, whether sums are taken anew for all or one by one."""
    monkeypatch.setattr(quickshift_module, "MANY", many)
    image = np.full((40, 30, 3), 0.4)
    image[:, 20:] = 0.41
    np.testing.assert_array_equal(
        Quickshift().labels(image),
        relabelled(
            segmentation.quickshift(image, kernel_size=4, max_dist=200, ratio=0.2)
        ),
    )


@pytest.mark.parametrize("peaks", [0.05, 1.0])
@pytest.mark.parametrize(
    "levels", [(0.0, 1.0, 2.0), (0.0, 0.1, 0.3, 0.7), (0.0, 1.0, 3.0, 5.0)]
)
def test_quickshifts_links_are_those_of_the_loop(levels, peaks):
    """Ties and all: of equally near pixels the first by rows, with distances summed as
    scikit-image sums them.
    """
    rng = np.random.default_rng(0)
    image, reach = rng.choice(levels, (14, 11, 3)), 4
    density = np.where(
        rng.random((14, 11)) < peaks, rng.random((14, 11)), 0.0
    )  # few peaks: long links
    field = quickshift_module._Field.of(image, reach)
    padded = field.padded(density, -np.inf)
    known = quickshift_module._Densities(
        field, 1.0, padded, padded, np.ones(len(padded), dtype=bool)
    )
    links, distance, gap = quickshift_module._links(field, known)
    links, distance, closest = field.inner(links), field.inner(distance), np.inf
    for y in range(14):
        for x in range(11):
            best, way = np.inf, 0
            for v in range(max(y - reach, 0), min(y + reach + 1, 14)):
                for u in range(max(x - reach, 0), min(x + reach + 1, 11)):
                    if density[v, u] <= density[y, x]:
                        continue
                    length = 0.0
                    for channel in range(3):
                        step = image[y, x, channel] - image[v, u, channel]
                        length += step * step
                    length += (y - v) * (y - v)
                    length += (x - u) * (x - u)
                    closest = min(closest, density[v, u] - density[y, x])
                    if length < best:
                        best, way = length, (v - y) * field.stride + (u - x)
            assert (links[y, x], distance[y, x]) == (way, best)
    assert gap >= closest if peaks == 1 else gap == 0


def test_slic_and_felzenszwalb_are_limes_up_to_names():
    peers = {
        "slic": SegmentationAlgorithm(
            "slic", n_segments=30, compactness=5, sigma=1, start_label=1
        ),
        "felzenszwalb": SegmentationAlgorithm(
            "felzenszwalb", scale=50, sigma=0.8, min_size=20
        ),
    }
    ours = {
        "slic": registry.segmenters.build("slic:30,compactness=5,sigma=1"),
        "felzenszwalb": registry.segmenters.build(
            "felzenszwalb:50,sigma=.8,min_size=20"
        ),
    }
    for name, peer in peers.items():
        labels, theirs = ours[name].labels(IMAGE), peer(IMAGE)
        assert (
            len(set(zip(labels.ravel(), theirs.ravel(), strict=True)))
            == labels.max() + 1
            == len(np.unique(theirs))
        )


def test_quickshift_seed_breaks_ties_its_own_way():
    flat = np.full((30, 30, 3), 0.25)
    first, again, other = (
        Quickshift(kernel_size=1, max_dist=3, seed=seed).labels(flat)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(
        first,
        segmentation.quickshift(flat, ratio=0.2, kernel_size=1, max_dist=3, rng=1),
    )


@pytest.mark.parametrize(
    ("shape", "n"), [((8, 8), 8), ((64, 48), 5), ((7, 5), 3), ((3, 4), 8)]
)
def test_grid_cells(shape, n):
    labels = Grid(n).labels(np.zeros((*shape, 3)))
    rows = sorted({y * n // shape[0] for y in range(shape[0])})
    columns = sorted({x * n // shape[1] for x in range(shape[1])})
    for y in range(shape[0]):
        for x in range(shape[1]):
            expected = rows.index(y * n // shape[0]) * len(columns) + columns.index(
                x * n // shape[1]
            )
            assert labels[y, x] == expected


def test_grid_cells_are_of_equal_size_where_they_can_be():
    assert (
        np.bincount(Grid(8).labels(np.zeros((224, 224, 3))).ravel()) == 28 * 28
    ).all()


def test_relabelled_keeps_order_and_parts():
    labels = np.array([[-3, 5, 5], [40, -3, 7]])
    np.testing.assert_array_equal(relabelled(labels), [[0, 1, 1], [3, 0, 2]])


def test_a_segmenter_from_elsewhere_is_relabelled_and_checked():
    class Odd:
        def labels(self, image):
            return np.where(image[:, :, 0] > 0.5, 12, 4)

    class Small:
        def labels(self, image):
            return np.zeros((3, 3), dtype=int)

    np.testing.assert_array_equal(
        segment(Odd(), IMAGE), (IMAGE[:, :, 0] > 0.5).astype(int)
    )
    with pytest.raises(ConsilienceError, match="Small labels"):
        segment(Small(), IMAGE)


@pytest.mark.parametrize(
    "spec",
    [
        "grid:0",
        "quickshift:0",
        "quickshift:.5",
        "quickshift:ratio=2",
        "quickshift:max_dist=nan",
        "quickshift:seed=-1",
        "slic:0",
        "slic:sigma=-1",
        "felzenszwalb:scale=-1",
    ],
)
def test_options_out_of_range_are_refused(spec):
    name = spec.partition(":")[0]
    with pytest.raises(ConsilienceError, match=f"{name}: .*; got"):
        registry.segmenters.build(spec)
