"""What a user names to predict on: images, folders, globs, numbered sequences, TIFF stacks and videos, one by one."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipeline.data.dataset import IMAGE_ENDINGS
from pipeline.data.pixels import Picture, open_picture
from pipeline.data.preprocessing import UNDECODABLE
from pipeline.data.videos import VIDEO_ENDINGS, frames
from pipeline.errors import DataError
from pipeline.slips import did_you_mean

T = TypeVar("T")
# As decoding and encoding leave Python's lock to others for most of their time.
THREADS = min(16, os.cpu_count() or 1)
# Of pictures that are decoded ahead of their use; one that has more waits alone.
MOST_PIXELS_AHEAD = 1 << 28
STACK_ENDINGS = (".tif", ".tiff")
NUMBERED = re.compile(r"%0?(\d*)d")
MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Input:
    """One picture to be.

    Attributes:
        name: what files made of it are called, without ending.
        path: of the file that holds it.
        load: decodes it; raises DataError where that fails.
        pixels: that it will have; 0 where that cannot be told.
        place: page of a stack or frame of a video, from 0.
    """

    name: str
    path: Path
    load: Callable[[], Picture]
    pixels: int
    place: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """An input with its picture, or with what was wrong with it; ``seconds`` that decoding took."""

    source: Input
    picture: Picture | DataError
    seconds: float


def find_files(given: Sequence[str | Path], apart: Path) -> list[Path]:
    """The files behind arguments: files, folders, globs and numbered sequences such as ``frame_%04d.png``, in order.

    Folders are not searched below their own files, and neither they nor globs give files inside of ``apart``, where
    masks are written to. A file that is named twice comes once.

    Raises:
        DataError: nothing is there, or a folder, glob or sequence has no image and no video.
    """
    found: dict[str, Path] = {}
    for one in given:
        files = _files_of(Path(one), apart)
        for real, path in zip(real_paths(files), files, strict=True):
            found.setdefault(real, path)
    if not found:
        raise DataError("there is no image to predict", expected="images or videos, or folders of them")
    return list(found.values())


def real_paths(files: Iterable[Path]) -> Iterator[str]:
    """Each as ``os.path.realpath`` gives it. Folders, which files share, are resolved once: that takes longest."""
    folders: dict[str, str] = {}
    for path in files:
        if path.is_symlink():
            yield os.path.realpath(path)
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _real_folder(folder)
        yield folders[folder] + name


def inputs_of(paths: Iterable[Path], channels: str) -> Iterator[Input]:
    """The pictures in files, one after another: every page of a TIFF stack, every frame of a video.

    Files are opened as their turn comes; one that cannot be gives an input whose ``load`` raises.

    Args:
        channels: grey, rgb or bgr, as the model takes them.
    """
    for path in paths:
        if path.suffix.lower() in VIDEO_ENDINGS:
            yield from _frames(path, channels)
        else:
            yield from _pages(path, channels)


def decoded(inputs: Iterable[Input], threads: int = THREADS) -> Iterator[Decoded]:
    """Inputs with their pictures, in order, decoded on threads ahead of their use.

    Args:
        threads: twice as many pictures wait at most, and fewer of large ones.
    """
    work = ((one.pixels, partial(_decode, one)) for one in inputs)
    return on_threads(work, threads, 2 * threads, MOST_PIXELS_AHEAD)


def on_threads(
    work: Iterable[tuple[int, Callable[[], T]]], threads: int, most: int, most_size: int
) -> Generator[T, None, None]:
    """What calls give, in their order, while later ones are at work on threads.

    Args:
        work: a size of each call, and the call; read as there is room.
        most, most_size: calls that are under way or done and not yet taken, and their sizes together; one always may.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0

    def first() -> T:
        nonlocal held
        size, future = waiting.popleft()
        held -= size
        return future.result()

    try:
        for size, call in work:
            while len(waiting) >= most or (waiting and held + size > most_size):
                yield first()
            waiting.append((size, pool.submit(call)))
            held += size
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(source: Input) -> Decoded:
    start = time.perf_counter()
    try:
        picture: Picture | DataError = source.load()
    except DataError as error:
        picture = error
    except MemoryError:
        picture = DataError(f"there is not enough memory for the image {source.path}", fix="cut it into pieces")
    return Decoded(source, picture, time.perf_counter() - start)


def _files_of(given: Path, apart: Path) -> list[Path]:
    endings = (*IMAGE_ENDINGS, *VIDEO_ENDINGS)
    pattern = str(given)
    if given.is_dir():
        files, what = list(given.iterdir()), "folder"
    elif given.exists():
        return [given]
    elif NUMBERED.search(given.name):
        number = NUMBERED.search(given.name)
        assert number is not None
        width = int(number[1] or 0)
        digits = rf"\d{{{width},}}" if width else r"\d+"
        name = re.compile(re.escape(given.name[: number.start()]) + digits + re.escape(given.name[number.end() :]))
        beside = given.parent.iterdir() if given.parent.is_dir() else ()
        files, what = [path for path in beside if name.fullmatch(path.name)], "sequence"
    elif MAGIC.search(pattern):
        files, what = list(Path(given.anchor).glob(str(given.relative_to(given.anchor)))), "glob"
    else:
        raise DataError(f"the image {given} does not exist{did_you_mean(given)}", fix="check the path")
    files = [path for path in files if path.suffix.lower() in endings and not path.name.startswith(".")]
    files = sorted(path for path in files if not path.is_dir())
    inside = _real_folder(apart)
    if apart.exists() and _real_folder(given) != inside:
        files = [path for real, path in zip(real_paths(files), files, strict=True) if not real.startswith(inside)]
    if not files:
        raise DataError(f"the {what} {given} holds no image", expected=f"files ending in {', '.join(endings)}")
    return files


def _real_folder(folder: str | Path) -> str:
    """With a slash at its end."""
    return os.path.realpath(folder).rstrip("/") + "/"


def _pages(path: Path, channels: str) -> Iterator[Input]:
    count, pixels = extent(path)
    if count == 1:
        yield Input(path.stem, path, partial(open_picture, path, channels), pixels)
        return
    for page in range(count):
        load = partial(open_picture, path, channels, page)
        yield Input(f"{path.stem}_{page:04d}", path, load, pixels, {"page": page})


def extent(path: Path) -> tuple[int, int]:
    """Pages, and pixels of the first, as the header says; 1 and 0 of what cannot be read, which decoding says then."""
    try:
        with Image.open(path) as image:
            is_stack = path.suffix.lower() in STACK_ENDINGS
            return int(getattr(image, "n_frames", 1)) if is_stack else 1, image.width * image.height
    except UNDECODABLE:
        return 1, 0


def _frames(path: Path, channels: str) -> Iterator[Input]:
    count = 0
    try:
        for picture in frames(path, channels):
            pixels = picture.height * picture.width
            yield Input(f"{path.stem}_{count:06d}", path, partial(_same, picture), pixels, {"frame": count})
            count += 1
    except DataError as error:
        yield Input(f"{path.stem}_{count:06d}", path, partial(_failing, error), 0, {"frame": count})


def _same(picture: Picture) -> Picture:
    return picture


def _failing(error: DataError) -> Picture:
    raise error
