"""Histograms of activations that grow with the data, in memory that does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CalibrationError

BINS = 16384
EXPONENT_OF_BINS = 14
# 1 / width must be a float32: no width below 2^-114.
SMALLEST_EXPONENT = -100
CHUNK = 65536


class Histogram:
    """Counts of one tensor's |value| in 16384 bins, which reach farther when a larger value comes.

    The bins always span the smallest power of two above the largest |value| seen; where that doubles, neighbouring bins
    merge. Scaling by a power of two is exact in floating point, so the counts are those that the final width would have
    given from the start: the same values give the same histogram, whatever their order.

    Attributes:
        tensor: whose values these are.
        counts: int64 (16384,); bin k holds values with ``k * width <= |value| < (k + 1) * width``.
        minimum, maximum: signed and exact; +inf and -inf before the first value.
    """

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.minimum, self.maximum = math.inf, -math.inf
        self._exponent = SMALLEST_EXPONENT

    @classmethod
    def of(cls, tensor: str, counts: NDArray[np.int64], exponent: int, minimum: float, maximum: float) -> Histogram:
        """One that was counted elsewhere, in bins that span 2**exponent, the least that ``add`` would have chosen."""
        histogram = cls(tensor)
        histogram.counts, histogram._exponent = counts, exponent
        histogram.minimum, histogram.maximum = minimum, maximum
        return histogram

    @property
    def amax(self) -> float:
        """Largest |value|, exact; 0.0 before the first value."""
        return max(-self.minimum, self.maximum, 0.0)

    @property
    def width(self) -> float:
        """Of one bin, in the tensor's unit."""
        return 2.0 ** (self._exponent - EXPONENT_OF_BINS)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def add(self, values: NDArray[Any], image: str = "") -> None:
        """Count a float array of any shape, rounded to float32.

        Args:
            values: of any float dtype.
            image: which one they come from, for the message.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        with np.errstate(over="ignore"):
            flat = values.reshape(-1).astype(np.float32, copy=False)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise not_finite(self.tensor, int(flat.size - np.isfinite(flat).sum()), flat.size, image)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._reach(math.frexp(self.amax)[1] if self.amax else SMALLEST_EXPONENT)
        factor = np.float32(1 / self.width)
        size = min(CHUNK, flat.size)
        buffers = np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.intp)
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            scaled, small, index = (buffer[: chunk.size] for buffer in buffers)
            np.multiply(chunk, factor, out=scaled)
            if low < 0:
                np.abs(scaled, out=scaled)
            # By way of int32: both casts are vectorised, which the one from float32 to int64 is not.
            np.copyto(small, scaled, casting="unsafe")
            np.copyto(index, small)
            counts = np.bincount(index)
            self.counts[: counts.size] += counts

    def merge(self, other: Histogram) -> None:
        """Count the values of another histogram too, as if each had been added."""
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self._reach(other._exponent)
        self.counts += _merged(other.counts, self._exponent - other._exponent)

    def resampled(self, bins: int) -> NDArray[np.float64]:
        """Counts of |value| in ``bins`` equal bins over [0, amax], float64 (bins,).

        A fine bin across a border is split in proportion, which keeps the total: assigning whole fine bins, of which a
        coarse bin holds 4 to 8, would make neighbours differ by up to a quarter and so shape the divergences.
        """
        below = self._below(np.linspace(0.0, self.amax / self.width, bins + 1, dtype=np.float64))
        below[0], below[-1] = 0, self.total
        return np.diff(below)

    def quantile(self, share: float) -> float:
        """The value that a share (0…1) of all |value| do not exceed, at most ``amax``; 0.0 before the first value.

        Exact to one bin's width: a value counts as evenly spread inside its bin, exact zeros too.
        """
        below = np.cumsum(self.counts)
        if below[-1] == 0 or share >= 1:
            return self.amax
        wanted = share * float(below[-1])
        index = int(np.searchsorted(below, wanted))
        before = float(below[index] - self.counts[index])
        return min((index + (wanted - before) / float(self.counts[index])) * self.width, self.amax)

    def share_above(self, amax: float) -> float:
        """Share of the values with |value| > amax, 0…1; exactly 0 from the largest on, else to one bin's counts."""
        if amax >= self.amax:
            return 0.0
        return 1 - float(self._below(np.array([amax / self.width]))[0]) / self.total

    def _below(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many |value| lie below each point (in bin widths), taking them as evenly spread inside a bin."""
        top = self.amax / self.width
        last = int(top)
        borders = np.append(np.arange(last + 1, dtype=np.float64), top)
        below: NDArray[np.float64] = np.interp(points, borders, np.append(0, np.cumsum(self.counts[: last + 1])))
        return below

    def _reach(self, exponent: int) -> None:
        """Let the bins span at least 2**exponent."""
        if exponent > self._exponent:
            self.counts = _merged(self.counts, exponent - self._exponent)
            self._exponent = exponent


def not_finite(tensor: str, bad: int, size: int, image: str) -> CalibrationError:
    """What to raise where ``bad`` of a tensor's values are NaN or infinite; the image may be unknown ("")."""
    return CalibrationError(
        f"tensor {tensor} holds NaN or infinite values" + (f" on the image {image}" if image else ""),
        expected="finite activations",
        got=f"{bad} of {size} values are not finite",
        fix="check this image, the preprocessing and the network's weights",
    )


def merge_concatenated(histograms: Mapping[str, Histogram], concatenations: Mapping[str, Sequence[str]]) -> None:
    """Fill the histograms of concatenations, in topological order, from those of their parts."""
    for tensor, parts in concatenations.items():
        for part in parts:
            histograms[tensor].merge(histograms[part])


def _merged(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts at a bin width that is 2**doublings times as large."""
    sums = counts.reshape(-1, 1 << min(doublings, EXPONENT_OF_BINS)).sum(1)
    return np.concatenate([sums, np.zeros(BINS - sums.size, np.int64)])
