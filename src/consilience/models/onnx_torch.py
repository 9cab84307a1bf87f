"""ONNX files opened as torch networks, for class activation maps and gradients: by
onnx2torch (extra ``onnx``), and only where torch then says what the file says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from consilience.models.callable import BlackBox, trial_images
from consilience.models.engines import runner
from consilience.models.network import TorchNetwork, relative_change
from consilience.types import ConsilienceError, unexpected

SAME = 1e-4
"""Outputs of noise that differ by less of their size are the same: float32 sums of a
hundred layers in another order.
"""


@dataclass(frozen=True, eq=False, repr=False)
class OnnxNetwork(TorchNetwork):
    """An ONNX file that scores by its own runtime, and whose layers and gradients are
    torch's.
    """

    box: BlackBox | None = None

    @property
    def digest(self) -> str:
        """Of the file."""
        return self._box.digest

    @property
    def _box(self) -> BlackBox:
        if self.box is None:
            raise ConsilienceError(f"{self.name} has no file that scores")
        return self.box

    @property
    def facts(self) -> dict[str, Any]:
        """What scores; gradients and layers run in torch."""
        return {**self._box.facts, "opened": "by onnx2torch"}

    @property
    def batch(self) -> int:
        """How many images a pass of the file takes."""
        return self._box.batch

    def scores(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) in [0, 1] to (N, K) by the file's own runtime."""
        return self._box.scores(pixels)

    def with_module(self, module: nn.Module) -> TorchNetwork:
        """Another module in the same frame, which scores by itself: the file does not
        know it.
        """
        own = {item.name: getattr(self, item.name) for item in fields(TorchNetwork)}
        plain = TorchNetwork(**{**own, "_runner": runner.Runner()})
        return plain.with_module(module)

    def using(self, *given: Any, **changed: Any) -> TorchNetwork:
        """The same on another device; its engine and precision are the file's."""
        box = self._box.using(*given, **changed)
        return replace(self, box=box, memory=box.memory)


class ChannelsLast(nn.Module):
    """A network that takes images with their channels last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Any:
        """What it returns for (N, C, h, w)."""
        return self.network(pixels.permute(0, 2, 3, 1).contiguous())


def opened_onnx(box: BlackBox, file: str, layout: str) -> tuple[Any, str]:
    """The file as a torch network, or the black box itself and why it is not opened."""
    try:
        import onnx
        from onnx2torch import convert
    except ImportError:
        return box, "no layers or gradients: pip install 'consilience[onnx]'"
    try:
        module = convert(onnx.load(file)).float().eval()
        if layout == "nhwc":
            module = ChannelsLast(module)
        network = OnnxNetwork(
            module,
            box.recipe,
            box.classes,
            box.outputs,
            box.name,
            box.spec,
            str(box.known.get("weights", file)),
            box.mode,
            engine="torch",
            memory=box.memory,
            assumed=str(box.known.get("assumed", "")),
            complement=box.complement,
            box=box,
        )
        noise = trial_images(box.recipe.size, box.channels)
        with torch.no_grad():
            apart = relative_change(box.scores(noise), network.logits(noise))
            _ = network.anatomy
    except Exception as error:  # a converter trips over whatever it does not know
        return box, f"no layers or gradients: not converted ({unexpected(error)})"
    if not apart <= SAME:
        said = f"its outputs in torch are {apart:.1e} of their size away"
        return box, f"no layers or gradients: {said}"
    return network, ""
