"""The verbs dissect and compare on drawn concepts and a small network: what is kept,
how it goes on, what the page shows.
"""

import base64
import io
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import consilience as cs
from consilience.cli import main
from consilience.dissection.concepts import load_concepts
from consilience.dissection.tally import unit_masks
from consilience.models.load import load_model
from consilience.runs import dissect as jobs
from consilience.runs.dissect import DissectionRun
from consilience.runs.folder import Run
from consilience.show import colours, unit_tiles
from consilience.types import ConsilienceError

MODULE = """
import numpy as np
import torch
from conftest import RedFinder

def red():
    torch.manual_seed(0)
    return RedFinder()

def other():
    torch.manual_seed(1)
    module = red()
    with torch.no_grad():
        module.mix.weight.copy_(module.mix.weight.flip(0))
    return module

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

class Colours:
    id = "colours@1"
    def images(self, images):
        return torch.stack([torch.from_numpy(image / 255).float().mean(dim=(0, 1)) + 0.01 for image in images])
    def words(self, words):
        return torch.tensor([COLOURS[word] for word in words]).float()
"""
CONCEPTS = "drawn:images=30,size=64"
QUICK = (
    "--permutations",
    "19",
    "--min-images",
    "3",
    "--engine",
    "torch",
    "-l",
    "mix",
    "-l",
    "last",
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with the models, a word list and groups of classes."""
    folder = tmp_path_factory.mktemp("dissect")
    (folder / "own_dissected.py").write_text(MODULE)
    (folder / "words.txt").write_text("red\ngreen\nblue\n")
    (folder / "groups.csv").write_text(
        "concept,class\n"
        + "".join(f"{name},class 1\n" for name in ("red", "green", "blue"))
    )
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_dissected", None)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def dissect(here, name, *more, model="own_dissected:red"):
    return run("dissect", CONCEPTS, "-m", model, *QUICK, *more, "-o", here / name)


@pytest.fixture(scope="module")
def whole(here):
    """A run with everything."""
    words = (
        "--words",
        here / "words.txt",
        "--encoder",
        "own_dissected:Colours",
        "--similarity",
        "soft-wpmi:top=8",
    )
    code = dissect(
        here,
        "whole",
        *words,
        "--knockout",
        "--knockout-images",
        "12",
        "--groups",
        here / "groups.csv",
    )
    assert code == 0
    return DissectionRun(here / "whole")


@pytest.fixture(scope="module")
def second(here):
    assert (
        dissect(here, "second", "--against", "random", model="own_dissected:other")
        == 0
    )
    return DissectionRun(here / "second")


# ---- what is kept


def test_a_run_keeps_everything_and_the_manifest_is_last(whole):
    folder = whole.folder
    kept = {path.name for path in folder.iterdir()}
    assert kept >= {
        "job.json",
        "run.json",
        "dissection.json",
        "units.parquet",
        "words.parquet",
        "knockout.parquet",
        "report.html",
    }
    assert {
        "mix.csv",
        "last.csv",
        "top.parquet",
        "scores.parquet",
        "concepts.parquet",
    } <= kept
    assert not [name for name in kept if name.endswith(".part")]
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["kind"] == "dissection"
    last = max(
        folder.rglob("*"),
        key=lambda path: path.stat().st_mtime_ns if path.is_file() else 0,
    )
    assert last.name == "report.html"
    made = sorted(
        (path.stat().st_mtime_ns, path.name)
        for path in folder.rglob("*")
        if path.is_file()
    )
    assert [name for _, name in made][-2:] == ["run.json", "report.html"]


def test_units_have_concept_word_and_loss(whole):
    units = whole.units
    assert len(units) == 8
    red = units[(units["layer"] == "last") & (units["unit"] == 0)].iloc[0]
    assert red["word"] == "red"
    assert red["concept"] in ("red", "orange", "pink")
    assert 0 < red["p"] <= 1
    lost = whole.knockout
    assert set(lost["unit"]) <= {0, 1, 2, 3}
    assert len(lost) == len(whole.dissection.detectors())
    assert set(whole.hurt["class"]) <= {"class 0", "class 1"}


def test_nothing_of_a_dissection_passes_for_a_run_of_explanations(whole):
    with pytest.raises(
        ConsilienceError, match="holds no run of explanations: it holds a dissection"
    ):
        Run(whole.folder)


def test_json_is_printed(here, whole, capsys):
    capsys.readouterr()
    again = (
        "--words",
        here / "words.txt",
        "--encoder",
        "own_dissected:Colours",
        "--similarity",
        "soft-wpmi:top=8",
    )
    again += (
        "--knockout",
        "--knockout-images",
        "12",
        "--groups",
        here / "groups.csv",
        "--json",
    )
    assert dissect(here, "whole", *again) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["headlines"]["mix"] == whole.dissection.headline("mix")
    assert len(said["units"]) == 8
    assert said["knocked_out"]


# ---- going on after a kill


def test_a_killed_run_goes_on_where_it_was(here, monkeypatch, capsys):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jobs.knockout, "knock_out", stop)
        assert dissect(here, "killed", "--knockout", "--knockout-images", "3") == 130
    assert "same command again" in capsys.readouterr().err
    folder = here / "killed"
    assert not (folder / "run.json").exists()
    kept = (folder / "dissection.json").stat().st_mtime_ns
    with pytest.raises(ConsilienceError, match="same command again"):
        DissectionRun(folder)
    monkeypatch.setattr(
        jobs,
        "dissect",
        lambda *_args, **_options: pytest.fail("it was dissected already"),
    )
    assert dissect(here, "killed", "--knockout", "--knockout-images", "3") == 0
    assert (folder / "dissection.json").stat().st_mtime_ns == kept
    assert DissectionRun(folder).knockout is not None


def test_another_job_is_refused(here, whole, capsys):
    assert dissect(here, "whole") == 1
    assert "holds another job (words gone; knockout gone)" in capsys.readouterr().err
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("mine")
    assert dissect(here, "full") == 1
    assert "not empty and holds no run" in capsys.readouterr().err


def test_an_edited_word_list_is_another_job(here, tmp_path, capsys):
    file = tmp_path / "words.txt"
    file.write_text("red\ngreen\n")
    more = ("--words", file, "--encoder", "own_dissected:Colours")
    assert dissect(here, "edited", *more) == 0
    file.write_text("red\nblue\n")
    assert dissect(here, "edited", *more) == 1
    assert "(words list (words.txt) changed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-l", "nothing"), "no layer"),
        (("--encoder", "x:y"), "--encoder goes with --words"),
        (
            ("--words", "absent.txt", "--encoder", "own_dissected:Colours"),
            "absent.txt does not exist",
        ),
        (("--knockout", "--groups", "absent.csv"), "absent.csv does not exist"),
        (("--groups", "absent.csv"), "--groups goes with --knockout"),
        (
            ("--knockout", "--truth", __file__, "--knockout-images", "9"),
            "--knockout-images FOLDER",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_kept(
    here, tmp_path, capsys, arguments, said
):
    assert (
        run(
            "dissect",
            CONCEPTS,
            "-m",
            "own_dissected:red",
            *arguments,
            "-o",
            tmp_path / "none",
        )
        == 1
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- the images and the page


def test_tiles_are_top_images_cut_by_the_units_mask(whole):
    model = load_model("own_dissected:red", engine="torch")
    found, concepts = whole.dissection, load_concepts(CONCEPTS)
    path = unit_tiles.strip_path(whole.folder, "last", 0)
    strip = np.asarray(Image.open(path).convert("RGB")).astype(float)
    assert strip.shape == (unit_tiles.SIDE, unit_tiles.WIDTH, 3)
    best = found.top("last").query("unit == 0").iloc[0]
    view = model.view(concepts.sample(int(best["index"])), "squash")
    maps = model.activations(view.pixels, ["last"])["last"][0, :1]
    cut = unit_masks(
        maps,
        maps.new_tensor(found.layer("last").thresholds[:1]),
        (unit_tiles.SIDE, unit_tiles.SIDE),
        "half-pixel",
    )[0]
    pixels = (view.pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = np.asarray(
        Image.fromarray(pixels).resize(
            (unit_tiles.SIDE, unit_tiles.SIDE), Image.Resampling.BILINEAR
        )
    )
    expected = colours.mask(image, cut.numpy().astype(bool)).astype(float)
    assert (
        np.abs(strip[:, : unit_tiles.SIDE] - expected).mean() < 6
    )  # WebP is not exact
    assert np.abs(strip[:, : unit_tiles.SIDE] - image).mean() > 12
    assert (
        strip[:, unit_tiles.SIDE : unit_tiles.SIDE + unit_tiles.GAP] > 200
    ).mean() > 0.9


def test_the_page_shows_the_tables_numbers_and_loads_nothing(whole):
    text = (whole.folder / "report.html").read_text()
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    for layer in ("mix", "last"):
        assert whole.dissection.headline(layer) in text
    cards = re.findall(
        r'<li data-text="([^"]*)" data-layer="(\w+)".*?data-iou="([^"]*)".*?data-unit="(\d+)"',
        text,
    )
    units = whole.units.set_index(["layer", "unit"])
    assert len(cards) == 8
    for words, layer, iou, unit in cards:
        row = units.loc[(layer, int(unit))]
        assert float(iou) == row["iou"]
        assert row["concept"] in words
    images = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    assert len(images) == 8
    assert Image.open(io.BytesIO(base64.b64decode(images[0]))).size == (
        unit_tiles.WIDTH,
        unit_tiles.SIDE,
    )


def test_the_page_is_bounded(whole, tmp_path):
    model, concepts = (
        load_model("own_dissected:red", engine="torch"),
        load_concepts(CONCEPTS),
    )
    shown = unit_tiles.draw_tiles(model, whole.dissection, concepts, tmp_path, most=4)
    assert (shown["shown"], shown["left_out"]) == (4, 4)
    drawn = {(path.parent.name, path.stem) for path in tmp_path.rglob("*.webp")}
    table = whole.dissection.table().sort_values(
        ["detector", "iou"], ascending=False, kind="stable"
    )
    best = table.groupby("layer").head(2)
    assert drawn == {
        (str(row["layer"]), str(row["unit"])) for row in best.to_dict("records")
    }


def test_the_script_may_run_and_no_other(whole):
    import hashlib

    text = (whole.folder / "report.html").read_text()
    digest = re.search(r"script-src 'sha256-([^']+)'", text).group(1)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    assert (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == digest
    )


def test_the_report_is_written_anew(whole, capsys):
    before = (whole.folder / "report.html").read_text()
    (whole.folder / "report.html").unlink()
    assert run("report", whole.folder) == 0
    assert (whole.folder / "report.html").read_text() == before
    assert str(whole.folder / "report.html") in capsys.readouterr().out


def test_names_in_the_page_are_escaped(whole, monkeypatch):
    from consilience.show import dissection_page as page

    units = whole.units.assign(concept="<script>alert(1)</script>", word="<b>")
    monkeypatch.setattr(DissectionRun, "units", property(lambda _run: units))
    text = page.dissection_page(whole)
    assert "<script>alert" not in text
    assert "<b></b>" not in text


def test_random_weights_stand_beside_and_are_no_null(second):
    found = second.dissection.random
    text = (second.folder / "report.html").read_text()
    assert found is not None
    for row in found.summary().to_dict("records"):
        pattern = rf'{row["layer"]}, random weights</th><td class="n">{row["units"]}</td><td class="n">{row["detectors"]}</td>'
        assert re.search(pattern, text)
    assert "not a null" in text


def test_nothing_detected_and_no_null_is_said(here, capsys):
    more = ("--threshold", ".99", "--knockout", "--knockout-images", "2")
    more += ("--min-images", "2")
    assert (
        run(
            "dissect",
            CONCEPTS,
            "-m",
            "own_dissected:red",
            "-l",
            "last",
            "--engine",
            "torch",
            "--permutations",
            "0",
            *more,
            "-o",
            here / "none",
        )
        == 0
    )
    assert "last: 0 of 4 units detect a concept" in capsys.readouterr().out
    text = (here / "none" / "report.html").read_text()
    assert "No null was made" in text
    assert "Knocked out: what classes lose" not in text


def test_accuracy_over_labelled_images(here, tmp_path):
    from conftest import planted_image

    (tmp_path / "images").mkdir()
    rows = ["image,class_index"]
    for seed in range(4):
        sample = planted_image(seed)
        Image.fromarray(sample.pixels).save(
            tmp_path / "images" / f"{sample.name}.png"
        )
        rows.append(f"{sample.name}.png,1")
    (tmp_path / "truth.csv").write_text("\n".join(rows))
    more = (
        "--knockout",
        "--knockout-images",
        tmp_path / "images",
        "--truth",
        tmp_path / "truth.csv",
    )
    (tmp_path / "groups.csv").write_text(
        (here / "groups.csv").read_text()
        + "orange,class 1\npink,class 1\nyellow,class 1\n"
    )
    assert dissect(here, "labelled", *more, "--groups", tmp_path / "groups.csv") == 0
    lost = DissectionRun(here / "labelled").knockout.set_index(["layer", "unit"])
    assert (lost["n"] == 4).all()
    assert lost.loc[("last", 0), "own_images"] == 4
    assert (
        lost.loc[("last", 0), "own_accuracy_lost"] == 1
    )  # without its red unit the network no longer says red


def test_units_without_concept_or_word_are_shown(whole, monkeypatch):
    from consilience.dissection.words import beside
    from consilience.show import console
    from consilience.show import dissection_page as page

    table, words = whole.dissection.table(), whole.words.copy()
    table.loc[0, ["concept", "category"]] = ""
    words.loc[1, ["word", "runner_up"]] = ""
    words.loc[1, ["word_score", "runner_up_score", "margin"]] = np.nan
    units = beside(words, table)
    monkeypatch.setattr(DissectionRun, "units", property(lambda _run: units))
    assert "no concept" in page.dissection_page(whole)
    rows = json.loads(json.dumps(console.dissection_as_json(whole), allow_nan=False))[
        "units"
    ]
    assert [row["same"] for row in rows[:2]] == [None, None]
    assert rows[1]["margin"] is None


# ---- compare


def test_compare_two_runs(here, whole, second, capsys):
    assert run("compare", whole.folder, second.folder, "-o", here / "versus") == 0
    said = capsys.readouterr().out
    assert "own_dissected:red" in said
    jaccard = pd.read_csv(here / "versus" / "jaccard.csv")
    concepts = [
        set(zip(rows["concept"], rows["category"], strict=True))
        for rows in (r.dissection.detectors() for r in (whole, second))
    ]
    assert jaccard.iloc[-1]["shared"] == len(concepts[0] & concepts[1])
    assert jaccard.iloc[-1]["jaccard"] == pytest.approx(
        len(concepts[0] & concepts[1]) / len(concepts[0] | concepts[1])
    )
    told = json.loads((here / "versus" / "comparison.json").read_text())
    assert (told["a"], told["b"]) == ("own_dissected:red", "own_dissected:other")
    assert (here / "versus" / "report.html").stat().st_size > 10_000


def test_compare_two_layers_of_a_run(here, whole, capsys):
    assert (
        run(
            "compare",
            f"{whole.folder}:mix",
            f"{whole.folder}:last",
            "-o",
            here / "layers",
            "--json",
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["a"], told["b"]) == (
        "own_dissected:red mix",
        "own_dissected:red last",
    )
    assert [row["a"] for row in told["jaccard"]] == ["mix", "all layers"]


def test_compare_says_what_there_is(here, whole, second, tmp_path, capsys):
    assert run("compare", whole.folder, here / "nothing") == 1
    said = capsys.readouterr().err
    assert "nothing does not exist; there is: " in said
    assert str(whole.folder) in said
    assert run("compare", whole.folder, whole.folder) == 1
    assert "compared with itself" in capsys.readouterr().err
    assert run("compare", f"{whole.folder}:nowhere", second.folder) == 1
    assert "no layer 'nowhere'; there is: mix, last" in capsys.readouterr().err
    assert (
        run("compare", whole.folder, second.folder, "--words", "-o", tmp_path / "w")
        == 1
    )
    assert "has no words" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert run("compare", whole.folder, second.folder, "-o", tmp_path / "full") == 1
    assert "not empty" in capsys.readouterr().err


# ---- explain with a dissection at hand


@pytest.fixture(scope="module")
def image(here):
    from conftest import planted_image

    Image.fromarray(planted_image().pixels).save(here / "square.png")
    return here / "square.png"


def explain(here, image, name, by, whole, *more):
    return run(
        "explain",
        image,
        "-m",
        "own_dissected:red",
        "--engine",
        "torch",
        "--target",
        "1",
        "--by",
        by,
        "--by",
        "centre",
        "--dissection",
        whole.folder,
        *more,
        "-o",
        here / name,
    )


def test_explain_names_the_units_that_carry_a_map(here, whole, image, capsys):
    assert explain(here, image, "carried", "gradcam:layer=last", whole) == 0
    said = capsys.readouterr().out
    units = whole.dissection.table().set_index(["layer", "unit"])
    row = units.loc[("last", 0)]
    name = row["concept"] if row["detector"] else "no concept"
    sentence = f"100 % of this map: unit 0 {name} (100 %)"
    assert sentence in said
    kept = Run(here / "carried").load("square")
    first = kept.items[0].provenance["units"]
    assert first["units"][0]["unit"] == 0
    assert first["units"][0]["share"] == pytest.approx(1)
    assert kept.items[1].provenance["units"]["code"] == "not-a-layer-map"
    page_text = (here / "carried" / "report.html").read_text()
    assert sentence in page_text


def test_a_layer_that_was_not_dissected_is_a_reason_and_no_failure(
    here, whole, image, capsys
):
    assert explain(here, image, "elsewhere", "gradcam:layer=colours", whole) == 0
    kept = Run(here / "elsewhere").load("square")
    units = kept.items[0].provenance["units"]
    assert (units["code"], units["facts"]["there"]) == ("other-layer", "mix, last")
    assert "the dissection is of mix, last" in kept.notes[0]


def test_a_dissection_of_another_model_is_refused(
    here, second, image, tmp_path, capsys
):
    assert explain(here, image, "refused", "gradcam:layer=last", second) == 1
    assert "is of own_dissected:other@" in capsys.readouterr().err
    assert (
        run("explain", image, "--dissection", tmp_path / "none", "-o", tmp_path / "r")
        == 1
    )
    assert "holds no dissection" in capsys.readouterr().err


# ---- what people's own data holds


def own_set(folder, count=6):
    """Noise with a red square, its mask, and a second concept."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks/red", "masks/left"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        y, x = rng.integers(0, 40, 2)
        pixels[y : y + 16, x : x + 16] = (250, 0, 0)
        mask[y : y + 16, x : x + 16] = 255
        left = np.zeros((64, 64), np.uint8)
        left[:, :20] = 255
        Image.fromarray(pixels).save(folder / f"images/p{number}.png")
        Image.fromarray(mask).save(folder / f"masks/red/p{number}.png")
        Image.fromarray(left).save(folder / f"masks/left/p{number}.png")
    return folder


def dissected(model, folder, **options):
    chosen = {"min_images": 1, "permutations": 19, "resamples": 5, **options}
    return cs.dissect(model, "last", cs.load_concepts(folder), **chosen)


def test_images_without_a_label_count_as_images(red_model, tmp_path):
    """A negative, a blank mask and a mask that vanishes on the grid: their pixels are
    in the unions and in the quantile, as the same images with an unrelated label.
    """
    folder = own_set(tmp_path / "set")
    whole = dissected(red_model, folder)
    for number in (1, 2, 3):
        (folder / f"masks/left/p{number}.png").unlink()
    (folder / "masks/red/p1.png").unlink()
    Image.new("L", (64, 64)).save(folder / "masks/red/p2.png")
    tiny = np.zeros((640, 640), np.uint8)
    tiny[0, 0] = 255
    Image.fromarray(tiny).save(folder / "masks/red/p3.png")
    found = dissected(red_model, folder)
    assert found.images == whole.images
    np.testing.assert_array_equal(
        found.layers[0].thresholds, whole.layers[0].thresholds
    )
    red, before = (
        next(one for one in each.concepts if one.name == "red")
        for each in (found, whole)
    )
    assert (red.images, before.images) == (3, 6)
    assert red.pixels * 2 == before.pixels


@pytest.mark.parametrize("damaged", ["images/p2.png", "masks/red/p2.png"])
def test_what_cannot_be_read_is_left_out_and_named(
    red_model, tmp_path, damaged, capsys
):
    """The numbers are those of the set without that image."""
    whole = own_set(tmp_path / "whole")
    for name in ("images", "masks/red", "masks/left"):
        (whole / name / "p2.png").unlink()
    expected = dissected(red_model, whole)
    folder = own_set(tmp_path / "set")
    (folder / damaged).write_bytes(b"no image")
    found = dissected(red_model, folder)
    assert found.images == expected.images
    pd.testing.assert_frame_equal(found.table(), expected.table())
    (note,) = found.facts["notes"]
    assert note.startswith("left out: p2.png: ")
    assert damaged.rpartition("/")[2] in note


def test_units_that_meet_no_label_have_no_wins(red_model, tmp_path):
    folder = own_set(tmp_path / "set")
    for file in (folder / "masks/left").iterdir():
        file.unlink()
    corner = np.zeros((64, 64), np.uint8)
    corner[63, 63] = 255
    for file in (folder / "masks/red").iterdir():
        Image.fromarray(corner).save(file)
    found = dissected(red_model, folder)
    assert (found.table()["iou"] < 0.5).all()


def test_no_concept_that_can_be_a_label_is_one_line_and_locks_nothing(
    here, tmp_path, capsys
):
    folder = own_set(tmp_path / "set")
    asked = ("dissect", folder, "-m", "own_dissected:red", "-l", "last")
    asked += ("--permutations", 9, "-o", tmp_path / "run", "--min-images")
    assert run(*asked, 7) == 1
    assert (
        "the most frequent, left: in 6 images; 7 are needed"
        in capsys.readouterr().err
    )
    assert run(*asked, 6) == 0


def test_the_content_of_a_set_changes_with_any_file(tmp_path):
    folder = own_set(tmp_path / "set")
    seen = {cs.load_concepts(folder).content()}
    for name in ("images/p1.png", "masks/left/p3.png"):
        Image.new("L", (64, 64), 9).save(folder / name)
        seen.add(cs.load_concepts(folder).content())
    assert len(seen) == 3
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = cs.load_concepts(tmp_path / "moved")
    assert moved.content() in seen
    assert moved.subset([0, 2]).content() != moved.subset([0, 1]).content()


def test_an_edited_mask_is_another_job(here, tmp_path, capsys):
    folder = own_set(tmp_path / "set")
    asked = ("dissect", folder, "-m", "own_dissected:red", "-l", "last")
    asked += ("--min-images", 1, "--permutations", 9, "-o", tmp_path / "run")
    assert run(*asked) == 0
    Image.new("L", (64, 64), 9).save(folder / "masks/red/p1.png")
    assert run(*asked) == 1
    assert "(images and labels changed)" in capsys.readouterr().err
