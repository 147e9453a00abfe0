"""Images in, masks out, with an engine or an ONNX file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.artifacts import ModelCard, write_atomically
from pipeline.backends.base import Runner, feed_image
from pipeline.data.dataset import IMAGE_ENDINGS
from pipeline.data.pictures import mask_png, overlay_png, palette
from pipeline.data.preprocessing import Pixels, class_ids, read_image, restore_mask
from pipeline.errors import BuildFolderError, DataError
from pipeline.progress import track

log = logging.getLogger(__name__)


def predict_mask(runner: Runner, image: Pixels, card: ModelCard) -> Pixels:
    """Class ids, uint8 (H, W), of an image, uint8 (H, W, C), at the image's own size.

    Raises:
        DataError: with ``resize: none``, an image of a size that the model does not take.
        ModelError: a class that the card does not name.
    """
    outputs = runner(feed_image(runner.inputs[0], image, card.preprocessing))
    mask = class_ids(outputs[runner.outputs[0].name], len(card.classes))
    return restore_mask(mask, card.preprocessing, *image.shape[:2])


def predict(runner: Runner, card: ModelCard, inputs: Sequence[Path], folder: Path, *, overwrite: bool = False) -> int:
    """For each image write ``<name>.png`` (class ids, palette), ``<name>_overlay.png``, a line in ``predictions.json``.

    Returns:
        How many images were done.

    Raises:
        DataError: no image found, two images of one name, an image that cannot be read.
        BuildFolderError: the folder is unwritable, or holds a file that would be overwritten.
    """
    images = _images(inputs)
    targets = [folder / f"{image.stem}{ending}" for image in images for ending in (".png", "_overlay.png")]
    twice = {target.name for target in targets if targets.count(target) > 1}
    if twice:
        raise DataError(f"two images would both give {min(twice)}", fix="predict them into two folders")
    given = {image.resolve() for image in images}
    if any(target.resolve() in given for target in targets):
        raise BuildFolderError(f"masks in {folder} would replace the images themselves", fix="choose another -o folder")
    taken = [target for target in targets if target.exists()]
    if taken and not overwrite:
        raise BuildFolderError(f"{taken[0]} exists already", fix="choose another -o folder, or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildFolderError(f"cannot make the folder {folder}: {error.strerror}") from error
    colours = palette(card.classes, card.void)
    lines = []
    for path in track(images, "predicting", len(images)):
        image = read_image(path, card.preprocessing.channels)
        started = time.perf_counter()
        mask = predict_mask(runner, image, card)
        seconds = time.perf_counter() - started
        write_atomically(folder / f"{path.stem}.png", mask_png(mask, colours))
        overlay = overlay_png(image, mask, colours, card.preprocessing.channels)
        write_atomically(folder / f"{path.stem}_overlay.png", overlay)
        share = np.bincount(mask.ravel(), minlength=len(card.classes)) / mask.size
        area = {c.name: round(float(s), 6) for c, s in zip(card.classes, share, strict=True) if s}
        lines.append(json.dumps({"image": str(path), "mask": f"{path.stem}.png", "area": area, "seconds": seconds}))
        write_atomically(folder / "predictions.json", ("\n".join(lines) + "\n").encode())
    return len(images)


def _images(inputs: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for given in inputs:
        files = sorted(p for p in given.iterdir() if p.suffix.lower() in IMAGE_ENDINGS) if given.is_dir() else [given]
        if not files:
            raise DataError(
                f"the folder {given} holds no image", expected=f"files ending in {', '.join(IMAGE_ENDINGS)}"
            )
        found += files
    if not found:
        raise DataError("there is no image to predict", expected="image files or folders of them")
    return found
