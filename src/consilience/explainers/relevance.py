"""Relevance, sent back layer by layer: LRP and excitation backpropagation, by zennit's
rules on the network written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from consilience.explainers.canonical import (
    Canonical,
    MeanPool,
    Resize,
    canonical,
    start,
)
from consilience.models.engines import plan
from consilience.registry import explainers, option
from consilience.types import (
    ConsilienceError,
    Heat,
    Network,
    NotApplicable,
    Target,
    View,
)

MONOTONE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Softsign,
)
"""Activations that keep the sign and the order of what they are given: relevance passes
them as it is.
"""
LOST = 0.01
"""A share of the relevance that is said when it does not arrive."""
EXPLODED = 10.0
"""Relevance that arrives, in units of the outputs, above which its map says nothing."""

Composite = Literal[
    "epsilon-plus-flat",
    "epsilon-plus",
    "epsilon-gamma-box",
    "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat",
]


def zennit() -> Any:
    """zennit's composites and rules, or one line of what to install."""
    try:
        from zennit import composites, rules  # type: ignore[import-untyped]
    except ImportError:
        raise ConsilienceError(
            "this explainer needs zennit: pip install 'consilience[relevance]'"
        ) from None
    return composites, rules


def normalised(model: Any, view: View) -> Tensor:
    """The image as the network takes it."""
    return model.prepared(view.pixels.detach().to(model.device))  # type: ignore[no-any-return]


def extent(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest values that a pixel can have, as the network takes it, (1,
    3, h, w) each.
    """
    return model.prepared(torch.zeros_like(pixels)), model.prepared(
        torch.ones_like(pixels)
    )


def sent_back(
    found: Canonical, composite: Any, prepared: Tensor, relevance: Tensor
) -> Tensor:
    """Relevance of the image's numbers (1, 3, h, w), for ``relevance`` of the outputs."""
    leaf = prepared.detach().clone().requires_grad_()
    with composite.context(found.module) as module, torch.enable_grad():
        (arrived,) = torch.autograd.grad(module(leaf), [leaf], relevance)
    return arrived.detach()


def relevance_heat(
    arrived: Tensor, sent: Tensor, score: float, found: Canonical
) -> Heat:
    """The sum over colours, with what of the relevance arrived.

    Raises `NotApplicable` where it explodes: rules divide by sums, which cancel where
    branches of both signs come together. A score near 0 may be what large terms leave,
    so relevance is compared with the largest output, too.
    """
    whole, reached = float(sent.double().sum()), float(arrived.double().sum())
    size = float(sent.double().abs().sum())
    if not abs(reached) <= EXPLODED * max(size, found.top):
        raise NotApplicable(code="relevance-explodes", reached=reached, whole=whole)
    norms = sum(
        isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
        for part in found.module.modules()
    )
    notes = (
        []
        if not norms
        else [
            f"{norms} batch norms that follow no convolution pass relevance as it is"
        ]
    )
    if abs(whole - reached) > LOST * size:
        notes.append(
            f"{reached:.4g} of {whole:.4g} of relevance arrives at the pixels: biases hold "
            f"the rest, or it is lost"
        )
    share = reached / whole if whole else float("nan")
    facts = {
        "passes": 1,
        "relevance": reached,
        "conservation": share,
        "explained_score": score,
    }
    return Heat(
        arrived.sum(dim=1)[0],
        {"conservation": np.array(share)},
        facts | ({"notes": notes} if notes else {}),
    )


# ---- LRP


@explainers.register("lrp")
@dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation (Bach et al., PLOS ONE 2015), with a rule for
    each kind of layer by ``composite``.

    ``R_j = sum_k z_jk / (sum_j z_jk) R_k``, where ``z_jk`` is what unit j gives to k
    under the rule (Montavon et al. 2019, section 10.2): ``epsilon`` for linear layers
    (``z = a w``, the sum moved by epsilon away from 0); for convolutions ``plus`` (``z
    = a w`` where it is positive), ``alpha2-beta1`` (twice the positive less once the
    negative part) or ``gamma`` (``w + gamma w+``); for the first layer ``flat`` (``z =
    1``) or ``box`` (``z = x w - l w+ - h w-``, the range of pixels l to h).
    epsilon-plus-flat is the usual one for CNNs (Kohlbrenner et al. 2020). Sums and
    poolings share by what they were given; activations pass.

    Rules are zennit's; they run on the network written out (`canonical`), batch norms
    merged and every sum and ReLU a module of its own, or not at all: `NotApplicable`
    names what has no rule, such as attention, layer norms, SiLU, products of branches.
    Relevance starts as the logit. ``conservation`` is the share of it that arrives;
    biases hold the rest unless ``bias=ignored``.
    """

    composite: Composite = option(
        "epsilon-plus-flat", help="which rule for which layer"
    )
    epsilon: float = option(
        1e-6, help="what the sums of linear layers are moved by, away from 0", above=0
    )
    gamma: float = option(
        0.25, help="weight of positive weights (epsilon-gamma-box)", least=0
    )
    bias: Literal["absorbs", "ignored"] = option(
        "absorbs", help="biases take their share of relevance, or none"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "module"})
    label: ClassVar[str] = "LRP"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image; three passes of the copy. Facts: ``conservation``, ``relevance``
        that arrived, ``explained_score``.
        """
        made = self._composite(model, view)
        prepared = normalised(model, view)
        plan.record_pass("torch", getattr(model, "own_precision", "f32"))
        found = canonical(model, MONOTONE, prepared, sums=True)
        given, _, score = start(found, prepared, target)
        return relevance_heat(
            sent_back(found, made, prepared, given), given, score, found
        )

    def _composite(self, model: Network, view: View) -> Any:
        composites, rules = zennit()
        low, high = extent(model, view.pixels.to(model.device))  # type: ignore[attr-defined]
        own: dict[str, Any] = {
            "layer_map": [((MeanPool, Resize), rules.Norm())],
            "epsilon": self.epsilon,
            "zero_params": ["bias"] if self.bias == "ignored" else None,
        }
        kinds: dict[str, Callable[..., Any]] = {
            "epsilon-plus": composites.EpsilonPlus,
            "epsilon-plus-flat": composites.EpsilonPlusFlat,
            "epsilon-alpha2-beta1": composites.EpsilonAlpha2Beta1,
            "epsilon-alpha2-beta1-flat": composites.EpsilonAlpha2Beta1Flat,
            "epsilon-gamma-box": lambda **more: composites.EpsilonGammaBox(
                low, high, gamma=self.gamma, **more
            ),
        }
        return kinds[self.composite](**own)


# ---- excitation backpropagation


@explainers.register("excitation-backprop")
@dataclass(frozen=True)
class ExcitationBackprop:
    """Excitation backpropagation (Zhang et al., ECCV 2016 / IJCV 2018, equation 5): a
    winner drawn at the top, sent down.

    ``P(a_j) = sum_i a_j w_ij+ / (sum_j a_j w_ij+) P(a_i)``: each unit hands its
    probability to the units below that excite it. It starts as 1 at the class; at a
    difference, as 1 and -1, which is the paper's contrast of two classes. Without
    biases. The first convolution, whose inputs may be negative, counts every product
    that is positive, as zennit does.

    The rule is zennit's, on the network written out, as for `lrp`; `NotApplicable`
    names what has no rule.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "module"})
    label: ClassVar[str] = "Excitation backpropagation"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image; three passes of the copy. Facts: ``conservation``, the share of
        the probability that arrives.
        """
        composites, rules = zennit()
        prepared = normalised(model, view)
        plan.record_pass("torch", getattr(model, "own_precision", "f32"))
        found = canonical(model, MONOTONE, prepared, sums=True)
        made = composites.ExcitationBackprop(
            layer_map=[((MeanPool, Resize), rules.Norm())], zero_params=["bias"]
        )
        _, share, score = start(found, prepared, target)
        return relevance_heat(
            sent_back(found, made, prepared, share), share, score, found
        )
