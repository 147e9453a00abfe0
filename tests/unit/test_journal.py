"""The journal of a broken run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import BuildFolderError
from pipeline.journal import NAME, Journal


def test_resuming_keeps_finished_images_alone(tmp_path: Path) -> None:
    with Journal(tmp_path, "m") as journal:
        for name in ("a", "b"):
            journal.add({"name": name, "mask": f"{name}.png"})
        journal.add({"name": "c", "error": "cannot be decoded"})
        journal.add({"name": "\udcff", "mask": "none.png"})
    (tmp_path / "a.png").touch()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"name": "d", "ma')
    with Journal(tmp_path, "m", resume=True) as journal:
        assert journal.existed
        assert journal.names == {"a"}
        journal.add({"name": "b", "mask": "b.png"})
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert lines == [{"name": name, "mask": f"{name}.png", "model": "m"} for name in ("a", "b")]
    with pytest.raises(BuildFolderError, match="another model's"):
        Journal(tmp_path, "other", resume=True)
    with Journal(tmp_path, "other") as journal:
        assert journal.names == set()
    assert (tmp_path / NAME).read_text() == ""
