"""Quantized graphs, judged on images that chose no range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.artifacts import ModelCard
from pipeline.backends.base import Arrays, feed_image
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.preprocessing import Pixels, class_ids, restore_mask
from pipeline.errors import CalibrationError
from pipeline.graph.io import model_inputs
from pipeline.metrics.bootstrap import interval, resampled_sums
from pipeline.metrics.segmentation import Counts, confusion_matrix, iou, mean, overlaps
from pipeline.mixed.report import Figures
from pipeline.progress import track
from pipeline.reports import Interval

# Of an image's logits, by place, no more than these are compared: an even choice keeps memory small.
COMPARED = 1 << 14
RESAMPLES = 1000
LABEL_RANK = 3


def hold_out(split: Dataset, chosen: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Images that judge, and those of ``chosen`` that are left to choose the ranges which they judge.

    A seeded choice of ``count`` images of the split that are not among the chosen; where it has fewer, up to half of
    the chosen ones join them, evenly spread.
    """
    used = set(chosen.names)
    free = replace(split, names=tuple(name for name in split.names if name not in used)).choose(count, seed)
    joining = min(count - len(free), len(chosen) // 2)
    taken = {chosen.names[place * len(chosen) // joining] for place in range(joining)}
    judges = {*free.names, *taken}
    return (
        replace(split, names=tuple(name for name in split.names if name in judges)),
        replace(chosen, names=tuple(name for name in chosen.names if name not in taken)),
    )


class HeldOut:
    """The images, with FP32's masks and a part of its logits.

    Args:
        model: the clean float graph; its first output gives the masks.
        samples: loaded one at a time, anew for every graph; labels are compared at the image's size, void left out.
        card: classes, preprocessing.
        others: names of images that must not be among them by content, such as those that validate.

    Raises:
        CalibrationError: no image, or one that is among ``others``.
        DataError: an image that cannot be decoded, or that the graph does not take.
        ModelError: a graph that cannot be run.
    """

    def __init__(
        self, model: ModelProto, samples: Sequence[Sample], card: ModelCard, others: Mapping[str, str] | None = None
    ) -> None:
        self.card, self.samples = card, samples
        self.names: list[str] = []
        self.labels: list[Pixels | None] = []
        self.masks: list[NDArray[np.uint8]] = []
        self.logits: list[NDArray[np.float32]] = []
        if not samples:
            raise CalibrationError(
                "no calibration image is left to judge mixed precision by",
                expected="images of the calibration split that choose no range",
                fix="add images to the split",
            )
        (self.spec,) = model_inputs(model)
        for sample in samples:
            twin = (others or {}).get(sample.content_hash())
            if twin is not None:
                raise CalibrationError(
                    f"the held-out image {sample.name} is the validation image {twin}",
                    expected="no image in both, or validation would judge what it has chosen",
                    fix="remove it from data.calibration (or data.train), or from data.validation",
                )
            self.names.append(sample.name)
            label = sample.label
            self.labels.append(label if label is not None and (label < len(card.classes)).any() else None)
        self.reference: list[list[Counts]] = []
        for place, mask, logits in self._run(model, "FP32"):
            self.masks.append(mask)
            self.logits.append(logits)
            self.reference.append(self._overlaps(place, mask))

    def feed(self, place: int) -> Arrays:
        """One image as the graph takes it.

        Raises:
            DataError: it cannot be decoded, or has another size.
        """
        sample = self.samples[place]
        return feed_image(self.spec, sample.image, self.card.preprocessing, f"the image {sample.name}")

    @property
    def labelled(self) -> int:
        """How many have labels."""
        return sum(map(len, self.reference))

    @property
    def fp32_miou(self) -> float | None:
        """FP32's mean IoU; None without labels."""
        return _mean_iou(list(itertools.chain.from_iterable(self.reference)))

    def figures(self, model: ModelProto, what: str, count: int | None = None) -> Figures:
        """Run a graph on the images.

        Args:
            model: with the inputs and outputs of the float graph.
            what: it is, for the progress.
            count: of them, evenly spread; None: all.

        Raises:
            ModelError: it cannot be run.
        """
        same: list[float] = []
        noise = signal = 0.0
        reference: list[Counts] = []
        counted: list[Counts] = []
        for place, mask, logits in self._run(model, what, count):
            same.append(float(np.mean(mask == self.masks[place])))
            wanted = self.logits[place].astype(np.float64)
            noise += float(np.square(logits - wanted).sum())
            signal += float(np.square(wanted).sum())
            reference += self.reference[place]
            counted += self._overlaps(place, mask)
        miou, fp32 = _mean_iou(counted), _mean_iou(reference)
        return Figures(
            agreement=float(np.mean(same)),
            logit_error=float(np.sqrt(noise / signal)) if signal else None,
            miou=miou,
            miou_drop=None if miou is None or fp32 is None else fp32 - miou,
            miou_drop_interval=_drop_interval(reference, counted),
        )

    def _run(
        self, model: ModelProto, what: str, count: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.float32]]]:
        total = len(self.names)
        used = total if count is None else min(count, total)
        places = [index * total // used for index in range(used)]
        with OnnxRuntimeRunner(model.SerializeToString()) as runner:
            output = runner.outputs[0].name
            for place in track(places, what, len(places)):
                values = runner(self.feed(place))[output]
                mask = class_ids(values, len(self.card.classes)).astype(np.uint8)
                yield place, mask, _part(values)

    def _overlaps(self, place: int, mask: NDArray[np.uint8]) -> list[Counts]:
        label = self.labels[place]
        if label is None:
            return []
        restored = restore_mask(mask, self.card.preprocessing, *label.shape)
        return [overlaps(confusion_matrix(label, restored, len(self.card.classes)))]


def _part(values: NDArray[Any]) -> NDArray[np.float32]:
    """Evenly chosen places of the first image's logits, (classes, places); nothing of labels."""
    if values.ndim == LABEL_RANK:
        return np.zeros((0, 0), np.float32)
    flat = values[0].reshape(values.shape[1], -1)
    return np.ascontiguousarray(flat[:, :: max(1, -(-flat.shape[1] // COMPARED))]).astype(np.float32)


def _mean_iou(counted: Sequence[Counts]) -> float | None:
    if not counted:
        return None
    overlap: Counts = np.sum(counted, axis=0)
    return float(mean(iou(overlap)))


def _drop_interval(reference: Sequence[Counts], candidate: Sequence[Counts]) -> Interval | None:
    images = len(reference)
    if images < 2:
        return None
    drawn = [
        resampled_sums(np.stack(side).reshape(images, -1), RESAMPLES, 0).reshape(RESAMPLES, *side[0].shape)
        for side in (reference, candidate)
    ]
    theirs, ours = (mean(iou(sums)) for sums in drawn)
    low, high = interval(theirs - ours)
    return Interval(float(low), float(high))
