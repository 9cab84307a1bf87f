"""Things made ahead by threads: in order, no more than told, each error at its turn."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from consilience.ahead import ahead

ASKED: ContextVar[str] = ContextVar("asked", default="nobody")


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_is_made_comes_in_the_order_of_the_items(threads):
    wait = threading.Event()

    def make(item):
        if item == 0 and threads > 1:
            assert wait.wait(10)  # the first is the last to be made
        wait.set() if item == 2 else None
        return item * item

    assert list(ahead(make, range(9), threads, 4)) == [n * n for n in range(9)]


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_are_taken_than_told(depth):
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    made = ahead(lambda item: item, items(), 2, depth)
    assert taken == []  # nothing before somebody asks
    for number in range(1, 6):
        next(made)
        assert len(taken) == depth + number - 1
    made.close()
    assert len(taken) == depth + 4


def test_without_threads_each_is_made_when_it_is_asked_for():
    names = []
    made = ahead(
        lambda item: names.append(threading.current_thread()) or item, [1, 2], 0, 9
    )
    assert next(made) == 1
    assert names == [threading.current_thread()]


def test_an_error_is_raised_at_its_turn_and_the_rest_is_given_up():
    begun = []

    def make(item):
        begun.append(item)
        if item == 1:
            raise ValueError("one")
        return item

    made = ahead(make, range(50), 1, 3)
    assert next(made) == 0
    with pytest.raises(ValueError, match="one"):
        next(made)
    assert len(begun) <= 4
    assert list(made) == []


def test_threads_know_what_the_taker_knew():
    token = ASKED.set("the taker")
    try:
        assert list(ahead(lambda _: ASKED.get(), [1, 2], 2, 2)) == ["the taker"] * 2
    finally:
        ASKED.reset(token)
