"""JPEG blocks: the image saved at a low quality and read again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from consilience.marks.painting import Painted, replaced, scattered_change
from consilience.registry import marks, option
from consilience.types import ConsilienceError


@marks.register("jpeg")
@dataclass(frozen=True)
class JpegMark:
    """The image as JPEG of a low quality. Control: its changes scattered over the frame."""

    quality: int = option(8, help="1 to 95", least=1, most=95)

    doses: ClassVar[Mapping[str, tuple[object, ...]]] = {"quality": (50, 25, 12, 5)}

    def paint(self, images: Tensor, seed: int) -> Painted:
        """The blocks and their control; raises `ConsilienceError` for images of other
        than one or three channels.
        """
        if images.shape[1] not in (1, 3):
            raise ConsilienceError(
                f"JPEG has one or three channels; this network sees {images.shape[1]}"
            )
        changed = torch.stack([self._saved(image) for image in images])
        controls = {"scattered": scattered_change(images, changed, seed)}
        return replaced(images, changed, controls)

    def _saved(self, image: Tensor) -> Tensor:
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        content = io.BytesIO()
        grey = pixels.shape[2] == 1
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(
            content, "JPEG", quality=self.quality
        )
        found = np.asarray(Image.open(content), np.float32) / 255
        shaped = found[None] if grey else found.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(shaped)).to(image)
