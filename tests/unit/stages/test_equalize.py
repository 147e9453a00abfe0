"""The stage that equalizes: what it writes, proves and refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from PIL import Image

from pipeline.artifacts import ModelCard, from_json
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.data.dataset import Dataset, image_folder
from pipeline.errors import CalibrationError, CheckFailed, ModelError
from pipeline.graph.deployment import bake
from pipeline.graph.io import load_model, read_card, sha256_model, write_card
from pipeline.stages.equalize import EqualizationReport, equalize
from tests.tiny_unet import CLASSES, SIZE, save, tiny_unet
from tests.unit.graph.builders import model, run, weights

SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="rgb", mean=(0.5,), std=(0.25,))
CARD = ModelCard("tiny", SPEC, tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in "abc"[:CLASSES]))


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return image_folder(tmp_path / "images", "rgb")


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    unet = tiny_unet()
    write_card(unet, CARD)
    return save(unet, tmp_path / "clean.onnx")


def test_what_it_writes(clean: Path, images: Dataset, tmp_path: Path) -> None:
    target, report = tmp_path / "equal.onnx", tmp_path / "report.json"
    found = equalize(clean, images, SPEC, target, report, 1e-5)
    assert from_json(EqualizationReport, report) == found
    assert (found.clean_sha256, found.equalized_sha256) == (sha256_model(clean), sha256_model(target))
    assert found.images == ("0", "1", "2")
    assert 0 < found.max_relative_error < 1e-5
    assert len(found.tensors) == 6
    assert all(each.before < each.after <= 1 for each in found.tensors)
    assert read_card(load_model(target)) == CARD
    feed = np.random.default_rng(9).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    (wanted,), (other,) = run(load_model(clean), image=feed), run(load_model(target), image=feed)
    np.testing.assert_allclose(other, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_graph_that_takes_images_and_gives_labels(clean: Path, images: Dataset, tmp_path: Path) -> None:
    baked = save(bake(load_model(clean), CARD, input="image", output="labels"), tmp_path / "baked.onnx")
    found = equalize(baked, images, SPEC, tmp_path / "equal.onnx", tmp_path / "report.json", 1e-5)
    assert (len(found.tensors), found.max_relative_error) == (6, 0)


def test_what_it_refuses(clean: Path, images: Dataset, tmp_path: Path) -> None:
    target, report = tmp_path / "equal.onnx", tmp_path / "report.json"
    with pytest.raises(CheckFailed, match="computes something else"):
        equalize(clean, images, SPEC, target, report, 1e-12)
    with pytest.raises(CalibrationError, match="no image"):
        equalize(clean, images.choose(0, 0), SPEC, target, report, 1e-5)
    with pytest.raises(CalibrationError, match="the calibration image 1 is the validation image mine"):
        equalize(clean, images, SPEC, target, report, 1e-5, {images[1].content_hash(): "mine"})
    node = helper.make_node("Conv", ["image", "w"], ["logits"], name="only")
    one = model([node], {"image": (1, 3, 8, 8)}, {"logits": (1, 2, 6, 6)}, {"w": weights(2, 3, 3, 3)})
    with pytest.raises(ModelError, match="no convolution"):
        equalize(save(one, tmp_path / "one.onnx"), images, SPEC, target, report, 1e-5)
    assert not target.exists()
    assert not report.exists()
