"""Blocks of networks of several shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.graph.half import to_half
from pipeline.graph.levels import Block, blocks, convolution_precisions
from pipeline.graph.quantize import quantize
from tests.tiny_unet import images, observed_table, tiny_unet


def network(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], outputs: str) -> ModelProto:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 32, 32])
    logits = helper.make_tensor_value_info(outputs, TensorProto.FLOAT, [1, 4, None, None])
    constants = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"))
    model = helper.make_model(
        helper.make_graph(nodes, "net", [image], [logits], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def conv(name: str, source: str, *, stride: int = 1) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, "w"], [name], name, pads=[1] * 4, strides=[stride] * 2)


def up(name: str, source: str) -> onnx.NodeProto:
    return helper.make_node("Resize", [source, "", "twice"], [name], name, mode="nearest")


WEIGHT = {"w": (4, 4, 3, 3), "w1": (4, 4, 1, 1), "w2": (4, 8, 3, 3)}


def shape(found: tuple[Block, ...]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(block.name, block.level, block.sources) for block in found]


@pytest.mark.parametrize("size", [32, "s"])
def test_a_u(size: int | str) -> None:
    found = blocks(tiny_unet(size=size), {"image": (1, 3, 64, 64)})
    assert shape(found) == [
        ("down0", 0, ()),
        ("down1", 1, (0,)),
        ("bottom", 2, (1,)),
        ("up_conv1", 1, (2, 1)),
        ("up0 … head", 0, (3, 0)),
    ]
    assert [block.size for block in found] == [(64, 64), (32, 32), (16, 16), (32, 32), (64, 64)]
    assert [block.channels for block in found] == [16, 32, 32, 32, 3]
    nodes = [node for block in found for node in block.nodes]
    assert sorted(nodes) == sorted(node.name for node in tiny_unet().graph.node)


def test_residual_branches_and_channel_attention_stay_in_their_block() -> None:
    nodes = [
        conv("stem.a", "image"),
        conv("enc.a", "stem.a", stride=2),
        helper.make_node("Conv", ["stem.a", "w1"], ["enc.skip"], "enc.skip", strides=[2, 2]),
        helper.make_node("Add", ["enc.a", "enc.skip"], ["sum"], "enc.add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"], "enc.mean"),
        helper.make_node("Sigmoid", ["mean"], ["gate"], "enc.gate"),
        helper.make_node("Mul", ["sum", "gate"], ["gated"], "enc.mul"),
        up("dec.up", "gated"),
        conv("dec.a", "dec.up"),
    ]
    found = blocks(network(nodes, WEIGHT, "dec.a"), {})
    assert shape(found) == [("stem", 0, ()), ("enc", 1, (0,)), ("dec", 0, (1,))]
    assert len(found[1].nodes) == 6


def test_nested_ups_are_blocks_of_their_own() -> None:
    """UNet++: X01 from X10, X02 from X11 (which is made from X20) and X01."""
    nodes = [
        conv("x00", "image"),
        conv("x10", "x00", stride=2),
        up("x01.up", "x10"),
        helper.make_node("Concat", ["x00", "x01.up"], ["x01.join"], "x01.join", axis=1),
        helper.make_node("Conv", ["x01.join", "w2"], ["x01"], "x01.conv", pads=[1] * 4),
        conv("x20", "x10", stride=2),
        up("x11.up", "x20"),
        helper.make_node("Concat", ["x10", "x11.up"], ["x11.join"], "x11.join", axis=1),
        helper.make_node("Conv", ["x11.join", "w2"], ["x11"], "x11.conv", pads=[1] * 4),
        up("x02.up", "x11"),
        helper.make_node("Concat", ["x01", "x02.up"], ["x02.join"], "x02.join", axis=1),
        helper.make_node("Conv", ["x02.join", "w2"], ["x02"], "x02.conv", pads=[1] * 4),
    ]
    found = blocks(network(nodes, WEIGHT, "x02"), {})
    assert shape(found) == [
        ("x00", 0, ()),
        ("x10", 1, (0,)),
        ("x01", 0, (1, 0)),
        ("x20", 2, (1,)),
        ("x11", 1, (3, 1)),
        ("x02", 0, (4, 2)),
    ]


def test_precisions_of_typed_graphs() -> None:
    model = tiny_unet()
    names = {node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    table = observed_table(model, images(2))
    assert convolution_precisions(model) == dict.fromkeys(names, "fp32")
    assert convolution_precisions(to_half(model)) == dict.fromkeys(names, "fp16")
    mixed = convolution_precisions(quantize(model, table, half=True, exclude=["head"]))
    assert mixed == {**dict.fromkeys(names, "int8"), "head": "fp16"}
