"""Networks exported by torch: ``pt2:FILE`` (torch.export) and ``torchscript:FILE``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consilience import registry
from consilience.models.network import TorchNetwork
from consilience.models.sources import ModuleOptions, file_of, wrapped
from consilience.registry import Spec
from consilience.types import ConsilienceError, unexpected


@dataclass(frozen=True)
class ExportedFile(ModuleOptions):
    """``pt2:FILE``: a program saved by ``torch.export.save``, with its modules back under
    their names, so that layers can be explained.
    """

    file: str

    spelled = "pt2"


@dataclass(frozen=True)
class ScriptFile(ModuleOptions):
    """``torchscript:FILE``: a module saved by ``torch.jit.save``. It gives scores and
    gradients of the image; its layers cannot be watched.
    """

    file: str

    spelled = "torchscript"


def load_exported(spec: Spec) -> TorchNetwork:
    """The network of a ``pt2:FILE`` spelling; raises `ConsilienceError` in one line."""
    options: ExportedFile = registry.construct(ExportedFile, spec)
    file = file_of(options.file, "pt2")
    try:
        program = torch.export.load(str(file))
        module = torch.export.unflatten(program)
    except Exception as error:  # torch raises of many kinds on what is no program
        raise ConsilienceError(
            f"{file} is not a program of torch.export: {unexpected(error)}"
        ) from None
    shape = _image_shape(program, file)
    said: dict[str, Any] = {"channels": shape[1]}
    if isinstance(shape[2], int) and isinstance(shape[3], int):
        said["size"] = (shape[2], shape[3])
    if options.mean is not None or options.channels is not None:
        said.pop("channels")
    return wrapped(module, options, file.stem, registry.render(spec), **said)


def _image_shape(program: Any, file: Path) -> list[Any]:
    """The shape of the program's one input, open sides as they are called."""
    names = list(program.graph_signature.user_inputs)
    if len(names) != 1:
        raise ConsilienceError(
            f"{file} has {len(names)} inputs; a classifier of images has one"
        )
    node = next(
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name == names[0]
    )
    shape = list(node.meta["val"].shape)
    if len(shape) != 4:
        raise ConsilienceError(
            f"{file} takes {shape}; a classifier of images takes (N, C, h, w)"
        )
    if isinstance(shape[0], int):
        raise ConsilienceError(
            f"{file} takes {shape[0]} images at a time; export it with an open batch: "
            f"dynamic_shapes=({{0: torch.export.Dim('n')}},)"
        )
    return [side if isinstance(side, int) else None for side in shape]


def load_script(spec: Spec) -> TorchNetwork:
    """The network of a ``torchscript:FILE`` spelling; raises `ConsilienceError` in one
    line.
    """
    options: ScriptFile = registry.construct(ScriptFile, spec)
    file = file_of(options.file, "torchscript")
    if not zipfile.is_zipfile(file):
        raise ConsilienceError(f"{file} is not a TorchScript file")
    try:
        script: Any = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises of many kinds on what is no script
        raise ConsilienceError(
            f"{file} is not a TorchScript file: {unexpected(error)}"
        ) from None
    return wrapped(script, options, file.stem, registry.render(spec))
