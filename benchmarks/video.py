"""What the reference projects say of a driving network: frames of a video a second, and seconds of a validation.

    python benchmarks/video.py configs/camvid.yaml ENGINES -o RESULT.json [--precisions fp32 fp16 int8]

ENGINES holds a folder for each precision with ``model.engine`` and its manifest, as ``build/<config>/engine`` does.
Measured are, for each engine, after one pass that is not counted:

frames      of a video in memory, in pictures a second: decoded frames to masks, by a ``Predictor``
video       a video file to masks as PNG files, without overlays and with them: ``unet-trt predict``; the video is made
            of the validation images, again and again, where imageio-ffmpeg is installed
validation  of all validation images: read images and labels, predict, count the confusion matrix; seconds and mIoU

``--model MODEL.onnx`` stands for the engines on a machine without a GPU, to try the script.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends import cuda
from pipeline.config import Config, load_config
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preprocessing import Pixels
from pipeline.metrics.segmentation import confusion_matrix, mean_iou
from pipeline.predictor import Predictor
from pipeline.stages.predict import Wanted, predict

FRAMES_A_SECOND, QUALITY = 30, 8
# Frames that are given to the predictor at a time.
CHUNK = 64


def make_video(path: Path, images: Sequence[Pixels], frames: int) -> Path:
    """An H.264 file of the images, one after another and again."""
    from imageio_ffmpeg import write_frames

    height, width = images[0].shape[:2]
    writer = write_frames(str(path), (width, height), fps=FRAMES_A_SECOND, quality=QUALITY, macro_block_size=1)
    writer.send(None)
    for image in itertools.islice(itertools.cycle(images), frames):
        writer.send(np.ascontiguousarray(image))
    writer.close()
    return path


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Of every call after one that is not counted."""
    laps = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        laps.append(round(time.perf_counter() - start, 4))
    return laps[1:]


def measure(
    model: Path, images: list[Pixels], video: Path | None, dataset: Dataset, out: Path, frames: int, repeats: int
) -> dict[str, Any]:
    """The figures of one engine."""
    found: dict[str, Any] = {}
    with Predictor(model) as predictor:
        found |= {"batch": predictor.batch, "streams": predictor.streams}
        chunk = list(itertools.islice(itertools.cycle(images), CHUNK))

        def from_memory() -> None:
            for _ in range(max(1, frames // CHUNK)):
                predictor.predict(chunk)

        def from_file(overlays: bool) -> None:
            shutil.rmtree(out, ignore_errors=True)
            predict(predictor, predictor.sha256, [video or ""], Wanted(out, overlays=overlays))

        def validate() -> None:
            counts = np.zeros((len(predictor.card.classes),) * 2, np.int64)
            for sample in dataset:
                assert sample.label is not None
                counts += confusion_matrix(sample.label, predictor(sample.image), len(counts))
            found["mean_iou"] = round(mean_iou(counts), 4)

        laps = seconds(from_memory, repeats)
        found["frames_per_second"] = round(max(1, frames // CHUNK) * CHUNK / statistics.median(laps), 1)
        for overlays in (False, True) if video else ():
            rate = frames / statistics.median(seconds(lambda o=overlays: from_file(o), repeats))  # type: ignore[misc]
            found[f"video_frames_per_second_{'overlays' if overlays else 'masks'}"] = round(rate, 1)
        found["validation_seconds"] = seconds(validate, repeats)
    return found


def models_of(options: argparse.Namespace) -> dict[str, Path]:
    if options.model:
        return {"fp32": options.model}
    return {precision: options.engines / precision / "model.engine" for precision in options.precisions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("engines", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "int8"])
    parser.add_argument("--model", type=Path, help="an ONNX file in the engines' place")
    parser.add_argument("--set", action="append", default=[], help="a setting of the configuration, such as data.root")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--date", help="of the measurement, where the machine's clock is wrong")
    options = parser.parse_args()
    config: Config = load_config(options.config, options.set)
    dataset = open_dataset(config.data, config.preprocessing, "validation")
    folder = options.output.resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    images = [sample.image for sample in dataset]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result: dict[str, Any] = {"date": options.date or now, "python": platform.python_version()}
    result |= {"cores": os.cpu_count(), "network": config.name, "images": len(dataset), "frames": options.frames}
    if not options.model:
        import tensorrt

        result |= {"device": asdict(cuda.current_device()), "tensorrt": tensorrt.__version__}
    video = None
    if importlib.util.find_spec("imageio_ffmpeg"):
        video = make_video(folder / "film.mp4", images, options.frames)
        height, width = images[0].shape[:2]
        result["video"] = {"codec": "H.264", "size": [width, height], "bytes": video.stat().st_size}
    rows = result["engines"] = {}
    for name, model in models_of(options).items():
        rows[name] = measure(model, images, video, dataset, folder / "masks", options.frames, options.repeats)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(name, rows[name], flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
