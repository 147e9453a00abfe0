"""Constants: what can be computed now is computed now, and every convolution owns its weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pipeline.errors import ModelError, UnsupportedError
from pipeline.graph.base import (
    STANDARD,
    Fired,
    Pass,
    PassResult,
    bypass,
    constant_value,
    input_at,
    is_output,
    is_sparse,
    is_standard,
    label,
    remove_detached,
    slots,
)
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import as_array, infer_shapes

# Operators without inputs that folding would freeze, and those whose rounding belongs to the engine.
NEVER_FOLDED = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
)
SIZE_OPS = ("Shape", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Reshape")
NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
# Input slots that a convolution or a resize owns.
OWNED = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Resize": (1, 2, 3)}
ROLES = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Resize": ("", "roi", "scales", "sizes"),
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
    2. Dropout at inference (no training_mode input, or a constant False one) whose mask nobody reads: likewise.

    Not: where graph input and output would have to share a name, or an initializer would become an output.
    """

    name = "remove-identities"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in list(graph.nodes):
            name = label(node)
            if is_standard(node, "Identity") or (is_standard(node, "Dropout") and self._inactive(graph, node)):
                rule = node.op.lower()
                if bypass(graph, node, node.inputs[0], node.outputs[0]):
                    fired.append((rule, name))
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _inactive(graph: gs.Graph, node: gs.Node) -> bool:
        training = input_at(node, 2)
        if training is not None and (constant_value(training) is None or bool(constant_value(training))):
            return False
        return not any(mask.outputs or is_output(graph, mask) for mask in node.outputs[1:])


class FoldConstants(Pass):
    """1. A node that reads constants alone is computed now, on ONNX Runtime.
    2. A node of shape arithmetic whose result the inferred shapes give away becomes a constant, also where only some
       axes are dynamic (``Gather(Shape(x), 2)`` with a dynamic batch).

    Not: random operators, Q/DQ, operators of other domains, graph outputs of rule 2. Graphsurgeon's own shape folding
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
        fired = self._sizes(graph)
        if any(self._constant(node) for node in graph.nodes):
            before = _every_node(graph)
            graph.fold_constants(
                fold_shapes=False,
                recurse_functions=False,
                partitioning="recursive",
                should_exclude_node=lambda node: node.op in NEVER_FOLDED or node.domain not in STANDARD,
            )
            graph.cleanup(recurse_functions=False)
            left = {id(node) for node in _every_node(graph)}
            fired += [("constant", label(node)) for node in before if id(node) not in left]
        return PassResult.of(fired)

    @staticmethod
    def _constant(node: gs.Node) -> bool:
        if node.op in NEVER_FOLDED or node.domain not in STANDARD:
            return False
        if any(True for _ in node.subgraphs()):
            return True
        return all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs)

    @staticmethod
    def _sizes(graph: gs.Graph) -> list[Fired]:
        if not any(is_standard(node, "Shape") for node in graph.nodes):
            return []
        infer_shapes(graph)
        fired: list[Fired] = []
        for node in graph.nodes:
            if not is_standard(node, *SIZE_OPS) or is_output(graph, node.outputs[0]):
                continue
            value = as_array(node.outputs[0])
            if value is not None:
                fired.append(("size", label(node)))
                tensor = node.outputs[0]
                node.inputs.clear()
                node.outputs.clear()
                tensor.to_constant(value)
        remove_detached(graph)
        return fired


class FoldBatchNorm(Pass):
    """1. BatchNormalization behind a Conv or ConvTranspose becomes part of its weight and bias, in float64:
       W' = W · γ/√(σ²+ε) per output channel, b' = (b - μ) · γ/√(σ²+ε) + β.

    Not: in training mode; where anyone else reads the convolution's output; where a parameter is no initializer; where
    γ/√(σ²+ε) is not finite.
    """

    name = "fold-batchnorm"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in list(graph.nodes):
            if is_standard(node, "BatchNormalization") and self._fold(graph, node):
                fired.append(("batchnorm", label(node)))
                node.inputs.clear()
                node.outputs.clear()
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _fold(graph: gs.Graph, node: gs.Node) -> bool:
        source = node.inputs[0]
        conv = source.inputs[0] if len(source.inputs) == 1 else None
        if conv is None or not is_standard(conv, "Conv", "ConvTranspose") or is_output(graph, source):
            return False
        if len(list(slots(source))) != 1 or node.attrs.get("training_mode", 0) == 1:
            return False
        if any(extra.outputs or is_output(graph, extra) for extra in node.outputs[1:]):
            return False
        parameters = [constant_value(input_at(node, slot)) for slot in range(1, 5)]
        weight, bias = constant_value(conv.inputs[1]), constant_value(input_at(conv, 2))
        if weight is None or any(p is None for p in parameters) or (input_at(conv, 2) is not None and bias is None):
            return False
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        if not np.isfinite(factor).all():
            return False
        shape = [1] * weight.ndim
        if conv.op == "Conv":
            shape[0] = -1
            scaled = weight * factor.reshape(shape)
        else:
            groups = conv.attrs.get("group", 1)
            grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            scaled = (grouped * factor.reshape(groups, 1, -1, *shape[2:])).reshape(weight.shape)
        shifted = ((0.0 if bias is None else bias) - mean) * factor + beta
        stem = conv.inputs[1].name.removesuffix(".weight")
        taken = set(graph.tensors())
        conv.inputs[1] = gs.Constant(unique(f"{stem}.weight", taken), scaled.astype(weight.dtype))
        folded = gs.Constant(unique(f"{stem}.bias", taken), shifted.astype(weight.dtype))
        if len(conv.inputs) > 2:
            conv.inputs[2] = folded
        else:
            conv.inputs.append(folded)
        result = node.outputs[0]
        node.outputs.clear()
        conv.outputs[0] = result
        return True


class OwnInitializers(Pass):
    """1. Where several nodes read one initializer, each Conv, ConvTranspose and Resize gets a copy of its own.

    torch stores equal tensors once, and fresh BatchNorm biases are all equal; TensorRT fuses a bias only where it is
    the convolution's own. The first reader keeps the initializer.
    """

    name = "own-initializers"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        taken = set(graph.tensors())
        for node in graph.nodes:
            for slot in OWNED.get(node.op, ()) if node.domain in STANDARD else ():
                tensor = input_at(node, slot)
                if constant_value(tensor) is None or tensor is None:
                    continue
                readers = list(slots(tensor))
                first = readers[0][0] is node and readers[0][1] == slot
                mine = len(readers) == 1 or (first and all(_owns(*reader) for reader in readers))
                if mine and not is_output(graph, tensor):
                    continue
                role = ROLES[node.op][slot]
                stem = tensor.name.removesuffix(f".{role}")
                number = 1
                while f"{stem}_{number}.{role}" in taken:
                    number += 1
                node.inputs[slot] = gs.Constant(unique(f"{stem}_{number}.{role}", taken), np.array(tensor.values))
                fired.append(("share", label(node)))
        return PassResult.of(fired)

    def ensures(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            for slot in OWNED.get(node.op, ()) if node.domain in STANDARD else ():
                tensor = input_at(node, slot)
                if tensor is not None and constant_value(tensor) is not None and len(list(slots(tensor))) > 1:
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


def _owns(node: gs.Node, slot: int) -> bool:
    return node.domain in STANDARD and slot in OWNED.get(node.op, ())


def _every_node(graph: gs.Graph) -> list[gs.Node]:
    return [node for part in (graph, *graph.subgraphs(recursive=True)) for node in part.nodes]
