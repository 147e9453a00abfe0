"""Status codes of CUDA as errors of the pipeline, and what a machine without a GPU is told."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.backends import cuda
from pipeline.errors import EngineError, UnsupportedError


class Status(int):
    name = "cudaSuccess"


def status(name, number=1):
    made = Status(number)
    made.name = name
    return made


def runtime(**functions):
    """A CUDA runtime with these results; a function not named returns success."""
    names = {"cudaMemGetInfo": (Status(0), 5 << 20, 9 << 20), "cudaRuntimeGetVersion": (Status(0), 13040), **functions}
    return SimpleNamespace(**{name: (lambda *_, result=result: result) for name, result in names.items()})


@pytest.fixture
def use(monkeypatch):
    return lambda **functions: monkeypatch.setattr(cuda, "_runtime", lambda: runtime(**functions))


def test_values(use):
    use(one=(Status(0), 4), two=(Status(0), 1, 2), none=(Status(0),))
    assert cuda.call("one") == 4
    assert cuda.call("two") == (1, 2)
    assert cuda.call("none") is None


@pytest.mark.parametrize("name", ["cudaErrorNoDevice", "cudaErrorSystemDriverMismatch", "cudaErrorStubLibrary"])
def test_what_the_machine_lacks_is_unsupported(use, name):
    use(f=(status(name), None))
    with pytest.raises(UnsupportedError, match=name):
        cuda.call("f")


def test_no_driver(use):
    use(cudaGetDevice=(status("cudaErrorInsufficientDriver", 35), None), cudaDriverGetVersion=(Status(0), 0))
    with pytest.raises(UnsupportedError, match="no NVIDIA driver"):
        cuda.current_device()
    assert "use a machine with a GPU" in cuda.why_no_gpu()


def test_driver_too_old(use):
    use(cudaGetDevice=(status("cudaErrorInsufficientDriver", 35), None), cudaDriverGetVersion=(Status(0), 12040))
    with pytest.raises(UnsupportedError, match=r"driver supports CUDA 12\.4, cuda-python here needs CUDA 13\.4"):
        cuda.current_device()


def test_out_of_memory(use):
    use(cudaMalloc=(status("cudaErrorMemoryAllocation", 2), None))
    with pytest.raises(EngineError, match="out of memory") as caught:
        cuda.DeviceBuffer(10)
    assert caught.value.got == "5 MiB free of 9 MiB"


def test_other_codes(use):
    use(f=(status("cudaErrorIllegalAddress", 700), None))
    with pytest.raises(EngineError, match="f returned cudaErrorIllegalAddress"):
        cuda.call("f")


def test_a_device_is_described(use, monkeypatch):
    use(
        cudaGetDevice=(Status(0), 0),
        cudaDeviceGetAttribute=(Status(0), 9),
        cudaGetDeviceProperties=(Status(0), SimpleNamespace(name=b"NVIDIA H200\0")),
    )
    monkeypatch.setattr(
        cuda,
        "_runtime",
        lambda inner=cuda._runtime: SimpleNamespace(
            **vars(inner()),
            cudaDeviceAttr=SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76),
        ),
    )
    monkeypatch.setattr(cuda, "driver_version", lambda: "550.90.07")
    found = cuda.current_device()
    assert (found.name, found.compute_capability, found.driver) == ("NVIDIA H200", "9.9", "550.90.07")


def test_closing_twice_and_failing_to_free(use, caplog):
    use(cudaMalloc=(Status(0), 64), cudaFree=(status("cudaErrorIllegalAddress", 700),))
    buffer = cuda.DeviceBuffer(8)
    buffer.close()
    buffer.close()
    assert caplog.text.count("cudaErrorIllegalAddress") == 1


def test_an_array_must_fit(use):
    use(cudaMalloc=(Status(0), 64))
    with pytest.raises(ValueError, match="at most 8 bytes"):
        cuda.DeviceBuffer(8).upload(np.zeros(3, np.float32), SimpleNamespace(handle=0))


def test_cuda_python_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnsupportedError, match="cuda-python cannot be imported") as caught:
        cuda.current_device()
    assert "pip install" in caught.value.fix


def test_importing_touches_no_heavy_library():
    code = (
        "import sys, pipeline.backends.registry, pipeline.engines; "
        "print([m for m in sys.modules if m.startswith(('torch', 'tensorrt', 'cuda.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
