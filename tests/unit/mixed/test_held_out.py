"""Which images judge, and that their figures are right."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.dataset import Dataset
from pipeline.mixed.held_out import HeldOut, hold_out
from tests.planted_unet import CARD, samples
from tests.tiny_unet import tiny_unet

MODEL = tiny_unet()


def dataset(count: int) -> Dataset:
    return Dataset(tuple(f"{place:03d}" for place in range(count)), lambda name: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("images", "chosen", "count", "judges", "ranges"),
    [(100, 24, 64, 64, 24), (100, 100, 64, 50, 50), (24, 20, 64, 14, 10), (100, 90, 16, 16, 84), (6, 6, 2, 2, 4)],
)
def test_no_image_judges_what_it_has_chosen(images, chosen, count, judges, ranges):
    split = dataset(images)
    held_out, rest = hold_out(split, split.choose(chosen, 0), count, 0)
    assert (len(held_out), len(rest)) == (judges, ranges)
    assert set(held_out.names).isdisjoint(rest.names)


def test_a_lonely_image():
    assert len(hold_out(dataset(1), dataset(1), 8, 0)[0]) == 0


def test_the_same_graph_loses_nothing():
    held_out = HeldOut(MODEL, samples(3, 0, MODEL), CARD)
    figures = held_out.figures(MODEL, "itself")
    assert (figures.agreement, figures.logit_error, figures.miou, figures.miou_drop) == (1, 0, 1, 0)
    assert figures.miou_drop_interval is not None
    assert (figures.miou_drop_interval.low, figures.miou_drop_interval.high) == (0, 0)
    assert (held_out.labelled, held_out.fp32_miou, figures.loss) == (3, 1, 0)


def test_some_images_alone():
    other = tiny_unet(seed=1)
    images = samples(5, 0, MODEL)
    some = HeldOut(MODEL, images, CARD).figures(other, "other", 2)
    assert some == HeldOut(MODEL, [images[0], images[2]], CARD).figures(other, "other")
    assert some != HeldOut(MODEL, images, CARD).figures(other, "other", 8)


def test_figures_by_hand():
    other = tiny_unet(seed=1)
    images = samples(2, 0, MODEL)
    held_out = HeldOut(MODEL, images, CARD)
    figures = held_out.figures(other, "other")
    other_masks = HeldOut(other, images, CARD).masks
    assert figures.agreement == pytest.approx(np.mean([a == b.label for a, b in zip(other_masks, images, strict=True)]))
    ious = []
    for c in range(3):
        ours, theirs = (np.stack(side) == c for side in (other_masks, [image.label for image in images]))
        if theirs.any():
            ious.append((ours & theirs).sum() / (ours | theirs).sum())
    assert figures.miou == pytest.approx(np.mean(ious))
    assert figures.miou_drop == pytest.approx(1 - np.mean(ious))


def test_images_without_a_labelled_pixel_do_not_count():
    images = samples(2, 0, MODEL)
    assert images[0].label is not None
    images[0].label[:] = 255
    assert HeldOut(MODEL, images, CARD).labelled == 1
