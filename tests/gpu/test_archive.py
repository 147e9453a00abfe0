"""An archive with an engine of TensorRT's: its runner, in a process of its own, gives the masks of ``Predictor``."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import ModelCard
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig, ProfileRange
from pipeline.graph.deployment import bake
from pipeline.predictor import Predictor
from pipeline.stages.engine import build_engine
from pipeline.stages.package import Judged, package_archive
from tests.tiny_unet import CLASSES, SIZE, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="rgb", mean=(0.5,), std=(0.25,))
CARD = ModelCard("tiny", SPEC, tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in "abc"[:CLASSES]))
FREE = {"batch": ProfileRange(min=1, opt=1, max=4)}


@pytest.mark.parametrize("baked", [False, True], ids=["float", "image"])
@pytest.mark.parametrize("batch", [1, "batch"])
def test_masks_are_the_predictors(tmp_path, batch, baked):
    graph = bake(tiny_unet(batch), CARD, input="image", output="labels") if baked else tiny_unet(batch)
    settings = EngineConfig(
        backend="tensorrt", workspace_mib=1024, optimization_level=0, profile=FREE if batch == "batch" else {}
    )
    folder = tmp_path / "engine"
    build_engine(save(graph, tmp_path / "clean.onnx"), "fp16", settings, None, None, CARD, folder, None)
    (folder / "report.json").write_text("{}")
    package_archive(Judged(CARD, "fp16", folder, None, folder / "report.json", None), tmp_path / "tiny.zip")
    shutil.unpack_archive(tmp_path / "tiny.zip", tmp_path)
    coarse = np.random.default_rng(0).integers(0, 256, (SIZE // 4, SIZE // 4, 3), dtype=np.uint8)
    image = coarse.repeat(4, 0).repeat(4, 1)
    Image.fromarray(image).save(tmp_path / "image.png")
    subprocess.run(
        [sys.executable, tmp_path / "tiny" / "run.py", tmp_path / "image.png", "-o", tmp_path / "masks"], check=True
    )
    with Predictor(folder / "model.engine") as predictor, Image.open(tmp_path / "masks" / "image.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), predictor(image))
