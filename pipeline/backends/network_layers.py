"""Single layers of a TensorRT network, by ``INetworkDefinition`` calls over the API module ``trt``.

What a library offers is read off the library. A tensor is as wide as the network says: float32, or FP16 in a strongly
typed network that computes in FP16; weights have the type of the tensors that they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineError, ModelError

CHANNEL_AXIS = 1
LEAKY_SLOPE = 0.01  # of torch.nn.LeakyReLU
UNIT = (1, 1, 1, 1)
NOWHERE = (0, 0, 0, 0)


class Layers:
    """Adds layers to one network.

    Args:
        trt: the API module.
        network: to add to, an INetworkDefinition, whose stubs know no tuples for its Dims.
        half: FP16 weights, for a strongly typed network.

    Attributes:
        kept: the weights, which TensorRT reads in place; keep them until the engine is built.
        titles: layer names by the name of the layer's tensor, where they differ.
    """

    def __init__(self, trt: Any, network: Any, *, half: bool) -> None:
        self.trt, self.network = trt, network
        self.dtype: np.dtype[Any] = np.dtype(np.float16 if half else np.float32)
        self.kept: list[NDArray[Any]] = []
        self.titles: dict[str, str] = {}
        # From TensorRT 10 on the types that a pair gives are arguments; before, they follow from the network.
        self._typed_pairs = "output_type" in (getattr(network, "add_quantize", None).__doc__ or "")

    def input(self, name: str, shape: Sequence[int]) -> Any:
        """A float32 input; -1 is a free axis."""
        return self.network.add_input(name, self.trt.float32, tuple(shape))

    def output(self, tensor: Any, name: str) -> None:
        """Make a tensor a float32 output of this name."""
        if self.dtype == np.float16:
            tensor.name = f"{name}.half"
            tensor = self._cast(tensor, self.trt.float32, f"{name}.float")
            tensor.name = name
        self.network.mark_output(tensor)

    def entered(self, tensor: Any) -> Any:
        """An input in the type that the network computes in."""
        return self._cast(tensor, self.trt.float16, f"{tensor.name}.half") if self.dtype == np.float16 else tensor

    def convolution(self, name: str, x: Any, weight: NDArray[Any] | Any, shape: Sequence[int], bias: Any) -> Any:
        """Stride 1 and padding that keeps the size.

        Args:
            x: (N, C, H, W).
            weight: an array of ``shape``, or the tensor that a pair gives.
            shape: of the weight: (outputs, C, k, k), k odd.
            bias: (outputs,), or None.
        """
        kernel = tuple(shape[2:])
        layer = self.network.add_convolution_nd(x, shape[0], kernel, self._kernel(weight), self._optional(bias))
        layer.padding_nd = tuple(size // 2 for size in kernel)
        return self._weighted(layer, name, weight)

    def deconvolution(self, name: str, x: Any, weight: NDArray[Any] | Any, shape: Sequence[int], bias: Any) -> Any:
        """Kernel and stride alike; ``shape`` is (C, outputs, k, k), everything else as in ``convolution``."""
        kernel = tuple(shape[2:])
        layer = self.network.add_deconvolution_nd(x, shape[1], kernel, self._kernel(weight), self._optional(bias))
        layer.stride_nd = kernel
        return self._weighted(layer, name, weight)

    def scale(self, name: str, x: Any, factor: NDArray[Any], shift: NDArray[Any]) -> Any:
        """x · factor + shift, one of each a channel: BatchNorm in eval mode."""
        mode = self.trt.ScaleMode.CHANNEL
        layer = self.network.add_scale_nd(
            x, mode, self._weights(shift), self._weights(factor), self._weights(np.ones_like(factor)), CHANNEL_AXIS
        )
        return self._named(layer, name)

    def activation(self, name: str, x: Any, kind: str) -> Any:
        """``kind``: RELU, LEAKY_RELU (torch's slope) or SIGMOID."""
        layer = self.network.add_activation(x, getattr(self.trt.ActivationType, kind))
        if kind == "LEAKY_RELU":
            layer.alpha = LEAKY_SLOPE
        return self._named(layer, name)

    def product(self, name: str, x: Any, y: Any) -> Any:
        return self._named(self.network.add_elementwise(x, y, self.trt.ElementWiseOperation.PROD), name)

    def pool(self, name: str, x: Any) -> Any:
        """Maximum of 2×2; an odd last row or column is left out."""
        layer = self.network.add_pooling_nd(x, self.trt.PoolingType.MAX, (2, 2))
        layer.stride_nd = (2, 2)
        return self._named(layer, name)

    def resize(self, name: str, x: Any, *, linear: bool, align_corners: bool) -> Any:
        """Twice the height and width; ``align_corners`` is of linear interpolation."""
        trt = self.trt
        layer = self.network.add_resize(x)
        layer.scales = [1.0, 1.0, 2.0, 2.0]
        layer.resize_mode = trt.InterpolationMode.LINEAR if linear else trt.InterpolationMode.NEAREST
        where = trt.ResizeCoordinateTransformation
        if linear:
            layer.coordinate_transformation = where.ALIGN_CORNERS if align_corners else where.HALF_PIXEL
        else:
            layer.coordinate_transformation = where.ASYMMETRIC
            layer.nearest_rounding = trt.ResizeRoundMode.FLOOR
        return self._named(layer, name)

    def padded(self, name: str, x: Any, like: Any) -> Any:
        """Zeros below and to the right, up to the height and width of ``like``.

        After pooling by 2 and upsampling by 2 a row and a column are missing at most, and torch's F.pad with ``d // 2``
        before and the rest behind puts them there.
        """
        sizes = (*tuple(x.shape)[:2], *tuple(like.shape)[2:])
        static = -1 not in sizes
        layer = self.network.add_slice(x, NOWHERE, sizes if static else NOWHERE, UNIT)
        modes = self.trt.SampleMode if hasattr(self.trt, "SampleMode") else self.trt.SliceMode
        layer.mode = modes.FILL
        if not static:
            layer.set_input(2, self._sizes(name, like, channels=sizes[1]))
        return self._named(layer, name)

    def concatenation(self, name: str, parts: Sequence[Any]) -> Any:
        """Along the channels."""
        layer = self.network.add_concatenation(list(parts))
        layer.axis = CHANNEL_AXIS
        return self._named(layer, name)

    def pair(self, stem: str, x: Any, scale: NDArray[Any], axis: int | None = None) -> Any:
        """Through INT8 and back: one scale a tensor, or (channels,) along ``axis``."""
        trt, network = self.trt, self.network
        scales = self.constant(f"{stem}.scale", scale)
        kinds = ((trt.int8,), (trt.float16 if self.dtype == np.float16 else trt.float32,))
        to_type, back_type = kinds if self._typed_pairs else ((), ())
        quantize = network.add_quantize(x, scales, *to_type)
        dequantize = network.add_dequantize(self._named(quantize, f"{stem}.int8"), scales, *back_type)
        if axis is not None:
            quantize.axis = dequantize.axis = axis
        return self._named(dequantize, f"{stem}.dequantized")

    def constant(self, name: str, values: NDArray[Any]) -> Any:
        """A tensor of the values, in their shape: floats in the network's type, integers as they are."""
        shape = tuple(values.shape)
        return self._named(self.network.add_constant(shape, self._weights(values)), name)

    # ------------------------------------------------------------------ parts

    def _sizes(self, name: str, like: Any, channels: int) -> Any:
        """The shape of ``like`` with another number of channels, as a tensor, where axes are free."""
        operation = self.trt.ElementWiseOperation
        shape = self._named(self.network.add_shape(like), f"{name}.shape")
        kind = np.int64 if shape.dtype == getattr(self.trt, "int64", None) else np.int32
        kept = self.constant(f"{name}.kept", np.array([1, 0, 1, 1], kind))
        given = self.constant(f"{name}.given", np.array([0, channels, 0, 0], kind))
        spatial = self._named(self.network.add_elementwise(shape, kept, operation.PROD), f"{name}.spatial")
        return self._named(self.network.add_elementwise(spatial, given, operation.SUM), f"{name}.sizes")

    def _cast(self, tensor: Any, kind: Any, name: str) -> Any:
        return self._named(self.network.add_cast(tensor, kind), name)

    def _weighted(self, layer: Any, name: str, weight: NDArray[Any] | Any) -> Any:
        if layer is not None and not isinstance(weight, np.ndarray):
            layer.set_input(1, weight)
        return self._named(layer, name)

    def _kernel(self, weight: NDArray[Any] | Any) -> Any:
        return self._weights(weight) if isinstance(weight, np.ndarray) else self.trt.Weights()

    def _optional(self, bias: NDArray[Any] | None) -> Any:
        return self.trt.Weights() if bias is None else self._weights(bias)

    def _weights(self, values: NDArray[Any]) -> Any:
        array = values
        if values.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = values.astype(self.dtype)
            if not np.isfinite(array).all() and np.isfinite(values).all():
                raise ModelError(
                    f"weights of up to {np.abs(values).max():.4g} are beyond FP16",
                    expected="weights, and scales of BatchNorm, that FP16 holds",
                    fix="build at --precision fp32",
                )
        array = np.ascontiguousarray(array)
        self.kept.append(array)
        return self.trt.Weights(array)

    def _named(self, layer: Any, name: str) -> Any:
        """The one output of a new layer, both named.

        Raises:
            EngineError: TensorRT made no layer.
        """
        if layer is None:
            raise EngineError(
                f"{self.trt.__name__} {self.trt.__version__} refuses the layer {name}",
                fix="see the log with --debug, or set engine.source to onnx",
            )
        layer.name = self.titles.get(name, name)
        tensor = layer.get_output(0)
        tensor.name = name
        return tensor
