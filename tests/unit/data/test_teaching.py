"""Which images teach and which judge, in which order, in which batches."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.teaching import MOST_HELD_OUT, in_batches, split_places, teaching_order
from pipeline.errors import DataError


@pytest.mark.parametrize(("count", "held_out"), [(0, []), (3, []), (4, [3]), (9, [3, 7])])
def test_every_fourth_image_judges(count: int, held_out: list[int]) -> None:
    rest, judging = split_places(count)
    assert judging == held_out
    assert sorted([*rest, *judging]) == list(range(count))


def test_of_many_images_a_few_judge_spread_over_all() -> None:
    rest, judging = split_places(1000)
    assert (len(judging), len(rest)) == (MOST_HELD_OUT, 1000 - MOST_HELD_OUT)
    assert (judging[0], judging[-1]) == (3, 999)
    assert np.ptp(np.diff(judging)) <= 4


def test_each_place_comes_once_before_any_comes_again() -> None:
    order = teaching_order([2, 5, 7], 8, np.random.default_rng(0))
    assert len(order) == 8
    assert sorted(order[:3]) == sorted(order[3:6]) == [2, 5, 7]
    assert order == teaching_order([2, 5, 7], 8, np.random.default_rng(0))


def test_batches_hold_arrays_in_order_and_the_last_what_is_left() -> None:
    arrays = [np.full((1, 2), place) for place in range(5)]
    batches = list(in_batches(iter(arrays), 2, "use 1"))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_a_batch_of_different_sizes_says_what_to_do() -> None:
    arrays = [np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 8, 9))]
    assert len(list(in_batches(iter(arrays), 1, "use 1"))) == 2
    with pytest.raises(DataError, match="different sizes") as caught:
        list(in_batches(iter(arrays), 2, "set the batch to 1"))
    assert caught.value.fix.startswith("set the batch to 1, or")
    assert "(3, 8, 9)" in caught.value.got
