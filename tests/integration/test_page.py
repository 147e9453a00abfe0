"""The page of a whole run, read as markup and used in a real browser.

A tiny UNet made of ONNX nodes goes through every stage on this machine. What only a GPU could add, the time of layers,
is what TensorRT's profiler once said of an H200 (tests/data/layers).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

from pipeline.artifacts import Device, from_json, to_json
from pipeline.backends.layers import parse_layers
from pipeline.calibration.report import CalibrationReport
from pipeline.config import Precision, load_config
from pipeline.metrics.latency import estimate
from pipeline.reports import BenchmarkReport, PicturesReport, Throughput, Timing, ValidationReport
from pipeline.run import Run
from pipeline.speed import account, judge
from pipeline.stages.report import PageReport
from tests.browser import Browser, find_chromium
from tests.conftest import SIZE, write_images
from tests.onnx_unet import clean_unet, drawn_unet

RECORDED = Path(__file__).parent.parent / "data" / "layers"
QUESTIONS = ["Is it good enough?", "Is it fast enough?", "Why?", "What next?", "Where it comes from"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
CHROMIUM = find_chromium()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (or named by CHROMIUM)")


class Recorded(Run):
    """A run whose FP16 and INT8 layers were timed on a GPU that is not here."""

    def benchmark(self, precisions: Sequence[Precision]) -> BenchmarkReport:
        report = super().benchmark(precisions)
        device = Device("NVIDIA H200", "9.0", "580")
        engines, timings = {}, list(report.timings)
        for precision, name, ms in (("fp16", "fp16", 0.5), ("int8", "int8-explicit", 0.4)):
            layers = parse_layers((RECORDED / f"{name}.json").read_text())
            times = json.loads((RECORDED / f"{name}.profile.json").read_text())
            engines[precision] = account("0" * 64, layers, times, {}, device, ms)
            latency = replace(report.timings[0].end_to_end, p50_ms=ms)
            timings.append(Timing(precision, 1, 1000, latency, latency, estimate([ms] * 12), cuda_graph=True))
        verdict = judge(estimate([1.25] * 12), 1.0, engines["int8"], engines["fp16"])
        rates = tuple(Throughput("int8", batch, 1, 500.0 * batch, "GPU") for batch in (1, 2, 4))
        told = replace(
            report,
            device=device,
            engines=engines,
            timings=tuple(timings),
            verdict=verdict,
            not_run={},
            throughput=(*rates, *(Throughput("int8", 1, streams, 400.0 * streams, "host") for streams in (1, 2))),
        )
        (self.folder / "benchmark" / "report.json").write_bytes(to_json(told))
        return told


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml``, ``unet.onnx`` and images."""
    root = tmp_path_factory.mktemp("page")
    write_images(root / "data" / "train", range(6))
    write_images(root / "data" / "val", range(100, 105))
    onnx.save(clean_unet(drawn_unet(in_channels=1), (1, 1, SIZE, SIZE)), root / "unet.onnx")
    names = ("background", "cyto|plasm", "<membrane>", "nucleus")
    tolerance = {"atol": 99, "rtol": 99, "min_agreement": 0.2, "max_miou_drop": 0.5}
    settings = {
        "name": "tiny",
        "network": {"onnx": "unet.onnx"},
        "data": {
            "kind": "folder",
            "root": "data",
            "train": {"images": "train/images", "labels": "train/labels"},
            "validation": {"images": "val/images", "labels": "val/labels"},
            "classes": [{"name": name, "colour": [60 * i, 20, 90]} for i, name in enumerate(names)],
        },
        "preprocessing": {"height": SIZE, "width": SIZE, "channels": "grey"},
        "calibrate": {"images": 4},
        "engine": {"backend": "onnxruntime"},
        "benchmark": {"seconds": 0.05, "warmup_seconds": 0.01},
        "validate": {
            "pictures": 3,
            "tolerances": {"fp16": tolerance, "int8": {**tolerance, "min_agreement": 1.0}},
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture(scope="module")
def build(project: Path) -> Path:
    """``build/tiny`` after the whole run, layers of INT8 compared."""
    with Recorded(load_config(project / "config.yaml"), project / "build") as run:
        run.layers("int8")
        run.report(PRECISIONS)
    return project / "build" / "tiny"


@pytest.fixture(scope="module")
def markup(build: Path) -> Markup:
    return Markup((build / "report" / "index.html").read_text())


class Markup(HTMLParser):
    """Elements in order, as (tag, attributes), and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page = page
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[int] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("meta", "link", "img", "input", "br"):
            return
        assert self.elements[self.open[-1]][0] == tag, f"<{self.elements[self.open[-1]][0]}> is closed by </{tag}>"
        self.open.pop()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        for place in self.open:
            self.texts[place] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]


def load(kind: type[Any], build: Path, name: str) -> Any:
    return from_json(kind, build / name / "report.json")


# ---------------------------------------------------------------------- markup, everywhere


def test_one_file_that_needs_nothing_else(markup: Markup) -> None:
    assert len(markup.page.encode()) < 8_000_000
    assert markup.open == []
    for tag, attributes in markup.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:")), (tag, key, value)
    assert not re.search(r"https?://|@import|url\((?!#)", markup.page)


def test_questions_in_their_order(markup: Markup) -> None:
    assert [text for _, text in markup.all("h2")] == QUESTIONS
    links = markup.all("a")
    assert [attributes["href"] for attributes, _ in links] == ["#good", "#fast", "#why", "#next"]
    ids = [attributes["id"] for _, attributes in markup.elements if "id" in attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    levels = [int(tag[1]) for tag, _ in markup.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_what_is_seen_has_a_name(markup: Markup) -> None:
    assert all("alt" in attributes for attributes, _ in markup.all("img"))
    assert all(attributes.get("alt") for attributes, _ in markup.all("img") if "src" in attributes)
    assert all(attributes.get("aria-label") for attributes, _ in markup.all("svg"))
    assert all(
        attributes.get("aria-label")
        for _, attributes in markup.elements
        if attributes.get("role") in ("region", "group")
    )
    assert all(text.strip() for _, text in (*markup.all("button"), *markup.all("summary"), *markup.all("th")))


def test_figures_are_those_of_the_reports(build: Path, markup: Markup) -> None:
    cells = {text.strip() for _, text in markup.all("td")}
    for precision in PRECISIONS:
        report = load(ValidationReport, build, f"validate/{precision}")
        bounds = report.scores.intervals["mean_iou"]
        assert f"{report.scores.mean_iou:.4f} [{bounds.low:.4f}, {bounds.high:.4f}]" in cells
        assert f"{100 * report.agreement:.3f} %" in cells
    calibration = load(CalibrationReport, build, "calibrate")
    labels = [attributes["aria-label"] or "" for attributes, _ in markup.all("svg")]
    named = {tensor.tensor for tensor in calibration.tensors}
    assert {label[10 : label.index(":")] for label in labels if label.startswith("Values of ")} == named
    assert sum(label.startswith("Latencies of ") for label in labels) >= 1
    assert {label.rpartition(": ")[2] for label in labels if label.startswith("On the GPU alone: ")} == {
        "fp16 0.500 ms, range 0.500 to 0.500 ms",
        "int8 0.400 ms, range 0.400 to 0.400 ms",
    }
    assert sum(label.startswith("From host array to host array: ") for label in labels) == 3
    assert [label for label in labels if label.startswith("Throughput of ")] == [
        "Throughput of int8 by batch, on the GPU alone: at most 2,000 images a second at batch 4",
        "Throughput of int8 by streams, with copies: at most 800 images a second at streams 2",
    ]
    assert "INT8 is 1.250 ± 0.000 times FP16&#39;s speed" in markup.page
    assert "&lt;membrane&gt;" in markup.page
    assert "<membrane>" not in markup.page


def test_worst_images_come_first(build: Path, markup: Markup) -> None:
    least: dict[str, float] = {}
    for precision in PRECISIONS:
        for image in load(ValidationReport, build, f"validate/{precision}").images:
            least[image.name] = min(least.get(image.name, 1.0), image.agreement)
    worst = sorted(least, key=lambda name: least[name])[:3]
    pictures = load(PicturesReport, build, "pictures")
    assert [image.name for image in pictures.images] == worst
    shots = [attributes["aria-label"] for attributes, _ in markup.all("article") if attributes.get("class") == "shot"]
    assert shots == worst
    for image in pictures.images:
        assert image.flipped["int8"] == round((1 - least[image.name]) * image.pixels)
    views = [attributes["data-view"] for attributes, _ in markup.all("figure") if "data-view" in attributes]
    assert views == ["Image", "Labels", "FP32", "FP16", "INT8"] * 3


def test_the_network_is_a_u(build: Path, markup: Markup) -> None:
    report = load(PageReport, build, "report")
    names = [account.block.name for account in report.network.blocks]
    assert names == ["inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4 + outc"]
    assert [account.block.level for account in report.network.blocks] == [0, 1, 2, 3, 4, 3, 2, 1, 0]
    first, last = report.network.blocks[0].precisions, report.network.blocks[-1].precisions
    assert first["int8"].arithmetic == {"int8": 2}
    assert first["int8"].runs
    assert first["fp32"].arithmetic == {"fp32": 2}
    assert not first["fp32"].runs
    assert first["int8"].sqnr_db is not None
    # What the profiler said of upsampling, the copy into the concatenation, and the convolutions of up4 and outc.
    assert last["int8"].ms == pytest.approx(0.01968 + 0.02475 + 0.05122 + 0.03142 + 0.02064)
    assert last["fp32"].ms is None
    text = next(text for attributes, text in markup.all("svg") if attributes.get("class") == "network")
    for name in names:
        assert name in text
    assert f"{first['int8'].sqnr_db:.1f} dB" in text


def test_what_was_not_measured_says_so(markup: Markup) -> None:
    absent = [text for attributes, text in markup.all("p") if attributes.get("class") == "absent"]
    assert any("no search for the layers" in text for text in absent)
    assert any("SQNR not measured for FP32, FP16" in text for text in absent)


def test_summary_for_pull_requests(build: Path) -> None:
    text = (build / "report" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") - row.count("\\|") for row in rows[:5]} == {9}
    assert {row.count("|") - row.count("\\|") for row in rows[5:]} == {6}
    assert "INT8 exceeds 1 of " in text
    assert "**INT8: agreement with FP32's masks**" in text
    assert "| cyto\\|plasm | " in text
    assert "| &lt;membrane&gt; | " in text


def test_summary_for_programs(build: Path) -> None:
    report = load(PageReport, build, "report")
    assert report.precisions["int8"].failed_checks == ("agreement with FP32's masks",)
    assert report.precisions["fp16"].passed
    assert report.precisions["fp16"].gpu_ms == 0.5
    assert report.answers.good is False
    assert report.answers.fastest == "fp16"
    assert "validate/int8/report.json" in report.provenance.reports
    assert "clean/model.onnx" in report.provenance.models
    assert "name: tiny" in report.provenance.config


def test_written_anew_from_stored_reports_within_five_seconds(project: Path, build: Path) -> None:
    shutil.rmtree(build / "report")
    started = time.perf_counter()
    with Recorded(load_config(project / "config.yaml"), project / "build") as run:
        run.report(PRECISIONS)
    assert time.perf_counter() - started < 5
    assert (build / "report" / "index.html").is_file()


# ---------------------------------------------------------------------- in a browser

CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (colour) => {
    const [r, g, b] = [...colour].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const box = element.closest("svg") && element.closest("svg").querySelector(".box");
    if (box) return rgba(getComputedStyle(box).fill);
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba("Canvas");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    if (element.closest("script, style, option")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(rgba(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()"""
NAMED_ROLES = {"button", "slider", "combobox", "link", "image", "region", "DisclosureTriangle"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@needs_browser
@pytest.mark.parametrize("width", [1440, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_quietly_and_can_be_read(browser: Browser, build: Path, width: int, dark: bool) -> None:
    page = build / "report" / "index.html"
    browser.open(page, width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == width  # nothing but tables and the U scrolls sideways
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    texts = browser.run(CONTRAST)
    assert len(texts) > 500
    assert [(round(ratio, 2), text) for ratio, text in texts if ratio < 4.5] == []
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    assert browser.troubles == []
    assert browser.requests == [page.as_uri()]


@needs_browser
def test_everything_that_can_be_used_or_seen_has_a_name(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 1440)
    nodes = [node for node in browser.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = Counter(node["role"]["value"] for node in nodes)
    assert roles["slider"] == 1
    assert roles["combobox"] == 4
    assert roles["button"] == 3
    nameless = [
        node["role"]["value"]
        for node in nodes
        if node["role"]["value"] in NAMED_ROLES and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []


def cut(browser: Browser) -> float:
    """Where the picture is cut, in percent of its width."""
    wipe = float(browser.run("document.getElementById('wipe').value"))
    shown = browser.run("getComputedStyle(document.getElementById('over')).clipPath")
    assert float(re.findall(r"([\d.]+)(?:%|px)", shown)[-1]) == wipe
    return wipe


@needs_browser
def test_wipe_by_mouse(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 1440)
    assert cut(browser) == 50
    box = browser.box("#frame")
    y = box["y"] + box["height"] / 2
    browser.drag((box["x"] + 0.5 * box["width"], y), (box["x"] + 0.8 * box["width"], y))
    assert cut(browser) == pytest.approx(80, abs=1)
    box = browser.box("#wipe")
    y = box["y"] + box["height"] / 2
    browser.drag((box["x"] + 0.8 * box["width"], y), (box["x"] + 0.25 * box["width"], y))
    assert cut(browser) == pytest.approx(25, abs=4)


@needs_browser
def test_wipe_by_keyboard(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 1440)
    browser.run("document.getElementById('wipe').focus()")
    for key, place in (("ArrowRight", 51), ("ArrowLeft", 50), ("Home", 0), ("End", 100)):
        browser.press(key)
        assert cut(browser) == place
    told = browser.run("document.getElementById('wipe').getAttribute('aria-valuetext')")
    assert told == "100 % FP32, the rest INT8"


@needs_browser
def test_images_by_mouse_and_keyboard(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 1440)
    chosen = (
        "[...document.querySelectorAll('#strip button')].map(each => each.getAttribute('aria-pressed')).indexOf('true')"
    )
    told = "document.getElementById('told').textContent"
    source = "document.getElementById('over').src"
    names = [image.name for image in load(PicturesReport, build, "pictures").images]
    first = browser.run(source)
    assert browser.run(told).startswith(f"{names[0]}: FP16 gives ")
    browser.click("#strip button:nth-child(2)")
    assert browser.run(chosen) == 1
    assert browser.run(told).startswith(names[1])
    assert browser.run(source) != first
    browser.press("ArrowRight")
    assert browser.run(chosen) == 2
    browser.press("ArrowRight")
    assert browser.run(chosen) == 0
    assert browser.run(source) == first
    browser.run("document.getElementById('wipe').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent").strip() == names[0]
    browser.press("Tab")
    browser.press("Enter")
    assert browser.run(chosen) == 1
    assert browser.troubles == []


@needs_browser
def test_views_and_flipped_pixels(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 400)
    choose = "(e => {{ e.value = '{}'; e.dispatchEvent(new Event('change')); }})(document.getElementById('{}'))"
    hidden = "document.getElementById('spots').hidden"
    assert browser.run(hidden) is True
    browser.run(choose.format("INT8", "marks"))
    assert browser.run(hidden) is False
    assert browser.run("document.getElementById('spots').alt").endswith("that INT8 flips")
    browser.run(choose.format("Labels", "left"))
    assert browser.run("document.getElementById('under').alt").startswith("Labels of ")
    browser.run(choose.format("4", "zoom"))
    assert browser.run(
        "document.getElementById('stage').scrollWidth > 3 * document.getElementById('stage').clientWidth"
    )
    assert browser.run("document.getElementById('stage').tabIndex") == 0


@needs_browser
def test_on_paper_everything_is_open(browser: Browser, build: Path) -> None:
    browser.open(build / "report" / "index.html", 1440)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.run("getComputedStyle(document.getElementById('viewer')).display") == "none"
    browser.send("Emulation.setEmulatedMedia", media="")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") > 5
