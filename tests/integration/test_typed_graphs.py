"""FP16 and INT8 graphs of real exports: on ONNX Runtime, and built by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.table import CalibrationTable
from pipeline.graph.cleaning import clean_model
from pipeline.graph.emulate import exactly_rounded
from pipeline.graph.half import to_half
from pipeline.graph.placement import activation_tensors, quantizable_tensors
from pipeline.graph.quantize import quantize

torch = pytest.importorskip("torch")

from tests.integration.test_clean import export, make_network  # noqa: E402, F401

SIZE = (3, 48, 64)


def scene(batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(11)
    rows, columns = np.meshgrid(np.linspace(0, 5, 48), np.linspace(0, 7, 64), indexing="ij")
    waves = np.stack([np.sin(rows + k) * np.cos(columns * (k + 1)) for k in range(3)])
    return (waves + 0.2 * rng.standard_normal((batch, *SIZE))).astype(np.float32)


def run(model: ModelProto, feed: np.ndarray) -> np.ndarray:
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        return runner({"image": feed})["logits"]


def minmax(model: ModelProto, feed: np.ndarray) -> CalibrationTable:
    """Ranges of every activation on one image."""
    watched = ModelProto()
    watched.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    tensors = activation_tensors(model)
    watched.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in tensors if name not in outputs and name != "image"
    )
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    values: Mapping[str, Any] = dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"image": feed}), strict=True)
    )
    values = {**values, "image": feed}
    return CalibrationTable("minmax", {name: float(np.abs(values[name]).max()) for name in tensors})


def build(model: ModelProto) -> int:
    """Bytes of the plan that TensorRT-RTX builds, strongly typed."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)
    if -1 in shape:
        sizes = [(1, 3, 32, 32), (1, 3, 48, 64), (2, 3, 64, 96)]
        profile.set_shape(
            "image", *[tuple(s if d == -1 else d for d, s in zip(shape, size, strict=True)) for size in sizes]
        )
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return int(plan.nbytes)


CASES = [
    ("torchscript", 11, "batch", "bilinear"),
    ("torchscript", 17, "static", "nearest"),
    ("torchscript", 17, "all", "bilinear"),
    ("dynamo", 18, "static", "bilinear"),
    ("dynamo", 19, "batch", "transposed"),
    ("dynamo", 21, "all", "bilinear"),
]


@pytest.mark.parametrize(("exporter", "opset", "dynamic", "upsampling"), CASES)
def test_typed_graphs_run_and_build(
    export: Any,  # noqa: F811
    exporter: str,
    opset: int,
    dynamic: str,
    upsampling: str,
) -> None:
    clean, _ = clean_model(onnx.load(export(exporter, opset, dynamic, upsampling)))
    feed = scene()
    want = run(clean, feed)
    largest, mean = np.abs(want).max(), np.abs(want).mean()

    half = to_half(clean)
    onnx.checker.check_model(half, full_check=True)
    assert [n.op_type for n in half.graph.node].count("Cast") == 2 + [n.op_type for n in clean.graph.node].count("Cast")
    assert {n.name for n in clean.graph.node} <= {n.name for n in half.graph.node}
    assert np.abs(run(half, feed) - want).max() < 5e-3 * largest
    assert build(half) > 0

    table = minmax(clean, feed)
    assert set(quantizable_tensors(clean)) <= set(table.amax)
    errors = {}
    for name, is_half in (("int8", False), ("int8 in fp16", True)):
        typed = quantize(clean, table, half=is_half)
        convolutions = sum(node.op_type in ("Conv", "ConvTranspose") for node in clean.graph.node)
        pairs = convolutions + len(quantizable_tensors(clean))
        assert [node.op_type for node in typed.graph.node].count("QuantizeLinear") == pairs
        errors[name] = np.abs(run(exactly_rounded(typed), feed) - want).mean() / mean
        assert build(typed) > 0
    assert 1e-4 < errors["int8"] < 0.12
    assert 1e-4 < errors["int8 in fp16"] < 0.12
    assert errors["int8 in fp16"] < 1.3 * errors["int8"]


def test_excluding_layers_brings_the_result_nearer(export: Any) -> None:  # noqa: F811
    clean, _ = clean_model(onnx.load(export("dynamo", 19)))
    feed = scene()
    want, table = run(clean, feed), minmax(clean, feed)
    every = np.abs(run(quantize(clean, table, half=False), feed) - want).mean()
    fewer = np.abs(run(quantize(clean, table, half=False, exclude=["up*", "outc*"]), feed) - want).mean()
    assert fewer < every


def test_grouped_and_transposed_convolutions_build(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.ConvTranspose2d(8, 4, 2, stride=2),
        torch.nn.Conv2d(4, 2, 1),
    ).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        network,
        (torch.randn(1, *SIZE),),
        path,
        opset_version=19,
        dynamo=False,
        input_names=["image"],
        output_names=["logits"],
    )
    clean, _ = clean_model(onnx.load(path))
    feed = scene()
    want = run(clean, feed)
    for half in (False, True):
        typed = quantize(clean, minmax(clean, feed), half=half)
        assert np.abs(run(exactly_rounded(typed), feed) - want).mean() < 0.03 * np.abs(want).mean()
        assert build(typed) > 0
