"""What stands for hosted models in other processes, with the same methods."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.doors import Address, Visit
from pipeline.closing import Closing
from pipeline.data.pixels import Picture
from pipeline.fleet.answers import Raised
from pipeline.fleet.connection import import_ray, node_here
from pipeline.fleet.hosts import Host, PredictorFacts, RunnerFacts
from pipeline.predictor import Allocate, Apart, Prediction, in_memory

log = logging.getLogger(__name__)
# Failed visits that are taken for chance.
REFUSALS = 3


class Turns:
    """Hosts in turns: those on the same machine, where there are any."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = tuple(hosts)
        self._order: Iterator[Host] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self._hosts,)

    def next(self) -> Host:
        if self._order is None:
            here = node_here()
            chosen = [host for host in self._hosts if host.node == here] or list(self._hosts)
            first = os.getpid() % len(chosen)  # so that workers do not all begin with the same one
            self._order = itertools.cycle(chosen[first:] + chosen[:first])
        return next(self._order)


def asked(host: Host, method: str, *arguments: Any) -> Any:
    """What a host answers, through Ray; raises what was raised there."""
    answer = import_ray().get(getattr(host.actor, method).remote(*arguments))
    if isinstance(answer, Raised):
        raise answer.error
    return answer


class Visited(Closing):
    """A predictor by a host's model, which is on this machine.

    Raises:
        As ``Visit``.
    """

    def __init__(self, address: Address, there: Apart) -> None:
        self._visit = Visit(address, there.model)
        self.predictor = there.opened(self._visit.runner)

    def close(self) -> None:
        self.predictor.close()
        self._visit.close()


class HostedPredictor(Closing):
    """Stands for predictors on other processes: what ``pipeline.stages.predict`` needs of one. Closed, it ends them;
    pickled, it calls the same ones, and leaves ending them to the first.

    A host on the same machine is visited: images are resized and masks restored here, and batches go there and back
    through memory that both see. Hosts elsewhere get the images, through Ray, which takes more of the cores than
    decoding does.

    Attributes:
        card, sha256, batch, streams: as a ``Predictor``'s.
    """

    def __init__(self, turns: Turns, facts: PredictorFacts, release: Callable[[], None] = lambda: None) -> None:
        self.card, self.sha256, self.batch, self.streams = facts.card, facts.sha256, facts.batch, facts.streams
        self._turns, self._facts, self._release = turns, facts, release
        self._visits: dict[Host, Visited | None] = {}
        self._refusals: Counter[Host] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedPredictor, (self._turns, self._facts)

    def close(self) -> None:
        for visited in self._visits.values():
            if visited is not None:
                visited.close()
        self._release()

    def predict(
        self, images: Sequence[Picture], *, probabilities: bool = False, allocate: Allocate = in_memory
    ) -> list[Prediction]:
        """As ``Predictor.predict``, of pictures; a host elsewhere is sent large ones whole."""
        host = self._turns.next()
        visited = self._visited(host)
        if visited is not None:
            try:
                return visited.predictor.predict(images, probabilities=probabilities, allocate=allocate)
            except ConnectionError:  # it has ended; Ray starts another in its place, and waits for it below
                with self._lock:
                    if self._visits.get(host) is visited:
                        del self._visits[host]
        pixels = [np.ascontiguousarray(picture.pixels) for picture in images]
        results: list[Prediction] = asked(host, "predict", pixels, probabilities)
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

    def _visited(self, host: Host) -> Visited | None:
        """A way to a host's model; None where there is none."""
        with self._lock:
            if host not in self._visits:
                if host.node != node_here():
                    self._visits[host] = None
                    return None
                try:
                    address = asked(host, "door")
                    self._visits[host] = Visited(address, self._facts.there)
                except (OSError, EOFError, AuthenticationError, ValueError) as error:
                    log.info("images go through Ray, since the host beside cannot be visited: %s", error)
                    self._refusals[host] += 1
                    # One that has just ended is there again with the next images, at another address.
                    if isinstance(error, (ConnectionError, EOFError)) and self._refusals[host] < REFUSALS:
                        return None
                    self._visits[host] = None
            return self._visits[host]


class HostedRunner(Closing):
    """Stands for runners on other processes (``pipeline.backends.base.Runner``), as ``HostedPredictor`` does."""

    def __init__(self, turns: Turns, facts: RunnerFacts, release: Callable[[], None] = lambda: None) -> None:
        self.inputs, self.outputs = facts.inputs, facts.outputs
        self._turns, self._facts, self._release = turns, facts, release

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedRunner, (self._turns, self._facts)

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = asked(self._turns.next(), "run", dict(feeds))
        return outputs

    def close(self) -> None:
        self._release()
