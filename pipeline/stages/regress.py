"""Compare a run's figures with a committed baseline."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.artifacts import from_json, to_json, write_atomically
from pipeline.errors import CheckFailed, InputError
from pipeline.reports import ValidationReport

# How far a figure, a fraction of 1, may fall below its baseline.
TOLERANCES = {"agreement": 0.002, "mean_iou": 0.003}


@dataclass(frozen=True)
class Baseline:
    """Accepted figures, by ``<how it ran>/<precision>/<figure>``; how: "engine" or "emulated"."""

    config: str
    figures: dict[str, float]
    created: str


@dataclass(frozen=True)
class Difference:
    """One figure against its baseline; None where one side does not hold it."""

    figure: str
    baseline: float | None
    now: float | None
    tolerance: float

    @property
    def regressed(self) -> bool:
        return self.baseline is not None and not (self.now is not None and self.now >= self.baseline - self.tolerance)


def regress(name: str, reports: Iterable[ValidationReport], path: Path, *, update: bool = False) -> list[Difference]:
    """Differences of a run's figures to the baseline at ``path``, or with ``update`` make them the baseline.

    Figures of other precisions and of the other way of running (engine or emulated) stay as they are, uncompared.

    Raises:
        InputError: there is no baseline, or it belongs to another config.
        CheckFailed: a figure fell below its baseline by more than its tolerance, or is missing.
    """
    figures: dict[str, float] = {}
    for report in reports:
        prefix = f"{'emulated' if report.candidate.emulated else 'engine'}/{report.candidate.precision}"
        figures[f"{prefix}/agreement"] = report.agreement
        if report.scores is not None:
            figures[f"{prefix}/mean_iou"] = report.scores.mean_iou
    old = from_json(Baseline, path) if path.is_file() else None
    if old is not None and old.config != name:
        raise InputError(f"{path} is the baseline of another config", expected=name, got=old.config, fix="name its own")
    if old is None and not update:
        raise InputError(
            f"there is no baseline {path}", expected="figures accepted before", fix="accept these with --update"
        )
    known = dict(old.figures) if old else {}
    judged = {figure.rsplit("/", 1)[0] for figure in figures}
    compared = sorted({f for f in known if f.rsplit("/", 1)[0] in judged} | set(figures))
    differences = [Difference(f, known.get(f), figures.get(f), TOLERANCES[f.rsplit("/", 1)[1]]) for f in compared]
    if update:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(Baseline(name, {**known, **figures}, created)))
        return differences
    bad = [d for d in differences if d.regressed]
    if bad:
        raise CheckFailed(
            f"{len(bad)} of {len(differences)} figures fell below the baseline {path}",
            expected=", ".join(f"{d.figure} >= {d.baseline - d.tolerance:.4f}" for d in bad if d.baseline is not None),
            got=", ".join(f"{d.figure} {'missing' if d.now is None else format(d.now, '.4f')}" for d in bad),
            fix="find the change that did it, or accept the figures with --update",
        )
    return differences
