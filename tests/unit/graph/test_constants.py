from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import UnsupportedError
from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.constants import (
    FoldBatchNorm,
    FoldConstants,
    LowerConstants,
    OwnInitializers,
    RemoveIdentities,
    RemoveUnused,
    UnlistInitializers,
)
from tests.unit.graph.builders import array, conv_net, image, model, ops, run, weights

INT64 = np.int64


def batchnorm_net(op: str, *, bias: bool, group: int = 1, opset: int = 17) -> onnx.ModelProto:
    shape = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 2, 2)
    attributes = {"pads": [1] * 4} if op == "Conv" else {"strides": [2, 2]}
    rng = np.random.default_rng(5)
    values = {
        "up.weight": weights(*shape),
        "g": rng.uniform(0.5, 2, 6).astype(np.float32),
        "beta": weights(6),
        "mean": weights(6),
        "var": rng.uniform(0.1, 3, 6).astype(np.float32),
    }
    inputs = ["x", "up.weight"]
    if bias:
        values["up.bias"] = weights(6)
        inputs.append("up.bias")
    nodes = [
        helper.make_node(op, inputs, ["c"], name="conv", group=group, **attributes),
        helper.make_node("BatchNormalization", ["c", "g", "beta", "mean", "var"], ["y"], name="bn", epsilon=1e-3),
    ]
    size = 8 if op == "Conv" else 16
    return model(nodes, {"x": (2, 4, 8, 8)}, {"y": (2, 6, size, size)}, values, opset=opset)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batchnorm_becomes_weight_and_bias(op: str, bias: bool, group: int) -> None:
    original = batchnorm_net(op, bias=bias, group=group)
    folded, runs = run_passes(original, [FoldBatchNorm()])
    assert ops(folded) == [op]
    assert runs[0].result.fired == (("batchnorm", "bn"),)
    feed = image(2, 4, 8, 8)
    (want,), (got,) = run(original, x=feed), run(folded, x=feed)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_batchnorm_stays_where_the_convolution_has_another_reader() -> None:
    original = batchnorm_net("Conv", bias=True)
    original.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, (2, 6, 8, 8)))
    assert ops(run_passes(original, [FoldBatchNorm()])[0]) == ["Conv", "BatchNormalization"]


def test_batchnorm_stays_where_its_factor_is_not_finite() -> None:
    original = batchnorm_net("Conv", bias=True)
    index = next(i for i, t in enumerate(original.graph.initializer) if t.name == "var")
    original.graph.initializer[index].CopyFrom(numpy_helper.from_array(np.full(6, -1, np.float32), "var"))
    assert "BatchNormalization" in ops(run_passes(original, [FoldBatchNorm()])[0])


def test_convolutions_that_share_initializers_get_their_own() -> None:
    shared = weights(4)
    original = conv_net(**{"a.bias": shared})
    original.graph.node[2].input[2] = "a.bias"  # b reads a's bias
    owned, runs = run_passes(original, [OwnInitializers()])
    first, second = owned.graph.node[0].input[2], owned.graph.node[2].input[2]
    assert first == "a.bias"
    assert second != first
    assert (array(owned, second) == shared).all()
    assert runs[0].result.fired == (("share", "b"),)
    assert not runs[-1].result.modified


def test_a_convolution_owns_its_weight_against_other_operators_too() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c", pads=[1] * 4),
        helper.make_node("ReduceMean", ["w"], ["m"], name="m", keepdims=0),
        helper.make_node("Add", ["c", "m"], ["y"], name="y"),
    ]
    original = model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 3, 4, 4)}, {"w": weights(3, 2, 3, 3)})
    owned, _ = run_passes(original, [OwnInitializers()])
    conv = next(node for node in owned.graph.node if node.op_type == "Conv")
    assert sum(conv.input[1] in node.input for node in owned.graph.node) == 1


def test_bias_behind_identities_becomes_the_convolutions_own() -> None:
    """What torch exports for fresh networks: equal BatchNorm biases stored once, handed on through Identity nodes."""
    original = conv_net()
    chain = [
        helper.make_node("Identity", ["a.bias"], ["i1"], name="i1"),
        helper.make_node("Identity", ["i1"], ["i2"], name="i2"),
    ]
    original.graph.node[2].input[2] = "i2"
    nodes = [*chain, *original.graph.node]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del original.graph.node[:]
    original.graph.node.extend(kept)
    cleaned, _ = clean_model(original)
    names = {tensor.name for tensor in cleaned.graph.initializer}
    assert ops(cleaned) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    assert {"a.bias", "b.bias"} <= names
    assert (array(cleaned, "b.bias") == array(original, "a.bias")).all()


def test_identity_between_input_and_output_stays() -> None:
    original = model([helper.make_node("Identity", ["x"], ["y"], name="i")], {"x": (2,)}, {"y": (2,)})
    assert ops(run_passes(original, [RemoveIdentities()])[0]) == ["Identity"]


def test_identity_before_an_output_gives_its_name_to_the_producer() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Identity", ["r"], ["y"], name="i"),
        helper.make_node("Neg", ["r"], ["z"], name="n"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,), "z": (3,)})
    bypassed, _ = run_passes(original, [RemoveIdentities()])
    assert ops(bypassed) == ["Relu", "Neg"]
    for want, got in zip(run(original, x=image(3)), run(bypassed, x=image(3)), strict=True):
        assert (want == got).all()


@pytest.mark.parametrize(("training", "left"), [(None, []), (False, []), (True, ["Dropout"])])
def test_dropout_goes_only_at_inference(training: bool | None, left: list[str]) -> None:
    inputs = ["r", "ratio"] if training is None else ["r", "ratio", "training"]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Dropout", inputs, ["d"], name="d"),
        helper.make_node("Neg", ["d"], ["y"], name="n"),
    ]
    values = {"ratio": np.float32(0.5), **({} if training is None else {"training": np.array(training)})}
    cleaned, _ = clean_model(model(nodes, {"x": (3,)}, {"y": (3,)}, values))
    assert [op for op in ops(cleaned) if op == "Dropout"] == left


def test_constant_nodes_of_every_kind_keep_their_types() -> None:
    nodes = [
        helper.make_node("Constant", [], ["f"], value_float=0.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.float32([3, 4]))),
        helper.make_node("Constant", [], ["i"], value_ints=[2]),
        helper.make_node("Add", ["x", "f"], ["s1"]),
        helper.make_node("Add", ["s1", "fs"], ["s2"]),
        helper.make_node("Add", ["s2", "t"], ["s3"]),
        helper.make_node("Reshape", ["s3", "i"], ["y"]),
    ]
    original = model(nodes, {"x": (2,)}, {"y": (2,)})
    lowered, _ = run_passes(original, [LowerConstants()])
    assert ops(lowered) == ["Add", "Add", "Add", "Reshape"]
    assert {t.name: t.data_type for t in lowered.graph.initializer} == {
        "f": TensorProto.FLOAT,
        "fs": TensorProto.FLOAT,
        "t": TensorProto.FLOAT,
        "i": TensorProto.INT64,
    }
    assert (run(original, x=image(2))[0] == run(lowered, x=image(2))[0]).all()


def test_sizes_fold_where_the_batch_alone_is_dynamic() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "two"], ["h"], name="gather"),
        helper.make_node("Slice", ["s", "zero1", "one1"], ["n"], name="batch"),
        helper.make_node("Unsqueeze", ["h", "zero1"], ["h1"], name="h1"),
        helper.make_node("Concat", ["n", "minus", "h1"], ["target"], axis=0, name="target"),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="reshape"),
    ]
    values = {
        "two": np.array(2),
        "zero1": np.array([0]),
        "one1": np.array([1]),
        "minus": np.array([-1]),
    }
    original = model(nodes, {"x": ("N", 2, 3, 4)}, {"y": ("N", 8, 3)}, values)
    folded, runs = run_passes(original, [FoldConstants(), RemoveUnused()])
    assert ops(folded) == ["Shape", "Slice", "Concat", "Reshape"]
    assert ("size", "gather") in runs[0].result.fired
    assert (run(original, x=image(5, 2, 3, 4))[0] == run(folded, x=image(5, 2, 3, 4))[0]).all()


def test_arithmetic_on_sizes_is_not_turned_into_integers() -> None:
    """graphsurgeon's own shape folding makes int(float(size) * 0.5) an integer product with 0."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "half"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.INT64),
    ]
    original = model(nodes, {"x": ("N", "M")}, {"y": (2,)}, {"half": np.float32(0.5)}, output_type=TensorProto.INT64)
    cleaned, _ = clean_model(original)
    assert run(cleaned, x=image(8, 6))[0].tolist() == [4, 3]


def test_random_operators_are_not_frozen() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], shape=[4], name="random"),
        helper.make_node("Add", ["x", "r"], ["y"], name="add"),
    ]
    cleaned, _ = clean_model(model(nodes, {"x": (4,)}, {"y": (4,)}))
    assert ops(cleaned) == ["RandomNormal", "Add"]


def test_an_if_with_a_constant_condition_is_flattened() -> None:
    value = helper.make_tensor_value_info

    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(op, ["x"], [f"{op}_out"])], op, [], [value(f"{op}_out", TensorProto.FLOAT, None)]
        )

    nodes = [helper.make_node("If", ["no"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg"), name="if")]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, {"no": np.array(False)})
    cleaned, _ = clean_model(original)
    assert ops(cleaned) == ["Neg"]
    assert (run(original, x=image(3))[0] == run(cleaned, x=image(3))[0]).all()


def test_without_onnxruntime_folding_refuses_instead_of_doing_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    with pytest.raises(UnsupportedError, match="onnxruntime is not installed"):
        clean_model(conv_net())


def test_initializers_listed_as_inputs_become_weights_alone() -> None:
    original = conv_net(opset=8)
    original.ir_version = 3
    original.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in original.graph.initializer
    )
    unlisted, runs = run_passes(original, [UnlistInitializers()])
    assert [value.name for value in unlisted.graph.input] == ["image"]
    assert unlisted.ir_version == 4
    assert len(runs[0].result.fired) == 5
    assert (run(original, image=image(1, 3, 8, 8))[0] == run(unlisted, image=image(1, 3, 8, 8))[0]).all()


def test_unused_nodes_and_initializers_go() -> None:
    original = conv_net()
    original.graph.node.append(helper.make_node("Neg", ["b"], ["nobody"], name="neg"))
    original.graph.initializer.append(numpy_helper.from_array(weights(3), "orphan"))
    cleaned, runs = run_passes(original, [RemoveUnused()])
    assert runs[0].result.fired == (("unused-node", "neg"), ("unused-initializer", "orphan"))
    assert "orphan" not in {t.name for t in cleaned.graph.initializer}
