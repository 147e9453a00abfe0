"""What candidate and reference give, value by value, whatever the values mean; and the verdict where that is all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Precision, Tolerance, ValidateConfig
from pipeline.data.dataset import Sample
from pipeline.errors import ModelError
from pipeline.metrics.outputs import ImageErrors, ImageSums, OutputTally, measure
from pipeline.reports import Candidate, Check, ImageResult, Offender, OutputErrors, ValidationReport

Arrays = Mapping[str, NDArray[Any]]
QUANTILES = (0.5, 0.9, 0.99, 0.999)
OFFENDERS = 3
NOT_FINITE = "outputs are finite (values that are not)"
# Of signal to error, where there is hardly any error, or none.
MOST_DB = 200.0


@dataclass(frozen=True)
class MeasuredValues:
    """One image's output values against the reference's.

    Attributes:
        sums: by output's name, in the reference's order.
        within: whether Polygraphy finds every output within the tolerance.
    """

    image: str
    sums: dict[str, ImageSums]
    within: bool

    @property
    def first(self) -> ImageErrors:
        """Of the first output."""
        return next(iter(self.sums.values())).errors


def measured_values(image: str, ours: Arrays, theirs: Arrays, within: bool) -> MeasuredValues:
    """Compare every output of an image."""
    return MeasuredValues(image, {name: measure(ours[name], wanted) for name, wanted in theirs.items()}, within)


class ValueTally:
    """Errors of every output over the images; nothing that grows with their size is kept.

    Attributes:
        outputs: by output's name, in the reference's order.
        errors: by output's name, then by image.
        within: by image, whether Polygraphy finds every output within the tolerance.
    """

    def __init__(self) -> None:
        self.outputs: dict[str, OutputTally] = {}
        self.errors: dict[str, dict[str, ImageErrors]] = {}
        self.within: dict[str, bool] = {}

    def count(self, measured: MeasuredValues) -> None:
        """Count what was measured of an image."""
        for name, sums in measured.sums.items():
            self.outputs.setdefault(name, OutputTally()).count_in(sums)
            self.errors.setdefault(name, {})[measured.image] = sums.errors
        self.within[measured.image] = measured.within

    @property
    def first(self) -> OutputTally | None:
        """The first output's; None without images."""
        return next(iter(self.outputs.values()), None)

    @property
    def first_errors(self) -> Mapping[str, ImageErrors]:
        """The first output's, by image."""
        return next(iter(self.errors.values()), {})

    def largest(self) -> float:
        """Largest |value| of the reference's first output, over the images where it is finite; 0 without one."""
        ranges = [max(abs(errors.low), abs(errors.high)) for errors in self.first_errors.values()]
        return max((value for value in ranges if np.isfinite(value)), default=0.0)

    def report(self) -> dict[str, OutputErrors]:
        """The figures of every output."""
        return {name: self._figures(name) for name in self.outputs}

    def _figures(self, name: str) -> OutputErrors:
        tally, images = self.outputs[name], self.errors[name]
        cosines = {image: error.cosine for image, error in images.items()}
        return OutputErrors(
            max_abs=finite(tally.max_abs),
            mean_abs=finite(tally.mean_abs),
            quantiles={f"{share:g}": finite(tally.quantiles.at(share)) for share in QUANTILES},
            cosine=finite(tally.cosine),
            signal_to_error_db=finite(tally.signal_to_error_db),
            not_finite={image: e.not_finite for image, e in images.items() if e.not_finite},
            reference_not_finite={
                image: e.reference_not_finite for image, e in images.items() if e.reference_not_finite
            },
            worst=next(iter(worst_images(cosines, lowest=True)), None),
        )

    def checks(self, t: Tolerance, what: str) -> list[Check]:
        """Every bound on values.

        Args:
            what: the values are: outputs, or probabilities.
        """
        bad = [
            Offender(count, image, None, f"{side} of output {name}")
            for name, images in self.errors.items()
            for image, e in images.items()
            for count, side in ((e.not_finite, "values"), (e.reference_not_finite, "FP32 values"))
            if count
        ]
        bad.sort(key=lambda offender: -(offender.value or 0))
        total = float(sum(offender.value or 0 for offender in bad))
        poisoned = {offender.image for offender in bad}
        outside = [image for image, within in self.within.items() if not within or image in poisoned]
        name = f"{what} ({t.statistic}) within atol {t.atol:g} or rtol {t.rtol:g}: images outside"
        named = tuple(worst_images({image: self.first_errors[image].max_abs for image in outside}))
        checks = [
            Check(NOT_FINITE, total, 0.0, not bad, image_of(bad), tuple(bad[:OFFENDERS])),
            Check(name, float(len(outside)), 0.0, not outside, outside[0] if outside else None, named),
        ]
        if t.min_signal_to_error_db is not None:
            checks += [self._signal_check(name, t.min_signal_to_error_db) for name in self.outputs]
        return checks

    def _signal_check(self, name: str, bound: float) -> Check:
        tally = self.outputs[name]
        value = finite(min(tally.signal_to_error_db, MOST_DB)) if tally.mean_abs else MOST_DB
        worst = self._figures(name).worst
        offenders = (Offender(worst.value, worst.image, None, "cosine"),) if worst else ()
        passed = value is not None and value >= bound
        label = f"signal to error of output {name}, dB"
        return Check(label, value, bound, passed, image_of(offenders), offenders, at_least=True, decibels=True)


class TensorJudge:
    """Figures and verdict where outputs are neither masks nor scores of classes: ``task: tensors``."""

    def __init__(self, config: ValidateConfig, precision: Precision) -> None:
        self.config = config
        self.tolerance = config.tolerance(precision, "tensors")
        self.values = ValueTally()

    def require_labels(self, labelled: bool) -> None:
        """Nothing needs labels here."""

    def measure(self, sample: Sample, ours: Arrays, theirs: Arrays, within: bool | None) -> tuple[MeasuredValues, None]:
        """What there is to count of one image; there is no mask of it.

        Args:
            ours, theirs: the candidate's and the reference's outputs by name.
            within: whether Polygraphy finds every output within the tolerance.

        Raises:
            ModelError: other outputs or shapes than the reference's.
        """
        check_outputs(ours, theirs)
        return measured_values(sample.name, ours, theirs, bool(within)), None

    def count(self, measured: MeasuredValues) -> None:
        """Count one image; the order of images decides the last bits of the figures."""
        self.values.count(measured)

    def report(
        self, what: Candidate, repeat: tuple[str, ...], pictures: tuple[str, ...], started: float
    ) -> ValidationReport:
        """The verdict on all images so far, at least one."""
        checks = tuple(self.values.checks(self.tolerance, "outputs"))
        first, errors = self.values.first, self.values.first_errors
        return ValidationReport(
            candidate=what,
            passed=all(check.passed for check in checks),
            checks=checks,
            images=tuple(ImageResult(name, None, finite(e.max_abs), None, None) for name, e in errors.items()),
            agreement=None,
            max_abs_error=finite(first.max_abs) if first else None,
            mean_abs_error=finite(first.mean_abs) if first else None,
            logit_range=self.values.largest(),
            reference=None,
            scores=None,
            repeat=repeat,
            pictures=pictures,
            seconds=time.perf_counter() - started,
            output="tensors",
            outputs=self.values.report(),
        )


def check_outputs(ours: Arrays, theirs: Arrays) -> None:
    """Raise ModelError where names or shapes of the candidate's outputs are not the reference's."""
    if set(ours) != set(theirs) or any(ours[name].shape != theirs[name].shape for name in ours):
        raise ModelError(
            "the candidate's outputs are not the reference's",
            expected=str({name: array.shape for name, array in theirs.items()}),
            got=str({name: array.shape for name, array in ours.items()}),
            fix="validate the engine with the ONNX file it was built from",
        )


def worst_images(values: Mapping[str, float], *, lowest: bool = False) -> list[Offender]:
    """Images by figure, worst first, OFFENDERS at most; undefined figures are left out, infinite ones are worst."""
    known = [(name, value) for name, value in values.items() if not np.isnan(value)]
    ordered = sorted(known, key=lambda pair: pair[1] if lowest else -pair[1])
    return [Offender(finite(value), name) for name, value in ordered[:OFFENDERS]]


def image_of(offenders: Sequence[Offender]) -> str | None:
    """The worst one's image."""
    return offenders[0].image if offenders else None


def finite(value: float) -> float | None:
    """The value; None for NaN and infinity, which JSON does not have."""
    return value if np.isfinite(value) else None
