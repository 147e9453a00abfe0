"""What the search for mixed precision leaves behind: sensitivities, every candidate, the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from pipeline.artifacts import SCHEMA_VERSION
from pipeline.metrics.latency import Estimate
from pipeline.reports import Interval


@dataclass(frozen=True)
class Figures:
    """A quantized graph on the held-out images.

    Attributes:
        agreement: share of pixels, at the network's size, with FP32's class.
        logit_error: root mean square of the first output's error, as a share of FP32's root mean square; None for
            labels.
        miou: mean IoU against the labels; None without them.
        miou_drop: FP32's less this one's; None without labels.
        miou_drop_interval: over images resampled in pairs; None for fewer than two labelled images.
    """

    agreement: float
    logit_error: float | None
    miou: float | None
    miou_drop: float | None
    miou_drop_interval: Interval | None

    @property
    def loss(self) -> float:
        """What a Pareto front weighs against time: the drop of mean IoU, or without labels the pixels that flip."""
        return 1 - self.agreement if self.miou_drop is None else self.miou_drop


@dataclass(frozen=True)
class Sensitivity:
    """One convolution, or one block, in INT8 while all else is FP32.

    Attributes:
        nodes: that are quantized together.
        macs: multiply-accumulates.
        lost_ms: estimated milliseconds that all INT8 loses when these alone stay FP16; below 0 where it gains.
    """

    name: str
    nodes: tuple[str, ...]
    macs: int
    figures: Figures
    lost_ms: float


@dataclass(frozen=True)
class Candidate:
    """One whole graph that was judged, in the order of the search.

    Attributes:
        move: how it came from the one before it.
        half: convolutions that stay FP16.
        estimated_ms: by the cost model.
        measured_ms: on the GPU; None where it was not timed.
        kept: the budget.
        accepted: the search went on from it, or it is the choice.
        best: no other candidate is both faster and closer to FP32, of those with ``comparable`` times.
    """

    move: str
    half: tuple[str, ...]
    figures: Figures
    estimated_ms: float
    kept: bool
    accepted: bool
    measured_ms: Estimate | None = None
    best: bool = False

    @property
    def ms(self) -> float:
        """Measured where it was, else estimated."""
        return self.estimated_ms if self.measured_ms is None else self.measured_ms.median


def comparable(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those whose times may be compared: the measured ones where there are some, since estimates are only bounds."""
    timed = tuple(one for one in candidates if one.measured_ms is not None)
    return timed or tuple(candidates)


@dataclass(frozen=True)
class MixReport:
    """Which convolutions stay FP16, and why.

    Attributes:
        images: held out, by name; ``labelled`` of them have labels.
        range_images: that chose the ranges which they judge; None for a cache without a report.
        max_miou_drop, min_agreement: the budget; None where it has no such part.
        latency: whether times are estimated or measured.
        rates: what the estimates rest on.
        estimates: whether that is the GPU's rates, or layers that were measured.
        border_factor: how many times a copy's time a border is estimated to take.
        fp32_miou: on the held-out images; None without labels.
        convolutions, blocks: most sensitive first.
        chosen: place of the choice among the candidates.
        patterns: ``engine.exclude`` of the choice, what the config excluded before included.
        speedup_kept: the choice's speed-up over all FP16 divided by all INT8's, which is all INT8's time over the
            choice's; above 1 where the choice is faster.
        gain_kept: time saved over all FP16 as a share of what all INT8 saves; None where that saves nothing.
        notes: what a reader should know before trusting the choice.
    """

    images: tuple[str, ...]
    labelled: int
    range_images: int | None
    max_miou_drop: float | None
    min_agreement: float | None
    latency: Literal["estimated", "measured"]
    rates: str
    fp32_miou: float | None
    convolutions: tuple[Sensitivity, ...]
    blocks: tuple[Sensitivity, ...]
    candidates: tuple[Candidate, ...]
    chosen: int
    patterns: tuple[str, ...]
    speedup_kept: float
    gain_kept: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    estimates: Literal["rates", "layers"] = "rates"
    border_factor: float = 1.0
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def choice(self) -> Candidate:
        return self.candidates[self.chosen]

    @property
    def why_all_half(self) -> str:
        """Why every convolution stays FP16; empty where some do not."""
        if self.chosen != 0:
            return ""
        half, *others = comparable(self.candidates)
        kept = [one.ms for one in others if one.kept]
        if not kept:
            return "nothing else that was judged keeps the budget"
        return (
            "no mixture that keeps the budget is faster than FP16 "
            f"(the fastest takes {min(kept):.4f} ms, FP16 {half.ms:.4f} ms, {self.latency})"
        )
