"""Running a graph before and after a rewrite on the same inputs: which sizes, which values, how far apart."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic.dataclasses import dataclass

from pipeline.artifacts import TensorSpec
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import ProfileRange
from pipeline.errors import ModelError
from pipeline.graph.io import model_inputs
from pipeline.graph.placement import groups
from pipeline.graph.promises import read_multiples

log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
Errors = tuple[float, float]
# One choice of sizes for each of KINDS.
Sizes = tuple[tuple[int, ...], ...]

SEED = 0
INPUTS = (
    "seeded waves, edges and noise, mean 0, standard deviation about 1; integers: uniform in their range, at most 255"
)
SIZES = (
    "an axis with a profile: its min, opt, a size between min and max (odd where allowed), max; another: the smallest "
    "power of two that the raw graph runs (batch: 1), a typical, an odd and a larger size, raised to what is promised"
)
KINDS = ("minimum", "typical", "odd", "maximum")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
# Sizes of free axes without a profile, in the order of KINDS: each to be tried until the raw graph runs.
DEFAULTS: dict[str, Sizes] = {
    "batch": ((1,), (2,), (1,), (3,)),
    "depth": (POWERS, (32,), (21,), (48,)),
    "height": (POWERS, (64,), (37,), (256,)),
    "width": (POWERS, (96,), (51,), (192,)),
    "other": (POWERS, (8,), (5,), (16,)),
}
IMAGE_RANKS = (4, 5)
UNEQUAL = (float("inf"), float("inf"))


@dataclass(frozen=True)
class Trial:
    """One comparison: the input shapes, max |raw - clean| over the outputs, and the worst of that / max |raw|.

    ``size`` is static, minimum, typical, odd or maximum; ``seconds`` are those of both graphs' runs.
    """

    size: str
    shapes: dict[str, tuple[int, ...]]
    max_abs_error: float
    max_relative_error: float
    seconds: float


@dataclass(frozen=True)
class _Case:
    size: str
    shapes: Shapes
    wanted: dict[str, Any]
    seconds: float


class Trials:
    """What a graph makes of seeded inputs of several sizes, on ONNX Runtime without its optimizations.

    Args:
        path: the graph's file.
        model: the same graph, for its inputs and the multiples that its sizes are promised to be.
        profiles: sizes of free axes, by the axis's name in the graph, or batch, height, width.

    Raises:
        ModelError: the graph does not load, or runs with none of the sizes.

    Attributes:
        refused: sizes that the graph itself cannot run; nothing is compared there.
    """

    def __init__(self, path: Path, model: ModelProto, profiles: Mapping[str, ProfileRange]) -> None:
        self.refused: list[Shapes] = []
        self._specs = model_inputs(model)
        self._cases: list[_Case] = []
        sizes = _sizes(self._specs, _channels(model), profiles, read_multiples(model))
        reason: ModelError | None = None
        with OnnxRuntimeRunner(path, optimize=False, arena=False) as runner:
            for kind in KINDS if sizes else ("static",):
                tried: list[Shapes] = []
                for shapes in _choices(self._specs, sizes, kind):
                    if shapes in tried or any(case.shapes == shapes for case in self._cases):
                        break
                    try:
                        self._cases.append(self._case(runner, kind, shapes))
                        break
                    except ModelError as error:
                        reason = error
                    tried.append(shapes)
                else:
                    self.refused.append(tried[-1])
        if not self._cases:
            assert reason is not None
            raise ModelError(
                "the raw graph runs with none of the input sizes tried, so nothing can be compared",
                expected="a graph that ONNX Runtime runs",
                got="; ".join(str(shapes) for shapes in self.refused) + f": {reason.problem}",
                fix="export it with static sizes, or give its sizes in engine.profile",
            ) from reason

    def compare(self, path: Path) -> tuple[Trial, ...]:
        """The same inputs through a rewritten graph; errors are infinite where it does not run."""
        trials = []
        try:
            with OnnxRuntimeRunner(path, optimize=False, arena=False) as runner:
                for case in self._cases:
                    start = time.perf_counter()
                    errors = _compare(case.wanted, runner, self._feeds(case.shapes))
                    seconds = case.seconds + time.perf_counter() - start
                    trials.append(Trial(case.size, case.shapes, *errors, round(seconds, 3)))
        except ModelError as error:  # broken by a pass: as wrong as it can be
            log.debug("the rewritten graph does not load: %s", error)
            return tuple(Trial(case.size, case.shapes, *UNEQUAL, round(case.seconds, 3)) for case in self._cases)
        return tuple(trials)

    def _case(self, runner: OnnxRuntimeRunner, kind: str, shapes: Shapes) -> _Case:
        start = time.perf_counter()
        wanted = runner(self._feeds(shapes))
        if not any(array.size for array in wanted.values()):
            raise ModelError("the graph's outputs are empty", got=f"inputs {shapes}")
        return _Case(kind, shapes, wanted, time.perf_counter() - start)

    def _feeds(self, shapes: Shapes) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(SEED)
        return {spec.name: structured_input(shapes[spec.name], spec.dtype, rng) for spec in self._specs}


def structured_input(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """An array with smooth and sharp parts: waves along the last two axes, a step, and noise (see INPUTS)."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.asarray(rng.integers(0, 2, shape), kind)
    if kind.kind in "iu":
        return np.asarray(rng.integers(0, min(255, int(np.iinfo(kind).max)), shape, endpoint=True), kind)
    values = 0.3 * rng.standard_normal(shape)
    for axis in range(max(0, len(shape) - 2), len(shape)):
        position = np.linspace(0, 1, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        values = values + np.sin(2 * np.pi * (rng.uniform(1, 4) * position + rng.uniform()))
        values = values + 0.5 * np.sign(position - rng.uniform(0.3, 0.7))
    return np.asarray(values, kind)


def _sizes(
    specs: Sequence[TensorSpec],
    channels: int | None,
    profiles: Mapping[str, ProfileRange],
    multiples: Mapping[str, int],
) -> dict[str, Sizes]:
    """What to try for every free axis of the inputs."""
    sizes: dict[str, Sizes] = {}
    for spec in specs:
        for axis, name in enumerate(spec.shape):
            if isinstance(name, int) or name in sizes:
                continue
            role = _role(spec.shape, axis)
            limits = profiles.get(name) or profiles.get(role)
            if limits is not None:
                sizes[name] = tuple((size,) for size in _within(limits, second=role == "width"))
            elif role == "channels":
                sizes[name] = ((channels or 3,),) * len(KINDS)
            else:
                step = multiples.get(name) or multiples.get(role) or 1
                sizes[name] = tuple(tuple(-(-size // step) * step for size in kind) for kind in DEFAULTS[role])
    return sizes


def _role(shape: tuple[int | str, ...], axis: int) -> str:
    """What an axis of an input stands for; images are (N, C, [D,] H, W), or end with C where only that is fixed."""
    rank = len(shape)
    if axis == 0:
        return "batch"
    if rank not in IMAGE_RANKS:
        return "other"
    last = isinstance(shape[1], str) and isinstance(shape[-1], int)
    channel = rank - 1 if last else 1
    if axis == channel:
        return "channels"
    spatial = [other for other in range(1, rank) if other != channel]
    return ("depth", "height", "width")[3 - len(spatial) :][spatial.index(axis)]


def _within(limits: ProfileRange, *, second: bool) -> tuple[int, int, int, int]:
    """min, opt, a size between them and max that is odd where that is allowed and near the middle, max.

    ``second`` takes the next best in the middle, so that height and width of one profile differ.
    """
    step, middle = limits.multiple_of, (limits.min + limits.max) / 2
    ends = (limits.min, limits.opt, limits.max)
    inner = [size for size in range(limits.min, limits.max + 1, step) if size not in ends]
    best = sorted(inner, key=lambda size: (size % 2 == 0, size // step % 2 == 0, abs(size - middle)))
    between = [limits.opt, *best[: 2 if second else 1]][-1]
    return limits.min, limits.opt, between, limits.max


def _channels(model: ModelProto) -> int | None:
    """Input channels of the first convolution: what a free channel axis has to be."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) > 1 and node.input[1] in weights:
            return int(weights[node.input[1]][1] * groups(node))
    return None


def _choices(specs: Sequence[TensorSpec], sizes: Mapping[str, Sizes], kind: str) -> Iterator[Shapes]:
    """The shapes of a kind; several, ascending, where a size has to be searched for."""
    position = KINDS.index(kind) if kind in KINDS else 0
    chosen = {name: options[position] for name, options in sizes.items()}
    for attempt in range(max((len(options) for options in chosen.values()), default=1)):
        yield {
            spec.name: tuple(
                size if isinstance(size, int) else chosen[size][min(attempt, len(chosen[size]) - 1)]
                for size in spec.shape
            )
            for spec in specs
        }


def _compare(wanted: Mapping[str, NDArray[Any]], runner: OnnxRuntimeRunner, feeds: dict[str, NDArray[Any]]) -> Errors:
    """The worst (absolute, relative) error over the outputs."""
    try:
        outputs = runner(feeds)
        errors = [_errors(reference, outputs[name]) for name, reference in wanted.items()]
    except (ModelError, ValueError, KeyError) as error:  # broken by a pass: as wrong as it can be
        log.debug("the rewritten graph does not run: %s", error)
        return UNEQUAL
    return max(error[0] for error in errors), max(error[1] for error in errors)


def _errors(reference: NDArray[Any], got: NDArray[Any]) -> Errors:
    """(max |a - b|, that / max |a|); infinite for other shapes or types, or where only one side is not finite."""
    if reference.shape != got.shape or reference.dtype != got.dtype:
        return UNEQUAL
    a, b = reference.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return UNEQUAL
    error = float(np.abs(a[finite] - b[finite]).max(initial=0))
    if error == 0:
        return 0.0, 0.0
    largest = float(np.abs(a[finite]).max(initial=0))
    return error, error / largest if largest > 0 else float("inf")
