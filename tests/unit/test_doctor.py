"""`unet-trt doctor`: abilities, reasons, and commands that install what is missing."""

from __future__ import annotations

import shlex
import sys

import pytest

from pipeline import doctor
from pipeline.backends.base import Capabilities
from pipeline.doctor import EXTRAS, Ability, abilities, examine_machine
from pipeline.printing import print_abilities
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_the_extras_are_those_of_the_project() -> None:
    stated = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, requirements in EXTRAS.items():
        assert [one.partition(";")[0].strip() for one in stated[name]] == list(requirements), name


def known(**changes: object) -> list[Capabilities]:
    absent = {"version": None, "builds": False, "runs": False, "why_not_build": "not installed", "why_not_run": "none"}
    there = {"version": "1.23", "builds": False, "runs": True}
    names = ("tensorrt", "tensorrt-rtx", "onnxruntime")
    facts = {name: {**(there if name == "onnxruntime" else absent)} for name in names}
    facts["tensorrt"].update(changes)
    return [Capabilities(name=name, **facts[name]) for name in names]  # type: ignore[arg-type]


def by_title(found: list[Ability]) -> dict[str, Ability]:
    return {one.what: one for one in found}


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "tool_version", lambda name: None)
    found = by_title(list(abilities(known())))
    assert {one.able for one in found.values()} == {True, False}
    torch = found["export and train torch networks, read .pth and .pt"]
    assert (torch.able, torch.why_not) == (False, "torch and onnxscript are not installed")
    assert shlex.split(torch.install) == [sys.executable, "-m", "pip", "install", "torch>=2.6", "onnxscript>=0.5"]
    assert "'tensorrt>=8.6'" in found["build TensorRT engines"].install
    assert "tensorrt-rtx-cu13" in found["build TensorRT-RTX engines"].install
    assert "imageio-ffmpeg" in found["predict videos"].install
    assert found["clean, calibrate and judge on the CPU"].by == "ONNX Runtime 1.23"


def test_installing_does_not_help_where_the_gpu_is_missing() -> None:
    found = by_title(list(abilities(known(version="8.6.0", why_not_build="no GPU"))))
    built = found["build TensorRT engines"]
    assert (built.able, built.by, built.why_not, built.install) == (False, "", "no GPU", "")
    able = by_title(list(abilities(known(version="8.6.0", builds=True, runs=True))))
    assert able["run TensorRT engines"].by == "TensorRT 8.6.0"


def test_the_table_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine_machine()
    print_abilities({**facts, "tensorrt": {**facts["tensorrt"], "GPU": "a GPU, driver 1"}})
    said = capsys.readouterr().out
    for one in facts["abilities"]:
        assert one["what"] in said
        assert one["install"] in said
        assert one["by"].partition(",")[0] in said
    assert "GPU: a GPU, driver 1" in said
    assert f"python {facts['python']}" in said
