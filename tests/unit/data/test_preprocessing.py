"""From files to network input and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.artifacts import TensorSpec
from pipeline.backends.base import feed_image
from pipeline.config import PreprocessingConfig
from pipeline.data.preprocessing import (
    class_ids,
    fit_image,
    fit_label,
    normalise,
    preprocess,
    read_image,
    read_label,
    restore_mask,
)
from pipeline.errors import DataError, ModelError


def spec(height: int = 8, width: int = 8, **keys: Any) -> PreprocessingConfig:
    return PreprocessingConfig.model_validate({"height": height, "width": width, **keys})


def saved(path: Path, pixels: np.ndarray, **keys: Any) -> Path:
    Image.fromarray(pixels).save(path, **keys)
    return path


RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14


class TestReadImage:
    def test_channel_orders(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.png", RGB)
        np.testing.assert_array_equal(read_image(path, "rgb"), RGB)
        np.testing.assert_array_equal(read_image(path, "bgr"), RGB[..., ::-1])
        assert read_image(path, "bgr").flags.c_contiguous
        grey = read_image(path, "grey")
        assert (grey.shape, grey.dtype) == ((2, 3, 1), np.uint8)
        weighted = RGB @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(grey[..., 0], weighted, atol=1)

    def test_grey_file_as_colour(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.png", RGB[..., 0])
        np.testing.assert_array_equal(read_image(path, "rgb"), np.repeat(RGB[..., :1], 3, axis=2))

    def test_transparency_is_dropped(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.png", np.dstack([RGB, np.full((2, 3), 9, np.uint8)]))
        np.testing.assert_array_equal(read_image(path, "rgb"), RGB)

    def test_palette_images_give_their_colours(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[0, 1]], np.uint8))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png", "rgb").tolist() == [[[10, 20, 30], [40, 50, 60]]]

    @pytest.mark.parametrize("ending", ["png", "tif"])
    def test_16_bit_grey_keeps_its_upper_byte(self, tmp_path: Path, ending: str) -> None:
        deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
        path = saved(tmp_path / f"a.{ending}", deep)
        assert read_image(path, "grey")[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]
        assert read_image(path, "rgb")[..., 2].tolist() == [[0, 0, 1], [128, 255, 255]]

    def test_32_bit_integers_are_clipped_to_16(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.tif", np.array([[-5, 512, 1 << 20]], np.int32))
        assert read_image(path, "grey")[..., 0].tolist() == [[0, 2, 255]]

    def test_floats_are_refused(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.tif", np.array([[0.2, 0.7]], np.float32))
        with pytest.raises(DataError, match=r"a\.tif holds floating-point"):
            read_image(path, "grey")

    @pytest.mark.parametrize(
        ("orientation", "turned"), [(3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)), (2, RGB[:, ::-1])]
    )
    def test_exif_orientation(self, tmp_path: Path, orientation: int, turned: np.ndarray) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / "a.png", RGB, exif=exif)
        np.testing.assert_array_equal(read_image(path, "rgb"), turned)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none\.png does not exist"):
            read_image(tmp_path / "none.png", "rgb")

    @pytest.mark.parametrize("kind", ["png", "jpg", "tif", "bmp"])
    def test_truncated(self, tmp_path: Path, kind: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = saved(tmp_path / f"a.{kind}", noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"a\.{kind} cannot be decoded"):
            read_image(path, "rgb")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
    def test_no_image(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be decoded"):
            read_image(path, "rgb")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be decoded"):
            read_image(tmp_path, "rgb")


class TestReadLabel:
    IDS = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)

    def test_grey(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(read_label(saved(tmp_path / "a.png", self.IDS)), self.IDS)

    def test_palette_indices_not_colours(self, tmp_path: Path) -> None:
        image = Image.fromarray(self.IDS)
        image.putpalette([value for n in range(256) for value in (255 - n, n, 7)])
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_label(tmp_path / "a.png"), self.IDS)

    def test_one_bit(self, tmp_path: Path) -> None:
        bits = np.array([[True, False], [False, True]])
        np.testing.assert_array_equal(read_label(saved(tmp_path / "a.png", bits)), [[1, 0], [0, 1]])

    @pytest.mark.parametrize("shape", [(2, 3, 3), (2, 3, 4)])
    def test_colours_are_refused(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="has colours instead of class ids"):
            read_label(saved(tmp_path / "a.png", np.zeros(shape, np.uint8)))

    def test_truncated(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.png", np.random.default_rng(0).integers(0, 9, (64, 64), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DataError, match="cannot be decoded"):
            read_label(path)


class TestFit:
    def test_none_keeps_the_size(self) -> None:
        image = np.ones((5, 7, 3), np.uint8)
        assert fit_image(image, spec(resize="none")) is image

    @pytest.mark.parametrize("channels", [1, 3])
    def test_stretch(self, channels: int) -> None:
        image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        fitted = fit_image(image, spec(10, 21, resize="stretch"))
        assert fitted.shape == (10, 21, channels)
        assert fitted[0, 0].tolist() == image[0, 0].tolist()

    def test_letterbox_pads_both_sides_evenly(self) -> None:
        fitted = fit_image(np.full((4, 8, 1), 200, np.uint8), spec(8, 8, resize="letterbox", pad_value=7))
        assert (fitted[:2] == 7).all()
        assert (fitted[2:6] == 200).all()
        assert (fitted[6:] == 7).all()

    def test_letterbox_enlarges(self) -> None:
        fitted = fit_image(np.full((2, 4, 3), 50, np.uint8), spec(8, 8, resize="letterbox"))
        assert (fitted[2:6] == 50).all()
        assert (fitted[[0, 1, 6, 7]] == 0).all()

    def test_labels_are_never_blended(self) -> None:
        label = np.random.default_rng(0).choice(np.array([0, 9], np.uint8), (13, 11))
        assert set(np.unique(fit_label(label, spec(29, 31, resize="stretch"), None))) == {0, 9}

    def test_letterboxed_labels_get_void_around(self) -> None:
        letterbox = spec(8, 8, resize="letterbox", pad_value=3)
        label = np.ones((4, 8), np.uint8)
        assert set(fit_label(label, letterbox, 255)[:2].ravel()) == {255}
        assert set(fit_label(label, letterbox, None)[:2].ravel()) == {0}

    def test_image_and_label_stay_aligned(self) -> None:
        label = np.zeros((30, 50), np.uint8)
        label[10:20, 20:40] = 1
        letterbox = spec(64, 64, resize="letterbox")
        bright = fit_image(label[..., np.newaxis] * 255, letterbox)[..., 0] > 127
        differing = (bright != fit_label(label, letterbox, 0).astype(bool)).sum()
        assert differing <= 2 * (2 * 13 + 2 * 26)


class TestInterpolation:
    ROW = np.array([[0, 10, 20, 30, 40, 50]], np.uint8)[..., np.newaxis]

    def test_nearest_takes_pixels_as_they_are(self) -> None:
        smaller = spec(1, 3, resize="stretch", channels="grey", interpolation="nearest")
        assert fit_image(self.ROW, smaller)[0, :, 0].tolist() == [10, 30, 50]
        larger = smaller.model_copy(update={"width": 12})
        assert fit_image(self.ROW, larger)[0, :, 0].tolist() == [v for v in range(0, 60, 10) for _ in range(2)]

    def test_bilinear_is_the_default(self) -> None:
        smaller = spec(1, 3, resize="stretch", channels="grey")
        assert fit_image(self.ROW, smaller)[0, :, 0].tolist() == [7, 25, 43]


class TestPreprocess:
    def test_normalise(self) -> None:
        image = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
        x = normalise(image, spec(scale=0.5, mean=(1, 2, 3), std=(1, 2, 4)))
        assert (x.shape, x.dtype) == ((3, 2, 2), np.float32)
        assert x.flags.c_contiguous
        for c in range(3):
            np.testing.assert_allclose(x[c], (image[..., c] * 0.5 - (1, 2, 3)[c]) / (1, 2, 4)[c])

    def test_one_mean_serves_all_channels(self) -> None:
        image = np.full((2, 2, 3), 255, np.uint8)
        np.testing.assert_allclose(normalise(image, spec(mean=(0.5,), std=(0.25,))), 2, rtol=1e-6)

    @pytest.mark.parametrize("resize", ["stretch", "letterbox"])
    def test_whole(self, resize: str) -> None:
        x = preprocess(np.full((9, 5, 1), 255, np.uint8), spec(16, 12, resize=resize, channels="grey"))
        assert (x.shape, x.dtype, x.max()) == ((1, 16, 12), np.float32, 1.0)


class TestRestoreMask:
    @settings(deadline=None)
    @given(
        st.sampled_from(["none", "stretch", "letterbox"]),
        *(st.integers(1, 40) for _ in range(4)),
    )
    def test_shape_and_values(self, resize: str, height: int, width: int, to_height: int, to_width: int) -> None:
        how = spec(to_height, to_width, resize=resize)
        label = np.random.default_rng(0).integers(0, 5, (height, width), dtype=np.uint8)
        restored = restore_mask(fit_label(label, how, 99), how, height, width)
        assert (restored.shape, restored.dtype) == ((height, width), np.uint8)
        assert set(np.unique(restored)) <= set(np.unique(label))

    @settings(deadline=None)
    @given(
        st.sampled_from(["none", "stretch", "letterbox"]), *(st.integers(1, 20) for _ in range(2)), st.integers(1, 4)
    )
    def test_inverts_enlargement(self, resize: str, height: int, width: int, factor: int) -> None:
        how = spec(height * factor, width * factor, resize=resize)
        label = np.random.default_rng(1).integers(0, 5, (height, width), dtype=np.uint8)
        np.testing.assert_array_equal(restore_mask(fit_label(label, how, 99), how, height, width), label)

    def test_padding_is_cut(self) -> None:
        how = spec(64, 64, resize="letterbox")
        mask = np.full((64, 64), 9)
        mask[16:48] = 1
        np.testing.assert_array_equal(restore_mask(mask, how, 100, 200), np.ones((100, 200)))


class TestClassIds:
    def test_labels_and_scores(self) -> None:
        labels = np.array([[[0, 1], [2, 1]]], np.uint8)
        scores = np.eye(3, dtype=np.float32)[labels].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(class_ids(labels, 3), labels[0])
        np.testing.assert_array_equal(class_ids(scores, 3), labels[0])

    def test_equal_scores_give_the_smaller_class(self) -> None:
        assert class_ids(np.zeros((1, 4, 2, 2), np.float32), 4).tolist() == [[0, 0], [0, 0]]

    def test_ids_without_a_class(self) -> None:
        with pytest.raises(ModelError, match="gives class 3, and its card names 3 classes"):
            class_ids(np.full((1, 2, 2), 3, np.uint8), 3)


class TestFeedImage:
    IMAGE = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    HOW = spec(16, 12, resize="letterbox", mean=(0.5, 0.4, 0.3), std=(0.2,))

    def test_floats_are_normalised_and_images_are_not(self) -> None:
        floats = feed_image(TensorSpec("x", (1, 3, 16, 12), "float32"), self.IMAGE, self.HOW)
        np.testing.assert_array_equal(floats["x"], preprocess(self.IMAGE, self.HOW)[np.newaxis])
        images = feed_image(TensorSpec("x", (1, 16, 12, 3), "uint8"), self.IMAGE, self.HOW)
        np.testing.assert_array_equal(images["x"], fit_image(self.IMAGE, self.HOW)[np.newaxis])
        assert images["x"].flags.c_contiguous

    @pytest.mark.parametrize(("batch", "count"), [("n", 1), (3, 3)])
    def test_a_fixed_batch_is_filled_and_free_sizes_take_any(self, batch: int | str, count: int) -> None:
        how = spec(1, 1, resize="none")
        fed = feed_image(TensorSpec("x", (batch, "h", "w", 3), "uint8"), self.IMAGE[:, ::-1], how)["x"]
        assert fed.shape == (count, 9, 5, 3)
        assert fed.flags.c_contiguous
        assert all((one == self.IMAGE[:, ::-1]).all() for one in fed)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((1, 3, 16, 13), "float32"), ((1, 1, 16, 12), "float32"), ((1, 16, 12, 1), "uint8"), ((16, 12, 3), "uint8")],
    )
    def test_other_sizes_are_named(self, shape: tuple[int, ...], dtype: str) -> None:
        with pytest.raises(DataError, match="the image a has another size") as caught:
            feed_image(TensorSpec("x", shape, dtype), self.IMAGE, self.HOW, "the image a")
        assert str(shape) in caught.value.expected
