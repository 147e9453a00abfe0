"""What a weights file or an ONNX file says of its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import ModelCard, TensorSpec
from pipeline.config import UNET, Axis
from pipeline.errors import ModelError
from pipeline.networks import read_arrays
from pipeline.slips import did_you_mean
from pipeline.unet import UNetOptions, recognised

WEIGHTS = (".pth", ".pt", ".safetensors", ".wts")
CHANNELS = (1, 3)
# Each of the UNet's four levels halves height and width.
UNET_MULTIPLE = 16
# What most segmentation networks need at most, where nothing is known.
USUAL_MULTIPLE = 32
# Height and width at which a graph's levels are counted, and the smallest level that counts as one.
PROBE, LEAST = 256, 4
AXES: dict[int, Axis] = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network from its file; None where the file does not say it.

    Attributes:
        factory: of a layout that is known here; None for other weights and for ONNX files.
        arguments: of the factory.
        channels: of the image, 1 or 3; of a layout that is not known, of the one convolution that takes as many.
        classes: channels of the logits; of one channel behind a sigmoid, two; of a layout that is not known, of the one
            convolution that gives fewest.
        multiple: that height and width should be multiples of.
        height, width: pixels, where the file fixes them.
        free: axes that an ONNX file leaves free.
        parameters: how many numbers the file holds.
        card: of an ONNX file that this program exported.
    """

    file: Path
    factory: str | None
    channels: int | None
    classes: int | None
    multiple: int
    parameters: int
    arguments: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    free: tuple[Axis, ...] = ()
    card: ModelCard | None = None

    @property
    def is_known(self) -> bool:
        """Whether a configuration can name what computes it."""
        return self.is_onnx or self.factory is not None

    @property
    def is_onnx(self) -> bool:
        return self.file.suffix == ".onnx"


def survey_network(file: Path) -> NetworkFacts:
    """Look at a ``.pth``, ``.pt``, ``.safetensors`` or ``.wts`` file, or at an ``.onnx`` file.

    Raises:
        ModelError: the file is missing, damaged, of another kind, would run code when read, or holds a network that is
            no segmentation network of grey or colour images.
        UnsupportedError: torch is needed to read it and not installed.
    """
    if not file.is_file():
        raise ModelError(
            f"the checkpoint {file} does not exist{did_you_mean(file)}",
            expected=f"a file ending in {', '.join(WEIGHTS)} or .onnx",
            fix="check the path",
        )
    if file.suffix == ".onnx":
        return _of_graph(file)
    if file.suffix not in WEIGHTS:
        raise ModelError(
            f"{file} has no known ending", expected=f"{', '.join(WEIGHTS)} or .onnx", got=file.suffix or "none"
        )
    return _of_weights(file, read_arrays(file))


def _of_weights(file: Path, arrays: Mapping[str, NDArray[Any]]) -> NetworkFacts:
    parameters, options = sum(array.size for array in arrays.values()), recognised(arrays)
    if options is not None:
        _check_channels(file, options.in_channels)
        _check_head(file, options.classes)
        return NetworkFacts(
            file, UNET, options.in_channels, options.classes, UNET_MULTIPLE, parameters, _arguments(options)
        )
    kernels = [array.shape for array in arrays.values() if array.ndim == 4]
    inputs = [shape[1] for shape in kernels if shape[1] in CHANNELS]
    heads = sorted(shape[0] for shape in kernels if shape[0] > 1)
    channels = next((count for count in reversed(CHANNELS) if inputs.count(count) == 1), None)
    classes = heads[0] if heads and heads.count(heads[0]) == 1 else None
    return NetworkFacts(file, None, channels, classes, USUAL_MULTIPLE, parameters)


def _arguments(options: UNetOptions) -> dict[str, Any]:
    """Of the options, those that weights give away, and the upsampling that fits them."""
    found = options.model_dump(include={"in_channels", "classes", "base_channels", "upsampling"})
    return {**found, "bias": True} if options.bias else found


def _of_graph(file: Path) -> NetworkFacts:
    from pipeline.graph.io import load_model, model_inputs, model_outputs, read_card

    model = load_model(file)
    inputs, outputs = model_inputs(model), model_outputs(model)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs) != 1 or len(outputs[0].shape) != 4:
        raise ModelError(
            f"{file} is no segmentation network of one image",
            expected="one input (N, C, H, W) or (N, H, W, C), and one output of four axes",
            got="; ".join(f"{spec.name} {list(spec.shape)}" for spec in (*inputs, *outputs)),
            fix="for other networks write a configuration with task: tensors (docs/detector.md)",
        )
    shape, last = _channels_first(inputs[0])
    channels = shape[1] if isinstance(shape[1], int) else None
    if channels is not None:
        _check_channels(file, channels)
    classes = outputs[0].shape[3 if last else 1]
    height, width = (size if isinstance(size, int) else None for size in shape[2:])
    return NetworkFacts(
        file=file,
        factory=None,
        channels=channels,
        classes=max(classes, 2) if isinstance(classes, int) else None,
        multiple=_multiple(model, inputs[0].name, last),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer),
        height=height,
        width=width,
        free=tuple(axis for place, axis in AXES.items() if isinstance(shape[place], str)),
        card=read_card(model),
    )


def _channels_first(spec: TensorSpec) -> tuple[tuple[int | str, ...], bool]:
    """The shape as (N, C, H, W), and whether the file has the channels last."""
    shape = spec.shape
    last = shape[1] not in CHANNELS and shape[3] in CHANNELS
    return ((shape[0], shape[3], shape[1], shape[2]) if last else shape), last


def _multiple(model: Any, name: str, channels_last: bool) -> int:
    """By how much the graph shrinks an image before it grows again: of its convolutions and pools at a probe's size."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    (value,) = (value for value in probe.graph.input if value.name == name)
    for place in (1, 2) if channels_last else (2, 3):
        value.type.tensor_type.shape.dim[place].dim_value = PROBE
    del probe.graph.value_info[:]  # of other sizes
    known = onnx.shape_inference.infer_shapes(probe, data_prop=True).graph
    shapes = {one.name: one.type.tensor_type.shape.dim for one in known.value_info}
    shrinking = [node.output[0] for node in known.node if node.op_type in ("Conv", "MaxPool", "AveragePool")]
    heights = [shapes[tensor][2].dim_value for tensor in shrinking if len(shapes.get(tensor, ())) == 4]
    smallest = min((height for height in heights if height >= LEAST), default=PROBE // USUAL_MULTIPLE)
    return max(1, PROBE // smallest)


def _check_channels(file: Path, channels: int) -> None:
    if channels not in CHANNELS:
        raise ModelError(
            f"the network of {file} takes {channels} channels",
            expected="1 (grey) or 3 (colour), as images are fed here",
            got=str(channels),
        )


def _check_head(file: Path, classes: int) -> None:
    if classes < 2:
        raise ModelError(
            f"the network of {file} ends in one channel",
            expected="a channel for every class, the background's too",
            got="1",
            fix="export it to ONNX with its sigmoid as the last operator and give that file: it counts as two classes "
            "(docs/keras.md)",
        )
