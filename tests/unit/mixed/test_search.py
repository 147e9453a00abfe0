"""The search over made-up costs: what it finds, in how many tries, and what it records."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.metrics.latency import Estimate
from pipeline.mixed.report import Candidate, Figures
from pipeline.mixed.search import Search, fastest_kept, with_front

BUDGET = 0.001


def figures(drop: float) -> Figures:
    return Figures(1 - drop, None, 0.8 - drop, drop, None)


def candidate(ms: float, drop: float, kept: bool = True, measured: float | None = None) -> Candidate:
    timed = None if measured is None else Estimate(measured, measured, measured, 0.95)
    return Candidate("", (), figures(drop), ms, kept, False, timed)


def searched(drops: dict[str, float], times: dict[str, float], limit: int = 100, budget: float = BUDGET):
    """A network whose drops and times add up; ``times`` is what FP16 loses."""
    judged = []

    def judge(half):
        judged.append(half)
        return figures(sum(drop for name, drop in drops.items() if name not in half))

    search = Search(
        list(drops),
        drops,
        lambda half: 10 + sum(times[name] for name in half),
        judge,
        lambda each: (each.miou_drop or 0) <= budget + 1e-12,
        limit,
    )
    found = search.run()
    assert len(judged) == len(set(judged)) == len(found)
    return found


def test_all_int8_where_it_keeps_the_budget():
    found = searched({"a": 0.0001, "b": 0.0002}, {"a": 1, "b": 1})
    assert found[fastest_kept(found)].half == ()
    assert [one.move for one in found[:2]] == ["all FP16", "all INT8"]
    assert found[1].accepted
    assert not found[0].accepted


def test_the_sensitive_one_leaves():
    found = searched({"a": 0.0001, "b": 0.01, "c": 0.0002}, {"a": 1, "b": 5, "c": 1})
    best = found[fastest_kept(found)]
    assert best.half == ("b",)
    assert best.accepted
    assert best.figures.miou_drop == pytest.approx(0.0003)


def test_a_cheap_one_leaves_before_a_dear_one_of_equal_sensitivity():
    found = searched({"dear": 0.001, "cheap": 0.001}, {"dear": 4, "cheap": 1})
    assert found[fastest_kept(found)].half == ("cheap",)


def test_what_left_too_early_comes_back():
    """By sensitivity by time, small ones leave first, but the large one alone is enough."""
    found = searched({"small": 0.0009, "large": 0.003}, {"small": 0.1, "large": 3})
    best = found[fastest_kept(found)]
    assert best.half == ("large",)
    assert "INT8: small" in [one.move for one in found if one.accepted]


def test_what_loses_no_time_leaves():
    found = searched({"a": 0.0001, "b": 0.0001}, {"a": 1, "b": -2})
    assert found[fastest_kept(found)].half == ("b",)


def test_the_budget_is_never_exceeded_and_small_networks_come_out_best():
    rng = np.random.default_rng(0)
    exact = 0
    for _ in range(60):
        names = [f"n{place}" for place in range(6)]
        drops = dict(zip(names, rng.exponential(0.0005, 6), strict=True))
        times = dict(zip(names, rng.uniform(0.1, 3, 6), strict=True))
        found = searched(drops, times)
        best = found[fastest_kept(found)]
        assert (best.figures.miou_drop or 0) <= BUDGET + 1e-12
        assert all(one.kept == ((one.figures.miou_drop or 0) <= BUDGET + 1e-12) for one in found)
        subsets = itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(7))
        possible = [s for s in subsets if sum(drops[n] for n in names if n not in s) <= BUDGET + 1e-12]
        optimum = min(10 + sum(times[name] for name in s) for s in possible)
        assert best.ms <= optimum + 1.5
        exact += best.ms <= optimum + 1e-9
    assert exact > 40


def test_the_limit_is_kept_and_the_answer_still_keeps_the_budget():
    drops = {f"n{place}": 0.01 for place in range(64)}
    found = searched(drops, dict.fromkeys(drops, 1.0), limit=4)
    assert len(found) == 4
    assert found[fastest_kept(found)].kept


def test_few_tries_for_many_layers():
    drops = {f"n{place}": 0.01 if place < 10 else 1e-7 for place in range(200)}
    found = searched(drops, dict.fromkeys(drops, 1.0))
    assert len(found[fastest_kept(found)].half) == 10
    assert len(found) < 40


def test_the_front():
    found = with_front([candidate(1, 0.5), candidate(2, 0.1), candidate(3, 0.2), candidate(2, 0.1), candidate(4, 0)])
    assert [one.best for one in found] == [True, True, False, True, True]


def test_estimates_are_not_compared_with_measured_times():
    found = with_front([candidate(0.1, 0.5, measured=1), candidate(0.2, 0.1, measured=2), candidate(0.1, 0)])
    assert [one.best for one in found] == [True, True, False]


def test_the_fastest_of_the_measured_ones_that_keep_the_budget():
    found = [candidate(1, 0, kept=False, measured=0.1), candidate(2, 0), candidate(3, 0, measured=5), candidate(4, 0)]
    assert fastest_kept(found) == 2
    assert fastest_kept([candidate(2, 0.2), candidate(2, 0.1)]) == 1
