"""unet-trt: from a trained UNet to a TensorRT engine whose accuracy can be trusted.

The public names: what is not listed in ``__all__`` here may change between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config, load_config
    from pipeline.errors import PipelineError
    from pipeline.predictor import Prediction, Predictor
    from pipeline.run import Run

__all__ = ["Config", "PipelineError", "Prediction", "Predictor", "Run", "load_config"]
__version__ = "0.1.0"
_HOMES = {
    "Config": "config",
    "PipelineError": "errors",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "Run": "run",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    """``from pipeline import Predictor`` loads what that needs; ``import pipeline`` alone loads nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"pipeline.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
