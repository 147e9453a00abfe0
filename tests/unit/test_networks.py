from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import NetworkConfig
from pipeline.errors import ModelError
from pipeline.networks import build_network, read_state_dict

torch = pytest.importorskip("torch", reason="torch is not installed")

from models.unet import UNet  # noqa: E402 - needs torch


def config(weights: Path | None, **arguments: Any) -> NetworkConfig:
    settings = {"factory": "models.unet:UNet", "arguments": arguments, "weights": weights}
    return NetworkConfig.model_validate(settings)


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest", "transposed"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("size", [(64, 64), (61, 45)])
def test_logits_have_the_size_of_the_image(upsampling: Any, activation: str, size: tuple[int, int]) -> None:
    network = UNet(3, 5, 4, upsampling=upsampling, activation=activation).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, *size)).shape == (2, 5, *size)


def test_state_dict_names_are_those_of_the_well_known_unet() -> None:
    names = set(UNet(3, 2, 4).state_dict())
    assert {
        "inc.double_conv.0.weight",
        "inc.double_conv.4.running_var",
        "down1.maxpool_conv.1.double_conv.3.weight",
        "down4.maxpool_conv.1.double_conv.0.weight",
        "up4.conv.double_conv.3.weight",
        "outc.conv.weight",
        "outc.conv.bias",
    } <= names
    assert "up1.up.weight" in UNet(3, 2, 4, upsampling="transposed").state_dict()


def test_seventeen_million_parameters_at_64_channels() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(3, 2, 64).parameters()) == 17_262_977 + 65
        assert sum(p.numel() for p in UNet(3, 1, 64, upsampling="transposed").parameters()) > 31_000_000


@pytest.mark.parametrize("options", [{"bias": True}, {"upsampling": "transposed"}, {"base_channels": 6}])
def test_architecture_is_read_off_the_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    made = UNet(1, 3, **{"base_channels": 4, **options}).eval()
    torch.save(made.state_dict(), tmp_path / "w.pth")
    loaded = build_network(config(tmp_path / "w.pth"))
    image = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(image), made(image))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "mask_values": [0, 1]},
        lambda s: {**s, "mask_values": [0, 255]},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    ],
)
def test_checkpoints_are_unwrapped(tmp_path: Path, wrap: Any) -> None:
    made = UNet(1, 2, 4)
    torch.save(wrap(made.state_dict()), tmp_path / "w.pt")
    state = read_state_dict(tmp_path / "w.pt")
    assert set(state) == set(made.state_dict())
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    build_network(config(tmp_path / "w.pt"))


def test_weights_of_another_architecture_name_the_keys(tmp_path: Path) -> None:
    torch.save(UNet(1, 2, 4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"(?s)other shape: inc\.double_conv\.0\.weight \(4, 1, 3, 3\) instead of"):
        build_network(config(tmp_path / "w.pth", base_channels=8))
    torch.save({"layer1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"(?s)missing: inc.*and \d+ more; unknown: layer1\.weight, fc\.bias"):
        build_network(config(tmp_path / "w.pth"))


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_pickle_that_needs_code_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": UNet(1, 2, 4).state_dict(), "trainer": Malicious()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"(?s)would run code from the file.*weights_only=False"):
        read_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a checkpoint", b"\x80\x02garbage", b"\x08" * 64])
def test_damaged_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        read_state_dict(tmp_path / name)


def test_truncated_weights(tmp_path: Path) -> None:
    torch.save(UNet(1, 2, 4).state_dict(), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a readable torch checkpoint"):
        read_state_dict(tmp_path / "w.pth")


def test_missing_weights_and_unknown_endings(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_state_dict(tmp_path / "none.pth")
    (tmp_path / "w.h5").touch()
    with pytest.raises(ModelError, match=r"(?s)no known ending.*\.safetensors"):
        read_state_dict(tmp_path / "w.h5")


@pytest.mark.parametrize("factory", ["no_such_module:UNet", "models.unet:NoSuchNet"])
def test_factories_that_do_not_exist(factory: str) -> None:
    with pytest.raises(ModelError, match=f"{factory} cannot be imported"):
        build_network(NetworkConfig(factory=factory))


def test_factory_that_refuses_its_arguments() -> None:
    with pytest.raises(ModelError, match=r"refuses its arguments.*upsampling"):
        build_network(config(None, upsampling="bicubic"))
    with pytest.raises(ModelError, match=r"returns no torch\.nn\.Module"):
        build_network(NetworkConfig(factory="builtins:dict"))
