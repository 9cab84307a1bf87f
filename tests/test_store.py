"""A run on disk: round trip, atomic files, one job a folder."""

import json

import numpy as np
import pandas as pd
import pytest

from consilience.files import file_stem, json_ready, write_atomically
from consilience.runs.folder import (
    RUN_SCHEMA,
    Item,
    Run,
    Stored,
    Writer,
    read_stored,
    write_stored,
)
from consilience.show import console
from consilience.types import ConsilienceError


def stored(name="cat"):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9, 7)).astype(np.float32)
    item = Item(
        column="LIME",
        explainer="lime",
        model="m@1",
        target=3,
        target_name="cat",
        score=float("nan"),
        seconds=1.5,
        passes=700,
        key="k",
        values=values,
        mask=values > 0.3,
        mask_rule="top:0.2",
        extras={"segments": np.arange(63).reshape(9, 7), "r2": np.asarray(0.5)},
        provenance={"view": "crop", "seed": 1},
        geometry={"image": [9, 7]},
    )
    return Stored(
        name,
        "d" * 32,
        rng.integers(0, 255, (9, 7, 3), dtype=np.uint8),
        {"name": "cat"},
        (item,),
        ("a note",),
    )


def test_a_image_comes_back_to_the_bit(tmp_path):
    kept = stored()
    write_stored(tmp_path / "a.npz", kept)
    back = read_stored(tmp_path / "a.npz")
    for name in ("values", "mask"):
        assert (
            getattr(back.items[0], name).tobytes()
            == getattr(kept.items[0], name).tobytes()
        )
    assert back.items[0].mask.dtype == bool
    assert (
        back.items[0].extras["segments"].tolist()
        == kept.items[0].extras["segments"].tolist()
    )
    assert np.isnan(back.items[0].score)
    plain_fields = ("column", "passes", "target", "provenance", "geometry", "mask_rule")
    assert all(
        getattr(back.items[0], name) == getattr(kept.items[0], name)
        for name in plain_fields
    )
    assert (back.name, back.digest, back.notes, back.prediction) == (
        kept.name,
        kept.digest,
        kept.notes,
        kept.prediction,
    )


def test_nothing_half_written_is_seen(tmp_path):
    target = tmp_path / "file"

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fails)
    assert list(tmp_path.iterdir()) == []


def test_the_same_job_continues_and_another_is_refused(tmp_path):
    folder = tmp_path / "run"
    Writer(folder, {"target": "predicted", "models": ["a"]}).put(stored())
    again = Writer(folder, {"models": ["a"], "target": "predicted"})
    assert again.done("cat", "d" * 32) is not None
    assert again.done("cat", "e" * 32) is None
    assert again.done("dog", "d" * 32) is None
    with pytest.raises(ConsilienceError, match=r"another job \(models differ\)"):
        Writer(folder, {"target": "predicted", "models": ["b"]})


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConsilienceError, match="holds no run"):
        Writer(tmp_path, {})
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_unfinished_run_says_so(tmp_path):
    Writer(tmp_path / "run", {})
    with pytest.raises(ConsilienceError, match="give the same command again"):
        Run(tmp_path / "run")
    with pytest.raises(ConsilienceError, match=r"no run\.json"):
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
    run = writer.finish(
        {"seconds": float("nan"), "summary": [], "audit": []},
        pd.DataFrame({"a": [1]}),
        pd.DataFrame(),
    )
    text = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(text)["seconds"] is None
    assert run.manifest["schema"] == 1


def test_plain_data():
    assert json_ready(
        {"a": (np.float32(0.5), np.int64(3), float("inf"), np.array([1, 2]))}
    ) == {"a": [0.5, 3, None, [1, 2]]}


def test_a_image_whose_class_is_not_known_beside_one_whose_class_is(tmp_path):
    """pandas reads the missing name as NaN, which is no name."""
    rows = {
        "sample": ["a", "b"],
        "predicted_name": ["cat", "dog"],
        "probability": [0.5, 0.75],
        "true_name": ["cat", None],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "explanations.parquet")
    (tmp_path / "run.json").write_text(
        json.dumps({"schema": RUN_SCHEMA, "model": {"id": "m"}}), encoding="utf-8"
    )
    run = Run(tmp_path)
    assert [said["true"] for said in run.predictions.values()] == ["cat", None]
    assert list(console._predictions(run).columns[3].cells) == ["cat", ""]
