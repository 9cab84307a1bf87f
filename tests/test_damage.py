"""Damaged images and damaged runs: one line each, and the rest goes on."""

import io
import shutil

import numpy as np
import pytest
from conftest import RedFinder, planted_image
from PIL import Image

from consilience import data, files, progress
from consilience.models import load
from consilience.models.network import wrap
from consilience.runs import explain
from consilience.runs.folder import Run
from consilience.types import ConsilienceError, Sample

FORMATS = {
    "JPEG": {},
    "PNG": {},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "BMP": {},
    "WEBP": {},
    "PPM": {},
}


def mutated(number):
    """An image file of one of seven formats with bytes changed, cut, or repeated."""
    rng = np.random.default_rng(number)
    name = list(FORMATS)[number % len(FORMATS)]
    content = io.BytesIO()
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, name, **FORMATS[name])
    changed = bytearray(content.getvalue())
    for _ in range(int(rng.integers(1, 30))):
        # most of what can go wrong is said in the first bytes
        end = 64 if rng.random() < 0.5 else len(changed)
        changed[int(rng.integers(0, end))] = int(rng.integers(0, 256))
    how = number % 4
    if how == 1:
        changed = changed[: int(rng.integers(1, len(changed)))]
    elif how == 2:
        at = int(rng.integers(0, len(changed)))
        changed[at:at] = changed[: int(rng.integers(1, 400))]
    return name.lower(), bytes(changed)


def test_two_hundred_mutated_images_are_read_or_said(tmp_path):
    for number in range(200):
        suffix, content = mutated(number)
        (tmp_path / f"{number:03}.{suffix}").write_bytes(content)
    found = list(data.read_files(sorted(tmp_path.iterdir())))
    read = [one for one in found if isinstance(one, Sample)]
    lost = [one for one in found if isinstance(one, data.Failure)]
    assert len(read) + len(lost) == 200
    assert len(read) > 20
    assert len(lost) > 20
    for one in lost:
        assert one.reason
        assert "\n" not in one.reason
    for one in read:
        assert one.pixels.dtype == np.uint8
        assert one.pixels.ndim == 3


# ---- runs


FILES = {
    "job": "job.json",
    "manifest": "run.json",
    "maps": "maps/p0.npz",
    "panel": "panels/p0.png",
    "explanations": "explanations.parquet",
    "agreement": "agreement.parquet",
    "report": "report.html",
}
DAMAGES = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2]
    ),
    "noise": lambda file: file.write_bytes(
        np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    ),
    "another kind": lambda file: file.write_text("[1, 2]"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def job(folder, images):
    return explain.run_explanations(
        explain.job_from_specs(["gradcam", "random"], ["my:red"], "red"),
        [images],
        folder,
        None,
        explain.LoadOptions(engine="torch"),
        how=explain.How(panels=True),
    )


@pytest.fixture(scope="module")
def red():
    return wrap(
        RedFinder(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, red):
    folder = tmp_path_factory.mktemp("damage")
    (folder / "images").mkdir()
    for seed in (0, 1):
        pixels = planted_image(seed).pixels
        Image.fromarray(pixels).save(folder / "images" / f"p{seed}.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(load, "_from_factory", lambda *_: red)
        job(folder / "run", folder / "images")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", FILES)
def test_a_damaged_run_is_read_made_anew_or_refused_in_a_line(
    part, damage, finished, red, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "_from_factory", lambda *_: red)
    copy = tmp_path / "run"
    shutil.copytree(finished / "run", copy)
    maps = Run(copy).load("p0").explanations[0].values
    DAMAGES[damage](copy / FILES[part])
    _, refused = tried(lambda: Run(copy).load("p0"))
    again, refused_again = tried(lambda: job(copy, finished / "images"))
    assert "\n" not in refused + refused_again
    if refused_again:
        # what claims the folder, and what lies where a file must be, is not overwritten
        assert part == "job" or damage == "a folder", refused_again
        return
    np.testing.assert_array_equal(again.load("p0").explanations[0].values, maps)
    assert len(again.agreement) == 2
    assert (copy / "report.html").read_text().startswith("<!")
    assert len(Run(copy)) == 4


def tried(work):
    """What it gives, or why it refuses; anything else is raised."""
    try:
        return work(), ""
    except ConsilienceError as error:
        return None, str(error)


def failing_once(monkeypatch, error):
    """The first image's explanation raises."""
    plain = explain.api.explain_one

    def explained(model, sample, *given, **named):
        if sample.name == "p0":
            raise error
        return plain(model, sample, *given, **named)

    monkeypatch.setattr(explain.api, "explain_one", explained)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of memory\nin the\nkernel"), MemoryError(), ValueError("odd")],
    ids=["RuntimeError", "MemoryError", "ValueError"],
)
def test_whatever_is_raised_on_an_image_is_that_images_failure(
    error, finished, red, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "_from_factory", lambda *_: red)
    failing_once(monkeypatch, error)
    made = job(tmp_path / "run", finished / "images")
    (failure,) = made.manifest["failures"]
    assert failure["reason"].startswith(type(error).__name__)
    assert "\n" not in failure["reason"]
    assert made.samples == ["p1"]


@pytest.mark.parametrize(
    "error", [files.CannotWriteError("the disk is full"), progress.Cancelled()]
)
def test_a_full_disk_or_a_stop_ends_the_run(
    error, finished, red, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "_from_factory", lambda *_: red)
    with monkeypatch.context() as patched:
        failing_once(patched, error)
        with pytest.raises(type(error)):
            job(tmp_path / "run", finished / "images")
    again = job(tmp_path / "run", finished / "images")
    assert again.samples == ["p0", "p1"]
    assert again.manifest["failures"] == []


def test_whoever_listens_hears_of_every_explanation_once(tmp_path):
    import numpy as np

    import consilience as cs
    from consilience.runs.explain import How, job_from_specs, run_explanations

    def scores(pixels):
        return np.stack([pixels.mean((1, 2, 3)), 1 - pixels.mean((1, 2, 3))], 1)

    model = cs.wrap_callable(scores, classes=["light", "dark"], size=32)
    images = [cs.Sample(name, np.full((32, 32, 3), 90, np.uint8)) for name in "ab"]
    job, heard = job_from_specs(["centre", "edges", "occlusion:window=16"]), []

    def made(sample, label, explanation):
        heard.append((sample.name, label, explanation.name))

    asked = {"models": [model] * 3, "made": made}
    run = run_explanations(job, images, tmp_path / "run", **asked)
    assert sorted(heard) == sorted(
        (name, column["name"], spec)
        for name in run.samples
        for column, spec in zip(
            run.manifest["columns"], ("centre", "edges", "occlusion"), strict=True
        )
    )
    heard.clear()
    run_explanations(job, images, tmp_path / "run", **asked)  # all is there
    assert heard == []
    reused = How(reuse=(str(tmp_path / "run"),))
    run_explanations(job, images, tmp_path / "again", how=reused, **asked)
    assert len(heard) == 6
    with pytest.raises(cs.ConsilienceError, match="by one process"):
        run_explanations(job, images, tmp_path / "two", how=How(workers=2), **asked)
