"""The search: which convolutions leave INT8 so that a budget is kept at the least time. Knows no graph and no GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.mixed.report import Candidate, Figures, comparable

Nodes = frozenset[str]
# A gain in time below this is none, in milliseconds.
LEAST_MS = 1e-9


class Search:
    """Every candidate is judged as a whole graph, once, and recorded.

    A move takes one convolution, or one group of them, to FP16 or to INT8.

    1. All INT8 and all FP16 are judged first: the fastest one hopes for, and the answer that always keeps the budget.
    2. Where all INT8 does not keep it, moves are put in an order of leaving: whatever has the most sensitivity by
       millisecond lost comes next, the loss taken from where the order has come to, as borders move. The shortest
       beginning of that order that keeps the budget is found by doubling and bisection.
    3. From there, and first from all FP16 where that is estimated to be faster, moves in either direction that save
       time are tried, best saving by sensitivity first, and taken where the budget is still kept, until none is left.
       Last come those with more sensitivity in INT8 than a candidate that exceeded the budget; those that leave fewer
       in FP16 than such a candidate, and no other ones, are not tried.
    4. Beginnings of 1, 2, 4, … moves are judged too, for what more accuracy would cost.

    Args:
        names: of the convolutions that can be quantized, in the graph's order.
        sensitivity: how much one does alone, at least 0; that of a group is its convolutions' sum.
        milliseconds: with these in FP16 and the others in INT8; what it says may change from one ``run`` to the next.
        judge: the same as a whole graph.
        keeps: whether figures keep the budget.
        groups: of convolutions by name, which move together.
    """

    def __init__(
        self,
        names: Sequence[str],
        sensitivity: Mapping[str, float],
        milliseconds: Callable[[Nodes], float],
        judge: Callable[[Nodes], Figures],
        keeps: Callable[[Figures], bool],
        groups: Mapping[str, Nodes],
    ) -> None:
        self.names, self.sensitivity, self.milliseconds = names, sensitivity, milliseconds
        self.judge, self.keeps = judge, keeps
        self.moves: dict[str, Nodes] = {**groups, **{name: frozenset([name]) for name in names}}
        self.limit = 0
        self.tried: dict[Nodes, Candidate] = {}

    def run(self, limit: int) -> tuple[Candidate, ...]:
        """All candidates in the order in which they were judged: first all FP16, then all INT8.

        Called again, it goes on with those that it has judged, and with what ``milliseconds`` says now.

        Args:
            limit: of candidates, those of earlier calls included; at least 2.
        """
        self.limit = limit
        none: Nodes = frozenset()
        everything = frozenset(self.names)
        self._try(everything, "all FP16")
        order: list[tuple[str, Nodes]] = []
        if self._try(none, "all INT8").kept:
            found = none
        else:
            order = self._order()
            found = self._shortest_beginning(order)
        if self.milliseconds(everything) < self.milliseconds(found):
            self._improve(everything)
        self._improve(found)
        count = 1
        while count < len(order) and self._has_room():
            self._beginning(order, count)
            count *= 2
        return tuple(replace(one, estimated_ms=self.milliseconds(half)) for half, one in self.tried.items())

    def _shortest_beginning(self, order: Sequence[tuple[str, Nodes]]) -> Nodes:
        failing, keeping, step = 0, len(order), 1
        while failing + step < len(order) and self._has_room():
            if self._beginning(order, failing + step).kept:
                keeping = failing + step
                break
            failing, step = failing + step, 2 * step
        while keeping - failing > 1 and self._has_room():
            middle = (failing + keeping) // 2
            if self._beginning(order, middle).kept:
                keeping = middle
            else:
                failing = middle
        return order[keeping - 1][1]

    def _beginning(self, order: Sequence[tuple[str, Nodes]], count: int) -> Candidate:
        name, half = order[count - 1]
        more = f" after {count - 1} moves" if count > 1 else ""
        return self._try(half, f"FP16: {name}{more}")

    def _order(self) -> list[tuple[str, Nodes]]:
        """Moves to FP16 from all INT8 to all FP16: name, and what is in FP16 then."""
        order: list[tuple[str, Nodes]] = []
        now: Nodes = frozenset()
        while len(now) < len(self.names):
            before = self.milliseconds(now)
            # What costs nothing leaves first.
            gains = {
                name: self._sensitivity(nodes - now) / max(self.milliseconds(now | nodes) - before, LEAST_MS)
                for name, nodes in self.moves.items()
                if nodes - now
            }
            best = max(gains, key=lambda name: gains[name])
            now |= self.moves[best]
            order.append((best, now))
        return order

    def _improve(self, now: Nodes) -> None:
        self._accept(now)
        while self._has_room():
            before = self.milliseconds(now)
            exceeding = [half for half, one in self.tried.items() if not one.kept]
            too_much = min((self._lost(half) for half in exceeding), default=math.inf)
            moves = []
            for name, nodes in self.moves.items():
                for precision, half in (("FP16", now | nodes), ("INT8", now - nodes)):
                    saved = before - self.milliseconds(half)
                    if saved > LEAST_MS and half not in self.tried and not any(half < other for other in exceeding):
                        lost = self._lost(half)
                        gain = saved / max(lost - self._lost(now), LEAST_MS)
                        moves.append((lost < too_much, gain, f"{precision}: {name}", half))
            if not moves:
                return
            *_, move, half = max(moves, key=lambda each: each[:2])
            if self._try(half, move).kept:
                now = half
                self._accept(now)

    def _lost(self, half: Nodes) -> float:
        """What INT8 is expected to cost."""
        return sum(self.sensitivity[name] for name in self.names if name not in half)

    def _sensitivity(self, nodes: Nodes) -> float:
        return sum(self.sensitivity[name] for name in nodes)

    def _try(self, half: Nodes, move: str) -> Candidate:
        if half not in self.tried:
            figures = self.judge(half)
            names = tuple(name for name in self.names if name in half)
            self.tried[half] = Candidate(
                move, names, figures, self.milliseconds(half), self.keeps(figures), accepted=False
            )
        return self.tried[half]

    def _accept(self, half: Nodes) -> None:
        self.tried[half] = replace(self.tried[half], accepted=True)

    def _has_room(self) -> bool:
        return len(self.tried) < self.limit


def runs_and_ends(blocks: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Nodes]:
    """Groups of convolutions by name: every run of neighbouring blocks, and every beginning together with an end.

    The finest resolution of a UNet, say, is its first and its last block: with all else in INT8, few borders lie
    between them, and these at small tensors.

    Args:
        blocks: name and convolutions of each, in the graph's order.
    """
    groups: dict[str, Nodes] = {}
    everything = frozenset(name for _, nodes in blocks for name in nodes)
    for start, end in itertools.combinations(range(len(blocks) + 1), 2):
        run = frozenset(name for _, nodes in blocks[start:end] for name in nodes)
        first, last = blocks[start][0], blocks[end - 1][0]
        groups[first if end - start == 1 else f"{first} to {last}"] = run
        if start > 0 and end < len(blocks):
            groups[f"all but {first} to {last}" if end - start > 1 else f"all but {first}"] = everything - run
    return groups


def with_front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, told which of them no other one with a ``comparable`` time beats in both time and loss."""
    rivals = comparable(candidates)
    points = {(one.ms, one.figures.loss) for one in rivals}

    def best(one: Candidate) -> bool:
        ms, loss = one.ms, one.figures.loss
        return one in rivals and not any(a <= ms and b <= loss for a, b in points - {(ms, loss)})

    return tuple(replace(one, best=best(one)) for one in candidates)


def fastest_kept(candidates: Sequence[Candidate]) -> int:
    """Place of the fastest candidate with a ``comparable`` time that keeps the budget.

    Of equally fast ones the one closest to FP32.
    """
    kept = [one for one in comparable(candidates) if one.kept]
    return candidates.index(min(kept, key=lambda one: (one.ms, one.figures.loss)))
