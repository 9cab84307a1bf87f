"""Class activation maps of recent years: against similar classes, by optimising the
weights, and by factors of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from consilience.explainers.cam import (
    AUTO,
    EachOwn,
    GradCAM,
    GradCAMPlusPlus,
    LayerMaps,
    OnLayers,
    from_zero_to_one,
    per_layer,
    resolved_layers,
    weighted,
)
from consilience.images import enlarge
from consilience.registry import explainers, option
from consilience.types import (
    Heat,
    Network,
    NotApplicable,
    Target,
    View,
    as_probabilities,
)


@dataclass(frozen=True)
class AgainstSimilar:
    """A class's score less ``alpha`` times those of the classes whose scores are
    nearest to it in the same outputs.
    """

    own: Any
    classes: int
    alpha: float
    weights: Literal["equal", "probability"]
    index: None = None
    name: str = "against similar classes"
    score: str = "difference"

    def of(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of outputs (N, K)."""
        scored = outputs
        if self.own.score == "probability":
            scored = as_probabilities(outputs, self.own.outputs)
        main = scored[:, self.own.index : self.own.index + 1]
        gaps = (scored - main).abs().detach()
        gaps[:, self.own.index] = float("inf")
        count = min(self.classes, outputs.shape[1] - 1)
        near = gaps.argsort(dim=1, stable=True)[:, :count]
        differences = main - self.alpha * scored.gather(1, near)
        if self.weights == "equal":
            return differences.mean(dim=1)
        shares = outputs.softmax(dim=1).gather(1, near)
        return (shares * differences).sum(1) / (shares.sum(1) + 1e-9)


@explainers.register("finercam")
@dataclass(frozen=True)
class FinerCAM(GradCAM):
    """Finer-CAM (Zhang et al., CVPR 2025): Grad-CAM of what tells a class from the
    classes most similar to it, ``y_c - alpha y_d``.

    Similar are the ``classes`` whose scores are nearest in this image. ``alpha`` 0 is
    Grad-CAM. Differences are averaged as in the paper, or with ``weights=probability``
    by softmax, through which pytorch-grad-cam differentiates too. `NotApplicable` for
    a target that is no class.
    """

    classes: int = option(3, help="how many similar classes", least=1)
    alpha: float = option(1.0, help="how much of them is taken away", least=0)
    weights: Literal["equal", "probability"] = option(
        "equal", help="how differences are averaged"
    )
    label: ClassVar[str] = "Finer-CAM"
    reads_target_in_its_pass: ClassVar[bool] = False

    def _pass(
        self,
        model: Network,
        layers: Sequence[str],
        views: Sequence[View],
        targets: Sequence[Target],
    ) -> list[Heat]:
        for target in targets:
            if target.index is None:
                raise NotApplicable(code="no-class-to-compare", target=target.name)
        asked = [
            AgainstSimilar(target, self.classes, self.alpha, self.weights)
            for target in targets
        ]
        return LayerMaps._pass(self, model, layers, views, asked)


@explainers.register("shapleycam")
@dataclass(frozen=True)
class ShapleyCAM(LayerMaps):
    """ShapleyCAM (Cai, "CAMs as Shapley value-based explainers", 2025): Grad-CAM with
    second derivatives, ``alpha_k`` the mean over the grid of ``g - H A / 2``.

    It is the Shapley value of channels where the score is a quadratic function of the
    activations. Where what follows is piecewise linear, ``H`` is 0 and the map is
    Grad-CAM's: ``curved`` in the facts is the size of ``H A / 2`` against that of
    ``g``. The paper takes a residual softmax for the score, the logit plus the log of
    its probability's complement; here it is the logit or the probability.
    """

    label: ClassVar[str] = "Shapley-CAM"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers", "module"})

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """With ``g - H A / 2`` for the gradients."""
        return weighted(gradients.mean(dim=(2, 3)), activations)

    def _pass(
        self,
        model: Network,
        layers: Sequence[str],
        views: Sequence[View],
        targets: Sequence[Target],
    ) -> list[Heat]:
        trace, products = model.curvature(  # type: ignore[attr-defined]
            torch.cat([view.pixels for view in views]),
            layers,
            EachOwn(tuple(targets)),
        )
        maps = [
            self.map(
                trace.activations[name], trace.gradients[name] - products[name] / 2
            )
            for name in layers
        ]
        heats = self.heats(layers, maps, passes=2)
        return [
            replace(
                heat,
                facts={
                    **heat.facts,
                    "curved": per_layer(
                        layers,
                        [
                            _size_of(
                                products[name][row] / 2, trace.gradients[name][row]
                            )
                            for name in layers
                        ],
                    ),
                },
            )
            for row, heat in enumerate(heats)
        ]


def _size_of(part: Tensor, whole: Tensor) -> float:
    """Norm of a part against that of the whole; 0 where the whole is 0."""
    size = float(whole.double().norm())
    return float(part.double().norm()) / size if size > 0 else 0.0


@explainers.register("refinecam")
@dataclass(frozen=True)
class RefineCAM(GradCAMPlusPlus):
    """Refine-CAM (arXiv 2605.14641, as in pytorch-grad-cam): the product of Grad-CAM++
    maps of several layers, each from 0 to 1, on the finest of their grids.

    Coarse layers say where, fine ones draw the edges. ``auto`` takes the last layer of
    each of the ``grids`` coarsest grids of the network. A pixel that one layer leaves
    at its least is 0. (The peer enlarges each map to the image before the product.)
    """

    fuse: Literal["mean", "max", "product"] = option(
        "product",
        help="how several layers become one map: product takes each from 0 to 1",
    )
    grids: int = option(3, help="grids that auto takes a layer of", least=1)
    label: ClassVar[str] = "Refine-CAM"

    def resolved(self, model: Network) -> Self:
        """The same with ``auto`` replaced by the layers that will be used."""
        if self.layer != AUTO:
            return replace(self, layer=resolved_layers(self.layer, model))
        return replace(self, layer=self._ends(model))

    def _ends(self, model: Network) -> tuple[str, ...]:
        """The last layer of each grid up to the target layer, finest first."""
        last = model.target_layer()
        ends: dict[tuple[int, int], str] = {}
        for known in model.layers():
            if known.spatial is not None:
                ends[known.spatial] = known.name
            if known.name == last:
                break
        finest_first = sorted(ends, key=lambda grid: -grid[0] * grid[1])
        names = [ends[grid] for grid in finest_first if ends[grid] != last]
        return (*names[max(0, len(names) - self.grids + 1) :], last)


@explainers.register("opticam")
@dataclass(frozen=True)
class OptiCAM(OnLayers):
    """Opti-CAM (Zhang et al., Computer Vision and Image Understanding 248, 2024,
    equations 8 to 11): weights of channels that maximise the score of the masked image.

    The map ``sum_k softmax(u)_k A_k``, brought to 0 to 1 and enlarged, keeps the image
    where it is high; the rest is the network's neutral colour, which is 0 after
    normalising. ``u`` starts at 0 and takes ``steps`` of Adam. Each step is a forward
    and a backward pass of the whole network.
    """

    steps: int = option(100, help="of Adam", least=1)
    rate: float = option(0.1, help="learning rate", above=0)
    score: Literal["logit", "probability"] = option("logit", help="what is maximised")
    label: ClassVar[str] = "Opti-CAM"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "layers"})

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """One image."""
        layers = resolved_layers(self.layer, model)
        maps, gained = [], []
        for name in layers:
            found, gain = self._optimised(model, view, target, name)
            maps.append(found)
            gained.append(gain)
        made = self.heats(layers, maps, passes=len(layers) * (self.steps + 1))[0]
        return Heat(made.values, made.extras, {**made.facts, "masked_score": gained})

    def _optimised(
        self, model: Network, view: View, target: Target, layer: str
    ) -> tuple[Tensor, float]:
        pixels = view.pixels
        activations = model.activations(pixels, [layer])[layer].detach().float()
        neutral = torch.tensor(view.neutral).to(pixels).reshape(1, -1, 1, 1)
        u = torch.zeros(
            1, activations.shape[1], device=pixels.device, requires_grad=True
        )
        steps = torch.optim.Adam([u], lr=self.rate)
        size = (pixels.shape[-2], pixels.shape[-1])
        with torch.enable_grad():
            for _ in range(self.steps):
                mask = enlarge(from_zero_to_one(_summed(u, activations)), size)
                shown = torch.lerp(neutral.expand_as(pixels), pixels, mask[:, None])
                loss = -target.of(model.logits(shown)).sum()
                u.grad = torch.autograd.grad(loss, u)[0]
                steps.step()
        found = from_zero_to_one(_summed(u, activations)).detach()
        mask = enlarge(found, size)[:, None]
        shown = torch.lerp(neutral.expand_as(pixels), pixels, mask)
        with torch.no_grad():
            return found, float(target.of(model.logits(shown))[0])


def _summed(u: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("nc,nchw->nhw", u.softmax(dim=1), activations)


@explainers.register("dff")
@dataclass(frozen=True)
class DFF(LayerMaps):
    """Deep feature factorisation (Collins et al., ECCV 2018): activations as few
    non-negative factors, and of these the one that speaks most for the target.

    ``A ~ W H`` with W (h w, k) and H (k, C), by scikit-learn's NMF (nndsvd start). A
    factor's share of the score is ``sum_ij W_ijk (g . H_k)`` with g Grad-CAM's weights;
    the paper shows factors and leaves their choice to people. The facts say the
    ``shares`` of all, largest first, and how much of the activations the factors hold
    (``explained``). `NotApplicable` for a layer with negative activations, which have no such factors.
    """

    factors: int = option(4, help="how many", least=1)
    label: ClassVar[str] = "DFF"

    def map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The first factor of each image (N, h, w)."""
        made = [
            self._factors(acts, grads)[0][0]
            for acts, grads in zip(activations, gradients, strict=True)
        ]
        return torch.stack(made).to(activations.device)

    def notes(self, activations: Tensor, gradients: Tensor) -> dict[str, Any]:
        """How much of the activations the factors hold, and each one's share of the
        score.
        """
        maps, shares, held = self._factors(activations[0], gradients[0])
        del maps
        return {"explained": held, "shares": shares.tolist()}

    def _factors(
        self, activations: Tensor, gradients: Tensor
    ) -> tuple[Tensor, np.ndarray, float]:
        """Maps (k, h, w), their shares of the score, largest first, and the share of the
        activations' squares that they hold.
        """
        if bool((activations < 0).any()):
            raise NotApplicable(code="negative-activations")
        from sklearn.decomposition import NMF

        height, width = activations.shape[-2:]
        rows = activations.flatten(1).T.detach().cpu().double().numpy()
        count = min(self.factors, *rows.shape)
        model = NMF(count, init="nndsvd", max_iter=400, tol=1e-5)
        w = model.fit_transform(rows)
        weights = gradients.mean(dim=(1, 2)).cpu().double().numpy()
        shares = w.sum(0) * (model.components_ @ weights)
        order = np.argsort(-shares, kind="stable")
        maps = torch.from_numpy(w.T[order].reshape(count, height, width)).float()
        rest = ((rows - w @ model.components_) ** 2).sum() / max(
            (rows**2).sum(), 1e-30
        )
        return maps, shares[order], float(1 - rest)
