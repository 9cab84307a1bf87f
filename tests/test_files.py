"""Files that come from elsewhere, and disks that take none: one line each."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from consilience import data, files
from consilience.cli import main
from consilience.dissection.class_groups import read_groups
from consilience.dissection.concepts import load_concepts
from consilience.dissection.words import read_words
from consilience.models import weights
from consilience.progress import printable
from consilience.types import ConsilienceError

PROGRAM = str(Path(sys.executable).with_name("consilience"))
DEEP = "[" * 200_000
LATIN = "image,class_index\ncaf\xe9,1\n".encode("latin-1")


# ---- text, CSV, JSON


READERS = {
    "truth": data.read_truth,
    "groups": lambda path: read_groups(path, ("a", "b")),
    "words": read_words,
    "labels": weights.read_labels,
    "json": files.read_json,
}


@pytest.mark.parametrize("kind", READERS)
def test_bytes_that_are_not_utf8_are_one_line(kind, tmp_path):
    file = tmp_path / "file.txt"
    file.write_bytes(LATIN)
    with pytest.raises(ConsilienceError, match="byte 21 is not UTF-8") as caught:
        READERS[kind](file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_or_a_folder_is_one_line(kind, tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConsilienceError) as caught:
            READERS[kind](path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["truth", "groups", "labels"])
def test_a_cell_of_a_megabyte_is_one_line(kind, tmp_path):
    file = tmp_path / "file.csv"
    file.write_text("image,class_index,concept,class,name\n" + "x" * 1_000_000)
    with pytest.raises(ConsilienceError, match="field larger than field limit"):
        READERS[kind](file)


def test_deep_json_is_one_line(tmp_path):
    file = tmp_path / "labels.json"
    file.write_text(DEEP)
    for read in (weights.read_labels, files.read_json):
        with pytest.raises(ConsilienceError, match="cannot be read as JSON"):
            read(file)


@pytest.mark.parametrize("content", ["3", '"a"', "[[]]", '{"a": "b"}', '{"0": null}'])
def test_labels_in_json_of_another_shape(content, tmp_path):
    file = tmp_path / "labels.json"
    file.write_text(content)
    with pytest.raises(ConsilienceError) as caught:
        weights.read_labels(file)
    assert "\n" not in str(caught.value)


def test_records_of_rows_that_are_short_or_long(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("\ufeffa,b\n1\n\n2,3,4\n", encoding="utf-8")
    assert files.read_csv_records(file) == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]


# ---- names that lead elsewhere


@pytest.mark.parametrize(
    "name", ["../a.jpg", "b/../../a.jpg", "/etc/passwd", "a\\..\\..\\b"]
)
def test_a_list_names_files_of_its_folder_alone(name):
    with pytest.raises(ConsilienceError, match="which is not in"):
        files.inside(Path("set"), name, "index.csv")


def test_names_within_a_folder_pass():
    assert files.inside(Path("set"), "a/b..c.jpg", "x") == Path("set/a/b..c.jpg")


def test_a_concept_index_cannot_leave_its_folder(tmp_path):
    from oracles_dissection import small_broden

    folder = small_broden(tmp_path / "set")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    index = folder / "index.csv"
    rows = list(csv.reader(index.read_text().splitlines()))
    rows[1][0] = "../../secret.png"
    index.write_text("\n".join(",".join(row) for row in rows))
    with pytest.raises(ConsilienceError, match="which is not in"):
        load_concepts(folder)
    coco = tmp_path / "coco"
    coco.mkdir()
    told = {
        "images": [{"id": 1, "file_name": "../secret.png", "height": 8, "width": 8}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 4, 4],
                "segmentation": [[0, 0, 4, 0, 4, 4]],
                "iscrowd": 0,
                "area": 8,
            }
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    (coco / "a.json").write_text(json.dumps(told))
    (coco / "images").mkdir()
    with pytest.raises(ConsilienceError, match="which is not in"):
        load_concepts(f"coco:{coco / 'a.json'},images={coco / 'images'}")


# ---- weights


def test_a_state_dict_that_holds_itself(tmp_path):
    state = {}
    state["state_dict"] = state
    file = tmp_path / "loop.pt"
    torch.save(state, file)
    with pytest.raises(ConsilienceError, match="holds itself"):
        weights.read_weights(file)


# ---- writing


def test_a_folder_that_takes_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.CannotWriteError, match="cannot be written") as caught:
        files.write_bytes(tmp_path / "file" / "a.txt", b"a")
    assert "the same command goes on" in str(caught.value)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(_handle, _mode):
        raise OSError(28, "No space left on device")

    files.write_bytes(tmp_path / "a.txt", b"before")
    monkeypatch.setattr(files.os, "fdopen", full)
    with pytest.raises(files.CannotWriteError, match="No space left on device"):
        files.write_bytes(tmp_path / "a.txt", b"after")
    assert (tmp_path / "a.txt").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_cells_that_a_spreadsheet_would_run_are_text():
    table = pd.DataFrame(
        {"a": ["=1+1", "+x", "-y", "@z", "\tq", "fine", ""], "b": [-1.0] * 7}
    )
    safe = files.spreadsheet_safe(table)
    assert safe["a"].tolist() == ["'=1+1", "'+x", "'-y", "'@z", "'\tq", "fine", ""]
    assert safe["b"].tolist() == [-1.0] * 7


# ---- terminals


def test_what_a_terminal_would_obey_is_replaced():
    assert (
        printable("a\x1b[2Jb\x07\u202ec\nd\xa0e")
        == "a\ufffd[2Jb\ufffd\ufffdc\ufffdd\xa0e"
    )


def test_names_with_escapes_do_not_reach_the_terminal(tmp_path, capsys):
    name = "evil\x1b[31mred\x07.png"
    (tmp_path / name).write_bytes(b"no image")
    Image.new("RGB", (40, 40), (200, 10, 10)).save(
        tmp_path / "fine\x1b]0;title\x07.png"
    )
    folder = str(tmp_path / "run")
    code = main(["explain", str(tmp_path), "-o", folder, "--by", "gradcam"])
    said = "".join(capsys.readouterr())
    assert code == 1
    assert "1 of 2" in said
    assert "evil" in said
    assert "\x1b" not in said
    assert "\x07" not in said


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    command = [
        PROGRAM,
        "explain",
        str(tmp_path),
        "-o",
        str(tmp_path / "run"),
        "--by",
        "gradcam",
        "--engine",
        "torch",
    ]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list((tmp_path / "run").glob("maps/*")):
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143
    assert b"stopped; give the same command again" in said
    assert b"Traceback" not in said
    assert not (tmp_path / "run" / "run.json").exists()
    again = subprocess.run(command, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "run.json").exists()


def test_a_run_inside_the_folder_of_its_images_is_not_an_input(tmp_path):
    for name in ("a.png", "b/c.png", "b/run/panels/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert len(data.find_images([tmp_path])) == 3
    (tmp_path / "b" / "run" / "job.json").write_text("{}")
    found = data.find_images([tmp_path])
    assert [path.name for path in found] == ["a.png", "c.png"]
    # a run that is named is searched, as it always was
    assert len(data.find_images([tmp_path / "b" / "run"])) == 1


# ---- rows of a truth file


def table_of(*names):
    return data.TruthTable({name: data.KnownTruth(0) for name in names})


def test_accents_match_however_they_are_spelled(tmp_path):
    file = tmp_path / "truth.csv"
    decomposed = unicodedata.normalize("NFD", "caf\xe9")
    file.write_text(f"image,class_index\n{decomposed}.jpg,3\n", encoding="utf-8")
    truth = data.read_truth(file)
    assert truth.of("a/caf\xe9.jpg").label == 3
    assert truth.of(f"a/{decomposed}.jpg").label == 3
    assert truth.unmatched(["a/caf\xe9.jpg"]) == ()


@pytest.mark.parametrize(
    ("named", "path", "why"),
    [
        ("Dog.jpg", "in/dog.jpg", "by its upper or lower case"),
        ("other/dog.jpg", "in/dog.jpg", "by its folder"),
        ("dog.png", "in/dog.jpg", "by its ending"),
    ],
)
def test_rows_that_match_nothing_are_counted_and_named(named, path, why):
    note = table_of(named, "cat").unmatched_note([path, "in/cat.jpg"])
    assert note.startswith(
        f"1 of 2 images in the truth file are not among those given: {named!r}"
    )
    assert why in note


def test_many_rows_that_match_nothing():
    note = table_of("a", "b", "c", "d", "e").unmatched_note(["x/e.jpg"])
    assert note == (
        "4 of 5 images in the truth file are not among those given: 'a', 'b', 'c', ..."
    )
    assert table_of("a").unmatched_note(["q/a.png"]) is None
