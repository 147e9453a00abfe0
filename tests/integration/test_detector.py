"""``task: tensors``: the detector from its shipped weights to the verdict, and what that task has not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image

from pipeline.artifacts import from_json
from pipeline.config import Config, load_config
from pipeline.data.dataset import open_dataset
from pipeline.errors import CheckFailed, ConfigError, ModelError
from pipeline.reports import ValidationReport
from pipeline.stages.regress import figures_of
from tests.conftest import REPOSITORY, Result

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to export")
Command = Callable[..., Result]
CONFIG = REPOSITORY / "configs" / "detector.yaml"
FEW = ("validate.images=8", "calibrate.images=16", "benchmark.seconds=0.05", "benchmark.warmup_seconds=0.01")
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="session")
def build(run_once: Callable[..., tuple[Path, Result]]) -> tuple[Path, Result]:
    return run_once("detector", *FEW)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_precision_passes_by_the_values_alone(build: tuple[Path, Result]) -> None:
    folder, result = build
    assert result.code == 0, result
    reports = {p: load(folder / "validate" / p / "report.json") for p in PRECISIONS}
    for report in reports.values():
        assert report["output"] == "tensors"
        assert list(report["outputs"]) == ["small", "medium", "large"]
        assert (report["agreement"], report["scores"], report["flips"], report["pictures"]) == (None, None, None, [])
        assert report["repeat"]
    decibels = {p: [o["signal_to_error_db"] for o in reports[p]["outputs"].values()] for p in ("fp16", "int8")}
    assert all(half > 40 for half in decibels["fp16"])
    assert all(15 < int8 < half for int8, half in zip(decibels["int8"], decibels["fp16"], strict=True))
    assert "masks" not in result.out
    page = (folder / "report" / "index.html").read_text()
    assert "signal to error of output small, dB" in page
    assert "at least 40: " in page
    summary = (folder / "report" / "report.md").read_text()
    worst = min(decibels["int8"])
    for text in (page, summary, result.out):
        assert "IoU" not in text
        assert f"{worst:.1f} dB" in text


def test_regression_compares_cosines(build: tuple[Path, Result]) -> None:
    report = from_json(ValidationReport, build[0] / "validate" / "int8" / "report.json")
    figures = figures_of([report])
    assert list(figures) == [f"int8/cosine/{name}" for name in ("small", "medium", "large")]
    assert all(figure is not None and 0.9 < figure < 1 for figure in figures.values())


def test_silu_is_written_in_operators_that_every_opset_has(build: tuple[Path, Result]) -> None:
    folder, _ = build
    units = sum(isinstance(m, torch.nn.SiLU) for m in detector().modules())
    for stage in ("export", "clean"):
        operators = [node.op_type for node in onnx.load(folder / stage / "model.onnx").graph.node]
        assert operators.count("Sigmoid") == operators.count("Mul") == units
        assert set(operators) <= {"Conv", "Sigmoid", "Mul", "Add", "Concat", "Resize"}


def test_ap50_survives_every_precision(build: tuple[Path, Result]) -> None:
    from benchmarks.detector import ap50, models, runner_inference, torch_inference
    from pipeline.networks import build_network
    from pipeline.opening import open_model

    folder, _ = build
    config = load_config(CONFIG)
    images = open_dataset(config.data, config.preprocessing, "validation").first(30)
    original = ap50(images, 3, torch_inference(build_network(config.network), config)).mean()
    assert original > 0.8
    forms = dict(models(folder))
    assert len(forms) == 4
    for name, path in forms.items():
        runner, _ = open_model(path)
        with runner:
            figure = ap50(images, 3, runner_inference(runner, config)).mean()
        assert figure == pytest.approx(original, abs=0.03 if "INT8" in name else 0.005), name


def test_frames_of_a_folder(build: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = build
    config = load_config(CONFIG)
    (tmp_path / "film").mkdir()
    for sample in open_dataset(config.data, config.preprocessing, "validation").first(4):
        Image.fromarray(sample.image).resize((384, 288)).save(tmp_path / "film" / f"{sample.name}.png")
    model, film, drawn = folder / "clean" / "model.onnx", tmp_path / "film", tmp_path / "drawn"
    done = subprocess.run(
        [sys.executable, "benchmarks/detector.py", "frames", model, film, "-o", drawn],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 frames, ")
    assert "frames a second in all" in done.stdout
    assert len(list(drawn.glob("*.png"))) == 4


def test_validation_on_files(build: tuple[Path, Result], tmp_path: Path, unet_trt: Command) -> None:
    folder, _ = build
    config = load_config(CONFIG)
    images = tmp_path / "images"
    images.mkdir()
    for sample in open_dataset(config.data, config.preprocessing, "validation").first(2):
        Image.fromarray(sample.image).save(images / f"{sample.name}.png")
    clean = folder / "clean" / "model.onnx"
    judged = unet_trt("validate", clean, "--engine", folder / "engine" / "int8" / "model.onnx", "--images", images)
    assert judged.code == 0, judged
    assert "signal to error of output large, dB" in judged.out
    refused = unet_trt("predict", clean, images, "-o", "masks")
    assert refused.code == 2
    assert "gives tensors and no masks" in refused.err
    assert not (tmp_path / "working" / "masks").exists()
    refused = unet_trt("calibrate", clean, "--images", images, "-o", "c.cache", "--algorithm", "auto")
    assert refused.code == 2
    assert "algorithm: auto compares masks" in refused.err


def detector() -> Any:
    from models.detector import Detector

    torch.manual_seed(0)
    return Detector(3, 3, 12)


# ---------------------------------------------------------------------- other networks


class Named(torch.nn.Module):
    """Two outputs of other ranks, as a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.nn.functional.silu(self.conv(x))
        return {"map": y, "mean": y.mean((2, 3))}


class Textual(torch.nn.Module):
    """Returns what no engine can."""

    def forward(self, x: torch.Tensor) -> str:
        return "boxes"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    settings = {
        "name": "small",
        "task": "tensors",
        "network": {"factory": f"{__name__}:Named"},
        "data": {"kind": "folder", "root": str(tmp_path), "train": {"images": "images"}},
        "preprocessing": {"height": 16, "width": 20},
    }
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def exported(config: Config, folder: Path) -> onnx.ModelProto:
    from pipeline.run import Run

    with Run(config, folder) as work:
        return onnx.load(work.export())


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_outputs_of_any_rank_with_a_free_batch(small: Path, tmp_path: Path, exporter: str) -> None:
    sets = ["export.dynamic=[batch]", "engine.profile.batch={min: 1, opt: 1, max: 4}", f"export.exporter={exporter}"]
    model = exported(load_config(small, sets), tmp_path / "build")
    shapes = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output]
    assert [output.name for output in model.graph.output] == ["output_0", "output_1"]
    assert shapes == [["batch", 4, 14, 18], ["batch", 4]]


def test_names_of_outputs(small: Path, tmp_path: Path) -> None:
    named = load_config(small, ["export.outputs=[map, mean]"])
    assert [output.name for output in exported(named, tmp_path / "build").graph.output] == ["map", "mean"]
    for names in ("[map]", "[map, map]", "[map, image]"):
        with pytest.raises(ModelError, match=r"export\.outputs does not name the network's 2 outputs"):
            exported(load_config(small, [f"export.outputs={names}"]), tmp_path / "build")


def test_a_network_without_tensors(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the network returns no tensors"):
        exported(load_config(small, [f"network.factory={__name__}:Textual"]), tmp_path / "build")


def test_a_budget_on_values_fails(small: Path, tmp_path: Path) -> None:
    from pipeline.run import Run

    bound = "validate.tolerances.int8={atol: 9, rtol: 9, min_signal_to_error_db: 99}"
    sets = [bound, "engine.backend=onnxruntime", "calibrate.images=2", "calibrate.calibrator=cpu"]
    with Run(load_config(small, sets), tmp_path / "build") as work:
        report = work.validate("int8")
        failed = [check for check in report.checks if not check.passed]
        assert {check.name for check in failed} == {f"signal to error of output output_{n}, dB" for n in (0, 1)}
        assert all(check.worst_image in "abc" for check in failed if check.worst_image)
        with pytest.raises(CheckFailed, match="2 check"):
            work.verdict(["int8"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task=segmentation", "data.classes needs two classes or more, got 0"),
        ("clean.output=labels", "clean.output: labels needs classes by pixel"),
        ("engine.precisions=[mixed]", "engine.precisions: mixed keeps a budget of masks"),
        ("calibrate.algorithm=auto", "calibrate.algorithm: auto compares masks"),
        (
            "validate.tolerances.int8={atol: 1, rtol: 1, min_agreement: 0.9}",
            r"tolerances\.int8\.min_agreement judges masks",
        ),
    ],
)
def test_what_needs_masks(small: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(small, [setting])


def test_mixed_precision_on_request(small: Path, tmp_path: Path) -> None:
    from pipeline.run import Run

    with Run(load_config(small), tmp_path / "build") as work, pytest.raises(ConfigError, match="budget of masks"):
        work.engine("mixed")


def test_what_needs_tensors() -> None:
    cells = REPOSITORY / "configs" / "cells.yaml"
    for setting, message in (
        ("data.kind=shapes", "needs task: tensors"),
        ("export.outputs=[a]", r"export\.outputs belongs to task: tensors"),
        ("validate.tolerances.fp16={atol: 1, rtol: 1, max_miou_drop: 0.1}", "needs min_agreement"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(cells, [setting])


def test_training_is_the_networks_own(tmp_path: Path) -> None:
    from pipeline.stages.train import train

    with pytest.raises(ConfigError, match="trains segmentation networks"):
        train(load_config(CONFIG), tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
