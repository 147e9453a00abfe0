"""The verdicts that later stages read: what validation and benchmark found."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from pipeline.artifacts import Device
from pipeline.backends.layers import EngineLayer, Group
from pipeline.config import Precision
from pipeline.metrics.latency import Estimate, LatencySummary


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
class Interval:
    """Between ``low`` and ``high`` lie 95 % of the figure's values over resampled images."""

    low: float
    high: float


@dataclass(frozen=True)
class Offender:
    """Where a bound is kept worst: an image, a class or both, with the figure there."""

    value: float | None
    image: str | None = None
    class_name: str | None = None
    note: str = ""

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.class_name, self.image) if part)
        value = "" if self.value is None else f" {self.value:.5g}"
        return f"{place}{value}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Check:
    """One bound: passed when ``value`` keeps it; ``value`` is None where the figure is not finite.

    Attributes:
        offenders: the worst first, three at most; of a class its worst image, with the class's figure.
        at_least: whether the bound has to be reached; otherwise it must not be exceeded.
        decibels: whether value and bound are signals over their errors, in dB; without, what has to reach a bound is a
            share of 1.
    """

    name: str
    value: float | None
    bound: float
    passed: bool
    worst_image: str | None = None
    offenders: tuple[Offender, ...] = ()
    at_least: bool = False
    decibels: bool = False

    @property
    def shown(self) -> str:
        return "not finite" if self.value is None else f"{self.value:.5g}"

    @property
    def limit(self) -> str:
        """The bound for people, such as "at least 0.97"."""
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}"

    @property
    def used(self) -> float | None:
        """Share of the budget that is used up, 0 or more; None where the figure is not finite or nothing is allowed.

        Where a bound has to be reached, the budget is what the bound lacks of 1, or the error that it allows.
        """
        if self.value is None:
            return None
        if self.decibels:
            return float(10 ** ((self.bound - self.value) / 20))
        spent, allowed = (1 - self.value, 1 - self.bound) if self.at_least else (self.value, self.bound)
        return max(spent, 0.0) / allowed if allowed > 0 else None


@dataclass(frozen=True)
class Scores:
    """Against the labels, void left out; a class that the labels do not hold has no figures (None).

    Attributes:
        mean_iou, mean_dice, mean_boundary_f, mean_category_iou: over what the labels hold.
        intervals: by figure: "mean_iou", …, "class_iou/<class>"; none for fewer than two images.
    """

    mean_iou: float
    pixel_accuracy: float
    class_iou: dict[str, float | None]
    mean_dice: float
    class_dice: dict[str, float | None]
    mean_boundary_f: float | None
    class_boundary_f: dict[str, float | None]
    mean_category_iou: float | None
    category_iou: dict[str, float | None]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Drop:
    """How much worse than FP32 the candidate is, from the same images; ``interval`` over images resampled in pairs."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class OutputErrors:
    """One output's values against FP32's, over all images; None where a value is not finite.

    Attributes:
        quantiles: of the absolute error by share, such as "0.99"; rounded up by at most 1/128, from at most 131072
            values an image where there are so many.
        cosine: of all values as one vector; None where one side is zero.
        signal_to_error_db: energy of FP32's values over that of the error; None without error.
        not_finite, reference_not_finite: values that are NaN or infinite, by image.
        worst: image of the lowest cosine.
    """

    max_abs: float | None
    mean_abs: float | None
    quantiles: dict[str, float | None]
    cosine: float | None
    signal_to_error_db: float | None
    not_finite: dict[str, int]
    reference_not_finite: dict[str, int]
    worst: Offender | None

    @property
    def signal(self) -> str:
        """``signal_db`` for people."""
        named = {math.inf: "no error", -math.inf: "not finite"}
        return named.get(self.signal_db) or f"{self.signal_db:.1f} dB"

    @property
    def signal_db(self) -> float:
        """``signal_to_error_db``; infinite without error, minus infinity where a value is not finite."""
        if self.not_finite or self.reference_not_finite:
            return -math.inf
        return math.inf if self.signal_to_error_db is None else self.signal_to_error_db


@dataclass(frozen=True)
class Flips:
    """Pixels whose class is not FP32's, at the network's size, and how sure FP32 was of them.

    The margin is FP32's largest value less its second, as a share of FP32's output range in that image.

    Attributes:
        near_ties: those with a margin below ``near_tie``, which nobody sees.
        median_margin, max_margin: of all flipped pixels; None without any.
        worst: image with the most flips that are no near-ties.
    """

    pixels: int
    flipped: int
    near_ties: int
    near_tie: float
    median_margin: float | None
    max_margin: float | None
    worst: Offender | None

    @property
    def clear(self) -> int:
        return self.flipped - self.near_ties


@dataclass(frozen=True)
class ImageResult:
    """One image: agreement of masks (share of pixels), largest error, mIoU of FP32 and of the candidate.

    Without masks, agreement and mIoU are None.
    """

    name: str
    agreement: float | None
    max_abs_error: float | None
    reference_miou: float | None
    miou: float | None


@dataclass(frozen=True)
class ValidationReport:
    """The verdict on one precision; of ``task: tensors``, all figures of masks are None or empty.

    Attributes:
        agreement: share of pixels, over all images, where the candidate's class is FP32's.
        reference, scores: against the labels, of FP32 and of the candidate; None without labels.
        max_abs_error, mean_abs_error: of the output's values; None where one is not finite, and for labels.
        logit_range: largest |value| of FP32's output, for reading the errors; 0 for labels.
        repeat: commands that repeat the comparison on the saved images, from this report's folder; none for labels.
        output: what the model gives; of labels only masks are compared.
        agreement_interval, boundary_f_interval: None for fewer than two images.
        boundary_f: mean boundary F-score of the candidate's masks against FP32's; None where no mask has a boundary.
        drops: "mean_iou", "mean_dice", "mean_boundary_f", "class_iou/<class>"; none without labels.
        outputs: by output's name; none for labels.
        flips: None for labels.
        worst: by figure, the image in which the candidate loses most.
        boundary_tolerance: of the boundary F-score, as a share of the diagonal.
        resamples: of images, for the intervals.
    """

    candidate: Candidate
    passed: bool
    checks: tuple[Check, ...]
    images: tuple[ImageResult, ...]
    agreement: float | None
    max_abs_error: float | None
    mean_abs_error: float | None
    logit_range: float
    reference: Scores | None
    scores: Scores | None
    repeat: tuple[str, ...]
    pictures: tuple[str, ...]
    seconds: float
    output: Literal["logits", "labels", "probabilities", "tensors"] = "logits"
    agreement_interval: Interval | None = None
    boundary_f: float | None = None
    boundary_f_interval: Interval | None = None
    drops: dict[str, Drop] = field(default_factory=dict)
    outputs: dict[str, OutputErrors] = field(default_factory=dict)
    flips: Flips | None = None
    worst: dict[str, Offender] = field(default_factory=dict)
    boundary_tolerance: float = 0.0075
    resamples: int = 0

    @property
    def least_signal(self) -> str:
        """The least ``signal_to_error_db`` of an output, for people."""
        return min(self.outputs.values(), key=lambda found: found.signal_db).signal

    @property
    def least_cosine(self) -> str:
        """The least cosine of an output, for people."""
        known = [found.cosine for found in self.outputs.values() if found.cosine is not None]
        return f"{min(known):.6f}" if known else "–"

    @property
    def largest_error(self) -> str:
        """``max_abs_error`` for people; where outputs have ranges of their own, the largest error of any."""
        if self.output == "labels":
            return "labels only"
        if self.output == "tensors":
            errors = [found.max_abs for found in self.outputs.values()]
            known = [error for error in errors if error is not None]
            return f"{max(known):.3g}" if len(known) == len(errors) else "not finite"
        return "not finite" if self.max_abs_error is None else f"{self.max_abs_error:.3g} of {self.logit_range:.3g}"


@dataclass(frozen=True)
class PicturedImage:
    """One validation image as the page shows it, all files of one size.

    Attributes:
        width, height: of the files; every ``reduced``-th pixel of the image.
        views: files by "image", "label", "reference" (FP32's mask) and precision.
        marks: by precision, the map of flipped pixels, of which none is lost by reduction.
        flipped, near_ties: pixels whose class is not FP32's by precision, as in ``Flips``; near-ties are unknown (None)
            for labels.
        pixels: of the network's mask.
    """

    name: str
    width: int
    height: int
    reduced: int
    views: dict[str, str]
    marks: dict[Precision, str]
    flipped: dict[Precision, int]
    near_ties: dict[Precision, int | None]
    pixels: int


@dataclass(frozen=True)
class PicturesReport:
    """The images in which a precision agrees least with FP32, the worst first."""

    images: tuple[PicturedImage, ...]


@dataclass(frozen=True)
class Accuracy:
    """Of one precision, by its last validation: share of pixels with FP32's class (None without masks),
    mean IoU (None without labels)."""

    agreement: float | None
    mean_iou: float | None
    passed: bool


@dataclass(frozen=True)
class Timing:
    """One candidate's latency at batch ``batch``: on the GPU alone (compute), and from host array to host array.

    Attributes:
        bytes: of the engine or the ONNX file; None where there is no file.
        median_ms: of the interleaved rounds, on the GPU alone.
        cuda_graph: whether inferences were replayed from a CUDA graph.
        ran: what ran it, and where.
        to_gpu, from_gpu: copies of the input and the output.
        rounds_ms: of every interleaved round, on the GPU alone; on the host where that is all there is.
        ratio: of ``rounds_ms``, round by round, to the fastest candidate's on the GPU, or on the CPU; None for one that
            was timed alone.
        gpu_bytes: GPU memory taken, CUDA's context not counted.
        build_seconds: to build the engine, or to compile.
        agreement: share of the timed image's pixels with FP32's class on ONNX Runtime.
        accuracy: by the last validation of this very engine.
        watts: the whole GPU's mean power during its turns.
        joules: an image, from ``watts`` and ``median_ms``.
        sm_mhz: lowest and highest clock at the end of its turns.
    """

    name: str
    batch: int
    bytes: int | None
    device: LatencySummary | None
    end_to_end: LatencySummary
    median_ms: Estimate | None = None
    cuda_graph: bool = False
    ran: str = ""
    to_gpu: LatencySummary | None = None
    from_gpu: LatencySummary | None = None
    rounds_ms: tuple[float, ...] = ()
    ratio: Estimate | None = None
    gpu_bytes: int | None = None
    build_seconds: float | None = None
    agreement: float | None = None
    accuracy: Accuracy | None = None
    watts: float | None = None
    joules: float | None = None
    sm_mhz: tuple[int, int] | None = None


@dataclass(frozen=True)
class Throughput:
    """Images a second of one candidate.

    Attributes:
        clock: "GPU": one batch after the other on the GPU alone; "host": with copies, ``streams`` batches under way.
    """

    name: str
    batch: int
    streams: int
    images_per_second: float
    clock: Literal["GPU", "host"]


@dataclass(frozen=True)
class OwnFigure:
    """What another program says of an engine, after the turns.

    Attributes:
        tool: with its version where it tells one.
        what: that is timed, in its words.
    """

    tool: str
    name: str
    what: str
    median_ms: float
    count: int


@dataclass(frozen=True)
class GroupTime:
    """The layers of one group: ``ms`` and ``share`` of the profiled time; ``bytes`` is None where one is unknown."""

    group: Group
    layers: int
    ms: float
    share: float
    bytes: int | None


@dataclass(frozen=True)
class Floor:
    """What no engine of these convolutions beats on this GPU.

    Attributes:
        arithmetic_ms: multiply-accumulates at the GPU's dense rates, each in the precision that it runs in.
        traffic_ms: the bytes of all layers at the memory's bandwidth; no bound, as tensors may stay in the cache.
        source: of the rates.
    """

    arithmetic_ms: float
    traffic_ms: float | None
    source: str


@dataclass(frozen=True)
class EngineAccount:
    """Where an engine's time goes.

    Attributes:
        engine_sha256: of the plan.
        profiled_ms: sum over the layers, timed one by one; more than a whole inference takes.
        whole_ms: median of whole inferences, not profiled.
        macs: multiply-accumulates of the convolutions by the precision that they run in; "unknown": in a layer
            that does not tell, or in none.
        bytes: read and written by all layers; None where one is unknown.
        floor: None where the GPU's rates, or a precision's, are unknown; ``no_floor`` says which.
    """

    engine_sha256: str
    layers: tuple[EngineLayer, ...]
    groups: tuple[GroupTime, ...]
    profiled_ms: float
    whole_ms: float
    macs: dict[str, int]
    bytes: int | None
    floor: Floor | None
    no_floor: str = ""

    @property
    def int8_share(self) -> float | None:
        """Of all multiply-accumulates, those in INT8; None where there are none, or some in no layer that tells."""
        total = sum(self.macs.values())
        return None if not total or "unknown" in self.macs else self.macs.get("int8", 0) / total


@dataclass(frozen=True)
class SpeedVerdict:
    """Whether INT8 is worth it.

    Attributes:
        speedup: FP16's time over INT8's; None where not both ran on a GPU.
        worthwhile: the whole interval lies above ``min_speedup``; None without a speedup.
        sentence: the verdict, or why there is none.
        reasons: what the time goes to, most telling first.
    """

    speedup: Estimate | None
    min_speedup: float
    worthwhile: bool | None
    sentence: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkReport:
    """Latencies, and what was built but cannot run here (with the reason).

    Attributes:
        engines: where the time goes, by precision.
        verdict: None where INT8 was not asked for.
        settled: whether the GPU's latencies had stopped moving before they were measured.
        rounds: of interleaved timing.
        notes: what could not be found out, and why.
        warnings: what speaks against the figures, such as clocks that moved.
        environment: versions and settings by name.
        warm_up: the rule by which candidates were warm.
        warm_ups: turns of each candidate on the GPU before the rounds.
    """

    timings: tuple[Timing, ...]
    not_run: dict[str, str]
    processor: str
    cores: int
    device: Device | None
    created: str
    engines: dict[Precision, EngineAccount]
    verdict: SpeedVerdict | None
    settled: bool | None
    rounds: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    own_figures: tuple[OwnFigure, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    warm_up: str = ""
    warm_ups: int = 0
