"""What would the model say if this layer had said that? Exact resumes of a network
after a layer, for a given image.

Three ways with one result. ``closed``: where only global average pooling and one linear
layer follow, outputs = W mean(A) + b. ``split``: the traced graph is cut after the
layer, everything else that is alive there (a residual's skip, class tokens) is kept
from the image, and the rest alone runs. ``replay``: a whole pass with the layer's
output replaced, where nothing can be traced. A way is taken only once it has given what
`replay` gives, on random activations and on every image's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from consilience.models import graph
from consilience.models.graph import Cut, GraphSection, Grow, Traced, Uncut
from consilience.models.layers import Form, borrowed, hooked
from consilience.progress import task
from consilience.types import ConsilienceError

TailKind = Literal["closed", "split", "replay"]
TAIL_KINDS: tuple[TailKind, ...] = get_args(TailKind)
TAIL_TOLERANCE = 1e-5
_ROWS = 64
_BLOCK = 16 << 20


class TailNetwork(Protocol):
    """What a tail needs of a network."""

    @property
    def module(self) -> nn.Module:
        """The user's module."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def memory(self) -> int:
        """Bytes that a pass may take."""

    @property
    def largest(self) -> int:
        """Floats of the largest value of a whole pass of one image."""

    @property
    def complement(self) -> bool:
        """Whether the second output is made of the first."""

    def run(self, pixels: Tensor) -> Tensor:
        """One plain pass; the caller has borrowed the module."""

    def read(self, said: Any) -> Tensor:
        """Outputs (N, K) of what the module returns."""


class Resume(Protocol):
    """One way to resume: raw outputs of the layer (n, ...) to the model's outputs (n,
    K).
    """

    @property
    def largest(self) -> int:
        """Floats of the largest value for one image: what bounds a chunk."""

    def resume(self, raw: Tensor) -> Tensor:
        """Outputs for raw layer outputs."""

    def ablated(self, channels: Tensor) -> Tensor:
        """Outputs with each of the channels zeroed alone."""


# ---- the tail


@dataclass(frozen=True, eq=False)
class Seen:
    """One plain pass of the image: what the module took, what the layer said (raw, and
    as a map), what came out.
    """

    network: TailNetwork
    pixels: Tensor
    layer: str
    form: Form
    given: Tensor
    raw: Tensor
    outputs: Tensor

    @property
    def module(self) -> nn.Module:
        """The user's module."""
        return self.network.module

    @property
    def maps(self) -> Tensor:
        """What the layer said, (1, C, h, w): a view of ``raw``."""
        return self.form.as_map(self.raw)

    def laid_out(self, maps: Tensor) -> Tensor:
        """Maps (N, C, h, w) as the layer would return them: tokens, sides and memory
        layout.
        """
        return self.form.as_raw(maps.detach().to(self.raw), self.raw).contiguous(
            memory_format=_layout(self.raw)
        )

    def without(self, channels: Tensor) -> Tensor:
        """Copies of ``raw``, each with one of the channels zeroed; class tokens are no
        part of a channel's map.
        """
        raw = self.raw.expand(len(channels), *self.raw.shape[1:]).clone(
            memory_format=_layout(self.raw)
        )
        self.form.as_map(raw)[
            torch.arange(len(channels), device=raw.device), channels
        ] = 0
        return raw


@dataclass(frozen=True, eq=False)
class NetworkTail:
    """The network after a layer, for one image and the weights of now: activations (N,
    C, h, w) to raw outputs (N, K).

    ``kind`` is the way it runs, ``logits`` (1, K) what the model says of the image
    itself. Everything that the rest of the network takes besides the layer is the
    image's own. Runs in full f32 and without gradients.
    """

    kind: TailKind
    seen: Seen = field(repr=False)
    way: Resume = field(repr=False)

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.seen.layer

    @property
    def logits(self) -> Tensor:
        """What the model says of the image itself, (1, K)."""
        return self.seen.outputs

    @property
    def activations(self) -> Tensor:
        """What the layer says of the image, (1, C, h, w)."""
        return self.seen.maps

    @property
    def chunk(self) -> int:
        """Rows a pass: input, output and workspace of the largest operation within the
        network's ``memory``. On a CPU at most 64, and no value above 16 MiB: within
        a few percent of the best chunk at six layers measured, where twice that took
        up to twice as long (glibc, too, hands back blocks above 32 MiB at every
        use).
        """
        row = 4 * self.way.largest
        most = self.seen.network.memory // (3 * row)
        if self.seen.raw.device.type == "cpu":
            most = min(most, _ROWS, _BLOCK // row)
        return max(1, most)

    def __call__(self, activations: Tensor) -> Tensor:
        """Raw outputs (N, K) as if the layer had given these (N, C, h, w), in the form
        of ``model.activations``.
        """
        shape = self.activations.shape[1:]
        if activations.dim() != 4 or activations.shape[1:] != shape:
            wanted = ", ".join(str(side) for side in shape)
            raise ConsilienceError(
                f"{self.layer!r} gives (N, {wanted}) for this image; got "
                f"{tuple(activations.shape)}"
            )
        return self._in_chunks(
            activations,
            lambda rows: self.way.resume(self.seen.laid_out(rows)),
            self.chunk,
            "resuming",
        )

    def without(
        self, channels: Sequence[int] | Tensor, batch: int | None = None
    ) -> Tensor:
        """Raw outputs (n, K) with one channel at a time set to zero (zero ablation), in
        the order of ``channels``.

        Exact. Channels that are zero everywhere already are not run. ``batch``
        overrides how many run at a time.
        """
        wanted = self._checked(channels)
        if batch is not None and batch < 1:
            raise ConsilienceError(f"batch is at least 1; got {batch}")
        outputs = self.logits.expand(len(wanted), -1).clone()
        alive = (
            self.activations[0].flatten(1).ne(0).any(dim=1)[wanted].nonzero()[:, 0]
        )
        outputs[alive] = self._in_chunks(
            wanted[alive], self.way.ablated, batch or self.chunk, "zeroing channels"
        )
        return outputs

    def _checked(self, channels: Sequence[int] | Tensor) -> Tensor:
        found = torch.as_tensor(channels, device=self.seen.raw.device)
        count = self.activations.shape[1]
        if found.dim() != 1 or (
            len(found) and (found.is_floating_point() or found.dtype == torch.bool)
        ):
            raise ConsilienceError(
                f"channels are a list of whole numbers; got {found.dtype} of shape "
                f"{tuple(found.shape)}"
            )
        found = found.long()
        if len(found) and (int(found.min()) < 0 or int(found.max()) >= count):
            outside = int(found[(found < 0) | (found >= count)][0])
            raise ConsilienceError(
                f"{self.layer!r} has channels 0 to {count - 1}; got {outside}"
            )
        return found

    def _in_chunks(
        self, rows: Tensor, run: Callable[[Tensor], Tensor], size: int, label: str
    ) -> Tensor:
        parts = [self.logits[:0]]
        with task(label, len(rows)) as running:
            for chunk in torch.split(rows, size) if len(rows) else ():
                with borrowed(self.seen.module), _exact(), torch.inference_mode():
                    parts.append(run(chunk))
                running.advance(len(chunk))
        return torch.cat(parts)


# ---- making one


def make_tail(
    network: TailNetwork,
    pixels: Tensor,
    layer: str,
    form: Form,
    kind: TailKind | None = None,
) -> NetworkTail:
    """The tail of ``network`` after ``layer`` for one image (1, 3, h, w), by the
    fastest way that gives the same outputs.

    ``kind`` asks for one way; raises `ConsilienceError` with the reason where it is not
    possible.
    """
    if len(pixels) != 1:
        raise ConsilienceError(
            f"a tail is made for one image (1, 3, h, w); got {len(pixels)} images"
        )
    if kind is not None and kind not in TAIL_KINDS:
        raise ConsilienceError(
            f"kind is one of {', '.join(TAIL_KINDS)}; got {kind!r}"
        )
    reason = ""
    with (
        borrowed(network.module),
        _exact(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        seen = _look(network, pixels, layer, form)
        for one in (kind,) if kind else TAIL_KINDS:
            try:
                return NetworkTail(one, seen, _proven(one, seen))
            except Uncut as why:
                reason = str(why)
    raise ConsilienceError(
        f"{network.name} cannot be resumed after {layer!r} by {kind or 'replay'}: {reason}"
    )


def _look(network: TailNetwork, pixels: Tensor, layer: str, form: Form) -> Seen:
    """One plain pass.

    The layer's output is copied before anything afterwards can write to it.
    """
    found: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        found["raw"] = output.clone()
        return output.clone()

    def take(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found["given"] = inputs[0].clone()

    handle = network.module.register_forward_pre_hook(take)
    try:
        with hooked([(network.module.get_submodule(layer), keep)]):
            outputs = network.run(pixels)
    finally:
        handle.remove()
    return Seen(
        network, pixels, layer, form, found["given"], found["raw"], outputs.float()
    )


def _proven(kind: TailKind, seen: Seen) -> Resume:
    """The way, if it gives the image's own outputs; what was found out about the module
    before may be outdated, once.
    """
    for attempt in ("known", "anew"):
        reason = ""
        try:
            way = _WAYS[kind](seen)
            reason = _differs(way.resume(seen.raw.clone()), seen.outputs)
        except RuntimeError as error:  # a graph of the module as it was
            reason = graph.in_a_line(error)
        if not reason:
            return way
        if attempt == "known":
            _known.pop(seen.module, None)
    raise Uncut(f"for this image {reason}")


def _differs(got: Tensor, expected: Tensor) -> str:
    """Why these are not the same outputs; empty where they are.

    What is not a number must be so in both.
    """
    numbers = expected.isfinite()
    if not torch.equal(numbers, got.isfinite()):
        return "its outputs are numbers where the model's are not, or the other way round"
    if not numbers.any():
        return ""
    scale = max(
        float(expected[numbers].abs().max()), torch.finfo(expected.dtype).tiny
    )
    apart = float((got - expected)[numbers].abs().max()) / scale
    return (
        ""
        if apart <= TAIL_TOLERANCE
        else f"its outputs are {apart:.1e} of their size off, {TAIL_TOLERANCE:.0e} allowed"
    )


def _trials(seen: Seen) -> Tensor:
    """Three random activations of the layer's size: dense and signed, and the image's
    own with parts doubled or gone.
    """
    generator = torch.Generator().manual_seed(0)
    maps = seen.maps
    noise = torch.randn(2, *maps.shape[1:], generator=generator).to(maps) * maps.std(
        correction=0
    ).clamp(min=1e-3)
    parts = maps * torch.randint(0, 3, maps.shape, generator=generator).to(maps)
    return seen.laid_out(torch.cat([maps.mean() + noise, parts]))


def _tried(way: Resume, seen: Seen) -> None:
    """Hold a way against replay on random activations; three at a time, so that growing
    from one and two is seen to go on.
    """
    raw = _trials(seen)
    reason = _differs(way.resume(raw.clone()), Replay(seen).resume(raw))
    if reason:
        raise Uncut(f"on random activations {reason}")


@contextmanager
def _exact() -> Iterator[None]:
    """No TF32: what one channel changes is small beside the outputs, and must not
    depend on how many run at a time.
    """
    if not torch.cuda.is_available():
        yield
        return
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


# ---- what is known of a module


@dataclass(eq=False)
class KnownModule:
    """What was found out about a module: its graphs, plans and heads by layer and size;
    nothing of it holds the module.
    """

    stamp: tuple[Any, ...]
    traces: dict[Any, Traced | Uncut] = field(default_factory=dict)
    plans: dict[Any, TailPlan | Uncut] = field(default_factory=dict)
    heads: dict[Any, str | Uncut] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, KnownModule] = WeakKeyDictionary()


def _known_of(seen: Seen) -> tuple[KnownModule, Any]:
    """What is known of the image's module, as long as it has the same parts; and the
    key of the layer at this size.
    """
    stamp = (
        seen.raw.device,
        *((name, type(part)) for name, part in seen.module.named_modules()),
    )
    known = _known.get(seen.module)
    if known is None or known.stamp != stamp:
        known = _known[seen.module] = KnownModule(stamp)
    return known, (seen.layer, tuple(seen.given.shape), tuple(seen.raw.shape))


def _had(store: dict[Any, Any], key: Any, find: Callable[[], Any]) -> Any:
    """What the store has, or what is found now; a reason why there is nothing is kept
    like anything else.
    """
    if key not in store:
        try:
            store[key] = find()
        except Uncut as why:
            store[key] = Uncut(
                str(why)
            )  # the raised one holds the module, by its traceback
    if isinstance(store[key], Uncut):
        raise Uncut(str(store[key]))
    return store[key]


# ---- replay


class Replay:
    """A whole pass of as many copies of the image, with the layer's output replaced."""

    def __init__(self, seen: Seen) -> None:
        self._seen, self.largest = seen, seen.network.largest

    def resume(self, raw: Tensor) -> Tensor:
        """Outputs for raw layer outputs."""
        seen = self._seen
        with hooked(
            [(seen.module.get_submodule(seen.layer), lambda *_: raw.clone())]
        ):
            return seen.network.run(seen.pixels.expand(len(raw), -1, -1, -1)).float()

    def ablated(self, channels: Tensor) -> Tensor:
        """Outputs with each of the channels zeroed alone."""
        return self.resume(self._seen.without(channels))


# ---- closed


class Closed:
    """Outputs = W mean(A) + b, with the W and b of one of the module's linear parts."""

    largest = 1

    def __init__(self, seen: Seen, part: nn.Module) -> None:
        self._seen = seen
        self._weight = cast(Tensor, part.weight).detach().flatten(1)
        self._bias = cast(Tensor | None, part.bias)

    def resume(self, raw: Tensor) -> Tensor:
        """Outputs for raw layer outputs."""
        means = self._seen.form.as_map(raw).mean(dim=(2, 3))
        said = functional.linear(means, self._weight, self._bias)
        return self._seen.network.read(said).float()

    def ablated(self, channels: Tensor) -> Tensor:
        """Outputs with each of the channels zeroed alone: what they had given is taken
        back.
        """
        means = self._seen.maps[0, channels].mean(dim=(1, 2))
        raw = self._seen.outputs[:, : len(self._weight)]
        return self._seen.network.read(
            raw - self._weight.T[channels] * means[:, None]
        )


def _closed(seen: Seen) -> Closed:
    known, key = _known_of(seen)
    name: str = _had(known.heads, key, partial(_head, seen))
    return Closed(seen, seen.module.get_submodule(name))


def _head(seen: Seen) -> str:
    """The linear part that, after pooling, gives the model's outputs for the image and
    for random activations.
    """
    said = 1 if seen.network.complement else seen.outputs.shape[1]
    wanted = (said, seen.maps.shape[1])
    for name, part in reversed(list(seen.module.named_modules())):
        way = Closed(seen, part) if _may_be_head(part, wanted) else None
        if way is not None and not _differs(way.resume(seen.raw), seen.outputs):
            _tried(way, seen)
            return str(name)
    raise Uncut("what follows is not global average pooling and one linear layer")


def _may_be_head(part: nn.Module, wanted: tuple[int, int]) -> bool:
    if isinstance(part, nn.Linear):
        return tuple(part.weight.shape) == wanted
    return isinstance(part, nn.Conv2d) and tuple(part.weight.shape) == (*wanted, 1, 1)


# ---- split


@dataclass(frozen=True, eq=False)
class TailPlan:
    """A graph cut after a layer and ready for images of one size: how what is kept
    grows, and what is written to.
    """

    image: fx.Node
    cut: Cut
    before: GraphSection
    after: GraphSection
    grow: dict[fx.Node, Grow]
    written: frozenset[fx.Node]
    whole: bool
    largest: int
    constants: dict[str, Any]


class Split:
    """The part of the traced graph that depends on the layer, on what is kept of the
    image.
    """

    def __init__(self, seen: Seen, plan: TailPlan) -> None:
        self._seen, self._plan, self.largest = seen, plan, plan.largest
        values = {plan.image: seen.given}
        plan.before.run(seen.module, values)
        self._kept = {node: values[node] for node in plan.cut.kept}

    def resume(self, raw: Tensor) -> Tensor:
        """Outputs for raw layer outputs."""
        start = self._plan.cut.start
        values = self._alive(len(raw))
        values[start] = raw.clone() if start in self._plan.written else raw
        said = self._plan.after.run(self._seen.module, values)
        return self._seen.network.read(said).float()

    def _alive(self, n: int) -> graph.Values:
        """What is kept, for n copies of the image; copied where the rest writes to it
        or cannot take expanded tensors.
        """
        plan = self._plan
        grown = {
            node: plan.grow[node](value, n) for node, value in self._kept.items()
        }
        return {
            node: graph.copied(value) if plan.whole or node in plan.written else value
            for node, value in grown.items()
        }

    def ablated(self, channels: Tensor) -> Tensor:
        """Outputs with each of the channels zeroed alone."""
        if self._reader is None:
            return self.resume(self._seen.without(channels))
        return self._resume_after(self._reader, channels)

    @cached_property
    def _reader(self) -> Reader | None:
        """The one linear operation that reads the layer, if there is one and it proves
        to be linear.
        """
        found = graph.only_reader(self._plan.cut)
        if found is None:
            return None
        node, mark, passed = found
        update = _update(
            self._seen, self._seen.module.get_submodule(str(node.target))
        )
        if update is None:
            return None
        rest = [each for each in self._plan.cut.after if each not in passed]
        reader = Reader(mark, GraphSection(rest, (), self._plan.constants), update)
        loud = (
            self._seen.maps[0]
            .abs()
            .amax(dim=(1, 2))
            .topk(min(2, self._seen.maps.shape[1]))
            .indices
        )
        off = _differs(
            self._resume_after(reader, loud), self.resume(self._seen.without(loud))
        )
        return None if off else reader

    def _resume_after(self, reader: Reader, channels: Tensor) -> Tensor:
        values = self._alive(len(channels))
        values[reader.mark] = reader.update(channels)
        said = reader.after.run(self._seen.module, values)
        return self._seen.network.read(said).float()


# ---- planning a split


def _split(seen: Seen) -> Split:
    known, key = _known_of(seen)
    return Split(seen, _had(known.plans, key, partial(_plan, seen, known)))


def _plan(seen: Seen, known: KnownModule) -> TailPlan:
    """The first graph of the module that, cut after the layer, gives what replay gives
    on random activations.
    """
    reasons = []
    for dialect in graph.dialects(seen.module, seen.layer):
        for whole in (False, True):
            try:
                traced = _had(
                    known.traces,
                    dialect,
                    partial(graph.trace_graph, seen.module, dialect),
                )
                return _tried_plan(seen, traced, whole)
            except Uncut as why:
                reasons.append(str(why))
            except RuntimeError as error:  # what runs afterwards may need whole tensors where these are expanded
                reasons.append(graph.in_a_line(error))
    raise Uncut(reasons[0])


def _tried_plan(seen: Seen, traced: Traced, whole: bool) -> TailPlan:
    cut = graph.cut(traced, seen.layer)
    image = next(node for node in traced.nodes if node.op == "placeholder")
    before = GraphSection(cut.before, cut.kept, traced.constants)
    after = GraphSection(cut.after, (), traced.constants)
    one, two = ({image: seen.given}, {image: torch.cat([seen.given, seen.given])})
    before.run(seen.module, one)
    before.run(seen.module, two)
    grow = {node: graph.growth(one[node], two[node]) for node in cut.kept}
    written, largest = _watched(
        seen, cut, after, {node: two[node] for node in cut.kept}
    )
    plan = TailPlan(
        image, cut, before, after, grow, written, whole, largest, traced.constants
    )
    _tried(Split(seen, plan), seen)
    return plan


def _watched(
    seen: Seen, cut: Cut, after: GraphSection, kept: graph.Values
) -> tuple[frozenset[fx.Node], int]:
    """Which of the values at the cut the rest of the network writes to, and the floats
    of its largest value for an image.
    """
    values = {
        node: graph.copied(value)
        for node, value in {
            **kept,
            cut.start: torch.cat([seen.raw, seen.raw]),
        }.items()
    }
    sizes = [seen.raw.numel()]
    held = dict(values)
    after.run(
        seen.module,
        values,
        lambda value: sizes.extend(
            tensor.numel() // 2 for tensor in graph.tensors_in(value)
        ),
    )
    written = {
        node
        for node, value in held.items()
        if any(tensor._version for tensor in graph.tensors_in(value))
    }
    return frozenset(written), max(sizes)


# ---- zeroing a channel behind a linear operation


@dataclass(frozen=True, eq=False)
class Reader:
    """The linear operation after the layer: the mark of what it returns, what runs
    after it, and what it returns instead.
    """

    mark: fx.Node
    after: GraphSection
    update: Callable[[Tensor], Tensor]


def _update(seen: Seen, part: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a Conv2d (without groups) or Linear returns when one channel of its input is
    zero: one product of rank 1 less.

    In columns: each channel's map unfolded (C, places, taps), its weights (C, taps, O),
    and the output is (places, O).
    """
    columns = _columns(seen, part)
    if columns is None:
        return None
    weight = cast(Tensor, part.weight).detach()
    taps = weight.reshape(*weight.shape[:2], -1).permute(1, 2, 0).contiguous()
    output: Tensor = part(seen.raw.clone())
    conv = isinstance(part, nn.Conv2d)
    shown = output.permute(0, 2, 3, 1) if conv else output
    base = shown.reshape(1, -1, shown.shape[-1])

    def update(channels: Tensor) -> Tensor:
        n = len(channels)
        less = torch.baddbmm(
            base.expand(n, -1, -1), columns[channels], taps[channels], alpha=-1
        ).reshape(n, *shown.shape[1:])
        return (
            less.permute(0, 3, 1, 2).contiguous(memory_format=_layout(output))
            if conv
            else less
        )

    return update


def _columns(seen: Seen, part: nn.Module) -> Tensor | None:
    """(C, places, taps) of what the part reads; class tokens, which belong to no
    channel's map, as zeros.
    """
    only = torch.zeros_like(seen.raw)
    seen.form.as_map(only).copy_(seen.maps)
    first = seen.form.kind == "map" and not seen.form.channels_last
    if type(part).forward is nn.Linear.forward and not first:
        return only.reshape(-1, only.shape[-1]).T[:, :, None].contiguous()
    if not (first and _plain_conv(part)):
        return None
    window: Any = (part.kernel_size, part.dilation, part.padding, part.stride)
    unfolded = functional.unfold(only, *window)
    return (
        unfolded.reshape(only.shape[1], -1, unfolded.shape[-1])
        .transpose(1, 2)
        .contiguous()
    )


def _plain_conv(part: nn.Module) -> bool:
    if not isinstance(part, nn.Conv2d) or type(part).forward is not nn.Conv2d.forward:
        return False
    return (
        part.groups == 1
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
    )


def _layout(values: Tensor) -> torch.memory_format:
    last = (
        values.dim() == 4
        and values.is_contiguous(memory_format=torch.channels_last)
        and not values.is_contiguous()
    )
    return torch.channels_last if last else torch.contiguous_format


_WAYS: dict[TailKind, Callable[[Seen], Resume]] = {
    "closed": _closed,
    "split": _split,
    "replay": Replay,
}
