"""The archive's runner against ``Predictor``, with every kind of preprocessing."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import Predictor
from pipeline.artifacts import ModelCard
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.data.preprocessing import read_image
from pipeline.graph.deployment import bake
from pipeline.graph.io import save_model, write_card
from pipeline.graph.promises import write_multiples
from pipeline.stages.package import Judged, package_archive
from tests.onnx_unet import clean_unet, drawn_unet

CLASSES = tuple(ClassConfig(name=f"class {place}", colour=(50 * place, 9, 200)) for place in range(4))
FIXED = (1, 3, 32, 48)
COLOURS: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.mark.parametrize(
    ("shape", "preprocessing"),
    [
        (FIXED, {"resize": "letterbox", "pad_value": 114, **COLOURS}),
        (FIXED, {"resize": "letterbox", "channels": "bgr", "interpolation": "nearest", **COLOURS}),
        ((2, 3, 32, 48), {"resize": "stretch", "channels": "bgr", **COLOURS}),
        (("n", 3, 32, 48), {"resize": "stretch", "interpolation": "nearest", **COLOURS}),
        ((1, 3, "height", "width"), {"resize": "none", **COLOURS}),
        ((1, 1, 64, 64), {"resize": "none", "channels": "grey"}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else ",".join(map(str, value.values())),
)
@pytest.mark.parametrize("baked", [False, True], ids=["float", "image"])
def test_masks_are_the_predictors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Any, preprocessing: dict[str, Any], baked: bool
) -> None:
    size = [extent if isinstance(extent, int) else 32 for extent in shape[2:]]
    card = ModelCard("street", PreprocessingConfig(height=size[0], width=size[1], **preprocessing), CLASSES)
    model = clean_unet(drawn_unet(in_channels=shape[1]), shape)
    if baked:
        model = bake(model, card, input="image", output="labels")
    write_card(model, card)
    write_multiples(model, {"height": 16, "width": 16} if "height" in shape else {})
    engine = tmp_path / "engine"
    engine.mkdir()
    save_model(model, engine / "model.onnx")
    (engine / "report.json").write_text("{}")
    package_archive(Judged(card, "fp32", engine, None, engine / "report.json", None), tmp_path / "street.zip")
    shutil.unpack_archive(tmp_path / "street.zip", tmp_path)

    rng = np.random.default_rng(0)
    for name, (height, width) in {"wide": (20, 45), "high": (60, 33)}.items():
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(tmp_path / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(tmp_path / "wide.png").save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(rng.integers(0, 65536, (30, 31)).astype(np.uint16)).save(tmp_path / "deep.png")
    images = [tmp_path / f"{name}.png" for name in ("wide", "high", "turned", "deep")]

    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, images), "-o", str(tmp_path / "masks")])
    runpy.run_path(str(tmp_path / "street" / "run.py"), run_name="__main__")
    found = set()
    with Predictor(engine / "model.onnx") as predictor:
        for path in images:
            pixels = read_image(path, "grey" if shape[1] == 1 else "rgb")
            wanted = predictor(pixels)
            got = np.asarray(Image.open(tmp_path / "masks" / path.name))
            np.testing.assert_array_equal(got, wanted, str(path))
            found |= set(np.unique(wanted))
    assert len(found) > 1, "a network of one class compares nothing"


def test_larger_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard("street", PreprocessingConfig(height=32, width=48), CLASSES)
    model = clean_unet(drawn_unet(), FIXED)
    write_card(model, card)
    save_model(model, tmp_path / "model.onnx")
    (tmp_path / "report.json").write_text("{}")
    judged = Judged(card, "fp32", tmp_path, None, tmp_path / "report.json", None)
    package_archive(judged, tmp_path / "street.zip")
    shutil.unpack_archive(tmp_path / "street.zip", tmp_path)
    Image.new("RGB", (49, 32)).save(tmp_path / "large.png")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "large.png"), "-o", str(tmp_path / "masks")])
    with pytest.raises(SystemExit, match="larger than the network's input"):
        runpy.run_path(str(tmp_path / "street" / "run.py"), run_name="__main__")
