"""What other programs say of an engine's speed: Polygraphy's runner and trtexec, where they are installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.artifacts import TensorSpec, tool_version
from pipeline.backends.base import Arrays
from pipeline.errors import EngineError, UnsupportedError
from pipeline.metrics.clock import host_milliseconds
from pipeline.reports import OwnFigure

# A program's way to time an engine: of its name, its input and the seconds to measure and to warm up.
OwnClock = Callable[[str, Arrays, float, float], OwnFigure]
# Where NVIDIA's packages put it, which is on nobody's PATH.
TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec")
# trtexec loads TensorRT and the engine first.
START_SECONDS = 120.0


def polygraphy_figure(plan: Path, name: str, feeds: Arrays, seconds: float, warmup_seconds: float) -> OwnFigure:
    """``TrtRunner.last_inference_time``: by the host's clock, from host array to host array.

    Raises:
        UnsupportedError: Polygraphy cannot be imported or lacks what it needs.
        EngineError: it cannot run the engine.
    """
    try:
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException
    except ImportError as error:
        raise UnsupportedError(f"Polygraphy cannot be imported: {error}", fix="pip install polygraphy") from error
    times: list[float] = []
    try:
        with TrtRunner(EngineFromBytes(plan.read_bytes())) as runner:

            def once() -> None:
                runner.infer(dict(feeds))
                times.append(1000 * runner.last_inference_time())

            host_milliseconds(once, 0, warmup_seconds)
            times.clear()
            host_milliseconds(once, seconds, 0)
    except (PolygraphyException, OSError, RuntimeError) as error:
        raise EngineError(f"Polygraphy cannot run the engine: {str(error).strip().splitlines()[0]}") from error
    what = "infer: copies, inference and Polygraphy's own work, by the host's clock"
    return OwnFigure(f"Polygraphy {tool_version('polygraphy')}", name, what, float(np.median(times)), len(times))


def trtexec_figure(
    plan: Path, inputs: tuple[TensorSpec, ...], name: str, feeds: Arrays, seconds: float, warmup_seconds: float
) -> OwnFigure:
    """``trtexec --loadEngine``: its "GPU Compute Time", with CUDA graphs and without copies.

    Source: TensorRT's documentation of trtexec; ``--exportTimes`` writes ``computeMs`` of every inference.

    Raises:
        UnsupportedError: there is no trtexec.
        EngineError: it fails, or does not answer in time.
    """
    program = next((found for path in TRTEXEC if (found := shutil.which(path))), None)
    if program is None:
        raise UnsupportedError("there is no trtexec", fix="put TensorRT's bin folder on PATH")
    dynamic = any(isinstance(size, str) for spec in inputs for size in spec.shape)
    shapes = ",".join(f"{tensor}:{'x'.join(map(str, array.shape))}" for tensor, array in feeds.items())
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times.json")
        command = [program, f"--loadEngine={plan}", f"--exportTimes={times}", "--useCudaGraph", "--noDataTransfers"]
        command += [f"--warmUp={1000 * warmup_seconds:.0f}", f"--duration={seconds:.0f}"]
        command += [f"--shapes={shapes}"] if dynamic else []
        try:
            limit = START_SECONDS + seconds + warmup_seconds
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            if done.returncode:
                said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if "[E]" in line]
                raise EngineError(f"trtexec failed: {said[0] if said else f'exit code {done.returncode}'}")
            values = [float(row["computeMs"]) for row in json.loads(times.read_text(encoding="utf-8"))]
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"trtexec had not finished after {error.timeout:g} s") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"trtexec wrote no times that can be read: {error}") from error
    if not values:
        raise EngineError("trtexec timed no inference")
    return OwnFigure("trtexec", name, "GPU compute time", float(np.median(values)), len(values))
