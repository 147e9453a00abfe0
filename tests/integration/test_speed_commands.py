"""--require-speedup and what ``inspect`` says of an engine, as a user meets them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli
from pipeline.artifacts import Device, EngineManifest, sha256_bytes, to_json
from pipeline.backends.layers import parse_layers
from pipeline.config import load_config
from pipeline.errors import ModelError
from pipeline.metrics.latency import Estimate
from pipeline.reports import Accuracy, BenchmarkReport, Candidate, ValidationReport
from pipeline.run import Run
from pipeline.speed import account, judge, no_verdict
from tests.conftest import REPOSITORY

CELLS = str(REPOSITORY / "configs" / "cells.yaml")
GPU = Device("NVIDIA H200", "9.0", "580")


def report(verdict, engines=None):
    return BenchmarkReport((), {}, "cpu", 2, GPU, "2026-11-21T00:00:00Z", engines or {}, verdict, True, 12)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """``unet-trt benchmark`` in this process, on a machine whose benchmark came to a verdict."""

    def run(verdict, *arguments, runs=True):
        monkeypatch.setattr(Run, "benchmark", lambda self, precisions: report(verdict))
        monkeypatch.setattr(Run, "_runs", lambda self, precision: runs)
        command = ["unet-trt", "benchmark", "-c", CELLS, "--build-dir", str(tmp_path), *arguments]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def verdict(low):
    return judge(Estimate(low + 0.01, low, low + 0.02, 0.961), 1.0, None, None)


def test_worthwhile(call):
    code, out, _ = call(verdict(1.2), "--require-speedup")
    assert code == 0
    assert "INT8 is 1.210 ± 0.010 times FP16" in out


def test_not_worthwhile(call):
    code, out, err = call(verdict(0.9), "--require-speedup")
    assert code == 1
    assert "not worthwhile" in out
    assert "benchmark.min_speedup" in err
    assert call(verdict(0.9))[0] == 0


def test_no_engine_ran(call):
    code, _, err = call(no_verdict(1.0, "no FP16 engine runs on this machine."), "--require-speedup")
    assert code == 3
    assert "no FP16 engine" in err


def test_needs_int8(call):
    code, _, err = call(None, "--require-speedup", "-p", "fp16")
    assert code == 2
    assert "-p int8" in err


@pytest.mark.parametrize(
    ("runs", "refused", "built", "missing"),
    [
        (True, None, ["int8", "fp16"], "not here"),
        (True, "fp16", ["int8"], "a weight is beyond FP16"),
        (False, None, ["int8"], None),
    ],
)
def test_int8_brings_its_fp16_sibling(monkeypatch, tmp_path, runs, refused, built, missing):
    made, seen = [], {}

    def engine(self, precision):
        if precision == refused:
            raise ModelError("a weight is beyond FP16")
        made.append(precision)
        return tmp_path

    def stage(contestants, not_run, *rest, wants_verdict, **more):
        seen.update(not_run=not_run, wants_verdict=wants_verdict)
        (rest[-1] / "report.json").write_bytes(to_json(report(None)))

    what = SimpleNamespace(emulated=True, model_sha256="a")
    here = SimpleNamespace(capabilities=SimpleNamespace(why_not_run="not here", device=None))
    (tmp_path / "clean.onnx").write_bytes(b"")
    monkeypatch.setattr(Run, "clean", lambda self: tmp_path / "clean.onnx")
    monkeypatch.setattr(Run, "engine", engine)
    monkeypatch.setattr(Run, "_runs", lambda self, precision: runs)
    monkeypatch.setattr(Run, "_resolved", lambda self, precision: here)
    monkeypatch.setattr(Run, "_candidate", lambda self, precision, folder: (what, None))
    monkeypatch.setattr("pipeline.stages.benchmark.benchmark", stage)
    with Run(load_config(Path(CELLS)), tmp_path) as work:
        work.benchmark(["int8"])
    assert made == built
    assert seen["not_run"].get("fp16") == missing
    assert seen["wants_verdict"]


@pytest.mark.parametrize("validated", ["the same engine", "another engine", None])
def test_accuracy_is_the_last_validations_of_the_same_engine(monkeypatch, tmp_path, engine, validated):
    seen = {}

    def stage(contestants, not_run, *rest, **more):
        seen.update({each.name: each for each in contestants})
        (rest[-1] / "report.json").write_bytes(to_json(report(None)))

    sha = sha256_bytes(b"a plan")
    here = SimpleNamespace(capabilities=SimpleNamespace(why_not_run="", device=GPU))
    what = SimpleNamespace(emulated=False, model_sha256=sha, ran="tensorrt 8.6.0")
    (tmp_path / "clean.onnx").write_bytes(b"")
    monkeypatch.setattr(Run, "clean", lambda self: tmp_path / "clean.onnx")
    monkeypatch.setattr(Run, "engine", lambda self, precision: engine.parent)
    monkeypatch.setattr(Run, "_runs", lambda self, precision: True)
    monkeypatch.setattr(Run, "_resolved", lambda self, precision: here)
    monkeypatch.setattr(Run, "_candidate", lambda self, precision, folder: (what, None))
    monkeypatch.setattr("pipeline.stages.benchmark.benchmark", stage)
    with Run(load_config(Path(CELLS)), tmp_path) as work:
        if validated:
            judged = Candidate("fp32", False, "", sha if validated == "the same engine" else "other", None, None)
            found = ValidationReport(judged, True, (), (), 0.9984, None, None, 1.0, None, None, (), (), 1.0)
            target = work.folder / "validate" / "fp32" / "report.json"
            target.parent.mkdir(parents=True)
            target.write_bytes(to_json(found))
        work.benchmark(["fp32"])
    known = Accuracy(0.9984, None, True) if validated == "the same engine" else None
    assert seen["fp32"].accuracy == known
    assert seen["fp32"].build_seconds == 1.0


@pytest.mark.parametrize("command", ["run", "benchmark"])
def test_a_machine_that_runs_no_engine_says_so_at_once(project, unet_trt, tmp_path, command):
    done = unet_trt(
        command, "-c", project.config, "--backend", "onnxruntime", "--require-speedup", "--build-dir", tmp_path / "b"
    )
    assert done.code == 3, done
    assert "--require-speedup needs a machine that runs engines" in done.err
    assert "running" not in done.err


def test_benchmark_without_a_gpu_says_why_there_is_no_verdict(project, unet_trt, tmp_path):
    arguments = ["-c", project.config, "--backend", "onnxruntime", "-p", "int8", "--build-dir", tmp_path / "b"]
    done = unet_trt("benchmark", *arguments)
    assert done.code == 0, done
    assert "Whether INT8 is faster than FP16 cannot be said here" in done.out
    stored = json.loads((tmp_path / "b" / "tiny" / "benchmark" / "report.json").read_text())
    assert stored["verdict"]["worthwhile"] is None
    assert not (tmp_path / "b" / "tiny" / "engine" / "fp16").exists()


def test_candidates_beside_fp32_on_a_machine_without_a_gpu(project, unet_trt, tmp_path):
    """Torch in its own process; whoever cannot run is listed with the reason."""
    chosen = "benchmark.candidates=[torch-fp32,torch-tf32,torch-compile,onnxruntime-cuda,raw-engine,polygraphy,trtexec]"
    arguments = ["-c", project.config, "--backend", "onnxruntime", "-p", "fp32", "--build-dir", tmp_path / "b"]
    limits = ["--set", "benchmark.compile_seconds=0.5", "--set", "benchmark.throughput=true"]
    done = unet_trt("benchmark", *arguments, "--set", chosen, *limits)
    assert done.code == 0, done
    stored = json.loads((tmp_path / "b" / "tiny" / "benchmark" / "report.json").read_text())
    assert [timing["name"] for timing in stored["timings"]] == ["FP32 on ONNX Runtime, CPU", "torch eager, FP32"]
    for timing in stored["timings"]:
        assert timing["agreement"] > 0.999
        assert len(timing["rounds_ms"]) == stored["rounds"]
    assert 1 in [timing["ratio"]["median"] for timing in stored["timings"]]
    assert stored["timings"][1]["ran"].startswith("torch ")
    assert [(row["batch"], row["streams"]) for row in stored["throughput"][1:]] == [(1, 1), (2, 1), (4, 1), (8, 1)]
    reasons = {
        "torch eager, TF32": "TF32 is an arithmetic of GPUs",
        "torch.compile, FP16 channels-last": "torch.compile had not finished after 0.5 s",
        "FP32 on ONNX Runtime, CUDA": "no CUDA provider",
        "raw export, fp16": "no engine runs",
        "Polygraphy": "no engine runs",
        "trtexec": "no engine runs",
    }
    for name, why in reasons.items():
        assert why in stored["not_run"][name]
        assert re.search(rf"{re.escape(name)}: not measured\..*{re.escape(why)}", done.out)
    assert "images/s" in done.out
    assert "torch eager, FP32" in done.out


def test_another_interpreter_that_is_not_there(project, unet_trt, tmp_path):
    arguments = ["-c", project.config, "--backend", "onnxruntime", "-p", "fp32", "--build-dir", tmp_path / "b"]
    done = unet_trt(
        "benchmark", *arguments, "--set", "benchmark.candidates=[torch-fp32]", "--torch-python", "no/python"
    )
    assert done.code == 0, done
    assert "torch eager, FP32: not measured. there is no interpreter no/python" in done.out
    done = unet_trt("benchmark", *arguments, "--torch-python", "python3")
    assert done.code == 2, done
    assert "candidates that are not chosen" in done.err


@pytest.fixture
def engine(tmp_path):
    """An engine of another machine in a build folder, with the benchmark's report of it."""
    folder = tmp_path / "tiny" / "engine" / "int8"
    folder.mkdir(parents=True)
    plan = folder / "model.engine"
    plan.write_bytes(b"a plan")
    sha = sha256_bytes(b"a plan")
    manifest = EngineManifest(
        sha, "", None, "int8", "explicit", "tensorrt", "8.6.0", GPU, (), (), (), {}, None, 1.0, "none", "2026-11-21"
    )
    (folder / "manifest.json").write_bytes(to_json(manifest))
    data = REPOSITORY / "tests" / "data" / "layers"
    layers = parse_layers((data / "int8-explicit.json").read_text())
    times = json.loads((data / "int8-explicit.profile.json").read_text())
    measured = account(sha, layers, times, {"outc.conv": 10**9}, GPU, 0.634)
    kept = tmp_path / "tiny" / "benchmark" / "report.json"
    kept.parent.mkdir()
    kept.write_bytes(to_json(report(None, {"int8": measured})))
    return plan


def test_inspect_shows_what_the_benchmark_has_kept(engine, unet_trt):
    done = unet_trt("inspect", engine)
    assert done.code == 0, done
    assert re.search(r"time_of_layers: measured on NVIDIA H200 at 2026-11-21T00:00:00Z, as .*report\.json", done.out)
    assert "multiply-accumulates, int8: 1 G (100.0%)" in done.out
    assert "arithmetic floor: 0.0010 ms (NVIDIA H200 data sheet" in done.out
    assert "whole inference: 0.6340 ms; its layers one by one: 0.61" in done.out
    assert "NC/32HW32" in done.out
    facts = json.loads(unet_trt("inspect", engine, "--json").out)
    assert facts["backend_version"] == "8.6.0"
    assert len(facts["account"]["layers"]) == 31


def test_inspect_says_why_layers_are_not_known(engine, unet_trt):
    engine.write_bytes(b"another plan")
    (engine.parent.parent.parent / "benchmark" / "report.json").unlink()
    done = unet_trt("inspect", engine)
    assert done.code == 0, done
    assert "time_of_layers: not known here: " in done.out
    assert "not the file that its manifest describes" in done.out
    assert json.loads(unet_trt("inspect", engine, "--json").out)["account"] is None


def test_inspect_does_not_show_the_layers_of_another_build(engine, unet_trt):
    manifest = engine.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(sha256_bytes(b"a plan"), sha256_bytes(b"built again")))
    engine.write_bytes(b"built again")
    assert "time_of_layers: not known here: " in unet_trt("inspect", engine).out
