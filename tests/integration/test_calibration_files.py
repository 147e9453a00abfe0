"""Calibration caches as users make and bring them: ``calibrate``, ``engine --calibration-cache``, ``inspect``."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from pipeline.artifacts import ModelCard, from_json, sha256_file
from pipeline.calibration.report import CalibrationReport
from pipeline.calibration.table import CalibrationTable, read_cache
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.graph.io import load_model, write_card
from pipeline.graph.placement import activation_tensors, quantizable_tensors, shared_ranges
from pipeline.graph.promises import read_raw_names
from pipeline.stages.clean import clean
from tests.conftest import REPOSITORY, SIZE, Project, Result, write_images
from tests.integration.test_bad_input import fails, leftovers
from tests.integration.test_reuse_and_safety import ran

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX to build engines with"
)

Command = Callable[..., Result]
IMAGES = 6
OF_TENSORRT = "TRT-8502-EntropyCalibration2"
# What TensorRT's caches hold beside the graph's tensors.
UNNAMED = "(Unnamed Layer* 12) [Constant]_output: 3c010a14"
GONE = "inc.double_conv.1.gone: 3c010a14"


@dataclass(frozen=True)
class Made:
    """A clean graph whose names are not the raw export's, images, and the cache that the command made of them."""

    clean: Path
    images: Path
    cache: Path
    result: Result

    @property
    def report(self) -> CalibrationReport:
        return from_json(CalibrationReport, self.cache.with_name(f"{self.cache.name}.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, execute: Command) -> Made:
    from models.unet import UNet

    root = tmp_path_factory.mktemp("made")
    write_images(root, range(IMAGES))
    torch.manual_seed(0)
    example = (torch.zeros(1, 1, SIZE, SIZE),)
    network = UNet(1, 4, 4).eval()
    torch.onnx.export(network, example, root / "raw.onnx", dynamo=True, external_data=False, verbose=False)
    raw = onnx.load(root / "raw.onnx")
    classes = tuple(ClassConfig(name=name, colour=(0, 0, 0)) for name in "abcd")
    write_card(raw, ModelCard("tiny", PreprocessingConfig(height=SIZE, width=SIZE, channels="grey"), classes))
    onnx.save(raw, root / "raw.onnx")
    clean(root / "raw.onnx", root / "clean.onnx", None, 1e-5)
    arguments = ["calibrate", root / "clean.onnx", "--images", root / "images", "-o", root / "x.cache"]
    return Made(root / "clean.onnx", root / "images", root / "x.cache", execute(arguments, REPOSITORY))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "working")


# ---------------------------------------------------------------------- unet-trt calibrate


def test_the_cache_its_report_and_what_is_printed(made: Made) -> None:
    assert made.result.code == 0, made.result
    assert made.result.out == f"{made.cache}\n"
    for said in ("tensors", f"{IMAGES}, 0 skipped", "entropy", "cpu", f"only {IMAGES} calibration images"):
        assert said in made.result.err
    report = made.report
    assert made.cache.read_text().startswith("TRT-8600-EntropyCalibration2\n")
    assert (report.graph_sha256, report.cache_sha256) == (sha256_file(made.clean), sha256_file(made.cache))
    assert report.images == tuple(f"{seed:03d}" for seed in range(IMAGES))
    assert [entry.tensor for entry in report.tensors] == list(activation_tensors(load_model(made.clean)))
    for entry in report.tensors:
        assert entry.minimum is not None
        assert entry.maximum is not None
        assert entry.clipped is not None
        assert 0 < entry.amax <= np.float32(max(-entry.minimum, entry.maximum))
        assert 0 <= entry.clipped < 0.01
        assert entry.images == IMAGES


@pytest.mark.parametrize(
    ("algorithm", "header"),
    [
        ("minmax", "TRT-8600-MinMaxCalibration"),
        ("percentile", "TRT-8600-EntropyCalibration2"),
        ("mse", "TRT-8600-EntropyCalibration2"),
        ("auto", "TRT-8600-"),
    ],
)
def test_algorithms_and_json(tmp_path: Path, unet_trt: Command, made: Made, algorithm: str, header: str) -> None:
    cache = tmp_path / "x.cache"
    result = unet_trt(
        "calibrate", made.clean, "--images", made.images, "-o", cache, "--algorithm", algorithm, "--json", "--quiet"
    )
    assert result.code == 0, result
    assert json.loads(result.out) == json.loads((tmp_path / "x.cache.json").read_text())
    assert cache.read_text().startswith(header)
    report = from_json(CalibrationReport, tmp_path / "x.cache.json")
    assert report.image_count == IMAGES
    if algorithm == "auto":
        assert sorted(trial.algorithm for trial in report.trials) == ["entropy", "minmax", "mse", "percentile"]
        assert report.algorithm == report.trials[0].algorithm
        assert report.held_out == 1
        assert f"kept {report.algorithm}, " in result.err
    else:
        assert (report.algorithm, report.trials) == (algorithm, ())
        assert [e.amax for e in report.tensors] != [e.amax for e in made.report.tensors]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--algorithm", "nonsense"), ("--algorithm", "'nonsense'", "entropy", "minmax", "percentile", "mse", "auto")),
        (("--calibrator", "nonsense"), ("--calibrator", "'nonsense'", "cpu", "gpu", "tensorrt", "auto")),
        (
            ("--calibrator", "tensorrt", "--algorithm", "mse"),
            ("unet-trt: calibrator: tensorrt offers the algorithms entropy and minmax, not mse",),
        ),
    ],
    ids=["algorithm", "calibrator", "combination"],
)
def test_what_is_not_offered(
    tmp_path: Path, unet_trt: Command, made: Made, options: Sequence[str], parts: Sequence[str]
) -> None:
    result = unet_trt("calibrate", made.clean, "--images", made.images, "-o", tmp_path / "x.cache", *options)
    assert result.code == 2, result
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err
    assert names(tmp_path) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
@pytest.mark.parametrize("calibrator", ["gpu", "tensorrt"])
def test_calibrators_that_this_machine_lacks(tmp_path: Path, unet_trt: Command, made: Made, calibrator: str) -> None:
    arguments = ("calibrate", made.clean, "--images", made.images, "-o", tmp_path / "x.cache")
    fails(unet_trt(*arguments, "--calibrator", calibrator), 3, "TensorRT is not installed", "pip install")
    assert names(tmp_path) == []


def test_a_truncated_image(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    images = tmp_path / "images"
    shutil.copytree(made.images, images)
    bad = images / "002.png"
    bad.write_bytes(bad.read_bytes()[:200])
    arguments = ("calibrate", made.clean, "--images", images, "-o", tmp_path / "x.cache")
    fails(unet_trt(*arguments), 2, f"{bad} cannot be decoded")
    assert names(tmp_path) == ["images"]
    result = unet_trt(*arguments, "--skip-bad")
    assert result.code == 0, result
    assert "5, 1 skipped" in result.err
    report = from_json(CalibrationReport, tmp_path / "x.cache.json")
    assert (report.image_count, len(report.skipped)) == (5, 1)
    assert str(bad) in report.skipped[0]


def test_no_images_and_images_of_another_size(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    images = tmp_path / "images"
    images.mkdir()
    arguments = ("calibrate", made.clean, "--images", images, "-o", tmp_path / "x.cache")
    fails(unet_trt(*arguments), 2, f"{images} is empty")
    Image.fromarray(np.zeros((96, SIZE), np.uint8)).save(images / "tall.png")
    fails(unet_trt(*arguments), 2, "image tall does not fit", "(1, 1, 96, 64)")
    assert names(tmp_path) == ["images"]


def test_a_cache_never_takes_the_place_of_what_it_is_made_from(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    shutil.copytree(made.images, tmp_path / "images")
    shutil.copy(made.clean, tmp_path / "clean.onnx")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, message in (
        ("clean.onnx", "would overwrite what it is made from"),
        ("images/000.png", "would overwrite what it is made from"),
        ("images", "is a folder"),
    ):
        output = tmp_path / target
        result = unet_trt("calibrate", tmp_path / "clean.onnx", "--images", tmp_path / "images", "-o", output)
        fails(result, 2, f"{output} {message}", "to fix")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_ctrl_c_leaves_the_older_pair(tmp_path: Path, made: Made) -> None:
    """Comes while an image is read: the third one is a pipe that says when it is opened, and never gives a byte."""
    images = tmp_path / "images"
    write_images(tmp_path, range(40))
    (images / "002.png").unlink()
    os.mkfifo(images / "002.png")
    for name in ("x.cache", "x.cache.json"):
        shutil.copy(made.cache.with_name(name), tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in ("x.cache", "x.cache.json")}
    arguments = ["calibrate", made.clean, "--images", images, "-o", tmp_path / "x.cache", "--algorithm", "minmax"]
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    ) as process:
        writer = opened_by_its_reader(images / "002.png", process)
        time.sleep(0.5)  # until it waits in a read, which a signal ends; one just before it is noticed too late
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(writer)
    assert process.returncode == 130, err
    assert err == "unet-trt: interrupted; finished stages are kept\n"
    assert out == ""
    assert names(tmp_path) == ["images", "labels", "x.cache", "x.cache.json"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def opened_by_its_reader(pipe: Path, process: subprocess.Popen[str]) -> int:
    """The pipe's writing end, as soon as the process has opened the other."""
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads it yet
                raise
            time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def test_auto_depends_on_the_placement_that_judged_it(project: Project, unet_trt: Command) -> None:
    def calibrated(algorithm: str, qdq: str) -> bool:
        chosen = ("--set", f"calibrate.algorithm={algorithm}", "--set", f"engine.qdq={qdq}")
        return "calibrate" in ran(unet_trt("calibrate", "-c", project.config, *chosen))

    assert calibrated("auto", "convolutions")
    assert not calibrated("auto", "convolutions")
    assert calibrated("auto", "shared")
    assert calibrated("entropy", "shared")
    assert not calibrated("entropy", "convolutions")


# ---------------------------------------------------------------------- unet-trt engine --calibration-cache


def imported(unet_trt: Command, model: Path, cache: Path, target: Path) -> Result:
    explicit = ("--route", "explicit", "--backend", "tensorrt-rtx")
    return unet_trt("engine", model, "-p", "int8", "--calibration-cache", cache, "-o", target, *explicit)


def old_cache(made: Made, path: Path, *more: str, factor: float = 1.0, lack: Sequence[str] = ()) -> Path:
    """A cache as TensorRT 8.5.2 wrote it for the raw export, with ranges of its own and without some."""
    raw = read_raw_names(load_model(made.clean))
    amax = {raw.get(name, name): factor * value for name, value in read_cache(made.cache).amax.items()}
    kept = CalibrationTable("entropy", {name: value for name, value in amax.items() if name not in lack})
    path.write_text("".join([kept.to_cache(8502), *(f"{line}\n" for line in more)]))
    return path


def activation_scales(typed: Path) -> dict[str, np.ndarray]:
    """By the tensor's name; what ends in .half is the same tensor in FP16."""
    model = onnx.load(typed)
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node.input for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {source.removesuffix(".half"): fixed[scale] for source, scale, _ in pairs if source not in fixed}


@needs_builder
def test_an_old_cache_in_the_raw_exports_names(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    model = load_model(made.clean)
    assert len(read_raw_names(model)) > 20
    cache = old_cache(made, tmp_path / "old.cache", UNNAMED, GONE, factor=1.25)
    assert "inc.double_conv.0:" not in cache.read_text()
    result = imported(unet_trt, made.clean, cache, tmp_path / "model.engine")
    assert result.code == 0, result
    assert result.out == f"{tmp_path / 'model.engine'}\n"
    manifest: dict[str, Any] = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["precision"], manifest["route"], manifest["backend"]) == ("int8", "explicit", "tensorrt-rtx")
    assert manifest["cache_sha256"] == sha256_file(cache)
    expected = (
        "the calibration cache has no report; its header names TensorRT 8502",
        f"{len(read_raw_names(model))} ranges of the calibration cache were found under the raw export's tensor names",
        "1 ranges of tensors that the graph does not have: inc.double_conv.1.gone",
    )
    for note in expected:
        assert note in manifest["notes"]
        assert note in result.err
    assert "Unnamed Layer" not in result.err

    scales, old, raw = activation_scales(tmp_path / "model.typed.onnx"), read_cache(cache), read_raw_names(model)
    quantized = quantizable_tensors(model, (), "shared")
    assert set(scales) == set(quantized)
    known = CalibrationTable("entropy", {tensor: old.amax[raw.get(tensor, tensor)] for tensor in quantized})
    wanted = shared_ranges(model, known, ())
    for tensor, scale in scales.items():
        # To FP16's last place, which is 2^-24 for such small ones.
        assert float(scale) == pytest.approx(wanted.scale(tensor), rel=2.0**-11, abs=2.0**-24)


def test_an_old_cache_that_lacks_ranges(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    raw = read_raw_names(load_model(made.clean))
    lost = ["inc.double_conv.0.relu", "up1.conv.double_conv.0.relu"]
    cache = old_cache(made, tmp_path / "old.cache", UNNAMED, lack=[raw[name] for name in lost])
    fails(imported(unet_trt, made.clean, cache, tmp_path / "model.engine"), 2, "lacks 2 of the ranges", *lost)
    assert names(tmp_path) == ["old.cache"]


def test_a_cache_with_its_report_serves_its_graph_alone(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    """Equal names do not make it fit: another training of the same network has other ranges."""
    other = onnx.load(made.clean)
    bias = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 1)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), bias.name))
    onnx.save(other, tmp_path / "other.onnx")
    result = imported(unet_trt, tmp_path / "other.onnx", made.cache, tmp_path / "model.engine")
    fails(result, 2, "was made for another graph", sha256_file(made.clean)[:12], "calibrate this graph")
    assert names(tmp_path) == ["other.onnx"]


def test_a_cache_that_was_edited(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    lines = made.cache.read_text().splitlines()
    digit = "0" if lines[7][-1] != "0" else "1"
    lines[7] = lines[7][:-1] + digit
    cache = tmp_path / "x.cache"
    cache.write_text("\n".join(lines) + "\n")
    shutil.copy(made.cache.with_name("x.cache.json"), tmp_path)
    fails(imported(unet_trt, made.clean, cache, tmp_path / "m.engine"), 2, f"{cache} is not what calibration wrote")
    fails(unet_trt("inspect", cache), 2, f"{cache} is not what calibration wrote")
    assert names(tmp_path) == ["x.cache", "x.cache.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-5], "damaged in line"),
        (lambda text: text + text.splitlines()[3] + "\n", "damaged in line 52"),
        (lambda text: text.replace(": 3", ": g", 1), "damaged in line 2"),
    ],
    ids=["truncated", "duplicate", "hex"],
)
def test_an_old_cache_that_is_damaged(
    tmp_path: Path, unet_trt: Command, made: Made, damage: Callable[[str], str], message: str
) -> None:
    cache = old_cache(made, tmp_path / "old.cache")
    assert len(cache.read_text().splitlines()) == 51
    cache.write_text(damage(cache.read_text()))
    fails(imported(unet_trt, made.clean, cache, tmp_path / "model.engine"), 2, f"{cache} is {message}", "restore")
    assert names(tmp_path) == ["old.cache"]


def test_an_engine_never_takes_the_place_of_what_it_is_made_from(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    model = Path(shutil.copy(made.clean, tmp_path))
    cache = old_cache(made, tmp_path / "old.cache")
    before = {path.name: path.read_bytes() for path in (model, cache)}
    for target in (model, cache):
        fails(imported(unet_trt, model, cache, target), 2, f"{target} would overwrite what it is made from")
    assert {path.name: path.read_bytes() for path in (model, cache)} == before
    assert names(tmp_path) == sorted(before)
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------------- unet-trt inspect


def test_inspect_a_cache_with_its_report(unet_trt: Command, made: Made) -> None:
    result = unet_trt("inspect", made.cache)
    assert result.code == 0, result
    for line in (
        "algorithm: entropy",
        "tensorrt_version: 8.6.0",
        "tensors: 50",
        f"  image_count: {IMAGES}",
        f"  graph_sha256: {sha256_file(made.clean)}",
    ):
        assert line in result.out.splitlines()


def test_inspect_a_cache_of_tensorrts(tmp_path: Path, unet_trt: Command, made: Made) -> None:
    facts = json.loads(unet_trt("inspect", old_cache(made, tmp_path / "old.cache", UNNAMED), "--json").out)
    assert (facts["algorithm"], facts["tensorrt_version"], facts["tensors"]) == ("entropy", "8.5.2", 51)
    assert facts["report"] == "none"
    assert "(Unnamed Layer* 12) [Constant]_output" in facts["amax"]
    (tmp_path / "new.cache").write_text(f"TRT-100300-MinMaxCalibration\n{GONE}\n")
    facts = json.loads(unet_trt("inspect", tmp_path / "new.cache", "--json").out)
    assert (facts["algorithm"], facts["tensorrt_version"], facts["tensors"]) == ("minmax", "10.3.0", 1)
