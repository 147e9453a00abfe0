"""The page: one self-contained HTML file from the stages' JSON reports, and its gist as Markdown and as JSON."""

from __future__ import annotations

import base64
import dataclasses
import mimetypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pydantic.dataclasses import dataclass

from pipeline import __version__
from pipeline.artifacts import SCHEMA_VERSION, EngineManifest, ModelCard, to_json
from pipeline.calibration.report import CalibrationReport
from pipeline.cleaning_report import CleaningReport
from pipeline.config import Precision
from pipeline.drift import FLOOR_DB, DriftReport
from pipeline.graph.levels import Block
from pipeline.mixed.chart import chart
from pipeline.mixed.report import MixReport
from pipeline.page.answers import Answers, answer
from pipeline.page.network import Network, account_for_blocks, draw_network
from pipeline.page.plots import along, columns, lengths, rates, steps
from pipeline.presenting import bracketed, headline, negated, number, percent
from pipeline.reports import BenchmarkReport, Interval, PicturedImage, PicturesReport, ValidationReport

PAGE, SUMMARY, DATA = "index.html", "report.md", "report.json"
# Of all pictures as they stand in the page; with the rest it stays below 8 MB.
PICTURES_BYTES = 6_000_000
TITLES = {"image": "Image", "label": "Labels", "reference": "FP32", "fp32": "FP32 engine"}


@dataclass(frozen=True)
class Provenance:
    """Where the figures come from.

    Attributes:
        models: sha256 by file: graphs, calibration cache, engines.
        reports: sha256 by file of the JSON reports that the page shows.
        versions: of the tools that made them.
        config: the configuration with its overrides, as YAML.
    """

    models: dict[str, str] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the page shows; what is absent is said to be not measured.

    Attributes:
        pictures_folder: that the files of ``pictures`` lie below.
        manifests: of the engines that were built; ``engine_bytes`` their sizes.
        layers: tensor by tensor against FP32, as far as that was compared.
        blocks: the clean graph's.
        planned: what the typed graphs' convolutions compute in, by node name.
        mixed: None where mixed precision was not asked for.
    """

    card: ModelCard
    validations: Mapping[Precision, ValidationReport]
    benchmark: BenchmarkReport | None = None
    pictures: PicturesReport | None = None
    pictures_folder: Path = Path()
    manifests: Mapping[Precision, EngineManifest] = field(default_factory=dict)
    engine_bytes: Mapping[Precision, int] = field(default_factory=dict)
    cleaning: CleaningReport | None = None
    calibration: CalibrationReport | None = None
    layers: Mapping[Precision, DriftReport] = field(default_factory=dict)
    blocks: Sequence[Block] = ()
    planned: Mapping[Precision, Mapping[str, str]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    mixed: MixReport | None = None


@dataclass(frozen=True)
class PrecisionSummary:
    """One precision in ``report.json``; ``gpu_ms`` is the median by CUDA events, None where no engine was timed."""

    passed: bool
    failed_checks: tuple[str, ...]
    emulated: bool
    ran: str
    mean_iou: float | None
    mean_iou_drop: float | None
    mean_iou_drop_interval: Interval | None
    agreement: float | None
    gpu_ms: float | None
    engine_bytes: int | None


@dataclass(frozen=True)
class PageReport:
    """``report.json``: the page's answers and main figures; the rest is in the reports that it names."""

    name: str
    version: str
    answers: Answers
    precisions: dict[Precision, PrecisionSummary]
    network: Network
    provenance: Provenance
    schema_version: int = field(default=SCHEMA_VERSION)


@dataclasses.dataclass(frozen=True)
class Shot:
    """An image in the page: data URIs by view, and maps of flipped pixels by precision, with what to call them."""

    image: PicturedImage
    views: dict[str, str]
    marks: dict[str, str]
    agreement: dict[str, float]


def write_report(inputs: Inputs, folder: Path) -> Path:
    """Write ``index.html``, which needs no network and no other file, ``report.md`` and ``report.json``."""
    engines = inputs.benchmark.engines if inputs.benchmark else {}
    precisions = list(inputs.validations)
    network = account_for_blocks(inputs.blocks, precisions, inputs.planned, inputs.layers, engines)
    answers = answer(inputs.validations, inputs.benchmark, inputs.layers, inputs.calibration)
    latency = {timing.name: timing for timing in inputs.benchmark.timings} if inputs.benchmark else {}
    shots, left_out = _shots(inputs)
    shown: dict[str, Any] = {
        **vars(inputs),
        "version": __version__,
        "answers": answers,
        "latency": latency,
        "network": network,
        "drawing": draw_network(network),
        "shots": shots,
        "left_out": left_out,
        "rules": Counter(rule for step in inputs.cleaning.passes for rule, _ in step.fired) if inputs.cleaning else {},
        "drop_scale": _drop_scale(inputs.validations),
        "floor_db": FLOOR_DB,
        "mixed_chart": _chart(inputs),
    }
    for name, template in ((PAGE, "report.html.j2"), (SUMMARY, "report.md.j2")):
        (folder / name).write_text(environment().get_template(template).render(shown), encoding="utf-8")
    report = PageReport(inputs.card.name, __version__, answers, _summaries(inputs), network, inputs.provenance)
    (folder / DATA).write_bytes(to_json(report))
    return folder / PAGE


def environment() -> jinja2.Environment:
    """What the templates are rendered with; only HTML is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.stages"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(bracketed=bracketed, headline=headline, negated=negated, number=number, percent=percent)
    made.globals.update(along=along, columns=columns, lengths=lengths, rates=rates, steps=steps)
    return made


def _summaries(inputs: Inputs) -> dict[Precision, PrecisionSummary]:
    devices = {timing.name: timing.device for timing in inputs.benchmark.timings} if inputs.benchmark else {}
    summaries: dict[Precision, PrecisionSummary] = {}
    for precision, report in inputs.validations.items():
        drop, device = report.drops.get("mean_iou"), devices.get(precision)
        summaries[precision] = PrecisionSummary(
            passed=report.passed,
            failed_checks=tuple(check.name for check in report.checks if not check.passed),
            emulated=report.candidate.emulated,
            ran=report.candidate.ran,
            mean_iou=report.scores.mean_iou if report.scores else None,
            mean_iou_drop=drop.value if drop else None,
            mean_iou_drop_interval=drop.interval if drop else None,
            agreement=report.agreement,
            gpu_ms=device.p50_ms if device else None,
            engine_bytes=inputs.engine_bytes.get(precision),
        )
    return summaries


def _drop_scale(validations: Mapping[Precision, ValidationReport]) -> float:
    """The largest |drop of mIoU| that the plot has to hold, budgets included."""
    ends = [
        abs(end)
        for report in validations.values()
        for drop in [report.drops.get("mean_iou")]
        if drop is not None
        for end in (drop.value, *((drop.interval.low, drop.interval.high) if drop.interval else ()))
    ]
    bounds = [check.bound for report in validations.values() for check in report.checks if check.name == "mIoU drop"]
    return max([*ends, *bounds], default=0.0)


def _shots(inputs: Inputs) -> tuple[list[Shot], int]:
    """The images that have room in the page, and how many have none."""
    shots: list[Shot] = []
    used = 0
    images = inputs.pictures.images if inputs.pictures else ()
    for image in images:
        shot = _shot(image, inputs)
        used += sum(map(len, (*shot.views.values(), *shot.marks.values())))
        if used > PICTURES_BYTES:
            break
        shots.append(shot)
    return shots, len(images) - len(shots)


def _shot(image: PicturedImage, inputs: Inputs) -> Shot:
    def uris(files: Mapping[Any, str]) -> Iterator[tuple[str, str]]:
        for name, file in files.items():
            yield TITLES.get(name, name.upper()), _data_uri(inputs.pictures_folder / file)

    order = {name: image.views[name] for name in ("image", "label", "reference", *image.marks) if name in image.views}
    agreement = {
        TITLES.get(precision, precision.upper()): each.agreement
        for precision, report in inputs.validations.items()
        for each in report.images
        if each.name == image.name and precision in image.marks and each.agreement is not None
    }
    return Shot(image, dict(uris(order)), dict(uris(image.marks)), agreement)


def _chart(inputs: Inputs) -> Markup | None:
    """An SVG element, whose texts are escaped."""
    return Markup(chart(inputs.mixed)) if inputs.mixed else None


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
