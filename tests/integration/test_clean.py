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
from pipeline.graph.constants import OwnInitializers
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

    def run(
        exporter: str, opset: int, dynamic: str = "static", upsampling: str = "bilinear", **arguments: Any
    ) -> Path:
        key = (exporter, opset, dynamic, upsampling, *sorted(arguments.items()))
        if key not in done:
            done[key] = folder / f"{len(done)}.onnx"
            network = make_network(upsampling, **arguments)
            axes = AXES[dynamic]
            example = torch.randn(2 if axes else 1, 3, 48, 64)
            names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"], "opset_version": opset}
            if exporter == "dynamo":
                shapes = ({axis: torch.export.Dim.DYNAMIC for axis in axes},) if axes else None
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
    assert {"image": (3, 3, 37, 51)} in [dict(shapes) for shapes in report.equality.shapes]
    assert not report.equality.refused
    assert sum(report.nodes_after.values()) <= sum(report.nodes_before.values())
    assert report.nodes_after["Pad"] == 4


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


class Scale(Pass):
    """A planted defect: multiplies one weight by 1.01."""

    name = "planted"

    def __init__(self) -> None:
        self.done: list[int] = []

    def call(self, graph: gs.Graph) -> PassResult:
        conv = next(node for node in graph.nodes if node.name == "up1.conv.double_conv.0")
        if conv.inputs[1].name.endswith(".scaled"):
            return PassResult(False)
        conv.inputs[1] = gs.Constant(conv.inputs[1].name + ".scaled", conv.inputs[1].values * np.float32(1.01))
        return PassResult.of([("scale", conv.name)])


class Rename(OwnInitializers):
    """Harmless company, so that there is something to tell apart: renames one node, once."""

    name = "renames"

    def call(self, graph: gs.Graph) -> PassResult:
        node = graph.nodes[-1]
        changed = node.name != "last"
        node.name = "last"
        return PassResult.of([("rename", "last")] if changed else [])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_broken_pass_is_found_and_nothing_is_written(export: Export, tmp_path: Path, position: int) -> None:
    raw, target, report = export("dynamo", 19), tmp_path / "clean.onnx", tmp_path / "report.json"
    passes: list[Pass] = [Rename()]
    # Behind the real passes, so that the planted one finds the node by its clean name; its company moves around it.
    steps = [*clean_passes(), *passes] if position == 2 else [*passes, *clean_passes()][: None if position else -1]
    if position == 0:
        steps = [*clean_passes()[:-1]]
    with pytest.raises(CheckFailed, match="since the pass planted") as caught:
        clean(raw, target, report, TOLERANCE, passes=[_named(raw), *steps[: position + 3], Scale(), *steps[position + 3 :]])
    assert caught.value.exit_code == 1
    assert not target.exists()
    written = from_json(CleaningReport, report)
    assert written.equality.guilty == "planted"
    assert written.clean_sha256 is None
    assert not written.equality.passed
    assert 1e-5 < written.equality.max_relative_error < 1
