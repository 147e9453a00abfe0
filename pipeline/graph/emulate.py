"""Typed graphs as ONNX Runtime's CPU provider computes them rightly."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from pipeline.graph.shapes import all_names, element_type, infer, unique

# What can leave FP16's range although its inputs lie within it. Everything else moves values, or shrinks them.
GROWING = frozenset(
    {"Add", "BatchNormalization", "Cast", "Conv", "ConvTranspose", "Div", "Gemm", "MatMul", "Mul", "Sub", "Sum"}
)
# A value of 2**16, the first power of two beyond FP16, times this is infinite in float32.
EDGE = 2.0**112


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


def overflowing(model: ModelProto) -> ModelProto:
    """The same graph, whose FP16 results are rounded to FP16, and infinite from 65536 on, as they are on a GPU.

    ONNX Runtime's CPU provider computes FP16 nodes in float32 and drops the casts between them, so values beyond FP16's
    range would come through unharmed. Behind every node that can leave the range, the value goes through ``x * 2**112 *
    2**-112`` in float32 between casts: exact for all that FP16 holds, infinite with its sign beyond; and the casts
    stay. For running on ONNX Runtime only; the argument is not changed.
    """
    result = ModelProto()
    result.CopyFrom(model)
    types = {name: element_type(value) for name, value in infer(result).items()}
    taken = all_names(result)
    factors = [unique(name, taken) for name in ("to_edge", "from_edge")]
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if node.op_type in GROWING and types.get(node.output[0]) == TensorProto.FLOAT16:
            steps = [unique(f"{node.output[0]}.{step}", taken) for step in ("raw", "float", "edge", "back")]
            copy.output[0] = steps[0]
            nodes += [
                onnx.helper.make_node("Cast", steps[:1], steps[1:2], name=steps[1], to=TensorProto.FLOAT),
                onnx.helper.make_node("Mul", [steps[1], factors[0]], steps[2:3], name=steps[2]),
                onnx.helper.make_node("Mul", [steps[2], factors[1]], steps[3:4], name=steps[3]),
                onnx.helper.make_node("Cast", steps[3:], node.output[:1], name=steps[0], to=TensorProto.FLOAT16),
            ]
    for name, factor in zip(factors, (EDGE, 1 / EDGE), strict=True):
        result.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), name))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result
