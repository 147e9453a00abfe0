"""Foreign graphs in the pipeline's form: channels first, logits of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from pipeline.artifacts import ModelCard
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import ModelError
from pipeline.graph.adoption import adopt
from pipeline.graph.io import model_inputs, model_outputs
from tests.unit.graph.builders import image, model, ops, run, weights

node = helper.make_node
TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def card(classes: int, channels: str = "rgb") -> ModelCard:
    spec = PreprocessingConfig(height=8, width=8, channels=channels)
    return ModelCard("foreign", spec, tuple(ClassConfig(name=str(i), colour=(0, 0, 0)) for i in range(classes)))


def network(
    classes: int, ends: Sequence[NodeProto] = (), *, last: bool = True, opset: int = 17, channels: int = 3
) -> ModelProto:
    """image → Conv → ``ends``, which read ``y`` and give ``mask``; channels last or first at both ends."""
    shape = ["N", 8, 8, channels] if last else ["N", channels, 8, 8]
    made = ["N", 8, 8, classes] if last else ["N", classes, 8, 8]
    conv = node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4)
    nodes = [conv, *ends]
    if last:
        nodes = [
            node("Transpose", ["image"], ["x"], name="in", perm=TO_FIRST),
            conv,
            node("Transpose", ["c"], ["y"], name="out", perm=TO_LAST),
            *(ends or [node("Identity", ["y"], ["mask"], name="end")]),
        ]
    else:
        conv.input[0] = "image"
        conv.output[0] = "y" if ends else "mask"
    values = {"w": weights(classes, channels, 3, 3), "b": weights(classes)}
    return model(nodes, {"image": shape}, {"mask": made}, values, opset=opset)


def both(
    raw: ModelProto, adopted: ModelProto, given: np.ndarray, *, last: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """What the graphs make of the same image (N, C, H, W), as (N, C, H, W)."""
    (want,) = run(raw, image=given.transpose(0, 2, 3, 1) if last else given)
    onnx.checker.check_model(adopted, full_check=True)
    (have,) = run(adopted, image=given)
    return (want.transpose(0, 3, 1, 2) if last else want), have


def test_channels_come_first() -> None:
    raw = network(3)
    adopted = adopt(raw, card(3))
    want, have = both(raw, adopted, image(2, 3, 8, 8))
    assert np.array_equal(want, have)
    assert [spec.shape for spec in model_inputs(adopted)] == [("N", 3, 8, 8)]
    assert [(spec.name, spec.shape) for spec in model_outputs(adopted)] == [("logits", ("N", 3, 8, 8))]
    assert model_inputs(raw)[0].shape == ("N", 8, 8, 3)  # what was given stays as it is


def test_a_softmax_gives_probabilities() -> None:
    raw = network(3, [node("Softmax", ["y"], ["mask"], name="softmax", axis=-1)])
    adopted = adopt(raw, card(3))
    want, have = both(raw, adopted, image(1, 3, 8, 8))
    assert np.array_equal(want, have)
    assert model_outputs(adopted)[0].name == "probabilities"


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("behind", ["nothing", "Cast", "Reshape"])
def test_one_probability_becomes_two_logits(behind: str, last: bool, opset: int) -> None:
    ends = [node("Sigmoid", ["y"], ["mask" if behind == "nothing" else "s"], name="sigmoid")]
    if behind == "Cast":
        ends.append(node("Cast", ["s"], ["mask"], name="cast", to=TensorProto.FLOAT))
    elif behind == "Reshape":
        ends.append(node("Reshape", ["s", "shape"], ["mask"], name="reshape"))
    raw = network(1, ends, last=last, opset=opset)
    if behind == "Reshape":
        shape = np.array([-1, 8, 8, 1] if last else [-1, 1, 8, 8], np.int64)
        raw.graph.initializer.append(onnx.numpy_helper.from_array(shape, "shape"))
    adopted = adopt(raw, card(2))
    want, have = both(raw, adopted, image(2, 3, 8, 8), last=last)
    assert have.shape == (2, 2, 8, 8)
    assert (have[:, 0] == 0).all()
    assert np.abs(1 / (1 + np.exp(-have[:, 1])) - want[:, 0]).max() < 1e-6
    assert ((have.argmax(1) == 1) == (want[:, 0] > 0.5)).all()
    assert model_outputs(adopted)[0].name == "logits"


def test_one_logit_becomes_two() -> None:
    raw = network(1)
    want, have = both(raw, adopt(raw, card(2)), image(1, 3, 8, 8))
    assert np.array_equal(have[:, 1:], want)
    assert (have[:, 0] == 0).all()


@pytest.mark.parametrize(
    "end",
    [
        node("HardSigmoid", ["y"], ["mask"], name="end"),
        node("Clip", ["y"], ["mask"], name="end"),
        node("Sigmoid", ["y"], ["mask"], name="end", domain="others"),
    ],
    ids=lambda end: f"{end.domain}{end.op_type}",
)
def test_one_channel_of_another_kind_is_refused(end: NodeProto) -> None:
    with pytest.raises(ModelError, match="neither a probability nor a logit") as caught:
        adopt(network(1, [end]), card(2))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (network(3, last=False), card(3)),
        (network(1), card(3)),  # another number of classes: for the exporter's check to refuse
        (network(2, last=False, channels=8), card(2)),
    ],
    ids=["channels first", "one channel of three classes", "no image"],
)
def test_what_need_not_or_cannot_be_adopted_stays(raw: ModelProto, said: ModelCard) -> None:
    adopted = adopt(raw, said)
    assert list(adopted.graph.output) == list(raw.graph.output)
    assert ops(adopted)[-1] == ops(raw)[-1]


def test_where_both_axes_could_be_channels_the_standards_order_stands() -> None:
    raw = model(
        [node("Conv", ["image", "w"], ["mask"], name="conv", kernel_shape=[1, 1])],
        {"image": [1, 3, 8, 3]},
        {"mask": [1, 3, 8, 3]},
        {"w": weights(3, 3, 1, 1)},
    )
    assert adopt(raw, card(3)) == raw


def test_a_subgraph_that_reads_the_image_reads_it_transposed() -> None:
    """If: its branches name the graph's input."""
    branch = helper.make_graph(
        [node("Identity", ["image"], ["copy"])], "branch", [], [helper.make_tensor_value_info("copy", 1, None)]
    )
    nodes = [
        node("If", ["yes"], ["chosen"], name="if", then_branch=branch, else_branch=branch),
        node("Transpose", ["chosen"], ["x"], name="in", perm=TO_FIRST),
        node("Conv", ["x", "w"], ["c"], name="conv"),
        node("Transpose", ["c"], ["mask"], name="out", perm=TO_LAST),
    ]
    raw = model(
        nodes, {"image": [1, 8, 8, 3]}, {"mask": [1, 8, 8, 2]}, {"w": weights(2, 3, 1, 1), "yes": np.array(True)}
    )
    want, have = both(raw, adopt(raw, card(2)), image(1, 3, 8, 8))
    assert np.array_equal(want, have)
