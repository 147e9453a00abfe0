"""Taking turns: planted differences are found, equal candidates are not told apart, a drifting clock cancels out."""

import numpy as np
import pytest

from pipeline.metrics.interleaving import MOST_WARM_UPS, interleave
from pipeline.metrics.latency import estimate


class Gpu:
    """Engines whose every inference takes its time, times a noise, times a drift that grows with the clock."""

    def __init__(self, milliseconds, *, noise=0.002, drift=0.0, seed=0):
        self.milliseconds, self.noise, self.drift = milliseconds, noise, drift
        self.rng = np.random.default_rng(seed)
        self.order = []

    def turns(self):
        return {name: lambda name=name: self.turn(name) for name in self.milliseconds}

    def turn(self, name):
        self.order.append(name)
        factor = 1 + self.drift * len(self.order)
        return self.milliseconds[name] * factor * (1 + self.noise * self.rng.standard_normal(50))


def test_a_ten_percent_slower_engine_is_found():
    ratio = interleave(Gpu({"a": 1.0, "b": 1.1}).turns(), 12).ratio("b", "a")
    assert 1.095 < ratio.low < ratio.median < ratio.high < 1.105
    assert ratio.confidence >= 0.95


def test_equal_engines_are_rarely_told_apart():
    told = 0
    for seed in range(100):
        ratio = interleave(Gpu({"a": 1.0, "b": 1.0}, seed=seed).turns(), 12).ratio("b", "a")
        told += not ratio.low <= 1 <= ratio.high
    assert told <= 10  # 5 expected at most


@pytest.mark.parametrize("drift", [0.002, -0.002])
def test_an_even_drift_does_not_bias_the_ratio(drift):
    gpu = Gpu({"a": 1.0, "b": 1.1, "c": 0.5}, noise=0.0, drift=drift)
    turns = interleave(gpu.turns(), 12)
    for name, wanted in (("b", 1.1), ("c", 0.5)):
        assert turns.ratio(name, "a").low == pytest.approx(wanted, rel=1e-9)
        assert turns.ratio(name, "a").high == pytest.approx(wanted, rel=1e-9)
    naive = np.median(turns.rounds["b"]) / turns.rounds["a"][0]
    assert abs(naive - 1.1) > 0.01


def test_order_of_turns():
    gpu = Gpu({"a": 1.0, "b": 2.0}, noise=0.0)
    turns = interleave(gpu.turns(), 2)
    assert (turns.warm_ups, turns.settled) == (2, True)
    assert "".join(gpu.order) == "abab" + 2 * "abba"
    assert turns.summary("a").count == 2 * 2 * 50
    assert turns.latency("b").median == 2.0


def test_warm_up_goes_on_until_stable_and_ends():
    speed = {"turns": 0}

    def warming():
        speed["turns"] += 1
        return np.array([1 + 1 / 2 ** speed["turns"]])

    turns = interleave({"a": warming}, 1)
    assert turns.settled
    assert 6 <= turns.warm_ups < MOST_WARM_UPS
    restless = iter(range(1, 100))
    turns = interleave({"a": lambda: np.array([float(next(restless))])}, 1)
    assert (turns.settled, turns.warm_ups) == (False, MOST_WARM_UPS)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (12, 2, 9), (20, 5, 14)]
)
def test_interval_of_a_median(count, low, high, rng):
    values = rng.permutation(count).astype(float)
    found = estimate(values)
    assert (found.median, found.low, found.high) == (np.median(values), low, high)
    assert (found.confidence >= 0.95) is (count >= 6)


def test_the_interval_holds_the_median_as_often_as_it_says(rng):
    held = [estimate(row) for row in rng.exponential(size=(2000, 12))]
    share = np.mean([e.low <= np.log(2) <= e.high for e in held])
    assert share == pytest.approx(held[0].confidence, abs=0.015)


def test_no_values():
    with pytest.raises(ValueError, match="no values"):
        estimate([])
