"""Shortcuts of networks whose shortcuts are known."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy
import torch

import consilience as cs
from consilience import ConsilienceError, Sample, registry
from consilience.cli import main
from consilience.diagnosis import closer, shortcuts
from consilience.diagnosis.shortcuts import Kept, judge
from consilience.runs.shortcuts import shortcuts as find_shortcuts

SIDE = 48
CLASSES = ("stripes", "stamped", "red", "noise")
MARKS = ("stamp:size=0.3,opacity=1", "border")


def photographs(count=16, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 200, (count, 6, 6, 3)).astype(np.float32)
    large = small.repeat(8, axis=1).repeat(8, axis=2)
    large += rng.normal(0, 6, large.shape)
    return [
        Sample(f"p{place:02d}", one.clip(0, 255).astype(np.uint8))
        for place, one in enumerate(large)
    ]


def template():
    """The stamp on grey, without its mean: what `stamped` looks for, where it lies."""
    mark = registry.marks.build(MARKS[0])
    grey = torch.full((1, 3, SIDE, SIDE), 0.5)
    shown = (mark.paint(grey, 0).marked - grey)[0].numpy()
    inside = shown != 0
    return np.where(inside, shown - shown[inside].mean(), 0)


TEMPLATE = template()
NOISE = np.random.default_rng(3).normal(size=(3, SIDE, SIDE)) / SIDE


def scores(strength=1.0):
    """Classes: the stamp's shape, how red the image is, and a random direction."""

    def said(pixels):  # (N, H, W, 3) of 0 to 1, as `layout="nhwc"` says
        x = np.asarray(pixels, np.float64).transpose(0, 3, 1, 2)
        stamped = strength * np.tensordot(x, TEMPLATE, 3)
        red = 20 * (x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2)))
        return np.stack(
            [0 * red + x.mean((1, 2, 3)), stamped, red, np.tensordot(x, NOISE, 3)], 1
        ).astype(np.float32)

    return said


def network(strength=1.0):
    return cs.wrap_callable(
        scores(strength),
        classes=CLASSES,
        size=SIDE,
        layout="nhwc",
        outputs="logits",
        batch=7,
    )


@pytest.fixture(scope="module")
def found():
    return find_shortcuts(
        network(), photographs(), MARKS, by=("occlusion:window=12",)
    )


def row_of(found, mark, name):
    table = found.table()
    [row] = table[(table["mark"] == mark) & (table["class"] == name)].to_dict(
        "records"
    )
    return row


SPELLED = "stamp:size=0.3,opacity=1.0"


def spelled(found):
    return found.marks[0].spec


def test_a_shape_is_found_and_a_colour_is_not_a_shape(found):
    stamp = spelled(found)
    assert found.found()["class"].tolist() == ["stamped"]
    assert found.found()["mark"].tolist() == [stamp]
    own = row_of(found, stamp, "stamped")
    assert own["verdict"] == "found"
    assert own["rank"] == 1
    assert own["least"] == 0.5
    assert own["low"] >= 0.5 * found.spread[1]
    # scattered and flat red are as red: the mark's colour moves it, its shape does not
    red = row_of(found, stamp, "red")
    assert red["shift_low"] > 0
    assert red["verdict"] == "not shown"


def test_every_number_by_hand(found):
    model, marks = network(), [registry.marks.build(one) for one in MARKS]
    pixels = torch.cat([model.view(one).pixels for one in photographs()])
    plain = model.scores(pixels).numpy().astype(np.float64)
    n = len(pixels)
    for place, mark in enumerate(marks):
        painted = mark.paint(pixels, 0)
        result = found.marks[place]
        said = {
            name: model.scores(one).numpy().astype(np.float64)
            for name, one in {"marked": painted.marked, **painted.controls}.items()
        }
        own = [name for name in painted.controls if name != "elsewhere"]
        assert list(result.shift) == ["plain", *own]
        differences = {"plain": said["marked"] - plain}
        differences |= {name: said["marked"] - said[name] for name in own}
        for name, rows in differences.items():
            one = result.shift[name]
            assert one.mean == pytest.approx(rows.mean(0), abs=1e-5)
            assert one.error == pytest.approx(
                rows.std(0, ddof=1) / math.sqrt(n), rel=1e-4, abs=1e-7
            )
            assert one.low == pytest.approx(one.mean - one.critical * one.error)
        before = plain.argmax(1)
        for index in range(4):
            became = (said["marked"].argmax(1) == index) & (before != index)
            assert result.became[index] == became.mean()
            held = [
                ((said[name].argmax(1) == index) & (before != index)).mean()
                for name in own
            ]
            assert result.became_by_control[index] == max(held)
            smallest = min(
                differences, key=lambda k, i=index: abs(differences[k].mean(0)[i])
            )
            row = row_of(found, result.spec, CLASSES[index])
            assert row["nearest"] == smallest
            assert row["excess"] == pytest.approx(
                differences[smallest].mean(0)[index], abs=1e-5
            )
            spread = plain[:, index].std(ddof=1)
            assert row["size"] == pytest.approx(row["excess"] / spread, rel=1e-3)
            signs = {np.sign(rows.mean(0)[index]) for rows in differences.values()}
            if len(signs) > 1:
                assert row["p"] == 1
                assert row["verdict"] == "not shown"
            else:
                p = [one.p[index] for one in result.shift.values()]
                assert row["p"] == max(p)
            least = 0.5 if "elsewhere" in said else 0.75  # stamp, border
            assert row["least"] == least
            errors = max(one.error[index] for one in result.shift.values())
            critical = max(one.critical for one in result.shift.values())
            assert row["detectable"] == pytest.approx(
                least * spread + (critical + scipy.stats.norm.ppf(0.8)) * errors,
                rel=1e-3,
            )
        for name in ("marked", *own):
            changed = (said[name].argmax(1) != before).mean()
            assert result.changed[name] == changed
        order = scipy.stats.rankdata(-differences["plain"].mean(0), method="min")
        table = found.table()
        mine = table[table["mark"] == result.spec].sort_values("class_index")
        assert mine["rank"].tolist() == order.tolist()
        if "elsewhere" in said:
            assert result.elsewhere == pytest.approx(
                (said["elsewhere"] - plain).mean(0), abs=1e-5
            )
        else:
            assert result.elsewhere is None


def test_controls_play_in_the_family_of_their_role(found):
    """The plain family has all marks and classes; another critical value each."""
    first, second = found.marks
    assert first.shift["plain"].critical == second.shift["plain"].critical
    assert first.shift["scattered"].critical == second.shift["scattered"].critical
    assert first.shift["plain"].critical != first.shift["scattered"].critical


def test_a_weak_shortcut_moves_and_a_stronger_one_is_found():
    """The shift grows with the weight of the shape beside a class's own evidence."""
    verdicts = []
    for strength in (0.0, 0.02, 1.0):

        def said(pixels, strength=strength):
            outputs = scores(strength)(pixels)
            outputs[:, 1] += outputs[:, 2]  # the class's own evidence
            return outputs

        model = cs.wrap_callable(
            said, classes=CLASSES, size=SIDE, layout="nhwc", outputs="logits"
        )
        result = find_shortcuts(model, photographs(24), [MARKS[0]], closer=0)
        verdicts.append(row_of(result, spelled(result), "stamped")["verdict"])
    assert verdicts == ["not shown", "moves", "found"]


def test_least_is_the_size_that_counts():
    most = find_shortcuts(network(), photographs(), [MARKS[0]], closer=0, least=1e3)
    assert not len(most.found())
    row = row_of(most, spelled(most), "stamped")
    assert row["verdict"] == "moves"
    none = find_shortcuts(network(), photographs(), [MARKS[0]], closer=0, least=0)
    assert len(none.found()) >= 1


def test_a_mark_at_a_place_counts_sooner_than_one_that_changes_everything():
    """The same shift of .65 standard deviations by both; the bounds lie close."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(60, 3))
    plain /= plain.std(0, ddof=1)
    push = np.array([0.65, 0.0, 0.0]) + rng.normal(0, 0.05, (60, 3))
    block = {"plain": plain, "0/marked": plain + push, "1/marked": plain + push}
    others = ("0/scattered", "0/elsewhere", "1/scattered")
    block |= {name: plain + rng.normal(0, 0.05, (60, 3)) for name in others}
    model = SimpleNamespace(id="m", classes=CLASSES[:3], outputs="logits")
    names = [str(place) for place in range(60)]

    def verdicts(**asked):
        found = judge(model, Kept([block]), ["stamp", "border"], names, **asked)
        own = found.table().query("class_index == 0").set_index("mark")
        return own["verdict"].to_dict(), own["least"].to_dict(), found

    told, least, found = verdicts()
    assert told == {"stamp": "found", "border": "moves"}
    assert least == {"stamp": 0.5, "border": 0.75}
    assert found.least is None
    assert verdicts(least=0.5)[0] == {"stamp": "found", "border": "found"}
    assert verdicts(least=0.75)[0] == {"stamp": "moves", "border": "moves"}
    assert verdicts(least=0.75)[1] == {"stamp": 0.75, "border": 0.75}
    from consilience.show.shortcuts_page import headline, shortcuts_context

    one = "pushes a class by at least 0.5 standard deviations of its score, beyond"
    assert one in headline(found)
    said = shortcuts_context(found, {}, "1", "")["least"]
    assert said == (
        "0.5 standard deviations of the class's score over these images (0.75 where a "
        "mark changes the whole image)"
    )


def test_fewer_classes_are_a_smaller_family():
    whole = find_shortcuts(network(), photographs(), MARKS, closer=0)
    some = find_shortcuts(
        network(), photographs(), MARKS, classes=["stamped"], closer=0
    )
    a, b = (one.marks[0].shift["plain"] for one in (whole, some))
    assert b.critical < a.critical
    assert np.isnan(b.p[[0, 2, 3]]).all()
    assert np.isfinite(b.p[1])
    assert b.mean == pytest.approx(a.mean)
    assert (some.table()["verdict"] == "not shown").sum() >= 6


def test_dose_curves_by_hand(found):
    stamp = spelled(found)
    doses = found.doses[found.doses["mark"] == stamp]
    opacity = doses[doses["option"] == "opacity"]
    assert opacity["value"].tolist() == ["0.1", "0.25", "0.5", "1.0"]
    assert (np.diff(opacity["shift"]) > 0).all()
    model = network()
    pixels = torch.cat([model.view(one).pixels for one in photographs()])
    painted = registry.marks.build("stamp:size=0.3,opacity=0.5").paint(pixels, 0)
    shift = (model.scores(painted.marked) - model.scores(pixels))[:, 1].double()
    excess = (
        shift
        + (model.scores(pixels) - model.scores(painted.controls["scattered"]))[
            :, 1
        ].double()
    )
    row = opacity[opacity["value"] == "0.5"].iloc[0]
    assert row["shift"] == pytest.approx(float(shift.mean()), rel=1e-4)
    assert row["excess"] == pytest.approx(float(excess.mean()), rel=1e-4)
    assert row["shift_low"] < row["shift"] < row["shift_high"]
    assert row["low"] < row["excess"] < row["high"]
    places = doses[doses["option"] == "place"]
    best = places.loc[places["shift"].idxmax(), "value"]
    assert best == "top-right"  # where the network looks for it


def test_maps_are_held_against_blob_and_control(found):
    [row] = found.maps[found.maps["mark"] == spelled(found)].to_dict("records")
    assert row["method"] == "occlusion:window=12"
    assert row["images"] == 16
    assert row["mass"] > row["area"]
    model = network()
    mark = registry.marks.build(MARKS[0])
    where = mark.paint(torch.zeros(1, 3, SIDE, SIDE), 0).where
    assert row["area"] == pytest.approx(where.mean())
    blob = (
        registry.explainers.build("centre")
        .explain(model, model.view(photographs()[0]), None)
        .values.numpy()
    )
    assert row["centre"] == pytest.approx((blob * where).sum() / blob.sum(), rel=1e-4)
    painted = mark.paint(
        torch.cat([model.view(one).pixels for one in photographs()]), 0
    )
    explainer = registry.explainers.build("occlusion:window=12")
    shares = {"mass": [], "control": []}
    for name, shown in (
        ("mass", painted.marked),
        ("control", painted.controls["scattered"]),
    ):
        for place, one in enumerate(photographs()):
            view = replace(model.view(one), pixels=shown[place : place + 1])
            target = cs.explain(model, one, "centre", "stamped").target
            target = target.scored("probability")  # what occlusion reads
            values = np.maximum(
                explainer.explain(model, view, target).values.numpy(), 0
            )
            shares[name].append((values * where).sum() / values.sum())
        assert row[name] == pytest.approx(np.mean(shares[name]), rel=1e-4)
    rival = max(row["control"], row["centre"])
    assert row["excess"] == pytest.approx(row["mass"] - rival, abs=1e-6)
    assert row["low"] < row["excess"] < row["high"]


def test_an_image_that_carries_the_mark_is_told_by_its_template():
    model = network()
    views = [(one.name, model.view(one)) for one in photographs()]
    mark = registry.marks.build("logo:size=0.4")
    other = registry.marks.build("logo:size=0.4,place=top-left")
    name, view = views[5]
    marked = other.paint(view.pixels, 0).marked
    views[5] = (name, type(view)(marked, view.geometry, view.mode))
    table = closer.carriers_of(iter(views), mark, most=4)
    assert len(table) == 4
    assert table.iloc[0]["image"] == name
    assert bool(table.iloc[0]["carries"])
    assert not table.iloc[1:]["carries"].any()
    assert table["likeness"].is_monotonic_decreasing
    assert not len(closer.carriers_of(iter(views), registry.marks.build("border")))


def test_scores_on_disk_and_in_memory_are_judged_alike(tmp_path):
    model, mark = network(), registry.marks.build(MARKS[0])
    samples = photographs()
    blocks, files = [], []
    for start in (0, 10):
        pixels = torch.cat(
            [model.view(one).pixels for one in samples[start : start + 10]]
        )
        block = shortcuts.scored_images(model, pixels, [mark], 0)
        blocks.append(block)
        np.savez(tmp_path / f"{start}.npz", **block)
        files.append(tmp_path / f"{start}.npz")
    names = [one.name for one in samples]
    a, b = (judge(model, Kept(one), ["stamp"], names) for one in (blocks, files))
    pd.testing.assert_frame_equal(a.table(), b.table())
    assert list(blocks[0]) == list(shortcuts.variants_of([mark], pixels.shape[1:]))


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    from consilience.runs import shortcuts as running

    monkeypatch.setattr(running, "BLOCK", 5)
    asked, whole = [], shortcuts.scored_images

    def stopping(model, pixels, *rest):
        asked.append(len(pixels))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(model, pixels, *rest)

    monkeypatch.setattr(shortcuts, "scored_images", stopping)
    with pytest.raises(KeyboardInterrupt):
        find_shortcuts(
            network(), photographs(), MARKS, closer=0, folder=tmp_path / "run"
        )
    result = find_shortcuts(
        network(), photographs(), MARKS, closer=0, folder=tmp_path / "run"
    )
    assert asked == [5, 5, 5, 5, 1]
    fresh = find_shortcuts(network(), photographs(), MARKS, closer=0)
    assert result.table()["shift"].tolist() == pytest.approx(
        fresh.table()["shift"].tolist(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": 5}, "6 are the fewest that can show anything, got 5"),
        ({"marks": ["stamp", "stamp"]}, "asked for twice"),
        ({"marks": ["stmp"]}, "did you mean 'stamp'"),
        ({"classes": ["stampd"]}, "did you mean 'stamped'"),
        ({"classes": [4]}, "classes 0 to 3; got 4"),
        ({"least": -1}, "at least 0; got -1"),
        ({"by": ["gradcm"]}, "gradcam"),
        ({"by": ["gradcam"]}, "gradcam needs gradients, layers of the model"),
    ],
)
def test_what_cannot_be_asked_is_said(given, words):
    images = photographs(given.pop("images", 8))
    with pytest.raises(ConsilienceError, match=words):
        find_shortcuts(
            network(), images, **{"marks": [MARKS[0]], "closer": 0, **given}
        )


def test_one_logit_has_its_complement():
    def said(pixels):
        return scores()(pixels)[:, 1:2]

    model = cs.wrap_callable(said, size=SIDE, layout="nhwc", outputs="sigmoid")
    result = find_shortcuts(model, photographs(), [MARKS[0]], closer=0)
    mean = result.marks[0].shift["plain"].mean
    assert len(mean) == 2
    assert mean[0] == pytest.approx(-mean[1])
    assert result.found()["class_index"].tolist() == [0]


def test_an_image_that_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path, capsys):
    from PIL import Image

    for one in photographs(8):
        Image.fromarray(one.pixels).save(tmp_path / f"{one.name}.png")
    (tmp_path / "p03.png").write_bytes(b"no image")
    folder = tmp_path / "run"
    command = ["shortcuts", str(tmp_path), "--mark", "stamp", "--mark", "border"]
    command += [
        "--closer",
        "1",
        "--by",
        "centre",
        "--class",
        "478",
        "-o",
        str(folder),
    ]
    command += ["--least", "20"]  # such images hardly differ: a size of 3 is nothing
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 7
    assert [name for name, _ in told["failures"]] == ["p03"]
    assert [one["mark"] for one in told["marks"]] == ["stamp", "border"]
    names = {one.name for one in folder.iterdir()}
    assert {
        "report.html",
        "shortcuts.json",
        "shifts.parquet",
        "shortcuts.csv",
    } <= names
    page = (folder / "report.html").read_text()
    assert "1 of 8 images could not be read: p03" in page
    assert "No shortcut was found by 2 marks over 7 images" in page
    assert "would have been found four times in five" in page
    assert len(pd.read_parquet(folder / "shifts.parquet")) == 2000
    # the same command again reads what is there
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "No shortcut was found" in shown
    assert "report:" in shown


def test_sentences_of_what_was_found(found):
    from consilience.show.shortcuts_page import headline, sentences

    assert headline(found) == (
        "1 of 2 marks pushes a class by at least 0.5 standard deviations of its score, "
        "beyond every control, over 16 images."
    )
    [said] = sentences(found)
    row = row_of(found, spelled(found), "stamped")
    assert f"stamped {row['shift']:+.2f} logits (rank 1 of 4" in said
    assert f"beyond {row['nearest']}" in said


def test_the_class_that_a_mark_moves_most_is_named_though_it_is_not_found():
    """A class that varies much is moved by more, but not shown to reach its own size."""

    def said(pixels):
        outputs = scores()(pixels)
        outputs[:, 2] = 1.5 * outputs[:, 1] + 60 * (
            outputs[:, 3] - outputs[:, 3].mean()
        )
        return outputs

    model = cs.wrap_callable(
        said, classes=CLASSES, size=SIDE, layout="nhwc", outputs="logits", batch=16
    )
    result = find_shortcuts(model, photographs(), [MARKS[0]], closer=1, by=["centre"])
    [row] = result.largest().to_dict("records")
    assert (row["class"], row["verdict"], row["classes_found"]) == ("red", "moves", 1)
    assert row["excess"] == result.table()["excess"].abs().max()
    assert result.found()["class"].tolist() == ["stamped"]
    assert set(result.doses["class"]) == {"red"}
    from consilience.show.shortcuts_page import sentences

    [line] = sentences(result)
    assert "stamped +" in line
    assert f"It moves red most, by {row['shift']:+.2f} (rank 1)" in line


def test_of_some_classes_the_largest_is_one_of_them():
    """The stamp moves noise and red, which are not asked; what is asked goes up and down
    with nothing in the image.
    """

    def said(pixels):
        outputs = scores()(pixels)
        outputs[:, 1] = 0.01 * np.sin(1e6 * np.asarray(pixels).mean((1, 2, 3)))
        return outputs

    model = cs.wrap_callable(
        said, classes=CLASSES, size=SIDE, layout="nhwc", outputs="logits", batch=16
    )
    asked = ["stamped"]
    result = find_shortcuts(model, photographs(), [MARKS[0]], classes=asked, closer=0)
    [row] = result.largest().to_dict("records")
    excess = result.table().set_index("class")["excess"].abs()
    assert excess.drop("stamped").max() > excess["stamped"]
    assert (row["class"], row["verdict"]) == ("stamped", "not shown")
    assert "_tested" not in row
    assert row["low"] < row["excess"] < row["high"]


@pytest.mark.parametrize(
    ("value", "said"),
    [("0.16071428571428573", "0.161"), ("1.0", "1"), ("top", "top")],
)
def test_doses_are_said_to_three_digits(value, said):
    from consilience.show.shortcuts_page import _dose

    assert _dose(value) == said
