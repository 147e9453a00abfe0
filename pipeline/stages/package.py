"""A validated model as others take it: in a Triton model repository, or in an archive with a runner of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from pipeline import serving
from pipeline.artifacts import EngineManifest, ModelCard, ServedModel, TensorSpec, to_json
from pipeline.backends.onnxruntime import emulation
from pipeline.config import Precision
from pipeline.engines import MANIFEST, read_manifest
from pipeline.errors import ConfigError, UnsupportedError
from pipeline.graph.emulate import exactly_rounded
from pipeline.graph.io import load_model, model_files, model_inputs, write_model
from pipeline.opening import read_facts
from pipeline.serving.archive import write_archive
from pipeline.serving.repository import BATCH, Platform, TritonModel, add_version

SOURCES = Path(serving.__file__).parent
ROLES = {"batch": 0, "height": 2, "width": 3}
IMAGE_ROLES = {"batch": 0, "height": 1, "width": 2}


@dataclass(frozen=True)
class Judged:
    """One precision of a configuration, which has passed validation.

    Attributes:
        engine: folder of the engine with its manifest, of the typed graph, or both.
        cache: of calibration, where there is one.
        report: of validation.
        most: largest batch that the configuration names, where the batch is free.
    """

    card: ModelCard
    precision: Precision
    engine: Path
    cache: Path | None
    report: Path
    most: int | None

    @property
    def plan(self) -> Path:
        return self.engine / "model.engine"

    @property
    def typed(self) -> Path:
        return self.engine / "model.onnx"

    @property
    def manifest(self) -> EngineManifest | None:
        return read_manifest(self.plan) if self.plan.is_file() else None


def package_triton(
    judged: Judged,
    repository: Path,
    *,
    platform: Platform | Literal["auto"] = "auto",
    name: str | None = None,
    version: int | None = None,
    instances: int = 1,
    overwrite: bool = False,
) -> Path:
    """Put a model into a Triton model repository; see ``add_version``.

    The engine goes in where TensorRT built it. On ONNX Runtime, the typed graph does, its QuantizeLinear as the
    standard has it; with Triton's Python backend, which has a CPU alone, the very graph that validation judged.

    Args:
        platform: Triton's name of what runs it; auto: TensorRT where there is its engine, otherwise ONNX Runtime.
        name: default: ``<config>_<precision>``.

    Returns:
        The version's folder.

    Raises:
        UnsupportedError: there is nothing for that platform; ``tritonclient`` is not installed.
        BuildFolderError, ConfigError: as ``add_version``.
    """
    platform = _platform(judged, platform)
    with tempfile.TemporaryDirectory(prefix="unet-trt-") as made:
        if platform == "tensorrt_plan":
            files = {"model.plan": judged.plan, MANIFEST: judged.engine / MANIFEST}
        else:
            graph = emulation(judged.typed) if platform == "python" else _rounded(judged.typed)
            files = _graph_files(judged.typed, graph, Path(made))
        if platform == "python":
            files["model.py"] = SOURCES / "python_model.py"
        model = TritonModel(
            name or f"{judged.card.name}_{judged.precision}",
            platform,
            _served(judged, judged.plan if platform == "tensorrt_plan" else judged.typed),
            files,
            _largest_batch(judged, platform),
            instances,
        )
        return add_version(repository, model, version, overwrite=overwrite)


def package_archive(judged: Judged, target: Path, *, overwrite: bool = False) -> None:
    """Write engine and typed graph, manifest, cache, preprocessing and classes, validation's report, and ``run.py``.

    ``run.py`` takes the engine where TensorRT built it, otherwise ONNX Runtime, on the very graph that validation
    judged.

    Raises:
        ConfigError: the network gives no masks, or the file is called otherwise than ``.zip``.
        BuildFolderError: as ``write_archive``.
    """
    if judged.card.task != "segmentation":
        raise ConfigError(
            "the archive's runner writes masks",
            expected="task: segmentation",
            got=f"task: {judged.card.task}",
            fix="use --format triton",
        )
    if target.suffix != ".zip":
        raise ConfigError(f"{target} is no name of an archive", expected="a name with .zip", fix="give -o MODEL.zip")
    manifest, runs_engine = judged.manifest, _has_tensorrt(judged)
    files: dict[str, Path | bytes] = {"run.py": SOURCES / "run.py", "report.json": judged.report}
    if runs_engine:
        files["engine.py"] = SOURCES / "engine.py"
    if manifest is not None:
        files |= {"model.engine": judged.plan, MANIFEST: judged.engine / MANIFEST}
    if judged.cache is not None:
        files["calibration.cache"] = judged.cache
    with tempfile.TemporaryDirectory(prefix="unet-trt-") as made:
        if judged.typed.is_file():
            files |= {file.name: file for file in model_files(judged.typed)}
            graph = None if runs_engine else emulation(judged.typed)
            if graph is not None:
                files |= _graph_files(judged.typed, graph, Path(made), "emulation.onnx")
        files["model.json"] = to_json(_served(judged, judged.plan if runs_engine else judged.typed))
        write_archive(target, files, overwrite=overwrite)


def _platform(judged: Judged, wanted: Platform | Literal["auto"]) -> Platform:
    has_engine, has_graph = _has_tensorrt(judged), judged.typed.is_file()
    platform = ("tensorrt_plan" if has_engine else "onnxruntime_onnx") if wanted == "auto" else wanted
    if platform == "tensorrt_plan" and not has_engine:
        manifest = judged.manifest
        raise UnsupportedError(
            f"{judged.engine} holds no engine that Triton runs",
            expected="an engine of TensorRT's",
            got=f"one of {manifest.backend}" if manifest else "a typed graph alone",
            fix="run it with --backend tensorrt on a GPU host, or package the graph with --platform onnxruntime_onnx",
        )
    if platform != "tensorrt_plan" and not has_graph:
        raise UnsupportedError(
            f"{judged.engine} holds no typed graph for ONNX Runtime: the implicit route has none",
            fix="give --set engine.route=explicit, or package the engine with --platform tensorrt_plan",
        )
    return platform


def _has_tensorrt(judged: Judged) -> bool:
    manifest = judged.manifest
    return manifest is not None and manifest.backend == "tensorrt"


def _rounded(typed: Path) -> ModelProto | None:
    """The typed graph as any of ONNX Runtime's providers computes it rightly; None where it is that already."""
    model = load_model(typed)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return exactly_rounded(model) if quantized else None


def _graph_files(typed: Path, graph: ModelProto | None, made: Path, name: str = "model.onnx") -> dict[str, Path]:
    """A graph, or where there is none the typed one, as files by name."""
    if graph is None:
        return {file.name: file for file in model_files(typed)}
    write_model(graph, made / name)
    return {file.name: file for file in made.iterdir()}


def _served(judged: Judged, model: Path) -> ServedModel:
    facts, manifest = read_facts(model), judged.manifest if model == judged.plan else None
    (source, *others) = manifest.inputs if manifest else model_inputs(load_model(model))
    multiples = {} if others else _by_role(source, facts.multiples)
    profiles = manifest.profiles if manifest else {}
    return ServedModel(judged.card, judged.precision, profiles, multiples, facts.aligns_corners)


def _by_role(source: TensorSpec, multiples: Mapping[str, int]) -> dict[str, int]:
    """What is promised of an image input's sizes, by what the axes mean instead of what the graph calls them."""
    roles = IMAGE_ROLES if source.dtype == "uint8" else ROLES
    found = {role: multiples.get(str(source.shape[place]), multiples.get(role, 1)) for role, place in roles.items()}
    return {role: number for role, number in found.items() if number > 1}


def _largest_batch(judged: Judged, platform: Platform) -> int:
    manifest = judged.manifest
    if platform == "tensorrt_plan" and manifest is not None and manifest.profiles:
        return min(profile.max[0] for profile in manifest.profiles.values())
    return judged.most or BATCH
