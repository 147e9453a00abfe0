"""The whole pipeline as a user runs it: cells with its shipped weights on few images, and reuse on a tiny project."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.conftest import Project, Result

Command = Callable[..., Result]
FEW = ("validate.images=3", "calibrate.images=4", "validate.pictures=1")
FEW += ("benchmark.seconds=0.3", "benchmark.warmup_seconds=0.1")


@pytest.fixture(scope="session")
def cells(run_once: Callable[..., tuple[Path, Result]]) -> tuple[Path, Result]:
    pytest.importorskip("torch", reason="torch is not installed: nothing to export")
    return run_once("cells", *FEW, afresh=True)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_run_passes_and_prints_the_table(cells: tuple[Path, Result]) -> None:
    _, result = cells
    assert result.code == 0, result
    for precision in ("fp32", "fp16", "int8"):
        (row,) = [line for line in result.out.splitlines() if f" {precision} " in line]
        assert "passed" in row


def test_every_artifact_of_the_contract_is_there(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    names = ["export/model.onnx", "clean/model.onnx", "clean/report.json", "calibrate/calibration.cache"]
    names += ["calibrate/report.json", "benchmark/report.json", "pictures/report.json", "run.json"]
    names += ["report/index.html", "report/report.md", "report/report.json"]
    for precision in ("fp32", "fp16", "int8"):
        names += [f"engine/{precision}/{name}" for name in ("model.engine", "manifest.json", "model.onnx")]
        names += [f"validate/{precision}/{name}" for name in ("report.json", "inputs.json", "data_loader.py")]
    assert [name for name in names if not (folder / name).is_file()] == []
    record = load(folder / "run.json")["stages"]
    assert set(record) >= {"export", "clean", "calibrate", "engine/int8", "validate/int8", "benchmark", "report"}


def test_accuracy_is_what_the_card_promises_and_quantization_shows(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    reports = {p: load(folder / "validate" / p / "report.json") for p in ("fp32", "fp16", "int8")}
    assert 0.80 < reports["fp32"]["scores"]["mean_iou"] < 0.95
    assert reports["fp32"]["agreement"] > 0.9999
    assert 0.97 < reports["int8"]["agreement"] < reports["fp16"]["agreement"] < 1
    assert all(report["candidate"]["emulated"] for report in reports.values())
    assert reports["int8"]["candidate"]["ran"].startswith("ONNX Runtime")


def test_engine_graphs_are_typed(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    half = onnx.load(folder / "engine" / "fp16" / "model.onnx")
    kinds = {t.data_type for t in half.graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    quantized = onnx.load(folder / "engine" / "int8" / "model.onnx")
    operators = [node.op_type for node in quantized.graph.node]
    assert operators.count("Conv") == 19
    assert operators.count("DequantizeLinear") >= 19
    cleaned = onnx.load(folder / "clean" / "model.onnx")
    assert len(cleaned.graph.node) == 49


def test_calibration_cache_is_tensorrts_text(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    lines = (folder / "calibrate" / "calibration.cache").read_text().splitlines()
    assert lines[0].endswith("-EntropyCalibration2")
    assert lines[1].startswith("image: ")
    assert len(lines) == 1 + 1 + 49


def test_pictures_are_masks_of_the_image_size(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    for kind in ("masks", "labels", "overlays", "images"):
        (picture,) = (folder / "validate" / "int8" / kind).iterdir()
        with Image.open(picture) as image:
            assert image.size == (512, 512)
            if kind in ("masks", "labels"):
                assert image.mode == "P"
                assert set(np.unique(np.asarray(image))) <= {0, 1, 2, 3}


def test_report_is_self_contained(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    page = (folder / "report" / "index.html").read_text()
    assert len(page) < 8_000_000
    assert "http://" not in page
    assert "https://" not in page
    assert "emulated" in page
    assert "nucleus" in page


def test_comparison_repeats_by_hand_as_printed(cells: tuple[Path, Result]) -> None:
    folder, _ = cells
    for precision in ("fp16", "int8"):
        report = load(folder / "validate" / precision / "report.json")
        (command,) = report["repeat"]
        arguments = shlex.split(command)
        assert arguments[0] == "polygraphy"
        program = "import sys; from polygraphy.tools import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments[1:]],
            cwd=folder / "validate" / precision,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout


def test_validation_fails_beyond_its_bounds_and_still_writes_its_report(project: Project, unet_trt: Command) -> None:
    bound = {"int8": {"atol": 0, "rtol": 0, "min_agreement": 1.0, "max_miou_drop": 0}}
    project.edit(validate={"tolerances": bound})
    result = unet_trt("validate", "-c", project.config, "-p", "int8")
    assert result.code == 1, result
    assert "images outside 3 (at most 0)" in result.err
    report = load(project.root / "working" / "build" / "tiny" / "validate" / "int8" / "report.json")
    assert report["passed"] is False


def stages(result: Result, what: str) -> set[str]:
    return {line.split(":")[0] for line in result.err.splitlines() if what in line}


def test_only_what_changed_runs_again(project: Project, unet_trt: Command) -> None:
    loose = {p: {"atol": 9, "rtol": 9, "min_agreement": 0, "max_miou_drop": 1} for p in ("fp32", "fp16", "int8")}
    project.edit(validate={"tolerances": loose})
    first = unet_trt("run", "-c", project.config)
    assert first.code == 0, first
    everything = stages(first, ": running")
    assert {"export", "clean", "calibrate", "engine/int8", "validate/fp16", "benchmark", "report"} <= everything

    again = unet_trt("run", "-c", project.config)
    assert stages(again, ": running") == set()
    assert stages(again, "reused") == everything

    other = unet_trt("run", "-c", project.config, "--set", "calibrate.algorithm=minmax")
    changed = {"calibrate", "engine/int8", "validate/int8", "benchmark", "pictures", "report"}
    assert stages(other, ": running") == changed

    build = project.root / "working" / "build" / "tiny"
    equal = unet_trt("clean", "-c", project.config, "--set", "clean.equalize=3")
    assert stages(equal, ": running") == {"equalize"}
    assert equal.out.strip().endswith("equalize/model.onnx")
    judged = unet_trt("validate", "-c", project.config, "--set", "clean.equalize=3", "-p", "int8", "--layers")
    assert stages(judged, ": running") == {"calibrate", "engine/int8", "layers/int8"}
    assert len(load(build / "equalize" / "report.json")["images"]) == 3

    (build / "clean" / "model.onnx").write_bytes(b"edited")
    healed = unet_trt("run", "-c", project.config, "--set", "calibrate.algorithm=minmax")
    assert healed.code == 0
    assert "clean" in stages(healed, ": running")
    assert "export" in stages(healed, "reused")

    shutil.copy(
        project.root / "data" / "val" / "images" / "100.png", project.root / "data" / "val" / "images" / "101.png"
    )
    moved = unet_trt("run", "-c", project.config, "--set", "calibrate.algorithm=minmax")
    assert {"validate/fp32", "validate/int8"} <= stages(moved, ": running")

    forced = unet_trt("export", "-c", project.config, "--force")
    assert stages(forced, ": running") == {"export"}


def test_failed_stage_is_not_reused(project: Project, unet_trt: Command) -> None:
    assert unet_trt("export", "-c", project.config, "--set", "export.tolerance=1e-30").code == 1
    repaired = unet_trt("export", "-c", project.config)
    assert stages(repaired, ": running") == {"export"}


def test_commands_on_files(project: Project, unet_trt: Command) -> None:
    work = project.root / "working"
    raw = work / unet_trt("export", "-c", project.config).out.strip()
    assert unet_trt("clean", raw, "-o", "clean.onnx", "--report", "clean.json").code == 0
    assert load(work / "clean.json")
    images = project.root / "data" / "train" / "images"
    assert unet_trt("calibrate", "clean.onnx", "--images", images, "-o", "c.cache", "--algorithm", "minmax").code == 0
    assert (work / "c.cache").read_text().startswith("TRT-8600-MinMaxCalibration\n")
    built = unet_trt("engine", "clean.onnx", "-p", "int8", "--calibration-cache", "c.cache", "-o", "m.engine")
    assert built.code == 0, built
    assert load(work / "manifest.json")["precision"] == "int8"
    val = project.root / "data" / "val"
    judged = unet_trt(
        "validate", "clean.onnx", "--engine", "m.typed.onnx", "--images", val / "images", "--labels", val / "labels"
    )
    assert judged.code in (0, 1), judged
    assert load(work / "validation" / "report.json")["scores"]["mean_iou"] > 0
    for file, fact in (("clean.onnx", "Conv"), ("c.cache", "minmax"), ("m.engine", "int8"), ("manifest.json", "int8")):
        shown = unet_trt("inspect", file)
        assert shown.code == 0, shown
        assert fact in shown.out


def test_predict_writes_masks_and_never_overwrites(project: Project, unet_trt: Command) -> None:
    work = project.root / "working"
    model = work / unet_trt("clean", "-c", project.config).out.strip()
    val = project.root / "data" / "val" / "images"
    result = unet_trt("predict", model, val, "-o", "masks")
    assert result.code == 0, result
    lines = [json.loads(line) for line in (work / "masks" / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["100.png", "101.png", "102.png"]
    assert all(abs(sum(line["area"].values()) - 1) < 1e-3 for line in lines)
    with Image.open(work / "masks" / "100.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 64))
    again = unet_trt("predict", model, val, "-o", "masks")
    assert again.code == 2
    assert "exists already" in again.err
    assert unet_trt("predict", model, val, "-o", "masks", "--overwrite").code == 0
    assert unet_trt("predict", model, work, "-o", "other").code == 2


def test_regress_accepts_then_catches(project: Project, unet_trt: Command) -> None:
    loose = {"fp32": {"atol": 9, "rtol": 9, "min_agreement": 0, "max_miou_drop": 1}}
    project.edit(validate={"tolerances": loose}, engine={"precisions": ["fp32"]})
    missing = unet_trt("regress", "-c", project.config)
    assert missing.code == 2
    assert "--update" in missing.err
    assert unet_trt("regress", "-c", project.config, "--update").code == 0
    assert unet_trt("regress", "-c", project.config).code == 0
    file = project.root / "working" / "baselines" / "tiny.json"
    baseline = load(file)
    baseline["machines"]["emulated"]["fp32/mean_iou"]["value"] += 0.01
    file.write_text(json.dumps(baseline))
    worse = unet_trt("regress", "-c", project.config, "--junit", "regress.xml", "--markdown", "regress.md")
    assert worse.code == 1
    assert "fp32/mean_iou" in worse.err
    assert "REGRESSED" in worse.out
    assert 'failures="1"' in (project.root / "working" / "regress.xml").read_text()
    assert "**REGRESSED**" in (project.root / "working" / "regress.md").read_text()
    unexplained = unet_trt("regress", "-c", project.config, "--update")
    assert unexplained.code == 2
    assert "--reason" in unexplained.err
    assert unet_trt("regress", "-c", project.config, "--update", "--reason", "a test").code == 0
    assert load(file)["accepted"][-1]["reason"] == "a test"
    assert unet_trt("regress", "-c", project.config, "--set", "data.seed=1", "--reason", "why").code == 2


def test_doctor_says_what_this_machine_can_do(unet_trt: Command) -> None:
    result = unet_trt("doctor", "--json")
    assert result.code == 0, result
    facts = json.loads(result.out)
    assert facts["onnxruntime"]["runs"] == "yes"
    assert facts["tensorrt-rtx"]["builds engines"] == "yes"
    assert {"tensorrt", "packages"} <= set(facts)


def test_help_is_there_for_every_command(unet_trt: Command) -> None:
    listed = unet_trt("--help").out
    commands = set(re.findall(r"^│ (\w+) +[A-Z]", listed, re.MULTILINE))
    assert commands >= {"run", "export", "clean", "calibrate", "engine", "validate", "benchmark", "report", "regress"}
    assert commands >= {"predict", "inspect", "doctor", "train"}
    for command in commands:
        assert unet_trt(command, "--help").code == 0
