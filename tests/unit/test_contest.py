"""Choices of mixed precision in turns on a GPU, by stand-ins for engines."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import contest
from pipeline.artifacts import TensorSpec
from pipeline.config import BenchmarkConfig
from pipeline.errors import EngineError


class Engine:
    """An inference takes a millisecond for every convolution in FP16."""

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


def test_each_is_built_and_timed(engines):
    choices = {"int8": (), "one": ("head",), "two": ("head", "down0")}
    times = contest.time_choices(choices, build, feed, CONFIG)
    assert {name: time.median for name, time in times.items()} == {"int8": 1.0, "one": 2.0, "two": 3.0}
    assert all(engine.closed for engine in engines)


def test_a_choice_that_cannot_be_built(engines):
    def refuse(half, folder):
        if half:
            raise EngineError("no")
        build(half, folder)

    with pytest.raises(EngineError):
        contest.time_choices({"int8": (), "one": ("head",)}, refuse, feed, CONFIG)
    assert engines == []


def test_a_choice_that_cannot_be_loaded_closes_the_others(engines, monkeypatch):
    load = contest.load_engine

    def refuse(plan):
        if plan.read_text() == "1":
            raise EngineError("no")
        return load(plan)

    monkeypatch.setattr(contest, "load_engine", refuse)
    with pytest.raises(EngineError):
        contest.time_choices({"int8": (), "one": ("head",)}, build, feed, CONFIG)
    assert [engine.closed for engine in engines] == [True]
