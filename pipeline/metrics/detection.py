"""Boxes: from a detector's heads, without duplicates, and their average precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Channels of a head before those of the classes.
BOX = 5
# exp of more would be wider than any image.
MOST_LOG = 6.0


def decode(heads: Sequence[Floats], strides: Sequence[int], threshold: float = 0.05) -> Floats:
    """Boxes of one image, float32 (n, 6): left, top, right, bottom in pixels, score, class; best score first.

    A head's channels are, in strides: the centre's offset from the middle of its cell (x, y), the logarithms of width
    and height; then the logit of there being an object, and the classes' logits. The score is the product of both
    probabilities, of the likeliest class.

    Args:
        heads: each (5 + classes, rows, columns).
        strides: pixels a cell of each.
        threshold: lowest score.
    """
    found = []
    for head, stride in zip(heads, strides, strict=True):
        values = np.asarray(head, np.float32)
        rows, columns = np.mgrid[: values.shape[1], : values.shape[2]].astype(np.float32)
        probabilities = _sigmoid(values[BOX - 1]) * _sigmoid(values[BOX:])
        score = probabilities.max(0)
        at = score >= threshold
        middle = np.stack([columns + 0.5 + values[0], rows + 0.5 + values[1]])[:, at] * stride
        half = np.exp(np.minimum(values[2:4], MOST_LOG))[:, at] * (stride / 2)
        found.append(np.vstack([middle - half, middle + half, score[at], probabilities.argmax(0)[at]]).T)
    boxes: Floats = np.concatenate(found).astype(np.float32)
    return boxes[np.argsort(-boxes[:, 4], kind="stable")]


def suppress(boxes: Floats, overlap: float = 0.5) -> Floats:
    """Non-maximum suppression: the boxes, best first, without those that overlap a better one of their class by more.

    Args:
        boxes: (n, 6) as ``decode`` gives them.
        overlap: intersection over union.
    """
    kept: list[int] = []
    alive = np.ones(len(boxes), np.bool_)
    for index in range(len(boxes)):
        if alive[index]:
            kept.append(index)
            same = boxes[:, 5] == boxes[index, 5]
            alive &= ~(same & (iou(boxes[index : index + 1], boxes)[0] > overlap))
    return boxes[kept]


def iou(a: Floats, b: Floats) -> Floats:
    """Intersection over union of every box of one list with every one of another, (len(a), len(b))."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:4], b[None, :, 2:4])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2:4] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    joint = areas[0][:, None] + areas[1][None] - shared
    return np.asarray(np.divide(shared, joint, out=np.zeros_like(shared), where=joint > 0), np.float32)


def average_precision(
    found: Sequence[Floats], wanted: Sequence[Floats], classes: int, overlap: float = 0.5
) -> NDArray[np.float64]:
    """Average precision of each class, (classes,); NaN for a class of which there is no object.

    The area under precision over recall, with precision made monotonous: Everingham et al., "The PASCAL Visual Object
    Classes Challenge" (2010), as from VOC 2010 on. Each object is found once, by the best-scored box that overlaps it.

    Args:
        found: of each image, (n, 6) as ``suppress`` gives them.
        wanted: of each image, (m, 5): left, top, right, bottom, class.
        overlap: least intersection over union; 0.5 for AP50.
    """
    figures = np.full(classes, np.nan)
    for one in range(classes):
        objects = [boxes[boxes[:, 4] == one] for boxes in wanted]
        total = sum(map(len, objects))
        if not total:
            continue
        hits: list[tuple[float, bool]] = []
        for boxes, truth in zip(found, objects, strict=True):
            free = np.ones(len(truth), np.bool_)
            for box in boxes[boxes[:, 5] == one]:
                overlaps = np.where(free, iou(box[None], truth)[0], 0)
                best = int(overlaps.argmax()) if len(truth) else 0
                hit = bool(len(truth)) and bool(overlaps[best] >= overlap)
                if hit:
                    free[best] = False
                hits.append((float(box[4]), hit))
        figures[one] = _area(sorted(hits, key=lambda pair: -pair[0]), total)
    return figures


def _area(hits: Sequence[tuple[float, bool]], total: int) -> float:
    right = np.cumsum([hit for _, hit in hits], dtype=np.float64)
    precision = right / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(best * np.diff(right, prepend=0)) / total)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)
