"""Symbolic shapes of every tensor and symbolic values of shape arithmetic, for static and dynamic graphs alike.

``Symbolic`` walks a graph once, in topological order. Shapes are tuples of expressions over the sizes of the graph's
input axes; values of small integer and float tensors (Shape, Gather, Concat, Div, Floor, Cast, …) are arrays of
expressions. Where an operator does not tell its shape, ONNX's own inference is asked, and after that the size becomes a
symbol of its own.

Float arithmetic counts only where float32 computes it exactly for all sizes up to ``symbols.LARGEST``: factors of few
bits (2, 0.5, 1.5) and quotients that are constant. Anything else is unknown, never approximated.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto

from pipeline.graph.base import constant_value, export_graph, is_standard, tensor_proto_type
from pipeline.graph.shape_rules import MOST, SHAPES, Shape, Value, as_value
from pipeline.graph.shapes import LARGE, dims, element_type, infer
from pipeline.graph.symbols import Expr, Symbol, expr
from pipeline.graph.value_rules import VALUES

ROLES = {0: "batch", 2: "height", 3: "width"}
# Of a baked-in image: uint8, channels last.
IMAGE_ROLES = {0: "batch", 1: "height", 2: "width"}
# Operators whose value comes from their input's shape, not from its entries.
SIZES_ALONE = ("Shape", "Size")


class Symbolic:
    """Shapes and values of a graph's tensors; subgraphs are not entered.

    Args:
        graph: not changed.

    The graph's ``multiples`` attribute (axis name or role → number) says of which numbers dynamic sizes are multiples.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._multiples: dict[str, int] = getattr(graph, "multiples", {})
        self._inferred = infer(export_graph(graph, ModelProto(ir_version=10), largest=LARGE))
        self._shapes: dict[int, Shape] = {}
        self._values: dict[int, Value] = {}
        for tensor in graph.inputs:
            self._shapes[id(tensor)] = self._input_shape(tensor)
        for node in graph.nodes:
            self._visit(node)

    def shape(self, tensor: gs.Tensor | None) -> Shape | None:
        """The tensor's sizes; None where its rank is unknown."""
        if tensor is None:
            return None
        if isinstance(tensor, gs.Constant):
            return tuple(expr(size) for size in tensor.shape)
        if id(tensor) not in self._shapes:
            known = dims(self._inferred.get(tensor.name))
            if known is None:
                return None
            self._shapes[id(tensor)] = tuple(self._size(tensor, axis, size) for axis, size in enumerate(known))
        return self._shapes[id(tensor)]

    def value(self, tensor: gs.Tensor | None) -> Value | None:
        """The entries of a small tensor of shape arithmetic; None where it is none, or not understood."""
        constant = constant_value(tensor)
        if constant is not None:
            return as_value(constant)
        return self._values.get(id(tensor))

    def integers(self, tensor: gs.Tensor | None) -> list[int] | None:
        """The entries where all are known whole numbers, flattened; None otherwise."""
        value = self.value(tensor)
        if value is None or value.dtype == bool:
            return None
        entries = [entry.integer for entry in value.flat]
        return None if None in entries else entries

    def element_type(self, tensor: gs.Tensor) -> int:
        """ONNX element type; UNDEFINED where inference does not find it."""
        own = tensor_proto_type(tensor)
        return own if isinstance(tensor, gs.Constant) else element_type(self._inferred.get(tensor.name)) or own

    def _input_shape(self, tensor: gs.Tensor) -> Shape:
        sizes: list[Expr] = []
        meanings = roles(tensor)
        for axis, size in enumerate(tensor.shape or ()):
            if isinstance(size, int):
                sizes.append(expr(size))
                continue
            if not isinstance(size, str) or not size:
                sizes.append(expr(Symbol(f"{tensor.name}[{axis}]")))
                continue
            multiple = self._multiples.get(size, self._multiples.get(meanings.get(axis, ""), 1))
            sizes.append(expr(Symbol(size if multiple == 1 else f"{size}/{multiple}")) * multiple)
        return tuple(sizes)

    def _size(self, tensor: gs.Tensor, axis: int, size: int | str | None) -> Expr:
        # Names that inference gives are not trusted: they may come from what the exporter declared of an output.
        return expr(size) if isinstance(size, int) else self.unknown(tensor, axis)

    @staticmethod
    def unknown(tensor: gs.Tensor, axis: int) -> Expr:
        return expr(Symbol(f"{tensor.name}[{axis}]", least=0))

    def _visit(self, node: gs.Node) -> None:
        if not node.outputs or not is_standard(node, node.op):
            return
        shape_rule, value_rule = SHAPES.get(node.op), VALUES.get(node.op)
        shape = shape_rule(self, node) if shape_rule is not None else None
        result = node.outputs[0]
        if shape is not None:
            known = dims(self._inferred.get(result.name))
            if known is not None and len(known) == len(shape):  # a number says more than an unproved expression
                shape = tuple(expr(k) if isinstance(k, int) else s for k, s in zip(known, shape, strict=True))
            self._shapes[id(result)] = shape
        sizes_alone = node.op in SIZES_ALONE
        if value_rule is not None and (sizes_alone or all(self._understood(tensor) for tensor in node.inputs)):
            value = value_rule(self, node)
            if value is not None and value.size <= MOST:
                self._values[id(result)] = value

    def _understood(self, tensor: gs.Tensor) -> bool:
        return bool(tensor.is_empty()) or self.value(tensor) is not None


def roles(tensor: gs.Tensor) -> dict[int, str]:
    """What the axes of a graph input mean to ``multiples``; nothing where it is no image."""
    if tensor.shape is None or len(tensor.shape) != 4:
        return {}
    return IMAGE_ROLES if tensor.dtype == np.uint8 and tensor.shape[3] in (1, 3) else ROLES
