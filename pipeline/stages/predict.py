"""Images in, masks out: files for everything that a user names, with an engine or an ONNX file."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard, write_atomically
from pipeline.backends.ahead import Ahead
from pipeline.data.inputs import THREADS, Decoded, Input, decoded, find_files, inputs_of
from pipeline.data.pictures import mask_png, overlay_png, palette, probability_png
from pipeline.data.pixels import Picture
from pipeline.data.preprocessing import Pixels
from pipeline.data.videos import VIDEO_ENDINGS, decoder_for
from pipeline.errors import BuildFolderError, DataError
from pipeline.journal import NAME, Journal
from pipeline.predictor import Prediction, Predictor
from pipeline.progress import track

log = logging.getLogger(__name__)
# Waiting for the disk after every mask would take longer than all else; a broken machine's masks are made anew.
_write = partial(write_atomically, durable=False)

# Images above Pillow's own limit are what tiles are for; above this one they do not fit a computer's memory either.
MOST_PIXELS = 1 << 32
# Of an overlay: larger images are shrunk for it.
OVERLAY_PIXELS = 1 << 26
ENDINGS = (".png", "_overlay.png")
# Writes the files of an image, and gives its line.
Finish = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What to write, and what to do about what is there.

    Attributes:
        folder: to write into.
        overwrite: replace files of an earlier run.
        resume: go on with a broken run: leave out images that ``predictions.jsonl`` has and whose masks exist.
        overlays: write them.
        probabilities: as 16-bit PNG, one a class, or as one float32 array (classes, H, W) an image.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = False
    overlays: bool = True
    probabilities: Literal["png", "npy"] | None = None


@dataclass(frozen=True)
class Outcome:
    """How many images were done, were done already, and failed, with the message of the first that did."""

    done: int
    already: int
    failed: int
    first_failure: str = ""


def predict(predictor: Predictor, model_sha256: str, given: Sequence[str | Path], wanted: Wanted) -> Outcome:
    """For each image write ``<name>.png`` (class ids, palette), what else is wanted, and a line in the journal.

    An image that cannot be decoded is said in its line, and the others are done. Images are decoded, and files
    encoded, on threads of their own. Every file is whole or absent, whenever the run ends.

    Args:
        model_sha256: of the model's file.
        given: images, folders, globs, numbered sequences, TIFF stacks, videos.

    Raises:
        DataError: no image found, two images of one name.
        UnsupportedError: a video, and no decoder for it.
        BuildFolderError: the folder is unwritable, or holds a file that would be overwritten.
        ModelError, EngineError: as the predictor's.
    """
    with _larger_images():
        paths = find_files(given, wanted.folder)
        for path in paths:
            if path.suffix.lower() in VIDEO_ENDINGS:
                decoder_for(path)  # shows now that there is none
        _refuse_collisions(paths, wanted)
        try:
            wanted.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildFolderError(f"cannot make the folder {wanted.folder}: {error.strerror}") from error
        with Journal(wanted.folder, model_sha256, resume=wanted.resume) as journal:
            return _Run(predictor, journal, wanted).over(paths)


class _Run:
    """One pass over the images."""

    def __init__(self, predictor: Predictor, journal: Journal, wanted: Wanted) -> None:
        self.predictor = predictor
        self.journal = journal
        self.wanted = wanted
        self.done = self.already = self.failed = 0
        self.first_failure = ""
        self.earlier = frozenset(journal.names)
        self.names: set[str] = set()

    def over(self, paths: Sequence[Path]) -> Outcome:
        channels = self.predictor.card.preprocessing.channels
        predicting = ThreadPoolExecutor(self.predictor.streams + 1, "predicting")
        writing = ThreadPoolExecutor(THREADS, "writing")
        batches: deque[Future[list[Finish]]] = deque()
        files: deque[Future[dict[str, Any]]] = deque()

        def settle(most_batches: int, most_files: int) -> None:
            """Wait until no more than these are under way, in order."""
            while len(batches) > most_batches:
                files.extend(writing.submit(finish) for finish in batches.popleft().result())
            while len(files) > most_files:
                self.journal.add(files.popleft().result())
                self.done += 1

        try:
            with Ahead(inputs_of(track(paths, "predicting", len(paths)), channels)) as inputs:
                for batch in self._batches(decoded(self._new(inputs))):
                    is_large = batch[0][1].is_large
                    settle(0 if is_large else self.predictor.streams, 0 if is_large else 2 * THREADS)
                    batches.append(predicting.submit(self._predicted, batch))
            settle(0, 0)
        finally:
            for pool in (predicting, writing):
                pool.shutdown(cancel_futures=True)
            for left in self.wanted.folder.glob(f".*.{os.getpid()}.partial"):  # probabilities of what was not written
                left.unlink(missing_ok=True)
        return Outcome(self.done, self.already, self.failed, self.first_failure)

    def _new(self, inputs: Iterator[Input]) -> Iterator[Input]:
        """Those that are not done yet."""
        for one in inputs:
            if one.name in self.names:
                raise DataError(f"two images would both give {one.name}.png", fix="predict them into two folders")
            self.names.add(one.name)
            if one.name in self.earlier:
                self.already += 1
                continue
            if not self.wanted.overwrite and not self.journal.existed:
                _refuse_taken([self.wanted.folder / f"{one.name}{ending}" for ending in ENDINGS])
            yield one

    def _batches(self, inputs: Iterator[Decoded]) -> Iterator[list[tuple[Decoded, Picture]]]:
        """As many images as the model is fed at once; large ones alone, failed ones not at all."""
        batch: list[tuple[Decoded, Picture]] = []
        for one in inputs:
            if isinstance(one.picture, DataError):
                self._fail(one.source, one.picture)
                continue
            if batch and (len(batch) == self.predictor.batch or one.picture.is_large or batch[0][1].is_large):
                yield batch
                batch = []
            batch.append((one, one.picture))
        if batch:
            yield batch

    def _predicted(self, batch: Sequence[tuple[Decoded, Picture]]) -> list[Finish]:
        """Predict; returned is what remains to be done for each, on any thread: write its files and give its line."""
        start = time.perf_counter()
        memory: dict[int, Path] = {}

        def allocate(index: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
            memory[index] = self.wanted.folder / f".{batch[index][0].source.name}.{os.getpid()}.partial"
            return _mapped(memory[index], shape)

        wants = self.wanted.probabilities is not None
        predictions = self.predictor.predict([picture for _, picture in batch], probabilities=wants, allocate=allocate)
        seconds = (time.perf_counter() - start) / len(batch)
        files = _Files(self.predictor.card, self.wanted)

        def finishing(index: int) -> Finish:
            one, picture = batch[index]
            times = {"decode": round(one.seconds, 6), "predict": round(seconds, 6)}
            return lambda: files.write(one.source, picture, predictions[index], memory.get(index), times)

        return [finishing(index) for index in range(len(batch))]

    def _fail(self, source: Input, error: DataError) -> None:
        log.warning("%s", error.problem)
        self.journal.add({"name": source.name, "image": str(source.path), **source.place, "error": error.problem})
        self.failed += 1
        self.first_failure = self.first_failure or error.problem


class _Files:
    """Writes what is wanted of one image."""

    def __init__(self, card: ModelCard, wanted: Wanted) -> None:
        self.card = card
        self.wanted = wanted
        self.colours = palette(card.classes, card.void)

    def write(
        self, source: Input, picture: Picture, result: Prediction, memory: Path | None, seconds: dict[str, float]
    ) -> dict[str, Any]:
        """All files of an image, the mask last; its line in the journal.

        Args:
            memory: the file that the probabilities lie in.
        """
        start = time.perf_counter()
        folder, labels = self.wanted.folder, result.labels
        facts: dict[str, Any] = {"name": source.name, "image": str(source.path), **source.place}
        facts["width"], facts["height"] = picture.width, picture.height
        if memory is not None and result.probabilities is not None:
            facts["probabilities"] = self._probabilities(source.name, result.probabilities, memory)
        if self.wanted.overlays:
            facts["overlay"] = f"{source.name}_overlay.png"
            facts["overlay_shrunk"], overlay = self._overlay(picture, labels)
            _write(folder / facts["overlay"], overlay)
        facts["mask"] = f"{source.name}.png"
        _write(folder / facts["mask"], mask_png(labels, self.colours))
        picture.close()
        counts = Image.fromarray(labels).histogram()
        found = [(one.name, count) for one, count in zip(self.card.classes, counts, strict=False) if count]
        facts["classes"] = [name for name, _ in found]
        facts["area"] = {name: round(count / labels.size, 6) for name, count in found}
        facts["pixels"] = dict(found)
        facts["seconds"] = {**seconds, "write": round(time.perf_counter() - start, 6)}
        return facts

    def _probabilities(self, name: str, planes: NDArray[np.float32], memory: Path) -> list[str]:
        if self.wanted.probabilities == "npy":
            assert isinstance(planes, np.memmap)
            planes.flush()
            os.replace(memory, self.wanted.folder / f"{name}_probabilities.npy")
            return [f"{name}_probabilities.npy"]
        try:
            files = [f"{name}_probability_{index:03d}.png" for index in range(len(planes))]
            for file, plane in zip(files, planes, strict=True):
                _write(self.wanted.folder / file, probability_png(plane))
            return files
        finally:
            memory.unlink(missing_ok=True)

    def _overlay(self, picture: Picture, labels: Pixels) -> tuple[int, bytes]:
        """By which factor it is shrunk, and the PNG."""
        channels = self.card.preprocessing.channels
        step = 1
        while -(-picture.height // step) * -(-picture.width // step) > OVERLAY_PIXELS:
            step += 1
        if step == 1:
            return 1, overlay_png(picture.pixels, labels, self.colours, channels)
        band = 64 * step
        shrunk = np.concatenate(
            [
                picture.rows(top, min(top + band, picture.height))[::step, ::step]
                for top in range(0, picture.height, band)
            ]
        )
        return step, overlay_png(shrunk, labels[::step, ::step], self.colours, channels)


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A new .npy file as float32 array, which takes no memory."""
    try:
        mapped: NDArray[np.float32] = np.lib.format.open_memmap(path, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
        with path.open("r+b") as file:  # a disk that fills up under a mapped file would end the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise BuildFolderError(
            f"cannot write {path}: {error.strerror}", fix="choose another -o folder, or free space"
        ) from error
    return mapped


def _refuse_collisions(paths: Sequence[Path], wanted: Wanted) -> None:
    """Raise before anything is written where masks would replace each other, the images, or what is there."""
    stems = Counter(path.stem for path in paths)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise DataError(f"two images would both give {min(twice)}.png", fix="predict them into two folders")
    targets = [wanted.folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS]
    given = {path.resolve() for path in paths}
    if any(target.resolve() in given for target in targets):
        raise BuildFolderError(
            f"masks in {wanted.folder} would replace the images themselves", fix="choose another -o folder"
        )
    if not wanted.overwrite and not (wanted.resume and (wanted.folder / NAME).exists()):
        _refuse_taken([*targets, wanted.folder / NAME])


def _refuse_taken(targets: Sequence[Path]) -> None:
    for target in targets:
        if target.exists():
            raise BuildFolderError(
                f"{target} exists already", fix="choose another -o folder, or give --overwrite, or --resume"
            )


@contextlib.contextmanager
def _larger_images() -> Iterator[None]:
    """Let Pillow open images that it takes for an attack; its limit is the whole process's."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
