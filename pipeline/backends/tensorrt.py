"""TensorRT: engines for the GPU of this machine, by builder flags and a calibrator or by typed graphs."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifacts import Profile
from pipeline.backends import cuda, nvinfer
from pipeline.backends.ahead import Ahead
from pipeline.backends.base import Arrays, BuildRequest, BuildResult, Capabilities, RouteName
from pipeline.backends.options import drop_foreign_tactics
from pipeline.backends.trt_api import version_number
from pipeline.calibration.table import HEADERS, CalibrationTable, some
from pipeline.config import QUANTIZED, Algorithm, EngineConfig
from pipeline.errors import CalibrationError, EngineError, PipelineError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt

log = logging.getLogger(__name__)

INSTALL = "pip install 'tensorrt>=8.6' 'cuda-python>=12.6' (without NVIDIA's index: tensorrt==8.6.0 on CPython 3.10)"
CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
FAST = {"fp16": "platform_has_fast_fp16", "int8": "platform_has_fast_int8"}


def api() -> Any:
    """The module ``tensorrt``.

    Raises:
        UnsupportedError: not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "tensorrt":
            raise UnsupportedError("TensorRT is not installed", fix=INSTALL) from error
        raise UnsupportedError(f"TensorRT cannot be loaded: {error}", fix=f"install it anew: {INSTALL}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"TensorRT cannot be loaded: {error}", fix=f"install it anew: {INSTALL}") from error


def implicit_offered(trt: Any) -> bool:
    """Whether this TensorRT chooses types itself: precision flags and INT8 calibrators."""
    flags = trt.BuilderFlag
    return (
        hasattr(flags, "FP16") and hasattr(flags, "INT8") and all(hasattr(trt, name) for name in CALIBRATORS.values())
    )


def strongly_typed(trt: Any) -> bool:
    """Whether the explicit route takes all types from the graph: where that is offered, or nothing else is."""
    return nvinfer.strongly_typed_offered(trt) or not implicit_offered(trt)


class TensorrtBuilder:
    """Engines for this machine's GPU.

    Where networks can be strongly typed, the explicit route uses them; elsewhere (8.6) it sets the flags of the types
    that the typed graph holds.
    """

    name = "tensorrt"

    def capabilities(self) -> Capabilities:
        try:
            trt = api()
        except UnsupportedError as error:
            why = error.summary
            return Capabilities(self.name, None, False, False, why_not_build=why, why_not_run=why)
        typed = strongly_typed(trt)
        routes: tuple[RouteName, ...] = ("explicit",)
        if implicit_offered(trt):
            routes = ("explicit", "implicit") if typed else ("implicit", "explicit")
        known = Capabilities(self.name, trt.__version__, False, False, routes=routes, strongly_typed=typed)
        try:
            device = cuda.current_device()
            return replace(known, builds=True, runs=True, device=device, details=_details(trt))
        except PipelineError as error:
            why = error.summary
            return replace(known, why_not_build=why, why_not_run=why)

    def build(self, request: BuildRequest) -> BuildResult:
        trt = api()
        implicit = request.route == "implicit"
        if implicit and not implicit_offered(trt):
            raise UnsupportedError(
                f"TensorRT {trt.__version__} has no implicit route (no precision flags, no calibrators)",
                expected="a typed graph",
                fix="use route: explicit",
            )
        calibrator = None
        if implicit and request.precision in QUANTIZED:
            if request.table is None:
                raise CalibrationError("INT8 needs a calibration table", fix="calibrate first")
            calibrator = cached_calibrator(trt, request.table)
        typed = not implicit and strongly_typed(trt)

        def adjust(
            builder: tensorrt.Builder,
            network: tensorrt.INetworkDefinition,
            config: tensorrt.IBuilderConfig,
            profile: tensorrt.IOptimizationProfile | None,
        ) -> None:
            if request.precision != "fp32":
                _require_fast(builder, "int8" if request.precision in QUANTIZED else "fp16")
                if not typed:
                    nvinfer.set_flag(trt, config, "FP16")
            if request.precision in QUANTIZED and not typed:
                nvinfer.set_flag(trt, config, "INT8")
            if request.half_nodes:
                keep_half(trt, network, config, request.half_nodes)
            if calibrator is not None:
                config.int8_calibrator = calibrator
                if profile is not None:
                    config.set_calibration_profile(profile)

        try:
            result = nvinfer.build(trt, request, strongly_typed=typed, adjust=adjust, timing_owner=_owner(trt))
        except EngineError as error:
            if calibrator is not None and calibrator.asked:
                raise _cache_ignored(trt) from error
            raise
        if calibrator is not None and calibrator.asked:
            raise _cache_ignored(trt)
        return result


def keep_half(
    trt: Any, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, nodes: Collection[str]
) -> None:
    """Hold convolutions to FP16 on the implicit route, by precision constraints that the builder has to obey.

    The parser names a layer after its ONNX node. Outputs stay free, so that what reads them in INT8 needs no
    cast of its own.

    Raises:
        UnsupportedError: this TensorRT has no precision constraints.
        EngineError: a node that no layer is named after.
    """
    layers = {layer.name: layer for layer in map(network.get_layer, range(network.num_layers))}
    wanted = [name for name in nodes if name not in layers]
    if wanted:
        raise EngineError(
            f"{len(wanted)} convolutions that stay FP16 are no layers of the network: {some(wanted)}",
            expected="layers named after their ONNX nodes",
            fix="use route: explicit",
        )
    flag = "OBEY_PRECISION_CONSTRAINTS"
    if not hasattr(trt.BuilderFlag, flag) or not all(hasattr(layers[name], "precision") for name in nodes):
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot hold single layers to a precision",
            expected="a typed graph",
            fix="use route: explicit",
        )
    for name in nodes:
        layers[name].precision = trt.DataType.HALF
    nvinfer.set_flag(trt, config, flag)


def calibrate_with_tensorrt(
    model: Path, batches: Iterable[Arrays], algorithm: Algorithm, config: EngineConfig
) -> CalibrationTable:
    """Let TensorRT's own calibrator choose the ranges, on images.

    TensorRT calibrates while it builds an INT8 engine, which is thrown away; its cache is what counts.

    Args:
        model: the clean FP32 graph.
        batches: arrays by input name, all of one shape, of the inputs' dtypes; for a static graph, of its shape. Read
            ahead on a thread while TensorRT works.
        config: for the workspace; the engine is built at the lowest optimization level.

    Raises:
        CalibrationError: no batches, batches of differing shapes, or TensorRT wrote no cache.
        UnsupportedError: no TensorRT with calibrators, no GPU, or a GPU without INT8.
        EngineError: TensorRT refuses the graph.
        Exception: whatever ``batches`` raises, as it was raised.
    """
    trt = api()
    if not implicit_offered(trt):
        raise UnsupportedError(
            f"TensorRT {trt.__version__} has no calibrators",
            fix="use calibrate.calibrator: cpu, which needs no GPU",
        )
    with Ahead(batches) as ahead:
        first = next(ahead, None)
        if first is None:
            raise CalibrationError(
                "there are no calibration images", expected="at least one batch", fix="name more images"
            )
        return _calibrate(trt, model, first, ahead, algorithm, config)


def _calibrate(
    trt: Any, model: Path, first: Arrays, rest: Iterator[Arrays], algorithm: Algorithm, config: EngineConfig
) -> CalibrationTable:
    builder = nvinfer.create_builder(trt)
    _require_fast(builder, "int8")
    network = nvinfer.create_network(trt, builder, strongly_typed=False)
    nvinfer.parse(trt, network, model)
    inputs, _ = nvinfer.network_specs(network, model)
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
    if hasattr(settings, "builder_optimization_level"):
        settings.builder_optimization_level = 0
    drop_foreign_tactics(trt, settings)
    nvinfer.set_flag(trt, settings, "INT8")
    # TF32 would make the observed ranges depend on the GPU.
    nvinfer.set_flag(trt, settings, "TF32", on=False)
    shapes = {name: tuple(array.shape) for name, array in first.items()}
    profile = nvinfer.add_profiles(
        trt, builder, settings, network, {name: Profile(shape, shape, shape) for name, shape in shapes.items()}
    )
    if profile is not None:
        settings.set_calibration_profile(profile)
    feeder = _Feeder(itertools.chain([first], rest), {s.name: (s.shape, s.dtype) for s in inputs}, shapes)
    try:
        calibrator = _calibrator(trt, algorithm, feeder)
        settings.int8_calibrator = calibrator
        try:
            nvinfer.serialize(trt, builder, network, settings, [])
        except EngineError:
            if feeder.error is None:
                raise
        if feeder.error is not None:
            raise feeder.error
    finally:
        feeder.close()
    if feeder.cache is None:
        raise CalibrationError(
            "TensorRT wrote no calibration cache", expected="ranges of every tensor", fix="see the log with --debug"
        )
    log.info("TensorRT calibrated on %d batches", feeder.count)
    return CalibrationTable.from_cache(bytes(feeder.cache).decode(), f"the cache of TensorRT {trt.__version__}")


def cached_calibrator(trt: Any, table: CalibrationTable) -> Any:
    """A calibrator that knows the table and has no images; its ``asked`` tells whether TensorRT wanted some.

    TensorRT reads scales alone, whatever algorithm chose them; a table of an algorithm for which no calibrator exists
    goes in under entropy's name.
    """
    known = table if table.algorithm in HEADERS else CalibrationTable("entropy", table.amax)
    text = known.to_cache(version_number(trt.__version__)).encode()
    base: Any = getattr(trt, CALIBRATORS[known.algorithm])

    class CacheOnly(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.asked = False

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            self.asked = True
            return None

        def read_calibration_cache(self) -> bytes:
            return text

        def write_calibration_cache(self, cache: Any) -> None:
            """The table is kept by the calibrate stage."""

    return CacheOnly()


class _Feeder:
    """Copies batches to the GPU one by one, and keeps what went wrong: TensorRT takes failures for the end of data."""

    def __init__(
        self,
        batches: Iterator[Arrays],
        specs: dict[str, tuple[tuple[int | str, ...], str]],
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.error: BaseException | None = None
        self.cache: bytes | None = None
        self.count = 0
        self._batches = batches
        self._specs = specs
        self._shapes = shapes
        self._stream = cuda.Stream()
        self._pinned: dict[str, cuda.PinnedArray] = {}
        self._buffers: dict[str, cuda.DeviceBuffer] = {}

    def next_addresses(self, names: list[str]) -> list[int] | None:
        if self.error is not None:
            return None
        try:
            batch = next(self._batches, None)
            if batch is None:
                return None
            for name in names:
                self._upload(name, batch)
            self._stream.synchronize()
            self.count += 1
            return [self._buffers[name].address for name in names]
        except BaseException as error:
            self.error = error
            return None

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        for pinned in self._pinned.values():
            pinned.close()
        self._stream.close()

    def _upload(self, name: str, batch: Arrays) -> None:
        if name not in batch:
            raise CalibrationError(f"calibration batch {self.count} lacks input {name}", got=", ".join(batch))
        array = batch[name]
        shape, dtype = self._specs[name]
        expected = tuple(
            have if isinstance(want, str) else want for want, have in zip(shape, self._shapes[name], strict=True)
        )
        if array.shape != expected or array.dtype != np.dtype(dtype):
            raise CalibrationError(
                f"calibration batch {self.count} does not fit input {name}",
                expected=f"{dtype} {expected}",
                got=f"{array.dtype} {array.shape}",
                fix="feed batches of one size; for a static graph, of its size",
            )
        if name not in self._buffers:
            self._pinned[name] = cuda.PinnedArray(array.shape, array.dtype)
            self._buffers[name] = cuda.DeviceBuffer(array.nbytes)
        np.copyto(self._pinned[name].array, array)
        self._buffers[name].upload(self._pinned[name].array, self._stream)


def _calibrator(trt: Any, algorithm: Algorithm, feeder: _Feeder) -> Any:
    base: Any = getattr(trt, CALIBRATORS[algorithm])

    class Feeding(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return 1  # of implicit batches, which ONNX networks do not have

        def get_batch(self, names: list[str]) -> list[int] | None:
            return feeder.next_addresses(list(names))

        def read_calibration_cache(self) -> None:
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            feeder.cache = bytes(cache)

    return Feeding()


def _owner(trt: Any) -> str:
    here = cuda.current_device()
    return (
        f"TensorRT {trt.__version__}, {here.name}, compute capability {here.compute_capability}, driver {here.driver}"
    )


@functools.cache
def _details(trt: Any) -> dict[str, str]:
    builder = nvinfer.create_builder(trt)
    names = {"fast fp16": FAST["fp16"], "fast int8": FAST["int8"], "tf32": "platform_has_tf32"}
    return {
        label: "yes" if getattr(builder, attribute) else "no"
        for label, attribute in names.items()
        if hasattr(builder, attribute)
    }


def _require_fast(builder: Any, precision: str) -> None:
    if not getattr(builder, FAST[precision], True):
        raise UnsupportedError(
            f"this GPU has no fast {precision.upper()}",
            expected="a GPU with tensor cores for this precision",
            got=cuda.current_device().name,
            fix="use another precision or GPU",
        )


def _cache_ignored(trt: Any) -> CalibrationError:
    return CalibrationError(
        f"TensorRT {trt.__version__} ignored the calibration cache and asked for images",
        expected="a cache whose header it accepts",
        fix="report it with this TensorRT's version, and use route: explicit meanwhile",
    )
