"""Whatever a user gets wrong ends in one clear message and the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Project, Result

Command = Callable[..., Result]


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".partial" in path.name or path.name.endswith(".old")]


def fails(result: Result, code: int, *parts: str) -> None:
    assert result.code == code, result
    assert result.err.count("unet-trt: ") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def test_unknown_key(project: Project, unet_trt: Command) -> None:
    project.edit(calibrate={"imagse": 3})
    fails(unet_trt("run", "-c", project.config), 2, "calibrate.imagse: unknown key; did you mean 'images'?")


def test_no_config(unet_trt: Command) -> None:
    fails(unet_trt("run"), 2, "-c CONFIG is missing")
    fails(unet_trt("run", "-c", "none.yaml"), 2, "none.yaml", "No such file")


def test_unknown_precision_and_backend(project: Project, unet_trt: Command) -> None:
    fails(unet_trt("run", "-c", project.config, "-p", "int9"), 2, "no precision 'int9'", "fp32, fp16, int8")
    fails(unet_trt("run", "-c", project.config, "--backend", "openvino"), 2, "engine.backend", "tensorrt-rtx")


def test_usage_error(unet_trt: Command) -> None:
    result = unet_trt("frobnicate")
    assert result.code == 2
    assert "frobnicate" in result.err


def test_backend_that_is_not_installed(project: Project, unet_trt: Command) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have TensorRT")
    result = unet_trt("engine", "-c", project.config, "-p", "fp32", "--backend", "tensorrt")
    fails(result, 3, "tensorrt", "not installed")


def test_missing_weights(project: Project, unet_trt: Command) -> None:
    (project.root / "weights.safetensors").unlink()
    result = unet_trt("run", "-c", project.config)
    fails(result, 2, "weights.safetensors does not exist", "unet-trt train")
    assert not (project.root / "working" / "build" / "tiny" / "export").exists()


def test_weights_of_another_architecture(project: Project, unet_trt: Command) -> None:
    result = unet_trt("export", "-c", project.config, "--set", "network.arguments.base_channels=6")
    fails(result, 2, "another architecture", "inc.double_conv.0.weight (4, 1, 3, 3) instead of (6, 1, 3, 3)")


@pytest.mark.parametrize("damage", ["truncate", "garbage"])
def test_damaged_image(project: Project, unet_trt: Command, damage: str) -> None:
    file = project.root / "data" / "val" / "images" / "100.png"
    file.write_bytes(file.read_bytes()[:200] if damage == "truncate" else b"no image")
    fails(unet_trt("export", "-c", project.config), 2, "100.png cannot be decoded")


def test_label_of_another_size(project: Project, unet_trt: Command) -> None:
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(project.root / "data" / "val" / "labels" / "101.png")
    fails(unet_trt("export", "-c", project.config), 2, "101.png has another size", "64×64", "64×32")


def test_class_id_out_of_range(project: Project, unet_trt: Command) -> None:
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(project.root / "data" / "val" / "labels" / "101.png")
    fails(unet_trt("export", "-c", project.config), 2, "101.png holds the value 9", "values [0, 1, 2, 3]")


def test_empty_and_missing_folder(project: Project, unet_trt: Command) -> None:
    shutil.rmtree(project.root / "data" / "val" / "images")
    fails(unet_trt("run", "-c", project.config), 2, "val/images does not exist")
    (project.root / "data" / "val" / "images").mkdir()
    fails(unet_trt("run", "-c", project.config), 2, "val/images is empty")


def test_image_without_label(project: Project, unet_trt: Command) -> None:
    (project.root / "data" / "val" / "labels" / "102.png").unlink()
    fails(unet_trt("run", "-c", project.config), 2, "102.png has no label map", "1 of 3 images")


def test_calibration_images_that_are_validation_images(project: Project, unet_trt: Command) -> None:
    images = project.root / "data" / "train"
    shutil.copy(project.root / "data" / "val" / "images" / "100.png", images / "images" / "000.png")
    result = unet_trt("calibrate", "-c", project.config, "--set", "calibrate.images=6")
    fails(result, 2, "000", "100")
    assert not (project.root / "working" / "build" / "tiny" / "calibrate").exists()


def test_size_that_the_network_cannot_take(project: Project, unet_trt: Command) -> None:
    small = [
        "--set",
        "preprocessing.height=8",
        "--set",
        "preprocessing.width=8",
        "--set",
        "preprocessing.resize=stretch",
    ]
    fails(unet_trt("export", "-c", project.config, *small), 2, "cannot take its input", "(1, 8, 8)")
    other = ["--set", "preprocessing.height=32"]
    fails(unet_trt("export", "-c", project.config, *other), 2, "another size than the network's input", "64×32")


@pytest.mark.skipif(os.getuid() == 0 and not Path("/proc/self/status").exists(), reason="needs /proc")
def test_unwritable_build_folder(project: Project, unet_trt: Command) -> None:
    (project.root / "file").touch()
    result = unet_trt("export", "-c", project.config, "--build-dir", project.root / "file" / "build")
    fails(result, 2, "cannot write", "--build-dir")
    fails(unet_trt("export", "-c", project.config, "--build-dir", "/proc/build"), 2, "cannot write")


def test_cache_of_another_model(project: Project, unet_trt: Command) -> None:
    clean = unet_trt("clean", "-c", project.config, "--quiet").out.strip()
    model = project.root / "working" / clean
    (project.root / "old.cache").write_text("TRT-8600-EntropyCalibration2\nother/conv: 3c010204\n")
    result = unet_trt(
        "engine",
        model,
        "-p",
        "int8",
        "--calibration-cache",
        project.root / "old.cache",
        "-o",
        project.root / "m.engine",
    )
    fails(result, 2, "other/conv")
    assert not (project.root / "m.engine").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header"),
        ("TRT-8600-EntropyCalibration2\nimage: 3c01\n", "damaged in line 2"),
        ("TRT-8600-EntropyCalibration2\nimage: 00000000\n", "scale 0.0 in line 2"),
    ],
)
def test_damaged_cache(project: Project, unet_trt: Command, text: str, message: str) -> None:
    (project.root / "bad.cache").write_text(text)
    (project.root / "m.onnx").write_bytes(b"")
    result = unet_trt(
        "engine",
        project.root / "m.onnx",
        "-p",
        "int8",
        "--calibration-cache",
        project.root / "bad.cache",
        "-o",
        "m.engine",
    )
    fails(result, 2, message)


def test_files_that_are_no_onnx(project: Project, unet_trt: Command) -> None:
    (project.root / "bad.onnx").write_bytes(b"\x08\x07 no model")
    result = unet_trt("clean", project.root / "bad.onnx", "-o", project.root / "clean.onnx")
    fails(result, 2, "bad.onnx")
    assert not (project.root / "clean.onnx").exists()
    fails(unet_trt("clean", project.root / "none.onnx", "-o", "c.onnx"), 2, "none.onnx does not exist")
    fails(unet_trt("inspect", project.root / "none.onnx"), 2, "none.onnx does not exist")


def test_nothing_half_written_after_a_failure(project: Project, unet_trt: Command) -> None:
    result = unet_trt("run", "-c", project.config, "--set", "export.tolerance=1e-30")
    fails(result, 1, "computes something else")
    assert leftovers(project.root / "working") == []
    assert not (project.root / "working" / "build" / "tiny" / "export").exists()


def test_debug_shows_the_traceback(project: Project, unet_trt: Command) -> None:
    (project.root / "weights.safetensors").unlink()
    assert "Traceback" in unet_trt("export", "-c", project.config, "--debug").err
