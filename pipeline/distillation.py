"""Learning from what a network gives in FP32, without labels: how far other scores are from its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from pipeline.graph.io import read_card

if TYPE_CHECKING:
    from torch import Tensor

SCORES_RANK = 4
# A variance that is none.
TINY = 1e-12


def decides_classes(model: ModelProto) -> bool:
    """Whether the network is one for masks; without a card it is taken for one."""
    card = read_card(model)
    return card is None or card.task == "segmentation"


def are_classes(scores: Tensor, masks: bool) -> bool:
    """Whether scores are (N, classes, H, W), of a network for ``masks``."""
    return masks and scores.dim() == SCORES_RANK and scores.shape[1] > 1


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor], masks: bool) -> Tensor:
    """Sum over the scores: of classes the Kullback–Leibler divergence of their softmax, in nats a pixel; of others
    ``relative_error``."""
    import torch
    from torch.nn import functional

    losses = []
    for ours, theirs in zip(found, wanted, strict=True):
        if are_classes(theirs, masks):
            logs = ours.log_softmax(1), theirs.log_softmax(1)
            losses.append(functional.kl_div(*logs, log_target=True, reduction="sum") / theirs[:, 0].numel())
        else:
            losses.append(relative_error(ours, theirs))
    return torch.stack(losses).sum()


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the variance of what is wanted."""
    from torch.nn import functional

    return functional.mse_loss(found, wanted) / wanted.var().clamp_min(TINY)


def repeatable(*, tf32: bool = False) -> AbstractContextManager[Any]:
    """Convolutions of torch that give the same in every run on one machine."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
