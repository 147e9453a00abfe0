"""The page's answers in a sentence each, and what to do next, from the reports alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Precision
from pipeline.reports import BenchmarkReport, ValidationReport

if TYPE_CHECKING:
    from pipeline.calibration.report import CalibrationReport
    from pipeline.drift import DriftReport


@dataclass(frozen=True)
class Step:
    """Something to do, and the command for it where there is one.

    CONFIG stands for the configuration's file, BUILD for ``<build folder>/<config>``.
    """

    text: str
    command: str = ""


@dataclass(frozen=True)
class Answers:
    """A sentence for each of the page's questions; ``good`` and ``fast`` are None where nobody can say.

    Attributes:
        fastest: the engine with the least median of those that passed and were timed on a GPU.
    """

    good: bool | None
    good_enough: str
    fast: bool | None
    fast_enough: str
    why: str
    next: str
    steps: tuple[Step, ...]
    fastest: Precision | None


def answer(
    validations: Mapping[Precision, ValidationReport],
    benchmark: BenchmarkReport | None,
    layers: Mapping[Precision, DriftReport],
    calibration: CalibrationReport | None,
) -> Answers:
    """Answer the four questions.

    Args:
        layers: tensor by tensor against FP32; only what was compared.
    """
    fastest = _fastest(validations, benchmark)
    steps = tuple(_steps(validations, layers, calibration, fastest))
    verdict = benchmark.verdict if benchmark else None
    return Answers(
        good=all(report.passed for report in validations.values()) if validations else None,
        good_enough=_good_enough(validations),
        fast=verdict.worthwhile if verdict else None,
        fast_enough=verdict.sentence if verdict else _timed(benchmark, fastest),
        why=_why(validations, benchmark, layers),
        next=steps[0].text if steps else "Nothing.",
        steps=steps,
        fastest=fastest,
    )


def _good_enough(validations: Mapping[Precision, ValidationReport]) -> str:
    if not validations:
        return "Not measured: nothing was validated."
    failed = {precision: report for precision, report in validations.items() if not report.passed}
    if not failed:
        return f"{_listed(list(validations))} {'keeps' if len(validations) == 1 else 'keep'} every budget."
    parts = [
        f"{name.upper()} exceeds {sum(not check.passed for check in report.checks)} of {len(report.checks)} budgets"
        for name, report in failed.items()
    ]
    kept = [precision for precision in validations if precision not in failed]
    rest = f"; {_listed(kept)} {'keeps' if len(kept) == 1 else 'keep'} all" if kept else ""
    return f"{', '.join(parts)}{rest}."


def _timed(benchmark: BenchmarkReport | None, fastest: Precision | None) -> str:
    if benchmark is None:
        return "Not measured."
    if fastest is None:
        return "Not measured on a GPU."
    timing = next(each for each in benchmark.timings if each.name == fastest)
    assert timing.device is not None
    return f"{fastest.upper()} takes {timing.device.p50_ms:.3f} ms on the GPU. INT8 was not asked for."


def _why(
    validations: Mapping[Precision, ValidationReport],
    benchmark: BenchmarkReport | None,
    layers: Mapping[Precision, DriftReport],
) -> str:
    parts = []
    drops = [
        (drop.value, name.removeprefix("class_iou/"), precision)
        for precision, report in validations.items()
        for name, drop in report.drops.items()
        if name.startswith("class_iou/")
    ]
    if drops:
        loss, name, precision = max(drops)
        lost = f"{precision.upper()} loses most on {name}: {loss:.4f} of its IoU"
        parts.append(lost if loss > 0 else "No precision loses IoU on any class")
    jumps = {precision: report.jump for precision, report in layers.items() if report.jump}
    parts += [f"the error of {precision.upper()} jumps at {jump}" for precision, jump in jumps.items()]
    if layers and not jumps:
        parts.append("the error jumps at no layer")
    elif not layers:
        parts.append("layers were not compared")
    if benchmark and benchmark.verdict and benchmark.verdict.reasons:
        parts.append(benchmark.verdict.reasons[0].rstrip("."))
    elif not (benchmark and benchmark.engines):
        parts.append("no layer was timed")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _steps(
    validations: Mapping[Precision, ValidationReport],
    layers: Mapping[Precision, DriftReport],
    calibration: CalibrationReport | None,
    fastest: Precision | None,
) -> Iterator[Step]:
    for precision, report in validations.items():
        if not report.passed:
            yield from _mend(validations, precision, layers.get(precision), calibration)
    emulated = [precision for precision, report in validations.items() if report.candidate.emulated]
    if emulated:
        text = (
            f"Run {_listed(emulated)} on a machine with a GPU and TensorRT: here the graphs were emulated, not timed."
        )
        yield Step(text, "unet-trt run -c CONFIG --backend tensorrt")
    if fastest:
        yield Step(
            f"Use the {fastest.upper()} engine: the fastest that keeps its budgets.",
            f"unet-trt predict BUILD/engine/{fastest}/model.engine IMAGES -o masks/",
        )
    missing = [precision for precision in validations if precision not in layers and precision != "fp32"]
    if missing:
        chosen = " ".join(f"-p {precision}" for precision in missing)
        yield Step(
            f"See where {_listed(missing)} {'leaves' if len(missing) == 1 else 'leave'} FP32: "
            "compare every layer, then write this page again.",
            f"unet-trt validate -c CONFIG {chosen} --layers && unet-trt report -c CONFIG",
        )
    if validations and all(report.passed for report in validations.values()):
        yield Step(
            "Keep it so: accept these figures as the baseline that CI compares with.",
            'unet-trt regress -c CONFIG --update --reason "first baseline"',
        )


def _mend(
    validations: Mapping[Precision, ValidationReport],
    precision: Precision,
    drift: DriftReport | None,
    calibration: CalibrationReport | None,
) -> Iterator[Step]:
    name = precision.upper()
    if precision != "int8":
        yield Step(f"{name} exceeds a budget: look at its worst images and checks above.")
        return
    has_masks = validations[precision].agreement is not None
    if drift is not None and drift.jump is not None:
        node = next(entry.node for entry in drift.tensors if entry.tensor == drift.jump)
        yield Step(
            f"The error of {name} jumps at {drift.jump}: leave that node unquantized.",
            _set(f'engine.exclude=["{node}"]'),
        )
    if has_masks and calibration is not None and not calibration.trials:
        yield Step(
            f"{name} exceeds a budget: let held-out images choose the calibration algorithm "
            f"(it was {calibration.algorithm}).",
            _set("calibrate.algorithm=auto"),
        )
    if calibration is not None and calibration.refinement is None:
        yield Step(
            "Let ranges and biases learn from FP32, which costs no time in the engine: with torch, best on a GPU.",
            _set("calibrate.refine_steps=600"),
        )
    if has_masks and "mixed" not in validations:
        yield Step(
            "Or let a search find the convolutions that INT8 hurts, and leave these in FP16.",
            "unet-trt run -c CONFIG -p mixed",
        )


def _set(override: str) -> str:
    return f"unet-trt run -c CONFIG --set '{override}'"


def _fastest(validations: Mapping[Precision, ValidationReport], benchmark: BenchmarkReport | None) -> Precision | None:
    passed = [precision for precision, report in validations.items() if report.passed]
    times = {timing.name: timing.device.p50_ms for timing in benchmark.timings if timing.device} if benchmark else {}
    return min((precision for precision in passed if precision in times), key=lambda name: times[name], default=None)


def _listed(names: Sequence[str]) -> str:
    upper = [name.upper() for name in names]
    return upper[0] if len(upper) == 1 else f"{', '.join(upper[:-1])} and {upper[-1]}"
