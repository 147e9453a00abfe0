"""A clean graph as a deployment takes it: an image in, a mask out; and the proof that it is still the same network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipeline.artifacts import ModelCard, Output, TensorSpec, output_kind
from pipeline.config import PreprocessingConfig
from pipeline.data.preprocessing import Pixels, coefficients, normalise
from pipeline.data.synthetic import draw_cells
from pipeline.errors import ModelError
from pipeline.graph.cleaning import clean_model
from pipeline.graph.io import model_inputs, model_outputs
from pipeline.graph.shapes import all_names, redirect, set_value_info, unique
from pipeline.graph.versions import with_opset

Input = Literal["float", "image"]

# uint8 holds 256 ids; 255 is what label files and letterboxing call void.
MAX_CLASSES = 255
# Before it, Softmax runs over all axes from the given one on.
SOFTMAX_OPSET = 13
# Sizes for dynamic axes (batch, height, width); the last ones are odd.
SIZES = ((1, 64, 64), (2, 64, 96), (1, 37, 51))
# How much smaller than the best a logit may be, over the largest |logit|, for its class to stand for the best one.
NEAR_TIE = 1e-4


def bake(model: ModelProto, card: ModelCard | None, *, input: Input, output: Output) -> ModelProto:
    """The graph with its preprocessing and its decision inside.

    1. input "image": the input, float32 (N, C, H, W), becomes uint8 (N, H, W, C) of the same name, in the channel order
       of the card's preprocessing and at the network's size: resizing, letterboxing and cropping stay outside. Cast
       comes first, since TensorRT takes uint8 into nothing else, then Transpose, Mul and Add: with the constants of
       ``coefficients``, the very arithmetic of ``normalise``. Mul goes where every factor is 1, Add where every offset
       is 0. What read the input reads ``<input>.add`` then (or the last of ``.mul`` and ``.transpose``).
    2. output "labels": ArgMax over the classes, the smaller class where two are equal, as uint8 (N, H, W) ``labels``.
    3. output "probabilities": Softmax over the classes, float32 (N, classes, H, W) ``probabilities``; raises the opset
       to 13 where it is lower.

    The result is clean: cleaning it again gives the same bytes. Nodes, tensors, axes and metadata entries keep their
    names; only the former output, now a tensor inside, is called like its node. The card stays as it is, since the
    tensors tell what to feed: a uint8 input takes the image itself, a float32 input takes it normalised.

    Args:
        model: a clean float32 graph with one image input and one output of logits; not changed.
        card: for the preprocessing and the number of classes.

    Raises:
        ModelError: no card; other inputs or outputs than these; an input or output that is baked already; as many
            channels as the card does not say; more than 255 classes, or one, of which every pixel would be: a network
            of one logit needs a second channel of zeros before it.
    """
    if (input, output) == ("float", "logits"):
        result = ModelProto()
        result.CopyFrom(model)
        return result
    card = _checked(model, card, output)
    result = with_opset(model, SOFTMAX_OPSET if output == "probabilities" else 0)
    if input == "image":
        _take_image(result, card.preprocessing)
    if output != "logits":
        _decide(result, output)
    set_value_info(result)
    return clean_model(result)[0]


class Model(Protocol):
    """A loaded model: a Runner."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings", extra="forbid"))
class BakedEquality:
    """Certificate that a baked graph decides as preprocessing, clean graph and argmax or softmax in numpy do.

    Attributes:
        input, output: of the baked graph.
        shapes: of the uint8 images that were tried, (N, H, W, C).
        refused: sizes that the clean graph itself cannot run; nothing is compared there.
        compared: how many values of the output were compared.
        near_ties: labels that differ where the two logits are within 1e-4 of the largest |logit|.
        wrong: labels that differ elsewhere.
        max_error: of probabilities max |difference|, of logits that over max |logit|; None for labels.
        tolerance: bound on ``max_error``.
    """

    input: Input
    output: Output
    shapes: tuple[tuple[int, ...], ...]
    refused: tuple[tuple[int, ...], ...]
    compared: int
    near_ties: int
    wrong: int
    max_error: float | None
    tolerance: float
    passed: bool


def check_baked(
    open_clean: Callable[[], AbstractContextManager[Model]],
    open_baked: Callable[[], AbstractContextManager[Model]],
    card: ModelCard,
    *,
    tolerance: float,
    sizes: Sequence[tuple[int, int, int]] = SIZES,
) -> BakedEquality:
    """Compare a baked graph with the clean one it was made from, on drawn images that reach from 0 to 255.

    Args:
        open_clean, open_baked: load the graphs, one after the other; both on ONNX Runtime without its optimizations.
        tolerance: see ``BakedEquality``.
        sizes: (batch, height, width) to try where the graph leaves them free.

    Raises:
        ModelError: the clean graph runs with none of the sizes, or the baked one does not run.
    """
    trials: list[tuple[Pixels, NDArray[np.float32]]] = []
    refused: list[tuple[int, ...]] = []
    with open_clean() as clean:
        for shape in _image_shapes(clean.inputs[0], card.preprocessing, sizes):
            images = _pictures(shape)
            try:
                outputs = clean({clean.inputs[0].name: _normalised(images, card.preprocessing)})
            except ModelError as error:
                refused.append(shape)
                reason = error
                continue
            trials.append((images, outputs[clean.outputs[0].name]))
    if not trials:
        raise ModelError(
            "the clean graph runs with none of the image sizes tried, so nothing can be compared",
            got="; ".join(map(str, refused)),
            fix="export it with static sizes",
        ) from reason
    with open_baked() as baked:
        source, result = baked.inputs[0], baked.outputs[0]
        takes_images = source.dtype == "uint8"
        tally = _Tally(output_kind(result))
        for images, logits in trials:
            feed = images if takes_images else _normalised(images, card.preprocessing)
            tally.add(logits, baked({source.name: feed})[result.name])
    return BakedEquality(
        input="image" if takes_images else "float",
        output=tally.output,
        shapes=tuple(images.shape for images, _ in trials),
        refused=tuple(refused),
        compared=tally.compared,
        near_ties=tally.near_ties,
        wrong=tally.wrong,
        max_error=None if tally.output == "labels" else tally.error,
        tolerance=tolerance,
        passed=tally.wrong == 0 and tally.error <= tolerance,
    )


class _Tally:
    """Sums over the trials."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.compared = self.near_ties = self.wrong = 0
        self.error = 0.0

    def add(self, logits: NDArray[np.float32], got: NDArray[Any]) -> None:
        want = _decided(logits, self.output)
        self.compared += want.size
        if got.shape != want.shape or got.dtype != want.dtype:
            self.wrong += want.size
        elif self.output == "labels":
            self._labels(logits, want, got)
        else:
            largest = 1.0 if self.output == "probabilities" else float(np.abs(logits).max())
            error = float(np.abs(want.astype(np.float64) - got).max())
            self.error = float(np.maximum(self.error, error and error / largest))  # which keeps NaN, as max() would not

    def _labels(self, logits: NDArray[np.float32], want: NDArray[Any], got: NDArray[Any]) -> None:
        differing = want != got
        values = np.moveaxis(logits, 1, -1)[differing]
        rows, chosen = np.arange(len(values)), got[differing]
        known = chosen < logits.shape[1]
        gap = values[rows, want[differing]] - values[rows, np.where(known, chosen, 0)]
        near = int((known & (gap <= NEAR_TIE * np.abs(logits).max())).sum())
        self.near_ties += near
        self.wrong += len(values) - near


def _checked(model: ModelProto, card: ModelCard | None, output: Output) -> ModelCard:
    """The card, where the model can be baked by it."""
    if card is None:
        raise ModelError(
            "the graph has no model card, so nobody knows its preprocessing and classes",
            expected="a card in the ONNX metadata",
            fix="export it with a config (`unet-trt export -c CONFIG`), or leave clean.input and clean.output alone",
        )
    inputs, outputs, channels = model_inputs(model), model_outputs(model), card.preprocessing.channel_count
    found = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in (*inputs, *outputs))
    if any(np.dtype(spec.dtype).kind in "iu" for spec in (*inputs, *outputs)):
        raise ModelError(
            "the graph takes an image or gives labels already",
            expected="a float32 input and output",
            got=found,
            fix="clean the original export, or set clean.input: float and clean.output: logits",
        )
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype != "float32":
        raise ModelError(
            "the graph takes other inputs than one image batch", expected="float32 (N, C, H, W)", got=found
        )
    if isinstance(inputs[0].shape[1], int) and inputs[0].shape[1] != channels:
        raise ModelError(
            "the graph takes images of other channels than its card says",
            expected=f"{channels} ({card.preprocessing.channels})",
            got=found,
            fix="correct preprocessing.channels",
        )
    if output == "logits":
        return card
    produced = {name: node for node in model.graph.node for name in node.output}
    if (
        len(outputs) != 1
        or len(outputs[0].shape) != 4
        or outputs[0].dtype != "float32"
        or outputs[0].name not in produced
    ):
        raise ModelError(
            "the graph gives other outputs than logits", expected="one float32 output (N, classes, H, W)", got=found
        )
    classes = outputs[0].shape[1]
    if classes != len(card.classes) or not 2 <= len(card.classes) <= MAX_CLASSES:
        raise ModelError(
            f"the graph gives {classes} channels and its card names {len(card.classes)} classes",
            expected=f"one channel a class, 2 to {MAX_CLASSES} classes",
            got=found,
            fix="correct data.classes, or set clean.output: logits",
        )
    last = produced[outputs[0].name].op_type
    if output == "probabilities" and last in ("Softmax", "Sigmoid"):
        raise ModelError(
            f"the graph ends in {last}: its output {outputs[0].name} holds probabilities already",
            expected="logits",
            fix="set clean.output: logits, which leaves the output as it is",
        )
    return card


def _take_image(model: ModelProto, spec: PreprocessingConfig) -> None:
    graph = model.graph
    fixed = {tensor.name for tensor in graph.initializer}
    value = next(value for value in graph.input if value.name not in fixed)
    taken = all_names(model)
    head: list[NodeProto] = []
    factor, offset = coefficients(spec)
    steps: list[tuple[str, dict[str, Any], tuple[str, NDArray[np.float32]] | None]] = [
        ("Cast", {"to": TensorProto.FLOAT}, None),
        ("Transpose", {"perm": [0, 3, 1, 2]}, None),
    ]
    steps += [("Mul", {}, ("factor", factor))] if (factor != 1).any() else []
    steps += [("Add", {}, ("offset", offset))] if (offset != 0).any() else []
    tensor = value.name
    for operator, attributes, constant in steps:
        name = unique(f"{value.name}.{operator.lower()}", taken)
        sources = [tensor]
        if constant is not None:
            role, values = constant
            sources.append(unique(f"{name}.{role}", taken))
            graph.initializer.append(numpy_helper.from_array(values.reshape(1, -1, 1, 1), sources[1]))
        head.append(onnx.helper.make_node(operator, sources, [name], name, **attributes))
        tensor = name
    redirect(graph, value.name, tensor)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*head, *nodes])
    batch, channels, height, width = value.type.tensor_type.shape.dim
    channels.dim_value = spec.channel_count
    how = "any size" if spec.resize == "none" else f"resized to {spec.height}×{spec.width} ({spec.resize})"
    _declare(value, TensorProto.UINT8, (batch, height, width, channels), f"image, {spec.channels}, {how}")


def _decide(model: ModelProto, output: Output) -> None:
    graph = model.graph
    (value,) = graph.output
    taken = all_names(model)
    producer = next(node for node in graph.node if value.name in node.output)
    # As the cleaning passes would call the new nodes: after the nearest layer with a name of its own.
    stem = (producer.name or value.name).removesuffix(f".{producer.op_type.lower()}")
    batch, classes, height, width = value.type.tensor_type.shape.dim
    logits, result = value.name, unique(output, taken)
    graph.value_info.add().CopyFrom(value)
    value.name = result
    if output == "labels":
        argmax, cast = unique(f"{stem}.argmax", taken), unique(f"{stem}.cast", taken)
        graph.node.append(onnx.helper.make_node("ArgMax", [logits], [argmax], argmax, axis=1, keepdims=0))
        graph.node.append(onnx.helper.make_node("Cast", [argmax], [result], cast, to=TensorProto.UINT8))
        _declare(value, TensorProto.UINT8, (batch, height, width), "class ids")
    else:
        softmax = unique(f"{stem}.softmax", taken)
        graph.node.append(onnx.helper.make_node("Softmax", [logits], [result], softmax, axis=1))
        _declare(value, TensorProto.FLOAT, (batch, classes, height, width), "probabilities of the classes")


def _declare(value: ValueInfoProto, kind: int, dims: Sequence[Any], what: str) -> None:
    shape = onnx.TensorShapeProto(dim=dims)
    value.type.tensor_type.elem_type = kind
    value.type.tensor_type.shape.CopyFrom(shape)
    value.doc_string = what


def _image_shapes(
    spec: TensorSpec, preprocessing: PreprocessingConfig, sizes: Sequence[tuple[int, int, int]]
) -> list[tuple[int, ...]]:
    """Shapes of images, (N, H, W, C), for an input (N, C, H, W)."""
    batch, _, height, width = spec.shape
    shapes = [
        tuple(have if isinstance(have, int) else free for have, free in zip((batch, height, width), size, strict=True))
        for size in sizes
    ]
    return [(*shape, preprocessing.channel_count) for shape in dict.fromkeys(shapes)]


def _pictures(shape: tuple[int, ...]) -> Pixels:
    """Drawn cells, uint8 (N, H, W, C), a scene of its own for every image and channel, from 0 to 255."""
    count, height, width, channels = shape
    images = np.empty(shape, np.uint8)
    for index in range(count):
        for channel in range(channels):
            scene = draw_cells(index * channels + channel, max(height, width))[0][:height, :width].astype(np.float64)
            scene -= scene.min()
            images[index, ..., channel] = scene * (255 / max(scene.max(), 1))
    return images


def _normalised(images: Pixels, spec: PreprocessingConfig) -> NDArray[np.float32]:
    return np.stack([normalise(image, spec) for image in images])


def _decided(logits: NDArray[np.float32], output: Output) -> NDArray[Any]:
    if output == "logits":
        return logits
    if output == "labels":
        return np.asarray(logits.argmax(1), np.uint8)
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)
