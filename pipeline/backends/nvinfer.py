"""Building engines: what TensorRT and TensorRT-RTX share, over the API module ``trt`` of either.

What a library offers is read off the library (``hasattr``), never off its version.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pipeline.artifacts import Profile, TensorSpec
from pipeline.backends.base import BuildRequest, BuildResult
from pipeline.backends.runner import EngineRunner
from pipeline.backends.timing import read_timing_cache, set_aside, write_timing_cache
from pipeline.backends.trt_api import DTYPES, collected, errors_of, logger, named_shape
from pipeline.errors import EngineError, UnsupportedError
from pipeline.graph.io import model_inputs, model_outputs

__all__ = ["EngineRunner", "RefusedNode", "build", "parse", "read", "set_flag", "strongly_typed_offered"]

log = logging.getLogger(__name__)

# Libraries of their own, gigabytes large, that a UNet engine does not need.
FOREIGN_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")
SHOWN_ERRORS = 6
Adjust = Callable[[Any, Any, Any], None]


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


def create_builder(trt: Any) -> Any:
    """A builder of the library.

    Raises:
        UnsupportedError: TensorRT makes none here, because of the driver or the GPU.
    """
    with collected(trt) as messages:
        try:
            return trt.Builder(logger(trt))
        except TypeError as error:  # pybind11's way of saying that the factory returned nothing
            raise UnsupportedError(
                f"{trt.__name__} {trt.__version__} cannot start on this machine: {_joined(messages)}",
                expected="an NVIDIA GPU and a driver that this TensorRT supports",
                fix="use such a machine, or --backend tensorrt-rtx, which builds without a GPU",
            ) from error


def create_network(trt: Any, builder: Any, *, strongly_typed: bool) -> Any:
    """An empty network with an explicit batch dimension."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    wanted = ["EXPLICIT_BATCH", *(["STRONGLY_TYPED"] if strongly_typed else [])]
    return builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted if hasattr(flags, name)))


def read(trt: Any, network: Any, model: Path) -> tuple[RefusedNode, ...]:
    """Read an ONNX file, with its external data, into the network; what the parser refuses, empty where it reads all.

    Parsers up to TensorRT 8.6 stop at the first refusal; behind it the operators that they do not know are named too.
    """
    with collected(trt) as messages:
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


def parse(trt: Any, network: Any, model: Path) -> None:
    """Read an ONNX file, with its external data, into the network.

    Raises:
        EngineError: naming every node that TensorRT refuses, its operator and the reason.
    """
    refused = read(trt, network, model)
    if not refused:
        return
    raise EngineError(
        f"{trt.__name__} {trt.__version__} cannot read the ONNX graph: {'; '.join(map(str, refused))}",
        expected="a graph of operators that TensorRT's ONNX parser supports",
        fix="change the network where the node is made, or export it differently, and clean it again",
    )


def build(
    trt: Any,
    request: BuildRequest,
    *,
    strongly_typed: bool,
    adjust: Adjust | None = None,
    timing_owner: str | None = None,
) -> BuildResult:
    """Parse, configure and build.

    Args:
        adjust: called with the builder, its config and the profile (None: static) before the build, for what one
            library alone has.
        timing_owner: library version, GPU and driver, to which a timing cache is bound; None to build without one.

    Raises:
        EngineError: a refused node, an impossible profile, a build that TensorRT gives up.
        UnsupportedError: this machine cannot build.
    """
    start = time.perf_counter()
    builder = create_builder(trt)
    network = create_network(trt, builder, strongly_typed=strongly_typed)
    parse(trt, network, request.model)
    inputs, outputs = network_specs(network, request.model)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    profile = add_profiles(trt, builder, config, network, request.profiles)
    if adjust is not None:
        adjust(builder, config, profile)
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
    plan = serialize(trt, builder, network, config, notes)
    if path is not None and timing_owner is not None and timings != "none":
        write_timing_cache(path, timing_owner, bytes(config.get_timing_cache().serialize()), notes)
    return BuildResult(plan, inputs, outputs, time.perf_counter() - start, timings, tuple(notes))


def serialize(trt: Any, builder: Any, network: Any, config: Any, notes: list[str]) -> bytes:
    """Build the network: the engine's bytes. Errors that TensorRT recovered from are added to ``notes``.

    Raises:
        EngineError: TensorRT gave up, with the errors that it logged.
    """
    with collected(trt) as messages:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot build the engine: {_joined(messages)}",
            fix="see the reason above; for lack of memory, change engine.workspace_mib or free GPU memory",
        )
    notes.extend(f"TensorRT reported and recovered from: {text}" for text in errors_of(messages))
    return bytes(plan)


def network_specs(network: Any, model: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
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


def add_profiles(trt: Any, builder: Any, config: Any, network: Any, profiles: Mapping[str, Profile]) -> Any:
    """Give the config one optimization profile for all dynamic inputs; None for a static network.

    Raises:
        EngineError: a dynamic input without a profile, or a profile that its input's shape excludes.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not dynamic:
        return None
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        shape = tuple(tensor.shape)
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
        profile.set_shape(tensor.name, chosen.min, chosen.opt, chosen.max)
    with collected(trt) as messages:
        added = config.add_optimization_profile(profile)
    if added < 0:
        raise EngineError(
            f"TensorRT refuses the profile of {', '.join(tensor.name for tensor in dynamic)}: {_joined(messages)}",
            fix="correct engine.profile",
        )
    return profile


def set_flag(trt: Any, config: Any, name: str, *, on: bool = True) -> None:
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


def _configure(trt: Any, config: Any, request: BuildRequest) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.config.workspace_mib << 20)
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = request.config.optimization_level
    if hasattr(trt.BuilderFlag, "TF32"):
        set_flag(trt, config, "TF32", on=request.config.tf32)
    if hasattr(trt.ProfilingVerbosity, "DETAILED"):  # names every layer in the engine; costs no time at inference
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    drop_foreign_tactics(trt, config)


def drop_foreign_tactics(trt: Any, config: Any) -> None:
    """Keep cuBLAS and cuDNN out of the engine, where this library still knows them."""
    sources = getattr(trt, "TacticSource", None)
    foreign = sum(1 << int(getattr(sources, name)) for name in FOREIGN_TACTICS if hasattr(sources, name))
    if foreign:
        config.set_tactic_sources(config.get_tactic_sources() & ~foreign)


def _attach_timing_cache(trt: Any, config: Any, data: bytes) -> tuple[bool, str]:
    """Whether TensorRT took the cache, and what it said."""
    with collected(trt) as messages:
        cache = config.create_timing_cache(data)
        accepted = cache is not None and bool(config.set_timing_cache(cache, False))
    return accepted, _joined(messages) if messages else ""


def _spec(tensor: Any, named: Mapping[str, tuple[int | str, ...]]) -> TensorSpec:
    kind = tensor.dtype.name
    if kind not in DTYPES:
        raise EngineError(
            f"tensor {tensor.name} is {kind}, which no numpy array holds",
            expected=", ".join(DTYPES.values()),
            fix="cast it in the graph",
        )
    return TensorSpec(
        tensor.name, named_shape(tensor.name, tuple(tensor.shape), named.get(tensor.name, ())), DTYPES[kind]
    )


def _refusal(error: Any, nodes: Sequence[onnx.NodeProto]) -> RefusedNode:
    index = error.node()
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    if 0 <= index < len(nodes):
        name, operator = name or nodes[index].name, operator or nodes[index].op_type
    where = (name or str(index), operator) if index >= 0 else ("", "")
    said = error.desc().strip()
    reason = "not supported" if said in ("", "false") else said  # some checks are a bare assertion
    return RefusedNode(*where, f"{reason} [{error.func()}]")


def _joined(messages: list[str]) -> str:
    """The errors in one line, or the warnings where there are none."""
    texts = errors_of(messages) or [text[3:].strip() for text in messages]
    shown = list(dict.fromkeys(" ".join(text.split()) for text in texts))[:SHOWN_ERRORS]
    return "; ".join(shown) or "it gave no reason"
