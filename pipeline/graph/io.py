"""ONNX files: read, check, write, their inputs and outputs, and the model card in their metadata."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import StringStringEntryProto, TensorProto
from onnx.numpy_helper import from_array, to_array
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import ModelCard, TensorSpec, process_name, sha256_file, sha256_json
from pipeline.errors import BuildFolderError, ModelError
from pipeline.slips import did_you_mean

CARD_KEY = "unet_trt.card"
# A protobuf message ends at 2 GiB. With more bytes of tensors than this they get a file; the rest is for the graph.
ONE_FILE_BYTES = 2_000_000_000
# Smaller tensors stay in the .onnx file: shape inference reads the values of some.
EXTERNAL_BYTES = 1024
DATA_SUFFIX = ".data"
# Pages, so that the data can be mapped into memory.
ALIGNMENT = 4096
PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
SHOWN = 5


def load_model(path: Path) -> onnx.ModelProto:
    """A checked model with its external data in memory.

    Raises:
        ModelError: missing, empty, truncated or no ONNX file; a newer IR version or opset than this onnx knows;
            external data missing, truncated or outside the file's folder; a graph that the checker refuses (a cycle is
            named).
    """
    model = _read(path)
    _refuse_future(model, path)
    external = [tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in external:
        _check_external(tensor, path)
    try:
        onnx.checker.check_model(str(path))  # by path: the large data stay where they are
        if external:
            onnx.load_external_data_for_model(model, str(path.parent))
            for tensor in external:  # as in a file without external data
                tensor.ClearField("data_location")
    except onnx.checker.ValidationError as error:
        cycle = _cycle(model.graph)
        if cycle:
            raise ModelError(
                f"the graph of {path} has a cycle: {' -> '.join([*cycle[:SHOWN], *(['…'] if cycle[SHOWN:] else [])])}",
                expected="nodes that depend on earlier ones alone",
                got=f"a cycle of {len(cycle)} node{'s' if cycle[1:] else ''} through {cycle[0]}",
                fix="export it again; ONNX writes repetition as a Loop",
            ) from error
        raise ModelError(
            f"{path} holds a graph that ONNX's checker refuses: {_one_line(error)}",
            expected="a valid ONNX graph",
            fix="export it again",
        ) from error
    except (DecodeError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return model


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, atomically, as ``write_model`` does.

    Raises:
        ModelError: the model cannot be written as ONNX.
        BuildFolderError: the folder is missing, unwritable or full; what was there is as it was.
    """
    with staged(path) as file:
        write_model(model, file)


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file, or where protobuf's limit forbids that, as ``<path>`` and ``<path>.data``.

    The data file holds the initializers of at least ``EXTERNAL_BYTES``, in the graph's order. Not atomic: for a path
    from ``staged``.

    Raises:
        ModelError: the rest of the model is too large for protobuf.
        OSError: the folder is full.
    """
    if sum(_data_bytes(tensor) for tensor in tensors(model)) > ONE_FILE_BYTES:
        with path.with_name(path.name + DATA_SUFFIX).open("wb") as file:
            stored = [_stored(tensor, file, path) for tensor in model.graph.initializer]
            _to_disk(file)
        model = with_initializers(model, stored)
    try:
        data = model.SerializeToString(deterministic=True)
    except (ValueError, EncodeError) as error:
        raise ModelError(
            f"cannot write {path.name}: the graph without its initializers is larger than a protobuf message can be",
            expected="constants of more than 2 GiB as initializers",
            got=str(error),
        ) from error
    with path.open("wb") as file:
        file.write(data)
        _to_disk(file)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path to write a model to; when the block succeeds the model takes the target's place, its data file first.

    When it fails, a model (with its data) that was at the target is as it was, and nothing else stays behind.

    Raises:
        BuildFolderError: the folder is missing, unwritable or full, here or within the block.
    """
    folder = target.with_name(f".{target.name}.{process_name()}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield folder / target.name
        _publish(folder, target)
    except OSError as error:
        raise BuildFolderError(
            f"cannot write {target}: {error.strerror or error}",
            expected="a file in a writable folder with space left",
            fix="choose another (-o or --build-dir), or free space",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_files(path: Path) -> tuple[Path, ...]:
    """An ONNX file and the files that hold its external data.

    Raises:
        ModelError: the file cannot be read.
    """
    entries = [entry for tensor in tensors(_read(path)) for entry in tensor.external_data]
    names = sorted({entry.value for entry in entries if entry.key == "location"})
    return (path, *(path.parent / name for name in names))


def with_initializers(model: onnx.ModelProto, initializers: Iterable[TensorProto]) -> onnx.ModelProto:
    """The model with other initializers, as a copy of all the rest."""
    copy = onnx.ModelProto()
    for message, new, apart in ((model, copy, "graph"), (model.graph, copy.graph, "initializer")):
        for field, value in message.ListFields():
            if field.name == apart:
                continue
            if isinstance(value, (int, str)):
                setattr(new, field.name, value)
            else:
                getattr(new, field.name).MergeFrom(value)
    copy.graph.initializer.extend(initializers)
    return copy


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model holds: initializers and attributes of all its graphs and functions."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph]
    while graphs or nodes:
        while graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


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
    model.metadata_props.extend([*kept, StringStringEntryProto(key=CARD_KEY, value=text)])


def model_inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Inputs that a caller feeds (initializers listed as inputs, as old files do, are left out)."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return _specs(value for value in model.graph.input if value.name not in fixed)


def image_input(model: onnx.ModelProto, file: Path) -> TensorSpec:
    """The one input of a model that was read from this file.

    Raises:
        ModelError: it has more, or none.
    """
    specs = model_inputs(model)
    if len(specs) != 1:
        raise ModelError(
            f"{file} has {len(specs)} inputs", expected="one image input", got=", ".join(spec.name for spec in specs)
        )
    return specs[0]


def model_outputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    return _specs(model.graph.output)


def sha256_model(path: Path) -> str:
    """Hash of an ONNX file; over it and the files of its external data where it has any.

    Of its path where it cannot be read.
    """
    try:
        return sha256_files(model_files(path))
    except (OSError, ModelError):
        return sha256_json(str(path))  # reading it for the export says what is wrong


def sha256_files(files: Sequence[Path]) -> str:
    """Hash of a file's content, or over those of several."""
    hashes = [sha256_file(file) for file in files]
    return sha256_json(hashes) if hashes[1:] else hashes[0]


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


def _read(path: Path) -> onnx.ModelProto:
    """The model without its external data.

    Raises:
        ModelError: missing, empty or no ONNX file.
    """
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise ModelError(f"{path} is empty", expected="a complete .onnx file", fix="export or copy it again")
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"the file {path} does not exist{did_you_mean(path)}", fix="check the path") from error
    except (DecodeError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not model.HasField("graph"):
        raise _unreadable(path, "it holds no graph")
    return model


def _unreadable(path: Path, reason: object) -> ModelError:
    return ModelError(
        f"{path} is not a readable ONNX file: {reason}",
        expected="a complete .onnx file",
        fix="export or copy it again",
    )


def _refuse_future(model: onnx.ModelProto, path: Path) -> None:
    """Raise ModelError where the file is of a newer standard than the installed onnx."""
    known = onnx.defs.onnx_opset_version()
    for what, have, newest in (("IR version", model.ir_version, onnx.IR_VERSION), ("opset", opset(model), known)):
        if have > newest:
            raise ModelError(
                f"{path} has {what} {have}, which onnx {onnx.__version__} does not know",
                expected=f"{what} {newest} or older",
                got=str(have),
                fix="export it for an older one, or install a newer onnx",
            )


def _check_external(tensor: TensorProto, path: Path) -> None:
    """Raise ModelError where the external data of a tensor are missing, truncated or outside the file's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file, folder = path.parent / location, path.parent.resolve()
    if not location or not file.resolve().is_relative_to(folder):
        raise ModelError(
            f"{path} keeps the data of {tensor.name} outside its folder",
            expected=f"a file in {folder}",
            got=location or "no location",
            fix="export it again with its data beside it",
        )
    if not file.is_file():
        raise ModelError(
            f"{path} keeps the data of {tensor.name} in {location}, and the file {file} does not exist",
            expected="the .onnx file with its data file beside it",
            fix="copy both, or export again",
        )
    wanted = _data_bytes(tensor)
    size = file.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", wanted))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length != wanted or offset + length > size:
        raise ModelError(
            f"the data of {tensor.name} in {file} are truncated or belong to another model",
            expected=f"{wanted} bytes from byte {entries.get('offset', 0)}",
            got=f"{entries.get('length', wanted)} bytes stated, {size} bytes in the file",
            fix="copy both files again, or export again",
        )


def _cycle(graph: onnx.GraphProto) -> list[str]:
    """The nodes of one cycle, in the direction of the data; empty where there is none."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = [{makers[name] for name in node.input if name in makers} for node in graph.node]
    # Whoever waits for nobody leaves, again and again; what cannot leave waits for a cycle.
    waiting = set(range(len(before)))
    while free := {index for index in waiting if not before[index] & waiting}:
        waiting -= free
    if not waiting:
        return []
    path = [min(waiting)]
    while (source := min(before[path[-1]] & waiting)) not in path:
        path.append(source)
    nodes = [graph.node[index] for index in reversed(path[path.index(source) :])]
    return [node.name or f"{node.op_type} of {node.output[0]}" for node in nodes]


def _data_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's values as raw data; 0 for strings, whose size no type tells."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    packed = PACKED_BITS.get(TensorProto.DataType.Name(tensor.data_type))
    bits: int = packed or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    count: int = math.prod(tensor.dims)
    return (bits * count + 7) // 8


def _stored(tensor: TensorProto, file: BinaryIO, path: Path) -> TensorProto:
    """The tensor with its values in the data file; itself where it is small."""
    if _data_bytes(tensor) < EXTERNAL_BYTES:
        return tensor
    data = tensor.raw_data if tensor.HasField("raw_data") else from_array(to_array(tensor)).raw_data
    file.write(bytes(-file.tell() % ALIGNMENT))
    stored = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        stored.doc_string = tensor.doc_string
    stored.metadata_props.extend(tensor.metadata_props)
    stored.data_location = TensorProto.EXTERNAL
    place = {"location": path.name + DATA_SUFFIX, "offset": file.tell(), "length": len(data)}
    stored.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
    file.write(data)
    return stored


def _publish(folder: Path, target: Path) -> None:
    """Move a complete model out of the folder beside the target, its data first; undo that where the model stays."""
    staged_data = folder / (target.name + DATA_SUFFIX)
    data = target.with_name(staged_data.name)
    older = folder / "older"
    if not staged_data.exists():
        os.replace(folder / target.name, target)
        return
    if data.exists():
        os.replace(data, older)
    try:
        os.replace(staged_data, data)
        os.replace(folder / target.name, target)
    except OSError:
        if older.exists():
            os.replace(older, data)
        else:
            data.unlink(missing_ok=True)
        raise


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _one_line(error: Exception) -> str:
    """What the checker says, without the surroundings that it lists."""
    return " ".join(str(error).split("==> Context")[0].split())
