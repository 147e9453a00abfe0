"""Where the time goes and the verdict, on real layers of TensorRT 8.6.0 (tests/data/layers)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import Device
from pipeline.backends.layers import EngineLayer, parse_layers
from pipeline.metrics.latency import Estimate
from pipeline.speed import account, judge, no_verdict

DATA = Path(__file__).parent.parent / "data" / "layers"
H200 = Device("NVIDIA H200", "9.0", "580.159.03")


def real(name, device=H200, macs=None):
    layers = parse_layers((DATA / f"{name}.json").read_text())
    times = json.loads((DATA / f"{name}.profile.json").read_text())
    convolutions = [layer for layer in layers if layer.group == "conv"]
    counted = {layer.nodes[0]: 10**9 for layer in convolutions} if macs is None else macs
    return account("f" * 64, layers, times, counted, device, 0.5)


def layer(name, group="conv", precision="int8"):
    return EngineLayer(name, "", group, precision, (), (), "", (name,), False, None)


def estimate(low, median, high):
    return Estimate(median, low, high, 0.961)


def test_account_of_an_int8_engine():
    found = real("int8-explicit")
    assert found.macs == {"int8": 15 * 10**9}
    assert found.int8_share == 1
    assert found.profiled_ms == pytest.approx(sum(row.ms for row in found.groups))
    assert sum(row.share for row in found.groups) == pytest.approx(1)
    assert [row.group for row in found.groups] == ["conv", "resize", "pool", "concat", "reformat"]
    assert found.bytes == sum(row.bytes for row in found.groups)
    assert found.floor.arithmetic_ms == pytest.approx(2 * 15e9 / 1979e12 * 1e3)
    assert found.floor.traffic_ms == pytest.approx(found.bytes / 4.8e12 * 1e3)
    assert "data sheet" in found.floor.source


def test_convolutions_in_no_layer_are_unknown():
    found = real("fp16", macs={"outc.conv": 3, "elsewhere": 1})
    assert found.macs == {"unknown": 1, "fp16": 3}
    assert (found.int8_share, found.floor) == (None, None)
    assert "unknown precision" in found.no_floor


@pytest.mark.parametrize(
    "device",
    [None, Device("NVIDIA H100 PCIe", "9.0", "1"), Device("NVIDIA H200", "8.0", "1"), Device("NVIDIA L4", "8.9", "1")],
)
def test_no_floor_where_the_rates_are_not_known(device):
    found = real("fp16", device)
    assert found.floor is None
    assert "not in the table" in found.no_floor


def test_no_floor_without_a_graph():
    found = real("fp16", macs={})
    assert (found.macs, found.int8_share, found.floor) == ({}, None, None)


def test_worthwhile():
    verdict = judge(estimate(1.18, 1.2, 1.21), 1.0, real("int8-explicit"), real("fp16"))
    assert verdict.worthwhile is True
    assert verdict.sentence == "INT8 is 1.200 ± 0.015 times FP16's speed (1.180 to 1.210 at 96%): worthwhile."
    coverage, concats, copies, groups = verdict.reasons
    assert coverage == "100.0% of 15 GMAC run in INT8."
    assert concats.startswith("3 concatenation input(s) are requantized, 0.059 ms")
    assert "inc.double_conv.3.concat.quantize_clone_0 (fp16 NC/32HW32 to int8 NC/32HW32, 0.032 ms)" in concats
    assert "7 reformat(s) or copies" in copies
    assert "inc.double_conv.3.maxpool.quantize" in copies
    assert "image.quantize" in copies
    assert "conv 0.375 ms" in groups
    assert "against" in groups


def test_sparse_kernels_are_counted():
    """Names as TensorRT 8.6.0 gives them on an H200."""
    tactics = (
        "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x128x32_tapsperload3_threadspercta128_r3s3_u1v1_scalebias_relu",
        "sm90_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32_tilesize64x128x128",
        "sm80_xmma_fprop_avdt_dense_chw_int8int8_tilesize16x16_k32_fltsteps1_threadspercta256_r3s3_u1v1_scalebias_relu",
    )
    layers = [replace(layer(f"c{place}"), tactic=tactic) for place, tactic in enumerate(tactics)]
    int8 = account("f" * 64, [*layers, layer("p", "pool")], {}, {}, H200, 0.5)
    assert judge(estimate(1.1, 1.2, 1.3), 1, int8, None).reasons == ("1 of 3 convolution(s) run sparse kernels.",)


@pytest.mark.parametrize(
    ("low", "wanted", "worthwhile"), [(1.001, 1.0, True), (1.0, 1.0, False), (0.98, 1.0, False), (1.2, 1.4, False)]
)
def test_the_whole_interval_has_to_lie_above(low, wanted, worthwhile):
    verdict = judge(estimate(low, 1.3, 1.5), wanted, None, None)
    assert verdict.worthwhile is worthwhile
    assert verdict.sentence.endswith("): worthwhile." if worthwhile else "): not worthwhile.")
    assert ("1.4 wanted" in verdict.sentence) is (wanted == 1.4)
    assert verdict.reasons == ()


def test_convolutions_that_fell_back_are_named():
    engine = account("", parse_layers((DATA / "fallback.json").read_text()), {}, {"a": 1}, None, 0.5)
    stayed = judge(estimate(0.1, 0.1, 0.1), 1.0, engine, None).reasons[1]
    assert stayed.startswith("4 convolution(s) stayed in another precision: ")
    assert "(FP32)" in stayed
    assert "(FP16)" in stayed


def test_long_lists_are_cut():
    engine = account("", [layer(f"conv{i}", precision="fp16") for i in range(9)], {}, {}, None, 0.5)
    (stayed,) = judge(estimate(1, 1, 1), 1.0, engine, None).reasons
    assert stayed.endswith("conv5 (FP16) and 3 more.")


def test_names_alone_claim_nothing():
    engine = account("", parse_layers('{"Layers": ["a + b", "c"]}', {"a": "Conv"}), {}, {"a": 5}, H200, 0.5)
    assert engine.macs == {"unknown": 5}
    assert judge(estimate(1, 1, 1), 1.0, engine, None).reasons == (
        "0.0% of 5e-09 GMAC run in INT8; 100.0% are in layers that do not say.",
    )


def test_no_verdict():
    verdict = no_verdict(1.0, "no GPU")
    assert (verdict.worthwhile, verdict.speedup) == (None, None)
    assert verdict.sentence == "Whether INT8 is faster than FP16 cannot be said here: no GPU"
