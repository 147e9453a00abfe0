"""What cleaning keeps in a model's metadata: promises about dynamic sizes, and the raw export's tensor names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnx import ModelProto, StringStringEntryProto

from pipeline.errors import ModelError

MULTIPLES_KEY = "unet_trt.multiple_of"
RAW_NAMES_KEY = "unet_trt.raw_names"


def read_multiples(model: ModelProto) -> dict[str, int]:
    """Axis name (or batch, height, width) → number that every size of that axis is a multiple of.

    Raises:
        ModelError: the entry is damaged.
    """
    try:
        return {axis: int(number) for axis, number in _read(model, MULTIPLES_KEY).items()}
    except (ValueError, TypeError) as error:
        raise _damaged(MULTIPLES_KEY) from error


def write_multiples(model: ModelProto, multiples: Mapping[str, int]) -> None:
    """Put the promise into the metadata, in place of an older one; multiples of 1 promise nothing."""
    _write(model, MULTIPLES_KEY, {axis: number for axis, number in sorted(multiples.items()) if number > 1})


def read_raw_names(model: ModelProto) -> dict[str, str]:
    """Activation tensor → its name in the raw export, where that was another: old calibration caches speak in these.

    Raises:
        ModelError: the entry is damaged.
    """
    return {name: str(raw) for name, raw in _read(model, RAW_NAMES_KEY).items()}


def write_raw_names(model: ModelProto, names: Mapping[str, str]) -> None:
    """Put the names into the metadata, in place of older ones."""
    _write(model, RAW_NAMES_KEY, dict(names))


def _read(model: ModelProto, key: str) -> dict[str, Any]:
    for entry in model.metadata_props:
        if entry.key == key:
            try:
                return dict(json.loads(entry.value))
            except (ValueError, TypeError) as error:
                raise _damaged(key) from error
    return {}


def _write(model: ModelProto, key: str, values: Mapping[str, Any]) -> None:
    """In the older entry's place, so that writing the same again changes nothing; no values, no entry."""
    for place, entry in enumerate(model.metadata_props):
        if entry.key == key:
            if values:
                entry.value = json.dumps(values)
            else:
                del model.metadata_props[place]
            return
    if values:
        model.metadata_props.append(StringStringEntryProto(key=key, value=json.dumps(values)))


def _damaged(key: str) -> ModelError:
    return ModelError(f"the metadata {key} is damaged", fix="export the model again")
