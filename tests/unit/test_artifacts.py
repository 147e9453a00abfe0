from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from pipeline.artifacts import Profile, TensorSpec, build_lock, from_json, replaced_folder, to_json, write_atomically
from pipeline.errors import BuildFolderError


def test_json_round_trip(tmp_path: Path) -> None:
    for value in (TensorSpec("image", ("batch", 3, 64, "width"), "float32"), Profile((1,), (2,), (3,))):
        (tmp_path / "a.json").write_bytes(to_json(value))
        assert from_json(type(value), tmp_path / "a.json") == value


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "image"}')
    with pytest.raises(BuildFolderError, match=r"a\.json is damaged"):
        from_json(TensorSpec, tmp_path / "a.json")
    with pytest.raises(BuildFolderError, match="cannot read"):
        from_json(TensorSpec, tmp_path / "b.json")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "no bytes")  # type: ignore[arg-type]
    with pytest.raises(BuildFolderError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "file", b"new")
    assert target.read_bytes() == b"old"


def test_replaced_folder_swaps_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    with replaced_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), replaced_folder(target) as folder:
        (folder / "b").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    with replaced_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]


def _hold(folder: Path, seconds: float) -> None:
    with build_lock(folder):
        (folder / "held").touch()
        time.sleep(seconds)


def test_second_process_waits_for_the_lock_and_names_its_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, 1.0))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with caplog.at_level("WARNING", "pipeline"):
        started = time.monotonic()
        with build_lock(tmp_path):
            waited = time.monotonic() - started
    other.join()
    assert waited > 0.3
    assert f"process {other.pid}" in caplog.text
