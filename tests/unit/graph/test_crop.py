"""Slices and negative Pads that take away what the node before them made."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.crop import CropPads, CropTransposed
from tests.unit.graph.builders import array, image, model, ops, run, weights


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


def test_a_negative_pad_crops_a_transposed_convolution_too() -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], name="up", strides=[2, 2]),
        helper.make_node("Pad", ["c", "widths"], ["y"], name="cut"),
    ]
    values = {"w": weights(3, 4, 3, 3), "widths": np.array([0, 0, -1, 0, 0, 0, 0, -2])}
    proto = model(nodes, {"x": (1, 3, "H", "W")}, {"y": [None] * 4}, values)
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["ConvTranspose"]
    feed = image(1, 3, 4, 5)
    np.testing.assert_allclose(run(cleaned, x=feed)[0], run(proto, x=feed)[0], rtol=1e-5, atol=1e-6)


WIDTHS = [0, 0, 1, 2, 0, 0, 2, 3]


def padded(cut: onnx.NodeProto, mode: str, shape: tuple[Any, ...] = (1, 3, "H", "W"), **values: Any) -> onnx.ModelProto:
    """x → Pad by (1, 2) rows and (2, 3) columns → cut → y."""
    nodes = [helper.make_node("Pad", ["x", "widths"], ["p"], name="pad", mode=mode), cut]
    return model(nodes, {"x": shape}, {"y": [None] * 4}, {"widths": np.array(WIDTHS), **values}, opset=19)


def sliced(mode: str, starts: list[int], ends: list[int], axes: list[int], **options: Any) -> onnx.ModelProto:
    cut = helper.make_node("Slice", ["p", "starts", "ends", "axes"], ["y"], name="cut")
    values = {"starts": np.array(starts), "ends": np.array(ends), "axes": np.array(axes)}
    return padded(cut, mode, **values, **options)


def shrunk(mode: str, widths: list[int]) -> onnx.ModelProto:
    return padded(helper.make_node("Pad", ["p", "cuts"], ["y"], name="cut"), mode, cuts=np.array(widths))


def cropped(proto: onnx.ModelProto, wanted: list[int]) -> None:
    """The Pad alone is left, with these widths."""
    found, runs = run_passes(proto, [CropPads()])
    assert ops(found) == ["Pad"]
    assert array(found, found.graph.node[0].input[1]).tolist() == wanted
    for size in ((4, 5), (7, 6)):
        feed = image(1, 3, *size)
        np.testing.assert_array_equal(run(found, x=feed)[0], run(proto, x=feed)[0])
    assert sum(step.result.modified for step in runs) == 1


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_a_pad_adds_less_by_what_is_cut_off(mode: str) -> None:
    cropped(sliced(mode, [1, 1], [-2, -1], [2, 3]), [0, 0, 0, 1, 0, 0, 0, 2])
    cropped(sliced(mode, [0], [-3], [-1]), [0, 0, 1, 2, 0, 0, 2, 0])
    cropped(shrunk(mode, [0, 0, -1, 0, 0, 0, -2, -1]), [0, 0, 0, 2, 0, 0, 0, 2])


def vanished(proto: onnx.ModelProto) -> None:
    """Behind a Relu, nothing but the Relu is left."""
    proto.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"], name="r"))
    proto.graph.node[1].input[0] = "r"
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["Relu"]
    np.testing.assert_array_equal(run(cleaned, x=image(1, 3, 4, 5))[0], run(proto, x=image(1, 3, 4, 5))[0])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_a_pad_that_is_cut_off_again_goes(mode: str) -> None:
    vanished(sliced(mode, [1, 2], [-2, -3], [2, 3]))
    vanished(sliced(mode, [1, 2], [5, 7], [2, 3], shape=(1, 3, 4, 5)))
    vanished(shrunk(mode, [-width for width in WIDTHS]))


def test_one_slice_after_the_other() -> None:
    proto = sliced("constant", [1], [-1], [2])
    proto.graph.node[1].output[0] = "s"
    proto.graph.node.append(helper.make_node("Slice", ["s", "next", "last", "both"], ["y"], name="again"))
    for name, value in (("next", [2, 0]), ("last", [-3, -1]), ("both", [3, 2])):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    vanished(proto)


@pytest.mark.parametrize(
    ("starts", "ends", "axes"),
    [
        ([2], [-2], [2]),  # more than was added
        ([1], [5], [2]),  # how much it cuts depends on the size
    ],
)
def test_other_slices_of_a_pad_stay(starts: list[int], ends: list[int], axes: list[int]) -> None:
    proto = sliced("constant", starts, ends, axes)
    assert run_passes(proto, [CropPads()])[0] == proto


def test_growing_pads_and_pads_with_another_reader_stay() -> None:
    proto = shrunk("constant", [0, 0, -1, 0, 0, 0, 1, 0])
    assert run_passes(proto, [CropPads()])[0] == proto
    proto = sliced("constant", [1], [-1], [2])
    proto.graph.output.append(helper.make_tensor_value_info("p", 1, [None] * 4))
    assert run_passes(proto, [CropPads()])[0] == proto
