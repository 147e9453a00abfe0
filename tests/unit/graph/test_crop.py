"""Slices behind transposed convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.crop import CropTransposed
from tests.unit.graph.builders import image, model, ops, run, weights


def net(
    starts: list[int], ends: list[int], axes: list[int], shape: tuple[Any, ...] = (1, 3, "H", "W"), **extra: Any
) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], name="up", strides=[2, 2], **extra),
        helper.make_node("Slice", ["c", "starts", "ends", "axes"], ["y"], name="cut"),
    ]
    values = {"w": weights(3, 4, 3, 3), "starts": np.array(starts), "ends": np.array(ends), "axes": np.array(axes)}
    return model(nodes, {"x": shape}, {"y": [None] * 4}, values)


@pytest.mark.parametrize(
    ("starts", "ends", "pads"),
    [([0, 0], [-1, -1], [0, 0, 1, 1]), ([1, 0], [2**40, -2], [1, 0, 0, 2]), ([0, 1], [-1, -1], [0, 1, 1, 1])],
)
@pytest.mark.parametrize("extra", [{}, {"pads": [1, 0, 0, 1]}, {"output_padding": [1, 1]}])
def test_a_crop_becomes_pads(starts: list[int], ends: list[int], pads: list[int], extra: dict[str, Any]) -> None:
    proto = net(starts, ends, [2, 3], **extra)
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["ConvTranspose"]
    (found,) = [list(a.ints) for a in cleaned.graph.node[0].attribute if a.name == "pads"]
    assert found == [a + b for a, b in zip(pads, extra.get("pads", [0] * 4), strict=True)]
    for size in ((4, 5), (7, 3)):
        feed = image(1, 3, *size)
        np.testing.assert_allclose(run(cleaned, x=feed)[0], run(proto, x=feed)[0], rtol=1e-5, atol=1e-6)
    assert clean_model(cleaned)[0] == cleaned


@pytest.mark.parametrize(
    ("starts", "ends", "axes"),
    [
        ([0, 0], [2, -1], [1, 3]),  # channels
        ([0, 0], [6, 6], [2, 3]),  # how much it cuts depends on the size
    ],
)
def test_other_slices_stay(starts: list[int], ends: list[int], axes: list[int]) -> None:
    proto = net(starts, ends, axes)
    assert run_passes(proto, [CropTransposed()])[0] == proto


def test_known_sizes_give_known_cuts() -> None:
    proto = net([0, 0], [6, 6], [2, 3], shape=(1, 3, 4, 5))
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["ConvTranspose"]
    feed = image(1, 3, 4, 5)
    np.testing.assert_allclose(run(cleaned, x=feed)[0], run(proto, x=feed)[0], rtol=1e-5, atol=1e-6)


def test_a_transposed_convolution_with_another_reader_stays() -> None:
    proto = net([0, 0], [-1, -1], [2, 3])
    proto.graph.output.append(helper.make_tensor_value_info("c", 1, [None] * 4))
    assert run_passes(proto, [CropTransposed()])[0] == proto
