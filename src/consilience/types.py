"""The nouns: what a sample, a model, a target, an explanation and a score are.

A Sample is shown to a Model; an Explainer makes an Explanation; a Metric gives it a
Score. Everything here is data or a protocol: nothing has to be inherited, and nothing
here computes more than a slice of what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    overload,
    runtime_checkable,
)

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

Array = NDArray[Any]
ViewMode = Literal["crop", "squash"]
Outputs = Literal["logits", "sigmoid", "probabilities", "values"]
"""What a model returns: logits of classes that exclude each other, logits of labels that
do not (one of them is a yes or no), probabilities, or plain numbers.
"""


def as_probabilities(outputs: Tensor, kind: str) -> Tensor:
    """Probabilities (..., K) of raw outputs of a kind; plain numbers stay as they are."""
    if kind == "logits":
        return outputs.softmax(dim=-1)
    return outputs.sigmoid() if kind == "sigmoid" else outputs


def with_complement(outputs: Tensor, kind: str) -> Tensor:
    """The one output (N, 1) of a yes or no and, second, that of its complement (N, 2):
    the other sign of a logit, the rest of a probability.
    """
    import torch

    other = 1 - outputs if kind == "probabilities" else -outputs
    return torch.cat([outputs, other], dim=1)


def complement_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of a yes or no and its complement, of the name of one or of both."""
    if names is None or len(names) != 1:
        return None if names is None else tuple(names)
    return (names[0], f"not {names[0]}")


DEFAULT_MODEL = "efficientnet_lite0"
"""The network whose weights come with the program."""

PIXELS = "pixels"
"""The name of the layer that is the image itself, wherever a layer is asked for."""


class ConsilienceError(ValueError):
    """An expected failure, said in one line: what was wrong, what was got, what there
    is.
    """


OF_IMAGE = ("image", "marked", "others")
"""Facts of a reason that differ from image to image: reasons that differ in nothing else
are one reason.
"""


def unexpected(error: Exception) -> str:
    """An exception of someone else's code in one line, with its kind."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:MOST_LETTERS]}".rstrip(": ")


MOST_LETTERS = 300
"""Of an exception's message in a line: torch's may hold a whole compiled graph."""


class NotApplicable(ConsilienceError):  # noqa: N818 - it is a verdict, not a fault
    """A method or metric that cannot say anything about this case, with the reason.

    A ``code`` and facts, or in a plug-in a ``text`` that may name facts in braces:
    ``NotApplicable("{image} has no edges", image=sample.name)``. What a fact is called
    matters: those in `OF_IMAGE` are left out when reasons are counted over images.
    """

    def __init__(self, text: str = "", *, code: str = "said", **facts: Any) -> None:
        super().__init__(text)
        self.code = code
        self.facts: dict[str, Any] = {"text": text, **facts} if text else facts

    def __str__(self) -> str:
        from consilience.show.words import reason_sentence

        return reason_sentence(self.code, self.facts)


@dataclass(frozen=True)
class Box:
    """A rectangle of one class: ``index`` of the class, edges in pixels (x to the
    right, y down, upper edges exclusive).
    """

    index: int | None
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, eq=False)
class Sample:
    """An image as a person sees it, with what is known about it.

    ``pixels`` is (H, W, 3) uint8 RGB with the EXIF orientation applied, or any number
    of channels (H, W, C) as uint8, uint16 or floats. ``value_range`` are the values
    that become 0 and 1 where a model is shown the image: (0, 255), (0, 65535) and (0, 1)
    unless told. ``display`` is what people and superpixels are shown of it, (H, W, 3)
    uint8; None takes a grey image as grey and the first three of more channels, and
    brightens what would be seen as black.
    ``label`` is the true class, ``boxes`` in pixels of the image, ``masks`` concept or
    class to (H, W) bool. ``notes`` say what reading had to decide ("first of 12
    frames"), ``source`` the file that it was read from, where it was read from one.
    Raises `ConsilienceError` for other arrays, and for values outside of their range.
    """

    name: str
    pixels: Array
    label: int | None = None
    boxes: tuple[Box, ...] = ()
    masks: Mapping[str, Array] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str = ""
    value_range: tuple[float, float] | None = None
    display: Array | None = None

    def __post_init__(self) -> None:
        pixels = self.pixels
        if isinstance(pixels, np.ndarray) and pixels.ndim == 2:
            pixels = pixels[:, :, None]
            object.__setattr__(self, "pixels", pixels)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.ndim != 3
            or not (
                pixels.dtype in (np.uint8, np.uint16)
                or np.issubdtype(pixels.dtype, np.floating)
            )
        ):
            got = f"{getattr(pixels, 'dtype', type(pixels).__name__)} {getattr(pixels, 'shape', '')}".strip()
            raise ConsilienceError(
                f"a sample's pixels are (H, W, C) uint8, uint16 or floats; {self.name!r} has "
                f"{got}"
            )
        if 0 in pixels.shape:
            raise ConsilienceError(
                f"{self.name!r} is an empty image: {pixels.shape[1]} x {pixels.shape[0]}"
                + ("" if pixels.shape[2] else " of no channels")
            )
        if pixels.shape[2] > MOST_CHANNELS:
            raise ConsilienceError(
                f"{self.name!r} has {pixels.shape[2]} channels last, {pixels.shape}; "
                f"pixels are (H, W, C), channels last, at most {MOST_CHANNELS}"
            )
        self._check_range()
        self._check_display()

    def _check_range(self) -> None:
        low, high = self.range
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ConsilienceError(
                f"a value range is two numbers, low before high; {self.name!r} has "
                f"{self.value_range}"
            )
        if self.pixels.dtype == np.uint8 and (low, high) == WHOLE_RANGE["u1"]:
            return
        least, most = float(self.pixels.min()), float(self.pixels.max())
        if not low <= least <= most <= high:
            said = "" if self.value_range else "; give value_range=(low, high)"
            raise ConsilienceError(
                f"{self.name!r} has values from {least:g} to {most:g}; its range is "
                f"{low:g} to {high:g}{said}"
            )

    def _check_display(self) -> None:
        shown = self.display
        if shown is None:
            return
        if (
            not isinstance(shown, np.ndarray)
            or shown.dtype != np.uint8
            or shown.shape != (*self.pixels.shape[:2], 3)
        ):
            got = f"{getattr(shown, 'dtype', type(shown).__name__)} {getattr(shown, 'shape', '')}".strip()
            height, width = self.pixels.shape[:2]
            raise ConsilienceError(
                f"display is ({height}, {width}, 3) uint8 RGB as {self.name!r} is large; got "
                f"{got}"
            )

    @property
    def channels(self) -> int:
        """How many numbers a pixel has."""
        return int(self.pixels.shape[2])

    @property
    def range(self) -> tuple[float, float]:
        """The values that become 0 and 1."""
        return self.value_range or WHOLE_RANGE.get(self.pixels.dtype.str[1:], (0, 1))

    @property
    def plain(self) -> bool:
        """Whether it is an 8-bit RGB image like any other."""
        eight = self.pixels.dtype == np.uint8 and self.range == WHOLE_RANGE["u1"]
        return eight and self.channels == 3

    @cached_property
    def rgb(self) -> Array:
        """What people are shown of it, (H, W, 3) uint8."""
        if self.display is not None:
            return self.display
        if self.plain:
            return self.pixels
        return np.rint(
            self._shares_shown().clip(0, self.gain) / self.gain * 255
        ).astype(np.uint8)

    @cached_property
    def gain(self) -> float:
        """The share of its range that people are shown as white: 1, but of more than 8
        bits where hardly any value reaches half of it, which would be seen as black.
        """
        if self.pixels.dtype == np.uint8:
            return 1.0
        bright = float(np.percentile(self._shares_shown(), BRIGHT))
        return bright if 0 < bright < DIM else 1.0

    def _shares_shown(self) -> Array:
        """The channels that people are shown, as shares of the range."""
        low, high = self.range
        chosen = self.pixels[:, :, shown_channels(self.channels)]
        shares: Array = (chosen.astype(np.float64) - low) / (high - low)
        return shares

    @cached_property
    def digest(self) -> str:
        """Hex digest of the decoded image: shape and pixels, and of others than 8-bit
        RGB how they are meant.
        """
        meant = "" if self.plain else f"{self.pixels.dtype.str}{self.range}"
        state = blake2b(f"{self.pixels.shape!r}{meant}".encode(), digest_size=16)
        state.update(np.ascontiguousarray(self.pixels).tobytes())
        if self.display is not None:
            state.update(np.ascontiguousarray(self.display).tobytes())
        return state.hexdigest()


WHOLE_RANGE = {"u1": (0.0, 255.0), "u2": (0.0, 65535.0)}
"""Values of a whole-numbered pixel that become 0 and 1 unless told; floats are shares."""

BRIGHT, DIM = 99.5, 0.5
"""An image of more than 8 bits is brightened where this percentile of its values lies below
this share of its range: cameras and sensors rarely fill it.
"""

MOST_CHANNELS = 512
"""More numbers a pixel (hyperspectral cameras have up to some 400) are a side of an image
with channels first.
"""


def shown_channels(channels: int) -> list[int]:
    """Which of so many channels stand for red, green and blue.

    >>> shown_channels(1), shown_channels(11)
    ([0, 0, 0], [0, 1, 2])
    """
    return [0, 1, 2] if channels >= 3 else [0, 0, 0]


class Geometry(Protocol):
    """Where a model's input lies on the image. Half-pixel centres throughout."""

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""

    @overload
    def to_input(self, thing: Box) -> Box: ...
    @overload
    def to_input(self, thing: Array) -> Array: ...
    def to_input(self, thing: Box | Array) -> Box | Array:
        """Move a box, a mask or a label map (any resolution, covering the image) into
        the model's frame.
        """

    def to_image(self, values: Array) -> Array:
        """Move a map (any resolution, covering the input) onto the image; NaN where the
        model did not look.
        """

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, enough to build the same geometry again."""


@dataclass(frozen=True, eq=False)
class View:
    """What a model is shown of a sample: ``pixels`` (1, C, h, w) float32 in [0, 1] on
    the model's device, RGB where C is 3.

    ``neutral`` is the colour that the network takes as zero: the mean it normalises
    with, black where it does not say. ``display`` is the sample's own in the same frame,
    (h, w, 3) uint8, where it has one. ``notes`` say what had to be decided.
    """

    pixels: Tensor
    geometry: Geometry
    mode: ViewMode
    neutral: tuple[float, ...] = (0.0, 0.0, 0.0)
    display: Array | None = None
    notes: tuple[str, ...] = ()

    @property
    def rgb(self) -> Array:
        """The image as people see it, (h, w, 3) float64 in [0, 1]: what superpixels and
        edges are cut from.
        """
        if self.display is not None:
            return self.display.astype(np.float64) / 255
        pixels = self.pixels[0].detach().cpu().double().permute(1, 2, 0).numpy()
        three: Array = pixels[:, :, shown_channels(pixels.shape[2])]
        return pixels if pixels.shape[2] == 3 else three


@dataclass(frozen=True)
class Layer:
    """A place inside a network.

    ``spatial`` is the (height, width) of its map, None for a vector.
    """

    name: str
    channels: int
    spatial: tuple[int, int] | None
    kind: Literal["map", "tokens", "vector"] = "map"


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward and backward pass: by layer the activations and d(sum of
    scores)/d(activations), both (N, C, h, w).
    """

    outputs: Tensor
    activations: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


Fidelity = Literal["exact", "auto", "bf16"]


@dataclass(frozen=True)
class Cheaper:
    """A cheap copy of a network and what a pass of it costs, in passes of the network."""

    kind: str
    model: Model
    cost: float


@runtime_checkable
class Target(Protocol):
    """What is explained: a class, a difference, a unit, a box, an embedding's cosine."""

    @property
    def index(self) -> int | None:
        """The class, where it is one."""

    @property
    def name(self) -> str:
        """For people and tables."""

    @property
    def score(self) -> str:
        """Which number of the class: logit, probability, value."""

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of model outputs (N, K)."""


@dataclass(frozen=True)
class ClassTarget:
    """One class of a classifier, as the model's raw output or as a probability."""

    index: int
    name: str
    score: Literal["logit", "probability", "value"] = "logit"
    outputs: Outputs = "logits"

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of model outputs (N, K)."""
        if self.score == "probability":
            outputs = as_probabilities(outputs, self.outputs)
        return outputs[..., self.index]

    def scored(self, score: str) -> ClassTarget:
        """The same class read as ``score``, as far as the model's outputs allow: logits
        cannot be had from probabilities.
        """
        if self.outputs == "values":
            return replace(self, score="value")
        if self.outputs == "probabilities":
            return replace(self, score="probability")
        return replace(self, score=score)  # type: ignore[arg-type]


class Tail(Protocol):
    """The part of a network after a layer, for one image: activations (N, C, h, w) to
    raw outputs (N, K).
    """

    @property
    def kind(self) -> str:
        """The way it runs: closed (pooling and one linear layer), split or replay."""

    @property
    def logits(self) -> Tensor:
        """What the model says of the image itself, (1, K)."""

    def __call__(self, activations: Tensor) -> Tensor:
        """Raw outputs as if the layer had given these activations; without gradients."""

    def without(
        self, channels: Sequence[int] | Tensor, batch: int | None = None
    ) -> Tensor:
        """Raw outputs (n, K) with one channel of the layer at a time set to zero, in
        the order of ``channels``.
        """


@runtime_checkable
class Model(Protocol):
    """Anything that scores images: a torch module, a callable, an ONNX file, a server."""

    @property
    def id(self) -> str:
        """Name and digest of the weights; changes with either."""

    @property
    def spec(self) -> str | None:
        """How a worker loads the model again; None where only this process has it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""

    @property
    def outputs(self) -> Outputs:
        """What ``scores`` returns."""

    @property
    def can(self) -> frozenset[str]:
        """Some of gradients, layers, module: what explainers may need beyond scores."""

    @property
    def facts(self) -> dict[str, Any]:
        """What ran: engine, precision, device, and weights as far as known, after
        ``auto`` is resolved.
        """

    @property
    def batch(self) -> int:
        """How many images a pass takes best within the memory budget."""

    def view(self, sample: Sample, mode: ViewMode | None = None) -> View:
        """The sample as this model was trained to see it (crop) or whole (squash); None
        means the model's default.
        """

    def scores(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] to (N, K) raw outputs by the fastest exact engine,
        without gradients.
        """

    def using(
        self,
        device: str | None = None,
        engine: str | None = None,
        precision: str | None = None,
        memory: int | None = None,
    ) -> Model:
        """The same model on another device or engine, in another precision, in
        ``memory`` bytes; None keeps what is.
        """


@runtime_checkable
class Network(Model, Protocol):
    """A torch module, opened. The module comes back from every call as it was: mode,
    gradients, hooks, weights.
    """

    @property
    def module(self) -> nn.Module:
        """The user's own module."""

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] to (N, K), differentiable."""

    def layers(self) -> tuple[Layer, ...]:
        """Every layer that gives one map or vector, in the order of the forward pass;
        token grids are given as maps.
        """

    def target_layer(self) -> str:
        """The last spatial output, after activation and residual: where a CAM looks
        unless told.
        """

    def activations(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """One forward pass: by layer (N, C, h, w)."""

    def trace(self, pixels: Tensor, layers: Sequence[str], target: Target) -> Trace:
        """Activations and d score / d activations by layer; ``PIXELS`` is a layer too."""

    def tail(self, pixels: Tensor, layer: str) -> Tail:
        """The network after ``layer`` for one image (1, 3, h, w): what would it say if
        this layer had said that?
        """

    def with_module(self, module: nn.Module) -> Network:
        """The same adapter round another module: randomised weights, rule-wrapped
        copies.
        """


@dataclass(frozen=True, eq=False)
class Heat:
    """What an explainer returns: a raw map (h', w') at its own resolution, its arrays,
    and facts of the making.
    """

    values: Tensor
    extras: Mapping[str, Array] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Explainer(Protocol):
    """A frozen dataclass whose fields are its options.

    An optional ``explain_batch(model, views, targets)`` gives a list.
    """

    needs: ClassVar[frozenset[str]]

    def explain(self, model: Any, view: View, target: Target) -> Heat:
        """Raw map and extras for one image."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """A raw map of one image, one model and one target, with enough to draw it without
    the model.

    ``values`` is (h, w) float32, signed and unscaled, in the model's frame;
    ``explainer`` its spec as spelled; ``extras`` what the method keeps beside it (LIME:
    segments, weights, refit, r2); ``provenance`` how it was made.
    """

    sample: Sample
    model_id: str
    explainer: str
    target: Target
    geometry: Geometry
    values: Array
    extras: Mapping[str, Array] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The explainer's name without its options."""
        return self.explainer.partition(":")[0]

    def to_image(self) -> Array:
        """The map in the image's frame, (H, W) float32; NaN where the model did not
        look.
        """
        return self.geometry.to_image(self.values).astype(np.float32)

    def mask(self, cutter: Any = None) -> Array:
        """A binary mask (h, w) bool in the model's frame, as a cutter (``"top:.2"``,
        ``"superpixels"``) cuts it; None takes the default for this explanation.

        Raises `NotApplicable` where the cut cannot be made.
        """
        from consilience.agreement.masks import build_cutter

        on: Array = build_cutter(cutter, self).cut(self).on
        return on

    def overlay(self) -> Array:
        """The map over its image, (H, W, 3) uint8, stronger where the value is larger.

        Where the model did not look the image stays as it is.
        """
        from consilience.show.figures import overlay_on_image

        return overlay_on_image(self)

    def figure(self) -> Figure:
        """The image and the map over it as a matplotlib figure, with its scale."""
        from consilience.show.figures import explanation_figure

        return explanation_figure(self)

    def show(self) -> None:
        """Display the figure: in a notebook below the cell, else in the image viewer."""
        from consilience.show.figures import show_figure

        show_figure(self.figure())

    def save(self, path: str | Path, image: bool = True) -> Path:
        """Write everything into one file (.npz, whole or not at all); returns its path.

        Without ``image`` the file keeps the digest of the image instead of its pixels.
        """
        from consilience.saved import save_explanation

        return save_explanation(self, path, image)

    @classmethod
    def of(
        cls,
        sample: Any,
        values: Any,
        model: Any,
        target: str | int | Target = "predicted",
        name: str = "own",
        view: ViewMode | None = None,
        frame: Literal["input", "image"] = "input",
    ) -> Explanation:
        """A map that was made elsewhere, to be compared and scored like any other.

        ``values`` are (h, w) numbers of any resolution that cover the model's input, or
        with ``frame="image"`` the whole image; ``name`` is what it is called. ``sample``,
        ``model``, ``target`` and ``view`` are those of `explain`. Metrics that explain
        again do not apply to it.
        """
        from consilience.api import own_explanation

        return own_explanation(sample, values, model, target, name, view, frame)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """An explanation as it was saved; nothing is unpickled.

        Raises `ConsilienceError` for a file that is not one, or is damaged.
        """
        from consilience.saved import load_explanation

        return load_explanation(path)

    def __repr__(self) -> str:
        height, width = self.values.shape
        return (
            f"Explanation({self.explainer} of {self.target.name!r} in "
            f"{self.sample.name!r}, {height} x {width}, {self.model_id})"
        )

    def _repr_html_(self) -> str:
        from consilience.show.figures import explanation_html

        return explanation_html(self)


@dataclass(frozen=True, eq=False)
class Score:
    """A metric's number for one explanation, with its curve where it has one."""

    value: float
    curve: Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """A frozen dataclass that scores an explanation, or raises `NotApplicable` with the
    reason.
    """

    higher_is_better: ClassVar[bool]
    bounds: ClassVar[tuple[float, float]]

    def score(self, model: Any, view: View, explanation: Explanation) -> Score:
        """The number, and the curve behind it."""


Scorer = Callable[["Tensor"], "Tensor"]
"""Pixels (N, 3, h, w) in [0, 1] to scores (N,)."""
