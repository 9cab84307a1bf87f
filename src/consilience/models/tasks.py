"""Networks that are not classifiers: those that label pixels, and those that find boxes.

Each is given outputs (N, K), a number a class, so that a class can be explained as it
is in a classifier; a set of pixels or one box is asked for by its own target
(`consilience.targets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.models.network import TorchNetwork, wrap
from consilience.models.readouts import ReadNetwork, digest_of_tensor, with_readout
from consilience.types import ConsilienceError

# ---- segmentation


def pixel_logits(said: Any) -> Tensor:
    """Logits (N, K, H, W) of what a segmentation network returns: a tensor, a dict with
    ``out``, an object with ``logits``.

    One channel is a yes or no: it becomes two, the first of them 0, so that softmax is
    the sigmoid.
    """
    found = (
        said.get("out", said.get("logits"))
        if isinstance(said, dict)
        else getattr(said, "logits", said)
    )
    if (
        not isinstance(found, Tensor)
        or found.dim() != 4
        or not found.is_floating_point()
    ):
        got = (
            f"shape {tuple(found.shape)}"
            if isinstance(found, Tensor)
            else type(said).__name__
        )
        raise ConsilienceError(
            f"a segmentation network returns logits (N, K, H, W), alone or as 'out'; this one "
            f"returns {got}"
        )
    return (
        torch.cat([torch.zeros_like(found), found], dim=1)
        if found.shape[1] == 1
        else found
    )


@dataclass(frozen=True)
class Shares:
    """The mean over all pixels of each class's probability: what share of the frame the
    network gives to it.
    """

    key = "shares of the frame"
    traceable = True

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Shares (N, K); each row sums to 1."""
        return pixel_logits(module(prepared)).softmax(dim=1).mean(dim=(2, 3))

    def layer(self, network: TorchNetwork) -> str | None:
        """Found by the search."""
        return None


@dataclass(frozen=True, eq=False)
class PixelReading:
    """Means over a set of pixels, ``weights`` (H, W) that sum to 1 on the grid of the
    logits; logits or probabilities.
    """

    weights: Tensor
    probability: bool = False
    traceable = False  # the set is one image's

    @property
    def key(self) -> str:
        """The pixels and the score."""
        return f"{'probability' if self.probability else 'logit'} over pixels {digest_of_tensor(self.weights)}"

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Means (N, K)."""
        logits = pixel_logits(module(prepared))
        values = logits.softmax(dim=1) if self.probability else logits
        return torch.einsum("nkhw,hw->nk", values, self.weights.to(values))

    def layer(self, network: TorchNetwork) -> str | None:
        """Found by the search."""
        return None


def is_segmentation(network: Any) -> bool:
    """Whether the network labels pixels, as `wrap_segmentation` has it."""
    return isinstance(network, ReadNetwork) and isinstance(network.reading, Shares)


def wrap_segmentation(
    module: nn.Module, *, classes: Sequence[str] | None = None, **options: Any
) -> ReadNetwork:
    """A network (N, 3, h, w) -> logits (N, K, H, W) as a `Network` whose outputs are
    each class's share of the frame.

    The module may return them alone, in a dict under ``out`` (torchvision), or as
    ``.logits`` (transformers), at any resolution. The outputs are the means over all
    pixels of the softmax, so ``target="predicted"`` is the class that covers most;
    ``pixels:CLASS`` asks for a set of pixels. ``options`` are those of `wrap` but
    ``outputs``. Raises `ConsilienceError` where the number of ``classes`` is not that
    of the channels (two where there is one).
    """
    _without_outputs(options, "wrap_segmentation")
    network = with_readout(
        wrap(module, classifier=False, **options), Shares(), "probabilities", classes
    )
    if classes is not None and len(classes) != network.anatomy.outputs:
        raise ConsilienceError(
            f"{len(classes)} class names for a module with {network.anatomy.outputs} channels "
            f"of logits"
        )
    return network


def _without_outputs(options: dict[str, Any], where: str) -> None:
    if "outputs" in options:
        raise ConsilienceError(
            f"{where} settles what its outputs are; outputs= is for wrap"
        )


# ---- detection

Found = dict[str, Tensor]


def detections(module: nn.Module, prepared: Tensor) -> list[Found]:
    """What a torchvision detector finds in each image: boxes (n, 4) in pixels of the
    frame, labels (n,), scores (n,).
    """
    said = module(list(prepared))
    whole = isinstance(said, list) and all(
        isinstance(one, dict) and {"boxes", "labels", "scores"} <= set(one)
        for one in said
    )
    if not whole:
        wanted = "a list of dicts with boxes, labels and scores"
        raise ConsilienceError(
            f"a detector returns {wanted}, as torchvision's do; this one returns "
            f"{type(said).__name__}"
        )
    found: list[Found] = said
    return found


def _detectors_layer(network: TorchNetwork) -> str | None:
    """The last map of the backbone before it is spread over scales
    (``backbone.body.layer4``).

    Noise, by which the search would look, holds no detection; and a box may hang on the
    map of any scale.
    """
    maps = [
        layer.name
        for layer in network.layers()
        if layer.spatial is not None and max(layer.spatial) > 1
    ]
    for inside in ("backbone.body.", "backbone."):
        found = [name for name in maps if name.startswith(inside)]
        if found:
            steps = inside.count(".") + 1
            last = ".".join(found[-1].split(".")[:steps])
            return last if last in maps else found[-1]
    raise ConsilienceError(
        f"{network.name} has no layer 'backbone' that a CAM could look at; name one with layer="
    )


@dataclass(frozen=True)
class BestScores:
    """For each class the score of its surest detection, 0 where there is none."""

    count: int
    traceable = False  # which boxes there are is decided on the way

    @property
    def key(self) -> str:
        """How many classes."""
        return f"best scores of {self.count} classes"

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Scores (N, K)."""
        return torch.stack(
            [self._row(found) for found in detections(module, prepared)]
        )

    def _row(self, found: Found) -> Tensor:
        labels, scores = found["labels"], found["scores"]
        if len(labels) and int(labels.max()) >= self.count:
            raise ConsilienceError(
                f"the detector gives label {int(labels.max())}; {self.count} classes are named"
            )
        return scores.new_zeros(self.count).scatter_reduce(0, labels, scores, "amax")

    def layer(self, network: TorchNetwork) -> str | None:
        """Of the backbone."""
        return _detectors_layer(network)


@dataclass(frozen=True)
class BoxReading:
    """The score of the detection of class ``label`` that matches a box: the largest IoU
    times score, 0 where there is none.

    The similarity of D-RISE (Petsiuk et al., CVPR 2021, equation 4), without the
    vectors of class probabilities, which torchvision does not return. In gradients the
    IoU is a constant: at the detection's own box it has its maximum.
    """

    label: int
    box: tuple[float, float, float, float]
    traceable = False

    @property
    def key(self) -> str:
        """Class and box."""
        return f"detection {self.label} at {self.box}"

    def of(self, module: nn.Module, prepared: Tensor) -> Tensor:
        """Scores (N, 1)."""
        return torch.stack(
            [self._match(found) for found in detections(module, prepared)]
        )[:, None]

    def _match(self, found: Found) -> Tensor:
        mine = found["labels"] == self.label
        if not bool(mine.any()):
            return found["scores"].new_zeros(())
        boxes = found["boxes"][mine].detach()
        return (
            overlap(boxes, boxes.new_tensor(self.box)) * found["scores"][mine]
        ).amax()

    def layer(self, network: TorchNetwork) -> str | None:
        """Of the backbone."""
        return _detectors_layer(network)


def overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """IoU (n,) of boxes (n, 4) with one box (4,), corners x0, y0, x1, y1."""
    low, high = (
        torch.maximum(boxes[:, :2], box[:2]),
        torch.minimum(boxes[:, 2:], box[2:]),
    )
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (box[2:] - box[:2]).prod()
    return shared / (areas - shared).clamp(min=torch.finfo(boxes.dtype).tiny)


def is_detector(network: Any) -> bool:
    """Whether the network finds boxes, as `wrap_detector` has it."""
    return isinstance(network, ReadNetwork) and isinstance(
        network.reading, BestScores
    )


def wrap_detector(
    module: nn.Module, *, classes: Sequence[str], **options: Any
) -> ReadNetwork:
    """A torchvision detector as a `Network` whose outputs are, for each class, the
    score of its surest detection.

    ``classes`` name the labels in order, label 0 (the background of most) included.
    ``mean`` and ``std`` are 0 and 1 unless told, because these modules normalise by
    themselves; ``options`` are otherwise those of `wrap` but ``outputs``.
    ``detection:CLASS`` asks for one box. What the module drops (``box_score_thresh``,
    non-maximum suppression, at most so many boxes) scores 0. Detectors run in torch:
    which boxes there are is decided on the way, which no converted graph can.
    """
    _without_outputs(options, "wrap_detector")
    own = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    network = wrap(module, classifier=False, **{**own, **options})
    return with_readout(network, BestScores(len(tuple(classes))), "values", classes)
