"""Calibration: the range of every activation, from images, a batch at a time."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.artifacts import TensorSpec, sha256_bytes, sha256_json, to_json, write_atomically
from pipeline.backends.base import feed_image
from pipeline.backends.cpu_histograms import cpu_histograms
from pipeline.calibration.histogram import Histogram
from pipeline.calibration.ranges import ZERO_AMAX, choose_ranges
from pipeline.calibration.report import AlgorithmTrial, CalibrationReport, Refinement, TensorRange
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Algorithm, CalibrateConfig, Calibrator, EngineConfig, PreprocessingConfig
from pipeline.data.dataset import Dataset, Sample, hash_apart
from pipeline.data.teaching import HELD_OUT_STEP, in_batches, split_places, teaching_order
from pipeline.errors import BuildFolderError, CalibrationError, ConfigError, DataError
from pipeline.graph.io import image_input, load_model, read_card, sha256_model
from pipeline.graph.placement import activation_tensors
from pipeline.progress import track
from pipeline.selection import kept, try_algorithms

if TYPE_CHECKING:
    from pipeline.fleet.fleet import Fleet

log = logging.getLogger(__name__)

# Version in the header of caches that no TensorRT wrote: 8.6.0.
CACHE_VERSION = 8600
ENOUGH_IMAGES = 32
REFINING = "calibrate.refine_steps", "set it to 0"

Named = tuple[str, NDArray[Any]]
Collector = Callable[[Iterable[Named]], list[Histogram]]


def calibrate(
    clean: Path,
    samples: Sequence[Sample],
    config: CalibrateConfig,
    preprocessing: PreprocessingConfig,
    cache: Path,
    report: Path,
    *,
    validation: Mapping[str, str] | None = None,
    engine: EngineConfig | None = None,
    fleet: Fleet | None = None,
) -> CalibrationReport:
    """Choose a range for every activation of a graph; write the calibration cache and its report.

    Memory is independent of the number of images: see ``cpu_histograms`` and ``gpu_histograms``.

    Args:
        clean: ONNX graph with one image input, float32 (N, C, H, W) or uint8 (N, H, W, C); with ``batch`` 1, a fixed
            N > 1 gets the image N times.
        samples: all of them are used, ``batch`` at a time, once each; a last batch that lacks some is filled up with
            its own images.
        cache, report: written last, each whole or not at all; their folder is made where missing.
        validation: names of the validation images by ``Sample.content_hash()`` (see ``data.dataset.content_hashes``).
        engine: workspace for ``calibrator`` gpu and tensorrt; ``exclude`` and ``qdq`` for ``algorithm: auto``; default:
            the config's defaults.
        fleet: whose workers collect the histograms, which are merged here: counts add up exactly. With ``calibrator``
            cpu the ranges are those of one process, bit by bit; with gpu, each GPU has an engine of its own.

    Raises:
        ConfigError: a fleet with TensorRT's own calibrator, or with batches whose bad images are skipped.
        CalibrationError: no image; for ``auto``, too few or a graph without masks; an image that is a validation image
            too; one that does not fit the graph's input, or a ``batch`` that does not; NaN or infinite activations.
        DataError: an image that cannot be decoded, without ``skip_bad``.
        ModelError: a graph that cannot be loaded or run, or has not exactly one input.
        UnsupportedError: ``calibrator: gpu`` or ``tensorrt`` without what they need.
        BuildFolderError: a file that cannot be written.
    """
    started = time.perf_counter()
    engine = engine or EngineConfig()
    model = load_model(clean)
    source = image_input(model, clean)
    card = read_card(model)
    if config.algorithm == "auto" and card is not None and card.task != "segmentation":
        raise CalibrationError(
            f"algorithm: auto compares masks, and {clean} gives tensors",
            expected="a segmentation network",
            fix="name an algorithm: entropy, minmax, percentile or mse",
        )
    tensors = activation_tensors(model)
    images = _Images(samples, source, preprocessing, validation or {}, config)
    calibrator = resolve_calibrator(config.calibrator)
    if config.refine_steps:
        from pipeline.refinement import check_refinable

        teaching = _split(len(samples), *REFINING)
        check_refinable(model, next((array for _, array in images.anew().read([0], "image", may_lack=True)), None))
    trials: list[AlgorithmTrial] = []
    held_out: list[int] = []
    histograms: list[Histogram] = []
    if fleet is not None:
        _check_spreads(calibrator, config)
    if calibrator == "tensorrt":
        from pipeline.backends.tensorrt import calibrate_with_tensorrt

        algorithm: Algorithm = "minmax" if config.algorithm == "minmax" else "entropy"
        table = calibrate_with_tensorrt(clean, ({source.name: x} for _, x in images.read()), algorithm, engine)
        ranges = [TensorRange(tensor, amax, len(images.names)) for tensor, amax in table.amax.items()]
    else:
        if calibrator == "gpu":
            from pipeline.backends.gpu_histograms import gpu_histograms

            collect: Collector = functools.partial(gpu_histograms, clean, tensors, config=engine)
        else:
            collect = functools.partial(cpu_histograms, model, tensors)

        def gather(images: _Images, which: Sequence[int] | None = None) -> list[Histogram]:
            if fleet is None:
                return collect(images.read(which))
            return _spread(fleet, collect, images, which, on_gpu=calibrator == "gpu")

        if config.algorithm == "auto":
            rest, held_out = _split(len(samples), "algorithm: auto", "name an algorithm")
            histograms = gather(images, rest)
            judges = list(images.read(held_out, "held-out images"))
            trials = try_algorithms(model, histograms, [x for _, x in judges], config, engine)
            algorithm = kept(trials)
            _merge(histograms, collect(judges) if fleet is None else gather(images.anew(), held_out))
        else:
            algorithm = config.algorithm
            histograms = gather(images)
        ranges = choose_ranges(histograms, algorithm, config, len(images.names))
        table = CalibrationTable(algorithm, {entry.tensor: entry.amax for entry in ranges})
    collected = time.perf_counter()
    refinement = None
    if config.refine_steps:
        table, refinement = _refined(model, table, images, *teaching, config, engine)
        counted = {histogram.tensor: histogram for histogram in histograms}
        ranges = [_with_amax(entry, table.amax[entry.tensor], counted.get(entry.tensor)) for entry in ranges]
    notes = [*_notes(ranges), *images.notes(), *_verdict(trials, len(held_out)), *_outcome(refinement)]
    for note in notes:
        log.warning("%s", note)

    text = table.to_cache(table.version or CACHE_VERSION).encode()
    result = CalibrationReport(
        algorithm=algorithm,
        calibrator=calibrator,
        bins=config.bins,
        image_count=len(images.names),
        images=tuple(images.names),
        images_sha256=sha256_json(sorted(images.hashes)),
        graph_sha256=sha256_model(clean),
        preprocessing_sha256=sha256_json(preprocessing.model_dump(mode="json")),
        cache_sha256=sha256_bytes(text),
        tensors=tuple(ranges),
        seconds=round(time.perf_counter() - started, 3),
        collect_seconds=round(collected - started, 3),
        notes=tuple(notes),
        skipped=tuple(images.skipped),
        trials=tuple(trials),
        held_out=len(held_out),
        refinement=refinement,
    )
    for file, content in ((report, to_json(result)), (cache, text)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildFolderError(
                f"cannot make the folder {file.parent}: {error.strerror}", fix="choose another"
            ) from error
        write_atomically(file, content)
    return result


def _check_spreads(calibrator: Calibrator, config: CalibrateConfig) -> None:
    if calibrator == "tensorrt":
        raise ConfigError(
            "TensorRT's own calibrator keeps its histograms to itself, so they cannot be merged",
            expected="calibrate.calibrator: cpu or gpu with --distributed",
            fix="set it, or leave --distributed out",
        )
    if config.batch > 1 and config.skip_bad:
        raise ConfigError(
            "calibrate.skip_bad changes which images share a batch",
            expected="calibrate.batch: 1 beside it, with --distributed",
            got=f"calibrate.batch: {config.batch}",
            fix="set calibrate.batch to 1, or leave skip_bad or --distributed out",
        )


@dataclass(frozen=True)
class _Collected:
    """What a worker of a fleet has found on some images; no histograms where none could be decoded."""

    histograms: list[Histogram]
    images: _Images


@dataclass(frozen=True)
class _Collecting:
    """Collects on images by their places, batch by batch; on a worker."""

    collect: Collector
    images: _Images

    def __call__(self, batches: Sequence[Sequence[int]], again: bool) -> _Collected:
        images = self.images.anew()
        stream = images.read([place for batch in batches for place in batch], may_lack=True)
        first = next(stream, None)
        histograms = [] if first is None else self.collect(itertools.chain([first], stream))
        return _Collected(histograms, images.found())


def _spread(
    fleet: Fleet, collect: Collector, images: _Images, which: Sequence[int] | None, *, on_gpu: bool
) -> list[Histogram]:
    """As ``collect(images.read(which))``, on a fleet: a batch is an item, and stays whole."""
    places, size = images.places(which), images.batch
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    histograms: list[Histogram] = []
    for part in fleet.in_order(
        _Collecting(collect, images),
        batches,
        "calibrating",
        lambda batch: ", ".join(images.name(place) for place in batch),
        # An engine is built for each portion, so on GPUs there are no more than necessary.
        size=-(-len(batches) // fleet.gpus) if on_gpu and fleet.gpus else None,
        on_gpu=on_gpu,
    ):
        images.add(part.images)
        if part.histograms:
            histograms = histograms or [Histogram(one.tensor) for one in part.histograms]
            _merge(histograms, part.histograms)
    if not histograms:
        raise images.none_left("calibration images")
    return histograms


def _merge(histograms: Sequence[Histogram], more: Sequence[Histogram]) -> None:
    for histogram, other in zip(histograms, more, strict=True):
        histogram.merge(other)


def resolve_calibrator(wanted: Calibrator) -> Calibrator:
    """Which calibrator that is on this machine: never ``auto``."""
    if wanted != "auto":
        return wanted
    from pipeline.backends.gpu_histograms import why_no_gpu_calibration

    return "cpu" if why_no_gpu_calibration() else "gpu"


class _Images:
    """The calibration images as network input, a batch at a time; keeps their names and hashes."""

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: TensorSpec,
        preprocessing: PreprocessingConfig,
        validation: Mapping[str, str],
        config: CalibrateConfig,
    ) -> None:
        self.samples, self.spec, self.preprocessing = samples, spec, preprocessing
        self.validation, self.skip_bad, self.batch = validation, config.skip_bad, config.batch
        self.filled = 0
        fixed = spec.shape[0] if spec.shape else 1
        if self.batch > 1 and isinstance(fixed, int) and fixed != self.batch:
            raise CalibrationError(
                f"calibrate.batch is {self.batch}, which the graph does not take",
                expected=f"batches of {fixed}, as input {spec.name} has the shape {spec.shape}",
                fix="set calibrate.batch to 1, or export with a dynamic batch (export.dynamic, engine.profile.batch)",
            )
        self.names: list[str] = []
        self.hashes: list[str] = []
        self.skipped: list[str] = []

    def anew(self) -> _Images:
        """The same images, of which none has been read."""
        fresh = copy.copy(self)
        fresh.filled, fresh.names, fresh.hashes, fresh.skipped = 0, [], [], []
        return fresh

    def found(self) -> _Images:
        """What was found so far, without the images."""
        bare = copy.copy(self)
        bare.samples, bare.validation = (), {}
        return bare

    def add(self, other: _Images) -> None:
        """Count what was found of the images that follow these."""
        self.filled += other.filled
        self.names += other.names
        self.hashes += other.hashes
        self.skipped += other.skipped

    def places(self, which: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.samples)) if which is None else which

    def name(self, place: int) -> str:
        return self.samples.names[place] if isinstance(self.samples, Dataset) else str(place)

    def none_left(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"there are no {what}",
            expected=f"at least one, better {ENOUGH_IMAGES} or more",
            got=f"{len(self.skipped)} that cannot be decoded" if self.skipped else "none",
            fix="check data.calibration",
        )

    def read(
        self, which: Sequence[int] | None = None, what: str = "calibration images", *, may_lack: bool = False
    ) -> Iterator[Named]:
        """Each batch's names, and its array as the graph takes it: of all images, or of those at the places given.

        Args:
            may_lack: give nothing, instead of raising, where no image can be decoded.
        """
        places = self.places(which)
        before = len(self.names)
        waiting: list[Named] = []
        for place in track(places, what, len(places)):
            sample = self._sample(place)
            if sample is None:
                continue
            self.hashes.append(hash_apart(sample, self.validation))
            self.names.append(sample.name)
            waiting.append((sample.name, self._input(sample)))
            if len(waiting) == self.batch:
                yield _joined(waiting)
                waiting.clear()
        if len(self.names) == before and not may_lack:
            raise self.none_left(what)
        if waiting:
            # TensorRT and the GPU's engine take batches of one size only.
            self.filled += self.batch - len(waiting)
            yield _joined([waiting[place % len(waiting)] for place in range(self.batch)])

    def notes(self) -> Iterator[str]:
        if len(self.names) < ENOUGH_IMAGES:
            yield f"only {len(self.names)} calibration images; fewer than {ENOUGH_IMAGES} may miss large values"
        repeated = len(self.hashes) - len(set(self.hashes))
        if repeated:
            yield f"{repeated} of {len(self.hashes)} calibration images repeat another"
        if self.filled:
            yield f"of the {self.batch} images of the last batch, {self.filled} are repeated to fill it up"
        if self.skipped:
            yield f"{len(self.skipped)} images were skipped: {'; '.join(self.skipped)}"

    def _sample(self, place: int) -> Sample | None:
        try:
            return self.samples[place]
        except DataError as error:
            if not self.skip_bad:
                raise
            self.skipped.append(error.problem)
            return None

    def _input(self, sample: Sample) -> NDArray[Any]:
        # Of a batch, each image is fed for itself; alone, it fills the batch that a graph wants.
        spec = self.spec if self.batch == 1 else replace(self.spec, shape=("batch", *self.spec.shape[1:]))
        try:
            return feed_image(spec, sample.image, self.preprocessing)[self.spec.name]
        except DataError as error:
            raise CalibrationError(
                f"the calibration image {sample.name} does not fit the graph's input {self.spec.name}",
                expected=error.expected,
                got=error.got,
                fix="set preprocessing (resize, height, width, channels) to what the graph was exported for",
            ) from error


def _joined(batch: Sequence[Named]) -> Named:
    names = ", ".join(dict.fromkeys(name for name, _ in batch))
    shapes = {x.shape[1:] for _, x in batch}
    if len(shapes) > 1:
        raise CalibrationError(
            f"the calibration images {names} have different sizes",
            expected="one size a batch",
            got=", ".join(map(str, sorted(shapes))),
            fix="set calibrate.batch to 1, or preprocessing.resize to stretch or letterbox",
        )
    return names, np.concatenate([x for _, x in batch])


def _refined(
    model: ModelProto,
    table: CalibrationTable,
    images: _Images,
    rest: Sequence[int],
    held_out: Sequence[int],
    config: CalibrateConfig,
    engine: EngineConfig,
) -> tuple[CalibrationTable, Refinement]:
    """The table refined on the rest of the images and judged by those held out; each step takes others, in a seeded
    order."""
    from pipeline.refinement import refine

    count = config.refine_steps * config.refine_batch
    order = teaching_order(rest, count, np.random.default_rng(config.seed))
    judges = [array for _, array in images.anew().read(held_out, "held-out images")]
    stream = (array for _, array in images.anew().read(order, "refining"))
    batches = in_batches(stream, config.refine_batch, "set calibrate.refine_batch to 1")
    return refine(model, table, batches, judges, config.refine_steps, engine)


def _split(count: int, asks: str, instead: str) -> tuple[list[int], list[int]]:
    rest, held_out = split_places(count)
    if not held_out:
        raise CalibrationError(
            f"{count} calibration images are too few for {asks}",
            expected=f"at least {HELD_OUT_STEP}, of which every fourth judges what the others chose",
            fix=f"give more images, or {instead}",
        )
    return rest, held_out


def _with_amax(entry: TensorRange, amax: float, counted: Histogram | None) -> TensorRange:
    return replace(entry, amax=amax, clipped=counted.share_above(amax) if counted else None)


def _notes(ranges: Sequence[TensorRange]) -> Iterator[str]:
    for entry in ranges:
        if entry.amax == ZERO_AMAX and entry.clipped == 0:
            yield f"tensor {entry.tensor} is zero on every image; its range is set to {ZERO_AMAX:.3g}"


def _outcome(refinement: Refinement | None) -> Iterator[str]:
    if refinement is not None:
        change = f"loss {refinement.loss_before:.3g} before and {refinement.loss_after:.3g} after"
        what = "kept" if refinement.kept else "not kept: ranges and biases are as they were"
        yield f"refined in {refinement.steps} steps, {change} on {refinement.held_out} held-out images: {what}"


def _verdict(trials: Sequence[AlgorithmTrial], held_out: int) -> Iterator[str]:
    if trials:
        shares = ", ".join(f"{trial.algorithm} {trial.agreement:.4%}" for trial in trials)
        ahead = trials[0].agreement - trials[1].agreement
        yield f"kept {trials[0].algorithm}, {ahead:.4%} ahead; same class on {held_out} held-out images: {shares}"
