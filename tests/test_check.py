"""Checks of networks whose changes are known."""

import json
import math
from dataclasses import replace
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy
import torch
from PIL import Image
from torch import nn

import consilience as cs
from consilience import ConsilienceError, Sample, stats
from consilience.cli import main
from consilience.diagnosis import change, marked_change
from consilience.diagnosis.change import Limits
from consilience.diagnosis.shortcuts import battery, build_marks
from consilience.metrics.similarity import alike
from consilience.runs.check import check, junit, read_limits
from consilience.show.change_words import (
    criterion_sentence,
    markdown,
    verdict_sentence,
)

pytest_plugins = ("pytester",)

SIDE = 24


def module(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


def network(seed=0, head_noise=0.0, bias=0.0):
    made = module(seed)
    pixels = torch.from_numpy(np.stack([one.pixels for one in photographs(64)]))
    shown = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():  # classes are said in turn, and differ by image
        said = made(shown)
        scale = 1 / said.std(0)
        made[6].weight *= scale[:, None]
        made[6].bias.copy_(made[6].bias * scale - (said * scale).mean(0))
        source = torch.Generator().manual_seed(9)
        made[6].weight += head_noise * torch.randn(3, 8, generator=source)
        made[6].bias += bias * torch.tensor([1.0, -1.0, 0.0])
    return cs.wrap(made, size=SIDE, mean=0.5, std=0.25, engine="torch", name="net")


def replace_classes(model, count):
    """A network of so many classes, which is only asked for their names."""
    made = module()
    made[6] = nn.Linear(8, count)
    return cs.wrap(made, size=SIDE, mean=0.5, std=0.25, engine="torch", name="net")


def photographs(count=40, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    return [Sample(f"p{place:02d}", one) for place, one in enumerate(large)]


BY = ("gradcam", "occlusion:window=8,stride=4")
SAME_WEIGHTS = (
    "both have the same weights and ran the same way: only their code could have changed "
    "anything"
)


def test_every_number_by_hand():
    new, old, samples = network(head_noise=0.3, bias=0.1), network(), photographs(30)
    found = check(new, old, samples, BY)
    pixels = torch.cat([old.view(one).pixels for one in samples])
    before, after = old.scores(pixels).double(), new.scores(pixels).double()
    first = before.argmax(1)
    flips = int((after.argmax(1) != first).sum())
    assert 0 < flips < 30
    by_name = {one.name: one for one in found.criteria}
    one = by_name["flips"]
    assert one.value == flips / 30
    # Clopper and Pearson: the share at which so few, or so many, have a chance of .05
    assert scipy.stats.binom.cdf(flips, 30, one.high) == pytest.approx(0.05)
    assert scipy.stats.binom.sf(flips - 1, 30, one.low) == pytest.approx(0.05)
    assert one.p_within == pytest.approx(scipy.stats.binom.cdf(flips, 30, 0.05))
    rows = torch.arange(30)
    spread = before[rows, first].std()
    shift = (after[rows, first] - before[rows, first]) / spread
    one = by_name["score"]
    assert one.value == pytest.approx(float(shift.mean()), rel=1e-4)
    bounds = stats.mean_interval(shift.numpy(), level=0.9)
    assert (one.low, one.high) == pytest.approx((bounds.low, bounds.high), rel=1e-3)
    below, above = (
        stats.paired_test((shift + move).numpy(), alternative=side)
        for move, side in ((-0.25, "less"), (0.25, "greater"))
    )
    assert one.p_within == pytest.approx(max(below, above))
    for spec in BY:
        drops, floors = [], []
        for sample, index in zip(samples, first.tolist(), strict=True):
            a, b = (
                cs.explain(model, sample, spec, index).values for model in (old, new)
            )
            drops.append(alike(a, b, "spearman"))
            floors.append(1.0)
        one = by_name[f"maps of {spec}"]
        assert one.value == pytest.approx(np.mean(floors) - np.mean(drops), abs=2e-4)
        gaps = np.array(floors) - np.array(drops)
        bounds = stats.mean_interval(gaps, level=0.9)
        assert (one.low, one.high) == pytest.approx(
            (bounds.low, bounds.high), abs=1e-3
        )
        assert one.p_within == stats.paired_test(gaps - 0.1, alternative="less")
        assert one.p_beyond == stats.paired_test(gaps - 0.1, alternative="greater")
        assert one.floor == pytest.approx(1, abs=1e-5)
        table = found.floors[found.floors["method"] == spec].set_index("against")
        assert table.loc["the new network", "alike"] == pytest.approx(
            np.mean(drops), abs=2e-4
        )
        assert table.loc["the new network", "least"] == pytest.approx(
            np.min(drops), abs=2e-3
        )
    assert by_name["maps of gradcam"].held == "batch"
    images = found.images.set_index("image")
    assert images["flipped"].sum() == flips
    assert images.loc["p03", "score_shift"] == pytest.approx(
        float(shift[3] * spread), rel=1e-3, abs=1e-5
    )
    assert found.images["flipped"].iloc[:flips].all()  # worst first
    kept = found.images[~found.images["flipped"]]["drop"]
    assert kept.is_monotonic_decreasing
    classes = found.by_class
    assert classes["images"].sum() == 30
    assert classes["flips"].sum() == flips
    assert classes["drop"].is_monotonic_decreasing


def test_classes_are_adjusted_for_all_of_them_and_for_the_worst_method():
    found = [
        change.ImageChange(
            f"{index}{place}",
            index,
            index,
            1.0 * place,
            1.0 * place,
            {"a": 1 - 0.02 * place - 0.3 * index, "b": 1 - 0.1 * (index == 0)},
            {"a": {}, "b": {}},
        )
        for index, count in ((0, 7), (1, 8), (2, 1))
        for place in range(count)
    ]
    model = network()
    table = change.judge(model, model, found, ["a", "b"], Limits()).by_class
    table = table.set_index("class_index")
    drops = {
        0: [0.1] * 7,
        1: [0.3 + 0.02 * place for place in range(8)],
        2: [0.6],
    }
    assert table["method"].to_dict() == {0: "b", 1: "a", 2: "a"}
    for index, values in drops.items():
        assert table.loc[index, "drop"] == pytest.approx(np.mean(values))
        assert table.loc[index, "images"] == len(values)
    # the worst of two methods, two classes of more than one image (Holm), and the
    # criteria besides: flips and score (p 1), maps of a and b, and marks (none: p 1)
    one = stats.paired_test(np.array(drops[1]) - 0.1, alternative="greater")
    of_class = 2 * 2 * one
    whole = change.judge(model, model, found, ["a", "b"], Limits())
    a, b = (each.p_beyond for each in whole.criteria[2:4])
    assert [each.p_beyond for each in whole.criteria if each.name[:4] != "maps"] == [
        1
    ] * 3
    assert a < of_class < b
    assert table.loc[1, "p"] == pytest.approx(5 * of_class)
    assert math.isnan(table.loc[2, "p"])
    assert table["beyond"].to_dict() == {0: False, 1: False, 2: False}


def test_a_class_that_changed_is_not_lost_in_the_mean():
    """Maps of one class in five fall by .3; over all images that is within .1."""
    rng = np.random.default_rng(0)
    found = [
        change.ImageChange(
            f"{place}",
            place % 5,
            place % 5,
            float(place),
            float(place),
            {"a": 1 - 0.3 * (place % 5 == 0) - 0.01 * rng.random()},
            {"a": {}},
        )
        for place in range(60)
    ]
    model, limits = network(), Limits(marks=("none",), flips=0.1)
    model = replace_classes(model, 5)
    changed = change.judge(model, model, found, ["a"], limits)
    assert [one.answer for one in changed.criteria] == ["within"] * 3
    assert changed.beyond == ["class 0"]
    assert changed.verdict == "changed"
    assert not changed.passed
    words = "maps of images of class 0"
    assert verdict_sentence(changed) == (
        f"Changed: {words} beyond what was allowed, over 60 images."
    )
    suite = ElementTree.fromstring(junit(changed))
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    [failed] = [
        one for one in suite.iter("testcase") if one.find("failure") is not None
    ]
    assert failed.get("name") == "classes"
    assert failed.find("failure").get("message") == f"{words}: shown to be beyond 0.1"
    wide = change.judge(model, model, found, ["a"], replace(limits, maps=0.4))
    assert (wide.beyond, wide.verdict) == ([], "same")
    suite = ElementTree.fromstring(junit(wide))
    assert suite.get("failures") == "0"
    *_, last = suite.iter("testcase")
    assert last.find("system-out").text == (
        "maps of no class are shown to be beyond 0.4"
    )


def test_a_network_is_the_same_as_itself():
    found = check(network(), network(), photographs(60), BY)
    assert found.verdict == "same"
    assert found.passed
    assert [one.answer for one in found.criteria] == ["within"] * 5
    assert found.notes == (SAME_WEIGHTS,)
    one = network()
    found = check(one, one, photographs(6), ["centre"], {"marks": ["none"]})
    assert found.notes == (
        "both are one network, run the same way: nothing could have changed",
        change.UNMARKED,
    )


def test_another_network_is_changed():
    found = check(network(3), network(), photographs(60), BY)
    assert found.verdict == "changed"
    assert not found.passed
    assert "beyond" in {one.answer for one in found.criteria}
    assert found.notes == ()


def test_few_images_show_nothing_and_limits_say_what_becomes_of_it():
    strict = check(network(), network(bias=0.001), photographs(8), BY)
    assert strict.verdict == "not shown"
    flips = strict.criteria[0]
    assert flips.value == 0
    assert flips.high == pytest.approx(1 - 0.05 ** (1 / 8))
    assert not strict.passed
    loose = check(
        network(), network(bias=0.001), photographs(8), BY, {"undecided": "pass"}
    )
    assert loose.verdict == "not shown"
    assert loose.passed
    wide = check(network(), network(bias=0.001), photographs(8), BY, {"flips": 0.5})
    assert wide.verdict == "same"


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"flips": 0.9, "score": 9, "maps": 1.0}, "same"),
        ({"flips": 0.01, "score": 9, "maps": 1.0}, "changed"),
        ({"flips": 0.9, "score": 0.01, "maps": 1.0}, "changed"),
        ({"flips": 0.9, "score": 9, "maps": 0.01}, "changed"),
    ],
)
def test_each_limit_decides(given, changed):
    new = network(head_noise=1.5, bias=0.3)
    assert (
        check(new, network(), photographs(60), ["gradcam"], given).verdict == changed
    )


def test_maps_are_held_against_the_noise_floor():
    """LIME with few draws differs from itself by its seed as much as from the new one."""
    spec = "lime:samples=24,segments=grid(6)"
    found = check(network(bias=0.01), network(), photographs(24), [spec])
    [one] = [one for one in found.criteria if one.name.startswith("maps")]
    assert one.held == "seed"
    assert one.floor < 0.9
    table = found.floors.set_index("against")
    assert table.loc["seed", "alike"] == pytest.approx(one.floor)
    drop = table.loc["seed", "alike"] - table.loc["the new network", "alike"]
    assert one.value == pytest.approx(drop)
    without = check(
        network(bias=0.01), network(), photographs(24), [spec], {"floors": []}
    )
    [bare] = [one for one in without.criteria if one.name.startswith("maps")]
    assert (bare.floor, bare.held) == (1.0, "")
    assert bare.value > one.value


def test_which_floors_there_are():
    old = network()
    everything = change.FLOORS
    assert change.floors_of(old, "gradcam", ("seed", "batch", "engine")) == ("batch",)
    assert change.floors_of(old, "lime", ("seed", "batch", "engine")) == ("seed",)
    # gradients run in f32, whatever the network's precision
    assert change.floors_of(old, "gradcam", everything) == ("batch",)
    assert "precision" in change.floors_of(old, BY[1], everything)
    found = check(old, old, photographs(12), [BY[1]], {"floors": ["precision"]})
    [one] = [one for one in found.criteria if one.name.startswith("maps")]
    assert one.held == "precision"
    assert 0.8 < one.floor < 1


def test_answers_of_one_are_adjusted_for_all():
    """Beyond is Holm over criteria; within is each at its own level."""
    one = change.Criterion("a", 0, 0, 0, 1, "not shown", 0.5, 0.03, 9)
    alone, none = change._adjusted([one], [math.nan], 0.95)
    assert alone[0].answer == "beyond"
    assert math.isnan(none[0])
    both = [one, change.replace(one, name="b", p_beyond=0.5)]
    two, _ = change._adjusted(both, [], 0.95)
    assert [each.answer for each in two] == ["not shown", "not shown"]
    inside = change.replace(one, p_within=0.04, p_beyond=0.9)
    assert change._adjusted([inside, inside], [], 0.95)[0][1].answer == "within"
    # a class is one more: 2 x .03, and 2 x .02 and 1 x .04 of the classes
    beside, classes = change._adjusted([one], [0.02, 0.04, math.nan], 0.95)
    assert beside[0].answer == "beyond"  # .03 comes second, after .02
    assert classes[:2] == pytest.approx([0.04, 0.06])
    late, classes = change._adjusted([one], [0.9], 0.95)
    assert (late[0].answer, classes) == ("not shown", [pytest.approx(0.9)])


def test_false_alarms_are_rare_where_nothing_changed():
    """Two seeds of a random map method: their maps differ, as they always do."""
    alarms = 0
    for seed in range(40):
        found = check(
            network(),
            network(),
            photographs(12, seed),
            [f"random:seed={seed}"],
            {"flips": 0.5, "undecided": "pass", "marks": ["none"]},
        )
        alarms += found.verdict == "changed"
    assert alarms <= 2


def test_what_cannot_be_checked_is_said():
    with pytest.raises(ConsilienceError, match="two images"):
        check(network(), network(), photographs(1), ["centre"])
    with pytest.raises(
        ConsilienceError, match=r"got 0; nosuch: nosuch.png: no such file"
    ):
        check(network(), network(), ["nosuch.png"], ["centre"])
    two = cs.wrap(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        size=SIDE,
    )
    with pytest.raises(ConsilienceError, match=r"has 2 classes, net@.* has 3"):
        check(two, network(), photographs(4), ["centre"])
    with pytest.raises(ConsilienceError, match="did you mean 'gradcam'"):
        check(network(), network(), photographs(4), ["gradcamm"])
    box = cs.wrap_callable(lambda x: np.zeros((len(x), 3)), size=SIDE)
    with pytest.raises(ConsilienceError, match="gradcam needs"):
        check(box, network(), photographs(4), ["gradcam"])
    with pytest.raises(ConsilienceError, match="same score of every image"):
        check(network(), box, photographs(4), ["centre"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limits = 3", "limits is a table"),
        ("image = ['a']", "did you mean 'images'"),
        ("[limits]\nflip = 0.1", "did you mean 'flips'"),
        ("[limits]\nflips = 2.0", "below 1"),
        ("[limits]\nfloors = ['sed']", "did you mean 'seed'"),
        ("[limits]\nalike = 'kendall'", "spearman"),
        ("explainers = [1]", "a list of texts"),
        ("x = ", "no TOML"),
    ],
)
def test_a_limits_file_that_is_wrong_is_told(tmp_path, text, words):
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(ConsilienceError, match=words):
        read_limits(file)


def test_a_limits_file_is_read(tmp_path):
    file = tmp_path / "limits.toml"
    file.write_text(
        'images = "photos"\nexplainers = ["lime"]\n[limits]\nflips = 0.1\n'
        'floors = ["seed"]\nundecided = "pass"\n'
    )
    told = read_limits(file)
    assert told.images == (str(tmp_path / "photos"),)
    assert told.explainers == ("lime",)
    assert told.limits == Limits(flips=0.1, floors=("seed",), undecided="pass")


def test_junit_and_markdown_say_the_same():
    found = check(network(3), network(), photographs(20), ["gradcam"])
    suite = ElementTree.fromstring(junit(found))
    answers = {one.name: one.answer for one in found.criteria}
    assert int(suite.get("tests")) == 5  # flips, score, maps, marks, classes
    failing = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None
    ]
    expected = [name for name, answer in answers.items() if answer != "within"]
    assert failing == expected + ["classes"] * bool(found.beyond)
    assert int(suite.get("failures")) == len(failing)
    text = markdown(found)
    assert text.startswith("### ❌ consilience check")
    for one in found.criteria:
        assert f"| {one.name} |" in text
    assert verdict_sentence(found) in text
    loose = check(
        network(), network(), photographs(4), ["gradcam"], {"undecided": "pass"}
    )
    suite = ElementTree.fromstring(junit(loose))
    assert suite.get("failures") == "0"
    skipped = sum(case.find("skipped") is not None for case in suite.iter("testcase"))
    assert (
        skipped
        == int(suite.get("skipped"))
        == sum(one.answer == "not shown" for one in loose.criteria)
    )
    assert skipped


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("within", "shown to be within 0.05"),
        ("beyond", "shown to be beyond 0.05"),
        ("not shown", "not shown to be within or beyond 0.05"),
    ],
)
def test_not_shown_is_never_worded_is_not(answer, words):
    one = change.Criterion("flips", 0.1, 0.0, 0.3, 0.05, answer, 0.5, 0.5, 10)
    assert criterion_sentence(one).endswith(words)


def test_the_command_and_its_exit_codes(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for one in photographs(8):
        Image.fromarray(one.pixels).save(photos / f"{one.name}.png")
    (photos / "bad.png").write_bytes(b"no image")
    (tmp_path / "limits.toml").write_text(
        'images = ["photos"]\nexplainers = ["centre"]\n[limits]\nflips = 0.5\n'
        'marks = ["none"]\n'
    )
    limits = ["--limits", str(tmp_path / "limits.toml")]
    same = ["check", "efficientnet_lite0", "--against", "efficientnet_lite0"]
    assert main([*same, *limits, "-o", str(tmp_path / "a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "same"
    assert [name for name, _ in told["failures"]] == ["bad"]
    names = {one.name for one in (tmp_path / "a").iterdir()}
    assert {
        "check.json",
        "summary.md",
        "report.html",
        "junit.xml",
        "images.csv",
        "classes.csv",
    } <= names
    few = [
        *same,
        "--images",
        str(photos),
        "--by",
        "centre",
        "--mark",
        "none",
        "-o",
        str(tmp_path / "b"),
    ]
    assert main(few) == 4
    assert "Not shown either way over 8 images: flips" in capsys.readouterr().out
    other = [
        "check",
        "efficientnet_lite0:weights=random",
        "--against",
        "efficientnet_lite0",
    ]
    assert main([*other, *limits, "-o", str(tmp_path / "c")]) == 3
    said = capsys.readouterr().out
    assert "Changed: flips" in said
    assert f"report: {tmp_path / 'c' / 'report.html'}" in said
    page = (tmp_path / "c" / "report.html").read_text()
    assert "<b>Changed: flips" in page
    assert page.count("map of the old network") == 8
    assert page.count("map of the new network") == 8
    assert "1 image could not be asked about: bad: " in page
    assert main([*same, "-o", str(tmp_path / "d")]) == 1
    assert "check needs images" in capsys.readouterr().err


def test_the_pytest_fixture(pytester):
    pytester.makepyfile(
        """
        import numpy as np, torch
        from torch import nn
        import consilience as cs

        def network(seed):
            torch.manual_seed(seed)
            module = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(8, 3),
            ).eval()
            return cs.wrap(module, size=16, engine="torch")

        images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)).astype("uint8")

        def test_same(explanations_unchanged):
            found = explanations_unchanged(network(0), network(0), images, flips=0.2)
            assert found.verdict == "same"

        def test_other(explanations_unchanged):
            explanations_unchanged(network(1), network(0), images, flips=0.2)
        """
    )
    # No `-p`: the installed entry point is what a user has.
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Changed: *over 20 images.*"])


@pytest.mark.parametrize(("size", "resize"), [(36, 36), (24, 32), (36, 60)])
def test_networks_of_other_frames_are_compared_where_both_look(size, resize):
    photos, old = photographs(12), network()
    new = cs.wrap(
        module(),
        size=size,
        resize=resize,
        mean=0.5,
        std=0.25,
        engine="torch",
        name="new",
    )
    found = check(new, old, photos, BY[1:], Limits(alike="pearson"))
    assert any(
        "look at 12 of 12 images in different frames" in n for n in found.notes
    )
    said = found.images.set_index("image")
    for sample in photos[:3]:
        before = cs.explain(old, sample, by=BY[1])
        after = cs.explain(new, sample, by=BY[1], target=before.target)
        place = after.geometry.as_dict()
        rows, seen = [], []
        for y in range(SIDE):
            for x in range(SIDE):
                at = [
                    ((p + 0.5) / SIDE * place["resized"][k] - place["offset"][k])
                    for k, p in enumerate((y, x))
                ]
                if not all(0 <= a <= size for a in at):
                    continue
                low = [int(min(max(a - 0.5, 0), size - 1)) for a in at]
                share = [
                    min(max(a - 0.5, 0), size - 1) - b
                    for a, b in zip(at, low, strict=True)
                ]
                high = [min(b + 1, size - 1) for b in low]
                value = sum(
                    after.values[cy, cx] * wy * wx
                    for cy, wy in ((low[0], 1 - share[0]), (high[0], share[0]))
                    for cx, wx in ((low[1], 1 - share[1]), (high[1], share[1]))
                )
                rows.append(value)
                seen.append(before.values[y, x])
        assert (len(seen) < SIDE * SIDE) == (resize > size)
        expected = np.corrcoef(seen, rows)[0, 1]
        assert said.loc[sample.name, f"alike {BY[1]}"] == pytest.approx(
            expected, abs=1e-5
        )


def test_the_page_shows_both_networks_and_every_number(tmp_path):
    from consilience.runs.check import run_check

    photos = tmp_path / "photos"
    photos.mkdir()
    for one in photographs(24):
        Image.fromarray(one.pixels).save(photos / f"{one.name}<b>.png")
    old, new = network(), network(head_noise=1.0)
    found, path = run_check(new, old, [photos], tmp_path / "out", BY)
    page = path.read_text()
    assert path == tmp_path / "out" / "report.html"
    assert verdict_sentence(found) in page
    for one in found.criteria:
        assert criterion_sentence(one) in unescape(page)
        assert f"{one.name} {one.value / one.margin:.3f}" in page
    worst = found.images.head(8).to_dict("records")
    places = [page.index(f"<h3>{row['image'].partition('<')[0]}") for row in worst]
    assert places == sorted(places)
    assert page.count("<h4>the old network</h4>") == 8
    assert "p00<b>" not in page
    for row in found.images.to_dict("records"):
        drops = {spec: row[f"alike {spec}"] for spec in BY}
        assert row["method"] in drops
    by = found.images.set_index("image")
    assert set(by["method"]) == set(BY)  # each falls most on some image
    assert len(found.images) == 24


def test_bounds_have_no_nan_where_all_values_are_equal():
    one = change._mean_within("a", np.zeros(9), 0.1, 0.95, True)
    assert (one.low, one.high) == (0, 0)
    assert (one.p_within, one.p_beyond) == (0, 1)
    assert not math.isnan(one.value)


# ---- marks


def planted(n=30, marks=2, classes=3, seed=0, grows=0.0, scale=1.0):
    """Answers of two networks; the first mark's push of class 1 grows by so many
    standard deviations. ``scale`` multiplies all scores of the new one.
    """
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(n, 1, classes))
    old = np.concatenate([plain] * (1 + marks), 1)
    old[:, 1:] += rng.normal(0.3, 0.2, (n, marks, classes))
    new = old + rng.normal(0, 0.02, old.shape)
    new[:, 1, 1] += grows * plain[:, 0, 1].std(ddof=1)
    return (scale * new).astype(np.float32), old.astype(np.float32)


def test_answers_to_marks_by_slow_loops():
    from consilience.simultaneous import simultaneous

    new, old = planted(grows=0.8)
    found = marked_change.compared(new, old, ("a", "b"), 0.5, 0.95)
    differences = np.zeros((30, 2, 3))
    for k in range(3):
        unit = [
            math.sqrt(
                sum((x - side[:, 0, k].mean()) ** 2 for x in side[:, 0, k]) / 29
            )
            for side in (new.astype(float), old.astype(float))
        ]
        for m in range(2):
            added = [
                [(row[m + 1, k] - row[0, k]) / unit[at] for row in side.astype(float)]
                for at, side in enumerate((new, old))
            ]
            assert found.new[m, k] == pytest.approx(np.mean(added[0]))
            assert found.old[m, k] == pytest.approx(np.mean(added[1]))
            differences[:, m, k] = np.subtract(*added)
    assert found.difference == pytest.approx(differences.mean(0))
    assert found.largest == (0, 1)
    flat = differences.reshape(30, 6)
    whole = simultaneous(flat, 0.9)  # two sides of .95 each
    assert found.low.ravel() == pytest.approx(whole.low)
    assert found.high.ravel() == pytest.approx(whole.high)
    t = (flat.mean(0) - 0.5) / (flat.std(0, ddof=1) / math.sqrt(30))
    assert found.p_within == pytest.approx(max(scipy.stats.t.cdf(t, 29)))
    assert found.p_beyond == pytest.approx(simultaneous(flat - 0.5, 0.9).p[1])
    assert (found.n, found.specs) == (30, ("a", "b"))
    table = found.table(lambda index: f"c{index}")
    assert table["mark"].tolist() == ["a", "b"]
    assert table.loc[0, ["class_index", "class"]].tolist() == [1, "c1"]
    for name, values in (
        ("old", found.old),
        ("new", found.new),
        ("difference", found.difference),
        ("low", found.low),
        ("high", found.high),
    ):
        assert table.loc[0, name] == values[0, 1]
        assert table.loc[1, name] == values[1, table.loc[1, "class_index"]]


def test_another_scale_of_the_scores_is_no_answer():
    new, old = planted(scale=7.0)
    found = marked_change.compared(new, old, ("a", "b"), 0.5, 0.95)
    assert np.abs(found.difference).max() < 0.05
    assert found.p_within < 0.05
    assert found.p_beyond == 1


@pytest.mark.parametrize(
    ("grows", "within", "beyond"), [(0.0, True, False), (1.5, False, True)]
)
def test_equal_differences_need_no_test(grows, within, beyond):
    _, old = planted()
    new = old.astype(np.float64)
    new[:, 1, 1] += grows * new[:, 0, 1].std(ddof=1)
    found = marked_change.compared(new, old, ("a", "b"), 0.5, 0.95)
    assert (found.p_within == 0, found.p_beyond <= 0.05) == (within, beyond)
    assert found.low[0, 1] == pytest.approx(grows)
    assert found.high[0, 1] == pytest.approx(grows)


def test_a_class_whose_scores_do_not_vary_is_left_out():
    new, old = planted(grows=0.8)
    old[:, 0, 2] = 4.0
    found = marked_change.compared(new, old, ("a", "b"), 0.5, 0.95)
    assert np.isnan(found.difference[:, 2]).all()
    assert np.isfinite(found.difference[:, :2]).all()
    old[:, 0] = 4.0
    with pytest.raises(ConsilienceError, match="no class's score varies"):
        marked_change.compared(new, old, ("a", "b"), 0.5, 0.95)


@pytest.mark.parametrize("which", ["beyond", "within"])
def test_a_growth_at_the_margin_is_shown_either_way_seldom(which):
    shown, at = 0, 0.5
    for seed in range(60):
        rng = np.random.default_rng(seed)
        plain = rng.normal(size=(12, 1, 20))
        old = np.concatenate([plain] * 4, 1)
        new = old.copy()
        growth = rng.exponential(1.0, (12, 3, 20)) - 1  # skewed, twelve images
        new[:, 1:] += (growth * 0.5 + at) * plain.std(0, ddof=1)
        found = marked_change.compared(new, old, ("a", "b", "c"), at, 0.95)
        shown += getattr(found, f"p_{which}") <= 0.05
    assert shown <= 8  # .05 of 60 and three standard deviations


def test_a_network_that_learnt_a_mark_is_changed_on_plain_images():
    def net(learnt):
        made = module()

        class Marked(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = made

            def forward(self, x):
                said = self.body(x)
                dark = (x[:, :, -10:, :10].amax(1) < -1.5).float().mean((1, 2))
                return said + learnt * dark[:, None] * torch.tensor([1.0, 0, 0])

        return cs.wrap(
            Marked().eval(), size=SIDE, mean=0.5, std=0.25, engine="torch", name="m"
        )

    rng = np.random.default_rng(0)
    photos = [
        Sample(f"p{place}", rng.integers(60, 200, (SIDE, SIDE, 3)).astype(np.uint8))
        for place in range(30)
    ]
    marks = ["barcode:size=0.6,place=bottom-left", "cast"]
    asked = {"flips": 0.2, "marks": marks, "mark": 0.5}
    found = check(net(50.0), net(0.0), photos, ["centre"], asked)
    [one] = [one for one in found.criteria if one.name == "marks"]
    plain = [one for one in found.criteria if one.name != "marks"]
    assert all(each.answer == "within" for each in plain)
    assert one.answer == "beyond"
    assert one.held.startswith("barcode")
    assert found.verdict == "changed"
    assert found.marks["mark"].tolist()[0] == one.held
    assert found.marks["class_index"].tolist()[0] == 0
    assert one.value == found.marks["difference"].max()
    assert (
        f"largest growth of an answer to a mark ({one.held} in 30 images)"
        in criterion_sentence(one)
    )
    assert f"| `{one.held}` | " in markdown(found)
    same = check(net(0.0), net(0.0), photos, ["centre"], asked)
    assert same.verdict == "same"
    # every drawn mark is tried unless told, and which were not is said
    whole = check(net(50.0), net(0.0), photos, ["centre"], {"flips": 0.2})
    assert set(whole.marks["mark"]) == set(build_marks(battery()))
    assert whole.limits.marks == tuple(build_marks(battery()))
    of_all, of_none = (
        check(net(learnt), net(0.0), photos, ["centre"], {"flips": 0.2}).criteria[-1]
        for learnt in (50.0, 0.0)
    )
    assert of_all.held == "border"  # dark to the corner as well
    assert of_all.p_beyond < 0.05 < of_none.p_beyond
    without = {"marks": ["none"]}
    bare = check(net(50.0), net(0.0), photos, ["centre"], {"flips": 0.2, **without})
    assert not len(bare.marks)
    assert bare.verdict == "same"
    assert bare.notes == (change.UNMARKED,)  # another `learnt` is another network


def test_of_many_images_some_are_marked():
    from consilience.runs.check import _Planted

    def places(most, count, seen):
        plan = _Planted(most, count)
        return [place for place in range(seen) if plan.next()]

    assert places(4, 10, 10) == [0, 3, 5, 8]
    assert places(4, 4, 4) == places(4, 3, 4) == [0, 1, 2, 3]
    assert places(4, 0, 9) == [0, 1, 2, 3]  # how many come is not known
    assert places(2, 3, 90) == [0, 2]  # a loader's length is one of batches
    asked = {"marks": ["logo"], "marked": 5}
    found = check(network(bias=0.01), network(), photographs(40), ["centre"], asked)
    one = found.criteria[-1]
    assert (one.name, one.n) == ("marks", 5)
    assert "(logo in 5 images)" in criterion_sentence(one)
    few = check(
        network(), network(), photographs(40)[::8], ["centre"], {"marks": ["logo"]}
    )
    known = check(
        network(bias=0.01), network(), photographs(40)[::8], ["centre"], asked
    )
    assert known.criteria[-1].value == pytest.approx(one.value)
    assert few.notes[1:] == ()


def test_marks_that_a_network_cannot_see_are_left_out_and_said():
    torch.manual_seed(0)

    def net(channels):
        made = nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        return cs.wrap(
            made.eval(), size=SIDE, mean=[0.5] * channels, std=[0.5] * channels
        )

    rng = np.random.default_rng(0)

    def photos(channels):
        shape = (8, SIDE, SIDE, channels)
        drawn = rng.integers(0, 256, shape).astype(np.uint8)
        return [Sample(f"p{place}", one) for place, one in enumerate(drawn)]

    grey = net(1)
    found = check(grey, grey, photos(1), ["centre"])
    assert set(build_marks(battery())) - set(found.limits.marks) == {"cast"}
    assert any("not planted: cast" in note for note in found.notes)
    many = net(5)
    found = check(many, many, photos(5), ["centre"])
    assert found.limits.marks == ("vignette", "noise", "blur")  # which have no colour
    assert any("sees images of 5 channels" in note for note in found.notes)
    with pytest.raises(ConsilienceError, match="5 channels"):
        check(many, many, photos(5), ["centre"], {"marks": ["cast"]})


def test_a_network_that_says_one_thing_has_no_answer_to_marks():
    flat = cs.wrap_callable(lambda x: np.zeros((len(x), 3)), size=SIDE)
    found = check(flat, network(), photographs(20), ["centre"])
    one = found.criteria[-1]
    assert (one.name, one.answer, one.n) == ("marks", "not shown", 20)
    assert math.isnan(one.value)
    assert criterion_sentence(one) == (
        "answers to marks were not compared: not shown to be within or beyond 0.4"
    )
    assert any("what a mark adds has no unit" in note for note in found.notes)
    assert found.verdict == "changed"
    markdown(found), junit(found)


def test_a_score_that_is_not_finite_under_a_mark_ends_no_check(monkeypatch):
    plain = marked_change.answers

    def overflows(model, images, marks, seed):
        scores = plain(model, images, marks, seed).copy()
        scores[:3, 1, 2] = math.inf
        return scores

    monkeypatch.setattr(marked_change, "answers", overflows)
    found = check(
        network(bias=0.01),
        network(),
        photographs(20),
        ["centre"],
        {"marks": ["logo"]},
    )
    said = [note for note in found.notes if "not finite" in note]
    assert said == [
        "answers to marks were not compared: the new network's scores of 3 of 20 images, "
        "marked or plain, are not finite"
    ]
    one = found.criteria[-1]
    assert (one.name, one.answer, one.n) == ("marks", "not shown", 20)
    assert len(found.images) == 20
    assert found.verdict == "not shown"


def test_a_folder_is_counted(tmp_path, monkeypatch):
    from consilience.runs import check as running

    plans = []
    plain = running._Planted.__init__
    monkeypatch.setattr(
        running._Planted,
        "__init__",
        lambda self, *given: plans.append(given) or plain(self, *given),
    )
    for one in photographs(5):
        Image.fromarray(one.pixels).save(tmp_path / f"{one.name}.png")
    for given in (tmp_path, str(tmp_path), str(tmp_path / "*.png")):
        found = check(network(), network(bias=0.01), given, ["centre"], {"marked": 2})
        assert found.criteria[-1].n == 2
        assert sorted(found.images["image"]) == [f"p0{place}" for place in range(5)]
    assert plans == [(2, 5)] * 3


def test_maps_that_ran_alike_do_not_show_what_another_precision_does():
    old = network()
    new = old.using(precision="bf16")
    by = ["gradcam", BY[1]]
    found = check(new, old, photographs(6), by, {"marks": ["none"]})
    said = [note for note in found.notes if note.startswith("maps of ")]
    assert said == [
        "maps of gradcam were made in f32 by torch for both networks: they do not show "
        "what bf16 by torch and f32 by torch do to them"
    ]
    plain = check(old, old, photographs(6), by, {"marks": ["none"]})
    assert not [note for note in plain.notes if note.startswith("maps of ")]


def test_marks_are_asked_for_by_file_and_by_hand(tmp_path, capsys):
    assert Limits(marks=("logo",)).marks == ("logo",)
    assert Limits().marks == Limits(marks=("all",)).marks == ("all",)
    assert Limits(marks=("none",)).marks == Limits(marks=()).marks == ()
    named, notes = Limits().seen_by(network())
    assert len(named.marks) >= 19
    assert notes == ()
    assert named.seen_by(network()) == (named, ())
    with pytest.raises(ConsilienceError, match="marked"):
        Limits(marked=1)
    for word in ("all", "none"):
        with pytest.raises(ConsilienceError, match=f"by name; got {word}, logo"):
            Limits(marks=(word, "logo"))
    with pytest.raises(ConsilienceError, match="did you mean 'logo'"):
        Limits(marks=("lgoo",))
    with pytest.raises(ConsilienceError, match="mark"):
        Limits(mark=0.0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for one in photographs(6):
        Image.fromarray(one.pixels).save(photos / f"{one.name}.png")
    asked = ["check", "efficientnet_lite0", "--against", "efficientnet_lite0"]
    asked += ["--images", str(photos), "--by", "centre", "-o", str(tmp_path / "a")]
    assert main([*asked, "--mark", "logo", "--mark", "border", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert {row["mark"] for row in told["marks"]} == {"logo", "border"}
    assert [one["name"] for one in told["criteria"]][-1] == "marks"
    assert told["criteria"][-1]["answer"] == "within"
    assert (tmp_path / "a" / "marks.csv").is_file()
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Answers to planted marks" in page
