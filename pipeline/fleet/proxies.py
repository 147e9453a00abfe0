"""What stands for hosted models in other processes, with the same methods."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.closing import Closing
from pipeline.data.pixels import Picture
from pipeline.fleet.answers import Raised
from pipeline.fleet.connection import import_ray
from pipeline.fleet.hosts import Host, PredictorFacts, RunnerFacts
from pipeline.predictor import Allocate, Prediction, in_memory


class Turns:
    """Calls hosts in turns: those on the same machine, where there are any."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = tuple(hosts)
        self._order: Iterator[Host] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self._hosts,)

    def __call__(self, method: str, *arguments: Any) -> Any:
        ray = import_ray()
        if self._order is None:
            here = ray.get_runtime_context().get_node_id()
            chosen = [host for host in self._hosts if host.node == here] or list(self._hosts)
            first = os.getpid() % len(chosen)  # so that workers do not all begin with the same one
            self._order = itertools.cycle(chosen[first:] + chosen[:first])
        answer = ray.get(getattr(next(self._order).actor, method).remote(*arguments))
        if isinstance(answer, Raised):
            raise answer.error
        return answer


class HostedPredictor(Closing):
    """Stands for predictors on other processes: what ``pipeline.stages.predict`` needs of one. Closed, it ends them;
    pickled, it calls the same ones, and leaves ending them to the first.

    Attributes:
        card, sha256, batch, streams: as a ``Predictor``'s.
    """

    def __init__(self, turns: Turns, facts: PredictorFacts, release: Callable[[], None] = lambda: None) -> None:
        self.card, self.sha256, self.batch, self.streams = facts.card, facts.sha256, facts.batch, facts.streams
        self._turns, self._facts, self._release = turns, facts, release

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedPredictor, (self._turns, self._facts)

    def close(self) -> None:
        self._release()

    def predict(
        self, images: Sequence[Picture], *, probabilities: bool = False, allocate: Allocate = in_memory
    ) -> list[Prediction]:
        """As ``Predictor.predict``, of pictures; large ones are held whole."""
        pixels = [np.ascontiguousarray(picture.pixels) for picture in images]
        results: list[Prediction] = self._turns("predict", pixels, probabilities)
        if not probabilities:
            return results
        kept = []
        for index, result in enumerate(results):
            assert result.probabilities is not None
            count, height, width = result.probabilities.shape
            memory = allocate(index, (count, height, width))
            memory[:] = result.probabilities
            kept.append(Prediction(result.labels, memory))
        return kept


class HostedRunner(Closing):
    """Stands for runners on other processes (``pipeline.backends.base.Runner``), as ``HostedPredictor`` does."""

    def __init__(self, turns: Turns, facts: RunnerFacts, release: Callable[[], None] = lambda: None) -> None:
        self.inputs, self.outputs = facts.inputs, facts.outputs
        self._turns, self._facts, self._release = turns, facts, release

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedRunner, (self._turns, self._facts)

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = self._turns("run", dict(feeds))
        return outputs

    def close(self) -> None:
        self._release()
