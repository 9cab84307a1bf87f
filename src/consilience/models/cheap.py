"""Cheap copies of a network, and what a pass of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from consilience.models.engines import plan
from consilience.models.trials import Tried, found_once, seconds_of
from consilience.progress import say
from consilience.types import Cheaper, Fidelity

DIGITS = 2
"""Of a cost: it decides how draws are shared out, and must not follow the clock's noise."""


class Copied(Tried, Protocol):
    """What is needed of a network."""

    def scores(self, pixels: Tensor) -> Tensor:
        """Raw outputs."""

    @property
    def in_bf16(self) -> Any:
        """The same in that precision, with its engine once that is made."""


def cheaper_copy(network: Copied, fidelity: Fidelity) -> Cheaper | str:
    """The copy that ``fidelity`` names, or why there is none here."""
    if network.precision != "f32" or network.own_precision != "f32":
        return f"the network runs in {network.precision} itself"
    planned = plan.plan_engine(network.engine, "bf16", network.device)
    if planned["precision"] != "bf16" or not plan.native_bf16(network.device):
        return f"this {network.device.type} has no bf16 arithmetic"
    copy = network.in_bf16
    return Cheaper("bf16", copy, _cost(network, copy, "bf16"))


def _cost(network: Copied, copy: Any, kind: str) -> float:
    """What a pass of a copy takes of the time of the network's own."""

    def find() -> tuple[float, dict[str, Any]]:
        say(f"timing {network.name} in {kind}, once on this machine")
        shape = (network.batch, network.channels, *network.frame)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(network.device)
        times = [
            seconds_of(lambda one=one: one.scores(pixels), network.device)  # type: ignore[misc]
            for one in (network, copy)
        ]
        cost = round(times[1] / times[0], DIGITS)
        return cost, {"cost": cost, "seconds": times}

    def read(kept: Mapping[str, Any]) -> float:
        cost = float(kept["cost"])
        if not 0 < cost < 100:
            raise ValueError(cost)
        return cost

    key = (network.digest, network.frame, network.batch, network.engine, kind)
    return found_once("cheaper", key, network.device, read, find)
