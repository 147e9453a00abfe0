"""What a file holds: facts as plain JSON values."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.artifacts import EngineManifest, from_json
from pipeline.errors import InputError, PipelineError
from pipeline.reports import BenchmarkReport, EngineAccount
from pipeline.slips import did_you_mean

if TYPE_CHECKING:
    from pipeline.backends.runner import EngineRunner

# Of the report beside a calibration cache; its ranges are those of the cache.
REPORTED = ("calibrator", "image_count", "skipped", "images_sha256", "graph_sha256", "preprocessing_sha256", "notes")


def inspect_file(path: Path) -> dict[str, Any]:
    """Facts of an ONNX file, an engine (from its manifest), a calibration cache, a JSON report, or of a model in a
    Triton repository by its ``config.pbtxt``, which is checked against the model's files.

    Raises:
        InputError: the file is missing or of no known kind; ModelError, EngineError, CalibrationError,
            BuildFolderError: damaged.
    """
    if not path.is_file():
        raise InputError(
            f"the file {path} does not exist{did_you_mean(path)}",
            expected="an .onnx, .engine, .cache, .json or .pbtxt file",
        )
    kinds = {
        ".onnx": _onnx,
        ".engine": _engine,
        ".plan": _engine,
        ".cache": _cache,
        ".json": _json,
        ".pbtxt": _triton,
    }
    if path.suffix not in kinds:
        raise InputError(f"{path} is of no known kind", expected=", ".join(kinds), got=path.suffix or "no ending")
    return kinds[path.suffix](path)


def _onnx(path: Path) -> dict[str, Any]:
    from pipeline.graph.io import load_model, model_inputs, model_outputs, opset, read_card

    model = load_model(path)
    card = read_card(model)
    return {
        "file": str(path),
        "opset": opset(model),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "nodes": len(model.graph.node),
        "operators": dict(collections.Counter(node.op_type for node in model.graph.node).most_common()),
        "parameters": sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        "inputs": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in model_inputs(model)},
        "outputs": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in model_outputs(model)},
        "card": TypeAdapter(type(card)).dump_python(card, mode="json") if card else "none",
    }


def _engine(path: Path) -> dict[str, Any]:
    from pipeline.engines import read_manifest

    manifest = read_manifest(path)
    facts: dict[str, Any] = TypeAdapter(type(manifest)).dump_python(manifest, mode="json")
    account, says = _account(path, manifest)
    where = TypeAdapter(type(account)).dump_python(account, mode="json") if account else None
    return {"file": str(path), "bytes": path.stat().st_size, **facts, "time_of_layers": says, "account": where}


def _account(path: Path, manifest: EngineManifest) -> tuple[EngineAccount | None, str]:
    """Where the engine's time goes, and on which GPU: measured now, else what the benchmark beside it has kept."""
    from pipeline.backends import cuda
    from pipeline.engines import load_engine
    from pipeline.graph.io import load_model
    from pipeline.speed import account_for

    build = path.resolve().parent.parent.parent
    graphs = (path.with_name("model.onnx"), build / "clean" / "model.onnx")
    try:
        with load_engine(path) as runner:
            graph = next((load_model(file) for file in graphs if file.is_file()), None)
            device = cuda.current_device()
            feeds = _random_feeds(runner)
            whole = float(np.median(runner.device_milliseconds(feeds, seconds=0.3, warmup_seconds=0.3)))
            account = account_for(runner, feeds, graph, manifest.engine_sha256, device, whole)
            return account, f"measured on {device.name}"
    except PipelineError as error:
        kept = _kept(build / "benchmark" / "report.json", manifest)
        if kept is not None:
            return kept
        return None, f"not known here: {error.problem}"


def _kept(file: Path, manifest: EngineManifest) -> tuple[EngineAccount, str] | None:
    try:
        report = from_json(BenchmarkReport, file)
    except PipelineError:
        return None
    account = report.engines.get(manifest.precision)
    if account is None or account.engine_sha256 != manifest.engine_sha256:
        return None
    gpu = report.device.name if report.device else "an unknown GPU"
    return account, f"measured on {gpu} at {report.created}, as {file} has it"


def _random_feeds(runner: EngineRunner) -> dict[str, NDArray[Any]]:
    """An input of the profile's typical size; what is in it makes no difference to the time."""
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in runner.inputs:
        profile = runner.profiles.get(spec.name)
        shape = profile.opt if profile else tuple(size for size in spec.shape if isinstance(size, int))
        values = rng.integers(0, 256, shape) if spec.dtype == "uint8" else rng.standard_normal(shape)
        feeds[spec.name] = values.astype(np.dtype(spec.dtype))
    return feeds


def _cache(path: Path) -> dict[str, Any]:
    from pipeline.calibration.table import read_cache

    table = read_cache(path)
    facts: dict[str, Any] = {
        "file": str(path),
        "algorithm": table.algorithm,
        "tensorrt_version": _dotted(table.version or 0),
        "tensors": len(table.amax),
        "report": "none",
        "amax": dict(table.amax),
    }
    if table.report is not None:
        report = TypeAdapter(type(table.report)).dump_python(table.report, mode="json")
        facts["report"] = {key: report[key] for key in REPORTED}
    return facts


def _triton(path: Path) -> dict[str, Any]:
    from pipeline.serving.repository import check_model, versions

    config = check_model(path.resolve().parent)
    from tritonclient.grpc.model_config_pb2 import DataType  # check_model has said if it is missing

    def tensors(said: Any) -> dict[str, str]:
        return {one.name: f"{DataType.Name(one.data_type).removeprefix('TYPE_')} {list(one.dims)}" for one in said}

    return {
        "file": str(path),
        "name": config.name,
        "runs on": config.platform or config.backend,
        "versions": versions(path.resolve().parent),
        "largest batch": config.max_batch_size or "none: the sizes below are exact",
        "inputs": tensors(config.input),
        "outputs": tensors(config.output),
        "instances": [group.count for group in config.instance_group],
        "parameters": {key: value.string_value for key, value in sorted(config.parameters.items())},
        "check": "fits the files",
    }


def _dotted(number: int) -> str:
    """A TensorRT version as its number in a cache's header: 8600 is 8.6.0, 100300 is 10.3.0."""
    major = 10000 if number >= 100000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _json(path: Path) -> dict[str, Any]:
    import json

    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no readable JSON file: {error}") from error
    return facts if isinstance(facts, dict) else {"content": facts}
