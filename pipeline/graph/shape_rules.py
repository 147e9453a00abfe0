"""How each operator makes its output's shape from the shapes, and the known values, of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.base import constant_value, input_at
from pipeline.graph.symbols import LARGEST, Expr, ceil, divide, exact, expr, floor, nonnegative

# More entries than shape arithmetic ever has: larger tensors are data.
MOST = 64

Shape: TypeAlias = "tuple[Expr, ...]"
# Of Expr (dtype object), or of bool where the tensor is a comparison.
Value: TypeAlias = "NDArray[Any]"


class Known(Protocol):
    """What is known of a graph so far: see ``symbolic.Symbolic``."""

    def shape(self, tensor: gs.Tensor | None) -> Shape | None: ...

    def value(self, tensor: gs.Tensor | None) -> Value | None: ...

    def integers(self, tensor: gs.Tensor | None) -> list[int] | None: ...

    def element_type(self, tensor: gs.Tensor) -> int: ...

    def unknown(self, tensor: gs.Tensor, axis: int) -> Expr: ...


def as_value(constant: NDArray[Any]) -> Value | None:
    """An initializer's entries as expressions; None where it is no shape arithmetic."""
    if constant.size > MOST or constant.ndim > 2:
        return None
    if constant.dtype.kind == "b":
        return np.asarray(constant)
    if constant.dtype.kind not in "if" or not np.isfinite(constant).all():
        return None
    return array([expr(Fraction(entry)) for entry in constant.ravel().tolist()], constant.shape)


def array(entries: Sequence[Any], shape: Sequence[int]) -> Value:
    """Entries in row-major order as an array of objects."""
    result = np.empty(len(entries), object)
    result[:] = entries
    return result.reshape(tuple(shape))


def broadcast(known: Known, shapes: Sequence[Shape | None], node: gs.Node) -> Shape | None:
    """Sizes after broadcasting; an axis on which two unknown sizes meet gets a symbol of the node's own."""
    if any(shape is None for shape in shapes):
        return None
    present = [shape for shape in shapes if shape is not None]
    rank = max((len(shape) for shape in present), default=0)
    sizes: list[Expr] = []
    for axis in range(rank):
        column = [shape[axis - rank + len(shape)] for shape in present if axis - rank + len(shape) >= 0]
        others = [size for size in dict.fromkeys(column) if size.integer != 1]
        fixed = [size for size in others if size.integer is not None]
        if fixed or len(others) < 2:
            sizes.append((fixed or others or [expr(1)])[0])
        else:
            sizes.append(known.unknown(node.outputs[0], axis))
    return tuple(sizes)


def _window(sizes: Sequence[Expr], node: gs.Node, kernel: Sequence[int], dilations: Sequence[int]) -> list[Expr] | None:
    """Output sizes of a convolution or pooling window; None where the last window of ceil_mode might be dropped."""
    count = len(sizes)
    strides = node.attrs.get("strides") or [1] * count
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        return [ceil(size * Fraction(1, stride)) for size, stride in zip(sizes, strides, strict=True)]
    pads = (node.attrs.get("pads") if auto == "NOTSET" else None) or [0] * (2 * count)
    rounding = floor
    if node.attrs.get("ceil_mode", 0):
        if any(pads) or any(k < stride for k, stride in zip(kernel, strides, strict=True)):
            return None
        rounding = ceil
    result = []
    for axis, size in enumerate(sizes):
        extent = size + (pads[axis] + pads[axis + count] - dilations[axis] * (kernel[axis] - 1) - 1)
        result.append(rounding(extent * Fraction(1, strides[axis])) + 1)
    return result


def _conv(known: Known, node: gs.Node) -> Shape | None:
    data, weight = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    if data is None or weight is None:
        return None
    kernel = [size.integer for size in weight[2:]]
    if any(size is None for size in kernel):
        return None
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    spatial = _window(data[2:], node, [int(size) for size in kernel if size is not None], dilations)
    return None if spatial is None else (data[0], weight[0], *spatial)


def _pool(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    if data is None:
        return None
    kernel = node.attrs["kernel_shape"]
    spatial = _window(data[2:], node, kernel, node.attrs.get("dilations") or [1] * len(kernel))
    return None if spatial is None else (*data[:2], *spatial)


def _global_pool(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    return None if data is None else (*data[:2], *[expr(1)] * (len(data) - 2))


def _conv_transpose(known: Known, node: gs.Node) -> Shape | None:
    data, weight = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    if data is None or weight is None or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    count = len(data) - 2
    if node.attrs.get("output_shape"):
        return None
    strides = node.attrs.get("strides") or [1] * count
    dilations = node.attrs.get("dilations") or [1] * count
    pads = node.attrs.get("pads") or [0] * (2 * count)
    extra = node.attrs.get("output_padding") or [0] * count
    spatial = [
        (data[2 + i] - 1) * strides[i] + extra[i] + (weight[2 + i] - 1) * dilations[i] + (1 - pads[i] - pads[i + count])
        for i in range(count)
    ]
    return (data[0], weight[1] * node.attrs.get("group", 1), *spatial)


def _resize(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    if data is None or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    axes = [axis % len(data) for axis in node.attrs.get("axes", range(len(data)))]
    sizes = known.value(input_at(node, 3))
    if sizes is not None and sizes.size == len(axes):
        new = {axis: sizes.flat[i] for i, axis in enumerate(axes)}
    else:
        scales = constant_value(input_at(node, 2))
        if scales is None or scales.size != len(axes):
            return None
        new = {}
        for axis, scale in zip(axes, scales.tolist(), strict=True):
            factor = Fraction(scale)
            result = data[axis] * factor
            if not exact(result):  # ONNX Runtime multiplies in float32, others in float64
                return None
            new[axis] = floor(result)
    return tuple(new.get(axis, size) for axis, size in enumerate(data))


def _concat(known: Known, node: gs.Node) -> Shape | None:
    shapes = [known.shape(tensor) for tensor in node.inputs]
    if any(shape is None for shape in shapes):
        return None
    parts = [shape for shape in shapes if shape is not None]
    axis = node.attrs["axis"] % len(parts[0])
    result = []
    for place in range(len(parts[0])):
        column = [part[place] for part in parts]
        if place == axis:
            total = expr(0)
            for size in column:
                total = total + size
            result.append(total)
        else:  # they are equal wherever the graph runs at all
            result.append(next((size for size in column if size.integer is not None), column[0]))
    return tuple(result)


def _pad(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    tensor = input_at(node, 1)
    widths = known.value(tensor) if tensor is not None else as_value(np.array(node.attrs.get("pads", [0.5])))
    if data is None or widths is None:
        return None
    axes = known.integers(input_at(node, 3)) if input_at(node, 3) is not None else list(range(len(data)))
    if axes is None or widths.size != 2 * len(axes):
        return None
    result = list(data)
    for i, axis in enumerate(axes):
        result[axis] = result[axis] + widths.flat[i] + widths.flat[i + len(axes)]
    return tuple(result)


def _transpose(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    return None if data is None else tuple(data[axis] for axis in node.attrs.get("perm", range(len(data))[::-1]))


def slice_parts(known: Known, node: gs.Node, rank: int) -> list[tuple[int, Expr, Expr, int]] | None:
    """(axis, start, end, step) of a Slice; None where any of them is unknown."""
    found: dict[str, Any] = {}
    for slot, key in enumerate(("starts", "ends", "axes", "steps"), 1):
        tensor = input_at(node, slot)
        if tensor is not None:
            value = known.value(tensor)
            if value is None:
                return None
            found[key] = list(value.flat)
        else:
            found[key] = [expr(number) for number in node.attrs[key]] if key in node.attrs else None
    starts, ends = found["starts"], found["ends"]
    if starts is None or ends is None:
        return None
    axes = [entry.integer for entry in found["axes"] or map(expr, range(len(starts)))]
    steps = [entry.integer for entry in found["steps"] or [expr(1)] * len(starts)]
    if any(number is None for number in (*axes, *steps)):
        return None
    return [(axis % rank, start, end, step) for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)]


def _slice(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    if data is None:
        return None
    parts = slice_parts(known, node, len(data))
    if parts is None:
        return None
    result = list(data)
    for axis, start, end, step in parts:
        low, high = _bound(start, data[axis]), _bound(end, data[axis])
        if low is None or high is None or step < 1:
            return None
        extent = high - low
        if not nonnegative(extent):
            return None
        result[axis] = ceil(extent * Fraction(1, step))
    return tuple(result)


def _bound(place: Expr, size: Expr) -> Expr | None:
    """A start or end of a Slice, clamped to 0…size; None where it is not decided for all sizes."""
    number = place.integer
    if number is not None and number >= LARGEST:
        return size
    if number is not None and number < 0:
        return size + number if nonnegative(size + number) else None
    if nonnegative(place) and nonnegative(size - place):
        return place
    return size if nonnegative(place - size) else None


def _reshape(known: Known, node: gs.Node) -> Shape | None:
    data, wanted = known.shape(node.inputs[0]), known.value(node.inputs[1])
    if data is None or wanted is None or wanted.ndim != 1:
        return None
    result: list[Expr | None] = []
    for axis, entry in enumerate(wanted):
        if entry.integer == 0 and not node.attrs.get("allowzero", 0):
            if axis >= len(data):
                return None
            entry = data[axis]
        result.append(None if entry.integer == -1 else entry)
    rest = product([size for size in result if size is not None])
    total = product(data)
    if None in result:
        missing = divide(total, rest)
        if result.count(None) > 1 or missing is None:
            return None
        return tuple(missing if size is None else size for size in result)
    return tuple(size for size in result if size is not None)


def product(sizes: Sequence[Expr]) -> Expr:
    total = expr(1)
    for size in sizes:
        total = total * size
    return total


def _flatten(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    if data is None:
        return None
    axis = node.attrs.get("axis", 1)
    axis = axis + len(data) if axis < 0 else axis
    return (product(data[:axis]), product(data[axis:]))


def axes_of(known: Known, node: gs.Node, rank: int) -> list[int] | None:
    """The axes of Squeeze, Unsqueeze or Reduce: an input or, in older opsets, an attribute; None where unknown."""
    tensor = input_at(node, 1)
    axes = known.integers(tensor) if tensor is not None else node.attrs.get("axes")
    return None if axes is None else [axis % rank for axis in axes]


def unsqueeze(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    count = known.integers(input_at(node, 1)) if input_at(node, 1) is not None else node.attrs.get("axes")
    if data is None or count is None:
        return None
    rank = len(data) + len(count)
    places = {axis % rank for axis in count}
    rest = iter(data)
    return tuple(expr(1) if axis in places else next(rest) for axis in range(rank))


def _squeeze(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    axes = None if data is None else axes_of(known, node, len(data))
    if data is None or axes is None:
        return None
    return tuple(size for axis, size in enumerate(data) if axis not in axes)


def _gather(known: Known, node: gs.Node) -> Shape | None:
    data, indices = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    if data is None or indices is None:
        return None
    axis = node.attrs.get("axis", 0) % len(data)
    return (*data[:axis], *indices, *data[axis + 1 :])


def _expand(known: Known, node: gs.Node) -> Shape | None:
    data, wanted = known.shape(node.inputs[0]), known.value(node.inputs[1])
    if data is None or wanted is None:
        return None
    return broadcast(known, [data, tuple(wanted.flat)], node)


def _tile(known: Known, node: gs.Node) -> Shape | None:
    data, repeats = known.shape(node.inputs[0]), known.value(node.inputs[1])
    if data is None or repeats is None or repeats.size != len(data):
        return None
    return tuple(size * count for size, count in zip(data, repeats.flat, strict=True))


def _constant_of_shape(known: Known, node: gs.Node) -> Shape | None:
    wanted = known.value(node.inputs[0])
    return None if wanted is None else tuple(wanted.flat)


def _reduce(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    axes = None if data is None else axes_of(known, node, len(data))
    if data is None or not axes:
        return None
    return _reduced(data, axes, node.attrs.get("keepdims", 1))


def _arg(known: Known, node: gs.Node) -> Shape | None:
    data = known.shape(node.inputs[0])
    if data is None:
        return None
    return _reduced(data, [node.attrs.get("axis", 0) % len(data)], node.attrs.get("keepdims", 1))


def _reduced(data: Shape, axes: Sequence[int], keep: int) -> Shape:
    if keep:
        return tuple(expr(1) if axis in axes else size for axis, size in enumerate(data))
    return tuple(size for axis, size in enumerate(data) if axis not in axes)


def _depth_to_space(known: Known, node: gs.Node) -> Shape | None:
    data, block = known.shape(node.inputs[0]), node.attrs["blocksize"]
    if data is None:
        return None
    channels = data[1] * Fraction(1, block * block)
    return (data[0], channels, data[2] * block, data[3] * block) if channels.whole else None


def _space_to_depth(known: Known, node: gs.Node) -> Shape | None:
    data, block = known.shape(node.inputs[0]), node.attrs["blocksize"]
    if data is None:
        return None
    return (data[0], data[1] * (block * block), *(floor(size * Fraction(1, block)) for size in data[2:]))


def _shape_of(known: Known, node: gs.Node) -> Shape | None:
    entries = sizes_of(known, node)
    return None if entries is None else (expr(len(entries)),)


def sizes_of(known: Known, node: gs.Node) -> Shape | None:
    """What a Shape node gives."""
    shape = known.shape(node.inputs[0])
    return None if shape is None else shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]


def _same(known: Known, node: gs.Node) -> Shape | None:
    return known.shape(input_at(node, 0))


def _elementwise(known: Known, node: gs.Node) -> Shape | None:
    return broadcast(known, [known.shape(tensor) for tensor in node.inputs], node)


SAME = (
    "Abs",
    "Acos",
    "Asin",
    "Atan",
    "BatchNormalization",
    "Bernoulli",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "DequantizeLinear",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Hardmax",
    "Identity",
    "InstanceNormalization",
    "IsInf",
    "IsNaN",
    "LRN",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Mish",
    "Neg",
    "Not",
    "PRelu",
    "QuantizeLinear",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Trilu",
)
BROADCAST = (
    "Add",
    "And",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
)
SHAPES: dict[str, Callable[[Known, gs.Node], Shape | None]] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(BROADCAST, _elementwise),
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ConvTranspose": _conv_transpose,
    "Resize": _resize,
    "Concat": _concat,
    "Pad": _pad,
    "Transpose": _transpose,
    "Slice": _slice,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _constant_of_shape,
    "ArgMax": _arg,
    "ArgMin": _arg,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Shape": _shape_of,
    **{
        f"Reduce{kind}": _reduce
        for kind in ("Max", "Mean", "Min", "Prod", "Sum", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    },
}
