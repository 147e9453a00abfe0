"""Budgets and categories in configurations."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config import ALL_PRECISIONS, ClassConfig, DataConfig, Tolerance, ValidateConfig


def classes(*categories: str | None, names: str = "abcdef") -> tuple[ClassConfig, ...]:
    return tuple(ClassConfig(name=n, colour=(1, 2, 3), category=c) for n, c in zip(names, categories, strict=False))


def test_tolerances_of_before_stay_valid_and_judge_no_new_budget() -> None:
    tolerance = Tolerance(atol=1, rtol=1, min_agreement=0.9, max_miou_drop=0.1)
    assert (tolerance.max_class_iou_drop, tolerance.max_dice_drop, tolerance.min_boundary_f) == (None, None, None)
    assert tolerance.named_label_budgets() == ["max_miou_drop"]


def test_null_judges_no_drop() -> None:
    tolerance = Tolerance(atol=1, rtol=1, min_agreement=0.9, max_miou_drop=None, min_boundary_f=0.9)
    assert tolerance.named_label_budgets() == []


def test_every_default_guards_single_classes() -> None:
    for precision in ALL_PRECISIONS:
        assert ValidateConfig().tolerance(precision).max_class_iou_drop is not None


def test_categories_for_all_classes_or_none() -> None:
    assert DataConfig(kind="cells", classes=classes("x", "x", "y", "y")).classes[2].category == "y"
    with pytest.raises(ValidationError, match="every class a category, or none: 'b' has none"):
        DataConfig(kind="cells", classes=classes("x", None))


def test_class_names_are_unique() -> None:
    with pytest.raises(ValidationError, match="two classes are named 'a'"):
        DataConfig(kind="cells", classes=classes(None, None, names="aa"))
