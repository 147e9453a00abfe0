"""A checkpoint and a folder of images to a commented configuration that runs."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from pydantic.dataclasses import dataclass

from pipeline.artifacts import write_atomically
from pipeline.config import DataConfig, PreprocessingConfig, parse_config
from pipeline.data.dataset import open_dataset
from pipeline.errors import ConfigError
from pipeline.survey.choices import Classes, Size, choose_classes, choose_colours, choose_crop, choose_size
from pipeline.survey.images import ImageFacts, Part, survey_images
from pipeline.survey.network import NetworkFacts, survey_network

ENDINGS = (".yaml", ".yml")
CALIBRATION_IMAGES = 32
LARGEST_BATCH = 8
# Stands where the code of a network is to be named; importing it fails with an error that says so.
PLACEHOLDER = "my_package.my_module:MyNetwork"
MARK = "CHECK"
# Of the template: they say what the mark means.
HEADER_LINES = 3


@dataclass(frozen=True)
class InitReport:
    """What was written, and from what.

    Attributes:
        command: that runs the configuration.
        train, validation: numbers of images.
        checks: lines of the file that a person should look at; the rest follows from weights and images.
        ready: whether it runs as it is; otherwise ``network.factory`` has to be filled in.
    """

    config: Path
    command: str
    network: NetworkFacts
    images: ImageFacts
    classes: Classes
    size: Size
    train: int
    validation: int
    checks: tuple[str, ...]
    ready: bool


def init(
    checkpoint: Path, folder: Path, output: Path, labels: Path | None = None, *, overwrite: bool = False
) -> InitReport:
    """Write a configuration for a checkpoint and a folder of images by looking at both.

    Args:
        checkpoint: ``.pth``, ``.pt``, ``.safetensors``, ``.wts`` or ``.onnx``.
        folder: of images, as ``pipeline.survey.images`` understands it.
        output: the configuration, ending in .yaml or .yml; its name becomes the configuration's.
        labels: folder of label maps, where they are neither in nor beside ``folder``.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: the output has another ending or is there already.
        ModelError, DataError, UnsupportedError: as looking at the checkpoint and at the images.
    """
    if output.suffix not in ENDINGS:
        raise ConfigError(
            f"{output} is no name of a configuration", expected=" or ".join(ENDINGS), got=output.suffix or "no ending"
        )
    if output.exists() and not overwrite:
        raise ConfigError(
            f"{output} is there already",
            expected="a new file",
            fix="choose another with -o, or replace it with --overwrite",
        )
    network = survey_network(checkpoint)
    images = survey_images(folder, labels, network.channels)
    values = () if network.card else images.label_values
    classes = choose_classes(network.classes if network.is_known or not values else None, values)
    size = choose_size(images.sizes, network.multiple, network.height, network.width)
    command = f"unet-trt run -c {shlex.quote(str(output))}"
    text = _rendered(network, images, classes, size, output, command)
    config = parse_config(text, output)
    counts = [_readable(config.data, config.preprocessing, split) for split in ("train", "validation")]
    write_atomically(output, text.encode())
    checks = tuple(
        f"{output}:{number}: {line.partition(MARK)[2].strip(' ,:.')}"
        for number, line in enumerate(text.splitlines(), 1)
        if MARK in line and number > HEADER_LINES
    )
    return InitReport(output, command, network, images, classes, size, counts[0], counts[1], checks, network.is_known)


def _readable(data: DataConfig, preprocessing: PreprocessingConfig, split: Any) -> int:
    """The number of a split's images, of which the first can be read with its label map."""
    dataset = open_dataset(data, preprocessing, split)
    _ = dataset[0]
    return len(dataset)


def _rendered(
    network: NetworkFacts, images: ImageFacts, classes: Classes, size: Size, output: Path, command: str
) -> str:
    card = network.card
    preprocessing = card.preprocessing if card else _preprocessing(images, size)
    crop = choose_crop(size, network.multiple) if network.factory and images.labels_read else None
    kept = images.train.count if images.validation else max(1, images.train.count * 4 // 5)
    base = output.resolve().parent
    return (
        _environment()
        .get_template("config.yaml.j2")
        .render(
            network=network,
            images=images,
            classes=Classes(len(card.classes), card.label_values, card.void, "as the ONNX file says")
            if card
            else classes,
            size=size,
            preprocessing=preprocessing,
            name=_name(output.stem),
            command=command,
            root=_path(images.root, base),
            weights=_path(network.file.resolve(), base),
            placeholder=PLACEHOLDER,
            split=_split,
            class_rows=_class_rows(network, images, classes),
            class_note=_class_note(network, classes),
            calibration=min(CALIBRATION_IMAGES, kept),
            profile=_profile(network, size),
            crop=list(crop) if crop else None,
        )
    )


def _preprocessing(images: ImageFacts, size: Size) -> PreprocessingConfig:
    return PreprocessingConfig(
        height=size.height,
        width=size.width,
        resize=size.resize,
        channels="grey" if images.channels == "grey" else "rgb",
        mean=images.mean,
        std=images.std,
    )


def _class_rows(network: NetworkFacts, images: ImageFacts, classes: Classes) -> list[dict[str, Any]]:
    if network.card:
        return [one.model_dump(mode="json", exclude_none=True) for one in network.card.classes]
    colours = choose_colours(classes, images.palette)
    return [{"name": f"class {place}", "colour": list(colour)} for place, colour in enumerate(colours)]


def _class_note(network: NetworkFacts, classes: Classes) -> str:
    if network.card:
        return "as the ONNX file says"
    if not network.is_known:
        return f"CHECK how many, and their names: {classes.reason}"
    return f"CHECK their names; the network gives {classes.count}"


def _profile(network: NetworkFacts, size: Size) -> dict[str, dict[str, int]]:
    sides = {"height": size.height, "width": size.width}
    found = {str(axis): {"min": side, "opt": side, "max": side} for axis, side in sides.items() if axis in network.free}
    return {"batch": {"min": 1, "opt": 1, "max": LARGEST_BATCH}, **found} if "batch" in network.free else found


def _split(part: Part) -> dict[str, str]:
    return {"images": part.images, **({"labels": part.labels} if part.labels else {})}


def _name(stem: str) -> str:
    """The stem as a configuration may be called."""
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._-]+", "-", stem)) or "mine"


def _path(path: Path, base: Path) -> str:
    """Relative to the configuration where both lie in one folder or side by side, otherwise as it is."""
    if path.is_relative_to(base) or (base.parent != base.parent.parent and path.is_relative_to(base.parent)):
        return Path(os.path.relpath(path, base)).as_posix()
    return path.as_posix()


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.stages"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    made.filters["yaml"] = _yaml
    return made


def _yaml(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
