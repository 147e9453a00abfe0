"""Engines whose inputs lie in memory as their kernels read them: several channels of a pixel side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.base import Arrays
from pipeline.backends.runner import EngineRunner


class FormattedRunner(EngineRunner):
    """A runner that packs what it is fed, (N, C, H, W), as (N, C / k, H, W, k) where a format has k channels."""

    def _allocate(self, name: str, size: int) -> None:
        channels = self.shape(name)[1]
        super()._allocate(name, size // channels * -(-channels // self._width(name)) * self._width(name))

    def _upload(self, feeds: Arrays) -> list[NDArray[Any]]:
        held = [_packed(feeds[spec.name], self._width(spec.name)) for spec in self.inputs]
        for spec, array in zip(self.inputs, held, strict=True):
            self._buffers[spec.name].upload(array, self._stream)
        return held

    def _width(self, name: str) -> int:
        return max(1, int(self._engine.get_tensor_components_per_element(name)))


def _packed(array: NDArray[Any], width: int) -> NDArray[Any]:
    batch, channels, height, columns = array.shape
    missing = -channels % width
    padded = np.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, -1, width, height, columns)
    return np.ascontiguousarray(np.moveaxis(grouped, 2, -1))
