"""Guided backpropagation and the deconvnet: gradients whose way back through ReLUs is
another.

Our own, not a library's: `GuidedReLUs` meets functional, in-place and reused ReLUs, and
ReLU6, without touching a module, where hooks on modules miss the first and are refused
or wrong on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.autograd import Function

from consilience.explainers.gradients import CHANNELS, Channels, reduced
from consilience.explainers.guided import GuidedReLUs, guided_gradients, through
from consilience.registry import explainers, option
from consilience.types import Heat, Network, Target, View


class Deconvolved(Function):
    """A ReLU, with an upper end where it has one, that passes back what is positive,
    wherever its own gate was.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, top: float | None, inplace: bool) -> Tensor:
        """``min(max(given, 0), top)``."""
        if not inplace:
            return given.clamp(0, top)
        ctx.mark_dirty(given)
        return given.clamp_(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """What comes back, where it is positive."""
        return gradients[0].relu(), None, None


class DeconvolvedReLUs(GuidedReLUs):
    """While it is on, every ReLU of this thread is one of a deconvnet."""

    relu: ClassVar[type[Function]] = Deconvolved


def deconvolved(model: Network, pixels: Tensor, target: Target) -> Tensor:
    """The deconvnet's (N, 3, h, w) for pixels (N, 3, h, w); `NotApplicable` where the
    network has no ReLU.
    """
    return through(DeconvolvedReLUs(), model, pixels, target, "a deconvnet")


@explainers.register("guided-backprop")
@dataclass(frozen=True)
class GuidedBackprop:
    """Guided backpropagation (Springenberg et al., ICLR workshop 2015, section 3.4).

    A gradient that goes back through a ReLU only where it is positive and the ReLU's
    input was. It recovers much of the image whatever the weights are (Adebayo et al.
    2018; Nie et al. 2018 prove why): read it beside `edges`. `NotApplicable` where the
    network has no ReLU.
    """

    channels: Channels = option("largest", help=CHANNELS)
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Guided backpropagation"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image."""
        return Heat(
            reduced(guided_gradients(model, view.pixels, target), self.channels)[0],
            facts={"passes": 1},
        )


@explainers.register("deconvnet")
@dataclass(frozen=True)
class DeconvNet:
    """The deconvnet (Zeiler & Fergus, ECCV 2014, section 2.1) as a backward pass
    (Springenberg et al. 2015, figure 1).

    A gradient that goes back through a ReLU wherever it is positive, whatever the ReLU
    did on the way there. Like guided backpropagation it hardly depends on the class
    (Mahendran & Vedaldi 2016). `NotApplicable` where the network has no ReLU.
    """

    channels: Channels = option("largest", help=CHANNELS)
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Deconvnet"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image."""
        return Heat(
            reduced(deconvolved(model, view.pixels, target), self.channels)[0],
            facts={"passes": 1},
        )
