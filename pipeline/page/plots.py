"""Small plots as SVG paths."""

from __future__ import annotations

import math
from collections.abc import Sequence

HEIGHT = 100


def steps(counts: Sequence[int], *, logarithmic: bool = False) -> str:
    """A histogram as one closed path, ``len(counts)`` wide and 100 high, the origin in the upper left corner.

    Args:
        logarithmic: heights by log(1 + count).
    """
    heights = [math.log1p(count) if logarithmic else float(count) for count in counts]
    highest = max(heights, default=0.0)
    if not highest:
        return ""
    tops = (round(HEIGHT * (1 - height / highest), 1) for height in heights)
    return f"M0 {HEIGHT}" + "".join(f"V{top:g}h1" for top in tops) + f"V{HEIGHT}Z"


def along(value: float, low: float, high: float) -> float:
    """Where a value lies between low and high, in percent, at most 100 and at least 0."""
    return 0.0 if high <= low else min(max(100 * (value - low) / (high - low), 0.0), 100.0)
