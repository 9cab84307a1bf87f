"""DeepLIFT, by captum on the network written out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from consilience.explainers.canonical import MAXIMA, Canonical, canonical, start
from consilience.explainers.gradients import (
    CHANNELS,
    Channels,
    completeness,
    gap_of,
    reduced,
)
from consilience.explainers.relevance import normalised
from consilience.models.engines import plan
from consilience.perturb.fills import Fill, NeutralFill
from consilience.registry import explainers, option
from consilience.types import (
    ConsilienceError,
    Heat,
    Network,
    NotApplicable,
    Target,
    View,
)

RESCALED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus)
"""Activations that captum has a rule for, and ReLU6, which is written as two of them.
"""


@explainers.register("deeplift")
@dataclass(frozen=True)
class DeepLIFT:
    """DeepLIFT (Shrikumar, Greenside & Kundaje, ICML 2017), the rescale rule (equations
    10 to 12).

    Multipliers take the place of gradients: those of an activation are ``(f(x) - f(x'))
    / (x - x')``, x' what it was given for the ``baseline`` image. Contributions ``m (x
    - x')`` add up to the difference of the two scores (summation to delta, equation 1);
    what is missing is kept as ``completeness_gap``.

    captum's, on the network written out (`canonical`): there it meets no functional,
    reused or in-place activation, which it would treat as a plain gradient or trip
    over. `NotApplicable` names what has no rule, such as attention, SiLU, layer norms,
    products of branches, and max pooling with windows that overlap, where captum's
    contributions do not add up.
    """

    baseline: Fill = option(
        NeutralFill(), kind="fill", help="the image that is compared with"
    )
    channels: Channels = option("sum", help=CHANNELS)
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "module"})
    label: ClassVar[str] = "DeepLIFT"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image, beside its baseline. Facts: what is explained,
        ``completeness_gap`` and its share.
        """
        attribute = _captum()
        prepared, other = normalised(model, view), self._baseline(model, view)
        plan.record_pass("torch", getattr(model, "own_precision", "f32"))
        found = canonical(model, RESCALED, prepared, sums=False)
        start(found, prepared, target)
        pooled = overlapping(found.module)
        if pooled:
            raise NotApplicable(code="deeplift-pooling", pooled=pooled)
        whole = _Scored(found, target)
        with torch.no_grad():
            there, before = (float(whole(one)[0]) for one in (prepared, other))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that hooks are set on the modules, which are a copy
            colours = (
                attribute(whole)
                .attribute(prepared.requires_grad_(), baselines=other)
                .detach()
            )
        facts = completeness(float(colours.double().sum()), there, before)
        return Heat(
            reduced(colours, self.channels)[0], gap_of(facts), {"passes": 1, **facts}
        )

    def _baseline(self, model: Any, view: View) -> Tensor:
        filled = self.baseline.image(view, None).to(view.pixels)
        return model.prepared(filled.to(model.device))  # type: ignore[no-any-return]


def _captum() -> Any:
    try:
        from captum.attr import DeepLift  # type: ignore[import-untyped]
    except ImportError:
        raise ConsilienceError(
            "deeplift needs captum: pip install 'consilience[relevance]'"
        ) from None
    return DeepLift


class _Scored(nn.Module):
    """Images as the network takes them to scores (N,): what captum differentiates."""

    def __init__(self, found: Canonical, target: Target) -> None:
        super().__init__()
        self.found, self.target = found, target
        self.body = found.module

    def forward(self, prepared: Tensor) -> Tensor:
        return self.target.of(self.found.read(self.body(prepared)))


def overlapping(module: nn.Module) -> str:
    """The first max pooling whose windows overlap; empty where there is none."""
    for part in module.modules():
        if isinstance(part, MAXIMA):
            sides, steps = _pair(part.kernel_size), _pair(part.stride)
            if any(side > step for side, step in zip(sides, steps, strict=False)):
                return str(part)
    return ""


def _pair(size: Any) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, tuple | list) else (int(size), int(size))
