"""How each operator of shape arithmetic makes its output's entries from those of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from pipeline.graph.base import constant_value, input_at
from pipeline.graph.shape_rules import MOST, Known, Value, array, axes_of, product, sizes_of, slice_parts, unsqueeze
from pipeline.graph.symbols import Expr, ceil, exact, expr, floor, least, nonnegative, ratio

INTEGERS = (TensorProto.INT32, TensorProto.INT64)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


def _sizes(known: Known, node: gs.Node) -> Value | None:
    entries = sizes_of(known, node)
    return None if entries is None else array(entries, (len(entries),))


def _size_value(known: Known, node: gs.Node) -> Value | None:
    shape = known.shape(node.inputs[0])
    return None if shape is None else array([product(shape)], ())


def _first(known: Known, node: gs.Node) -> Value:
    value = known.value(node.inputs[0])
    assert value is not None
    return value


def _gather_value(known: Known, node: gs.Node) -> Value | None:
    data, indices = _first(known, node), known.integers(node.inputs[1])
    shape = known.value(node.inputs[1])
    if indices is None or shape is None or data.ndim == 0:
        return None
    axis = node.attrs.get("axis", 0)
    if any(not -data.shape[axis] <= index < data.shape[axis] for index in indices):
        return None
    return np.asarray(np.take(data, np.array(indices, int).reshape(shape.shape), axis))


def _slice_value(known: Known, node: gs.Node) -> Value | None:
    data = _first(known, node)
    parts = slice_parts(known, node, data.ndim) if data.ndim else None
    if parts is None:
        return None
    picks: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in parts:
        first, last = start.integer, end.integer
        if first is None or last is None:
            return None
        size = data.shape[axis]
        if step < 0 and last < -size:  # "before the first" is None to Python
            picks[axis] = slice(first, None, step)
        else:
            picks[axis] = slice(first, last, step)
    return np.asarray(data[tuple(picks)])


def _concat_value(known: Known, node: gs.Node) -> Value | None:
    parts = [known.value(tensor) for tensor in node.inputs]
    return np.concatenate([part for part in parts if part is not None], node.attrs["axis"])


def _reshape_value(known: Known, node: gs.Node) -> Value | None:
    data, wanted = _first(known, node), known.integers(node.inputs[1])
    if wanted is None or (0 in wanted and node.attrs.get("allowzero", 0)):
        return None
    return data.reshape([data.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)])


def _unsqueeze_value(known: Known, node: gs.Node) -> Value | None:
    shape = unsqueeze(known, node)
    return None if shape is None else _first(known, node).reshape([size.integer or 0 for size in shape])


def _squeeze_value(known: Known, node: gs.Node) -> Value | None:
    data = _first(known, node)
    if input_at(node, 1) is None and "axes" not in node.attrs:
        return np.asarray(data.squeeze())
    axes = axes_of(known, node, data.ndim)
    return None if axes is None else np.asarray(data.squeeze(tuple(axes)))


def _transpose_value(known: Known, node: gs.Node) -> Value | None:
    return np.transpose(_first(known, node), node.attrs.get("perm"))


def _expand_value(known: Known, node: gs.Node) -> Value | None:
    wanted = known.integers(node.inputs[1])
    data = _first(known, node)
    if wanted is None or math.prod(wanted) > MOST:
        return None
    return np.asarray(np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(wanted))))


def _constant_of_shape_value(known: Known, node: gs.Node) -> Value | None:
    wanted = known.integers(node.inputs[0])
    if wanted is None or math.prod(wanted) > MOST:
        return None
    filling = node.attrs.get("value")
    number = constant_value(filling).item() if filling is not None else 0
    return array([expr(Fraction(number))] * math.prod(wanted), wanted)


def _cast_value(known: Known, node: gs.Node) -> Value | None:
    data, to = _first(known, node), node.attrs["to"]
    if data.dtype == bool:
        return data if to == TensorProto.BOOL else array([expr(int(entry)) for entry in data.flat], data.shape)
    if to in INTEGERS:
        return _each(_truncate, data)
    if to in FLOATS:
        return data if all(exact(entry) for entry in data.flat) else None
    return None


def _each(rule: Callable[..., Any], *arrays: Value) -> Value | None:
    """The rule on every group of entries, broadcast; None where it gives None for one."""
    wide = np.broadcast_arrays(*arrays)
    entries = [rule(*group) for group in zip(*(array.flat for array in wide), strict=True)]
    if any(entry is None for entry in entries):
        return None
    if entries and all(isinstance(entry, bool) for entry in entries):
        return np.array(entries).reshape(wide[0].shape)
    return array(entries, wide[0].shape)


def _truncate(value: Expr) -> Expr | None:
    if value.whole:
        return value
    if nonnegative(value):
        return floor(value)
    return ceil(value) if nonnegative(-value) else None


def _arithmetic(node: gs.Node, known: Known, rule: Callable[[Expr, Expr, bool], Any]) -> Value | None:
    left, right = known.value(node.inputs[0]), known.value(node.inputs[1])
    if left is None or right is None or left.dtype == bool or right.dtype == bool:
        return None
    whole = known.element_type(node.inputs[0]) in INTEGERS
    result = _each(lambda a, b: rule(a, b, whole), left, right)
    if result is None or whole or result.dtype == bool:
        return result
    return result if all(exact(entry) for entry in result.flat) else None


def _quotient(a: Expr, b: Expr, whole: bool) -> Expr | None:
    constant = ratio(a, b)
    if constant is None and not a.terms and (least(b) or 0) > 0:
        constant = Fraction(0)
    if constant is not None:
        return expr(math.trunc(constant)) if whole else expr(constant)
    number = b.constant
    if number is None or number == 0:
        return None
    result = a * (1 / number)
    if not whole or result.whole:
        return result
    if number < 0:
        a = -a
    return floor(result) if nonnegative(a) else ceil(result) if nonnegative(-a) else None


def _remainder(a: Expr, b: Expr, whole: bool) -> Expr | None:
    number = b.integer
    return a - floor(a * Fraction(1, number)) * number if whole and number is not None and number > 0 else None


def _largest(a: Expr, b: Expr, whole: bool) -> Expr | None:
    return a if nonnegative(a - b) else b if nonnegative(b - a) else None


def _smallest(a: Expr, b: Expr, whole: bool) -> Expr | None:
    return b if nonnegative(a - b) else a if nonnegative(b - a) else None


def _equal(a: Expr, b: Expr, whole: bool) -> bool | None:
    if a == b:
        return True
    apart = nonnegative(a - b - Fraction(1)) or nonnegative(b - a - Fraction(1))
    return False if whole and apart else None


def _where(known: Known, node: gs.Node) -> Value | None:
    condition, yes, no = (known.value(tensor) for tensor in node.inputs)
    if condition is None or condition.dtype != bool or yes is None or no is None:
        return None
    shape = np.broadcast_shapes(condition.shape, yes.shape, no.shape)
    picks = zip(*(np.broadcast_to(array, shape).flat for array in (condition, yes, no)), strict=True)
    return array([y if c else n for c, y, n in picks], shape)


def _floor_value(known: Known, node: gs.Node) -> Value | None:
    return _each(floor, _first(known, node))


def _ceil_value(known: Known, node: gs.Node) -> Value | None:
    return _each(ceil, _first(known, node))


def _negative(known: Known, node: gs.Node) -> Value | None:
    return _each(lambda entry: -entry, _first(known, node))


def _by(rule: Callable[[Expr, Expr, bool], Any]) -> Callable[[Known, gs.Node], Value | None]:
    return lambda known, node: _arithmetic(node, known, rule) if len(node.inputs) == 2 else None


def _mod(known: Known, node: gs.Node) -> Value | None:
    return None if node.attrs.get("fmod", 0) else _arithmetic(node, known, _remainder)


VALUES: dict[str, Callable[[Known, gs.Node], Value | None]] = {
    "Shape": _sizes,
    "Size": _size_value,
    "Gather": _gather_value,
    "Slice": _slice_value,
    "Concat": _concat_value,
    "Reshape": _reshape_value,
    "Unsqueeze": _unsqueeze_value,
    "Squeeze": _squeeze_value,
    "Transpose": _transpose_value,
    "Expand": _expand_value,
    "ConstantOfShape": _constant_of_shape_value,
    "Cast": _cast_value,
    "Identity": _first,
    "Floor": _floor_value,
    "Ceil": _ceil_value,
    "Neg": _negative,
    "Where": _where,
    "Add": _by(lambda a, b, whole: a + b),
    "Sub": _by(lambda a, b, whole: a - b),
    "Mul": _by(lambda a, b, whole: a * b),
    "Div": _by(_quotient),
    "Mod": _mod,
    "Max": _by(_largest),
    "Min": _by(_smallest),
    "Equal": _by(_equal),
}
