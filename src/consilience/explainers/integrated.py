"""Gradients added up along a path from a baseline to the image: what changed on the way
is shared out over the pixels.

Integrated gradients take the straight way by quadrature. Where there is no formula for
the way itself (activations of a layer, blurring, a path that gradients choose), the sum
is of Riemann and Stieltjes: gradient times the step that was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import gaussian_filter1d
from scipy.special import roots_legendre
from torch import Tensor

from consilience import progress
from consilience.explainers.cam import (
    AUTO,
    EachOwn,
    fused,
    per_layer,
    resolved_layers,
)
from consilience.explainers.gradients import (
    CHANNELS,
    Channels,
    GradientScore,
    batch_of,
    completeness,
    gap_of,
    gradient_scores,
    reduced,
    traces_in_batches,
)
from consilience.images import enlarge
from consilience.perturb.fills import Black, BlurFill, Fill, NeutralFill, White
from consilience.registry import explainers, option
from consilience.types import (
    PIXELS,
    Array,
    ConsilienceError,
    Heat,
    Network,
    Target,
    View,
)

QuadratureRule = Literal[
    "auto",
    "gauss-legendre",
    "riemann-left",
    "riemann-right",
    "riemann-middle",
    "trapezoid",
]
RiemannSide = Literal["riemann-left", "riemann-right", "trapezoid"]
SIDES = ("riemann-left", "riemann-right", "trapezoid")
QUADRATURE_RULES = ("gauss-legendre", *SIDES, "riemann-middle")

# ---- quadrature


def nodes(rule: str, steps: int) -> tuple[Array, Array]:
    """Places (steps,) in [0, 1] and weights (steps,) that sum to 1, float64.

    ``gauss-legendre`` is exact for polynomials up to degree ``2 steps - 1``; the
    trapezoid needs two places.
    """
    if rule == "gauss-legendre":
        places, weights = roots_legendre(steps)
        return (places + 1) / 2, weights / 2
    if rule == "trapezoid":
        inner = np.full(steps, 1 / (steps - 1))
        inner[[0, -1]] /= 2
        return np.linspace(0, 1, steps), inner
    shift = {"riemann-left": 0.0, "riemann-middle": 0.5, "riemann-right": 1.0}[rule]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def baselines(view: View, fills: Sequence[Fill]) -> Tensor:
    """(B, 3, h, w)."""
    return torch.cat([fill.image(view, None).to(view.pixels) for fill in fills])


def straight(
    model: Network,
    view: View,
    starts: Tensor,
    places: Tensor,
    weights: Tensor,
    target: Target,
    label: str,
) -> Tensor:
    """``mean over baselines b of (x - b) * sum_k weights_bk dS/dx(b + places_bk (x -
    b))``, (3, h, w).

    ``starts`` is (B, 3, h, w), ``places`` and ``weights`` (B, n) on the pixels' device.
    One sum a baseline is kept.
    """
    image, steps = view.pixels, places.shape[1]
    sums = torch.zeros_like(starts)
    owners = torch.arange(len(starts), device=image.device).repeat_interleave(steps)
    alphas, shares = (row.reshape(-1, 1, 1, 1).to(image) for row in (places, weights))

    def pixels(start: int, stop: int) -> Tensor:
        return torch.lerp(starts[owners[start:stop]], image, alphas[start:stop])

    for rows, trace in traces_in_batches(model, len(owners), pixels, target, label):
        sums.index_add_(0, owners[rows], trace.gradients[PIXELS].mul_(shares[rows]))
    return sums.mul_(image - starts).mean(dim=0)


# ---- sums of Riemann and Stieltjes


class Stieltjes:
    """``sum_k g_k (y_(k+1) - y_k)`` over the places of a path as they come, (C, h, w).

    The gradient is taken at the start of a step (``riemann-left``), at its end
    (``riemann-right``), or is the mean of both (``trapezoid``). Of the path only its
    last place is kept.
    """

    def __init__(self, side: RiemannSide) -> None:
        self.weights = {
            "riemann-left": (1.0, 0.0),
            "riemann-right": (0.0, 1.0),
            "trapezoid": (0.5, 0.5),
        }[side]
        self.total: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, values: Tensor, gradients: Tensor) -> None:
        """The next places, (b, C, h, w) both."""
        if self._last is not None:
            values = torch.cat([self._last[0], values])
            gradients = torch.cat([self._last[1], gradients])
        left, right = self.weights
        made = (
            (left * gradients[:-1] + right * gradients[1:]) * values.diff(dim=0)
        ).sum(dim=0)
        self.total = made if self.total is None else self.total.add_(made)
        self._last = values[-1:].clone(), gradients[-1:].clone()


def along(
    model: Network,
    count: int,
    pixels: Callable[[int, int], Tensor],
    layers: Sequence[str],
    target: Target,
    side: RiemannSide,
    label: str,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """By layer the sum of Stieltjes (C, h, w) along a path of ``count`` images, and the
    scores of its first and last.
    """
    sums = {name: Stieltjes(side) for name in layers}
    scores: list[float] = []
    for _, trace in traces_in_batches(model, count, pixels, target, label, layers):
        found = target.of(trace.outputs)
        scores += [float(found[0]), float(found[-1])]
        for name, item in sums.items():
            item.add(trace.activations[name], trace.gradients[name])
    return {
        name: item.total for name, item in sums.items() if item.total is not None
    }, (scores[0], scores[-1])


# ---- integrated gradients


@explainers.register("integrated-gradients")
@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients (Sundararajan, Taly & Yan, ICML 2017, equation 1), the mean
    over the baselines.

    ``(x - x') * integral over [0, 1] of dS/dx(x' + a (x - x')) da``; its sum is S(x) -
    S(x') (proposition 1), and what the quadrature misses of it is in the facts. The
    paper's baseline is black, of which black evidence gets nothing: several baselines,
    ``baseline=black+white``, are averaged.

    On layers it is conductance (Dhamdhere, Sundararajan & Yan 2019, equation 2):
    ``integral of dS/dy dy/da da`` of the layer's values y along the same way in pixels,
    by Shrikumar's differences (2018, section 2.3): gradient times the change of y from
    place to place, ``steps + 1`` passes for all layers. It adds up to the same where
    all of the score goes through the layer, which class tokens and residuals beside it
    do not. Several layers' maps are averaged on the finest grid, each with its own sum.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Integrated gradients"
    steps: int = option(
        50, help="places on the way from each baseline, a pass each", least=1
    )
    baseline: tuple[Fill, ...] = option(
        (Black(),),
        kind="fill",
        help="where the way starts; several, joined by +, are averaged",
    )
    rule: QuadratureRule = option(
        "auto",
        help="quadrature; auto is gauss-legendre on pixels, trapezoid on layers",
    )
    layer: tuple[str, ...] = option(
        (PIXELS,),
        help="pixels, or layers joined by +; auto is the last spatial output",
    )
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def __post_init__(self) -> None:
        if self.rule == "trapezoid" and self._on_pixels and self.steps < 2:
            raise ConsilienceError(
                "integrated-gradients: steps must be at least 2 for the trapezoid rule; "
                f"got {self.steps}"
            )
        if not self._on_pixels and self.rule not in ("auto", *SIDES):
            raise ConsilienceError(
                f"integrated-gradients: on layers the rule is one of {', '.join(SIDES)}, for "
                f"their values are known where the "
                f"gradient is taken; got {self.rule}"
            )

    @property
    def _on_pixels(self) -> bool:
        return self.layer == (PIXELS,)

    def resolved(self, model: Network) -> Self:
        """The same with what ``auto`` stands for."""
        rule = (
            self.rule
            if self.rule != "auto"
            else "gauss-legendre"
            if self._on_pixels
            else "trapezoid"
        )
        return replace(self, rule=rule, layer=known_layers(self.layer, model))

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) on pixels, or on the finest of the layers' grids, in units of the
        score.
        """
        chosen = self.resolved(model)
        starts = baselines(view, self.baseline)
        return (
            chosen._by_quadrature(model, view, starts, target)
            if self._on_pixels
            else chosen._on_layers(model, view, starts, target)
        )

    def _by_quadrature(
        self, model: Network, view: View, starts: Tensor, target: Target
    ) -> Heat:
        places, weights = (
            torch.from_numpy(row).expand(len(starts), -1)
            for row in nodes(self.rule, self.steps)
        )
        device = view.pixels.device
        found = straight(
            model,
            view,
            starts,
            places.float().to(device),
            weights.float().to(device),
            target,
            self.label,
        )
        there, *begun = gradient_scores(
            model, torch.cat([view.pixels, starts]), target
        )
        facts = completeness(total(found), there, math.fsum(begun) / len(begun))
        passes = {"passes": len(starts) * self.steps}
        return Heat(
            reduced(found, self.channels),
            gap_of(facts),
            {**passes, "layer": PIXELS, **facts},
        )

    def _on_layers(
        self, model: Network, view: View, starts: Tensor, target: Target
    ) -> Heat:
        ways = [
            along(
                model,
                self.steps + 1,
                _line(start, view.pixels, self.steps),
                self.layer,
                target,
                self._side,
                self.label,
            )
            for start in starts
        ]
        sums = [
            torch.stack([found[name] for found, _ in ways]).mean(dim=0)
            for name in self.layer
        ]
        begun = math.fsum(begin for _, (begin, _) in ways) / len(ways)
        each = [completeness(total(item), ways[0][1][1], begun) for item in sums]
        facts = {
            key: per_layer(self.layer, [one[key] for one in each]) for key in each[0]
        }
        # The worst layer speaks for all, as one number.
        facts |= {
            "explained": each[0]["explained"],
            "completeness_share": max(one["completeness_share"] for one in each),
        }
        passes = {
            "passes": len(starts) * (self.steps + 1),
            "layer": "+".join(self.layer),
        }
        return Heat(
            shared_out([reduced(item, self.channels) for item in sums]),
            gap_of(facts),
            {**passes, **facts},
        )

    @property
    def _side(self) -> RiemannSide:
        return self.rule  # type: ignore[return-value]


def known_layers(layer: tuple[str, ...], model: Network) -> tuple[str, ...]:
    """``auto`` as the last spatial output; names checked against the layers with maps,
    of which ``pixels`` is one.
    """
    if layer == AUTO:
        return resolved_layers(layer, model)
    resolved_layers(tuple(name for name in layer if name != PIXELS), model)
    return layer


def _line(start: Tensor, image: Tensor, steps: int) -> Callable[[int, int], Tensor]:
    places = torch.linspace(0, 1, steps + 1, device=image.device).reshape(-1, 1, 1, 1)
    return lambda first, last: torch.lerp(start[None], image, places[first:last])


def total(values: Tensor) -> float:
    """The sum in float64."""
    return float(values.detach().cpu().double().sum())


def shared_out(maps: Sequence[Tensor]) -> Tensor:
    """Maps (h', w') of several grids as their mean on the finest; a cell's value is
    shared out over the cells it becomes.
    """
    size = (
        max(item.shape[-2] for item in maps),
        max(item.shape[-1] for item in maps),
    )
    cells = size[0] * size[1]
    return fused(
        [
            enlarge(item[None] * (item.numel() / cells), size)
            if len(maps) > 1
            else item[None]
            for item in maps
        ],
        "mean",
    )[0]


# ---- expected gradients


@explainers.register("expected-gradients")
@dataclass(frozen=True)
class ExpectedGradients:
    """Expected gradients (Erion et al., Nature Machine Intelligence 2021, equation 3),
    also called GradientSHAP (Lundberg).

    ``E over x' and a of (x - x') * dS/dx(x' + a (x - x'))``, baselines x' and places a
    uniform in [0, 1] drawn at random. The paper draws baselines from the training
    images; for one image they are the fills of ``baseline`` in turn, so that no colour
    is the one that gets nothing. Places are stratified: one in each of equal parts of
    [0, 1], unbiased and surer.

    The sum tends to S(x) less the mean score of the baselines; how far this draw is
    from it is in the facts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Expected gradients"
    samples: int = option(
        64,
        help="draws of a baseline and a place, a pass each; shared out evenly over the baselines",
        least=1,
    )
    baseline: tuple[Fill, ...] = option(
        (Black(), White(), NeutralFill(), BlurFill()),
        kind="fill",
        help="fills, joined by +, that baselines are drawn from",
    )
    seed: int = option(0, help="seed of the places", least=0)
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def __post_init__(self) -> None:
        if self.samples < len(self.baseline):
            raise ConsilienceError(
                f"expected-gradients: {len(self.baseline)} baselines need as many samples; "
                f"got {self.samples}"
            )

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score."""
        starts = baselines(view, self.baseline)
        each = -(-self.samples // len(starts))
        places = (
            torch.from_numpy(stratified(len(starts), each, self.seed))
            .float()
            .to(view.pixels.device)
        )
        found = straight(
            model,
            view,
            starts,
            places,
            torch.full_like(places, 1 / each),
            target,
            self.label,
        )
        there, *begun = gradient_scores(
            model, torch.cat([view.pixels, starts]), target
        )
        facts = completeness(total(found), there, math.fsum(begun) / len(begun))
        return Heat(
            reduced(found, self.channels),
            gap_of(facts),
            {"passes": places.numel(), "seed": self.seed, **facts},
        )


def stratified(rows: int, each: int, seed: int) -> Array:
    """Places (rows, each) in [0, 1): in every row one in each of ``each`` equal parts."""
    drawn: Array = np.random.default_rng(seed).random((rows, each))
    return (np.arange(each) + drawn) / each


# ---- guided integrated gradients


@explainers.register("guided-ig")
@dataclass(frozen=True)
class GuidedIG:
    """Guided integrated gradients (Kapishnikov et al., CVPR 2021, algorithm 1): the
    path goes where the gradient is small.

    At every step the ``fraction`` of values with the smallest gradients moves towards
    the image, until the distance that is left (in L1) is that of the straight way; none
    goes further ahead of it or stays further behind than ``distance`` of the way. So
    noise of the gradient is not gathered on the way. Complete in the limit of many
    steps. Steps follow from one another: a pass each for an image, several images and
    baselines together. ``distance=0`` is integrated gradients.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Guided IG"
    steps: int = option(200, help="steps of the path, a pass each", least=1)
    baseline: tuple[Fill, ...] = option(
        (Black(),),
        kind="fill",
        help="where the path starts; several, joined by +, are averaged",
    )
    fraction: float = option(
        0.25,
        help="share of the values that move at a time, above 0 up to 1",
        above=0,
        most=1,
    )
    distance: float = option(
        0.02,
        help="furthest from the straight way, as a share of it, 0 to 1",
        least=0,
        most=1,
    )
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images: the same steps at the same time, of as many as memory allows
        a pass.
        """
        size = max(1, batch_of(model) // len(self.baseline))
        parts = [slice(start, start + size) for start in range(0, len(views), size)]
        return [
            heat
            for part in parts
            for heat in self._together(model, views[part], targets[part])
        ]

    def _together(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        starts, count = (
            [baselines(view, self.baseline) for view in views],
            len(self.baseline),
        )
        walks = [
            Walk(start, view.pixels[0])
            for view, own in zip(views, starts, strict=True)
            for start in own
        ]
        goal = [target for target in targets for _ in range(count)]
        with progress.task(self.label, self.steps) as running:
            for step in range(self.steps):
                self._step(model, walks, goal, (step + 1) / self.steps)
                running.advance()
        groups = [
            walks[start : start + count] for start in range(0, len(walks), count)
        ]
        return [
            self._heat(model, *one)
            for one in zip(views, starts, targets, groups, strict=True)
        ]

    def _step(
        self,
        model: Network,
        walks: Sequence[Walk],
        targets: Sequence[Target],
        time: float,
    ) -> None:
        for start in range(0, len(walks), batch_of(model)):
            rows = slice(start, start + batch_of(model))
            places = torch.stack([walk.place() for walk in walks[rows]])
            gradients = model.trace(
                places, [PIXELS], EachOwn(tuple(targets[rows]))
            ).gradients[PIXELS]
            for walk, gradient in zip(walks[rows], gradients, strict=True):
                walk.step(gradient, time, self.fraction, self.distance)

    def _heat(
        self,
        model: Network,
        view: View,
        starts: Tensor,
        target: Target,
        walks: Sequence[Walk],
    ) -> Heat:
        found = torch.from_numpy(np.mean([walk.gathered for walk in walks], axis=0))
        there, *begun = gradient_scores(
            model, torch.cat([view.pixels, starts]), target
        )
        facts = completeness(total(found), there, math.fsum(begun) / len(begun))
        return Heat(
            reduced(found, self.channels).float(),
            gap_of(facts),
            {"passes": len(walks) * self.steps, **facts},
        )


class Walk:
    """One path: how far along its own way each value is, in [0, 1], and what was
    gathered, (3, h, w) float64.

    A value that is the same in baseline and image never moves.
    """

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self._start, self._end = start, end
        self._way = (end - start).cpu().double().numpy()
        self._length = np.abs(self._way)
        self._total = float(self._length.sum())
        self._done = np.zeros_like(self._way)
        self.gathered = np.zeros_like(self._way)

    def place(self) -> Tensor:
        """The image that the path has come to, (3, h, w)."""
        return torch.lerp(
            self._start, self._end, torch.from_numpy(self._done).to(self._start)
        )

    def step(
        self, gradient: Tensor, time: float, fraction: float, distance: float
    ) -> None:
        """Go on until ``time`` of the way is made, values of small ``gradient`` (3, h,
        w) first.
        """
        slope = gradient.cpu().double().numpy()
        low, high = max(time - distance, 0.0), min(time + distance, 1.0)
        before = self._done.copy()
        np.maximum(self._done, low, out=self._done)
        sizes = np.where(self._length > 0, np.abs(slope), np.inf)
        while (
            lacks := self._left(1.0) - self._total * (1 - time)
        ) > 1e-9 * self._total:
            sizes[self._done >= high] = np.inf
            moving = (sizes <= _quantile(sizes, fraction)) & np.isfinite(sizes)
            room = self._left(high, moving)
            if room <= 0:
                break  # what is lacking is rounding
            self._done[moving] = (
                high
                if lacks >= room
                else self._done[moving] + lacks / room * (high - self._done[moving])
            )
        self.gathered += (self._done - before) * self._way * slope

    def _left(self, end: float, some: Array | None = None) -> float:
        left = self._length * (end - self._done)
        return float(left.sum() if some is None else left[some].sum())


def _quantile(values: Array, fraction: float) -> float:
    """The value below which that share lies, the lower one of two; infinities are
    values.
    """
    rank = math.floor(fraction * (values.size - 1))
    return float(np.partition(values, rank, axis=None)[rank])


# ---- blur integrated gradients


@explainers.register("blur-ig")
@dataclass(frozen=True)
class BlurIG:
    """Blur integrated gradients (Xu, Venugopalan & Sundararajan, CVPR 2020, equation
    4): the way from a blurred image.

    ``integral over sigma of dS/dx(x_sigma) dx_sigma/dsigma``, x_sigma the image under a
    Gaussian, from ``sigma`` down to 0. No colour is a baseline: all of the image's
    detail appears on the way, coarse before fine. The integral is the sum of gradient
    times step, each step with the mean gradient of its ends (``rule=trapezoid``),
    complete but for the curvature within a step. The authors' code takes the gradient
    at the sharper end, ``rule=riemann-right``, a derivative by a small difference, and
    black outside of the image where here it is mirrored.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Blur IG"
    steps: int = option(
        50, help="steps of the path; a pass each, and one more", least=1
    )
    sigma: float = option(50.0, help="blur at the start, in pixels", above=0)
    spacing: Literal["sigma", "root"] = option(
        "root",
        help="steps equal in sigma, as in the paper, or in its square root: finer near the image",
    )
    rule: RiemannSide = option(
        "trapezoid", help="where in a step the gradient is taken, blurred side left"
    )
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score."""
        shares = np.linspace(1, 0, self.steps + 1)
        sigmas = self.sigma * (shares if self.spacing == "sigma" else shares**2)
        blurs = Blurs(view.pixels)

        def pixels(start: int, stop: int) -> Tensor:
            return torch.cat([blurs.at(float(sigma)) for sigma in sigmas[start:stop]])

        sums, (begun, there) = along(
            model, len(sigmas), pixels, [PIXELS], target, self.rule, self.label
        )
        facts = completeness(total(sums[PIXELS]), there, begun)
        return Heat(
            reduced(sums[PIXELS], self.channels),
            gap_of(facts),
            {"passes": len(sigmas), **facts},
        )


class Blurs:
    """One image (1, 3, h, w) under Gaussians of any width, as `images.blur` has it, in
    the time of four small products.

    A symmetric filter that mirrors at the borders only scales the cosines that a side
    is made of (DCT-II), so that a blur is a scaling of the image's spectrum.
    """

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self._bases = [
            torch.from_numpy(dct(np.eye(side), norm="ortho", axis=0)).to(pixels)
            for side in pixels.shape[-2:]
        ]
        down, across = self._bases
        self._spectrum = down @ pixels @ across.T

    def at(self, sigma: float) -> Tensor:
        """The image under a Gaussian of ``sigma`` pixels; itself at 0."""
        if sigma == 0:
            return self._pixels
        kernel = _kernel(sigma)
        down, across = (
            torch.from_numpy(_response(kernel, side)).to(self._pixels)
            for side in self._pixels.shape[-2:]
        )
        rows, columns = self._bases
        return rows.T @ (self._spectrum * down[:, None] * across) @ columns


def _kernel(sigma: float) -> Array:
    """Half of scipy's Gaussian, from the middle out."""
    reach = int(4 * sigma + 0.5)
    one = np.zeros(2 * reach + 1)
    one[reach] = 1.0
    found: Array = gaussian_filter1d(one, sigma, mode="constant")
    return found[reach:]


def _response(kernel: Array, side: int) -> Array:
    """What a symmetric filter makes of each of ``side`` cosines, (side,)."""
    angles = np.pi * np.outer(np.arange(side), np.arange(len(kernel))) / side
    found: Array = np.cos(angles) @ (
        kernel * np.where(np.arange(len(kernel)) > 0, 2.0, 1.0)
    )
    return found
