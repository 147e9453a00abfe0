"""FCN-8s: shapes at any size, the original's weights by name, bilinear deconvolutions."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no network to build")
from models.fcn8s import FCN8s, Upscore  # noqa: E402 - needs torch

# As in fcn8s-heavy-pascal of the authors' model zoo, with 19 classes.
CAFFE = {
    "conv1_1": (64, 3, 3, 3),
    "conv2_2": (128, 128, 3, 3),
    "conv3_3": (256, 256, 3, 3),
    "conv5_3": (512, 512, 3, 3),
    "fc6": (4096, 512, 7, 7),
    "fc7": (4096, 4096, 1, 1),
    "score_fr": (19, 4096, 1, 1),
    "score_pool3": (19, 256, 1, 1),
    "score_pool4": (19, 512, 1, 1),
    "upscore2": (19, 19, 4, 4),
    "upscore_pool4": (19, 19, 4, 4),
    "upscore8": (19, 19, 16, 16),
}


def test_weights_have_the_originals_names_and_shapes() -> None:
    with torch.device("meta"):
        network = FCN8s()
    state = network.state_dict()
    assert {name: tuple(state[f"{name}.weight"].shape) for name in CAFFE} == CAFFE
    assert sum(p.numel() for p in network.parameters()) == 134_456_985
    assert not any("bn" in name for name in state)


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (32, 33)])
def test_logits_have_the_images_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = FCN8s(1, 5, 4, 8, batch_norm=True).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 1, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("factor", [2, 8])
def test_upscore_is_bilinear_before_training(factor: int) -> None:
    x = torch.rand(1, 3, 6, 7)
    with torch.inference_mode():
        got = Upscore(3, factor)(x)
    wanted = torch.nn.functional.interpolate(x, scale_factor=factor, mode="bilinear")
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    assert got.shape == wanted.shape
    assert torch.allclose(got[inner], wanted[inner], atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_arguments_are_read_off_the_weights(batch_norm: bool) -> None:
    arguments = {"in_channels": 1, "classes": 4, "base_channels": 2, "fc_channels": 6, "batch_norm": batch_norm}
    state = FCN8s(**arguments).state_dict()
    assert FCN8s.infer_arguments(state) == arguments
    assert FCN8s.infer_arguments({"inc.double_conv.0.weight": torch.zeros(1)}) == {}
