"""Histograms on the GPU without one: the kernels' very source compiled for the CPU, everything around them on fakes."""

import ctypes
import itertools
import logging
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pipeline.backends import cuda, nvrtc
from pipeline.backends import gpu_histograms as gpu
from pipeline.backends.base import BuildResult
from pipeline.backends.cpu_histograms import cpu_histograms
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.calibration.histogram import BINS, EXPONENT_OF_BINS, SMALLEST_EXPONENT, Histogram
from pipeline.config import EngineConfig
from pipeline.errors import CalibrationError, EngineError, ModelError, UnsupportedError
from pipeline.graph.io import model_inputs
from pipeline.graph.placement import concatenations
from pipeline.graph.quantize import activation_tensors
from tests.tiny_unet import images, save, tiny_unet
from tests.unit.backends.fakes import DEVICE, FakeCuda, fake_trt

THREADS, PIECE = 64, 1000
HUGE = float(np.finfo(np.float32).max)
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)
PROGRAM = """
#include "cuda_on_cpu.h"
#include "{source}"
extern "C" {{
void run_count(unsigned int blocks, void** a) {{
    launch(blocks, [=] {{ count((Piece*)a[0], (State*)a[1], (Count*)a[2], (Count*)a[3]); }});
}}
void run_grow(unsigned int blocks, void** a) {{ launch(blocks, [=] {{ grow((State*)a[0], (Count*)a[1]); }}); }}
void run_count_rest(unsigned int blocks, void** a) {{
    launch(blocks, [=] {{ count_rest((Piece*)a[0], (State*)a[1], (Count*)a[2]); }});
}}
void bins_of(unsigned int size, const float* values, int exponent, unsigned int* bins) {{
    float factor = power_of_two(LOG_BINS - exponent);
    for (unsigned int i = 0; i < size; ++i) bins[i] = bin_of(values[i], factor);
}}
void exponents_of(unsigned int size, const float* values, int* exponents) {{
    for (unsigned int i = 0; i < size; ++i) exponents[i] = exponent_of(magnitude(values[i]));
}}
}}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels as functions of the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(PROGRAM.format(source=gpu.SOURCE))
    defines = {"BINS": BINS, "LOG_BINS": EXPONENT_OF_BINS, "THREADS": THREADS}
    subprocess.run(
        [
            compiler,
            *("-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread"),
            *(f"-D{name}={value}" for name, value in defines.items()),
            f"-I{Path(__file__).parent}",
            *("kernels.cpp", "-o", "kernels.so"),
        ],
        check=True,
        cwd=folder,
    )
    return ctypes.CDLL(str(folder / "kernels.so"))


class OnCpu(FakeCuda):
    """FakeCuda with what the histograms need besides."""

    def install(self, patch):
        super().install(patch)
        cuda._runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice = 3
        return self

    def cudaMalloc(self, size):
        if size > self.memory_left:
            raise EngineError("the GPU is out of memory")
        block = ctypes.create_string_buffer(size + 256)
        address = -(-ctypes.addressof(block) // 256) * 256
        self.live[address] = block
        return address

    def cudaMemsetAsync(self, address, value, size, stream):
        ctypes.memset(address, value, size)


class CpuModule:
    """Stands in for ``nvrtc.Module``."""

    def __init__(self, library):
        self.library = library

    def kernel(self, name, *, threads, shared_bytes=0):
        assert threads == gpu.THREADS
        assert shared_bytes == (0 if name == "grow" else 4 * BINS)

        def launch(blocks, addresses, stream):
            getattr(self.library, f"run_{name}")(blocks, (ctypes.c_void_p * len(addresses))(*addresses))

        return SimpleNamespace(launch=launch)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def device(monkeypatch, kernels):
    """A GPU of host memory that runs the kernels."""
    monkeypatch.setattr(gpu, "_code", lambda capability: b"")
    monkeypatch.setattr(nvrtc, "Module", lambda image: CpuModule(kernels))
    monkeypatch.setattr(gpu, "PIECE", PIECE // 4 * 4)
    return OnCpu().install(monkeypatch)


def counted(*groups):
    """Histograms of tensors on the device; each group holds one array a tensor, all groups of the same sizes."""
    sizes = [array.size for array in groups[0]]
    stream = cuda.Stream()
    buffers = [cuda.DeviceBuffer(4 * size) for size in sizes]
    places = [gpu.DeviceTensor(f"t{i}", buffer.address, sizes[i]) for i, buffer in enumerate(buffers)]
    with gpu.DeviceHistograms(places, stream) as histograms:
        for group in groups:
            for buffer, array in zip(buffers, group, strict=True):
                buffer.upload(np.ascontiguousarray(array, np.float32), stream)
            histograms.add()
        not_finite = np.empty(len(sizes), np.uint64)
        histograms.not_finite.download(not_finite, stream)
        results = histograms.results()
    for held in (*buffers, stream):
        held.close()
    return results, not_finite.tolist()


def reference(*arrays):
    histogram = Histogram("t")
    for array in arrays:
        histogram.add(array)
    return histogram


def same(have, want):
    assert have.width == want.width
    assert (have.minimum, have.maximum) == (want.minimum, want.maximum)
    assert have.counts.dtype == np.int64
    assert np.array_equal(have.counts, want.counts)
    assert have.amax == want.amax


def relu(size, scale=1.0, seed=0):
    return np.maximum(np.random.default_rng(seed).standard_normal(size) * scale, 0).astype(np.float32)


def borders(exponent):
    """Values at the borders of bins, just below and just above, of both signs."""
    rng = np.random.default_rng(exponent + 200)
    picked = np.concatenate([np.arange(40), rng.integers(0, BINS + 1, 400), [BINS - 1, BINS]])
    with np.errstate(over="ignore", under="ignore"):
        exact = np.ldexp(picked.astype(np.float32), exponent - EXPONENT_OF_BINS).astype(np.float32)
        exact = np.minimum(exact, HUGE)
        near = np.concatenate([exact, np.nextafter(exact, np.float32(HUGE)), np.nextafter(exact, np.float32(0))])
    return np.concatenate([near, -near]).astype(np.float32)


CASES = {
    "one value": np.float32([3.5]),
    "zeros of both signs": np.float32([0.0, -0.0] * 50),
    "relu": relu(4567),
    "negative": -relu(3001) - np.float32(0.25),
    "all equal": np.full(2049, 7.25, np.float32),
    "denormals": np.float32(DENORMAL) * np.arange(-300, 300, dtype=np.float32),
    "tiny": np.ldexp(np.float32(1), np.arange(-149, -90)).astype(np.float32),
    "every power of two": np.concatenate(
        [np.ldexp(np.float32(sign), np.arange(-149, 128)).astype(np.float32) for sign in (1, -1)]
    ),
    "largest": np.float32([HUGE, -HUGE, 1.0, 0.0, np.nextafter(np.float32(HUGE), np.float32(0))]),
    "largest is a power of two": np.float32([4.0, 3.999999, 2.0, -4.0]),
    "an outlier": np.append(relu(4000, 1e-3), np.float32(1e20)),
    "any bits": np.random.default_rng(1).integers(0, 0x7F800000, 5000).astype(np.uint32).view(np.float32),
    **{f"borders at 2**{exponent}": borders(exponent) for exponent in (-120, -100, -99, -3, 0, 5, 127, 128)},
}


class TestArithmetic:
    """The functions of single values."""

    @pytest.mark.parametrize("exponent", [-100, -37, 0, 1, 14, 90, 127, 128])
    def test_bins(self, kernels, exponent):
        values = np.concatenate([borders(exponent), borders(exponent - 20), relu(3000, 2.0 ** min(exponent - 3, 120))])
        values = np.concatenate([values, CASES["denormals"], CASES["zeros of both signs"]])
        values = values[np.abs(values.astype(np.float64)) < 2.0**exponent]
        have = np.empty(values.size, np.uint32)
        kernels.bins_of(values.size, _pointer(values), exponent, _pointer(have))
        factor = np.float32(2.0 ** (EXPONENT_OF_BINS - exponent))
        assert np.array_equal(have, (np.abs(values) * factor).astype(np.float32).astype(np.int32))
        assert have.max() < BINS

    def test_exponents(self, kernels):
        values = CASES["any bits"]
        have = np.empty(values.size, np.int32)
        kernels.exponents_of(values.size, _pointer(values), _pointer(have))
        assert np.array_equal(np.maximum(have, SMALLEST_EXPONENT), np.maximum(np.frexp(values)[1], SMALLEST_EXPONENT))

    def test_ordered_keys(self):
        values = np.sort(np.concatenate([CASES["any bits"], -CASES["any bits"], np.float32([np.inf, -np.inf, 0])]))
        keys = np.array([gpu._ordered(float(value)) for value in values], np.uint32)
        assert (np.diff(keys.astype(np.int64)) >= 0).all()
        assert np.array_equal(gpu._unordered(keys), values)


class TestKernels:
    @pytest.mark.parametrize("case", CASES)
    def test_counts_are_those_of_the_cpu(self, device, case):
        ((have,), bad) = counted([CASES[case]])
        same(have, reference(CASES[case]))
        assert bad == [0]
        assert not device.live

    def test_all_cases_at_once_and_twice(self, device):
        arrays = list(CASES.values())
        results, _ = counted(arrays, [array[::-1] for array in arrays])
        for have, array in zip(results, arrays, strict=True):
            same(have, reference(array, array))

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
    def test_any_order_gives_the_same(self, device, order):
        arrays = [relu(3001, scale, seed) for seed, scale in enumerate((1e-3, 1.0, 40.0, 3e30))]
        arrays[1] *= -1
        ((have,), _) = counted(*([arrays[i]] for i in order))
        same(have, reference(*arrays))

    def test_ranges_that_grow_one_doubling_at_a_time(self, device):
        arrays = [[np.full(100, 1.5 * 2.0**power, np.float32)] for power in range(-16, 4)]
        ((have,), _) = counted(*arrays)
        same(have, reference(*(array for (array,) in arrays)))

    def test_random_sizes(self, device):
        rng = np.random.default_rng(5)
        sizes = [1, 2, 3, 4, 5, 31, 63, 64, 65, 255, 257, 999, 1000, 1001, 4003]
        groups = [[(rng.standard_normal(size) * 10.0 ** rng.integers(-4, 5)) for size in sizes] for _ in range(3)]
        groups = [[array.astype(np.float32) for array in group] for group in groups]
        results, _ = counted(*groups)
        for index, have in enumerate(results):
            same(have, reference(*(group[index] for group in groups)))

    def test_values_that_are_not_finite_are_counted(self, device):
        bad = relu(5000)
        bad[[3, 700, 2500]] = np.nan
        bad[[4, 4999]] = np.inf, -np.inf
        results, not_finite = counted([bad, relu(4321)], [bad, relu(4321, 3.0, 1)], [relu(5000), relu(4321)])
        assert not_finite == [10, 0]
        same(results[1], reference(relu(4321), relu(4321, 3.0, 1), relu(4321)))


def _pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def doubling():
    """y = 2 x, of shapes (n, 2): what ``fake_trt`` runs."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"], "double")],
        "doubling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pairs(count, rows=3):
    rng = np.random.default_rng(2)
    return [(f"image {i}", (rng.standard_normal((rows, 2)) * 4**i).astype(np.float32)) for i in range(count)]


@pytest.fixture
def collect(device, monkeypatch, tmp_path):
    """``gpu_histograms`` of the doubling graph."""
    path = save(doubling(), tmp_path / "clean.onnx")
    trt = fake_trt(device)
    monkeypatch.setattr(gpu, "_require", lambda: trt)
    monkeypatch.setattr(gpu, "_observing_engine", lambda *_: b"plan")
    return lambda images: gpu.gpu_histograms(path, ["x", "y"], images, EngineConfig())


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "reading ahead"]


class TestWhole:
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_as_on_the_cpu(self, device, collect, count):
        for have, want in zip(collect(pairs(count)), cpu_histograms(doubling(), ["x", "y"], pairs(count)), strict=True):
            assert have.tensor == want.tensor
            same(have, want)
        assert not device.live
        assert not threads()
        for made, gone in (
            ("cudaEventCreateWithFlags", "cudaEventDestroy"),
            ("cudaStreamCreateWithFlags", "cudaStreamDestroy"),
        ):
            assert device.calls[made] == device.calls[gone]

    @pytest.mark.parametrize("place", [0, 1, 4])
    def test_tensor_and_image_are_named(self, device, collect, place):
        given = pairs(5)
        given[place][1][1, 1] = 3e38
        with pytest.raises(CalibrationError, match=f"tensor y holds NaN or infinite values on the image image {place}"):
            collect(given)
        given[place][1][1] = np.nan
        with pytest.raises(CalibrationError, match=f"tensor x .* image {place}") as caught:
            collect(given)
        assert caught.value.got == "2 of 6 values are not finite"
        assert not device.live
        assert not threads()

    def test_no_images(self, device, collect):
        with pytest.raises(CalibrationError, match="no calibration images"):
            collect([])
        assert not threads()

    def test_another_shape(self, device, collect):
        with pytest.raises(CalibrationError, match="image 1 differs in shape") as caught:
            collect([pairs(1)[0], ("image 1", pairs(1, rows=2)[0][1])])
        assert (caught.value.expected, caught.value.got) == ("float32 (3, 2)", "float32 (2, 2)")
        assert not device.live

    @pytest.mark.parametrize("array", [np.zeros((1, 3), np.float32), np.zeros((1, 2), np.uint8)])
    def test_an_image_that_the_graph_does_not_take(self, device, collect, array):
        with pytest.raises(CalibrationError, match="image bird does not fit the graph"):
            collect([("bird", array)])
        assert not threads()

    def test_errors_of_the_images_come_as_they_are(self, device, collect):
        def broken():
            yield from pairs(3)
            raise RuntimeError("the fourth image is damaged")

        with pytest.raises(RuntimeError, match="fourth image is damaged"):
            collect(broken())
        assert not device.live
        assert not threads()

    @pytest.mark.parametrize("left", [10, 400, 4 * BINS])
    def test_out_of_memory(self, device, collect, left):
        device.memory_left = left
        with pytest.raises(EngineError, match="out of memory"):
            collect(pairs(3))
        assert not device.live
        assert not threads()

    def test_several_inputs(self, device, monkeypatch, tmp_path):
        model = doubling()
        model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
        monkeypatch.setattr(gpu, "_require", lambda: None)
        with pytest.raises(ModelError, match="2 inputs"):
            gpu.gpu_histograms(save(model, tmp_path / "two.onnx"), ["x"], [], EngineConfig())

    def test_a_tensor_that_tensorrt_does_not_give(self, collect, device, monkeypatch, tmp_path):
        path = save(doubling(), tmp_path / "clean.onnx")
        with pytest.raises(EngineError, match="no output for the tensors w"):
            gpu.gpu_histograms(path, ["x", "w"], pairs(1), EngineConfig())
        assert not device.live


class OrtEngine:
    """Stands in for ``EngineRunner``: ONNX Runtime between buffers of the fake GPU."""

    def __init__(self, trt, plan):
        self.model = OnnxRuntimeRunner(plan, optimize=False, arena=False)
        self.inputs, self.stream = self.model.inputs, cuda.Stream()

    def bind(self, feeds):
        arrays = {**feeds, **self.model(feeds)}
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.buffers = {name: cuda.DeviceBuffer(array.nbytes) for name, array in arrays.items()}
        return self.buffers

    def enqueue(self):
        (source,) = self.inputs
        image = np.empty(self.shapes[source.name], np.float32)
        self.buffers[source.name].download(image, self.stream)
        for name, array in self.model({source.name: image}).items():
            self.buffers[name].upload(np.ascontiguousarray(array), self.stream)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for buffer in self.buffers.values():
            buffer.close()


def test_a_unet_with_concatenations(device, monkeypatch, tmp_path):
    def build(self, request):
        return BuildResult(request.model.read_bytes(), (), (), 0.0, "none")

    monkeypatch.setattr(gpu, "PIECE", 8192)
    monkeypatch.setattr(gpu, "_require", lambda: None)
    monkeypatch.setattr(gpu, "EngineRunner", OrtEngine)
    monkeypatch.setattr(TensorrtBuilder, "build", build)
    model = tiny_unet()
    tensors = activation_tensors(model)
    given = [(f"image {i}", feeds["image"] * 3**i) for i, feeds in enumerate(images(3))]
    found = gpu.gpu_histograms(save(model, tmp_path / "clean.onnx"), tensors, given, EngineConfig())
    for have, want in zip(found, cpu_histograms(model, tensors, given), strict=True):
        assert have.tensor == want.tensor
        same(have, want)
    assert not device.live


class TestEngine:
    """The graph that TensorRT is asked to build."""

    @pytest.fixture
    def requests(self, monkeypatch):
        made = []

        def build(self, request):
            made.append((request, onnx.load(request.model)))
            return BuildResult(b"plan", (), (), 0.0, "none")

        monkeypatch.setattr(TensorrtBuilder, "build", build)
        return made

    def build(self, model, tensors, shape):
        (source,) = model_inputs(model)
        return gpu._observing_engine(model, tensors, source, shape, EngineConfig(workspace_mib=7, tf32=True))

    def test_every_tensor_is_an_output(self, requests):
        model = tiny_unet("batch")
        tensors = activation_tensors(model)
        observed = [tensor for tensor in tensors if tensor not in concatenations(model, tensors)]
        assert self.build(tiny_unet("batch"), observed, (2, 3, 32, 32)) == b"plan"
        ((request, built),) = requests
        assert [value.name for value in built.graph.output] == [name for name in observed if name != "image"]
        assert request.precision == "fp32"
        assert (request.config.optimization_level, request.config.tf32, request.config.workspace_mib) == (0, False, 7)
        assert request.profiles["image"].min == request.profiles["image"].max == (2, 3, 32, 32)
        onnx.checker.check_model(built, full_check=True)
        session = ort.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
        (feeds,) = images(1, batch=2)
        assert len(session.run(None, feeds)) == len(observed) - 1

    def test_what_no_observed_tensor_needs_is_left_out(self, requests):
        model = tiny_unet()
        first = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
        self.build(model, ["image", first], (1, 3, 32, 32))
        ((_, built),) = requests
        assert [node.output[0] for node in built.graph.node] == [first]

    def test_halves_are_refused(self, requests):
        model = doubling()
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
        with pytest.raises(UnsupportedError, match="tensor x is not float32"):
            self.build(model, ["x", "y"], (1, 2))


def nvrtc_missing():
    try:
        nvrtc.version()
    except UnsupportedError as error:
        return error.problem
    return ""


class TestNvrtc:
    @pytest.mark.parametrize("capability", ["7.5", "8.6", "9.0", "99.0"])
    def test_the_kernels_compile_without_warnings(self, capability, caplog):
        if nvrtc_missing():
            pytest.skip(nvrtc_missing())
        with caplog.at_level(logging.WARNING):
            image = gpu._code.__wrapped__(capability)
        assert not caplog.records
        if capability == "99.0":
            assert b".target sm_" in image
        else:
            assert image.startswith(b"\x7fELF")
        assert all(name in image for name in (b"count", b"grow", b"count_rest"))

    def test_a_mistake_shows_its_place(self):
        if nvrtc_missing():
            pytest.skip(nvrtc_missing())
        with pytest.raises(EngineError, match=r"cannot compile wrong\.cu for sm_90: wrong\.cu\(1\): error"):
            nvrtc.compile_source("int f() { return x; }", "wrong.cu", "9.0", {})

    def test_nvrtc_is_missing(self, monkeypatch):
        def absent():
            raise RuntimeError("libnvrtc.so not found")

        monkeypatch.setattr(nvrtc, "_api", lambda module: SimpleNamespace(nvrtcVersion=absent))
        with pytest.raises(UnsupportedError, match="not installed") as caught:
            nvrtc.version()
        assert "nvidia-cuda-nvrtc-cu12" in caught.value.fix

    def test_a_gpu_that_nvrtc_no_longer_knows(self, monkeypatch):
        ok = SimpleNamespace(name="NVRTC_SUCCESS", __int__=lambda: 0)
        monkeypatch.setattr(
            nvrtc,
            "_compiler",
            lambda function, *_: {"nvrtcVersion": (13, 5), "nvrtcGetSupportedArchs": [75, 80]}.get(function, ok),
        )
        with pytest.raises(UnsupportedError, match=r"no code for compute capability 6\.1") as caught:
            nvrtc.compile_source("", "x.cu", "6.1", {})
        assert caught.value.expected == "at least 7.5"


class TestModule:
    """Loading and launching, on a fake driver."""

    @pytest.fixture
    def driver(self, monkeypatch):
        calls = []

        class Status(int):
            name = "CUDA_SUCCESS"

        class Driver:
            CUfunction_attribute = SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9
            )
            status = Status(0)

            def __getattr__(self, name):
                def call(*arguments):
                    calls.append((name, *arguments))
                    has_value = name in ("cuModuleLoadData", "cuModuleGetFunction")
                    return (self.status, name) if has_value else (self.status,)

                return call

        OnCpu().install(monkeypatch)
        monkeypatch.setattr(FakeCuda, "cudaFree", lambda self, address: None)
        made = Driver()
        monkeypatch.setattr(nvrtc, "_api", lambda module: made)
        return SimpleNamespace(calls=calls, api=made, status=Status)

    def test_launch(self, driver):
        with nvrtc.Module(b"code") as module:
            module.kernel("count", threads=256, shared_bytes=65536).launch(12, (16, 32), cuda.Stream())
        assert driver.calls == [
            ("cuModuleLoadData", b"code"),
            ("cuModuleGetFunction", "cuModuleLoadData", b"count"),
            ("cuFuncSetAttribute", "cuModuleGetFunction", 8, 65536),
            ("cuFuncSetAttribute", "cuModuleGetFunction", 9, 100),
            (
                *("cuLaunchKernel", "cuModuleGetFunction", 12, 1, 1, 256, 1, 1, 65536, 7),
                *(((16, 32), (ctypes.c_void_p,) * 2), 0),
            ),
            ("cuModuleUnload", "cuModuleLoadData"),
        ]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("CUDA_ERROR_OUT_OF_MEMORY", "GPU is out of memory"),
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", "cuModuleLoadData returned CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ],
    )
    def test_failures(self, driver, monkeypatch, name, message):
        monkeypatch.setattr(cuda, "free_memory", lambda: (0, 0))
        driver.api.status = driver.status(2)
        driver.api.status.name = name
        with pytest.raises(EngineError, match=message):
            nvrtc.Module(b"code")


class TestAvailable:
    def test_what_is_missing_is_said(self, monkeypatch):
        monkeypatch.setattr(gpu.tensorrt, "api", lambda: None)
        monkeypatch.setattr(cuda, "current_device", lambda: DEVICE)
        monkeypatch.setattr(cuda, "shared_memory", lambda: 99 << 10)
        monkeypatch.setattr(nvrtc, "version", lambda: "12.9")
        assert gpu.why_no_gpu_calibration() == ""
        monkeypatch.setattr(cuda, "shared_memory", lambda: 48 << 10)
        assert "too little shared memory" in gpu.why_no_gpu_calibration()

        def no_tensorrt():
            raise UnsupportedError("TensorRT is not installed", fix="install it")

        monkeypatch.setattr(gpu.tensorrt, "api", no_tensorrt)
        assert gpu.why_no_gpu_calibration() == "TensorRT is not installed; install it"
