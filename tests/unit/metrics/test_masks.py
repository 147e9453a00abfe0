"""Figures of any choice of images from their sums, against figures of the images put together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.boundary import beside, f_score, match, outlines
from pipeline.metrics.masks import MaskTally
from pipeline.metrics.segmentation import class_iou, confusion_matrix, dice, mean_iou, merge, overlaps

CLASSES, GROUPS, VOID = 5, (0, 0, 1, 2, 1), 255


def images(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        held = rng.choice([0, 1, 2, 3, VOID], 3)
        pairs.append((rng.choice(held, (7, 9)).astype(np.uint8), rng.integers(0, CLASSES, (7, 9)).astype(np.uint8)))
    return pairs


def tallied(pairs: list[tuple[np.ndarray, np.ndarray]]) -> MaskTally:
    tally = MaskTally(CLASSES, GROUPS)
    for reference, prediction in pairs:
        sides = outlines(reference, CLASSES, 1), outlines(prediction, CLASSES, 1)
        tally.add(reference, prediction, sides, beside(reference == VOID))
    return tally


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 99))
def test_figures_of_any_choice_of_images(choice: list[int], seed: int) -> None:
    pairs = images(6, seed)
    tally = tallied(pairs)
    figures = tally.figures(tally.sums()[choice].sum(0))
    chosen = [pairs[i] for i in choice]
    reference, prediction = (np.concatenate([pair[side].ravel() for pair in chosen]) for side in (0, 1))
    confusion = confusion_matrix(reference, prediction, CLASSES)
    held = confusion.sum(1) > 0
    assert figures.class_iou.tolist() == pytest.approx(class_iou(confusion).tolist(), nan_ok=True)
    assert float(figures.mean_iou) == pytest.approx(mean_iou(confusion), nan_ok=True)
    both = confusion.sum(0) + confusion.sum(1)
    sizes = [2 * confusion[c, c] / both[c] if held[c] else math.nan for c in range(CLASSES)]
    assert figures.class_dice.tolist() == pytest.approx(sizes, nan_ok=True)
    merged = np.zeros((3, 3), np.int64)
    for row, column in np.ndindex(confusion.shape):
        merged[GROUPS[row], GROUPS[column]] += confusion[row, column]
    np.testing.assert_array_equal(merge(confusion, GROUPS), merged)
    assert figures.category_iou.tolist() == pytest.approx(class_iou(merged).tolist(), nan_ok=True)


def test_boundary_f_is_the_mean_over_images_with_a_boundary() -> None:
    pairs = images(4, 1)
    each = np.array(
        [f_score(match(outlines(r, CLASSES, 1), outlines(p, CLASSES, 1), beside(r == VOID))) for r, p in pairs]
    )
    tally = tallied(pairs)
    figures = tally.figures(tally.sums().sum(0))
    held = np.isin(np.arange(CLASSES), np.concatenate([r.ravel() for r, _ in pairs]))
    wanted = np.where(held, [np.mean(c[~np.isnan(c)]) for c in each.T], np.nan)
    assert figures.class_boundary_f.tolist() == pytest.approx(wanted.tolist(), nan_ok=True)


def test_absent_classes_are_neither_0_nor_1() -> None:
    label = np.zeros((6, 6), np.uint8)
    label[2:4] = 1
    tally = MaskTally(3)
    tally.add(label, label, (outlines(label, 3, 1), outlines(label, 3, 1)))
    invented = label.copy()
    invented[0, 0] = 2
    tally.add(label, invented, (outlines(label, 3, 1), outlines(invented, 3, 1)))
    figures = tally.figures(tally.sums().sum(0))
    for by_class in (figures.class_iou, figures.class_dice, figures.class_boundary_f):
        assert np.isnan(by_class).tolist() == [False, False, True]
    assert float(tally.figures(tally.sums()).mean_iou[0]) == 1.0
    assert figures.category_iou.size == 0


def test_dice_and_iou_of_a_known_case() -> None:
    overlap = overlaps(np.array([[2, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert dice(overlap).tolist() == pytest.approx([4 / 6, 2 / 4, math.nan], nan_ok=True)
