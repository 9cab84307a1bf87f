"""Several workers on one run: processes of this machine, or actors of a Ray cluster.

Who leads hands out blocks of places, no more than one and the next to each, and counts
outcomes; records go from the workers straight into the run's folder. A block whose worker
died is given to another, then image by image, so that one image which kills its worker is
found and named. A block that takes far longer than the others is given to a second worker
too: records are whole and the same whoever makes them.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from consilience import progress
from consilience.runs.making import Outcome
from consilience.runs.worker import Errand, Remote, cores_of
from consilience.types import ConsilienceError

TRIES = 3
"""A block, and at last an image, is tried so often."""
STRAGGLES = 3.0
"""A block that takes so many times the median is given out a second time."""
PATIENCE = 30.0
"""Seconds before a block can be called late, and until a worker that is stopped ends."""


class Hand(Protocol):
    """A worker, as who leads sees it; it puts ``(number, event)`` into a queue: ``ready``,
    ``outcome``, ``done``, ``say``, ``error``, ``gone``.
    """

    def give(self, block: int, places: Sequence[int]) -> None:
        """A block to make."""

    def end(self) -> None:
        """No more blocks."""

    def stop(self) -> None:
        """Finish what is under way, and end."""


@dataclass(eq=False)
class _Block:
    places: list[int]
    tries: int = 0
    left: set[int] = field(default_factory=set)
    began: float = 0.0
    again: bool = False


class Process:
    """A worker of this machine, pinned to its cores."""

    def __init__(
        self,
        errand: Errand,
        number: int,
        slot: int,
        cores: Sequence[int],
        events: Any,
    ) -> None:
        environment = {**os.environ}
        if cores:
            environment |= {
                name: str(len(cores))
                for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
            }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "consilience.runs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.number, self._events = number, events
        self._tell(errand=errand.as_text(), number=slot, cores=list(cores))
        threading.Thread(target=self._listen, daemon=True).start()

    def _tell(self, **facts: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(facts) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                self._events.put((self.number, json.loads(line)))
        code = self._process.wait()
        self._events.put((self.number, {"gone": code}))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def give(self, block: int, places: Sequence[int]) -> None:
        """A block to make."""
        self._tell(block=block, places=list(places))

    def end(self) -> None:
        """No more blocks."""
        self._tell(end=True)

    def stop(self) -> None:
        """Finish what is under way, and end."""
        with suppress(OSError):
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long; then it is ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Actor:
    """A worker of a Ray cluster."""

    def __init__(self, errand: Errand, number: int, events: Any, gpus: float) -> None:
        import ray

        self._ray, self.number, self._events = ray, number, events
        remote: Any = ray.remote(Remote).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0
        )
        self._actor: Any = remote.remote(errand.to_send(), number)
        self._told: Any = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            # answers when the actor has made itself, or says why it could not
            self._ray.get(self._actor.make_all.remote([]))
            self._events.put((self.number, {"ready": True}))
            while (told := self._told.get()) is not None:
                block, places = told
                for outcome in self._ray.get(self._actor.make_all.remote(places)):
                    self._events.put(
                        (self.number, {"outcome": outcome, "block": block})
                    )
                self._events.put((self.number, {"done": block}))
        except self._ray.exceptions.RayTaskError as error:
            self._events.put((self.number, {"error": _cause(error)}))
        except Exception as error:
            self._events.put((self.number, {"gone": _cause(error)}))

    def give(self, block: int, places: Sequence[int]) -> None:
        """A block to make."""
        self._told.put((block, list(places)))

    def end(self) -> None:
        """No more blocks."""
        self._told.put(None)

    def stop(self) -> None:
        """End at once: records are whole."""
        self._told.put(None)
        with suppress(Exception):
            self._ray.kill(self._actor)

    def wait(self, seconds: float) -> None:
        """An actor needs no waiting for."""
        with suppress(Exception):
            self._ray.kill(self._actor)


def _cause(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split())[:300] or type(cause).__name__


@dataclass(eq=False)
class Crew:
    """Workers, and what each has to do; ``cluster`` is ``auto`` or the address of a Ray
    cluster, None for processes here.
    """

    errand: Errand
    workers: int
    cluster: str | None = None
    block: int = 32
    _events: Any = field(default_factory=queue.Queue)
    _hands: dict[int, Any] = field(default_factory=dict)
    _blocks: list[_Block] = field(default_factory=list)
    _queue: deque[int] = field(default_factory=deque)
    _busy: dict[int, list[int]] = field(default_factory=dict)
    _ready: set[int] = field(default_factory=set)
    _took: list[float] = field(default_factory=list)
    _deaths: int = 0
    _started: int = 0

    def make(
        self, places: Sequence[int], names: Sequence[str], last: bool = True
    ) -> Iterator[Outcome]:
        """Outcomes of all images, as they come, each once; ``last`` says that workers are
        not needed any more.
        """
        self._names = names
        self._share_out(places)
        try:
            for number in range(
                len(self._hands), min(self.workers, len(self._queue))
            ):
                self._start(number)
            left = set(places)
            while left:
                yield from self._next(left)
        except BaseException:
            self.stop()
            raise
        if last:
            self.end()

    def end(self) -> None:
        """Let the workers go."""
        for hand in self._hands.values():
            hand.end()
        self._wait()

    def stop(self) -> None:
        """Have the workers end at once; what they kept is whole."""
        for hand in self._hands.values():
            hand.stop()
        self._wait()

    def _wait(self) -> None:
        for hand in self._hands.values():
            hand.wait(PATIENCE)
        self._hands.clear()

    def _share_out(self, places: Sequence[int]) -> None:
        """Blocks in order; smaller ones where there would be too few to go round."""
        size = max(1, min(self.block, -(-len(places) // (4 * self.workers))))
        for start in range(0, len(places), size):
            part = list(places[start : start + size])
            self._queue.append(len(self._blocks))
            self._blocks.append(_Block(part, left=set(part)))

    def _start(self, slot: int) -> None:
        number = slot + self.workers * self._started
        self._started += 1
        if self.cluster is not None:
            gpus = 1.0 if self.errand.devices else 0.0
            self._hands[number] = Actor(self.errand, number, self._events, gpus)
        else:
            cores = cores_of(self.workers)[slot]
            self._hands[number] = Process(
                self.errand, number, slot, cores, self._events
            )
        self._busy[number] = []

    def _next(self, left: set[int]) -> Iterator[Outcome]:
        """Whatever happens next."""
        self._give_out()
        try:
            number, event = self._events.get(timeout=1.0)
        except queue.Empty:
            self._give_late_ones_out()
            return
        if "say" in event:
            progress.say(str(event["say"]))
        elif "ready" in event:
            self._ready.add(number)
        elif "outcome" in event:
            outcome = Outcome(**event["outcome"])
            block = self._blocks[event["block"]]
            block.left.discard(outcome.place)
            if outcome.place in left:
                left.discard(outcome.place)
                yield outcome
        elif "done" in event:
            self._finished(number, event["done"])
        elif "error" in event:
            raise ConsilienceError(str(event["error"]))
        elif "gone" in event:
            yield from self._lost(number, event["gone"], left)

    def _give_out(self) -> None:
        for number in sorted(self._ready):
            busy = self._busy[number]
            while self._queue and len(busy) < 2:
                block = self._queue.popleft()
                if not self._blocks[block].left:
                    continue
                self._blocks[block].began = time.monotonic()
                busy.append(block)
                self._hands[number].give(block, sorted(self._blocks[block].left))

    def _give_late_ones_out(self) -> None:
        """Idle workers take what another is late with."""
        idle = [number for number in self._ready if not self._busy[number]]
        if self._queue or not idle or not self._took:
            return
        late = max(PATIENCE, STRAGGLES * median(self._took))
        for busy in list(self._busy.values()):
            for block in busy:
                one = self._blocks[block]
                waits = time.monotonic() - one.began
                if idle and one.left and not one.again and waits > late:
                    one.again = True
                    number = idle.pop()
                    self._busy[number].append(block)
                    self._hands[number].give(block, sorted(one.left))

    def _finished(self, number: int, block: int) -> None:
        if block in self._busy[number]:
            self._busy[number].remove(block)
        self._took.append(time.monotonic() - self._blocks[block].began)
        for following in self._busy[number]:
            self._blocks[following].began = time.monotonic()

    def _lost(self, number: int, why: Any, left: set[int]) -> Iterator[Outcome]:
        """A worker is gone: what it had is given to others, and another one starts."""
        had = self._busy.pop(number, [])
        self._hands.pop(number, None)
        self._ready.discard(number)
        if not had and not self._took and not self._ready:
            self._deaths += 1
            if self._deaths >= TRIES:
                raise ConsilienceError(f"no worker starts: the last {_ended(why)}")
        for order, block in enumerate(had):
            one = self._blocks[block]
            if not one.left:
                continue
            one.tries += order == 0  # the next one was only waiting
            if order == 0 and one.tries >= TRIES and len(one.left) == 1:
                (place,) = one.left
                one.left.clear()
                if place in left:
                    left.discard(place)
                    reason = f"a worker {_ended(why)} each time that it was tried"
                    yield Outcome(place, self._names[place], 0.0, reason)
            elif order == 0 and one.tries >= 2 and len(one.left) > 1:
                for place in sorted(one.left):
                    self._queue.append(len(self._blocks))
                    self._blocks.append(_Block([place], 1, {place}))
                one.left.clear()
            else:
                self._queue.appendleft(block)
        if left:
            progress.say(f"a worker {_ended(why)}; another one goes on")
            self._start(number % self.workers)


def _ended(why: Any) -> str:
    if isinstance(why, int):
        return f"was ended by signal {-why}" if why < 0 else f"ended with code {why}"
    return f"was lost ({why})"


def join_cluster(address: str) -> int:
    """Connect to a Ray cluster (``auto``: the one that is there, else one is started
    here); returns how many workers it has room for.
    """
    try:
        import ray
    except ImportError:
        raise ConsilienceError(
            "--cluster needs ray: pip install 'consilience[ray]'"
        ) from None
    if not ray.is_initialized():
        given = None if address == "auto" and not _ray_is_there() else address
        try:
            ray.init(
                address=given, log_to_driver=False, include_dashboard=False
            ) if given is None else ray.init(address=given, log_to_driver=False)
        except Exception as error:
            raise ConsilienceError(
                f"no Ray cluster at {address}: {_cause(error)}"
            ) from None
    has: Any = ray.cluster_resources  # untyped there
    return max(1, int(has().get("CPU", 1)))


def _ray_is_there() -> bool:
    return bool(os.environ.get("RAY_ADDRESS")) or os.path.exists(  # noqa: PTH110
        "/tmp/ray/ray_current_cluster"
    )
