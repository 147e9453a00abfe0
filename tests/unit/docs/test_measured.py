"""Tables of docs that say what was measured hold what benchmarks/results do."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

import pytest

from pipeline.config import MixedConfig
from tests.conftest import REPOSITORY
from tests.results import content, numbers, shown, table_rows

DOCS = REPOSITORY / "docs"
NAMED = re.compile(r"benchmarks/results/([\w.-]+\.json)")
# Three decimals at least: rounder ones agree with anything; more than six are no measurement. Differences, with a
# sign or "less", are computed.
PRECISE = re.compile(r"(?<![\w.+-])(\d+\.\d{3,6})(?![\w.])(?! ms less)")
# Shares are shown as percentages, and some times of a batch of 8 for one image.
SCALES = (1, 100, 1 / 8)
UNET = "2026-11-21-h200-performance-2.json"
CAMVID = "2026-11-21-h200-shared.json"
CAMVID_FP32 = "2026-11-21-h200-tensorrt-8.6.0.json"
VIDEO = "2026-11-22-h200-video.json"
TOGETHER = "2026-11-22-h200-benchmark-camvid.json"
FLEETS = tuple(f"2026-11-22-h200-fleet{number}.json" for number in ("", "-2", "-3"))
REFINED, REFINED_600 = "2026-11-22-h200-refined.json", "2026-11-22-h200-refined-2.json"
SEARCHED = "2026-11-22-h200-refined-3.json"
PREDICT, PREDICT_EARLIER = "2026-11-22-h200-predict-3.json", "2026-11-22-h200-predict.json"


def figures() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Page, figure of a table, and the results that its section names, or else the page."""
    pages = ("benchmark", "deploying", "driving", "performance", "predicting", "pruning", "wts")
    for name in (f"{page}.md" for page in pages):
        page = (DOCS / name).read_text(encoding="utf-8")
        for section in re.split(r"\n(?=## )", page):
            table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
            sources = tuple(NAMED.findall(section) or NAMED.findall(page))
            yield from ((name, figure, sources) for figure in sorted(set(PRECISE.findall(table))))


@pytest.mark.parametrize(("page", "figure", "sources"), figures(), ids=lambda value: str(value) if value else "")
def test_every_precise_figure_of_a_table_is_in_the_results_that_it_names(
    page: str, figure: str, sources: tuple[str, ...]
) -> None:
    found = (number for source in sources for number in numbers(content(source)))
    assert any(shown(number * scale, figure) == figure for number in found for scale in SCALES)


def table_below(text: str, page: str = "benchmark.md") -> list[dict[str, str]]:
    """The rows of the first table behind a text of a page."""
    below = (DOCS / page).read_text(encoding="utf-8").partition(text)[2]
    found = re.search(r"^\|(?:.*\n\|)+.*$", below, re.MULTILINE)
    assert found, text
    return table_rows(found[0])


def times(numerator: float, denominator: float, like: str) -> bool:
    """Whether a text says "… N times …" of two figures."""
    found = re.search(r"([\d.]+) times", like)
    return found is not None and shown(numerator / denominator, found[1]) == found[1]


def test_torch_beside_the_engines() -> None:
    network = content(UNET)["networks"]["unet"]
    torch, tries = network["torch"]["median_ms"], network["tries"]
    measured = {
        "PyTorch eager, FP32": torch["torch eager, FP32"],
        "PyTorch eager, TF32": torch["torch eager, TF32"],
        "PyTorch eager, FP16, channels-last": torch["torch eager, FP16 channels-last"],
        "torch.compile, max-autotune, FP16, channels-last": torch["torch.compile max-autotune, FP16 channels-last"],
        "FP16 engine": tries["fp16"]["median_ms"],
        "INT8 engine": tries["int8, shared"]["median_ms"],
    }
    table = {row.pop(""): tuple(row.values()) for row in table_below("**PyTorch, FP32, FP16 and INT8")}
    assert "fp32" not in tries
    assert table.pop("FP32 engine") == ("not measured", "")
    slowest = measured["PyTorch eager, FP32"]
    assert table == {name: (f"{ms:.3f}", f"{slowest / ms:.1f}") for name, ms in measured.items()}


def test_latency_and_miou() -> None:
    stored_rows = {row["precision"]: row for row in content(CAMVID)["configs"]["camvid"]["rows"]}
    assert "gpu_ms" not in stored_rows["fp32"]
    earlier = {row["precision"]: row["gpu_ms_p50"] for row in content(CAMVID_FP32)["configs"]["camvid"]["rows"]}
    table = table_below("**Latency and mIoU")
    for row in table:
        found = stored_rows[row["engine"].lower()]
        ms = found["gpu_ms"]["median"] if "gpu_ms" in found else earlier[row["engine"].lower()]
        change = found["mean_iou"] - found["fp32_onnxruntime_mean_iou"]
        assert (row["milliseconds"], row["mIoU"]) == (f"{ms:.3f}", f"{found['mean_iou']:.4f}")
        assert float(row["change"]) == pytest.approx(change, abs=0.00005)
        assert row["same class"] == f"{100 * found['agreement']:.2f} %"
    assert f"FP16 took {earlier['fp16']:.3f} ms" in (DOCS / "benchmark.md").read_text(encoding="utf-8")
    assert [row["engine"].lower() for row in table] == list(stored_rows)


def test_video_and_validation() -> None:
    measured = {
        name.upper(): (
            f"{found['frames_per_second']:.0f}",
            f"{found['video_frames_per_second_masks']:.0f}",
            f"{found['video_frames_per_second_overlays']:.0f}",
            ", ".join(f"{seconds:.2f}" for seconds in found["validation_seconds"]),
            f"{found['mean_iou']:.4f}",
        )
        for name, found in content(VIDEO)["engines"].items()
    }
    assert {row.pop("engine"): tuple(row.values()) for row in table_below("**Video and validation")} == measured


def test_everything_else_beside_the_engines() -> None:
    stored = content(TOGETHER)
    table = table_below("## One run beside everything else")
    assert len(table) == len(stored["timings"])
    for row, timing in zip(table, stored["timings"], strict=True):
        median, name = timing["median_ms"], timing["name"]
        rates = [each["images_per_second"] for each in stored["throughput"] if each["name"] == name]
        said, called = (text.lower().replace(",", "").removesuffix(" engine") for text in (row["candidate"], name))
        assert said == called
        assert row["end to end, ms"] == f"{timing['end_to_end']['p50_ms']:.3f}"
        assert row["images/s"] == f"{max(rates):.0f}"
        assert row["file, MB"] == f"{timing['bytes'] / 1e6:.1f}"
        if median is None:
            assert (row["GPU, ms"], row["times the fastest"], row["GPU, MB"]) == ("", "", "")
            continue
        ms = f"{median['median']:.3f} ({median['low']:.3f} to {median['high']:.3f})"
        assert row["GPU, ms"].replace("*", "") == ms
        assert row["times the fastest"] == f"{timing['ratio']['median']:.2f}"
        assert row["GPU, MB"] == f"{timing['gpu_bytes'] / 1e6:.0f}"


def test_two_gpus() -> None:
    through_ray, more, visits = (content(name) for name in FLEETS)
    last = visits["15 workers a GPU, portions of 2 s"]
    one, two = last["rows"]
    table = table_below("## Tested", "scale.md")
    for row, kind in zip(table, ("png", "arrays"), strict=True):
        first, second = (each[kind]["images_per_second"] for each in (one, two))
        assert (row["1 GPU, 15 workers"], row["2 GPUs, 30 workers"]) == (f"{first:.0f}", f"{second:.0f}")
        assert row["times"] == f"{last['scaling'][kind]:.2f}"
    assert (one["workers"], two["workers"], last["equal_masks"]) == (15, 30, True)
    runs = [
        through_ray["rows"],
        more["15 workers a GPU"]["rows"],
        *(visits[f"{count} workers a GPU, portions of 64 images"]["rows"] for count in (14, 8)),
        last["rows"],
    ]
    for row, (one, two) in zip(table_below("took three steps", "scale.md"), runs, strict=True):
        first, second = (each["png"]["images_per_second"] for each in (one, two))
        assert (row["1 GPU"], row["2 GPUs"], row["times"]) == (f"{first:.0f}", f"{second:.0f}", f"{second / first:.2f}")
        assert row["workers a GPU"] == str(one["workers"])


def test_refined_engines() -> None:
    """Rows of docs/calibration.md and docs/mixed.md."""
    first, runs = content(REFINED), content(REFINED_600)["runs"]
    alone, equalized = runs["refined"], runs["equalized and refined"]
    table = {row[""].replace("*", ""): row for row in table_below("in 600 steps on that GPU", "calibration.md")}
    engines = {
        "FP16 engine": first["engines"]["fp16"],
        "refined, all INT8, engine": first["engines"]["int8"],
        "refined, the first two convolutions in FP16, engine (`mixed`)": first["engines"]["mixed"],
        "refined in 600 steps, all INT8, engine": alone["engines"]["int8"],
        "equalized by 16 images, then the same, engine": equalized["engines"]["int8"],
        "refined in 600 steps, the first three convolutions in FP16, engine (`mixed`)": alone["engines"]["mixed"],
    }
    for name, engine in engines.items():
        row, drop = table[name], engine["miou_drop"]
        assert row["ms"] == f"{engine['median_ms']['median']:.3f}"
        assert row["same class"] == f"{engine['agreement']:.3%}".replace("%", " %")
        shown_drop = row["mIoU drop, points (95 % over images)"]
        assert shown_drop.startswith(f"{100 * drop['value']:.3f}")
        if "(" in shown_drop:
            low, high = (100 * drop["interval"][end] for end in ("low", "high"))
            assert f"({low:.2f} to {high:.2f})" in shown_drop
    assert alone["int8_over_fp16"]["median"] > 1.32


def test_the_search_on_a_gpu() -> None:
    """Rows of docs/mixed.md, and what its text says of the budgets."""
    stored = content(SEARCHED)
    chosen = stored["mixed"]["candidates"][stored["mixed"]["chosen"]]
    rows = {row[""].replace("*", ""): row for row in table_below("refined in 600 steps", "mixed.md")}
    for candidate, name, engine in zip(
        stored["mixed"]["candidates"], ("all FP16", "all INT8, chosen"), ("fp16", "mixed"), strict=True
    ):
        assert name.startswith(candidate["move"])
        row, drop = rows[name], stored["engines"][engine]["miou_drop"]
        assert row["measured, ms"] == f"{candidate['measured_ms']['median']:.3f}"
        held_out = candidate["figures"]["miou_drop"]
        assert row["held out: mIoU drop, points"].split(" ")[0] == (f"{100 * held_out:.3f}" if held_out else "0")
        low, high = (100 * drop["interval"][end] for end in ("low", "high"))
        assert row["validated: mIoU drop, points"] == f"{100 * drop['value']:.3f} ({low:.2f} to {high:.2f})"
    assert chosen["move"] == "all INT8"
    assert chosen["figures"]["miou_drop_interval"]["high"] < MixedConfig().max_miou_drop
    assert stored["engines"]["mixed"]["passed"]
    assert (
        stored["engines"]["mixed"]["flipped"] == content(REFINED_600)["runs"]["refined"]["engines"]["int8"]["flipped"]
    )


@pytest.mark.parametrize(
    ("page", "text", "result"),
    [
        ("keras.md", "trained once more", "2026-11-22-h200-keras.json"),
        ("wts.md", "all engines by the network API", "2026-11-22-h200-wts.json"),
    ],
)
def test_engines_taken_apart(page: str, text: str, result: str) -> None:
    for row, engine in zip(table_below(text, page), content(result)["engines"].values(), strict=True):
        ((_, outputs),) = engine["outputs"].items()
        assert row["mIoU"] == f"{engine['mean_iou']:.4f}"
        assert row["same class as FP32"] == f"{engine['agreement']:.3%}".replace("%", " %")
        assert row["GPU, ms"] == f"{engine['median_ms']['median']:.3f}"
        assert row["built in, s"] == f"{engine['build_seconds']:.1f}"
        name = next(key for key in row if key.startswith("signal to error"))
        assert row[name] == f"{outputs['signal_to_error_db']:.1f}"
        tensors = [one["sqnr_db"] for one in engine["layers"]["tensors"] if one["sqnr_db"] is not None]
        assert row["worst tensor, dB"] == f"{min(tensors):.1f}"
        assert engine["passed"]


def test_the_detectors_engines() -> None:
    stored = content("2026-11-22-h200-detector.json")
    for row, (name, frames) in zip(
        table_below("frames of that stack", "detector.md"), stored["frames"].items(), strict=True
    ):
        found = stored["ap50"]["ONNX" if name == "onnx" else name.upper()]
        assert [row[kind] for kind in found] == [f"{value:.4f}" for value in found.values()]
        assert row["AP50"] == f"{statistics.mean(found.values()):.4f}"
        assert row["frames a second"] == f"{frames['per_second']:.0f}"
        assert row["engine and copies, ms"] == f"{frames['model_ms']:.2f}"
        if name != "onnx":
            engine = stored["engines"][name]
            signals = [f"{output['signal_to_error_db']:.1f}" for output in engine["outputs"].values()]
            assert row["signal to error, dB"] == ", ".join(signals)
            assert row["GPU, ms"] == f"{engine['median_ms']['median']:.3f}"
            assert row["built in, s"] == f"{engine['build_seconds']:.0f}"
            assert engine["passed"]


def test_predicting() -> None:
    stored, earlier = content(PREDICT), content(PREDICT_EARLIER)
    median = {job: statistics.median(laps) for job, laps in stored["folder"]["seconds"].items()}
    single, memory, masks, overlays = (
        line.strip("|").split(" | ")
        for line in (DOCS / "predicting.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| one image,", "| images from", "| 1000 PNG", "| the same, masks"))
    )
    assert single[1] == f"{stored['latency']['predictor']['p50_ms']:.3f} ms"
    assert f"{stored['latency']['ratio']['median']:.3f} times" in single[2]
    assert memory[1] == ", ".join(f"{row['images_per_second']:.0f}" for row in stored["busy"]) + " images/s"
    images, loop = stored["folder"]["images"], statistics.median(stored["torch_loop"]["seconds"]["masks"])
    assert masks[1] == f"{median['masks']:.2f} s, {images / median['masks']:.0f} images/s"
    assert times(loop, median["masks"], masks[2])
    assert overlays[1] == f"{median['overlays']:.2f} s, {images / median['overlays']:.0f} images/s"
    assert times(earlier["torch_loop"]["seconds"]["overlays"][0], median["overlays"], overlays[2])
