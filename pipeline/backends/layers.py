"""What TensorRT's engine inspector says of an engine, as typed records.

8.6 describes every layer by a mapping, 10.x and later with other words and keys, and an engine without detailed
profiling verbosity by its layers' names alone. What an inspector does not say is empty or None here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from pipeline.errors import EngineError

Group = Literal["conv", "resize", "pool", "concat", "reformat", "other"]
GROUPS: tuple[Group, ...] = ("conv", "resize", "pool", "concat", "reformat", "other")

# Parts of layer types, in lower case; the first that occurs decides.
TYPE_PARTS: tuple[tuple[Group, tuple[str, ...]], ...] = (
    ("conv", ("conv",)),
    ("pool", ("pool",)),
    ("resize", ("resize",)),
    ("concat", ("concat",)),
    ("reformat", ("reformat", "noop", "shuffle", "constant", "identity", "slice", "cast")),
)
# Of ONNX operators that one fused layer holds, the costliest names its group.
OPERATOR_GROUPS: tuple[tuple[Group, tuple[str, ...]], ...] = (
    ("conv", ("Conv", "ConvTranspose")),
    ("resize", ("Resize", "Upsample")),
    ("pool", ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")),
    ("concat", ("Concat",)),
)
# The inspectors' words of data types; longer words stand before those that they contain.
PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "fp16": "fp16",
    "fp8": "fp8",
    "half": "fp16",
    "float": "fp32",
    "uint8": "uint8",
    "int8": "int8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
SIZES = {"int8": 1, "uint8": 1, "bool": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4, "int32": 4, "int64": 8}
WIDTHS = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
# Layers that only give memory another name.
FREE_TYPES = ("NoOp", "Constant")


@dataclass(frozen=True)
class LayerTensor:
    """An input or output of a layer; a size that the inspector does not know is negative."""

    name: str
    shape: tuple[int, ...]
    precision: str
    format: str

    @property
    def bytes(self) -> int | None:
        """Of its values, without the padding that a vectorised format may add; None where it is unknown."""
        if not self.shape or min(self.shape) < 0 or self.precision not in SIZES:
            return None
        return math.prod(self.shape) * SIZES[self.precision]

    @property
    def shown(self) -> str:
        """Precision and format for people, such as ``int8 NC/32HW32``."""
        return f"{self.precision} {self.format}".strip()


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        type: the inspector's word for it.
        precision: of its arithmetic: of the weights, else of the first input.
        tactic: name of the kernel.
        nodes: names of the ONNX nodes that it computes, as far as the inspector tells.
        requantizes: writes its part of a concatenation in another precision, or at another scale, than it reads.
        bytes: read and written in GPU memory, weights included; None where a size is unknown.
        macs: multiply-accumulates of its convolutions; None where no graph told.
        ms: mean GPU milliseconds; None where it was not profiled.
    """

    name: str
    type: str
    group: Group
    precision: str
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    tactic: str
    nodes: tuple[str, ...]
    requantizes: bool
    bytes: int | None
    macs: int | None = None
    ms: float | None = None


def printable(name: str) -> str:
    """A layer name without the control characters that TensorRT writes between the names of fused nodes."""
    return "".join(character for character in name if character >= " ")


def parse_layers(
    text: str,
    operators: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int | str | None] | None] | None = None,
    batch: int | None = None,
) -> tuple[EngineLayer, ...]:
    """Read the inspector's JSON.

    1. The layer's type names its group; where it says nothing (a fused block), the operators of its ONNX nodes do.
    2. A copy into the tensor of a concatenation belongs to ``concat``, every other copy to ``reformat``.

    Args:
        operators: ONNX operator by node name.
        shapes: by ONNX tensor, for sizes that the inspector does not know. TensorRT 8.6.0's knows no size of a free
            axis, although it is given a context whose inputs have their shapes.
        batch: for tensors of other names whose first size alone is unknown.

    Raises:
        EngineError: no JSON, or none with layers.
    """
    try:
        described = json.loads(text)["Layers"]
        items = [item if isinstance(item, dict) else {"Name": str(item)} for item in described]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"the engine inspector's answer holds no layers: {type(error).__name__}: {error}",
            expected='JSON with a list "Layers"',
            fix="report this with the version of TensorRT",
        ) from error
    joined = {tensor["Name"] for item in items if _joins(item) for tensor in _listed(item, "Outputs")}

    def sized(tensor: LayerTensor) -> LayerTensor:
        return replace(tensor, shape=_sizes(tensor, (shapes or {}).get(tensor.name), batch))

    return tuple(_layer(item, joined, operators or {}, sized) for item in items)


def _layer(
    item: Mapping[str, Any],
    joined: set[str],
    operators: Mapping[str, str],
    sized: Callable[[LayerTensor], LayerTensor],
) -> EngineLayer:
    inputs, outputs = (tuple(sized(_tensor(tensor)) for tensor in _listed(item, key)) for key in ("Inputs", "Outputs"))
    nodes = _nodes(item)
    group = _group(item, nodes, operators)
    writes_joined = group == "reformat" and any(tensor.name in joined for tensor in outputs)
    changed = {tensor.precision for tensor in inputs} != {tensor.precision for tensor in outputs}
    return EngineLayer(
        name=printable(str(item.get("Name", ""))),
        type=str(item.get("LayerType", "")),
        group="concat" if writes_joined else group,
        precision=_arithmetic(item, inputs),
        inputs=inputs,
        outputs=outputs,
        tactic=str(item.get("TacticName", "")),
        nodes=nodes,
        requantizes=writes_joined and (changed or item.get("Origin") == "QDQ"),
        bytes=_bytes(item, (*inputs, *outputs)),
    )


def _joins(item: Mapping[str, Any]) -> bool:
    return item.get("Origin") == "CONCAT" or "concat" in str(item.get("LayerType", "")).lower()


def _listed(item: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [tensor for tensor in item.get(key) or () if isinstance(tensor, dict) and "Name" in tensor]


def _group(item: Mapping[str, Any], nodes: tuple[str, ...], operators: Mapping[str, str]) -> Group:
    kind = f"{item.get('LayerType', '')} {item.get('ParameterType', '')}".lower()
    for group, parts in TYPE_PARTS:
        if any(part in kind for part in parts):
            return group
    held = {operators.get(node) for node in nodes}
    for group, names in OPERATOR_GROUPS:
        if held & set(names):
            return group
    name = str(item.get("Name", "")).lower()
    return "reformat" if name.endswith(" copy") or "copynode" in name else "other"


def _nodes(item: Mapping[str, Any]) -> tuple[str, ...]:
    metadata = re.findall(r"\[ONNX Layer: (.+?)\](?=\[|[\x00-\x1f]|$)", str(item.get("Metadata", "")))
    name = printable(str(item.get("Name", "")))
    # A copy's name names the layer that it is made for.
    pieces = [] if "CopyNode" in name else [piece.strip() for piece in name.split(" + ")]
    return tuple(dict.fromkeys(metadata or pieces))


def _arithmetic(item: Mapping[str, Any], inputs: tuple[LayerTensor, ...]) -> str:
    weights = item.get("Weights")
    precision = _precision(str(weights.get("Type", ""))) if isinstance(weights, dict) else ""
    precision = precision or (inputs[0].precision if inputs else "")
    return "tf32" if precision == "fp32" and "tf32" in str(item.get("TacticName", "")).lower() else precision


def _tensor(described: Mapping[str, Any]) -> LayerTensor:
    words = " ".join(str(described[key]) for key in ("Format/Datatype", "Datatype", "Format") if key in described)
    shape = described.get("Dimensions") or ()
    return LayerTensor(str(described["Name"]), tuple(int(size) for size in shape), _precision(words), _format(words))


def _sizes(tensor: LayerTensor, known: Sequence[int | str | None] | None, batch: int | None) -> tuple[int, ...]:
    """The tensor's sizes, unknown ones as they are in ONNX."""
    shape = tensor.shape
    if not shape or min(shape) >= 0:
        return shape
    sizes = tuple(size for size in known or () if isinstance(size, int))
    if len(sizes) == len(shape):
        return sizes
    return (batch, *shape[1:]) if batch is not None and min(shape[1:], default=0) >= 0 else shape


def _precision(words: str) -> str:
    found = re.search("|".join(PRECISIONS), words.lower())
    return PRECISIONS[found.group()] if found else ""


def _format(words: str) -> str:
    """TensorRT's name of a memory layout from the inspector's sentence; "" where it is not one of those known."""
    text = words.lower()
    if found := re.match(rf"({'|'.join(WIDTHS)}) wide channel vectorized", text):
        width = WIDTHS[found.group(1)]
        return f"NC/{width}HW{width}"
    if text.startswith("channel major"):
        divisor = re.search(r"channel % (\d+)", text)
        return f"NHWC{divisor.group(1) if divisor else ''}"
    return "NCHW" if text.startswith("row major") else ""


def _bytes(item: Mapping[str, Any], tensors: tuple[LayerTensor, ...]) -> int | None:
    if item.get("LayerType") in FREE_TYPES:
        return 0
    sizes = [tensor.bytes for tensor in tensors]
    if not sizes:
        return None
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    for key in ("Weights", "Bias"):
        held = item.get(key)
        if isinstance(held, dict):
            total += int(held.get("Count", 0)) * SIZES.get(_precision(str(held.get("Type", ""))), 0)
    return total
