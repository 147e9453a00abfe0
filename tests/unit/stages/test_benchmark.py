"""The benchmark stage on engines made of numbers: turns, accounts, verdict, and how the page shows them."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import Device, TensorSpec, from_json
from pipeline.config import BenchmarkConfig
from pipeline.errors import EngineError
from pipeline.reports import BenchmarkReport
from pipeline.stages.benchmark import Contestant, benchmark
from pipeline.stages.report import environment
from tests.tiny_unet import save, tiny_unet

DATA = Path(__file__).parent.parent.parent / "data" / "layers"
CONFIG = BenchmarkConfig(seconds=0.001, warmup_seconds=0.0, rounds=6)
H200 = Device("NVIDIA H200", "9.0", "580")
ON_GPU = "GPU, CUDA events"


class FakeEngine:
    """Takes ``ms``; its layers are those of a real engine."""

    inputs = (TensorSpec("image", (1, 3, 32, 32), "float32"),)

    def __init__(self, ms, layers, *, profiles=True):
        self.ms, self.name, self.profiles, self.captured, self.closed = ms, layers, profiles, True, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def __call__(self, feeds):
        return {}

    def device_milliseconds(self, feeds, seconds, warmup_seconds):
        return np.full(3, self.ms)

    def profile(self, feeds):
        if not self.profiles:
            raise EngineError("the engine reports no layer's time")
        return json.loads((DATA / f"{self.name}.profile.json").read_text())

    def layers(self):
        return (DATA / f"{self.name}.json").read_text()


def run(folder, engines, *, not_run=None, wants_verdict=True, config=CONFIG):
    contestants = [
        Contestant(name, ON_GPU, 1000, lambda engine=engine: engine, name, name * 16)
        for name, engine in engines.items()
    ]
    contestants.insert(0, Contestant("FP32", "host, with copies", 5, lambda: FakeEngine(0, "")))
    report = benchmark(
        contestants,
        not_run or {},
        lambda runner: {"image": np.zeros((1, 3, 32, 32), np.float32)},
        H200,
        config,
        folder,
        graph=save(tiny_unet(), folder / "clean.onnx"),
        wants_verdict=wants_verdict,
    )
    assert from_json(BenchmarkReport, folder / "report.json") == report
    return report


def test_int8_that_is_faster(tmp_path):
    engines = {"fp16": FakeEngine(1.2, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")}
    report = run(tmp_path, engines)
    assert report.verdict.worthwhile
    assert report.verdict.sentence.startswith("INT8 is 1.200 ± 0.000 times FP16")
    assert set(report.engines) == {"fp16", "int8"}
    assert report.engines["int8"].engine_sha256 == "int8" * 16
    assert [t.median_ms.median if t.median_ms else None for t in report.timings] == [None, 1.2, 1.0]
    assert report.timings[1].cuda_graph
    assert report.settled
    assert all(engine.closed for engine in engines.values())


@pytest.mark.parametrize(("int8", "least"), [(1.0, 1.0), (1.1, 1.0), (0.8, 1.4)])
def test_int8_that_is_not_worthwhile(tmp_path, int8, least):
    engines = {"fp16": FakeEngine(1.0, "fp16"), "int8": FakeEngine(int8, "int8-explicit")}
    report = run(tmp_path, engines, config=CONFIG.model_copy(update={"min_speedup": least}))
    assert report.verdict.worthwhile is False
    assert "requantized" in " ".join(report.verdict.reasons)


def test_without_a_gpu_it_says_why(tmp_path):
    report = run(tmp_path, {}, not_run={"int8": "this machine has no GPU"})
    assert report.verdict.worthwhile is None
    assert (
        "cannot be said here: no INT8 engine runs on this machine. this machine has no GPU" in report.verdict.sentence
    )
    assert report.settled is None
    assert report.engines == {}


def test_int8_alone_says_what_is_missing(tmp_path):
    report = run(tmp_path, {"int8": FakeEngine(1, "int8-explicit")}, not_run={"fp16": "a weight is beyond FP16"})
    assert report.verdict.worthwhile is None
    assert "no FP16 engine runs on this machine. a weight is beyond FP16" in report.verdict.sentence


def test_without_int8_there_is_no_verdict(tmp_path):
    assert run(tmp_path, {"fp16": FakeEngine(1, "fp16")}, wants_verdict=False).verdict is None


def test_an_engine_that_cannot_be_profiled_is_still_timed(tmp_path):
    engines = {"fp16": FakeEngine(1.2, "fp16"), "int8": FakeEngine(1.0, "int8-explicit", profiles=False)}
    report = run(tmp_path, engines)
    assert report.verdict.worthwhile
    assert report.verdict.reasons == ()
    assert set(report.engines) == {"fp16"}
    assert report.notes == ("int8: the time of its layers is not known: the engine reports no layer's time",)


def page(report):
    """The part of the page that tells of speed."""
    return environment().get_template("speed.html.j2").render(benchmark=report)


def test_page(tmp_path):
    html = page(run(tmp_path, {"fp16": FakeEngine(1.2, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")}))
    assert "INT8 is 1.200 ± 0.000 times FP16" in html
    assert "1.200 to 1.200 ms (97 %)" in html
    assert html.count('<div class="bar">') == 2
    assert html.count("<details>") == 2
    assert "inc.double_conv.3.concat.quantize_clone_0" in html
    assert "sm90_xmma_fprop_implicit_gemm" in html
    for outside in ("http://", "https://", "src="):
        assert outside not in html


def test_page_without_a_gpu(tmp_path):
    html = page(run(tmp_path, {}, not_run={"int8": "no GPU"}))
    assert "cannot be said here" in html
    assert "Where the time goes" not in html
