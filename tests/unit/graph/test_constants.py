from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import UnsupportedError
from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.constants import (
    FoldConstants,
    LowerConstants,
    OwnInitializers,
    RemoveIdentities,
    RemoveNoOpArithmetic,
    RemoveUnused,
    SimplifyCasts,
    UnlistInitializers,
)
from tests.unit.graph.builders import array, conv_net, image, model, ops, run, weights


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


DROPOUTS = [
    (7, {}, {}, True),
    (10, {"ratio": 0.3}, {}, True),
    (12, {}, {"ratio": np.float32(0.5)}, True),
    (13, {}, {"ratio": np.float32(0.5), "training": np.array(False)}, True),
    (13, {}, {"ratio": np.float32(0.5), "training": np.array(True)}, False),
    (13, {}, {"ratio": np.float32(0), "training": np.array(True)}, True),
    (6, {}, {}, False),
    (6, {"is_test": 1}, {}, True),
    (6, {"ratio": 0.0}, {}, True),
]


@pytest.mark.parametrize(("opset", "attributes", "values", "gone"), DROPOUTS)
def test_dropout_goes_where_it_drops_nothing(
    opset: int, attributes: dict[str, float], values: dict[str, np.ndarray], gone: bool
) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Dropout", ["r", *values], ["d"], name="d", **attributes),
        helper.make_node("Neg", ["d"], ["y"], name="n"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, values, opset=opset)
    left, _ = run_passes(original, [RemoveIdentities()])
    assert ("Dropout" not in ops(left)) == gone
    if gone and opset > 6:  # ONNX Runtime begins with opset 7
        assert (run(original, x=image(3))[0] == run(left, x=image(3))[0]).all()


@pytest.mark.parametrize("known", [True, False])
def test_a_dropout_whose_mode_is_computed_or_whose_mask_is_read_stays(known: bool) -> None:
    nodes = [
        helper.make_node("Dropout", ["x", "", "training"], ["d", "mask"], name="d"),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT, name="m"),
        helper.make_node("Add", ["d", "m" if known else "x"], ["y"], name="y"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, {"training": np.array(False)} if known else {})
    if not known:
        original.graph.input.append(helper.make_tensor_value_info("training", TensorProto.BOOL, ()))
    assert "Dropout" in ops(run_passes(original, [RemoveIdentities()])[0])


def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None)


def branching(then: onnx.GraphProto, other: onnx.GraphProto, *, known: bool | None = None) -> onnx.ModelProto:
    """y = -(then or other), by sum(x) > 0 or by a constant."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="positive"),
        helper.make_node(
            "If", ["positive" if known is None else "known"], ["z"], then_branch=then, else_branch=other, name="if"
        ),
        helper.make_node("Neg", ["z"], ["y"], name="neg"),
    ]
    values = {"zero": np.float32(0), **({} if known is None else {"known": np.array([known])})}
    return model(nodes, {"x": (3,)}, {"y": (3,)}, values)


def branch(name: str, nodes: list[onnx.NodeProto], result: str, **values: np.ndarray) -> onnx.GraphProto:
    initializers = [numpy_helper.from_array(array, key) for key, array in values.items()]
    return helper.make_graph(nodes, name, [], [value(result)], initializers)


def bodies(proto: onnx.ModelProto) -> list[list[str]]:
    return [
        [inner.op_type for inner in attribute.g.node]
        for node in proto.graph.node
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name)
        if attribute.type == onnx.AttributeProto.GRAPH
    ]


def alike(original: onnx.ModelProto, changed: onnx.ModelProto, *feeds: np.ndarray) -> None:
    for feed in feeds or (image(3), -np.abs(image(3))):
        for want, got in zip(run(original, x=feed), run(changed, x=feed), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


def test_constants_and_identities_inside_branches_go_but_random_operators_stay() -> None:
    folded = branch(
        "folded",
        [
            helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0, 3.0]),
            helper.make_node("Mul", ["k", "two"], ["kk"], name="constant"),
            helper.make_node("Identity", ["kk"], ["i"], name="identity"),
            helper.make_node("Mul", ["x", "i"], ["m"], name="mul"),
            helper.make_node("Identity", ["m"], ["t"], name="last"),
        ],
        "t",
        two=np.float32([2]),
    )
    noisy = branch(
        "noisy",
        [
            helper.make_node("RandomNormal", [], ["r"], shape=[3], name="random"),
            helper.make_node("Mul", ["r", "nothing"], ["rr"], name="silent"),
            helper.make_node("Add", ["x", "rr"], ["e"], name="add"),
        ],
        "e",
        nothing=np.float32([0]),
    )
    original = branching(folded, noisy)
    cleaned, _ = run_passes(original, [LowerConstants(), RemoveIdentities(), FoldConstants()])
    assert bodies(cleaned) == [["RandomNormal", "Mul", "Add"], ["Mul"]]
    alike(original, cleaned)


def test_a_branch_with_a_random_operator_is_taken_but_not_computed_now() -> None:
    noise = branch("noise", [helper.make_node("RandomNormal", [], ["r"], shape=[3], name="random")], "r")
    nodes = [
        helper.make_node("Not", ["no"], ["yes"], name="not"),
        helper.make_node("If", ["yes"], ["z"], then_branch=noise, else_branch=noise, name="if"),
        helper.make_node("Add", ["x", "z"], ["y"], name="add"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, {"no": np.array(False)})
    assert ops(run_passes(original, [FoldConstants(), RemoveIdentities()])[0]) == ["RandomNormal", "Add"]


@pytest.mark.parametrize("known", [True, False])
def test_the_branch_of_a_constant_condition_is_taken(known: bool) -> None:
    """Both branches use one name; one branch ends in a constant, which has no producer to rename."""
    inner = branch("inner", [helper.make_node("Exp", ["t"], ["e"], name="exp")], "e")
    outer = branch("outer", [helper.make_node("Abs", ["t"], ["a"], name="abs")], "a")
    then = branch(
        "then",
        [
            helper.make_node("Relu", ["x"], ["t"], name="relu"),
            helper.make_node("If", ["positive"], ["u"], then_branch=inner, else_branch=outer, name="nested"),
        ],
        "u",
    )
    original = branching(then, branch("other", [], "t", t=np.float32([1, 2, 3])), known=known)
    taken, runs = run_passes(original, [FoldConstants(), RemoveIdentities()])
    assert ("branch", "if") in runs[0].result.fired
    assert [op for op in ops(taken) if op in ("Relu", "If")] == (["Relu", "If"] if known else [])
    alike(original, taken)


def test_a_branch_that_hands_on_a_tensor_from_outside_stays() -> None:
    """ONNX Runtime refuses such a graph too."""
    original = branching(branch("then", [], "x"), branch("other", [], "x"), known=True)
    assert "If" in ops(run_passes(original, [FoldConstants()])[0])


def test_names_of_a_taken_branch_do_not_meet_those_of_other_branches() -> None:
    def pair(tag: str) -> dict[str, onnx.GraphProto]:
        return {
            "then_branch": branch("t", [helper.make_node("Relu", ["x"], ["inner"], name=f"relu{tag}")], "inner"),
            "else_branch": branch("e", [helper.make_node("Exp", ["x"], ["inner"], name=f"exp{tag}")], "inner"),
        }

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="positive"),
        helper.make_node("If", ["known"], ["a"], name="if1", **pair("1")),
        helper.make_node("If", ["positive"], ["b"], name="if2", **pair("2")),
        helper.make_node("If", ["known"], ["c"], name="if3", **pair("3")),
        helper.make_node("Sum", ["a", "b", "c"], ["y"], name="sum3"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, {"zero": np.float32(0), "known": np.array(False)})
    cleaned, _ = clean_model(original)
    assert sorted(ops(cleaned)).count("If") == 1
    alike(original, cleaned)


def cast_net(types: list[int], given: int, shape: tuple[int, ...] = (4,)) -> onnx.ModelProto:
    names = ["x", *(f"c{position}" for position in range(1, len(types))), "y"]
    nodes = [
        helper.make_node("Cast", [names[position]], [names[position + 1]], to=kind, name=names[position + 1])
        for position, kind in enumerate(types)
    ]
    # A first and a last operator, so that no name of an input or output is in the way.
    first = helper.make_node("Reshape", ["x", "s"], ["r"], name="first")
    nodes[0].input[0] = "r"
    nodes[-1].output[0] = "l"
    last = helper.make_node("Reshape", ["l", "s"], ["y"], name="last")
    values = {"s": np.array([2, 2])}
    return model(
        [first, *nodes, last], {"x": shape}, {"y": (2, 2)}, values, input_type=given, output_type=types[-1], opset=19
    )


T = TensorProto
GONE = [
    (T.FLOAT, [T.FLOAT], []),
    (T.INT32, [T.INT64, T.INT32], []),
    (T.FLOAT16, [T.FLOAT, T.FLOAT16], []),
    (T.BOOL, [T.FLOAT, T.BOOL], []),
    (T.BOOL, [T.INT64, T.FLOAT], [T.FLOAT]),
    (T.UINT8, [T.INT32, T.FLOAT], [T.FLOAT]),
    (T.INT32, [T.INT64, T.UINT8], [T.UINT8]),
    (T.FLOAT16, [T.FLOAT, T.DOUBLE], [T.DOUBLE]),
    (T.FLOAT, [T.DOUBLE, T.FLOAT16], [T.FLOAT16]),
    (T.INT32, [T.DOUBLE, T.INT64], [T.INT64]),
    (T.INT8, [T.INT16, T.INT32, T.INT64, T.FLOAT, T.FLOAT], [T.FLOAT]),
]
LEFT = [
    (T.INT64, [T.INT32, T.INT64]),
    (T.FLOAT, [T.FLOAT16, T.FLOAT]),
    (T.FLOAT, [T.INT32, T.FLOAT]),
    (T.INT32, [T.FLOAT, T.INT32]),
    (T.INT64, [T.DOUBLE, T.INT64]),
    (T.UINT8, [T.INT8, T.UINT8]),
    (T.INT8, [T.UINT8, T.INT32]),
    (T.FLOAT, [T.BOOL, T.FLOAT]),
    (T.FLOAT16, [T.FLOAT, T.INT8]),
    (T.INT8, [T.FLOAT, T.UINT8]),
    (T.FLOAT16, [T.BFLOAT16, T.FLOAT]),
]


def cast_feed(kind: int) -> np.ndarray:
    return np.array([0, 1, 127, 100], helper.tensor_dtype_to_np_dtype(kind))


@pytest.mark.parametrize(("given", "types", "left"), GONE)
def test_casts_that_change_nothing_go(given: int, types: list[int], left: list[int]) -> None:
    original = cast_net(types, given)
    simplified, runs = run_passes(original, [SimplifyCasts()])
    casts = [node for node in simplified.graph.node if node.op_type == "Cast"]
    assert [node.attribute[0].i for node in casts] == left
    assert not runs[-1].result.modified
    feed = cast_feed(given)
    extreme = -feed if np.dtype(feed.dtype).kind in "if" else feed
    alike(original, simplified, feed, extreme)


@pytest.mark.parametrize(("given", "types"), LEFT)
def test_casts_that_round_or_wrap_stay(given: int, types: list[int]) -> None:
    original = cast_net(types, given)
    assert run_passes(original, [SimplifyCasts()])[0] == original


def test_a_cast_with_other_readers_or_at_an_output_keeps_them() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=T.DOUBLE, name="wide"),
        helper.make_node("Cast", ["wide"], ["back"], to=T.FLOAT, name="back"),
        helper.make_node("Cast", ["wide"], ["seen"], to=T.INT32, name="seen"),
        helper.make_node("Cast", ["seen"], ["seen_too"], to=T.FLOAT, name="seen_too"),
        helper.make_node("Add", ["back", "seen_too"], ["y"], name="y"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)})
    simplified, _ = run_passes(original, [SimplifyCasts()])
    assert ops(simplified) == ["Cast", "Cast", "Cast", "Add"]
    alike(original, simplified)
    through = model([helper.make_node("Cast", ["x"], ["y"], to=T.FLOAT, name="c")], {"x": (3,)}, {"y": (3,)})
    assert run_passes(through, [SimplifyCasts()])[0] == through


def test_cast_like_becomes_a_cast_and_a_bias_of_zeros_a_constant() -> None:
    """torch.onnx.export(dynamo=True, optimize=False) of a convolution without bias."""
    nodes = [
        helper.make_node("CastLike", ["zero", "x"], ["z"], name="like"),
        helper.make_node("Expand", ["z", "four"], ["bias"], name="expand"),
        helper.make_node("Conv", ["x", "w", "bias"], ["c"], name="conv"),
        helper.make_node("CastLike", ["c", "i"], ["y"], name="last"),
    ]
    values = {"zero": F(0), "four": np.array([4]), "w": weights(4, 3, 1, 1), "i": np.int32(0)}
    kinds = {"opset": 19, "output_type": T.INT32}
    original = model(nodes, {"x": (1, 3, 2, 2)}, {"y": (1, 4, 2, 2)}, values, **kinds)
    simplified, _ = run_passes(original, [SimplifyCasts(), FoldConstants()])
    assert ops(simplified) == ["Conv", "Cast"]
    assert {a.name: a.i for a in simplified.graph.node[1].attribute} == {"to": T.INT32}
    alike(original, simplified, 5 * image(1, 3, 2, 2))


def test_cast_like_a_tensor_of_unknown_type_stays() -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["m"], name="m", domain="org.example"),
        helper.make_node("CastLike", ["x", "m"], ["c"], name="c"),
        helper.make_node("Add", ["c", "m"], ["y"], name="y"),
    ]
    original = model(nodes, {"x": (3,)}, {"y": (3,)}, domains=["org.example"])
    assert run_passes(original, [SimplifyCasts()])[0] == original


F = np.float32
NO_OPS = [
    ("Mul", ["r", "k"], F(1)),
    ("Mul", ["k", "r"], np.ones((1, 2, 1), F)),
    ("Mul", ["r", "k"], np.ones((2, 3), F)),
    ("Div", ["r", "k"], F([1])),
    ("Pow", ["r", "k"], F(1)),
    ("Sub", ["r", "k"], F(0)),
    ("Add", ["r", "k"], F(-0.0)),
    ("Add", ["k", "r"], F([0])),
    ("Sub", ["r", "k"], F(-0.0)),
]
OPS = [
    ("Mul", ["r", "k"], F([1, 1, 2])),
    ("Div", ["k", "r"], F(1)),
    ("Pow", ["k", "r"], F(1)),
    ("Sub", ["k", "r"], F(0)),
    ("Add", ["r", "k"], F(1e-30)),
    ("Mul", ["r", "k"], F(0)),
]


def no_op_net(op: str, inputs: list[str], constant: np.ndarray, given: tuple[int | str, ...], last: str = "Exp") -> Any:
    nodes = [
        helper.make_node("Neg", ["x"], ["r"], name="r"),
        helper.make_node(op, inputs, ["m"], name="op"),
        helper.make_node(last, ["m"], ["y"], name="last"),
    ]
    return model(nodes, {"x": given}, {"y": [None] * len(given)}, {"k": constant})


@pytest.mark.parametrize(("op", "inputs", "constant"), NO_OPS)
def test_arithmetic_that_changes_nothing_goes(op: str, inputs: list[str], constant: np.ndarray) -> None:
    original = no_op_net(op, inputs, constant, (4, 2, 3))
    removed, runs = run_passes(original, [RemoveNoOpArithmetic()])
    assert ops(removed) == ["Neg", "Exp"]
    assert runs[0].result.fired == ((f"no-op-{op.lower()}", "op"),)
    feed = image(4, 2, 3)
    feed[0] = [[0, -0.0, np.inf], [-np.inf, np.nan, 1e-40]]
    alike(original, removed, feed)


@pytest.mark.parametrize(("op", "inputs", "constant"), OPS)
def test_arithmetic_that_changes_something_stays(op: str, inputs: list[str], constant: np.ndarray) -> None:
    original = no_op_net(op, inputs, constant, (4, 2, 3))
    assert run_passes(original, [RemoveNoOpArithmetic()])[0] == original


def test_ones_that_raise_the_rank_or_could_widen_an_axis_stay() -> None:
    original = no_op_net("Mul", ["r", "k"], np.ones((1, 1, 1, 1), F), (4, 2, 3))
    original.graph.output[0].type.tensor_type.shape.dim.add()
    assert run_passes(original, [RemoveNoOpArithmetic()])[0] == original
    for given in [(4, 1, 3), (4, "C", 3)]:
        original = no_op_net("Mul", ["r", "k"], np.ones((2, 1), F), given)
        assert run_passes(original, [RemoveNoOpArithmetic()])[0] == original
    original = no_op_net("Mul", ["r", "k"], np.ones((1, 1), F), ("N", "C", "W"))
    assert ops(run_passes(original, [RemoveNoOpArithmetic()])[0]) == ["Neg", "Exp"]


def test_a_power_of_integers_and_old_broadcasting_stay() -> None:
    """Powers of large integers are rounded on their way through floating point."""
    power = model(
        [
            helper.make_node("Abs", ["x"], ["r"], name="r"),
            helper.make_node("Pow", ["r", "k"], ["m"], name="p"),
            helper.make_node("Neg", ["m"], ["y"], name="y"),
        ],
        {"x": (3,)},
        {"y": (3,)},
        {"k": F(1)},
        input_type=T.INT64,
        output_type=T.INT64,
    )
    assert run_passes(power, [RemoveNoOpArithmetic()])[0] == power
    old = no_op_net("Mul", ["r", "k"], np.ones(2, F), (4, 2, 3))
    old.opset_import[0].version = 6
    old.graph.node[1].attribute.extend([helper.make_attribute("broadcast", 1), helper.make_attribute("axis", 1)])
    assert run_passes(old, [RemoveNoOpArithmetic()])[0] == old
    one = no_op_net("Mul", ["r", "k"], F([1]), (4, 2, 3))
    one.opset_import[0].version = 6
    assert run_passes(one, [RemoveNoOpArithmetic()])[0] == one


def test_a_zero_whose_sign_a_division_shows_is_added() -> None:
    original = no_op_net("Add", ["r", "k"], F(0), (3,), last="Reciprocal")
    assert run_passes(original, [RemoveNoOpArithmetic()])[0] == original
    negative = no_op_net("Add", ["r", "k"], F(-0.0), (3,), last="Reciprocal")
    removed, _ = run_passes(negative, [RemoveNoOpArithmetic()])
    assert ops(removed) == ["Neg", "Reciprocal"]
    alike(negative, removed, F([0, -0.0, 1]))


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
