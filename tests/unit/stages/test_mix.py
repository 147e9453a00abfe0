"""The stage on a network with one convolution that INT8 ruins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import Device, from_json
from pipeline.backends.rates import Rates
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Config, MixedConfig, load_config
from pipeline.errors import CalibrationError, ConfigError, EngineError, ModelError
from pipeline.graph.placement import quantizable
from pipeline.metrics.latency import Estimate
from pipeline.mixed.chart import chart
from pipeline.mixed.cost import BORDER_FACTOR, CostModel
from pipeline.mixed.report import MixReport
from pipeline.printing import print_mix
from pipeline.stages.mix import excluded, mix
from tests.planted_unet import CARD, PREPROCESSING, SENSITIVE, feeds, planted_unet, samples
from tests.recorded_engines import engine, layer
from tests.tiny_unet import SIZE, observed_table, save, tiny_unet

CLEAN = planted_unet()
HELD_OUT = samples(4, seed=7, model=CLEAN)
TABLE = observed_table(CLEAN, feeds(CLEAN, samples(6, seed=1)))


def config(**sections: object) -> Config:
    return Config.model_validate(
        {
            "name": "planted",
            "network": {"onnx": "model.onnx"},
            "data": {"kind": "cells", "classes": [each.model_dump() for each in CARD.classes]},
            "preprocessing": PREPROCESSING.model_dump(),
            "mixed": {"max_miou_drop": 0.03, "judge_by": "figure"},
            **sections,
        }
    )


def run(folder: Path, settings: Config | None = None, images=HELD_OUT, table=TABLE, model=CLEAN, **more) -> MixReport:
    clean = save(model, folder / "clean.onnx")
    return mix(clean, table, images, settings or config(), CARD, None, folder, **more)


@pytest.fixture(scope="module", autouse=True)
def _weak_gpu():
    """On real ones so small a network takes the time of its kernels' starts, in any precision."""
    weak = Rates({"int8": 2e9, "fp16": 1e9}, 1e12, "an H200, but slow")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.stages.mix.DEFAULT_RATES", weak)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture(scope="module")
def report(folder) -> MixReport:
    return run(folder)


def test_the_planted_convolution_is_found_and_excluded(report):
    assert report.convolutions[0].name == SENSITIVE
    assert report.convolutions[0].figures.agreement < report.convolutions[1].figures.agreement - 0.05
    assert SENSITIVE in report.choice.half
    assert len(report.choice.half) < 4
    assert SENSITIVE in report.patterns


def test_the_budget_is_kept(report):
    assert report.fp32_miou == 1
    int8 = next(one for one in report.candidates if not one.half)
    assert (int8.figures.miou_drop or 0) > 0.03 >= (report.choice.figures.miou_drop or 0)
    assert not int8.kept
    assert report.choice.kept
    assert report.choice.accepted
    assert report.choice.ms == min(one.ms for one in report.candidates if one.kept)
    assert any(not one.accepted for one in report.candidates)


def test_what_is_kept_of_the_speed_up(report):
    half, int8 = report.candidates[:2]
    assert (len(half.half), len(int8.half)) == (7, 0)
    assert report.speedup_kept == pytest.approx((half.ms / report.choice.ms) / (half.ms / int8.ms))
    assert 0 < report.speedup_kept < 1
    assert report.gain_kept == pytest.approx((half.ms - report.choice.ms) / (half.ms - int8.ms))


def test_the_interval_is_judged_unless_the_config_says_otherwise(tmp_path, report):
    careful = run(tmp_path, config(mixed={"max_miou_drop": 0.03}))
    bounds = careful.choice.figures.miou_drop_interval
    assert bounds is not None
    assert bounds.high <= 0.03
    assert careful.choice.ms >= report.choice.ms
    assert not any("on other images" in note for note in careful.notes)


def test_blocks_are_no_better_than_their_convolutions_together(report):
    sensitive = next(block for block in report.blocks if SENSITIVE in block.nodes)
    assert sensitive == report.blocks[0] or sensitive.figures.agreement <= report.blocks[1].figures.agreement + 0.05
    assert sorted(name for block in report.blocks for name in block.nodes) == sorted(
        each.name for each in report.convolutions
    )
    assert sum(block.macs for block in report.blocks) == sum(each.macs for each in report.convolutions)


def test_what_is_estimated_is_said(report):
    assert report.latency == "estimated"
    assert "H200" in report.rates
    assert any("no GPU here" in note for note in report.notes)
    assert any("only 4 held-out images" in note for note in report.notes)


def test_what_the_implicit_route_adds_is_said(report, tmp_path):
    loose = {"mixed": {"max_miou_drop": 1.0}, "engine": {"route": "implicit"}}
    assert any("implicit route" in note for note in run(tmp_path, config(**loose), HELD_OUT[:2]).notes)
    assert not any("implicit route" in note for note in report.notes)


def test_an_unknown_gpu_is_said(tmp_path):
    clean = save(CLEAN, tmp_path / "clean.onnx")
    loose = config(mixed={"max_miou_drop": 1.0})
    found = mix(clean, TABLE, HELD_OUT[:2], loose, CARD, Device("Odd GPU", "7.5", "1"), tmp_path)
    assert any("those of Odd GPU are unknown" in note for note in found.notes)


def test_report_and_configuration_are_written(folder, tmp_path):
    report = run(tmp_path)
    assert from_json(MixReport, tmp_path / "report.json") == report
    written = load_config(tmp_path / "config.yaml")
    assert written.engine.exclude == report.patterns
    assert written.preprocessing == PREPROCESSING
    left = {node.name for node in quantizable(CLEAN, written.engine.exclude)}
    assert left == {node.name for node in quantizable(CLEAN, ())} - set(report.choice.half)
    (line,) = (text for text in (tmp_path / "config.yaml").read_text().splitlines() if "--set" in text)
    assignment = line.removeprefix("# --set 'engine.exclude=").removesuffix("'")
    assert tuple(yaml.safe_load(assignment)) == report.patterns


def test_patterns_match_odd_names_alone():
    model = tiny_unet()
    for node in model.graph.node:
        node.name = f"{node.name}[0]*"
    assert len(quantizable(model, excluded(["bottom[0]*"]))) == len(quantizable(model, ())) - 1


def test_what_the_config_excludes_stays_out(tmp_path):
    report = run(tmp_path, config(engine={"exclude": [SENSITIVE]}, mixed={"max_miou_drop": 0.03}))
    assert SENSITIVE not in [each.name for each in report.convolutions]
    assert report.patterns[0] == SENSITIVE
    assert report.choice.kept


class FakeGpu:
    """Every node takes a millisecond as a layer of its own, convolutions 3 in FP16; every border between two
    precisions, as the graph's edges have it, takes ``border``."""

    def __init__(self, border: float, profiles: bool = True) -> None:
        self.border, self.profiles = border, profiles
        self.sessions: list[list[tuple[str, ...]]] = []

    def time(self, choices):
        self.sessions.append(list(choices.values()))
        return {name: Estimate(self.milliseconds(half), 0, 99, 0.95) for name, half in choices.items()}

    def profile(self, half, whole_ms):
        if not self.profiles:
            raise EngineError("the engine reports no layer's time")
        return engine([layer(row) for row in self.rows(half)], whole_ms)

    def milliseconds(self, half):
        cost = CostModel(CLEAN, {"image": (1, 3, SIZE, SIZE)})
        return sum(row["ms"] for row in self.rows(half)) + self.border * cost.borders(set(cost.macs) - set(half))

    def rows(self, half):
        for node in CLEAN.graph.node:
            if node.op_type != "Relu":
                yield {"nodes": [node.name], "ms": 3.0 if node.name in half else 1.0}


def test_measured_times_decide(tmp_path):
    gpu = FakeGpu(border=0.5)
    report = run(tmp_path, timer=gpu)
    assert (report.latency, report.estimates) == ("measured", "layers")
    assert report.rates.startswith("kernels of the engines all FP16 and all INT8, as profiled")
    half, int8 = report.candidates[:2]
    assert (half.ms, int8.ms) == (gpu.milliseconds(half.half), gpu.milliseconds(()))
    assert half.estimated_ms == pytest.approx(half.ms)
    assert int8.estimated_ms == pytest.approx(int8.ms)
    assert SENSITIVE in report.choice.half
    assert report.choice.ms == min(one.ms for one in report.candidates if one.kept and one.measured_ms) < half.ms
    assert report.speedup_kept == pytest.approx(int8.ms / report.choice.ms)
    assert len(gpu.sessions) == 2  # both ends for the cost model, then the finalists
    assert chart(report).count("<circle") == len(gpu.sessions[1]) <= 2 + MixedConfig().finalists
    assert not any("estimated" in note for note in report.notes)


def test_borders_dearer_than_estimated_are_corrected_once(tmp_path, caplog, capsys):
    gpu = FakeGpu(border=9)
    report = run(tmp_path, timer=gpu)
    assert len(gpu.sessions) == 3
    assert gpu.sessions[2][: len(gpu.sessions[1])] == gpu.sessions[1]
    assert report.border_factor > BORDER_FACTOR
    assert len(report.candidates) <= MixedConfig().candidates
    timed = [one for one in report.candidates if one.measured_ms]
    assert len(timed) > 2
    for one in timed:
        assert one.estimated_ms == pytest.approx(one.ms, rel=0.01)
    assert len(report.choice.half) == len(report.convolutions)
    assert report.why_all_half.startswith("no mixture that keeps the budget is faster than FP16 (the fastest takes ")
    assert report.why_all_half.endswith(" ms, measured)")
    caplog.set_level("INFO", "pipeline")
    print_mix(report)
    assert f"all 7 convolutions stay FP16: {report.why_all_half}" in capsys.readouterr().err


def test_engines_that_cannot_be_profiled(tmp_path):
    report = run(tmp_path, timer=FakeGpu(border=0.5, profiles=False))
    assert (report.latency, report.estimates) == ("measured", "rates")
    assert "H200" in report.rates
    assert "the engine reports no layer's time: estimates are at the GPU's rates" in report.notes
    assert report.choice.kept


def test_nothing_but_fp16_keeps_the_budget(tmp_path):
    report = run(tmp_path, config(mixed={"min_agreement": 1.0}), samples(2, 7, CLEAN), timer=FakeGpu(border=20))
    assert len(report.choice.half) == len(report.convolutions)
    assert report.why_all_half == "nothing else that was judged keeps the budget"


def test_a_mixture_needs_no_reason(report):
    assert report.why_all_half == ""


def test_without_labels_agreement_is_the_budget(tmp_path):
    bare = samples(3, seed=7)
    with pytest.raises(ConfigError, match="cannot be judged without labels"):
        run(tmp_path, config(mixed={}), images=bare)
    with pytest.raises(ConfigError, match="cannot be judged without labels") as caught:
        run(tmp_path, config(mixed={"max_miou_drop": 0.1, "min_agreement": 0.9}), images=bare)
    assert "max_miou_drop: null" in caught.value.fix
    report = run(tmp_path, config(mixed={"min_agreement": 0.95}), images=bare)
    assert SENSITIVE in report.choice.half
    assert report.choice.figures.agreement >= 0.95
    assert report.choice.figures.miou is None
    assert (report.max_miou_drop, report.labelled) == (None, 0)


def test_bad_input(tmp_path):
    with pytest.raises(CalibrationError, match="no calibration image is left"):
        run(tmp_path, images=[])
    with pytest.raises(CalibrationError, match="is the validation image twin"):
        run(tmp_path, others={HELD_OUT[1].content_hash(): "twin"})
    with pytest.raises(CalibrationError, match=r"lacks|another graph"):
        run(tmp_path, table=CalibrationTable("entropy", {"image": 1.0}))
    with pytest.raises(ModelError, match="no convolution is left"):
        run(tmp_path, config(engine={"exclude": ["*"]}))
    with pytest.raises(ValueError, match="without a budget"):
        config(mixed={"max_miou_drop": None})


def test_the_chart(report):
    svg = chart(report)
    assert svg.count("<circle") == len(report.candidates)
    assert svg.count('stroke-width="3"') == 1
    assert "budget" in svg
    assert "drop of mean IoU" in svg
