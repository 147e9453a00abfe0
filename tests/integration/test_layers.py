"""``unet-trt validate --layers``: every tensor along the network."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.conftest import Project, Result

Command = Callable[..., Result]


def test_layers_of_int8(project: Project, unet_trt: Command) -> None:
    options = ("validate", "-c", project.config, "--backend", "onnxruntime", "-p", "int8", "--layers", "--quiet")
    told = unet_trt(*options)
    assert told.code == 0, told
    assert "int8: the error jumps " in told.out
    assert "(3 images, ONNX Runtime" in told.out
    (report,) = json.loads(unet_trt(*options, "--json").out).values()
    nodes = [entry["op"] for entry in report["tensors"]]
    assert (nodes[0], nodes[-1]) == ("Conv", "Conv")
    assert nodes.count("Conv") == 19
    assert report["tensors"][-1]["sqnr_db"] > 10
    file = unet_trt("validate", "some.onnx", "--layers")
    assert file.code == 2
    assert "--layers needs a configuration" in file.err
