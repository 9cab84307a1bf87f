"""How a forward and backward pass runs: what it keeps, and its layout, batch and precision
by a short trial, once a network and machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from consilience.models.engines.openvino_gradients import WRITING, UnwrittenError
from consilience.models.norms import folded_tensors
from consilience.models.trials import Tried, found_once, seconds_of
from consilience.progress import say

ForwardRun = Callable[[Tensor], Tensor]

TRIAL_SECONDS = 6.0
"""After which a trial tries no larger batch."""

WORTHWHILE = 1.05
"""How much faster a larger batch or another layout must be: less is noise of the clock."""

WORTH_ANOTHER = 1.15
"""How much faster another engine must be: it takes a while to get ready in each process."""

FAST = 400.0
"""Passes a second at which no other engine is tried: getting it ready takes longer."""

WRITTEN_BATCH = 10
"""Images a pass of an engine that has to be made anew for another number. On two cores 2 to
25 differ by a seventh; a pass left half empty at the end costs more, and ten divide the round
numbers of steps and draws that methods take.
"""

WRITTEN_ROOM = 2
"""How many images such an engine takes where autograd has room for one; it keeps less than
half an image (a third to a half on EfficientNet-Lite0 and ResNet-50)."""

# ---- what it keeps


def kept_bytes(module: nn.Module, run: ForwardRun, pixels: Tensor) -> int:
    """Bytes that a pass of ``pixels`` keeps for the backward pass to them: what its
    operations save, each storage once, weights left out.
    """
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = pixels.detach().clone().requires_grad_()
    # Nothing saved is freed before the graph goes, so that an address stands for one
    # storage.
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        outputs = run(leaf)
    del outputs
    folded = {
        tensor.untyped_storage().data_ptr() for tensor in folded_tensors(module)
    }
    return sum(size for place, size in kept.items() if place not in folded)


# ---- layout, batch, precision


@dataclass(frozen=True)
class GradientPlan:
    """How many forward and backward passes run: layout, images a pass, precision, and the
    engine of those to the pixels; the layout is of what torch runs, in ``torch_batch``
    images a pass where that is another number.

    ``rates`` are the passes a second that the trial saw, by layout, precision and batch.
    """

    channels_last: bool
    batch: int
    precision: str = "f32"
    engine: str = "torch"
    torch_batch: int | None = field(default=None, compare=False)
    rates: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def by_torch(self) -> GradientPlan:
        """The same where torch has to run it."""
        return replace(self, engine="torch", batch=self.torch_batch or self.batch)

    @property
    def said(self) -> str:
        """In a few words, for what is kept with a map."""
        layout = "channels-last" if self.channels_last else "channels-first"
        way = layout if self.engine == "torch" else self.engine
        return f"{way}, {self.precision}, {self.batch} a pass"


class AllOutputs:
    """A target for trials: the sum of an image's outputs."""

    index = None
    name = "all outputs"
    score = "value"

    def of(self, outputs: Tensor) -> Tensor:
        """(N, K) to (N,)."""
        return outputs.sum(dim=1)


Timed = Callable[[GradientPlan, Tensor], object]
"""One forward and backward pass of pixels (N, C, h, w) as a plan says."""


def plan_gradients(
    network: Tried,
    most: int,
    start: GradientPlan,
    others: list[GradientPlan],
    run: Timed,
) -> GradientPlan:
    """The fastest way on this machine: as it was found before, or by a trial of layouts
    and precisions with two images a pass, then of larger batches up to ``most``, then of
    another engine where that is slow.

    ``start`` is taken unless one of ``others``, or a larger batch, is clearly faster.
    What was found is kept by network, machine and library; where there is no disk to
    write on, each process finds out for itself.
    """

    def find() -> tuple[GradientPlan, dict[str, Any]]:
        say(f"timing gradients of {network.name}, once on this machine")
        found = _trial(network, most, start, others, run)
        return found, asdict(found)

    key = (network.digest, network.frame, most, start, others, WRITING)
    allowed = [start, *others]
    return found_once(
        "gradients",
        key,
        network.device,
        lambda kept: _plan(kept, most, allowed),
        find,
    )


def _plan(
    kept: Mapping[str, Any], most: int, allowed: list[GradientPlan]
) -> GradientPlan:
    """What was kept; `ValueError` where it is no plan that this network can run."""
    plan = GradientPlan(**kept)
    known = any(_same_way(plan, one) for one in allowed)
    room = most if plan.engine == "torch" else _written_batch(most)
    sizes = (plan.batch, room), (plan.by_torch.batch, most)
    if not known or not all(
        isinstance(size, int) and 1 <= size <= largest for size, largest in sizes
    ):
        raise ValueError(kept)
    return plan


def _written_batch(most: int) -> int:
    """Images a pass of another engine where torch's memory allows ``most``."""
    return min(WRITTEN_BATCH, WRITTEN_ROOM * most)


def _same_way(plan: GradientPlan, one: GradientPlan) -> bool:
    """But for the batch, and for another engine the layout of what is left to torch."""
    last = plan.channels_last if plan.engine == "torch" else one.channels_last
    return replace(plan, batch=one.batch, channels_last=last) == one


def _trial(
    network: Tried,
    most: int,
    start: GradientPlan,
    others: list[GradientPlan],
    run: Timed,
) -> GradientPlan:
    begun = time.perf_counter()
    rates: dict[str, float] = {}

    def rate(plan: GradientPlan) -> float:
        rates[plan.said] = found = _rate(network, plan, run)
        return found

    small = min(2, most)
    best = replace(start, batch=small)
    reached = rate(best)
    by_torch = [one for one in others if one.engine == "torch"]
    for other in by_torch:
        one = replace(other, batch=small)
        if (found := rate(one)) > WORTHWHILE * reached:
            best, reached = one, found
    for size in _larger(small, most):
        if time.perf_counter() - begun > TRIAL_SECONDS:
            break
        one = replace(best, batch=size)
        if (found := rate(one)) > WORTHWHILE * reached:
            best, reached = one, found
    for other in others:
        if other in by_torch or best.precision != other.precision or reached > FAST:
            continue
        size = _written_batch(most)
        one = replace(
            other,
            batch=size,
            channels_last=best.channels_last,
            torch_batch=best.batch,
        )
        try:
            found = rate(one)
            reached = max(reached, rate(best))  # once more, now that it is warm
            if found > WORTH_ANOTHER * reached:
                best, reached = one, found
        except UnwrittenError:  # which has been said
            continue
    return replace(
        best, rates={said: round(found, 3) for said, found in rates.items()}
    )


def _larger(small: int, most: int) -> Iterator[int]:
    """Batches to try, each about half as large again."""
    size = small
    while size < most:
        size = min(most, math.ceil(1.5 * size))
        yield size


def _rate(network: Tried, plan: GradientPlan, run: Timed) -> float:
    """Passes a second: the better of two, of which the first may still get ready."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(
        plan.batch, network.channels, *network.frame, generator=generator
    ).to(network.device)
    seconds = seconds_of(lambda: run(plan, pixels), network.device)
    return plan.batch / seconds
