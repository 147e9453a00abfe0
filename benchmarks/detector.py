"""The detector: trains its weights, compares AP50 of every form of it, and times it on frames.

    .venv/bin/python benchmarks/detector.py train                 # models/weights/detector.safetensors and its card
    .venv/bin/python benchmarks/detector.py table build/detector  # after `unet-trt run -c configs/detector.yaml`
    .venv/bin/python benchmarks/detector.py frames MODEL VIDEO    # a model.onnx or model.engine; a video or a folder

`train` and `table` read configs/detector.yaml, or another with -c before the command; the first needs torch. `table`
writes JSON with -o, and `frames` draws what it finds into a folder with -o.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.artifacts import write_atomically
from pipeline.backends.base import Runner, feed_image
from pipeline.config import PRECISIONS, Config, load_config
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.inputs import decoded, find_files, inputs_of
from pipeline.data.pictures import as_rgb
from pipeline.data.preprocessing import normalise, preprocess
from pipeline.errors import DataError, PipelineError
from pipeline.facts import required_card
from pipeline.metrics.detection import average_precision, decode, suppress
from pipeline.opening import open_model

CONFIG = Path(__file__).parent.parent / "configs" / "detector.yaml"
STRIDES = (8, 16, 32)
STEPS, BATCH, RATE = 1200, 12, 4e-3
SHOWN = 0.4

Heads = Sequence[NDArray[np.float32]]


def boxes_of(heads: Heads, threshold: float = 0.05) -> NDArray[np.float32]:
    """The boxes of one image from heads of a batch of one."""
    return suppress(decode([head[0] for head in heads], STRIDES, threshold))


def ap50(dataset: Dataset, classes: int, infer: Callable[[NDArray[np.uint8]], Heads]) -> NDArray[np.float64]:
    """AP50 of each class over the images of a data set with boxes."""
    found, wanted = [], []
    for sample in dataset:
        if sample.boxes is None:
            raise DataError(f"the image {sample.name} has no boxes", expected="data.kind: shapes")
        found.append(boxes_of(infer(sample.image)))
        wanted.append(sample.boxes)
    return average_precision(found, wanted, classes)


# ---------------------------------------------------------------------- train


def train(config: Config, weights: Path, steps: int) -> None:
    """Train from scratch and write FP16 weights with a card."""
    import torch
    from safetensors.torch import save

    from models.detector import detection_loss
    from pipeline.networks import build_network

    torch.manual_seed(0)
    network = build_network(config.network.model_copy(update={"weights": None})).train()
    dataset = open_dataset(config.data, config.preprocessing, "train")
    samples = [(sample.image, sample.boxes) for sample in dataset]
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    started, losses = time.perf_counter(), []
    for step in range(steps):
        rng = np.random.default_rng((0, step))
        pairs = [flipped(*samples[int(i)], rng) for i in rng.integers(len(samples), size=BATCH)]
        images = torch.from_numpy(np.stack([normalise(image, config.preprocessing) for image, _ in pairs]))
        loss = detection_loss(network(images), [torch.from_numpy(boxes) for _, boxes in pairs])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(
                f"step {step + 1} of {steps}: loss {np.mean(losses[-50:]):.3f}, {time.perf_counter() - started:.0f} s"
            )
    seconds = time.perf_counter() - started
    half = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in network.state_dict().items()}
    half = {name: tensor for name, tensor in half.items() if not name.endswith("num_batches_tracked")}
    network.load_state_dict(half, strict=False)
    validation = open_dataset(config.data, config.preprocessing, "validation")
    figures = ap50(validation, len(config.data.classes), torch_inference(network.eval(), config))
    by_class = ", ".join(f"{one.name} {v:.4f}" for one, v in zip(config.data.classes, figures, strict=True))
    first, last = np.mean(losses[:50]), np.mean(losses[-50:])
    card = f"""# {weights.name}

- Network: `{config.network.factory}`, {sum(p.numel() for p in network.parameters()):,} parameters, stored as FP16.
- Data: the built-in shapes, {len(dataset)} training images, judged on {len(validation)} validation images.
- Recipe: {steps} steps of {BATCH} images with flips, AdamW, one cycle up to {RATE:g}, seed 0.
- Trained in {seconds:.0f} s on CPU, {torch.get_num_threads()} thread(s).
- Loss: {first:.2f} over the first 50 steps, {last:.2f} over the last.
- AP50 on the validation images, as stored: {figures.mean():.4f} ({by_class}).
- Reproduce: `python benchmarks/detector.py train`. Other hardware gives slightly other weights.
"""
    write_atomically(weights, save(half))
    write_atomically(weights.with_suffix(".md"), card.encode())
    print(card)


def flipped(
    image: NDArray[np.uint8], boxes: NDArray[np.float32] | None, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mirrored left to right every other time: triangles keep their top."""
    assert boxes is not None
    if rng.random() < 0.5:
        return image, boxes
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
    return image[:, ::-1], mirrored


def torch_inference(network: object, config: Config) -> Callable[[NDArray[np.uint8]], Heads]:
    """The network in torch, as a function of an image."""
    import torch

    def infer(image: NDArray[np.uint8]) -> Heads:
        with torch.inference_mode():
            heads = network(torch.from_numpy(preprocess(image, config.preprocessing)[None]))  # type: ignore[operator]
        return [head.numpy() for head in heads]

    return infer


# ---------------------------------------------------------------------- table


def runner_inference(runner: Runner, config: Config) -> Callable[[NDArray[np.uint8]], Heads]:
    """A loaded model as a function of an image; heads in the order of their strides."""

    def infer(image: NDArray[np.uint8]) -> Heads:
        outputs = runner(feed_image(runner.inputs[0], image, config.preprocessing))
        return sorted(outputs.values(), key=lambda head: -head.shape[2])

    return infer


def table(config: Config, build: Path, output: Path | None) -> None:
    """AP50 of the original, where there is torch, of its export, and of every precision that was judged."""
    from pipeline.networks import build_network

    validation = open_dataset(config.data, config.preprocessing, "validation")
    names = [one.name for one in config.data.classes]
    rows = {}
    if importlib.util.find_spec("torch"):
        infer = torch_inference(build_network(config.network), config)
        rows["original, torch"] = ap50(validation, len(names), infer)
    for name, path in models(build):
        runner, _ = open_model(path)
        with runner:
            rows[name] = ap50(validation, len(names), runner_inference(runner, config))
    print("| | AP50 | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for name, figures in rows.items():
        print(f"| {name} | {figures.mean():.4f} | " + " | ".join(f"{value:.4f}" for value in figures) + " |")
    if output is not None:
        result = {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "images": len(validation),
            "ap50": {name: dict(zip(names, figures.tolist(), strict=True)) for name, figures in rows.items()},
        }
        write_atomically(output, json.dumps(result, indent=2).encode() + b"\n")


def models(build: Path) -> Iterator[tuple[str, Path]]:
    """The export and each precision: its engine where that ran here, else its typed graph."""
    yield "ONNX", build / "export" / "model.onnx"
    for precision in PRECISIONS:
        report = build / "validate" / precision / "report.json"
        if not report.is_file():
            continue
        ran = json.loads(report.read_text())["candidate"]
        folder = build / "engine" / precision
        file = "model.onnx" if ran["emulated"] else "model.engine"
        yield f"{precision.upper()}{', emulated' if ran['emulated'] else ''}", folder / file


# ---------------------------------------------------------------------- frames


def frames(model: Path, source: str, output: Path | None) -> None:
    """Frame rate of decoding, preprocessing, the model and its boxes, one frame after another."""
    runner, facts = open_model(model)
    card = required_card(facts.card, model)
    colours = [one.colour for one in card.classes]
    inside: list[float] = []
    count = boxes_seen = 0
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with runner:
        for one in decoded(inputs_of(find_files([source], output or Path("none")), card.preprocessing.channels)):
            if isinstance(one.picture, DataError):
                raise one.picture
            pixels = one.picture.pixels
            feed = feed_image(runner.inputs[0], pixels, card.preprocessing, one.source.name)
            before = time.perf_counter()
            outputs = runner(feed)
            inside.append(time.perf_counter() - before)
            boxes = boxes_of(sorted(outputs.values(), key=lambda head: -head.shape[2]), SHOWN)
            scale = np.array([pixels.shape[1] / card.preprocessing.width, pixels.shape[0] / card.preprocessing.height])
            boxes[:, :4] *= np.tile(scale, 2)
            count, boxes_seen = count + 1, boxes_seen + len(boxes)
            if output is not None:
                draw(as_rgb(pixels, card.preprocessing.channels), boxes, colours).save(
                    output / f"{one.source.name}.png"
                )
    seconds = time.perf_counter() - started
    print(
        f"{count} frames, {boxes_seen} objects: {count / seconds:.1f} frames a second in all, "
        f"{count / sum(inside):.1f} by the model alone ({1000 * float(np.median(inside)):.2f} ms, with copies)"
    )


def draw(pixels: NDArray[np.uint8], boxes: NDArray[np.float32], colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The picture with its boxes in the classes' colours."""
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    for box in boxes:
        pen.rectangle([float(value) for value in box[:4]], outline=colours[int(box[5])], width=2)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, default=CONFIG)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--steps", type=int, default=STEPS)
    comparing = commands.add_parser("table")
    comparing.add_argument("build", type=Path)
    timing = commands.add_parser("frames")
    timing.add_argument("model", type=Path)
    timing.add_argument("source")
    for command in (training, comparing, timing):
        command.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    config = load_config(given.config)
    if given.command == "train":
        weights = given.output or config.network.weights
        assert weights is not None
        train(config, weights, given.steps)
    elif given.command == "table":
        table(config, given.build, given.output)
    else:
        frames(given.model, given.source, given.output)


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
