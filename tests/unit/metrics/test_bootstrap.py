"""Intervals over resampled images: seeded, of the right width, and paired."""

from __future__ import annotations

import numpy as np

from pipeline.metrics import bootstrap
from pipeline.metrics.bootstrap import interval, resampled_sums


def test_equal_seeds_draw_equal_images_for_both_sides() -> None:
    rng = np.random.default_rng(0)
    ours = rng.random((30, 4))
    both = resampled_sums(np.concatenate([ours, ours + 1], axis=1), 50, 3)
    np.testing.assert_allclose(both[:, :4] + 30, both[:, 4:])
    np.testing.assert_allclose(resampled_sums(ours, 50, 3), both[:, :4])
    assert not np.allclose(resampled_sums(ours, 50, 4), both[:, :4])


def test_every_resample_holds_as_many_images() -> None:
    assert (resampled_sums(np.ones((17, 1)), 200, 0) == 17).all()


def test_width_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    low, high = interval(resampled_sums(values, 2000, 0) / 400)[:, 0]
    assert low < values.mean() < high
    assert abs((high - low) / (2 * 1.96 * values.std() / 20) - 1) < 0.1


def test_blocks_change_nothing() -> None:
    values = np.random.default_rng(2).random((50, 3))
    old, bootstrap.BLOCK = bootstrap.BLOCK, 150
    try:
        blocked = resampled_sums(values, 100, 0)
    finally:
        bootstrap.BLOCK = old
    np.testing.assert_allclose(blocked, resampled_sums(values, 100, 0))


def test_undefined_resamples_do_not_count() -> None:
    figures = np.array([[np.nan, np.nan], [1, np.nan], [2, np.nan], [3, np.nan]])
    bounds = interval(figures)
    assert bounds[:, 0].tolist() == [1, 3]
    assert np.isnan(bounds[:, 1]).all()
