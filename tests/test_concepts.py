"""Concept sets: every layout read as it was written, and what is wrong with one said in
one line.
"""

import csv
import json

import numpy as np
import pytest
from oracles_dissection import LABELS, cross, small_broden, write_png
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

import consilience as cs
from consilience.dissection.concepts import ConceptSet, concept_sets, load_concepts
from consilience.dissection.sets.drawn import COLOURS
from consilience.images import Placement
from consilience.registry import parse
from consilience.types import ConsilienceError


def shown(concepts, index, **how):
    """{(name, category): mask}, whole-image labels as full masks."""
    labels = concepts.labels(index, **how)
    known = {one.index: (one.name, one.category) for one in concepts.concepts}
    masks = {
        known[int(place)]: mask
        for place, mask in zip(labels.present, labels.masks, strict=True)
    }
    return masks | {
        known[place]: np.ones(concepts.grid, dtype=bool) for place in labels.whole
    }


def refused(source, *words):
    with pytest.raises(ConsilienceError) as caught:
        load_concepts(source)
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


# ---- Broden


@pytest.fixture
def folder(tmp_path):
    return small_broden(tmp_path / "set")


def raw(folder, name):
    pixels = np.array(Image.open(folder / "images" / name)).astype(int)
    return pixels[:, :, 0] + 256 * pixels[:, :, 1]


def test_broden_holds_what_its_files_say(folder):
    concepts = load_concepts(folder)
    assert [(one.name, one.category) for one in concepts.concepts] == [
        ("sky", "object"),
        ("wheel", "object"),
        ("wheel", "part"),
        ("door", "part"),
        ("crimson", "color"),
        ("grey", "color"),
        ("teal", "color"),
        ("street", "scene"),
        ("forest", "scene"),
    ]
    assert concepts.grid == (16, 16)
    assert concepts.names[3] == "p3.png"
    with (folder / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    for index, row in enumerate(rows):
        expected = {}
        for one in concepts.concepts:
            for cell in filter(None, row[one.category].split(";")):
                same = (
                    np.full((16, 16), int(cell))
                    if cell.isdecimal()
                    else raw(folder, cell)
                )
                mask = same == one.number
                if mask.any():
                    expected[one.name, one.category] = (
                        expected.get((one.name, one.category), False) | mask
                    )
        found = shown(concepts, index)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
        annotated = concepts.labels(index).annotated
        assert {concepts.categories[k] for k in np.flatnonzero(annotated)} == {
            category for _, category in expected
        }


def test_a_label_of_the_whole_image_covers_its_own_map(folder):
    concepts = load_concepts(folder)
    labels = concepts.labels(5)
    door = next(one.index for one in concepts.concepts if one.name == "door")
    assert door in labels.whole
    assert door not in labels.present


def test_labels_without_a_name_are_no_concepts(folder):
    concepts = load_concepts(folder)
    assert LABELS[4][0] == "-"
    assert not any(one.number == 4 for one in concepts.concepts)
    assert concepts.notes == ("labels without a name, which never win: 1",)


def test_samples_are_read_one_at_a_time(folder):
    concepts = load_concepts(folder)
    assert len(concepts.samples) == len(concepts) == 12
    assert concepts.samples[-1].name == "p11.png"
    assert [one.name for one in concepts.samples[2:4]] == ["p2.png", "p3.png"]
    assert np.array_equal(
        concepts.samples[1].pixels, np.array(Image.open(folder / "images" / "p1.png"))
    )
    some = concepts.subset([4, 2])
    assert some.names == ("p4.png", "p2.png")
    assert np.array_equal(some.labels(1).masks, concepts.labels(2).masks)
    assert some.id != concepts.id


def test_labels_move_into_a_cropped_frame(folder):
    concepts = load_concepts(folder)
    # 32 pixels resized to 64 of which the middle 32 are seen: labels 4 to 12 of 16,
    # each twice
    moved = shown(
        concepts, 1, geometry=Placement((32, 32), (64, 64), (16, 16), (32, 32))
    )
    for key, mask in shown(concepts, 1).items():
        window = np.kron(mask[4:12, 4:12], np.ones((2, 2), dtype=bool))
        assert np.array_equal(moved.get(key, np.zeros((16, 16), dtype=bool)), window)


def test_a_split_of_broden(folder):
    rows = (folder / "index.csv").read_text().replace("p1.png,train", "p1.png,val")
    (folder / "index.csv").write_text(rows)
    assert load_concepts(f"broden:path={folder},split=val").names == ("p1.png",)
    refused(
        f"broden:path={folder},split=test",
        "no images of split 'test'; there is train, val",
    )


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_what_is_wrong_with_a_broden_is_said(folder, tmp_path):
    kept = {
        name: (folder / name).read_text()
        for name in ("index.csv", "label.csv", "category.csv", "c_part.csv")
    }

    def back():
        for name, text in kept.items():
            (folder / name).write_text(text)

    edit(folder / "index.csv", "p2.png", "p2x.png")
    refused(folder, "1 file", "p2x.png")
    back()
    edit(folder / "index.csv", ",310", ",999")
    refused(folder, "scene number 999", "1 to 311")
    back()
    edit(folder / "label.csv", "number,name", "nr,name")
    refused(folder, "lacks number", "nr, name")
    back()
    edit(folder / "c_part.csv", ",3,door", ",77,door")
    refused(folder, "c_part.csv lists number 77")
    back()
    edit(folder / "category.csv", "object", "thing")
    refused(folder, "no column for category 'thing'")
    back()
    (folder / "c_part.csv").unlink()
    refused(folder, "c_part.csv", "No such file")
    (folder / "images" / "p3.png").unlink()
    back()
    refused(folder, "the first is", "p3.png")
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "no index.csv (Broden)")


def test_a_label_map_with_a_number_that_is_no_label_is_refused_when_it_is_read(
    folder,
):
    concepts = load_concepts(folder)
    write_png(folder / "images" / "p1_object_0.png", np.full((16, 16), 999))
    with pytest.raises(
        ConsilienceError,
        match=r"p1\.png: its object labels hold number 999; .* from 1 to 311",
    ):
        concepts.labels(1)
    write_png(folder / "images" / "p2_object_0.png", np.full((8, 16), 1))
    with pytest.raises(ConsilienceError, match=r"is 8 x 16; index\.csv says 16 x 16"):
        concepts.labels(2)


@pytest.mark.slow
def test_the_real_layout_counts_as_its_own_tables_say(shared):
    concepts = load_concepts(shared / "concepts")
    assert (len(concepts), len(concepts.concepts), concepts.grid) == (
        1799,
        109,
        (112, 112),
    )
    images, coverage = np.zeros(109), np.zeros(109)
    for index in range(len(concepts)):
        labels = concepts.labels(index)
        sizes = labels.masks.mean(axis=(1, 2))
        images[labels.present] += 1
        coverage[labels.present] += sizes
        images[list(labels.whole)] += 1
        coverage[list(labels.whole)] += 1
    for category in concepts.categories:
        with (shared / "concepts" / f"c_{category}.csv").open() as file:
            told = {
                row["name"]: (float(row["frequency"]), float(row["coverage"]))
                for row in csv.DictReader(file)
            }
        own = {
            one.name: (images[one.index], coverage[one.index])
            for one in concepts.concepts
            if one.category == category
        }
        assert own.keys() == told.keys()
        assert all(own[name] == pytest.approx(told[name], abs=1e-3) for name in told)


def test_some_of_the_real_layout(shared):
    concepts = cs.load_concepts(shared / "concepts")
    assert concepts.categories == ("color", "object", "part", "material", "texture")
    banded = concepts.names.index("dtd/banded_0002.jpg")
    assert ("banded", "texture") in shown(concepts, banded)
    assert shown(concepts, banded)["banded", "texture"].all()
    assert load_concepts(concepts.spec).id == concepts.id


# ---- mask folders and ADE20K


def image(path, size=(20, 30), value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def box(size, window):
    mask = np.zeros(size, dtype=bool)
    mask[window] = True
    return mask


def on_grid(mask, grid=(112, 112)):
    rows = ((np.arange(grid[0]) + 0.5) * mask.shape[0] / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * mask.shape[1] / grid[1]).astype(int)
    return mask[np.ix_(rows, columns)]


def test_folders_of_masks(tmp_path):
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
    first, second = box((20, 30), np.s_[2:9, 5:20]), box((10, 15), np.s_[4:, :7])
    for name, mask in (("dog/a", first), ("animal/cat/a", second), ("dog/b", second)):
        file = tmp_path / "masks" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    concepts = load_concepts(tmp_path)
    assert concepts.categories == ("animal", "concept")
    found = shown(concepts, 0)
    assert found.keys() == {("dog", "concept"), ("cat", "animal")}
    assert np.array_equal(found["dog", "concept"], on_grid(first))
    assert np.array_equal(found["cat", "animal"], on_grid(second))
    assert concepts.labels(1).annotated.tolist() == [False, True]
    Image.fromarray(first).save(tmp_path / "masks" / "dog" / "c.png")
    refused(tmp_path, "there is no image 'c'")


def test_ade20k_for_scene_parsing(tmp_path):
    image(tmp_path / "images" / "training" / "x.jpg")
    numbers = np.kron(np.array([[0, 1], [2, 150]]), np.ones((10, 15), dtype=int))
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    Image.fromarray(numbers.astype(np.uint8)).save(
        tmp_path / "annotations" / "training" / "x.png"
    )
    lines = [
        "Idx\tRatio\tTrain\tVal\tName",
        "1\t0.15\t11\t1\twall",
        "2\t0.1\t6\t7\tbuilding, edifice",
        "150\t0.1\t6\t7\tflag",
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    found = shown(load_concepts(tmp_path), 0)
    assert found.keys() == {
        ("wall", "object"),
        ("building", "object"),
        ("flag", "object"),
    }
    assert np.array_equal(found["building", "object"], on_grid(numbers == 2))
    (tmp_path / "annotations" / "training" / "x.png").unlink()
    refused(tmp_path, "annotations", "x.png")


def ade_png(path, classes, instances):
    pixels = np.stack([classes // 256 * 10, classes % 256, instances], axis=2).astype(
        np.uint8
    )
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("release", [2016, 2021])
def test_ade20k_in_full(tmp_path, release):
    place = tmp_path / "images" / "training" / "street"
    image(place / "ADE_1.jpg")
    classes = np.kron(np.array([[0, 976], [976, 2978]]), np.ones((10, 15), dtype=int))
    instances = np.kron(np.array([[0, 40], [90, 200]]), np.ones((10, 15), dtype=int))
    ade_png(place / "ADE_1_seg.png", classes, instances)
    parts = np.where(box((20, 30), np.s_[12:18, 20:25]), 1530, 0)
    ade_png(place / "ADE_1_parts_1.png", parts, (parts > 0) * 255)
    if release == 2016:
        lines = [
            '001 # 0 # 0 # car, auto # car # ""',
            '002 # 0 # 1 # car, auto # car # ""',
            '003 # 0 # 0 # tree # tree # ""',
            '001 # 1 # 0 # wheel # wheel # ""',
        ]
        (place / "ADE_1_atr.txt").write_text("\n".join(lines))
    else:
        rows = [
            ("car, auto", 976, False),
            ("tree", 2978, False),
            ("wheel", 1530, True),
        ]
        told = [
            {"name": name, "name_ndx": number, "parts": {"ispart": part}}
            for name, number, part in rows
        ]
        (place / "ADE_1.json").write_text(
            json.dumps({"annotation": {"object": told}})
        )
    concepts = load_concepts(tmp_path)
    found = shown(concepts, 0)
    assert concepts.categories == ("object", "part")
    assert found.keys() == {("car", "object"), ("tree", "object"), ("wheel", "part")}
    assert np.array_equal(found["car", "object"], on_grid(classes == 976))
    assert np.array_equal(found["wheel", "part"], on_grid(parts > 0))
    (place / ("ADE_1_atr.txt" if release == 2016 else "ADE_1.json")).unlink()
    refused(tmp_path, "its labels have no names")


# ---- COCO


def coco(tmp_path, annotations, name="instances_val2017.json", **extra):
    for one in ("1.jpg", "2.jpg"):
        image(tmp_path / "val2017" / one)
    told = {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 30}
            for n in (1, 2)
        ],
        "categories": [
            {"id": 17, "name": "cat", **extra.get("cat", {})},
            {"id": 90, "name": "sea", **extra.get("sea", {})},
        ],
        "annotations": annotations,
    }
    file = tmp_path / "annotations" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(told))
    return file


def test_coco_instances_are_their_polygons_and_run_lengths(tmp_path):
    polygon = [4, 3, 20, 3, 20, 12, 4, 12]
    blob = box((20, 30), np.s_[8:16, 10:28])
    packed = coco_mask.encode(np.asfortranarray(blob.astype(np.uint8)))
    packed["counts"] = packed["counts"].decode()
    runs, last, count = [], 0, 0
    for pixel in cross(20)[:, :18].astype(int).ravel(order="F"):
        if pixel == last:
            count += 1
        else:
            runs, last, count = [*runs, count], pixel, 1
    plain = {"size": [20, 18], "counts": [*runs, count]}
    annotations = [
        {"image_id": 1, "category_id": 17, "segmentation": [polygon]},
        {"image_id": 1, "category_id": 17, "segmentation": packed},
    ]
    concepts = load_concepts(coco(tmp_path, annotations))
    assert concepts.names == ("1.jpg",)
    drawn = Image.new("1", (30, 20))
    ImageDraw.Draw(drawn).rectangle((4, 3, 19, 11), fill=1)
    assert np.array_equal(
        shown(concepts, 0)["cat", "object"], on_grid(np.array(drawn) | blob)
    )
    from consilience.dissection.sets.coco import _decoded

    assert np.array_equal(_decoded(plain, (20, 18)), cross(20)[:, :18])


def test_coco_panoptic(tmp_path):
    segments = np.kron(
        np.array([[0, 70_000], [300, 301]]), np.ones((10, 15), dtype=int)
    )
    pixels = np.stack(
        [segments % 256, segments // 256 % 256, segments // 65536], axis=2
    ).astype(np.uint8)
    infos = [
        {"id": 70_000, "category_id": 17},
        {"id": 300, "category_id": 90},
        {"id": 301, "category_id": 17},
    ]
    annotations = [{"image_id": 2, "file_name": "2.png", "segments_info": infos}]
    file = coco(
        tmp_path,
        annotations,
        "panoptic_val2017.json",
        cat={"isthing": 1},
        sea={"isthing": 0},
    )
    refused(file, "no folder panoptic_val2017 beside it")
    (tmp_path / "annotations" / "panoptic_val2017").mkdir()
    Image.fromarray(pixels).save(
        tmp_path / "annotations" / "panoptic_val2017" / "2.png"
    )
    concepts = load_concepts(file)
    found = shown(concepts, 0)
    assert concepts.categories == ("object", "stuff")
    assert np.array_equal(
        found["cat", "object"], on_grid((segments == 70_000) | (segments == 301))
    )
    assert np.array_equal(found["sea", "stuff"], on_grid(segments == 300))


def test_what_is_wrong_with_a_coco_file_is_said(tmp_path):
    one = {"image_id": 1, "category_id": 5, "segmentation": []}
    refused(coco(tmp_path, [one]), "image 1 shows category 5")
    file = coco(tmp_path, [{**one, "category_id": 17}])
    (tmp_path / "val2017" / "1.jpg").unlink()
    refused(file, "1.jpg")
    refused(f"coco:path={file},images={tmp_path / 'other'}", "1.jpg")
    file.write_text("{}")
    refused(file, "lacks images, annotations, categories")
    file.write_text("no")
    refused(file, "cannot be read as JSON")


# ---- drawn


def test_drawn_colours_are_exactly_where_they_are_painted():
    concepts = load_concepts("drawn:images=12,size=48,items=6")
    seen = set()
    for index in range(len(concepts)):
        pixels, masks = concepts.sample(index).pixels, shown(concepts, index)
        for name, colour in COLOURS.items():
            painted = (pixels == colour).all(axis=2)
            assert np.array_equal(
                masks.get((name, "color"), np.zeros((48, 48), dtype=bool)), painted
            )
            seen |= {name} if painted.any() else set()
        textured = sum(
            (mask for (_, category), mask in masks.items() if category == "texture"),
            np.zeros((48, 48), int),
        )
        two_greys = np.isin(pixels, (40, 215)).all(axis=2)
        assert np.array_equal(textured > 0, two_greys)
        assert textured.max() <= 1
        shapes = sum(
            mask for (_, category), mask in masks.items() if category == "shape"
        )
        coloured = sum(
            (mask for (_, category), mask in masks.items() if category == "color"),
            np.zeros((48, 48), int),
        )
        assert np.array_equal(shapes, textured + coloured)
    assert len(seen) == len(COLOURS)


def test_a_drawn_set_is_the_same_for_a_seed_and_another_for_another():
    first, again, other = (
        load_concepts(f"drawn:images=3,size=32,seed={seed}") for seed in (1, 1, 2)
    )
    assert first.sample(2).pixels.tobytes() == again.sample(2).pixels.tobytes()
    assert first.sample(2).pixels.tobytes() != other.sample(2).pixels.tobytes()
    assert first.id == again.id != other.id
    assert load_concepts(first.spec).id == first.id
    longer = load_concepts("drawn:images=9,size=32,seed=1")
    assert longer.sample(2).pixels.tobytes() == first.sample(2).pixels.tobytes()


def test_drawn_colours_and_textures_are_rarer_than_half_a_percent():
    concepts = load_concepts("drawn:images=60,size=64")
    pixels = np.zeros(len(concepts.concepts))
    for index in range(len(concepts)):
        labels = concepts.labels(index)
        pixels[labels.present] += labels.masks.sum(axis=(1, 2))
    share = {
        one.name: pixels[one.index] / (60 * 64 * 64)
        for one in concepts.concepts
        if one.category != "shape"
    }
    assert max(share.values()) < 0.005
    assert min(share.values()) > 0


@pytest.mark.parametrize(
    "spec", ["drawn:images=0", "drawn:size=16", "drawn:colour=red", "dawn"]
)
def test_wrong_specs_are_refused(spec):
    refused(spec, "drawn")


def test_every_kind_of_set_has_a_spelling():
    kinds = ("ade20k", "broden", "coco", "drawn", "folder", "indexed")
    assert concept_sets.names() == kinds
    assert parse(load_concepts("drawn:images=3").spec).name == "drawn"
    assert isinstance(load_concepts("drawn"), ConceptSet)
    whole = load_concepts("drawn")
    assert load_concepts(whole) is whole
