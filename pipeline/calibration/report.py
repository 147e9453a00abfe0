"""What calibration leaves beside its cache: where every range comes from, and what the tensor held."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.artifacts import SCHEMA_VERSION, from_json, sha256_bytes
from pipeline.errors import CalibrationError

CACHE_FILE, REPORT_FILE = "calibration.cache", "report.json"


@dataclass(frozen=True)
class TensorRange:
    """What one tensor held, and the range chosen for it, in the tensor's unit.

    Attributes:
        clipped: share of values with |value| > amax, 0…1.
        images: how many were seen.
        minimum, maximum, clipped: None where TensorRT calibrated.
        histogram: values by |value| in 64 equal bins over [0, largest |value|]; empty where TensorRT calibrated.
    """

    tensor: str
    amax: float
    images: int
    minimum: float | None = None
    maximum: float | None = None
    clipped: float | None = None
    histogram: tuple[int, ...] = ()

    @property
    def largest(self) -> float | None:
        """Largest |value| seen."""
        return None if self.minimum is None or self.maximum is None else max(-self.minimum, self.maximum, 0.0)


@dataclass(frozen=True)
class AlgorithmTrial:
    """How an algorithm's ranges did on the held-out images: ``agreement`` is the share of pixels with FP32's class."""

    algorithm: str
    agreement: float


@dataclass(frozen=True)
class Refinement:
    """What gradient descent made of ranges and biases: see ``pipeline.refinement``.

    Attributes:
        held_out: images that learned nothing; ``loss_before`` and ``loss_after`` are their mean losses.
        kept: whether the loss fell; if not, ranges and biases are as they were.
        biases: of each quantized convolution, by its output, float32; they belong to the ranges.
    """

    steps: int
    held_out: int
    loss_before: float
    loss_after: float
    kept: bool
    biases: dict[str, tuple[float, ...]]
    seconds: float


@dataclass(frozen=True)
class CalibrationReport:
    """Where a calibration cache comes from.

    Attributes:
        algorithm: that chose the ranges; with ``auto``, the one that was kept.
        calibrator: cpu, gpu or tensorrt.
        images_sha256: of the images' pixels, independent of their names and order.
        skipped: images that could not be decoded, with ``calibrate.skip_bad``.
        trials: with ``auto``, best first; ``held_out`` images judged them.
        refinement: with ``calibrate.refine_steps``.
        seconds: of the whole calibration; ``collect_seconds`` of them for running the graph and counting.
    """

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
    collect_seconds: float
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    trials: tuple[AlgorithmTrial, ...] = ()
    held_out: int = 0
    refinement: Refinement | None = None
    schema_version: int = field(default=SCHEMA_VERSION)


def report_beside(cache: Path, data: bytes) -> CalibrationReport | None:
    """The report of a cache: ``<cache>.json``, or ``report.json`` beside a ``calibration.cache``; None without one.

    Args:
        data: what the cache file holds.

    Raises:
        CalibrationError: the cache is not what calibration wrote.
        BuildFolderError: the report cannot be read.
    """
    file = cache.with_name(cache.name + ".json")
    if not file.is_file():
        file = cache.with_name(REPORT_FILE)
        if cache.name != CACHE_FILE or not file.is_file() or b'"cache_sha256"' not in file.read_bytes():
            return None  # what lies there is another stage's report
    report = from_json(CalibrationReport, file)
    if report.cache_sha256 != sha256_bytes(data):
        raise CalibrationError(
            f"{cache} is not what calibration wrote",
            expected=f"sha256 {report.cache_sha256[:12]}…, as {file} says",
            got=f"{sha256_bytes(data)[:12]}…",
            fix=f"calibrate again or restore the file; to use changed ranges on purpose, remove {file.name}",
        )
    return report
