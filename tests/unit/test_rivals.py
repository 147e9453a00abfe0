"""Who lines up for a benchmark, and why others do not."""

from typing import get_args

import numpy as np
import pytest

from pipeline import torch_process
from pipeline.artifacts import EngineManifest, sha256_bytes, to_json
from pipeline.config import Config, Rival, load_config
from pipeline.contenders import GpuContender
from pipeline.errors import ConfigError
from pipeline.reports import Accuracy
from pipeline.rivals import TORCH, Built, line_up
from tests.conftest import REPOSITORY
from tests.tiny_unet import save, tiny_unet

CELLS = REPOSITORY / "configs" / "cells.yaml"
EVERYTHING = ["benchmark.candidates=all"]


@pytest.fixture
def graph(tmp_path):
    return save(tiny_unet(), tmp_path / "clean.onnx")


@pytest.fixture
def engine(tmp_path):
    def make(name, backend="tensorrt", precision=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.engine").write_bytes(b"a plan")
        sha = sha256_bytes(b"a plan")
        manifest = EngineManifest(
            sha, "", None, "int8", "explicit", backend, "8.6.0", None, (), (), (), {}, None, 21.5, "none", "2026-11-21"
        )
        (folder / "manifest.json").write_bytes(to_json(manifest))
        known = Accuracy(0.998, 0.83, True) if precision else None
        return Built(name, folder / "model.engine", f"{backend} 8.6.0", lambda: None, precision, known)

    return make


def test_the_default_is_fp32_and_the_engines(graph, engine):
    found = line_up(load_config(CELLS), graph, [engine("int8", precision="int8")], wants_gpu=True)
    assert [each.name for each in found.contestants] == ["FP32 on ONNX Runtime, CPU", "int8"]
    assert found.absent == {}
    assert found.own_clocks == {}
    fp32, int8 = found.contestants
    assert (int8.bytes, int8.build_seconds, int8.accuracy.mean_iou, int8.required) == (6, 21.5, 0.83, True)
    with fp32.opens() as contender:
        assert contender.feed(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 3, 32, 32)
        assert contender.ran.startswith("onnxruntime ")


def test_all(graph, engine):
    built = [engine("int8", precision="int8"), engine("raw export, fp16")]
    found = line_up(load_config(CELLS, EVERYTHING), graph, built, wants_gpu=True)
    names = [each.name for each in found.contestants]
    assert names[1:3] == ["int8", "raw export, fp16"]
    assert names[3:-1] == [name for name, _ in TORCH.values()]
    assert names[-1] == "FP32 on ONNX Runtime, CUDA"
    assert [each.name for each in found.contestants if each.required] == ["FP32 on ONNX Runtime, CPU", "int8"]
    assert [each.name for each in found.contestants if each.compiles] == [n for n in names if "torch.compile" in n]
    assert set(found.own_clocks) == {(tool, each.name) for tool in ("Polygraphy", "trtexec") for each in built}


def test_without_engines_other_programs_have_nothing_to_time(graph):
    found = line_up(load_config(CELLS, EVERYTHING), graph, [], wants_gpu=False)
    assert {found.absent[tool] for tool in ("Polygraphy", "trtexec")} == {"no engine runs on this machine"}


def test_engines_of_another_library_are_not_theirs(graph, engine):
    found = line_up(load_config(CELLS, EVERYTHING), graph, [engine("int8", "tensorrt-rtx")], wants_gpu=True)
    assert found.own_clocks == {}
    assert found.absent["trtexec, int8"] == "it does not run engines of tensorrt-rtx"


def test_without_torch_every_candidate_of_it_is_named(graph, monkeypatch):
    monkeypatch.setattr(torch_process.importlib.util, "find_spec", lambda name: None)
    absent = line_up(load_config(CELLS, EVERYTHING), graph, [], wants_gpu=True).absent
    assert all("torch is not installed for this Python; name a Python" in absent[name] for name, _ in TORCH.values())


def test_an_onnx_file_is_nothing_for_torch(graph):
    settings = load_config(CELLS, EVERYTHING).model_dump(by_alias=True)
    config = Config.model_validate({**settings, "network": {"onnx": str(graph)}})
    absent = line_up(config, graph, [], wants_gpu=False).absent
    assert absent["torch eager, FP32"] == "the network is an ONNX file, which torch does not run"


def test_configuration():
    assert load_config(CELLS).benchmark.rivals == ()
    assert load_config(CELLS, EVERYTHING).benchmark.rivals == get_args(Rival)
    assert load_config(CELLS, ["benchmark.candidates=[trtexec]"]).benchmark.rivals == ("trtexec",)
    with pytest.raises(ConfigError, match=r"benchmark\.candidates"):
        load_config(CELLS, ["benchmark.candidates=[torch-int4]"])
    with pytest.raises(ConfigError, match=r"benchmark\.batches"):
        load_config(CELLS, ["benchmark.batches=[0]"])
    with pytest.raises(ConfigError, match=r"benchmark\.streams"):
        load_config(CELLS, ["benchmark.streams=[]"])


def test_memory_of_a_contender_on_the_gpu(monkeypatch):
    left = iter([1000, 400, 100])
    monkeypatch.setattr("pipeline.contenders.cuda.free_memory", lambda: (next(left), 1000))

    class Engine:
        class spec:
            name = "x"

        inputs = outputs = (spec,)

        def __call__(self, feeds):
            return feeds

    contender = GpuContender(Engine, "tensorrt")
    for _ in range(2):
        contender.feed(np.zeros(1))
    assert contender.gpu_bytes == 600  # by the first inference, whatever later ones take
