"""A thread that reads ahead, and never outlives its reader."""

import contextlib
import itertools
import threading

import numpy as np
import pytest

from pipeline.backends.ahead import DEPTH, Ahead


def test_all_items_in_order():
    with Ahead(iter((f"image {i}", np.zeros(1)) for i in range(20))) as ahead:
        assert [name for name, _ in ahead] == [f"image {i}" for i in range(20)]
    assert "reading ahead" not in [thread.name for thread in threading.enumerate()]


def test_leaving_early_stops_the_thread_and_closes_the_generator():
    taken, closed = [], threading.Event()

    def endless():
        try:
            for number in itertools.count():
                taken.append(number)
                yield str(number), np.zeros(1)
        finally:
            closed.set()

    with contextlib.suppress(KeyboardInterrupt), Ahead(endless()) as ahead:
        next(ahead)
        raise KeyboardInterrupt
    assert closed.is_set()
    assert len(taken) <= DEPTH + 4
    assert "reading ahead" not in [thread.name for thread in threading.enumerate()]


def test_it_never_reads_far_ahead():
    taken = []

    def source():
        for number in range(50):
            taken.append(number)
            yield str(number), np.zeros(1)

    with Ahead(source()) as ahead:
        for number, _ in enumerate(ahead):
            assert len(taken) <= number + DEPTH + 2


def test_an_error_comes_where_its_item_would_have_come():
    def source():
        yield 1
        yield 2
        raise OSError("no more")

    with Ahead(source()) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(OSError, match="no more"):
            next(ahead)
