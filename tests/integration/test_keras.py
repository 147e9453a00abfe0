"""The classical Keras U-Net, which converters refused for its upsampling: from every exporter's graph to engines.

Graphs are those of ``tests.keras_unet``; where Keras is installed, with torch as its backend, also its own export.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.keras_unet import build as build_keras
from benchmarks.keras_unet import layer_errors
from pipeline.artifacts import ModelCard
from pipeline.backends.base import BuildRequest
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.parsing import parse_verdict
from pipeline.backends.tensorrt_rtx import RtxBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig, ProfileRange
from pipeline.graph.adoption import adopt
from pipeline.graph.cleaning import clean_model
from pipeline.graph.io import model_inputs, opset, save_model
from pipeline.stages.engine import make_profiles
from tests.conftest import SIZE, Result, write_images
from tests.keras_unet import (
    FORMS,
    OPSETS,
    Array,
    KerasUNet,
    Layer,
    Writer,
    drawn,
    export,
    max_pool,
    same_convolution,
    same_widths,
)

Command = Callable[..., Result]
KNOWN = RtxBuilder().capabilities()
BODY = Counter(Conv=24, Relu=23, MaxPool=4, Resize=4, Concat=4)
TOLERANCE = 1e-5


def card_of(network: KerasUNet) -> ModelCard:
    classes = max(2, network.layers[-1].kernel.shape[-1])
    spec = PreprocessingConfig(
        height=network.size, width=network.size, channels="grey" if network.channels == 1 else "rgb"
    )
    return ModelCard("keras", spec, tuple(ClassConfig(name=str(i), colour=(i, i, i)) for i in range(classes)))


def picture(network: KerasUNet, batch: int = 1) -> Array:
    return np.random.default_rng(3).random((batch, network.size, network.size, network.channels), np.float32)


def compare_layers(cleaned: ModelProto, wanted: dict[str, Array], image: Array) -> None:
    """Every block of the clean graph against Keras's, printed."""
    errors = dict(layer_errors(cleaned, wanted, image))
    for layer, error in errors.items():
        print(f"{layer:8} {'×'.join(map(str, wanted[layer].shape[1:])):12} {error:.1e}")
    assert list(errors) == list(wanted)
    assert max(errors.values()) < TOLERANCE


def clean_as_pipeline(raw: ModelProto, network: KerasUNet) -> ModelProto:
    adopted = adopt(raw, card_of(network))
    onnx.checker.check_model(adopted, full_check=True)
    return clean_model(adopted)[0]


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (3, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_every_block_is_keras(form: str, channels: int, classes: int, batch: int | str, tmp_path: Path) -> None:
    network = drawn(channels=channels, classes=classes)
    cleaned = clean_as_pipeline(export(network, form, batch), network)
    image = picture(network, 1 if batch == 1 else 2)
    compare_layers(cleaned, network.outputs(image), image)
    last = "Pad" if classes == 1 else "Softmax"
    assert Counter(node.op_type for node in cleaned.graph.node) == BODY + Counter({last: 1})
    assert cleaned.graph.output[0].name == ("logits" if classes == 1 else "probabilities")
    assert opset(cleaned) == max(13, OPSETS[form])
    assert clean_model(cleaned)[0].SerializeToString(deterministic=True) == cleaned.SerializeToString(
        deterministic=True
    )
    build(cleaned, tmp_path, batch)


def build(cleaned: ModelProto, folder: Path, batch: int | str = 1) -> None:
    if not KNOWN.builds:
        return
    save_model(cleaned, folder / "model.onnx")
    config = EngineConfig(
        backend="tensorrt-rtx", profile={} if batch == 1 else {"batch": ProfileRange(min=1, opt=1, max=4)}
    )
    profiles = make_profiles(model_inputs(cleaned), config.profile)
    assert RtxBuilder().build(BuildRequest(folder / "model.onnx", "fp32", "explicit", config, profiles=profiles)).plan


@pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")
def test_the_upsampling_that_parsers_refuse(tmp_path: Path) -> None:
    """TensorFlow counts half pixels and takes the floor, of which TensorRT's parsers know only another rounding."""
    network = drawn()
    raw = export(network, "tf2onnx17")
    save_model(raw, tmp_path / "raw.onnx")
    save_model(clean_as_pipeline(raw, network), tmp_path / "clean.onnx")
    before, after = (parse_verdict(tmp_path / name) for name in ("raw.onnx", "clean.onnx"))
    assert before.accepted is False
    assert {node.op for node in before.refused} == {"Resize"}
    assert after.accepted


def test_the_two_logits_are_the_sigmoid() -> None:
    network = drawn()
    image = picture(network)
    wanted = network.outputs(image)["mask"][..., 0]
    with OnnxRuntimeRunner(clean_as_pipeline(export(network, "keras3"), network).SerializeToString()) as runner:
        logits = runner({"image": np.ascontiguousarray(image.transpose(0, 3, 1, 2))})["logits"]
    assert (logits[:, 0] == 0).all()
    powers = np.exp(logits)
    assert np.abs(powers[:, 1] / powers.sum(1) - wanted).max() < 1e-6
    sure = np.abs(wanted - 0.5) > 1e-6
    assert sure.mean() > 0.99
    assert ((logits.argmax(1) == 1) == (wanted > 0.5))[sure].all()


# padding="same" of any kernel and stride, to the pixel: whole numbers, so that float32 is exact.


def same_in_keras3(writer: Writer, x: str, size: tuple[int, int], side: int, stride: int, *, pool: bool) -> Any:
    """An even widening becomes the operator's own pads, any other a Pad (for pools: of the edge) before it."""
    rows, columns = (same_widths(length, side, stride) for length in size)
    if not pool and rows[0] == rows[1] and columns[0] == columns[1]:
        return x, {"pads": [rows[0], columns[0]] * 2}
    if rows == columns == (0, 0):
        return x, {"pads": [0] * 4}
    return writer.computed_pad(x, rows, columns, mode="edge" if pool else "constant"), {"pads": [0] * 4}


@pytest.mark.parametrize("size", [(12, 17), (13, 16)], ids=str)
@pytest.mark.parametrize("form", ["keras3", "auto_pad", "pads"])
@pytest.mark.parametrize("operator", ["Conv", "MaxPool"])
def test_same_padding_is_right_to_the_pixel(operator: str, form: str, size: tuple[int, int], tmp_path: Path) -> None:
    """All kernels from 1 to 5 with all strides from 1 to 3, in one graph."""
    rng = np.random.default_rng(0)
    image = rng.integers(-9, 10, (1, *size, 2)).astype(np.float32)
    writer = Writer(20)
    source = writer("Transpose", "image", perm=[0, 3, 1, 2])
    results: dict[str, Array] = {}
    for side, stride in itertools.product(range(1, 6), range(1, 4)):
        kernel = rng.integers(-3, 4, (side, side, 2, 3)).astype(np.float32)
        rows, columns = (same_widths(length, side, stride) for length in size)
        x = source
        padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"}
        if form == "pads":
            padding = {"pads": [rows[0], columns[0], rows[1], columns[1]]}
        elif form == "keras3":
            x, padding = same_in_keras3(writer, source, size, side, stride, pool=operator == "MaxPool")
        inputs = [x, writer.const(kernel.transpose(3, 2, 0, 1), np.float32)] if operator == "Conv" else [x]
        made = writer(operator, *inputs, kernel_shape=[side] * 2, strides=[stride] * 2, **padding)
        wanted = same_convolution(image, kernel, stride) if operator == "Conv" else max_pool(image, side, stride)
        results[writer("Transpose", made, perm=[0, 2, 3, 1])] = wanted
    graph = helper.make_graph(
        writer.nodes,
        "same",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, want.shape) for name, want in results.items()],
        writer.weights,
    )
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    onnx.checker.check_model(raw, full_check=True)
    cleaned, _ = clean_model(raw)
    with OnnxRuntimeRunner(cleaned.SerializeToString(), optimize=False) as runner:
        have = runner({"image": image})
    for name, want in results.items():
        assert np.array_equal(have[name], want), name
    left = Counter(node.op_type for node in cleaned.graph.node)
    assert left["Pad"] == 0
    assert not any(attribute.name == "auto_pad" for node in cleaned.graph.node for attribute in node.attribute)
    build(cleaned, tmp_path)


# The whole pipeline.


@pytest.fixture
def keras_project(tmp_path: Path) -> Path:
    """A config whose network is a Keras 3 export with a mask of one channel."""
    onnx.save(export(drawn(SIZE), "keras3"), tmp_path / "keras.onnx")
    write_images(tmp_path / "data" / "train", range(6))
    write_images(tmp_path / "data" / "val", range(100, 103))
    loose = {"atol": 10, "rtol": 1, "min_agreement": 0.5, "max_miou_drop": None}
    settings = {
        "name": "keras",
        "network": {"onnx": "keras.onnx"},
        "data": {
            "kind": "folder",
            "root": "data",
            "train": {"images": "train/images", "labels": "train/labels"},
            "validation": {"images": "val/images", "labels": "val/labels"},
            "label_values": {0: 0, 1: 1, 2: 1, 3: 1},
            "classes": [{"name": "outside", "colour": [0, 0, 0]}, {"name": "cell", "colour": [200, 90, 90]}],
        },
        "preprocessing": {"height": SIZE, "width": SIZE, "channels": "grey"},
        "calibrate": {"images": 6},
        # Drawn weights: many logits are near zero, so that masks say little; the logits are judged below.
        "validate": {"tolerances": {"int8": loose}},
        "benchmark": {"seconds": 0.05, "warmup_seconds": 0.01},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


def test_a_run_from_keras_to_int8(keras_project: Path, unet_trt: Command, tmp_path: Path) -> None:
    build_dir = tmp_path / "build"
    told = unet_trt("run", "-c", keras_project, "--build-dir", build_dir, "--quiet")
    assert told.code == 0, told
    made = build_dir / "keras"
    cleaned = onnx.load(made / "clean" / "model.onnx")
    assert Counter(node.op_type for node in cleaned.graph.node) == BODY + Counter(Pad=1)
    assert [spec.shape for spec in model_inputs(cleaned)] == [(1, 1, SIZE, SIZE)]
    drift = {}
    for precision in ("fp32", "fp16", "int8"):
        report = json.loads((made / "validate" / precision / "report.json").read_text())
        assert report["passed"]
        assert (made / "engine" / precision / "model.engine").is_file() is KNOWN.builds
        layers = unet_trt(
            "validate", "-c", keras_project, "--build-dir", build_dir, "-p", precision, "--layers", "--json", "--quiet"
        )
        assert layers.code == 0, layers
        (drift[precision],) = json.loads(layers.out).values()
    # Every tensor of the emulated engine against FP32: FP16 within its rounding, INT8 with a signal in every layer.
    quality = {
        precision: min(entry["sqnr_db"] for entry in report["tensors"] if entry["sqnr_db"] is not None)
        for precision, report in drift.items()
        if precision != "fp32"
    }
    print(quality)
    assert quality["fp16"] > 50
    assert quality["int8"] > 12
    typed = onnx.load(made / "engine" / "int8" / "model.onnx")
    quantized = [node for node in typed.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) >= BODY["Conv"]
    assert 0 not in [numpy_helper.to_array(t).min() for t in typed.graph.initializer if t.name.endswith("scale")]


def test_masks_that_no_sigmoid_gives_are_refused(keras_project: Path, unet_trt: Command) -> None:
    network = drawn(SIZE)
    layers = (*network.layers[:-1], Layer("mask", network.layers[-1].kernel, network.layers[-1].bias, "relu"))
    onnx.save(
        export(KerasUNet(SIZE, 1, layers), "keras2onnx9"),
        keras_project.parent / "keras.onnx",
    )
    told = unet_trt("export", "-c", keras_project)
    assert told.code == 2
    assert "one channel, which is neither a probability nor a logit" in told.err
    assert "got: Relu" in told.err


# Keras itself.


@pytest.fixture(scope="module")
def keras() -> Any:
    pytest.importorskip("torch")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    module = pytest.importorskip("keras", reason="Keras is not installed; its graphs are built by hand above")
    if module.config.backend() != "torch":
        pytest.skip("Keras runs on another backend already")
    return module


@pytest.mark.parametrize("batch", ["batch", 1])
def test_what_keras_itself_exports(keras: Any, batch: int | str, tmp_path: Path) -> None:
    """Of a free batch by torch's TorchScript exporter, of a fixed one by dynamo."""
    network = drawn(64)
    keras.config.set_image_data_format("channels_last")
    model = build_keras(64, 64, channels=1, base=4)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    for own, layer in zip(network.layers, convolutions, strict=True):
        layer.set_weights([own.kernel, own.bias])
    image = picture(network)
    opened = keras.Model(model.input, [layer.output for layer in convolutions])
    made = [keras.ops.convert_to_numpy(value) for value in opened(image, training=False)]
    wanted = {layer.name: value for layer, value in zip(network.layers, made, strict=True)}
    for name, ours in network.outputs(image).items():  # the numpy that stands for Keras above is Keras
        assert np.abs(wanted[name] - ours).max() < TOLERANCE * np.abs(ours).max(), name
    model(image)  # an export asks for a call before
    fixed = [keras.InputSpec(shape=image.shape, dtype="float32", name="image")]
    model.export(tmp_path / "raw.onnx", format="onnx", verbose=False, input_signature=fixed if batch == 1 else None)
    cleaned = clean_as_pipeline(onnx.load(tmp_path / "raw.onnx"), network)
    assert Counter(node.op_type for node in cleaned.graph.node) == BODY + Counter(Pad=1)
    compare_layers(cleaned, wanted, image)
    build(cleaned, tmp_path, batch)
