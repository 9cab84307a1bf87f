"""The workbench in a real browser: drop, explain, slide, brush, compare, cancel, reload, on a
desk and on a phone.
"""

import base64
from pathlib import Path

import pytest
import skimage
from browser import opened, shot, sideways, slide, small_text
from serving import served

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
AXE = Path(__file__).parents[1] / "build" / "axe" / "package" / "axe.min.js"

DROP = """([content, name]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], name, { type: 'image/png' }));
  document.getElementById('drop').dispatchEvent(
    new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer: given }));
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from browser import chromium
    from PIL import Image

    chromium()
    folder = tmp_path_factory.mktemp("images")
    for name, file in (("tabby", "chelsea.png"), ("teapot", "coffee.png")):
        (folder / name).mkdir()
        Image.open(PHOTOGRAPHS / file).convert("RGB").save(
            folder / name / f"{name}.png"
        )
    with served("--images", folder) as bench:
        bench.give(PHOTOGRAPHS / "coffee.png")  # the workers are there
        yield bench.address


def drop(page, name):
    content = base64.b64encode((PHOTOGRAPHS / name).read_bytes()).decode()
    page.evaluate(DROP, [content, name])


def test_a_dropped_image_is_explained_and_the_page_can_be_reloaded(address):
    with opened() as page:
        page.goto(address)
        drop(page, "chelsea.png")
        page.wait_for_url("**/jobs/*", timeout=60_000)
        page.wait_for_selector("li.tile.map canvas", timeout=60_000)
        page.wait_for_selector("#after:not([hidden])", timeout=60_000)
        assert page.locator("h3").first.text_content() == "chelsea"
        assert "cat" in page.locator(".image header").first.text_content()
        shot(page, "workbench-job")
        page.reload()  # the job has its address: all comes again
        page.wait_for_selector("li.tile.map canvas", timeout=60_000)
        assert page.locator("#job-state").text_content() == "done"
        page.click("#to-report")
        page.wait_for_selector("#verdict")
        page.eval_on_selector("#images", "(one) => one.scrollIntoView()")
        page.wait_for_selector("li.tile.map canvas", timeout=30_000)
        shot(page, "workbench-report")


def test_methods_are_chosen_compared_and_cut(address):
    with opened() as page:
        page.goto(address)
        page.check("li[data-name=lime] [name=by]")
        page.click("li[data-name=lime] summary")
        page.fill("li[data-name=lime] [name=samples]", "60")
        page.fill("#find", "input times gradient")
        page.check("li[data-name=input-x-gradient] [name=by]")
        page.fill("#find", "")
        page.uncheck("[name=at-once]")
        page.check("[name=again]")
        page.set_input_files(
            "#files", [PHOTOGRAPHS / "chelsea.png", PHOTOGRAPHS / "coffee.png"]
        )
        page.wait_for_selector("#chosen li:nth-child(2) a")
        command = page.locator("#command").text_content()
        assert "--by lime:samples=60 --by lime:samples=60,seed=1" in command
        shot(page, "workbench-home")
        page.click("#go")
        page.wait_for_url("**/jobs/*")
        page.wait_for_selector("#after:not([hidden])", timeout=120_000)
        first = page.locator(".image").first
        assert first.locator("li.tile.map h4").all_text_contents() == [
            "Grad-CAM",
            "Input x gradient",
            "lime:samples=60",
            "lime:samples=60,seed=1",
        ]
        page.wait_for_selector("output.mean:not(:empty)")
        page.check("input[value=area]")
        said = first.locator(".numbers-line")
        seen = set()
        for level in (5, 15, 40):
            slide(page, "[name=level]", level)
            page.wait_for_timeout(300)
            seen.add(said.text_content())
        assert len(seen) == 3
        page.select_option("[name=a]", "2")
        page.select_option("[name=b]", "3")  # two seeds of one method
        page.wait_for_timeout(400)
        assert "lime:samples=60 & lime:samples=60,seed=1" in first.text_content()
        first.locator(".stage button").nth(2).click()
        page.select_option("#large [name=right]", "3")
        page.check("#large [name=flicker]")
        page.wait_for_timeout(700)
        frames = set()
        for _ in range(8):
            frames.add(
                page.eval_on_selector("#large canvas", "(one) => one.toDataURL()")
            )
            page.wait_for_timeout(250)
        assert len(frames) == 2
        page.keyboard.press("Escape")
        shot(page, "workbench-compared")


def test_methods_are_tested_where_the_truth_is_known_and_on_the_image(address):
    with opened() as page:
        page.goto(address)
        page.click("#score")
        page.wait_for_url("**/jobs/*")
        page.wait_for_selector("#verdicts table", timeout=120_000)
        rows = page.locator("#verdicts tbody th").all_text_contents()
        assert "gradcam" in rows
        assert "random" in rows
        shot(page, "workbench-planted")
        page.goto(address)
        assert (
            "planted evidence:"
            in page.locator("li[data-name=gradcam]").text_content()
        )
        drop(page, "chelsea.png")
        page.wait_for_url("**/jobs/*", timeout=60_000)
        page.wait_for_selector("#after:not([hidden])", timeout=60_000)
        assert "quick suite, about" in page.locator("#trust").text_content()
        page.click("#trust")
        page.wait_for_url("**/report*", timeout=120_000)
        page.wait_for_selector("#evaluation")


def test_painting_moves_the_scores(address):
    with opened() as page:
        page.goto(address)
        page.uncheck("[name=at-once]")
        page.set_input_files("#files", PHOTOGRAPHS / "chelsea.png")
        page.click("#chosen a")
        page.wait_for_selector("#scores tr", timeout=60_000)
        before = page.locator("#scores td.n").all_text_contents()
        assert before[0] == before[1]
        slide(page, "[name=size]", 100)
        box = page.locator("#paper").bounding_box()
        page.mouse.move(
            box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.5
        )
        page.mouse.down()
        for step in range(8):
            page.mouse.move(
                box["x"] + box["width"] * (0.45 + 0.02 * step),
                box["y"] + box["height"] * 0.5,
            )
        page.mouse.up()
        page.wait_for_function(
            "() => document.getElementById('share').textContent.includes('taken away')"
        )
        page.wait_for_timeout(800)
        after = page.locator("#scores td.n").all_text_contents()
        assert after[0] == before[0]
        assert after[1] != before[1]
        page.check("[value=keep]")
        page.wait_for_function(
            "() => document.getElementById('share').textContent.includes('kept')"
        )
        page.click("summary:has-text('Which units')")
        page.click("#find-units")
        page.wait_for_selector("#unit-list img", timeout=30_000)
        assert page.locator("#unit-list li").count() == 12
        shot(page, "workbench-asked")


def test_a_job_is_cancelled(address):
    with opened() as page:
        page.goto(address)
        page.uncheck("[name=at-once]")
        page.uncheck("li[data-name=gradcam] [name=by]")
        page.check("li[data-name=lime] [name=by]")
        page.click("li[data-name=lime] summary")
        page.fill("li[data-name=lime] [name=samples]", "20000")
        page.set_input_files("#files", PHOTOGRAPHS / "chelsea.png")
        page.wait_for_selector("#chosen a")
        page.click("#go")
        page.wait_for_url("**/jobs/*")
        page.wait_for_selector(".bar", timeout=60_000)
        page.click("#cancel")
        page.wait_for_selector("body[data-state=cancelled]", timeout=60_000)


def test_failures_of_a_folder_are_found_and_explained(address):
    with opened() as page:
        page.goto(f"{address}/folder")
        page.click("text=Look through")
        page.wait_for_selector("#found:not([hidden])", timeout=60_000)
        assert "of 2 images right" in page.locator("#accuracy").text_content()
        page.click("#confusion button")
        assert (
            page.locator("#rows img").count()
            == page.locator("#rows tbody tr").count()
        )
        page.check("#rows input")
        shot(page, "workbench-folder")
        page.click("#explain-picked")
        page.wait_for_selector("#chosen li a")
        page.click("#go")
        page.wait_for_selector("li.tile.map canvas", timeout=60_000)


def test_an_image_that_is_none_is_said_beside_its_name(address, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with opened() as page:
        page.goto(address)
        page.set_input_files("#files", tmp_path / "a.png")
        page.wait_for_selector(".bad")
        assert (
            "no image that the workbench reads" in page.locator(".bad").text_content()
        )
        page.said.clear()  # the browser's own line of the 400


def test_every_page_fits_a_phone(address):
    with opened(390, 844) as page:
        for path in ("/", "/folder"):
            page.goto(address + path)
            page.wait_for_timeout(300)
            assert sideways(page) <= 0
            assert small_text(page) == []
        page.goto(address)
        drop(page, "coffee.png")
        page.wait_for_selector("#after:not([hidden])", timeout=60_000)
        page.wait_for_timeout(300)
        assert sideways(page) <= 0
        assert small_text(page) == []
        shot(page, "workbench-phone")
        page.click("text=ask the network about it")
        page.wait_for_selector("#scores tr", timeout=60_000)
        assert sideways(page) <= 0
        assert small_text(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_violation_of_accessibility(address, scheme):
    if not AXE.is_file():
        pytest.skip("axe-core is not there (npm pack axe-core in build/axe)")
    rules = AXE.read_text(encoding="utf-8")

    def check(page):
        page.evaluate(rules)
        told = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        found = [
            (one["id"], one["nodes"][0]["html"][:120])
            for one in told["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert found == []

    with opened(bypass_csp=True, color_scheme=scheme) as page:
        page.goto(address)
        check(page)
        drop(page, "coffee.png")
        page.wait_for_selector("#after:not([hidden])", timeout=60_000)
        page.wait_for_timeout(300)
        check(page)
        report = page.locator("#to-report").get_attribute("href")
        page.click("text=ask the network about it")
        page.wait_for_selector("#scores tr", timeout=60_000)
        check(page)
        page.goto(address + report)
        page.wait_for_timeout(600)
        check(page)
        page.goto(f"{address}/folder")
        page.click("text=Look through")
        page.wait_for_selector("#found:not([hidden])", timeout=60_000)
        check(page)
