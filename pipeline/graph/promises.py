"""What a model's owner promises about its dynamic sizes, kept in the model's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping

from onnx import ModelProto, StringStringEntryProto

from pipeline.errors import ModelError

MULTIPLES_KEY = "unet_trt.multiple_of"


def read_multiples(model: ModelProto) -> dict[str, int]:
    """Axis name (or batch, height, width) → number that every size of that axis is a multiple of.

    Raises:
        ModelError: the entry is damaged.
    """
    for entry in model.metadata_props:
        if entry.key == MULTIPLES_KEY:
            try:
                return {str(axis): int(number) for axis, number in json.loads(entry.value).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ModelError(f"the metadata {MULTIPLES_KEY} is damaged", fix="export the model again") from error
    return {}


def write_multiples(model: ModelProto, multiples: Mapping[str, int]) -> None:
    """Put the promise into the metadata, in place of an older one; multiples of 1 promise nothing."""
    kept = [entry for entry in model.metadata_props if entry.key != MULTIPLES_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    promised = {axis: number for axis, number in sorted(multiples.items()) if number > 1}
    if promised:
        model.metadata_props.append(StringStringEntryProto(key=MULTIPLES_KEY, value=json.dumps(promised)))
