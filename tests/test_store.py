"""A run on disk: round trip, atomic files, one job a folder, and what damage does."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import consilience as cs
from consilience import spec
from consilience.agreement import audit
from consilience.agreement.masks import Mask
from consilience.explanations import KeptExplanation
from consilience.files import file_stem, json_ready, write_atomically
from consilience.images import Placement
from consilience.runs import explain
from consilience.runs.folder import (
    SCHEMAS,
    ImageResult,
    Run,
    RunFolder,
    Writer,
    differences,
    map_file,
    read_result,
    times_of,
    write_result,
)
from consilience.show import console
from consilience.types import (
    Box,
    ClassTarget,
    ConsilienceError,
    Explanation,
    Sample,
)

PROVENANCE = {"view": "crop", "seed": 1, "score": float("nan"), "seconds": 1.5}


def stored(name="cat"):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9, 7)).astype(np.float32)
    pixels = rng.integers(0, 255, (18, 14, 3), dtype=np.uint8)
    sample = Sample(name, pixels, 2, (Box(2, 1.0, 2.0, 3.5, 4.0),), notes=("first",))
    explanation = Explanation(
        sample,
        "m@1",
        "lime:samples=7",
        ClassTarget(3, "cat", "probability"),
        Placement.squash((18, 14), (9, 7)),
        values,
        {"segments": np.arange(63).reshape(9, 7), "r2": np.asarray(0.5)},
        PROVENANCE,
    )
    item = KeptExplanation(
        "LIME", explanation, Mask(values > 0.3, "top:0.2", 5, "so")
    )
    image = rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)
    return ImageResult(sample, image, {"name": "cat"}, (item,), ("a note",))


def test_an_image_comes_back_to_the_bit(tmp_path):
    kept = stored()
    write_result(tmp_path / "a.npz", kept)
    back = read_result(tmp_path / "a.npz")
    one, other = kept.items[0].explanation, back.items[0].explanation
    assert other.values.tobytes() == one.values.tobytes()
    for name in ("segments", "r2"):
        np.testing.assert_array_equal(other.extras[name], one.extras[name])
    assert set(other.extras) == set(one.extras)
    assert np.isnan(other.provenance["score"])
    steady = {key: it for key, it in one.provenance.items() if key != "seconds"}
    assert {**other.provenance, "score": 0} == {**steady, "score": 0}
    assert times_of(kept) == {"LIME": {"seconds": 1.5}}
    for name in ("model_id", "explainer", "target", "geometry"):
        assert getattr(other, name) == getattr(one, name)
    for name in ("name", "digest", "label", "boxes", "notes", "source"):
        assert getattr(other.sample, name) == getattr(one.sample, name)
    cut, again = kept.items[0].cut, back.items[0].cut
    assert (again.on.dtype, again.on.tobytes()) == (bool, cut.on.tobytes())
    assert (again.rule, again.tied, again.note) == ("top:0.2", 5, "so")
    assert back.items[0].column == "LIME"
    assert back.image.tobytes() == kept.image.tobytes()
    assert (back.notes, back.prediction) == (kept.notes, kept.prediction)


def test_nothing_half_written_is_seen(tmp_path):
    target = tmp_path / "file"

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fails)
    assert list(tmp_path.iterdir()) == []


# ---- one job a folder


def test_the_same_job_continues_and_another_is_refused(tmp_path):
    folder, kept = tmp_path / "run", stored()
    digest = kept.sample.digest
    Writer(folder, {"target": "predicted", "models": ["a"]}).put(kept)
    again = Writer(folder, {"models": ["a"], "target": "predicted"})
    assert again.done("cat", digest)
    assert again.done("cat")
    assert not again.done("cat", "e" * 32)
    assert not again.done("dog", digest)
    with pytest.raises(
        ConsilienceError, match=r"another job \(models was \['a'\], is \['b'\]\)"
    ):
        Writer(folder, {"target": "predicted", "models": ["b"]})


def test_a_folder_in_which_nothing_was_finished_is_not_locked(tmp_path):
    first = Writer(tmp_path / "run", {"target": "predicted"})
    (tmp_path / "run" / "maps").mkdir()
    (tmp_path / "run" / ".left.part").write_bytes(b"half")
    second = Writer(tmp_path / "run", {"target": "true"})
    assert first.digest != second.digest
    second.put(stored())
    with pytest.raises(ConsilienceError, match="target was true, is predicted"):
        Writer(tmp_path / "run", {"target": "predicted"})


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConsilienceError, match="holds no run"):
        Writer(tmp_path, {})
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(ConsilienceError, match="is a file"):
        Writer(tmp_path / "thesis.txt", {})


def test_another_kind_of_run_is_another_job(tmp_path):
    RunFolder(tmp_path / "run", "planted", {"seed": 0}).finish({})
    with pytest.raises(ConsilienceError, match="kind was planted, is comparison"):
        RunFolder(tmp_path / "run", "comparison", {"seed": 0})


FILE = {"file": "t.csv", "digest": "aa"}


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        ({"truth": FILE}, {"truth": FILE}, []),
        ({"truth": FILE}, {"truth": {**FILE, "file": "moved.csv"}}, []),
        (
            {"truth": FILE},
            {"truth": {**FILE, "digest": "bb"}},
            ["truth (t.csv) changed"],
        ),
        (
            {"truth": FILE},
            {"truth": {"file": "u.csv", "digest": "bb"}},
            ["truth (u.csv, was t.csv) changed"],
        ),
        ({"truth": None}, {"truth": FILE}, ["truth was none, is t.csv"]),
        ({"truth": FILE}, {}, ["truth was t.csv, is none"]),
        (
            {"columns": {"A": {"view": "crop", "plug-in digest": "x"}}},
            {"columns": {"A": {"view": "squash", "plug-in digest": "y"}, "B": {}}},
            [
                "columns A view was crop, is squash",
                "columns A plug-in changed",
                "columns B added",
            ],
        ),
        (
            {"images": {"a": "1", "b": "2", "c": "3"}},
            {"images": {"a": "1", "b": "5", "d": "4"}},
            ["images: 1 changed (b), 1 added (d), 1 missing (c)"],
        ),
    ],
)
def test_what_differs_is_said(there, asked, said):
    assert differences(there, asked) == said


# ---- names and manifests


def test_an_unfinished_run_says_so(tmp_path):
    Writer(tmp_path / "run", {})
    with pytest.raises(ConsilienceError, match="give the same command again"):
        Run(tmp_path / "run")
    with pytest.raises(ConsilienceError, match="no finished run of explanations"):
        Run(tmp_path)


def test_names_that_no_file_may_have(tmp_path):
    names = ["../../etc/passwd", "a/b", "..", "a b", "con\0", "x" * 300, "ünï", "a_b"]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert not any(
        "/" in stem or stem.startswith(".") or len(stem) > 100 or "\0" in stem
        for stem in stems
    )
    writer = Writer(tmp_path / "run", {})
    writer.put(stored("../../evil"))
    assert {path.parent for path in tmp_path.rglob("*.npz")} == {
        tmp_path / "run" / "maps"
    }


def test_the_manifest_is_json_without_nan(tmp_path):
    writer = Writer(tmp_path / "run", {})
    run = writer.finish_tables(
        {"seconds": float("nan"), "summary": [], "audit": []},
        pd.DataFrame({"a": [1]}),
        pd.DataFrame(),
    )
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["seconds"] is None
    assert (said["schema"], said["kind"]) == (SCHEMAS["explanations"], "explanations")
    assert run.manifest["job"] == writer.digest


def test_plain_data():
    assert json_ready(
        {"a": (np.float32(0.5), np.int64(3), float("inf"), np.array([1, 2]))}
    ) == {"a": [0.5, 3, None, [1, 2]]}


def test_an_image_whose_class_is_not_known_beside_one_whose_class_is(tmp_path):
    """pandas reads the missing name as NaN, which is not a name."""
    rows = {
        "sample": ["a", "b"],
        "predicted_name": ["cat", "dog"],
        "probability": [0.5, 0.75],
        "true_name": ["cat", None],
        "predicted": [3, 4],
        "true": [3, None],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "explanations.parquet")
    (tmp_path / "run.json").write_text(
        json.dumps({"schema": SCHEMAS["explanations"], "model": {"id": "m"}}),
        encoding="utf-8",
    )
    run = Run(tmp_path)
    assert [said["true"] for said in run.predictions.values()] == ["cat", None]
    assert [said["right"] for said in run.predictions.values()] == [True, None]
    assert list(console._predictions(run).columns[3].cells) == ["cat", ""]


# ---- a run from Python


@pytest.fixture
def given(planted, tmp_path):
    """Two files and what is explained of them."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(planted.pixels).save(folder / "one.png")
    Image.fromarray(planted.pixels[:, ::-1].copy()).save(folder / "two.png")
    return folder


BY = ["gradcam", "gradient"]


def test_a_run_is_a_sequence_and_a_mapping_of_explanations(
    red_model, given, tmp_path
):
    made = cs.run(red_model, given, BY, output=tmp_path / "run")
    columns = list(made.table()["column"][:2])
    assert len(made) == 4
    assert made.keys() == [(name, c) for name in ("one", "two") for c in columns]
    direct = cs.explain(red_model, cs.read_image(given / "two.png"), "gradient")
    for one in (made[3], made[-1], made["two", columns[1]], made["two"][columns[1]]):
        np.testing.assert_array_equal(one.values, direct.values)
        assert one.provenance["key"] == direct.provenance["key"]
        assert one.target == direct.target
    assert [one.explainer for one in made[1:3]] == ["gradient", "gradcam"]
    assert [one.sample.name for one in made] == ["one", "one", "two", "two"]
    np.testing.assert_array_equal(made[3].overlay(), direct.overlay())
    assert {key for key, _ in made.items()} == set(made.keys())
    assert ("one", columns[0]) in made
    assert "two" in made
    assert ("three", columns[0]) not in made
    with pytest.raises(ConsilienceError, match="no image 'tow'; did you mean 'two'"):
        made["tow"]
    with pytest.raises(ConsilienceError, match="no column 'LIME'"):
        made["one", "LIME"]
    with pytest.raises(IndexError):
        made[4]
    assert made.report() == tmp_path / "run" / "report.html"
    assert repr(made).endswith("4 explanations of 2 images)")


def test_samples_that_are_in_memory_make_a_run_too(red_model, planted, tmp_path):
    two = replace(planted, name="two", pixels=planted.pixels[::-1].copy())
    made = cs.run(red_model, [planted, two], "gradient", output=tmp_path / "run")
    assert made.samples == [planted.name, "two"]
    with pytest.raises(ConsilienceError, match="was not saved, only its digest"):
        made[0].overlay()
    with pytest.raises(ConsilienceError, match="two images are called"):
        cs.run(red_model, [planted, planted], "gradient", output=tmp_path / "other")


def test_a_specification_is_parsed_at_the_door(
    red_model, given, tmp_path, monkeypatch
):
    """Once where the job is made; the audit looks once more for its fill."""
    parsed = []
    audit._fill_asked.cache_clear()
    real = spec.parse
    for module in (spec, __import__("consilience.registry").registry):
        monkeypatch.setattr(
            module, "parse", lambda text: parsed.append(text) or real(text)
        )
    cs.run(
        red_model, given, ["gradcam:fuse=max", "gradient"], output=tmp_path / "run"
    )
    assert parsed.count("gradcam:fuse=max") == 2
    assert parsed.count("gradient") == 2


def explained(folder):
    """What a run wrote, by file, without what a clock says."""
    return {
        path.name: path.stat().st_mtime_ns for path in (folder / "maps").iterdir()
    }


def test_the_same_images_elsewhere_are_the_same_job(red_model, given, tmp_path):
    run = tmp_path / "run"
    cs.run(red_model, given, BY, output=run)
    before = explained(run)
    given.rename(tmp_path / "moved")
    cs.run(red_model, tmp_path / "moved", BY, output=run)
    assert explained(run) == before


def test_what_changed_is_another_job_and_is_named(red_model, given, tmp_path):
    run, truth = tmp_path / "run", tmp_path / "truth.csv"
    truth.write_text("image,class_index\none.png,1\ntwo.png,0\n")

    def again(**changed):
        asked = {"by": BY, "target": "predicted", "truth": truth, **changed}
        return cs.run(red_model, given, output=run, **asked)

    again()
    with pytest.raises(ConsilienceError, match=r"\(target was predicted, is 1\)"):
        again(target="1")
    with pytest.raises(ConsilienceError, match="columns Gradient gone"):
        again(by=["gradcam"])
    with pytest.raises(ConsilienceError, match="columns Gradient view was none, is"):
        again(view="squash")
    truth.write_text("image,class_index\none.png,0\ntwo.png,0\n")
    with pytest.raises(ConsilienceError, match=r"\(truth \(truth.csv\) changed\)"):
        again()
    truth.write_text("image,class_index\none.png,1\ntwo.png,0\n")
    Image.new("RGB", (64, 64)).save(given / "two.png")
    with pytest.raises(ConsilienceError, match=r"\(images: 1 changed \(two\)\)"):
        again()


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from consilience import registry
from consilience.types import Heat

@registry.explainers.register("mine")
@dataclass(frozen=True)
class Mine:
    needs: ClassVar[frozenset[str]] = frozenset()

    def explain(self, model, view, target):
        return Heat(view.pixels[0, {channel}])
"""


def test_an_edited_plug_in_is_another_job(red_model, given, tmp_path):
    from consilience import registry

    file = tmp_path / "mine.py"
    try:
        for channel, right in (
            (0, None),
            (0, None),
            (1, "columns mine plug-in changed"),
        ):
            file.write_text(PLUGIN.format(channel=channel))
            registry.load_plugin(file)
            if right is None:
                cs.run(red_model, given, "mine", output=tmp_path / "run")
                continue
            with pytest.raises(ConsilienceError, match=right):
                cs.run(red_model, given, "mine", output=tmp_path / "run")
    finally:
        registry.explainers._entries.pop("mine", None)


# ---- damage


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", None])
def test_a_damaged_map_is_made_anew(red_model, given, tmp_path, content, capsys):
    run = tmp_path / "run"
    whole = cs.run(red_model, given, BY, output=run)
    values = [one.values for one in whole]
    path = map_file(run, "two")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(ConsilienceError, match=r"two\.npz"):
        Run(run)["two"]
    before = explained(run)
    again = cs.run(red_model, given, BY, output=run)
    assert explained(run)["one.npz"] == before["one.npz"]
    for one, other in zip(again, values, strict=True):
        np.testing.assert_array_equal(one.values, other)


@pytest.mark.parametrize(
    "name", ["run.json", "explanations.parquet", "agreement.parquet", "job.json"]
)
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_file_of_a_run_is_one_line_and_the_same_call_mends_it(
    red_model, given, tmp_path, name, content
):
    run = tmp_path / "run"
    cs.run(red_model, given, BY, output=run)
    before = explained(run)
    (run / name).write_bytes(content)

    def look():
        found = Run(run)
        return len(found), len(found.agreement)

    if name != "job.json":
        with pytest.raises(ConsilienceError) as error:
            look()
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    cs.run(red_model, given, BY, output=run)
    assert look() == (4, 2)
    assert explained(run) == before


def test_maps_of_another_job_are_not_taken_for_this_one(red_model, given, tmp_path):
    """A job that cannot be read any more may have been another one."""
    run = tmp_path / "run"
    cs.run(red_model, given, "gradient", output=run)
    (run / "job.json").write_bytes(b"gone")
    made = cs.run(red_model, given, "gradcam", output=run)
    assert [one.explainer for one in made] == ["gradcam", "gradcam"]


def test_a_run_of_an_older_version_is_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "summary": []}))
    with pytest.raises(ConsilienceError, match="has schema 1; this version reads 2"):
        Run(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"target": "predicted"}))
    with pytest.raises(ConsilienceError, match="a run of another version"):
        Writer(tmp_path, {})


def test_the_default_folder_is_dated(monkeypatch):
    assert explain.dated_folder().parent.name == "runs"
