"""What INT8 costs in accuracy, by algorithm, by placement of Q/DQ pairs, and with equalization and bias correction.

    python benchmarks/int8_accuracy.py configs/isbi.yaml configs/camvid.yaml -o RESULT.json [--images N] [--build-dir D]

Runs on any CPU: the Q/DQ graphs are emulated on ONNX Runtime, FP32 scales. Every variant is judged on all validation
images; ranges come from the config's calibration images. Cross-layer equalization and analytic bias correction as in
M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from pipeline.backends.cpu_histograms import cpu_histograms
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.algorithms import ALGORITHMS
from pipeline.calibration.histogram import Histogram
from pipeline.calibration.ranges import choose_ranges
from pipeline.calibration.table import CalibrationTable
from pipeline.config import Algorithm, CalibrateConfig, Config, Placement, load_config
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preprocessing import preprocess
from pipeline.graph.io import load_model
from pipeline.graph.placement import activation_tensors, quantizable, quantizable_tensors
from pipeline.graph.quantize import quantize
from pipeline.metrics.segmentation import class_iou, confusion_matrix, mean_iou
from pipeline.run import Run

CORRECTING = 8


def inputs(dataset: Dataset, config: Config) -> Iterator[tuple[str, NDArray[Any]]]:
    for sample in dataset:
        yield sample.name, preprocess(sample.image, config.preprocessing)[np.newaxis]


def judge(model: ModelProto, dataset: Dataset, config: Config, wanted: list[NDArray[Any]] | None) -> dict[str, Any]:
    """mIoU and IoU per class against the labels (at the network's size); share of pixels with FP32's class."""
    classes = len(config.data.classes)
    counts, masks = np.zeros((classes, classes), np.int64), []
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        for sample in dataset:
            x = preprocess(sample.image, config.preprocessing)[np.newaxis]
            (logits,) = runner({runner.inputs[0].name: x}).values()
            masks.append(logits.argmax(1)[0].astype(np.uint8))
            assert sample.label is not None
            counts += confusion_matrix(sample.label, masks[-1], classes)
    result = {"mean_iou": mean_iou(counts), "class_iou": [round(float(value), 6) for value in class_iou(counts)]}
    if wanted is not None:
        result["agreement"] = float(np.mean([(a == b).mean() for a, b in zip(masks, wanted, strict=True)]))
    return {**result, "masks": masks}


def table_of(histograms: list[Histogram], algorithm: Algorithm) -> CalibrationTable:
    ranges = choose_ranges(histograms, algorithm, CalibrateConfig(), 0)
    return CalibrationTable(algorithm, {entry.tensor: entry.amax for entry in ranges})


def equalized(model: ModelProto) -> ModelProto:
    """Every Conv -> Relu -> Conv without other readers between: channel ranges of both weights made equal."""
    result = ModelProto()
    result.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in result.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)

    def only(tensor: str, op: str) -> Any:
        found = readers.get(tensor, [])
        return found[0] if len(found) == 1 and found[0].op_type == op else None

    for first in result.graph.node:
        relu = only(first.output[0], "Relu") if first.op_type == "Conv" else None
        second = only(relu.output[0], "Conv") if relu is not None else None
        if second is None:
            continue
        one, two = (numpy_helper.to_array(weights[node.input[1]]).copy() for node in (first, second))
        ranges = np.abs(one).max((1, 2, 3)), np.abs(two).max((0, 2, 3))
        factor = np.sqrt(np.maximum(ranges[0], 1e-8) / np.maximum(ranges[1], 1e-8))
        changed = {first.input[1]: one / factor[:, None, None, None], second.input[1]: two * factor[:, None, None]}
        changed[first.input[2]] = numpy_helper.to_array(weights[first.input[2]]) / factor
        for name, values in changed.items():
            weights[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return result


def bias_corrected(model: ModelProto, dataset: Dataset, config: Config) -> ModelProto:
    """Bias of every quantized Conv less the mean shift that rounding its weights causes: (Wq - W) E[x]."""
    result = ModelProto()
    result.CopyFrom(model)
    tensors = [name for name in quantizable_tensors(model) if name != model.graph.input[0].name]
    seen = ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    means: dict[str, list[NDArray[Any]]] = {}
    with OnnxRuntimeRunner(seen.SerializeToString()) as runner:
        for _, x in inputs(dataset.choose(CORRECTING, 0), config):
            source = runner.inputs[0].name
            for name, values in {source: x, **runner({source: x})}.items():
                means.setdefault(name, []).append(values.mean((0, 2, 3), dtype=np.float64))
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    for node in quantizable(result, ()):
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
        scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
        shift = ((np.rint(weight / scale) * scale - weight).sum((2, 3)) * np.mean(means[node.input[0]], 0)).sum(1)
        bias = numpy_helper.to_array(weights[node.input[2]]) - shift
        weights[node.input[2]].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), node.input[2]))
    return result


def measure(config: Config, build: Path, images: int) -> dict[str, Any]:
    with Run(config, build) as work:
        model = load_model(work.clean())
    calibration = open_dataset(config.data, config.preprocessing, "calibration").choose(images, config.calibrate.seed)
    validation = open_dataset(config.data, config.preprocessing, "validation")
    fp32 = judge(model, validation, config, None)
    wanted = fp32.pop("masks")
    result: dict[str, Any] = {
        "calibration_images": len(calibration),
        "validation_images": len(validation),
        "classes": [c.name for c in config.data.classes],
        "fp32": fp32,
        "int8": {},
    }

    def add(label: str, graph: ModelProto, table: CalibrationTable, qdq: Placement = "convolutions") -> None:
        row = judge(quantize(graph, table, half=False, qdq=qdq), validation, config, wanted)
        row.pop("masks")
        row["mean_iou_change"] = row["mean_iou"] - fp32["mean_iou"]
        result["int8"][label] = row
        print(
            f"{config.name:8} {label:34} mIoU {row['mean_iou']:.4f} ({row['mean_iou_change']:+.4f})"
            f"  same class {row['agreement']:.5f}",
            flush=True,
        )

    histograms = cpu_histograms(model, activation_tensors(model), inputs(calibration, config))
    for algorithm in ALGORITHMS:
        add(algorithm, model, table_of(histograms, algorithm))
    for algorithm in ALGORITHMS:
        add(f"{algorithm}, shared", model, table_of(histograms, algorithm), "shared")
    entropy = table_of(histograms, "entropy")
    add("entropy, bias correction", bias_corrected(model, calibration, config), entropy)
    equal = equalized(model)
    again = cpu_histograms(equal, activation_tensors(equal), inputs(calibration, config))
    add("entropy, equalization", equal, table_of(again, "entropy"))
    add("entropy, equalization, correction", bias_corrected(equal, calibration, config), table_of(again, "entropy"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=100, help="calibration images")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "emulated": f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}",
        "configs": {},
    }
    for path in options.configs:
        config = load_config(path)
        result["configs"][config.name] = measure(config, options.build_dir, options.images)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
