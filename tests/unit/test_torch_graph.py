"""TorchGraph against ONNX Runtime, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.table import CalibrationTable
from pipeline.errors import UnsupportedError
from pipeline.graph.placement import activation_tensors
from pipeline.graph.quantize import quantize
from pipeline.torch_graph import TorchGraph

torch = pytest.importorskip("torch")

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def graph(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int] = (2, 4, 10, 12), **weights: NDArray[Any]
) -> ModelProto:
    """x -> y."""
    made = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def floats(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def one(op: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["x", *inputs], ["y"], name="node", **attributes)


CASES = {
    "conv": graph(
        [one("Conv", "w", "b", pads=[1, 1, 1, 1], strides=[2, 1], kernel_shape=[3, 3])],
        w=floats(5, 4, 3, 3),
        b=floats(5),
    ),
    "conv, uneven pads": graph([one("Conv", "w", pads=[0, 1, 1, 2], kernel_shape=[2, 4])], w=floats(5, 4, 2, 4)),
    "conv, groups, dilations": graph(
        [one("Conv", "w", group=2, dilations=[2, 1], kernel_shape=[3, 3])], w=floats(6, 2, 3, 3)
    ),
    "deconvolution": graph(
        [one("ConvTranspose", "w", "b", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[4, 4])],
        w=floats(4, 3, 4, 4),
        b=floats(3),
    ),
    "max pool": graph([one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 0])]),
    "max pool, ceil": graph([one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], shape=(2, 4, 10, 12)),
    "average pool": graph([one("AveragePool", kernel_shape=[2, 2], strides=[2, 2])]),
    "global pool": graph([one("GlobalAveragePool")]),
    "pad": graph([one("Pad", "p", mode="constant")], p=ints(0, 0, 1, 2, 0, 0, 0, 3)),
    "pad, reflect": graph([one("Pad", "p", mode="reflect")], p=ints(0, 0, 1, 2, 0, 0, 0, 3)),
    "concat": graph([one("Concat", "w", axis=1)], w=floats(2, 1, 10, 12)),
    "clip": graph([one("Clip", "low", "high")], low=np.float32(-0.5), high=np.float32(1)),
    "prelu": graph([one("PRelu", "w")], w=floats(4, 1, 1)),
    "transpose": graph([one("Transpose", perm=[0, 2, 3, 1])]),
    "softmax": graph([one("Softmax", axis=1)]),
    **{op: graph([one(op)]) for op in ("Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus")},
    **{op: graph([one(op, alpha=0.3)]) for op in ("LeakyRelu", "Elu", "HardSigmoid")},
    **{op: graph([one(op, "w")], w=floats(4, 1, 1)) for op in ("Add", "Sub", "Mul", "Div")},
    **{
        f"resize, {mode}, {coordinates}": graph(
            [one("Resize", "", "s", mode=mode, coordinate_transformation_mode=coordinates)],
            s=np.array([1, 1, 2, 2], np.float32),
        )
        for mode in ("nearest", "linear", "cubic")
        for coordinates in ("asymmetric", "half_pixel", "align_corners")
    },
    "resize to sizes": graph(
        [one("Resize", "", "", "s", mode="linear", coordinate_transformation_mode="half_pixel")], s=ints(2, 4, 15, 30)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_onnx_runtime(name: str) -> None:
    x = floats(2, 4, 10, 12)
    with OnnxRuntimeRunner(CASES[name].SerializeToString()) as runner:
        wanted = runner({"x": x})["y"]
    (found,) = TorchGraph(CASES[name], ["y"], CPU)({"x": torch.from_numpy(x)})
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=2e-5)


def test_pairs_round_as_onnx_runtime_does_and_pass_gradients() -> None:
    model = CASES["conv"]
    table = CalibrationTable("entropy", dict.fromkeys(activation_tensors(model), 1.5))
    typed = quantize(model, table, half=False)
    x = floats(2, 4, 10, 12)
    with OnnxRuntimeRunner(typed.SerializeToString()) as runner:
        wanted = runner({"x": x})["y"]
    twin = TorchGraph(typed, ["y"], CPU)
    (found,) = twin({"x": torch.from_numpy(x)})
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=2e-5)

    scale = torch.tensor(1.5 / 127, requires_grad=True)
    (found,) = twin({"x": torch.from_numpy(x)}, {"x.scale": scale})
    found.square().sum().backward()
    # Values beyond the range grow with it, so a wider range has to show in the result.
    assert scale.grad is not None
    assert scale.grad.item() != 0


def test_what_has_no_twin_is_named() -> None:
    model = graph([one("Einsum", equation="abcd->abdc")])
    with pytest.raises(UnsupportedError, match="Einsum nodes: node"):
        TorchGraph(model, ["y"], CPU)


def test_a_computed_size_is_refused() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["s"], name="sizes"),
        one("Resize", "", "s", mode="nearest"),
    ]
    twin = TorchGraph(graph(nodes, shape=(4,)), ["y"], CPU)
    with pytest.raises(UnsupportedError, match="Resize with a computed input 2: node"):
        twin({"x": torch.ones(4)})
