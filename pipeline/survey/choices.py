"""What a configuration should say, given what was seen of the network and the images."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.survey.images import Colour

IGNORED = 255
# A longer side than this is shrunk: a first run should not take minutes an image.
LONGEST = 1024
CROP = 256
# Turning the hue by the golden ratio keeps any number of colours apart.
GOLDEN = 0.618034
FIRST: Colour = (24, 24, 34)


@dataclass(frozen=True)
class Size:
    """What images are fed as: pixels, and how they get there."""

    height: int
    width: int
    resize: Literal["none", "letterbox"]
    reason: str


@dataclass(frozen=True)
class Classes:
    """How label values become classes.

    Attributes:
        label_values: value in the file to class id; None where they are equal.
        void: value that no metric counts.
        sure: whether the values leave no other reading.
    """

    count: int
    label_values: dict[int, int] | None
    void: int | None
    reason: str
    sure: bool = True

    def values(self) -> list[int]:
        """The label value of each class, by class id."""
        mapping = self.label_values or {value: value for value in range(self.count)}
        by_class = {class_id: value for value, class_id in mapping.items()}
        return [by_class[class_id] for class_id in range(self.count)]


def choose_size(
    sizes: Mapping[tuple[int, int], int], multiple: int, height: int | None = None, width: int | None = None
) -> Size:
    """A size that the network takes, near the images' own.

    Images of one size keep it, or get a border up to the next multiple. Of several sizes the medians decide, and
    images are shrunk or enlarged to fit, with a border. Sides above 1024 are shrunk.

    Args:
        sizes: (height, width) of images to their number.
        multiple: that both should be multiples of.
        height, width: where the network fixes them.
    """
    one = next(iter(sizes)) if len(sizes) == 1 else None
    typical = [_median(sizes, axis) for axis in (0, 1)]
    shrink = min(1.0, LONGEST / max(typical))
    chosen = [fixed or _up(typical[axis] * shrink, multiple) for axis, fixed in enumerate((height, width))]
    seen = f"all images are {one[1]}×{one[0]}" if one else f"images have {len(sizes)} sizes, {_range(sizes)}"
    if height and width:
        why = f"the network takes {width}×{height} alone"
    elif shrink < 1:
        why = f"shrunk to a longest side of {LONGEST}, and multiples of {multiple}"
    else:
        why = f"the network halves its input down to 1/{multiple}" if multiple > 1 else "the network takes any size"
    same = one is not None and list(one) == chosen
    return Size(chosen[0], chosen[1], "none" if same else "letterbox", f"{seen} (width × height); {why}")


def choose_crop(size: Size, multiple: int) -> tuple[int, int]:
    """Height and width of the windows that training would cut: at most 256, a multiple."""
    height, width = (max(multiple, min(CROP, side) // multiple * multiple) for side in (size.height, size.width))
    return height, width


def choose_classes(head: int | None, values: Sequence[int]) -> Classes:
    """What the values in label maps mean to a network with so many classes.

    1. Values that are all class ids are taken as they are.
    2. As many values as classes, of two classes or without 0: they are the classes in their order, such as 0 and 255.
    3. One value more than class ids, beside ids alone: it is void, such as 255, or 11 of 11 classes.
    4. As many values as classes: they are the classes in their order.
    5. One value more than classes: the largest is void, the others are the classes in their order.

    Args:
        head: classes that the network gives; None: as many as the values say, 255 being void beside more than two.
        values: in the label maps, in order; none: there are no label maps.

    Raises:
        DataError: none of these fits.
    """
    if not values:
        return Classes(
            head or 2, None, None, "there are no label maps" if head else "nothing says how many", bool(head)
        )
    if head is None:
        inside = [value for value in values if value != IGNORED or len(values) == 2]
        head = inside[-1] + 1 if inside[-1] < 2 * len(inside) else len(inside)
        head = max(head, 2)
    ids = set(range(head))
    others = [value for value in values if value not in ids]
    if not others:
        return Classes(head, None, None, f"label maps hold {_shown(values)}")
    in_order = {value: class_id for class_id, value in enumerate(values[:head])}
    if len(values) == head and (head == 2 or 0 not in values):
        return Classes(head, in_order, None, f"label maps hold {_shown(values)}: the classes in this order", False)
    if len(others) == 1:
        why = f"label maps hold {_shown(values)}, and {others[0]} is no class id"
        return Classes(head, None, others[0], why, others[0] in (head, IGNORED))
    if len(values) == head:
        return Classes(head, in_order, None, f"label maps hold {_shown(values)}: the classes in this order", False)
    if len(values) == head + 1:
        why = f"label maps hold {_shown(values)}: the classes in this order, and the last is void"
        return Classes(head, in_order, values[-1], why, False)
    raise DataError(
        f"the label maps hold {len(values)} values, which {head} classes do not explain",
        expected=f"class ids 0…{head - 1}, with one more for void, or {head} values",
        got=_shown(values),
        fix="give the checkpoint that belongs to these labels, or convert the label maps",
    )


def choose_colours(classes: Classes, palette: Mapping[int, Colour]) -> list[Colour]:
    """A colour for every class: of the label maps' palette, else dark for class 0 and well apart for the others."""
    values = classes.values()
    if all(value in palette for value in values):
        return [palette[value] for value in values]
    return [FIRST, *(_hue(0.97 + GOLDEN * step) for step in range(1, classes.count))]


def _hue(turn: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(turn % 1, 0.7, 0.9))
    return red, green, blue


def _median(sizes: Mapping[tuple[int, int], int], axis: int) -> float:
    return float(np.median(np.repeat([size[axis] for size in sizes], list(sizes.values()))))


def _up(side: float, multiple: int) -> int:
    return max(multiple, int(-(-side // multiple)) * multiple)


def _range(sizes: Mapping[tuple[int, int], int]) -> str:
    smallest, largest = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    return f"from {smallest[1]}×{smallest[0]} to {largest[1]}×{largest[0]}"


def _shown(values: Sequence[int]) -> str:
    if len(values) > 3 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}…{values[-1]}"
    text = [str(value) for value in values]
    return ", ".join(text if len(text) <= 24 else [*text[:20], "…", text[-1]])
