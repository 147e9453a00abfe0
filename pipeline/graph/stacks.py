"""Tensors that are stacked only to be added up: how networks write ensembles and sums of several outputs."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import TensorProto

from pipeline.graph.base import (
    BROADCAST_OPSET,
    Fired,
    Pass,
    PassResult,
    is_standard,
    label,
    made_by,
    made_for_one,
)
from pipeline.graph.shape_rules import axes_of
from pipeline.graph.symbolic import Symbolic

REDUCTIONS = {"ReduceSum": "Sum", "ReduceMean": "Mean", "ReduceMax": "Max", "ReduceMin": "Min"}


class ReduceStacks(Pass):
    """1. ReduceSum, ReduceMean, ReduceMax or ReduceMin over the axis along which tensors were stacked (Unsqueeze each,
       then Concat) is the Sum, Mean, Max or Min of the tensors, the Sum of two an Add.

    Not: types other than float32; ``keepdims``; more axes than this one; where anyone else reads the stack, or a part
    of it has another size along the axis than 1.
    """

    name = "reduce-stacks"

    def call(self, graph: gs.Graph) -> PassResult:
        places = [node for node in graph.nodes if is_standard(node, *REDUCTIONS) and _stack(graph, node) is not None]
        if not places or graph.opset < BROADCAST_OPSET:
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node in places:
            tensors = self._stacked(graph, node, known)
            if tensors is not None:
                fired.append((f"stack-{node.op.lower()}", label(node)))
                node.op = "Add" if node.op == "ReduceSum" and len(tensors) == 2 else REDUCTIONS[node.op]
                node.attrs = {}
                node.inputs = tensors
        return PassResult.of(fired)

    @staticmethod
    def _stacked(graph: gs.Graph, node: gs.Node, known: Symbolic) -> list[gs.Tensor] | None:
        concat, shape = _stack(graph, node), known.shape(node.inputs[0])
        if concat is None or shape is None or known.element_type(node.inputs[0]) != TensorProto.FLOAT:
            return None
        rank = len(shape)
        axes = [concat.attrs["axis"] % rank]
        parts = [made_by(tensor, "Unsqueeze") for tensor in concat.inputs]
        if node.attrs.get("keepdims", 1) or axes_of(known, node, rank) != axes:
            return None
        tensors = [part.inputs[0] for part in parts if part is not None and axes_of(known, part, rank) == axes]
        return tensors if len(tensors) == len(parts) else None


def _stack(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    return made_for_one(graph, node.inputs[0], "Concat")
