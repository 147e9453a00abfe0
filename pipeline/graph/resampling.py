"""What a Resize computes along one axis, asked of ONNX Runtime itself, so that no rounding has to be guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.errors import UnsupportedError
from pipeline.graph.base import constant_value, input_at

ROI, SCALES, SIZES = 1, 2, 3
CROP = "tf_crop_and_resize"
DEFAULTS: dict[str, Any] = {
    "mode": "nearest",
    "coordinate_transformation_mode": "half_pixel",
    "nearest_mode": "round_prefer_floor",
    "antialias": 0,
    "exclude_outside": 0,
    "extrapolation_value": 0.0,
    "keep_aspect_ratio_policy": "stretch",
}
# Attributes that concern the whole node, not one of its axes.
WHOLE = ("axes", "keep_aspect_ratio_policy")


@dataclass(frozen=True)
class Axis:
    """One axis of a Resize: its size before (None where dynamic), the constant factor, the size after."""

    source: int | None
    scale: np.float32 | None
    size: int | None

    @property
    def still(self) -> bool:
        """Whether the axis keeps its size; ONNX Runtime then copies it in every mode but tf_crop_and_resize."""
        return self.scale == 1 or (self.source is not None and self.source == self.size)

    @property
    def enlarges(self) -> bool:
        """Whether the axis never shrinks."""
        if self.scale is not None:
            return bool(self.scale >= 1)
        return self.source is not None and self.size is not None and self.size >= self.source

    @property
    def target(self) -> dict[str, Any]:
        """Keywords that ask ``resize`` for this axis."""
        return {"scale": self.scale} if self.scale is not None else {"size": self.size}


def aligns_corners(model: ModelProto) -> bool:
    """Whether a Resize ties its samples to the image's corners, so that a part of it gives no part of the result."""
    return any(
        attribute.name == "coordinate_transformation_mode" and attribute.s == b"align_corners"
        for node in model.graph.node
        if node.op_type == "Resize"
        for attribute in node.attribute
    )


def setting(node: gs.Node, name: str) -> Any:
    """An attribute of a Resize, or its default."""
    return node.attrs.get(name, DEFAULTS[name])


def axes_of(node: gs.Node) -> list[Axis] | None:
    """The axes of a Resize of constant scales or sizes for every axis; None for others.

    Shapes are taken from the graph's tensors.
    """
    if "axes" in node.attrs or setting(node, "keep_aspect_ratio_policy") != "stretch":
        return None
    scales, sizes = constant_value(input_at(node, SCALES)), constant_value(input_at(node, SIZES))
    if scales is not None and scales.size == 0:
        scales = None
    given = scales if scales is not None else sizes
    if given is None or given.size == 0:
        return None
    shape = node.inputs[0].shape if node.inputs[0].shape is not None else [None] * len(given)
    sources = [size if isinstance(size, int) else None for size in shape]
    if len(sources) != len(given):
        return None
    if scales is None:
        return [Axis(source, None, int(size)) for source, size in zip(sources, given, strict=True)]
    return [
        Axis(source, np.float32(scale), None if source is None else int(np.float32(source) * np.float32(scale)))
        for source, scale in zip(sources, scales, strict=True)
    ]


def exact_scale(source: int, size: int) -> np.float32 | None:
    """The float32 factor whose product with ``source``, rounded down in float32 and in float64, is ``size``."""
    scale = np.float32(size) / np.float32(source)
    right = int(np.floor(np.float32(source) * scale)) == size and int(source * float(scale)) == size
    return np.float32(scale) if right else None


def resize(
    attributes: Mapping[str, Any],
    data: NDArray[np.float32],
    *,
    scales: Sequence[Any] | None = None,
    sizes: Sequence[Any] | None = None,
    roi: Sequence[float] | None = None,
    opset: int,
) -> NDArray[np.float32]:
    """The result of one Resize on ONNX Runtime.

    Args:
        attributes: as in the node.
        data: float32, any shape that ONNX Runtime takes for the mode.
        scales, sizes, roi: the node's inputs, one entry per axis (roi: two).
        opset: 11 or newer.

    Raises:
        UnsupportedError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnsupportedError("onnxruntime is not installed, so resizes cannot be compared",
                               fix="pip install onnxruntime") from error  # fmt: skip
    values = {
        "roi": np.array(roi if roi is not None else [], np.float32),
        "scales": np.array(scales if scales is not None else [], np.float32),
    }
    if sizes is not None:
        values["sizes"] = np.array(sizes, np.int64)
    node = helper.make_node("Resize", ["data", *values], ["result"])
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "resize",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, data.shape)],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [None] * data.ndim)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it refuses is an exception, not a message
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"data": data})[0]
    return result


def along_axis(
    attributes: Mapping[str, Any],
    data: NDArray[np.float32],
    *,
    scale: Any = None,
    size: int | None = None,
    roi: tuple[float, float] | None = None,
    opset: int,
) -> NDArray[np.float32]:
    """Resize the rows of a matrix (source, columns) to (size, columns)."""
    kept = {key: value for key, value in attributes.items() if key not in WHOLE}
    columns = data.shape[1]
    result = resize(
        kept,
        np.ascontiguousarray(data.T)[None, :, :, None],
        scales=None if scale is None else [1, 1, scale, 1],
        sizes=None if size is None else [1, columns, size, 1],
        roi=None if roi is None else [0, 0, roi[0], 0, 1, 1, roi[1], 1],
        opset=opset,
    )
    return np.ascontiguousarray(result[0, :, :, 0].T)


def index_map(attributes: Mapping[str, Any], source: int, opset: int, **target: Any) -> NDArray[np.int64]:
    """The source index of every output index of a nearest Resize along one axis of ``source`` < 2^24 entries."""
    ramp = np.arange(source, dtype=np.float32)[:, None]
    return along_axis(attributes, ramp, opset=opset, **target)[:, 0].astype(np.int64)


def axis_matrix(attributes: Mapping[str, Any], source: int, opset: int, **target: Any) -> NDArray[np.float32]:
    """The (size, source) matrix of a linear or cubic Resize along one axis."""
    return along_axis(attributes, np.eye(source, dtype=np.float32), opset=opset, **target)
