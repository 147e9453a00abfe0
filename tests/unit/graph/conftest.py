"""Every test of graphs draws the same weights, whichever tests ran before it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.graph import builders


@pytest.fixture(autouse=True)
def _drawn_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "RNG", np.random.default_rng(7))
