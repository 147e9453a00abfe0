"""What every engine family offers: a Builder, a Runner, and what it can do on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Device, Profile, TensorSpec
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, Precision, PreprocessingConfig
from pipeline.data.preprocessing import Pixels, fit_image, normalise
from pipeline.errors import DataError

Arrays = Mapping[str, NDArray[Any]]
RouteName = Literal["implicit", "explicit"]


@dataclass(frozen=True)
class Capabilities:
    """What one backend can do here; the ``why_not`` texts are empty where it can.

    Attributes:
        version: of the library; None where it is not installed.
        builds, runs: whether engines can be built here, and run here.
        why_not_build, why_not_run: one sentence and what to do about it.
        routes: that this library offers, preferred first.
        device: the GPU that engines are built for and run on.
        target_capabilities: compute capabilities that ahead-of-time engines run on; empty: ``device`` alone.
        strongly_typed: types come from the graph alone; otherwise builder flags allow them.
        details: further facts for ``doctor``, such as fast INT8.
    """

    name: str
    version: str | None
    builds: bool
    runs: bool
    why_not_build: str = ""
    why_not_run: str = ""
    routes: tuple[RouteName, ...] = ()
    device: Device | None = None
    target_capabilities: tuple[str, ...] = ()
    strongly_typed: bool = False
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        model: path of the ONNX graph: the clean one on the implicit route, the typed one on the explicit route.
        table: amax per tensor for implicit INT8; None otherwise.
        half_nodes: convolutions that stay FP16 on the implicit route; a typed graph says so itself.
        profiles: shapes per dynamic input; empty for a static graph.
        timing_cache: file to read and update; None to build without.
        define: fills an empty network of the API module's, instead of the parser's reading ``model``, which then
            names the dynamic axes alone; what it returns is kept until the engine is built.
        shown: tensors of the network that the engine gives beside its outputs.
    """

    model: Path
    precision: Precision
    route: RouteName
    config: EngineConfig
    table: CalibrationTable | None = None
    _: KW_ONLY
    half_nodes: tuple[str, ...] = ()
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    timing_cache: Path | None = None
    define: Callable[[Any, Any], object] | None = None
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildResult:
    """A serialized engine; ``timing_cache`` is "none", "cold" or "warm"; ``notes`` are warnings worth keeping."""

    plan: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    seconds: float
    timing_cache: str
    notes: tuple[str, ...] = ()


class Builder(Protocol):
    """ONNX to engine."""

    name: str

    def capabilities(self) -> Capabilities: ...

    def build(self, request: BuildRequest) -> BuildResult:
        """Build one engine.

        Raises:
            EngineError: a refused node, an impossible profile, a build that the library gives up.
            UnsupportedError: this machine cannot build, or its GPU lacks the precision.
        """
        ...


class Runner(Protocol):
    """A loaded model; use as a context manager. Not thread-safe."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """One inference; arrays on the host, C-contiguous, of the inputs' dtypes; the results are the caller's."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Arrays) -> None:
    """Raise ValueError where names, ranks, static sizes or dtypes of the feeds do not match the inputs."""
    if set(feeds) != {spec.name for spec in inputs}:
        raise ValueError(f"expected inputs {sorted(s.name for s in inputs)}, got {sorted(feeds)}")
    for spec in inputs:
        array = feeds[spec.name]
        sizes = zip(spec.shape, array.shape, strict=False)
        if len(spec.shape) != array.ndim or any(isinstance(want, int) and want != have for want, have in sizes):
            raise ValueError(f"input {spec.name} has shape {spec.shape}, got {array.shape}")
        if np.dtype(spec.dtype) != array.dtype:
            raise ValueError(f"input {spec.name} is {spec.dtype}, got {array.dtype}")


def feed_image(
    spec: TensorSpec, image: Pixels, preprocessing: PreprocessingConfig, name: str = "the image"
) -> dict[str, NDArray[Any]]:
    """An image, uint8 (H, W, C) of any size, as a model's one input; a fixed batch of N gets it N times.

    A float32 input (N, C, H, W) gets it resized and normalised, a uint8 input (N, H, W, C) resized alone.

    Args:
        spec: of the input.
        name: of the image, for the message.

    Raises:
        DataError: the model takes images of another size.
    """
    array: NDArray[Any] = fit_image(image, preprocessing)
    if spec.dtype != "uint8":
        array = normalise(array, preprocessing)
    batch = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1
    have = (batch, *array.shape)
    if len(spec.shape) != len(have) or any(
        isinstance(want, int) and want != size for want, size in zip(spec.shape, have, strict=True)
    ):
        raise DataError(
            f"{name} has another size than the model takes",
            expected=f"shape {spec.shape} of input {spec.name}",
            got=f"{have} after preprocessing",
            fix="export with preprocessing.resize: stretch or letterbox, or with dynamic height and width",
        )
    one = array[np.newaxis]
    return {spec.name: np.ascontiguousarray(np.repeat(one, batch, axis=0) if batch > 1 else one)}
