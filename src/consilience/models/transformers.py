"""Networks of Hugging Face's transformers: ``hf:NAME`` or ``hf:FOLDER`` (extra ``hf``).

Weights, class names and the preparation of images come from the model's own files:
``config.json`` (``id2label``, ``image_size``) and ``preprocessor_config.json``. Code
that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consilience import registry
from consilience.files import read_json
from consilience.models import weights as files
from consilience.models.network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Recipe,
    TorchNetwork,
    config_classes,
    wrap,
)
from consilience.models.sources import (
    ModuleOptions,
    as_its_source_says,
    configured,
    filled,
    told,
)
from consilience.models.tasks import wrap_segmentation
from consilience.registry import Spec, option
from consilience.types import ConsilienceError, unexpected

PROCESSOR = "preprocessor_config.json"
SEGMENTS = "ForSemanticSegmentation"
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which the files have."""


@dataclass(frozen=True)
class HuggingFace(ModuleOptions):
    """``hf:NAME`` on the hub or in its cache, or ``hf:FOLDER`` on this machine."""

    name: str
    weights: str | None = option(
        None, help="random: the architecture without weights"
    )
    seed: int = option(0, help="of weights=random", least=0)

    spelled = "hf"


def load_transformers(spec: Spec) -> TorchNetwork:
    """The network of an ``hf:NAME`` spelling; raises `ConsilienceError` in one line."""
    options: HuggingFace = registry.construct(HuggingFace, spec)
    if options.weights not in (None, "random"):
        raise ConsilienceError(
            f"hf: weights is random, or left out for the model's own; got "
            f"{options.weights!r}"
        )
    config, processor, folder = _files_of(options.name)
    module = _module(options, config, folder)
    recipe = processor_recipe(processor, config) if processor else None
    network = opened_transformer(module, Path(options.name).name, recipe, options)
    network = replace(
        network,
        weights=f"random, seed {options.seed}"
        if options.weights
        else f"{options.name}",
    )
    return configured(network, options, registry.render(spec))


def opened_transformer(
    module: nn.Module,
    name: str,
    recipe: Recipe | None,
    options: ModuleOptions | None = None,
) -> TorchNetwork:
    """A transformers module as a network: a classifier, or one that labels pixels."""
    given = told(options) if options is not None else {}
    wanted = given if recipe is None else filled(given, recipe)
    if type(module).__name__.endswith(SEGMENTS):
        wanted.pop("outputs", None)
        labels = wanted.pop("classes", None) or config_classes(module.config)
        network: TorchNetwork = wrap_segmentation(
            module, classes=labels, name=name, **wanted
        )
    else:
        network = wrap(module, name=name, **wanted)
    if recipe is None:
        return network
    return as_its_source_says(network, given, recipe, "processor")


def _files_of(name: str) -> tuple[Any, Mapping[str, Any] | None, str]:
    """Config, what the processor's file says, and where both are."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from transformers import AutoConfig
    except ImportError:
        raise ConsilienceError(
            "hf: needs transformers, which is not installed; pip install "
            "'consilience[hf]'"
        ) from None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConsilienceError(f"hf: {name} has no config.json")
        return _config(AutoConfig, str(folder), name), _processor(folder), str(folder)
    if name.startswith((".", "/", "~")):
        raise ConsilienceError(f"hf: there is no folder {name!r}")
    config_file = files.fetch_hub(name, ("config.json",), f"hf:{name}")
    cached = try_to_load_from_cache(name, PROCESSOR)
    if not isinstance(cached, str):
        try:
            cached = str(files.fetch_hub(name, (PROCESSOR,), f"hf:{name}"))
        except ConsilienceError:
            cached = None
    said = read_json(Path(cached)) if cached else None
    return _config(AutoConfig, str(config_file.parent), name), said, name


def _config(reader: Any, folder: str, name: str) -> Any:
    try:
        return reader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises of many kinds on foreign files
        raise ConsilienceError(
            f"hf: {name} is no model that transformers reads: {unexpected(error)}"
        ) from None


def _processor(folder: Path) -> Mapping[str, Any] | None:
    file = folder / PROCESSOR
    return read_json(file) if file.is_file() else None


def _module(options: HuggingFace, config: Any, folder: str) -> nn.Module:
    kind = _class_for(config, options.name)
    try:
        if options.weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                module: nn.Module = kind.from_config(config, trust_remote_code=False)
        else:
            _fetch_weights(options.name)
            module = kind.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except ConsilienceError:
        raise
    except Exception as error:  # transformers raises of many kinds
        raise ConsilienceError(
            f"hf: {options.name} cannot be loaded: {unexpected(error)}"
        ) from None
    return module.float().eval()


def _fetch_weights(name: str) -> None:
    """The weights in the hub's cache, or a line on what to get where there is no
    network; a folder has its own.
    """
    if not Path(name).expanduser().is_dir():
        files.fetch_hub(
            name, ("model.safetensors", "pytorch_model.bin"), f"hf:{name}"
        )


def _class_for(config: Any, name: str) -> Any:
    """The head that the files are of: image classes, or segments."""
    import transformers

    heads = [str(one) for one in getattr(config, "architectures", None) or ()]
    if any(one.endswith(SEGMENTS) for one in heads):
        return transformers.AutoModelForSemanticSegmentation
    if heads and not any(one.endswith("ForImageClassification") for one in heads):
        known = getattr(transformers, heads[0], None)
        if known is None or not any(
            word in heads[0] for word in ("Vision", "Backbone", "Model")
        ):
            raise ConsilienceError(
                f"hf: {name} is a {heads[0]}; explained are ForImageClassification, "
                f"ForSemanticSegmentation and vision encoders"
            )
        return _Named(known)
    return transformers.AutoModelForImageClassification


class _Named:
    """A class of transformers as its automatic ones are used."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_config(self, config: Any, trust_remote_code: bool) -> nn.Module:
        module: nn.Module = self._kind(config)
        return module

    def from_pretrained(self, folder: str, **options: Any) -> nn.Module:
        options.pop("trust_remote_code")
        module: nn.Module = self._kind.from_pretrained(folder, **options)
        return module


def processor_recipe(said: Mapping[str, Any], config: Any = None) -> Recipe:
    """How a processor's file shows images: resized, cut, scaled, normalised.

    ``(v * rescale_factor - mean) / std`` of values v up to 255 becomes a mean and std of
    shares. Raises `ConsilienceError` for what a frame cannot express.
    """
    if said.get("rescale_offset"):
        raise ConsilienceError(
            "hf: the processor shifts values after scaling (rescale_offset); give mean= and "
            "std= yourself"
        )
    resized, exact = _size_of(said.get("size"), config)
    crop = _both(said.get("crop_size")) if said.get("do_center_crop") else None
    if said.get("do_center_crop") is None and said.get("crop_size"):
        crop = _both(said["crop_size"])
    shortest, share = _shortest(said.get("size")), said.get("crop_pct")
    if shortest and share and shortest < 384:  # ConvNeXT's processor
        frame = (shortest, shortest)
        resized, exact = (int(shortest / share),) * 2, False
    else:
        frame = crop or resized
    normal = bool(said.get("do_normalize", True))
    mean = _each(said.get("image_mean"), IMAGENET_MEAN) if normal else (0.0,) * 3
    std = _each(said.get("image_std"), IMAGENET_STD) if normal else (1.0,) * 3
    scale = 255 * float(said.get("rescale_factor", 1 / 255))
    if not said.get("do_rescale", True):
        scale = 255.0
    kind = _RESAMPLING.get(int(said.get("resample", 2)), "bilinear")
    return Recipe(
        size=frame,
        resized=resized,
        crop="exact" if exact else "short",
        interpolation=kind,  # type: ignore[arg-type]
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
    )


def _each(values: Any, usual: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, list | tuple) else usual


def _shortest(size: Any) -> int | None:
    found = size.get("shortest_edge") if isinstance(size, Mapping) else None
    return int(found) if found else None


def _size_of(size: Any, config: Any) -> tuple[tuple[int, int], bool]:
    """What the image is resized to, and whether both sides are."""
    shortest = _shortest(size)
    if shortest:
        return (shortest, shortest), False
    if size is None:
        size = getattr(config, "image_size", None) or 224
    return _both(size), True


def _both(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        sides = size.get("height"), size.get("width")
        if None in sides:
            raise ConsilienceError(
                f"hf: the processor's size {dict(size)} is not read"
            )
        return int(sides[0]), int(sides[1])  # type: ignore[arg-type]
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)
