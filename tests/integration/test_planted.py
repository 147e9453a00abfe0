"""Planted defects: each has to fail the gate (validate) or the regression, and the sound run passes both.

The network is small, of ONNX nodes with fixed weights, on colour images of another size than its input; the labels are
what it sees in them, so that FP32's mIoU is 1 and every harm shows. A slower engine: tests/unit/stages/test_regress.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import ModelProto, numpy_helper
from PIL import Image

from pipeline.backends.onnxruntime import OnnxRuntimeRunner, emulate
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Config, Precision, load_config
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preprocessing import class_ids, preprocess, restore_mask
from pipeline.errors import CheckFailed, InputError
from pipeline.graph.half import to_half
from pipeline.graph.quantize import quantize
from pipeline.reports import Candidate, ValidationReport
from pipeline.run import Run
from pipeline.stages.regress import Comparison, compare, update
from pipeline.stages.validate import validate
from tests.tiny_unet import observed_table, save, tiny_unet

Edit = Callable[..., ModelProto]
HEIGHT, WIDTH, TRAIN, VAL = 40, 56, 8, 6
SETTINGS = {
    "name": "planted",
    "network": {"onnx": "model.onnx"},
    "data": {
        "kind": "folder",
        "root": "data",
        "train": {"images": "train/images", "labels": "train/labels"},
        "validation": {"images": "val/images", "labels": "val/labels"},
        "classes": [{"name": name, "colour": [9, 9, 9]} for name in ("one", "two", "three")],
    },
    "preprocessing": {
        "height": 32,
        "width": 32,
        "channels": "rgb",
        "resize": "stretch",
        "mean": [0.3, 0.5, 0.6],
        "std": [0.1, 0.2, 0.15],
    },
    "calibrate": {"images": TRAIN, "algorithm": "minmax"},
    "engine": {"backend": "onnxruntime"},
    "validate": {
        "pictures": 0,
        "saved_runs": 0,
        # A network of random weights is surer of nothing than a trained one: its thin regions flip more easily.
        "tolerances": {
            "int8": {
                "atol": 1.0,
                "rtol": 0.1,
                "statistic": "mean",
                "min_agreement": 0.98,
                "max_miou_drop": 0.06,
                "max_class_iou_drop": 0.1,
            }
        },
    },
}


class Site:
    """A project whose sound run is the baseline."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "config.yaml"
        self.file.write_text(yaml.safe_dump(SETTINGS))
        self.model = tiny_unet()
        save(self.model, root / "model.onnx")
        self._write_images()
        self.baseline = root / "baseline.json"
        self.sound = self.run("sound")
        self.accept()

    def _write_images(self) -> None:
        rng = np.random.default_rng(3)
        spec = load_config(self.file).preprocessing
        with OnnxRuntimeRunner(self.root / "model.onnx") as runner:
            for split, count in (("train", TRAIN), ("val", VAL)):
                for kind in ("images", "labels"):
                    (self.root / "data" / split / kind).mkdir(parents=True)
                for index in range(count):
                    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
                    image = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
                    logits = runner({"image": preprocess(image, spec)[np.newaxis]})["logits"]
                    label = restore_mask(class_ids(logits, 3), spec, HEIGHT, WIDTH)
                    for kind, pixels in (("images", image), ("labels", label)):
                        Image.fromarray(pixels).save(self.root / "data" / split / kind / f"{index}.png")

    def config(self, *overrides: str) -> Config:
        return load_config(self.file, overrides)

    def run(self, build: str, *overrides: str) -> tuple[str, list[ValidationReport]]:
        with Run(self.config(*overrides), self.root / build) as work:
            return work.network_sha256(), [work.validate(p) for p in ("fp32", "fp16", "int8")]

    def accept(self) -> None:
        network, reports = self.sound
        update("planted", network, reports, None, self.baseline, "sound")

    def regress(self, run: tuple[str, list[ValidationReport]]) -> Comparison:
        return compare("planted", run[0], run[1], None, self.baseline)

    def images(self, split: str) -> Dataset:
        config = self.config()
        return open_dataset(config.data, config.preprocessing, "validation" if split == "val" else "train")

    def feeds(self, *overrides: str) -> list[dict[str, np.ndarray]]:
        spec = self.config(*overrides).preprocessing
        return [{"image": preprocess(sample.image, spec)[np.newaxis]} for sample in self.images("train")]

    def gate(self, candidate: ModelProto, precision: Precision) -> ValidationReport:
        """The verdict of ``validate`` on a graph that an engine might hold, against the sound FP32 network."""
        config = self.config()
        file = self.root / "candidate.onnx"
        onnx.save(candidate, file)
        what = Candidate(precision, True, "planted", "", None, None)
        with (
            Run(config, self.root / "sound") as work,
            OnnxRuntimeRunner(self.root / "model.onnx") as reference,
            emulate(file) as runner,
        ):
            images = self.images("val")
            return validate(reference, runner, what, images, work.card, config.validate_, self.root)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def edited(site: Site) -> Edit:
    """The network with one weight changed."""

    def edit(name: str, change: Callable[[np.ndarray], np.ndarray], model: ModelProto = site.model) -> ModelProto:
        copy = ModelProto()
        copy.CopyFrom(model)
        (tensor,) = [t for t in copy.graph.initializer if t.name == name]
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))
        return copy

    return edit


def failed(report: ValidationReport) -> set[str]:
    assert report.passed == all(check.passed for check in report.checks)
    return {check.name.split(" (")[0] for check in report.checks if not check.passed}


def test_the_sound_run_passes_both(site: Site) -> None:
    network, reports = site.sound
    assert [failed(report) for report in reports] == [set(), set(), set()]
    site.regress((network, reports)).verdict()
    scores = reports[0].scores
    assert scores is not None
    assert scores.mean_iou == 1.0
    assert not failed(site.gate(quantize(site.model, observed_table(site.model, site.feeds()), half=True), "int8"))


def test_wrong_resize_mode_of_the_images(site: Site) -> None:
    comparison = site.regress(site.run("letterbox", "preprocessing.resize=letterbox"))
    assert "fp32/mean_iou" in {d.figure for d in comparison.regressions}
    with pytest.raises(CheckFailed, match="worse than the baseline"):
        comparison.verdict()


def test_wrong_resize_mode_in_the_graph(site: Site) -> None:
    graph = ModelProto()
    graph.CopyFrom(site.model)
    (resize,) = [node for node in graph.graph.node if node.op_type == "Resize"]
    for attribute in resize.attribute:
        attribute.s = {b"linear": b"nearest", b"half_pixel": b"asymmetric"}[attribute.s]
    for precision in ("fp32", "fp16"):
        assert {"agreement with FP32's masks", "mIoU drop"} <= failed(site.gate(graph, precision))


def test_swapped_channels_of_the_images(site: Site) -> None:
    comparison = site.regress(site.run("bgr", "preprocessing.channels=bgr"))
    assert {"fp32/mean_iou", "fp16/mean_iou", "int8/mean_iou"} <= {d.figure for d in comparison.regressions}


def test_swapped_channels_in_the_engine(site: Site, edited: Edit) -> None:
    assert "agreement with FP32's masks" in failed(site.gate(edited("down0.weight", lambda w: w[:, ::-1]), "fp16"))


def test_stale_calibration_cache(site: Site) -> None:
    """Ranges of another network with the same tensor names."""
    other = tiny_unet(seed=7)
    for tensor in other.graph.initializer:
        if tensor.name == "down0.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 4, tensor.name))
    stale = observed_table(other, site.feeds())
    assert failed(site.gate(quantize(site.model, stale, half=True), "int8"))


def test_a_stale_cache_in_the_build_folder_is_made_anew(site: Site) -> None:
    _, before = site.run("stale")
    cache = site.root / "stale" / "planted" / "calibrate" / "calibration.cache"
    sound = cache.read_bytes()
    lines = sound.decode().splitlines()
    scales = [f"{name}: 3c000000" for name in (line.rpartition(": ")[0] for line in lines[1:])]
    cache.write_text("\n".join([lines[0], *scales, ""]))
    _, after = site.run("stale")
    assert cache.read_bytes() == sound
    assert [report.scores for report in after] == [report.scores for report in before]


@pytest.mark.parametrize("preprocessing", ["preprocessing.scale=1", "preprocessing.std=[1]"])
def test_calibration_with_other_preprocessing(site: Site, preprocessing: str) -> None:
    wrong = observed_table(site.model, site.feeds(preprocessing))
    assert failed(site.gate(quantize(site.model, wrong, half=True), "int8"))


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_convolutions_weights_scaled(site: Site, edited: Edit, precision: Precision, factor: float) -> None:
    assert failed(site.gate(edited("up_conv1.weight", lambda w: w * factor), precision))


def test_one_convolutions_weights_scaled_in_the_network_file(site: Site, edited: Edit) -> None:
    scaled = edited("up_conv1.weight", lambda w: w * 1.1)
    path = save(scaled, site.root / "scaled.onnx")
    with pytest.raises(InputError, match="another network"):
        site.regress(site.run("scaled", f"network.onnx={path}"))


def test_fp16_overflow(site: Site, edited: Edit) -> None:
    """Activations beyond 65504, which FP32 scales back: equal masks in FP32, infinities in FP16."""
    large = 40_000
    model = edited("down0.weight", lambda w: w * large)
    model = edited("down0.bias", lambda b: b * large, model)
    model = edited("down1.weight", lambda w: w / large, model)
    skip_first = np.where(np.arange(32) < 16, 1 / large, 1.0).reshape(1, 32, 1, 1)
    model = edited("up_conv0.weight", lambda w: w * skip_first, model)
    assert not failed(site.gate(model, "fp32"))
    report = site.gate(to_half(model), "fp16")
    assert "outputs are finite" in failed(report)
    assert report.checks[0].value is not None
    assert report.checks[0].offenders[0].image is not None


def test_a_dropped_class(site: Site, edited: Edit) -> None:
    """The rarest class is never given."""
    labels = np.concatenate([s.label.ravel() for s in site.images("val") if s.label is not None])
    counts = np.bincount(labels, minlength=3)
    rarest = int(np.argmin(counts))
    report = site.gate(edited("head.bias", lambda b: b - 1e3 * (np.arange(3) == rarest)), "int8")
    assert {"class IoU drop", "mIoU drop"} <= failed(report)
    check = next(check for check in report.checks if check.name == "class IoU drop")
    assert check.offenders[0].class_name == ("one", "two", "three")[rarest]
    network, reports = site.sound
    lost = site.regress((network, [*reports[:2], report]))
    assert f"int8/class_iou/{check.offenders[0].class_name}" in {d.figure for d in lost.regressions}


def test_a_table_without_a_tensor_is_refused(site: Site) -> None:
    table = observed_table(site.model, site.feeds())
    with pytest.raises(InputError):
        quantize(site.model, CalibrationTable("minmax", dict(list(table.amax.items())[:-3])), half=True)


def test_the_baseline_is_readable(site: Site) -> None:
    raw = json.loads(site.baseline.read_text())
    assert raw["machines"]["emulated"]["fp32/mean_iou"] == {"value": 1.0, "tolerance": 0.003}
