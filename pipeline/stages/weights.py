"""Weights from one file format to another: ``.pth``/``.pt``, ``.safetensors`` and ``.wts``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import write_atomically
from pipeline.config import NetworkConfig
from pipeline.errors import ConfigError
from pipeline.networks import build_network, form_of, read_arrays, read_state_dict
from pipeline.wts import Form, read_wts, shaped, write_wts

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".wts", ".safetensors", ".pth", ".pt")


def convert_weights(source: Path, target: Path, like: Path | None = None, network: NetworkConfig | None = None) -> int:
    """Write the weights of one file into another, whose endings say the formats.

    float32 keeps every bit. Floats of other widths become float32; wrappers and prefixes of the names are taken off, as
    everywhere weights are read. What leaves ``.wts`` gets its shapes and types from a template.

    Args:
        like: the template, a file of the same network in another format than ``.wts``.
        network: or the network itself, whose own weights are not read.

    Returns:
        The number of tensors.

    Raises:
        ConfigError: an unknown ending, or no template where one is needed.
        ModelError: a file is missing, damaged, or of another network than the template.
        BuildFolderError: the target cannot be written; it is as it was.
        UnsupportedError: torch is needed and not installed; from ``.safetensors`` to ``.wts`` it is not.
    """
    for path in (source, target):
        if path.suffix not in ENDINGS:
            raise ConfigError(
                f"{path} has no known ending", expected=", ".join(ENDINGS), got=path.suffix or "none", fix="rename it"
            )
    if target.suffix == ".wts":
        arrays = read_arrays(source)
        write_wts(target, arrays)
        return len(arrays)
    tensors = _restored(source, like, network) if source.suffix == ".wts" else read_state_dict(source)
    write_atomically(target, _bytes(tensors, target))
    return len(tensors)


def _restored(source: Path, like: Path | None, network: NetworkConfig | None) -> dict[str, Tensor]:
    forms = _forms(like, network)
    import torch

    return {name: torch.from_numpy(array) for name, array in shaped(read_wts(source), forms, source).items()}


def _forms(like: Path | None, network: NetworkConfig | None) -> dict[str, Form]:
    if (like is None) == (network is None):
        raise ConfigError(
            ".wts holds no shapes, so converting it needs one template",
            expected="--like FILE, weights of the same network in another format, or -c CONFIG",
            got="neither" if like is None else "both",
        )
    if like is not None:
        if like.suffix == ".wts":
            raise ConfigError(f"{like} holds no shapes either", expected=", ".join(ENDINGS[1:]), got=like.suffix)
        return {name: form_of(tensor) for name, tensor in read_state_dict(like).items()}
    assert network is not None
    if network.factory is None:
        raise ConfigError("an ONNX file is no template for weights", expected="network.factory in the configuration")
    bare = build_network(network.model_copy(update={"weights": None}))
    return {name: form_of(tensor) for name, tensor in bare.state_dict().items()}


def _bytes(tensors: Mapping[str, Tensor], target: Path) -> bytes:
    """A ``.safetensors`` or torch file; tensors that share memory are stored apart, as safetensors wants them."""
    import torch
    from safetensors.torch import save

    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if target.suffix == ".safetensors":
        return save(apart)
    buffer = io.BytesIO()
    torch.save(apart, buffer)
    return buffer.getvalue()
