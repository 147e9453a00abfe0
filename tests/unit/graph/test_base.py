from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from pipeline.errors import ModelError
from pipeline.graph.base import Pass, PassResult, export_graph, import_graph, run_passes
from pipeline.graph.cleaning import clean_model
from tests.unit.graph.builders import conv_net, image, model, ops, run, weights


class RenameOnce(Pass):
    name = "rename-once"

    def call(self, graph: gs.Graph) -> PassResult:
        fired = [("rename", node.name) for node in graph.nodes if not node.name.endswith("!")]
        for node in graph.nodes:
            node.name = node.name.rstrip("!") + "!"
        return PassResult.of(fired)


class Restless(Pass):
    name = "restless"

    def call(self, graph: gs.Graph) -> PassResult:
        return PassResult.of([("again", "node")])


class Failing(Pass):
    name = "failing"

    def call(self, graph: gs.Graph) -> PassResult:
        raise ZeroDivisionError("inside")


class Demanding(Pass):
    name = "demanding"

    def requires(self, graph: gs.Graph) -> None:
        raise ModelError("not such a graph")

    def call(self, graph: gs.Graph) -> PassResult:
        raise AssertionError("call must not run")


def test_runs_until_a_round_changes_nothing() -> None:
    renamed, runs = run_passes(conv_net(), [RenameOnce()])
    assert [(run.round, run.result.modified) for run in runs] == [(1, True), (2, False)]
    assert [node.name for node in renamed.graph.node[:2]] == ["a!", "a.relu!"]


def test_a_model_that_no_pass_changes_comes_back_byte_for_byte() -> None:
    original = conv_net()
    original.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, (1, 4, 8, 8)))
    same, _ = run_passes(original, [])
    assert same.SerializeToString(deterministic=True) == original.SerializeToString(deterministic=True)
    assert same is not original


def test_passes_that_never_settle_are_an_error_that_names_them() -> None:
    with pytest.raises(ModelError, match=r"restless still change.*round 3"):
        run_passes(conv_net(), [RenameOnce(), Restless()], max_rounds=3)


def test_an_exception_in_a_pass_names_the_pass() -> None:
    with pytest.raises(ModelError, match="pass failing failed: ZeroDivisionError: inside"):
        run_passes(conv_net(), [Failing()])


def test_requires_runs_before_call() -> None:
    with pytest.raises(ModelError, match="not such a graph"):
        run_passes(conv_net(), [Demanding()])


def test_stop_after_counts_changes() -> None:
    untouched, _ = run_passes(conv_net(), [RenameOnce(), Restless()], stop_after=0)
    once, runs = run_passes(conv_net(), [RenameOnce(), Restless()], stop_after=1)
    assert untouched.graph.node[0].name == "a"
    assert once.graph.node[0].name == "a!"
    assert [run.name for run in runs] == ["rename-once"]


def test_metadata_of_every_level_survives() -> None:
    original = conv_net()
    original.metadata_props.add(key="card", value="model")
    original.graph.metadata_props.add(key="g", value="graph")
    original.graph.node[0].metadata_props.add(key="n", value="node")
    original.graph.node[0].doc_string = "first"
    original.graph.input[0].metadata_props.add(key="i", value="input")
    original.graph.initializer[0].metadata_props.add(key="w", value="weight")
    original.graph.input[0].type.denotation = "IMAGE"
    original.model_version, original.domain, original.doc_string = 7, "org.example", "about"
    renamed, _ = run_passes(original, [RenameOnce()])
    for before, after in (
        (original, renamed),
        (original.graph, renamed.graph),
        (original.graph.node[0], renamed.graph.node[0]),
        (original.graph.input[0], renamed.graph.input[0]),
        (original.graph.initializer[0], renamed.graph.initializer[0]),
    ):
        assert list(after.metadata_props) == list(before.metadata_props)
        assert len(after.metadata_props) == 1
    assert renamed.graph.node[0].doc_string == "first"
    assert renamed.graph.input[0].type.denotation == "IMAGE"
    assert (renamed.model_version, renamed.domain, renamed.doc_string) == (7, "org.example", "about")
    assert list(renamed.opset_import) == list(original.opset_import)


def test_the_argument_is_not_changed() -> None:
    original = conv_net()
    before = original.SerializeToString(deterministic=True)
    clean_model(original)
    assert original.SerializeToString(deterministic=True) == before


def test_attributes_and_operators_that_graphsurgeon_does_not_know_survive() -> None:
    node = helper.make_node("Mystery", ["x"], ["m"], name="mystery", domain="org.example", empty=["a"])
    node.attribute.append(helper.make_attribute("kind", helper.make_tensor_type_proto(TensorProto.FLOAT, (1,))))
    node.attribute.append(helper.make_attribute("none", [], attr_type=onnx.AttributeProto.INTS))
    node.overload = "variant"
    relu = helper.make_node("Relu", ["m"], ["y"], name="relu")
    original = model([node, relu], {"x": (2,)}, {"y": (2,)}, domains=["org.example"], ir=10)
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    exported = export_graph(import_graph(copy), copy)
    assert list(exported.graph.node[0].attribute) == list(node.attribute)
    assert exported.graph.node[0].overload == "variant"
    assert list(exported.opset_import) == list(original.opset_import)


def branches() -> onnx.ModelProto:
    """y = relu(conv(image)) * 2 if flag else the same + bias; both branches capture outer tensors."""
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Mul", ["r", "two"], ["then_out"], name="then_mul")],
        "then",
        [],
        [value("then_out", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["r"], ["else_in"]), helper.make_node("Add", ["else_in", "two"], ["else_out"])],
        "else",
        [],
        [value("else_out", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r0"], name="relu"),
        helper.make_node("Identity", ["r0"], ["r"], name="id"),
        helper.make_node("ReduceMax", ["r"], ["top"], keepdims=0, name="top"),
        helper.make_node("Greater", ["top", "two"], ["flag"], name="flag"),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other, name="if"),
    ]
    values = {"w": weights(4, 3, 3, 3), "b": weights(4), "two": weights(1) * 0 + 2}
    return model(nodes, {"image": (1, 3, 6, 6)}, {"y": (1, 4, 6, 6)}, values)


def test_subgraphs_that_capture_renamed_tensors_still_compute_the_same() -> None:
    original = branches()
    cleaned, _ = clean_model(original)
    assert "Identity" not in ops(cleaned)
    for scale in (0.1, 10):  # one input for each branch
        feed = image(1, 3, 6, 6) * scale
        (want,), (got,) = run(original, image=feed.astype("float32")), run(cleaned, image=feed.astype("float32"))
        assert (want == got).all()
    again, _ = clean_model(cleaned)
    assert again.SerializeToString(deterministic=True) == cleaned.SerializeToString(deterministic=True)
