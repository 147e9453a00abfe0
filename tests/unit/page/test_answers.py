"""The sentences at the top of the page, and what to do next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.calibration.report import CalibrationReport, Refinement
from pipeline.drift import DriftReport, TensorDrift
from pipeline.metrics.latency import LatencySummary
from pipeline.page.answers import answer
from pipeline.reports import BenchmarkReport, Candidate, Check, Drop, SpeedVerdict, Timing, ValidationReport

CALIBRATION = CalibrationReport("entropy", "cpu", 2048, 32, (), "", "", "", "", (), 1.0, 1.0)


def verdict(precision: Any, *, passed: bool = True, emulated: bool = False, loss: float = 0.0) -> ValidationReport:
    return ValidationReport(
        candidate=Candidate(precision, emulated, "a stand-in", "", None, None),
        passed=passed,
        checks=(Check("mIoU drop", loss, 0.01, passed), Check("agreement", 1.0, 0.9, True, at_least=True)),
        images=(),
        agreement=1.0,
        max_abs_error=0.0,
        mean_abs_error=0.0,
        logit_range=1.0,
        reference=None,
        scores=None,
        repeat=(),
        pictures=(),
        seconds=0.0,
        drops={"mean_iou": Drop(loss, None), "class_iou/lesion": Drop(loss, None), "class_iou/skin": Drop(0.0, None)},
    )


def timed(worthwhile: bool | None, **milliseconds: float) -> BenchmarkReport:
    timings = []
    for name, ms in milliseconds.items():
        summary = LatencySummary(9, ms, ms, ms, ms, ms, ms)
        timings.append(Timing(name, 1, 1, summary, summary))
    told = SpeedVerdict(None, 1.0, worthwhile, "Told.")
    return BenchmarkReport(tuple(timings), {}, "", 1, None, "", {}, told, True, 12)


def drifted(jump: str | None) -> DriftReport:
    return DriftReport("", 1, (TensorDrift("t", "node", "Conv", 5.0, None, 0.0, 1.0, None),), jump, ())


def commands(**given: Any) -> list[str]:
    everything = {"benchmark": None, "layers": {}, "calibration": None, **given}
    return [step.command for step in answer(**everything).steps]


def test_all_is_well() -> None:
    validations = {"fp16": verdict("fp16"), "int8": verdict("int8", loss=0.002)}
    told = answer(
        validations, timed(True, fp16=0.5, int8=0.3, other=0.1), {p: drifted(None) for p in validations}, None
    )
    assert (told.good, told.fast, told.fastest) == (True, True, "int8")
    assert told.good_enough == "FP16 and INT8 keep every budget."
    assert told.fast_enough == "Told."
    assert told.why == "INT8 loses most on lesion: 0.0020 of its IoU; the error jumps at no layer; no layer was timed."
    assert [step.command.split()[1] for step in told.steps] == ["predict", "regress"]
    assert told.next == told.steps[0].text


def test_a_failure_comes_first() -> None:
    validations = {"fp16": verdict("fp16"), "int8": verdict("int8", passed=False, loss=0.05)}
    told = answer(validations, timed(False, fp16=0.5, int8=0.6), {"int8": drifted("t")}, CALIBRATION)
    assert told.good is False
    assert told.good_enough == "INT8 exceeds 1 of 2 budgets; FP16 keeps all."
    assert "the error of INT8 jumps at t" in told.why
    assert [step.command for step in told.steps] == [
        """unet-trt run -c CONFIG --set 'engine.exclude=["node"]'""",
        "unet-trt run -c CONFIG --set 'calibrate.algorithm=auto'",
        "unet-trt run -c CONFIG --set 'calibrate.refine_steps=600'",
        "unet-trt run -c CONFIG -p mixed",
        "unet-trt predict BUILD/engine/fp16/model.engine IMAGES -o masks/",
        "unet-trt validate -c CONFIG -p fp16 --layers && unet-trt report -c CONFIG",
    ]


def test_what_was_tried_is_not_tried_again() -> None:
    """Nor what needs masks where there are none."""
    report = verdict("int8", passed=False)
    refined = Refinement(600, 16, 2e-3, 1e-3, True, {}, 80.0)
    tried = replace(CALIBRATION, trials=({"algorithm": "mse", "agreement": 0.9},), refinement=refined)
    both = {"int8": report, "mixed": verdict("mixed")}
    told = " ".join(commands(validations=both, calibration=tried))
    assert not any(word in told for word in ("algorithm=auto", "refine_steps", "run -c CONFIG -p mixed"))
    bare = commands(validations={"int8": replace(report, agreement=None)}, calibration=CALIBRATION)
    assert bare[0] == "unet-trt run -c CONFIG --set 'calibrate.refine_steps=600'"
    assert not any(word in " ".join(bare) for word in ("algorithm=auto", "mixed"))


@pytest.mark.parametrize("benchmark", [None, timed(None)])
def test_nothing_is_claimed_that_was_not_measured(benchmark: BenchmarkReport | None) -> None:
    emulated = {"fp32": verdict("fp32", emulated=True)}
    told = answer(emulated, benchmark, {}, None)
    assert told.fast is None
    assert told.fastest is None
    assert told.fast_enough == ("Told." if benchmark else "Not measured.")
    assert told.why == "No precision loses IoU on any class; layers were not compared; no layer was timed."
    assert "unet-trt run -c CONFIG --backend tensorrt" in [step.command for step in told.steps]
    assert answer({}, None, {}, None).good is None
