"""Layer-wise relevance propagation through transformers: AttnLRP, as a backward pass
with its own rules.

While `Rules` is on, the functions that modules call have the gradient that makes input
times gradient a relevance: the epsilon rule of linear layers (epsilon to 0) is the
gradient itself, and only what is not linear needs a rule. No module is touched. A
function without a rule is refused, so that no relevance is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.explainers.cam import EachOwn
from consilience.models.attention import bias_of, open_body, plan_of
from consilience.models.engines import plan as engines
from consilience.models.layers import borrowed, frozen
from consilience.progress import task
from consilience.registry import explainers, option
from consilience.types import Heat, Network, NotApplicable, Target, View

# ---- rules


class Scaled(Function):
    """The values as they are; what comes back is multiplied with a factor of their
    size, or a number.
    """

    @staticmethod
    def forward(
        ctx: Any, said: Tensor, given: Tensor, factor: Tensor | float
    ) -> Tensor:
        """``said``, as a function of ``given`` whose derivative is ``factor``."""
        ctx.factor = factor
        return said.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """The gradient times the factor."""
        return None, gradients[0] * ctx.factor, None


def scaled(said: Tensor, given: Tensor, factor: Tensor | float) -> Tensor:
    """``said`` with d said / d given set to ``factor``."""
    found: Tensor = Scaled.apply(said.detach(), given, factor)
    return found


def half(given: Tensor) -> Tensor:
    """A factor of a product of two: half of the relevance (the uniform rule, Achtibat
    et al. 2024, proposition 3.3).
    """
    return scaled(given, given, 0.5)


def elementwise(said: Tensor, given: Tensor) -> Tensor:
    """The identity rule (equation 9): all relevance of y goes to x, so the gradient is
    y / x; at 0 there is none to share.
    """
    known = given != 0
    ratio = torch.where(known, said / torch.where(known, given, 1.0), 0.0)
    return scaled(said, given, ratio.detach())


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Proposition 3.4: the deviation is a constant, so that the rest is linear."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dim=axes, keepdim=True)
    return _affine(
        centred
        / (centred.detach().square().mean(dim=axes, keepdim=True) + eps).sqrt(),
        weight,
        bias,
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The same without centring."""
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(
        input / (input.detach().square().mean(dim=axes, keepdim=True) + eps).sqrt(),
        weight,
        None,
    )


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """Proposition 3.4 for a vector divided by its own length, as queries and keys are
    where attention is a cosine.
    """
    length: Tensor = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True)
    return input / length.clamp(min=eps)


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    values = values if weight is None else values * weight
    return values if bias is None else values + bias


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as two products of two, each by the uniform rule; softmax has its own
    gradient (proposition 3.1).
    """
    if enable_gqa:
        key, value = (
            part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3)
            for part in (key, value)
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = bias_of(
        half(query) @ half(key).transpose(-2, -1) * scale, attn_mask, is_causal
    )
    return half(scores.softmax(dim=-1)) @ half(value)


# ---- which function has which


_multi_head = open_body(functional.multi_head_attention_forward)
_WHOLE: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: layer_norm,
    functional.rms_norm: rms_norm,
    functional.normalize: normalize,
    functional.scaled_dot_product_attention: attend,
}
ELEMENTWISE = {
    "gelu",
    "relu",
    "silu",
    "tanh",
    "sigmoid",
    "hardtanh",
    "relu6",
    "leaky_relu",
    "elu",
    "softplus",
    "hardswish",
}
_PRODUCTS = {
    "einsum",
    "matmul",
    "bmm",
    "mul",
    "multiply",
    "__matmul__",
    "__mul__",
    "__rmul__",
}
NO_ARITHMETIC = {
    "__get__",
    "__getitem__",
    "transpose",
    "permute",
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "unbind",
    "chunk",
    "split",
    "expand",
    "expand_as",
    "contiguous",
    "clone",
    "to",
    "float",
    "type_as",
    "detach",
    "size",
    "dim",
    "roll",
    "movedim",
    "repeat",
    "repeat_interleave",
    "select",
    "narrow",
    "index_select",
    "swapaxes",
    "view_as",
    "numel",
    "type",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "pad",
    "masked_fill",
    "max_pool2d",
    "boolean_dispatch",
    "fn",
    "requires_grad",
    "__len__",
    "__format__",
    "_pad",
    "is_complex",
    "__bool__",
    "tensor_split",
    "gather",
    "t",
    "is_nested",
    "new_zeros",
    "zeros_like",
    "zero",
    "reshape_as",
}
_LINEAR = {
    "linear",
    "conv2d",
    "conv1d",
    "add",
    "sub",
    "rsub",
    "neg",
    "div",
    "truediv",
    "__truediv__",
    "__add__",
    "__sub__",
    "__radd__",
    "mean",
    "sum",
    "cat",
    "concat",
    "stack",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool1d",
    "batch_norm",
    "dropout",
    "dropout1d",
    "dropout2d",
    "softmax",
    "embedding",
    *NO_ARITHMETIC,
}


class Rules(TorchFunctionMode):
    """While it is on, input times gradient of what this thread computes is AttnLRP's
    relevance.

    Only what depends on the image may have a gradient. Raises `NotApplicable` at a
    function of such a thing that has no rule.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function with its rule."""
        kwargs = kwargs or {}
        name = name_of(func)
        if func in _WHOLE:
            return _WHOLE[func](*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return _multi_head(*args, **{**kwargs, "need_weights": False})
        if name in ELEMENTWISE:
            return self._elementwise(func, args, kwargs)
        if name in _PRODUCTS:
            return func(*_halved(args), **kwargs)
        if name not in _LINEAR and any(map(_flows, (*args, *kwargs.values()))):
            raise NotApplicable(code="attnlrp-no-rule", name=name)
        if (
            name in ("div", "truediv", "__truediv__")
            and len(args) > 1
            and _flows(args[1])
        ):
            raise NotApplicable(code="attnlrp-division")
        return func(*args, **kwargs)

    def _elementwise(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        given = args[0] if args else kwargs.pop("input")
        return elementwise(
            func(given.detach().clone(), *args[1:], **kwargs), given
        )  # a copy: some work in place


def name_of(func: Callable[..., Any]) -> str:
    """A function's name; what works in place has that of what does not."""
    name = str(getattr(func, "__name__", func))
    return name if name.startswith("__") else name.removesuffix("_")


def _flows(thing: Any) -> bool:
    """It depends on the image: weights are frozen, so nothing else has a gradient."""
    return isinstance(thing, Tensor) and thing.requires_grad


def _halved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Both factors by the uniform rule where both depend on the image."""
    return (
        tuple(half(one) if _flows(one) else one for one in args)
        if sum(map(_flows, args)) > 1
        else args
    )


# ---- the explainer


@explainers.register("attnlrp")
@dataclass(frozen=True)
class AttnLRP:
    """AttnLRP (Achtibat et al., ICML 2024, arXiv 2402.05602, section 3): relevance of
    pixels, colours summed, signed.

    Linear layers by the epsilon rule with epsilon to 0, softmax by its Taylor
    expansion, products of two by the uniform rule, normalisation and activations by the
    identity rule. The root is the image's ``neutral`` colour. The logit is the
    relevance of pixels plus that of biases, embeddings and class token, and of what
    softmax's expansion keeps; ``pixels_share`` says how much of it the pixels have. The
    paper's vision transformers have the gamma rule in linear layers, which is less
    noisy.
    """

    score: Literal["logit"] = option("logit", help="relevance starts at the logit")
    reduce: Literal["sum", "largest"] = option(
        "sum", help="how three colours become one: sum, or largest magnitude"
    )
    attention: ClassVar[bool] = True
    label: ClassVar[str] = "AttnLRP"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers", "module"})

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images, as many a pass as their attentions leave room for."""
        plan = plan_of(model, views[0].pixels)
        size = plan.images(model.batch, getattr(model, "memory", engines.MEMORY))
        heats: list[Heat] = []
        with task("attnlrp", len(views)) as work:
            for start in range(0, len(views), size):
                heats += self._pass(
                    model, views[start : start + size], targets[start : start + size]
                )
                work.advance(len(views[start : start + size]))
        return heats

    def _pass(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        pixels = torch.cat([view.pixels for view in views])
        neutral = torch.tensor([view.neutral for view in views]).to(pixels)[
            :, :, None, None
        ]
        outputs, gradients = lrp_gradients(model, pixels, EachOwn(tuple(targets)))
        relevance = (pixels - neutral) * gradients
        shares = relevance.sum(dim=(1, 2, 3)) / EachOwn(tuple(targets)).of(outputs)
        return [
            self._heat(*pair) for pair in zip(relevance, shares.tolist(), strict=True)
        ]

    def _heat(self, relevance: Tensor, share: float) -> Heat:
        strongest = relevance.abs().argmax(dim=0, keepdim=True)
        values = (
            relevance.sum(dim=0)
            if self.reduce == "sum"
            else relevance.gather(0, strongest)[0]
        )
        return Heat(
            values, facts={"layer": "pixels", "passes": 2, "pixels_share": share}
        )


def check_outputs(
    model: Network, pixels: Tensor, outputs: Tensor, method: str
) -> None:
    """Refuse where the network says something else with the rules on (what is
    overwritten in place and used again).
    """
    with torch.no_grad():
        plain = model.logits(pixels)
    if not torch.allclose(
        outputs, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())
    ):
        raise NotApplicable(
            code="rules-change-outputs", method=method, model=model.id
        )


def lrp_gradients(
    model: Network, pixels: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """Outputs (N, K) and relevance divided by its input, (N, 3, h, w), of pixels (N, 3,
    h, w).
    """
    model.layers()
    leaf = pixels.detach().clone().requires_grad_()
    with borrowed(model.module), frozen(model.module), torch.enable_grad():
        with Rules():
            outputs = model.logits(leaf)
        score = target.of(outputs).sum()
    check_outputs(model, pixels, outputs.detach(), "attnlrp")
    (gradient,) = torch.autograd.grad(score, leaf, allow_unused=True)
    return outputs.detach(), torch.zeros_like(leaf) if gradient is None else gradient
