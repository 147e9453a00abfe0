"""Whatever a user gets wrong ends in one clear message and the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.conftest import REPOSITORY, Project, Result
from tests.unit.graph.builders import conv_net, model

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


@pytest.mark.parametrize("command", ["clean", "calibrate", "engine", "validate"])
def test_a_model_file_beside_a_configuration(command: str, tmp_path: Path, unet_trt: Command) -> None:
    onnx.save(conv_net(), tmp_path / "net.onnx")
    result = unet_trt(command, tmp_path / "net.onnx", "-o", tmp_path / "out", "--set", "engine.tf32=true")
    fails(result, 2, "net.onnx comes with a configuration", "--set belongs to the latter")
    assert not (tmp_path / "out").exists()


def test_a_profile_that_is_none(unet_trt: Command) -> None:
    for text, message in (
        ("batch=1:5", "--profile needs three sizes of an axis"),
        ("batch=5:1:1", "needs min <= opt <= max"),
        ("depth=1:1:1", "depth"),
    ):
        fails(unet_trt("engine", "m.onnx", "-p", "fp32", "--profile", text, "-o", "m.engine"), 2, message)


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def half_written(path: Path) -> None:
    path.write_bytes(conv_net().SerializeToString())
    cut(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def move_data(path: Path, location: str) -> None:
    """Let the file say that its data lie elsewhere."""
    bare = onnx.load(path, load_external_data=False)
    for tensor in bare.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(bare.SerializeToString())


def edited(path: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    proto = conv_net()
    edit(proto)
    path.write_bytes(proto.SerializeToString())


def without_convolution(path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["image"], ["logits"])]
    path.write_bytes(model(nodes, {"image": (1, 3)}, {"logits": (1, 3)}).SerializeToString())


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].domain = "org.example"
    proto.opset_import.add(domain="org.example", version=1)


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "text": (lambda path: path.write_text("This is no model."), ("not a readable ONNX file", "to fix")),
    "empty": (lambda path: path.write_bytes(b""), ("raw.onnx is empty",)),
    "folder": (make_folder, ("not a readable ONNX file", "directory")),
    "truncated": (half_written, ("not a readable ONNX file",)),
    "no data": (lambda path: (path.parent / "weights.bin").unlink(), ("weights.bin does not exist", "a.weight")),
    "truncated data": (lambda path: cut(path.parent / "weights.bin"), ("truncated or belong to another model",)),
    "data outside": (lambda path: move_data(path, "../weights.bin"), ("outside its folder", "../weights.bin")),
    "invalid": (
        lambda path: edited(path, lambda proto: proto.graph.node[1].input.append("image")),
        ("ONNX's checker refuses", "a.relu"),
    ),
    "cyclic": (
        lambda path: edited(path, lambda proto: proto.graph.node[0].input.__setitem__(0, "b.relu")),
        ("has a cycle: ", "got: a cycle of 4 nodes through "),
    ),
    "opset": (
        lambda path: edited(path, lambda proto: setattr(proto.opset_import[0], "version", 999)),
        ("has opset 999", "or older"),
    ),
    "IR": (lambda path: edited(path, lambda proto: setattr(proto, "ir_version", 99)), ("has IR version 99",)),
    "no convolution": (without_convolution, ("holds no convolution", "1 Relu")),
    "not runnable": (lambda path: edited(path, unknown_operator), ("ONNX Runtime cannot load", "org.example")),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_models_that_cannot_be_cleaned(tmp_path: Path, unet_trt: Command, kind: str) -> None:
    make, parts = BAD_MODELS[kind]
    raw, target = tmp_path / "raw.onnx", tmp_path / "clean.onnx"
    onnx.save(conv_net(), raw, save_as_external_data=True, location="weights.bin", size_threshold=200)
    target.write_bytes(b"an older graph")
    make(raw)
    before = sorted(path.name for path in tmp_path.iterdir())
    fails(unet_trt("clean", raw, "-o", target, "--report", tmp_path / "report.json"), 2, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert target.read_bytes() == b"an older graph"


def test_nothing_to_bake_in(tmp_path: Path, unet_trt: Command) -> None:
    raw = tmp_path / "raw.onnx"
    raw.write_bytes(conv_net().SerializeToString())
    clean = ("clean", raw, "-o", tmp_path / "clean.onnx")
    for option, value in (("--bake-input", "image"), ("--bake-output", "labels")):
        fails(unet_trt(*clean, option, value), 2, "raw.onnx has no model card", "to fix: name the file as network.onnx")
    unknown = unet_trt(*clean, "--bake-output", "masks")
    assert (unknown.code, "'--bake-output'" in unknown.err, "probabilities" in unknown.err) == (2, True, True)
    fails(unet_trt(*clean, "--tolerance", "-1"), 2, "tolerance: Input should be greater than 0")
    assert not (tmp_path / "clean.onnx").exists()


def test_results_that_cannot_be_written(tmp_path: Path, unet_trt: Command) -> None:
    raw, link = tmp_path / "raw.onnx", tmp_path / "link.onnx"
    raw.write_bytes(conv_net().SerializeToString())
    link.symlink_to(raw)
    (tmp_path / "folder").mkdir()
    before = raw.read_bytes()
    for target, message in (
        (raw, "would overwrite the raw export"),
        (link, "would overwrite the raw export"),
        (tmp_path / "none" / "clean.onnx", "No such file or directory"),
        (raw / "clean.onnx", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (Path("/proc/clean.onnx"), "cannot write /proc/clean.onnx"),
    ):
        fails(unet_trt("clean", raw, "-o", target), 2, message, "to fix")
    fails(unet_trt("clean", raw), 2, "-o CLEAN.onnx is missing")
    report = tmp_path / "none" / "report.json"
    fails(unet_trt("clean", raw, "-o", tmp_path / "clean.onnx", "--report", report), 2, "report.json")
    assert raw.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link.onnx", "raw.onnx", "working"]


FULL_DISK = """
import errno, os

def fsync(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

os.fsync = fsync
"""


def test_a_full_disk(tmp_path: Path, unet_trt: Command) -> None:
    raw, target = tmp_path / "raw.onnx", tmp_path / "clean.onnx"
    raw.write_bytes(conv_net().SerializeToString())
    target.write_bytes(b"an older graph")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(FULL_DISK)
    path = os.pathsep.join([str(tmp_path / "full"), str(REPOSITORY)])
    result = unet_trt("clean", raw, "-o", target, afresh=True, PYTHONPATH=path)
    fails(result, 2, f"cannot write {target}", "No space left on device")
    assert target.read_bytes() == b"an older graph"
    assert leftovers(tmp_path) == []


def test_nothing_half_written_after_a_failure(project: Project, unet_trt: Command) -> None:
    result = unet_trt("run", "-c", project.config, "--set", "export.tolerance=1e-30")
    fails(result, 1, "computes something else")
    assert leftovers(project.root / "working") == []
    assert not (project.root / "working" / "build" / "tiny" / "export").exists()


def test_debug_shows_the_traceback(project: Project, unet_trt: Command) -> None:
    (project.root / "weights.safetensors").unlink()
    assert "Traceback" in unet_trt("export", "-c", project.config, "--debug").err
