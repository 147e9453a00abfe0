"""Masks and overlays as files that a person can look at."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import ClassConfig
from pipeline.data.preprocessing import Pixels

# Of PNG files. With the default, 6, masks take two thirds of the space, overlays the same, and both four times as long.
COMPRESSION = 2
# Blended at a time.
PIXELS = 1 << 20


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
    blended = np.empty((*mask.shape, 3), np.uint8)
    rows = max(1, PIXELS // mask.shape[1])
    for top in range(0, len(mask), rows):
        some = slice(top, top + rows)
        blended[some] = blend(as_rgb(image[some], channels), colours[mask[some]], strength)
    return _encoded(Image.fromarray(blended))


def as_rgb(image: Pixels, channels: str) -> Pixels:
    """A grey, rgb or bgr image as uint8 (H, W, 3) in RGB order."""
    if channels == "bgr":
        return image[..., ::-1]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def blend(image: Pixels, colour: Pixels, strength: float) -> Pixels:
    """``strength`` parts of the colour over the image, both uint8 (H, W, 3)."""
    return (image * (1 - strength) + colour * strength).round().astype(np.uint8)


def probability_png(plane: NDArray[np.float32]) -> bytes:
    """Probabilities of one class, float32 (H, W), as 16-bit grey PNG: 65535 is 1."""
    return _encoded(Image.fromarray((plane * np.float32(65535)).round().astype(np.uint16)))


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=COMPRESSION)
    return buffer.getvalue()
