"""The engine inspector's JSON: real answers of TensorRT 8.6.0 (tests/data/layers), and the words of newer libraries."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.backends.layers import parse_layers, printable
from pipeline.errors import EngineError

DATA = Path(__file__).parent.parent.parent / "data" / "layers"


def real(name):
    return parse_layers((DATA / f"{name}.json").read_text())


def parse(*layers, **operators):
    return parse_layers(json.dumps({"Layers": layers}), operators)


def by_name(layers):
    return {layer.name: layer for layer in layers}


def test_groups_of_an_explicit_int8_engine():
    layers = real("int8-explicit")
    assert Counter(layer.group for layer in layers) == {"conv": 15, "concat": 6, "reformat": 4, "pool": 3, "resize": 3}
    assert {layer.precision for layer in layers if layer.group == "conv"} == {"int8"}


def test_requantized_inputs_of_concatenations():
    layers = real("int8-explicit")
    requantized = [layer.name for layer in layers if layer.requantizes]
    assert requantized == [
        "down3.maxpool_conv.1.double_conv.3.concat.quantize_clone_0",
        "down1.maxpool_conv.1.double_conv.3.concat.quantize_clone_0",
        "inc.double_conv.3.concat.quantize_clone_0",
    ]
    assert {layer.group for layer in layers if layer.requantizes} == {"concat"}
    assert not any(layer.requantizes for layer in (*real("fp16"), *real("int8-implicit")))


def test_a_fused_convolution():
    layer = by_name(real("int8-explicit"))[
        "inc.double_conv.3.weight + inc.double_conv.3.weight.quantize + inc.double_conv.3 + inc.double_conv.3.relu"
    ]
    assert layer.type == "CaskConvolution"
    assert layer.nodes == ("inc.double_conv.3", "inc.double_conv.3.relu")
    assert layer.tactic.startswith("sm80_xmma_fprop_implicit_gemm_interleaved_i8f16")
    assert [tensor.shown for tensor in (*layer.inputs, *layer.outputs)] == ["int8 NC/32HW32", "fp16 NC/32HW32"]
    pixels = 512 * 512
    assert layer.inputs[0].bytes == 64 * pixels
    assert layer.bytes == 64 * pixels + 2 * 64 * pixels + 36864 + 4 * 64


def test_formats_and_copies_of_an_fp16_engine():
    layers = real("fp16")
    shown = {tensor.shown for layer in layers for tensor in (*layer.inputs, *layer.outputs)}
    assert shown == {"fp32 NCHW", "fp16 NHWC2", "fp16 NHWC8"}
    copies = [layer for layer in layers if layer.group in ("reformat", "concat")]
    assert [layer.type for layer in copies].count("NoOp") == 1
    assert all(not layer.nodes for layer in copies if "CopyNode" in layer.name)
    assert [layer.bytes for layer in copies if layer.type == "NoOp"] == [0]


def test_convolutions_that_fell_back():
    layers = [layer for layer in real("fallback") if layer.group == "conv"]
    assert Counter(layer.precision for layer in layers) == {"fp32": 3, "fp16": 1}


def test_constants_and_myelin_copies_of_an_uncleaned_graph():
    assert {layer.group for layer in real("raw-fp16")} == {"reformat"}


def test_words_of_newer_libraries():
    conv = {
        "Name": "/a/Conv",
        "LayerType": "CaskGemmConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Half(64,1:8,...)"}],
        "Outputs": [{"Name": "y", "Dimensions": [-1, 8, 4, 4], "Format/Datatype": "N/A due to dynamic shapes"}],
        "TacticName": "sm80_xmma_tf32",
    }
    fused = {
        "Name": "__myl_ResPad",
        "LayerType": "kgen",
        "Inputs": [{"Name": "x", "Dimensions": [1, 2, 2, 2], "Format": "Row major linear", "Datatype": "Float"}],
        "Outputs": [],
        "Metadata": "[ONNX Layer: pad]\x1f[ONNX Layer: /up/Resize]",
    }
    first, second = parse(conv, fused, **{"/up/Resize": "Resize", "pad": "Pad"})
    assert (first.group, first.precision, first.bytes, first.nodes) == ("conv", "fp16", None, ("/a/Conv",))
    assert (second.group, second.precision, second.nodes) == ("resize", "fp32", ("pad", "/up/Resize"))
    assert second.bytes == 32


def test_tf32_is_seen_in_the_tactic():
    weights = {"Type": "Float", "Count": 9}
    (layer,) = parse({"Name": "c", "LayerType": "Convolution", "Weights": weights, "TacticName": "sm80_tf32f32_x"})
    assert layer.precision == "tf32"


def test_names_alone():
    layers = parse("conv1 + relu1", "Reformatting CopyNode for Input Tensor 0 to conv1", "x copy", conv1="Conv")
    assert [layer.group for layer in layers] == ["conv", "reformat", "reformat"]
    assert {layer.bytes for layer in layers} == {None}
    assert layers[0].nodes == ("conv1", "relu1")


def test_control_characters_vanish_from_names():
    (layer,) = parse({"Name": "a\x1eb", "LayerType": "Resize"})
    assert layer.name == printable("a\x1eb") == "ab"


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 3}', '{"Bindings": []}'])
def test_no_layers(text):
    with pytest.raises(EngineError, match="holds no layers"):
        parse_layers(text)


def test_sizes_that_the_inspector_does_not_know():
    """As TensorRT 8.6.0 tells of free axes: by the ONNX tensor, or the batch where that alone is unknown."""

    def tensor(name, *shape):
        return {"Name": name, "Dimensions": list(shape), "Format/Datatype": "Row major linear FP32"}

    layer = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("image", -1, 3, -1, -1), tensor("copied", -1, 3, 8, 8), tensor("other", -1, 3, -1, 8)],
        "Outputs": [tensor("known", 1, 2, 4, 4)],
    }
    text = json.dumps({"Layers": [layer]})
    shapes = {"image": (5, 3, 16, 24), "other": (5, 3, "height", 8), "known": (9, 9, 9, 9)}
    (sized,) = parse_layers(text, None, shapes, 5)
    assert [one.shape for one in (*sized.inputs, *sized.outputs)] == [
        (5, 3, 16, 24),
        (5, 3, 8, 8),
        (-1, 3, -1, 8),
        (1, 2, 4, 4),
    ]
    (unsized,) = parse_layers(text)
    assert [one.shape[0] for one in unsized.inputs] == [-1, -1, -1]
    assert unsized.bytes is None
