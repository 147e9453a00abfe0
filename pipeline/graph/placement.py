"""Where Q/DQ pairs go in a graph, and which tensors share a range."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from onnx import ModelProto, NodeProto, TensorProto

from pipeline.calibration.table import CalibrationTable
from pipeline.config import Placement
from pipeline.errors import ConfigError
from pipeline.graph.shapes import element_type, infer, listed

# Axis of the output channels in the weight.
CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1}
# What these give lies within the range of what they take (cubic interpolation overshoots a little).
PASSING = ("MaxPool", "Resize", "Concat", "Pad")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
STANDARD = ("", "ai.onnx")

# Of one node: data input's place -> the tensor there, which it reads through a pair.
Site = dict[int, str]


def quantizable_tensors(
    model: ModelProto, exclude: Sequence[str] = (), qdq: Placement = "convolutions"
) -> tuple[str, ...]:
    """Tensors whose amax ``quantize`` needs, in topological order.

    Raises:
        ConfigError: a pattern of ``exclude`` matches no convolution.
    """
    return tuple(dict.fromkeys(tensor for site in sites(model, exclude, qdq) for tensor in site.values()))


def activation_tensors(model: ModelProto) -> tuple[str, ...]:
    """Every float tensor that a complete TensorRT cache lists: inputs, then node outputs in topological order."""
    types = {name: element_type(value) for name, value in infer(model).items()}
    fixed = {tensor.name for tensor in model.graph.initializer}
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    names = [value.name for value in model.graph.input if value.name not in fixed]
    names += [name for node in model.graph.node for name in node.output if name and name not in constants]
    return tuple(name for name in names if types.get(name) in FLOATS)


def concatenations(model: ModelProto, tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Outputs of Concat with their parts, in topological order, where all of them are among the tensors: what such an
    output holds is what its parts hold."""
    known = set(tensors)
    return {
        node.output[0]: tuple(node.input)
        for node in model.graph.node
        if node.op_type == "Concat" and node.output[0] in known and known.issuperset(node.input)
    }


def sites(model: ModelProto, exclude: Sequence[str], qdq: Placement) -> list[Site]:
    """Inputs that are quantized, one entry for every convolution and passing node in the graph's order.

    1. convolutions: the data input of every Conv and ConvTranspose with a constant weight, unless ``exclude`` names it.
    2. shared: also all data inputs of a MaxPool, Resize, Concat or Pad of which a quantized convolution reads the
       result, at once or through others of these, so that it runs in INT8 itself. Not where the result is an output of
       the graph: what decides a pixel's class is not rounded to 8 bits.

    Raises:
        ConfigError: a pattern of ``exclude`` matches no convolution.
    """
    chosen = {node.output[0] for node in quantizable(model, exclude)}
    taken = chosen | (_passed(model, chosen) if qdq == "shared" else set())
    return [
        dict(enumerate(data_inputs(node))) if node.output[0] in taken else {}
        for node in model.graph.node
        if is_site(node)
    ]


def shared_ranges(model: ModelProto, table: CalibrationTable, exclude: Sequence[str]) -> CalibrationTable:
    """The table with one range, the largest, for all tensors that a passing node joins (see ``sites``, rule 2): it then
    takes and gives the same integers, and nothing is requantized.
    """
    return _joined(model, table, _passed(model, {node.output[0] for node in quantizable(model, exclude)}))


def implicit_ranges(model: ModelProto, table: CalibrationTable) -> CalibrationTable:
    """The table with one range for all that any passing node joins, as TensorRT's implicit route needs it.

    There TensorRT 8.6.0 runs Resize and MaxPool in INT8, and these hand the integers on: where the ranges of input and
    output differ, so do the values, by their ratio (docs/decisions/0007).
    """
    fixed = {tensor.name for tensor in model.graph.initializer}
    return _joined(
        model, table, {n.output[0] for n in model.graph.node if _passes(n) and fixed.isdisjoint(data_inputs(n))}
    )


def is_site(node: NodeProto) -> bool:
    """Whether ``sites`` has an entry for the node."""
    return is_convolution(node) or _passes(node)


def is_convolution(node: NodeProto) -> bool:
    """Whether the node is a Conv or ConvTranspose of ONNX's own domain."""
    return node.op_type in CHANNEL_AXES and node.domain in STANDARD


def data_inputs(node: NodeProto) -> Sequence[str]:
    """What a node reads beside its settings: all inputs of a Concat, the first one of others."""
    return list(node.input if node.op_type == "Concat" else node.input[:1])


def groups(node: NodeProto) -> int:
    """Of a convolution."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def quantizable(model: ModelProto, exclude: Sequence[str]) -> list[NodeProto]:
    """Convolutions with constant weights that ``exclude`` does not name.

    Raises:
        ConfigError: a pattern matches none.
    """
    constants = {tensor.name for tensor in model.graph.initializer if tensor.data_type in FLOATS}
    nodes = [
        n for n in model.graph.node if is_convolution(n) and n.input[1] in constants and n.input[0] not in constants
    ]
    for pattern in exclude:
        if not any(fnmatchcase(node.name, pattern) for node in nodes):
            close = difflib.get_close_matches(pattern, [node.name for node in nodes], n=3, cutoff=0.4)
            raise ConfigError(
                f"engine.exclude names {pattern!r}, which matches no convolution of the graph",
                expected=f"names such as {', '.join(close) or listed([node.name for node in nodes], 3)}",
                fix="correct the pattern; `unet-trt inspect` lists the nodes of a clean graph",
            )
    return [node for node in nodes if not any(fnmatchcase(node.name, pattern) for pattern in exclude)]


def _passes(node: NodeProto) -> bool:
    return node.op_type in PASSING and node.domain in STANDARD


def _joined(model: ModelProto, table: CalibrationTable, passing: set[str]) -> CalibrationTable:
    unions: dict[str, set[str]] = {}
    for node in model.graph.node:
        if node.output[0] in passing:
            joined = {node.output[0], *data_inputs(node)}
            joined = joined.union(*(unions.get(tensor, set()) for tensor in joined))
            unions.update(dict.fromkeys(joined, joined))
    largest = {tensor: max(table.amax[name] for name in joined) for tensor, joined in unions.items()}
    return replace(table, amax={**table.amax, **largest})


def _passed(model: ModelProto, chosen: set[str]) -> set[str]:
    """Outputs of the passing nodes that lead to the convolutions whose outputs are ``chosen``."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for tensor in data_inputs(node):
            readers[tensor].append(node)
    fixed = {value.name for value in model.graph.output} | {tensor.name for tensor in model.graph.initializer}
    wanted, found = set(chosen), set()
    for node in reversed(model.graph.node):
        passing = _passes(node) and fixed.isdisjoint([node.output[0], *data_inputs(node)])
        if passing and any(reader.output[0] in wanted for reader in readers[node.output[0]]):
            wanted.add(node.output[0])
            found.add(node.output[0])
    return found
