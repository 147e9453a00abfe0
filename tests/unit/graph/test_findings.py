"""What TensorRT is said to refuse is what TensorRT-RTX's parser refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.backends.parsing import parse_verdict
from pipeline.graph.findings import refusals
from pipeline.graph.io import save_model
from tests.unit.graph.builders import model

SCALES = np.array([1, 1, 2, 2], np.float32)
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


def resize(
    scales: Any = SCALES, *, opset: int = 19, kind: int = TensorProto.FLOAT, roi: Any = None, **attributes: Any
) -> onnx.ModelProto:
    sizes = attributes.pop("sizes", None)
    shape = [1, 2, 4, 4, 4][: len(scales)]
    values = {"s": np.array(scales, np.float32)} if sizes is None else {"z": np.array(sizes)}
    if roi is not None or opset < 13:
        values["roi"] = np.array([] if roi is None else roi, np.float32)
    inputs = ["x", "roi" if "roi" in values else "", "s"] if sizes is None else ["x", "", "", "z"]
    node = helper.make_node("Resize", inputs, ["y"], name="resize", **attributes)
    return model(
        [node], {"x": shape}, {"y": [None] * len(shape)}, values, opset=opset, input_type=kind, output_type=kind
    )


def pooled(*nodes: onnx.NodeProto, output: str = "y") -> onnx.ModelProto:
    pool = helper.make_node("MaxPool", ["x"], ["p", "i"], name="pool", **POOL)
    return model([pool, *nodes], {"x": (1, 1, 4, 4)}, {output: [None] * 4})


def from_uint8(node: onnx.NodeProto) -> onnx.ModelProto:
    cast = helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT, name="cast")
    return model([node, cast], {"x": (1, 4, 4, 3)}, {"y": [None] * 4}, input_type=TensorProto.UINT8)


CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "roi": [0, 0, 0, 0, 1, 1, 0.5, 1]}
TF = {"opset": 11, "coordinate_transformation_mode": "tf_half_pixel_for_nn"}
REFUSED = {
    "antialias": (resize(mode="linear", antialias=1), "antialias"),
    "crop": (resize(mode="linear", **CROP), "tf_crop_and_resize"),
    "symmetric": (resize(coordinate_transformation_mode="half_pixel_symmetric"), "half_pixel_symmetric"),
    "tf nearest": (resize(nearest_mode="floor", **TF), "tf_half_pixel_for_nn"),
    "policy": (resize(sizes=[1, 2, 8, 9], keep_aspect_ratio_policy="not_larger"), "not_larger"),
    "integers": (resize(kind=TensorProto.INT32), "int32"),
    "bytes": (resize(kind=TensorProto.UINT8), "uint8"),
    "linear batch": (resize([2, 1, 2, 2], mode="linear"), "last 3 axes"),
    "cubic volume": (resize([1, 1, 2, 2, 2], mode="cubic"), "last 2 axes"),
    "cubic channels last": (resize([1, 2, 2, 1], mode="cubic"), "last 2 axes"),
    "unpool": (pooled(helper.make_node("MaxUnpool", ["p", "i"], ["y"], name="u", **POOL)), "indices"),
    "bytes transposed": (from_uint8(helper.make_node("Transpose", ["x"], ["t"], name="t")), "uint8"),
    "foreign": (model([helper.make_node("Sharpen", ["x"], ["y"], domain="com.example")], {"x": [1]}, {"y": [1]},
                      domains=["com.example"]), "plugin"),
}  # fmt: skip
TAKEN = {
    "linear": resize(mode="linear"),
    "linear channels last": resize([1, 2, 2, 1], mode="linear"),
    "linear volume": resize([1, 1, 2, 2, 2], mode="linear"),
    "cubic": resize(mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5),
    "nearest batch": resize([2, 1, 2, 2], mode="nearest"),
    "axes": resize(sizes=[8, 8], axes=[2, 3], mode="linear"),
    "tf nearest": resize(nearest_mode="round_prefer_floor", **TF),
    "half": resize(mode="linear", kind=TensorProto.FLOAT16),
    "bytes cast": from_uint8(helper.make_node("Cast", ["x"], ["t"], to=TensorProto.FLOAT, name="t")),
}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parsed")

    def ask(proto: onnx.ModelProto) -> bool:
        path: Path = folder / "m.onnx"
        save_model(proto, path)
        verdict = parse_verdict(path)
        if verdict.parser != "tensorrt-rtx":
            pytest.skip(f"no TensorRT-RTX here: {verdict.note or verdict.parser}")
        return bool(verdict.accepted)

    return ask


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_node_is_found_with_its_way_out(case: str, accepted: Any) -> None:
    proto, reason = REFUSED[case]
    findings = refusals(proto)
    assert findings
    assert reason in findings[0].reason
    assert all(finding.way_out and finding.node for finding in findings)
    assert not accepted(proto)


@pytest.mark.parametrize("case", TAKEN)
def test_nothing_is_said_of_a_node_that_parses(case: str, accepted: Any) -> None:
    assert refusals(TAKEN[case]) == ()
    assert accepted(TAKEN[case])


def test_nodes_in_branches_are_found() -> None:
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = helper.make_node("Resize", ["x", "", "s"], [name], name=f"in.{name}", mode="linear", antialias=1)
        branches[name] = helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, [None] * 4)])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], name="if", **branches),
    ]
    found = refusals(model(nodes, {"x": (1, 2, 4, 4)}, {"y": [None] * 4}, {"s": SCALES}, opset=18))
    assert {finding.node for finding in found} == {"in.then_branch", "in.else_branch"}


def test_a_legacy_resize_that_cleaning_could_not_raise_is_found() -> None:
    node = helper.make_node("Resize", ["x", "s"], ["y"], name="resize")
    (finding,) = refusals(model([node], {"x": (1, 2, 4, 4), "s": (4,)}, {"y": [None] * 4}, opset=10))
    assert (finding.node, finding.op) == ("resize", "Resize")
    assert "opset 13" in finding.way_out


def test_unused_indices_are_no_finding() -> None:
    assert refusals(pooled(output="p")) == ()
