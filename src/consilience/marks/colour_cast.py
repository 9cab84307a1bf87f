"""A colour cast: the whole image tinted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.marks.painting import Painted, replaced, rgb
from consilience.registry import marks, option
from consilience.types import ConsilienceError


@marks.register("cast")
@dataclass(frozen=True)
class CastMark:
    """The image mixed with one colour. It has no shape to scatter: its controls are the
    same mix with that colour's channels exchanged, and with grey.
    """

    colour: str = option("#e8a050", help="a name or #rrggbb")
    strength: float = option(0.25, help="share of the colour", above=0, most=1)

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "strength": (0.05, 0.12, 0.25, 0.5)
    }

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The tint and its controls; raises `ConsilienceError` for images without colour."""
        if images.shape[1] != 3:
            raise ConsilienceError(
                f"a cast has a colour; this network sees images of {images.shape[1]} channels"
            )
        tint = torch.tensor(rgb(self.colour)).to(images).reshape(1, 3, 1, 1) / 255
        mixes = {
            "channels exchanged": tint.roll(1, 1),
            "channels exchanged again": tint.roll(2, 1),
            "grey": tint.mean(1, keepdim=True).expand_as(tint),
        }
        return replaced(
            images,
            torch.lerp(images, tint, self.strength),
            {
                name: torch.lerp(images, one, self.strength)
                for name, one in mixes.items()
            },
        )
