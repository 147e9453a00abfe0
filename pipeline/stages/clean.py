"""Raw ONNX export -> the graph that engines are built from, with proof that it computes the same."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnx import ModelProto

from pipeline.artifacts import Output, to_json, write_atomically
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.parsing import parse_verdict
from pipeline.cleaning_report import CleaningReport, Equality, PassReport
from pipeline.config import ProfileRange
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.base import Pass, PassRun
from pipeline.graph.cleaning import clean_model, clean_passes
from pipeline.graph.deployment import BakedEquality, Input, bake, check_baked
from pipeline.graph.findings import refusals
from pipeline.graph.io import (
    DATA_SUFFIX,
    load_model,
    model_files,
    opset,
    read_card,
    sha256_files,
    sha256_model,
    staged,
    write_model,
)
from pipeline.graph.promises import write_multiples
from pipeline.trials import INPUTS, SEED, SIZES, Trials, structured_input

__all__ = ["CleaningReport", "Equality", "PassReport", "clean", "structured_input"]

log = logging.getLogger(__name__)

SHOWN = 5
WAY_OUT = "change the network where the node is made, or export it differently"


def clean(
    raw: Path,
    target: Path,
    report: Path | None,
    tolerance: float,
    *,
    profiles: Mapping[str, ProfileRange] | None = None,
    input: Input = "float",
    output: Output = "logits",
    passes: Sequence[Pass] | None = None,
) -> CleaningReport:
    """Clean the graph of ``raw`` into ``target``, compare both on ONNX Runtime, and write the report.

    The target is written only where every output agrees within ``tolerance`` (relative to the output's largest value),
    as one file, or with ``<target>.data`` beside it where protobuf's limit forbids that. The model's metadata and its
    model card are kept.

    Args:
        profiles: the sizes that are compared for free axes, by the axis's name in the graph or batch, height, width;
            default: see ``pipeline.trials.SIZES``. Their ``multiple_of`` is a promise that the clean graph relies on
            (see ``pipeline.graph.promises``).
        input, output: what the clean graph takes and gives, see ``pipeline.graph.deployment.bake``.
        passes: default ``clean_passes()``.

    Raises:
        ModelError: unreadable input, no convolution in it, no model card where ``input`` or ``output`` needs one,
            target = input, a graph that ONNX Runtime cannot run, a pass that fails.
        CheckFailed: the clean graph computes something else; the pass at fault is named, the report is written.
        BuildFolderError: the target cannot be written.
        UnsupportedError: ONNX Runtime is missing.
    """
    start = time.perf_counter()
    model = load_model(raw)
    files = model_files(raw)
    _refuse_overwriting(files, target, report)
    _require_convolution(model, raw)
    baking = (input, output) != ("float", "logits")
    if baking:
        _require_card(model, raw)
    steps = clean_passes() if passes is None else tuple(passes)
    if profiles:
        write_multiples(model, {axis: sizes.multiple_of for axis, sizes in profiles.items()})
    with staged(target) as file:
        trials = Trials(raw, model, profiles or {})
        cleaned, runs = clean_model(model, steps)
        gc.collect()  # graphsurgeon's graphs are cycles, and hold every weight once more
        write_model(cleaned, file)
        compared = trials.compare(file)
        relative = max(trial.max_relative_error for trial in compared)
        passed = relative <= tolerance
        baked = None
        if passed and baking:
            sizes = [shape for trial in compared for shape in trial.shapes.values()]
            cleaned, baked = _bake(cleaned, file, input, output, tolerance, sizes)
        equal = passed and (baked is None or baked.passed)
        clean_sha256 = sha256_model(file) if equal else None
        verdict = parse_verdict(file)
        guilty = None if passed else _bisect(model, steps, runs, trials, tolerance, file)
        result = CleaningReport(
            raw_sha256=sha256_files(files),
            clean_sha256=clean_sha256,
            opset=opset(cleaned),
            nodes_before=_counts(model),
            nodes_after=_counts(cleaned),
            passes=tuple(
                PassReport(run.name, run.round, run.result.modified, run.result.fired, round(run.seconds, 4))
                for run in runs
            ),
            equality=Equality(
                trials=compared,
                refused=tuple(trials.refused),
                seed=SEED,
                inputs=INPUTS,
                sizes=SIZES,
                max_abs_error=max(trial.max_abs_error for trial in compared),
                max_relative_error=relative,
                tolerance=tolerance,
                passed=passed,
                guilty=guilty,
            ),
            baked=baked,
            parser=verdict,
            findings=refusals(cleaned),
            peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
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
        if not equal:
            raise CheckFailed(
                f"{raw} with its preprocessing or decision inside computes something else; {target} was not written",
                expected="the labels or probabilities that the clean graph gives for the same images",
                got=str(baked),
                fix="report the model with the cleaning report; with nothing baked in it can be cleaned",
            )
    log.info(
        "cleaned %s: %d nodes -> %d, max relative change %.1e", raw, len(model.graph.node), _total(result), relative
    )
    _warn_of_refusals(result)
    return result


def _bake(
    model: ModelProto, file: Path, input: Input, output: Output, tolerance: float, shapes: Sequence[tuple[int, ...]]
) -> tuple[ModelProto, BakedEquality]:
    """Put preprocessing and decision into the clean graph and its file, and compare both on images."""
    card = read_card(model)
    final = bake(model, card, input=input, output=output)
    assert card is not None  # bake refuses a model without
    before = file.with_name(file.name + ".float")
    write_model(model, before)
    write_model(final, file)
    open_before, open_after = (functools.partial(OnnxRuntimeRunner, path, optimize=False) for path in (before, file))
    sizes = [(batch, height, width) for batch, _, height, width in shapes]
    return final, check_baked(open_before, open_after, card, tolerance=tolerance, sizes=sizes)


def _refuse_overwriting(files: Sequence[Path], target: Path, report: Path | None) -> None:
    """Raise ModelError where a result would take the place of a file of the raw model, or of the other result."""
    inputs = {file.resolve() for file in files}
    for output in (target, target.with_name(target.name + DATA_SUFFIX), report):
        if output is not None and output.resolve() in inputs:
            raise ModelError(
                f"{output} would overwrite the raw export {files[0]}",
                expected="another path for the result",
                fix="choose another -o (or --report)",
            )
    if report is not None and report.resolve() == target.resolve():
        raise ModelError(f"{target} is to be both graph and report", fix="choose another --report")


def _require_convolution(model: ModelProto, raw: Path) -> None:
    counts = Counter(node.op_type for node in model.graph.node)
    if counts["Conv"] + counts["ConvTranspose"] == 0:
        raise ModelError(
            f"{raw} holds no convolution",
            expected="a segmentation network with Conv nodes",
            got=", ".join(f"{count} {op}" for op, count in counts.most_common(SHOWN)) or "an empty graph",
            fix="check that the right file was given",
        )


def _require_card(model: ModelProto, raw: Path) -> None:
    if read_card(model) is None:
        raise ModelError(
            f"{raw} has no model card, so nobody knows its preprocessing and classes",
            expected="the metadata that `unet-trt export` writes",
            got="an image or a decision to be baked in",
            fix="name the file as network.onnx in a configuration and use the exported model.onnx, or bake nothing in",
        )


def _warn_of_refusals(report: CleaningReport) -> None:
    """Say which nodes no engine can be built with, and what can be done about them."""
    verdict, ways = report.parser, {finding.node: finding.way_out for finding in report.findings}
    parser = f"{verdict.parser} {verdict.version}"
    for node in verdict.refused:
        log.warning("%s refuses %s; to fix: %s", parser, node, ways.pop(node.node, WAY_OUT))
    if verdict.accepted is False and not verdict.refused:
        log.warning("%s: %s; to fix: %s", parser, verdict.note, WAY_OUT)
    for finding in report.findings:
        if finding.node in ways:  # the parser itself says nothing of it
            log.warning("node %s (%s): %s; to fix: %s", finding.node, finding.op, finding.reason, finding.way_out)


def _bisect(
    model: ModelProto, passes: Sequence[Pass], runs: Sequence[PassRun], trials: Trials, tolerance: float, scratch: Path
) -> str:
    """Name of the pass after which the graph first computes something else (binary search over the changes)."""
    changes = [run.name for run in runs if run.result.modified]
    good, bad = 0, len(changes)
    while bad - good > 1:
        middle = (good + bad) // 2
        relative = float("inf")
        with contextlib.suppress(ModelError):  # a prefix that leaves no valid graph is a bad one
            write_model(clean_model(model, passes, stop_after=middle)[0], scratch)
            relative = max(trial.max_relative_error for trial in trials.compare(scratch))
        good, bad = (middle, bad) if relative <= tolerance else (good, middle)
    return changes[bad - 1] if changes else "none (no pass changed the graph)"


def _counts(model: ModelProto) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _total(report: CleaningReport) -> int:
    return sum(report.nodes_after.values())
