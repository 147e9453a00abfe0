"""Shape arithmetic: what becomes constant, what becomes short, what stays, and that nothing computes anything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.graph.arithmetic import FoldSizes, ShortenArithmetic, SizesToScales
from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.constants import RemoveUnused
from pipeline.graph.promises import MULTIPLES_KEY, read_multiples, write_multiples
from tests.unit.graph.builders import array, image, model, ops, run

NODE = helper.make_node
PASSES = (FoldSizes, SizesToScales, ShortenArithmetic, RemoveUnused)
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def shortened(proto: onnx.ModelProto) -> onnx.ModelProto:
    cleaned, _ = run_passes(proto, [make() for make in PASSES])
    again, runs = run_passes(cleaned, [make() for make in PASSES])
    assert again == cleaned
    assert not any(step.result.modified for step in runs)
    return cleaned


def same(before: onnx.ModelProto, after: onnx.ModelProto, *sizes: tuple[int, int]) -> None:
    for size in sizes:
        feed = image(1, 2, *size)
        for wanted, got in zip(run(before, x=feed), run(after, x=feed), strict=True):
            np.testing.assert_array_equal(got, wanted)


def aligned(opset: int = 17, shape: tuple[Any, ...] = (1, 2, "H", "W")) -> onnx.ModelProto:
    """Pool by 2, upsample by 2, F.pad to the input's size as the TorchScript exporter writes it, add."""
    nodes = [
        NODE("MaxPool", ["x"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        NODE("Resize", ["p", "none" if opset < 13 else "", "scales"], ["u"], name="up", mode="nearest"),
    ]
    for axis, name in ((2, "h"), (3, "w")):
        nodes += [
            NODE("Shape", ["x"], [f"{name}.sx"]),
            NODE("Gather", [f"{name}.sx", f"i{axis}"], [f"{name}.x"]),
            NODE("Shape", ["u"], [f"{name}.su"]),
            NODE("Gather", [f"{name}.su", f"i{axis}"], [f"{name}.u"]),
            NODE("Sub", [f"{name}.x", f"{name}.u"], [f"{name}.d"]),
            NODE("Div", [f"{name}.d", "two"], [f"{name}.half"]),
            NODE("Sub", [f"{name}.d", f"{name}.half"], [f"{name}.rest"]),
            NODE("Reshape", [f"{name}.half", "one"], [f"{name}.before"]),
            NODE("Reshape", [f"{name}.rest", "one"], [f"{name}.after"]),
        ]
    nodes += [
        NODE("Concat", ["zeros", "h.before", "w.before", "zeros", "h.after", "w.after"], ["pads"], axis=0),
        NODE("Pad", ["u", "pads"], ["a"], name="pad"),
        NODE("Add", ["a", "x"], ["y"], name="add"),
    ]
    values = {
        "scales": np.array([1, 1, 2, 2], np.float32),
        "i2": np.array(2),
        "i3": np.array(3),
        "two": np.array(2),
        "one": np.array([-1]),
        "zeros": np.array([0, 0]),
    }
    if opset < 13:
        values["none"] = np.zeros(0, np.float32)
    return model(nodes, {"x": shape}, {"y": shape}, values, opset=opset)


@pytest.mark.parametrize(("opset", "arithmetic"), [(17, 4), (13, 4)])
def test_alignment_pads_are_computed_from_two_shapes(opset: int, arithmetic: int) -> None:
    proto = aligned(opset)
    cleaned = shortened(proto)
    assert len(ops(proto)) == 23
    assert len(ops(cleaned)) == 4 + arithmetic
    assert [op for op in ops(cleaned) if op in ("Sub", "Concat", "Pad")] == ["Sub", "Concat", "Pad"]
    same(proto, cleaned, (8, 8), (9, 12), (11, 7), (2, 3))


def test_alignment_of_promised_multiples_goes() -> None:
    proto = aligned()
    write_multiples(proto, {"height": 2, "W": 4, "batch": 1})
    assert read_multiples(proto) == {"height": 2, "W": 4}
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == ["MaxPool", "Resize", "Add"]
    assert read_multiples(cleaned) == {"height": 2, "W": 4}
    assert clean_model(cleaned)[0] == cleaned
    same(proto, cleaned, (8, 8), (10, 12))


def test_a_promise_that_does_not_cover_the_depth_changes_nothing_else() -> None:
    proto = aligned()
    write_multiples(proto, {"width": 2, "height": 3})
    cleaned = shortened(proto)
    assert "Pad" in ops(cleaned)
    same(proto, cleaned, (9, 8), (12, 6))


def test_a_damaged_promise_is_refused() -> None:
    proto = aligned()
    proto.metadata_props.append(onnx.StringStringEntryProto(key=MULTIPLES_KEY, value="16"))
    with pytest.raises(Exception, match="damaged"):
        clean_model(proto)


def test_known_sizes_fold_where_only_the_batch_is_dynamic() -> None:
    proto = aligned(shape=("N", 2, 8, 10))
    cleaned, runs = clean_model(proto)
    assert ops(cleaned) == ["MaxPool", "Resize", "Add"]
    assert "size" in {rule for step in runs for rule, _ in step.result.fired}
    same(proto, cleaned, (8, 10))


def interpolated(shape: tuple[Any, ...], stride: int = 2) -> onnx.ModelProto:
    """Pool, then F.interpolate(size=x.shape[2:]), as the TorchScript exporter writes it."""
    nodes = [
        NODE("MaxPool", ["x"], ["p"], kernel_shape=[stride, stride], strides=[stride, stride]),
        NODE("Shape", ["x"], ["sx"]),
        NODE("Gather", ["sx", "i2"], ["h"]),
        NODE("Gather", ["sx", "i3"], ["w"]),
        NODE("Unsqueeze", ["h", "axis"], ["h1"]),
        NODE("Unsqueeze", ["w", "axis"], ["w1"]),
        NODE("Concat", ["h1", "w1"], ["hw"], axis=0),
        NODE("Cast", ["hw"], ["hw64"], to=INT64),
        NODE("Shape", ["p"], ["sp"]),
        NODE("Slice", ["sp", "start", "end", "axis"], ["nc"]),
        NODE("Concat", ["nc", "hw64"], ["sizes"], axis=0),
        NODE("Resize", ["p", "", "", "sizes"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"),
    ]
    values = {
        "i2": np.array(2),
        "i3": np.array(3),
        "axis": np.array([0]),
        "start": np.array([0]),
        "end": np.array([2]),
    }
    return model(nodes, {"x": shape}, {"y": shape}, values)


def test_sizes_of_a_skip_stay_sizes_where_it_may_be_odd() -> None:
    proto = interpolated(("N", 2, "H", "W"))
    cleaned = shortened(proto)
    assert ops(cleaned) == ["MaxPool", "Shape", "Resize"]  # batch and channels are the skip's too
    same(proto, cleaned, (8, 8), (9, 13), (7, 6))


@pytest.mark.parametrize(("stride", "promise"), [(2, 2), (4, 4), (4, 16)])
def test_sizes_of_a_skip_become_scales_where_the_algebra_proves_it(stride: int, promise: int) -> None:
    proto = interpolated(("N", 2, "H", "W"), stride)
    write_multiples(proto, {"H": promise, "W": promise})
    cleaned = shortened(proto)
    assert ops(cleaned) == ["MaxPool", "Resize"]
    np.testing.assert_array_equal(array(cleaned, cleaned.graph.node[1].input[2]), [1, 1, stride, stride])
    same(proto, cleaned, (promise, promise), (promise * 3, promise * 2))


@pytest.mark.parametrize("shape", [(1, 2, 9, 12), ("N", 2, 9, 12)])
def test_known_sizes_become_scales_with_a_dynamic_batch_too(shape: tuple[Any, ...]) -> None:
    proto = interpolated(shape)
    cleaned = shortened(proto)
    assert ops(cleaned) == ["MaxPool", "Resize"]
    same(proto, cleaned, (9, 12))


def test_axes_go_with_the_sizes() -> None:
    node = NODE("Resize", ["x", "", "", "sizes"], ["y"], axes=[2, 3], mode="nearest", nearest_mode="floor")
    proto = model([node], {"x": ("N", 2, 4, 5)}, {"y": ("N", 2, 8, 15)}, {"sizes": np.array([8, 15])}, opset=18)
    cleaned = shortened(proto)
    assert not [a for a in cleaned.graph.node[0].attribute if a.name == "axes"]
    np.testing.assert_array_equal(array(cleaned, cleaned.graph.node[0].input[2]), [1, 1, 2, 3])
    same(proto, cleaned, (4, 5))


def test_other_policies_and_unreachable_sizes_stay() -> None:
    for attributes, sizes in (({"keep_aspect_ratio_policy": "not_larger"}, [1, 2, 8, 10]), ({}, [1, 2, 2**24 + 1, 5])):
        node = NODE("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest", **attributes)
        proto = model([node], {"x": (1, 2, 3, 5)}, {"y": [None] * 4}, {"sizes": np.array(sizes)}, opset=18)
        assert run_passes(proto, [SizesToScales()])[0] == proto


def test_a_reshape_takes_its_sizes_from_its_input() -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Gather", ["s", "i0"], ["n"]),
        NODE("Gather", ["s", "i2"], ["h"]),
        NODE("Gather", ["s", "i3"], ["w"]),
        NODE("Mul", ["h", "w"], ["hw"]),
        NODE("Concat", ["n", "c", "hw"], ["shape"], axis=0),
        NODE("Reshape", ["x", "shape"], ["y"]),
    ]
    values = {"i0": np.array([0]), "i2": np.array([2]), "i3": np.array([3]), "c": np.array([2])}
    proto = model(nodes, {"x": ("N", 2, "H", "W")}, {"y": ("N", 2, None)}, values)
    cleaned = shortened(proto)
    assert ops(cleaned) == ["Reshape"]
    np.testing.assert_array_equal(array(cleaned, cleaned.graph.node[0].input[1]), [0, 2, -1])
    same(proto, cleaned, (3, 5), (4, 4))


def test_a_slice_up_to_the_end_and_an_expand_to_the_same_size_need_no_size() -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Slice", ["s", "two", "three"], ["h"]),
        NODE("Slice", ["x", "one", "h", "two"], ["cut"]),
        NODE("Shape", ["x"], ["s2"]),
        NODE("Gather", ["s2", "i3"], ["w"]),
        NODE("Concat", ["ones", "w"], ["wide"], axis=0),
        NODE("Expand", ["cut", "wide"], ["y"]),
    ]
    values = {name: np.array([i]) for i, name in enumerate(("zero", "one", "two", "three"))}
    values |= {"i3": np.array([3]), "ones": np.array([1, 1, 1])}
    proto = model(nodes, {"x": (1, 2, "H", "W")}, {"y": [None] * 4}, values)
    cleaned = shortened(proto)
    assert ops(cleaned) == ["Slice", "Expand"]
    same(proto, cleaned, (3, 5), (4, 4))


def test_sizes_that_nothing_above_has_stay_as_they_are() -> None:
    """Rounding to a multiple of 4 by Floor: no tensor has that size."""
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Slice", ["s", "two", "four"], ["hw"]),
        NODE("Div", ["hw", "four"], ["q"]),
        NODE("Mul", ["q", "four"], ["m"]),
        NODE("Slice", ["s", "zero", "two"], ["nc"]),
        NODE("Concat", ["nc", "m"], ["sizes"], axis=0),
        NODE("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest"),
    ]
    values = {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4])}
    proto = model(nodes, {"x": (1, 2, "H", "W")}, {"y": [None] * 4}, values)
    cleaned = shortened(proto)
    assert "Resize" in ops(cleaned)
    assert "Div" in ops(cleaned)
    same(proto, cleaned, (8, 8), (9, 13))


def test_sizes_that_leave_the_graph_stay() -> None:
    proto = model([NODE("Shape", ["x"], ["y"])], {"x": (1, 2, 4, 4)}, {"y": (4,)}, output_type=INT64)
    assert run_passes(proto, [FoldSizes()])[0] == proto
