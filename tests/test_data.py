"""Finding, naming, labelling: files to samples, and box files line by line."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from consilience import data
from consilience.data import (
    Failure,
    find_images,
    label_from_name,
    names_of,
    read_image,
    read_samples,
    read_truth,
)
from consilience.types import Box, ConsilienceError

CLASSES = (
    "tench",
    "goldfish",
    "great white shark",
    "kite",
    "crane",
    "crane",
    "Jack-o'-lantern",
    "coot, marsh hen",
)


def save(path, colour=(10, 20, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")
    return path


# ---- reading and finding


def test_read_image_names_by_stem_unless_told(tmp_path):
    path = save(tmp_path / "dog.v2.png")
    assert read_image(path).name == "dog.v2"
    assert read_image(path, "x").name == "x"
    assert (read_image(path).pixels == (10, 20, 30)).all()


def test_folders_are_searched_to_the_bottom_in_order_without_hidden_files(tmp_path):
    for name in (
        "b/2.png",
        "b/1.JPG",
        "a.jpeg",
        "b/deep/er/3.webp",
        ".hidden.png",
        ".git/4.png",
    ):
        save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("x")
    found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path])]
    assert found == ["a.jpeg", "b/1.JPG", "b/2.png", "b/deep/er/3.webp"]


def test_a_named_file_is_tried_whatever_its_suffix_and_order_is_kept(tmp_path):
    text, hidden, last = (
        save(tmp_path / "z.txt"),
        save(tmp_path / ".a.png"),
        save(tmp_path / "a.png"),
    )
    assert find_images([str(text), str(hidden), str(last), str(text)]) == [
        text,
        hidden,
        last,
    ]


def test_patterns(tmp_path, monkeypatch):
    for name in ("x/1.png", "x/2.png", "y/1.png", "x/labels.csv", "x/odd.dat"):
        save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_images(["x/*"])] == ["x/1.png", "x/2.png"]
    assert [str(path) for path in find_images(["x/*.dat"])] == ["x/odd.dat"]
    assert [str(path) for path in find_images(["**/1.png"])] == ["x/1.png", "y/1.png"]
    assert [str(path) for path in find_images(["?"])] == [
        "x/1.png",
        "x/2.png",
        "y/1.png",
    ]
    assert [str(path) for path in find_images(["**"])] == [
        "x/1.png",
        "x/2.png",
        "y/1.png",
    ]


def test_a_file_named_like_a_pattern_is_a_file(tmp_path):
    path = save(tmp_path / "a[1].png")
    assert find_images([str(path)]) == [path]


def test_a_loop_of_links_ends_and_linked_folders_count(tmp_path):
    save(tmp_path / "real" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "set")
    assert [path.name for path in find_images([tmp_path / "set"])] == ["1.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["*.gif"], r"pattern \*.gif matches none"),
        (["empty"], "folder empty holds none"),
        (["a.png", "nowhere"], "nowhere does not exist"),
        ([], "no path was given"),
    ],
)
def test_nothing_found_says_what_was_looked_for(
    tmp_path, monkeypatch, names, message
):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConsilienceError, match=message) as caught:
        find_images(names)
    assert ".webp" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/dog.jpg", "a/cat.jpg"], ["dog", "cat"]),
        (["a/dog.jpg", "b/dog.jpg", "b/cat.jpg"], ["a/dog", "b/dog", "cat"]),
        (["x/a/dog.jpg", "y/a/dog.jpg"], ["x/a/dog", "y/a/dog"]),
        (["a/dog.jpg", "a/dog.png"], ["dog.jpg", "dog.png"]),
        (["a/dog.jpg", "a/dog.png", "b/dog.jpg"], ["dog.jpg", "dog.png", "dog"]),
        (["dog.jpg", "a/dog.jpg"], ["dog", "a/dog"]),
        (["a/Dog.jpg", "b/dog.jpg"], ["a/Dog", "b/dog"]),
        (["a/x.png.jpg", "a/x.png", "a/x.jpg"], ["a/x.png.jpg", "a/x.png", "x.jpg"]),
    ],
)
def test_names_are_unique_and_as_short_as_that_allows(files, names):
    found = names_of([data.Path(file) for file in files])
    assert len({name.casefold() for name in found}) == len(files)
    assert found == names


# ---- samples


def test_what_cannot_be_read_is_a_failure_and_the_rest_goes_on(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone")
    save(tmp_path / "d.png")
    found = list(read_samples([tmp_path]))
    assert [one.name for one in found] == ["a", "b", "c", "d"]
    assert [isinstance(one, Failure) for one in found] == [False, True, True, False]
    assert found[1].reason.endswith("b.png: the file is empty")
    assert found[2].reason.endswith("c.png: no such file")


def test_nothing_found_is_said_at_once_not_at_the_first_image(tmp_path):
    with pytest.raises(ConsilienceError):
        read_samples([tmp_path])


def test_images_are_read_one_by_one(tmp_path, monkeypatch):
    for n in range(3):
        save(tmp_path / f"{n}.png")
    read = []
    monkeypatch.setattr(
        data,
        "read_image",
        lambda path, name, *more: read.append(name) or read_image(path, name, *more),
    )
    stream = read_samples([tmp_path])
    next(stream)
    assert read == ["0"]


def test_hostile_folder(shared):
    found = list(read_samples([shared / "hostile"]))
    failed = {one.name for one in found if isinstance(one, Failure)}
    assert failed == {"truncated", "empty", "not-an-image", "bomb"}
    assert "with space & ünïcode" in {one.name for one in found} - failed


# ---- labels by name


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("n01443537_goldfish.JPEG", 1),
        ("n01484850_Great_White-Shark.JPEG", 2),
        ("n01608432_kite.JPEG", 3),
        ("n03590841_jack_o_lantern.JPEG", 6),
        ("n03590841_jack-o'-lantern.JPEG", 6),
        ("n02012849_crane.JPEG", None),
        ("n02018207_coot.JPEG", 7),
        ("n01443537_fish.JPEG", None),
        ("n01443537.JPEG", None),
        ("goldfish.JPEG", None),
    ],
)
def test_label_from_name(name, label):
    assert label_from_name(name, CLASSES) == label


def test_the_studys_ten_names_are_found_in_torchvisions_classes(shared):
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    with (shared / "imagenet-boxes" / "classes.csv").open() as file:
        by_wnid = {
            row["wnid"]: int(row["class_index"]) for row in csv.DictReader(file)
        }
    found = list(read_samples([shared / "imagenet10"], classes=_IMAGENET_CATEGORIES))
    assert len(found) == 10
    for one in found:
        assert one.label == by_wnid[one.name.partition("_")[0]]


# ---- box files


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "boxes.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_rows_of_an_image_are_its_boxes(tmp_path):
    text = "image,wnid,class_index,x0,y0,x1,y1\na.png,n1,3,0,1,4.5,6\nb.png,n2,1,0,0,2,2\na.png,n1,3,2,2,3,3\n"
    truth = read_truth(write(tmp_path, text), CLASSES)
    assert truth.of("dir/a.png").boxes == (Box(3, 0, 1, 4.5, 6), Box(3, 2, 2, 3, 3))
    assert truth.of("a.png").label == 3
    assert truth.of("b.png").label == 1
    assert truth.of("c.png") is None
    assert truth.notes == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_order_case_marks_and_byte_order_mark_do_not_matter(tmp_path, encoding, mark):
    text = (
        "Y1,x0,CLASS,image,x1,y0\n6,0,Great_white_shark,./d\\a.png,4,1\n\n".replace(
            ",", mark
        )
    )
    known = read_truth(write(tmp_path, text, encoding), CLASSES).of("x/d/a.png")
    assert known.boxes == (Box(2, 0, 1, 4, 6),)


def test_boxes_are_optional_and_unused_columns_are_said(tmp_path):
    truth = read_truth(
        write(tmp_path, "image,class_index,pose,difficult\na,0,l,1\n"), CLASSES
    )
    assert truth.of("a.jpg") == data.KnownTruth(0)
    assert truth.notes == ("columns not used: pose, difficult",)
    mixed = read_truth(
        write(tmp_path, "image,class_index,x0,y0,x1,y1\na,0,,,,\nb,1,0,0,1,1\n")
    )
    assert mixed.of("a").boxes == ()
    assert mixed.of("b").boxes == (Box(1, 0, 0, 1, 1),)


def test_the_longest_path_wins(tmp_path):
    truth = read_truth(write(tmp_path, "image,class_index\na.png,0\nval/a.png,1\n"))
    assert truth.of("/set/val/a.png").label == 1
    assert truth.of("/set/train/a.png").label == 0
    assert truth.of("/set/interval/a.png").label == 0


def test_several_classes_in_an_image_the_first_is_its_label_and_it_is_noted(tmp_path):
    save(tmp_path / "a.png")
    truth = read_truth(
        write(
            tmp_path,
            "image,class_index,x0,y0,x1,y1\na.png,4,0,0,2,2\na.png,1,1,1,3,3\n",
        )
    )
    (sample,) = read_samples([tmp_path / "a.png"], truth)
    assert sample.label == 4
    assert [box.index for box in sample.boxes] == [4, 1]
    assert sample.notes == ("boxes of 2 classes; its label is the first one's",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks image, class_index"),
        ("image,class_index\n", "a header and no rows"),
        ("file,class_index\na,0\n", "lacks image; its columns are file, class_index"),
        ("image,x0,y0,x1,y1\na,0,0,1,1\n", r"lacks class_index \(or class\)"),
        ("image,class_index,x0,y0,x1\na,0,0,0,1\n", "lacks y1"),
        ("image,image,class_index\na,a,1\n", "image more than once"),
        ("image,class_index\na,0\nb\n", "line 3 has 1 values for 2 columns"),
        ("image,class_index\na,8\n", "line 2: class_index is 0 to 7; got '8'"),
        ("image,class_index\na,-1\n", "line 2: class_index is 0 to 7; got '-1'"),
        ("image,class_index\na,1.5\n", "got '1.5'"),
        ("image,class_index\na,\n", "no class ''"),
        (
            "image,class\na,goldfsh\n",
            "line 2: no class 'goldfsh'; did you mean 'goldfish'",
        ),
        (
            "image,class\na,crane\n",
            "class 'crane' is number 4 and 5; give class_index",
        ),
        ("image,class_index\n,1\n", "line 2 names no image"),
        (
            "image,class_index,x0,y0,x1,y1\na,0,0,0,x,1\n",
            "line 2: a box is four numbers; got 0, 0, x, 1",
        ),
        ("image,class_index,x0,y0,x1,y1\na,0,0,,1,1\n", "a box is four numbers"),
        (
            "image,class_index,x0,y0,x1,y1\na,0,4,0,2,1\n",
            "a box has x0 < x1 and y0 < y1; got 4, 0, 2, 1",
        ),
        ("image,class_index,x0,y0,x1,y1\na,0,0,1,2,1\n", "a box has x0 < x1"),
        ("image,class_index,x0,y0,x1,y1\na,0,0,0,nan,1\n", "a box has x0 < x1"),
        ("image,class_index,x0,y0,x1,y1\na,0,0,0,inf,1\n", "a box has x0 < x1"),
    ],
)
def test_a_bad_box_file_says_where(tmp_path, text, message):
    with pytest.raises(ConsilienceError, match=message):
        read_truth(write(tmp_path, text), CLASSES)


def test_a_box_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConsilienceError, match="cannot be read"):
        read_truth(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_bytes(b"image\xff\xfe")
    with pytest.raises(ConsilienceError, match="cannot be read"):
        read_truth(tmp_path / "bad.csv")


def test_boxes_are_held_to_the_image_and_foreign_sizes_are_refused(tmp_path):
    save(tmp_path / "a.png", size=(8, 6))
    save(tmp_path / "b.png", size=(8, 6))
    rows = "a.png,0,-0.4,0,8.6,6.9\nb.png,0,0,0,16,12\n"
    first, second = read_samples(
        [tmp_path],
        read_truth(write(tmp_path, f"image,class_index,x0,y0,x1,y1\n{rows}")),
    )
    assert first.boxes == (Box(0, 0, 0, 8, 6),)
    assert isinstance(second, Failure)
    assert (
        "box 0, 0, 16, 12 lies outside of the image's 8 x 6 pixels" in second.reason
    )


def test_truth_goes_before_the_files_name(tmp_path):
    save(tmp_path / "n01443537_goldfish.JPEG")
    truth = read_truth(
        write(tmp_path, "image,class_index\nn01443537_goldfish.JPEG,0\n")
    )
    assert (
        next(
            read_samples([tmp_path / "n01443537_goldfish.JPEG"], truth, CLASSES)
        ).label
        == 0
    )
    assert (
        next(
            read_samples([tmp_path / "n01443537_goldfish.JPEG"], None, CLASSES)
        ).label
        == 1
    )
    assert next(read_samples([tmp_path / "n01443537_goldfish.JPEG"])).label is None


def test_the_three_hundred_images_and_their_boxes(shared):
    folder = shared / "imagenet-boxes"
    truth = read_truth(folder / "boxes.csv", [str(n) for n in range(1000)])
    with (folder / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(len(known.boxes) for known in truth.images.values()) == len(rows)
    found = list(read_samples([folder / "images"], truth))
    assert len(found) == 300
    assert not [one.reason for one in found if isinstance(one, Failure)]
    kept = sum(
        (box.x1 - box.x0) * (box.y1 - box.y0) for one in found for box in one.boxes
    )
    told = sum(
        (float(r["x1"]) - float(r["x0"])) * (float(r["y1"]) - float(r["y0"]))
        for r in rows
    )
    assert kept == pytest.approx(told, rel=1e-3)


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="everybody may read everything here"
)
def test_a_folder_that_may_not_be_read(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ConsilienceError, match="the folder cannot be read"):
        find_images([tmp_path])


def test_a_large_list_of_names_is_quick():
    files = [data.Path(f"set/{n % 100}/{n}.png") for n in range(20000)]
    assert names_of(files)[:2] == ["0", "1"]
    assert np.unique(names_of(files)).size == 20000
