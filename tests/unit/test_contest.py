"""Choices of mixed precision in turns on a GPU, by stand-ins for engines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline import contest
from pipeline.artifacts import TensorSpec
from pipeline.closing import Closing
from pipeline.config import BenchmarkConfig
from pipeline.errors import EngineError
from tests.tiny_unet import save, tiny_unet


class Engine(Closing):
    """An inference takes a millisecond, and one more for every convolution in FP16."""

    inputs = outputs = (TensorSpec("image", (1, 2), "float32"),)
    profiles, captured = {}, True

    def __init__(self, half: int) -> None:
        self.half, self.closed = half, False

    def close(self):
        self.closed = True

    def __call__(self, feeds):
        return feeds

    def device_milliseconds(self, feeds, seconds, warm_up):
        assert feeds["image"].shape == (1, 2)
        return np.full(3, 1.0 + self.half)

    def profile(self, feeds):
        assert feeds["image"].shape == (1, 2)
        return {"head": 2.0 + self.half}

    def layers(self):
        return json.dumps({"Layers": [{"Name": "head", "LayerType": "CaskConvolution"}]})


@pytest.fixture
def engines(monkeypatch):
    opened = []

    def load(plan):
        opened.append(Engine(int(plan.read_text())))
        return opened[-1]

    monkeypatch.setattr(contest, "load_engine", load)
    return opened


def build(half, folder):
    (folder / "model.engine").write_text(str(len(half)))


def feed(spec):
    return np.zeros(spec.shape, spec.dtype)


CONFIG = BenchmarkConfig(seconds=0.1, warmup_seconds=0)


@pytest.fixture
def graph(tmp_path):
    return save(tiny_unet(), tmp_path / "clean.onnx")


def test_each_is_built_once_and_timed(engines, graph):
    choices = {"int8": (), "one": ("head",), "two": ("head", "down0")}
    built = []

    def counted(half, folder):
        built.append(half)
        build(half, folder)

    with contest.Choices(counted, feed, CONFIG, graph) as made:
        times = made.time(choices)
        assert {name: time.median for name, time in times.items()} == {"int8": 1.0, "one": 2.0, "two": 3.0}
        assert made.time({"again": ("head",)})["again"].median == 2.0
    assert built == list(choices.values())
    assert all(engine.closed for engine in engines)


def test_a_choice_is_profiled(engines, graph):
    with contest.Choices(build, feed, CONFIG, graph) as made:
        account = made.profile(("head",), 1.5)
    assert [(layer.name, layer.ms) for layer in account.layers] == [("head", 3.0)]
    assert (account.whole_ms, account.profiled_ms) == (1.5, 3.0)
    assert engines[0].closed


def test_a_choice_that_cannot_be_built(engines, graph):
    def refuse(half, folder):
        if half:
            raise EngineError("no")
        build(half, folder)

    with contest.Choices(refuse, feed, CONFIG, graph) as made, pytest.raises(EngineError):
        made.time({"int8": (), "one": ("head",)})
    assert engines == []


def test_a_choice_that_cannot_be_loaded_closes_the_others(engines, graph, monkeypatch):
    load = contest.load_engine

    def refuse(plan):
        if plan.read_text() == "1":
            raise EngineError("no")
        return load(plan)

    monkeypatch.setattr(contest, "load_engine", refuse)
    with contest.Choices(build, feed, CONFIG, graph) as made, pytest.raises(EngineError):
        made.time({"int8": (), "one": ("head",)})
    assert [engine.closed for engine in engines] == [True]
