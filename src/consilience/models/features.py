"""What the layers of a network say of many images: activations by the fastest exact
engine, without gradients.

`TorchNetwork.activations` opens a network with hooks, for a few images. Here the
network is converted with its layers as outputs, so that a pass costs what a pass of
``scores`` costs; what lies behind the last of the layers is not run. The converted
network is compared with torch on the first images it sees; where it differs, or cannot
be made, torch runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consilience.models.engines import openvino, plan, runner
from consilience.models.engines import torch as engines_torch
from consilience.models.layers import hooked
from consilience.progress import say
from consilience.types import ConsilienceError, Layer

Maps = dict[str, Tensor]


class OpenedNetwork(plan.Runnable, Protocol):
    """A network whose layers can be read."""

    anatomy: Any

    def layers(self) -> tuple[Layer, ...]:
        """Every layer that gives one map or vector."""

    def activations(self, pixels: Tensor, layers: Sequence[str]) -> Maps:
        """One plain torch pass."""


class Features:
    """Pixels (N, 3, h, w) in [0, 1] to activations by layer (N, C, h, w) float32, up to
    ``batch`` images at a time.

    The maps of a call are valid until the next one: they may lie in the engine's own
    memory. Raises `ConsilienceError` where the network has no such layer, or an engine
    that was asked for by name cannot run it.
    """

    def __init__(self, network: OpenedNetwork, layers: Sequence[str]) -> None:
        if not layers:
            raise ConsilienceError(
                "no layer was named; model.layers() lists those there are"
            )
        self.network, self.names = network, tuple(dict.fromkeys(layers))
        self.batch = network.batch
        self._run: Callable[[Tensor], Maps] | None = None
        self.facts: dict[str, Any] = plan.plan_engine(
            network.engine, network.precision, network.device
        )

    def __call__(self, pixels: Tensor) -> Maps:
        """The layers' maps; a vector is (N, C, 1, 1)."""
        if len(pixels) > self.batch:
            raise ConsilienceError(
                f"features are read {self.batch} images at a time; got {len(pixels)}"
            )
        pixels = pixels.to(self.network.device, torch.float32)
        if self._run is None:
            self._run = self._made(pixels)
        plan.record_pass(self.facts["engine"], self.facts["precision"])
        return self._run(pixels)

    def release(self) -> None:
        """Give the engine's memory back; the next call makes it anew."""
        self._run = None

    def _made(self, pixels: Tensor) -> Callable[[Tensor], Maps]:
        """The engine that was asked for, proven on the images at hand."""
        if self.facts["engine"] != "openvino":
            return self._torch
        try:
            run = _OpenVINO(self.network, self.names, self.facts["precision"])
            _verify(
                run(pixels),
                self._plain(pixels),
                plan.ENGINE_TOLERANCE[run.facts["precision"]],
            )
        except (
            Exception
        ) as error:  # whatever a converter trips over, torch can run the model
            return self._instead(error)
        self.facts |= run.facts
        return run

    def _instead(self, error: Exception) -> Callable[[Tensor], Maps]:
        reason = runner.first_cause(error)
        if self.network.engine == "openvino":
            raise ConsilienceError(
                f"engine openvino cannot give these layers: {reason}; take engine=torch"
            ) from error
        say(f"openvino cannot give these layers, torch does: {reason}")
        self.facts |= {
            "engine": "torch",
            "precision": "f32",
            "note": f"openvino was tried: {reason}",
        }
        return self._torch

    def _plain(self, pixels: Tensor) -> Maps:
        return self.network.activations(pixels[[0, -1]], self.names)

    def _torch(self, pixels: Tensor) -> Maps:
        self.facts["engine"] = "torch"
        with (
            torch.no_grad(),
            engines_torch.autocast(self.network.device, self.facts["precision"]),
        ):
            maps = self.network.activations(pixels, self.names)
        return {name: values.float() for name, values in maps.items()}


def _verify(got: Maps, expected: Maps, tolerance: float) -> None:
    for name, values in expected.items():
        scale = float(values.abs().max().clamp(min=1e-3))
        apart = float((got[name][[0, -1]] - values).abs().max()) / scale
        if not apart <= tolerance:
            raise ConsilienceError(
                f"layer {name} is {apart:.1e} of its size away from torch's, {tolerance:.0e} "
                f"allowed"
            )


@dataclass(frozen=True, eq=False)
class _Layered:
    """A network whose pass ends in its layers instead of its scores, for an engine to
    convert.
    """

    network: OpenedNetwork
    names: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    @property
    def digest(self) -> str:
        return f"{self.network.digest} {self.names}"

    def run(self, pixels: Tensor) -> tuple[Tensor, ...]:
        kept: Maps = {}

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                kept[name] = output
                return output.clone()  # what flows on may be overwritten in place

            return hook

        parts = dict(self.network.module.named_modules())
        with hooked([(parts[name], keep(name)) for name in self.names]):
            self.network.run(pixels)
        return tuple(kept[name] for name in self.names)


class _OpenVINO:
    """The converted network, for batches of one size; a shorter batch is filled up."""

    def __init__(
        self, network: OpenedNetwork, names: tuple[str, ...], precision: str
    ) -> None:
        self._names, self._batch, self._lock = names, network.batch, Lock()
        self._forms = [network.anatomy.forms[name] for name in names]
        self._compiled = openvino.openvino_compiled(
            _Layered(network, names), precision
        )
        self.facts = openvino.openvino_facts(self._compiled, network.batch)

    def __call__(self, pixels: Tensor) -> Maps:
        batch = plan.filled_batch(pixels, self._batch).contiguous().numpy()
        with self._lock:
            outputs = self._compiled(batch, share_inputs=True, share_outputs=True)
        raw = [
            torch.from_numpy(outputs[place])[: len(pixels)]
            for place in range(len(self._names))
        ]
        return {
            name: form.as_map(values)
            for name, form, values in zip(self._names, self._forms, raw, strict=True)
        }
