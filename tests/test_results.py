"""What users hold in their hands: saved and loaded, drawn, cut, shown in a notebook."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import consilience as cs
from consilience.saved import SavedSample
from consilience.show import figures
from consilience.types import Box, ConsilienceError, NotApplicable


@pytest.fixture
def made(red_model, planted):
    """A Grad-CAM and a LIME explanation of an image that is wider than the frame."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 255, (48, 96, 3), dtype=np.uint8)
    sample = cs.Sample(
        "wide",
        pixels,
        label=1,
        boxes=(Box(1, 2.0, 3.0, 20.5, 30.0),),
        masks={"left": np.arange(96)[None] < np.full((48, 1), 40)},
        notes=("a note",),
    )
    return (
        cs.explain(red_model, sample, "gradcam", view="crop"),
        cs.explain(red_model, sample, "lime:samples=64,segments=grid", view="squash"),
    )


def assert_same(one, other):
    assert (one.model_id, one.explainer) == (other.model_id, other.explainer)
    assert one.target == other.target
    assert one.geometry == other.geometry
    assert one.values.tobytes() == other.values.tobytes()
    assert one.values.dtype == np.float32
    assert set(one.extras) == set(other.extras)
    for name, value in one.extras.items():
        np.testing.assert_array_equal(np.asarray(value), other.extras[name])
    assert json.dumps(one.provenance, default=list) == json.dumps(
        other.provenance, default=list
    )
    sample, again = one.sample, other.sample
    assert (sample.name, sample.label, sample.boxes, sample.notes) == (
        again.name,
        again.label,
        again.boxes,
        again.notes,
    )
    assert sample.digest == again.digest


@pytest.mark.parametrize("which", [0, 1])
def test_it_comes_back_to_the_bit(made, tmp_path, which):
    path = made[which].save(tmp_path / "kept.npz")
    back = cs.Explanation.load(path)
    assert_same(made[which], back)
    np.testing.assert_array_equal(back.sample.pixels, made[which].sample.pixels)
    np.testing.assert_array_equal(
        back.sample.masks["left"], made[which].sample.masks["left"]
    )


def test_without_the_image_it_is_read_again_and_another_is_refused(
    red_model, tmp_path, planted
):
    Image.fromarray(planted.pixels).save(tmp_path / "a.png")
    one = cs.explain(red_model, cs.read_image(tmp_path / "a.png"), "gradcam")
    path = one.save(tmp_path / "kept", image=False)
    assert path == tmp_path / "kept.npz"
    assert path.stat().st_size < 40_000
    back = cs.Explanation.load(path)
    assert isinstance(back.sample, SavedSample)
    np.testing.assert_array_equal(back.overlay(), one.overlay())
    assert replace(back.sample, label=1).digest == one.sample.digest
    Image.fromarray(255 - planted.pixels).save(tmp_path / "a.png")
    with pytest.raises(ConsilienceError, match="another image"):
        cs.Explanation.load(path).overlay()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConsilienceError, match="not where it was"):
        cs.Explanation.load(path).figure()
    assert "not where it was" in cs.Explanation.load(path)._repr_html_()


def test_an_image_that_was_given_in_python_is_known_by_its_digest(made, tmp_path):
    back = cs.Explanation.load(made[0].save(tmp_path / "a.npz", image=False))
    assert_same(made[0], back)
    with pytest.raises(ConsilienceError, match="was not saved, only its digest"):
        back.overlay()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 and then nothing", b"\x93NUMPY", b"{}", None],
    ids=["empty", "zip", "npy", "json", "cut"],
)
def test_a_damaged_file_is_one_line(made, tmp_path, content):
    path = made[0].save(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ConsilienceError) as error:
        cs.Explanation.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConsilienceError, match="does not exist"):
        cs.Explanation.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(ConsilienceError, match="no file of explanations"):
        cs.Explanation.load(tmp_path / "other.npz")


def test_the_map_and_overlay_lie_on_the_image(made):
    """Grad-CAM looked at the middle 48 x 48 of 48 x 96 pixels."""
    cam, lime = made
    assert cam.to_image().shape == (48, 96)
    seen = np.isfinite(cam.to_image())
    size = cam.geometry.size[1] * 48 / cam.geometry.resized[0]
    left = (96 - size) / 2
    assert not seen[:, : int(left)].any()
    assert seen[:, int(left) + 1 : int(left + size) - 1].all()
    painted = cam.overlay()
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted[~seen], cam.sample.pixels[~seen])
    assert (painted[seen] != cam.sample.pixels[seen]).any()
    assert np.isfinite(lime.to_image()).all()


def test_masks_are_those_of_the_cutter(made):
    cam, lime = made
    flat = np.sort(cam.values.ravel())
    on = cam.mask("top:.25")
    assert on.dtype == bool
    assert on.sum() == round(0.25 * cam.values.size)
    assert cam.values[on].min() >= flat[-int(on.sum())]
    np.testing.assert_array_equal(cam.mask(), cam.mask("top:.2"))
    np.testing.assert_array_equal(lime.mask(), lime.mask("superpixels:10"))
    with pytest.raises(NotApplicable):
        cam.mask("superpixels")


def test_figures_and_notebook_cells(made, monkeypatch):
    for one in made:
        figure = one.figure()
        image, drawn = figure.axes[:2]
        np.testing.assert_array_equal(
            drawn.images[0].get_array(), figures.painted_map(one)[0]
        )
        assert image.get_title() == "wide"
        assert drawn.get_title() == f"{one.explainer}\nof {one.target.name}"
        html = one._repr_html_()
        assert html.startswith("<img")
        assert one.model_id in html
    assert repr(made[0]) == (
        f"Explanation(gradcam of {made[0].target.name!r} in 'wide', "
        f"{made[0].values.shape[0]} x {made[0].values.shape[1]}, {made[0].model_id})"
    )
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image.size))
    made[0].show()
    assert len(shown) == 1


def test_results_have_tables_figures_and_cells(red_model, planted):
    explanations = [
        cs.explain(red_model, planted, by) for by in ("gradcam", "gradient")
    ]
    agreement = cs.agree(explanations)
    row = agreement.table().iloc[0]
    dots = next(
        part
        for part in agreement.figure().axes[0].collections
        if part.get_gid() in ("iou-above", "iou-below")
    )
    assert dots.get_offsets()[0][0] == pytest.approx(row["iou"])
    assert "gradcam" in agreement._repr_html_()

    scores = cs.evaluate(red_model, explanations[0], ["insertion", "pointing-game"])
    table = scores.table().set_index("metric")
    assert table.loc["insertion", "value"] == scores["insertion"].value
    assert bool(table.loc["insertion", "higher_is_better"])
    assert (table.loc["insertion", "lowest"], table.loc["insertion", "reason"]) == (
        registry_bounds("insertion")[0],
        "",
    )
    assert np.isnan(table.loc["pointing-game", "value"])
    assert table.loc["pointing-game", "reason"] == str(scores["pointing-game"])
    line = scores.figure().axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata().T, scores["insertion"].curve)
    assert "<img" in scores._repr_html_()
    alone = cs.evaluate(red_model, explanations[0], "sparseness")
    with pytest.raises(ConsilienceError, match="no curve behind sparseness"):
        alone.figure()
    assert "<img" not in alone._repr_html_()


def registry_bounds(name):
    from consilience import registry

    return registry.metrics.get(name).bounds


def test_a_dissection_counts_its_detectors_by_concept(red_model):
    found = cs.dissect(
        red_model,
        [red_model.target_layer()],
        cs.load_concepts("drawn:images=30"),
        permutations=19,
        min_images=2,
    )
    counts = found.detectors()["concept"].value_counts()
    axes = found.figure().axes[0]
    assert [bar.get_width() for bar in axes.patches] == list(counts)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(counts.index)
    assert found.headline(found.layers[0].layer) in found._repr_html_()
    sure = int(found.table()["significant"].sum())
    assert found.headline(found.layers[0].layer).endswith(f"; {sure} are significant")
