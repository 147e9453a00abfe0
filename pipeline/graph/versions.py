"""Raising a model's opset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.version_converter import ConvertError

from pipeline.errors import ModelError
from pipeline.graph.base import STANDARD, UNLISTED_IR
from pipeline.graph.io import opset
from pipeline.graph.shapes import LARGE, all_names, infer, set_value_info, subgraphs, unique

# Before this opset a Resize says nothing about coordinates, and Upsample exists.
RESIZE_OPSET = 11
# From this one on, roi and scales may be left out.
OPTIONAL_OPSET = 13
# The converter leaves operators of other domains alone; legacy resizes go through it under this one.
STAND_IN = "unet_trt.legacy"


def with_opset(model: ModelProto, least: int) -> ModelProto:
    """The model at opset ``least``, converted by ONNX's version converter; a copy where it is there already.

    Upsample and the Resize of opset 10 become Resize here, not in the converter, which forgets that their coordinates
    are asymmetric; with such a node, ``least`` is at least 13. As ONNX Runtime computes them, nearest takes the source
    pixel below where it enlarges and the one above where it shrinks.

    Metadata and the names of nodes and tensors stay; operators of other domains pass through.

    Raises:
        ModelError: the converter cannot raise one of the operators; a legacy node computes its scales, or has none; the
            graph holds model-local functions or foreign operators with subgraphs, which the converter would lose.
    """
    result = ModelProto()
    result.CopyFrom(model)
    if opset(model) >= least:
        return result
    if model.functions:
        raise _refused(model, least, "it holds model-local functions")
    for node in _every_node(model.graph):
        if node.domain not in STANDARD and subgraphs(node):
            raise _refused(model, least, f"the operator {node.domain}::{node.op_type} ({_label(node)}) holds a graph")
    work = _light(model)
    if has_legacy_resize(model):
        least = max(least, OPTIONAL_OPSET)
        _stand_in(work, all_names(model), least)
    try:
        converted = onnx.version_converter.convert_version(work, least)
    except (ConvertError, RuntimeError, ValueError) as error:
        raise _refused(model, least, str(error).strip().splitlines()[0]) from error
    for node in _every_node(converted.graph):
        if node.domain == STAND_IN:
            node.domain = ""
    _restore(model, converted)
    converted.ir_version = max(
        model.ir_version, helper.find_min_ir_version_for(list(converted.opset_import), ignore_unknown=True)
    )
    set_value_info(converted)
    return converted


def has_legacy_resize(model: ModelProto) -> bool:
    """Whether the graph or a subgraph holds an Upsample, or a Resize of opset 10."""
    return opset(model) < RESIZE_OPSET and any(_is_legacy(node) for node in _every_node(model.graph))


def _is_legacy(node: NodeProto) -> bool:
    return node.op_type in ("Upsample", "Resize") and node.domain in STANDARD


def _every_node(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _every_node(inner)


def _light(model: ModelProto) -> ModelProto:
    """A copy with types and shapes of all tensors, and with large and sparse initializers declared as inputs."""
    work = ModelProto()
    work.CopyFrom(model)
    work.ir_version = max(model.ir_version, UNLISTED_IR)
    del work.graph.value_info[:]
    outer = {value.name for value in (*model.graph.input, *model.graph.output)}
    work.graph.value_info.extend(value for name, value in infer(model).items() if name not in outer)
    kept = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims, dtype=np.int64) <= LARGE]
    small = {tensor.name for tensor in kept}
    cut = [(t.name, t.data_type, t.dims) for t in model.graph.initializer if t.name not in small]
    cut += [(t.values.name, t.values.data_type, t.dims) for t in model.graph.sparse_initializer]
    del work.graph.initializer[:], work.graph.sparse_initializer[:]
    work.graph.initializer.extend(kept)
    for name, kind, dims in cut:
        if name not in outer:
            work.graph.input.append(helper.make_tensor_value_info(name, kind, list(dims)))
    return work


def _stand_in(model: ModelProto, taken: set[str], least: int) -> None:
    """Replace every legacy node by Resize nodes of the stand-in domain."""

    def visit(graph: GraphProto, outer: Mapping[str, NDArray[Any]]) -> None:
        known = {**outer, **{tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        nodes: list[NodeProto] = []
        for node in graph.node:
            for inner in subgraphs(node):
                visit(inner, known)
            nodes += _modern(node, graph, known) if _is_legacy(node) else [node]
        fresh = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(fresh)

    def _modern(node: NodeProto, graph: GraphProto, known: Mapping[str, NDArray[Any]]) -> list[NodeProto]:
        scales = _scales(node, known)
        mode = next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")
        mode = "linear" if mode == "bilinear" else mode
        computed = node.input[1] if scales is None and len(node.input) > 1 else ""
        shrinks = node.op_type == "Resize" and mode == "nearest"
        if scales is None and (shrinks or not computed):
            raise _refused(model, least, f"{node.op_type} {_label(node)} has no constant scales", "clean the model")
        steps: list[tuple[str, str]] = []
        if scales is None:
            steps.append((computed, "floor"))
        else:
            parts = [(scales, "floor")]
            if shrinks and (scales < 1).any():
                parts = [(np.minimum(scales, 1), "ceil"), (np.maximum(scales, 1), "floor")]
                parts = parts if (scales > 1).any() else parts[:1]
            for part, rounding in parts:
                name = unique(f"{node.output[0]}.scales", taken)
                graph.initializer.append(numpy_helper.from_array(part.astype(np.float32), name))
                steps.append((name, rounding))
        result: list[NodeProto] = []
        source = node.input[0]
        for index, (scale, rounding) in enumerate(steps):
            last = index == len(steps) - 1
            target = node.output[0] if last else unique(f"{node.output[0]}.smaller", taken)
            name = node.name if last or not node.name else unique(f"{node.name}.smaller", taken)
            resize = helper.make_node(
                "Resize", [source, "", scale], [target], name=name, domain=STAND_IN, doc_string=node.doc_string,
                mode=mode, coordinate_transformation_mode="asymmetric",
            )  # fmt: skip
            if mode == "nearest":
                resize.attribute.append(helper.make_attribute("nearest_mode", rounding))
            result.append(resize)
            source = target
        return result

    visit(model.graph, {})
    model.opset_import.append(helper.make_opsetid(STAND_IN, 1))


def _scales(node: NodeProto, known: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if len(node.input) > 1:
        value = known.get(node.input[1])
        return None if value is None else value.astype(np.float32)
    if "scales" in attributes:  # opset 7
        return np.array(attributes["scales"], np.float32)
    if "height_scale" in attributes and "width_scale" in attributes:  # opset 1
        return np.array([1, 1, attributes["height_scale"], attributes["width_scale"]], np.float32)
    return None


def _restore(model: ModelProto, converted: ModelProto) -> None:
    """The converter goes through ONNX's C++ IR, which knows no metadata, sparse tensors and operator overloads."""
    for message, fresh in ((model, converted), (model.graph, converted.graph)):
        del fresh.metadata_props[:]
        fresh.metadata_props.extend(message.metadata_props)
        fresh.doc_string = message.doc_string
    converted.domain, converted.model_version = model.domain, model.model_version
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    version = opset(converted)
    del converted.opset_import[:]
    converted.opset_import.append(helper.make_opsetid("", version))
    converted.opset_import.extend(entry for entry in model.opset_import if entry.domain not in STANDARD)
    graph = converted.graph
    graph.name = model.graph.name
    own = {tensor.name for tensor in model.graph.initializer}
    added: list[TensorProto] = [tensor for tensor in graph.initializer if tensor.name not in own]
    for field in ("input", "output", "initializer", "sparse_initializer", "quantization_annotation"):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(getattr(model.graph, field))
    graph.initializer.extend(added)
    origins = {node.output[0]: node for node in model.graph.node if node.output}
    for node in graph.node:
        origin = origins.get(node.output[0]) if node.output else None
        if origin is None:
            continue
        if origin.domain not in STANDARD:
            node.CopyFrom(origin)
        elif origin.op_type == node.op_type or (_is_legacy(origin) and node.op_type == "Resize"):
            node.name, node.doc_string = origin.name, origin.doc_string
            del node.metadata_props[:]
            node.metadata_props.extend(origin.metadata_props)


def _label(node: NodeProto) -> str:
    return node.name or f"-> {node.output[0]}"


def _refused(model: ModelProto, least: int, reason: str, fix: str = "") -> ModelError:
    return ModelError(
        f"the graph cannot be raised from opset {opset(model)} to {least}: {reason}",
        expected=f"opset {least} or newer",
        fix=fix or f"set export.opset: {least} or higher and export again",
    )
