"""What sources of networks share: how images are shown and outputs read, as options of
their spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from consilience.models import weights as files
from consilience.models.engines import plan, runner
from consilience.models.network import Recipe, TorchNetwork, wrap
from consilience.registry import option
from consilience.types import ConsilienceError, Outputs


@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Options of every spelling that stands for a torch module; those of `wrap`."""

    size: tuple[int, ...] | None = option(None, help="height+width, or one number")
    resize: int | None = option(None, help="what the shorter side becomes first")
    channels: int | None = None
    mean: tuple[float, ...] | None = option(None, help="a number a channel, with +")
    std: tuple[float, ...] | None = option(None, help="a number a channel, with +")
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] | None = None
    outputs: Outputs | None = None
    output: str | None = option(
        None, help="key, field or place of the output to take"
    )
    labels: str | None = option(None, help="a file of class names")
    classes: tuple[str, ...] | None = option(None, help="class names joined with +")
    view: Literal["crop", "squash"] = "crop"
    device: str | None = None
    engine: str | None = None
    precision: str | None = None
    memory: str | None = None


def pair_of(size: tuple[int, ...] | None) -> tuple[int, int] | None:
    """Height and width of one number or two."""
    if size is None:
        return None
    if len(size) > 2:
        raise ConsilienceError(f"size is height+width, or one number; got {size}")
    return (size[0], size[-1])


def class_names(options: ModuleOptions) -> tuple[str, ...] | None:
    """Class names that the options give."""
    if options.labels and options.classes:
        raise ConsilienceError("give labels=FILE or classes=A+B, not both")
    return files.read_labels(options.labels) if options.labels else options.classes


def told(options: ModuleOptions) -> dict[str, Any]:
    """What the options say of how the module is shown images and read, for `wrap`."""
    said: dict[str, Any] = {
        "size": pair_of(options.size),
        "resize": options.resize,
        "channels": options.channels,
        "mean": options.mean,
        "std": options.std,
        "interpolation": options.interpolation,
        "outputs": options.outputs,
        "output": options.output,
        "classes": class_names(options),
    }
    return {name: value for name, value in said.items() if value is not None}


SHOWN = ("size", "resize", "mean", "std", "channels", "interpolation")
"""Options of how images are shown."""


def filled(given: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Options for `wrap`, what they do not say of how images are shown taken from a
    source's ``recipe``.
    """
    own: dict[str, Any] = {"mean": recipe.mean, "std": recipe.std}
    own["interpolation"] = recipe.interpolation
    if "size" not in given and "resize" not in given:
        own |= {"size": recipe.size, "resize": recipe.resized}
    return {**own, **given}


def as_its_source_says(
    network: TorchNetwork, given: dict[str, Any], recipe: Recipe, source: str
) -> TorchNetwork:
    """The network cut and padded as its source does; the whole recipe where nothing of
    it was told.
    """
    if not any(name in given for name in SHOWN):
        assumed = network.assumed.removeprefix("; ")
        said = "; ".join(filter(None, (f"as its {source} says", assumed)))
        return replace(network, recipe=recipe, assumed=said)
    return replace(network, recipe=replace(network.recipe, crop=recipe.crop))


def wrapped(
    module: nn.Module, options: ModuleOptions, name: str, source: str, **said: Any
) -> TorchNetwork:
    """A module as its options have it, on its device; ``said`` is what its source says
    where the options do not.
    """
    network = wrap(module, name=name, **{**said, **told(options)})
    return configured(network, options, source)


def configured(
    network: TorchNetwork, options: ModuleOptions, source: str
) -> TorchNetwork:
    """The network with the engine, precision and device that were asked for."""
    network.module.to(plan.resolve_device(options.device or "auto"))
    changes: dict[str, Any] = {
        "source": source,
        "mode": options.view,
        "engine": options.engine,
        "precision": options.precision,
        "memory": plan.bytes_of(options.memory) if options.memory else None,
    }
    return replace(
        network,
        _runner=runner.Runner(),
        **{name: value for name, value in changes.items() if value is not None},
    )


def file_of(given: str, kind: str) -> Path:
    """A file that a spelling names; `ConsilienceError` where it is not there."""
    file = Path(given).expanduser()
    if not file.is_file():
        raise ConsilienceError(f"{kind}: there is no file {given!r}")
    return file
