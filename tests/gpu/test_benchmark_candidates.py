"""On a GPU: what rivals an engine takes turns with it, and energy, memory, batches and streams are measured.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones. Torch candidates run in the
interpreter that the environment variable TORCH_PYTHON names, or in this one.
"""

import functools
import os
import time

import numpy as np
import pytest

from pipeline.artifacts import from_json
from pipeline.backends import cuda
from pipeline.backends.nvml import Gauge
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import Config, EngineConfig, ProfileRange
from pipeline.contenders import GpuContender
from pipeline.engines import load_engine
from pipeline.errors import PipelineError, UnsupportedError
from pipeline.metrics.interleaving import interleave
from pipeline.reports import BenchmarkReport
from pipeline.rivals import TORCH, Built, line_up
from pipeline.stages.benchmark import benchmark
from pipeline.stages.engine import build_engine
from pipeline.throughput import by_streams
from pipeline.torch_process import TorchProcess, Variant, torch_python
from tests.tiny_unet import CLASSES, SIZE, images, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

TORCH_PYTHON = os.environ.get("TORCH_PYTHON")
BATCHES = {"batch": ProfileRange(min=1, opt=2, max=4)}
CONFIG = Config.model_validate(
    {
        "name": "tiny",
        # Not the tiny network of ONNX nodes, but one of the same input and output.
        "network": {
            "factory": "tests.seeded:seeded_unet",
            "arguments": {"in_channels": 3, "classes": CLASSES, "base_channels": 8},
        },
        "data": {"kind": "cells", "classes": [{"name": name, "colour": [9, 9, 9]} for name in "abc"[:CLASSES]]},
        "preprocessing": {"height": SIZE, "width": SIZE, "channels": "rgb"},
        "benchmark": {
            "seconds": 0.3,
            "warmup_seconds": 0.1,
            "rounds": 6,
            "candidates": ["torch-fp32", "torch-tf32", "torch-fp16", "onnxruntime-cuda", "polygraphy", "trtexec"],
            "torch_python": TORCH_PYTHON,
            "throughput": True,
            "batches": [1, 2, 4],
            "streams": [1, 2],
        },
    }
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The clean graph, and an FP16 engine of it for batches of 1 to 4."""
    root = tmp_path_factory.mktemp("build")
    clean = save(tiny_unet("batch"), root / "clean.onnx")
    settings = EngineConfig(backend="tensorrt", workspace_mib=1024, optimization_level=0, profile=BATCHES)
    build_engine(clean, "fp16", settings, None, None, None, root / "fp16", None)
    return root


@pytest.fixture
def plan(build):
    return build / "fp16" / "model.engine"


@pytest.fixture
def torch_process(build):
    """Starts a torch candidate; the test is skipped where there is no torch that sees the GPU."""
    opened = []

    def start(variant, **limits):
        try:
            python = torch_python(TORCH_PYTHON)
            with load_engine(build / "fp16" / "model.engine") as runner:
                (source,) = runner.inputs
            opened.append(
                TorchProcess(
                    python,
                    CONFIG.network,
                    variant,
                    source,
                    CONFIG.preprocessing,
                    CONFIG.clean,
                    wants_gpu=True,
                    **limits,
                )
            )
        except UnsupportedError as error:
            pytest.skip(f"{error.problem} (TORCH_PYTHON names an interpreter)")
        return opened[-1]

    yield start
    for contender in opened:
        contender.close()


def feed(spec):
    (feeds,) = images(1, batch=spec.shape[0] if isinstance(spec.shape[0], int) else 1)
    return feeds["image"]


def test_all_candidates(build, plan):
    built = [Built("fp16", plan, f"tensorrt {KNOWN.version}", functools.partial(load_engine, plan), "fp16")]
    contest = line_up(CONFIG, build / "clean.onnx", built, wants_gpu=True)
    folder = build / "benchmark"
    folder.mkdir()
    report = benchmark(
        contest.contestants,
        contest.absent,
        feed,
        cuda.current_device(),
        CONFIG.benchmark,
        folder,
        graph=build / "clean.onnx",
        wants_verdict=False,
        own_clocks=contest.own_clocks,
    )
    assert from_json(BenchmarkReport, folder / "report.json") == report
    timings = {timing.name: timing for timing in report.timings}
    figures = {f"{figure.tool.partition(' ')[0]}, {figure.name}" for figure in report.own_figures}
    everybody = {"FP32 on ONNX Runtime, CPU", "fp16", "FP32 on ONNX Runtime, CUDA", "Polygraphy, fp16", "trtexec, fp16"}
    everybody |= {TORCH[name][0] for name in ("torch-fp32", "torch-tf32", "torch-fp16")}
    assert set(timings) | figures | set(report.not_run) == everybody
    assert all(report.not_run.values())
    engine = timings["fp16"]
    assert engine.cuda_graph
    assert engine.device.p50_ms < engine.end_to_end.p50_ms
    assert engine.agreement > 0.95
    assert engine.gpu_bytes > 0
    assert engine.build_seconds > 0
    alone = sum(timing.device is not None for timing in report.timings) == 1
    for timing in report.timings:
        if timing.name == "FP32 on ONNX Runtime, CPU":
            assert timing.device is None
            continue
        assert timing.to_gpu.p50_ms > 0
        assert timing.from_gpu.p50_ms > 0
        assert len(timing.rounds_ms) == 6
        if alone:
            assert timing.ratio is None
        else:
            assert timing.ratio.low <= timing.ratio.median <= timing.ratio.high
        assert timing.device.p50_ms <= timing.device.p90_ms <= timing.device.p99_ms
    assert alone or 1 in [timing.ratio.median for timing in report.timings if timing.ratio]
    of_engine = [row for row in report.throughput if row.name == "fp16"]
    assert [row.batch for row in of_engine if row.clock == "GPU"] == [1, 2, 4]
    assert [row.streams for row in of_engine if row.clock == "host"] == [1, 2]
    assert all(row.images_per_second > 0 for row in report.throughput)
    metered = any(timing.sm_mhz for timing in report.timings)
    assert metered != any("energy and clocks: not measured" in note for note in report.notes)
    assert not any("throughput is not known" in note for note in report.notes)


def test_a_gauge_reads_this_gpu(plan):
    try:
        gauge = Gauge()
    except UnsupportedError as error:
        pytest.skip(error.problem)
    with gauge, GpuContender(functools.partial(load_engine, plan), "tensorrt") as contender:
        before = gauge.read()
        contender.feed(feed(contender.at(4)))
        contender.gpu_milliseconds(0.5, 0.1)
        after = gauge.read()
    assert after.sm_mhz is None or 100 < after.sm_mhz < 5000
    if before.joules is not None:
        assert 1 < after.joules - before.joules < 2000


def test_memory_of_an_engine_is_given_back(plan):
    with GpuContender(functools.partial(load_engine, plan), "tensorrt") as contender:
        contender.feed(feed(contender.at(1)))
        assert contender.takes(4)
        assert not contender.takes(5)
        (image,) = images(1)
        before = cuda.free_memory()[0]
        rows = by_streams("fp16", contender.runner, image["image"], (1, 2, 3), 0.1)
        assert [row.streams for row in rows] == [1, 2, 3]
        assert before - cuda.free_memory()[0] < 32 << 20


def test_torch_and_an_engine_take_turns(torch_process, plan):
    torch = torch_process(Variant("fp16"))
    with GpuContender(functools.partial(load_engine, plan), "tensorrt") as engine:
        contenders = {"engine": engine, "torch": torch}
        for contender in contenders.values():
            contender.feed(feed(contender.at(1)))
        turns = {
            name: functools.partial(contender.gpu_milliseconds, 0.05, 0.01) for name, contender in contenders.items()
        }
        found = interleave(turns, 6)
    assert torch.on_gpu
    assert found.ratio("torch", "engine").median > 1
    up, down = torch.transfers()
    assert (up > 0).all()
    assert (down > 0).all()
    assert torch.gpu_bytes > 0
    assert torch.host_milliseconds(0.05, 0).min() > np.median(found.samples["torch"]) / 10


def test_precisions_of_torch_compute_the_same(torch_process):
    outputs = []
    for precision in ("fp32", "tf32", "fp16"):
        contender = torch_process(Variant(precision))
        outputs.append(contender.feed(feed(contender.at(2))))
    exact, *others = outputs
    for output in others:
        assert 0 < np.abs(output - exact).max() < 0.05 * np.abs(exact).max()


def test_torch_compile_is_stopped_at_its_time_limit(torch_process):
    contender = torch_process(Variant("fp16", "max-autotune"), first_seconds=1.0)
    began = time.monotonic()
    with pytest.raises(PipelineError, match=r"torch\.compile had not finished after 1 s"):
        contender.feed(feed(contender.at(1)))
    assert time.monotonic() - began < 15
