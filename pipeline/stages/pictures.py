"""Pictures of a few validation images for the page: the image, its labels, every precision's mask, what flipped."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard, output_kind, to_json
from pipeline.backends.base import Arrays, Runner, feed_image
from pipeline.config import Precision
from pipeline.data.dataset import Sample
from pipeline.data.pictures import as_rgb, mask_png, palette
from pipeline.data.preprocessing import Pixels, class_ids, restore_mask
from pipeline.metrics.outputs import margins
from pipeline.progress import track
from pipeline.reports import PicturedImage, PicturesReport

LONGEST = 1024
QUALITY = 85
SAME, NEAR_TIE, CLEAR = 0, 1, 2
# Of SAME (transparent), NEAR_TIE and CLEAR; as the page's legend has them.
MARK_COLOURS = ((0, 0, 0), (255, 190, 0), (255, 0, 200))


def draw(
    reference: Runner,
    candidates: Mapping[Precision, Runner],
    samples: Iterable[Sample],
    count: int,
    card: ModelCard,
    near_tie: float,
    folder: Path,
) -> PicturesReport:
    """Run all on every image and write its pictures to ``folder/<place>/``, and ``folder/report.json``.

    Args:
        reference: FP32 on ONNX Runtime.
        samples: ``count`` of them, the worst first.
        near_tie: flipped pixels with a smaller margin, as a share of FP32's output range, are marked apart.

    Raises:
        ModelError: a model that cannot be run, or gives classes that the card does not name.
    """
    images = []
    for place, sample in enumerate(track(samples, "pictures", count)):
        target = folder / str(place)
        target.mkdir()
        images.append(_draw(reference, candidates, sample, card, near_tie, target))
    report = PicturesReport(tuple(images))
    (folder / "report.json").write_bytes(to_json(report))
    return report


def _draw(
    reference: Runner,
    candidates: Mapping[Precision, Runner],
    sample: Sample,
    card: ModelCard,
    near_tie: float,
    folder: Path,
) -> PicturedImage:
    height, width = sample.image.shape[:2]
    step = -(-max(height, width) // LONGEST)
    colours, classes, spec = palette(card.classes, card.void), len(card.classes), card.preprocessing
    output = reference.outputs[0]
    scores = _scores(reference, output.name, sample, card)
    small = class_ids(scores, classes)
    masks: dict[str, Pixels] = {"reference": restore_mask(small, spec, height, width)}
    if sample.label is not None:
        masks["label"] = sample.label
    files = {"image.jpg": _photograph(sample.image, spec.channels, step)}
    values = output_kind(output) != "labels"
    flipped: dict[Precision, int] = {}
    near_ties: dict[Precision, int | None] = {}
    for precision, runner in candidates.items():
        mask = class_ids(_scores(runner, output.name, sample, card), classes)
        kinds = _kinds(mask != small, scores[0] if values else None, near_tie)
        flipped[precision] = int((kinds != SAME).sum())
        near_ties[precision] = int((kinds == NEAR_TIE).sum()) if values else None
        masks[precision] = restore_mask(mask, spec, height, width)
        files[f"{precision}.marks.png"] = _marks(restore_mask(kinds, spec, height, width), step)
    files |= {
        f"{name}.png": mask_png(np.ascontiguousarray(mask[::step, ::step]), colours) for name, mask in masks.items()
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    place = folder.name
    return PicturedImage(
        name=sample.name,
        width=-(-width // step),
        height=-(-height // step),
        reduced=step,
        views={"image": f"{place}/image.jpg", **{name: f"{place}/{name}.png" for name in masks}},
        marks={precision: f"{place}/{precision}.marks.png" for precision in candidates},
        flipped=flipped,
        near_ties=near_ties,
        pixels=int(small.size),
    )


def _scores(runner: Runner, output: str, sample: Sample, card: ModelCard) -> NDArray[Any]:
    feed: Arrays = feed_image(runner.inputs[0], sample.image, card.preprocessing, f"the image {sample.name}")
    return runner(feed)[output]


def _kinds(flipped: NDArray[np.bool_], scores: NDArray[Any] | None, near_tie: float) -> Pixels:
    """SAME, NEAR_TIE or CLEAR for every pixel, uint8 (H, W); all that flipped are CLEAR without scores (C, H, W)."""
    kinds = np.where(flipped, CLEAR, SAME).astype(np.uint8)
    if scores is not None and flipped.any():
        span = float(scores.max() - scores.min())
        kinds[flipped] = np.where(margins(scores, flipped) < near_tie * span, NEAR_TIE, CLEAR)
    return kinds


def _photograph(image: Pixels, channels: str, step: int) -> bytes:
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else np.ascontiguousarray(as_rgb(image, channels)))
    buffer = io.BytesIO()
    picture.reduce(step).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _marks(kinds: Pixels, step: int) -> bytes:
    """The largest kind of every ``step`` × ``step`` pixels, as palette PNG with SAME transparent."""
    height, width = kinds.shape
    padded = np.pad(kinds, ((0, -height % step), (0, -width % step)))
    largest = padded.reshape(padded.shape[0] // step, step, -1, step).max((1, 3))
    picture = Image.fromarray(largest)
    picture.putpalette([value for colour in MARK_COLOURS for value in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=SAME, bits=2)
    return buffer.getvalue()
