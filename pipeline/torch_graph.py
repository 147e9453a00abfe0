"""An ONNX graph as a torch function, so that gradients reach its scales and biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from pipeline.errors import UnsupportedError
from pipeline.graph.io import opset
from pipeline.graph.resampling import axis_matrix, index_map

if TYPE_CHECKING:
    from torch import Tensor

Values = dict[str, "Tensor"]
QMIN, QMAX = -128, 127
SPATIAL = 2  # axis of the height in NCHW


class TorchGraph:
    """What some tensors of a graph hold, computed in float32 by torch, differentiably.

    QuantizeLinear rounds to the nearest even integer within -128…127 and passes gradients straight through (Bengio,
    Léonard, Courville 2013, arXiv:1308.3432), so that with DequantizeLinear a scale's gradient is that of learned step
    sizes (Esser et al. 2020, arXiv:1902.08153).

    Args:
        model: float32, or with float32 Q/DQ pairs; shapes are taken from what is fed.
        wanted: tensors to compute; nodes that they do not depend on are left out.
        device: of torch.

    Raises:
        UnsupportedError: a node that has no torch twin here, named.
    """

    def __init__(self, model: ModelProto, wanted: Sequence[str], device: Any) -> None:
        import torch

        self.wanted, self.device, self.opset = tuple(wanted), device, opset(model)
        self.constants: dict[str, NDArray[Any]] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.nodes = _needed(model, self.wanted)
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = np.asarray(_constant(node))
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        for node in self.nodes:
            if node.op_type not in TWINS or node.domain not in ("", "ai.onnx"):
                raise _unsupported(node, f"{node.op_type} nodes")
        self.fixed: Values = {
            name: torch.from_numpy(np.array(array)).to(device)
            for name, array in self.constants.items()
            if np.issubdtype(array.dtype, np.floating)
        }
        self._resampling: dict[tuple[str, int, int], Any] = {}

    def __call__(self, feeds: Mapping[str, Tensor], learned: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The wanted tensors, in their order.

        Args:
            feeds: the graph's inputs by name.
            learned: in place of initializers.
        """
        values: Values = {**self.fixed, **feeds, **(learned or {})}
        for node in self.nodes:
            given = [values.get(name) if name else None for name in node.input]
            values[node.output[0]] = TWINS[node.op_type](self, node, given)
        return [values[name] for name in self.wanted]

    # ------------------------------------------------------------------ what twins ask

    def array(self, node: NodeProto, place: int) -> NDArray[Any] | None:
        """An input that has to be constant; None where it is left out."""
        if place >= len(node.input) or not node.input[place]:
            return None
        if node.input[place] not in self.constants:
            raise _unsupported(node, f"{node.op_type} with a computed input {place}")
        return self.constants[node.input[place]]

    def along(self, x: Tensor, node: NodeProto, axis: int, attributes: Mapping[str, Any], **target: Any) -> Tensor:
        """A Resize along one axis, as ONNX Runtime computes it."""
        import torch

        source = x.shape[axis]
        key = (node.output[0], axis, source)
        nearest = attributes.get("mode", b"nearest") in (b"nearest", "nearest")
        if key not in self._resampling:
            made: NDArray[Any] = (index_map if nearest else axis_matrix)(attributes, source, self.opset, **target)
            self._resampling[key] = torch.from_numpy(made).to(x.device)
        kept = self._resampling[key]
        if nearest:
            return x.index_select(axis, kept)
        result: Tensor = torch.tensordot(x, kept, dims=([axis], [1])).movedim(-1, axis)
        return result


def _needed(model: ModelProto, wanted: Sequence[str]) -> list[NodeProto]:
    """Nodes that the tensors depend on, in order."""
    names, nodes = set(wanted), []
    for node in reversed(model.graph.node):
        if names.intersection(node.output):
            names.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _constant(node: NodeProto) -> Any:
    value = onnx.helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _unsupported(node: NodeProto, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"refinement and pruning have no gradients for {what}: {node.name or node.output[0]}",
        expected="a clean graph of convolutions, activations, pools, resizes, pads, concatenations and sums",
        fix="leave out what needs them (calibrate.refine_steps: 0); a graph with fixed sizes has fewer kinds of nodes",
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


Twin = Callable[[TorchGraph, NodeProto, "list[Any]"], "Tensor"]


def _elementwise(name: str) -> Twin:
    def twin(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
        import torch

        result: Tensor = getattr(torch, name)(*given)
        return result

    return twin


def _pads(node: NodeProto, attributes: Mapping[str, Any], rank: int) -> list[int]:
    """In the order of torch: of the last axis first, begin and end."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _unsupported(node, f"{node.op_type} with auto_pad")
    pads = list(attributes.get("pads", [0] * 2 * rank))
    return [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]


def _conv(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    from torch.nn import functional

    attributes = _attributes(node)
    x, weight, bias = [*given, None][:3]
    rank = weight.dim() - SPATIAL
    if rank != SPATIAL:
        raise _unsupported(node, f"{node.op_type} in {rank} dimensions")
    pads = _pads(node, attributes, rank)
    stride, dilation = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    group = attributes.get("group", 1)
    if node.op_type == "Conv":
        if pads[0::2] == pads[1::2]:
            padding = pads[0::2][::-1]
        else:
            x, padding = functional.pad(x, pads), [0] * rank
        return functional.conv2d(x, weight, bias, stride, padding, dilation, group)
    extra = attributes.get("output_padding", [0] * rank)
    if pads[0::2] != pads[1::2] or "output_shape" in attributes:
        raise _unsupported(node, "ConvTranspose with uneven pads or output_shape")
    return functional.conv_transpose2d(x, weight, bias, stride, pads[0::2][::-1], extra, group, dilation)


def _pool(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    from torch.nn import functional

    attributes, (x,) = _attributes(node), given
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    pads, stride = _pads(node, attributes, rank), attributes.get("strides", [1] * rank)
    ceil = bool(attributes.get("ceil_mode", 0))
    if rank != SPATIAL or any(d != 1 for d in attributes.get("dilations", [])):
        raise _unsupported(node, f"{node.op_type} with dilations or other than two dimensions")
    if ceil and (any(pads) or node.op_type != "MaxPool"):
        raise _unsupported(node, f"{node.op_type} with ceil_mode and pads")
    if node.op_type == "MaxPool":
        return functional.max_pool2d(functional.pad(x, pads, value=-math.inf), kernel, stride, ceil_mode=ceil)
    if any(pads) and not attributes.get("count_include_pad", 0):
        raise _unsupported(node, "AveragePool that leaves out its pads")
    return functional.avg_pool2d(functional.pad(x, pads), kernel, stride)


def _resize(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    attributes, x = _attributes(node), given[0]
    stretches = attributes.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
    if "axes" in attributes or attributes.get("antialias", 0) or not stretches:
        raise _unsupported(node, "Resize with axes, antialias or a policy")
    scales, sizes = graph.array(node, 2), graph.array(node, 3)
    for axis in range(x.dim()):
        if scales is not None and scales.size:
            target: dict[str, Any] = {"scale": scales[axis]}
            still = scales[axis] == 1
        elif sizes is not None:
            target = {"size": int(sizes[axis])}
            still = int(sizes[axis]) == x.shape[axis]
        if not still:
            x = graph.along(x, node, axis, attributes, **target)
    result: Tensor = x
    return result


def _pad(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    from torch.nn import functional

    attributes, x = _attributes(node), given[0]
    modes = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}
    pads, value, axes = graph.array(node, 1), graph.array(node, 2), graph.array(node, 3)
    mode = modes.get(attributes.get("mode", b"constant"))
    if mode is None or pads is None or axes is not None:
        raise _unsupported(node, "Pad with axes or such a mode")
    rank = x.dim()
    order = [int(pads[axis + side * rank]) for axis in reversed(range(rank)) for side in (0, 1)]
    while len(order) > SPATIAL and not any(order[-2:]):
        order = order[:-2]
    if mode != "constant":
        return functional.pad(x, order, mode)
    return functional.pad(x, order, value=float(value) if value is not None else 0.0)


def _concat(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    import torch

    return torch.cat(given, _attributes(node)["axis"])


def _clip(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    low, high = graph.array(node, 1), graph.array(node, 2)
    result: Tensor = given[0].clamp(None if low is None else float(low), None if high is None else float(high))
    return result


def _shaped(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    attributes, (x, *_) = _attributes(node), given
    result: Tensor
    if node.op_type == "Transpose":
        result = x.permute(attributes.get("perm", list(reversed(range(x.dim())))))
    elif node.op_type == "Cast":
        result = x.float()  # everything here is float32; integers come from a uint8 image alone
    else:
        result = x.mean(list(range(SPATIAL, x.dim())), keepdim=True)
    return result


def _activation(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    from torch.nn import functional

    attributes, x = _attributes(node), given[0]
    result: Tensor
    if node.op_type == "LeakyRelu":
        result = functional.leaky_relu(x, attributes.get("alpha", 0.01))
    elif node.op_type == "Elu":
        result = functional.elu(x, attributes.get("alpha", 1.0))
    elif node.op_type == "PRelu":
        result = x.clamp(min=0) + given[1] * x.clamp(max=0)
    elif node.op_type == "HardSigmoid":
        result = (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0, 1)
    elif node.op_type == "HardSwish":
        result = x * (x / 6 + 0.5).clamp(0, 1)
    elif node.op_type == "Softmax":
        result = x.softmax(attributes.get("axis", -1))
    else:
        result = functional.softplus(x)
    return result


def _scaled(x: Tensor, scale: Tensor, node: NodeProto) -> Tensor:
    """The scale so that it broadcasts over the axis it belongs to."""
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape(())
    axis = _attributes(node).get("axis", 1) % x.dim()
    return scale.reshape([-1 if place == axis else 1 for place in range(x.dim())])


def _quantize(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    x, scale = given[0], given[1]
    zero = graph.array(node, 2)
    if zero is None or zero.dtype != np.int8 or zero.any():
        raise _unsupported(node, "QuantizeLinear other than symmetric int8")
    held = (x / _scaled(x, scale, node)).clamp(QMIN, QMAX)
    result: Tensor = held + (held.round() - held).detach()
    return result


def _dequantize(graph: TorchGraph, node: NodeProto, given: list[Any]) -> Tensor:
    x, scale = given[0], given[1]
    result: Tensor = x * _scaled(x, scale, node)
    return result


TWINS: dict[str, Twin] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("Transpose", "Cast", "GlobalAveragePool"), _shaped),
    **dict.fromkeys(("LeakyRelu", "Elu", "PRelu", "HardSigmoid", "HardSwish", "Softmax", "Softplus"), _activation),
    **{op: _elementwise(op.lower()) for op in ("Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh")},
    "Resize": _resize,
    "Pad": _pad,
    "Concat": _concat,
    "Clip": _clip,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
