"""A model that another process of this machine runs: arrays go there and back through memory that both see."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends.base import Arrays
from pipeline.closing import Closing
from pipeline.errors import ModelError

# What comes of every array of a batch, valid until the next; called on several threads.
Model = Callable[[Iterable[NDArray[Any]]], Generator[NDArray[Any], None, None]]


@dataclass(frozen=True)
class DistantModel:
    """What is known of the model: as a runner's attributes, and ``multiples`` and ``aligns_corners`` as in
    ``pipeline.facts.Facts``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: Mapping[str, Profile]
    multiples: Mapping[str, int]
    aligns_corners: bool


class SharedMemory(Closing):
    """Memory without a file name, which grows as it is needed and goes with the last process that has it.

    Args:
        descriptor: of what another process has made; default: new memory. Closed with this, or with its last reference.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            if not hasattr(os, "memfd_create"):  # Linux has it, but not every Python that was built for Linux
                raise OSError(errno.ENOSYS, "this Python has no os.memfd_create")
            descriptor = os.memfd_create("unet-trt")
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._map: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Its beginning as an array, which lives as long as it is held; one process at a time may ask for more.

        Raises:
            MemoryError: there is not so much.
        """
        count = int(np.prod(shape))
        size = max(1, count * np.dtype(dtype).itemsize)
        if self._map is None or len(self._map) < size:
            try:
                if os.fstat(self.descriptor).st_size < size:
                    os.ftruncate(self.descriptor, size)
                self._map = mmap.mmap(self.descriptor, size)
            except OSError as error:
                raise MemoryError(f"{size} bytes to share with another process: {error.strerror}") from error
        array: NDArray[Any] = np.frombuffer(self._map, dtype, count).reshape(shape)
        return array

    def close(self) -> None:
        self._close()


class DistantRunner(Closing):
    """Stands for the model where it is not (``pipeline.backends.base.Runner``); results are valid until the next call.

    Args:
        model: what is known of it.
        connection: to the process that runs it. Shape and dtype of each batch are sent, and those of the answer come
            back, or what went wrong.
        given, taken: memory of batches and answers.

    Raises, when it is called:
        ConnectionError: the other process has ended.
    """

    def __init__(self, model: DistantModel, connection: Connection, given: SharedMemory, taken: SharedMemory) -> None:
        self.model, self.inputs, self.outputs, self.profiles = model, model.inputs, model.outputs, model.profiles
        self._connection, self._given, self._taken = connection, given, taken

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        batch = feeds[self.inputs[0].name]
        self._given.array(batch.shape, batch.dtype.str)[...] = batch
        try:
            self._connection.send((batch.shape, batch.dtype.str))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ConnectionResetError("the process that runs the model has ended") from error
        if isinstance(answer, Exception):
            raise answer
        return {self.outputs[0].name: self._taken.array(*answer)}

    def close(self) -> None:
        """Nothing; the model is the other process's."""


def answer(connection: Connection, given: SharedMemory, taken: SharedMemory, model: Model) -> None:
    """Be the other process of a ``DistantRunner``: answer its batches until it sends None, or ends."""
    with contextlib.suppress(EOFError, OSError):
        while (batch := connection.recv()) is not None:
            try:
                told: Any = _told(model, given.array(*batch), taken)
            except Exception as error:  # raised where the batch came from
                told = _sendable(error)
            connection.send(told)


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ModelError(f"{type(error).__name__}: {error}")
    return error


def _told(model: Model, batch: NDArray[Any], taken: SharedMemory) -> tuple[tuple[int, ...], str]:
    kept: NDArray[Any] | None = None
    with contextlib.closing(model(batch)) as outputs:
        for index, output in enumerate(outputs):
            if kept is None:
                kept = taken.array((batch.shape[0], *output.shape), output.dtype.str)
            kept[index] = output
    assert kept is not None
    return kept.shape, kept.dtype.str
