"""Engines: what runs behind ``scores``.

Each maps pixels to raw outputs and says in ``facts`` what it is.

`auto` is OpenVINO on a CPU and torch elsewhere. A converted or compiled network is held
against torch on the first images it sees; where it differs, or cannot be made, torch
runs instead and that is said and recorded. What OpenVINO made is kept on disk by
content.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consilience.models.engines.openvino_runtime import _openvino_capabilities
from consilience.types import ConsilienceError

MEMORY = 1 << 30
BACKWARD = 460_000_000
ENGINES = ("auto", "torch", "torch-compile", "openvino")
PRECISIONS = ("f32", "bf16", "f16")
TINY = 8
ENGINE_TOLERANCE = {"f32": 1e-4, "bf16": 0.1, "f16": 0.02}
LOW = {"bf16": torch.bfloat16, "f16": torch.float16}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BLOCK = 32 << 20

ForwardPass = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """Pixels (N, 3, h, w) in [0, 1] to raw outputs (N, K) float32, with the facts of
    how.
    """

    facts: dict[str, Any]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of at most a batch of images."""


class Runnable(Protocol):
    """What an engine needs of a network: its module, a plain torch pass through it, and
    how it wants to be run.
    """

    @property
    def module(self) -> nn.Module:
        """The user's own module."""

    @property
    def engine(self) -> str:
        """The engine asked for."""

    @property
    def precision(self) -> str:
        """The precision asked for."""

    @property
    def batch(self) -> int:
        """Images a pass."""

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of an image."""

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""

    @property
    def largest(self) -> int:
        """Floats of the largest layer's output for one image."""

    @property
    def own_precision(self) -> str:
        """What plain torch runs the weights in."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def digest(self) -> str:
        """Of weights, architecture and normalisation."""

    def run(self, pixels: Tensor) -> Any:
        """One torch pass, to the outputs; the caller has borrowed the module."""


# ---- devices, and what can be asked for


def check_engine(
    engine: str, precision: str, memory: int, device: torch.device
) -> None:
    """Refuse what no engine can do, in one line."""
    if engine not in ENGINES:
        raise ConsilienceError(
            f"engine is one of {', '.join(ENGINES)}; got {engine!r}"
        )
    if precision not in PRECISIONS:
        raise ConsilienceError(
            f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    if memory < 1 << 20:
        raise ConsilienceError(
            f"memory is in bytes, at least {1 << 20:,}; got {memory:,}"
        )
    if precision == "f16" and device.type == "cpu":
        raise ConsilienceError(
            "precision f16 needs an accelerator (cuda, mps); the model is on cpu, which has "
            "f32 and bf16"
        )
    if (
        precision == "bf16"
        and device.type == "mps"
        and not torch.backends.mps.is_macos_or_newer(14, 0)
    ):
        raise ConsilienceError(
            "precision bf16 needs macOS 14 on mps; take f16 or f32"
        )
    if engine == "openvino" and device.type != "cpu":
        raise ConsilienceError(
            f"engine openvino runs on the cpu; the model is on {device}"
        )
    if engine == "openvino" and not _has_openvino():
        raise ConsilienceError(
            "engine openvino is not installed; pip install openvino, or take engine=torch"
        )


def resolve_device(name: str) -> torch.device:
    """A device by name; ``auto`` is the first cuda accelerator there is, else the cpu."""
    if name == "auto":
        return (
            torch.device("cuda", 0)
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    there = _devices()
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConsilienceError(
            f"no device {name!r}; there is: auto, {', '.join(there)}"
        ) from None
    if found.index is None and f"{found.type}:0" in there:
        return torch.device(found.type, 0)
    if str(found) not in there:
        raise ConsilienceError(
            f"no device {name!r} here; there is: {', '.join(there)}"
        )
    return found


def _devices() -> list[str]:
    cuda = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    mps = ["mps:0"] if torch.backends.mps.is_available() else []
    return ["cpu", *cuda, *mps]


def bytes_of(size: str | int) -> int:
    """A number of bytes: ``2G``, ``500M``, ``1.5GiB``, ``64000000``; K, M and G are
    powers of 1024.

    >>> bytes_of("500M")
    524288000
    """
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:iB|B)?", str(size).strip(), flags=re.IGNORECASE
    )
    if match is None:
        raise ConsilienceError(
            f"memory is a number of bytes, or one with K, M or G: 500M, 2G; got {size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _has_openvino() -> bool:
    return find_spec("openvino") is not None


def plan_engine(engine: str, precision: str, device: torch.device) -> dict[str, Any]:
    """What will run: ``auto`` resolved, and the precision that the machine has."""
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" and _has_openvino() else "torch"
    planned = {"engine": engine, "precision": precision}
    if (
        precision == "bf16"
        and engine == "openvino"
        and "BF16" not in _openvino_capabilities()
    ):
        return planned | {
            "precision": "f32",
            "note": "bf16 was asked for; this cpu has no bf16 arithmetic, so f32 runs",
        }
    if precision == "bf16" and engine != "openvino" and not native_bf16(device):
        return planned | {
            "note": f"this {device.type} has no bf16 arithmetic: torch emulates it, slower than f32"
        }
    if (
        precision == "f32"
        and device.type == "cuda"
        and torch.backends.cudnn.allow_tf32
    ):
        return planned | {
            "note": "convolutions in tf32, as torch has it unless torch.backends.cudnn.allow_tf32 is False"
        }
    return planned


@cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself: AVX512-BF16 or AMX on a CPU, compute
    capability 8 on CUDA.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(
            device
        ) >= (8, 0)
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    known = (
        getattr(torch.cpu, name, None)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(bool(ask()) for ask in known if ask is not None)


def native_low(precision: str, device: torch.device) -> bool:
    """Whether the device multiplies in that low precision itself."""
    return device.type != "cpu" if precision == "f16" else native_bf16(device)


def batch_within(
    memory: int, largest: int, frame: tuple[int, int], device: torch.device
) -> int:
    """Images a pass within ``memory`` bytes, weights not counted, however many images
    there are in all.

    An image needs the input, output and workspace of the network's largest operation
    (``largest`` floats each), and three times its own ``frame``: as it was composed, as
    it is normalised, and what stands between.
    """
    most = 32 if device.type == "cpu" else 128
    return max(1, min(most, memory // (3 * 4 * (largest + 3 * frame[0] * frame[1]))))


def backward_batch_within(
    memory: int, kept: int, largest: int, frame: tuple[int, int], device: torch.device
) -> int:
    """Images a forward and backward pass within ``memory`` bytes, weights not counted,
    however many images there are.

    An image needs the ``kept`` bytes that the backward pass needs, the gradients of the
    largest operation's input and output and its workspace (``largest`` floats each),
    and six times its own ``frame``. On a CPU a few images at a time are as fast as
    many, so no more than `BACKWARD` is taken: with what torch needs beside it, 540 MB.
    """
    a_image = kept + 4 * (3 * largest + 6 * 3 * frame[0] * frame[1])
    budget, most = (
        (min(memory, BACKWARD), 8) if device.type == "cpu" else (memory, 128)
    )
    return max(1, min(most, budget // a_image))


def cache_folder() -> Path:
    """Where converted models are kept: ``CONSILIENCE_CACHE``, else ``consilience`` in
    the user's cache folder.
    """
    own = os.environ.get("CONSILIENCE_CACHE")
    if own:
        return Path(own).expanduser()
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "consilience"
    )


# ---- what ran


@dataclass(frozen=True)
class Ran:
    """A pass as it ran: ``gradients`` in which layout and batch, where that was chosen;
    ``shift`` how far a gradient in low precision was from the exact one, as a share of it.
    """

    engine: str
    precision: str
    gradients: str = ""
    shift: float | None = None


_ran: ContextVar[set[Ran] | None] = ContextVar("consilience_ran", default=None)


@contextmanager
def recorded_passes() -> Iterator[set[Ran]]:
    """What every pass inside ran as."""
    ran: set[Ran] = set()
    token = _ran.set(ran)
    try:
        yield ran
    finally:
        _ran.reset(token)


def record_pass(
    engine: str, precision: str, gradients: str = "", shift: float | None = None
) -> None:
    """A pass has run."""
    ran = _ran.get()
    if ran is not None:
        ran.add(Ran(engine, precision, gradients, shift))


def filled_batch(pixels: Tensor, batch: int) -> Tensor:
    """Black images after the last, up to a whole batch."""
    if len(pixels) == batch:
        return pixels
    return torch.cat(
        [pixels, pixels.new_zeros(batch - len(pixels), *pixels.shape[1:])]
    )
