"""What Predictor costs beside its engine, and gains over a PyTorch loop.

    python benchmarks/predict.py CLEAN.onnx FOLDER -o RESULT.json [--folder-clean CLEAN8.onnx] [--precision int8]
        [--torch-python python3]

CLEAN.onnx is the cleaned float32 graph of a UNet that takes grey 512×512 images (``benchmarks/cleaning.py export FOLDER
--networks unet``, then ``unet-trt clean``); an engine from uint8 images to uint8 labels is built of it in FOLDER, which
also gets the images. CLEAN8.onnx is the same network with a fixed batch of 8, which the PyTorch loop has too
(``benchmarks/performance.py export`` writes both as ``raw.onnx`` and ``raw-8.onnx``, to be cleaned); the folder is then
predicted with an engine of it, built in FOLDER/folder. Measured are:

latency  from a decoded uint8 image to its uint8 mask, one by one, in turns with the engine's own GPU time
folder   PNG files of 480×360 to masks as PNG files, without overlays and with them, and the same jobs by torch_loop.py
         in another interpreter
busy     decoded images from memory as fast as they go: the share of time that the GPU works

``--backend onnxruntime`` runs all of it on the CPU, with the graph instead of an engine, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cleaning import LARGE
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard
from pipeline.backends import cuda
from pipeline.backends.runner import EngineRunner
from pipeline.calibration.table import read_cache
from pipeline.config import CalibrateConfig, EngineConfig, PreprocessingConfig, load_config
from pipeline.data.dataset import image_folder
from pipeline.data.inputs import THREADS
from pipeline.data.synthetic import draw_cells
from pipeline.graph.deployment import bake
from pipeline.graph.io import load_model, save_model, write_card
from pipeline.metrics.interleaving import interleave
from pipeline.opening import open_model
from pipeline.predictor import Predictor
from pipeline.stages.calibrate import calibrate
from pipeline.stages.engine import build_engine
from pipeline.stages.predict import Wanted, helpers_for, predict
from pipeline.torch_process import environment_of

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, HEIGHT, WIDTH = 512, 360, 480
SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="grey", mean=(0.4,), std=(0.15,), resize="stretch")
DISTINCT = 50
# What is written of each image: its mask, or an overlay too. The PyTorch loop also runs without writing.
JOBS = ("masks", "overlays")
CALIBRATION_IMAGES = 4
UTILIZATION = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200")


def prepare(clean: Path, folder: Path, precision: str, backend: str) -> Path:
    """The engine, from uint8 images to uint8 labels; on ONNX Runtime the graph itself. What is there is kept."""
    classes = load_config(REPOSITORY / "configs" / "cells.yaml").data.classes
    card = ModelCard("unet", SPEC, tuple(classes))
    baked, target = folder / "baked.onnx", folder / precision
    folder.mkdir(parents=True, exist_ok=True)
    if not baked.exists():
        model = bake(load_model(clean), card, input="image", output="labels")
        write_card(model, card)
        save_model(model, baked)
    if backend == "onnxruntime":
        return baked
    if not (target / "model.engine").exists():
        table = None
        if precision == "int8":
            cache = folder / "calibration.cache"
            samples = image_folder(pictures(folder / "calibration", CALIBRATION_IMAGES), "grey")
            # Few images: their tensors are computed sooner than an engine that computes them is built.
            config = CalibrateConfig(images=CALIBRATION_IMAGES, calibrator="cpu")
            calibrate(baked, samples, config, SPEC, cache, cache.with_suffix(".json"))
            table = read_cache(cache)
        settings = EngineConfig(backend="tensorrt")
        build_engine(baked, precision, settings, table, None, card, target, None)  # type: ignore[arg-type]
    return target / "model.engine"


def pictures(folder: Path, count: int, height: int = HEIGHT, width: int = WIDTH, passes: int = 1) -> Path:
    """PNGs of which every one differs from the others, and links to them for each pass after the first."""

    def save(number: int) -> None:
        first = making / f"{number:05d}_0.png"
        Image.fromarray(np.roll(drawn[number % DISTINCT], number // DISTINCT * 7, axis=1)).save(first)
        for again in range(1, passes):
            (making / f"{number:05d}_{again}.png").hardlink_to(first)

    if not folder.exists():
        making = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            drawn = list(pool.map(lambda seed: draw_cells(seed, width)[0][:height], range(min(DISTINCT, count))))
            list(pool.map(save, range(count)))
        making.rename(folder)
    return folder


def latency(model: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of one image through the engine, and through Predictor."""
    image = draw_cells(0, SIZE)[0]
    with open_model(model)[0] as runner, Predictor(model) as predictor:
        feeds = {runner.inputs[0].name: image[np.newaxis, ..., np.newaxis]}

        def engine() -> NDArray[np.float64]:
            if isinstance(runner, EngineRunner):
                return runner.device_milliseconds(feeds, 0.2, 0.05)
            return timed(lambda: runner(feeds), repeats)

        turns = interleave({"engine": engine, "predictor": lambda: timed(lambda: predictor(image), repeats)}, rounds)
        captured = isinstance(runner, EngineRunner) and runner.captured
    return {
        "engine": asdict(turns.summary("engine")),
        "predictor": asdict(turns.summary("predictor")),
        "ratio": asdict(turns.ratio("predictor", "engine")),
        "rounds": rounds,
        "settled": turns.settled,
        "cuda_graph": captured,
    }


def timed(once: Callable[[], object], repeats: int) -> NDArray[np.float64]:
    """Milliseconds of each call, by the host's clock."""
    times = np.empty(repeats)
    for index in range(repeats):
        start = time.perf_counter()
        once()
        times[index] = time.perf_counter() - start
    return 1000 * times


def on_folder(model: Path, images: Path, out: Path, streams: int, count: int, repeats: int) -> dict[str, Any]:
    """Seconds of every pass after one that is not counted: ``unet-trt predict`` with a loaded model, beside which its
    processes have started."""
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        processes = helpers_for([images], out, count)
        if processes is not None:
            stack.enter_context(processes)
        predictor = stack.enter_context(Predictor(model, streams=streams))
        for job in JOBS:
            for _ in range(repeats + 1):
                shutil.rmtree(out, ignore_errors=True)
                start = time.perf_counter()
                outcome = predict(
                    predictor, predictor.sha256, [images], Wanted(out, overlays=job == "overlays"), None, processes
                )
                seconds.setdefault(job, []).append(round(time.perf_counter() - start, 4))
    facts = {"images": outcome.done, "batch": predictor.batch, "streams": predictor.streams, "processes": count}
    return {**facts, "seconds": {job: passes[1:] for job, passes in seconds.items()}}


def torch_loop(
    python: str, images: Path, out: Path, arguments: dict[str, Any], repeats: int, jobs: Sequence[str]
) -> dict[str, Any]:
    """What torch_loop.py prints."""
    command = [python, str(Path(__file__).with_name("torch_loop.py")), str(images), str(out)]
    command += ["--arguments", json.dumps(arguments), "--repeats", str(repeats), "--jobs", *jobs]
    variables = {**environment_of(python), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def busy(model: Path, streams: int, seconds: float, engine_ms: float) -> dict[str, Any]:
    """Images a second from memory, and how busy the GPU is meanwhile."""
    image = draw_cells(0, SIZE)[0]
    with Predictor(model, streams=streams) as predictor, ThreadPoolExecutor(predictor.streams + 1) as pool:
        predictor.predict([image] * 8 * predictor.streams)
        watch = None
        if shutil.which(UTILIZATION[0]):
            watch = subprocess.Popen(UTILIZATION, stdout=subprocess.PIPE, text=True)
        start = time.perf_counter()

        def work(_: int) -> int:
            count = 0
            while time.perf_counter() - start < seconds:
                predictor.predict([image] * 16)
                count += 16
            return count

        count = sum(pool.map(work, range(predictor.streams + 1)))
        rate = count / (time.perf_counter() - start)
        samples = []
        if watch is not None:
            watch.terminate()
            # The first second's samples average over the time before.
            samples = [int(line) for line in watch.communicate()[0].split() if line.isdigit()][5:]
    return {
        "streams": streams,
        "images_per_second": round(rate, 1),
        # Above 1 where batches on several streams take less time together than one after another.
        "engine_time_share": round(rate * engine_ms / 1000, 4),
        "nvml_utilization_percent": {"mean": round(statistics.mean(samples), 1), "samples": samples}
        if samples
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--folder-clean", type=Path, help="of another fixed batch, for the folder; default: CLEAN")
    parser.add_argument("--precision", choices=("int8", "fp16", "fp32"), default="int8")
    parser.add_argument("--backend", choices=("tensorrt", "onnxruntime"), default="tensorrt")
    parser.add_argument("--torch-python", help="an interpreter with torch; without it its loop is not measured")
    parser.add_argument("--network", type=json.loads, default=LARGE, help="arguments of models.unet.UNet, as JSON")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="passes over the folder")
    parser.add_argument(
        "--jobs", nargs="+", default=[*JOBS, "nothing"], help="of torch_loop.py; its overlays take a minute"
    )
    parser.add_argument("--processes", type=int, default=THREADS, help="that decode and encode a folder's images")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5, help="for each number of streams")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--date", help="of the measurement, where the machine's clock is wrong")
    options = parser.parse_args()
    folder, is_engine = options.folder.resolve(), options.backend == "tensorrt"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result: dict[str, Any] = {"date": options.date or now, "python": platform.python_version()}
    result |= {"cores": os.cpu_count(), "backend": options.backend}
    result["precision"] = options.precision if is_engine else "fp32"
    if is_engine:
        import tensorrt

        result |= {"device": asdict(cuda.current_device()), "tensorrt": tensorrt.__version__}

    def note(name: str, value: Any) -> None:
        """After every step, so that a run that is cut short leaves what it had."""
        result[name] = value
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    model = prepare(options.clean, folder, options.precision, options.backend)
    other = options.folder_clean
    for_folder = prepare(other, folder / "folder", options.precision, options.backend) if other else model
    single = latency(model, options.rounds, 200 if is_engine else 3)
    note("latency", single)
    print(
        f"engine {single['engine']['p50_ms']:.3f} ms, predictor {single['predictor']['p50_ms']:.3f} ms:"
        f" {single['ratio']['median']:.3f} times ({single['ratio']['low']:.3f} to {single['ratio']['high']:.3f})",
        flush=True,
    )
    shares = [busy(model, streams, options.seconds, single["engine"]["p50_ms"]) for streams in options.streams]
    note("busy", shares)
    for row in shares:
        print(
            f"{row['streams']} streams: {row['images_per_second']:.0f} images/s from memory,"
            f" engine time {row['engine_time_share']:.2f},"
            f" NVML {row['nvml_utilization_percent'] and row['nvml_utilization_percent']['mean']}",
            flush=True,
        )
    images = pictures(folder / f"png-{options.images}", options.images)
    ours = on_folder(for_folder, images, folder / "masks", max(options.streams), options.processes, options.repeats)
    note("folder", ours)
    rates = {job: ours["images"] / statistics.median(seconds) for job, seconds in ours["seconds"].items()}
    print(
        f"folder, batch {ours['batch']}: " + ", ".join(f"{job} {rate:.0f} images/s" for job, rate in rates.items()),
        flush=True,
    )
    if options.torch_python:
        theirs = torch_loop(
            options.torch_python, images, folder / "torch", options.network, options.repeats, options.jobs
        )
        note("torch_loop", theirs)
        for job, seconds in theirs["seconds"].items():
            other = theirs["images"] / statistics.median(seconds)
            rate = rates.get(job, rates["masks"])
            print(f"torch, {job}: {other:.0f} images/s, ours {rate / other:.2f} times", flush=True)


if __name__ == "__main__":
    main()
