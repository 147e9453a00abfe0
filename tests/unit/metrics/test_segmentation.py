"""Confusion matrices and IoU against naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.metrics.segmentation import class_iou, confusion_matrix, mean_iou, pixel_accuracy

CLASSES, VOID = 4, 255
shapes = arrays.array_shapes(min_dims=1, max_dims=3, max_side=8)


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(shapes)
    reference = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, VOID])))
    return reference, draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, CLASSES - 1)))


@given(masks())
def test_against_loops(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, prediction = pair
    counts = [[0] * CLASSES for _ in range(CLASSES)]
    for want, got in zip(reference.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if want != VOID:
            counts[want][got] += 1
    confusion = confusion_matrix(reference, prediction, CLASSES)
    assert confusion.tolist() == counts
    assert confusion.dtype == np.int64

    ious = []
    for c in range(CLASSES):
        union = sum(
            want != VOID and c in (want, got)
            for want, got in zip(reference.ravel().tolist(), prediction.ravel().tolist(), strict=True)
        )
        ious.append(counts[c][c] / union if c in reference else math.nan)
    assert class_iou(confusion).tolist() == pytest.approx(ious, nan_ok=True)

    present = [c for c in range(CLASSES) if c in reference]
    mean = sum(ious[c] for c in present) / len(present) if present else math.nan
    assert mean_iou(confusion) == pytest.approx(mean, nan_ok=True)

    counted = [(w, g) for w, g in zip(reference.ravel(), prediction.ravel(), strict=True) if w != VOID]
    accuracy = sum(w == g for w, g in counted) / len(counted) if counted else math.nan
    assert pixel_accuracy(confusion) == pytest.approx(accuracy, nan_ok=True)


@given(masks(), masks())
def test_counts_of_images_add_up(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
    together = [np.concatenate([x.ravel(), y.ravel()]) for x, y in zip(a, b, strict=True)]
    summed = confusion_matrix(*a, CLASSES) + confusion_matrix(*b, CLASSES)
    np.testing.assert_array_equal(confusion_matrix(together[0], together[1], CLASSES), summed)


def test_a_known_case() -> None:
    confusion = confusion_matrix(np.array([0, 0, 0, 1, 1, VOID]), np.array([0, 0, 1, 1, 0, 1]), 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert class_iou(confusion).tolist() == pytest.approx([2 / 4, 1 / 3, math.nan], nan_ok=True)
    assert mean_iou(confusion) == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert pixel_accuracy(confusion) == pytest.approx(3 / 5)


def test_class_that_is_predicted_alone_lowers_no_mean() -> None:
    confusion = confusion_matrix(np.array([0, 0]), np.array([0, 2]), 3)
    assert class_iou(confusion).tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert mean_iou(confusion) == 0.5


def test_all_void() -> None:
    confusion = confusion_matrix(np.full(4, VOID), np.zeros(4, np.uint8), 2)
    assert confusion.sum() == 0
    assert math.isnan(mean_iou(confusion))
    assert math.isnan(pixel_accuracy(confusion))


def test_negative_void_is_not_counted() -> None:
    assert confusion_matrix(np.array([-1, 0]), np.array([0, 0]), 2).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("value", [2, -1])
def test_predictions_that_are_no_class(value: int) -> None:
    with pytest.raises(ValueError, match="must lie in 0…1"):
        confusion_matrix(np.array([0]), np.array([value]), 2)


def test_predictions_under_void_may_be_anything() -> None:
    assert confusion_matrix(np.array([VOID]), np.array([77]), 2).sum() == 0


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)
