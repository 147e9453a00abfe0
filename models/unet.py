"""UNet with the module names of the well-known PyTorch implementation, so that its checkpoints load unchanged.

Architecture: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015),
with BatchNorm, padded convolutions and four levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Upsampling = Literal["bilinear", "nearest", "transposed"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU}


class DoubleConv(nn.Module):
    """(conv 3×3, BatchNorm, activation) twice."""

    def __init__(self, inputs: int, outputs: int, middle: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=bias),
            nn.BatchNorm2d(middle),
            ACTIVATIONS[activation](),
            nn.Conv2d(middle, outputs, 3, padding=1, bias=bias),
            nn.BatchNorm2d(outputs),
            ACTIVATIONS[activation](),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max-pool by 2, then DoubleConv."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs, outputs, bias, activation))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Upsample by 2, pad to the skip connection's size, concatenate behind it, DoubleConv."""

    def __init__(
        self, inputs: int, outputs: int, upsampling: Upsampling, align_corners: bool, bias: bool, activation: str
    ) -> None:
        super().__init__()
        middle = inputs // 2 if upsampling != "transposed" else outputs
        if upsampling == "transposed":
            self.up: nn.Module = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        elif upsampling == "bilinear":
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv = DoubleConv(inputs, outputs, middle, bias, activation)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Image (N, in_channels, H, W) float32 to logits (N, classes, H, W) float32, any H and W of at least 16.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        base_channels: channels of the first level; each level doubles them. 64 gives 17.3 M parameters (bilinear).
        upsampling: bilinear or nearest (halved bottleneck), or transposed convolution.
        align_corners: of bilinear upsampling.
        bias: whether the 3×3 convolutions have a bias beside BatchNorm's.
        activation: relu, leaky_relu or silu.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 2,
        base_channels: int = 64,
        upsampling: Upsampling = "bilinear",
        align_corners: bool = True,
        bias: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if upsampling not in ("bilinear", "nearest", "transposed"):
            raise ValueError(f"upsampling is bilinear, nearest or transposed, not {upsampling!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        c, factor = base_channels, 1 if upsampling == "transposed" else 2
        block: dict[str, Any] = {"bias": bias, "activation": activation}
        up: dict[str, Any] = {"upsampling": upsampling, "align_corners": align_corners, **block}
        self.inc = DoubleConv(in_channels, c, c, **block)
        self.down1 = Down(c, c * 2, **block)
        self.down2 = Down(c * 2, c * 4, **block)
        self.down3 = Down(c * 4, c * 8, **block)
        self.down4 = Down(c * 8, c * 16 // factor, **block)
        self.up1 = Up(c * 16, c * 8 // factor, **up)
        self.up2 = Up(c * 8, c * 4 // factor, **up)
        self.up3 = Up(c * 4, c * 2 // factor, **up)
        self.up4 = Up(c * 2, c, **up)
        self.outc = nn.ModuleDict({"conv": nn.Conv2d(c, classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        x = self.up1(x5, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.outc["conv"](x)

    @staticmethod
    def infer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor arguments that a state dict's shapes give away; empty where it is not such a UNet's."""
        try:
            first, last = state["inc.double_conv.0.weight"], state["outc.conv.weight"]
        except KeyError:
            return {}
        arguments: dict[str, Any] = {
            "in_channels": first.shape[1],
            "classes": last.shape[0],
            "base_channels": first.shape[0],
            "bias": "inc.double_conv.0.bias" in state,
        }
        if "up1.up.weight" in state:
            arguments["upsampling"] = "transposed"
        return arguments
