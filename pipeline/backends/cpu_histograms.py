"""Histograms of a graph's activations by ONNX Runtime on the CPU, one image at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.histogram import Histogram, merge_concatenated
from pipeline.calibration.segments import Segment, split
from pipeline.graph.io import model_inputs
from pipeline.graph.placement import concatenations

SEGMENT_BYTES = 256 << 20


def cpu_histograms(
    model: ModelProto, tensors: Sequence[str], images: Iterable[tuple[str, NDArray[Any]]]
) -> list[Histogram]:
    """What the tensors hold on all images, in their order.

    Memory is independent of the number of images: some 256 MiB of activations of one image at a time (where no single
    tensor is larger), what later nodes still read of it, and 128 KiB a tensor for its histogram.

    Args:
        model: with one input.
        tensors: float activations of the graph.
        images: name of each, and its array as the graph takes it.

    Raises:
        CalibrationError: NaN or infinite activations.
        ModelError: a graph that ONNX Runtime cannot load or run.
    """
    histograms = {tensor: Histogram(tensor) for tensor in tensors}
    unions = concatenations(model, tensors)
    for image, tensor, values in activations(model, [tensor for tensor in tensors if tensor not in unions], images):
        histograms[tensor].add(values, image)
    merge_concatenated(histograms, unions)
    return list(histograms.values())


def activations(
    model: ModelProto, tensors: Sequence[str], images: Iterable[tuple[str, NDArray[Any]]]
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name of the image, of the tensor, and what it holds: of every tensor, on one image after the other.

    Args, memory, raises ModelError: as ``cpu_histograms``.
    """
    (source,) = (spec.name for spec in model_inputs(model))
    chain: list[tuple[Segment, OnnxRuntimeRunner]] = []
    with ExitStack() as stack:
        for image, x in images:
            if not chain:
                observed = [tensor for tensor in tensors if tensor != source]
                for segment in split(model, observed, {source: x.shape}, SEGMENT_BYTES):
                    # Optimising needs more memory here and is no faster: with every tensor an output, little fuses.
                    runner = OnnxRuntimeRunner(segment.model.SerializeToString(), optimize=False, arena=False)
                    chain.append((segment, stack.enter_context(runner)))
            if source in tensors:
                yield image, source, x
            alive: dict[str, NDArray[Any]] = {source: x}
            for segment, runner in chain:
                alive |= runner({spec.name: alive[spec.name] for spec in runner.inputs})
                for tensor in segment.observed:
                    yield image, tensor, alive[tensor]
                alive = {name: values for name, values in alive.items() if name in segment.carried}
