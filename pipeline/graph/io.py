"""ONNX files: read, check, write, their inputs and outputs, and the model card in their metadata."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import ModelCard, TensorSpec, sha256_file, sha256_json, write_atomically
from pipeline.errors import ModelError

CARD_KEY = "unet_trt.card"


def load_model(path: Path) -> onnx.ModelProto:
    """A checked model with its external data.

    Raises:
        ModelError: missing, truncated or no ONNX file, missing external data, or a graph that the checker refuses.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(str(path) if _has_external_data(path) else model)
    except FileNotFoundError as error:
        raise ModelError(f"the file {error.filename or path} does not exist", fix="check the path") from error
    except (DecodeError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable ONNX file: {error}",
            expected="a complete .onnx file",
            fix="export or copy it again",
        ) from error
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"{path} holds a graph that ONNX's checker refuses: {str(error).strip().splitlines()[0]}",
            expected="a valid ONNX graph",
            fix="export it again",
        ) from error
    return model


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file, atomically.

    Raises:
        ModelError: the model is larger than a protobuf message can be (2 GiB).
        BuildFolderError: the folder is unwritable or full.
    """
    try:
        data = model.SerializeToString(deterministic=True)
    except (ValueError, DecodeError) as error:
        raise ModelError(f"cannot write {path} as one file: {error}", expected="a model of at most 2 GiB") from error
    write_atomically(path, data)


def read_card(model: onnx.ModelProto) -> ModelCard | None:
    """The model card that export put into the metadata; None for models from elsewhere."""
    for entry in model.metadata_props:
        if entry.key == CARD_KEY:
            try:
                return TypeAdapter(ModelCard).validate_json(entry.value)
            except ValidationError as error:
                raise ModelError(f"the metadata {CARD_KEY} is damaged", fix="export the model again") from error
    return None


def write_card(model: onnx.ModelProto, card: ModelCard) -> None:
    """Put a model card into the metadata, in place of an older one."""
    text = TypeAdapter(ModelCard).dump_json(card).decode()
    kept = [entry for entry in model.metadata_props if entry.key != CARD_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=CARD_KEY, value=text)])


def model_inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Inputs that a caller feeds (initializers listed as inputs, as old files do, are left out)."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return _specs(value for value in model.graph.input if value.name not in fixed)


def model_outputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    return _specs(model.graph.output)


def sha256_model(path: Path) -> str:
    """Hash over an ONNX file and the files that hold its external data; of its path where it cannot be read."""
    try:
        bare = onnx.load(path, load_external_data=False)
        entries = [entry for tensor in bare.graph.initializer for entry in tensor.external_data]
        names = sorted({entry.value for entry in entries if entry.key == "location"})
        return sha256_json([sha256_file(file) for file in (path, *(path.parent / name for name in names))])
    except (OSError, DecodeError):
        return sha256_json(str(path))  # reading it for the export says what is wrong


def opset(model: onnx.ModelProto) -> int:
    """Version of the default operator domain."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name,
            tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            ),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        )
        for value in values
    )


def _has_external_data(path: Path) -> bool:
    bare = onnx.load(path, load_external_data=False)
    return any(t.data_location == onnx.TensorProto.EXTERNAL for t in bare.graph.initializer)
