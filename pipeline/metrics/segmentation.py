"""Agreement of masks, from confusion matrices: IoU and Dice per class and per category, their means, pixel accuracy.

What every figure needs of a confusion matrix is its *overlaps*, int64 (3, classes): pixels on the diagonal, pixels of
the reference, pixels of the prediction. They add up over images, so the figures of any choice of images are those of
the sum of their overlaps; every function takes leading axes for many such sums at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Figures = NDArray[np.float64]
MOST_CLASSES = 255


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
    bytes_only = reference.dtype == prediction.dtype == np.uint8 and classes <= MOST_CLASSES
    if bytes_only and prediction.size and int(prediction.max()) < classes:
        # Void makes rows of its own behind those of the classes.
        joint = reference.astype(np.uint16) * np.uint16(classes) + prediction
        counts = np.bincount(joint.ravel(), minlength=classes * classes)[: classes * classes]
        return counts.reshape(classes, classes).astype(np.int64)
    counted = (reference >= 0) & (reference < classes)
    predicted = prediction[counted]
    if predicted.size and not 0 <= int(predicted.min()) <= int(predicted.max()) < classes:
        raise ValueError(f"predictions must lie in 0…{classes - 1}, got up to {int(predicted.max())}")
    index = reference[counted].astype(np.intp) * classes + predicted
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def merge(confusion: Counts, groups: Sequence[int]) -> Counts:
    """The confusion matrix of groups of classes, int64 (number of groups,) * 2.

    Args:
        groups: of each class, the number of its group, 0…
    """
    member = np.zeros((max(groups) + 1, len(groups)), np.int64)
    member[list(groups), range(len(groups))] = 1
    merged: Counts = member @ confusion @ member.T
    return merged


def overlaps(confusion: Counts) -> Counts:
    """Pixels that agree, of the reference, of the prediction: int64 (3, classes) of a confusion matrix."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)])


def iou(overlap: NDArray[np.number]) -> Figures:
    """Intersection over union, 0…1, (…, classes) from overlaps (…, 3, classes); NaN for classes that the
    reference does not hold."""
    hits, reference, predicted = np.moveaxis(np.asarray(overlap, np.float64), -2, 0)
    return where_held(_ratio(hits, reference + predicted - hits), overlap)


def dice(overlap: NDArray[np.number]) -> Figures:
    """Dice coefficient 2·|A∩B| / (|A| + |B|), 0…1, (…, classes) from overlaps; NaN as with ``iou``."""
    hits, reference, predicted = np.moveaxis(np.asarray(overlap, np.float64), -2, 0)
    return where_held(_ratio(2 * hits, reference + predicted), overlap)


def accuracy(overlap: NDArray[np.number]) -> Figures:
    """Share of pixels that agree, 0…1, (…) from overlaps; NaN where no pixel was counted."""
    return _ratio(overlap[..., 0, :].sum(-1), overlap[..., 1, :].sum(-1))


def where_held(figures: Figures, overlap: NDArray[np.number]) -> Figures:
    """The figures with NaN for classes that the reference does not hold."""
    return np.where(overlap[..., 1, :] > 0, figures, np.nan)


def mean(figures: Figures) -> Figures:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(figures)
    return _ratio(np.where(known, figures, 0).sum(-1), known.sum(-1))


def class_iou(confusion: Counts) -> Figures:
    """``iou`` of one confusion matrix."""
    return iou(overlaps(confusion))


def mean_iou(confusion: Counts) -> float:
    """Mean of class_iou; NaN where the reference holds no class."""
    return float(mean(class_iou(confusion)))


def pixel_accuracy(confusion: Counts) -> float:
    """Share of counted pixels on the diagonal; NaN where none was counted. Between two masks: their agreement."""
    return float(accuracy(overlaps(confusion)))


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> Figures:
    """``part / whole``, NaN where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    ratio: Figures = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return ratio
