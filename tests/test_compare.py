"""Comparing dissections: every number counted by hand; plots hold what the tables hold,
under the right names.
"""

import math
import re
from collections import OrderedDict
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

from consilience.dissection import compare as comparing
from consilience.dissection.compare import compare_sides, side, side_of_words
from consilience.models import weights
from consilience.models.load import load_model
from consilience.show import charts, figures
from consilience.show import dissection_page as page
from consilience.types import ConsilienceError

UNITS_A = [
    ("low", 0, "red-c", "color", 0.3, True),
    ("low", 1, "red-c", "color", 0.2, True),
    ("low", 2, "dog", "object", 0.05, True),
    ("low", 3, "sky", "object", 0.03, False),
    ("high", 0, "dog", "object", 0.5, True),
    ("high", 1, "wheel", "part", 0.1, True),
    ("high", 2, "", "", 0.0, False),
]
UNITS_B = [
    ("low", 0, "dog", "object", 0.1, True),
    ("low", 1, "red-c", "color", 0.06, True),
    ("high", 0, "bed", "object", 0.2, True),
    (
        "high",
        1,
        "dog",
        "part",
        0.2,
        True,
    ),  # another concept: the same name in another category
]
POSSIBLE = pd.DataFrame(
    {
        "concept": ["red-c", "blue-c", "dog", "sky", "bed", "wheel", "dog", "cat"],
        "category": [
            "color",
            "color",
            "object",
            "object",
            "object",
            "part",
            "part",
            "object",
        ],
        "eligible": [True, True, True, True, True, True, True, False],
    }
)


def table(units):
    frame = pd.DataFrame(
        units, columns=["layer", "unit", "concept", "category", "iou", "detector"]
    )
    return frame.assign(significant=frame["detector"] & (frame["iou"] > 0.08))


@pytest.fixture
def two():
    return compare_sides(
        side("Places", table(UNITS_A), POSSIBLE),
        side("ImageNet", table(UNITS_B), POSSIBLE),
    )


def test_jaccard_counted_by_hand(two):
    rows = two.jaccard().set_index("a")
    assert tuple(rows.loc["low", ["concepts_a", "concepts_b", "shared"]]) == (2, 2, 2)
    assert rows.loc["low", "jaccard"] == 1
    assert tuple(rows.loc["high", ["concepts_a", "concepts_b", "shared"]]) == (
        2,
        2,
        0,
    )
    assert rows.loc["high", "jaccard"] == 0
    assert tuple(rows.loc["all layers", ["concepts_a", "concepts_b", "shared"]]) == (
        3,
        4,
        2,
    )
    assert rows.loc["all layers", "jaccard"] == 2 / 5


def test_chance_over_all_draws(two):
    """Every way of drawing 3 and 4 of the 7 concepts that could be detected."""
    rows = two.jaccard().set_index("a")
    draws = [
        set(a) & set(b)
        for a in combinations(range(7), 3)
        for b in combinations(range(7), 4)
    ]
    expected = np.mean([len(x) / (7 - len(x)) for x in draws])
    assert rows.loc["all layers", "expected"] == pytest.approx(expected)
    assert rows.loc["all layers", "p"] == pytest.approx(
        np.mean([len(x) >= 2 for x in draws])
    )


def test_what_only_one_side_could_detect_is_left_out():
    """The pool is what both could detect: two of a's four and two of b's three."""
    eligible = POSSIBLE["eligible"]
    fewer = POSSIBLE.assign(eligible=eligible & (POSSIBLE["concept"] != "wheel"))
    smaller = POSSIBLE.assign(eligible=eligible & (POSSIBLE["concept"] != "bed"))
    found = compare_sides(
        side("a", table(UNITS_A), smaller), side("b", table(UNITS_B), fewer)
    ).jaccard()
    row = found.iloc[-1]
    # wheel (a alone could) and bed (b alone could) are out; a has red-c and dog, b has
    # these and the part dog, of five concepts
    assert tuple(row[["concepts_a", "concepts_b", "shared", "left_out"]]) == (
        2,
        3,
        2,
        2,
    )
    assert row["jaccard"] == 2 / 3
    draws = [
        len(set(a) & set(b))
        for a in combinations(range(5), 2)
        for b in combinations(range(5), 3)
    ]
    assert row["expected"] == pytest.approx(np.mean([x / (5 - x) for x in draws]))
    assert row["p"] == pytest.approx(np.mean([x >= 2 for x in draws]))


def test_concepts_shared_and_own(two):
    found = two.concepts().set_index(["concept", "category"])
    assert dict(found["where"]) == {
        ("red-c", "color"): "both",
        ("dog", "object"): "both",
        ("wheel", "part"): "a",
        ("bed", "object"): "b",
        ("dog", "part"): "b",
    }
    assert tuple(
        found.loc[("red-c", "color"), ["units_a", "units_b", "best_a", "best_b"]]
    ) == (2, 1, 0.3, 0.06)
    assert math.isnan(found.loc[("bed", "object"), "best_a"])
    assert list(two.concepts()["units_a"] + two.concepts()["units_b"]) == [
        3,
        3,
        1,
        1,
        1,
    ]


def test_counts_by_category_layer_and_frequency(two):
    categories = two.categories().set_index("category")
    assert tuple(categories.loc["object"]) == (2, 1, 2, 2)
    assert tuple(categories.loc["color"]) == (2, 1, 1, 1)
    assert tuple(categories.loc["part"]) == (1, 1, 1, 1)
    layers = two.layers().set_index(["side", "layer"])
    assert tuple(layers.loc[("Places", "low"), ["units", "labelled", "unique"]]) == (
        4,
        3,
        2,
    )
    assert layers.loc[("Places", "low"), "mean_score"] == pytest.approx(
        (0.3 + 0.2 + 0.05) / 3
    )
    heat = two.by_layer(2)
    assert set(heat.index) == {"red-c", "dog"}
    assert heat.loc["red-c", ("Places", "low")] == 2
    assert (
        heat.loc["dog", ("ImageNet", "high")] == 0
    )  # the part called dog is another concept
    frequencies = two.frequencies().set_index("units")
    assert frequencies.loc[1].tolist() == [1, 4]
    assert frequencies.loc[2].tolist() == [2, 0]


def test_significant_units_alone():
    a, b = (
        side(name, table(units), POSSIBLE, "significant")
        for name, units in (("Places", UNITS_A), ("ImageNet", UNITS_B))
    )
    rows = compare_sides(a, b).jaccard().set_index("a")
    assert tuple(rows.loc["low", ["concepts_a", "concepts_b", "shared"]]) == (1, 1, 0)


def test_the_headline_says_who_is_who(two):
    said = two.headline()
    assert said.startswith(
        "Places detects 3 concepts and ImageNet 4; they share 2 (Jaccard 0.400;"
    )
    swapped = comparing.compare_sides(two.b, two.a).headline()
    assert swapped.startswith("ImageNet detects 4 concepts and Places 3;")


def test_layers_of_other_names_go_by_their_order():
    other = table(
        [("c1", *row[1:]) if row[0] == "low" else ("c2", *row[1:]) for row in UNITS_B]
    )
    found = compare_sides(side("a", table(UNITS_A)), side("b", other))
    assert found.pairs == (("low", "c1"), ("high", "c2"))
    assert found.jaccard()["expected"].isna().all()
    alone = compare_sides(side("a", table(UNITS_A)), side("b", other).only(["c2"]))
    assert alone.pairs == ()
    assert list(alone.jaccard()["a"]) == ["all layers"]


def test_two_layers_of_one_run():
    whole = side("m", table(UNITS_A), POSSIBLE)
    low, high = (
        replace(whole.only([name]), name=f"m {name}") for name in ("low", "high")
    )
    found = compare_sides(low, high)
    assert found.pairs == (("low", "high"),)
    assert found.jaccard().iloc[0]["shared"] == 1


def test_words_are_compared_like_concepts():
    words = pd.DataFrame(
        {
            "layer": "l",
            "unit": [0, 1, 2],
            "word": ["dog", "", "cat"],
            "word_score": [1.0, np.nan, 2.0],
        }
    )
    other = pd.DataFrame(
        {
            "layer": "l",
            "unit": [0, 1],
            "word": ["dog", "sky"],
            "word_score": [1.0, 3.0],
        }
    )
    found = compare_sides(
        side_of_words("a", words, ["dog", "cat", "sky"]),
        side_of_words("b", other, ["dog", "cat", "sky"]),
    )
    assert found.jaccard().iloc[0]["jaccard"] == pytest.approx(1 / 3)
    assert found.layers().iloc[0]["labelled"] == 2


def test_nothing_detected_has_no_jaccard():
    none = table(UNITS_A).assign(detector=False)
    found = compare_sides(side("a", none, POSSIBLE), side("b", none, POSSIBLE))
    assert math.isnan(found.jaccard().iloc[-1]["jaccard"])
    assert found.headline() == "a detects 0 concepts and b 0; they share 0"
    assert found.concepts().empty
    assert found.by_layer().empty
    assert found.frequencies().empty


def test_what_cannot_be_compared_is_refused(two):
    with pytest.raises(ConsilienceError, match="two names"):
        compare_sides(two.a, two.a)
    with pytest.raises(ConsilienceError, match="no layer 'mid'; there is: low, high"):
        two.a.only(["mid"])
    with pytest.raises(ConsilienceError, match="without a null"):
        side("a", table(UNITS_A).drop(columns="significant"), POSSIBLE, "significant")


# ---- the Places365 checkpoint as published


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint of the published form: an old-style file with module.

    prefixes beside epoch, arch and best_prec1.
    """
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(1)
    module = load_model("resnet18:weights=random").module
    state = OrderedDict(
        (f"module.{name}", value)
        for name, value in module.state_dict().items()
        if "num_batches" not in name
    )
    state["module.fc.weight"], state["module.fc.bias"] = (
        torch.randn(365, 512) / 30,
        torch.randn(365),
    )
    content = {
        "epoch": 90,
        "arch": "resnet18",
        "state_dict": state,
        "best_prec1": torch.tensor(54.65),
    }
    torch.save(
        content,
        folder / "resnet18_places365.pth.tar",
        _use_new_zipfile_serialization=False,
        pickle_protocol=2,
    )
    names = [
        "airfield",
        "airplane_cabin",
        "apartment_building/outdoor",
        *(f"place_{number}" for number in range(3, 365)),
    ]
    lines = [f"/{name[0]}/{name} {number}" for number, name in enumerate(names)]
    (folder / "categories_places365.txt").write_text("\n".join(lines) + "\n")
    return folder, names, state


def test_the_places365_checkpoint_loads(places):
    folder, names, state = places
    model = load_model(
        "resnet18",
        weights=folder / "resnet18_places365.pth.tar",
        labels=folder / "categories_places365.txt",
        engine="torch",
    )
    assert model.classes == tuple(names)
    own = model.module.state_dict()
    assert all(
        torch.equal(own[name.removeprefix("module.")], value)
        for name, value in state.items()
    )
    assert model.scores(torch.rand(1, 3, 224, 224)).shape == (1, 365)


def test_lines_that_only_look_like_places_are_names(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("/a/airfield 0\nroute 66\n")
    assert weights.read_labels(file) == ("/a/airfield 0", "route 66")
    file.write_text("/a/airfield 0\n/b/bar 2\n")
    with pytest.raises(ConsilienceError, match="none for class 1"):
        weights.read_labels(file)


# ---- drawings


def text_of(figure):
    axes = figure.axes[0]
    keys = [
        text.get_text() for legend in figure.legends for text in legend.get_texts()
    ]
    return [*keys, *(text.get_text() for text in axes.texts)]


@pytest.mark.parametrize(
    ("only_a", "shared", "only_b"),
    [(3, 2, 5), (10, 1, 1), (0, 4, 6), (4, 0, 3), (7, 7, 0), (5, 5, 5)],
)
def test_areas_of_the_venn_diagram_are_the_counts(only_a, shared, only_b):
    r1, r2, apart = charts.circles(only_a, shared, only_b)
    y, x = np.mgrid[-130:130:0.5, -130:400:0.5]
    in_a, in_b = x**2 + y**2 < r1**2, (x - apart) ** 2 + y**2 < r2**2
    areas = np.array(
        [(in_a & ~in_b).sum(), (in_a & in_b).sum(), (in_b & ~in_a).sum()], float
    )
    counts = np.array([only_a, shared, only_b], float)
    np.testing.assert_allclose(areas / areas.sum(), counts / counts.sum(), atol=2e-3)


def test_the_venn_labels_follow_the_data():
    one, other = (
        text_of(charts.venn_figure("Places", "ImageNet", 3, 2, 5)),
        text_of(charts.venn_figure("ImageNet", "Places", 5, 2, 3)),
    )
    assert one[:2] == [
        "Places: 5, of which 3 are its own",
        "ImageNet: 7, of which 5 are its own",
    ]
    assert other[:2] == one[1::-1]
    assert "shared: 2" in one


def test_bars_are_as_long_as_their_numbers():
    figure = charts.bars_figure(
        ["object", "part"],
        [("Places", [4, 1]), ("ImageNet", [2, float("nan")])],
        "units",
    )
    assert [bar.get_width() for bar in figure.axes[0].patches] == [4, 1, 2, 0]
    assert text_of(figure) == ["Places", "ImageNet", "4", "1", "2", "–"]
    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert named == ["object", "part"]
    assert figure.get_label() == (
        "units. Places: object 4, part 1; ImageNet: object 2, part nan"
    )


def test_the_heat_map_holds_every_number(two):
    table = two.by_layer()
    drawn = charts.heat_figure(
        list(table.index), list(table.columns), table.to_numpy().tolist(), "t"
    )
    shown = [said for said in text_of(drawn) if said.isdigit() or said == "·"]
    assert shown == [
        str(count) if count else "·" for count in table.to_numpy().ravel()
    ]


def test_words_of_the_cloud_do_not_overlap():
    rng = np.random.default_rng(0)
    words = [
        (
            f"concept {number}" if number % 3 else f"c{number}",
            float(rng.integers(1, 30)),
        )
        for number in range(60)
    ]
    placed = charts.laid_out(words)
    assert len(placed) > 25
    assert placed[0].word == max(words, key=lambda item: item[1])[0]
    for one, other in combinations(placed, 2):
        apart = one.x + one.width <= other.x or other.x + other.width <= one.x
        assert (
            apart or one.y + one.height <= other.y or other.y + other.height <= one.y
        )
    assert all(
        0 <= spot.x <= charts.CHART_WIDTH - spot.width
        and 0 <= spot.y <= 420 - spot.height
        for spot in placed
    )
    share = {
        word: weight / max(weight for _, weight in words) for word, weight in words
    }
    assert all(
        math.isclose(spot.size, max(11, 34 * math.sqrt(share[spot.word])))
        for spot in placed
    )
    left = len(words) - len(placed)
    assert (
        f"{left} more found no room"
        in text_of(charts.cloud_figure("m", words, "#000"))
    ) == bool(left)


def test_names_are_escaped():
    for svg in (
        charts.venn_figure("<b>", 'a"&', 1, 1, 1),
        charts.bars_figure(["<x>"], [("<y>", [1])], "<t>"),
        charts.heat_figure(["<r>"], [("<s>", "<l>")], [[1]], "<t>"),
        charts.cloud_figure("<n>", [("<w>", 1)], "#000"),
    ):
        text = str(figures.figure_svg(svg))
        assert not re.search(r"<(b|x|y|t|r|s|l|n|w)>", text)
        ElementTree.fromstring(text)


def test_frequencies_are_shown_in_doubling_bins(two):
    table = pd.DataFrame(
        {
            "units": [1, 2, 3, 4, 5, 8, 9],
            "concepts_a": [1, 2, 3, 4, 5, 6, 7],
            "concepts_b": [0, 0, 1, 0, 0, 0, 1],
        }
    )
    labels, counts = page._in_doubling_bins(table)
    assert labels == ["1 unit", "2 units", "3–4 units", "5–8 units", "9–16 units"]
    assert counts == ([1, 2, 7, 11, 7], [0, 0, 1, 0, 1])


def test_the_comparisons_page_holds_every_plot_and_loads_nothing(two):
    text = page.comparison_page(two, "Places and ImageNet", [("Places", "a")], "1")
    assert text.count('<svg role="img"') == 8
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert "Places detects 3 concepts and ImageNet 4" in text
    jaccard = two.jaccard().iloc[-1]
    assert f'<td class="n">{jaccard["jaccard"]:.3f}</td>' in text
    shown = re.findall(
        r'<tr><th scope="row">(\S+)</th><td>\w+</td><td>(\w+)</td>', text
    )
    assert ("bed", "ImageNet") in shown
    assert ("wheel", "Places") in shown
    assert ("dog", "both") in shown
