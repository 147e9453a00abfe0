"""What a graph's outputs are decided from."""

from __future__ import annotations

from onnx import ModelProto

# What only decides or normalises behind the scores.
DECIDING = ("ArgMax", "Cast", "Softmax", "Squeeze")


def scores_of(model: ModelProto) -> list[str]:
    """The tensors that the outputs are decided from, one for each output."""
    producers = {name: node for node in model.graph.node for name in node.output}
    names = []
    for output in model.graph.output:
        name = output.name
        while name in producers and producers[name].op_type in DECIDING:
            name = producers[name].input[0]
        names.append(name)
    return names
