"""The workbench over HTTP: what it says is what the library says, and whatever is sent to
it, it lives on.
"""

import base64
import io
import json
import os
import re
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from PIL import Image
from serving import served

import consilience as cs
from consilience.models.load import load_model
from consilience.show import levels

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CAT, CUP = PHOTOGRAPHS / "chelsea.png", PHOTOGRAPHS / "coffee.png"
HOSTILE = Path(__file__).parents[1].parent / "shared" / "data" / "hostile"
DOUBLE = '''
from dataclasses import dataclass

import torch

from consilience.registry import explainers, option
from consilience.types import Heat


@explainers.register("own-constant")
@dataclass(frozen=True)
class OwnConstant:
    """A ramp that is VALUE high."""

    needs = frozenset()

    def explain(self, model, view, target):
        height, width = view.pixels.shape[-2:]
        return Heat(torch.linspace(0, VALUE, height)[:, None].expand(height, width))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of labelled images, and a plug-in file."""
    place = tmp_path_factory.mktemp("given")
    for name, file in (("tabby", CAT), ("espresso", CUP), ("teapot", CUP)):
        (place / "images" / name).mkdir(parents=True)
        Image.open(file).convert("RGB").save(
            place / "images" / name / f"{name}_1.png"
        )
    (place / "own.py").write_text(DOUBLE.replace("VALUE", "3"))
    return place


@pytest.fixture(scope="module")
def bench(folder):
    with served("--images", folder / "images", "--plugin", folder / "own.py") as one:
        yield one


@pytest.fixture(scope="module")
def model():
    return load_model("efficientnet_lite0")


def map_of(tile):
    """A tile's map as its page holds it."""
    data = json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', tile["html"])[1]
    )
    coded = levels.unpacked(data["levels"], (data["h"], data["w"]))
    knots = np.frombuffer(base64.b64decode(data["knots"]), "<f4")
    return levels.Levels(coded, knots).values


def region(on):
    return {
        "region": base64.b64encode(np.packbits(on).tobytes()).decode(),
        "height": on.shape[0],
        "width": on.shape[1],
    }


def test_a_job_streams_the_librarys_maps_and_keeps_a_run(bench, model, tmp_path):
    cat, cup = bench.give(CAT), bench.give(CUP)
    by = ["gradcam", "lime:samples=60,seed=3"]
    job, events = bench.explained(images=[cat, cup], by=by, target="tabby")
    kinds = [kind for kind, _ in events]
    assert kinds.count("image") == 2
    assert kinds.count("tile") == 4
    assert kinds[-1] == "end"
    assert kinds.index("image") < kinds.index("tile")
    end = events[-1][1]
    assert end["state"] == "done"
    assert end["answer"]["samples"] == ["chelsea", "coffee"]
    tiles = {(e["image"], e["column"]): e for kind, e in events if kind == "tile"}
    for place, file in enumerate((CAT, CUP)):
        for column, spelled in enumerate(by):
            wanted = cs.explain(model, str(file), spelled, "tabby").values
            got = map_of(tiles[place, column])
            assert np.abs(got - wanted).max() <= np.ptp(wanted) / 128
            assert "tabby" in tiles[place, column]["target"]
    said = {e["name"]: e for kind, e in events if kind == "image"}
    assert said["chelsea"]["predicted"]
    assert 0 < said["chelsea"]["probability"] <= 1

    status, twin = bench.call("GET", f"/jobs/{job}.json")
    assert (status, twin["state"], twin["job"]) == (200, "done", job)
    assert "--by lime:samples=60,seed=3" in twin["asked"]["command"]
    status, content = bench.call("GET", f"/runs/{job}/run.zip", raw=True)
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
    run = cs.Run(tmp_path / "run")
    np.testing.assert_allclose(
        run["chelsea", "Grad-CAM"].values,
        cs.explain(model, str(CAT), "gradcam", "tabby").values,
        rtol=1e-4,
        atol=1e-6,
    )
    status, text = bench.call("GET", f"/runs/{job}/agreement.csv", raw=True)
    table = pd.read_csv(io.BytesIO(text))
    assert list(table["iou"]) == pytest.approx(list(run.agreement["iou"]))
    status, page = bench.call("GET", f"/runs/{job}/report", raw=True)
    assert b"mean IoU" in page
    assert "frame-ancestors 'none'" in bench.headers["content-security-policy"]
    assert "sha256-" in bench.headers["content-security-policy"]
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for form, start in starts.items():
        status, content = bench.call("GET", f"/runs/{job}/panels/1.{form}", raw=True)
        assert status == 200
        assert content.startswith(start)
    assert bench.call("GET", f"/runs/{job}/panels/2.png")[0] == 404


def test_the_quick_suite_tests_a_job(bench):
    job, made = bench.explained(images=[bench.give(CAT)], by=["gradcam", "gradient"])
    said = made[-1][1]["answer"]["suite_seconds"]
    _, twice = bench.explained(
        images=[bench.give(CAT), bench.give(CUP)], by=["gradcam", "centre", "edges"]
    )

    def passes(answer, events):
        tiles = [e for kind, e in events if kind == "tile" and e["column"] in answer]
        return events[-1][1]["answer"]["suite_seconds"] - sum(
            tile["seconds"] for tile in tiles
        )

    # 2 methods, 4 controls, 2 of another class; 1 method, 4 controls, 1 of another class
    once, two = passes({0, 1}, made), passes({0}, twice)
    assert two / once == pytest.approx(2 * 6 / 8, rel=1e-6)
    status, told = bench.call("POST", f"/api/jobs/{job}/evaluation", {})
    assert status == 200
    end = bench.events(told["job"])[-1][1]
    assert end["state"] == "done", end["reason"]
    assert 0.05 * end["seconds"] < said < 10 * end["seconds"]
    status, page = bench.call("GET", f"/runs/{job}/report", raw=True)
    assert b'id="evaluation"' in page


def test_two_classes_and_a_planted_test_of_the_methods(bench, model):
    number = bench.give(CAT)
    _, events = bench.explained(
        images=[number], by=["gradcam", "centre"], also_targets=["second"]
    )
    tiles = {e["column"]: e for kind, e in events if kind == "tile"}
    assert events[-1][1]["state"] == "done", events[-1][1]["reason"]
    assert events[-1][1]["answer"]["columns"] == [
        "Grad-CAM (predicted)",
        "centre (predicted)",
        "Grad-CAM (second)",
        "centre (second)",
    ]
    for column, target in ((0, "predicted"), (2, "second")):
        wanted = cs.explain(model, str(CAT), "gradcam", target).values
        got = map_of(tiles[column])
        assert np.abs(got - wanted).max() <= np.ptp(wanted) / 128
    many = {"images": [number], "by": ["gradcam"] * 7, "also_targets": ["second"]}
    status, told = bench.call("POST", "/api/explanations", many)
    assert (status, "more than 12 columns" in told["error"]) == (400, True)
    status, told = bench.call("POST", "/api/planted", {"by": ["gradcam", "gradcam"]})
    end = bench.events(told["job"])[-1][1]
    assert end["state"] == "done", end["reason"]
    rows = {row["method"]: row for row in end["answer"]["planted"]}
    assert rows["gradcam"]["mean"] > rows["random"]["high"]
    assert (
        rows["gradcam"]["low"] <= rows["gradcam"]["mean"] <= rows["gradcam"]["high"]
    )


@pytest.mark.parametrize("mode", ["remove", "keep"])
def test_asking_is_the_networks_own_answer(bench, model, mode):
    number = bench.give(CAT)
    on = np.zeros((224, 224), bool)
    on[40:150, 60:200] = True
    asked = {"image": number, **region(on), "mode": mode, "fill": "black"}
    status, told = bench.call("POST", "/api/ask", {**asked, "picture": True})
    assert status == 200
    view = model.view(cs.images.read_sample(CAT))
    pixels = view.pixels.clone()
    pixels[..., torch.from_numpy(on if mode == "remove" else ~on)] = 0
    with torch.no_grad():
        whole = model.logits(view.pixels)[0].softmax(-1)
        changed = model.logits(pixels)[0].softmax(-1)
    for one in told["classes"]:
        assert one["before"] == pytest.approx(float(whole[one["index"]]), abs=1e-5)
        assert one["after"] == pytest.approx(float(changed[one["index"]]), abs=1e-5)
    assert {int(whole.argmax()), int(changed.argmax())} <= {
        one["index"] for one in told["classes"]
    }
    assert told["share"] == pytest.approx(on.mean())
    assert told["image"].startswith("data:image/webp")
    half = {
        **asked,
        **region(on[::2, ::2]),
    }  # drawn on a smaller paper: the same part
    again = bench.call("POST", "/api/ask", half)[1]
    assert again["classes"][0]["after"] == pytest.approx(
        told["classes"][0]["after"], abs=1e-5
    )


def test_units_that_answer_are_found_by_a_slow_loop(bench, model):
    number = bench.give(CAT)
    on = np.zeros((224, 224), bool)
    on[32:128, 64:160] = True
    status, told = bench.call("POST", "/api/units", {"image": number, **region(on)})
    assert status == 200, told
    view = model.view(cs.images.read_sample(CAT))
    maps = model.activations(view.pixels, [told["layer"]])[told["layer"]][0].numpy()
    side = 224 // maps.shape[1]
    share = on.reshape(maps.shape[1], side, maps.shape[2], side).mean((1, 3))
    contrast = []
    for values in maps.astype(np.float64):
        inside = (values * share).sum() / share.sum()
        outside = (values * (1 - share)).sum() / (1 - share).sum()
        contrast.append((inside - outside) / max(values.std(ddof=1), 1e-6))
    best = int(np.argmax(contrast))
    assert told["units"][0]["unit"] == best
    assert told["units"][0]["contrast"] == pytest.approx(contrast[best], rel=1e-3)
    assert len(told["units"]) == 12
    nothing = {"image": number, **region(np.zeros((224, 224), bool))}
    status, told = bench.call("POST", "/api/units", nothing)
    assert (status, told["error"]) == (
        400,
        "paint a part of the image, not none or all of it",
    )


def test_failures_of_a_folder(bench):
    status, told = bench.call("POST", "/api/predictions", {})
    end = bench.events(told["job"])[-1][1]
    answer = end["answer"]
    assert (answer["images"], answer["known"]) == (3, 3)
    rows = {row["name"]: row for row in answer["rows"]}
    teapot = next(row for name, row in rows.items() if "teapot" in name)
    assert teapot["right"] is False
    assert teapot["true"] == "teapot"
    shown = {name for name, row in rows.items() if "small" in row}
    assert shown == {name for name, row in rows.items() if not row["right"]}
    assert teapot["small"].startswith("data:image/webp;base64,")
    assert answer["right"] == sum(row["right"] for row in rows.values())
    status, taken = bench.call(
        "POST", "/api/folder-images", {"places": [teapot["place"]]}
    )
    assert status == 200
    _, events = bench.explained(images=[taken["images"][0]["image"]], by=["gradcam"])
    assert events[-1][1]["state"] == "done"
    assert bench.call("POST", "/api/folder-images", {"places": [3]})[0] == 400
    assert bench.call("POST", "/api/folder-images", {"places": [-1]})[0] == 400


def test_every_kind_of_job_has_its_page_and_its_twin(bench):
    job, _ = bench.explained(images=[bench.give(CAT)], by=["gradcam"])
    asked = [
        ("predictions", {}),
        (f"jobs/{job}/evaluation", {}),
        ("planted", {"by": ["centre"]}),
    ]
    started = [bench.call("POST", f"/api/{path}", body) for path, body in asked]
    for number in [job, *(told["job"] for _, told in started)]:
        for when in ("before", "after"):
            status, page = bench.call("GET", f"/jobs/{number}", raw=True)
            assert (status, b'id="job-state"' in page) == (200, True), when
            status, twin = bench.call("GET", f"/jobs/{number}.json")
            assert (status, twin["job"]) == (200, number)
            assert bench.events(number)[-1][1]["state"] == "done"
    status, page = bench.call("GET", "/", raw=True)
    assert status == 200
    for number in (told["job"] for _, told in started):
        assert number.encode() in page


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"by": ["nosuch"]}, "failed", "nosuch"),
        ({"by": ["lime:samples=1000000000"]}, "failed", "numbers up to 20,000"),
        (
            {"by": ["lime:segments=slic(n_segments=99999999)"]},
            "failed",
            "numbers up to",
        ),
        ({"by": ["gradcam"], "target": "no such class"}, "failed", "no such class"),
        ({"by": ["gradcam:layer=nosuch"]}, "failed", "nosuch"),
    ],
)
def test_a_job_that_cannot_be_made_says_why(bench, asked, status, said):
    _, events = bench.explained(images=[bench.give(CAT)], **asked)
    end = events[-1][1]
    words = end["reason"] + json.dumps(end["answer"]) + json.dumps(events)
    assert said in words
    assert "Traceback" not in words


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"images": []}, 422),
        ({"images": ["x"] * 65}, 422),
        ({"images": ["nosuch"]}, 400),
        ({"images": ["../uploads"]}, 400),
        ({"by": ["gradcam"]}, 422),
        ({"images": ["x"], "by": ["gradcam"] * 13}, 422),
        ({"images": ["x"], "view": "sideways"}, 422),
        ("text", 422),
    ],
)
def test_requests_that_make_no_sense_are_one_line(bench, body, status):
    got, told = bench.call("POST", "/api/explanations", body)
    assert got == status
    assert set(told) == {"error"}
    assert "\n" not in told["error"]


def test_no_network_and_no_file_but_the_servers_own(bench):
    number = bench.give(CAT)
    for name in ("resnet50", "/etc/passwd", "own.py:net", "../model.pt"):
        body = {"images": [number], "model": name}
        status, told = bench.call("POST", "/api/explanations", body)
        assert (status, told["error"].startswith("this server has no network")) == (
            400,
            True,
        )
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/runs/..%2f..%2fetc/report",
        "/runs/nosuch/report",
        "/jobs/nosuch",
        "/jobs/..%2f",
        "/runs/1/panels/0.exe",
    ):
        assert bench.call("GET", path)[0] in (404, 422), path
    on = np.zeros((8, 8), bool)
    asked = {"image": number, **region(on)}
    assert bench.call("POST", "/api/ask", {**asked, "fill": "nosuch"})[0] == 400
    assert bench.call("POST", "/api/ask", {**asked, "height": 9})[0] == 400
    assert bench.call("POST", "/api/ask", {**asked, "region": "%%%"})[0] == 400
    assert bench.call("POST", "/api/ask", {**asked, "height": 10**9})[0] == 422


def test_hostile_files_are_refused_in_one_line_or_read(bench):
    if not HOSTILE.is_dir():
        pytest.skip("the folder of hostile files is not here")
    tried = 0
    for path in sorted(HOSTILE.rglob("*")):
        if not path.is_file() or path.stat().st_size > 15_000_000:
            continue
        status, told = bench.call(
            "POST", "/api/images", path.read_bytes(), {"X-Name": "x"}
        )
        tried += 1
        if status == 429:
            time.sleep(2)
            continue
        assert status in (200, 400), (path.name, told)
        if status == 400:
            assert "\n" not in told["error"]
            assert str(path.parent) not in told["error"]
    assert tried > 5
    assert bench.call("GET", "/api/catalogue")[0] == 200


def test_the_interface_is_documented(bench):
    status, told = bench.call("GET", "/openapi.json")
    assert status == 200
    paths = told["paths"]
    for path in (
        "/api/explanations",
        "/api/images",
        "/api/ask",
        "/api/jobs/{number}/events",
    ):
        assert path in paths
    assert "lime:samples" in json.dumps(told["components"])
    assert "/ask/{number}" not in paths  # a page is no interface


def children(process):
    psutil = pytest.importorskip("psutil")
    return [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "spawn_main" in " ".join(one.cmdline())
    ]


def test_cancel_stops_a_job_and_the_next_one_goes_on(bench):
    number = bench.give(CAT)
    body = {"images": [number], "by": ["lime:samples=20000"]}
    job = bench.call("POST", "/api/explanations", body)[1]["job"]
    later = bench.call("POST", "/api/explanations", {"images": [number]})[1]["job"]
    deadline = time.time() + 60
    while bench.call("GET", f"/api/jobs/{job}")[1]["state"] != "running":
        assert time.time() < deadline
        time.sleep(0.1)
    assert bench.call("GET", f"/api/jobs/{later}")[1]["waiting"] == 1
    assert bench.call("DELETE", f"/api/jobs/{job}")[0] == 200
    assert bench.events(job)[-1][1]["state"] == "cancelled"
    assert bench.events(later)[-1][1]["state"] == "done"


def test_a_queue_that_is_full_says_429(bench):
    number = bench.give(CAT)
    asked = {"images": [number], "by": ["lime:samples=20000"]}
    got = [bench.call("POST", "/api/explanations", asked) for _ in range(22)]
    assert {status for status, _ in got} == {200, 429}
    assert "retry-after" in {name.lower() for name in bench.headers}
    for status, told in reversed(got):
        if status == 200:
            bench.call("DELETE", f"/api/jobs/{told['job']}")
    for status, told in got:
        if status == 200:
            assert bench.events(told["job"])[-1][1]["state"] == "cancelled"


def test_a_worker_that_is_killed_is_replaced_and_its_job_says_so(bench):
    number = bench.give(CAT)
    body = {"images": [number], "by": ["lime:samples=20000"]}
    job = bench.call("POST", "/api/explanations", body)[1]["job"]
    deadline = time.time() + 60
    while bench.call("GET", f"/api/jobs/{job}")[1]["state"] != "running":
        assert time.time() < deadline
        time.sleep(0.1)
    waits = bench.call("POST", "/api/explanations", {"images": [number]})[1]["job"]
    for one in children(bench.process):
        os.kill(one.pid, signal.SIGKILL)
    end = bench.events(job)[-1][1]
    assert end["state"] == "failed"
    assert "another one takes its place" in end["reason"]
    assert bench.events(waits)[-1][1]["state"] == "done"  # no job is lost
    asked = {"image": number, **region(np.ones((8, 8), bool))}
    assert bench.call("POST", "/api/ask", asked)[0] == 200


def test_a_plugin_is_loaded_anew_when_it_is_saved(bench, folder):
    number = bench.give(CAT)
    for value in ("3", "7"):
        (folder / "own.py").write_text(DOUBLE.replace("VALUE", value))
        os.utime(folder / "own.py", (time.time() + int(value),) * 2)
        _, events = bench.explained(images=[number], by=["own-constant"])
        assert events[-1][1]["state"] == "done", events[-1][1]["reason"]
        tile = next(e for kind, e in events if kind == "tile")
        assert map_of(tile).max() == pytest.approx(float(value), rel=1e-3)


@pytest.mark.slow  # a hundred clients, twice
def test_many_at_once_are_answered_and_memory_comes_back(bench):
    psutil = pytest.importorskip("psutil")
    server = psutil.Process(bench.process.pid)

    def one(place):
        status, _ = bench.call(
            "POST", "/api/images", CUP.read_bytes(), {"X-Name": f"c{place}"}
        )
        page = bench.call("GET", "/", raw=True)[0]
        return status, page

    def crowd():
        with ThreadPoolExecutor(100) as clients:
            return list(clients.map(one, range(100)))

    crowd()
    time.sleep(3)
    before = server.memory_info().rss
    got = crowd()
    assert all(status in (200, 429) for pair in got for status in pair)
    assert sum(pair[0] == 200 for pair in got) > 5
    time.sleep(3)
    assert server.memory_info().rss - before < 60_000_000
    assert bench.call("GET", "/")[0] == 200
    assert bench.process.poll() is None


def test_a_server_that_others_reach_has_a_token():
    with served("--host", "0.0.0.0") as one:
        assert "?token=" in one.said
        token = one.said.rpartition("token=")[2]
        local = one.address.replace("0.0.0.0", "127.0.0.1")
        one.address = local
        assert one.call("GET", "/openapi.json")[0] == 401
        bearer = {"Authorization": f"Bearer {token}"}
        assert one.call("GET", "/openapi.json", headers=bearer)[0] == 200


def test_what_is_not_there_is_said_before_anything_starts(tmp_path, capsys):
    from consilience.cli import main

    assert main(["serve", str(tmp_path)]) == 1
    assert "is no run" in capsys.readouterr().err
    assert main(["serve", "--images", str(tmp_path / "nosuch")]) == 1
    assert "no folder of images" in capsys.readouterr().err
    assert main(["serve", "--plugin", str(tmp_path / "nosuch.py")]) == 1
    assert "is not a file" in capsys.readouterr().err
    assert main(["serve", "--port", "99999"]) == 1
    assert "cannot listen" in capsys.readouterr().err


def test_runs_of_every_kind_are_shown(tmp_path):
    """Whatever a verb leaves: its report, its tables, its record, its other pages."""
    from consilience.runs.check import run_check

    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for place in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"p{place}.png")
    model = load_model("efficientnet_lite0")
    run_check(model, model, [photos], tmp_path / "check", ["centre"])
    cs.shortcuts(
        model,
        photos,
        ["logo"],
        folder=tmp_path / "shortcuts",
    )
    (tmp_path / "check" / "recommend.html").write_text("<p>another page</p>")
    with served(tmp_path / "check", tmp_path / "shortcuts") as bench:
        status, home = bench.call("GET", "/", raw=True)
        assert status == 200
        assert b"check of a network" in home
        assert b"search for shortcuts" in home
        numbers = re.findall(r'href="/runs/([^"/]+)"', home.decode())
        assert len(numbers) == 2
        pages = [
            bench.call("GET", f"/runs/{n}", raw=True)[1].decode() for n in numbers
        ]
        assert "Check of a network</a>" in pages[0]
        assert "images.csv" in pages[0]
        assert "Recommend</a>" in pages[0]
        assert "Search for shortcuts</a>" in pages[1]
        assert "agreement.csv" not in pages[0] + pages[1]
        for number, name, heading in zip(
            numbers,
            ("check", "shortcuts"),
            ("Did the network change?", "Shortcuts of"),
            strict=True,
        ):
            status, report = bench.call("GET", f"/runs/{number}/report", raw=True)
            assert status == 200
            assert heading in report.decode()
            assert (
                "frame-ancestors 'none'" in bench.headers["content-security-policy"]
            )
            status, told = bench.call("GET", f"/runs/{number}.json")
            assert (status, told["kind"]) == (200, name)
        status, table = bench.call("GET", f"/runs/{numbers[0]}/images.csv", raw=True)
        assert table == (tmp_path / "check" / "images.csv").read_bytes()
        status, page = bench.call(
            "GET", f"/runs/{numbers[0]}/recommend.html", raw=True
        )
        assert (status, page) == (200, b"<p>another page</p>")
        for table in (tmp_path / "shortcuts").glob("*.csv"):
            table.unlink()  # a run without tables says so, and does not fall
        status, told = bench.call("GET", f"/runs/{numbers[1]}/nosuch.csv")
        assert (status, told["error"]) == (404, "no table nosuch; the run has: none")
        for missing in ("job.csv", "nosuch.csv", "nosuch.html", "check.html"):
            assert bench.call("GET", f"/runs/{numbers[0]}/{missing}")[0] == 404
