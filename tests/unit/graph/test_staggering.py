"""The image in finer steps: copies of it, each a part of a step further, for the convolutions that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from pipeline.calibration.table import CalibrationTable
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.graph.emulate import exactly_rounded
from pipeline.graph.quantize import quantize
from tests.unit.graph.builders import array, conv_net, model, ops, run, weights

REPOSITORY = Path(__file__).parents[3]
AMAX = 4.0
STEP = AMAX / 127
TABLE = CalibrationTable("minmax", {"image": AMAX, "a": 9.0, "a.relu": 5.0, "b": 9.0, "b.relu": 6.0, "logits": 9.0})


def one_convolution(weight: np.ndarray, **attributes: Any) -> ModelProto:
    node = helper.make_node("Conv", ["image", "weight"], ["logits"], name="conv", **attributes)
    channels, side = (
        weight.shape[1] * attributes.get("group", 1),
        9 - weight.shape[2] + sum(attributes.get("pads", [0])) // 2,
    )
    return model([node], {"image": (1, channels, 8, 8)}, {"logits": (1, len(weight), side, side)}, {"weight": weight})


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bits", "parts"), [(8, 1), (9, 2), (10, 4)])
def test_steps_are_as_fine_as_the_bits_say(bits: Any, parts: int, half: bool) -> None:
    # A weight that is its own scale's 127 is held exactly, so that what is left is the image's rounding.
    proto = one_convolution(np.full((1, 1, 1, 1), 0.5, np.float32))
    feed = np.linspace(-0.97 * AMAX, 0.97 * AMAX, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    if half:
        feed = feed.astype(np.float16).astype(np.float32)
    typed = quantize(proto, TABLE, half=half, input_bits=bits)
    (found,) = run(exactly_rounded(typed) if half else typed, image=feed)
    error = np.abs(2 * found - feed).max()
    # FP16 holds an image of up to 4 in steps of 1/256 to 1/512: sixteenths of an INT8 step.
    slack = 0.15 * STEP if half else 1e-6
    assert error <= STEP / 2 / parts + slack
    assert error > 0.8 * STEP / 2 / parts


def test_zero_padding_stays_zero() -> None:
    proto = one_convolution(weights(4, 3, 3, 3), pads=[1, 1, 1, 1])
    feed = np.zeros((1, 3, 8, 8), np.float32)
    for bits in (8, 9, 10):
        assert not run(quantize(proto, TABLE, half=False, input_bits=bits), image=feed)[0].any()


def test_only_what_reads_the_image_has_copies_and_one_pair_serves_all() -> None:
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], name="first"),
        helper.make_node("Conv", ["image", "w"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["a.relu"]),
        helper.make_node("Conv", ["a.relu", "v"], ["logits"], name="deep"),
    ]
    kernels = {"w": weights(2, 3, 3, 3), "v": weights(2, 2, 1, 1)}
    proto = model(nodes, {"image": (1, 3, 8, 8)}, {"logits": (1, 2, 6, 6)}, kernels)
    typed = quantize(proto, TABLE, half=False, input_bits=9)
    convolutions = {node.name: node for node in typed.graph.node if node.op_type == "Conv"}
    assert convolutions["first"].input[0] == convolutions["second"].input[0]
    assert ops(typed).count("Concat") == 1
    assert ops(typed).count("QuantizeLinear") == 5  # the copies, a.relu, and three weights
    assert {t.name: tuple(t.dims) for t in typed.graph.initializer}["v"] == (2, 2, 1, 1)
    # What nothing reads any more is gone.
    read = {name for node in typed.graph.node for name in node.input}
    assert all(tensor.name in read for tensor in typed.graph.initializer)
    assert array(typed, "w.copies").shape == (2, 6, 3, 3)


@pytest.mark.parametrize(
    ("proto", "exclude"),
    [
        (one_convolution(weights(4, 9, 3, 3)), ()),
        (one_convolution(weights(4, 1, 3, 3), group=4), ()),
        (conv_net(), ("a",)),
    ],
    ids=["too many channels for one kernel", "grouped", "excluded"],
)
def test_others_stay_as_they_are(proto: ModelProto, exclude: tuple[str, ...]) -> None:
    plain, fine = (quantize(proto, TABLE, half=False, exclude=exclude, input_bits=bits) for bits in (8, 10))
    assert fine == plain


def test_what_a_pool_gives_is_read_as_it_is() -> None:
    nodes = [
        helper.make_node("MaxPool", ["image"], ["a.relu"], kernel_shape=[2, 2]),
        helper.make_node("Conv", ["a.relu", "w"], ["logits"], name="conv"),
    ]
    proto = model(nodes, {"image": (1, 3, 8, 8)}, {"logits": (1, 2, 5, 5)}, {"w": weights(2, 3, 3, 3)})
    plain, fine = (quantize(proto, TABLE, half=False, qdq="shared", input_bits=bits) for bits in (8, 10))
    assert fine == plain


@pytest.mark.parametrize("setting", ["engine.route=implicit", "engine.source=network-api"])
def test_what_cannot_have_more_bits_says_so(setting: str) -> None:
    with pytest.raises(ConfigError, match="input_bits"):
        load_config(REPOSITORY / "configs" / "cells.yaml", [setting, "engine.input_bits=9"])
