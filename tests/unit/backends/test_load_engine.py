"""What a manifest says is checked before an engine is deserialised, and each mismatch is one line."""

import json
import logging

import pytest

from pipeline import engines
from pipeline.artifacts import Device, to_json
from pipeline.backends import cuda
from pipeline.engines import load_engine, read_manifest
from pipeline.errors import EngineError, UnsupportedError
from tests.unit.backends.fakes import PLAN, FakeCuda, fake_trt, plan_manifest


@pytest.fixture
def trt(monkeypatch):
    library = fake_trt(FakeCuda().install(monkeypatch))
    monkeypatch.setattr(engines, "APIS", {"tensorrt": lambda: library, "tensorrt-rtx": lambda: library})
    return library


@pytest.fixture
def engine(trt, tmp_path):
    """A loadable engine; calling it changes the manifest."""

    def write(**changes):
        (tmp_path / "model.engine").write_bytes(PLAN)
        values = {**json.loads(to_json(plan_manifest())), **changes}
        (tmp_path / "manifest.json").write_text(json.dumps(values))
        return tmp_path / "model.engine"

    return write


@pytest.fixture
def never_deserialised(trt, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the engine was deserialised")

    monkeypatch.setattr(engines, "EngineRunner", fail)


def test_a_matching_engine_loads(engine):
    with load_engine(engine()) as runner:
        assert runner.inputs[0].shape == ("batch", 2)


@pytest.mark.parametrize("name", ["", "model.engine", "manifest.json"])
def test_a_manifest_is_found_from_engine_folder_or_itself(engine, name):
    assert read_manifest(engine().parent / name).precision == "fp16"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"backend_version": "8.6.0"}, "was built with tensorrt 8.6.0, installed is 1.2.3"),
        (
            {"device": {"name": "NVIDIA L4", "compute_capability": "8.6", "driver": "550.1"}},
            "was built on a NVIDIA L4, this machine has Fake GPU",
        ),
        (
            {"device": {"name": "Fake GPU", "compute_capability": "8.0", "driver": "550.1"}},
            "was built for compute capability 8.0, this machine has 8.6",
        ),
        (
            {"device": {"name": "Fake GPU", "compute_capability": "8.6", "driver": "570.0"}},
            "was built with driver 570.0, this machine has 550.1",
        ),
        (
            {"device": {"name": "Fake GPU", "compute_capability": "8.6", "driver": "CUDA 12.2"}},
            "was built with driver CUDA 12.2, this machine has 550.1",
        ),
        ({"device": None}, "names no GPU"),
        ({"engine_sha256": "0" * 64}, "is not the file that its manifest describes"),
        ({"schema_version": 99}, "has schema version 99, this program reads 1"),
        ({"schema_version": None}, "has schema version None"),
        ({"precision": "fp4"}, "is damaged or from another version"),
        ({"backend": "tvm"}, "names the backend tvm"),
    ],
)
def test_one_line_says_what_does_not_match(engine, never_deserialised, changes, line):
    path = engine(**changes)
    with pytest.raises(EngineError) as caught:
        load_engine(path)
    assert line in str(caught.value).splitlines()[0]
    assert caught.value.fix


@pytest.mark.parametrize("content", [PLAN[:-1], b"", PLAN + b"x"])
def test_truncated_or_edited_engines(engine, never_deserialised, content):
    path = engine()
    path.write_bytes(content)
    with pytest.raises(EngineError, match="changed, truncated or replaced"):
        load_engine(path)


def test_missing_files(engine, never_deserialised, tmp_path):
    with pytest.raises(EngineError, match="cannot read the engine"):
        load_engine(tmp_path / "none.engine")
    path = engine()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(EngineError, match=r"there is no .*manifest\.json"):
        load_engine(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_unreadable_manifests(engine, never_deserialised, tmp_path, text):
    path = engine()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match="not a readable manifest"):
        load_engine(path)


def test_library_not_installed(engine, never_deserialised, monkeypatch):
    def absent():
        raise UnsupportedError("TensorRT is not installed", fix="pip install tensorrt")

    monkeypatch.setitem(engines.APIS, "tensorrt", absent)
    with pytest.raises(UnsupportedError, match=r"needs tensorrt 1\.2\.3: TensorRT is not installed") as caught:
        load_engine(engine())
    assert caught.value.fix == "pip install tensorrt"


def test_no_gpu(engine, never_deserialised, monkeypatch):
    def none():
        raise UnsupportedError("this machine has no NVIDIA driver")

    monkeypatch.setattr(cuda, "current_device", none)
    with pytest.raises(UnsupportedError, match="no NVIDIA driver"):
        load_engine(engine())


def test_engines_built_ahead_of_time_run_on_their_targets_alone(engine, monkeypatch):
    path = engine(backend="tensorrt-rtx", device=None, target_capabilities=["8.6", "8.9"])
    load_engine(path).close()
    monkeypatch.setattr(cuda, "current_device", lambda: Device("NVIDIA H200", "9.0", "550.1"))
    with pytest.raises(
        UnsupportedError, match=r"runs on compute capability 8\.6, 8\.9, this GPU \(NVIDIA H200\) has 9\.0"
    ):
        load_engine(path)


@pytest.mark.parametrize("changes", [{"backend_version": "8.6.0"}, {"engine_sha256": "0" * 64}, {"schema_version": 2}])
def test_trust_turns_mismatches_into_warnings(engine, caplog, changes):
    path = engine(**changes)
    with caplog.at_level(logging.WARNING):
        load_engine(path, trust=True).close()
    assert caplog.records


def test_trust_needs_no_manifest(engine, tmp_path):
    path = engine()
    (tmp_path / "manifest.json").unlink()
    with load_engine(path, trust=True) as runner:
        assert runner.inputs[0].shape == ("x_0", 2)


@pytest.mark.parametrize("built", ["1.2.3", "1.2.0", "1.0.9.11"])
def test_version_compatible_engines_load_in_later_versions(engine, trt, built):
    trt.Runtime = lambda logger, make=trt.Runtime: runtimes.append(make(logger)) or runtimes[-1]
    runtimes = []
    load_engine(engine(backend_version=built, options={"version_compatible": True})).close()
    assert runtimes[0].engine_host_code_allowed


@pytest.mark.parametrize("built", ["1.2.4", "1.10.0", "2.0.0", "0.9"])
def test_but_in_no_earlier_version_nor_the_next_major_one(engine, never_deserialised, built):
    with pytest.raises(EngineError, match="was built with tensorrt"):
        load_engine(engine(backend_version=built, options={"version_compatible": True}))


@pytest.mark.parametrize(("built", "here"), [("535.0", "550.1"), ("550.0.99", "550.1"), ("CUDA 12.2", "CUDA 12.10")])
def test_a_newer_driver_is_warned_of(engine, caplog, monkeypatch, built, here):
    monkeypatch.setattr(cuda, "current_device", lambda: Device("Fake GPU", "8.6", here))
    load_engine(engine(device={"name": "Fake GPU", "compute_capability": "8.6", "driver": built})).close()
    (record,) = caplog.records
    assert f"was built with driver {built}, this machine has {here}" in record.getMessage()


def test_the_same_machine_is_not_worth_a_word(engine, caplog):
    load_engine(engine()).close()
    assert not caplog.records


def test_other_gpus_are_told_of_hardware_compatible_engines(engine, never_deserialised, monkeypatch):
    other = {"name": "NVIDIA H200", "compute_capability": "9.0", "driver": "550.1"}
    with pytest.raises(EngineError) as caught:
        load_engine(engine(device=other))
    assert "engine.hardware_compatible" in caught.value.fix
    monkeypatch.setattr(cuda, "current_device", lambda: Device("NVIDIA T4", "7.5", "550.1"))
    with pytest.raises(EngineError) as caught:
        load_engine(engine(device=other))
    assert "engine.hardware_compatible" not in caught.value.fix


OTHER = {"name": "NVIDIA H200", "compute_capability": "9.0", "driver": "600.1"}


@pytest.mark.parametrize("here", ["8.0", "8.6", "12.0"])
def test_hardware_compatible_engines_load_on_other_gpus(engine, caplog, monkeypatch, here):
    monkeypatch.setattr(cuda, "current_device", lambda: Device("Other GPU", here, "600.1"))
    load_engine(engine(device=OTHER, options={"hardware_compatible": True})).close()
    assert not caplog.records


def test_with_a_warning_where_the_driver_is_older(engine, caplog):
    load_engine(engine(device=OTHER, options={"hardware_compatible": True})).close()
    (record,) = caplog.records
    assert "was built with driver 600.1, this machine has 550.1" in record.getMessage()


@pytest.mark.parametrize("changes", [{"backend_version": "8.6.0"}, {"engine_sha256": "0" * 64}])
def test_nothing_else_is_forgiven_them(engine, never_deserialised, changes):
    with pytest.raises(EngineError):
        load_engine(engine(device=OTHER, options={"hardware_compatible": True}, **changes))


def test_but_on_none_before_ampere(engine, never_deserialised, monkeypatch):
    monkeypatch.setattr(cuda, "current_device", lambda: Device("NVIDIA T4", "7.5", "550.1"))
    with pytest.raises(EngineError, match="this machine has NVIDIA T4") as caught:
        load_engine(engine(device=OTHER, options={"hardware_compatible": True}))
    assert "8.0 (Ampere)" in caught.value.expected
