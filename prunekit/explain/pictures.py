"""Images of samples: small, with a caption, as values of JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from prunekit.explain.passages import Passage

LARGEST = 128  # pixels of an image's longer side that are kept: twice what a page shows of it, for fine screens


class Picture(TypedDict):
    """An image as a PNG file in base64, and how many pixels its longer side has."""

    caption: str
    png: str
    side: int


Pictures = Mapping[str, Sequence[Picture | Passage]]
"""Pictures by their place in an explanation: ``sample``, ``raised``, ``lowered``, ``changes``, ``unit 0`` …"""


def picture(caption: str, image: Tensor) -> Picture:
    """An image ``(channels, height, width)`` with 1 or 3 channels, from its own darkest to its own lightest value."""
    from PIL import Image  # matplotlib needs it too

    pixels = image.detach().cpu().double()
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    grey = (255 * pixels.nan_to_num(1.0)).round().to(torch.uint8)  # an image with NaN in it is white
    drawn = Image.fromarray((grey[0] if len(grey) == 1 else grey.movedim(0, 2)).contiguous().numpy())
    drawn.thumbnail((LARGEST, LARGEST))  # larger ones only: dozens of photographs would make a page too large to open
    buffer = io.BytesIO()
    drawn.save(buffer, format="png")
    return {"caption": caption, "png": base64.b64encode(buffer.getvalue()).decode(), "side": max(drawn.size)}
