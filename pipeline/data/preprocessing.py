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
from pipeline.slips import did_you_mean

Pixels = NDArray[np.uint8]
# What Pillow raises on files that it cannot decode.
UNDECODABLE = (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, channels: str, page: int = 0) -> Pixels:
    """An image file as uint8 (H, W, C): grey, rgb or bgr; EXIF rotation applied, 16-bit grey scaled to 8 bits.

    Args:
        page: of a file that holds several.

    Raises:
        DataError: the file is missing, no image, truncated, or holds floating-point values.
    """
    with OpenedImage(path, page) as image:
        return as_pixels(ImageOps.exif_transpose(image), channels, str(path))


def as_pixels(image: Image.Image, channels: str, name: str) -> Pixels:
    """A decoded image as uint8 (H, W, C): grey, rgb or bgr; transparency dropped, 16-bit grey scaled to 8 bits.

    Args:
        name: of the image, for the message.

    Raises:
        DataError: it holds floating-point values.
    """
    if image.mode == "F":
        raise DataError(
            f"the image {name} holds floating-point values",
            expected="8 or 16 bits a channel",
            got="mode F, whose range no file states",
            fix="convert it to an 8-bit image",
        )
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    mode = "L" if channels == "grey" else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels[..., ::-1]) if channels == "bgr" else pixels


def read_label(path: Path) -> Pixels:
    """A label map as uint8 (H, W), values as stored (palette images: indices; 1-bit images: 0 and 1).

    Raises:
        DataError: the file is missing, no image, truncated, or has more than one channel.
    """
    with OpenedImage(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise DataError(
                f"the label map {path} has colours instead of class ids",
                expected="one 8-bit channel (mode L or P), value = class id",
                got=f"mode {image.mode}",
                fix="convert the colours to class ids",
            )
        return np.array(image, dtype=np.uint8)


class OpenedImage:
    """``with`` a fully decoded image, or a page of a file that holds several; Pillow's errors become DataError."""

    def __init__(self, path: Path, page: int = 0) -> None:
        self.path = path
        self.page = page

    def __enter__(self) -> Image.Image:
        try:
            with ExitStack() as opened:
                self.image = opened.enter_context(Image.open(self.path))
                if self.page:
                    self.image.seek(self.page)
                self.image.load()
                opened.pop_all()
        except FileNotFoundError as error:
            raise DataError(
                f"the image {self.path} does not exist{did_you_mean(self.path)}", fix="check the path"
            ) from error
        except UNDECODABLE as error:
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
    """The uint8 (H, W, C) image at the network's size (``resize: none`` keeps its own).

    ``interpolation: nearest`` takes the pixel at the centre of each new one, as Pillow does.
    """
    resample = Image.Resampling.NEAREST if spec.interpolation == "nearest" else Image.Resampling.BILINEAR
    return _fit(image, spec, resample, spec.pad_value)


def fit_label(label: Pixels, spec: PreprocessingConfig, void: int | None) -> Pixels:
    """The uint8 (H, W) label map at the network's size; letterboxing adds void (class 0 where there is none)."""
    return _fit(label, spec, Image.Resampling.NEAREST, 0 if void is None else void)


def coefficients(spec: PreprocessingConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and offset, float32 (C,) each: ``(x * scale - mean) / std`` is ``x * factor + offset``."""
    mean, std = (
        np.broadcast_to(np.asarray(values, np.float64), spec.channel_count) for values in (spec.mean, spec.std)
    )
    return (spec.scale / std).astype(np.float32), (0 - mean / std).astype(np.float32)


def normalise(image: Pixels, spec: PreprocessingConfig, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """uint8 (H, W, C) to float32 (C, H, W): ``(x * scale - mean) / std``, bit for bit as graphs that take images.

    Args:
        out: where to write it, of that shape; default: new, C-contiguous memory.
    """
    factor, offset = (values[:, np.newaxis, np.newaxis] for values in coefficients(spec))
    height, width, channels = image.shape
    x = np.empty((channels, height, width), np.float32) if out is None else out
    np.multiply(image.transpose(2, 0, 1), factor, out=x)
    x += offset
    return x


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


def class_probabilities(scores: NDArray[Any]) -> NDArray[np.float32]:
    """Softmax over the first axis: float32 (classes, ...) of logits (classes, ...)."""
    powers = scores.astype(np.float32)
    powers -= powers.max(0)
    np.exp(powers, out=powers)
    powers /= powers.sum(0)
    return powers


def restore_planes(
    planes: NDArray[np.float32], spec: PreprocessingConfig, height: int, width: int
) -> NDArray[np.float32]:
    """Planes of the network, float32 (N, H, W), back at the image's height and width: padding cut, bilinear resize."""
    top, left, inner_height, inner_width = _placement(spec, height, width)
    inner = planes[:, top : top + inner_height, left : left + inner_width]
    if inner.shape[1:] == (height, width):
        return inner
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in inner])


def restore_mask(mask: NDArray[np.integer], spec: PreprocessingConfig, height: int, width: int) -> Pixels:
    """A mask of the network (H, W) back at the image's height and width: padding cut, nearest resize.

    The result may share the mask's memory.
    """
    top, left, inner_height, inner_width = _placement(spec, height, width)
    inner = np.ascontiguousarray(mask[top : top + inner_height, left : left + inner_width], np.uint8)
    if inner.shape == (height, width):
        return inner
    return np.asarray(Image.fromarray(inner).resize((width, height), Image.Resampling.NEAREST))
