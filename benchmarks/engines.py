"""Several engines of one input in turns (A B B A …) on one GPU: each one's latency, and its ratio to the first's.

    python benchmarks/engines.py own=build/own/cells/engine/fp16 portable=build/portable/cells/engine/fp16
        [-o RESULT.json] [--batch 5] [--rounds 12] [--seconds 0.2]

An engine is a file with its manifest, or the folder of both. All are fed the same noise; free axes have the size that
the profile is for, or ``--batch``. Times are GPU times by CUDA events, without copies.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import write_atomically
from pipeline.backends.runner import EngineRunner
from pipeline.engines import load_engine, read_manifest
from pipeline.errors import PipelineError
from pipeline.metrics.interleaving import interleave


def compare(engines: Mapping[str, Path], rounds: int, seconds: float, batch: int | None) -> dict[str, Any]:
    """Latency of each engine and its ratio to the first, with intervals of 95 %.

    Args:
        engines: files by the names that they get in the result.
        seconds: of a turn; a quarter of it goes before as warm-up.
    """
    first, rows = next(iter(engines)), {}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(load_engine(path)) for name, path in engines.items()}
        turns = {
            name: functools.partial(runner.device_milliseconds, feeds_of(runner, batch), seconds, seconds / 4)
            for name, runner in runners.items()
        }
        timed = interleave(turns, rounds)
        for name, path in engines.items():
            manifest = read_manifest(path)
            rows[name] = {
                "milliseconds": asdict(timed.latency(name)),
                f"times {first}": asdict(timed.ratio(name, first)),
                "percentiles": asdict(timed.summary(name)),
                "cuda_graph": runners[name].captured,
                "engine_bytes": path.stat().st_size,
                "build_seconds": manifest.build_seconds,
                "precision": manifest.precision,
                "options": manifest.options,
            }
    device = asdict(manifest.device) if manifest.device else None
    return {"device": device, "batch": batch, "settled": timed.settled, "engines": rows}


def feeds_of(runner: EngineRunner, batch: int | None) -> dict[str, NDArray[Any]]:
    """Seeded noise for every input: standard normal, or bytes."""
    rng, feeds = np.random.default_rng(0), {}
    for spec in runner.inputs:
        known = runner.profiles[spec.name].opt if spec.name in runner.profiles else spec.shape
        shape = [int(size) for size in known]
        if batch is not None:
            shape[0] = batch
        is_image = spec.dtype == "uint8"
        noise = rng.integers(256, size=shape) if is_image else rng.standard_normal(shape)
        feeds[spec.name] = noise.astype(spec.dtype)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--batch", type=int, help="default: what the engine is for")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn")
    given = parser.parse_args()
    engines = {}
    for named in given.engines:
        name, separator, path = named.partition("=")
        if not separator:
            parser.error(f"expected NAME=ENGINE, got {named}")
        engines[name] = Path(path) / "model.engine" if Path(path).is_dir() else Path(path)
    result = compare(engines, given.rounds, given.seconds, given.batch)
    first = next(iter(engines))
    print(f"| | ms | interval of 95 % | times {first} | MB | build, s |\n|---|---|---|---|---|---|")
    for name, row in result["engines"].items():
        ms, ratio = row["milliseconds"], row[f"times {first}"]
        print(
            f"| {name} | {ms['median']:.4f} | {ms['low']:.4f} to {ms['high']:.4f} "
            f"| {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) "
            f"| {row['engine_bytes'] / 1e6:.1f} | {row['build_seconds']:.0f} |"
        )
    if given.output is not None:
        write_atomically(given.output, json.dumps(result, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
