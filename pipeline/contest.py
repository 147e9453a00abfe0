"""Choices of mixed precision as engines that take turns on the GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engines import load_engine
from pipeline.stages.benchmark import take_turns

if TYPE_CHECKING:
    from pipeline.backends.base import Arrays, Runner
    from pipeline.config import BenchmarkConfig
    from pipeline.metrics.latency import Estimate


def time_choices(
    choices: Mapping[str, tuple[str, ...]],
    build: Callable[[tuple[str, ...], Path], object],
    feed: Callable[[Runner], Arrays],
    config: BenchmarkConfig,
) -> dict[str, Estimate]:
    """Milliseconds on the GPU by name.

    Args:
        choices: convolutions that stay FP16, by a name each.
        build: an engine of a choice, into an empty folder.
        feed: one image as a runner takes it.

    Raises:
        EngineError, UnsupportedError: a choice that cannot be built or run.
    """
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        runners = {}
        for place, (name, half) in enumerate(choices.items()):
            folder = Path(made, str(place))
            folder.mkdir()
            build(half, folder)
            runners[name] = stack.enter_context(load_engine(folder / "model.engine"))
        fed = {name: feed(runner) for name, runner in runners.items()}
        turns = take_turns(runners, fed, config)
        return {name: turns.latency(name) for name in runners}
