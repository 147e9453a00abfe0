"""Building engines: what TensorRT and TensorRT-RTX share, over the API module ``trt`` of either.

What a library offers is read off the library (``hasattr``), never off its version.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends import cuda
from pipeline.backends.base import BuildRequest, BuildResult
from pipeline.backends.building import interruptible, watched
from pipeline.backends.options import chosen, configure
from pipeline.backends.runner import EngineRunner
from pipeline.backends.timing import read_timing_cache, set_aside, write_timing_cache
from pipeline.backends.trt_api import DTYPES, collected, errors_of, logger, named_shape
from pipeline.errors import EngineError, ModelError, PipelineError, UnsupportedError
from pipeline.graph.findings import refusals
from pipeline.graph.io import model_inputs, model_outputs

if TYPE_CHECKING:
    import tensorrt

    from pipeline.backends.api_types import Api

    Adjust = Callable[
        [
            tensorrt.Builder,
            tensorrt.INetworkDefinition,
            tensorrt.IBuilderConfig,
            tensorrt.IOptimizationProfile | None,
        ],
        None,
    ]

__all__ = ["EngineRunner", "RefusedNode", "build", "parse", "read", "set_flag", "strongly_typed_offered"]

log = logging.getLogger(__name__)

SHOWN_ERRORS = 6
NO_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|could not be allocated", re.IGNORECASE)
REQUESTED_BYTES = re.compile(r"requested (?:size(?: was| of)?|amount of GPU memory) \(?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class RefusedNode:
    """A node that the parser refuses; ``node`` is its name, else its index, and empty where the model is at fault."""

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node} ({self.op or 'operator unknown'})" if self.node else "the model"
        return f"{where}: {self.reason}"


def strongly_typed_offered(trt: Any) -> bool:
    """Whether networks can take all their types from the graph."""
    return hasattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED")


def create_builder(trt: Api) -> tensorrt.Builder:
    """A builder of the library.

    Raises:
        UnsupportedError: TensorRT makes none here, because of the driver or the GPU.
    """
    with interruptible(), collected(trt) as messages:
        try:
            return trt.Builder(logger(trt))
        except TypeError as error:  # pybind11's way of saying that the factory returned nothing
            raise UnsupportedError(
                f"{trt.__name__} {trt.__version__} cannot start on this machine: {_joined(messages)}",
                expected="an NVIDIA GPU and a driver that this TensorRT supports",
                fix="use such a machine, or --backend tensorrt-rtx, which builds without a GPU",
            ) from error


def create_network(trt: Api, builder: tensorrt.Builder, *, strongly_typed: bool) -> tensorrt.INetworkDefinition:
    """An empty network with an explicit batch dimension."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    wanted = ["EXPLICIT_BATCH", *(["STRONGLY_TYPED"] if strongly_typed else [])]
    return builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted if hasattr(flags, name)))


def read(trt: Api, network: tensorrt.INetworkDefinition, model: Path) -> tuple[RefusedNode, ...]:
    """Read an ONNX file, with its external data, into the network; what the parser refuses, empty where it reads all.

    Parsers up to TensorRT 8.6 stop at the first refusal; behind it the operators that they do not know are named too.
    """
    with interruptible(), collected(trt) as messages:
        parser = trt.OnnxParser(network, logger(trt))
        done = parser.parse_from_file(str(model))
    if done:
        return ()
    nodes = onnx.load(model, load_external_data=False).graph.node
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refused = [_refusal(error, nodes) for error in errors]
    if hasattr(parser, "supports_operator"):
        behind = 1 + max((error.node() for error in errors), default=-1)
        refused += [
            RefusedNode(node.name or str(index), node.op_type, "the parser does not know this operator")
            for index, node in enumerate(nodes[behind:], behind)
            if node.domain in ("", "ai.onnx") and not parser.supports_operator(node.op_type)
        ]
    return tuple(refused) or (RefusedNode("", "", _joined(messages)),)


def parse(trt: Api, network: tensorrt.INetworkDefinition, model: Path) -> None:
    """Read an ONNX file, with its external data, into the network.

    Raises:
        EngineError: naming every node that TensorRT refuses, its operator, the reason, and a way out if one is known.
    """
    refused = read(trt, network, model)
    if not refused:
        return
    raise EngineError(
        f"{trt.__name__} {trt.__version__} cannot read the ONNX graph: {'; '.join(map(str, refused))}",
        expected="a graph of operators that TensorRT's ONNX parser supports",
        fix=_ways_out(model, {node.node for node in refused})
        or "change the network where the node is made, or export it differently, and clean it again",
    )


def build(
    trt: Api,
    request: BuildRequest,
    *,
    strongly_typed: bool,
    adjust: Adjust | None = None,
    timing_owner: str | None = None,
) -> BuildResult:
    """Parse (or define), configure and build.

    Args:
        adjust: called with the builder, the network, the config and the profile (None: static) before the build,
            for what one library alone has.
        timing_owner: library version, GPU and driver, to which a timing cache is bound; None to build without one.

    Raises:
        EngineError: a refused node, an impossible profile, a build that TensorRT gives up.
        UnsupportedError: this machine cannot build.
    """
    start = time.perf_counter()
    builder = create_builder(trt)
    network = create_network(trt, builder, strongly_typed=strongly_typed)
    kept = None
    if request.define is None:
        parse(trt, network, request.model)
    else:
        kept = request.define(trt, network)
    if request.shown:
        show(network, request.shown)
    inputs, outputs = network_specs(network, request.model)
    config = builder.create_builder_config()
    configure(trt, builder, config, request.config)
    profile = add_profiles(trt, builder, config, network, request.profiles)
    if adjust is not None:
        adjust(builder, network, config, profile)
    notes: list[str] = []
    timings = "none"
    path = request.timing_cache if timing_owner is not None and hasattr(config, "create_timing_cache") else None
    if path is not None and timing_owner is not None:
        data = read_timing_cache(path, timing_owner, notes)
        accepted, said = _attach_timing_cache(trt, config, data)
        if data and not accepted:
            set_aside(path, f"TensorRT refuses it: {said}", notes)
            data = b""
            accepted, said = _attach_timing_cache(trt, config, data)
        if accepted:
            timings = "warm" if data else "cold"
        if said:
            notes.append(f"TensorRT said of the timing cache: {said}")
    plan = serialize(trt, builder, network, config, notes, f"building {request.precision}", chosen(request.config))
    del kept  # TensorRT has read the weights where they lay
    if path is not None and timing_owner is not None and timings != "none":
        write_timing_cache(path, timing_owner, bytes(config.get_timing_cache().serialize()), notes)
    return BuildResult(plan, inputs, outputs, time.perf_counter() - start, timings, tuple(notes))


def show(network: tensorrt.INetworkDefinition, names: Sequence[str]) -> None:
    """Make tensors outputs of the network, beside those it has.

    Raises:
        EngineError: the network has no tensor of that name.
    """
    known = {network.get_output(index).name for index in range(network.num_outputs)}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    tensors = {tensor.name: tensor for each in layers for tensor in map(each.get_output, range(each.num_outputs))}
    for name in names:
        if name not in tensors:
            raise EngineError(f"the network has no tensor {name}", got=f"{len(tensors)} others")
        if name not in known:
            network.mark_output(tensors[name])


def serialize(
    trt: Api,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    notes: list[str],
    description: str = "building",
    options: Sequence[str] = (),
) -> bytes:
    """Build the network: the engine's bytes. Errors that TensorRT recovered from are logged and added to ``notes``.

    Args:
        description: what the progress bar says.
        options: of the configuration that may have to do with a failure, for its message.

    Raises:
        EngineError: TensorRT gave up, with the errors that it logged.
        KeyboardInterrupt: Ctrl-C, once TensorRT has stopped.
    """
    with interruptible() as stop, collected(trt) as messages, watched(trt, config, description, stop):
        plan: tensorrt.IHostMemory | None = builder.build_serialized_network(network, config)
    if plan is None:
        raise _given_up(trt, messages, options)
    for text in errors_of(messages):
        notes.append(f"TensorRT reported and recovered from: {text}")
        log.warning("%s", notes[-1])
    return bytes(plan)  # type: ignore[arg-type]  # a buffer, which the stubs do not say


def network_specs(
    network: tensorrt.INetworkDefinition, model: Path
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as TensorRT sees them, dynamic axes named as in the ONNX file.

    Raises:
        EngineError: a data type that no numpy array has.
    """
    proto = onnx.load(model, load_external_data=False)
    named = {spec.name: spec.shape for spec in (*model_inputs(proto), *model_outputs(proto))}
    return (
        tuple(_spec(network.get_input(index), named) for index in range(network.num_inputs)),
        tuple(_spec(network.get_output(index), named) for index in range(network.num_outputs)),
    )


def add_profiles(
    trt: Api,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    profiles: Mapping[str, Profile],
) -> tensorrt.IOptimizationProfile | None:
    """Give the config one optimization profile for all dynamic inputs; None for a static network.

    Raises:
        EngineError: a dynamic input without a profile, or a profile that its input's shape excludes.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in _shape(tensor)]
    if not dynamic:
        return None
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        shape = _shape(tensor)
        chosen = profiles.get(tensor.name)
        if chosen is None:
            raise EngineError(
                f"input {tensor.name} has dynamic axes and no profile",
                expected="min, opt and max of every dynamic axis",
                got=f"shape {shape}",
                fix="give engine.profile.batch (height, width), or export without dynamic axes",
            )
        for sizes in (chosen.min, chosen.opt, chosen.max):
            if len(sizes) != len(shape) or any(have not in (-1, want) for have, want in zip(shape, sizes, strict=True)):
                raise EngineError(
                    f"the profile of input {tensor.name} does not fit its shape",
                    expected=f"sizes that fit {shape}, where -1 is free",
                    got=str(sizes),
                    fix="correct engine.profile",
                )
        profile.set_shape(tensor.name, chosen.min, chosen.opt, chosen.max)  # type: ignore[arg-type]  # makes Dims
    with collected(trt) as messages:
        added = config.add_optimization_profile(profile)
    if added < 0:
        raise EngineError(
            f"TensorRT refuses the profile of {', '.join(tensor.name for tensor in dynamic)}: {_joined(messages)}",
            fix="correct engine.profile",
        )
    return profile


def set_flag(trt: Api, config: tensorrt.IBuilderConfig, name: str, *, on: bool = True) -> None:
    """Set or clear a builder flag by name.

    Raises:
        EngineError: this library has no such flag.
    """
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} has no builder flag {name}",
            expected="a typed graph for this precision",
            fix="use route: explicit",
        )
    (config.set_flag if on else config.clear_flag)(flag)


def _attach_timing_cache(trt: Api, config: tensorrt.IBuilderConfig, data: bytes) -> tuple[bool, str]:
    """Whether TensorRT took the cache, and what it said."""
    with collected(trt) as messages:
        cache = config.create_timing_cache(data)
        accepted = cache is not None and bool(config.set_timing_cache(cache, False))
    return accepted, _joined(messages) if messages else ""


def _shape(tensor: tensorrt.ITensor) -> tuple[int, ...]:
    return tuple(tensor.shape)  # type: ignore[arg-type]  # a sequence, which the stubs do not say


def _spec(tensor: tensorrt.ITensor, named: Mapping[str, tuple[int | str, ...]]) -> TensorSpec:
    kind = tensor.dtype.name
    if kind not in DTYPES:
        raise EngineError(
            f"tensor {tensor.name} is {kind}, which no numpy array holds",
            expected=", ".join(DTYPES.values()),
            fix="cast it in the graph",
        )
    return TensorSpec(tensor.name, named_shape(tensor.name, _shape(tensor), named.get(tensor.name, ())), DTYPES[kind])


def _refusal(error: tensorrt.ParserError, nodes: Sequence[onnx.NodeProto]) -> RefusedNode:
    index = error.node()
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    if 0 <= index < len(nodes):
        name, operator = name or nodes[index].name, operator or nodes[index].op_type
    where = (name or str(index), operator) if index >= 0 else ("", "")
    said = error.desc().strip()
    reason = "not supported" if said in ("", "false") else said  # some checks are a bare assertion
    return RefusedNode(*where, f"{reason} [{error.func()}]")


def _ways_out(model: Path, refused: set[str]) -> str:
    """What to do about the refused nodes, as far as the reasons are known; empty where none is."""
    with contextlib.suppress(ModelError):
        found = [item for item in refusals(onnx.load(model)) if item.node in refused]
        return "; ".join(dict.fromkeys(f"{item.node}: {item.way_out}" for item in found))
    return ""


def _given_up(trt: Api, messages: list[str], options: Sequence[str]) -> EngineError:
    """The error of a build that came to nothing; for lack of memory with how much was wanted and how much there is."""
    problem = f"{trt.__name__} {trt.__version__} cannot build the engine: {_joined(messages)}"
    if any(NO_MEMORY.search(text) for text in messages):
        asked = max((int(size) for text in messages for size in REQUESTED_BYTES.findall(text)), default=0)
        return EngineError(
            problem,
            expected=f"{asked / 2**20:,.0f} MiB of GPU memory at once" if asked else "more GPU memory",
            got=_memory(),
            fix="free GPU memory, or use a smaller batch, smaller sizes in engine.profile, or a smaller "
            "engine.workspace_mib",
        )
    suspects = f", or without {' and '.join(options)}" if options else ""
    return EngineError(problem, fix=f"see the reason above; try another engine.optimization_level{suspects}")


def _memory() -> str:
    try:
        free, total = cuda.free_memory()
    except PipelineError:
        return ""
    return f"{free / 2**20:,.0f} MiB free of {total / 2**20:,.0f}"


def _joined(messages: list[str]) -> str:
    """The errors in one line, or the warnings where there are none."""
    texts = errors_of(messages) or [text[3:].strip() for text in messages]
    shown = list(dict.fromkeys(" ".join(text.split()) for text in texts))[:SHOWN_ERRORS]
    return "; ".join(shown) or "it gave no reason"
