"""Refinement of a calibration: ranges and biases are learned from what FP32 gives, without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from pipeline.calibration.report import Refinement
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig
from pipeline.distillation import (
    as_tensor,
    decides_classes,
    descend,
    distance,
    repeatable,
    require_torch,
)
from pipeline.errors import CalibrationError
from pipeline.graph.io import model_inputs
from pipeline.graph.placement import quantizable, quantizable_tensors, shared_ranges
from pipeline.graph.quantize import BIAS, quantized_as, with_biases
from pipeline.graph.scores import scores_of
from pipeline.networks import fastest_device
from pipeline.torch_graph import TorchGraph

if TYPE_CHECKING:
    from torch import Tensor

# Adam's steps at first; they fall to zero along a cosine. Of a range: its logarithm. Of a bias: as a share of the range
# of what its convolution gives. Tried on CamVid (docs/calibration.md).
RANGE_RATE, BIAS_RATE = 1e-2, 1e-4

Batch = NDArray[np.float32]


def check_refinable(model: ModelProto, batch: Batch | None) -> None:
    """See to it that a graph can be refined here, before the minutes of calibration.

    Args:
        batch: run through it, where there is one.

    Raises:
        UnsupportedError: torch is not installed, or a node has no gradients here.
    """
    require_torch("refinement", "calibrate with an interpreter that has it, or set calibrate.refine_steps to 0")
    import torch

    graph = TorchGraph(model, scores_of(model), torch.device("cpu"))
    if batch is not None:
        with torch.no_grad():
            graph({model_inputs(model)[0].name: as_tensor(batch, graph.device)})


def refine(
    model: ModelProto,
    table: CalibrationTable,
    batches: Iterable[Batch],
    judges: Sequence[Batch],
    steps: int,
    engine: EngineConfig,
) -> tuple[CalibrationTable, Refinement]:
    """Learn ranges and biases by gradient descent through the Q/DQ graph, from FP32's scores alone (distillation).

    Weights stay as they are; of every quantized convolution the bias is learned, of every group of tensors that share a
    range that range, by its logarithm: a few thousand numbers, which a few dozen images determine. Loss: for scores (N,
    classes, H, W) the Kullback–Leibler divergence of their softmax from FP32's, in nats a pixel; for other outputs, and
    for all where the card's task is tensors, the squared error over FP32's variance. Gradients pass rounding straight
    through (see ``TorchGraph``). Fine-tuning of biases and step sizes after calibration: Hubara et al. 2020,
    arXiv:2006.10518; Esser et al. 2020, arXiv:1902.08153.

    Args:
        model: a clean float32 graph with one input.
        batches: one for each step, as the graph takes them.
        judges: batches of other images: what is learned is kept only if their loss is lower with it.
        steps: how many there are.
        engine: for ``exclude``, ``qdq`` and ``input_bits``.

    Returns:
        The table with what was learned, or as it was; and what to report.

    Raises:
        CalibrationError: the loss is no number.
        UnsupportedError: as ``check_refinable``.
    """
    started = time.perf_counter()
    learner = _Learner(model, table, engine)
    with repeatable():
        before = learner.judge(judges)
        groups = [
            {"params": list(learner.logarithms.values()), "lr": RANGE_RATE},
            {"params": list(learner.shifts.values()), "lr": BIAS_RATE},
        ]
        descend(groups, batches, steps, lambda batch, _: learner.loss(batch), "refinement", _broken)
        after = learner.judge(judges)
    kept = after < before
    result = Refinement(
        steps=steps,
        held_out=len(judges),
        loss_before=before,
        loss_after=after,
        kept=kept,
        biases=learner.biases() if kept else {},
        seconds=round(time.perf_counter() - started, 3),
    )
    return (learner.table() if kept else table), result


def _broken(said: str) -> CalibrationError:
    fix = "set calibrate.refine_steps to 0, and report the model"
    return CalibrationError(said, expected="a number", fix=fix)


class _Learner:
    """What is learned, and the two graphs that it is learned from."""

    def __init__(self, model: ModelProto, table: CalibrationTable, engine: EngineConfig) -> None:
        import torch

        self.first, self.masks = table, decides_classes(model)
        device = fastest_device()
        self.device, self.input = device, model_inputs(model)[0].name
        scores = scores_of(model)
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        known = {
            node.output[0]: arrays[node.input[BIAS]]
            for node in quantizable(model, engine.exclude)
            if len(node.input) > BIAS and node.input[BIAS] in arrays
        }
        typed = quantized_as(with_biases(model, known, engine.exclude), table, engine)
        self.exact, self.rounded = TorchGraph(model, scores, device), TorchGraph(typed, scores, device)

        joined = shared_ranges(model, table, engine.exclude) if engine.qdq == "shared" else table
        # Tensors of one range keep one: a group is known by the range it has. An image of more than 8 bits keeps its.
        self.group = {t: joined.amax[t] for t in quantizable_tensors(model, engine.exclude, engine.qdq)}
        self.logarithms = {
            amax: torch.tensor(math.log(amax), device=device, requires_grad=True)
            for amax in dict.fromkeys(self.group.values())
        }
        pairs = [node for node in typed.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in self.group]
        self.scale_names = {node.input[1]: node.input[0] for node in pairs}
        self.bias_names = {n.input[BIAS]: n.output[0] for n in typed.graph.node if n.output[0] in known}
        self.first_bias = {tensor: torch.from_numpy(bias.copy()).to(device) for tensor, bias in known.items()}
        self.shifts = {tensor: torch.zeros_like(b, requires_grad=True) for tensor, b in self.first_bias.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch, with what is learned so far."""
        import torch

        feeds = {self.input: as_tensor(batch, self.device)}
        with torch.no_grad():
            wanted = self.exact(feeds)
        found = self.rounded(feeds, self._learned())
        return distance(found, wanted, self.masks)

    def judge(self, batches: Sequence[Batch]) -> float:
        """Mean loss of batches."""
        import torch

        with torch.no_grad():
            return float(np.mean([self.loss(batch).item() for batch in batches]))

    def biases(self) -> dict[str, tuple[float, ...]]:
        """By the output of the convolution."""
        return {tensor: tuple(self._bias(tensor).detach().cpu().tolist()) for tensor in self.shifts}

    def table(self) -> CalibrationTable:
        """With the ranges learned."""
        learned = {amax: math.exp(value.item()) for amax, value in self.logarithms.items()}
        ranges = {tensor: learned[amax] for tensor, amax in self.group.items()}
        return replace(self.first, amax={**self.first.amax, **ranges}, biases=self.biases())

    def _bias(self, tensor: str) -> Tensor:
        return self.first_bias[tensor] + self.shifts[tensor] * self.first.amax[tensor]

    def _learned(self) -> dict[str, Tensor]:
        scales = {name: self.logarithms[self.group[tensor]].exp() / 127 for name, tensor in self.scale_names.items()}
        return {**scales, **{name: self._bias(tensor) for name, tensor in self.bias_names.items()}}
