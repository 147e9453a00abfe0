"""Shared pieces: a tiny trained-nothing UNet with a folder of small images, and the command line as a function."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.data.synthetic import draw_cells
from tests.forking import ONE_THREAD, REPOSITORY, Server, give_sessions_one_thread, run_afresh

SIZE = 64


@dataclass(frozen=True)
class Project:
    """A folder with ``config.yaml``, ``weights.safetensors`` and ``data/{train,val}/{images,labels}``."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    def edit(self, **sections: object) -> None:
        """Replace top-level sections of the config."""
        settings = yaml.safe_load(self.config.read_text())
        self.config.write_text(yaml.safe_dump({**settings, **sections}))


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def write_images(folder: Path, seeds: range) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image, label = draw_cells(seed, SIZE)
        Image.fromarray(image).save(folder / "images" / f"{seed:03d}.png")
        Image.fromarray(label).save(folder / "labels" / f"{seed:03d}.png")


def make_project(root: Path) -> Project:
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to export")
    from safetensors.torch import save_file

    from models.unet import UNet

    torch.manual_seed(0)
    network = UNet(1, 4, 4)
    save_file(network.state_dict(), root / "weights.safetensors")
    write_images(root / "data" / "train", range(6))
    write_images(root / "data" / "val", range(100, 103))
    classes = [
        {"name": name, "colour": [i * 60, 20, 90]} for i, name in enumerate(("background", "body", "rim", "core"))
    ]
    settings = {
        "name": "tiny",
        "network": {
            "factory": "models.unet:UNet",
            "arguments": {"in_channels": 1, "classes": 4, "base_channels": 4},
            "weights": "weights.safetensors",
        },
        "data": {
            "kind": "folder",
            "root": "data",
            "train": {"images": "train/images", "labels": "train/labels"},
            "validation": {"images": "val/images", "labels": "val/labels"},
            "classes": classes,
        },
        "preprocessing": {"height": SIZE, "width": SIZE, "channels": "grey"},
        "calibrate": {"images": 4},
        "benchmark": {"seconds": 0.05, "warmup_seconds": 0.01},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return Project(root)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    """Workers that share the cores take one thread each; what they start inherits it."""
    if config.getoption("numprocesses", None):
        os.environ.update({**ONE_THREAD, **os.environ})
    if hasattr(config, "workerinput"):
        give_sessions_one_thread()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--afresh", action="store_true", help="start a Python for every command; slow, as a user has it")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder of a test run, filled by whichever worker needs it first; tests only read it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def execute(request: pytest.FixtureRequest) -> Iterator[Callable[..., Result]]:
    """Runs ``unet-trt`` with arguments in a folder, in a process of its own, output captured.

    A fork of one that has imported the libraries already, or, if asked for, a Python that starts ``afresh``.
    """
    with contextlib.ExitStack() as stack:
        usual = run_afresh if request.config.getoption("--afresh") else stack.enter_context(Server()).run

        def run(arguments: Sequence[str | Path], cwd: Path, *, afresh: bool = False, **environment: str) -> Result:
            variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
            return Result(*(run_afresh if afresh else usual)([*map(str, arguments)], cwd, variables))

        yield run


@pytest.fixture(scope="session")
def run_once(once: Callable[..., Path], execute: Callable[..., Result]) -> Callable[..., tuple[Path, Result]]:
    """The build folder and the output of a shipped config's whole run."""

    def run(config: str, *settings: str, afresh: bool = False) -> tuple[Path, Result]:
        def fill(folder: Path) -> None:
            arguments = ["run", "-c", REPOSITORY / "configs" / f"{config}.yaml", "--build-dir", folder]
            arguments += [part for setting in settings for part in ("--set", setting)]
            result = execute(arguments, REPOSITORY, afresh=afresh)
            (folder / "result.json").write_text(json.dumps(asdict(result)))

        folder = once(config, fill)
        return folder / config, Result(**json.loads((folder / "result.json").read_text()))

    return run


@pytest.fixture
def unet_trt(execute: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """``unet-trt`` as a user runs it, in an empty working folder."""
    working = tmp_path / "working"
    working.mkdir(exist_ok=True)

    def call(*arguments: str | Path, cwd: Path = working, **options: Any) -> Result:
        return execute(arguments, cwd, **options)

    return call


@pytest.fixture
def clean(once: Callable[..., Path], execute: Callable[..., Result], project: Project) -> Path:
    """The clean graph of the project, where ``unet-trt clean`` puts it."""

    def fill(folder: Path) -> None:
        result = execute(["clean", "-c", make_project(folder).config], folder)
        assert result.code == 0, result

    target = project.root / "working" / "build" / "tiny" / "clean" / "model.onnx"
    target.parent.mkdir(parents=True)
    return shutil.copy(once("project", fill) / target.relative_to(project.root / "working"), target)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands called in this process give the project's logger a handler on a stream that ends with their test."""
    logger = logging.getLogger("pipeline")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
