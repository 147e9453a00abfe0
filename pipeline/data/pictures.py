"""Masks and overlays as files that a person can look at."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.config import ClassConfig
from pipeline.data.preprocessing import Pixels


def palette(classes: Sequence[ClassConfig], void: int | None = None) -> Pixels:
    """Colours by class id, uint8 (256, 3); void and unused ids are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = [c.colour for c in classes]
    if void is not None:
        table[void] = 0
    return table


def mask_png(mask: Pixels, colours: Pixels) -> bytes:
    """A label map as palette PNG: pixel values are class ids, shown in the classes' colours."""
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    return _encoded(image)


def overlay_png(image: Pixels, mask: Pixels, colours: Pixels, channels: str, strength: float = 0.5) -> bytes:
    """The image, uint8 (H, W, C), with the mask's colours blended over it."""
    return _encoded(Image.fromarray(blend(as_rgb(image, channels), colours[mask], strength)))


def as_rgb(image: Pixels, channels: str) -> Pixels:
    """A grey, rgb or bgr image as uint8 (H, W, 3) in RGB order."""
    if channels == "bgr":
        return image[..., ::-1]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def blend(image: Pixels, colour: Pixels, strength: float) -> Pixels:
    """``strength`` parts of the colour over the image, both uint8 (H, W, 3)."""
    return (image * (1 - strength) + colour * strength).round().astype(np.uint8)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
