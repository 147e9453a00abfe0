"""ONNX Runtime's CUDA provider, timed on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.artifacts import Profile
from pipeline.backends import cuda
from pipeline.backends.base import Arrays
from pipeline.backends.onnxruntime import CPU, ORT_ERRORS, OnnxRuntimeRunner
from pipeline.errors import ModelError, UnsupportedError
from pipeline.metrics.clock import gpu_milliseconds, gpu_spans

PROVIDER, MEMORY = "CUDAExecutionProvider", "cuda"
TRANSFERS = 20


class CudaRunner(OnnxRuntimeRunner):
    """An ONNX graph in FP32 on ONNX Runtime's CUDA provider; a context manager, not thread-safe.

    Attributes:
        captured: False, as ONNX Runtime's own CUDA graphs are off.
        profiles: none; shapes are as free as the graph's.

    Raises:
        ModelError: ONNX Runtime cannot load the graph.
        UnsupportedError: this ONNX Runtime has no CUDA provider, or it does not start; there is no GPU.
    """

    captured = False

    def __init__(self, model: Path) -> None:
        if PROVIDER not in ort.get_available_providers():
            raise UnsupportedError(
                "this ONNX Runtime has no CUDA provider",
                expected=PROVIDER,
                got=", ".join(ort.get_available_providers()),
                fix="pip install onnxruntime-gpu in place of onnxruntime",
            )
        self.profiles: dict[str, Profile] = {}
        self._stream = cuda.Stream()
        options = {"user_compute_stream": str(int(self._stream)), "use_tf32": "0"}
        try:
            super().__init__(model, providers=[(PROVIDER, options), CPU])
            if self.session.get_providers()[0] != PROVIDER:  # it goes on without what does not start
                raise UnsupportedError(
                    "ONNX Runtime's CUDA provider does not start",
                    fix="install the CUDA and cuDNN that this onnxruntime-gpu wants",
                )
        except BaseException:
            self._stream.close()
            raise

    def device_milliseconds(self, feeds: Arrays, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        """GPU milliseconds of each inference by CUDA events on its stream, input and output staying on the GPU.

        ONNX Runtime launches kernel by kernel, and the host waits after every inference: time that the GPU waits for
        the host between kernels is counted, as a user of ONNX Runtime has it too.

        Returns:
            float64 (n,), in order.
        """
        with _Bound(self, feeds) as bound:
            return gpu_milliseconds(cuda.StreamClock(self._stream), bound.run, seconds, warmup_seconds)

    def transfer_milliseconds(self, feeds: Arrays) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """GPU milliseconds of copying the input to the GPU, and the output back; pageable memory."""
        with _Bound(self, feeds) as bound:
            steps: list[Callable[[], object]] = [bound.upload, bound.download]
            up, down = gpu_spans(cuda.StreamClock(self._stream), steps, TRANSFERS)
        return up, down

    def close(self) -> None:
        super().close()
        self._stream.close()


class _Bound:
    """One input and one output in GPU memory."""

    def __init__(self, runner: CudaRunner, feeds: Arrays) -> None:
        self._runner, self._stream = runner, runner._stream
        (source,), (result,) = runner.inputs, runner.outputs
        self._input = np.ascontiguousarray(feeds[source.name])
        self._output = runner(feeds)[result.name]
        self._binding: Any = runner.session.io_binding()
        self._buffers: list[cuda.DeviceBuffer] = []
        binds = [
            (source.name, self._input, self._binding.bind_input),
            (result.name, self._output, self._binding.bind_output),
        ]
        for name, array, bind in binds:
            buffer = cuda.DeviceBuffer(array.nbytes)
            self._buffers.append(buffer)
            bind(name, MEMORY, 0, array.dtype, array.shape, buffer.address)
        self.upload()
        self._stream.synchronize()

    def upload(self) -> None:
        self._buffers[0].upload(self._input, self._stream)

    def download(self) -> None:
        self._buffers[1].download(self._output, self._stream)

    def run(self) -> None:
        try:
            self._runner.session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise ModelError(f"ONNX Runtime cannot run the graph: {error}", fix="check the input sizes") from error

    def __enter__(self) -> _Bound:
        return self

    def __exit__(self, *exc: object) -> None:
        for buffer in self._buffers:
            buffer.close()
