"""Images a second, over batches and over streams of an engine on a fake GPU."""

import numpy as np
import pytest

from pipeline.artifacts import TensorSpec
from pipeline.backends.runner import EngineRunner
from pipeline.contenders import HostContender
from pipeline.errors import EngineError
from pipeline.throughput import by_batch, by_streams
from tests.unit.backends.fakes import FakeCuda, Network, fake_trt

FIXED = Network((2, 3), lambda shape: shape, lambda x: 2 * x)


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda().install(monkeypatch)


@pytest.fixture
def runner(gpu):
    with EngineRunner(fake_trt(gpu, FIXED), b"plan") as runner:
        yield runner


def test_streams(gpu, runner):
    batch = np.ones((2, 3), np.float32)
    rows = by_streams("int8", runner, batch, (3, 1), 0.02)
    assert [(row.name, row.batch, row.streams, row.clock) for row in rows] == [
        ("int8", 2, 1, "host"),
        ("int8", 2, 3, "host"),
    ]
    assert all(row.images_per_second > 0 for row in rows)
    runner.close()
    assert not gpu.live


def test_memory_for_fewer_streams_than_wanted(gpu, runner, monkeypatch):
    made = []

    def twin(self, real=EngineRunner.twin):
        if len(made) == 2:
            raise EngineError("the GPU is out of memory")
        made.append(real(self))
        return made[-1]

    monkeypatch.setattr(EngineRunner, "twin", twin)
    rows = by_streams("int8", runner, np.ones((2, 3), np.float32), (1, 2, 4), 0.01)
    assert [row.streams for row in rows] == [1, 2]


def test_an_engine_that_fails_gives_everything_back(gpu, runner):
    made = []

    def twin(self=runner, real=runner.twin):
        made.append(real())
        made[-1]._context.fails = True
        return made[-1]

    runner.twin = twin
    with pytest.raises(EngineError, match="failed to run"):
        by_streams("int8", runner, np.ones((2, 3), np.float32), (1,), 0.01)
    runner.close()
    assert not gpu.live


class Sleeper:
    """Takes 1 ms an image."""

    inputs = outputs = (TensorSpec("x", ("batch", 2), "float32"),)

    def __call__(self, feeds):
        import time

        time.sleep(0.001 * len(feeds["x"]))
        return dict(feeds)

    def close(self):
        pass


@pytest.mark.parametrize("batch", [1, 4])
def test_batches(batch):
    row = by_batch("cpu", HostContender(Sleeper(), "cpu"), np.ones((1, 2), np.float32), batch, 0.05)
    assert row.batch == batch
    assert row.clock == "host"
    assert 100 < row.images_per_second < 1000
