"""``unet-trt package`` and ``predict --server``, with a real Triton Inference Server and the shipped cells network."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from pipeline import Predictor
from pipeline.backends.remote import RemoteRunner
from pipeline.data.synthetic import draw_cells
from pipeline.errors import ServerError
from pipeline.serving.repository import CONFIG, check_model
from tests.conftest import REPOSITORY, Result
from tests.triton import Triton, free_port, running_triton, triton_home

pytest.importorskip("torch", reason="torch is not installed: nothing to export")
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'unet-trt[serve]'")

Command = Callable[..., Result]
SIZE = 64
BATCH = 4
PACKAGE = ("package", "-c", "config.yaml", "--backend", "onnxruntime")
TRITON = (*PACKAGE, "--format", "triton", "--platform", "python", "-o", "repository")
# Models that go wrong, as Triton's Python backend runs them.
SLOW = """
import time
class TritonPythonModel:
    def execute(self, requests):
        time.sleep(1)
        return []
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("no weights today")
"""
WRONG = """
import numpy as np
import triton_python_backend_utils as triton
class TritonPythonModel:
    def execute(self, requests):
        half = triton.Tensor("logits", np.zeros((1, 4, 8, 8), np.float32))
        return [triton.InferenceResponse([half]) for _ in requests]
"""


class Served:
    """A model repository, the build folder that it was packaged from, and the server."""

    def __init__(self, root: Path, triton: Triton) -> None:
        self.root, self.triton = root, triton
        self.repository = root / "repository"

    def local(self, precision: str) -> Path:
        return self.root / "build" / "cells" / "engine" / precision / "model.onnx"

    def address(self, scheme: str, model: str) -> str:
        return f"{self.triton.server(scheme)}/{model}"


@pytest.fixture(scope="session")
def command(execute: Callable[..., Result]) -> Callable[..., Result]:
    return lambda *arguments, cwd: execute(arguments, cwd)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A folder with ``build`` and ``repository``: cells in FP32 and INT8, for Triton's Python backend."""
    root = tmp_path_factory.mktemp("serving")
    config = yaml.safe_load((REPOSITORY / "configs" / "cells.yaml").read_text())
    config["network"]["weights"] = str(REPOSITORY / "models" / "weights" / "cells.safetensors")
    for split, seeds in (("train", range(4)), ("validation", range(100, 102))):
        for kind in ("images", "labels"):
            (root / "data" / split / kind).mkdir(parents=True)
        for seed in seeds:
            for kind, array in zip(("images", "labels"), draw_cells(seed, SIZE), strict=True):
                Image.fromarray(array).save(root / "data" / split / kind / f"{seed}.png")
        config["data"][split] = {"images": f"{split}/images", "labels": f"{split}/labels"}
    config["data"] |= {"kind": "folder", "root": "data"}
    del config["data"]["train_images"], config["data"]["validation_images"]
    config["preprocessing"] |= {"height": SIZE, "width": SIZE}
    config["export"] = {"dynamic": ["batch"], "exporter": "torchscript"}
    config["engine"] = {"profile": {"batch": {"min": 1, "opt": 1, "max": BATCH}}}
    config["calibrate"] = {"images": 4}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    made = command(*TRITON, "-p", "fp32", "-p", "int8", cwd=root)
    assert made.code == 0, made
    assert made.out.splitlines() == ["repository/cells_fp32/1", "repository/cells_int8/1"]
    return root


@pytest.fixture(scope="module")
def served(packaged: Path) -> Iterator[Served]:
    good = packaged / "repository" / "cells_fp32"
    for name, program in (("slow", SLOW), ("broken", BROKEN), ("wrong", WRONG)):
        model = packaged / "faulty" / name
        shutil.copytree(good, model)
        (model / "1" / "model.py").write_text(program)
        config = (model / CONFIG).read_text().replace('"cells_fp32"', f'"{name}"')
        config = config[: config.index("model_warmup")] + 'backend: "python"\n'
        (model / CONFIG).write_text(config.replace("max_queue_size: 256", "max_queue_size: 1"))
    other = packaged / "faulty" / "other_schema"
    shutil.copytree(good, other)
    config = (other / CONFIG).read_text().replace('"cells_fp32"', '"other_schema"')
    (other / CONFIG).write_text(config.replace('\\"schema_version\\":1', '\\"schema_version\\":99'))
    both = packaged / "both"
    both.mkdir()
    for model in (*(packaged / "repository").iterdir(), *(packaged / "faulty").iterdir()):
        (both / model.name).symlink_to(model)
    with running_triton(both, packaged) as triton:
        yield Served(packaged, triton)


def cells(count: int, size: int = SIZE) -> list[NDArray[np.uint8]]:
    return [draw_cells(seed, size)[0] for seed in range(500, 500 + count)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_equal_to_local_bit_for_bit(served: Served, scheme: str, precision: str) -> None:
    """Whole images, smaller ones, and one in tiles; masks and probabilities."""
    images = [*cells(5), *cells(1, 50), *cells(1, 100)]
    with Predictor(served.local(precision)) as local, Predictor(served.address(scheme, f"cells_{precision}")) as remote:
        assert remote.card == local.card
        assert remote.batch == BATCH
        wanted, got = (each.predict(images, probabilities=True) for each in (local, remote))
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert len(np.unique(wanted[0].labels)) == 4


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_64_concurrent_requests(served: Served, scheme: str) -> None:
    images = cells(64)
    address = served.address(scheme, "cells_fp32")
    before = statistics(served)
    with Predictor(address, streams=64, batch=1) as remote, ThreadPoolExecutor(64) as threads:
        got = list(threads.map(remote, images))
    with Predictor(served.local("fp32")) as local:
        for image, mask in zip(images, got, strict=True):
            np.testing.assert_array_equal(mask, local(image))
    after = statistics(served)
    assert after["inference_count"] - before["inference_count"] == 64
    assert after["execution_count"] - before["execution_count"] < 64, "Triton put no requests together"


def statistics(served: Served) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{served.triton.http}/v2/models/cells_fp32/stats") as answer:
        return dict(json.load(answer)["model_stats"][0])


def test_command_writes_what_local_prediction_writes(served: Served, tmp_path: Path, command: Command) -> None:
    for place, image in enumerate(cells(3)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{place}.png")
    common = ("images", "--probabilities", "npy")
    assert command("predict", served.local("int8"), *common, "-o", "local", cwd=tmp_path).code == 0
    there = ("--server", served.triton.server("grpc"))
    done = command("predict", "cells_int8/1", *common, "-o", "remote", *there, cwd=tmp_path)
    assert done.code == 0, done
    files = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert len(files) == 3 * 3 + 1
    assert sorted(path.name for path in (tmp_path / "remote").iterdir()) == files
    for name in files:
        if name != "predictions.jsonl":
            assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    again = command("predict", "cells_int8", *common, "-o", "remote", *there, "--resume", cwd=tmp_path)
    assert (again.code, again.out) == (0, "0 mask(s) in remote, 3 done before\n")
    other = command("predict", "cells_fp32", *common, "-o", "remote", *there, "--resume", cwd=tmp_path)
    assert other.code == 2
    assert "another model's" in other.err


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "has no model nothing"),
        ("cells_fp32/7", "does not serve version 7 of cells_fp32"),
        ("broken", "no weights today"),
        ("other_schema", "packaged by another version of unet-trt"),
    ],
)
def test_models_that_cannot_be_used(served: Served, scheme: str, model: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        Predictor(served.address(scheme, model))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_requests_that_are_refused_or_answered_badly(served: Served, scheme: str) -> None:
    (image,) = cells(1)
    with Predictor(served.address(scheme, "wrong")) as wrong, pytest.raises(ServerError, match="another logits than"):
        wrong(image)
    with (
        Predictor(RemoteRunner(served.address(scheme, "slow"), timeout=0.5)) as slow,
        pytest.raises(ServerError, match=r"does not answer within 0\.5 s"),
    ):
        slow(image)
    with RemoteRunner(served.address(scheme, "cells_fp32")) as runner:
        oversized = np.zeros((BATCH + 1, 1, SIZE, SIZE), np.float32)
        with pytest.raises(ServerError, match=f"batch-size must be <= {BATCH}"):
            runner({"image": oversized})
        with pytest.raises(ValueError, match="has shape"):  # seen before it is sent
            runner({"image": oversized[:1, :, : SIZE // 2]})
        assert runner({"image": oversized[:1]})["logits"].shape == (1, 4, SIZE, SIZE), "it goes on after a refusal"


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_full_queue(served: Served, scheme: str) -> None:
    (image,) = cells(1)

    def refusal(_: int) -> str:
        with pytest.raises(ServerError) as caught:
            slow(image)
        return caught.value.problem

    runner = RemoteRunner(served.address(scheme, "slow"), timeout=0.5)
    with Predictor(runner, streams=8, batch=BATCH) as slow, ThreadPoolExecutor(8) as threads:
        problems = set(threads.map(refusal, range(8)))
    assert any("Exceeds maximum queue size" in problem for problem in problems), problems


def test_malformed_requests_leave_the_server_as_it_was(served: Served) -> None:
    url = f"http://{served.triton.http}/v2/models/cells_fp32/infer"
    tensor = {"name": "image", "shape": [1, 1, SIZE, SIZE], "datatype": "FP32"}
    for body in (
        b"no JSON",
        b"{}",
        json.dumps({"inputs": [{**tensor, "data": [0.0]}]}).encode(),
        json.dumps({"inputs": [{**tensor, "datatype": "INT8", "data": []}]}).encode(),
        json.dumps({"inputs": [{**tensor, "name": "picture", "data": []}]}).encode(),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url, body), timeout=10)
        assert "error" in json.load(caught.value)
    with Predictor(served.address("http", "cells_fp32")) as remote:
        assert remote(cells(1)[0]).shape == (SIZE, SIZE)


@pytest.mark.triton
def test_triton_with_its_own_onnx_runtime(packaged: Path, tmp_path: Path, command: Command) -> None:
    if not (triton_home() / "backends" / "onnxruntime").is_dir():
        pytest.skip(f"{triton_home()} has no onnxruntime backend: set TRITON_HOME to a full Triton")
    made = command(*PACKAGE, "-p", "fp32", "--format", "triton", "-o", tmp_path / "repository", cwd=packaged)
    assert made.code == 0, made
    images = cells(3)
    with (
        running_triton(tmp_path / "repository", tmp_path) as triton,
        Predictor(f"{triton.server('grpc')}/cells_fp32") as remote,
    ):
        got = [remote(image) for image in images]
    with Predictor(packaged / "build" / "cells" / "engine" / "fp32" / "model.onnx") as local:
        for image, mask in zip(images, got, strict=True):
            assert (mask != local(image)).mean() < 1e-3  # its ONNX Runtime is of another version


class Other(http.server.BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None: ...


class Nonsense(Other):
    """Says yes to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"no")


@pytest.mark.parametrize("handler", [Other, Nonsense])
def test_servers_of_something_else(handler: type[http.server.BaseHTTPRequestHandler]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for scheme in ("http", "grpc"):
            with pytest.raises(ServerError, match=r"cannot be reached|no inference server"):
                RemoteRunner(f"{scheme}://127.0.0.1:{server.server_port}/cells", timeout=3)
        server.shutdown()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server_or_the_wrong_port(served: Served, scheme: str, tmp_path: Path, command: Command) -> None:
    other = served.triton.grpc if scheme == "http" else served.triton.http
    for place in (f"127.0.0.1:{free_port()}", "no-such-host.invalid:8000", other):
        with pytest.raises(ServerError, match="cannot be reached"):
            RemoteRunner(f"{scheme}://{place}/cells_fp32", timeout=3)
    Image.fromarray(cells(1)[0]).save(tmp_path / "one.png")
    down = command(
        "predict", "cells", "one.png", "-o", "masks", "--server", f"{scheme}://127.0.0.1:{free_port()}", cwd=tmp_path
    )
    assert down.code == 2
    assert down.err.startswith(f"unet-trt: {scheme}://127.0.0.1:")
    assert "to fix: start the server" in down.err
    assert not (tmp_path / "masks").exists()


def test_repository_is_checked_and_kept(packaged: Path, command: Command) -> None:
    check_model(packaged / "repository" / "cells_int8")
    before = {path: path.read_bytes() for path in (packaged / "repository").rglob("*") if path.is_file()}
    taken = command(*TRITON, "-p", "fp32", "--model-version", "1", cwd=packaged)
    assert taken.code == 2
    assert "version 1 of repository/cells_fp32 exists" in taken.err
    assert {path: path.read_bytes() for path in (packaged / "repository").rglob("*") if path.is_file()} == before


def test_archive_runs_on_its_own_and_is_the_same_every_time(packaged: Path, tmp_path: Path, command: Command) -> None:
    for name in ("one", "two"):
        target = tmp_path / name / "cells.zip"
        made = command(*PACKAGE, "-p", "int8", "--format", "zip", "-o", target, cwd=packaged)
        assert made.code == 0, made
    archive = tmp_path / "one" / "cells.zip"
    assert archive.read_bytes() == (tmp_path / "two" / "cells.zip").read_bytes()
    shutil.unpack_archive(archive, tmp_path)
    unpacked = tmp_path / "cells"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=unpacked, check=True)
    listed = {line.split("  ")[1] for line in (unpacked / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in unpacked.iterdir()} - {"SHA256SUMS"}
    assert {"run.py", "model.json", "model.onnx", "calibration.cache", "report.json"} <= listed
    images = cells(2)
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    subprocess.run(
        [sys.executable, "-I", unpacked / "run.py", tmp_path / "0.png", tmp_path / "1.png", "-o", tmp_path / "masks"],
        check=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    )
    with Predictor(packaged / "build" / "cells" / "engine" / "int8" / "model.onnx") as local:
        for place, image in enumerate(images):
            with Image.open(tmp_path / "masks" / f"{place}.png") as mask:
                np.testing.assert_array_equal(np.asarray(mask), local(image))
                assert mask.getpalette()[:3] == list(local.card.classes[0].colour)
