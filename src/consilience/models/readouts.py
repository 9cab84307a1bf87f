"""A network read elsewhere than at its class outputs: at a layer, at the pixels it
labels, at the boxes it finds.

The module stays the user's own, with its layers under their names; only what is taken
from a pass is another. Every explainer and engine that works on a `TorchNetwork` works
on a `ReadNetwork`, and its outputs are numbers (N, K) like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from consilience.models import layers
from consilience.models.engines import runner
from consilience.models.layers import Form, as_outputs, borrowed, hooked
from consilience.models.network import TorchNetwork
from consilience.models.tail import NetworkTail, TailKind
from consilience.types import ConsilienceError, Outputs

_KEPT = 4
"""Networks read in one way that are kept for the next image, so that an engine is not
made anew for each.
"""


class Readout(Protocol):
    """What is taken from a pass of a module."""

    @property
    def key(self) -> str:
        """Everything that the numbers depend on besides module and image."""

    @property
    def traceable(self) -> bool:
        """Whether an engine may convert it: not what depends on the image, nor what
        decides by what it finds.
        """

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Run the module on normalised images (N, 3, h, w) and read numbers (N, K),
        differentiable.
        """

    def layer(self, network: TorchNetwork) -> str | None:
        """Where a CAM looks; None where the search in the network finds it."""


@dataclass(frozen=True)
class ClassOutputs:
    """What a classifier returns."""

    output: str | int | None = None
    key = "class outputs"
    traceable = True

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Class outputs (N, K)."""
        return as_outputs(module(prepared), self.output)

    def layer(self, network: TorchNetwork) -> str | None:
        """Found by the search."""
        return None


@dataclass(frozen=True, eq=False)
class LayerReading:
    """What a layer says: each unit's mean over its map, or over the cells of
    ``weights`` (h, w), which sum to 1.
    """

    name: str
    form: Form
    weights: Tensor | None = None
    base: Readout = ClassOutputs()

    @property
    def key(self) -> str:
        """Layer and place."""
        return (
            f"layer {self.name} {digest_of_tensor(self.weights)} of {self.base.key}"
        )

    @property
    def traceable(self) -> bool:
        """As the whole pass is."""
        return self.base.traceable

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Units' means (N, C)."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found.append(self.mean(self.form.as_map(output)))

        with hooked([(module.get_submodule(self.name), keep)]):
            self.base.of(module, prepared)
        return found[0]

    def mean(self, maps: Tensor) -> Tensor:
        """Maps (N, C, h, w) to means (N, C)."""
        if self.weights is None:
            return maps.mean(dim=(2, 3))
        if maps.shape[2:] != self.weights.shape:
            grids = " and ".join(
                " x ".join(map(str, shape))
                for shape in (self.weights.shape, maps.shape[2:])
            )
            raise ConsilienceError(
                f"the place in {self.name!r} is of another grid than this image's: {grids}"
            )
        return torch.einsum("nchw,hw->nc", maps, self.weights.to(maps))

    def layer(self, network: TorchNetwork) -> str | None:
        """The layer itself, where it is a map: nothing behind it is asked."""
        return (
            self.name
            if self.form.grid is not None and max(self.form.grid) > 1
            else None
        )


@dataclass(frozen=True, eq=False)
class CosineReading:
    """The cosine of what ``base`` reads (N, C) to a ``reference`` (C,); one output."""

    base: Readout
    reference: Tensor

    @property
    def key(self) -> str:
        """What is read, and to what it is held."""
        return f"cosine to {digest_of_tensor(self.reference)} of {self.base.key}"

    @property
    def traceable(self) -> bool:
        """As what it is compared with."""
        return self.base.traceable

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Cosines (N, 1)."""
        said = self.base.of(module, prepared)
        return functional.cosine_similarity(said, self.reference.to(said), dim=1)[
            :, None
        ]

    def layer(self, network: TorchNetwork) -> str | None:
        """Where the embedding is read."""
        return self.base.layer(network)


def digest_of_tensor(values: Tensor | None) -> str:
    """Hex digest of a tensor's shape and values; empty for none."""
    if values is None:
        return ""
    dense = values.detach().cpu().contiguous()
    return blake2b(
        repr(tuple(dense.shape)).encode() + dense.numpy().tobytes(), digest_size=8
    ).hexdigest()


# ---- the network


@dataclass(frozen=True, eq=False, repr=False)
class ReadNetwork(TorchNetwork):
    """A `TorchNetwork` whose outputs are what ``reading`` takes from a pass."""

    reading: Readout = ClassOutputs()

    def __post_init__(self) -> None:
        if not self.reading.traceable and self.engine not in ("auto", "torch"):
            raise ConsilienceError(
                f"engine {self.engine} cannot run what is read of {self.name}; take "
                f"engine=torch"
            )
        super().__post_init__()

    @property
    def digest(self) -> str:
        """Hex digest of weights, architecture, recipe, and of what is read."""
        return self._runner.digest(
            self.module,
            f"{self.recipe!r}{self.outputs}{self.reading.key}",
            self.anatomy.volatile,
        )

    def _run(self, pixels: Tensor, channels_last: bool) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self.reading.of(
            self.module,
            self.prepared(pixels).contiguous(memory_format=layout),
        )

    @cached_property
    def _target_layer(self) -> str:
        said = self.reading.layer(self)
        if said is not None:
            return said
        # Units are not classes: a convolution with as many channels as there are units
        # is not a classifier.
        seen = (
            replace(self.anatomy, outputs=0)
            if isinstance(self.reading, LayerReading | CosineReading)
            else self.anatomy
        )
        noise = self._noise(1)
        with borrowed(self.module):
            return layers.target_layer(self.module, self.run, seen, noise)

    def tail(
        self, pixels: Tensor, layer: str, kind: TailKind | None = None
    ) -> NetworkTail:
        """The network after ``layer`` for one image, by replay: what is read may lie
        anywhere in the pass.
        """
        return super().tail(pixels, layer, kind or "replay")


def with_readout(
    network: TorchNetwork,
    reading: Readout,
    outputs: Outputs = "values",
    labels: Sequence[str] | None = None,
) -> ReadNetwork:
    """The same network, module and settings, with other outputs."""
    own = {item.name: getattr(network, item.name) for item in fields(TorchNetwork)}
    own |= {
        "labels": tuple(labels) if labels is not None else None,
        "outputs": outputs,
        "_runner": runner.Runner(),
    }
    if not reading.traceable and network.engine == "auto":
        own["engine"] = "torch"
    return ReadNetwork(**own, reading=reading)


_read: WeakKeyDictionary[TorchNetwork, dict[str, ReadNetwork]] = WeakKeyDictionary()


def read_again(network: TorchNetwork, reading: Readout) -> ReadNetwork:
    """`read`, or the network that was read so before: its engine and what is known of
    it are there already.
    """
    if not reading.traceable:
        return with_readout(network, reading)
    kept = _read.setdefault(network, {})
    if reading.key not in kept:
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[reading.key] = with_readout(network, reading)
    return kept[reading.key]


def reading_of(network: TorchNetwork) -> Readout:
    """How a network is read."""
    if isinstance(network, ReadNetwork):
        return network.reading
    return ClassOutputs(network.output)


def form_of_layer(network: TorchNetwork, name: str) -> Form:
    """How a layer's output is read as a map; raises `ConsilienceError` that lists the
    layers there are.
    """
    return network.anatomy.forms[network._known(name)]
