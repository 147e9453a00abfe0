"""The calibration table and TensorRT's cache text."""

from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import sha256_bytes, to_json
from pipeline.calibration.report import CalibrationReport
from pipeline.calibration.table import HEADERS, CalibrationTable, check_table, read_cache, renamed
from pipeline.errors import CalibrationError

CACHE = "TRT-8600-EntropyCalibration2\nimage: 3c010a14\nconv: 1 + relu: 3d0869e5\n"
SMALLEST, LARGEST = 127 * 2.0**-126, float(np.finfo(np.float32).max)

tensor_names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1)
tables = st.builds(
    CalibrationTable,
    st.sampled_from(sorted(HEADERS)),
    st.dictionaries(tensor_names, st.floats(SMALLEST, LARGEST, width=32), max_size=8),
)


@given(tables, st.sampled_from([8600, 100300]))
def test_round_trip(table: CalibrationTable, version: int) -> None:
    text = table.to_cache(version)
    again = CalibrationTable.from_cache(text)
    assert again.algorithm == table.algorithm
    assert list(again.amax) == list(table.amax)
    assert [again.scale(name) for name in again.amax] == [table.scale(name) for name in table.amax]
    assert again.to_cache(version) == text
    for name in table.amax:
        assert again.amax[name] == pytest.approx(table.amax[name], rel=1e-6)


def test_format() -> None:
    table = CalibrationTable("entropy", {"image": 127.0, "conv_1": 63.5})
    assert table.to_cache(8600) == "TRT-8600-EntropyCalibration2\nimage: 3f800000\nconv_1: 3f000000\n"
    assert CalibrationTable("minmax", {}).to_cache(100300) == "TRT-100300-MinMaxCalibration\n"


def test_reads_what_tensorrt_writes() -> None:
    table = CalibrationTable.from_cache(CACHE)
    assert table.algorithm == "entropy"
    assert list(table.amax) == ["image", "conv: 1 + relu"]
    assert table.scale("image") == struct.unpack(">f", bytes.fromhex("3c010a14"))[0]


@pytest.mark.parametrize(
    "text", [CACHE.replace("\n", "\r\n"), CACHE.rstrip("\n"), CACHE.replace("3c010a14", "3C010A14")]
)
def test_line_ends_and_capitals(text: str) -> None:
    assert CalibrationTable.from_cache(text) == CalibrationTable.from_cache(CACHE)


def test_unknown_algorithms_keep_their_name() -> None:
    table = CalibrationTable.from_cache("TRT-8600-LegacyCalibration\na: 3c010a14\n")
    assert table.algorithm == "LegacyCalibration"
    assert table.to_cache(8600).startswith("TRT-8600-LegacyCalibration\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no header"),
        ("\n" + CACHE, "no header"),
        ("image: 3c010a14\n", "no header"),
        ("TRT-x-EntropyCalibration2\n", "no header"),
        ("{}", "no header"),
        (CACHE[:-3], "line 3"),
        (CACHE[: CACHE.index("3c01")], "line 2"),
        (CACHE + "image: 3c010a14\n", "line 4"),
        (CACHE + "\n", "line 4"),
        (CACHE + "more: 3c010a1g\n", "line 4"),
        (CACHE + "more: 3c010a141\n", "line 4"),
        (CACHE + "more 3c010a14\n", "line 4"),
        (CACHE + "more: 00000000\n", r"scale 0\.0 in line 4"),
        (CACHE + "more: 7f800000\n", "scale inf in line 4"),
        (CACHE + "more: 7fc00000\n", "scale nan in line 4"),
        (CACHE + "more: bc010a14\n", "scale -.* in line 4"),
    ],
    ids=str.strip,
)
def test_damaged_caches_are_refused(text: str, problem: str) -> None:
    with pytest.raises(CalibrationError, match=f"my.cache .*{problem}"):
        CalibrationTable.from_cache(text, "my.cache")


@given(st.text(max_size=300) | st.text(max_size=60).map(lambda text: CACHE + text))
def test_any_other_text_is_refused_or_read(text: str) -> None:
    with contextlib.suppress(CalibrationError):
        CalibrationTable.from_cache(text)


@pytest.mark.parametrize("amax", [0.0, -1.0, math.nan, math.inf, 1e300, 1e-44])
def test_ranges_without_a_scale_are_refused(amax: float) -> None:
    with pytest.raises(CalibrationError, match="tensor relu_3"):
        CalibrationTable("entropy", {"relu_3": amax})


def test_names_of_two_lines_are_refused() -> None:
    with pytest.raises(CalibrationError, match="does not fit a line"):
        CalibrationTable("entropy", {"a\nb": 1.0})


def test_tables_cannot_be_changed() -> None:
    source = {"a": 1.0}
    table = CalibrationTable("entropy", source)
    source["a"] = 2.0
    assert table.amax["a"] == 1.0
    with pytest.raises(TypeError):
        table.amax["a"] = 3.0  # type: ignore[index]


def test_read_cache(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_text(CACHE)
    assert read_cache(path) == CalibrationTable.from_cache(CACHE)
    with pytest.raises(CalibrationError, match=r"cannot read .*absent\.cache"):
        read_cache(tmp_path / "absent.cache")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="is no text"):
        read_cache(path)
    path.write_text(CACHE[:40])
    with pytest.raises(CalibrationError, match=str(path)):
        read_cache(path)


def test_check_table() -> None:
    table = CalibrationTable.from_cache(CACHE)
    own = ["image", "conv: 1 + relu"]
    assert check_table(table, own, own) == []
    assert check_table(table, ["image"], ["image", "up"]) == ["conv: 1 + relu"]
    with pytest.raises(CalibrationError, match=r"my\.cache lacks 2 of the ranges needed") as missing:
        check_table(table, [*own, "up", "logits"], [*own, "up", "logits"], "my.cache")
    assert missing.value.got == "2 missing: up, logits"
    with pytest.raises(CalibrationError, match=r"my\.cache belongs to another graph") as many:
        check_table(table, [f"t{n}" for n in range(9)], [f"t{n}" for n in range(9)], "my.cache")
    assert many.value.got == "9 missing: t0, t1, t2, t3, t4 and 4 more; 2 unknown: image, conv: 1 + relu"


def test_raw_names() -> None:
    table = CalibrationTable("minmax", {"x": 1.0, "/inc/Relu_output_0": 2.0, "kept": 3.0})
    names = {"inc.relu": "/inc/Relu_output_0", "absent": "nowhere"}
    assert dict(renamed(table, names).amax) == {"x": 1.0, "inc.relu": 2.0, "kept": 3.0}


def test_names_that_changed_places() -> None:
    """A table that holds every clean name speaks in these, though the raw export used them for other tensors."""
    table = CalibrationTable("minmax", {"a": 1.0, "b": 2.0})
    assert renamed(table, {"a": "b", "b": "a"}) == table


def write_with_report(folder: Path, name: str, report_name: str) -> Path:
    table = CalibrationTable("percentile", {"image": 1.0})
    path = folder / name
    path.write_text(table.to_cache(8600))
    report = CalibrationReport(
        "percentile", "cpu", 2048, 1, ("a",), "i", "g", "p", sha256_bytes(path.read_bytes()), (), 1.0, 1.0
    )
    (folder / report_name).write_bytes(to_json(report))
    return path


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("calibration.cache", "report.json"),
        ("calibration.cache", "calibration.cache.json"),
        ("my.cache", "my.cache.json"),
    ],
)
def test_the_report_beside_a_cache(tmp_path: Path, name: str, report: str) -> None:
    path = write_with_report(tmp_path, name, report)
    assert path.read_text().startswith("TRT-8600-EntropyCalibration2")
    table = read_cache(path)
    assert (table.algorithm, table.version) == ("percentile", 8600)
    assert table.report is not None
    assert table.report.graph_sha256 == "g"
    path.write_text(path.read_text().replace("3c", "3d"))  # one flipped bit, and still a number
    with pytest.raises(CalibrationError, match="is not what calibration wrote"):
        read_cache(path)


def test_the_report_of_another_cache_is_not_looked_at(tmp_path: Path) -> None:
    write_with_report(tmp_path, "calibration.cache", "report.json")
    (tmp_path / "old.cache").write_text(CACHE)
    assert read_cache(tmp_path / "old.cache").report is None


def test_another_stages_report_is_not_the_caches(tmp_path: Path) -> None:
    (tmp_path / "calibration.cache").write_text(CACHE)
    (tmp_path / "report.json").write_text('{"raw_sha256": "x"}')
    assert read_cache(tmp_path / "calibration.cache").report is None
