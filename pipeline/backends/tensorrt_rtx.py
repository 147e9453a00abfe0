"""TensorRT-RTX: engines built ahead of time, without a GPU, for RTX GPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.backends import cuda, nvinfer
from pipeline.backends.base import BuildRequest, BuildResult, Capabilities
from pipeline.errors import EngineError, PipelineError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt

INSTALL = "pip install 'tensorrt-rtx-cu13>=1.7' 'cuda-python>=13'"


def api() -> Any:
    """The module ``tensorrt_rtx``.

    Raises:
        UnsupportedError: not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        raise UnsupportedError("TensorRT-RTX is not installed", fix=INSTALL) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"TensorRT-RTX cannot be loaded: {error}", fix=f"install it anew: {INSTALL}") from error


def target_capabilities(trt: Any) -> tuple[str, ...]:
    """Compute capabilities that this library can build for, ascending: "7.5", "8.0", …"""
    offered = getattr(trt, "ComputeCapability", None)
    names = [name for name in getattr(offered, "__members__", {}) if name.startswith("SM")]
    numbers = sorted(int(name.removeprefix("SM")) for name in names)
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


class RtxBuilder:
    """Typed graphs to engines that run on every compute capability TensorRT-RTX knows, built on any machine."""

    name = "tensorrt-rtx"

    def capabilities(self) -> Capabilities:
        try:
            trt = api()
        except UnsupportedError as error:
            why = error.summary
            return Capabilities(self.name, None, False, False, why_not_build=why, why_not_run=why, routes=("explicit",))
        targets = target_capabilities(trt)
        device = None
        try:
            device = cuda.current_device()
            supported = device.compute_capability in targets
            why_not_run = (
                ""
                if supported
                else f"{device.name} has compute capability {device.compute_capability}, "
                f"TensorRT-RTX runs on {', '.join(targets)}; use --backend tensorrt on this GPU"
            )
        except PipelineError as error:
            why_not_run = error.summary
        return Capabilities(
            self.name,
            trt.__version__,
            builds=True,
            runs=not why_not_run,
            why_not_run=why_not_run,
            routes=("explicit",),
            device=device,
            target_capabilities=targets,
            strongly_typed=True,
        )

    def build(self, request: BuildRequest) -> BuildResult:
        if request.route != "explicit":
            raise EngineError(
                "TensorRT-RTX has no implicit route", expected="a typed graph", got=request.route, fix="route: explicit"
            )
        trt = api()

        def target(_: Any, __: Any, config: Any, ___: tensorrt.IOptimizationProfile | None) -> None:
            wanted = [f"SM{capability.replace('.', '')}" for capability in target_capabilities(trt)]
            if not wanted or not hasattr(config, "set_compute_capability"):
                return
            config.num_compute_capabilities = len(wanted)
            for index, name in enumerate(wanted):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                    raise EngineError(f"TensorRT-RTX refuses the target {name}", fix="install its newest version")

        # It times nothing while building: kernels are chosen on the GPU, when the engine first runs.
        return nvinfer.build(trt, request, strongly_typed=True, adjust=target)
