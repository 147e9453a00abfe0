"""What the builders use of TensorRT's API, for mypy alone: ``make lint`` holds it to tensorrt-stubs (10.x).

A module cannot be annotated with its own type, so the names that are used of it stand here.
What single generations have is asked for with ``hasattr`` or ``getattr`` where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tensorrt

    class Api(Protocol):
        """The module ``tensorrt`` or ``tensorrt_rtx``."""

        __name__: str
        __version__: str
        Builder: type[tensorrt.Builder]
        BuilderFlag: type[tensorrt.BuilderFlag]
        HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
        ILogger: type[tensorrt.ILogger]
        IProgressMonitor: type[tensorrt.IProgressMonitor]
        MemoryPoolType: type[tensorrt.MemoryPoolType]
        OnnxParser: type[tensorrt.OnnxParser]
        ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
