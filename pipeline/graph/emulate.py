"""Typed graphs as ONNX Runtime's CPU provider computes them rightly."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from pipeline.graph.shapes import all_names, unique


def exactly_rounded(model: ModelProto) -> ModelProto:
    """The same INT8 arithmetic, with FP16 QuantizeLinear written as Cast to float32 and float32 QuantizeLinear.

    ONNX Runtime's CPU kernel truncates FP16 ``x / scale`` towards zero instead of rounding it to the nearest even
    integer (up to 1.29; fixed by https://github.com/microsoft/onnxruntime/pull/32452), which makes an INT8 network with
    FP16 scales look about four times worse than it is. The scale keeps its value, so the integers are those of the
    standard. For running on ONNX Runtime only: engines are built from the graph as it was. The argument is not changed;
    a graph without FP16 QuantizeLinear comes back as a copy.
    """
    result = ModelProto()
    result.CopyFrom(model)
    taken = all_names(result)
    scales = {t.name: t for t in result.graph.initializer if t.data_type == TensorProto.FLOAT16}
    widened: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "QuantizeLinear" and node.domain in ("", "ai.onnx") and node.input[1] in scales:
            if node.input[1] not in widened:
                widened[node.input[1]] = unique(f"{node.input[1]}.float", taken)
                scale = numpy_helper.to_array(scales[node.input[1]]).astype(np.float32)
                result.graph.initializer.append(numpy_helper.from_array(scale, widened[node.input[1]]))
            wide = unique(f"{node.input[0]}.float", taken)
            name = unique(f"{node.name or node.output[0]}.to_float", taken)
            nodes.append(onnx.helper.make_node("Cast", [node.input[0]], [wide], name=name, to=TensorProto.FLOAT))
            copy.input[0], copy.input[1] = wide, widened[node.input[1]]
        nodes.append(copy)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result
