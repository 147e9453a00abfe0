"""Convolutions that belong together: a module of the network, or a level of resolution."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from pipeline.graph.shapes import Dims


def blocks(outputs: Mapping[str, str], shapes: Mapping[str, Dims | None]) -> dict[str, tuple[str, ...]]:
    """Node names by block, in the graph's order.

    1. By module: the fewest leading parts of the names (between ``.`` and ``/``) that tell some of them apart, where
       that puts at least two convolutions into one block.
    2. Where names tell nothing: neighbours in the graph whose outputs have the same height and width, named after it.

    Args:
        outputs: output by node name, of the convolutions in the graph's order.
        shapes: by tensor.
    """
    parts = {name: re.split(r"[./]", name.strip("/")) for name in outputs}
    for depth in range(1, max(map(len, parts.values()), default=0)):
        groups: dict[str, list[str]] = {}
        for name, split in parts.items():
            groups.setdefault(".".join(split[:depth]), []).append(name)
        if 1 < len(groups) < len(outputs):
            return {block: tuple(names) for block, names in groups.items()}
    found: dict[str, tuple[str, ...]] = {}
    for size, names in itertools.groupby(outputs, lambda name: _size(shapes.get(outputs[name]))):
        found[_unused(size, found)] = tuple(names)
    return found


def _size(shape: Dims | None) -> str:
    return "×".join(map(str, reversed(shape[2:]))) if shape else "unknown size"


def _unused(size: str, taken: Mapping[str, Sequence[str]]) -> str:
    number = 1 + sum(name.partition(" (")[0] == size for name in taken)
    return f"{size} ({number})"
