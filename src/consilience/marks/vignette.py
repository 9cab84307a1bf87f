"""A vignette: corners that get dark, as through a dermatoscope or a cheap lens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.marks.painting import Painted, replaced, scattered_change
from consilience.registry import marks, option


@marks.register("vignette")
@dataclass(frozen=True)
class VignetteMark:
    """Brightness that falls with the square of the distance from the middle. Controls:
    its changes scattered over the frame, and the whole image darker by the same share.
    """

    strength: float = option(
        0.7, help="how much is gone in the corners", above=0, most=1
    )

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "strength": (0.15, 0.35, 0.7, 1.0)
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The vignette and its controls."""
        height, width = images.shape[-2:]
        y = torch.linspace(-1, 1, height).to(images)[:, None]
        x = torch.linspace(-1, 1, width).to(images)[None, :]
        light = 1 - self.strength * (x**2 + y**2) / 2
        changed = images * light
        controls = {
            "scattered": scattered_change(images, changed, seed),
            "flat": images * light.mean(),
        }
        made = replaced(images, changed, controls)
        return Painted(made.marked, made.controls, (1 - light).cpu().numpy())
