"""What the score does as pixels change: the gradient, the gradient times the input, and
gradients averaged over noise.

Every pass is `model.trace` on the pixels. `traced` is what the families of many passes
share: chunks that the memory budget of a forward and backward pass allows, nothing kept
of one when the next is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from consilience import progress
from consilience.explainers.cam import EachOwn
from consilience.models.engines import plan
from consilience.perturb.fills import Fill, NeutralFill
from consilience.registry import explainers, option
from consilience.types import (
    PIXELS,
    Array,
    Heat,
    Network,
    Target,
    Trace,
    View,
)

Channels = Literal["sum", "l1", "l2", "largest"]
GradientScore = Literal["logit", "probability"]
CHANNELS = "how colours become one: signed sum, l1 (sum of magnitudes), l2, or largest magnitude"
GRADIENT_ROUNDING = 1e-6
"""Of the size of two scores: what their difference cannot tell from 0 in float32."""

# ---- what the families share


def reduced(colours: Tensor, how: Channels) -> Tensor:
    """(..., C, h, w) to (..., h, w): signed ``sum``, sum of magnitudes ``l1``,
    Euclidean ``l2``, ``largest``.
    """
    if how == "sum":
        return colours.sum(dim=-3)
    if how == "l1":
        return colours.abs().sum(dim=-3)
    return colours.norm(dim=-3) if how == "l2" else colours.abs().amax(dim=-3)


def traces_in_batches(
    model: Network,
    count: int,
    pixels: Callable[[int, int], Tensor],
    target: Target | Callable[[int, int], Target],
    label: str,
    layers: Sequence[str] = (PIXELS,),
) -> Iterator[tuple[slice, Trace]]:
    """Traces of ``count`` images that are made when it is their turn: ``pixels(start,
    stop)`` is (b, 3, h, w).

    At most ``model.gradient_batch`` images stand at a time. ``target`` may depend on
    the rows.
    """
    alike = None if callable(target) else target
    exact, model = model, _fastest(model, count, layers, alike)
    size = batch_of(model)
    middle = size * (-(-count // size) // 2) if _is_low(model) else None
    with progress.task(label, count) as running:
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            goal = target(rows.start, rows.stop) if callable(target) else target
            shown = pixels(rows.start, rows.stop)
            found = model.trace(shown, layers, goal)
            if start == middle:
                _record_shift(found, exact.trace(shown, layers, goal), layers)
            yield rows, found
            running.advance(rows.stop - rows.start)


def _is_low(model: Network) -> bool:
    """Whether gradients are in another precision than the weights."""
    chosen = getattr(model, "gradient_plan", None)
    return chosen is not None and chosen.precision in plan.LOW


def _record_shift(low: Trace, exact: Trace, layers: Sequence[str]) -> None:
    """How far the mean gradient of a chunk is from the one in full precision, as a share
    of that: the largest of the layers.
    """
    shifts = []
    for name in layers:
        expected = exact.gradients[name].float().mean(dim=0)
        apart = low.gradients[name].float().mean(dim=0) - expected
        shifts.append(float(apart.norm() / expected.norm().clamp(min=1e-30)))
    plan.record_pass("torch", "f32", shift=max(shifts))


def _fastest(
    model: Network, count: int, layers: Sequence[str], target: Target | None
) -> Network:
    """The model as its passes are fastest, where an adapter can say."""
    asked = getattr(model, "for_gradients", None)
    return model if asked is None else asked(count, layers, target)


def batch_of(model: Network) -> int:
    """Images a forward and backward pass; one where an adapter does not say what its
    memory allows.
    """
    return max(1, int(getattr(model, "gradient_batch", 1)))


def gradient_scores(model: Network, pixels: Tensor, target: Target) -> list[float]:
    """Scores (N,) of few images by the arithmetic that the gradients come from: plain
    torch.
    """
    with torch.no_grad():
        return [
            float(score)
            for part in torch.split(pixels, batch_of(model))
            for score in target.of(model.logits(part))
        ]


def completeness(attributed: float, there: float, start: float) -> dict[str, Any]:
    """How far an attribution is from complete (Sundararajan et al.

    2017, proposition 1), as facts.

    ``explained`` is f(there) - f(start); ``completeness_gap`` what of it is not
    attributed; ``completeness_share`` that in units of it, 0 where it is rounding.
    Where the scores hardly differ, they are what it is compared with.
    """
    explained = there - start
    gap = explained - attributed
    size = abs(there) + abs(start)
    share = (
        0.0
        if abs(gap) <= GRADIENT_ROUNDING * size
        else abs(gap) / max(abs(explained), GRADIENT_ROUNDING * size, 1e-30)
    )
    return {
        "explained": explained,
        "completeness_gap": gap,
        "completeness_share": share,
    }


def gap_of(facts: dict[str, Any]) -> dict[str, Array]:
    """The extras of a completeness: its share, as an array without dimensions."""
    return {"completeness_share": np.array(facts["completeness_share"])}


# ---- one pass


@explainers.register("gradient")
@dataclass(frozen=True)
class Gradient:
    """The gradient of the score by the pixels (Simonyan, Vedaldi & Zisserman 2014,
    section 3.1).

    ``M = max_c |dS / dI_c|``, the largest magnitude over the colours: to which pixels
    the score is most sensitive, not what it is made of. ``channels=sum`` keeps the
    sign.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Gradient"
    channels: Channels = option("largest", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score a unit of pixel value, which runs from 0 to 1."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images, as many a pass as memory allows."""
        found: list[Heat] = []
        for rows, trace in _passes(model, views, targets, self.label):
            heats = [
                self._heat(view, row)
                for view, row in zip(
                    views[rows], trace.gradients[PIXELS], strict=True
                )
            ]
            found += heats
        return found

    def _heat(self, view: View, gradient: Tensor) -> Heat:
        return Heat(reduced(gradient, self.channels), facts={"passes": 1})


@explainers.register("input-x-gradient")
@dataclass(frozen=True)
class InputXGradient:
    """Input times gradient (Shrikumar et al.

    2016, "Not just a black box", section 2), summed over the colours.

    ``sum_c (x_c - x'_c) dS / dx_c`` with x' the image that stands for nothing:
    ``neutral``, which a network takes as zero. It adds up to the score's difference
    only where the score is linear between the two; elsewhere integrated gradients do.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Input x gradient"
    baseline: Fill = option(
        NeutralFill(), kind="fill", help="the input that counts as zero"
    )
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w) in units of the score."""
        return self.explain_batch(model, [view], [target])[0]

    def explain_batch(
        self, model: Network, views: Sequence[View], targets: Sequence[Target]
    ) -> list[Heat]:
        """Several images, as many a pass as memory allows."""
        found: list[Heat] = []
        for rows, trace in _passes(model, views, targets, self.label):
            for view, row in zip(views[rows], trace.gradients[PIXELS], strict=True):
                less = view.pixels[0] - self.baseline.image(view, None)[0].to(row)
                found.append(
                    Heat(reduced(less * row, self.channels), facts={"passes": 1})
                )
        return found


def _passes(
    model: Network, views: Sequence[View], targets: Sequence[Target], label: str
) -> Iterator[tuple[slice, Trace]]:
    def pixels(start: int, stop: int) -> Tensor:
        return torch.cat([view.pixels for view in views[start:stop]])

    return traces_in_batches(
        model,
        len(views),
        pixels,
        lambda start, stop: EachOwn(tuple(targets[start:stop])),
        label,
    )


# ---- averages over noise


@dataclass(frozen=True)
class Noised:
    """Gradients of the image under Gaussian noise; a method says in `of` what becomes
    of their moments.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    label: ClassVar[str] = "Gradients under noise"
    samples: int = option(50, help="noisy images, a pass each", least=1)
    noise: float = option(
        0.15,
        help="standard deviation of the noise, in units of the image's largest less its smallest value",
        least=0,
    )
    seed: int = option(0, help="seed of the noise", least=0)
    channels: Channels = option("sum", help=CHANNELS)
    score: GradientScore = option("logit", help="what is differentiated")

    def of(self, mean: Tensor, variance: Tensor) -> Tensor:
        """What becomes of the gradients' mean and variance over the draws, (3, h, w)
        both.
        """
        raise NotImplementedError

    def explain(self, model: Network, view: View, target: Target) -> Heat:
        """(h, w); draw i is the same whatever the memory budget, and whatever the
        number of draws.
        """
        image = view.pixels
        sigma = self.noise * float(image.max() - image.min())
        noisy = _draws(image, sigma, self.seed)
        moments = Moments()
        for _, trace in traces_in_batches(
            model,
            self.samples,
            lambda start, stop: noisy(stop - start),
            target,
            self.label,
        ):
            moments.add(trace.gradients[PIXELS])
        values = reduced(self.of(moments.mean, moments.variance), self.channels)
        return Heat(
            values, facts={"passes": self.samples, "seed": self.seed, "sigma": sigma}
        )


def _draws(image: Tensor, sigma: float, seed: int) -> Callable[[int], Tensor]:
    """The next images under noise, drawn on the CPU one by one: their bytes depend on
    no chunk and no device.
    """
    generator = torch.Generator().manual_seed(seed)

    def more(count: int) -> Tensor:
        drawn = torch.empty(count, *image.shape[1:])
        for row in drawn:
            torch.randn(row.shape, generator=generator, out=row)
        return drawn.to(image).mul_(sigma).add_(image)

    return more


class Moments:
    """Mean and variance of gradients (b, 3, h, w) as they come, chunks merged after
    Chan, Golub & LeVeque (1983): the variance is never the small difference of two
    large numbers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """More of them; ``rows`` is overwritten."""
        mean = rows.mean(dim=0)
        apart = rows.sub_(mean).square_().sum(dim=0)
        if self.count:
            step = mean - self.mean
            total = self.count + len(rows)
            apart += self._squares + step.square() * (self.count * len(rows) / total)
            mean = self.mean + step * (len(rows) / total)
        self.mean, self._squares, self.count = mean, apart, self.count + len(rows)

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean."""
        return self._squares / self.count


@explainers.register("smoothgrad")
@dataclass(frozen=True)
class SmoothGrad(Noised):
    """SmoothGrad (Smilkov et al. 2017, section 2): the mean gradient over images with
    Gaussian noise added.

    ``1/n sum_i dS / dI (I + N(0, sigma^2))``; sigma is given in units of the image's
    range, .1 to .2 in the paper. Without noise it is the gradient. The sum of
    magnitudes over the colours is what the authors' code draws.
    """

    label: ClassVar[str] = "SmoothGrad"
    channels: Channels = option("l1", help=CHANNELS)

    def of(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The mean."""
        return mean


@explainers.register("squaregrad")
@dataclass(frozen=True)
class SquareGrad(Noised):
    """SmoothGrad-Squared (Hooker et al., NeurIPS 2019, section 3): the mean squared
    gradient under noise.

    ``1/n sum_i (dS / dI)^2``, the square of the mean and the variance together: values
    are 0 and up.
    """

    label: ClassVar[str] = "SquareGrad"

    def of(self, mean: Tensor, variance: Tensor) -> Tensor:
        """``mean^2 + variance``."""
        return mean.square() + variance


@explainers.register("vargrad")
@dataclass(frozen=True)
class VarGrad(Noised):
    """VarGrad (Adebayo et al. 2018, "Local explanation methods", section 2): the
    variance of the gradient under noise.

    It marks where the gradient changes, such as the border of an on and an off ReLU,
    not where it is large: of a linear model it shows nothing. Without noise it is 0.
    The variance is that of the draws, divided by n.
    """

    label: ClassVar[str] = "VarGrad"

    def of(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The variance."""
        return variance
