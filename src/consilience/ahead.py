"""Things made by threads while those before them are used, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    make: Callable[[Item], Made], items: Iterable[Item], threads: int, depth: int
) -> Generator[Made, None, None]:
    """``make`` of each item, in the order of the items, by ``threads``.

    ``depth`` are made or being made ahead of whoever takes them. Without threads each is
    made when it is asked for. What one raises is raised when it is its turn; what is not
    yet begun then is given up, as it is where no more are asked for.
    """
    if threads < 1:
        yield from map(make, items)
        return
    waiting: deque[Future[Made]] = deque()
    left = iter(items)
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            while True:
                for item in islice(left, depth - len(waiting)):
                    waiting.append(pool.submit(copy_context().run, make, item))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()
