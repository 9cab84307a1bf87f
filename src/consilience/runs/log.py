"""What happens in a run, line by line, for whoever looks: a shell, a page, the record.

``log.jsonl`` is appended to while the run is made: an event a line with its time. A run
that was stopped or killed goes on in the same file, so that the record covers all tries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from consilience.files import LocalPath
from consilience.runs.folder import LOG, Run, run_kind
from consilience.types import ConsilienceError


class Log:
    """The log of a run's folder; on other than local storage it is kept in memory."""

    def __init__(self, folder: Path, part: str = "") -> None:
        name = f"log.{part}.jsonl" if part else LOG
        self._file = folder / name if isinstance(folder, LocalPath) else None
        self._folder = folder
        self._here: list[dict[str, Any]] = []

    def event(self, kind: str, **facts: Any) -> None:
        """One line."""
        event = {"time": round(time.time(), 3), "event": kind, **facts}
        if self._file is None:
            self._here.append(event)
            return
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event, ensure_ascii=False) + "\n")
        except OSError:  # a log that cannot be written stops no run
            self._here.append(event)

    def begin(self, total: int, missing: int, how: dict[str, Any]) -> None:
        """A try begins."""
        self.event("begin", total=total, missing=missing, how=how)

    def outcome(self, outcome: Any) -> None:
        """An image is done, or failed."""
        if outcome.reason is None:
            self.event("image", name=outcome.name, seconds=round(outcome.seconds, 4))
        else:
            self.event("failed", name=outcome.name, reason=outcome.reason)

    def record(self) -> dict[str, Any]:
        """All tries: when each began, how long it took, how it was made, how many images
        it made; ``seconds`` of all.
        """
        self.event("merging")
        tries: list[dict[str, Any]] = []
        for event in self._events():
            if event["event"] == "begin":
                tries.append(
                    {
                        "began": event["time"],
                        "seconds": 0.0,
                        "images": 0,
                        **event["how"],
                    }
                )
            elif tries:
                last = tries[-1]
                last["seconds"] = round(event["time"] - last["began"], 3)
                last["images"] += event["event"] == "image"
        return {"seconds": sum(one["seconds"] for one in tries), "tries": tries}

    def _events(self) -> list[dict[str, Any]]:
        """Of this folder's logs, those of parts after each other."""
        if self._file is None:
            return self._here
        parts = sorted(self._folder.glob("log.*.jsonl"))
        files = [*(part.name for part in parts), LOG]
        return [event for name in files for event in events_of(self._folder, name)]


def events_of(folder: Path, file: str = LOG) -> Iterator[dict[str, Any]]:
    """Events of a run, in order; a line that was cut off by a kill is left out."""
    path = folder / file
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        yield from _events(stream)


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "time" in event:
            yield event


def follow(folder: Path, every: float = 0.5) -> Iterator[dict[str, Any]]:
    """Events of a run as they come, from its beginning, until it is finished or stopped;
    for a page as `as_sse`.
    """
    file, rest = folder / LOG, ""
    if not file.is_file():  # a finished run that kept none
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        while True:
            rest += stream.read()
            *lines, rest = rest.split("\n")
            last = ""
            for event in _events(lines):
                yield event
                last = event["event"]
            if last in ENDS:
                return
            time.sleep(every)


ENDS = ("finished", "stopped")


def as_sse(event: dict[str, Any]) -> str:
    """An event as a server sends it to a page (HTML standard, server-sent events)."""
    return (
        f"event: {event['event']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
    )


def status_of(folder: Path) -> dict[str, Any]:
    """Where a run stands: ``state`` (running, merging, finished, stopped), images in
    all, done and failed with reasons, images a second of this try, seconds left, and
    ``quiet``, the seconds since anything happened.
    """
    parts = sorted(path.name for path in folder.glob("log.*.jsonl"))
    if parts and not (folder / LOG).is_file():
        return _together([_status(events_of(folder, name)) for name in parts])
    found = _status(events_of(folder))
    if found is None and run_kind(folder) == "explanations":
        return _of_finished(Run(folder))
    if found is None:
        raise ConsilienceError(
            f"{folder} holds no run with a log; a dissection keeps none, nor does a run "
            f"on other than local storage until it is finished"
        )
    return found


def _of_finished(run: Run) -> dict[str, Any]:
    """Of a finished run that kept no log."""
    failed = {
        one["name"]: one["reason"] for one in run.manifest.get("failures") or ()
    }
    made = len(run.samples)
    return {
        "state": "finished",
        "images": made + len(failed),
        "done": made,
        "failed": len(failed),
        "reasons": failed,
        "rate": float("nan"),
        "seconds_left": float("nan"),
        "quiet": float("nan"),
    }


def _together(parts: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The parts of a run that have begun, as one."""
    known = [one for one in parts if one is not None]
    states = {one["state"] for one in known}
    order = ("running", "stopped", "merging", "finished")
    rate = sum(one["rate"] for one in known if one["rate"] > 0)
    reasons: dict[str, str] = {}
    for one in known:
        reasons |= one["reasons"]
    images, done = (sum(one[key] for one in known) for key in ("images", "done"))
    left = images - done - len(reasons)
    return {
        "state": next((state for state in order if state in states), "running"),
        "images": images,
        "done": done,
        "failed": len(reasons),
        "reasons": reasons,
        "rate": rate or float("nan"),
        "seconds_left": left / rate if rate > 0 else float("nan"),
        "quiet": min((one["quiet"] for one in known), default=float("nan")),
    }


def _status(events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    total = done = began = last = 0.0
    failed: dict[str, str] = {}
    this_try = 0
    state = "not begun"
    for event in events:
        last = event["time"]
        kind = event["event"]
        if kind == "begin":
            total, began, this_try = event["total"], event["time"], 0
            done = total - event["missing"]
            failed, state = {}, "running"
        elif kind == "image":
            done += 1
            this_try += 1
        elif kind == "failed":
            failed[event["name"]] = event["reason"]
        elif kind in ("merging", "finished", "stopped"):
            state = kind
    if state == "not begun":
        return None
    rate = this_try / (last - began) if last > began else float("nan")
    left = total - done - len(failed)
    return {
        "state": state,
        "images": int(total),
        "done": int(done),
        "failed": len(failed),
        "reasons": failed,
        "rate": rate,
        "seconds_left": left / rate if rate > 0 else float("nan"),
        "quiet": time.time() - last,
    }
