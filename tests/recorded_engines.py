"""What was measured of two UNets on an H200 (tests/data/mixed): the graph, both engines, mixtures."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto

from pipeline.backends.layers import EngineLayer, LayerTensor
from pipeline.mixed.measured import Stored
from pipeline.reports import EngineAccount
from tests.onnx_unet import clean_unet, drawn_unet

DATA = Path(__file__).parent / "data" / "mixed"
NETWORKS: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "isbi": ({"in_channels": 1, "classes": 2, "base_channels": 16}, (1, 1, 512, 512)),
    "camvid": ({"in_channels": 3, "classes": 11, "base_channels": 32}, (1, 3, 360, 480)),
}


@dataclass(frozen=True)
class Recorded:
    """One network; ``mixtures`` are milliseconds by the convolutions that stay FP16."""

    model: ModelProto
    shapes: dict[str, tuple[int, ...]]
    names: frozenset[str]
    engines: dict[Stored, EngineAccount]
    mixtures: dict[frozenset[str], float]


@functools.cache
def recorded(name: str) -> Recorded:
    options, shape = NETWORKS[name]
    model = clean_unet(drawn_unet(**options), shape)
    for node in model.graph.node:
        node.name = _exported(node)
    held = json.loads((DATA / f"{name}.json").read_text())
    engines = {each: engine(map(layer, one["layers"]), one["whole_ms"]) for each, one in held["engines"].items()}
    mixtures = {frozenset(one["half"]): one["ms"] for one in held["mixtures"]}
    names = frozenset(node.name for node in model.graph.node if node.op_type == "Conv")
    return Recorded(model, {"image": shape}, names, engines, mixtures)


def engine(layers: Any, whole_ms: float) -> EngineAccount:
    held = tuple(layers)
    return EngineAccount("", held, (), sum(each.ms or 0 for each in held), whole_ms, {}, None, None)


def layer(row: dict[str, Any]) -> EngineLayer:
    """``nodes``, ``ms``, and what else is not that of a convolution without tensors."""
    reads, writes = (tuple(LayerTensor(n, (), "", "") for n in row.get(key, ())) for key in ("reads", "writes"))
    nodes, size, ms = tuple(row["nodes"]), row.get("bytes"), row["ms"]
    name, group = " + ".join(nodes), row.get("group", "conv")
    return EngineLayer(name, "", group, "", reads, writes, "", nodes, False, size, None, ms)


def _exported(node: NodeProto) -> str:
    """What export and cleaning name it."""
    if node.op_type == "Concat":
        return node.input[0].replace(".relu", ".concat")
    name = node.name.replace(".relu.", ".").replace(".resize.pad", ".pad")
    return "outc.conv" if name == "logits" else name
