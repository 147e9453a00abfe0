"""The clean graph with like ranges in all channels of a tensor, with proof that it computes the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import to_json, write_atomically
from pipeline.backends.base import feed_image
from pipeline.backends.cpu_histograms import activations
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import PreprocessingConfig
from pipeline.data.dataset import Dataset, hash_apart
from pipeline.errors import CalibrationError, CheckFailed, ModelError
from pipeline.graph.equalization import STRENGTH, chains, equalized
from pipeline.graph.io import image_input, load_model, save_model, sha256_model, staged

log = logging.getLogger(__name__)

# Of a channel's absolute values on an image, those above its range: one bright pixel says little of it.
OUTLIERS = 0.0005
# Share of labels that may be others, where the graph decides: ties fall either way.
OTHER_LABELS = 1e-4


@dataclass(frozen=True)
class Spread:
    """How far the ranges of a tensor's channels lie apart: the median one over the largest, at most 1."""

    tensor: str
    channels: int
    before: float
    after: float


@dataclass(frozen=True)
class EqualizationReport:
    """What was done, and how far the outputs moved.

    Attributes:
        images: that showed the ranges.
        strength: see ``pipeline.graph.equalization.STRENGTH``.
        max_relative_error: of any output on any of the images, relative to its largest value there; of labels, the
            share that is another.
    """

    clean_sha256: str
    equalized_sha256: str
    images: tuple[str, ...]
    strength: float
    tensors: tuple[Spread, ...]
    max_relative_error: float
    tolerance: float
    seconds: float


def equalize(
    clean: Path,
    samples: Dataset,
    preprocessing: PreprocessingConfig,
    target: Path,
    report: Path,
    tolerance: float,
    validation: Mapping[str, str] | None = None,
) -> EqualizationReport:
    """Bring the channels of a clean graph's tensors to like ranges, compare both graphs, write the new one.

    Args:
        clean: float32 graph of one image input.
        samples: images that show what channels hold; all are used.
        target, report: written last, each whole or not at all.
        tolerance: largest accepted change of any output, relative to its largest value on an image.
        validation: names of the validation images by content (see ``data.dataset.content_hashes``).

    Raises:
        CalibrationError: no image, or one that is a validation image too.
        ModelError: no convolution whose channels can be scaled; not exactly one input; a graph that ONNX Runtime cannot
            run.
        DataError: an image that cannot be decoded, or does not fit.
        CheckFailed: the new graph computes something else.
    """
    started = time.perf_counter()
    model = load_model(clean)
    source = image_input(model, clean)
    found = chains(model)
    if not found:
        raise ModelError(
            f"no convolution of {clean} has channels that can be scaled",
            expected="convolutions with ReLU, pooling, resizing or concatenation between them",
            fix="leave clean.equalize out",
        )
    if len(samples) == 0:
        raise CalibrationError("no image shows what channels hold", fix="name calibration images")

    def feeds(others: Mapping[str, str]) -> Iterator[tuple[str, NDArray[Any]]]:
        for sample in samples:
            if others:
                hash_apart(sample, others)
            yield sample.name, feed_image(source, sample.image, preprocessing, sample.name)[source.name]

    ranges: dict[str, NDArray[np.float32]] = {}
    for _, tensor, values in activations(model, [chain.tensor for chain in found], feeds(validation or {})):
        one = channel_ranges(values)
        ranges[tensor] = np.maximum(ranges.get(tensor, one), one)
    result, factors = equalized(model, ranges)
    with staged(target) as file:
        save_model(result, file)
        error = _difference(clean, file, feeds({}))
        if error > tolerance:
            raise CheckFailed(
                f"the equalized graph of {clean} computes something else; {target} was not written",
                expected=f"a change of at most {tolerance:g} of each output's largest value",
                got=f"{error:.3g}",
                fix="report the model; a larger clean.tolerance lets it pass",
            )
        outcome = EqualizationReport(
            clean_sha256=sha256_model(clean),
            equalized_sha256=sha256_model(file),
            images=tuple(samples.names),
            strength=STRENGTH,
            tensors=tuple(_spread(name, ranges[name], factor) for name, factor in factors.items()),
            max_relative_error=error,
            tolerance=tolerance,
            seconds=round(time.perf_counter() - started, 3),
        )
        write_atomically(report, to_json(outcome))
    log.info("channels of %d tensors equalized by %d images", len(factors), len(samples))
    return outcome


def channel_ranges(values: NDArray[Any]) -> NDArray[np.float32]:
    """Of the channels of one image's activation, float (N, C, …): the largest absolute values but for ``OUTLIERS``."""
    flat = np.abs(np.moveaxis(values, 1, 0)).reshape(values.shape[1], -1)
    place = flat.shape[1] - 1 - int(OUTLIERS * flat.shape[1])
    largest: NDArray[np.float32] = np.partition(flat, place, axis=1)[:, place].astype(np.float32)
    return largest


def _spread(tensor: str, ranges: NDArray[np.float32], factor: NDArray[np.float32]) -> Spread:
    before, after = (float(np.median(found) / max(found.max(), 1e-30)) for found in (ranges, ranges / factor))
    return Spread(tensor, len(ranges), round(before, 4), round(after, 4))


def _difference(clean: Path, other: Path, feeds: Iterator[tuple[str, NDArray[Any]]]) -> float:
    """See ``EqualizationReport.max_relative_error``."""
    largest = 0.0
    with OnnxRuntimeRunner(clean) as one, OnnxRuntimeRunner(other) as two:
        (source,) = (spec.name for spec in one.inputs)
        for _, array in feeds:
            largest = max(largest, *_errors(one({source: array}), two({source: array})))
    return largest


def _errors(wanted: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> Iterator[float]:
    for name, values in wanted.items():
        if values.dtype.kind in "iu":
            share = float((values != found[name]).mean())
            yield share if share > OTHER_LABELS else 0.0
        else:
            yield float(np.abs(values - found[name]).max() / max(np.abs(values).max(), 1e-30))
