"""What this machine can do, why not, and what to install: facts as plain JSON values."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifacts import tool_version
from pipeline.backends.base import Capabilities

PACKAGES = ("torch", "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "tensorrt", "cuda-python", "numpy")
# What the extras of pyproject.toml install.
EXTRAS = {
    "torch": ("torch>=2.6", "onnxscript>=0.5"),
    "rtx": ("tensorrt-rtx-cu13>=1.7", "cuda-python>=12.6"),
    "tensorrt": ("tensorrt>=8.6", "cuda-python>=12.6"),
    "video": ("imageio-ffmpeg>=0.5",),
    "serve": ("tritonclient[grpc,http]>=2.50",),
}
EXTRA_OF = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True)
class Ability:
    """One thing that a user may want to do.

    Attributes:
        by: what does it here, with its version; empty where nothing does.
        why_not: one sentence, and a way out; empty where it is possible.
        install: the command that installs what is missing; empty where nothing is, or where that would not help.
    """

    what: str
    able: bool
    by: str
    why_not: str = ""
    install: str = ""


def examine_machine() -> dict[str, Any]:
    """Versions, what each backend can build and run here, with the reason where it cannot, and ``abilities``."""
    from pipeline.backends.registry import all_capabilities

    known = all_capabilities()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: tool_version(name) or "not installed" for name in PACKAGES},
    }
    for c in known:
        rows: dict[str, Any] = {
            "version": c.version or "not installed",
            "builds engines": "yes" if c.builds else f"no: {c.why_not_build}",
            "runs": "yes" if c.runs else f"no: {c.why_not_run}",
            "routes": ", ".join(c.routes) or "none",
        }
        if c.device is not None:
            rows["GPU"] = f"{c.device.name}, compute capability {c.device.compute_capability}, driver {c.device.driver}"
        if c.target_capabilities:
            rows["engines run on compute capability"] = ", ".join(c.target_capabilities)
        facts[c.name] = {**rows, **c.details}
    return {**facts, "abilities": [asdict(ability) for ability in abilities(known)]}


def abilities(known: list[Capabilities]) -> Iterator[Ability]:
    """What the commands need, in their order.

    Args:
        known: of every backend.
    """
    yield _by_packages("export and train torch networks, read .pth and .pt", "torch", ("torch", "onnxscript"))
    for c in known:
        title, version = TITLES[c.name], f"{TITLES[c.name]} {c.version}"
        if c.name == "onnxruntime":
            install = "" if c.version else _pip(c.name)
            what = "clean, calibrate and judge on the CPU"
            yield Ability(what, c.runs, version if c.runs else "", c.why_not_run, install)
            continue
        install = "" if c.version else _pip(*EXTRAS[EXTRA_OF[c.name]])
        yield Ability(f"build {title} engines", c.builds, version if c.builds else "", c.why_not_build, install)
        yield Ability(f"run {title} engines", c.runs, version if c.runs else "", c.why_not_run, install)
    yield _by_packages("predict videos", "video", ("imageio-ffmpeg",))
    yield _by_packages("predict on a Triton server", "serve", ("tritonclient",))


def _by_packages(what: str, extra: str, packages: tuple[str, ...]) -> Ability:
    missing = [name for name in packages if tool_version(name) is None]
    if missing:
        why = f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed"
        return Ability(what, False, "", why, _pip(*EXTRAS[extra]))
    return Ability(what, True, ", ".join(f"{name} {tool_version(name)}" for name in packages))


def _pip(*requirements: str) -> str:
    """The command that installs into the Python that runs this."""
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])
