"""CUDA C compiled at run time by NVRTC, loaded and launched through the driver in the runtime's primary context.

As in ``cuda``, nothing is touched before it is called and every status code is checked.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.backends import cuda
from pipeline.closing import Closing
from pipeline.errors import EngineError, PipelineError, UnsupportedError

log = logging.getLogger(__name__)

INSTALL = "pip install nvidia-cuda-nvrtc (cuda-python 13) or nvidia-cuda-nvrtc-cu12 (cuda-python 12)"


def version() -> str:
    """NVRTC's, such as "12.9".

    Raises:
        UnsupportedError: no cuda-python, or no NVRTC of its major version.
    """
    major, minor = _compiler("nvrtcVersion")
    return f"{major}.{minor}"


def compile_source(source: str, name: str, capability: str, defines: Mapping[str, int]) -> bytes:
    """CUDA C++ to what ``Module`` loads: machine code of that GPU, or PTX where the GPU is newer than NVRTC.

    IEEE arithmetic throughout: denormals are kept, division and square root are exact.

    Args:
        source: free of #include.
        name: for messages.
        capability: compute capability of the GPU, such as "9.0".
        defines: macros.

    Raises:
        UnsupportedError: NVRTC is missing, or too new for the GPU.
        EngineError: the source does not compile; with NVRTC's log.
    """
    target = _target(capability)
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{key}={value}" for key, value in defines.items())]
    program = _compiler("nvrtcCreateProgram", source.encode(), name.encode(), 0, [], [])
    try:
        failure: EngineError | None = None
        try:
            _compiler("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        except EngineError as error:
            failure = error
        text = _bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if failure is not None:
            raise EngineError(f"NVRTC cannot compile {name} for {target}: {text or failure.problem}") from failure
        if text:
            log.warning("NVRTC said of %s: %s", name, text)
        return _bytes(program, "CUBIN" if target.startswith("sm_") else "PTX")
    finally:
        _compiler("nvrtcDestroyProgram", program)


class Module(Closing):
    """Loaded code; a context manager, unloaded by ``close``.

    Raises:
        UnsupportedError: no driver.
        EngineError: code for another GPU, out of GPU memory.
    """

    def __init__(self, image: bytes) -> None:
        self._image = image
        cuda.call("cudaFree", 0)  # makes the runtime's primary context this thread's
        self._module: Any = _driver("cuModuleLoadData", image)

    def kernel(self, name: str, *, threads: int, shared_bytes: int = 0) -> Kernel:
        """A kernel launched with ``threads`` a block and ``shared_bytes`` of dynamic shared memory."""
        function = _driver("cuModuleGetFunction", self._module, name.encode())
        if shared_bytes:
            attributes = _api("driver").CUfunction_attribute
            for attribute, value in (
                (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
                (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent: so more blocks fit
            ):
                _driver("cuFuncSetAttribute", function, attribute, value)
        return Kernel(function, threads, shared_bytes)

    def close(self) -> None:
        if self._module is not None:
            try:
                _driver("cuModuleUnload", self._module)
            except PipelineError as error:  # raising it would hide the error that led here
                log.warning("%s", error.problem)
            self._module = None


class Kernel:
    """A function of a module, whose arguments are all addresses in GPU memory."""

    def __init__(self, function: Any, threads: int, shared_bytes: int) -> None:
        self._function, self._threads, self._shared_bytes = function, threads, shared_bytes

    def launch(self, blocks: int, addresses: Sequence[int], stream: cuda.Stream) -> None:
        """Enqueue it on the stream; what it does wrong shows when the stream is synchronized."""
        arguments = tuple(addresses), (ctypes.c_void_p,) * len(addresses)
        grid, block = (blocks, 1, 1), (self._threads, 1, 1)
        _driver("cuLaunchKernel", self._function, *grid, *block, self._shared_bytes, int(stream), arguments, 0)


def _target(capability: str) -> str:
    number = int(capability.replace(".", ""))
    known = [int(each) for each in _compiler("nvrtcGetSupportedArchs")]
    if number in known:
        return f"sm_{number}"
    older = [each for each in known if each < number]
    if not older:
        raise UnsupportedError(
            f"NVRTC {version()} has no code for compute capability {capability}",
            expected=f"at least {min(known) / 10}",
            fix="install cuda-python and NVRTC of an older major version",
        )
    return f"compute_{max(older)}"


def _bytes(program: Any, what: str) -> bytes:
    data = bytearray(int(_compiler(f"nvrtcGet{what}Size", program)))
    _compiler(f"nvrtcGet{what}", program, data)
    return bytes(data)


def _compiler(function: str, *arguments: Any) -> Any:
    """Call NVRTC: its value, a tuple of its values, or None."""
    try:
        status, *values = getattr(_api("nvrtc"), function)(*arguments)
    except RuntimeError as error:  # cuda-python raises, rather than returns, where it cannot load a library
        raise UnsupportedError(
            "NVRTC, CUDA's run-time compiler, is not installed", expected="libnvrtc", fix=INSTALL
        ) from error
    return _checked(function, status, values)


def _driver(function: str, *arguments: Any) -> Any:
    try:
        status, *values = getattr(_api("driver"), function)(*arguments)
    except RuntimeError as error:
        raise UnsupportedError(
            f"CUDA cannot be used: {error}", expected="an NVIDIA driver", fix="install one, or use another machine"
        ) from error
    return _checked(function, status, values)


def _checked(function: str, status: Any, values: list[Any]) -> Any:
    name = str(getattr(status, "name", status))
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise cuda.out_of_memory()
    if int(status):
        raise EngineError(f"CUDA failed: {function} returned {name}", fix="see the log; run again with --debug")
    return values[0] if len(values) == 1 else tuple(values) or None


def _api(module: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError as error:
        raise UnsupportedError(
            f"cuda-python cannot be imported: {error}",
            expected="cuda-python 12.6 or newer",
            fix="pip install 'cuda-python>=12.6'",
        ) from error
