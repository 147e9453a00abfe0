"""The shapes and weights of ``models.unet:UNet`` without torch, for hosts that have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.config import UNET, NetworkConfig, Strict
from pipeline.errors import ConfigError, ModelError
from pipeline.networks import read_arrays
from pipeline.wts import Form, shaped

KERNEL, UP_KERNEL = 3, 2
NORM = ("weight", "bias", "running_mean", "running_var")


class UNetOptions(Strict):
    """The constructor's arguments, with its defaults."""

    in_channels: int = 3
    classes: int = 2
    base_channels: int = 64
    upsampling: Literal["bilinear", "nearest", "transposed"] = "bilinear"
    align_corners: bool = True
    bias: bool = False
    activation: Literal["relu", "leaky_relu", "silu"] = "relu"


@dataclass(frozen=True)
class UNetWeights:
    """A trained UNet; ``state`` holds float32 arrays of ``state_forms(options)``'s shapes, by name."""

    options: UNetOptions
    state: Mapping[str, NDArray[Any]]


def state_forms(options: UNetOptions) -> dict[str, Form]:
    """Shape and type of every tensor of the state dict, in its order."""
    return dict(_forms(options))


def load_unet(network: NetworkConfig) -> UNetWeights:
    """Options and weights of a config's UNet: what the weights' sizes give away, then what the config says.

    ``.wts`` and ``.safetensors`` need no torch, ``.pth`` and ``.pt`` do.

    Raises:
        ConfigError: another factory, no weights, or arguments that the UNet does not have.
        ModelError: the weights are missing, damaged, or of another network.
        UnsupportedError: torch is needed and not installed.
    """
    if network.factory != UNET or network.weights is None:
        raise ConfigError(
            "only the built-in UNet can be defined layer by layer, from its weights",
            expected=f"network.factory: {UNET}, and network.weights",
            got=f"{network.factory or network.onnx}, weights {network.weights}",
            fix="set engine.source to onnx",
        )
    flat = _flat(read_arrays(network.weights))
    options = _options({**_inferred(flat), **network.arguments})
    return UNetWeights(options, shaped(flat, state_forms(options), network.weights))


def recognised(arrays: Mapping[str, NDArray[Any]]) -> UNetOptions | None:
    """The options that a state dict gives away, where all its names and sizes are those of such a UNet; else None.

    Weights say nothing of ``align_corners`` and ``activation``, nor whether ``bilinear`` is ``nearest``: these are the
    defaults.
    """
    flat = _flat(arrays)
    found = _inferred(flat)
    try:
        options = _options(found) if found else None
        if options is not None:
            shaped(flat, state_forms(options), Path("the weights"))
    except (ConfigError, ModelError):
        return None
    return options


def _flat(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.asarray(array, np.float32).reshape(-1) for name, array in arrays.items()}


def _inferred(flat: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """The arguments that the numbers of values give away; empty where it is not such a UNet's."""
    try:
        base = flat["inc.double_conv.1.weight"].size
        classes = flat["outc.conv.bias"].size
        first = flat["inc.double_conv.0.weight"].size
    except KeyError:
        return {}
    found = {
        "base_channels": base,
        "classes": classes,
        "in_channels": first // max(base * KERNEL**2, 1),
        "bias": "inc.double_conv.0.bias" in flat,
    }
    return {**found, "upsampling": "transposed"} if "up1.up.weight" in flat else found


def _options(arguments: Mapping[str, Any]) -> UNetOptions:
    try:
        return UNetOptions(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the UNet refuses network.arguments.{first['loc'][0]}: {first['msg']}",
            expected=f"arguments among {', '.join(UNetOptions.model_fields)}",
            got=repr(first["input"]),
            fix="correct network.arguments",
        ) from error


def _forms(options: UNetOptions) -> Iterator[tuple[str, Form]]:
    c, transposed = options.base_channels, options.upsampling == "transposed"
    factor = 1 if transposed else 2
    yield from _block("inc", options.in_channels, c, c, options.bias)
    for level in range(1, 5):
        inputs, outputs = c << (level - 1), (c << level) // (factor if level == 4 else 1)
        yield from _block(f"down{level}.maxpool_conv.1", inputs, outputs, outputs, options.bias)
    for level in range(1, 5):
        inputs = c << (5 - level)
        outputs = inputs // 2 // (factor if level < 4 else 1)
        if transposed:
            yield f"up{level}.up.weight", Form((inputs, inputs // 2, UP_KERNEL, UP_KERNEL), "float32")
            yield f"up{level}.up.bias", Form((inputs // 2,), "float32")
        yield from _block(f"up{level}.conv", inputs, outputs, outputs if transposed else inputs // 2, options.bias)
    yield "outc.conv.weight", Form((options.classes, c, 1, 1), "float32")
    yield "outc.conv.bias", Form((options.classes,), "float32")


def _block(name: str, inputs: int, outputs: int, middle: int, bias: bool) -> Iterator[tuple[str, Form]]:
    for index, (source, target) in ((0, (inputs, middle)), (3, (middle, outputs))):
        stem = f"{name}.double_conv"
        yield f"{stem}.{index}.weight", Form((target, source, KERNEL, KERNEL), "float32")
        if bias:
            yield f"{stem}.{index}.bias", Form((target,), "float32")
        for kind in NORM:
            yield f"{stem}.{index + 1}.{kind}", Form((target,), "float32")
        yield f"{stem}.{index + 1}.num_batches_tracked", Form((), "int64")
