"""The tiny UNet with one convolution that INT8 ruins, and images with FP32's own masks as labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, numpy_helper

from pipeline.artifacts import ModelCard
from pipeline.backends.base import feed_image
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.data.dataset import Sample
from pipeline.graph.io import model_inputs
from tests.tiny_unet import CHANNELS, CLASSES, SIZE, reference, tiny_unet

SENSITIVE = "up_conv1"
PREPROCESSING = PreprocessingConfig(height=SIZE, width=SIZE, mean=(0.5,), std=(0.25,))
CARD = ModelCard(
    "planted", PREPROCESSING, tuple(ClassConfig(name=f"c{place}", colour=(place, 0, 0)) for place in range(CLASSES))
)


def planted_unet(factor: float = 2000.0) -> ModelProto:
    """Computes what ``tiny_unet`` does. One channel of ``bottom`` is ``factor`` times larger, and its reader's weights
    as much smaller: per tensor, INT8 has no levels left for the other channels that ``up_conv1`` reads."""
    model = tiny_unet()
    weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale(name: str, place: tuple[slice | int, ...], by: float) -> None:
        values = numpy_helper.to_array(weights[name]).copy()
        values[place] *= np.float32(by)
        weights[name].CopyFrom(numpy_helper.from_array(values, name))

    scale("bottom.weight", (0,), factor)
    scale("bottom.bias", (0,), factor)
    scale(f"{SENSITIVE}.weight", (slice(None), 2 * CHANNELS), 1 / factor)
    return model


def samples(count: int, seed: int, model: ModelProto | None = None) -> list[Sample]:
    """Smooth images; with a model its masks are the labels."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(count):
        coarse = rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3), dtype=np.uint8)
        image = np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1))
        label = None
        if model is not None:
            label = reference(model, fed(model, image))[0].argmax(0).astype(np.uint8)
        made.append(Sample(f"image_{place}", image, label))
    return made


def fed(model: ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    return feed_image(model_inputs(model)[0], image, PREPROCESSING)


def feeds(model: ModelProto, images: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    return [fed(model, sample.image) for sample in images]
