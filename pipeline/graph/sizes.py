"""Inferred types and shapes, written into a graph's tensors."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pipeline.graph.symbolic import Symbolic


def infer_shapes(graph: gs.Graph) -> None:
    """Write what is known of every tensor's type and shape into the graph; inputs and outputs keep their own shapes.

    Sizes that are no number are strings; equal strings are equal sizes. A tensor of unknown rank keeps its own shape.
    """
    known = Symbolic(graph)
    fixed = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in graph.tensors().values():
        if not isinstance(tensor, gs.Variable):
            continue
        if id(tensor) not in fixed or tensor.dtype is None:
            tensor.dtype = known.element_type(tensor) or tensor.dtype
        shape = known.shape(tensor)
        if shape is not None and id(tensor) not in fixed:
            tensor.shape = [str(size) if size.integer is None else size.integer for size in shape]
