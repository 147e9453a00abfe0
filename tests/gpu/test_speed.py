"""On a GPU: layers and their times, interleaved timing, and the verdict on a small UNet.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones.
"""

import functools
import json

import numpy as np
import pytest

from pipeline.artifacts import from_json
from pipeline.backends import cuda
from pipeline.backends.layers import parse_layers
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import BenchmarkConfig, EngineConfig, ProfileRange
from pipeline.contenders import GpuContender
from pipeline.contest import Contestant
from pipeline.engines import load_engine
from pipeline.graph.cost import convolution_macs, operators
from pipeline.inspection import inspect_file
from pipeline.metrics.interleaving import interleave
from pipeline.reports import BenchmarkReport
from pipeline.speed import account_for
from pipeline.stages.benchmark import benchmark
from pipeline.stages.engine import build_engine
from tests.tiny_unet import SIZE, images, observed_table, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

CONFIG = BenchmarkConfig(seconds=0.5, warmup_seconds=0.1, rounds=8)
BATCHES = {"batch": ProfileRange(min=1, opt=2, max=4)}


# TensorRT 8.6.0 fails on small INT8 networks at level 1 ("Assertion engine failed", refitUtils.cpp); 0 and 3 build.
def settings(**changes):
    return EngineConfig(backend="tensorrt", workspace_mib=1024, **{"optimization_level": 0, **changes})


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder as a run makes it: clean/model.onnx and engine/<precision>/."""
    root = tmp_path_factory.mktemp("build")
    (root / "clean").mkdir()
    clean = save(tiny_unet(), root / "clean" / "model.onnx")
    table = observed_table(tiny_unet(), images(8))
    for precision in ("fp16", "int8"):
        # FP16 networks also have an explicit route; this TensorRT decides.
        folder = root / "engine" / precision
        folder.parent.mkdir(exist_ok=True)
        build_engine(clean, precision, settings(), table, "c" * 64, None, folder, None)
    return root


def plan(build, precision):
    return build / "engine" / precision / "model.engine"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_account(build, precision):
    (feeds,) = images(1)
    with load_engine(plan(build, precision)) as runner:
        before = runner(feeds)["logits"]
        whole = float(np.median(runner.device_milliseconds(feeds, 0.3, 0.1)))
        found = account_for(runner, feeds, tiny_unet(), "f" * 64, cuda.current_device(), whole)
        assert np.array_equal(runner(feeds)["logits"], before)
        again = float(np.median(runner.device_milliseconds(feeds, 0.3, 0.1)))
        assert runner.captured  # a profiled context is not; the runner has a fresh one
        assert again == pytest.approx(whole, rel=0.2)
    assert sum(found.macs.values()) == sum(convolution_macs(tiny_unet(), {}).values())
    assert "unknown" not in found.macs
    assert set(found.macs) <= {"int8", "fp16", "fp32"}
    timed = [layer for layer in found.layers if layer.ms]
    assert len(timed) >= len(found.layers) - sum(layer.type == "NoOp" for layer in found.layers)
    assert found.profiled_ms > 0.5 * whole
    assert {layer.group for layer in found.layers} >= {"conv", "pool"}
    if found.floor is not None:
        assert 0 < found.floor.arithmetic_ms < whole


def test_int8_layers_are_seen(build):
    with load_engine(plan(build, "int8")) as runner:
        layers = parse_layers(runner.layers(), operators(tiny_unet()))
    assert "int8" in {layer.precision for layer in layers if layer.group == "conv"}


def test_layers_of_a_dynamic_engine_have_the_sizes_of_the_last_inference(tmp_path):
    clean = save(tiny_unet("batch"), tmp_path / "clean.onnx")
    build_engine(clean, "fp16", settings(profile=BATCHES), None, None, None, tmp_path / "out", None)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        for batch in (1, 3):
            (feeds,) = images(1, batch=batch)
            found = account_for(runner, feeds, tiny_unet("batch"), "", None, 1.0)
            assert sum(found.macs.values()) == batch * sum(convolution_macs(tiny_unet(), {}).values())
            shapes = [tensor.shape for layer in found.layers for tensor in layer.inputs if tensor.name == "image"]
            assert shapes in ([], [(batch, 3, SIZE, SIZE)])
            assert runner(feeds)["logits"].shape[0] == batch


def test_one_engine_is_not_faster_than_itself(build):
    (feeds,) = images(1)
    with load_engine(plan(build, "fp16")) as a, load_engine(plan(build, "fp16")) as b:
        runners = {"a": a, "b": b}
        turns = {
            name: functools.partial(runner.device_milliseconds, feeds, 0.05, 0.01) for name, runner in runners.items()
        }
        ratio = interleave(turns, 12).ratio("a", "b")
    assert 0.97 < ratio.median < 1.03


def test_verdict(build, tmp_path):
    contestants = [
        Contestant(
            precision,
            functools.partial(GpuContender, functools.partial(load_engine, plan(build, precision)), "tensorrt"),
            plan(build, precision).stat().st_size,
            precision,
            json.loads((build / "engine" / precision / "manifest.json").read_text())["engine_sha256"],
        )
        for precision in ("fp16", "int8")
    ]
    folder = build / "benchmark"
    folder.mkdir()
    clean = build / "clean" / "model.onnx"
    report = benchmark(
        contestants,
        {},
        lambda spec: images(1)[0][spec.name],
        cuda.current_device(),
        CONFIG,
        folder,
        graph=clean,
        wants_verdict=True,
    )
    assert from_json(BenchmarkReport, folder / "report.json") == report
    assert not any("time of its layers" in note for note in report.notes)
    verdict = report.verdict
    assert verdict.worthwhile is (verdict.speedup.low > 1)
    assert 0 < verdict.speedup.low <= verdict.speedup.median <= verdict.speedup.high
    assert "GMAC run in INT8" in verdict.reasons[0]
    assert "conv" in verdict.reasons[-1]
    for timing in report.timings:
        assert timing.cuda_graph
        assert timing.median_ms.low <= timing.median_ms.median <= timing.median_ms.high
        assert timing.median_ms.median == pytest.approx(timing.device.p50_ms, rel=0.2)


def test_inspect(build):
    facts = inspect_file(plan(build, "int8"))
    assert facts["time_of_layers"] == f"measured on {KNOWN.device.name}"
    assert facts["account"]["layers"]
    assert facts["account"]["profiled_ms"] > 0
