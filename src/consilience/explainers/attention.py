"""What a transformer's attention says: raw, rolled out over the layers, and weighted
with gradients.

Attentions are (N, heads, T, S), queries by keys, in forward order
(`consilience.models.attention`). Every method gives a relevance of the key tokens (N,
S); class and register tokens are dropped and the rest stand on their grid. Read it from
the query tokens that the outputs depend on: the class token, the class and the
distillation token, or all patches on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.explainers.cam import EachOwn
from consilience.models.attention import (
    AttentionPlace,
    AttentionPlan,
    AttentionReading,
    form_of_tokens,
    plan_of,
    read_attention,
)
from consilience.models.engines import plan as engines
from consilience.models.layers import borrowed, hooked
from consilience.progress import task
from consilience.registry import explainers, option, unknown
from consilience.types import (
    ConsilienceError,
    Heat,
    Network,
    NotApplicable,
    Target,
    View,
)

Heads = Literal["mean", "max", "min"]


# ---- heads, rows, places


def over_heads(attention: Tensor, how: Heads | int) -> Tensor:
    """(N, heads, T, S) to (N, T, S): mean, largest or smallest of the heads, or one of
    them.
    """
    if isinstance(how, int):
        if not -attention.shape[1] <= how < attention.shape[1]:
            raise ConsilienceError(
                f"heads={how}: there are {attention.shape[1]} heads, counted from 0"
            )
        return attention[:, how]
    if how == "mean":
        return attention.mean(dim=1)
    return attention.amax(dim=1) if how == "max" else attention.amin(dim=1)


def row_of(matrix: Tensor, place: AttentionPlace, plan: AttentionPlan) -> Tensor:
    """(N, T, S) to (N, S): the mean over the query tokens that the outputs depend on,
    over all where those are others.
    """
    read_by = (
        list(plan.rows)
        if place.queries == plan.places[-1].queries
        else list(range(place.queries))
    )
    return matrix[:, read_by].mean(dim=1)


def place_called(plan: AttentionPlan, name: str, model: Network) -> int:
    """Index of the attention that ``layer`` names: ``last``, a number (negative from
    the end), a block or a module.
    """
    if name == "last":
        return len(plan.places) - 1
    if name.lstrip("-").isdigit() and -len(plan.places) <= int(name) < len(
        plan.places
    ):
        return int(name) % len(plan.places)
    named = [
        at
        for at, place in enumerate(plan.places)
        if name in (place.block, place.module)
    ]
    if len(named) == 1:
        return named[0]
    if named:
        raise ConsilienceError(
            f"layer {name!r} holds {len(named)} attentions: give a number of 0 to "
            f"{len(plan.places) - 1}"
        )
    known = [
        "last",
        f"0 to {len(plan.places) - 1}",
        *[place.block for place in plan.places],
    ]
    raise ConsilienceError(unknown(f"attention of {model.id}", name, known, limit=20))


@dataclass(frozen=True)
class Chain:
    """Self-attentions of all tokens that follow each other, and the attention that
    pools them, where there is one.
    """

    tokens: tuple[int, ...]
    pool: int | None


def chain_of(plan: AttentionPlan, model: Network) -> Chain:
    """The chain of a network; `NotApplicable` where attention runs in windows, or the
    tokens do not stay the same.
    """
    places = plan.places
    windowed = next((place for place in places if place.windows > 1), None)
    if windowed is not None:
        groups = f"{windowed.windows} groups of {windowed.keys} tokens"
        raise NotApplicable(
            code="attention-windowed",
            model=model.id,
            module=windowed.module,
            groups=groups,
        )
    pool = None if places[-1].whole else len(places) - 1
    tokens = tuple(at for at in range(len(places)) if at != pool)
    sizes = {(place.queries, place.keys) for place in (places[at] for at in tokens)}
    if pool is not None and tokens:
        sizes.add((places[pool].keys, places[pool].keys))
    if len(sizes) != 1 or not tokens or not places[tokens[0]].whole:
        found = ", ".join(
            f"{queries} x {keys}" for queries, keys in sorted(sizes, reverse=True)
        )
        raise NotApplicable(code="attention-mixed", model=model.id, found=found)
    return Chain(tokens, pool)


# ---- what the methods share


@dataclass(frozen=True)
class OnAttention:
    """A relevance of tokens, read from attention; a method gives `rows`."""

    attention: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers", "module"})

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """Relevance (N, S) of the key tokens of pixels (N, 3, h, w)."""
        raise NotImplementedError

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """Indices of the attentions that the map comes from."""
        return tuple(range(len(plan.places)))

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
        with task("attention", len(views)) as work:
            for start in range(0, len(views), size):
                part = slice(start, start + size)
                pixels = torch.cat([view.pixels for view in views[part]])
                heats += self._heats(
                    self.rows(model, pixels, targets[part], plan), plan, model
                )
                work.advance(len(pixels))
        return heats

    def _heats(self, rows: Tensor, plan: AttentionPlan, model: Network) -> list[Heat]:
        """Rows (N, S) on the grid of their tokens."""
        used = [plan.places[at].block for at in self.used(plan, model)]
        form = form_of_tokens(model, rows.shape[1])
        if form is None:
            raise NotApplicable(
                code="attention-off-grid",
                name=used[-1],
                model=model.id,
                tokens=rows.shape[1],
            )
        maps = form.as_map(rows.detach().float().unsqueeze(-1)).squeeze(1)
        layer = used[0] if len(used) == 1 else f"{used[0]} to {used[-1]}"
        facts = {"layer": layer, "grid": {layer: list(maps.shape[-2:])}, "passes": 1}
        return [
            Heat(
                one,
                facts={
                    **facts,
                    "dropped_tokens": form.prefix,
                    "read_from": list(plan.rows),
                },
            )
            for one in maps
        ]


# ---- without gradients


@explainers.register("attention")
@dataclass(frozen=True)
class RawAttention(OnAttention):
    """Raw attention of one layer (as in Caron et al., ICCV 2021, section 4.2.2): how
    much the class token looks at each patch.

    Without a class token the mean over the patches that the outputs depend on. It says
    where information is mixed, for no class in particular: the map is the same for
    every target (Jain & Wallace, NAACL 2019: attention is not explanation). Of windowed
    transformers only layers whose window is the whole grid can be had.
    """

    layer: str = option(
        "last",
        help="last, a number from 0 (negative from the end), or the name of a block",
    )
    heads: Heads | int = option(
        "mean", help="mean, max or min of the heads, or the number of one"
    )
    label: ClassVar[str] = "Attention"

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """The row of the tokens that are read."""
        at = self.used(plan, model)[0]
        place = plan.places[at]
        if place.windows > 1:
            why = f"looks at {place.keys} tokens in each of {place.windows} groups, so no token sees the whole image"
            raise NotApplicable(
                code="attention-refused", module=place.module, why=why
            )
        return row_of(
            over_heads(read_attention(model, pixels, plan).values(at), self.heads),
            place,
            plan,
        )

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """The one layer."""
        return (place_called(plan, self.layer, model),)


def without_lowest(matrix: Tensor, share: float) -> Tensor:
    """(N, T, S) with this share of its smallest entries, image by image, set to 0; of
    equal ones those that come first.
    """
    flat = matrix.flatten(1)
    lowest = flat.argsort(dim=1, stable=True)[:, : int(flat.shape[1] * share)]
    return flat.scatter(1, lowest, 0.0).view_as(matrix)


def mixed(matrix: Tensor, residual: float) -> Tensor:
    """(N, T, T) with the identity mixed in, for what goes past the attention, rows
    summing to 1 (0 where there is nothing).
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    whole = (1 - residual) * matrix + residual * eye
    total = whole.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, whole / torch.where(total > 0, total, 1.0), 0.0)


@dataclass(frozen=True)
class Rolled(OnAttention):
    """Products of the layers' matrices, from the first to ``layer``; a method gives
    `matrix`.
    """

    layer: str = option(
        "last",
        help="the last layer of the product: last, a number from 0, or the name of a block",
    )
    discard: float = option(
        0.0,
        help="share of a layer's smallest entries that are set to 0 first",
        least=0,
        below=1,
    )
    residual: float = option(
        0.5,
        help="weight of the identity, for what goes past the attention",
        least=0,
        below=1,
    )
    graph: ClassVar[bool] = False

    def matrices(
        self, reading: AttentionReading, at: Sequence[int], targets: Sequence[Target]
    ) -> Iterator[Tensor]:
        """Matrices (N, T, S) of the places ``at``, heads fused."""
        raise NotImplementedError

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """The chain up to the layer."""
        last, chain = place_called(plan, self.layer, model), chain_of(plan, model)
        pool = () if chain.pool is None or last < chain.pool else (chain.pool,)
        return tuple(at for at in chain.tokens if at <= last) + pool

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """The row of the product, first layer rightmost."""
        used = self.used(plan, model)
        matrices = self.matrices(
            read_attention(model, pixels, plan, graph=self.graph), used, targets
        )
        product: Tensor | None = None
        for at, found in zip(used, matrices, strict=True):
            cut = without_lowest(found, self.discard)
            layer = mixed(cut, self.residual) if plan.places[at].whole else cut
            product = layer if product is None else layer @ product
        if product is None:
            raise NotApplicable(
                code="no-attention-up-to", model=model.id, layer=self.layer
            )
        return row_of(product, plan.places[used[-1]], plan)


@explainers.register("rollout")
@dataclass(frozen=True)
class Rollout(Rolled):
    """Attention rollout (Abnar & Zuidema, ACL 2020, section 4): the layers' ``0.5 A +
    0.5 I`` multiplied, heads averaged.

    ``heads=max`` or ``min`` and ``discard`` are Gildenblat's variants (vit-explain). It
    is the same for every target.
    """

    heads: Heads | int = option(
        "mean", help="mean, max or min of the heads, or the number of one"
    )
    label: ClassVar[str] = "Attention rollout"

    def matrices(
        self, reading: AttentionReading, at: Sequence[int], targets: Sequence[Target]
    ) -> Iterator[Tensor]:
        """Attention with its heads fused."""
        return (over_heads(reading.values(one), self.heads) for one in at)


# ---- with gradients


def summed_scores(outputs: Tensor, targets: Sequence[Target]) -> Tensor:
    """The sum of the scores of outputs (N, K), row i by target i, with a graph whatever
    the mode outside.
    """
    with torch.enable_grad():
        return EachOwn(tuple(targets)).of(outputs).sum()


@explainers.register("gradient-rollout")
@dataclass(frozen=True)
class GradientRollout(Rolled):
    """Gradient attention rollout (Gildenblat 2020, vit-explain): rollout of ``relu(mean
    over heads of A * dS/dA)``.

    It has no paper. vit-explain divides columns by the sums of rows; here rows are
    divided, so that they sum to 1 as rollout's do.
    """

    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated"
    )
    label: ClassVar[str] = "Gradient attention rollout"
    graph: ClassVar[bool] = True

    def matrices(
        self, reading: AttentionReading, at: Sequence[int], targets: Sequence[Target]
    ) -> Iterator[Tensor]:
        """Attention times its gradient, heads averaged, positive part."""
        gradients = reading.gradients(summed_scores(reading.outputs, targets), at)
        return (
            (reading.values(one) * grad).mean(dim=1).relu()
            for one, grad in zip(at, gradients, strict=True)
        )


@explainers.register("generic-attention")
@dataclass(frozen=True)
class GenericAttention(OnAttention):
    """Generic attention explainability (Chefer, Gur & Wolf, ICCV 2021, equations 5 and
    6).

    ``R <- R + Abar R`` over the layers from ``R = I``, with ``Abar`` the mean over
    heads of ``relu(A * dS/dA)``. Attention that pools all tokens at the end (equation
    10) gives ``Abar R``. Without a class token the identity adds the same to every
    patch.
    """

    start: int = option(0, help="the first layer that counts; negative from the end")
    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated"
    )
    label: ClassVar[str] = "Generic attention (Chefer 2021)"

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """The chain from the first layer that counts."""
        chain = chain_of(plan, model)
        return tuple(from_layer(chain.tokens, self.start)) + (
            () if chain.pool is None else (chain.pool,)
        )

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """The row of R."""
        used = self.used(plan, model)
        reading = read_attention(model, pixels, plan, graph=True)
        gradients = reading.gradients(summed_scores(reading.outputs, targets), used)
        first = reading.values(used[0])
        relevance = torch.eye(
            first.shape[-1], dtype=first.dtype, device=first.device
        ).expand(len(first), -1, -1)
        for at, gradient in zip(used, gradients, strict=True):
            step = (reading.values(at) * gradient).relu().mean(dim=1) @ relevance
            relevance = relevance + step if plan.places[at].whole else step
        return row_of(relevance, plan.places[used[-1]], plan)


def from_layer(layers: Sequence[int], start: int) -> Sequence[int]:
    """The layers from ``start`` on, which may count from the end."""
    if not -len(layers) <= start < len(layers):
        raise ConsilienceError(
            f"start={start}: there are {len(layers)} layers of attention, counted from 0"
        )
    return layers[start:]


# ---- LeGrad


@contextmanager
def every_block_to_the_head(
    model: Network, blocks: Sequence[str], kept: list[Tensor]
) -> Iterator[None]:
    """The rest of the network after the last of ``blocks`` is shown the tokens of all
    of them, as a batch of as many.

    Their outputs (N, T, D) are kept in ``kept``, in order; the network's outputs are
    then (blocks x N, K). `NotApplicable` where a block does not take what the one
    before returned: then its tokens are not what the rest is made for.
    """
    parts = dict(model.module.named_modules())

    def keep(_part: Any, given: tuple[Any, ...], said: Any) -> Any:
        taken = given[0] if given else None
        if not isinstance(said, Tensor) or (
            kept and not (isinstance(taken, Tensor) and torch.equal(taken, kept[-1]))
        ):
            raise NotApplicable(code="legrad-blocks", model=model.id)
        kept.append(said)
        return torch.cat(kept) if len(kept) == len(blocks) else None

    with borrowed(model.module), hooked([(parts[name], keep) for name in blocks]):
        yield


@explainers.register("legrad")
@dataclass(frozen=True)
class LeGrad(OnAttention):
    """LeGrad (Bousselham et al., ICCV 2025, arXiv 2404.03214): how each block's
    attention moves the score of its own tokens.

    Every block's output goes through the network's own rest (norm, pooling, head) to a
    score ``s_l``; the map is the mean over heads, query tokens and blocks of
    ``relu(ds_l / dA_l)``. Where attention pools all tokens, A is that attention. The
    score is the head's, for which only the last block's tokens were made. The paper's
    scaling to [0, 1] is left to drawing.
    """

    start: int = option(0, help="the first block that counts; negative from the end")
    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated"
    )
    label: ClassVar[str] = "LeGrad"

    def used(self, plan: AttentionPlan, model: Network) -> tuple[int, ...]:
        """The blocks that count."""
        return tuple(from_layer(chain_of(plan, model).tokens, self.start))

    def rows(
        self,
        model: Network,
        pixels: Tensor,
        targets: Sequence[Target],
        plan: AttentionPlan,
    ) -> Tensor:
        """Mean positive gradients over heads, queries and blocks."""
        used, pool = self.used(plan, model), chain_of(plan, model).pool
        kept: list[Tensor] = []
        with every_block_to_the_head(
            model, [plan.places[at].block for at in used], kept
        ):
            reading = read_attention(model, pixels, plan, graph=True)
        if len(reading.outputs) != len(used) * len(pixels):
            raise NotApplicable(code="legrad-head", model=model.id)
        if pool is not None:
            gradient = reading.gradients(
                summed_scores(reading.outputs, [*targets] * len(used)), [pool]
            )[0]
            rows = row_of(gradient.relu().mean(dim=1), plan.places[pool], plan)
            return rows.reshape(len(used), len(pixels), -1).mean(dim=0)
        return torch.stack(self._of_blocks(reading, used, targets)).mean(dim=0)

    def _of_blocks(
        self,
        reading: AttentionReading,
        used: Sequence[int],
        targets: Sequence[Target],
    ) -> list[Tensor]:
        """(N, S) of each block, from its own score alone."""
        found = []
        for at, outputs in zip(used, _split(reading.outputs, len(used)), strict=True):
            found.append(
                reading.gradients(summed_scores(outputs, targets), [at], retain=True)[
                    0
                ]
                .relu()
                .mean(dim=(1, 2))
            )
        return found


def _split(outputs: Tensor, parts: int) -> Sequence[Tensor]:
    with torch.enable_grad():
        return outputs.chunk(parts)
