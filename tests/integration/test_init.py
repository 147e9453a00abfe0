"""`unet-trt init`: what it writes runs, for shipped weights, ONNX files and weights of unknown networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from pipeline.artifacts import ModelCard
from pipeline.config import ClassConfig, PreprocessingConfig, load_config
from pipeline.errors import BuildFolderError, ConfigError, DataError, ModelError
from pipeline.graph.io import write_card
from pipeline.networks import build_network
from pipeline.stages.init import init
from tests.conftest import REPOSITORY, Result, write_images
from tests.tiny_unet import tiny_unet

Command = Callable[..., Result]
SHORT = ("benchmark.seconds=0.05", "benchmark.warmup_seconds=0.01", "export.exporter=torchscript")
BRIEFLY = tuple(part for assignment in SHORT for part in ("--set", assignment))
CELLS = REPOSITORY / "models" / "weights" / "cells.safetensors"


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Ten 64×64 images of cells with label maps, in images and labels."""
    write_images(tmp_path / "drawn", range(10))
    return tmp_path / "drawn"


def test_the_shipped_weights_run_as_they_are_described(drawn: Path, tmp_path: Path, unet_trt: Command) -> None:
    made = unet_trt("init", CELLS, drawn)
    assert (made.code, made.out) == (0, "cells.yaml\n")
    assert "next: unet-trt run -c cells.yaml" in made.err
    assert "check cells.yaml:" in made.err
    config = load_config(tmp_path / "working" / "cells.yaml")
    assert config.network.factory == "models.unet:UNet"
    assert config.network.arguments == {"in_channels": 1, "classes": 4, "base_channels": 8, "upsampling": "bilinear"}
    assert (config.preprocessing.height, config.preprocessing.width, config.preprocessing.channels) == (64, 64, "grey")
    assert (len(config.data.classes), config.data.void, config.data.label_values) == (4, None, None)
    ran = unet_trt("run", "-c", "cells.yaml", "-p", "fp32", "--json", *BRIEFLY)
    assert ran.code == 0, ran.err
    (report,) = json.loads(ran.out)
    assert report["passed"]
    assert report["scores"]["mean_iou"] > 0.2
    assert (tmp_path / "working" / "build" / "cells" / "report" / "index.html").is_file()


def test_an_onnx_file_with_free_sizes_and_coloured_labels(tmp_path: Path, unet_trt: Command) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
        for name in range(3):
            pixels = rng.integers(0, 256, (50, 70, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / part / "images" / f"{name}.png")
            label = Image.fromarray(rng.integers(0, 4, (50, 70), np.uint8), "P")
            label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])
            label.save(tmp_path / "data" / part / "masks" / f"{name}_mask.png")
    onnx.save(tiny_unet("batch", size="side"), tmp_path / "net.onnx")
    assert init(tmp_path / "net.onnx", tmp_path / "data", tmp_path / "net.yaml").ready
    config = load_config(tmp_path / "net.yaml")
    assert config.data.validation is not None
    assert config.data.validation.labels == "val/masks/*_mask.png"
    assert config.data.void == 3
    assert [one.colour for one in config.data.classes] == [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    assert (config.preprocessing.height, config.preprocessing.width, config.preprocessing.resize) == (
        52,
        72,
        "letterbox",
    )
    assert config.engine.profile["height"].max == 52
    ran = unet_trt("engine", "-c", tmp_path / "net.yaml", "-p", "fp32", "--backend", "onnxruntime")
    assert ran.code == 0, ran.err


def test_weights_of_an_unknown_network_leave_a_place_to_fill_in(drawn: Path, tmp_path: Path, unet_trt: Command) -> None:
    state = {"a.weight": np.zeros((8, 1, 3, 3), np.float32), "b.weight": np.zeros((4, 8, 1, 1), np.float32)}
    save_file(state, tmp_path / "other.safetensors")
    made = unet_trt("init", tmp_path / "other.safetensors", drawn, "-o", "other.yaml")
    assert made.code == 0, made.err
    assert "next: fill in network.factory, then unet-trt run -c other.yaml" in made.err
    text = (tmp_path / "working" / "other.yaml").read_text()
    assert "CHECK, to fill in" in text
    assert len(yaml.safe_load(text)["data"]["classes"]) == 4
    with pytest.raises(ModelError, match=r"my_package\.my_module:MyNetwork cannot be imported"):
        build_network(load_config(tmp_path / "working" / "other.yaml").network)


def test_without_labels_nothing_is_judged_by_labels(drawn: Path, tmp_path: Path) -> None:
    shutil.rmtree(drawn / "labels")
    report = init(CELLS, drawn / "images", tmp_path / "cells.yaml")
    text = report.config.read_text()
    assert "No label maps" in text
    assert yaml.safe_load(text)["data"]["train"] == {"images": "."}
    assert (report.train, report.validation, report.classes.count) == (8, 2, 4)


def test_an_exported_file_says_its_preprocessing_and_classes(drawn: Path, tmp_path: Path) -> None:
    spec = PreprocessingConfig(height=32, width=32, resize="stretch", channels="bgr", mean=(0.4,), scale=0.5)
    names = ("sky", "road", "sea")
    card = ModelCard("net", spec, tuple(ClassConfig(name=name, colour=(1, 2, 3)) for name in names), 7, {5: 0, 6: 2})
    model = tiny_unet()
    write_card(model, card)
    onnx.save(model, tmp_path / "net.onnx")
    shutil.rmtree(drawn / "labels")
    init(tmp_path / "net.onnx", drawn, tmp_path / "net.yaml")
    config = load_config(tmp_path / "net.yaml")
    assert config.preprocessing == spec
    assert (config.data.classes, config.data.void, config.data.label_values) == (card.classes, 7, {5: 0, 6: 2})


def test_it_replaces_nothing_unasked(drawn: Path, tmp_path: Path, unet_trt: Command) -> None:
    target = tmp_path / "working" / "cells.yaml"
    target.write_text("mine")
    refused = unet_trt("init", CELLS, drawn)
    assert (refused.code, target.read_text()) == (2, "mine")
    assert "cells.yaml is there already" in refused.err
    assert "--overwrite" in refused.err
    replaced = unet_trt("init", CELLS, drawn, "--overwrite", "--quiet")
    assert (replaced.code, replaced.err) == (0, "")
    assert load_config(target).name == "cells"


def test_bad_input_leaves_everything_as_it_was(drawn: Path, tmp_path: Path) -> None:
    target = tmp_path / "cells.yaml"
    target.write_text("mine")
    for arguments, error, message in (
        ((CELLS, tmp_path / "drwan", target), DataError, r"did you mean .*drawn\?"),
        ((CELLS.with_suffix(".safetensor"), drawn, target), ModelError, r"did you mean .*cells\.safetensors\?"),
        ((CELLS, drawn, CELLS), ConfigError, "is no name of a configuration"),
        ((CELLS, drawn, tmp_path / "none" / "cells.yaml"), BuildFolderError, "cannot write .*none/cells.yaml"),
        ((CELLS, drawn / "images" / "000.png", target), DataError, "is no folder"),
    ):
        with pytest.raises(error, match=message):
            init(*arguments, overwrite=True)
    for name, value in (("003.png", 9), ("004.png", 11)):
        Image.fromarray(np.full((64, 64), value, np.uint8)).save(drawn / "labels" / name)
    with pytest.raises(DataError, match="hold 6 values, which 4 classes do not explain"):
        init(CELLS, drawn, target, overwrite=True)
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.yaml", "drawn"]
