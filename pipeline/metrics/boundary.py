"""Boundary F-score: do the outlines of two masks run along each other?

The boundary of a class is that of its binary mask as in DAVIS (Perazzi et al., "A Benchmark Dataset and Evaluation
Methodology for Video Object Segmentation", CVPR 2016; ``seg2bmap``): a pixel whose right, lower or lower right
neighbour is on the other side. A boundary pixel is found when the other mask has a boundary pixel of that class within
the tolerance, Euclidean; the tolerance is a share of the image's diagonal, rounded up (0.0075: Csurka et al., "What is
a good evaluation measure for semantic segmentation?", BMVC 2013). Precision is the share of the prediction's boundary
pixels that the reference has, recall the reverse, F their harmonic mean. F is counted per class and image; a class's
figure is the mean over the images in which either mask has a boundary of it.

Void: boundary pixels whose own, right, lower or lower right pixel is void are not counted on either side. They may be
found nevertheless, for the true outline lies somewhere in the void.

All classes are computed at once: each pixel holds a word with one bit a class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.segmentation import Counts, Figures

Words = NDArray[np.unsignedinteger]
WORD_BITS = (8, 16, 32, 64)
EVERY_ID = 256


@dataclass(frozen=True)
class Outlines:
    """Boundaries of all classes of one mask, in groups of at most 64 classes.

    Attributes:
        classes: how many there are.
        places: per group, flat positions of the pixels on any boundary.
        words: per group, the classes whose boundaries they are on, one bit each.
        totals: boundary pixels of each class, int64 (classes,).
        near: per group, flat over all pixels, the classes with a boundary within the tolerance.
    """

    classes: int
    places: tuple[NDArray[np.intp], ...]
    words: tuple[Words, ...]
    totals: Counts
    near: tuple[Words, ...]


def tolerance_pixels(height: int, width: int, share: float) -> int:
    """The distance, in pixels, that ``share`` of the diagonal allows, rounded up."""
    return math.ceil(share * math.hypot(height, width))


def outlines(mask: NDArray[np.uint8], classes: int, tolerance: int) -> Outlines:
    """The boundaries of a mask.

    Args:
        mask: class ids, uint8 (H, W); ids from ``classes`` on belong to no class.
        tolerance: of the distance test, in pixels.
    """
    places, words, totals, near = [], [], [], []
    for first, count in _groups(classes):
        edges = _edges(_words(mask, first, count))
        flat = edges.ravel()
        places.append(np.flatnonzero(flat != 0))
        words.append(flat[places[-1]])
        totals.append(_bits(words[-1], count))
        near.append(_dilated(edges, tolerance).ravel())
    return Outlines(classes, tuple(places), tuple(words), np.concatenate(totals), tuple(near))


def beside(void: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Flat over all pixels: those whose own, right, lower or lower right pixel is void, from bool (H, W)."""
    near = void.copy()
    near[:, :-1] |= void[:, 1:]
    near[:-1] |= void[1:]
    near[:-1, :-1] |= void[1:, 1:]
    return near.ravel()


def match(reference: Outlines, prediction: Outlines, ignored: NDArray[np.bool_] | None = None) -> Counts:
    """Boundary pixels: found and all of the reference, found and all of the prediction; int64 (4, classes).

    Args:
        ignored: flat over all pixels; these are not counted.
    """
    return np.stack([*_found(reference, prediction, ignored), *_found(prediction, reference, ignored)])


def f_score(matches: Counts) -> Figures:
    """F, 0…1, (classes,) from ``match``; NaN where neither mask has a boundary, 0 where one alone has."""
    found, reference, hits, prediction = matches.astype(np.float64)
    recall = found / np.maximum(reference, 1)
    precision = hits / np.maximum(prediction, 1)
    f = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return np.where(reference + prediction > 0, f, np.nan)


def _words(mask: NDArray[np.uint8], first: int, count: int) -> Words:
    """A word a pixel with the bit of its class; 0 where that is not one of ``count`` classes from ``first`` on."""
    bits = next(bits for bits in WORD_BITS if count <= bits)
    table = np.zeros(EVERY_ID, np.dtype(f"uint{bits}"))
    table[first : first + count] = np.left_shift(np.ones(1, table.dtype), np.arange(count, dtype=table.dtype))
    return np.take(table, mask, mode="clip")  # ids of a byte are all in the table: nothing is clipped, or checked


def _edges(words: Words) -> Words:
    edges = np.zeros_like(words)
    edges[:, :-1] |= words[:, :-1] ^ words[:, 1:]
    edges[:-1] |= words[:-1] ^ words[1:]
    edges[:-1, :-1] |= words[:-1, :-1] ^ words[1:, 1:]
    return edges


def _dilated(words: Words, radius: int) -> Words:
    """Every bit spread over a disc: rows of the disc, of growing width, are laid above and below."""
    result, row, half = words.copy(), words, 0
    for distance in range(min(radius, words.shape[0]), -1, -1):
        row, half = _widened(row, half, math.isqrt(radius * radius - distance * distance))
        if distance == 0:
            result |= row
        else:
            result[distance:] |= row[:-distance]
            result[:-distance] |= row[distance:]
    return result


def _widened(row: Words, half: int, wanted: int) -> tuple[Words, int]:
    """Bits spread by ``wanted`` pixels to both sides, from bits spread by ``half``."""
    wanted = min(wanted, row.shape[1])
    while half < wanted:
        # At the border a run is cut to half+1 pixels, which leave no gap when they move by as much.
        step = min(wanted - half, half + 1)
        wider = row.copy()
        wider[:, step:] |= row[:, :-step]
        wider[:, :-step] |= row[:, step:]
        row, half = wider, half + step
    return row, half


def _found(ours: Outlines, theirs: Outlines, ignored: NDArray[np.bool_] | None) -> tuple[Counts, Counts]:
    """Per class, our boundary pixels that they have nearby, and all of ours."""
    found, total = [], []
    groups = _groups(ours.classes)
    for (_, count), places, words, near in zip(groups, ours.places, ours.words, theirs.near, strict=True):
        if ignored is not None:
            counted = ~ignored[places]
            places, words = places[counted], words[counted]
            total.append(_bits(words, count))
        found.append(_bits(words & near[places], count))
    return np.concatenate(found), np.concatenate(total) if total else ours.totals


def _groups(classes: int) -> list[tuple[int, int]]:
    """First class and number of classes of each group that shares a word."""
    return [(first, min(classes - first, WORD_BITS[-1])) for first in range(0, classes, WORD_BITS[-1])]


def _bits(words: Words, count: int) -> Counts:
    """How many words hold each of the lowest ``count`` bits."""
    kind = words.dtype.type
    return np.array([np.count_nonzero(words & (kind(1) << kind(bit))) for bit in range(count)], np.int64)
