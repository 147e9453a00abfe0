"""A clean graph with two of every four weights zero, taught by the whole one on images without labels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import TensorSpec, to_json, write_atomically
from pipeline.backends.base import feed_image
from pipeline.config import PreprocessingConfig
from pipeline.data.dataset import Dataset
from pipeline.data.inputs import THREADS, on_threads
from pipeline.data.teaching import HELD_OUT_STEP, in_batches, split_places, teaching_order
from pipeline.errors import ConfigError, DataError
from pipeline.graph.io import image_input, load_model, save_model, sha256_model, staged
from pipeline.progress import track
from pipeline.pruning import Pruning
from pipeline.pruning import prune as pruned

log = logging.getLogger(__name__)

# Images prepared before their step.
AHEAD = 2 * THREADS
MIRRORED = 1 / 2

Array = NDArray[Any]


@dataclass(frozen=True)
class PruningReport:
    """Where a pruned graph comes from.

    Attributes:
        images: that it learned from, and was judged on.
        batch: images of a step.
        seed: of their order, and of which are mirrored.
    """

    clean_sha256: str
    pruned_sha256: str
    images: tuple[str, ...]
    batch: int
    seed: int
    result: Pruning


def prune(
    clean: Path,
    samples: Dataset,
    preprocessing: PreprocessingConfig,
    target: Path,
    report: Path,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
) -> PruningReport:
    """Prune the weights of a clean graph two in four, let the others learn, write the new graph and its report.

    Every fourth image, at most 16, judges; these also say how large channels are, and teach nothing. Half of the rest,
    chosen anew in every step, are mirrored: no label has to follow.

    Args:
        clean: float32 graph of one image input; its card goes into the new one.
        target, report: written last, the graph first, each whole or not at all.
        steps: of gradient descent.
        batch: images of a step, at the network's size.

    Raises:
        ConfigError: no step, no image in one, or a negative seed.
        ModelError: no convolution can be pruned, weights are not float32, or not exactly one input.
        DataError: fewer than four images, or one that cannot be decoded, or does not fit, or not beside the others of a
            step.
        UnsupportedError: torch is not installed, a node has no gradients here, or out of GPU memory.
        CheckFailed: the loss is no number.
        BuildFolderError: the target cannot be written; known before the work.
    """
    for name, value, least in (("steps", steps, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"pruning takes no such {name}", expected=f"{least} or more", got=str(value))
    learning, judging = split_places(len(samples))
    if not judging:
        raise DataError(
            f"{len(samples)} images are too few for pruning",
            expected=f"at least {HELD_OUT_STEP}, of which every fourth judges what the others taught",
            fix="give --images a folder of more",
        )
    model = load_model(clean)
    source = image_input(model, clean)
    with staged(target) as file:  # from the start: a target that cannot be written is told before the work
        judges = (_prepared(samples, place, source, preprocessing) for place in judging)
        batches = _batches(samples, learning, source, preprocessing, steps, batch, seed)
        result, outcome = pruned(model, track(batches, "pruning", steps), judges, steps)
        save_model(result, file)
        made = sha256_model(file)
    written = PruningReport(sha256_model(clean), made, tuple(samples.names), batch, seed, outcome)
    write_atomically(report, to_json(written))
    log.info("%d convolutions pruned, %d steps in %.0f s", len(outcome.convolutions), steps, outcome.seconds)
    return written


def _prepared(
    samples: Dataset, place: int, source: TensorSpec, preprocessing: PreprocessingConfig, mirrored: bool = False
) -> Array:
    """One image as the graph takes it, once whatever its batch."""
    sample = samples[place]
    image = np.ascontiguousarray(sample.image[:, ::-1]) if mirrored else sample.image
    return feed_image(source, image, preprocessing, f"the image {sample.name}")[source.name][:1]


def _batches(
    samples: Dataset,
    places: Sequence[int],
    source: TensorSpec,
    preprocessing: PreprocessingConfig,
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[Array]:
    """Each step's images, in a seeded order, prepared on threads ahead of their use."""
    count, generator = steps * batch, np.random.default_rng(seed)
    order = teaching_order(places, count, generator)
    mirrored = (generator.random(count) < MIRRORED).tolist()
    calls = (
        (1, functools.partial(_prepared, samples, place, source, preprocessing, turned))
        for place, turned in zip(order, mirrored, strict=True)
    )
    return in_batches(on_threads(calls, THREADS, AHEAD, AHEAD), batch, "use --batch 1")
