"""What must run again does, and what belongs to the user stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Project, Result

Command = Callable[..., Result]


def ran(result: Result) -> set[str]:
    assert result.code == 0, result
    return {line.split(":")[0] for line in result.err.splitlines() if ": running" in line}


def test_other_seed_and_other_label_values_run_again(project: Project, unet_trt: Command) -> None:
    assert ran(unet_trt("export", "-c", project.config)) == {"export"}
    swapped = "data.label_values={0: 0, 1: 2, 2: 1, 3: 3}"
    assert ran(unet_trt("export", "-c", project.config, "--set", swapped)) == {"export"}
    assert ran(unet_trt("export", "-c", project.config, "--set", swapped)) == set()


def test_generated_images_depend_on_their_seed() -> None:
    from pipeline.config import load_config
    from pipeline.data.dataset import open_dataset
    from tests.conftest import REPOSITORY

    prints = set()
    for seed in (0, 1):
        config = load_config(REPOSITORY / "configs" / "cells.yaml", [f"data.seed={seed}"])
        prints |= {open_dataset(config.data, config.preprocessing, s).fingerprint() for s in ("train", "validation")}
    assert len(prints) == 4


def test_edited_factory_runs_again(project: Project, unet_trt: Command) -> None:
    source = "import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Conv2d(1, 4, {0}, padding={1})\n"
    module = project.root / "working" / "mynet.py"
    module.write_text(source.format(3, 1))
    project.edit(network={"factory": "mynet:make"})
    assert ran(unet_trt("export", "-c", project.config)) == {"export"}
    module.write_text(source.format(5, 2))
    assert ran(unet_trt("export", "-c", project.config)) == {"export"}
    module.write_text("def make(:\n")
    broken = unet_trt("export", "-c", project.config)
    assert broken.code == 2
    assert "mynet:make cannot be imported" in broken.err


def test_validation_never_replaces_a_users_folder(project: Project, unet_trt: Command, clean: Path) -> None:
    images = project.root / "data" / "val" / "images"
    arguments = ("validate", clean, "--engine", clean, "--images", images)
    theirs = project.root / "working" / "validation"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    refused = unet_trt(*arguments)
    assert refused.code == 2
    assert "holds other files" in refused.err
    assert (theirs / "notes.txt").read_text() == "mine"
    assert unet_trt(*arguments, "-o", ".").code == 2
    first = unet_trt(*arguments, "-o", "verdict", "--json")
    assert first.code == 0, first
    assert json.loads(first.out)["passed"] is True
    assert unet_trt(*arguments, "-o", "verdict").code == 0
    assert len(list(images.iterdir())) == 3


def test_label_ids_are_checked_on_files_too(project: Project, unet_trt: Command, clean: Path) -> None:
    val = project.root / "data" / "val"
    Image.fromarray(np.full((64, 64), 200, np.uint8)).save(val / "labels" / "101.png")
    result = unet_trt("validate", clean, "--engine", clean, "--images", val / "images", "--labels", val / "labels")
    assert result.code == 2
    assert "101.png holds the value 200" in result.err


def test_predictions_never_replace_the_images(project: Project, unet_trt: Command, clean: Path) -> None:
    images = project.root / "data" / "val" / "images"
    before = (images / "100.png").read_bytes()
    result = unet_trt("predict", clean, images, "-o", images, "--overwrite")
    assert result.code == 2
    assert (images / "100.png").read_bytes() == before


def test_two_images_of_one_name_are_refused(project: Project, unet_trt: Command, clean: Path) -> None:
    data = project.root / "data" / "val"
    result = unet_trt("predict", clean, data / "images" / "100.png", data / "labels" / "100.png", "-o", "masks")
    assert result.code == 2
    assert "two images would both give 100.png" in result.err
    assert not (project.root / "working" / "masks").exists()


def test_training_never_writes_over_a_checkpoint(project: Project, unet_trt: Command) -> None:
    target = project.root / "mine.pth"
    target.write_bytes(b"precious")
    result = unet_trt("train", "-c", project.config, "-o", target)
    assert result.code == 2
    assert ".safetensors" in result.err
    assert target.read_bytes() == b"precious"


def test_training_writes_weights_that_run_and_a_card(project: Project, unet_trt: Command) -> None:
    few = ["--set", "train.steps=10", "--set", "train.batch=2", "--set", "train.crop=[32, 32]"]
    result = unet_trt("train", "-c", project.config, "-o", project.root / "new.safetensors", *few)
    assert result.code == 0, result
    assert "mIoU" in (project.root / "new.md").read_text()
    weights = f"network.weights={project.root / 'new.safetensors'}"
    assert unet_trt("export", "-c", project.config, "--set", weights).code == 0


def test_training_on_images_of_several_sizes_needs_a_crop(project: Project, unet_trt: Command) -> None:
    scaled = ["--set", "train.augment=[scale]", "--set", "train.steps=2"]
    result = unet_trt("train", "-c", project.config, "-o", project.root / "new.safetensors", *scaled)
    assert result.code == 2
    assert "set train.crop" in result.err


def test_regress_on_some_precisions(project: Project, unet_trt: Command) -> None:
    loose = {p: {"atol": 9, "rtol": 9, "min_agreement": 0, "max_miou_drop": 1} for p in ("fp32", "fp16")}
    project.edit(validate={"tolerances": loose}, engine={"precisions": ["fp32", "fp16"]})
    assert unet_trt("regress", "-c", project.config, "--update").code == 0
    assert unet_trt("regress", "-c", project.config, "-p", "fp16").code == 0


def test_backend_without_engines_names_the_typed_graph(project: Project, unet_trt: Command) -> None:
    result = unet_trt("engine", "-c", project.config, "-p", "fp16", "--backend", "onnxruntime")
    assert result.code == 0, result
    assert (project.root / "working" / result.out.strip()).is_file()


def test_unreadable_files_and_folders_in_the_way(project: Project, unet_trt: Command) -> None:
    (project.root / "data" / "val" / "images" / "folder.png").mkdir()
    assert unet_trt("export", "-c", project.config).code == 0
    (project.root / "working" / "build" / "tiny" / "engine").touch()
    blocked = unet_trt("engine", "-c", project.config, "-p", "fp32")
    assert blocked.code == 2
    assert "cannot write" in blocked.err
    (project.root / "data" / "val" / "images" / "050.png").symlink_to("nowhere.png")
    (project.root / "data" / "val" / "labels" / "050.png").symlink_to("nowhere.png")
    dangling = unet_trt("export", "-c", project.config)
    assert dangling.code == 2
    assert "050.png" in dangling.err
    assert "Traceback" not in dangling.err


def test_what_a_killed_run_left_is_cleared(project: Project, unet_trt: Command) -> None:
    assert unet_trt("export", "-c", project.config).code == 0
    folder = project.root / "working" / "build" / "tiny"
    (folder / "export").rename(folder / ".export.99.old")
    (folder / ".clean.99.partial").mkdir()
    assert ran(unet_trt("export", "-c", project.config)) == set()
    assert not list(folder.glob(".*.partial"))
    assert (folder / "export" / "model.onnx").is_file()
