"""Calibration: the range of every activation, from images, one at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import (
    SCHEMA_VERSION,
    TensorSpec,
    sha256_bytes,
    sha256_file,
    sha256_json,
    to_json,
    write_atomically,
)
from pipeline.backends.base import feed_image
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.algorithms import ALGORITHMS
from pipeline.calibration.histogram import Histogram
from pipeline.calibration.segments import Segment, split
from pipeline.calibration.table import CalibrationTable
from pipeline.config import CalibrateConfig, EngineConfig, PreprocessingConfig
from pipeline.data.dataset import Sample
from pipeline.errors import BuildFolderError, CalibrationError, DataError, ModelError
from pipeline.graph.io import load_model, model_inputs
from pipeline.graph.quantize import activation_tensors

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

CACHE_FILE, REPORT_FILE = "calibration.cache", "report.json"
# Version in the header of caches that no TensorRT wrote: 8.6.0.
CACHE_VERSION = 8600
ENOUGH_IMAGES = 32
SEGMENT_BYTES = 256 << 20
# For tensors of zeros, which any scale represents: 2^-14 is the smallest normal FP16 number.
ZERO_AMAX = 127 * 2.0**-14


@dataclass(frozen=True)
class TensorRange:
    """What one tensor held, and the range chosen for it, in the tensor's unit.

    ``clipped`` is the share of values with |value| > amax, 0…1. All but ``amax`` is None where TensorRT calibrated.
    """

    tensor: str
    amax: float
    minimum: float | None = None
    maximum: float | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """Where a calibration cache comes from; ``images_sha256`` is independent of the images' names and order."""

    algorithm: str
    calibrator: str
    bins: int
    image_count: int
    images: tuple[str, ...]
    images_sha256: str
    graph_sha256: str
    preprocessing_sha256: str
    cache_sha256: str
    tensors: tuple[TensorRange, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)


def calibrate(
    clean: Path,
    samples: Sequence[Sample],
    config: CalibrateConfig,
    preprocessing: PreprocessingConfig,
    folder: Path,
    *,
    validation: Mapping[str, str] | None = None,
    engine: EngineConfig | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Choose a range for every activation of a graph; write ``calibration.cache`` and ``report.json`` into a folder.

    Memory is independent of the number of images: some 256 MiB of activations of one image at a time (where no single
    tensor is larger), what later nodes still read of it, and 128 KiB a tensor for its histogram.

    Args:
        clean: ONNX graph with one image input, float32 (N, C, H, W) or uint8 (N, H, W, C); a fixed N > 1 gets the image
            N times.
        samples: all of them are used, one at a time, once each.
        validation: names of the validation images by ``Sample.content_hash()`` (see ``content_hashes``).
        engine: settings for ``calibrator: tensorrt`` (the workspace); default: the config's defaults.
        progress: called with (images done, images in all).

    Raises:
        CalibrationError: no image; an image that is a validation image too; one that does not fit the graph's input;
            NaN or infinite activations.
        DataError: an image that cannot be decoded.
        ModelError: a graph that cannot be loaded or run, or has not exactly one input.
        UnsupportedError: ``calibrator: tensorrt`` without TensorRT.
        BuildFolderError: the folder is unwritable.
    """
    started = time.perf_counter()
    model = load_model(clean)
    specs = model_inputs(model)
    if len(specs) != 1:
        raise ModelError(
            f"{clean} has {len(specs)} inputs", expected="one image input", got=", ".join(spec.name for spec in specs)
        )
    tensors = activation_tensors(model)
    images = _Images(samples, specs[0], preprocessing, validation or {}, progress)
    notes: list[str] = []
    if config.calibrator == "tensorrt":
        from pipeline.backends.tensorrt import calibrate_with_tensorrt

        table = calibrate_with_tensorrt(
            clean, ({specs[0].name: x} for _, x in images), config.algorithm, engine or EngineConfig()
        )
        ranges = [TensorRange(tensor, amax) for tensor, amax in table.amax.items()]
    else:
        histograms = _collect(model, tensors, images)
        ranges = [_choose(histogram, config, notes) for histogram in histograms]
        table = CalibrationTable(config.algorithm, {entry.tensor: entry.amax for entry in ranges})
    notes += images.notes()
    for note in notes:
        log.warning("%s", note)

    cache = table.to_cache(CACHE_VERSION).encode()
    report = CalibrationReport(
        algorithm=config.algorithm,
        calibrator=config.calibrator,
        bins=config.bins,
        image_count=len(images.names),
        images=tuple(images.names),
        images_sha256=sha256_json(sorted(images.hashes)),
        graph_sha256=sha256_file(clean),
        preprocessing_sha256=sha256_json(preprocessing.model_dump(mode="json")),
        cache_sha256=sha256_bytes(cache),
        tensors=tuple(ranges),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildFolderError(f"cannot make the folder {folder}: {error.strerror}", fix="choose another") from error
    write_atomically(folder / CACHE_FILE, cache)
    write_atomically(folder / REPORT_FILE, to_json(report))
    return report


def content_hashes(samples: Iterable[Sample]) -> dict[str, str]:
    """Names of samples by content, for ``calibrate(validation=…)``; loads each once."""
    return {sample.content_hash(): sample.name for sample in samples}


class _Images:
    """The calibration images as network input, one at a time; keeps their names and hashes."""

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: TensorSpec,
        preprocessing: PreprocessingConfig,
        validation: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        if len(samples) == 0:
            raise CalibrationError(
                "there are no calibration images",
                expected=f"at least one, better {ENOUGH_IMAGES} or more",
                fix="check data.calibration",
            )
        self.samples, self.spec, self.preprocessing = samples, spec, preprocessing
        self.validation, self.progress = validation, progress
        self.names: list[str] = []
        self.hashes: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name of each, and its array as the graph takes it."""
        for sample in self.samples:
            digest = sample.content_hash()
            if digest in self.validation:
                raise CalibrationError(
                    f"the calibration image {sample.name} is the validation image {self.validation[digest]}",
                    expected="no image in both, or validation would judge ranges by the images that chose them",
                    fix="remove it from data.calibration (or data.train), or from data.validation",
                )
            self.names.append(sample.name)
            self.hashes.append(digest)
            yield sample.name, self._input(sample)
            if self.progress:
                self.progress(len(self.names), len(self.samples))

    def notes(self) -> list[str]:
        notes = []
        if len(self.names) < ENOUGH_IMAGES:
            notes.append(f"only {len(self.names)} calibration images; fewer than {ENOUGH_IMAGES} may miss large values")
        repeated = len(self.hashes) - len(set(self.hashes))
        if repeated:
            notes.append(f"{repeated} of {len(self.hashes)} calibration images repeat another")
        return notes

    def _input(self, sample: Sample) -> NDArray[Any]:
        try:
            return feed_image(self.spec, sample.image, self.preprocessing)[self.spec.name]
        except DataError as error:
            raise CalibrationError(
                f"the calibration image {sample.name} does not fit the graph's input {self.spec.name}",
                expected=error.expected,
                got=error.got,
                fix="set preprocessing (resize, height, width, channels) to what the graph was exported for",
            ) from error


def _collect(model: onnx.ModelProto, tensors: Sequence[str], images: _Images) -> list[Histogram]:
    """Histograms of the tensors, in their order."""
    histograms = {tensor: Histogram(tensor) for tensor in tensors}
    unions = _unions(model, tensors)
    chain: list[tuple[Segment, OnnxRuntimeRunner]] = []
    source = images.spec.name
    with ExitStack() as stack:
        for image, x in images:
            if not chain:
                observed = [tensor for tensor in tensors if tensor != source and tensor not in unions]
                for segment in split(model, observed, {source: x.shape}, SEGMENT_BYTES):
                    # Optimising needs more memory here and is no faster: with every tensor an output, little fuses.
                    runner = OnnxRuntimeRunner(segment.model.SerializeToString(), optimize=False, arena=False)
                    chain.append((segment, stack.enter_context(runner)))
            if source in histograms:
                histograms[source].add(x, image)
            alive: dict[str, NDArray[Any]] = {source: x}
            for segment, runner in chain:
                alive |= runner({spec.name: alive[spec.name] for spec in runner.inputs})
                for tensor in segment.observed:
                    histograms[tensor].add(alive[tensor], image)
                alive = {name: values for name, values in alive.items() if name in segment.carried}
    for tensor, parts in unions.items():
        for part in parts:
            histograms[tensor].merge(histograms[part])
    return list(histograms.values())


def _unions(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, list[str]]:
    """Outputs of Concat in topological order, whose histograms are the sums of their inputs'."""
    known = set(tensors)
    return {
        node.output[0]: list(node.input)
        for node in model.graph.node
        if node.op_type == "Concat" and node.output[0] in known and known.issuperset(node.input)
    }


def _choose(histogram: Histogram, config: CalibrateConfig, notes: list[str]) -> TensorRange:
    """The range of one tensor by the configured algorithm."""
    amax = float(np.float32(ALGORITHMS[config.algorithm](histogram, config.bins)))
    if amax < 127 * np.finfo(np.float32).tiny:
        notes.append(f"tensor {histogram.tensor} is zero on every image; its range is set to {ZERO_AMAX:.3g}")
        amax = ZERO_AMAX
    return TensorRange(histogram.tensor, amax, histogram.minimum, histogram.maximum, histogram.share_above(amax))
