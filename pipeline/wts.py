"""Weights as ``.wts`` text, the format of tensorrtx and its relatives, which C++ reads without a library.

The first line is the number of tensors; then a line a tensor: its name, the number of its values, and each value as the
eight hex digits of its big-endian float32. There are two spaces before the first value, none behind the last. Shapes
and types are not kept: integers, such as BatchNorm's ``num_batches_tracked``, are written as floats.

Source: ``gen_wts.py`` of https://github.com/wang-xinyu/tensorrtx, which formats one value at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import write_atomically
from pipeline.calibration.table import some
from pipeline.errors import ModelError
from pipeline.slips import did_you_mean

log = logging.getLogger(__name__)

DIGITS = 8
WORD = DIGITS + 1
# From here on float32 skips integers.
EXACT_INTEGERS = 2**24


@dataclass(frozen=True)
class Form:
    """What ``.wts`` does not say of a tensor; ``dtype`` is numpy's name."""

    shape: tuple[int, ...]
    dtype: str


def write_wts(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write tensors of any shape; float32 keeps every bit, NaN payloads too, other types are converted to float32.

    Raises:
        ModelError: a name that holds white space, which would end it.
        BuildFolderError: the folder is missing, unwritable or full; the file is as it was.
    """
    lines = [b"%d\n" % len(tensors)]
    for name, tensor in tensors.items():
        if not name or any(character.isspace() for character in name):
            raise ModelError(f"{name!r} cannot be a name in a .wts file", expected="a name without white space")
        if tensor.dtype.kind in "iu" and tensor.size and np.abs(tensor).max() > EXACT_INTEGERS:
            log.warning("%s holds integers above 2^24, which .wts rounds to float32", name)
        values = np.ascontiguousarray(tensor, np.float32).reshape(-1)
        # Bytes are swapped as integers: a conversion of floats may change a signalling NaN.
        digits = values.view(np.uint32).astype(">u4").tobytes().hex(" ", 4).encode()
        lines.append(b"%b %d %b%b\n" % (name.encode(), values.size, b" " if values.size else b"", digits))
    write_atomically(path, b"".join(lines))


def read_wts(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor by name, flat, float32, in the file's order.

    Raises:
        ModelError: the file is missing or damaged; the line is named.
    """
    try:
        with path.open("rb") as file:
            announced = _announced(path, file.readline())
            tensors: dict[str, NDArray[np.float32]] = {}
            for number, line in enumerate(file, 2):
                if len(tensors) == announced:
                    if not line.strip():
                        continue
                    raise _damaged(path, number, f"{announced} tensors, as line 1 says", "one more line")
                name, values = _tensor(path, number, line)
                if name in tensors:
                    raise _damaged(path, number, "every name once", f"{name} again")
                tensors[name] = values
    except OSError as error:
        raise ModelError(
            f"cannot read the weights file {path}: {error.strerror}{did_you_mean(path)}",
            expected="a .wts file",
            fix="check the path",
        ) from error
    if len(tensors) < announced:
        raise _damaged(path, len(tensors) + 2, f"{announced} tensors, as line 1 says", f"the end after {len(tensors)}")
    return tensors


def shaped(flat: Mapping[str, NDArray[np.float32]], forms: Mapping[str, Form], path: Path) -> dict[str, NDArray[Any]]:
    """The tensors in the shapes and types of a template; views of ``flat`` where the type is float32.

    Tensors named ``num_batches_tracked`` may be absent on either side: some tools leave them out, and they change
    nothing in eval mode.

    Args:
        flat: of ``read_wts``.
        forms: the template.
        path: of the weights, for the message.

    Raises:
        ModelError: names or numbers of values differ.
    """
    missing = [name for name in forms if name not in flat and not _counts(name)]
    surplus = [name for name in flat if name not in forms and not _counts(name)]
    sizes = [
        f"{name} has {flat[name].size} values, not {_size(form)} {form.shape}"
        for name, form in forms.items()
        if name in flat and flat[name].size != _size(form)
    ]
    if missing or surplus or sizes:
        groups = [("missing", missing), ("unknown", surplus), ("other size", sizes)]
        raise ModelError(
            f"{path} holds other tensors than the template",
            got="; ".join(f"{title}: {some(found)}" for title, found in groups if found),
            fix="give the template, or the network's arguments, that these weights belong to",
        )
    result: dict[str, NDArray[Any]] = {}
    for name, form in forms.items():
        if name in flat:
            values = flat[name].reshape(form.shape)
            result[name] = values if form.dtype == "float32" else values.astype(form.dtype)
    return result


def _announced(path: Path, line: bytes) -> int:
    text = line.strip()
    if not text.isdigit():
        raise _damaged(path, 1, "the number of tensors", _shown(text))
    return int(text)


def _tensor(path: Path, number: int, line: bytes) -> tuple[str, NDArray[np.float32]]:
    name, _, rest = line.strip().partition(b" ")
    count, _, digits = rest.lstrip().partition(b" ")
    digits = digits.lstrip()
    if not count.isdigit():
        raise _damaged(path, number, "NAME COUNT VALUES", _shown(line.strip()))
    expected = f"{int(count)} values of {DIGITS} hex digits for {name.decode(errors='replace')}"
    if len(digits) != max(int(count) * WORD - 1, 0):
        raise _damaged(path, number, expected, f"{len(digits.split())} words in {len(digits)} characters")
    # Every ninth character is a space, and no other: fromhex would take spaces between any two bytes.
    grid = np.frombuffer(digits + b" ", np.uint8).reshape(-1, WORD) if digits else np.empty((0, WORD), np.uint8)
    spaces = grid == ord(" ")
    if spaces[:, :DIGITS].any() or not spaces[:, DIGITS].all():
        place = int(np.flatnonzero(spaces[:, :DIGITS].any(axis=1) | ~spaces[:, DIGITS])[0])
        raise _damaged(path, number, expected, f"value {place + 1} is {_shown(digits[place * WORD :])}")
    try:
        words = bytes.fromhex(digits.decode("ascii"))
        text = name.decode()
    except ValueError as error:
        raise _damaged(path, number, expected, f"{error}") from error
    return text, np.frombuffer(words, ">u4").astype(np.uint32).view(np.float32)


def _damaged(path: Path, line: int, expected: str, got: str) -> ModelError:
    return ModelError(f"{path} is damaged in line {line}", expected=expected, got=got, fix="write or copy it again")


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _size(form: Form) -> int:
    return int(np.prod(form.shape, dtype=np.int64))
