"""Scales and shifts per channel become part of the convolution beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.base import (
    BROADCAST_OPSET,
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
    put_input,
    remove_detached,
    slots,
    tensor_proto_type,
)
from pipeline.graph.constants import INTEGERS, numbered
from pipeline.graph.padding import pad_spans, pad_value, set_pad_value
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import infer_shapes

FLOATS = (np.float16, np.float32, np.float64)
# Until this opset an attribute says that a BatchNormalization is at inference; until opset 14 the absence of further
# outputs does, from then on training_mode.
INFERENCE_OPSET = 7
# The standard's default, an attribute of 32 bits.
EPSILON = float(np.float32(1e-5))
# How much larger than the values behind it a shift may be that moves behind a convolution: the convolution then sums
# numbers that much larger, and float32 rounds them that much more coarsely.
MOST_SHIFT = 8.0

Vector = NDArray[np.float64]


class Affine(NamedTuple):
    """y = scale · x + shift, per channel, and how large y is where x has the statistics that a BatchNormalization
    was trained on (without one: 0, nothing is known)."""

    scale: Vector
    shift: Vector
    magnitude: Vector


class FoldBatchNorm(Pass):
    """In float64, rounded once to the type of the weight; one sum for all that stands behind a convolution:

    1. BatchNormalization behind a Conv or ConvTranspose becomes part of its weight and bias:
       W' = W · γ/√(σ²+ε) per output channel, b' = (b - μ) · γ/√(σ²+ε) + β.
    2. Add, Sub, Mul and Div with a constant per channel behind a Conv or ConvTranspose: likewise. A constant per
       channel broadcasts as (C, 1, 1), (1, C, 1, 1), …, or is one number.
    3. Rules 1 and 2 also where Pads of H and W stand between: modes other than constant commute with them; a constant
       is rewritten where every channel gives the same one.
    4. BatchNormalization before a Conv without padding: W' = W · scale per input channel, b' = b + Σ W · shift. Every
       reader has to be such a Conv. Where every shift is 0: also before a Conv with padding and a ConvTranspose.
    5. Mul and Div by a constant per channel before Conv and ConvTranspose: likewise.

    Weights, biases and parameters that others read stay as they are for those.
    Not: in training mode (before opset 14: with more than one output); ``spatial=0``; where anyone else reads a result
    in between; where a parameter, weight or bias is no initializer of 16, 32 or 64 bits; where the result is not
    finite in the weight's type; rule 4 where a shift is much larger than the values behind it, which would cost
    accuracy, and Add and Sub before a convolution, where that cannot be known; rule 5 where the pixels of an integer
    image are scaled: in FP16, weights that are 255 times smaller lose digits; a constant divided by the result.
    """

    name = "fold-batchnorm"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        taken = names_in(graph)
        for node in graph.nodes:
            if is_standard(node, "Conv", "ConvTranspose") and _has_weight(node):
                fired += _fold_behind(graph, node, taken)
        remove_detached(graph)
        before = [node for node in graph.nodes if is_standard(node, "BatchNormalization", "Mul", "Div")]
        before = [node for node in before if _readers(graph, node.outputs[0])]
        if before:
            infer_shapes(graph)
        for node in before:
            fired += _fold_before(graph, node, taken)
        remove_detached(graph)
        return PassResult.of(fired)


def _fold_behind(graph: gs.Graph, conv: gs.Node, taken: set[str]) -> list[Fired]:
    kernel, bias = conv.inputs[1], input_at(conv, 2)
    rank = len(kernel.shape)
    channels = kernel.shape[0] if conv.op == "Conv" else kernel.shape[1] * conv.attrs.get("group", 1)
    if bias is not None and _vector(bias, channels) is None:
        return []
    scale, shift = np.ones(channels), np.zeros(channels) if bias is None else _vector(bias, channels)
    values: dict[int, tuple[gs.Node, float]] = {}
    absorbed: list[tuple[gs.Node, int]] = []
    pads: list[gs.Node] = []
    tensor = conv.outputs[0]
    while True:
        readers = list(slots(tensor))
        if len(readers) != 1 or is_output(graph, tensor):
            break
        ((node, slot),) = readers
        if is_standard(node, "Pad") and slot == 0:
            pads.append(node)
        else:
            affine = _affine(graph.opset, node, slot, rank, channels)
            padded = None if affine is None else _padded(pads, values, affine, rank)
            if affine is None or padded is None:
                break
            scale, shift = scale * affine.scale, shift * affine.scale + affine.shift
            values = padded
            absorbed.append((node, slot))
        tensor = node.outputs[0]
    if not absorbed:
        return []
    weight = constant_value(kernel)
    if not _write(graph, conv, _by_outputs(conv, weight, scale), shift, taken):
        return []
    for pad, value in values.values():
        set_pad_value(graph, pad, np.array(value, weight.dtype), taken)
    fired = [("batchnorm" if node.op == "BatchNormalization" else "affine", label(node)) for node, _ in absorbed]
    for node, slot in absorbed:
        bypass(graph, node, node.inputs[slot], node.outputs[0])
    return fired


def _fold_before(graph: gs.Graph, node: gs.Node, taken: set[str]) -> list[Fired]:
    readers = _readers(graph, node.outputs[0])
    slot = 1 if node.op == "Mul" and constant_value(node.inputs[0]) is not None else 0
    shape = node.inputs[slot].shape
    if _holds_pixels(node.inputs[slot]):
        return []
    folded = []
    for conv in readers:
        weight = _weight(conv)
        group = conv.attrs.get("group", 1)
        channels = weight.shape[1] * group if conv.op == "Conv" else weight.shape[0]
        bias = input_at(conv, 2)
        outputs = weight.shape[0] if conv.op == "Conv" else weight.shape[1] * group
        added = np.zeros(outputs) if bias is None else _vector(bias, outputs)
        if shape is None or len(shape) != weight.ndim or shape[1] != channels or added is None:
            return []  # a constant could widen the tensor
        affine = _affine(graph.opset, node, slot, weight.ndim, channels)
        if affine is None or (affine.shift.any() and not _moves(conv, affine)):
            return []
        if conv.op == "Conv":
            split = weight.astype(np.float64).reshape(group, -1, *weight.shape[1:])
            along = (group, 1, -1, *[1] * (weight.ndim - 2))
            added = added + (split * affine.shift.reshape(along)).reshape(outputs, -1).sum(axis=1)
            scaled = (split * affine.scale.reshape(along)).reshape(weight.shape)
        else:
            scaled = weight * affine.scale.reshape(-1, *[1] * (weight.ndim - 1))
        folded.append((conv, scaled, added))
    if not all(_fits(conv, scaled, added) for conv, scaled, added in folded):
        return []
    rule = "batchnorm-before" if node.op == "BatchNormalization" else "scale-before"
    fired = [(rule, label(node))]
    source = node.inputs[slot]
    for conv, scaled, added in folded:
        _write(graph, conv, scaled, added, taken)
        conv.inputs[0] = source
    detach(node)
    return fired


def _holds_pixels(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds integers as floats, in whatever layout."""
    node = made_by(tensor)
    while node is not None and is_standard(node, "Transpose"):
        node = made_by(node.inputs[0])
    return node is not None and is_standard(node, "Cast") and tensor_proto_type(node.inputs[0]) in INTEGERS


def _readers(graph: gs.Graph, tensor: gs.Tensor) -> list[gs.Node]:
    """The convolutions that read the tensor as their input; none where anything else reads it."""
    found = list(slots(tensor))
    fit = all(slot == 0 and is_standard(n, "Conv", "ConvTranspose") and _has_weight(n) for n, slot in found)
    return [node for node, _ in found] if fit and not is_output(graph, tensor) else []


def _moves(conv: gs.Node, affine: Affine) -> bool:
    """Whether a shift before the convolution can become part of its bias."""
    attrs = conv.attrs
    unpadded = not any(attrs.get("pads", ())) and attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return conv.op == "Conv" and unpadded and bool((np.abs(affine.shift) <= MOST_SHIFT * affine.magnitude).all())


def _affine(opset: int, node: gs.Node, slot: int, rank: int, channels: int) -> Affine | None:
    """What the node does to the tensor in this input slot, of this rank and with so many channels."""
    if is_standard(node, "BatchNormalization"):
        return _batchnorm(opset, node, channels) if slot == 0 else None
    if not is_standard(node, "Add", "Sub", "Mul", "Div") or opset < BROADCAST_OPSET or (node.op == "Div" and slot):
        return None
    constant = _per_channel(node.inputs[1 - slot], rank, channels)
    if constant is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Add":
        return Affine(one, constant, zero)
    if node.op == "Sub":
        return Affine(one, -constant, zero) if slot == 0 else Affine(-one, constant, zero)
    with np.errstate(divide="ignore"):
        factor = constant if node.op == "Mul" else 1 / constant
    return Affine(factor, zero, zero) if np.isfinite(factor).all() else None


def _batchnorm(opset: int, node: gs.Node, channels: int) -> Affine | None:
    if opset < INFERENCE_OPSET and not node.attrs.get("is_test", 0):
        return None
    if node.attrs.get("training_mode", 0) or any(not extra.is_empty() for extra in node.outputs[1:]):
        return None
    if not node.attrs.get("spatial", 1):
        return None
    parameters = [_vector(input_at(node, slot), channels) for slot in range(1, 5)]
    if any(parameter is None for parameter in parameters):
        return None
    gamma, beta, mean, variance = parameters
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", EPSILON))
    return Affine(scale, beta - mean * scale, np.abs(gamma) + np.abs(beta)) if np.isfinite(scale).all() else None


def _padded(
    pads: list[gs.Node], values: dict[int, tuple[gs.Node, float]], affine: Affine, rank: int
) -> dict[int, tuple[gs.Node, float]] | None:
    """The Pads that need another value once ``affine`` is done before them; None where it cannot be."""
    result = dict(values)
    for pad in pads:
        spans = pad_spans(pad, rank)
        if spans is None or spans[1] != (0, 0):
            return None
        if pad.attrs.get("mode", "constant") != "constant" or all(width <= 0 for span in spans for width in span):
            continue
        value = values[id(pad)][1] if id(pad) in values else pad_value(pad)
        if value is None:
            return None
        then = value * affine.scale + affine.shift
        if not np.isfinite(then[0]) or (then != then[0]).any():
            return None
        if then[0] != value:
            result[id(pad)] = pad, float(then[0])
    return result


def _has_weight(conv: gs.Node) -> bool:
    """Whether the weight is an initializer that can be folded into; does not load it."""
    tensor = conv.inputs[1]
    return isinstance(tensor, gs.Constant) and not is_sparse(tensor) and tensor.dtype in FLOATS


def _weight(conv: gs.Node) -> Any:
    tensor = conv.inputs[1]
    return constant_value(tensor) if tensor.dtype in FLOATS else None


def _vector(tensor: gs.Tensor | None, length: int) -> Any:
    """An initializer of shape (length,) in float64; None for anything else."""
    value = constant_value(tensor) if tensor is not None and tensor.dtype in FLOATS else None
    return value.astype(np.float64) if value is not None and value.shape == (length,) else None


def _per_channel(tensor: gs.Tensor, rank: int, channels: int) -> Vector | None:
    """An initializer that holds one number per channel of a tensor of this rank, or one for all, in float64."""
    if not isinstance(tensor, gs.Constant) or is_sparse(tensor) or tensor.dtype not in FLOATS:
        return None
    shape = (1,) * (rank - len(tensor.shape)) + tuple(tensor.shape)
    if len(shape) != rank or shape[1] not in (1, channels) or any(size != 1 for size in (shape[0], *shape[2:])):
        return None
    return np.broadcast_to(tensor.values.astype(np.float64).ravel(), channels)


def _by_outputs(conv: gs.Node, weight: NDArray[Any], scale: Vector) -> NDArray[Any]:
    """The weight with every output channel scaled."""
    if (scale == 1).all():
        return weight
    kernel = [1] * (weight.ndim - 2)
    if conv.op == "Conv":
        return weight * scale.reshape(-1, 1, *kernel)
    group = conv.attrs.get("group", 1)
    grouped = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return (grouped * scale.reshape(group, 1, -1, *kernel)).reshape(weight.shape)


def _fits(conv: gs.Node, weight: NDArray[Any], bias: Vector) -> bool:
    """Whether these values are finite in the type of the convolution's weight."""
    with np.errstate(over="ignore"):
        return all(bool(np.isfinite(values.astype(conv.inputs[1].dtype)).all()) for values in (weight, bias))


def _write(graph: gs.Graph, conv: gs.Node, weight: NDArray[Any], bias: Vector, taken: set[str]) -> bool:
    """Give the convolution this weight and bias, in its own type; False where they do not fit."""
    if not _fits(conv, weight, bias):
        return False
    kind = conv.inputs[1].dtype
    if weight is not constant_value(conv.inputs[1]):
        conv.inputs[1] = gs.Constant(_own_name(graph, conv.inputs[1], "weight", taken), weight.astype(kind))
    current = input_at(conv, 2)
    if current is None and not bias.any():
        return True
    stem = conv.inputs[1].name.removesuffix(".weight")
    name = unique(f"{stem}.bias", taken) if current is None else _own_name(graph, current, "bias", taken)
    put_input(conv, 2, gs.Constant(name, bias.astype(kind)))
    return True


def _own_name(graph: gs.Graph, tensor: gs.Tensor, role: str, taken: set[str]) -> str:
    """The initializer's name where this is its only reader, otherwise one like it."""
    alone = len(list(slots(tensor))) == 1 and not is_output(graph, tensor)
    return tensor.name if alone else numbered(tensor.name, role, taken)
