"""Which convolutions stay FP16: sensitivity of each, then the search, and the choice as a configuration."""

from __future__ import annotations

import functools
import glob
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import yaml
from onnx import ModelProto

from pipeline.artifacts import Device, ModelCard, to_json, write_atomically
from pipeline.backends.rates import rates_of
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Config, MixedConfig, Route
from pipeline.data.dataset import Sample
from pipeline.errors import ConfigError, EngineError, ModelError
from pipeline.graph.io import load_model
from pipeline.graph.levels import blocks
from pipeline.graph.placement import quantizable
from pipeline.graph.quantize import quantized_as
from pipeline.metrics.latency import Estimate
from pipeline.mixed.cost import DEFAULT_RATES, CostModel
from pipeline.mixed.held_out import HeldOut
from pipeline.mixed.measured import Stored
from pipeline.mixed.report import Candidate, Figures, MixReport, Sensitivity, comparable
from pipeline.mixed.search import Nodes, Search, fastest_kept, runs_and_ends, with_front
from pipeline.reports import EngineAccount

log = logging.getLogger(__name__)

REPORT, SNIPPET = "report.json", "config.yaml"
# Fewer say little about a drop of a tenth of a point.
ENOUGH_IMAGES = 8
# Flipped pixels say how sensitive a convolution is; the error of the logits decides between equal ones.
TIE = 1e-6

# Of mixed.candidates, kept for a second search where the first one's finalists were misjudged.
LATER = 1 / 4


class Timer(Protocol):
    """Engines on a GPU, of convolutions that stay FP16; see ``pipeline.contest.Choices``."""

    def time(self, choices: Mapping[str, tuple[str, ...]]) -> Mapping[str, Estimate]:
        """Milliseconds by name; all in one session, in turns."""
        ...

    def profile(self, half: tuple[str, ...], whole_ms: float) -> EngineAccount:
        """Layer by layer, of a choice that takes ``whole_ms``."""
        ...


def mix(
    clean: Path,
    table: CalibrationTable,
    samples: Sequence[Sample],
    config: Config,
    card: ModelCard,
    device: Device | None,
    folder: Path,
    *,
    others: Mapping[str, str] | None = None,
    timer: Timer | None = None,
) -> MixReport:
    """Choose the convolutions that stay FP16; write ``report.json`` and ``config.yaml``, the config with the choice.

    All candidates run on ONNX Runtime, FP32 where they are not INT8, so that only INT8's error counts.

    Args:
        clean: the clean float graph.
        table: its ranges, chosen by none of the samples. Engines may take those of more images.
        samples: calibration images that chose none of them.
        config: ``mixed`` says what is kept, ``engine`` what is never quantized and where Q/DQ pairs go.
        device: whose rates the cost model takes; None, or one whose rates are unknown: an H200's.
        folder: of the results.
        others: validation images' names by content, which must not be among the samples.
        timer: times engines on a GPU, for the cost model and the choice; None: the cost model decides at the rates.

    Raises:
        EngineError, UnsupportedError: an engine that cannot be built or run.
        CalibrationError: no sample, or one that validates too; a table of another graph.
        ConfigError: a budget that cannot be judged without labels.
        ModelError: a graph without convolutions to quantize, or that cannot be run.
    """
    started = time.perf_counter()
    model, settings = load_model(clean), config.mixed
    nodes = quantizable(model, config.engine.exclude)
    if not nodes:
        raise ModelError(
            "no convolution is left to quantize",
            expected="Conv or ConvTranspose with constant weights that engine.exclude does not name",
            fix="use precision fp16, or exclude less",
        )
    names = [node.name for node in nodes]
    held_out = HeldOut(model, samples, card, others)
    _check_budget(settings, held_out.labelled)
    known = rates_of(device.name, device.compute_capability) if device else None
    shapes = {name: array.shape for name, array in held_out.feed(0).items()}
    cost = CostModel(model, shapes, known or DEFAULT_RATES, names)
    not_learned = _learn(cost, names, timer) if timer else ""
    judge = _Judge(model, table, config, names, held_out)

    def milliseconds(half: Nodes) -> float:
        return cost.milliseconds(frozenset(names) - half)

    def sensitivity_of(name: str, together: Sequence[str]) -> Sensitivity:
        alone = judge(frozenset(names) - set(together), f"INT8: {name}", settings.sensitivity_images)
        lost = milliseconds(frozenset(together)) - milliseconds(frozenset())
        return Sensitivity(name, tuple(together), sum(cost.macs[node] for node in together), alone, lost)

    convolutions = [sensitivity_of(name, [name]) for name in names]
    grouped = _blocks(model, shapes, names)
    sensitivity = {each.name: _sensitivity(each.figures) for each in convolutions}
    search = Search(
        names,
        sensitivity,
        milliseconds,
        lambda half: judge(half, f"{len(half)} of {len(names)} in FP16"),
        functools.partial(_keeps, settings),
        runs_and_ends(grouped),
    )
    candidates = with_front(_timed(search, cost, settings, timer) if timer else search.run(settings.candidates))
    chosen = fastest_kept(candidates)
    candidates = tuple(replace(one, accepted=one.accepted or at == chosen) for at, one in enumerate(candidates))
    half, int8, choice = candidates[0], candidates[1], candidates[chosen]
    patterns = (*config.engine.exclude, *excluded(choice.half))
    report = MixReport(
        images=tuple(held_out.names),
        labelled=held_out.labelled,
        range_images=table.report.image_count if table.report else None,
        max_miou_drop=settings.max_miou_drop if held_out.labelled else None,
        min_agreement=settings.min_agreement,
        latency="estimated" if timer is None else "measured",
        rates=cost.source,
        fp32_miou=held_out.fp32_miou,
        convolutions=tuple(_ranked(convolutions)),
        blocks=tuple(_ranked([sensitivity_of(name, together) for name, together in grouped])),
        candidates=candidates,
        chosen=chosen,
        patterns=patterns,
        speedup_kept=int8.ms / choice.ms,
        gain_kept=(half.ms - choice.ms) / (half.ms - int8.ms) if half.ms > int8.ms else None,
        seconds=round(time.perf_counter() - started, 3),
        notes=(
            *_notes(held_out, device, config.engine.route, known is None, timer is None),
            *([f"{not_learned}: estimates are at the GPU's rates"] if not_learned else []),
            *_doubts(choice, settings, ended=len(candidates) >= search.limit),
        ),
        estimates="rates" if cost.measured is None else "layers",
        border_factor=cost.border_factor,
    )
    for note in report.notes:
        log.warning("%s", note)
    if report.why_all_half:
        log.warning("every convolution stays FP16: %s", report.why_all_half)
    write_atomically(folder / REPORT, to_json(report))
    write_atomically(folder / SNIPPET, snippet(config, patterns).encode())
    return report


def excluded(names: Sequence[str]) -> tuple[str, ...]:
    """Patterns of ``engine.exclude`` that match these node names alone."""
    return tuple(glob.escape(name) for name in names)


def snippet(config: Config, patterns: Sequence[str]) -> str:
    """The configuration with the choice as its ``engine.exclude``: ``-p int8`` then builds what ``-p mixed`` chose."""
    settings = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    settings["engine"] = {**settings.get("engine", {}), "exclude": list(patterns)}
    one_line = yaml.safe_dump(list(patterns), default_flow_style=True, width=1 << 20, allow_unicode=True).strip()
    head = [
        "# Chosen by `unet-trt engine -p mixed`. Give this file with -c, or to another configuration:",
        f"# --set 'engine.exclude={one_line}'",
        "",
    ]
    return "\n".join(head) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class _Judge:
    """Figures by the convolutions that are not quantized, each computed once."""

    def __init__(
        self, model: ModelProto, table: CalibrationTable, config: Config, names: Sequence[str], held_out: HeldOut
    ) -> None:
        self.model, self.table, self.config = model, table, config
        self.names, self.held_out = names, held_out
        self.known: dict[tuple[Nodes, int | None], Figures] = {}

    def __call__(self, half: Nodes, what: str, count: int | None = None) -> Figures:
        if (half, count) not in self.known:
            patterns = (*self.config.engine.exclude, *excluded([name for name in self.names if name in half]))
            engine = self.config.engine.model_copy(update={"exclude": patterns})
            typed = quantized_as(self.model, self.table, engine)
            self.known[half, count] = figures = self.held_out.figures(typed, what, count)
            log.info("%s: %.4f %% same class", what, 100 * figures.agreement)
        return self.known[half, count]


def _check_budget(settings: MixedConfig, labelled: int) -> None:
    if labelled:
        return
    named = "max_miou_drop" in settings.model_fields_set and settings.max_miou_drop is not None
    if named or settings.min_agreement is None:
        raise ConfigError(
            "mixed.max_miou_drop cannot be judged without labels",
            expected="label maps of the calibration split, or a budget that needs none",
            got="no labelled pixel on the held-out images",
            fix="name the label maps, or set mixed.min_agreement" + (" and mixed.max_miou_drop: null" if named else ""),
        )


def _keeps(settings: MixedConfig, figures: Figures) -> bool:
    drop, most, least = figures.miou_drop, settings.max_miou_drop, settings.min_agreement
    if settings.judge_by == "interval" and figures.miou_drop_interval is not None:
        drop = figures.miou_drop_interval.high
    return (drop is None or most is None or drop <= most) and (least is None or figures.agreement >= least)


def _sensitivity(figures: Figures) -> float:
    return 1 - figures.agreement + TIE * (figures.logit_error or 0)


def _ranked(sensitivities: Sequence[Sensitivity]) -> list[Sensitivity]:
    return sorted(sensitivities, key=lambda each: -_sensitivity(each.figures))


def _blocks(
    model: ModelProto, shapes: Mapping[str, Sequence[int]], names: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """The graph's blocks by name, each with those of these convolutions that it holds; none without."""
    chosen = set(names)
    held = [(block.name, tuple(n for n in block.convolutions if n in chosen)) for block in blocks(model, shapes)]
    return [(name, nodes) for name, nodes in held if nodes]


def _learn(cost: CostModel, names: Sequence[str], timer: Timer) -> str:
    """Teach the cost model what all FP16 and all INT8 take; why that failed, or ""."""
    ends: dict[Stored, tuple[str, ...]] = {"fp16": tuple(names), "int8": ()}
    times = timer.time({str(precision): half for precision, half in ends.items()})
    try:
        cost.learn({precision: timer.profile(half, times[precision].median) for precision, half in ends.items()})
    except EngineError as error:
        return error.problem
    return ""


def _timed(search: Search, cost: CostModel, settings: MixedConfig, timer: Timer) -> tuple[Candidate, ...]:
    """Candidates, of which the first two, all FP16 and all INT8, and finalists are measured.

    Where estimates promised that finalists are faster than all FP16, and none of those that keep the budget is, borders
    cost more than was thought: their cost is corrected by what was measured, and the search goes on once.
    """
    candidates = search.run(settings.candidates - int(LATER * settings.candidates))
    chosen = list(dict.fromkeys([0, 1, *_finalists(candidates, settings.finalists)]))
    candidates = _with_times(candidates, chosen, timer)
    if cost.measured is None or not _misjudged(candidates):
        return candidates
    everything = frozenset(search.names)
    mixtures = [one for one in candidates[2:] if one.measured_ms is not None]
    cost.correct({everything - set(one.half): one.ms for one in mixtures})
    log.info("borders cost %.2f times a copy, as the finalists were measured: searching once more", cost.border_factor)
    candidates = search.run(settings.candidates)
    half_ms = candidates[0].estimated_ms
    ranked = _finalists(candidates, len(candidates))
    more = [at for at in ranked if at not in chosen and candidates[at].estimated_ms < half_ms]
    return _with_times(candidates, [*chosen, *more[: settings.finalists]], timer)


def _finalists(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Places of the fastest by estimate that keep the budget."""
    kept = [place for place, one in enumerate(candidates) if one.kept]
    return sorted(kept, key=lambda at: candidates[at].estimated_ms)[:count]


def _with_times(candidates: Sequence[Candidate], places: Sequence[int], timer: Timer) -> tuple[Candidate, ...]:
    """The candidates, those at these places measured in one session."""
    times = timer.time({f"candidate {place}": candidates[place].half for place in places})
    return tuple(replace(one, measured_ms=times.get(f"candidate {place}")) for place, one in enumerate(candidates))


def _misjudged(candidates: Sequence[Candidate]) -> bool:
    """Whether some that keep the budget were estimated to be faster than all FP16, and none that was timed is."""
    half = candidates[0]
    kept = [one for one in comparable(candidates[1:]) if one.kept]
    return any(one.estimated_ms < half.estimated_ms for one in kept) and all(one.ms >= half.ms for one in kept)


def _notes(held_out: HeldOut, device: Device | None, route: Route, assumed: bool, estimated: bool) -> Iterator[str]:
    if len(held_out.names) < ENOUGH_IMAGES:
        yield f"only {len(held_out.names)} held-out images; fewer than {ENOUGH_IMAGES} say little about small drops"
    if not held_out.labelled:
        yield "the held-out images have no labels: agreement with FP32's masks is the budget"
    if route == "implicit":
        yield (
            "accuracy is that of INT8 at the convolutions alone; on the implicit route TensorRT quantizes what lies "
            "between them too, and only validation sees that"
        )
    if estimated:
        whose = "this GPU"
        if assumed:
            whose = f"an H200, as {'there is no GPU here' if device is None else f'those of {device.name} are unknown'}"
        yield f"latencies are estimated from multiply-accumulates and bytes at the rates of {whose}; none was measured"


def _doubts(choice: Candidate, settings: MixedConfig, *, ended: bool) -> Iterator[str]:
    bounds, most = choice.figures.miou_drop_interval, settings.max_miou_drop
    if bounds is not None and most is not None and bounds.high > most:
        yield (
            f"the choice's drop of mean IoU, {choice.figures.miou_drop:+.5f}, may be up to {bounds.high:+.5f} on other "
            "images, beyond the budget; more mixed.images say more, mixed.judge_by: interval is careful"
        )
    if ended:
        yield "the search ended at mixed.candidates; more might find a faster choice"
