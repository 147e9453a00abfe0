"""Learning from what a network gives in FP32, without labels: how far other scores are from its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.errors import UnsupportedError
from pipeline.graph.io import read_card

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

LOGGED_EVERY = 50
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


def require_torch(what: str, otherwise: str) -> None:
    """Raise UnsupportedError where torch is not installed.

    Args:
        otherwise: what can be done instead of installing it.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"{what} needs torch, which computes its gradients, and torch is not installed",
            fix=f"pip install torch, {otherwise}",
        ) from error


def as_tensor(batch: NDArray[Any], device: Any) -> Tensor:
    """A batch as graphs of torch take it, float32."""
    import torch

    return torch.from_numpy(np.asarray(batch, np.float32)).to(device)


def descend(
    groups: Sequence[dict[str, Any]],
    batches: Iterable[NDArray[Any]],
    steps: int,
    loss_of: Callable[[NDArray[Any], int], Tensor],
    what: str,
    broken: Callable[[str], Exception],
) -> None:
    """Gradient descent by Adam, whose steps fall to zero along a cosine.

    Args:
        groups: of parameters, with the step that each begins with, as torch's optimizers take them.
        loss_of: of a batch in a step, counted from 1.
        what: is descending, for the log.
        broken: the error of a loss that is no number, from words that say which.

    Raises:
        UnsupportedError: out of GPU memory.
    """
    import torch

    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    try:
        for step, batch in enumerate(batches, 1):
            loss = loss_of(batch, step)
            if not torch.isfinite(loss):
                raise broken(f"{what}'s loss is {loss.item()} in step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % LOGGED_EVERY == 0 or step == steps:
                log.info("%s, step %d of %d: loss %.3g", what, step, steps, loss.item())
    except torch.cuda.OutOfMemoryError as error:
        raise UnsupportedError(
            f"{what} does not fit into the GPU's memory: {str(error).splitlines()[0]}",
            fix="use fewer images a step, or free GPU memory",
        ) from error
