"""Frames of videos, with whichever decoder is installed: imageio-ffmpeg or OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.pixels import Picture, picture_of_array
from pipeline.data.preprocessing import Pixels
from pipeline.errors import DataError, UnsupportedError
from pipeline.slips import did_you_mean

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
# Of the frames that a video's header announces, those that may be missing: durations are rounded.
SLACK = 0.02


def frames(path: Path, channels: str) -> Iterator[Picture]:
    """The frames of a video in order, upright, as pictures of a model's channels.

    Raises:
        UnsupportedError: no decoder is installed.
        DataError: the file is missing or no video; after the last frame, where it has fewer than its header says.
    """
    if not path.is_file():
        raise DataError(f"the video {path} does not exist{did_you_mean(path)}", fix="check the path")
    decoder = decoder_for(path)
    read = _read_ffmpeg if decoder.__name__ == "imageio_ffmpeg" else _read_opencv
    count, expected = 0, 0.0
    for announced, frame in read(decoder, path):
        count, expected = count + 1, announced
        yield picture_of_array(frame, channels)
    if not count:
        raise DataError(f"the video {path} has no frame that can be decoded", fix="replace or remove the file")
    if count + 1 < expected * (1 - SLACK):
        raise DataError(
            f"the video {path} is cut short",
            expected=f"about {expected:.0f} frames, as its header says",
            got=f"{count}",
            fix="replace the file; the frames before the cut are done",
        )


def decoder_for(path: Path) -> Any:
    """The module that decodes videos.

    Args:
        path: of the video, for the message.

    Raises:
        UnsupportedError: none is installed.
    """
    for name in ("imageio_ffmpeg", "cv2"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise UnsupportedError(
        f"no decoder for the video {path} is installed",
        expected="imageio-ffmpeg or OpenCV",
        fix="pip install imageio-ffmpeg, or give the frames as images",
    )


def _read_ffmpeg(ffmpeg: Any, path: Path) -> Iterator[tuple[float, Pixels]]:
    """How many frames are announced, and each frame as RGB."""
    stream = ffmpeg.read_frames(str(path.resolve()))
    try:
        facts = next(stream)
        width, height = facts["size"]
        for frame in stream:
            yield facts["duration"] * facts["fps"], np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration) as error:
        raise DataError(f"the video {path} cannot be decoded: {_last_line(error)}", fix="replace the file") from error
    finally:
        stream.close()


def _read_opencv(cv2: Any, path: Path) -> Iterator[tuple[float, Pixels]]:
    """How many frames are announced, and each frame as RGB."""
    capture = cv2.VideoCapture(str(path.resolve()))
    try:
        announced = float(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield announced, frame[..., ::-1]
    finally:
        capture.release()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "it has no frame"
