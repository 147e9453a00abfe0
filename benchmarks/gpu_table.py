"""What each precision costs and gives on a GPU: runs the whole pipeline with TensorRT and collects its reports.

    python benchmarks/gpu_table.py -o RESULT.json --build-dir build [--isbi DIR] [--camvid DIR] [cells isbi camvid]

For each config: FP32, FP16 and INT8 (route auto), then INT8 on the implicit route from the same calibration cache.
The exported graph may lie in the build folder already, made where torch is installed.
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
PRECISIONS = ("fp32", "fp16", "int8")


def run(config: str, build: Path, *options: str) -> int:
    """Exit code of one pipeline run; its log goes to stderr."""
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        "-c",
        f"configs/{config}.yaml",
        "--build-dir",
        str(build),
        *options,
    ]
    print(" ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=REPOSITORY, check=False, stdout=sys.stderr).returncode


def collect(folder: Path, precision: str) -> dict[str, Any]:
    """One row of the table, from the reports."""
    report = json.loads((folder / "validate" / precision / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "engine" / precision / "manifest.json").read_text(encoding="utf-8"))
    timings = json.loads((folder / "benchmark" / "report.json").read_text(encoding="utf-8"))["timings"]
    timing = next(t for t in timings if t["name"] == precision)
    scores, reference = report["scores"], report["reference"]
    return {
        "precision": precision,
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
        "gpu_ms_p50": timing["device"]["p50_ms"],
        "gpu_ms_p99": timing["device"]["p99_ms"],
        "end_to_end_ms_p50": timing["end_to_end"]["p50_ms"],
        "engine_bytes": timing["bytes"],
        "build_seconds": manifest["build_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["cells", "isbi", "camvid"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--isbi")
    parser.add_argument("--camvid")
    options = parser.parse_args()
    roots = {"isbi": options.isbi, "camvid": options.camvid}
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "configs": {},
    }
    for config in options.configs:
        sets = ["--set", f"data.root={roots[config]}"] if roots.get(config) else []
        build = options.build_dir.resolve()
        code = run(config, build, "--backend", "tensorrt", *sets)
        rows = [collect(build / config, precision) for precision in PRECISIONS]
        implicit = build.with_name(f"{build.name}-implicit")
        shutil.copytree(build / config, implicit / config, dirs_exist_ok=True)
        implicit_code = run(
            config, implicit, "--backend", "tensorrt", "-p", "int8", "--set", "engine.route=implicit", *sets
        )
        rows.append(collect(implicit / config, "int8"))
        manifest = json.loads((build / config / "engine" / "fp16" / "manifest.json").read_text(encoding="utf-8"))
        result["device"], result["tensorrt"] = manifest["device"], manifest["backend_version"]
        image = manifest["inputs"][0]["shape"]
        result["configs"][config] = {"input": image, "exit_codes": [code, implicit_code], "rows": rows}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for config, entry in result["configs"].items():
        for row in entry["rows"]:
            print(
                f"{config:8} {row['precision']} {row['route']:9} mIoU {row['mean_iou']:.4f}"
                f" ({row['mean_iou'] - row['fp32_onnxruntime_mean_iou']:+.4f}) same class {row['agreement']:.5f}"
                f" GPU {row['gpu_ms_p50']:.3f} ms, end to end {row['end_to_end_ms_p50']:.3f} ms,"
                f" engine {row['engine_bytes'] / 1e6:.1f} MB, built in {row['build_seconds']:.0f} s,"
                f" {'passed' if row['passed'] else 'FAILED'}"
            )


if __name__ == "__main__":
    main()
