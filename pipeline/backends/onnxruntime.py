"""ONNX Runtime on the CPU: the FP32 reference, and the emulation of typed graphs where no engine can run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from pipeline.artifacts import TensorSpec
from pipeline.backends.base import Arrays, Capabilities, check_feeds
from pipeline.closing import Closing
from pipeline.errors import ConfigError, ModelError
from pipeline.graph.emulate import exactly_rounded, overflowing
from pipeline.graph.io import load_model

# Exceptions of ONNX Runtime share no public base class but these modules' own.
ORT_ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)
CPU = "CPUExecutionProvider"
# Environment variable that says the number of threads.
THREADS = "UNET_TRT_THREADS"
DTYPES = {"float": "float32", "double": "float64"}


def capabilities() -> Capabilities:
    """ONNX Runtime emulates the explicit route on any CPU; it builds no engines."""
    return Capabilities(
        name="onnxruntime",
        version=ort.__version__,
        builds=False,
        runs=True,
        why_not_build="ONNX Runtime runs ONNX files; it builds no engines",
        routes=("explicit",),
        strongly_typed=True,
        details={"providers": ", ".join(ort.get_available_providers())},
    )


def threads() -> int:
    """How many compute: what ``UNET_TRT_THREADS`` says, else one for each physical core that this process may use."""
    said = os.environ.get(THREADS, "")
    if said:
        if not said.isdecimal() or int(said) < 1:
            raise ConfigError(f"{THREADS} is {said!r}", expected="a number of threads, 1 or more")
        return int(said)
    usable = os.sched_getaffinity(0)
    siblings = (Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in usable)
    try:
        return len({path.read_text() for path in siblings})
    except OSError:
        return len(usable)


class OnnxRuntimeRunner(Closing):
    """An ONNX graph on ONNX Runtime, on its CPU provider unless told otherwise.

    Q/DQ pairs are executed as written, in floating point, never fused into integer kernels: the result is the
    quantized network's exactly rounded arithmetic, the same on every CPU. With floating point the last bits depend on
    the number of threads (see ``threads``), since convolutions of small images are split by it. Pickled, it is opened
    anew.

    Args:
        model: path or serialized bytes.
        optimize: let ONNX Runtime rewrite the graph; off for comparisons of graphs with each other.
        arena: keep freed memory for the next call; off where many sessions are open at once.
        providers: ONNX Runtime's, with their options, preferred first.

    Raises:
        ModelError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self, model: Path | bytes, *, optimize: bool = True, arena: bool = True, providers: Sequence[Any] = (CPU,)
    ) -> None:
        self._again = partial(OnnxRuntimeRunner, model, optimize=optimize, arena=arena, providers=tuple(providers))
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = threads()
        if THREADS in os.environ:  # the cores are shared with other processes: none waits for work by spinning
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=list(providers)
            )
        except (*ORT_ERRORS, ValueError) as error:
            where = "the graph" if isinstance(model, bytes) else str(model)
            raise ModelError(
                f"ONNX Runtime cannot load {where}: {error}", fix="clean or export the model again"
            ) from error
        self.inputs = tuple(_spec(node) for node in self.session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self.session.get_outputs())

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        check_feeds(self.inputs, feeds)
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))
        except ORT_ERRORS as error:
            shapes = {name: array.shape for name, array in feeds.items()}
            raise ModelError(
                f"ONNX Runtime cannot run the graph: {error}", got=f"inputs {shapes}", fix="check the input sizes"
            ) from error

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return self._again, ()

    def close(self) -> None:
        del self.session


def emulate(typed: Path) -> OnnxRuntimeRunner:
    """A typed graph (or any other ONNX file) on ONNX Runtime, as ``emulation`` has it."""
    model = emulation(typed)
    return OnnxRuntimeRunner(typed if model is None else model.SerializeToString())


def emulation(typed: Path) -> ModelProto | None:
    """The graph whose QuantizeLinear rounds as the standard says, and whose FP16 overflows as on a GPU, where ONNX
    Runtime's CPU provider runs it; None where the file is that already."""
    model = load_model(typed)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    if not (quantized or half):
        return None
    rounded = exactly_rounded(model) if quantized else model
    return overflowing(rounded) if half else rounded


def _spec(node: Any) -> TensorSpec:
    shape = tuple(
        size if isinstance(size, int) else size or f"{node.name}_{axis}" for axis, size in enumerate(node.shape)
    )
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(node.name, shape, np.dtype(DTYPES.get(kind, kind)).name)
