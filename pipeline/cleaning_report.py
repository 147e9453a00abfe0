"""What cleaning leaves beside its graph: what changed, and the proof that it computes the same."""

from __future__ import annotations

from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipeline.artifacts import SCHEMA_VERSION
from pipeline.backends.parsing import ParserVerdict
from pipeline.graph.deployment import BakedEquality
from pipeline.graph.findings import Finding
from pipeline.trials import Trial

STRICT = ConfigDict(ser_json_inf_nan="strings", extra="forbid")


@dataclass(frozen=True, config=STRICT)
class PassReport:
    """What one execution of a pass did; ``fired`` holds (rule, node or tensor name)."""

    name: str
    round: int
    modified: bool
    fired: tuple[tuple[str, str], ...]
    seconds: float


@dataclass(frozen=True, config=STRICT)
class Equality:
    """Certificate that raw and clean graph compute the same, both on ONNX Runtime without its own optimizations.

    Attributes:
        trials: every size that was compared, with its error.
        refused: dynamic shapes that the raw graph itself cannot run; nothing is compared there.
        inputs, sizes: how values and sizes were chosen.
        max_abs_error: max |raw - clean| over outputs and trials.
        max_relative_error: max over outputs and trials of max |raw - clean| / max |raw|.
        tolerance: bound on ``max_relative_error``.
        guilty: the pass that broke equality; None where it holds.
    """

    trials: tuple[Trial, ...]
    refused: tuple[dict[str, tuple[int, ...]], ...]
    seed: int
    inputs: str
    sizes: str
    max_abs_error: float
    max_relative_error: float
    tolerance: float
    passed: bool
    guilty: str | None = None

    @property
    def shapes(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        return tuple(trial.shapes for trial in self.trials)


@dataclass(frozen=True, config=STRICT)
class CleaningReport:
    """Result of ``clean``; ``clean_sha256`` is None where the check failed and nothing was written.

    Attributes:
        raw_sha256, clean_sha256: over the file, and the file of its external data where there is one.
        parser: what TensorRT's parser says of the clean graph.
        peak_memory_mib: the largest resident size of this process so far.
    """

    raw_sha256: str
    clean_sha256: str | None
    opset: int
    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    passes: tuple[PassReport, ...]
    equality: Equality
    parser: ParserVerdict
    findings: tuple[Finding, ...]
    peak_memory_mib: int
    seconds: float
    baked: BakedEquality | None = None
    schema_version: int = field(default=SCHEMA_VERSION)
