"""Raising the opset: what the converter loses is kept, and what it gets wrong is right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ModelError
from pipeline.graph.versions import has_legacy_resize, with_opset
from tests.unit.graph.builders import image, model, ops, run, weights


def up(source: str, target: str, mode: str = "linear") -> onnx.NodeProto:
    return helper.make_node("Upsample", [source], [target], name=f"up.{target}", mode=mode, scales=[1.0, 1.0, 2.0, 3.0])


def test_a_new_enough_model_is_copied() -> None:
    original = model([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 2)}, {"y": (1, 2)}, opset=17)
    raised = with_opset(original, 13)
    assert raised == original
    assert raised is not original


def test_large_and_sparse_initializers_and_listed_inputs_stay() -> None:
    values = {"w": weights(40, 2, 5, 5), "b": weights(40)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", kernel_shape=[5, 5]),
        up("c", "y"),
    ]
    original = model(nodes, {"x": (1, 2, 6, 6)}, {"y": (1, 40, 4, 6)}, values, opset=8, ir=3)
    original.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (40, 2, 5, 5)))
    original.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, (40,)))
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [1], [2.5]), helper.make_tensor("", TensorProto.INT64, [1], [1]), [2]
    )
    original.graph.sparse_initializer.append(sparse)
    raised = with_opset(original, 11)
    assert raised.opset_import[0].version == 13
    assert raised.graph.input == original.graph.input
    assert raised.graph.sparse_initializer == original.graph.sparse_initializer
    assert list(raised.graph.initializer)[:2] == list(original.graph.initializer)
    assert ops(raised) == ["Conv", "Resize"]
    assert raised.ir_version >= 7


def test_a_legacy_resize_in_a_branch_is_right_too() -> None:
    def branch(name: str, mode: str) -> onnx.GraphProto:
        nodes = [up("t", f"{name}.u", mode), helper.make_node("Neg", [f"{name}.u"], [name])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, 1, (1, 2, 8, 15))])

    nodes = [
        helper.make_node("Neg", ["x"], ["t"], name="t"),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0, name="m"),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL, name="c"),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "linear"), else_branch=branch("b", "nearest")),
    ]
    original = model(nodes, {"x": (1, 2, 4, 5)}, {"y": (1, 2, 8, 15)}, opset=8)
    assert has_legacy_resize(original)
    raised = with_opset(original, 13)
    assert not has_legacy_resize(raised)
    for feed in (image(1, 2, 4, 5), np.zeros((1, 2, 4, 5), np.float32) - 0.0):
        assert (run(raised, x=feed)[0] == run(original, x=feed)[0]).all()


def test_foreign_operators_pass_through_unharmed() -> None:
    foreign = helper.make_node("Sharpen", ["a"], ["b"], name="sharpen", domain="com.example", strength=0.3)
    foreign.metadata_props.add(key="from", value="elsewhere")
    foreign.overload = "fast"
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        foreign,
        up("b", "u"),
        helper.make_node("Dropout", ["u"], ["y"], ratio=0.2),
    ]
    original = model(nodes, {"x": (1, 2, "H", 5)}, {"y": (1, 2, "h", 15)}, opset=7, domains=["com.example"])
    raised = with_opset(original, 13)
    assert next(node for node in raised.graph.node if node.op_type == "Sharpen") == foreign
    assert {entry.domain: entry.version for entry in raised.opset_import} == {"": 13, "com.example": 1}
    assert [op for op in ops(raised) if op != "Constant"] == ["Relu", "Sharpen", "Resize", "Dropout"]
    assert raised.graph.input == original.graph.input


def test_what_the_converter_would_lose_is_refused_by_name() -> None:
    inner = helper.make_graph([up("x", "z")], "inner", [], [helper.make_tensor_value_info("z", 1, None)])
    foreign = helper.make_node("Repeat", ["x"], ["y"], name="again", domain="com.example", body=inner)
    original = model([foreign], {"x": (1, 2, 4, 5)}, {"y": [None] * 4}, opset=9, domains=["com.example"])
    with pytest.raises(ModelError, match=r"com.example::Repeat \(again\) holds a graph"):
        with_opset(original, 13)
    computed = helper.make_node("Resize", ["x", "s"], ["y"], name="resize")
    original = model([computed], {"x": (1, 2, 4, 5), "s": (4,)}, {"y": [None] * 4}, opset=10)
    with pytest.raises(ModelError, match="Resize resize has no constant scales"):
        with_opset(original, 13)


def test_attributes_of_the_oldest_upsample_are_read() -> None:
    """Opset 1; ONNX Runtime knows it no more."""
    node = helper.make_node("Upsample", ["x"], ["y"], mode="bilinear", height_scale=2.0, width_scale=3.0)
    raised = with_opset(model([node], {"x": (1, 2, 4, 5)}, {"y": (1, 2, 8, 15)}, opset=6), 13)
    want = run(
        with_opset(model([up("x", "y")], {"x": (1, 2, 4, 5)}, {"y": (1, 2, 8, 15)}, opset=7), 13), x=image(1, 2, 4, 5)
    )
    assert (run(raised, x=image(1, 2, 4, 5))[0] == want[0]).all()
    assert numpy_helper.to_array(raised.graph.initializer[0]).tolist() == [1, 1, 2, 3]
