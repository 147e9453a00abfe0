"""The classical Keras U-Net: train it, export it with Keras, and compare a clean graph with it layer by layer.

    python benchmarks/keras_unet.py train configs/keras.yaml unet.keras [--base 8] [--steps 500]
    python benchmarks/keras_unet.py compare configs/keras.yaml unet.keras build/keras/clean/model.onnx

``train`` writes the ONNX file beside the model (unet.onnx), for a static batch of 1; ``compare`` prints a line a
convolution: its shape, and the largest error over its largest value, on the first validation image. Needs Keras 3;
its export to ONNX needs KERAS_BACKEND=torch (or tensorflow) in the environment.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import Config, load_config
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preprocessing import preprocess
from pipeline.graph.io import load_model, model_inputs

Floats = NDArray[np.float32]
CROP, BATCH, LEARNING_RATE = 128, 8, 1e-3


def layer_errors(clean: ModelProto, wanted: Mapping[str, Floats], image: Floats) -> Iterator[tuple[str, float]]:
    """Name and error of each convolution behind its activation: max |Keras - graph| over max |Keras|.

    The convolutions of graph and network are taken in their order. Of a mask that a Sigmoid gives, the graph has the
    logit: the Sigmoid is applied here.

    Args:
        clean: with channels first.
        wanted: what Keras's layers give, (N, H, W, C), by their names.
        image: (N, H, W, C).
    """
    readers = {node.input[0]: node for node in clean.graph.node}
    names = []
    for node in clean.graph.node:
        if node.op_type == "Conv":
            reader = readers.get(node.output[0])
            activated = reader is not None and reader.op_type in ("Relu", "Softmax")
            names.append(reader.output[0] if reader is not None and activated else node.output[0])
    shown = ModelProto()
    shown.CopyFrom(clean)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with OnnxRuntimeRunner(shown.SerializeToString(), optimize=False) as runner:
        made = runner({model_inputs(clean)[0].name: np.ascontiguousarray(image.transpose(0, 3, 1, 2))})
    for name, (layer, want) in zip(names, wanted.items(), strict=True):
        have = made[name].transpose(0, 2, 3, 1)
        if want is list(wanted.values())[-1] and have.shape[3] == 1:
            have = 1 / (1 + np.exp(-have))
        if have.shape != want.shape:
            raise ValueError(f"layer {layer} gives {want.shape}, tensor {name} {have.shape}")
        yield layer, float(np.abs(have - want).max() / np.abs(want).max())


def build(height: int | None, width: int | None, channels: int, base: int) -> Any:
    """The network for one class against the rest; None leaves the sizes free."""
    from keras import Input, Model, layers

    conv = functools.partial(
        layers.Conv2D, kernel_size=3, activation="relu", padding="same", kernel_initializer="he_normal"
    )
    x = image = Input((height, width, channels), name="image")
    skips = []
    for level in range(5):
        x = conv(base << level)(conv(base << level)(x))
        x = layers.Dropout(0.5)(x) if level > 2 else x
        if level < 4:
            skips.append(x)
            x = layers.MaxPooling2D()(x)
    for level in reversed(range(4)):
        x = conv(base << level, kernel_size=2)(layers.UpSampling2D()(x))
        x = layers.Concatenate()([skips[level], x])
        x = conv(base << level)(conv(base << level)(x))
    return Model(image, layers.Conv2D(1, 1, activation="sigmoid")(conv(2)(x)))


def crops(dataset: Dataset, config: Config, steps: int) -> Iterator[tuple[Floats, Floats]]:
    """Batches of seeded crops, mirrored and turned at random: images (N, H, W, C) and masks (N, H, W, 1) of class 1."""
    samples = [(preprocess(s.image, config.preprocessing).transpose(1, 2, 0), s.label) for s in dataset]
    rng = np.random.default_rng(0)
    for _ in range(steps):
        images, masks = [], []
        for index in rng.choice(len(samples), BATCH):
            image, label = samples[index]
            top, left = (int(rng.integers(0, size - CROP + 1)) for size in image.shape[:2])
            turn = functools.partial(np.rot90, k=int(rng.integers(4)))
            flip = -1 if rng.random() < 0.5 else 1
            part = np.s_[top : top + CROP, left : left + CROP]
            images.append(turn(image[part])[:, ::flip])
            masks.append(turn(label[part] == 1)[:, ::flip, np.newaxis])
        yield np.stack(images).astype(np.float32), np.stack(masks).astype(np.float32)


def train(config: Config, target: Path, base: int, steps: int) -> None:
    """Train on crops, then write the model at the config's size, and its ONNX file."""
    import keras

    keras.utils.set_random_seed(0)
    spec = config.preprocessing
    free = build(None, None, spec.channel_count, base)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    free.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    for step, (images, masks) in enumerate(crops(open_dataset(config.data, spec, "train"), config, steps), 1):
        loss, accuracy = free.train_on_batch(images, masks)
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
    fixed = build(spec.height, spec.width, spec.channel_count, base)
    fixed.set_weights(free.get_weights())
    fixed.save(target)
    shape = (1, spec.height, spec.width, spec.channel_count)
    fixed(np.zeros(shape, np.float32))  # an export asks for a call before
    fixed.export(
        target.with_suffix(".onnx"),
        format="onnx",
        verbose=False,
        input_signature=[keras.InputSpec(shape=shape, dtype="float32", name="image")],
    )


def compare(config: Config, model: Path, clean: Path) -> None:
    """Print each convolution's error."""
    import keras

    network = keras.saving.load_model(model)
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    opened = keras.Model(network.input, [layer.output for layer in convolutions])
    sample = open_dataset(config.data, config.preprocessing, "validation")[0]
    image = np.ascontiguousarray(preprocess(sample.image, config.preprocessing).transpose(1, 2, 0)[np.newaxis])
    made = [keras.ops.convert_to_numpy(value) for value in opened(image, training=False)]
    wanted = {layer.name: value for layer, value in zip(convolutions, made, strict=True)}
    for name, error in layer_errors(load_model(clean), wanted, image):
        print(f"{name:12} {'×'.join(map(str, wanted[name].shape[1:])):12} {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "compare"])
    parser.add_argument("config", type=Path)
    parser.add_argument("model", type=Path, help="a .keras file")
    parser.add_argument("clean", type=Path, nargs="?", help="of compare: the clean graph")
    parser.add_argument("--base", type=int, default=8, help="channels of the first level; 64 in the original")
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    os.environ.setdefault("KERAS_ONNX", str(given.model.with_suffix(".onnx")))
    config = load_config(given.config)
    if given.command == "train":
        train(config, given.model, given.base, given.steps)
    elif given.clean is None:
        parser.error("compare needs the clean graph")
    else:
        compare(config, given.model, given.clean)


if __name__ == "__main__":
    main()
