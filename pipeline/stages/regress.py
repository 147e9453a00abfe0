"""Compare a run's figures with a committed baseline.

A baseline belongs to one config and one network, and holds figures per machine class: "emulated" where typed graphs ran
on ONNX Runtime, which gives nearly the same on every CPU, otherwise the GPU's name. Each figure has a tolerance of its
own, which may be edited in the file and outlives ``--update``:

- accuracy, a fraction of 1, absolute: a figure regresses when it falls by more;
- latency, the ratio to another engine's latency in the same run, relative: it regresses when it grows by more. The
  ratio stays where clocks, drivers and neighbours change both.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from pydantic import FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.artifacts import to_json, write_atomically
from pipeline.config import Precision
from pipeline.errors import CheckFailed, ConfigError, InputError
from pipeline.reports import BenchmarkReport, ValidationReport
from pipeline.values import NOT_FINITE

log = logging.getLogger(__name__)
BASELINE_SCHEMA = 2
EMULATED = "emulated"
TOLERANCES = {
    "agreement": 0.002,
    "boundary_f": 0.005,
    "mean_iou": 0.003,
    "mean_dice": 0.003,
    "mean_boundary_f": 0.005,
    "class_iou": 0.01,
    "cosine": 0.002,
    "latency": 0.05,
}
# Latency of the first over that of the second: FP32 is the steadiest, FP16 what INT8 has to beat.
RATIOS: tuple[tuple[Precision, Precision], ...] = (("fp16", "fp32"), ("int8", "fp32"), ("int8", "fp16"))
Status = Literal["same", "better", "worse", "missing", "new", "skipped"]


@dataclass(frozen=True)
class Figure:
    """An accepted value and how much worse it may become: absolute for accuracy, relative for latency."""

    value: FiniteFloat
    tolerance: FiniteFloat


@dataclass(frozen=True)
class Acceptance:
    """Why and when figures of a machine class became the baseline."""

    date: str
    machine: str
    figures: int
    reason: str


@dataclass(frozen=True)
class Baseline:
    """Accepted figures by machine class, then by ``<precision>/<figure>``.

    Attributes:
        network: sha256 of the network that they belong to.
        accepted: oldest first.
    """

    config: str
    network: str
    machines: dict[str, dict[str, Figure]]
    accepted: tuple[Acceptance, ...] = ()
    schema_version: int = field(default=BASELINE_SCHEMA)


@dataclass(frozen=True)
class Difference:
    """One figure against its baseline; None where one side does not hold it.

    Attributes:
        reason: why it was skipped.
    """

    figure: str
    baseline: float | None
    now: float | None
    tolerance: float
    reason: str = ""

    @property
    def is_latency(self) -> bool:
        return _kind(self.figure) == "latency"

    @property
    def worst_allowed(self) -> float | None:
        """The bound: below it (latency: above it) the figure has regressed."""
        if self.baseline is None:
            return None
        return self.baseline * (1 + self.tolerance) if self.is_latency else self.baseline - self.tolerance

    @property
    def change(self) -> float | None:
        return None if self.baseline is None or self.now is None else self.now - self.baseline

    @property
    def status(self) -> Status:
        if self.reason:
            return "skipped"
        if self.baseline is None or self.change is None or self.worst_allowed is None:
            return "new" if self.baseline is None else "missing"
        bound = abs(self.worst_allowed - self.baseline)
        gain = -self.change if self.is_latency else self.change
        return "worse" if gain < -bound else "better" if gain > bound else "same"

    @property
    def regressed(self) -> bool:
        return self.status in ("worse", "missing")


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline, by figure.

    Attributes:
        skipped: what could not be compared at all, and why.
    """

    config: str
    machine: str
    path: str
    differences: tuple[Difference, ...]
    skipped: tuple[str, ...] = ()

    @property
    def regressions(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.regressed]

    def verdict(self) -> None:
        """Raise CheckFailed where a figure regressed, or is missing."""
        bad = self.regressions
        if bad:
            raise CheckFailed(
                f"{len(bad)} of {len(self.differences)} figures are worse than the baseline {self.path}",
                expected=", ".join(f"{d.figure} {_bound(d)}" for d in bad),
                got=", ".join(f"{d.figure} {'missing' if d.now is None else format(d.now, '.4f')}" for d in bad),
                fix="find the change that did it, or accept the figures with --update --reason TEXT",
            )


def machine_class(reports: Iterable[ValidationReport], device: str | None) -> str:
    """Where the candidates ran: "emulated", or the GPU's name."""
    engines = any(not report.candidate.emulated for report in reports)
    return (device or "unknown GPU") if engines else EMULATED


def figures_of(reports: Iterable[ValidationReport]) -> dict[str, float | None]:
    """The accuracy figures of a run; None where one is not defined."""
    figures: dict[str, float | None] = {}
    for report in reports:
        own: dict[str, float | None] = {"agreement": report.agreement, "boundary_f": report.boundary_f}
        if report.output == "tensors":
            own = {f"cosine/{name}": output.cosine for name, output in report.outputs.items()}
        if report.scores is not None:
            scores = report.scores
            own |= {"mean_iou": scores.mean_iou, "mean_dice": scores.mean_dice}
            own |= {"mean_boundary_f": scores.mean_boundary_f}
            own |= {f"class_iou/{name}": value for name, value in scores.class_iou.items()}
        figures |= {f"{report.candidate.precision}/{name}": value for name, value in own.items()}
    return figures


def latency_figures(benchmark: BenchmarkReport | None) -> tuple[dict[str, float | None], list[str]]:
    """Ratios of latencies on the GPU, and why there are none."""
    if benchmark is None:
        return {}, ["latency: no engine ran on this machine"]
    medians: dict[str, float] = {}
    for timing in benchmark.timings:
        if timing.median_ms is not None:
            medians[timing.name] = timing.median_ms.median
        elif timing.device is not None:
            medians[timing.name] = timing.device.p50_ms
    ratios: dict[str, float | None] = {
        f"{precision}/latency/{reference}": medians[precision] / medians[reference]
        for precision, reference in RATIOS
        if precision in medians and reference in medians
    }
    return ratios, [] if ratios else ["latency: a ratio needs two engines timed in the same run"]


def check_compared(config: str, network: str, path: Path) -> Baseline:
    """The baseline at ``path``: what can be refused before a run.

    Raises:
        InputError: none, or one of another config, network or schema.
    """
    old = read_baseline(path)
    _check_owner(old, path, config, network)
    return old


def check_updated(config: str, network: str, path: Path, reason: str | None) -> Baseline:
    """What an update keeps of the baseline at ``path``: what can be refused before a run.

    Raises:
        InputError: it belongs to another config.
        ConfigError: accepted figures would be replaced without a reason.
    """
    if reason is None and path.is_file():
        raise ConfigError(
            f"--update would replace the figures of {path}",
            expected="the reason, which is recorded with them",
            fix="add --reason TEXT",
        )
    return _kept(path, config, network)


def compare(
    config: str,
    network: str,
    reports: Sequence[ValidationReport],
    benchmark: BenchmarkReport | None,
    path: Path,
) -> Comparison:
    """The run's figures against those of its machine class in the baseline at ``path``.

    Figures of precisions that the run does not judge stay uncompared.

    Args:
        network: sha256 of the network.
        benchmark: latencies of the same run; None where no engine ran.

    Raises:
        InputError: no baseline, one of another config, network or schema, or without this machine class.
        CheckFailed: outputs that are not finite.
    """
    old = check_compared(config, network, path)
    machine = machine_class(reports, benchmark.device.name if benchmark and benchmark.device else None)
    if machine not in old.machines:
        raise InputError(
            f"the baseline {path} has no figures of this machine class",
            expected=machine,
            got=", ".join(old.machines) or "none at all",
            fix="accept these with --update --reason TEXT",
        )
    return _compared(config, machine, path, old.machines[machine], reports, benchmark)


def update(
    config: str,
    network: str,
    reports: Sequence[ValidationReport],
    benchmark: BenchmarkReport | None,
    path: Path,
    reason: str | None,
) -> Comparison:
    """Make the run's figures the baseline of its machine class, and say what that changed.

    Figures of other machine classes, and of precisions not judged, stay. A baseline of another network or schema is
    replaced as a whole.

    Args:
        reason: recorded with the date; may be None for a new baseline alone.

    Raises:
        InputError: the baseline belongs to another config.
        ConfigError: accepted figures would be replaced without a reason.
        CheckFailed: outputs that are not finite.
    """
    old = check_updated(config, network, path, reason)
    machine = machine_class(reports, benchmark.device.name if benchmark and benchmark.device else None)
    known = old.machines.get(machine, {})
    comparison = _compared(config, machine, path, known, reports, benchmark)
    # What this run could not measure stays as it was; what it no longer has goes.
    gone = {d.figure for d in comparison.differences if d.status == "missing"}
    figures = {name: figure for name, figure in known.items() if name not in gone}
    for d in comparison.differences:
        if d.now is not None:
            figures[d.figure] = Figure(d.now, d.tolerance)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = Acceptance(date, machine, len(figures), reason or "first figures")
    machines = {**old.machines, machine: dict(sorted(figures.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(Baseline(config, network, machines, (*old.accepted, entry))))
    return comparison


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    Raises:
        InputError: missing, damaged, or of another schema.
    """
    if not path.is_file():
        raise InputError(
            f"there is no baseline {path}", expected="figures accepted before", fix="accept these with --update"
        )
    raw = _raw(path)
    if _schema(raw) != BASELINE_SCHEMA:
        raise InputError(
            f"the baseline {path} is of another schema",
            expected=f"schema {BASELINE_SCHEMA}",
            got=f"schema {_schema(raw)}",
            fix="accept new figures with --update --reason TEXT",
        )
    try:
        return TypeAdapter(Baseline).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def junit(comparison: Comparison) -> bytes:
    """JUnit XML: a test case a figure."""
    bad, skipped = comparison.regressions, [d for d in comparison.differences if d.status == "skipped"]
    counts = {
        "tests": str(len(comparison.differences) + len(comparison.skipped)),
        "failures": str(len(bad)),
        "errors": "0",
        "skipped": str(len(skipped) + len(comparison.skipped)),
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"unet-trt regress {comparison.config}", **counts})
    for d in comparison.differences:
        precision, _, figure = d.figure.partition("/")
        owner = f"{comparison.config}.{comparison.machine}.{precision}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": owner, "name": figure, "time": "0"})
        if d.status == "skipped":
            ElementTree.SubElement(case, "skipped", {"message": d.reason})
        elif d.regressed:
            now = "missing" if d.now is None else f"{d.now:.6f}"
            message = f"{d.figure}: {now}, expected {_bound(d)}"
            ElementTree.SubElement(case, "failure", {"message": message, "type": d.status}).text = message
    for why in comparison.skipped:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": comparison.config, "name": why.partition(":")[0], "time": "0"}
        )
        ElementTree.SubElement(case, "skipped", {"message": why})
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def markdown(comparison: Comparison) -> str:
    """A summary for a pull request: the verdict, what changed, and the rest folded away."""
    bad = comparison.regressions
    verdict = f"{len(bad)} figure(s) regressed" if bad else "no regression"
    lines = [f"### unet-trt {comparison.config} on {comparison.machine}: {verdict}", ""]
    moved = [d for d in comparison.differences if d.status != "same"]
    same = [d for d in comparison.differences if d.status == "same"]
    if moved:
        lines += _markdown_table(moved)
    if same:
        lines += [f"<details><summary>{len(same)} figures within tolerance</summary>", "", *_markdown_table(same)]
        lines += ["</details>", ""]
    lines += [f"- not compared: {why}" for why in comparison.skipped]
    return "\n".join(lines).rstrip() + "\n"


def rows(comparison: Comparison) -> list[tuple[str, str, str, str, str, str]]:
    """Figure, baseline, now, change, what is allowed, status: as text."""
    return [
        (d.figure, _number(d.baseline), _number(d.now), _number(d.change, "+.4f"), _bound(d), _status(d))
        for d in comparison.differences
    ]


def _compared(
    config: str,
    machine: str,
    path: Path,
    known: Mapping[str, Figure],
    reports: Sequence[ValidationReport],
    benchmark: BenchmarkReport | None,
) -> Comparison:
    for report in reports:
        for check in report.checks:
            if check.name == NOT_FINITE and not check.passed:
                raise CheckFailed(
                    f"{report.candidate.precision}'s outputs hold NaN or infinite values, which no baseline allows",
                    expected="finite outputs",
                    got=f"{check.shown} that are not; worst: {', '.join(map(str, check.offenders))}",
                    fix="see where they begin with validate --layers",
                )
    latencies, skipped = latency_figures(benchmark)
    now = {**figures_of(reports), **latencies}
    judged = {report.candidate.precision for report in reports}
    # A class that the labels never held has no figure on either side.
    names = {name for name in known if name.partition("/")[0] in judged}
    names |= {name for name, value in now.items() if value is not None}
    differences = []
    for name in sorted(names):
        figure = known.get(name)
        tolerance = figure.tolerance if figure else TOLERANCES[_kind(name)]
        reason = ""
        if figure and _kind(name) == "latency" and name not in now:
            reason = f"{name.rpartition('/')[2]} and {name.partition('/')[0]} were not both timed on a GPU in this run"
        differences.append(Difference(name, figure.value if figure else None, now.get(name), tolerance, reason))
    return Comparison(config, machine, str(path), tuple(differences), tuple(skipped))


def _check_owner(old: Baseline, path: Path, config: str, network: str) -> None:
    _check_config(old.config, path, config)
    if old.network != network:
        raise InputError(
            f"{path} is the baseline of another network",
            expected=f"sha256 {network[:16]}…",
            got=f"sha256 {old.network[:16]}…",
            fix="accept the new network's figures with --update --reason TEXT, or name the network that they belong to",
        )


def _check_config(theirs: str | None, path: Path, config: str) -> None:
    if theirs != config:
        raise InputError(
            f"{path} is the baseline of another config", expected=config, got=str(theirs), fix="name its own"
        )


def _kept(path: Path, config: str, network: str) -> Baseline:
    """What of an earlier baseline an update keeps: of another network or schema nothing but its history."""
    if not path.is_file():
        return Baseline(config, network, {})
    raw = _raw(path)
    if _schema(raw) != BASELINE_SCHEMA:
        _check_config(raw.get("config"), path, config)
        return Baseline(config, network, {}, _history(path, raw))
    old = read_baseline(path)
    _check_config(old.config, path, config)
    return old if old.network == network else Baseline(config, network, {}, old.accepted)


def _history(path: Path, raw: Mapping[str, Any]) -> tuple[Acceptance, ...]:
    try:
        return TypeAdapter(tuple[Acceptance, ...]).validate_python(raw.get("accepted", ()))
    except ValidationError:
        log.warning("the reasons recorded in %s cannot be read, and are not kept", path)
        return ()


def _raw(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(raw, dict):
        raise _damaged(path, "it holds no figures")
    return raw


def _schema(raw: Mapping[str, Any]) -> Any:
    """The first schema did not name itself."""
    return raw.get("schema_version", 1)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"the baseline {path} cannot be read: {why}",
        expected=f"a baseline of schema {BASELINE_SCHEMA} as JSON",
        fix="restore the file, or remove it and accept new figures with --update",
    )


def _kind(figure: str) -> str:
    return figure.split("/")[1]


def _bound(d: Difference) -> str:
    if d.worst_allowed is None:
        return "–"
    return f"{'<=' if d.is_latency else '>='} {d.worst_allowed:.4f}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _status(d: Difference) -> str:
    return {"worse": "REGRESSED", "missing": "MISSING", "skipped": f"skipped: {d.reason}"}.get(d.status, d.status)


def _markdown_table(differences: Sequence[Difference]) -> list[str]:
    head = ["| figure | baseline | now | change | allowed | |", "|---|---:|---:|---:|---:|---|"]
    body = [
        f"| {d.figure} | {_number(d.baseline)} | {_number(d.now)} | {_number(d.change, '+.4f')} | {_bound(d)} "
        f"| {'**' + _status(d) + '**' if d.regressed else _status(d)} |".replace("\n", " ")
        for d in differences
    ]
    return [*head, *body, ""]
