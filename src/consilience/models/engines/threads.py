"""The same threads inside a pass on every machine, so that sums are split alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

STEADY_THREADS = 2
"""Threads of a torch pass in a run, on every machine: how sums are split, and so their last
bits, depends on it. A matrix product of numpy has one, since several images are fitted
beside each other. More cores are used by more workers."""


@contextmanager
def steady_threads() -> Iterator[None]:
    """The same threads inside a pass whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(STEADY_THREADS)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
