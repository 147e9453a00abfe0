"""Which convolutions stay FP16: sensitivity of each, then the search, and the choice as a configuration."""

from __future__ import annotations

import functools
import glob
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from onnx import ModelProto

from pipeline.artifacts import Device, ModelCard, to_json, write_atomically
from pipeline.backends.rates import rates_of
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Config, MixedConfig, Route
from pipeline.data.dataset import Sample
from pipeline.errors import ConfigError, ModelError
from pipeline.graph.cost import tensor_shapes
from pipeline.graph.io import load_model
from pipeline.graph.placement import quantizable
from pipeline.graph.quantize import quantize
from pipeline.metrics.latency import Estimate
from pipeline.mixed.blocks import blocks
from pipeline.mixed.cost import DEFAULT_RATES, CostModel
from pipeline.mixed.held_out import HeldOut
from pipeline.mixed.report import Candidate, Figures, MixReport, Sensitivity
from pipeline.mixed.search import Nodes, Search, fastest_kept, with_front

log = logging.getLogger(__name__)

REPORT, SNIPPET = "report.json", "config.yaml"
# Fewer say little about a drop of a tenth of a point.
ENOUGH_IMAGES = 8
# Flipped pixels say how sensitive a convolution is; the error of the logits decides between equal ones.
TIE = 1e-6

# From convolutions that stay FP16, by a name each, to milliseconds on a GPU; all are timed in one session, in turns.
Timer = Callable[[Mapping[str, tuple[str, ...]]], Mapping[str, Estimate]]


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
        timer: times the finalists on a GPU; None: the cost model decides.

    Raises:
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
    cost = CostModel(model, shapes, known or DEFAULT_RATES)
    judge = _Judge(model, table, config, names, held_out)

    def milliseconds(half: Nodes) -> float:
        return cost.milliseconds(frozenset(names) - half)

    def sensitivity_of(name: str, together: Sequence[str]) -> Sensitivity:
        alone = judge(frozenset(names) - set(together), f"INT8: {name}", settings.sensitivity_images)
        lost = milliseconds(frozenset(together)) - milliseconds(frozenset())
        return Sensitivity(name, tuple(together), sum(cost.macs[node] for node in together), alone, lost)

    convolutions = [sensitivity_of(name, [name]) for name in names]
    grouped = blocks({node.name: node.output[0] for node in nodes}, tensor_shapes(model, shapes))
    sensitivity = {each.name: _sensitivity(each.figures) for each in convolutions}
    search = Search(
        names,
        sensitivity,
        milliseconds,
        lambda half: judge(half, f"{len(half)} of {len(names)} in FP16"),
        functools.partial(_keeps, settings),
        settings.candidates,
    )
    candidates = search.run()
    if timer is not None:
        candidates = _timed(candidates, settings.finalists, timer)
    candidates = with_front(candidates)
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
        rates=(known or DEFAULT_RATES).source,
        fp32_miou=held_out.fp32_miou,
        convolutions=tuple(_ranked(convolutions)),
        blocks=tuple(_ranked([sensitivity_of(name, together) for name, together in grouped.items()])),
        candidates=candidates,
        chosen=chosen,
        patterns=patterns,
        speedup_kept=int8.ms / choice.ms,
        gain_kept=(half.ms - choice.ms) / (half.ms - int8.ms) if half.ms > int8.ms else None,
        seconds=round(time.perf_counter() - started, 3),
        notes=(
            *_notes(held_out, device, config.engine.route, known is None, timer is None),
            *_doubts(candidates, choice, settings),
        ),
    )
    for note in report.notes:
        log.warning("%s", note)
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
            typed = quantize(self.model, self.table, half=False, exclude=patterns, qdq=self.config.engine.qdq)
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


def _timed(candidates: Sequence[Candidate], finalists: int, timer: Timer) -> tuple[Candidate, ...]:
    """The first two, which are all FP16 and all INT8, and the fastest by estimate that keep the budget, measured."""
    kept = sorted(
        (place for place, one in enumerate(candidates) if one.kept), key=lambda at: candidates[at].estimated_ms
    )
    chosen = dict.fromkeys([0, 1, *kept[:finalists]])
    times = timer({f"candidate {place}": candidates[place].half for place in chosen})
    return tuple(replace(one, measured_ms=times.get(f"candidate {place}")) for place, one in enumerate(candidates))


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


def _doubts(candidates: Sequence[Candidate], choice: Candidate, settings: MixedConfig) -> Iterator[str]:
    bounds, most = choice.figures.miou_drop_interval, settings.max_miou_drop
    if bounds is not None and most is not None and bounds.high > most:
        yield (
            f"the choice's drop of mean IoU, {choice.figures.miou_drop:+.5f}, may be up to {bounds.high:+.5f} on other "
            "images, beyond the budget; more mixed.images say more, mixed.judge_by: interval is careful"
        )
    if len(candidates) >= settings.candidates:
        yield "the search ended at mixed.candidates; more might find a faster choice"
