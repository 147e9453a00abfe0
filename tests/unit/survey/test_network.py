"""What is seen of weights and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from pipeline.errors import ModelError
from pipeline.survey.network import survey_network
from pipeline.unet import UNetOptions, state_forms
from pipeline.wts import write_wts
from tests.tiny_unet import tiny_unet
from tests.unit.graph.builders import model, weights


def arrays(options: UNetOptions) -> dict[str, Any]:
    return {name: np.zeros(form.shape, form.dtype) for name, form in state_forms(options).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 1, "classes": 4, "base_channels": 4, "upsampling": "bilinear"},
        {"in_channels": 3, "classes": 2, "base_channels": 2, "upsampling": "transposed"},
        {"in_channels": 3, "classes": 7, "base_channels": 2, "upsampling": "bilinear", "bias": True},
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "wts"])
def test_the_unet_of_this_project(tmp_path: Path, options: dict[str, Any], ending: str) -> None:
    file, state = tmp_path / f"net.{ending}", arrays(UNetOptions(**options))
    if ending == "wts":
        write_wts(file, state)
    else:
        save_file({f"module.{name}": array for name, array in state.items()}, file)
    facts = survey_network(file)
    assert (facts.factory, facts.arguments) == ("models.unet:UNet", options)
    assert (facts.channels, facts.classes, facts.multiple) == (options["in_channels"], options["classes"], 16)
    assert facts.parameters == sum(array.size for array in state.values())


def test_a_torch_checkpoint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: no .pth file can be read")
    state = {name: torch.from_numpy(array) for name, array in arrays(UNetOptions(base_channels=2, classes=3)).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.pth")
    facts = survey_network(tmp_path / "last.pth")
    assert (facts.factory, facts.classes, facts.arguments["base_channels"]) == ("models.unet:UNet", 3, 2)


def test_another_layout_is_guessed_from_its_convolutions(tmp_path: Path) -> None:
    state = {"stem.weight": weights(8, 3, 3, 3), "norm.weight": weights(8), "head.weight": weights(5, 8, 1, 1)}
    save_file(state, tmp_path / "other.safetensors")
    facts = survey_network(tmp_path / "other.safetensors")
    assert (facts.factory, facts.channels, facts.classes) == (None, 3, 5)
    nearly = arrays(UNetOptions(base_channels=2))
    nearly["down1.maxpool_conv.1.double_conv.0.weight"] = weights(4, 3, 3, 3)
    save_file(nearly, tmp_path / "nearly.safetensors")
    assert survey_network(tmp_path / "nearly.safetensors").factory is None


@pytest.mark.parametrize(("size", "free"), [(32, ()), ("side", ("height", "width"))])
def test_a_graph(tmp_path: Path, size: int | str, free: tuple[str, ...]) -> None:
    onnx.save(tiny_unet(size=size), tmp_path / "net.onnx")
    facts = survey_network(tmp_path / "net.onnx")
    assert (facts.channels, facts.classes, facts.multiple, facts.free) == (3, 3, 4, free)
    assert (facts.height, facts.width) == ((32, 32) if not free else (None, None))


def test_a_graph_with_channels_last_and_one_channel_out(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Transpose", ["image"], ["first"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["first", "w"], ["conv"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Sigmoid", ["conv"], ["sigmoid"]),
        onnx.helper.make_node("Transpose", ["sigmoid"], ["mask"], perm=[0, 2, 3, 1]),
    ]
    proto = model(nodes, {"image": ("n", 64, 48, 1)}, {"mask": ("n", 64, 48, 1)}, {"w": weights(1, 1, 3, 3)})
    onnx.save(proto, tmp_path / "net.onnx")
    facts = survey_network(tmp_path / "net.onnx")
    assert (facts.channels, facts.classes, facts.height, facts.width) == (1, 2, 64, 48)
    assert (facts.free, facts.multiple) == (("batch",), 1)


def flat(path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["image"], ["logits"])]
    onnx.save(model(nodes, {"image": (1, 3)}, {"logits": (1, 3)}), path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.pth", lambda path: None, "none.pth does not exist"),
        ("net.h5", lambda path: path.touch(), "no known ending"),
        ("net.safetensors", lambda path: path.write_bytes(b"no"), "not a readable safetensors file"),
        ("net.onnx", lambda path: path.write_bytes(b"no"), "not a readable ONNX file"),
        ("flat.onnx", flat, "no segmentation network of one image"),
        (
            "four.safetensors",
            lambda path: save_file(arrays(UNetOptions(in_channels=4, base_channels=2)), path),
            "takes 4 channels",
        ),
        (
            "one.safetensors",
            lambda path: save_file(arrays(UNetOptions(classes=1, base_channels=2)), path),
            "ends in one channel",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, make: Any, message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ModelError, match=message):
        survey_network(tmp_path / name)
