"""Large images as overlapping tiles: where they lie, and how much each one's scores count at every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tiles start at multiples of it, so that pooling meets the same pixels in them as in the whole image.
ALIGNMENT = 32
DEFAULT_OVERLAP = 128
# Of an overlap: the outer part that does not count, where the network sees zeros instead of its neighbours, and the
# part over which one tile gives way to the other.
MARGIN, RAMP = 3 / 8, 1 / 4
# What an outermost pixel counts nevertheless, so that no pixel is left without a tile.
LEAST = 1e-6


@dataclass(frozen=True)
class Span:
    """One tile along one axis.

    Attributes:
        start, stop: pixels of the image that it covers; fewer than a tile at the image's end.
        weights: float32 (stop - start,); those of all tiles add up to 1 at every pixel.
        first, last: the pixels among them that no other tile counts more for; every pixel of the image is one tile's.
    """

    start: int
    stop: int
    weights: NDArray[np.float32]
    first: int
    last: int


def spans(size: int, tile: int, overlap: int | None = None) -> list[Span]:
    """Tiles of at most ``tile`` pixels over an axis of ``size`` pixels, evenly spread, in order.

    Args:
        overlap: pixels that neighbours share at least; default: 128, or a quarter of a smaller tile.

    Raises:
        ValueError: the overlap is negative or not smaller than the tile.
    """
    if overlap is None:
        overlap = min(DEFAULT_OVERLAP, tile // 4)
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} pixels does not fit tiles of {tile}")
    if size <= tile:
        return [Span(0, size, np.ones(size, np.float32), 0, size)]
    aligned = min(ALIGNMENT, 1 << (max(1, tile // 4).bit_length() - 1))
    stride = max(aligned, (tile - overlap) // aligned * aligned)
    way = -(-(size - tile) // aligned)  # of the last tile, in units of the alignment
    count = math.ceil(way * aligned / stride) + 1
    starts = [index * way // (count - 1) * aligned for index in range(count)]
    stops = [min(start + tile, size) for start in starts]
    windows = []
    total = np.zeros(size, np.float32)
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        windows.append(_window(stop - start, overlap, index == 0, index == count - 1))
        total[start:stop] += windows[-1]
    cuts = [0, *((stop + start) // 2 for stop, start in zip(stops, starts[1:], strict=False)), size]
    return [
        Span(start, stop, windows[index] / total[start:stop], cuts[index], cuts[index + 1])
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def padded(patch: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An image, (H, W, C), continued to the right and below by its reflection up to a height and width."""
    missing = height - patch.shape[0], width - patch.shape[1]
    if missing == (0, 0):
        return patch
    return np.pad(patch, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")


def _window(length: int, overlap: int, is_first: bool, is_last: bool) -> NDArray[np.float32]:
    """How much a tile counts by the distance from those of its ends that are not the image's."""
    inner = np.arange(length) + 0.5
    weights: NDArray[np.float64] = np.ones(length)
    for open_end, distance in ((not is_first, inner), (not is_last, length - inner)):
        if open_end and overlap:
            weights = np.minimum(weights, np.clip((distance - MARGIN * overlap) / (RAMP * overlap), LEAST, 1))
    return weights.astype(np.float32)
