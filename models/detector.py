"""A small single-stage detector: backbone with SiLU, neck of nearest upsampling and concatenation, three heads.

In the manner of the YOLO family: Redmon et al., "You Only Look Once" (2016); neck as in Lin et al., "Feature Pyramid
Networks" (2017); without anchors, one object a cell, as in Ge et al., "YOLOX" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)
# Of the objects that a head learns: their longer side, in strides, up to this.
LARGEST = 4.0
# Channels of a head before those of the classes: offset of the centre from the cell's, logarithms of width and height,
# all in strides, and the logit of there being an object.
BOX = 5
PRIOR = -4.0


class ConvUnit(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class Residual(nn.Module):
    """1×1, then 3×3 convolution, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = ConvUnit(channels, channels // 2, 1)
        self.expand = ConvUnit(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.squeeze(x))


class Detector(nn.Module):
    """Image (N, in_channels, H, W) to heads (N, 5 + classes, H/s, W/s) for s = 8, 16, 32; H and W multiples of 32.

    ``pipeline.metrics.detection.decode`` says what the channels mean.

    Args:
        in_channels: channels of the image.
        classes: of objects.
        base_channels: channels behind the first convolution; 12 gives 0.25 M parameters.
    """

    def __init__(self, in_channels: int = 3, classes: int = 3, base_channels: int = 12) -> None:
        super().__init__()
        c = base_channels
        self.stem = ConvUnit(in_channels, c, 3, 2)
        self.stage4 = nn.Sequential(ConvUnit(c, 2 * c, 3, 2), Residual(2 * c))
        self.stage8 = nn.Sequential(ConvUnit(2 * c, 4 * c, 3, 2), Residual(4 * c))
        self.stage16 = nn.Sequential(ConvUnit(4 * c, 6 * c, 3, 2), Residual(6 * c))
        self.stage32 = nn.Sequential(ConvUnit(6 * c, 8 * c, 3, 2), Residual(8 * c))
        self.neck16 = ConvUnit(14 * c, 4 * c, 1)
        self.neck8 = ConvUnit(8 * c, 4 * c, 1)
        self.heads = nn.ModuleList(
            nn.Sequential(ConvUnit(channels, 2 * c), nn.Conv2d(2 * c, BOX + classes, 1))
            for channels in (4 * c, 4 * c, 8 * c)
        )
        for head in self.heads:
            nn.init.constant_(head[-1].bias[BOX - 1 :], PRIOR)  # type: ignore[index]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x8 = self.stage8(self.stage4(self.stem(image)))
        x16 = self.stage16(x8)
        x32 = self.stage32(x16)
        n16 = self.neck16(torch.cat([F.interpolate(x32, scale_factor=2.0, mode="nearest"), x16], 1))
        n8 = self.neck8(torch.cat([F.interpolate(n16, scale_factor=2.0, mode="nearest"), x8], 1))
        return tuple(head(x) for head, x in zip(self.heads, (n8, n16, x32), strict=True))

    @staticmethod
    def infer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor arguments that a state dict's shapes give away; empty where it is not such a detector's."""
        try:
            first, last = state["stem.0.weight"], state["heads.0.1.weight"]
        except KeyError:
            return {}
        return {"in_channels": first.shape[1], "classes": last.shape[0] - BOX, "base_channels": first.shape[0]}


def detection_loss(heads: tuple[Tensor, ...], targets: list[Tensor]) -> Tensor:
    """Of a batch: 1 - IoU of the boxes, cross-entropy of their classes, and of there being an object at every cell.

    An object belongs to the head in whose strides its longer side is at most LARGEST (the last one takes the rest), at
    the cell that holds its centre; of several there, the last counts.

    Args:
        heads: as the detector gives them.
        targets: of each image, float32 (n, 5): left, top, right, bottom in pixels, class.
    """
    total = heads[0].new_zeros(())
    previous = 0.0
    count = max(1, sum(len(boxes) for boxes in targets))
    for head, stride in zip(heads, STRIDES, strict=True):
        most = LARGEST * stride if stride != STRIDES[-1] else float("inf")
        present = torch.zeros_like(head[:, 0])
        for image, boxes in enumerate(targets):
            longer = (boxes[:, 2:4] - boxes[:, :2]).amax(1)
            own = boxes[(longer > previous) & (longer <= most)]
            if not len(own):
                continue
            centre = (own[:, :2] + own[:, 2:4]) / 2 / stride
            column, row = (centre[:, axis].long().clamp(0, head.shape[3 - axis] - 1) for axis in (0, 1))
            found = head[image, :, row, column].T
            middle = found[:, :2] + torch.stack([column, row], 1) + 0.5
            half = found[:, 2:4].clamp(max=6).exp() / 2
            guess = torch.cat([middle - half, middle + half], 1) * stride
            classes = F.one_hot(own[:, 4].long(), head.shape[1] - BOX).float()
            total = total + 5 * (1 - _iou(guess, own[:, :4])).sum() / count
            total = total + F.binary_cross_entropy_with_logits(found[:, BOX:], classes, reduction="sum") / count
            present[image, row, column] = 1
        logits = head[:, BOX - 1]
        total = total + F.binary_cross_entropy_with_logits(logits, present, reduction="sum") / count
        previous = most
    return total


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of pairs of boxes, (n,): Rezatofighi et al. (2019)."""
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return overlap / union - (hull - union) / hull
