"""Which engine families there are, what each can do here, and which one a build uses."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.backends import tensorrt, tensorrt_rtx
from pipeline.backends.base import Builder, Capabilities, RouteName
from pipeline.config import QUANTIZED, BackendName, Precision, Route
from pipeline.errors import UnsupportedError


@dataclass(frozen=True)
class Resolved:
    """What an engine is built by; without a builder there is only the typed graph, for ONNX Runtime."""

    builder: Builder | None
    route: RouteName
    capabilities: Capabilities

    def identity(self) -> dict[str, Any]:
        """What an engine depends on besides its graph and its settings, as a JSON value: a key for reuse."""
        known = self.capabilities
        # An engine built ahead of time is the same whatever GPU happens to be here.
        device = None if known.target_capabilities or known.device is None else asdict(known.device)
        return {
            "backend": known.name,
            "version": known.version,
            "route": self.route,
            "device": device,
            "targets": list(known.target_capabilities),
        }


def builders() -> list[Builder]:
    """Every family that builds engines, preferred first."""
    return [tensorrt.TensorrtBuilder(), tensorrt_rtx.RtxBuilder()]


def all_capabilities() -> list[Capabilities]:
    """What each family can do on this machine, preferred first; needs neither a GPU nor TensorRT."""
    return [*(builder.capabilities() for builder in builders()), _onnxruntime()]


def resolve(name: BackendName, precision: Precision, route: Route) -> Resolved:
    """The builder and the route of one engine; no builder with ``onnxruntime``, which has typed graphs alone.

    ``auto`` as the name is TensorRT where it can build here, else TensorRT-RTX. ``auto`` as the route is explicit for
    INT8 (the Q/DQ graph is what was checked, and builds several times faster than a calibrated one at equal latency)
    and wherever networks are strongly typed; FP32 and FP16 on a weakly typed TensorRT are implicit.

    Raises:
        UnsupportedError: the library is not installed, cannot build here, or lacks the route.
    """
    if name == "onnxruntime":
        if route == "implicit":
            raise _no_route("ONNX Runtime", ("explicit",))
        return Resolved(None, "explicit", _onnxruntime())
    refused = []
    for builder in builders():
        if name not in ("auto", builder.name):
            continue
        known = builder.capabilities()
        if not known.builds:
            refused.append(f"{builder.name}: {known.why_not_build}")
        elif route != "auto" and route not in known.routes:
            if name != "auto":
                raise _no_route(f"{builder.name} {known.version}", known.routes)
            refused.append(f"{builder.name}: it has no {route} route")
        else:
            return Resolved(builder, _route(route, precision, known), known)
    raise UnsupportedError(
        f"no engine can be built here with backend: {name}" if name == "auto" else f"{name} cannot build engines here",
        expected="TensorRT and a GPU, or TensorRT-RTX, which needs none",
        got="; ".join(refused),
        fix="install what is named above, or use --backend onnxruntime for typed graphs without engines",
    )


def _route(route: Route, precision: Precision, known: Capabilities) -> RouteName:
    if route != "auto":
        return route
    explicit = precision in QUANTIZED or known.strongly_typed or "implicit" not in known.routes
    return "explicit" if explicit else "implicit"


def _no_route(name: str, routes: tuple[RouteName, ...]) -> UnsupportedError:
    other = " or ".join(routes)
    return UnsupportedError(f"{name} has no such route", expected=f"route: {other}", fix=f"set engine.route to {other}")


def _onnxruntime() -> Capabilities:
    if importlib.util.find_spec("onnxruntime") is None:
        why = "ONNX Runtime is not installed; pip install onnxruntime"
        return Capabilities("onnxruntime", None, False, False, why_not_build=why, why_not_run=why)
    from pipeline.backends import onnxruntime

    return onnxruntime.capabilities()
