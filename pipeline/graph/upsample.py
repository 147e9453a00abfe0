"""Resize nodes in the form that engines read best: opset 13 or newer, constant float32 scales, no roi, known modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from pipeline.errors import ModelError
from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    constant_value,
    detach,
    export_graph,
    import_graph,
    input_at,
    is_standard,
    label,
    names_in,
    place_of,
    remove_detached,
    tensor_proto_type,
)
from pipeline.graph.resampling import (
    CROP,
    ROI,
    SCALES,
    SIZES,
    WHOLE,
    Axis,
    axes_of,
    axis_matrix,
    exact_scale,
    index_map,
    resize,
    setting,
)
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import infer_shapes
from pipeline.graph.symbols import LARGEST
from pipeline.graph.versions import OPTIONAL_OPSET, RESIZE_OPSET, has_legacy_resize, with_opset

PLAIN = ("half_pixel", "align_corners", "asymmetric")
HALF_PIXELS = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
# Where the index of an output pixel depends on its place and the scale alone.
PLACE_ALONE = ("asymmetric", "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn")
FASTEST = ("asymmetric", "floor")
# Forms of nearest that TensorRT's parser takes, the best first.
NEAREST = (
    FASTEST,
    *(("half_pixel", rounding) for rounding in ("round_prefer_ceil", "round_prefer_floor", "floor", "ceil")),
    *(("asymmetric", rounding) for rounding in ("ceil", "round_prefer_floor", "round_prefer_ceil")),
    *(("align_corners", rounding) for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
)
# A product of two matrices may differ by rounding from ONNX Runtime's two passes, no more.
ROUNDING = 3e-6


class RaiseLegacyResize(Pass):
    """1. Upsample (opset 9 and older) and the Resize of opset 10 become Resize with asymmetric coordinates, and the
       whole graph is raised to opset 13.

    Not: without such a node; where a nearest Resize computes its scales (constants are folded first); where ONNX's
    converter cannot raise another operator, or would lose model-local functions.
    """

    name = "raise-legacy-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        if graph.opset >= RESIZE_OPSET or graph.functions:
            return PassResult(False)
        model = export_graph(graph, ModelProto(ir_version=8))
        if not has_legacy_resize(model):
            return PassResult(False)
        try:
            raised = with_opset(model, OPTIONAL_OPSET)
        except ModelError:  # the graph stays valid as it is
            return PassResult(False)
        parts = (graph, *graph.subgraphs(recursive=True))
        fired = [("legacy", label(node)) for part in parts for node in part.nodes if _is_legacy(node)]
        fresh = import_graph(raised)
        for field in ("nodes", "inputs", "outputs", "opset", "import_domains", "origin"):
            setattr(graph, field, getattr(fresh, field))
        return PassResult.of(fired)


def _is_legacy(node: gs.Node) -> bool:
    return is_standard(node, "Upsample", "Resize")


class NormalizeResize(Pass):
    """1. Empty roi, empty scales or empty sizes are omitted, from opset 13 on: before, they are required inputs."""

    name = "normalize-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        resizes = [node for node in graph.nodes if is_standard(node, "Resize") and graph.opset >= 11]
        for node in resizes if graph.opset >= OPTIONAL_OPSET else ():
            fired += self._omit_empty(node)
        return PassResult.of(fired)

    @staticmethod
    def _omit_empty(node: gs.Node) -> list[Fired]:
        fired: list[Fired] = []
        for slot in range(1, len(node.inputs)):
            value = constant_value(input_at(node, slot))
            if value is not None and value.size == 0:
                node.inputs[slot] = gs.Variable.empty()
                fired.append(("omit-empty", label(node)))
        while fired and node.inputs[-1].is_empty():
            del node.inputs[-1]
        return fired


class CanonicalResize(Pass):
    """1. A roi that the coordinates do not use is omitted (opset 11 and 12: empty).
    2. tf_crop_and_resize with a roi of the whole image is align_corners, where sizes are known and both give the same
       on ONNX Runtime (not to one pixel: there the first takes the middle, align_corners the first pixel).
    3. ``axes`` and ``keep_aspect_ratio_policy`` go: constant scales or sizes of every axis.
    4. A Resize that changes no axis goes; between a graph input and a graph output it is an Identity.
    5. nearest: any coordinates and rounding become asymmetric and floor where they pick the same pixels: the index
       maps of ONNX Runtime are compared, for known sizes, and for constant scales over every size up to ``LARGEST``.
       Forms that TensorRT's parser refuses become any equal one that it takes.
    6. pytorch_half_pixel is half_pixel but where one pixel is left; half_pixel_symmetric is half_pixel where
       scale · size is whole.
    7. linear, cubic: antialias goes with half-pixel coordinates where nothing shrinks (with others, ONNX Runtime's two
       ways differ by more than rounding once).
    8. linear, cubic with antialias, half_pixel_symmetric or tf_crop_and_resize along known sizes of the last two axes:
       two MatMuls, with the matrices that ONNX Runtime's Resize gives for unit vectors. TensorRT's parser refuses the
       first (8.6 ignores it silently) and both others.

    Not: where a needed size is dynamic; where the comparison with ONNX Runtime fails; other types than float32 in
    rule 8.
    """

    name = "canonical-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        resizes = [node for node in graph.nodes if is_standard(node, "Resize") and graph.opset >= RESIZE_OPSET]
        pending = [node for node in resizes if not _settled(node)]
        if not pending:
            return PassResult(False)
        infer_shapes(graph)
        fired: list[Fired] = []
        for node in pending:
            name = label(node)
            fired += [(rule, name) for rule in self._rewrite(graph, node)]
        remove_detached(graph)
        return PassResult.of(fired)

    def _rewrite(self, graph: gs.Graph, node: gs.Node) -> list[str]:
        rules: list[str] = []
        if setting(node, "coordinate_transformation_mode") != CROP and _drop_roi(graph, node):
            rules.append("roi")
        if ("axes" in node.attrs or "keep_aspect_ratio_policy" in node.attrs) and _full_rank(graph, node):
            rules.append("every-axis")
        axes = axes_of(node)
        if axes is None:
            return rules
        if _crop_to_corners(graph, node, axes):
            rules.append("whole-roi")
        if setting(node, "coordinate_transformation_mode") != CROP and all(axis.still for axis in axes):
            data, result = node.inputs[0], node.outputs[0]
            if not bypass(graph, node, data, result):  # an input and an output keep their names
                node.op, node.inputs = "Identity", [data]
                node.attrs.clear()
            return [*rules, "same-size"]
        rules += _coordinates(node, axes)
        if setting(node, "mode") == "nearest":
            return rules + (["nearest"] if _nearest(graph, node, axes) else [])
        return rules + (["matrices"] if _matrices(graph, node, axes) else [])


def _settled(node: gs.Node) -> bool:
    """Whether nothing is left to do, as far as the node alone tells."""
    roi = input_at(node, ROI)
    if "axes" in node.attrs or "keep_aspect_ratio_policy" in node.attrs or setting(node, "antialias"):
        return False
    scales = constant_value(input_at(node, SCALES))
    if (roi is not None and not _is_empty(roi)) or scales is None or (scales == 1).all():
        return False
    coordinates = setting(node, "coordinate_transformation_mode")
    if setting(node, "mode") == "nearest":
        return (coordinates, setting(node, "nearest_mode")) == FASTEST
    return coordinates in PLAIN


def _is_empty(tensor: gs.Tensor) -> bool:
    value = constant_value(tensor)
    return value is not None and value.size == 0


def _drop_roi(graph: gs.Graph, node: gs.Node) -> bool:
    roi = input_at(node, ROI)
    if roi is None or _is_empty(roi):
        return False
    if graph.opset >= OPTIONAL_OPSET:
        node.inputs[ROI] = gs.Variable.empty()
    else:
        name = unique(f"{node.outputs[0].name}.roi", names_in(graph))
        node.inputs[ROI] = gs.Constant(name, np.zeros(0, np.float32))
    return True


def _set(graph: gs.Graph, node: gs.Node, slot: int, values: NDArray[Any]) -> None:
    """Give the node constant scales or sizes, in place of what it had of either."""
    name = unique(f"{node.outputs[0].name}.{'scales' if slot == SCALES else 'sizes'}", names_in(graph))
    inputs = [*list(node.inputs)[:SCALES], gs.Variable.empty()][:SCALES]
    if slot == SIZES:
        inputs.append(gs.Variable.empty())
    node.inputs = [*inputs, gs.Constant(name, values)]


def _full_rank(graph: gs.Graph, node: gs.Node) -> bool:
    shape, policy = node.inputs[0].shape, setting(node, "keep_aspect_ratio_policy")
    if setting(node, "coordinate_transformation_mode") == CROP or shape is None:
        return False
    given = node.attrs.get("axes", range(len(shape)))
    chosen = [axis % len(shape) for axis in given]
    scales, sizes = constant_value(input_at(node, SCALES)), constant_value(input_at(node, SIZES))
    full = np.ones(len(shape), np.float32)
    if sizes is None:
        if scales is None and "axes" in node.attrs:
            return False
        if "axes" in node.attrs and scales is not None:
            full[chosen] = scales
            _set(graph, node, SCALES, full)
    elif policy == "stretch" and "axes" not in node.attrs:
        pass
    elif all(isinstance(shape[axis], int) and shape[axis] > 0 for axis in chosen):
        sources = [shape[axis] for axis in chosen]
        if policy == "stretch":
            factors = [exact_scale(source, int(size)) for source, size in zip(sources, sizes, strict=True)]
        else:
            ratios = [np.float32(size) / np.float32(source) for source, size in zip(sources, sizes, strict=True)]
            factor = np.float32(min(ratios) if policy == "not_larger" else max(ratios))
            factors = [factor if _rounds_down(source, factor) else None for source in sources]
        if all(factor is not None for factor in factors):
            full[chosen] = factors
            _set(graph, node, SCALES, full)
        elif policy == "stretch" and all(isinstance(size, int) for size in shape):
            every = np.array(shape, np.int64)
            every[chosen] = sizes
            _set(graph, node, SIZES, every)
        else:
            return False
    else:
        return False
    for name in WHOLE:
        node.attrs.pop(name, None)
    return True


def _rounds_down(source: int, scale: np.float32) -> bool:
    """Whether the size that a policy rounds is the one that plain scales round down to."""
    product = np.float32(source) * scale
    return bool(np.floor(product) == np.floor(product + np.float32(0.5)))


def _crop_to_corners(graph: gs.Graph, node: gs.Node, axes: list[Axis]) -> bool:
    roi = constant_value(input_at(node, ROI))
    if setting(node, "coordinate_transformation_mode") != CROP or roi is None:
        return False
    if not (roi[: len(axes)] == 0).all() or not (roi[len(axes) :] == 1).all():
        return False
    moving = [axis for axis in axes if not axis.still]
    if any(axis.source is None or axis.size is None for axis in moving):
        return False
    corners = {"mode": setting(node, "mode"), "coordinate_transformation_mode": "align_corners"}
    for key in ("nearest_mode", "cubic_coeff_a", "exclude_outside"):
        if key in node.attrs:
            corners[key] = node.attrs[key]
    for axis in moving:
        maps = index_map if setting(node, "mode") == "nearest" else axis_matrix
        want = maps(node.attrs, axis.source or 0, graph.opset, roi=(0, 1), **axis.target)
        if np.abs(want - maps(corners, axis.source or 0, graph.opset, **axis.target)).max() > ROUNDING:
            return False
    node.attrs.pop("extrapolation_value", None)
    node.attrs["coordinate_transformation_mode"] = "align_corners"
    _drop_roi(graph, node)
    return True


def _nearest(graph: gs.Graph, node: gs.Node, axes: list[Axis]) -> bool:
    coordinates, rounding = setting(node, "coordinate_transformation_mode"), setting(node, "nearest_mode")
    if coordinates == CROP:
        return False
    moving = {axis for axis in axes if not axis.still}
    if any(axis.source is None and (axis.scale is None or coordinates not in PLACE_ALONE) for axis in moving):
        return False
    taken_by_parser = coordinates in (*PLAIN, "pytorch_half_pixel") or rounding == "round_prefer_floor" != coordinates
    refused = coordinates == "half_pixel_symmetric" or not taken_by_parser
    wanted = {axis: index_map(node.attrs, axis.source or LARGEST, graph.opset, **axis.target) for axis in moving}
    for mode, rounded in NEAREST if refused else (FASTEST,):
        form = {"mode": "nearest", "coordinate_transformation_mode": mode, "nearest_mode": rounded}
        if mode not in PLACE_ALONE and any(axis.source is None for axis in moving):
            continue
        maps = (
            (want, index_map(form, axis.source or LARGEST, graph.opset, **axis.target)) for axis, want in wanted.items()
        )
        if all(np.array_equal(want, found) for want, found in maps):
            if (mode, rounded) == (coordinates, rounding):
                return False
            for key in [key for key in node.attrs if key != "mode"]:
                del node.attrs[key]
            node.attrs |= form
            return True
    return False


def _coordinates(node: gs.Node, axes: list[Axis]) -> list[str]:
    """Rules 6 and 7."""
    rules: list[str] = []
    coordinates = setting(node, "coordinate_transformation_mode")
    known_as_half_pixel = {
        "pytorch_half_pixel": all(axis.still or axis.enlarges or (axis.size or 0) > 1 for axis in axes),
        "half_pixel_symmetric": all(axis.still or _is_whole(axis) for axis in axes),
    }
    if known_as_half_pixel.get(coordinates, False):
        node.attrs["coordinate_transformation_mode"] = "half_pixel"
        rules.append("half-pixel")
    enlarging = all(axis.still or axis.enlarges for axis in axes) and not setting(node, "exclude_outside")
    if "antialias" in node.attrs and (not node.attrs["antialias"] or (enlarging and coordinates in HALF_PIXELS)):
        del node.attrs["antialias"]
        rules.append("antialias")
    return rules


def _is_whole(axis: Axis) -> bool:
    """Whether scale · source is the size after, so that nothing is cut off that half_pixel_symmetric would centre."""
    if axis.source is None:
        return axis.scale is not None and float(axis.scale).is_integer()
    scale = axis.scale if axis.scale is not None else np.float32(axis.size or 0) / np.float32(axis.source)
    return bool(scale * np.float32(axis.source) == axis.size)


def _matrices(graph: gs.Graph, node: gs.Node, axes: list[Axis]) -> bool:
    coordinates, data, result = setting(node, "coordinate_transformation_mode"), node.inputs[0], node.outputs[0]
    refused = setting(node, "antialias") or coordinates in ("half_pixel_symmetric", CROP)
    if not refused or tensor_proto_type(data) != TensorProto.FLOAT or setting(node, "extrapolation_value"):
        return False
    roi = constant_value(input_at(node, ROI))
    if coordinates == CROP and (roi is None or roi.size != 2 * len(axes)):
        return False
    rank = len(axes)
    crop = [(float(roi[i]), float(roi[rank + i])) for i in range(rank)] if coordinates == CROP else [None] * rank
    moving = [i for i, axis in enumerate(axes) if not axis.still or crop[i] not in (None, (0.0, 1.0))]
    if rank < 2 or not set(moving) <= {rank - 2, rank - 1}:
        return False
    if any(axes[i].source is None or axes[i].size is None for i in moving):
        return False
    matrices = {i: axis_matrix(node.attrs, axes[i].source or 0, graph.opset, roi=crop[i], **axes[i].target)
                for i in moving}  # fmt: skip
    if not _agree(graph, node, axes, matrices, crop):
        return False
    taken = names_in(graph)
    position = place_of(graph, node)
    detach(node)
    source, fresh = data, []
    for step, (i, matrix) in enumerate(sorted(matrices.items())):
        role = "rows" if i == rank - 2 else "columns"
        last = step == len(matrices) - 1
        target = result if last else gs.Variable(unique(f"{result.name}.{role}", taken), data.dtype)
        weight = gs.Constant(unique(f"{result.name}.{role}_matrix", taken), matrix if role == "rows" else matrix.T)
        weight.values = np.ascontiguousarray(weight.values)
        inputs = [weight, source] if role == "rows" else [source, weight]
        fresh.append(gs.Node("MatMul", unique(f"{label(node)}.{role}", taken), inputs=inputs, outputs=[target]))
        source = target
    graph.nodes[position:position] = fresh
    return True


def _agree(graph: gs.Graph, node: gs.Node, axes: list[Axis], matrices: dict[int, Any], crop: list[Any]) -> bool:
    """Whether the matrices give what the node gives, on noise."""
    rank = len(axes)
    plane = [(axes[i].source or 3) if i >= rank - 2 else 1 for i in range(rank)]
    noise = np.random.default_rng(0).standard_normal(plane).astype(np.float32)
    targets = [axis.target if i in matrices else {"scale": 1.0} for i, axis in enumerate(axes)]
    request: dict[str, Any] = {"scales": [target.get("scale") for target in targets]}
    if any("size" in target for target in targets):
        request = {"sizes": [target.get("size", plane[i]) for i, target in enumerate(targets)]}
    if crop[0] is not None:
        request["roi"] = [start for start, _ in crop] + [end for _, end in crop]
    want = resize(node.attrs, noise, opset=graph.opset, **request)
    have = noise
    if rank - 2 in matrices:
        have = matrices[rank - 2] @ have
    if rank - 1 in matrices:
        have = have @ matrices[rank - 1].T
    return have.shape == want.shape and bool(np.abs(have - want).max() <= ROUNDING * np.abs(want).max())
