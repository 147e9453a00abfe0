"""What processes of the fleet send back."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline.artifacts import process_name
from pipeline.backends import cuda
from pipeline.errors import ConfigError, PipelineError
from pipeline.fleet.connection import import_ray, node_here


@dataclass(frozen=True)
class Value:
    """A result, and the seconds that it took."""

    value: Any
    seconds: float


@dataclass(frozen=True)
class Raised:
    """An error of the work itself, which Ray would wrap in its own."""

    error: Exception


@dataclass(frozen=True)
class Broken:
    """Something outside the work itself failed: a process, a node, Ray."""

    reason: str


@dataclass(frozen=True)
class Opened:
    """What a process has opened, or what kept it from that, and where it is.

    Attributes:
        host: its machine.
        node: the same, as Ray's id.
        process: its ``process_name``.
        gpu: the type of its GPU; empty where it has none.
        version: of unet-trt there.
        content: what was opened, or ``Raised``.
    """

    host: str
    node: str
    process: str
    gpu: str
    version: str
    content: Any

    @property
    def error(self) -> Exception | None:
        """What it raised, with the machine's name; None where it is open."""
        if not isinstance(self.content, Raised):
            return None
        error = self.content.error
        if isinstance(error, PipelineError):
            problem = f"{error.problem} (on {self.host})"
            return type(error)(problem, expected=error.expected, got=error.got, fix=error.fix)
        return error

    def check_version(self) -> None:
        """Raise ConfigError where another version is installed there than here."""
        if self.version != __version__:
            raise ConfigError(
                f"{self.host} has unet-trt {self.version}, here is {__version__}",
                expected="one version on all machines",
                fix="install the same version there",
            )


def opened_here(opens: Callable[[], Any]) -> Opened:
    """Open something in this process of the fleet."""
    ray = import_ray()
    try:
        gpu = cuda.current_device().name if ray.get_gpu_ids() else ""
    except PipelineError:
        gpu = ""
    try:
        content = opens()
    except Exception as error:
        content = Raised(error)
    return Opened(platform.node(), node_here(), process_name(), gpu, __version__, content)
