"""Forward passes by OpenVINO, with converted networks kept on disk by content."""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from consilience.models.digest import _hash
from consilience.models.engines.openvino_runtime import (
    _core,
    _openvino,
    _openvino_capabilities,
)
from consilience.models.engines.plan import Runnable, cache_folder, filled_batch
from consilience.models.layers import borrowed
from consilience.progress import say


class OpenVINOEngine:
    """The network converted to OpenVINO, for batches of one size; a shorter batch is
    filled up.
    """

    def __init__(self, network: Runnable, planned: dict[str, Any]) -> None:
        self._batch, self._lock = network.batch, Lock()
        self._compiled = openvino_compiled(network, planned["precision"])
        self.facts: dict[str, Any] = planned | openvino_facts(
            self._compiled, network.batch
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of up to a batch of images."""
        batch = filled_batch(pixels, self._batch).contiguous().numpy()
        with self._lock:
            outputs = self._compiled(batch, share_inputs=True, share_outputs=True)[0]
            return torch.tensor(
                outputs[: len(pixels)], dtype=torch.float32
            )  # a copy: the next pass writes there again


def openvino_compiled(network: Runnable, precision: str) -> Any:
    """The compiled network, for batches of its size."""
    shape = [network.batch, network.channels, *network.frame]
    return compiled_from_disk(network, precision, shape, partial(_convert, network))


def compiled_from_disk(
    network: Runnable,
    precision: str,
    shape: list[int],
    convert: Callable[[], Any],
    kind: str = "",
) -> Any:
    """What ``convert`` makes of a network, compiled: from disk as it ran last time, or
    compiled from the converted graph, or converted. A graph of some ``kind`` is for one
    shape.
    """
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    versions = [
        _version(name) for name in ("openvino", "torch", "timm", "torchvision")
    ]
    converted = (
        cache_folder()
        / "openvino"
        / _hash(
            network.digest,
            network.frame,
            *versions,
            *((kind, *shape) if kind else ()),
        )
    )
    blob = (
        converted
        / f"{_hash(shape, hints, _core().get_property('CPU', 'FULL_DEVICE_NAME'), _openvino_capabilities())}.blob"
    )
    found = _imported(blob, hints)
    if found is not None:
        return found
    # Compiled from what is on disk even when just converted: the graph in memory rounds
    # otherwise than its file.
    graph = _read(converted / "network.xml")
    if graph is None:
        made = convert()
        graph = _read(_keep(made, converted)) or made
    if not kind:
        graph.reshape(shape)
    compiled = _core().compile_model(graph, "CPU", hints)
    exported = compiled.export_model()
    _write(
        blob, exported.getvalue() if isinstance(exported, io.BytesIO) else exported
    )
    return compiled


def openvino_facts(compiled: Any, batch: int) -> dict[str, Any]:
    """What a compiled network runs with."""
    return {
        "precision": compiled.get_property(
            "INFERENCE_PRECISION_HINT"
        ).get_type_name(),
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
    frame = (network.channels, *network.frame)
    example = torch.rand(2, *frame, generator=torch.Generator().manual_seed(0))
    wrapper = _WithNormalisation(network)
    wrapper.training = False
    with borrowed(network.module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _openvino().convert_model(
            wrapper, example_input=example, input=[-1, *frame]
        )


def _keep(graph: Any, folder: Path) -> Path:
    """Write the graph for next time, whole or not at all; a machine without a disk to
    write on still gets its graph.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            _openvino().save_model(
                graph, work / "network.xml", compress_to_fp16=False
            )
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
