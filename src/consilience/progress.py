"""Progress and cancellation without a parameter in every signature.

A hot path says ``for chunk in track(chunks, label)`` or opens a `Task`; whoever called
the library may have put a reporter into the context variable (a bar, an event stream).
With none, reporting costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Cancelled(Exception):  # noqa: N818 - asked for, not a fault
    """Whoever listens asked the work to stop."""


class Reporter(Protocol):
    """Listens to hot paths. Raising `Cancelled` from `advance` stops the work."""

    def start(self, label: str, total: int) -> int:
        """Open a task of ``total`` steps; returns its key."""

    def advance(self, task: int, steps: int) -> None:
        """``steps`` more are done."""

    def finish(self, task: int) -> None:
        """The task ended, well or not."""

    def say(self, message: str) -> None:
        """A line for the person who waits."""


_reporter: ContextVar[Reporter | None] = ContextVar(
    "consilience_reporter", default=None
)


class Task:
    """A running piece of work that reports its steps."""

    def __init__(self, reporter: Reporter | None, key: int) -> None:
        self._reporter, self._key = reporter, key

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        if self._reporter is not None:
            self._reporter.advance(self._key, steps)


@contextmanager
def listening(reporter: Reporter) -> Iterator[None]:
    """Send all progress of this context to ``reporter``."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def silent() -> Iterator[None]:
    """Nobody listens to what is inside."""
    token = _reporter.set(None)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def task(label: str, total: int) -> Iterator[Task]:
    """A task of ``total`` steps, closed whatever happens."""
    reporter = _reporter.get()
    if reporter is None:
        yield Task(None, 0)
        return
    key = reporter.start(label, total)
    try:
        yield Task(reporter, key)
    finally:
        reporter.finish(key)


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate and report a step after each item."""
    with task(label, len(items)) as running:
        for item in items:
            yield item
            running.advance()


def say(message: str) -> None:
    """Tell the person who waits, where somebody listens."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.say(printable(message))


def printable(text: str) -> str:
    """The text with what cannot be printed (line breaks, control characters, escapes
    that move a cursor) replaced; names of files may hold anything.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\xa0" else "\ufffd"
        for letter in text
    )
