"""Forward and backward passes by OpenVINO: the gradient of a score with respect to the
pixels as one graph of ordinary operations.

Torch traces the pass and its gradient; what only a backward pass knows is written with what
an inference engine runs fast. The gradient of a convolution of stride 1 is a convolution
with its kernel turned round and its channels exchanged, of another stride a transposed one;
whether a clamp let a value through is read off what it gave; the gradient of a maximum goes
where the maximum stood first.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from consilience.models.engines.openvino import compiled_from_disk
from consilience.models.engines.openvino_runtime import _openvino
from consilience.models.engines.plan import Runnable, filled_batch
from consilience.models.layers import borrowed, frozen
from consilience.progress import say
from consilience.types import ClassTarget, Outputs, Target

aten: Any = torch.ops.aten

Read = Literal["logit", "probability"]
"""What the weights of a score are of: the raw outputs, or their softmax."""

WRITING = 9
"""Which way of writing graphs out: what is on disk of another one is not read."""

TOLERANCE = 3e-2
"""How far gradients may lie from torch's, as a share of their size: where a ReLU6 stands at
its kink, rounding decides, and single values differ by their whole."""


TAKEN_APART = (
    aten._softmax,
    aten._log_softmax,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._adaptive_avg_pool2d,
)
"""Operations that torch calls elementary and OpenVINO's converter does not know by that name."""


class Differentiable(Runnable, Protocol):
    """What is needed of a network."""

    def run(self, pixels: Tensor) -> Tensor:
        """A pass to raw outputs (N, K)."""

    def folded(self, pixels: Tensor) -> Tensor:
        """The same on the way to a gradient: batch norms folded."""

    def folding(self) -> AbstractContextManager[Any]:
        """What such a pass runs within."""


class UnwrittenError(Exception):
    """Something of a backward pass that cannot be written; says what."""


class OpenVINOGradients:
    """Outputs and gradients for batches of one size; a shorter one is filled up."""

    def __init__(self, network: Differentiable, read: Read, batch: int) -> None:
        self._batch = batch
        shape = [batch, network.channels, *network.frame]

        def convert() -> Any:
            return _converted(network, read, batch)

        self._compiled = compiled_from_disk(
            network, "f32", shape, convert, f"gradients-{read}-{WRITING}"
        )

    def __call__(self, pixels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs (N, K) and the gradient (N, C, h, w) of the sum of scores of up to a
        batch of images; a score is its row of ``weights`` (N, K) times what is read.
        """
        given = [
            filled_batch(one, self._batch).contiguous().numpy()
            for one in (pixels, weights)
        ]
        said = self._compiled(given, share_inputs=True, share_outputs=True)
        outputs, gradients = (torch.tensor(said[at][: len(pixels)]) for at in (0, 1))
        return outputs, gradients


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """How far outputs and gradients lie from torch's, as a share of their size; raises
    `UnwrittenError` where that is too far.
    """
    apart = max(
        float((one - other).norm() / other.norm().clamp(min=1e-30))
        for one, other in zip(found, expected, strict=True)
    )
    if not apart <= TOLERANCE:
        raise UnwrittenError(
            f"its gradients are {apart:.1e} of their size away from torch's"
        )
    return apart


def by_torch(
    network: Differentiable, pixels: Tensor, weights: Tensor, read: Read
) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    with borrowed(network.module), frozen(network.module):
        return _by_torch(network.folded, pixels, weights, read)


def _by_torch(
    run: Callable[[Tensor], Tensor], pixels: Tensor, weights: Tensor, read: Read
) -> tuple[Tensor, Tensor]:
    leaf = pixels.detach().requires_grad_()
    with torch.enable_grad():
        outputs = run(leaf)
        scores = outputs.softmax(1) if read == "probability" else outputs
        (found,) = torch.autograd.grad((scores * weights).sum(), [leaf])
    return outputs.detach(), found


def written_score(
    target: Target, outputs: Outputs, count: int
) -> tuple[Read, Tensor] | None:
    """What of ``count`` outputs a target reads, and its weights (K,); None for others
    than a class's raw output, or its probability by softmax.
    """
    if type(target) is not ClassTarget:
        return None
    soft = target.score == "probability" and target.outputs != "probabilities"
    if soft and (target.outputs, outputs) != ("logits", "logits"):
        return None
    row = torch.zeros(count)
    row[target.index] = 1
    return "probability" if soft else "logit", row


# ---- tracing


def _converted(network: Differentiable, read: Read, batch: int) -> Any:
    say("preparing the model's gradients for OpenVINO, once")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, network.channels, *network.frame, generator=generator)
    graph, weights = traced(network, read, pixels)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph, (pixels, weights), check_trace=False
        )
        return _openvino().convert_model(
            scripted,
            example_input=(pixels, weights),
            input=[list(pixels.shape), list(weights.shape)],
        )


def traced(
    network: Differentiable, read: Read, pixels: Tensor
) -> tuple[fx.GraphModule, Tensor]:
    """A graph of pixels (N, C, h, w) and weights (N, K) to outputs and gradients, in
    operations that have no gradient of their own; and an example of weights. Raises
    `UnwrittenError`.
    """
    from torch._decomp import core_aten_decompositions, get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.shape_prop import ShapeProp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def both(pixels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return _by_torch(network.run, pixels, weights, read)

    with (
        borrowed(network.module),
        frozen(network.module),
        _not_in_place(network.module),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with torch.no_grad():
            weights = torch.zeros_like(network.folded(pixels))
        weights[:, 0] = 1
        # attention in plain products: its fused forms have no gradient in plain operations
        with network.folding(), sdpa_kernel(SDPBackend.MATH):
            table: Any = {
                **core_aten_decompositions(),
                **get_decompositions(TAKEN_APART),
            }
            graph = make_fx(both, decomposition_table=table)(pixels, weights)
    ShapeProp(graph).propagate(pixels, weights)
    _write_out(graph)
    return graph, weights


@contextmanager
def _not_in_place(module: nn.Module) -> Iterator[None]:
    """Activations that write over their input do not, as long as they are traced."""
    parts = [part for part in module.modules() if vars(part).get("inplace") is True]
    try:
        for part in parts:
            part.inplace = False  # type: ignore[assignment]
        yield
    finally:
        for part in parts:
            part.inplace = True  # type: ignore[assignment]


# ---- backward operations in other words


def _write_out(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            _out_of_place(node)
        if node.target is aten.view.default:
            # what is written otherwise may lie otherwise in memory
            node.target = aten.reshape.default
        written = WRITTEN.get(node.target)
        if written is not None:
            with graph.graph.inserting_before(node):
                written(graph, node)
        elif "backward" in str(node.target):
            raise UnwrittenError(f"{node.target} is not written for it")
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _out_of_place(node: fx.Node) -> None:
    """An operation that writes over its input as one that does not: what comes after
    reads what it returned, unless the input is part of another tensor.
    """
    if _is(node, aten.copy_.default) and _filled(node):
        return
    changed: Any = node.args[0]
    packet: Any = getattr(node.target, "overloadpacket", None)
    name = str(packet).rpartition(".")[2].rstrip("_")
    after = set(_after(node))
    maker = getattr(changed, "target", None)
    views = isinstance(maker, torch._ops.OpOverload) and any(
        one.alias_info is not None for one in maker._schema.returns
    )
    if views or not after.isdisjoint(changed.users) or not hasattr(aten, name):
        raise UnwrittenError(f"{node.target} writes over its input")
    if name == "copy":
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        node.graph.erase_node(node)
    else:
        node.target = getattr(getattr(aten, name), node.target._overloadname)  # type: ignore[union-attr]


def _filled(node: fx.Node) -> bool:
    """Whether a blank tensor is filled as a whole through one view and only read through
    others (so torch takes a mean's gradient back): then each reads what was written.
    """
    view, value = _given(node)[:2]
    blank = view.args[0] if _is_whole(view) else None
    if blank is None or len(view.users) != 1:
        return False
    others = [user for user in blank.users if user is not view]
    after = set(_after(node))
    if not all(_is_whole(one) and one in after for one in others):
        return False
    for one in others:
        with node.graph.inserting_before(one):
            shape = list(_given(one)[1])
            new = node.graph.call_function(aten.reshape.default, (value, shape))
        _replace(one, new)
    node.graph.erase_node(node)
    return True


def _is_whole(node: Any) -> bool:
    """Whether it is all of a tensor in memory's own order, in some shape."""
    if not _is(node, aten.as_strided.default):
        return False
    base, shape, strides, *start = _given(node)
    own = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    first = not start or start[0] in (0, None)
    return (
        first and list(strides) == own and math.prod(shape) == math.prod(_shape(base))
    )


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _given(node: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = node.args
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _first_of(node: fx.Node, new: fx.Node) -> None:
    """What took the first of several values takes ``new``; the others are not there."""
    for user in list(node.users):
        if user.args[1] == 0:
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
        elif user.users:
            raise UnwrittenError(f"{node.target} is asked for gradients of weights")
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _constant(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    name = f"_made_for_{node.name}"
    graph.register_buffer(name, value.contiguous())
    return graph.graph.get_attr(name)


def _convolution(graph: fx.GraphModule, node: fx.Node) -> None:
    given, _, weight, _, stride, padding, dilation, turned, _, groups, _ = _given(
        node
    )
    kernel = _shape(weight)
    if turned or len(kernel) != 4:
        raise UnwrittenError(
            f"{node.target} of {len(kernel) - 2} dimensions, transposed"
        )
    span = [d * (k - 1) for d, k in zip(dilation, kernel[2:], strict=True)]
    rest = [s - p for s, p in zip(span, padding, strict=True)]
    known = weight.op == "get_attr"
    if known and set(stride) == {1} and min(rest) >= 0:
        value = getattr(graph, weight.target)
        new = graph.graph.call_function(
            aten.convolution.default,
            (
                given,
                _constant(graph, node, turned_round(value, groups)),
                None,
                [1, 1],
                rest,
                dilation,
                False,
                [0, 0],
                groups,
            ),
        )
    elif known and stride == dilation == [1, 1]:
        raise UnwrittenError(f"{node.target} with a border beyond its kernel")
    elif not known:
        raise UnwrittenError(f"{node.target} with a kernel that is computed")
    elif groups == 1 and set(dilation) == {1} and stride[0] == stride[1]:
        new = _by_phases(graph, node)
    else:
        new = _strided(graph, node)
    _first_of(node, new)


def _by_phases(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The gradient of a convolution of stride s: one convolution that gives the s x s
    places of each cell as channels, which are then laid out.

    ``y = s q + f`` of the padded input hears of output ``q - t`` through the kernel at
    ``s t + f``.
    """
    given, seen, weight, _, stride, padding, *_ = _given(node)
    value: Tensor = getattr(graph, weight.target).detach()
    have, out, step = _shape(seen)[2:], _shape(given)[2:], stride[0]
    call = graph.graph.call_function
    kernel, channels = phases(value, step), value.shape[1]
    reach = [size - 1 for size in kernel.shape[2:]]
    made = call(
        aten.convolution.default,
        (
            given,
            _constant(graph, node, kernel),
            None,
            [1, 1],
            reach,
            [1, 1],
            False,
            [0, 0],
            1,
        ),
    )
    cells = [one + more for one, more in zip(out, reach, strict=True)]
    if len(kernel) == channels:  # of 1 x 1 all places but the first hear nothing
        made = call(aten.unsqueeze.default, (made, 2))
        made = call(
            aten.constant_pad_nd.default,
            (made, [0, 0, 0, 0, 0, step * step - 1], 0.0),
        )
        shape = [_shape(given)[0], channels * step * step, *cells]
        made = call(aten.reshape.default, (made, shape))
    made = call(aten.pixel_shuffle.default, (made, step))
    return _cut(graph, made, [step * one for one in cells], padding, have)


def phases(weight: Tensor, step: int) -> Tensor:
    """The kernel (C_in s s, C_out, h, w) of `_by_phases` of ``weight`` (C_out, C_in, ...);
    (C_in, C_out, 1, 1) where it is 1 x 1.
    """
    out, into, height, width = weight.shape
    if (height, width) == (1, 1):
        return weight.transpose(0, 1)
    rows, columns = -(-height // step), -(-width // step)
    whole = weight.new_zeros(out, into, rows * step, columns * step)
    whole[:, :, :height, :width] = weight
    split = whole.reshape(out, into, rows, step, columns, step).flip(2, 4)
    return split.permute(1, 3, 5, 0, 2, 4).reshape(-1, out, rows, columns)


def _cut(
    graph: fx.GraphModule,
    made: fx.Node,
    reached: Sequence[int],
    start: Sequence[int],
    have: Sequence[int],
) -> fx.Node:
    """``have`` places from ``start`` on of a grid of ``reached``, zeros behind its end."""
    call = graph.graph.call_function
    for axis in (0, 1):
        stop = min(reached[axis], start[axis] + have[axis])
        if start[axis] or stop < reached[axis]:
            made = call(aten.slice.Tensor, (made, axis + 2, start[axis], stop))
        missing = have[axis] - (stop - start[axis])
        if missing > 0:
            ends = [0, 0, 0, missing] if axis == 0 else [0, missing]
            made = call(aten.constant_pad_nd.default, (made, ends, 0.0))
    return made


def _strided(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The gradient of a convolution that leaves some places out.

    The kernel gets a border of zeros at its end: OpenVINO 2026.4 packs one kernel once for
    all that hold the same numbers, and takes the forward pass's for this one where it has
    as many channels in as out.
    """
    given, seen, weight, _, stride, padding, dilation, _, _, groups, _ = _given(node)
    value: Tensor = getattr(graph, weight.target).detach()
    have, out = _shape(seen)[2:], _shape(given)[2:]
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, value.shape[2:], strict=True)]
    beyond = [
        h - ((o - 1) * s - 2 * p + e)
        for h, o, s, p, e in zip(have, out, stride, padding, extent, strict=True)
    ]
    border = [-(-max(1, one) // d) for one, d in zip(beyond, dilation, strict=True)]
    value = nn.functional.pad(value, (0, border[1], 0, border[0]))
    call = graph.graph.call_function
    new = call(
        aten.convolution.default,
        (
            given,
            _constant(graph, node, value),
            None,
            stride,
            padding,
            dilation,
            True,
            [0, 0],
            groups,
        ),
    )
    for axis in (0, 1):
        if border[axis] * dilation[axis] > beyond[axis]:
            new = call(aten.slice.Tensor, (new, axis + 2, 0, have[axis]))
    return new


def turned_round(weight: Tensor, groups: int) -> Tensor:
    """The kernel (C_in, C_out / groups, h, w) that takes a gradient back through a
    convolution of ``weight`` (C_out, C_in / groups, h, w).
    """
    out, into, height, width = weight.shape
    split = weight.detach().reshape(groups, out // groups, into, height, width)
    return (
        split.transpose(1, 2).reshape(-1, out // groups, height, width).flip(-1, -2)
    )


def _max_pool(graph: fx.GraphModule, node: fx.Node) -> None:
    given, seen, size, stride, padding, dilation, _, indices = _given(node)
    if set(dilation) != {1}:
        raise UnwrittenError(f"{node.target} with a dilation")
    call = graph.graph.call_function
    size, stride, padding = _pair(size), _pair(stride or size), _pair(padding)
    if stride[0] != stride[1]:
        raise UnwrittenError(f"{node.target} of two strides")
    out, have = _shape(given)[2:], _shape(seen)[2:]
    reach = [
        max(0, (o - 1) * s + k - h - p)
        for o, s, k, h, p in zip(out, stride, size, have, padding, strict=True)
    ]
    padded = call(
        aten.constant_pad_nd.default,
        (seen, [padding[1], reach[1], padding[0], reach[0]], -math.inf),
    )

    def window(row: int, column: int) -> fx.Node:
        found = padded
        for axis, start, step, count in (
            (2, row, stride[0], out[0]),
            (3, column, stride[1], out[1]),
        ):
            stop = start + step * (count - 1) + 1
            found = call(aten.slice.Tensor, (found, axis, start, stop, step))
        return found

    places = [(row, column) for row in range(size[0]) for column in range(size[1])]
    windows = [window(*place) for place in places]
    largest = call(operator.getitem, (indices.args[0], 0))  # of the forward pass
    nothing = call(aten.mul.Scalar, (given, 0.0))
    left, parts = given, []
    for one in windows:  # the first that is largest gets all of it, as in torch
        here = call(aten.eq.Tensor, (one, largest))
        parts.append(call(aten.where.self, (here, left, nothing)))
        left = call(aten.where.self, (here, nothing, left))
    # back to where they came from, as `_by_phases` has it
    step = stride[0]
    cells = [o + -(-k // step) - 1 for o, k in zip(out, size, strict=True)]
    sums: dict[tuple[int, int], fx.Node] = {}
    for part, (row, column) in zip(parts, places, strict=True):
        up, left_of = row // step, column // step
        ends = [left_of, cells[1] - out[1] - left_of, up, cells[0] - out[0] - up]
        moved = call(aten.constant_pad_nd.default, (part, ends, 0.0))
        phase = row % step, column % step
        known = sums.get(phase)
        sums[phase] = (
            moved if known is None else call(aten.add.Tensor, (known, moved))
        )
    every = [(row, column) for row in range(step) for column in range(step)]
    silent = call(aten.mul.Scalar, (sums[0, 0], 0.0))
    stacked = call(
        aten.stack.default, ([sums.get(phase, silent) for phase in every], 2)
    )
    batch, channels = _shape(seen)[:2]
    shape = [batch, channels * step * step, *cells]
    made = call(aten.reshape.default, (stacked, shape))
    made = call(aten.pixel_shuffle.default, (made, step))
    _replace(node, _cut(graph, made, [step * one for one in cells], padding, have))


def _average_pool(graph: fx.GraphModule, node: fx.Node) -> None:
    given, seen, size, stride, padding, ceil, counted, divisor = _given(node)
    size, stride, padding = _pair(size), _pair(stride or size), _pair(padding)
    if ceil or divisor or (max(padding) and not counted):
        raise UnwrittenError(f"{node.target} with a ceiling, a divisor or a border")
    _averaged(graph, node, given, seen, size, stride, padding)


def _adaptive_pool(graph: fx.GraphModule, node: fx.Node) -> None:
    given, seen = _given(node)
    out, have = _shape(given)[2:], _shape(seen)[2:]
    if any(h % o for h, o in zip(have, out, strict=True)):
        raise UnwrittenError(f"{node.target} of cells of several sizes")
    size = [h // o for h, o in zip(have, out, strict=True)]
    _averaged(graph, node, given, seen, size, size, [0, 0])


def _averaged(
    graph: fx.GraphModule,
    node: fx.Node,
    given: fx.Node,
    seen: fx.Node,
    size: list[int],
    stride: list[int],
    padding: list[int],
) -> None:
    channels, have = _shape(seen)[1], _shape(seen)[2:]
    kernel = torch.full((channels, 1, *size), 1 / math.prod(size))
    _replace(
        node, _spread(graph, node, given, kernel, stride, padding, have, channels)
    )


def _spread(
    graph: fx.GraphModule,
    node: fx.Node,
    given: fx.Node,
    kernel: Tensor,
    stride: list[int],
    padding: list[int],
    have: Sequence[int],
    groups: int,
) -> fx.Node:
    """A transposed convolution onto a grid of ``have``: what its windows reach beyond is
    cut off, what they do not reach is 0.
    """
    call = graph.graph.call_function
    made = call(
        aten.convolution.default,
        (
            given,
            _constant(graph, node, kernel),
            None,
            stride,
            [0, 0],
            [1, 1],
            True,
            [0, 0],
            groups,
        ),
    )
    out = _shape(node.args[0])[2:]
    reached = [
        (o - 1) * s + k for o, s, k in zip(out, stride, kernel.shape[2:], strict=True)
    ]
    return _cut(graph, made, reached, padding, have)


def _pair(value: Sequence[int]) -> list[int]:
    return [*value, *value] if len(value) == 1 else list(value)


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _clamped(graph: fx.GraphModule, node: fx.Node) -> None:
    """``where(x <= low or x >= high, 0, gradient)`` of a clamp: what it gave says as much,
    and its input need not be kept.
    """
    outside, zero, given = _given(node)
    below, above = (
        outside.args if _is(outside, aten.bitwise_or.Tensor) else (None, None)
    )
    if not (_is(below, aten.le.Scalar) and _is(above, aten.ge.Scalar)):
        return
    (seen, low), (same, high) = _given(below), _given(above)
    gave = next(
        (
            one
            for one in seen.users
            if _is(one, aten.hardtanh.default) and tuple(one.args[1:]) == (low, high)
        ),
        None,
    )
    if same is not seen or gave is None:
        return
    call = graph.graph.call_function
    inside = call(
        aten.logical_and.default,
        (call(aten.gt.Scalar, (gave, low)), call(aten.lt.Scalar, (gave, high))),
    )
    _replace(node, call(aten.where.self, (inside, given, zero)))


def _put_in_zeros(graph: fx.GraphModule, node: fx.Node) -> None:
    """What is written into a part of zeros, with zeros round it."""
    zeros, value, axis, start, _, *step = _given(node)
    whole, rank = _shape(zeros), len(_shape(zeros))
    blank = _is(zeros, aten.full.default) and zeros.args[1] == 0
    if not blank or step not in ([], [1]):
        return
    axis %= rank
    size, start = whole[axis], start or 0
    start = start + size if start < 0 else start
    after = size - start - _shape(value)[axis]
    ends = [0, 0] * (rank - 1 - axis) + [start, after]
    _replace(
        node,
        graph.graph.call_function(aten.constant_pad_nd.default, (value, ends, 0.0)),
    )


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


WRITTEN: dict[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    aten.convolution_backward.default: _convolution,
    aten.max_pool2d_with_indices_backward.default: _max_pool,
    aten.avg_pool2d_backward.default: _average_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_pool,
    aten.slice_scatter.default: _put_in_zeros,
    aten.where.self: _clamped,
}
