"""``unet-trt clean`` on files: external data, what the report and the terminal say, and what stays when it fails."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto, TensorProto, helper

from pipeline.artifacts import from_json, sha256_file
from pipeline.config import ProfileRange
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.base import Pass, PassResult
from pipeline.graph.cleaning import clean_passes
from pipeline.graph.io import load_model, save_model, sha256_model
from pipeline.stages.clean import CleaningReport, clean
from tests.conftest import Result
from tests.unit.graph.builders import model, weights

Command = Callable[..., Result]
TOLERANCE = 1e-5
needs_parser = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no ONNX parser")


def net(size: int | str = 16, *, antialias: bool = False, channels: int = 8) -> ModelProto:
    """A UNet of one level with an Identity to remove, and at its end a Resize that TensorRT refuses where asked for."""
    make = helper.make_node
    down: list[onnx.NodeProto] = []
    if antialias:
        down = [make("Resize", ["head", "", "half"], ["y"], name="shrink", mode="linear", antialias=1)]
    nodes = [
        make("Identity", ["bias"], ["bias.copy"], name="copy"),
        make("Conv", ["x", "stem.weight", "bias"], ["stem"], name="stem", pads=[1] * 4),
        make("Relu", ["stem"], ["stem.relu"], name="stem.relu"),
        make("MaxPool", ["stem.relu"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        make("Conv", ["pooled", "deep.weight", "bias.copy"], ["deep"], name="deep", pads=[1] * 4),
        make("Resize", ["deep", "", "twice"], ["up"], name="up", mode="nearest", nearest_mode="floor"),
        make("Concat", ["stem.relu", "up"], ["both"], name="both", axis=1),
        make("Conv", ["both", "head.weight"], ["head" if antialias else "y"], name="head"),
        *down,
    ]
    values = {
        "bias": weights(channels),
        "stem.weight": weights(channels, 3, 3, 3),
        "deep.weight": weights(channels, channels, 3, 3),
        "head.weight": weights(2, 2 * channels, 1, 1),
        "twice": np.array([1, 1, 2, 2], np.float32),
        "half": np.array([1, 1, 0.5, 0.5], np.float32),
    }
    free = isinstance(size, str)
    shape = ("N", 3, "H", "W") if free else (1, 3, size, size)
    result = ("N", 2, "h", "w") if free else (1, 2, size // (1 + antialias), size // (1 + antialias))  # type: ignore[operator]
    return model(nodes, {"x": shape}, {"y": result}, values, opset=18)


def save_external(proto: ModelProto, path: Path) -> Path:
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=400)
    return path


def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.graph.io.ONE_FILE_BYTES", 1000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_small_model_with_external_data_becomes_one_file(tmp_path: Path) -> None:
    raw = save_external(net(), tmp_path / "raw.onnx")
    save_model(load_model(raw), tmp_path / "whole.onnx")
    report = clean(raw, tmp_path / "clean.onnx", None, TOLERANCE)
    other = clean(tmp_path / "whole.onnx", tmp_path / "other.onnx", None, TOLERANCE)
    assert names(tmp_path) == ["clean.onnx", "other.onnx", "raw.onnx", "weights.bin", "whole.onnx"]
    assert (tmp_path / "clean.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()
    assert report.raw_sha256 == sha256_model(raw) != sha256_file(raw)
    assert report.clean_sha256 == other.clean_sha256 == sha256_file(tmp_path / "clean.onnx")
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert sha256_model(raw) != report.raw_sha256


def test_a_large_model_stays_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = save_external(net(), tmp_path / "raw.onnx")
    small_limit(monkeypatch)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "clean.onnx"
    report = clean(raw, target, None, TOLERANCE)
    assert names(target.parent) == ["clean.onnx", "clean.onnx.data"]
    assert report.equality.passed
    assert report.nodes_after == {"Concat": 1, "Conv": 3, "MaxPool": 1, "Relu": 1, "Resize": 1}
    assert report.clean_sha256 == sha256_model(target)
    bare = onnx.load(target, load_external_data=False)
    outside = [t.name for t in bare.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert sorted(outside) == ["deep.weight"]
    again = clean(target, tmp_path / "again.onnx", None, TOLERANCE)
    assert not any(step.modified for step in again.passes)
    assert (tmp_path / "again.onnx.data").read_bytes() == (tmp_path / "out" / "clean.onnx.data").read_bytes()
    monkeypatch.undo()
    clean(raw, tmp_path / "one.onnx", None, TOLERANCE)
    assert load_model(tmp_path / "one.onnx") == load_model(target)


@needs_parser
def test_the_parser_reads_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_limit(monkeypatch)
    save_model(net(), tmp_path / "raw.onnx")
    assert (tmp_path / "raw.onnx.data").exists()
    assert clean(tmp_path / "raw.onnx", tmp_path / "clean.onnx", None, TOLERANCE).parser.accepted is True


class Scale(Pass):
    """A planted defect: the head's weights grow by 1 %."""

    name = "planted"

    def call(self, graph: gs.Graph) -> PassResult:
        conv = next(node for node in graph.nodes if node.op == "Conv" and node.name == "head")
        if hasattr(conv, "scaled"):
            return PassResult(False)
        conv.scaled = True
        conv.inputs[1] = gs.Constant(conv.inputs[1].name, conv.inputs[1].values * np.float32(1.01))
        return PassResult.of([("scale", conv.name)])


def test_an_unequal_graph_leaves_an_older_pair_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_limit(monkeypatch)
    raw = save_external(net(), tmp_path / "raw.onnx")
    clean(raw, tmp_path / "clean.onnx", None, TOLERANCE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckFailed, match="since the pass planted"):
        clean(raw, tmp_path / "clean.onnx", tmp_path / "r.json", TOLERANCE, passes=[*clean_passes(), Scale()])
    assert from_json(CleaningReport, tmp_path / "r.json").equality.guilty == "planted"
    (tmp_path / "r.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_file_of_the_raw_model_is_overwritten(tmp_path: Path) -> None:
    raw = save_external(net(), tmp_path / "raw.onnx")
    (tmp_path / "weights.bin").rename(tmp_path / "b.onnx.data")
    bare = onnx.load(raw, load_external_data=False)
    for tensor in bare.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "b.onnx.data"
    raw.write_bytes(bare.SerializeToString())
    (tmp_path / "link.onnx").symlink_to(raw)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path / "c.onnx"
    for target, report in (
        (raw, None),
        (tmp_path / "link.onnx", None),
        (tmp_path / "b.onnx", None),
        (tmp_path / "b.onnx.data", None),
        (other, raw),
        (other, tmp_path / "b.onnx.data"),
    ):
        with pytest.raises(ModelError, match="would overwrite the raw export"):
            clean(raw, target, report, TOLERANCE)
    with pytest.raises(ModelError, match="both graph and report"):
        clean(raw, other, other, TOLERANCE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_certificate_holds_every_size(tmp_path: Path) -> None:
    save_model(net("free"), tmp_path / "raw.onnx")
    profile = {"height": ProfileRange(min=8, opt=16, max=24, multiple_of=2)}
    report = clean(tmp_path / "raw.onnx", tmp_path / "c.onnx", tmp_path / "r.json", TOLERANCE, profiles=profile)
    assert from_json(CleaningReport, tmp_path / "r.json") == report
    certificate = report.equality
    assert [(trial.size, trial.shapes["x"]) for trial in certificate.trials] == [
        ("minimum", (1, 3, 8, 2)),
        ("typical", (2, 3, 16, 96)),
        ("maximum", (3, 3, 24, 192)),
    ]
    assert certificate.refused == ({"x": (1, 3, 14, 51)},)
    assert all(trial.max_relative_error <= TOLERANCE and trial.seconds > 0 for trial in certificate.trials)
    assert certificate.max_relative_error == max(trial.max_relative_error for trial in certificate.trials)
    assert 50 < report.peak_memory_mib < 50_000
    assert report.seconds > 0


@needs_parser
def test_refused_nodes_are_told_with_a_way_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(net("free", antialias=True), tmp_path / "raw.onnx")
    with caplog.at_level(logging.WARNING):
        report = clean(tmp_path / "raw.onnx", tmp_path / "clean.onnx", None, TOLERANCE)
    assert report.parser.accepted is False
    assert [(node.node, node.op) for node in report.parser.refused] == [("head.resize", "Resize")]
    assert [finding.node for finding in report.findings] == ["head.resize"]
    (said,) = [record.message for record in caplog.records]
    assert "refuses node head.resize (Resize)" in said
    assert report.findings[0].way_out in said


@needs_parser
def test_what_the_command_prints(tmp_path: Path, unet_trt: Command) -> None:
    raw, target, report = (tmp_path / name for name in ("raw.onnx", "clean.onnx", "report.json"))
    save_model(net("free", antialias=True), raw)
    told = unet_trt("clean", raw, "-o", target)
    assert told.code == 0, told
    assert told.out == f"{target}\n"
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in told.err.splitlines() if "│" in line]
    cells = {line[0]: line[1] for line in lines}
    assert cells["nodes"] == "9 -> 8"
    assert cells["Identity"] == "1 -> 0"
    assert "Conv" not in cells
    assert "identity × 1" in cells["rules fired"]
    assert [line[1] for line in lines if line[0] == "compared"] == [
        "x 1×3×2×2 (minimum): 0.0e+00",
        "x 2×3×64×96 (typical): 0.0e+00",
        "x 3×3×256×192 (maximum): 0.0e+00",
    ]
    assert cells["not compared"] == "x 1×3×37×51: the raw graph does not run"
    assert cells["largest change"] == "0.0e+00 of the largest output, 1e-05 allowed"
    assert cells["parser"].endswith("refuses the graph: head.resize (Resize)")
    assert cells["finding"].startswith("head.resize (Resize): TensorRT's parser refuses antialias")
    quiet = unet_trt("clean", raw, "-o", target, "--multiple-of", 2, "--quiet")
    assert (quiet.code, quiet.out) == (0, f"{target}\n")
    (warning,) = quiet.err.splitlines()
    assert "refuses node head.resize" in warning
    machine = unet_trt("clean", raw, "-o", target, "--report", report, "--json")
    assert machine.out.encode() == report.read_bytes()
    assert "│" not in machine.err
    assert from_json(CleaningReport, report).clean_sha256 == sha256_file(target)
