"""The one way from an image file to network input and from a mask back to the image's size."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import PreprocessingConfig
from pipeline.errors import DataError, ModelError
from pipeline.metrics.outputs import strongest_class

Pixels = NDArray[np.uint8]


def read_image(path: Path, channels: str) -> Pixels:
    """An image file as uint8 (H, W, C): grey, rgb or bgr; EXIF rotation applied, 16-bit grey scaled to 8 bits.

    Raises:
        DataError: the file is missing, no image, truncated, or holds floating-point values.
    """
    with _opened(path) as image:
        if image.mode == "F":
            raise DataError(
                f"the image {path} holds floating-point values",
                expected="8 or 16 bits a channel",
                got="mode F, whose range no file states",
                fix="convert it to an 8-bit image",
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        pixels = np.asarray(image.convert("L" if channels == "grey" else "RGB"))
    pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels[..., ::-1]) if channels == "bgr" else pixels


def read_label(path: Path) -> Pixels:
    """A label map as uint8 (H, W), values as stored (palette images: indices; 1-bit images: 0 and 1).

    Raises:
        DataError: the file is missing, no image, truncated, or has more than one channel.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise DataError(
                f"the label map {path} has colours instead of class ids",
                expected="one 8-bit channel (mode L or P), value = class id",
                got=f"mode {image.mode}",
                fix="convert the colours to class ids",
            )
        return np.array(image, dtype=np.uint8)


class _opened:
    """``with`` a fully decoded image; Pillow's errors become DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            with ExitStack() as opened:
                self.image = opened.enter_context(Image.open(self.path))
                self.image.load()
                opened.pop_all()
        except FileNotFoundError as error:
            raise DataError(f"the image {self.path} does not exist", fix="check the path") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"the image {self.path} cannot be decoded: {error}",
                expected="a complete image file",
                fix="replace or remove the file",
            ) from error
        return self.image

    def __exit__(self, *exc: object) -> None:
        self.image.close()


def _placement(spec: PreprocessingConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the image inside the network input."""
    if spec.resize == "letterbox":
        ratio = min(spec.height / height, spec.width / width)
        inner = max(1, round(height * ratio)), max(1, round(width * ratio))
        return (spec.height - inner[0]) // 2, (spec.width - inner[1]) // 2, *inner
    if spec.resize == "stretch":
        return 0, 0, spec.height, spec.width
    return 0, 0, height, width


def _fit(plane: Pixels, spec: PreprocessingConfig, resample: Image.Resampling, fill: int) -> Pixels:
    """Resize or letterbox one image (H, W, C) or label map (H, W)."""
    top, left, height, width = _placement(spec, *plane.shape[:2])
    if (height, width) != plane.shape[:2]:
        squeezed = plane[..., 0] if plane.ndim == 3 and plane.shape[2] == 1 else plane
        resized = np.asarray(Image.fromarray(squeezed).resize((width, height), resample))
        plane = resized.reshape(height, width, *plane.shape[2:])
    if spec.resize != "letterbox" or (height, width) == (spec.height, spec.width):
        return plane
    canvas = np.full((spec.height, spec.width, *plane.shape[2:]), fill, np.uint8)
    canvas[top : top + height, left : left + width] = plane
    return canvas


def fit_image(image: Pixels, spec: PreprocessingConfig) -> Pixels:
    """The uint8 (H, W, C) image at the network's size (``resize: none`` keeps its own)."""
    return _fit(image, spec, Image.Resampling.BILINEAR, spec.pad_value)


def fit_label(label: Pixels, spec: PreprocessingConfig, void: int | None) -> Pixels:
    """The uint8 (H, W) label map at the network's size; letterboxing adds void (class 0 where there is none)."""
    return _fit(label, spec, Image.Resampling.NEAREST, 0 if void is None else void)


def coefficients(spec: PreprocessingConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and offset, float32 (C,) each: ``(x * scale - mean) / std`` is ``x * factor + offset``."""
    mean, std = (
        np.broadcast_to(np.asarray(values, np.float64), spec.channel_count) for values in (spec.mean, spec.std)
    )
    return (spec.scale / std).astype(np.float32), (0 - mean / std).astype(np.float32)


def normalise(image: Pixels, spec: PreprocessingConfig) -> NDArray[np.float32]:
    """uint8 (H, W, C) to float32 (C, H, W): ``(x * scale - mean) / std``, bit for bit as graphs that take images."""
    factor, offset = coefficients(spec)
    x = image.astype(np.float32)
    x *= factor
    x += offset
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def preprocess(image: Pixels, spec: PreprocessingConfig) -> NDArray[np.float32]:
    """uint8 (H, W, C) image to the network's float32 (C, H, W) input."""
    return normalise(fit_image(image, spec), spec)


def class_ids(output: NDArray[Any], classes: int) -> NDArray[np.integer]:
    """Class ids (H, W) of the first image in a model's output: labels, (N, H, W), as they are; of logits or
    probabilities, (N, classes, H, W), the largest one's class, the smaller of equal ones.

    Raises:
        ModelError: there is an id that is no class.
    """
    mask = np.asarray(output[0] if output.ndim == 3 else strongest_class(output[0]))
    if mask.size and int(mask.max()) >= classes:
        raise ModelError(
            f"the model gives class {int(mask.max())}, and its card names {classes} classes",
            expected=f"class ids 0…{classes - 1}",
            fix="export and build the model again with the data.classes that it was trained for",
        )
    return mask


def restore_mask(mask: NDArray[np.integer], spec: PreprocessingConfig, height: int, width: int) -> Pixels:
    """A mask of the network (H, W) back at the image's height and width: padding cut, nearest resize."""
    top, left, inner_height, inner_width = _placement(spec, height, width)
    inner = np.ascontiguousarray(mask[top : top + inner_height, left : left + inner_width].astype(np.uint8))
    if inner.shape == (height, width):
        return inner
    return np.asarray(Image.fromarray(inner).resize((width, height), Image.Resampling.NEAREST))
