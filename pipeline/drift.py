"""Where along the network a candidate leaves FP32: every tensor of the clean graph, compared with ONNX Runtime's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from pydantic.dataclasses import dataclass

from pipeline.artifacts import SCHEMA_VERSION
from pipeline.backends.base import Arrays, Runner
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.emulate import exactly_rounded, overflowing
from pipeline.graph.placement import activation_tensors, is_convolution
from pipeline.graph.shapes import dims, infer_at

Opener = Callable[[Sequence[str]], AbstractContextManager[Runner]]
# A tensor is where the error jumps when it has this much less SQNR than the worst tensor that it is made from; and one
# that is made from exact ones alone when it has less than FLOOR_DB. Beyond EXACT_DB only FP32 rounds, as where an FP16
# engine computes in FP32.
JUMP_DB, FLOOR_DB, EXACT_DB = 10.0, 20.0, 100.0
GROUP_BYTES = 512 << 20
# What takes signal away and adds no error: SQNR falls there though nothing is wrong.
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Clip")


@dataclass(frozen=True)
class TensorDrift:
    """One tensor, over all images. Values of the candidate that are NaN or infinite count as 0, all signal lost.

    Attributes:
        node, op: what gives it.
        sqnr_db: signal to quantization noise, 10 log10(sum x² / sum (x - y)²); None where nothing differs.
        cosine: of all values as one vector; None where one side is zero.
        max_abs_error, largest: largest |x - y| and |x|, in the tensor's unit.
        saturated: share of FP32's values beyond the range of the tensor's Q/DQ pair; None without one.
        not_finite: the candidate's values that are NaN or infinite, by image.
    """

    tensor: str
    node: str
    op: str
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float
    largest: float
    saturated: float | None
    not_finite: dict[str, int] = field(default_factory=dict)

    @property
    def signal(self) -> str:
        """``sqnr_db`` for people."""
        if self.not_finite:
            return f"{sum(self.not_finite.values())} not finite"
        return "exact" if self.sqnr_db is None else f"{self.sqnr_db:.1f}"


@dataclass(frozen=True)
class DriftReport:
    """Every tensor in topological order, and the first where the error jumps (None: nowhere).

    Attributes:
        ran: what gave the candidate's tensors.
        missing: tensors that it could not give, since what it runs has them no more, or inside fused layers only.
        notes: how far what ran is from what was to be compared.
    """

    ran: str
    images: int
    tensors: tuple[TensorDrift, ...]
    jump: str | None
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def verdict(self) -> None:
        """Raise CheckFailed where a tensor is not finite, naming the first."""
        bad = [entry for entry in self.tensors if entry.not_finite]
        if bad:
            image, count = max(bad[0].not_finite.items(), key=lambda found: found[1])
            raise CheckFailed(
                f"{len(bad)} of {len(self.tensors)} tensors hold NaN or infinite values where FP32's are finite",
                expected="finite values everywhere",
                got=f"first in {bad[0].tensor}: {sum(bad[0].not_finite.values())} values, most in {image}: {count}",
                fix="build another precision, exclude the node in INT8 (engine.exclude), or scale the weights there",
            )


def drift(
    clean: ModelProto,
    typed: ModelProto,
    candidate: Opener,
    feeds: Sequence[Arrays],
    ran: str,
    *,
    names: Sequence[str] = (),
    limit: float = GROUP_BYTES,
    engine: Callable[[], AbstractContextManager[Runner]] | None = None,
) -> DriftReport:
    """Compare tensor by tensor, some at a time.

    Args:
        clean: the FP32 graph.
        typed: what the candidate was made from; tells which of the tensors still exist, and the ranges of its pairs.
        candidate: opens a runner that gives the tensors named, by their names.
        feeds: the images as the graph takes them.
        names: of the images.
        limit: bytes of FP32 tensors of one image that are compared at a time.
        engine: opens the engine that the candidate stands for. What lies within its fused layers is not compared, as
            showing it would split them; and the report notes how far the candidate's outputs are from the engine's.

    Raises:
        ModelError: there is no image, a graph that cannot be run, or a tensor of FP32 that is not finite.
    """
    if not feeds:
        raise ModelError("there is no image to compare the layers on", fix="name validation images")
    names = names or [f"image {place}" for place in range(len(feeds))]
    producers = {name: node for node in clean.graph.node for name in node.output}
    wanted = [tensor for tensor in activation_tensors(clean) if tensor in producers]
    existing = {name for node in typed.graph.node for name in node.output}
    if engine is not None:
        existing -= _within_layers(clean)
    ranges = _ranges(typed)
    sums: dict[str, _Sums] = {}
    outputs: dict[str, list[NDArray[np.floating]]] = {value.name: [] for value in clean.graph.output}
    for group in _groups(clean, [tensor for tensor in wanted if tensor in existing], feeds[0], limit):
        with _with_outputs(clean, group) as reference, candidate(group) as other:
            for name, feed in zip(names, feeds, strict=True):
                ours, theirs = other(feed), reference(feed)
                for tensor in group:
                    _require_finite(tensor, theirs[tensor], name)
                    sums.setdefault(tensor, _Sums(tensor, ranges.get(tensor))).add(theirs[tensor], ours[tensor], name)
                    if tensor in outputs and engine is not None:
                        outputs[tensor].append(ours[tensor])
    tensors = tuple(sums[tensor].figures(producers[tensor]) for tensor in wanted if tensor in sums)
    return DriftReport(
        ran,
        len(feeds),
        tensors,
        _jump(tensors, producers),
        tuple(tensor for tensor in wanted if tensor not in existing),
        tuple(_changed(engine, feeds, outputs)) if engine is not None else (),
    )


def emulated(typed: ModelProto) -> Opener:
    """Opens the typed graph on ONNX Runtime."""
    exact = overflowing(exactly_rounded(typed))
    return lambda tensors: _with_outputs(exact, tensors)


def _within_layers(clean: ModelProto) -> set[str]:
    """What only an activation reads that TensorRT runs within the convolution before it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in clean.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    outputs = {value.name for value in clean.graph.output}
    return {
        node.output[0]
        for node in clean.graph.node
        if is_convolution(node)
        and node.output[0] not in outputs
        and [reader.op_type for reader in readers.get(node.output[0], [])] in [[op] for op in ACTIVATIONS]
    }


def _changed(
    engine: Callable[[], AbstractContextManager[Runner]],
    feeds: Sequence[Arrays],
    outputs: Mapping[str, Sequence[NDArray[np.floating]]],
) -> Iterator[str]:
    """How far outputs are from the engine's own, one sentence each."""
    with engine() as runner:
        own = [runner(feed) for feed in feeds]
    for name, shown in outputs.items():
        if not all(np.isfinite(mine[name]).all() for mine in own):
            yield f"{name} of the engine itself holds NaN or infinite values"
            continue
        sums = _Sums(name, None)
        for mine, other in zip(own, shown, strict=True):
            sums.add(mine[name], other, name)
        ratio = sums.sqnr_db()
        how = "the same as the engine's own" if ratio is None else f"{ratio:.1f} dB (SQNR) from the engine's own"
        yield f"with tensors shown, which splits fused layers, {name} is {how}"


def _require_finite(tensor: str, values: NDArray[np.floating], image: str) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ModelError(
            f"tensor {tensor} of the FP32 graph holds {bad} NaN or infinite values",
            expected="a network that is finite in FP32",
            got=f"them in {image}",
            fix="look for the weights that do it: no precision can be compared with this",
        )


def _with_outputs(model: ModelProto, tensors: Sequence[str]) -> OnnxRuntimeRunner:
    shown = ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    return OnnxRuntimeRunner(shown.SerializeToString(), optimize=False)


def _groups(model: ModelProto, tensors: Sequence[str], feed: Arrays, limit: float) -> Iterator[list[str]]:
    """The tensors in order, in groups of at most ``limit`` bytes (one may exceed it alone)."""
    values = infer_at(model, {name: array.shape for name, array in feed.items()})
    group: list[str] = []
    used = 0
    for tensor in tensors:
        size = 4 * math.prod(axis for axis in dims(values.get(tensor)) or () if isinstance(axis, int))
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(tensor)
        used += size
    if group:
        yield group


def _ranges(typed: ModelProto) -> dict[str, float]:
    """The largest |value| that rounds to 127, of every activation that goes through a QuantizeLinear."""
    fixed = {tensor.name: tensor for tensor in typed.graph.initializer}
    return {
        node.input[0]: 127.5 * float(numpy_helper.to_array(fixed[node.input[1]]))
        for node in typed.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in fixed and not fixed[node.input[1]].dims
    }


class _Sums:
    """Of one tensor, in float64."""

    def __init__(self, tensor: str, amax: float | None) -> None:
        self.tensor, self.amax = tensor, amax
        self.signal = self.noise = self.product = self.power = 0.0
        self.worst = self.largest = 0.0
        self.beyond = self.count = 0
        self.not_finite: dict[str, int] = {}

    def add(self, reference: NDArray[np.floating], other: NDArray[np.floating], image: str) -> None:
        x, y = reference.astype(np.float64), other.astype(np.float64)
        bad = ~np.isfinite(y)
        if bad.any():
            self.not_finite[image] = int(bad.sum())
            y[bad] = 0
        error = x - y
        self.signal += float(np.vdot(x, x))
        self.noise += float(np.vdot(error, error))
        self.product += float(np.vdot(x, y))
        self.power += float(np.vdot(y, y))
        self.worst = max(self.worst, float(np.abs(error).max(initial=0)))
        self.largest = max(self.largest, float(np.abs(x).max(initial=0)))
        self.count += x.size
        if self.amax is not None:
            self.beyond += int((np.abs(x) > self.amax).sum())

    def sqnr_db(self) -> float | None:
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None

    def figures(self, node: NodeProto) -> TensorDrift:
        norms = math.sqrt(self.signal * self.power)
        return TensorDrift(
            tensor=self.tensor,
            node=node.name,
            op=node.op_type,
            sqnr_db=self.sqnr_db(),
            cosine=min(self.product / norms, 1.0) if norms else None,
            max_abs_error=self.worst,
            largest=self.largest,
            saturated=self.beyond / self.count if self.amax is not None and self.count else None,
            not_finite=self.not_finite,
        )


def _jump(tensors: Iterable[TensorDrift], producers: Mapping[str, NodeProto]) -> str | None:
    """The first tensor whose error its inputs do not explain. What was not compared is passed over, to its inputs."""
    seen: dict[str, float] = {}
    compared: set[str] = set()

    def sources(tensor: str) -> Iterator[str]:
        for name in producers[tensor].input if tensor in producers else ():
            if name in compared:
                yield name
            else:
                yield from sources(name)

    for entry in tensors:
        compared.add(entry.tensor)
        if entry.not_finite:
            return entry.tensor
        if entry.sqnr_db is None:
            continue
        before = [seen[name] for name in sources(entry.tensor) if name in seen]
        alone = entry.op in ACTIVATIONS and compared.issuperset(producers[entry.tensor].input[:1])
        if not alone and entry.sqnr_db < (min(before) - JUMP_DB if before else FLOOR_DB):
            return entry.tensor
        if entry.sqnr_db < EXACT_DB:
            seen[entry.tensor] = entry.sqnr_db
    return None
