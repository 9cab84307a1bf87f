"""What is asked of networks that are not classifiers: a set of pixels, a box."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from consilience.models.layers import borrowed
from consilience.models.network import TorchNetwork
from consilience.models.readouts import Readout
from consilience.models.tasks import (
    BoxReading,
    PixelReading,
    detections,
    is_detector,
    is_segmentation,
    pixel_logits,
)
from consilience.registry import option
from consilience.targets import ReadElsewhere, targets
from consilience.targets.classes import (
    ScoreName,
    check_class,
    class_index,
    class_name,
    readable,
)
from consilience.targets.places import Corners, GridPlace, same_file
from consilience.types import (
    Box,
    ConsilienceError,
    Model,
    NotApplicable,
    Sample,
    View,
)

# ---- a set of pixels


@targets.register("pixels")
@dataclass(frozen=True)
class PixelsTarget(ReadElsewhere):
    """A class of a segmentation network over a set of pixels: the mean of its logits
    there, or of its probabilities.

    The set is all pixels that the network gives to the class in the image as it is
    (Seg-Grad-CAM: Vinogradova et al., AAAI 2020, equation 2, with the mean for the
    sum), a ``box`` in pixels of the image, or a ``mask`` file of its size.
    """

    category: str = option(
        "predicted",
        help="class by name or number; predicted: the one that covers most",
    )
    box: Corners | None = option(
        None, help="x0 + y0 + x1 + y1 in pixels of the image"
    )
    mask: str = option(
        "", help="file of a mask of the image's size (.npy, or an image)"
    )
    digest: str = option("", help="of the mask's file; found")
    label: str = option("", help="the class's name; found")
    score: ScoreName = option(
        "logit", help="what is averaged; settled by the explainer"
    )
    index: ClassVar[None] = None

    @property
    def place(self) -> GridPlace:
        """The set of pixels, where it is not that of the class."""
        return GridPlace(box=self.box, mask=self.mask)

    @property
    def name(self) -> str:
        """Class and place."""
        return f"{self.label or self.category}{self.place.suffix or ' (pixels predicted so)'}"

    def check(self, model: Model) -> None:
        """The model labels pixels, and has the class."""
        if not is_segmentation(model):
            raise ConsilienceError(
                f"target pixels needs a network of wrap_segmentation; {model.id} labels no "
                f"pixels"
            )
        self.place.check()
        check_class(model, self.category)

    def resolved(self, model: Model, sample: Sample, outputs: Tensor) -> PixelsTarget:
        """The class as a number, and the digest of the mask."""
        self.check(model)
        index = class_index(model, sample, self.category, outputs)
        return replace(
            self,
            digest=same_file(self.mask, self.digest),
            category=str(index),
            label=class_name(model, index),
        )

    def scored(self, score: str) -> PixelsTarget:
        """The same pixels, read as ``score``."""
        return replace(self, score=readable(score, "logits"))

    def reading(self, model: TorchNetwork, view: View) -> Readout:
        """Every class's mean over the set of pixels."""
        with borrowed(model.module), torch.no_grad():
            logits = pixel_logits(
                model.module(model.prepared(view.pixels.to(model.device)))
            )[0]
        weights = self.place.weights(
            (int(logits.shape[1]), int(logits.shape[2])), view.geometry
        )
        return PixelReading(
            self._predicted(logits, model) if weights is None else weights,
            self.score == "probability",
        )

    def _predicted(self, logits: Tensor, model: Model) -> Tensor:
        """All pixels whose first class it is, with equal weights."""
        on = (logits.argmax(dim=0) == int(self.category)).float().cpu()
        if not bool(on.any()):
            raise NotApplicable(code="label-not-predicted", label=self.label)
        return on / on.sum()

    def pick(self, outputs: Tensor) -> Tensor:
        """The class's (N,) of all classes' means (N, K)."""
        return outputs[..., int(self.category)]


# ---- a box


@targets.register("detection")
@dataclass(frozen=True)
class DetectionTarget(ReadElsewhere):
    """One box of a detector: the score of the detection of its class that matches it,
    times how well (IoU).

    The box is the class's surest detection in the image as it is (``rank=2``: the
    next), or ``box`` in pixels of the image, as truth has it.
    """

    category: str = option(
        "predicted",
        help="class by name or number; predicted: that of the surest detection",
    )
    rank: int = option(
        1, help="which of the class's detections, the surest first", least=1
    )
    box: Corners | None = option(
        None, help="x0 + y0 + x1 + y1 in pixels of the image"
    )
    label: str = option("", help="the class's name; found")
    index: ClassVar[None] = None
    score: ClassVar[str] = "value"

    @property
    def name(self) -> str:
        """Class and box."""
        return f"{self.label or self.category}{GridPlace(box=self.box).suffix or f' (detection {self.rank})'}"

    def check(self, model: Model) -> None:
        """The model is a detector, and has the class."""
        if not is_detector(model):
            raise ConsilienceError(
                f"target detection needs a network of wrap_detector; {model.id} finds no boxes"
            )
        if self.rank < 1:
            raise ConsilienceError(f"detection: rank counts from 1; got {self.rank}")
        check_class(model, self.category)

    def resolved(
        self, model: Model, sample: Sample, outputs: Tensor
    ) -> DetectionTarget:
        """The class as a number; `NotApplicable` where ``predicted`` is asked for and
        nothing is found.
        """
        self.check(model)
        if self.category == "predicted" and not bool((outputs > 0).any()):
            raise NotApplicable(code="no-detection", image=sample.name)
        index = class_index(model, sample, self.category, outputs)
        return replace(self, category=str(index), label=class_name(model, index))

    def reading(self, model: TorchNetwork, view: View) -> Readout:
        """The score that matches the box."""
        if self.box is not None:
            moved = view.geometry.to_input(Box(None, *self.box))
            return BoxReading(
                int(self.category), (moved.x0, moved.y0, moved.x1, moved.y1)
            )
        with borrowed(model.module), torch.no_grad():
            found = detections(
                model.module, model.prepared(view.pixels.to(model.device))
            )[0]
        mine = found["labels"] == int(self.category)
        order = found["scores"][mine].sort(descending=True, stable=True).indices
        if len(order) < self.rank:
            raise NotApplicable(
                code="too-few-detections",
                count=len(order),
                label=self.label,
                rank=str(self.rank),
            )
        x0, y0, x1, y1 = found["boxes"][mine][order[self.rank - 1]].tolist()
        return BoxReading(int(self.category), (x0, y0, x1, y1))

    def pick(self, outputs: Tensor) -> Tensor:
        """Scores (N,) of the reading's one output."""
        return outputs[..., 0]
