"""Minimum cut of a directed graph with integer capacities."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import pairwise


class MinimumCut:
    """Edges with capacities, and the source's side of a cut of least capacity.

    Augments along shortest paths (Edmonds and Karp, 1972). Of several least cuts it is the one with the smallest
    source side, so the answer depends on the edges alone, not on the order in which they came.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, int]] = {}

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """An edge; capacities of parallel edges add up, a loop has no effect."""
        if start == end:
            return
        forward = self._left.setdefault(start, {})
        forward[end] = forward.get(end, 0) + capacity
        self._left.setdefault(end, {}).setdefault(start, 0)

    def source_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """Every vertex that the cut leaves reachable from ``source``. The edges are used up: call it once."""
        while True:
            came_from = self._search(source, sink)
            if sink not in came_from:
                return set(came_from)
            path = [sink]
            while path[-1] != source:
                path.append(came_from[path[-1]])
            steps = [(start, end) for end, start in pairwise(path)]
            flow = min(self._left[start][end] for start, end in steps)
            for start, end in steps:
                self._left[start][end] -= flow
                self._left[end][start] += flow

    def _search(self, source: Hashable, sink: Hashable) -> dict[Hashable, Hashable]:
        came_from: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue and sink not in came_from:
            vertex = queue.popleft()
            for other, left in self._left.get(vertex, {}).items():
                if left > 0 and other not in came_from:
                    came_from[other] = vertex
                    queue.append(other)
        return came_from
