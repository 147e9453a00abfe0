"""A float32 graph as a typed FP16 graph, for strongly typed networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.defs import OpSchema

from pipeline.errors import ModelError
from pipeline.graph.io import opset
from pipeline.graph.shapes import all_names, element_type, infer, listed, set_value_info, subgraphs, unique

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
INTEGERS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16)
HALF_MAX = float(np.finfo(np.float16).max)
# Slots that stay float32 although the schema allows FP16: TensorRT reads roi together with the float32 scales.
FLOAT_SLOTS = {("Resize", 1)}
# Operators that look at a tensor's size, not at its values: what they give is no data and keeps its precision.
SHAPE_OPS = frozenset({"Shape", "Size"})
# What brings the integers of an image into the layout and the range that the network was trained for.
MOVES = frozenset({"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"})
ARITHMETIC = frozenset({"Mul", "Div", "Add", "Sub"})
# What turns logits into probabilities.
DECISIONS = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
# Bounds beyond FP16's range mean "no bound" there.
BOUND_SLOTS = {("Clip", 1), ("Clip", 2)}


def to_half(model: ModelProto) -> ModelProto:
    """The graph with FP16 weights and activations, and float32 inputs and outputs.

    1. Every float32 input gets one Cast to FP16, ``<input>.half``, and every float32 output one Cast back; the outputs
       keep their names, the FP16 tensors before them are called ``<output>.half``.
    2. A float32 tensor becomes FP16 where it is data, that is, computed from the values of an input.
    3. A float32 initializer becomes FP16 where data operators read it; one that float32 slots read too stays beside
       its FP16 copy.
    4. Sizes stay as they are: float32 arithmetic on the results of Shape is not data, and neither are the scales and
       the roi of Resize. Where an operator's schema allows no FP16 it computes in float32 between casts.
    5. The preparation of an integer input, which is Cast, Transpose, Mul, Add, … with constants from the input to the
       last arithmetic, stays float32: FP16 would round the pixels before their mean is taken off. What it gives gets
       a Cast to FP16. Not: Cast and Transpose alone, since FP16 holds the integers of a uint8 image.
    6. Softmax, LogSoftmax and Sigmoid that give an output of the graph compute in float32. ArgMax reads FP16 logits:
       a cast would not change their order.

    Nodes and tensors keep their names otherwise; value_info is inferred anew; the argument is not changed.

    Raises:
        ModelError: weights that are no finite FP16 values (named), control flow, a graph whose types contradict.
    """
    result = ModelProto()
    result.CopyFrom(model)
    _Halver(result).run()
    set_value_info(result)
    try:
        onnx.checker.check_model(result, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the FP16 graph is not valid ONNX: {str(error).strip().splitlines()[0]}",
            fix="build at --precision fp32, and report the model",
        ) from error
    return result


class _Halver:
    """Rewrites one model in place."""

    def __init__(self, model: ModelProto) -> None:
        self.model, self.graph = model, model.graph
        _lower_constants(model)
        self.types = {name: element_type(value) for name, value in infer(model).items()}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types.update({name: tensor.data_type for name, tensor in self.initializers.items()})
        self.taken = all_names(model)
        self.half: dict[str, str] = {}  # float32 tensor -> its FP16 copy
        self.full: dict[str, str] = {}  # FP16 tensor -> its float32 copy
        self.renamed: dict[str, str] = {}  # graph output -> the FP16 tensor that its node gives now
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        self._refuse_control_flow()
        fixed = set(self.initializers)
        outputs = {value.name for value in self.graph.output}
        full = self._prepared() | self._decided(outputs)
        data = self._data() - full
        halves = {
            value.name for value in self.graph.input if value.name not in fixed and self.types.get(value.name) == FLOAT
        }
        for name in sorted(halves):
            self.half[name] = unique(f"{name}.half", self.taken)
        nodes = list(self.graph.node)
        used: set[str] = set()
        for node in nodes:
            is_data = bool(data.intersection(node.output))
            self._inputs(node, is_data, used, full=bool(full.intersection(node.output)))
            self.nodes.append(node)
            self._outputs(node, is_data, outputs)
        head = [
            self._cast(name, self.half[name], HALF, f"{name}.to_half")
            for name in [value.name for value in self.graph.input]
            if name in halves and self.half[name] in used
        ]
        tail = [
            self._cast(self.renamed[value.name], value.name, FLOAT, f"{value.name}.to_float")
            for value in self.graph.output
            if value.name in self.renamed
        ]
        del self.graph.node[:]
        self.graph.node.extend([*head, *self.nodes, *tail])
        self._drop_unused_initializers()

    def _refuse_control_flow(self) -> None:
        for node in self.graph.node:
            if subgraphs(node):
                raise ModelError(
                    f"node {node.name or node.op_type} ({node.op_type}) holds a subgraph, which has no FP16 form here",
                    expected="a graph without If, Loop and Scan",
                    fix="export the network without data-dependent control flow, or build at --precision fp32",
                )

    def _data(self) -> set[str]:
        """Tensors computed from the values of a graph input."""
        data = {value.name for value in self.graph.input if value.name not in self.initializers}
        for node in self.graph.node:
            if node.op_type not in SHAPE_OPS and data.intersection(node.input):
                data.update(name for name in node.output if name)
        return data

    def _prepared(self) -> set[str]:
        """Tensors between an integer input and the last arithmetic that prepares it."""
        known = {v.name for v in self.graph.input if self.types.get(v.name) in INTEGERS} - set(self.initializers)
        chain: list[NodeProto] = []
        for node in self.graph.node:
            sources = [name for name in node.input if name and name not in self.initializers]
            movable = node.op_type in MOVES | ARITHMETIC and self.types.get(node.output[0]) != HALF
            if movable and sources and known.issuperset(sources):
                known.add(node.output[0])
                chain.append(node)
        prepared: set[str] = set()
        for node in reversed(chain):
            if node.op_type in ARITHMETIC or node.output[0] in prepared:
                prepared.update((node.output[0], *node.input))
        return prepared & {node.output[0] for node in chain}

    def _decided(self, outputs: set[str]) -> set[str]:
        """Probabilities that leave the graph as float32."""
        names = {name for node in self.graph.node if node.op_type in DECISIONS for name in node.output}
        return {name for name in names & outputs if self.types.get(name) == FLOAT}

    def _inputs(self, node: NodeProto, is_data: bool, used: set[str], *, full: bool) -> None:
        schema = self._schema(node)
        for slot, name in enumerate(node.input):
            allowed = _allows_half(schema, slot) and (node.op_type, slot) not in FLOAT_SLOTS
            name = self.renamed.get(name, name)
            if self.types.get(name) == FLOAT and allowed and is_data:
                name = self._as_half(name, bound=(node.op_type, slot) in BOUND_SLOTS)
            elif self.types.get(name) == HALF and (full or not allowed):
                name = self._as_float(name)
            node.input[slot] = name
            used.add(name)

    def _outputs(self, node: NodeProto, is_data: bool, outputs: set[str]) -> None:
        schema = self._schema(node)
        for slot, name in enumerate(node.output):
            if not name or self.types.get(name) != FLOAT or not is_data:
                continue
            if not _allows_half(schema, slot, output=True):
                continue  # computed in float32; a reader that wants FP16 casts it
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == FLOAT:
                    attribute.i = HALF
            if name in outputs:
                self.renamed[name] = node.output[slot] = unique(f"{name}.half", self.taken)
                self.types[node.output[slot]] = HALF
            else:
                self.types[name] = HALF

    def _as_half(self, name: str, *, bound: bool) -> str:
        if name not in self.half:
            if name in self.initializers:
                self.half[name] = self._half_initializer(name, bound=bound)
            else:
                self.half[name] = unique(f"{name}.half", self.taken)
                self.nodes.append(self._cast(name, self.half[name], HALF, f"{name}.to_half"))
        return self.half[name]

    def _as_float(self, name: str) -> str:
        if name not in self.full:
            self.full[name] = unique(f"{name}.float", self.taken)
            self.nodes.append(self._cast(name, self.full[name], FLOAT, f"{name}.to_float"))
        return self.full[name]

    def _half_initializer(self, name: str, *, bound: bool) -> str:
        """FP16 copy of an initializer; it gets the plain name in the end where no float32 reader is left."""
        values = numpy_helper.to_array(self.initializers[name])
        if bound:
            values = np.clip(values, -HALF_MAX, HALF_MAX)
        copy = unique(f"{name}.half", self.taken)
        tensor = numpy_helper.from_array(_cast_or_inf(values), copy)
        tensor.metadata_props.extend(self.initializers[name].metadata_props)
        self.graph.initializer.append(tensor)
        return copy

    def _drop_unused_initializers(self) -> None:
        read = {name for node in self.graph.node for name in node.input} | {v.name for v in self.graph.output}
        read |= {value.name for value in self.graph.input}
        gone = [name for name in self.initializers if name not in read]
        plain = {self.half[name]: name for name in gone if name in self.half}
        kept = [
            tensor for tensor in self.graph.initializer if tensor.name in read or tensor.name not in self.initializers
        ]
        order = {name: position for position, name in enumerate(self.initializers)}
        source = {copy: name for name, copy in self.half.items()}
        self._refuse_overflow(kept, source)
        for tensor in kept:
            tensor.name = plain.get(tensor.name, tensor.name)
        for node in self.graph.node:
            for slot, name in enumerate(node.input):
                node.input[slot] = plain.get(name, name)
        kept.sort(key=lambda tensor: order.get(tensor.name, order.get(source.get(tensor.name, ""), len(order))))
        kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _refuse_overflow(self, kept: Iterable[TensorProto], source: dict[str, str]) -> None:
        wrong = []
        for tensor in kept:
            if tensor.data_type == HALF and tensor.name in source:
                original = numpy_helper.to_array(self.initializers[source[tensor.name]])
                if (np.isfinite(original) & ~np.isfinite(numpy_helper.to_array(tensor))).any():
                    wrong.append(f"{source[tensor.name]} (|max| {np.abs(original).max():.4g})")
        if wrong:
            raise ModelError(
                f"{len(wrong)} weight tensors do not fit FP16: {listed(wrong)}",
                expected=f"finite values of at most {HALF_MAX:.0f}",
                fix="build at --precision fp32, or train with a weight decay that keeps the weights small",
            )

    def _schema(self, node: NodeProto) -> OpSchema | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        try:
            return onnx.defs.get_schema(node.op_type, opset(self.model), "")
        except onnx.defs.SchemaError:
            return None

    def _cast(self, source: str, target: str, to: int, name: str) -> NodeProto:
        self.types[target] = to
        return onnx.helper.make_node("Cast", [source], [target], name=unique(name, self.taken), to=to)


def _allows_half(schema: OpSchema | None, slot: int, *, output: bool = False) -> bool:
    if schema is None:
        return False
    formal = schema.outputs if output else schema.inputs
    parameter = formal[min(slot, len(formal) - 1)]
    return "tensor(float16)" in parameter.types


def _lower_constants(model: ModelProto) -> None:
    """Constant nodes with a tensor become initializers, so that they are converted like these."""
    nodes = []
    for node in model.graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and values:
            tensor = TensorProto()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            nodes.append(node)
    if len(nodes) < len(model.graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(kept)


def _cast_or_inf(values: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)
