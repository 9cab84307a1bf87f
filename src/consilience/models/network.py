"""The adapter round a torch module: how it is shown an image, run, opened and handed
back as it was.

Normalisation and geometry belong here and nowhere else: everything outside works on RGB
pixels in [0, 1].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from consilience import images
from consilience.models import layers as anatomy
from consilience.models.backward import (
    AllOutputs,
    GradientPlan,
    kept_bytes,
    plan_gradients,
)
from consilience.models.cheap import cheaper_copy
from consilience.models.engines import plan, runner
from consilience.models.engines.openvino_gradients import (
    Read,
    UnwrittenError,
    written_score,
)
from consilience.models.engines.torch import autocast
from consilience.models.layers import (
    Anatomy,
    asking,
    borrowed,
    frozen,
    hooked,
)
from consilience.models.norms import folding, run_folded
from consilience.models.tail import NetworkTail, TailKind, make_tail
from consilience.types import (
    PIXELS,
    Cheaper,
    ClassTarget,
    ConsilienceError,
    Fidelity,
    Layer,
    Outputs,
    Sample,
    Target,
    Trace,
    View,
    ViewMode,
    complement_names,
    unexpected,
    with_complement,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEWS = 96
"""Views that are kept while a run works with a network, 600 kB each at 224 x 224."""
HALF_SCALE = 1024
"""What a score is multiplied by on its way back in f16, whose smallest number is 6e-8."""
PRECISION_OF = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}
WRITTEN_WEIGHTS = 100_000_000
"""Up to which a backward pass is written out for another engine: kernels are there twice, and
it is packed for the processor once more, on disk and in memory.
"""
MANY_PASSES = 10
"""From which on it is worth knowing how passes are fastest."""
_CACHED = ("anatomy", "_target_layer", "_kept", "_gradients_arrive", "randomness")


# ---- the recipe


@dataclass(frozen=True)
class Recipe:
    """How a network was trained to see an image: the frame ``size``, what is resized
    before it is cut, the normalisation.

    ``resized`` is (height, width). With ``crop="short"`` the shorter side goes to
    ``resized`` (torchvision, timm ``center``), with ``"long"`` the longer side and the
    rest is padded (timm ``border``), with ``"exact"`` both sides (timm ``squash``);
    then the centre is cut. ``pad`` is the colour of what lies outside the image, in [0,
    1].
    """

    size: tuple[int, int] = (224, 224)
    resized: tuple[int, int] = (256, 256)
    crop: Literal["short", "long", "exact"] = "short"
    interpolation: images.Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pad: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if min(*self.size, *self.resized) < 1:
            raise ConsilienceError(
                f"a frame has at least one pixel; got size {self.size}, resized {self.resized}"
            )
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConsilienceError(
                f"mean and std are a number a channel, std above 0; got {self.mean}, "
                f"{self.std}"
            )
        if len(self.pad) != len(self.mean):
            if len(set(self.pad)) != 1:
                raise ConsilienceError(
                    f"pad is a number a channel; got {self.pad} for {len(self.mean)}"
                )
            object.__setattr__(self, "pad", self.pad[:1] * len(self.mean))

    @property
    def channels(self) -> int:
        """How many numbers a pixel has that the network takes."""
        return len(self.mean)

    def placement(self, image: tuple[int, int], mode: ViewMode) -> images.Placement:
        """Where the frame lies on an image of that (height, width)."""
        if mode == "squash":
            return images.Placement.squash(image, self.size)
        if self.crop == "short" and self.resized[0] == self.resized[1]:
            return images.Placement.crop(image, self.resized[0], self.size)
        return images.Placement.centred(image, self._resized(image), self.size)

    def _resized(self, image: tuple[int, int]) -> tuple[int, int]:
        if self.crop == "exact":
            return self.resized
        ratios = [image[axis] / self.resized[axis] for axis in (0, 1)]
        ratio = max(ratios) if self.crop == "long" else min(ratios)
        return max(1, round(image[0] / ratio)), max(1, round(image[1] / ratio))

    def shown(self, sample: Sample, mode: ViewMode, device: torch.device) -> View:
        """The sample in this frame, on ``device``."""
        if mode not in ("crop", "squash"):
            raise ConsilienceError(f"view is crop or squash; got {mode!r}")
        whole, notes = images.as_channels(sample, self.channels)
        placement = self.placement((whole.shape[0], whole.shape[1]), mode)
        pixels = images.place(whole, placement, self.interpolation, self.pad)
        display = None
        if sample.display is not None or sample.gain < 1:
            display = images.place(sample.rgb, placement, self.interpolation, 0.0)
        return View(
            images.to_tensor(pixels).to(device),
            placement,
            mode,
            self.mean,
            display,
            notes,
        )

    def normalised(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) in [0, 1] as the network takes it."""
        mean = torch.tensor(self.mean, dtype=pixels.dtype, device=pixels.device)[
            :, None, None
        ]
        std = torch.tensor(self.std, dtype=pixels.dtype, device=pixels.device)[
            :, None, None
        ]
        return (pixels - mean) / std


# ---- the adapter


@dataclass(frozen=True, eq=False, repr=False)
class TorchNetwork:
    """A torch classifier as the `Network` protocol has it.

    Make one with `wrap` or `load_model`.

    The module is shared, not copied, and comes back from every call as it was: mode,
    gradients, hooks, weights. Passes of several threads through one module take turns.
    """

    module: nn.Module
    recipe: Recipe = Recipe()
    labels: tuple[str, ...] | None = None
    outputs: Outputs = "logits"
    name: str = "module"
    source: str | None = None
    weights: str = "the module's own"
    mode: ViewMode = "crop"
    engine: str = "auto"
    precision: str = "f32"
    memory: int = plan.MEMORY
    assumed: str = ""
    complement: bool = False
    output: str | int | None = None
    gradient_plan: GradientPlan | None = None
    _runner: runner.Runner = field(default_factory=runner.Runner, repr=False)

    can = frozenset({"gradients", "layers", "module"})

    def __post_init__(self) -> None:
        if self.mode not in ("crop", "squash"):
            raise ConsilienceError(f"view is crop or squash; got {self.mode!r}")
        if self.outputs not in get_args(Outputs):
            raise ConsilienceError(
                f"outputs are logits, sigmoid, probabilities or values; got {self.outputs!r}"
            )
        plan.check_engine(self.engine, self.precision, self.memory, self.device)
        if self.dtype != torch.float32:
            if self.engine not in ("auto", "torch"):
                raise ConsilienceError(
                    f"engine {self.engine} runs float32 networks; {self.name} has weights "
                    f"in {_called(self.dtype)}; take engine=torch, or give module.float()"
                )
            object.__setattr__(self, "engine", "torch")

    def __repr__(self) -> str:
        height, width = self.frame
        return (
            f"<{self.name}: {len(self.classes)} classes ({self.outputs}), "
            f"{self.channels} x {height} x {width}, {self.facts['precision']} on "
            f"{self.device}>"
        )

    # -- what it is

    @property
    def id(self) -> str:
        """Name and digest of weights, architecture and normalisation; follows the
        weights if they are changed.
        """
        return f"{self.name}@{self.digest}"

    @property
    def digest(self) -> str:
        """Hex digest of the state dict's tensors in order, the architecture with its
        settings, and the recipe.
        """
        settings = repr(self.recipe) + self.outputs + "+" * self.complement
        return self._runner.digest(self.module, settings, self.anatomy.volatile)

    def holding(self) -> AbstractContextManager[None]:
        """While somebody works with it who changes no weight; see `Runner.holding`."""
        return self._runner.holding()

    @property
    def spec(self) -> str | None:
        """How a worker loads the model again; None where only this process has it."""
        return self.source

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.labels or tuple(
            f"class {index}" for index in range(self.anatomy.outputs)
        )

    @property
    def module_outputs(self) -> int:
        """How many outputs the module has, without a complement."""
        return 1 if self.complement else self.anatomy.outputs

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(
            (tensor.device for tensor in self.module.parameters()),
            torch.device("cpu"),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what the module takes."""
        kinds = (value.dtype for value in self.module.parameters())
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    @property
    def own_precision(self) -> str:
        """What plain torch runs the weights in."""
        return PRECISION_OF[self.dtype]

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of what the module takes."""
        return self.recipe.size

    @property
    def channels(self) -> int:
        """How many numbers a pixel has that the module takes."""
        return self.recipe.channels

    @property
    def largest(self) -> int:
        """Floats of the largest thing that any layer returns for one image."""
        return self.anatomy.largest

    @property
    def facts(self) -> dict[str, Any]:
        """What ``scores`` ran on, or will: engine, precision, device, weights; then
        batch, threads, versions, notes too.
        """
        own = {} if self.dtype == torch.float32 else {"precision": self.own_precision}
        return {
            **self._runner.facts(self),
            **own,
            "device": str(self.device),
            "weights": self.weights,
            **({"assumed": self.assumed} if self.assumed else {}),
        }

    @property
    def batch(self) -> int:
        """How many images a pass takes within the memory budget."""
        return plan.batch_within(self.memory, self.largest, self.frame, self.device)

    @property
    def gradient_batch(self) -> int:
        """How many images a forward and backward pass takes within the memory budget, or
        as many as were found to be fastest.
        """
        if self.gradient_plan is not None:
            return self.gradient_plan.batch
        return plan.backward_batch_within(
            self.memory, self._kept, self.largest, self.frame, self.device
        )

    @cached_property
    def _kept(self) -> int:
        """Bytes that a pass of one image keeps for the backward pass to it."""
        with borrowed(self.module), frozen(self.module):
            return kept_bytes(self.module, self.folded, self._blank())

    def for_gradients(
        self,
        count: int,
        layers: Sequence[str] = (PIXELS,),
        target: Target | None = None,
    ) -> TorchNetwork:
        """The same model, whose `trace` takes the layout, images a pass, precision and
        engine that are fastest here for ``count`` passes; as it is where they are few.
        Without a ``target``, as one that only torch can read.

        The first time on a machine it takes a trial of some seconds.
        """
        if count < MANY_PASSES or self.gradient_plan is not None:
            return self
        layout = self.anatomy.channels_last
        start = GradientPlan(layout, 1, self.own_precision)
        others = [replace(start, channels_last=False)] if layout else []
        if self.precision in plan.LOW and plan.native_low(
            self.precision, self.device
        ):
            others += [
                replace(one, precision=self.precision) for one in (start, *others)
            ]
        planned = plan.plan_engine(self.engine, self.precision, self.device)
        size = sum(one.numel() for one in self.module.parameters())
        if (
            planned["engine"] == "openvino"
            and self.own_precision == "f32"
            and size <= WRITTEN_WEIGHTS
        ):
            others.append(replace(start, engine="openvino"))
        found = plan_gradients(self, self.gradient_batch, start, others, self._timed)
        if target is None or self._written_score(layers, target) is None:
            return self._planned(found.by_torch)
        return self._planned(found)

    def _planned(self, found: GradientPlan) -> TorchNetwork:
        # asked in front of every pass: found out here, it is found out once
        _ = self._gradients_arrive
        return self._hand_over(replace(self, gradient_plan=found))

    def _timed(self, found: GradientPlan, pixels: Tensor) -> object:
        planned = self._planned(found)
        if found.engine == "torch":
            return planned.trace(pixels, [PIXELS], AllOutputs())
        goal = ClassTarget(0, "", "logit", self.outputs)
        made = planned._written(self._checked(pixels), [PIXELS], goal)
        if made is None:
            raise UnwrittenError(found.said)
        return made

    # -- how it is shown an image

    def view(self, sample: Sample, mode: ViewMode | None = None) -> View:
        """The sample as this model was trained to see it (crop) or whole (squash); None
        means the model's default.
        """
        mode = mode or self.mode
        known = self._runner.views  # while somebody works with many images
        if known is None:
            return self.recipe.shown(sample, mode, self.device)
        made = known.get((id(sample), mode))
        if made is None or made[0] is not sample:
            made = sample, self.recipe.shown(sample, mode, self.device)
            with suppress(RuntimeError):  # another thread does the same
                while len(known) >= VIEWS:
                    known.pop(next(iter(known)), None)
            known[id(sample), mode] = made
        return made[1]

    # -- how it is run

    def scores(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] to (N, K) float32 raw outputs by the fastest exact
        engine, without gradients.
        """
        return self._runner.scores(self, self._checked(pixels).detach())

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] to (N, K) raw outputs, differentiable with respect to
        the pixels.
        """
        plan.record_pass("torch", self.own_precision)
        with borrowed(self.module):
            return self.run(self._checked(pixels))

    def run(self, pixels: Tensor) -> Tensor:
        """One plain torch pass in the layout that suits the module; the caller has
        borrowed it.
        """
        return self._run(pixels, self._channels_last)

    @property
    def _channels_last(self) -> bool:
        known = self.gradient_plan
        return self.anatomy.channels_last if known is None else known.channels_last

    def folded(self, pixels: Tensor) -> Tensor:
        """A pass with batch norms folded into the convolutions before them, on the way to
        a gradient.
        """
        mode = torch.is_grad_enabled()

        def run() -> Tensor:
            torch.set_grad_enabled(
                mode
            )  # a pass that was given up may have turned it
            return self.run(pixels)

        return run_folded(self.module, self.anatomy.norms, self._layout, run)

    def folding(self) -> AbstractContextManager[Any]:
        """What `folded` runs within, after a first pass that shows what can be folded."""
        return folding(self.module, self.anatomy.norms, self._layout)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self._channels_last else torch.contiguous_format

    def _run(self, pixels: Tensor, channels_last: bool) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        prepared = self.prepared(pixels).contiguous(memory_format=layout)
        return self.read(self.module(prepared))

    def prepared(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) in [0, 1] as the module takes it: normalised, in its precision."""
        return self.recipe.normalised(pixels).to(self.dtype)

    def read(self, said: Any) -> Tensor:
        """Outputs (N, K) of what the module returns, at least in float32."""
        outputs = anatomy.as_outputs(said, self.output)
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        return with_complement(outputs, self.outputs) if self.complement else outputs

    def _checked(self, pixels: Tensor) -> Tensor:
        if (
            pixels.dim() != 4
            or pixels.shape[1] != self.recipe.channels
            or not pixels.is_floating_point()
        ):
            raise ConsilienceError(
                f"pixels are (N, {self.recipe.channels}, h, w) floats in [0, 1]; got "
                f"{tuple(pixels.shape)} {pixels.dtype}"
            )
        return pixels.to(self.device, torch.float32)

    def _blank(self) -> Tensor:
        return torch.zeros(
            1, self.recipe.channels, *self.recipe.size, device=self.device
        )

    def cheaper(self, fidelity: Fidelity) -> Cheaper | str:
        """A copy in low precision for most of many draws, with the cost of a pass in
        passes of this one, found by a trial once on a machine; or why there is none.
        """
        return cheaper_copy(self, fidelity)

    @cached_property
    def in_bf16(self) -> TorchNetwork:
        """The same in that precision; kept, since its engine takes a while to get ready."""
        return self.using(precision="bf16")

    # -- how it is opened

    @cached_property
    def anatomy(self) -> Anatomy:
        """What one dry pass of a black image shows of the module."""
        with borrowed(self.module):
            return anatomy.examine(self.module, self._run, self._blank())

    def layers(self) -> tuple[Layer, ...]:
        """Every layer that gives one map or vector, in the order of the forward pass;
        token grids are given as maps.

        Modules that run several times in a pass (a shared ReLU) have no one map and are
        left out.
        """
        return self.anatomy.layers()

    def target_layer(self) -> str:
        """The last spatial output before the head, after activation and residual:
        ``layer4``, ``bn2``, ``features``.
        """
        return self._target_layer

    @cached_property
    def _target_layer(self) -> str:
        noise = self._noise(1)
        try:
            with borrowed(self.module):
                return anatomy.target_layer(
                    self.module, self.run, self.anatomy, noise
                )
        except RuntimeError:  # a graph with nothing in it, or made in inference mode
            if self._gradients_arrive:
                raise
            raise ConsilienceError(cut_gradient(self.name, "its maps")) from None

    def activations(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """One forward pass: by layer (N, C, h, w), as copies that nothing overwrites; a
        vector is (N, C, 1, 1).
        """
        pixels = self._checked(pixels).detach()
        with torch.no_grad():
            raw, _ = self._capture(pixels, layers)
        return {name: self._as_map(name, value) for name, value in raw.items()}

    def trace(self, pixels: Tensor, layers: Sequence[str], target: Target) -> Trace:
        """Activations and d(sum of scores)/d(activations) by layer, both (N, C, h, w),
        in one forward and backward pass.

        ``PIXELS`` is a layer too. The part before the first of the layers runs without
        a graph, and no parameter's ``.grad`` is touched. A layer that the scores do not
        depend on has zero gradient.
        """
        leaf = self._checked(pixels).detach()
        if not self._gradients_arrive:
            self._refuse_cut(leaf, layers, target)
        written = self._written(leaf, layers, target)
        if written is not None:
            return written
        known = self.gradient_plan
        if known is not None and known.engine != "torch":
            # the other engine's batches are larger than what autograd has room for
            parts = torch.split(leaf, known.by_torch.batch)
            if len(parts) > 1:
                return _joined([self._by_torch(one, layers, target) for one in parts])
        return self._by_torch(leaf, layers, target)

    def _by_torch(self, leaf: Tensor, layers: Sequence[str], target: Target) -> Trace:
        with torch.set_grad_enabled(PIXELS in layers):
            leaf = leaf.clone().requires_grad_(PIXELS in layers)
            raw, outputs = self._capture(leaf, layers, graph=True)
        with torch.enable_grad():
            score = target.of(outputs).sum()
        gradients = self._gradients(leaf, score, raw, target)
        return Trace(
            outputs.detach(),
            {name: self._as_map(name, value.detach()) for name, value in raw.items()},
            {name: self._as_map(name, value) for name, value in gradients.items()},
        )

    def _written(
        self, pixels: Tensor, layers: Sequence[str], target: Target
    ) -> Trace | None:
        """Gradients with respect to the pixels by another engine, where the plan says so
        and it can: a class's logit or probability, in batches that are half full.
        """
        known = self.gradient_plan
        if known is None or known.engine == "torch":
            return None
        asked = self._written_score(layers, target)
        fits = (
            tuple(pixels.shape[2:]) == self.frame and 2 * len(pixels) >= known.batch
        )
        if asked is None or not fits or len(pixels) > known.batch:
            return None
        # as it is traced, in memory's own order
        first = self._planned(replace(known, channels_last=False))
        found = self._runner.gradients(first, pixels, known.batch, *asked)
        if found is None:
            return None
        plan.record_pass(known.engine, known.precision, known.said)
        outputs, gradients = found
        return Trace(outputs, {PIXELS: pixels}, {PIXELS: gradients})

    def _written_score(
        self, layers: Sequence[str], target: Target
    ) -> tuple[Read, Tensor] | None:
        """What another engine reads for a target; None where it cannot."""
        if tuple(layers) != (PIXELS,):
            return None
        return written_score(target, self.outputs, self.anatomy.outputs)

    def curvature(
        self, pixels: Tensor, layers: Sequence[str], target: Target
    ) -> tuple[Trace, dict[str, Tensor]]:
        """A trace, and by layer ``H A`` (N, C, h, w): the second derivatives of the sum
        of scores, layer by layer, times the activations.

        Zero where the rest of the network is piecewise linear. In the network's own
        precision, whatever gradients run in.
        """
        if self.gradient_plan is not None:
            plain = self._hand_over(replace(self, gradient_plan=None))
            return plain.curvature(pixels, layers, target)
        leaf = self._checked(pixels).detach()
        if not self._gradients_arrive:
            self._refuse_cut(leaf, layers, target)
        # Fused attention has no second derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            raw, outputs = self._capture(leaf, layers, graph=True)
        products = {}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            score = target.of(outputs).sum()
            first = torch.autograd.grad(
                score, list(raw.values()), create_graph=True, allow_unused=True
            )
            for (name, values), grad in zip(raw.items(), first, strict=True):
                if grad is None and self._depends(leaf, name, target):
                    raise ConsilienceError(cut_gradient(self.name, f"layer {name!r}"))
                along = None
                if grad is not None and grad.requires_grad:
                    along = torch.autograd.grad(
                        grad,
                        values,
                        values.detach(),
                        retain_graph=True,
                        allow_unused=True,
                    )[0]
                products[name] = torch.zeros_like(values) if along is None else along
        gradients = {
            name: torch.zeros_like(values) if grad is None else grad
            for (name, values), grad in zip(raw.items(), first, strict=True)
        }
        return (
            Trace(
                outputs.detach(),
                {name: self._as_map(name, v.detach()) for name, v in raw.items()},
                {
                    name: self._as_map(name, v.detach())
                    for name, v in gradients.items()
                },
            ),
            {name: self._as_map(name, v.detach()) for name, v in products.items()},
        )

    def _gradients(
        self,
        pixels: Tensor,
        score: Tensor,
        raw: dict[str, Tensor],
        target: Target,
    ) -> dict[str, Tensor]:
        """Gradients of a score by layer: zero where it does not depend on the layer,
        `ConsilienceError` where it does but no gradient arrives.
        """
        names = list(raw)
        found: Sequence[Tensor | None] = [None] * len(names)
        known = self.gradient_plan
        size = HALF_SCALE if known is not None and known.precision == "f16" else 1
        if score.requires_grad:
            with torch.enable_grad():  # the caller may stand where it is off
                score = score if size == 1 else score * size
            found = torch.autograd.grad(
                score, [raw[name] for name in names], allow_unused=True
            )
        for name, grad in zip(names, found, strict=True):
            if grad is None and self._depends(pixels, name, target):
                what = "the image" if name == PIXELS else f"layer {name!r}"
                raise ConsilienceError(cut_gradient(self.name, what))
        return {
            name: torch.zeros_like(raw[name]) if grad is None else _scaled(grad, size)
            for name, grad in zip(names, found, strict=True)
        }

    def _refuse_cut(
        self, pixels: Tensor, layers: Sequence[str], target: Target
    ) -> None:
        """Refuse layers in front of where the module cuts its gradients: `trace` starts
        the graph at a layer, and would not notice.
        """
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                kept[name] = output

            return hook

        hooks = [(part, keep(name)) for name, part in self._parts(layers).items()]
        leaf = pixels.clone().requires_grad_()
        with borrowed(self.module), asking(self.module), torch.enable_grad():
            with hooked(hooks):
                score = target.of(self.run(leaf)).sum()
            kept |= {PIXELS: leaf} if PIXELS in layers else {}
            for name, output in kept.items():
                if self._reaches(score, output) or not self._depends(
                    pixels, name, target
                ):
                    continue
                what = "the image" if name == PIXELS else f"layer {name!r}"
                raise ConsilienceError(cut_gradient(self.name, what))

    @staticmethod
    def _reaches(score: Tensor, output: Tensor) -> bool:
        if not score.requires_grad or not output.requires_grad:
            return False
        try:
            (grad,) = torch.autograd.grad(
                score, [output], retain_graph=True, allow_unused=True
            )
        except RuntimeError:
            return False
        return grad is not None

    def _depends(self, pixels: Tensor, name: str, target: Target) -> bool:
        """Whether a score changes when what a layer says is changed."""
        noise = torch.Generator().manual_seed(0)

        def moved(values: Tensor) -> Tensor:
            drawn = torch.rand(values.shape, generator=noise).to(values)
            return values + drawn * (values.abs().amax() + 1)

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return moved(output)

        with torch.no_grad():
            plain = target.of(self.logits(pixels.detach()))
            if name == PIXELS:
                other = target.of(self.logits(moved(pixels.detach()).clamp(0, 1)))
            else:
                part = dict(self.module.named_modules())[name]
                with borrowed(self.module), hooked([(part, hook)]):
                    other = target.of(self.run(pixels.detach()))
        return not torch.equal(plain, other)

    def check_gradients(self) -> None:
        """Refuse a module whose outputs depend on the image, but give it no gradient."""
        if not self._gradients_arrive:
            raise ConsilienceError(cut_gradient(self.name, "the image"))

    @cached_property
    def _gradients_arrive(self) -> bool:
        both = self._noise(2)
        first, second = both[:1], both[1:]
        leaf = first.clone().requires_grad_()
        with torch.enable_grad():
            outputs = self.logits(leaf).float()
        if outputs.requires_grad:
            # a weighted sum, since probabilities add up to a constant
            weights = torch.linspace(1, 2, outputs.shape[1], device=outputs.device)
            try:
                (grad,) = torch.autograd.grad(
                    (outputs * weights).sum(), [leaf], allow_unused=True
                )
            except RuntimeError:  # what was made in inference mode has no gradient
                grad = None
            if grad is not None and bool(grad.any()):
                return True
        with torch.no_grad():
            return torch.equal(outputs.detach(), self.logits(second).float())

    @cached_property
    def randomness(self) -> float:
        """How far two passes of one image lie apart, as a share of the largest output;
        0 for a model that always says the same.
        """
        noise = self._noise(1)
        with torch.no_grad():
            return relative_change(self.logits(noise), self.logits(noise))

    def _noise(self, count: int) -> Tensor:
        seeded = torch.Generator().manual_seed(0)
        shape = (count, self.recipe.channels, *self.recipe.size)
        return torch.rand(shape, generator=seeded).to(self.device)

    def tail(
        self, pixels: Tensor, layer: str, kind: TailKind | None = None
    ) -> NetworkTail:
        """The network after ``layer`` for one image (1, 3, h, w): a function of (N, C,
        h, w) activations to raw (N, K).

        It runs the fastest way that gives the model's own outputs: ``closed``,
        ``split`` or ``replay``; ``kind`` asks for one. Raises `ConsilienceError` where
        there is no such layer or way.
        """
        plan.record_pass("torch", self.own_precision)
        name = self._known(layer)
        return make_tail(
            self, self._checked(pixels).detach(), name, self.anatomy.forms[name], kind
        )

    def _capture(
        self, pixels: Tensor, layers: Sequence[str], graph: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Raw outputs by layer and the model's outputs.

        What is kept is never what flows on, so that in-place operations afterwards
        cannot overwrite it. With ``graph`` the first layer reached starts the graph:
        its output becomes a leaf.
        """
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                if graph:
                    torch.set_grad_enabled(True)
                    output = (
                        output
                        if output.requires_grad
                        else output.detach().requires_grad_()
                    )
                kept[name] = output
                return output.clone()

            return hook

        known = self.gradient_plan if graph else None
        precision = self.own_precision if known is None else known.precision
        ran = "" if known is None else known.by_torch.said
        plan.record_pass("torch", precision, ran)
        parts = self._parts(layers)
        mode = torch.is_grad_enabled()
        hooks = [(part, keep(name)) for name, part in parts.items()]
        low = precision if known is not None else "f32"
        with borrowed(self.module), frozen(self.module), hooked(hooks):
            try:
                with autocast(self.device, low):
                    outputs = self.folded(pixels) if graph else self.run(pixels)
            finally:
                torch.set_grad_enabled(mode)
        if PIXELS in layers:
            kept[PIXELS] = pixels
        return {name: kept[name] for name in layers}, outputs

    def _parts(self, layers: Sequence[str]) -> dict[str, nn.Module]:
        parts = dict(self.module.named_modules())
        return {name: parts[self._known(name)] for name in layers if name != PIXELS}

    def check_layer(self, name: str) -> None:
        """Refuse a layer that gives no one map or vector, and say why."""
        if name in dict(self.module.named_modules()):
            self._known(name)

    def _known(self, name: str) -> str:
        if name in self.anatomy.forms:
            return name
        from consilience.registry import unknown

        count = self.anatomy.repeated.get(name)
        if count:
            raise ConsilienceError(
                f"layer {name!r} runs {count} times in one pass, so it has no one map; name "
                f"what holds it"
            )
        if name in dict(self.module.named_modules()):
            raise ConsilienceError(
                f"layer {name!r} does not run, or returns no map or vector; layers() lists "
                f"those that do"
            )
        if not self.anatomy.forms and self.anatomy.repeated:
            count = max(self.anatomy.repeated.values())
            raise ConsilienceError(
                f"layer {name!r}: every layer of {self.name} runs {count} times in one "
                f"pass, so none has one map"
            )
        raise ConsilienceError(unknown("layer", name, self.anatomy.forms))

    def _as_map(self, name: str, values: Tensor) -> Tensor:
        return values if name == PIXELS else self.anatomy.forms[name].as_map(values)

    # -- the same model otherwise

    def using(
        self,
        device: str | None = None,
        engine: str | None = None,
        precision: str | None = None,
        memory: int | None = None,
    ) -> TorchNetwork:
        """The same model on another device or engine, in another precision, in
        ``memory`` bytes; None keeps what is.

        The module is shared; only another device needs a copy of it.
        """
        changed = {"engine": engine, "precision": precision, "memory": memory}
        changes: dict[str, Any] = {
            key: value for key, value in changed.items() if value is not None
        }
        there = plan.resolve_device(device) if device is not None else self.device
        if there != self.device:
            changes["module"] = copy.deepcopy(self.module).to(there)
        same = replace(self, gradient_plan=None, _runner=runner.Runner(), **changes)
        return self._hand_over(same) if there == self.device else same

    def _hand_over(self, other: TorchNetwork) -> TorchNetwork:
        """Give what has been found out about the module to another adapter of it."""
        other.__dict__.update(
            {key: self.__dict__[key] for key in _CACHED if key in self.__dict__}
        )
        return other

    def with_module(self, module: nn.Module) -> TorchNetwork:
        """The same adapter round another module: randomised weights, rule-wrapped
        copies. It has no spec.
        """
        return replace(
            self,
            module=module,
            source=None,
            weights="given with the module",
            gradient_plan=None,
            _runner=runner.Runner(),
        )


def _joined(parts: Sequence[Trace]) -> Trace:
    """Traces of the same layers, one after the other."""
    first = parts[0]
    return Trace(
        torch.cat([one.outputs for one in parts]),
        {
            k: torch.cat([one.activations[k] for one in parts])
            for k in first.activations
        },
        {k: torch.cat([one.gradients[k] for one in parts]) for k in first.gradients},
    )


def _scaled(gradient: Tensor, size: float) -> Tensor:
    return gradient if size == 1 else gradient / size


def cut_gradient(model: str, what: str) -> str:
    """Why a gradient cannot be had, in one line."""
    return (
        f"no gradient of {model}'s outputs reaches {what}, which they depend on: its "
        f"forward pass cuts it (no_grad, inference_mode, detach, or a part without "
        f"gradients, as an int8 layer); take a method that needs scores only, or a layer "
        f"behind the cut"
    )


# ---- what a module says of itself


def timm_recipe(config: Mapping[str, Any]) -> Recipe:
    """How timm shows images to a network, from its resolved configuration."""
    size = tuple(config["input_size"][-2:])
    resized = tuple(math.floor(side / config["crop_pct"]) for side in size)
    crop: dict[str, Any] = {"center": "short", "border": "long", "squash": "exact"}
    mode = config["crop_mode"]
    return Recipe(
        size=size,
        resized=resized,
        crop=crop[mode],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        pad=tuple(config["mean"]) if mode == "border" else (0.0, 0.0, 0.0),
    )


def recipe_of(module: nn.Module) -> Recipe | None:
    """How a module says that it was trained to see images (timm's ``pretrained_cfg``);
    None where it does not say.
    """
    said = getattr(module, "pretrained_cfg", None)
    if (
        not isinstance(said, Mapping)
        or not {"mean", "std", "input_size"} <= said.keys()
    ):
        return None
    from timm.data import resolve_data_config

    return timm_recipe(resolve_data_config({}, pretrained_cfg=dict(said)))


def torchvision_recipe(entry: Any) -> Recipe:
    """How the weights of a torchvision entry (``ResNet50_Weights.IMAGENET1K_V2``) were
    trained to see images.
    """
    shown = entry.transforms()
    return Recipe(
        size=_square(shown.crop_size),
        resized=_square(shown.resize_size),
        interpolation=shown.interpolation.value,
        mean=per_channel(shown.mean, 3, "mean"),
        std=per_channel(shown.std, 3, "std"),
    )


def _square(sizes: Sequence[int]) -> tuple[int, int]:
    """One number is both sides."""
    return (int(sizes[0]), int(sizes[-1]))


def relative_change(one: Tensor, other: Tensor) -> float:
    """How far outputs (1, K) lie apart, as a share of the largest."""
    gap = float((one.float() - other.float()).abs().max())
    return gap / max(float(one.float().abs().max()), 1e-12)


# ---- wrapping


def wrap(
    module: nn.Module,
    *,
    classes: Sequence[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    resize: int | tuple[int, int] | None = None,
    interpolation: images.Interpolation | None = None,
    view: ViewMode = "crop",
    outputs: Outputs | None = None,
    output: str | int | None = None,
    weights: Any = None,
    name: str | None = None,
    engine: str = "auto",
    precision: str = "f32",
    memory: int = plan.MEMORY,
    classifier: bool = True,
) -> TorchNetwork:
    """Any torch classifier (N, C, h, w) -> (N, K) as a `Network`.

    What is not given is taken from ``weights``, a torchvision entry such as
    ``ResNet50_Weights.IMAGENET1K_V2`` (its class names too), from what the module says
    of itself (timm's ``pretrained_cfg``, transformers' ``config``), else it is
    ImageNet's; what was assumed is among its ``facts``.

    ``channels`` is how many numbers a pixel has: as many as ``mean`` and ``std``, three
    where the module takes them, else what its first convolution does. ``output`` names
    the one to explain (by key, field or place) where the module returns several.

    ``outputs`` are ``logits`` of classes that exclude each other, ``sigmoid`` for logits
    of independent labels or of one yes or no, ``probabilities`` or plain ``values``.
    Where it is not given it is told from the module and a trial, which is said; one
    output is a yes or no, whose complement becomes the second class.

    ``size`` is the frame the module takes, ``resize`` what the image's shorter side
    becomes before the centre is cut (None: the frame's own size, so nothing is lost
    along that side). The module is used where it is, as it is and in its own precision;
    with ``classifier=False`` what it returns is not looked at (it is read by something
    else). Raises `ConsilienceError` where it cannot be run on such images, and where the number
    of ``classes`` is not that of its outputs.
    """
    module = opened(module)
    said, source = _recipe_said(module, weights)
    given: dict[str, Any] = {"mean": mean, "std": std, "size": size}
    given |= {"resize": resize, "interpolation": interpolation}
    given["channels"] = channels or _channels_given(mean, std)
    recipe, assumed = _recipe_for(said, source, given)
    named = classes if classes is not None else _classes_said(module, weights)
    labels = tuple(named) if named is not None else None
    network = TorchNetwork(
        module,
        recipe,
        labels,
        outputs or "logits",
        name or str(getattr(module, "original_name", type(module).__name__)),
        mode=view,
        engine=engine,
        precision=precision,
        memory=memory,
        assumed=assumed,
        output=output,
    )
    if given["channels"] is None:
        network = _with_own_channels(network, said, source, given)
    return network if not classifier else _as_classifier(network, outputs, classes)


def _as_classifier(
    network: TorchNetwork, outputs: Outputs | None, classes: Sequence[str] | None
) -> TorchNetwork:
    """The network with its kind of outputs settled, and its names held against them."""
    _check_runs(network)
    network, labels = settled(network, outputs), network.labels
    if classes is None and len(labels or ()) != network.module_outputs:
        labels = None  # of the head that it was given at first
    names = complement_names(labels) if network.complement else labels
    network = network._hand_over(replace(network, labels=names))
    if (
        names is not None
        and classes is not None
        and len(names) != network.anatomy.outputs
    ):
        raise ConsilienceError(
            f"{len(names)} class names for a module with {_said_outputs(network)}"
        )
    return network


def opened(module: Any) -> nn.Module:
    """The module inside of what torch.compile or a parallel wrapper makes of it."""
    if not isinstance(module, nn.Module):
        raise ConsilienceError(
            f"wrap takes a torch.nn.Module; got {type(module).__name__}"
        )
    inner = getattr(module, "_orig_mod", module)  # what torch.compile was given
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return opened(inner.module) if isinstance(inner, parallel) else inner


def _channels_given(*values: float | Sequence[float] | None) -> int | None:
    """As many channels as mean or std have numbers; one number is for all channels."""
    counts = (
        len(one)
        for one in values
        if one is not None and not isinstance(one, int | float)
    )
    return next(counts, None)


def _with_own_channels(
    network: TorchNetwork, said: Recipe | None, source: str, given: Mapping[str, Any]
) -> TorchNetwork:
    """The network with as many channels as its first convolution takes, where it cannot
    be run on what it was thought to take.
    """
    own = first_channels(network.module)
    if own is None or own == network.channels or _runs(network):
        return network
    recipe, assumed = _recipe_for(said, source, {**given, "channels": own})
    other = replace(network, recipe=recipe, assumed=assumed, _runner=runner.Runner())
    return other if _runs(other) else network


def _runs(network: TorchNetwork) -> bool:
    try:
        with borrowed(network.module), torch.no_grad():
            network.module(network.prepared(network._blank()))
    except Exception:  # a module raises what it likes
        return False
    return True


def first_channels(module: nn.Module) -> int | None:
    """Channels that a module's first convolution takes; None where it has none."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    return None


def settled(network: TorchNetwork, told: Outputs | None) -> TorchNetwork:
    """The network with the kind of its outputs as ``told``, else as found, and the
    complement of a yes or no.
    """
    kind, said = (told, "") if told is not None else _kind_of_outputs(network)
    if kind == "logits" and network.anatomy.outputs == 1:
        # a softmax over one number is 1 whatever it is
        kind, said = (
            "sigmoid",
            "one output, read as the logit of a yes (outputs=sigmoid)",
        )
    single = network.anatomy.outputs == 1 and kind in ("sigmoid", "probabilities")
    assumed = "; ".join(filter(None, (network.assumed, said)))
    same = replace(network, outputs=kind, assumed=assumed, complement=single)
    return same if single else network._hand_over(same)


def _kind_of_outputs(network: TorchNetwork) -> tuple[Outputs, str]:
    """What the outputs for noise look like, beside the module's last part."""
    noise = network._noise(1)
    with borrowed(network.module), torch.no_grad():
        said = network.module(network.prepared(noise))
        outputs = network.read(said).float()
    named = anatomy.output_name(said, network.output)
    if named in EMBEDDINGS:
        return (
            "values",
            f"{named} is an embedding: its outputs are values, not classes",
        )
    single = outputs.shape[1] == 1
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    *_, last = network.module.modules()
    if inside and isinstance(last, nn.Sigmoid):
        return "probabilities", "a sigmoid inside: outputs read as probabilities"
    if not single and inside and abs(float(outputs.sum()) - 1) <= SUMS_TO_ONE:
        said = (
            "outputs sum to 1: read as probabilities (outputs=logits if they are not)"
        )
        return "probabilities", said
    if inside and not single:
        said = (
            "outputs of noise lie in [0, 1], read as logits (outputs= says otherwise)"
        )
        return "logits", said
    return (
        "logits",
        "outputs read as logits of one class of several (outputs=sigmoid for labels)",
    )


EMBEDDINGS = ("pooler_output", "image_embeds", "embeddings")
"""What encoders call the vector that they return."""

SUMS_TO_ONE = 1e-4
"""Float32's sums of a softmax over thousands of classes are off by less."""


def _said_outputs(network: TorchNetwork) -> str:
    count = network.module_outputs
    return "1 output" if count == 1 else f"{count} outputs"


def _recipe_said(module: nn.Module, weights: Any) -> tuple[Recipe | None, str]:
    """What weights or module say of how images are shown, and which of them does."""
    if weights is None:
        return said_of(module)
    if not hasattr(weights, "transforms") or not hasattr(weights, "meta"):
        raise ConsilienceError(
            f"weights is a torchvision entry (ResNet50_Weights.DEFAULT); got {weights!r}"
        )
    return torchvision_recipe(weights), "weights entry"


def said_of(module: nn.Module) -> tuple[Recipe | None, str]:
    """What a module says of how images are shown, and where it does."""
    if (recipe := recipe_of(module)) is not None:
        return recipe, "pretrained_cfg"
    return config_recipe(module), "config"


def config_recipe(module: nn.Module) -> Recipe | None:
    """The frame and channels that a transformers network's ``config`` names, with
    ImageNet's mean and std: those stand with its processor, not with the network.
    """
    config = getattr(module, "config", None)
    size = getattr(config, "image_size", None)
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    channels = getattr(config, "num_channels", 3)
    known = isinstance(channels, int) and channels != 3
    values = ((0.0,) * channels, (1.0,) * channels) if known else None
    mean, std = values or (IMAGENET_MEAN, IMAGENET_STD)
    frame = pair((sides[0], sides[1]))
    return Recipe(size=frame, resized=frame, mean=mean, std=std)


def _classes_said(module: nn.Module, weights: Any) -> Sequence[str] | None:
    """Class names of a torchvision entry, or of a transformers network's ``config``."""
    if weights is not None:
        named: Sequence[str] | None = weights.meta.get("categories")
        return named
    return config_classes(getattr(module, "config", None))


def config_classes(config: Any) -> tuple[str, ...] | None:
    """``id2label`` in the order of the outputs; None where it names nothing."""
    named = getattr(config, "id2label", None)
    if not isinstance(named, Mapping) or set(named) != set(range(len(named))):
        return None
    names = tuple(str(named[index]) for index in range(len(named)))
    usual = tuple(f"LABEL_{index}" for index in range(len(named)))
    return None if names == usual else names


def _recipe_for(
    said: Recipe | None, source: str, given: Mapping[str, Any]
) -> tuple[Recipe, str]:
    """The recipe of what was given, else of what was ``said`` by its ``source``, else
    ImageNet's; and what was assumed.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    channels = asked.pop("channels", None)
    if said is not None and channels not in (None, said.channels):
        said, source = _averaged(said, channels), f"{source} (its colours averaged)"
    channels = channels or 3
    if said is not None and "size" not in asked and "resize" not in asked:
        changes: dict[str, Any] = {
            key: per_channel(asked[key], channels, key)
            for key in ("mean", "std")
            if key in asked
        }
        if "interpolation" in asked:
            changes["interpolation"] = asked["interpolation"]
        return replace(said, **changes), _assumed_of(source, asked)
    frame = pair(asked.get("size", 224))
    usual: tuple[Sequence[float], ...] = (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3:
        usual = ((0.0,) * channels, (1.0,) * channels)
    recipe = Recipe(
        size=frame,
        resized=pair(asked["resize"]) if "resize" in asked else frame,
        interpolation=asked.get("interpolation", "bilinear"),
        mean=per_channel(asked.get("mean", usual[0]), channels, "mean"),
        std=per_channel(asked.get("std", usual[1]), channels, "std"),
    )
    missing = [key for key in ("mean", "std", "size") if key not in asked]
    values = {
        "mean": "ImageNet's mean" if channels == 3 else "mean 0",
        "std": "ImageNet's std" if channels == 3 else "std 1",
        "size": "224 pixels",
    }
    listed = ", ".join(values[key] for key in missing)
    counted = "" if channels == 3 else f"{channels} channels, "
    return recipe, (
        f"{counted}{listed} assumed: the module does not say" if missing else ""
    )


def _assumed_of(source: str, asked: Mapping[str, Any]) -> str:
    """What was assumed where a ``source`` says the rest."""
    values = [name for name in ("mean", "std") if name not in asked]
    if source == "config" and values:
        listed = " and ".join(values)
        return f"size as its config says; ImageNet's {listed} assumed: they are its processor's"
    return "" if asked else f"as its {source} says"


def _averaged(said: Recipe, channels: int) -> Recipe:
    """A recipe for another number of channels: each as the mean of those it has."""
    mean, std = (sum(values) / len(values) for values in (said.mean, said.std))
    pad = (sum(said.pad) / len(said.pad),)
    return replace(said, mean=(mean,) * channels, std=(std,) * channels, pad=pad)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_runs(network: TorchNetwork) -> None:
    """Refuse a module that cannot be run, or returns no scores (N, K), in one line."""
    try:
        _ = network.anatomy
    except ConsilienceError:
        raise
    except Exception as error:  # a module raises what it likes
        shape = (1, network.channels, *network.frame)
        raise ConsilienceError(
            f"{network.name} cannot be run on a black image {shape} "
            f"{_called(network.dtype)}: {unexpected(error)}; give wrap the size= and "
            f"channels= that it takes"
        ) from error


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number is both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def per_channel(
    values: float | Sequence[float], channels: int, what: str
) -> tuple[float, ...]:
    """A number a channel, or one for all; ``what`` names them in the error."""
    if isinstance(values, int | float):
        return (float(values),) * channels
    if len(values) != channels:
        raise ConsilienceError(
            f"{what} is {channels} number{'s' if channels > 1 else ''}, one a channel; got "
            f"{len(values)}"
        )
    return tuple(map(float, values))
