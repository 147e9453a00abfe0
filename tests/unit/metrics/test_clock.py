"""Timing by the host's clock and by a GPU's events, on a clock that counts."""

import pytest

from pipeline.metrics.clock import LARGEST_CHUNK, gpu_milliseconds, gpu_spans, host_milliseconds


class CountingClock:
    """Every launch takes 2 ms; what was recorded can be read only after waiting."""

    def __init__(self):
        self.now, self.open, self.waited = 0.0, set(), 0.0

    def launch(self, ms=2.0):
        self.now += ms

    def event(self):
        event = {}
        self.open.add(id(event))
        return event

    def record(self, event):
        event["at"] = self.now

    def between(self, before, after):
        assert after["at"] <= self.waited
        return after["at"] - before["at"]

    def wait(self):
        self.waited = self.now

    def close(self, event):
        self.open.remove(id(event))


def test_every_launch_is_timed_and_events_are_closed():
    clock = CountingClock()
    times = gpu_milliseconds(clock, clock.launch, 0.01, 0)
    assert set(times) == {2.0}
    assert times.size % LARGEST_CHUNK == 0  # launches of no time come in the largest chunks
    assert not clock.open


def test_an_error_closes_the_events():
    clock, left = CountingClock(), [3]

    def launch():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the GPU is gone")

    with pytest.raises(RuntimeError):
        gpu_milliseconds(clock, launch, 1, 0)
    assert not clock.open


def test_steps_are_timed_apart():
    clock = CountingClock()
    spans = gpu_spans(clock, [lambda: clock.launch(3.0), lambda: clock.launch(5.0)], 4)
    assert spans.tolist() == [[3.0] * 4, [5.0] * 4]
    assert not clock.open


@pytest.mark.parametrize("warm_up", [0, 0.002])
def test_whole_calls(warm_up):
    calls = []
    times = host_milliseconds(lambda: calls.append(1), 0, warm_up)
    assert times.size == 1
    assert len(calls) >= 2  # one to warm up at least
