"""Prediction, validation and calibration on a real Ray cluster of this machine's cores, whose workers really die."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import __version__
from pipeline.artifacts import ModelCard, from_json, sha256_file, write_atomically
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.report import CalibrationReport
from pipeline.cli.arguments import open_fleet
from pipeline.cli.deployment import _gpu_engines
from pipeline.config import CalibrateConfig, ClassConfig, PreprocessingConfig, Tolerance, ValidateConfig
from pipeline.data.dataset import image_folder
from pipeline.errors import BuildFolderError, ConfigError, DataError, EngineError, ModelError, UnsupportedError
from pipeline.fleet.answers import Opened, Raised
from pipeline.fleet.connection import connect
from pipeline.fleet.fleet import Fleet
from pipeline.fleet.hosts import check_opened
from pipeline.fleet.portions import Part, Portions
from pipeline.fleet.proxies import HostedPredictor, Turns
from pipeline.fleet.workers import check_shared
from pipeline.graph.io import write_card
from pipeline.predictor import Prediction, Predictor
from pipeline.reports import Candidate
from pipeline.stages.calibrate import calibrate
from pipeline.stages.predict import Outcome, Wanted, predict
from pipeline.stages.validate import validate
from tests.conftest import REPOSITORY, Result
from tests.integration.test_bad_input import fails
from tests.tiny_unet import save, tiny_unet

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'unet-trt[ray]'")

Command = Callable[..., Result]
SIZE, IMAGES = 32, 12
SPEC = PreprocessingConfig(height=SIZE, width=SIZE, resize="stretch")
CLASSES = tuple(ClassConfig(name=name, colour=(9 * i, 20, 90)) for i, name in enumerate("abc"))
CARD = ModelCard("tiny", SPEC, CLASSES)
# Of the image that ends every process that predicts it.
POISON = (7, 9)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster that a fleet has started, with cores for four actors, and a GPU that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4, "GPU": 1}')
        with Fleet():
            yield ray.get_runtime_context().gcs_address
    assert not ray.is_initialized()


@pytest.fixture
def fleet(cluster: str) -> Iterator[Fleet]:
    with Fleet(workers=2) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``clean.onnx``, ``other.onnx``, ``images`` and ``labels``."""
    root, rng = tmp_path_factory.mktemp("fleet"), np.random.default_rng(0)
    for name, seed in (("clean", 0), ("other", 1)):
        model = tiny_unet(seed=seed)
        write_card(model, CARD)
        save(model, root / f"{name}.onnx")
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    for index in range(IMAGES):
        pixels = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(9, 0).repeat(8, 1)
        Image.fromarray(pixels).save(root / "images" / f"{index:02d}.png")
        Image.fromarray(pixels[..., 0] % 3).save(root / "labels" / f"{index:02d}.png")
    return root


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The journal without times, by name; each name once."""
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({line["name"] for line in found}) == len(found)
    return {line["name"]: {key: line[key] for key in line if key != "seconds"} for line in found}


@pytest.fixture
def alone(files: Path, tmp_path: Path) -> Path:
    """What one process makes of the images."""
    with Predictor(files / "clean.onnx") as predictor:
        predict(predictor, "sha", [files / "images"], Wanted(tmp_path / "alone"))
    return tmp_path / "alone"


class Mortal(Predictor):
    """Ends its process where ``ends`` says so, as the kernel does that lacks memory."""

    def __init__(self, model: Path, ends: Callable[[Sequence[Any]], bool]) -> None:
        super().__init__(model)
        self._again = functools.partial(Mortal, model, ends)
        self.ends = ends

    def predict(self, images: Sequence[Any], **options: Any) -> list[Prediction]:
        if self.ends(images):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(images, **options)


class MortalModel(Predictor):
    """Ends its process, which others have come to, where ``ends`` says so."""

    def __init__(self, model: Path, ends: Callable[[Sequence[Any]], bool], through_ray: Path) -> None:
        super().__init__(model)
        self.ends, self.through_ray = ends, through_ray

    def predict(self, images: Sequence[Any], **options: Any) -> list[Prediction]:
        """Of images that came through Ray."""
        with self.through_ray.open("a") as file:
            file.write("." * len(images))
        return super().predict(images, **options)

    def _outputs(self, patches: Iterable[Any]) -> Generator[Any, None, None]:
        if self.ends([]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super()._outputs(patches)


def once(flag: Path, parent: int, images: Sequence[Any]) -> bool:
    """At the third batch that anybody predicts, and never again."""
    with (flag.parent / "batches").open("a") as file:
        file.write(".")
    if os.getpid() == parent or (flag.parent / "batches").stat().st_size < 3 or flag.exists():
        return False
    flag.touch()
    return True


def on_poison(images: Sequence[Any]) -> bool:
    return any((image.height, image.width) == POISON for image in images)


def test_a_killed_worker_loses_and_repeats_nothing(
    fleet: Fleet, files: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.predict.PORTION", 4)
    flag = tmp_path / "killed"
    with Mortal(files / "clean.onnx", functools.partial(once, flag, os.getpid())) as predictor:
        outcome = predict(predictor, "sha", [files / "images"], Wanted(tmp_path / "out"), fleet)
    assert flag.exists()
    assert len(fleet.lost_workers) == 1
    assert outcome == Outcome(IMAGES, 0, 0)
    assert masks(tmp_path / "out") == masks(alone)
    assert lines(tmp_path / "out") == lines(alone)


def test_a_run_goes_on_where_another_ended(fleet: Fleet, files: Path, alone: Path, tmp_path: Path) -> None:
    some = sorted((files / "images").iterdir())[::3]
    with Predictor(files / "clean.onnx") as predictor:
        assert predict(predictor, "sha", some, Wanted(tmp_path / "out")) == Outcome(len(some), 0, 0)
        (tmp_path / "out" / f"{some[0].stem}.png").unlink()
        rest = predict(predictor, "sha", [files / "images"], Wanted(tmp_path / "out", resume=True), fleet)
    assert rest == Outcome(IMAGES - len(some) + 1, len(some) - 1, 0)
    assert masks(tmp_path / "out") == masks(alone)


def late_or_wrong(folder: Path, items: Sequence[str], again: bool) -> None:
    """One worker stays at work, and the other fails once it does."""
    begun = folder / "begun"
    if "late" in items:
        write_atomically(begun, str(os.getpid()).encode())
        time.sleep(600)
    while not begun.exists():
        time.sleep(0.05)
    raise DataError("wrong")


def test_an_error_ends_who_is_still_at_work(fleet: Fleet, tmp_path: Path) -> None:
    parts = fleet.parts(functools.partial(late_or_wrong, tmp_path), ["late", "wrong"], 1, "staying")
    with contextlib.closing(parts), pytest.raises(DataError, match="wrong"):
        next(parts)
    pid = (tmp_path / "begun").read_text()
    (ended,) = fleet.lost_workers
    assert pid in ended
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/proc", pid).exists()


def test_one_poison_image_is_a_line_and_the_others_are_done(
    fleet: Fleet, files: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.fleet.portions.CUT_AFTER", 1)
    monkeypatch.setattr("pipeline.fleet.portions.ALONE_AFTER", 1)
    poison = tmp_path / "poison.png"
    Image.new("RGB", POISON[::-1]).save(poison)
    with Mortal(files / "clean.onnx", on_poison) as predictor:
        outcome = predict(predictor, "sha", [files / "images", poison], Wanted(tmp_path / "out"), fleet)
    assert (outcome.done, outcome.failed) == (IMAGES, 1)
    assert "its process died 2 times over it" in outcome.first_failure
    assert masks(tmp_path / "out") == masks(alone)
    assert lines(tmp_path / "out")["poison"]["image"] == str(poison)


@pytest.mark.parametrize("node", ["here", "elsewhere"])
def test_a_hosted_model_that_dies_is_opened_again(
    fleet: Fleet, files: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """On this machine, where workers come to it, and on another, which gets images through Ray."""
    monkeypatch.setattr("pipeline.stages.predict.PORTION", 2)
    flag = tmp_path / "killed"
    ends, through_ray = functools.partial(once, flag, os.getpid()), tmp_path / "through_ray"
    through_ray.touch()
    opens = functools.partial(MortalModel, files / "clean.onnx", ends, through_ray)
    wanted = Wanted(tmp_path / "out", probabilities="npy")
    with fleet.host_predictor(opens, count=1) as predictor:
        if node == "elsewhere":
            hosts = [replace(host, node="elsewhere") for host in fleet._hosts]
            predictor = HostedPredictor(Turns(hosts), predictor._facts)
        assert predict(predictor, "sha", [files / "images"], wanted, fleet) == Outcome(IMAGES, 0, 0)
    assert flag.exists()
    # Beside the host, only what was under way when it died.
    assert (through_ray.stat().st_size >= IMAGES) == (node == "elsewhere")
    made = masks(tmp_path / "out")
    assert {name: made[name] for name in masks(alone)} == masks(alone)
    assert np.load(tmp_path / "out" / "00_probabilities.npy").shape == (3, 36, 40)


def test_the_command_makes_what_one_process_makes(cluster: str, files: Path, tmp_path: Path, unet_trt: Command) -> None:
    (tmp_path / "broken.png").write_bytes((files / "images" / "00.png").read_bytes()[:60])
    given = (files / "clean.onnx", files / "images", tmp_path / "broken.png")
    results = [
        unet_trt("predict", *given, "-o", folder, *more)
        for folder, more in (("one", ()), ("many", ("--distributed", "--workers", "2", "--address", cluster)))
    ]
    for result in results:
        fails(result, 2, "1 image(s) could not be read", "broken.png")
    assert "12 mask(s)" in results[1].out
    assert "13 in" in results[1].err
    one, many = (tmp_path / "working" / folder for folder in ("one", "many"))
    assert masks(one) == masks(many)
    assert lines(one) == lines(many)


def judged(files: Path, folder: Path, fleet: Fleet | None) -> dict[str, Any]:
    """The verdict without its seconds, and what lies in its folder."""
    folder.mkdir()
    config = ValidateConfig(tolerances={"fp16": Tolerance(atol=1, rtol=1)}, pictures=2, saved_runs=1)
    what = Candidate("fp16", True, "ONNX Runtime", "0", None, None)
    opens = functools.partial(OnnxRuntimeRunner, files / "other.onnx")
    dataset = image_folder(files / "images", "rgb", files / "labels", CARD)
    candidate = opens() if fleet is None else fleet.host_runner(opens, count=1)
    with OnnxRuntimeRunner(files / "clean.onnx") as reference, candidate:
        report = validate(reference, candidate, what, dataset, CARD, config, folder, fleet=fleet)
    drawn = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
    names = sorted(path.name for path in folder.iterdir())
    return {**asdict(report), "seconds": 0, "drawn": drawn, "files": names}


def test_a_verdict_is_equal_to_the_last_bit(fleet: Fleet, files: Path, tmp_path: Path) -> None:
    alone = judged(files, tmp_path / "alone", None)
    assert len(alone["images"]) == IMAGES
    assert alone["outputs"]["logits"]["mean_abs"] > 0
    assert judged(files, tmp_path / "fleet", fleet) == alone


def test_histograms_merge_to_those_of_one_process(fleet: Fleet, files: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (files / "images").iterdir():
        (images / path.name).symlink_to(path)
    (images / "05b.png").write_bytes(b"no image")
    config = CalibrateConfig(images=99, algorithm="auto", calibrator="cpu", skip_bad=True)
    reports = []
    for name, given in (("alone", None), ("fleet", fleet)):
        cache, report = tmp_path / f"{name}.cache", tmp_path / f"{name}.json"
        calibrate(files / "clean.onnx", image_folder(images, "rgb"), config, SPEC, cache, report, fleet=given)
        reports.append(asdict(from_json(CalibrationReport, report)) | {"seconds": 0, "collect_seconds": 0})
    assert reports[0] == reports[1]
    assert reports[0]["image_count"] == IMAGES
    assert sha256_file(tmp_path / "alone.cache") == sha256_file(tmp_path / "fleet.cache")


def test_an_error_of_the_work_is_raised_as_it_is(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_at(places: Sequence[int], again: bool) -> list[int]:
        if 5 in places:
            raise ModelError("five", expected="less")
        return list(places)

    with pytest.raises(ModelError, match="five") as caught:
        list(fleet.in_order(fails_at, range(9), "counting", size=2))
    assert caught.value.expected == "less"

    parts = [Part(2, (2, 3), [2, 3]), Part(0, (0, 1), [0, 1]), Part(4, (4,), None, "its process died")]
    monkeypatch.setattr(fleet, "parts", lambda *given, **more: (part for part in parts))
    results = fleet.in_order(fails_at, range(5), "counting")
    assert [next(results), next(results)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="4 cannot be worked on: its process died"):
        next(results)


def test_what_a_cluster_lacks(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "gpus", 0)
    with pytest.raises(UnsupportedError, match="no worker has a GPU"):
        fleet.host_predictor(no_driver)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="99 workers cannot be had"):
        Fleet(workers=99)
    with pytest.raises(UnsupportedError, match=r"this machine has no NVIDIA driver \(on ") as caught:
        fleet.host_predictor(no_driver)
    assert caught.value.exit_code == 3
    with pytest.raises(BuildFolderError, match="not the same folder as where the run was started"):
        check_shared(tmp_path, "token")


def no_driver() -> Predictor:
    raise UnsupportedError("this machine has no NVIDIA driver")


def test_stragglers_are_named(cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pipeline.fleet.show.STRAGGLING_SECONDS", 0.5)

    def slow_at(places: Sequence[int], again: bool) -> list[int]:
        time.sleep(2 if 3 in places else 0.01)
        return list(places)

    with Fleet(workers=1) as fleet, caplog.at_level("INFO", "pipeline.fleet"):
        assert list(fleet.in_order(slow_at, range(4), "counting", size=1)) == [[0], [1], [2], [3]]
    assert "straggler: 3 on " in caplog.text
    assert "counting: 4 in " in caplog.text


def test_gpus_of_several_types_are_named() -> None:
    refused = Raised(EngineError("model.engine was built on a NVIDIA L4"))
    first, second = (Opened(host, "", "", "NVIDIA L4", __version__, None) for host in "ab")
    other = Opened("c", "", "", "NVIDIA A10", __version__, refused)
    with pytest.raises(EngineError, match="GPUs are of 2 types") as caught:
        check_opened([first, second, other])
    assert caught.value.got == "1 NVIDIA A10, 2 NVIDIA L4"
    with pytest.raises(EngineError, match=r"was built on a NVIDIA L4 \(on c\)"):
        check_opened([other])


def test_bad_addresses_and_options(files: Path, tmp_path: Path, unet_trt: Command) -> None:
    given = ("predict", files / "clean.onnx", files / "images", "-o", "masks")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        result = unet_trt(*given, "--distributed", "--address", address)
    fails(result, 2, f"no Ray cluster answers at {address}", "Connection refused", "leave --address out")
    assert not (tmp_path / "working" / "masks").exists()
    with pytest.raises(ConfigError, match=r"'ray://head' is no address of a cluster"):
        connect("ray://head")
    with pytest.raises(ConfigError, match="--workers is for a run on Ray"), open_fleet(False, None, 2):
        pass
    with pytest.raises(ConfigError, match=r"-p mixed builds no engine of m\.onnx"):
        _gpu_engines(Path("m.onnx"), ["mixed"], None, None)


def test_ray_is_imported_for_fleets_alone(files: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from pipeline.cli import main; main()"
    given = ["predict", str(files / "clean.onnx"), str(files / "images"), "-o", str(tmp_path / "masks")]
    for more, code, said in (([], 0, ""), (["--distributed"], 3, "pip install 'unet-trt[ray]'")):
        done = subprocess.run(
            [sys.executable, "-c", program, *given, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done
        assert said in done.stderr


def test_portions_become_smaller_towards_the_end() -> None:
    portions, found = Portions(range(1000), 64, workers=4), []
    while (portion := portions.next(is_alone=False)) is not None:
        found.append(portion)
    sizes = [len(portion.items) for portion in found]
    assert [item for portion in found for item in portion.items] == list(range(1000))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[:8] == [64] * 8
    assert sizes[-8:] == [1] * 8
    assert len(sizes) < 60


def test_portions_take_the_time_that_is_wanted() -> None:
    portions = Portions(range(100_000), 64, workers=4, seconds=4.0)
    sizes: dict[float, list[int]] = {}
    # Seconds an item: photographs; large images; small ones.
    for pace in (1 / 64, 3.0, 1e-6):
        for _ in range(40):
            portion = portions.next(is_alone=False)
            assert portion is not None
            portions.took(len(portion.items), pace * len(portion.items))
            sizes.setdefault(pace, []).append(len(portion.items))
    assert sizes[1 / 64] == [64, 128, *[256] * 38]
    assert sizes[3.0] == [256, *[1] * 39]
    assert sizes[1e-6][7:] == [1, 2, 4, 8, 16, 32, 64, 128, *[256] * 25]
    resumed = Portions(range(10_000), 64, workers=4, seconds=4.0)
    for _ in range(40):  # all of it done before
        portion = resumed.next(is_alone=False)
        assert portion is not None
        assert len(portion.items) == 64
        resumed.took(0, 1e-3)
    steady = Portions(range(1000), 64, workers=4)
    first = steady.next(is_alone=False)
    assert first is not None
    steady.took(len(first.items), 1e-3)
    second = steady.next(is_alone=False)
    assert second is not None
    assert len(second.items) == 64


def test_portions_are_cut_and_then_tried_alone() -> None:
    portions = Portions(range(5), 2)
    first, second, third = (portions.next(is_alone=False) for _ in range(3))
    assert first is not None
    assert [p and p.items for p in (first, second, third)] == [(0, 1), (2, 3), (4,)]
    portions.put_back(first)
    again = portions.next(is_alone=False)
    assert again is not None
    assert again.items == (0, 1)
    portions.put_back(again)
    singles = [portions.next(is_alone=False) for _ in range(2)]
    assert [p and (p.start, p.items) for p in singles] == [(0, (0,)), (1, (1,))]
    assert portions.is_done
    assert singles[1] is not None
    portions.put_back(singles[1])
    assert portions.next(is_alone=False) is None
    assert not portions.is_done
    last = portions.next(is_alone=True)
    assert last is not None
    assert last.items == (1,)
    assert portions.is_done
