"""Commands that judge and time: validate, benchmark, regress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import (
    card_of,
    chosen_precisions,
    load_settings,
    open_fleet,
    open_run,
    required,
    without_config,
)
from pipeline.cli.endings import print_verdict, same_choice, suggest_next
from pipeline.cli.options import (
    BUILD,
    AddressOption,
    BackendOption,
    BuildOption,
    ConfigOption,
    DistributedOption,
    ForceOption,
    JsonOption,
    PrecisionsOption,
    RequireSpeedupOption,
    SetOption,
    WorkersOption,
)
from pipeline.printing import print_drift, print_json, print_table, print_timings, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.backends.base import Runner
    from pipeline.fleet.fleet import Fleet


def validate(
    model: Annotated[Path | None, typer.Argument(help="CLEAN.onnx, instead of -c.")] = None,
    engine: Annotated[Path | None, typer.Option(help="model.engine, or a typed ONNX graph.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of label maps.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and pictures.")] = Path(
        "validation"
    ),
    precision: PrecisionsOption = None,
    backend: BackendOption = None,
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare every tensor along the network instead of the masks.")
    ] = False,
    distributed: DistributedOption = False,
    address: AddressOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Judge precisions against FP32 on ONNX Runtime, and against labels."""
    if model is None:
        settings = load_settings(config, overrides, backend)
        precisions = chosen_precisions(settings, precision)
        with open_fleet(distributed, address, workers) as fleet, open_run(settings, build_dir, force, fleet) as work:
            if layers:
                reports = {str(each): work.layers(each) for each in precisions}
                print_drift(reports, json)
                for report in reports.values():
                    report.verdict()
                return
            for each in precisions:
                work.validate(each)
            print_verdict(work, precisions, None, json)
            work.verdict(precisions)
        if not json:
            suggest_next("benchmark", config, build_dir, overrides, *same_choice(precision, backend))
        return
    if layers:
        from pipeline.errors import ConfigError

        raise ConfigError("--layers needs a configuration", expected="-c CONFIG", got=str(model))
    without_config(model, config, overrides)
    candidate = required(engine, "--engine FILE")
    with open_fleet(distributed, address, workers) as fleet:
        _validate_files(model, candidate, required(images, "--images DIR"), labels, output, json, fleet)


def _validate_files(
    model: Path, engine: Path, images: Path, labels: Path | None, output: Path, json: bool, fleet: Fleet | None
) -> None:
    from pipeline.artifacts import replaced_folder
    from pipeline.backends.onnxruntime import OnnxRuntimeRunner
    from pipeline.config import ValidateConfig
    from pipeline.data.dataset import image_folder
    from pipeline.errors import CheckFailed
    from pipeline.opening import describe_candidate, open_model
    from pipeline.presenting import CHECK_HEADINGS, check_row, figure_table, verdict_table
    from pipeline.stages.validate import validate as judge

    output = _own_folder(output, [model, engine, images, *([labels] if labels else [])])
    card = card_of(model)
    dataset = image_folder(images.absolute(), card.preprocessing.channels, labels and labels.absolute(), card)
    model, engine = model.absolute(), engine.absolute()
    if fleet is not None and engine.suffix != ".onnx":
        candidate: Runner = fleet.host_runner(lambda: open_model(engine)[0])
    else:
        candidate, _ = open_model(engine)
    with OnnxRuntimeRunner(model) as reference, candidate, replaced_folder(output) as folder:
        verdict = judge(
            reference,
            candidate,
            describe_candidate(engine),
            dataset,
            card,
            ValidateConfig(),
            folder,
            str(model.resolve()),
            fleet,
        )
    if json:
        print_json(verdict)
    else:
        print_table(*verdict_table([verdict]))
        print_table(*figure_table([verdict]))
        print_table(CHECK_HEADINGS, [check_row(check) for check in verdict.checks])
    if not verdict.passed:
        raise CheckFailed(f"{engine} failed; see {output / 'report.json'}")
    if not json and card.task == "segmentation":
        suggest("unet-trt", "predict", engine, "IMAGES", "-o", "masks/")


def _own_folder(output: Path, inputs: Sequence[Path]) -> Path:
    """The resolved folder, which validation may replace: absent, empty, or an earlier report's, and without inputs."""
    from pipeline.errors import BuildFolderError

    output = output.resolve()
    if output.is_dir() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise BuildFolderError(
            f"{output} holds other files, which the report would replace",
            expected="a new or empty folder, or one with an earlier report",
            fix="choose another with -o",
        )
    inside = [path for path in inputs if path.resolve().is_relative_to(output)]
    if inside:
        raise BuildFolderError(f"{inside[0]} lies in the folder {output} to be replaced", fix="choose another with -o")
    return output


def benchmark(
    config: ConfigOption = None,
    precision: PrecisionsOption = None,
    backend: BackendOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    require_speedup: RequireSpeedupOption = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Time all candidates, torch's among them, and batches and streams.")
    ] = False,
    torch_python: Annotated[
        str | None, typer.Option(help="Python that has torch, for its candidates.", show_default="this one")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time everything that runs on this machine, and judge INT8 against FP16."""
    chosen = [
        *(overrides or []),
        *(["benchmark.candidates=all", "benchmark.throughput=true"] if everything else []),
        *([f"benchmark.torch_python={torch_python}"] if torch_python else []),
    ]
    settings = load_settings(config, chosen, backend)
    if torch_python and not any(rival.startswith("torch") for rival in settings.benchmark.rivals):
        from pipeline.errors import ConfigError

        raise ConfigError(
            "--torch-python is for candidates that are not chosen",
            expected="torch's among benchmark.candidates",
            got=", ".join(settings.benchmark.rivals) or "none",
            fix="add --all, or --set benchmark.candidates=[torch-fp16]",
        )
    precisions = chosen_precisions(settings, precision)
    with open_run(settings, build_dir, force) as work:
        if require_speedup:
            work.check_speedup_can_be_judged(precisions)
        timings = work.benchmark(precisions)
        if json:
            print_json(timings)
        else:
            print_timings(timings)
        if require_speedup:
            work.require_speedup(precisions)
    if not json:
        suggest_next("report", config, build_dir, overrides, *same_choice(precision, backend))


def regress(
    config: ConfigOption = None,
    baseline: Annotated[Path | None, typer.Option(help="Default: baselines/<config>.json.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Accept the figures as the new baseline.")] = False,
    reason: Annotated[
        str | None, typer.Option(help="Why they are accepted; needed to replace earlier ones, and recorded.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML, a test case a figure.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary in Markdown.")] = None,
    precision: PrecisionsOption = None,
    backend: BackendOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a run's figures with the committed baseline."""
    from pipeline.artifacts import write_atomically
    from pipeline.stages import regress as stage

    settings = load_settings(config, overrides, backend)
    if reason is not None and not (update and reason.strip()):
        raise _bad_reason(update)
    precisions = chosen_precisions(settings, precision)
    path = baseline or Path("baselines", f"{settings.name}.json")
    with open_run(settings, build_dir, False) as work:
        network = work.network_sha256()
        if update:
            stage.check_updated(settings.name, network, path, reason)
        else:
            stage.check_compared(settings.name, network, path)
        reports = [work.validate(each) for each in precisions]
        runs = any(not report.candidate.emulated for report in reports)
        timings = work.benchmark(precisions) if runs else None
    if update:
        comparison = stage.update(settings.name, network, reports, timings, path, reason)
    else:
        comparison = stage.compare(settings.name, network, reports, timings, path)
    if json:
        print_json(comparison)
    else:
        print_table(("figure", "baseline", "now", "change", "allowed", "result"), stage.rows(comparison))
        for why in comparison.skipped:
            print(f"not compared: {why}")
    if junit is not None:
        write_atomically(junit, stage.junit(comparison))
    if markdown is not None:
        write_atomically(markdown, stage.markdown(comparison).encode())
    if not update:
        comparison.verdict()
    elif not json:
        print(f"accepted: {path}")


def _bad_reason(update: bool) -> Exception:
    from pipeline.errors import ConfigError

    if update:
        return ConfigError("--reason is empty", expected="why the figures are accepted")
    return ConfigError("--reason belongs to --update", fix="add --update, or leave --reason out")
