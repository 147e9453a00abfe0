"""What a model says of itself beside its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.artifacts import ModelCard
from pipeline.backends.base import Runner
from pipeline.backends.distant import DistantRunner
from pipeline.backends.remote import RemoteRunner
from pipeline.errors import ModelError


@dataclass(frozen=True)
class Facts:
    """The defaults where it says nothing.

    Attributes:
        card: preprocessing and classes.
        multiples: axis name, or its role (height, width), to the number that its sizes have to be multiples of.
        aligns_corners: whether it upsamples with align_corners, so that what it sees depends on the size it is fed.
        sha256: of a served model's file, where the server says it.
    """

    card: ModelCard | None = None
    multiples: Mapping[str, int] = field(default_factory=dict)
    aligns_corners: bool = False
    sha256: str = ""


def facts_of(runner: Runner) -> Facts:
    """What a loaded model says: a served one what it was packaged with, a distant one what is known of it, any other
    nothing."""
    if isinstance(runner, DistantRunner):
        return Facts(multiples=runner.model.multiples, aligns_corners=runner.model.aligns_corners)
    if not isinstance(runner, RemoteRunner):
        return Facts()
    served = runner.served
    if served is None:
        return Facts(sha256=runner.sha256)
    return Facts(served.card, served.multiples, served.aligns_corners, runner.sha256)


def required_card(card: ModelCard | None, model: object) -> ModelCard:
    """The card; raises ModelError where the model has none."""
    if card is None:
        raise ModelError(
            f"{model} does not say how images are preprocessed",
            expected="the metadata that `unet-trt export` writes",
            fix="use the model.onnx that it exported; `unet-trt predict` takes that beside another model, with --card",
        )
    return card
