"""Pad nodes."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    constant_value,
    input_at,
    is_standard,
    label,
    remove_detached,
)


class RemoveZeroPads(Pass):
    """1. A Pad whose widths are all the constant 0 goes, whatever its mode.

    Not: widths that the graph computes (dynamic sizes), negative widths (they crop).
    """

    name = "remove-zero-pads"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in list(graph.nodes):
            if not is_standard(node, "Pad") or not _is_zero(_widths(node)):
                continue
            name = label(node)
            if bypass(graph, node, node.inputs[0], node.outputs[0]):
                fired.append(("zero-pad", name))
        remove_detached(graph)
        return PassResult.of(fired)


def _widths(node: gs.Node) -> Any:
    """Widths of a Pad: an input since opset 11, an attribute before; None where the graph computes them."""
    tensor = input_at(node, 1)
    return constant_value(tensor) if tensor is not None else node.attrs.get("pads", node.attrs.get("paddings"))


def _is_zero(widths: Any) -> bool:
    return widths is not None and not any(widths)
