"""Boundary F-scores against loops over pixels and distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.metrics.boundary import beside, f_score, match, outlines, tolerance_pixels

VOID = 255


def slow_boundary(mask: np.ndarray, c: int) -> set[tuple[int, int]]:
    """DAVIS's ``seg2bmap``, pixel by pixel."""
    height, width = mask.shape
    held = mask == c
    places = set()
    for y in range(height):
        for x in range(width):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(v < height and u < width and held[v, u] != held[y, x] for v, u in others):
                places.add((y, x))
    return places


def slow_f(reference: np.ndarray, prediction: np.ndarray, c: int, radius: int, void: np.ndarray) -> float:
    theirs, ours = slow_boundary(reference, c), slow_boundary(prediction, c)

    def counted(places: set[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(y, x) for y, x in places if not void[y : y + 2, x : x + 2].any()]

    def found(some: list[tuple[int, int]], others: set[tuple[int, int]]) -> int:
        return sum(any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some)

    wanted, got = counted(theirs), counted(ours)
    if not wanted and not got:
        return math.nan
    recall = found(wanted, ours) / len(wanted) if wanted else 0
    precision = found(got, theirs) / len(got) if got else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))
    classes = draw(st.integers(1, 5))
    reference = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([*range(classes), VOID])))
    prediction = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, classes - 1)))
    return reference, prediction, classes, draw(st.integers(0, 6))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_against_loops(case: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    reference, prediction, classes, radius = case
    void = reference == VOID
    sides = outlines(reference, classes, radius), outlines(prediction, classes, radius)
    got = f_score(match(*sides, beside(void) if void.any() else None))
    wanted = [slow_f(reference, prediction, c, radius, void) for c in range(classes)]
    assert got.tolist() == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("radius", [1, 2, 3, 4, 5, 6, 7])
def test_discs_at_the_border_have_no_gaps(radius: int) -> None:
    reference, prediction = np.ones((2, 12, 20), np.uint8)
    reference[0, 0] = prediction[-1, -1] = prediction[3, 1] = 0
    f = f_score(match(outlines(reference, 2, radius), outlines(prediction, 2, radius)))
    none = np.zeros_like(reference, bool)
    assert f.tolist() == pytest.approx([slow_f(reference, prediction, c, radius, none) for c in range(2)])


def test_more_classes_than_a_word_has_bits() -> None:
    rng = np.random.default_rng(0)
    reference, prediction = rng.integers(0, 150, (2, 40, 40)).astype(np.uint8)
    f = f_score(match(outlines(reference, 150, 1), outlines(prediction, 150, 1)))
    none = np.zeros_like(reference, bool)
    assert f.tolist() == pytest.approx([slow_f(reference, prediction, c, 1, none) for c in range(150)], nan_ok=True)


def test_a_shift_within_the_tolerance_costs_nothing() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 1
    moved = np.roll(mask, 3, 1)
    assert f_score(match(outlines(mask, 2, 3), outlines(moved, 2, 3))).tolist() == [1.0, 1.0]
    assert f_score(match(outlines(mask, 2, 2), outlines(moved, 2, 2)))[1] < 0.8


def test_one_side_without_a_boundary_is_zero_and_both_are_undefined() -> None:
    plain, square = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    square[2:5, 2:5] = 1
    f = f_score(match(outlines(plain, 3, 1), outlines(square, 3, 1)))
    assert f.tolist() == pytest.approx([0, 0, math.nan], nan_ok=True)


def test_tolerance_is_a_share_of_the_diagonal() -> None:
    assert tolerance_pixels(512, 512, 0.0075) == 6
    assert tolerance_pixels(480, 854, 0.0075) == 8


def test_larger_than_any_image() -> None:
    mask = np.eye(5, dtype=np.uint8)
    assert f_score(match(outlines(mask, 2, 50), outlines(1 - mask, 2, 50))).tolist() == [1.0, 1.0]
