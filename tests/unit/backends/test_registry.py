"""Which builder and route a build gets, by what this machine offers."""

import sys
from types import SimpleNamespace

import pytest

from pipeline.artifacts import Device
from pipeline.backends import cuda, registry, tensorrt, tensorrt_rtx
from pipeline.backends.base import Capabilities
from pipeline.errors import UnsupportedError

GPU = Device("NVIDIA H200", "9.0", "550.1")
OLD = Capabilities("tensorrt", "8.6.0", True, True, routes=("implicit", "explicit"), device=GPU)
NEW = Capabilities("tensorrt", "11.4", True, True, routes=("explicit",), device=GPU, strongly_typed=True)
RTX = Capabilities(
    "tensorrt-rtx",
    "1.7",
    True,
    False,
    routes=("explicit",),
    target_capabilities=("8.6",),
    strongly_typed=True,
    device=GPU,
)
ABSENT = Capabilities("tensorrt", None, False, False, why_not_build="TensorRT is not installed; pip install tensorrt")


@pytest.fixture
def machine(monkeypatch):
    def have(*capabilities):
        found = [SimpleNamespace(name=c.name, capabilities=lambda c=c: c) for c in capabilities]
        monkeypatch.setattr(registry, "builders", lambda: found)

    return have


@pytest.mark.parametrize(
    ("precision", "route", "expected"),
    [
        ("fp32", "auto", "implicit"),
        ("fp16", "auto", "implicit"),
        ("int8", "auto", "explicit"),
        ("int8", "implicit", "implicit"),
        ("fp16", "explicit", "explicit"),
    ],
)
def test_routes_of_a_weakly_typed_tensorrt(machine, precision, route, expected):
    machine(OLD, RTX)
    resolved = registry.resolve("auto", precision, route)
    assert (resolved.capabilities.name, resolved.route) == ("tensorrt", expected)


def test_a_strongly_typed_tensorrt_is_explicit(machine):
    machine(NEW, RTX)
    assert registry.resolve("auto", "fp32", "auto").route == "explicit"


def test_auto_falls_back_to_what_builds(machine):
    machine(ABSENT, RTX)
    resolved = registry.resolve("auto", "int8", "auto")
    assert (resolved.capabilities.name, resolved.route) == ("tensorrt-rtx", "explicit")


def test_asking_for_what_is_not_installed_gives_the_command(machine):
    machine(ABSENT, RTX)
    with pytest.raises(UnsupportedError, match="tensorrt cannot build engines here") as caught:
        registry.resolve("tensorrt", "fp16", "auto")
    assert "pip install tensorrt" in caught.value.got
    assert "tensorrt-rtx" not in caught.value.got


def test_a_route_that_nothing_here_has(machine):
    machine(ABSENT, RTX)
    with pytest.raises(UnsupportedError) as caught:
        registry.resolve("auto", "int8", "implicit")
    assert "no implicit route" in caught.value.got
    with pytest.raises(UnsupportedError, match="no such route"):
        registry.resolve("tensorrt-rtx", "int8", "implicit")
    with pytest.raises(UnsupportedError):
        registry.resolve("onnxruntime", "int8", "implicit")


def test_onnxruntime_has_no_builder():
    resolved = registry.resolve("onnxruntime", "int8", "auto")
    assert resolved.builder is None
    assert resolved.route == "explicit"
    assert resolved.capabilities.strongly_typed


def test_identity_names_the_gpu_only_where_the_engine_is_bound_to_it(machine):
    machine(OLD)
    assert registry.resolve("tensorrt", "fp16", "auto").identity()["device"]["name"] == "NVIDIA H200"
    machine(RTX)
    identity = registry.resolve("tensorrt-rtx", "fp16", "auto").identity()
    assert identity["device"] is None
    assert identity["targets"] == ["8.6"]


def test_capabilities_without_libraries_and_gpu(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    tensorrt_, rtx, onnxruntime = registry.all_capabilities()
    assert "TensorRT is not installed; pip install" in tensorrt_.why_not_build
    assert "TensorRT-RTX is not installed; pip install" in rtx.why_not_run
    assert not any(found.builds for found in (tensorrt_, rtx, onnxruntime))
    assert onnxruntime.runs


@pytest.mark.parametrize("builder", [tensorrt.TensorrtBuilder, tensorrt_rtx.RtxBuilder])
def test_a_library_that_cannot_be_loaded(monkeypatch, builder):
    def fail(name):
        raise OSError("libnvinfer.so.8: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", fail)
    why = builder().capabilities().why_not_build
    assert "cannot be loaded: libnvinfer.so.8" in why


def library(**parts):
    return SimpleNamespace(__name__="tensorrt", __version__="8.6.0", **parts)


IMPLICIT = {
    "BuilderFlag": SimpleNamespace(FP16=0, INT8=1),
    "IInt8EntropyCalibrator2": object,
    "IInt8MinMaxCalibrator": object,
}


@pytest.mark.parametrize(
    ("parts", "network_flags", "routes"),
    [
        (IMPLICIT, {"EXPLICIT_BATCH": 0}, ("implicit", "explicit")),
        (IMPLICIT, {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, ("explicit", "implicit")),
        ({"BuilderFlag": SimpleNamespace(TF32=0)}, {"STRONGLY_TYPED": 1}, ("explicit",)),
        ({"BuilderFlag": SimpleNamespace(TF32=0)}, {}, ("explicit",)),
    ],
)
def test_routes_are_read_off_the_library(monkeypatch, parts, network_flags, routes):
    trt = library(**parts, NetworkDefinitionCreationFlag=SimpleNamespace(**network_flags))
    monkeypatch.setattr(tensorrt, "api", lambda: trt)

    def no_gpu():
        raise UnsupportedError("this machine has no NVIDIA driver", fix="use a machine with a GPU")

    monkeypatch.setattr(cuda, "current_device", no_gpu)
    found = tensorrt.TensorrtBuilder().capabilities()
    assert found.routes == routes
    assert found.strongly_typed is (routes[0] == "explicit")
    assert found.why_not_build == "this machine has no NVIDIA driver; use a machine with a GPU"
    assert found.version == "8.6.0"


def test_rtx_on_a_gpu_that_it_does_not_support(monkeypatch):
    trt = SimpleNamespace(
        __version__="1.7",
        ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "SM120": 120, "SM75": 75, "SM86": 86}),
    )
    monkeypatch.setattr(tensorrt_rtx, "api", lambda: trt)
    monkeypatch.setattr(cuda, "current_device", lambda: GPU)
    found = tensorrt_rtx.RtxBuilder().capabilities()
    assert found.target_capabilities == ("7.5", "8.6", "12.0")
    assert found.builds
    assert not found.runs
    assert "compute capability 9.0" in found.why_not_run
