"""Which sizes a graph with free axes can take: what meets in a Concat or a sum has to agree, and nothing may vanish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import onnx_graphsurgeon as gs
from onnx import ModelProto

from pipeline.graph.base import import_graph, is_standard, label
from pipeline.graph.promises import read_multiples
from pipeline.graph.shape_rules import Shape
from pipeline.graph.symbolic import Symbolic, roles
from pipeline.graph.symbols import LARGEST, Expr, Symbol, expr, substitute

BROADCASTING = ("Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min", "Where")
WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
# Nearest sizes are looked for this far away.
REACH = 1024


@dataclass(frozen=True)
class Condition:
    """Two sizes that have to be equal, or, without ``right``, one that has to be at least 1."""

    where: str
    left: Expr
    right: Expr | None = None
    broadcasts: bool = False

    def problem(self, symbol: Symbol, size: int) -> str:
        """What is wrong where the symbol has this size; empty where nothing is."""
        left = substitute(self.left, {symbol: size})
        if self.right is None:
            return "" if left >= 1 else f"at {self.where} nothing is left of it"
        right = substitute(self.right, {symbol: size})
        if left == right or (self.broadcasts and 1 in (left, right)):
            return ""
        return f"at {self.where} {left} meets {right}"


@dataclass(frozen=True)
class AxisSizes:
    """What the graph asks of one free axis of an input; conditions that join several axes are left out."""

    symbol: Symbol
    multiple: int
    conditions: tuple[Condition, ...]

    def problem(self, size: int) -> str:
        """Why the graph cannot take this size, in one clause; empty where nothing speaks against it."""
        if size % self.multiple:
            return f"it was cleaned for multiples of {self.multiple}"
        return next(filter(None, (condition.problem(self.symbol, size) for condition in self.conditions)), "")

    def nearest(self, size: int) -> tuple[int, ...]:
        """The next smaller and the next larger size that the graph can take, where there are such."""
        below = range(size, max(0, size - REACH), -1)
        above = range(size + 1, min(LARGEST, size + REACH))
        found = (next((other for other in side if not self.problem(other)), None) for side in (below, above))
        return tuple(other for other in found if other is not None)


def axis_sizes(model: ModelProto) -> dict[tuple[str, int], AxisSizes]:
    """For every free axis of every input, by input name and axis, what the graph asks of it.

    Shapes that the symbolic evaluation does not understand ask nothing.

    Args:
        model: not changed.

    Raises:
        ModelError: the graph cannot be read, or its promises are damaged.
    """
    graph, promised = import_graph(model), read_multiples(model)
    graph.multiples = {}  # every size counts here, not those alone that are promised
    known = Symbolic(graph)
    conditions = [condition for node in graph.nodes for condition in _conditions(known, node)]
    result = {}
    for tensor in graph.inputs:
        meanings = roles(tensor)
        for axis, size in enumerate(known.shape(tensor) or ()):
            symbols = _symbols(size)
            if len(symbols) != 1:
                continue
            (symbol,) = symbols
            multiple = promised.get(symbol.name, promised.get(meanings.get(axis, ""), 1))
            own = tuple(condition for condition in conditions if _symbols_of(condition) == symbols)
            result[tensor.name, axis] = AxisSizes(symbol, multiple, own)
    return result


def _conditions(known: Symbolic, node: gs.Node) -> Iterator[Condition]:
    where = f"{label(node)} ({node.op})"
    if is_standard(node, *WINDOWS):
        for size in known.shape(node.outputs[0]) or ():
            yield Condition(where, size)
    elif is_standard(node, "Concat"):
        shapes = [shape for tensor in node.inputs if (shape := known.shape(tensor))]
        for other in shapes[1:]:
            joined = node.attrs["axis"] % len(other)
            pairs = zip(shapes[0], other, strict=False)
            yield from (Condition(where, a, b) for axis, (a, b) in enumerate(pairs) if axis != joined and a != b)
    elif is_standard(node, *BROADCASTING):
        yield from _broadcast(where, [shape for tensor in node.inputs if (shape := known.shape(tensor))])


def _broadcast(where: str, shapes: list[Shape]) -> Iterator[Condition]:
    for place, first in enumerate(shapes):
        for other in shapes[place + 1 :]:
            pairs = zip(reversed(first), reversed(other), strict=False)
            yield from (Condition(where, a, b, True) for a, b in pairs if a != b and expr(1) not in (a, b))


def _symbols_of(condition: Condition) -> frozenset[Symbol]:
    return _symbols(condition.left) | (_symbols(condition.right) if condition.right is not None else frozenset())


def _symbols(size: Expr | Fraction) -> frozenset[Symbol]:
    found: set[Symbol] = set()
    for product, _ in expr(size).terms:
        for atom in product:
            found |= {atom} if isinstance(atom, Symbol) else _symbols(atom.inner)
    return frozenset(found)
