"""Errors of a model's output values, streaming: cosine, quantiles, values that are not finite; margins of classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Values, and pixels with a value a class, computed at a time. Smaller ones would fit into a core's own cache, but two
# threads then spend more time on handing Python's lock to each other.
BLOCK, PIXELS = 1 << 17, 1 << 15
# Values of one array that enter the quantiles, evenly spaced; all of them where there are fewer.
SAMPLES = 1 << 17
# Bits of a float32 without its last 16: 15 bits without the sign, neighbours at most 1/128 apart.
CUT, BINS = 16, 1 << 15
# Values of one call of BLAS: from 10000 on it may use threads, and the last bits of a sum depend on how many.
PIECE = 1 << 13

# Bins of the quantiles, and how many values each holds.
Filled = tuple[NDArray[np.intp], NDArray[np.intp]]


class Quantiles:
    """Quantiles of any number of values ≥ 0 in 256 kB: counts by exponent and leading bits, so within 1/128 above."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: Floats) -> None:
        """Count values, float32 of any shape, each at least 0 (or NaN, which is above all)."""
        self.count(self.filled(values))

    @staticmethod
    def filled(values: Floats) -> Filled:
        """Which bins values fall into, and how many into each: what ``count`` takes."""
        magnitudes = np.abs(np.ascontiguousarray(values)).view(np.uint32).ravel()
        counts = np.bincount(magnitudes >> CUT)
        places = np.flatnonzero(counts)
        return places, counts[places]

    def count(self, filled: Filled) -> None:
        places, counts = filled
        self.counts[places] += counts

    def at(self, share: float) -> float:
        """The smallest value, rounded up to the counting's grid, that ``share`` of the values keep to; NaN of none."""
        total = int(self.counts.sum())
        if not total:
            return float("nan")
        place = int(np.searchsorted(np.cumsum(self.counts), max(share * total, 1)))
        upper = np.array([place + 1 if place else 0], np.uint32) << np.uint32(CUT)
        return float(upper.view(np.float32)[0])


@dataclass(frozen=True)
class ImageErrors:
    """One image's output against the reference's.

    Attributes:
        max_abs: largest difference; NaN or infinite where a value is.
        cosine: of the two as vectors; NaN where one is all zeros or not finite.
        not_finite, reference_not_finite: how many values of either are NaN or infinite.
        low, high: the reference's smallest and largest value.
    """

    max_abs: float
    cosine: float
    not_finite: int
    reference_not_finite: int
    low: float
    high: float


@dataclass(frozen=True)
class ImageSums:
    """What one image adds to a tally: its errors, their sums, and which bins of the quantiles they fall into."""

    errors: ImageErrors
    absolute: float
    squared: float
    dot: float
    ours: float
    theirs: float
    count: int
    filled: Filled


class OutputTally:
    """One output over all images; memory does not grow with them.

    The sums are floating-point: equal images counted in an equal order give equal figures to the last bit, wherever
    each was measured.
    """

    def __init__(self) -> None:
        self.quantiles = Quantiles()
        self.max_abs = self.absolute = self.squared = 0.0
        self.dot = self.ours = self.theirs = 0.0
        self.count = 0

    def add(self, got: NDArray[Any], wanted: NDArray[Any]) -> ImageErrors:
        """Measure one image and count it."""
        sums = measure(got, wanted)
        self.count_in(sums)
        return sums.errors

    def count_in(self, sums: ImageSums) -> None:
        """Count what was measured of one image."""
        self.quantiles.count(sums.filled)
        self.max_abs = float(np.maximum(self.max_abs, sums.errors.max_abs))
        self.absolute, self.squared = self.absolute + sums.absolute, self.squared + sums.squared
        self.dot, self.ours, self.theirs = self.dot + sums.dot, self.ours + sums.ours, self.theirs + sums.theirs
        self.count += sums.count

    @property
    def mean_abs(self) -> float:
        return self.absolute / self.count if self.count else float("nan")

    @property
    def cosine(self) -> float:
        return _cosine(self.dot, self.ours, self.theirs)

    @property
    def signal_to_error_db(self) -> float:
        """Energy of the reference over that of the error, in decibels; infinite where there is no error."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(10 * np.log10(np.float64(self.theirs) / np.float64(self.squared)))


def measure(got: NDArray[Any], wanted: NDArray[Any]) -> ImageSums:
    """One image: arrays of equal shape, any number type, compared in float32."""
    # An odd step meets every column of an image whose width is a power of two.
    step = -(-got.size // SAMPLES) | 1
    sums, largest, low, high = np.zeros(4), 0.0, np.inf, -np.inf
    ones, space = np.ones(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sampled = np.empty(-(-got.size // step), np.float32)
    filled = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for start, ours, theirs in _blocks(got, wanted):
            error = np.subtract(ours, theirs, out=space[: ours.size])
            energies = _dot(error, error), _dot(theirs, error), _dot(theirs, theirs)
            np.abs(error, out=error)
            sums += (_dot(error, ones[: error.size]), *energies)
            largest = float(np.maximum(largest, error.max()))
            low, high = min(low, float(theirs.min())), max(high, float(theirs.max()))
            some = error[-start % step :: step]
            sampled[filled : filled + some.size] = some
            filled += some.size
    absolute, squared, along, signal = (float(value) for value in sums)
    # ours = theirs + error
    dot, energy = signal + along, signal + 2 * along + squared
    # A difference is finite where both values are, except for values near float32's end.
    bad = [0, 0] if np.isfinite(largest) else [int((~np.isfinite(side)).sum()) for side in (got, wanted)]
    errors = ImageErrors(largest, _cosine(dot, energy, signal), bad[0], bad[1], low, high)
    return ImageSums(errors, absolute, squared, dot, energy, signal, got.size, Quantiles.filled(sampled))


def strongest_class(scores: NDArray[np.floating]) -> NDArray[np.integer]:
    """Class of the largest score, the smaller of equal ones: (H, W) from (classes, H, W), as ``argmax(0)``.

    numpy's own goes pixel by pixel through memory; this goes class by class: uint8 up to 255 classes.
    """
    classes = len(scores)
    if classes > np.iinfo(np.uint8).max or not classes:
        return np.asarray(scores.argmax(0))
    flat = scores.reshape(classes, -1)
    best = np.empty(flat.shape[1], np.uint8)
    for start in range(0, best.size, PIXELS):
        best[start : start + PIXELS] = _first_maximum(flat[:, start : start + PIXELS])
    return best.reshape(scores.shape[1:])


def margins(scores: NDArray[np.floating], where: NDArray[np.bool_]) -> Floats:
    """Largest score minus the second, float32 (n,), at the n pixels that ``where`` (H, W) marks of (classes, H, W)."""
    chosen = scores.reshape(len(scores), -1)[:, np.flatnonzero(where)].astype(np.float32)
    first = np.full(chosen.shape[1], -np.inf, np.float32)
    second = first.copy()
    for one in chosen:
        np.maximum(second, np.minimum(first, one), out=second)
        np.maximum(first, one, out=first)
    with np.errstate(invalid="ignore"):
        return first - second


def _blocks(got: NDArray[Any], wanted: NDArray[Any]) -> Iterator[tuple[int, Floats, Floats]]:
    ours, theirs = np.ascontiguousarray(got).ravel(), np.ascontiguousarray(wanted).ravel()
    for start in range(0, ours.size, BLOCK):
        end = start + BLOCK
        yield start, ours[start:end].astype(np.float32, copy=False), theirs[start:end].astype(np.float32, copy=False)


def _dot(a: Floats, b: Floats) -> float:
    return sum(float(np.dot(a[start : start + PIECE], b[start : start + PIECE])) for start in range(0, a.size, PIECE))


def _cosine(dot: float, ours: float, theirs: float) -> float:
    norm = (ours * theirs) ** 0.5
    return min(dot / norm, 1.0) if norm > 0 and np.isfinite(norm) else float("nan")


def _first_maximum(block: NDArray[np.floating]) -> NDArray[np.uint8]:
    """``block.argmax(0)`` of (classes, n): each class leaves its rank, counted from the end, where it is largest."""
    ranks = np.arange(len(block), 0, -1, dtype=np.uint8)[:, np.newaxis]
    equal = (block == block.max(0)).view(np.uint8)
    rank = np.multiply(equal, ranks, out=equal).max(0)
    best: NDArray[np.uint8] = np.uint8(len(block)) - rank
    odd = rank == 0  # NaN equals nothing
    if odd.any():
        best[odd] = block[:, odd].argmax(0)
    return best
