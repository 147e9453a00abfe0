"""What the command line says of an engine that meets another machine: exit code and first line, as docs/deploying.md.

The engine is a real one of TensorRT-RTX, which builds without a GPU; what a GPU would say stands in
tests/unit/backends/test_load_engine.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import ModelCard
from pipeline.backends.tensorrt_rtx import RtxBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig
from pipeline.stages.engine import build_engine
from tests.conftest import Result
from tests.tiny_unet import CLASSES, SIZE, save, tiny_unet

Command = Callable[..., Result]
KNOWN = RtxBuilder().capabilities()
pytestmark = pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")
NO_GPU = pytest.mark.skipif(KNOWN.device is not None, reason="this machine has a GPU")
CARD = ModelCard(
    "tiny",
    PreprocessingConfig(height=SIZE, width=SIZE),
    tuple(ClassConfig(name=str(index), colour=(index, 0, 0)) for index in range(CLASSES)),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an engine."""
    root = tmp_path_factory.mktemp("built")
    clean = save(tiny_unet(), root / "clean.onnx")
    build_engine(clean, "fp16", EngineConfig(backend="tensorrt-rtx"), None, None, CARD, root / "engine", None)
    return root / "engine"


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the engine, with other values in its manifest."""

    def changed(**values: Any) -> Path:
        folder = shutil.copytree(built, tmp_path / "engine")
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))
        return folder / "model.engine"

    return changed


def refused(result: Result, code: int, *parts: str) -> None:
    """One line says all of it."""
    assert result.code == code, result
    assert any(all(part in line for part in parts) for line in result.err.splitlines()), result.err
    assert "Traceback" not in result.err


def predict(unet_trt: Command, path: Path, *options: str) -> Result:
    folder = path.parent.parent
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(folder / "image.png")
    result = unet_trt("predict", path, folder / "image.png", "-o", folder / "masks", *options)
    assert not list(folder.glob("masks/*.png"))
    return result


def test_another_version_of_the_library(engine: Any, unet_trt: Command) -> None:
    result = predict(unet_trt, engine(backend_version="1.0.0.1"))
    refused(result, 2, "was built with tensorrt-rtx 1.0.0.1", f"installed is {KNOWN.version}")
    assert "or install tensorrt-rtx 1.0.0.1" in result.err


def test_a_library_that_is_not_installed(engine: Any, unet_trt: Command) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have TensorRT")
    refused(predict(unet_trt, engine(backend="tensorrt")), 3, "needs tensorrt", "not installed")


@NO_GPU
def test_no_gpu(engine: Any, unet_trt: Command) -> None:
    refused(predict(unet_trt, engine()), 3, "no NVIDIA driver")


def test_another_file_and_no_manifest(engine: Any, unet_trt: Command) -> None:
    path = engine()
    path.write_bytes(path.read_bytes() + b"x")
    refused(predict(unet_trt, path), 2, "is not the file that its manifest describes")
    (path.parent / "manifest.json").unlink()
    refused(predict(unet_trt, path), 2, "there is no", "manifest.json")


def test_a_manifest_of_another_program(engine: Any, unet_trt: Command) -> None:
    refused(predict(unet_trt, engine(schema_version=99)), 2, "has schema version 99, this program reads 1")


@NO_GPU
def test_trust_turns_what_is_refused_into_a_warning(engine: Any, unet_trt: Command) -> None:
    """All but what the machine lacks."""
    result = predict(unet_trt, engine(backend_version="1.0.0.1"), "--trust")
    refused(result, 3, "was built with tensorrt-rtx 1.0.0.1")
    assert "no NVIDIA driver" in result.err
