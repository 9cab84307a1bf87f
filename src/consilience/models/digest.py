"""Digests of a network: its weights, its architecture, and whether they have changed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn


def _hash(*parts: Any) -> str:
    return blake2b(repr(parts).encode(), digest_size=12).hexdigest()


# ---- digests

_weights: WeakKeyDictionary[nn.Module, tuple[list[ref[Tensor]], list[Any], str]] = (
    WeakKeyDictionary()
)
_LIBRARIES = ("torch.", "torchvision.", "timm.")


class TensorWatch:
    """Whether tensors are still the same, and what is in them: their place, their
    version, and up to sixteen of their values, because writes through ``.data`` are not
    counted anywhere.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._samples: dict[Any, list[Tensor]] = {}
        for tensor in self._tensors:
            self._samples.setdefault((tensor.device, tensor.dtype), []).append(
                _few(tensor)
            )
        self._then, self._values = self._now(), self._sampled()

    def same(self) -> bool:
        """Nothing has changed since."""
        return self._then == self._now() and all(
            map(torch.equal, self._values, self._sampled())
        )

    def _now(self) -> list[tuple[int, int]]:
        return [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in self._tensors
        ]

    def _sampled(self) -> list[Tensor]:
        return [torch.cat(samples) for samples in self._samples.values()]


class ModuleWatch:
    """Whether a module is still as it was: its parts, their settings, its tensors and
    what is in them.

    A look costs about half a millisecond, a digest twelve.
    """

    def __init__(
        self, module: nn.Module, volatile: frozenset[str] = frozenset()
    ) -> None:
        named = dict(module.named_modules())
        # held, so that no new object gets the number of an old one
        self._parts = list(named.values())
        self._skipped = {
            id(vars(part)): {
                key.rpartition(".")[2]
                for key in volatile
                if key.rpartition(".")[0] == name
            }
            for name, part in named.items()
        }
        self._tables = [
            table
            for part in self._parts
            for table in (part._modules, part._parameters, part._buffers)
        ]
        buffers = [
            buffer
            for name, buffer in module.named_buffers()
            if _key(name) not in volatile
        ]
        self._tensors = TensorWatch([*module.parameters(), *buffers])
        self._settings = [
            (vars(part), dict(self._kept(vars(part)))) for part in self._parts
        ]
        lists = [
            value
            for _, then in self._settings
            for value in then.values()
            if isinstance(value, list)
        ]
        self._lists = [(value, list(value)) for value in lists]
        self._then = self._now()

    def same(self) -> bool:
        """Nothing has changed since."""
        try:
            settings = all(self._kept(now) == then for now, then in self._settings)
            settings = settings and all(now == then for now, then in self._lists)
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ):  # arrays among the settings, of which one is another now
            return False
        return settings and self._then == self._now() and self._tensors.same()

    def _kept(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A part's settings without those that a pass changes."""
        skipped = self._skipped[id(settings)]
        if not skipped:  # nearly always: no copy
            return settings
        return {key: part for key, part in settings.items() if key not in skipped}

    def _now(self) -> list[int]:
        return [id(value) for table in self._tables for value in table.values()]


def _few(tensor: Tensor) -> Tensor:
    """Up to sixteen values of a tensor, not copied: they follow it.

    None of one whose values do not lie side by side.
    """
    tensor = tensor.detach()
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    flat = tensor.as_strided((tensor.numel() if dense else 0,), (1,))
    return flat[:: max(1, len(flat) // 8)]


def module_digest(
    module: nn.Module, settings: str, volatile: frozenset[str] = frozenset()
) -> str:
    """Hex digest of the weights, the architecture with its settings, and ``settings``;
    without ``volatile`` ones, which a pass changes.
    """
    parts = [
        settings,
        architecture(module, volatile),
        weights_digest(module, volatile),
    ]
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _key(name: str) -> str:
    """A tensor's name as a part's name and its own, joined by a dot."""
    return name if "." in name else f".{name}"


def weights_digest(module: nn.Module, volatile: frozenset[str] = frozenset()) -> str:
    """Hex digest of the state dict, tensor by tensor in order; hashed again only where
    a tensor has been written to.
    """
    tensors = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and _key(name) not in volatile
    }
    stamps = [_stamp(tensor) for tensor in tensors.values()]
    refs, then, found = _weights.get(module, ([], [], ""))
    # By identity: weak references that are alive compare what they refer to, and
    # tensors compare value by value.
    if then == stamps and all(
        one() is tensor for one, tensor in zip(refs, tensors.values(), strict=True)
    ):
        return found
    state = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        )
    _weights[module] = (
        [ref(tensor) for tensor in tensors.values()],
        stamps,
        state.hexdigest(),
    )
    return state.hexdigest()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor does: its place, its version, and a few values for writes
    through ``.data``, uncounted.
    """
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // 8)].tolist()
    count = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), count, repr(few)


def architecture(module: nn.Module, volatile: frozenset[str] = frozenset()) -> str:
    """Every submodule with its class, settings and plain attributes; for classes of
    nobody's library, their source too.
    """
    return "\n".join(
        line
        for name, part in module.named_modules()
        for line in _described(name, part, volatile)
    )


def _described(name: str, part: nn.Module, volatile: frozenset[str]) -> Iterator[str]:
    kind: Any = type(part)
    yield f"{name}: {kind.__module__}.{kind.__qualname__}({part.extra_repr()})"
    yield from (
        f"  {key}={value!r}"
        for key, value in sorted(vars(part).items())
        if key != "training" and _plain(value) and f"{name}.{key}" not in volatile
    )
    yield _source(kind)
    if graph := _graph(part):
        yield graph


def _graph(part: nn.Module) -> str:
    """What a part computes where no class says it: the graph of a script, without the
    places in files that it was made of, or of an exported program.
    """
    if isinstance(part, torch.jit.ScriptModule):
        return re.sub(r"\s*#.*", "", str(getattr(part, "inlined_graph", "")))
    graph = vars(part).get("graph")
    return str(graph) if isinstance(graph, torch.fx.Graph) else ""


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)


@cache
def _source(kind: Any) -> str:
    if f"{kind.__module__}.".startswith(_LIBRARIES):
        return ""
    forward = getattr(kind, "forward", None)
    code = getattr(forward, "__code__", None)
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        text = ""
        if code is not None:
            text = repr((code.co_code, code.co_consts, code.co_names))
    return text + "".join(_enclosed(forward, code))


def _enclosed(forward: Any, code: Any) -> Iterator[str]:
    """Plain values that a pass reads from the function around its class."""
    cells = getattr(forward, "__closure__", None) or ()
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # not yet set
            continue
        if _plain(value):
            yield f"\n  {name}={value!r}"
