"""What a network is made of, found by watching it run: its layers, the shape of what
they say, and where a CAM looks.

Nothing here knows a family of networks by name. One dry pass shows which modules return
one map or vector; a second one, with a gradient of NaN sent back, shows which of them
the outputs really depend on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from threading import RLock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from consilience.models.norms import NormPair, PairedNorms
from consilience.types import ConsilienceError, Layer

MOST_PREFIX_TOKENS = 5
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_locks_guard = RLock()

GridShape = tuple[int, int]
ForwardRun = Callable[[Tensor], Tensor]


# ---- borrowing


@contextmanager
def plain_torch() -> Iterator[None]:
    """Whatever the caller stands in: no inference mode and no autocast."""
    # to leave inference mode turns gradients on: only where it is on, then
    inside = torch.is_inference_mode_enabled()
    with (
        torch.inference_mode(False) if inside else nullcontext(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False)
        if torch.cuda.is_available()
        else nullcontext(),
    ):
        yield


def _as_written(parts: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Compiled parts run as they were written, so that hooks see what is in them: under
    torch.compile a hook is traced, and does not come to an end.
    """
    # set_stance takes most of a millisecond, so it is asked for where it is needed
    compiled = any(
        getattr(part, "_compiled_call_impl", None) is not None
        or "_orig_mod" in part._modules
        for part in parts
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def borrowed(module: nn.Module, eager: bool = True) -> Iterator[nn.Module]:
    """The module in eval mode in plain torch, for one thread at a time; the mode of
    every submodule comes back whatever happens. With ``eager`` its compiled parts run
    as they were written.
    """
    with _locks_guard:
        lock = _locks.setdefault(module, RLock())
    parts = list(module.modules())
    stance = _as_written(parts) if eager else nullcontext()
    with lock, plain_torch(), stance:
        training = [part for part in parts if part.training]
        try:
            for part in training:
                part.training = False
            yield module
        finally:
            for part in training:
                part.training = True


def weights_changed(module: nn.Module) -> None:
    """Tell a module that its weights are others now: what parts made of them and kept
    (the position biases of LeViT, TinyViT or EfficientFormer in eval mode) they make anew.

    Being set to train is what such parts listen to; the modes come back.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    for part, mode in modes:
        part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that a pass keeps only what the gradients of
    its inputs need.

    To be used within `borrowed`, which keeps other threads out; what asked before asks
    again afterwards.
    """
    with _asked(module, False):
        yield


@contextmanager
def asking(module: nn.Module) -> Iterator[None]:
    """Every parameter that can have a gradient asks for one; to be used within
    `borrowed`, and undone afterwards.
    """
    with _asked(module, True):
        yield


@contextmanager
def _asked(module: nn.Module, wanted: bool) -> Iterator[None]:
    others = [
        parameter
        for parameter in module.parameters()
        if parameter.is_floating_point() and parameter.requires_grad != wanted
    ]
    try:
        for parameter in others:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(not wanted)


@contextmanager
def hooked(hooks: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks that are gone afterwards."""
    handles: list[Any] = []
    try:
        handles.extend(part.register_forward_hook(hook) for part, hook in hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_outputs(said: Any, output: str | int | None = None) -> Tensor:
    """The one tensor (N, K) that a classifier returns, alone or in a tuple, a mapping or
    a result object.

    ``output`` names it by key, field or place. Without, it is ``logits`` where there is
    such, else the one thing in there that has the shape; several raise
    `ConsilienceError`, as does none.
    """
    name = output_name(said, output)
    return _as_rows(said if name is None else _parts_of(said)[name], said)


def output_name(said: Any, output: str | int | None = None) -> str | None:
    """Which part of a result are the scores; None where it is all of it, or none is."""
    if isinstance(said, Tensor) and output is None:
        return None
    parts = _parts_of(said)
    if output is not None:
        if str(output) not in parts:
            there = ", ".join(parts) or "a single tensor"
            raise ConsilienceError(
                f"the module returns no output {str(output)!r}; it returns {there}"
            )
        return str(output)
    if "logits" in parts:
        return "logits"
    scores = [name for name, value in parts.items() if _row_scores(value)]
    if len(scores) > 1:
        raise ConsilienceError(
            f"the module returns {len(scores)} tensors (N, K); name the one to explain by "
            f"output=: {', '.join(scores)}"
        )
    return scores[0] if scores else None


def _parts_of(said: Any) -> dict[str, Any]:
    """What a result holds, by key, field or place."""
    if isinstance(said, Mapping):
        return {str(key): value for key, value in said.items()}
    if is_dataclass(said):
        return {item.name: getattr(said, item.name) for item in fields(said)}
    if isinstance(said, tuple) and hasattr(said, "_fields"):
        named = dict(zip(said._fields, said, strict=True))
        return {str(place): value for place, value in enumerate(said)} | named
    if isinstance(said, tuple | list):
        return {str(place): value for place, value in enumerate(said)}
    if isinstance(said, Tensor) or not hasattr(said, "logits"):
        return {}
    return {
        name: value for name, value in vars(said).items() if isinstance(value, Tensor)
    } | {"logits": said.logits}


def _row_scores(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.dim() == 2 or _pointwise(value))
    )


def _pointwise(value: Tensor) -> bool:
    """Maps of one cell, as a fully convolutional classifier returns."""
    return value.dim() == 4 and tuple(value.shape[2:]) == (1, 1)


def _as_rows(value: Any, said: Any) -> Tensor:
    """(N, K) of one output; (N,) is one score an image."""
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.dim() == 2:
            return value
        if value.dim() == 1:
            return value[:, None]
        if _pointwise(value):
            return value.flatten(1)
    got = (
        f"shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else type(said).__name__
    )
    parts = ", ".join(_parts_of(said)) if value is said else ""
    raise ConsilienceError(
        f"a classifier returns one tensor (N, K) of class scores; this module returns {got}"
        + (f" of {parts}" if parts else "")
    )


# ---- forms


@dataclass(frozen=True)
class Form:
    """How to read a module's output as a map: its kind, channels, grid, tokens before
    the grid, and where channels stand.
    """

    kind: Literal["map", "tokens", "vector"]
    channels: int
    grid: GridShape | None = None
    prefix: int = 0
    channels_last: bool = False

    def as_map(self, values: Tensor) -> Tensor:
        """Raw output to (N, C, h, w): class and register tokens dropped, channels
        first; a vector is (N, C, 1, 1).
        """
        if self.kind == "vector":
            return values[:, :, None, None]
        if self.kind == "tokens":
            height, width = self._grid_of(values.shape[1] - self.prefix)
            grid = values[:, self.prefix :]
            return grid.reshape(len(grid), height, width, grid.shape[2]).permute(
                0, 3, 1, 2
            )
        return values.permute(0, 3, 1, 2) if self.channels_last else values

    def as_raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Inverse of `as_map`; class and register tokens are taken from ``like``, a raw
        output of as many images or one.
        """
        if self.kind == "vector":
            return maps[:, :, 0, 0]
        if self.kind == "tokens":
            grid = maps.flatten(2).transpose(1, 2)
            return torch.cat(
                [like[:, : self.prefix].expand(len(maps), -1, -1), grid], dim=1
            )
        return maps.permute(0, 2, 3, 1) if self.channels_last else maps

    def _grid_of(self, tokens: int) -> GridShape:
        """The grid of the dry pass, or one of the same shape where an image of another
        size is shown.
        """
        height, width = self.grid or (1, 1)
        scale = math.sqrt(tokens / (height * width))
        found = round(height * scale), round(width * scale)
        if found[0] * found[1] != tokens:
            raise ConsilienceError(
                f"{tokens} tokens form no grid like {height} x {width}"
            )
        return found


def form_of(
    shape: tuple[int, ...],
    frame: GridShape,
    seen: list[GridShape],
    last: bool = False,
) -> Form | None:
    """How to read an output of ``shape`` for one image of size ``frame``; None where it
    is neither a map nor a vector.

    ``seen`` are the grids of earlier maps: they tell tokens from other sequences and
    maps from attention matrices. ``last`` says where channels stood in the map before,
    for the rare cube whose shape does not tell.
    """
    if not shape or shape[0] != 1:
        return None
    if len(shape) == 2:
        return Form("vector", shape[1])
    if len(shape) == 3:
        return _token_form(shape[1], shape[2], frame, seen)
    return _map_form(shape[1:], frame, seen, last) if len(shape) == 4 else None


def _token_form(
    tokens: int, channels: int, frame: GridShape, seen: list[GridShape]
) -> Form | None:
    for grid in reversed(seen):
        prefix = tokens - grid[0] * grid[1]
        if 0 <= prefix <= MOST_PREFIX_TOKENS and tokens > 1:
            return Form("tokens", channels, grid, prefix)
    for height, width in reversed(seen):
        for step in (
            2,
            4,
        ):  # merged patches: Swin's pairs, TNT's inner grid of 4 x 4 pixels a patch
            merged = (-(-height // step), -(-width // step))
            if tokens == merged[0] * merged[1] > 1:
                return Form("tokens", channels, merged)
    return None if seen else _square_token_form(tokens, channels, frame)


def _square_token_form(tokens: int, channels: int, frame: GridShape) -> Form | None:
    """Where no map went before (patches embedded by a linear layer): a square grid in a
    square frame.
    """
    for prefix in range(MOST_PREFIX_TOKENS + 1 if frame[0] == frame[1] else 0):
        side = math.isqrt(max(tokens - prefix, 0))
        if side > 1 and side * side == tokens - prefix:
            return Form("tokens", channels, (side, side), prefix)
    return None


def _map_form(
    sides: tuple[int, ...], frame: GridShape, seen: list[GridShape], last: bool
) -> Form | None:
    first, middle, end = sides
    channels_first = _plausible((middle, end), frame, seen)
    channels_last = _plausible((first, middle), frame, seen)
    if channels_first and not (channels_last and last):
        return Form("map", first, (middle, end))
    return (
        Form("map", end, (first, middle), channels_last=True)
        if channels_last
        else None
    )


def _plausible(grid: GridShape, frame: GridShape, seen: list[GridShape]) -> bool:
    """Shaped like the image, no larger, and not an attention matrix (as many rows as
    there are tokens).
    """
    height, width = grid
    if height > frame[0] or width > frame[1]:
        return False
    slack = 0 if frame[0] == frame[1] else max(frame)
    if abs(height * frame[1] - width * frame[0]) > slack:
        return False
    tokens = any(
        0 <= height - rows * columns <= MOST_PREFIX_TOKENS for rows, columns in seen
    )
    return not tokens or grid in seen or height == 1


# ---- the dry pass


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What one dry pass showed: forms by layer in the order of the pass, and modules
    that ran more than once.

    ``outputs`` is the number of classes, ``largest`` the floats of the largest output,
    ``channels_last`` whether the module takes images in that layout: about twice as
    fast on a CPU, but some modules reshape by ``view``, which it breaks. ``volatile``
    are settings and buffers that a pass changes, such as a counter: they are no part
    of what the model is. ``norms`` are convolutions with a batch norm straight behind.
    """

    forms: dict[str, Form]
    repeated: dict[str, int]
    outputs: int
    largest: int
    channels_last: bool
    volatile: frozenset[str] = frozenset()
    norms: tuple[NormPair, ...] = ()

    def layers(self) -> tuple[Layer, ...]:
        """The layers as data."""
        return tuple(
            Layer(name, form.channels, form.grid, form.kind)
            for name, form in self.forms.items()
        )


def watched_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a module that can be watched, by name: scripted ones take no hooks."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if name and not isinstance(part, torch.jit.ScriptModule)
    ]


def examine(
    module: nn.Module, run: Callable[[Tensor, bool], Tensor], pixels: Tensor
) -> Anatomy:
    """Watch one pass of one image (1, 3, h, w); ``run`` maps pixels and layout to
    outputs (1, K) through ``module``.
    """
    try:
        return _examine(module, run, pixels, channels_last=True)
    except RuntimeError:
        return _examine(module, run, pixels, channels_last=False)


def _examine(
    module: nn.Module,
    run: Callable[[Tensor, bool], Tensor],
    pixels: Tensor,
    channels_last: bool,
) -> Anatomy:
    shapes: dict[str, tuple[int, ...] | None] = {}
    calls: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[name] += 1
            single = isinstance(output, Tensor) and output.is_floating_point()
            shapes[name] = tuple(output.shape) if single else None

        return hook

    named = watched_parts(module)
    before = _state(module)
    hooks = [(part, watch(name)) for name, part in named]
    with torch.no_grad(), hooked(hooks), PairedNorms(module) as norms:
        outputs = run(pixels, channels_last)
    if len(outputs) != len(pixels):
        raise ConsilienceError(
            f"a classifier returns a row of scores an image, (N, K); this module returns "
            f"{len(outputs)} scores for {len(pixels)} image"
        )
    repeated = {name: count for name, count in calls.items() if count > 1}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    forms = _forms(known, (int(pixels.shape[2]), int(pixels.shape[3])))
    once = {name: form for name, form in forms.items() if name not in repeated}
    largest = max([pixels.numel(), *map(math.prod, known.values())])
    after = _state(module)
    volatile = frozenset(key for key in after if before.get(key) != after[key])
    return Anatomy(
        once,
        repeated,
        int(outputs.shape[1]),
        largest,
        channels_last,
        volatile,
        norms.pairs(),
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """Plain settings of every part and the versions of its buffers, by name."""
    state: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, bool | int | float | str | None):
                state[f"{name}.{key}"] = value
            elif isinstance(value, list | tuple):
                state[f"{name}.{key}"] = (len(value), repr(value)[:200])
        for key, buffer in part._buffers.items():
            if buffer is not None:
                version = 0 if buffer.is_inference() else buffer._version
                state[f"{name}.{key}"] = (id(buffer), version)
    return state


def _forms(shapes: dict[str, tuple[int, ...]], frame: GridShape) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    seen: list[GridShape] = []
    last = False
    for name, shape in shapes.items():
        form = form_of(shape, frame, seen, last)
        if form is None:
            continue
        forms[name] = form
        if form.kind == "map":
            last = form.channels_last
        if form.grid is not None and form.grid not in seen and min(form.grid) > 1:
            seen.append(form.grid)
    return forms


# ---- the target layer


@dataclass(frozen=True, eq=False)
class _Call:
    name: str
    start: int
    end: int
    key: tuple[int, int]
    output: Tensor


def target_layer(
    module: nn.Module, run: ForwardRun, anatomy: Anatomy, pixels: Tensor
) -> str:
    """The last map before the head on which the outputs depend; of the modules that
    return it, the outermost.

    Dependence is found by sending NaN back from the outputs: it goes through every
    connection, whatever the weights, and leaves exact zeros elsewhere (the patches of a
    last block whose class token alone is read).
    """
    with torch.enable_grad():
        calls, outputs = _calls(module, run, pixels.detach().clone().requires_grad_())
        maps = _candidates(
            calls,
            outputs,
            anatomy,
            module,
            (int(pixels.shape[2]), int(pixels.shape[3])),
        )
        if not maps:
            often = max(anatomy.repeated.values(), default=0)
            why = (
                f" of its own: its layers run {often} times in one pass"
                if often and not anatomy.forms
                else "; name one with layer="
            )
            raise ConsilienceError(
                f"{type(module).__name__} has no layer that gives a map{why}"
            )
        reached = _reached(maps, outputs, anatomy) or maps
    last = reached[-1]
    same = [call for call in maps if call.key == last.key]
    return min(same, key=lambda call: (call.name.count("."), call.start)).name


def _calls(
    module: nn.Module, run: ForwardRun, pixels: Tensor
) -> tuple[list[_Call], Tensor]:
    """Every call that returns one tensor, in order of ending.

    All outputs are kept alive, so that addresses stay distinct.
    """
    starts: dict[nn.Module, int] = {}
    clock = iter(range(1_000_000_000))
    calls: list[_Call] = []

    def begin(part: nn.Module, _inputs: Any) -> None:
        starts[part] = next(clock)

    def watch(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                key = (output.data_ptr(), output._version)
                calls.append(_Call(name, starts[part], next(clock), key, output))

        return hook

    named = watched_parts(module)
    handles = [part.register_forward_pre_hook(begin) for _, part in named]
    try:
        with hooked([(part, watch(name)) for name, part in named]):
            return calls, run(pixels)
    finally:
        for handle in handles:
            handle.remove()


def _candidates(
    calls: list[_Call],
    outputs: Tensor,
    anatomy: Anatomy,
    module: nn.Module,
    frame: GridShape,
) -> list[_Call]:
    parts = dict(module.named_modules())
    passed = {
        call.key
        for call in calls
        if _pools_or_classifies(parts[call.name], anatomy.outputs)
    }
    every = [call for call in calls if _is_map(call, anatomy, frame)]
    maps = [call for call in every if call.key not in passed] or every
    head = _head(calls, maps, outputs)
    before = [
        call
        for call in maps
        if head is None or not f"{call.name}.".startswith(f"{head}.")
    ] or maps
    outside = [
        call for call in before if not _inside_attention(call.name, parts)
    ] or before
    width = anatomy.forms[outside[-1].name] if outside else None
    return [
        call
        for call in outside
        if width is None or _of_the_stream(anatomy.forms[call.name], width)
    ]


def _pools_or_classifies(part: nn.Module, classes: int) -> bool:
    if isinstance(part, nn.Linear):
        return part.out_features == classes
    # one channel, of a yes or no at every pixel, is an answer too
    return isinstance(part, _ADAPTIVE) or (
        isinstance(part, nn.Conv2d) and part.out_channels in (classes, 1)
    )


def _of_the_stream(form: Form, last: Form) -> bool:
    """Tokens as wide as the last ones: what flows through a transformer, not its
    queries, keys and values.
    """
    return form.kind != "tokens" or form.channels == last.channels


def _is_map(call: _Call, anatomy: Anatomy, frame: GridShape) -> bool:
    form = anatomy.forms.get(call.name)
    if form is None or form.grid is None or form.grid == (1, 1):
        return False
    return not (
        form.channels == 3 and form.grid == frame
    )  # a preprocessed image, not what a network makes of it


def _head(calls: list[_Call], maps: list[_Call], outputs: Tensor) -> str | None:
    """The outermost module that returns the outputs themselves and starts when there is
    a map already.
    """
    first = min((call.end for call in maps), default=math.inf)
    ends = [
        call
        for call in calls
        if call.output.data_ptr() == outputs.data_ptr() and call.start > first
    ]
    return min(ends, key=lambda call: call.name.count(".")).name if ends else None


def _inside_attention(name: str, parts: dict[str, nn.Module]) -> bool:
    steps = name.split(".")
    above = (
        type(parts[".".join(steps[:end])]).__name__.lower()
        for end in range(1, len(steps))
    )
    return any("attention" in kind or "attn" in kind for kind in above)


def _reached(maps: list[_Call], outputs: Tensor, anatomy: Anatomy) -> list[_Call]:
    able = [call for call in maps if call.output.requires_grad]
    # of one number, for which torch need not import what it reckons with symbols by
    total = (outputs * torch.full_like(outputs, math.nan)).sum()
    gradients = torch.autograd.grad(
        total, [call.output for call in able], allow_unused=True
    )
    return [
        call
        for call, gradient in zip(able, gradients, strict=True)
        if gradient is not None
        and bool(anatomy.forms[call.name].as_map(gradient).isnan().any())
    ]
