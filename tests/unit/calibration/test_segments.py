"""A graph cut into segments computes what the whole graph computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.segments import Segment, split

# A skip connection over all of it, a shape computation, a subgraph that captures c, two outputs of one node.
GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
agraph (float[N, 4, 6] x) => (float[N, M, 6] y)
<float[1] one = {1.0}, int64[1] axis = {1}, bool yes = {1}>
{
    a = Add(x, one)
    b = Relu(a)
    shape = Shape(b)
    p, q = Split<axis = 1, num_outputs = 2>(b)
    c = Concat<axis = 1>(q, p)
    d = If(yes) <
        then_branch = g1 () => (float[N, 4, 6] then_out) { then_out = Mul(c, a) },
        else_branch = g2 () => (float[N, 4, 6] else_out) { else_out = Identity(c) }
    >
    e = Reshape(d, shape)
    y = Concat<axis = 1>(e, b)
}
"""
FLOATS = ["a", "b", "p", "q", "c", "d", "e", "y"]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    model = parser.parse_model(GRAPH)
    onnx.checker.check_model(model)
    return model


def run(segments: list[Segment], x: np.ndarray) -> dict[str, np.ndarray]:
    alive, seen = {"x": x}, {}
    for segment in segments:
        with OnnxRuntimeRunner(segment.model.SerializeToString(), optimize=False) as runner:
            alive |= runner({spec.name: alive[spec.name] for spec in runner.inputs})
        seen |= {name: alive[name] for name in segment.observed}
        alive = {name: values for name, values in alive.items() if name in segment.carried}
    assert not alive
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [1, 200, 300, 500, 1 << 30])
def test_values_are_those_of_the_whole_graph(model: onnx.ModelProto, limit: int, batch: int) -> None:
    x = np.random.default_rng(0).normal(size=(batch, 4, 6)).astype(np.float32)
    segments = split(model, FLOATS, {"x": x.shape}, limit)
    seen = run(segments, x)
    whole = split(model, FLOATS, {"x": x.shape}, 1 << 30)
    assert len(whole) == 1
    assert list(seen) == FLOATS
    expected = run(whole, x)
    for name in FLOATS:
        np.testing.assert_array_equal(seen[name], expected[name])
    np.testing.assert_allclose(expected["a"], x + 1)
    np.testing.assert_allclose(expected["y"][:, 4:], np.maximum(x + 1, 0))


def test_each_node_is_in_one_segment(model: onnx.ModelProto) -> None:
    segments = split(model, FLOATS, {"x": (1, 4, 6)}, 1)
    outputs = [name for segment in segments for node in segment.model.graph.node for name in node.output]
    assert outputs == [name for node in model.graph.node for name in node.output]
    assert len(segments) > 4


def test_limit(model: onnx.ModelProto) -> None:
    """Tensors of 96 bytes, the last of 192: with 200, two of them at most stand together."""
    segments = split(model, FLOATS, {"x": (1, 4, 6)}, 200)
    sizes = {"p": 48, "q": 48, "y": 192, "shape": 12}
    for segment in segments:
        names = [name for node in segment.model.graph.node for name in node.output]
        assert sum(sizes.get(name, 96) for name in names) <= 212
    assert len(segments) < len(model.graph.node)


def test_unobserved_branches_are_left_out(model: onnx.ModelProto) -> None:
    seen = run(split(model, ["a"], {"x": (1, 4, 6)}, 1 << 30), np.zeros((1, 4, 6), np.float32))
    assert set(seen) == {"a"}


def test_weights_go_where_they_are_read(model: onnx.ModelProto) -> None:
    segments = split(model, FLOATS, {"x": (1, 4, 6)}, 1)
    holding = [[t.name for t in segment.model.graph.initializer] for segment in segments]
    assert holding[0] == ["one"]
    assert sum(names.count("yes") for names in holding) == 1


def test_a_tensor_of_unknown_rank_keeps_the_graph_whole() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18, "custom" : 1]>
        agraph (float[1, 4] x) => (float[1, 4] y)
        { a = custom.Unknown(x) b = Relu(a) y = Relu(b) }
    """)
    assert len(split(model, ["b", "y"], {"x": (1, 4)}, 1)) == 1
