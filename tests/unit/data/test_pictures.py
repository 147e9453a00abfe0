"""PNG files of masks, overlays and probabilities, as Pillow reads them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.pictures import PIXELS, as_rgb, label_counts, mask_png, overlay_png, probability_png

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (256, 3), np.uint8)
# One pixel, a row, a column, and more than is compressed at a time.
SIZES = [(1, 1), (1, 3000), (3000, 1), (PIXELS // 1000 + 3, 1000)]


def read(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_masks_are_class_ids_with_colours(size: tuple[int, int]) -> None:
    mask = RNG.choice(np.array([0, 1, 2, 255], np.uint8), size)
    for given in (mask, mask[::2, ::2]):
        image = read(mask_png(given, COLOURS))
        assert image.mode == "P"
        np.testing.assert_array_equal(image, given)
        assert image.getpalette() == COLOURS.ravel().tolist()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("channels", "count"), [("grey", 1), ("rgb", 3), ("bgr", 3)])
def test_overlays_are_the_rounded_mean_of_image_and_colour(size: tuple[int, int], channels: str, count: int) -> None:
    mask, pixels = RNG.integers(0, 5, size, np.uint8), RNG.integers(0, 256, (*size, count), np.uint8)
    for strength in (0, 0.3, 0.5):
        wanted = (as_rgb(pixels, channels) * (1 - strength) + COLOURS[mask] * strength).round()
        np.testing.assert_array_equal(read(overlay_png(pixels, mask, COLOURS, channels, strength)), wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_probabilities_are_sixteen_bits(size: tuple[int, int]) -> None:
    plane = RNG.random(size, np.float32)
    plane.flat[0] = 1
    np.testing.assert_array_equal(read(probability_png(plane)), (plane * np.float32(65535)).round())


@pytest.mark.parametrize("size", [(5, 7), (2, PIXELS)])
@pytest.mark.parametrize("classes", [3, 16, 17, 256])
def test_pixels_of_each_class_are_counted(size: tuple[int, int], classes: int) -> None:
    mask = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    assert label_counts(mask, classes) == np.bincount(mask.ravel(), minlength=256)[:classes].tolist()
