"""The calibrator that serves a table, and the one that feeds images, over a fake library and GPU."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.artifacts import Device
from pipeline.backends import nvinfer, tensorrt
from pipeline.backends.base import BuildRequest
from pipeline.backends.tensorrt import TensorrtBuilder, cached_calibrator, calibrate_with_tensorrt
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig
from pipeline.errors import CalibrationError, EngineError, UnsupportedError
from tests.unit.backends.fakes import FakeCuda

TABLE = CalibrationTable("entropy", {"x": 127.0})


class Calibrator:
    pass


@pytest.fixture
def trt(monkeypatch):
    library = SimpleNamespace(
        __name__="tensorrt",
        __version__="8.6.0",
        IInt8EntropyCalibrator2=type("Entropy", (Calibrator,), {}),
        IInt8MinMaxCalibrator=type("MinMax", (Calibrator,), {}),
        BuilderFlag=SimpleNamespace(FP16="FP16", INT8="INT8", TF32="TF32"),
        NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
        MemoryPoolType=SimpleNamespace(WORKSPACE=0),
    )
    monkeypatch.setattr(tensorrt, "api", lambda: library)
    return library


@pytest.mark.parametrize(
    ("algorithm", "base", "header"),
    [
        ("entropy", "IInt8EntropyCalibrator2", "TRT-8600-EntropyCalibration2"),
        ("minmax", "IInt8MinMaxCalibrator", "TRT-8600-MinMaxCalibration"),
        ("LegacyCalibration", "IInt8EntropyCalibrator2", "TRT-8600-EntropyCalibration2"),
    ],
)
def test_a_table_becomes_this_tensorrts_cache(trt, algorithm, base, header):
    made = cached_calibrator(trt, CalibrationTable(algorithm, {"x": 127.0}))
    assert isinstance(made, getattr(trt, base))
    assert made.read_calibration_cache().decode() == f"{header}\nx: 3f800000\n"
    assert not made.asked
    assert made.get_batch(["x"]) is None
    assert made.asked


def int8(route="implicit", table=TABLE):
    return BuildRequest(model=None, precision="int8", route=route, config=EngineConfig(), table=table)


class Settings:
    def __init__(self):
        self.flags, self.int8_calibrator, self.network = set(), None, None
        self.set_flag = self.flags.add


@pytest.fixture
def built(monkeypatch):
    """Settings that a build ends with; the build itself is nothing but the calibrator's use."""
    settings = Settings()
    builder = SimpleNamespace(platform_has_fast_int8=True, platform_has_fast_fp16=True)

    def build(trt, request, *, strongly_typed, adjust, timing_owner):
        assert "Old GPU" in timing_owner
        adjust(builder, settings.network, settings, None)
        settings.strongly_typed = strongly_typed
        if settings.int8_calibrator is not None and settings.ignores_cache:
            settings.int8_calibrator.get_batch(["x"])
        return "result"

    settings.ignores_cache, settings.builder = False, builder
    monkeypatch.setattr(nvinfer, "build", build)
    monkeypatch.setattr("pipeline.backends.cuda.current_device", lambda: Device("Old GPU", "6.0", "550.1"))
    return settings


def test_implicit_int8_sets_both_flags_and_the_calibrator(trt, built):
    assert TensorrtBuilder().build(int8()) == "result"
    assert built.flags == {"FP16", "INT8"}
    assert b"x: 3f800000" in built.int8_calibrator.read_calibration_cache()


def test_explicit_int8_on_a_weakly_typed_library_sets_both_flags_and_no_calibrator(trt, built):
    TensorrtBuilder().build(int8("explicit", None))
    assert built.flags == {"FP16", "INT8"}
    assert built.int8_calibrator is None
    assert not built.strongly_typed


def test_explicit_int8_on_a_strongly_typed_library_sets_no_flags(trt, built):
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    TensorrtBuilder().build(int8("explicit", None))
    assert built.flags == set()
    assert built.strongly_typed


def test_an_ignored_cache_is_an_error(trt, built):
    built.ignores_cache = True
    with pytest.raises(CalibrationError, match="ignored the calibration cache"):
        TensorrtBuilder().build(int8())


def test_no_table(trt, built):
    with pytest.raises(CalibrationError, match="needs a calibration table"):
        TensorrtBuilder().build(int8(table=None))


def test_a_gpu_without_int8(trt, built, monkeypatch):
    built.builder.platform_has_fast_int8 = False
    monkeypatch.setattr("pipeline.backends.cuda.current_device", lambda: Device("Old GPU", "6.0", "550.1"))
    with pytest.raises(UnsupportedError, match="no fast INT8") as caught:
        TensorrtBuilder().build(int8())
    assert caught.value.got == "Old GPU"


def test_a_library_without_calibrators(trt, built):
    del trt.IInt8MinMaxCalibrator
    with pytest.raises(UnsupportedError, match="no implicit route"):
        TensorrtBuilder().build(int8())
    with pytest.raises(UnsupportedError, match="no calibrators"):
        calibrate_with_tensorrt(None, [], "entropy", EngineConfig())


class Layer:
    def __init__(self, name):
        self.name, self.precision = name, None


class TestHalfNodes:
    """Convolutions that stay FP16 on the implicit route."""

    @pytest.fixture
    def layers(self, trt, built):
        trt.DataType = SimpleNamespace(HALF="HALF")
        trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS = "OBEY"
        layers = [Layer(name) for name in ("down0", "relu", "head")]
        built.network = SimpleNamespace(num_layers=3, get_layer=layers.__getitem__)
        return layers

    def test_are_held_to_it(self, layers, built):
        TensorrtBuilder().build(replace(int8(), precision="mixed", half_nodes=("head",)))
        assert [layer.precision for layer in layers] == [None, None, "HALF"]
        assert built.flags == {"FP16", "INT8", "OBEY"}

    def test_are_not_spoken_of_where_there_are_none(self, layers, built):
        TensorrtBuilder().build(int8())
        assert built.flags == {"FP16", "INT8"}

    def test_have_to_be_layers(self, layers):
        with pytest.raises(EngineError, match="stay FP16 are no layers of the network: other"):
            TensorrtBuilder().build(replace(int8(), half_nodes=("head", "other")))

    def test_need_a_library_that_obeys(self, layers, trt):
        del trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS
        with pytest.raises(UnsupportedError, match="cannot hold single layers") as caught:
            TensorrtBuilder().build(replace(int8(), half_nodes=("head",)))
        assert "route: explicit" in caught.value.fix


class TestFeeding:
    """TensorRT's own calibration; ``serialize`` plays TensorRT: it asks until there is nothing more."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        return FakeCuda().install(monkeypatch)

    @pytest.fixture(autouse=True)
    def played(self, trt, gpu, monkeypatch):
        seen = SimpleNamespace(batches=[], settings=Settings(), cache=b"TRT-8600-EntropyCalibration2\nx: 3f800000\n")
        seen.settings.set_memory_pool_limit = lambda *_: None
        seen.settings.clear_flag = lambda flag: None
        seen.settings.builder_optimization_level = 3

        def serialize(trt, builder, network, config, notes):
            calibrator = config.int8_calibrator
            while calibrator.get_batch(["x"]) is not None:
                seen.batches.append(len(seen.batches))
            if seen.cache is not None:
                calibrator.write_calibration_cache(seen.cache)
            return b"plan"

        builder = SimpleNamespace(create_builder_config=lambda: seen.settings)
        spec = SimpleNamespace(name="x", shape=("batch", 2), dtype="float32")
        for name, made in {
            "create_builder": lambda trt: builder,
            "create_network": lambda *_, **__: None,
            "parse": lambda *_: None,
            "network_specs": lambda *_: ((spec,), ()),
            "add_profiles": lambda *_: None,
            "serialize": serialize,
        }.items():
            monkeypatch.setattr(nvinfer, name, made)
        return seen

    @staticmethod
    def batches(count, rows=1):
        return [{"x": np.full((rows, 2), i, np.float32)} for i in range(count)]

    def run(self, batches):
        return calibrate_with_tensorrt(None, batches, "entropy", EngineConfig())

    def test_every_batch_is_fed_and_the_cache_is_read(self, played, gpu):
        table = self.run(self.batches(3))
        assert len(played.batches) == 3
        assert dict(table.amax) == {"x": 127.0}
        assert table.algorithm == "entropy"
        assert played.settings.builder_optimization_level == 0
        assert played.settings.flags == {"INT8"}
        assert not gpu.live

    def test_an_error_in_the_data_surfaces(self, gpu):
        def broken():
            yield from self.batches(2)
            raise RuntimeError("image 3 is damaged")

        with pytest.raises(RuntimeError, match="image 3 is damaged"):
            self.run(broken())
        assert not gpu.live

    def test_batches_of_another_size(self):
        with pytest.raises(CalibrationError, match="batch 1 does not fit input x") as caught:
            self.run([*self.batches(1), *self.batches(1, rows=2)])
        assert caught.value.got == "float32 (2, 2)"

    def test_a_batch_of_another_type(self):
        with pytest.raises(CalibrationError, match="batch 0 does not fit"):
            self.run([{"x": np.zeros((1, 2))}])

    def test_a_batch_without_the_input(self):
        with pytest.raises(CalibrationError, match="lacks input x"):
            self.run([{"y": np.zeros((1, 2), np.float32)}])

    def test_no_batches(self):
        with pytest.raises(CalibrationError, match="no calibration images"):
            self.run([])

    def test_no_cache_written(self, played):
        played.cache = None
        with pytest.raises(CalibrationError, match="wrote no calibration cache"):
            self.run(self.batches(1))

    def test_a_refused_graph_is_still_an_engine_error(self, monkeypatch):
        def refuse(*_):
            raise EngineError("cannot build")

        monkeypatch.setattr(nvinfer, "serialize", refuse)
        with pytest.raises(EngineError, match="cannot build"):
            self.run(self.batches(1))
