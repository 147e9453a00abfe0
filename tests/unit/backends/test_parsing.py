"""The parser's verdict: every refused node, crashes, and machines without a parser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from pipeline.backends import nvinfer, parsing
from pipeline.backends.nvinfer import RefusedNode
from pipeline.backends.parsing import ParserVerdict, parse_verdict
from pipeline.errors import UnsupportedError
from pipeline.graph.io import save_model
from tests.unit.graph.builders import conv_net, model, weights

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_parser = pytest.mark.skipif(not RTX, reason="TensorRT-RTX is not installed")


def refused_net() -> ModelProto:
    """Three nodes that no TensorRT parser takes."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Resize", ["c", "", "s"], ["r"], name="small", mode="linear", antialias=1),
        helper.make_node("Conv", ["r", "w"], ["d"], name="again"),
        helper.make_node("Mystery", ["d"], ["m"], name="mine", domain="org.example"),
        helper.make_node("Det", ["d"], ["y"]),
    ]
    values = {"w": weights(3, 3, 1, 1), "s": np.array([1, 1, 0.5, 0.5], np.float32)}
    return model(nodes, {"x": (1, 3, 8, 8)}, {"y": (1, 3), "m": None}, values, opset=18, domains=["org.example"])


def named(refused: Sequence[RefusedNode]) -> list[tuple[str, str]]:
    return [(node.node, node.op) for node in refused]


@needs_parser
def test_a_good_graph_is_accepted_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(conv_net(), tmp_path / "m.onnx")
    verdict = parse_verdict(tmp_path / "m.onnx")
    assert (verdict.accepted, verdict.refused, verdict.note) == (True, (), "")
    assert verdict.parser in ("tensorrt", "tensorrt-rtx")
    assert verdict.version
    assert capfd.readouterr() == ("", "")


@needs_parser
def test_every_refused_node_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(refused_net(), tmp_path / "m.onnx")
    verdict = parse_verdict(tmp_path / "m.onnx")
    assert verdict.accepted is False
    assert [(node.node, node.op) for node in verdict.refused] == [
        ("small", "Resize"),
        ("mine", "Mystery"),
        ("4", "Det"),
    ]
    assert "Antialiasing is not supported" in verdict.refused[0].reason
    assert verdict.refused[2].reason.startswith("not supported")
    assert capfd.readouterr() == ("", "")


@needs_parser
def test_external_data_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.graph.io.ONE_FILE_BYTES", 0)
    monkeypatch.setattr("pipeline.graph.io.EXTERNAL_BYTES", 1)
    save_model(conv_net(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists()
    monkeypatch.chdir(tmp_path)
    assert parse_verdict(Path("m.onnx")).accepted is True


@needs_parser
def test_a_graph_that_crashes_the_parser_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], [], name="useless"), helper.make_node("Relu", ["x"], ["y"])]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, {"x": (1, 3)}, {"y": (1, 3)}).SerializeToString())
    verdict = parse_verdict(path)
    assert verdict.accepted is False
    assert "crashes the parser (SIG" in verdict.note
    assert verdict.parser


def absent(name: str) -> Any:
    raise UnsupportedError(f"{name} is not installed")


def judge(monkeypatch: pytest.MonkeyPatch, *parsers: Any) -> list[ParserVerdict]:
    said: list[ParserVerdict] = []
    monkeypatch.setattr(parsing, "PARSERS", parsers)
    parsing._judge(Path("m.onnx"), said.append)
    return said


def test_no_parser_is_said_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = [(name, lambda name=name: absent(name), bool) for name in ("A", "B")]
    (verdict,) = judge(monkeypatch, *parsers)
    assert verdict == ParserVerdict(note="no ONNX parser works here: A is not installed; B is not installed")


def test_the_first_parser_that_works_is_asked_and_names_itself_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(__version__="1.2")
    refused = (RefusedNode("n", "Op", "why"),)
    monkeypatch.setattr(nvinfer, "create_builder", lambda trt: trt)
    monkeypatch.setattr(nvinfer, "create_network", lambda trt, builder, strongly_typed: strongly_typed)
    monkeypatch.setattr(nvinfer, "read", lambda trt, network, model: refused if network else ())
    said = judge(monkeypatch, ("a", lambda: absent("a"), bool), ("b", lambda: library, lambda trt: True))
    assert said == [ParserVerdict("b", "1.2"), ParserVerdict("b", "1.2", False, refused)]


@needs_parser
def test_what_goes_wrong_in_the_process_is_a_note(tmp_path: Path) -> None:
    verdict = parse_verdict(tmp_path / "none.onnx")
    assert verdict.accepted is None
    assert "none.onnx" in verdict.note


class OldParser:
    """TensorRT 8.6's: one error and no more, no names in it."""

    num_errors = 1

    def parse_from_file(self, path: str) -> bool:
        return False

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(node=lambda: 1, desc=lambda: "no antialiasing", func=lambda: "importResize")

    def supports_operator(self, op: str) -> bool:
        return op not in ("Det", "Mystery")


def test_a_parser_that_stops_at_the_first_error_is_asked_for_the_operators_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(refused_net(), tmp_path / "m.onnx")
    monkeypatch.setattr(nvinfer, "logger", lambda trt: SimpleNamespace(messages=None))
    monkeypatch.setattr("pipeline.backends.trt_api.logger", nvinfer.logger)
    library = SimpleNamespace(__name__="old", OnnxParser=lambda network, log: OldParser())
    refused = nvinfer.read(library, None, tmp_path / "m.onnx")
    assert [(node.node, node.op) for node in refused] == [
        ("small", "Resize"),
        ("4", "Det"),
    ]  # a plugin may know Mystery
    assert refused[0].reason == "no antialiasing [importResize]"
    assert refused[1].reason == "the parser does not know this operator"


def test_types_of_refusals_survive_the_process_border() -> None:
    verdict = ParserVerdict("tensorrt", "8.6.0", False, (RefusedNode("", "", "no such opset"),), "note")
    assert parsing.VERDICT.validate_json(parsing.VERDICT.dump_json(verdict)) == verdict
    assert str(verdict.refused[0]) == "the model: no such opset"
