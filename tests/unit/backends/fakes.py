"""A GPU made of host memory, and an engine made of numpy: what EngineRunner needs, without CUDA or TensorRT."""

from __future__ import annotations

import ctypes
from collections import Counter
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import Device
from pipeline.backends import cuda
from pipeline.errors import EngineError

DEVICE = Device("Fake GPU", "8.6", "550.1")


class FakeCuda:
    """Stands in for ``cuda.call``; ``calls`` counts the functions, ``live`` holds the memory not yet freed."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.live: dict[int, Any] = {}
        self.clock = 0.0
        self.capturing = False
        self.refuse_capture = False
        self.memory_left = 1 << 30

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        names = SimpleNamespace(
            cudaStreamNonBlocking=1,
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
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

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    def cudaEventCreate(self) -> SimpleNamespace:
        return SimpleNamespace(time=0.0)

    def cudaEventRecord(self, event: SimpleNamespace, stream: Any) -> None:
        event.time = self.clock

    def cudaEventElapsedTime(self, start: SimpleNamespace, end: SimpleNamespace) -> float:
        return end.time - start.time

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> None:
        self.capturing = True

    def cudaStreamEndCapture(self, stream: Any) -> int:
        self.capturing = False
        if self.refuse_capture:
            raise EngineError("CUDA failed: cudaStreamEndCapture returned cudaErrorStreamCaptureInvalidated")
        return 8

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> None:
        self.clock += 2.0


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class FakeContext:
    """Doubles ``x`` (n, 2), n from 1 to 4, into ``y``."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = (-1, 2)
        self.fails = False
        self.profiler: Any = None
        self.created = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        if not self.gpu.capturing:
            self.gpu.clock += 3.0
            count = int(np.prod(self.shape))
            source = (ctypes.c_float * count).from_address(self.addresses["x"])
            target = (ctypes.c_float * count).from_address(self.addresses["y"])
            target[:] = [2 * value for value in source]
            if self.profiler is not None:
                self.profiler.report_layer_time("double\x1e + relu", 2.0)
                self.profiler.report_layer_time("copy", 0.5)
        return True


def fake_trt(gpu: FakeCuda, *, loads: bool = True) -> Any:
    """The API module of a library whose every engine is the doubling one."""
    context = FakeContext(gpu)

    class ILogger:
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

    class IProfiler:
        pass

    def create_context() -> FakeContext:
        context.profiler = None
        context.addresses.clear()
        context.created += 1
        return context

    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: "xy"[index],
        get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"),
        get_tensor_location=lambda name: "DEVICE",
        get_tensor_shape=lambda name: (-1, 2),
        get_tensor_mode=lambda name: Mode.INPUT if name == "x" else Mode.OUTPUT,
        get_tensor_profile_shape=lambda name, index: [(1, 2), (2, 2), (4, 2)],
        create_execution_context=create_context,
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
        context=context,
    )

    def deserialize(plan: bytes) -> Any:
        from pipeline.backends.trt_api import logger

        if not loads:
            logger(api).log(ILogger.ERROR, "magic tag does not match")
        return engine if loads else None

    api.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
    return api
