"""What each precision costs and gives on a GPU: runs the whole pipeline with TensorRT and collects its reports.

    python benchmarks/gpu_table.py -o RESULT.json --build-dir build [--isbi DIR] [--camvid DIR]
        [--only accuracy|times] [cells isbi camvid]

For each config: FP32, FP16 and INT8 as configured, then INT8 in other ways from the same calibration cache.
The exported graph may lie in the build folder already, made where torch is installed. Several of these may share one
GPU with ``--only accuracy``; ``--only times``, called afterwards for the same folder, reuses their engines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "as configured": (("fp32", "fp16", "int8"), ()),
    "Q/DQ at convolutions": (("int8",), ("--set", "engine.qdq=convolutions")),
    "implicit": (("int8",), ("--set", "engine.route=implicit")),
}


def run(stage: str, config: str, build: Path, *options: str) -> int:
    """Exit code of one command of the pipeline; its log goes to stderr."""
    command = [
        sys.executable,
        "-m",
        "pipeline",
        stage,
        "-c",
        f"configs/{config}.yaml",
        "--build-dir",
        str(build),
        *options,
    ]
    print(" ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=REPOSITORY, check=False, stdout=sys.stderr).returncode


def collect(folder: Path, precision: str, label: str) -> dict[str, Any]:
    """One row of the table, from the reports; without times where there are none yet."""
    report = json.loads((folder / "validate" / precision / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "engine" / precision / "manifest.json").read_text(encoding="utf-8"))
    scores, reference = report["scores"], report["reference"]
    row = {
        "precision": precision,
        "way": label,
        "route": manifest["route"],
        "ran": report["candidate"]["ran"],
        "emulated": report["candidate"]["emulated"],
        "passed": report["passed"],
        "images": len(report["images"]),
        "mean_iou": scores["mean_iou"],
        "fp32_onnxruntime_mean_iou": reference["mean_iou"],
        "class_iou": scores["class_iou"],
        "agreement": report["agreement"],
        "max_abs_error": report["max_abs_error"],
        "logit_range": report["logit_range"],
        "engine_bytes": (folder / "engine" / precision / "model.engine").stat().st_size,
        "build_seconds": manifest["build_seconds"],
    }
    if (folder / "benchmark" / "report.json").is_file():
        timings = json.loads((folder / "benchmark" / "report.json").read_text(encoding="utf-8"))["timings"]
        timing = next(t for t in timings if t["name"] == precision)
        row["gpu_ms_p50"], row["gpu_ms_p99"] = timing["device"]["p50_ms"], timing["device"]["p99_ms"]
        row["end_to_end_ms_p50"] = timing["end_to_end"]["p50_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["cells", "isbi", "camvid"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--isbi")
    parser.add_argument("--camvid")
    parser.add_argument("--only", choices=("accuracy", "times"))
    options = parser.parse_args()
    roots = {"isbi": options.isbi, "camvid": options.camvid}
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "configs": {},
    }
    stages = {"accuracy": ("validate",), "times": ("benchmark",), None: ("validate", "benchmark")}[options.only]
    for config in options.configs:
        sets = ["--backend", "tensorrt", *(("--set", f"data.root={roots[config]}") if roots.get(config) else ())]
        build = options.build_dir.resolve()
        rows, codes = [], {}
        for number, (label, (precisions, setting)) in enumerate(WAYS.items()):
            folder = build.with_name(f"{build.name}-{number}") if number else build
            if not (folder / config).exists():
                shutil.copytree(build / config, folder / config)
            chosen = [option for precision in precisions for option in ("-p", precision)]
            for stage in stages:
                codes[f"{stage}, {label}"] = run(stage, config, folder, *chosen, *setting, *sets)
            rows += [collect(folder / config, precision, label) for precision in precisions]
        manifest = json.loads((build / config / "engine" / "int8" / "manifest.json").read_text(encoding="utf-8"))
        result["device"], result["tensorrt"] = manifest["device"], manifest["backend_version"]
        result["configs"][config] = {"input": manifest["inputs"][0]["shape"], "exit_codes": codes, "rows": rows}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for config, entry in result["configs"].items():
        for row in entry["rows"]:
            timed = f" GPU {row['gpu_ms_p50']:.3f} ms" if "gpu_ms_p50" in row else ""
            print(
                f"{config:8} {row['precision']} {row['way']:28} {row['route']:9} mIoU {row['mean_iou']:.4f}"
                f" ({row['mean_iou'] - row['fp32_onnxruntime_mean_iou']:+.4f}) same class {row['agreement']:.5f}{timed}"
                f" built in {row['build_seconds']:.0f} s, {'passed' if row['passed'] else 'FAILED'}"
            )


if __name__ == "__main__":
    main()
