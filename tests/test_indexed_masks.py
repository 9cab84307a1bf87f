"""Masks of class numbers as VOC, Cityscapes and CamVid have them."""

import json

import numpy as np
import pytest
from PIL import Image

import consilience as cs
from consilience.dissection.concepts import load_concepts
from consilience.types import ConsilienceError

NUMBERS = np.zeros((56, 112), np.uint8)
NUMBERS[:28, :56] = 12
NUMBERS[28:, :56] = 255
NUMBERS[:, 100:] = 7


def photograph(path, size=(112, 56)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 40)).save(path)


def mask(path, numbers=NUMBERS, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(numbers)
    if palette:
        made = made.convert("P") if made.mode != "P" else made
        made = Image.fromarray(numbers, mode="P")
        # two numbers of one colour: only the index tells them apart
        made.putpalette([0, 0, 0] * 256)
    made.save(path)


def shown(concepts, index=0):
    """By name of concept, the pixels of its mask on the label grid."""
    labels = concepts.labels(index)
    return {
        concepts.concepts[place].name: int(on.sum())
        for place, on in zip(labels.present, labels.masks, strict=True)
    }


def test_pascal_voc(tmp_path):
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        photograph(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in ("2007_000001", "2007_000002"):
        mask(tmp_path / "SegmentationClass" / f"{name}.png", palette=True)
    concepts = load_concepts(tmp_path)
    assert concepts.spec.startswith("indexed:")
    assert len(concepts) == 2
    assert len(concepts.concepts) == 20
    assert concepts.notes == ("1 images have no mask and are passed over",)
    # 12 is dog, 7 car; background and the border's 255 are unlabelled; the label grid is
    # 112 x 112, so that a row of the mask is two
    assert shown(concepts) == {"dog": 56 * 56, "car": 12 * 112}
    assert concepts.categories == ("object",)


def test_cityscapes_names_in_city_folders(tmp_path):
    for city in ("ulm", "bonn"):
        photograph(tmp_path / "leftImg8bit" / city / f"{city}_0_leftImg8bit.png")
        for ending, numbers in (
            ("gtFine_labelIds", NUMBERS),
            ("gtFine_instanceIds", NUMBERS + 1),
        ):
            mask(tmp_path / "gtFine" / city / f"{city}_0_{ending}.png", numbers)
    (tmp_path / "names.txt").write_text("7 road\n12: wall\n0 -\n")
    spec = (
        f"indexed:{tmp_path},images=leftImg8bit,labels=gtFine,category=stuff,"
        "image_ending=_leftImg8bit,label_ending=_gtFine_labelIds"
    )
    concepts = load_concepts(spec)
    assert concepts.names == (
        "bonn/bonn_0_leftImg8bit.png",
        "ulm/ulm_0_leftImg8bit.png",
    )
    assert shown(concepts) == {"wall": 56 * 56, "road": 12 * 112}
    assert concepts.categories == ("stuff",)
    # without the endings nothing can be paired, and it says which two names it saw
    with pytest.raises(ConsilienceError, match="image_ending= and label_ending="):
        load_concepts(f"indexed:{tmp_path},images=leftImg8bit,labels=gtFine")


def test_camvid_in_colours(tmp_path):
    photograph(tmp_path / "images" / "a.png")
    colours = np.zeros((56, 112, 3), np.uint8)
    colours[:28] = (64, 128, 64)
    colours[28:, :56] = (192, 0, 128)
    mask(tmp_path / "labels" / "a_L.png", colours)
    (tmp_path / "label_colors.txt").write_text(
        "64 128 64\tAnimal\n192 0 128\tArchway\n0 0 0 -\n"
    )
    concepts = load_concepts(f"indexed:{tmp_path},label_ending=_L")
    assert shown(concepts) == {"Animal": 112 * 56, "Archway": 56 * 56}


def test_number_zero_is_a_class_where_it_has_a_name(tmp_path):
    photograph(tmp_path / "images" / "a.png")
    numbers = np.zeros((56, 112), np.uint16)
    numbers[:, 56:] = 1
    mask(tmp_path / "labels" / "a.png", numbers)
    (tmp_path / "names.json").write_text(json.dumps(["sky", "building"]))
    assert shown(load_concepts(tmp_path)) == {"sky": 56 * 112, "building": 56 * 112}
    ignored = load_concepts(f"indexed:{tmp_path},ignore=1+255")
    assert shown(ignored) == {"sky": 56 * 112}
    assert ignored.id != load_concepts(tmp_path).id


def test_csv_of_numbers_and_names(tmp_path):
    photograph(tmp_path / "images" / "a.png")
    mask(tmp_path / "labels" / "a.png")
    (tmp_path / "names.csv").write_text("name,number\ncar,7\nwall,12\n")
    assert shown(load_concepts(tmp_path)) == {"wall": 56 * 56, "car": 12 * 112}


def broken(tmp_path, names="sky\nwall\n", numbers=NUMBERS, file="labels/a.png"):
    photograph(tmp_path / "images" / "a.png")
    mask(tmp_path / file, numbers)
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
    concepts = load_concepts(tmp_path)
    return [concepts.labels(index) for index in range(len(concepts))]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({}, r"holds the number 7, which has no name; names go from 0 to 1"),
        ({"names": None}, "no list of what the numbers are called"),
        ({"names": ""}, "names no class"),
        ({"names": "0 0 0 a\n0 0 0 b\n"}, "gives one colour to two names"),
        ({"names": "1 2 3 a\n"}, "has one channel; its list names colours"),
        ({"file": "labels/b.png"}, "none of 1 images in images has a mask in labels"),
        (
            {
                "numbers": np.random.default_rng(0).integers(
                    0, 9, (56, 112, 3), np.uint8
                )
            },
            "it is in colour",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, what, words):
    with pytest.raises(ConsilienceError, match=words):
        broken(tmp_path, **what)


def test_masks_without_an_image_are_said(tmp_path):
    photograph(tmp_path / "images" / "a.png")
    for name in ("a", "b", "c"):
        mask(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "names.txt").write_text("7 car\n12 wall\n")
    with pytest.raises(ConsilienceError, match="2 of 3 masks have no image"):
        load_concepts(tmp_path)


def test_a_dissection_of_index_masks(tmp_path):
    """A unit that is red where the masks say so detects it."""
    from oracles_dissection import small_model

    rng = np.random.default_rng(0)
    for number in range(24):
        numbers = np.zeros((64, 64), np.uint8)
        top, left = rng.integers(0, 40, 2)
        numbers[top : top + 20, left : left + 20] = 1 + number % 2
        pixels = np.full((64, 64, 3), 60, np.uint8)
        pixels[numbers == 1] = (220, 30, 30)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        mask(tmp_path / "labels" / f"{number}.png", numbers)
    (tmp_path / "names.txt").write_text("-\nred thing\ngrey thing\n")
    found = cs.dissect(
        small_model(), ["act"], tmp_path, min_images=5, quantile=0.95, permutations=19
    )
    assert {one.name for one in found.concepts if one.eligible} == {
        "red thing",
        "grey thing",
    }
    assert found.table()["iou"].max() > 0.3


def test_an_image_of_ignored_numbers_alone_is_not_annotated(tmp_path):
    for name, number in (("a", 7), ("b", 12)):
        photograph(tmp_path / "images" / f"{name}.png")
        mask(
            tmp_path / "labels" / f"{name}.png", np.full((56, 112), number, np.uint8)
        )
    (tmp_path / "names.txt").write_text("7 car\n12 wall\n")
    concepts = load_concepts(f"indexed:{tmp_path},ignore=12")
    assert [concepts.labels(index).annotated.tolist() for index in (0, 1)] == [
        [True],
        [False],
    ]
