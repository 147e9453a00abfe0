"""What a folder of images says: its parts, sizes and channels, mean and deviation, and what its label maps hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass

from pipeline.data.dataset import IMAGE_ENDINGS, image_folder
from pipeline.data.preprocessing import OpenedImage, read_image, read_label
from pipeline.errors import DataError
from pipeline.progress import track
from pipeline.slips import did_you_mean

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "test")
IMAGES = ("images", "image", "imgs", "img", "jpegimages")
LABELS = ("labels", "label", "masks", "mask", "annotations", "annotation", "gt", "segmentationclass")
# At most so many files are looked at: spread evenly over the folder.
PIXEL_SAMPLE, SIZE_SAMPLE, LABEL_SAMPLE = 48, 500, 200
# Of a large image every second, third, … pixel counts, so that about this many do.
PIXELS = 1 << 18
# Of EXIF's orientations, those from 5 on swap height and width.
ORIENTATION, SIDEWAYS = 0x0112, 5
LEAST_DEVIATION = 0.01
T = TypeVar("T")
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One split: images and label maps relative to the root, as ``data.<split>`` takes them."""

    images: str
    labels: str | None
    count: int


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a folder of images.

    Attributes:
        validation: None where the folder has no part for it.
        sizes: (height, width) to how many of the images that were looked at have it.
        colour: whether any of them has colour.
        channels: grey or rgb, of ``mean`` and ``std``.
        mean, std: of pixels in 0 … 1, by channel, over ``sampled`` training images.
        label_values: that label maps hold, over ``labels_read`` of them.
        palette: colours of label values, where label maps are palette images.
    """

    root: Path
    train: Part
    validation: Part | None
    sizes: dict[tuple[int, int], int]
    colour: bool
    channels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sampled: int
    label_values: tuple[int, ...] = ()
    labels_read: int = 0
    palette: dict[int, Colour] = field(default_factory=dict)


def survey_images(folder: Path, labels: Path | None, channels: int | None) -> ImageFacts:
    """Look at a folder of images.

    These are understood, with any of the names in TRAIN, VALIDATION, IMAGES and LABELS: ``train/images`` beside
    ``train/labels``; ``images/train`` beside ``labels/train``; ``train`` and ``val`` with the images themselves;
    ``images`` beside ``labels``; and a folder of images alone.

    Args:
        labels: folder of label maps, where it is not in or beside the folder of images.
        channels: that the network takes, 1 or 3; None: as many as the images have.

    Raises:
        DataError: a folder is missing or has no images; an image has no label map; a file that is looked at cannot be
            decoded; a label map has colours instead of class ids.
    """
    for given in (folder, labels):
        if given is not None and not given.is_dir():
            raise DataError(
                f"{given} is no folder" if given.exists() else f"{given} does not exist{did_you_mean(given)}",
                expected="a folder of images" if given is folder else "a folder of label maps",
                fix="check the path",
            )
    root, train, validation = _parts(folder.resolve(), labels.resolve() if labels else None)
    opened = image_folder(root / train.images, "rgb", root / train.labels if train.labels else None)
    files = [opened.files[name] for name in opened.names]
    judged = _labelled(root, validation) if validation is not None and validation.labels else []
    sizes, colour = _sizes([pair[0] for pair in files])
    kind = {1: "grey", 3: "rgb", None: "rgb" if colour else "grey"}[channels]
    sample = _spread([pair[0] for pair in files], PIXEL_SAMPLE)
    mean, std = _statistics(sample, kind)
    maps = _spread([*(pair[1] for pair in files if len(pair) > 1), *judged], LABEL_SAMPLE)
    values, palette = _label_values(maps)
    return ImageFacts(root, train, validation, sizes, colour, kind, mean, std, len(sample), values, len(maps), palette)


def _parts(folder: Path, labels: Path | None) -> tuple[Path, Part, Part | None]:
    """Root, training and validation images; the latter None where the folder has no such part."""
    for find in (_split_first, _kind_first):
        train = find(folder, labels, TRAIN)
        if train is not None:
            return folder, _part(folder, *train), _optional(folder, find(folder, labels, VALIDATION))
    root, images = folder, _child(folder, IMAGES)
    if images is None or not _holds_images(images):
        images = folder
        # The folder of images itself was named, and the label maps lie beside it.
        if labels is None and folder.name.lower() in IMAGES and _child(folder.parent, LABELS) is not None:
            root = folder.parent
    if not _holds_images(images):
        raise DataError(
            f"the folder {folder} has no images",
            expected=f"files ending in {', '.join(IMAGE_ENDINGS)} in it, or in its images, train or train/images",
            got=", ".join(sorted(one.name for one in folder.iterdir())[:6]) or "an empty folder",
            fix="name the folder that holds the images",
        )
    return root, _part(root, images, labels or _child(root, LABELS)), None


def _split_first(root: Path, labels: Path | None, names: Sequence[str]) -> tuple[Path, Path | None] | None:
    """``train/images`` and ``train/labels``, or ``train`` itself."""
    part = _child(root, names)
    if part is None:
        return None
    images = _child(part, IMAGES) or part
    found = (_child(labels, names) if labels is not None else None) or _child(part, LABELS)
    return (images, (_child(found, LABELS) or found) if found else None) if _holds_images(images) else None


def _kind_first(root: Path, labels: Path | None, names: Sequence[str]) -> tuple[Path, Path | None] | None:
    """``images/train`` and ``labels/train``."""
    images, maps = _child(root, IMAGES), labels or _child(root, LABELS)
    part = _child(images, names) if images is not None else None
    if part is None or not _holds_images(part):
        return None
    return part, _child(maps, names) if maps is not None else None


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder in it that is called by one of the names, in their order."""
    by_name = {one.name.lower(): one for one in sorted(folder.iterdir(), reverse=True) if one.is_dir()}
    return next((by_name[name] for name in names if name in by_name), None)


def _holds_images(folder: Path) -> bool:
    return any(_is_image(one) for one in folder.iterdir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".") and path.is_file()


def _optional(root: Path, found: tuple[Path, Path | None] | None) -> Part | None:
    return None if found is None else _part(root, *found)


def _part(root: Path, images: Path, labels: Path | None) -> Part:
    stems = [path.stem for path in sorted(images.iterdir()) if _is_image(path)]
    pattern = None if labels is None else _relative(labels, root) + _affixes(stems, labels)
    return Part(_relative(images, root), pattern, len(stems))


def _relative(path: Path, root: Path) -> str:
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.as_posix()


def _affixes(stems: Sequence[str], labels: Path) -> str:
    """What has to follow the folder of label maps where these are called otherwise than the images.

    Such as ``/*_mask.png`` where ``a.png`` has ``a_mask.png``; nothing where the names are equal, or have nothing in
    common that all of them share.
    """
    maps = {path.name for path in labels.iterdir() if _is_image(path)}
    if set(stems) <= {Path(name).stem for name in maps}:
        return ""
    for name in sorted(maps):
        before, found, behind = name.partition(stems[0])
        if found and all(f"{before}{stem}{behind}" in maps for stem in stems):
            return f"/{before}*{behind}"
    return ""


def _labelled(root: Path, part: Part) -> list[Path]:
    assert part.labels is not None
    dataset = image_folder(root / part.images, "rgb", root / part.labels)
    return [dataset.files[name][1] for name in dataset.names]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def _sizes(files: Sequence[Path]) -> tuple[dict[tuple[int, int], int], bool]:
    """Sizes, the most frequent first, and whether any image has colour; from the files' headers alone."""
    found: Counter[tuple[int, int]] = Counter()
    colour = False
    for file in _spread(files, SIZE_SAMPLE):
        try:
            with Image.open(file) as image:
                width, height = image.size
                sideways = image.getexif().get(ORIENTATION, 1) >= SIDEWAYS
                colour = colour or not image.mode.startswith(("1", "L", "I"))
        except (OSError, ValueError, SyntaxError):
            with OpenedImage(file):  # which says what is wrong with it
                continue
        found[(width, height) if sideways else (height, width)] += 1
    return dict(found.most_common()), colour


def _statistics(files: Sequence[Path], channels: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in 0 … 1, by channel; every image counts alike."""
    means, squares = [], []
    for file in track(files, "looking at images", len(files)):
        pixels = read_image(file, channels)
        step = max(1, int((pixels.shape[0] * pixels.shape[1] / PIXELS) ** 0.5))
        values = pixels[::step, ::step].reshape(-1, pixels.shape[2]) / 255.0
        means.append(values.mean(0))
        squares.append((values**2).mean(0))
    mean = np.mean(means, 0)
    deviation = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, LEAST_DEVIATION**2))
    return tuple(round(float(v), 3) for v in mean), tuple(round(float(v), 3) for v in deviation)


def _label_values(files: Sequence[Path]) -> tuple[tuple[int, ...], dict[int, Colour]]:
    """The values that label maps hold, in order, and their colours where the first is a palette image."""
    present = np.zeros(256, bool)
    for file in track(files, "looking at label maps", len(files)):
        present[np.unique(read_label(file))] = True
    values = tuple(int(value) for value in np.flatnonzero(present))
    return values, _palette(files[0], values) if files else {}


def _palette(file: Path, values: Sequence[int]) -> dict[int, Colour]:
    with OpenedImage(file) as image:
        numbers = image.getpalette("RGB") if image.mode == "P" else None
    if not numbers or len(numbers) < 3 * (max(values, default=0) + 1):
        return {}
    colours = {value: (numbers[3 * value], numbers[3 * value + 1], numbers[3 * value + 2]) for value in values}
    return colours if len(set(colours.values())) == len(colours) else {}
