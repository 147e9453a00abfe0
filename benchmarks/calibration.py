"""How long calibration takes, and what it needs: on a CPU, and on a GPU beside TensorRT's own calibrator.

    .venv/bin/python benchmarks/calibration.py cpu -o RESULT.json
    python benchmarks/calibration.py gpu CLEAN.onnx FOLDER -o RESULT.json [--images 1000] [--own 20]

``cpu`` measures the command on the shipped ``cells`` network (512×512), each run in a process of its own.
``gpu`` calibrates a graph of grey 512×512 images: decoded ones, PNG files (written into FOLDER where they are missing),
and with TensorRT's entropy calibrator, whose ranges are then compared tensor by tensor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from commands import measure
from PIL import Image

from pipeline.backends import cuda
from pipeline.config import CalibrateConfig, PreprocessingConfig
from pipeline.data.dataset import Dataset, Sample, image_folder
from pipeline.data.synthetic import draw_cells
from pipeline.stages.calibrate import calibrate

SIZE = 512
GREY = PreprocessingConfig(height=SIZE, width=SIZE, channels="grey", mean=(0.5,), std=(0.25,))


def on_cpu() -> dict[str, Any]:
    """Seconds and peak memory of ``unet-trt calibrate`` by number of images."""
    build = Path(tempfile.mkdtemp())
    common = ("-c", "configs/cells.yaml", "--build-dir", str(build), "--set", "calibrate.calibrator=cpu")
    rows = []
    try:
        measure("clean", *common)
        for images, algorithm in ((8, "entropy"), (32, "entropy"), (64, "entropy"), (32, "auto")):
            sets = ("--set", f"calibrate.images={images}", "--set", f"calibrate.algorithm={algorithm}")
            seconds, peak = measure("calibrate", *common, *sets)
            rows.append(
                {"images": images, "algorithm": algorithm, "seconds": round(seconds, 2), "peak_gb": round(peak, 3)}
            )
            print(f"{images:3} images, {algorithm:8} {seconds:6.1f} s   peak {peak:.2f} GB", flush=True)
    finally:
        shutil.rmtree(build)
    return {"machine": {"cores": os.cpu_count(), "machine": platform.machine()}, "rows": rows}


def pictures(folder: Path, count: int) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:04d}.png"
        if not path.exists():
            Image.fromarray(draw_cells(number, SIZE)[0]).save(path)
    return image_folder(folder, "grey")


def on_gpu(clean: Path, folder: Path, count: int, own: int) -> dict[str, Any]:
    """Seconds by calibrator and source of the images, and our ranges over TensorRT's."""
    import tensorrt

    files = pictures(folder / "png", count).first(count)
    decoded: Sequence[Sample] = list(files)
    result: dict[str, Any] = {"device": asdict(cuda.current_device()), "tensorrt": tensorrt.__version__, "rows": []}

    def run(label: str, samples: Sequence[Sample], calibrator: str) -> Path:
        cache = folder / f"{label.replace(' ', '-')}.cache"
        config = CalibrateConfig(calibrator=calibrator, images=len(samples))  # type: ignore[arg-type]
        free = cuda.free_memory()[0]
        started = time.perf_counter()
        report = calibrate(clean, samples, config, GREY, cache, cache.with_name(f"{cache.name}.json"))
        seconds = time.perf_counter() - started
        row = {"label": label, "calibrator": calibrator, "images": report.image_count, "seconds": round(seconds, 2)}
        row["device_bytes_left_behind"] = free - cuda.free_memory()[0]
        result["rows"].append(row)
        print(f"{label:28} {report.image_count:5} images {seconds:8.2f} s", flush=True)
        return cache

    run("gpu, first, few", decoded[:8], "gpu")
    run("gpu, decoded", decoded, "gpu")
    run("gpu, PNG files", files, "gpu")
    ours, theirs = run("gpu, same images", decoded[:own], "gpu"), run("tensorrt", decoded[:own], "tensorrt")
    run("cpu, same images", decoded[:own], "cpu")
    from pipeline.calibration.table import read_cache

    a, b = read_cache(ours).amax, read_cache(theirs).amax
    ratios = {tensor: round(a[tensor] / b[tensor], 4) for tensor in a if tensor in b}
    result["amax_ratio_ours_over_tensorrts"] = ratios
    values = np.array(list(ratios.values()))
    print(f"ours / TensorRT's: {values.min():.3f} to {values.max():.3f}, median {np.median(values):.3f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    commands = parser.add_subparsers(dest="where", required=True)
    commands.add_parser("cpu")
    gpu = commands.add_parser("gpu")
    gpu.add_argument("clean", type=Path)
    gpu.add_argument("folder", type=Path)
    gpu.add_argument("--images", type=int, default=1000)
    gpu.add_argument("--own", type=int, default=20, help="images for TensorRT's own calibrator")
    options = parser.parse_args()
    cpu = options.where == "cpu"
    measured = on_cpu() if cpu else on_gpu(options.clean, options.folder, options.images, options.own)
    result = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **measured}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
