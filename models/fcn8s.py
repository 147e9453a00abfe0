"""FCN-8s on VGG16, with the layer names of the original Caffe model.

Architecture: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015), on Simonyan and
Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014). Where the original pads the
image by 100 pixels and crops the scores, fc6 is padded here; all weights have the original's shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Convolutions of each block, and its channels in units of the first block's.
BLOCKS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
SCORE_STD = 0.01


class Upscore(nn.ConvTranspose2d):
    """Deconvolution of each channel by itself times ``factor``, bilinear before training."""

    def __init__(self, classes: int, factor: int) -> None:
        super().__init__(classes, classes, 2 * factor, factor, factor // 2, bias=False)
        ramp = 1 - (torch.arange(2 * factor) - factor + 0.5).abs() / factor
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(classes), range(classes)] = torch.outer(ramp, ramp)


class FCN8s(nn.Module):
    """Image (N, in_channels, H, W) float32 to logits (N, classes, H, W) float32, any H and W.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        base_channels: channels of the first block; 64 is VGG16. Blocks have 1, 2, 4, 8 and 8 times as many.
        fc_channels: channels of fc6 and fc7; with 4096 and 64 base channels there are 134 M parameters.
        batch_norm: BatchNorm behind the convolutions of the five blocks and fc6, fc7, without which so deep a network
            does not train from scratch. Cleaning folds it into the convolutions.
        dropout: share of channels of fc6 and fc7 that training leaves out.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 19,
        base_channels: int = 64,
        fc_channels: int = 4096,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        channels = in_channels
        for block, (count, times) in enumerate(BLOCKS, 1):
            for place in range(1, count + 1):
                self._add(f"conv{block}_{place}", channels, times * base_channels, 3, batch_norm)
                channels = times * base_channels
        self._add("fc6", channels, fc_channels, 7, batch_norm)
        self._add("fc7", fc_channels, fc_channels, 1, batch_norm)
        self.dropout = nn.Dropout2d(dropout)
        self.score_fr = nn.Conv2d(fc_channels, classes, 1)
        self.score_pool4 = nn.Conv2d(8 * base_channels, classes, 1)
        self.score_pool3 = nn.Conv2d(4 * base_channels, classes, 1)
        for score in (self.score_fr, self.score_pool4, self.score_pool3):
            nn.init.normal_(score.weight, std=SCORE_STD)
            nn.init.zeros_(score.bias)
        self.upscore2 = Upscore(classes, 2)
        self.upscore_pool4 = Upscore(classes, 2)
        self.upscore8 = Upscore(classes, 8)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, batch_norm: bool) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not batch_norm)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        self.add_module(name, convolution)
        if batch_norm:
            self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _layer(self, name: str, x: Tensor) -> Tensor:
        x = self.get_submodule(name)(x)
        norm = f"{name}_bn"
        return torch.relu(self.get_submodule(norm)(x) if hasattr(self, norm) else x)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        pools = []
        for block, (count, _) in enumerate(BLOCKS, 1):
            for place in range(1, count + 1):
                x = self._layer(f"conv{block}_{place}", x)
            x = self.pool(x)
            pools.append(x)
        for name in ("fc6", "fc7"):
            x = self.dropout(self._layer(name, x))
        _, _, pool3, pool4, _ = pools
        scores = self.score_pool4(pool4)
        scores = scores + _cut(self.upscore2(self.score_fr(x)), scores)
        finer = self.score_pool3(pool3)
        finer = finer + _cut(self.upscore_pool4(scores), finer)
        return _cut(self.upscore8(finer), image)

    @staticmethod
    def infer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor arguments that a state dict's shapes give away; empty where it is not such a network's."""
        try:
            first, fc6, last = state["conv1_1.weight"], state["fc6.weight"], state["score_fr.weight"]
        except KeyError:
            return {}
        return {
            "in_channels": first.shape[1],
            "classes": last.shape[0],
            "base_channels": first.shape[0],
            "fc_channels": fc6.shape[0],
            "batch_norm": "conv1_1_bn.weight" in state,
        }


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """The upper left part of another's height and width: pooling rounds odd sizes up."""
    return x if x.shape[2:] == like.shape[2:] else x[:, :, : like.shape[2], : like.shape[3]]
