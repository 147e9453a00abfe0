"""FP16 as a GPU computes it: rounded and with infinities, where ONNX Runtime alone shows neither."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.graph.emulate import overflowing
from pipeline.graph.half import to_half
from tests.tiny_unet import images, reference, tiny_unet


def twice_there_and_back(factor: float) -> ModelProto:
    """float32 x (4) to ``(x * factor) / factor`` in FP16."""
    weight = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    nodes = [helper.make_node("Mul", ["x", "factor"], ["large"]), helper.make_node("Div", ["large", "factor"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    return to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def run(model: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    onnx.checker.check_model(model, full_check=True)
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        return np.asarray(next(iter(runner({runner.inputs[0].name: x}).values())))


def test_beyond_the_range_is_infinite_with_its_sign() -> None:
    x = np.array([1, -1, 70, -70], np.float32)
    assert run(overflowing(twice_there_and_back(1024)), x).tolist() == [1, -1, np.inf, -np.inf]


@pytest.mark.parametrize("value", [6e-8, 6.1e-5, 1 / 3, 60000.0])
def test_within_the_range_values_are_numpys_half(value: float) -> None:
    x = np.full(4, value, np.float32)
    assert run(overflowing(twice_there_and_back(1)), x)[0] == np.float32(np.float16(value))


def test_a_network_within_the_range_stays_near_its_float32_self() -> None:
    model = tiny_unet()
    half = to_half(model)
    for feeds in images(2):
        wanted = reference(model, feeds)
        np.testing.assert_allclose(run(overflowing(half), feeds["image"]), wanted, atol=0.02)


def test_the_argument_is_not_changed_and_float_graphs_keep_their_nodes() -> None:
    model = tiny_unet()
    before = model.SerializeToString()
    assert [n.op_type for n in overflowing(model).graph.node] == [n.op_type for n in model.graph.node]
    assert model.SerializeToString() == before
