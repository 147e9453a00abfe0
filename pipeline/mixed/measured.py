"""What the engines all FP16 and all INT8 took, layer by layer, as times of the graph's nodes and of copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.backends.layers import EngineLayer
from pipeline.errors import EngineError
from pipeline.reports import EngineAccount

Stored = Literal["int8", "fp16"]


@dataclass(frozen=True)
class Measured:
    """Times of the two engines.

    Attributes:
        nodes: milliseconds by node name, by the engine's precision; a node without a kernel is in none.
        kernel_ms: of the shortest kernel: what the smallest tensor takes.
        bandwidth: bytes read and written per second by copies and reformats, ``kernel_ms`` of each left out; None where
            there are none.
    """

    nodes: Mapping[Stored, Mapping[str, float]]
    kernel_ms: float
    bandwidth: float | None


def measure(engines: Mapping[Stored, EngineAccount], macs: Mapping[str, int], others: Collection[str]) -> Measured:
    """Share the engines' layers among the nodes of their graph.

    1. Profiling adds about the same to every kernel (H200, TensorRT 8.6.0: 0.0026 to 0.0030 ms): so much is taken off
       each that their sum is the whole inference, but no kernel takes less than nothing.
    2. A layer belongs to its convolutions, by multiply-accumulates, else to the first of its nodes that the graph has.
    3. A layer of no such node (a reformat, a cast) serves the layer that reads what it gives, else the one before it;
       where there is neither, all.

    Args:
        engines: both, profiled.
        macs: of the graph's convolutions by node name.
        others: names of its other nodes.

    Raises:
        EngineError: a convolution that no layer names.
    """
    nodes: dict[Stored, Mapping[str, float]] = {}
    timed: list[tuple[EngineLayer, float]] = []
    for precision, engine in engines.items():
        kernels = [layer for layer in engine.layers if layer.ms]
        times = _unprofiled([layer.ms or 0 for layer in kernels], engine.whole_ms)
        timed += zip(kernels, times, strict=True)
        nodes[precision] = found = _by_node(kernels, times, macs, others)
        if missing := sorted(macs.keys() - found.keys()):
            raise EngineError(
                f"{len(missing)} convolution(s) have no layer in the engine that is all {precision.upper()}",
                expected="one that names them, with its time",
                got=f"none for {missing[0]}",
                fix="report this with the version of TensorRT",
            )
    shortest = min(ms for _, ms in timed)
    copies = [(layer.bytes, ms) for layer, ms in timed if layer.group in ("reformat", "concat") and layer.bytes]
    moving_ms = sum(ms - shortest for _, ms in copies)
    return Measured(nodes, shortest, 1e3 * sum(size for size, _ in copies) / moving_ms if moving_ms else None)


def _unprofiled(profiled: Sequence[float], whole_ms: float) -> list[float]:
    if not profiled:
        return []
    added = (sum(profiled) - whole_ms) / len(profiled)
    left = [max(ms - added, 0) for ms in profiled]
    return [ms * whole_ms / sum(left) for ms in left]


def _by_node(
    kernels: Sequence[EngineLayer], times: Sequence[float], macs: Mapping[str, int], others: Collection[str]
) -> dict[str, float]:
    shares = [_shares(layer, macs, others) for layer in kernels]
    named = [(layer, share) for layer, share in zip(kernels, shares, strict=True) if share]
    readers = {tensor.name: share for layer, share in reversed(named) for tensor in layer.inputs}
    makers = {tensor.name: share for layer, share in named for tensor in layer.outputs}
    found: dict[str, float] = defaultdict(float)
    for layer, ms, own in zip(kernels, times, shares, strict=True):
        served = [readers.get(tensor.name) for tensor in layer.outputs]
        served += [makers.get(tensor.name) for tensor in layer.inputs]
        for name, share in (own or next(filter(None, served), {})).items():
            found[name] += share * ms
    told = sum(found.values())
    return {name: ms * sum(times) / told for name, ms in found.items()}


def _shares(layer: EngineLayer, macs: Mapping[str, int], others: Collection[str]) -> dict[str, float]:
    """Of a layer's time, by node."""
    held = [name for name in layer.nodes if name in macs]
    total = sum(macs[name] for name in held)
    return {name: macs[name] / total for name in held} or dict.fromkeys(
        [name for name in layer.nodes if name in others][:1], 1.0
    )
