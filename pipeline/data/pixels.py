"""Images in memory, or still in their file where they are large: read by rows, as a model's channels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.preprocessing import OpenedImage, Pixels, as_pixels
from pipeline.errors import DataError

# Above it an image is converted by rows as they are needed, from what Pillow decoded or mapped into memory.
LARGE = 1 << 25
ORIENTATION = 0x0112  # of EXIF; 1 is upright


@dataclass(frozen=True)
class Picture:
    """An image of one's own size in a model's channel order.

    Attributes:
        rows: the rows from one up to another, uint8 (n, W, C).
        close: gives memory and file back.
    """

    height: int
    width: int
    rows: Callable[[int, int], Pixels]
    close: Callable[[], None] = lambda: None

    @property
    def is_large(self) -> bool:
        """Whether its pixels should not be asked for all at once."""
        return self.height * self.width > LARGE

    @property
    def pixels(self) -> Pixels:
        """All of it, uint8 (H, W, C)."""
        return self.rows(0, self.height)


def picture_of(pixels: Pixels) -> Picture:
    """The picture of an array, uint8 (H, W, C)."""
    return Picture(pixels.shape[0], pixels.shape[1], lambda top, bottom: pixels[top:bottom])


def open_picture(path: Path, channels: str, page: int = 0) -> Picture:
    """An image file, decoded; a large one, unless EXIF rotates it, is converted later, by rows.

    Raises:
        DataError: as ``read_image``.
    """
    with ExitStack() as stack:
        image = stack.enter_context(OpenedImage(path, page))
        width, height = image.size
        if width * height <= LARGE or image.getexif().get(ORIENTATION, 1) != 1:
            return picture_of(as_pixels(ImageOps.exif_transpose(image), channels, str(path)))
        as_pixels(image.crop((0, 0, 1, 1)), channels, str(path))  # what it cannot convert shows now
        close = stack.pop_all().close

    def rows(top: int, bottom: int) -> Pixels:
        return as_pixels(image.crop((0, top, width, bottom)), channels, str(path))

    return Picture(height, width, rows, close)


def picture_of_array(image: Any, channels: str) -> Picture:
    """The picture of what a caller has.

    Args:
        image: grey (H, W) or (H, W, 1), or RGB or RGBA (H, W, 3 or 4), as uint8 or uint16, of which the upper 8 bits
            count: an array, or anything in the computer's own memory that numpy takes or that offers DLPack.
        channels: grey, rgb or bgr, as the model takes them.

    Raises:
        DataError: another shape or type, or no pixel.
    """
    array = _array(image)
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype not in (np.uint8, np.uint16) or not array.size:
        raise DataError(
            "this array is no image",
            expected="uint8 or uint16, (H, W), (H, W, 1), (H, W, 3) in RGB order or (H, W, 4), with at least one pixel",
            got=f"{array.dtype} {array.shape}",
            fix="convert it; paths are read by `unet-trt predict`, or with pipeline.data.preprocessing.read_image",
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.shape[2] == 1:
        return picture_of(array if channels == "grey" else np.repeat(array, 3, axis=2))
    if channels == "grey":
        return picture_of(as_pixels(Image.fromarray(np.ascontiguousarray(array[..., :3])), channels, "the array"))
    return picture_of(array[..., 2::-1] if channels == "bgr" else array[..., :3])


def _array(image: Any) -> NDArray[Any]:
    if isinstance(image, np.ndarray):
        return image
    try:
        if hasattr(image, "__cuda_array_interface__"):  # which numpy would copy, or take for an object
            raise ValueError("it is in GPU memory")
        return np.from_dlpack(image) if hasattr(image, "__dlpack__") else np.asarray(image)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"numpy does not take this {type(image).__name__}: {error}",
            expected="an image in the computer's own memory",
            fix="use Predictor.predict_on_gpu, or copy it there first, as .cpu() does",
        ) from error
