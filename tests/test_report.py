"""The report: says what the tables hold, loads nothing, is well formed, and lets no
name become markup.
"""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from fakes_report import (
    PHOTOGRAPHS,
    FakeItem,
    blob,
    finding,
    photograph,
    photographs,
    run_of,
    stored,
)
from PIL import Image

from consilience.show import html, tiles, words
from consilience.show.html import MAX_IMAGES, MAX_MAPS, anchors, shown

HOSTILE = "<script>alert('x')</script>\"&.png"


class Reader(HTMLParser):
    """Checks that tags balance and keeps what can be asked of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.faults, self.words = [], [], [], []
        self.feed(text.replace("<wbr>", ""))  # where a name may break
        self.close()
        assert not self.faults
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def small(name, columns=("Grad-CAM", "LIME"), seed=0, size=(64, 64)):
    return stored(
        name,
        photograph(PHOTOGRAPHS[seed % 5], size),
        (size[0] / 2, size[1] / 2),
        columns,
        seed,
    )


def small_run(folder, count=3, columns=("Grad-CAM", "LIME"), **manifest):
    return run_of(
        {f"s{i}.png": small(f"s{i}.png", columns, seed=i) for i in range(count)},
        folder,
        **manifest,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of five photographs."""
    folder = tmp_path_factory.mktemp("run")
    run = photographs(folder)
    path = html.write_report(run)
    return run, path.read_text(encoding="utf-8")


# ---- the file


def test_written_beside_the_run_and_nothing_else(tmp_path):
    path = html.write_report(small_run(tmp_path))
    assert path == tmp_path / "report.html"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_same_run_same_bytes(tmp_path):
    assert html.report_page(small_run(tmp_path)) == html.report_page(
        small_run(tmp_path)
    )


def test_page_is_well_formed_and_ids_are_unique(whole):
    reader = Reader(whole[1])
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in reader.all("a") + reader.all("use"):
        target = attrs.get("href") or attrs.get("xlink:href")
        assert target.startswith("#")
        assert target[1:] in ids


def test_page_loads_nothing(whole):
    reader = Reader(whole[1])
    bare = re.sub(r'base64,[^"]+', "", whole[1].replace(script_of(whole[1]), ""))
    bare = re.sub(r'<script type="application/json".*?</script>', "", bare)
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<)]*", bare))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert all(
        attrs["src"].startswith("data:image/webp;base64,")
        for attrs in reader.all("img")
    )
    assert not reader.all("link") + reader.all("iframe") + reader.all("object")
    assert "@import" not in whole[1]
    assert not re.search(r"url\((?!#)", whole[1])


def script_of(text):
    return re.search(r"<script>(.*)</script>", text, re.S).group(1)


def test_policy_of_the_page_allows_its_own_script_alone(whole):
    (policy,) = [
        a["content"]
        for a in Reader(whole[1]).all("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(
        hashlib.sha256(script_of(whole[1]).encode()).digest()
    ).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_every_image_has_words_and_a_size(whole):
    images = Reader(whole[1]).all("img")
    assert len(images) == 5 * 4
    for attrs in images:
        assert len(attrs["alt"]) > 10
        data = base64.b64decode(attrs["src"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (
            int(attrs["width"]),
            int(attrs["height"]),
        )
        assert attrs["loading"] == "lazy"


def test_embedded_images_are_the_rendered_ones(whole):
    run, text = whole
    drawn = tiles.tiles(run.load(shown(run)[0]))
    drawn = [tile for tile in drawn if tile.kind != "mask"]  # cut in the browser
    assert [tile.kind for tile in drawn] == ["image", "map", "map", "pair"]
    for tile, attrs in zip(drawn, Reader(text).all("img"), strict=False):
        pixels = np.array(
            Image.open(
                io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))
            ).convert("RGB")
        )
        assert np.abs(pixels.astype(int) - tile.image).mean() < 8


def test_large_frames_are_made_small(tmp_path):
    kept = {"big.png": small("big.png", ("Grad-CAM", "Grad-CAM 2"), size=(700, 1000))}
    for attrs in Reader(html.report_page(run_of(kept, tmp_path))).all("img"):
        assert (attrs["width"], attrs["height"]) == ("320", "224")


def test_tables_have_headers_with_a_scope(whole):
    reader = Reader(whole[1])
    assert all(attrs.get("scope") in ("col", "row") for attrs in reader.all("th"))
    assert (
        dict(reader.tags[[tag for tag, _ in reader.tags].index("html")][1])["lang"]
        == "en"
    )


# ---- what it says


def test_the_verdict_comes_first_in_words_with_the_tables_numbers(whole):
    run, text = whole
    row = run.summary.iloc[0]
    said = Reader(text).text
    expected = (
        f"mean IoU {row.iou_mean:.3f} (95 % interval {row.iou_low:.3f} to {row.iou_high:.3f}), "
        f"where independent masks of these areas would reach {row.expected_mean:.3f} ; p = "
        f"0.031 by permuting images"
    )
    said = said.replace(words.NBSP, " ")
    assert "On 5 images, Grad-CAM and LIME agree better than chance" in said
    assert expected.replace(" ;", ";") in said.replace(" ;", ";").replace("  ", " ")
    order = [
        "agree better than chance",
        "What was asked",
        "Audit: can these",
        "Image by image",
        "All numbers A row",
        "How it was made explainer",
    ]
    at = [said.index(words) for words in order if words in said]
    assert at == sorted(at)
    assert len(at) >= 4


def test_every_number_of_every_pair_is_in_the_table(whole):
    run, text = whole
    reader = Reader(text)
    values = [
        attrs["data-value"] for attrs in reader.all("td") if "data-value" in attrs
    ]
    keys = [
        "iou",
        "expected_iou",
        "excess",
        "excess_of_possible",
        "p",
        "spearman",
        "iou_at_10",
        "iou_at_20",
        "iou_at_30",
    ]
    expected = run.agreement[[*keys, "area_a", "area_b"]].to_numpy(float).ravel()
    np.testing.assert_array_equal(np.array(values, float), expected)


def test_rows_of_the_table_lead_to_their_images(whole):
    reader = Reader(whole[1])
    led = [
        attrs["href"]
        for attrs in reader.all("a")
        if attrs["href"].startswith("#image-")
    ]
    known = anchors(whole[0])
    surest_wrong = ["rocket.jpg", "astronaut.png"]
    wanted = [*surest_wrong, *whole[0].samples]
    assert led == [f"#{known[name]}" for name in wanted]
    assert [attrs["id"] for attrs in reader.all("article")] == list(known.values())
    assert list(known)[:2] == surest_wrong


def test_predictions_and_truth_are_shown(whole):
    said = Reader(whole[1]).text
    assert "predicted tabby, tabby cat with probability 62.0 %" in said
    assert "✗ true class: space suit" in said
    assert said.count("✓ the true class") == 2


def test_the_page_begins_with_what_is_right_and_lists_what_is_called_wrong(whole):
    reader = Reader(whole[1])
    said = re.sub(r"\s+", " ", reader.text)
    assert "5 images explained; 2 of 4 right." in said
    start = said.index("What it calls wrong")
    assert said.index("2 of 4 right") < start
    assert "space suit" in said[start : start + 300]


def test_wrong_images_come_first_on_the_page_and_surest_first_in_the_list(tmp_path):
    one = small("s", ("Grad-CAM", "RISE"), size=(16, 16))
    names = [f"s{i}" for i in range(5)]
    run = run_of(dict.fromkeys(names, one), tmp_path)
    run.predictions = {
        name: {
            "label": "cat" if right is False else "dog",
            "probability": p,
            "true": None if right is None else "dog",
            "right": right,
        }
        for name, right, p in zip(
            names,
            [True, False, None, False, True],
            [0.9, 0.3, 0.5, 0.8, 0.7],
            strict=True,
        )
    }
    assert shown(run) == ["s1", "s3", "s0", "s2", "s4"]
    context = html.report_context(run)
    assert [row["name"] for row in context["wrong"]] == ["s3", "s1"]
    assert [row["anchor"] for row in context["wrong"]] == ["image-2", "image-1"]
    assert context["confusion"] == [("dog", "cat", 2)]
    assert "Classes that are taken for another" in html.report_page(run)


def verdict_of(tmp_path, **changes):
    run = small_run(tmp_path)
    for key, value in changes.items():
        run.summary[key] = value
    return re.sub(r"\s+", " ", Reader(html.report_page(run)).text).replace(
        words.NBSP, " "
    )


@pytest.mark.parametrize(
    ("verdict", "sentence", "badge"),
    [
        ("shown", "agree better than chance", "Better than chance"),
        (
            "not-shown",
            "were not shown to agree better than chance",
            "Not shown",
        ),
        ("below", "agree less than chance would", "Worse than chance"),
    ],
)
def test_each_verdict_has_its_sentence(tmp_path, verdict, sentence, badge):
    said = verdict_of(tmp_path, verdict=verdict)
    assert sentence in said
    assert badge in said


def test_one_image_is_not_testable_and_says_why(tmp_path):
    said = Reader(html.report_page(small_run(tmp_path, count=1))).text
    assert "Could not be shown" in said
    assert "shown: one image has no other to be exchanged with." in said
    assert "On 1 image, the IoU is" in said
    assert "interval" not in said[: said.index("What was asked")]


def test_one_explainer_has_nothing_to_compare(tmp_path):
    said = Reader(html.report_page(small_run(tmp_path, columns=("LIME",)))).text
    assert "Nothing to compare" in said
    assert "All numbers" not in said


def test_three_explainers_get_a_matrix_and_a_verdict_each(tmp_path):
    run = small_run(tmp_path, columns=("Grad-CAM", "LIME", "RISE"))
    reader = Reader(html.report_page(run))
    said = reader.text
    assert "2 more pairs" in said
    for row in run.summary.itertuples():
        assert f"mean IoU {row.iou_mean:.3f}" in said.replace("  ", " ")
        assert f"mean excess {row.excess_mean:.3f}".replace("-", "−") in said.replace(
            "  ", " "
        )


def test_mismatched_numbers_are_marked_wherever_they_stand(tmp_path):
    run = small_run(tmp_path, columns=("Grad-CAM", "LIME", "RISE"))
    reason = "different weights of one model (a@1 and a@2)"
    one = (run.agreement["a"] == "Grad-CAM") & (run.agreement["b"] == "LIME")
    run.agreement.loc[one, "mismatch"] = reason
    run.summary.loc[0, "mismatch"] = reason
    reader = Reader(html.report_page(run))
    marked = [attrs for attrs in reader.all("span") if attrs.get("class") == "doubt"]
    # an image: 11 numbers in its card, 11 in the table, 1 under its tile; verdict: IoU,
    # excess and the legend; matrix: 2
    assert len(marked) == 3 * (11 + 11 + 1) + 3 + 2
    assert "Not a valid comparison: different weights" in reader.text


def test_errors_of_the_audit_stand_beside_the_verdict_and_first_in_the_list(tmp_path):
    run = small_run(tmp_path)
    run.audit = [
        finding("n", "note", "a note"),
        finding("e", "error", "an error", "LIME"),
        finding("w", "warning", "a warning"),
    ]
    said = Reader(html.report_page(run)).text
    assert (
        said.index("1 error") < said.index("What was asked") < said.index("an error")
    )
    assert said.index("an error") < said.index("a warning") < said.index("a note")


def test_what_has_no_number_has_a_dash_and_a_reason(tmp_path):
    kept = {"s.png": small("s.png"), "t.png": small("t.png", seed=3)}
    for item in kept["s.png"].items:
        item.mask = np.zeros((64, 64), bool)
    flat = kept["s.png"].items[0]
    flat.values = np.zeros((64, 64), np.float32)
    run = run_of(kept, tmp_path)
    run.agreement.loc[0, ["iou", "expected_iou", "excess", "spearman"]] = np.nan
    reader = Reader(html.report_page(run))
    assert "– both masks are empty" in reader.text.replace("  ", " ")
    assert "– a map is constant" in reader.text.replace("  ", " ")
    assert "flat: every value is 0" in reader.text
    assert "nan" not in reader.text.lower().split()


def test_numbers_that_json_left_out_are_dashes(tmp_path):
    run = small_run(tmp_path, count=1)
    run.summary = run.summary.astype(object).where(run.summary.notna(), None)
    assert "None" not in Reader(html.report_page(run)).text


def test_failures_are_listed(tmp_path):
    run = small_run(
        tmp_path, failures=[{"name": "broken.jpg", "reason": "damaged or truncated"}]
    )
    said = Reader(html.report_page(run)).text
    assert "1 image failed" in said
    assert "broken.jpg damaged or truncated" in said


def test_many_images_are_capped_and_the_page_says_so(tmp_path):
    one = small("s", ("Grad-CAM", "RISE"), size=(16, 16))
    count, there = MAX_IMAGES + 3, MAX_MAPS // 2
    run = run_of({f"s{i}": one for i in range(count)}, tmp_path)
    run.agreement["sample"] = [f"s{i}" for i in range(count)]
    reader = Reader(html.report_page(run))
    assert len(reader.all("article")) == there
    assert f"The first {there} of {count} images are shown" in reader.text
    assert len([a for a in reader.all("td") if "data-value" in a]) == 11 * count


def test_a_run_of_many_columns_shows_fewer_images(tmp_path):
    """Four methods: 80 images have 320 maps."""
    one = small("s", ("Grad-CAM", "RISE", "LIME", "Score-CAM"), size=(16, 16))
    run = run_of({f"s{i}": one for i in range(90)}, tmp_path)
    assert shown(run) == [f"s{i}" for i in range(80)]
    assert len(anchors(run)) == 80


def test_published_values_have_their_column(tmp_path):
    run = small_run(tmp_path)
    run.agreement["published_iou"] = [0.1025, np.nan, 0.1692]
    said = Reader(html.report_page(run)).text
    assert "published IoU 0.102" in said.replace(
        "  ", " "
    ) or "published IoU 0.103" in said.replace("  ", " ")
    assert "not published" in said


# ---- hostile words


def test_no_name_becomes_markup(tmp_path):
    kept = {HOSTILE: small(HOSTILE, (HOSTILE + "a", "LIME" + HOSTILE))}
    said = {
        HOSTILE: {
            "label": HOSTILE,
            "probability": 0.5,
            "true": HOSTILE + "2",
            "right": False,
        }
    }
    run = run_of(
        kept,
        tmp_path,
        said,
        title=HOSTILE,
        note=HOSTILE,
        command=HOSTILE,
        target=HOSTILE,
        preset=HOSTILE,
    )
    run.manifest["failures"] = [{"name": HOSTILE, "reason": HOSTILE}]
    run.manifest["model"]["spec"] = HOSTILE
    run.manifest["columns"][0]["explainer"] = HOSTILE
    run.agreement["mismatch"] = HOSTILE
    run.summary["mismatch"] = HOSTILE
    run.summary["why"] = HOSTILE
    run.audit = [finding(HOSTILE, "error", HOSTILE, HOSTILE)]
    text = html.report_page(run)
    reader = Reader(text)
    scripts = [a for a in reader.all("script") if a.get("type") != "application/json"]
    assert len(scripts) == 1
    assert "<script>alert" not in text
    assert reader.text.count("alert('x')") > 20


def test_control_characters_in_names_are_made_visible(tmp_path):
    name = "a\x00b\u202egnp.exe"
    text = html.report_page(run_of({name: small(name)}, tmp_path))
    assert "a\ufffdb\ufffdgnp.exe" in Reader(text).text
    assert "\x00" not in text
    assert "\u202e" not in text


# ---- words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31, "0.310"),
        (-0.0712, "−0.071"),
        (-0.0001, "0.000"),
        (1.0, "1.000"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_iou_in_words(value, text):
    assert words.format_share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.031, "0.031"),
        (0.0312, "0.031"),
        (0.5, "0.50"),
        (2e-5, "< 0.001"),
        (0.0996, "0.10"),
        (0.0398, "0.040"),
    ],
)
def test_p_in_words(value, text):
    assert words.format_p(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0834, "83.4 ms"),
        (0.9996, "1 s"),
        (4.831, "4.83 s"),
        (31.4, "31.4 s"),
        (312, "5 min 12 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_seconds_in_words(value, text):
    assert words.format_seconds(value).replace(words.NBSP, " ") == text


def test_date_in_words():
    assert (
        words.format_date("2026-11-22T21:40:07+00:00")
        == "22 November 2026, 21:40 UTC"
    )
    assert words.format_date("yesterday") == "yesterday"


def test_holm_is_named_where_there_are_several_pairs():
    row = {
        "a": "A",
        "b": "B",
        "n": 9,
        "images": 10,
        "iou_mean": 0.3,
        "iou_low": 0.2,
        "iou_high": 0.4,
        "expected_mean": 0.1,
    }
    row |= {"p_images": 0.01, "p_holm": 0.03, "verdict": "shown"}
    said = words.verdict_sentence(row, pairs=3).replace(words.NBSP, " ")
    assert "p = 0.030 by permuting images, adjusted for 3 pairs (Holm)" in said
    assert "On 9 of 10 images (the rest have no defined IoU)" in said


def test_a_run_may_hold_a_map_without_a_mask(tmp_path):
    values = blob((32, 32), (64, 64), 0)
    kept = {"s": small("s")}
    kept["s"].items = (*kept["s"].items, FakeItem("bare", values))
    run = run_of(kept, tmp_path)
    titles = [tile.title for tile in tiles.tiles(run.load("s"))]
    assert titles == [
        "image",
        "Grad-CAM",
        "LIME",
        "bare",
        "Grad-CAM mask",
        "LIME mask",
        "Grad-CAM & LIME",
    ]
    assert "bare" in Reader(html.report_page(run)).text
    assert isinstance(run.agreement, pd.DataFrame)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((0.012, 0.008, 0.016), "loses 1.20 % (0.800 % to 1.60 %)"),
        ((-0.00718, -0.02, 0.005), "gains 0.718 % (−0.500 % to 2.00 %)"),
        ((0.0, None, None), "loses 0 %"),
        ((None, None, None), "loses –"),
    ],
)
def test_a_loss_never_has_sign_and_word_both(lost, said):
    row = dict(zip(("lost", "lost_low", "lost_high"), lost, strict=True))
    assert words.loss_clause(row).replace("\u00a0", " ") == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.92, "92.0"),
        (0.477, "47.7"),
        (0.0417, "4.17"),
        (1, "100"),
        (0, "0"),
        (1e-6, "0.0001"),
        (0.9996, "100"),
    ],
)
def test_per_cents_have_three_digits(share, said):
    assert words.format_percent(share) == f"{said}\u00a0%"


def test_random_weights_are_said_before_anything_else(tmp_path):
    run = small_run(tmp_path)
    assert "has learnt nothing" not in html.report_page(run)
    run.manifest["model"]["facts"]["weights"] = "random, seed 0"
    text = Reader(html.report_page(run)).text
    assert text.index("efficientnet_lite0 has learnt nothing") < text.index(
        "mean IoU"
    )


def test_findings_of_one_kind_stand_together(tmp_path):
    run = small_run(tmp_path)
    run.audit = [
        finding("a", "warning", "first of a", "x"),
        finding("b", "error", "the only b", "y"),
        finding("a", "warning", "second of a", "z"),
    ]
    kinds = html.by_kind(run.audit)
    assert [[one.message for one in kind] for kind in kinds] == [
        ["the only b"],
        ["first of a", "second of a"],
    ]
    text = Reader(html.report_page(run)).text
    assert "1 more finding of this kind second of a." in text
    assert text.count("Look again.") == 2


def test_long_names_are_told_apart():
    from consilience.show.figures import short_names

    alike = [
        "a_long_beginning_1_and_the_same_end",
        "a_long_beginning_2_and_the_same_end",
    ]
    shown = short_names([*alike, "short"])
    assert shown[0] != shown[1]
    assert all(len(name) <= 20 for name in shown)
    assert shown[2] == "short"


def test_names_may_break_after_their_marks_and_stay_escaped():
    assert html.breakable("n01_a-b.png") == "n01_<wbr>a-<wbr>b.<wbr>png"
    assert html.breakable("<b>_&amp") == "&lt;b&gt;_&amp;amp"
    assert html.breakable("_x_") == "_<wbr>x_"
