"""Comparing latencies on a machine whose clocks drift: candidates take turns, and ratios are taken within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.latency import Estimate, LatencySummary, estimate, summarise

Turn = Callable[[], "NDArray[np.float64]"]

SETTLED = 0.005
MOST_WARM_UPS = 12


@dataclass(frozen=True)
class Interleaved:
    """Latencies of candidates that took turns.

    Attributes:
        rounds: milliseconds by candidate, one value a round.
        samples: milliseconds of every single inference of the rounds, by candidate.
        warm_ups: turns of each candidate before the rounds.
        settled: whether the latencies had stopped moving by then.
    """

    rounds: dict[str, NDArray[np.float64]]
    samples: dict[str, NDArray[np.float64]]
    warm_ups: int
    settled: bool

    def latency(self, name: str) -> Estimate:
        """Milliseconds: the median of the rounds."""
        return estimate(self.rounds[name])

    def summary(self, name: str) -> LatencySummary:
        """Percentiles over every inference."""
        return summarise(self.samples[name])

    def ratio(self, name: str, reference: str) -> Estimate:
        """How many times slower than the reference: the median of the rounds' ratios."""
        return estimate(self.rounds[name] / self.rounds[reference])


def interleave(turns: Mapping[str, Turn], rounds: int) -> Interleaved:
    """Time candidates in rounds of turns, after warming up until stable.

    A round runs all candidates and then all of them backwards (A B B A), and a candidate's time is the mean of its two
    turns: a clock that drifts evenly through the round cancels out.

    Args:
        turns: run a candidate for a while: float64 (n,) milliseconds of its inferences, n of at least 1.
        rounds: at least 1.
    """
    warm_ups, settled = _warm_up(turns)
    laps: dict[str, list[float]] = {name: [] for name in turns}
    samples: dict[str, list[NDArray[np.float64]]] = {name: [] for name in turns}
    order = [*turns, *reversed(list(turns))]
    for _ in range(rounds):
        medians: dict[str, list[float]] = {name: [] for name in turns}
        for name in order:
            times = turns[name]()
            samples[name].append(times)
            medians[name].append(float(np.median(times)))
        for name, pair in medians.items():
            laps[name].append(sum(pair) / len(pair))
    return Interleaved(
        {name: np.array(values) for name, values in laps.items()},
        {name: np.concatenate(parts) for name, parts in samples.items()},
        warm_ups,
        settled,
    )


def _warm_up(turns: Mapping[str, Turn]) -> tuple[int, bool]:
    """Take turns until no candidate's median moves by more than ``SETTLED``; how many, and whether that came."""
    before = {name: float(np.median(turn())) for name, turn in turns.items()}
    for count in range(2, MOST_WARM_UPS + 1):
        now = {name: float(np.median(turn())) for name, turn in turns.items()}
        if all(abs(now[name] - before[name]) <= SETTLED * before[name] for name in turns):
            return count, True
        before = now
    return MOST_WARM_UPS, False
