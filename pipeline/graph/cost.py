"""What the convolutions of a graph compute: multiply-accumulates by node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto

from pipeline.errors import ModelError
from pipeline.graph.shapes import Dims, dims, infer_at

CONVOLUTIONS = ("Conv", "ConvTranspose")


def operators(model: ModelProto) -> dict[str, str]:
    """ONNX operator by node name."""
    return {node.name: node.op_type for node in model.graph.node if node.name}


def convolution_macs(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Multiply-accumulates of every Conv and ConvTranspose by node name; additions of a bias are not counted.

    Args:
        shapes: of the graph's inputs by name, as they are fed; a missing one is taken as the graph has it.

    Raises:
        ModelError: a size that does not follow from the inputs' shapes, or types that contradict each other.
    """
    known = tensor_shapes(model, shapes)
    return {node.name: _macs(node, known) for node in model.graph.node if node.op_type in CONVOLUTIONS}


def tensor_shapes(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, Dims | None]:
    """Shape of every tensor, initializers too, for inputs of these shapes; what does not follow keeps names or None."""
    known = {name: dims(value) for name, value in infer_at(model, shapes).items()}
    return known | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _macs(node: NodeProto, known: Mapping[str, Dims | None]) -> int:
    """Each value of a Conv's output, or of a ConvTranspose's input, meets the weights of one channel."""
    weight = _sizes(node, known.get(node.input[1]))
    counted = node.output[0] if node.op_type == "Conv" else node.input[0]
    return math.prod(_sizes(node, known.get(counted))) * math.prod(weight[1:])


def _sizes(node: NodeProto, shape: Dims | None) -> tuple[int, ...]:
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    if shape is None or len(sizes) != len(shape):
        raise ModelError(
            f"the sizes of the convolution {node.name} do not follow from the graph's inputs",
            expected="numbers",
            got=str(shape),
            fix="clean the graph, which folds shape arithmetic",
        )
    return sizes
