"""Images that teach or choose, and those that judge what came of it: which, in which order, in which batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

# Every fourth image judges what the others chose, and no more than these: each costs inferences.
HELD_OUT_STEP, MOST_HELD_OUT = 4, 16

Array = NDArray[Any]


def split_places(count: int) -> tuple[list[int], list[int]]:
    """Places of the images that choose or teach, and of those that judge, spread over all; none judges below four."""
    places = list(range(HELD_OUT_STEP - 1, count, HELD_OUT_STEP))
    spread = np.linspace(0, len(places) - 1, min(len(places), MOST_HELD_OUT)).round().astype(int)
    held_out = [places[i] for i in dict.fromkeys(spread.tolist())]
    return [place for place in range(count) if place not in held_out], held_out


def teaching_order(places: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    """As many places as asked for, each once before any comes again."""
    order: list[int] = []
    while len(order) < count:
        order += generator.permutation(places).tolist()
    return order[:count]


def in_batches(arrays: Iterator[Array], size: int, fix: str) -> Iterator[Array]:
    """Arrays (N, …) joined along the first axis, ``size`` at a time.

    Raises:
        DataError: some of a batch differ in another axis.
    """
    while group := list(itertools.islice(arrays, size)):
        shapes = {array.shape[1:] for array in group}
        if len(shapes) > 1:
            raise DataError(
                "the images of a step have different sizes",
                expected="one size",
                got=", ".join(map(str, sorted(shapes))),
                fix=f"{fix}, or export with preprocessing.resize: stretch or letterbox",
            )
        yield np.concatenate(group)
