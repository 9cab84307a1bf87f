"""Names that 0.1 had are still taken, with a warning that says what to use instead."""

import sys
from importlib.metadata import version

import numpy as np
import pytest

import consilience as cs
from consilience.cli import build_parser
from consilience.dissection.concepts import load_concepts
from consilience.dissection.measure import _options
from consilience.dissection.sets.coco import Coco
from consilience.images import Placement
from consilience.older import GOES, OlderNameWarning


def goes(older, newer):
    """What is said of an older name."""
    said = f"^{older} is now {newer}; the older name goes in {GOES}$"
    return pytest.warns(OlderNameWarning, match=said)


def test_names_go_in_a_version_that_is_still_to_come():
    """A name that was deprecated in a minor version is there in the one after it."""
    numbers = [
        tuple(map(int, one.split(".")[:2])) for one in (version("consilience"), GOES)
    ]
    assert numbers[0] < numbers[1]


def test_concept_sets_by_their_older_option():
    newer = load_concepts("drawn:images=3,seed=1")
    with goes("drawn:pictures", "drawn:images"):
        older = load_concepts("drawn:pictures=3,seed=1")
    assert older.id == newer.id
    assert len(older) == 3
    with goes("picture", "image"):
        picture = older.source.picture(1)
    np.testing.assert_array_equal(picture, newer.source.image(1))
    with goes("coco:pictures", "coco:images"):
        assert Coco("a.json", pictures="folder") == Coco("a.json", images="folder")


def test_options_of_a_dissection():
    with (
        goes("min_pictures", "min_images"),
        goes("null_pictures", "null_images"),
    ):
        older = _options({"min_pictures": 7, "null_pictures": 9})
    assert older == _options({"min_images": 7, "null_images": 9})


def test_flags():
    parse = build_parser().parse_args
    with (
        goes("--min-pictures", "--min-images"),
        goes("--knockout-pictures", "--knockout-images"),
    ):
        older = parse(
            ["dissect", "X", "--min-pictures", "7", "--knockout-pictures", "9"]
        )
    newer = parse(["dissect", "X", "--min-images", "7", "--knockout-images", "9"])
    assert vars(older) == vars(newer)
    assert parse(["dissect", "X"]).min_images is None


def test_maps_move_onto_the_image():
    place = Placement.squash((4, 6), (2, 3))
    values = np.arange(6.0).reshape(2, 3)
    with goes("to_picture", "to_image"):
        picture = place.to_picture(values)
    np.testing.assert_array_equal(picture, place.to_image(values))


def test_the_shell_says_it_in_one_line(capfd, tmp_path):
    """In a process of its own: what shows warnings is the process's."""
    import subprocess

    asked = [
        "dissect",
        "no-such-set",
        "--min-pictures",
        "7",
        "-o",
        str(tmp_path / "a"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "consilience", *asked],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert lines[0] == (
        f"consilience: --min-pictures is now --min-images; the older name goes in {GOES}"
    )
    assert "Warning" not in done.stderr


def test_a_public_name_that_went_out_of_use_is_still_there(monkeypatch):
    monkeypatch.setattr(cs, "_OLDER", {"clarify": "explain"})
    with goes("consilience.clarify", "consilience.explain"):
        assert cs.clarify is cs.explain
    assert cs.__version__ == version("consilience")
    with pytest.raises(AttributeError, match="no attribute 'clarified'"):
        _ = cs.clarified
