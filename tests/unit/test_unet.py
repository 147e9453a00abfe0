"""The UNet's shapes without torch are those with it, and its weights are found in every file."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config import NetworkConfig
from pipeline.errors import ConfigError, ModelError
from pipeline.unet import UNetOptions, load_unet, state_forms
from pipeline.wts import write_wts
from tests.onnx_unet import drawn_unet


def network_of(weights: Path | None, **arguments: Any) -> NetworkConfig:
    return NetworkConfig.model_validate({"factory": "models.unet:UNet", "arguments": arguments, "weights": weights})


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest", "transposed"])
@pytest.mark.parametrize("rest", [{}, {"bias": True, "in_channels": 1, "classes": 5, "base_channels": 6}])
def test_forms_are_those_of_torch(upsampling: Any, rest: dict[str, Any]) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from models.unet import UNet
    from pipeline.networks import form_of

    options = {"base_channels": 4, "upsampling": upsampling, **rest}
    want = {name: form_of(tensor) for name, tensor in UNet(**options).state_dict().items()}
    have = state_forms(UNetOptions(**options))
    assert have == want
    assert list(have) == list(want)


def test_arguments_and_defaults_are_those_of_torch() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from models.unet import UNet

    defaults = {name: each.default for name, each in inspect.signature(UNet).parameters.items()}
    assert vars(UNetOptions()) == defaults


@pytest.mark.parametrize("ending", [".wts", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"upsampling": "transposed", "bias": True, "in_channels": 1, "classes": 3}])
def test_options_and_weights_are_read_off_the_file(tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    made = drawn_unet(**options)
    path = tmp_path / f"w{ending}"
    if ending == ".wts":
        write_wts(path, made.state)
    else:
        save_file({f"module.{name}": array for name, array in made.state.items()}, path)
    loaded = load_unet(network_of(path, activation="silu"))
    assert vars(loaded.options) == {**vars(made.options), "activation": "silu"}
    assert {name: array.tolist() for name, array in loaded.state.items()} == {
        name: array.tolist() for name, array in made.state.items()
    }


def test_torch_files_are_read_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    made = drawn_unet()
    torch.save({name: torch.from_numpy(np.asarray(array)) for name, array in made.state.items()}, tmp_path / "w.pth")
    assert load_unet(network_of(tmp_path / "w.pth")).options == made.options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": 5}, r"arguments\.depth: Extra inputs"),
        ({"activation": "gelu"}, r"arguments\.activation: .*'leaky_relu'(.|\n)*got: +'gelu'"),
        ({"upsampling": "cubic"}, r"arguments\.upsampling: "),
        ({"base_channels": "many"}, r"arguments\.base_channels: "),
    ],
)
def test_arguments_are_checked(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    write_wts(tmp_path / "w.wts", drawn_unet().state)
    with pytest.raises(ConfigError, match=said):
        load_unet(network_of(tmp_path / "w.wts", **arguments))


def test_other_networks_and_files_are_refused(tmp_path: Path) -> None:
    write_wts(tmp_path / "w.wts", {"x": np.zeros(3, np.float32)})
    with pytest.raises(ModelError, match="other tensors than the template"):
        load_unet(network_of(tmp_path / "w.wts"))
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not a readable safetensors"):
        load_unet(network_of(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigError, match="only the built-in UNet"):
        load_unet(network_of(None))
    with pytest.raises(ConfigError, match="only the built-in UNet"):
        load_unet(NetworkConfig(factory="other.module:Net", weights=tmp_path / "w.wts"))
