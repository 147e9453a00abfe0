"""The ``.wts`` format: to the letter of the tools that write it, to the bit, and what damaged files say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.wts import Form, read_wts, shaped, write_wts

# Quiet and signalling NaNs with payloads, both zeros, denormals, infinities.
BITS = [0x7FC00001, 0x7F800001, 0xFFABCDEF, 0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000]


def as_those_tools_write(tensors: dict[str, np.ndarray]) -> str:
    """The loop of tensorrtx's gen_wts.py."""
    text = f"{len(tensors)}\n"
    for name, tensor in tensors.items():
        values = tensor.reshape(-1)
        text += f"{name} {len(values)} "
        for value in values:
            text += " " + struct.pack(">f", float(value)).hex()
        text += "\n"
    return text


def test_the_text_is_that_of_those_tools(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {
        "conv.weight": rng.standard_normal((2, 3, 3, 3)).astype(np.float32),
        "bn.num_batches_tracked": np.array(123, np.int64),
        "one": np.array([-0.0], np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    write_wts(tmp_path / "a.wts", tensors)
    assert (tmp_path / "a.wts").read_text() == as_those_tools_write(tensors)


def test_every_bit_comes_back(tmp_path: Path) -> None:
    values = np.array(BITS, np.uint32).view(np.float32)
    write_wts(tmp_path / "a.wts", {"x": values.reshape(3, 3)})
    assert read_wts(tmp_path / "a.wts")["x"].view(np.uint32).tolist() == BITS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20), max_size=5))
def test_any_bits_come_back(tmp_path_factory: Any, tensors: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("wts") / "a.wts"
    write_wts(path, {f"t{i}": np.array(bits, np.uint32).view(np.float32) for i, bits in enumerate(tensors)})
    assert [array.view(np.uint32).tolist() for array in read_wts(path).values()] == tensors


@pytest.mark.parametrize(
    "text",
    [
        "1\nx 2 3f800000 BF800000\n",  # one space, capital digits
        "1\r\nx 2  3f800000 bf800000 \r\n\r\n",
        "1\nx 2  3f800000 bf800000",
    ],
)
def test_what_other_tools_write_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.wts").write_bytes(text.encode())
    assert read_wts(tmp_path / "a.wts")["x"].tolist() == [1, -1]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "number of tensors"),
        ("x 1  3f800000\n", 1, "number of tensors"),
        ("2\nx 1  3f800000\n", 3, "the end after 1"),
        ("1\nx 1  3f800000\ny 1  3f800000\n", 3, "one more line"),
        ("2\nx 1  3f800000\nx 1  3f800000\n", 3, "x again"),
        ("1\nx\n", 2, "NAME COUNT VALUES"),
        ("1\nx one  3f800000\n", 2, "NAME COUNT VALUES"),
        ("1\nx 2  3f800000 3f80\n", 2, "2 values of 8 hex digits for x"),
        ("1\nx 3  3f800000 3f800000\n", 2, "2 words"),
        ("1\nx 2  3f800000 3f8g0000\n", 2, "non-hexadecimal"),
        ("1\nx 2  3f800000 3f8 0000\n", 2, "value 2"),
        ("1\nx 2  3f8000003f8000000\n", 2, "value 1"),
        ("1\nx 1  3f80000é\n", 2, "2 values|1 values"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    (tmp_path / "a.wts").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"damaged in line {line}\n(.|\n)*({said})"):
        read_wts(tmp_path / "a.wts")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.wts: No such file"):
        read_wts(tmp_path / "none.wts")


@pytest.mark.parametrize("name", ["", "two words", "tab\tbed"])
def test_names_that_would_break_the_line_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be a name"):
        write_wts(tmp_path / "a.wts", {name: np.zeros(1, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_integers_that_float32_rounds_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_wts(tmp_path / "a.wts", {"n": np.array(2**24 + 1, np.int64)})
    assert "rounds" in caplog.text


def test_a_template_gives_shapes_and_types() -> None:
    flat = {"w": np.arange(6, dtype=np.float32), "n": np.array([7], np.float32)}
    made = shaped(flat, {"n": Form((), "int64"), "w": Form((2, 3), "float32")}, Path("a.wts"))
    assert list(made) == ["n", "w"]
    assert (made["n"].dtype, made["n"].shape, int(made["n"])) == (np.int64, (), 7)
    assert made["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_another_networks_template_is_refused() -> None:
    flat = {"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}
    with pytest.raises(ModelError) as caught:
        shaped(flat, {"a": Form((2, 2), "float32"), "c": Form((1,), "float32")}, Path("x.wts"))
    assert "missing: c; unknown: b; other size: a has 3 values, not 4 (2, 2)" in str(caught.value)


def test_counters_may_be_absent_on_either_side() -> None:
    counter, weight = "bn.num_batches_tracked", Form((1,), "float32")
    flat = {"w": np.zeros(1, np.float32)}
    assert set(shaped(flat, {"w": weight, counter: Form((), "int64")}, Path("x.wts"))) == {"w"}
    assert set(shaped({**flat, counter: np.zeros(1, np.float32)}, {"w": weight}, Path("x.wts"))) == {"w"}
