"""Layer by layer: where a candidate leaves FP32."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from pipeline.calibration.table import CalibrationTable
from pipeline.drift import DriftReport, drift, emulated
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.half import to_half
from pipeline.graph.quantize import quantize
from pipeline.printing import print_drift
from tests.tiny_unet import images, observed_table, tiny_unet

FEEDS = images(3)


def compared(typed: ModelProto, **more: int) -> DriftReport:
    return drift(tiny_unet(), typed, emulated(typed), FEEDS, "ONNX Runtime", **more)


def quantized(**changes: float) -> ModelProto:
    table = observed_table(tiny_unet(), FEEDS)
    return quantize(tiny_unet(), CalibrationTable("minmax", {**table.amax, **changes}), half=False)


def scaled(model: ModelProto, name: str, factor: float) -> ModelProto:
    """With one convolution's weights changed behind FP32's back."""
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * weight_type(weight, factor), name))
    return model


def weight_type(tensor: object, factor: float) -> np.ndarray:
    return np.asarray(factor, numpy_helper.to_array(tensor).dtype)  # type: ignore[arg-type]


def convolution(model: ModelProto, number: int) -> tuple[str, str]:
    """Weight and output of one."""
    node = [node for node in model.graph.node if node.op_type == "Conv"][number]
    return node.input[1], node.output[0]


def test_the_same_graph_does_not_drift() -> None:
    report = compared(tiny_unet())
    assert report.jump is None
    assert report.missing == ()
    assert {entry.sqnr_db for entry in report.tensors} == {None}
    assert all(entry.cosine == pytest.approx(1) and entry.max_abs_error == 0 for entry in report.tensors)
    assert [entry.tensor for entry in report.tensors] == [
        name for node in tiny_unet().graph.node for name in node.output
    ]


def test_int8_drifts_slowly_and_jumps_nowhere() -> None:
    report = compared(quantized())
    figures = {entry.tensor: entry for entry in report.tensors}
    assert report.jump is None
    assert 15 < (figures["logits"].sqnr_db or 0) < 45
    assert (report.images, report.ran) == (3, "ONNX Runtime")
    assert all(0.9 < (entry.cosine or 0) <= 1 for entry in report.tensors)
    ranged = [entry for entry in report.tensors if entry.saturated is not None]
    assert ranged
    assert all(entry.saturated == 0 for entry in ranged)


def test_fp16_drifts_less() -> None:
    half, int8 = compared(to_half(tiny_unet())), compared(quantized())
    assert half.jump is None
    pairs = zip(half.tensors, int8.tensors, strict=True)
    assert all((a.sqnr_db or math.inf) > (b.sqnr_db or math.inf) for a, b in pairs if b.sqnr_db is not None)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_planted_defect_is_named(number: int) -> None:
    weight, output = convolution(tiny_unet(), number)
    assert compared(scaled(quantized(), weight, 1.5)).jump == output


def test_a_range_that_clips_shows_as_saturation() -> None:
    relu = next(node.output[0] for node in tiny_unet().graph.node if node.op_type == "MaxPool")
    reader = next(node for node in tiny_unet().graph.node if node.op_type == "Conv" and relu in node.input)
    table = observed_table(tiny_unet(), FEEDS)
    report = compared(quantized(**{relu: table.amax[relu] / 8}))
    figures = {entry.tensor: entry for entry in report.tensors}
    assert (figures[relu].saturated or 0) > 0.05
    assert report.jump == reader.output[0]


class TestOfAnEngine:
    """The engine and what shows its tensors are both played by the typed graph on ONNX Runtime."""

    def shown(self, engine: ModelProto, showing: ModelProto) -> DriftReport:
        own = partial(emulated(engine), ["logits"])
        return drift(tiny_unet(), showing, emulated(showing), FEEDS, "an engine", limit=math.inf, engine=own)

    def test_what_lies_within_fused_layers_is_left_out(self) -> None:
        report = self.shown(quantized(), quantized())
        convolutions = [node for node in tiny_unet().graph.node if node.op_type == "Conv"]
        assert report.missing == tuple(node.output[0] for node in convolutions[:-1])
        assert "logits" in [entry.tensor for entry in report.tensors]

    def test_its_distance_from_the_engine_is_told(self) -> None:
        (same,) = self.shown(quantized(), quantized()).notes
        assert same.endswith("logits is the same as the engine's own")
        (other,) = self.shown(tiny_unet(), quantized()).notes
        found = re.search(r"logits is ([\d.]+) dB \(SQNR\) from the engine's own$", other)
        assert found is not None
        assert float(found[1]) == pytest.approx(compared(quantized()).tensors[-1].sqnr_db or 0, abs=0.5)

    @pytest.mark.parametrize("where", ["engine", "shown"])
    def test_values_that_are_not_finite(self, where: str) -> None:
        """An overflow of the engine, or of what shows its tensors, ends nothing."""
        weight, _ = convolution(tiny_unet(), 1)
        fine, broken = tiny_unet(), scaled(tiny_unet(), weight, math.inf)
        report = self.shown(broken, fine) if where == "engine" else self.shown(fine, broken)
        if where == "engine":
            assert report.notes == ("logits of the engine itself holds NaN or infinite values",)
            report.verdict()
        else:
            with pytest.raises(CheckFailed, match="hold NaN or infinite values"):
                report.verdict()

    @pytest.mark.parametrize("number", [0, 2])
    def test_a_planted_defect_is_named_by_its_layers_result(self, number: int) -> None:
        weight, output = convolution(tiny_unet(), number)
        wrong = scaled(quantized(), weight, 1.5)
        assert self.shown(wrong, wrong).jump == f"{output}.relu"


def test_groups_change_nothing() -> None:
    typed = quantized()
    assert compared(typed, limit=1) == compared(typed)


def test_tensors_that_are_gone_are_missing() -> None:
    typed = quantized()
    for node in typed.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == "resized":
                    names[place] = "fused"
    report = compared(typed)
    assert report.missing == ("resized",)
    assert "resized" not in [entry.tensor for entry in report.tensors]


def test_values_that_are_not_finite_are_named() -> None:
    weight, output = convolution(tiny_unet(), 1)
    typed = scaled(tiny_unet(), weight, math.inf)
    report = drift(tiny_unet(), typed, emulated(typed), FEEDS, "x", names=["a", "b", "c"])
    assert report.jump == output
    first = next(entry for entry in report.tensors if entry.not_finite)
    assert first.tensor == output
    assert set(first.not_finite) == {"a", "b", "c"}
    assert all(entry.sqnr_db is None or math.isfinite(entry.sqnr_db) for entry in report.tensors)
    assert len(report.tensors) == len(compared(tiny_unet()).tensors)
    with pytest.raises(CheckFailed, match=rf"first in {output}: \d+ values, most in [abc]: \d+"):
        report.verdict()
    compared(tiny_unet()).verdict()


def test_a_network_that_is_not_finite_itself() -> None:
    weight, output = convolution(tiny_unet(), 1)
    model = scaled(tiny_unet(), weight, math.inf)
    with pytest.raises(ModelError, match=f"tensor {output} of the FP32 graph holds [0-9]+ NaN") as caught:
        drift(model, model, emulated(model), FEEDS, "x", names=["a", "b", "c"])
    assert caught.value.got == "them in a"


def test_without_images() -> None:
    with pytest.raises(ModelError, match="no image"):
        drift(tiny_unet(), tiny_unet(), emulated(tiny_unet()), [], "x")


def test_tensors_that_were_not_compared_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = DriftReport("tensorrt 8.6.0", 4, (), None, ("a", "b", "c", "d", "e"))
    print_drift({"fp16": report}, json=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not compared" in line)
    assert line.startswith("fp16: 5 tensors not compared")
    assert line.endswith(": a, b, c and 2 more")
