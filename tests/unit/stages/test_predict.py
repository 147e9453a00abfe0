"""The stage predict on a stand-in network: order, large images, and what is left when something fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.backends.lanes import HostLane
from pipeline.data import pixels
from pipeline.errors import BuildFolderError, EngineError
from pipeline.predictor import Predictor
from pipeline.stages.predict import Outcome, Wanted, predict
from tests.unit.test_predictor import Threshold, card

SIZES = ((8, 8), (8, 8), (8, 8), (40, 40), (50, 40), (8, 8), (8, 8))


@pytest.fixture
def images(tmp_path: Path, rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Those in the folder ``in``."""
    (tmp_path / "in").mkdir()
    drawn = [rng.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
    for number, image in enumerate(drawn):
        Image.fromarray(image).save(tmp_path / "in" / f"{number}.png")
    return drawn


def run(network: Threshold, folder: Path, **wanted: Any) -> Outcome:
    with Predictor(network, card(), batch=4) as predictor:
        return predict(predictor, "m", [folder / "in"], Wanted(folder / "out", **wanted))


@pytest.mark.usefixtures("images")
def test_images_are_not_replaced_by_their_masks(tmp_path: Path) -> None:
    """By whatever name the folder goes, and whatever is overwritten."""
    (tmp_path / "out").symlink_to("in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    with pytest.raises(BuildFolderError, match="would replace the images themselves"):
        run(Threshold(8, 8), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def names(folder: Path) -> list[str]:
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["name"] for line in lines]


def test_images_share_batches_but_for_large_ones(
    images: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "LARGE", 1000)
    network = Threshold("height", "width", batch="batch")
    assert run(network, tmp_path, overlays=False).done == len(images)
    assert names(tmp_path) == [str(number) for number in range(len(images))]
    assert network.fed == [(3, 1, 8, 8), (1, 1, 40, 40), (1, 1, 50, 40), (2, 1, 8, 8)]
    for number, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{number}.png")), image > 127)


def test_a_model_that_fails_in_the_middle(
    images: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, start = Threshold(8, 8), HostLane.start

    def failing(lane: HostLane) -> None:
        if len(network.fed) == 20:
            raise EngineError("the GPU is gone")
        start(lane)

    monkeypatch.setattr(HostLane, "start", failing)
    with pytest.raises(EngineError, match="the GPU is gone"):
        run(network, tmp_path, probabilities="npy")
    assert not list((tmp_path / "out").glob(".*"))
    for name in names(tmp_path):
        assert np.load(tmp_path / "out" / f"{name}_probabilities.npy").dtype == np.float32
    monkeypatch.undo()
    outcome = run(Threshold(8, 8), tmp_path, probabilities="npy", resume=True)
    assert outcome.done + outcome.already == len(images)
    assert names(tmp_path) == [str(number) for number in range(len(images))]


def test_a_disk_without_room_for_probabilities(
    images: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BuildFolderError, match="No space left"):
        run(Threshold(8, 8), tmp_path, probabilities="npy")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]
