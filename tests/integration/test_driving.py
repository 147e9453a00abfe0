"""The driving network: the shipped Cityscapes config on a small tree of drawn streets, with a narrow FCN-8s."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY, Result

pytest.importorskip("torch", reason="torch is not installed: nothing to train")
Command = Callable[..., Result]
CAMVID = Path(os.environ.get("CAMVID_ROOT", REPOSITORY.parent / "shared" / "data" / "camvid"))
# Ids of label files, and a colour of each.
EGO, ROAD, SIDEWALK, BUILDING, SKY, CAR = 1, 7, 8, 11, 23, 26
PAINT = {EGO: (30, 30, 30), ROAD: (110, 60, 110), SIDEWALK: (230, 120, 220), BUILDING: (90, 90, 70)}
PAINT |= {SKY: (120, 180, 250), CAR: (20, 20, 150)}
HEIGHT, WIDTH = 128, 256
# Half the size of the images; otherwise the config's own settings.
NARROW = ("network.arguments.base_channels=4", "network.arguments.fc_channels=16", "network.arguments.dropout=0")
SMALL = (*NARROW, "preprocessing.height=64", "preprocessing.width=128")
RECIPE = ("train.steps=40", "train.batch=4", "train.crop=[64,128]", "train.augment=[]", "train.learning_rate=0.02")
LOOSE = ("validate.pictures=1", "calibrate.images=10", "benchmark.seconds=0.05", "benchmark.warmup_seconds=0.01")


def draw_street(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image, uint8 (H, W, 3), and ids, uint8 (H, W): sky, houses, road with a car, and the bonnet of one's own."""
    rng = np.random.default_rng(seed)
    ids = np.full((HEIGHT, WIDTH), SKY, np.uint8)
    for left in range(0, WIDTH, 32):
        ids[int(rng.integers(20, 60)) :, left : left + 32] = BUILDING
    ids[76:] = SIDEWALK
    ids[84:] = ROAD
    row, column = int(rng.integers(70, 90)), int(rng.integers(0, WIDTH - 60))
    ids[row : row + 26, column : column + 60] = CAR
    ids[120:] = EGO
    table = np.zeros((256, 3))
    table[list(PAINT)] = list(PAINT.values())
    image = (table[ids] + rng.normal(0, 12, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)
    return image, ids


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """A tree as the data set's, with the files that nobody reads beside those that count."""
    root = tmp_path / "cityscapes"
    for split, cities, count in (("train", ("aachen", "ulm"), 6), ("val", ("frankfurt",), 2)):
        for city in cities:
            left, fine = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
            left.mkdir(parents=True)
            fine.mkdir(parents=True)
            for n in range(count):
                image, ids = draw_street(n + 100 * len(city) + 1000 * len(split))
                name = f"{city}_{n:06d}_000019"
                Image.fromarray(image).save(left / f"{name}_leftImg8bit.png")
                Image.fromarray(ids).save(fine / f"{name}_gtFine_labelIds.png")
                Image.fromarray(image).save(fine / f"{name}_gtFine_color.png")
                (fine / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


def chosen(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_cityscapes_from_training_to_another_machine(cityscapes: Path, tmp_path: Path, unet_trt: Command) -> None:
    config, weights = REPOSITORY / "configs" / "cityscapes.yaml", tmp_path / "fcn8s.safetensors"
    data = {"CITYSCAPES_ROOT": str(cityscapes)}
    trained = unet_trt("train", "-c", config, "-o", weights, *chosen(*SMALL, *RECIPE), **data)
    assert trained.code == 0, trained
    assert "12 training images, judged on 2 validation images" in weights.with_suffix(".md").read_text()

    ran = unet_trt("run", "-c", config, *chosen(*SMALL, *LOOSE, f"network.weights={weights}"), **data)
    assert ran.code == 0, ran
    build = tmp_path / "working" / "build" / "cityscapes"
    check_figures(build, ran)
    check_batches(build)
    check_mask(build / "validate" / "int8" / "masks" / "frankfurt_000000_000019.png")

    # The target has the clean graph and the cache with its report, and no image.
    target = tmp_path / "target"
    shutil.copytree(build / "calibrate", target / "calibrate")
    shutil.copy(build / "clean" / "model.onnx", target / "clean.onnx")
    photo = shutil.copy(cityscapes / "leftImg8bit/val/frankfurt/frankfurt_000000_000019_leftImg8bit.png", target)
    shutil.rmtree(cityscapes)
    cache = ("--calibration-cache", "calibrate/calibration.cache")
    options = ("-p", "int8", *cache, "--profile", "batch=1:1:5", "--route", "explicit")
    built = unet_trt("engine", "clean.onnx", *options, "-o", "model.engine", cwd=target)
    assert built.code == 0, built
    typed = target / "model.typed.onnx"
    assert typed.read_bytes() == (build / "engine" / "int8" / "model.onnx").read_bytes()
    drawn = unet_trt("predict", typed, photo, "-o", "masks", cwd=target)
    assert drawn.code == 0, drawn
    check_mask(target / "masks" / f"{Path(photo).stem}.png")


def check_figures(build: Path, ran: Result) -> None:
    reports = {p: load(build / "validate" / p / "report.json") for p in ("fp32", "fp16", "int8")}
    scores = reports["fp32"]["scores"]
    present = {name for name, iou in scores["class_iou"].items() if iou is not None}
    assert present == {"road", "sidewalk", "building", "sky", "car"}
    assert scores["class_iou"]["road"] > 0.6
    assert set(scores["category_iou"]) == {"flat", "construction", "object", "nature", "sky", "human", "vehicle"}
    # Road and sidewalk are one category: what is mistaken between them counts as right.
    assert scores["category_iou"]["flat"] > min(scores["class_iou"]["road"], scores["class_iou"]["sidewalk"])
    assert scores["category_iou"]["sky"] == scores["class_iou"]["sky"]
    (line,) = [line for line in ran.out.splitlines() if "mean IoU of categories" in line]
    for report in reports.values():
        assert f"{report['scores']['mean_category_iou']:.4f}" in line


def check_batches(build: Path) -> None:
    calibration = load(build / "calibrate" / "report.json")
    assert calibration["image_count"] == 10
    assert {name.split("_")[0] for name in calibration["images"]} == {"aachen", "ulm"}
    assert not any("last batch" in note for note in calibration["notes"])


def check_mask(path: Path) -> None:
    with Image.open(path) as mask:
        assert mask.size == (WIDTH, HEIGHT)
        ids, colours = np.asarray(mask), np.asarray(mask.convert("RGB"))
    assert (ids[100:115] == 0).mean() > 0.5
    assert (colours[ids == 0] == (128, 64, 128)).all()


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"{CAMVID} is absent; CAMVID_ROOT may name another folder")
def test_camvid_training_lowers_the_loss(tmp_path: Path) -> None:
    from pipeline.config import load_config
    from pipeline.stages.train import train

    for split, count in (("train", 8), ("val", 2)):
        link_first(CAMVID / split, tmp_path / "camvid" / split, count)
    settings: Sequence[str] = (
        *NARROW,
        *("train.steps=60", "train.batch=2", "train.crop=[96,128]", "train.learning_rate=0.01"),
        *("preprocessing.height=96", "preprocessing.width=128"),
        f"data.root={tmp_path / 'camvid'}",
    )
    report = train(load_config(REPOSITORY / "configs" / "camvid-fcn8s.yaml", settings), tmp_path / "w.safetensors")
    assert report.last_loss < 0.8 * report.first_loss
    assert len(report.class_iou) == 11


def link_first(source: Path, target: Path, count: int) -> None:
    for kind in ("images", "labels"):
        (target / kind).mkdir(parents=True)
        for file in sorted((source / kind).iterdir())[:count]:
            (target / kind / file.name).symlink_to(file)
