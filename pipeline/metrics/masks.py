"""Comparison of two sides' masks over many images: sums per image, and every figure of any choice of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.boundary import Outlines, f_score, match
from pipeline.metrics.segmentation import (
    Figures,
    accuracy,
    confusion_matrix,
    dice,
    iou,
    mean,
    merge,
    overlaps,
    where_held,
)


@dataclass(frozen=True)
class MaskFigures:
    """Fractions of 1, NaN where undefined; classes and categories that the reference does not hold are NaN.

    Attributes:
        class_iou, class_dice, class_boundary_f: (…, classes).
        category_iou: (…, categories); none where classes have no categories.
        accuracy, mean_iou, mean_dice, mean_boundary_f, mean_category_iou: (…); means over what the reference holds.
    """

    class_iou: Figures
    class_dice: Figures
    class_boundary_f: Figures
    category_iou: Figures
    accuracy: Figures
    mean_iou: Figures
    mean_dice: Figures
    mean_boundary_f: Figures
    mean_category_iou: Figures


class MaskTally:
    """Sums per image, a few numbers a class: memory does not grow with the images' size.

    Args:
        classes: number of them.
        groups: category number of each class, 0…; none for no categories.
    """

    def __init__(self, classes: int, groups: Sequence[int] = ()) -> None:
        self.classes, self.groups = classes, tuple(groups)
        self.categories = max(groups) + 1 if groups else 0
        self.rows: list[NDArray[np.float64]] = []

    def add(
        self,
        reference: NDArray[np.integer],
        prediction: NDArray[np.integer],
        outlines: tuple[Outlines, Outlines],
        ignored: NDArray[np.bool_] | None = None,
    ) -> None:
        """Measure one image and count it."""
        self.rows.append(self.measure(reference, prediction, outlines, ignored))

    def measure(
        self,
        reference: NDArray[np.integer],
        prediction: NDArray[np.integer],
        outlines: tuple[Outlines, Outlines],
        ignored: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """The row of one image, float64 (k,).

        Args:
            reference: class ids (H, W); others are void.
            prediction: class ids (H, W).
            outlines: of both, in this order.
            ignored: flat over all pixels, where boundaries are not counted; see ``boundary.beside``.
        """
        confusion = confusion_matrix(reference, prediction, self.classes)
        f = f_score(match(*outlines, ignored))
        known = ~np.isnan(f)
        grouped = overlaps(merge(confusion, self.groups)) if self.groups else np.zeros((3, 0), np.int64)
        parts = (overlaps(confusion), grouped, np.stack([np.where(known, f, 0), known]))
        return np.concatenate([part.ravel() for part in parts], dtype=np.float64)

    def sums(self) -> NDArray[np.float64]:
        """What adds up over images, float64 (images, k); ``figures`` reads any sum of rows, and each row alone."""
        return np.stack(self.rows)

    def figures(self, sums: NDArray[np.float64]) -> MaskFigures:
        """The figures of sums of rows, (…, k)."""
        lead, n, g = sums.shape[:-1], self.classes, self.categories
        overlap = sums[..., : 3 * n].reshape(*lead, 3, n)
        grouped = sums[..., 3 * n : 3 * (n + g)].reshape(*lead, 3, g)
        f_sum, f_images = np.moveaxis(sums[..., 3 * (n + g) :].reshape(*lead, 2, n), -2, 0)
        f = np.divide(f_sum, f_images, out=np.full(f_sum.shape, np.nan), where=f_images > 0)
        class_iou, category_iou = iou(overlap), iou(grouped)
        class_dice, class_f = dice(overlap), where_held(f, overlap)
        return MaskFigures(
            class_iou=class_iou,
            class_dice=class_dice,
            class_boundary_f=class_f,
            category_iou=category_iou,
            accuracy=accuracy(overlap),
            mean_iou=mean(class_iou),
            mean_dice=mean(class_dice),
            mean_boundary_f=mean(class_f),
            mean_category_iou=mean(category_iou),
        )
