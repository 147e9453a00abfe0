"""Scales of Q/DQ pairs: amax / 127, in the graph's type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration.table import CalibrationTable
from pipeline.errors import CalibrationError


def pair_scale(table: CalibrationTable, tensor: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The scale of one tensor's pair, amax / 127: shape (), of the graph's type.

    Raises:
        CalibrationError: it is beyond FP16.
    """
    scale = _rounded(np.array(table.scale(tensor), np.float32), dtype)
    if not np.isfinite(scale):
        raise CalibrationError(
            f"the range of tensor {tensor}, ±{table.amax[tensor]:.4g}, is beyond FP16",
            expected="activations that FP16 holds",
            fix="use --precision fp32 for this network, or exclude its reader with engine.exclude",
        )
    return scale


def weight_scales(weight: NDArray[Any], axis: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales of a weight's pair, one for each index along ``axis``, of the graph's type."""
    amax = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    # A channel without weights quantizes to zeros at any scale, and TensorRT refuses a scale of 0.
    return _rounded(np.where(amax > 0, amax, 127.0).astype(np.float32) / np.float32(127), dtype)


def _rounded(scale: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales in the graph's type: never 0, and rounded up where FP16 has few digits left (below 6e-5)."""
    info = np.finfo(dtype)
    with np.errstate(over="ignore"):
        rounded = scale.astype(dtype)
    up = np.nextafter(rounded, dtype.type(np.inf))
    rounded = np.where((scale < info.smallest_normal) & (rounded < scale), up, rounded)
    least = info.smallest_subnormal if dtype == np.float16 else info.smallest_normal
    return np.asarray(np.maximum(rounded, least), dtype)
