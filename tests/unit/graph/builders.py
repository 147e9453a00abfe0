"""Small hand-built graphs, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner

RNG = np.random.default_rng(7)


def weights(*shape: int, scale: float = 0.3) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str] | None],
    initializers: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    input_type: int = TensorProto.FLOAT,
    output_type: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, input_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, output_type, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (initializers or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def run(proto: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(proto)
    with OnnxRuntimeRunner(proto.SerializeToString(), optimize=False) as runner:
        return list(runner(feeds).values())


def ops(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def array(proto: ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def conv_net(opset: int = 17, **changes: Any) -> ModelProto:
    """image -> conv a -> relu -> conv b -> relu; b's reader is a 1×1 conv c to the output. 8×8, 3 channels."""
    values = {
        "a.weight": weights(4, 3, 3, 3),
        "a.bias": weights(4),
        "b.weight": weights(4, 4, 3, 3),
        "b.bias": weights(4),
        "c.weight": weights(2, 4, 1, 1),
        **changes,
    }
    nodes = [
        helper.make_node("Conv", ["image", "a.weight", "a.bias"], ["a"], name="a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["a.relu"], name="a.relu"),
        helper.make_node("Conv", ["a.relu", "b.weight", "b.bias"], ["b"], name="b", pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["b.relu"], name="b.relu"),
        helper.make_node("Conv", ["b.relu", "c.weight"], ["logits"], name="c"),
    ]
    return model(nodes, {"image": (1, 3, 8, 8)}, {"logits": (1, 2, 8, 8)}, values, opset=opset)
