"""Models that only score: a function, a server, an exported file.

No gradients and no layers; what needs them refuses.

Everything that asks what the model says of edited images works on them: LIME, controls,
insertion and deletion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from threading import RLock
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from consilience import images
from consilience.models.engines import plan
from consilience.models.network import Recipe, pair, per_channel, relative_change
from consilience.types import (
    Array,
    ConsilienceError,
    Outputs,
    Sample,
    View,
    ViewMode,
    complement_names,
    with_complement,
)

Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
_WIDTH = 64
"""Channels of the widest full-size layer that is reckoned with where nobody can look
inside: VGG's.
"""
_SUMS_TO_ONE = 1e-3


class Backend(Protocol):
    """What is behind a black box: prepared images (n, 3, h, w) float32 to raw outputs
    (n, K).
    """

    @property
    def facts(self) -> Mapping[str, Any]:
        """Engine, precision and device, as they run."""

    @property
    def fixed(self) -> int | None:
        """How many images a pass has to have; None where any number will do."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs."""

    def on(self, device: str | None, engine: str | None) -> Backend:
        """The same on another device or engine, or `ConsilienceError`."""


@dataclass(frozen=True, eq=False, repr=False)
class BlackBox:
    """A forward-only `Model`.

    Make one with `wrap_callable` or ``load_model("onnx:FILE")``; calls of threads take
    turns.
    """

    backend: Backend
    recipe: Recipe
    classes: tuple[str, ...]
    outputs: Outputs
    name: str
    digest: str
    known: Mapping[str, Any] = field(default_factory=dict)
    most: int = 32
    mode: ViewMode = "crop"
    memory: int = plan.MEMORY
    spec: str | None = None
    complement: bool = False
    _lock: Any = field(default_factory=RLock, repr=False)

    can = frozenset[str]()

    def __post_init__(self) -> None:
        plan.check_engine("auto", "f32", self.memory, torch.device("cpu"))
        if self.mode not in ("crop", "squash"):
            raise ConsilienceError(f"view is crop or squash; got {self.mode!r}")

    def __repr__(self) -> str:
        height, width = self.recipe.size
        return (
            f"<{self.name}: {len(self.classes)} classes ({self.outputs}), "
            f"{self.channels} x {height} x {width}, scores only, "
            f"{self.backend.facts['engine']}>"
        )

    @property
    def channels(self) -> int:
        """How many numbers a pixel has that it takes."""
        return self.recipe.channels

    @property
    def id(self) -> str:
        """Name and digest of what is behind it and of how it is shown images."""
        return f"{self.name}@{self.digest}"

    @property
    def facts(self) -> dict[str, Any]:
        """What runs: engine, precision, device, images a pass, and what had to be found
        out or assumed.
        """
        return {**self.backend.facts, "batch": self.batch, **self.known}

    @property
    def batch(self) -> int:
        """How many images a pass takes: what the backend fixes, else within memory for
        a wide network of unknown inside.
        """
        if self.backend.fixed is not None:
            return self.backend.fixed
        height, width = self.recipe.size
        return min(
            self.most,
            plan.batch_within(
                self.memory,
                _WIDTH * height * width,
                (height, width),
                torch.device("cpu"),
            ),
        )

    def view(self, sample: Sample, mode: ViewMode | None = None) -> View:
        """The sample as this model is shown it (crop) or whole (squash); None means the
        model's default.
        """
        return self.recipe.shown(sample, mode or self.mode, torch.device("cpu"))

    def scores(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) in [0, 1] to (N, K) float32 raw outputs on the CPU."""
        if (
            pixels.dim() != 4
            or tuple(pixels.shape[1:]) != (self.recipe.channels, *self.recipe.size)
            or not pixels.is_floating_point()
        ):
            size = " x ".join(map(str, self.recipe.size))
            got = f"{tuple(pixels.shape)} {pixels.dtype}"
            raise ConsilienceError(
                f"{self.name} takes pixels (N, {self.recipe.channels}, h, w) of {size}, "
                f"floats in [0, 1]; got {got}"
            )
        if not len(pixels):
            return torch.empty(0, len(self.classes))
        with self._lock, torch.no_grad():
            prepared = self.recipe.normalised(
                pixels.detach().to("cpu", torch.float32)
            )
            found = run_backend(self.backend, prepared, self.batch, self.name)
        plan.record_pass(
            str(self.backend.facts["engine"]), str(self.backend.facts["precision"])
        )
        count = 1 if self.complement else len(self.classes)
        if found.shape[1] != count:
            raise ConsilienceError(
                f"{self.name} gave {found.shape[1]} outputs an image; on its trial it gave "
                f"{count}"
            )
        return with_complement(found, self.outputs) if self.complement else found

    @cached_property
    def randomness(self) -> float:
        """How far two answers to one image lie apart, as a share of the largest output;
        0 for a model that always says the same.
        """
        noise = trial_images(self.recipe.size, self.recipe.channels)[:1]
        return relative_change(self.scores(noise), self.scores(noise))

    def using(
        self,
        device: str | None = None,
        engine: str | None = None,
        precision: str | None = None,
        memory: int | None = None,
    ) -> BlackBox:
        """The same model on another device, in ``memory`` bytes; None keeps what is.

        Its precision is its own.
        """
        if precision not in (None, "f32"):
            raise ConsilienceError(
                f"{self.name} runs in the precision it was made in; precision={precision} is "
                f"for torch models"
            )
        backend = self.backend.on(device, engine)
        return replace(
            self,
            backend=backend,
            memory=self.memory if memory is None else memory,
            _lock=RLock(),
        )


def run_backend(backend: Backend, prepared: Tensor, batch: int, name: str) -> Tensor:
    """Raw outputs (N, K) float32 of N prepared images, chunk by chunk; only the last
    chunk is filled up, where it must be.
    """
    parts = []
    for chunk in torch.split(prepared, batch):
        full = (
            chunk
            if backend.fixed is None
            else plan.filled_batch(chunk, backend.fixed)
        )
        parts.append(_as_outputs(backend(full), len(full), name)[: len(chunk)])
    return torch.cat(parts)


def _as_outputs(said: Any, count: int, name: str) -> Tensor:
    """Scores as a new float32 tensor (n, K); (n, K, 1, 1) is taken for that too."""
    try:
        outputs = torch.as_tensor(said).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ConsilienceError(
            f"{name} returns {type(said).__name__}; a classifier returns numbers (N, K)"
        ) from None
    if outputs.dim() > 2 and all(side == 1 for side in outputs.shape[2:]):
        outputs = outputs.flatten(1)
    if outputs.dim() != 2 or len(outputs) != count or outputs.is_complex():
        raise ConsilienceError(
            f"{name} returns {tuple(outputs.shape)} for {count} images; a classifier returns "
            f"(N, K) scores"
        )
    return outputs.to("cpu", torch.float32, copy=True)


# ---- the trial


def trial_images(size: tuple[int, int], channels: int = 3) -> Tensor:
    """(3, C, h, w) in [0, 1]: noise, middle grey, a ramp; the same on every machine."""
    whole = (channels, *size)
    noise = np.random.default_rng(0).random(whole, dtype=np.float32)
    ramp = np.broadcast_to(np.linspace(0, 1, size[1], dtype=np.float32), whole)
    return torch.from_numpy(np.stack([noise, np.full_like(noise, 0.5), ramp]))


def kind_of(outputs: Tensor) -> Outputs:
    """Probabilities where the rows (n, K) are positive and sum to 1; else logits."""
    one = (outputs.sum(dim=1) - 1).abs().max() <= _SUMS_TO_ONE
    return (
        "probabilities"
        if outputs.shape[1] > 1 and bool(one) and bool((outputs >= 0).all())
        else "logits"
    )


def settle_outputs(
    told: Outputs | None, trial: Tensor, name: str
) -> tuple[Outputs, str]:
    """What the outputs are, and how that is known."""
    if told is not None and told not in get_args(Outputs):
        raise ConsilienceError(
            f"outputs are logits, sigmoid, probabilities or values; got {told!r}"
        )
    if not trial.isfinite().all():
        raise ConsilienceError(
            f"{name} gives scores that are not finite on a trial of plain images; check mean "
            f"and std"
        )
    found = kind_of(trial)
    if told == "logits" and trial.shape[1] == 1:
        return "sigmoid", "one logit: a yes or no"
    if found == "logits" and trial.shape[1] == 1:
        inside = bool(((trial >= 0) & (trial <= 1)).all())
        found = "probabilities" if inside else "sigmoid"  # a yes or no
    return (found, "found on a trial") if told is None else (told, "as told")


def is_yes_or_no(trial: Tensor, kind: Outputs) -> bool:
    """Whether the one output (n, 1) has a complement."""
    return trial.shape[1] == 1 and kind in ("sigmoid", "probabilities")


def settle_classes(
    given: Sequence[str] | None, count: int, name: str, complement: bool = False
) -> tuple[str, ...]:
    """The names of the outputs, or numbers; two of a yes or no and its complement."""
    if complement:
        count, given = 2, complement_names(given)
    if given is None:
        return tuple(f"class {index}" for index in range(count))
    if len(given) != count:
        raise ConsilienceError(
            f"{len(given)} class names for {name}, which gives {count} outputs an image"
        )
    return tuple(given)


def digest_of_parts(*parts: Any) -> str:
    """Hex digest of bytes and of the spelling of anything else."""
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(part if isinstance(part, bytes) else repr(part).encode())
    return state.hexdigest()


# ---- functions


@dataclass(frozen=True, eq=False)
class _Function:
    """A Python function as a backend."""

    function: Callable[[Any], Any]
    layout: Layout
    fixed = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"engine": "callable", "precision": "its own", "device": "its own"}

    def __call__(self, pixels: Tensor) -> Tensor:
        said: Tensor = self.function(
            pixels if self.layout == "nchw" else as_nhwc(pixels)
        )
        return said

    def on(self, device: str | None, engine: str | None) -> _Function:
        if device not in (None, "auto", "cpu") or engine not in (None, "auto"):
            raise ConsilienceError(
                "a callable runs where and how it does; device= and engine= are not for it"
            )
        return self


def as_nhwc(pixels: Tensor) -> Array:
    """(N, C, h, w) as a numpy array (N, h, w, C)."""
    return np.ascontiguousarray(pixels.numpy().transpose(0, 2, 3, 1))


def wrap_callable(
    function: Callable[[Any], Any],
    *,
    classes: Sequence[str] | None = None,
    size: int | tuple[int, int] = 224,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | tuple[int, int] | None = None,
    interpolation: images.Interpolation = "bilinear",
    view: ViewMode = "crop",
    outputs: Outputs | None = None,
    layout: Layout = "nchw",
    batch: int = 32,
    name: str | None = None,
    memory: int = plan.MEMORY,
) -> BlackBox:
    """Any function from images to scores as a forward-only `Model`.

    ``function`` is given up to ``batch`` images: a torch tensor (n, C, h, w) float32 in
    [0, 1], or with ``layout="nhwc"`` a numpy array (n, h, w, C), normalised where
    ``mean`` and ``std`` are given. C is ``channels``, as many as these are, else 3. It
    returns scores (n, K), torch or numpy. It is tried once on three plain images: that shows K, whether rows are probabilities
    (positive, sum 1; ``outputs`` overrides), and its scores there stand for the weights
    in ``model.id``. Raises `ConsilienceError` for other shapes; what the function
    raises goes through.
    """
    if not callable(function):
        raise ConsilienceError(
            f"wrap_callable takes a function; got {type(function).__name__}"
        )
    if layout not in LAYOUTS:
        raise ConsilienceError(f"layout is nchw or nhwc; got {layout!r}")
    if batch < 1:
        raise ConsilienceError(f"batch is at least 1; got {batch}")
    frame = pair(size)
    given = next((len(one) for one in (mean, std) if one is not None), 3)
    depth = channels or given
    recipe = Recipe(
        size=frame,
        resized=pair(resize) if resize is not None else frame,
        interpolation=interpolation,
        mean=per_channel(mean or (0.0,) * depth, depth, "mean"),
        std=per_channel(std or (1.0,) * depth, depth, "std"),
    )
    called = name or getattr(function, "__name__", type(function).__name__).strip(
        "<>"
    )
    backend = _Function(function, layout)
    with torch.no_grad():
        trial = run_backend(
            backend, recipe.normalised(trial_images(frame, depth)), batch, called
        )
    kind, how = settle_outputs(outputs, trial, called)
    single = is_yes_or_no(trial, kind)
    return BlackBox(
        backend,
        recipe,
        settle_classes(classes, trial.shape[1], called, single),
        kind,
        called,
        digest_of_parts(recipe, kind, layout, trial.numpy().tobytes()),
        {"outputs": f"{kind}, {how}", "weights": "its own"},
        most=batch,
        mode=view,
        memory=memory,
        complement=single,
    )
