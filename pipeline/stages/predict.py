"""Images in, masks out: files for everything that a user names, with an engine or an ONNX file."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import ModelCard, process_name, write_atomically
from pipeline.backends.ahead import Ahead
from pipeline.backends.processes import Desk, Processes
from pipeline.data.inputs import THREADS, Decoded, Input, decoded, extent, find_files, inputs_of, real_paths
from pipeline.data.pictures import label_counts, mask_png, overlay_png, palette, probability_png
from pipeline.data.pixels import Picture
from pipeline.data.preprocessing import Pixels
from pipeline.data.videos import VIDEO_ENDINGS, decoder_for
from pipeline.errors import BuildFolderError, DataError
from pipeline.journal import NAME, Journal
from pipeline.predictor import GROUP, GROUP_PIXELS, Allocate, Apart, Prediction, Predictor, apart
from pipeline.progress import track

if TYPE_CHECKING:
    from pipeline.fleet.fleet import Fleet

log = logging.getLogger(__name__)
# Waiting for the disk after every mask would take longer than all else; a broken machine's masks are made anew.
_write = partial(write_atomically, durable=False)

# Images above Pillow's own limit are what tiles are for; above this one they do not fit a computer's memory either.
MOST_PIXELS = 1 << 32
# Of an overlay: larger images are shrunk for it.
OVERLAY_PIXELS = 1 << 26
ENDINGS = (".png", "_overlay.png")
# Images of a fleet's first portions, and how long later ones take: little is lost with a worker, and little time passes
# between two portions, when the last images of one are at the model and no others are decoded.
PORTION, PORTION_SECONDS = 64, 2.0
# Threads that decode, and as many that encode, in a process that has a core of its own: more wait for each other.
WORKER_THREADS = 1
# Images from which on processes are worth their start (on 16 cores beside an H200), and pixels of the largest: threads
# are kept busy by larger ones, of which each process would hold several.
FEWEST_FOR_PROCESSES, LARGEST_FOR_PROCESSES = 1000, 1 << 22
# Of the journal.
Lines = Generator[dict[str, Any], None, None]
# Writes the files of an image, and gives its line.
Finish = Callable[[], dict[str, Any]]


class Masks(Protocol):
    """What predicts: a ``Predictor``, or what stands for one that is elsewhere."""

    card: ModelCard
    batch: int
    streams: int

    @property
    def sha256(self) -> str: ...

    def predict(self, images: Sequence[Any], *, probabilities: bool, allocate: Allocate) -> list[Prediction]: ...


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


def predict(
    predictor: Masks,
    model_sha256: str,
    given: Sequence[str | Path],
    wanted: Wanted,
    fleet: Fleet | None = None,
    processes: Processes | None = None,
) -> Outcome:
    """For each image write ``<name>.png`` (class ids, palette), what else is wanted, and a line in the journal.

    An image that cannot be decoded is said in its line, and the others are done. Images are decoded, and files
    encoded, on threads of their own, or in processes. Every file is whole or absent, whenever the run ends.

    Args:
        model_sha256: of the model's file.
        given: images, folders, globs, numbered sequences, TIFF stacks, videos.
        fleet: whose workers do it, portion by portion, with the predictor as it is pickled; images and
            ``wanted.folder`` are on storage that all of them share. Lines come as portions are finished.
        processes: that decode and encode in place of threads, with a ``Predictor``. Large images and videos are left
            to threads, after all others. Lines come as images are finished.

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
            work = _Work(predictor, wanted, frozenset(journal.names), journal.existed)
            done = failed = 0
            first_failure = ""
            with contextlib.closing(work.lines(paths, fleet, processes)) as lines:
                for line in lines:
                    journal.add(line)
                    if "error" in line:
                        log.warning("%s", line["error"])
                        failed, first_failure = failed + 1, first_failure or str(line["error"])
                    else:
                        done += 1
            return Outcome(done, work.already, failed, first_failure)


def helpers_for(given: Sequence[str | Path], folder: Path, count: int | None = None) -> Processes | None:
    """Processes for ``predict`` with a model that leaves this machine's cores free; None where threads do as well,
    and where Python has no memory without a file name (``os.memfd_create``).

    Args:
        count: of processes; 0 for none. Default: one a core, where there are several and images enough.
    """
    if count is None:
        count = THREADS if THREADS > 1 and len(find_files(given, folder)) >= FEWEST_FOR_PROCESSES else 0
    return Processes(count, __name__) if count and hasattr(os, "memfd_create") else None


class _Work:
    """What is done with files: their lines in the journal come out of it. Pickled where the predictor can be.

    Args:
        earlier: names of images that are done.
        existed: whether there was a journal to resume from; then masks without a line are made anew.

    Attributes:
        already: images met that were done.
    """

    def __init__(self, predictor: Masks, wanted: Wanted, earlier: frozenset[str], existed: bool) -> None:
        self.predictor, self.wanted, self.earlier, self.existed = predictor, wanted, earlier, existed
        self.already = 0

    def lines(self, paths: Sequence[Path], fleet: Fleet | None, processes: Processes | None) -> Lines:
        if fleet is not None:
            return self.over(fleet, paths)
        if processes is not None and isinstance(self.predictor, Predictor):
            return self.beside(processes, self.predictor, paths)
        return self.here(paths)

    def here(self, paths: Sequence[Path]) -> Lines:
        run = _Run(self.predictor, self.wanted, self.earlier, refuse=not (self.wanted.overwrite or self.existed))
        yield from run.lines(track(paths, "predicting", len(paths)))
        self.already += run.already

    def beside(self, processes: Processes, predictor: Predictor, paths: Sequence[Path]) -> Lines:
        there, model = apart(predictor)
        job = _Job(
            there, predictor.batch, self.wanted, self.earlier, refuse=not (self.wanted.overwrite or self.existed)
        )
        names: set[str] = set()
        left = [path for path in paths if path.suffix.lower() in VIDEO_ENDINGS]
        given = [path for path in paths if path.suffix.lower() not in VIDEO_ENDINGS]
        is_done = False
        try:
            for result in processes.run(job, model, track(given, "predicting", len(given))):
                if isinstance(result, int):
                    self.already += result
                elif isinstance(result, Path):
                    left.append(result)
                elif result["name"] in names:
                    raise _named_twice(result["name"])
                else:
                    names.add(result["name"])
                    yield result
            is_done = True
        finally:
            if not is_done:
                processes.close()
                for name in processes.names:
                    _clear(self.wanted.folder, name)
        yield from self.here(left)

    def over(self, fleet: Fleet, paths: Sequence[Path]) -> Lines:
        names: set[str] = set()
        try:
            parts = fleet.parts(
                self,
                paths,
                PORTION,
                "predicting",
                writes=self.wanted.folder,
                seconds=PORTION_SECONDS,
                worked=lambda result: len(result[0]),
            )
            with contextlib.closing(parts):
                for part in parts:
                    if part.result is None:
                        (path,) = part.items
                        yield {"name": path.stem, "image": str(path), "error": f"{path}: {part.lost}"}
                        continue
                    lines, already = part.result
                    self.already += already
                    for line in lines:
                        if line["name"] in names:
                            raise _named_twice(line["name"])
                        names.add(line["name"])
                        yield line
        finally:
            for worker in fleet.lost_workers:
                _clear(self.wanted.folder, worker)

    def __call__(self, paths: Sequence[Path], again: bool) -> tuple[list[dict[str, Any]], int]:
        """The lines of a portion, and how many images of it were done already; on a worker.

        Args:
            again: a worker has died over the portion, and may have written some of it.
        """
        refuse = not (self.wanted.overwrite or self.existed or again)
        run = _Run(self.predictor, self.wanted, self.earlier, refuse=refuse, threads=WORKER_THREADS)
        with _larger_images():
            return list(run.lines(paths)), run.already


@dataclass(frozen=True)
class _Job:
    """What one of several processes does with images, as ``_Run``; to be pickled.

    Its results are lines, the number of images that were done already, and paths of large images, which are left
    alone.

    Args:
        together: images that fill a batch of the model's.
    """

    there: Apart
    together: int
    wanted: Wanted
    earlier: frozenset[str]
    refuse: bool

    def __call__(self, desk: Desk) -> None:
        def small() -> Iterator[Path]:
            for path in desk.items():
                if extent(path)[1] > LARGEST_FOR_PROCESSES:
                    desk.put(path)
                else:
                    yield path

        with _larger_images(), self.there.opened(desk.runner(self.there.model)) as predictor:
            run = _Run(
                predictor,
                self.wanted,
                self.earlier,
                refuse=self.refuse,
                threads=WORKER_THREADS,
                together=self.together,
            )
            for line in run.lines(small()):
                desk.put(line)
        desk.put(run.already)


class _Run:
    """One pass over images.

    Args:
        earlier: names of images to leave out.
        refuse: raise where there are files that would be replaced.
        threads: that decode, and as many that encode.
        together: images that fill a batch of the model's, where the predictor takes several batches at once.
    """

    def __init__(
        self,
        predictor: Masks,
        wanted: Wanted,
        earlier: frozenset[str],
        *,
        refuse: bool,
        threads: int = THREADS,
        together: int | None = None,
    ) -> None:
        self.predictor, self.wanted, self.earlier = predictor, wanted, earlier
        self.refuse, self.threads, self.together = refuse, threads, together
        self.already = 0
        self.names: set[str] = set()
        self.failures: deque[dict[str, Any]] = deque()
        self.half_written: set[Path] = set()  # files of probabilities

    def lines(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """Predict and write; each image's line in the journal, once its files are there."""
        channels = self.predictor.card.preprocessing.channels
        predicting = ThreadPoolExecutor(self.predictor.streams + 1, "predicting")
        writing = ThreadPoolExecutor(self.threads, "writing")
        groups: deque[Future[list[Finish]]] = deque()
        files: deque[Future[list[dict[str, Any]]]] = deque()

        def settled(most_groups: int, most_files: int) -> Iterator[dict[str, Any]]:
            """Wait until no more groups are predicted and written than these, in order."""
            while len(groups) > most_groups:
                files.append(writing.submit(_finished, groups.popleft().result()))
            while len(files) > most_files:
                yield from files.popleft().result()
            while self.failures:
                yield self.failures.popleft()

        try:
            with Ahead(inputs_of(paths, channels)) as inputs:
                for group in self._groups(decoded(self._new(inputs), self.threads)):
                    is_large = group[0][1].is_large
                    yield from settled(0 if is_large else self.predictor.streams, 0 if is_large else 2 * self.threads)
                    groups.append(predicting.submit(self._predicted, group))
            yield from settled(0, 0)
        finally:
            for pool in (predicting, writing):
                pool.shutdown(cancel_futures=True)
            for left in self.half_written:
                left.unlink(missing_ok=True)

    def _new(self, inputs: Iterator[Input]) -> Iterator[Input]:
        """Those that are not done yet."""
        for one in inputs:
            if one.name in self.names:
                raise _named_twice(one.name)
            self.names.add(one.name)
            if one.name in self.earlier:
                self.already += 1
                continue
            if self.refuse:
                _refuse_taken([self.wanted.folder / f"{one.name}{ending}" for ending in ENDINGS])
            yield one

    def _groups(self, inputs: Iterator[Decoded]) -> Iterator[list[tuple[Decoded, Picture]]]:
        """As many images as the model is fed at once, or several times as many small ones; large ones alone, failed
        ones not at all."""
        batch = self.together or self.predictor.batch
        most = batch * max(1, GROUP // batch) if self.predictor.streams > 1 or self.together else batch
        group: list[tuple[Decoded, Picture]] = []
        pixels = 0
        for one in inputs:
            if isinstance(one.picture, DataError):
                self._fail(one.source, one.picture)
                continue
            size = one.picture.height * one.picture.width
            is_full = len(group) == most or (len(group) % batch == 0 and pixels + batch * size > GROUP_PIXELS)
            if group and (is_full or one.picture.is_large or group[0][1].is_large):
                yield group
                group, pixels = [], 0
            group.append((one, one.picture))
            pixels += size
        if group:
            yield group

    def _predicted(self, batch: Sequence[tuple[Decoded, Picture]]) -> list[Finish]:
        """Predict; returned is what remains to be done for each, on any thread: write its files and give its line."""
        start = time.perf_counter()
        memory: dict[int, Path] = {}

        def allocate(index: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
            memory[index] = self.wanted.folder / f".{batch[index][0].source.name}.{process_name()}.partial"
            self.half_written.add(memory[index])
            return _mapped(memory[index], shape)

        wants = self.wanted.probabilities is not None
        predictions = self.predictor.predict([picture for _, picture in batch], probabilities=wants, allocate=allocate)
        seconds = (time.perf_counter() - start) / len(batch)
        files = _Files(self.predictor.card, self.wanted)

        def finishing(index: int) -> Finish:
            one, picture = batch[index]
            times = {"decode": round(one.seconds, 6), "predict": round(seconds, 6)}

            def finish() -> dict[str, Any]:
                line = files.write(one.source, picture, predictions[index], memory.get(index), times)
                if index in memory:
                    self.half_written.discard(memory[index])
                return line

            return finish

        return [finishing(index) for index in range(len(batch))]

    def _fail(self, source: Input, error: DataError) -> None:
        self.failures.append({"name": source.name, "image": str(source.path), **source.place, "error": error.problem})


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
        counts = label_counts(labels, len(self.card.classes))
        found = [(one.name, count) for one, count in zip(self.card.classes, counts, strict=True) if count]
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


def _finished(images: Iterable[Finish]) -> list[dict[str, Any]]:
    return [finish() for finish in images]


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
        raise _named_twice(min(twice))
    if not wanted.folder.exists():
        return
    targets = [wanted.folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS]
    taken = [target for target in targets if os.path.lexists(target)]
    if taken and not set(real_paths(paths)).isdisjoint(real_paths(taken)):
        raise BuildFolderError(
            f"masks in {wanted.folder} would replace the images themselves", fix="choose another -o folder"
        )
    if not wanted.overwrite and not (wanted.resume and (wanted.folder / NAME).exists()):
        _refuse_taken([*taken, wanted.folder / NAME])


def _named_twice(name: str) -> DataError:
    return DataError(f"two images would both give {name}.png", fix="predict them into two folders")


def _clear(folder: Path, process: str) -> None:
    """Remove what a process has not finished."""
    for left in folder.glob(f".*.{process}.partial"):
        left.unlink(missing_ok=True)


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
