"""Every way a UNet's upsampling reaches ONNX: it exports, cleans to its minimum, computes the same, and builds.

``make test`` runs the cells in FAST, ``make test-matrix`` all of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from pipeline.backends.base import BuildRequest
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.tensorrt_rtx import RtxBuilder
from pipeline.config import EngineConfig, ProfileRange
from pipeline.graph.cleaning import clean_model
from pipeline.graph.io import model_inputs, opset, save_model
from pipeline.stages.engine import make_profiles

torch = pytest.importorskip("torch")

from tests.matrix.networks import AXES, CHANNELS, HEIGHT, UPSAMPLINGS, WIDTH, Cell, export  # noqa: E402
from tests.unit.graph.builders import image  # noqa: E402

TOLERANCE = 1e-5
KNOWN = RtxBuilder().capabilities()
OPSETS = {"torchscript": (11, 13, 16, 17, 18, 20, 23), "dynamo": (18, 19, 20, 21, 22, 23)}
PADDINGS = {upsampling: (False,) if upsampling == "size" else (True, False) for upsampling in UPSAMPLINGS}
CELLS = [
    Cell(exporter, number, dynamic, upsampling, padded)
    for exporter, numbers in OPSETS.items()
    for dynamic, upsampling in itertools.product(AXES, UPSAMPLINGS)
    for padded in PADDINGS[upsampling]
    for number in numbers
]
# One of each kind of difficulty, both exporters and old and new opsets in turn.
FAST = {
    "torchscript11-static-bilinear-ac-pad",
    "torchscript11-batch-size",
    "torchscript13-batch-pixel-shuffle-pad",
    "torchscript16-batch-bicubic-pad",
    "torchscript17-all-bilinear-pad",
    "torchscript17-all-size",
    "torchscript18-static-nearest-exact",
    "torchscript20-all-transposed-pad",
    "torchscript23-batch-nearest-pad",
    "dynamo18-static-transposed-pad",
    "dynamo18-all-nearest",
    "dynamo19-batch-nearest-exact-pad",
    "dynamo21-all-bilinear-ac-pad",
    "dynamo22-static-pixel-shuffle",
    "dynamo23-all-size",
}

# What the network itself is made of: 49 nodes, or 53 where a level comes up by two of them.
BODY = Counter(Conv=19, Relu=18, MaxPool=4, Concat=4)
UP = {
    **{upsampling: Counter(Resize=4) for upsampling in UPSAMPLINGS},
    "transposed": Counter(ConvTranspose=4),
    "pixel-shuffle": Counter(Conv=4, DepthToSpace=4),
}
# Nodes a level may add where height and width are free, because its sizes are not known before it runs:
# aligned: what is missing is the skip's size less the own one: Shape, Shape, Sub, Concat, Pad;
# sized: the output has the skip's size, channels and batch: Shape;
# otherwise the scale is 2 whatever the size.
ALIGNED, SIZED = 5, 1
LEVELS = 4


def parameters() -> list[object]:
    return [pytest.param(c, id=str(c), marks=() if str(c) in FAST else pytest.mark.matrix) for c in CELLS]


def test_the_fast_cells_exist() -> None:
    assert {str(cell) for cell in CELLS} >= FAST


@pytest.mark.parametrize("cell", parameters())
def test_cell(cell: Cell, tmp_path: Path) -> None:
    if cell.exporter == "torchscript" and cell.upsampling == "nearest-exact":
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="upsample_nearest_exact2d"):
            export(cell)
        return
    raw = export(cell)
    cleaned, _ = clean_model(raw)
    check_equality(cell, raw, cleaned)
    assert clean_model(cleaned)[0].SerializeToString(deterministic=True) == cleaned.SerializeToString(
        deterministic=True
    )
    assert opset(cleaned) == opset(raw) == cell.opset
    assert list(cleaned.graph.input) == list(raw.graph.input)
    assert list(cleaned.graph.output) == list(raw.graph.output)
    check_builds(cell, cleaned, tmp_path)
    check_minimum(cell, cleaned)


def check_minimum(cell: Cell, cleaned: ModelProto) -> None:
    counts = Counter(node.op_type for node in cleaned.graph.node)
    network = BODY + UP[cell.upsampling]
    if cell.dynamic != "all" or not (cell.padded or cell.upsampling == "size"):
        assert counts == network
        return
    arithmetic = ALIGNED if cell.padded else SIZED
    assert {op: counts[op] for op in network if op != "Concat"} == {op: network[op] for op in network if op != "Concat"}
    assert counts["Pad"] == (LEVELS if cell.padded else 0)
    assert counts.total() <= network.total() + LEVELS * arithmetic, counts


def check_equality(cell: Cell, raw: ModelProto, cleaned: ModelProto) -> None:
    """At the smallest size, at odd ones where the network takes them, and at others, with several batches."""
    sizes = {
        "static": [(1, HEIGHT, WIDTH)],
        "batch": [(1, HEIGHT, WIDTH), (3, HEIGHT, WIDTH)],
        "all": [(1, 16, 16), (2, HEIGHT, WIDTH), (1, 80, 112)],
    }[cell.dynamic]
    if cell.dynamic == "all" and (cell.padded or cell.upsampling == "size"):
        sizes += [(1, 37, 51), (2, 31, 16), (1, 95, 33)]
    with (
        OnnxRuntimeRunner(raw.SerializeToString(), optimize=False) as before,
        OnnxRuntimeRunner(cleaned.SerializeToString(), optimize=False) as after,
    ):
        for batch, height, width in sizes:
            feeds = {"image": image(batch, CHANNELS, height, width)}
            want, have = before(feeds)["logits"], after(feeds)["logits"]
            assert have.shape == want.shape == (batch, 2, height, width)
            assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max(), feeds["image"].shape


def check_builds(cell: Cell, cleaned: ModelProto, folder: Path) -> None:
    if not KNOWN.builds:
        return
    save_model(cleaned, folder / "model.onnx")
    batch, side = ProfileRange(min=1, opt=1, max=2), ProfileRange(min=16, opt=64, max=96)
    ranges = {"static": {}, "batch": {"batch": batch}, "all": {"batch": batch, "height": side, "width": side}}
    config = EngineConfig(backend="tensorrt-rtx", profile=ranges[cell.dynamic])
    profiles = make_profiles(model_inputs(cleaned), config.profile)
    request = BuildRequest(folder / "model.onnx", "fp32", "explicit", config, profiles=profiles)
    assert RtxBuilder().build(request).plan
