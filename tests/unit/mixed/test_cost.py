"""The cost model: what INT8 saves, what borders take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx import helper

from pipeline.errors import ModelError
from pipeline.mixed.cost import DEFAULT_RATES, KERNEL_MS, CostModel
from tests.tiny_unet import tiny_unet

SHAPES = {"image": (1, 3, 1024, 1024)}
NAMES = ("down0", "down1", "bottom", "up_conv1", "up0", "up_conv0", "head")


def model(rates=DEFAULT_RATES, side=1024):
    return CostModel(tiny_unet(size="side"), {"image": (1, 3, side, side)}, rates)


def test_int8_is_faster_than_fp16():
    assert model().milliseconds(NAMES) < model().milliseconds(())


def test_larger_images_take_longer():
    times = [model(side=side).milliseconds(NAMES) for side in (32, 256, 1024)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_slower_rates_take_longer():
    slow = replace(DEFAULT_RATES, bandwidth=DEFAULT_RATES.bandwidth / 2)
    assert model(slow).milliseconds(()) > model().milliseconds(())
    weak = replace(DEFAULT_RATES, operations=dict.fromkeys(DEFAULT_RATES.operations, 1000000000.0))
    assert model(weak).milliseconds(()) == pytest.approx(
        2e-6 * sum(model().macs.values()), rel=0.01
    )  # arithmetic bound: all else vanishes


def test_every_kernel_takes_its_time():
    tiny = model(side=4)
    kernels = 7 + 1 + 1 + 2 + 2  # convolutions, pools, resize, concatenations, casts at both ends
    kernels += 1  # the second pool
    assert tiny.milliseconds(()) == pytest.approx(kernels * KERNEL_MS, rel=0.02)


def test_borders_cost():
    """``first`` is read by a pool, for down1, and by a concatenation, for up_conv0."""
    cost = model()
    assert cost.borders(NAMES) == cost.borders(()) == 0
    without = [name for name in NAMES if name != "up_conv0"]
    assert cost.borders(without) == 1
    without.remove("down1")
    assert cost.borders(without) == 0
    without.remove("bottom")
    assert cost.borders(without) == 1  # of down1's output, which up_conv1 reads too


def test_a_border_can_take_more_than_int8_saves():
    cost = model()
    assert cost.borders(["down1"]) == 1
    assert cost.milliseconds(["down1"]) > cost.milliseconds([])


def test_sizes_that_do_not_follow():
    with pytest.raises(ModelError, match="sizes of the convolution"):
        CostModel(tiny_unet(size="side"), {})


def test_nodes_without_a_kernel_of_their_own_and_with_one():
    fused = model().milliseconds(())
    graph = tiny_unet(size="side")
    last = graph.graph.node[-1]
    last.output[0] = "raw"
    graph.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"], "softmax", axis=1))
    assert CostModel(graph, SHAPES).milliseconds(()) > fused
