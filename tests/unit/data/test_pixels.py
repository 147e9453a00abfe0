"""Pictures from arrays and files, at once and by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import pixels
from pipeline.data.pixels import open_picture, picture_of_array
from pipeline.data.preprocessing import read_image
from pipeline.errors import DataError

RGB = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)


def test_arrays_are_read_like_files(tmp_path: Path) -> None:
    alpha = np.dstack([RGB, np.full((6, 5), 7, np.uint8)])
    for name, array in (("grey", RGB[..., 0]), ("rgb", RGB), ("rgba", alpha)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        for channels in ("grey", "rgb", "bgr"):
            wanted = read_image(tmp_path / f"{name}.png", channels)
            np.testing.assert_array_equal(picture_of_array(array, channels).pixels, wanted)


def test_sixteen_bits_single_channels_and_tensors() -> None:
    deep = RGB[..., :1].astype(np.uint16) * 256 + 9
    np.testing.assert_array_equal(picture_of_array(deep, "grey").pixels, RGB[..., :1])

    shared = torch.from_numpy(RGB.copy())
    for tensor in (shared, shared[1:, 2:]):  # of any strides
        assert np.shares_memory(picture_of_array(tensor, "rgb").pixels, shared.numpy())
        np.testing.assert_array_equal(picture_of_array(tensor, "rgb").pixels, tensor.numpy())


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 2), np.float32), np.zeros((0, 4), np.uint8), np.zeros((2, 2, 5), np.uint8), object(), "a.png"],
)
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(DataError, match="no image"):
        picture_of_array(image, "rgb")


class OnGpu:
    """As numba's arrays, which numpy would copy without a word."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return RGB


def test_nothing_is_fetched_from_the_gpu() -> None:
    with pytest.raises(DataError, match="it is in GPU memory") as caught:
        picture_of_array(OnGpu(), "rgb")
    assert "predict_on_gpu" in caught.value.fix


@pytest.mark.parametrize(("channels", "ending"), [("grey", "tif"), ("bgr", "png"), ("rgb", "tif")])
def test_large_files_are_read_by_rows(
    channels: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RGB[..., 0] if channels == "grey" else RGB).save(path)
    wanted = read_image(path, channels)
    monkeypatch.setattr(pixels, "LARGE", 8)
    picture = open_picture(path, channels)
    assert picture.is_large
    np.testing.assert_array_equal(picture.rows(2, 5), wanted[2:5])
    np.testing.assert_array_equal(picture.pixels, wanted)
    picture.close()


def test_large_rotated_and_deep_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Image.Exif()
    turned[pixels.ORIENTATION] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=turned)
    Image.fromarray(RGB[..., 0].astype(np.uint16) * 256).save(tmp_path / "b.tif")
    monkeypatch.setattr(pixels, "LARGE", 8)
    np.testing.assert_array_equal(open_picture(tmp_path / "a.png", "rgb").pixels, np.rot90(RGB, -1))
    np.testing.assert_array_equal(open_picture(tmp_path / "b.tif", "grey").rows(1, 3), RGB[1:3, :, :1])
