"""What a second GPU brings: images a second of a fleet on 1, 2, … GPUs of one host.

    python benchmarks/fleet.py CLEAN.onnx FOLDER -o RESULT.json [--gpus 1 2] [--images 5000] [--precision int8]

CLEAN.onnx is the cleaned float32 graph of a UNet that takes grey 512×512 images, as for predict.py, which builds the
engine (uint8 images to uint8 labels) in FOLDER. Measured are, for every number of GPUs:

png     PNG files of 512×512 to masks as PNG files: ``unet-trt predict --distributed --no-overlays``
arrays  decoded images to masks in memory: workers send arrays that they hold, and drop what comes back

Every image is done ``--passes`` times, under names of its own. Rates are those between a quarter and 95 % of the
images, when all workers are at work. Beside them: how many files one core decodes, and masks it encodes, a second; with
``--photographs FOLDER`` of RGB ones too, resized to 512×512, as PNG and as JPEG files.

``--backend onnxruntime`` runs it on the CPU, with as many processes in the GPUs' place, to try the script.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from predict import DISTINCT, SIZE, pictures, prepare

from pipeline.artifacts import sha256_file
from pipeline.backends import cuda
from pipeline.data.pictures import mask_png
from pipeline.data.pixels import open_picture, picture_of
from pipeline.fleet.fleet import Fleet
from pipeline.fleet.portions import Part
from pipeline.fleet.proxies import HostedPredictor
from pipeline.predictor import GROUP, Predictor
from pipeline.stages.predict import PORTION, Wanted, predict

# Cores that a GPU's workers get, at most.
MOST_WORKERS = 16
FIRST, LAST = 0.25, 0.95
TIMED_FILES = 100


class Timed(Fleet):
    """Notes when portions come back."""

    def parts(self, *given: Any, **options: Any) -> Generator[Part[Any, Any], None, None]:
        self.marks: list[tuple[float, int]] = []
        for part in super().parts(*given, **options):
            self.marks.append((time.perf_counter(), len(part.items)))
            yield part

    def rate(self) -> float:
        return steady_rate(*zip(*self.marks, strict=True))


def steady_rate(times: Sequence[float], counts: Sequence[int]) -> float:
    """Items a second, without the beginning and the end, from when so many were done."""
    done = np.cumsum(counts)
    first, last = (int(np.searchsorted(done, share * done[-1])) for share in (FIRST, LAST))
    return float((done[last] - done[first]) / max(times[last] - times[first], 1e-9))


def written_rate(out: Path) -> float:
    """Masks a second, by the files' times: portions come back seconds apart."""
    times = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    return steady_rate(times, [1] * len(times))


class Arrays:
    """Predicts images that it holds, as many as it is given; gives how many."""

    def __init__(self, predictor: HostedPredictor, files: Sequence[Path]) -> None:
        self.predictor, self.files = predictor, files
        self.images = [picture_of(open_picture(file, "grey").pixels) for file in files]

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self.predictor, self.files)

    def __call__(self, places: Sequence[int], again: bool) -> int:
        batch = max(self.predictor.batch, GROUP)
        batches = [
            [self.images[place % len(self.images)] for place in places[at : at + batch]]
            for at in range(0, len(places), batch)
        ]
        with ThreadPoolExecutor(self.predictor.streams + 1) as pool:
            return sum(len(masks) for masks in pool.map(self.predictor.predict, batches))


def one_core(images: Path, masks: Path, photographs: Path | None, folder: Path) -> dict[str, Any]:
    """What one core does in a second of its time: by kind of file, decoded files and their bytes; encoded masks."""
    kinds = {"grey PNG": (sorted(images.iterdir())[:TIMED_FILES], "grey")}
    if photographs is not None:
        for kind, ending, quality in (("RGB PNG", "png", {}), ("RGB JPEG", "jpg", {"quality": 90})):
            target = folder / f"photographs-{ending}"
            target.mkdir(exist_ok=True)
            for file in sorted(photographs.iterdir())[:TIMED_FILES]:
                picture = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                picture.save(target / f"{file.stem}.{ending}", **quality)  # type: ignore[arg-type]
            kinds[kind] = (sorted(target.iterdir()), "rgb")
    found = {
        kind: {"per_second": rate(functools.partial(decoded, channels=channels), files), "bytes": mean(files)}
        for kind, (files, channels) in kinds.items()
    }
    files = sorted(masks.glob("*.png"))[:TIMED_FILES]
    colours, decoded = np.zeros((256, 3), np.uint8), [np.asarray(Image.open(file)) for file in files]
    found["mask, encoded"] = {"per_second": rate(lambda mask: mask_png(mask, colours), decoded), "bytes": mean(files)}
    return found


def decoded(file: Path, channels: str) -> NDArray[np.uint8]:
    return open_picture(file, channels).pixels


def rate(call: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Items a second of this core's time; the best of three passes."""
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for item in items:
            call(item)
        best = max(best, len(items) / (time.process_time() - start))
    return round(best, 1)


def mean(files: Sequence[Path]) -> int:
    """Their bytes."""
    return round(sum(file.stat().st_size for file in files) / len(files))


def measure(model: Path, images: Path, out: Path, gpus: int, each: int, total: int, on_gpu: bool) -> dict[str, Any]:
    """Rates of one number of GPUs, and a hash over all masks."""
    opens = functools.partial(Predictor, model)
    found: dict[str, Any] = {"gpus": gpus, "workers": gpus * each}
    with Timed(workers=gpus * each, gpus=gpus if on_gpu else None) as fleet:
        start = time.perf_counter()
        with fleet.host_predictor(opens, None if on_gpu else gpus) as predictor:
            found["opened_in_seconds"] = round(time.perf_counter() - start, 2)
            found["batch"], found["streams"] = predictor.batch, predictor.streams
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            outcome = predict(predictor, sha256_file(model), [images], Wanted(out, overlays=False), fleet)
            seconds = round(time.perf_counter() - start, 2)
            found["png"] = {
                "images": outcome.done,
                "failed": outcome.failed,
                "images_per_second": round(written_rate(out), 1),
                "seconds_with_start_of_workers": seconds,
                "masks_sha256": digest(out),
            }
            arrays = Arrays(predictor, sorted(images.iterdir())[:DISTINCT])
            start = time.perf_counter()
            done = sum(part.result or 0 for part in fleet.parts(arrays, range(total), PORTION, "arrays"))
            found["arrays"] = {
                "images": done,
                "images_per_second": round(fleet.rate(), 1),
                "seconds_with_start_of_workers": round(time.perf_counter() - start, 2),
            }
    return found


def digest(folder: Path) -> str:
    """sha256 over names and masks."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        whole.update(f"{path.name} {sha256_file(path)}\n".encode())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--passes", type=int, default=4, help="over the images, for long enough a run")
    parser.add_argument("--workers", type=int, help="cores for each GPU; default: as many as there are, 16 at most")
    parser.add_argument("--precision", choices=("int8", "fp16", "fp32"), default="int8")
    parser.add_argument("--backend", choices=("tensorrt", "onnxruntime"), default="tensorrt")
    parser.add_argument("--photographs", type=Path, help="folder of images, to time decoding RGB ones")
    parser.add_argument("--date", help="of the measurement, where the machine's clock is wrong")
    options = parser.parse_args()
    import ray

    folder, on_gpu, most = options.folder.resolve(), options.backend == "tensorrt", max(options.gpus)
    folder.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    each = options.workers or max(1, min(MOST_WORKERS, cores // most - 1))
    if not on_gpu:  # processes in the GPUs' place need more cores than a small machine may have
        os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": (each + 1) * most})
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result: dict[str, Any] = {
        "date": options.date or now,
        "python": platform.python_version(),
        "ray": ray.__version__,
        "cores": cores,
        "backend": options.backend,
        "precision": options.precision if on_gpu else "fp32",
        "images": options.images,
        "passes": options.passes,
        "size": SIZE,
    }
    if on_gpu:
        import tensorrt

        result |= {"device": asdict(cuda.current_device()), "tensorrt": tensorrt.__version__}
    else:
        import onnxruntime

        result["onnxruntime"] = onnxruntime.__version__

    def note(name: str, value: Any) -> None:
        """After every step, so that a run that is cut short leaves what it had."""
        result[name] = value
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    model = prepare(options.clean, folder, options.precision, options.backend)
    images = pictures(folder / f"png-{options.images}x{options.passes}", options.images, SIZE, SIZE, options.passes)
    rows: list[dict[str, Any]] = []
    for gpus in options.gpus:
        rows.append(measure(model, images, folder / "masks", gpus, each, options.images * options.passes, on_gpu))
        note("rows", rows)
        rates = ", ".join(f"{name} {rows[-1][name]['images_per_second']:.0f}" for name in ("png", "arrays"))
        print(f"{gpus} GPUs, {rows[-1]['workers']} workers: images/s {rates}", flush=True)
    first, last = rows[0], rows[-1]
    note(
        "scaling",
        {
            name: round(last[name]["images_per_second"] / first[name]["images_per_second"], 3)
            for name in ("png", "arrays")
        },
    )
    note("one_core", one_core(images, folder / "masks", options.photographs, folder))
    print(result["one_core"])
    note("equal_masks", len({row["png"]["masks_sha256"] for row in rows}) == 1)
    print(f"{last['gpus']} GPUs against {first['gpus']}: {result['scaling']}, masks equal: {result['equal_masks']}")


if __name__ == "__main__":
    main()
