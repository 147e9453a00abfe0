"""What commands say at their end: the verdict, and the command that comes next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.options import BUILD
from pipeline.printing import print_json, print_table, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import Precision
    from pipeline.run import Run


def print_verdict(work: Run, precisions: Sequence[Precision], page: Path | None, json: bool) -> None:
    """The reports of validation as tables, with where the page and the masks are; or as JSON."""
    from pipeline.presenting import figure_table, verdict_table

    reports = [work.validate(precision) for precision in precisions]
    if json:
        print_json(reports)
        return
    print_table(*verdict_table(reports))
    print_table(*figure_table(reports))
    if any(r.candidate.emulated for r in reports):
        print(
            "emulated: no engine ran on this machine; its typed graph ran on ONNX Runtime instead (see unet-trt doctor)"
        )
    if page is not None:
        print(f"report: {page}")
        if any(report.pictures for report in reports):
            print(f"masks:  {work.folder / 'validate'}/<precision>/overlays")


def suggest_next(command: str, config: Path | None, build: Path, overrides: Sequence[str] | None, *more: str) -> None:
    """The next command on the same configuration, in the same folder, with the same overrides."""
    folder = ["--build-dir", build] if build != BUILD else []
    sets = [part for override in overrides or () for part in ("--set", override)]
    suggest("unet-trt", command, "-c", config, *folder, *sets, *more)


def suggest_predicting(work: Run, precisions: Sequence[Precision]) -> None:
    """With the engine of the last precision that runs here, or with the clean graph."""
    if work.config.task != "segmentation":
        return
    engines = [work.engine(each) / "model.engine" for each in precisions if not work.validate(each).candidate.emulated]
    suggest("unet-trt", "predict", engines[-1] if engines else work.clean(), "IMAGES", "-o", "masks/")


def same_choice(precision: Sequence[str] | None, backend: str | None, route: str | None = None) -> list[str]:
    """The options of these again; only ``engine`` has one for the route."""
    return [
        *(part for each in precision or () for part in ("-p", each)),
        *(["--backend", backend] if backend else []),
        *(["--set", f"engine.route={route}"] if route else []),
    ]
