"""Engines: what runs behind ``scores``. Each maps pixels to raw outputs and says in ``facts`` what it is.

`auto` is OpenVINO on a CPU and torch elsewhere. A converted or compiled network is held against torch on the first pictures
it sees; where it differs, or cannot be made, torch runs instead and that is said and recorded. What OpenVINO made is kept on
disk by content.
"""

from __future__ import annotations

import inspect
import io
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
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
BACKWARD = 215_000_000
ENGINES = ("auto", "torch", "torch-compile", "openvino")
PRECISIONS = ("f32", "bf16", "f16")
TINY = 8
TOLERANCE = {"f32": 1e-4, "bf16": 0.1, "f16": 0.02}
_LOW = {"bf16": torch.bfloat16, "f16": torch.float16}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
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

    def run(self, pixels: Tensor) -> Any:
        """One torch pass, to the outputs; the caller has borrowed the module."""


# ---------------------------------------------------------------- devices, and what can be asked for


def check(engine: str, precision: str, memory: int, device: torch.device) -> None:
    """Refuse what no engine can do, in one line."""
    if engine not in ENGINES:
        raise ConsilienceError(f"engine is one of {', '.join(ENGINES)}; got {engine!r}")
    if precision not in PRECISIONS:
        raise ConsilienceError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}")
    if memory < 1 << 20:
        raise ConsilienceError(f"memory is in bytes, at least {1 << 20:,}; got {memory:,}")
    if precision == "f16" and device.type == "cpu":
        raise ConsilienceError("precision f16 needs an accelerator (cuda, mps); the model is on cpu, which has f32 and bf16")
    if precision == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ConsilienceError("precision bf16 needs macOS 14 on mps; take f16 or f32")
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


def bytes_of(size: str | int) -> int:
    """A number of bytes: ``2G``, ``500M``, ``1.5GiB``, ``64000000``; K, M and G are powers of 1024.

    >>> bytes_of("500M")
    524288000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:iB|B)?", str(size).strip(), flags=re.IGNORECASE)
    if match is None:
        raise ConsilienceError(f"memory is a number of bytes, or one with K, M or G: 500M, 2G; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _has_openvino() -> bool:
    return find_spec("openvino") is not None


def plan(engine: str, precision: str, device: torch.device) -> dict[str, Any]:
    """What will run: ``auto`` resolved, and the precision that the machine has."""
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" and _has_openvino() else "torch"
    planned = {"engine": engine, "precision": precision}
    if precision == "bf16" and engine == "openvino" and "BF16" not in _openvino_capabilities():
        return planned | {"precision": "f32", "note": "bf16 was asked for; this cpu has no bf16 arithmetic, so f32 runs"}
    if precision == "bf16" and engine != "openvino" and not native_bf16(device):
        return planned | {"note": f"this {device.type} has no bf16 arithmetic: torch emulates it, slower than f32"}
    if precision == "f32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return planned | {"note": "convolutions in tf32, as torch has it unless torch.backends.cudnn.allow_tf32 is False"}
    return planned


@cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself: AVX512-BF16 or AMX on a CPU, compute capability 8 on CUDA."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in known if ask is not None)


def batch_within(memory: int, largest: int, frame: tuple[int, int], device: torch.device) -> int:
    """Pictures a pass within ``memory`` bytes, weights not counted, however many pictures there are in all.

    A picture needs the input, output and workspace of the network's largest operation (``largest`` floats each), and three
    times its own ``frame``: as it was composed, as it is normalised, and what stands between.
    """
    most = 32 if device.type == "cpu" else 128
    return max(1, min(most, memory // (3 * 4 * (largest + 3 * frame[0] * frame[1]))))


def backward_batch_within(memory: int, kept: int, largest: int, frame: tuple[int, int], device: torch.device) -> int:
    """Pictures a forward and backward pass within ``memory`` bytes, weights not counted, however many pictures there are.

    A picture needs the ``kept`` bytes that the way back needs, the gradients of the largest operation's input and output and
    its workspace (``largest`` floats each), and six times its own ``frame``. On a CPU a few pictures at a time are as fast as
    many, so no more than
    `BACKWARD` is taken: with what torch needs beside it, 300 MB are enough.
    """
    a_picture = kept + 4 * (3 * largest + 6 * 3 * frame[0] * frame[1])
    budget, most = (min(memory, BACKWARD), 8) if device.type == "cpu" else (memory, 128)
    return max(1, min(most, budget // a_picture))


# ---------------------------------------------------------------- what ran

_ran: ContextVar[set[tuple[str, str]] | None] = ContextVar("consilience_ran", default=None)


@contextmanager
def recorded() -> Iterator[set[tuple[str, str]]]:
    """The (engine, precision) of every pass inside, as it ran."""
    ran: set[tuple[str, str]] = set()
    token = _ran.set(ran)
    try:
        yield ran
    finally:
        _ran.reset(token)


def record(engine: str, precision: str) -> None:
    """A pass has run."""
    ran = _ran.get()
    if ran is not None:
        ran.add((engine, precision))


# ---------------------------------------------------------------- running


class Runner:
    """The engine of one network: made when first needed, made anew when its weights have changed."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._made_for = ""
        self._watch: Watch | None = None
        self._digest = ""
        self._lock = RLock()

    def digest(self, module: nn.Module, settings: str) -> str:
        """`digest`, computed again only where `Watch` sees a change: it is asked for at every batch."""
        with self._lock:
            if self._watch is None or not self._watch.same():
                self._watch, self._digest = Watch(module), digest(module, settings)
            return self._digest

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
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _part(self, network: Runnable, plain: Engine, pixels: Tensor) -> Tensor:
        fits = tuple(pixels.shape[2:]) == network.frame
        small = not fits or len(pixels) <= min(TINY, network.batch - 1)
        engine = plain if small else self._ready(network, plain, pixels)
        outputs = engine(pixels)
        record(engine.facts["engine"], engine.facts["precision"])
        return outputs

    def _ready(self, network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
        digest = network.digest
        if self._engine is None or self._made_for != digest:
            self._engine, self._made_for = _make(network, plain, pixels), digest
        return self._engine


def _make(network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
    """The engine that was asked for, proven on a few of the pictures at hand."""
    planned = plan(network.engine, network.precision, network.device)
    if planned["engine"] == "torch":
        return plain
    try:
        engine: Engine = (OpenVINOEngine if planned["engine"] == "openvino" else CompiledEngine)(network, planned)
        _verify(engine, TorchEngine(network, "f32"), pixels, engine.facts["precision"])
    except Exception as error:  # whatever a converter trips over, torch can run the model
        why = reason(error)
        if network.engine == "openvino":
            raise ConsilienceError(f"engine {network.engine} cannot run this model: {why}; take engine=torch") from error
        say(f"{planned['engine']} cannot run this model, torch does: {why}")
        plain.facts["note"] = f"{planned['engine']} was tried: {why}"
        return plain
    return engine


def reason(error: BaseException) -> str:
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


def filled(pixels: Tensor, batch: int) -> Tensor:
    """Black pictures after the last, up to a whole batch."""
    if len(pixels) == batch:
        return pixels
    return torch.cat([pixels, pixels.new_zeros(batch - len(pixels), *pixels.shape[1:])])


# ---------------------------------------------------------------- torch


class TorchEngine:
    """Plain torch without gradients; bf16 and f16 by autocast."""

    def __init__(self, network: Runnable, precision: str | None = None) -> None:
        planned = plan(network.engine, network.precision, network.device)
        self._network, self._precision = network, precision or planned["precision"]
        self.facts: dict[str, Any] = planned | {
            "engine": "torch",
            "precision": self._precision,
            "batch": network.batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of any number of pictures."""
        network = self._network
        with borrowed(network.module), torch.inference_mode(), autocast(network.device, self._precision):
            found = torch.cat([network.run(chunk).float() for chunk in torch.split(pixels, self._chunk())])
        return found.clone()  # out of inference mode, so that callers may differentiate what they make of it

    def _chunk(self) -> int:
        """On a CPU glibc hands blocks above 32 MiB back after every use, and filling them anew halves the speed."""
        if self._network.device.type != "cpu":
            return self._network.batch
        return max(1, min(self._network.batch, _BLOCK // (4 * self._network.largest)))


def autocast(device: torch.device, precision: str) -> Any:
    """Torch's low precision, where one is asked for."""
    return torch.autocast(device.type, _LOW[precision]) if precision in _LOW else nullcontext()


class CompiledEngine:
    """The network through torch.compile, for batches of one size; a shorter batch is filled up."""

    def __init__(self, network: Runnable, planned: dict[str, Any]) -> None:
        say("compiling the model with torch.compile")
        self._network, self._precision = network, planned["precision"]
        self._run = _torch_compiled(network.run)
        self.facts: dict[str, Any] = planned | {
            "batch": network.batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of up to a batch of pictures."""
        network = self._network
        with borrowed(network.module), torch.no_grad(), autocast(network.device, self._precision), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._run(filled(pixels, network.batch))[: len(pixels)].float()


def _torch_compiled(run: Run) -> Run:
    def forward(pixels: Tensor) -> Tensor:
        return run(pixels)

    # A code object of its own: torch gives up in silence once it has compiled the same one for eight networks.
    forward.__code__ = forward.__code__.replace()
    return torch.compile(forward, dynamic=False, fullgraph=True)


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
        self._compiled = openvino_compiled(network, planned["precision"])
        self.facts: dict[str, Any] = planned | openvino_facts(self._compiled, network.batch)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of up to a batch of pictures."""
        batch = filled(pixels, self._batch).contiguous().numpy()
        with self._lock:
            outputs = self._compiled(batch, share_inputs=True, share_outputs=True)[0]
            return torch.tensor(outputs[: len(pixels)], dtype=torch.float32)  # a copy: the next pass writes there again


def openvino_compiled(network: Runnable, precision: str) -> Any:
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


def openvino_facts(compiled: Any, batch: int) -> dict[str, Any]:
    """What a compiled network runs with."""
    return {
        "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "batch": batch,
        "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        "openvino": _version("openvino"),
    }


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

    def forward(self, pixels: Tensor) -> Any:
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

_weights: WeakKeyDictionary[nn.Module, tuple[list[ref[Tensor]], list[Any], str]] = WeakKeyDictionary()
_LIBRARIES = ("torch.", "torchvision.", "timm.")


class Watch:
    """Whether a module is still as it was: its parts, their settings, its tensors and what is in them.

    A look costs about half a millisecond, a digest twelve. Values are sampled, because writes through ``.data`` are not
    counted anywhere.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = list(module.modules())  # held, so that no new object gets the number of an old one
        self._tables = [table for part in self._parts for table in (part._modules, part._parameters, part._buffers)]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._settings = [(vars(part), dict(vars(part))) for part in self._parts]
        lists = [value for _, then in self._settings for value in then.values() if isinstance(value, list)]
        self._lists = [(value, list(value)) for value in lists]
        self._samples: dict[Any, list[Tensor]] = {}
        for tensor in self._tensors:
            self._samples.setdefault((tensor.device, tensor.dtype), []).append(_few(tensor))
        self._then, self._values = self._now(), self._sampled()

    def same(self) -> bool:
        """Nothing has changed since."""
        try:
            settings = all(now == then for now, then in self._settings) and all(now == then for now, then in self._lists)
        except (RuntimeError, ValueError, TypeError):  # arrays among the settings, of which one is another now
            return False
        return settings and self._then == self._now() and all(map(torch.equal, self._values, self._sampled()))

    def _now(self) -> tuple[list[int], list[tuple[int, int]]]:
        numbers = [id(value) for table in self._tables for value in table.values()]
        return numbers, [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in self._tensors]

    def _sampled(self) -> list[Tensor]:
        return [torch.cat(samples) for samples in self._samples.values()]


def _few(tensor: Tensor) -> Tensor:
    """Up to sixteen values of a tensor, not copied: they follow it. None of one whose values do not lie side by side."""
    tensor = tensor.detach()
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    flat = tensor.as_strided((tensor.numel() if dense else 0,), (1,))
    return flat[:: max(1, len(flat) // 8)]


def digest(module: nn.Module, settings: str) -> str:
    """Hex digest of the weights, the architecture with its settings, and ``settings``."""
    return blake2b("\n".join([settings, architecture(module), weights_digest(module)]).encode(), digest_size=8).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Hex digest of the state dict, tensor by tensor in order; hashed again only where a tensor has been written to."""
    tensors = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    stamps = [_stamp(tensor) for tensor in tensors.values()]
    refs, then, found = _weights.get(module, ([], [], ""))
    # By identity: weak references that are alive compare what they refer to, and tensors compare value by value.
    if then == stamps and all(one() is tensor for one, tensor in zip(refs, tensors.values(), strict=True)):
        return found
    state = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    _weights[module] = ([ref(tensor) for tensor in tensors.values()], stamps, state.hexdigest())
    return state.hexdigest()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor does: its place, its version, and a few values for writes through ``.data``, uncounted."""
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // 8)].tolist()
    count = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), count, repr(few)


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
