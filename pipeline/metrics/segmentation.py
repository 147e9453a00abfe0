"""Agreement of masks, from confusion matrices: IoU per class, mean IoU, pixel accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def confusion_matrix(reference: NDArray[np.integer], prediction: NDArray[np.integer], classes: int) -> Counts:
    """Pixel counts, int64 (classes, classes): rows are the reference's classes, columns the prediction's.

    Args:
        reference: class ids of any shape; values outside 0…classes-1 (void) are not counted.
        prediction: class ids 0…classes-1 of the same shape.

    Raises:
        ValueError: the shapes differ, or a prediction is no class.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"the reference has shape {reference.shape}, the prediction {prediction.shape}")
    counted = (reference >= 0) & (reference < classes)
    predicted = prediction[counted]
    if predicted.size and not 0 <= int(predicted.min()) <= int(predicted.max()) < classes:
        raise ValueError(f"predictions must lie in 0…{classes - 1}, got up to {int(predicted.max())}")
    index = reference[counted].astype(np.intp) * classes + predicted
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def class_iou(confusion: Counts) -> NDArray[np.float64]:
    """Intersection over union per class, 0…1; NaN for a class that neither side holds."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    iou: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    return iou


def mean_iou(confusion: Counts) -> float:
    """Mean of class_iou over the classes that the reference holds; NaN where it holds none."""
    present = confusion.sum(1) > 0
    return float(class_iou(confusion)[present].mean()) if present.any() else float("nan")


def pixel_accuracy(confusion: Counts) -> float:
    """Share of counted pixels on the diagonal; NaN where none was counted. Between two masks: their agreement."""
    total = int(confusion.sum())
    return float(np.trace(confusion) / total) if total else float("nan")
