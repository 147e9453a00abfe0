"""One precision against FP32 on ONNX Runtime and against the labels, on real images."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CompareFunc, RunResults
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from pipeline.artifacts import ModelCard, TensorSpec, to_json
from pipeline.backends.base import Runner, feed_image
from pipeline.config import Precision, Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.pictures import mask_png, overlay_png, palette
from pipeline.data.preprocessing import Pixels, class_ids, restore_mask
from pipeline.errors import DataError, ModelError
from pipeline.graph.deployment import Output, output_kind
from pipeline.metrics.segmentation import class_iou, confusion_matrix, mean_iou, pixel_accuracy
from pipeline.progress import track
from pipeline.reports import Candidate, Check, ImageResult, Scores, ValidationReport

log = logging.getLogger(__name__)
REFERENCE = "onnxruntime-fp32"
# atol of probabilities, 0…1, where the config names no tolerance: that of logits would let anything pass.
PROBABILITY_ATOL: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.02}

DATA_LOADER = '''"""The preprocessed images of this comparison, for `polygraphy run --data-loader-script`."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    yield from load_json(str(Path(__file__).parent / "inputs.json"))
'''


class _Adapter(BaseRunner):  # type: ignore[misc]
    """A runner of ours, already loaded, as Polygraphy's Comparator wants it."""

    def __init__(self, runner: Runner, name: str) -> None:
        super().__init__(name=name, prefix=name)
        self.runner = runner

    def activate_impl(self) -> None: ...

    def deactivate_impl(self) -> None: ...

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.runner.inputs:
            metadata.add(spec.name, np.dtype(spec.dtype), spec.shape)
        return metadata

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        started = time.perf_counter()
        # Polygraphy hashes and stores arrays, and takes contiguous ones only.
        outputs = {name: np.ascontiguousarray(array) for name, array in self.runner(feed_dict).items()}
        self.inference_time = time.perf_counter() - started
        return outputs


@contextlib.contextmanager
def _polygraphy() -> Iterator[None]:
    """Polygraphy quiet, and its errors as the project's own."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except PolygraphyException as error:
        raise ModelError(f"Polygraphy cannot compare the outputs: {error}") from error


def validate(
    reference: Runner,
    candidate: Runner,
    what: Candidate,
    dataset: Dataset,
    card: ModelCard,
    config: ValidateConfig,
    folder: Path,
    reference_path: str = "model.onnx",
) -> ValidationReport:
    """Run both on every image and write ``report.json``, masks, overlays and Polygraphy's run results to ``folder``.

    Logits and probabilities are compared value by value, and as masks. Labels are compared as masks alone: the
    difference of two class ids means nothing.

    Args:
        reference: FP32 on ONNX Runtime.
        candidate: the engine, or its typed graph on ONNX Runtime.
        dataset: images with labels, or without (then only agreement with FP32 is judged).
        reference_path: where the reference's ONNX file lies, seen from ``folder``; for the printed command.

    Raises:
        DataError: no image.
        ModelError: the two take different inputs, or give different outputs or shapes.
    """
    started = time.perf_counter()
    if not len(dataset):
        raise DataError("there is no image to validate on", expected="at least one validation image")
    if _forms(candidate.inputs) != _forms(reference.inputs):
        raise ModelError(
            "the candidate's inputs are not the reference's",
            expected=", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in reference.inputs),
            got=", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in candidate.inputs),
            fix="validate the engine with the ONNX file it was built from",
        )
    kind = output_kind(reference.outputs[0])
    tolerance = _tolerance(config, what.precision, kind)
    judge = _Judge(card, tolerance, kind)
    runners = [_Adapter(candidate, f"{what.ran.replace(' ', '-')}-{what.precision}"), _Adapter(reference, REFERENCE)]
    saved: list[tuple[dict[str, Any], RunResults]] = []
    pictures: list[str] = []
    for index, sample in enumerate(track(dataset, f"validating {what.precision}", len(dataset))):
        feed = feed_image(candidate.inputs[0], sample.image, card.preprocessing, f"the image {sample.name}")
        with _polygraphy():
            results = Comparator.run(runners, data_loader=[feed])
        mask = judge.add(sample, results)
        if index < config.saved_runs:
            saved.append((feed, results))
        if index < config.pictures:
            pictures += _draw(sample, mask, card, folder)
    _save_runs(saved, folder)
    repeat = () if kind == "labels" else _commands(what, tolerance, reference_path)
    report = judge.report(what, repeat, tuple(pictures), started)
    (folder / "report.json").write_bytes(to_json(report))
    return report


def _forms(specs: Sequence[TensorSpec]) -> list[tuple[str, str, int]]:
    return [(spec.name, spec.dtype, len(spec.shape)) for spec in specs]


def _tolerance(config: ValidateConfig, precision: Precision, kind: Output) -> Tolerance:
    tolerance = config.tolerance(precision)
    if kind == "probabilities" and precision not in config.tolerances:
        return tolerance.model_copy(update={"atol": PROBABILITY_ATOL[precision]})
    return tolerance


class _Judge:
    """Sums over the images; nothing that grows with their size is kept."""

    def __init__(self, card: ModelCard, tolerance: Tolerance, kind: Output) -> None:
        classes = len(card.classes)
        self.card, self.tolerance, self.kind = card, tolerance, kind
        self.agreement = np.zeros((classes, classes), np.int64)
        self.against_labels = {"reference": self.agreement.copy(), "candidate": self.agreement.copy()}
        self.labelled = False
        self.images: list[ImageResult] = []
        self.elementwise: list[tuple[float, bool]] = []
        self.absolute_sum, self.count, self.logit_range = 0.0, 0, 0.0
        t = tolerance
        self.compare: Callable[..., Any] = CompareFunc.simple(
            check_error_stat=t.statistic, rtol=t.rtol, atol=t.atol, error_quantile=t.quantile
        )

    def add(self, sample: Sample, results: RunResults) -> Pixels:
        """Count one image; returns the candidate's mask at the image's size."""
        ours, theirs = (dict(iterations[0].items()) for _, iterations in results.items())
        if set(ours) != set(theirs) or any(ours[k].shape != theirs[k].shape for k in ours):
            raise ModelError(
                "the candidate's outputs are not the reference's",
                expected=str({k: v.shape for k, v in theirs.items()}),
                got=str({k: v.shape for k, v in ours.items()}),
                fix="validate the engine with the ONNX file it was built from",
            )
        got, wanted = next(iter(ours.values())), next(iter(theirs.values()))
        largest = None if self.kind == "labels" else self._values(results, got, wanted)
        classes = len(self.card.classes)
        masks = {"reference": class_ids(wanted, classes), "candidate": class_ids(got, classes)}
        restored = {k: restore_mask(m, self.card.preprocessing, *sample.image.shape[:2]) for k, m in masks.items()}
        agreement = confusion_matrix(restored["reference"], restored["candidate"], classes)
        self.agreement += agreement
        miou: dict[str, float | None] = {"reference": None, "candidate": None}
        if sample.label is not None:
            for side, mask in restored.items():
                confusion = confusion_matrix(sample.label, mask, classes)
                self.labelled |= bool(confusion.any())
                self.against_labels[side] += confusion
                miou[side] = _finite(mean_iou(confusion))
        self.images.append(
            ImageResult(sample.name, pixel_accuracy(agreement), largest, miou["reference"], miou["candidate"])
        )
        return restored["candidate"]

    def _values(self, results: RunResults, got: NDArray[Any], wanted: NDArray[Any]) -> float | None:
        """Compare value by value; the largest error, None where it is not finite."""
        with _polygraphy():
            accuracy = Comparator.compare_accuracy(results, compare_func=self.compare)
        error = np.abs(got.astype(np.float32) - wanted)
        finite = bool(np.isfinite(error).all())
        largest = float(error.max()) if finite else None
        self.elementwise.append((float("nan") if largest is None else largest, bool(accuracy) and finite))
        self.absolute_sum += float(error.sum(dtype=np.float64))
        self.count += error.size
        self.logit_range = max(self.logit_range, float(np.abs(wanted).max()))
        return largest

    def report(
        self, what: Candidate, repeat: tuple[str, ...], pictures: tuple[str, ...], started: float
    ) -> ValidationReport:
        scores = {side: self._scores(side) if self.labelled else None for side in self.against_labels}
        checks = self._checks(scores["reference"], scores["candidate"])
        return ValidationReport(
            candidate=what,
            passed=all(check.passed for check in checks),
            checks=checks,
            images=tuple(self.images),
            agreement=pixel_accuracy(self.agreement),
            max_abs_error=self._largest(),
            mean_abs_error=_finite(self.absolute_sum / self.count) if self.count else None,
            logit_range=self.logit_range,
            reference=scores["reference"],
            scores=scores["candidate"],
            repeat=repeat,
            pictures=pictures,
            seconds=time.perf_counter() - started,
            output=self.kind,
        )

    def _scores(self, side: str) -> Scores:
        confusion = self.against_labels[side]
        present = confusion.sum(1) > 0
        iou = {
            c.name: float(value) if held else None
            for c, value, held in zip(self.card.classes, class_iou(confusion), present, strict=True)
        }
        return Scores(mean_iou(confusion), pixel_accuracy(confusion), iou)

    def _checks(self, reference: Scores | None, scores: Scores | None) -> tuple[Check, ...]:
        least = min(self.images, key=lambda image: image.agreement)
        agreement = pixel_accuracy(self.agreement)
        bound = self.tolerance.min_agreement
        name = "agreement with FP32's masks"
        if self.kind == "labels":
            name += " (the outputs are labels: no values to compare)"
        checks = [*self._value_checks(), Check(name, agreement, bound, agreement >= bound, least.name)]
        if reference is not None and scores is not None:
            drop = reference.mean_iou - scores.mean_iou
            worst = max(self.images, key=lambda image: (image.reference_miou or 0) - (image.miou or 0))
            most = self.tolerance.max_miou_drop
            checks.append(Check("mIoU drop", drop, most, drop <= most, worst.name))
        return tuple(checks)

    def _value_checks(self) -> list[Check]:
        if self.kind == "labels":
            return []
        t = self.tolerance
        failed = [image.name for image, (_, ok) in zip(self.images, self.elementwise, strict=True) if not ok]
        largest = self._largest()
        what = "probabilities" if self.kind == "probabilities" else "outputs"
        name = f"{what} ({t.statistic}) within atol {t.atol:g} or rtol {t.rtol:g}: images outside"
        return [
            Check("outputs are finite", None if largest is None else 1.0, 1.0, largest is not None),
            Check(name, float(len(failed)), 0.0, not failed, failed[0] if failed else None),
        ]

    def _largest(self) -> float | None:
        """Largest error over all images; None where one is not finite, or nothing was compared."""
        return _finite(float(np.max([error for error, _ in self.elementwise]))) if self.elementwise else None


def _draw(sample: Sample, mask: Pixels, card: ModelCard, folder: Path) -> list[str]:
    """Mask, overlay, and what they belong to: the image and its label map."""
    colours = palette(card.classes, card.void)
    channels = card.preprocessing.channels
    files = {
        f"masks/{sample.name}.png": mask_png(mask, colours),
        f"overlays/{sample.name}.png": overlay_png(sample.image, mask, colours, channels),
        f"images/{sample.name}.png": overlay_png(sample.image, mask, colours, channels, strength=0),
    }
    if sample.label is not None:
        files[f"labels/{sample.name}.png"] = mask_png(sample.label, colours)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return list(files)


def _save_runs(saved: list[tuple[dict[str, Any], RunResults]], folder: Path) -> None:
    if not saved:
        return
    with _polygraphy():
        save_json([feed for feed, _ in saved], str(folder / "inputs.json"))
        for index, file in enumerate(("candidate.json", "reference.json")):
            runs = [list(results.items())[index] for _, results in saved]
            RunResults([(runs[0][0], [iterations[0] for _, iterations in runs])]).save(str(folder / file))
    (folder / "data_loader.py").write_text(DATA_LOADER, encoding="utf-8")


def _commands(what: Candidate, tolerance: Tolerance, reference_path: str) -> tuple[str, ...]:
    """``polygraphy run`` lines; the loaded results are the second, so the reference of Polygraphy's relative error."""
    t = tolerance
    bounds = ["--atol", f"{t.atol:g}", "--rtol", f"{t.rtol:g}", "--check-error-stat", t.statistic]
    bounds += ["--error-quantile", f"{t.quantile:g}"] if t.statistic == "quantile" else []
    loader = ["--data-loader-script", "data_loader.py"]
    again = ["polygraphy", "run", reference_path, "--onnxrt", *loader, "--load-outputs", "candidate.json", *bounds]
    commands = [shlex.join(again)]
    if not what.emulated:
        engine = f"../../engine/{what.precision}/model.engine"
        run = ["polygraphy", "run", engine, "--model-type", "engine", "--trt", *loader]
        commands.append(shlex.join([*run, "--load-outputs", "reference.json", *bounds]))
    return tuple(commands)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
