"""The UNet defined layer by layer computes what torch and the clean ONNX graph compute, tensor by tensor."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, ValueInfoProto, numpy_helper

from pipeline.backends.network_layers import Layers
from pipeline.backends.unet_definition import Quantization, UNetDefinition, computing_nodes
from pipeline.calibration.table import CalibrationTable
from pipeline.errors import EngineError, ModelError
from pipeline.graph.cleaning import clean_model
from pipeline.graph.placement import activation_tensors, shared_ranges, sites
from pipeline.graph.quantize import quantize
from pipeline.unet import UNetWeights
from tests.onnx_unet import clean_unet, drawn_unet

torch = pytest.importorskip("torch", reason="torch is not installed")

from models.unet import UNet  # noqa: E402 - needs torch
from tests.unit.backends.fake_network import FakeNetwork, FakeNetwork86, fake_trt  # noqa: E402 - needs torch

EVEN, ODD = (1, 3, 32, 48), (2, 3, 37, 50)
OPTIONS: list[dict[str, Any]] = [
    {"upsampling": "bilinear"},
    {"upsampling": "bilinear", "align_corners": False, "bias": True},
    {"upsampling": "bilinear", "activation": "leaky_relu"},
    {"upsampling": "nearest", "activation": "leaky_relu", "bias": True},
    {"upsampling": "nearest", "activation": "silu"},
    {"upsampling": "transposed"},
    {"upsampling": "transposed", "activation": "silu", "bias": True},
    {"in_channels": 1, "classes": 2, "base_channels": 6},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these cost more to share out than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image_of(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def every_tensor(model: ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    opened = ModelProto()
    opened.CopyFrom(model)
    names = [node.output[0] for node in model.graph.node]
    opened.graph.output.extend(ValueInfoProto(name=name) for name in names if name != "logits")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # every pair rounds as it is written
    session = ort.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def define(unet: UNetWeights, clean: ModelProto, network: Any = None, **how: Any) -> FakeNetwork:
    network = network or FakeNetwork()
    network.kept = UNetDefinition(unet, clean, **how)(fake_trt(), network)
    return network


def torch_unet(unet: UNetWeights) -> UNet:
    network = UNet(**vars(unet.options)).eval()
    network.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in unet.state.items()})
    return network


def torch_logits(unet: UNetWeights, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return torch_unet(unet)(torch.from_numpy(image)).numpy()


def exported(unet: UNetWeights, image: np.ndarray, free: dict[int, str]) -> ModelProto:
    """A real export, raw; ``free`` names the axes that are."""
    how = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": {"image": free, "logits": free}}
    file = io.BytesIO()
    torch.onnx.export(torch_unet(unet), (torch.from_numpy(image),), file, dynamo=False, opset_version=17, **how)
    return onnx.load_from_string(file.getvalue())


def error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(have - want).max() / np.abs(want).max())


def table_of(clean: ModelProto, image: np.ndarray) -> CalibrationTable:
    amax = {"image": float(np.abs(image).max())}
    amax |= {name: float(np.abs(value).max()) for name, value in every_tensor(clean, image).items()}
    return CalibrationTable("minmax", amax)


@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_tensor_is_that_of_the_clean_graph_and_the_logits_are_torchs(options: Any, shape: Any) -> None:
    unet = drawn_unet(**options)
    shape = (shape[0], unet.options.in_channels, *shape[2:])
    clean, image = clean_unet(unet, shape), image_of(shape)
    network = define(unet, clean)
    have, want = network.values(image), every_tensor(clean, image)
    assert {name: value for name, value in want.items() if error(have[name], value) > 1e-5} == {}
    assert error(have["logits"], torch_logits(unet, image)) < 1e-5
    assert [tensor.name for tensor in network.outputs] == ["logits"]
    assert any(layer.mode == "FILL" for layer in network.layers) is (shape[2] % 16 != 0)


def test_free_axes_take_any_size() -> None:
    unet = drawn_unet()
    network = define(unet, clean_unet(unet, ("n", 3, "h", "w")))
    for shape in ((1, 3, 37, 50), (3, 3, 36, 52), (2, 3, 64, 35), (1, 3, 31, 47)):
        image = image_of(shape)
        have, want = network.values(image), every_tensor(clean_unet(unet, ("n", 3, "h", "w")), image)
        named = [name for name in want if name in have]
        assert sum(name.endswith(".pad") for name in named) == 4
        assert max(error(have[name], want[name]) for name in named) < 1e-5
        assert error(have["logits"], torch_logits(unet, image)) < 1e-5


@pytest.mark.parametrize("options", OPTIONS[3:7], ids=lambda options: "-".join(map(str, options.values())))
def test_half_is_typed_throughout(options: Any) -> None:
    unet = drawn_unet(**options)
    clean, image = clean_unet(unet, ODD), image_of(ODD)
    network = define(unet, clean, half=True)
    assert {array.dtype for array in network.kept} == {np.dtype(np.float16)}
    assert network.outputs[0].dtype == "float32"
    assert error(network.values(image)["logits"], torch_logits(unet, image)) < 0.02


@pytest.mark.parametrize("free", [{}, {0: "n", 2: "h", 3: "w"}], ids=["fixed", "free"])
@pytest.mark.parametrize("options", OPTIONS[3:7], ids=lambda options: "-".join(map(str, options.values())))
def test_a_complete_table_has_a_range_for_every_tensor_of_a_folded_network(options: Any, free: Any) -> None:
    unet, image = drawn_unet(**options), image_of(ODD)
    clean, _ = clean_model(exported(unet, image, free))
    network = define(unet, clean, fold=True)
    tensors = [layer.get_output(0) for layer in network.layers]
    with network.showing(torch.from_numpy(image)):
        floats = {tensor.name for tensor in tensors if tensor.value().is_floating_point()}
    assert floats | {"image"} == set(activation_tensors(clean))
    have, want = network.values(image), every_tensor(clean, image)
    assert max(error(have[name], want[name]) for name in floats) < 1e-5


@pytest.mark.parametrize("qdq", ["convolutions", "shared"])
@pytest.mark.parametrize("kind", [FakeNetwork, FakeNetwork86])
@pytest.mark.parametrize("options", OPTIONS[3:6], ids=lambda options: "-".join(map(str, options.values())))
def test_int8_is_that_of_the_typed_onnx_graph(options: Any, kind: type[FakeNetwork], qdq: Any) -> None:
    unet = drawn_unet(**options)
    clean, image = clean_unet(unet, ODD), image_of(ODD)
    table, exclude = table_of(clean, image), ("logits", "up4.conv.double_conv.0")
    ranges = shared_ranges(clean, table, exclude) if qdq == "shared" else table
    chosen = Quantization(ranges, sites(clean, exclude, qdq))
    have = define(unet, clean, kind(), fold=True, quantization=chosen).values(image)
    typed = quantize(clean, table, half=False, exclude=exclude, qdq=qdq)
    want = every_tensor(typed, image)
    pairs = {name for name in have if name.endswith(".dequantized")}
    assert pairs == {name for name in want if name.endswith(".dequantized")}
    # Two libraries sum in another order; a value between two steps of INT8 then falls to either side.
    assert float(np.abs(have["logits"] - want["logits"]).mean() / np.abs(want["logits"]).mean()) < 1e-3


def test_half_int8_is_typed_throughout() -> None:
    unet = drawn_unet()
    clean, image = clean_unet(unet, EVEN), image_of(EVEN)
    chosen = Quantization(table_of(clean, image), sites(clean, (), "convolutions"))
    network = define(unet, clean, half=True, fold=True, quantization=chosen)
    have = network.values(image)
    assert error(have["logits"], torch_logits(unet, image)) < 0.25
    typed = quantize(clean, chosen.table, half=True)
    scales = {t.name: numpy_helper.to_array(t) for t in typed.graph.initializer if t.name.endswith(".scale")}
    assert len(scales) == 2 * 19
    assert all(np.array_equal(have[name], scale) for name, scale in scales.items())


def test_names_and_weights_stay_until_the_build() -> None:
    unet = drawn_unet()
    clean = clean_unet(unet, EVEN)
    for node in clean.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    network = define(unet, clean)
    names = {layer.get_output(0).name: layer.name for layer in network.layers}
    assert names["inc.double_conv.0.convolution"] == "/inc.double_conv.0/Conv"
    assert names["inc.double_conv.0"] == "/inc.double_conv.0/Conv.scale"
    assert names["inc.double_conv.0.relu"] == "/inc.double_conv.0.relu/Relu"
    assert set(names.values()) >= {node.name for node in computing_nodes(clean)}
    # Of 18 convolutions with Scale, each of three arrays, and the last with its bias.
    assert len(network.kept) == 18 * 4 + 2


def test_a_graph_of_other_arguments_is_refused() -> None:
    unet = drawn_unet()
    with pytest.raises(ModelError, match="not that of") as caught:
        define(unet, clean_unet(drawn_unet(activation="silu"), EVEN))
    assert "Sigmoid" in str(caught.value)
    with pytest.raises(ModelError, match="not that of"):
        define(unet, clean_unet(drawn_unet(upsampling="transposed"), EVEN))


def test_a_graph_that_goes_on_is_refused() -> None:
    unet = drawn_unet()
    clean = clean_unet(unet, EVEN)
    clean.graph.node.append(computing_nodes(clean)[1])
    with pytest.raises(ModelError, match="not that of"):
        define(unet, clean)


def test_weights_beyond_half_are_refused() -> None:
    unet = drawn_unet()
    unet.state["outc.conv.weight"][0] = 1e6
    with pytest.raises(ModelError, match="beyond FP16"):
        define(unet, clean_unet(unet, EVEN), half=True)


def test_a_refused_layer_is_named() -> None:
    network = FakeNetwork()
    layers = Layers(fake_trt(), network, half=False)
    x = layers.input("image", EVEN)
    network.add_activation = lambda *_: None  # type: ignore[assignment]
    with pytest.raises(EngineError, match="refuses the layer inc"):
        layers.activation("inc.relu", x, "RELU")
