"""Graphs that take an image and give a mask, from the config to the verdict and the masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard, TensorSpec, from_json
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import ClassConfig, PreprocessingConfig, Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.engines import read_manifest
from pipeline.errors import ModelError
from pipeline.predictor import Predictor
from pipeline.reports import Candidate, ValidationReport
from pipeline.stages.validate import validate
from tests.conftest import Project, Result, write_images

Command = Callable[..., Result]
LOOSE = {p: {"atol": 9, "rtol": 9, "min_agreement": 0, "max_miou_drop": 1} for p in ("fp32", "fp16", "int8")}
BAKED = ["--set", "clean.input=image"]
LABELS = [*BAKED, "--set", "clean.output=labels"]


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def masks(folder: Path) -> dict[str, NDArray[np.uint8]]:
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def agreement(ours: dict[str, NDArray[np.uint8]], theirs: dict[str, NDArray[np.uint8]]) -> float:
    assert set(ours) == set(theirs) != set()
    return float(np.mean([(ours[name] == theirs[name]).mean() for name in ours]))


def test_from_image_to_mask_is_the_run_with_logits(project: Project, unet_trt: Command) -> None:
    """One config twice, on images of another size than the network's: with tensors, and with images and labels."""
    write_images(project.root / "data" / "val", range(100, 103))
    tall = project.root / "data" / "val" / "images" / "101.png"
    Image.open(tall).crop((0, 0, 50, 64)).save(tall)
    label = project.root / "data" / "val" / "labels" / "101.png"
    Image.open(label).crop((0, 0, 50, 64)).save(label)
    project.edit(
        validate={"tolerances": LOOSE, "pictures": 3},
        preprocessing={
            "height": 64,
            "width": 64,
            "channels": "grey",
            "resize": "letterbox",
            "mean": [0.4],
            "std": [0.15],
        },
    )
    plain = unet_trt("run", "-c", project.config, "--build-dir", "plain")
    baked = unet_trt("run", "-c", project.config, "--build-dir", "baked", *LABELS)
    assert (plain.code, baked.code) == (0, 0), (plain, baked)
    work = project.root / "working"
    one, other = work / "plain" / "tiny", work / "baked" / "tiny"

    proof = load(other / "clean" / "report.json")["baked"]
    assert (proof["input"], proof["output"], proof["passed"], proof["wrong"]) == ("image", "labels", True, 0)
    assert proof["shapes"] == [[1, 64, 64, 1]]
    for precision in ("fp32", "fp16", "int8"):
        manifest = read_manifest(other / "engine" / precision)
        assert manifest.inputs == (TensorSpec("image", (1, 64, 64, 1), "uint8"),)
        assert manifest.outputs == (TensorSpec("labels", (1, 64, 64), "uint8"),)
        mine, theirs = (masks(folder / "validate" / precision / "masks") for folder in (other, one))
        # FP16 and INT8 round other tensors (the image before its normalisation is exact), so only ties may differ.
        assert agreement(mine, theirs) >= (1 if precision == "fp32" else 0.98)
        report = load(other / "validate" / precision / "report.json")
        assert report["output"] == "labels"
        assert report["max_abs_error"] is None
        assert report["repeat"] == []
        assert [check["name"].split(" (")[0] for check in report["checks"]] == [
            "agreement with FP32's masks",
            "mIoU drop",
        ]
        assert "labels" in report["checks"][0]["name"]
        was = load(one / "validate" / precision / "report.json")
        assert report["scores"]["mean_iou"] == pytest.approx(was["scores"]["mean_iou"], abs=0.02)
    caches = [(folder / "calibrate" / "calibration.cache").read_text().splitlines() for folder in (one, other)]
    ranges = [dict(line.split(": ") for line in lines[1:]) for lines in caches]
    assert ranges[1]["image.add"] == ranges[0]["image"]
    ranges[1]["logits"] = ranges[1].pop("outc.conv")  # a result is called like its node, an output as it was
    assert {name: value for name, value in ranges[1].items() if not name.startswith("image")} == {
        name: value for name, value in ranges[0].items() if name != "image"
    }
    assert [t["name"] for t in load(other / "benchmark" / "report.json")["timings"]] == ["FP32 on ONNX Runtime, CPU"]
    assert "labels only" in baked.out
    assert "labels only" in (other / "report" / "index.html").read_text()

    again = unet_trt("run", "-c", project.config, "--build-dir", "baked", *LABELS)
    assert again.code == 0
    assert "clean: unchanged, reused" in again.err
    images = project.root / "data" / "val" / "images"
    for name, folder in (("plain", one), ("baked", other)):
        assert unet_trt("predict", folder / "clean" / "model.onnx", images, "-o", f"masks-{name}").code == 0
    assert agreement(masks(work / "masks-plain"), masks(work / "masks-baked")) > 0.999
    assert masks(work / "masks-baked")["101.png"].shape == (64, 50)
    shown = unet_trt("inspect", other / "clean" / "model.onnx")
    assert "uint8 [1, 64, 64, 1]" in shown.out


def test_files_are_baked_as_a_config_says(project: Project, unet_trt: Command) -> None:
    """Both forms of the command give the same bytes, and a baked graph is clean: cleaning it changes nothing."""
    work, raw = project.root / "working", "build/tiny/export/model.onnx"
    for output in ("labels", "probabilities"):
        made = unet_trt("clean", "-c", project.config, "--bake-input", "image", "--bake-output", output)
        model = work / made.out.strip()
        told = unet_trt("clean", raw, "-o", "c.onnx", "--bake-input", "image", "--bake-output", output)
        assert told.code == 0, told
        assert f"image -> {output}" in told.err
        assert (work / "c.onnx").read_bytes() == model.read_bytes()
        (given,) = onnx.load(model).graph.output
        assert given.name == output
        again = unet_trt("clean", "c.onnx", "-o", "d.onnx", "--json")
        assert (work / "d.onnx").read_bytes() == (work / "c.onnx").read_bytes(), again.out
        twice = unet_trt("clean", "c.onnx", "-o", "d.onnx", "--bake-input", "image")
        assert (twice.code, "takes an image or gives labels already" in twice.err) == (2, True)


def test_file_commands_take_baked_graphs(project: Project, unet_trt: Command) -> None:
    project.edit(validate={"tolerances": LOOSE})
    work, val = project.root / "working", project.root / "data" / "val"
    model = work / unet_trt("clean", "-c", project.config, *LABELS).out.strip()
    assert unet_trt("calibrate", model, "--images", val / "images", "-o", "c.cache").code == 0
    built = unet_trt("engine", model, "-p", "int8", "--calibration-cache", "c.cache", "-o", "m.engine")
    assert built.code == 0, built
    judged = unet_trt(
        "validate", model, "--engine", "m.typed.onnx", "--images", val / "images", "--labels", val / "labels"
    )
    assert judged.code in (0, 1), judged
    assert load(work / "validation" / "report.json")["output"] == "labels"
    plain = work / unet_trt("clean", "-c", project.config, "--build-dir", "plain").out.strip()
    mixed = unet_trt("validate", plain, "--engine", "m.typed.onnx", "--images", val / "images")
    assert mixed.code == 2
    assert "the candidate's inputs are not the reference's" in mixed.err


def test_probabilities_are_compared_as_probabilities(project: Project, unet_trt: Command) -> None:
    project.edit(engine={"precisions": ["int8"]})
    # The weights are untrained: its accuracy says nothing, the comparison is what counts.
    result = unet_trt("run", "-c", project.config, *BAKED, "--set", "clean.output=probabilities")
    assert result.code in (0, 1), result
    folder = project.root / "working" / "build" / "tiny"
    report = load(folder / "validate" / "int8" / "report.json")
    assert report["output"] == "probabilities"
    assert 0 < report["max_abs_error"] < report["logit_range"] <= 1
    assert any(check["name"].startswith("probabilities (mean) within atol 0.02") for check in report["checks"])
    assert load(folder / "clean" / "report.json")["baked"]["max_error"] < 1e-6
    (typed,) = onnx.load(folder / "engine" / "int8" / "model.onnx").graph.output
    assert typed.name == "probabilities"


CLASSES = tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in ("ground", "thing"))
CARD = ModelCard("tiny", PreprocessingConfig(height=4, width=4, channels="grey"), CLASSES)
MASK = np.array([[[0, 0, 1, 1]] * 4], np.uint8)


class Giving:
    """A model that takes images and gives one array."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("image", (1, 4, 4, 1), "uint8"),)

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        self.outputs: tuple[TensorSpec, ...] = (TensorSpec(name, values.shape, values.dtype.name),)
        self.values, self.fed = values, None

    def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
        self.fed = feeds["image"]
        return {self.outputs[0].name: self.values}

    def close(self) -> None: ...

    def __enter__(self) -> Giving:
        return self

    def __exit__(self, *exc: object) -> None: ...


def judge(reference: Giving, candidate: Giving, folder: Path, **tolerances: Any) -> ValidationReport:
    images = Dataset(("a",), lambda name: Sample(name, np.arange(16, dtype=np.uint8).reshape(4, 4, 1), MASK[0]))
    what = Candidate("int8", True, "a stand-in", "0", None, None)
    report = validate(reference, candidate, what, images, CARD, ValidateConfig(**tolerances), folder)
    assert from_json(ValidationReport, folder / "report.json") == report
    return report


def test_labels_are_judged_by_agreement_and_labels_alone(tmp_path: Path) -> None:
    assert judge(Giving("labels", MASK), Giving("labels", MASK), tmp_path).passed
    wrong = MASK.copy()
    wrong[0, 0, 0] = 1
    report = judge(Giving("labels", MASK), Giving("labels", wrong), tmp_path)
    assert report.agreement == 15 / 16
    assert not report.passed
    assert (report.max_abs_error, report.mean_abs_error, report.logit_range) == (None, None, 0)


def test_probabilities_have_their_own_default_bounds(tmp_path: Path) -> None:
    wanted = np.stack([1 - MASK * 0.8 - 0.1, MASK * 0.8 + 0.1], 1).astype(np.float32)
    reference = Giving("probabilities", wanted)
    assert judge(reference, Giving("probabilities", np.abs(wanted - np.float32(0.01))), tmp_path).passed
    shifted = Giving("probabilities", np.abs(wanted - np.float32(0.15)))
    assert not judge(reference, shifted, tmp_path).passed
    mine = {"tolerances": {"int8": Tolerance(atol=0.2, rtol=0, statistic="mean", min_agreement=1, max_miou_drop=0)}}
    assert judge(reference, shifted, tmp_path, **mine).passed


def test_models_that_take_images_get_them_as_they_are() -> None:
    model = Giving("labels", MASK)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    np.testing.assert_array_equal(Predictor(model, CARD)(image), MASK[0])
    np.testing.assert_array_equal(model.fed, image[np.newaxis])


def test_labels_that_are_no_class_are_refused() -> None:
    with pytest.raises(ModelError, match="gives class 2, and its card names 2 classes"):
        Predictor(Giving("labels", MASK * 2), CARD)(np.zeros((4, 4, 1), np.uint8))


def test_a_baked_graph_is_no_network_to_export(project: Project, unet_trt: Command) -> None:
    baked = project.root / "working" / unet_trt("clean", "-c", project.config, *LABELS).out.strip()
    project.edit(network={"onnx": str(baked)})
    again = unet_trt("clean", "-c", project.config, "--build-dir", "again", *LABELS)
    assert again.code == 2
    assert "takes other inputs than one image batch" in again.err
    with OnnxRuntimeRunner(baked) as runner:
        assert runner.outputs[0].dtype == "uint8"
