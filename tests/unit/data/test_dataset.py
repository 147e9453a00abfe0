"""Datasets: pairing, splits, and every bad folder and file named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig, PreprocessingConfig
from pipeline.data.dataset import SEEDS, Dataset, Sample, image_folder, open_dataset
from pipeline.errors import ConfigError, DataError

GREY = PreprocessingConfig(height=16, width=16, channels="grey")
RGB = PreprocessingConfig(height=16, width=16)
CLASSES = [{"name": name, "colour": [0, 0, n]} for n, name in enumerate(["background", "cell", "rim", "core"])]


def folder_config(root: Path, **keys: Any) -> DataConfig:
    base = {
        "kind": "folder",
        "root": str(root),
        "classes": CLASSES[:2],
        "train": {"images": "images", "labels": "labels"},
    }
    return DataConfig.model_validate({**base, **keys})


def cells_config(**keys: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"kind": "cells", "classes": CLASSES, "train_images": 3, "validation_images": 2, **keys}
    )


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pairs, n of them bright in image n, written in another order than their names'."""
    for n in (7, 2, 9, 0, 4, 1, 8, 3, 6, 5):
        write(tmp_path / "images" / f"i{n}.png", np.full((4, 6, 3), n * 20, np.uint8))
        label = np.zeros((4, 6), np.uint8)
        label.flat[:n] = 1
        write(tmp_path / "labels" / f"i{n}.png", label)
    return tmp_path


class TestFolders:
    def test_pairs_by_name_in_sorted_order(self, root: Path) -> None:
        (root / "images" / "i3.png").rename(root / "images" / "i3.PNG")
        (root / "images" / "notes.txt").touch()
        (root / "images" / ".hidden.png").touch()
        samples = list(image_folder(root / "images", "rgb", root / "labels"))
        assert [sample.name for sample in samples] == [f"i{n}" for n in range(10)]
        for n, sample in enumerate(samples):
            assert sample.image.shape == (4, 6, 3)
            assert sample.image[0, 0, 0] == n * 20
            assert sample.label is not None
            assert sample.label.sum() == n

    def test_labels_may_have_another_ending(self, root: Path) -> None:
        (root / "labels" / "i0.png").unlink()
        write(root / "labels" / "i0.bmp", np.ones((4, 6), np.uint8))
        assert image_folder(root / "images", "rgb", root / "labels")[0].label is not None

    def test_without_labels(self, root: Path) -> None:
        dataset = image_folder(root / "images", "grey")
        assert len(dataset) == 10
        assert dataset[-1].label is None
        assert dataset[-1].image.shape == (4, 6, 1)

    def test_patterns_pair_by_what_their_star_stands_for(self, tmp_path: Path) -> None:
        for city, number in (("ulm", 2), ("bonn", 1), ("bonn", 3)):
            name = f"{city}_{number}"
            write(tmp_path / "left" / city / f"{name}_left.png", np.full((4, 6, 3), number, np.uint8))
            write(tmp_path / "left" / city / f"{name}_right.png", np.zeros((4, 6, 3), np.uint8))
            write(tmp_path / "fine" / city / f"{name}_ids.png", np.full((4, 6), number % 2, np.uint8))
            write(tmp_path / "fine" / city / f"{name}_colour.png", np.zeros((4, 6, 3), np.uint8))
        split = {"images": "left/*/*_left.png", "labels": "fine/*/*_ids.png"}
        dataset = open_dataset(folder_config(tmp_path, train=split, validation=split), RGB, "train")
        assert dataset.names == ("bonn_1", "bonn_3", "ulm_2")
        assert [(int(s.image[0, 0, 0]), int(s.label[0, 0])) for s in dataset if s.label is not None] == [
            (1, 1),
            (3, 1),
            (2, 0),
        ]

    def test_patterns_that_cannot_name_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"the pattern .*\*/\*\.png finds nothing"):
            image_folder(tmp_path / "*" / "*.png", "rgb")
        for pattern, stars in (("*/image.png", 0), ("*_*.png", 2)):
            with pytest.raises(DataError, match=f"has {stars} stars in its last part"):
                image_folder(tmp_path / pattern, "rgb")
        for folder in ("a", "b"):
            write(tmp_path / folder / "same.png", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(DataError, match=r"b/same\.png and .*a/same\.png have the same name"):
            image_folder(tmp_path / "*" / "*.png", "rgb")

    def test_other_wildcards_mean_themselves(self, tmp_path: Path) -> None:
        for folder in ("[ab]", "a"):
            write(tmp_path / folder / f"{folder}.png", np.zeros((4, 6, 3), np.uint8))
        assert image_folder(tmp_path / "[ab]" / "*.png", "rgb").names == ("[ab]",)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
            image_folder(tmp_path / "nowhere", "rgb")

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").touch()
        with pytest.raises(DataError, match="is empty") as caught:
            image_folder(tmp_path, "rgb")
        assert caught.value.got == "1 other files"

    def test_image_without_label(self, root: Path) -> None:
        (root / "labels" / "i4.png").unlink()
        with pytest.raises(DataError, match=r"i4\.png has no label map") as caught:
            open_dataset(folder_config(root), RGB, "train")
        assert caught.value.got == "1 of 10 images without one"

    def test_label_without_image_is_left_out(self, root: Path) -> None:
        write(root / "labels" / "more.png", np.zeros((4, 6), np.uint8))
        assert len(image_folder(root / "images", "rgb", root / "labels")) == 10

    def test_duplicate_stem(self, root: Path) -> None:
        write(root / "images" / "i4.bmp", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(DataError, match=r"i4\.png and .*i4\.bmp have the same name"):
            image_folder(root / "images", "rgb")

    def test_label_of_another_size(self, root: Path) -> None:
        write(root / "labels" / "i4.png", np.zeros((6, 4), np.uint8))
        dataset = image_folder(root / "images", "rgb", root / "labels")
        with pytest.raises(DataError, match=r"labels/i4\.png has another size") as caught:
            dataset[4]
        assert caught.value.expected.startswith("6×4")
        assert caught.value.got == "4×6"

    def test_colour_label(self, root: Path) -> None:
        write(root / "labels" / "i4.png", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(DataError, match=r"labels/i4\.png has colours"):
            image_folder(root / "images", "rgb", root / "labels")[4]

    def test_truncated_image(self, root: Path) -> None:
        path = root / "images" / "i4.png"
        write(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:3000])
        dataset = image_folder(root / "images", "rgb")
        with pytest.raises(DataError, match=r"images/i4\.png cannot be decoded"):
            list(dataset)

    def test_id_out_of_range(self, root: Path) -> None:
        label = np.zeros((4, 6), np.uint8)
        label[0, :3] = 2, 7, 255
        write(root / "labels" / "i0.png", label)
        config = folder_config(root, validation={"images": "images", "labels": "labels"}, void=255)
        with pytest.raises(DataError, match=r"labels/i0\.png holds the value 2, which is no class") as caught:
            open_dataset(config, RGB, "validation")[0]
        assert caught.value.expected == "values [0, 1, 255]"
        assert caught.value.got == "2 other value(s): [2, 7]"

    def test_label_values(self, root: Path) -> None:
        label = np.zeros((4, 6), np.uint8)
        label[0, :3] = 100, 200, 255
        write(root / "labels" / "i0.png", label)
        splits = {"validation": {"images": "images", "labels": "labels"}}
        config = folder_config(root, label_values={0: 0, 100: 1, 200: 255}, void=255, **splits)
        sample = open_dataset(config, RGB, "validation")[0]
        assert sample.label is not None
        assert sample.label[0, :4].tolist() == [1, 255, 255, 0]

    @pytest.mark.parametrize("values", [{300: 0}, {-1: 0}, {5: 2}, {5: -1}])
    def test_label_values_that_lead_nowhere(self, root: Path, values: dict[int, int]) -> None:
        with pytest.raises(ConfigError, match="label_values maps"):
            open_dataset(folder_config(root, label_values=values), RGB, "train")


class TestSplits:
    def test_held_out_images_are_not_trained_on(self, root: Path) -> None:
        config = folder_config(root, validation_fraction=0.3, seed=4)
        train, validation = (set(open_dataset(config, RGB, split).names) for split in ("train", "validation"))
        assert len(validation) == 3
        assert train | validation == {f"i{n}" for n in range(10)}
        assert not train & validation
        assert set(open_dataset(config, RGB, "validation").names) == validation
        other = folder_config(root, validation_fraction=0.3, seed=5)
        assert set(open_dataset(other, RGB, "validation").names) != validation

    def test_calibration_images_are_training_images(self, root: Path) -> None:
        config = folder_config(root)
        assert open_dataset(config, RGB, "calibration").names == open_dataset(config, RGB, "train").names

    def test_named_splits(self, root: Path) -> None:
        write(root / "other" / "c.png", np.zeros((4, 6, 3), np.uint8))
        config = folder_config(root, calibration={"images": "other"}, validation={"images": "images"})
        assert open_dataset(config, RGB, "calibration").names == ("c",)
        assert len(open_dataset(config, RGB, "train")) == 10
        assert open_dataset(config, RGB, "validation")[0].label is None

    def test_both_splits_keep_an_image(self, root: Path) -> None:
        for n in range(2, 10):
            (root / "images" / f"i{n}.png").unlink()
        config = folder_config(root, validation_fraction=0.9)
        assert [len(open_dataset(config, RGB, split)) for split in ("train", "validation")] == [1, 1]
        (root / "images" / "i1.png").unlink()
        with pytest.raises(DataError, match="one image"):
            open_dataset(config, RGB, "train")

    def test_choose_and_first(self) -> None:
        dataset = Dataset(tuple("abcdefgh"), lambda name: Sample(name, np.zeros((1, 1, 1), np.uint8), None))
        chosen = dataset.choose(3, seed=1)
        assert len(set(chosen.names)) == 3
        assert list(chosen.names) == sorted(chosen.names)
        assert chosen.names == dataset.choose(3, seed=1).names
        assert len({dataset.choose(3, seed=n).names for n in range(9)}) > 1
        assert dataset.choose(99, seed=1).names == dataset.names
        assert dataset.first(2).names == ("a", "b")
        assert dataset.first(None).names == dataset.names


def test_content_hash_is_of_the_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    write(tmp_path / "a" / "x.png", pixels)
    write(tmp_path / "b" / "y.bmp", pixels)
    (a,), (b,) = image_folder(tmp_path / "a", "rgb"), image_folder(tmp_path / "b", "rgb")
    assert a.content_hash() == b.content_hash()
    changed = pixels.copy()
    changed[5, 7, 2] ^= 1
    for other in (changed, pixels[::-1], pixels.reshape(8, 6, 3)):
        assert Sample("x", other, None).content_hash() != a.content_hash()


def test_fingerprint_follows_the_files(root: Path) -> None:
    before = image_folder(root / "images", "rgb", root / "labels").fingerprint()
    assert image_folder(root / "images", "rgb", root / "labels").fingerprint() == before
    write(root / "labels" / "i3.png", np.ones((4, 6), np.uint8))
    assert image_folder(root / "images", "rgb", root / "labels").fingerprint() != before


class TestCells:
    def test_the_same_seed_draws_the_same_cells(self) -> None:
        first, again = (open_dataset(cells_config(), GREY, "train")[1] for _ in range(2))
        np.testing.assert_array_equal(first.image, again.image)
        assert first.label is not None
        assert again.label is not None
        np.testing.assert_array_equal(first.label, again.label)
        assert (first.image.shape, first.image.dtype) == ((512, 512, 1), np.uint8)
        assert (first.label.shape, first.label.dtype) == ((512, 512), np.uint8)
        assert set(np.unique(first.label)) <= {0, 1, 2, 3}
        other = open_dataset(cells_config(seed=50), GREY, "train")[1]
        assert other.content_hash() != first.content_hash()

    def test_splits_hold_different_cells(self) -> None:
        hashes = [open_dataset(cells_config(), GREY, split)[0].content_hash() for split in SEEDS]
        assert len(set(hashes)) == 3

    def test_split_seeds_are_disjoint(self) -> None:
        largest = 500_000
        ranges = [range(start, start + largest) for start in SEEDS.values()]
        assert all(a.stop <= b.start or b.stop <= a.start for a in ranges for b in ranges if a is not b)

    def test_counts(self) -> None:
        assert [len(open_dataset(cells_config(), GREY, split)) for split in SEEDS] == [3, 2, 3]

    def test_other_networks_are_refused(self) -> None:
        with pytest.raises(DataError, match="4 classes and one channel"):
            open_dataset(cells_config(), RGB, "train")
        with pytest.raises(DataError, match="4 classes and one channel"):
            open_dataset(cells_config(classes=CLASSES[:3]), GREY, "train")
