"""The cost model: what INT8 saves, what borders take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx import helper

from pipeline.errors import ModelError
from pipeline.mixed.cost import BORDER_FACTOR, DEFAULT_RATES, KERNEL_MS, CostModel
from tests.recorded_engines import NETWORKS, recorded
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
    without = [name for name in NAMES if name != "head"]
    assert cost.borders(without) == 1  # of up_conv0's output, which no other one reads
    without.remove("up_conv0")
    assert cost.borders(without) == 2  # of down0's output, which down1 reads in INT8, and of up0's
    without.remove("up0")
    assert cost.borders(without) == 2
    assert cost.borders(["bottom"]) == 2  # of what it reads, and of what it gives


def test_a_border_can_take_more_than_int8_saves():
    cost = model()
    assert cost.borders(["down1"]) == 2
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


def learned(name):
    one = recorded(name)
    cost = CostModel(one.model, one.shapes)
    cost.learn(one.engines)
    return one, cost


@pytest.mark.parametrize("name", NETWORKS)
def test_measured_engines_cost_what_they_take(name):
    one, cost = learned(name)
    assert cost.milliseconds(one.names) == pytest.approx(one.engines["int8"].whole_ms)
    assert cost.milliseconds(()) == pytest.approx(one.engines["fp16"].whole_ms)


@pytest.mark.parametrize("name", NETWORKS)
def test_mixtures_cost_what_was_measured(name):
    """Beyond all FP16 or not, as it was: scattered convolutions in FP16 are slower than all of them."""
    one, cost = learned(name)
    half = one.engines["fp16"].whole_ms
    assert len(one.mixtures) > 1
    for mixture, ms in one.mixtures.items():
        estimated = cost.milliseconds(one.names - mixture)
        assert estimated == pytest.approx(ms, rel=0.02)
        assert (estimated > half) == (ms > half)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_factor_corrects_the_borders(name):
    one, cost = learned(name)
    cost.correct({one.names - mixture: ms for mixture, ms in one.mixtures.items()})
    assert cost.border_factor == pytest.approx(BORDER_FACTOR, rel=0.1)
    for mixture, ms in one.mixtures.items():
        assert cost.milliseconds(one.names - mixture) == pytest.approx(ms, rel=0.003)


def test_a_region_costs_less_than_as_many_scattered_convolutions():
    one, cost = learned("camvid")
    inner = {name for name in one.names if name.startswith(("down3", "down4", "up1", "up2"))}
    scattered = set(sorted(one.names)[:: len(one.names) // len(inner)][: len(inner)])
    assert cost.borders(inner) < cost.borders(scattered)
    assert cost.milliseconds(inner) < one.engines["fp16"].whole_ms < cost.milliseconds(scattered)


def test_without_mixtures_nothing_is_corrected():
    one, cost = learned("isbi")
    cost.correct({one.names: 99.0, frozenset(): 1.0})
    assert cost.border_factor == BORDER_FACTOR


def test_what_the_milliseconds_rest_on():
    assert model().source == DEFAULT_RATES.source
    assert "a border takes 1.60 times a copy at 1105 GB/s and 1.9 µs" in learned("isbi")[1].source


def test_borders_that_all_int8_has_are_part_of_it():
    """``head`` is excluded: all INT8 has a border before it."""
    cost = CostModel(tiny_unet(size="side"), SHAPES, quantized=set(NAMES) - {"head"})
    assert cost.borders(set(NAMES) - {"head"}) == 0
    assert cost.borders(set(NAMES) - {"head", "down1"}) > 0
