"""The verdict itself, on stand-in runners whose outputs are known."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, TensorSpec, from_json
from pipeline.config import ClassConfig, PreprocessingConfig, Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.judging import Judge
from pipeline.reports import Candidate, Interval, Offender, ValidationReport
from pipeline.stages import validate as stage
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
RARE = np.array([[0, 0, 1, 2]] * 4)
WORSE = np.array([[0, 0, 0, 1]] * 4)


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


def test_images_that_take_longer_to_compare_count_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, lock, here = Judge.measure, threading.Lock(), 0

    def slow(self: Judge, sample: Sample, *given: Any) -> Any:
        nonlocal here
        with lock:
            here += 1
            most[-1] = max(most[-1], here)
        time.sleep(0.05 * (int(sample.name.split()[1]) % 4 == 0))
        try:
            return measured(self, sample, *given)
        finally:
            with lock:
                here -= 1

    monkeypatch.setattr(Judge, "measure", slow)
    monkeypatch.setattr(stage, "THREADS", 4)
    reports, most = [], []
    for waiting in (stage.WAITING_BYTES, 0):
        monkeypatch.setattr(stage, "WAITING_BYTES", waiting)
        folder = tmp_path / str(waiting)
        folder.mkdir()
        most.append(0)
        reports.append(replace(judge(Constant(logits_of(WORSE)), dataset(*[MASK, WORSE, RARE] * 4), folder), seconds=0))
    assert reports[0] == reports[1]
    assert most[0] > most[1] == 1


def test_an_image_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the label map of image 2 has another size"):
        judge(Constant(logits_of(MASK)), dataset(MASK, MASK, MASK[:2], MASK, MASK), tmp_path)


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
    no_budget = STRICT.model_copy(update={"max_miou_drop": None})
    report = judge(Constant(logits_of(MASK)), dataset(None), tmp_path, no_budget)
    assert report.passed
    assert report.scores is None
    assert not report.drops
    assert "mIoU drop" not in {check.name for check in report.checks}


ALL_VOID = np.full_like(MASK, 255)


@pytest.mark.parametrize("budget", ["max_miou_drop", "max_class_iou_drop", "max_dice_drop", "max_boundary_f_drop"])
@pytest.mark.parametrize("labels", [None, ALL_VOID], ids=["no labels", "all void"])
def test_a_budget_that_needs_labels_is_no_silent_pass(tmp_path: Path, budget: str, labels: Any) -> None:
    tolerance = Tolerance(**{"atol": 1, "rtol": 1, "min_agreement": 0, "max_miou_drop": None, budget: 0.1})
    with pytest.raises(ConfigError, match=f"int8.{budget} cannot be judged without labels"):
        judge(Constant(logits_of(MASK)), dataset(labels), tmp_path, tolerance)


def test_default_budgets_need_no_labels(tmp_path: Path) -> None:
    perfect = Constant(logits_of(MASK))
    assert validate(Constant(logits_of(MASK)), perfect, WHAT, dataset(None), CARD, ValidateConfig(), tmp_path).passed


def test_offenders_name_class_and_image(tmp_path: Path) -> None:
    class Second(Constant):
        def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
            return {"logits": logits_of(MASK if feeds["image"].max() < 0.5 / 255 else WORSE)}

    budgets = {"max_miou_drop": 0.01, "max_class_iou_drop": 0.01, "max_dice_drop": 0.01, "max_boundary_f_drop": 0.01}
    tolerance = Tolerance(atol=99, rtol=99, min_agreement=0, min_boundary_f=0.99, **budgets)
    report = judge(Second(logits_of(MASK)), dataset(RARE, RARE), tmp_path, tolerance)
    names = {"mIoU drop", "class IoU drop", "Dice drop"}
    assert names <= failed(report)
    check = next(c for c in report.checks if c.name == "class IoU drop")
    assert check.offenders[0].class_name == "thing"
    assert check.offenders[0].image == check.worst_image == "image 1"
    assert check.value == pytest.approx(report.drops["class_iou/thing"].value)
    assert report.worst["mean_iou drop"].image == "image 1"


def test_intervals_hold_the_figure_and_one_image_has_none(tmp_path: Path) -> None:
    half = MASK.copy()
    half[:2] = 1 - half[:2]
    images = dataset(MASK, half, MASK, half, MASK)
    report = judge(Constant(logits_of(MASK)), images, tmp_path)
    assert report.scores is not None
    bounds = report.scores.intervals["mean_iou"]
    assert bounds.low < report.scores.mean_iou < bounds.high
    assert report.drops["mean_iou"].value == 0
    assert report.drops["mean_iou"].interval == Interval(0, 0)
    alone = judge(Constant(logits_of(MASK)), dataset(MASK), tmp_path)
    assert alone.scores is not None
    assert alone.scores.intervals == {}


def test_near_ties_count_apart(tmp_path: Path) -> None:
    wanted = logits_of(MASK)
    wanted[0, :2, 0, 0] = [2.0, 1.999]
    got = wanted.copy()
    got[0, 0, 0, 0] = 1.99  # nearly a tie before
    got[0, :, 3, 3] = [4, 0, 0]  # was sure of another class
    config = ValidateConfig(near_tie=0.01)
    report = validate(Constant(wanted), Constant(got), WHAT, dataset(MASK), CARD, config, tmp_path)
    assert report.flips is not None
    assert (report.flips.flipped, report.flips.near_ties, report.flips.clear) == (2, 1, 1)
    assert report.flips.max_margin == pytest.approx(1.0)
    assert report.flips.worst == Offender(1.0, "image 0")


def test_categories_are_judged_as_one_class(tmp_path: Path) -> None:
    grouped = tuple(c.model_copy(update={"category": g}) for c, g in zip(CLASSES, ("a", "b", "b"), strict=True))
    card = ModelCard("tiny", CARD.preprocessing, grouped, 255)
    confused = np.where(MASK == 1, 2, MASK)
    model = Constant(logits_of(confused))
    report = validate(model, model, WHAT, dataset(MASK), card, ValidateConfig(), tmp_path)
    assert report.scores is not None
    assert report.scores.class_iou["thing"] == 0
    assert report.scores.category_iou == {"a": 1.0, "b": 1.0}
    assert report.scores.mean_category_iou == 1.0


def test_not_finite_is_named_with_image_and_count(tmp_path: Path) -> None:
    logits = logits_of(MASK)
    logits[0, 1, 0, :2] = np.nan, np.inf
    report = judge(Constant(logits), dataset(MASK, MASK), tmp_path)
    check = report.checks[0]
    assert (check.value, check.bound, check.passed) == (4.0, 0.0, False)
    assert str(check.offenders[0]) == "image 0 2 (values of output logits)"
    assert report.outputs["logits"].not_finite == {"image 0": 2, "image 1": 2}
    assert report.outputs["logits"].cosine is None


def test_a_reference_that_is_not_finite_never_passes(tmp_path: Path) -> None:
    logits = logits_of(MASK)
    logits[0, 1, 0, 0] = np.nan
    model = Constant(logits)
    generous = Tolerance(atol=1e9, rtol=1e9, min_agreement=0, max_miou_drop=1)
    config = ValidateConfig(tolerances={"int8": generous})
    report = validate(model, model, WHAT, dataset(MASK), CARD, config, tmp_path)
    assert not report.passed
    assert [str(o) for o in report.checks[0].offenders][1] == "image 0 1 (FP32 values of output logits)"
    assert from_json(ValidationReport, tmp_path / "report.json") == report


def test_label_of_another_size_and_ids_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label map of image 0 has another size"):
        judge(Constant(logits_of(MASK)), dataset(MASK[:2]), tmp_path)
    with pytest.raises(DataError, match="holds the value 7, which is no class"):
        judge(Constant(logits_of(MASK)), dataset(np.full_like(MASK, 7)), tmp_path)


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


def test_every_output_is_compared_whatever_their_order(tmp_path: Path) -> None:
    class Two(Constant):
        def __init__(self, order: tuple[str, str], depth: float) -> None:
            super().__init__(logits_of(MASK))
            self.order, self.depth = order, depth

        def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
            values = {"logits": logits_of(MASK), "depth": np.full((1, 2), self.depth, np.float32)}
            return {name: values[name] for name in self.order}

    reference, candidate = Two(("logits", "depth"), 1.0), Two(("depth", "logits"), 1.5)
    tolerance = ValidateConfig(tolerances={"int8": STRICT})
    report = validate(reference, candidate, WHAT, dataset(MASK), CARD, tolerance, tmp_path)
    assert report.agreement == 1.0
    assert failed(report) == {"outputs"}
    assert (report.outputs["depth"].max_abs, report.outputs["logits"].max_abs) == (0.5, 0.0)
