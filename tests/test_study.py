"""The study's errors are reproduced as errors, and its protocols are what is written of
them.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from consilience import images, registry, study
from consilience.images import Placement
from consilience.study import (
    RunColumn,
    columns_for,
    load_preset,
    preset_names,
    published_iou,
    resolve_column,
    with_published,
    with_seed,
)
from consilience.types import ClassTarget, ConsilienceError, Explanation, Sample, View


def explanation(values=None, pixels=None, size=(56, 56), by="gradcam"):
    rng = np.random.default_rng(0)
    pixels = (
        rng.integers(0, 200, (90, 120, 3), dtype=np.uint8)
        if pixels is None
        else pixels
    )
    values = rng.normal(size=size).astype(np.float32) if values is None else values
    geometry = Placement.squash(pixels.shape[:2], values.shape)
    return Explanation(
        Sample("a", pixels), "m", by, ClassTarget(0, "x"), geometry, values
    )


# ---- the mask cut from a rendered figure


def test_luminance_mask_is_the_percentile_of_the_figures_luminance():
    """Against PIL's own formula, L = (299 R + 587 G + 114 B) / 1000, on the figure
    squeezed to the frame.
    """
    one = explanation()
    small = images.resize(study.figure(one), (56, 56)).astype(float)
    grey = np.rint(small @ (0.299, 0.587, 0.114))
    mask = registry.cutters.build("luminance:60").cut(one)
    ordered = np.sort(grey.ravel())
    cut = ordered[int(np.ceil(0.6 * (grey.size - 1)))]
    assert (
        np.mean(mask.on != (grey >= cut)) < 0.005
    )  # PIL rounds a little differently where a value is near half
    assert mask.rule == "luminance:percentile=60"


@pytest.mark.parametrize("seed", range(3))
def test_luminance_mask_is_the_page_and_the_same_whatever_the_map(seed):
    """What makes it an error: another map, another image, the same mask; ties at white
    make it larger than a fifth.
    """
    rng = np.random.default_rng(seed)
    first = explanation(size=(224, 224))
    other = explanation(
        rng.normal(size=(224, 224)).astype(np.float32),
        rng.integers(0, 200, (80, 80, 3), dtype=np.uint8),
    )
    masks = [registry.cutters.build("luminance").cut(one) for one in (first, other)]
    assert (masks[0].on == masks[1].on).mean() > 0.995
    for mask in masks:
        assert 0.22 <= mask.share <= 0.32
        assert mask.tied == mask.area
        assert "luminance 255 of a saved figure" in mask.note
        assert mask.on[:8].all()
        assert mask.on[-8:].all()
        assert not mask.on[100:130, 20:50].any()


def test_luminance_masks_of_the_ten_images_have_the_areas_that_were_found(shared):
    for file in sorted((shared / "imagenet10").iterdir()):
        pixels, _ = images.read_pixels(file)
        mask = registry.cutters.build("luminance").cut(
            explanation(pixels=pixels, size=(224, 224))
        )
        assert 0.22 <= mask.share <= 0.32


def test_the_figure_shows_image_map_and_overlay():
    """A red image under a map whose jet is blue on the left and red on the right."""
    red = np.zeros((60, 60, 3), dtype=np.uint8)
    red[..., 0] = 255
    ramp = np.tile(np.linspace(0, 1, 56, dtype=np.float32), (56, 1))
    page = study.figure(explanation(ramp, red)).astype(float)
    height, width = page.shape[:2]
    row = page[height // 2]
    ink = np.flatnonzero((row < 250).any(axis=1))
    assert (row[width // 6] == (255, 0, 0)).all()
    middle = ink[(ink > width / 3) & (ink < 2 * width / 3)]
    assert row[middle[8], 2] > 120
    assert row[middle[8], 0] < 30
    assert row[middle[-8], 0] > 120
    overlay = row[ink[ink > 2 * width / 3][8]]
    np.testing.assert_allclose(
        overlay, 0.5 * row[middle[8]] + 0.5 * np.array([255, 0, 0]), atol=12
    )


def test_luminance_checks_its_range():
    with pytest.raises(
        ConsilienceError,
        match=r"luminance: percentile must be at least 0 and at most 100; got 101",
    ):
        registry.cutters.build("luminance:101")


# ---- the fill truncated to black


def view_of(pixels):
    placement = Placement.squash(pixels.shape[:2], pixels.shape[:2])
    return View(images.to_tensor(pixels), placement, "squash")


def test_truncated_fill_is_black_where_the_percentile_is_not():
    pixels = np.random.default_rng(1).integers(30, 256, (20, 20, 3), dtype=np.uint8)
    made = registry.fills.build("truncated:20").image(view_of(pixels), None)
    right = registry.fills.build("percentile:20").image(view_of(pixels), None)
    assert made.shape == (1, 3, 20, 20)
    assert made.dtype == torch.float32
    assert (made == 0).all()
    wanted = np.sort(pixels.reshape(-1, 3) / 255, axis=0)[int(0.2 * 399)]
    np.testing.assert_allclose(right[0, :, 0, 0].numpy(), wanted, atol=0.01)


def test_truncated_fill_is_one_where_a_channel_is_saturated():
    pixels = np.zeros((10, 10, 3), dtype=np.uint8)
    pixels[..., 1] = 255
    made = registry.fills.build("truncated").image(view_of(pixels), None)
    assert made[0, :, 3, 3].tolist() == [0, 1, 0]


def test_truncated_checks_its_range():
    with pytest.raises(
        ConsilienceError,
        match=r"truncated: percentile must be at least 0 and at most 100; got -1",
    ):
        registry.fills.build("truncated:-1")


# ---- the published table


def test_the_published_numbers_have_the_published_mean():
    assert len(study.PUBLISHED_IOU) == 10
    assert np.mean(list(study.PUBLISHED_IOU.values())) == pytest.approx(
        study.PUBLISHED_MEAN, abs=5e-5
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01443537_goldfish", 0.0924),
        ("set/n01443537_goldfish", 0.0924),
        ("n02098286_West_Highland_white_terrier.JPEG", 0.1025),
        ("orange", 0.0739),
        ("blood orange", None),
        ("n01443537", None),
    ],
)
def test_published_by_name(name, expected):
    assert published_iou(name) == expected


def test_published_is_joined_by_image():
    table = pd.DataFrame(
        {
            "sample": ["n01608432_kite", "mine", "n01616318_vulture"],
            "iou": [0.1, 0.2, 0.3],
        }
    )
    joined = with_published(table)
    np.testing.assert_array_equal(joined["published_iou"], [0.1391, np.nan, 0.0790])
    assert "published_iou" not in table
    assert with_published(table[:0])["published_iou"].dtype == float


def test_the_ten_images_are_all_published(shared):
    assert all(published_iou(file.stem) for file in (shared / "imagenet10").iterdir())


# ---- presets


def test_packaged_presets_are_listed_and_load():
    assert preset_names() == ("study-as-run", "study-published")
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.published
        assert "\n" not in preset.note
        for column in preset.columns:
            registry.explainers.build(column.by)
            registry.cutters.build(column.mask)


def test_the_published_protocol_is_what_the_study_describes():
    cam, lime = load_preset("study-published").columns
    assert (cam.view, lime.view, cam.target, lime.target) == (
        "squash",
        "squash",
        "predicted",
        "predicted",
    )
    assert registry.explainers.build(cam.by) == registry.explainers.build("gradcam")
    assert registry.cutters.build(cam.mask).fraction == 0.2
    assert registry.cutters.build(lime.mask).k == 10
    built = registry.explainers.build(lime.by)
    segments = built.segments
    assert (segments.kernel_size, segments.max_dist, segments.ratio) == (5, 150, 0.3)
    assert (
        built.samples,
        built.kernel_width,
        built.alpha,
        built.refit_alpha,
        built.features,
    ) == (700, 0.25, 0.01, 0.5, 10)
    assert (registry.spell(built.fill, full=True), built.draw, built.seed) == (
        "percentile:q=20",
        "lime",
        0,
    )
    assert not load_preset("study-published").allow_mismatch
    assert [column.model for column in (cam, lime)] == [None, None]


def test_the_protocol_as_run_differs_in_the_studys_errors_alone():
    right, wrong = load_preset("study-published"), load_preset("study-as-run")
    cam, lime = wrong.columns
    assert (cam.by, cam.view, cam.target) == (
        right.columns[0].by,
        "squash",
        "predicted",
    )
    assert registry.cutters.build(cam.mask) == study.Luminance(80)
    as_described = registry.explainers.build(right.columns[1].by)
    as_run = registry.explainers.build(lime.by)
    assert as_run.fill == study.Truncated(20)
    assert {**vars(as_run), "fill": None} == {**vars(as_described), "fill": None}
    assert lime.unseeded
    assert lime.mask == right.columns[1].mask
    assert (cam.model, lime.model) == (
        "resnet50:weights=IMAGENET1K_V1",
        "resnet50:weights=IMAGENET1K_V2",
    )
    assert wrong.allow_mismatch


def test_models_given_replace_those_of_the_columns():
    preset = load_preset("study-as-run")
    own = tuple(column.model for column in preset.columns)
    assert tuple(column.model for column in columns_for(preset)) == own
    assert tuple(column.model for column in columns_for(preset, ["resnet50"])) == own
    assert [
        column.model for column in columns_for(preset, ["efficientnet_lite0"])
    ] == ["efficientnet_lite0"] * 2
    assert [column.model for column in columns_for(preset, ["a", "b"])] == ["a", "b"]
    assert [column.model for column in columns_for(preset, ["resnet50", "b"])] == [
        own[0],
        "b",
    ]
    explicit = "resnet50:weights=IMAGENET1K_V2"
    assert [column.model for column in columns_for(preset, [explicit])] == [
        explicit
    ] * 2
    with pytest.raises(
        ConsilienceError, match="3 models for the 2 columns of study-as-run"
    ):
        columns_for(preset, ["a", "b", "c"])


def test_a_column_without_a_model_takes_the_one_given():
    assert resolve_column(RunColumn("x", "gradcam"), "m").model == "m"
    assert resolve_column(RunColumn("x", "gradcam"), None).model is None


@pytest.mark.parametrize(
    "by",
    [
        "lime",
        "lime:samples=5,seed=3,fill=percentile(20)",
        "lime:segments=grid(4),seed=1",
    ],
)
def test_with_seed_changes_the_seed_alone(by):
    before, after = (
        registry.explainers.build(by),
        registry.explainers.build(with_seed(by, 77)),
    )
    assert after.seed == 77
    assert {**vars(after), "seed": 0} == {**vars(before), "seed": 0}


MINE = """
title = "Mine"
[[column]]
label = "A"
by = "gradcam"
[[column]]
label = "B"
by = "lime:seed=1"
view = "crop"
"""


def test_a_users_own_file(tmp_path):
    (tmp_path / "mine.toml").write_text("\ufeff" + MINE, encoding="utf-8")
    preset = load_preset(tmp_path / "mine.toml")
    assert preset == study.Preset(
        "mine",
        "Mine",
        (RunColumn("A", "gradcam"), RunColumn("B", "lime:seed=1", view="crop")),
    )
    assert load_preset(str(tmp_path / "mine.toml")) == preset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('title = "Mine"', ""), "lacks title"),
        (
            ('title = "Mine"', 'titel = "Mine"'),
            "no key 'titel'; did you mean 'title'. There is: title, note, allow_mismatch",
        ),
        (('title = "Mine"', "title = 3"), "title is text; got 3"),
        (
            ('title = "Mine"', 'title = "x"\npublished = 1'),
            "published is true or false; got 1",
        ),
        (('by = "gradcam"', ""), "column 1 lacks by"),
        (
            ('view = "crop"', 'view = "wide"'),
            "column 2: view is crop or squash; got 'wide'",
        ),
        (
            ('view = "crop"', 'masc = "top"'),
            "column 2: no key 'masc'; did you mean 'mask'",
        ),
        (
            ('view = "crop"', "unseeded = 1"),
            "column 2: unseeded is true or false; got 1",
        ),
        (('label = "B"', 'label = "A"'), "two columns of one label"),
        (('"lime:seed=1"', '"lime:seed=("'), "is not a specification"),
        (("[[column]]", "[[columns]]"), "needs its columns"),
        (("[[column]]", "[[column"), "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_preset_is_said(tmp_path, change, message):
    (tmp_path / "mine.toml").write_text(MINE.replace(*change))
    with pytest.raises(ConsilienceError, match=message):
        load_preset(tmp_path / "mine.toml")


def test_an_unknown_preset_lists_what_there_is():
    with pytest.raises(
        ConsilienceError,
        match=r"no preset 'study'.* study-as-run, study-published; or a TOML file",
    ):
        load_preset("study")
