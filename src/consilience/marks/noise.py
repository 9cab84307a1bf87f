"""Noise of a sensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience import images as resampling
from consilience.marks.painting import Painted, replaced
from consilience.registry import marks, option


@marks.register("noise")
@dataclass(frozen=True)
class NoiseMark:
    """Normal noise, independent by pixel and channel. Scattered it would be noise
    again: its control is noise of the same strength in blotches.
    """

    sigma: float = option(0.12, help="standard deviation, of 1", above=0, most=1)

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "sigma": (0.02, 0.05, 0.12, 0.25)
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The noise and its control."""
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(images.shape, generator=source).to(images)
        coarse = [max(1, side // 8) for side in images.shape[-2:]]
        small = torch.randn((*images.shape[:2], *coarse), generator=source).to(images)
        blotches = resampling.enlarge(
            small, (images.shape[-2], images.shape[-1]), False
        )
        blotches = blotches / blotches.std(dim=(1, 2, 3), keepdim=True)
        return replaced(
            images,
            images + self.sigma * noise,
            {"blotches": images + self.sigma * blotches},
        )
