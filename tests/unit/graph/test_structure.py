"""Work done twice, taken apart and put together again, or not needed at all; and what must stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pipeline.graph.base import Pass, PassRun, run_passes
from pipeline.graph.constants import RemoveUnused
from pipeline.graph.structure import (
    DropUnreadOutputs,
    FoldPixelShuffle,
    MergeDuplicates,
    RemoveNoOps,
    SimplifyConcats,
    SumRepeatedInputs,
)
from tests.unit.graph.builders import image, model, ops, run, weights

INT64 = TensorProto.INT64


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)


def fired(runs: tuple[PassRun, ...]) -> dict[str, int]:
    count: dict[str, int] = {}
    for step in runs:
        for rule, _ in step.result.fired if step.name != "remove-unused" else ():
            count[rule] = count.get(rule, 0) + 1
    return count


def rewritten(
    original: onnx.ModelProto, step: Pass, *, rtol: float = 0.0, **feeds: np.ndarray
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The model after a pass: equal results, same inputs and outputs, and nothing left for a second run."""
    proto, runs = run_passes(original, [step, RemoveUnused()])
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(original.graph.input)
    assert list(proto.graph.output) == list(original.graph.output)
    for want, got in zip(run(original, **feeds), run(proto, **feeds), strict=True):
        assert want.shape == got.shape
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)
    again, more = run_passes(proto, [step, RemoveUnused()])
    assert not any(one.result.modified for one in more)
    assert again == proto
    return proto, fired(runs)


def untouched(original: onnx.ModelProto, step: Pass) -> None:
    proto, runs = run_passes(original, [step])
    assert not fired(runs)
    assert proto == original


# Duplicates.


def duplicates(second: NodeProto, values: dict[str, Any] | None = None, **options: Any) -> onnx.ModelProto:
    """y = conv(x) + relu(twin), the twin being the second node."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        second,
        node("Relu", ["d"], ["r"]),
        node("Add", ["c", "r"], ["y"]),
    ]
    constants = {"w": weights(2, 2, 3, 3), "b": np.zeros(2, np.float32), **(values or {})}
    return model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 4, 4)}, constants, **options)


def test_the_same_computation_runs_once() -> None:
    original = duplicates(node("Conv", ["x", "w", "b"], ["d"], pads=[1, 1, 1, 1]))
    proto, count = rewritten(original, MergeDuplicates(), x=image(1, 2, 4, 4))
    assert ops(proto) == ["Conv", "Relu", "Add"]
    assert count == {"duplicate": 1}


def test_initializers_with_the_same_values_count_as_the_same() -> None:
    original = duplicates(node("Conv", ["x", "w", "b2"], ["d"], pads=[1, 1, 1, 1]), {"b2": np.zeros(2, np.float32)})
    assert ops(rewritten(original, MergeDuplicates(), x=image(1, 2, 4, 4))[0]) == ["Conv", "Relu", "Add"]


def test_a_chain_of_duplicates_goes_whole() -> None:
    nodes = [node("Relu", ["x"], [f"p{i}"]) for i in "ab"] + [node("Exp", [f"p{i}"], [f"q{i}"]) for i in "ab"]
    nodes.append(node("Mul", ["qa", "qb"], ["y"]))
    proto, _ = rewritten(model(nodes, {"x": (3,)}, {"y": (3,)}), MergeDuplicates(), x=image(3))
    assert ops(proto) == ["Relu", "Exp", "Mul"]


def test_a_duplicate_that_leaves_the_graph_keeps_its_name() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["z"]), node("Relu", ["x"], ["y"])]
    proto, _ = rewritten(model(nodes, {"x": (3,)}, {"z": (3,), "y": (3,)}), MergeDuplicates(), x=image(3))
    assert ops(proto) == ["Relu", "Neg"]


DIFFERENT = {
    "pads": (node("Conv", ["x", "w", "b"], ["d"], pads=[2, 0, 2, 0]), {}),
    "bias": (node("Conv", ["x", "w", "b2"], ["d"], pads=[1, 1, 1, 1]), {"b2": np.array([0, -0.0], np.float32)}),
    "no bias": (node("Conv", ["x", "w"], ["d"], pads=[1, 1, 1, 1]), {}),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_nodes_that_differ_stay_two(case: str) -> None:
    second, values = DIFFERENT[case]
    untouched(duplicates(second, values), MergeDuplicates())


def test_random_numbers_other_domains_and_outputs_stay_two() -> None:
    shape = (3,)
    noise = [node("RandomNormalLike", ["x"], [name]) for name in "ab"]
    untouched(model([*noise, node("Sub", ["a", "b"], ["y"])], {"x": shape}, {"y": shape}), MergeDuplicates())
    foreign = [helper.make_node("Relu", ["x"], [name], domain="org.example") for name in "ab"]
    both = model([*foreign, node("Sub", ["a", "b"], ["y"])], {"x": shape}, {"y": shape}, domains=["org.example"])
    untouched(both, MergeDuplicates())
    untouched(
        model([node("Relu", ["x"], [n]) for n in "ab"], {"x": shape}, {"a": shape, "b": shape}), MergeDuplicates()
    )


# Concats.


def joined(nodes: list[NodeProto], size: int, values: dict[str, Any] | None = None, **options: Any) -> onnx.ModelProto:
    """x (1, 6, 4, 4) to y (1, size, 4, 4)."""
    return model(nodes, {"x": options.pop("shape", (1, 6, 4, 4))}, {"y": (1, size, 4, 4)}, values, **options)


def slices(**bounds: tuple[int, int]) -> tuple[list[NodeProto], dict[str, Any]]:
    """A Slice of x along the channels for each name."""
    nodes = [node("Slice", ["x", f"{name}0", f"{name}1", "axes"], [name]) for name in bounds]
    values: dict[str, Any] = {"axes": np.array([1])}
    for name, (start, end) in bounds.items():
        values |= {f"{name}0": np.array([start]), f"{name}1": np.array([end])}
    return nodes, values


def test_a_concat_of_one_goes() -> None:
    nodes = [node("Concat", ["x"], ["c"], axis=1), node("Relu", ["c"], ["y"])]
    assert ops(rewritten(joined(nodes, 6), SimplifyConcats(), x=image(1, 6, 4, 4))[0]) == ["Relu"]


def test_nested_concats_become_one() -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["x", "r"], ["a"], axis=1),
        node("Concat", ["r", "a"], ["b"], axis=-3),
        node("Concat", ["b", "x"], ["y"], axis=1),
    ]
    proto, count = rewritten(joined(nodes, 24), SimplifyConcats(), x=image(1, 6, 4, 4))
    assert ops(proto) == ["Relu", "Concat"]
    assert list(proto.graph.node[1].input) == ["r", "x", "r", "x"]
    assert count == {"nested-concat": 2}


@pytest.mark.parametrize("reader", [True, False])
def test_a_concat_with_another_reader_or_another_axis_stays(reader: bool) -> None:
    nodes = [
        node("Concat", ["x", "x"], ["a"], axis=1 if reader else 2),
        node("Concat", ["a", "a" if reader else "x2"], ["b"], axis=1),
    ]
    nodes.append(node("Pad", ["x", "p"], ["x2"]))
    nodes = [nodes[2], *nodes[:2]]
    original = model(nodes, {"x": (1, 6, 4, 4)}, {"b": [None] * 4}, {"p": np.array([0, 0, 0, 0, 0, 0, 4, 0])})
    untouched(original, SimplifyConcats())


def test_slices_that_make_the_whole_again_go() -> None:
    parts, values = slices(a=(0, 2), b=(2, -1), c=(-1, 99))
    nodes = [*parts, node("Concat", ["a", "b", "c"], ["d"], axis=1), node("Relu", ["d"], ["y"])]
    proto, count = rewritten(joined(nodes, 6, values), SimplifyConcats(), x=image(1, 6, 4, 4))
    assert ops(proto) == ["Relu"]
    assert count == {"rejoin": 1, "single-concat": 1}


def test_a_split_within_a_larger_concat_is_put_together() -> None:
    nodes = [
        node("Split", ["x", "n"], ["a", "b"], axis=1),
        node("Relu", ["x"], ["r"]),
        node("Concat", ["r", "a", "b"], ["y"], axis=-3),
    ]
    proto, _ = rewritten(joined(nodes, 12, {"n": np.array([2, 4])}), SimplifyConcats(), x=image(1, 6, 4, 4))
    assert ops(proto) == ["Relu", "Concat"]
    assert list(proto.graph.node[1].input) == ["r", "x"]


SCRAMBLED = {
    "order": slices(b=(2, 6), a=(0, 2)),
    "gap": slices(a=(0, 2), b=(3, 6)),
    "overlap": slices(a=(0, 3), b=(2, 6)),
    "rest missing": slices(a=(0, 2), b=(2, 5)),
}


@pytest.mark.parametrize("case", SCRAMBLED)
def test_slices_that_do_not_make_the_whole_stay(case: str) -> None:
    parts, values = SCRAMBLED[case]
    size = {"order": 6, "gap": 5, "overlap": 7, "rest missing": 5}[case]
    nodes = [*parts, node("Concat", [one.output[0] for one in parts], ["y"], axis=1)]
    untouched(joined(nodes, size, values), SimplifyConcats())


def test_slices_of_an_axis_of_unknown_size_stay() -> None:
    parts, values = slices(a=(0, 2), b=(2, 6))
    nodes = [*parts, node("Concat", ["a", "b"], ["y"], axis=1)]
    untouched(model(nodes, {"x": (1, "C", 4, 4)}, {"y": (1, None, 4, 4)}, values), SimplifyConcats())


def test_a_slice_or_split_of_a_concat_is_what_went_in() -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["x", "r"], ["c"], axis=1),
        node("Slice", ["c", "six", "end", "one"], ["s"]),
        node("Split", ["c", "n"], ["p", "q"], axis=1),
        node("Add", ["s", "p"], ["t"]),
        node("Sub", ["t", "q"], ["y"]),
    ]
    values = {"six": np.array([6]), "end": np.array([2**40]), "one": np.array([-3]), "n": np.array([6, 6])}
    proto, count = rewritten(joined(nodes, 6, values), SimplifyConcats(), x=image(1, 6, 4, 4))
    assert ops(proto) == ["Relu", "Add", "Sub"]
    assert count == {"part-of-concat": 2}


@pytest.mark.parametrize(("start", "end", "step", "axis"), [(5, 12, 1, 1), (6, 12, 2, 1), (6, 11, 1, 1), (0, 4, 1, 2)])
def test_other_slices_of_a_concat_stay(start: int, end: int, step: int, axis: int) -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["x", "r"], ["c"], axis=1),
        node("Slice", ["c", "s", "e", "a", "st"], ["d"]),
        node("Neg", ["d"], ["y"]),
    ]
    values = {"s": np.array([start]), "e": np.array([end]), "a": np.array([axis]), "st": np.array([step])}
    untouched(model(nodes, {"x": (1, 6, 4, 4)}, {"y": [None] * 4}, values), SimplifyConcats())


# Operators that change nothing.


def through(
    nodes: list[NodeProto],
    values: dict[str, Any],
    given: tuple[int | str, ...] = ("N", 6, 4, 4),
    wanted: tuple[int | str | None, ...] = ("N", 6, 4, 4),
    **options: Any,
) -> onnx.ModelProto:
    """x → Relu a → nodes → b → Neg y."""
    return model(
        [node("Relu", ["x"], ["a"]), *nodes, node("Neg", ["b"], ["y"])], {"x": given}, {"y": wanted}, values, **options
    )


NO_OPS: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "reshape to the same": ([node("Reshape", ["a", "r"], ["b"])], {"r": np.array([-1, 6, 4, 4])}),
    "reshape with copied sizes": ([node("Reshape", ["a", "r"], ["b"])], {"r": np.array([0, 0, -1, 4])}),
    "there and back": (
        [node("Reshape", ["a", "r"], ["c"]), node("Reshape", ["c", "s"], ["b"])],
        {"r": np.array([0, 6, 16]), "s": np.array([-1, 6, 4, 4])},
    ),
    "flatten and back": (
        [node("Flatten", ["a"], ["c"], axis=2), node("Reshape", ["c", "s"], ["b"])],
        {"s": np.array([-1, 6, 4, 4])},
    ),
    "unsqueeze, squeeze": (
        [node("Unsqueeze", ["a", "r"], ["c"]), node("Squeeze", ["c", "r"], ["b"])],
        {"r": np.array([2])},
    ),
    "a row of four": (
        [
            node("Reshape", ["a", "r"], ["c"]),
            node("Unsqueeze", ["c", "i"], ["d"]),
            node("Squeeze", ["d", "i"], ["e"]),
            node("Reshape", ["e", "s"], ["b"]),
        ],
        {"r": np.array([0, 2, 3, 16]), "i": np.array([1]), "s": np.array([-1, 6, 4, 4])},
    ),
    "expand to the same": ([node("Expand", ["a", "r"], ["b"])], {"r": np.array([1, 6, 1, 4])}),
    "tile once": ([node("Tile", ["a", "r"], ["b"])], {"r": np.array([1, 1, 1, 1])}),
    "slice of all": (
        [node("Slice", ["a", "s", "e"], ["b"])],
        {"s": np.array([0, 0, -4]), "e": np.array([2**31 - 1, 6, 9])},
    ),
    "split into one": ([node("Split", ["a"], ["b"], axis=1, num_outputs=1)], {}),
}


@pytest.mark.parametrize("case", NO_OPS)
def test_operators_that_change_nothing_go(case: str) -> None:
    nodes, values = NO_OPS[case]
    proto, count = rewritten(through(nodes, values, opset=18), RemoveNoOps(), x=image(2, 6, 4, 4))
    assert ops(proto) == ["Relu", "Neg"]
    assert count


def test_a_reshape_of_the_output_goes_and_the_name_stays() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Reshape", ["a", "r"], ["y"])]
    original = model(nodes, {"x": (2, 6)}, {"y": (2, 6)}, {"r": np.array([2, 6])})
    assert ops(rewritten(original, RemoveNoOps(), x=image(2, 6))[0]) == ["Relu"]


def test_a_reshape_of_a_reshape_reads_the_first_ones_input() -> None:
    nodes = [
        node("Flatten", ["a"], ["c"]),
        node("Reshape", ["c", "r"], ["d"]),
        node("Reshape", ["d", "s"], ["b"]),
    ]
    values = {"r": np.array([0, 4, 24]), "s": np.array([0, 12, -1])}
    proto, _ = rewritten(through(nodes, values, wanted=("N", 12, 8)), RemoveNoOps(), x=image(2, 6, 4, 4))
    assert ops(proto) == ["Relu", "Reshape", "Neg"]


KEPT: dict[str, tuple[list[NodeProto], dict[str, Any], tuple[Any, ...]]] = {
    "two sizes unknown": (
        [node("Reshape", ["a", "r"], ["c"]), node("Relu", ["c"], ["b"])],
        {"r": np.array([-1, 3, 8, 4])},
        (None, 3, 8, 4),
    ),
    "a size copied from the reshape between": (
        [node("Reshape", ["a", "r"], ["c"]), node("Reshape", ["c", "s"], ["b"])],
        {"r": np.array([-1, 4, 4]), "s": np.array([0, 16])},
        (None, 16),
    ),
    "expand": ([node("Expand", ["a", "r"], ["b"])], {"r": np.array([2, 1, 1, 1, 1])}, (2, "N", 6, 4, 4)),
    "expand of a dynamic axis": ([node("Expand", ["a", "r"], ["b"])], {"r": np.array([3, 1, 1, 1])}, (None, 6, 4, 4)),
    "tile": ([node("Tile", ["a", "r"], ["b"])], {"r": np.array([1, 1, 2, 1])}, ("N", 6, 8, 4)),
    "slice from the second on": (
        [node("Slice", ["a", "s", "e", "i"], ["b"])],
        {"s": np.array([1]), "e": np.array([2**40]), "i": np.array([1])},
        ("N", 5, 4, 4),
    ),
    "slice of a dynamic axis": (
        [node("Slice", ["a", "s", "e"], ["b"])],
        {"s": np.array([0]), "e": np.array([2])},
        (None, 6, 4, 4),
    ),
    "every other row": (
        [node("Slice", ["a", "s", "e", "i", "st"], ["b"])],
        {"s": np.array([0]), "e": np.array([4]), "i": np.array([2]), "st": np.array([2])},
        ("N", 6, 2, 4),
    ),
    "slice backwards": (
        [node("Slice", ["a", "s", "e", "i", "st"], ["b"])],
        {"s": np.array([-1]), "e": np.array([-(2**40)]), "i": np.array([1]), "st": np.array([-1])},
        ("N", 6, 4, 4),
    ),
    "rows and columns swapped": ([node("Reshape", ["a", "r"], ["b"])], {"r": np.array([0, 4, 6, 4])}, ("N", 4, 6, 4)),
}


@pytest.mark.parametrize("case", KEPT)
def test_operators_that_change_something_stay(case: str) -> None:
    nodes, values, wanted = KEPT[case]
    untouched(through(nodes, values, wanted=wanted), RemoveNoOps())


def test_axis_names_that_only_the_output_claims_prove_nothing() -> None:
    """The exporter called both dynamic axes of the output like the input's, but the Reshape swaps them."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "i"], ["t"]),
        node("Relu", ["x"], ["a"]),
        node("Reshape", ["a", "t"], ["y"]),
    ]
    original = model(nodes, {"x": ("H", "W")}, {"y": ("H", "W")}, {"i": np.array([1, 0])})
    untouched(original, RemoveNoOps())


# Repeated inputs of a convolution.


def repeated(inputs: list[str], *, group: int = 1, kind: Any = np.float32, other: bool = False) -> onnx.ModelProto:
    channels = 2 * len(inputs)
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", inputs, ["c"], axis=1),
        node("Conv", ["c", "w", "b"], ["y"], pads=[1, 1, 1, 1], group=group),
    ]
    outputs: dict[str, Any] = {"y": (1, 4, 4, 4)}
    if other:
        nodes.append(node("Neg", ["c"], ["z"]))
        outputs["z"] = (1, channels, 4, 4)
    values = {"w": weights(4, channels // group, 3, 3).astype(kind), "b": weights(4).astype(kind)}
    number = TensorProto.FLOAT16 if kind == np.float16 else TensorProto.FLOAT
    return model(nodes, {"x": (1, 2, 4, 4)}, outputs, values, input_type=number, output_type=number)


def test_a_tensor_that_a_concat_has_twice_is_read_once() -> None:
    original = repeated(["x", "r", "x", "x"])
    proto, count = rewritten(original, SumRepeatedInputs(), rtol=1e-6, x=image(1, 2, 4, 4))
    assert list(proto.graph.node[1].input) == ["x", "r"]
    assert count == {"repeated": 1}
    before, after = (numpy_helper.to_array(p.graph.initializer[0]).astype(float) for p in (original, proto))
    np.testing.assert_allclose(after[:, :2], before[:, :2] + before[:, 4:6] + before[:, 6:], rtol=1e-6)


def test_a_concat_of_one_tensor_alone_leaves_the_convolution_alone() -> None:
    original = repeated(["x", "x"])
    proto, _ = run_passes(original, [SumRepeatedInputs(), SimplifyConcats(), RemoveUnused()])
    assert ops(proto) == ["Conv"]
    feed = image(1, 2, 4, 4)
    np.testing.assert_allclose(run(proto, x=feed)[0], run(original, x=feed)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"group": 2}, {"kind": np.float16}, {"other": True}])
def test_groups_half_weights_and_other_readers_keep_the_concat(options: dict[str, Any]) -> None:
    untouched(repeated(["x", "x"], **options), SumRepeatedInputs())


# Pixel shuffles.

Sizes = tuple[int | str, ...]


def shuffled(
    six: list[int], order: list[int], four: list[int], given: Sizes, wanted: Sizes, **options: Any
) -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "six"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=order),
        node("Reshape", ["b", "four"], ["y"]),
    ]
    return model(nodes, {"x": given}, {"y": wanted}, {"six": np.array(six), "four": np.array(four)}, **options)


CRD, DCR = [0, 1, 4, 2, 5, 3], [0, 3, 4, 1, 5, 2]
UNSHUFFLE, TO_DEPTH = [0, 1, 3, 5, 2, 4], [0, 3, 5, 1, 2, 4]
SHUFFLES = {
    "pixel shuffle": (shuffled([1, 2, 3, 3, 4, 5], CRD, [1, 2, 12, 15], (1, 18, 4, 5), (1, 2, 12, 15)), "DepthToSpace"),
    "dynamic batch": (
        shuffled([-1, 2, 2, 2, 4, 5], CRD, [-1, 2, 8, 10], ("N", 8, 4, 5), ("N", 2, 8, 10)),
        "DepthToSpace",
    ),
    "depth first": (shuffled([1, 2, 2, 3, 4, 5], DCR, [1, 3, 8, 10], (1, 12, 4, 5), (1, 3, 8, 10)), "DepthToSpace"),
    "depth first, opset 9": (
        shuffled([1, 2, 2, 3, 4, 5], DCR, [1, 3, 8, 10], (1, 12, 4, 5), (1, 3, 8, 10), opset=9),
        "DepthToSpace",
    ),
    "space to depth": (
        shuffled([0, 3, 2, 2, 3, 2], TO_DEPTH, [0, 12, 2, 3], ("N", 3, 4, 6), ("N", 12, 2, 3)),
        "SpaceToDepth",
    ),
    "pixel unshuffle of one channel": (
        shuffled([1, 1, 2, 2, 3, 2], UNSHUFFLE, [1, 4, 2, 3], (1, 1, 4, 6), (1, 4, 2, 3)),
        "SpaceToDepth",
    ),
}


@pytest.mark.parametrize("case", SHUFFLES)
def test_pixel_shuffles_become_one_operator(case: str) -> None:
    original, op = SHUFFLES[case]
    shape = [dim.dim_value or 2 for dim in original.graph.input[0].type.tensor_type.shape.dim]
    proto, count = rewritten(original, FoldPixelShuffle(), x=image(*shape))
    assert ops(proto) == [op]
    assert count == {op.lower(): 1}


def test_a_pixel_shuffle_of_a_dynamic_image_becomes_one_operator() -> None:
    """Sizes as an exporter computes them: Shape, Gather, Mul, Concat."""
    nodes = [node("Shape", ["x"], ["s"])]
    nodes += [node("Gather", ["s", f"i{axis}"], [f"s{axis}"]) for axis in (0, 2, 3)]
    nodes += [node("Mul", [f"s{axis}", "two"], [f"d{axis}"]) for axis in (2, 3)]
    nodes += [
        node("Concat", ["s0", "three", "two", "two", "s2", "s3"], ["six"], axis=0),
        node("Concat", ["s0", "three", "d2", "d3"], ["four"], axis=0),
        node("Reshape", ["x", "six"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=CRD),
        node("Reshape", ["b", "four"], ["y"]),
    ]
    values = {"two": np.array([2]), "three": np.array([3]), **{f"i{axis}": np.array([axis]) for axis in (0, 2, 3)}}
    original = model(nodes, {"x": ("N", 12, "H", "W")}, {"y": ("N", 3, "H2", "W2")}, values)
    proto, _ = rewritten(original, FoldPixelShuffle(), x=image(2, 12, 3, 5))
    assert ops(proto) == ["DepthToSpace"]


NO_SHUFFLE = {
    "another order": shuffled([1, 2, 2, 2, 4, 5], [0, 1, 4, 3, 5, 2], [1, 2, 8, 10], (1, 8, 4, 5), (1, 2, 8, 10)),
    "unequal factors": shuffled([1, 2, 2, 3, 4, 5], CRD, [1, 2, 8, 15], (1, 12, 4, 5), (1, 2, 8, 15)),
    "another image": shuffled([1, 2, 2, 2, 5, 4], CRD, [1, 2, 10, 8], (1, 8, 4, 5), (1, 2, 10, 8)),
    "rows of another length": shuffled([1, 2, 2, 2, 5, 4], CRD, [1, 2, 8, 10], (1, 8, 4, 5), (1, 2, 8, 10)),
    "another result": shuffled([1, 2, 2, 2, 4, 5], CRD, [1, 2, 10, 8], (1, 8, 4, 5), (1, 2, 10, 8)),
    "factor 1": shuffled([1, 2, 1, 1, 4, 5], CRD, [1, 2, 4, 5], (1, 2, 4, 5), (1, 2, 4, 5)),
    "unshuffle of two channels": shuffled([1, 2, 2, 2, 3, 2], UNSHUFFLE, [1, 8, 2, 3], (1, 2, 4, 6), (1, 8, 2, 3)),
    "too many unknown": shuffled([-1, 2, 2, 2, 4, 5], CRD, [-1, 2, 8, 10], ("N", 8, "H", "W"), (None, 2, 8, 10)),
    "mode before opset 11": shuffled([1, 2, 2, 2, 4, 5], CRD, [1, 2, 8, 10], (1, 8, 4, 5), (1, 2, 8, 10), opset=10),
    "half": shuffled(
        [1, 2, 2, 2, 4, 5], CRD, [1, 2, 8, 10], (1, 8, 4, 5), (1, 2, 8, 10), input_type=10, output_type=10
    ),
}


@pytest.mark.parametrize("case", NO_SHUFFLE)
def test_what_is_no_pixel_shuffle_stays(case: str) -> None:
    untouched(NO_SHUFFLE[case], FoldPixelShuffle())


def test_a_pixel_shuffle_with_another_reader_stays() -> None:
    original = shuffled([1, 2, 2, 2, 4, 5], CRD, [1, 2, 8, 10], (1, 8, 4, 5), (1, 2, 8, 10))
    original.graph.node.append(node("Neg", ["b"], ["z"]))
    original.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * 6))
    untouched(original, FoldPixelShuffle())


# Results on demand.


def test_results_that_nobody_reads_go() -> None:
    nodes = [
        node("MaxPool", ["x"], ["p", "indices"], kernel_shape=[2, 2]),
        node("Dropout", ["p"], ["d", "mask"]),
        node("LayerNormalization", ["d", "k"], ["y", "mean"]),
    ]
    original = model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 3, 3)}, {"k": weights(3)})
    proto, count = rewritten(original, DropUnreadOutputs(), x=image(1, 2, 4, 4))
    assert [len(one.output) for one in proto.graph.node] == [1, 1, 1]
    assert count == {"unread-output": 3}


def test_results_that_are_read_or_leave_the_graph_stay() -> None:
    nodes = [
        node("MaxPool", ["x"], ["p", "indices"], kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxUnpool", ["p", "indices"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    untouched(model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 4, 4)}), DropUnreadOutputs())
    original = model(nodes[:1], {"x": (1, 2, 4, 4)}, {"p": (1, 2, 2, 2)})
    original.graph.output.append(helper.make_tensor_value_info("indices", INT64, (1, 2, 2, 2)))
    untouched(original, DropUnreadOutputs())


def test_batch_normalization_in_training_mode_stays() -> None:
    values = {"k": weights(2), "v": np.ones(2, np.float32)}
    results = ["y", "m1", "m2", "m3", "m4"]
    old = model(
        [node("BatchNormalization", ["x", "k", "k", "k", "v"], results)],
        {"x": (1, 2, 4, 4)},
        {"y": (1, 2, 4, 4)},
        values,
        opset=9,
    )
    untouched(old, DropUnreadOutputs())
    new = node("BatchNormalization", ["x", "k", "k", "k", "v"], results[:3], training_mode=1)
    untouched(model([new], {"x": (1, 2, 4, 4)}, {"y": (1, 2, 4, 4)}, values), DropUnreadOutputs())
