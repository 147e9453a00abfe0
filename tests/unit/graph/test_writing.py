"""Relus between Resize and Concat, which change no value."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper

from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, load_config
from pipeline.errors import ConfigError
from pipeline.graph.io import load_model
from pipeline.graph.placement import activation_tensors
from pipeline.graph.writing import with_relus
from pipeline.stages.engine import build_engine
from tests.conftest import REPOSITORY
from tests.tiny_unet import SIZE, save, tiny_unet
from tests.unit.graph.builders import run

FEED = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)


def resize(model: ModelProto) -> int:
    """Place of its Resize."""
    return next(place for place, node in enumerate(model.graph.node) if node.op_type == "Resize")


def test_values_stay_and_names_too() -> None:
    before = tiny_unet()
    after, renamed = with_relus(before)
    assert renamed == {"resized.resized": "resized"}
    place = resize(after)
    first, second = after.graph.node[place : place + 2]
    assert (list(first.output), second.op_type, list(second.output)) == (["resized.resized"], "Relu", ["resized"])
    assert set(activation_tensors(after)) == {*activation_tensors(before), "resized.resized"}
    np.testing.assert_array_equal(run(after, image=FEED)[0], run(before, image=FEED)[0])
    assert with_relus(after) == (after, {})


def test_what_may_be_below_zero_stays_as_it_is() -> None:
    leaky, cubic, apart = tiny_unet(), tiny_unet(), tiny_unet()
    source = leaky.graph.node[resize(leaky)].input[0]
    relu = next(node for node in leaky.graph.node if source in node.output)
    relu.op_type = "LeakyRelu"
    next(a for a in cubic.graph.node[resize(cubic)].attribute if a.name == "mode").s = b"cubic"
    place = resize(apart)
    apart.graph.node[place].output[0] = "elsewhere"
    apart.graph.node.insert(place + 1, helper.make_node("Identity", ["elsewhere"], ["resized"]))
    for model in (leaky, cubic, apart):
        assert with_relus(model) == (model, {})


def test_through_pools_and_concatenations() -> None:
    """A Resize of what a MaxPool and a Concat of activations hand on."""
    model = tiny_unet()
    place = resize(model)
    (bottom, *rest), nodes = model.graph.node[place].input, model.graph.node
    nodes.insert(place, helper.make_node("MaxPool", [bottom], ["pooled"], kernel_shape=[1, 1]))
    nodes.insert(place + 1, helper.make_node("Concat", ["pooled"], ["one"], axis=1))
    nodes[place + 2].input[0] = "one"
    assert rest
    assert list(with_relus(model)[1].values()) == ["resized"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_typed_graphs(tmp_path, precision) -> None:
    model = tiny_unet()
    clean = save(model, tmp_path / "clean.onnx")
    table = CalibrationTable(None, dict.fromkeys(activation_tensors(model), 4.0))
    graphs = []
    for fused in (False, True):
        config = EngineConfig(backend="onnxruntime", fuse_resize=fused)
        folder = tmp_path / f"{precision}-{fused}"
        assert build_engine(clean, precision, config, table, None, None, folder, None) is None
        graphs.append(load_model(folder / "model.onnx"))
    before, after = ([node.op_type for node in graph.graph.node].count("Relu") for graph in graphs)
    assert after - before == (precision != "fp32")
    feed = FEED if precision != "int8" else FEED.clip(-4, 4)
    one, two = (run(graph, image=feed)[0] for graph in graphs)
    if precision == "int8":  # the Resize leaves INT8, whose rounding goes with it
        assert np.abs(one - two).mean() < 0.02 * np.abs(one).max()
    else:
        np.testing.assert_array_equal(one, two)


def test_the_network_api_has_none() -> None:
    with pytest.raises(ConfigError, match=r"no engine\.fuse_resize"):
        load_config(REPOSITORY / "configs" / "wts.yaml", ["engine.fuse_resize=true"])
