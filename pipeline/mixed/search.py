"""The search: which convolutions leave INT8 so that a budget is kept at the least time. Knows no graph and no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.mixed.report import Candidate, Figures, comparable

Nodes = frozenset[str]
# A gain in time below this is none, in milliseconds.
LEAST_MS = 1e-9


class Search:
    """Every candidate is judged as a whole graph, once, and recorded.

    1. All INT8 and all FP16 are judged first: the fastest one hopes for, and the answer that always keeps the budget.
    2. Where all INT8 does not keep it, convolutions are put in an order of leaving: whatever has the most sensitivity
       by millisecond lost comes next, the loss taken from where the order has come to, as borders move. The shortest
       beginning of that order that keeps the budget is found by doubling and bisection.
    3. From there, single changes in either direction that save time are tried, best saving by sensitivity first, and
       taken where the budget is still kept, until none is left.
    4. Beginnings of 1, 2, 4, … are judged too, for what more accuracy would cost.

    Args:
        names: of the convolutions that can be quantized, in the graph's order.
        sensitivity: how much one does alone, at least 0.
        milliseconds: with these in FP16 and the others in INT8.
        judge: the same as a whole graph.
        keeps: whether figures keep the budget.
        limit: of candidates, at least 2.
    """

    def __init__(
        self,
        names: Sequence[str],
        sensitivity: Mapping[str, float],
        milliseconds: Callable[[Nodes], float],
        judge: Callable[[Nodes], Figures],
        keeps: Callable[[Figures], bool],
        limit: int,
    ) -> None:
        self.names, self.sensitivity, self.milliseconds = names, sensitivity, milliseconds
        self.judge, self.keeps, self.limit = judge, keeps, limit
        self.tried: dict[Nodes, Candidate] = {}

    def run(self) -> tuple[Candidate, ...]:
        """All candidates in the order in which they were judged: first all FP16, then all INT8."""
        none: Nodes = frozenset()
        everything = frozenset(self.names)
        self._try(everything, "all FP16")
        order = self._order()
        found = none if self._try(none, "all INT8").kept else self._shortest_beginning(order)
        self._accept(found)
        self._improve(found)
        count = 1
        while count < len(order) and self._has_room():
            self._beginning(order, count)
            count *= 2
        return tuple(self.tried.values())

    def _shortest_beginning(self, order: Sequence[str]) -> Nodes:
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
        return frozenset(order[:keeping])

    def _beginning(self, order: Sequence[str], count: int) -> Candidate:
        more = f" and {count - 1} before it" if count > 1 else ""
        return self._try(frozenset(order[:count]), f"FP16: {order[count - 1]}{more}")

    def _order(self) -> list[str]:
        order: list[str] = []
        left = list(self.names)
        while left:
            now = frozenset(order)
            before = self.milliseconds(now)
            lost = {name: self.milliseconds(now | {name}) - before for name in left}
            # What costs nothing leaves first.
            order.append(max(left, key=lambda name: self.sensitivity[name] / max(lost[name], LEAST_MS)))
            left.remove(order[-1])
        return order

    def _improve(self, now: Nodes) -> None:
        while self._has_room():
            before = self.milliseconds(now)
            savings = {name: before - self.milliseconds(now ^ {name}) for name in self.names}
            moves = [name for name, saved in savings.items() if saved > LEAST_MS and now ^ {name} not in self.tried]
            if not moves:
                return
            best = max(moves, key=lambda name: savings[name] / max(self.sensitivity[name], LEAST_MS))
            if self._try(now ^ {best}, f"{'INT8' if best in now else 'FP16'}: {best}").kept:
                now ^= {best}
                self._accept(now)

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
