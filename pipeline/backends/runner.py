"""Running engines of TensorRT and TensorRT-RTX: host arrays in, host arrays out, and GPU times."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends import cuda
from pipeline.backends.base import Arrays, check_feeds
from pipeline.backends.layers import printable
from pipeline.backends.trt_api import DTYPES, collected, errors_of, logger, named_shape
from pipeline.closing import Closing
from pipeline.errors import EngineError, PipelineError
from pipeline.metrics.clock import gpu_milliseconds, gpu_spans

log = logging.getLogger(__name__)


class EngineRunner(Closing):
    """A deserialized engine with its GPU memory; a context manager, not thread-safe.

    GPU memory is allocated at the first inference of a shape, reused as long as shapes fit into it, and freed by
    ``close``.

    Args:
        trt: the API module, ``tensorrt`` or ``tensorrt_rtx``.
        plan: a serialized engine. Deserialising executes what is in it: load only what you trust.
        axes: names of dynamic axes by tensor, as the manifest has them; default: ``<tensor>_<axis>``.
        host_code: let the engine run code of its own on the host, which version-compatible ones need.

    Attributes:
        inputs, outputs: of the engine.
        profiles: shapes that each dynamic input accepts.
        captured: whether the last timing replayed a CUDA graph.

    Raises:
        UnsupportedError: no GPU, or none that this library supports.
        EngineError: not an engine of this library and version, or out of GPU memory.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        *,
        axes: dict[str, tuple[int | str, ...]] | None = None,
        host_code: bool = False,
    ) -> None:
        self.trt = trt
        self.captured = False
        self._buffers: dict[str, cuda.DeviceBuffer] = {}
        self._bound: tuple[tuple[int, ...], ...] | None = None
        self._device = cuda.current_device()
        self._axes, self._host_code = axes or {}, host_code
        with collected(trt) as messages:
            self._runtime, self._engine, self._context = self._load(plan, host_code)
        if self._context is None:
            reasons = "; ".join(errors_of(messages)) or "it gave no reason"
            raise EngineError(
                f"{trt.__name__} {trt.__version__} cannot load the engine on this GPU "
                f"({self._device.name}, compute capability {self._device.compute_capability}): {reasons}",
                fix="build it again on this machine with this TensorRT",
            )
        self.inputs, self.outputs = self._specs(self._axes)
        self.profiles = {
            spec.name: Profile(*(tuple(shape) for shape in self._engine.get_tensor_profile_shape(spec.name, 0)))
            for spec in self.inputs
            if any(isinstance(size, str) for size in spec.shape)
        }
        self._stream = cuda.Stream()

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """One inference; the returned arrays are the caller's.

        Raises:
            EngineError: a shape outside of the profile, a failed execution, out of GPU memory.
            ValueError: names, ranks, fixed sizes or dtypes that do not match the inputs.
        """
        self._prepare(feeds)
        held = self._upload(feeds)
        self.enqueue()
        results = {spec.name: np.empty(self.shape(spec.name), np.dtype(spec.dtype)) for spec in self.outputs}
        for name, array in results.items():
            self._buffers[name].download(array, self._stream)
        self._stream.synchronize()
        del held
        return results

    @property
    def stream(self) -> cuda.Stream:
        """The one that inferences run on."""
        return self._stream

    def twin(self) -> EngineRunner:
        """Another runner, whose inferences run beside this one's: with a context, a stream and memory of its own.

        They share the engine, but for free sizes: contexts of one engine cannot have one profile at the same time
        before TensorRT 10.

        Raises:
            EngineError: out of GPU memory.
        """
        if self._context is None:
            raise ValueError("the runner is closed")
        if self.profiles:
            plan = bytes(self._engine.serialize())
            return EngineRunner(self.trt, plan, axes=self._axes, host_code=self._host_code)
        twin = copy.copy(self)
        twin._buffers = {}
        twin._renew_context()
        twin._stream = cuda.Stream()
        return twin

    def bind(self, feeds: Arrays) -> dict[str, cuda.DeviceBuffer]:
        """The GPU memory of every input and output, for feeds of these shapes; it belongs to the runner.

        For work that stays on the GPU: in order of ``stream``, fill the inputs' memory, ``enqueue``, read the outputs'.

        Raises:
            EngineError, ValueError: as calling the runner does.
        """
        self._prepare(feeds)
        return dict(self._buffers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output, for the feeds bound last."""
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self) -> None:
        """Start one inference on what the inputs' memory holds.

        Raises:
            EngineError: TensorRT does not start it.
        """
        with collected(self.trt) as messages:
            done = self._context.execute_async_v3(int(self._stream))
        if not done:
            raise EngineError(
                f"the engine failed to run: {'; '.join(errors_of(messages)) or 'TensorRT gave no reason'}",
                fix="free GPU memory, or build the engine again on this machine",
            )

    def capture(self, enqueue: Callable[[], None]) -> cuda.Graph | None:
        """What a function enqueues on ``stream``, this runner's inferences among it, as a CUDA graph; it does not run.

        There has to have been an inference of the bound shapes, and the graph is good until others are bound. None
        where the engine cannot be captured.
        """
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(self._stream)):
            return None
        try:
            with cuda.capture(self._stream) as graphs:
                enqueue()
        except PipelineError as error:
            log.info("going on without a CUDA graph: %s", error.problem)
            self._stream.synchronize()
            return None
        return graphs[0]

    def device_milliseconds(self, feeds: Arrays, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        """GPU time of each inference, by CUDA events around it; no copies are timed.

        Inferences follow one another without waiting for the host, replayed from a CUDA graph where the engine can be
        captured (``captured`` says so).

        Args:
            seconds: host time to measure for, after warming up; at least one inference is measured.
            warmup_seconds: host time to run before.

        Returns:
            float64 array of milliseconds, one per inference, in order.
        """
        self._prepare(feeds)
        held = self._upload(feeds)
        self.enqueue()  # TensorRT finishes its set-up at the first execution, which cannot be captured
        self._stream.synchronize()
        del held
        graph = self.capture(self.enqueue)
        self.captured = graph is not None
        try:
            clock = cuda.StreamClock(self._stream)
            return gpu_milliseconds(clock, lambda: self._launch(graph), seconds, warmup_seconds)
        finally:
            if graph is not None:
                graph.close()

    def transfer_milliseconds(
        self, feeds: Arrays, repeats: int = 20
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """GPU times of copying all inputs to the GPU, and all outputs back, from and to pageable memory.

        Returns:
            Two float64 arrays of ``repeats`` milliseconds: host to device, device to host.
        """
        results = self(feeds)

        def download() -> None:
            for name, array in results.items():
                self._buffers[name].download(array, self._stream)

        up, down = gpu_spans(cuda.StreamClock(self._stream), [lambda: self._upload(feeds), download], repeats)
        return up, down

    def profile(self, feeds: Arrays, runs: int = 50) -> dict[str, float]:
        """Mean GPU milliseconds of every layer by name, over ``runs`` inferences after one that is not counted.

        The GPU waits between layers and no CUDA graph is used: together they take longer than a whole inference.

        Raises:
            EngineError: a failed execution, or no layer reported.
        """
        self(feeds)
        profiler = _profiler(self.trt)
        self._context.profiler = profiler
        try:
            for _ in range(runs):
                self.enqueue()
                self._stream.synchronize()
        finally:
            self._renew_context()
        self._prepare(feeds)
        if not profiler.milliseconds:
            raise EngineError("the engine reports no layer's time", fix="build it again with this TensorRT")
        return {name: total / runs for name, total in profiler.milliseconds.items()}

    def layers(self) -> str:
        """What the engine consists of, as TensorRT's engine inspector tells it: JSON text.

        Sizes of dynamic axes are those of the last inference, and unknown before the first; TensorRT 8.6.0 does not
        tell them at all.
        """
        inspector = self._engine.create_engine_inspector()
        if self._bound is not None:
            inspector.execution_context = self._context
        text = str(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))
        # TensorRT 8.6.0 leaves control characters in layer names, which no JSON parser takes.
        return "".join(character for character in text if character >= " " or character == "\n")

    def close(self) -> None:
        """Free all GPU memory; the runner cannot be used afterwards. Calling it again does nothing."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers = {}
        if self._context is not None:
            self._stream.close()
        # The context must go before its engine, and the engine before its runtime.
        self._context = None
        self._engine = None
        self._runtime = None

    def _load(self, plan: bytes, host_code: bool) -> tuple[Any, Any, Any]:
        bridge = logger(self.trt)
        if hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(bridge, "")
        try:
            runtime = self.trt.Runtime(bridge)
        except TypeError:  # pybind11's way of saying that the factory returned nothing
            return None, None, None
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        return runtime, engine, engine.create_execution_context() if engine is not None else None

    def _renew_context(self) -> None:
        """A context without the profiler, which would forbid CUDA graphs; the old one first gives its profile back."""
        self._context = None
        self._bound = None
        with collected(self.trt) as messages:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            reasons = "; ".join(errors_of(messages)) or "it gave no reason"
            raise EngineError(f"TensorRT cannot set the engine up again: {reasons}", fix="free GPU memory")
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.address)

    def _specs(self, axes: dict[str, tuple[int | str, ...]]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            kind = self._engine.get_tensor_dtype(name).name
            if self._engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE or kind not in DTYPES:
                raise EngineError(
                    f"tensor {name} of the engine is a {kind} shape tensor, which this runner does not feed",
                    expected="image-like inputs and outputs",
                    fix="clean the model, which folds shape arithmetic, and build again",
                )
            shape = named_shape(name, tuple(self._engine.get_tensor_shape(name)), axes.get(name, ()))
            is_input = self._engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            (inputs if is_input else outputs).append(TensorSpec(name, shape, DTYPES[kind]))
        return tuple(inputs), tuple(outputs)

    def _prepare(self, feeds: Arrays) -> None:
        """Tell the context the shapes of the feeds, and see to it that every tensor has memory."""
        if self._context is None:
            raise ValueError("the runner is closed")
        check_feeds(self.inputs, feeds)
        shapes = tuple(feeds[spec.name].shape for spec in self.inputs)
        if shapes == self._bound:
            return
        self._bound = None
        for spec, shape in zip(self.inputs, shapes, strict=True):
            self._in_profile(spec.name, shape)
            with collected(self.trt) as messages:
                accepted = self._context.set_input_shape(spec.name, shape)
            if not accepted:
                raise EngineError(f"the engine refuses shape {shape} of {spec.name}: {'; '.join(errors_of(messages))}")
        for spec in (*self.inputs, *self.outputs):
            shape = self._shape(spec.name, shapes)
            if any(size < 0 for size in shape):
                raise EngineError(
                    f"the shape of tensor {spec.name} depends on its data",
                    expected="outputs whose shapes follow from the inputs' shapes",
                    got=str(shape),
                    fix="change the network",
                )
            self._allocate(spec.name, math.prod(shape) * np.dtype(spec.dtype).itemsize)
        self._bound = shapes

    def _shape(self, name: str, fed: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        with collected(self.trt) as messages:
            dims = self._context.get_tensor_shape(name)
            try:
                return tuple(dims)
            except ValueError as error:  # -1 dimensions: TensorRT's way of saying that no shape follows
                raise EngineError(
                    f"the engine finds no shape for tensor {name}: {'; '.join(errors_of(messages))}",
                    got=f"inputs of shape {', '.join(map(str, fed))}",
                    fix="use sizes that the network can take; axes of one name have to be equal",
                ) from error

    def _in_profile(self, name: str, shape: tuple[int, ...]) -> None:
        profile = self.profiles.get(name)
        if profile is None:
            return
        if any(not low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True)):
            raise EngineError(
                f"input {name} has a shape that the engine was not built for",
                expected=f"{profile.min} to {profile.max}",
                got=str(shape),
                fix="use sizes within the profile, or widen engine.profile and build again",
            )

    def _allocate(self, name: str, size: int) -> None:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            if buffer is not None:
                del self._buffers[name]
                buffer.close()
            self._buffers[name] = buffer = cuda.DeviceBuffer(size)
            if not self._context.set_tensor_address(name, buffer.address):
                raise EngineError(f"the engine refuses the memory of tensor {name}")

    def _upload(self, feeds: Arrays) -> list[NDArray[Any]]:
        """Start copying; the arrays returned must live until the stream is synchronized."""
        held = [np.ascontiguousarray(feeds[spec.name]) for spec in self.inputs]
        for spec, array in zip(self.inputs, held, strict=True):
            self._buffers[spec.name].upload(array, self._stream)
        return held

    def _launch(self, graph: cuda.Graph | None) -> None:
        if graph is not None:
            graph.launch(self._stream)
        else:
            self.enqueue()


def _profiler(trt: Any) -> Any:
    """An IProfiler of the library that adds up ``milliseconds`` by layer."""
    base: Any = trt.IProfiler

    class Times(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.milliseconds: dict[str, float] = defaultdict(float)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds[printable(layer_name)] += ms

    return Times()
