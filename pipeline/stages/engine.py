"""ONNX -> engine: choose builder and route, write the typed graph where the route needs one, build, write manifest."""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from pipeline.artifacts import (
    EngineManifest,
    ModelCard,
    Profile,
    TensorSpec,
    sha256_bytes,
    sha256_file,
    to_json,
    workshop,
    write_atomically,
)
from pipeline.backends.base import BuildRequest, Capabilities, RouteName
from pipeline.backends.options import recorded
from pipeline.backends.registry import resolve
from pipeline.backends.unet_definition import Quantization, UNetDefinition
from pipeline.calibration.table import CalibrationTable, check_table, renamed, some
from pipeline.config import QUANTIZED, Axis, EngineConfig, NetworkConfig, Precision, ProfileRange
from pipeline.errors import CalibrationError, ConfigError, EngineError, UnsupportedError
from pipeline.graph.fit import axis_sizes
from pipeline.graph.half import to_half
from pipeline.graph.io import load_model, model_inputs, save_model, sha256_model
from pipeline.graph.placement import (
    activation_tensors,
    implicit_ranges,
    quantizable,
    quantizable_tensors,
    shared_ranges,
    sites,
)
from pipeline.graph.promises import read_multiples, read_raw_names
from pipeline.graph.quantize import quantized_as, with_biases
from pipeline.graph.resampling import aligns_corners
from pipeline.graph.sparsity import sparse_convolutions
from pipeline.graph.writing import with_relus
from pipeline.unet import load_unet

log = logging.getLogger(__name__)

ENGINE, MANIFEST, TYPED, PARSED = "model.engine", "manifest.json", "model.onnx", "parsed.onnx"
IMAGE_RANK = 4
NCHW: dict[Axis, int] = {"batch": 0, "height": 2, "width": 3}
NHWC: dict[Axis, int] = {"batch": 0, "height": 1, "width": 2}
# What TensorRT's own caches also name: tensors that its parser makes.
PARSER_MADE = ("(Unnamed Layer", "ONNXTRT")


def build_engine(
    clean: Path,
    precision: Precision,
    config: EngineConfig,
    table: CalibrationTable | None,
    cache_sha256: str | None,
    card: ModelCard | None,
    folder: Path,
    timing_cache: Path | None,
    network: NetworkConfig | None = None,
    shown: tuple[str, ...] = (),
) -> EngineManifest | None:
    """Build one engine into a folder: ``model.engine``, ``manifest.json`` and, on the explicit route, ``model.onnx``.

    Args:
        clean: the clean FP32 graph.
        config: its ``exclude`` names what stays FP16 with INT8 and mixed, which differ in nothing else here.
        table, cache_sha256: the calibration, which INT8 and mixed need; other precisions ignore it.
        card: goes into the manifest.
        folder: made where missing; what lies there under these names is replaced.
        timing_cache: file to read and update; None, or ``config.timing_cache`` off, to build without.
        shown: tensors that the engine gives beside its outputs, see ``pipeline.drift``.
        network: whose weights ``config.source`` network-api defines the engine from; ``clean`` is of the same network.

    Returns:
        The manifest as written; None with backend onnxruntime, which has no engines: only the typed graph is written.

    Raises:
        CalibrationError: INT8 without a table, or with one of another graph.
        ConfigError: a profile for an axis that the model fixes, or none for one that it leaves free, or one with a
            size that the network cannot take.
        EngineError: the library refuses the graph.
        UnsupportedError: this machine cannot build such an engine.
    """
    if precision in QUANTIZED and table is None:
        raise CalibrationError(
            "INT8 needs a calibration table",
            expected="ranges of the activations",
            fix="calibrate first, or give a cache",
        )
    target = resolve(config.backend, precision, config.route)
    builder, route, known = target.builder, target.route, target.capabilities
    model = load_model(clean)
    profiles = make_profiles(model_inputs(model), config.profile)
    check_sizes(model, profiles)
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    half: tuple[str, ...] = ()
    built: Precision = precision
    if precision in QUANTIZED and table is not None:
        chosen = {node.output[0] for node in quantizable(model, config.exclude)}
        if not chosen:  # a builder that is told of INT8 asks for ranges, which nothing needs then
            built = "fp16"
            notes.append("engine.exclude leaves no convolution in INT8: built as FP16")
        elif route == "implicit":
            half = tuple(node.name for node in quantizable(model, ()) if node.output[0] not in chosen)
        table = _fitting(table, model, sha256_model(clean), route, config, notes)
        if table.biases and built in QUANTIZED:
            if config.source == "network-api":
                raise ConfigError(
                    "the calibration has refined biases, and engine.source: network-api takes those of the weights",
                    fix="use engine.source: onnx, or calibrate with calibrate.refine_steps 0",
                )
            notes.append(f"{len(chosen & set(table.biases))} convolutions have the calibration's refined biases")
    if config.sparsity:
        config = _with_sparsity(model, built, config, notes)
    source, given = clean, model
    if config.fuse_resize and precision != "fp32":
        model, table = _fused(model, table, notes)
    if route == "explicit":
        source = folder / TYPED
        save_model(_typed(model, built, config, table, known), source)
    else:
        if built in QUANTIZED and table is not None:
            model = with_biases(model, table.biases, config.exclude)
        if model is not given:
            source = folder / PARSED
            save_model(model, source)
    if builder is None:
        return None
    definition = None
    if config.source == "network-api":
        definition = _definition(network, model, built, config, table, route, known)
        if route == "explicit":
            notes.append(f"{TYPED} is the ONNX twin of the network that was defined layer by layer")
    request = BuildRequest(
        model=source,
        precision=built,
        route=route,
        config=config,
        table=table if route == "implicit" and built in QUANTIZED else None,
        half_nodes=half,
        profiles=profiles,
        timing_cache=timing_cache if config.timing_cache else None,
        define=definition,
        shown=shown,
    )
    log.info("building the %s engine with %s %s, %s route", precision, builder.name, known.version, route)
    result = builder.build(request)
    manifest = EngineManifest(
        engine_sha256=sha256_bytes(result.plan),
        onnx_sha256=sha256_file(clean),
        cache_sha256=cache_sha256 if precision in QUANTIZED else None,
        precision=precision,
        route=route,
        backend=builder.name,
        backend_version=known.version or "",
        # An engine built ahead of time is bound to its targets, not to the GPU that happens to be here.
        device=None if known.target_capabilities else known.device,
        target_capabilities=known.target_capabilities,
        inputs=result.inputs,
        outputs=result.outputs,
        profiles=profiles,
        card=card,
        build_seconds=round(result.seconds, 3),
        timing_cache=result.timing_cache,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        notes=(*notes, *result.notes, f"built on {platform.system()} {platform.machine()}"),
        options=recorded(config),
        multiples=read_multiples(model),
        aligns_corners=aligns_corners(model),
    )
    write_atomically(folder / ENGINE, result.plan)
    write_atomically(folder / MANIFEST, to_json(manifest))
    return manifest


def build_engine_file(
    model: Path,
    precision: Precision,
    config: EngineConfig,
    table: CalibrationTable | None,
    cache_sha256: str | None,
    card: ModelCard | None,
    target: Path,
) -> EngineManifest:
    """Build one engine to a file: ``target``, ``manifest.json`` beside it and, on the explicit route, the typed graph
    as ``<stem of target>.typed.onnx``. Of two processes at one folder the second waits for the first.

    Raises:
        EngineError: another engine lies in the folder, whose manifest this one's would replace.
        BuildFolderError: the folder is unwritable or full.
        UnsupportedError: backend onnxruntime, which builds no engines.
        As ``build_engine``; nothing is written then.
    """
    if config.backend == "onnxruntime":
        raise UnsupportedError("ONNX Runtime builds no engines", fix="use --backend auto, tensorrt or tensorrt-rtx")
    with workshop(target) as made:
        others = [path.name for path in target.parent.glob("*.engine") if path.name != target.name]
        if others and (target.parent / MANIFEST).exists():
            raise EngineError(
                f"the folder of {target} holds another engine, {others[0]}, which {MANIFEST} describes",
                expected="one engine in a folder",
                fix="choose another folder with -o",
            )
        manifest = build_engine(model, precision, config, table, cache_sha256, card, made, None)
        if manifest is None:
            raise UnsupportedError("no engine was built", fix="name a backend that builds engines")
        if (made / TYPED).exists():
            (made / TYPED).replace(target.with_name(f"{target.stem}.typed.onnx"))
        (made / ENGINE).replace(target)
        (made / MANIFEST).replace(target.parent / MANIFEST)
    return manifest


def make_profiles(inputs: tuple[TensorSpec, ...], ranges: Mapping[Axis, ProfileRange]) -> dict[str, Profile]:
    """Shapes for every input with dynamic axes; empty for a static model.

    Inputs are images: NCHW, or NHWC where they are uint8 with the channels last.

    Raises:
        ConfigError: a free axis without a range, or a range for an axis that no input leaves free.
    """
    profiles = {}
    used: set[Axis] = set()
    for spec in inputs:
        free = [axis for axis, size in enumerate(spec.shape) if isinstance(size, str)]
        if not free:
            continue
        places = {place: axis for axis, place in _layout(spec).items()} if len(spec.shape) == IMAGE_RANK else {}
        unnamed = [place for place in free if place not in places]
        if unnamed:
            raise ConfigError(
                f"axis {unnamed[0]} of input {spec.name} is dynamic, and no profile key describes it",
                expected="NCHW images whose batch, height or width vary",
                got=f"shape {spec.shape}",
                fix="export the model with that axis fixed",
            )
        missing = [places[place] for place in free if places[place] not in ranges]
        if missing:
            raise ConfigError(
                f"the {missing[0]} of input {spec.name} is dynamic, and engine.profile.{missing[0]} is not given",
                expected="min, opt and max",
                got=f"shape {spec.shape}",
                fix=f"give engine.profile.{missing[0]}, or export with a fixed {missing[0]}",
            )
        used.update(places[place] for place in free)
        low, best, high = (
            tuple(
                size if isinstance(size, int) else int(getattr(ranges[places[place]], bound))
                for place, size in enumerate(spec.shape)
            )
            for bound in ("min", "opt", "max")
        )
        profiles[spec.name] = Profile(low, best, high)
    unused = [axis for axis in ranges if axis not in used]
    if unused:
        raise ConfigError(
            f"engine.profile.{unused[0]} is given, but the model fixes its {unused[0]}",
            got="; ".join(f"{spec.name} {spec.shape}" for spec in inputs),
            fix=f"remove engine.profile.{unused[0]}, or export with export.dynamic: [{unused[0]}]",
        )
    return profiles


def check_sizes(model: onnx.ModelProto, profiles: Mapping[str, Profile]) -> None:
    """See to it that the network can take every size of the profiles; a graph that is not understood is let through.

    Raises:
        ConfigError: a size at which skip connections do not meet, or nothing is left of the image.
    """
    if not profiles:
        return
    known = axis_sizes(model)
    for spec in model_inputs(model):
        places = {place: axis for axis, place in _layout(spec).items()}
        for bound in ("min", "opt", "max") if spec.name in profiles else ():
            for place, size in enumerate(getattr(profiles[spec.name], bound)):
                problem = known[spec.name, place].problem(size) if (spec.name, place) in known else ""
                if problem:
                    near = " or ".join(map(str, known[spec.name, place].nearest(size)))
                    raise ConfigError(
                        f"the network takes no {places[place]} of {size}: {problem}",
                        expected=f"sizes such as {near}" if near else "sizes that the network was made for",
                        got=f"engine.profile.{places[place]}.{bound} {size}",
                        fix=f"set it to {near}" if near else "choose other sizes",
                    )


def _fitting(
    table: CalibrationTable,
    model: onnx.ModelProto,
    model_sha256: str,
    route: RouteName,
    config: EngineConfig,
    notes: list[str],
) -> CalibrationTable:
    """The table in the graph's names, without ranges of other tensors; what is remarkable goes into ``notes``.

    Raises:
        CalibrationError: the table was made for another graph, or lacks ranges.
    """
    report, known = table.report, activation_tensors(model)
    if report is not None and report.graph_sha256 != model_sha256:
        raise CalibrationError(
            "the calibration cache was made for another graph",
            expected=f"a graph with sha256 {report.graph_sha256[:12]}…, as the cache's report says",
            got=f"{model_sha256[:12]}…",
            fix="calibrate this graph, or give the graph that was calibrated",
        )
    if report is None and table.version is not None:
        notes.append(f"the calibration cache has no report; its header names TensorRT {table.version}")
    fitting = renamed(table, read_raw_names(model))
    changed = len(set(fitting.amax) - set(table.amax))
    if changed:
        notes.append(f"{changed} ranges of the calibration cache were found under the raw export's tensor names")
    # A range that is missing is no fallback on the implicit route: TensorRT 8.6.0 then computes wrong results.
    wanted = known if route == "implicit" else quantizable_tensors(model, config.exclude, config.qdq)
    unknown = set(check_table(fitting, wanted, known, "the calibration cache"))
    told = sorted(tensor for tensor in unknown if not tensor.startswith(PARSER_MADE))
    if told:
        notes.append(f"{len(told)} ranges of tensors that the graph does not have: {some(told)}")
    for note in notes:
        log.warning("%s", note)
    fitting = replace(fitting, amax={tensor: amax for tensor, amax in fitting.amax.items() if tensor not in unknown})
    return implicit_ranges(model, fitting) if route == "implicit" else fitting


def _fused(
    model: onnx.ModelProto, table: CalibrationTable | None, notes: list[str]
) -> tuple[onnx.ModelProto, CalibrationTable | None]:
    """The graph with ``engine.fuse_resize``, and the table with the ranges of what is new there."""
    fused, resized = with_relus(model)
    notes.append(f"engine.fuse_resize: {len(resized)} results of a Resize go through a Relu into their Concat")
    if not resized:
        log.warning("engine.fuse_resize changes nothing: no Concat reads a Resize of what cannot be below zero")
    if table is not None:
        fresh = {new: table.amax[old] for new, old in resized.items() if old in table.amax}
        table = replace(table, amax={**table.amax, **fresh})
    return fused, table


def _typed(
    model: onnx.ModelProto,
    precision: Precision,
    config: EngineConfig,
    table: CalibrationTable | None,
    known: Capabilities,
) -> onnx.ModelProto:
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_half(model)
    if table is None:
        raise CalibrationError("INT8 needs a calibration table", fix="calibrate first")
    # Without strong typing it is the FP16 flag that lets TensorRT choose the types of what stays unquantized.
    return quantized_as(model, table, config, half=known.strongly_typed)


def _definition(
    network: NetworkConfig | None,
    model: onnx.ModelProto,
    precision: Precision,
    config: EngineConfig,
    table: CalibrationTable | None,
    route: RouteName,
    known: Capabilities,
) -> UNetDefinition:
    """The network of ``source: network-api``, in the types that the ONNX route has; flags do the rest.

    Raises:
        ConfigError: no network, or another than the built-in UNet.
        ModelError: its weights cannot be read.
    """
    if network is None:
        raise ConfigError(
            "engine.source: network-api needs the network's weights", fix="use -c CONFIG, or engine.source: onnx"
        )
    quantization = None
    if precision in QUANTIZED and route == "explicit" and table is not None:
        ranges = shared_ranges(model, table, config.exclude) if config.qdq == "shared" else table
        quantization = Quantization(ranges, sites(model, config.exclude, config.qdq))
    half = precision != "fp32" and route == "explicit" and known.strongly_typed
    return UNetDefinition(load_unet(network), model, half=half, fold=precision in QUANTIZED, quantization=quantization)


def _layout(spec: TensorSpec) -> dict[Axis, int]:
    last = spec.shape[-1]
    return NHWC if spec.dtype == "uint8" and isinstance(last, int) and last in (1, 3) else NCHW


def _with_sparsity(model: onnx.ModelProto, built: Precision, config: EngineConfig, notes: list[str]) -> EngineConfig:
    """The settings with sparse kernels in INT8 alone: an FP16 engine with two of TensorRT 8.6.0's had other masks than
    its graph, and was no faster (docs/pruning.md)."""
    if built not in QUANTIZED:
        notes.append(f"engine.sparsity is for INT8: {built} has dense kernels")
        return config.model_copy(update={"sparsity": False})
    sparse, able = sparse_convolutions(model)
    notes.append(f"engine.sparsity: {sparse} of {able} convolutions have weights of which two in four are zero")
    if not able:
        log.warning("engine.sparsity finds no convolution of 32 or more input channels, for which sparse kernels are")
    elif not sparse:
        log.warning("%s, so it changes nothing; `unet-trt prune` makes such weights", notes[-1])
    elif len(quantizable(model, config.exclude)) < len(quantizable(model, ())):
        notes.append("convolutions that stay FP16 may get sparse kernels too: see that validation passes")
        log.warning("engine.sparsity: %s (docs/pruning.md)", notes[-1])
    return config
