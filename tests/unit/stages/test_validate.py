"""The verdict itself, on stand-in runners whose outputs are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, TensorSpec, from_json
from pipeline.config import ClassConfig, PreprocessingConfig, Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.errors import DataError, ModelError
from pipeline.reports import Candidate, ValidationReport
from pipeline.stages.validate import validate

CLASSES = tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in ("ground", "thing", "rare"))
CARD = ModelCard("tiny", PreprocessingConfig(height=4, width=4, channels="grey"), CLASSES, 255)
WHAT = Candidate("int8", True, "a stand-in", "0", None, None)
STRICT = Tolerance(atol=0.01, rtol=0.0, min_agreement=1.0, max_miou_drop=0.0)


class Constant:
    """Gives the same logits, float32 (1, 3, 4, 4), whatever comes in."""

    inputs = (TensorSpec("image", (1, 1, 4, 4), "float32"),)
    outputs = (TensorSpec("logits", (1, 3, 4, 4), "float32"),)

    def __init__(self, logits: NDArray[np.float32], name: str = "logits") -> None:
        self.logits, self.name = logits, name

    def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
        return {self.name: self.logits.copy()}

    def close(self) -> None: ...

    def __enter__(self) -> Constant:
        return self

    def __exit__(self, *exc: object) -> None: ...


def logits_of(mask: NDArray[np.integer], margin: float = 4) -> NDArray[np.float32]:
    return (np.eye(3, dtype=np.float32)[mask].transpose(2, 0, 1)[np.newaxis] * margin).astype(np.float32)


MASK = np.array([[0, 0, 1, 1]] * 4)


def dataset(*labels: NDArray[np.integer] | None) -> Dataset:
    samples = {
        f"image {i}": Sample(
            f"image {i}", np.full((4, 4, 1), i, np.uint8), None if label is None else label.astype(np.uint8)
        )
        for i, label in enumerate(labels)
    }
    return Dataset(tuple(samples), samples.__getitem__)


def judge(candidate: Constant, images: Dataset, folder: Path, tolerance: Tolerance = STRICT) -> ValidationReport:
    config = ValidateConfig(tolerances={"int8": tolerance}, pictures=1, saved_runs=1)
    report = validate(Constant(logits_of(MASK)), candidate, WHAT, images, CARD, config, folder)
    assert from_json(ValidationReport, folder / "report.json") == report
    return report


def failed(report: ValidationReport) -> set[str]:
    return {check.name.split(" (")[0] for check in report.checks if not check.passed}


def test_equal_outputs_pass_and_absent_classes_have_no_iou(tmp_path: Path) -> None:
    report = judge(Constant(logits_of(MASK)), dataset(MASK, MASK), tmp_path)
    assert report.passed
    assert report.scores is not None
    assert report.scores.class_iou == {"ground": 1.0, "thing": 1.0, "rare": None}
    assert report.scores.mean_iou == 1.0
    assert (tmp_path / "masks" / "image 0.png").is_file()


def test_void_is_not_counted(tmp_path: Path) -> None:
    label = MASK.copy()
    label[0, :2] = 255
    wrong_where_void = MASK.copy()
    wrong_where_void[0, :2] = 2
    report = judge(Constant(logits_of(wrong_where_void)), dataset(label), tmp_path)
    assert report.scores is not None
    assert report.scores.mean_iou == 1.0
    assert report.agreement == pytest.approx(14 / 16)
    assert failed(report) == {"outputs", "agreement with FP32's masks"}


def test_a_lost_class_fails_the_budget(tmp_path: Path) -> None:
    lost = np.zeros_like(MASK)
    report = judge(Constant(logits_of(lost)), dataset(MASK), tmp_path)
    assert report.scores is not None
    assert report.scores.class_iou["thing"] == 0.0
    assert "mIoU drop" in failed(report)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_not_finite_never_passes(tmp_path: Path, poison: float) -> None:
    logits = logits_of(MASK)
    logits[0, 2, 0, 0] = poison
    generous = Tolerance(atol=1e9, rtol=1e9, min_agreement=0, max_miou_drop=1)
    report = judge(Constant(logits), dataset(MASK), tmp_path, generous)
    assert not report.passed
    assert "outputs are finite" in failed(report)
    assert report.max_abs_error is None


def test_every_image_counts_and_the_worst_is_named(tmp_path: Path) -> None:
    class Second(Constant):
        def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
            flipped = feeds["image"].max() > 0.5 / 255
            return {"logits": logits_of(1 - MASK) if flipped else logits_of(MASK)}

    report = judge(Second(logits_of(MASK)), dataset(MASK, MASK), tmp_path)
    assert [image.agreement for image in report.images] == [1.0, 0.0]
    assert {check.worst_image for check in report.checks if not check.passed} == {"image 1"}


def test_without_labels_only_agreement_is_judged(tmp_path: Path) -> None:
    report = judge(Constant(logits_of(MASK)), dataset(None), tmp_path)
    assert report.passed
    assert report.scores is None
    assert "mIoU drop" not in {check.name for check in report.checks}


def test_statistics_other_than_elementwise(tmp_path: Path) -> None:
    logits = logits_of(MASK)
    logits[0, 0, 0, 0] += 1
    loose = Tolerance(atol=0.1, rtol=0, statistic="mean", min_agreement=0, max_miou_drop=1)
    assert judge(Constant(logits), dataset(MASK), tmp_path, loose).passed
    tight = Tolerance(atol=0.1, rtol=0, statistic="max", min_agreement=0, max_miou_drop=1)
    assert not judge(Constant(logits), dataset(MASK), tmp_path, tight).passed


def test_other_outputs_than_the_reference(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="outputs are not the reference's"):
        judge(Constant(logits_of(MASK), name="masks"), dataset(MASK), tmp_path)
    with pytest.raises(ModelError, match="outputs are not the reference's"):
        judge(Constant(logits_of(MASK)[..., :2]), dataset(MASK), tmp_path)


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image to validate"):
        judge(Constant(logits_of(MASK)), dataset(), tmp_path)


def test_image_of_another_size(tmp_path: Path) -> None:
    samples = Dataset(("a",), lambda name: Sample(name, np.zeros((5, 4, 1), np.uint8), None))
    with pytest.raises(DataError, match="another size than the model takes"):
        judge(Constant(logits_of(MASK)), samples, tmp_path)
