"""Two in four weights set to zero, and the others taught to give what the whole network gave, without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from pydantic.dataclasses import dataclass

from pipeline.distillation import (
    are_classes,
    as_tensor,
    decides_classes,
    descend,
    distance,
    relative_error,
    repeatable,
    require_torch,
)
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.io import model_inputs
from pipeline.graph.placement import is_convolution
from pipeline.graph.scores import scores_of
from pipeline.graph.shapes import with_weights
from pipeline.graph.sparsity import LEAST_CHANNELS, kept_weights, prunable
from pipeline.networks import fastest_device
from pipeline.torch_graph import TorchGraph

if TYPE_CHECKING:
    from torch import Tensor

# Adam's step at first, as a share of the weights' root mean square; it falls to zero along a cosine.
RATE = 5e-3
# What biases that are all zero count as.
LEAST_SIZE = 1e-3
# Of the steps, those in which pruned weights fade to zero.
FADING = 0.3
# Of the loss: tensors that convolutions read, beside the scores.
INNER = 0.3

Batch = NDArray[np.float32]
Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Pruning:
    """What became of the scores.

    Attributes:
        convolutions: that were pruned, by name.
        weights: how many these had, of which half are zero now, and of all convolutions' together.
        loss_pruned, loss_after: mean distance from the whole network's scores on the held-out images, before and after
            learning: nats a pixel of class scores, else squared error over variance.
        agreement_pruned, agreement_after: share of their pixels that have the whole network's class; None without
            class scores.
    """

    convolutions: tuple[str, ...]
    weights: tuple[int, int]
    steps: int
    held_out: int
    loss_pruned: float
    loss_after: float
    agreement_pruned: float | None
    agreement_after: float | None
    device: str
    seconds: float


def prune(
    model: ModelProto, batches: Iterable[Batch], judges: Iterable[Batch], steps: int
) -> tuple[ModelProto, Pruning]:
    """The graph with two of every four weights zero in each convolution that ``prunable`` names.

    Which: those of the smallest |weight| times root mean square of their input channel (Sun et al. 2023,
    arXiv:2306.11695), over the held-out images. They fade to zero, while all weights and biases of convolutions learn
    by gradient descent what the whole network gives (distillation): its scores, and the tensors that convolutions read.

    Args:
        model: a clean float32 graph with one input.
        batches: one for each step, as the graph takes them.
        judges: batches of other images; nothing is read before the graph is found fit.

    Raises:
        CheckFailed: the loss is no number.
        ModelError: no convolution can be pruned, or one's weights are not float32.
        UnsupportedError: torch is not installed, a node has no gradients here, or out of GPU memory.
    """
    nodes = _checked(model)
    import torch

    started, judges = time.perf_counter(), list(judges)
    with repeatable(tf32=True):
        learner = _Learner(model, nodes, judges)
        loss_pruned, agreement_pruned = learner.judge(judges)
        if not math.isfinite(loss_pruned):
            raise CheckFailed(
                f"the distance of the pruned network from the whole one is {loss_pruned} before it learns",
                expected="scores that are finite, of both",
                fix="look at the outputs with `unet-trt validate`",
            )
        groups = [{"params": [one], "lr": RATE * max(_size(one), LEAST_SIZE)} for one in learner.learned.values()]

        def loss_of(batch: Batch, step: int) -> Tensor:
            learner.fade = max(0.0, 1 - step / (FADING * steps))
            return learner.loss(batch)

        descend(groups, batches, steps, loss_of, "pruning", _broken)
        learner.fade = 0.0
        loss_after, agreement_after = learner.judge(judges)
        if not math.isfinite(loss_after):
            raise _broken(f"pruning ends at a loss of {loss_after}")
    return with_weights(model, learner.weights()), Pruning(
        convolutions=learner.names,
        weights=learner.counted,
        steps=steps,
        held_out=len(judges),
        loss_pruned=loss_pruned,
        loss_after=loss_after,
        agreement_pruned=agreement_pruned,
        agreement_after=agreement_after,
        device=torch.cuda.get_device_name() if learner.device.type == "cuda" else "CPU",
        seconds=round(time.perf_counter() - started, 3),
    )


def _checked(model: ModelProto) -> list[NodeProto]:
    """The convolutions that are pruned."""
    require_torch("pruning", "or prune with an interpreter that has it")
    nodes = prunable(model)
    if not nodes:
        raise ModelError(
            "the graph has no convolution whose weights can be pruned two in four",
            expected=f"Conv with constant weights and a multiple of {LEAST_CHANNELS} input channels",
            fix="leave pruning out: TensorRT has no sparse kernels for this network",
        )
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    other = [node for node in nodes if kinds[node.input[1]] != TensorProto.FLOAT]
    if other:
        raise ModelError(
            f"the weights of {other[0].name or other[0].output[0]} are not float32",
            expected="a float32 graph",
            fix="prune the clean graph, and build FP16 and INT8 from what comes of it",
        )
    return nodes


def _broken(said: str) -> CheckFailed:
    return CheckFailed(said, expected="a number", fix="report the model")


def _size(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.detach().square().mean().sqrt())


class _Learner:
    """The weights that learn, and the graph that they are weights of."""

    def __init__(self, model: ModelProto, nodes: Sequence[NodeProto], judges: Sequence[Batch]) -> None:
        import torch

        self.device = fastest_device()
        self.masks = decides_classes(model)
        self.input, scores = model_inputs(model)[0].name, scores_of(model)
        convolutions = [node for node in model.graph.node if is_convolution(node)]
        inner = dict.fromkeys(n.input[0] for n in convolutions if n.input[0] != self.input)
        self.graph, self.count = TorchGraph(model, [*scores, *inner], self.device), len(scores)
        self.names = tuple(node.name or node.output[0] for node in nodes)
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        learned = dict.fromkeys(name for n in convolutions for name in n.input[1:] if name in arrays)
        self.learned = {name: torch.tensor(arrays[name], device=self.device, requires_grad=True) for name in learned}
        self.fade = 0.0
        # A weight that several convolutions share is pruned by what the first of them reads.
        places = {node.input[1]: node.input[0] for node in reversed(nodes)}
        sizes = self._sizes(set(places.values()), judges)
        self.kept = {
            weight: torch.from_numpy(kept_weights(np.abs(arrays[weight]) * sizes[tensor][:, None, None])).to(
                self.device
            )
            for weight, tensor in places.items()
        }
        kinds = {n.input[1]: arrays[n.input[1]].size for n in convolutions if n.input[1] in arrays}
        self.counted = sum(kinds[name] for name in self.kept), sum(kinds.values())

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch, with what is learned so far."""
        import torch

        feeds = self._feeds(batch)
        with torch.no_grad():
            wanted = self.graph(feeds)
        found = self.graph(feeds, self._current())
        scores = distance(found[: self.count], wanted[: self.count], self.masks)
        pairs = zip(found[self.count :], wanted[self.count :], strict=True)
        inner = [relative_error(*pair) for pair in pairs]
        return scores + INNER * torch.stack(inner).mean() if inner else scores

    def judge(self, batches: Sequence[Batch]) -> tuple[float, float | None]:
        """Mean loss of the scores, and the share of pixels that have the whole network's class."""
        import torch

        losses, same = [], []
        with torch.no_grad():
            for batch in batches:
                feeds = self._feeds(batch)
                found, wanted = self.graph(feeds, self._current())[: self.count], self.graph(feeds)[: self.count]
                losses.append(distance(found, wanted, self.masks).item())
                if are_classes(wanted[0], self.masks):
                    same.append((found[0].argmax(1) == wanted[0].argmax(1)).float().mean().item())
        return float(np.mean(losses)), float(np.mean(same)) if same else None

    def weights(self) -> Weights:
        """By the initializer's name."""
        return {name: value.detach().cpu().numpy() for name, value in self._current().items()}

    def _current(self) -> dict[str, Tensor]:
        faded = {name: self.learned[name] * (kept + self.fade * ~kept) for name, kept in self.kept.items()}
        return {**self.learned, **faded}

    def _feeds(self, batch: Batch) -> dict[str, Tensor]:
        return {self.input: as_tensor(batch, self.device)}

    def _sizes(self, tensors: Collection[str], batches: Sequence[Batch]) -> Weights:
        """Root mean square of each channel of tensors (N, C, H, W), over all batches."""
        import torch

        sums: Weights = {}
        with torch.no_grad():
            for batch in batches:
                feeds = self._feeds(batch)
                values = {**dict(zip(self.graph.wanted, self.graph(feeds), strict=True)), **feeds}
                for tensor in tensors:
                    mean = values[tensor].square().mean((0, 2, 3)).cpu().numpy()
                    sums[tensor] = sums.get(tensor, 0) + mean
        return {tensor: np.sqrt(total / len(batches)) for tensor, total in sums.items()}
