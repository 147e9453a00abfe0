"""Triton model repositories: ``config.pbtxt`` and version folders, written whole, and checked without a server.

The configuration is made and read with the protobuf schema that ``tritonclient`` brings (``model_config.proto``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import ServedModel, TensorSpec, sha256_file, workshop, write_atomically
from pipeline.backends.remote import MODEL_KEY, SHA256_KEY, TIMEOUT
from pipeline.engines import MANIFEST, read_manifest
from pipeline.errors import BuildFolderError, ConfigError, UnsupportedError
from pipeline.graph.io import load_model, model_inputs, model_outputs

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG, LABELS = "config.pbtxt", "labels.txt"
Platform = Literal["tensorrt_plan", "onnxruntime_onnx", "python"]
# What Triton loads, and what holds the network.
FILES: dict[str, tuple[str, str]] = {
    "tensorrt_plan": ("model.plan", "model.plan"),
    "onnxruntime_onnx": ("model.onnx", "model.onnx"),
    "python": ("model.py", "model.onnx"),
}
# Largest batch that requests are put together to where the model sets no limit of its own.
BATCH = 8
# How long a request may wait for others to share its batch.
DELAY_MICROSECONDS = 500
# Requests that may wait; more are refused at once.
QUEUE = 256


@dataclass(frozen=True)
class TritonModel:
    """A model to put into a repository.

    Attributes:
        name: that clients ask for.
        served: what they are told beside the tensors.
        files: of its version folder.
        most: largest batch, where the batch is free.
        instances: that work at a time, on each GPU or on the CPU.
    """

    name: str
    platform: Platform
    served: ServedModel
    files: Mapping[str, Path]
    most: int = BATCH
    instances: int = 1


def add_version(repository: Path, model: TritonModel, version: int | None = None, *, overwrite: bool = False) -> Path:
    """Put a model into a repository: a new model, or a new version of one that is there.

    A new model appears as a whole, a new version behind its configuration. What a model's versions share, which is all
    of ``config.pbtxt`` but the files' hashes, has to be equal. Everything is checked before it is moved into place.

    Args:
        version: default: the one after the newest.
        overwrite: replace the version where it exists.

    Returns:
        The version's folder.

    Raises:
        BuildFolderError: the version exists, or the model is there with another configuration; the repository is
            unwritable or full. What was there is as it was.
        ConfigError: the name or the version is none for Triton.
        UnsupportedError: ``tritonclient`` is not installed.
    """
    require_schema()
    _check_names(model, version)
    target, real = repository / model.name, repository.resolve()
    with workshop(real if _can_move_into(real) else target) as made:
        there = versions(target)
        if target.exists() and not (target / CONFIG).is_file():
            raise BuildFolderError(f"{target} has no {CONFIG}, so it is no model of Triton's", fix="choose another -o")
        version = version or max(there, default=0) + 1
        if version in there and not overwrite:
            raise BuildFolderError(
                f"version {version} of {target} exists",
                fix="leave --model-version out for a new one, or give --overwrite",
            )
        new = made / model.name
        folder = new / str(version)
        folder.mkdir(parents=True)
        for name, source in model.files.items():
            shutil.copyfile(source, folder / name)
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        config = make_config(model, folder)
        others = [one for one in there if one != version]
        if others:
            _join(config, read_config(target / CONFIG), others, target)
        labels = "".join(f"{one.name}\n" for one in model.served.card.classes)
        write_atomically(new / LABELS, labels.encode())
        write_atomically(new / CONFIG, _text(config))
        check_model(new)
        if not target.exists():
            repository.mkdir(exist_ok=True)
            os.replace(new, target)
        else:
            _exchange(new, target, version, made)
    return target / str(version)


def _can_move_into(repository: Path) -> bool:
    """Whether what is made beside the repository can be renamed into it: not where it is a file system of its own.

    A server that polls takes any folder in the repository for a model, and unloads the others while one is not whole.
    """
    return not repository.exists() or repository.stat().st_dev == repository.parent.stat().st_dev


def _exchange(new: Path, target: Path, version: int, made: Path) -> None:
    """Move a version into a model's folder: Triton in poll mode sees configuration and labels first."""
    place = target / str(version)
    for name in (LABELS, CONFIG):
        os.replace(new / name, target / name)
    if place.exists():
        os.replace(place, made / "old")
    os.replace(new / str(version), place)


def versions(model: Path) -> list[int]:
    """Version folders of a model, as Triton sees them: numbers without a leading zero."""
    names = [path.name for path in model.iterdir() if path.is_dir()] if model.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))


def check_model(model: Path) -> ModelConfig:
    """Read a model's ``config.pbtxt`` by Triton's own schema and compare it with what the version folders hold.

    Args:
        model: its folder in the repository.

    Returns:
        The configuration.

    Raises:
        BuildFolderError: the file is missing or no configuration; there is no version; a model file is missing or
            another than the recorded one; its tensors have other names, types or sizes; a batch is promised that it
            does not take; labels are not the classes.
    """
    config = read_config(model / CONFIG)
    if config.name and config.name != model.name:
        raise _wrong(model, "its name", model.name, config.name)
    platform = config.platform or config.backend
    if platform not in FILES:
        raise _wrong(model, "platform", ", ".join(FILES), platform or "none")
    there = versions(model)
    if not there:
        raise _wrong(model, "a version folder", "such as 1", "none")
    try:
        served = TypeAdapter(ServedModel).validate_json(config.parameters[MODEL_KEY].string_value)
    except ValidationError as error:
        raise _wrong(model, MODEL_KEY, "what unet-trt writes", error.errors()[0]["msg"]) from error
    for version in there:
        folder, (entry, network) = model / str(version), FILES[platform]
        for name in (config.default_model_filename or entry, network):
            if not (folder / name).is_file():
                raise _wrong(model, f"version {version}", name, "no such file")
        sha = config.parameters[f"{SHA256_KEY}{version}"].string_value
        if sha != sha256_file(folder / network):
            raise _wrong(model, f"{network} of version {version}", f"sha256 {sha or 'is not recorded'}", "another file")
        sources, results = real_tensors(folder)
        batched = config.max_batch_size > 0
        if batched and not _is_free(sources, results):
            raise _wrong(model, "max_batch_size", "0, as the batch is fixed", str(config.max_batch_size))
        for kind, real, said in (("inputs", sources, config.input), ("outputs", results, config.output)):
            want = [(spec.name, _type(spec), _dims(spec, batched)) for spec in real]
            have = [(one.name, one.data_type, list(one.dims)) for one in said]
            if want != have:
                raise _wrong(model, f"{kind} of version {version}", str(want), str(have))
    classes = [one.name for one in served.card.classes]
    if classes and (model / LABELS).read_text(encoding="utf-8").splitlines() != classes:
        raise _wrong(model, LABELS, ", ".join(classes), "other lines")
    return config


def real_tensors(folder: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the network in a version folder: as the engine's manifest has them, or the ONNX graph.

    Raises:
        EngineError, ModelError: it is damaged.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return manifest.inputs, manifest.outputs
    graph = load_model(folder / "model.onnx")
    return model_inputs(graph), model_outputs(graph)


def make_config(model: TritonModel, folder: Path) -> ModelConfig:
    """The configuration of a model with one version, whose folder holds its files.

    1. The batch axis becomes ``max_batch_size`` where it is free in every tensor; requests of one shape are then put
       together, wait for each other no longer than 0.5 ms, and are refused where 256 wait already, or as soon as they
       have waited for as long as their client does (60 s, unless it says). Otherwise all sizes are exact, and 0.
    2. A warm-up with one image, and one with the largest batch, so that no client waits for what is set up then.
    3. ``tensorrt_plan``: on GPUs; CUDA graphs where all sizes but the batch are fixed; output copied on a stream of
       its own. ``onnxruntime_onnx``: on GPUs where there are any. ``python``: on the CPU.
    4. Preprocessing, classes and colours, promises about sizes and the file's sha256 as parameters, for clients.
    """
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

    sources, results = real_tensors(folder)
    batched, (entry, network) = _is_free(sources, results), FILES[model.platform]
    config = ModelConfig(name=model.name, default_model_filename=entry)
    if model.platform == "python":
        config.backend = "python"
    else:
        config.platform = model.platform
    config.max_batch_size = model.most if batched else 0
    for spec in sources:
        config.input.add(name=spec.name, data_type=_type(spec), dims=_dims(spec, batched))
    for spec in results:
        label = LABELS if model.served.card.classes else ""
        config.output.add(name=spec.name, data_type=_type(spec), dims=_dims(spec, batched), label_filename=label)
    kinds = {"tensorrt_plan": "KIND_GPU", "onnxruntime_onnx": "KIND_AUTO", "python": "KIND_CPU"}
    config.instance_group.add(count=model.instances, kind=ModelInstanceGroup.Kind.Value(kinds[model.platform]))
    if batched:
        batching = config.dynamic_batching
        batching.max_queue_delay_microseconds = DELAY_MICROSECONDS
        policy = batching.default_queue_policy
        policy.timeout_action = ModelQueuePolicy.TimeoutAction.Value("REJECT")
        policy.default_timeout_microseconds = int(TIMEOUT * 1e6)
        policy.allow_timeout_override = True
        policy.max_queue_size = QUEUE
    if model.platform != "python":
        config.optimization.input_pinned_memory.enable = config.optimization.output_pinned_memory.enable = True
    if model.platform == "tensorrt_plan":
        config.optimization.cuda.graphs = all(size > 0 for one in config.input for size in one.dims)
        config.optimization.cuda.output_copy_stream = True
    for batch in dict.fromkeys((1, config.max_batch_size or 1)):
        warmup = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        for spec, said in zip(sources, config.input, strict=True):
            sizes = _typical(spec, model.served)[1 if batched else 0 :]
            warmup.inputs[said.name].data_type = said.data_type
            warmup.inputs[said.name].dims.extend(sizes)
            warmup.inputs[said.name].zero_data = True
    served = TypeAdapter(ServedModel).dump_json(model.served).decode()
    config.parameters[MODEL_KEY].string_value = served
    config.parameters[f"{SHA256_KEY}{folder.name}"].string_value = sha256_file(folder / network)
    return config


def read_config(path: Path) -> ModelConfig:
    """A ``config.pbtxt`` by Triton's own schema.

    Raises:
        BuildFolderError: it cannot be read, or is no such text.
        UnsupportedError: ``tritonclient`` is not installed.
    """
    require_schema()
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BuildFolderError(
            f"{path} is no configuration of Triton's: {error}", fix="package the model again"
        ) from error


def require_schema() -> None:
    """Raise UnsupportedError where ``tritonclient``, which brings the schema, is not installed."""
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"model repositories are written with tritonclient's schema: {error}", fix="pip install 'unet-trt[serve]'"
        ) from error


def _check_names(model: TritonModel, version: int | None) -> None:
    if not model.name or model.name != Path(model.name).name or model.name.startswith(".") or " " in model.name:
        raise ConfigError(f"{model.name!r} is no name of a model", expected="a name without / and spaces")
    if version is not None and version < 1:
        raise ConfigError(f"version {version}", expected="1 or more")
    if model.instances < 1:
        raise ConfigError(f"{model.instances} instances", expected="1 or more")


def _join(config: ModelConfig, before: ModelConfig, others: Iterable[int], target: Path) -> None:
    """Add the hashes of the other versions; what all versions share has to be the same.

    Raises:
        BuildFolderError: it is not.
    """
    plain = [type(config)(), type(config)()]
    for copy, one in zip(plain, (before, config), strict=True):
        copy.CopyFrom(one)
        for key in [key for key in copy.parameters if key.startswith(SHA256_KEY)]:
            del copy.parameters[key]
    if plain[0] != plain[1]:
        fields = [f.name for f in config.DESCRIPTOR.fields if getattr(plain[0], f.name) != getattr(plain[1], f.name)]
        raise BuildFolderError(
            f"{target} has versions with another {CONFIG}, which all versions of a model share",
            expected=f"the same {', '.join(fields)}",
            fix="give the model another --name, or remove the versions that are no longer wanted",
        )
    for other in others:
        key = f"{SHA256_KEY}{other}"
        config.parameters[key].string_value = before.parameters[key].string_value


def _text(config: ModelConfig) -> bytes:
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    return text.encode()


def _is_free(sources: Iterable[TensorSpec], results: Iterable[TensorSpec]) -> bool:
    """Whether every tensor's first axis, the batch, is free."""
    return all(spec.shape and isinstance(spec.shape[0], str) for spec in (*sources, *results))


def _dims(spec: TensorSpec, batched: bool) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in spec.shape[1 if batched else 0 :]]


def _type(spec: TensorSpec) -> Any:
    from tritonclient.grpc.model_config_pb2 import DataType
    from tritonclient.utils import np_to_triton_dtype

    return DataType.Value(f"TYPE_{np_to_triton_dtype(np.dtype(spec.dtype))}")


def _typical(spec: TensorSpec, served: ServedModel) -> list[int]:
    """A size of an input that the model takes: the profile's, or that of the configured images."""
    if spec.name in served.profiles:
        return list(served.profiles[spec.name].opt)
    size = served.card.preprocessing
    image, channels = [size.height, size.width], [size.channel_count]
    free = [1, *image, *channels] if spec.dtype == "uint8" else [1, *channels, *image]
    return [have if isinstance(have, int) else free[place] for place, have in enumerate(spec.shape)]


def _wrong(model: Path, what: str, expected: str, got: str) -> BuildFolderError:
    return BuildFolderError(
        f"{model / CONFIG} does not fit: {what}", expected=expected, got=got, fix="package the model again"
    )
