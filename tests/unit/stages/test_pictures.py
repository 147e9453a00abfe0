"""Pictures of flipped pixels on stand-ins whose masks are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import ModelCard, TensorSpec
from pipeline.config import PreprocessingConfig
from pipeline.data.dataset import Sample
from pipeline.reports import PicturedImage, PicturesReport
from pipeline.stages import pictures, report
from tests.unit.stages.test_validate import CLASSES, Constant, logits_of

LARGE = 40


class Large(Constant):
    inputs = (TensorSpec("image", (1, 1, LARGE, LARGE), "float32"),)
    outputs = (TensorSpec("logits", (1, 3, LARGE, LARGE), "float32"),)


class Labels(Large):
    outputs = (TensorSpec("labels", (1, LARGE, LARGE), "uint8"),)


CARD = ModelCard("tiny", PreprocessingConfig(height=LARGE, width=LARGE, channels="grey"), CLASSES, 255)


def drawn(folder: Path, sample: Sample, *, labels: bool = False) -> PicturedImage:
    """FP32 sees class 0, unsure in the first row; INT8 sees class 1 in the first row and at one pixel below."""
    mask = np.zeros((LARGE, LARGE), np.uint8)
    scores = logits_of(mask)
    scores[0, 1, 0] = 3.99
    other = mask.copy()
    other[0] = 1
    other[30, 17] = 1
    if labels:
        sides = Labels(mask[np.newaxis], "labels"), Labels(other[np.newaxis], "labels")
    else:
        sides = Large(scores), Large(logits_of(other))
    made = pictures.draw(sides[0], {"int8": sides[1]}, [sample], 1, CARD, 0.01, folder)
    (image,) = made.images
    return image


def sample(label: bool = True) -> Sample:
    grey = np.full((LARGE, LARGE, 1), 128, np.uint8)
    return Sample("a name", grey, np.zeros((LARGE, LARGE), np.uint8) if label else None)


def test_near_ties_are_told_from_what_fp32_was_sure_of(tmp_path: Path) -> None:
    image = drawn(tmp_path, sample())
    assert (image.flipped, image.near_ties, image.pixels) == ({"int8": 41}, {"int8": 40}, LARGE * LARGE)
    assert list(image.views) == ["image", "reference", "label", "int8"]
    with Image.open(tmp_path / image.marks["int8"]) as marks:
        kinds = np.asarray(marks)
        assert marks.info["transparency"] == pictures.SAME
    assert set(kinds[0]) == {pictures.NEAR_TIE}
    assert kinds[30, 17] == pictures.CLEAR
    assert np.count_nonzero(kinds) == 41


def test_reduction_loses_no_flipped_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LONGEST", 15)
    image = drawn(tmp_path, sample())
    assert (image.reduced, image.width, image.height) == (3, 14, 14)
    for file in (*image.views.values(), *image.marks.values()):
        with Image.open(tmp_path / file) as picture:
            assert picture.size == (14, 14)
    with Image.open(tmp_path / image.marks["int8"]) as marks:
        assert np.asarray(marks)[10, 5] == pictures.CLEAR


def test_labels_have_no_margins(tmp_path: Path) -> None:
    image = drawn(tmp_path, sample(label=False), labels=True)
    assert (image.flipped, image.near_ties) == ({"int8": 41}, {"int8": None})
    assert "label" not in image.views


def test_pictures_that_have_no_room_on_the_page_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "page").mkdir()
    image = drawn(tmp_path / "pictures", sample())
    sizes = [(tmp_path / "pictures" / file).stat().st_size for file in (*image.views.values(), *image.marks.values())]
    three = PicturesReport(tuple(replace(image, name=name) for name in ("one", "two", "three")))
    inputs = report.Inputs(CARD, {}, pictures=three, pictures_folder=tmp_path / "pictures")
    monkeypatch.setattr(report, "PICTURES_BYTES", 3.5 * sum(sizes))  # base64 takes a third more
    page = report.write_report(inputs, tmp_path / "page").read_text()
    assert 'aria-label="two"' in page
    assert 'aria-label="three"' not in page
    assert "1 more image(s) had no room on this page" in page
