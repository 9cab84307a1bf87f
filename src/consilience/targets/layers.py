"""What a layer says: one unit of it, all of them, or how near their means come to a
reference.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from consilience.data import read_image
from consilience.models.network import TorchNetwork
from consilience.models.readouts import (
    CosineReading,
    LayerReading,
    Readout,
    form_of_layer,
    reading_of,
    with_readout,
)
from consilience.models.tasks import is_detector
from consilience.registry import option
from consilience.targets import ReadElsewhere, network_of, targets
from consilience.targets.places import (
    Corners,
    GridPlace,
    file_digest,
    read_array,
    same_file,
)
from consilience.types import ConsilienceError, Model, NotApplicable, Sample, View


def layer_reading(
    model: TorchNetwork, view: View, layer: str, place: GridPlace
) -> LayerReading:
    """The means of a layer's units over a place."""
    form = form_of_layer(model, layer)
    if place.words and form.grid is None:
        raise ConsilienceError(
            f"layer {layer!r} of {model.id} is a vector: it has no place {place.words}"
        )
    if place.words and place.at is None and is_detector(model):
        raise NotApplicable(code="detector-places", model=model.name, layer=layer)
    return LayerReading(
        layer,
        form,
        place.weights(form.grid, view.geometry) if form.grid else None,
        reading_of(model),
    )


class _Placed(ReadElsewhere):
    """A layer, over its whole map or at one place of it; fields are those of the
    targets below.
    """

    layer: str
    at: tuple[int, int] | None
    box: Corners | None
    mask: str
    digest: str
    index: ClassVar[None] = None
    score: ClassVar[str] = "value"

    @property
    def place(self) -> GridPlace:
        """Where on its grid."""
        return GridPlace(self.at, self.box, self.mask)

    def check(self, model: Model) -> None:
        """The layer is there."""
        self.place.check()
        form_of_layer(network_of(model, self), self.layer)

    def resolved(self, model: Model, sample: Sample, outputs: Tensor) -> Self:
        """Checked, with the digest of its mask."""
        self.check(model)
        return replace(self, digest=same_file(self.mask, self.digest))  # type: ignore[type-var]

    def reading(self, model: TorchNetwork, view: View) -> Readout:
        """Every unit's mean; the unit is picked by `pick`."""
        return layer_reading(model, view, self.layer, self.place)


@targets.register("unit")
@dataclass(frozen=True)
class UnitTarget(_Placed):
    """A unit of a layer: its mean over the map, or at one place.

    ``at`` is row and column of a cell, ``box`` four edges in pixels of the image,
    ``mask`` a file of the image's size; cells count by how much of them lies inside. Of
    a vector it is the number itself. Class and register tokens are not part of a map.
    """

    layer: str = option(MISSING, help="the layer")
    unit: int = option(MISSING, help="number of the unit (channel), from 0", least=0)
    at: tuple[int, int] | None = option(
        None, help="row + column of one cell of the layer's grid"
    )
    box: Corners | None = option(
        None, help="x0 + y0 + x1 + y1 in pixels of the image"
    )
    mask: str = option(
        "", help="file of a mask of the image's size (.npy, or an image)"
    )
    digest: str = option("", help="of the mask's file; found")

    @property
    def name(self) -> str:
        """Layer, unit, place."""
        return f"{self.layer} unit {self.unit}{self.place.suffix}"

    def check(self, model: Model) -> None:
        """Layer and unit are there."""
        self.place.check()
        count = form_of_layer(network_of(model, self), self.layer).channels
        if not 0 <= self.unit < count:
            raise ConsilienceError(
                f"{self.layer!r} of {model.id} has units 0 to {count - 1}; got {self.unit}"
            )

    def pick(self, outputs: Tensor) -> Tensor:
        """The unit's (N,) of all units' means (N, C)."""
        return outputs[..., self.unit]


@targets.register("layer")
@dataclass(frozen=True)
class WholeLayer(_Placed):
    """A layer's mean over all its units, over the map or at one place (as in `Unit`)."""

    layer: str = option(MISSING, help="the layer")
    at: tuple[int, int] | None = option(
        None, help="row + column of one cell of the layer's grid"
    )
    box: Corners | None = option(
        None, help="x0 + y0 + x1 + y1 in pixels of the image"
    )
    mask: str = option(
        "", help="file of a mask of the image's size (.npy, or an image)"
    )
    digest: str = option("", help="of the mask's file; found")

    @property
    def name(self) -> str:
        """Layer and place."""
        return f"{self.layer}{self.place.suffix}"

    def pick(self, outputs: Tensor) -> Tensor:
        """Means (N,) of all units' means (N, C)."""
        return outputs.mean(dim=-1)


# ---- an embedding


@targets.register("cosine")
@dataclass(frozen=True)
class CosineTarget(ReadElsewhere):
    """The cosine of the image's embedding to a reference: another image's embedding, or
    a vector in a .npy file.

    The embedding is a ``layer``'s mean over its map, or a vector as it is; ``outputs``
    is what the model returns, and what ``auto`` takes where those are not class scores (a
    network without a classifier); else ``auto`` is the layer a CAM looks at. The
    reference image is shown in the same view as the image.
    """

    reference: str = option(MISSING, help="an image, or a .npy file with a vector")
    layer: str = option(
        "auto", help="where the embedding is read; outputs: what the model returns"
    )
    digest: str = option("", help="of the reference's file; found")
    index: ClassVar[None] = None
    score: ClassVar[str] = "value"

    @property
    def name(self) -> str:
        """Reference and layer."""
        return f"cosine to {self.reference} at {self.layer}"

    def check(self, model: Model) -> None:
        """Layer and reference are there."""
        network = network_of(model, self)
        file_digest(self.reference)
        if self.layer not in ("auto", "outputs"):
            form_of_layer(network, self.layer)

    def resolved(self, model: Model, sample: Sample, outputs: Tensor) -> CosineTarget:
        """With ``auto`` settled and the digest of the reference."""
        self.check(model)
        auto = (
            "outputs"
            if model.outputs == "values"
            else network_of(model, self).target_layer()
        )
        layer = auto if self.layer == "auto" else self.layer
        return replace(
            self, layer=layer, digest=same_file(self.reference, self.digest)
        )

    def reading(self, model: TorchNetwork, view: View) -> Readout:
        """The cosine to the reference, as it is in its file now: the one that was
        resolved, or an error.
        """
        same_file(self.reference, self.digest)
        base: Readout = reading_of(model)
        if self.layer != "outputs":
            base = LayerReading(
                self.layer, form_of_layer(model, self.layer), None, base
            )
        return CosineReading(base, self._vector(model, view, base))

    def _vector(self, model: TorchNetwork, view: View, base: Readout) -> Tensor:
        """The reference's embedding (C,)."""
        if Path(self.reference).suffix == ".npy":
            vector = torch.from_numpy(
                read_array(Path(self.reference)).astype(np.float32)
            ).flatten()
        else:
            other = model.view(read_image(self.reference), view.mode)
            with torch.no_grad():
                vector = (
                    with_readout(model, base).logits(other.pixels)[0].detach().cpu()
                )
        size = (
            form_of_layer(model, self.layer).channels
            if self.layer != "outputs"
            else model.anatomy.outputs
        )
        if len(vector) != size:
            raise ConsilienceError(
                f"{self.reference!r} has {len(vector)} numbers; the embedding at {self.layer} "
                f"has {size}"
            )
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise NotApplicable(code="no-direction", reference=self.reference)
        return vector

    def pick(self, outputs: Tensor) -> Tensor:
        """Cosines (N,) of the reading's one output."""
        return outputs[..., 0]
