"""Transposes that only change a layout, as NHWC networks leave them around every convolution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from pipeline.graph.axes import Edits, Move, Order, inverse, move_for
from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    detach,
    is_output,
    is_standard,
    label,
    made_by,
    names_in,
    remove_detached,
    slots,
    tensor_proto_type,
)
from pipeline.graph.mincut import MinimumCut
from pipeline.graph.shapes import same_sizes, unique
from pipeline.graph.sizes import infer_shapes

# Engines transpose these; TensorRT-RTX's parser refuses uint8, and no engine is fast at bool.
TRANSPOSABLE = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT32,
    TensorProto.INT64,
)
NATIVE, OTHER = "source", "sink"
# Operators with the channels on axis 1, whatever the caller would like.
CHANNELS_FIRST = (
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "DepthToSpace"),
    *("SpaceToDepth", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "Resize", "Upsample"),
)
# A node in the wrong layout costs 1, the next larger unit is a byte that a Transpose moves.
BYTE = 1 << 20


class MergeTransposes(Pass):
    """1. A Transpose that keeps the order of the axes goes.
    2. A Transpose of a Transpose reads the first one's input, with both orders in one; where that leaves the axes as
       they were, both go. The first one stays as long as someone else reads it.

    Not: where graph input and output would have to share a name; orders that only the unknown rank gives.
    """

    name = "merge-transposes"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in list(graph.nodes):
            order, name = order_of(node), label(node)
            inner = made_by(node.inputs[0]) if order else None
            if order is None:
                continue
            first = order_of(inner) if inner is not None else None
            if first is not None and inner is not None and len(first) == len(order):
                order = tuple(first[axis] for axis in order)
                if order != tuple(sorted(order)):
                    fired.append(("merge", name))
                    node.inputs[0] = inner.inputs[0]
                    node.attrs["perm"] = list(order)
                elif bypass(graph, node, inner.inputs[0], node.outputs[0]):
                    fired.append(("cancel", name))
                if inner.outputs and not inner.outputs[0].outputs and not is_output(graph, inner.outputs[0]):
                    fired.append(("unread", label(inner)))
                    detach(inner)
            elif order == tuple(sorted(order)) and bypass(graph, node, node.inputs[0], node.outputs[0]):
                fired.append(("identity", name))
        remove_detached(graph)
        return PassResult.of(fired)


class CancelTransposes(Pass):
    """1. Transposes of one order and its inverse, and the operators between them that work in either layout, are
       rewritten together so that the fewest Transposes are left, of equally many the fewest bytes move, and after that
       the most operators share the layout of the convolutions, where a bias or a scale can become part of one:
       ``NHWC → NCHW, Conv, NCHW → NHWC, Relu, Concat(axis=3), NHWC → NCHW, Conv`` keeps none in the middle.
       Operators get permuted axes, widths, scales and constants; a Resize [1, s, s, 1] becomes [1, 1, s, s].
    2. A Reshape that only moves axes of size 1 counts as such a Transpose, where it stands among real ones.

    Which layout each operator gets is a minimum cut: a tensor that is made in one layout and read in the other, by
    however many readers, costs one Transpose; graph inputs and outputs, Conv, MatMul, Reshape and all else that means
    one layout are on its side from the start. A region is rewritten only where that is better, in this order, and moves
    no more bytes; so a second run finds nothing to do.

    Not: Transposes that work (attention, Reshape-Transpose-Reshape); a new Transpose of a type that engines do not
    transpose (uint8, bool); a Resize whose first two axes would then be scaled; operators of subgraphs and of other
    domains.
    """

    name = "cancel-transposes"

    def call(self, graph: gs.Graph) -> PassResult:
        if not any(is_standard(node, "Transpose") for node in graph.nodes):
            return PassResult(False)
        infer_shapes(graph)
        orders: list[Order] = []
        for node in graph.nodes:
            order = order_of(node)
            if order is not None and order not in orders and inverse(order) not in orders:
                orders.append(order)
        fired: list[Fired] = []
        for order in orders:
            explored: list[gs.Node] = []
            for node in list(graph.nodes):
                if order_of(node) in (order, inverse(order)) and not any(node is other for other in explored):
                    region = _Region(graph, order, node)
                    explored += region.links
                    fired += region.improve()
        return PassResult.of(fired)


def order_of(node: gs.Node) -> Order | None:
    """A Transpose's order of axes; None for other nodes, and where only the unknown rank gives it."""
    if not is_standard(node, "Transpose") or not node.inputs:
        return None
    if "perm" in node.attrs:
        return tuple(node.attrs["perm"])
    shape = node.inputs[0].shape
    return None if shape is None else tuple(reversed(range(len(shape))))


@dataclass(frozen=True, order=True)
class _Cost:
    """What a region costs: Transposes (and Reshapes that stand for one, with 0 bytes), bytes that they move, and free
    operators outside the convolutions' layout."""

    count: int
    bytes: int
    away: int


@dataclass
class _Value:
    """One tensor in its two layouts: the tensors that hold it, and who reads which of them."""

    root: gs.Tensor
    members: list[gs.Tensor] = field(default_factory=list)
    links: list[gs.Node] = field(default_factory=list)
    readers: list[tuple[gs.Node, int, str | int]] = field(default_factory=list)
    leaving: list[gs.Tensor] = field(default_factory=list)
    producer: str | int = NATIVE
    bytes: int = 0


class _Region:
    """The part of a graph around one Transpose whose tensors can stand in either of two layouts.

    World 0 is the layout that a Transpose of ``order`` reads, world 1 the one that it gives. ``world`` says, for each
    tensor of the region, in which one it stands now; ``moves`` how each free operator follows into the other one.
    """

    def __init__(self, graph: gs.Graph, order: Order, seed: gs.Node) -> None:
        self.graph = graph
        self.orders = (order, inverse(order))
        self.own = {id(node) for node in graph.nodes}
        self.world: dict[int, int] = {}
        self.tensors: list[gs.Tensor] = []
        self.links: list[gs.Node] = []
        self.moves: dict[int, tuple[gs.Node, Move, int]] = {}
        self._seen: set[int] = set()
        self._queue: list[gs.Tensor] = []
        self._explore(seed)

    # What belongs to the region.

    def _explore(self, seed: gs.Node) -> None:
        self._link(seed)
        while self._queue:
            tensor = self._queue.pop(0)
            for node in (*tensor.inputs, *(reader for reader, _ in slots(tensor))):
                if id(node) in self.own and id(node) not in self._seen and not self._link(node):
                    self._free(node, tensor)

    def _link(self, node: gs.Node) -> bool:
        """Take a Transpose between the two layouts in; True for every Transpose, also one that does not fit."""
        order = order_of(node) or self._reshape_order(node)
        if order not in self.orders:
            return is_standard(node, "Transpose")
        self._seen.add(id(node))
        source, result = node.inputs[0], node.outputs[0]
        if isinstance(source, gs.Constant):
            return True
        world = self.orders.index(order)
        if self.orders[0] == self.orders[1]:
            world = self.world.get(id(source), 1 - self.world.get(id(result), 1))
        if self._assign([(source, world), (result, 1 - world)]):
            self.links.append(node)
        return True

    def _reshape_order(self, node: gs.Node) -> Order | None:
        """The order for which a Reshape is a Transpose: only axes of size 1 move."""
        if not is_standard(node, "Reshape") or node.inputs[0].shape is None or node.outputs[0].shape is None:
            return None
        given, wanted = list(node.inputs[0].shape), list(node.outputs[0].shape)
        declared = is_output(self.graph, node.outputs[0]) and not all(isinstance(size, int) for size in wanted)
        if declared or not len(given) == len(wanted) == len(self.orders[0]) or given == wanted:
            return None
        for order in self.orders:
            if _moves_nothing(given, order) and same_sizes([given[axis] for axis in order], wanted):
                return order
        return None

    def _free(self, node: gs.Node, reached: gs.Tensor) -> None:
        """Take an operator in that works in either layout."""
        world = self.world[id(reached)]
        move = move_for(node, self.orders[world], self.graph.opset)
        if move is None:
            return
        tied = [node.inputs[slot] for slot in move.inputs] + [node.outputs[slot] for slot in move.outputs]
        if any(isinstance(tensor, gs.Constant) for tensor in tied) or not any(t is reached for t in tied):
            return
        self._seen.add(id(node))
        if self._assign([(tensor, world) for tensor in tied]):
            self.moves[id(node)] = (node, move, world)

    def _assign(self, worlds: list[tuple[gs.Tensor, int]]) -> bool:
        if any(self.world.get(id(tensor), world) != world for tensor, world in worlds):
            return False
        for tensor, world in worlds:
            if id(tensor) not in self.world:
                self.world[id(tensor)] = world
                self.tensors.append(tensor)
                self._queue.append(tensor)
        return True

    # What it costs and what is better.

    def improve(self) -> list[Fired]:
        """Rewrite the region where that is better; the Transposes that went and the operators that moved."""
        if not self.links:
            return []
        values = self._values()
        wanted = self._wanted()
        moved = sum(value.bytes * len(value.links) for value in values)
        before = _Cost(len(self.links), moved, sum(self.moves[key][2] != world for key, world in wanted.items()))
        chosen = self._cut(values, wanted)
        crossing = [value for value in values if self._crosses(value, chosen)]
        moved = sum(value.bytes for value in crossing)
        after = _Cost(len(crossing), moved, sum(chosen[key] != world for key, world in wanted.items()))
        transposes = sum(is_standard(node, "Transpose") for node in self.links)
        better = after < before and after.bytes <= before.bytes and after.count <= transposes
        return self._rewrite(values, chosen) if better else []

    def _wanted(self) -> dict[int, int]:
        """The layout of the convolutions around, for each free operator; empty where there are none, or in both.

        A Shape has no share in it: what it gives is put in order by one more node.
        """
        homes = {
            self.world[id(tensor)]
            for tensor in self.tensors
            for node in (*tensor.inputs, *(reader for reader, slot in slots(tensor) if slot == 0))
            if id(node) not in self.moves and is_standard(node, *CHANNELS_FIRST)
        }
        if len(homes) != 1:
            return {}
        (home,) = homes
        return {key: home for key, (node, _, _) in self.moves.items() if not is_standard(node, "Shape")}

    def _values(self) -> list[_Value]:
        """The region's tensors, those that only a link's Transpose parts taken as one."""
        links = {id(link.outputs[0]): link for link in self.links}
        values: dict[int, _Value] = {}
        for tensor in self.tensors:
            root, path = tensor, []
            while id(root) in links:
                path.append(links[id(root)])
                root = path[-1].inputs[0]
            value = values.setdefault(id(root), _Value(root))
            value.members.append(tensor)
            value.links += path[:1]
        linked = {id(node) for node in self.links}
        for value in values.values():
            producer = made_by(value.root)
            value.producer = self._place(producer, value.root, output=True)
            for member in value.members:
                for node, slot in slots(member):
                    if id(node) not in linked:
                        place = self._place(node, member, slot=slot)
                        value.readers.append((node, slot, place))
                if is_output(self.graph, member):
                    value.leaving.append(member)
        self._weigh(values.values())
        return list(values.values())

    def _place(self, node: gs.Node | None, tensor: gs.Tensor, *, slot: int = 0, output: bool = False) -> str | int:
        """The operator whose layout decides, or the layout itself where the node has no choice."""
        fixed = (NATIVE, OTHER)[self.world[id(tensor)]]
        if node is None or id(node) not in self.moves:
            return fixed
        move = self.moves[id(node)][1]
        tied = any(node.outputs[i] is tensor for i in move.outputs) if output else slot in move.inputs
        return id(node) if tied else fixed

    def _weigh(self, values: Iterable[_Value]) -> None:
        """Bytes of each tensor; 0 throughout where a size other than the batch is unknown, and for axes of size 1."""
        listed = list(values)
        known: list[int] = []
        for value in listed:
            order = self.orders[self.world[id(value.root)]]
            shape = value.root.shape
            if shape is None:
                return
            sizes = [1 if axis == 0 and order[0] == 0 else size for axis, size in enumerate(shape)]
            if not all(isinstance(size, int) for size in sizes):
                return
            free = _moves_nothing(list(shape), order)
            known.append(0 if free else int(np.prod(sizes)) * _item_bytes(value.root))
        for value, size in zip(listed, known, strict=True):
            value.bytes = size

    def _cut(self, values: list[_Value], wanted: dict[int, int]) -> dict[str | int, int]:
        """The layout of each operator: 0 and 1 are the worlds."""
        cut = MinimumCut()
        transpose = BYTE * (1 + sum(value.bytes for value in values))
        never = transpose * (1 + len(values)) * 2
        for key, (_, _, world) in self.moves.items():
            start, end = (NATIVE, key) if wanted.get(key, world) == 0 else (key, OTHER)
            cut.add(start, end, 1)
        for position, value in enumerate(values):
            readers = {reader for _, _, reader in value.readers} | {
                (NATIVE, OTHER)[self.world[id(tensor)]] for tensor in value.leaving
            }
            allowed = value.links or tensor_proto_type(value.root) in TRANSPOSABLE
            cost = transpose + BYTE * value.bytes if allowed else never
            late, early = ("late", position), ("early", position)
            cut.add(value.producer, late, cost)
            cut.add(early, value.producer, cost)
            for reader in sorted(readers - {value.producer}, key=str):
                cut.add(late, reader, never)
                cut.add(reader, early, never)
        side = cut.source_side(NATIVE, OTHER)
        return {NATIVE: 0, OTHER: 1, **{key: 0 if key in side else 1 for key in self.moves}}

    def _crosses(self, value: _Value, chosen: dict[str | int, int]) -> bool:
        made = chosen[value.producer]
        wanted = [chosen[reader] for _, _, reader in value.readers] + [self.world[id(t)] for t in value.leaving]
        return any(layout != made for layout in wanted)

    # The rewriting.

    def _rewrite(self, values: list[_Value], chosen: dict[str | int, int]) -> list[Fired]:
        edits = Edits(names_in(self.graph))
        front: list[gs.Node] = []
        names = {id(node): label(node) for node in self.links}
        detach(*self.links)
        fired: list[Fired] = []
        for key, (node, move, world) in self.moves.items():
            if chosen[key] != world:
                fired.append(("permute", label(node)))
                move.apply(edits)
        kept: set[int] = set()
        for value in values:
            for node in self._wire(value, chosen, edits):
                kept.add(id(node))
                producer = made_by(node.inputs[0])
                behind = edits.behind.setdefault(id(producer), []) if producer is not None else front
                behind.append(node)
        nodes = [node for node in self.graph.nodes if id(node) not in names]
        self.graph.nodes = [part for node in front + nodes for part in _with_new(node, edits)]
        return [("transpose", name) for key, name in names.items() if key not in kept] + fired

    def _wire(self, value: _Value, chosen: dict[str | int, int], edits: Edits) -> Iterator[gs.Node]:
        """Give each reader its layout; yields the Transpose and Identity nodes that this takes, in their order."""
        made = chosen[value.producer]
        forms: dict[int, gs.Tensor] = {}
        for layout in (0, 1):
            leaving = [tensor for tensor in value.leaving if self.world[id(tensor)] == layout]
            own = [tensor for tensor in (value.root,) if self.world[id(tensor)] == layout]
            pinned = own if not value.root.inputs or any(t is value.root for t in leaving) else []
            forms[layout] = (pinned + leaving + own or [self._in_layout(value.root, edits)])[0]
        producer = made_by(value.root)
        if producer is not None:
            position = next(i for i, tensor in enumerate(producer.outputs) if tensor is value.root)
            producer.outputs[position] = forms[made]
        for node, slot, reader in value.readers:
            node.inputs[slot] = forms[chosen[reader]]
        if self._crosses(value, chosen):
            old = [node for node in value.links if is_standard(node, "Transpose")]
            name = unique(f"{forms[1 - made].name}.transpose", edits.taken)
            node = old[0] if old else gs.Node("Transpose", name)
            node.attrs = {**node.attrs, "perm": list(self.orders[made])}
            node.inputs.append(forms[made])
            node.outputs.append(forms[1 - made])
            yield node
        for tensor in value.leaving:
            form = forms[self.world[id(tensor)]]
            if tensor is not form:
                name = unique(f"{tensor.name}.identity", edits.taken)
                yield gs.Node("Identity", name, {}, [form], [tensor])

    def _in_layout(self, root: gs.Tensor, edits: Edits) -> gs.Tensor:
        """A new tensor for the layout that ``root`` is not in."""
        order = self.orders[self.world[id(root)]]
        return edits.variable(root, None if root.shape is None else [root.shape[axis] for axis in order])


def _with_new(node: gs.Node, edits: Edits) -> list[gs.Node]:
    parts = [*edits.before.get(id(node), []), node]
    for new in edits.behind.get(id(node), []):
        parts += _with_new(new, edits)
    return parts


def _moves_nothing(shape: list[Any], order: Order) -> bool:
    """Whether a Transpose leaves every entry where it is in memory: only axes of size 1 change places."""
    large = [axis for axis in order if shape[axis] != 1]
    return large == sorted(large)


def _item_bytes(tensor: gs.Tensor) -> int:
    kind = tensor_proto_type(tensor)
    return int(tensor_dtype_to_np_dtype(kind).itemsize) if kind else 1
