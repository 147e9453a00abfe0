"""Repeated rows and columns as Keras and tf2onnx write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.repeat import RepeatToResize
from tests.unit.graph.builders import array, image, model, ops, run

NODE = helper.make_node


def repeated(shape: list[Any], *, expand: bool = False, opset: int = 17, times: int = 2, extra: str = "") -> Any:
    """x → every row ``times`` times: Unsqueeze, Tile or Expand, Reshape to sizes computed from Shape."""
    copy = NODE("Expand", ["u", "wide"], ["c"]) if expand else NODE("Tile", ["u", "reps"], ["c"])
    unsqueeze = NODE("Unsqueeze", ["r", "three"] if opset >= 13 else ["r"], ["u"])
    if opset < 13:
        unsqueeze.attribute.append(helper.make_attribute("axes", [3]))
    nodes = [
        NODE("Relu", ["x"], ["r"]),
        unsqueeze,
        copy,
        NODE("Shape", ["x"], ["s"]),
        NODE("Mul", ["s", "grow"], ["sizes"]),
        NODE("Reshape", ["c", "sizes"], ["y"], name="merge"),
    ]
    values = {
        "reps": np.array([1, 1, 1, times, 1]),
        "wide": np.array([1, 1, 1, times, 1]),
        "grow": np.array([1, 1, times, 1]),
    }
    if opset >= 13:
        values["three"] = np.array([3])
    outputs: dict[str, Any] = {"y": [None] * 4}
    if extra:
        outputs[extra] = [None] * 5
    return model(nodes, {"x": shape}, outputs, values, opset=opset)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(("opset", "times"), [(11, 2), (13, 3), (17, 2)])
@pytest.mark.parametrize("shape", [[1, 3, 4, 5], ["N", 3, "H", "W"]])
def test_repeated_rows_are_a_nearest_resize(shape: list[Any], opset: int, times: int, expand: bool) -> None:
    proto = repeated(shape, expand=expand, opset=opset, times=times)
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["Relu", "Resize"]
    np.testing.assert_array_equal(array(cleaned, cleaned.graph.node[1].input[2]), [1, 1, times, 1])
    feed = image(1, 3, 4, 5)
    np.testing.assert_array_equal(run(cleaned, x=feed)[0], run(proto, x=feed)[0])
    assert clean_model(cleaned)[0] == cleaned


def test_rows_and_columns_join_and_a_transpose_between_moves_behind() -> None:
    """As tf2onnx writes UpSampling2D: rows in NCHW, through a Transpose to NHWC, columns there, and back."""
    nodes = [
        NODE("Relu", ["x"], ["r"]),
        NODE("Unsqueeze", ["r", "three"], ["a"]),
        NODE("Tile", ["a", "rows"], ["b"]),
        NODE("Transpose", ["b"], ["c"], perm=[0, 2, 3, 4, 1]),
        NODE("Reshape", ["c", "tall"], ["d"]),
        NODE("Unsqueeze", ["d", "three"], ["e"]),
        NODE("Tile", ["e", "columns"], ["f"]),
        NODE("Reshape", ["f", "big"], ["g"]),
        NODE("Transpose", ["g"], ["y"], perm=[0, 3, 1, 2]),
    ]
    values = {
        "three": np.array([3]),
        "rows": np.array([1, 1, 1, 2, 1]),
        "tall": np.array([1, 8, 5, 3]),
        "columns": np.array([1, 1, 1, 2, 1]),
        "big": np.array([1, 8, 10, 3]),
    }
    proto = model(nodes, {"x": (1, 3, 4, 5)}, {"y": (1, 3, 8, 10)}, values)
    cleaned, _ = clean_model(proto)
    feed = image(1, 3, 4, 5)
    np.testing.assert_array_equal(run(cleaned, x=feed)[0], run(proto, x=feed)[0])
    assert ops(cleaned) == ["Relu", "Resize"]
    np.testing.assert_array_equal(array(cleaned, cleaned.graph.node[1].input[2]), [1, 1, 2, 2])


@pytest.mark.parametrize(
    ("reps", "sizes"),
    [
        ([1, 1, 1, 2, 1], [1, 3, 4, 10]),  # the copies land beside the columns, not below the rows
        ([1, 1, 2, 2, 1], [1, 3, 16, 5]),  # the rows are tiled too
        ([1, 1, 1, 2, 1], [1, 6, 4, 5]),
    ],
)
def test_other_merges_stay(reps: list[int], sizes: list[int]) -> None:
    nodes = [
        NODE("Relu", ["x"], ["r"]),
        NODE("Unsqueeze", ["r", "three"], ["u"]),
        NODE("Tile", ["u", "reps"], ["c"]),
        NODE("Reshape", ["c", "sizes"], ["y"]),
    ]
    values = {"three": np.array([3]), "reps": np.array(reps), "sizes": np.array(sizes)}
    proto = model(nodes, {"x": (1, 3, 4, 5)}, {"y": sizes}, values)
    assert run_passes(proto, [RepeatToResize()])[0] == proto
    feed = image(1, 3, 4, 5)
    np.testing.assert_array_equal(run(clean_model(proto)[0], x=feed)[0], run(proto, x=feed)[0])


def test_copies_that_somebody_else_reads_stay() -> None:
    proto = repeated([1, 3, 4, 5], extra="c")
    assert "Tile" in ops(run_passes(proto, [RepeatToResize()])[0])


def test_resizes_of_other_kinds_do_not_join() -> None:
    nodes = [
        NODE("Resize", ["x", "", "a"], ["m"], mode="nearest", coordinate_transformation_mode="asymmetric"),
        NODE("Resize", ["m", "", "b"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"),
    ]
    values = {"a": np.array([1, 1, 2, 1], np.float32), "b": np.array([1, 1, 1, 2], np.float32)}
    proto = model(nodes, {"x": (1, 3, 4, 5)}, {"y": (1, 3, 8, 10)}, values)
    assert isinstance(proto, onnx.ModelProto)
    assert len(run_passes(proto, [RepeatToResize()])[0].graph.node) == 2
