"""Batch norms on the way to a gradient: a scale and a shift of each channel, and part of the
convolution before them where there is one.

Gradients of a model's outputs ask nothing of its weights, so a batch norm that has its
statistics needs to keep nothing; and straight behind a convolution it is part of that
convolution's own weights. `PairedNorms` watches a pass and finds the pairs; `FoldedNorms`
runs each as one convolution. What comes out of it is the norm's output: whatever else
looks at it in between ends the pass, which then runs without that pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from consilience.models.digest import TensorWatch

T = TypeVar("T")
NormPair = tuple[str, str]
"""Names of a convolution and of the batch norm behind it."""

_SAID = (
    bool,
    int,
    str,
    type(None),
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
)
"""What may be asked of a convolution's output before its norm: its shape and kind."""

# ---- a scale and a shift


class PlainNorms(TorchFunctionMode):
    """While it is on, batch norms that have their statistics are what they are: a scale
    and a shift of each channel.

    Torch's own keeps its input for the backward pass, which nothing but gradients of the
    statistics needs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """``x * scale + shift`` for a batch norm; anything else as it is."""
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            call = _Call(*args, **kwargs)
            found = _scale_and_shift(call)
            if found is not None:
                shape = (1, -1, *(1,) * (call.input.dim() - 2))
                scale, shift = (one.view(shape) for one in found)
                return torch.addcmul(shift, call.input, scale)
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Call:
    """What a batch norm is called with."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _scale_and_shift(call: _Call) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (C,) of a norm; None where the statistics are the batch's own, or
    parameters are asked for.
    """
    mean, var, weight, bias = (
        call.running_mean,
        call.running_var,
        call.weight,
        call.bias,
    )
    asked = [one for one in (weight, bias) if one is not None and one.requires_grad]
    if call.training or mean is None or var is None or asked:
        return None
    scale = (var + call.eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift


# ---- which norm is whose


class PairedNorms(TorchFunctionMode):
    """While it is on, notes which convolution's output goes to which batch norm, and
    nowhere else.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        parts = [
            (name, part)
            for name, part in module.named_modules()
            if not isinstance(part, torch.jit.ScriptModule)
        ]
        self._convolutions = {
            id(part.weight): name
            for name, part in parts
            if type(part._parameters.get("weight")) is nn.Parameter
        }
        self._norms = {
            id(part.running_mean): name
            for name, part in parts
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
        }
        self._outputs: _Outputs[str] = _Outputs()
        self._calls: Counter[str] = Counter()
        self._found: dict[str, str] = {}
        self._others: set[str] = set()

    def pairs(self) -> tuple[NormPair, ...]:
        """Those of every pass so far, in order."""
        return tuple(
            (name, norm)
            for name, norm in self._found.items()
            if name not in self._others and not self._calls[name]
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function as it is."""
        kwargs = kwargs or {}
        said = func(*args, **kwargs)
        if func is functional.batch_norm:
            self._goes_to(_Call(*args, **kwargs))
        elif not isinstance(said, _SAID):
            self._others.update(self._outputs.among(args, kwargs))
        if func is functional.conv2d and len(args) > 2:
            name = self._convolutions.get(id(args[1]))
            if name is not None:
                self._calls[name] += 1
                self._outputs.add(said, name)
        return said

    def _goes_to(self, call: _Call) -> None:
        norm = None if call.training else self._norms.get(id(call.running_mean))
        for name in self._outputs.among([call.input], {}):
            self._calls[name] -= 1
            if norm is None or self._found.setdefault(name, norm) != norm:
                self._others.add(name)


class _Outputs(Generic[T]):
    """What is known of tensors, as long as somebody has them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], T]] = {}

    def add(self, output: Tensor, value: T) -> None:
        """A tensor and what is to be known of it."""
        number = id(output)
        self._known[number] = (
            ref(output, lambda _: self._known.pop(number, None)),
            value,
        )

    def among(self, args: Collection[Any], kwargs: Mapping[str, Any]) -> list[T]:
        """What is known of those that a function is given, lists looked into."""
        if not self._known:
            return []
        found = (self._known.get(number) for number in _handed_over(args, kwargs))
        return [one[1] for one in found if one is not None]


def _handed_over(args: Collection[Any], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """Ids of what a function is given, lists looked into."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from map(id, value)
        else:
            yield id(value)


# ---- as one convolution


class UnfoldedError(Exception):
    """Something else looks at what lies between a convolution and its norm."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, eq=False)
class FoldedConvolution:
    """Weight and bias of a convolution ``part`` with the norm behind it, ``norm_part``;
    ``bias_of`` and ``norm`` are what the two are called with.
    """

    name: str
    part: nn.Module
    norm_part: nn.Module
    weight: Tensor
    bias: Tensor
    bias_of: Tensor | None
    norm: _Call

    def is_norm(self, call: _Call) -> bool:
        """Whether a batch norm is called as this one's."""
        names = ("running_mean", "running_var", "weight", "bias")
        same = all(getattr(call, one) is getattr(self.norm, one) for one in names)
        return same and not call.training and call.eps == self.norm.eps


class FoldedNorms(PlainNorms):
    """While it is on, pairs run as one convolution, other batch norms as a scale and a
    shift. Raises `UnfoldedError` where a pair is none in this pass.
    """

    def __init__(self, folded: Mapping[int, FoldedConvolution]) -> None:
        super().__init__()
        self._folded = folded
        self._outputs: _Outputs[tuple[Tensor, FoldedConvolution]] = _Outputs()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function, or what stands for it."""
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            call = _Call(*args, **kwargs)
            for output, one in self._outputs.among([call.input], {}):
                if not one.is_norm(call):
                    raise UnfoldedError(one.name)
                return output
        known = None
        if func is functional.conv2d and len(args) > 2:
            known = self._folded.get(id(args[1]))
        if known is not None and args[2] is known.bias_of:
            output = func(args[0], known.weight, known.bias, *args[3:], **kwargs)
            # another tensor of the same values: who holds it has not been to the norm
            before = output.view_as(output)
            self._outputs.add(before, (output, known))
            return before
        said = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(said, _SAID):
            for _, one in self._outputs.among(args, kwargs):
                raise UnfoldedError(one.name)
        return said


@dataclass(eq=False)
class _Folds:
    """What is folded of a module for one layout, as long as its tensors are as they were."""

    watch: TensorWatch
    convolutions: dict[int, FoldedConvolution]

    def same(self) -> bool:
        """Whether convolutions have the weights that were folded, as they were."""
        return self.watch.same() and all(
            id(one.part._parameters["weight"]) == number
            for number, one in self.convolutions.items()
        )


_folds: WeakKeyDictionary[nn.Module, dict[Any, _Folds]] = WeakKeyDictionary()
_unfolded: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def run_folded(
    module: nn.Module,
    pairs: Sequence[NormPair],
    layout: torch.memory_format,
    run: Callable[[], Tensor],
) -> Tensor:
    """What ``run`` returns with pairs of ``module`` as one convolution each, but for those
    that somebody has hooks on: they expect what lies between.

    The caller has borrowed and frozen the module. Memory: the folded weights, as much
    again as those convolutions have, kept as long as the module.
    """
    while True:
        try:
            with folding(module, pairs, layout):
                return run()
        except UnfoldedError as error:
            _unfolded.setdefault(module, set()).add(error.name)


def folding(
    module: nn.Module, pairs: Sequence[NormPair], layout: torch.memory_format
) -> FoldedNorms:
    """Pairs as one convolution each while it is on, but for those that were seen not to be
    pairs, or have hooks.
    """
    apart = _unfolded.get(module, ())
    return FoldedNorms(
        {
            number: one
            for number, one in _folded(module, pairs, layout).items()
            if one.name not in apart
            and not any(map(_is_hooked, (one.part, one.norm_part)))
        }
    )


def _is_hooked(part: nn.Module) -> bool:
    hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks
    return any(hooks)


def folded_tensors(module: nn.Module) -> list[Tensor]:
    """Weights that were made of the module's, not its own."""
    return [
        tensor
        for made in _folds.get(module, {}).values()
        for one in made.convolutions.values()
        for tensor in (one.weight, one.bias)
    ]


def _folded(
    module: nn.Module, pairs: Sequence[NormPair], layout: torch.memory_format
) -> dict[int, FoldedConvolution]:
    kept = _folds.setdefault(module, {})
    made = kept.get(layout)
    if made is None or not made.same():
        kept.clear()  # one layout at a time: the weights are large
        made = kept[layout] = _fold(module, pairs, layout)
    return made.convolutions


def _fold(
    module: nn.Module, pairs: Sequence[NormPair], layout: torch.memory_format
) -> _Folds:
    folded: dict[int, FoldedConvolution] = {}
    watched: list[Tensor] = []
    for name, norm_name in pairs:
        part: Any = module.get_submodule(name)
        norm: Any = module.get_submodule(norm_name)
        weight, bias = part.weight, part.bias
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        call = _Call(weight, *statistics, eps=norm.eps)
        found = _scale_and_shift(call)
        if found is None:
            continue
        scale, shift = found
        one = FoldedConvolution(
            name,
            part,
            norm,
            (weight * scale.view(-1, 1, 1, 1)).contiguous(memory_format=layout),
            shift if bias is None else shift + bias * scale,
            bias,
            call,
        )
        if bool(one.weight.isfinite().all() and one.bias.isfinite().all()):
            folded[id(weight)] = one
            tensors = (weight, bias, *statistics)
            watched += [tensor for tensor in tensors if tensor is not None]
    return _Folds(TensorWatch(watched), folded)
