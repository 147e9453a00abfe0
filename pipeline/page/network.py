"""The network's blocks with what each precision makes of them, and their places in a picture of the U."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Precision
from pipeline.graph.levels import Block
from pipeline.reports import EngineAccount

if TYPE_CHECKING:
    from pipeline.drift import DriftReport

BOX_WIDTH, HEAD, ROW, GAP_X, GAP_Y, MARGIN, ARROW = 226, 40, 20, 66, 34, 6, 3


@dataclass(frozen=True)
class BlockFigures:
    """One block in one precision.

    Attributes:
        arithmetic: convolutions by what they compute in; empty where nobody said.
        runs: whether an engine's inspector said so; otherwise it is what the typed graph asks for.
        sqnr_db: of the tensor with the least; None where nothing was compared, or nothing differs (``exact``).
        tensor: which one that is.
        ms: of the engine's layers that compute its nodes, timed one by one; None where none is known.
        share: of the engine's profiled time.
    """

    arithmetic: dict[str, int]
    runs: bool
    sqnr_db: float | None = None
    exact: bool = False
    tensor: str | None = None
    ms: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class BlockAccount:
    """A block and its figures by precision."""

    block: Block
    precisions: dict[Precision, BlockFigures]


@dataclass(frozen=True)
class Network:
    """All blocks; ``outside_ms``: of layers that name no node of the graph, by precision (copies, mostly)."""

    blocks: tuple[BlockAccount, ...]
    outside_ms: dict[Precision, float]


@dataclass(frozen=True)
class Box:
    """A block's upper left corner in the picture, and itself."""

    x: float
    y: float
    account: BlockAccount


@dataclass(frozen=True)
class Drawing:
    """Boxes, and the SVG paths of what leads from one to another; ``skips`` stay at their resolution."""

    width: float
    height: float
    box_height: float
    boxes: tuple[Box, ...]
    ways: tuple[str, ...]
    skips: tuple[str, ...]


def account_for_blocks(
    blocks: Sequence[Block],
    precisions: Sequence[Precision],
    planned: Mapping[Precision, Mapping[str, str]],
    layers: Mapping[Precision, DriftReport],
    engines: Mapping[Precision, EngineAccount],
) -> Network:
    """Add up, block by block, what the reports say of its nodes.

    Args:
        planned: what the typed graph's convolutions compute in, by node name; for precisions that were not profiled.
        layers: tensor by tensor against FP32.
        engines: layer by layer on the GPU.
    """
    owner = {node: place for place, block in enumerate(blocks) for node in block.nodes}
    columns: dict[Precision, list[BlockFigures]] = {}
    outside: dict[Precision, float] = {}
    for precision in precisions:
        engine, drift = engines.get(precision), layers.get(precision)
        words = _engine_words(engine) if engine else planned.get(precision, {})
        times, outside_ms = _times(engine, owner) if engine else ({}, 0.0)
        if engine:
            outside[precision] = outside_ms
        errors = _errors(drift, owner) if drift else {}
        columns[precision] = [
            BlockFigures(
                arithmetic=dict(Counter(words[node] for node in block.convolutions if node in words)),
                runs=engine is not None,
                sqnr_db=errors.get(place, (None, None))[0],
                exact=place in errors and errors[place][0] is None,
                tensor=errors.get(place, (None, None))[1],
                ms=times.get(place),
                share=times[place] / engine.profiled_ms if engine and times.get(place) else None,
            )
            for place, block in enumerate(blocks)
        ]
    accounts = (
        BlockAccount(block, {precision: column[place] for precision, column in columns.items()})
        for place, block in enumerate(blocks)
    )
    return Network(tuple(accounts), outside)


def draw_network(network: Network) -> Drawing:
    """Place the blocks: a row for each resolution, the way down on the left, what comes up again to the right of it.

    The lowest block of a plain U lies between both sides.
    """
    blocks = [account.block for account in network.blocks]
    box_height = HEAD + ROW * max((len(account.precisions) for account in network.blocks), default=0)
    columns = _columns(blocks)
    last = max(columns, default=0)
    deepest = max((block.level for block in blocks), default=0)
    alone = Counter(block.level for block in blocks)[deepest] == 1
    pitch_x, pitch_y = BOX_WIDTH + GAP_X, box_height + GAP_Y
    if last == 1:
        pitch_x += GAP_X  # room for the lowest block between the sides
    xs = [
        MARGIN + pitch_x * (last / 2 if block.level == deepest and alone and last == 1 else column)
        for block, column in zip(blocks, columns, strict=True)
    ]
    ys = [MARGIN + pitch_y * block.level for block in blocks]
    ways: list[str] = []
    skips: list[str] = []
    for target, block in enumerate(blocks):
        for source in block.sources:
            start, end = (xs[source], ys[source]), (xs[target], ys[target])
            (skips if start[1] == end[1] else ways).append(_way(start, end, box_height))
    return Drawing(
        width=2 * MARGIN + pitch_x * last + BOX_WIDTH,
        height=2 * MARGIN + pitch_y * deepest + box_height,
        box_height=box_height,
        boxes=tuple(Box(x, y, account) for x, y, account in zip(xs, ys, network.blocks, strict=True)),
        ways=tuple(ways),
        skips=tuple(skips),
    )


def _engine_words(engine: EngineAccount) -> dict[str, str]:
    """What an engine's layers with convolutions compute in, by the names of all nodes that they hold."""
    return {
        node: layer.precision or "unknown" for layer in engine.layers if layer.group == "conv" for node in layer.nodes
    }


def _times(engine: EngineAccount, owner: Mapping[str, int]) -> tuple[dict[int, float], float]:
    """Milliseconds by block's place, and those of layers that belong to none."""
    times: dict[int, float] = defaultdict(float)
    outside = 0.0
    for layer in engine.layers:
        place = next((owner[node] for node in layer.nodes if node in owner), None)
        if place is None:
            outside += layer.ms or 0.0
        else:
            times[place] += layer.ms or 0.0
    return dict(times), outside


def _errors(drift: DriftReport, owner: Mapping[str, int]) -> dict[int, tuple[float | None, str]]:
    """The least SQNR of each block with its tensor; None where all its tensors are exact."""
    found: dict[int, tuple[float | None, str]] = {}
    for entry in drift.tensors:
        place = owner.get(entry.node)
        if place is None:
            continue
        least = found.get(place, (None, entry.tensor))[0]
        if place not in found or (entry.sqnr_db is not None and (least is None or entry.sqnr_db < least)):
            found[place] = (entry.sqnr_db, entry.tensor)
    return found


def _columns(blocks: Sequence[Block]) -> list[int]:
    """0 for the first block of a resolution on the way down; the next free column, from 1, for one that came up."""
    taken: dict[int, int] = {}
    columns = []
    for block in blocks:
        came_up = bool(block.sources) and blocks[block.sources[0]].level > block.level
        column = max(taken.get(block.level, 0), int(came_up))
        taken[block.level] = column + 1
        columns.append(column)
    return columns


def _way(start: tuple[float, float], end: tuple[float, float], height: float) -> str:
    """From a box to another: along the row, above what lies between, or a curve from one row to another."""
    (x, y), (to_x, to_y) = start, end
    if y == to_y:
        middle = y + HEAD / 2
        over = f"Q{(x + to_x + BOX_WIDTH) / 2:g} {y - GAP_Y + ARROW:g}" if to_x - x > 2 * BOX_WIDTH + GAP_X else "L"
        return f"M{x + BOX_WIDTH:g} {middle:g}{over} {to_x - ARROW:g} {middle:g}"
    down = to_y > y
    # What goes down to the lowest block, or up from it, leaves room for the other on the same side of the box.
    aside = 0.0 if x == to_x else 0.2 if x < to_x else -0.2
    leave = x + BOX_WIDTH * (0.5 if down else 0.5 + aside)
    arrive = to_x + BOX_WIDTH * (0.5 - aside if down else 0.5)
    from_y, until_y = (y + height, to_y - ARROW) if down else (y, to_y + height + ARROW)
    half = (from_y + until_y) / 2
    return f"M{leave:g} {from_y:g}C{leave:g} {half:g} {arrive:g} {half:g} {arrive:g} {until_y:g}"
