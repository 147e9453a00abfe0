"""Train a network on its configured data: the recipe behind the weights that ship with the project."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifacts import write_atomically
from pipeline.config import Config, PreprocessingConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preprocessing import Pixels, fit_image, fit_label, normalise, preprocess, restore_mask
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.metrics.segmentation import class_iou, confusion_matrix, mean_iou
from pipeline.networks import build_network, fastest_device
from pipeline.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
IGNORED = 255


@dataclass(frozen=True)
class TrainingReport:
    """What a training run gave.

    Attributes:
        class_iou: NaN for classes that the validation labels do not hold.
        first_loss, last_loss: means over the first and the last tenth of the steps.
    """

    mean_iou: float
    mean_iou_half: float
    class_iou: tuple[float, ...]
    steps: int
    seconds: float
    device: str
    parameters: int
    first_loss: float
    last_loss: float

    @property
    def shown_iou(self) -> list[str]:
        """``class_iou`` for people."""
        return ["absent" if math.isnan(value) else f"{value:.4f}" for value in self.class_iou]


def train(config: Config, weights: Path) -> TrainingReport:
    """Train from scratch, measure mIoU on the validation split, write FP16 safetensors and a card (``.md``) beside it.

    Loss: cross-entropy without void plus soft Dice; AdamW with a one-cycle schedule.

    Raises:
        ConfigError: the config has another task than segmentation.
        ModelError: the config starts from an ONNX file, or the weights' name does not end in .safetensors.
        DataError: a training or validation image has no label.
    """
    import torch

    if config.task != "segmentation":
        raise ConfigError(
            f"`unet-trt train` trains segmentation networks, and this config has task: {config.task}",
            fix="train it with its own code, and name the weights (network.weights)",
        )
    if config.network.factory is None:
        raise ModelError("an ONNX file cannot be trained", expected="network.factory", got="network.onnx")
    if weights.suffix != ".safetensors":
        raise ModelError(f"weights are written as .safetensors, not {weights.name}", fix="choose another -o file")
    validation = open_dataset(config.data, config.preprocessing, "validation")
    if validation[0].label is None:
        raise DataError("the validation images have no label maps", fix="name data.validation.labels")
    recipe, started = config.train, time.perf_counter()
    torch.manual_seed(recipe.seed)
    device = fastest_device()
    network = build_network(config.network.model_copy(update={"weights": None})).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    samples = _load(open_dataset(config.data, config.preprocessing, "train"), config)
    shapes = sorted({label.shape for _, label in samples})
    turned = "rotate" in recipe.augment and any(height != width for height, width in shapes)
    if recipe.crop is None and (len(shapes) > 1 or turned or "scale" in recipe.augment):
        raise DataError(
            "the training images do not end up in one size, so they cannot be put into batches",
            got=f"sizes {shapes[:4]}, augment {list(recipe.augment)}",
            fix="set train.crop: [height, width]",
        )
    log.info("training on %d images on %s", len(samples), device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    rise = 0.1 if recipe.steps > 10 else 0.6  # OneCycleLR divides by rise * steps - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=rise
    )
    class_weights = torch.tensor(recipe.class_weights, device=device) if recipe.class_weights else None
    losses: list[Tensor] = []
    network.train()
    for step, (image_batch, label_batch) in enumerate(track(_batches(samples, config), "training", recipe.steps), 1):
        images = torch.from_numpy(image_batch).to(device)
        labels = torch.from_numpy(label_batch).to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(images.to(memory_format=torch.channels_last))
        loss = _loss(logits.float(), labels, recipe.dice_weight, class_weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == recipe.steps:
            log.info("step %d of %d: loss %.4f, %.0f s", step, recipe.steps, loss.item(), time.perf_counter() - started)
    network.eval()
    confusion = _evaluate(network, validation, config)
    half = {
        name: (t.half() if t.is_floating_point() else t).contiguous().cpu()
        for name, t in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    network.load_state_dict(half, strict=False)
    tenth = max(1, recipe.steps // 10)
    report = TrainingReport(
        mean_iou=mean_iou(confusion),
        mean_iou_half=mean_iou(_evaluate(network, validation, config)),
        class_iou=tuple(float(v) for v in class_iou(confusion)),
        steps=recipe.steps,
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        parameters=sum(p.numel() for p in network.parameters()),
        first_loss=float(torch.stack(losses[:tenth]).mean()),
        last_loss=float(torch.stack(losses[-tenth:]).mean()),
    )
    _write(half, report, config, weights, len(samples), len(validation))
    return report


def _load(dataset: Dataset, config: Config) -> list[tuple[Pixels, Pixels]]:
    samples = []
    for sample in dataset:
        if sample.label is None:
            raise DataError(f"the training image {sample.name} has no label map", fix="name data.train.labels")
        label = fit_label(sample.label, config.preprocessing, config.data.void)
        samples.append((fit_image(sample.image, config.preprocessing), label))
    return samples


def _batches(samples: list[tuple[Pixels, Pixels]], config: Config) -> Iterator[tuple[Any, Pixels]]:
    """The recipe's batches in order, each from a seed of its own, prepared in threads ahead of their use."""

    def make(step: int) -> tuple[Any, Pixels]:
        rng = np.random.default_rng((config.train.seed, step))
        chosen = rng.integers(len(samples), size=config.train.batch)
        pairs = [_augmented(samples[i], config, rng) for i in chosen]
        return np.stack([image for image, _ in pairs]), np.stack([label for _, label in pairs])

    workers = min(12, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(make, step) for step in range(min(workers + 2, config.train.steps)))
        for step in range(len(waiting), config.train.steps + len(waiting)):
            ready = waiting.popleft().result()
            if step < config.train.steps:
                waiting.append(pool.submit(make, step))
            yield ready


def _augmented(sample: tuple[Pixels, Pixels], config: Config, rng: np.random.Generator) -> tuple[Any, Pixels]:
    """A random crop under the recipe's augmentations, normalised; void becomes IGNORED."""
    recipe, spec = config.train, config.preprocessing
    image, label = sample
    label = np.where(label < len(config.data.classes), label, IGNORED).astype(np.uint8)
    if "scale" in recipe.augment:
        image, label = _scaled(image, label, float(rng.uniform(0.7, 1.6)))
    if recipe.crop is not None:
        image, label = _crop(image, label, recipe.crop, rng)
    if "elastic" in recipe.augment:
        image, label = _elastic(image, label, rng)
    if "rotate" in recipe.augment:
        turns = int(rng.integers(4))
        image, label = np.rot90(image, turns), np.rot90(label, turns)
    if "flip_horizontal" in recipe.augment and rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    if "flip_vertical" in recipe.augment and rng.random() < 0.5:
        image, label = image[::-1], label[::-1]
    if "brightness" in recipe.augment:
        gain, offset = rng.uniform(0.75, 1.3), rng.uniform(-25, 25)
        image = (image * gain + offset).clip(0, 255).astype(np.uint8)
    return normalise(image, spec), np.ascontiguousarray(label)


def _scaled(image: Pixels, label: Pixels, ratio: float) -> tuple[Pixels, Pixels]:
    height, width = (round(side * ratio) for side in label.shape)
    spec = PreprocessingConfig(height=height, width=width, resize="stretch")
    return fit_image(image, spec), fit_label(label, spec, IGNORED)


def _crop(image: Pixels, label: Pixels, size: tuple[int, int], rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A random window; what lies outside the image is black and ignored."""
    short = [max(0, want - have) for want, have in zip(size, label.shape, strict=True)]
    if any(short):
        image = np.pad(image, ((0, short[0]), (0, short[1]), (0, 0)))
        label = np.pad(label, ((0, short[0]), (0, short[1])), constant_values=IGNORED)
    top, left = (int(rng.integers(have - want + 1)) for want, have in zip(size, label.shape, strict=True))
    window = slice(top, top + size[0]), slice(left, left + size[1])
    return image[window], label[window]


def _elastic(image: Pixels, label: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Bend by smooth random displacements of some 6 pixels (Ronneberger et al. 2015, section 3.1)."""
    from PIL import Image

    height, width = label.shape
    shift = [
        np.asarray(
            Image.fromarray(rng.normal(0, 6, (5, 5)).astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for _ in range(2)
    ]
    rows, columns = np.mgrid[0:height, 0:width]
    rows = (rows + shift[0]).round().clip(0, height - 1).astype(np.intp)
    columns = (columns + shift[1]).round().clip(0, width - 1).astype(np.intp)
    return image[rows, columns], label[rows, columns]


def _loss(logits: Tensor, labels: Tensor, dice_weight: float, class_weights: Tensor | None) -> Tensor:
    from torch.nn import functional as F

    loss = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORED)
    if dice_weight:
        counted = (labels != IGNORED).unsqueeze(1)
        probability = logits.softmax(1) * counted
        target = F.one_hot(labels.clamp(max=logits.shape[1] - 1), logits.shape[1]).movedim(-1, 1) * counted
        overlap = (probability * target).sum((0, 2, 3))
        total = (probability + target).sum((0, 2, 3))
        loss = loss + dice_weight * (1 - ((2 * overlap + 1) / (total + 1)).mean())
    return loss


def _evaluate(network: nn.Module, dataset: Dataset, config: Config) -> Any:
    import torch

    device = next(network.parameters()).device
    classes = len(config.data.classes)
    confusion = np.zeros((classes, classes), np.int64)
    with torch.inference_mode():
        for sample in dataset:
            if sample.label is None:
                raise DataError(
                    f"the validation image {sample.name} has no label map", fix="name data.validation.labels"
                )
            batch = torch.from_numpy(preprocess(sample.image, config.preprocessing)[np.newaxis]).to(device)
            mask = network(batch)[0].argmax(0).cpu().numpy()
            confusion += confusion_matrix(
                sample.label, restore_mask(mask, config.preprocessing, *sample.label.shape), classes
            )
    return confusion


def _write(
    state: dict[str, Tensor], report: TrainingReport, config: Config, weights: Path, trained: int, judged: int
) -> None:
    from safetensors.torch import save

    weights.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(weights, save(state))
    rows = "\n".join(f"| {c.name} | {shown} |" for c, shown in zip(config.data.classes, report.shown_iou, strict=True))
    arguments = ", ".join(f"{k}={v}" for k, v in config.network.arguments.items())
    card = f"""# {weights.name}

- Network: `{config.network.factory}` ({arguments}), {report.parameters:,} parameters, stored as FP16.
- Data: `{config.name}` ({config.data.kind}), {trained} training images, judged on {judged} validation images.
- Recipe: {report.steps} steps of {config.train.batch} images, seed {config.train.seed}, see `train` in its config.
- Trained in {report.seconds:.0f} s on {report.device}.
- Loss: {report.first_loss:.3f} over the first tenth of the steps, {report.last_loss:.3f} over the last.
- mIoU on the validation images: {report.mean_iou:.4f} with FP32 weights, {report.mean_iou_half:.4f} as stored.
- Reproduce: `unet-trt train -c configs/{config.name}.yaml`. Other hardware gives slightly other weights.

| class | IoU |
|---|---|
{rows}
"""
    write_atomically(weights.with_suffix(".md"), card.encode())
