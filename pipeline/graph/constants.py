"""Constants: what can be computed now is computed now, and every convolution owns its weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from pipeline.errors import ModelError, UnsupportedError
from pipeline.graph.base import (
    BROADCAST_OPSET,
    STANDARD,
    Fired,
    Pass,
    PassResult,
    bypass,
    constant_value,
    detach,
    input_at,
    is_output,
    is_sparse,
    is_standard,
    label,
    made_by,
    names_in,
    remove_detached,
    slots,
    tensor_proto_type,
)
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import infer_shapes

# Operators without inputs that folding would freeze, and those whose rounding belongs to the engine.
NEVER_FOLDED = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
)
# Before this opset, Dropout is told by an attribute that it drops nothing.
DROPOUT_INFERENCE_OPSET = 7
# Operators that tell -0.0 from 0.0, where their second input is computed: 1 / -0.0 is -inf.
SIGNED_ZERO_OPS = ("Div", "Reciprocal", "Pow", "BitCast")
# What a type holds exactly: integers by (sign, bits of magnitude), floats by (digits, largest exponent).
INTEGERS: dict[int, tuple[int, int]] = {
    TensorProto.BOOL: (0, 1),
    TensorProto.UINT8: (0, 8),
    TensorProto.UINT16: (0, 16),
    TensorProto.UINT32: (0, 32),
    TensorProto.UINT64: (0, 64),
    TensorProto.INT8: (1, 7),
    TensorProto.INT16: (1, 15),
    TensorProto.INT32: (1, 31),
    TensorProto.INT64: (1, 63),
}
FLOATING: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT16: (11, 15),
    TensorProto.BFLOAT16: (8, 127),
    TensorProto.FLOAT: (24, 127),
    TensorProto.DOUBLE: (53, 1023),
}
NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
# Input slots that a convolution or a resize owns, with what they are called.
OWNED = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Resize": {1: "roi", 2: "scales", 3: "sizes"},
}


class UnlistInitializers(Pass):
    """1. An initializer that is listed as a graph input (as IR version 3 asks) is an initializer alone.

    After this no caller can override a weight, which no engine lets him do either.
    """

    name = "unlist-initializers"

    def call(self, graph: gs.Graph) -> PassResult:
        listed, graph.listed_initializers = graph.listed_initializers, []
        return PassResult.of([("unlist", tensor) for tensor in listed])


class LowerConstants(Pass):
    """1. A Constant node with a tensor, number or list of numbers becomes an initializer.

    Not: sparse and string constants.
    """

    name = "lower-constants"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for part in (graph, *graph.subgraphs(recursive=True)):
            for node in part.nodes:
                values = self._values(node)
                if values is not None:
                    fired.append(("constant-node", label(node)))
                    tensor = node.outputs[0]
                    node.outputs.clear()
                    tensor.to_constant(values)
            remove_detached(part)
        return PassResult.of(fired)

    @staticmethod
    def _values(node: gs.Node) -> Any:
        if not is_standard(node, "Constant") or len(node.attrs) != 1:
            return None
        ((kind, value),) = node.attrs.items()
        if kind == "value" and isinstance(value, gs.Constant) and not is_sparse(value):
            return value._values  # not ``values``, which would decode types that numpy does not have
        return np.array(value, NUMBERS[kind]) if kind in NUMBERS else None


class RemoveIdentities(Pass):
    """1. Identity: its readers read its input.
    2. Dropout that drops nothing and whose mask nobody reads: likewise. It drops nothing with ratio 0, and at
       inference: no training_mode input or a constant False one (opset 12 on), always (7, 10), is_test (1, 6).

    In subgraphs too. Not: where graph input and output, or two outputs, would have to share a name, or an initializer
    would become an output.
    """

    name = "remove-identities"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for part in (graph, *graph.subgraphs(recursive=True)):
            for node in list(part.nodes):
                name, rule = label(node), node.op.lower()
                idle = is_standard(node, "Dropout") and self._inactive(part, node, graph.opset)
                if (idle or is_standard(node, "Identity")) and bypass(part, node, node.inputs[0], node.outputs[0]):
                    fired.append((rule, name))
            remove_detached(part)
        return PassResult.of(fired)

    @staticmethod
    def _inactive(part: gs.Graph, node: gs.Node, opset: int) -> bool:
        if any(mask.outputs or is_output(part, mask) for mask in node.outputs[1:]):
            return False
        ratio, training = input_at(node, 1), input_at(node, 2)
        if (node.attrs.get("ratio") if ratio is None else constant_value(ratio)) == 0:
            return True
        if opset < DROPOUT_INFERENCE_OPSET:
            return bool(node.attrs.get("is_test", 0))
        return training is None or (constant_value(training) is not None and not constant_value(training))


class SimplifyCasts(Pass):
    """1. A Cast to the type that its input has goes.
    2. Of two Casts in a row, A → B → C, the second reads the first one's input where B holds every value of A, and
       goes where C is A. The first goes when nobody else reads it.
    3. CastLike becomes a Cast to the type of its second input. (torch.onnx writes biases of 0 so: CastLike(0, image).)

    Not: where B drops anything of A (int64 → int32 → int64, float32 → float16 → float32); where C neither is A nor
    holds every value of A, unless A and B are integers or all three are floating (out of range, a number becomes
    another integer along another way); strings, complex numbers and types of less than 8 bits or 8-bit floats; in
    subgraphs, whose types are not inferred.
    """

    name = "simplify-casts"

    def call(self, graph: gs.Graph) -> PassResult:
        casts = [node for node in graph.nodes if is_standard(node, "Cast", "CastLike")]
        if casts:
            infer_shapes(graph)
        fired: list[Fired] = []
        for node in casts:
            if node.op == "CastLike":
                kind = tensor_proto_type(node.inputs[1])
                if kind not in INTEGERS and kind not in FLOATING:
                    continue
                fired.append(("cast-like", label(node)))
                node.op, node.attrs = "Cast", {"to": kind}  # its own attributes are about 8-bit floats
                del node.inputs[1]
            source, target, name = node.inputs[0], node.attrs["to"], label(node)
            first = made_by(source, "Cast")
            if first is not None:
                given = tensor_proto_type(first.inputs[0])
                if _same_without(given, first.attrs["to"], target):
                    node.inputs[0] = first.inputs[0]
                    fired.append(("cast-of-cast", name))
                    if not source.outputs and not is_output(graph, source):
                        detach(first)
            source = node.inputs[0]
            if tensor_proto_type(source) == target and bypass(graph, node, source, node.outputs[0]):
                fired.append(("cast-to-same", name))
        remove_detached(graph)
        return PassResult.of(fired)


class RemoveNoOpArithmetic(Pass):
    """1. x · 1, x / 1, x ^ 1, x - 0 and x + 0 with a constant that neither widens x nor changes its type: x.

    Floating point: x + 0.0 makes 0.0 of -0.0, and so does x - (-0.0). They go where no operator of the graph tells the
    two zeros from each other (a computed divisor or power, operators of other domains); the others are exact for
    every x, NaN and infinities included.

    Not: x ^ 1 of integers; where the shape of x is not known as far as the constant's needs it; in subgraphs; where
    names of inputs and outputs forbid it.
    """

    name = "remove-no-op-arithmetic"

    def call(self, graph: gs.Graph) -> PassResult:
        if graph.opset < BROADCAST_OPSET:
            return PassResult(False)
        found = [(node, slot) for node in graph.nodes for slot in self._slots(graph, node)]
        if found:
            infer_shapes(graph)
        fired: list[Fired] = []
        for node, slot in found:
            name, source = label(node), node.inputs[slot]
            if node.op == "Pow" and tensor_proto_type(source) not in FLOATING:
                continue
            if _keeps_shape(source, node.inputs[1 - slot]) and bypass(graph, node, source, node.outputs[0]):
                fired.append((f"no-op-{node.op.lower()}", name))
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _slots(graph: gs.Graph, node: gs.Node) -> list[int]:
        """The input slot of the tensor that the node hands on unchanged, if there is one."""
        if not is_standard(node, "Add", "Sub", "Mul", "Div", "Pow"):
            return []
        for slot in (0, 1) if node.op in ("Add", "Mul") else (0,):
            constant = node.inputs[1 - slot]
            kind = getattr(constant.dtype, "kind", "") if isinstance(constant, gs.Constant) else ""
            if kind not in ("i", "u", "f") or isinstance(node.inputs[slot], gs.Constant):
                continue
            values = constant_value(constant)
            if values is None or not (values == (node.op in ("Mul", "Div", "Pow"))).all():
                continue
            exact = kind != "f" or node.op not in ("Add", "Sub") or (np.signbit(values) == (node.op == "Add")).all()
            if exact or not _tells_zeros_apart(graph):
                return [slot]
        return []


class FoldConstants(Pass):
    """1. A node that reads constants alone is computed now, on ONNX Runtime.
    2. An If with a constant condition gives way to the nodes of the branch that it takes.

    Both hold in subgraphs too: a branch or loop body computes the same from the same constants.
    Not: random operators (nor a Loop or If that holds one), Q/DQ, operators of other domains, an If whose branch hands
    on a tensor from outside as it is. Sizes are folded by arithmetic.FoldSizes. Graphsurgeon's own shape folding
    stays off: it turns ``Cast(int → float) · Mul(0.5) · Cast(→ int)`` into integer arithmetic, where 0.5 becomes 0.
    """

    name = "fold-constants"

    def requires(self, graph: gs.Graph) -> None:
        # graphsurgeon needs ONNX Runtime for rule 1, and without it would leave all as it is after a logged warning.
        if importlib.util.find_spec("onnxruntime") is None:
            raise UnsupportedError(
                "onnxruntime is not installed, so constants cannot be folded", fix="pip install onnxruntime"
            )

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        before = _every_node(graph)
        if any(self._constant(node) for node in before):
            # graphsurgeon's own way into subgraphs forgets what must not be folded, and the model's IR version, without
            # which ONNX Runtime refuses what it is to compute.
            for part in (graph, *graph.subgraphs(recursive=True)):
                part.ir_version = graph.ir_version
                part.fold_constants(
                    fold_shapes=False,
                    recurse_subgraphs=False,
                    flatten_subgraphs=False,
                    recurse_functions=False,
                    partitioning="recursive",
                    should_exclude_node=_never_folded,
                )
            graph.cleanup(recurse_functions=False)
            left = {id(node) for node in _every_node(graph)}
            fired += [("constant", label(node)) for node in before if id(node) not in left]
        return PassResult.of(fired + _take_branches(graph, graph))

    @staticmethod
    def _constant(node: gs.Node) -> bool:
        return not _never_folded(node) and all(isinstance(t, gs.Constant) or t.is_empty() for t in node.inputs)


class OwnInitializers(Pass):
    """1. Where several nodes read one initializer, each Conv, ConvTranspose and Resize gets a copy of its own.

    torch stores equal tensors once, and fresh BatchNorm biases are all equal; TensorRT fuses a bias only where it is
    the convolution's own. The first reader keeps the initializer.
    """

    name = "own-initializers"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        taken = names_in(graph)
        for node in graph.nodes:
            for slot in OWNED.get(node.op, {}) if node.domain in STANDARD else ():
                tensor = input_at(node, slot)
                if not isinstance(tensor, gs.Constant) or is_sparse(tensor):
                    continue
                readers = list(slots(tensor))
                first = readers[0][0] is node and readers[0][1] == slot
                mine = len(readers) == 1 or (first and all(_owns(*reader) for reader in readers))
                if mine and not is_output(graph, tensor):
                    continue
                name = numbered(tensor.name, OWNED[node.op][slot], taken)
                node.inputs[slot] = gs.Constant(name, np.array(tensor.values))
                fired.append(("share", label(node)))
        return PassResult.of(fired)

    def ensures(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            for slot in OWNED.get(node.op, {}) if node.domain in STANDARD else ():
                tensor = input_at(node, slot)
                if isinstance(tensor, gs.Constant) and not is_sparse(tensor) and len(list(slots(tensor))) > 1:
                    raise ModelError(f"{label(node)} still shares the initializer {tensor.name}")


class RemoveUnused(Pass):
    """1. A node none of whose results reaches an output goes.
    2. An initializer that nobody reads goes.

    Not: graph inputs, used or not.
    """

    name = "remove-unused"

    def call(self, graph: gs.Graph) -> PassResult:
        names = {id(node): label(node) for node in graph.nodes}
        graph.cleanup(recurse_functions=False)
        left = {id(node) for node in graph.nodes}
        unused, graph.unused_initializers = graph.unused_initializers, []
        fired = [("unused-node", name) for key, name in names.items() if key not in left]
        return PassResult.of(fired + [("unused-initializer", tensor) for tensor in unused])


def numbered(name: str, role: str, taken: set[str]) -> str:
    """``<module>_1.<role>``, ``<module>_2.<role>``, …: the first that is not taken; it is taken from now on."""
    stem, number = name.removesuffix(f".{role}"), 1
    while f"{stem}_{number}.{role}" in taken:
        number += 1
    return unique(f"{stem}_{number}.{role}", taken)


def _owns(node: gs.Node, slot: int) -> bool:
    return node.domain in STANDARD and slot in OWNED.get(node.op, {})


def _tells_zeros_apart(graph: gs.Graph) -> bool:
    return any(
        node.domain not in STANDARD
        or (node.op in SIGNED_ZERO_OPS and not isinstance(node.inputs[-1], gs.Constant))
        or node.op == "Pow"
        for node in _every_node(graph)
    )


def _keeps_shape(tensor: gs.Tensor, constant: gs.Constant) -> bool:
    """Whether the constant, broadcast with the tensor, leaves the tensor's shape as it is."""
    wanted, shape = tuple(constant.shape), tensor.shape
    if not wanted:
        return True
    if shape is None or len(shape) < len(wanted):
        return False
    return all(size in (1, own) for size, own in zip(wanted[::-1], shape[::-1], strict=False))


def _same_without(given: int, between: int, target: int) -> bool:
    """Whether a cast from ``given`` to ``target`` is the same without the cast to ``between``."""
    if not _holds(between, given):
        return False
    whole = given in INTEGERS and between in INTEGERS and (target in INTEGERS or target in FLOATING)
    real = all(kind in FLOATING for kind in (given, between, target))
    return target == given or _holds(target, given) or whole or real


def _holds(wide: int, narrow: int) -> bool:
    """Whether the type ``wide`` holds every value of the type ``narrow`` exactly."""
    if narrow in INTEGERS:
        sign, bits = INTEGERS[narrow]
        if wide in INTEGERS:
            return INTEGERS[wide][0] >= sign and INTEGERS[wide][1] >= bits
        return wide in FLOATING and FLOATING[wide][0] >= bits
    if wide not in FLOATING or narrow not in FLOATING:
        return False
    return all(a >= b for a, b in zip(FLOATING[wide], FLOATING[narrow], strict=True))


def _never_folded(node: gs.Node) -> bool:
    inner = (other for part in node.subgraphs(recursive=True) for other in part.nodes)
    return any(n.op in NEVER_FOLDED or n.domain not in STANDARD for n in (node, *inner))


def _take_branches(root: gs.Graph, part: gs.Graph) -> list[Fired]:
    """Replace every If with a constant condition in this graph and its subgraphs; what was replaced."""
    fired: list[Fired] = []
    nodes = list(part.nodes)
    position = 0
    while position < len(nodes):
        node = nodes[position]
        condition = constant_value(input_at(node, 0)) if is_standard(node, "If") else None
        if condition is not None:
            branch = node.attrs["then_branch" if condition.item() else "else_branch"]
            own = {id(tensor) for inner in branch.nodes for tensor in inner.outputs}
            if all(id(t) in own or isinstance(t, gs.Constant) for t in branch.outputs):
                fired.append(("branch", label(node)))
                nodes[position : position + 1] = _unwrapped(root, node, branch)
                continue  # the branch may begin with another If
        position += 1
    part.nodes = nodes
    return fired + [change for inner in list(part.subgraphs()) for change in _take_branches(root, inner)]


def _unwrapped(root: gs.Graph, node: gs.Node, branch: gs.Graph) -> list[gs.Node]:
    """The nodes of the branch, with names that no other graph uses, giving the results of the If ``node``."""
    inside = (branch, *branch.subgraphs(recursive=True))
    outside = [part for part in (root, *root.subgraphs(recursive=True)) if not any(part is other for other in inside)]
    others = {id(tensor) for part in outside for tensor in part.tensors().values()}
    taken = {tensor.name for part in (*outside, *inside[1:]) for tensor in part.tensors().values()}
    local = {id(tensor): tensor for tensor in (*branch.tensors().values(), *branch.outputs) if tensor.name}
    for key, tensor in local.items():
        if key not in others:
            tensor.name = unique(tensor.name, taken)
    results, outputs, nodes = list(node.outputs), list(branch.outputs), list(branch.nodes)
    detach(node)
    for result, output in zip(results, outputs, strict=True):
        # RemoveIdentities takes it out where names allow.
        nodes.append(gs.Node("Identity", unique(f"{result.name}.identity", taken), inputs=[output], outputs=[result]))
    return nodes


def _every_node(graph: gs.Graph) -> list[gs.Node]:
    return [node for part in (graph, *graph.subgraphs(recursive=True)) for node in part.nodes]
