"""Sizes that a graph can take, against ONNX Runtime running it."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pipeline.graph.fit import axis_sizes
from pipeline.graph.promises import write_multiples
from tests.tiny_unet import tiny_unet

HEIGHT = ("image", 2)


@pytest.fixture(scope="module")
def model():
    return tiny_unet("batch", size="side")


def test_every_verdict_is_onnx_runtimes(model):
    sizes = axis_sizes(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for size in range(1, 40):
        try:
            (logits,) = session.run(None, {"image": np.zeros((1, 3, size, 32), np.float32)})
            runs = bool(logits.size)
        except Exception:  # whatever ONNX Runtime throws, the size does not run
            runs = False
        assert (sizes[HEIGHT].problem(size) == "") is runs, size


def test_what_does_not_meet_is_named(model):
    height = axis_sizes(model)[HEIGHT]
    assert height.problem(30) == "at join1 (Concat) 15 meets 14"
    assert height.problem(1) == "at down0.out.relu.MaxPool (MaxPool) nothing is left of it"
    assert height.nearest(30) == (28, 32)
    assert height.nearest(2) == (4,)


def test_any_batch_will_do(model):
    assert not any(axis_sizes(model)["image", 0].problem(size) for size in range(1, 20))


def test_promised_multiples_count(model):
    promised = onnx.ModelProto()
    promised.CopyFrom(model)
    write_multiples(promised, {"height": 16})
    height = axis_sizes(promised)[HEIGHT]
    assert height.problem(40) == "it was cleaned for multiples of 16"
    assert height.nearest(40) == (32, 48)
    assert axis_sizes(promised)["image", 3].problem(40) == ""


def branches(op):
    """An image and itself made half as large and back, joined by ``op``: sizes have to be even."""
    nodes = [
        helper.make_node("MaxPool", ["image"], ["small"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], "up", mode="nearest"),
        helper.make_node(op, ["image", "large"], ["out"], "join", **({"axis": 1} if op == "Concat" else {})),
    ]
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "branches", [image], [out], [scales])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("op", ["Concat", "Add", "Mul"])
def test_what_is_joined(op):
    height = axis_sizes(branches(op))[HEIGHT]
    assert height.problem(6) == ""
    assert height.problem(7) == f"at join ({op}) 7 meets 6"
