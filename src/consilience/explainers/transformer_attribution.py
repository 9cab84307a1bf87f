"""Transformer attribution: relevance of attention by layer-wise propagation, times its
gradient, multiplied over the layers.

`RelevanceRules` gives the functions that modules call a backward pass that carries
relevance in place of gradients; like `AttnLRP` it touches no module and refuses what it
has no rule for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.explainers.attention import (
    OnAttention,
    chain_of,
    from_layer,
    row_of,
    summed_scores,
)
from consilience.explainers.attention_relevance import (
    ELEMENTWISE,
    NO_ARITHMETIC,
    check_outputs,
    name_of,
)
from consilience.models.attention import (
    AttentionPlan,
    bias_of,
    open_body,
    read_attention,
)
from consilience.models.layers import borrowed, frozen
from consilience.registry import explainers, option
from consilience.types import Network, NotApplicable, Target

BackwardRule = Callable[[Tensor], Sequence[Tensor | None]]

# ---- rules


class Ruled(Function):
    """Values as they are; what comes back is relevance, and a rule says how the inputs
    share it.
    """

    @staticmethod
    def forward(ctx: Any, said: Tensor, rule: BackwardRule, *given: Tensor) -> Tensor:
        """``said``, as a function of ``given``."""
        ctx.rule = rule
        return said.clone()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        """Relevance of each input."""
        return (None, None, *ctx.rule(relevance[0]))


def ruled(said: Tensor, rule: BackwardRule, *given: Tensor) -> Tensor:
    """``said`` with a rule for the relevance of what it was made of."""
    found: Tensor = Ruled.apply(said.detach(), rule, *given)
    return found


def passed(said: Tensor, given: Tensor) -> Tensor:
    """Relevance goes on as it is: softmax, normalisation, activations, multiplication
    with weights.
    """
    return ruled(said, lambda relevance: (relevance,), given)


def share(relevance: Tensor, of: Tensor) -> Tensor:
    """Relevance divided by what it is shared among; none where that is nothing."""
    return torch.where(of != 0, relevance / torch.where(of != 0, of, 1.0), 0.0)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equation 3: what is positive of ``x w`` shares, the bias does not."""
    x, up, down = input.detach(), weight.clamp(min=0), weight.clamp(max=0)
    high, low = x.clamp(min=0), x.clamp(max=0)

    def rule(relevance: Tensor) -> list[Tensor]:
        shared = share(relevance, high @ up.T + low @ down.T)
        return [high * (shared @ up) + low * (shared @ down)]

    return ruled(functional.linear(x, weight, bias), rule, input)


def product(first: Tensor, second: Tensor) -> Tensor:
    """A matrix product: each factor has half of what ``x dz/dx / z`` gives it."""
    one, other = first.detach(), second.detach()
    said = one @ other

    def rule(relevance: Tensor) -> list[Tensor]:
        shared = share(relevance, said) / 2
        return [
            one * (shared @ other.transpose(-2, -1)),
            other * (one.transpose(-2, -1) @ shared),
        ]

    return ruled(said, rule, first, second)


def add(first: Tensor, second: Tensor) -> Tensor:
    """Equations 9 and 10: a sum, shared so that neither part gets more than an image's
    whole by cancelling.
    """
    one, other = first.detach(), second.detach()
    said = one + other

    def rule(relevance: Tensor) -> list[Tensor]:
        parts = [part * share(relevance, said) for part in (one, other)]
        sums = [of_image(part) for part in parts]
        whole = of_image(relevance) / (sums[0].abs() + sums[1].abs()).clamp(min=1e-12)
        return [
            part * share(total.abs() * whole, total)
            for part, total in zip(parts, sums, strict=True)
        ]

    return ruled(said, rule, first, second)


def of_image(values: Tensor) -> Tensor:
    """The sum over everything but the first axis, which it keeps its number of axes
    for.
    """
    return values.sum(dim=tuple(range(1, values.dim())), keepdim=True)


def mean(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """A mean, shared as its terms are."""
    given = input.detach()
    axes = tuple(range(given.dim())) if dim is None else dim
    kept = given.mean(dim=axes, keepdim=True)
    said = given.mean(dim=axes, keepdim=keepdim)
    count = kept.numel() / given.numel()
    return ruled(
        said,
        lambda relevance: [
            given * share(relevance.reshape(kept.shape), kept) * count
        ],
        input,
    )


# ---- the mode

_multi_head = open_body(functional.multi_head_attention_forward)
_PASSED = {
    "layer_norm",
    "rms_norm",
    "dropout",
    "softmax",
    "div",
    "__truediv__",
    "mul",
    "neg",
    *ELEMENTWISE,
}


class RelevanceRules(TorchFunctionMode):
    """While it is on, backward carries relevance, from the first attention on;
    ``nodes`` are the attentions, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function with its rule, where it is given something that has relevance."""
        kwargs, name = kwargs or {}, name_of(func)
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return _multi_head(*args, **{**kwargs, "need_weights": False})
        flowing = [
            one
            for one in (*args, *kwargs.values())
            if isinstance(one, Tensor) and one.requires_grad
        ]
        if not flowing:
            said = func(*args, **kwargs)
            return self.noted(said) if name == "softmax" and said.dim() >= 3 else said
        return self.ruled(func, name, args, kwargs, flowing)

    def ruled(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        flowing: list[Tensor],
    ) -> Any:
        """A function of what has relevance."""
        pair = len(args) == 2 and all(isinstance(one, Tensor) for one in args)
        if name in _RULES and (name not in _PAIRS or pair):
            return _RULES[name](*args, **kwargs)
        if (
            name in ("add", "__add__", "__radd__")
            and pair
            and args[0].shape == args[1].shape
        ):
            return add(*args)
        if name in ("add", "__add__", "__radd__", *_PASSED) and len(flowing) == 1:
            said = passed(
                func(
                    *(_apart(one) for one in args),
                    **{key: _apart(one) for key, one in kwargs.items()},
                ),
                flowing[0],
            )
            return self.noted(said) if name == "softmax" and said.dim() >= 3 else said
        if name not in NO_ARITHMETIC:
            raise NotApplicable(code="attribution-no-rule", name=name)
        return func(*args, **kwargs)

    def noted(self, probabilities: Tensor) -> Tensor:
        """An attention; the first of them is where relevance ends."""
        node = (
            probabilities
            if probabilities.requires_grad
            else probabilities.detach().requires_grad_()
        )
        self.nodes.append(node)
        return node

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention as two products, with what is between passing relevance on."""
        if enable_gqa:
            raise NotApplicable(code="attribution-shared-keys")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        dots = product(query, key.transpose(-2, -1))
        scores = bias_of(dots.detach() * factor, attn_mask, is_causal)
        return product(self.noted(passed(scores.softmax(dim=-1), dots)), value)


def _apart(thing: Any) -> Any:
    return thing.detach().clone() if isinstance(thing, Tensor) else thing


_PAIRS = {"matmul", "__matmul__", "bmm"}
_RULES: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "mean": mean,
    **dict.fromkeys(_PAIRS, product),
}


def relevances(
    model: Network,
    pixels: Tensor,
    targets: Sequence[Target],
    at: Sequence[int],
    plan: AttentionPlan,
) -> list[Tensor]:
    """Relevance (N, heads, T, S) of the attentions ``at``, from 1 at each image's
    target.
    """
    model.layers()
    rules = RelevanceRules()
    with borrowed(model.module), frozen(model.module), torch.enable_grad():
        with rules:
            outputs = model.logits(pixels.detach())
        found = torch.autograd.grad(
            summed_scores(outputs, targets),
            [rules.nodes[one] for one in at],
            allow_unused=True,
        )
    check_outputs(model, pixels, outputs.detach(), "transformer-attribution")
    pairs = zip(at, found, strict=True)
    return [
        torch.zeros_like(rules.nodes[one]) if relevance is None else relevance
        for one, relevance in pairs
    ]


# ---- the explainer


@explainers.register("transformer-attribution")
@dataclass(frozen=True)
class TransformerAttribution(OnAttention):
    """Transformer attribution (Chefer, Gur & Wolf, CVPR 2021, equations 13 and 14).

    The product over the layers of ``I + mean over heads of relu(R * dS/dA)``, R the
    relevance of attention by the paper's propagation (equations 3 to 12), from 1 at the
    class. As the authors' code has it, products of two are halved and sums are shared
    image by image. Attention that pools all tokens at the end is refused.
    """

    start: int = option(0, help="the first layer that counts; negative from the end")
    score: Literal["logit"] = option(
        "logit", help="what is differentiated; relevance starts at the class"
    )
    label: ClassVar[str] = "Transformer attribution (Chefer 2021)"

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """The chain from the first layer that counts."""
        chain = chain_of(plan, model)
        if chain.pool is not None:
            raise NotApplicable(code="attribution-pooling", model=model.id)
        return tuple(from_layer(chain.tokens, self.start))

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """The row of the product, first layer rightmost."""
        used = self.used(plan, model)
        product: Tensor | None = None
        for layer in self._layers(model, pixels, targets, used, plan):
            product = layer if product is None else layer @ product
        assert product is not None
        return row_of(product, plan.places[used[-1]], plan)

    def _layers(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        used: Sequence[int],
        plan: AttentionPlan,
    ) -> Iterator[Tensor]:
        reading = read_attention(model, pixels, plan, graph=True)
        gradients = reading.gradients(summed_scores(reading.outputs, targets), used)
        eye = torch.eye(plan.places[used[0]].keys, device=pixels.device)
        for gradient, relevance in zip(
            gradients, relevances(model, pixels, targets, used, plan), strict=True
        ):
            yield eye + (gradient * relevance.reshape(gradient.shape)).relu().mean(
                dim=1
            )
