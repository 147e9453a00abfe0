"""Engines that are built on first use: with TensorRT-RTX, which needs no GPU to build."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.artifacts import ModelCard
from pipeline.backends.tensorrt_rtx import RtxBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig
from pipeline.engines import read_manifest
from pipeline.errors import UnsupportedError
from pipeline.gpu_engines import GpuEngines
from pipeline.graph.io import write_card
from tests.tiny_unet import save, tiny_unet

KNOWN = RtxBuilder().capabilities()
CARD = ModelCard("tiny", PreprocessingConfig(height=32, width=32), (ClassConfig(name="a", colour=(0, 0, 0)),))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    model = tiny_unet()
    write_card(model, CARD)
    return save(model, tmp_path / "clean.onnx")


@pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build)
def test_an_engine_is_built_once_and_kept_by_its_manifest(clean: Path, tmp_path: Path) -> None:
    engines = GpuEngines(clean, "fp16", EngineConfig(backend="tensorrt-rtx"), None, tmp_path / "kept")
    engine = engines.engine()
    manifest, made = read_manifest(engine), engine.stat().st_mtime_ns
    assert (manifest.precision, manifest.card) == ("fp16", CARD)
    again: GpuEngines = pickle.loads(pickle.dumps(engines))
    assert again.engine() == engine
    assert engine.stat().st_mtime_ns == made
    engine.write_bytes(b"half")
    assert again.engine().stat().st_size > 1000
    other = GpuEngines(clean, "fp32", EngineConfig(backend="tensorrt-rtx"), None, tmp_path / "kept")
    assert other.identity != engines.identity
    assert other.engine().parent != engine.parent
    assert not list((tmp_path / "kept").rglob(".*"))


def test_onnx_runtime_has_no_engines(clean: Path, tmp_path: Path) -> None:
    engines = GpuEngines(clean, "fp16", EngineConfig(backend="onnxruntime"), None, tmp_path / "kept")
    with pytest.raises(UnsupportedError, match="builds no engines"):
        engines.engine()
