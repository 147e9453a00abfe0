"""Cleaning real exports: both exporters, several opsets, static and dynamic axes, all three ways to upsample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from pipeline.artifacts import ModelCard, from_json, sha256_file
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.base import Pass, PassResult
from pipeline.graph.cleaning import clean_model, clean_passes
from pipeline.graph.io import load_model, read_card, save_model, write_card
from pipeline.stages.clean import CleaningReport, clean

torch = pytest.importorskip("torch")

from models.unet import UNet  # noqa: E402

TOLERANCE = 1e-5
AXES = {"static": {}, "batch": {0: "N"}, "all": {0: "N", 2: "H", 3: "W"}}
Export = Callable[..., Path]


def make_network(upsampling: str, *, fresh: bool = False, **arguments: Any) -> Any:
    """A four-level UNet of 4 base channels; its BatchNorms have statistics like trained ones, unless fresh."""
    torch.manual_seed(0)
    network = UNet(base_channels=4, upsampling=upsampling, **arguments)
    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")  # torch's own choice fades out over 19 layers
        if fresh or tensor.ndim != 1:
            continue
        low, high = (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.3, 0.3)
        torch.nn.init.uniform_(tensor, low, high)
    return network.eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a network once per set of arguments; 3×48×64 images, input ``image``, output ``logits``."""
    folder = tmp_path_factory.mktemp("exports")
    done: dict[tuple[Any, ...], Path] = {}

    def run(exporter: str, opset: int, dynamic: str = "static", upsampling: str = "bilinear", **arguments: Any) -> Path:
        key = (exporter, opset, dynamic, upsampling, *sorted(arguments.items()))
        if key not in done:
            done[key] = folder / f"{len(done)}.onnx"
            network = make_network(upsampling, **arguments)
            axes = AXES[dynamic]
            example = torch.randn(2 if axes else 1, 3, 48, 64)
            names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"], "opset_version": opset}
            if exporter == "dynamo":
                shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
                torch.onnx.export(
                    network, (example,), done[key], dynamo=True, external_data=False, dynamic_shapes=shapes, **names
                )
            else:
                dynamic_axes = {"image": axes, "logits": axes} if axes else None
                torch.onnx.export(network, (example,), done[key], dynamo=False, dynamic_axes=dynamic_axes, **names)
        return done[key]

    return run


MINIMUM = {"bilinear": "Resize", "nearest": "Resize", "transposed": "ConvTranspose"}
CASES = [
    ("torchscript", 11, "static", "bilinear"),
    ("torchscript", 11, "batch", "bilinear"),
    ("torchscript", 13, "batch", "transposed"),
    ("torchscript", 17, "static", "nearest"),
    ("torchscript", 17, "batch", "bilinear"),
    ("torchscript", 20, "static", "transposed"),
    ("dynamo", 18, "static", "bilinear"),
    ("dynamo", 19, "batch", "bilinear"),
    ("dynamo", 19, "static", "transposed"),
    ("dynamo", 21, "static", "nearest"),
]


@pytest.mark.parametrize(("exporter", "opset", "dynamic", "upsampling"), CASES)
def test_the_network_shrinks_to_49_nodes(
    export: Export, tmp_path: Path, exporter: str, opset: int, dynamic: str, upsampling: str
) -> None:
    raw, target = export(exporter, opset, dynamic, upsampling), tmp_path / "clean.onnx"
    report = clean(raw, target, None, TOLERANCE)
    assert report.nodes_after == {"Concat": 4, "Conv": 19, "MaxPool": 4, "Relu": 18, MINIMUM[upsampling]: 4}
    assert report.opset == opset
    assert report.equality.passed
    assert len(report.equality.shapes) == (1 if dynamic == "static" else 3)
    cleaned = load_model(target)
    used = [name for node in cleaned.graph.node for name in node.input]
    for node in cleaned.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            assert list(node.input[1:]) == [f"{node.name}.weight", f"{node.name}.bias"]
            assert all(used.count(name) == 1 for name in node.input[1:])
    again = clean_model(cleaned)[0]
    assert again.SerializeToString(deterministic=True) == target.read_bytes()


@pytest.mark.parametrize(
    ("exporter", "opset", "upsampling"),
    [("torchscript", 11, "bilinear"), ("torchscript", 17, "transposed"), ("dynamo", 19, "bilinear")],
)
def test_all_dynamic_axes_stay_right_at_odd_sizes(
    export: Export, tmp_path: Path, exporter: str, opset: int, upsampling: str
) -> None:
    report = clean(export(exporter, opset, "all", upsampling), tmp_path / "clean.onnx", None, TOLERANCE)
    assert {"image": (1, 3, 37, 51)} in [dict(shapes) for shapes in report.equality.shapes]
    assert not report.equality.refused
    assert sum(report.nodes_after.values()) == 49 + 4 * 5  # two Shapes, Sub, Concat and Pad for each level


def names(path: Path) -> list[tuple[str, list[str], list[str]]]:
    cleaned, _ = clean_model(load_model(path))
    return [(node.name, list(node.input), list(node.output)) for node in cleaned.graph.node]


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_both_exporters_and_every_dynamic_give_the_same_names(export: Export, upsampling: str) -> None:
    want = names(export("dynamo", 19, "static", upsampling))
    assert names(export("torchscript", 17, "batch", upsampling)) == want
    found = {node: list(inputs) for node, inputs, _ in want}
    assert found["inc.double_conv.0"] == ["image", "inc.double_conv.0.weight", "inc.double_conv.0.bias"]
    assert found["inc.double_conv.0.relu"] == ["inc.double_conv.0"]
    assert "down1.maxpool_conv.1.double_conv.3" in found
    assert want[-1][0] == "outc.conv"
    assert want[-1][2] == ["logits"]


def test_fresh_batchnorms_leave_no_shared_initializer(export: Export) -> None:
    """Fresh biases are all equal, which torch stores once."""
    raw = export("torchscript", 17, "static", "bilinear", fresh=True)
    before = load_model(raw)
    cleaned, _ = clean_model(before)
    assert "Identity" in {node.op_type for node in before.graph.node}
    assert len(cleaned.graph.node) == 49
    used = [name for node in cleaned.graph.node for name in node.input]
    initializers = {tensor.name for tensor in cleaned.graph.initializer}
    assert all(used.count(name) == 1 for name in initializers)


def test_batchnorms_that_the_exporter_left_are_folded(tmp_path: Path) -> None:
    network, raw = make_network("transposed", bias=True), tmp_path / "raw.onnx"
    torch.onnx.export(
        network, (torch.randn(1, 3, 48, 64),), raw, dynamo=True, optimize=False, external_data=False, opset_version=18
    )
    report = clean(raw, tmp_path / "clean.onnx", None, TOLERANCE)
    assert report.nodes_before["BatchNormalization"] == 18
    assert sum(report.nodes_after.values()) == 49
    assert 0 < report.equality.max_relative_error < TOLERANCE
    assert sum(rule == "batchnorm" for step in report.passes for rule, _ in step.fired) == 18


class Scale(Pass):
    """A planted defect: multiplies one weight by 1.01, once."""

    name = "planted"

    def call(self, graph: gs.Graph) -> PassResult:
        conv = [node for node in graph.nodes if node.op == "Conv"][10]
        if hasattr(conv, "scaled"):
            return PassResult(False)
        conv.scaled = True
        conv.inputs[1] = gs.Constant(conv.inputs[1].name, conv.inputs[1].values * np.float32(1.01))
        return PassResult.of([("scale", conv.name)])


@pytest.mark.parametrize("position", [0, 3, 6, 10])
def test_a_broken_pass_is_found_and_nothing_is_written(export: Export, tmp_path: Path, position: int) -> None:
    raw, target, report = export("torchscript", 17), tmp_path / "clean.onnx", tmp_path / "report.json"
    passes = [*clean_passes()[:position], Scale(), *clean_passes()[position:]]
    with pytest.raises(CheckFailed, match="since the pass planted") as caught:
        clean(raw, target, report, TOLERANCE, passes=passes)
    assert caught.value.exit_code == 1
    assert not target.exists()
    written = from_json(CleaningReport, report)
    assert written.equality.guilty == "planted"
    assert written.clean_sha256 is None
    assert not written.equality.passed
    assert 1e-5 < written.equality.max_relative_error < 1
    assert clean(raw, target, report, 0.5, passes=passes).equality.passed  # within a wide tolerance it is written
    assert target.exists()


class Misread(Pass):
    """A planted defect of another kind: valid ONNX that gives another shape."""

    name = "misread"

    def call(self, graph: gs.Graph) -> PassResult:
        node = graph.nodes[-1]
        if node.attrs["strides"] == [2, 2]:
            return PassResult(False)
        node.attrs["strides"] = [2, 2]
        graph.outputs[0].shape = None
        return PassResult.of([("stride", node.name)])


def test_a_pass_that_changes_the_output_shape_is_found(export: Export, tmp_path: Path) -> None:
    passes = [*clean_passes(), Misread()]
    with pytest.raises((CheckFailed, ModelError), match="misread"):
        clean(export("dynamo", 19), tmp_path / "clean.onnx", None, TOLERANCE, passes=passes)
    assert not (tmp_path / "clean.onnx").exists()


def test_the_report_tells_what_happened(export: Export, tmp_path: Path) -> None:
    raw, target, path = export("torchscript", 17, "batch"), tmp_path / "clean.onnx", tmp_path / "report.json"
    report = clean(raw, target, path, TOLERANCE)
    assert from_json(CleaningReport, path) == report
    assert (report.raw_sha256, report.clean_sha256) == (sha256_file(raw), sha256_file(target))
    assert sum(report.nodes_before.values()) == 301
    assert report.equality.shapes[0] == {"image": (1, 3, 48, 64)}
    fired = {rule for step in report.passes for rule, _ in step.fired}
    assert {"constant-node", "size", "zero-pad", "node", "tensor"} <= fired
    pads = [name for step in report.passes for rule, name in step.fired if rule == "zero-pad"]
    assert pads == ["/up1/Pad", "/up2/Pad", "/up3/Pad", "/up4/Pad"]
    again = clean(target, tmp_path / "again.onnx", None, TOLERANCE)
    assert again.clean_sha256 == report.clean_sha256
    assert not any(step.modified for step in again.passes)


def test_the_model_card_and_metadata_survive(export: Export, tmp_path: Path) -> None:
    card = ModelCard(
        name="cells",
        preprocessing=PreprocessingConfig(height=48, width=64),
        classes=(ClassConfig(name="a", colour=(0, 0, 0)), ClassConfig(name="b", colour=(1, 1, 1))),
    )
    model = load_model(export("dynamo", 19))
    write_card(model, card)
    save_model(model, tmp_path / "raw.onnx")
    clean(tmp_path / "raw.onnx", tmp_path / "clean.onnx", None, TOLERANCE)
    cleaned = load_model(tmp_path / "clean.onnx")
    assert read_card(cleaned) == card
    scopes = [entry.key for entry in cleaned.graph.node[0].metadata_props]
    assert "pkg.torch.onnx.name_scopes" in scopes


def save(nodes: list[onnx.NodeProto], path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, (1, 3, 8, 8))], [value("y", 1, (1, 3, 8, 8))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_network_without_convolution_is_refused(tmp_path: Path) -> None:
    save([helper.make_node("Relu", ["x"], ["y"], name="r")], tmp_path / "raw.onnx")
    with pytest.raises(ModelError, match="holds no convolution"):
        clean(tmp_path / "raw.onnx", tmp_path / "clean.onnx", None, TOLERANCE)


def test_the_raw_export_is_not_overwritten(export: Export, tmp_path: Path) -> None:
    raw = tmp_path / "model.onnx"
    raw.write_bytes(export("dynamo", 19).read_bytes())
    link = tmp_path / "link.onnx"
    link.symlink_to(raw)
    for target in (raw, tmp_path / "x" / ".." / "model.onnx", link):
        with pytest.raises(ModelError, match="overwrite the raw export"):
            clean(raw, target, None, TOLERANCE)


def test_a_graph_that_onnxruntime_cannot_run_is_an_error_of_the_project(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["c"], ["y"], name="m", domain="org.example")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"], name="c"), node],
        "g",
        [value("x", 1, (1, 3, 8, 8))],
        [value("y", 1, (1, 3, 8, 8))],
        [onnx.numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("org.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "raw.onnx")
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        clean(tmp_path / "raw.onnx", tmp_path / "clean.onnx", None, TOLERANCE)
