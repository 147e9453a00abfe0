"""How many images ``pipeline.stages.predict`` hands to a model at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import ModelCard
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.predictor import Prediction
from pipeline.stages.predict import GROUP, GROUP_PIXELS, Wanted, predict

CARD = ModelCard(
    "none", PreprocessingConfig(height=8, width=8, channels="grey"), (ClassConfig(name="a", colour=(1, 2, 3)),)
)
SIDE = 640  # of which 5 fit into a group


class Sizes:
    """Stands for a predictor on other processes, and notes how many images come at a time."""

    card, sha256 = CARD, "m"

    def __init__(self, batch: int, streams: int) -> None:
        self.batch, self.streams, self.met = batch, streams, list[int]()

    def predict(self, images: Sequence[Any], **_: object) -> list[Prediction]:
        self.met.append(len(images))
        return [Prediction(np.zeros((one.height, one.width), np.uint8)) for one in images]


@pytest.mark.parametrize(
    ("side", "batch", "streams", "sizes"),
    [
        (8, 1, 3, [GROUP, GROUP, 4]),
        (8, 3, 3, [6, 6, 6, 2]),
        (8, 16, 3, [16, 4]),
        (8, 1, 1, [1] * 20),
        (SIDE, 1, 3, [GROUP_PIXELS // SIDE**2] * 4),
        (SIDE, 4, 3, [4] * 5),
    ],
)
def test_small_images_go_together(tmp_path: Path, side: int, batch: int, streams: int, sizes: list[int]) -> None:
    """Full batches, as many as fit; nothing is put together for a model that does one batch at a time."""
    (tmp_path / "in").mkdir()
    for number in range(20):
        Image.new("L", (side, side)).save(tmp_path / "in" / f"{number:02}.png")
    predictor = Sizes(batch, streams)
    outcome = predict(predictor, "m", [tmp_path / "in"], Wanted(tmp_path / "out", overlays=False))
    assert (outcome.done, outcome.failed) == (20, 0)
    assert sorted(predictor.met) == sorted(sizes)
    assert len(list((tmp_path / "out").glob("*.png"))) == 20
