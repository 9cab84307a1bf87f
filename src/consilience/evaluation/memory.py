"""A model that remembers what it said of an image's edits, so that another class is
explained without asking again.

LIME, RISE and Score-CAM show the model the same edited images whatever the class: only
what is read of its outputs differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from consilience.models.network import TorchNetwork
from consilience.types import Model


@dataclass(frozen=True, eq=False)
class Remembering(TorchNetwork):
    """A torch network that keeps the outputs of its passes while it is told to; the
    very same numbers come back.

    Memory: outputs of one image's passes, 4 bytes a pass and class (RISE with 4,000
    masks, 1,000 classes: 16 MB), until `forget`. A copy of it (another engine, other
    weights) remembers nothing.
    """

    _memory: list[dict[bytes, Tensor]] = field(
        init=False, default_factory=list, repr=False
    )

    def remember(self) -> None:
        """Begin to keep outputs."""
        self._memory[:] = [{}]

    def forget(self) -> None:
        """Drop all that is kept, and keep nothing more."""
        self._memory.clear()

    def scores(self, pixels: Tensor) -> Tensor:
        """As the network's, or as it said before of the very same pixels."""
        return (
            self._remembered(b"scores", pixels, super().scores)
            if self._memory
            else super().scores(pixels)
        )

    def logits(self, pixels: Tensor) -> Tensor:
        """As the network's; kept only where no gradient is asked for."""
        if not self._memory or torch.is_grad_enabled():
            return super().logits(pixels)
        return self._remembered(b"logits", pixels, super().logits)

    def _remembered(self, kind: bytes, pixels: Tensor, ask: Any) -> Tensor:
        known = self._memory[0]
        key = kind + _digest(pixels)
        if key not in known:
            known[key] = ask(pixels).detach()
        return known[key].clone()


def remembering(model: Model) -> Model:
    """The same model with a memory (off until told), where it is a plain torch network;
    any other model as it is.
    """
    if type(model) is not TorchNetwork:
        return model
    return Remembering(
        **{
            item.name: getattr(model, item.name)
            for item in fields(TorchNetwork)
            if item.init
        }
    )


def _digest(pixels: Tensor) -> bytes:
    state = blake2b(
        repr((tuple(pixels.shape), pixels.dtype)).encode(), digest_size=16
    )
    state.update(pixels.detach().cpu().contiguous().numpy().data)
    return state.digest()
