"""Commands that put models to use: package, predict."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.arguments import chosen_precisions, load_settings, open_fleet, open_run, precision_named
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
    SetOption,
    WorkersOption,
)
from pipeline.printing import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.backends.remote import RemoteRunner
    from pipeline.gpu_engines import GpuEngines
    from pipeline.stages.predict import Masks


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
    settings = load_settings(config, overrides, backend)
    precisions = chosen_precisions(settings, precision)
    if precisions[1:] and (format == "zip" or name or model_version):
        raise ConfigError("one precision goes into one archive, or model of a name", expected="one -p, such as -p fp16")
    with open_run(settings, build_dir, force) as work:
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
    processes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="That decode and encode; 0: threads alone.",
            show_default="one a core, up to 16, with an engine and 1000 images or more",
        ),
    ] = None,
    distributed: DistributedOption = False,
    address: AddressOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Images in, masks out."""
    from pipeline.errors import ConfigError, DataError
    from pipeline.predictor import Predictor
    from pipeline.stages.predict import Wanted, helpers_for
    from pipeline.stages.predict import predict as predict_images

    if timeout is not None and server is None:
        raise ConfigError("--timeout belongs to --server", fix="leave it out, or add --server")
    if server is not None and (distributed or precision):
        raise ConfigError("--server has workers and engines of its own", fix="leave --distributed and -p out")
    if distributed and processes is not None:
        raise ConfigError("--distributed has workers of its own", fix="leave --processes out")
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
    with open_fleet(distributed, address, workers) as fleet, contextlib.ExitStack() as stack:
        on_cpu = not precision and model.suffix == ".onnx"
        helpers = None
        if processes is not None or not (on_cpu or server or distributed):
            helpers = helpers_for(inputs, output, processes)
            if helpers is not None:  # they start while the model is loaded
                stack.enter_context(helpers)
        if fleet is not None and not on_cpu:
            predictor: Masks = stack.enter_context(fleet.host_predictor(opens))
        else:
            predictor = stack.enter_context(opens())
        outcome = predict_images(predictor, identity or predictor.sha256, inputs, wanted, fleet, helpers)
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


def _served(server: str, model: Path, timeout: float | None) -> RemoteRunner:
    from pipeline.backends.remote import TIMEOUT, RemoteRunner

    return RemoteRunner(f"{server.rstrip('/')}/{model}", TIMEOUT if timeout is None else timeout)


def _gpu_engines(model: Path, precisions: Sequence[str], cache: Path | None, folder: Path | None) -> GpuEngines:
    from pipeline.config import EngineConfig
    from pipeline.errors import ConfigError
    from pipeline.gpu_engines import GpuEngines

    chosen, *others = (precision_named(name) for name in precisions)
    if model.suffix != ".onnx" or chosen == "mixed" or others:
        raise ConfigError(
            f"-p {' -p '.join(precisions)} builds no engine of {model}",
            expected="one of fp32, fp16 and int8, and a clean ONNX file",
            fix="leave -p out for an engine, which has a precision",
        )
    kept = (folder or model.parent / "engines").absolute()
    return GpuEngines(model.absolute(), chosen, EngineConfig(), cache and cache.absolute(), kept)
