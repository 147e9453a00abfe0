"""What the integer tensors of shape arithmetic hold, as far as the inferred shapes say."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto

from pipeline.graph.base import constant_value, export_graph, input_at, is_standard, tensor_proto_type
from pipeline.graph.shapes import dims, element_type, infer

INTEGERS = (TensorProto.INT32, TensorProto.INT64)
# More entries than any shape has: larger integer tensors are data.
MOST = 64

Size = Any  # int, the name of a dynamic axis (equal names are equal sizes), or None
Sizes = Any  # list[Size] of a 1-D tensor, a Size of a scalar, or None where nothing is known


def infer_shapes(graph: gs.Graph) -> None:
    """Write inferred types and shapes into the graph's tensors; a tensor that inference does not know keeps its own."""
    model = export_graph(graph, ModelProto(ir_version=10))
    values = infer(model)
    fixed = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in graph.tensors().values():
        value = values.get(tensor.name)
        if isinstance(tensor, gs.Variable) and value is not None:
            if tensor.name not in fixed or tensor.dtype is None:
                tensor.dtype = element_type(value) or tensor.dtype
            shape = dims(value)
            if shape is not None and tensor.name not in fixed:
                tensor.shape = list(shape)


def known_sizes(tensor: gs.Tensor | None, depth: int = 64) -> Sizes:
    """Entries of an integer tensor of rank 0 or 1: numbers, axis names, None for each that is unknown.

    Follows Shape, Gather, Slice, Concat, Squeeze, Unsqueeze, Cast between integers, Identity and one-entry Reshape.
    Returns None where the tensor is not of that kind.
    """
    if tensor is None or depth == 0:
        return None
    value = constant_value(tensor)
    if value is not None:
        return value.tolist() if value.dtype.kind == "i" and value.ndim < 2 and value.size <= MOST else None
    if len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if is_standard(node, "Shape"):
        return _shape(node)
    if is_standard(node, "Concat"):
        parts = [known_sizes(part, depth - 1) for part in node.inputs]
        whole = all(isinstance(part, list) for part in parts)
        return [size for part in parts for size in part] if whole else None
    data = known_sizes(input_at(node, 0), depth - 1)
    if data is None:
        return None
    if is_standard(node, "Gather"):
        return _gather(node, data)
    if is_standard(node, "Slice"):
        return _slice(node, data)
    if is_standard(node, "Identity"):
        return data
    if is_standard(node, "Cast"):
        return data if node.attrs["to"] in INTEGERS else None
    if is_standard(node, "Unsqueeze"):
        return None if isinstance(data, list) else [data]
    if is_standard(node, "Squeeze"):
        return data[0] if isinstance(data, list) and len(data) == 1 else None
    if is_standard(node, "Reshape"):
        return (
            data if isinstance(data, list) and len(data) == 1 and known_sizes(node.inputs[1]) in ([1], [-1]) else None
        )
    return None


def as_array(tensor: gs.Tensor) -> Any:
    """The tensor's value where every entry is a number, in the tensor's integer type; None otherwise."""
    sizes = known_sizes(tensor)
    entries = sizes if isinstance(sizes, list) else [sizes]
    kind = tensor_proto_type(tensor)
    if sizes is None or kind not in INTEGERS or not all(isinstance(entry, int) for entry in entries):
        return None
    return np.array(sizes, np.int32 if kind == TensorProto.INT32 else np.int64)


def _shape(node: gs.Node) -> Sizes:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    entries = [size if isinstance(size, (int, str)) and size != "" else None for size in shape]
    return entries[node.attrs.get("start", 0) : node.attrs.get("end", len(entries))]


def _gather(node: gs.Node, data: Sizes) -> Sizes:
    indices = constant_value(node.inputs[1])
    if not isinstance(data, list) or indices is None or node.attrs.get("axis", 0) != 0 or indices.ndim > 1:
        return None
    if indices.size and not (-len(data) <= indices.min() and indices.max() < len(data)):
        return None
    return data[int(indices)] if indices.ndim == 0 else [data[int(index)] for index in indices]


def _slice(node: gs.Node, data: Sizes) -> Sizes:
    if not isinstance(data, list):
        return None
    parts: dict[str, Any] = {}
    for slot, key in enumerate(("starts", "ends", "axes", "steps"), 1):
        value = constant_value(input_at(node, slot))
        if input_at(node, slot) is not None and value is None:
            return None
        parts[key] = list(np.ravel(value)) if value is not None else node.attrs.get(key)
    if parts["starts"] is None or parts["ends"] is None or (parts["axes"] or [0])[0] not in (0, -1):
        return None
    step = int((parts["steps"] or [1])[0])
    start, end = int(parts["starts"][0]), int(parts["ends"][0])
    # ONNX clamps like Python does, but for a negative step, where -1 behind clamping means "before the first".
    return data[start:end:step] if step > 0 else None
