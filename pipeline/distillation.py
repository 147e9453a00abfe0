"""Learning from what a network gives in FP32, without labels: how far other scores are from its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SCORES_RANK = 4
# A variance that is none.
TINY = 1e-12


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of scores (N, classes, H, W) the Kullback–Leibler divergence of their softmax, in nats a pixel; else the squared
    error over the variance."""
    from torch.nn import functional

    if found.dim() == SCORES_RANK and found.shape[1] > 1:
        pixels = found[:, 0].numel()
        logs = found.log_softmax(1), wanted.log_softmax(1)
        return functional.kl_div(*logs, log_target=True, reduction="sum") / pixels
    return relative_error(found, wanted)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the variance of what is wanted."""
    from torch.nn import functional

    return functional.mse_loss(found, wanted) / wanted.var().clamp_min(TINY)


def repeatable(*, tf32: bool = False) -> AbstractContextManager[Any]:
    """Convolutions of torch that give the same in every run on one machine."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
