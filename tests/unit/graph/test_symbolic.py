"""Symbolic shapes and values against what ONNX Runtime computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.graph.base import import_graph
from pipeline.graph.promises import write_multiples
from pipeline.graph.symbolic import Symbolic
from pipeline.graph.symbols import Atom, Expr, Symbol, substitute
from tests.unit.graph.builders import model, weights


def symbols_of(value: Expr) -> set[Symbol]:
    found: set[Symbol] = set()
    atoms: list[Atom] = [atom for product, _ in value.terms for atom in product]
    while atoms:
        atom = atoms.pop()
        if isinstance(atom, Symbol):
            found.add(atom)
        else:
            atoms += [a for product, _ in atom.inner.terms for a in product]
    return found


def check(proto: onnx.ModelProto, shape: tuple[int, ...], names: tuple[str, ...]) -> int:
    """Every shape and value that is known in terms of the input's axes is the one that ONNX Runtime finds; how many."""
    graph = import_graph(onnx.ModelProto.FromString(proto.SerializeToString()))
    known = Symbolic(graph)
    sizes = {Symbol(name): size for name, size in zip(names, shape, strict=True) if name}
    watched = onnx.ModelProto.FromString(proto.SerializeToString())
    del watched.graph.output[:]
    tensors = [t for t in graph.tensors().values() if isinstance(t, gs.Variable) and t.inputs]
    watched.graph.output.extend(onnx.ValueInfoProto(name=t.name) for t in tensors)
    with OnnxRuntimeRunner(watched.SerializeToString(), optimize=False) as runner:
        got = runner({graph.inputs[0].name: np.ones(shape, np.float32)})
    compared = 0
    for tensor in tensors:
        for expected, have in zip(known.shape(tensor) or (), got[tensor.name].shape, strict=False):
            if symbols_of(expected) <= set(sizes):
                assert substitute(expected, sizes) == have, tensor.name
                compared += 1
        value = known.value(tensor)
        if value is not None and value.dtype != bool:
            assert value.shape == got[tensor.name].shape
            for entry, number in zip(value.flat, got[tensor.name].flat, strict=True):
                if symbols_of(entry) <= set(sizes):
                    assert float(substitute(entry, sizes)) == number, tensor.name
                    compared += 1
    return compared


def net(nodes: list[onnx.NodeProto], outputs: list[str], values: dict[str, Any], opset: int = 17) -> onnx.ModelProto:
    proto = model(nodes, {"x": (1, 4, "H", "W")}, dict.fromkeys(outputs), values, opset=opset)
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = TensorProto.UNDEFINED
    return proto


NODE = helper.make_node
LAYERS = [
    NODE("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
    NODE("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 3]),
    NODE("Conv", ["x", "w"], ["y"], auto_pad="VALID", dilations=[2, 1]),
    NODE("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    NODE("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    NODE("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    NODE("AveragePool", ["x"], ["y"], kernel_shape=[3, 2], strides=[3, 1]),
    NODE("ConvTranspose", ["x", "t"], ["y"], strides=[2, 2]),
    NODE("ConvTranspose", ["x", "t"], ["y"], strides=[2, 2], pads=[1, 0, 1, 0], output_padding=[1, 0]),
    NODE("Resize", ["x", "", "scales"], ["y"], mode="nearest"),
    NODE("Pad", ["x", "pads"], ["y"]),
    NODE("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1]),
    NODE("Slice", ["x", "one", "far", "axis", "two"], ["y"]),
    NODE("Reshape", ["x", "flat"], ["y"]),
    NODE("Flatten", ["x"], ["y"], axis=2),
    NODE("ReduceMean", ["x"], ["y"], axes=[2], keepdims=0),
    NODE("ArgMax", ["x"], ["y"], axis=1),
    NODE("DepthToSpace", ["x"], ["y"], blocksize=2),
    NODE("GlobalAveragePool", ["x"], ["y"]),
    NODE("Concat", ["x", "x"], ["y"], axis=2),
    NODE("Add", ["x", "column"], ["y"]),
    NODE("Unsqueeze", ["x", "axis"], ["y"]),
]
VALUES = {
    "w": weights(5, 4, 3, 3),
    "t": weights(4, 3, 3, 3),
    "scales": np.array([1, 1, 1.5, 2], np.float32),
    "pads": np.array([0, 0, 1, 2, 0, 0, 0, 3]),
    "one": np.array([1]),
    "far": np.array([2**40]),
    "axis": np.array([3]),
    "two": np.array([2]),
    "flat": np.array([0, -1, 4]),
    "column": weights(1, 1, 1, 1),
}


@pytest.mark.parametrize("layer", LAYERS, ids=[f"{i}-{layer.op_type}" for i, layer in enumerate(LAYERS)])
@pytest.mark.parametrize("size", [(8, 10), (13, 17), (9, 24)])
def test_shapes_are_those_of_onnxruntime(layer: onnx.NodeProto, size: tuple[int, int]) -> None:
    values = {name: value for name, value in VALUES.items() if name in layer.input}
    shape_of = [NODE("Shape", ["y"], ["s"], name="shape")]
    assert check(net([layer, *shape_of], ["y", "s"], values), (1, 4, *size), ("", "", "H", "W")) >= 2


def test_f_pad_alignment_is_understood_at_every_size() -> None:
    nodes = [
        NODE("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        NODE("Resize", ["p", "", "scales"], ["u"], mode="nearest"),
        NODE("Shape", ["x"], ["sx"]),
        NODE("Shape", ["u"], ["su"]),
        NODE("Gather", ["sx", "i"], ["h"]),
        NODE("Gather", ["su", "i"], ["g"]),
        NODE("Sub", ["h", "g"], ["d"]),
        NODE("Div", ["d", "two"], ["half"]),
        NODE("Sub", ["d", "half"], ["rest"]),
        NODE("Cast", ["h"], ["f"], to=TensorProto.FLOAT),
        NODE("Mul", ["f", "c"], ["m"]),
        NODE("Floor", ["m"], ["fl"]),
        NODE("Cast", ["fl"], ["size"], to=TensorProto.INT64),
        NODE("Mod", ["h", "two"], ["odd"]),
        NODE("Equal", ["h", "minus"], ["is"]),
        NODE("Where", ["is", "i", "h"], ["chosen"]),
    ]
    values = {
        "scales": np.array([1, 1, 2, 2], np.float32),
        "i": np.array(2),
        "two": np.array(2),
        "c": np.array(1.5, np.float32),
        "minus": np.array(-1),
    }
    outputs = ["rest", "size", "odd", "chosen", "half"]
    proto = net(nodes, outputs, values)
    for size in ((8, 10), (13, 17), (1, 1), (2, 3)):
        if math.prod(size) > 4:
            assert check(proto, (1, 4, *size), ("", "", "H", "W")) >= 20
    graph = import_graph(onnx.ModelProto.FromString(proto.SerializeToString()))
    known, half = Symbolic(graph), graph.tensors()["half"]
    assert known.integers(half) == [0]
    assert known.value(graph.tensors()["chosen"]) is not None


@pytest.mark.parametrize("factor", [0.1, 1 / 3, 1.7])
def test_float_arithmetic_that_rounds_stays_unknown(factor: float) -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        NODE("Mul", ["f", "c"], ["m"]),
        NODE("Cast", ["m"], ["size"], to=TensorProto.INT64),
    ]
    graph = import_graph(net(nodes, ["size"], {"c": np.array(factor, np.float32)}))
    known = Symbolic(graph)
    assert known.value(graph.tensors()["f"]) is not None
    assert known.value(graph.tensors()["size"]) is None


def test_an_integer_division_that_may_be_negative_stays_unknown() -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Sub", ["s", "ten"], ["d"]),
        NODE("Div", ["d", "two"], ["q"]),
    ]
    graph = import_graph(net(nodes, ["q"], {"ten": np.array([10]), "two": np.array([2])}))
    assert Symbolic(graph).value(graph.tensors()["q"]) is None


def test_a_baked_in_image_has_its_axes_elsewhere() -> None:
    """What is promised of height and width holds for axes 1 and 2 of uint8 (N, H, W, C)."""
    images = (
        (TensorProto.UINT8, ("N", "H", "W", 3), {1: "H/16", 2: "W/8"}),
        (TensorProto.FLOAT, ("N", 3, "H", "W"), {2: "H/16", 3: "W/8"}),
    )
    for kind, shape, names in images:
        proto = model(
            [helper.make_node("Identity", ["x"], ["y"])], {"x": shape}, {"y": shape}, input_type=kind, output_type=kind
        )
        write_multiples(proto, {"height": 16, "width": 8})
        graph = import_graph(proto)
        found = Symbolic(graph).shape(graph.inputs[0])
        assert found is not None
        assert {axis: next(iter(symbols_of(found[axis]))).name for axis in names} == names
