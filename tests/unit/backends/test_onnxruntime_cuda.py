"""ONNX Runtime's CUDA runner; its binding runs on the CPU provider, whose memory a fake GPU has."""

import numpy as np
import onnxruntime as ort
import pytest

from pipeline.backends import onnxruntime_cuda
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.onnxruntime_cuda import CudaRunner
from pipeline.errors import ModelError, UnsupportedError
from tests.tiny_unet import images, save, tiny_unet
from tests.unit.backends.fakes import FakeCuda


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda().install(monkeypatch)


@pytest.fixture
def graph(tmp_path):
    return save(tiny_unet("batch"), tmp_path / "clean.onnx")


@pytest.fixture
def on_cpu(gpu, monkeypatch):
    """The same runner with the CPU's provider, which has no streams."""
    session = ort.InferenceSession
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_cuda, "MEMORY", "cpu")
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: session(path, options, providers[-1:])
    )
    return gpu


def test_an_onnx_runtime_without_cuda(gpu, graph):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(UnsupportedError, match="no CUDA provider"):
        CudaRunner(graph)


def test_a_provider_that_does_not_start_is_not_taken_for_the_gpu(gpu, graph, monkeypatch):
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    with pytest.raises(UnsupportedError, match="does not start"):
        CudaRunner(graph)
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"] == 1


def test_a_file_that_is_no_graph(on_cpu, tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError):
        CudaRunner(tmp_path / "no.onnx")
    assert on_cpu.calls["cudaStreamDestroy"] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_times_and_results(on_cpu, graph, batch):
    (feeds,) = images(1, batch=batch)
    with OnnxRuntimeRunner(graph) as reference, CudaRunner(graph) as runner:
        np.testing.assert_array_equal(runner(feeds)["logits"], reference(feeds)["logits"])
        assert runner.device_milliseconds(feeds, 0.01, 0).size
        up, down = runner.transfer_milliseconds(feeds)
        assert up.size == down.size == onnxruntime_cuda.TRANSFERS
        assert not on_cpu.live
        with onnxruntime_cuda._Bound(runner, feeds) as bound:
            bound._output[...] = 0
            bound.run()
            bound.download()
            np.testing.assert_array_equal(bound._output, reference(feeds)["logits"])
    assert not on_cpu.live
