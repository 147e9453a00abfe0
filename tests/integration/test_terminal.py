"""What commands say: plain text without a terminal, the next command, JSON for programs, the nearest name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.calibration.table import read_cache
from pipeline.cli import app
from pipeline.config import load_config
from pipeline.data.dataset import image_folder
from pipeline.data.preprocessing import read_image
from pipeline.engines import load_engine
from pipeline.errors import PipelineError
from pipeline.graph.io import load_model
from pipeline.inspection import inspect_file
from pipeline.networks import read_state_dict
from pipeline.slips import did_you_mean, nearest
from pipeline.wts import read_wts
from tests.conftest import REPOSITORY, Project, Result
from tests.tiny_unet import tiny_unet

Command = Callable[..., Result]
HERE = ("--backend", "onnxruntime")


@pytest.fixture
def graph(project: Project) -> Project:
    """The project with an ONNX file of three classes in place of its torch network, so that nothing takes long."""
    onnx.save(tiny_unet(size=64), project.root / "net.onnx")
    data = yaml.safe_load(project.config.read_text())["data"]
    mapped = {"classes": data["classes"][:3], "label_values": {0: 0, 1: 1, 2: 2, 3: 2}}
    project.edit(network={"onnx": "net.onnx"}, preprocessing={"height": 64, "width": 64}, data={**data, **mapped})
    return project


def said(project: Project, *arguments: str | Path) -> tuple[str, str]:
    """stdout and stderr of a command that succeeds, in this process."""
    made = CliRunner().invoke(app, [*map(str, arguments), "--build-dir", str(project.root / "build")])
    assert made.exit_code == 0, (made.exception, made.output)
    return made.stdout, made.stderr


def test_text_alone_where_no_terminal_is(graph: Project, unet_trt: Command) -> None:
    ci = {"GITHUB_ACTIONS": "true", "CI": "true"}
    ran = unet_trt("export", "-c", graph.config, **ci)
    assert ran.code == 0, ran.err
    assert "next: unet-trt clean -c" in ran.err
    slip = unet_trt("exprot", **ci)
    assert (slip.code, "Did you mean 'export'?" in slip.err) == (2, True), slip.err
    doctor = unet_trt("doctor", **ci)
    assert "next: unet-trt init CHECKPOINT IMAGES" in doctor.err
    for result in (ran, slip, doctor, unet_trt("--help", **ci)):
        assert {character for character in result.out + result.err if ord(character) < 32} == {"\n"}


def test_every_command_suggests_the_next_in_the_same_folder_and_json_comes_alone(graph: Project) -> None:
    build = graph.root / "build"
    common = ("-c", graph.config, "--set", "calibrate.images=2")
    again = f"-c {graph.config} --build-dir {build} --set calibrate.images=2"
    for command, suggested in (
        (("export",), f"clean {again}"),
        (("clean",), f"calibrate {again}"),
        (("calibrate",), f"engine {again} -p int8"),
        (("engine", "-p", "fp32", *HERE), f"validate {again} -p fp32 --backend onnxruntime"),
        (("benchmark", "-p", "fp32", *HERE), f"report {again} -p fp32 --backend onnxruntime"),
        (("run", "-p", "fp32", *HERE), f"predict {build}/tiny/clean/model.onnx IMAGES -o masks/"),
    ):
        assert f"next: unet-trt {suggested}\n" in said(graph, command[0], *common, *command[1:])[1]
    for command, check in (
        (("export",), lambda found: found["opset"] == 17),
        (("engine", "-p", "fp32", *HERE), lambda found: found["fp32"]["onnx"].endswith("fp32/model.onnx")),
        (("report", "-p", "fp32", *HERE), lambda found: found["precisions"]["fp32"]["passed"]),
        (("run", "-p", "fp32", *HERE), lambda found: found[0]["passed"]),
    ):
        out, err = said(graph, command[0], *common, *command[1:], "--json")
        assert check(json.loads(out))
        assert "next: " not in err


def test_engines_are_listed_when_they_are_built(graph: Project) -> None:
    common = ("engine", "-c", graph.config, "-p", "fp32")
    assert "│ typed graph alone, for ONNX Runtime │" in said(graph, *common, *HERE)[1]
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine is built")
    out, err = said(graph, *common, "--route", "explicit", "--backend", "tensorrt-rtx")
    assert out.endswith("engine/fp32/model.engine\n")
    assert "│ tensorrt-rtx 1." in err
    assert err.endswith("-p fp32 --backend tensorrt-rtx --set engine.route=explicit\n")


def test_json_of_commands_without_a_build_folder(graph: Project) -> None:
    def parsed(*arguments: str | Path) -> Any:
        made = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert made.exit_code == 0, (made.exception, made.output)
        return json.loads(made.stdout)

    weights, target = graph.root / "weights.safetensors", graph.root / "weights.wts"
    assert parsed("weights", "convert", weights, target)["tensors"] == 110
    said(graph, "export", "-c", graph.config)
    model, out = graph.root / "build" / "tiny" / "export" / "model.onnx", graph.root / "masks"
    assert parsed("predict", model, graph.root / "data" / "val" / "images", "-o", out)["done"] == 3
    baseline = ("--baseline", graph.root / "baseline.json", "--build-dir", graph.root / "build", *HERE)
    compared = parsed("regress", "-c", graph.config, "-p", "fp32", *baseline, "--update")
    assert compared["differences"]
    assert parsed("doctor")["abilities"]


def test_weights_that_were_trained_say_so_as_json(project: Project) -> None:
    pytest.importorskip("torch", reason="torch is not installed: nothing to train")
    sets = [part for one in ("train.steps=1", "train.batch=1") for part in ("--set", one)]
    target = project.root / "new.safetensors"
    made = CliRunner().invoke(app, ["train", "-c", str(project.config), "-o", str(target), *sets, "--json"])
    assert made.exit_code == 0, (made.exception, made.output)
    assert json.loads(made.stdout)["steps"] == 1


def test_slips_in_names() -> None:
    assert nearest("int9", ["fp32", "int8"]) == "; did you mean 'int8'?"
    assert nearest("zzz", ["fp32", "int8"]) == ""


def test_slips_in_paths(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "Cells.yaml").touch()
    assert did_you_mean(tmp_path / "photos" / "cels.yaml") == f"; did you mean {tmp_path}/photos/Cells.yaml?"
    assert did_you_mean(tmp_path / "photo" / "cells.yaml") == f"; did you mean {tmp_path}/photos?"
    assert did_you_mean(tmp_path / "photos" / "Cells.yaml") == ""
    assert did_you_mean(tmp_path / "photos" / "other.txt") == ""
    assert did_you_mean(Path("/none/of/these")) == ""


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("cells.yaml", load_config),
        ("weights.safetensors", read_state_dict),
        ("weights.wts", read_wts),
        ("model.onnx", load_model),
        ("model.onnx", inspect_file),
        ("calibration.cache", read_cache),
        ("model.engine", load_engine),
        ("image.png", lambda path: read_image(path, "grey")),
        ("images", lambda path: image_folder(path, "grey")),
    ],
)
def test_files_that_do_not_exist_bring_up_the_nearest_that_does(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / name).touch()
    stem, dot, ending = name.partition(".")
    with pytest.raises(PipelineError, match=f"did you mean .*{name}") as raised:
        read(tmp_path / f"{stem[:-1]}{dot}{ending}")
    assert raised.value.exit_code == 2


def test_slips_in_values_of_a_configuration() -> None:
    with pytest.raises(PipelineError, match="did you mean 'tensorrt'"):
        load_config(REPOSITORY / "configs" / "cells.yaml", ["engine.backend=tensort"])
    with pytest.raises(PipelineError, match="did you mean 'calibrate'"):
        load_config(REPOSITORY / "configs" / "cells.yaml", ["calibrat.images=3"])
