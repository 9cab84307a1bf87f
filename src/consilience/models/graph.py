"""A network's pass as a graph that can be cut after a layer: what is known of an image
there, and what runs again.

Nothing here keeps a module: nodes name its parts and run on the module that is given,
so that weights are always its own.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

Values = dict[fx.Node, Any]
Grow = Callable[[Any, int], Any]
_tracing = threading.RLock()


class Uncut(Exception):  # noqa: N818 - a reason, not a fault
    """The network, or this layer of it, cannot be had as a graph; says why in one line."""


def layer_output(value: Any, layer: str) -> Any:
    """What a layer returned: a mark in the graph."""
    return value


# ---- tracing


@dataclass(frozen=True)
class Dialect:
    """What a family of networks needs left whole: kinds of modules, functions, and
    python modules of functions.

    Modules named in ``opened`` are looked into all the same.
    """

    leaves: tuple[type, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    rooms: tuple[Any, ...] = ()
    opened: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Traced:
    """A graph whose nodes name parts of a module, and the tensors that the module made
    while it was traced.
    """

    nodes: tuple[fx.Node, ...]
    constants: dict[str, Any]


def dialects(module: nn.Module, layer: str) -> list[Dialect]:
    """The ways in which a module may be traced, in the order to try them: its library's
    own, with what holds ``layer`` opened; then plainly, which some families need.
    """
    leaves, functions, rooms = _customs(module)
    parts = dict(module.named_modules())
    steps = layer.split(".")
    above = (".".join(steps[:end]) for end in range(1, len(steps)))
    return [
        Dialect(
            leaves,
            functions,
            rooms,
            frozenset(name for name in above if isinstance(parts[name], leaves)),
        ),
        Dialect(),
    ]


def _customs(
    module: nn.Module,
) -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...], tuple[Any, ...]]:
    """What the libraries that a module is made of want left whole."""
    from torchvision import ops

    if any(type(part).__module__.startswith("timm.") for part in module.modules()):
        from timm.layers import get_notrace_functions, get_notrace_modules

        functions = tuple(
            function for function in get_notrace_functions() if callable(function)
        )
        return tuple(get_notrace_modules()), functions, (ops,)
    return (
        tuple(
            kind
            for kind in vars(ops).values()
            if isinstance(kind, type) and issubclass(kind, nn.Module)
        ),
        (),
        (ops,),
    )


def trace_graph(module: nn.Module, dialect: Dialect) -> Traced:
    """The module's graph; raises `Uncut` where it has none.

    The module, in eval mode already, comes back as it was: tracing stores constants in
    it, and some modules what they saw.
    """
    try:
        return _traced(module, dialect)
    except Exception as error:  # a tracer trips over whatever it is
        raise Uncut(in_a_line(error)) from error


def in_a_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _traced(module: nn.Module, dialect: Dialect) -> Traced:
    own = set(vars(module))
    with (
        _tracing,
        _attributes_kept(module),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        graph = _Tracer(dialect).trace(module, concrete_args=_defaults(module))
        constants = {
            name: value for name, value in vars(module).items() if name not in own
        }
    return Traced(tuple(graph.nodes), constants)


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """The attributes of every part come back as they were, and what their dictionaries
    and lists hold.
    """
    saved = [(part, dict(vars(part))) for part in module.modules()]
    held = [pair for _, before in saved for pair in _contents(before)]
    try:
        yield
    finally:
        for container, content in held:
            _refill(container, content)
        for part, before in saved:
            now = vars(part)
            for name in set(now) - set(before):
                del now[name]
            now.update(before)


Container = dict[Any, Any] | list[Any] | set[Any]


def _contents(
    value: Container, known: frozenset[int] = frozenset()
) -> Iterator[tuple[Container, list[Any]]]:
    """The containers within a container, with what each of them holds."""
    values = value.values() if isinstance(value, dict) else value
    for one in values:
        if isinstance(one, dict | list | set) and id(one) not in known:
            yield one, list(one.items() if isinstance(one, dict) else one)
            yield from _contents(one, known | {id(one)})


def _refill(container: Container, content: list[Any]) -> None:
    now = list(container.items() if isinstance(container, dict) else container)
    if len(now) == len(content) and all(map(_unmoved, now, content)):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _unmoved(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def _defaults(module: nn.Module) -> dict[str, Any]:
    """All parameters of ``forward`` beyond the image, at their defaults: as the module
    is called.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return {
        each.name: each.default
        for each in parameters
        if each.default is not inspect.Parameter.empty
    }


class _Tracer(fx.Tracer):
    """Marks what every module returns. Other threads may run modules meanwhile: tracing
    patches all modules' calls.
    """

    proxy_buffer_attributes = True

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(
            autowrap_modules=(math, *dialect.rooms),
            autowrap_functions=dialect.functions,
        )
        self._dialect, self._thread = dialect, threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._dialect.leaves):
            return module_qualified_name not in self._dialect.opened
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if not isinstance(output, fx.Proxy):
            return output
        return self.create_proxy(
            "call_function", layer_output, (output, self.path_of_module(m)), {}
        )

    def getattr(
        self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


# ---- cutting


@dataclass(frozen=True, eq=False)
class Cut:
    """A graph cut after a layer.

    ``start`` is what the layer returns, ``after`` everything that depends on it (and
    the weights that takes), ``before`` everything else, and ``kept`` the values of
    ``before`` that ``after`` takes: a residual's skip, class tokens, shapes.
    """

    before: tuple[fx.Node, ...]
    start: fx.Node
    after: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]


def cut(traced: Traced, layer: str) -> Cut:
    """Cut after what ``layer`` returns; raises `Uncut` where that is no one node of the
    graph.
    """
    marks = [
        node
        for node in traced.nodes
        if node.target is layer_output and node.args[1] == layer
    ]
    if len(marks) != 1:
        raise Uncut(f"the graph has {len(marks)} values of layer {layer!r}")
    depends = {marks[0]}
    for node in traced.nodes:
        if node.op == "output" or any(
            source in depends for source in node.all_input_nodes
        ):
            depends.add(node)
    taken = {
        source
        for node in depends
        if node is not marks[0]
        for source in node.all_input_nodes
    } - depends
    weights = {node for node in taken if node.op == "get_attr"}
    before = tuple(node for node in traced.nodes if node not in depends)
    after = tuple(
        node
        for node in traced.nodes
        if node in depends | weights and node is not marks[0]
    )
    return Cut(
        before,
        marks[0],
        after,
        tuple(node for node in before if node in taken - weights),
    )


def only_reader(cut: Cut) -> tuple[fx.Node, fx.Node, frozenset[fx.Node]] | None:
    """The module call that alone reads the layer, the mark of what it returns, and the
    nodes up to that mark; or None.
    """
    node, passed = cut.start, []
    while len(node.users) == 1:
        (reader,) = node.users
        passed.append(reader)
        if reader.op == "call_module":
            mark = next(iter(reader.users), None)
            alone = (
                len(reader.users) == 1
                and mark is not None
                and mark.target is layer_output
                and len(reader.all_input_nodes) == 1
            )
            return (
                (
                    reader,
                    cast(fx.Node, mark),
                    frozenset([*passed, cast(fx.Node, mark)]),
                )
                if alone
                else None
            )
        if reader.target is not layer_output:
            return None
        node = reader
    return None


# ---- running


class GraphSection:
    """Nodes in order, run on a module.

    A value is let go after its last use unless it is in ``keep``.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        keep: Sequence[fx.Node],
        constants: dict[str, Any],
    ) -> None:
        self._nodes, self._keep, self._constants = (
            tuple(nodes),
            frozenset(keep),
            constants,
        )
        self._last = self._last_uses()

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        seen: set[fx.Node] = set(self._keep)
        last: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(self._nodes):
            here = {node, *node.all_input_nodes} - seen
            last[node] = list(here)
            seen |= here
        return last

    def run(
        self,
        module: nn.Module,
        values: Values,
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        """Run the nodes on what ``values`` hold, adding to them; returns what the graph
        returns, where the section ends so.
        """
        value = None
        for node in self._nodes:
            value = values[node] = self._value(module, node, values)
            if watch is not None:
                watch(value)
            for dead in self._last[node]:
                values.pop(dead, None)
        return value

    def _value(self, module: nn.Module, node: fx.Node, values: Values) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            return _argument(node, values)
        if node.op == "get_attr":
            return (
                self._constants[target]
                if target in self._constants
                else attrgetter(target)(module)
            )
        args = fx.map_arg(node.args, values.__getitem__)
        if node.op == "output":
            return cast(tuple[Any, ...], args)[0]
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        function = (
            module.get_submodule(target) if node.op == "call_module" else target
        )
        return function(*args, **kwargs)


def _argument(node: fx.Node, values: Values) -> Any:
    """The image was put into ``values``; whatever else ``forward`` takes is at its
    default.
    """
    if node in values:
        return values[node]
    if str(node.target).startswith("*"):
        return {} if str(node.target).startswith("**") else ()
    return node.args[0]


# ---- from one image to many


def growth(one: Any, two: Any) -> Grow:
    """How a value of one image becomes the value of n copies of it, learned from the
    values of one and of two.

    Sizes that count images are scaled, tensors expanded or repeated along the side that
    grew, everything else stays.
    """
    if isinstance(one, Tensor):
        return _tensor_growth(one, two)
    if isinstance(one, list | tuple):
        each = [growth(*pair) for pair in zip(one, two, strict=True)]
        return lambda value, n: _like(
            value, [grow(item, n) for grow, item in zip(each, value, strict=True)]
        )
    if isinstance(one, dict):
        by_key = {key: growth(one[key], two[key]) for key in one}
        return lambda value, n: {
            key: grow(value[key], n) for key, grow in by_key.items()
        }
    if isinstance(one, int | float) and not isinstance(one, bool) and one != two:
        return lambda value, n: value + (two - one) * (n - 1)
    return lambda value, n: value


def _like(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _tensor_growth(one: Tensor, two: Tensor) -> Grow:
    grown = [axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis]]
    if not grown and _same(one, two):
        return lambda value, n: value
    if len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise Uncut(
            f"a value of {tuple(one.shape)} becomes {tuple(two.shape)} for two images"
        )
    axis = grown[0]
    if one.shape[axis] == 1:
        return lambda value, n: value.expand(
            *value.shape[:axis], n, *value.shape[axis + 1 :]
        )
    if _same(torch.cat([one, one], axis), two):
        return lambda value, n: torch.cat([value] * n, axis)
    if _same(one.repeat_interleave(2, axis), two):
        return lambda value, n: value.repeat_interleave(n, axis)
    raise Uncut(
        f"how a value of {tuple(one.shape)} grows with the number of images is not known"
    )


def _same(one: Tensor, two: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, two)
    scale = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=1e-3, atol=1e-3 * scale)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value of the graph."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def copied(value: Any) -> Any:
    """The value with every tensor copied, for what runs afterwards to write to."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return (
        _like(value, [copied(item) for item in value])
        if isinstance(value, list | tuple)
        else value
    )
