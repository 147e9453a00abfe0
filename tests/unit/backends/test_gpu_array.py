"""Arrays of a fake GPU shared with numpy and torch, by the capsules and interfaces that a real one's arrays use."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.backends import cuda, gpu_array
from pipeline.backends.gpu_array import GpuArray, view
from pipeline.errors import DataError
from tests.unit.backends.fakes import FakeCuda, Tensor

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


@pytest.fixture
def honest(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Arrays say that they lie where they do on the fake GPU: in host memory, DLPack's device (1, 0)."""
    monkeypatch.setattr(gpu_array, "CUDA", 1)
    monkeypatch.setattr(gpu, "cudaGetDevice", lambda: 0, raising=False)
    return gpu


def made(values: NDArray[Any] = VALUES) -> GpuArray:
    buffer = cuda.DeviceBuffer(values.nbytes)
    buffer.upload(np.ascontiguousarray(values), cuda.Stream())
    return GpuArray(buffer, values.shape, values.dtype)


@pytest.mark.parametrize("consume", [np.from_dlpack, torch.from_dlpack, torch.utils.dlpack.from_dlpack])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
def test_consumers_share_the_memory_and_the_last_frees_it(honest: FakeCuda, consume: Any, dtype: type) -> None:
    array = made(VALUES.astype(dtype))
    first, second = consume(array), consume(array)
    np.testing.assert_array_equal(np.asarray(first), VALUES.astype(dtype))
    assert first.shape == VALUES.shape
    assert np.asarray(first).dtype == dtype
    copied = array.numpy()
    ctypes.memset(array.address, 0, copied.nbytes)
    assert not np.asarray(second)[0].any()
    assert copied[1, 2, 3] == 23
    cuda.copy_within(array.address, copied.ctypes.data, copied.nbytes, cuda.Stream())
    del array, first
    gc.collect()
    assert len(honest.live) == 1
    assert second[1, 2, 3] == 23
    del second
    assert not honest.live
    assert honest.calls["cudaFree"] == 1


def test_a_capsule_that_nobody_takes_frees_the_memory(honest: FakeCuda) -> None:
    array = made()
    capsule = array.__dlpack__()
    del array
    assert len(honest.live) == 1
    del capsule
    assert not honest.live


def test_a_consumer_that_fails_keeps_its_error_and_no_memory(honest: FakeCuda) -> None:
    def consume(capsule: Any) -> None:
        raise KeyError("no room")

    with pytest.raises(KeyError, match="no room"):
        consume(made().__dlpack__())
    gc.collect()
    assert not honest.live


def test_what_the_protocols_say_of_an_array_on_the_gpu(gpu: FakeCuda) -> None:
    array = made()
    assert array.__dlpack_device__() == (2, 7)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3, 4),
        "typestr": "|u1",
        "data": (array.address, False),
        "version": 3,
        "stream": None,
    }
    assert not hasattr(array, "__array_interface__")  # by which numpy would read GPU memory
    capsule = array.__dlpack__(stream=5, max_version=(1, 0), dl_device=(2, 7), copy=False)
    tensor = gpu_array._tensor(capsule)
    assert (tensor.device_kind, tensor.device_number, tensor.data) == (2, 7, array.address)
    for keys in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="device \\(2, 7\\)"):
            array.__dlpack__(**keys)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(array)


@pytest.mark.parametrize("kind", [2, 13])
@pytest.mark.parametrize("values", [VALUES, torch.tensor(VALUES)])
def test_a_view_of_dlpack_is_no_copy_and_follows_our_stream(gpu: FakeCuda, values: Any, kind: int) -> None:
    tensor = Tensor(values, device=(kind, 7))
    found = view(tensor, cuda.Stream())
    address = values.ctypes.data if isinstance(values, np.ndarray) else values.data_ptr()
    assert (found.address, found.shape, found.dtype) == (address, (2, 3, 4), "uint8")
    assert tensor.streams == [7]


def test_a_view_of_a_part_begins_where_the_part_does(gpu: FakeCuda) -> None:
    whole = torch.tensor(VALUES).float()
    found = view(Tensor(whole[1:]), cuda.Stream())
    assert (found.address, found.shape, found.dtype) == (whole.data_ptr() + 4 * 12, (1, 3, 4), "float32")


def test_a_view_counts_the_bytes_before_the_first_element(gpu: FakeCuda) -> None:
    class Offset(Tensor):  # as OpenCL's buffers, whose addresses cannot be added to
        def __dlpack__(self, *, stream: int) -> Any:
            capsule = super().__dlpack__(stream=stream)
            gpu_array._tensor(capsule).byte_offset = 5
            return capsule

    assert view(Offset(VALUES), cuda.Stream()).address == VALUES.ctypes.data + 5


def test_a_view_keeps_the_memory(gpu: FakeCuda) -> None:
    values = VALUES.copy()
    gone = weakref.ref(values)
    found = view(Tensor(values), cuda.Stream())
    del values
    gc.collect()
    assert gone() is not None
    del found
    gc.collect()
    assert gone() is None


class Interface:
    """A CUDA array interface, of an array's memory unless told otherwise."""

    def __init__(self, values: NDArray[Any], **keys: Any) -> None:
        self.values = values
        self.__cuda_array_interface__ = {**values.__array_interface__, "strides": values.strides, "version": 3, **keys}


@pytest.mark.parametrize(
    ("stream", "waits"), [({}, []), ({"stream": None}, []), ({"stream": 1}, [1]), ({"stream": 99}, [99])]
)
def test_a_view_of_the_cuda_array_interface_waits_for_its_stream(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, stream: dict[str, Any], waits: list[int]
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(gpu, "cudaEventRecord", lambda event, stream: recorded.append(stream))
    found = view(Interface(VALUES, **stream), cuda.Stream())
    assert (found.address, found.shape, found.dtype) == (VALUES.ctypes.data, (2, 3, 4), "uint8")
    assert recorded == waits
    assert gpu.calls["cudaStreamWaitEvent"] == gpu.calls["cudaEventDestroy"] == len(waits)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (VALUES, "device (1, 0), the engine on (2, 7)"),
        (torch.tensor(VALUES), "device (1, 0), the engine on (2, 7)"),
        (Tensor(VALUES, device=(2, 3)), "device (2, 3), the engine on (2, 7)"),
        (Tensor(VALUES[:, ::2]), "strides are (12, 8, 1)"),
        (Tensor(torch.tensor(VALUES).permute(0, 2, 1)), "strides are (12, 1, 4)"),
        (Tensor(torch.zeros(2, requires_grad=True)), "require"),
        (Interface(VALUES.T), "strides are (1, 4, 12) bytes"),
        (Interface(VALUES, mask=VALUES), "mask"),
        (Interface(VALUES, typestr="nonsense"), "nonsense"),
        ([1, 2], "neither __dlpack__ nor __cuda_array_interface__"),
    ],
)
def test_what_cannot_be_read_on_the_gpu(gpu: FakeCuda, array: Any, why: str) -> None:
    with pytest.raises(DataError, match="cannot be read in GPU memory") as caught:
        view(array, cuda.Stream())
    assert why in caught.value.problem
    assert "use predict" in caught.value.fix
