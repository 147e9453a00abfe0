"""Nodes of a clean graph that TensorRT is known to refuse, or to read as something else, each with a way out.

Sources: the verdicts of TensorRT-RTX 1.7.1's parser on a graph for every case below (the tests ask it again); issues
NVIDIA/TensorRT#3761 and #27 (MaxPool's indices); TensorRT 8.6.0 reads ``antialias`` and ignores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from pipeline.graph.base import STANDARD
from pipeline.graph.io import opset
from pipeline.graph.resampling import CROP, DEFAULTS
from pipeline.graph.shapes import element_type, infer, subgraphs
from pipeline.graph.versions import has_legacy_resize

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn")
# Resize changes these last axes alone.
LAST_AXES = {"linear": 3, "cubic": 2}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
FIXED_SIZES = "export with fixed image sizes, so that cleaning can write it as two MatMuls"
EXPORT_AGAIN = "export with half_pixel, align_corners or asymmetric coordinates"


@dataclass(frozen=True)
class Finding:
    """One node that stands in the way of an engine.

    Attributes:
        node: its name, or ``-> tensor`` where it has none.
        op: the operator, with its domain where that is not ONNX's own.
        reason: what TensorRT does with it.
        way_out: what to change, and where.
    """

    node: str
    op: str
    reason: str
    way_out: str


def refusals(model: ModelProto) -> tuple[Finding, ...]:
    """What TensorRT is known to refuse or to ignore silently in a clean graph, in the order of its nodes.

    An empty result promises nothing: the parser itself has the last word.

    Raises:
        ModelError: the types of the graph contradict each other.
    """
    scope = _Scope(infer(model), {}, opset(model))
    found = list(_findings(model.graph, scope))
    if has_legacy_resize(model):
        nodes = [node for node in model.graph.node if node.op_type in ("Upsample", "Resize")]
        reason = f"opset {opset(model)} cannot be raised to 13: half precision and INT8 need that"
        found += [Finding(_name(node), node.op_type, reason, "export at opset 13 or newer") for node in nodes]
    return tuple(found)


@dataclass(frozen=True)
class _Scope:
    values: Mapping[str, ValueInfoProto]
    constants: Mapping[str, TensorProto]
    opset: int

    def constant(self, node: NodeProto, slot: int) -> Any:
        name = node.input[slot] if slot < len(node.input) else ""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def kind(self, name: str) -> int:
        return self.constants[name].data_type if name in self.constants else element_type(self.values.get(name))


def _findings(graph: GraphProto, scope: _Scope) -> Iterator[Finding]:
    constants = {**scope.constants, **{tensor.name: tensor for tensor in graph.initializer}}
    inner = _Scope(scope.values, constants, scope.opset)
    used = {name for node in _every_node(graph) for name in node.input} | {value.name for value in graph.output}
    for node in graph.node:
        operator = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
        for reason, way_out in _problems(node, inner, used):
            yield Finding(_name(node), operator, reason, way_out)
        for sub in subgraphs(node):
            yield from _findings(sub, inner)


def _every_node(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _every_node(inner)


def _name(node: NodeProto) -> str:
    return node.name or f"-> {node.output[0] if node.output else ''}"


def _problems(node: NodeProto, scope: _Scope, used: set[str]) -> Iterator[tuple[str, str]]:
    if node.domain not in STANDARD:
        reason = f"TensorRT's parser knows no operator {node.op_type} of {node.domain} without a plugin of that name"
        yield reason, "load the plugin, or write the layer in standard operators and export again"
        return
    if node.op_type in RULES:
        yield from RULES[node.op_type](node, scope, used)
    if node.op_type not in ("Cast", "DequantizeLinear", "If", "Loop"):
        bytes_read = [name for name in node.input if scope.kind(name) == TensorProto.UINT8]
        if bytes_read:
            yield (
                f"TensorRT takes uint8 ({', '.join(bytes_read)}) into Cast alone",
                "cast to float before any other operator, and back to uint8 last",
            )


def _resize(node: NodeProto, scope: _Scope, _: set[str]) -> Iterator[tuple[str, str]]:
    if scope.opset < 11:
        return
    settings = DEFAULTS | {a.name: helper.get_attribute_value(a) for a in node.attribute}
    settings = {key: value.decode() if isinstance(value, bytes) else value for key, value in settings.items()}
    mode, coordinates = settings["mode"], settings["coordinate_transformation_mode"]
    if settings["antialias"]:
        yield (
            "TensorRT's parser refuses antialias; TensorRT 8.6 ignores it and computes something else",
            f"interpolate with antialias=False, or {FIXED_SIZES}",
        )
    if coordinates == CROP:
        yield "TensorRT's parser refuses tf_crop_and_resize", f"{EXPORT_AGAIN}, or {FIXED_SIZES}"
    elif coordinates not in COORDINATES:
        yield f"TensorRT's parser refuses {coordinates}", EXPORT_AGAIN
    elif (coordinates == "tf_half_pixel_for_nn" and mode == "nearest") and (
        settings["nearest_mode"] != "round_prefer_floor"
    ):
        reason = f"TensorRT's parser takes tf_half_pixel_for_nn with round_prefer_floor, not {settings['nearest_mode']}"
        yield reason, EXPORT_AGAIN
    if settings["keep_aspect_ratio_policy"] != "stretch":
        reason = f"TensorRT's parser refuses the keep_aspect_ratio_policy {settings['keep_aspect_ratio_policy']}"
        yield reason, "compute the sizes outside the graph, or export with fixed image sizes"
    kind = scope.kind(node.input[0])
    if kind not in (*FLOATS, TensorProto.UNDEFINED, TensorProto.UINT8):
        reason = f"TensorRT resizes no {helper.tensor_dtype_to_np_dtype(kind).name}"
        yield reason, "cast to float before the Resize and back behind it"
    scales = scope.constant(node, 2)
    every_axis = scales is not None and "axes" not in settings
    if every_axis and mode in LAST_AXES and (scales[: -LAST_AXES[mode]] != 1).any():
        yield (
            f"TensorRT resizes the last {LAST_AXES[mode]} axes alone with {mode}",
            "resize the image's axes alone, in channels-first layout",
        )


def _max_pool(node: NodeProto, _: _Scope, used: set[str]) -> Iterator[tuple[str, str]]:
    if len(node.output) > 1 and node.output[1] and node.output[1] in used:
        yield (
            "TensorRT's parser refuses a MaxPool whose indices are used",
            "cleaning rewrites pools of k × k windows side by side, unpooled to sizes that k divides: "
            "export with fixed image sizes, or declare multiples of k for dynamic ones",
        )


def _max_unpool(*_: Any) -> Iterator[tuple[str, str]]:
    yield (
        "TensorRT has no MaxUnpool",
        "cleaning rewrites it behind a MaxPool of k × k windows side by side, over sizes that k divides: "
        "export with fixed image sizes, or replace it by Upsample in the network",
    )


RULES: dict[str, Callable[[NodeProto, _Scope, set[str]], Iterator[tuple[str, str]]]] = {
    "Resize": _resize,
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
}
