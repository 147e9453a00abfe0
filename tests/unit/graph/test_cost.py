"""Multiply-accumulates, checked against counting by hand."""

import pytest
from onnx import helper

from pipeline.errors import ModelError
from pipeline.graph.cost import convolution_macs, operators
from tests.tiny_unet import CHANNELS, CLASSES, SIZE, images, observed_table, tiny_unet
from tests.unit.graph.builders import model, weights

C, PIXELS = CHANNELS, SIZE * SIZE
BY_HAND = {
    "down0": 9 * 3 * C * PIXELS,
    "down1": 9 * C * 2 * C * PIXELS // 4,
    "bottom": 9 * 2 * C * 2 * C * PIXELS // 16,
    "up_conv1": 9 * 4 * C * 2 * C * PIXELS // 4,
    "up0": 4 * 2 * C * C * PIXELS // 4,
    "up_conv0": 9 * 2 * C * C * PIXELS,
    "head": C * CLASSES * PIXELS,
}


def test_a_unet():
    assert convolution_macs(tiny_unet(), {}) == BY_HAND


def test_a_dynamic_graph_counts_what_it_is_fed():
    found = convolution_macs(tiny_unet("batch", size="side"), {"image": (3, 3, SIZE, SIZE)})
    assert found == {name: 3 * macs for name, macs in BY_HAND.items()}


def test_quantized_graphs_count_the_same():
    from pipeline.graph.quantize import quantize

    network = tiny_unet()
    typed = quantize(network, observed_table(network, images(1)), half=True)
    assert convolution_macs(typed, {}) == BY_HAND


def test_groups():
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "depthwise", group=4, pads=[1] * 4)
    graph = model([conv], {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, {"w": weights(4, 1, 3, 3)})
    assert convolution_macs(graph, {}) == {"depthwise": 9 * 4 * 64}
    assert operators(graph) == {"depthwise": "Conv"}


def test_an_unknown_size():
    with pytest.raises(ModelError, match="do not follow"):
        convolution_macs(tiny_unet("batch"), {})
