"""What is seen of a folder of images: parts, sizes, label values, statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.survey.images import survey_images


def draw(folder: Path, *names: str, size: tuple[int, int] = (20, 12), level: int = 100, mode: str = "L") -> None:
    """Images of one level, width × height."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new(mode, size, level if mode == "L" else (level, 0, 0)).save(folder / name)


@pytest.mark.parametrize(
    ("images", "labels", "train", "validation"),
    [
        (
            ["train/images", "val/images"],
            ["train/labels", "val/labels"],
            ("train/images", "train/labels"),
            "val/images",
        ),
        (["training", "Validation"], [], ("training", None), "Validation"),
        (["images/train", "images/val"], ["masks/train"], ("images/train", "masks/train"), "images/val"),
        (["imgs"], ["annotations"], ("imgs", "annotations"), None),
        (["."], [], (".", None), None),
        (["."], ["labels"], (".", "labels"), None),
        (["train/images"], ["train/labels"], ("train/images", "train/labels"), None),
    ],
)
def test_parts(
    tmp_path: Path, images: list[str], labels: list[str], train: tuple[str, str | None], validation: str | None
) -> None:
    for folder in (*images, *labels):
        draw(tmp_path / folder, "a.png", "b.png", level=1)
    facts = survey_images(tmp_path, None, 1)
    assert facts.root == tmp_path
    assert (facts.train.images, facts.train.labels, facts.train.count) == (*train, 2)
    assert (facts.validation and facts.validation.images) == validation
    assert facts.labels_read == 2 * len(labels)


def test_the_folder_of_images_itself_with_labels_beside_it(tmp_path: Path) -> None:
    draw(tmp_path / "images", "a.png")
    draw(tmp_path / "labels", "a.png", level=3)
    facts = survey_images(tmp_path / "images", None, 1)
    assert (facts.root, facts.train.images, facts.train.labels) == (tmp_path, "images", "labels")
    assert facts.label_values == (3,)


def test_labels_elsewhere_and_called_otherwise(tmp_path: Path) -> None:
    draw(tmp_path / "photos", "a.png", "ab.png")
    draw(tmp_path / "truth", "a_mask.png", "ab_mask.png", level=1)
    facts = survey_images(tmp_path / "photos", tmp_path / "truth", 1)
    assert facts.train.labels == f"{tmp_path}/truth/*_mask.png"
    assert facts.labels_read == 2
    assert facts.label_values == (1,)


def test_labels_elsewhere_of_a_folder_with_parts(tmp_path: Path) -> None:
    for part in ("train", "val"):
        draw(tmp_path / "data" / part, "a.png")
        draw(tmp_path / "truth" / part, "a.png", level=2)
    facts = survey_images(tmp_path / "data", tmp_path / "truth", 1)
    assert facts.train.labels == f"{tmp_path}/truth/train"
    assert facts.validation is not None
    assert facts.validation.labels == f"{tmp_path}/truth/val"


def test_sizes_statistics_and_channels(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png", level=51)
    draw(tmp_path, "c.png", size=(40, 30), level=153)
    grey = survey_images(tmp_path, None, None)
    assert grey.sizes == {(12, 20): 2, (30, 40): 1}
    assert (grey.channels, grey.colour) == ("grey", False)
    assert grey.mean == (pytest.approx((0.2 + 0.2 + 0.6) / 3, abs=1e-3),)
    assert grey.std == (pytest.approx(np.std([0.2, 0.2, 0.6]), abs=1e-3),)
    assert survey_images(tmp_path, None, 3).mean == grey.mean * 3


def test_colour_images_and_a_deviation_that_is_never_zero(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", mode="RGB", level=255)
    facts = survey_images(tmp_path, None, None)
    assert (facts.channels, facts.colour, facts.mean) == ("rgb", True, (1.0, 0.0, 0.0))
    assert facts.std == (0.01, 0.01, 0.01)
    assert survey_images(tmp_path, None, 1).channels == "grey"


def test_photographs_that_lie_on_their_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 12)).save(tmp_path / "a.jpg", exif=exif)
    assert survey_images(tmp_path, None, 1).sizes == {(20, 12): 1}


def test_the_colours_of_palette_label_maps(tmp_path: Path) -> None:
    draw(tmp_path / "images", "a.png")
    (tmp_path / "labels").mkdir()
    label = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20) % 3, "P")
    label.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    label.save(tmp_path / "labels" / "a.png")
    assert survey_images(tmp_path, None, 1).palette == {0: (9, 9, 9), 1: (200, 0, 0), 2: (0, 200, 0)}


def test_many_images_are_sampled(tmp_path: Path) -> None:
    draw(tmp_path, *(f"{i:03d}.png" for i in range(60)), size=(4, 4))
    assert survey_images(tmp_path, None, 1).sampled == 48


def test_bad_folders(tmp_path: Path) -> None:
    draw(tmp_path / "photos", "a.png")
    with pytest.raises(DataError, match=r"photo does not exist; did you mean .*photos\?"):
        survey_images(tmp_path / "photo", None, 1)
    with pytest.raises(DataError, match="masks does not exist"):
        survey_images(tmp_path / "photos", tmp_path / "masks", 1)
    with pytest.raises(DataError, match=r"(?s)has no images.*got: photos"):
        survey_images(tmp_path, None, 1)
    (tmp_path / "photos" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png cannot be decoded"):
        survey_images(tmp_path / "photos", None, 1)


def test_bad_labels(tmp_path: Path) -> None:
    draw(tmp_path / "images", "a.png", "b.png")
    draw(tmp_path / "labels", "a.png")
    with pytest.raises(DataError, match=r"b\.png has no label map"):
        survey_images(tmp_path, None, 1)
    draw(tmp_path / "labels", "b.png", mode="RGB")
    with pytest.raises(DataError, match="colours instead of class ids"):
        survey_images(tmp_path, None, 1)
