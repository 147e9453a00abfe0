"""Baselines: what counts as a regression, what an update keeps, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.artifacts import Device
from pipeline.config import Precision
from pipeline.errors import CheckFailed, ConfigError, InputError
from pipeline.metrics.latency import Estimate, LatencySummary
from pipeline.reports import BenchmarkReport, Candidate, Check, Offender, Scores, Timing, ValidationReport
from pipeline.stages.regress import Comparison, compare, junit, markdown, read_baseline, rows, update
from pipeline.values import NOT_FINITE

NETWORK = "a" * 64


def report(
    precision: Precision = "fp32", miou: float = 0.8, thing: float | None = 0.7, *, emulated: bool = True
) -> ValidationReport:
    scores = Scores(miou, 0.9, {"thing": thing, "never": None}, 0.85, {}, 0.95, {}, None, {}, {})
    return ValidationReport(
        candidate=Candidate(precision, emulated, "a stand-in", "0", None, None),
        passed=True,
        checks=(),
        images=(),
        agreement=0.99,
        max_abs_error=0.0,
        mean_abs_error=0.0,
        logit_range=1.0,
        reference=scores,
        scores=scores,
        repeat=(),
        pictures=(),
        seconds=0.0,
        boundary_f=0.97,
    )


def benchmark(**milliseconds: float) -> BenchmarkReport:
    def timing(name: str, ms: float) -> Timing:
        summary = LatencySummary(9, ms, ms, ms, ms, ms, ms)
        return Timing(name, 1, 1, summary, summary, Estimate(ms, ms, ms, 0.95))

    return BenchmarkReport(
        timings=tuple(timing(name, ms) for name, ms in milliseconds.items()),
        not_run={},
        processor="",
        cores=1,
        device=Device("NVIDIA H200", "9.0", "1"),
        created="",
        engines={},
        verdict=None,
        settled=True,
        rounds=1,
    )


def accept(path: Path, *reports: ValidationReport, timings: BenchmarkReport | None = None) -> Comparison:
    return update("tiny", NETWORK, reports, timings, path, "first" if path.is_file() else None)


def against(path: Path, *reports: ValidationReport, timings: BenchmarkReport | None = None) -> Comparison:
    return compare("tiny", NETWORK, reports, timings, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "baselines" / "tiny.json"
    accept(path, report())
    return path


def test_equal_figures_pass(path: Path) -> None:
    comparison = against(path, report())
    comparison.verdict()
    assert {d.status for d in comparison.differences} == {"same"}
    assert comparison.skipped == ("latency: no engine ran on this machine",)
    assert not any("never" in d.figure for d in comparison.differences)


@pytest.mark.parametrize(
    ("now", "figure"),
    [
        (report(miou=0.79), "fp32/mean_iou"),
        (report(thing=0.6), "fp32/class_iou/thing"),
        (report(thing=None), "fp32/class_iou/thing"),
        (dataclasses.replace(report(), agreement=0.98), "fp32/agreement"),
        (dataclasses.replace(report(), boundary_f=None), "fp32/boundary_f"),
    ],
)
def test_each_figure_is_judged_alone(path: Path, now: ValidationReport, figure: str) -> None:
    comparison = against(path, now)
    assert [d.figure for d in comparison.regressions] == [figure]
    with pytest.raises(CheckFailed, match="1 of 6 figures are worse") as caught:
        comparison.verdict()
    assert figure in caught.value.got


def test_better_is_said_and_passes(path: Path) -> None:
    comparison = against(path, report(miou=0.9))
    comparison.verdict()
    assert [d.figure for d in comparison.differences if d.status == "better"] == ["fp32/mean_iou"]


def test_tolerances_are_the_files_and_outlive_an_update(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["machines"]["emulated"]["fp32/mean_iou"]["tolerance"] = 0.5
    path.write_text(json.dumps(raw))
    against(path, report(miou=0.4)).verdict()
    accept(path, report(miou=0.6))
    figure = read_baseline(path).machines["emulated"]["fp32/mean_iou"]
    assert (figure.value, figure.tolerance) == (0.6, 0.5)


def test_precisions_that_do_not_run_stay(path: Path) -> None:
    accept(path, report("int8"))
    against(path, report("int8")).verdict()
    assert {name.split("/")[0] for name in read_baseline(path).machines["emulated"]} == {"fp32", "int8"}


ENGINES = [report(p, emulated=False) for p in ("fp32", "fp16", "int8")]


def test_a_slower_engine_is_caught_and_a_slower_clock_is_not(path: Path) -> None:
    accept(path, *ENGINES, timings=benchmark(fp32=4.0, fp16=1.0, int8=0.8))
    against(path, *ENGINES, timings=benchmark(fp32=6.0, fp16=1.5, int8=1.2)).verdict()
    worse = against(path, *ENGINES, timings=benchmark(fp32=4.0, fp16=1.1, int8=0.8))
    assert [d.figure for d in worse.regressions] == ["fp16/latency/fp32"]
    int8 = against(path, *ENGINES, timings=benchmark(fp32=4.0, fp16=1.0, int8=0.88))
    assert [d.figure for d in int8.regressions] == ["int8/latency/fp16", "int8/latency/fp32"]
    assert against(path, report()).machine == "emulated"


def test_latency_without_its_reference_is_skipped_with_the_reason(path: Path) -> None:
    accept(path, *ENGINES, timings=benchmark(fp32=4.0, fp16=1.0, int8=0.8))
    comparison = against(path, ENGINES[1], timings=benchmark(fp16=1.0))
    comparison.verdict()
    (skipped,) = [d for d in comparison.differences if d.status == "skipped"]
    assert skipped.reason == "fp32 and fp16 were not both timed on a GPU in this run"
    assert comparison.skipped == ("latency: a ratio needs two engines timed in the same run",)


def test_machine_classes_are_apart(path: Path) -> None:
    with pytest.raises(InputError, match="no figures of this machine class"):
        against(path, *ENGINES, timings=benchmark(fp32=4.0))
    accept(path, *ENGINES, timings=benchmark(fp32=4.0))
    assert set(read_baseline(path).machines) == {"emulated", "NVIDIA H200"}


def test_an_update_needs_a_reason_and_records_it(path: Path) -> None:
    with pytest.raises(ConfigError, match="would replace"):
        update("tiny", NETWORK, [report()], None, path, None)
    update("tiny", NETWORK, [report(miou=0.7)], None, path, "trained anew")
    accepted = read_baseline(path).accepted
    assert [entry.reason for entry in accepted] == ["first figures", "trained anew"]
    assert accepted[1].date.startswith("20")


def test_baselines_of_others_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another config"):
        compare("other", NETWORK, [report()], None, path)
    with pytest.raises(InputError, match="another network"):
        compare("tiny", "b" * 64, [report()], None, path)
    with pytest.raises(InputError, match="there is no baseline"):
        compare("tiny", NETWORK, [report()], None, tmp_path / "none.json")
    with pytest.raises(InputError, match="another config"):
        update("other", NETWORK, [report()], None, path, "why")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config": "tiny", "figures": {}, "created": ""}', "another schema"),
        ('{"schema_version": 3}', "another schema"),
        ('{"schema_version": 2}', "cannot be read"),
        (
            '{"schema_version": 2, "config": "tiny", "network": "", "machines": {"emulated": {"a/mean_iou": '
            '{"value": NaN, "tolerance": 0.1}}}}',
            "cannot be read: .*finite number",
        ),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_other_schemas_and_damaged_files(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        against(path, report())
    assert caught.value.exit_code == 2


def test_an_update_replaces_the_first_schema_and_another_network(path: Path) -> None:
    path.write_text('{"config": "tiny", "figures": {"emulated/fp32/mean_iou": 0.9}, "created": ""}')
    accept(path, report())
    update("tiny", "b" * 64, [report("int8")], None, path, "another network")
    baseline = read_baseline(path)
    assert {name.split("/")[0] for name in baseline.machines["emulated"]} == {"int8"}
    assert len(baseline.accepted) == 2


def test_reasons_outlive_another_schema(path: Path) -> None:
    first = json.loads(path.read_text())["accepted"]
    path.write_text(json.dumps({"schema_version": 1, "config": "tiny", "accepted": first}))
    update("tiny", NETWORK, [report()], None, path, "a new schema")
    assert [entry.reason for entry in read_baseline(path).accepted] == ["first figures", "a new schema"]


def test_outputs_that_are_not_finite_neither_pass_nor_become_a_baseline(path: Path) -> None:
    before = path.read_bytes()
    check = Check(NOT_FINITE, 7.0, 0.0, False, "a", (Offender(7.0, "a"),))
    bad = dataclasses.replace(report(), passed=False, checks=(check,))
    for judged in (against, accept):
        with pytest.raises(CheckFailed, match="fp32's outputs hold NaN") as caught:
            judged(path, bad)
        assert caught.value.got == "7 that are not; worst: a 7"
    assert path.read_bytes() == before


def test_junit_and_markdown(path: Path) -> None:
    accept(path, *ENGINES, timings=benchmark(fp32=4.0, fp16=1.0))
    slow = benchmark(fp32=4.0, fp16=1.1)
    comparison = against(path, *ENGINES[:1], report("fp16", 0.7, emulated=False), timings=slow)
    suite = ElementTree.fromstring(junit(comparison))
    assert suite.attrib["failures"] == "2"
    failures = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert [case.attrib["name"] for case in failures] == ["latency/fp32", "mean_iou"]
    assert failures[0].attrib["classname"] == "tiny.NVIDIA H200.fp16"
    text = markdown(comparison)
    assert "2 figure(s) regressed" in text
    assert "| fp16/mean_iou | 0.8000 | 0.7000 | -0.1000 | >= 0.7970 | **REGRESSED** |" in text
    assert ("fp16/mean_iou", "0.8000", "0.7000", "-0.1000", ">= 0.7970", "REGRESSED") in rows(comparison)


def test_junit_of_nothing_but_skipped(path: Path) -> None:
    suite = ElementTree.fromstring(junit(against(path, report())))
    assert (suite.attrib["failures"], suite.attrib["skipped"]) == ("0", "1")
