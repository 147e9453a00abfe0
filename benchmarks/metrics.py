"""Seconds and memory of validation's own metrics: prints a line, writes JSON with -o.

    .venv/bin/python benchmarks/metrics.py [-o benchmarks/results/metrics-2-cores.json] [--images 1000]

Everything that the report shows of an image (IoU, Dice, boundary F-score, agreement, margins, cosine, quantiles, of
512×512 logits of 20 classes, with labels that hold void) and the bootstrap, but neither inference nor Polygraphy.
Images take turns among a few that are made beforehand. Peak memory is compared with that of a tenth of the images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard
from pipeline.config import ClassConfig, PreprocessingConfig, ValidateConfig
from pipeline.data.dataset import Sample
from pipeline.judging import Judge
from pipeline.reports import Candidate

CLASSES, SIZE, VOID, DIFFERENT, AT_MOST = 20, 512, 255, 4, 20


def image(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """FP32's and INT8's logits, float32 (1, classes, size, size), and labels: smooth regions, noise at their edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((CLASSES, SIZE // 32 + 1, SIZE // 32 + 1)).astype(np.float32)
    at = np.linspace(0, SIZE // 32, SIZE, dtype=np.float32)
    low = np.minimum(at.astype(int), SIZE // 32 - 1)
    part = (at - low).astype(np.float32)
    rows = coarse[:, low] * (1 - part)[:, None] + coarse[:, low + 1] * part[:, None]
    smooth = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    wanted = smooth * 4 + rng.standard_normal(smooth.shape, np.float32) * np.float32(0.05)
    got = wanted + rng.standard_normal(smooth.shape, np.float32) * np.float32(0.05)
    label = wanted.argmax(0).astype(np.uint8)
    label[: SIZE // 32] = VOID
    # As runners give them; numpy's indexing has laid the axes out in another order.
    return np.ascontiguousarray(wanted[np.newaxis]), np.ascontiguousarray(got[np.newaxis]), label


def measure(images: int) -> dict[str, float]:
    """Seconds (wall, CPU) and peak resident memory of judging so many images."""
    classes = tuple(ClassConfig(name=f"class {i}", colour=(i, i, i), category=f"group {i % 7}") for i in range(CLASSES))
    card = ModelCard("benchmark", PreprocessingConfig(height=SIZE, width=SIZE, channels="grey"), classes, VOID)
    made = [image(seed) for seed in range(DIFFERENT)]
    pixels = np.zeros((SIZE, SIZE, 1), np.uint8)
    judge = Judge(card, ValidateConfig(), "int8", "logits")
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(images):
        wanted, got, label = made[index % DIFFERENT]
        sample = Sample(f"{index:04d}", pixels, label)
        judge.count(judge.measure(sample, {"logits": got}, {"logits": wanted}, True)[0])
    report = judge.report(Candidate("int8", True, "made up", "", None, None), (), (), wall)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    assert report.agreement is not None
    return {
        "images": images,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mb": round(peak),
        "agreement": round(report.agreement, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()
    # The smaller one first: the process's peak only grows.
    rows = [measure(max(2, arguments.images // 10)), measure(arguments.images)]
    for row in rows:
        print(row, flush=True)
    if arguments.output:
        machine = {
            "cores": os.cpu_count(),
            "load": [round(x, 1) for x in os.getloadavg()],
            "machine": platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "what": f"{SIZE}×{SIZE}, {CLASSES} classes, labels with void; at most {AT_MOST} s for 1000 images",
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
