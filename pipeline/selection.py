"""Which algorithm's ranges keep the masks best, judged on images that did not choose them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.algorithms import ALGORITHMS
from pipeline.calibration.histogram import Histogram
from pipeline.calibration.ranges import choose_ranges
from pipeline.calibration.report import AlgorithmTrial
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Algorithm, CalibrateConfig, EngineConfig
from pipeline.data.preprocessing import class_ids
from pipeline.graph.quantize import quantized_as

ANY_CLASS = 1 << 16


def try_algorithms(
    model: ModelProto,
    histograms: Sequence[Histogram],
    inputs: Iterable[NDArray[Any]],
    config: CalibrateConfig,
    engine: EngineConfig,
) -> list[AlgorithmTrial]:
    """Share of pixels whose class the INT8 graph keeps, by algorithm, best first; of equal ones in ALGORITHMS' order.

    FP32 and Q/DQ graph both run on ONNX Runtime; the first output's classes count.

    Args:
        histograms: of the images that choose the ranges.
        inputs: other images, as the graph takes them.
        engine: for ``exclude``, ``qdq`` and ``input_bits``.

    Raises:
        ModelError: a graph that cannot be quantized or run.
    """
    feeds = list(inputs)
    wanted = _masks(model, feeds)
    trials = []
    for algorithm in ALGORITHMS:
        ranges = choose_ranges(histograms, algorithm, config, 0)
        table = CalibrationTable(algorithm, {entry.tensor: entry.amax for entry in ranges})
        masks = _masks(quantized_as(model, table, engine), feeds)
        equal = [float(np.mean(mask == reference)) for mask, reference in zip(masks, wanted, strict=True)]
        trials.append(AlgorithmTrial(algorithm, float(np.mean(equal))))
    return sorted(trials, key=lambda trial: -trial.agreement)


def kept(trials: Sequence[AlgorithmTrial]) -> Algorithm:
    """The first one's algorithm."""
    return cast(Algorithm, trials[0].algorithm)


def _masks(model: ModelProto, feeds: Sequence[NDArray[Any]]) -> list[NDArray[np.integer]]:
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        source, output = runner.inputs[0].name, runner.outputs[0].name
        return [class_ids(one[np.newaxis], ANY_CLASS) for x in feeds for one in runner({source: x})[output]]
