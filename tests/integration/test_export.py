from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.artifacts import ModelCard
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import ClassConfig, ExportConfig, NetworkConfig, PreprocessingConfig
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.io import load_model, model_inputs, read_card, save_model
from pipeline.networks import build_network
from pipeline.stages.export import export

pytest.importorskip("torch", reason="torch is not installed: nothing to export")

CLASSES = tuple(ClassConfig(name=f"class {i}", colour=(i, i, i)) for i in range(3))
NETWORK = NetworkConfig(factory="models.unet:UNet", arguments={"in_channels": 1, "classes": 3, "base_channels": 4})


def card(height: int = 48, width: int = 64) -> ModelCard:
    return ModelCard("tiny", PreprocessingConfig(height=height, width=width, channels="grey"), CLASSES, 255)


def images(spec: PreprocessingConfig) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.random((1, spec.height, spec.width), np.float32) for _ in range(2)]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("dynamic", [(), ("batch",), ("batch", "height", "width")])
def test_export_computes_what_torch_does_and_carries_its_card(
    tmp_path: Path, exporter: Any, dynamic: tuple[Any, ...]
) -> None:
    about = card()
    report = export(
        NETWORK, ExportConfig(exporter=exporter, dynamic=dynamic), about, images(about.preprocessing), tmp_path
    )
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    model = load_model(tmp_path / "model.onnx")
    assert read_card(model) == about
    (spec,) = model_inputs(model)
    assert spec.name == "image"
    assert spec.shape == tuple(
        name if name in dynamic else size
        for name, size in (("batch", 1), ("channels", 1), ("height", 48), ("width", 64))
    )
    if dynamic:
        with OnnxRuntimeRunner(tmp_path / "model.onnx") as runner:
            shape = (3, 1, 37, 51) if len(dynamic) == 3 else (3, 1, 48, 64)
            assert runner({"image": np.zeros(shape, np.float32)})["logits"].shape == (3, 3, *shape[2:])


def test_static_batch_is_kept(tmp_path: Path) -> None:
    about = card()
    report = export(NETWORK, ExportConfig(batch=3), about, images(about.preprocessing), tmp_path)
    assert report.inputs[0].shape == (3, 1, 48, 64)


@pytest.mark.parametrize("opset", [17, 20])
def test_opset_is_the_one_asked_for(tmp_path: Path, opset: int) -> None:
    about = card()
    report = export(
        NETWORK, ExportConfig(exporter="torchscript", opset=opset), about, images(about.preprocessing), tmp_path
    )
    assert report.opset == opset


def test_size_that_the_network_cannot_take(tmp_path: Path) -> None:
    about = card(8, 8)
    with pytest.raises(ModelError, match=r"(?s)cannot take its input.*\(1, 8, 8\)"):
        export(NETWORK, ExportConfig(), about, images(about.preprocessing), tmp_path)
    assert not list(tmp_path.iterdir())


def test_classes_must_fit_the_network(tmp_path: Path) -> None:
    about = ModelCard("tiny", card().preprocessing, CLASSES[:2])
    with pytest.raises(
        ModelError, match=r"(?s)configured classes.*data\.classes names 2.*got: logits \(1, 3, 48, 64\)"
    ):
        export(NETWORK, ExportConfig(), about, images(about.preprocessing), tmp_path)


def test_difference_to_torch_fails(tmp_path: Path) -> None:
    about = card()
    with pytest.raises(CheckFailed, match="computes something else"):
        export(NETWORK, ExportConfig(tolerance=1e-12), about, images(about.preprocessing), tmp_path)


def test_a_network_that_is_not_finite_itself_is_no_exporters_fault(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    about = card()
    state = build_network(NETWORK).state_dict()
    state["outc.conv.bias"][2] = float("nan")
    weights = tmp_path / "nan.safetensors"
    save_file(state, weights)
    network = NETWORK.model_copy(update={"weights": weights})
    with pytest.raises(ModelError, match=r"(?s)own output logits holds NaN.*got: 3072 of 9216 .*image 1 of 2"):
        export(network, ExportConfig(), about, images(about.preprocessing), tmp_path)


def test_onnx_from_elsewhere_gets_the_card(tmp_path: Path) -> None:
    about = card()
    (tmp_path / "a").mkdir()
    export(NETWORK, ExportConfig(), about, images(about.preprocessing), tmp_path / "a")
    foreign = load_model(tmp_path / "a" / "model.onnx")
    del foreign.metadata_props[:]
    save_model(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "b").mkdir()
    network = NetworkConfig.model_validate({"onnx": str(tmp_path / "foreign.onnx")})
    report = export(network, ExportConfig(), about, images(about.preprocessing), tmp_path / "b")
    assert report.max_abs_error is None
    taken = load_model(tmp_path / "b" / "model.onnx")
    assert read_card(taken) == about
    assert [n.op_type for n in taken.graph.node] == [n.op_type for n in foreign.graph.node]


def test_onnx_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 1, 40, 40])], [value("y", 1, [1, 1, 40, 40])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    network = NetworkConfig.model_validate({"onnx": str(tmp_path / "m.onnx")})
    with pytest.raises(ModelError, match=r"another size than preprocessing gives"):
        export(network, ExportConfig(), card(), [], tmp_path)
    with pytest.raises(ModelError, match="logits of the configured classes"):
        export(network, ExportConfig(), card(40, 40), [], tmp_path)
