"""EngineRunner on a fake GPU: memory, shapes, errors, timing."""

import numpy as np
import pytest

from pipeline.artifacts import Profile
from pipeline.backends.layers import parse_layers
from pipeline.backends.runner import EngineRunner
from pipeline.errors import EngineError
from tests.unit.backends.fakes import FakeCuda, fake_trt


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda().install(monkeypatch)


def feed(rows):
    return {"x": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)}


def test_runs_and_returns_arrays_of_the_callers(gpu):
    with EngineRunner(fake_trt(gpu), b"plan") as runner:
        first = runner(feed(1))["y"]
        second = runner({"x": np.full((1, 2), 5, np.float32)})["y"]
    assert first.tolist() == [[0, 2]]
    assert second.tolist() == [[10, 10]]


def test_names_of_free_axes_come_from_the_manifest(gpu):
    runner = EngineRunner(fake_trt(gpu), b"plan", axes={"x": ("batch", 2)})
    assert runner.inputs[0].shape == ("batch", 2)
    assert runner.outputs[0].shape == ("y_0", 2)
    assert runner.profiles == {"x": Profile((1, 2), (2, 2), (4, 2))}


def test_memory_is_reused_grows_and_is_freed(gpu):
    runner = EngineRunner(fake_trt(gpu), b"plan")
    for rows in (2, 2, 1, 2):
        assert runner(feed(rows))["y"].shape == (rows, 2)
    assert gpu.calls["cudaMalloc"] == 2
    assert np.array_equal(runner(feed(4))["y"], 2 * feed(4)["x"])
    assert gpu.calls["cudaMalloc"] == 4
    assert len(gpu.live) == 2
    runner.close()
    runner.close()
    assert not gpu.live
    assert gpu.calls["cudaStreamDestroy"] == 1
    with pytest.raises(ValueError, match="closed"):
        runner(feed(1))


def test_shape_outside_of_the_profile(gpu):
    with EngineRunner(fake_trt(gpu), b"plan") as runner, pytest.raises(EngineError) as caught:
        runner(feed(5))
    assert "(1, 2) to (4, 2)" in caught.value.expected
    assert caught.value.got == "(5, 2)"


def test_wrong_feeds_are_programming_errors(gpu):
    with EngineRunner(fake_trt(gpu), b"plan") as runner:
        with pytest.raises(ValueError, match="float32"):
            runner({"x": np.zeros((1, 2))})
        with pytest.raises(ValueError, match="inputs"):
            runner({"z": np.zeros((1, 2), np.float32)})


def test_failed_execution(gpu):
    trt = fake_trt(gpu)
    with EngineRunner(trt, b"plan") as runner:
        trt.context.fails = True
        with pytest.raises(EngineError, match="failed to run"):
            runner(feed(1))


def test_out_of_memory_then_a_smaller_shape(gpu):
    gpu.memory_left = 16
    with EngineRunner(fake_trt(gpu), b"plan") as runner:
        runner(feed(2))
        with pytest.raises(EngineError, match="out of memory"):
            runner(feed(4))
        assert runner(feed(2))["y"].tolist() == [[0, 2], [4, 6]]


def test_unreadable_plan_names_the_reason(gpu):
    with pytest.raises(EngineError, match=r"Fake GPU, compute capability 8\.6.*magic tag"):
        EngineRunner(fake_trt(gpu, loads=False), b"plan")


@pytest.mark.parametrize(("refuse", "milliseconds"), [(False, 2.0), (True, 3.0)])
def test_device_milliseconds(gpu, refuse, milliseconds):
    gpu.refuse_capture = refuse
    with EngineRunner(fake_trt(gpu), b"plan") as runner:
        times = runner.device_milliseconds(feed(2), 0.01, 0.0)
        assert runner.captured is not refuse
        assert runner(feed(2))["y"].shape == (2, 2)
    assert times.dtype == np.float64
    assert set(times) == {milliseconds}
    assert gpu.calls["cudaEventCreateWithFlags"] == gpu.calls["cudaEventDestroy"]
    assert gpu.calls["cudaGraphExecDestroy"] == (0 if refuse else 1)


def test_transfer_milliseconds(gpu):
    with EngineRunner(fake_trt(gpu), b"plan") as runner:
        there, back = runner.transfer_milliseconds(feed(2), repeats=3)
    assert there.shape == back.shape == (3,)


def test_profile_names_layers_as_the_inspector_does_and_ends(gpu):
    trt = fake_trt(gpu)
    with EngineRunner(trt, b"plan") as runner:
        times = runner.profile(feed(2), runs=5)
        assert times == {"double + relu": 2.0, "copy": 0.5}
        assert [layer.name for layer in parse_layers(runner.layers())] == list(times)
        assert trt.context.created == 2
        assert runner(feed(2))["y"].tolist() == [[0, 2], [4, 6]]
        assert trt.context.profiler is None
        assert set(runner.device_milliseconds(feed(2), 0.01, 0.0)) == {2.0}
        assert runner.captured


def test_a_profile_that_fails_leaves_the_runner_usable(gpu):
    trt = fake_trt(gpu)
    with EngineRunner(trt, b"plan") as runner:
        runner(feed(2))
        trt.context.fails = True
        with pytest.raises(EngineError, match="failed to run"):
            runner.profile(feed(2))
        trt.context.fails = False
        assert runner(feed(1))["y"].tolist() == [[0, 2]]
