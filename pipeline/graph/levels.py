"""A network as blocks: runs of nodes at one resolution, which lie along a U."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from onnx import ModelProto, NodeProto, TensorProto

from pipeline.graph.cost import CONVOLUTIONS
from pipeline.graph.shapes import dims, element_type, infer, infer_at

Size = tuple[int, int]
WORDS: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class Block:
    """Nodes at one resolution.

    Attributes:
        name: what the names of its convolutions begin with.
        level: 0 for the finest resolution of the graph.
        size: height and width of what it gives; channels of the last.
        sources: places of the blocks whose tensors it reads; the first is the one that it was made from.
        convolutions: which of the nodes are.
    """

    name: str
    level: int
    size: Size
    channels: int
    nodes: tuple[str, ...]
    convolutions: tuple[str, ...]
    sources: tuple[int, ...] = ()


@dataclass
class _Open:
    """A block that nodes are still added to."""

    size: Size
    source: int | None
    nodes: list[NodeProto] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


def blocks(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> tuple[Block, ...]:
    """The blocks of a graph in topological order.

    A node belongs to the newest block that it reads from and that has the size of what it gives; where there is none, a
    new block begins. So pooling begins the next lower block, upsampling the next upper one, and a concatenation brings
    the skip to the latter. Nodes that give no map of pixels (1×1, or of another rank) belong to the newest block that
    they read from.

    Args:
        shapes: of the graph's inputs by name, as they are fed; a missing one is taken as the graph has it.

    Raises:
        ModelError: the types of the graph contradict each other.
    """
    known = {name: dims(value) for name, value in infer_at(model, shapes).items()}
    found: list[_Open] = []
    made: dict[tuple[int | None, Size], int] = {}
    owner: dict[str, int] = {}
    for node in model.graph.node:
        before = sorted({owner[name] for name in node.input if name in owner}, reverse=True)
        size = _size(known.get(node.output[0]))
        if size is None and not before:
            continue  # shape arithmetic, constants
        fitting = [place for place in before if size is None or found[place].size == size]
        place = fitting[0] if fitting else None
        if place is None:
            assert size is not None
            key = (before[0] if before else None, size)
            place = made.setdefault(key, len(found))
            if place == len(found):
                found.append(_Open(size, key[0]))
        found[place].nodes.append(node)
        found[place].sources += [other for other in before if other not in (place, *found[place].sources)]
        owner.update(dict.fromkeys(node.output, place))
    levels = {size: level for level, size in enumerate(sorted({each.size for each in found}, reverse=True))}
    names = _names([[n.name for n in each.nodes if n.op_type in CONVOLUTIONS] for each in found])
    return tuple(
        Block(
            name=name or f"block {place + 1}",
            level=levels[each.size],
            size=each.size,
            channels=_channels(each, known),
            nodes=tuple(node.name for node in each.nodes),
            convolutions=tuple(node.name for node in each.nodes if node.op_type in CONVOLUTIONS),
            sources=tuple(dict.fromkeys([*([] if each.source is None else [each.source]), *each.sources])),
        )
        for place, (each, name) in enumerate(zip(found, names, strict=True))
    )


def convolution_precisions(model: ModelProto) -> dict[str, str]:
    """What a typed graph's convolutions compute in, by node name: int8 behind a Q/DQ pair, else their weight's type."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    values = infer(model)
    types = {name: element_type(value) for name, value in values.items()}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {
        node.name: "int8"
        if makers.get(node.input[0]) == "DequantizeLinear"
        else WORDS.get(types.get(node.input[1], TensorProto.UNDEFINED), "unknown")
        for node in model.graph.node
        if node.op_type in CONVOLUTIONS
    }


def _size(shape: Sequence[int | str | None] | None) -> Size | None:
    """Height and width of a map of pixels, (N, C, H, W)."""
    if shape is None or len(shape) != 4:
        return None
    height, width = shape[2:]
    if not (isinstance(height, int) and isinstance(width, int)) or (height, width) == (1, 1):
        return None
    return height, width


def _channels(block: _Open, known: Mapping[str, Sequence[int | str | None] | None]) -> int:
    shapes = (known.get(node.output[0]) for node in reversed(block.nodes))
    channels = next((shape[1] for shape in shapes if shape is not None and _size(shape) == block.size), 0)
    return channels if isinstance(channels, int) else 0


def _names(convolutions: Sequence[Sequence[str]]) -> list[str]:
    """For each block, the shortest beginning that all its convolutions share and no other block's have."""
    parts = [[name.split(".") for name in names] for names in convolutions]
    return [_name(mine, [name for other in parts if other is not mine for name in other]) for mine in parts]


def _name(mine: Sequence[list[str]], others: Sequence[list[str]]) -> str:
    if not mine:
        return ""
    columns = zip(*mine, strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    for length in range(1, len(shared) + 1):
        if not any(other[:length] == shared[:length] for other in others):
            return ".".join(shared[:length])
    if shared:
        return ".".join(shared)
    firsts = list(dict.fromkeys(name[0] for name in mine))
    return " + ".join(firsts) if len(firsts) < 3 else f"{firsts[0]} … {firsts[-1]}"
