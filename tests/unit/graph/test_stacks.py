"""Tensors that are stacked only to be reduced, and what must stay."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.graph.base import run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.stacks import ReduceStacks
from tests.unit.graph.builders import image, model, ops, run


def stacked(
    reduction: str = "ReduceSum",
    count: int = 2,
    *,
    opset: int = 18,
    axis: int = 1,
    axes: list[int] | None = None,
    places: list[int] | None = None,
    shape: tuple[int, ...] = (1, 3, 4, 5),
    kind: int = TensorProto.FLOAT,
    **attributes: Any,
) -> onnx.ModelProto:
    """x → Relu, Neg, Exp → each Unsqueezed, Concat, and the reduction to y."""
    names = ["Relu", "Neg", "Exp"][:count]
    attributes = {"keepdims": 0, **attributes}
    values = {"axes": np.array(axes or [axis])}
    nodes = [helper.make_node(op, ["x"], [op], name=op) for op in names]
    for position, op in enumerate(names):
        where = (places or [axis] * count)[position]
        inputs, form = ([op, f"place{position}"], {}) if opset >= 13 else ([op], {"axes": [where]})
        values[f"place{position}"] = np.array([where])
        nodes.append(helper.make_node("Unsqueeze", inputs, [f"{op}.wide"], name=f"{op}.wide", **form))
    nodes.append(helper.make_node("Concat", [f"{op}.wide" for op in names], ["stack"], name="stack", axis=axis))
    as_input = opset >= (13 if reduction == "ReduceSum" else 18)
    inputs, form = (["stack", "axes"], {}) if as_input else (["stack"], {"axes": axes or [axis]})
    nodes.append(helper.make_node(reduction, inputs, ["y"], name="y", **form, **attributes))
    rank = 5 - (0 if attributes["keepdims"] else len(axes or [axis]))
    return model(nodes, {"x": shape}, {"y": [None] * rank}, values, opset=opset, input_type=kind, output_type=kind)


@pytest.mark.parametrize(
    ("reduction", "count", "operator"),
    [
        ("ReduceSum", 2, "Add"),
        ("ReduceSum", 3, "Sum"),
        ("ReduceMean", 2, "Mean"),
        ("ReduceMax", 3, "Max"),
        ("ReduceMin", 2, "Min"),
    ],
)
@pytest.mark.parametrize("opset", [11, 13, 18, 21])
@pytest.mark.parametrize(("axis", "axes"), [(0, [0]), (1, [1]), (-1, [4]), (4, [-1])])
def test_a_reduced_stack_is_one_operator(
    reduction: str, count: int, operator: str, opset: int, axis: int, axes: list[int]
) -> None:
    proto = stacked(reduction, count, opset=opset, axis=axis, axes=axes)
    cleaned, _ = clean_model(proto)
    assert ops(cleaned) == [*["Relu", "Neg", "Exp"][:count], operator]
    feed = image(1, 3, 4, 5)
    np.testing.assert_allclose(run(cleaned, x=feed)[0], run(proto, x=feed)[0], rtol=1e-6, atol=1e-7)
    assert clean_model(cleaned)[0] == cleaned


@pytest.mark.parametrize(
    "options",
    [{"keepdims": 1}, {"axes": [1, 2]}, {"axes": [2]}, {"kind": TensorProto.DOUBLE}, {"reduction": "ReduceProd"}],
)
def test_other_reductions_stay(options: dict[str, Any]) -> None:
    proto = stacked(**options)
    assert run_passes(proto, [ReduceStacks()])[0] == proto


def test_parts_that_were_widened_elsewhere_stay() -> None:
    proto = stacked(places=[1, 2], shape=(1, 1, 4, 5))
    assert run_passes(proto, [ReduceStacks()])[0] == proto


def test_a_stack_with_another_reader_stays() -> None:
    proto = stacked()
    proto.graph.output.append(helper.make_tensor_value_info("stack", TensorProto.FLOAT, [None] * 5))
    assert run_passes(proto, [ReduceStacks()])[0] == proto


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_torch_exports(dynamo: bool) -> None:
    torch = pytest.importorskip("torch")

    class Both(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return torch.stack([x.relu(), -x, x.exp()]).mean(0) + torch.stack([x.relu(), -x], dim=-1).sum(-1)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            raw = torch.onnx.export(Both(), (torch.zeros(1, 2, 3, 4),), dynamo=True, verbose=False).model_proto
        else:
            torch.onnx.export(Both(), (torch.zeros(1, 2, 3, 4),), file, dynamo=False, opset_version=17)
            raw = onnx.load_from_string(file.getvalue())
    cleaned, _ = clean_model(raw)
    assert sorted(ops(cleaned)) == sorted(["Relu", "Neg", "Exp", "Mean", "Add", "Add"])
    feed = {raw.graph.input[0].name: image(1, 2, 3, 4)}
    np.testing.assert_allclose(run(cleaned, **feed)[0], run(raw, **feed)[0], rtol=1e-6, atol=1e-7)
