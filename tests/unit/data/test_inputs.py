"""What a user names, as pictures one after another."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import inputs
from pipeline.data.inputs import Input, decoded, find_files, inputs_of
from pipeline.data.pixels import Picture
from pipeline.errors import DataError, UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, a_01.jpg, a_02.jpg, a stack of 3 pages, notes.txt, and masks inside."""
    pixel = Image.fromarray(np.full((4, 5), 9, np.uint8))
    (tmp_path / "masks").mkdir()
    for name in ("b.png", "a_01.jpg", "a_02.jpg", "masks/b.png"):
        pixel.save(tmp_path / name)
    pages = [Image.fromarray(np.full((4, 5), page, np.uint8)) for page in range(3)]
    pages[0].save(tmp_path / "s.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_folders_globs_sequences_and_files(folder: Path) -> None:
    apart = folder / "masks"
    assert names(find_files([folder], apart)) == ["a_01.jpg", "a_02.jpg", "b.png", "s.tif"]
    assert names(find_files([folder / "**" / "*.png"], apart)) == ["b.png"]
    assert names(find_files([folder / "**" / "*.png"], folder / "other")) == ["b.png", "b.png"]
    assert names(find_files([folder / "a_%02d.jpg"], apart)) == ["a_01.jpg", "a_02.jpg"]
    assert names(find_files([folder / "b.png", folder, apart / "b.png"], apart)) == [
        "b.png",
        "a_01.jpg",
        "a_02.jpg",
        "s.tif",
        "b.png",
    ]


def test_links_are_the_files_that_they_lead_to(folder: Path) -> None:
    """Files that are linked to, and files of a folder that is, come once; masks do not come by another name."""
    (folder / "c.png").symlink_to("b.png")
    (folder / "d.png").symlink_to(folder / "masks" / "b.png")
    other = folder.with_name(f"{folder.name}-linked")
    other.symlink_to(folder)
    apart = other / "masks"
    assert names(find_files([folder, other], apart)) == ["a_01.jpg", "a_02.jpg", "b.png", "s.tif"]
    assert names(find_files([apart], folder / "masks")) == ["b.png"]


@pytest.mark.parametrize("name", ["none.png", "*.webp", "c_%d.png", "empty"])
def test_nothing_found(folder: Path, name: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no image|does not exist"):
        find_files([folder / name], folder / "masks")


def test_stacks_are_read_page_by_page_and_broken_files_say_so(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    paths = [folder / "broken.png", folder / "s.tif", folder / "gone.tif"]
    found = list(decoded(inputs_of(paths, "grey"), threads=2))
    assert [one.source.name for one in found] == ["broken", "s_0000", "s_0001", "s_0002", "gone"]
    assert [one.source.place for one in found[1:4]] == [{"page": 0}, {"page": 1}, {"page": 2}]
    assert isinstance(found[0].picture, DataError)
    assert isinstance(found[-1].picture, DataError)
    for page, one in enumerate(found[1:4]):
        assert isinstance(one.picture, Picture)
        assert (one.picture.pixels == page).all()


def test_few_large_pictures_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MOST_PIXELS_AHEAD", 45)  # two of 4 × 5 pixels, and the one that is asked for
    begun: list[str] = []

    def noting(one: Input) -> Input:
        def load() -> Picture:
            begun.append(one.name)
            return one.load()

        return dataclasses.replace(one, load=load)

    files = [folder / "s.tif", folder / "b.png", folder / "s.tif"]
    found = []
    for one in decoded(map(noting, inputs_of(files, "grey")), threads=8):
        found.append(one.source.name)
        assert len(begun) <= len(found) + 2
    assert found == ["s_0000", "s_0001", "s_0002", "b", "s_0000", "s_0001", "s_0002"]


class Capture:
    """OpenCV's reader of a video that announces more frames than it has."""

    announced, there = 3, 3

    def __init__(self, path: str) -> None:
        self.count = 0

    def get(self, key: int) -> float:
        return self.announced

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.count += 1
        blue = np.zeros((2, 2, 3), np.uint8)
        blue[..., 0] = self.count
        return (True, blue) if self.count <= self.there else (False, None)

    def release(self) -> None: ...


def test_videos_frame_by_frame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "v.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setitem(
        sys.modules, "cv2", types.SimpleNamespace(VideoCapture=Capture, CAP_PROP_FRAME_COUNT=7, __name__="cv2")
    )
    found = list(decoded(inputs_of([folder / "v.mp4"], "rgb")))
    assert [one.source.name for one in found] == ["v_000000", "v_000001", "v_000002"]
    assert isinstance(found[1].picture, Picture)
    assert found[1].picture.pixels[0, 0].tolist() == [0, 0, 2]
    monkeypatch.setattr(Capture, "announced", 30)
    *_, last = decoded(inputs_of([folder / "v.mp4"], "rgb"))
    assert isinstance(last.picture, DataError)
    assert "cut short" in last.picture.problem
    monkeypatch.setattr(Capture, "there", 0)
    (only,) = decoded(inputs_of([folder / "v.mp4"], "rgb"))
    assert "no frame" in str(only.picture)


def test_videos_need_a_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "v.mp4").write_bytes(b"")
    for name in ("imageio_ffmpeg", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="no decoder for the video"):
        list(inputs_of([folder / "v.mp4"], "rgb"))


def test_real_videos(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed: no video to decode")
    writer = ffmpeg.write_frames(str(tmp_path / "v.mkv"), (64, 32), fps=25)
    writer.send(None)
    for level in range(50):
        writer.send(np.full((32, 64, 3), level * 5, np.uint8))
    writer.close()
    found = list(decoded(inputs_of([tmp_path / "v.mkv"], "grey")))
    assert len(found) == 50
    assert all(isinstance(one.picture, Picture) and one.picture.pixels.shape == (32, 64, 1) for one in found)
    whole = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    assert isinstance(list(decoded(inputs_of([tmp_path / "cut.mkv"], "grey")))[-1].picture, DataError)
    (tmp_path / "none.mp4").write_bytes(b"no video at all")
    (only,) = decoded(inputs_of([tmp_path / "none.mp4"], "grey"))
    assert isinstance(only.picture, DataError)
