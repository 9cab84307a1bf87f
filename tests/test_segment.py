import numpy as np
import pytest
from lime.wrappers.scikit_image import SegmentationAlgorithm
from oracles_lime import textured
from skimage import data, segmentation, transform

from consilience import registry
from consilience.segment import Grid, Quickshift, relabelled, segment
from consilience.types import ConsilienceError

NAMES = registry.segmenters.names()
PICTURE = textured() / 255.0


def gapless(labels):
    return np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


def test_what_there_is():
    assert {"quickshift", "slic", "felzenszwalb", "grid"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_labels_count_from_zero_without_gaps(name):
    labels = segment(registry.segmenters.build(name), PICTURE)
    assert (labels.shape, labels.dtype) == (PICTURE.shape[:2], np.dtype(np.int64))
    assert gapless(labels)
    assert labels.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_spelling_round_trips(name):
    segmenter = registry.segmenters.build(name)
    assert registry.segmenters.build(registry.spell(segmenter, full=True)) == segmenter
    assert registry.spell(segmenter) == name


@pytest.mark.parametrize("name", NAMES)
def test_numpys_global_seed_changes_nothing(name):
    segmenter = registry.segmenters.build(name)
    np.random.seed(1)  # noqa: NPY002 - the legacy state is what must not matter
    first = segmenter.labels(PICTURE)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(segmenter.labels(PICTURE), first)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grid"])
def test_flat_picture_is_legal(name):
    labels = segment(registry.segmenters.build(name), np.full((40, 40, 3), 0.5))
    assert labels.shape == (40, 40)
    assert gapless(labels)


def test_flat_picture_may_be_one_superpixel():
    assert segment(registry.segmenters.build("felzenszwalb"), np.full((40, 40, 3), 0.5)).max() == 0


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "max_dist": 150, "ratio": 0.3}, {"kernel_size": 2, "max_dist": 6}])
@pytest.mark.parametrize("picture", ["textured", "chelsea"])
def test_quickshift_is_limes(picture, options):
    image = (
        textured(shape=(150, 130)) / 255.0
        if picture == "textured"
        else transform.resize(data.chelsea(), (144, 150), anti_aliasing=True)
    )
    peer = SegmentationAlgorithm("quickshift", **{"kernel_size": 4, "max_dist": 200, "ratio": 0.2, "random_seed": 7, **options})
    labels = Quickshift(**options).labels(image)
    np.testing.assert_array_equal(labels, peer(image))
    assert labels.max() > 5


def test_slic_and_felzenszwalb_are_limes_up_to_names():
    peers = {
        "slic": SegmentationAlgorithm("slic", n_segments=30, compactness=5, sigma=1, start_label=1),
        "felzenszwalb": SegmentationAlgorithm("felzenszwalb", scale=50, sigma=0.8, min_size=20),
    }
    ours = {
        "slic": registry.segmenters.build("slic:30,compactness=5,sigma=1"),
        "felzenszwalb": registry.segmenters.build("felzenszwalb:50,sigma=.8,min_size=20"),
    }
    for name, peer in peers.items():
        labels, theirs = ours[name].labels(PICTURE), peer(PICTURE)
        assert len(set(zip(labels.ravel(), theirs.ravel(), strict=True))) == labels.max() + 1 == len(np.unique(theirs))


def test_quickshift_seed_breaks_ties_its_own_way():
    flat = np.full((30, 30, 3), 0.25)
    first, again, other = (Quickshift(kernel_size=1, max_dist=3, seed=seed).labels(flat) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(first, segmentation.quickshift(flat, ratio=0.2, kernel_size=1, max_dist=3, rng=1))


@pytest.mark.parametrize(("shape", "n"), [((8, 8), 8), ((64, 48), 5), ((7, 5), 3), ((3, 4), 8)])
def test_grid_cells(shape, n):
    labels = Grid(n).labels(np.zeros((*shape, 3)))
    rows = sorted({y * n // shape[0] for y in range(shape[0])})
    columns = sorted({x * n // shape[1] for x in range(shape[1])})
    for y in range(shape[0]):
        for x in range(shape[1]):
            expected = rows.index(y * n // shape[0]) * len(columns) + columns.index(x * n // shape[1])
            assert labels[y, x] == expected


def test_grid_cells_are_of_equal_size_where_they_can_be():
    assert (np.bincount(Grid(8).labels(np.zeros((224, 224, 3))).ravel()) == 28 * 28).all()


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

    np.testing.assert_array_equal(segment(Odd(), PICTURE), (PICTURE[:, :, 0] > 0.5).astype(int))
    with pytest.raises(ConsilienceError, match="Small labels"):
        segment(Small(), PICTURE)


@pytest.mark.parametrize(
    "spec",
    [
        "grid:0",
        "quickshift:0",
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
