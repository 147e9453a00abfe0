"""``unet-trt weights convert`` as a user runs it, and configs whose weights are ``.wts``."""

from __future__ import annotations

import sys

import pytest

from pipeline.errors import UnsupportedError
from pipeline.stages.weights import convert_weights
from pipeline.wts import read_wts, write_wts
from tests.conftest import Project

torch = pytest.importorskip("torch", reason="torch is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402 - needs torch


def same(left, right):
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].numpy().tobytes() == right[name].numpy().tobytes()
        for name in left
    )


@pytest.fixture
def weights(project: Project):
    """The project's weights as a .pth and a .wts, with bits that arithmetic would change."""
    state = {k: state.clone() for k, state in sorted(load_file(project.root / "weights.safetensors").items())}
    bits = torch.tensor([0x7FC00001, 0xFF800001 - 2**32, 1, -(2**31)], dtype=torch.int64).to(torch.int32)
    state["outc.conv.bias"].view(torch.int32).copy_(bits)
    torch.save(state, project.root / "w.pth")
    write_wts(project.root / "w.wts", {name: tensor.numpy() for name, tensor in state.items()})
    return state


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_there_and_back_keeps_every_bit(project, weights, unet_trt, ending):
    there, back = project.root / "there.wts", project.root / f"back{ending}"
    result = unet_trt("weights", "convert", project.root / "w.pth", there)
    assert result.code == 0, result.err
    assert result.out.strip() == f"{there}: {len(weights)} tensors"
    assert there.read_bytes() == (project.root / "w.wts").read_bytes()
    result = unet_trt("weights", "convert", there, back, "--like", project.root / "weights.safetensors")
    assert result.code == 0, result.err
    read = load_file(back) if ending == ".safetensors" else torch.load(back, weights_only=True)
    assert same(dict(sorted(read.items())), weights)


def test_a_config_is_a_template_too(project, weights, unet_trt):
    result = unet_trt(
        "weights", "convert", project.root / "w.wts", project.root / "back.safetensors", "-c", project.config
    )
    assert result.code == 0, result.err
    assert same(dict(sorted(load_file(project.root / "back.safetensors").items())), weights)


def test_a_config_runs_from_wts(project, unet_trt):
    wts = project.root / "weights.wts"
    assert unet_trt("weights", "convert", project.root / "weights.safetensors", wts).code == 0
    for name in ("safetensors", "wts"):
        choice = f"network.weights={project.root / 'weights'}.{name}"
        result = unet_trt(
            "export", "-c", project.config, "--set", choice, "--build-dir", project.root / name, cwd=project.root
        )
        assert result.code == 0, result.err
    exported = [project.root / name / "tiny" / "export" / "model.onnx" for name in ("safetensors", "wts")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_safetensors_become_wts_without_torch(project, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    source = project.root / "weights.safetensors"
    assert convert_weights(source, tmp_path / "a.wts") == len(weights)
    assert set(read_wts(tmp_path / "a.wts")) == set(weights)
    with pytest.raises(UnsupportedError, match="torch is not installed"):
        convert_weights(tmp_path / "a.wts", tmp_path / "b.safetensors", source)


def test_types_that_numpy_lacks_become_float32(tmp_path):
    save_file({"x": torch.tensor([1.5, -2], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    assert convert_weights(tmp_path / "a.safetensors", tmp_path / "a.wts") == 1
    assert read_wts(tmp_path / "a.wts")["x"].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w.wts", "b.safetensors"], ".wts holds no shapes"),
        (["w.wts", "b.safetensors", "--like", "w.wts"], "holds no shapes either"),
        (["w.wts", "b.safetensors", "--like", "weights.safetensors", "-c", "config.yaml"], "both"),
        (["w.wts", "b.npz"], "b.npz has no known ending"),
        (["w.wts", "w.wts"], "would overwrite what it is made from"),
        (["none.wts", "b.wts"], "none.wts: No such file"),
        (["none.pth", "b.wts"], "none.pth does not exist"),
        (["w.pth", "no/such/folder/b.wts"], "no/such/folder"),
    ],
)
def test_mistakes_end_in_a_message(project, weights, unet_trt, arguments, said):
    result = unet_trt("weights", "convert", *arguments, cwd=project.root)
    assert result.code == 2, result.out + result.err
    assert said in result.err
    assert not (project.root / "b.safetensors").exists()


def test_a_damaged_file_is_named_with_its_line(project, weights, unet_trt):
    wts = project.root / "w.wts"
    wts.write_bytes(wts.read_bytes()[:-20])
    result = unet_trt("weights", "convert", wts, project.root / "b.safetensors", "-c", project.config)
    assert result.code == 2
    assert f"w.wts is damaged in line {len(weights) + 1}" in result.err
    assert not (project.root / "b.safetensors").exists()
