"""Which convolutions can be pruned two in four, which weights stay, and what counts as sparse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.graph.shapes import with_weights
from pipeline.graph.sparsity import is_sparse, kept_weights, prunable, sparse_convolutions


def chain(*channels: int, group: int = 1) -> ModelProto:
    """Convolutions c0, c1, … of these channels, each behind the other."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for place, (before, after) in enumerate(itertools.pairwise(channels)):
        values = rng.standard_normal((after, before // group, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{place}"))
        nodes.append(helper.make_node("Conv", [f"t{place}", f"w{place}"], [f"t{place + 1}"], f"c{place}", group=group))
    last = len(channels) - 1
    values = [
        helper.make_tensor_value_info(f"t{place}", TensorProto.FLOAT, [1, channels[place], None, None])
        for place in (0, last)
    ]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_the_two_most_important_of_every_four_inputs_stay() -> None:
    importance = np.array([1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.1]).reshape(1, 8, 1, 1)
    assert kept_weights(importance).ravel().tolist() == [False, True, True, False, False, False, True, True]


def test_each_place_of_a_kernel_and_each_output_chooses_for_itself() -> None:
    importance = np.random.default_rng(1).random((6, 8, 3, 3))
    kept = kept_weights(importance)
    assert (kept.reshape(6, 2, 4, 3, 3).sum(axis=2) == 2).all()
    assert len({kept[:, :, row, column].tobytes() for row in range(3) for column in range(3)}) > 1


def test_two_of_four_stay_where_all_are_alike() -> None:
    assert kept_weights(np.zeros((2, 4, 1, 1))).sum(axis=1).tolist() == [[[2]], [[2]]]


@pytest.mark.parametrize(("zeros", "sparse"), [((0, 1), True), ((0, 1, 2), True), ((0,), False), ((), False)])
def test_sparse_means_two_zeros_in_every_four(zeros: tuple[int, ...], sparse: bool) -> None:
    weight = np.ones((2, 8, 3, 3), np.float32)
    weight[:, 4:6] = 0
    weight[:, list(zeros)] = 0
    assert is_sparse(weight) is sparse


def test_convolutions_with_few_inputs_and_those_of_the_output_are_left_out() -> None:
    assert [node.name for node in prunable(chain(3, 32, 64, 48, 32, 5))] == ["c1", "c2"]
    assert prunable(chain(32, 64, 64, group=2)) == []


@pytest.mark.parametrize("ops", [("Softmax",), ("Sigmoid",), ("Relu", "Transpose")], ids=" ".join)
def test_the_last_convolution_stays_whole_behind_others_too(ops: Sequence[str]) -> None:
    model = chain(3, 32, 64, 32)
    model.graph.node[-1].output[0] = "scores"
    tensors = ["scores", *(f"{op}.out" for op in ops[:-1]), "t3"]
    for op, given, made in zip(ops, tensors, tensors[1:], strict=False):
        model.graph.node.append(helper.make_node(op, [given], [made], op))
    assert [node.name for node in prunable(model)] == ["c1"]


def test_weights_shared_with_a_convolution_that_stays_whole_stay_too() -> None:
    model = chain(3, 32, 32, 32, 32)
    assert [node.name for node in prunable(model)] == ["c1", "c2"]
    model.graph.node[-1].input[1] = "w1"
    assert [node.name for node in prunable(model)] == ["c2"]
    model.graph.node[1].input[1] = model.graph.node[2].input[1]
    assert [node.name for node in prunable(model)] == ["c1", "c2"]


def test_sparse_convolutions_are_counted() -> None:
    model = chain(3, 32, 64, 64, 5)
    assert sparse_convolutions(model) == (0, 2)
    weight = numpy_helper.to_array(model.graph.initializer[1])
    changed = with_weights(model, {"w1": np.where(kept_weights(np.abs(weight)), weight, 0).astype(np.float32)})
    assert sparse_convolutions(changed) == (1, 2)
    onnx.checker.check_model(changed)
    assert sparse_convolutions(model) == (0, 2)
    for place in (0, 2, 3):
        assert changed.graph.initializer[place] == model.graph.initializer[place]
