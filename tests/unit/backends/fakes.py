"""A GPU made of host memory, and an engine made of numpy: what EngineRunner needs, without CUDA or TensorRT."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import Device, EngineManifest, TensorSpec, sha256_bytes
from pipeline.backends import cuda
from pipeline.backends.trt_api import DTYPES
from pipeline.errors import EngineError

DEVICE = Device("Fake GPU", "8.6", "550.1")
PLAN = b"plan"


def plan_manifest(**changes: Any) -> EngineManifest:
    """Of ``PLAN``, an engine built on the fake GPU with the fake library."""
    fields: dict[str, Any] = {
        "engine_sha256": sha256_bytes(PLAN),
        "onnx_sha256": "0" * 64,
        "cache_sha256": None,
        "precision": "fp16",
        "route": "implicit",
        "backend": "tensorrt",
        "backend_version": "1.2.3",
        "device": DEVICE,
        "target_capabilities": (),
        "inputs": (TensorSpec("x", ("batch", 2), "float32"),),
        "outputs": (TensorSpec("y", ("batch", 2), "float32"),),
        "profiles": {},
        "card": None,
        "build_seconds": 1.0,
        "timing_cache": "none",
        "created": "2026-11-21T00:00:00+00:00",
    }
    return EngineManifest(**{**fields, **changes})


class FakeCuda:
    """Stands in for ``cuda.call``; ``calls`` counts the functions, ``live`` holds the memory not yet freed."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.live: dict[int, Any] = {}
        self.clock = 0.0
        self.own = threading.local()  # a capture is a thread's own
        self.refuse_capture = False
        self.memory_left = 1 << 30

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        names = SimpleNamespace(
            cudaStreamNonBlocking=1,
            cudaEventBlockingSync=1,
            cudaEventDisableTiming=2,
            cudaMemcpyKind=SimpleNamespace(
                cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
            ),
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        )
        patch.setattr(cuda, "_runtime", lambda: names)
        patch.setattr(cuda, "call", self)
        patch.setattr(cuda, "current_device", lambda: DEVICE)
        return self

    def __call__(self, function: str, *arguments: Any) -> Any:
        self.calls[function] += 1
        return getattr(self, function, lambda *_: 7)(*arguments)

    def cudaMalloc(self, size: int) -> int:
        if size > self.memory_left:
            raise EngineError("the GPU is out of memory")
        block = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaFree(self, address: int) -> None:
        del self.live[address]

    def cudaMallocHost(self, size: int) -> int:
        return self.cudaMalloc(size)

    def cudaFreeHost(self, address: int) -> None:
        self.cudaFree(address)

    @property
    def capturing(self) -> bool:
        return getattr(self.own, "capturing", False)

    def run(self, work: Callable[[], Any]) -> None:
        """At once, or whenever the graph that is being captured is launched."""
        if self.capturing:
            self.own.captured.append(work)
        else:
            work()

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Any) -> None:
        self.run(lambda: ctypes.memmove(target, source, size))

    def cudaEventCreateWithFlags(self, flags: int) -> SimpleNamespace:
        return SimpleNamespace(time=0.0)

    def cudaEventRecord(self, event: SimpleNamespace, stream: Any) -> None:
        event.time = self.clock

    def cudaEventElapsedTime(self, start: SimpleNamespace, end: SimpleNamespace) -> float:
        return end.time - start.time

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> None:
        self.own.capturing, self.own.captured = True, []

    def cudaStreamEndCapture(self, stream: Any) -> list[Callable[[], Any]]:
        self.own.capturing = False
        if self.refuse_capture:
            raise EngineError("CUDA failed: cudaStreamEndCapture returned cudaErrorStreamCaptureInvalidated")
        return self.own.captured

    def cudaGraphInstantiate(self, captured: Any, flags: int) -> Any:
        return captured

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> None:
        self.clock += 2.0
        for work in executable:
            work()


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


@dataclass(frozen=True)
class Network:
    """What an engine computes: of ``x``, whose free sizes are -1, ``y``; both of one dtype."""

    shape: tuple[int, ...]
    output: Callable[[tuple[int, ...]], tuple[int, ...]]
    compute: Callable[[NDArray[Any]], NDArray[Any]]
    kind: str = "FLOAT"
    profile: tuple[tuple[int, ...], ...] = ()


DOUBLING = Network((-1, 2), lambda shape: shape, lambda x: 2 * x, profile=((1, 2), (2, 2), (4, 2)))


class FakeContext:
    """Runs a network."""

    def __init__(self, gpu: FakeCuda, network: Network, created: int) -> None:
        self.gpu = gpu
        self.network = network
        self.addresses: dict[str, int] = {}
        self.shape = network.shape
        self.fails = False
        self.profiler: Any = None
        self.created = created

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == "x" else self.network.output(self.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        self.gpu.run(self._compute)
        if not self.gpu.capturing:
            self.gpu.clock += 3.0
            if self.profiler is not None:
                self.profiler.report_layer_time("double\x1e + relu", 2.0)
                self.profiler.report_layer_time("copy", 0.5)
        return True

    def _compute(self) -> None:
        dtype = np.dtype(DTYPES[self.network.kind])
        size = int(np.prod(self.shape)) * dtype.itemsize
        x = np.frombuffer(ctypes.string_at(self.addresses["x"], size), dtype).reshape(self.shape)
        with np.errstate(over="ignore"):
            y = np.ascontiguousarray(self.network.compute(x), dtype)
        assert y.shape == self.network.output(self.shape)
        ctypes.memmove(self.addresses["y"], y.ctypes.data, y.nbytes)


def fake_trt(gpu: FakeCuda, network: Network = DOUBLING, *, loads: bool = True) -> Any:
    """The API module of a library whose every engine is the one network; ``context`` is the one made last."""

    class ILogger:
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

    class IProfiler:
        pass

    def create_context() -> FakeContext:
        api.context = FakeContext(gpu, network, api.context.created + 1 if api.context else 1)
        return api.context

    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: "xy"[index],
        get_tensor_dtype=lambda name: SimpleNamespace(name=network.kind),
        get_tensor_location=lambda name: "DEVICE",
        get_tensor_shape=lambda name: network.shape if name == "x" else network.output(network.shape),
        get_tensor_mode=lambda name: Mode.INPUT if name == "x" else Mode.OUTPUT,
        get_tensor_profile_shape=lambda name, index: list(network.profile),
        create_execution_context=create_context,
        serialize=lambda: b"plan",
        create_engine_inspector=lambda: SimpleNamespace(
            get_engine_information=lambda kind: '{"Layers": ["double\x1e + relu", "copy"]}'
        ),
    )
    api = SimpleNamespace(
        __name__=f"fake_trt_{id(gpu)}",
        __version__="1.2.3",
        ILogger=ILogger,
        IProfiler=IProfiler,
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        TensorLocation=SimpleNamespace(DEVICE="DEVICE"),
        TensorIOMode=Mode,
        context=None,
    )

    def deserialize(plan: bytes) -> Any:
        from pipeline.backends.trt_api import logger

        if not loads:
            logger(api).log(ILogger.ERROR, "magic tag does not match")
        return engine if loads else None

    api.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
    return api


class Tensor:
    """An array of numpy's or torch's that says it lies on the fake GPU; ``streams`` are those of its consumers."""

    def __init__(self, values: Any, device: tuple[int, int] = (2, 7)) -> None:
        self.values, self.device = values, device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self.values.__dlpack__()
