"""What the implicit INT8 route makes of a table, by which of its ranges TensorRT is given, and of its own table.

    python benchmarks/implicit_int8.py configs/isbi.yaml --build-dir build -o RESULT.json [--set data.root=DIR]

Needs TensorRT with calibrators, a GPU, and ``clean/model.onnx`` and ``calibrate/`` of the config in the build folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends import cuda
from pipeline.backends.base import BuildRequest
from pipeline.backends.nvinfer import EngineRunner
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.backends.tensorrt import TensorrtBuilder, api, calibrate_with_tensorrt
from pipeline.calibration.table import CalibrationTable, read_cache
from pipeline.config import EngineConfig, load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.preprocessing import preprocess
from pipeline.graph.io import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--level", type=int, default=0, help="builder optimization level")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    folder = options.build_dir / config.name
    clean, table = folder / "clean" / "model.onnx", read_cache(folder / "calibrate" / "calibration.cache")
    settings = EngineConfig(backend="tensorrt", optimization_level=options.level)

    def feeds(split: Any) -> list[dict[str, Any]]:
        samples = open_dataset(config.data, config.preprocessing, split)
        return [{"image": preprocess(sample.image, config.preprocessing)[np.newaxis]} for sample in samples]

    images = feeds("validation")
    with OnnxRuntimeRunner(clean) as runner:
        references = [runner(feed)["logits"] for feed in images]

    def trial(given: CalibrationTable) -> dict[str, Any]:
        built = TensorrtBuilder().build(BuildRequest(clean, "int8", "implicit", settings, given))
        with EngineRunner(api(), built.plan) as runner:
            outputs = [runner(feed)["logits"] for feed in images]
            layers = len(json.loads(runner.layers())["Layers"])
        pairs = list(zip(outputs, references, strict=True))
        return {
            "agreement": float(np.mean([(a.argmax(1) == b.argmax(1)).mean() for a, b in pairs])),
            "rms": float(np.sqrt(np.mean([((a - b) ** 2).mean() for a, b in pairs]))),
            "layers": layers,
        }

    producers = {name: node.op_type for node in load_model(clean).graph.node for name in node.output}

    def without(drop: Callable[[str], bool]) -> CalibrationTable:
        return CalibrationTable(table.algorithm, {name: a for name, a in table.amax.items() if not drop(name)})

    report = json.loads((folder / "calibrate" / "report.json").read_text(encoding="utf-8"))["tensors"]
    largest = {t["tensor"]: max(abs(t["minimum"]), abs(t["maximum"]), 1e-6) for t in report}
    started = time.perf_counter()
    own = calibrate_with_tensorrt(clean, feeds("calibration"), "entropy", settings)
    seconds = time.perf_counter() - started
    tables = {
        "our entropy table": table,
        "without the network's output": without(lambda name: name == "logits"),
        "without the outputs of Resize": without(lambda name: producers.get(name) == "Resize"),
        "without the outputs of Conv, MaxPool and Resize": without(
            lambda name: producers.get(name) in ("Conv", "MaxPool", "Resize")
        ),
        "our minmax table": CalibrationTable("minmax", largest),
        "TensorRT's own entropy table": own,
    }
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": asdict(cuda.current_device()),
        "tensorrt": api().__version__,
        "config": config.name,
        "ranges_given": {label: trial(given) for label, given in tables.items()},
        "calibration_seconds_tensorrt_own": seconds,
        "amax_ratio_ours_over_tensorrts": {n: table.amax[n] / own.amax[n] for n in table.amax if n in own.amax},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for label, row in result["ranges_given"].items():
        print(f"{label:50} same class {row['agreement']:.5f}  rms {row['rms']:.3f}")


if __name__ == "__main__":
    main()
