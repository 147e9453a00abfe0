"""Segmentation graphs from elsewhere in the form that images are fed in and masks are read in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from pipeline.artifacts import ModelCard
from pipeline.errors import ModelError
from pipeline.graph.base import STANDARD
from pipeline.graph.io import opset
from pipeline.graph.padding import PAD_INPUTS_OPSET
from pipeline.graph.shapes import all_names, redirect, unique

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
# What changes neither values nor their order within a channel.
LAYOUT = ("Transpose", "Reshape", "Cast", "Identity")
# What a logit may come from.
LINEAR = ("Conv", "ConvTranspose", "Add")


def adopt(model: ModelProto, card: ModelCard) -> ModelProto:
    """The graph with images and logits as (N, C, H, W); a copy of it where it has that form already.

    1. An input (N, H, W, C), as Keras and TensorFlow have it, becomes (N, C, H, W) of the same name: a Transpose comes
       behind it. Cleaning takes it out together with the network's own.
    2. Likewise an output (N, H, W, classes).
    3. An output of one channel, where the card names two classes, becomes two logits (0, x), x being what its Sigmoid
       reads, or what its last convolution gives. Their argmax is class 1 where sigmoid(x) > 0.5, and their softmax is
       (1 - sigmoid(x), sigmoid(x)).

    An output that these change is called ``logits``, or ``probabilities`` where a Softmax gives it. Which axis holds
    the channels is read off their number; where both could, the standard's order (N, C, H, W) stands.

    Args:
        model: a graph with one image input and one output; others are returned as they are.

    Raises:
        ModelError: one channel that neither a Sigmoid nor a convolution gives.
    """
    result = ModelProto()
    result.CopyFrom(model)
    fixed = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in result.graph.input if value.name not in fixed]
    if len(inputs) == 1 and _holds_channels(inputs[0], [card.preprocessing.channel_count]) == 3:
        _transpose_input(result, inputs[0])
    if len(result.graph.output) == 1:
        _adopt_output(result, card)
    return result


def _holds_channels(value: ValueInfoProto, counts: Sequence[int]) -> int | None:
    """The axis, 1 or 3, of one of these sizes; None where there is none such, or no image."""
    kind = value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT or len(kind.shape.dim) != 4:
        return None
    return next((axis for axis in (1, 3) if kind.shape.dim[axis].dim_value in counts), None)


def _transpose_input(model: ModelProto, value: ValueInfoProto) -> None:
    name = unique(f"{value.name}.channels_last", all_names(model))
    redirect(model.graph, value.name, name)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node("Transpose", [value.name], [name], name, perm=TO_LAST), *nodes])
    _permute(value, TO_FIRST)


def _adopt_output(model: ModelProto, card: ModelCard) -> None:
    graph, value = model.graph, model.graph.output[0]
    classes = len(card.classes)
    axis = _holds_channels(value, [classes, 1] if classes == 2 else [classes])
    single = axis is not None and value.type.tensor_type.shape.dim[axis].dim_value == 1
    if axis is None or (axis == 1 and not single):
        return
    taken = all_names(model)
    last, behind = _origin(graph, value.name)
    kind = last.op_type if last is not None and last.domain in STANDARD else ""
    tensor = value.name
    if single and kind == "Sigmoid" and last is not None:
        tensor = _again(graph, behind, last.input[0], taken)
    elif single and kind not in LINEAR:
        raise ModelError(
            f"the output {value.name} has one channel, which is neither a probability nor a logit of the second class",
            expected="a Sigmoid as the last operator, or the convolution before it",
            got=kind or "an operator of another domain",
            fix="end the network in a Sigmoid, or in two channels",
        )
    result = unique("probabilities" if kind == "Softmax" else "logits", taken)
    if axis == 3:
        name = unique(f"{value.name}.channels_first", taken) if single else result
        graph.node.append(helper.make_node("Transpose", [tensor], [name], name, perm=TO_FIRST))
        tensor = name
        _permute(value, TO_FIRST)
    if single:
        graph.node.append(_second_channel(model, tensor, result, taken))
        value.type.tensor_type.shape.dim[1].dim_value = 2
    value.name = result


def _origin(graph: GraphProto, name: str) -> tuple[NodeProto | None, list[NodeProto]]:
    """The node that computes a tensor's values, and the nodes behind it that only arrange them."""
    producers = {tensor: node for node in graph.node for tensor in node.output}
    node, behind = producers.get(name), list[NodeProto]()
    while node is not None and node.op_type in LAYOUT:
        behind.insert(0, node)
        node = producers.get(node.input[0])
    return node, behind


def _again(graph: GraphProto, nodes: Sequence[NodeProto], tensor: str, taken: set[str]) -> str:
    """What the nodes, one behind the other, make of another tensor; the old ones stay for whoever else reads them."""
    for node in nodes:
        copy = NodeProto.FromString(node.SerializeToString())
        copy.name = copy.output[0] = unique(f"{node.output[0]}.logit", taken)
        copy.input[0] = tensor
        graph.node.append(copy)
        tensor = copy.output[0]
    return tensor


def _second_channel(model: ModelProto, tensor: str, result: str, taken: set[str]) -> NodeProto:
    """A Pad that puts a channel of zeros before the one there is."""
    widths = [0, 1, 0, 0, 0, 0, 0, 0]
    if opset(model) < PAD_INPUTS_OPSET:
        return helper.make_node("Pad", [tensor], [result], result, pads=widths)
    name = unique(f"{result}.pads", taken)
    model.graph.initializer.append(numpy_helper.from_array(np.array(widths, np.int64), name))
    return helper.make_node("Pad", [tensor, name], [result], result)


def _permute(value: ValueInfoProto, order: Sequence[int]) -> None:
    shape = value.type.tensor_type.shape
    dims = [TensorShapeProto.Dimension.FromString(shape.dim[axis].SerializeToString()) for axis in order]
    del shape.dim[:]
    shape.dim.extend(dims)
