"""Refinement: ranges and biases learned from FP32's scores, on an exported UNet and through the commands' stages."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.report import CalibrationReport
from pipeline.calibration.table import CalibrationTable, read_cache
from pipeline.config import CalibrateConfig, EngineConfig, load_config
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.preprocessing import preprocess
from pipeline.data.synthetic import draw_cells
from pipeline.errors import CalibrationError, ConfigError, UnsupportedError
from pipeline.graph.io import load_model, read_card, write_card
from pipeline.graph.placement import quantizable, quantizable_tensors, shared_ranges
from pipeline.graph.quantize import quantize
from pipeline.refinement import refine
from pipeline.run import Run
from pipeline.stages.calibrate import calibrate
from pipeline.stages.engine import build_engine

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

STEPS, IMAGES, SIZE = 12, 8, 128
ROOT = Path(__file__).parents[2]
CONFIG = CalibrateConfig(calibrator="cpu", refine_steps=STEPS, refine_batch=2)
SPEC = load_config(ROOT / "configs" / "cells.yaml").preprocessing.model_copy(update={"height": SIZE, "width": SIZE})


def picture(name: str) -> Sample:
    return Sample(name, draw_cells(zlib.crc32(name.encode()), SIZE)[0][..., np.newaxis], None)


def pictures(count: int) -> Dataset:
    return Dataset(tuple(f"image_{n:03d}" for n in range(count)), picture)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped, trained UNet for cells, for small images."""
    sizes = [*(f"preprocessing.{side}={SIZE}" for side in ("height", "width")), "preprocessing.resize=stretch"]
    config = load_config(ROOT / "configs" / "cells.yaml", [*sizes, "data.validation_images=2"])
    with Run(config, tmp_path_factory.mktemp("build")) as run:
        return run.clean()


def calibrated(clean: Path, config: CalibrateConfig, folder: Path) -> tuple[CalibrationReport, CalibrationTable]:
    cache = folder / "calibration.cache"
    report = calibrate(clean, pictures(IMAGES), config, SPEC, cache, folder / "report.json")
    return report, read_cache(cache)


@pytest.fixture(scope="module")
def refined(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationReport, CalibrationTable]:
    return calibrated(clean, CONFIG, tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def plain(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationTable:
    return calibrated(clean, CONFIG.model_copy(update={"refine_steps": 0}), tmp_path_factory.mktemp("plain"))[1]


def scores(model: ModelProto, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        return np.concatenate([next(iter(runner({runner.inputs[0].name: image}).values())) for image in images])


def divergence(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Kullback-Leibler, in nats a pixel, by NumPy alone."""
    logs = [x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in
            (found.astype(np.float64), wanted.astype(np.float64))]  # fmt: skip
    return float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(1).mean())


def test_int8_comes_nearer_to_fp32_on_images_that_taught_nothing(
    clean: Path, refined: tuple[CalibrationReport, CalibrationTable], plain: CalibrationTable
) -> None:
    report, table = refined
    assert report.refinement is not None
    assert report.refinement.kept
    assert (report.refinement.steps, report.refinement.held_out) == (STEPS, 2)
    model = load_model(clean)
    images = [preprocess(picture(f"other {n}").image, SPEC)[np.newaxis] for n in range(4)]
    wanted = scores(model, images)
    before, after = (
        divergence(scores(quantize(model, each, half=False, qdq="shared"), images), wanted) for each in (plain, table)
    )
    assert after < 0.9 * before
    # The report's figures are those of ONNX Runtime on the images that were held out.
    held_out = [preprocess(picture(f"image_{n:03d}").image, SPEC)[np.newaxis] for n in (3, 7)]
    typed = quantize(model, plain, half=False, qdq="shared")
    found = divergence(scores(typed, held_out), scores(model, held_out))
    assert report.refinement.loss_before == pytest.approx(found, rel=0.02)


def test_without_masks_every_output_counts_by_its_values(clean: Path, plain: CalibrationTable) -> None:
    model = load_model(clean)
    card = read_card(model)
    assert card is not None
    write_card(model, replace(card, task="tensors"))
    judge = preprocess(picture("image_003").image, SPEC)[np.newaxis]
    _, result = refine(model, plain, [judge], [judge], 1, EngineConfig())
    found, wanted = scores(quantize(model, plain, half=False, qdq="shared"), [judge]), scores(model, [judge])
    assert result.loss_before == pytest.approx(((found - wanted) ** 2).mean() / wanted.var(), rel=0.02)


def test_finer_steps_of_the_image_come_nearer_too(clean: Path, plain: CalibrationTable) -> None:
    model = load_model(clean)
    images = [preprocess(picture(f"other {n}").image, SPEC)[np.newaxis] for n in range(4)]
    wanted = scores(model, images)
    found = [
        divergence(scores(quantize(model, plain, half=False, qdq="shared", input_bits=bits), images), wanted)
        for bits in (8, 10)
    ]
    assert found[1] < 0.95 * found[0]


def test_what_was_learned_reaches_the_graph_and_what_is_excluded_keeps_its_bias(
    clean: Path, refined: tuple[CalibrationReport, CalibrationTable], tmp_path: Path
) -> None:
    _, table = refined
    model = load_model(clean)
    first, *others = quantizable(model, ())
    assert set(table.biases) == {first.output[0], *(node.output[0] for node in others)}
    config = EngineConfig(backend="onnxruntime", exclude=(first.name,))
    build_engine(clean, "int8", config, table, None, None, tmp_path, None)
    typed = onnx.load(tmp_path / "model.onnx")
    values = {t.name: onnx.numpy_helper.to_array(t) for t in typed.graph.initializer}
    convolutions = {node.output[0]: node for node in typed.graph.node if node.op_type == "Conv"}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_allclose(values[convolutions[first.output[0]].input[2]], before[first.input[2]], rtol=1e-3)
    learned = np.asarray(table.biases[others[0].output[0]], np.float32)
    np.testing.assert_allclose(values[convolutions[others[0].output[0]].input[2]], learned, rtol=1e-3, atol=1e-6)
    assert not np.array_equal(learned, before[others[0].input[2]])


def test_tensors_of_one_range_keep_one(clean: Path, refined: tuple[CalibrationReport, CalibrationTable]) -> None:
    _, table = refined
    model = load_model(clean)
    joined = shared_ranges(model, table, ())
    for tensor in quantizable_tensors(model, (), "shared"):
        assert joined.amax[tensor] == table.amax[tensor]


def test_twice_the_same(clean: Path, refined: tuple[CalibrationReport, CalibrationTable], tmp_path: Path) -> None:
    report, table = refined
    again, same = calibrated(clean, CONFIG, tmp_path)
    assert again.cache_sha256 == report.cache_sha256
    assert same.biases == table.biases


def test_what_is_no_better_is_not_kept(clean: Path, plain: CalibrationTable) -> None:
    model = load_model(clean)
    # Images of noise teach ranges that do harm on the pictures that judge.
    noise = np.random.default_rng(0).normal(0, 40, (STEPS, 1, 1, SIZE, SIZE)).astype(np.float32)
    judges = [preprocess(picture("a").image, SPEC)[np.newaxis]]
    table, result = refine(model, plain, list(noise) * 3, judges, 3 * STEPS, EngineConfig())
    assert result.loss_after >= result.loss_before
    assert not result.kept
    assert table is plain
    assert not result.biases


def test_few_images_are_refused(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"3 calibration images are too few for calibrate\.refine_steps"):
        calibrate(clean, pictures(3), CONFIG, SPEC, tmp_path / "c.cache", tmp_path / "c.json")
    assert not list(tmp_path.iterdir())


def test_without_torch(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedError, match="refinement needs torch"):
        calibrate(clean, pictures(IMAGES), CONFIG, SPEC, tmp_path / "c.cache", tmp_path / "c.json")
    assert not list(tmp_path.iterdir())


def test_biases_of_another_size_are_refused(clean: Path, plain: CalibrationTable) -> None:
    model = load_model(clean)
    tensor = quantizable(model, ())[0].output[0]
    with pytest.raises(CalibrationError, match="does not fit"):
        quantize(model, replace(plain, biases={tensor: (1.0, 2.0, 3.0)}), half=False)


def test_the_network_api_has_no_refined_biases(
    clean: Path, refined: tuple[CalibrationReport, CalibrationTable], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="refined biases"):
        build_engine(
            clean,
            "int8",
            EngineConfig(backend="onnxruntime", source="network-api"),
            refined[1],
            None,
            None,
            tmp_path / "engine",
            None,
        )
