"""The search over made-up costs: what it finds, in how many tries, and what it records."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.metrics.latency import Estimate
from pipeline.mixed.report import Candidate, Figures
from pipeline.mixed.search import Search, fastest_kept, runs_and_ends, with_front

BUDGET = 0.001


def figures(drop: float) -> Figures:
    return Figures(1 - drop, None, 0.8 - drop, drop, None)


def candidate(ms: float, drop: float, kept: bool = True, measured: float | None = None) -> Candidate:
    timed = None if measured is None else Estimate(measured, measured, measured, 0.95)
    return Candidate("", (), figures(drop), ms, kept, False, timed)


def searching(drops, milliseconds, judged, budget=BUDGET, groups=None) -> Search:
    def judge(half):
        judged.append(half)
        return figures(sum(drop for name, drop in drops.items() if name not in half))

    return Search(
        list(drops), drops, milliseconds, judge, lambda each: (each.miou_drop or 0) <= budget + 1e-12, groups or {}
    )


def searched(drops: dict[str, float], times: dict[str, float], limit: int = 100, budget: float = BUDGET):
    """A network whose drops and times add up; ``times`` is what FP16 loses."""
    judged: list[frozenset[str]] = []
    found = searching(drops, lambda half: 10 + sum(times[name] for name in half), judged, budget).run(limit)
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


# A chain of ten convolutions, two a block: each saves 1 in INT8, and every border costs more than one saves.
CHAIN = [f"n{place}" for place in range(10)]
BLOCKS = [(f"b{place}", CHAIN[2 * place : 2 * place + 2]) for place in range(5)]
BORDER = 1.5


def chain_ms(half, border=BORDER):
    borders = sum((a in half) != (b in half) for a, b in itertools.pairwise(CHAIN))
    return len(half) + border * borders


def optimum(drops, budget=BUDGET):
    subsets = itertools.chain.from_iterable(itertools.combinations(CHAIN, size) for size in range(len(CHAIN) + 1))
    kept = [set(half) for half in subsets if sum(drops[n] for n in CHAIN if n not in half) <= budget + 1e-12]
    return min(map(chain_ms, kept))


def chained(drops, groups):
    found = searching(drops, chain_ms, [], groups=groups).run(40)
    return found[fastest_kept(found)]


def test_both_ends_stay_half_and_the_middle_is_one_region():
    drops = {name: 0.002 if name in ("n0", "n1", "n8", "n9") else 0.0001 for name in CHAIN}
    best = chained(drops, runs_and_ends(BLOCKS))
    assert best.half == ("n0", "n1", "n8", "n9")
    assert best.ms == optimum(drops) == 7


def test_what_lies_between_sensitive_ones_joins_them_as_a_group():
    drops = {name: 0.002 if name in ("n4", "n7", "n9") else 0.0001 for name in CHAIN}
    best = chained(drops, runs_and_ends(BLOCKS))
    assert best.half == tuple(CHAIN[4:])
    assert best.ms == optimum(drops) == 7.5
    assert chained(drops, {}).ms == 8.5  # one at a time: the first one between n4 and n7 gives no border less


def test_a_sensitive_middle_takes_a_region_along():
    """Two borders cost more than INT8 saves on the longer side: one side joins the sensitive ones in FP16."""
    drops = {name: 0.002 if name in ("n3", "n4") else 0.0001 for name in CHAIN}
    best = chained(drops, runs_and_ends(BLOCKS))
    assert best.ms == optimum(drops)
    assert set(best.half) >= {"n3", "n4"}


def test_regions_are_near_the_optimum():
    rng = np.random.default_rng(1)
    exact = 0
    for _ in range(40):
        drops = dict(zip(CHAIN, rng.exponential(0.0003, len(CHAIN)), strict=True))
        best, least = chained(drops, runs_and_ends(BLOCKS)).ms, optimum(drops)
        assert best <= least + BORDER
        exact += best == least
    assert exact > 30


def test_all_fp16_where_every_mixture_is_slower():
    drops = {name: 0.002 if place % 2 else 0.00001 for place, name in enumerate(CHAIN)}
    best = chained(drops, runs_and_ends(BLOCKS))
    assert (best.move, best.ms) == ("all FP16", optimum(drops))


def test_less_in_fp16_than_what_exceeded_the_budget_is_not_tried():
    drops = dict.fromkeys(CHAIN, 0.0006)
    judged: list[frozenset[str]] = []
    found = searching(drops, chain_ms, judged, groups=runs_and_ends(BLOCKS)).run(40)
    exceeding = [frozenset(one.half) for one in found if not one.kept]
    improved = [frozenset(one.half) for one in found if one.move.startswith("INT8")]
    assert improved
    assert not any(a < b and judged.index(b) < judged.index(a) for a in improved for b in exceeding)


def test_a_second_search_goes_on_with_other_costs():
    judged: list[frozenset[str]] = []
    border = [0.1]

    def milliseconds(half):
        return chain_ms(half, border[0])

    drops = {name: 0.0011 if place % 3 == 0 else 0.00001 for place, name in enumerate(CHAIN)}
    search = searching(drops, milliseconds, judged, groups=runs_and_ends(BLOCKS))
    first = search.run(12)
    assert first[fastest_kept(first)].half == ("n0", "n3", "n6", "n9")
    border[0] = 4
    second = search.run(20)
    assert [one.half for one in second[: len(first)]] == [one.half for one in first]
    assert len(judged) == len(second) <= 20
    assert second[fastest_kept(second)].estimated_ms == min(one.estimated_ms for one in second if one.kept)
    assert any(a.estimated_ms != b.estimated_ms for a, b in zip(first, second, strict=False))
    assert second[fastest_kept(second)].half == tuple(CHAIN)


def test_groups():
    assert runs_and_ends([("a", ["1", "2"]), ("b", ["3"]), ("c", ["4"])]) == {
        "a": {"1", "2"},
        "a to b": {"1", "2", "3"},
        "a to c": {"1", "2", "3", "4"},
        "b": {"3"},
        "all but b": {"1", "2", "4"},
        "b to c": {"3", "4"},
        "c": {"4"},
    }
