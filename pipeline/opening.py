"""Any model file, engine or ONNX, as a runner with what it says of itself."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import onnx

from pipeline.artifacts import sha256_file
from pipeline.backends.base import Runner
from pipeline.backends.onnxruntime import emulate
from pipeline.backends.remote import RemoteRunner, is_address
from pipeline.config import Precision
from pipeline.engines import load_engine, read_manifest
from pipeline.errors import EngineError
from pipeline.facts import Facts, facts_of
from pipeline.graph.io import load_model, read_card
from pipeline.graph.promises import read_multiples
from pipeline.graph.resampling import aligns_corners
from pipeline.reports import Candidate


def read_facts(path: Path) -> Facts:
    """What an ``.onnx`` file, an engine with its manifest, or a manifest says.

    Raises:
        ModelError: the ONNX file is missing or damaged.
        EngineError: the manifest is.
    """
    if path.suffix == ".onnx":
        model = load_model(path)
        return Facts(read_card(model), read_multiples(model), aligns_corners(model))
    manifest = read_manifest(path)
    return Facts(manifest.card, manifest.multiples, manifest.aligns_corners)


def open_model(path: Path | str, *, trust: bool = False) -> tuple[Runner, Facts]:
    """Load an ``.onnx`` file on ONNX Runtime, or an engine after its manifest check; or connect to a served model.

    Args:
        path: of the file, or ``grpc://HOST:PORT/MODEL[/VERSION]``, or ``http://``.
        trust: load an engine although its manifest is missing or does not match.

    Raises:
        ModelError, EngineError, UnsupportedError: as the two loaders.
        ServerError: as ``RemoteRunner``.
    """
    if is_address(path):
        remote = RemoteRunner(str(path))
        return remote, facts_of(remote)
    path = Path(path)
    runner: Runner = emulate(path) if path.suffix == ".onnx" else load_engine(path, trust=trust)
    try:
        return runner, read_facts(path)
    except EngineError:  # which load_engine has let pass
        return runner, Facts()


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
