"""A graph as a chain of small graphs, so that every activation can be seen without all of them being alive at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto

from pipeline.graph.shapes import dims, infer, subgraphs


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph as a model of their own.

    Attributes:
        model: reads the image or what earlier segments carry; gives what is observed or carried.
        observed: outputs that somebody wants to see, in topological order.
        carried: tensors, of this segment or earlier ones, that later segments read.
    """

    model: ModelProto
    observed: tuple[str, ...]
    carried: frozenset[str]


def split(model: ModelProto, observed: Sequence[str], shapes: dict[str, tuple[int, ...]], limit: int) -> list[Segment]:
    """Cut a graph where the outputs of its nodes exceed ``limit`` bytes (4 an element; one node may exceed it alone).

    Every node is in exactly one segment, so running all of them costs one inference. A graph with a tensor of unknown
    rank stays whole, since no segment could declare it as its input.

    Args:
        observed: node outputs that the segments must give.
        shapes: of the graph's inputs, for the sizes.
    """
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    # As an output of the graph, a tensor would keep the size that is declared instead of the one inferred.
    del fixed.graph.output[:]
    values = infer(fixed)
    nodes = list(model.graph.node)
    sizes = {
        name: 4 * math.prod(size for size in dims(value) or () if isinstance(size, int))
        for name, value in values.items()
    }
    outputs = {name for node in nodes for name in node.output if name}
    whole = any(dims(values.get(name)) is None for name in outputs)
    runs = [nodes] if whole else list(_runs(nodes, sizes, limit))

    reads = [{name for node in run for name in _reads(node)} for run in runs]
    segments = []
    for index, run in enumerate(runs):
        produced = {name for node in run for name in node.output if name}
        later = frozenset(name for other in reads[index + 1 :] for name in other)
        wanted = [name for name in dict.fromkeys(n for node in run for n in node.output) if name in {*observed, *later}]
        if wanted:
            part = _part(model, run, sorted(reads[index] - produced), wanted, values)
            segments.append(Segment(part, tuple(name for name in wanted if name in observed), later))
    return segments


def _runs(nodes: Sequence[NodeProto], sizes: dict[str, int], limit: int) -> Iterator[list[NodeProto]]:
    run: list[NodeProto] = []
    used = 0
    for node in nodes:
        size = sum(sizes.get(name, 0) for name in node.output)
        if run and used + size > limit:
            yield run
            run, used = [], 0
        run.append(node)
        used += size
    yield run


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs capture included (and names of their own)."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _reads(inner)


def _part(
    model: ModelProto,
    nodes: Sequence[NodeProto],
    reads: Sequence[str],
    wanted: Sequence[str],
    values: dict[str, onnx.ValueInfoProto],
) -> ModelProto:
    """A model of these nodes; its inputs keep their element type and rank, with every size open."""
    part = ModelProto(ir_version=max(model.ir_version, 4))
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    fixed = set()
    for tensor in (*model.graph.initializer, *model.graph.sparse_initializer):
        name = tensor.name if isinstance(tensor, onnx.TensorProto) else tensor.values.name
        fixed.add(name)
        if name in reads or any(name in node.output for node in nodes):
            kept = part.graph.initializer if isinstance(tensor, onnx.TensorProto) else part.graph.sparse_initializer
            kept.add().CopyFrom(tensor)
    for name in reads:
        if name in values and name not in fixed:
            kind = values[name].type.tensor_type.elem_type
            rank = len(dims(values[name]) or ())
            part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * rank))
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return part
