"""The verdicts that later stages read: what validation and benchmark found."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from pipeline.artifacts import Device
from pipeline.config import Precision
from pipeline.metrics.latency import LatencySummary


@dataclass(frozen=True)
class Candidate:
    """What is judged: ``ran`` names the library that ran it, ``emulated`` whether that was no engine."""

    precision: Precision
    emulated: bool
    ran: str
    model_sha256: str
    engine_sha256: str | None
    route: str | None


@dataclass(frozen=True)
class Check:
    """One bound: passed when ``value`` keeps it; ``value`` is None where the figure is not finite."""

    name: str
    value: float | None
    bound: float
    passed: bool
    worst_image: str | None = None

    @property
    def shown(self) -> str:
        return "not finite" if self.value is None else f"{self.value:.5g}"


@dataclass(frozen=True)
class Scores:
    """Against the labels, void left out; a class that the labels do not hold has no IoU."""

    mean_iou: float
    pixel_accuracy: float
    class_iou: dict[str, float | None]


@dataclass(frozen=True)
class ImageResult:
    """One image: agreement of masks (share of pixels), largest error, mIoU of FP32 and of the candidate."""

    name: str
    agreement: float
    max_abs_error: float | None
    reference_miou: float | None
    miou: float | None


@dataclass(frozen=True)
class ValidationReport:
    """The verdict on one precision.

    Attributes:
        agreement: share of pixels, over all images, where the candidate's class is FP32's.
        reference, scores: against the labels, of FP32 and of the candidate; None without labels.
        max_abs_error, mean_abs_error: of the output's values; None where one is not finite, and for labels.
        logit_range: largest |value| of FP32's output, for reading the errors; 0 for labels.
        repeat: commands that repeat the comparison on the saved images, from this report's folder; none for labels.
        output: what the model gives; of labels only masks are compared.
    """

    candidate: Candidate
    passed: bool
    checks: tuple[Check, ...]
    images: tuple[ImageResult, ...]
    agreement: float
    max_abs_error: float | None
    mean_abs_error: float | None
    logit_range: float
    reference: Scores | None
    scores: Scores | None
    repeat: tuple[str, ...]
    pictures: tuple[str, ...]
    seconds: float
    output: Literal["logits", "labels", "probabilities"] = "logits"

    @property
    def largest_error(self) -> str:
        """``max_abs_error`` for people."""
        if self.output == "labels":
            return "labels only"
        return "not finite" if self.max_abs_error is None else f"{self.max_abs_error:.3g} of {self.logit_range:.3g}"


@dataclass(frozen=True)
class Timing:
    """One candidate's latency at batch ``batch``: on the GPU alone (compute), and from host array to host array."""

    name: str
    batch: int
    bytes: int
    device: LatencySummary | None
    end_to_end: LatencySummary


@dataclass(frozen=True)
class BenchmarkReport:
    """Latencies, and what was built but cannot run here (with the reason)."""

    timings: tuple[Timing, ...]
    not_run: dict[str, str]
    processor: str
    cores: int
    device: Device | None
    created: str
