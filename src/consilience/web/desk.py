"""The desk: worker processes, the queue before them, and what became of every task.

Two workers: one for jobs, which take seconds to minutes, one for questions, which must
answer while a person waits. A worker that dies or takes too long is replaced, and its
task says so.
"""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilience.types import ConsilienceError

QUEUE = 16
"""Tasks that may wait; more are refused."""
KEPT, ROOM = 64, 300_000_000
"""Finished tasks that are remembered, and letters of their events; the oldest go."""
LIMIT = 1800.0
"""Seconds that a job may take."""
PATIENCE = 60.0
"""Seconds that a question may take."""
GRACE = 5.0
"""Seconds that a task may take to stop when it is asked to."""
START = 180.0
"""Seconds that a worker may take to load its networks."""
AGAIN = 30.0
"""Seconds before a worker that broke at its start is tried anew."""


@dataclass(frozen=True)
class Setting:
    """What a worker is started with: networks by their spelling, plug-in files, and the
    folder of images that a page may look through.
    """

    models: tuple[str, ...]
    plugins: tuple[str, ...] = ()
    images: str | None = None
    labels: str | None = None
    device: str | None = None


class FullError(Exception):
    """Too much waits already."""


@dataclass(eq=False)
class Task:
    """One task, its events in order, and its latest progress (which has no place among
    them) with how often it was told.
    """

    number: str
    asked: dict[str, Any]
    limit: float
    state: str = "waiting"
    events: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] | None = None
    told: int = 0
    size: int = 0
    answer: dict[str, Any] | None = None
    reason: str = ""
    begun_at: float | None = None
    stopped_at: float | None = None
    ended_at: float | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "cancelled")

    def tell(self, event: dict[str, Any]) -> None:
        """Add an event."""
        with self._changed:
            if event["kind"] == "progress":
                self.progress, self.told = event, self.told + 1
            else:
                self.events.append(event)
                self.size += len(event.get("html", "")) + 200
            self._changed.notify_all()

    def end(
        self, state: str, answer: dict[str, Any] | None, reason: str = ""
    ) -> None:
        """Close the task; later calls change nothing."""
        with self._changed:
            if self.over:
                return
            self.answer, self.reason = answer, reason
            self.ended_at = time.time()
            self.state = state
            self._changed.notify_all()

    def is_late(self) -> bool:
        """Whether its time is over, or it was asked to stop and does not."""
        now = time.time()
        if self.stopped_at is not None and now > self.stopped_at + GRACE:
            return True
        return self.begun_at is not None and now > self.begun_at + self.limit

    def wait(self, timeout: float) -> None:
        """Until something changes, or the time is over."""
        with self._changed:
            if not self.over:
                self._changed.wait(timeout)

    def result(self, timeout: float) -> dict[str, Any]:
        """Its answer; `ConsilienceError` with the reason where there is none."""
        end = time.monotonic() + timeout
        while not self.over and time.monotonic() < end:
            self.wait(max(0.0, end - time.monotonic()))
        if self.state != "done":
            raise ConsilienceError(self.reason or "this took too long")
        return self.answer or {}


class Hand:
    """One worker process and its queue."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        self.catalogue: dict[str, Any] = {}
        self.broken = ""
        self.restarts = 0
        self._queue: deque[Task] = deque()
        self._now: Task | None = None
        self._lock = threading.Condition()
        self._closed = False
        self._again = 0.0
        self._ready = threading.Event()
        self._plugins = _times(setting)
        self._process: Any = None
        self._connection: Any = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # -- from any thread

    def put(self, task: Task) -> None:
        """Queue a task; `FullError` where the queue is full."""
        with self._lock:
            if len(self._queue) >= QUEUE:
                raise FullError
            self._queue.append(task)
            self._lock.notify_all()

    def cancel(self, task: Task) -> None:
        """Drop a waiting task; have a running one stop at its next step, and end its
        process if it does not.
        """
        with self._lock:
            if task in self._queue:
                self._queue.remove(task)
                task.end("cancelled", None, "cancelled")
                return
            if self._now is not task:
                return
            task.stopped_at = time.time()
            if self._connection is not None:
                with suppress(OSError):  # it is being replaced
                    self._connection.send({"do": "stop", "task": task.number})

    def waiting(self, task: Task) -> int:
        """How many stand before a task."""
        with self._lock:
            ahead = list(self._queue)
            return ahead.index(task) + bool(self._now) if task in ahead else 0

    def ready(self, timeout: float) -> bool:
        """Whether the networks are loaded."""
        return self._ready.wait(timeout)

    @property
    def pid(self) -> int | None:
        """Of the process, for those who look after it."""
        return self._process.pid if self._process is not None else None

    def shut(self) -> None:
        """Take nothing more."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def close(self) -> None:
        """Wait until the process has ended, which its thread sees to."""
        self.shut()
        self._thread.join(15)

    # -- its own thread

    def _work(self) -> None:
        while not self._closed:
            if not self._is_alive() and not self._is_hopeless():
                self._start()
            with self._lock:
                if not self._queue and not self._closed:
                    self._lock.wait(1.0)
                if self._closed:
                    break
                if not self._queue:
                    continue
                task = self._queue.popleft()
                self._now = task
            if _times(self.setting) != self._plugins:  # saved since it was loaded
                self._end_process()
            if not self._is_alive() and not self._is_hopeless():
                self._start()
            self._do(task)
            with self._lock:
                self._now = None
        self._end_process()

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def _is_hopeless(self) -> bool:
        """Whether it broke at its start and nothing has been saved since; what is broken
        for another reason is tried anew after a while.
        """
        same = _times(self.setting) == self._plugins
        return bool(self.broken) and same and time.monotonic() < self._again

    def _start(self) -> None:
        from consilience.web import worker

        self._ready.clear()
        self._plugins = _times(self.setting)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.serve, args=(theirs, self.setting), daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection = ours
        end = time.monotonic() + START
        self.broken = "the worker did not start"
        try:
            while time.monotonic() < end and not self._closed:
                if not ours.poll(0.2):
                    if not self._process.is_alive():
                        break
                    continue
                event = ours.recv()
                if event["kind"] == "ready":
                    self.catalogue, self.broken = event["catalogue"], ""
                    break
                if event["kind"] == "broken":
                    self.broken = event["reason"]
                    break
        except (EOFError, OSError):
            pass
        if self.broken:
            self._end_process()
            self._again = time.monotonic() + AGAIN
        self._ready.set()

    def _do(self, task: Task) -> None:
        if task.stopped_at is not None:
            task.end("cancelled", None, "cancelled")
            return
        if self.broken:
            task.end("failed", None, self.broken)
            return
        task.state, task.begun_at = "running", time.time()
        try:
            self._connection.send({**task.asked, "task": task.number})
            while not self._closed:
                if task.is_late():
                    self._replace(task, "stopped: it took too long")
                    return
                if not self._connection.poll(0.2):
                    if not self._process.is_alive():
                        raise EOFError
                    continue
                event = self._connection.recv()
                if event.get("task") != task.number:
                    continue
                if event["kind"] == "done":
                    task.end("done", event["answer"])
                    return
                if event["kind"] == "failed":
                    state = "cancelled" if event.get("cancelled") else "failed"
                    task.end(state, None, event["reason"])
                    return
                task.tell(event)
            task.end("failed", None, "the workbench was closed")
        except (EOFError, OSError):
            self._replace(
                task, "the worker process ended; another one takes its place"
            )

    def _replace(self, task: Task, reason: str) -> None:
        self.restarts += 1
        self._end_process()
        if task.stopped_at is not None:
            task.end("cancelled", None, "cancelled")
        else:
            task.end("failed", None, reason)

    def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        process.terminate()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join(5)
        self._process = None


def _times(setting: Setting) -> dict[str, float]:
    """When each plug-in file was saved last."""
    found = {}
    for path in setting.plugins:
        try:
            found[path] = Path(path).stat().st_mtime
        except OSError:
            found[path] = 0.0
    return found


class Desk:
    """Takes tasks, keeps what became of them; ``forget`` is told of those it drops."""

    def __init__(
        self,
        setting: Setting,
        limit: float = LIMIT,
        forget: Callable[[Task], None] = lambda task: None,
    ) -> None:
        self.limit, self.forget = limit, forget
        self._jobs = Hand("jobs", setting)
        self._questions = Hand("questions", setting)
        self.tasks: OrderedDict[str, Task] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def hands(self) -> tuple[Hand, Hand]:
        """The worker of jobs and that of questions."""
        return self._jobs, self._questions

    def start(self, asked: Mapping[str, Any], number: str | None = None) -> Task:
        """Queue a job."""
        task = Task(number or secrets.token_urlsafe(8), dict(asked), self.limit)
        self._jobs.put(task)
        with self._lock:
            self.tasks[task.number] = task
        self._forget()
        return task

    def _forget(self) -> None:
        """Drop the oldest finished tasks where there are too many, with what they left."""
        with self._lock:
            over = [one for one in self.tasks.values() if one.over]
            size = sum(one.size for one in self.tasks.values())
            dropped = []
            while over and (len(over) > KEPT or size > ROOM):
                one = over.pop(0)
                size -= one.size
                dropped.append(self.tasks.pop(one.number))
        for one in dropped:
            self.forget(one)

    def question(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Ask and wait for the answer."""
        task = Task(secrets.token_urlsafe(8), dict(asked), PATIENCE)
        self._questions.put(task)
        return task.result(PATIENCE + START)

    def cancel(self, task: Task) -> None:
        """Stop a job."""
        self._jobs.cancel(task)

    def waiting(self, task: Task) -> int:
        """How many jobs stand before this one."""
        return self._jobs.waiting(task)

    def catalogue(self) -> dict[str, Any]:
        """What forms are made from, as the workers know it now."""
        if not self._questions.ready(START) or self._questions.broken:
            raise ConsilienceError(
                self._questions.broken or "the workers do not start"
            )
        return self._questions.catalogue

    def close(self) -> None:
        """End both workers."""
        for hand in self.hands:
            hand.shut()
        for hand in self.hands:
            hand.close()
