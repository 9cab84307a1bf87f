"""Forward passes by torch: plain, channels-last, compiled."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from consilience.models.engines.plan import (
    _BLOCK,
    LOW,
    ForwardPass,
    Runnable,
    filled_batch,
    plan_engine,
)
from consilience.models.layers import borrowed
from consilience.progress import say

# ---- torch


class TorchEngine:
    """Plain torch without gradients; bf16 and f16 by autocast."""

    def __init__(self, network: Runnable, precision: str | None = None) -> None:
        planned = plan_engine(network.engine, network.precision, network.device)
        self._network, self._precision = network, precision or planned["precision"]
        self.facts: dict[str, Any] = planned | {
            "engine": "torch",
            "precision": self._precision
            if self._precision in LOW
            else network.own_precision,
            "batch": network.batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of any number of images; of a whole batch every chunk has one
        size, so that what is said of an image does not depend on its place.
        """
        network = self._network
        size, count = self._chunk(), len(pixels)
        if count == network.batch:
            pixels = filled_batch(pixels, -(-count // size) * size)
        with (
            borrowed(network.module),
            torch.inference_mode(),
            autocast(network.device, self._precision),
        ):
            found = torch.cat(
                [network.run(chunk).float() for chunk in torch.split(pixels, size)]
            )
        # out of inference mode, so that callers may differentiate what they make of it
        return found[:count].clone()

    def _chunk(self) -> int:
        """On a CPU glibc hands blocks above 32 MiB back after every use, and filling
        them anew halves the speed; a divisor of the batch where there is a large one.
        """
        batch = self._network.batch
        if self._network.device.type != "cpu":
            return batch
        most = max(1, min(batch, _BLOCK // (4 * self._network.largest)))
        even = max(size for size in range(1, most + 1) if batch % size == 0)
        return even if 2 * even > most else most


def autocast(device: torch.device, precision: str) -> Any:
    """Torch's low precision, where one is asked for."""
    return (
        torch.autocast(device.type, LOW[precision])
        if precision in LOW
        else nullcontext()
    )


class CompiledEngine:
    """The network through torch.compile, for batches of one size; a shorter batch is
    filled up.
    """

    def __init__(self, network: Runnable, planned: dict[str, Any]) -> None:
        say("compiling the model with torch.compile")
        self._network, self._precision = network, planned["precision"]
        self._run = _torch_compiled(network.run)
        self.facts: dict[str, Any] = planned | {
            "batch": network.batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of up to a batch of images."""
        network = self._network
        with (
            borrowed(network.module, eager=False),
            torch.no_grad(),
            autocast(network.device, self._precision),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return self._run(filled_batch(pixels, network.batch))[
                : len(pixels)
            ].float()


def _torch_compiled(run: ForwardPass) -> ForwardPass:
    def forward(pixels: Tensor) -> Tensor:
        return run(pixels)

    # A code object of its own: torch gives up in silence once it has compiled the same
    # one for eight networks.
    forward.__code__ = forward.__code__.replace()
    return torch.compile(forward, dynamic=False, fullgraph=True)
