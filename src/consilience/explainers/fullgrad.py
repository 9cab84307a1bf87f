"""FullGrad: the score as what the image and every bias of the network give to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.explainers.cam import exact
from consilience.images import enlarge
from consilience.registry import explainers, option
from consilience.types import Array, Heat, Network, Target, View

INCOMPLETE_GRADIENT = 0.01
"""A gap of more than this share of the score is said."""

# ---- the explainer


@explainers.register("fullgrad")
@dataclass(frozen=True)
class FullGrad:
    """FullGrad (Srinivas & Fleuret, NeurIPS 2019): input times gradient, and bias times
    gradient of every layer, as one map.

    ``psi(x * df/dx) + sum over layers and channels of psi(b * df/dz)`` (section 4),
    ``psi`` the size, rescaled to [0, 1], enlarged. x is the image as the network takes
    it: less the mean it normalises with. b is the bias of a convolution, what a batch
    norm adds, and for activations other than ReLU their implicit bias ``h(z) - z
    h'(z)``. Biases of vectors are in the sum, but have no place on the map.

    Before psi the terms add up to the score (proposition 1) in networks of such parts;
    what is missing, as where activations are multiplied or layer-normalised, is kept as
    ``completeness_gap``. ``rescale=layer``, by the extremes of a whole layer, is the
    authors' code. ``channel`` is the letter of the paper, and pytorch-grad-cam: a
    channel of tiny terms counts as much as any other. ``none`` adds raw sizes.
    """

    rescale: Literal["layer", "channel", "none"] = option(
        "layer",
        help="over what terms are scaled to [0, 1]: a layer, each channel, or not at all",
    )
    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated; only logits add up"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "module"})
    label: ClassVar[str] = "FullGrad"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image. Extras and facts: ``completeness_gap``, the score less the sum of
        all terms.
        """
        pixels = view.pixels.detach().clone().requires_grad_()
        terms = Terms((pixels.shape[-2], pixels.shape[-1]), self.rescale)
        with torch.enable_grad(), Biases(terms.add):
            score = target.of(model.logits(pixels)).sum()
        gradient = _gradient(score, pixels)
        neutral = torch.tensor(view.neutral).to(pixels)[:, None, None]
        terms.add((pixels.detach() - neutral) * gradient, axis=1)
        return Heat(terms.map, *self._facts(float(score.detach()), terms))

    def _facts(
        self, score: float, terms: Terms
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        gap = score - math.fsum(terms.sums)
        facts: dict[str, Any] = {
            "passes": 1,
            "terms": len(terms.sums),
            "completeness_gap": gap,
        }
        if abs(gap) > INCOMPLETE_GRADIENT * abs(score):
            facts["notes"] = [
                f"the terms add up to {score - gap:.4g} of the score's {score:.4g}: not every "
                f"part is known"
            ]
        return {"completeness_gap": np.array(gap)}, facts


def _gradient(score: Tensor, pixels: Tensor) -> Tensor:
    if not score.requires_grad:
        return torch.zeros_like(pixels)
    (found,) = torch.autograd.grad(score, [pixels], allow_unused=True)
    return torch.zeros_like(pixels) if found is None else found


class Terms:
    """Bias times gradient, layer by layer: the sum of each, and one map of all that
    have a place.
    """

    def __init__(self, frame: tuple[int, int], rescale: str) -> None:
        self.frame, self.rescale = frame, rescale
        self.sums: list[float] = []
        self.map = torch.zeros(frame)

    def add(self, term: Tensor, axis: int) -> None:
        """A layer's term, channels along ``axis``; of four dimensions it has a place on
        the map.
        """
        self.sums.append(float(exact(term).sum()))
        if term.dim() == 4:
            sizes = psi(term.movedim(axis, 1)[0].abs(), self.rescale)
            # Enlarging is linear: one map of the sum, not one a channel.
            self.map = self.map.to(term.device) + enlarge(
                sizes.sum(dim=0), self.frame
            )


def psi(sizes: Tensor, rescale: str) -> Tensor:
    """Sizes (C, h, w) scaled to [0, 1] over the layer or in each channel; what is flat
    becomes 0.
    """
    if rescale == "none":
        return sizes
    dims = (0, 1, 2) if rescale == "layer" else (1, 2)
    low, high = sizes.amin(dim=dims, keepdim=True), sizes.amax(dim=dims, keepdim=True)
    return (sizes - low) / torch.where(high > low, high - low, 1.0)


# ---- finding the biases


class Biases(TorchFunctionMode):
    """While a network runs, hangs a hook on every output that has a bias in it: of
    convolutions, linear layers, batch norms, activations. In the backward pass ``see`` is
    given bias times gradient and the channels' axis; nothing is kept for longer.

    Functions are watched, not modules: what a module does after its batch norm, and
    functional calls, are seen as well. A hook belongs to the value as it was, also
    where it is overwritten afterwards.
    """

    def __init__(self, see: Callable[[Tensor, int], None]) -> None:
        super().__init__()
        self.see, self.axis = see, 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's own result."""
        kwargs = kwargs or {}
        if func in _AFFINE:
            output = func(*args, **kwargs)
            bias, self.axis = _AFFINE[func](output, *args, **kwargs)
            return self._watched(output, bias)
        if func in _ACTIVATIONS:  # channels stand where they stood before
            bias = implicit_bias(func, *args, **kwargs)
            return self._watched(func(*args, **kwargs), bias)
        return func(*args, **kwargs)

    def _watched(self, output: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and output.requires_grad:
            output.register_hook(partial(self._back, bias.detach(), self.axis))  # type: ignore[no-untyped-call]
        return output

    def _back(self, bias: Tensor, axis: int, gradient: Tensor) -> None:
        self.see(gradient.detach() * bias, axis)


def _of_convolution(
    output: Tensor,
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    return None if bias is None else bias.reshape(-1, *[1] * (output.dim() - 2)), 1


def _of_linear(
    output: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    return bias, -1


def _of_batch_norm(
    output: Tensor,
    given: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """In evaluation ``(z - mean) w / s + b``: the bias is b less mean w / s."""
    if training or mean is None or var is None:
        return None, 1
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    whole = (0.0 if bias is None else bias) - mean * scale
    return whole.reshape(-1, *[1] * (output.dim() - 2)), 1


def implicit_bias(
    func: Callable[..., Tensor], given: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``h(z) - z h'(z)``, element by element: what an activation adds to its tangent
    through the origin.
    """
    with torch.enable_grad():
        leaf = given.detach().clone().requires_grad_()
        output = func(
            leaf.clone(), *args, **kwargs
        )  # it may overwrite what it is given
        (slope,) = torch.autograd.grad(output.sum(), [leaf])
    return (output - leaf * slope).detach()


_CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
_AFFINE: dict[Any, Callable[..., Any]] = {
    **{getattr(torch, name): _of_convolution for name in _CONVOLUTIONS},
    functional.linear: _of_linear,
    functional.batch_norm: _of_batch_norm,
}
_CURVES = (
    "relu6",
    "hardtanh",
    "silu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "elu",
    "selu",
    "celu",
    "mish",
    "softplus",
)
_ACTIVATIONS = {
    *(getattr(functional, name) for name in _CURVES),
    *(
        getattr(home, name)
        for home in (torch, Tensor)
        for name in ("sigmoid", "tanh", "clamp")
    ),
    *(getattr(Tensor, name) for name in ("sigmoid_", "tanh_", "clamp_")),
}
"""Without ReLU and leaky ReLU, whose tangents go through the origin.

Products, norms of tokens and softmax are not here.
"""
