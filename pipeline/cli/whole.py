"""Commands for the whole: init, run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import chosen_precisions, load_settings, open_run
from pipeline.cli.endings import print_verdict, suggest_predicting
from pipeline.cli.options import (
    BUILD,
    BackendOption,
    BuildOption,
    ConfigOption,
    ForceOption,
    JsonOption,
    PrecisionsOption,
    RequireSpeedupOption,
    SetOption,
)
from pipeline.printing import print_init, print_json, print_speed_verdict


def init(
    checkpoint: Annotated[Path, typer.Argument(help="Weights (.pth, .pt, .safetensors, .wts) or a network (.onnx).")],
    images: Annotated[Path, typer.Argument(help="Folder of images, or of train and val, images and labels.")],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of label maps.", show_default="in or beside the images")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="CONFIG.yaml.", show_default="named as the checkpoint")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a configuration that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented configuration by looking at a checkpoint and images."""
    from pipeline.stages.init import init as write_config

    report = write_config(checkpoint, images, output or Path(f"{checkpoint.stem}.yaml"), labels, overwrite=overwrite)
    if json:
        print_json(report)
        return
    print_init(report)
    print(report.config)


def run(
    config: ConfigOption = None,
    precision: PrecisionsOption = None,
    backend: BackendOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    require_speedup: RequireSpeedupOption = False,
    json: JsonOption = False,
) -> None:
    """Export, clean, calibrate, build, validate, benchmark, report: whatever has changed."""
    settings = load_settings(config, overrides, backend)
    precisions = chosen_precisions(settings, precision)
    with open_run(settings, build_dir, force) as work:
        if require_speedup:
            work.check_speedup_can_be_judged(precisions)
        page = work.report(precisions)
        print_verdict(work, precisions, page, json)
        if not json:
            print_speed_verdict(work.benchmark(precisions))
        work.verdict(precisions, page)
        if require_speedup:
            work.require_speedup(precisions)
        if not json:
            suggest_predicting(work, precisions)


def report(
    config: ConfigOption = None,
    precision: PrecisionsOption = None,
    backend: BackendOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write the HTML page (after whatever it still needs)."""
    settings = load_settings(config, overrides, backend)
    with open_run(settings, build_dir, force) as work:
        page = work.report(chosen_precisions(settings, precision))
    print(page.with_name("report.json").read_text(encoding="utf-8") if json else page)
