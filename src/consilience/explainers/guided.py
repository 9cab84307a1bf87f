"""Guided backpropagation, and Grad-CAM made fine by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.explainers.cam import EachOwn, GradCAM
from consilience.explainers.gradients import reduced
from consilience.images import enlarge
from consilience.registry import explainers, option
from consilience.types import PIXELS, Heat, Network, NotApplicable, Target, View

# ---- guided backpropagation


class Guided(Function):
    """A ReLU, with an upper end where it has one, that passes a gradient back only
    where both it and the input are positive.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, top: float | None, inplace: bool) -> Tensor:
        """``min(max(given, 0), top)``."""
        passes = given > 0
        ctx.save_for_backward(passes if top is None else passes & (given < top))
        if not inplace:
            return given.clamp(0, top)
        ctx.mark_dirty(given)
        return given.clamp_(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """What comes back, where it is positive, through the gate of the way there."""
        (passes,) = ctx.saved_tensors
        return gradients[0].relu() * passes, None, None


class GuidedReLUs(TorchFunctionMode):
    """While it is on, every ReLU of this thread is a guided one: modules, functions and
    methods, in place or not, ReLU6 too.

    No module is touched. ``count`` is how many there were; ``relu`` takes the place of
    each.
    """

    relu: ClassVar[type[Function]] = Guided

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """``relu`` in place of a ReLU; anything else as it is."""
        kwargs = kwargs or {}
        read = _RELUS.get(func)
        settings = None if read is None else read(*args, **kwargs)
        if settings is None:
            return func(*args, **kwargs)
        self.count += 1
        return self.relu.apply(*settings)


Settings = tuple[Tensor, float | None, bool]


def _relu(input: Tensor, inplace: bool = False) -> Settings:
    return input, None, inplace


def _relu_in_place(input: Tensor) -> Settings:
    return input, None, True


def _relu6(input: Tensor, inplace: bool = False) -> Settings:
    return input, 6.0, inplace


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Settings | None:
    """The function behind ``nn.ReLU6``; with another lower end it is no ReLU."""
    return (input, float(max_val), inplace) if min_val == 0 else None


_RELUS: dict[Any, Callable[..., Settings | None]] = {
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_in_place,
    Tensor.relu_: _relu_in_place,
    functional.relu6: _relu6,
    functional.hardtanh: _hardtanh,
}


def guided_gradients(model: Network, pixels: Tensor, target: Target) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR workshop 2015): (N, 3, h, w)
    for pixels (N, 3, h, w).

    Raises `NotApplicable` where the network has no ReLU: there it would be the plain
    gradient under another name.
    """
    return through(GuidedReLUs(), model, pixels, target, "guided backpropagation")


def through(
    relus: GuidedReLUs, model: Network, pixels: Tensor, target: Target, what: str
) -> Tensor:
    """Gradients (N, 3, h, w) that go back through ReLUs of another kind;
    `NotApplicable` where there is none.
    """
    with relus:
        gradients = model.trace(pixels, [PIXELS], target).gradients[PIXELS]
    if not relus.count:
        raise NotApplicable(code="no-relus", what=what, model=model.id)
    return gradients


# ---- the explainer


@explainers.register("guided-gradcam")
@dataclass(frozen=True)
class GuidedGradCAM(GradCAM):
    """Guided Grad-CAM (Selvaraju et al., ICCV 2017, section 3.3): guided
    backpropagation times the enlarged Grad-CAM map.

    The product has three colours; ``reduce`` says how they become one map: the
    ``largest`` magnitude, or their signed ``sum``. Guided backpropagation recovers much
    of the image whatever the weights are (Adebayo et al. 2018): read it beside `edges`.
    """

    reduce: Literal["largest", "sum"] = option(
        "largest", help="how three colours become one: largest magnitude, or sum"
    )
    label: ClassVar[str] = "Guided Grad-CAM"

    def _pass(
        self,
        model: Network,
        layers: Sequence[str],
        views: Sequence[View],
        targets: Sequence[Target],
    ) -> list[Heat]:
        coarse = super()._pass(model, layers, views, targets)
        pixels = torch.cat([view.pixels for view in views])
        gradients = guided_gradients(model, pixels, EachOwn(tuple(targets)))
        maps = torch.stack(
            [
                enlarge(heat.values, (pixels.shape[-2], pixels.shape[-1]))
                for heat in coarse
            ]
        )
        values = reduced(gradients * maps.unsqueeze(1), self.reduce)
        return [
            replace(heat, values=row, facts={**heat.facts, "passes": 2})
            for heat, row in zip(coarse, values, strict=True)
        ]
