"""Torch network (or a given ONNX file) to a checked ONNX graph that carries its model card."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import ModelCard, TensorSpec, sha256_file, to_json
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.config import ExportConfig, NetworkConfig
from pipeline.errors import CheckFailed, ModelError
from pipeline.graph.adoption import adopt
from pipeline.graph.io import load_model, model_inputs, model_outputs, opset, save_model, write_card
from pipeline.networks import build_network

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
AXES = {"batch": 0, "height": 2, "width": 3}
INPUT, OUTPUT = "image", "logits"


@dataclass(frozen=True)
class ExportReport:
    """What was exported; the errors are None where there is no torch network to compare with.

    Attributes:
        max_abs_error: max |torch - onnx| over all images and outputs, in the outputs' unit.
        max_relative_error: the largest of each output's over its max |torch|.
    """

    source: str
    onnx_sha256: str
    exporter: str | None
    opset: int
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compared_images: int
    max_abs_error: float | None
    max_relative_error: float | None
    seconds: float


def export(
    network: NetworkConfig, config: ExportConfig, card: ModelCard, images: Sequence[NDArray[np.float32]], folder: Path
) -> ExportReport:
    """Write ``folder/model.onnx`` and ``folder/report.json``.

    Args:
        images: preprocessed real images, float32 (C, H, W), on which torch and ONNX Runtime are compared.

    Raises:
        ModelError: the network, its weights or its input size do not fit; the exporter refuses it.
        CheckFailed: ONNX Runtime's result differs from torch's by more than the tolerance.
    """
    started = time.perf_counter()
    target = folder / "model.onnx"
    errors: tuple[float, float] | None = None
    if network.onnx is not None:
        model = adopt(load_model(network.onnx), card)
        source = str(network.onnx)
    else:
        module = build_network(network)
        model = _export(module, config, card, images[0])
        source = str(network.factory)
    _check_input(model, card, source)
    if card.task == "segmentation":
        _check_segmentation(model, card, source)
    write_card(model, card)
    save_model(model, target)
    if network.onnx is None:
        errors = _compare(module, target, images)
    report = ExportReport(
        source=source,
        onnx_sha256=sha256_file(target),
        exporter=None if network.onnx else config.exporter,
        opset=opset(model),
        nodes=len(model.graph.node),
        inputs=model_inputs(model),
        outputs=model_outputs(model),
        compared_images=len(images) if errors else 0,
        max_abs_error=errors[0] if errors else None,
        max_relative_error=errors[1] if errors else None,
        seconds=time.perf_counter() - started,
    )
    if errors and not errors[1] <= config.tolerance:
        raise CheckFailed(
            f"the exported graph computes something else than {source}",
            expected=f"max |torch - onnx| / max |torch| of at most {config.tolerance:g}",
            got=f"{errors[1]:.3g}",
            fix="try the other export.exporter or another export.opset",
        )
    (folder / "report.json").write_bytes(to_json(report))
    return report


def _export(module: nn.Module, config: ExportConfig, card: ModelCard, image: NDArray[np.float32]) -> onnx.ModelProto:
    import torch

    # torch.export specialises a dynamic axis whose example size is 1.
    batch = max(config.batch, 2) if "batch" in config.dynamic else config.batch
    example = torch.from_numpy(np.repeat(image[np.newaxis], batch, axis=0))
    outputs = _tensors(_forward(module, example, card))
    if card.task == "segmentation" and (len(outputs) != 1 or outputs[0].shape[2:] != example.shape[2:]):
        raise ModelError(
            "the network is no segmentation network",
            expected=f"one tensor (N, {len(card.classes)}, {example.shape[2]}, {example.shape[3]}) for this input",
            got=", ".join(str(tuple(output.shape)) for output in outputs),
            fix="wrap the network so that it returns its logits at the input's size, or set task: tensors",
        )
    names = _output_names(len(outputs), config, card)
    # It warns of every operator of torchvision where that is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    buffer = io.BytesIO()
    shared: dict[str, Any] = {"opset_version": config.opset, "input_names": [INPUT], "output_names": names}
    dynamic = {AXES[axis]: axis for axis in config.dynamic}
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as said, torch.inference_mode():
            warnings.simplefilter("ignore")
            if config.exporter == "dynamo":
                shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),) if dynamic else None
                program = torch.onnx.export(
                    module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **shared
                )
                assert program is not None
                model = program.model_proto
                _name_axes(model, config)
            else:
                # Of other outputs than logits nobody knows which axes are height and width.
                free = dynamic if card.task == "segmentation" else {0: "batch"} if 0 in dynamic else {}
                axes = {INPUT: dynamic, **dict.fromkeys(names, free)} if dynamic else None
                # Its annotation leaves out the buffers that its documentation allows.
                target: Any = buffer
                torch.onnx.export(module, (example,), target, dynamo=False, dynamic_axes=axes, **shared)
                model = onnx.load_from_string(buffer.getvalue())
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        # The exporters raise whatever the network or torch itself raised; no common base class exists.
        raise ModelError(
            f"torch.onnx.export ({config.exporter}) refuses the network: {type(error).__name__}: {error}",
            fix=f"try --set export.exporter={'torchscript' if config.exporter == 'dynamo' else 'dynamo'}",
        ) from error
    if said.getvalue():
        log.debug("%s", said.getvalue())
    if opset(model) != config.opset:
        log.warning("asked for opset %d, the exporter wrote %d", config.opset, opset(model))
    return model


def _name_axes(model: onnx.ModelProto, config: ExportConfig) -> None:
    """Dynamo names dynamic axes s0, s1, …; users and profiles know them as batch, height and width."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dims[AXES[axis]].dim_param: axis for axis in config.dynamic}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _forward(module: nn.Module, example: Tensor, card: ModelCard) -> Any:
    import torch

    try:
        with torch.inference_mode():
            return module(example)
    except (RuntimeError, ValueError, TypeError) as error:
        spec = card.preprocessing
        raise ModelError(
            f"the network cannot take its input: {str(error).strip().splitlines()[0]}",
            expected="preprocessing.height, width and channels that the network accepts",
            got=f"{spec.channels} of {tuple(example.shape[1:])} (channels, height, width)",
            fix="change preprocessing, or network.arguments",
        ) from error


def _tensors(outputs: Any) -> list[Tensor]:
    """What a network returns, in order: a tensor, or a tuple, list or mapping of them."""
    import torch

    found = [outputs] if torch.is_tensor(outputs) else outputs
    found = list(found.values() if isinstance(found, Mapping) else found) if isinstance(found, Collection) else []
    if not found or not all(torch.is_tensor(one) for one in found):
        raise ModelError(
            "the network returns no tensors",
            expected="a tensor, or a tuple, list or mapping of tensors",
            got=type(outputs).__name__,
            fix="wrap the network so that it returns its tensors alone",
        )
    return found


def _output_names(count: int, config: ExportConfig, card: ModelCard) -> list[str]:
    if card.task == "segmentation":
        return [OUTPUT]
    names = list(config.outputs) or [f"output_{index}" for index in range(count)]
    if len(names) != count or len({INPUT, *names}) != count + 1:
        raise ModelError(
            f"export.outputs does not name the network's {count} outputs",
            expected=f"{count} different names, none of them {INPUT}",
            got=", ".join(names),
            fix="correct export.outputs, or leave it out",
        )
    return names


def _check_input(model: onnx.ModelProto, card: ModelCard, source: str) -> None:
    inputs, spec = model_inputs(model), card.preprocessing
    wanted = (spec.channel_count, spec.height, spec.width)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype != "float32":
        raise ModelError(
            f"{source} takes other inputs than one image batch",
            expected="one float32 input (N, C, H, W), or (N, H, W, C) in an ONNX file",
            got=", ".join(f"{i.name} {i.dtype} {i.shape}" for i in inputs) or "none",
        )
    fixed = inputs[0].shape[1:]
    if any(isinstance(have, int) and have != want for have, want in zip(fixed, wanted, strict=True)):
        raise ModelError(
            f"{source} takes images of another size than preprocessing gives",
            expected=f"(channels, height, width) = {wanted}",
            got=str(fixed),
            fix="change preprocessing",
        )


def _check_segmentation(model: onnx.ModelProto, card: ModelCard, source: str) -> None:
    outputs = model_outputs(model)
    if len(outputs) != 1 or len(outputs[0].shape) != 4 or outputs[0].shape[1] != len(card.classes):
        raise ModelError(
            f"{source} gives other outputs than logits of the configured classes",
            expected=f"one output (N, {len(card.classes)}, H, W): data.classes names {len(card.classes)}",
            got=", ".join(f"{o.name} {o.shape}" for o in outputs),
            fix="correct data.classes or network.arguments, or set task: tensors",
        )


def _compare(module: nn.Module, target: Path, images: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Largest absolute error over the outputs, and the largest of each output's over its largest |torch|."""
    import torch

    worst: dict[str, float] = {}
    largest: dict[str, float] = {}
    with OnnxRuntimeRunner(target) as runner, torch.inference_mode():
        spec = runner.inputs[0]
        batch = spec.shape[0] if isinstance(spec.shape[0], int) else 1
        for place, image in enumerate(images):
            feed = np.repeat(image[np.newaxis], batch, axis=0)
            outputs = runner({spec.name: feed})
            for output, tensor in zip(runner.outputs, _tensors(module(torch.from_numpy(feed))), strict=True):
                reference = tensor.numpy()
                bad = int((~np.isfinite(reference)).sum())
                if bad:
                    raise ModelError(
                        f"the network's own output {output.name} holds NaN or infinite values",
                        expected="finite values, in torch and FP32",
                        got=f"{bad} of {reference.size} that are not, on image {place + 1} of {len(images)}",
                        fix="look for the weights that do it",
                    )
                # A NaN of the graph's must fail, and max() would drop it.
                error = np.abs(reference - outputs[output.name]).max()
                worst[output.name] = float(np.maximum(worst.get(output.name, 0.0), error))
                largest[output.name] = max(largest.get(output.name, 0.0), float(np.abs(reference).max()))
    relative = [error / largest[name] if largest[name] else error for name, error in worst.items()]
    return float(np.max(list(worst.values()))), float(np.max(relative))
