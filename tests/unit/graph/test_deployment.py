"""Preprocessing and decision inside the graph: against numpy on ONNX Runtime, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from pipeline.artifacts import ModelCard, TensorSpec, output_kind
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.table import CalibrationTable
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.data.preprocessing import normalise
from pipeline.errors import ModelError
from pipeline.graph.cleaning import clean_model
from pipeline.graph.deployment import BakedEquality, bake, check_baked
from pipeline.graph.half import to_half
from pipeline.graph.io import read_card, write_card
from pipeline.graph.placement import quantizable_tensors
from pipeline.graph.promises import RAW_NAMES_KEY, write_multiples
from pipeline.graph.quantize import quantize
from pipeline.graph.shapes import element_type, infer
from tests.tiny_unet import tiny_unet
from tests.unit.graph.builders import array, conv_net, model, ops, run, weights

IMAGENET = PreprocessingConfig(height=32, width=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF, FLOAT, UINT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.UINT8


def card_of(spec: PreprocessingConfig = IMAGENET, classes: int = 3) -> ModelCard:
    return ModelCard(
        "tiny", spec, tuple(ClassConfig(name=f"class {i}", colour=(i % 256, 0, 0)) for i in range(classes))
    )


def clean(**options: Any) -> ModelProto:
    return clean_model(tiny_unet(**options))[0]


def certificate(before: ModelProto, baked: ModelProto, card: ModelCard, **options: Any) -> BakedEquality:
    opens = [functools.partial(OnnxRuntimeRunner, m.SerializeToString(), optimize=False) for m in (before, baked)]
    return check_baked(*opens, card, **{"tolerance": 1e-5, **options})


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


def specs(values: Any) -> list[tuple[str, int, list[int | str]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    ]


@pytest.mark.parametrize("output", ["logits", "labels", "probabilities"])
@pytest.mark.parametrize("source", ["float", "image"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_combination_is_the_same_network(source: Any, output: Any, dynamic: bool) -> None:
    before = clean(batch="batch", size="side") if dynamic else clean()
    baked = bake(before, card_of(), input=source, output=output)
    onnx.checker.check_model(baked, full_check=True)
    proof = certificate(before, baked, card_of())
    assert proof.passed
    assert (proof.input, proof.output, proof.wrong, proof.near_ties) == (source, output, 0, 0)
    assert proof.shapes == (((1, 64, 64, 3), (2, 64, 96, 3)) if dynamic else ((1, 32, 32, 3),))
    # The network takes multiples of 4 only.
    assert proof.refused == (((1, 37, 51, 3),) if dynamic else ())
    assert proof.compared == sum(n * h * w for n, h, w, _ in proof.shapes) * (1 if output == "labels" else 3)
    assert proof.max_error is None if output == "labels" else proof.max_error < 1e-6
    before_nodes = {node.name: node for node in before.graph.node}
    after = {node.name: node for node in baked.graph.node}
    assert set(before_nodes) <= set(after)
    inside = {"logits": "logits" if output == "logits" else "head"}
    assert all(
        after[name].output[0] == inside.get(node.output[0], node.output[0]) for name, node in before_nodes.items()
    )


@pytest.mark.parametrize("output", ["logits", "labels", "probabilities"])
@pytest.mark.parametrize("source", ["float", "image"])
@pytest.mark.parametrize("spec", [{}, {"scale": 1.0}, {"scale": 1.0, "mean": (128.0, 0.0, 3.0)}, {"mean": (0.5,)}])
def test_a_baked_graph_is_clean(source: Any, output: Any, spec: dict[str, Any]) -> None:
    """Scales stay in front of the first convolution, and names are those that cleaning gives."""
    for before in (clean(), clean(batch="batch", size="side")):
        write_multiples(before, {"height": 4, "width": 32})
        card = card_of(PreprocessingConfig(height=32, width=32, **spec))
        baked = bake(before, card, input=source, output=output)
        assert clean_model(baked)[0].SerializeToString(deterministic=True) == baked.SerializeToString(
            deterministic=True
        )


def test_a_layout_that_the_network_undoes_is_not_made() -> None:
    """A network in NHWC takes the image as it comes; its own names give way to those of the preprocessing."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["t"], name="image.transpose", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "w"], ["m"], name="m"),
        helper.make_node("Transpose", ["m"], ["y"], name="last", perm=[0, 3, 1, 2]),
    ]
    before = model(nodes, {"image": (1, 3, 8, 8)}, {"y": (1, 2, 8, 8)}, {"w": weights(3, 2)})
    spec = PreprocessingConfig(height=8, width=8, mean=(0.5, 0.4, 0.3))
    before = clean_model(before)[0]
    baked = bake(before, card_of(spec, 2), input="image", output="labels")
    assert clean_model(baked)[0].SerializeToString() == baked.SerializeToString()
    assert certificate(before, baked, card_of(spec, 2)).passed
    assert ops(baked) == ["Cast", "Mul", "Add", "MatMul", "ArgMax", "Cast"]


def test_names_types_and_axes() -> None:
    before = clean(batch="batch", size="side")
    baked = bake(before, card_of(), input="image", output="labels")
    assert specs(baked.graph.input) == [("image", UINT8, ["batch", "side_height", "side_width", 3])]
    assert specs(baked.graph.output) == [("labels", UINT8, ["batch", "side_height", "side_width"])]
    assert ops(baked) == ["Cast", "Transpose", "Mul", "Add", *ops(before), "ArgMax", "Cast"]
    added = [node.name for node in baked.graph.node if node.name not in {n.name for n in before.graph.node}]
    assert added == ["image.cast", "image.transpose", "image.mul", "image.add", "head.argmax", "head.cast"]
    assert quantizable_tensors(baked) == ("image.add", *quantizable_tensors(before)[1:])
    assert element_type(infer(baked)["head"]) == FLOAT
    soft = bake(before, card_of(), input="float", output="probabilities")
    assert specs(soft.graph.output) == [("probabilities", FLOAT, ["batch", 3, "side_height", "side_width"])]
    assert specs(soft.graph.input) == specs(before.graph.input)


def test_nothing_to_bake_is_a_copy_and_the_argument_never_changes() -> None:
    before = clean()
    kept = before.SerializeToString()
    same = bake(before, None, input="float", output="logits")
    assert same.SerializeToString() == kept
    assert same is not before
    bake(before, card_of(), input="image", output="labels")
    assert before.SerializeToString() == kept


def test_metadata_and_the_card_stay() -> None:
    before = clean()
    write_card(before, card_of())
    before.metadata_props.append(onnx.StringStringEntryProto(key="mine", value="kept"))
    baked = bake(before, card_of(), input="image", output="probabilities")
    assert read_card(baked) == card_of()
    kept = {entry.key: entry.value for entry in baked.metadata_props}
    assert kept.pop(RAW_NAMES_KEY)  # what baking renames is told as well
    assert kept == {entry.key: entry.value for entry in before.metadata_props if entry.key != RAW_NAMES_KEY}
    assert "rgb" in baked.graph.input[0].doc_string


@pytest.mark.parametrize(
    ("changes", "operators"),
    [
        ({"scale": 1.0}, ["Cast", "Transpose"]),
        ({}, ["Cast", "Transpose", "Mul"]),
        ({"scale": 1.0, "mean": (128.0, 0.0, 3.0)}, ["Cast", "Transpose", "Add"]),
        ({"mean": (0.5,), "std": (0.25, 0.5, 1.0), "channels": "bgr"}, ["Cast", "Transpose", "Mul", "Add"]),
        ({"mean": (0.4,), "std": (0.15,), "channels": "grey"}, ["Cast", "Transpose", "Mul", "Add"]),
    ],
)
def test_the_graph_normalises_bit_for_bit_as_numpy(changes: dict[str, Any], operators: list[str]) -> None:
    spec = PreprocessingConfig(height=8, width=8, **changes)
    count = spec.channel_count
    nodes = [helper.make_node("Conv", ["image", "w"], ["y"], name="c")]
    identity = np.eye(count, dtype=np.float32).reshape(count, count, 1, 1)
    before = model(nodes, {"image": ("n", count, 8, 8)}, {"y": ("n", count, 8, 8)}, {"w": identity})
    baked = bake(before, card_of(spec), input="image", output="logits")
    assert ops(baked) == [*operators, "Conv"]
    images = pixels(2, 8, 8, count)
    (got,) = run(baked, image=images)
    np.testing.assert_array_equal(got, np.stack([normalise(image, spec) for image in images]))


def test_ties_go_to_the_smaller_class() -> None:
    before = model(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="c")],
        {"x": (1, 1, 2, 2)},
        {"y": (1, 3, 2, 2)},
        {"w": np.float32([-1, 1, 1]).reshape(3, 1, 1, 1)},
    )
    spec = PreprocessingConfig(height=2, width=2, channels="grey")
    baked = bake(before, card_of(spec), input="float", output="labels")
    (labels,) = run(baked, x=np.float32([[[[1, -1], [0, 2]]]]))
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[[1, 0], [0, 1]]]


def test_softmax_of_an_old_opset_is_over_the_classes_alone() -> None:
    before = conv_net(opset=11)
    spec = PreprocessingConfig(height=8, width=8)
    baked = bake(before, card_of(spec, 2), input="image", output="probabilities")
    assert next(entry.version for entry in baked.opset_import) == 13
    assert certificate(before, baked, card_of(spec, 2)).passed
    labels = bake(before, card_of(spec, 2), input="image", output="labels")
    assert next(entry.version for entry in labels.opset_import) == 11
    assert certificate(before, labels, card_of(spec, 2)).passed


def test_subgraphs_read_the_normalised_image_too() -> None:
    value = helper.make_tensor_value_info
    branches = [
        helper.make_graph([helper.make_node(op, ["image"], [f"{op}.out"])], op, [], [value(f"{op}.out", FLOAT, None)])
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["picked"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Conv", ["picked", "w"], ["y"], name="c"),
    ]
    before = model(nodes, {"image": (1, 3, 8, 8)}, {"y": (1, 2, 8, 8)}, {"w": weights(2, 3, 1, 1)})
    spec = PreprocessingConfig(height=8, width=8, mean=(0.5,))
    assert certificate(before, bake(before, card_of(spec, 2), input="image", output="labels"), card_of(spec, 2)).passed


def test_names_that_are_taken() -> None:
    nodes = [
        helper.make_node("Relu", ["image"], ["labels"], name="image.cast"),
        helper.make_node("Conv", ["labels", "w"], ["y"], name="c"),
    ]
    before = model(nodes, {"image": (1, 3, 8, 8)}, {"y": (1, 2, 8, 8)}, {"w": weights(2, 3, 1, 1)})
    spec = PreprocessingConfig(height=8, width=8)
    baked = bake(before, card_of(spec, 2), input="image", output="labels")
    assert [value.name for value in baked.graph.output] == ["labels_1"]
    assert certificate(before, baked, card_of(spec, 2)).passed


def refused(
    before: ModelProto, card: ModelCard | None, problem: str, output: Any = "labels", source: Any = "image"
) -> None:
    with pytest.raises(ModelError, match=problem):
        bake(before, card, input=source, output=output)


def test_refusals() -> None:
    before = clean()
    refused(before, None, "no model card")
    refused(before, card_of(classes=4), "gives 3 channels and its card names 4 classes")
    grey = card_of(PreprocessingConfig(height=32, width=32, channels="grey"))
    refused(before, grey, "takes images of other channels")
    refused(before, grey, "takes images of other channels", output="logits")
    for source, output in (("image", "logits"), ("float", "labels"), ("image", "labels")):
        refused(bake(before, card_of(), input=source, output=output), card_of(), "already")  # type: ignore[arg-type]
    soft = bake(before, card_of(), input="float", output="probabilities")
    refused(soft, card_of(), "holds probabilities already", output="probabilities")
    two = conv_net()
    two.graph.input.append(helper.make_tensor_value_info("other", FLOAT, (1, 3, 8, 8)))
    refused(two, card_of(classes=2), "other inputs than one image batch")
    both = conv_net()
    both.graph.output.append(helper.make_tensor_value_info("a.relu", FLOAT, (1, 4, 8, 8)))
    refused(both, card_of(classes=2), "other outputs than logits")
    assert bake(both, card_of(classes=2), input="image", output="logits").graph.output == both.graph.output


@pytest.mark.parametrize("classes", [1, 256])
def test_numbers_of_classes_that_no_label_map_can_hold(classes: int) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    before = model(nodes, {"x": (1, 3, 4, 4)}, {"y": (1, classes, 4, 4)}, {"w": weights(classes, 3, 1, 1)})
    refused(before, card_of(classes=classes), "2 to 255 classes")


def with_other_weights(before: ModelProto, factor: float) -> ModelProto:
    """The network with the channel of class 0 made larger."""
    changed = ModelProto()
    changed.CopyFrom(before)
    (tensor,) = [t for t in changed.graph.initializer if t.name == "head.bias"]
    bias = onnx.numpy_helper.to_array(tensor).copy()
    bias[0] += factor
    tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
    return changed


@pytest.mark.parametrize("output", ["logits", "labels", "probabilities"])
def test_the_certificate_fails_for_another_network(output: Any) -> None:
    before = clean()
    other = bake(with_other_weights(before, 1.0), card_of(), input="image", output=output)
    proof = certificate(before, other, card_of())
    assert not proof.passed
    assert proof.wrong > 0 if output == "labels" else proof.max_error is not None and proof.max_error > 1e-3


def test_the_certificate_fails_for_another_preprocessing_and_for_swapped_channels() -> None:
    before = clean()
    darker = IMAGENET.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    assert not certificate(before, bake(before, card_of(darker), input="image", output="labels"), card_of()).passed
    baked = bake(before, card_of(), input="image", output="labels")
    (transpose,) = [node for node in baked.graph.node if node.op_type == "Transpose"]
    transpose.attribute[0].ints[:] = [0, 3, 2, 1]
    assert not certificate(before, baked, card_of()).passed


def test_near_ties_are_counted_and_forgiven() -> None:
    """Classes 0 and 1 differ by a hair, and the other graph decides for the other one."""
    weight = np.float32([1, 1 - 1e-6, -1]).reshape(3, 1, 1, 1)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    card = card_of(PreprocessingConfig(height=4, width=4, channels="grey", mean=(-0.1,)))
    before, other = (
        model(nodes, {"x": (1, 1, 4, 4)}, {"y": (1, 3, 4, 4)}, {"w": np.ascontiguousarray(w)})
        for w in (weight, weight[[1, 0, 2]])
    )
    proof = certificate(before, bake(other, card, input="image", output="labels"), card)
    assert (proof.passed, proof.near_ties, proof.wrong, proof.compared) == (True, 16, 0, 16)


def test_the_certificate_tries_the_sizes_it_is_given() -> None:
    before = clean(batch="batch", size="side")
    baked = bake(before, card_of(), input="image", output="labels")
    proof = certificate(before, baked, card_of(), sizes=[(1, 4, 8), (1, 4, 8), (3, 32, 4)])
    assert proof.shapes == ((1, 4, 8, 3), (3, 32, 4, 3))
    with pytest.raises(ModelError, match="none of the image sizes"):
        certificate(before, baked, card_of(), sizes=[(1, 5, 5)])


def test_kinds_of_outputs() -> None:
    assert output_kind(TensorSpec("labels", (1, 4, 4), "uint8")) == "labels"
    assert output_kind(TensorSpec("probabilities", (1, 2, 4, 4), "float32")) == "probabilities"
    assert output_kind(TensorSpec("output", (1, 2, 4, 4), "float32")) == "logits"


def types(proto: ModelProto) -> dict[str, int]:
    return {
        **{n: element_type(v) for n, v in infer(proto).items()},
        **{t.name: t.data_type for t in proto.graph.initializer},
    }


def test_half_leaves_preparation_and_softmax_in_float32() -> None:
    half = to_half(bake(clean(), card_of(), input="image", output="probabilities"))
    found = types(half)
    float32 = ("image.cast", "image.transpose", "image.mul", "image.add", "image.mul.factor", "image.add.offset")
    assert {found[name] for name in (*float32, "head.float", "probabilities")} == {FLOAT}
    assert {found[name] for name in ("image.add.half", "down0.weight", "head.weight", "head")} == {HALF}
    assert ops(half).count("Cast") == 3
    assert array(half, "image.mul.factor").dtype == np.float32


def test_half_lets_argmax_read_fp16() -> None:
    before = clean()
    half = to_half(bake(before, card_of(), input="image", output="labels"))
    assert types(half)["head"] == HALF
    assert ops(half)[-3:] == ["Conv", "ArgMax", "Cast"]
    assert ops(half).count("Cast") == 3
    proof = certificate(before, half, card_of())
    assert proof.wrong <= 3


def test_int8_quantizes_the_normalised_image() -> None:
    baked = bake(clean(), card_of(), input="image", output="labels")
    table = CalibrationTable("minmax", dict.fromkeys(quantizable_tensors(baked), 4.0))
    for is_half in (False, True):
        typed = quantize(baked, table, half=is_half)
        (first,) = [node for node in typed.graph.node if node.name == "image.add.quantize"]
        assert first.input[0] == ("image.add.half" if is_half else "image.add")
        assert ops(typed)[:4] == ["Cast", "Transpose", "Mul", "Add"]
        assert ops(typed)[-3:] == ["Conv", "ArgMax", "Cast"]
        assert types(typed)["labels"] == UINT8
