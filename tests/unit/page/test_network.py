"""What the reports say of each block, and where it lies in the picture."""

from __future__ import annotations

import re

import pytest

from pipeline.backends.layers import EngineLayer
from pipeline.drift import DriftReport, TensorDrift
from pipeline.graph.levels import Block, blocks
from pipeline.page.network import BOX_WIDTH, Drawing, account_for_blocks, draw_network
from pipeline.speed import account
from tests.tiny_unet import tiny_unet

BLOCKS = blocks(tiny_unet(), {})


def layer(name: str, group: str, nodes: tuple[str, ...], precision: str = "int8") -> EngineLayer:
    return EngineLayer(name, "", group, precision, (), (), "", nodes, False, None)  # type: ignore[arg-type]


def drift_of(**decibels: float | None) -> DriftReport:
    tensors = tuple(TensorDrift(node, node, "Conv", value, None, 0.0, 1.0, None) for node, value in decibels.items())
    return DriftReport("a stand-in", 1, tensors, None, ())


def test_times_and_arithmetic_come_from_the_engine() -> None:
    layers = [
        layer("a", "conv", ("down0", "down0.out.Relu")),
        layer("b", "conv", ("up_conv0", "up_conv0.out.Relu"), "fp16"),
        layer("c", "conv", ("head",)),
        layer("d", "reformat", ("somewhere copy",)),
    ]
    engine = account("0", layers, {"a": 2.0, "b": 3.0, "c": 1.0, "d": 4.0}, {}, None, 9.0)
    network = account_for_blocks(BLOCKS, ["int8"], {"int8": {"down0": "fp32"}}, {}, {"int8": engine})
    first, second, *_, last = (each.precisions["int8"] for each in network.blocks)
    assert (first.arithmetic, first.ms, first.share, first.runs) == ({"int8": 1}, 2.0, 0.2, True)
    assert (last.arithmetic, last.ms) == ({"fp16": 1, "int8": 1}, 4.0)
    assert (second.arithmetic, second.ms) == ({}, None)
    assert network.outside_ms == {"int8": 4.0}


def test_without_an_engine_the_graph_says_what_it_asks_for() -> None:
    network = account_for_blocks(BLOCKS, ["fp16"], {"fp16": {"down0": "fp16"}}, {}, {})
    figures = network.blocks[0].precisions["fp16"]
    assert (figures.arithmetic, figures.runs, figures.ms, figures.sqnr_db) == ({"fp16": 1}, False, None, None)
    assert network.outside_ms == {}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"up0": 30.0, "up_conv0": 12.0, "head": 20.0}, (12.0, False, "up_conv0")),
        ({"up0": None, "head": 20.0}, (20.0, False, "head")),
        ({"up0": 20.0, "head": None}, (20.0, False, "up0")),
        ({"up0": None, "head": None}, (None, True, "up0")),
        ({"down0": 5.0, "unknown": 1.0}, (None, False, None)),
    ],
)
def test_the_least_sqnr_of_a_block(entries: dict[str, float | None], told: tuple[object, ...]) -> None:
    network = account_for_blocks(BLOCKS, ["int8"], {}, {"int8": drift_of(**entries)}, {})
    figures = network.blocks[-1].precisions["int8"]
    assert (figures.sqnr_db, figures.exact, figures.tensor) == told


def drawn(*rows: tuple[int, tuple[int, ...]]) -> Drawing:
    """Of blocks by level and sources."""
    made = [Block(f"b{i}", level, (1, 1), 1, (), (), sources) for i, (level, sources) in enumerate(rows)]
    return draw_network(account_for_blocks(made, ["fp32", "int8"], {}, {}, {}))


def test_a_u_goes_down_on_the_left_and_up_on_the_right() -> None:
    drawing = drawn((0, ()), (1, (0,)), (2, (1,)), (1, (2, 1)), (0, (3, 0)))
    left, right = drawing.boxes[0].x, drawing.boxes[4].x
    assert [box.x for box in drawing.boxes] == [left, left, (left + right) / 2, right, right]
    heights = [box.y for box in drawing.boxes]
    assert heights[0] == heights[4] < heights[1] == heights[3] < heights[2]
    assert (len(drawing.ways), len(drawing.skips)) == (4, 2)


@pytest.mark.parametrize(
    "rows",
    [
        ((0, ()), (1, (0,)), (0, (1, 0)), (2, (1,)), (1, (3, 1)), (0, (4, 2))),  # UNet++
        ((0, ()), (1, (0,)), (0, (1, 0)), (1, (2,)), (0, (3, 2))),  # two Us, one behind the other
        ((0, ()),),
        ((1, ()), (2, (0,)), (1, (1, 0)), (0, (2,))),  # the finest resolution only on the way up
    ],
)
def test_boxes_never_overlap_and_lie_inside(rows: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    drawing = drawn(*rows)
    for i, box in enumerate(drawing.boxes):
        assert 0 <= box.x <= drawing.width - BOX_WIDTH
        assert 0 <= box.y <= drawing.height - drawing.box_height
        for other in drawing.boxes[:i]:
            assert abs(box.x - other.x) >= BOX_WIDTH or abs(box.y - other.y) >= drawing.box_height
    for way in (*drawing.ways, *drawing.skips):
        numbers = [float(each) for each in re.findall(r"[\d.]+", way)]
        assert max(numbers) <= max(drawing.width, drawing.height)
