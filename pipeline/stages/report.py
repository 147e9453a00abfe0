"""One self-contained HTML page from the stages' JSON reports."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline import __version__
from pipeline.artifacts import ModelCard
from pipeline.config import Precision
from pipeline.mixed.chart import chart
from pipeline.mixed.report import MixReport
from pipeline.presenting import bracketed, negated, number
from pipeline.reports import BenchmarkReport, ValidationReport


@dataclass(frozen=True)
class Inputs:
    """What the page shows; what is absent is said to be not measured.

    Attributes:
        pictures: folder of a precision's masks, overlays, images and labels, as validation writes them.
        provenance: rows of name and value.
        mixed: None where mixed precision was not asked for.
    """

    card: ModelCard
    validations: Mapping[Precision, ValidationReport]
    benchmark: BenchmarkReport | None
    pictures: Mapping[Precision, Path]
    engine_bytes: Mapping[Precision, int]
    provenance: Sequence[tuple[str, str]]
    mixed: MixReport | None = None


def write_report(inputs: Inputs, folder: Path) -> Path:
    """Write ``folder/index.html``; it needs no network and no other file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.stages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(bracketed=bracketed, negated=negated, number=number)
    latency = {timing.name: timing for timing in inputs.benchmark.timings} if inputs.benchmark else {}
    page = environment.get_template("report.html.j2").render(
        version=__version__, latency=latency, gallery=_gallery(inputs), mixed_chart=_chart(inputs), **vars(inputs)
    )
    target = folder / "index.html"
    target.write_text(page, encoding="utf-8")
    return target


def _gallery(inputs: Inputs) -> list[dict[str, str | list[tuple[str, str]]]]:
    """Per image: the picture itself, its labels, and each precision's overlay, as data URIs."""
    rows: list[dict[str, str | list[tuple[str, str]]]] = []
    if not inputs.pictures:
        return rows
    some = next(iter(inputs.pictures.values()))
    for image in sorted((some / "images").glob("*.png")):
        views = [("image", image)]
        if (some / "labels" / image.name).is_file():
            views.append(("label", some / "labels" / image.name))
        views += [(precision, folder / "masks" / image.name) for precision, folder in inputs.pictures.items()]
        rows.append(
            {"name": image.stem, "views": [(title, _data_uri(path)) for title, path in views if path.is_file()]}
        )
    return rows


def _chart(inputs: Inputs) -> Markup | None:
    """An SVG element, whose texts are escaped."""
    return Markup(chart(inputs.mixed)) if inputs.mixed else None


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
