"""Images and label maps, one at a time, by split: built-in ones or folders of files."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, sha256_file, sha256_json
from pipeline.config import DataConfig, PreprocessingConfig, SplitConfig
from pipeline.data.preprocessing import Pixels, read_image, read_label
from pipeline.data.synthetic import CELLS_SIZE, SHAPES_SIZE, draw_cells, draw_shapes
from pipeline.errors import CalibrationError, ConfigError, DataError
from pipeline.slips import did_you_mean

Split = Literal["train", "validation", "calibration"]
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Generated images of different splits come from disjoint ranges of seeds.
SEEDS: dict[Split, int] = {"train": 1_000_000, "validation": 2_000_000, "calibration": 3_000_000}


@dataclass(frozen=True)
class Sample:
    """One image, uint8 (H, W, C), and its label map, uint8 (H, W) of class ids and void, where there is one.

    ``boxes`` are those of the built-in shapes: float32 (n, 5), left, top, right, bottom in pixels, class.
    """

    name: str
    image: Pixels
    label: Pixels | None
    boxes: NDArray[np.float32] | None = None

    def content_hash(self) -> str:
        """sha256 of the decoded pixels and their shape: equal for equal pictures, whatever the file."""
        digest = hashlib.sha256(repr(self.image.shape).encode())
        digest.update(np.ascontiguousarray(self.image).data)
        return digest.hexdigest()


def content_hashes(samples: Iterable[Sample]) -> dict[str, str]:
    """Names of samples by content, for ``hash_apart``; loads each once."""
    return {sample.content_hash(): sample.name for sample in samples}


def hash_apart(sample: Sample, validation: Mapping[str, str]) -> str:
    """A calibration image's content hash.

    Args:
        validation: names of the validation images by theirs.

    Raises:
        CalibrationError: it is one of them.
    """
    digest = sample.content_hash()
    if digest in validation:
        raise CalibrationError(
            f"the calibration image {sample.name} is the validation image {validation[digest]}",
            expected="no image in both, or validation would judge ranges by the images that chose them",
            fix="remove it from data.calibration (or data.train), or from data.validation",
        )
    return digest


@dataclass(frozen=True)
class Dataset(Sequence[Sample]):
    """Samples loaded when asked for.

    Attributes:
        names: of the samples, in order.
        load: makes one.
        files: what a sample is read from; nothing for generated ones.
        origin: whatever else decides a sample's content: the seed of generated ones, the meaning of label values.
    """

    names: tuple[str, ...]
    load: Callable[[str], Sample]
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    origin: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.load(self.names[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self.load(name) for name in self.names)

    def first(self, count: int | None) -> Dataset:
        """The first ``count`` samples; all of them for None."""
        return self if count is None else replace(self, names=self.names[:count])

    def choose(self, count: int, seed: int) -> Dataset:
        """A seeded choice of ``count`` samples without repetition, in the dataset's order; all if there are fewer."""
        if count >= len(self):
            return self
        chosen = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return replace(self, names=tuple(self.names[i] for i in sorted(chosen)))

    def fingerprint(self) -> str:
        """sha256 over names, files' contents and origin: changes when any image or label does.

        Raises:
            DataError: a file cannot be read.
        """
        try:
            hashes = [(name, [sha256_file(path) for path in self.files.get(name, ())]) for name in self.names]
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename}: {error.strerror}", expected="a readable image file", fix="replace it"
            ) from error
        return sha256_json([self.origin, hashes])


def open_dataset(data: DataConfig, preprocessing: PreprocessingConfig, split: Split) -> Dataset:
    """The samples of a split. Calibration images are training images unless the config names others.

    Raises:
        DataError: a folder is missing or empty, an image has no label map; later, when a sample is loaded, a file
            that cannot be decoded, a label map of another size, a class id out of range.
        ConfigError: ``label_values`` leads to no class.
    """
    if data.kind == "cells":
        return _cells(data, preprocessing, split)
    if data.kind == "shapes":
        return _shapes(data, preprocessing, split)
    if split == "calibration" and data.calibration is None:
        split = "train"
    config = {"train": data.train, "validation": data.validation, "calibration": data.calibration}[split]
    if data.validation is None and split in ("train", "validation"):
        assert data.train is not None
        everything = _folder(data, preprocessing, data.train)
        count = min(max(1, round(len(everything) * data.validation_fraction)), len(everything) - 1)
        if count == 0:
            raise DataError(
                f"the folder {data.train.images} holds one image, which cannot be both for training and validation",
                expected="at least two images, or a validation split of its own",
                fix="add images, or set data.validation",
            )
        held_out = set(everything.choose(count, data.seed).names)
        keep = tuple(name for name in everything.names if (name in held_out) == (split == "validation"))
        return replace(everything, names=keep)
    assert config is not None
    return _folder(data, preprocessing, config)


def image_folder(
    folder: Path, channels: str, labels: Path | None = None, data: DataConfig | ModelCard | None = None
) -> Dataset:
    """The images of a folder in sorted order, with the label maps of the same name from ``labels`` where given.

    Args:
        folder, labels: folders, whose files are called by their stems, or patterns such as
            ``leftImg8bit/val/*/*_leftImg8bit.png``, whose files are called by what the last part's star stands for.
        data: says which label values are which classes; without it, values are taken as they are.
    """
    images = _files(folder, "images")
    label_files: dict[str, Path] = {}
    if labels is not None:
        label_files = _files(labels, "label maps")
        missing = sorted(set(images) - set(label_files))
        if missing:
            raise DataError(
                f"the image {images[missing[0]]} has no label map",
                expected=f"a file for {missing[0]} with any of {', '.join(IMAGE_ENDINGS)} in {labels}",
                got=f"{len(missing)} of {len(images)} images without one",
                fix="add the label maps, or move the images out of the folder",
            )

    classes = None if data is None else _class_table(data)

    def load(name: str) -> Sample:
        image = read_image(images[name], channels)
        label = None
        if name in label_files:
            label = read_label(label_files[name])
            if label.shape != image.shape[:2]:
                raise DataError(
                    f"the label map {label_files[name]} has another size than its image",
                    expected=f"{image.shape[1]}×{image.shape[0]} (width × height)",
                    got=f"{label.shape[1]}×{label.shape[0]}",
                    fix="replace the label map",
                )
            if classes is not None:
                label = _class_ids(label, *classes, label_files[name])
        return Sample(name, image, label)

    pairs = {name: (path, *([label_files[name]] if name in label_files else [])) for name, path in images.items()}
    origin = (
        "" if data is None else sha256_json([data.void, len(data.classes), sorted((data.label_values or {}).items())])
    )
    return Dataset(tuple(images), load, pairs, origin)


def _folder(data: DataConfig, preprocessing: PreprocessingConfig, split: SplitConfig) -> Dataset:
    assert data.root is not None
    labels = data.root / split.labels if split.labels else None
    return image_folder(data.root / split.images, preprocessing.channels, labels, data)


def _files(folder: Path, what: str) -> dict[str, Path]:
    """Files by name, sorted by path: a folder's, or those that a pattern finds."""
    found, name_of = _found(folder, what)
    files: dict[str, Path] = {}
    for path in sorted(found):
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".") and not path.is_dir():
            name = name_of(path)
            if name in files:
                raise DataError(
                    f"{path} and {files[name]} have the same name",
                    expected="one file a name, since images and label maps are paired by it",
                    fix="rename or remove one of them",
                )
            files[name] = path
    if not files:
        raise DataError(
            f"the pattern {folder} finds nothing" if "*" in str(folder) else f"the folder {folder} is empty",
            expected=f"{what} ending in {', '.join(IMAGE_ENDINGS)}",
            got=f"{len(found)} other files",
            fix="check data.root and the split's folder names",
        )
    return files


def _found(folder: Path, what: str) -> tuple[list[Path], Callable[[Path], str]]:
    """All files of a folder or pattern, and what names one."""
    if "*" not in str(folder):
        if not folder.is_dir():
            raise DataError(
                f"the folder {folder} does not exist{did_you_mean(folder)}",
                expected=f"a folder of {what}",
                fix="check data.root (--set data.root=FOLDER) and the split's folder names",
            )
        return list(folder.iterdir()), lambda path: path.stem
    before, *behind = folder.name.split("*")
    if len(behind) != 1:
        raise DataError(
            f"the pattern {folder} has {len(behind)} stars in its last part",
            expected="one, which stands for the names, such as images/*/*.png",
            fix="correct the pattern",
        )
    # Whatever else a glob understands is meant as it stands.
    pattern = "*".join(map(glob.escape, str(folder.relative_to(folder.anchor)).split("*")))
    found = list(Path(folder.anchor).glob(pattern))
    return found, lambda path: path.name.removeprefix(before).removesuffix(behind[0])


def _class_table(data: DataConfig | ModelCard) -> tuple[NDArray[np.bool_], Pixels]:
    """Which label values 0…255 are allowed, and the class id (or void) of each."""
    allowed = np.zeros(256, bool)
    table = np.arange(256, dtype=np.uint8)
    if data.label_values is None:
        allowed[: len(data.classes)] = True
    else:
        for value, class_id in data.label_values.items():
            if not 0 <= value <= 255 or not (0 <= class_id < len(data.classes) or class_id == data.void):
                raise ConfigError(
                    f"data.label_values maps {value} to {class_id}",
                    expected=f"label values 0…255 to class ids 0…{len(data.classes) - 1} or data.void",
                    fix="correct data.label_values",
                )
            allowed[value], table[value] = True, class_id
    if data.void is not None:
        allowed[data.void], table[data.void] = True, data.void
    return allowed, table


def _class_ids(label: Pixels, allowed: NDArray[np.bool_], table: Pixels, path: Path) -> Pixels:
    """Label values to class ids; void stays."""
    bad = [int(value) for value in np.unique(label) if not allowed[value]]
    if bad:
        raise DataError(
            f"the label map {path} holds the value {bad[0]}, which is no class",
            expected=f"values {[int(v) for v in np.flatnonzero(allowed)]}",
            got=f"{len(bad)} other value(s): {bad[:8]}",
            fix="correct the label map, data.classes, data.void or data.label_values",
        )
    return table[label]


def _cells(data: DataConfig, preprocessing: PreprocessingConfig, split: Split) -> Dataset:
    if len(data.classes) != 4 or preprocessing.channels != "grey":
        raise DataError(
            "the built-in cells have 4 classes and one channel",
            expected="classes background, cytoplasm, membrane, nucleus; preprocessing.channels: grey",
            got=f"{len(data.classes)} classes; channels: {preprocessing.channels}",
            fix="see configs/cells.yaml",
        )

    def load(name: str, seed: int) -> Sample:
        image, label = draw_cells(seed, CELLS_SIZE)
        return Sample(name, image[..., np.newaxis], label)

    return _generated(data, split, load)


def _shapes(data: DataConfig, preprocessing: PreprocessingConfig, split: Split) -> Dataset:
    if len(data.classes) != 3 or preprocessing.channels == "grey":
        raise DataError(
            "the built-in shapes have 3 classes and three channels",
            expected="classes disc, square, triangle; preprocessing.channels: rgb or bgr",
            got=f"{len(data.classes)} classes; channels: {preprocessing.channels}",
            fix="see configs/detector.yaml",
        )

    def load(name: str, seed: int) -> Sample:
        image, boxes = draw_shapes(seed, SHAPES_SIZE)
        ordered = np.ascontiguousarray(image[..., ::-1]) if preprocessing.channels == "bgr" else image
        return Sample(name, ordered, None, boxes)

    return _generated(data, split, load)


def _generated(data: DataConfig, split: Split, load: Callable[[str, int], Sample]) -> Dataset:
    """Images that are drawn from seeds; ``load`` draws one, of a name and a seed."""
    count = data.validation_images if split == "validation" else data.train_images
    seeds = {f"{data.kind}_{index:04d}": data.seed + SEEDS[split] + index for index in range(count)}
    return Dataset(tuple(seeds), lambda name: load(name, seeds[name]), origin=f"{data.kind} {split} {data.seed}")
