"""Class activation maps from one forward and backward pass: channels of a layer,
weighted and summed on its own grid.

Each method is a function of a layer's activations and gradients, both (N, C, h, w).
What they share stands once: layers, fusion and ReLU in `OnLayers`, the pass in
`LayerMaps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from consilience.images import enlarge
from consilience.registry import explainers, option, unknown
from consilience.types import (
    ConsilienceError,
    Heat,
    Network,
    NotApplicable,
    Target,
    View,
)

AUTO = ("auto",)
Powers = tuple[Tensor, Tensor, Tensor]
NEAR = 1e-6
"""A sum this much smaller than its terms is rounding; what would be divided by it is 0
instead.
"""


# ---- what the methods share


def resolved_layers(layer: tuple[str, ...], model: Network) -> tuple[str, ...]:
    """``auto`` as the model's last spatial output; other names checked against the
    layers that give maps.
    """
    if layer == AUTO:
        return (model.target_layer(),)
    maps = [known.name for known in model.layers() if known.spatial is not None]
    for name in layer:
        if name not in maps:
            if hasattr(model, "check_layer"):
                model.check_layer(name)  # why a layer that is there gives no map
            raise ConsilienceError(
                unknown(f"layer with a map in {model.id}", name, maps, limit=20)
            )
    return layer


def fused(maps: Sequence[Tensor], how: str) -> Tensor:
    """One map (N, h, w) of several layers' maps, on the finest of their grids."""
    if len(maps) == 1:
        return maps[0]
    size = (
        max(item.shape[-2] for item in maps),
        max(item.shape[-1] for item in maps),
    )
    if how == "product":
        maps = [from_zero_to_one(item) for item in maps]
    stack = torch.stack([enlarge(item, size) for item in maps])
    if how == "product":
        return stack.prod(dim=0)
    return stack.mean(dim=0) if how == "mean" else stack.amax(dim=0)


def from_zero_to_one(maps: Tensor) -> Tensor:
    """Each map of (N, h, w) from 0 to 1; a flat one is 0."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1), 0)


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Channels (N, C, h, w) summed with weights (N, C)."""
    return torch.einsum("nc,nchw->nhw", weights.to(activations), activations)


def exact(values: Tensor) -> Tensor:
    """In float64, on the CPU: not every accelerator has it."""
    return values.cpu().double()


def per_layer(layers: Sequence[str], values: Sequence[Any]) -> Any:
    """A fact of every layer: the bare value where there is one layer, else by name."""
    return values[0] if len(layers) == 1 else dict(zip(layers, values, strict=True))


@dataclass(frozen=True)
class EachOwn:
    """Row i of a batch scored by target i."""

    targets: tuple[Target, ...]
    index: None = None
    name: str = "each image's own"
    score: str = "mixed"

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of outputs (N, K), N the number of targets."""
        return torch.cat(
            [
                target.of(outputs[row : row + 1])
                for row, target in enumerate(self.targets)
            ]
        )


@dataclass(frozen=True)
class OnLayers:
    """A map on the grid of one or more layers: which, and how their maps become one."""

    layer: tuple[str, ...] = option(
        AUTO, help="layers, joined by +; auto is the last spatial output"
    )
    relu: bool = option(
        True, help="keep only evidence for the target, on the layer's grid"
    )
    fuse: Literal["mean", "max", "product"] = option(
        "mean",
        help="how several layers become one map: product takes each from 0 to 1",
    )

    needs: ClassVar[frozenset[str]] = frozenset({"layers"})

    def resolved(self, model: Network) -> Self:
        """The same with ``auto`` replaced by the layer that will be used."""
        return replace(self, layer=resolved_layers(self.layer, model))

    def heats(
        self, layers: Sequence[str], maps: Sequence[Tensor], passes: int, **facts: Any
    ) -> list[Heat]:
        """Maps (N, h, w) of each layer, before any ReLU, as one heat an image."""
        values = fused(
            [item.relu() if self.relu else item for item in maps], self.fuse
        )
        grids = {
            name: list(item.shape[-2:])
            for name, item in zip(layers, maps, strict=True)
        }
        return [
            Heat(
                row,
                facts={
                    "layer": "+".join(layers),
                    "grid": grids,
                    "passes": passes,
                    **facts,
                },
            )
            for row in values
        ]


@dataclass(frozen=True)
class LayerMaps(OnLayers):
    """The one forward and backward pass of the methods here; a method gives `map`."""

    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers"})
    reads_target_in_its_pass: ClassVar[bool] = True

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """(N, C, h, w) twice to (N, h, w), before any ReLU."""
        raise NotImplementedError

    def notes(self, activations: Tensor, gradients: Tensor) -> dict[str, Any]:
        """Facts of one image's map on one layer that a reader should know."""
        return {}

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images, ``model.batch`` a pass."""
        layers = self.resolved(model).layer
        size = max(1, model.batch)
        parts = [slice(start, start + size) for start in range(0, len(views), size)]
        return [
            heat
            for part in parts
            for heat in self._pass(model, layers, views[part], targets[part])
        ]

    def _pass(
        self,
        model: Network,
        layers: Sequence[str],
        views: Sequence[View],
        targets: Sequence[Target],
    ) -> list[Heat]:
        trace = model.trace(
            torch.cat([view.pixels for view in views]),
            layers,
            EachOwn(tuple(targets)),
        )
        pairs = [(trace.activations[name], trace.gradients[name]) for name in layers]
        heats = self.heats(layers, [self.map(*pair) for pair in pairs], passes=1)
        return [
            self._noted(heat, layers, pairs, row) for row, heat in enumerate(heats)
        ]

    def _noted(
        self,
        heat: Heat,
        layers: Sequence[str],
        pairs: Sequence[tuple[Tensor, Tensor]],
        row: int,
    ) -> Heat:
        notes = [
            self.notes(acts[row : row + 1], grads[row : row + 1])
            for acts, grads in pairs
        ]
        facts = {
            key: per_layer(layers, [note[key] for note in notes]) for key in notes[0]
        }
        return replace(heat, facts={**heat.facts, **facts})


# ---- the methods


@explainers.register("cam")
@dataclass(frozen=True)
class CAM(LayerMaps):
    """Class activation mapping (Zhou et al., CVPR 2016, equation 2): ``sum_k w_k A_k``,
    without a ReLU.

    ``w_k`` are the class's weights in the one linear layer that follows global average
    pooling; `NotApplicable` for any other rest of the network, with the reason. There
    the gradient of a logit is ``w_k / (h w)`` in every cell, so the weights are its
    sums over the grid. Grad-CAM's map is this one divided by ``h w``.
    """

    relu: bool = option(
        False, help="keep only evidence for the target, on the layer's grid"
    )
    score: Literal["logit"] = option("logit", help="the weights belong to the logit")
    label: ClassVar[str] = "CAM"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers", "module"})

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Equation 2, with the weights from the gradient."""
        return weighted(gradients.sum(dim=(2, 3)), activations)

    def _pass(
        self,
        model: Network,
        layers: Sequence[str],
        views: Sequence[View],
        targets: Sequence[Target],
    ) -> list[Heat]:
        for name in layers:
            if model.tail(views[0].pixels, name).kind != "closed":
                wanted = "global average pooling and one linear layer"
                raise NotApplicable(
                    code="cam-tail", wanted=wanted, name=name, model=model.id
                )
        return super()._pass(model, layers, views, targets)


@explainers.register("gradcam")
@dataclass(frozen=True)
class GradCAM(LayerMaps):
    """Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2).

    ``relu(sum_k alpha_k A_k)`` with ``alpha_k`` the mean over the grid of ``d score / d
    A_k``.
    """

    label: ClassVar[str] = "Grad-CAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Equation 2 before its ReLU."""
        return weighted(gradients.mean(dim=(2, 3)), activations)


def plus_plus_weights(
    first: Tensor, second: Tensor, third: Tensor, activations: Tensor
) -> Tensor:
    """Channel weights (N, C): alpha (Grad-CAM++ equation 19) times the positive first
    derivative, summed over the grid.

    ``first``, ``second``, ``third`` are g, g^2, g^3 (or their means over noise), in
    float64: g^3 of a small gradient is nothing in float32. Where the denominator
    vanishes against ``second``, and where that is 0, alpha is 0.
    """
    whole = 2 * second + third * exact(activations).sum(dim=(2, 3), keepdim=True)
    safe = whole.abs() > NEAR * second
    alpha = torch.where(safe, second / torch.where(safe, whole, 1.0), 0.0)
    return (alpha * first.relu()).sum(dim=(2, 3))


def powers(gradients: Tensor) -> Powers:
    """g, g^2 and g^3 in float64."""
    first = exact(gradients)
    return first, first**2, first**3


@explainers.register("gradcam++")
@dataclass(frozen=True)
class GradCAMPlusPlus(LayerMaps):
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, equations 10 and 19, for the
    exponential of the score).

    ``w_k = sum_ij alpha_kij relu(g_kij)`` with ``alpha = g^2 / (2 g^2 + g^3 sum_ab
    A_ab)``. The common factor exp(score) of the paper is left out: it scales the map
    and nothing else. Where the denominator changes sign the weights can explode; the
    share of cells with positive gradient whose denominator is below a tenth of ``2
    g^2`` is kept as ``unstable_share``. pytorch-grad-cam adds 1e-6 to the denominator,
    which for gradients below 7e-4 is the larger part of it: other maps.
    """

    label: ClassVar[str] = "Grad-CAM++"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Equation 10's weights, summed over channels."""
        return weighted(
            plus_plus_weights(*powers(gradients), activations), activations
        )

    def notes(self, activations: Tensor, gradients: Tensor) -> dict[str, Any]:
        """How often the denominator nearly vanishes where it matters."""
        positive = exact(gradients) > 0
        share = (
            1
            + exact(gradients) * exact(activations).sum(dim=(2, 3), keepdim=True) / 2
        )  # of 2 g^2
        near = (share.abs() < 0.1) & positive
        return {"unstable_share": float(near.sum() / positive.sum().clamp(min=1))}


@explainers.register("xgradcam")
@dataclass(frozen=True)
class XGradCAM(LayerMaps):
    """XGrad-CAM (Fu et al., BMVC 2020): gradients averaged with the normalised
    activations as weights.

    A channel that sums to nothing weighs nothing; where positive and negative
    activations nearly cancel, the weight is large.
    """

    label: ClassVar[str] = "XGrad-CAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """``sum_k (sum_ij g A / sum_ij A) A_k``."""
        total = activations.sum(dim=(2, 3))
        safe = total.abs() > NEAR * activations.abs().sum(dim=(2, 3))
        weights = torch.where(
            safe,
            (gradients * activations).sum(dim=(2, 3)) / torch.where(safe, total, 1.0),
            0.0,
        )
        return weighted(weights, activations)


@explainers.register("hirescam")
@dataclass(frozen=True)
class HiResCAM(LayerMaps):
    """HiResCAM (Draelos & Carin 2020, arXiv 2011.08891): ``sum_k g_k * A_k``, element
    by element, without a ReLU.
    """

    relu: bool = option(
        False, help="keep only evidence for the target, on the layer's grid"
    )
    label: ClassVar[str] = "HiResCAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The products summed over channels."""
        return (gradients * activations).sum(dim=1)


@explainers.register("gradcam-elementwise")
@dataclass(frozen=True)
class ElementwiseGradCAM(LayerMaps):
    """Element-wise Grad-CAM (Pillai & Pirsiavash, AAAI 2021): ``sum_k relu(g_k *
    A_k)``, the ReLU before the sum.
    """

    label: ClassVar[str] = "Element-wise Grad-CAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Positive products only."""
        return (gradients * activations).relu().sum(dim=1)


@explainers.register("layercam")
@dataclass(frozen=True)
class LayerCAM(LayerMaps):
    """LayerCAM (Jiang et al., IEEE TIP 2021): ``relu(sum_k relu(g_k) * A_k)``, useful
    at shallow layers too.
    """

    label: ClassVar[str] = "LayerCAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Activations weighted by their own positive gradients, before the ReLU."""
        return (gradients.relu() * activations).sum(dim=1)


def first_component(channels: Tensor, centre: bool) -> Tensor:
    """Projection (N, h, w) of each cell's channel vector on the first right singular
    vector of the (h w, C) matrix.

    The sign, which a singular vector has not, is the one with a non-negative sum over
    the cells.
    """
    count, _, height, width = channels.shape
    cells = exact(channels).flatten(2).transpose(1, 2)
    if centre:
        cells = cells - cells.mean(dim=1, keepdim=True)
    axis = torch.linalg.svd(cells, full_matrices=False).Vh[:, :1]
    along = (cells @ axis.transpose(1, 2)).squeeze(-1)
    # A centred projection sums to nothing; there the side that reaches further is up.
    up = (along**3 if centre else along).sum(dim=1, keepdim=True)
    return (
        torch.where(up < 0, -along, along).reshape(count, height, width).to(channels)
    )


@explainers.register("eigencam")
@dataclass(frozen=True)
class EigenCAM(OnLayers):
    """Eigen-CAM (Muhammad & Yeasin, IJCNN 2020, section III): activations projected on
    their first principal component.

    It asks nothing of the target: the map is the same for every class. ``centre=true``
    subtracts each channel's mean first, as pytorch-grad-cam does and the paper does
    not; it also leaves the sign to chance.
    """

    relu: bool = option(
        False, help="keep only evidence for the target, on the layer's grid"
    )
    centre: bool = option(False, help="subtract each channel's mean first")
    label: ClassVar[str] = "Eigen-CAM"

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image; the target is not asked."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images, ``model.batch`` a pass."""
        layers = resolved_layers(self.layer, model)
        images = torch.split(
            torch.cat([view.pixels for view in views]), max(1, model.batch)
        )
        return [
            heat
            for part in images
            for heat in self.heats(layers, self._maps(model, part, layers), passes=1)
        ]

    def _maps(
        self, model: Network, pixels: Tensor, layers: Sequence[str]
    ) -> list[Tensor]:
        activations = model.activations(pixels, layers)
        return [first_component(activations[name], self.centre) for name in layers]


@explainers.register("eigengradcam")
@dataclass(frozen=True)
class EigenGradCAM(LayerMaps):
    """Eigen-Grad-CAM (pytorch-grad-cam): the first principal component of ``g * A``,
    Eigen-CAM made to see the class.

    It has no paper of its own. ``centre=true`` subtracts each channel's mean first, as
    pytorch-grad-cam does.
    """

    relu: bool = option(
        False, help="keep only evidence for the target, on the layer's grid"
    )
    centre: bool = option(False, help="subtract each channel's mean first")
    label: ClassVar[str] = "Eigen-Grad-CAM"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The first component of gradient times activation."""
        return first_component(gradients * activations, self.centre)


@explainers.register("smoothgradcam++")
@dataclass(frozen=True)
class SmoothGradCAMPlusPlus(OnLayers):
    """Smooth Grad-CAM++ (Omeiza et al. 2019, arXiv 1908.01224, equation 12).

    Grad-CAM++ with g, g^2 and g^3 each averaged over ``samples`` noisy copies of the
    image; activations are of the clean one. ``noise`` is the standard deviation on
    pixels in [0, 1]. The factor exp(score) of Grad-CAM++ is taken as the same for all
    copies, as the authors do.
    """

    samples: int = option(25, help="noisy copies", least=1)
    noise: float = option(
        0.1,
        help="standard deviation of the noise, in units of the pixels' range",
        least=0,
    )
    seed: int = option(0, help="seed of the noise", least=0)
    score: Literal["logit", "probability"] = option(
        "logit", help="what is differentiated"
    )
    label: ClassVar[str] = "Smooth Grad-CAM++"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers"})

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image: a pass for the activations, and the noisy ones."""
        layers = resolved_layers(self.layer, model)
        clean = model.activations(view.pixels, layers)
        means = self._means(model, view, target, layers)
        maps = [
            weighted(plus_plus_weights(*means[name], clean[name]), clean[name])
            for name in layers
        ]
        return self.heats(layers, maps, passes=self.samples + 1, seed=self.seed)[0]

    def _means(
        self, model: Network, view: View, target: Target, layers: Sequence[str]
    ) -> dict[str, Powers]:
        """Means of g, g^2 and g^3 by layer, each (1, C, h, w); noise is drawn copy by
        copy, whatever the batch.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sums: dict[str, Powers] = {}
        for start in range(0, self.samples, max(1, model.batch)):
            count = min(max(1, model.batch), self.samples - start)
            noise = torch.stack(
                [
                    torch.randn(view.pixels.shape[1:], generator=generator)
                    for _ in range(count)
                ]
            )
            trace = model.trace(
                view.pixels + self.noise * noise.to(view.pixels), layers, target
            )
            for name in layers:
                new = powers(trace.gradients[name])
                first, second, third = (
                    power.sum(dim=0, keepdim=True) / self.samples for power in new
                )
                old = sums.get(name, (0.0, 0.0, 0.0))
                sums[name] = (old[0] + first, old[1] + second, old[2] + third)
        return sums
