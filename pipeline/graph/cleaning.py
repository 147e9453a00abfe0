"""The passes that turn an exported graph into the one that engines are built from, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from pipeline.errors import ModelError
from pipeline.graph import constants, structure
from pipeline.graph.arithmetic import FoldSizes, ShortenArithmetic, SizesToScales
from pipeline.graph.base import Pass, PassRun, run_passes
from pipeline.graph.batchnorm import FoldBatchNorm
from pipeline.graph.crop import CropPads, CropTransposed
from pipeline.graph.layout import CancelTransposes, MergeTransposes
from pipeline.graph.names import StableNames
from pipeline.graph.nearest import GatherToResize
from pipeline.graph.padding import ExplicitPads, MergePads, RemoveZeroPads
from pipeline.graph.repeat import RepeatToResize
from pipeline.graph.shapes import problem, set_value_info
from pipeline.graph.stacks import ReduceStacks
from pipeline.graph.unpool import RewriteUnpool
from pipeline.graph.upsample import CanonicalResize, NormalizeResize, RaiseLegacyResize


def clean_passes() -> tuple[Pass, ...]:
    """Fresh passes, in order: first what makes constants and sizes visible, then what uses them, names last."""
    return (
        constants.UnlistInitializers(),
        constants.LowerConstants(),
        constants.RemoveIdentities(),
        constants.SimplifyCasts(),
        constants.RemoveNoOpArithmetic(),
        constants.FoldConstants(),
        RaiseLegacyResize(),
        FoldSizes(),
        SizesToScales(),
        GatherToResize(),
        RepeatToResize(),
        NormalizeResize(),
        CanonicalResize(),
        RewriteUnpool(),
        structure.MergeDuplicates(),
        structure.SimplifyConcats(),
        structure.RemoveNoOps(),
        structure.FoldPixelShuffle(),
        ReduceStacks(),
        structure.DropUnreadOutputs(),
        MergeTransposes(),
        CancelTransposes(),
        CropTransposed(),
        CropPads(),
        ExplicitPads(),
        RemoveZeroPads(),
        MergePads(),
        FoldBatchNorm(),
        structure.SumRepeatedInputs(),
        ShortenArithmetic(),
        constants.RemoveUnused(),
        constants.OwnInitializers(),
        StableNames(),
    )


def clean_model(
    model: ModelProto, passes: Sequence[Pass] | None = None, *, stop_after: int | None = None
) -> tuple[ModelProto, tuple[PassRun, ...]]:
    """The cleaned model: valid ONNX with the same opset, inputs, outputs and metadata; and what each pass did.

    Cleaning a clean model gives the same bytes.

    Args:
        model: not changed.
        passes: default ``clean_passes()``.
        stop_after: see ``run_passes``.

    Raises:
        ModelError: a pass failed or left an invalid graph (it is named), or the model was invalid before.
        UnsupportedError: ONNX Runtime is not installed.
    """
    steps = clean_passes() if passes is None else tuple(passes)
    cleaned, runs = run_passes(model, steps, stop_after=stop_after)
    reason = problem(cleaned)
    if reason:
        changes = [run.name for run in runs if run.result.modified]
        broken = [i for i in range(len(changes) + 1) if problem(run_passes(model, steps, stop_after=i)[0])]
        guilty = f"the cleaning pass {changes[broken[0] - 1]} left" if broken and broken[0] else "the model holds"
        raise ModelError(
            f"{guilty} a graph that ONNX's checker refuses: {reason}",
            expected="valid ONNX",
            fix="export the model again; where that does not help, report it",
        )
    if any(run.result.modified for run in runs):
        set_value_info(cleaned)
    return cleaned, runs


__all__ = ["clean_model", "clean_passes"]
