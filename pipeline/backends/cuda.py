"""GPU memory, streams, events and graphs through cuda-python, and what GPU this machine has.

Nothing here touches CUDA before it is called; every status code is checked. Codes that mean "this machine cannot"
(no driver, no GPU, driver too old) become UnsupportedError, all others EngineError.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.artifacts import Device
from pipeline.closing import Closing
from pipeline.errors import EngineError, PipelineError, UnsupportedError

log = logging.getLogger(__name__)

UNSUPPORTED = {
    "cudaErrorInsufficientDriver",
    "cudaErrorNoDevice",
    "cudaErrorInvalidDevice",
    "cudaErrorInitializationError",
    "cudaErrorDevicesUnavailable",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorSystemNotReady",
    "cudaErrorCompatNotSupportedOnDevice",
    "cudaErrorStubLibrary",
    "cudaErrorOperatingSystem",
}
NVML_TEXT_BYTES = 96
PCI_TEXT_BYTES = 32


def current_device() -> Device:
    """The GPU that this process uses (CUDA's current device, the first visible one unless told otherwise).

    Raises:
        UnsupportedError: no cuda-python, no driver, a driver too old for cuda-python, or no GPU.
    """
    index = call("cudaGetDevice")
    major, minor = (
        call("cudaDeviceGetAttribute", getattr(_runtime().cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}"), index)
        for part in ("Major", "Minor")
    )
    name = call("cudaGetDeviceProperties", index).name
    return Device(
        name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
        compute_capability=f"{major}.{minor}",
        driver=driver_version(),
    )


def why_no_gpu() -> str:
    """One sentence and what to do about it; empty where a GPU can be used."""
    try:
        current_device()
    except PipelineError as error:
        return error.summary
    return ""


def driver_version() -> str:
    """The driver's own version such as "550.90.07"; where NVML is missing, the CUDA version it supports: "CUDA 12.4".

    Raises:
        UnsupportedError: no driver.
    """
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            try:
                text = ctypes.create_string_buffer(NVML_TEXT_BYTES)
                if nvml.nvmlSystemGetDriverVersion(text, NVML_TEXT_BYTES) == 0 and text.value:
                    return text.value.decode()
            finally:
                nvml.nvmlShutdown()
    return _cuda_of_driver()


def shared_memory() -> int:
    """Bytes of shared memory that one block of a kernel can have on this process's GPU, where it asks for them.

    Raises:
        UnsupportedError: no GPU.
    """
    attribute = _runtime().cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerBlockOptin
    return int(call("cudaDeviceGetAttribute", attribute, call("cudaGetDevice")))


def pci_address() -> bytes:
    """Where this process's GPU sits, as NVML finds it: such as b"0000:3b:00.0".

    Raises:
        UnsupportedError: no GPU.
    """
    text: bytes = call("cudaDeviceGetPCIBusId", PCI_TEXT_BYTES, call("cudaGetDevice"))
    return text.rstrip(b"\0")


def free_memory() -> tuple[int, int]:
    """Free and total bytes of the GPU."""
    free, total = call("cudaMemGetInfo")
    return int(free), int(total)


def out_of_memory() -> EngineError:
    """The error to raise where the GPU has too little memory."""
    return EngineError(
        "the GPU is out of memory", got=_memory(), fix="free GPU memory, or use a smaller batch or profile"
    )


def call(function: str, *arguments: Any) -> Any:
    """Call a CUDA runtime function by name: its value, a tuple of its values, or None.

    Raises:
        UnsupportedError, EngineError: by the status code it returns.
    """
    runtime = _runtime()
    try:
        status, *values = getattr(runtime, function)(*arguments)
    except RuntimeError as error:  # cuda-python raises, rather than returns, where it cannot load a library
        raise UnsupportedError(
            f"CUDA cannot be used: {error}", expected="an NVIDIA driver", fix="install one, or use another machine"
        ) from error
    if int(status):
        raise _error(function, str(getattr(status, "name", status)))
    return values[0] if len(values) == 1 else tuple(values) or None


def copy_within(target: int, source: int, size: int, stream: Stream) -> None:
    """Start copying ``size`` bytes from one address in GPU memory to another."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    call("cudaMemcpyAsync", target, source, size, kind, stream.handle)


class Stream:
    """A stream of its own, which does not wait for the default stream."""

    def __init__(self) -> None:
        self.handle: Any = call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """Let what is enqueued from now on wait for an event that another stream has recorded."""
        call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def follow(self, other: int) -> None:
        """Let what is enqueued from now on wait for what another stream, by its handle, has been given up to now."""
        event = Event()
        try:
            call("cudaEventRecord", event.handle, other)
            self.wait(event)
        finally:
            event.close()

    def close(self) -> None:
        if self.handle is not None:
            _release("cudaStreamDestroy", self.handle)
            self.handle = None


class Event:
    """A point in a stream, whose time the GPU records.

    Args:
        sleeps: threads that wait for it give their core to others, and wake up a little later; no time is recorded.
    """

    def __init__(self, *, sleeps: bool = False) -> None:
        runtime = _runtime()
        flags = runtime.cudaEventBlockingSync | runtime.cudaEventDisableTiming if sleeps else 0
        self.handle: Any = call("cudaEventCreateWithFlags", flags)

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the GPU has come to the point last recorded; at once where none was."""
        call("cudaEventSynchronize", self.handle)

    def milliseconds_since(self, start: Event) -> float:
        """GPU time between two recorded events; both must have completed (synchronize their stream first)."""
        return float(call("cudaEventElapsedTime", start.handle, self.handle))

    def close(self) -> None:
        if self.handle is not None:
            _release("cudaEventDestroy", self.handle)
            self.handle = None


class StreamClock:
    """A stream's events as ``pipeline.metrics.clock`` times work with them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def event(self) -> Event:
        return Event()

    def record(self, event: Event) -> None:
        event.record(self._stream)

    def between(self, before: Event, after: Event) -> float:
        return after.milliseconds_since(before)

    def wait(self) -> None:
        self._stream.synchronize()

    def close(self, event: Event) -> None:
        event.close()


class DeviceBuffer(Closing):
    """``size`` bytes of GPU memory, freed by ``close``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaMalloc", max(size, 1)))

    def upload(self, array: NDArray[Any], stream: Stream) -> None:
        """Start copying a C-contiguous host array to the GPU; it must live until the stream is synchronized."""
        self._fits(array)
        kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", self.address, array.ctypes.data, array.nbytes, kind, stream.handle)

    def download(self, array: NDArray[Any], stream: Stream) -> None:
        """Start copying into a C-contiguous host array, which is filled once the stream is synchronized."""
        self._fits(array)
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", array.ctypes.data, self.address, array.nbytes, kind, stream.handle)

    def copy(self, source: DeviceBuffer, stream: Stream) -> None:
        """Start copying all of another buffer, which is no larger."""
        if source.size > self.size:
            raise ValueError(f"needs a buffer of at most {self.size} bytes, got {source.size}")
        copy_within(self.address, source.address, source.size, stream)

    def clear(self, stream: Stream) -> None:
        """Start filling it with zero bytes."""
        call("cudaMemsetAsync", self.address, 0, self.size, stream.handle)

    def close(self) -> None:
        if self.address:
            _release("cudaFree", self.address)
            self.address = 0

    def _fits(self, array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous or array.nbytes > self.size:
            raise ValueError(f"needs a C-contiguous array of at most {self.size} bytes, got {array.nbytes}")


class PinnedArray:
    """Host memory that copies to and from the GPU without waiting for either; freed by ``close``.

    Attributes:
        array: C-contiguous, uninitialised; must not be used after ``close``.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        self._address = int(call("cudaMallocHost", max(size, 1)))
        memory = (ctypes.c_ubyte * size).from_address(self._address)
        self.array: NDArray[Any] = np.frombuffer(memoryview(memory), kind).reshape(shape)

    def close(self) -> None:
        if self._address:
            _release("cudaFreeHost", self._address)
            self._address = 0


class Graph:
    """Work captured from a stream, launched again as one."""

    def __init__(self, captured: Any) -> None:
        self._captured = captured
        self._executable = call("cudaGraphInstantiate", captured, 0)

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        if self._executable is not None:
            _release("cudaGraphExecDestroy", self._executable)
            _release("cudaGraphDestroy", self._captured)
            self._executable = None


@contextlib.contextmanager
def capture(stream: Stream) -> Iterator[list[Graph]]:
    """Capture what the block enqueues on the stream instead of running it; the list holds the graph afterwards.

    Raises:
        EngineError: the work cannot be captured; the stream is usable again.
    """
    graphs: list[Graph] = []
    call("cudaStreamBeginCapture", stream.handle, _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    try:
        yield graphs
    except BaseException:
        with contextlib.suppress(PipelineError):
            call("cudaStreamEndCapture", stream.handle)
        raise
    graphs.append(Graph(call("cudaStreamEndCapture", stream.handle)))


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnsupportedError(
            f"cuda-python cannot be imported: {error}",
            expected="cuda-python 12.6 or newer",
            fix="pip install 'cuda-python>=12.6'",
        ) from error
    return runtime


def _cuda_of_driver() -> str:
    number = int(call("cudaDriverGetVersion"))
    if number == 0:
        raise UnsupportedError(
            "this machine has no NVIDIA driver", expected="an NVIDIA GPU and its driver", fix="use a machine with a GPU"
        )
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _error(function: str, status: str) -> PipelineError:
    if status == "cudaErrorInsufficientDriver":
        # CUDA reports a missing driver with the same code; this call says so, or the version that is too old.
        supported = _cuda_of_driver()
        number = int(call("cudaRuntimeGetVersion"))
        needed = f"CUDA {number // 1000}.{number % 1000 // 10}"
        return UnsupportedError(
            f"the NVIDIA driver supports {supported}, cuda-python here needs {needed}",
            fix="update the driver, or install the cuda-python of the driver's major version",
        )
    if status in UNSUPPORTED:
        return UnsupportedError(
            f"this machine has no usable GPU ({function}: {status})",
            expected="an NVIDIA GPU that this process may use",
            fix="check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    if status == "cudaErrorMemoryAllocation":
        return out_of_memory()
    return EngineError(f"CUDA failed: {function} returned {status}", fix="see the log; run again with --debug")


def _memory() -> str:
    try:
        free, total = free_memory()
    except PipelineError:
        return ""
    return f"{free >> 20} MiB free of {total >> 20} MiB"


def _release(function: str, handle: Any) -> None:
    """Give back a resource; a failure is logged, as raising it would hide the error that led here."""
    try:
        call(function, handle)
    except PipelineError as error:
        log.warning("%s", error.problem)
