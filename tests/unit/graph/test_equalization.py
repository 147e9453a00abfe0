"""Channels of like ranges: the graph computes the same, and INT8 loses less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from pipeline.backends.cpu_histograms import activations
from pipeline.calibration.table import CalibrationTable
from pipeline.graph.equalization import FLOOR, chains, equalized
from pipeline.graph.quantize import quantize
from pipeline.stages.equalize import channel_ranges
from tests.tiny_unet import tiny_unet
from tests.unit.graph.builders import model, run, weights

Ranges = dict[str, NDArray[np.float64]]


def conv(name: str, source: str, **attributes: Any) -> Any:
    return helper.make_node("Conv", [source, f"{name}.w"], [name], name=name, pads=[1, 1, 1, 1], **attributes)


def net(*between: Any, last: str, outputs: tuple[str, ...] = ("end",), channels: int = 4) -> ModelProto:
    """A convolution ``first``, nodes, and a convolution ``end`` of what they make."""
    kernels = {"first.w": weights(4, 3, 3, 3), "end.w": weights(2, channels, 3, 3)}
    fixed = {
        "zero": np.zeros((), np.float32),
        "one": np.ones((), np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    nodes = [conv("first", "image"), *between, conv("end", last)]
    used = {name for node in nodes for name in node.input}
    constants = {name: value for name, value in {**kernels, **fixed}.items() if name in used}
    return model(nodes, {"image": (1, 3, 8, 8)}, dict.fromkeys(outputs, (1, None, None, None)), constants)


def node(kind: str, *sources: str, **attributes: Any) -> Any:
    return helper.make_node(kind, list(sources), [kind], name=f"{kind}.node", **attributes)


@pytest.mark.parametrize(
    ("between", "last"),
    [
        ([node("Relu", "first")], "Relu"),
        ([node("LeakyRelu", "first", alpha=0.1)], "LeakyRelu"),
        ([node("MaxPool", "first", kernel_shape=[2, 2])], "MaxPool"),
        ([node("AveragePool", "first", kernel_shape=[2, 2])], "AveragePool"),
        ([node("Pad", "first", "pads", "zero")], "Pad"),
        ([node("Pad", "first", "pads", mode="reflect")], "Pad"),
    ],
)
def test_what_factors_pass(between: list[Any], last: str) -> None:
    (chain,) = chains(net(*between, last=last))
    assert (chain.node, chain.readers) == ("first", (("end", 0),))


@pytest.mark.parametrize(
    ("between", "last", "outputs"),
    [
        ([node("Sigmoid", "first")], "Sigmoid", ("end",)),
        ([node("Pad", "first", "pads", "one")], "Pad", ("end",)),
        ([node("Add", "first", "one")], "Add", ("end",)),
        ([node("Relu", "first")], "Relu", ("end", "Relu")),
        ([node("Relu", "first")], "Relu", ("end", "first")),
    ],
)
def test_what_they_do_not(between: list[Any], last: str, outputs: tuple[str, ...]) -> None:
    assert chains(net(*between, last=last, outputs=outputs)) == ()


def test_readers_of_several_groups_and_shared_weights_stay() -> None:
    grouped = net(last="first", channels=2)
    grouped.graph.node[-1].attribute.append(helper.make_attribute("group", 2))
    assert chains(grouped) == ()
    shared = net(
        helper.make_node("Conv", ["first", "end.w"], ["other"], name="other"), last="first", outputs=("end", "other")
    )
    assert chains(shared) == ()


def ranges_of(proto: ModelProto, rng: np.random.Generator) -> Ranges:
    """Made-up ones, over three orders of magnitude."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    found = {}
    for chain in chains(proto):
        axis = 0 if nodes[chain.node].op_type == "Conv" else 1
        found[chain.tensor] = 10 ** rng.uniform(-2, 1, constants[nodes[chain.node].input[1]].shape[axis])
    return found


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("size", [32, "free"])
def test_the_graph_computes_the_same(strength: float, size: Any, rng: np.random.Generator) -> None:
    proto = tiny_unet("batch" if size == "free" else 1, size=size)
    ranges = ranges_of(proto, rng)
    assert len(ranges) == 6  # all but the head: through pool, Resize, Concat, to and from a ConvTranspose
    result, factors = equalized(proto, ranges, strength)
    feed = rng.standard_normal((1, 3, 32, 32)).astype(np.float32)
    (wanted,), (found,) = run(proto, image=feed), run(result, image=feed)
    assert np.abs(wanted - found).max() < 1e-5 * np.abs(wanted).max()
    for tensor, factor in factors.items():
        assert factor.max() == 1
        assert factor.min() >= FLOOR**strength - 1e-6
        np.testing.assert_allclose(
            factor, np.maximum(ranges[tensor] / ranges[tensor].max(), FLOOR) ** strength, rtol=1e-5
        )
    assert proto.SerializeToString() == tiny_unet("batch" if size == "free" else 1, size=size).SerializeToString()


def test_int8_loses_less(rng: np.random.Generator) -> None:
    """Channels that some training has left a hundred times as wide as others."""
    even = tiny_unet()
    proto, _ = equalized(even, {name: 1 / values for name, values in ranges_of(even, rng).items()}, 1.0)
    feeds = rng.standard_normal((4, 1, 3, 32, 32)).astype(np.float32)

    def error(graph: ModelProto) -> tuple[float, Ranges]:
        shown = [chain.tensor for chain in chains(graph)]
        names = [name for each in graph.graph.node if each.op_type != "Constant" for name in each.output]
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        for _, name, found in activations(graph, names, (("", feed) for feed in feeds)):
            parts[name].append(found)
        values = {name: np.concatenate(found) for name, found in parts.items()}
        amax = {
            "image": float(np.abs(feeds).max()),
            **{name: float(np.abs(found).max()) for name, found in values.items()},
        }
        typed = quantize(graph, CalibrationTable("minmax", amax), half=False, qdq="shared")
        wanted = values["logits"]
        found = np.concatenate([run(typed, image=feed)[0] for feed in feeds])
        return float(np.abs(found - wanted).mean()), {name: channel_ranges(values[name]) for name in shown}

    before, ranges = error(proto)
    after, narrower = error(equalized(proto, ranges)[0])
    for name, found in ranges.items():
        assert np.median(narrower[name]) / narrower[name].max() > np.median(found) / found.max()
    assert after < 0.75 * before


def test_a_range_leaves_out_few_pixels() -> None:
    values = np.zeros((1, 2, 100, 100), np.float32)
    values[0, 0, 0, :5] = 50
    values[0, 0, 1, 0] = values[0, 1, 0, :6] = -3
    np.testing.assert_array_equal(channel_ranges(values), [3, 3])
