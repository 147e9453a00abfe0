"""What `from pipeline import …` offers, and that nothing is loaded before it is asked for."""

from __future__ import annotations

import inspect

import pytest

import pipeline
from tests.unit.test_imports import python

NAMES = ["Prediction", "Predictor"]


def test_the_public_names_are_these() -> None:
    """Whoever adds or removes one changes this list, docs/ and CHANGELOG.md with it."""
    assert pipeline.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_defined_here_and_documented(name: str) -> None:
    value = getattr(pipeline, name)
    assert value.__name__ == name
    assert value.__module__.startswith("pipeline.")
    assert inspect.getdoc(value)


def test_a_star_import_brings_exactly_these() -> None:
    (names,) = python("from pipeline import *; print(*sorted(n for n in dir() if not n.startswith('__')))")
    assert names.split() == sorted(NAMES)


def test_the_package_alone_loads_nothing_of_itself() -> None:
    (count,) = python("import sys, pipeline; print(sum(name.startswith('pipeline.') for name in sys.modules))")
    assert count == "0"


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'engine_of_everything'"):
        _ = pipeline.engine_of_everything
