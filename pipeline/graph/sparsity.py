"""Weights of which two in every four are zero, which tensor cores since Ampere multiply at twice the rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from pipeline.graph.placement import groups, is_convolution, quantizable

# Of four input channels in a row, of every output channel and every place of the kernel (Mishra et al. 2021,
# arXiv:2104.08378).
GROUP, KEPT = 4, 2
# TensorRT has sparse kernels for no fewer input channels.
LEAST_CHANNELS = 32


def prunable(model: ModelProto) -> list[NodeProto]:
    """Convolutions that sparse kernels can run: Conv of one group, with constant weights and a multiple of 32 input
    channels.

    Not: the last ones, between which and an output of the graph stands no other; they wait for memory rather than
    arithmetic and decide every pixel. Nor those that share their weights with what is left out.
    """
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    last = _last_convolutions(model)
    found = {
        node.output[0]: node
        for node in quantizable(model, ())
        if node.op_type == "Conv"
        and groups(node) == 1
        and arrays[node.input[1]].dims[1] % LEAST_CHANNELS == 0
        and last.isdisjoint(node.output)
    }
    others = {tensor for node in model.graph.node if node.output[0] not in found for tensor in node.input}
    return [node for node in found.values() if node.input[1] not in others]


def kept_weights(importance: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The two most important of every four, of any shape (outputs, inputs, …) whose inputs are a multiple of four."""
    fours = importance.reshape(importance.shape[0], -1, GROUP, *importance.shape[2:])
    kept = np.zeros(fours.shape, np.bool_)
    np.put_along_axis(kept, np.argsort(-fours, axis=2, kind="stable")[:, :, :KEPT], True, axis=2)
    return kept.reshape(importance.shape)


def is_sparse(weight: NDArray[np.floating]) -> bool:
    """Whether of every four input channels two are zero."""
    fours = (weight != 0).reshape(weight.shape[0], -1, GROUP, *weight.shape[2:])
    return bool((fours.sum(axis=2) <= KEPT).all())


def sparse_convolutions(model: ModelProto) -> tuple[int, int]:
    """How many of the convolutions that ``prunable`` names are sparse, and how many there are."""
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [is_sparse(numpy_helper.to_array(arrays[node.input[1]])) for node in prunable(model)]
    return sum(found), len(found)


def _last_convolutions(model: ModelProto) -> set[str]:
    """What they give, by name."""
    wanted, last = {value.name for value in model.graph.output}, set()
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            if is_convolution(node):
                last.update(node.output)
            else:
                wanted.update(node.input)
    return last
