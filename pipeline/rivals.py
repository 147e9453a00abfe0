"""What a user would run instead of an engine, as candidates of the benchmark; what is missing here is named."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, Precision, Rival
from pipeline.contenders import Contender, GpuContender, HostContender
from pipeline.contest import Contestant
from pipeline.engines import read_manifest
from pipeline.errors import PipelineError, UnsupportedError
from pipeline.graph.io import load_model, model_inputs
from pipeline.own_figures import OwnClock, polygraphy_figure, trtexec_figure
from pipeline.reports import Accuracy
from pipeline.torch_process import ANSWER_SECONDS, TorchProcess, Variant, torch_python

TORCH: dict[Rival, tuple[str, Variant]] = {
    "torch-fp32": ("torch eager, FP32", Variant("fp32")),
    "torch-tf32": ("torch eager, TF32", Variant("tf32")),
    "torch-fp16": ("torch eager, FP16 channels-last", Variant("fp16")),
    "torch-compile": ("torch.compile, FP16 channels-last", Variant("fp16", "default")),
    "torch-compile-max-autotune": ("torch.compile max-autotune, FP16 channels-last", Variant("fp16", "max-autotune")),
}


# The two programs with a clock of their own; what they time is an engine of TensorRT.
CLOCKS: dict[Rival, str] = {"polygraphy": "Polygraphy", "trtexec": "trtexec"}
RAW_ENGINE = "raw export, fp16"


@dataclass(frozen=True)
class Built:
    """An engine that runs here.

    Attributes:
        ran: the library that runs it.
        opens: loads it.
        precision: None where nobody asked for it.
        accuracy: by its last validation.
    """

    name: str
    plan: Path
    ran: str
    opens: Callable[[], Any]
    precision: Precision | None = None
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class LineUp:
    """Who takes part in a benchmark; who cannot, with why; other programs' clocks by their name and an engine's."""

    contestants: list[Contestant]
    absent: dict[str, str]
    own_clocks: dict[tuple[str, str], OwnClock]


def line_up(config: Config, graph: Path, built: Sequence[Built], *, wants_gpu: bool) -> LineUp:
    """FP32 on the CPU, the engines, and the candidates that ``benchmark.candidates`` names.

    Args:
        graph: the clean graph, whose input and output all but the raw export's engine share.
        wants_gpu: leave out torch where it would run on the CPU.

    Raises:
        EngineError: a manifest is missing or damaged.
    """
    chosen = config.benchmark.rivals
    contestants, absent = _on_torch(config, graph, wants_gpu)
    if "onnxruntime-cuda" in chosen:
        contestants.append(_on_onnxruntime_cuda(graph))
    clocks: dict[tuple[str, str], OwnClock] = {}
    for rival in ("polygraphy", "trtexec"):
        if rival in chosen:
            clocks |= _own_clocks(rival, built, absent)
    return LineUp([_on_onnxruntime(graph), *map(_engine, built), *contestants], absent, clocks)


def _on_onnxruntime(graph: Path) -> Contestant:
    def opens() -> Contender:
        import onnxruntime

        from pipeline.backends.onnxruntime import OnnxRuntimeRunner

        return HostContender(OnnxRuntimeRunner(graph), f"onnxruntime {onnxruntime.__version__}, CPU")

    return Contestant("FP32 on ONNX Runtime, CPU", opens, graph.stat().st_size)


def _on_onnxruntime_cuda(graph: Path) -> Contestant:
    def opens() -> Contender:
        import onnxruntime

        from pipeline.backends.onnxruntime_cuda import CudaRunner

        return GpuContender(lambda: CudaRunner(graph), f"onnxruntime {onnxruntime.__version__}, CUDA")

    return Contestant("FP32 on ONNX Runtime, CUDA", opens, graph.stat().st_size, required=False)


def _engine(built: Built) -> Contestant:
    manifest = read_manifest(built.plan)
    return Contestant(
        built.name,
        functools.partial(GpuContender, built.opens, built.ran),
        built.plan.stat().st_size,
        built.precision,
        manifest.engine_sha256,
        manifest.build_seconds,
        built.accuracy,
        required=built.precision is not None,
    )


def _own_clocks(
    rival: Literal["polygraphy", "trtexec"], built: Sequence[Built], absent: dict[str, str]
) -> dict[tuple[str, str], OwnClock]:
    """A program's way to time each engine; ``absent`` gets the reason where there is none."""
    clocks: dict[tuple[str, str], OwnClock] = {}
    tool = CLOCKS[rival]
    if not built:
        absent[tool] = "no engine runs on this machine"
    for each in built:
        manifest = read_manifest(each.plan)
        if manifest.backend != "tensorrt":
            absent[f"{tool}, {each.name}"] = f"it does not run engines of {manifest.backend}"
        elif rival == "polygraphy":
            clocks[tool, each.name] = functools.partial(polygraphy_figure, each.plan)
        else:
            clocks[tool, each.name] = functools.partial(trtexec_figure, each.plan, manifest.inputs)
    return clocks


def _on_torch(config: Config, graph: Path, wants_gpu: bool) -> tuple[list[Contestant], dict[str, str]]:
    """The torch candidates that the configuration names, or why there are none, by name."""
    chosen = [TORCH[rival] for rival in config.benchmark.rivals if rival in TORCH]
    try:
        if config.network.factory is None:
            raise UnsupportedError("the network is an ONNX file, which torch does not run")
        if config.task == "tensors":
            raise UnsupportedError("torch is timed on segmentation networks alone, which have one output")
        python = torch_python(config.benchmark.torch_python)
    except PipelineError as error:
        return [], {name: error.summary for name, _ in chosen}
    weights = config.network.weights

    def opens(variant: Variant) -> Contender:
        (source,) = model_inputs(load_model(graph))
        return TorchProcess(
            python,
            config.network,
            variant,
            source,
            config.preprocessing,
            config.clean,
            wants_gpu=wants_gpu,
            first_seconds=ANSWER_SECONDS if variant.mode is None else config.benchmark.compile_seconds,
        )

    return [
        Contestant(
            name,
            functools.partial(opens, variant),
            weights.stat().st_size if weights else None,
            required=False,
            compiles=variant.mode is not None,
        )
        for name, variant in chosen
    ], {}
