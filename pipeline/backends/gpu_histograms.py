"""Histograms of a graph's activations on the GPU: TensorRT computes them, kernels count them, nothing comes back but
the counts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends import cuda, nvrtc, tensorrt
from pipeline.backends.ahead import Ahead
from pipeline.backends.base import BuildRequest, check_feeds
from pipeline.backends.runner import EngineRunner
from pipeline.calibration.histogram import (
    BINS,
    EXPONENT_OF_BINS,
    SMALLEST_EXPONENT,
    Histogram,
    merge_concatenated,
    not_finite,
)
from pipeline.closing import Closing
from pipeline.config import EngineConfig
from pipeline.errors import CalibrationError, EngineError, PipelineError, UnsupportedError
from pipeline.graph.io import image_input, load_model, save_model
from pipeline.graph.placement import concatenations
from pipeline.graph.shapes import element_type, infer

log = logging.getLogger(__name__)

Named = tuple[str, NDArray[Any]]

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 1024
SHARED_BYTES = BINS * np.dtype(np.uint32).itemsize
# Values for one block: few enough to balance the GPU, so many that adding up all blocks' bins costs little.
PIECE = 1 << 18
# As the structures of the same names in the source.
PIECES = np.dtype([("values", np.uint64), ("size", np.uint32), ("tensor", np.uint32)])
STATES = np.dtype([("low", np.uint32), ("high", np.uint32), ("exponent", np.int32), ("rest", np.uint32)])
# Images under way on the GPU.
SLOTS = 2
# The engine runs once an image, so building it in seconds matters more than how fast it is.
OPTIMIZATION_LEVEL = 0


def gpu_histograms(
    clean: Path, tensors: Sequence[str], images: Iterable[Named], config: EngineConfig
) -> list[Histogram]:
    """What the tensors hold on all images, in their order.

    One pass: an FP32 engine (without TF32) gives every tensor; concatenations are merged from their parts. While the
    GPU works on an image, the next is uploaded and those behind it are taken from ``images`` on another thread.

    GPU memory is independent of the number of images: all tensors of one image at once (4 bytes a value), TensorRT's
    own (at most ``workspace_mib`` and the weights), 128 KiB a tensor for its histogram, and three images.

    Args:
        clean: float32 graph with one input.
        tensors: float32 activations of the graph, in topological order.
        images: name of each, and its array as the graph takes it; all of one shape. Iterated on another thread, a few
            images ahead.
        config: for the workspace.

    Raises:
        CalibrationError: NaN or infinite activations (the first such tensor is named, and the image); images of
            differing shapes, or of one that the graph does not take; no images.
        UnsupportedError: TensorRT, NVRTC or the GPU is missing; an activation that is not float32.
        ModelError: a graph that cannot be loaded, or has not exactly one input.
        EngineError: TensorRT refuses the graph; out of GPU memory.
        Exception: whatever ``images`` raises, as it was raised, once the images before it are done.
    """
    trt = _require()
    model = load_model(clean)
    source = image_input(model, clean)
    unions = concatenations(model, tensors)
    parts = [tensor for tensor in tensors if tensor not in unions]
    histograms = {tensor: Histogram(tensor) for tensor in tensors}
    with Ahead(images) as ahead:
        first = next(ahead, None)
        if first is None:
            raise CalibrationError(
                "there are no calibration images", expected="at least one", fix="check data.calibration"
            )
        _check_fits(source, first)
        plan = _observing_engine(model, parts, source, first[1].shape, config)
        with EngineRunner(trt, plan) as runner:
            for histogram in _collect(runner, parts, first, ahead):
                histograms[histogram.tensor] = histogram
    merge_concatenated(histograms, unions)
    return list(histograms.values())


def why_no_gpu_calibration() -> str:
    """Empty where ``gpu_histograms`` can run; otherwise one sentence why not."""
    try:
        _require()
    except PipelineError as error:
        return error.summary
    return ""


@dataclass(frozen=True)
class DeviceTensor:
    """Where ``size`` float32 values lie in GPU memory; ``address`` is a multiple of 16."""

    name: str
    address: int
    size: int


class DeviceHistograms(Closing):
    """Histograms of tensors, in GPU memory until ``results``; a context manager.

    Counts, ranges and results are those of ``Histogram`` for the same float32 values, in whatever order they come.

    Args:
        tensors: whose values ``add`` reads; their memory is the caller's.
        stream: that all work is enqueued on.

    Attributes:
        not_finite: uint64 (tensors,), how many NaN and infinite values each has had. Where one has had any, its
            histogram is no longer meaningful.

    Raises:
        UnsupportedError: no NVRTC, or a GPU that it has no code for.
        EngineError: out of GPU memory.
    """

    def __init__(self, tensors: Sequence[DeviceTensor], stream: cuda.Stream) -> None:
        self._tensors, self._stream = tuple(tensors), stream
        pieces = _pieces(tensors)
        states = np.zeros(len(tensors), STATES)
        states["low"], states["high"] = _ordered(np.inf), _ordered(-np.inf)
        states["exponent"] = SMALLEST_EXPONENT
        with ExitStack() as stack:
            module = stack.enter_context(nvrtc.Module(_code(cuda.current_device().compute_capability)))
            self._count = module.kernel("count", threads=THREADS, shared_bytes=SHARED_BYTES)
            self._grow = module.kernel("grow", threads=THREADS)
            self._count_rest = module.kernel("count_rest", threads=THREADS, shared_bytes=SHARED_BYTES)
            self._pieces, self._states, self._counts, self.not_finite = (
                stack.enter_context(cuda.DeviceBuffer(size))
                for size in (pieces.nbytes, states.nbytes, 8 * BINS * len(tensors), 8 * len(tensors))
            )
            self._blocks = len(pieces)
            self._pieces.upload(pieces, stream)
            self._states.upload(states, stream)
            self._counts.clear(stream)
            self.not_finite.clear(stream)
            stream.synchronize()
            self._held = stack.pop_all()

    def add(self) -> None:
        """Enqueue the counting of what the tensors hold when the stream comes to it."""
        pieces, states, counts = self._pieces.address, self._states.address, self._counts.address
        self._count.launch(self._blocks, (pieces, states, counts, self.not_finite.address), self._stream)
        self._grow.launch(len(self._tensors), (states, counts), self._stream)
        self._count_rest.launch(self._blocks, (pieces, states, counts), self._stream)

    def results(self) -> list[Histogram]:
        """The histograms, in the tensors' order; waits for the stream."""
        states = np.empty(len(self._tensors), STATES)
        counts = np.empty((len(self._tensors), BINS), np.int64)
        self._states.download(states, self._stream)
        self._counts.download(counts, self._stream)
        self._stream.synchronize()
        low, high = _unordered(states["low"]), _unordered(states["high"])
        return [
            Histogram.of(tensor.name, own.copy(), int(exponent), float(least), float(greatest))
            for tensor, own, exponent, least, greatest in zip(
                self._tensors, counts, states["exponent"], low, high, strict=True
            )
        ]

    def close(self) -> None:
        """Free the GPU memory; the stream must have come to the end of what was enqueued."""
        self._held.close()


class _Slot:
    """Memory for one image on its way to the GPU, and for what its activations had of NaN and infinite values."""

    def __init__(self, array: NDArray[Any], tensors: Sequence[DeviceTensor]) -> None:
        self._tensors = tensors
        self._image: str | None = None
        with ExitStack() as stack:
            self._host = cuda.PinnedArray(array.shape, array.dtype)
            stack.callback(self._host.close)
            self._not_finite = cuda.PinnedArray((len(tensors),), np.uint64)
            stack.callback(self._not_finite.close)
            self._device = stack.enter_context(cuda.DeviceBuffer(array.nbytes))
            self._uploaded = cuda.Event()
            stack.callback(self._uploaded.close)
            self._done = cuda.Event()
            stack.callback(self._done.close)
            self._held = stack.pop_all()

    def close(self) -> None:
        self._held.close()

    def upload(self, named: Named, copies: cuda.Stream) -> None:
        """Start uploading an image; the one before it must be finished."""
        image, array = named
        expected = self._host.array
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            raise CalibrationError(
                f"the calibration image {image} differs in shape from those before it",
                expected=f"{expected.dtype} {expected.shape}",
                got=f"{array.dtype} {array.shape}",
                fix="use images of one size, or set preprocessing.resize",
            )
        np.copyto(expected, array)
        self._device.upload(expected, copies)
        self._uploaded.record(copies)
        self._image = image

    def count(self, runner: EngineRunner, source: cuda.DeviceBuffer, histograms: DeviceHistograms) -> None:
        """Enqueue the inference on the image, and the counting."""
        runner.stream.wait(self._uploaded)
        source.copy(self._device, runner.stream)
        runner.enqueue()
        histograms.add()
        histograms.not_finite.download(self._not_finite.array, runner.stream)
        self._done.record(runner.stream)

    def finish(self) -> None:
        """Wait for the image, where there is one.

        Raises:
            CalibrationError: its activations were not finite.
        """
        if self._image is None:
            return
        self._done.synchronize()
        found = self._not_finite.array
        for tensor, bad in zip(self._tensors, found.tolist(), strict=True):
            if bad:
                raise not_finite(tensor.name, bad, tensor.size, self._image)


def _require() -> Any:
    """The module ``tensorrt``, where all that is needed is here.

    Raises:
        UnsupportedError: what is missing, and what to install.
    """
    trt = tensorrt.api()
    device = cuda.current_device()
    if cuda.shared_memory() < SHARED_BYTES:
        raise UnsupportedError(
            f"the {device.name} has too little shared memory for histograms",
            expected=f"{SHARED_BYTES >> 10} KiB a block: compute capability 7.0 or newer",
            got=f"{cuda.shared_memory() >> 10} KiB, compute capability {device.compute_capability}",
            fix="use calibrate.calibrator: cpu",
        )
    nvrtc.version()
    return trt


@functools.cache
def _code(capability: str) -> bytes:
    defines = {"BINS": BINS, "LOG_BINS": EXPONENT_OF_BINS, "THREADS": THREADS}
    return nvrtc.compile_source(SOURCE.read_text(encoding="utf-8"), SOURCE.name, capability, defines)


def _check_fits(spec: TensorSpec, named: Named) -> None:
    image, array = named
    try:
        check_feeds((spec,), {spec.name: array})
    except ValueError as error:
        raise CalibrationError(
            f"the calibration image {image} does not fit the graph: {error}",
            fix="set preprocessing (resize, height, width, channels) to what the graph was exported for",
        ) from error


def _observing_engine(
    model: ModelProto, tensors: Sequence[str], source: TensorSpec, shape: tuple[int, ...], config: EngineConfig
) -> bytes:
    """An FP32 engine for inputs of one shape whose outputs are the tensors; the model's outputs are replaced."""
    import onnx_graphsurgeon as gs

    values = infer(model)
    for tensor in tensors:
        if element_type(values.get(tensor)) != TensorProto.FLOAT:
            raise UnsupportedError(
                f"tensor {tensor} is not float32, as calibration on the GPU needs it",
                expected="a float32 graph",
                fix="use calibrate.calibrator: cpu",
            )
    del model.graph.output[:]
    model.graph.output.extend(values[tensor] for tensor in tensors if tensor != source.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observed.onnx"
        # What leads to none of them goes: TensorRT takes the uint8 of labels only where they are an output.
        save_model(gs.export_onnx(gs.import_onnx(model).cleanup()), path)
        built = tensorrt.TensorrtBuilder().build(
            BuildRequest(
                path,
                "fp32",
                "explicit",
                config.model_copy(update={"optimization_level": OPTIMIZATION_LEVEL, "tf32": False}),
                profiles={source.name: Profile(shape, shape, shape)},
            )
        )
    log.info("built the engine that shows %d activations in %.1f s", len(tensors), built.seconds)
    return built.plan


def _collect(runner: EngineRunner, tensors: Sequence[str], first: Named, rest: Iterable[Named]) -> list[Histogram]:
    """Histograms of the engine's tensors over the images."""
    (source,) = runner.inputs
    buffers = runner.bind({source.name: first[1]})
    missing = [tensor for tensor in tensors if tensor not in buffers]
    if missing:
        raise EngineError(
            f"TensorRT gives no output for the tensors {', '.join(missing)}",
            expected="one output a tensor",
            fix="use calibrate.calibrator: cpu",
        )
    places = [DeviceTensor(tensor, buffers[tensor].address, buffers[tensor].size // 4) for tensor in tensors]
    with ExitStack() as stack:
        histograms = stack.enter_context(DeviceHistograms(places, runner.stream))
        copies = cuda.Stream()
        stack.callback(copies.close)
        slots: deque[_Slot] = deque()
        for _ in range(SLOTS):
            slots.append(_Slot(first[1], places))
            stack.callback(slots[-1].close)
        stack.callback(_settle, (copies, runner.stream))
        for named in itertools.chain([first], rest):
            slots[0].finish()
            slots[0].upload(named, copies)
            slots[0].count(runner, buffers[source.name], histograms)
            slots.rotate(-1)
        for slot in slots:
            slot.finish()
        return histograms.results()


def _settle(streams: Iterable[cuda.Stream]) -> None:
    """Wait for the streams, so that the memory they work on can be freed; a failure has shown itself elsewhere."""
    for stream in streams:
        with contextlib.suppress(PipelineError):
            stream.synchronize()


def _pieces(tensors: Sequence[DeviceTensor]) -> NDArray[Any]:
    """The tensors in runs of at most ``PIECE`` values: (pieces,) of ``PIECES``."""
    return np.array(
        [
            (tensor.address + 4 * start, min(PIECE, tensor.size - start), index)
            for index, tensor in enumerate(tensors)
            for start in range(0, tensor.size, PIECE)
        ],
        PIECES,
    )


def _ordered(value: float) -> int:
    """The key of a float32 that the kernels' atomics compare."""
    bits = int(np.float32(value).view(np.uint32))
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def _unordered(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The float32 values of keys."""
    high = np.uint32(0x80000000)
    return np.where(keys & high, keys ^ high, ~keys).astype(np.uint32).view(np.float32)
