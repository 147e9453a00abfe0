"""Errors of values, strongest classes and margins against numpy on whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.metrics.outputs import BLOCK, PIXELS, SAMPLES, OutputTally, Quantiles, margins, strongest_class

values = st.one_of(st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]), st.floats(-4, 4, width=32))


@settings(deadline=None)
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=values))
def test_strongest_class_is_argmax(scores: np.ndarray) -> None:
    np.testing.assert_array_equal(strongest_class(scores), scores.argmax(0))


@pytest.mark.parametrize("classes", [2, 20, 300])
def test_strongest_class_over_many_blocks(classes: int) -> None:
    scores = np.random.default_rng(0).integers(0, 5, (classes, 3, PIXELS // 2)).astype(np.float16)
    np.testing.assert_array_equal(strongest_class(scores), scores.argmax(0))


@settings(deadline=None)
@given(arrays.arrays(np.float32, (4, 3, 5), elements=st.floats(-9, 9, width=32)), st.integers(0, 2**15 - 1))
def test_margins_are_largest_minus_second(scores: np.ndarray, bits: int) -> None:
    where = np.array([(bits >> i) & 1 for i in range(15)], bool).reshape(3, 5)
    ordered = np.sort(scores, axis=0)
    np.testing.assert_array_equal(margins(scores, where), (ordered[-1] - ordered[-2])[where])


@pytest.mark.parametrize("size", [1, 7, BLOCK, 3 * BLOCK + 11, SAMPLES + 1])
def test_errors_of_several_images(size: int) -> None:
    rng = np.random.default_rng(size)
    tally, got, wanted = OutputTally(), [], []
    for _ in range(3):
        wanted.append(rng.normal(1, 3, size).astype(np.float32))
        got.append((wanted[-1] + rng.normal(0, 0.1, size)).astype(np.float32))
        image = tally.add(got[-1], wanted[-1])
        assert image.low == wanted[-1].min()
        assert image.high == wanted[-1].max()
        assert image.max_abs == np.abs(got[-1] - wanted[-1]).max()
    a, b = np.concatenate(got).astype(np.float64), np.concatenate(wanted).astype(np.float64)
    error = np.abs(np.concatenate(got) - np.concatenate(wanted))
    assert tally.max_abs == error.max()
    assert tally.mean_abs == pytest.approx(error.mean(), rel=1e-4)
    assert tally.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)
    decibels = 10 * np.log10((b @ b) / ((a - b) @ (a - b)))
    assert tally.signal_to_error_db == pytest.approx(decibels, abs=0.01)


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(0, 1e6, width=32)), st.floats(0, 1))
def test_quantiles_are_rounded_up_by_a_128th_at_most(sample: np.ndarray, share: float) -> None:
    quantiles = Quantiles()
    quantiles.add(sample)
    ordered = np.sort(sample)
    exact = float(ordered[max(math.ceil(share * len(sample)) - 1, 0)])
    assert exact - 1e-38 <= quantiles.at(share) <= exact * (1 + 1 / 128) + 1e-38  # what is smaller counts as zero


def test_quantiles_of_nothing_and_of_nan() -> None:
    quantiles = Quantiles()
    assert math.isnan(quantiles.at(0.5))
    quantiles.add(np.array([1, np.nan], np.float32))
    assert quantiles.at(0.5) == pytest.approx(1, rel=1 / 127)
    assert not math.isfinite(quantiles.at(1.0))


def test_quantiles_of_a_sample_are_near_those_of_all() -> None:
    wanted = np.zeros((20, 256, 256), np.float32)
    got = np.abs(np.random.default_rng(0).normal(0, 1, wanted.shape)).astype(np.float32)
    tally = OutputTally()
    tally.add(got, wanted)
    assert tally.quantiles.at(0.99) == pytest.approx(np.quantile(got, 0.99), rel=0.02)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(poison: float) -> None:
    wanted = np.ones(3 * BLOCK, np.float32)
    got = wanted.copy()
    got[[5, BLOCK + 1]] = poison
    both = wanted.copy()
    both[7] = poison
    image = OutputTally().add(got, both)
    assert (image.not_finite, image.reference_not_finite) == (2, 1)
    assert not math.isfinite(image.max_abs)
    assert math.isnan(image.cosine)


def test_half_precision_outputs_are_compared_in_single() -> None:
    got = np.array([1.0, 60000.0], np.float16)
    image = OutputTally().add(got, np.array([1.0, -60000.0], np.float16))
    assert image.max_abs == pytest.approx(120000, rel=1e-3)
