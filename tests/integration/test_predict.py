"""``unet-trt predict`` and ``Predictor`` on real networks and files."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import Predictor
from pipeline.data.synthetic import draw_cells
from tests.conftest import REPOSITORY, Project, Result

Command = Callable[..., Result]
FREE = "{min: 16, opt: 512, max: 1024}"
SIZES = ["--set", "export.dynamic=[height,width]"]
SIZES += [f for axis in ("height", "width") for f in ("--set", f"engine.profile.{axis}={FREE}")]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_tiles_equal_the_whole_image(unet_trt: Command, project: Project) -> None:
    """The shipped cells network, without align_corners, which makes what it sees depend on the size it is fed."""
    config = REPOSITORY / "configs" / "cells.yaml"
    made = unet_trt("clean", "-c", config, *SIZES, "--set", "network.arguments.align_corners=false")
    assert made.code == 0, made
    model = project.root / "working" / made.out.strip()
    for seed, (height, width) in enumerate(((1024, 768), (600, 900))):
        image = draw_cells(seed, max(height, width))[0][:height, :width]
        with Predictor(model) as whole, Predictor(model, tile=512) as tiled:
            (wanted,), (got,) = (each.predict([image], probabilities=True) for each in (whole, tiled))
        assert len(np.unique(wanted.labels)) == 4
        assert (wanted.labels != got.labels).mean() < 0.001
        assert wanted.probabilities is not None
        assert got.probabilities is not None
        assert np.abs(wanted.probabilities - got.probabilities).mean() < 1e-3


def test_all_kinds_of_input_and_output(project: Project, unet_trt: Command, clean: Path) -> None:
    images = project.root / "images"
    images.mkdir()
    cells = [Image.fromarray(draw_cells(seed, 100)[0][:70]) for seed in range(3)]
    cells[0].save(images / "stack.tif", save_all=True, append_images=cells[1:])
    cells[0].convert("P").save(images / "palette.png")
    cells[0].convert("RGBA").save(images / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    cells[0].save(images / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(np.asarray(cells[0]).astype(np.uint16) * 257).save(images / "deep.png")
    (images / "broken.png").write_bytes((images / "deep.png").read_bytes()[:300])
    result = unet_trt("predict", clean, images, "-o", images / "masks", "--probabilities", "png")
    assert result.code == 2
    assert "1 image(s) could not be read" in result.err
    masks = images / "masks"
    done = {line["name"]: line for line in lines(masks)}
    assert sorted(done) == ["alpha", "broken", "deep", "palette", *(f"stack_000{n}" for n in range(3)), "turned"]
    assert "error" in done["broken"]
    assert done["stack_0002"]["page"] == 2
    with Image.open(masks / "turned.png") as mask:
        assert mask.size == (70, 100)
    ids = {name: np.asarray(Image.open(masks / f"{name}.png")) for name in done if name != "broken"}
    for name in ("palette", "alpha", "deep", "stack_0000"):
        np.testing.assert_array_equal(ids[name], ids["alpha"])
        with Image.open(masks / f"{name}_overlay.png") as overlay:
            assert (overlay.mode, overlay.size) == ("RGB", (100, 70))
    line = done["alpha"]
    assert sum(line["pixels"].values()) == 7000
    assert set(line["classes"]) == set(line["area"])
    assert line["seconds"]["predict"] > 0
    planes = np.stack([np.asarray(Image.open(masks / name)) for name in line["probabilities"]])
    assert (planes.dtype, planes.shape) == (np.uint16, (4, 70, 100))
    assert np.abs(planes.sum(0, dtype=np.int64) - 65535).max() <= 4
    assert (planes.argmax(0) == ids["alpha"]).mean() > 0.999
    assert not list(masks.glob(".*"))


def test_a_broken_run_is_resumed(project: Project, unet_trt: Command, clean: Path) -> None:
    work, val = project.root / "working", project.root / "data" / "val" / "images"
    arguments = ("predict", clean, val / "*.png", "-o", "masks", "--probabilities", "npy", "--no-overlays")
    assert unet_trt(*arguments).code == 0
    masks = work / "masks"
    before = {path.name: path.stat().st_mtime_ns for path in masks.glob("10*")}
    assert len(before) == 6
    assert np.load(masks / "101_probabilities.npy").shape == (4, 64, 64)
    journal = masks / "predictions.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:2]) + '\n{"name": "10')
    (masks / "101.png").unlink()
    assert unet_trt(*arguments).code == 2
    resumed = unet_trt(*arguments, "--resume")
    assert resumed.code == 0, resumed
    assert "2 mask(s) in masks, 1 done before" in resumed.out
    after = {path.name: path.stat().st_mtime_ns for path in masks.glob("10*")}
    assert [name for name in sorted(after) if after[name] == before[name]] == ["100.png", "100_probabilities.npy"]
    assert [line["name"] for line in lines(masks)] == ["100", "101", "102"]
    assert "0 mask(s) in masks, 3 done before" in unet_trt(*arguments, "--resume").out
    assert unet_trt("predict", clean, val, "-o", "new", "--probabilities", "jpg").code == 2


def test_larger_and_smaller_images_than_the_network(project: Project, unet_trt: Command, clean: Path) -> None:
    for name, size in (("large", (150, 301)), ("line", (1, 2000)), ("pixel", (1, 1))):
        Image.fromarray(np.full(size, 90, np.uint8)).save(project.root / f"{name}.png")
    result = unet_trt("predict", clean, *(project.root / f"{n}.png" for n in ("large", "line", "pixel")), "-o", "m")
    assert result.code == 0, result
    sizes = {line["name"]: (line["height"], line["width"]) for line in lines(project.root / "working" / "m")}
    assert sizes == {"large": (150, 301), "line": (1, 2000), "pixel": (1, 1)}


def test_baked_graphs_predict_the_same(project: Project, unet_trt: Command, clean: Path) -> None:
    work, image = project.root / "working", draw_cells(5, 180)[0]
    with Predictor(clean) as predictor:
        (plain,) = predictor.predict([image], probabilities=True)
    for output in ("labels", "probabilities"):
        name = f"{output}.onnx"
        made = unet_trt("clean", clean, "-o", name, "--bake-input", "image", "--bake-output", output)
        assert made.code == 0, made
        with Predictor(work / name) as predictor:
            np.testing.assert_array_equal(predictor(image[:64, :64]), Predictor(clean)(image[:64, :64]))
            assert (predictor(image) == plain.labels).mean() > 0.95


@pytest.mark.parametrize("processes", [0, 2])
def test_an_interrupted_run_leaves_whole_files(
    project: Project, unet_trt: Command, clean: Path, processes: int
) -> None:
    images, masks = project.root / "images", project.root / "masks"
    images.mkdir()
    for seed in range(4):
        Image.fromarray(draw_cells(seed, 300)[0]).save(images / f"{seed}0.png")
        for copy in range(1, 20):
            (images / f"{seed}{copy}.png").hardlink_to(images / f"{seed}0.png")
    command = [sys.executable, "-m", "pipeline", "predict", str(clean), str(images), "-o", str(masks)]
    command += ["--processes", str(processes)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as run:
        journal = masks / "predictions.jsonl"
        while run.poll() is None and not (journal.exists() and journal.read_text().count("\n")):
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    done = lines(masks)
    assert 0 < len(done) < 80
    assert not list(masks.glob(".*"))
    for path in masks.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    resumed = unet_trt("predict", clean, images, "-o", masks, "--resume", "--no-overlays")
    assert resumed.code == 0, resumed
    assert len(lines(masks)) == 80


def test_videos_need_a_decoder(project: Project, unet_trt: Command, clean: Path) -> None:
    if any(importlib.util.find_spec(name) for name in ("imageio_ffmpeg", "cv2")):
        pytest.skip("a decoder is installed")
    (project.root / "v.mp4").write_bytes(b"")
    result = unet_trt("predict", clean, project.root / "v.mp4", "-o", "masks")
    assert result.code == 3
    assert "no decoder for the video" in result.err
    assert not (project.root / "working" / "masks").exists()
