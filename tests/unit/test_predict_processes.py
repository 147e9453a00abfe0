"""``pipeline.stages.predict`` with processes that decode and encode."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard, TensorSpec
from pipeline.backends.processes import Processes
from pipeline.closing import Closing
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import BuildFolderError, EngineError, UnsupportedError
from pipeline.predictor import Predictor
from pipeline.stages.predict import LARGEST_FOR_PROCESSES, Wanted, helpers_for, predict

CLASSES = tuple(ClassConfig(name=name, colour=(index * 60, 9, 90)) for index, name in enumerate("abcd"))
STRETCHED = PreprocessingConfig(height=32, width=32, channels="grey", resize="stretch")
TILED = PreprocessingConfig(height=32, width=32, channels="grey", resize="none")


class Thresholds(Closing):
    """A network in this process: a class for every quarter of the grey values, one image at a time."""

    def __init__(self, source: TensorSpec, result: TensorSpec) -> None:
        self.inputs, self.outputs = (source,), (result,)
        self.fails = False

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self.fails:
            raise EngineError("the GPU was taken away")
        feed = feeds["image"]
        if feed.dtype == np.uint8:
            return {"labels": feed[..., 0] >> 6}
        return {"labels": -np.abs(feed - np.linspace(0.125, 0.875, 4, dtype=np.float32)[:, np.newaxis, np.newaxis])}

    def close(self) -> None: ...


IMAGES = TensorSpec("image", (1, 32, 32, 1), "uint8"), TensorSpec("labels", (1, 32, 32), "uint8")
TENSORS = TensorSpec("image", (1, 1, 32, 32), "float32"), TensorSpec("labels", (1, 4, 32, 32), "float32")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes(2, "pipeline.stages.predict") as made:
        yield made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        height, width = rng.integers(20, 90, 2)
        Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).save(folder / f"{number:02}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return sorted(({key: line[key] for key in line if key != "seconds"} for line in found), key=str)


@pytest.mark.parametrize(
    ("model", "spec"), [(IMAGES, STRETCHED), (TENSORS, STRETCHED), (TENSORS, TILED)], ids=["uint8", "float32", "tiles"]
)
def test_files_are_those_of_threads(
    tmp_path: Path, images: Path, processes: Processes, model: tuple[TensorSpec, TensorSpec], spec: PreprocessingConfig
) -> None:
    """Byte by byte, and so are the lines of the journal, but for their order and the seconds."""
    probabilities: Any = "npy" if model is TENSORS else None
    with Predictor(Thresholds(*model), ModelCard("none", spec, CLASSES)) as predictor:
        for name, helpers in (("threads", None), ("processes", processes)):
            wanted = Wanted(tmp_path / name, probabilities=probabilities)
            outcome = predict(predictor, "m", [images], wanted, None, helpers)
            assert (outcome.done, outcome.failed) == (30, 1)
            assert "broken.png" in outcome.first_failure
    files = {path.name: path.read_bytes() for path in (tmp_path / "threads").iterdir() if path.suffix != ".jsonl"}
    assert len(files) == (90 if probabilities else 60)
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "processes").iterdir() if p.suffix != ".jsonl"}
    assert lines(tmp_path / "threads") == lines(tmp_path / "processes")


def test_a_run_is_resumed_and_nothing_overwritten(tmp_path: Path, images: Path, processes: Processes) -> None:
    out = tmp_path / "out"
    with Predictor(Thresholds(*IMAGES), ModelCard("none", STRETCHED, CLASSES)) as predictor:
        predict(predictor, "m", sorted(images.glob("1*.png")), Wanted(out), None, processes)
        with pytest.raises(BuildFolderError, match="exists already"):
            predict(predictor, "m", [images], Wanted(out), None, processes)
        outcome = predict(predictor, "m", [images], Wanted(out, resume=True), None, processes)
    assert (outcome.done, outcome.already, outcome.failed) == (20, 10, 1)
    assert len(lines(out)) == 31


def test_large_images_are_left_to_this_process(tmp_path: Path, images: Path, processes: Processes) -> None:
    """They are predicted with all others done."""
    side = 2049
    assert side**2 > LARGEST_FOR_PROCESSES
    Image.new("L", (side, side), 200).save(images / "00large.png")
    with Predictor(Thresholds(*IMAGES), ModelCard("none", STRETCHED, CLASSES)) as predictor:
        outcome = predict(predictor, "m", [images], Wanted(tmp_path / "out", overlays=False), None, processes)
    assert (outcome.done, outcome.failed) == (31, 1)
    last = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[-1])
    assert (last["name"], last["pixels"]) == ("00large", {"d": side * side})


def test_what_fails_ends_the_run_and_the_processes(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    runner = Thresholds(*IMAGES)
    runner.fails = True
    card = ModelCard("none", STRETCHED, CLASSES)
    with Predictor(runner, card) as predictor, Processes(2, "pipeline.stages.predict") as helpers:
        with pytest.raises(EngineError, match="the GPU was taken away"):
            predict(predictor, "m", [images], Wanted(out), None, helpers)
        for name in helpers.names:
            with pytest.raises(ProcessLookupError):
                os.kill(int(name.rpartition("-")[2]), 0)
    assert [path.name for path in out.iterdir()] == ["predictions.jsonl"]


def test_a_process_that_dies(tmp_path: Path, images: Path) -> None:
    card = ModelCard("none", STRETCHED, CLASSES)
    with Predictor(Thresholds(*IMAGES), card) as predictor, Processes(2, "pipeline.stages.predict") as helpers:
        os.kill(int(helpers.names[0].rpartition("-")[2]), signal.SIGKILL)
        with pytest.raises(UnsupportedError, match=r"ended by itself \(exit status -9\)"):
            predict(predictor, "m", [images], Wanted(tmp_path / "out"), None, helpers)
    assert not list((tmp_path / "out").glob(".*"))


def test_what_they_say_is_said_once(
    tmp_path: Path, images: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    with Predictor(Thresholds(*TENSORS), ModelCard("none", TILED, CLASSES)) as predictor:
        predictor._aligns_corners = True
        with caplog.at_level(logging.WARNING):
            predict(predictor, "m", [images], Wanted(tmp_path / "out"), None, processes)
    assert sum("align_corners" in record.message for record in caplog.records) == 1


def test_few_images_start_no_process(tmp_path: Path, images: Path) -> None:
    assert helpers_for([images], tmp_path / "out") is None
    assert helpers_for([images], tmp_path / "out", 0) is None
