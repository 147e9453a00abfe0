"""Times of nodes and copies from engines: real ones (tests/data/mixed) and made-up layers."""

from __future__ import annotations

import pytest

from pipeline.errors import EngineError
from pipeline.graph.cost import convolution_macs
from pipeline.mixed.measured import Measured, measure
from tests.recorded_engines import NETWORKS, engine, layer, recorded


def measured(rows, macs=None, others=("pool",), whole_ms=None) -> Measured:
    layers = [layer(row) for row in rows]
    both = engine(layers, sum(each.ms for each in layers) if whole_ms is None else whole_ms)
    return measure({"fp16": both, "int8": both}, macs or {"a": 1, "b": 3}, others)


A, B = {"nodes": ["a"], "writes": ["t"], "ms": 2.0}, {"nodes": ["b"], "reads": ["u"], "ms": 3.0}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_nodes_of_real_engines_take_what_the_engine_takes(name):
    one = recorded(name)
    found = measure(one.engines, convolution_macs(one.model, one.shapes), {node.name for node in one.model.graph.node})
    for precision, nodes in found.nodes.items():
        assert sum(nodes.values()) == pytest.approx(one.engines[precision].whole_ms)
        assert one.names <= nodes.keys() <= {node.name for node in one.model.graph.node}
    assert found.nodes["int8"]["down4.maxpool_conv.1.double_conv.0"] < found.nodes["fp16"]["up4.conv.double_conv.0"]
    assert found.kernel_ms == pytest.approx(0.0019, abs=0.0001)
    assert found.bandwidth is not None
    assert 1e12 < found.bandwidth < 4.8e12


def test_the_inputs_reformat_belongs_to_the_first_convolution():
    one = recorded("isbi")
    found = measure(one.engines, convolution_macs(one.model, one.shapes), {node.name for node in one.model.graph.node})
    added = (one.engines["fp16"].profiled_ms - one.engines["fp16"].whole_ms) / 33  # kernels; a NoOp takes no time
    assert found.nodes["fp16"]["inc.double_conv.0"] == pytest.approx(0.01052 + 0.01223 - 2 * added)


def test_a_fused_layer_is_shared_by_multiply_accumulates():
    found = measured([{"nodes": ["a", "relu", "b", "pool"], "ms": 4.0}])
    assert found.nodes["int8"] == {"a": 1.0, "b": 3.0}


def test_what_has_no_node_serves_its_reader_else_its_maker_else_all():
    cast = {"nodes": ["other"], "group": "reformat", "ms": 1.0}
    assert measured([A, {**cast, "reads": ["t"], "writes": ["u"]}, B]).nodes["fp16"] == {"a": 2.0, "b": 4.0}
    assert measured([A, {**cast, "reads": ["t"]}, B]).nodes["fp16"] == {"a": 3.0, "b": 3.0}
    assert measured([A, cast, B]).nodes["fp16"] == pytest.approx({"a": 2.4, "b": 3.6})


def test_what_profiling_adds_is_taken_off_every_kernel():
    rows = [A, B, {"nodes": ["pool"], "ms": 1.0}, {"nodes": ["pool"], "ms": 0.0}]
    assert measured(rows, whole_ms=4.5).nodes["fp16"] == {"a": 1.5, "b": 2.5, "pool": 0.5}
    none_below_zero = measured(rows, whole_ms=1.0).nodes["fp16"]
    assert none_below_zero == pytest.approx({"a": 0.2, "b": 0.8, "pool": 0})


def test_the_bandwidth_of_copies():
    copies = [{"nodes": ["pool"], "group": "concat", "bytes": size, "ms": ms} for size, ms in ((10**6, 3), (10**7, 9))]
    found = measured([A, B, *copies])
    assert (found.kernel_ms, found.bandwidth) == (2.0, pytest.approx(2 * 11e9 / (2 * (1 + 7))))
    assert measured([A, B]).bandwidth is None


def test_a_convolution_without_a_layer():
    with pytest.raises(EngineError, match=r"1 convolution\(s\) have no layer in the engine that is all FP16"):
        measured([A])
