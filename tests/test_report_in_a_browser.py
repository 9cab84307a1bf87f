"""The report in a real browser: what moves on it says what the library says."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from browser import opened, shot, slide, small_text
from fakes_report import photographs

from consilience.agreement.masks import above_cut, matched
from consilience.agreement.overlap import expected_iou, iou
from consilience.show import html

COLUMNS = ("Grad-CAM", "LIME", "Score-CAM", "LIME b")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = photographs(tmp_path_factory.mktemp("run"), COLUMNS)
    return run, html.write_report(run).as_uri()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_live_iou_and_chance_are_the_librarys(report, share):
    """Every pair of every image, cut again by `matched` and compared with its IoU and
    chance; a level more or less is a pixel or two.
    """
    run, address = report
    with opened() as page:
        page.goto(address)
        live = page.evaluate(
            """async (share) => {
              const found = {};
              for (const one of document.querySelectorAll('.image')) {
                const { maps } = await Viewer.open(one), name = one.querySelector('h3').textContent;
                for (let a = 0; a < 4; a++) for (let b = a + 1; b < 4; b++) {
                  const pair = Viewer.overlap(maps.get(a), maps.get(b), 'area', share);
                  found[`${name}|${a}|${b}`] = [pair.one.area, pair.two.area, pair.iou, pair.expected, pair.excess];
                }
              }
              return found;
            }""",
            share,
        )
    assert len(live) == 5 * 6
    for name in run.samples:
        stored = run.load(name)
        made = stored.items
        for a, b in itertools.combinations(range(4), 2):
            one, two = matched(made[a], made[b], share)
            got = live[f"{name}|{a}|{b}"]
            assert got[0] == pytest.approx(one.area, abs=4)
            assert got[1] == pytest.approx(two.area, abs=4)
            chance = expected_iou(one.on.size, one.area, two.area)
            assert got[2] == pytest.approx(iou(one.on, two.on), abs=1e-3)
            assert got[3] == pytest.approx(chance, abs=2e-4)
            assert got[4] == pytest.approx((got[2] - got[3]) / (1 - got[3]), abs=1e-9)


def test_chance_is_exact_also_in_small_frames(report):
    cases = [(9, 3, 4), (50, 1, 1), (50176, 10035, 20000), (64, 64, 10), (20, 15, 12)]
    with opened() as page:
        page.goto(report[1])
        got = page.evaluate(
            "(cases) => cases.map((one) => Viewer.chance(...one))", cases
        )
    assert got == pytest.approx([expected_iou(*case) for case in cases], rel=1e-9)


def test_the_runs_own_masks_and_a_share_of_the_largest(report):
    run, address = report
    with opened() as page:
        page.goto(address)
        areas = page.evaluate(
            """async () => {
              const found = [];
              for (const one of document.querySelectorAll('.image')) {
                const { maps } = await Viewer.open(one), name = one.querySelector('h3').textContent;
                for (const [k, map] of maps) found.push([name, k, Viewer.maskOf(map, 'run').area, Viewer.maskOf(map, 'share', 0.4).area]);
              }
              return found;
            }"""
        )
    assert len(areas) == 5 * 4
    for name, column, own, share in areas:
        item = run.load(name).items[column]
        assert own == item.mask.sum()
        assert share == pytest.approx(
            (item.values >= 0.4 * item.values.max()).sum(), abs=60
        )


def test_sliding_hovering_enlarging_and_swiping(report):
    run, address = report
    with opened() as page:
        page.goto(address)
        page.locator("#tools").scroll_into_view_if_needed()
        page.wait_for_selector(".live-pair .numbers-line b")
        page.wait_for_selector("output.mean:not(:empty)")
        first = run.samples.index(page.locator("h3").first.inner_text())
        row = run.agreement[
            (run.agreement["sample"] == run.samples[first])
            & (run.agreement["a"] == "Grad-CAM")
            & (run.agreement["b"] == "LIME")
        ].iloc[0]
        said = page.locator(".live-pair .numbers-line").first
        assert f"IoU {row['iou']:.3f}" in said.inner_text()
        told = page.locator("output.mean").inner_text()
        assert told.startswith("mean over 5 images here:")
        of = run.agreement[
            (run.agreement["a"] == "Grad-CAM") & (run.agreement["b"] == "LIME")
        ]
        numbers = [float(one) for one in re.findall(r"\d\.\d{3}", told)]
        means = [of[key].mean() for key in ("iou", "expected_iou", "excess")]
        assert numbers == pytest.approx(means, abs=2e-3)
        page.check("input[value=area]")
        texts = []
        for level in (10, 30):
            slide(page, "[name=level]", level)
            page.wait_for_timeout(250)
            texts.append(said.inner_text())
        assert texts[0] != texts[1]
        shot(page, "report-slid")

        stages = page.locator(".image").first.locator(".stage button")
        stages.nth(1).hover(position={"x": 20, "y": 20})  # LIME: its superpixel
        value = page.locator(".image").first.locator(".value").nth(1)
        page.wait_for_function(
            "(one) => one.textContent.startsWith('superpixel')",
            arg=value.element_handle(),
        )
        assert "weight" in value.inner_text()

        stages.nth(0).click()
        dialog = page.locator("dialog#large")
        assert dialog.is_visible()
        slide(page, "[name=meet]", 50)
        dialog.locator("canvas").focus()
        for key in ("ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        assert (
            dialog.locator("#large-value").inner_text().count("row") == 0
        )  # right: LIME
        slide(page, "[name=meet]", 100)
        page.keyboard.press("ArrowLeft")
        assert "row 114, column 113" in dialog.locator("#large-value").inner_text()
        shot(page, "report-large")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()


def test_hover_reads_the_maps_value(report):
    run, address = report
    with opened() as page:
        page.goto(address)
        read = page.evaluate(
            """async () => {
              const one = document.querySelector('.image'), { maps } = await Viewer.open(one);
              return [one.querySelector('h3').textContent, Viewer.read(maps.get(0), 30, 70), Viewer.read(maps.get(1), 30, 70)];
            }"""
        )
    name, plain, superpixel = read
    item, lime = run.load(name).items[:2]
    value = item.values[70, 30]
    got = float(plain.split(" at ")[0].replace("−", "-"))
    assert got == pytest.approx(
        value, abs=float(np.ptp(item.values) / 128 + 0.005 * value)
    )
    share = (item.values >= value).mean()
    shown = float(re.search(r"; ([\d.]+)\u00a0% of the map", plain)[1])
    assert shown == pytest.approx(100 * share, abs=0.1)
    segment = lime.extras["segments"][70, 30]
    assert superpixel.startswith(f"superpixel {segment}: weight")
    shown = float(superpixel.rsplit(" ", 1)[1].replace("−", "-"))
    assert shown == pytest.approx(lime.extras["weights"][segment], rel=5e-3)


def test_sorting_filtering_and_the_matrix(report):
    run, address = report
    with opened() as page:
        page.goto(address)
        names = lambda: page.locator(".image h3").all_text_contents()  # noqa: E731
        page.select_option("[name=order]", "probability down")
        by = sorted(
            run.samples, key=lambda name: -run.predictions[name]["probability"]
        )
        assert names() == by
        page.fill("[name=named]", "esp")  # espresso is said of the coffee
        assert names() == ["coffee.png"]
        page.fill("[name=named]", "")
        page.select_option("[name=number]", "probability")
        page.fill("[name=least]", "0.4")
        assert names() == [n for n in by if run.predictions[n]["probability"] >= 0.4]
        page.select_option("[name=number]", "")
        page.select_option("[name=right]", "0")
        assert sorted(names()) == sorted(
            n for n in run.samples if run.predictions[n]["right"] is False
        )
        page.select_option("[name=right]", "")
        pair = run.agreement[
            (run.agreement["a"] == "LIME") & (run.agreement["b"] == "Score-CAM")
        ]
        page.locator('.matrix a[data-pair="1-2"]').first.click()
        assert page.input_value("[name=a]") == "1"
        assert page.input_value("[name=b]") == "2"
        wanted = list(pair.sort_values("excess", kind="stable")["sample"])
        assert names() == wanted


def test_on_a_phone_everything_can_be_read(report):
    with opened(390, 844) as page:
        page.goto(report[1])
        page.wait_for_timeout(500)
        assert small_text(page) == []
        shot(page, "report-phone")


def viewed(values, mask=None, extras=None):
    """A map as the page gets it."""
    item = SimpleNamespace(values=values, mask=mask, extras=extras or {})
    return json.loads(html.viewer_data(item))


def test_cuts_of_nine_pixels_by_hand(report):
    """Nine values in order, and three that are equal at the top: those are left out where
    the cut falls among them, as `above_cut` leaves them.
    """
    ordered = np.arange(1.0, 10.0).reshape(3, 3)
    tied = np.minimum(ordered, 7.0)
    cases = [(values, k / 9) for values in (ordered, tied) for k in range(1, 9)]
    wanted = [int(above_cut(v, round(9 * share))[0].sum()) for v, share in cases]
    assert wanted[:8] == list(range(1, 9))
    assert wanted[8:11] == [0, 0, 3]
    with opened() as page:
        page.goto(report[1])
        got = page.evaluate(
            """async (cases) => {
              const found = [];
              for (const [data, share] of cases) {
                const mask = Viewer.maskOf(await Viewer.unpack(data), 'area', share);
                found.push(mask.area, mask.on.reduce((sum, one) => sum + one, 0));
              }
              return found;
            }""",
            [[viewed(values), share] for values, share in cases],
        )
    assert got == [area for area in wanted for _ in range(2)]


def test_a_superpixels_interval_by_hand(report):
    segments = np.array([[0, 0], [1, 1]])
    extras = {
        "segments": segments,
        "weights": np.array([0.5, -0.25]),
        "stderr": np.array([0.1, 0.05]),
    }
    data = viewed(extras["weights"][segments], extras=extras)
    with opened() as page:
        page.goto(report[1])
        said = page.evaluate(
            "async (data) => { const map = await Viewer.unpack(data);"
            " return [Viewer.read(map, 1, 0), Viewer.read(map, 0, 1)]; }",
            data,
        )
    said = [text.replace("\u00a0", " ").replace("\u2212", "-") for text in said]
    assert said == [
        "superpixel 0: weight 0.5, 95 % interval 0.304 to 0.696",
        "superpixel 1: weight -0.25, 95 % interval -0.348 to -0.152",
    ]
