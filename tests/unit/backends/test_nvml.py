"""Clocks and energy through NVML's own calls, answered by a small library in its place."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from pipeline.backends import cuda, nvml
from pipeline.backends.nvml import Gauge, Meter, Reading
from pipeline.errors import UnsupportedError
from tests.unit.backends.fakes import FakeCuda

# nvmlReturn_t: 0 success, 3 not supported, 6 not found; nvmlDevice_t is a pointer.
PROGRAM = """
#include <string.h>
static int device, running = 0;
static unsigned long long energy = 1500;
int nvmlInit_v2(void) { ++running; return STARTS; }
int nvmlShutdown(void) { --running; return 0; }
int still_running(void) { return running; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* address, void** handle) {
    if (strcmp(address, "0000:3B:00.0")) return 6;
    *handle = &device;
    return 0;
}
int nvmlDeviceGetClockInfo(void* handle, unsigned int clock, unsigned int* mhz) {
    if (handle != &device || clock != 1) return 2;
    *mhz = 1980;
    return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void* handle, unsigned long long* reasons) {
    *reasons = 0x1 | 0x4 | 0x40;
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void* handle, unsigned long long* millijoules) {
    *millijoules = energy += 500;
    return HAS_ENERGY ? 0 : 3;
}
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Puts a library in NVML's place, and a GPU at an address."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")

    def make(address=b"0000:3B:00.0\0", starts=0, has_energy=1):
        gpu = FakeCuda().install(monkeypatch)
        monkeypatch.setattr(FakeCuda, "cudaDeviceGetPCIBusId", lambda self, size, index: address, raising=False)
        source, target = tmp_path / "nvml.c", tmp_path / "libnvml.so"
        source.write_text(PROGRAM)
        defines = [f"-DSTARTS={starts}", f"-DHAS_ENERGY={has_energy}"]
        subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", *defines, source, "-o", target], check=True)
        monkeypatch.setattr(nvml, "LIBRARY", str(target))
        return gpu

    return make


def test_reading(library):
    library()
    assert cuda.pci_address() == b"0000:3B:00.0"
    with Gauge() as gauge:
        assert gauge.read() == Reading(1980, 2.0, ("power cap", "hardware thermal slowdown"))
        assert gauge.read().joules == 2.5
        counter = gauge._nvml.still_running
    assert counter() == 0


def test_what_the_driver_does_not_tell_is_none(library):
    library(has_energy=0)
    with Gauge() as gauge:
        assert gauge.read().joules is None
        meter = Meter(gauge)
        with meter.over("int8"):
            pass
    usage = meter.usage("int8", 1)
    assert usage.watts is None
    assert usage.sm_mhz == (1980, 1980)
    assert usage.slowed == {"power cap", "hardware thermal slowdown"}


def test_usage_is_of_a_candidates_last_turns(library, monkeypatch):
    library()
    now = iter([0.0, 100.0, 200.0, 200.25, 300.0, 301.0, 400.0, 400.5])
    with Gauge() as gauge:
        meter = Meter(gauge)
        monkeypatch.setattr(nvml, "time", SimpleNamespace(perf_counter=lambda: next(now)))
        for name in ("int8", "fp16", "int8", "int8"):
            with meter.over(name):
                pass
    assert meter.usage("fp16", 2).watts == 0.5 / 0.25
    assert meter.usage("int8", 2).watts == 1.0 / 1.5  # the first turn, which took 100 s, warmed up
    assert meter.usage("fp32", 2) == nvml.Usage(None, None, frozenset())


@pytest.mark.parametrize("changes", [{"address": b"0000:01:00.0\0"}, {"starts": 9}])
def test_a_gpu_that_nvml_does_not_show(library, changes):
    library(**changes)
    with pytest.raises(UnsupportedError, match="NVML"):
        Gauge()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libnothing.so.1")
    with pytest.raises(UnsupportedError, match=r"libnothing\.so\.1 cannot be loaded"):
        Gauge()
