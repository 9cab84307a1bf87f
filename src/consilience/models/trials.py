"""What is found out by running a network for some seconds, kept by network and machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, TypeVar

import torch

from consilience import files
from consilience.models.digest import _hash
from consilience.models.engines.plan import Runnable, cache_folder, recorded_passes
from consilience.progress import say
from consilience.types import ConsilienceError

T = TypeVar("T")


class Tried(Runnable, Protocol):
    """A network that something is found out about."""

    @property
    def name(self) -> str:
        """For messages."""


_one_at_a_time = RLock()


def found_once(
    kind: str,
    key: tuple[Any, ...],
    device: torch.device,
    read: Callable[[Mapping[str, Any]], T],
    find: Callable[[], tuple[T, dict[str, Any]]],
) -> T:
    """What was found before on this machine, else what ``find`` finds, with what is to be
    kept of it for ``read``.

    Where there is no disk to write on, each process finds out for itself. ``read`` raises
    on what it cannot take; that is found anew.
    """
    name = _hash(key, machine(device))
    file = cache_folder() / kind / f"{name}.json"
    with _one_at_a_time:  # times of two trials beside each other would be neither's
        try:
            return read(files.read_json(file))
        except (OSError, ConsilienceError, TypeError, ValueError, KeyError):
            pass
        with recorded_passes():  # what is tried is no part of what is made
            found, kept = find()
        try:
            files.write_json(file, kept)
        except (OSError, ConsilienceError) as error:
            say(f"what was found out of {kind} cannot be kept: {error}")
        return found


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The better of two runs, of which the first may still get ready."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


@cache
def machine(device: torch.device) -> tuple[str, ...]:
    """What a time depends on: processor or accelerator, threads, torch."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {_processor()}"
    )
    return name, str(torch.get_num_threads()), torch.__version__


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (
            line.partition(":")[2].strip()
            for line in told
            if line.startswith("model name")
        ),
        platform.processor(),
    )
