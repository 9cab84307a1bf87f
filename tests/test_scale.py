"""Runs at scale: the same bytes whoever makes them and however they were stopped."""

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import consilience as cs
from consilience import files, images, progress, saved
from consilience.cli import main
from consilience.models.gathering import Gathering
from consilience.runs import crew, explain, jobfile, log, making, plan, worker
from consilience.runs.evaluate import Asked, evaluate_images, evaluate_run
from consilience.runs.explain import How
from consilience.runs.folder import JOB, LOCK, Run, RunFolder
from consilience.runs.shelf import Shelf, per_shard
from consilience.types import ConsilienceError

FACTORY = """
import os
import time
from pathlib import Path

import torch
from torch import nn

from consilience.models.load import wrap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def net():
    return wrap(Net(), classes="a b c d e".split(), mean=(0, 0, 0), std=(1, 1, 1), size=32)


class Deadly(Net):
    '''Ends the process on an image that is white.'''

    def forward(self, x):
        if float(x.reshape(len(x), -1).min(1).values.max()) > 0.99:
            os.kill(os.getpid(), 9)
        return super().forward(x)


def deadly():
    made = wrap(Net(), classes="a b c d e".split(), mean=(0, 0, 0), std=(1, 1, 1), size=32)
    made.module.__class__ = Deadly
    return made
"""
BY = ("gradcam", "lime:samples=24,segments=slic", "occlusion:window=8,stride=8")
COUNT = 7
TORCH = explain.LoadOptions(engine="torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, and a module with networks that other processes can load."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "images").mkdir()
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"i{number}.png")
    (folder / "scale_networks.py").write_text(FACTORY)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.environ["PYTHONPATH"] = before


def job(model="scale_networks:net", by=BY):
    return explain.job_from_specs(by, [model])


def made(place, folder, how=None, by=BY, model="scale_networks:net", images=None):
    return explain.run_explanations(
        job(model, by),
        [str(images or place / "images")],
        folder,
        None,
        TORCH,
        how=how or How(panels=False),
    )


def content(folder):
    """Digests of everything that must not depend on who made it."""
    names = ["explanations.parquet", "agreement.parquet", "metrics.parquet"]
    found = [*(folder / name for name in names), *folder.glob("maps/*")]
    found += folder.glob("metrics/*")
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(found)
        if file.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(place):
    folder = place / "undisturbed"
    made(place, folder)
    return content(folder)


# ---- records


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["bits", "smooth", "constant"]),
)
def test_planes_are_the_map_to_the_bit(height, width, seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "bits":  # NaN, infinities and denormals among them
        values = rng.integers(0, 2**32, (height, width), np.uint32).view(np.float32)
    elif kind == "smooth":
        values = np.add.outer(np.arange(height), np.arange(width)).astype(np.float32)
    else:
        values = np.full((height, width), np.float32(-0.0))
    back = saved.from_planes(saved.planes(values))
    assert back.dtype == np.float32
    assert back.tobytes() == values.tobytes()


def test_planes_by_hand():
    """1 and 2 are 0x3f800000 and 0x40000000; the difference is 0x00800000."""
    coded = saved.planes(np.array([[1, 2], [1, 2]], np.float32))
    assert coded.shape == (4, 2, 2)
    assert coded[:, 0, 0].tolist() == [0x00, 0x00, 0x80, 0x3F]
    assert coded[:, 0, 1].tolist() == [0x00, 0x00, 0x80, 0x00]
    assert not coded[:, 1].any()  # the second row is the first


def test_a_smooth_map_takes_less_than_60_kb_and_noise_is_kept_as_it_is():
    grid = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    smooth = images.enlarge(grid, (224, 224)).numpy()  # as a class activation map is
    noise = np.random.default_rng(0).normal(size=(224, 224)).astype(np.float32)
    sizes = []
    for values in (smooth, noise):
        kept = saved.arrays_as_bytes({"values": values}, {})
        arrays, _ = saved.arrays_from_bytes(kept, "here")
        assert arrays["values"].tobytes() == values.tobytes()
        sizes.append(len(kept))
    assert sizes[0] < 60_000 < sizes[1] < values.nbytes


def test_records_stand_alone_then_in_shards_and_what_is_loose_is_newer(tmp_path):
    shelf = Shelf(tmp_path, ".x")
    for name in "abcde":
        shelf.write(name, name.encode() * 3)
    assert shelf.names() == list("abcde")
    shelf.pack(0, ["c", "a", "missing"])
    shelf.pack(1, ["b", "d", "e"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.zip",
        "00001.zip",
    ]
    assert [shelf.read(name) for name in "abcde"] == [
        name.encode() * 3 for name in "abcde"
    ]
    assert shelf.read("missing") is None
    assert "a" in shelf
    assert "missing" not in shelf
    before = (tmp_path / "00001.zip").read_bytes()
    shelf.write("b", b"new")
    assert shelf.read("b") == b"new"
    shelf.pack(1, ["b", "d", "e"])
    assert shelf.read("b") == b"new"
    shelf.write("b", b"bbb")
    shelf.pack(1, ["b", "d", "e"])
    assert (
        tmp_path / "00001.zip"
    ).read_bytes() == before  # no dates, no order of work


def test_a_damaged_record_in_a_shard_is_named_and_the_others_are_read(tmp_path):
    shelf = Shelf(tmp_path, ".x")
    for name in "ab":
        shelf.write(name, name.encode() * 500)
    shelf.pack(0, ["a", "b"])
    shard = tmp_path / "00000.zip"
    data = bytearray(shard.read_bytes())
    data[data.index(b"b" * 400) + 7] ^= 1
    shard.write_bytes(bytes(data))
    again = Shelf(tmp_path, ".x")
    assert again.read("a") == b"a" * 500
    with pytest.raises(ConsilienceError, match=r"00000\.zip: b\.x is damaged"):
        again.read("b")
    shard.write_bytes(bytes(data[:300]))
    assert Shelf(tmp_path, ".x").read("a") is None


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 1), (16, 1), (17, 2), (300, 19), (16_000, 1000), (1_280_000, 1000)],
)
def test_shards_have_a_thousand_records_and_sixteen_are_there_to_share(count, size):
    assert per_shard(count) == size


def test_what_dead_processes_left_half_written_goes_and_what_is_written_stays(
    tmp_path,
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = os.uname().nodename[:40]
    names = {
        f".{machine}-{dead.pid}-abc.part": False,
        f".{machine}-{os.getpid()}-abc.part": True,
        f".{machine}-{os.getppid()}-abc.part": True,
        ".elsewhere-12-abc.part": True,  # until a day has passed
        ".old-7-abc.part": False,
        "thesis.part": True,
    }
    (tmp_path / "maps").mkdir()
    for name in names:
        (tmp_path / "maps" / name).write_bytes(b"half")
    os.utime(tmp_path / "maps" / ".old-7-abc.part", (1, 1))
    files.sweep(tmp_path)
    left = {path.name for path in (tmp_path / "maps").iterdir()}
    assert left == {name for name, stays in names.items() if stays}


def test_maps_of_16_bits_say_how_far_they_moved(place, undisturbed, tmp_path):
    folder = tmp_path / "run"
    half = replace(job(by=BY[:2]), maps="float16")
    images = [str(place / "images")]
    run = explain.run_explanations(half, images, folder, None, TORCH)
    whole = Run(place / "undisturbed")
    for key, one in run.items():
        values = whole[key].values
        moved = np.abs(one.values - values).max() / np.abs(values).max()
        assert 0 < moved == pytest.approx(one.provenance["map_error"], rel=1e-3)
        assert moved <= 2**-12
        assert one.values.dtype == np.float32
    pairs = whole.agreement  # of whole maps
    pairs = pairs[(pairs["a"] == "Grad-CAM") & (pairs["b"] == "LIME")]
    assert run.agreement["iou"].tolist() == pairs["iou"].tolist()
    with pytest.raises(ConsilienceError, match="another job"):
        explain.run_explanations(job(by=BY[:2]), images, folder, None, TORCH)
    with pytest.raises(ConsilienceError, match="maps is float32 or float16"):
        replace(half, maps="int8")


# ---- passes of several threads


@pytest.fixture(scope="module")
def net(place):
    import scale_networks

    return scale_networks.net()


def test_threads_share_batches_and_get_their_own_rows(net):
    """Every row is what the model says of it in a full batch, to the bit."""
    generator = torch.Generator().manual_seed(0)
    counts = [1, 3, 17, 32, 33, 70, 5, 2]
    asked = [torch.rand(count, 3, 32, 32, generator=generator) for count in counts]
    gathering, got = Gathering(net), {}

    def ask(number):
        got[number] = gathering.scores(asked[number])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    batch = net.batch
    for number, pixels in enumerate(asked):
        alone = [
            net.scores(torch.cat([part, torch.zeros(batch - len(part), 3, 32, 32)]))[
                : len(part)
            ]
            for part in torch.split(pixels, batch)
        ]
        assert torch.equal(got[number], torch.cat(alone))


def test_nobody_waits_for_an_engine_that_was_let_go_a_moment_ago(net):
    """Told between finding the engine busy and beginning to wait, who would wait sleeps
    through its turn.
    """

    class LetGo:
        """Found busy, and free again by the time that anybody looks."""

        def __init__(self):
            self.asked, self.held = 0, False

        def acquire(self, blocking=True):
            self.asked += 1
            self.held = self.asked > 1
            return self.held

        def release(self):
            self.held = False

        def locked(self):
            return self.held

    class Counted(threading.Condition):
        waits = 0

        def wait(self, timeout=None):
            Counted.waits += 1
            return super().wait(timeout)

    engine = LetGo()
    gathering = Gathering(net, _engine=engine, _changed=Counted())
    pixels = torch.rand(2, 3, 32, 32)
    rows = torch.cat([pixels, torch.zeros(net.batch - 2, 3, 32, 32)])
    assert torch.equal(gathering.scores(pixels), net.scores(rows)[:2])
    assert (engine.asked, Counted.waits) == (2, 0)


def test_a_pass_that_fails_is_the_failure_of_whoever_asked_for_it(net, monkeypatch):
    plain = type(net).scores
    bad = torch.full((2, 3, 32, 32), 0.5)

    def scores(self, pixels):
        if bool((pixels == 0.5).all(dim=(1, 2, 3)).any()):
            raise RuntimeError("this one")
        time.sleep(0.02)
        return plain(self, pixels)

    monkeypatch.setattr(type(net), "scores", scores)
    gathering, got = Gathering(net), {}

    def ask(number, pixels):
        try:
            got[number] = len(gathering.scores(pixels))
        except RuntimeError as error:
            got[number] = str(error)

    many = [torch.rand(4, 3, 32, 32) for _ in range(5)] + [bad]
    threads = [threading.Thread(target=ask, args=item) for item in enumerate(many)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert got == {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: "this one"}


# ---- the same bytes


@pytest.mark.parametrize(
    "how",
    [
        How(batch=1, panels=False),
        How(batch=3, threads=0),
        How(threads=4, panels=True),
    ],
    ids=["one at a time", "three, no threads", "four threads"],
)
def test_batches_and_threads_change_nothing(place, undisturbed, tmp_path, how):
    made(place, tmp_path / "run", how)
    assert content(tmp_path / "run") == undisturbed
    assert len(undisturbed) == 2 + COUNT


def test_a_map_in_a_run_is_that_of_the_image_alone(place, undisturbed, net):
    run = Run(place / "undisturbed")
    for number in (0, COUNT - 1):
        for by in BY[:1]:
            alone = cs.explain(
                net.using(engine="torch"), place / "images" / f"i{number}.png", by
            )
            np.testing.assert_allclose(
                run[f"i{number}", "Grad-CAM"].values, alone.values, atol=1e-6
            )
    assert run[0].provenance["seconds"] > 0
    assert "seconds" in run.explanations
    assert set(run.timings.columns) == {"sample", "column", "seconds", "facts"}


def test_workers_change_nothing_and_one_that_dies_is_replaced(
    place, undisturbed, tmp_path, monkeypatch
):
    killed = []
    plain = crew.Crew._finished

    def kills_the_other(self, number, block):
        plain(self, number, block)
        if not killed:
            others = [one for one in self._hands if one != number]
            killed.append(others[0])
            lost = self._hands[others[0]].pid
            os.kill(lost, signal.SIGKILL)
            # it may have been in the middle of a record
            maps = tmp_path / "run" / "maps"
            (maps / f".{platform.node()[:40]}-{lost}-cut.part").write_bytes(b"half")

    monkeypatch.setattr(crew.Crew, "_finished", kills_the_other)
    run = made(place, tmp_path / "run", How(workers=2, panels=False))
    assert killed
    assert content(tmp_path / "run") == undisturbed
    record = run.manifest["record"]
    assert record["tries"][0]["workers"] == 2
    assert record["tries"][0]["images"] == COUNT


@pytest.mark.slow
def test_an_image_that_ends_its_worker_is_found_and_the_rest_goes_on(place, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(place / "images", images)
    for extra in images.glob("i[3-9].png"):
        extra.unlink()
    Image.fromarray(np.full((40, 40, 3), 255, np.uint8)).save(images / "white.png")
    run = made(
        place,
        tmp_path / "run",
        How(workers=2, batch=2, panels=False),
        ("gradcam",),
        "scale_networks:deadly",
        images,
    )
    (failure,) = run.manifest["failures"]
    assert failure["name"] == "white"
    assert "was ended by signal 9 each time that it was tried" in failure["reason"]
    assert run.samples == ["i0", "i1", "i2"]


def test_parts_are_put_together(place, undisturbed, tmp_path):
    folder = tmp_path / "run"
    for number in (3, 1):
        assert made(place, folder, How(shard=(number, 3), panels=False)) is None
    with pytest.raises(ConsilienceError, match=r"of 7 images are not made yet"):
        explain.merge_run(folder)
    found = log.status_of(folder)
    there = len(list((folder / "maps").glob("*.npz")))
    assert (found["state"], found["images"], found["done"]) == (
        "finished",
        there,
        there,
    )
    # a part does not depend on what the others have made
    assert made(place, folder, How(shard=(1, 3), panels=False)) is None
    assert len(list((folder / "maps").glob("*.npz"))) == there
    assert not (folder / "run.json").exists()
    assert made(place, folder, How(shard=(2, 3), panels=False)) is None
    merged = explain.merge_run(folder)
    assert content(folder) == undisturbed
    assert len(merged.manifest["record"]["tries"]) == 4
    assert sum(one["images"] for one in merged.manifest["record"]["tries"]) == COUNT


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_parts_cover_every_place_once(count):
    for total in (1, 7, 100, 1000):
        parts = [
            list(explain.part_of(total, (number, count)))
            for number in range(1, count + 1)
        ]
        assert sorted(place for part in parts for place in part) == list(range(total))
    if count <= 5:
        assert min(map(len, parts)) > 0.5 * 1000 / count


def test_many_images_are_put_into_shards_that_read_alike(
    place, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr("consilience.runs.merging.APART", 3)
    run = made(place, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "maps").iterdir())
    assert names == [f"{number:05d}.zip" for number in range(COUNT)]
    whole = Run(place / "undisturbed")
    for key in whole.keys():  # noqa: SIM118 - a sequence too
        assert run[key].values.tobytes() == whole[key].values.tobytes()
    again = made(place, tmp_path / "run")  # nothing is missing
    assert again.manifest["record"]["tries"][-1]["images"] == 0
    shard = tmp_path / "run" / "maps" / "00002.zip"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    said = []

    class Said:
        def start(self, label, total):
            return 0

        def advance(self, task, steps): ...

        def finish(self, task): ...

        def say(self, message):
            said.append(message)

    with progress.listening(Said()):
        mended = made(place, tmp_path / "run")
    assert any("i2" in one and "damaged" in one for one in said)
    assert mended.manifest["content"] == run.manifest["content"]


# ---- resume, reuse, locks


def test_what_another_run_has_made_is_not_made_again(place, tmp_path, monkeypatch):
    first = tmp_path / "first"
    made(place, first, by=("gradcam", "lime:samples=24,segments=slic"))
    asked = []
    plain = explain.api.explain_one, explain.api.explain_together

    def one(model, sample, by, *rest, **named):
        asked.append(cs.registry.spell(by))
        return plain[0](model, sample, by, *rest, **named)

    def together(model, samples, by, *rest, **named):
        asked.append(cs.registry.spell(by))
        return plain[1](model, samples, by, *rest, **named)

    monkeypatch.setattr(explain.api, "explain_one", one)
    monkeypatch.setattr(explain.api, "explain_together", together)
    other = ("gradcam", "lime:samples=32,segments=slic")
    run = made(
        place, tmp_path / "second", How(reuse=(str(first),), panels=False), other
    )
    assert set(asked) == {"lime:samples=32,segments=slic"}
    monkeypatch.undo()
    whole = made(place, tmp_path / "third", by=other)
    for key in whole.keys():  # noqa: SIM118 - a sequence too
        assert run[key].values.tobytes() == whole[key].values.tobytes()
    # an edited image depends on itself alone
    images = tmp_path / "images"
    shutil.copytree(place / "images", images)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(images / "i1.png")
    asked.clear()
    monkeypatch.setattr(explain.api, "explain_one", one)
    made(
        place,
        tmp_path / "fourth",
        How(reuse=(str(tmp_path / "second"),), panels=False),
        other,
        images=images,
    )
    assert asked == ["lime:samples=32,segments=slic"]


def test_two_processes_do_not_make_one_run(place, tmp_path):
    folder = tmp_path / "run"
    holds = RunFolder(folder, "explanations", {})
    with holds.locked():
        with pytest.raises(ConsilienceError, match=f"made by process {os.getpid()}"):
            made(place, folder)
        other = RunFolder(tmp_path / "other", "explanations", {})
        with other.locked("1-of-2"), other.locked("2-of-2"):
            with (
                pytest.raises(ConsilienceError, match="is being made by"),
                other.locked("2-of-2"),
            ):
                pass
            with (
                pytest.raises(ConsilienceError, match="is being made by"),
                other.locked(),
            ):
                pass
    assert (folder / LOCK).exists()
    made(place, folder, by=("gradcam",))


def test_a_folder_that_is_being_made_is_not_claimed_by_another_job(tmp_path):
    """Even while nothing in it is finished."""
    first = RunFolder(tmp_path / "run", "explanations", {"target": "predicted"})
    before = (tmp_path / "run" / JOB).read_bytes()
    with first.locked():
        with pytest.raises(ConsilienceError, match="is being made by process"):
            RunFolder(tmp_path / "run", "explanations", {"target": "true"})
        RunFolder(tmp_path / "run", "explanations", {"target": "predicted"})
        assert (tmp_path / "run" / JOB).read_bytes() == before
    RunFolder(tmp_path / "run", "explanations", {"target": "true"})


def test_an_image_of_a_table_that_changed_is_another_job(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "list.csv").write_text("image,class\nimages/i1.png,b\n")
    made(place, tmp_path / "run", by=("gradcam",), images=tmp_path / "list.csv")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(
        tmp_path / "images" / "i1.png"
    )
    with pytest.raises(ConsilienceError, match=r"images: 1 changed \(i1\)"):
        made(place, tmp_path / "run", by=("gradcam",), images=tmp_path / "list.csv")


def test_a_log_tells_where_a_run_stands_through_all_its_tries(tmp_path, monkeypatch):
    clock = iter([100.0, 101.0, 102.0, 103.0, 110.0, 200.0, 203.0, 204.0, 210.0])
    monkeypatch.setattr(log.time, "time", lambda: next(clock))
    here = log.Log(tmp_path)
    how = {"batch": 4, "workers": 1}
    here.begin(5, 5, how)
    here.outcome(making.Outcome(0, "a", 0.5))
    here.outcome(making.Outcome(1, "b", 0.5, "is broken"))
    here.outcome(making.Outcome(2, "c", 0.5))
    found = log.status_of(tmp_path)
    assert (found["state"], found["done"], found["failed"]) == ("running", 2, 1)
    assert found["reasons"] == {"b": "is broken"}
    assert found["rate"] == pytest.approx(2 / 3)
    assert found["seconds_left"] == pytest.approx(2 / (2 / 3))
    assert found["quiet"] == 7.0
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"time": 103.5, "event": "im')  # a kill
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write("\n")
    again = log.Log(tmp_path)
    again.begin(5, 3, how | {"workers": 2})
    again.outcome(making.Outcome(3, "d", 0.5))
    again.event("finished")
    record = again.record()
    assert [one["images"] for one in record["tries"]] == [2, 1]
    assert [one["seconds"] for one in record["tries"]] == [3.0, 10.0]
    assert [one["workers"] for one in record["tries"]] == [1, 2]
    assert record["seconds"] == 13.0


def test_events_are_followed_until_the_run_ends(tmp_path):
    here = log.Log(tmp_path)
    here.begin(2, 2, {})
    got = []
    following = threading.Thread(
        target=lambda: got.extend(log.follow(tmp_path, every=0.02))
    )
    following.start()
    for place, name in enumerate("ab"):
        time.sleep(0.05)
        here.outcome(making.Outcome(place, name, 0.1))
    here.event("finished")
    following.join(5)
    assert not following.is_alive()
    assert [event["event"] for event in got] == [
        "begin",
        "image",
        "image",
        "finished",
    ]
    assert [event.get("name") for event in got] == [None, "a", "b", None]
    sent = log.as_sse(got[1])
    assert sent.startswith("event: image\ndata: {")
    assert sent.endswith("}\n\n")
    assert json.loads(sent.split("data: ")[1]) == got[1]


def killed_after(command, seconds):
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        running.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills_end_in_the_bytes_of_an_undisturbed_run(place, tmp_path):
    """50 kills in all, of explain, evaluate and dissect."""
    program = [sys.executable, "-m", "consilience"]
    network = ["-m", "scale_networks:net", "--engine", "torch"]
    by = [item for one in BY for item in ("--by", one)]
    images = str(place / "images")
    commands = {
        "explain": [*program, "explain", images, *network, *by],
        "evaluate": [
            *(*program, "evaluate", images, *network, *by),
            *("--metric", "insertion:steps=10", "--metric", "sparseness"),
        ],
        "dissect": [
            *(*program, "dissect", "drawn:images=120", *network),
            *("--permutations", "49"),
        ],
    }
    rng = np.random.default_rng(0)
    for verb, command in commands.items():
        whole, killed = tmp_path / f"{verb}-whole", tmp_path / f"{verb}-killed"
        for folder in (tmp_path / f"{verb}-first", whole):  # the second is warm
            start = time.monotonic()
            subprocess.run([*command, "-o", folder], check=True, capture_output=True)
            took = time.monotonic() - start
        kills = 0
        while kills < 17:
            ended = killed_after(
                [*command, "-o", killed], rng.uniform(0.4 * took, took)
            )
            kills += not ended
            if ended or kills == 17:
                subprocess.run(
                    [*command, "-o", killed], check=True, capture_output=True
                )
                if verb == "dissect":
                    one, other = (
                        pd.read_parquet(folder / "units.parquet")
                        for folder in (whole, killed)
                    )
                    pd.testing.assert_frame_equal(one, other)
                else:
                    assert content(whole) == content(killed)
                assert not list(killed.rglob("*.part")), verb
                shutil.rmtree(killed)


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_nothing(place, undisturbed, tmp_path):
    command = [
        *(sys.executable, "-m", "consilience", "explain", str(place / "images")),
        *(
            "-m",
            "scale_networks:net",
            "--engine",
            "torch",
            "-o",
            str(tmp_path / "run"),
        ),
        *(item for one in BY for item in ("--by", one)),
    ]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(
        (tmp_path / "run").glob("maps/i*.npz")
    ):
        time.sleep(0.01)
    running.kill()
    running.wait()
    made(place, tmp_path / "run")
    assert content(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run").rglob("*.part"))


# ---- evaluation on the same machinery


def test_an_evaluation_by_parts_and_workers_has_the_same_numbers(place, tmp_path):
    asked = Asked(("sparseness", "deletion:steps=4"))
    images = [str(place / "images")]
    alone = evaluate_images(
        asked, job(by=BY[:2]), images, tmp_path / "a", options=TORCH
    )
    for number in (1, 2):
        how = How(shard=(number, 2))
        assert (
            evaluate_images(
                asked,
                job(by=BY[:2]),
                images,
                tmp_path / "b",
                options=TORCH,
                how=how,
            )
            is None
        )
    explain.merge_run(tmp_path / "b")
    parts = evaluate_run(asked, tmp_path / "b", options=TORCH)
    pd.testing.assert_frame_equal(alone.table(), parts.table())
    assert content(tmp_path / "a") == content(tmp_path / "b")


# ---- storage elsewhere, and disks that fail


def test_a_run_goes_to_storage_that_fsspec_knows(place, undisturbed):
    pytest.importorskip("upath")
    run = made(place, "memory://bucket/run")
    whole = Run(place / "undisturbed")
    assert run.manifest["content"] == whole.manifest["content"]
    assert run["i3", "LIME"].values.tobytes() == whole["i3", "LIME"].values.tobytes()
    again = made(place, "memory://bucket/run")
    assert again.manifest["record"]["tries"][0]["images"] == 0
    found = log.status_of(run.folder)
    assert (found["state"], found["images"], found["done"]) == (
        "finished",
        COUNT,
        COUNT,
    )
    assert found["failed"] == 0
    assert list(log.follow(run.folder)) == []
    with pytest.raises(
        ConsilienceError, match="holds no run with a log; a dissection"
    ):
        log.status_of(run.folder / "maps")
    with pytest.raises(ConsilienceError, match="holds another job"):
        made(place, "memory://bucket/run", by=("gradcam",))
    with pytest.raises(ConsilienceError, match="memory of one process"):
        made(place, "memory://bucket/other", How(workers=2))


@pytest.mark.parametrize(
    ("workers", "said"),
    [(False, "1 image took 20 s; 9 more images may take 3 min 0 s"), (True, None)],
)
def test_an_estimate_does_not_count_how_workers_begin(monkeypatch, workers, said):
    """Twenty seconds to the first image, one to each of the others."""
    now, heard = [0.0], []
    monkeypatch.setattr(explain.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        explain.progress, "say", lambda line: heard.append(line.replace("\xa0", " "))
    )
    estimate = explain._Estimate(10, start_with_first=workers)
    now[0] = 20.0
    for _ in range(10):
        estimate.another()
        now[0] += 1.0
    assert heard == ([said] if said else [])
    slow = explain._Estimate(100, start_with_first=workers)
    now[0] += 20.0
    heard.clear()
    for _ in range(100):
        slow.another()
        now[0] += 10.0
    if workers:
        assert heard == ["1 image took 10 s; 98 more images may take 16 min 20 s"]


def test_an_address_of_unknown_storage_is_refused_in_a_line():
    pytest.importorskip("upath")
    with pytest.raises(ConsilienceError, match="nosuch://bucket/run: "):
        files.place("nosuch://bucket/run")


def test_a_full_disk_ends_a_run_in_a_line_and_the_same_command_goes_on(
    place, undisturbed, tmp_path
):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(files.CannotWriteError, match="No space left"):
            made(place, folder / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        made(place, folder / "run")
        assert content(folder / "run") == undisturbed
        assert not list(folder.rglob("*.part"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- lists of images


@pytest.mark.parametrize("kind", ["csv", "parquet", "tsv"])
def test_a_table_of_paths_is_a_data_set(place, tmp_path, net, kind):
    rows = pd.DataFrame(
        {
            "path": [f"../images/i{number}.png" for number in (4, 2, 2)],
            "class": ["c", "a", "a"],
            "x0": [1.0, None, 3.0],
            "y0": [2.0, None, 3.0],
            "x1": [9.0, None, 30.0],
            "y1": [8.0, None, 31.0],
        }
    )
    folder = tmp_path / "list"
    shutil.copytree(place / "images", tmp_path / "images")
    folder.mkdir()
    file = folder / f"some.{kind}"
    if kind == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
    run = made(place, tmp_path / "run", by=("gradcam",), images=file)
    assert run.samples == ["i4", "i2"]
    assert [said["true"] for said in run.predictions.values()] == ["c", "a"]
    boxes = [run.load(name).sample.boxes for name in run.samples]
    assert [(box.index, box.x0, box.y1) for box in boxes[0]] == [(2, 1.0, 8.0)]
    assert [(box.index, box.x0, box.y1) for box in boxes[1]] == [(0, 3.0, 31.0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,class\na.png,c\n", "names no images: it needs a column image or path"),
        ("image,class\n,c\n", "row 2 names no image"),
        ("image,class\na.png,zebra\n", "no class 'zebra'"),
        ("image,class,x0,y0,x1,y1\na.png,c,5,5,2,9\n", "x0 < x1"),
        ("image,class\n", "names no images"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_row(place, tmp_path, text, said):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ConsilienceError, match=said):
        made(place, tmp_path / "run", images=tmp_path / "list.csv")


def test_tar_shards_are_a_data_set(place, undisturbed, tmp_path):
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number in range(2):
                data = (place / "images" / f"i{2 * shard + number}.png").read_bytes()
                parts = {"png": data, "cls": str(number + shard).encode()}
                if shard:
                    parts = {"png": data, "json": json.dumps({"label": "d"}).encode()}
                for ending, part in parts.items():
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
    run = made(
        place, tmp_path / "run", by=("gradcam",), images=tmp_path / "train-*.tar"
    )
    assert run.samples == [
        "train-0/0000",
        "train-0/0001",
        "train-1/0000",
        "train-1/0001",
    ]
    said = [one["true"] for one in run.predictions.values()]
    assert said == ["a", "b", "d", "d"]
    whole = Run(place / "undisturbed")
    assert (
        run["train-1/0000", "Grad-CAM"].values.tobytes()
        == whole["i2", "Grad-CAM"].values.tobytes()
    )
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(ConsilienceError, match="cannot be read as a tar"):
        made(place, tmp_path / "other", images=tmp_path / "bad.tar")


def test_a_data_set_of_torchvision_by_its_spelling(place, tmp_path):
    spelled = "torchvision:FakeData,size=3,image_size=3x40x40,num_classes=5"
    run = made(place, tmp_path / "run", by=("gradcam",), images=spelled)
    assert run.samples == ["0000000", "0000001", "0000002"]
    import torchvision

    data = torchvision.datasets.FakeData(3, (3, 40, 40), 5)
    labels = ["abcde"[int(data[number][1])] for number in range(3)]
    assert [one["true"] for one in run.predictions.values()] == labels
    command = ["explain", spelled, "-m", "scale_networks:net", "--by", "gradcam"]
    assert main([*command, "-o", str(tmp_path / "by-flags")]) == 0
    with pytest.raises(ConsilienceError, match="no data set 'Fake'"):
        made(place, tmp_path / "other", images="torchvision:Fake")


# ---- job files


def write_job(folder, text):
    file = folder / "job.toml"
    file.write_text(text)
    return file


def test_a_job_file_does_what_its_flags_do(place, undisturbed, tmp_path, capsys):
    listed = ", ".join(json.dumps(one) for one in BY)
    file = write_job(
        tmp_path,
        f"""
        images = ["{place / "images"}"]
        networks = ["scale_networks:net"]
        explainers = [{listed}]
        output = "run"
        [loading]
        engine = "torch"
        [run]
        batch = 2
        panels = false
        """,
    )
    assert main(["run", str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "7 images, Grad-CAM and LIME and Occlusion of" in " ".join(said.split())
    assert "passes of an image" in said
    assert not (tmp_path / "run").exists()
    assert main(["run", str(file)]) == 0
    assert content(tmp_path / "run") == undisturbed
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "finished: 7 of 7 images done" in capsys.readouterr().out
    for number in ("1/2", "2/2"):
        out = str(tmp_path / "parts")
        assert main(["run", str(file), "--shard", number, "-o", out]) == 0
    assert main(["merge", str(tmp_path / "parts")]) == 0
    assert content(tmp_path / "parts") == undisturbed


def test_a_job_is_done_from_python_too(place, undisturbed, tmp_path):
    told = {
        "images": [str(place / "images")],
        "networks": ["scale_networks:net", "scale_networks:net"],
        "explainers": list(BY),
        "loading": {"engine": "torch"},
        "output": str(tmp_path / "run"),
        "metrics": ["sparseness"],
    }
    finished = cs.run_job({**told, "networks": told["networks"][:1]})
    assert [type(one).__name__ for one in finished] == ["Evaluation"]
    names = {"explanations.parquet", "agreement.parquet"}
    same = {key: it for key, it in content(tmp_path / "run").items() if key in names}
    assert same == {key: undisturbed[key] for key in names}
    with pytest.raises(ConsilienceError, match="twice"):
        cs.run_job(told)


def test_an_estimate_comes_from_a_probe(place, tmp_path):
    work = jobfile.work_of(
        {
            "images": [str(place / "images")],
            "networks": ["scale_networks:net"],
            "explainers": ["gradcam", "occlusion:window=8,stride=8"],
            "output": str(tmp_path / "run"),
            "metrics": ["sparseness"],
        },
        "job",
    )
    (found,) = plan.estimate(work)
    assert found.images == COUNT
    assert found.metrics == 1
    # a pass of Grad-CAM, and sixteen windows with the whole image
    assert found.passes == COUNT * (1 + 17)
    assert found.seconds > 0
    assert found.memory > 10**7
    whole = made(
        place, tmp_path / "run", by=("gradcam", "occlusion:window=8,stride=8")
    )
    kept = sum(file.stat().st_size for file in (whole.folder / "maps").iterdir())
    assert kept * 0.8 < found.disk < kept * 2


def test_everything_that_is_wrong_with_a_job_is_said_at_once(tmp_path, capsys):
    file = write_job(
        tmp_path,
        """
        images = ["nowhere/"]
        networks = ["resnet500"]
        explainers = ["gradcam", "limé", "occlusion:windwo=3"]
        metrics = ["insertions"]
        suite = "quik"
        [run]
        workers = 0
        [loading]
        engine = "torch"
        [dissection]
        layers = ["layer4"]
        """,
    )
    assert main(["run", str(file)]) == 1
    said = capsys.readouterr().err.splitlines()
    text = "\n".join(said)
    for wrong in (
        "'limé'",
        "windwo",
        "'insertions'",
        "'quik'",
        "workers is a whole number from 1; got 0",
        "nowhere",
        "concepts are missing",
    ):
        assert wrong in text
    assert "mistakes" in said[0]
    file = write_job(tmp_path, 'image = ["a"]\nseed = "x"\n[run]\nworker = 3\n')
    assert main(["run", str(file)]) == 1
    text = capsys.readouterr().err
    for wrong in ("did you mean 'images'", "seed is a whole number", "'worker'"):
        assert wrong in text
    file.write_text("images = [")
    assert main(["run", str(file)]) == 1
    assert "is no TOML" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "a/b", "1/", "/2", "-1/2"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ConsilienceError, match="shard is I/N"):
        How(shard=jobfile.shard_of(text))


# ---- questions


def test_a_run_is_asked_in_sql(place, undisturbed, capsys):
    pytest.importorskip("duckdb")
    run = Run(place / "undisturbed")
    answer = run.query(
        'SELECT "column", count(*) AS n, avg(score) AS mean FROM explanations '
        'GROUP BY "column" ORDER BY "column"'
    ).df()
    table = run.explanations.groupby("column")["score"].mean()
    assert answer["column"].tolist() == sorted(table.index)
    assert answer["n"].tolist() == [COUNT] * 3
    np.testing.assert_allclose(answer["mean"], table[answer["column"]])
    joined = run.query(
        "SELECT count(*) FROM agreement JOIN timings USING (sample)"
    ).fetchall()
    assert joined == [(3 * COUNT * 3,)]
    folder = str(place / "undisturbed")
    assert main(["query", folder, "SELECT code FROM findings", "--json"]) == 0
    codes = [row["code"] for row in json.loads(capsys.readouterr().out)]
    assert codes == [one.code for one in run.audit]
    for sql in (
        "SELECT nothing FROM explanations",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "COPY explanations TO '/tmp/out.csv'",
        "hello",
    ):
        assert main(["query", folder, sql]) == 1
        said = capsys.readouterr().err
        assert said.startswith("consilience: ")
        assert said.count("\n") == 1


# ---- a cluster


@pytest.mark.slow
def test_a_cluster_of_two_with_one_killed_gives_the_same_bytes(
    place, undisturbed, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray")
    killed = []
    plain = crew.Crew._finished

    def kills_the_other(self, number, block):
        plain(self, number, block)
        if not killed:
            other = next(one for one in self._hands if one != number)
            killed.append(other)
            ray.kill(self._hands[other]._actor)

    monkeypatch.setattr(crew.Crew, "_finished", kills_the_other)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        made(place, tmp_path / "run", How(workers=2, cluster="auto", panels=False))
        assert killed
        assert content(tmp_path / "run") == undisturbed
    finally:
        ray.shutdown()


def test_what_other_processes_cannot_have_is_refused_in_a_line(net, place, tmp_path):
    image = cs.read_image(place / "images" / "i0.png")
    with pytest.raises(ConsilienceError, match="was made in Python"):
        cs.run(net, [image], output=tmp_path / "a", how=How(workers=2))
    loaded = cs.load_model("scale_networks:net")
    assert loaded.spec == "scale_networks:net"
    with pytest.raises(ConsilienceError, match="workers read images themselves"):
        cs.run(loaded, [image], output=tmp_path / "b", how=How(workers=2))
    other = loaded.using(engine="torch")
    told = (worker.known_by(other), worker.known_by(loaded))
    assert told[0] != told[1]
    folder = str(place / "images")
    with pytest.raises(ConsilienceError, match="give the options in the spelling"):
        worker.ImagesMaker(
            worker.ImagesErrand(
                explain.job_from_specs(["gradcam"], ["scale_networks:net"]),
                explain.LoadOptions(),
                (folder,),
                None,
                str(tmp_path / "d"),
                "d",
                1,
                1,
                False,
                networks=told[:1],
            )
        )
    errand = worker.ImagesErrand(job(), TORCH, (), None, "x", "d", 1, 1, False)
    back = worker.Errand.from_text(errand.as_text())
    assert back == replace(errand.to_send())
