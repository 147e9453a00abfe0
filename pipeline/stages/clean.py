"""Raw ONNX export -> the graph that engines are built from, with proof that it computes the same."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipeline.artifacts import SCHEMA_VERSION, TensorSpec, sha256_bytes, sha256_file, to_json, write_atomically
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.base import Pass, PassRun
from pipeline.graph.cleaning import clean_model, clean_passes
from pipeline.graph.io import load_model, model_inputs, opset, save_model

log = logging.getLogger(__name__)

SEED = 0
INPUT_KIND = (
    "seeded waves, edges and noise, mean 0, standard deviation about 1; integers: uniform in their range, at most 255"
)
# Sizes for dynamic axes: (batch, height, width, any other axis). The last one is odd, so that floor and padding show.
TRIALS = ((1, 64, 64, 8), (2, 64, 96, 8), (1, 37, 51, 5))
SHOWN = 5
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
        shapes: input shapes that were tried, one {input: shape} a trial.
        refused: dynamic shapes that the raw graph itself cannot run; nothing is compared there.
        max_abs_error: max |raw - clean| over outputs and trials.
        max_relative_error: max over outputs and trials of max |raw - clean| / max |raw|.
        tolerance: bound on ``max_relative_error``.
        guilty: the pass that broke equality; None where it holds.
    """

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    refused: tuple[dict[str, tuple[int, ...]], ...]
    seed: int
    inputs: str
    max_abs_error: float
    max_relative_error: float
    tolerance: float
    passed: bool
    guilty: str | None = None


@dataclass(frozen=True, config=STRICT)
class CleaningReport:
    """Result of ``clean``; ``clean_sha256`` is None where the check failed and nothing was written."""

    raw_sha256: str
    clean_sha256: str | None
    opset: int
    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    passes: tuple[PassReport, ...]
    equality: Equality
    seconds: float
    schema_version: int = field(default=SCHEMA_VERSION)


def clean(
    raw: Path, target: Path, report: Path | None, tolerance: float, *, passes: Sequence[Pass] | None = None
) -> CleaningReport:
    """Clean the graph of ``raw`` into ``target``, compare both on ONNX Runtime, and write the report.

    The target is written only where every output agrees within ``tolerance`` (relative to the output's largest value).
    The model's metadata and its model card are kept.

    Args:
        passes: default ``clean_passes()``.

    Raises:
        ModelError: unreadable input, no convolution in it, target = input, a graph that ONNX Runtime cannot run, a
            pass that fails.
        CheckFailed: the clean graph computes something else; the pass at fault is named, the report is written.
        BuildFolderError: the target cannot be written.
        UnsupportedError: ONNX Runtime is missing.
    """
    start = time.perf_counter()
    if target.resolve() == raw.resolve():
        raise ModelError(
            f"the clean graph would overwrite the raw export {raw}",
            expected="another path for the result",
            fix="choose another -o",
        )
    model = load_model(raw)
    if not any(node.op_type in ("Conv", "ConvTranspose") for node in model.graph.node):
        counts = Counter(node.op_type for node in model.graph.node)
        raise ModelError(
            f"{raw} holds no convolution",
            expected="a segmentation network with Conv nodes",
            got=", ".join(f"{count} {op}" for op, count in counts.most_common(SHOWN)) or "an empty graph",
            fix="check that the right file was given",
        )
    steps = clean_passes() if passes is None else tuple(passes)
    trials = _Trials(model)
    cleaned, runs = clean_model(model, steps)
    absolute, relative = trials.compare(cleaned)
    passed = relative <= tolerance
    guilty = None if passed else _bisect(model, steps, runs, trials, tolerance)
    if passed:
        save_model(cleaned, target)
    result = CleaningReport(
        raw_sha256=sha256_file(raw),
        clean_sha256=sha256_bytes(cleaned.SerializeToString(deterministic=True)) if passed else None,
        opset=opset(cleaned),
        nodes_before=_counts(model),
        nodes_after=_counts(cleaned),
        passes=tuple(
            PassReport(run.name, run.round, run.result.modified, run.result.fired, round(run.seconds, 4))
            for run in runs
        ),
        equality=Equality(
            shapes=tuple(trials.shapes),
            refused=tuple(trials.refused),
            seed=SEED,
            inputs=INPUT_KIND,
            max_abs_error=absolute,
            max_relative_error=relative,
            tolerance=tolerance,
            passed=passed,
            guilty=guilty,
        ),
        seconds=round(time.perf_counter() - start, 3),
    )
    if report is not None:
        write_atomically(report, to_json(result))
    if not passed:
        raise CheckFailed(
            f"the clean graph of {raw} computes something else than the raw one; {target} was not written",
            expected=f"a change of at most {tolerance:g} of each output's largest value",
            got=f"{relative:.3g}, since the pass {guilty}",
            fix="report the model with the cleaning report; a larger clean.tolerance lets it pass",
        )
    log.info(
        "cleaned %s: %d nodes -> %d, max relative change %.1e", raw, len(model.graph.node), _total(result), relative
    )
    return result


class _Trials:
    """Inputs, and what the raw graph makes of them."""

    def __init__(self, model: ModelProto) -> None:
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.refused: list[dict[str, tuple[int, ...]]] = []
        self.feeds: list[dict[str, NDArray[Any]]] = []
        self.wanted: list[dict[str, NDArray[Any]]] = []
        specs = model_inputs(model)
        reason: ModelError | None = None
        with OnnxRuntimeRunner(model.SerializeToString(), optimize=False) as runner:
            for shapes in _shapes(specs):
                rng = np.random.default_rng(SEED)
                feeds = {spec.name: structured_input(shapes[spec.name], spec.dtype, rng) for spec in specs}
                try:
                    outputs = runner(feeds)
                except ModelError as error:
                    self.refused.append(shapes)
                    reason = error
                    continue
                self.shapes.append(shapes)
                self.feeds.append(feeds)
                self.wanted.append(outputs)
        if not self.shapes:
            assert reason is not None
            raise ModelError(
                "the raw graph runs with none of the input sizes tried, so nothing can be compared",
                got="; ".join(str(shapes) for shapes in self.refused),
                fix="export it with static sizes",
            ) from reason

    def compare(self, model: ModelProto) -> tuple[float, float]:
        """(max absolute, max relative) error of a rewritten graph; infinite where it does not run."""
        absolute = relative = 0.0
        try:
            with OnnxRuntimeRunner(model.SerializeToString(), optimize=False) as runner:
                for feeds, wanted in zip(self.feeds, self.wanted, strict=True):
                    outputs = runner(feeds)
                    for name, reference in wanted.items():
                        errors = _errors(reference, outputs[name])
                        absolute, relative = max(absolute, errors[0]), max(relative, errors[1])
        except (ModelError, ValueError, KeyError) as error:  # broken by a pass: as wrong as it can be
            log.debug("the rewritten graph does not run: %s", error)
            return float("inf"), float("inf")
        return absolute, relative


def structured_input(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """An array with smooth and sharp parts: waves along the last two axes, a step, and noise (see INPUT_KIND)."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.asarray(rng.integers(0, 2, shape), kind)
    if kind.kind in "iu":
        return np.asarray(rng.integers(0, min(255, int(np.iinfo(kind).max)), shape, endpoint=True), kind)
    values = 0.3 * rng.standard_normal(shape)
    for axis in range(max(0, len(shape) - 2), len(shape)):
        position = np.linspace(0, 1, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        values = values + np.sin(2 * np.pi * (rng.uniform(1, 4) * position + rng.uniform()))
        values = values + 0.5 * np.sign(position - rng.uniform(0.3, 0.7))
    return np.asarray(values, kind)


def _shapes(specs: Sequence[TensorSpec]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes to try: one where all is static, else one per trial; axes of one name get one size."""
    trials = []
    for batch, height, width, other in TRIALS:
        sizes: dict[str, int] = {}
        shapes = {}
        for spec in specs:
            rank = len(spec.shape)
            guess = {0: batch, rank - 2: height, rank - 1: width} if rank == 4 else {0: batch}
            shapes[spec.name] = tuple(
                size if isinstance(size, int) else sizes.setdefault(size, guess.get(axis, other))
                for axis, size in enumerate(spec.shape)
            )
        if shapes not in trials:
            trials.append(shapes)
    return trials


def _errors(reference: NDArray[Any], got: NDArray[Any]) -> tuple[float, float]:
    """(max |a - b|, that / max |a|); infinite for other shapes or types, or where only one side is not finite."""
    if reference.shape != got.shape or reference.dtype != got.dtype:
        return float("inf"), float("inf")
    a, b = reference.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf"), float("inf")
    error = float(np.abs(a[finite] - b[finite]).max(initial=0))
    if error == 0:
        return 0.0, 0.0
    largest = float(np.abs(a[finite]).max(initial=0))
    return error, error / largest if largest > 0 else float("inf")


def _bisect(
    model: ModelProto, passes: Sequence[Pass], runs: Sequence[PassRun], trials: _Trials, tolerance: float
) -> str:
    """Name of the pass after which the graph first computes something else (binary search over the changes)."""
    changes = [run.name for run in runs if run.result.modified]
    good, bad = 0, len(changes)
    while bad - good > 1:
        middle = (good + bad) // 2
        relative = float("inf")
        with contextlib.suppress(ModelError):  # a prefix that leaves no valid graph is a bad one
            relative = trials.compare(clean_model(model, passes, stop_after=middle)[0])[1]
        good, bad = (middle, bad) if relative <= tolerance else (good, middle)
    return changes[bad - 1] if changes else "none (no pass changed the graph)"


def _counts(model: ModelProto) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _total(report: CleaningReport) -> int:
    return sum(report.nodes_after.values())
