"""Models that can be timed beside one another, whatever runs them and wherever."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends import cuda
from pipeline.backends.base import Arrays, Runner
from pipeline.closing import Closing
from pipeline.errors import PipelineError
from pipeline.metrics.clock import host_milliseconds


class GpuRunner(Runner, Protocol):
    """A runner whose work on the GPU is timed there."""

    captured: bool
    profiles: dict[str, Profile]

    def device_milliseconds(self, feeds: Arrays, seconds: float, warmup_seconds: float) -> NDArray[np.float64]: ...

    def transfer_milliseconds(self, feeds: Arrays) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


class Contender(Closing):
    """A loaded model of one input.

    Attributes:
        source: its input.
        ran: what runs it, and where.
        on_gpu: whether that is a GPU: then ``gpu_milliseconds`` and ``transfers`` can be called.
        captured: whether the last timing on the GPU replayed a CUDA graph of ours.
        gpu_bytes: GPU memory that it takes, CUDA's context not counted; known after ``transfers``, None where unknown.
    """

    source: TensorSpec
    ran: str
    on_gpu: bool = False
    captured: bool = False
    gpu_bytes: int | None = None

    @abstractmethod
    def feed(self, batch: NDArray[Any]) -> NDArray[Any]:
        """Take this input from now on: what the first inference gives, of several outputs the first.

        Raises:
            PipelineError: it cannot.
        """

    @abstractmethod
    def host_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        """Of every whole inference, from host array to host array, by the host's clock: float64 (n,)."""

    def gpu_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        """Of every inference on the GPU alone, by CUDA events: float64 (n,)."""
        raise NotImplementedError

    def transfers(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Milliseconds of copying the input to the GPU, and the output back, by CUDA events; pageable memory."""
        raise NotImplementedError

    def takes(self, batch: int) -> bool:
        """Whether it can be fed so many images at once."""
        return self.source.shape[0] == batch or isinstance(self.source.shape[0], str)

    def at(self, batch: int) -> TensorSpec:
        """Its input, for so many images at once."""
        return replace(self.source, shape=(batch, *self.source.shape[1:]))


class HostContender(Contender):
    """A model in this process that works on the CPU."""

    def __init__(self, runner: Runner, ran: str) -> None:
        self.runner, self.ran = runner, ran
        (self.source,) = runner.inputs
        self._result = runner.outputs[0]
        self._fed: Arrays = {}

    def feed(self, batch: NDArray[Any]) -> NDArray[Any]:
        self._fed = {self.source.name: batch}
        return self.runner(self._fed)[self._result.name]

    def host_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        return host_milliseconds(lambda: self.runner(self._fed), seconds, warmup_seconds)

    def close(self) -> None:
        self.runner.close()


class GpuContender(HostContender):
    """A model in this process that works on the GPU; ``opens`` loads it."""

    runner: GpuRunner
    on_gpu = True

    def __init__(self, opens: Callable[[], GpuRunner], ran: str) -> None:
        self._free = _free()
        super().__init__(opens(), ran)

    @property
    def fed(self) -> Arrays:
        """What it was fed last, by input."""
        return self._fed

    def gpu_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        times = self.runner.device_milliseconds(self._fed, seconds, warmup_seconds)
        self.captured = self.runner.captured
        return times

    def feed(self, batch: NDArray[Any]) -> NDArray[Any]:
        output = super().feed(batch)
        left = _free()
        if self.gpu_bytes is None and self._free is not None and left is not None:
            self.gpu_bytes = max(0, self._free - left)
        return output

    def transfers(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.runner.transfer_milliseconds(self._fed)

    def takes(self, batch: int) -> bool:
        profile = self.runner.profiles.get(self.source.name)
        return super().takes(batch) and (profile is None or profile.min[0] <= batch <= profile.max[0])


def _free() -> int | None:
    try:
        return cuda.free_memory()[0]
    except PipelineError:
        return None
