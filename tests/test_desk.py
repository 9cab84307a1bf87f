"""The desk with real worker processes: what hangs is ended, what is cancelled while it waits
is never begun.
"""

import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from consilience.types import ConsilienceError
from consilience.web.columns import titles
from consilience.web.desk import Desk, Setting

SLOW = '''
import time
from dataclasses import dataclass

import torch

from consilience.registry import explainers
from consilience.types import Heat


@explainers.register("own-sleep")
@dataclass(frozen=True)
class OwnSleep:
    """Sleeps, and reports nothing: it cannot be asked to stop."""

    needs = frozenset()

    def explain(self, model, view, target):
        time.sleep(60)
        return Heat(torch.zeros(view.pixels.shape[-2:]))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "slow.py").write_text(SLOW)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "grey.png")
    return folder


@pytest.fixture(scope="module")
def desk(place):
    one = Desk(Setting(("efficientnet_lite0",), (str(place / "slow.py"),)), limit=12)
    yield one
    one.close()
    assert all(hand.pid is None for hand in one.hands)


def job(place, name, by):
    return {
        "do": "explain",
        "images": [{"path": str(place / "grey.png"), "name": "grey"}],
        "by": [by],
        "models": ["efficientnet_lite0"],
        "targets": ["predicted"],
        "view": None,
        "title": name,
        "folder": str(place / name),
        "command": "",
    }


def ended(task, seconds=120):
    end = time.monotonic() + seconds
    while not task.over and time.monotonic() < end:
        task.wait(1)
    return task.state, task.reason


def test_what_hangs_is_ended_and_the_next_job_goes_on(desk, place):
    desk.catalogue()
    hangs = desk.start(job(place, "hangs", "own-sleep"))
    after = desk.start(job(place, "after", "gradcam"))
    dropped = desk.start(job(place, "dropped", "gradcam"))
    assert desk.waiting(after) == 1
    desk.cancel(dropped)
    assert ended(hangs) == ("failed", "stopped: it took too long")
    assert ended(after) == ("done", "")
    assert ended(dropped) == ("cancelled", "cancelled")
    assert dropped.begun_at is None
    assert desk.hands[0].restarts == 1


def test_what_does_not_listen_is_ended_when_it_is_cancelled(desk, place):
    hangs = desk.start(job(place, "deaf", "own-sleep"))
    while hangs.state == "waiting":
        time.sleep(0.1)
    begun = time.monotonic()
    desk.cancel(hangs)
    assert ended(hangs) == ("cancelled", "cancelled")
    assert time.monotonic() - begun < 15


def test_a_question_about_nothing_is_one_line(desk):
    with pytest.raises(ConsilienceError, match="no model 'nosuch'"):
        desk.question({"do": "frame", "path": "x", "model": "nosuch"})
    with pytest.raises(ConsilienceError):
        desk.question(
            {"do": "frame", "path": "/nosuch.png", "model": "efficientnet_lite0"}
        )


@pytest.mark.slow  # two servers; that a saved plugin is loaded anew, test_web holds
def test_a_broken_plugin_says_so_until_it_is_saved_again(place):
    path = place / "broken.py"
    path.write_text("1 / 0")
    desk = Desk(Setting(("efficientnet_lite0",), (str(path),)))
    try:
        with pytest.raises(ConsilienceError, match=r"broken\.py.* does not load"):
            desk.catalogue()
        path.write_text("")
        import os

        os.utime(path, (time.time() + 5,) * 2)
        assert ended(desk.start(job(place, "mended", "gradcam"))) == ("done", "")
    finally:
        desk.close()


def test_the_oldest_finished_jobs_are_forgotten_with_their_folders(monkeypatch):
    """Three fit, by number and by size; what is not over stays."""
    import threading
    from collections import OrderedDict

    from consilience.web import desk as module

    gone = []
    one = object.__new__(module.Desk)
    one.tasks, one._lock = OrderedDict(), threading.Lock()
    one.forget = lambda task: gone.append(task.number)
    monkeypatch.setattr(module, "KEPT", 3)
    for number in "abcdef":
        task = one.tasks[number] = module.Task(number, {}, 1)
        if number != "b":
            task.end("done", {})
    one._forget()
    assert gone == ["a", "c"]
    assert list(one.tasks) == list("bdef")
    one.tasks["f"].tell({"kind": "tile", "html": "x" * 1000})
    monkeypatch.setattr(module, "ROOM", 1300)
    one._forget()
    assert gone == ["a", "c"]
    one.tasks["d"].tell({"kind": "tile", "html": "x" * 1000})
    one._forget()
    assert gone == ["a", "c", "d"]
    assert list(one.tasks) == list("bef")


def test_titles_name_what_there_is_more_than_one_of():
    assert titles(["A", "B"], ["m"], ["t"]) == ["A", "B"]
    assert titles(["A"], ["m", "n"], ["t"]) == ["A (m)", "A (n)"]
    assert titles(["A", "B"], ["m", "n"], ["t", "u"]) == [
        *("A (m, t)", "B (m, t)", "A (m, u)", "B (m, u)"),
        *("A (n, t)", "B (n, t)", "A (n, u)", "B (n, u)"),
    ]
