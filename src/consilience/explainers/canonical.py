"""A network written out: every operation of a pass a module of its own, for libraries
that attach their rules to modules.

captum's DeepLIFT and zennit's rules see modules alone. A functional ReLU, a ReLU that
is used twice, an addition of two branches are silently treated as plain gradients
there, or wrongly. Here a deep copy of the network is traced; each call becomes a module
that runs once and not in place, batch norms are merged into the convolution before
them, and whatever has no rule is refused by name. The copy is used only where it gives
the model's own outputs.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from consilience.models import graph
from consilience.models.graph import Dialect, Uncut, layer_output
from consilience.models.layers import borrowed
from consilience.models.network import TorchNetwork
from consilience.models.readouts import ClassOutputs, LayerReading, reading_of
from consilience.types import Network, NotApplicable, Target

REWRITE_TOLERANCE = 1e-3
"""Of the size of the outputs: what merged batch norms may change by rounding."""
LINEAR = 1e-3
"""Of the score: how far a target may be from a sum of the outputs that it is made of.
"""

# ---- modules in place of functions


class Add(nn.Module):
    """Two branches that come together."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Their sum."""
        return first + second


class MeanPool(nn.Module):
    """A mean over given sides: a pooling by another name."""

    def __init__(self, dim: Any, keepdim: bool = False) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, given: Tensor) -> Tensor:
        """The mean."""
        return given.mean(dim=self.dim, keepdim=self.keepdim)


class Resize(nn.Module):
    """An enlargement: weights that are positive and sum to 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs

    def forward(self, given: Tensor) -> Tensor:
        """The map in another size."""
        return functional.interpolate(given, *self.args, **self.kwargs)


class Clipped(nn.Module):
    """ReLU6 as the difference of two ReLUs: captum knows those, and its rule for the
    difference is the rule for ReLU6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.ReLU(), nn.ReLU()

    def forward(self, given: Tensor) -> Tensor:
        """``min(max(given, 0), 6)``."""
        return cast(Tensor, self.low(given.clone()) - self.high(given - 6))


# ---- what is known

POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_PLAIN = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    *POOLS,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
)
_UPSAMPLING = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)

_ACTIVATIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys(
        (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"),
        lambda inplace=False: nn.ReLU(),
    ),
    functional.relu6: lambda inplace=False: nn.ReLU6(),
    functional.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(
        negative_slope
    ),
    functional.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    functional.softplus: lambda beta=1.0, threshold=20.0: nn.Softplus(
        beta, threshold
    ),
    **dict.fromkeys((functional.tanh, torch.tanh, "tanh", "tanh_"), nn.Tanh),
    **dict.fromkeys(
        (functional.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid
    ),
    functional.silu: lambda inplace=False: nn.SiLU(),
    functional.gelu: lambda approximate="none": nn.GELU(approximate),
    functional.hardswish: lambda inplace=False: nn.Hardswish(),
    functional.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    functional.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(
        min_val, max_val
    ),
}
_MADE: dict[Any, Callable[..., nn.Module]] = {
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.max_pool2d: lambda kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (
        nn.MaxPool2d(
            kernel_size, stride, padding, dilation, return_indices, ceil_mode
        )
    ),
    functional.interpolate: Resize,
    **dict.fromkeys((torch.mean, "mean"), MeanPool),
    **dict.fromkeys(
        (functional.dropout, functional.dropout2d), lambda *_, **__: nn.Identity()
    ),
}
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MOVES = (
    *(
        getattr(torch, name)
        for name in (
            "flatten",
            "cat",
            "concat",
            "chunk",
            "split",
            "reshape",
            "permute",
            "transpose",
        )
    ),
    *(
        torch.squeeze,
        torch.unsqueeze,
        operator.getitem,
        "flatten",
        "view",
        "reshape",
        "permute",
        "transpose",
    ),
    *("contiguous", "squeeze", "unsqueeze", "chunk", "split"),
)
"""What only moves numbers: relevance goes back the way they came."""
_SIZES = ("size", "dim", getattr, len)
_ARITHMETIC = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    int,
    operator.eq,
)


# ---- the copy


@dataclass(frozen=True, eq=False)
class Canonical:
    """The network written out: ``module`` maps normalised images to what it returns,
    ``read`` that to outputs (N, K).

    ``top`` is the largest of the outputs of the image it was tried on.
    """

    module: fx.GraphModule
    read: Callable[[Tensor], Tensor]
    top: float


def canonical(
    model: Network, activations: Sequence[type], prepared: Tensor, sums: bool
) -> Canonical:
    """The network written out, and compared with itself on ``prepared`` images,
    normalised.

    ``activations`` are the kinds the caller has a rule for; ``sums`` makes branches
    that come together stack, so that zennit's rule for sums applies. Raises
    `NotApplicable` with the reason for anything else.
    """
    network = cast(TorchNetwork, model)
    reading = reading_of(network)
    layer = reading.name if isinstance(reading, LayerReading) else None
    if not isinstance(
        reading.base if isinstance(reading, LayerReading) else reading, ClassOutputs
    ):
        raise NotApplicable(code="relevance-start", key=str(reading.key))
    with borrowed(network.module):
        own = opened(copy.deepcopy(network.module)).eval().requires_grad_(False)
        with torch.no_grad():
            expected = (
                reading.of(network.module, prepared)
                if layer is not None
                else network.read(network.module(prepared))
            )
    found = Canonical(
        _Writer(own, activations, sums, layer).written(),
        _reader(network, reading),
        float(expected.abs().max()),
    )
    with torch.no_grad():
        got = found.read(found.module(prepared))
    scale = float(expected.abs().max().clamp(min=1e-6))
    apart = float((got - expected).abs().max()) / scale
    if not apart <= REWRITE_TOLERANCE:
        raise NotApplicable(
            code="written-out-differs", model=network.name, apart=apart
        )
    return found


def _reader(network: TorchNetwork, reading: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(reading, LayerReading):
        return lambda raw: reading.mean(reading.form.as_map(raw))
    return network.read


def opened(module: nn.Module) -> nn.Module:
    """timm's batch norms with an activation inside, as the two that they are; the
    module is changed.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (
                isinstance(child, _BatchNorm)
                and hasattr(child, "act")
                and hasattr(child, "drop")
            ):
                setattr(
                    parent,
                    name,
                    nn.Sequential(
                        _bare(child),
                        cast(nn.Module, child.drop),
                        cast(nn.Module, child.act),
                    ),
                )
    return module


def _bare(norm: _BatchNorm) -> nn.BatchNorm2d:
    bare = nn.BatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
    )
    bare.load_state_dict(
        {key: value for key, value in norm.state_dict().items() if "." not in key}
    )
    return bare.to(next(norm.buffers()).device)


class _Writer:
    """Writes a traced graph anew, node by node."""

    def __init__(
        self,
        module: nn.Module,
        activations: Sequence[type],
        sums: bool,
        layer: str | None,
    ) -> None:
        self._own, self._activations, self._sums, self._layer = (
            module,
            tuple(activations),
            sums,
            layer,
        )
        self._graph, self._parts = fx.Graph(), cast(dict[str, Any], {})
        self._there: dict[fx.Node, Any] = {}
        self._sizes: set[fx.Node] = set()
        self._used: set[int] = set()

    def written(self) -> fx.GraphModule:
        """The graph as a module whose parts stand in the order of the pass."""
        try:
            traced = graph.trace_graph(
                self._own, Dialect(leaves=(_ConvNd, _BatchNorm))
            )
        except Uncut as why:
            raise NotApplicable(
                code="cannot-write-out", module=type(self._own).__name__, why=why
            ) from None
        self._constants = traced.constants
        for node in traced.nodes:
            if node.op == "output" or (
                node.target is layer_output and node.args[1] == self._layer
            ):
                self._graph.output(self._mapped(node.args[0]))
                break
            self._there[node] = self._node(node)
        made = fx.GraphModule(self._parts, self._graph)
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.recompile()
        made.eval()
        return made

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: self._there[node])

    def _node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return (
                self._graph.placeholder("x")
                if not self._there
                else (node.args[0] if node.args else None)
            )
        if node.op == "get_attr":
            return self._constant(str(node.target))
        if node.op == "call_module":
            return self._called(node, self._own.get_submodule(str(node.target)))
        if node.target is layer_output:
            return self._there[cast(fx.Node, node.args[0])]
        return self._function(node)

    def _constant(self, name: str) -> fx.Node:
        value = (
            self._constants[name]
            if name in self._constants
            else attrgetter(name)(self._own)
        )
        return self._graph.get_attr(self._kept(f"t{len(self._parts):03d}", value))

    def _kept(self, name: str, value: Any) -> str:
        self._parts[name] = value
        return name

    def _module(self, part: nn.Module, *given: Any) -> fx.Node:
        """A call of a module of its own; the second use of one is a copy."""
        if id(part) in self._used:
            part = copy.deepcopy(part)
        self._used.add(id(part))
        kind = type(part).__name__.lower()
        return self._graph.call_module(
            self._kept(f"p{len(self._parts):03d}_{kind}", part), given
        )

    # -- modules

    def _called(self, node: fx.Node, part: nn.Module) -> Any:
        if len(node.args) != 1 or node.kwargs:
            raise NotApplicable(
                code="module-takes-more",
                name=str(node.target),
                module=type(part).__name__,
            )
        given = self._there[cast(fx.Node, node.args[0])]
        if isinstance(part, NOTHING):
            return given
        if isinstance(part, _BatchNorm):
            return self._norm(node, part, given)
        if isinstance(part, self._activations):
            return self._module(self._activation(part), self._alone(given))
        if isinstance(part, _UPSAMPLING):
            return self._module(
                Resize(part.size, part.scale_factor, part.mode, part.align_corners),
                given,
            )
        if isinstance(part, MAXIMA):
            return self._module(part, self._alone(given))
        if isinstance(part, _PLAIN) and type(part).__module__.startswith(
            ("torch.", "timm.")
        ):
            return self._module(part, given)
        raise NotApplicable(
            code="no-rule-module",
            module=type(part).__name__,
            name=str(node.target),
            there=self._has(),
        )

    def _has(self) -> str:
        names = ", ".join(kind.__name__ for kind in self._activations)
        return f"there is one for convolutions, linear layers, batch norms, pooling, sums of branches, {names}"

    def _norm(self, node: fx.Node, norm: _BatchNorm, given: fx.Node) -> fx.Node:
        """Merged into the convolution or linear layer whose only reader it is; else as
        it stands.
        """
        if norm.running_mean is None:
            raise NotApplicable(code="batch-norm-statistics", name=str(node.target))
        before = (
            self._parts.get(str(given.target)) if given.op == "call_module" else None
        )
        alone = not given.users and _read_once(cast(fx.Node, node.args[0]))
        if not alone or not isinstance(before, nn.Linear | nn.Conv1d | nn.Conv2d):
            return self._module(norm, given)
        fuse: Any = (
            fuse_linear_bn_eval
            if isinstance(before, nn.Linear)
            else fuse_conv_bn_eval
        )
        self._parts[str(given.target)] = fuse(before, norm)
        return given

    def _alone(self, given: fx.Node) -> fx.Node:
        """For captum, whose hook sets the gradient of what a module is given, also of
        what others read of it: a copy.
        """
        return (
            given if self._sums else self._graph.call_function(torch.clone, (given,))
        )

    def _activation(self, part: nn.Module) -> nn.Module:
        """A copy that is not in place; for captum, which has no rule for ReLU6, as two
        ReLUs.
        """
        return (
            Clipped()
            if isinstance(part, nn.ReLU6) and not self._sums
            else _fresh(part)
        )

    # -- functions and methods

    def _function(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = self._mapped(node.args), dict(self._mapped(node.kwargs))
        if self._is_size(node):
            self._sizes.add(node)
            return self._copied(node)
        kwargs.pop("training", None)
        if target in _ACTIVATIONS:
            return self._activated(
                node, _ACTIVATIONS[target](*args[1:], **kwargs), args[0]
            )
        if target in _ADD and len(args) == 2 and not kwargs and self._are_maps(node):
            return self._added(*args)
        if target in _MADE:
            first = args[0] if args else kwargs.pop("input")
            return self._module(
                _MADE[target](*args[1:], **kwargs), self._alone(first)
            )
        if target in _MOVES:
            return self._copied(node)
        name = (
            target
            if isinstance(target, str)
            else getattr(target, "__name__", str(target))
        )
        raise NotApplicable(code="no-rule-operation", name=name, there=self._has())

    def _copied(self, node: fx.Node) -> fx.Node:
        return self._graph.node_copy(node, lambda source: self._there[source])

    def _activated(self, node: fx.Node, part: nn.Module, given: fx.Node) -> fx.Node:
        if not isinstance(part, self._activations):
            raise NotApplicable(
                code="no-rule-function", module=type(part).__name__, there=self._has()
            )
        return self._module(self._activation(part), self._alone(given))

    def _added(self, first: fx.Node, second: fx.Node) -> fx.Node:
        if not self._sums:
            return self._module(Add(), first, second)
        from zennit.layer import Sum  # type: ignore[import-untyped]

        return self._module(
            Sum(),
            self._graph.call_function(torch.stack, ([first, second],), {"dim": -1}),
        )

    def _are_maps(self, node: fx.Node) -> bool:
        """Both come from the image: a constant that is added is not a branch."""
        both = [
            arg
            for arg in node.args
            if isinstance(arg, fx.Node)
            and arg not in self._sizes
            and arg.op != "get_attr"
        ]
        return len(both) == 2

    def _is_size(self, node: fx.Node) -> bool:
        """A number about shapes, not of the image."""
        if node.target in _SIZES or (node.target is torch._assert):
            return True
        known = all(source in self._sizes for source in node.all_input_nodes)
        return node.target in (*_ARITHMETIC, operator.getitem) and known


def _read_once(node: fx.Node) -> bool:
    """Whether what a node gives is read in one place, marks apart."""
    while node.target is layer_output:
        if len(node.users) != 1:
            return False
        node = cast(fx.Node, node.args[0])
    return len(node.users) == 1


def _fresh(part: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(part)
    if hasattr(fresh, "inplace"):
        setattr(fresh, "inplace", False)  # noqa: B010 - not every kind has it
    return fresh


# ---- where relevance starts


def start(
    found: Canonical, prepared: Tensor, target: Target
) -> tuple[Tensor, Tensor, float]:
    """What of the score each raw output gives, its share of it (the gradient), and the
    score.

    Raises `NotApplicable` for a target that is not a sum of outputs, as a probability or a
    cosine: there relevance has no start.
    """
    with torch.no_grad():
        raw = found.module(prepared)
    if not isinstance(raw, Tensor):
        raise NotApplicable(code="relevance-one-tensor")
    leaf = raw.detach().requires_grad_()
    with torch.enable_grad():
        score = target.of(found.read(leaf)).sum()
        (share,) = torch.autograd.grad(score, [leaf])
    given, value = leaf.detach() * share, float(score.detach())
    if abs(float(given.sum()) - value) > LINEAR * max(
        abs(value), float(given.abs().sum()), 1e-12
    ):
        raise NotApplicable(
            code="relevance-weighted-sum", target=target.name, score=target.score
        )
    return given, share, value
