"""Batches on their way through a model: several at a time where it is an engine or served, each with its own memory."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import TensorSpec
from pipeline.backends import cuda
from pipeline.backends.base import Runner
from pipeline.backends.remote import RemoteRunner
from pipeline.backends.runner import EngineRunner
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)


class Lane(Protocol):
    """The way of one batch at a time through a model of one input and one output; one thread's at a time."""

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Where the next batch goes: C-contiguous, of the input's dtype, uninitialised. The one before is finished.

        Raises:
            EngineError, ValueError: the model does not take the shape; out of GPU memory.
        """
        ...

    def start(self) -> None:
        """Send the batch off.

        Raises:
            ModelError, EngineError, ValueError: as calling the runner does.
        """
        ...

    def finish(self) -> NDArray[Any]:
        """Wait for the batch: the output, whose memory is the lane's and holds it until ``memory`` is called again."""
        ...

    def settle(self) -> None:
        """Wait until nothing is under way, whatever went wrong."""
        ...

    def close(self) -> None: ...


class HostLane:
    """Runs the model, ONNX Runtime's, when it is started; the runner is closed with it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        (self._source,), (self._result,) = runner.inputs, runner.outputs
        self._batch: NDArray[Any] = np.empty(0, np.dtype(self._source.dtype))
        self._output: NDArray[Any] = self._batch

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        if self._batch.shape != shape:
            self._batch = np.empty(shape, self._batch.dtype)
        return self._batch

    def start(self) -> None:
        self._output = self._runner({self._source.name: self._batch})[self._result.name]

    def finish(self) -> NDArray[Any]:
        return self._output

    def settle(self) -> None: ...

    def close(self) -> None:
        self._runner.close()


class RemoteLane(HostLane):
    """A connection to an inference server; closed with it."""

    def __init__(self, runner: RemoteRunner) -> None:
        super().__init__(runner)
        self._remote = runner
        self._answer: Future[dict[str, NDArray[Any]]] | None = None

    def start(self) -> None:
        self._answer = self._remote.submit({self._source.name: self._batch})

    def finish(self) -> NDArray[Any]:
        assert self._answer is not None
        return self._answer.result()[self._result.name]

    def settle(self) -> None:
        if self._answer is not None:
            wait([self._answer])


class EngineLane:
    """An execution context with its stream, GPU memory and pinned memory; the runner is closed with it.

    Upload, inference and download follow one another on the stream without the host. From the second batch of a shape
    on they are one CUDA graph, where the engine can be captured; after it nothing is allocated.
    """

    _batch: NDArray[Any]
    _output: NDArray[Any]
    _input: cuda.DeviceBuffer
    _answer: cuda.DeviceBuffer

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner
        (self._source,), (self._result,) = runner.inputs, runner.outputs
        self._pinned: dict[str, cuda.PinnedArray] = {}
        self._shape: tuple[int, ...] | None = None
        self._runs = 0
        self._graph: cuda.Graph | None = None

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        if shape != self._shape:
            self._bind(shape)
        return self._batch

    def start(self) -> None:
        self._runs += 1
        if self._runs == 2:  # TensorRT finishes its set-up of a shape at the first run, which cannot be captured
            self._graph = self._runner.capture(self._enqueue)
        if self._graph is not None:
            self._graph.launch(self._runner.stream)
        else:
            self._enqueue()

    def finish(self) -> NDArray[Any]:
        self._runner.stream.synchronize()
        return self._output

    def settle(self) -> None:
        with contextlib.suppress(PipelineError):  # it has shown itself where it arose
            self._runner.stream.synchronize()

    def close(self) -> None:
        self._drop_graph()
        for memory in self._pinned.values():
            memory.close()
        self._pinned = {}
        self._runner.close()

    def _bind(self, shape: tuple[int, ...]) -> None:
        self._shape = None
        self._drop_graph()
        self._batch = self._host(self._source, shape)
        buffers = self._runner.bind({self._source.name: self._batch})
        self._input, self._answer = buffers[self._source.name], buffers[self._result.name]
        self._output = self._host(self._result, self._runner.shape(self._result.name))
        self._shape, self._runs = shape, 0

    def _host(self, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
        """Pinned memory of a tensor, which grows where it is too small and never shrinks."""
        size = math.prod(shape) * np.dtype(spec.dtype).itemsize
        held = self._pinned.get(spec.name)
        if held is None or held.array.size < size:
            if held is not None:
                del self._pinned[spec.name]
                held.close()
            self._pinned[spec.name] = held = cuda.PinnedArray((size,), np.uint8)
        return held.array[:size].view(spec.dtype).reshape(shape)

    def _enqueue(self) -> None:
        self._input.upload(self._batch, self._runner.stream)
        self._runner.enqueue()
        self._answer.download(self._output, self._runner.stream)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None


class Lanes:
    """The lanes of one model, lent to threads. The first is there at once, others are made when they are wanted.

    Args:
        runner: of one input and one output; closed with the lanes.
        most: lanes of an engine or a served model. Other models have one.

    Attributes:
        most: lanes there will be, fewer than wanted once the GPU's memory has not sufficed.
    """

    def __init__(self, runner: Runner, most: int) -> None:
        self._changed = threading.Condition()
        self._runner = runner
        self._is_open = True
        self._free: list[Lane] = [_lane(runner)]
        self._count, self.most = 1, most if isinstance(runner, (EngineRunner, RemoteRunner)) else 1

    def take(self, *, wait: bool) -> Lane | None:
        """A lane, until it is given back; None where all are lent and the thread does not want to wait.

        A thread that holds a lane must not wait for another: those that it waits for may wait for its own.

        Raises:
            ValueError: closed.
        """
        with self._changed:
            while self._is_open:
                if self._free:
                    return self._free.pop()
                if self._count < self.most:
                    self._add()
                elif wait:
                    self._changed.wait()
                else:
                    return None
        raise ValueError("the predictor is closed")

    def give(self, lane: Lane) -> None:
        """Take a lane back."""
        with self._changed:
            if self._is_open:
                self._free.append(lane)
                self._changed.notify()
                return
        lane.close()

    def close(self) -> None:
        """Release everything; lanes that are lent go when they are given back. Calling it again does nothing."""
        with self._changed:
            self._is_open = False
            free, self._free = self._free, []
            self._changed.notify_all()
        with ExitStack() as stack:
            for lane in free:
                stack.callback(lane.close)

    def _add(self) -> None:
        assert isinstance(self._runner, (EngineRunner, RemoteRunner))
        try:
            self._free.append(_lane(self._runner.twin()))
            self._count += 1
        except PipelineError as error:
            self.most = self._count
            log.info("no more than %d batches at a time: %s", self._count, error.problem)


def _lane(runner: Runner) -> Lane:
    if isinstance(runner, EngineRunner):
        return EngineLane(runner)
    return RemoteLane(runner) if isinstance(runner, RemoteRunner) else HostLane(runner)
