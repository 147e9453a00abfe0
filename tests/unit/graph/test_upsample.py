"""Legacy resizes, and Resize in the form that engines take, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.graph.base import PassRun, run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.upsample import CanonicalResize, NormalizeResize, RaiseLegacyResize
from tests.unit.graph.builders import array, image, model, ops, run, weights

ROUNDING = 1e-6
Runs = tuple[PassRun, ...]


def resize_net(
    given: tuple[Any, ...] = (1, 2, 6, 8),
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
    roi: list[float] | None = None,
    opset: int = 19,
    **attributes: Any,
) -> onnx.ModelProto:
    """x -> Relu -> Resize -> Neg -> y."""
    values: dict[str, Any] = {"roi": np.array(roi or [], np.float32), "scales": np.array(scales or [], np.float32)}
    inputs = ["r", "roi" if roi or opset < 13 else "", "scales" if scales or opset < 13 else ""]
    if sizes is not None:
        values["sizes"] = np.array(sizes)
        inputs.append("sizes")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Resize", inputs, ["u"], name="resize", **attributes),
        helper.make_node("Neg", ["u"], ["y"], name="y"),
    ]
    used = {key: value for key, value in values.items() if key in inputs}
    return model(nodes, {"x": given}, {"y": [None] * len(given)}, used, opset=opset)


def canonical(original: onnx.ModelProto, *shapes: tuple[int, ...]) -> tuple[onnx.ModelProto, list[str]]:
    """The rewritten model, checked against the original on inputs of these shapes, and the rules that fired."""
    cleaned, runs = run_passes(original, [NormalizeResize(), CanonicalResize()])
    onnx.checker.check_model(cleaned, full_check=True)
    for shape in shapes:
        (want,), (got,) = run(original, x=image(*shape)), run(cleaned, x=image(*shape))
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=3 * ROUNDING * np.abs(want).max())
    again, later = run_passes(cleaned, [NormalizeResize(), CanonicalResize()])
    assert again == cleaned
    assert not any(step.result.modified for step in later)
    return cleaned, rules(runs)


def rules(runs: Runs) -> list[str]:
    return [rule for step in runs for rule, _ in step.result.fired]


def settings(cleaned: onnx.ModelProto) -> dict[str, Any]:
    (node,) = (node for node in cleaned.graph.node if node.op_type == "Resize")
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}


ASYMMETRIC = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
STATIC, DYNAMIC = (2, 2, 7, 9), ("N", 2, "H", "W")
SHAPES = [(1, 2, 1, 1), (2, 2, 7, 9), (1, 2, 33, 18)]


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("sizes", [[1, 2, 10, 14], [1, 2, 11, 14], [1, 2, 3, 7]])
@pytest.mark.parametrize("mode", ["align_corners", "half_pixel"])
def test_sizes_become_scales_of_exactly_that_size(opset: int, sizes: list[int], mode: str) -> None:
    original = resize_net((1, 2, 5, 7), sizes=sizes, opset=opset, mode="linear", coordinate_transformation_mode=mode)
    cleaned, _ = clean_model(original)
    node = cleaned.graph.node[1]
    assert array(cleaned, node.input[2]).dtype == np.float32
    assert len(node.input) == 3
    assert bool(node.input[1]) == (opset == 11)  # roi is a required input there
    (want,), (got,) = run(original, x=image(1, 2, 5, 7)), run(cleaned, x=image(1, 2, 5, 7))
    assert got.shape == tuple(sizes)
    np.testing.assert_allclose(got, want, atol=ROUNDING)


@pytest.mark.parametrize("opset", [13, 18])
def test_empty_inputs_are_omitted(opset: int) -> None:
    node = helper.make_node("Resize", ["x", "none", "none", "sizes"], ["y"], mode="linear", name="resize")
    values = {"none": np.zeros(0, np.float32), "sizes": np.array([1, 2, 9, 8])}
    original = model([node], {"x": (1, 2, 6, 8)}, {"y": [None] * 4}, values, opset=opset)
    cleaned, fired = canonical(original, (1, 2, 6, 8))
    assert fired == ["omit-empty", "omit-empty"]
    assert list(cleaned.graph.node[0].input) == ["x", "", "", "sizes"]


def test_sizes_with_a_dynamic_batch_become_scales() -> None:
    """F.interpolate(x, size=(10, 14)) as TorchScript writes it: Concat(Slice(Shape(x), 0, 2), [10, 14])."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="s"),
        helper.make_node("Slice", ["s", "i0", "i2", "i0"], ["nc"], name="nc"),
        helper.make_node("Concat", ["nc", "hw"], ["sizes"], axis=0, name="sizes"),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], name="resize", mode="nearest"),
    ]
    values = {"i0": np.array([0]), "i2": np.array([2]), "hw": np.array([10, 14])}
    original = model(nodes, {"x": ("N", 2, 5, 7)}, {"y": ("N", 2, 10, 14)}, values)
    cleaned, _ = clean_model(original)
    assert ops(cleaned) == ["Resize"]
    assert array(cleaned, cleaned.graph.node[0].input[2]).tolist() == [1, 1, 2, 2]
    assert (run(original, x=image(3, 2, 5, 7))[0] == run(cleaned, x=image(3, 2, 5, 7))[0]).all()


@pytest.mark.parametrize("given", [STATIC, DYNAMIC])
@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("pytorch_half_pixel", "round_prefer_floor"),
        ("half_pixel_symmetric", "round_prefer_floor"),
        ("tf_half_pixel_for_nn", "floor"),
    ],
)
def test_whole_factors_pick_the_pixel_below(given: Any, factor: int, coordinates: str, rounding: str) -> None:
    opset = 11 if coordinates.startswith("tf") else 19
    attributes = {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    original = resize_net(given, scales=[1, 1, factor, 1], opset=opset, **attributes)
    cleaned, fired = canonical(original, *(SHAPES if given == DYNAMIC else [STATIC]))
    assert settings(cleaned) == ASYMMETRIC
    assert fired[-1] == "nearest"


@pytest.mark.parametrize("given", [STATIC, DYNAMIC])
@pytest.mark.parametrize(
    ("coordinates", "rounding", "scale"),
    [
        ("half_pixel", "floor", 2),
        ("half_pixel", "round_prefer_floor", 1.7),
        ("asymmetric", "round_prefer_floor", 3),
        ("asymmetric", "ceil", 2),
        ("align_corners", "floor", 2),
    ],
)
def test_nearest_of_other_pixels_stays(given: Any, coordinates: str, rounding: str, scale: float) -> None:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    original = resize_net(given, scales=[1, 1, scale, 1], **attributes)
    cleaned, fired = canonical(original, *(SHAPES if given == DYNAMIC else [STATIC]))
    assert settings(cleaned) == attributes
    assert not fired


def test_a_form_that_the_parser_refuses_becomes_one_that_it_takes() -> None:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    cleaned, _ = canonical(resize_net(DYNAMIC, scales=[1, 1, 1.7, 1.5], opset=11, **attributes), *SHAPES)
    found = settings(cleaned)
    assert found["coordinate_transformation_mode"] == "half_pixel"
    assert found["nearest_mode"] == "round_prefer_ceil"


def test_known_sizes_decide_where_the_scale_alone_does_not() -> None:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel_symmetric", "nearest_mode": "ceil"}
    scales = [1, 1, 1.5, 1]
    assert canonical(resize_net((1, 2, 7, 9), scales=scales, **attributes), (1, 2, 7, 9))[1] == ["nearest"]
    assert canonical(resize_net(DYNAMIC, scales=scales, **attributes), *SHAPES)[1] == []


@pytest.mark.parametrize("opset", [11, 17])
def test_an_unused_roi_goes(opset: int) -> None:
    original = resize_net(scales=[1, 1, 2, 2], roi=[0, 0, 0, 0, 1, 1, 1, 1], opset=opset, mode="linear")
    cleaned, fired = canonical(original, (1, 2, 6, 8))
    assert fired == ["roi"]
    roi = cleaned.graph.node[1].input[1]
    assert (array(cleaned, roi).size == 0) if opset == 11 else not roi


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("sizes", [[1, 2, 13, 8], [1, 2, 3, 21]])
def test_a_crop_of_the_whole_image_is_align_corners(mode: str, sizes: list[int]) -> None:
    attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize"}
    original = resize_net(sizes=sizes, roi=[0, 0, 0, 0, 1, 1, 1, 1], extrapolation_value=7.0, **attributes)
    cleaned, fired = canonical(original, (1, 2, 6, 8))
    assert fired == ["whole-roi"]
    assert settings(cleaned) == {"mode": mode, "coordinate_transformation_mode": "align_corners"}
    assert len(cleaned.graph.node[1].input) == 4
    assert not cleaned.graph.node[1].input[1]


def test_a_crop_of_a_part_or_to_one_pixel_is_no_align_corners() -> None:
    attributes = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    part = resize_net(scales=[1, 1, 2, 2], roi=[0, 0, 0.2, 0.1, 1, 1, 1.3, 0.7], **attributes)
    pixel = resize_net(sizes=[1, 2, 1, 8], roi=[0, 0, 0, 0, 1, 1, 1, 1], **attributes)
    for original in (part, pixel):
        cleaned, fired = canonical(original, (1, 2, 6, 8))
        assert not fired
        assert settings(cleaned)["coordinate_transformation_mode"] == "tf_crop_and_resize"


def test_a_crop_along_known_sizes_is_two_products() -> None:
    attributes = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    original = resize_net(("N", 2, 6, 8), scales=[1, 1, 2, 2], roi=[0, 0, 0.2, 0.1, 1, 1, 1.3, 0.7], **attributes)
    cleaned, fired = canonical(original, (3, 2, 6, 8))
    assert fired == ["matrices"]
    assert ops(cleaned) == ["Relu", "MatMul", "MatMul", "Neg"]


def test_axes_become_every_axis() -> None:
    original = resize_net(("N", 2, "H", "W"), scales=[3, 2], axes=[3, 2], mode="linear")
    cleaned, fired = canonical(original, *SHAPES)
    assert fired == ["every-axis"]
    assert array(cleaned, cleaned.graph.node[1].input[2]).tolist() == [1, 1, 2, 3]
    assert "axes" not in settings(cleaned)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_policy_becomes_scales_where_they_give_its_sizes(policy: str, mode: str) -> None:
    attributes = {"mode": mode, "keep_aspect_ratio_policy": policy}
    original = resize_net(("N", 2, 6, 8), sizes=[12, 20], axes=[2, 3], **attributes)
    cleaned, fired = canonical(original, (2, 2, 6, 8))
    assert fired[0] == "every-axis"
    assert set(settings(cleaned)) <= {"mode", "coordinate_transformation_mode", "nearest_mode"}
    # Here the policy rounds up, which scales do not: 7 · 10/8 = 8.75.
    odd = resize_net((1, 2, 7, 8), sizes=[20 if policy == "not_larger" else 2, 10], axes=[2, 3], **attributes)
    assert canonical(odd, (1, 2, 7, 8))[1] == []


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_a_resize_to_the_same_size_goes(mode: str) -> None:
    cleaned, fired = canonical(resize_net(DYNAMIC, scales=[1, 1, 1, 1], mode=mode), *SHAPES[1:])
    assert ops(cleaned) == ["Relu", "Neg"]
    assert fired == ["same-size"]
    assert ops(canonical(resize_net(sizes=[1, 2, 6, 8], mode=mode), (1, 2, 6, 8))[0]) == ["Relu", "Neg"]
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], mode=mode)
    alone = model([node], {"x": (1, 2, 3, 4)}, {"y": (1, 2, 3, 4)}, {"s": np.ones(4, np.float32)})
    assert ops(canonical(alone, (1, 2, 3, 4))[0]) == ["Identity"]


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_half_pixel_forms_are_one_where_they_agree(mode: str) -> None:
    for coordinates, given, scale, same in [
        ("pytorch_half_pixel", DYNAMIC, 1.7, True),
        ("pytorch_half_pixel", DYNAMIC, 0.5, False),
        ("pytorch_half_pixel", (1, 2, 6, 8), 0.5, True),
        ("pytorch_half_pixel", (1, 2, 3, 8), 0.34, False),  # to one pixel, where the two differ
        ("half_pixel_symmetric", DYNAMIC, 3, True),
        ("half_pixel_symmetric", DYNAMIC, 1.7, False),
    ]:
        shapes = [(2, 2, 7, 9), (1, 2, 33, 18)] if given == DYNAMIC else [given]
        original = resize_net(
            given, scales=[1, 1, scale, 2], mode=mode, coordinate_transformation_mode=coordinates
        )  # fmt: skip
        cleaned, fired = canonical(original, *shapes)
        assert fired == (["half-pixel"] if same else []), (coordinates, given, scale)
        assert settings(cleaned)["coordinate_transformation_mode"] == ("half_pixel" if same else coordinates)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 1.7, 1.3], [1, 1, 1, 3]])
def test_antialias_goes_where_nothing_shrinks(mode: str, scales: list[float]) -> None:
    cleaned, fired = canonical(resize_net(DYNAMIC, scales=scales, mode=mode, antialias=1), *SHAPES[1:])
    assert fired == ["antialias"]
    assert "antialias" not in settings(cleaned)
    corners = {"mode": mode, "antialias": 1, "coordinate_transformation_mode": "align_corners"}
    assert canonical(resize_net(DYNAMIC, scales=scales, **corners), *SHAPES[1:])[1] == []


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric"])
@pytest.mark.parametrize("sizes", [[2, 2, 3, 4], [2, 2, 5, 9], [2, 2, 7, 4], [2, 2, 3, 20]])
def test_shrinking_with_antialias_is_two_products(mode: str, coordinates: str, sizes: list[int]) -> None:
    attributes = {"mode": mode, "antialias": 1, "coordinate_transformation_mode": coordinates}
    cleaned, fired = canonical(resize_net((2, 2, 7, 9), sizes=sizes, **attributes), (2, 2, 7, 9))
    assert fired[-1] == "matrices"
    assert ops(cleaned)[1:-1] == ["MatMul"] * sum(
        now != before for now, before in zip(sizes, (2, 2, 7, 9), strict=True)
    )


def test_shrinking_with_antialias_stays_where_sizes_are_dynamic_or_types_others() -> None:
    original = resize_net(DYNAMIC, scales=[1, 1, 0.5, 0.5], mode="linear", antialias=1)
    assert canonical(original, *SHAPES[1:])[1] == []
    half = resize_net((1, 2, 6, 8), scales=[1, 1, 0.5, 0.5], mode="linear", antialias=1)
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    assert not any(step.result.modified for step in run_passes(half, [CanonicalResize()])[1])


def test_a_resize_with_computed_scales_stays() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["t"], name="t"),
        helper.make_node("Resize", ["t", "", "s"], ["y"], mode="linear", antialias=1, name="resize"),
    ]
    original = model(nodes, {"x": (1, 1, 4, 4), "s": (4,)}, {"y": [None] * 4}, opset=18)
    cleaned, runs = run_passes(original, [NormalizeResize(), CanonicalResize()])
    assert cleaned == original
    assert not rules(runs)


def legacy_net(opset: int, scales: list[float], mode: str, *, ir: int = 4) -> onnx.ModelProto:
    """Conv -> Upsample (opset 7 to 9) or Resize (10) -> Dropout, whose attribute became an input later."""
    values: dict[str, Any] = {"w": weights(2, 2, 3, 3)}
    if opset < 9:
        resize = helper.make_node("Upsample", ["c"], ["u"], name="up", mode=mode, scales=[float(s) for s in scales])
    else:
        values["s"] = np.array(scales, np.float32)
        resize = helper.make_node("Upsample" if opset == 9 else "Resize", ["c", "s"], ["u"], name="up", mode=mode)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4, doc_string="first"),
        resize,
        helper.make_node("Dropout", ["u"], ["y"], name="drop", ratio=0.4),
    ]
    original = model(nodes, {"x": ("N", 2, "H", "W")}, {"y": ("N", 2, "h", "w")}, values, opset=opset, ir=ir)
    original.metadata_props.add(key="who", value="me")
    original.graph.doc_string = "a graph"
    return original


UP, DOWN = ([1, 1, 2, 2], [1, 1, 1.7, 2.3]), ([1, 1, 0.5, 0.6], [1, 1, 0.5, 2], [1, 1, 0.7, 1])


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("opset", "scales"), [(o, s) for o in (7, 8, 9, 10) for s in UP] + [(10, s) for s in DOWN]
)  # fmt: skip
def test_legacy_resizes_compute_the_same(mode: str, opset: int, scales: list[float]) -> None:
    original = legacy_net(opset, scales, mode)
    raised, runs = run_passes(original, [RaiseLegacyResize()])
    onnx.checker.check_model(raised, full_check=True)
    assert rules(runs) == ["legacy"]
    assert {entry.domain: entry.version for entry in raised.opset_import} == {"": 13}
    for shape in [(1, 2, 4, 5), (2, 2, 7, 9), (3, 2, 2, 8)]:
        assert (run(original, x=image(*shape))[0] == run(raised, x=image(*shape))[0]).all()
    both = mode == "nearest" and min(scales) < 1 < max(scales)
    assert [op for op in ops(raised) if op != "Constant"] == ["Conv", *["Resize"] * (1 + both), "Dropout"]
    assert (raised.graph.input, raised.graph.output) == (original.graph.input, original.graph.output)
    assert raised.metadata_props == original.metadata_props
    assert raised.graph.doc_string == "a graph"
    named = {node.name: node for node in raised.graph.node}
    assert named["conv"].doc_string == "first"
    assert list(named["up"].output) == ["u"]


def test_opsets_without_legacy_resizes_stay() -> None:
    for original in (legacy_net(9, [1, 1, 2, 2], "nearest"), resize_net(scales=[1, 1, 2, 2], opset=11)):
        if original.opset_import[0].version == 9:
            del original.graph.node[1], original.graph.initializer[1]
            original.graph.node[1].input[0] = "c"
        raised, runs = run_passes(original, [RaiseLegacyResize()])
        assert raised == original
        assert not rules(runs)


def test_legacy_scales_are_folded_first() -> None:
    original = legacy_net(9, [1, 1, 2, 2], "nearest")
    original.graph.node.insert(0, helper.make_node("Mul", ["half", "four"], ["s"], name="scales"))
    del original.graph.initializer[1]
    original.graph.initializer.extend(
        [helper.make_tensor("half", 1, [4], [0.5, 0.5, 0.5, 0.5]), helper.make_tensor("four", 1, [4], [2, 2, 4, 4])]
    )
    cleaned, _ = clean_model(original)
    assert ops(cleaned) == ["Conv", "Resize"]
    assert settings(cleaned) == ASYMMETRIC
    for shape in [(1, 2, 4, 5), (2, 2, 7, 9)]:
        np.testing.assert_allclose(run(cleaned, x=image(*shape))[0], run(original, x=image(*shape))[0], rtol=ROUNDING)


def test_a_legacy_resize_with_dynamic_scales_stays() -> None:
    node = helper.make_node("Resize", ["x", "s"], ["y"], mode="nearest", name="resize")
    original = model([node], {"x": (1, 1, 4, 4), "s": (4,)}, {"y": [None] * 4}, opset=10)
    assert run_passes(original, [RaiseLegacyResize()])[0] == original
