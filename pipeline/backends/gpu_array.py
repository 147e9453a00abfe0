"""Arrays in GPU memory, shared with other libraries without a copy, by DLPack or the CUDA array interface.

Sources: DLPack's C API (https://dmlc.github.io/dlpack/latest/c_api.html), its use from Python
(https://data-apis.org/array-api/latest/design_topics/data_interchange.html), and version 3 of the CUDA array interface
(https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.backends import cuda
from pipeline.errors import DataError

Device = tuple[int, int]
CUDA, CUDA_MANAGED = 2, 13  # kDLCUDA and kDLCUDAManaged
CAPSULE = b"dltensor"
TYPES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class GpuArray:
    """A C-contiguous array in GPU memory, complete, which it frees when nothing refers to it any more.

    ``torch.from_dlpack``, ``torch.as_tensor``, ``cupy.from_dlpack``, ``cupy.asarray`` and their like take it without a
    copy; what they make of it keeps the memory.

    Args:
        buffer: filled already; it belongs to the array from now on.

    Attributes:
        shape, dtype: of the array.
        address: of its first element, in GPU memory.
    """

    def __init__(self, buffer: cuda.DeviceBuffer, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype, self.address = shape, np.dtype(dtype), buffer.address
        self._buffer = buffer
        self._device = CUDA, int(cuda.call("cudaGetDevice"))
        weakref.finalize(self, buffer.close).atexit = False  # the process gives all memory back when it ends

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**_interface(self), "stream": None}

    def __dlpack_device__(self) -> Device:
        """Kind and number of the device, as DLPack counts them."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: Device | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of an unversioned DLManagedTensor, which every consumer takes; no stream has to wait.

        Raises:
            BufferError: a copy, or another device, is asked for.
        """
        if copy or dl_device not in (None, self._device):
            raise BufferError(f"this array can be shared as it is on device {self._device}, and not copied")
        return _capsule(self, self._device)

    def numpy(self) -> NDArray[Any]:
        """A copy in the computer's own memory."""
        array = np.empty(self.shape, self.dtype)
        stream = cuda.Stream()
        try:
            self._buffer.download(array, stream)
            stream.synchronize()
        finally:
            stream.close()
        return array


@dataclass(frozen=True)
class GpuView:
    """Somebody's C-contiguous array in GPU memory.

    Attributes:
        address: of its first element.
        dtype: by numpy's name, such as "uint8".
        keeper: keeps the memory.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    keeper: object


def view(array: Any, stream: cuda.Stream) -> GpuView:
    """Somebody's array on this process's GPU; the stream waits for what is still being written to it.

    Args:
        array: has ``__dlpack__`` and ``__dlpack_device__``, or else ``__cuda_array_interface__``.

    Raises:
        DataError: it has neither, lies elsewhere, is not C-contiguous, or is not given away.
    """
    try:
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            kind, number = array.__dlpack_device__()
            here = int(cuda.call("cudaGetDevice"))
            if kind not in (CUDA, CUDA_MANAGED) or number != here:
                raise _refusal(
                    array, f"it is on DLPack's device {(int(kind), int(number))}, the engine on {(CUDA, here)}"
                )
            return _view_of_capsule(array.__dlpack__(stream=int(stream)), array)
        if hasattr(array, "__cuda_array_interface__"):
            return _view_of_interface(array.__cuda_array_interface__, array, stream)
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(array, str(error)) from error
    raise _refusal(array, "it has neither __dlpack__ nor __cuda_array_interface__")


class _Tensor(ctypes.Structure):
    """DLTensor, which a DLManagedTensor begins with."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device_number", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Host:
    """What numpy takes for an array in the computer's own memory, and keeps; its elements must never be touched."""

    def __init__(self, array: GpuArray) -> None:
        self.array = array
        self.__array_interface__ = _interface(array)


def _interface(array: GpuArray) -> dict[str, Any]:
    return {"shape": array.shape, "typestr": array.dtype.str, "data": (array.address, False), "version": 3}


def _capsule(array: GpuArray, device: Device) -> Any:
    # numpy makes the capsule, and the device is put right in it: a destructor has to work while an exception is on its
    # way and a deleter without the GIL, on any thread, at the very end of the process. numpy's do, being C.
    capsule = np.asarray(_Host(array)).__dlpack__()
    tensor = _tensor(capsule)
    tensor.device_kind, tensor.device_number = device
    return capsule


def _tensor(capsule: Any) -> _Tensor:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return _Tensor.from_address(pointer(capsule, CAPSULE))


def _view_of_capsule(capsule: Any, array: Any) -> GpuView:
    """The capsule is borrowed, not consumed: as long as the view keeps it, it keeps the memory."""
    tensor = _tensor(capsule)
    shape = tuple(tensor.shape[: tensor.dimensions])
    if tensor.strides and not _is_contiguous(shape, tensor.strides[: tensor.dimensions], 1):
        raise _refusal(array, f"its strides are {tuple(tensor.strides[: tensor.dimensions])}, its shape {shape}")
    dtype = f"{TYPES.get(tensor.type_code, 'unknown')}{tensor.bits}" + (f"x{tensor.lanes}" if tensor.lanes > 1 else "")
    return GpuView((tensor.data or 0) + tensor.byte_offset, shape, dtype, capsule)


def _view_of_interface(interface: Mapping[str, Any], array: Any, stream: cuda.Stream) -> GpuView:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise _refusal(array, f"its strides are {tuple(strides)} bytes, its shape {shape}")
    if interface.get("mask") is not None:
        raise _refusal(array, "it has a mask")
    producer = interface.get("stream")
    if producer is not None:
        stream.follow(producer)
    return GpuView(int(interface["data"][0]), shape, dtype.name, array)


def _is_contiguous(shape: Sequence[int], strides: Sequence[int], step: int) -> bool:
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _refusal(array: Any, why: str) -> DataError:
    return DataError(
        f"this {type(array).__name__} cannot be read in GPU memory: {why}",
        expected="a C-contiguous array on the engine's GPU, with __dlpack__ or __cuda_array_interface__",
        fix="move it there, as .cuda().contiguous() does, or use predict, which takes arrays of the computer's memory",
    )
