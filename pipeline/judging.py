"""The figures and the verdict on a candidate, image by image, from both sides' outputs: what ``validate`` reports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, Output
from pipeline.config import Precision, Tolerance, ValidateConfig
from pipeline.data.dataset import Sample
from pipeline.data.preprocessing import Pixels, class_ids, restore_mask
from pipeline.errors import ConfigError, DataError
from pipeline.metrics.bootstrap import interval, resampled_sums
from pipeline.metrics.boundary import Outlines, beside, outlines, tolerance_pixels
from pipeline.metrics.masks import MaskFigures, MaskTally
from pipeline.metrics.outputs import Filled, Quantiles, margins
from pipeline.metrics.segmentation import Figures
from pipeline.reports import (
    Candidate,
    Check,
    Drop,
    Flips,
    ImageResult,
    Interval,
    Offender,
    Scores,
    ValidationReport,
)
from pipeline.values import (
    OFFENDERS,
    Arrays,
    MeasuredValues,
    ValueTally,
    check_outputs,
    finite,
    image_of,
    measured_values,
    worst_images,
)

# atol of probabilities, 0…1, where the config names no tolerance: that of logits would let anything pass.
PROBABILITY_ATOL: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.02, "mixed": 0.02}
MEANS = ("mean_iou", "mean_dice", "mean_boundary_f")
TINY = float(np.finfo(np.float32).tiny)


def tolerance_of(config: ValidateConfig, precision: Precision, kind: Output) -> Tolerance:
    """The bounds of a precision, for outputs of this kind."""
    tolerance = config.tolerance(precision)
    if kind == "probabilities" and precision not in config.tolerances:
        return tolerance.model_copy(update={"atol": PROBABILITY_ATOL[precision]})
    return tolerance


Side = Literal["reference", "candidate"]
SIDES: tuple[Side, Side] = ("reference", "candidate")
Row = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredFlips:
    """Pixels of one image whose class differs: all, such ones, near-ties, margins by bin, the largest."""

    pixels: int
    flipped: int
    near_ties: int
    margins: Filled
    largest: float


@dataclass(frozen=True)
class MeasuredImage:
    """What there is to count of one image; its size does not grow with the image's.

    Attributes:
        agreement: the row of ``MaskTally`` for both masks.
        labelled: the rows of both sides against the label; None without a labelled pixel.
        values, flips: None where only masks are compared.
    """

    name: str
    agreement: Row
    labelled: dict[Side, Row] | None
    values: MeasuredValues | None
    flips: MeasuredFlips | None


class Judge:
    """Measures images, each for itself, and sums up what was measured; nothing that grows with their size is kept.

    Args:
        card: classes, preprocessing.
        kind: what the model gives; of labels only masks are compared.
    """

    def __init__(self, card: ModelCard, config: ValidateConfig, precision: Precision, kind: Output) -> None:
        self.card, self.config, self.precision, self.kind = card, config, precision, kind
        self.tolerance = tolerance_of(config, precision, kind)
        self.categories = list(dict.fromkeys(c.category for c in card.classes if c.category is not None))
        groups = [self.categories.index(c.category) for c in card.classes if c.category is not None]
        self.agreement = MaskTally(len(card.classes))
        self.labelled = {side: MaskTally(len(card.classes), groups) for side in SIDES}
        self.names: list[str] = []
        self.labelled_images: list[str] = []
        self.values = ValueTally()
        self.flips = _FlipTally(config.near_tie)
        self.pool = ThreadPoolExecutor(2)

    def require_labels(self, labelled: bool) -> None:
        """Raise ConfigError where the config names a budget that needs labels and there are none."""
        named = self.config.tolerances.get(self.precision)
        budgets = named.named_label_budgets() if named else []
        if budgets and not labelled:
            raise ConfigError(
                f"validate.tolerances.{self.precision}.{budgets[0]} cannot be judged without labels",
                expected="validation images with label maps that hold a class",
                got="no labelled pixel",
                fix=f"name the label maps (data.validation.labels), or set {', '.join(budgets)} to null",
            )

    def measure(
        self, sample: Sample, ours: Arrays, theirs: Arrays, within: bool | None
    ) -> tuple[MeasuredImage, Pixels]:
        """What there is to count of one image, and the candidate's mask at the image's size. Counts nothing.

        Args:
            ours, theirs: the candidate's and the reference's outputs by name; the latter's first one gives the masks.
            within: whether Polygraphy finds every output within the tolerance; None for labels.

        Raises:
            ModelError: other outputs or shapes than the reference's, or classes that the card does not name.
            DataError: the label map has another size than the image, or holds what is no class.
        """
        check_outputs(ours, theirs)
        main, size = next(iter(theirs)), sample.image.shape[:2]
        classes = len(self.card.classes)
        pixels = tolerance_pixels(size[0], size[1], self.config.boundary_tolerance)
        # Two threads: the longest work is handed out first, and the label's outlines wait for no mask.
        measuring = (
            None if within is None else self.pool.submit(measured_values, sample.name, ours, theirs, bool(within))
        )
        masks = [self.pool.submit(class_ids, outputs[main], classes) for outputs in (theirs, ours)]
        true = None
        if sample.label is not None:
            _check_label(sample.label, sample, classes, self.card.void)
            true = self.pool.submit(outlines, sample.label, classes, pixels)
        small = [mask.result() for mask in masks]
        reference, candidate = (restore_mask(mask, self.card.preprocessing, *size) for mask in small)
        lines = [self.pool.submit(outlines, mask, classes, pixels) for mask in (reference, candidate)]
        values = flips = None
        if measuring is not None:
            values = measuring.result()
            span = values.first.high - values.first.low
            flips = self.flips.measure(theirs[main][0], small[0] != small[1], span)
        theirs_lines, our_lines = (each.result() for each in lines)
        rows = self._rows(sample, (reference, candidate), (theirs_lines, our_lines), true.result() if true else None)
        return MeasuredImage(sample.name, *rows, values, flips), candidate

    def _rows(
        self, sample: Sample, masks: tuple[Pixels, Pixels], lines: tuple[Outlines, Outlines], true: Outlines | None
    ) -> tuple[Row, dict[Side, Row] | None]:
        """The reference's mask and the candidate's against each other, and both against the label."""
        agreement = self.pool.submit(self.agreement.measure, *masks, lines)
        void = None if sample.label is None else sample.label >= len(self.card.classes)
        if sample.label is None or true is None or void is None or void.all():
            return agreement.result(), None
        ignored = beside(void) if void.any() else None
        labelled = {
            side: self.pool.submit(self.labelled[side].measure, sample.label, mask, (true, line), ignored)
            for side, mask, line in zip(SIDES, masks, lines, strict=True)
        }
        return agreement.result(), {side: row.result() for side, row in labelled.items()}

    def count(self, measured: MeasuredImage) -> None:
        """Count one image; the order of images decides the last bits of the figures."""
        self.names.append(measured.name)
        self.agreement.rows.append(measured.agreement)
        if measured.labelled is not None:
            self.labelled_images.append(measured.name)
            for side, row in measured.labelled.items():
                self.labelled[side].rows.append(row)
        if measured.values is not None:
            self.values.count(measured.values)
        if measured.flips is not None:
            self.flips.count(measured.name, measured.flips)

    # ------------------------------------------------------------------ the report

    def report(
        self, what: Candidate, repeat: tuple[str, ...], pictures: tuple[str, ...], started: float
    ) -> ValidationReport:
        """The verdict on all images so far, at least one.

        Raises:
            ConfigError: as ``require_labels``.
        """
        self.require_labels(bool(self.labelled_images))
        agreement = _Sampled(self.agreement, self.names, self.config)
        sides = self._sides()
        scores = {side: self._scores(sampled) for side, sampled in sides.items()}
        drops = self._drops(sides)
        first = self.values.first
        checks = self._checks(agreement, sides, drops)
        return ValidationReport(
            candidate=what,
            passed=all(check.passed for check in checks),
            checks=checks,
            images=self._images(agreement, sides),
            agreement=float(agreement.whole.accuracy),
            max_abs_error=finite(first.max_abs) if first else None,
            mean_abs_error=finite(first.mean_abs) if first else None,
            logit_range=self.values.largest(),
            reference=scores.get("reference"),
            scores=scores.get("candidate"),
            repeat=repeat,
            pictures=pictures,
            seconds=time.perf_counter() - started,
            output=self.kind,
            agreement_interval=agreement.interval("pixel_accuracy"),
            boundary_f=finite(float(agreement.whole.mean_boundary_f)),
            boundary_f_interval=agreement.interval("mean_boundary_f"),
            drops=drops,
            outputs=self.values.report(),
            flips=self.flips.result() if first else None,
            worst=self._worst(agreement, sides),
            boundary_tolerance=self.config.boundary_tolerance,
            resamples=self.config.resamples,
        )

    def _sides(self) -> dict[str, _Sampled]:
        """FP32 and the candidate against the labels, resampled alike; nothing without labels."""
        if not self.labelled_images:
            return {}
        return {side: _Sampled(tally, self.labelled_images, self.config) for side, tally in self.labelled.items()}

    def _scores(self, sampled: _Sampled) -> Scores:
        whole, names = sampled.whole, [c.name for c in self.card.classes]
        figures = _named(whole, names)
        return Scores(
            mean_iou=float(whole.mean_iou),
            pixel_accuracy=float(whole.accuracy),
            class_iou=_by_name(names, whole.class_iou),
            mean_dice=float(whole.mean_dice),
            class_dice=_by_name(names, whole.class_dice),
            mean_boundary_f=finite(float(whole.mean_boundary_f)),
            class_boundary_f=_by_name(names, whole.class_boundary_f),
            mean_category_iou=finite(float(whole.mean_category_iou)),
            category_iou=_by_name(self.categories, whole.category_iou),
            intervals=_intervals(_named(sampled.samples, names), figures) if sampled.many else {},
        )

    def _drops(self, sides: Mapping[str, _Sampled]) -> dict[str, Drop]:
        if not sides:
            return {}
        names = [c.name for c in self.card.classes]
        theirs, ours = (_named(sides[side].whole, names) for side in ("reference", "candidate"))
        drops = {name: float(theirs[name] - ours[name]) for name in theirs if name != "pixel_accuracy"}
        intervals: dict[str, Interval] = {}
        if sides["candidate"].many:
            before, after = (_named(sides[side].samples, names) for side in ("reference", "candidate"))
            intervals = _intervals({name: before[name] - after[name] for name in drops}, theirs)
        return {name: Drop(drop, intervals.get(name)) for name, drop in drops.items() if np.isfinite(drop)}

    def _images(self, agreement: _Sampled, sides: Mapping[str, _Sampled]) -> tuple[ImageResult, ...]:
        errors = self.values.first_errors
        mious = {side: dict(zip(self.labelled_images, s.each.mean_iou, strict=True)) for side, s in sides.items()}
        return tuple(
            ImageResult(
                name,
                float(share),
                finite(errors[name].max_abs) if name in errors else None,
                finite(float(mious.get("reference", {}).get(name, np.nan))),
                finite(float(mious.get("candidate", {}).get(name, np.nan))),
            )
            for name, share in zip(agreement.names, agreement.each.accuracy, strict=True)
        )

    def _worst(self, agreement: _Sampled, sides: Mapping[str, _Sampled]) -> dict[str, Offender]:
        losses: dict[str, tuple[Mapping[str, float], bool]] = {
            "agreement": (_by_image(agreement.names, agreement.each.accuracy), True),
            "boundary_f": (_by_image(agreement.names, agreement.each.mean_boundary_f), True),
            **{f"{name} drop": (self._image_drops(sides, name), False) for name in MEANS if sides},
        }
        worst = {name: worst_images(values, lowest=lowest) for name, (values, lowest) in losses.items()}
        return {name: offenders[0] for name, offenders in worst.items() if offenders}

    def _image_drops(self, sides: Mapping[str, _Sampled], figure: str) -> dict[str, float]:
        theirs, ours = (getattr(sides[side].each, figure) for side in ("reference", "candidate"))
        return _by_image(self.labelled_images, theirs - ours)

    # ------------------------------------------------------------------ the checks

    def _checks(
        self, agreement: _Sampled, sides: Mapping[str, _Sampled], drops: Mapping[str, Drop]
    ) -> tuple[Check, ...]:
        t = self.tolerance
        labels_only = " (the outputs are labels: no values to compare)" if self.kind == "labels" else ""
        by_image = _by_image(agreement.names, agreement.each.accuracy)
        what = "probabilities" if self.kind == "probabilities" else "outputs"
        checks = [] if self.kind == "labels" else self.values.checks(t, what)
        if t.min_agreement is not None:
            name = f"agreement with FP32's masks{labels_only}"
            checks.append(_at_least(name, agreement.whole.accuracy, t.min_agreement, by_image))
        if t.min_boundary_f is not None:
            by_image = _by_image(agreement.names, agreement.each.mean_boundary_f)
            name = "boundary F-score against FP32's masks"
            checks.append(_at_least(name, agreement.whole.mean_boundary_f, t.min_boundary_f, by_image))
        if sides:
            checks += self._label_checks(sides, drops)
        return tuple(checks)

    def _label_checks(self, sides: Mapping[str, _Sampled], drops: Mapping[str, Drop]) -> list[Check]:
        t = self.tolerance
        means = (
            ("mIoU drop", "mean_iou", t.max_miou_drop),
            ("Dice drop", "mean_dice", t.max_dice_drop),
            ("boundary F-score drop", "mean_boundary_f", t.max_boundary_f_drop),
        )
        checks = [
            _at_most(
                name, drops[key].value if key in drops else np.nan, bound, worst_images(self._image_drops(sides, key))
            )
            for name, key, bound in means
            if bound is not None
        ]
        if t.max_class_iou_drop is not None:
            offenders = self._class_offenders(sides, drops)
            checks.insert(1, _at_most("class IoU drop", offenders[0].value, t.max_class_iou_drop, offenders))
        return checks

    def _class_offenders(self, sides: Mapping[str, _Sampled], drops: Mapping[str, Drop]) -> list[Offender]:
        """Classes that lose most, each with the image in which it does."""
        lost = sides["reference"].each.class_iou - sides["candidate"].each.class_iou
        offenders = []
        for place, c in enumerate(self.card.classes):
            drop = drops.get(f"class_iou/{c.name}")
            if drop is not None:
                images = worst_images(_by_image(self.labelled_images, lost[:, place]))
                offenders.append(Offender(drop.value, image_of(images), c.name))
        return sorted(offenders, key=lambda offender: -(offender.value or 0))


class _Sampled:
    """The figures of all images together, of each, and of resamples."""

    def __init__(self, tally: MaskTally, names: Sequence[str], config: ValidateConfig) -> None:
        sums = tally.sums()
        self.names, self.many = names, len(sums) > 1
        self.whole: MaskFigures = tally.figures(sums.sum(0))
        self.each: MaskFigures = tally.figures(sums)
        self.samples: MaskFigures = tally.figures(resampled_sums(sums, config.resamples, config.seed))

    def interval(self, figure: str) -> Interval | None:
        values = _named(self.samples, ())[figure]
        return _intervals({figure: values}, {figure: values[0]}).get(figure) if self.many else None


class _FlipTally:
    def __init__(self, near_tie: float) -> None:
        self.near_tie = near_tie
        self.pixels = self.flipped = self.near_ties = 0
        self.margins, self.largest = Quantiles(), 0.0
        self.clear: dict[str, float] = {}

    def measure(self, scores: NDArray[Any], flipped: NDArray[np.bool_], span: float) -> MeasuredFlips:
        """One image.

        Args:
            scores: the reference's, (classes, H, W).
            flipped: (H, W), where the masks differ.
            span: largest less smallest value of the scores.
        """
        shares = margins(scores, flipped) / max(span, TINY)
        ties = int((shares < self.near_tie).sum())
        largest = float(shares.max()) if shares.size else 0.0
        return MeasuredFlips(flipped.size, shares.size, ties, Quantiles.filled(shares), largest)

    def count(self, image: str, measured: MeasuredFlips) -> None:
        self.pixels += measured.pixels
        self.flipped += measured.flipped
        self.near_ties += measured.near_ties
        self.clear[image] = measured.flipped - measured.near_ties
        self.margins.count(measured.margins)
        self.largest = float(np.maximum(self.largest, measured.largest))

    def result(self) -> Flips:
        worst = next(iter(worst_images(self.clear)), None)
        return Flips(
            pixels=self.pixels,
            flipped=self.flipped,
            near_ties=self.near_ties,
            near_tie=self.near_tie,
            median_margin=finite(self.margins.at(0.5)),
            max_margin=finite(self.largest) if self.flipped else None,
            worst=worst if worst and worst.value else None,
        )


def _check_label(label: Pixels, sample: Sample, classes: int, void: int | None) -> None:
    if label.shape != sample.image.shape[:2]:
        raise DataError(
            f"the label map of {sample.name} has another size than its image",
            expected="×".join(map(str, sample.image.shape[:2])),
            got="×".join(map(str, label.shape)),
            fix="use label maps of the images' size",
        )
    others = label >= classes if label.max() >= classes else np.zeros(0, np.bool_)
    bad = [int(value) for value in np.unique(label[others]) if value != void] if others.any() else []
    if bad:
        raise DataError(
            f"the label map of {sample.name} holds the value {bad[0]}, which is no class",
            expected=f"0…{classes - 1}" + ("" if void is None else f" or {void} (void)"),
            got=f"{len(bad)} other value(s): {bad[:8]}",
            fix="correct the label map, data.classes or data.void",
        )


def _named(figures: MaskFigures, classes: Sequence[str]) -> dict[str, Figures]:
    """Figures that have intervals, by name."""
    named = {name: getattr(figures, name) for name in (*MEANS, "mean_category_iou")}
    by_class = {f"class_iou/{name}": figures.class_iou[..., place] for place, name in enumerate(classes)}
    return {**named, "pixel_accuracy": figures.accuracy, **by_class}


def _intervals(samples: Mapping[str, Figures], figures: Mapping[str, Figures]) -> dict[str, Interval]:
    """Intervals of figures that are defined."""
    defined = [name for name in samples if np.isfinite(figures[name]) and np.isfinite(samples[name]).any()]
    if not defined:
        return {}
    low, high = interval(np.stack([samples[name] for name in defined], axis=1))
    return {name: Interval(float(a), float(b)) for name, a, b in zip(defined, low, high, strict=True)}


def _by_name(names: Sequence[str], figures: Figures) -> dict[str, float | None]:
    return {name: finite(float(value)) for name, value in zip(names, figures, strict=True)}


def _by_image(names: Sequence[str], figures: Figures) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, figures, strict=True)}


def _at_least(name: str, figure: Figures, bound: float, images: Mapping[str, float]) -> Check:
    value, offenders = finite(float(figure)), worst_images(images, lowest=True)
    passed = value is not None and value >= bound
    return Check(name, value, bound, passed, image_of(offenders), tuple(offenders), at_least=True)


def _at_most(name: str, figure: float | None, bound: float, offenders: Sequence[Offender]) -> Check:
    value = None if figure is None else finite(figure)
    passed = value is not None and value <= bound
    return Check(name, value, bound, passed, image_of(offenders), tuple(offenders[:OFFENDERS]))
