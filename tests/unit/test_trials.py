"""Which sizes a rewrite is tried at, and how two results are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from pipeline.config import ProfileRange
from pipeline.errors import ModelError
from pipeline.graph.io import save_model
from pipeline.graph.promises import write_multiples
from pipeline.trials import Trials, structured_input
from tests.unit.graph.builders import model, weights


def net(
    shape: tuple[int | str, ...], *, pools: int = 1, padded: bool = False, bias: float = 0.0, last: str = "Concat"
) -> ModelProto:
    """conv -> (2×2 max-pool) × pools -> nearest Resize back -> Concat with the conv: needs sizes that divide."""
    rank = len(shape)
    space = rank - 2
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], name="c")]
    source = "c"
    for index in range(pools):
        pool: dict[str, Any] = {"kernel_shape": [2] * space, "strides": [2] * space, "ceil_mode": int(padded)}
        nodes.append(helper.make_node("MaxPool", [source], [f"p{index}"], name=f"p{index}", **pool))
        source = f"p{index}"
    nodes.append(helper.make_node("Resize", [source, "", "s"], ["u"], name="u", mode="nearest"))
    nodes.append(helper.make_node(last, ["c", "u"], ["y"], name="y", **({"axis": 1} if last == "Concat" else {})))
    values = {
        "w": weights(4, 3, *([1] * space)),
        "b": np.full(4, bias, np.float32),
        "s": np.array([1, 1] + [2**pools] * space, np.float32),
    }
    return model(nodes, {"x": shape}, {"y": ["a", "b", "c", "d", "e"][:rank]}, values)


def tried(
    proto: ModelProto, folder: Path, profiles: dict[str, ProfileRange] | None = None
) -> dict[str, tuple[int, ...]]:
    save_model(proto, folder / "raw.onnx")
    trials = Trials(folder / "raw.onnx", proto, profiles or {})
    return {trial.size: trial.shapes["x"] for trial in trials.compare(folder / "raw.onnx")}


def test_a_static_graph_is_tried_once(tmp_path: Path) -> None:
    assert tried(net((1, 3, 8, 8)), tmp_path) == {"static": (1, 3, 8, 8)}


def test_the_minimum_is_searched_for_and_odd_sizes_that_fail_are_told(tmp_path: Path) -> None:
    proto = net(("N", 3, "H", "W"), pools=3)
    assert tried(proto, tmp_path) == {
        "minimum": (1, 3, 8, 8),
        "typical": (2, 3, 64, 96),
        "maximum": (3, 3, 256, 192),
    }
    assert Trials(tmp_path / "raw.onnx", proto, {}).refused == [{"x": (1, 3, 37, 51)}]


def test_sizes_that_repeat_are_tried_once(tmp_path: Path) -> None:
    assert tried(net(("N", 3, 8, 8)), tmp_path) == {
        "minimum": (1, 3, 8, 8),
        "typical": (2, 3, 8, 8),
        "maximum": (3, 3, 8, 8),
    }


def test_volumes_and_free_channels(tmp_path: Path) -> None:
    assert tried(net(("N", "C", "D", "H", "W")), tmp_path) == {
        "minimum": (1, 3, 2, 2, 2),
        "typical": (2, 3, 32, 64, 96),
        "maximum": (3, 3, 48, 256, 192),
    }


def test_images_whose_channels_come_last(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["y"]),
    ]
    proto = model(nodes, {"x": ("N", "H", "W", 3)}, {"y": ("N", 4, "H", "W")}, {"w": weights(4, 3, 1, 1)})
    assert tried(proto, tmp_path)["typical"] == (2, 64, 96, 3)


def test_profiles_decide_by_axis_name_or_role(tmp_path: Path) -> None:
    profiles = {
        "H": ProfileRange(min=4, opt=10, max=20, multiple_of=2),
        "width": ProfileRange(min=4, opt=10, max=20, multiple_of=2),
        "batch": ProfileRange(min=2, opt=2, max=2),
    }
    assert tried(net(("N", 3, "H", "W")), tmp_path, profiles) == {
        "minimum": (2, 3, 4, 4),
        "typical": (2, 3, 10, 10),
        "odd": (2, 3, 14, 6),  # odd multiples of 2, and not the same
        "maximum": (2, 3, 20, 20),
    }


def test_a_profile_of_one_size_needs_no_other(tmp_path: Path) -> None:
    one = ProfileRange(min=16, opt=16, max=16)
    profiles = dict.fromkeys(("batch", "height", "width"), one)
    assert tried(net(("N", 3, "H", "W")), tmp_path, profiles) == {"minimum": (16, 3, 16, 16)}


def test_promised_multiples_hold_without_profiles(tmp_path: Path) -> None:
    proto = net(("N", 3, "H", "W"), pools=3)
    write_multiples(proto, {"H": 16, "width": 8})
    sizes = tried(proto, tmp_path)
    assert sizes["minimum"] == (1, 3, 16, 8)
    assert sizes["odd"] == (1, 3, 48, 56)


def test_a_graph_that_never_runs(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Reshape", ["c", "seven"], ["y"])]
    values = {"w": weights(4, 3, 1, 1), "seven": np.array([7])}
    proto = model(nodes, {"x": ("N", 3, "H", "W")}, {"y": (7,)}, values)
    save_model(proto, tmp_path / "raw.onnx")
    with pytest.raises(ModelError, match="runs with none of the input sizes tried") as caught:
        Trials(tmp_path / "raw.onnx", proto, {})
    assert "(1, 3, 37, 51)" in caught.value.got
    assert "Reshape" in caught.value.got


def test_empty_results_count_as_no_run(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Slice", ["c", "three", "many", "three"], ["y"]),
    ]
    values = {"w": weights(4, 3, 1, 1), "three": np.array([3]), "many": np.array([9999])}
    proto = model(nodes, {"x": (1, 3, "H", "W")}, {"y": (1, 4, "H", "w")}, values)
    assert tried(proto, tmp_path)["minimum"] == (1, 3, 4, 4)


def test_every_size_has_its_own_error(tmp_path: Path) -> None:
    before, after = (net(("N", 3, "H", "W"), bias=bias) for bias in (0.0, 0.5))
    save_model(before, tmp_path / "a.onnx")
    after.graph.initializer[0].CopyFrom(before.graph.initializer[0])
    save_model(after, tmp_path / "b.onnx")
    compared = Trials(tmp_path / "a.onnx", before, {}).compare(tmp_path / "b.onnx")
    assert [trial.size for trial in compared] == ["minimum", "typical", "maximum"]
    assert all(trial.max_abs_error == pytest.approx(0.5, rel=1e-5) for trial in compared)
    assert len({trial.max_relative_error for trial in compared}) == 3  # the outputs' largest values differ


@pytest.mark.parametrize("last", ["Add", "Mystery"])
def test_what_does_not_run_is_as_wrong_as_can_be(tmp_path: Path, last: str) -> None:
    before, after = net((1, 3, 8, 8)), net((1, 3, 8, 8), last=last)
    save_model(before, tmp_path / "a.onnx")
    save_model(after, tmp_path / "b.onnx")
    (trial,) = Trials(tmp_path / "a.onnx", before, {}).compare(tmp_path / "b.onnx")
    assert trial.max_abs_error == trial.max_relative_error == float("inf")


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("int64", 0, 255), ("bool", 0, 1)])
def test_integers_stay_in_their_range(dtype: str, low: int, high: int) -> None:
    values = structured_input((2, 3, 16, 16), dtype, np.random.default_rng(0))
    assert values.dtype == dtype
    assert (values.min(), values.max()) == (low, high)


def test_floats_are_seeded_and_of_unit_size() -> None:
    first, again = (structured_input((2, 3, 64, 64), "float32", np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(first, again)
    assert 0.5 < first.std() < 1.6
