"""A TensorRT engine for ``run.py``, with tensorrt and the NVIDIA driver alone."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


def open_engine(path: Path) -> tuple[Any, list[int], bool]:
    """A function from the network's input to its output, the input's shape, and whether it takes uint8 images."""
    import tensorrt as trt

    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            raise SystemExit(f"{name} failed with CUDA error {code}")

    context = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise SystemExit(f"{path.name} was built for another GPU or TensorRT; see manifest.json")
    execution = engine.create_execution_context()
    source, result = (engine.get_tensor_name(index) for index in range(2))
    if engine.get_tensor_mode(source) != trt.TensorIOMode.INPUT:
        source, result = result, source

    dtypes: Any = trt
    dtype = dtypes.nptype(engine.get_tensor_dtype(result))

    def memory(name: str, size: int) -> ctypes.c_uint64:
        address = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        execution.set_tensor_address(name, address.value)
        return address

    def infer(batch: Any) -> Any:
        execution.set_input_shape(source, batch.shape)
        output = np.empty(_sizes(execution.get_tensor_shape(result)), dtype)
        given, taken = memory(source, batch.nbytes), memory(result, output.nbytes)
        call("cuMemcpyHtoD_v2", given, batch.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(batch.nbytes))
        if not execution.execute_async_v3(0):
            raise SystemExit("the engine failed")
        call("cuCtxSynchronize")
        call("cuMemcpyDtoH_v2", output.ctypes.data_as(ctypes.c_void_p), taken, ctypes.c_size_t(output.nbytes))
        for address in (given, taken):
            call("cuMemFree_v2", address)
        return output

    return infer, _sizes(engine.get_tensor_shape(source)), engine.get_tensor_dtype(source) == trt.uint8


def _sizes(shape: Any) -> list[int]:
    return [shape[place] for place in range(len(shape))]
