"""Passes of several threads in common batches.

While the engine runs, what other threads ask of the network waits and then goes together,
as in the group commit of a database: nobody waits for company, and no pass runs emptier
than it must. Every pass has one size, filled up with blank images, so that what is said of
an image depends neither on its place nor on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import Any

import torch
from torch import Tensor

from consilience.models.engines.plan import filled_batch, record_pass
from consilience.models.network import TorchNetwork


@dataclass(eq=False)
class _Asked:
    """Rows that a thread waits for."""

    pixels: Tensor
    outputs: Tensor | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.outputs is not None or self.error is not None


@dataclass(eq=False)
class Gathering:
    """The model, for threads that only ask for its scores; anything else is the model's
    own, which is not for several threads at a time.
    """

    model: TorchNetwork
    _waiting: list[_Asked] = field(default_factory=list)
    _engine: Lock = field(default_factory=Lock)
    _changed: Condition = field(default_factory=Condition)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def scores(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) in [0, 1] to (N, K) float32, as `TorchNetwork.scores`."""
        batch = self.model.batch
        if tuple(pixels.shape[2:]) != self.model.frame or not len(pixels):
            with self._engine:
                return self.model.scores(pixels)
        parts = [_Asked(part) for part in torch.split(pixels, batch)]
        with self._changed:
            self._waiting += parts
        for part in parts:
            self._wait_for(part)
        # the engine that ran is recorded where the pass is: say it here too
        facts = self.model.facts
        record_pass(str(facts["engine"]), str(facts["precision"]))
        return torch.cat([_said(part) for part in parts])

    def _wait_for(self, part: _Asked) -> None:
        while not part.done:
            if self._engine.acquire(blocking=False):
                try:
                    self._run_next()
                finally:
                    self._engine.release()
                with self._changed:
                    self._changed.notify_all()
                continue
            with self._changed:
                # looked at under the lock that is held to tell: none is missed
                if not part.done and self._engine.locked():
                    self._changed.wait(timeout=0.05)

    def _run_next(self) -> None:
        """One pass of what waits longest, with whatever else fits."""
        batch = self.model.batch
        with self._changed:
            taken = list(_fitting(self._waiting, batch))
            for part in taken:
                self._waiting.remove(part)
        if taken:
            self._run(taken, batch)

    def _run(self, taken: list[_Asked], batch: int) -> None:
        try:
            pixels = [part.pixels for part in taken]
            rows = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
            outputs = self.model.scores(filled_batch(rows, batch))[: len(rows)]
            sizes = [len(part.pixels) for part in taken]
            for part, said in zip(taken, torch.split(outputs, sizes), strict=True):
                part.outputs = said
        except Exception as error:
            if len(taken) == 1:
                taken[0].error = error
            else:  # whose fault it is shows one by one
                for part in taken:
                    self._run([part], batch)
        except BaseException as error:
            for part in taken:
                part.error = error
            raise


def _fitting(waiting: list[_Asked], batch: int) -> Iterator[_Asked]:
    """The first, and those after it that fit beside it."""
    left = batch
    for part in waiting:
        if len(part.pixels) <= left:
            left -= len(part.pixels)
            yield part
        elif left == batch:
            return


def _said(part: _Asked) -> Tensor:
    if part.error is not None:
        raise part.error
    assert part.outputs is not None
    return part.outputs


def held(model: Any) -> AbstractContextManager[None]:
    """While somebody works with a model who changes no weight; torch networks then look
    for no change at every pass.
    """
    return model.holding() if isinstance(model, TorchNetwork) else nullcontext()


def can_gather(model: Any) -> bool:
    """Whether several threads may ask it: torch networks whose engine takes one at a
    time.
    """
    return isinstance(model, TorchNetwork)
