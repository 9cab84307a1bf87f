import numpy as np
import pytest
import torch
from oracles_lime import (
    Eavesdropper,
    blended,
    composed,
    enlarged,
    random_model,
    target,
    textured,
    view_of,
)
from scipy import ndimage

from consilience import progress, registry
from consilience.perturb.fills import MeanFill, PercentileFill
from consilience.perturb.probe import Bits, Edits, Grids, probe, probe_many
from consilience.perturb.superpixels import Grid
from consilience.types import ConsilienceError

SHAPE = (12, 10)
VIEW = view_of(textured(shape=SHAPE))
IMAGE = VIEW.pixels[0].double().numpy()
SEGMENTS = Grid(3).labels(np.zeros((*SHAPE, 3)))
FILL = torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
PLANES = np.random.default_rng(3).normal(size=(2, 3, *SHAPE))


def some_bits(n=13):
    return Bits(SEGMENTS, np.random.default_rng(0).random((n, 9)) < 0.5)


def some_grids(n=11, size=(4, 5), **options):
    return Grids(
        torch.rand(n, *size, generator=torch.Generator().manual_seed(2)), **options
    )


def test_bits_show_the_model_what_the_loop_makes():
    model, bits = Eavesdropper(PLANES, batch=5), some_bits()
    scores = probe(model, VIEW, bits, target("logit"), FILL)
    seen = torch.cat(model.seen).double().numpy()
    for number, row in enumerate(bits.on):
        expected = composed(IMAGE, FILL[0].double().numpy(), SEGMENTS, row)
        np.testing.assert_array_equal(seen[number], expected)
        assert scores[number] == pytest.approx((expected * PLANES[0]).sum(), rel=1e-5)
    assert model.sizes == [5, 5, 3]
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("align_corners", [False, True])
def test_grids_show_the_model_what_the_loop_makes(align_corners):
    model, grids = (
        Eavesdropper(PLANES, batch=4),
        some_grids(align_corners=align_corners),
    )
    scores = probe(model, VIEW, grids, target("logit"), FILL)
    seen = torch.cat(model.seen).double().numpy()
    for number, grid in enumerate(grids.keep.double().numpy()):
        expected = blended(
            IMAGE, FILL[0].double().numpy(), enlarged(grid, SHAPE, align_corners)
        )
        np.testing.assert_allclose(seen[number], expected, atol=1e-6)
        assert scores[number] == pytest.approx((expected * PLANES[0]).sum(), abs=1e-4)


def test_grids_of_the_frame_are_taken_as_they_are():
    model, grids = Eavesdropper(PLANES), some_grids(3, SHAPE)
    probe(model, VIEW, grids, target("logit"), FILL)
    for seen, keep in zip(
        model.seen[0].double().numpy(), grids.keep.double().numpy(), strict=True
    ):
        np.testing.assert_allclose(
            seen, blended(IMAGE, FILL[0].double().numpy(), keep), atol=1e-7
        )


def test_everything_kept_is_the_image_and_nothing_kept_is_the_fill():
    for keeps in (
        Bits(SEGMENTS, np.array([[True] * 9, [False] * 9])),
        Grids(torch.tensor([[[1.0]], [[0.0]]]).expand(2, *SHAPE)),
    ):
        model = Eavesdropper(PLANES)
        probe(model, VIEW, keeps, target("logit"), FILL)
        torch.testing.assert_close(
            model.seen[0], torch.cat([VIEW.pixels, FILL]), rtol=0, atol=0
        )


@pytest.mark.parametrize("keeps", [some_bits(), some_grids()], ids=["bits", "grids"])
def test_chunks_change_nothing(keeps):
    whole = probe(random_model(SHAPE, batch=100), VIEW, keeps, target(), FILL)
    for batch in (1, 3, 7):
        assert (
            probe(random_model(SHAPE, batch=batch), VIEW, keeps, target(), FILL)
            .numpy()
            .tobytes()
            == whole.numpy().tobytes()
        )


def test_the_target_reads_the_outputs():
    model = random_model(SHAPE, scale=0.3)
    logits = [
        probe(model, VIEW, some_bits(), target("logit", index), FILL).double()
        for index in (0, 1)
    ]
    share = probe(model, VIEW, some_bits(), target("probability", 1), FILL).double()
    torch.testing.assert_close(
        share, 1 / (1 + torch.exp(logits[0] - logits[1])), rtol=1e-5, atol=1e-7
    )


def test_permuted_labels_permute_the_bits():
    order = np.random.default_rng(5).permutation(9)
    bits = some_bits()
    moved = Bits(order[SEGMENTS], np.ascontiguousarray(bits.on[:, np.argsort(order)]))
    model = random_model(SHAPE)
    first, second = (probe(model, VIEW, one, target(), FILL) for one in (bits, moved))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Listener:
    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def start(self, label, total):
        self.events.append((label, total))
        return 1

    def advance(self, task, steps):
        self.events.append(steps)
        if self.stop_after is not None and len(self.events) > self.stop_after:
            raise progress.Cancelled

    def finish(self, task):
        self.events.append("end")

    def say(self, message):
        pass


def test_progress_is_reported_and_can_stop_it():
    listener, model = Listener(), random_model(SHAPE, batch=5)
    with progress.listening(listener):
        probe(model, VIEW, some_bits(), target(), FILL, label="some work")
    assert listener.events == [("some work", 13), 5, 5, 3, "end"]
    stopper, model = Listener(stop_after=1), random_model(SHAPE, batch=5)
    with progress.listening(stopper), pytest.raises(progress.Cancelled):
        probe(model, VIEW, some_bits(), target(), FILL)
    assert model.sizes == [5]
    assert stopper.events[-1] == "end"


def test_nothing_to_probe():
    assert probe(
        random_model(SHAPE),
        VIEW,
        Bits(SEGMENTS, np.empty((0, 9), dtype=bool)),
        target(),
        FILL,
    ).shape == (0,)


def test_scores_that_are_not_finite_are_an_error():
    model = random_model(
        SHAPE, bend=lambda values: torch.full_like(values, torch.nan)
    )
    with pytest.raises(ConsilienceError, match="no finite logit for 13 of 13"):
        probe(model, VIEW, some_bits(), target("logit"), FILL)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConsilienceError, match="labels run from 0 to 8"):
        Bits(SEGMENTS, np.ones((2, 8), dtype=bool))
    with pytest.raises(ConsilienceError, match="bool"):
        Bits(SEGMENTS, np.ones((2, 9)))
    with pytest.raises(ConsilienceError, match="floats"):
        Grids(torch.ones(2, 3, 3, dtype=torch.int64))
    with pytest.raises(ConsilienceError, match="the fill is"):
        probe(random_model(SHAPE), VIEW, some_bits(), target(), FILL[:, :, :5])
    with pytest.raises(ConsilienceError, match="the labels are"):
        probe(
            random_model(SHAPE),
            VIEW,
            Bits(SEGMENTS[:5], np.ones((2, 9), dtype=bool)),
            target(),
            FILL,
        )


# ---- fills


@pytest.mark.parametrize("name", registry.fills.names())
def test_fills_are_images(name):
    fill = registry.fills.build(name)
    image = fill.image(VIEW, SEGMENTS)
    assert (image.shape, image.dtype) == (VIEW.pixels.shape, torch.float32)
    assert image.min() >= 0
    assert image.max() <= 1
    assert registry.fills.build(registry.spell(fill, full=True)) == fill


def test_mean_is_each_superpixels_own():
    labels = np.random.default_rng(4).integers(0, 6, SHAPE)
    fill = MeanFill().image(VIEW, labels)[0].double().numpy()
    for number in range(6):
        for channel in range(3):
            inside = [
                IMAGE[channel, y, x]
                for y, x in zip(*np.where(labels == number), strict=True)
            ]
            np.testing.assert_allclose(
                fill[channel][labels == number], sum(inside) / len(inside), atol=1e-7
            )


def test_mean_of_one_superpixel_is_the_image_mean():
    fill = MeanFill().image(VIEW, np.zeros(SHAPE, dtype=np.int64))[0]
    np.testing.assert_allclose(fill[:, 0, 0], IMAGE.mean(axis=(1, 2)), atol=1e-7)


def test_mean_needs_superpixels():
    with pytest.raises(ConsilienceError, match=r"needs superpixels.*black, blur"):
        MeanFill().image(VIEW, None)


def test_percentile_is_interpolated_between_ranks():
    fill = PercentileFill(20).image(VIEW, None)[0].double().numpy()
    for channel in range(3):
        ranked = sorted(IMAGE[channel].ravel())
        place = 0.2 * (len(ranked) - 1)
        low = int(place)
        expected = ranked[low] + (place - low) * (ranked[low + 1] - ranked[low])
        np.testing.assert_allclose(fill[channel], expected, atol=1e-7)
        assert expected > 0.05  # not cut to a whole number, which would be black


def test_blur_is_a_gaussian_mirrored_at_the_borders():
    fill = registry.fills.build("blur:2").image(VIEW, None)[0].double().numpy()
    offsets = np.arange(-8, 9)
    profile = np.exp(-(offsets**2) / 8.0)
    kernel = np.outer(profile, profile) / profile.sum() ** 2
    for channel in range(3):
        expected = ndimage.convolve(IMAGE[channel], kernel, mode="reflect")
        np.testing.assert_allclose(fill[channel], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "rgb"),
    [
        ("black", (0, 0, 0)),
        ("white", (1, 1, 1)),
        ("grey", (0.5, 0.5, 0.5)),
        ("colour:.25+.5+1", (0.25, 0.5, 1)),
    ],
)
def test_plain_fills(spec, rgb):
    image = registry.fills.build(spec).image(VIEW, None)[0]
    for channel in range(3):
        assert (image[channel] == rgb[channel]).all()


@pytest.mark.parametrize(
    "spec",
    [
        "colour:0+0+2",
        "percentile:101",
        "percentile:nan",
        "blur:0",
        "noise:-1",
        "rise-blur:4",
        "rise-blur:sigma=0",
    ],
)
def test_fills_out_of_range_are_refused(spec):
    with pytest.raises(ConsilienceError, match="got"):
        registry.fills.build(spec)


# ---- several images


def some_edits():
    other = view_of(textured(seed=5, shape=SHAPE))
    return [
        Edits(VIEW, some_bits(13), target("logit", 0), FILL),
        Edits(other, some_grids(4), target("logit", 1), 1 - FILL),
        Edits(other, Bits(SEGMENTS, np.empty((0, 9), dtype=bool)), target(), FILL),
        Edits(VIEW, some_grids(5), target("probability", 1), FILL),
    ]


@pytest.mark.parametrize("batch", [1, 5, 8, 100])
def test_several_images_are_many_of_one_in_full_chunks(batch):
    model, edits = Eavesdropper(PLANES, batch=batch), some_edits()
    together = probe_many(model, edits)
    assert model.sizes == [batch] * (22 // batch) + [22 % batch] * (22 % batch > 0)
    alone = Eavesdropper(PLANES, batch=7)
    for scores, one in zip(together, edits, strict=True):
        torch.testing.assert_close(
            scores,
            probe(alone, one.view, one.keeps, one.target, one.fill),
            rtol=0,
            atol=0,
        )
    assert torch.equal(torch.cat(model.seen), torch.cat(alone.seen))
    assert probe_many(model, []) == []


def test_images_of_another_size_start_a_new_chunk():
    class AnySize:
        outputs, batch, sizes = "logits", 8, []

        def scores(self, pixels):
            self.sizes.append(tuple(pixels.shape))
            return pixels.mean(dim=(1, 2, 3)).unsqueeze(1)

    small = view_of(textured(seed=5, shape=(6, 7)))
    fill = torch.zeros(1, 3, 6, 7)
    edits = [
        Edits(VIEW, some_grids(5), target("logit"), FILL),
        Edits(small, Grids(torch.ones(4, 2, 2)), target("logit"), fill),
        Edits(VIEW, some_grids(9), target("logit"), FILL),
    ]
    model = AnySize()
    found = probe_many(model, edits)
    assert model.sizes == [
        (5, 3, *SHAPE),
        (4, 3, 6, 7),
        (8, 3, *SHAPE),
        (1, 3, *SHAPE),
    ]
    torch.testing.assert_close(found[1], small.pixels.mean().expand(4))


def test_inverted_is_the_negative():
    fill = registry.fills.build("inverted").image(VIEW, None)
    torch.testing.assert_close(
        fill + VIEW.pixels, torch.ones_like(fill), rtol=0, atol=1e-7
    )


def test_noise_is_uniform_and_the_same_for_every_image_of_a_size():
    wide = view_of(textured(shape=(90, 80)))
    values = registry.fills.build("noise").image(wide, None)[0].double().numpy()
    assert [
        float(np.mean(values < share)) for share in (0.25, 0.5, 0.75)
    ] == pytest.approx([0.25, 0.5, 0.75], abs=0.015)
    assert np.abs(np.corrcoef(values.reshape(3, -1)) - np.eye(3)).max() < 0.05
    other = view_of(textured(seed=9, shape=(90, 80)))
    assert torch.equal(
        registry.fills.build("noise").image(wide, None),
        registry.fills.build("noise").image(other, None),
    )
    assert not torch.equal(
        registry.fills.build("noise:1").image(wide, None),
        registry.fills.build("noise").image(wide, None),
    )
