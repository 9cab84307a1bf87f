"""ONNX files as forward-only models, run by ONNX Runtime.

What a file says of itself is read from it: name, type, shape and layout of its input,
its batch, its outputs, class names in its metadata. What it cannot say (normalisation)
is an option, and recorded where it was assumed. No library of custom operators is ever
loaded.
"""

from __future__ import annotations

import ast
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import images, registry
from consilience.models import weights as files
from consilience.models.callable import (
    LAYOUTS,
    BlackBox,
    Layout,
    as_nhwc,
    digest_of_parts,
    is_yes_or_no,
    run_backend,
    settle_classes,
    settle_outputs,
    trial_images,
)
from consilience.models.engines import plan
from consilience.models.network import IMAGENET_MEAN, IMAGENET_STD, Recipe
from consilience.models.onnx_torch import opened_onnx
from consilience.progress import say
from consilience.registry import Spec, option
from consilience.types import Array, ConsilienceError, Outputs

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
_NAMES = ("names", "classes", "labels")


@dataclass(frozen=True)
class Onnx:
    """``onnx:FILE`` and its options: what the file cannot say, or says wrongly.

    ``mean`` and ``std`` are of RGB in 0 to ``scale``; ``resize`` is what the shorter
    side becomes before the centre is cut.
    """

    file: str
    size: tuple[int, ...] | None = option(None, help="height+width, or one number")
    resize: int | None = None
    mean: tuple[float, ...] | None = option(
        None, help="of red+green+blue, or one number"
    )
    std: tuple[float, ...] | None = option(
        None, help="of red+green+blue, or one number"
    )
    scale: float = option(1.0, help="255 where the network takes 0 to 255")
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    layout: Literal["nchw", "nhwc"] | None = None
    outputs: Outputs | None = None
    output: str | None = option(None, help="name of the output to take")
    labels: str | None = option(None, help="a file of class names")
    classes: tuple[str, ...] | None = option(None, help="class names joined with +")
    gradients: bool = option(
        True, help="layers and gradients too, where the graph converts to torch"
    )
    view: Literal["crop", "squash"] = "crop"
    device: str | None = None
    engine: str | None = None
    precision: str | None = None
    memory: str | None = None

    spelled = "onnx"


def load_onnx(spec: Spec) -> Any:
    """The model of an ``onnx:FILE`` spec: with layers and gradients where its graph
    converts to torch and says the same there, else one that scores; raises `ConsilienceError` in one line where
    the file is no such model.
    """
    options: Onnx = registry.construct(Onnx, spec)
    file = Path(options.file).expanduser()
    if not file.is_file():
        raise ConsilienceError(f"onnx: there is no file {options.file!r}")
    if options.engine not in (None, "auto", "onnxruntime"):
        raise ConsilienceError(
            f"onnx files run by onnxruntime; got engine {options.engine!r}"
        )
    session = _Session(
        str(file), options.device or "auto", options.output, options.layout
    )
    recipe, assumed = _recipe(session, options)
    if assumed:
        say(
            f"{file.name} does not say its {', '.join(assumed)}; taken: "
            f"{_told(recipe, assumed)}"
        )
    session, trial = _tried(session, recipe, file.stem)
    kind, how = settle_outputs(options.outputs, trial, file.stem)
    single = is_yes_or_no(trial, kind)
    given = _class_names(options, session)
    names = settle_classes(given, trial.shape[1], file.name, single)
    known = {
        "outputs": f"{kind}, {how}",
        "weights": options.file,
        "layout": session.layout,
    }
    if assumed:
        known["assumed"] = _told(recipe, assumed)
    digest = digest_of_parts(
        _file_digest(file), recipe, kind, session.layout, session.output
    )
    memory = (
        plan.bytes_of(options.memory) if options.memory is not None else plan.MEMORY
    )
    model = BlackBox(
        session,
        recipe,
        names,
        kind,
        file.stem,
        digest,
        known,
        mode=options.view,
        memory=memory,
        complement=single,
    )
    box = replace(
        model.using(precision=options.precision), spec=registry.render(spec)
    )
    if not options.gradients:
        return box
    opened, why = opened_onnx(box, str(file), session.layout)
    if why:
        return replace(box, known={**box.known, "note": why})
    return opened


# ---- the file


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ConsilienceError(
            "onnx files need onnxruntime, which is not installed; pip install "
            "'consilience[onnx]'"
        ) from None
    return onnxruntime


@dataclass(frozen=True, eq=False)
class _Input:
    """The one input of a network of images: ``sides`` (height, width), None where the
    file leaves it open.
    """

    name: str
    dtype: Any
    layout: Layout
    sides: tuple[int | None, int | None]
    batch: int | None


class _Session:
    """An opened ONNX file as a backend: prepared pixels (n, 3, h, w) to its output."""

    def __init__(
        self, file: str, device: str, output: str | None, layout: Layout | None
    ) -> None:
        self._file, self._device, self._wanted = file, device, output
        self._session = _opened(file, device)
        self.input = _input_of(self._session.get_inputs(), Path(file).name, layout)
        self.layout, self.fixed = self.input.layout, self.input.batch
        self.output = _output_of(self._session.get_outputs(), Path(file).name, output)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its maker wrote into it."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def facts(self) -> dict[str, Any]:
        """What runs."""
        providers = self._session.get_providers()
        device = (
            f"cuda:{_index(self._device)}"
            if "CUDAExecutionProvider" in providers
            else "cpu"
        )
        return {
            "engine": "onnxruntime",
            "precision": "the file's",
            "device": device,
            "threads": torch.get_num_threads(),
            "onnxruntime": _runtime().__version__,
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """The output asked for, as the file gives it."""
        array: Array = pixels.numpy() if self.layout == "nchw" else as_nhwc(pixels)
        if self.input.dtype is np.uint8:
            array = np.rint(array * 255).clip(0, 255)
        array = np.ascontiguousarray(array, dtype=self.input.dtype)
        try:
            (said,) = self._session.run([self.output], {self.input.name: array})
        except (
            Exception
        ) as error:  # the runtime has a class of its own for every status
            raise ConsilienceError(
                f"{Path(self._file).name} does not run: {_line(error)}"
            ) from None
        if not isinstance(said, np.ndarray):
            raise ConsilienceError(
                f"output {self.output!r} of {Path(self._file).name} is not a tensor; name "
                f"another with output="
            )
        return torch.from_numpy(said)

    def on(self, device: str | None, engine: str | None) -> _Session:
        """The same file on another device."""
        if engine not in (None, "auto", "onnxruntime"):
            raise ConsilienceError(
                f"onnx files run by onnxruntime; got engine {engine!r}"
            )
        if device is None or device == self._device:
            return self
        other = _Session(self._file, device, self._wanted, self.layout)
        other.fixed = self.fixed
        return other


def _opened(file: str, device: str) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(
            file, options, providers=_providers(runtime, device)
        )
    except ConsilienceError:
        raise
    except Exception as error:  # the runtime has a class of its own for every status
        raise ConsilienceError(
            f"{file} is no ONNX model that can be run: {_line(error)}"
        ) from None


def _providers(runtime: Any, device: str) -> list[Any]:
    """CUDA only where it is asked for."""
    if device in ("auto", "cpu"):
        return ["CPUExecutionProvider"]
    there = runtime.get_available_providers()
    if (
        not re.fullmatch(r"cuda(:\d+)?", device)
        or "CUDAExecutionProvider" not in there
    ):
        kinds = (
            "cpu, cuda"
            if "CUDAExecutionProvider" in there
            else "cpu (cuda with onnxruntime-gpu)"
        )
        raise ConsilienceError(
            f"onnxruntime has no device {device!r} here; there is: {kinds}"
        )
    return [
        ("CUDAExecutionProvider", {"device_id": _index(device)}),
        "CPUExecutionProvider",
    ]


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _line(error: BaseException) -> str:
    """The first line of what the runtime says, without its status code."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:200]


def _input_of(inputs: Any, name: str, layout: Layout | None) -> _Input:
    if len(inputs) != 1:
        there = ", ".join(item.name for item in inputs) or "none"
        raise ConsilienceError(
            f"{name} has {len(inputs)} inputs ({there}); a classifier of images has one"
        )
    item = inputs[0]
    if item.type not in _TYPES:
        raise ConsilienceError(
            f"{name} takes {item.type} as {item.name!r}; read are {', '.join(_TYPES)}"
        )
    shape = [
        side if isinstance(side, int) and side > 0 else None for side in item.shape
    ]
    if len(shape) != 4:
        raise ConsilienceError(
            f"{name} takes {item.shape} as {item.name!r}; a classifier of images takes (N, 3, "
            f"h, w)"
        )
    layout = layout or _layout_of(shape, name, item.shape)
    channels, sides = (
        (shape[1], shape[2:]) if layout == "nchw" else (shape[3], shape[1:3])
    )
    if channels not in (None, 3):
        raise ConsilienceError(
            f"{name} takes {channels} channels {item.shape}; images have 3"
        )
    return _Input(
        item.name, _TYPES[item.type], layout, (sides[0], sides[1]), shape[0]
    )


def _layout_of(shape: list[int | None], name: str, shown: Any) -> Layout:
    """Where the 3 stands; ``shown`` is the shape as the file spells it."""
    fits = [
        layout for layout, at in zip(LAYOUTS, (1, 3), strict=True) if shape[at] == 3
    ]
    if len(fits) == 1:
        return fits[0]
    raise ConsilienceError(
        f"{name} takes {shown}, which does not tell where the colours stand; give layout=nchw "
        f"or layout=nhwc"
    )


def _output_of(outputs: Any, name: str, wanted: str | None) -> str:
    names = [item.name for item in outputs]
    if wanted is not None:
        if wanted not in names:
            raise ConsilienceError(registry.unknown("output", wanted, names))
        return wanted
    scores = [
        item.name
        for item in outputs
        if item.type in _TYPES and len(item.shape or ()) in (0, 2, 4)
    ]
    if not scores:
        shown = ", ".join(f"{item.name} {item.type} {item.shape}" for item in outputs)
        raise ConsilienceError(
            f"{name} has no output (N, K) of class scores; it has {shown}"
        )
    two = [
        item.name
        for item in outputs
        if item.name in scores and len(item.shape or ()) == 2
    ]
    return str((two or scores)[0])


def _file_digest(file: Path) -> bytes:
    """Of the file, and of the files beside it that hold its weights."""
    state = blake2b(digest_size=16)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        state.update(content)
        beside = {
            content[found.end() : found.end() + found[1][0]]
            for found in _LOCATION.finditer(content)
        }
    for name in sorted(beside):
        weights = file.parent / name.decode("utf-8", "replace")
        if weights.is_file():
            with weights.open("rb") as opened:
                state.update(file_digest(opened, blake2b).digest())
    return state.digest()


_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
"""In the protocol buffer: the key "location" of an external tensor, then the length of
its file's name.
"""


# ---- what it is shown


def _recipe(session: _Session, options: Onnx) -> tuple[Recipe, list[str]]:
    """How images are prepared, and what of that nobody said."""
    size, assumed = _size(session, options)
    bytes_in = session.input.dtype is np.uint8
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = plain if bytes_in else (IMAGENET_MEAN, IMAGENET_STD)
    if bytes_in and (options.mean or options.std or options.scale != 1):
        raise ConsilienceError(
            f"{options.file} takes bytes as they are; mean, std and scale are not for it"
        )
    if not bytes_in and (options.mean is None) != (options.std is None):
        raise ConsilienceError("onnx: mean and std go together")
    if options.mean is not None and options.std is not None:
        mean, std = (
            _colours(options.mean, options.scale, "mean"),
            _colours(options.std, options.scale, "std"),
        )
    elif options.scale != 1:
        mean, std = (
            _colours((0.0,), options.scale, "mean"),
            _colours((1.0,), options.scale, "std"),
        )
    elif not bytes_in:
        assumed += ["mean", "std"]
    resized = size if options.resize is None else (options.resize, options.resize)
    interpolation: images.Interpolation = options.interpolation
    return Recipe(
        size=size, resized=resized, interpolation=interpolation, mean=mean, std=std
    ), assumed


def _size(session: _Session, options: Onnx) -> tuple[tuple[int, int], list[str]]:
    own = session.input.sides
    told = options.size
    if told is not None and len(told) not in (1, 2):
        raise ConsilienceError(
            f"onnx: size is one number or height+width; got {'+'.join(map(str, told))}"
        )
    asked = (
        (told[0], told[-1]) if told is not None else (own[0] or 224, own[1] or 224)
    )
    for mine, wanted in zip(own, asked, strict=True):
        if mine is not None and mine != wanted:
            raise ConsilienceError(
                f"{options.file} takes {own[0] or 'any'} x {own[1] or 'any'}; size is "
                f"{asked[0]} x {asked[1]}"
            )
    return asked, ["size"] if told is None and None in own else []


def _colours(
    values: tuple[float, ...], scale: float, what: str
) -> tuple[float, float, float]:
    if len(values) not in (1, 3) or scale <= 0:
        raise ConsilienceError(
            f"onnx: {what} is one number or red+green+blue, scale above 0; got {values}, "
            f"{scale:g}"
        )
    first, second, third = values if len(values) == 3 else values * 3
    return first / scale, second / scale, third / scale


def _told(recipe: Recipe, assumed: list[str]) -> str:
    shown = {
        "size": "224 where it is open",
        "mean": f"mean {'+'.join(map(str, recipe.mean))}",
    }
    shown["std"] = f"std {'+'.join(map(str, recipe.std))} (ImageNet's)"
    return ", ".join(shown[what] for what in assumed)


def _tried(session: _Session, recipe: Recipe, name: str) -> tuple[_Session, Tensor]:
    """Raw outputs of plain images; a file that claims any number and takes only one
    gets one at a time.
    """
    prepared = recipe.normalised(trial_images(recipe.size))
    try:
        return session, run_backend(
            session, prepared, session.fixed or len(prepared), name
        )
    except ConsilienceError:
        if session.fixed is not None:
            raise
        session.fixed = 1
        return session, run_backend(session, prepared, 1, name)


def _class_names(options: Onnx, session: _Session) -> tuple[str, ...] | None:
    if options.labels and options.classes:
        raise ConsilienceError("onnx: give labels=FILE or classes=A+B, not both")
    if options.labels:
        return files.read_labels(options.labels)
    return options.classes or _names_within(session.metadata)


def _names_within(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Class names that exporters write into the metadata, as a list or a mapping from
    number to name.
    """
    for key in _NAMES:
        try:
            found = ast.literal_eval(metadata.get(key, ""))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict) and sorted(found) == list(range(len(found))):
            return tuple(str(found[index]) for index in range(len(found)))
        if isinstance(found, list) and found:
            return tuple(map(str, found))
    return None
