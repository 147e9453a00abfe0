"""Pads, names and whole cleanings on hand-built graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.errors import ModelError
from pipeline.graph.base import Pass, PassResult, run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.names import StableNames
from pipeline.graph.padding import RemoveZeroPads
from pipeline.graph.promises import read_raw_names
from tests.unit.graph.builders import conv_net, image, model, ops, run, weights


def pad_net(widths: list[int], opset: int = 17) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Pad", ["r", "p"] if opset >= 11 else ["r"], ["y"], name="p"),
    ]
    if opset < 11:
        nodes[1].attribute.append(helper.make_attribute("pads", widths))
    shape = [2 + widths[0] + widths[2], 3 + widths[1] + widths[3]]
    return model(nodes, {"x": (2, 3)}, {"y": shape}, {"p": np.array(widths)} if opset >= 11 else {}, opset=opset)


@pytest.mark.parametrize("opset", [10, 11, 13, 18])
def test_zero_pads_go(opset: int) -> None:
    cleaned, runs = run_passes(pad_net([0, 0, 0, 0], opset), [RemoveZeroPads()])
    assert ops(cleaned) == ["Relu"]
    assert [value.name for value in cleaned.graph.output] == ["y"]
    assert runs[0].result.fired == (("zero-pad", "p"),)


@pytest.mark.parametrize("widths", [[0, 1, 0, 0], [0, -1, 0, 0]])
def test_other_pads_stay(widths: list[int]) -> None:
    assert ops(run_passes(pad_net(widths), [RemoveZeroPads()])[0]) == ["Relu", "Pad"]


def scrambled(original: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with a TorchScript exporter's node names and made-up tensor names."""
    text = onnx.ModelProto()
    text.CopyFrom(original)
    names = {"a.weight": "onnx::Conv_5", "a.bias": "onnx::Conv_6", "b.weight": "onnx::Conv_8", "b.bias": "onnx::Conv_9"}
    for tensor in text.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in text.graph.node:
        node.name = {"a": "/a/Conv", "b": "/b/Conv", "c": "/c/Conv"}.get(node.name, f"/x/{node.op_type}")
        for slot, name in enumerate(node.input):
            node.input[slot] = names.get(name, name if name == "image" or name.endswith("weight") else f"/{name}_0")
        for slot, name in enumerate(node.output):
            node.output[slot] = name if name == "logits" else f"/{name}_0"
    return text


def test_names_do_not_depend_on_the_exporters_names() -> None:
    plain, _ = clean_model(conv_net())
    other, _ = clean_model(scrambled(conv_net()))
    assert [node.name for node in plain.graph.node] == ["a", "a.relu", "b", "b.relu", "c"]
    assert [(n.name, list(n.input), list(n.output)) for n in other.graph.node] == [
        (n.name, list(n.input), list(n.output)) for n in plain.graph.node
    ]
    assert [list(node.output) for node in plain.graph.node][-1] == ["logits"]
    assert {t.name for t in plain.graph.initializer} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ("/inc/double_conv/double_conv.0/Conv", "inc.double_conv.0"),
        ("/down1/maxpool_conv/maxpool_conv.1/double_conv/double_conv.3/Conv", "down1.maxpool_conv.1.double_conv.3"),
        ("/outc.conv/Conv", "outc.conv"),
        ("Conv_7", "conv"),
    ],
)
def test_scopes_become_module_paths(scope: str, name: str) -> None:
    node = helper.make_node("Conv", ["x", "onnx::Conv_1"], ["y"], name=scope)
    original = model([node], {"x": (1, 2, 4, 4)}, {"y": (1, 3, 4, 4)}, {"onnx::Conv_1": weights(3, 2, 1, 1)})
    cleaned, _ = run_passes(original, [StableNames()])
    assert cleaned.graph.node[0].name == ("x.conv" if name == "conv" else name)


def test_dynamo_metadata_names_a_convolution_with_a_made_up_weight() -> None:
    node = helper.make_node("Conv", ["x", "val_1"], ["y"], name="node_conv2d")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'inc', 'inc.0', 'conv2d']")
    original = model([node], {"x": (1, 2, 4, 4)}, {"y": (1, 3, 4, 4)}, {"val_1": weights(3, 2, 1, 1)})
    cleaned, _ = run_passes(original, [StableNames()])
    assert cleaned.graph.node[0].name == "inc.0"
    assert cleaned.graph.initializer[0].name == "inc.0.weight"


def test_names_are_unique_and_clear_of_outputs() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["t"]),
        helper.make_node("Relu", ["t"], ["p"]),
        helper.make_node("LeakyRelu", ["t"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["a"]),
    ]
    original = model(nodes, {"x": (1, 2, 4, 4)}, {"a": (1, 3, 4, 4)}, {"a.weight": weights(3, 2, 1, 1)})
    cleaned, _ = clean_model(original)
    assert [node.name for node in cleaned.graph.node] == ["a_1", "a_1.relu", "a_1.leakyrelu", "a_1.add"]
    assert [list(node.output) for node in cleaned.graph.node] == [["a_1"], ["a_1.relu"], ["a_1.leakyrelu"], ["a"]]
    assert (run(original, x=image(1, 2, 4, 4))[0] == run(cleaned, x=image(1, 2, 4, 4))[0]).all()
    again, runs = clean_model(cleaned)
    assert not any(step.result.modified for step in runs)
    assert again == cleaned


def test_a_pass_that_leaves_invalid_onnx_is_named() -> None:
    class Cuts(Pass):
        name = "cuts"

        def call(self, graph: Any) -> PassResult:
            for node in graph.nodes:
                if node.op == "Conv" and len(node.inputs) == 2:
                    del node.inputs[1]
                    return PassResult.of([("cut", node.name)])
            return PassResult(False)

    with pytest.raises(ModelError, match="pass cuts left a graph that ONNX's checker refuses"):
        clean_model(conv_net(), [StableNames(), Cuts()])


def test_an_integer_output_and_a_uint8_input_survive() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT, name="f"),
        helper.make_node("Conv", ["f", "a.weight"], ["c"], name="c"),
        helper.make_node("ArgMax", ["c"], ["m"], axis=1, name="m"),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.UINT8, name="y"),
    ]
    original = model(
        nodes,
        {"x": (1, 2, 4, 4)},
        {"y": (1, 1, 4, 4)},
        {"a.weight": weights(3, 2, 1, 1)},
        input_type=TensorProto.UINT8,
        output_type=TensorProto.UINT8,
    )
    cleaned, _ = clean_model(original)
    assert [node.name for node in cleaned.graph.node] == ["x.cast", "a", "a.argmax", "a.cast"]
    feed = np.random.default_rng(0).integers(0, 255, (1, 2, 4, 4)).astype(np.uint8)
    assert (run(original, x=feed)[0] == run(cleaned, x=feed)[0]).all()


def test_the_raw_exports_names_are_kept_for_older_caches() -> None:
    original = conv_net()
    for node in original.graph.node:
        node.name = f"/{node.name}/node"
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in ("a", "a.relu", "b", "b.relu"):
                    names[place] = f"/made/up/{name}_output_0"
    cleaned, _ = clean_model(original)
    names = read_raw_names(cleaned)
    made = {tensor for node in cleaned.graph.node for tensor in node.output} - {"logits"}
    assert {tensor: names[tensor] for tensor in made} == {tensor: f"/made/up/{tensor}_output_0" for tensor in made}
    again, runs = clean_model(cleaned)
    assert not any(step.result.modified for step in runs)
    assert again.SerializeToString() == cleaned.SerializeToString()
