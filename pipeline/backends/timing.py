"""Timing caches on disk: TensorRT's bytes under a line that says whose they are, so that no other library reads them.

TensorRT 8.6.0 accepts caches of its own with an error in the log (``Myelin error from unknown graph``) and still builds
from them in 3 s instead of 41 s, so its log cannot tell a good cache from a damaged one. The line above can.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pipeline.artifacts import sha256_bytes, write_atomically
from pipeline.errors import BuildFolderError

log = logging.getLogger(__name__)


def read_timing_cache(path: Path, owner: str, notes: list[str]) -> bytes:
    """TensorRT's bytes; empty where there are none, or where what is there is damaged or another owner's.

    Such a file is set aside as ``<name>.damaged``, with a note.

    Args:
        owner: library version, GPU and driver, in words.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"the timing cache {path} could not be read ({error.strerror}); built without it")
        return b""
    line, _, data = content.partition(b"\n")
    if line == _line(owner, data):
        return data
    set_aside(path, "it is damaged, or of another GPU, driver or TensorRT", notes)
    return b""


def set_aside(path: Path, reason: str, notes: list[str]) -> None:
    """Move a timing cache out of the way, and note why."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
        where = f"set aside as {aside.name}"
    except OSError as error:
        where = f"could not be set aside ({error.strerror})"
    notes.append(f"the timing cache {path} was {where}: {reason}")
    log.warning("%s", notes[-1])


def write_timing_cache(path: Path, owner: str, data: bytes, notes: list[str]) -> None:
    """Keep a timing cache; one that cannot be kept costs time on the next build, nothing else, so it is a note."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _line(owner, data) + b"\n" + data)
    except (OSError, BuildFolderError) as error:
        notes.append(f"the timing cache could not be kept: {str(error).splitlines()[0]}")
        log.warning("%s", notes[-1])


def _line(owner: str, data: bytes) -> bytes:
    return json.dumps({"timing_cache_of": owner, "sha256": sha256_bytes(data)}).encode()
