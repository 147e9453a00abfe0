"""Types and shapes of every tensor of a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper

from pipeline.errors import ModelError
from pipeline.graph.io import with_initializers

# Shape arithmetic never needs larger tensors; weights stay out of the protobuf message that inference copies.
LARGE = 1024
Dims: TypeAlias = "tuple[int | str | None, ...]"


def infer(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Element type and shape of the graph's tensors by name, initializers left out.

    Values of shape tensors are propagated (``data_prop``), so sizes that a Shape/Slice/Concat chain computes are known
    where the input's are. What the model's value_info says stands only where inference finds nothing (operators of
    unknown domains).

    Raises:
        ModelError: the types of the graph contradict each other.
    """
    light = _without_large_initializers(model)
    del light.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(light, check_type=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"the types and shapes of the graph contradict each other: {str(error).strip().splitlines()[0]}",
            expected="a valid ONNX graph",
            fix="export it again",
        ) from error
    result = {value.name: value for value in (*model.graph.input, *inferred.graph.value_info, *model.graph.output)}
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.value_info:
        if value.name not in initializers:
            result.setdefault(value.name, value)
    return result


def infer_at(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, ValueInfoProto]:
    """As ``infer``, for inputs of these shapes by name; a missing one is taken as the graph has it."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            axis.dim_value = size
    del fixed.graph.output[:]  # their declared shapes would stand, with the names of free axes
    return infer(fixed)


def problem(model: ModelProto) -> str:
    """What ONNX's checker and its type inference say against the graph; empty where it is valid.

    Large initializers are judged by their types and shapes alone, so models of any size can be checked.
    """
    try:
        onnx.checker.check_model(_without_large_initializers(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def set_value_info(model: ModelProto) -> None:
    """Replace the model's value_info by what inference finds."""
    outer = {value.name for value in (*model.graph.input, *model.graph.output)}
    values = [value for name, value in infer(model).items() if name not in outer]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)


def element_type(value: ValueInfoProto | None) -> int:
    """The ONNX element type; UNDEFINED where nothing is known."""
    return value.type.tensor_type.elem_type if value is not None else TensorProto.UNDEFINED


def dims(value: ValueInfoProto | None) -> Dims | None:
    """Sizes, axis names, or None per axis; None where the rank is unknown."""
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )


def same_sizes(given: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two shapes with equally many elements are equal: each size is known to be, but for one at most."""
    unequal = [a for a, b in zip(given, wanted, strict=False) if a in (None, "") or a != b]
    return len(given) == len(wanted) and len(unequal) <= 1


def unique(name: str, taken: set[str]) -> str:
    """``name``, or ``name_1``, ``name_2``, …: the first that is not taken; it is taken from now on."""
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def all_names(model: ModelProto) -> set[str]:
    """Every node and tensor name of the graph and its subgraphs."""
    names: set[str] = set()
    graphs: list[onnx.GraphProto] = [model.graph]
    while graphs:
        graph = graphs.pop()
        names.update(value.name for value in (*graph.input, *graph.output, *graph.initializer))
        names.update(tensor.values.name for tensor in graph.sparse_initializer)
        for node in graph.node:
            names.update((node.name, *node.input, *node.output))
            graphs.extend(subgraphs(node))
    return names


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node's attributes (branches and loop bodies)."""
    single = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return single + [graph for attribute in node.attribute for graph in attribute.graphs]


def redirect(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every reader of one tensor read another, subgraphs included; the graph's own outputs stay."""
    for node in graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = new if name == old else name
        for inner in subgraphs(node):
            redirect(inner, old, new)
            for value in inner.output:
                value.name = new if value.name == old else value.name


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first names and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _without_large_initializers(model: ModelProto) -> ModelProto:
    """The model with large initializers declared as inputs (shares no data with it)."""
    small = [tensor for tensor in model.graph.initializer if math.prod(tensor.dims) <= LARGE]
    light = with_initializers(model, small)
    light.ir_version = max(light.ir_version, 4)
    known = {tensor.name for tensor in small} | {value.name for value in light.graph.input}
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name not in known
    )
    return light


def with_weights(model: ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> ModelProto:
    """The graph with other values in the initializers that are named, of the same shapes."""
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return result
