"""What an import may cost: heavy libraries load when they are used, and every module imports on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "pipeline"
HEAVY = ("torch", "onnxruntime", "onnx_graphsurgeon", "polygraphy", "tensorrt", "tensorrt_rtx", "cuda", "ray")
LIGHT = (
    "cli",
    "config",
    "errors",
    "artifacts",
    "reports",
    "run",
    "data.dataset",
    "metrics.segmentation",
    "calibration.table",
)


def imported_by(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert imported_by(f"pipeline.{module}").isdisjoint(HEAVY)


def test_every_module_imports_without_torch_and_tensorrt() -> None:
    names = sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__main__.py"
    )
    program = (
        "import importlib, sys\n"
        "for absent in ('torch', 'tensorrt', 'tensorrt_rtx', 'cuda', 'ray'): sys.modules[absent] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_stages_never_import_each_other() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        assert "from pipeline.stages" not in path.read_text(), path
