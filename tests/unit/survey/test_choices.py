"""Sizes, classes and colours that a configuration is given."""

from __future__ import annotations

import itertools

import pytest

from pipeline.errors import DataError
from pipeline.survey.choices import Classes, choose_classes, choose_colours, choose_crop, choose_size


@pytest.mark.parametrize(
    ("sizes", "multiple", "fixed", "wanted"),
    [
        ({(512, 512): 9}, 16, (None, None), (512, 512, "none")),
        ({(360, 480): 9}, 16, (None, None), (368, 480, "letterbox")),
        ({(360, 480): 9}, 1, (None, None), (360, 480, "none")),
        ({(100, 200): 5, (300, 400): 1}, 16, (None, None), (112, 208, "letterbox")),
        ({(2000, 4000): 3}, 32, (None, None), (512, 1024, "letterbox")),
        ({(10, 12): 3}, 16, (None, None), (16, 16, "letterbox")),
        ({(512, 512): 9}, 16, (256, 320), (256, 320, "letterbox")),
        ({(256, 320): 9}, 16, (256, 320), (256, 320, "none")),
        ({(500, 512): 9}, 16, (None, 512), (512, 512, "letterbox")),
    ],
)
def test_sizes(
    sizes: dict[tuple[int, int], int],
    multiple: int,
    fixed: tuple[int | None, int | None],
    wanted: tuple[int, int, str],
) -> None:
    size = choose_size(sizes, multiple, *fixed)
    assert (size.height, size.width, size.resize) == wanted
    assert size.reason


def test_crops_fit_and_are_multiples() -> None:
    assert choose_crop(choose_size({(512, 640): 1}, 16), 16) == (256, 256)
    assert choose_crop(choose_size({(100, 640): 1}, 32), 32) == (128, 256)
    assert choose_crop(choose_size({(20, 20): 1}, 16), 16) == (32, 32)


@pytest.mark.parametrize(
    ("head", "values", "mapping", "void", "sure"),
    [
        (4, (0, 1, 2, 3), None, None, True),
        (4, (0, 3), None, None, True),
        (2, (0, 255), {0: 0, 255: 1}, None, False),
        (2, (0, 1, 255), None, 255, True),
        (3, (1, 2, 3), {1: 0, 2: 1, 3: 2}, None, False),
        (3, (0, 1, 255), None, 255, True),
        (11, tuple(range(12)), None, 11, True),
        (3, (0, 1, 7), None, 7, False),
        (3, (0, 128, 255), {0: 0, 128: 1, 255: 2}, None, False),
        (3, (0, 85, 170, 255), {0: 0, 85: 1, 170: 2}, 255, False),
        (3, (), None, None, True),
    ],
)
def test_what_label_values_mean_to_a_head(
    head: int, values: tuple[int, ...], mapping: dict[int, int] | None, void: int | None, sure: bool
) -> None:
    classes = choose_classes(head, values)
    assert (classes.count, classes.label_values, classes.void, classes.sure) == (head, mapping, void, sure)


@pytest.mark.parametrize(
    ("values", "count", "void"), [((0, 1, 2), 3, None), ((0, 255), 2, None), ((0, 1, 2, 255), 3, 255), ((), 2, None)]
)
def test_classes_without_a_head(values: tuple[int, ...], count: int, void: int | None) -> None:
    classes = choose_classes(None, values)
    assert (classes.count, classes.void) == (count, void)


def test_values_that_no_reading_explains() -> None:
    with pytest.raises(DataError, match="hold 6 values, which 3 classes do not explain") as raised:
        choose_classes(3, (0, 10, 20, 30, 40, 50))
    assert "0, 10, 20, 30, 40, 50" in str(raised.value)


def test_every_choice_is_a_valid_configuration() -> None:
    """Every set of up to four values among some: class ids and void as the configuration demands them."""
    for head in (2, 3, 4):
        for count in range(1, 5):
            for values in itertools.combinations((0, 1, 2, 3, 4, 128, 255), count):
                try:
                    classes = choose_classes(head, values)
                except DataError:
                    continue
                known = set(classes.label_values or range(head)) | {classes.void}
                assert set(values) <= known
                assert classes.void is None or classes.void >= head
                assert sorted((classes.label_values or dict(enumerate(range(head)))).values()) == list(range(head))


def test_colours_are_the_palettes_or_differ() -> None:
    classes = Classes(3, {0: 0, 128: 1, 255: 2}, None, "")
    palette = {0: (1, 2, 3), 128: (4, 5, 6), 255: (7, 8, 9)}
    assert choose_colours(classes, palette) == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    many = choose_colours(Classes(40, None, None, ""), {})
    assert len(set(many)) == 40
    assert all(0 <= part <= 255 for colour in many for part in colour)


def test_values_in_a_row_are_shown_as_such() -> None:
    assert choose_classes(11, tuple(range(12))).reason == "label maps hold 0…11, and 11 is no class id"
    assert "0, 255" in choose_classes(2, (0, 255)).reason
