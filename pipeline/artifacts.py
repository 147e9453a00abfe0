"""What passes between stages: hashes, manifests, JSON, atomic files and folders, and the lock on a build folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.config import ClassConfig, Precision, PreprocessingConfig, Task
from pipeline.errors import BuildFolderError

log = logging.getLogger(__name__)
T = TypeVar("T")
SCHEMA_VERSION = 1
Output = Literal["logits", "labels", "probabilities"]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; a dynamic axis has a name instead of a size. ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def output_kind(spec: TensorSpec) -> Output:
    """What a model's output holds: integers are labels, floats logits unless they are called probabilities."""
    if spec.dtype.startswith(("int", "uint")):
        return "labels"
    return "probabilities" if spec.name.startswith("probabilities") else "logits"


@dataclass(frozen=True)
class Profile:
    """Shapes of one input that an engine with dynamic axes accepts."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """A GPU as an engine is bound to it; ``compute_capability`` such as "9.0"."""

    name: str
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class ModelCard:
    """What a model file says of itself beside its graph: travels in ONNX metadata and in engine manifests.

    ``label_values`` maps values in label files to class ids; None where they are equal. With ``task`` tensors there may
    be no classes.
    """

    name: str
    preprocessing: PreprocessingConfig
    classes: tuple[ClassConfig, ...]
    void: int | None = None
    label_values: dict[int, int] | None = None
    task: Task = "segmentation"


@dataclass(frozen=True)
class EngineManifest:
    """Beside every engine, and checked before the engine is loaded.

    ``options`` are the build options that it was built with, by their names in the configuration's ``engine``;
    ``multiples`` and ``aligns_corners`` what the graph says of the sizes to feed, as in ``pipeline.facts.Facts``.
    """

    engine_sha256: str
    onnx_sha256: str
    cache_sha256: str | None
    precision: Precision
    route: str
    backend: str
    backend_version: str
    device: Device | None
    target_capabilities: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: dict[str, Profile]
    card: ModelCard | None
    build_seconds: float
    timing_cache: str
    created: str
    notes: tuple[str, ...] = ()
    options: dict[str, bool | int | str] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)
    aligns_corners: bool = False
    schema_version: int = field(default=SCHEMA_VERSION)


@dataclass(frozen=True)
class ServedModel:
    """What a packaged model says of itself beside its tensors: a parameter in Triton's ``config.pbtxt``, and
    ``model.json`` in an archive.

    ``profiles`` are the engine's. ``multiples`` and ``aligns_corners`` as in ``EngineManifest``, but by role (batch,
    height, width) instead of the graph's own axis names.
    """

    card: ModelCard
    precision: Precision
    profiles: dict[str, Profile]
    multiples: dict[str, int]
    aligns_corners: bool
    schema_version: int = field(default=SCHEMA_VERSION)


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def tool_version(package: str) -> str | None:
    """Version of an installed package, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def to_json(value: Any) -> bytes:
    """A pydantic dataclass as indented JSON."""
    return TypeAdapter(type(value)).dump_json(value, indent=2) + b"\n"


def from_json(kind: type[T], path: Path) -> T:
    """Read back what ``to_json`` wrote.

    Raises:
        BuildFolderError: the file is missing, damaged or of another schema.
    """
    try:
        value = TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise BuildFolderError(
            f"cannot read {path}: {error.strerror}", expected=f"a {kind.__name__} as JSON", fix="run its stage again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BuildFolderError(
            f"{path} is damaged or from another version",
            expected=f"a {kind.__name__} of schema {SCHEMA_VERSION}",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix="run its stage again",
        ) from error
    if getattr(value, "schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise BuildFolderError(
            f"{path} is from another version",
            expected=f"schema {SCHEMA_VERSION}",
            got=f"schema {getattr(value, 'schema_version', None)}",
            fix="run its stage again",
        )
    return value


def process_name(pid: int | None = None) -> str:
    """This process, or another of this machine, among those of all machines that share a folder; without dots."""
    return f"{platform.node().replace('.', '-')}-{os.getpid() if pid is None else pid}"


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write beside the target, fsync, replace: readers see the old file or the whole new one.

    Args:
        durable: fsync, which takes milliseconds; without it, that holds unless the machine itself breaks down.

    Raises:
        BuildFolderError: the folder is missing, unwritable or full; the target is as it was.
    """
    partial = path.with_name(f".{path.name}.{process_name()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the target's place when the block succeeds and vanishes when it does not.

    Raises:
        BuildFolderError: the folder above is unwritable or full; the target is as it was.
    """
    partial = target.with_name(f".{target.name}.{process_name()}.partial")
    old = target.with_name(f".{target.name}.{process_name()}.old")
    with _writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with _writing(target):
            for path in partial.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(partial, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear what a killed process left of ``replaced_folder`` and ``write_atomically``; call it with the lock held."""
    for old in folder.rglob(".*.old"):
        target = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)
    for partial in folder.rglob(".*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(target, error) from error


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Exclusive use of a build folder; a second process says who holds it and waits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            log.warning("%s is in use by %s; waiting", folder, file.read().strip() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


@contextlib.contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """An empty folder beside a file, to make its new content in; gone when the block ends.

    The folder that holds the file is locked meanwhile, without a file in it: a second process says so and waits. What
    killed processes left is cleared. Where the file system has no locks on folders there is none.

    Raises:
        BuildFolderError: the folder is unwritable or full, in the block too.
    """
    with _writing(target), contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.parent, os.O_RDONLY)
        stack.callback(os.close, handle)
        if _locked(handle, target.parent):
            for left in target.parent.glob(f".{target.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        made = target.with_name(f".{target.name}.{process_name()}.partial")
        made.mkdir()
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        yield made


def _locked(handle: int, folder: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s is in use by another process; waiting", folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # such as a network file system's
        log.debug("%s cannot be locked: %s", folder, error)
        return False
    return True


def _unwritable(path: Path, error: OSError) -> BuildFolderError:
    return BuildFolderError(
        f"cannot write {path}: {error.strerror or error}",
        expected="a folder that exists, can be written to and has space left",
        fix="make the folder, free space, or choose another path: by --build-dir (BUILD=) if it is a build folder",
    )
