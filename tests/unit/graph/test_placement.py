"""Which inputs are quantized, and which tensors share a range."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from onnx import ModelProto, helper

from pipeline.calibration.table import CalibrationTable
from pipeline.errors import CalibrationError
from pipeline.graph.placement import activation_tensors, implicit_ranges, quantizable_tensors, shared_ranges
from pipeline.graph.quantize import quantize
from tests.unit.graph.builders import image, model, ops, run, weights

make = helper.make_node


def one_level(*, resized_output: bool = False) -> ModelProto:
    """A UNet of one level: skip and upsampled meet in a Concat; optionally its logits are upsampled too."""
    nodes = [
        make("Conv", ["x", "stem.weight"], ["stem"], name="stem", pads=[1] * 4),
        make("Relu", ["stem"], ["skip"], name="skip"),
        make("MaxPool", ["skip"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        make("Conv", ["pooled", "deep.weight"], ["deep"], name="deep", pads=[1] * 4),
        make("Relu", ["deep"], ["deep.relu"], name="deep.relu"),
        make("Resize", ["deep.relu", "", "twice"], ["up"], name="up", mode="nearest", nearest_mode="floor"),
        make("Concat", ["skip", "up"], ["both"], name="both", axis=1),
        make("Conv", ["both", "head.weight"], ["head" if resized_output else "y"], name="head"),
    ]
    if resized_output:
        nodes.append(make("Resize", ["head", "", "twice"], ["y"], name="last", mode="nearest", nearest_mode="floor"))
    values = {
        "stem.weight": weights(4, 3, 3, 3),
        "deep.weight": weights(4, 4, 3, 3),
        "head.weight": weights(2, 8, 1, 1),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    size = 16 * (1 + resized_output)
    return model(nodes, {"x": (1, 3, 16, 16)}, {"y": (1, 2, size, size)}, values, opset=18)


RANGES = {"x": 4.0, "stem": 9.0, "skip": 5.0, "pooled": 5.5, "deep": 8.0, "deep.relu": 3.0, "up": 2.5, "both": 4.5}
TABLE = CalibrationTable("minmax", {**RANGES, "y": 3.0, "head": 3.0})
JOINED = ("skip", "pooled", "deep.relu", "up", "both")


def test_tensors_by_placement() -> None:
    assert quantizable_tensors(one_level()) == ("x", "pooled", "both")
    assert quantizable_tensors(one_level(), (), "shared") == ("x", "skip", "pooled", "deep.relu", "up", "both")


@pytest.mark.parametrize("resized_output", [False, True])
def test_what_a_concat_joins_has_one_range(resized_output: bool) -> None:
    table = shared_ranges(one_level(resized_output=resized_output), TABLE, ())
    assert {tensor: table.amax[tensor] for tensor in JOINED} == dict.fromkeys(JOINED, 5.5)
    assert {tensor: amax for tensor, amax in table.amax.items() if tensor not in JOINED} == {
        tensor: amax for tensor, amax in TABLE.amax.items() if tensor not in JOINED
    }


def test_every_reader_in_int8_takes_a_pair_and_nothing_else_does() -> None:
    quantized = quantize(one_level(resized_output=True), TABLE, half=False, qdq="shared")
    pairs = {node.output[0]: node.input[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    read = {node.name: [tensor in pairs for tensor in node.input[:2]] for node in quantized.graph.node if node.name}
    assert [read[name][0] for name in ("stem", "pool", "deep", "up", "head")] == [True] * 5
    assert read["both"] == [True, True]
    assert not any(read["skip"] + read["deep.relu"] + read["last"])
    # Two readers of one tensor share its pair: x, skip, pooled, deep.relu, up, both, and three weights.
    assert Counter(ops(quantized))["QuantizeLinear"] == 9


def test_passing_nodes_give_the_integers_that_they_take() -> None:
    """With one scale, a second rounding changes nothing: only the clipping of the joined tensors' own pairs remains."""
    original, feed = one_level(), image(1, 3, 16, 16)
    wide = CalibrationTable("minmax", {**TABLE.amax, **dict.fromkeys(JOINED, 5.5)})
    (shared,) = run(quantize(original, TABLE, half=False, qdq="shared"), x=feed)
    (plain,) = run(quantize(original, wide, half=False), x=feed)
    np.testing.assert_array_equal(shared, plain)


def test_an_excluded_reader_ends_the_region() -> None:
    assert quantizable_tensors(one_level(), ("head",), "shared") == ("x", "skip", "pooled")
    table = shared_ranges(one_level(), TABLE, ("head",))
    assert (table.amax["skip"], table.amax["pooled"], table.amax["up"]) == (5.5, 5.5, 2.5)


def test_a_missing_range_is_named() -> None:
    partial = CalibrationTable("minmax", {tensor: amax for tensor, amax in TABLE.amax.items() if tensor != "up"})
    quantize(one_level(), partial, half=False)
    with pytest.raises(CalibrationError, match="lacks 1 of the ranges") as caught:
        quantize(one_level(), partial, half=False, qdq="shared")
    assert caught.value.got.startswith("1 missing: up")


def test_on_the_implicit_route_an_upsampled_output_is_joined_too() -> None:
    table = implicit_ranges(one_level(resized_output=True), CalibrationTable("minmax", {**TABLE.amax, "y": 2.0}))
    assert {tensor: table.amax[tensor] for tensor in JOINED} == dict.fromkeys(JOINED, 5.5)
    assert (table.amax["head"], table.amax["y"], table.amax["x"]) == (3.0, 3.0, 4.0)


def test_all_activations_are_known_by_name() -> None:
    assert set(activation_tensors(one_level(resized_output=True))) == set(TABLE.amax)
