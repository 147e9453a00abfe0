"""Activations that change no value, where they let TensorRT write a Resize's result into the Concat that reads it."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

from pipeline.graph.placement import STANDARD, data_inputs
from pipeline.graph.shapes import all_names, set_value_info, unique

POSITIVE = ("Relu", "Sigmoid", "Softmax")
# These give nothing below zero where they take nothing below zero; a Resize, unless it overshoots or fills up.
KEEPING = ("Concat", "MaxPool", "Resize")
BELOW_ZERO = (("mode", b"cubic"), ("coordinate_transformation_mode", b"tf_crop_and_resize"))


def with_relus(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """The graph with a Relu between every Resize and the Concat that reads it, where nothing is below zero.

    TensorRT copies a Resize's result into its Concat; what an activation gives it writes there itself, which saves a
    pass over the tensor (docs/performance.md). The Relu's result has the Resize's name, so that ranges, exclusions and
    comparisons by name mean what they meant.

    Not: results that a Pad or another node takes to the Concat; cubic interpolation, and what PRelu, LeakyRelu or a
    convolution alone gave, which may be below zero.

    Args:
        model: clean, float32; not changed, and given back as it is where there is nothing to do.

    Returns:
        It, and by the name of each Resize's new result its old one.
    """
    joined = {tensor for node in model.graph.node if _is(node, "Concat") for tensor in node.input}
    taken = all_names(model)
    positive: set[str] = set()
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    renamed: dict[str, str] = {}
    for original in model.graph.node:
        node = result.graph.node.add()
        node.CopyFrom(original)
        if not _is_positive(node, positive):
            continue
        tensor = node.output[0]
        positive.add(tensor)
        if _is(node, "Resize") and tensor in joined:
            node.output[0] = unique(f"{tensor}.resized", taken)
            renamed[node.output[0]] = tensor
            relu = helper.make_node("Relu", [node.output[0]], [tensor], unique(f"{node.name or tensor}.Relu", taken))
            result.graph.node.append(relu)
    if not renamed:
        return model, {}
    set_value_info(result)
    return result, renamed


def _is(node: NodeProto, kind: str) -> bool:
    return node.op_type == kind and node.domain in STANDARD


def _is_positive(node: NodeProto, known: set[str]) -> bool:
    if node.domain not in STANDARD:
        return False
    if node.op_type in POSITIVE:
        return True
    if any((attribute.name, attribute.s) in BELOW_ZERO for attribute in node.attribute):
        return False
    return node.op_type in KEEPING and known.issuperset(data_inputs(node))
