"""Wall time and peak memory of the commands that people wait for: prints a table, writes JSON with -o.

    .venv/bin/python benchmarks/commands.py [-o benchmarks/results/commands.json]

On the installed environment: ``run`` cold and unchanged, ``--help``, and the export of the 17.3 M-parameter UNet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LARGE = [
    "network.weights=null",
    "network.arguments={in_channels: 1, classes: 4, base_channels: 64}",
    "name=large",
]


def measure(*arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory (GB) of one command in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    build = Path(tempfile.mkdtemp())
    config = ("-c", "configs/cells.yaml", "--build-dir", str(build))
    sets = [part for pair in LARGE for part in ("--set", pair)]
    rows = []
    try:
        for name, bound, arguments in (
            ("unet-trt --help", 0.5, ("--help",)),
            ("run, cold", 150, ("run", *config)),
            ("run, unchanged", 10, ("run", *config)),
            ("export, 17.3 M parameters, 512×512", 40, ("export", *config, *sets)),
        ):
            seconds, peak = measure(*arguments)
            rows.append({"command": name, "seconds": round(seconds, 2), "at_most": bound, "peak_gb": round(peak, 2)})
            print(f"{name:40} {seconds:7.2f} s (at most {bound:g})   peak {peak:.2f} GB", flush=True)
    finally:
        shutil.rmtree(build)
    if output:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        output.write_text(
            json.dumps({"date": date, "machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
