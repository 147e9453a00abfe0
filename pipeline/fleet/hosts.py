"""Processes that hold a model, on a GPU as a rule, for all workers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, TensorSpec
from pipeline.backends.doors import Address, Door
from pipeline.backends.onnxruntime import THREADS, threads
from pipeline.data.pixels import picture_of
from pipeline.errors import EngineError, UnsupportedError
from pipeline.fleet.answers import Opened, Raised, opened_here
from pipeline.fleet.connection import import_ray, kill, lines_of, packed, resources, unpacked
from pipeline.predictor import Apart, Predictor, apart
from pipeline.progress import PLAIN_LINE_SECONDS

log = logging.getLogger(__name__)

# Ends of a host's process during one call that are taken for chance.
REPEATED_CALLS = 2


@dataclass(frozen=True)
class PredictorFacts:
    """What a predictor says of itself, as its attributes, and all of it but for its model."""

    card: ModelCard
    sha256: str
    batch: int
    streams: int
    there: Apart


@dataclass(frozen=True)
class RunnerFacts:
    """What a runner says of itself, as its attributes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Host:
    """A ``HostActor``, and the node that it is on."""

    actor: Any
    node: str


class HostActor:
    """The actor that holds a model: a predictor or a runner."""

    def __init__(self, opens: bytes, threads: int) -> None:
        self.opens = opens
        self.model: Any = None
        self.address: Address | None = None
        os.environ[THREADS] = str(threads)
        self.lock = threading.Lock()

    def ready(self) -> Opened:
        """The model's facts."""

        def facts() -> PredictorFacts | RunnerFacts:
            with self.lock:
                if self.model is None:
                    self.model = unpacked(self.opens)()
            model = self.model
            if isinstance(model, Predictor):
                return PredictorFacts(model.card, model.sha256, model.batch, model.streams, apart(model)[0])
            return RunnerFacts(model.inputs, model.outputs)

        return opened_here(facts)

    def door(self) -> Any:
        """The ``Address`` at which processes of this machine reach the predictor's model, or what was raised."""

        def address() -> Address:
            with self.lock:
                if self.address is None:
                    self.address = Door(apart(self.model)[1]).address
                return self.address

        return self._answer(address)

    def predict(self, images: Sequence[NDArray[np.uint8]], probabilities: bool) -> Any:
        """A ``Prediction`` an image, or what was raised."""
        return self._answer(
            lambda: self.model.predict([picture_of(pixels) for pixels in images], probabilities=probabilities)
        )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Any:
        """The outputs by name, or what was raised."""
        return self._answer(lambda: self.model(feeds))

    def _answer(self, call: Callable[[], Any]) -> Any:
        if self.model is None:  # a host that took the place of one that died
            content = self.ready().content
            if isinstance(content, Raised):
                return content
        try:
            return call()
        except Exception as error:
            return Raised(error)


def open_hosts(opens: Callable[[], Any], count: int, *, calls: int, on_gpu: bool) -> tuple[list[Host], Any]:
    """Hosts that have opened their model, and its facts. None is left where one fails.

    Args:
        calls: that each works on at a time.

    Raises:
        PipelineError: as ``opens`` raised it.
        ConfigError: another version of unet-trt on a machine.
        EngineError: the engine does not run on all types of GPU.
        UnsupportedError: a process died.
    """
    ray = import_ray()
    actor = ray.remote(HostActor).options(
        max_restarts=-1, max_task_retries=REPEATED_CALLS, max_concurrency=calls, **resources(on_gpu=on_gpu)
    )
    model = packed(opens)
    actors = [actor.remote(model, threads()) for _ in range(count)]
    try:
        found = _gather([each.ready.remote() for each in actors])
        check_opened(found)
    except BaseException:
        for each in actors:
            kill(each)
        raise
    log.info("models: %s", "; ".join(f"{one.host} {one.gpu}".strip() for one in found))
    return [Host(each, one.node) for each, one in zip(actors, found, strict=True)], found[0].content


def _gather(references: list[Any]) -> list[Opened]:
    """Results of all, with a word now and then while they are awaited."""
    ray, begin, waiting = import_ray(), time.monotonic(), references
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=PLAIN_LINE_SECONDS)
        if waiting:
            ready, seconds = len(references) - len(waiting), time.monotonic() - begin
            log.info("%d of %d models are opened, after %.0f s", ready, len(references), seconds)
    try:
        found: list[Opened] = ray.get(references)
    except ray.exceptions.RayError as error:
        raise UnsupportedError(
            f"a process of the fleet died while its model was opened: {lines_of(error)[0]}",
            fix="look into Ray's logs of that node; is there enough memory?",
        ) from error
    return found


def check_opened(found: Sequence[Opened]) -> None:
    """Raise what one of them raised; where GPUs are of several types, and it is the engine, say so instead."""
    for one in found:
        one.check_version()
    kinds = Counter(one.gpu for one in found if one.gpu)
    for one in found:
        if (error := one.error) is not None:
            raise _mixed(kinds) if len(kinds) > 1 and isinstance(error, EngineError) else error


def _mixed(kinds: Counter[str]) -> EngineError:
    return EngineError(
        f"the fleet's GPUs are of {len(kinds)} types, and one engine does not run on all of them",
        expected="one type of GPU, or an engine for each",
        got=", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        fix="give the clean ONNX file with -p, of which an engine is built for every type of GPU",
    )
