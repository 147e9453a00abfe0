"""``predictions.jsonl``: a line of JSON for every image, which a broken run is resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_atomically
from pipeline.closing import Closing
from pipeline.errors import BuildFolderError

NAME = "predictions.jsonl"


class Journal(Closing):
    """The file with one line an image, written as images are finished; a context manager.

    Args:
        folder: it lies in, with the masks that it names.
        model: sha256 of the model's file, which every line says.
        resume: keep the lines of images whose masks are there. Others go: of images that failed, and half ones.

    Attributes:
        names: of the images that are done.
        existed: whether there was a journal to resume from.

    Raises:
        BuildFolderError: the file cannot be read or written, or the masks in the folder are another model's.
    """

    def __init__(self, folder: Path, model: str, *, resume: bool = False) -> None:
        self._path = folder / NAME
        self._model = model
        self.existed = resume and self._path.exists()
        kept = [line for line in self._lines() if (folder / str(line["mask"])).is_file()] if self.existed else []
        for line in kept:
            if line.get("model") != model:
                raise BuildFolderError(
                    f"the masks in {folder} are another model's",
                    expected=f"model {model[:12]}",
                    got=f"model {str(line.get('model'))[:12]}",
                    fix="resume with that model, choose another -o folder, or give --overwrite instead of --resume",
                )
        self.names = {str(line["name"]) for line in kept}
        write_atomically(self._path, "".join(map(_text, kept)).encode())
        try:
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, facts: Mapping[str, Any]) -> None:
        """Write the line of one image; once it is there the image is done."""
        try:
            self._file.write(_text({**facts, "model": self._model}))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> list[dict[str, Any]]:
        """Lines of images that succeeded; a half one at the end of a broken run's file is none."""
        try:
            texts = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise self._unwritable(error) from error
        lines: list[dict[str, Any]] = []
        for text in texts:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"name", "mask"} <= set(line):
                lines.append(line)
        return lines

    def _unwritable(self, error: OSError) -> BuildFolderError:
        return BuildFolderError(
            f"cannot read or write {self._path}: {error.strerror}",
            expected="a writable folder with space left",
            fix="choose another -o folder, or free space",
        )


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts) + "\n"  # in ASCII, since the names of files need not be valid text
