"""Any model file, engine or ONNX, as a runner with what it says of itself."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import onnx

from pipeline.artifacts import ModelCard, sha256_file
from pipeline.backends.base import Runner
from pipeline.backends.onnxruntime import emulate
from pipeline.config import Precision
from pipeline.engines import load_engine, read_manifest
from pipeline.errors import EngineError
from pipeline.graph.io import load_model, read_card
from pipeline.reports import Candidate


def open_model(path: Path, *, trust: bool = False) -> tuple[Runner, ModelCard | None]:
    """Load an ``.onnx`` file on ONNX Runtime, or an engine after its manifest check.

    Args:
        trust: load an engine although its manifest is missing or does not match.

    Raises:
        ModelError, EngineError, UnsupportedError: as the two loaders.
    """
    if path.suffix == ".onnx":
        return emulate(path), read_card(load_model(path))
    runner = load_engine(path, trust=trust)
    try:
        return runner, read_manifest(path).card
    except EngineError:
        return runner, None


def describe_candidate(path: Path) -> Candidate:
    """What validation says of a model file that it judges."""
    if path.suffix == ".onnx":
        ran = f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"
        return Candidate(_precision(load_model(path)), True, ran, sha256_file(path), None, None)
    manifest = read_manifest(path)
    ran = f"{manifest.backend} {manifest.backend_version}"
    sha = manifest.engine_sha256
    return Candidate(manifest.precision, False, ran, sha, sha, manifest.route)


def _precision(model: onnx.ModelProto) -> Precision:
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return "int8"
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "fp16" if half else "fp32"
