"""Raising a model's opset."""

from __future__ import annotations

import onnx
from onnx import ModelProto
from onnx.version_converter import ConvertError

from pipeline.errors import ModelError
from pipeline.graph.io import opset
from pipeline.graph.shapes import set_value_info


def with_opset(model: ModelProto, least: int) -> ModelProto:
    """The model at opset ``least``, converted by ONNX's version converter; a copy where it is there already.

    Metadata and the names of nodes and tensors stay.

    Raises:
        ModelError: the converter cannot raise one of the operators, or the graph uses operators of its own domain or
            model-local functions, which the converter would lose.
    """
    result = ModelProto()
    result.CopyFrom(model)
    if opset(model) >= least:
        return result
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign or model.functions:
        raise _refused(model, least, f"it holds operators of {', '.join(sorted(foreign)) or 'model-local functions'}")
    try:
        converted = onnx.version_converter.convert_version(model, least)
    except (ConvertError, RuntimeError, ValueError) as error:
        raise _refused(model, least, str(error).strip().splitlines()[0]) from error
    _keep_metadata(model, converted)
    converted.ir_version = max(
        model.ir_version, onnx.helper.find_min_ir_version_for(list(converted.opset_import), ignore_unknown=True)
    )
    set_value_info(converted)
    return converted


def _keep_metadata(model: ModelProto, converted: ModelProto) -> None:
    """The converter goes through ONNX's C++ IR, which knows no metadata."""
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    converted.domain, converted.model_version, converted.doc_string = (
        model.domain,
        model.model_version,
        model.doc_string,
    )
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    del converted.graph.metadata_props[:]
    converted.graph.metadata_props.extend(model.graph.metadata_props)
    nodes = {node.name: node for node in model.graph.node if node.name}
    for node in converted.graph.node:
        if node.name in nodes:
            del node.metadata_props[:]
            node.metadata_props.extend(nodes[node.name].metadata_props)
    for kept, fresh in ((model.graph.input, converted.graph.input), (model.graph.output, converted.graph.output)):
        by_name = {value.name: value for value in kept}
        for value in fresh:
            if value.name in by_name:
                value.CopyFrom(by_name[value.name])


def _refused(model: ModelProto, least: int, reason: str) -> ModelError:
    return ModelError(
        f"the graph cannot be raised from opset {opset(model)} to {least}: {reason}",
        expected=f"opset {least} or newer",
        fix=f"set export.opset: {least} or higher and export again",
    )
