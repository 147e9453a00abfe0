"""Histograms as paths."""

from __future__ import annotations

import math

import pytest

from pipeline.page.plots import along, steps


def test_steps() -> None:
    assert steps((0, 2, 1)) == "M0 100V100h1V0h1V50h1V100Z"
    assert (
        steps((0, 99, 9), logarithmic=True) == f"M0 100V100h1V0h1V{100 * (1 - math.log(10) / math.log(100)):g}h1V100Z"
    )
    assert steps((0, 0)) == steps(()) == ""


@pytest.mark.parametrize(("value", "place"), [(1, 0), (2, 25), (5, 100), (9, 100), (-3, 0)])
def test_along(value: float, place: float) -> None:
    assert along(value, 1, 5) == place
    assert along(value, 3, 3) == 0
