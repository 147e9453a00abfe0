"""Calibration of an exported UNet: ranges, reproducibility, memory, refusals."""

from __future__ import annotations

import itertools
import logging
import math
import struct
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from pipeline.artifacts import from_json, sha256_file
from pipeline.backends import cpu_histograms
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.ranges import ZERO_AMAX
from pipeline.calibration.report import CalibrationReport
from pipeline.calibration.table import CalibrationTable, check_table, read_cache
from pipeline.config import CalibrateConfig, PreprocessingConfig
from pipeline.data.dataset import Dataset, Sample, content_hashes
from pipeline.data.preprocessing import preprocess
from pipeline.errors import BuildFolderError, CalibrationError, DataError, ModelError
from pipeline.graph.io import load_model
from pipeline.graph.placement import activation_tensors
from pipeline.graph.quantize import quantize
from pipeline.stages import calibrate as stage

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

SIZE = 64
SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="grey", mean=(0.4,), std=(0.2,))
MINMAX, ENTROPY = (CalibrateConfig(algorithm=name, calibrator="cpu") for name in ("minmax", "entropy"))


def calibrate(
    clean: Path,
    samples: Sequence[Sample],
    config: CalibrateConfig,
    spec: PreprocessingConfig,
    folder: Path,
    **more: Any,
) -> CalibrationReport:
    """The stage as a build folder has it."""
    return stage.calibrate(clean, samples, config, spec, folder / "calibration.cache", folder / "report.json", **more)


def picture(name: str) -> Sample:
    """Smooth blobs, drawn from the name."""
    rng = np.random.default_rng(list(name.encode()))
    coarse = rng.uniform(0, 255, (8, 8))
    image = np.kron(coarse, np.ones((SIZE // 8, SIZE // 8))) + rng.normal(0, 8, (SIZE, SIZE))
    return Sample(name, image.clip(0, 255).astype(np.uint8)[..., np.newaxis], None)


def pictures(count: int) -> Dataset:
    return Dataset(tuple(f"image_{n:03d}" for n in range(count)), picture)


def export(path: Path, dynamic: bool) -> Path:
    from models.unet import UNet

    torch.manual_seed(0)
    network = UNet(in_channels=1, classes=3, base_channels=4).eval()
    head = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():  # no class wins everywhere
        head.bias -= network(torch.from_numpy(preprocess(picture("a").image, SPEC)[np.newaxis])).mean((0, 2, 3))
    shapes: Any = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    example = torch.zeros(2 if dynamic else 1, 1, SIZE, SIZE)
    torch.onnx.export(
        network,
        (example,),
        path,
        dynamo=True,
        external_data=False,
        input_names=["x"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    return path


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("static") / "model.onnx", dynamic=False)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("dynamic") / "model.onnx", dynamic=True)


def every_activation(path: Path, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """All values of all images at once, by the plainest means."""
    model = onnx.load(path)
    names = [name for name in activation_tensors(model) if name != "x"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values: dict[str, list[np.ndarray]] = {}
    with OnnxRuntimeRunner(model.SerializeToString(), optimize=False) as runner:
        for sample in samples:
            x = preprocess(sample.image, SPEC)[np.newaxis]
            for name, array in {"x": x, **runner({"x": x})}.items():
                values.setdefault(name, []).append(array.ravel())
    return {name: np.concatenate(arrays) for name, arrays in values.items()}


def test_ranges_are_those_of_all_activations(static: Path, tmp_path: Path) -> None:
    samples = list(pictures(3))
    report = calibrate(static, samples, MINMAX, SPEC, tmp_path)
    expected = every_activation(static, samples)
    tensors = activation_tensors(load_model(static))
    assert [entry.tensor for entry in report.tensors] == list(tensors)
    assert tensors[0] == "x"
    assert any(node.op_type == "Concat" for node in onnx.load(static).graph.node)
    for entry in report.tensors:
        values = expected[entry.tensor]
        assert (entry.minimum, entry.maximum) == (values.min(), values.max())
        assert entry.amax == np.abs(values).max()
        assert entry.clipped == 0


def test_entropy_clips_little_and_never_widens(static: Path, tmp_path: Path) -> None:
    samples = list(pictures(4))
    report = calibrate(static, samples, ENTROPY, SPEC, tmp_path)
    expected = every_activation(static, samples)
    for entry in report.tensors:
        values = np.abs(expected[entry.tensor])
        assert 0 < entry.amax <= values.max()
        assert entry.clipped == pytest.approx(np.mean(values > entry.amax), abs=2e-4)
    assert any(entry.clipped for entry in report.tensors)


def test_files(static: Path, tmp_path: Path) -> None:
    folder = tmp_path / "build" / "calibrate"
    report = calibrate(static, pictures(3), ENTROPY, SPEC, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["calibration.cache", "report.json"]
    assert from_json(CalibrationReport, folder / "report.json") == report
    assert report.cache_sha256 == sha256_file(folder / "calibration.cache")
    assert report.graph_sha256 == sha256_file(static)
    assert (report.algorithm, report.calibrator, report.bins) == ("entropy", "cpu", 2048)
    assert (report.image_count, report.images) == (3, ("image_000", "image_001", "image_002"))

    header, *lines = (folder / "calibration.cache").read_text().splitlines()
    assert header == "TRT-8600-EntropyCalibration2"
    for line, entry in zip(lines, report.tensors, strict=True):
        assert line == f"{entry.tensor}: {struct.pack('>f', entry.amax / 127).hex()}"
    table = read_cache(folder / "calibration.cache")
    names = activation_tensors(load_model(static))
    assert check_table(table, names, names) == []
    assert table.report == report


def test_the_order_of_the_images_does_not_matter(static: Path, tmp_path: Path) -> None:
    samples = list(pictures(6))
    forward = calibrate(static, samples, ENTROPY, SPEC, tmp_path / "a")
    backward = calibrate(static, samples[::-1], ENTROPY, SPEC, tmp_path / "b")
    assert forward.tensors == backward.tensors
    assert forward.cache_sha256 == backward.cache_sha256
    assert forward.images_sha256 == backward.images_sha256
    assert forward.images == backward.images[::-1]
    other = calibrate(static, samples[1:], ENTROPY, SPEC, tmp_path / "c")
    assert other.images_sha256 != forward.images_sha256
    assert other.cache_sha256 != forward.cache_sha256


@pytest.mark.parametrize("limit", [1, 100_000])
def test_segments_change_nothing(static: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(static, pictures(2), ENTROPY, SPEC, tmp_path / "a")
    monkeypatch.setattr(cpu_histograms, "SEGMENT_BYTES", limit)
    cut = calibrate(static, pictures(2), ENTROPY, SPEC, tmp_path / "b")
    assert cut.tensors == whole.tensors


def test_dynamic_batch_gives_the_same_ranges(static: Path, dynamic: Path, tmp_path: Path) -> None:
    assert isinstance(onnx.load(dynamic).graph.input[0].type.tensor_type.shape.dim[0].dim_param, str)
    a = calibrate(static, pictures(2), MINMAX, SPEC, tmp_path / "a")
    b = calibrate(dynamic, pictures(2), MINMAX, SPEC, tmp_path / "b")
    assert a.tensors[0] == b.tensors[0]
    assert b.tensors[-1].amax == pytest.approx(a.tensors[-1].amax, rel=1e-5)


def test_batches_give_the_same_ranges(dynamic: Path, tmp_path: Path) -> None:
    one = calibrate(dynamic, pictures(6), MINMAX, SPEC, tmp_path / "a")
    many = calibrate(dynamic, pictures(6), MINMAX.model_copy(update={"batch": 3}), SPEC, tmp_path / "b")
    assert [entry.tensor for entry in many.tensors] == [entry.tensor for entry in one.tensors]
    for a, b in zip(one.tensors, many.tensors, strict=True):
        assert b.amax == pytest.approx(a.amax, rel=1e-5)
    assert (many.image_count, many.images) == (6, one.images)
    assert many.notes == one.notes


def test_batches_that_a_graph_does_not_take(static: Path, dynamic: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"calibrate\.batch is 5") as caught:
        calibrate(static, pictures(5), CalibrateConfig(batch=5), SPEC, tmp_path)
    assert caught.value.expected is not None
    assert "batches of 1" in caught.value.expected


def test_a_batch_of_images_of_different_sizes(tmp_path: Path) -> None:
    path = small(tmp_path / "m.onnx", "{ y = Neg(x) }", "float[b, 1, h, w] x", "float[b, 1, h, w] y")
    samples = [picture("a"), Sample("b", picture("b").image[:32], None)]
    with pytest.raises(CalibrationError, match="images a, b have different sizes"):
        calibrate(path, samples, MINMAX.model_copy(update={"batch": 2}), SPEC, tmp_path)


class CountingRunner(OnnxRuntimeRunner):
    """Knows how many bytes of all runners' outputs were alive at once (tracemalloc does not see them)."""

    alive: ClassVar[list[weakref.ref[np.ndarray]]] = []
    most = 0

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        outputs = super().__call__(feeds)
        CountingRunner.alive = [ref for ref in self.alive if ref() is not None]
        CountingRunner.alive += [weakref.ref(array) for array in outputs.values()]
        now = sum(array.nbytes for ref in self.alive if (array := ref()) is not None)
        CountingRunner.most = max(self.most, now)
        return outputs


@pytest.fixture
def peak_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], int]:
    """The most that activations, and other arrays and objects, took at once when calibrating on so many images."""
    monkeypatch.setattr(cpu_histograms, "OnnxRuntimeRunner", CountingRunner)

    def measure(model: Path, count: int) -> int:
        CountingRunner.alive, CountingRunner.most = [], 0
        tracemalloc.start()
        try:
            calibrate(model, pictures(count), MINMAX, SPEC, tmp_path)
            return CountingRunner.most + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


def activation_bytes(model: Path) -> int:
    return sum(values.nbytes for values in every_activation(model, [picture("a")]).values())


def test_memory_does_not_grow_with_the_images(static: Path, peak_bytes: Callable[[Path, int], int]) -> None:
    peak_bytes(static, 2)
    few, many = peak_bytes(static, 8), peak_bytes(static, 64)
    assert many - few < activation_bytes(static) / 4


def test_few_images_are_noted(static: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pipeline"):
        report = calibrate(static, pictures(31), MINMAX, SPEC, tmp_path)
    assert any("31 calibration images" in note for note in report.notes)
    assert "31 calibration images" in caplog.text
    assert calibrate(static, pictures(32), MINMAX, SPEC, tmp_path).notes == ()


def test_repeated_images_are_noted(static: Path, tmp_path: Path) -> None:
    report = calibrate(static, [picture("a"), Sample("b", picture("a").image, None)], MINMAX, SPEC, tmp_path)
    assert any("1 of 2 calibration images repeat another" in note for note in report.notes)


def test_no_images(static: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration images"):
        calibrate(static, [], MINMAX, SPEC, tmp_path)


def test_validation_images_are_refused_by_content(static: Path, tmp_path: Path) -> None:
    held_out = content_hashes([Sample("val_7", picture("image_001").image, None), picture("another")])
    with pytest.raises(CalibrationError, match="calibration image image_001 is the validation image val_7"):
        calibrate(static, pictures(3), MINMAX, SPEC, tmp_path / "out", validation=held_out)
    assert not (tmp_path / "out").exists()
    calibrate(static, pictures(1), MINMAX, SPEC, tmp_path / "out", validation=held_out)


def test_images_of_another_size(static: Path, tmp_path: Path) -> None:
    samples = [picture("a"), Sample("tall", np.zeros((96, 64, 1), np.uint8), None)]
    with pytest.raises(CalibrationError, match="calibration image tall does not fit") as caught:
        calibrate(static, samples, MINMAX, SPEC, tmp_path)
    assert caught.value.got.startswith("(1, 1, 96, 64)")


def test_images_that_cannot_be_read(static: Path, tmp_path: Path) -> None:
    def load(name: str) -> Sample:
        raise DataError(f"the image {name} cannot be decoded")

    with pytest.raises(DataError, match="the image a"):
        calibrate(static, Dataset(("a",), load), MINMAX, SPEC, tmp_path)


def half_bad(count: int) -> Dataset:
    """Every second image cannot be decoded."""

    def load(name: str) -> Sample:
        if int(name[-1]) % 2:
            raise DataError(f"the image {name} cannot be decoded")
        return picture(name)

    return Dataset(pictures(count).names, load)


def test_bad_images_are_skipped_and_counted_where_asked_for(static: Path, tmp_path: Path) -> None:
    skipping = MINMAX.model_copy(update={"skip_bad": True})
    report = calibrate(static, half_bad(4), skipping, SPEC, tmp_path)
    assert report.images == ("image_000", "image_002")
    assert report.skipped == ("the image image_001 cannot be decoded", "the image image_003 cannot be decoded")
    assert any(note.startswith("2 images were skipped") for note in report.notes)
    good = calibrate(static, [picture(name) for name in report.images], MINMAX, SPEC, tmp_path / "good")
    assert good.cache_sha256 == report.cache_sha256
    with pytest.raises(CalibrationError, match="no calibration images") as caught:
        calibrate(static, Dataset(("image_001",), half_bad(2).load), skipping, SPEC, tmp_path / "none")
    assert caught.value.got == "1 that cannot be decoded"
    assert not (tmp_path / "none").exists()


def test_auto_keeps_the_algorithm_that_agrees_best(static: Path, tmp_path: Path) -> None:
    samples = list(pictures(9))
    auto = CalibrateConfig(algorithm="auto", calibrator="cpu", percentile=60)
    report = calibrate(static, samples, auto, SPEC, tmp_path)
    assert [trial.algorithm for trial in report.trials[-1:]] == ["percentile"]  # 40 % of all values clipped
    assert report.held_out == 2
    assert sorted(report.images) == [sample.name for sample in samples]
    kept = report.trials[0]
    assert report.algorithm == kept.algorithm
    assert kept.agreement > report.trials[-1].agreement
    assert any(note.startswith(f"kept {kept.algorithm}, ") for note in report.notes)
    # Its ranges are those of all images.
    same = calibrate(static, samples, auto.model_copy(update={"algorithm": kept.algorithm}), SPEC, tmp_path / "same")
    assert {t.tensor: t for t in same.tensors} == {t.tensor: t for t in report.tensors}


def test_auto_judges_on_images_that_did_not_choose(static: Path, tmp_path: Path) -> None:
    """The agreement is that of a Q/DQ graph whose ranges come from the other images alone."""
    samples = list(pictures(8))
    auto = CalibrateConfig(algorithm="auto", calibrator="cpu")
    trials = {t.algorithm: t.agreement for t in calibrate(static, samples, auto, SPEC, tmp_path).trials}
    others = [sample for place, sample in enumerate(samples) if place not in (3, 7)]
    calibrate(static, others, MINMAX, SPEC, tmp_path / "others")
    table = read_cache(tmp_path / "others" / "calibration.cache")
    typed = quantize(load_model(static), table, half=False, qdq="shared").SerializeToString()
    with OnnxRuntimeRunner(static) as reference, OnnxRuntimeRunner(typed) as candidate:
        output = reference.outputs[0].name
        equal = []
        for place in (3, 7):
            feed = {"x": preprocess(samples[place].image, SPEC)[np.newaxis]}
            equal.append(np.mean(reference(feed)[output].argmax(1) == candidate(feed)[output].argmax(1)))
    assert trials["minmax"] == pytest.approx(np.mean(equal), abs=1e-12)


def test_auto_needs_images_to_hold_out(static: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="3 calibration images are too few for algorithm: auto"):
        calibrate(static, pictures(3), CalibrateConfig(algorithm="auto", calibrator="cpu"), SPEC, tmp_path)


def test_an_interrupted_calibration_leaves_the_older_files(static: Path, tmp_path: Path) -> None:
    calibrate(static, pictures(1), MINMAX, SPEC, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def load(name: str) -> Sample:
        if name == "image_002":
            raise KeyboardInterrupt
        return picture(name)

    with pytest.raises(KeyboardInterrupt):
        calibrate(static, Dataset(pictures(3).names, load), MINMAX, SPEC, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_not_finite_activations_name_tensor_and_image(static: Path, tmp_path: Path) -> None:
    model = onnx.load(static)
    weights = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(weights).copy()
    values[0, 0, 0, 0] = math.nan
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, tmp_path / "nan.onnx")
    first = next(node.output[0] for node in model.graph.node if weights.name in node.input)
    with pytest.raises(CalibrationError, match=rf"tensor {first} holds NaN.*image image_000"):
        calibrate(tmp_path / "nan.onnx", pictures(2), MINMAX, SPEC, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def small(path: Path, body: str, inputs: str = "float[1, 1, 64, 64] x", outputs: str = "float[1, 1, 64, 64] y") -> Path:
    onnx.save(
        parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> agraph ({inputs}) => ({outputs}) {body}'), path
    )
    return path


def test_segments_are_not_alive_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak_bytes: Callable[[Path, int], int]
) -> None:
    """Twelve tensors of 1 MiB, of which one segment holds two at most."""
    chain = " ".join(f"t{n + 1} = Neg(t{n})" for n in range(11))
    model = small(
        tmp_path / "m.onnx",
        f"<int64[4] r = {{1, 64, 1, 1}}> {{ t0 = Tile(x, r) {chain} y = Neg(t11) }}",
        outputs="float[1, 64, 64, 64] y",
    )
    peak_bytes(model, 1)
    whole = peak_bytes(model, 2)
    monkeypatch.setattr(cpu_histograms, "SEGMENT_BYTES", 2 << 20)
    cut = peak_bytes(model, 2)
    assert whole > 12 << 20
    assert cut < whole - (8 << 20)


def test_a_tensor_of_zeros_gets_a_small_range(tmp_path: Path) -> None:
    path = small(tmp_path / "m.onnx", "<float zero = {0.0}> { z = Mul(x, zero) y = Add(x, z) }")
    report = calibrate(path, pictures(1), ENTROPY, SPEC, tmp_path)
    by_name = {entry.tensor: entry for entry in report.tensors}
    assert by_name["z"].amax == ZERO_AMAX
    assert any("tensor z is zero on every image" in note for note in report.notes)
    assert not any("tensor y" in note for note in report.notes)
    assert read_cache(tmp_path / "calibration.cache").scale("z") == 2.0**-14


def test_a_fixed_batch_gets_the_image_repeated(tmp_path: Path) -> None:
    shape = "float[3, 1, 64, 64]"
    path = small(tmp_path / "m.onnx", "{ y = Neg(x) }", f"{shape} x", f"{shape} y")
    report = calibrate(path, pictures(1), MINMAX, SPEC, tmp_path)
    assert report.tensors[1].minimum == -report.tensors[0].maximum


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m.onnx", "{ y = Add(x, w) }", "float[1, 1, 64, 64] x, float[1, 1, 64, 64] w")
    with pytest.raises(ModelError, match="has 2 inputs"):
        calibrate(path, pictures(1), MINMAX, SPEC, tmp_path)


def test_an_unwritable_folder(static: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildFolderError, match="file"):
        calibrate(static, pictures(1), MINMAX, SPEC, tmp_path / "file" / "calibrate")


def test_a_last_batch_is_filled_up_with_its_own_images(
    dynamic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a GPU, whose calibrators take batches of one shape only."""
    from pipeline.backends import tensorrt

    fed: list[np.ndarray] = []

    def fake(model: Path, batches: Iterator[dict[str, np.ndarray]], algorithm: str, config: object) -> CalibrationTable:
        fed.extend(itertools.chain.from_iterable(batch.values() for batch in batches))
        return CalibrationTable("entropy", {"x": 2.0})

    monkeypatch.setattr(tensorrt, "calibrate_with_tensorrt", fake)
    samples = list(pictures(7))
    report = calibrate(dynamic, samples, CalibrateConfig(calibrator="tensorrt", batch=5), SPEC, tmp_path)
    assert [x.shape for x in fed] == [(5, 1, SIZE, SIZE)] * 2
    wanted = [preprocess(sample.image, SPEC) for sample in samples]
    np.testing.assert_array_equal(np.concatenate(fed), [wanted[i] for i in (0, 1, 2, 3, 4, 5, 6, 5, 6, 5)])
    assert report.image_count == 7
    assert "of the 5 images of the last batch, 3 are repeated to fill it up" in report.notes


def test_tensorrts_own_calibrator(static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a GPU: TensorRT gets each image once, checked, and its table becomes the cache."""
    from pipeline.backends import tensorrt

    seen: list[np.ndarray] = []

    def fake(model: Path, batches: Iterator[dict[str, np.ndarray]], algorithm: str, config: object) -> CalibrationTable:
        assert (model, algorithm) == (static, "minmax")
        seen.extend(itertools.chain.from_iterable(batch.values() for batch in batches))
        return CalibrationTable("minmax", {"x": 2.0, "y": 3.0})

    monkeypatch.setattr(tensorrt, "calibrate_with_tensorrt", fake)
    config = CalibrateConfig(algorithm="minmax", calibrator="tensorrt")
    report = calibrate(static, pictures(2), config, SPEC, tmp_path)
    assert [x.shape for x in seen] == [(1, 1, SIZE, SIZE)] * 2
    assert (report.calibrator, report.image_count) == ("tensorrt", 2)
    assert [(entry.tensor, entry.amax, entry.clipped) for entry in report.tensors] == [("x", 2, None), ("y", 3, None)]
    assert read_cache(tmp_path / "calibration.cache").amax["y"] == pytest.approx(3, rel=1e-6)
    with pytest.raises(CalibrationError, match="is the validation image"):
        calibrate(static, pictures(2), config, SPEC, tmp_path, validation=content_hashes([picture("image_001")]))
