"""A TensorRT API whose networks are computed by torch: records ``INetworkDefinition`` calls, then evaluates them.

It is as strict as a strongly typed network: layers refuse tensors and weights of differing types.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

TORCH = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "int64": torch.int64}


class FakeWeights:
    def __init__(self, array: Any = None) -> None:
        self.array = array

    def tensor(self) -> Tensor | None:
        return None if self.array is None else torch.from_numpy(self.array)


class FakeTensor:
    def __init__(self, network: FakeNetwork, compute: Callable[[], Tensor]) -> None:
        self.network, self.compute, self.name = network, compute, ""

    def value(self) -> Tensor:
        """Computed once for the image at hand."""
        cache = self.network.cache
        if self not in cache:
            cache[self] = self.compute()
        return cache[self]

    @property
    def dtype(self) -> str:
        with self.network.showing(self.network.trial(0)):
            return str(self.value().dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """-1 where the size follows a free axis of the input: where two images give two sizes."""
        sizes = []
        for attempt in range(2):
            with self.network.showing(self.network.trial(attempt)):
                sizes.append(self.value().shape)
        return tuple(a if a == b else -1 for a, b in zip(*sizes, strict=True))


class FakeLayer:
    """What is set on it lands in ``__dict__``; ``compute`` reads it when the network is evaluated."""

    def __init__(self, network: FakeNetwork, inputs: list[Any], compute: Callable[[FakeLayer], Tensor]) -> None:
        self.inputs: dict[int, Any] = dict(enumerate(inputs))
        self.name, self.axis, self.mode = "", None, None
        self._output = FakeTensor(network, lambda: compute(self))

    def set_input(self, index: int, tensor: Any) -> None:
        self.inputs[index] = tensor

    def get_output(self, index: int) -> FakeTensor:
        assert index == 0
        return self._output


class FakeNetwork:
    """Evaluates what was defined: ``values(image)`` is every named tensor."""

    def __init__(self) -> None:
        self.layers: list[FakeLayer] = []
        self.outputs: list[FakeTensor] = []
        self.source: Any = None
        self.free: tuple[int, ...] = ()
        self.image: Tensor | None = None
        self.cache: dict[FakeTensor, Tensor] = {}

    def values(self, image: np.ndarray) -> dict[str, np.ndarray]:
        with self.showing(torch.from_numpy(image)):
            names = [(layer.name, layer.get_output(0)) for layer in self.layers]
            assert len({name for name, _ in names}) == len(names), "TensorRT refuses two layers of one name"
            return {tensor.name: tensor.value().float().numpy() for _, tensor in names}

    def showing(self, image: Tensor) -> Any:
        network = self

        class Showing:
            def __enter__(self) -> None:
                self.kept = network.image, network.cache
                network.image, network.cache = image, {}

            def __exit__(self, *_: object) -> None:
                network.image, network.cache = self.kept

        return Showing()

    def trial(self, attempt: int) -> Tensor:
        return torch.zeros([32 + attempt * 17 if size == -1 else size for size in self.free])

    # ------------------------------------------------------------------ INetworkDefinition

    def add_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> FakeTensor:
        assert dtype == "float32"
        self.free = shape
        self.source = FakeTensor(self, lambda: self.image)
        self.source.name = name
        return self.source

    def mark_output(self, tensor: FakeTensor) -> None:
        self.outputs.append(tensor)

    def add_cast(self, x: FakeTensor, kind: str) -> FakeLayer:
        return self._add([x], lambda _: x.value().to(TORCH[kind]))

    def add_constant(self, shape: tuple[int, ...], weights: FakeWeights) -> FakeLayer:
        return self._add([], lambda _: weights.tensor().reshape(shape))

    def add_convolution_nd(self, x: Any, maps: int, kernel: Any, weights: Any, bias: Any) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            weight = self._kernel(layer, weights, bias, (maps, None, *kernel))
            return half(F.conv2d, layer.inputs[0].value(), weight, bias.tensor(), padding=layer.padding_nd)

        return self._add([x], compute)

    def add_deconvolution_nd(self, x: Any, maps: int, kernel: Any, weights: Any, bias: Any) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            weight = self._kernel(layer, weights, bias, (None, maps, *kernel))
            return half(F.conv_transpose2d, layer.inputs[0].value(), weight, bias.tensor(), stride=layer.stride_nd)

        return self._add([x], compute)

    def add_scale_nd(self, x: Any, mode: str, shift: Any, scale: Any, power: Any, axis: int) -> FakeLayer:
        assert mode == "CHANNEL"
        assert axis == 1

        def compute(_: FakeLayer) -> Tensor:
            factor, offset, exponent = (w.tensor()[:, None, None] for w in (scale, shift, power))
            same_types(x.value(), factor, offset, exponent)
            return (x.value() * factor + offset) ** exponent

        return self._add([x], compute)

    def add_activation(self, x: Any, kind: str) -> FakeLayer:
        functions = {
            "RELU": lambda _: x.value().relu(),
            "SIGMOID": lambda _: x.value().sigmoid(),
            "LEAKY_RELU": lambda layer: F.leaky_relu(x.value(), layer.alpha),
        }
        return self._add([x], functions[kind])

    def add_elementwise(self, x: Any, y: Any, operation: str) -> FakeLayer:
        def compute(_: FakeLayer) -> Tensor:
            same_types(x.value(), y.value())
            return x.value() * y.value() if operation == "PROD" else x.value() + y.value()

        return self._add([x, y], compute)

    def add_pooling_nd(self, x: Any, kind: str, window: Any) -> FakeLayer:
        assert kind == "MAX"
        return self._add([x], lambda layer: F.max_pool2d(x.value(), window, layer.stride_nd))

    def add_resize(self, x: Any) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            where = layer.coordinate_transformation
            if layer.resize_mode == "NEAREST":
                assert (where, layer.nearest_rounding) == ("ASYMMETRIC", "FLOOR")
                return F.interpolate(x.value(), scale_factor=tuple(layer.scales[2:]), mode="nearest")
            corners = {"ALIGN_CORNERS": True, "HALF_PIXEL": False}[where]
            return F.interpolate(
                x.value(), scale_factor=tuple(layer.scales[2:]), mode="bilinear", align_corners=corners
            )

        return self._add([x], compute)

    def add_slice(self, x: Any, start: Any, shape: Any, stride: Any) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            assert layer.mode == "FILL"
            assert (start, stride) == ((0, 0, 0, 0), (1, 1, 1, 1))
            sizes = layer.inputs[2].value().tolist() if 2 in layer.inputs else list(shape)
            result = torch.zeros(sizes, dtype=x.value().dtype)
            here = tuple(slice(0, min(have, want)) for have, want in zip(x.value().shape, sizes, strict=True))
            result[here] = x.value()[here]
            return result

        return self._add([x], compute)

    def add_concatenation(self, parts: list[Any]) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            same_types(*(part.value() for part in parts))
            return torch.cat([part.value() for part in parts], layer.axis)

        return self._add(parts, compute)

    def add_shape(self, x: Any) -> FakeLayer:
        return self._add([x], lambda _: torch.tensor(x.value().shape, dtype=torch.int64))

    def add_quantize(self, x: Any, scale: Any, output_type: str) -> FakeLayer:
        """(input, scale, output_type), as since TensorRT 10"""
        assert output_type == "int8"

        def compute(layer: FakeLayer) -> Tensor:
            same_types(x.value(), scale.value())
            steps = x.value().float() / spread(scale.value().float(), x.value(), layer.axis)
            return steps.round().clamp(-128, 127).to(torch.int8)

        return self._add([x], compute)

    def add_dequantize(self, x: Any, scale: Any, output_type: str) -> FakeLayer:
        def compute(layer: FakeLayer) -> Tensor:
            assert x.value().dtype == torch.int8
            result = x.value().float() * spread(scale.value().float(), x.value(), layer.axis)
            return result.to(TORCH[output_type])

        return self._add([x], compute)

    def _add(self, inputs: list[Any], compute: Callable[[FakeLayer], Tensor]) -> FakeLayer:
        layer = FakeLayer(self, inputs, compute)
        self.layers.append(layer)
        return layer

    @staticmethod
    def _kernel(layer: FakeLayer, weights: FakeWeights, bias: FakeWeights, shape: tuple[int | None, ...]) -> Tensor:
        given = layer.inputs.get(1)
        weight = weights.tensor() if given is None else given.value()
        assert weight is not None
        assert (given is None) == (weights.array is not None), "the weights are given once"
        assert all(want in (None, have) for want, have in zip(shape, weight.shape, strict=True))
        same_types(layer.inputs[0].value(), weight, *([bias.tensor()] if bias.array is not None else []))
        return weight


class FakeNetwork86(FakeNetwork):
    """As before TensorRT 10: the types that a pair gives are the network's own affair."""

    def add_quantize(self, x: Any, scale: Any) -> FakeLayer:
        """(input, scale)"""
        return super().add_quantize(x, scale, "int8")

    def add_dequantize(self, x: Any, scale: Any) -> FakeLayer:
        return super().add_dequantize(x, scale, "float32")


def half(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
    """In float32, rounded to the type of x, as tensor cores do."""
    result = function(x.float(), weight.float(), None if bias is None else bias.float(), **how)
    return result.to(x.dtype)


def same_types(*tensors: Tensor) -> None:
    assert len({tensor.dtype for tensor in tensors}) == 1, [tensor.dtype for tensor in tensors]


def spread(scale: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """The scales along an axis of another tensor; a scalar as it is."""
    assert (axis is None) == (scale.ndim == 0)
    return scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def _members(*names: str) -> Any:
    return SimpleNamespace(**{name: name for name in names})


def fake_trt() -> Any:
    """The API module."""
    return SimpleNamespace(
        __name__="fake_trt",
        __version__="11.0",
        Weights=FakeWeights,
        ScaleMode=_members("CHANNEL"),
        ActivationType=_members("RELU", "SIGMOID", "LEAKY_RELU"),
        PoolingType=_members("MAX"),
        ElementWiseOperation=_members("PROD", "SUM"),
        InterpolationMode=_members("LINEAR", "NEAREST"),
        ResizeCoordinateTransformation=_members("ALIGN_CORNERS", "ASYMMETRIC", "HALF_PIXEL"),
        ResizeRoundMode=_members("FLOOR"),
        SampleMode=_members("FILL"),
        **{kind: kind for kind in TORCH},
    )
