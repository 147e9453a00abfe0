"""Loading engines: the manifest is checked first, and says in one line what does not match."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from pipeline.artifacts import SCHEMA_VERSION, EngineManifest, from_json, sha256_bytes
from pipeline.backends import cuda, tensorrt, tensorrt_rtx
from pipeline.backends.runner import EngineRunner
from pipeline.errors import BuildFolderError, EngineError, PipelineError, UnsupportedError
from pipeline.slips import did_you_mean

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Compute capability of the oldest GPUs that hardware-compatible engines run on.
AMPERE = (8, 0)
REBUILD = "build the engine again on this machine"
APIS = {"tensorrt": tensorrt.api, "tensorrt-rtx": tensorrt_rtx.api}


def read_manifest(path: Path) -> EngineManifest:
    """The manifest of an engine file, or of a folder that holds one, or the manifest file itself.

    Raises:
        EngineError: missing, damaged, or of another schema.
    """
    if path.is_dir() or path.name != MANIFEST:
        path = (path if path.is_dir() else path.parent) / MANIFEST
    try:
        version = json.loads(path.read_bytes()).get("schema_version")
    except FileNotFoundError as error:
        raise EngineError(f"there is no {path}", expected="a manifest beside the engine", fix=REBUILD) from error
    except (OSError, ValueError, AttributeError) as error:
        raise EngineError(f"{path} is not a readable manifest: {error}", fix=REBUILD) from error
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}", fix=f"{REBUILD} and program"
        )
    try:
        return from_json(EngineManifest, path)
    except BuildFolderError as error:
        raise EngineError(error.problem, expected=error.expected, got=error.got, fix=REBUILD) from error


def load_engine(path: Path, *, trust: bool = False) -> EngineRunner:
    """Load an engine whose manifest matches the file, the installed library and this GPU.

    Nothing of the engine is interpreted before every check has passed: deserialising executes what is in it.

    Args:
        path: of ``model.engine``; its manifest lies beside it.
        trust: load it although it lacks a manifest or does not match (each mismatch is logged as a warning).

    Raises:
        EngineError: naming, in its first line, what does not match.
        UnsupportedError: its library is not installed, or there is no GPU that it runs on.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"cannot read the engine {path}: {error.strerror}{did_you_mean(path)}", fix="check the path"
        ) from error
    try:
        manifest = read_manifest(path)
        _check_file(path, plan, manifest)
    except EngineError as error:
        if not trust:
            raise
        log.warning("%s", error.problem)
        try:
            manifest = read_manifest(path)
        except EngineError:
            return EngineRunner(_any_api(), plan)
    trt = _api(path, manifest)
    try:
        check_machine(path, manifest, trt.__version__)
    except EngineError as error:
        if not trust:
            raise
        log.warning("%s", error.problem)
    axes = {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.outputs)}
    return EngineRunner(trt, plan, axes=axes, host_code=bool(manifest.options.get("version_compatible")))


def check_machine(path: Path, manifest: EngineManifest, version: str) -> None:
    """Compare what the engine was built with and for against the library's version and this GPU.

    A version-compatible engine takes later versions of its library, up to the next major one; a hardware-compatible one
    takes every GPU from Ampere on. A newer driver is warned of, and for hardware-compatible engines an older one too.

    Raises:
        EngineError: another version of the library, another GPU, or an older driver.
        UnsupportedError: no GPU, or, for engines built ahead of time, none of their targets.
    """
    if manifest.backend_version != version and not _serves(manifest, version):
        raise EngineError(
            f"{path} was built with {manifest.backend} {manifest.backend_version}, installed is {version}",
            fix=f"{REBUILD}, or install {manifest.backend} {manifest.backend_version}",
        )
    here = cuda.current_device()
    if manifest.target_capabilities:
        if here.compute_capability not in manifest.target_capabilities:
            raise UnsupportedError(
                f"{path} runs on compute capability {', '.join(manifest.target_capabilities)}, "
                f"this GPU ({here.name}) has {here.compute_capability}",
                fix="use --backend tensorrt on this GPU, or run the engine on one of its targets",
            )
        return
    built = manifest.device
    if built is None:
        raise EngineError(f"the manifest of {path} names no GPU", expected="the GPU it was built on", fix=REBUILD)
    ampere = _number(here.compute_capability) >= AMPERE
    portable = bool(manifest.options.get("hardware_compatible"))
    if not (portable and ampere):
        pairs = [
            ("on a", built.name, here.name),
            ("for compute capability", built.compute_capability, here.compute_capability),
        ]
        for what, then, now in pairs:
            if then != now:
                raise EngineError(
                    f"{path} was built {what} {then}, this machine has {now}",
                    expected="a GPU of compute capability 8.0 (Ampere) or newer" if portable else "",
                    fix=f"{REBUILD}, or elsewhere with engine.hardware_compatible: true" if ampere else REBUILD,
                )
    if built.driver != here.driver:
        said = f"{path} was built with driver {built.driver}, this machine has {here.driver}"
        if not portable and not _is_newer(here.driver, built.driver):
            raise EngineError(said, expected=f"driver {built.driver} or newer", fix=f"{REBUILD}, or update its driver")
        log.warning("%s; its latency may be another", said)


def _serves(manifest: EngineManifest, version: str) -> bool:
    """Whether a version-compatible engine loads in another version of its library."""
    built, here = _number(manifest.backend_version), _number(version)
    return bool(manifest.options.get("version_compatible")) and built[:1] == here[:1] and built <= here


def _is_newer(driver: str, other: str) -> bool:
    """Whether a driver is newer than another; not where one names itself and the other the CUDA that it supports."""
    return driver.startswith("CUDA") == other.startswith("CUDA") and _number(driver) > _number(other)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _check_file(path: Path, plan: bytes, manifest: EngineManifest) -> None:
    if sha256_bytes(plan) != manifest.engine_sha256:
        raise EngineError(
            f"{path} is not the file that its manifest describes: it was changed, truncated or replaced",
            expected=f"sha256 {manifest.engine_sha256}",
            got=f"sha256 {sha256_bytes(plan)}, {len(plan)} bytes",
            fix="build the engine again, or restore the file together with its manifest",
        )


def _api(path: Path, manifest: EngineManifest) -> Any:
    if manifest.backend not in APIS:
        raise EngineError(
            f"{path} names the backend {manifest.backend}", expected=" or ".join(APIS), fix="check manifest.json"
        )
    try:
        return APIS[manifest.backend]()
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{path} needs {manifest.backend} {manifest.backend_version}: {error.problem}", fix=error.fix
        ) from error


def _any_api() -> Any:
    """The library of an engine without a manifest: whichever is installed, TensorRT first."""
    refused = []
    for load in APIS.values():
        try:
            return load()
        except PipelineError as error:
            refused.append(error.problem)
    raise UnsupportedError("; ".join(refused), expected="TensorRT or TensorRT-RTX", fix=tensorrt.INSTALL)
