"""Masks and overlays as files that a person can look at."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import ClassConfig
from pipeline.data.preprocessing import Pixels

# Of PNG files. With zlib's default, 6, overlays take the same space and four times as long.
COMPRESSION = 1
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of a PNG file: colour types, and filters of rows.
GREY, RGB, PALETTE = 0, 2, 3
NONE, SUB = 0, 1
# Blended and compressed at a time.
PIXELS = 1 << 20
# Of so many, comparing a mask of so many pixels with each takes a fraction of the time of a histogram.
FEW_CLASSES = 16


def palette(classes: Sequence[ClassConfig], void: int | None = None) -> Pixels:
    """Colours by class id, uint8 (256, 3); void and unused ids are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = [c.colour for c in classes]
    if void is not None:
        table[void] = 0
    return table


def label_counts(mask: Pixels, classes: int) -> list[int]:
    """Pixels of each class id below ``classes``, at most 256, in a label map."""
    if classes > FEW_CLASSES or mask.size > PIXELS:
        return Image.fromarray(mask).histogram()[:classes]
    return [int(np.count_nonzero(mask == one)) for one in range(classes)]


def mask_png(mask: Pixels, colours: Pixels) -> bytes:
    """A label map as palette PNG: pixel values are class ids, shown in the classes' colours."""
    return _png(mask[..., np.newaxis], colours)


def overlay_png(image: Pixels, mask: Pixels, colours: Pixels, channels: str, strength: float = 0.5) -> bytes:
    """The image, uint8 (H, W, C), with ``strength`` parts of the mask's colours blended over it."""
    shown = colours[: int(mask.max()) + 1, np.newaxis]
    # Of every class and value of the image, uint8 (classes × 256, 3).
    table = (np.arange(256)[:, np.newaxis] * (1 - strength) + shown * strength).round().astype(np.uint8).reshape(-1, 3)
    blended = np.empty((*mask.shape, 3), np.uint8)
    rows = max(1, PIXELS // mask.shape[1])
    for top in range(0, len(mask), rows):
        some = slice(top, top + rows)
        first, values = mask[some].astype(np.uint16) << 8, as_rgb(image[some], channels)
        for channel in range(3):
            blended[some, :, channel] = np.take(table[:, channel], first | values[..., channel])
    return _png(blended)


def as_rgb(image: Pixels, channels: str) -> Pixels:
    """A grey, rgb or bgr image as uint8 (H, W, 3) in RGB order; a view."""
    if channels == "bgr":
        return image[..., ::-1]
    return np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[2] == 1 else image


def probability_png(plane: NDArray[np.float32]) -> bytes:
    """Probabilities of one class, float32 (H, W), as 16-bit grey PNG: 65535 is 1."""
    return _png((plane * np.float32(65535)).round().astype(">u2")[..., np.newaxis].view(np.uint8))


def _png(pixels: Pixels, colours: Pixels | None = None) -> bytes:
    """A PNG file, by its specification (W3C, 2003).

    Pillow tries five filters on every row, which takes overlays twice as long for 1 % less space. Label maps are
    compressed as runs: in half the time of zlib's search, and three quarters of its fast levels' space.

    Args:
        pixels: uint8 (H, W, bytes of a pixel): a grey value of 2 bytes, the upper one first, RGB, or class ids.
        colours: of class ids, uint8 (256, 3).
    """
    height, width, size = pixels.shape
    kind = PALETTE if colours is not None else RGB if size == 3 else GREY
    how = NONE if kind == PALETTE else SUB
    header = struct.pack(">2I5B", width, height, 16 if kind == GREY else 8, kind, 0, 0, 0)
    parts = [SIGNATURE, *_chunk(b"IHDR", header)]
    if colours is not None:
        parts += _chunk(b"PLTE", colours.tobytes())
    strategy = zlib.Z_RLE if kind == PALETTE else zlib.Z_DEFAULT_STRATEGY
    compressor = zlib.compressobj(COMPRESSION, strategy=strategy)
    rows = max(1, PIXELS // width)
    for top in range(0, height, rows):
        band = pixels[top : top + rows]
        flat = band.reshape(len(band), width * size)
        filtered = np.empty((len(band), 1 + width * size), np.uint8)
        filtered[:, 0] = how
        filtered[:, 1:] = flat
        if how == SUB:
            filtered[:, 1 + size :] -= flat[:, :-size]
        parts += _chunk(b"IDAT", compressor.compress(filtered.data))
    return b"".join([*parts, *_chunk(b"IDAT", compressor.flush()), *_chunk(b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    return struct.pack(">I", len(data)) + name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))
