"""Unpooling to the maxima's places, against ONNX Runtime's MaxPool and MaxUnpool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.constants import FoldConstants, LowerConstants, RemoveUnused
from pipeline.graph.findings import refusals
from pipeline.graph.promises import write_multiples
from pipeline.graph.unpool import RewriteUnpool
from tests.unit.graph.builders import model, ops, run

POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
REWRITTEN = ["SpaceToDepth", "Reshape", "ReduceMax", "Equal", "Where", "ReduceMax", "Equal"]
PLACED = ["Reshape", "Where", "Reshape", "DepthToSpace"]


def segnet(given: Sequence[Any], opset: int = 17, **settings: Any) -> onnx.ModelProto:
    """x -> Relu -> MaxPool -> two more layers -> MaxUnpool -> y."""
    pool = POOL | settings.pop("pool", {})
    unpool = {key: pool[key] for key in ("kernel_shape", "strides", "pads") if key in pool}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("MaxPool", ["r"], ["p", "i"], name="pool", **pool),
        helper.make_node("Exp", ["p"], ["e"], name="e"),
        helper.make_node("MaxUnpool", ["e", "i", *settings.get("shape", [])], ["y"], name="unpool", **unpool),
    ]
    return model(nodes, {"x": given}, {"y": [None] * len(given)}, settings.get("values"), opset=opset)


def structured(*shape: int) -> np.ndarray:
    """Few values, many of them equal within a window, and whole windows below zero."""
    return np.random.default_rng(5).integers(-3, 2, shape).astype(np.float32)


def rewritten(original: onnx.ModelProto, *shapes: tuple[int, ...]) -> onnx.ModelProto:
    cleaned, runs = run_passes(original, [RewriteUnpool()])
    assert [rule for step in runs for rule, _ in step.result.fired] == ["unpool"]
    onnx.checker.check_model(cleaned, full_check=True)
    for shape in shapes:
        (want,), (got,) = run(original, x=structured(*shape)), run(cleaned, x=structured(*shape))
        assert (got == want).all()
        assert (want != 0).any()
    assert run_passes(cleaned, [RewriteUnpool()])[0] == cleaned
    assert not refusals(cleaned)
    return cleaned


def left(original: onnx.ModelProto) -> None:
    cleaned, _ = run_passes(original, [RewriteUnpool()])
    assert cleaned == original
    assert {finding.op for finding in refusals(original)} == {"MaxPool", "MaxUnpool"}


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
@pytest.mark.parametrize("size", [2, 3])
def test_pool_and_unpool_become_supported_operators(opset: int, size: int) -> None:
    pool = {"kernel_shape": [size, size], "strides": [size, size]}
    cleaned = rewritten(segnet(("N", 3, 6, 12), opset, pool=pool), (1, 3, 6, 12), (3, 3, 6, 12))
    assert ops(cleaned) == ["Relu", "MaxPool", *REWRITTEN, "Exp", *PLACED]
    assert list(cleaned.graph.node[1].output) == ["p"]


def test_one_choice_serves_several_unpoolings() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], name="pool", **POOL),
        helper.make_node("Neg", ["p"], ["n"], name="n"),
        helper.make_node("MaxUnpool", ["p", "i"], ["a"], name="a", **POOL),
        helper.make_node("MaxUnpool", ["n", "i"], ["b"], name="b", **POOL),
        helper.make_node("Sub", ["a", "b"], ["y"], name="y"),
    ]
    original = model(nodes, {"x": (1, 3, 4, 6)}, {"y": (1, 3, 4, 6)})
    cleaned, _ = run_passes(original, [RewriteUnpool()])
    assert ops(cleaned).count("SpaceToDepth") == 1
    assert ops(cleaned).count("DepthToSpace") == 2
    assert (run(original, x=structured(1, 3, 4, 6))[0] == run(cleaned, x=structured(1, 3, 4, 6))[0]).all()


def test_dynamic_sizes_need_a_promise() -> None:
    original = segnet(("N", 3, "H", "W"))
    left(original)
    write_multiples(original, {"height": 2, "width": 4})
    cleaned = rewritten(original, (1, 3, 4, 8), (2, 3, 10, 4))
    assert ops(cleaned).count("Shape") == 1


def test_sizes_known_to_be_even_need_none() -> None:
    """Behind a SpaceToDepth's inverse every size is even."""
    nodes = [helper.make_node("DepthToSpace", ["x"], ["x2"], name="d2s", blocksize=2), *segnet((1, 4, 4, 4)).graph.node]
    nodes[1].input[0] = "x2"
    rewritten(model(nodes, {"x": ("N", 8, "H", "W")}, {"y": [None] * 4}), (1, 8, 3, 5), (2, 8, 2, 7))


@pytest.mark.parametrize(
    "pool",
    [
        {"strides": [1, 1]},
        {"kernel_shape": [3, 3]},
        {"kernel_shape": [2, 1], "strides": [2, 1]},
        {"pads": [1, 1, 1, 1]},
        {"storage_order": 1},
        {"dilations": [2, 2]},
    ],
)
def test_other_windows_stay(pool: dict[str, Any]) -> None:
    left(segnet((1, 3, 8, 8), pool=pool))


def test_odd_sizes_and_other_output_sizes_stay() -> None:
    left(segnet((1, 3, 7, 8)))
    left(segnet((1, 3, 6, 8), shape=["s"], values={"s": np.array([1, 3, 7, 8])}))
    rewritten(segnet((1, 3, 6, 8), shape=["s"], values={"s": np.array([1, 3, 6, 8])}), (1, 3, 6, 8))


def test_indices_from_elsewhere_and_indices_that_leave_stay() -> None:
    unpool = helper.make_node("MaxUnpool", ["x", "i"], ["y"], name="unpool", **POOL)
    original = model([unpool], {"x": (1, 1, 2, 2)}, {"y": (1, 1, 4, 4)}, {"i": np.arange(4).reshape(1, 1, 2, 2) * 5})
    assert run_passes(original, [RewriteUnpool()])[0] == original
    leaves = segnet((1, 3, 4, 4))
    leaves.graph.output.append(helper.make_tensor_value_info("i", TensorProto.INT64, (1, 3, 2, 2)))
    cleaned, _ = run_passes(leaves, [RewriteUnpool()])
    assert "MaxUnpool" not in ops(cleaned)
    assert [finding.op for finding in refusals(cleaned)] == ["MaxPool"]


def torch_export(folder: Path, shape: tuple[int, ...], dynamic: dict[int, Any], given: bool) -> onnx.ModelProto:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, x: Any) -> Any:
            pooled, places = torch.nn.functional.max_pool2d(x.relu(), 2, 2, return_indices=True)
            size = x.shape[2:] if given else None
            return torch.nn.functional.max_unpool2d(pooled.exp(), places, 2, 2, output_size=size)

    path = folder / "m.onnx"
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),) if dynamic else None
    torch.onnx.export(
        Net().eval(), (torch.randn(*shape),), path, dynamo=True, external_data=False, dynamic_shapes=shapes,
        opset_version=18, input_names=["x"], verbose=False,
    )  # fmt: skip
    return onnx.load(path)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dynamic", [{}, {0: "N"}])
def test_what_torch_writes_is_understood(tmp_path: Path, given: bool, dynamic: dict[int, Any]) -> None:
    original = torch_export(tmp_path, (2, 3, 6, 8), dynamic, given)
    passes = [LowerConstants(), FoldConstants(), RewriteUnpool(), RemoveUnused()]
    cleaned, _ = run_passes(original, passes)
    assert ops(cleaned) == ["Relu", "MaxPool", *REWRITTEN, "Exp", *PLACED]
    for batch in (2, *([1, 5] if dynamic else [])):
        feed = structured(batch, 3, 6, 8)
        assert (run(original, x=feed)[0] == run(cleaned, x=feed)[0]).all()
    assert not refusals(cleaned)


def test_a_scatter_to_other_places_stays(tmp_path: Path) -> None:
    original, _ = run_passes(torch_export(tmp_path, (1, 3, 6, 8), {}, False), [LowerConstants(), FoldConstants()])
    for tensor in original.graph.initializer:
        if tensor.dims == [1, 3, 1, 1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 48, 95]).reshape(1, 3, 1, 1), tensor.name))
    cleaned, runs = run_passes(original, [RewriteUnpool()])
    assert "ScatterND" in ops(cleaned)
    assert not any(step.result.modified for step in runs)


def test_a_whole_cleaning_keeps_the_result() -> None:
    original = segnet(("N", 3, 8, 8))
    cleaned, _ = clean_model(original)
    assert clean_model(cleaned)[0] == cleaned
    for shape in ((1, 3, 8, 8), (2, 3, 8, 8)):
        assert (run(original, x=structured(*shape))[0] == run(cleaned, x=structured(*shape))[0]).all()
