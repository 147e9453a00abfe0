"""What a rewriting pass is, and how a list of them runs to a fixed point.

A pass rewrites an onnx-graphsurgeon graph in place. Graphsurgeon drops what its own classes do not know (metadata of
models, nodes and values, attribute kinds, operator overloads); ``import_graph`` keeps the protobuf messages beside the
graph and ``export_graph`` puts everything back that no pass has changed.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from pipeline.errors import ModelError, PipelineError
from pipeline.graph.promises import read_multiples, read_raw_names, write_raw_names

Fired = tuple[str, str]
MAX_ROUNDS = 10
# Initializers outside the input list need this IR version.
UNLISTED_IR = 4
STANDARD = (None, "", "ai.onnx")
# Numpy-style broadcasting; before, the arithmetic operators had an axis of their own.
BROADCAST_OPSET = 7


@dataclass(frozen=True)
class PassResult:
    """What one call of a pass did: the rules that fired, each with the name of the node (or tensor) it fired on."""

    modified: bool
    fired: tuple[Fired, ...] = ()

    @classmethod
    def of(cls, fired: Sequence[Fired]) -> PassResult:
        return cls(bool(fired), tuple(fired))


class Pass(ABC):
    """A named rewrite: ``requires`` → ``call`` → ``ensures``.

    A subclass's docstring numbers its rewrite rules and says when they do not fire. ``call`` rewrites the graph in
    place and must report every change; a pass that reports a change in every round never converges. Attribute values
    are replaced in ``node.attrs``, never changed in place.
    """

    name: ClassVar[str]

    def requires(self, graph: gs.Graph) -> None:  # noqa: B027 - most passes ask for nothing
        """Raise ModelError where the graph is not what ``call`` needs."""

    @abstractmethod
    def call(self, graph: gs.Graph) -> PassResult: ...

    def ensures(self, graph: gs.Graph) -> None:  # noqa: B027 - most passes promise nothing beyond their rules
        """Raise ModelError where ``call`` did not leave what it promises."""

    def __call__(self, graph: gs.Graph) -> PassResult:
        self.requires(graph)
        result = self.call(graph)
        self.ensures(graph)
        return result


@dataclass(frozen=True)
class PassRun:
    """One execution of a pass within ``run_passes``; rounds count from 1."""

    name: str
    round: int
    result: PassResult
    seconds: float


def run_passes(
    model: ModelProto, passes: Sequence[Pass], *, max_rounds: int = MAX_ROUNDS, stop_after: int | None = None
) -> tuple[ModelProto, tuple[PassRun, ...]]:
    """Run the passes in order, again and again, until a whole round changes nothing.

    Args:
        model: not changed.
        passes: in the order in which they run.
        max_rounds: rounds after which the passes count as fighting each other.
        stop_after: stop after this many executions that changed the graph (to find out which one broke it).

    Returns:
        The rewritten model without value_info, or an untouched copy where no pass changed anything; and every
        execution of a pass.

    Raises:
        ModelError: a pass failed (named), or no fixed point within ``max_rounds``.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    if stop_after == 0:
        return copy, ()
    with G_LOGGER.suppress():  # it prints to stdout, where results belong
        graph = import_graph(copy)
        runs: list[PassRun] = []
        changes = 0
        for number in range(1, max_rounds + 1):
            before = changes
            for step in passes:
                start = time.perf_counter()
                result = _call(step, graph)
                runs.append(PassRun(step.name, number, result, time.perf_counter() - start))
                changes += result.modified
                if changes == stop_after:
                    return export_graph(graph, copy), tuple(runs)
            if changes == before:
                break
        else:
            fighting = [run.name for run in runs if run.round == max_rounds and run.result.modified]
            raise ModelError(
                f"cleaning does not come to an end: {', '.join(fighting)} still change the graph in round {max_rounds}",
                expected="a round without changes",
                fix="report the model; it is a defect of these passes",
            )
        if not changes:
            unchanged = ModelProto()
            unchanged.CopyFrom(model)
            return unchanged, tuple(runs)
        return export_graph(graph, copy), tuple(runs)


def _call(step: Pass, graph: gs.Graph) -> PassResult:
    try:
        return step(graph)
    except PipelineError:
        raise
    except Exception as error:  # whatever a library throws here, the pass is at fault and has to be named
        raise ModelError(
            f"the cleaning pass {step.name} failed: {type(error).__name__}: {error}",
            fix="report the model; --debug shows where the pass failed",
        ) from error


def import_graph(model: ModelProto) -> gs.Graph:
    """The model as a graphsurgeon graph. It shares tensors with ``model``, which belongs to the graph from now on.

    Raises:
        ModelError: graphsurgeon cannot read the model.
    """
    try:
        graph = gs.import_onnx(model)
    except Exception as error:  # graphsurgeon raises what its parts raise: no class in common
        raise ModelError(f"onnx-graphsurgeon cannot read the graph: {error}", fix="export the model again") from error
    _remember(graph, model.graph)
    inputs = {value.name for value in model.graph.input}
    used = set(graph.tensors()) | {name for sub in graph.subgraphs(recursive=True) for name in sub.tensors()}
    graph.listed_initializers = [t.name for t in model.graph.initializer if t.name in inputs]
    graph.unused_initializers = [t.name for t in model.graph.initializer if t.name not in used]
    graph.multiples = read_multiples(model)
    graph.raw_names = read_raw_names(model)
    graph.imported_names = set(graph.tensors())
    return graph


def export_graph(graph: gs.Graph, shell: ModelProto, *, largest: int | None = None) -> ModelProto:
    """The graph as a model with everything but the graph taken from ``shell``; value_info is left empty.

    Args:
        largest: initializers of the main graph with more entries than this become inputs: enough for shape inference,
            and no weight is copied.
    """
    model = ModelProto()
    for field, value in shell.ListFields():
        if field.name in ("graph", "opset_import"):
            continue
        if isinstance(value, (int, str)):
            setattr(model, field.name, value)
        else:
            getattr(model, field.name).extend(value)
    model.opset_import.extend(graph.import_domains or shell.opset_import)
    least = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    raised = any(new.version != old.version for new, old in zip(model.opset_import, shell.opset_import, strict=False))
    model.ir_version = max(shell.ir_version, UNLISTED_IR, least if raised else 0)
    _export(graph, set(), largest, model.graph)
    write_raw_names(model, graph.raw_names)
    return model


def _remember(graph: gs.Graph, proto: GraphProto) -> None:
    graph.origin = proto
    for node, origin in zip(graph.nodes, proto.node, strict=True):
        node.origin, node.imported = origin, dict(node.attrs)
        graphs = {attribute.name: attribute.g for attribute in origin.attribute}
        for key, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _remember(value, graphs[key])


def _export(graph: gs.Graph, outer: set[int], largest: int | None = None, into: GraphProto | None = None) -> GraphProto:
    origin: GraphProto = getattr(graph, "origin", None) or GraphProto()
    proto = GraphProto() if into is None else into
    proto.name, proto.doc_string = graph.name or "", origin.doc_string
    proto.metadata_props.extend(origin.metadata_props)
    proto.input.extend(_value(tensor, origin.input) for tensor in graph.inputs)
    proto.output.extend(_value(tensor, origin.output) for tensor in graph.outputs)
    constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and id(t) not in outer]
    for tensor in constants:
        if largest is not None and math.prod(tensor.shape) > largest:
            proto.input.append(_value(gs.Variable(tensor.name, tensor.dtype, tensor.shape), ()))
        elif is_sparse(tensor):
            proto.sparse_initializer.append(OnnxExporter.export_sparse_tensor_proto(tensor))
        else:
            proto.initializer.append(OnnxExporter.export_tensor_proto(tensor))
    known = outer | {id(tensor) for tensor in constants}
    proto.node.extend(_export_node(node, known) for node in graph.nodes)
    names = {tensor.name for tensor in graph.tensors().values()}
    proto.quantization_annotation.extend(a for a in origin.quantization_annotation if a.tensor_name in names)
    return proto


def _export_node(node: gs.Node, outer: set[int]) -> NodeProto:
    origin: NodeProto | None = getattr(node, "origin", None)
    imported: dict[str, Any] = getattr(node, "imported", {})
    proto = NodeProto(op_type=node.op, name=node.name)
    if node.domain is not None:
        proto.domain = node.domain
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    kept: dict[str, AttributeProto] = {}
    attributes: dict[str, AttributeProto] = {}
    if origin is not None:
        proto.doc_string, proto.overload = origin.doc_string, origin.overload
        proto.metadata_props.extend(origin.metadata_props)
        kept = {attribute.name: attribute for attribute in origin.attribute}
        # Attributes that graphsurgeon skipped at import (sparse tensors, types) are in no dictionary.
        attributes = {name: kept[name] for name in kept if name in node.attrs or name not in imported}
    for key, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            attributes[key] = AttributeProto(name=key, type=AttributeProto.GRAPH)
            attributes[key].g.CopyFrom(_export(value, outer))
        elif key not in kept or value is not imported.get(key):
            (attributes[key],) = OnnxExporter.export_attributes({key: value})
    proto.attribute.extend(attributes.values())
    return proto


def _value(tensor: gs.Tensor, origins: Sequence[ValueInfoProto]) -> ValueInfoProto:
    for origin in origins:
        if origin.name == tensor.name:
            return origin
    value: ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, False)
    return value


# Helpers that passes share. Graphsurgeon compares tensors by name, so identity is tested with ``is`` throughout.


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Whether the node is one of these operators of ONNX's own domain."""
    return node.op in ops and node.domain in STANDARD


def is_sparse(tensor: gs.Tensor) -> bool:
    return isinstance(getattr(tensor, "_values", None), SparseValues)


def constant_value(tensor: gs.Tensor | None) -> Any:
    """The numpy array of an initializer; None for anything else."""
    if isinstance(tensor, gs.Constant) and not is_sparse(tensor):
        return tensor.values
    return None


def input_at(node: gs.Node, slot: int) -> gs.Tensor | None:
    """The tensor in an input slot; None where it is omitted."""
    if slot < len(node.inputs) and not node.inputs[slot].is_empty():
        return node.inputs[slot]
    return None


def array_of(tensor: gs.Tensor | None) -> Any:
    """Value of an initializer whose type numpy has; None for anything else."""
    return None if tensor is None or isinstance(tensor.dtype, int) else constant_value(tensor)


def put_input(node: gs.Node, slot: int, tensor: gs.Tensor) -> None:
    """Set an input that the node has already, or its next one."""
    if slot < len(node.inputs):
        node.inputs[slot] = tensor
    else:
        node.inputs.append(tensor)


def label(node: gs.Node) -> str:
    """The node's name, or what stands for it in a report."""
    if node.name:
        return str(node.name)
    return f"{node.op} -> {node.outputs[0].name}" if node.outputs else str(node.op)


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the tensor leaves the graph, or a subgraph that captured it."""
    return any(t is tensor for t in graph.outputs) or any(
        t.name == tensor.name for sub in graph.subgraphs(recursive=True) for t in sub.outputs
    )


def slots(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Every (consumer, input slot) of a tensor, subgraphs included."""
    seen: set[int] = set()
    for node in list(tensor.outputs):
        if id(node) not in seen:
            seen.add(id(node))
            yield from [(node, slot) for slot, other in enumerate(node.inputs) if other is tensor]


def made_by(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """The node that makes a tensor, where it is one of these operators; without any, whatever it is."""
    node = tensor.inputs[0] if tensor is not None and len(tensor.inputs) == 1 else None
    return node if node is not None and (not ops or is_standard(node, *ops)) else None


def made_for_one(graph: gs.Graph, tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """The one of these operators that makes the tensor for a single reader alone."""
    node = made_by(tensor, *ops)
    return node if tensor is not None and node is not None and _has_one_reader(graph, tensor) else None


def only_reader(graph: gs.Graph, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The one of these operators that alone reads the tensor."""
    node = tensor.outputs[0] if tensor.outputs and _has_one_reader(graph, tensor) else None
    return node if node is not None and is_standard(node, *ops) else None


def _has_one_reader(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return len(list(slots(tensor))) == 1 and not is_output(graph, tensor)


def detach(*nodes: gs.Node) -> None:
    """Take nodes off their tensors; ``remove_detached`` drops them."""
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()


def names_in(graph: gs.Graph) -> set[str]:
    """Every node and tensor name of the graph and its subgraphs."""
    parts = (graph, *graph.subgraphs(recursive=True))
    return {name for part in parts for name in (*part.tensors(), *(node.name for node in part.nodes))}


def place_of(graph: gs.Graph, node: gs.Node) -> int:
    return next(place for place, other in enumerate(graph.nodes) if other is node)


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor, result: gs.Tensor) -> bool:
    """Take ``node`` out: consumers of ``result`` read ``source`` instead. False where names of outputs forbid it."""
    if not is_output(graph, result):
        for consumer, slot in list(slots(result)):
            consumer.inputs[slot] = source
        detach(node)
        return True
    producer = made_by(source)
    own_input = any(t is source for t in graph.inputs)
    if isinstance(source, gs.Constant) or own_input or is_output(graph, source) or producer is None:
        return False
    if not any(other is producer for other in graph.nodes):
        return False
    detach(node)
    for consumer, slot in list(slots(source)):
        consumer.inputs[slot] = result
    position = next(i for i, tensor in enumerate(producer.outputs) if tensor is source)
    producer.outputs[position] = result
    return True


def remove_detached(graph: gs.Graph) -> None:
    """Drop nodes that ``bypass`` or ``detach`` took out."""
    graph.nodes = [node for node in graph.nodes if node.inputs or node.outputs]


def tensor_proto_type(tensor: gs.Tensor) -> int:
    """ONNX element type of a tensor; UNDEFINED where it is not known."""
    if tensor.dtype is None:
        return int(TensorProto.UNDEFINED)
    if isinstance(tensor.dtype, int):
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype))
