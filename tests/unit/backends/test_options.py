"""Build options on libraries that have them, lack them, or refuse them."""

from types import SimpleNamespace

import pytest

from pipeline.backends.options import RECORDED, chosen, configure, recorded
from pipeline.backends.trt_api import logger
from pipeline.config import EngineConfig
from pipeline.errors import UnsupportedError


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Config:
    """Remembers what is set; refuses the flags in ``refused``, with a message."""

    def __init__(self, trt):
        self.trt, self.flags, self.refused = trt, {"TF32"}, set()
        self.builder_optimization_level, self.avg_timing_iterations, self.profiling_verbosity = 3, 1, None
        self._level = "NONE"

    def set_memory_pool_limit(self, pool, size):
        self.pool = (pool, size)

    def set_flag(self, flag):
        if flag in self.refused:
            logger(self.trt).log(ILogger.ERROR, f"[a.cpp::b::3] {flag} is not possible")
        else:
            self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def get_flag(self, flag):
        return flag in self.flags

    @property
    def hardware_compatibility_level(self):
        return self._level

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level):
        if "level" in self.refused:
            logger(self.trt).log(ILogger.WARNING, "setHardwareCompatibilityLevel() is unsupported.")
        else:
            self._level = level


@pytest.fixture
def trt(request):
    flags = ("TF32", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "REFIT")
    return SimpleNamespace(
        __name__=f"trt_{request.node.name}",
        __version__="8.6.0",
        ILogger=ILogger,
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED", NONE="NONE"),
        HardwareCompatibilityLevel=SimpleNamespace(NONE="NONE", AMPERE_PLUS="AMPERE_PLUS"),
    )


@pytest.fixture
def config(trt):
    return Config(trt)


@pytest.fixture
def builder():
    return SimpleNamespace(max_threads=1)


def test_defaults(trt, builder, config):
    configure(trt, builder, config, EngineConfig())
    assert config.flags == set()
    assert config.profiling_verbosity == "DETAILED"
    assert config.hardware_compatibility_level == "NONE"
    assert config.pool == ("WORKSPACE", 4096 << 20)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("tf32", "TF32"),
        ("sparsity", "SPARSE_WEIGHTS"),
        ("version_compatible", "VERSION_COMPATIBLE"),
        ("refit", "REFIT"),
    ],
)
def test_flags(trt, builder, config, option, flag):
    configure(trt, builder, config, EngineConfig(**{option: True}))
    assert config.flags == {flag}


def test_levels(trt, builder, config):
    settings = EngineConfig(
        hardware_compatible=True, profiling="none", optimization_level=5, timing_iterations=8, build_threads=4
    )
    configure(trt, builder, config, settings)
    assert config.avg_timing_iterations == 8
    assert config.hardware_compatibility_level == "AMPERE_PLUS"
    assert config.profiling_verbosity == "NONE"
    assert config.builder_optimization_level == 5
    assert builder.max_threads == 4


@pytest.mark.parametrize("option", ["tf32", "sparsity", "version_compatible", "refit", "hardware_compatible"])
def test_what_the_library_does_not_know(trt, builder, config, option):
    trt.BuilderFlag, trt.HardwareCompatibilityLevel = SimpleNamespace(), SimpleNamespace()
    configure(trt, builder, config, EngineConfig())
    with pytest.raises(UnsupportedError, match=rf"^trt_.* 8\.6\.0 does not offer engine\.{option}") as caught:
        configure(trt, builder, config, EngineConfig(**{option: True}))
    assert f"leave engine.{option} at False" in caught.value.fix


@pytest.mark.parametrize(
    ("option", "attribute"),
    [
        ("optimization_level", "builder_optimization_level"),
        ("timing_iterations", "avg_timing_iterations"),
        ("build_threads", "max_threads"),
    ],
)
def test_a_number_that_the_library_does_not_know(trt, builder, config, option, attribute):
    delattr(builder if hasattr(builder, attribute) else config, attribute)
    configure(trt, builder, config, EngineConfig())
    with pytest.raises(UnsupportedError, match=rf"does not offer engine\.{option}"):
        configure(trt, builder, config, EngineConfig(**{option: 4}))


def test_what_the_library_knows_and_refuses(trt, builder, config):
    config.refused = {"REFIT", "level"}
    with pytest.raises(UnsupportedError, match=r"engine\.refit: .*REFIT is not possible"):
        configure(trt, builder, config, EngineConfig(refit=True))
    with pytest.raises(UnsupportedError, match=r"engine\.hardware_compatible: setHardware.* is unsupported"):
        configure(trt, builder, config, EngineConfig(hardware_compatible=True))


def test_what_is_recorded():
    settings = EngineConfig(refit=True, workspace_mib=512, qdq="shared")
    assert tuple(recorded(settings)) == RECORDED
    assert recorded(settings)["refit"] is True
    assert chosen(settings) == ("engine.workspace_mib", "engine.refit")
    assert chosen(EngineConfig()) == ()
