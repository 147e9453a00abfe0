"""Where an engine's time goes, and whether INT8 is worth it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.artifacts import Device
from pipeline.backends.layers import GROUPS, EngineLayer, parse_layers
from pipeline.backends.rates import Rates, rates_of
from pipeline.metrics.latency import Estimate
from pipeline.reports import EngineAccount, Floor, GroupTime, SpeedVerdict

if TYPE_CHECKING:
    from onnx import ModelProto

    from pipeline.backends.base import Arrays
    from pipeline.backends.runner import EngineRunner

# Named in a reason; the report's table has all of them.
SHOWN = 6
UNKNOWN = "unknown"
# In the names of kernels for weights of which two in four are zero.
SPARSE = "sparse"


def account_for(
    runner: EngineRunner,
    feeds: Arrays,
    graph: ModelProto | None,
    engine_sha256: str,
    device: Device | None,
    whole_ms: float,
) -> EngineAccount:
    """Profile an engine on these feeds and add up its layers.

    Args:
        graph: that the engine was built from, in the same node and input names; None where there is none at hand.
        whole_ms: median of whole inferences, not profiled.

    Raises:
        EngineError: the engine fails to run, or tells nothing of its layers.
        ModelError: a graph whose convolutions' sizes cannot be told.
    """
    from pipeline.graph.cost import convolution_macs, operators, tensor_shapes

    milliseconds, fed = runner.profile(feeds), {name: array.shape for name, array in feeds.items()}
    batch = next(iter(fed.values()))[0]
    if graph is None:
        return account(engine_sha256, parse_layers(runner.layers(), batch=batch), milliseconds, {}, device, whole_ms)
    layers = parse_layers(runner.layers(), operators(graph), tensor_shapes(graph, fed), batch)
    macs = convolution_macs(graph, fed)
    return account(engine_sha256, layers, milliseconds, macs, device, whole_ms)


def account(
    engine_sha256: str,
    layers: Sequence[EngineLayer],
    milliseconds: Mapping[str, float],
    macs: Mapping[str, int],
    device: Device | None,
    whole_ms: float,
) -> EngineAccount:
    """Add up an engine's layers.

    Args:
        layers: as the inspector has them.
        milliseconds: mean by layer name; empty where the engine was not profiled.
        macs: of the clean graph's convolutions by node name; empty where there is no graph.
        device: that the engine runs on.
        whole_ms: median of whole inferences, not profiled.
    """
    owners = {node: layer.name for layer in reversed(layers) if layer.group == "conv" for node in layer.nodes}
    by_layer: dict[str, int] = {}
    for node, count in macs.items():
        owner = owners.get(node, UNKNOWN)
        by_layer[owner] = by_layer.get(owner, 0) + count
    rows = tuple(replace(layer, ms=milliseconds.get(layer.name), macs=by_layer.get(layer.name)) for layer in layers)
    by_precision = {UNKNOWN: by_layer[UNKNOWN]} if UNKNOWN in by_layer else {}
    for layer in rows:
        if layer.macs is not None:
            precision = layer.precision or UNKNOWN
            by_precision[precision] = by_precision.get(precision, 0) + layer.macs
    total = sum(layer.ms or 0 for layer in rows)
    moved = _total(layer.bytes for layer in rows)
    floor, why = _floor(by_precision, moved, device)
    return EngineAccount(engine_sha256, rows, _groups(rows, total), total, whole_ms, by_precision, moved, floor, why)


def judge(
    speedup: Estimate, min_speedup: float, int8: EngineAccount | None, fp16: EngineAccount | None
) -> SpeedVerdict:
    """Say whether INT8 is worthwhile, and why.

    Args:
        speedup: FP16's time over INT8's.
        int8, fp16: where their time goes; None where that could not be found out.
    """
    worthwhile = speedup.low > min_speedup
    says = "worthwhile" if worthwhile else "not worthwhile"
    bound = "" if min_speedup == 1 else f", {min_speedup:g} wanted"
    sentence = (
        f"INT8 is {speedup.median:.3f} ± {speedup.spread:.3f} times FP16's speed "
        f"({speedup.low:.3f} to {speedup.high:.3f} at {speedup.confidence:.0%}{bound}): {says}."
    )
    reasons = [*(_reasons(int8) if int8 else ()), *([_compared(int8, fp16)] if int8 and fp16 else ())]
    return SpeedVerdict(speedup, min_speedup, worthwhile, sentence, tuple(reasons))


def no_verdict(min_speedup: float, why: str) -> SpeedVerdict:
    """Where INT8 and FP16 cannot be timed side by side."""
    return SpeedVerdict(None, min_speedup, None, f"Whether INT8 is faster than FP16 cannot be said here: {why}")


def _total(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _groups(layers: Sequence[EngineLayer], total: float) -> tuple[GroupTime, ...]:
    found = []
    for group in GROUPS:
        held = [layer for layer in layers if layer.group == group]
        if held:
            ms = sum(layer.ms or 0 for layer in held)
            found.append(GroupTime(group, len(held), ms, ms / total if total else 0, _total(row.bytes for row in held)))
    return tuple(found)


def _floor(macs: Mapping[str, int], moved: int | None, device: Device | None) -> tuple[Floor | None, str]:
    rates = rates_of(device.name, device.compute_capability) if device is not None else None
    if rates is None:
        name = device.name if device is not None else "this GPU"
        return None, f"the rates of {name} are not in the table"
    if not macs:
        return None, "there is no graph to count multiply-accumulates in"
    missing = [precision for precision in macs if precision not in rates.operations]
    if missing:
        return None, f"multiply-accumulates in {missing[0]} precision have no rate"
    return _floor_at(rates, macs, moved), ""


def _floor_at(rates: Rates, macs: Mapping[str, int], moved: int | None) -> Floor:
    arithmetic = sum(2 * count / rates.operations[precision] for precision, count in macs.items())
    traffic = None if moved is None else moved / rates.bandwidth * 1e3
    return Floor(arithmetic * 1e3, traffic, rates.source)


def _reasons(int8: EngineAccount) -> list[str]:
    reasons = []
    total = sum(int8.macs.values())
    if total:
        hidden = int8.macs.get(UNKNOWN, 0) / total
        rest = f"; {hidden:.1%} are in layers that do not say" if hidden else ""
        reasons.append(f"{int8.macs.get('int8', 0) / total:.1%} of {total / 1e9:.3g} GMAC run in INT8{rest}.")
    convolutions = [layer for layer in int8.layers if layer.group == "conv"]
    sparse = sum(SPARSE in layer.tactic for layer in convolutions)
    if sparse:
        reasons.append(f"{sparse} of {len(convolutions)} convolution(s) run sparse kernels.")
    stayed = [layer for layer in convolutions if layer.precision not in ("int8", "")]
    if stayed:
        named = [f"{_name(layer)} ({layer.precision.upper()}{_time(layer)})" for layer in stayed]
        reasons.append(f"{len(stayed)} convolution(s) stayed in another precision: {_listed(named)}.")
    joins = [layer for layer in int8.layers if layer.requantizes]
    if joins:
        named = [f"{layer.name} ({_change(layer)}{_time(layer)})" for layer in _slowest(joins)]
        reasons.append(f"{len(joins)} concatenation input(s) are requantized{_sum(joins, int8)}: {_listed(named)}.")
    copies = [layer for layer in int8.layers if layer.group in ("reformat", "concat") and not layer.requantizes]
    if copies:
        named = [f"{layer.name} ({_change(layer)}{_time(layer)})" for layer in _slowest(copies)]
        reasons.append(f"{len(copies)} reformat(s) or copies{_sum(copies, int8)}: {_listed(named)}.")
    return reasons


def _compared(int8: EngineAccount, fp16: EngineAccount) -> str:
    """Milliseconds and shares by group, INT8 beside FP16."""
    mine, theirs = ({row.group: row for row in each.groups} for each in (int8, fp16))
    parts = []
    for group in GROUPS:
        a, b = mine.get(group), theirs.get(group)
        if a or b:
            parts.append(f"{group} {_cell(a)} against {_cell(b)}")
    return f"Time by group, layer by layer, INT8 against FP16: {'; '.join(parts)}."


def _cell(row: GroupTime | None) -> str:
    return "none" if row is None else f"{row.ms:.3f} ms ({row.share:.0%})"


def _name(layer: EngineLayer) -> str:
    return layer.nodes[0] if layer.nodes else layer.name


def _time(layer: EngineLayer) -> str:
    return "" if layer.ms is None else f", {layer.ms:.3f} ms"


def _change(layer: EngineLayer) -> str:
    ends = [tensors[0].shown if tensors else "" for tensors in (layer.inputs, layer.outputs)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _slowest(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return sorted(layers, key=lambda layer: -(layer.ms or 0))


def _sum(layers: Sequence[EngineLayer], whole: EngineAccount) -> str:
    ms = sum(layer.ms or 0 for layer in layers)
    return f", {ms:.3f} ms or {ms / whole.profiled_ms:.0%} of the layers' time" if whole.profiled_ms else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
