"""Engines: what runs behind ``scores``. Each maps pixels to raw outputs and says in ``facts`` what it is.

`auto` is OpenVINO on a CPU and torch elsewhere. A converted network is kept on disk by content and held against torch on
the first pictures it sees; where it differs, or cannot be converted, torch runs instead and that is said and recorded.
"""

from __future__ import annotations

import inspect
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from consilience.models.anatomy import borrowed
from consilience.progress import say
from consilience.types import ConsilienceError

MEMORY = 1 << 30
ENGINES = ("auto", "torch", "openvino")
PRECISIONS = ("f32", "bf16")
TINY = 8
TOLERANCE = {"f32": 1e-4, "bf16": 0.1}
_BLOCK = 32 << 20

Run = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """Pixels (N, 3, h, w) in [0, 1] to raw outputs (N, K) float32, with the facts of how."""

    facts: dict[str, Any]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of at most a batch of pictures."""


class Runnable(Protocol):
    """What an engine needs of a network: its module, a plain torch pass through it, and how it wants to be run."""

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
        """Pictures a pass."""

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of a picture."""

    @property
    def largest(self) -> int:
        """Floats of the largest layer's output for one picture."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def digest(self) -> str:
        """Of weights, architecture and normalisation."""

    def run(self, pixels: Tensor) -> Tensor:
        """One torch pass; the caller has borrowed the module."""


# ---------------------------------------------------------------- devices, and what can be asked for


def check(engine: str, precision: str, memory: int, device: torch.device) -> None:
    """Refuse what no engine can do, in one line."""
    if engine not in ENGINES:
        raise ConsilienceError(f"engine is one of {', '.join(ENGINES)}; got {engine!r}")
    if precision not in PRECISIONS:
        raise ConsilienceError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}")
    if memory < 1 << 20:
        raise ConsilienceError(f"memory is in bytes, at least {1 << 20:,}; got {memory:,}")
    if engine == "openvino" and device.type != "cpu":
        raise ConsilienceError(f"engine openvino runs on the cpu; the model is on {device}")
    if engine == "openvino" and not _has_openvino():
        raise ConsilienceError("engine openvino is not installed; pip install openvino, or take engine=torch")


def device(name: str) -> torch.device:
    """A device by name; ``auto`` is the first cuda accelerator there is, else the cpu."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    there = _devices()
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConsilienceError(f"no device {name!r}; there is: auto, {', '.join(there)}") from None
    if found.index is None and f"{found.type}:0" in there:
        return torch.device(found.type, 0)
    if str(found) not in there:
        raise ConsilienceError(f"no device {name!r} here; there is: {', '.join(there)}")
    return found


def _devices() -> list[str]:
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps:0"] if torch.backends.mps.is_available() else []
    return ["cpu", *cuda, *mps]


def _has_openvino() -> bool:
    return find_spec("openvino") is not None


def plan(engine: str, precision: str, device: torch.device) -> dict[str, Any]:
    """What will run: ``auto`` resolved, and the precision that the machine has."""
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" and _has_openvino() else "torch"
    if engine == "openvino" and precision == "bf16" and "BF16" not in _openvino_capabilities():
        return {"engine": engine, "precision": "f32", "note": "this cpu has no bf16 arithmetic"}
    return {"engine": engine, "precision": precision}


def batch_within(memory: int, largest: int, device: torch.device) -> int:
    """Pictures a pass: input, output and workspace of the largest operation (``largest`` floats) within ``memory`` bytes."""
    most = 32 if device.type == "cpu" else 128
    return max(1, min(most, memory // (3 * 4 * largest)))


# ---------------------------------------------------------------- running


class Runner:
    """The engine of one network: made when first needed, made anew when its weights have changed."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._digest = ""
        self._lock = RLock()

    def facts(self, network: Runnable) -> dict[str, Any]:
        """What ran, or will."""
        if self._engine is not None:
            return dict(self._engine.facts)
        return plan(network.engine, network.precision, network.device)

    def scores(self, network: Runnable, pixels: Tensor) -> Tensor:
        """Raw outputs (N, K) float32.

        Which engine scores a picture depends on the number of pictures alone, never on what ran before: whole batches and
        long rests go to the engine, a few pictures straight to torch, for which no batch has to be filled.
        """
        with self._lock:
            plain = TorchEngine(network)
            if not len(pixels):
                return plain(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
            parts = [self._part(network, plain, chunk) for chunk in torch.split(pixels, network.batch)]
        return torch.cat(parts)

    def _part(self, network: Runnable, plain: Engine, pixels: Tensor) -> Tensor:
        fits = tuple(pixels.shape[2:]) == network.frame
        if not fits or len(pixels) <= min(TINY, network.batch - 1):
            return plain(pixels)
        return self._ready(network, plain, pixels)(pixels)

    def _ready(self, network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
        digest = network.digest
        if self._engine is None or self._digest != digest:
            self._engine, self._digest = _make(network, plain, pixels), digest
        return self._engine


def _make(network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
    """The engine that was asked for, proven on a few of the pictures at hand."""
    planned = plan(network.engine, network.precision, network.device)
    if planned["engine"] == "torch":
        return plain
    try:
        engine = OpenVINOEngine(network, planned)
        _verify(engine, plain, pixels, planned["precision"])
    except Exception as error:  # whatever a converter trips over, torch can run the model
        reason = _reason(error)
        if network.engine != "auto":
            raise ConsilienceError(f"engine {network.engine} cannot run this model: {reason}; take engine=torch") from error
        say(f"OpenVINO cannot run this model, torch does: {reason}")
        plain.facts["note"] = f"openvino was tried: {reason}"
        return plain
    return engine


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _verify(engine: Engine, plain: Engine, pixels: Tensor, precision: str) -> None:
    got = engine(pixels)[[0, -1]]
    expected = plain(pixels[[0, -1]])
    scale = float(expected.abs().max().clamp(min=1e-3))
    apart = float((got - expected).abs().max()) / scale
    if not apart <= TOLERANCE[precision]:
        raise ConsilienceError(
            f"its outputs are {apart:.1e} of their size away from torch's, {TOLERANCE[precision]:.0e} allowed"
        )


# ---------------------------------------------------------------- torch


class TorchEngine:
    """Plain torch without gradients; bf16 by autocast."""

    def __init__(self, network: Runnable) -> None:
        self._network = network
        self.facts: dict[str, Any] = {"engine": "torch", "precision": network.precision}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of any number of pictures."""
        network = self._network
        low = network.precision == "bf16"
        with (
            borrowed(network.module),
            torch.inference_mode(),
            torch.autocast(network.device.type, torch.bfloat16, enabled=low),
        ):
            found = torch.cat([network.run(chunk).float() for chunk in torch.split(pixels, self._chunk())])
        return found.clone()  # out of inference mode, so that callers may differentiate what they make of it

    def _chunk(self) -> int:
        """On a CPU glibc hands blocks above 32 MiB back after every use, and filling them anew halves the speed."""
        if self._network.device.type != "cpu":
            return self._network.batch
        return max(1, min(self._network.batch, _BLOCK // (4 * self._network.largest)))


# ---------------------------------------------------------------- OpenVINO


@cache
def _openvino() -> Any:
    # OpenVINO reports its use over the network unless that package is missing; nothing here does.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return _openvino().Core()


@cache
def _openvino_capabilities() -> tuple[str, ...]:
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVINOEngine:
    """The network converted to OpenVINO, for batches of one size; a shorter batch is filled up."""

    def __init__(self, network: Runnable, planned: dict[str, Any]) -> None:
        self._batch, self._lock = network.batch, Lock()
        self._compiled = _compiled(network, planned["precision"])
        self.facts = dict(planned)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of up to a batch of pictures."""
        count = len(pixels)
        if count < self._batch:
            pixels = torch.cat([pixels, pixels.new_zeros(self._batch - count, *pixels.shape[1:])])
        with self._lock:
            outputs = self._compiled(pixels.contiguous().numpy(), share_inputs=True)[0]
            return torch.from_numpy(outputs[:count].copy()).float()


def _compiled(network: Runnable, precision: str) -> Any:
    """The compiled network: from disk as it ran last time, or compiled from the converted one, or converted."""
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    shape = [network.batch, 3, *network.frame]
    versions = [_version(name) for name in ("openvino", "torch", "timm", "torchvision")]
    converted = cache_folder() / "openvino" / _hash(network.digest, network.frame, *versions)
    blob = converted / f"{_hash(shape, hints, _core().get_property('CPU', 'FULL_DEVICE_NAME'), _openvino_capabilities())}.blob"
    found = _imported(blob, hints)
    if found is not None:
        return found
    # Compiled from what is on disk even when just converted: the graph in memory rounds otherwise than its file.
    graph = _read(converted / "network.xml")
    if graph is None:
        made = _convert(network)
        graph = _read(_keep(made, converted)) or made
    graph.reshape(shape)
    compiled = _core().compile_model(graph, "CPU", hints)
    exported = compiled.export_model()
    _write(blob, exported.getvalue() if isinstance(exported, io.BytesIO) else exported)
    return compiled


def _imported(blob: Path, hints: dict[str, str]) -> Any:
    try:
        return _core().import_model(io.BytesIO(blob.read_bytes()), "CPU", hints)
    except (OSError, RuntimeError):  # not there, or damaged: made anew
        return None


def _read(graph: Path) -> Any:
    try:
        return _core().read_model(graph) if graph.is_file() else None
    except RuntimeError:
        return None


class _WithNormalisation(nn.Module):
    def __init__(self, network: Runnable) -> None:
        super().__init__()
        self.module, self._network = network.module, network

    def forward(self, pixels: Tensor) -> Tensor:
        return self._network.run(pixels)


def _convert(network: Runnable) -> Any:
    say("preparing the model for OpenVINO, once")
    example = torch.rand(2, 3, *network.frame, generator=torch.Generator().manual_seed(0))
    wrapper = _WithNormalisation(network)
    wrapper.training = False
    with borrowed(network.module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _openvino().convert_model(wrapper, example_input=example, input=[-1, 3, *network.frame])


def _keep(graph: Any, folder: Path) -> Path:
    """Write the graph for next time, whole or not at all; a machine without a disk to write on still gets its graph."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            _openvino().save_model(graph, work / "network.xml", compress_to_fp16=False)
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster
            say(f"the converted model cannot be kept: {error}")
    return folder / "network.xml"


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as work:
            work.write(content)
        Path(work.name).replace(file)
    except OSError as error:
        say(f"the compiled model cannot be kept: {error}")


def cache_folder() -> Path:
    """Where converted models are kept: ``CONSILIENCE_CACHE``, else ``consilience`` in the user's cache folder."""
    own = os.environ.get("CONSILIENCE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "consilience"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _hash(*parts: Any) -> str:
    return blake2b(repr(parts).encode(), digest_size=12).hexdigest()


# ---------------------------------------------------------------- digests

_weights: WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()
_LIBRARIES = ("torch.", "torchvision.", "timm.")


def digest(module: nn.Module, settings: str) -> str:
    """Hex digest of the weights, the architecture with its settings, and ``settings``."""
    return blake2b("\n".join([settings, architecture(module), weights_digest(module)]).encode(), digest_size=8).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Hex digest of the state dict, tensor by tensor in order; hashed again only where a tensor has been written to."""
    tensors = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    stamps = [_stamp(tensor) for tensor in tensors.values()]
    known = _weights.get(module)
    if known is not None and known[0] == stamps:
        return known[1]
    state = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    _weights[module] = (stamps, state.hexdigest())
    return state.hexdigest()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor does: the object, its version, and a few values for writes through ``.data``, uncounted."""
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // 8)].tolist()
    count = 0 if tensor.is_inference() else tensor._version
    return ref(tensor), tensor.data_ptr(), count, repr(few)


def architecture(module: nn.Module) -> str:
    """Every submodule with its class, settings and plain attributes; for classes of nobody's library, their source too."""
    return "\n".join(line for name, part in module.named_modules() for line in _described(name, part))


def _described(name: str, part: nn.Module) -> Iterator[str]:
    kind: Any = type(part)
    yield f"{name}: {kind.__module__}.{kind.__qualname__}({part.extra_repr()})"
    yield from (f"  {key}={value!r}" for key, value in sorted(vars(part).items()) if key != "training" and _plain(value))
    yield _source(kind)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)


@cache
def _source(kind: Any) -> str:
    if f"{kind.__module__}.".startswith(_LIBRARIES):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        return repr((code.co_code, code.co_consts, code.co_names)) if code is not None else ""
