"""UNets that differ in how they come up again, and their exports by both of torch's exporters."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

from models import unet
from models.unet import UNet

CHANNELS, HEIGHT, WIDTH = 3, 48, 64
AXES: dict[str, dict[int, str]] = {"static": {}, "batch": {0: "N"}, "all": {0: "N", 2: "H", 3: "W"}}
MODES: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear-ac": {"mode": "bilinear", "align_corners": True},
    "nearest": {"mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
    "bicubic": {"mode": "bicubic", "align_corners": False},
}
UPSAMPLINGS = (*MODES, "size", "transposed", "pixel-shuffle")


@dataclass(frozen=True)
class Cell:
    """One export: ``padded`` networks align with F.pad to the skip connection, others need sizes divisible by 16."""

    exporter: str
    opset: int
    dynamic: str
    upsampling: str
    padded: bool

    def __str__(self) -> str:
        name = f"{self.exporter}{self.opset}-{self.dynamic}-{self.upsampling}"
        return f"{name}-pad" if self.padded else name


class PlainUp(unet.Up):
    """Upsample by 2, concatenate, without alignment."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


class SizedUp(unet.Up):
    """Upsample to the skip connection's size."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.conv(torch.cat([skip, x], dim=1))


@lru_cache
def network(upsampling: str, padded: bool) -> UNet:
    """A four-level UNet of 4 base channels in inference mode; its BatchNorms have statistics like trained ones."""
    torch.manual_seed(0)
    block = SizedUp if upsampling == "size" else unet.Up if padded else PlainUp
    with mock.patch.object(unet, "Up", block):
        made = UNet(base_channels=4, upsampling="transposed" if upsampling == "transposed" else "bilinear")
    for level in (made.up1, made.up2, made.up3, made.up4):
        if upsampling in MODES:
            level.up = nn.Upsample(scale_factor=2, **MODES[upsampling])
        elif upsampling == "pixel-shuffle":
            width = level.conv.double_conv[0].in_channels // 2
            level.up = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2))
    for name, tensor in itertools.chain(made.named_parameters(), made.named_buffers()):
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor, nonlinearity="relu")  # torch's own choice fades out over 19 layers
        elif tensor.ndim == 1:
            low, high = (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.3, 0.3)
            nn.init.uniform_(tensor, low, high)
    return made.eval()


def export(cell: Cell) -> ModelProto:
    """The raw ONNX graph: input ``image`` (1 or N, 3, 48, 64) or free sizes, output ``logits``."""
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"], "opset_version": cell.opset}
    example = (_example(cell.dynamic),)
    # It warns of every operator of torchvision where that is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.inference_mode():
        warnings.simplefilter("ignore")
        if cell.exporter == "dynamo":
            program = torch.onnx.export(
                _program(cell.dynamic, cell.upsampling, cell.padded), example, dynamo=True, verbose=False, **names
            )
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        target: Any = buffer
        axes = AXES[cell.dynamic]
        torch.onnx.export(
            network(cell.upsampling, cell.padded),
            example,
            target,
            dynamo=False,
            dynamic_axes={"image": axes, "logits": axes} if axes else None,
            **names,
        )
        return onnx.load_from_string(buffer.getvalue())


def _example(dynamic: str) -> Tensor:
    # torch.export specialises a dynamic axis whose example size is 1.
    return torch.zeros(1 if dynamic == "static" else 2, CHANNELS, HEIGHT, WIDTH)


@lru_cache
def _program(dynamic: str, upsampling: str, padded: bool) -> Any:
    """What the dynamo exporter makes of a module first: the same for every opset."""
    axes = AXES[dynamic]
    shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
    return torch.export.export(network(upsampling, padded), (_example(dynamic),), dynamic_shapes=shapes, strict=False)
