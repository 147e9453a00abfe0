"""``F.interpolate(mode="nearest-exact")`` as torch's exporter writes it, and hand-built variations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.graph.arithmetic import FoldSizes
from pipeline.graph.base import run_passes
from pipeline.graph.constants import FoldConstants, LowerConstants, RemoveUnused
from pipeline.graph.nearest import GatherToResize
from pipeline.graph.promises import write_multiples
from tests.unit.graph.builders import array, image, model, ops, run

PASSES = (LowerConstants, FoldConstants, FoldSizes, GatherToResize, RemoveUnused)


def export(
    folder: Path, axes: tuple[int, ...], skip: bool = False, third: bool = False, **arguments: Any
) -> onnx.ModelProto:
    """Relu and the interpolation of (2, 3, 6, 8) images, or a pool and back (``skip``), or to a pool's size."""
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, x: Any) -> Any:
            small = torch.nn.functional.max_pool2d(x, 2) if skip else x.relu()
            sizes = {"size": x.shape[2:]} if skip else arguments
            if third:
                sizes = {"size": torch.nn.functional.max_pool2d(x, 3).shape[2:]}
            return torch.nn.functional.interpolate(small, mode="nearest-exact", **sizes)

    path = folder / "m.onnx"
    shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
    torch.onnx.export(
        Net().eval(), (torch.randn(2, 3, 6, 8),), path, dynamo=True, external_data=False, dynamic_shapes=shapes,
        opset_version=18, input_names=["x"], verbose=False,
    )  # fmt: skip
    return onnx.load(path)


def check(original: onnx.ModelProto, *shapes: tuple[int, ...]) -> onnx.ModelProto:
    cleaned, _ = run_passes(original, [step() for step in PASSES])
    onnx.checker.check_model(cleaned, full_check=True)
    for shape in shapes:
        assert (run(original, x=image(*shape))[0] == run(cleaned, x=image(*shape))[0]).all()
    assert run_passes(cleaned, [step() for step in PASSES])[0] == cleaned
    return cleaned


@pytest.mark.parametrize("axes", [(), (0,)])
@pytest.mark.parametrize(
    ("arguments", "rounding"),
    [
        ({"scale_factor": 2}, "floor"),
        ({"scale_factor": (3, 1)}, "floor"),
        ({"scale_factor": 1.5}, "round_prefer_ceil"),
        ({"size": (9, 20)}, "round_prefer_ceil"),
        ({"size": (4, 3)}, "round_prefer_ceil"),
        ({"size": (13, 5)}, "round_prefer_ceil"),
        ({"skip": True}, "floor"),
    ],
)
def test_known_sizes(tmp_path: Path, axes: tuple[int, ...], arguments: dict[str, Any], rounding: str) -> None:
    original = export(tmp_path, axes, **arguments)
    cleaned = check(original, (2, 3, 6, 8), *([(1, 3, 6, 8), (5, 3, 6, 8)] if axes else []))
    assert ops(cleaned) == ["MaxPool" if "skip" in arguments else "Relu", "Resize"]
    found = {a.name: helper.get_attribute_value(a) for a in cleaned.graph.node[1].attribute}
    assert found["nearest_mode"].decode() == rounding


@pytest.mark.parametrize("factor", [2, 3, 4, 1.5])
def test_dynamic_sizes_times_a_factor(tmp_path: Path, factor: float) -> None:
    cleaned = check(export(tmp_path, (0, 2, 3), scale_factor=factor), (1, 3, 2, 3), (2, 3, 37, 51), (1, 3, 64, 128))
    assert ops(cleaned) == ["Relu", "Resize"]
    assert array(cleaned, cleaned.graph.node[1].input[2]).tolist() == [1, 1, factor, factor]


@pytest.mark.parametrize("arguments", [{"scale_factor": 1.7}, {"size": (9, 20)}, {"skip": True}])
def test_what_no_scale_gives_for_every_size_stays(tmp_path: Path, arguments: dict[str, Any]) -> None:
    cleaned = check(export(tmp_path, (0, 2, 3), **arguments), (1, 3, 4, 6), (2, 3, 37, 51))
    assert "GatherND" in ops(cleaned)


def test_a_skip_of_promised_sizes_is_a_factor(tmp_path: Path) -> None:
    original = export(tmp_path, (0, 2, 3), skip=True)
    write_multiples(original, {"height": 2, "width": 2})
    assert ops(check(original, (1, 3, 4, 6), (2, 3, 38, 52))) == ["MaxPool", "Resize"]


def test_a_factor_that_float32_does_not_hold_stays(tmp_path: Path) -> None:
    """A third of the size: ONNX Runtime's float32 product with 1/3 may round down to one less."""
    original = export(tmp_path, (0, 2, 3), third=True)
    write_multiples(original, {"height": 3, "width": 3})
    assert "GatherND" in ops(check(original, (1, 3, 6, 9), (2, 3, 36, 51)))


def test_indices_for_another_axis_size_stay(tmp_path: Path) -> None:
    """Rows counted by the width."""
    original = export(tmp_path, (0, 2, 3), scale_factor=2)
    rows = next(node for node in original.graph.node if node.op_type == "Shape")
    for attribute in rows.attribute:
        attribute.i = {"start": 3, "end": 4}[attribute.name]
    assert "GatherND" in ops(check(original, (1, 3, 4, 4), (2, 3, 6, 5)))


def gather_net(indices: np.ndarray, perm: tuple[int, ...] = (2, 3, 0, 1)) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[2, 3, 0, 1], name="t"),
        helper.make_node("GatherND", ["t", "i"], ["g"], name="g"),
        helper.make_node("Transpose", ["g"], ["y"], perm=perm, name="y"),
    ]
    return model(nodes, {"x": ("N", 2, 3, 4)}, {"y": [None] * 4}, {"i": indices})


def grid(rows: list[int], columns: list[int]) -> np.ndarray:
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)


def test_other_gathers_stay() -> None:
    doubled = grid([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3])
    assert ops(check(gather_net(doubled), (2, 2, 3, 4))) == ["Resize"]
    mixed = doubled.copy()
    mixed[3, 2] = mixed[3, 5]
    for original in (
        gather_net(grid([0, 1, 0, 1, 2, 2], [0, 1, 2, 3])),  # no resize picks these
        gather_net(grid([0, 0, 1, 1, 2, -1], [0, 1, 2, 3])),
        gather_net(mixed),  # no product of two lists
        gather_net(doubled, perm=(3, 2, 0, 1)),
    ):
        assert check(original, (2, 2, 3, 4)) == original


def test_a_gather_that_others_read_stays() -> None:
    original = gather_net(grid([0, 0, 1, 1, 2, 2], [0, 1, 2, 3]))
    original.graph.output.append(helper.make_tensor_value_info("g", 1, [6, 4, "N", 2]))
    assert check(original, (2, 2, 3, 4)) == original
