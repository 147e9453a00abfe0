"""``engine.source: network-api`` with a real TensorRT-RTX, which builds without a GPU, and by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.backends import nvinfer
from pipeline.backends.tensorrt_rtx import RtxBuilder, api
from pipeline.backends.unet_definition import UNetDefinition, computing_nodes
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, NetworkConfig, ProfileRange
from pipeline.errors import ConfigError, ModelError
from pipeline.graph.placement import activation_tensors
from pipeline.graph.shapes import infer
from pipeline.stages.engine import build_engine
from pipeline.wts import write_wts
from tests.onnx_unet import clean_unet, drawn_unet

KNOWN = RtxBuilder().capabilities()
pytestmark = pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")

ODD = (1, 3, 37, 50)
OPTIONS: list[dict[str, Any]] = [
    {"upsampling": "bilinear", "align_corners": False},
    {"upsampling": "nearest", "activation": "silu", "bias": True},
    {"upsampling": "transposed", "activation": "leaky_relu"},
]


def files(folder: Path, shape: tuple[int | str, ...] = ODD, **options: Any) -> tuple[Path, NetworkConfig]:
    """The clean graph, and the network whose weights lie in a .wts file."""
    unet = drawn_unet(**options)
    write_wts(folder / "w.wts", unet.state)
    onnx.save(clean_unet(unet, shape), folder / "clean.onnx")
    return folder / "clean.onnx", NetworkConfig(factory="models.unet:UNet", arguments=options, weights=folder / "w.wts")


def table_of(clean: Path) -> CalibrationTable:
    return CalibrationTable("minmax", dict.fromkeys(activation_tensors(onnx.load(clean)), 4.0))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["upsampling"])
def test_every_precision_builds_with_the_manifest_of_the_other_source(
    tmp_path, options, precision, caplog, monkeypatch
):
    defined = []

    def define(*arguments, **how):
        defined.append(UNetDefinition(*arguments, **how))
        return defined[-1]

    monkeypatch.setattr("pipeline.stages.engine.UNetDefinition", define)
    clean, network = files(tmp_path, **options)
    made = {}
    for source in ("onnx", "network-api"):
        config = EngineConfig(backend="tensorrt-rtx", source=source)
        folder = tmp_path / source
        manifest = build_engine(clean, precision, config, table_of(clean), "c" * 64, None, folder, None, network)
        assert manifest.options["source"] == source
        made[source] = manifest
    for field in ("onnx_sha256", "cache_sha256", "precision", "route", "backend", "inputs", "outputs", "profiles"):
        assert getattr(made["onnx"], field) == getattr(made["network-api"], field), field
    assert made["onnx"].engine_sha256 != made["network-api"].engine_sha256
    assert any("layer by layer" in note for note in made["network-api"].notes)
    assert [definition.fold for definition in defined] == [precision == "int8"]
    assert "rename" not in caplog.text  # TensorRT refuses two layers of one name with a message


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["upsampling"])
def test_tensors_have_the_clean_graphs_names_and_shapes(tmp_path, options):
    clean = onnx.load(files(tmp_path, **options)[0])
    trt = api()
    builder = nvinfer.create_builder(trt)
    network = nvinfer.create_network(trt, builder, strongly_typed=True)
    kept = UNetDefinition(drawn_unet(**options), clean, half=False)(trt, network)
    tensors = [network.get_layer(index).get_output(0) for index in range(network.num_layers)]
    have = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    known = infer(clean)
    want = {
        node.output[0]: tuple(d.dim_value for d in known[node.output[0]].type.tensor_type.shape.dim)
        for node in computing_nodes(clean)
    }
    assert {name: have.get(name) for name in want} == want
    assert kept


def test_free_axes_build_with_their_profiles(tmp_path):
    clean, network = files(tmp_path, ("n", 3, "height", "width"))
    side = ProfileRange(min=33, opt=37, max=64)
    profile = {"batch": ProfileRange(min=1, opt=2, max=4), "height": side, "width": side}
    config = EngineConfig(backend="tensorrt-rtx", source="network-api", profile=profile)
    manifest = build_engine(clean, "fp16", config, None, None, None, tmp_path / "out", None, network)
    assert manifest.inputs[0].shape == ("n", 3, "height", "width")
    assert manifest.outputs[0].shape == ("n", 4, "height", "width")


def test_without_the_networks_weights_there_is_nothing_to_define(tmp_path):
    clean, _ = files(tmp_path)
    config = EngineConfig(backend="tensorrt-rtx", source="network-api")
    with pytest.raises(ConfigError, match="needs the network's weights"):
        build_engine(clean, "fp32", config, None, None, None, tmp_path / "out", None)


def test_arguments_that_contradict_the_graph_are_refused(tmp_path):
    clean, network = files(tmp_path)
    other = network.model_copy(update={"arguments": {"activation": "silu"}})
    config = EngineConfig(backend="tensorrt-rtx", source="network-api")
    with pytest.raises(ModelError, match="not that of"):
        build_engine(clean, "fp32", config, None, None, None, tmp_path / "out", None, other)


def test_the_command_builds_from_a_real_export(project, unet_trt):
    pytest.importorskip("torch", reason="torch is not installed")
    folder = project.root / "build"
    result = unet_trt(
        "run", "-c", project.config, "--backend", "tensorrt-rtx", "--set", "engine.source=network-api",
        "-p", "fp16", "-p", "int8", "--build-dir", folder, cwd=project.root,
    )  # fmt: skip
    assert result.code in (0, 1), result.err  # drawn weights may miss their accuracy budget
    for precision in ("fp16", "int8"):
        engine = folder / "tiny" / "engine" / precision
        assert json.loads((engine / "manifest.json").read_text())["options"]["source"] == "network-api"
        assert (engine / "model.engine").stat().st_size > 0
        if not KNOWN.runs:
            report = json.loads((folder / "tiny" / "validate" / precision / "report.json").read_text())
            assert report["candidate"]["ran"].endswith("on the ONNX twin")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["network={onnx: model.onnx}"], "needs network.factory: models.unet:UNet and network.weights"),
        (["clean.output=labels"], "no clean.input or clean.output but float and logits"),
        (["engine.backend=onnxruntime"], "needs a TensorRT"),
        (["clean.equalize=4"], "takes the weights as they are, so no clean.equalize"),
        (["calibrate.refine_steps=1"], "biases, so no calibrate.refine_steps"),
    ],
)
def test_what_it_cannot_define_is_said_at_once(project, unet_trt, changes, said):
    sets = [argument for change in ("engine.source=network-api", *changes) for argument in ("--set", change)]
    result = unet_trt("engine", "-c", project.config, "-p", "fp32", *sets)
    assert result.code == 2
    assert said in result.err
