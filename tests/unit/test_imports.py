"""What an import may cost, and which way imports point: layers, as the linter keeps them and as Python loads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = REPOSITORY / "pipeline"
HEAVY = ("torch", "onnxruntime", "onnx_graphsurgeon", "polygraphy", "tensorrt", "tensorrt_rtx", "cuda", "ray")
# Folders and modules that stand on heavy libraries; everything else is light.
STAND_ON_HEAVY = (
    "backends",
    "fleet",
    "graph",
    "mixed",
    "serving",
    "stages",
    *("cleaning_report", "contest", "drift", "engines", "gpu_engines", "judging", "opening", "predictor", "rivals"),
    *("pruning", "refinement", "selection", "torch_graph", "trials"),
)
# Layer 0, and what each may load of this package.
BOTTOM = {
    "errors": {"errors"},
    "config": {"config", "errors", "slips"},
    "artifacts": {"artifacts", "config", "errors", "slips"},
}


def modules() -> list[str]:
    names = (path.relative_to(REPOSITORY).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py")))
    return [".".join(parts).removesuffix(".__init__") for parts in names if parts[-1] != "__main__"]


def light_modules() -> list[str]:
    return [name for name in modules() if name.partition(".")[2].partition(".")[0] not in STAND_ON_HEAVY]


def python(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=120
    )
    return done.stdout.splitlines()


def test_light_modules_load_nothing_heavy() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {light_modules()!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    new = {module.partition('.')[0] for module in set(sys.modules) - before}\n"
        f"    for heavy in new.intersection({HEAVY!r}): print(name, 'loads', heavy)\n"
    )
    assert python(program) == []


def test_what_processes_of_predict_load_is_light() -> None:
    program = "import sys, pipeline.stages.predict; print(*{module.partition('.')[0] for module in sys.modules})"
    (loaded,) = python(program)
    assert not {"onnx", *HEAVY} & set(loaded.split())


def test_the_lightest_are_light() -> None:
    wanted = {"cli", "config", "errors", "artifacts", "reports", "run", "data.dataset", "calibration.table", "printing"}
    assert {f"pipeline.{name}" for name in wanted} <= set(light_modules())


def test_what_is_called_heavy_exists() -> None:
    parts = {name.partition(".")[2].partition(".")[0] for name in modules()}
    assert set(STAND_ON_HEAVY) <= parts


@pytest.mark.parametrize("module", BOTTOM)
def test_the_bottom_layer_loads_nothing_of_the_others(module: str) -> None:
    (loaded,) = python(f"import sys, pipeline.{module}; print(*(m for m in sys.modules if m.startswith('pipeline.')))")
    assert set(loaded.replace("pipeline.", "").split()) == BOTTOM[module]


def test_every_module_imports_without_torch_and_tensorrt() -> None:
    python(
        "import importlib, sys\n"
        "for absent in ('torch', 'tensorrt', 'tensorrt_rtx', 'cuda', 'ray'): sys.modules[absent] = None\n"
        f"for name in {modules()!r}: importlib.import_module(name)\n"
    )


FORBIDDEN = [
    ("pipeline/graph", "from pipeline.stages.clean import clean", "TID251"),
    ("pipeline/graph", "def later():\n    from pipeline import backends", "TID251"),
    ("pipeline/graph", "import onnxruntime", "TID253"),
    ("pipeline/calibration", "from pipeline.backends.base import Runner", "TID251"),
    ("pipeline/data", "import pipeline.graph.io", "TID251"),
    ("pipeline/data", "from torch import nn", "TID253"),
    ("pipeline/metrics", "from pipeline.data.dataset import Dataset", "TID251"),
    ("pipeline/metrics", "import onnx", "TID253"),
    ("pipeline/backends", "from pipeline.run import Run", "TID251"),
    ("pipeline/backends", "import tensorrt", "TID253"),
    ("pipeline/mixed", "from pipeline.stages.mix import mix", "TID251"),
    ("pipeline/page", "import pipeline.cli", "TID251"),
    ("pipeline/stages", "from pipeline.stages import export", "TID251"),
    ("pipeline/stages", "import torch", "TID253"),
    ("pipeline/cli", "import onnxruntime", "TID253"),
    ("pipeline", "from pipeline.stages.clean import clean", "TID251"),
    ("pipeline", "import polygraphy", "TID253"),
    ("models", "from pipeline.config import Config", "TID251"),
]
ALLOWED = [
    ("pipeline/graph", "import onnx_graphsurgeon"),
    ("pipeline/cli", "def later():\n    from pipeline.stages.clean import clean"),
    ("pipeline/stages", "def later():\n    import torch"),
    ("pipeline/stages", "from pipeline.backends.base import Runner"),
    ("pipeline/data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
    ("models", "import torch"),
]


def refused(folder: str, code: str) -> set[str]:
    """The rules by which the linter refuses a new module with this code in a folder."""
    ruff = Path(sys.executable).with_name("ruff")
    program = str(ruff) if ruff.is_file() else shutil.which("ruff")
    if program is None:
        pytest.skip("ruff is not installed: the layers are its rules")
    arguments = [program, "check", "--select", "TID", "--output-format", "concise", "--stdin-filename"]
    done = subprocess.run(
        [*arguments, f"{folder}/new.py", "-"], input=code, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode in (0, 1), done.stderr
    return {word for word in done.stdout.split() if word.startswith("TID")}


@pytest.mark.parametrize(("folder", "code", "rule"), FORBIDDEN)
def test_the_linter_refuses_imports_from_above_and_heavy_ones(folder: str, code: str, rule: str) -> None:
    assert refused(folder, code) == {rule}


@pytest.mark.parametrize(("folder", "code"), ALLOWED)
def test_the_linter_lets_others_through(folder: str, code: str) -> None:
    assert refused(folder, code) == set()
