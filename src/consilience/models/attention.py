"""Reading attention from a network: the probabilities of every attention of a pass, as
nodes of its graph.

Fused kernels never form them, so while `Attentions` is on, attention is computed step
by step instead. It works on the functions that modules call, so no module is touched
and families need not be known by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.models.layers import (
    MOST_PREFIX_TOKENS,
    Form,
    GridShape,
    borrowed,
    hooked,
    watched_parts,
)
from consilience.types import ConsilienceError, Network, NotApplicable

Function = Callable[..., Any]
Keep = Callable[[Tensor], None]
COPIES = 6
"""Arrays of the size of one attention that are alive in a pass with its gradient:
scores, probabilities, what softmax keeps, the gradients of these, and what is
returned.
"""
_plans: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], AttentionPlan]] = (
    WeakKeyDictionary()
)
_guard = Lock()


# ---- the mode


def open_body(function: Function) -> Function:
    """A Python function of torch that offers each call to a mode, as one that does not
    offer itself, only what it calls.
    """
    opened = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copy = FunctionType(
        function.__code__,
        opened,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_body = open_body(functional.multi_head_attention_forward)


def bias_of(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (..., T, S) with a mask added (float) or applied (bool: true is kept), and
    none of the future if ``causal``.
    """
    if causal:
        ahead = torch.ones(
            scores.shape[-2:], dtype=torch.bool, device=scores.device
        ).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if mask is None:
        return scores
    return (
        scores.masked_fill(~mask, -math.inf)
        if mask.dtype == torch.bool
        else scores + mask
    )


class Attentions(TorchFunctionMode):
    """While it is on, ``keep`` is given the probabilities (..., heads, T, S) of every
    attention of this thread, in order.

    They are part of the graph: what follows depends on the tensor that was kept.
    Covered are ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` (whose fast
    path has no place for a mode and is not taken) and a softmax over the last axis of
    three axes or more. With ``graph`` the first of them starts a graph if none is
    there.
    """

    def __init__(self, keep: Keep, graph: bool = False) -> None:
        super().__init__()
        self.keep, self.graph = keep, graph

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attention step by step in place of attention; anything else as it is."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        said = func(*args, **kwargs)
        return (
            self.noted(said)
            if func in _SOFTMAXES and _over_last(said, *args, **kwargs)
            else said
        )

    def noted(self, probabilities: Tensor) -> Tensor:
        """What flows on: a copy, so that nothing overwrites what is kept."""
        if self.graph and not probabilities.requires_grad:
            probabilities = probabilities.detach().requires_grad_()
        self.keep(probabilities)
        return probabilities.clone()

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
        """Scaled dot-product attention as its definition reads: ``softmax(q k^T scale +
        mask) v``.
        """
        if enable_gqa:
            key, value = (
                part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3)
                for part in (key, value)
            )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = bias_of(query @ key.transpose(-2, -1) * scale, attn_mask, is_causal)
        return (
            functional.dropout(self.noted(scores.softmax(dim=-1)), dropout_p) @ value
        )

    def multi_head(
        self,
        *args: Any,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        **kwargs: Any,
    ) -> Any:
        """``functional.multi_head_attention_forward`` through `attend`; weights, where
        asked for, are those it kept.
        """
        found: list[Tensor] = []
        keep, self.keep = self.keep, found.append
        try:
            with self:
                said, _ = _multi_head_body(*args, **kwargs, need_weights=False)
        finally:
            self.keep = keep
        for probabilities in found:
            self.keep(probabilities)
        if not need_weights:
            return said, None
        return said, found[-1].mean(dim=-3) if average_attn_weights else found[-1]


_SOFTMAXES = {
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.special.softmax,
}


def _over_last(
    said: Tensor, _given: Any = None, dim: int | None = None, *_: Any, **kwargs: Any
) -> bool:
    axis = kwargs.get("axis", dim)
    return said.dim() >= 3 and axis in (-1, said.dim() - 1)


# ---- what there is


@dataclass(frozen=True)
class AttentionPlace:
    """One attention of a network: the ``module`` it runs in, the ``block`` it belongs
    to, and its shape for one image.

    ``block`` is the outermost module that holds no other attention. ``windows`` counts
    the groups of tokens that look only at each other: 1 for global attention.
    """

    module: str
    block: str
    heads: int
    queries: int
    keys: int
    windows: int = 1

    @property
    def whole(self) -> bool:
        """Every token looks at every token."""
        return self.windows == 1 and self.queries == self.keys

    @property
    def size(self) -> int:
        """Numbers that it holds for one image."""
        return self.windows * self.heads * self.queries * self.keys


@dataclass(frozen=True)
class AttentionPlan:
    """The attentions of a network in forward order, and which query tokens of the last
    one the outputs depend on.
    """

    places: tuple[AttentionPlace, ...]
    rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers that all of them hold for one image."""
        return sum(place.size for place in self.places)

    def images(self, most: int, memory: int) -> int:
        """Images a pass: no more than ``most``, nor than ``memory`` bytes allow with
        gradients.
        """
        return max(1, min(most, memory // max(1, 4 * COPIES * self.size)))


def plan_of(model: Network, pixels: Tensor) -> AttentionPlan:
    """What one pass of the first image of (N, 3, h, w) shows; kept for the module and
    the size of the image.

    Raises `NotApplicable` where the network has no attention.
    """
    key = tuple(pixels.shape[1:])
    with _guard:
        known = _plans.setdefault(model.module, {})
    if key not in known:
        known[key] = _survey(model, pixels[:1])
    return known[key]


def _survey(model: Network, pixels: Tensor) -> AttentionPlan:
    found: list[tuple[str, Tensor]] = []
    with (
        borrowed(model.module),
        named_calls(model.module) as inside,
        torch.enable_grad(),
    ):
        outputs = _run(
            model,
            pixels,
            lambda tensor: found.append((inside[-1] if inside else "", tensor)),
            graph=True,
        )
    if not found:
        raise NotApplicable(code="no-attention", model=model.id)
    blocks = blocks_of([name for name, _ in found])
    pairs = zip(found, blocks, strict=True)
    places = tuple(
        _place(name, block, tuple(tensor.shape)) for (name, tensor), block in pairs
    )
    return AttentionPlan(places, read_rows(outputs, found[-1][1]))


def _run(model: Network, pixels: Tensor, keep: Keep, graph: bool) -> Tensor:
    model.layers()  # what a model finds out by a pass of its own is known before attentions are counted
    with Attentions(keep, graph):
        return model.logits(pixels.detach())


@contextmanager
def named_calls(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, outermost first, while a pass goes
    through.
    """
    inside: list[str] = []
    parts = watched_parts(module)
    enter = [
        part.register_forward_pre_hook(_entering(inside, name))
        for name, part in parts
    ]
    try:
        with hooked(
            [
                (part, lambda _part, _given, _said: _nothing(inside.pop()))
                for _, part in parts
            ]
        ):
            yield inside
    finally:
        for handle in enter:
            handle.remove()


def _entering(inside: list[str], name: str) -> Function:
    return lambda _part, _given: _nothing(inside.append(name))  # type: ignore[func-returns-value]


def _nothing(_: object) -> None:
    """Nothing: what a hook returns that changes nothing."""


def blocks_of(names: Sequence[str]) -> list[str]:
    """For each attention's module the outermost module that holds no other attention.

    >>> blocks_of(["blocks.0.attn", "blocks.1.attn"])
    ['blocks.0', 'blocks.1']
    """
    return [
        _block(name, [*names[:at], *names[at + 1 :]]) for at, name in enumerate(names)
    ]


def _block(name: str, others: Sequence[str]) -> str:
    steps = name.split(".")
    above = [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
    alone = [
        top
        for top in above
        if not any(f"{other}.".startswith(f"{top}.") for other in others)
    ]
    return alone[0] if alone else name


def _place(name: str, block: str, shape: tuple[int, ...]) -> AttentionPlace:
    heads = shape[-3] if len(shape) > 3 else 1
    return AttentionPlace(
        name,
        block,
        heads,
        shape[-2],
        shape[-1],
        math.prod(shape[:-3]) if len(shape) > 3 else shape[0],
    )


def read_rows(outputs: Tensor, probabilities: Tensor) -> tuple[int, ...]:
    """Query tokens of the last attention that the outputs depend on: the class token
    alone, the patches, or all.

    A gradient of NaN goes through every connection whatever the weights and leaves
    exact zeros elsewhere.
    """
    if not outputs.requires_grad:
        return tuple(range(probabilities.shape[-2]))
    (sent,) = torch.autograd.grad(
        outputs, probabilities, torch.full_like(outputs, math.nan), allow_unused=True
    )
    if sent is None:
        return tuple(range(probabilities.shape[-2]))
    reached = sent.isnan().transpose(-2, 0).flatten(1).any(dim=1)
    return tuple(int(row) for row in reached.nonzero().flatten())


def form_of_tokens(model: Network, tokens: int) -> Form | None:
    """How ``tokens`` keys stand on a grid: the network's own, after class and register
    tokens; None where they do not.
    """
    for kind in ("tokens", "map"):
        grids: list[GridShape] = [
            layer.spatial
            for layer in model.layers()
            if layer.kind == kind and layer.spatial is not None
        ]
        for height, width in reversed(grids):
            prefix = tokens - height * width
            if min(height, width) > 1 and 0 <= prefix <= MOST_PREFIX_TOKENS:
                return Form("tokens", 1, (height, width), prefix)
    return None


# ---- reading


@dataclass(frozen=True, eq=False)
class AttentionReading:
    """One pass: outputs (N, K) and the attentions as they flowed, one a place."""

    outputs: Tensor
    nodes: tuple[Tensor, ...]
    places: tuple[AttentionPlace, ...]

    def values(self, at: int) -> Tensor:
        """Probabilities (N, heads, T, S) of one place, without a graph; of a windowed
        one (N windows, heads, T, S).
        """
        return self._shaped(self.nodes[at].detach(), at)

    def gradients(
        self, score: Tensor, at: Sequence[int], retain: bool = False
    ) -> list[Tensor]:
        """d(score)/d(probabilities) of some places, each (N, heads, T, S); zero where
        the score does not depend on them.
        """
        if not score.requires_grad:
            raise ConsilienceError(
                "no gradient of the outputs reaches the attention: the forward pass cuts it "
                "(no_grad, inference_mode, detach, or a part without gradients)"
            )
        wanted = [self.nodes[one] for one in at]
        found = torch.autograd.grad(
            score, wanted, retain_graph=retain, allow_unused=True
        )
        whole = [
            torch.zeros_like(node) if grad is None else grad
            for node, grad in zip(wanted, found, strict=True)
        ]
        return [self._shaped(grad, one) for grad, one in zip(whole, at, strict=True)]

    def _shaped(self, values: Tensor, at: int) -> Tensor:
        place = self.places[at]
        return values.reshape(-1, place.heads, place.queries, place.keys)


def read_attention(
    model: Network, pixels: Tensor, plan: AttentionPlan, graph: bool = False
) -> AttentionReading:
    """Every attention of pixels (N, 3, h, w); with ``graph`` the outputs' gradients
    with respect to each can be had.

    Memory: `Plan.images` says how many images fit.
    """
    found: list[Tensor] = []
    with torch.set_grad_enabled(graph):
        outputs = _run(model, pixels, found.append, graph)
    if len(found) != len(plan.places):
        raise NotApplicable(
            code="attention-changed",
            model=model.id,
            count=len(found),
            before=len(plan.places),
        )
    return AttentionReading(outputs, tuple(found), plan.places)
