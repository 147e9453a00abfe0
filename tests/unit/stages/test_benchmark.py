"""The benchmark stage on engines made of numbers: turns, accounts, verdict, and how the page shows them."""

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.artifacts import Device, Profile, TensorSpec, from_json
from pipeline.backends import nvml
from pipeline.backends.nvml import Reading
from pipeline.config import BenchmarkConfig
from pipeline.contenders import GpuContender, HostContender
from pipeline.contest import Contestant
from pipeline.errors import EngineError, UnsupportedError
from pipeline.presenting import cost_row, throughput_row, timing_row
from pipeline.reports import Accuracy, BenchmarkReport, OwnFigure
from pipeline.stages.benchmark import benchmark
from pipeline.stages.report import environment
from tests.tiny_unet import save, tiny_unet

DATA = Path(__file__).parent.parent.parent / "data" / "layers"
CONFIG = BenchmarkConfig(seconds=0.001, warmup_seconds=0.0, rounds=6)
H200 = Device("NVIDIA H200", "9.0", "580")


class FakeEngine:
    """Takes ``ms`` an image, one number or one by one; its layers are those of a real engine."""

    def __init__(self, ms, layers="", *, profiled=True, lives=10**9, batches=(1, 1), classes=0):
        self.ms, self.name, self.profiled, self.captured, self.closed = ms, layers, profiled, True, False
        self.lives, self.batches, self.classes = lives, batches, classes
        self.turns = itertools.cycle(ms if isinstance(ms, list) else [ms])
        batch = "batch" if batches[1] > 1 else 1
        self.inputs = (TensorSpec("image", (batch, 3, 32, 32), "float32"),)
        self.outputs = (TensorSpec("labels", (batch, 32, 32), "uint8"),)
        shapes = [(size, 3, 32, 32) for size in (batches[0], *batches)]
        self.profiles = {"image": Profile(*shapes)} if batches[1] > 1 else {}

    def close(self):
        assert not self.closed
        self.closed = True

    def __call__(self, feeds):
        labels = np.zeros((len(feeds["image"]), 32, 32), np.uint8)
        labels[:, 0, : self.classes] = 1
        return {"labels": labels}

    def device_milliseconds(self, feeds, seconds, warmup_seconds):
        self.lives -= 1
        if self.lives < 0:
            raise UnsupportedError("the process ended", fix="look after it")
        return np.full(3, next(self.turns) * len(feeds["image"]))

    def transfer_milliseconds(self, feeds):
        return np.full(4, 0.2), np.full(4, 0.1)

    def profile(self, feeds):
        if not self.profiled:
            raise EngineError("the engine reports no layer's time")
        return json.loads((DATA / f"{self.name}.profile.json").read_text())

    def layers(self):
        return (DATA / f"{self.name}.json").read_text()


def on_gpu(name, engine, precision=None, **more):
    opens = functools.partial(GpuContender, lambda: engine, f"ran {name}")
    return Contestant(name, opens, 1000, precision, name * 16, **more)


def run(folder, engines, *, rivals=(), not_run=None, wants_verdict=True, config=CONFIG, own_clocks=None):
    contestants = [Contestant("FP32", lambda: HostContender(FakeEngine(0), "ran FP32"), 5)]
    contestants += [on_gpu(name, engine, name) for name, engine in engines.items()]
    report = benchmark(
        [*contestants, *rivals],
        not_run or {},
        lambda spec: np.zeros((spec.shape[0] if isinstance(spec.shape[0], int) else 1, 3, 32, 32), np.float32),
        H200,
        config,
        folder,
        graph=save(tiny_unet(), folder / "clean.onnx"),
        wants_verdict=wants_verdict,
        own_clocks=own_clocks,
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
        "cannot be said here: no INT8 engine runs on this machine (this machine has no GPU" in report.verdict.sentence
    )
    assert report.settled is None
    assert report.engines == {}


def test_int8_alone_says_what_is_missing(tmp_path):
    report = run(tmp_path, {"int8": FakeEngine(1, "int8-explicit")}, not_run={"fp16": "a weight is beyond FP16"})
    assert report.verdict.worthwhile is None
    assert "no FP16 engine runs on this machine (a weight is beyond FP16" in report.verdict.sentence


def test_without_int8_there_is_no_verdict(tmp_path):
    assert run(tmp_path, {"fp16": FakeEngine(1, "fp16")}, wants_verdict=False).verdict is None


def test_an_engine_that_cannot_be_profiled_is_still_timed(tmp_path):
    engines = {"fp16": FakeEngine(1.2, "fp16"), "int8": FakeEngine(1.0, "int8-explicit", profiled=False)}
    report = run(tmp_path, engines)
    assert report.verdict.worthwhile
    assert report.verdict.reasons == ()
    assert set(report.engines) == {"fp16"}
    assert "int8: the time of its layers is not known: the engine reports no layer's time" in report.notes


def test_who_is_not_an_engine_takes_turns_with_them(tmp_path):
    known = Accuracy(0.999, 0.71, True)
    torch = on_gpu("torch", FakeEngine(3.0, classes=8), required=False, accuracy=known, build_seconds=7.0)
    report = run(tmp_path, {"fp16": FakeEngine(1.5, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")}, rivals=[torch])
    by_name = {timing.name: timing for timing in report.timings}
    assert list(by_name) == ["FP32", "fp16", "int8", "torch"]
    assert [by_name[name].ratio.median for name in ("fp16", "int8", "torch")] == [1.5, 1.0, 3.0]
    assert by_name["FP32"].ratio is None
    torch = by_name["torch"]
    assert torch.rounds_ms == (3.0,) * 6
    assert (torch.ratio.low, torch.ratio.high) == (3.0, 3.0)
    assert (torch.to_gpu.p50_ms, torch.from_gpu.p50_ms) == (0.2, 0.1)
    assert (torch.ran, torch.build_seconds, torch.accuracy) == ("ran torch", 7.0, known)
    assert torch.agreement == 1 - 8 / 32**2
    assert set(report.engines) == {"fp16", "int8"}
    assert "no candidate's median moves by more than 0.5%" in report.warm_up
    assert report.warm_ups == 2
    assert report.environment["numpy"] == np.__version__
    assert any(note.startswith("energy and clocks: not measured. ") for note in report.notes)


@pytest.mark.parametrize("lives", [0, 1, 9])
def test_a_rival_that_falls_out_is_named_and_the_others_go_on(tmp_path, lives):
    engines = {"fp16": FakeEngine(1.2, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")}
    falls = FakeEngine(0.5, lives=lives)
    report = run(tmp_path, engines, rivals=[on_gpu("torch", falls, required=False)])
    assert report.not_run == {"torch": "the process ended; look after it"}
    assert [timing.name for timing in report.timings] == ["FP32", "fp16", "int8"]
    assert report.timings[1].ratio.median == 1.2
    assert falls.closed


def test_a_rival_that_cannot_be_loaded_is_named(tmp_path):
    def opens():
        raise UnsupportedError("no torch here")

    report = run(tmp_path, {"fp16": FakeEngine(1, "fp16")}, rivals=[Contestant("torch", opens, required=False)])
    assert report.not_run == {"torch": "no torch here"}


def test_an_engine_that_was_asked_for_and_fails_ends_it(tmp_path):
    engines = {"fp16": FakeEngine(1, "fp16", lives=3), "int8": FakeEngine(1, "int8-explicit")}
    with pytest.raises(UnsupportedError, match="the process ended"):
        run(tmp_path, engines)
    assert not (tmp_path / "report.json").exists()
    assert all(engine.closed for engine in engines.values())


def test_candidates_on_the_cpu_take_turns_among_themselves(tmp_path):
    torch = Contestant("torch", lambda: HostContender(FakeEngine(0), "cpu"), required=False)
    report = run(tmp_path, {}, rivals=[torch], not_run={"int8": "no GPU"})
    assert [len(timing.rounds_ms) for timing in report.timings] == [6, 6]
    assert 1 in [timing.ratio.median for timing in report.timings]
    assert [timing.median_ms for timing in report.timings] == [None, None]


def test_latencies_that_spread_are_a_warning(tmp_path, monkeypatch):
    # On a busy machine the real clock moves too, which is another warning.
    monkeypatch.setattr("pipeline.contenders.host_milliseconds", lambda *_: np.full(3, 1.0))
    report = run(tmp_path, {"fp16": FakeEngine([1.0, 1.2, 1.4, 1.3, 1.1], "fp16")})
    assert any(warning.startswith("GPU: the latencies had not settled after 12 turns") for warning in report.warnings)
    assert any(warning.startswith("fp16: its rounds spread by ±") for warning in report.warnings)
    assert run(tmp_path, {"fp16": FakeEngine(1.0, "fp16")}).warnings == ()


class FakeGauge:
    """Of a GPU that takes 1 J a turn, and whose clock falls at the end."""

    def __init__(self):
        self.reads = 0

    def read(self):
        self.reads += 1
        slow = self.reads > 40
        return Reading(1500 if slow else 1980, self.reads, ("power cap",) if slow else ())

    def close(self):
        self.reads = -1


def test_energy_and_clocks(tmp_path, monkeypatch):
    gauge, ticks = FakeGauge(), itertools.count()
    monkeypatch.setattr(nvml, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.0025))
    monkeypatch.setattr("pipeline.stages.benchmark.Gauge", lambda: gauge)
    report = run(tmp_path, {"fp16": FakeEngine(2.0, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")})
    for timing, ms in zip(report.timings[1:], (2.0, 1.0), strict=True):
        assert timing.watts == pytest.approx(400)
        assert timing.joules == pytest.approx(0.4 * ms)
        assert timing.sm_mhz == (1500, 1980)
    assert report.timings[0].watts is None
    assert "the GPU's clock moved between 1500 and 1980 MHz" in report.warnings
    assert "the GPU held its clocks down: power cap" in report.warnings
    assert gauge.reads == -1


def test_throughput_of_the_batches_that_a_candidate_takes(tmp_path):
    config = CONFIG.model_copy(update={"throughput": True, "batches": (1, 2, 4, 8)})
    engines = {"fp16": FakeEngine(2.0, "fp16", batches=(1, 4)), "int8": FakeEngine(1.0, "int8-explicit")}
    report = run(tmp_path, engines, config=config)
    rows = [(row.name, row.batch, row.images_per_second) for row in report.throughput if row.clock == "GPU"]
    assert rows == [("fp16", 1, 500), ("fp16", 2, 500), ("fp16", 4, 500), ("int8", 1, 1000)]
    assert [(row.name, row.batch, row.streams) for row in report.throughput if row.clock == "host"] == [("FP32", 1, 1)]


def test_other_programs_figures(tmp_path):
    def says(name, feeds, seconds, warmup_seconds):
        assert feeds["image"].shape == (1, 3, 32, 32)
        return OwnFigure("trtexec", name, "GPU compute time", 1.01, 300)

    def refuses(name, feeds, seconds, warmup_seconds):
        raise UnsupportedError("there is no trtexec", fix="put it on PATH")

    clocks = {("trtexec", "int8"): says, ("trtexec", "fp16"): refuses, ("trtexec", "fp32"): says}
    engines = {"fp16": FakeEngine(2.0, "fp16"), "int8": FakeEngine(1.0, "int8-explicit")}
    report = run(tmp_path, engines, own_clocks=clocks)
    assert report.own_figures == (OwnFigure("trtexec", "int8", "GPU compute time", 1.01, 300),)
    assert report.not_run == {"trtexec, fp16": "there is no trtexec; put it on PATH"}
    html = page(report)
    assert "What other programs say" in html
    assert "1.010 ms" in html


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


def test_page_and_terminal_with_rivals(tmp_path):
    config = CONFIG.model_copy(update={"throughput": True})
    torch = on_gpu("torch", FakeEngine(3.0), required=False, accuracy=Accuracy(1.0, 0.7123, True), build_seconds=81.2)
    report = run(tmp_path, {"fp16": FakeEngine(1.0, "fp16")}, rivals=[torch], config=config, wants_verdict=False)
    rows = [row(timing) for timing in report.timings for row in (timing_row, cost_row)]
    terminal = " ".join(itertools.chain(*rows, *map(throughput_row, report.throughput)))
    for text in (page(report), terminal):
        for figure in ("3.00 (3.00 to 3.00)", "81.2", "0.7123", "ran torch", "333.3"):
            assert figure in text
