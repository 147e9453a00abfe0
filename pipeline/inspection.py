"""What a file holds, and what this machine can do: facts as plain JSON values."""

from __future__ import annotations

import collections
import math
import platform
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.artifacts import tool_version
from pipeline.errors import InputError

PACKAGES = ("torch", "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "tensorrt", "cuda-python", "numpy")


def inspect_file(path: Path) -> dict[str, Any]:
    """Facts of an ONNX file, an engine (from its manifest), a calibration cache or a JSON report.

    Raises:
        InputError: the file is missing or of no known kind; ModelError, EngineError, CalibrationError: damaged.
    """
    if not path.is_file():
        raise InputError(f"the file {path} does not exist", expected="an .onnx, .engine, .cache or .json file")
    kinds = {".onnx": _onnx, ".engine": _engine, ".plan": _engine, ".cache": _cache, ".json": _json}
    if path.suffix not in kinds:
        raise InputError(f"{path} is of no known kind", expected=", ".join(kinds), got=path.suffix or "no ending")
    return kinds[path.suffix](path)


def examine_machine() -> dict[str, Any]:
    """Versions, and what each backend can build and run here, with the reason where it cannot."""
    from pipeline.backends.registry import all_capabilities

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    facts["packages"] = {name: tool_version(name) or "not installed" for name in PACKAGES}
    for c in all_capabilities():
        rows: dict[str, Any] = {
            "version": c.version or "not installed",
            "builds engines": "yes" if c.builds else f"no: {c.why_not_build}",
            "runs": "yes" if c.runs else f"no: {c.why_not_run}",
            "routes": ", ".join(c.routes) or "none",
        }
        if c.device is not None:
            rows["GPU"] = f"{c.device.name}, compute capability {c.device.compute_capability}, driver {c.device.driver}"
        if c.target_capabilities:
            rows["engines run on compute capability"] = ", ".join(c.target_capabilities)
        facts[c.name] = {**rows, **c.details}
    return facts


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
    return {"file": str(path), "bytes": path.stat().st_size, **facts}


def _cache(path: Path) -> dict[str, Any]:
    from pipeline.calibration.table import read_cache

    table = read_cache(path)
    return {
        "file": str(path),
        "algorithm": table.algorithm,
        "tensors": len(table.amax),
        "amax": dict(table.amax),
    }


def _json(path: Path) -> dict[str, Any]:
    import json

    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no readable JSON file: {error}") from error
    return facts if isinstance(facts, dict) else {"content": facts}
