"""Commands from the network to its engine: export, clean, calibrate, engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli.arguments import (
    card_of,
    chosen_precisions,
    load_settings,
    open_fleet,
    open_run,
    own_file,
    precision_named,
    required,
    section_of,
    without_config,
)
from pipeline.cli.endings import same_choice, suggest_next
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
    RouteOption,
    SetOption,
    WorkersOption,
)
from pipeline.printing import print_calibration, print_cleaning, print_engines, print_json, print_mix, suggest
from pipeline.progress import working

PROFILE_SIZES = ("min", "opt", "max")


def export(
    config: ConfigOption = None,
    build_dir: BuildOption = BUILD,
    overrides: SetOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Torch network to ONNX."""
    with open_run(load_settings(config, overrides), build_dir, force) as work:
        model = work.export()
    if json:
        print(model.with_name("report.json").read_text(encoding="utf-8"))
        return
    print(model)
    suggest_next("clean", config, build_dir, overrides)


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
        with open_run(load_settings(config, chosen), build_dir, force) as work:
            output = work.clean()
            result = from_json(CleaningReport, work.folder / "clean" / "report.json")
    else:
        without_config(model, config, overrides)
        output = required(output, "-o CLEAN.onnx")
        promised = ProfileRange(min=multiple_of, opt=4 * multiple_of, max=8 * multiple_of, multiple_of=multiple_of)
        profiles = {"height": promised, "width": promised} if multiple_of > 1 else {}
        settings = section_of(CleanConfig, given)
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
        suggest_next("calibrate", config, build_dir, overrides)
    else:
        suggest("unet-trt", "calibrate", output, "--images", "DIR", "-o", "calibration.cache")


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
        settings = load_settings(config, chosen)
        with open_fleet(distributed, address, workers) as fleet, open_run(settings, build_dir, force, fleet) as work:
            target = work.calibrate()
        result = from_json(CalibrationReport, target.with_name("report.json"))
    else:
        without_config(model, config, overrides)
        card = card_of(model)
        dataset = image_folder(required(images, "--images DIR").absolute(), card.preprocessing.channels)
        inputs = [*model_files(model), *itertools.chain.from_iterable(dataset.files.values())]
        target = own_file(required(output, "-o calibration.cache"), inputs)
        section = section_of(CalibrateConfig, {**given, "images": len(dataset)})
        report = target.with_name(f"{target.name}.json")
        with open_fleet(distributed, address, workers) as fleet:
            result = calibrate_file(model.absolute(), dataset, section, card.preprocessing, target, report, fleet=fleet)
    if json:
        print_json(result)
        return
    print_calibration(result)
    print(target)
    if model is None:
        suggest_next("engine", config, build_dir, overrides, "-p", "int8")
    else:
        more = ("--calibration-cache", target, "-o", "model.engine")
        suggest("unet-trt", "engine", model, "-p", "int8", *more)


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
        settings = load_settings(config, overrides, backend, route)
        built = {}
        with open_run(settings, build_dir, force) as work:
            for each in chosen_precisions(settings, precision):
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
        suggest_next("validate", config, build_dir, overrides, *same_choice(precision, backend, route))
        return
    from pipeline.artifacts import sha256_file
    from pipeline.calibration.table import read_cache
    from pipeline.config import EngineConfig
    from pipeline.errors import ConfigError
    from pipeline.graph.io import load_model, model_files, read_card
    from pipeline.stages.engine import build_engine_file

    without_config(model, config, overrides)
    (chosen, *others) = (precision_named(name) for name in required(precision, "-p PRECISION"))
    if others:
        raise ConfigError("one file is built at a time", expected="one -p", got=" ".join(precision or ()))
    if chosen == "mixed":
        raise ConfigError(
            "mixed precision is searched on images and labels, which a configuration names",
            expected="-c CONFIG -p mixed",
            got=str(model),
            fix="write a configuration with network.onnx; its mixed/config.yaml then names engine.exclude",
        )
    target = required(output, "-o model.engine")
    sizes = dict(map(_profile, profile or ()))
    settings_of_engine = section_of(
        EngineConfig, {"backend": backend or "auto", "route": route or "auto", "profile": sizes}
    )
    table = read_cache(calibration_cache) if calibration_cache else None
    cache_sha256 = sha256_file(calibration_cache) if calibration_cache else None
    card = read_card(load_model(model))
    target = own_file(target, [*model_files(model), *([calibration_cache] if calibration_cache else [])])
    with working(f"building {target.name}"):
        manifest = build_engine_file(model, chosen, settings_of_engine, table, cache_sha256, card, target)
    if json:
        print_json(manifest)
        return
    print(target)
    suggest("unet-trt", "validate", model, "--engine", target, "--images", "DIR", "--labels", "DIR")


def _built(folder: Path) -> dict[str, Any]:
    """What lies in an engine's folder, for programs."""
    import json

    files = {name: folder / file for name, file in (("engine", "model.engine"), ("onnx", "model.onnx"))}
    manifest = folder / "manifest.json"
    return {
        **{name: str(file) if file.is_file() else None for name, file in files.items()},
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None,
    }


def _profile(text: str) -> tuple[str, dict[str, str]]:
    from pipeline.errors import ConfigError

    axis, _, sizes = text.partition("=")
    values = sizes.split(":")
    if len(values) != len(PROFILE_SIZES):
        raise ConfigError("--profile needs three sizes of an axis", expected="such as batch=1:1:5", got=text)
    return axis, dict(zip(PROFILE_SIZES, values, strict=True))
