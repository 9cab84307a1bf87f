"""Blur: out of focus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from consilience import images as resampling
from consilience.marks.painting import Painted, replaced, scattered_change
from consilience.registry import marks, option


@marks.register("blur")
@dataclass(frozen=True)
class BlurMark:
    """The image blurred by a Gaussian. Control: its changes scattered over the frame."""

    sigma: float = option(
        0.015, help="of the Gaussian, share of the frame", above=0, most=1
    )

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "sigma": (0.004, 0.008, 0.015, 0.03)
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The blur and its control."""
        changed = resampling.blur(images, self.sigma * min(images.shape[-2:]))
        controls = {"scattered": scattered_change(images, changed, seed)}
        return replaced(images, changed, controls)
