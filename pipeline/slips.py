"""What somebody probably meant who named something that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

# How much two file names have to have in common, 0 … 1, to be taken for a slip.
NEAR = 0.75


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that there is not: the nearest that there is; else nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean(path: Path) -> str:
    """The end of a sentence about a path that does not exist: the nearest in its folder; else nothing.

    Where the folder does not exist either, the nearest folder.
    """
    folder = path.parent
    try:
        if path.exists() or folder == path:
            return ""
        if not folder.is_dir():
            return did_you_mean(folder)
        names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    except OSError:  # a folder that may not be read
        return ""
    known = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(path.name.lower(), list(known), 1, NEAR)
    return f"; did you mean {folder / known[near[0]]}?" if near else ""
