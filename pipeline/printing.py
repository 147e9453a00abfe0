"""What commands say on a terminal: tables, summaries, JSON."""

from __future__ import annotations

import logging
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pipeline.backends.parsing import ParserVerdict
    from pipeline.calibration.report import CalibrationReport
    from pipeline.drift import DriftReport
    from pipeline.mixed.report import MixReport
    from pipeline.reports import BenchmarkReport
    from pipeline.stages.clean import CleaningReport
    from pipeline.stages.init import InitReport
    from pipeline.stages.prune import PruningReport

log = logging.getLogger("pipeline")


def print_timings(report: BenchmarkReport) -> None:
    """Latencies, throughput, time by group of layers, what was not measured, and the verdict on INT8."""
    from pipeline import presenting as shown

    _print_filled(shown.TIMING_HEADINGS, [shown.timing_row(timing) for timing in report.timings])
    _print_filled(shown.COST_HEADINGS, [shown.cost_row(timing) for timing in report.timings])
    if report.throughput:
        print_table(shown.THROUGHPUT_HEADINGS, [shown.throughput_row(row) for row in report.throughput])
    if report.own_figures:
        print_table(shown.OWN_HEADINGS, [shown.own_row(row) for row in report.own_figures])
    shares = [
        (precision, row.group, str(row.layers), f"{row.ms:.3f}", f"{row.share:.0%}")
        for precision, account in report.engines.items()
        for row in account.groups
    ]
    if shares:
        print_table(("engine", "group", "layers", "ms, layer by layer", "share"), shares)
    for name, why in report.not_run.items():
        print(f"{name}: not measured. {why}")
    for note in report.notes:
        print(note)
    print_speed_verdict(report)


def _print_filled(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of the columns that hold anything."""
    from pipeline.presenting import ABSENT

    filled = [i for i in range(len(headings)) if any(row[i] != ABSENT for row in rows)]
    print_table([headings[i] for i in filled], [[row[i] for i in filled] for row in rows])


def print_account(account: Mapping[str, Any]) -> None:
    """Where an engine's time goes, as ``inspect`` has it: by group, then by layer."""
    rows = [
        (g["group"], str(g["layers"]), f"{g['ms']:.4f}", f"{g['share']:.0%}", _millions(g["bytes"], 1))
        for g in account["groups"]
    ]
    print_table(("group", "layers", "ms", "share", "MB moved"), rows)
    print(f"whole inference: {account['whole_ms']:.4f} ms; its layers one by one: {account['profiled_ms']:.4f} ms")
    total = sum(account["macs"].values())
    for precision, macs in account["macs"].items():
        print(f"multiply-accumulates, {precision}: {macs / 1e9:.4g} G ({macs / total:.1%})")
    floor = account["floor"]
    if floor is None:
        print(f"arithmetic floor: unknown, {account['no_floor']}")
    else:
        print(f"arithmetic floor: {floor['arithmetic_ms']:.4f} ms ({floor['source']})")
    layers = [
        (
            layer["name"],
            layer["group"],
            layer["precision"],
            "–" if layer["ms"] is None else f"{layer['ms']:.4f}",
            "–" if layer["macs"] is None else f"{layer['macs'] / 1e9:.3f}",
            _millions(layer["bytes"], 2),
            " to ".join(_formats(layer[side]) for side in ("inputs", "outputs")),
            layer["tactic"],
        )
        for layer in account["layers"]
    ]
    print_table(("layer", "group", "precision", "ms", "GMAC", "MB moved", "format", "tactic"), layers)


def _millions(count: int | None, digits: int) -> str:
    return "–" if count is None else f"{count / 1e6:.{digits}f}"


def _formats(tensors: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(f"{tensor['precision']} {tensor['format']}".strip() for tensor in tensors))


def print_speed_verdict(report: BenchmarkReport) -> None:
    """What speaks against the figures; whether INT8 is worth it, and why, where that was asked."""
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.verdict is not None:
        print(report.verdict.sentence)
        for reason in report.verdict.reasons:
            print(f"  {reason}")


def print_cleaning(report: CleaningReport) -> None:
    """A summary for people, with the log messages: the path alone goes to stdout."""
    if log.isEnabledFor(logging.INFO):
        print_table(("cleaning", ""), _cleaning_rows(report), file=sys.stderr)


def _cleaning_rows(report: CleaningReport) -> list[tuple[str, str]]:
    before, after, equality = report.nodes_before, report.nodes_after, report.equality
    changed = [op for op in sorted({*before, *after}) if before.get(op) != after.get(op)]
    fired = Counter(rule for step in report.passes for rule, _ in step.fired)
    rows = [
        ("nodes", f"{sum(before.values())} -> {sum(after.values())}"),
        *((f"  {op}", f"{before.get(op, 0)} -> {after.get(op, 0)}") for op in changed),
        ("rules fired", ", ".join(f"{rule} × {count}" for rule, count in sorted(fired.items())) or "none"),
        *(("compared", f"{_shapes(t.shapes)} ({t.size}): {t.max_relative_error:.1e}") for t in equality.trials),
        *(("not compared", f"{_shapes(shapes)}: the raw graph does not run") for shapes in equality.refused),
        ("largest change", f"{equality.max_relative_error:.1e} of the largest output, {equality.tolerance:g} allowed"),
    ]
    if report.baked is not None:
        rows.append(("baked in", f"{report.baked.input} -> {report.baked.output}"))
    rows.append(("parser", _parser_says(report.parser)))
    rows += [("finding", f"{finding.node} ({finding.op}): {finding.reason}") for finding in report.findings]
    return rows


def print_init(report: InitReport) -> None:
    """What was seen and chosen, and what to look at, with the log messages: the path alone goes to stdout."""
    if not log.isEnabledFor(logging.INFO):
        return
    network, images, classes, size = report.network, report.images, report.classes, report.size
    known = network.factory or ("an ONNX file" if network.is_onnx else "of a layout that is not known here")
    arguments = ", ".join(f"{name}={value}" for name, value in network.arguments.items())
    rows = [
        ("network", f"{known}{f' ({arguments})' if arguments else ''}, {network.parameters / 1e6:.2f} M parameters"),
        ("training images", f"{report.train} in {images.train.images}"),
        ("validation images", f"{report.validation} in {(images.validation or images.train).images}"),
        ("label maps", f"values {', '.join(map(str, images.label_values))}" if images.labels_read else "none"),
        ("classes", f"{classes.count}; {classes.reason}"),
        ("sizes", size.reason),
        ("fed as", f"{size.width}×{size.height} (width × height), resize: {size.resize}"),
        ("mean; deviation", f"{_decimals(images.mean)}; {_decimals(images.std)} ({images.channels})"),
    ]
    print_table(("what", "was found"), rows, file=sys.stderr)
    for line in report.checks:
        print(f"check {line}", file=sys.stderr)
    log.info("next: %s%s", "" if report.ready else "fill in network.factory, then ", report.command)


def _decimals(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def print_calibration(report: CalibrationReport) -> None:
    """A summary for people, with the log messages: the path alone goes to stdout."""
    if log.isEnabledFor(logging.INFO):
        rows = [
            ("tensors", str(len(report.tensors))),
            ("images", f"{report.image_count}, {len(report.skipped)} skipped"),
            ("algorithm", report.algorithm),
            *((f"  {trial.algorithm}", f"{trial.agreement:.4%} same class") for trial in report.trials),
            ("calibrator", report.calibrator),
            ("seconds", f"{report.seconds:.1f}"),
        ]
        print_table(("calibration", ""), rows, file=sys.stderr)


def print_pruning(report: PruningReport) -> None:
    """A summary for people, with the log messages: the path alone goes to stdout."""
    if log.isEnabledFor(logging.INFO):
        result = report.result
        pruned, weights = result.weights
        rows = [
            ("convolutions", str(len(result.convolutions))),
            ("weights that are zero", f"{pruned // 2:,} of {weights:,}"),
            ("distance from the whole network", f"{result.loss_pruned:.3g}, after learning {result.loss_after:.3g}"),
            ("images", f"{len(report.images) - result.held_out} taught, {result.held_out} judged"),
            ("seconds", f"{result.seconds:.0f} on {result.device}"),
        ]
        if result.agreement_pruned is not None and result.agreement_after is not None:
            shares = f"{result.agreement_pruned:.4%}, after learning {result.agreement_after:.4%}"
            rows.insert(3, ("same class", shares))
        print_table(("pruning", ""), rows, file=sys.stderr)


def print_engines(built: Mapping[str, Mapping[str, Any]]) -> None:
    """What was built by precision, with the log messages: the paths alone go to stdout.

    Args:
        built: files and manifest of each precision.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    rows = []
    for precision, files in built.items():
        manifest, file = files["manifest"], files["engine"] or files["onnx"]
        if manifest is None:
            rows.append((precision, "typed graph alone, for ONNX Runtime", "explicit", _megabytes(file), "–"))
            continue
        made = f"{manifest['backend']} {manifest['backend_version']}"
        rows.append((precision, made, manifest["route"], _megabytes(file), f"{manifest['build_seconds']:.1f}"))
    print_table(("engine", "built by", "route", "MB", "built in, s"), rows, file=sys.stderr)


def _megabytes(file: str) -> str:
    return f"{Path(file).stat().st_size / 1e6:.1f}"


def print_mix(report: MixReport) -> None:
    """Every candidate and the choice, with the log messages: the path alone goes to stdout."""
    if not log.isEnabledFor(logging.INFO):
        return
    rows = [
        (
            one.move + (" (chosen)" if place == report.chosen else ""),
            str(len(one.half)),
            f"{one.ms:.4f}" + ("" if one.measured_ms or report.latency == "estimated" else " (estimated)"),
            "no labels" if one.figures.miou_drop is None else f"{one.figures.miou_drop:+.5f}",
            f"{one.figures.agreement:.4%}",
            "kept" if one.kept else "exceeded",
        )
        for place, one in enumerate(report.candidates)
    ]
    headings = ("candidate", "in FP16", f"ms, {report.latency}", "mIoU drop", "same class", "budget")
    print_table(headings, rows, file=sys.stderr)
    if report.why_all_half:
        print(f"all {len(report.convolutions)} convolutions stay FP16: {report.why_all_half}", file=sys.stderr)
        return
    gain = "" if report.gain_kept is None else f", {report.gain_kept:.0%} of the time that it saves"
    print(
        f"{len(report.choice.half)} of {len(report.convolutions)} convolutions stay FP16; {report.latency}: "
        f"{report.speedup_kept:.0%} of all INT8's speed-up over FP16{gain}",
        file=sys.stderr,
    )


def print_drift(reports: Mapping[str, DriftReport], json: bool) -> None:
    """Every tensor by precision, and where the error jumps."""
    if json:
        print_json(reports)
        return
    from pipeline.graph.shapes import listed

    for precision, report in reports.items():
        rows = [
            (
                entry.tensor,
                entry.op,
                entry.signal,
                "–" if entry.cosine is None else f"{entry.cosine:.6f}",
                f"{entry.max_abs_error:.3g} of {entry.largest:.3g}",
                "–" if entry.saturated is None else f"{entry.saturated:.3%}",
            )
            for entry in report.tensors
        ]
        print_table((f"{precision}: tensor", "operator", "SQNR, dB", "cosine", "largest error", "saturated"), rows)
        if report.missing:
            why = "which what ran has no more, or inside fused layers only"
            print(f"{precision}: {len(report.missing)} tensors not compared, {why}: {listed(report.missing, 3)}")
        for note in report.notes:
            print(f"{precision}: {note}")
        where = "the error jumps nowhere" if report.jump is None else f"the error jumps at {report.jump}"
        print(f"{precision}: {where} ({report.images} images, {report.ran})")


def _parser_says(verdict: ParserVerdict) -> str:
    judge = f"{verdict.parser} {verdict.version} " if verdict.parser else ""
    says = {True: "accepts the graph", False: "refuses the graph", None: "no verdict"}[verdict.accepted]
    refused = ", ".join(f"{node.node} ({node.op})" if node.node else node.reason for node in verdict.refused)
    reason = refused or verdict.note
    return f"{judge}{says}{f': {reason}' if reason else ''}"


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, file: TextIO | None = None) -> None:
    """A table as wide as the terminal, or 160 columns; on stdout unless told otherwise."""
    from rich.console import Console
    from rich.table import Table

    file = file or sys.stdout
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    # Piped output has no width of its own; a narrow guess would cut the cells. Names may hold brackets and colons.
    console = Console(file=file, width=None if file.isatty() else 160, markup=False, emoji=False)
    console.print(table)


def print_abilities(facts: Mapping[str, Any]) -> None:
    """What ``doctor`` found: a table of abilities, the commands that install what is missing, and versions."""
    abilities = facts["abilities"]
    rows = [(one["what"], "yes" if one["able"] else "no", one["by"] or one["why_not"]) for one in abilities]
    print_table(("on this machine", "", "with, or why not"), rows)
    for name in facts:
        if isinstance(facts[name], dict) and "GPU" in facts[name]:
            print(f"GPU: {facts[name]['GPU']}")
            break
    missing = dict.fromkeys(one["install"] for one in abilities if one["install"])
    for command in missing:
        wanted = [one["what"] for one in abilities if one["install"] == command]
        print(f"to {' and '.join(wanted)}:\n  {command}")
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    print(f"python {facts['python']} on {facts['machine']}; {versions}")


def suggest(*words: object) -> None:
    """The next command, with the log messages."""
    log.info("next: %s", shlex.join(map(str, words)))


def print_facts(facts: Any, json: bool) -> None:
    """A mapping, two levels deep, as lines or as JSON."""
    import json as writer

    if json:
        print(writer.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {item}")
        else:
            print(f"{name}: {value}")


def print_json(value: Any) -> None:
    """A report, or a mapping of reports, for programs."""
    from pydantic import TypeAdapter

    print(TypeAdapter(type(value)).dump_json(value, indent=2).decode())
