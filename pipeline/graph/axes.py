"""How each operator follows when the axes of its tensors are permuted.

``permuted = transpose(original, order)``: axis i of the permuted tensor is axis ``order[i]`` of the original one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from pipeline.graph.base import BROADCAST_OPSET, STANDARD, array_of, input_at
from pipeline.graph.shapes import unique

Order: TypeAlias = "tuple[int, ...]"

# fmt: off
UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu",
    "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish",
    "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)
BROADCAST = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)
REDUCE = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)
# fmt: on


@dataclass
class Edits:
    """What the moves of one graph add to it: new names, and new nodes with the node they stand before or behind."""

    taken: set[str]
    before: dict[int, list[gs.Node]] = field(default_factory=dict)
    behind: dict[int, list[gs.Node]] = field(default_factory=dict)

    def constant(self, like: gs.Tensor, values: Any) -> gs.Constant:
        return gs.Constant(unique(like.name, self.taken), np.ascontiguousarray(values))

    def variable(self, like: gs.Tensor, shape: Sequence[Any] | None) -> gs.Variable:
        return gs.Variable(unique(like.name, self.taken), like.dtype, None if shape is None else list(shape))

    def gather(self, source: gs.Tensor, indices: Sequence[int], result: gs.Tensor) -> gs.Node:
        """``result`` = the entries of a 1-D tensor, in another order. The caller places the node."""
        chosen = gs.Constant(unique(f"{result.name}.indices", self.taken), np.array(indices, np.int64))
        name = unique(f"{result.name}.gather", self.taken)
        return gs.Node("Gather", name, {"axis": 0}, [source, chosen], [result])


Apply: TypeAlias = Callable[[Edits], None]


@dataclass(frozen=True)
class Move:
    """The slots whose tensors are permuted together, and ``apply``: rewrites the rest of the node accordingly."""

    inputs: Order
    outputs: Order
    apply: Apply


Rule: TypeAlias = Callable[[gs.Node, Order, int], "Move | None"]


def move_for(node: gs.Node, order: Order, opset: int) -> Move | None:
    """How ``node`` computes the same on tensors permuted by ``order``; None where it cannot or need not be known."""
    rule = RULES.get(node.op)
    if rule is None or node.domain not in STANDARD or opset < BROADCAST_OPSET:
        return None
    return None if any(isinstance(v, gs.Graph) for v in node.attrs.values()) else rule(node, order, opset)


def inverse(order: Sequence[int]) -> Order:
    return tuple(int(axis) for axis in np.argsort(order))


def _nothing(edits: Edits) -> None:
    """Nothing but the permuted tensors changes."""


def _axes(values: Iterable[int], rank: int) -> tuple[int, ...] | None:
    axes = tuple(int(axis) + rank * (axis < 0) for axis in values)
    return axes if all(0 <= axis < rank for axis in axes) and len(set(axes)) == len(axes) else None


def _unary(node: gs.Node, order: Order, opset: int) -> Move | None:
    return Move((0,), (0,), _nothing)


def _dropout(node: gs.Node, order: Order, opset: int) -> Move | None:
    return Move((0,), tuple(i for i, tensor in enumerate(node.outputs) if not tensor.is_empty()), _nothing)


def _broadcast(node: gs.Node, order: Order, opset: int) -> Move | None:
    rank = len(order)
    tied: list[int] = []
    constants: list[tuple[int, Any]] = []
    for slot, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant):
            value = array_of(tensor)
            if value is None or value.ndim > rank:
                return None
            if value.size != 1:
                axes = value.reshape((1,) * (rank - value.ndim) + value.shape)
                constants.append((slot, axes.transpose(order)))
        elif tensor.shape is None or len(tensor.shape) > rank:
            return None
        elif len(tensor.shape) == rank:
            tied.append(slot)
        elif any(size != 1 for size in tensor.shape):
            return None

    def apply(edits: Edits) -> None:
        for slot, values in constants:
            node.inputs[slot] = edits.constant(node.inputs[slot], values)

    return Move(tuple(tied), (0,), apply)


def _concat(node: gs.Node, order: Order, opset: int) -> Move | None:
    axes = _axes([node.attrs["axis"]], len(order))
    constants = [slot for slot, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant)]
    values = [array_of(node.inputs[slot]) for slot in constants]
    if axes is None or any(value is None or value.ndim != len(order) for value in values):
        return None

    def apply(edits: Edits) -> None:
        node.attrs["axis"] = order.index(axes[0])
        for slot, value in zip(constants, values, strict=True):
            node.inputs[slot] = edits.constant(node.inputs[slot], value.transpose(order))

    return Move(tuple(slot for slot in range(len(node.inputs)) if slot not in constants), (0,), apply)


def _along_axis(node: gs.Node, order: Order, default: int) -> Move | None:
    axes = _axes([node.attrs.get("axis", default)], len(order))
    if axes is None:
        return None

    def apply(edits: Edits) -> None:
        node.attrs["axis"] = order.index(axes[0])

    return Move((0,), tuple(range(len(node.outputs))), apply)


def _split(node: gs.Node, order: Order, opset: int) -> Move | None:
    return _along_axis(node, order, 0)


def _softmax(node: gs.Node, order: Order, opset: int) -> Move | None:
    # Before opset 13 it normalises over all axes from ``axis`` on.
    return _along_axis(node, order, -1) if opset >= 13 else None


def _normalize(node: gs.Node, order: Order, opset: int) -> Move | None:
    return _along_axis(node, order, -1)


def _quantize(node: gs.Node, order: Order, opset: int) -> Move | None:
    scale = input_at(node, 1)
    if node.attrs.get("block_size", 0) or scale is None or scale.shape is None or len(scale.shape) > 1:
        return None
    if all(size == 1 for size in scale.shape):
        return Move((0,), (0,), _nothing)
    return _along_axis(node, order, 1)


def _batchnorm(node: gs.Node, order: Order, opset: int) -> Move | None:
    plain = node.attrs.get("spatial", 1) and len(node.outputs) == 1
    return Move((0,), (0,), _nothing) if plain and order[1] == 1 else None


def _without(axes: Sequence[int], order: Order) -> bool:
    """Whether the axes that are left when ``axes`` are gone stand in the same order in both layouts."""
    return [axis for axis in order if axis not in axes] == [axis for axis in range(len(order)) if axis not in axes]


def _set_axes(node: gs.Node, slot: int, axes: Sequence[int]) -> Apply:
    """Write ``axes`` where the node has them: in its attribute, or in the input slot."""

    def apply(edits: Edits) -> None:
        if "axes" in node.attrs:
            node.attrs["axes"] = list(axes)
        else:
            node.inputs[slot] = edits.constant(node.inputs[slot], np.array(axes, np.int64))

    return apply


def _given_axes(node: gs.Node, slot: int, rank: int) -> tuple[int, ...] | None:
    """Constant axes of a node, counted from 0; empty where it has none, None where the graph computes them."""
    tensor = input_at(node, slot)
    values = node.attrs.get("axes", ()) if tensor is None else array_of(tensor)
    return None if values is None else _axes(values, rank)


def _reduce(node: gs.Node, order: Order, opset: int) -> Move | None:
    rank = len(order)
    axes = _given_axes(node, 1, rank)
    if axes is None or (not axes and node.attrs.get("noop_with_empty_axes", 0)):
        return None
    apply = _set_axes(node, 1, [order.index(axis) for axis in axes]) if axes else _nothing
    if node.attrs.get("keepdims", 1):
        return Move((0,), (0,), apply)
    return Move((0,), (), apply) if _without(axes or range(rank), order) else None


def _argmax(node: gs.Node, order: Order, opset: int) -> Move | None:
    move = _along_axis(node, order, 0)
    if move is None or node.attrs.get("keepdims", 1):
        return move
    axis = node.attrs.get("axis", 0) % len(order)
    return Move((0,), (), move.apply) if _without([axis], order) else None


def _squeeze(node: gs.Node, order: Order, opset: int) -> Move | None:
    axes = _given_axes(node, 1, len(order))
    if not axes or not _without(axes, order):
        return None
    return Move((0,), (), _set_axes(node, 1, [order.index(axis) for axis in axes]))


def _unsqueeze(node: gs.Node, order: Order, opset: int) -> Move | None:
    axes = _given_axes(node, 1, len(order))
    if not axes or not _without(axes, order):
        return None
    return Move((), (0,), _set_axes(node, 1, [order.index(axis) for axis in axes]))


def _gather(node: gs.Node, order: Order, opset: int) -> Move | None:
    move, indices = _along_axis(node, order, 0), node.inputs[1].shape
    if move is None or indices is None or len(indices) > 1:
        return None
    if len(indices) == 1:
        return move
    axis = node.attrs.get("axis", 0) % len(order)
    return Move((0,), (), move.apply) if _without([axis], order) else None


def _shape(node: gs.Node, order: Order, opset: int) -> Move | None:
    wanted = inverse(order)[node.attrs.get("start", 0) : node.attrs.get("end", len(order))]

    def apply(edits: Edits) -> None:
        for key in ("start", "end"):
            node.attrs.pop(key, None)
        result = node.outputs[0]
        node.outputs[0] = edits.variable(result, [len(order)])
        edits.behind.setdefault(id(node), []).append(edits.gather(node.outputs[0], wanted, result))

    return Move((0,), (), apply)


def _size(node: gs.Node, order: Order, opset: int) -> Move | None:
    return Move((0,), (), _nothing)


def _reorder(node: gs.Node, slot: int, indices: Sequence[int]) -> Apply | None:
    """Take the entries of a 1-D input in another order: now where it is constant, else by a Gather."""
    tensor = input_at(node, slot)
    value = array_of(tensor)
    if tensor is None or (value is not None and value.size == 0):
        return _nothing
    if value is not None and value.shape != (len(indices),):
        return None
    if value is None and (isinstance(tensor, gs.Constant) or tensor.shape != [len(indices)]):
        return None

    def apply(edits: Edits) -> None:
        if value is not None:
            node.inputs[slot] = edits.constant(tensor, value[list(indices)])
        else:
            result = edits.variable(tensor, tensor.shape)
            edits.before.setdefault(id(node), []).append(edits.gather(tensor, indices, result))
            node.inputs[slot] = result

    return apply


def _all_of(*steps: Apply | None) -> Apply | None:
    known = [step for step in steps if step is not None]
    if len(known) < len(steps):
        return None

    def apply(edits: Edits) -> None:
        for step in known:
            step(edits)

    return apply


def _moved(apply: Apply | None) -> Move | None:
    return None if apply is None else Move((0,), (0,), apply)


def _pad(node: gs.Node, order: Order, opset: int) -> Move | None:
    rank = len(order)
    both = (*order, *(axis + rank for axis in order))
    if opset < 11:
        widths = node.attrs["pads"]

        def apply(edits: Edits) -> None:
            node.attrs["pads"] = [widths[index] for index in both]

        return Move((0,), (0,), apply) if len(widths) == len(both) else None
    if input_at(node, 3) is None:
        return _moved(_reorder(node, 1, both))
    axes = _given_axes(node, 3, rank)
    return _moved(_set_axes(node, 3, [order.index(axis) for axis in axes])) if axes else None


def _upsample(node: gs.Node, order: Order, opset: int) -> Move | None:
    if opset >= 9:
        return _moved(_reorder(node, 1, order)) if _trailing(node, order, array_of(input_at(node, 1))) else None
    scales = node.attrs["scales"]

    def apply(edits: Edits) -> None:
        node.attrs["scales"] = [scales[axis] for axis in order]

    return Move((0,), (0,), apply) if _trailing(node, order, scales) else None


def _resize(node: gs.Node, order: Order, opset: int) -> Move | None:
    rank = len(order)
    if opset < 11:
        return _upsample(node, order, opset)
    if "axes" in node.attrs:
        axes = _axes(node.attrs["axes"], rank)
        if axes is None or any(order[i] in axes for i in (0, 1)):
            return None
        return _moved(_set_axes(node, -1, [order.index(axis) for axis in axes]))
    if not _trailing(node, order, array_of(input_at(node, 2))):
        return None
    both = (*order, *(axis + rank for axis in order))
    return _moved(_all_of(_reorder(node, 1, both), _reorder(node, 2, order), _reorder(node, 3, order)))


def _trailing(node: gs.Node, order: Order, scales: Any) -> bool:
    """Whether the permuted node leaves its first two axes alone: N and C, the form that engines and runtimes take."""
    known = scales is not None and len(scales) == len(order)
    given, wanted = node.inputs[0].shape, node.outputs[0].shape
    for axis in order[:2]:
        if known and scales[axis] == 1:
            continue
        if known or given is None or wanted is None or given[axis] in (None, "") or given[axis] != wanted[axis]:
            return False
    return True


def _slice(node: gs.Node, order: Order, opset: int) -> Move | None:
    rank = len(order)
    count: int | None
    if opset < 10:
        count = len(node.attrs["starts"])
    else:
        starts = node.inputs[1].shape
        count = starts[0] if starts and isinstance(starts[0], int) else None
    axes = _given_axes(node, 3, rank) if count else None
    if axes is None or count is None or count > rank:
        return None
    moved = [order.index(axis) for axis in axes or range(count)]

    def apply(edits: Edits) -> None:
        if opset < 10:
            node.attrs["axes"] = moved
            return
        while len(node.inputs) < 4:
            node.inputs.append(gs.Variable.empty())
        like = node.inputs[1] if node.inputs[3].is_empty() else node.inputs[3]
        node.inputs[3] = edits.constant(like, np.array(moved, np.int64))

    return Move((0,), (0,), apply)


def _tile(node: gs.Node, order: Order, opset: int) -> Move | None:
    return _moved(_reorder(node, 1, order))


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCE, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("ArgMax", "ArgMin"), _argmax),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("Tile", "Expand"), _tile),
    "BatchNormalization": _batchnorm,
    "Concat": _concat,
    "Dropout": _dropout,
    "Gather": _gather,
    "LpNormalization": _normalize,
    "Pad": _pad,
    "Resize": _resize,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Upsample": _upsample,
}
