"""Edits of a clean graph, to see on a GPU which form of it TensorRT runs fastest. See cleaning.py.

Each edit gives a new model, or None where the graph has nothing of the kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from pipeline.graph.shapes import dims, infer, set_value_info
from pipeline.graph.sparsity import GROUP, kept_weights

Change = Callable[[NodeProto], "Sequence[NodeProto] | None"]
Edit = Callable[[ModelProto], "ModelProto | None"]


class _Editor:
    """A copy of a model, rebuilt node by node."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for tensor in node.input:
                self.readers[tensor].append(node)
        self.count = 0

    def constant(self, values: NDArray[Any], name: str) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def array(self, name: str) -> NDArray[Any]:
        return np.asarray(numpy_helper.to_array(self.weights[name]))

    def rewrite(self, change: Change) -> ModelProto | None:
        """Replace each node by what ``change`` gives for it; None keeps it."""
        nodes: list[NodeProto] = []
        for node in list(self.model.graph.node):
            made = change(node)
            self.count += made is not None
            nodes.extend([node] if made is None else made)
        if not self.count:
            return None
        kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        used = {tensor for node in kept for tensor in node.input}
        initializers = [t for t in self.model.graph.initializer if t.name in used]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(initializers)
        set_value_info(self.model)
        return self.model


def _node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, name=name, **attributes)


def _channels(shapes: Mapping[str, ValueInfoProto], tensor: str) -> int:
    shape = dims(shapes[tensor])
    assert shape is not None
    return int(shape[1] or 0)


def _is_nearest(node: NodeProto) -> bool:
    return node.op_type == "Resize" and _attributes(node).get("mode", b"nearest") == b"nearest"


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def swapped_concat(model: ModelProto) -> ModelProto | None:
    """Concat(upsampled, skip) instead of Concat(skip, upsampled), with the next convolution's weights in that order."""
    editor, shapes = _Editor(model), infer(model)
    moved: dict[str, int] = {}

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        readers = editor.readers[node.output[0]] if node.op_type == "Concat" else []
        if len(node.input) == 2 and len(readers) == 1 and readers[0].op_type == "Conv":
            moved[node.output[0]] = _channels(shapes, node.input[0])
            return [_node("Concat", [node.input[1], node.input[0]], node.output, node.name, axis=1)]
        if node.op_type == "Conv" and node.input[0] in moved:
            weight, split = editor.array(node.input[1]), moved[node.input[0]]
            turned = np.concatenate([weight[:, split:], weight[:, :split]], axis=1)
            node.input[1] = editor.constant(turned, f"{node.input[1]}.swapped")
            return [node]
        return None

    return editor.rewrite(change)


def separate_pads(model: ModelProto) -> ModelProto | None:
    """A Pad node before each padded convolution, as exporters of other frameworks write it."""
    editor = _Editor(model)

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        attributes = _attributes(node)
        pads = attributes.get("pads", [0])
        if node.op_type != "Conv" or not any(pads):
            return None
        half = len(pads) // 2
        sizes = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        padded = f"{node.output[0]}.padded"
        attributes["pads"] = [0] * len(pads)
        return [
            _node("Pad", [node.input[0], editor.constant(sizes, f"{padded}.sizes")], [padded], f"{node.name}.pad"),
            _node("Conv", [padded, *node.input[1:]], node.output, node.name, **attributes),
        ]

    return editor.rewrite(change)


def with_resize(mode: str, transformation: str, rounding: str | None = None) -> Edit:
    """The same Resize nodes with other attributes."""

    def edit(model: ModelProto) -> ModelProto | None:
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transformation}
        if rounding is not None:
            attributes["nearest_mode"] = rounding

        def change(node: NodeProto) -> Sequence[NodeProto] | None:
            if node.op_type != "Resize":
                return None
            return [_node("Resize", node.input, node.output, node.name, **attributes)]

        return _Editor(model).rewrite(change)

    return edit


def depthwise_upsampling(kernel: Sequence[float], pad: int) -> Edit:
    """Each ×2 Resize as a depthwise ConvTranspose of stride 2 with the given separable kernel."""

    def edit(model: ModelProto) -> ModelProto | None:
        editor, shapes = _Editor(model), infer(model)

        def change(node: NodeProto) -> Sequence[NodeProto] | None:
            if node.op_type != "Resize":
                return None
            channels = _channels(shapes, node.input[0])
            weight = np.broadcast_to(np.outer(kernel, kernel), (channels, 1, len(kernel), len(kernel)))
            name = editor.constant(weight.astype(np.float32), f"{node.output[0]}.kernel")
            sizes = {"kernel_shape": [len(kernel)] * 2, "strides": [2, 2], "pads": [pad] * 4}
            return [_node("ConvTranspose", [node.input[0], name], node.output, node.name, group=channels, **sizes)]

        return editor.rewrite(change)

    return edit


def transposed_upsampling(model: ModelProto) -> ModelProto | None:
    """Each nearest ×2 Resize as a ConvTranspose of kernel and stride 2 that hands every channel on."""
    editor, shapes = _Editor(model), infer(model)

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if not _is_nearest(node):
            return None
        weight = np.tile(np.eye(_channels(shapes, node.input[0]))[:, :, None, None], (1, 1, 2, 2))
        name = editor.constant(weight.astype(np.float32), f"{node.output[0]}.kernel")
        return [
            _node("ConvTranspose", [node.input[0], name], node.output, node.name, kernel_shape=[2, 2], strides=[2, 2])
        ]

    return editor.rewrite(change)


def folded_upsampling(model: ModelProto) -> ModelProto | None:
    """A nearest ×2 Resize and the k×k Conv that alone reads it as one ConvTranspose of kernel k + 1 and stride 2.

    A pixel of the Resize's input adds to row o of the result w[2i - o + p] + w[2i + 1 - o + p], p the padding before.
    """
    editor = _Editor(model)
    resized = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if _is_nearest(node) and [reader.op_type for reader in editor.readers[node.output[0]]] == ["Conv"]
    }

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if node.output[0] in resized:
            return []
        if node.op_type != "Conv" or node.input[0] not in resized:
            return None
        weight, pads = editor.array(node.input[1]).astype(np.float64), _attributes(node)["pads"]
        for axis in (2, 3):
            ends = [(0, 0)] * 4
            ends[axis] = (1, 1)
            wide = np.pad(weight, ends)
            rows = [slice(None)] * 4
            before, after = rows.copy(), rows.copy()
            before[axis], after[axis] = slice(None, -1), slice(1, None)
            weight = np.flip(wide[tuple(before)] + wide[tuple(after)], axis)
        name = editor.constant(weight.transpose(1, 0, 2, 3).astype(np.float32), f"{node.input[1]}.folded")
        half = len(pads) // 2
        return [
            _node(
                "ConvTranspose",
                [resized[node.input[0]], name, *node.input[2:]],
                node.output,
                node.name,
                kernel_shape=list(weight.shape[2:]),
                strides=[2, 2],
                pads=[*pads[half:], *pads[:half]],
            )
        ]

    return editor.rewrite(change)


def after_resize(kind: str, *, last: int | None = None) -> Edit:
    """A node that changes nothing between each Resize (or the ``last`` ones) and its Concat, of a kind that can write
    into its part of it."""

    def edit(model: ModelProto) -> ModelProto | None:
        editor, shapes = _Editor(model), infer(model)
        found = [node.output[0] for node in model.graph.node if node.op_type == "Resize"]
        resized = set(found if last is None else found[-last:])

        def change(node: NodeProto) -> Sequence[NodeProto] | None:
            chosen = [slot for slot, tensor in enumerate(node.input) if tensor in resized]
            if node.op_type != "Concat" or not chosen:
                return None
            nodes = []
            for slot in chosen:
                source, written = node.input[slot], f"{node.input[slot]}.written"
                if kind == "Relu":
                    nodes.append(_node("Relu", [source], [written], written))
                else:
                    channels = _channels(shapes, source)
                    group = channels if kind == "depthwise" else 1
                    weight = np.ones((channels, 1)) if kind == "depthwise" else np.eye(channels)
                    name = editor.constant(weight.astype(np.float32)[:, :, None, None], f"{written}.weight")
                    nodes.append(_node("Conv", [source, name], [written], written, kernel_shape=[1, 1], group=group))
                node.input[slot] = written
            return [*nodes, node]

        return editor.rewrite(change)

    return edit


def split_convolutions(model: ModelProto) -> ModelProto | None:
    """Conv(Concat(a, b)) as Conv(a) + Conv(b)."""
    editor, shapes = _Editor(model), infer(model)
    concats = {node.output[0]: node for node in model.graph.node if node.op_type == "Concat" and len(node.input) == 2}

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if node.op_type == "Concat" and node.output[0] in concats:
            return []
        if node.op_type != "Conv" or node.input[0] not in concats:
            return None
        first, second = concats[node.input[0]].input
        place, weight, result = _channels(shapes, first), editor.array(node.input[1]), node.output[0]
        attributes = _attributes(node)
        a, b = f"{result}.first", f"{result}.second"
        weights = editor.constant(weight[:, :place], f"{a}.weight"), editor.constant(weight[:, place:], f"{b}.weight")
        return [
            _node("Conv", [first, weights[0]], [a], a, **attributes),
            _node("Conv", [second, weights[1], *node.input[2:]], [b], b, **attributes),
            _node("Add", [b, a], [result], node.name),
        ]

    return editor.rewrite(change)


def before_input(kind: str) -> Edit:
    """Identity after each Resize, and a node before the first convolution: the image times 1, or channels of zeros."""

    def edit(model: ModelProto) -> ModelProto | None:
        changed = after_resize("dense")(model)
        if changed is None:
            return None
        editor, (image,) = _Editor(changed), [value.name for value in changed.graph.input]

        def change(node: NodeProto) -> Sequence[NodeProto] | None:
            if image not in node.input:
                return None
            made = f"{image}.{kind}"
            if kind == "times":
                first = _node("Mul", [image, editor.constant(np.ones((1, 1, 1, 1), np.float32), "one")], [made], made)
            else:
                weight = editor.array(node.input[1])
                missing = 8 - weight.shape[1]
                sizes = editor.constant(np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64), "channels")
                first = _node("Pad", [image, sizes], [made], made)
                wide = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))
                node.input[1] = editor.constant(wide, f"{node.input[1]}.wide")
            node.input[0] = made
            return [first, node]

        return editor.rewrite(change)

    return edit


def depth_to_space(model: ModelProto) -> ModelProto | None:
    """ConvTranspose of kernel 2 and stride 2 as a 1×1 Conv of four times the channels, then DepthToSpace."""
    editor = _Editor(model)

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if node.op_type != "ConvTranspose":
            return None
        attributes, weight = _attributes(node), editor.array(node.input[1])
        if weight.shape[2:] != (2, 2) or list(attributes.get("strides", [])) != [2, 2]:
            return None
        if attributes.get("group", 1) != 1 or any(attributes.get("pads", [0])):
            return None
        # Mode CRD: channel c * 4 + row * 2 + column goes to that place of the 2×2 block.
        turned = weight.transpose(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
        inputs = [node.input[0], editor.constant(turned, f"{node.input[1]}.1x1")]
        if len(node.input) > 2:
            inputs.append(editor.constant(np.repeat(editor.array(node.input[2]), 4), f"{node.input[2]}.1x1"))
        deep = f"{node.output[0]}.deep"
        return [
            _node("Conv", inputs, [deep], f"{node.name}.1x1", kernel_shape=[1, 1]),
            _node("DepthToSpace", [deep], node.output, node.name, blocksize=2, mode="CRD"),
        ]

    return editor.rewrite(change)


def as_channels_last(model: ModelProto) -> ModelProto:
    """The graph as exporters of channels-last frameworks write it: every tensor NHWC, Transposes around each operator.

    Inputs and outputs stay NCHW, behind one Transpose each. Operators that know no channel axis (Relu) get none.
    """
    spatial = ("Conv", "ConvTranspose", "MaxPool", "Resize")
    to_last, to_first = [0, 2, 3, 1], [0, 3, 1, 2]
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    editor = _Editor(model)
    made: list[NodeProto] = [
        _node("Transpose", [name], [f"{name}.nhwc"], f"{name}.to_nhwc", perm=to_last) for name in sorted(inputs)
    ]

    def last(name: str) -> str:
        return f"{name}.nhwc" if name and name not in editor.weights else name

    def change(node: NodeProto) -> Sequence[NodeProto]:
        started, result = [made.pop() for _ in range(len(made))], node.output[0]
        attributes = _attributes(node)
        if node.op_type in spatial:
            first, out = f"{result}.in", f"{result}.out"
            nodes = [
                _node("Transpose", [last(node.input[0])], [first], f"{node.name}.in", perm=to_first),
                _node(node.op_type, [first, *node.input[1:]], [out], node.name, **attributes),
                _node("Transpose", [out], [last(result)], f"{node.name}.out", perm=to_last),
            ]
        else:
            if node.op_type == "Concat":
                attributes["axis"] = 3
            nodes = [_node(node.op_type, [last(t) for t in node.input], [last(result)], node.name, **attributes)]
        if result in outputs:
            nodes.append(_node("Transpose", [last(result)], [result], f"{result}.to_nchw", perm=to_first))
        return [*started, *nodes]

    changed = editor.rewrite(change)
    assert changed is not None
    return changed


def resizes_in_int8(model: ModelProto) -> ModelProto | None:
    """Of an explicit INT8 graph with Relus behind its Resizes: pairs before both, with the scale of the one behind."""
    editor = _Editor(model)
    made = {node.output[0]: node for node in model.graph.node}

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if node.op_type != "Resize":
            return None
        behind = editor.readers[node.output[0]][0]
        quantizers = [one for one in editor.readers[behind.output[0]] if one.op_type == "QuantizeLinear"]
        if behind.op_type != "Relu" or len(quantizers) != 1:
            return None
        scale = list(quantizers[0].input[1:])

        def pair(tensor: str, stem: str) -> tuple[list[NodeProto], str]:
            names = f"{stem}.pair.int8", f"{stem}.pair"
            return [
                _node("QuantizeLinear", [tensor, *scale], [names[0]], names[0]),
                _node("DequantizeLinear", [names[0], *scale], [names[1]], names[1]),
            ], names[1]

        assert node.input[0] in made
        before, node.input[0] = pair(node.input[0], f"{node.output[0]}.in")
        after, given = pair(node.output[0], node.output[0])
        behind.input[0] = given
        return [*before, node, *after]

    return editor.rewrite(change)


def without_quantizing(model: ModelProto) -> ModelProto | None:
    """Of an explicit INT8 graph: it takes the integers that its QuantizeLinear makes of the image."""
    editor, (image,) = _Editor(model), model.graph.input

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        if node.op_type == "QuantizeLinear" and node.input[0] == image.name:
            return []
        for slot, tensor in enumerate(node.input):
            if tensor in integers:
                node.input[slot] = image.name
                return [node]
        return None

    integers = {node.output[0] for node in editor.readers[image.name] if node.op_type == "QuantizeLinear"}
    editor.model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    return editor.rewrite(change)


def half_of_weights(model: ModelProto) -> ModelProto | None:
    """Of four input channels in a row the two smaller weights become zero, wherever there are so many."""
    editor = _Editor(model)

    def change(node: NodeProto) -> Sequence[NodeProto] | None:
        weight = editor.array(node.input[1]) if node.op_type == "Conv" else np.zeros((1, 1))
        if weight.shape[1] % GROUP:
            return None
        node.input[1] = editor.constant(weight * kept_weights(np.abs(weight)), f"{node.input[1]}.sparse")
        return [node]

    return editor.rewrite(change)


LINEAR = (0.25, 0.75, 0.75, 0.25)
EDITS: dict[str, tuple[str, Edit]] = {
    "swapped concat": ("Concat(upsampled, skip), weights permuted: computes the same", swapped_concat),
    "depthwise linear": ("Resize as depthwise ConvTranspose 4×4: timing only", depthwise_upsampling(LINEAR, 1)),
    "half pixel": ("linear Resize with half_pixel: timing only", with_resize("linear", "half_pixel")),
    "nearest asymmetric": ("nearest, asymmetric + floor: timing only", with_resize("nearest", "asymmetric", "floor")),
    "nearest half pixel": (
        "nearest, half_pixel + round_prefer_floor: computes what asymmetric + floor does; timing only",
        with_resize("nearest", "half_pixel", "round_prefer_floor"),
    ),
    "depthwise nearest": ("nearest as depthwise ConvTranspose 2×2: timing only", depthwise_upsampling((1.0, 1.0), 0)),
    "depth to space": ("ConvTranspose 2×2 as 1×1 Conv + DepthToSpace: computes the same", depth_to_space),
    "relu after resize": ("Relu between Resize and Concat: computes the same", after_resize("Relu")),
    "relu after the last resize": ("Relu between the last Resize and its Concat", after_resize("Relu", last=1)),
    "convolution after resize": ("1×1 Conv of the identity between Resize and Concat", after_resize("dense")),
    "depthwise after resize": ("depthwise 1×1 Conv of ones between Resize and Concat", after_resize("depthwise")),
    "split convolutions": ("Conv(Concat(a, b)) as Conv(a) + Conv(b)", split_convolutions),
    "input times one": ("1×1 Conv after Resize, and the image times 1", before_input("times")),
    "input of 8 channels": (
        "1×1 Conv after Resize, and channels of zeros added to the image",
        before_input("channels"),
    ),
    "transposed upsampling": ("nearest ×2 as ConvTranspose 2×2: computes the same", transposed_upsampling),
    "folded upsampling": ("nearest ×2 and k×k Conv as ConvTranspose (k+1)×(k+1): the same", folded_upsampling),
    "separate pads": ("a Pad node before each convolution: computes the same", separate_pads),
}
