"""unet-trt: from a trained UNet to a TensorRT engine whose accuracy can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``from pipeline import Predictor`` loads what that needs; ``import pipeline`` alone loads nothing."""
    if name in __all__:
        from pipeline import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
