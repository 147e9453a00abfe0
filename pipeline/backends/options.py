"""The build options of ``engine:`` on whatever library is at hand; what it lacks is said, never skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.backends.trt_api import collected
from pipeline.config import EngineConfig
from pipeline.errors import UnsupportedError

if TYPE_CHECKING:
    import tensorrt

    from pipeline.backends.api_types import Api

# Options whose default is off, and their builder flags.
FLAGS = {"sparsity": "SPARSE_WEIGHTS", "version_compatible": "VERSION_COMPATIBLE", "refit": "REFIT"}
# Options that are numbers, and the attributes of the builder config.
NUMBERS = {"optimization_level": "builder_optimization_level", "timing_iterations": "avg_timing_iterations"}
# Likewise, of the builder itself.
BUILDER_NUMBERS = {"build_threads": "max_threads"}
# What an engine's manifest says of how it was built.
RECORDED = (
    "source",
    "fuse_resize",
    "workspace_mib",
    "optimization_level",
    "timing_iterations",
    "build_threads",
    "tf32",
    "sparsity",
    "hardware_compatible",
    "version_compatible",
    "refit",
    "profiling",
)
DEFAULTS = EngineConfig()
# Libraries of their own, gigabytes large, that a UNet engine does not need.
FOREIGN_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def configure(trt: Api, builder: tensorrt.Builder, config: tensorrt.IBuilderConfig, settings: EngineConfig) -> None:
    """Set every option on a builder and its config.

    Raises:
        UnsupportedError: naming the option, where this library does not have it or refuses it.
    """
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    for target, numbers in ((config, NUMBERS), (builder, BUILDER_NUMBERS)):
        for option, name in numbers.items():
            _set_number(trt, target, option, name, getattr(settings, option))
    if hasattr(trt.BuilderFlag, "TF32"):
        (config.set_flag if settings.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    elif settings.tf32:
        raise _lacking(trt, "tf32")
    for option, name in FLAGS.items():
        if getattr(settings, option):
            _set_flag(trt, config, option, name)
    if settings.hardware_compatible:
        _set_hardware_compatibility(trt, config)
    if hasattr(config, "profiling_verbosity"):
        names = {"detailed": trt.ProfilingVerbosity.DETAILED, "none": trt.ProfilingVerbosity.NONE}
        config.profiling_verbosity = names[settings.profiling]
    drop_foreign_tactics(trt, config)


def drop_foreign_tactics(trt: Api, config: tensorrt.IBuilderConfig) -> None:
    """Keep cuBLAS and cuDNN out of the engine, where this library still knows them."""
    sources = getattr(trt, "TacticSource", None)
    foreign = sum(1 << int(getattr(sources, name)) for name in FOREIGN_TACTICS if hasattr(sources, name))
    if foreign:
        config.set_tactic_sources(config.get_tactic_sources() & ~foreign)


def recorded(settings: EngineConfig) -> dict[str, bool | int | str]:
    """How an engine was built, for its manifest."""
    return {name: getattr(settings, name) for name in RECORDED}


def chosen(settings: EngineConfig) -> tuple[str, ...]:
    """The options that are not as by default, as the configuration names them: "engine.refit"."""
    return tuple(f"engine.{name}" for name in RECORDED if getattr(settings, name) != getattr(DEFAULTS, name))


def _set_number(trt: Api, target: Any, option: str, name: str, value: int) -> None:
    if hasattr(target, name):
        setattr(target, name, value)
    elif value != getattr(DEFAULTS, option):
        raise _lacking(trt, option)


def _set_flag(trt: Api, config: tensorrt.IBuilderConfig, option: str, name: str) -> None:
    flag: Any = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise _lacking(trt, option)
    _accepted(trt, option, lambda: config.set_flag(flag), lambda: config.get_flag(flag))


def _set_hardware_compatibility(trt: Api, config: tensorrt.IBuilderConfig) -> None:
    option = "hardware_compatible"
    if not hasattr(getattr(trt, "HardwareCompatibilityLevel", None), "AMPERE_PLUS"):
        raise _lacking(trt, option)
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def apply() -> None:
        config.hardware_compatibility_level = level

    _accepted(trt, option, apply, lambda: config.hardware_compatibility_level == level)


def _accepted(trt: Api, option: str, apply: Callable[[], None], holds: Callable[[], bool]) -> None:
    """Set an option and read it back: libraries refuse some of their own with a message alone."""
    with collected(trt) as messages:
        apply()
        kept = holds()
    if not kept:
        raise _lacking(trt, option, messages[0][3:].strip() if messages else "")


def _lacking(trt: Api, option: str, said: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"{trt.__name__} {trt.__version__} does not offer engine.{option}{f': {said}' if said else ''}",
        fix=f"leave engine.{option} at {getattr(DEFAULTS, option)!r}, or use another backend or version",
    )
