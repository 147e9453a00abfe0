"""The commands: arguments, logging, exit codes. Heavy modules are imported inside the commands, so --help is quick."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.printing import (
    print_abilities,
    print_account,
    print_calibration,
    print_cleaning,
    print_drift,
    print_engines,
    print_facts,
    print_init,
    print_json,
    print_mix,
    print_speed_verdict,
    print_table,
    print_timings,
    suggest,
)
from pipeline.progress import working

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.backends.base import Runner
    from pipeline.backends.remote import RemoteRunner
    from pipeline.config import Config, Precision
    from pipeline.fleet.fleet import Fleet
    from pipeline.gpu_engines import GpuEngines
    from pipeline.run import Run
    from pipeline.stages.predict import Masks

log = logging.getLogger("pipeline")
app = typer.Typer(
    help="From a trained UNet to a TensorRT engine whose accuracy can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="Weights files.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
# Accepted before and behind the command's name.
GLOBAL_FLAGS = ("--debug", "--quiet")

ConfigOption = Annotated[
    Path | None, typer.Option("-c", "--config", help="Configuration file, such as configs/cells.yaml.")
]
PrecisionsOption = Annotated[
    list[str] | None, typer.Option("-p", "--precision", help="fp32, fp16, int8 or mixed; repeat for several.")
]
BackendOption = Annotated[str | None, typer.Option("--backend", help="auto, tensorrt, tensorrt-rtx or onnxruntime.")]
RouteOption = Annotated[str | None, typer.Option("--route", help="auto, implicit or explicit.")]
BuildOption = Annotated[Path, typer.Option("--build-dir", help="Folder for everything that is made.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the configuration: section.key=value.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Make every stage anew.")]
RequireSpeedupOption = Annotated[
    bool, typer.Option("--require-speedup", help="Fail where INT8 is not surely faster than FP16.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DistributedOption = Annotated[
    bool, typer.Option("--distributed", help="On Ray: all cores and GPUs of this machine, or of --address's cluster.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="HOST:PORT of a running Ray cluster, or auto; with --distributed.")
]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes with a core each, with --distributed.", show_default="all cores")
]
BUILD = Path("build")
PROFILE_SIZES = ("min", "opt", "max")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log message.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log warnings only.")] = False,
) -> None:
    _set_up_logging(debug, quiet)


def main() -> None:
    """Entry point of ``unet-trt``.

    Exits 0 done and passed, 1 a check failed, 2 bad input, 3 not on this machine, 130 interrupted.
    """
    from pipeline.errors import PipelineError

    if not (sys.stderr.isatty() or os.environ.get("FORCE_COLOR")):
        # Typer colours its messages on GitHub's runners, where no terminal is either.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    arguments = sys.argv[1:]
    flags = [a for a in arguments if a in GLOBAL_FLAGS]
    try:
        app([*flags, *(a for a in arguments if a not in GLOBAL_FLAGS)], prog_name="unet-trt", standalone_mode=True)
    except PipelineError as error:
        if "--debug" in flags:
            log.exception("failed")
        print(f"unet-trt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        # Nothing should come here; what does is a defect of the program, told without a traceback.
        if "--debug" in flags:
            log.exception("failed")
        fix = "run again with --debug, and report what it prints"
        print(f"unet-trt: unexpected {type(error).__name__}: {error}\n  to fix: {fix}", file=sys.stderr)
        sys.exit(PipelineError.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not _is_interrupt(stop):
            raise
        print("unet-trt: interrupted; finished stages are kept", file=sys.stderr)
        sys.exit(130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the cause, of which typer makes a silent exit of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


# ---------------------------------------------------------------------- the whole


@app.command()
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


@app.command()
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
    settings = _load(config, overrides, backend)
    precisions = _precisions(settings, precision)
    with _run(settings, build_dir, force) as work:
        if require_speedup:
            work.check_speedup_can_be_judged(precisions)
        page = work.report(precisions)
        _print_verdict(work, precisions, page, json)
        if not json:
            print_speed_verdict(work.benchmark(precisions))
        work.verdict(precisions)
        if require_speedup:
            work.require_speedup(precisions)
        if not json:
            _suggest_predicting(work, precisions)


@app.command()
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
    settings = _load(config, overrides, backend)
    with _run(settings, build_dir, force) as work:
        page = work.report(_precisions(settings, precision))
    print(page.with_name("report.json").read_text(encoding="utf-8") if json else page)


# ---------------------------------------------------------------------- single stages


@app.command()
def export(
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Torch network to ONNX."""
    with _run(_load(config, overrides), build_dir, force) as work:
        model = work.export()
    if json:
        print(model.with_name("report.json").read_text(encoding="utf-8"))
        return
    print(model)
    _suggest("clean", config, build_dir, overrides)


@app.command()
def clean(
    model: Annotated[Path | None, typer.Argument(help="RAW.onnx, instead of -c.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="CLEAN.onnx.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Report as JSON.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest accepted change, relative to the largest output.", show_default="1e-5"),
    ] = None,
    bake_input: Annotated[
        Literal["float", "image"] | None,
        typer.Option(help="image: take uint8 (N, H, W, C), normalised in the graph.", show_default="float"),
    ] = None,
    bake_output: Annotated[
        Literal["logits", "labels", "probabilities"] | None,
        typer.Option(help="labels: give uint8 class ids (N, H, W); probabilities: softmax.", show_default="logits"),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="Promise that dynamic heights and widths are always multiples of this.")
    ] = 1,
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite the graph for TensorRT, with proof that it computes the same."""
    from pipeline.artifacts import from_json
    from pipeline.config import CleanConfig, ProfileRange
    from pipeline.stages.clean import CleaningReport
    from pipeline.stages.clean import clean as clean_file

    keys = {"tolerance": tolerance, "input": bake_input, "output": bake_output}
    given = {key: value for key, value in keys.items() if value is not None}
    if model is None:
        chosen = [*(overrides or []), *(f"clean.{key}={value}" for key, value in given.items())]
        with _run(_load(config, chosen), build_dir, force) as work:
            output = work.clean()
        result = from_json(CleaningReport, output.with_name("report.json"))
    else:
        _without_config(model, config, overrides)
        output = _required(output, "-o CLEAN.onnx")
        promised = ProfileRange(min=multiple_of, opt=4 * multiple_of, max=8 * multiple_of, multiple_of=multiple_of)
        profiles = {"height": promised, "width": promised} if multiple_of > 1 else {}
        settings = _section(CleanConfig, given)
        with working("cleaning"):
            result = clean_file(
                model,
                output,
                report,
                settings.tolerance,
                profiles=profiles,
                input=settings.input,
                output=settings.output,
            )
    if json:
        print_json(result)
        return
    print_cleaning(result)
    print(output)
    if model is None:
        _suggest("calibrate", config, build_dir, overrides)
    else:
        suggest("unet-trt", "calibrate", output, "--images", "DIR", "-o", "calibration.cache")


@app.command()
def calibrate(
    model: Annotated[Path | None, typer.Argument(help="CLEAN.onnx, instead of -c.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of calibration images.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="calibration.cache; its report is <this>.json.")
    ] = None,
    algorithm: Annotated[
        Literal["entropy", "minmax", "percentile", "mse", "auto"] | None,
        typer.Option(help="auto: the one whose masks agree best.", show_default="entropy"),
    ] = None,
    calibrator: Annotated[
        Literal["cpu", "gpu", "tensorrt", "auto"] | None,
        typer.Option(help="auto: gpu where that is possible, otherwise cpu.", show_default="auto"),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without images that cannot be decoded.")] = False,
    refine: Annotated[
        int | None, typer.Option(help="Steps of learning ranges and biases from FP32's scores; needs torch.")
    ] = None,
    distributed: DistributedOption = False,
    address: AddressOption = None,
    workers: WorkersOption = None,
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Choose the INT8 ranges of all tensors."""
    from pipeline.artifacts import from_json
    from pipeline.calibration.report import CalibrationReport
    from pipeline.config import CalibrateConfig
    from pipeline.data.dataset import image_folder
    from pipeline.graph.io import model_files
    from pipeline.stages.calibrate import calibrate as calibrate_file

    given = {
        **({"algorithm": algorithm} if algorithm else {}),
        **({"calibrator": calibrator} if calibrator else {}),
        **({"skip_bad": True} if skip_bad else {}),
        **({"refine_steps": refine} if refine is not None else {}),
    }
    if model is None:
        chosen = [*(overrides or []), *(f"calibrate.{key}={value}" for key, value in given.items())]
        settings = _load(config, chosen)
        with _fleet(distributed, address, workers) as fleet, _run(settings, build_dir, force, fleet) as work:
            target = work.calibrate()
        result = from_json(CalibrationReport, target.with_name("report.json"))
    else:
        _without_config(model, config, overrides)
        card = _card_of(model)
        dataset = image_folder(_required(images, "--images DIR").absolute(), card.preprocessing.channels)
        inputs = [*model_files(model), *itertools.chain.from_iterable(dataset.files.values())]
        target = _own_file(_required(output, "-o calibration.cache"), inputs)
        section = _section(CalibrateConfig, {**given, "images": len(dataset)})
        report = target.with_name(f"{target.name}.json")
        with _fleet(distributed, address, workers) as fleet:
            result = calibrate_file(model.absolute(), dataset, section, card.preprocessing, target, report, fleet=fleet)
    if json:
        print_json(result)
        return
    print_calibration(result)
    print(target)
    if model is None:
        _suggest("engine", config, build_dir, overrides, "-p", "int8")
    else:
        more = ("--calibration-cache", target, "-o", "model.engine")
        suggest("unet-trt", "engine", model, "-p", "int8", *more)


@app.command()
def engine(
    model: Annotated[Path | None, typer.Argument(help="CLEAN.onnx, instead of -c.")] = None,
    precision: PrecisionsOption = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="model.engine.")] = None,
    calibration_cache: Annotated[Path | None, typer.Option(help="TensorRT calibration cache, for int8.")] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Sizes of a free axis: batch=MIN:OPT:MAX; height and width likewise.")
    ] = None,
    route: RouteOption = None,
    backend: BackendOption = None,
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Build an engine."""
    if model is None:
        settings = _load(config, overrides, backend, route)
        built = {}
        with _run(settings, build_dir, force) as work:
            for each in _precisions(settings, precision):
                built[each] = folder = work.engine(each)
                if each == "mixed":
                    print_mix(work.mix())
                if not json:
                    plan = folder / "model.engine"
                    print(plan if plan.is_file() else folder / "model.onnx")
        if json:
            print_json({each: _built(folder) for each, folder in built.items()})
            return
        print_engines({each: _built(folder) for each, folder in built.items()})
        _suggest("validate", config, build_dir, overrides, *_chosen(precision, backend, route))
        return
    from pipeline.artifacts import sha256_file
    from pipeline.calibration.table import read_cache
    from pipeline.config import EngineConfig
    from pipeline.errors import ConfigError
    from pipeline.graph.io import load_model, model_files, read_card
    from pipeline.stages.engine import build_engine_file

    _without_config(model, config, overrides)
    (chosen, *others) = (_precision(name) for name in _required(precision, "-p PRECISION"))
    if others:
        raise ConfigError("one file is built at a time", expected="one -p", got=" ".join(precision or ()))
    if chosen == "mixed":
        raise ConfigError(
            "mixed precision is searched on images and labels, which a configuration names",
            expected="-c CONFIG -p mixed",
            got=str(model),
            fix="write a configuration with network.onnx; its mixed/config.yaml then names engine.exclude",
        )
    target = _required(output, "-o model.engine")
    sizes = dict(map(_profile, profile or ()))
    settings_of_engine = _section(
        EngineConfig, {"backend": backend or "auto", "route": route or "auto", "profile": sizes}
    )
    table = read_cache(calibration_cache) if calibration_cache else None
    cache_sha256 = sha256_file(calibration_cache) if calibration_cache else None
    card = read_card(load_model(model))
    target = _own_file(target, [*model_files(model), *([calibration_cache] if calibration_cache else [])])
    with working(f"building {target.name}"):
        manifest = build_engine_file(model, chosen, settings_of_engine, table, cache_sha256, card, target)
    if json:
        print_json(manifest)
        return
    print(target)
    suggest("unet-trt", "validate", model, "--engine", target, "--images", "DIR", "--labels", "DIR")


@app.command()
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
        settings = _load(config, overrides, backend)
        precisions = _precisions(settings, precision)
        with _fleet(distributed, address, workers) as fleet, _run(settings, build_dir, force, fleet) as work:
            if layers:
                print_drift({each: work.layers(each) for each in precisions}, json)
                return
            for each in precisions:
                work.validate(each)
            _print_verdict(work, precisions, None, json)
            work.verdict(precisions)
        if not json:
            _suggest("benchmark", config, build_dir, overrides, *_chosen(precision, backend))
        return
    if layers:
        from pipeline.errors import ConfigError

        raise ConfigError("--layers needs a configuration", expected="-c CONFIG", got=str(model))
    _without_config(model, config, overrides)
    candidate = _required(engine, "--engine FILE")
    with _fleet(distributed, address, workers) as fleet:
        _validate_files(model, candidate, _required(images, "--images DIR"), labels, output, json, fleet)


@app.command()
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
    chosen = [*(overrides or []), *(["benchmark.candidates=all", "benchmark.throughput=true"] if everything else [])]
    settings = _load(config, [*chosen, *([f"benchmark.torch_python={torch_python}"] if torch_python else [])], backend)
    if torch_python and not any(rival.startswith("torch") for rival in settings.benchmark.rivals):
        from pipeline.errors import ConfigError

        raise ConfigError(
            "--torch-python is for candidates that are not chosen",
            expected="torch's among benchmark.candidates",
            got=", ".join(settings.benchmark.rivals) or "none",
            fix="add --all, or --set benchmark.candidates=[torch-fp16]",
        )
    precisions = _precisions(settings, precision)
    with _run(settings, build_dir, force) as work:
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
        _suggest("report", config, build_dir, overrides, *_chosen(precision, backend))


@app.command()
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

    settings = _load(config, overrides, backend)
    if reason is not None and not (update and reason.strip()):
        raise _bad_reason(update)
    precisions = _precisions(settings, precision)
    with _run(settings, build_dir, False) as work:
        reports = [work.validate(each) for each in precisions]
        runs = any(not report.candidate.emulated for report in reports)
        timings = work.benchmark(precisions) if runs else None
        network = work.network_sha256()
    path = baseline or Path("baselines", f"{settings.name}.json")
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


@app.command()
def train(
    config: ConfigOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: the config's network.weights.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train the network from scratch and write its weights with a card."""
    from pipeline.stages.train import train as train_network

    settings = _load(config, overrides)
    target = _required(output or settings.network.weights, "-o WEIGHTS.safetensors")
    result = train_network(settings, target)
    if json:
        print_json(result)
        return
    rows = [(one.name, f"{iou:.4f}") for one, iou in zip(settings.data.classes, result.class_iou, strict=True)]
    print_table(("class", "IoU, validation images"), rows, file=sys.stderr)
    print(f"{target}: mIoU {result.mean_iou_half:.4f} in {result.seconds:.0f} s")
    _suggest("run", config, BUILD, overrides)


# ---------------------------------------------------------------------- models in use


@app.command()
def package(
    output: Annotated[Path, typer.Option("-o", "--output", help="Model repository, or MODEL.zip.")],
    format: Annotated[
        Literal["triton", "zip"], typer.Option(help="A Triton model repository, or an archive with its own runner.")
    ],
    precision: PrecisionsOption = None,
    platform: Annotated[
        Literal["auto", "tensorrt_plan", "onnxruntime_onnx", "python"],
        typer.Option(help="What runs it in Triton; auto: TensorRT where there is its engine, else ONNX Runtime."),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="The model's name in Triton.", show_default="<config>_<precision>")
    ] = None,
    model_version: Annotated[int | None, typer.Option(help="Its version there.", show_default="the next one")] = None,
    instances: Annotated[int, typer.Option(help="That Triton runs at a time, on each GPU or on the CPU.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the version or archive that exists.")] = False,
    config: ConfigOption = None,
    backend: BackendOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Validated models for a server, or for machines without this program."""
    from pipeline.errors import ConfigError
    from pipeline.serving.repository import require_schema
    from pipeline.stages.package import package_archive, package_triton

    if format == "triton":
        require_schema()  # before the first minute of work
    settings = _load(config, overrides, backend)
    precisions = _precisions(settings, precision)
    if precisions[1:] and (format == "zip" or name or model_version):
        raise ConfigError("one precision goes into one archive, or model of a name", expected="one -p, such as -p fp16")
    with _run(settings, build_dir, force) as work:
        for judged in [work.judged(each) for each in precisions]:
            if format == "zip":
                package_archive(judged, output, overwrite=overwrite)
                print(output)
                continue
            made = package_triton(
                judged,
                output,
                platform=platform,
                name=name,
                version=model_version,
                instances=instances,
                overwrite=overwrite,
            )
            print(made)


@weights_app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(help="A.pth, .pt, .safetensors or .wts.")],
    target: Annotated[Path, typer.Argument(help="B.wts, .safetensors, .pth or .pt; the endings say the formats.")],
    like: Annotated[
        Path | None, typer.Option(help="Weights of the same network, for the shapes that .wts does not hold.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Or a configuration that names the network.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write the weights of one file into another, bit by bit."""
    from pipeline.stages.weights import convert_weights as convert

    network = _load(config, overrides).network if config else None
    target = _own_file(target, [source, *([like] if like else [])])
    with working("converting"):
        count = convert(source, target, like, network)
    if json:
        print_json({"file": str(target), "tensors": count})
    else:
        print(f"{target}: {count} tensors")


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="MODEL.engine or MODEL.onnx; with --server its NAME there, or NAME/VERSION.")
    ],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, globs, frame_%04d.png, TIFF stacks, videos.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for masks, overlays, predictions.jsonl.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that exist.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a broken run: leave out what is done.")] = False,
    probabilities: Annotated[
        Literal["png", "npy"] | None, typer.Option(help="Write them too: 16-bit png, one a class, or float32 npy.")
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Write colour overlays.")] = True,
    batch: Annotated[int | None, typer.Option(help="Images that are fed at once, where the model allows.")] = None,
    tile: Annotated[int | None, typer.Option(help="Longest side that a model of free sizes is fed, in pixels.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Pixels that neighbouring tiles share.")] = None,
    streams: Annotated[
        int | None, typer.Option(help="Batches that an engine works on, or requests that a server is sent, at a time.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="ONNX file or manifest that says preprocessing and classes.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load an engine without its manifest's approval.")] = False,
    server: Annotated[
        str | None, typer.Option(help="Predict there: grpc://HOST:PORT or http://HOST:PORT, of Triton.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that a request to the server may take.", show_default="60")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("-p", "--precision", help="Of an engine of MODEL.onnx for the GPU there is, built on first use."),
    ] = None,
    calibration_cache: Annotated[Path | None, typer.Option(help="TensorRT calibration cache, for -p int8.")] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Folder that keeps engines of -p.", show_default="engines beside MODEL.onnx")
    ] = None,
    distributed: DistributedOption = False,
    address: AddressOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Images in, masks out."""
    from pipeline.errors import ConfigError, DataError
    from pipeline.predictor import Predictor
    from pipeline.stages.predict import Wanted
    from pipeline.stages.predict import predict as predict_images

    if timeout is not None and server is None:
        raise ConfigError("--timeout belongs to --server", fix="leave it out, or add --server")
    if server is not None and (distributed or precision):
        raise ConfigError("--server has workers and engines of its own", fix="leave --distributed and -p out")
    if distributed:  # workers may have another working folder
        model, output, card = model.absolute(), output.absolute(), card and card.absolute()
        inputs = [str(Path(one).absolute()) for one in inputs]
    options: dict[str, Any] = {"trust": trust, "batch": batch, "tile": tile, "overlap": overlap, "streams": streams}
    source = model if server is None else _served(server, model, timeout)
    opens, identity = functools.partial(Predictor, source, card, **options), ""
    if precision:
        kept = _gpu_engines(model, precision, calibration_cache, engines)
        opens, identity = functools.partial(kept.predictor, card, **options), kept.identity
    wanted = Wanted(output, overwrite, resume, overlays, probabilities)
    with _fleet(distributed, address, workers) as fleet, contextlib.ExitStack() as stack:
        on_cpu = not precision and model.suffix == ".onnx"
        if fleet is not None and not on_cpu:
            predictor: Masks = stack.enter_context(fleet.host_predictor(opens))
        else:
            predictor = stack.enter_context(opens())
        outcome = predict_images(predictor, identity or predictor.sha256, inputs, wanted, fleet)
    if json:
        print_json(outcome)
    else:
        earlier = f", {outcome.already} done before" if outcome.already else ""
        print(f"{outcome.done} mask(s) in {output}{earlier}")
    if outcome.failed:
        raise DataError(
            f"{outcome.failed} image(s) could not be read, the first: {outcome.first_failure}",
            fix="see the lines with an error in predictions.jsonl; --resume tries them again",
        )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An .onnx, .engine, .cache, .json or .pbtxt file.")],
    json: JsonOption = False,
) -> None:
    """Say what a file holds; of an engine also where its time goes, where it runs."""
    from pipeline.inspection import inspect_file

    facts = inspect_file(file)
    account = None if json else facts.pop("account", None)
    print_facts(facts, json)
    if account:
        print_account(account)


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what this machine can do, why not, and what to install."""
    from pipeline.doctor import examine_machine

    facts = examine_machine()
    if json:
        print_json(facts)
    else:
        print_abilities(facts)
        suggest("unet-trt", "init", "CHECKPOINT", "IMAGES")


# ---------------------------------------------------------------------- helpers


def _load(
    config: Path | None, overrides: Sequence[str] | None, backend: str | None = None, route: str | None = None
) -> Config:
    from pipeline.config import load_config

    extra = [f"engine.{key}={value}" for key, value in (("backend", backend), ("route", route)) if value]
    return load_config(_required(config, "-c CONFIG"), [*(overrides or []), *extra])


def _run(config: Config, build: Path, force: bool, fleet: Fleet | None = None) -> Run:
    from pipeline.run import Run

    return Run(config, build.absolute() if fleet else build, force=force, fleet=fleet)


@contextlib.contextmanager
def _fleet(distributed: bool, address: str | None, workers: int | None) -> Iterator[Fleet | None]:
    """Ray's workers where they are asked for."""
    if distributed:
        from pipeline.fleet.fleet import Fleet

        with Fleet(address, workers=workers) as fleet:
            yield fleet
        return
    if address is not None or workers is not None:
        from pipeline.errors import ConfigError

        raise ConfigError(
            f"--{'workers' if address is None else 'address'} is for a run on Ray", fix="add --distributed"
        )
    yield None


def _gpu_engines(model: Path, precisions: Sequence[str], cache: Path | None, folder: Path | None) -> GpuEngines:
    from pipeline.config import EngineConfig
    from pipeline.errors import ConfigError
    from pipeline.gpu_engines import GpuEngines

    chosen, *others = (_precision(name) for name in precisions)
    if model.suffix != ".onnx" or chosen == "mixed" or others:
        raise ConfigError(
            f"-p {' -p '.join(precisions)} builds no engine of {model}",
            expected="one of fp32, fp16 and int8, and a clean ONNX file",
            fix="leave -p out for an engine, which has a precision",
        )
    kept = (folder or model.parent / "engines").absolute()
    return GpuEngines(model.absolute(), chosen, EngineConfig(), cache and cache.absolute(), kept)


def _suggest(command: str, config: Path | None, build: Path, overrides: Sequence[str] | None, *more: str) -> None:
    """The next command on the same configuration, in the same folder, with the same overrides."""
    folder = ["--build-dir", build] if build != BUILD else []
    sets = [part for override in overrides or () for part in ("--set", override)]
    suggest("unet-trt", command, "-c", config, *folder, *sets, *more)


def _suggest_predicting(work: Run, precisions: Sequence[Precision]) -> None:
    """With the engine of the last precision that runs here, or with the clean graph."""
    if work.config.task != "segmentation":
        return
    engines = [work.engine(each) / "model.engine" for each in precisions if not work.validate(each).candidate.emulated]
    suggest("unet-trt", "predict", engines[-1] if engines else work.clean(), "IMAGES", "-o", "masks/")


def _chosen(precision: Sequence[str] | None, backend: str | None, route: str | None = None) -> list[str]:
    """The options of these again; only ``engine`` has one for the route."""
    return [
        *(part for each in precision or () for part in ("-p", each)),
        *(["--backend", backend] if backend else []),
        *(["--set", f"engine.route={route}"] if route else []),
    ]


def _built(folder: Path) -> dict[str, Any]:
    """What lies in an engine's folder, for programs."""
    import json

    files = {name: folder / file for name, file in (("engine", "model.engine"), ("onnx", "model.onnx"))}
    manifest = folder / "manifest.json"
    return {
        **{name: str(file) if file.is_file() else None for name, file in files.items()},
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None,
    }


def _precision(name: str) -> Precision:
    from pipeline.config import ALL_PRECISIONS
    from pipeline.errors import ConfigError
    from pipeline.slips import nearest

    for precision in ALL_PRECISIONS:
        if precision == name:
            return precision
    near = nearest(name, ALL_PRECISIONS)
    raise ConfigError(f"there is no precision {name!r}{near}", expected=", ".join(ALL_PRECISIONS), got=name)


def _precisions(config: Config, names: Sequence[str] | None) -> tuple[Precision, ...]:
    return tuple(dict.fromkeys(_precision(name) for name in names)) if names else config.engine.precisions


def _without_config(model: Path, config: Path | None, overrides: list[str] | None) -> None:
    """A model file is worked on without a configuration: one beside it would be ignored."""
    from pipeline.errors import ConfigError

    if config is not None or overrides:
        raise ConfigError(
            f"the model file {model} comes with a configuration",
            expected="either the file or -c CONFIG; --set belongs to the latter",
            got=" ".join(["-c"] * (config is not None) + ["--set"] * bool(overrides)),
            fix="write a configuration with network.onnx, or leave these options out",
        )


def _profile(text: str) -> tuple[str, dict[str, str]]:
    from pipeline.errors import ConfigError

    axis, _, sizes = text.partition("=")
    values = sizes.split(":")
    if len(values) != len(PROFILE_SIZES):
        raise ConfigError("--profile needs three sizes of an axis", expected="such as batch=1:1:5", got=text)
    return axis, dict(zip(PROFILE_SIZES, values, strict=True))


def _required(value: Any, option: str) -> Any:
    from pipeline.errors import ConfigError

    if value is None:
        raise ConfigError(f"{option} is missing", expected=option, fix="see --help of this command")
    return value


def _section(model: Any, values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from pipeline.errors import ConfigError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # What forbids a combination of keys has no place of its own.
        place, got = ([str(first["loc"][0])], str(first["input"])) if first["loc"] else ([], "")
        raise ConfigError(": ".join([*place, first["msg"].removeprefix("Value error, ")]), got=got) from error


def _served(server: str, model: Path, timeout: float | None) -> RemoteRunner:
    from pipeline.backends.remote import TIMEOUT, RemoteRunner

    return RemoteRunner(f"{server.rstrip('/')}/{model}", TIMEOUT if timeout is None else timeout)


def _card_of(model: Path) -> Any:
    from pipeline.opening import read_facts, required_card

    return required_card(read_facts(model).card, model)


def _validate_files(
    model: Path, engine: Path, images: Path, labels: Path | None, output: Path, json: bool, fleet: Fleet | None
) -> None:
    from pipeline.artifacts import replaced_folder
    from pipeline.backends.onnxruntime import OnnxRuntimeRunner
    from pipeline.config import ValidateConfig
    from pipeline.data.dataset import image_folder
    from pipeline.errors import CheckFailed
    from pipeline.opening import describe_candidate, open_model
    from pipeline.presenting import CHECK_HEADINGS, VERDICT_HEADINGS, check_row, figure_table, verdict_row
    from pipeline.stages.validate import validate as judge

    output = _own_folder(output, [model, engine, images, *([labels] if labels else [])])
    card = _card_of(model)
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
        print_table(VERDICT_HEADINGS, [verdict_row(verdict)])
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


def _own_file(output: Path, inputs: Sequence[Path]) -> Path:
    """The file, where it would take the place of no folder and of nothing that it is made from."""
    from pipeline.errors import BuildFolderError

    if output.is_dir():
        raise BuildFolderError(f"{output} is a folder", expected="a file to write", fix="name a file with -o")
    for path in inputs:
        if path.resolve() == output.resolve():
            raise BuildFolderError(f"{output} would overwrite what it is made from", fix="choose another with -o")
    return output


def _print_verdict(work: Run, precisions: Sequence[Precision], page: Path | None, json: bool) -> None:
    from pipeline.presenting import VERDICT_HEADINGS, figure_table, verdict_row

    reports = [work.validate(precision) for precision in precisions]
    if json:
        print_json(reports)
        return
    print_table(VERDICT_HEADINGS, [verdict_row(report) for report in reports])
    print_table(*figure_table(reports))
    if any(r.candidate.emulated for r in reports):
        print(
            "emulated: no engine ran on this machine; its typed graph ran on ONNX Runtime instead (see unet-trt doctor)"
        )
    if page is not None:
        print(f"report: {page}")
        if any(report.pictures for report in reports):
            print(f"masks:  {work.folder / 'validate'}/<precision>/overlays")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # CPython 3.10 cannot subscript it
    """Writes to what is ``sys.stderr`` at the time: bars put themselves there, so that lines come above them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


def _set_up_logging(debug: bool, quiet: bool) -> None:
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s" if debug else "%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
