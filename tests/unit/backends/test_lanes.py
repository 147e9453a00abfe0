"""Batches through an engine on a fake GPU: several at a time, in order, by CUDA graphs, and nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import engines
from pipeline.artifacts import ModelCard, Profile, TensorSpec, to_json
from pipeline.backends.lanes import EngineLane, Lanes
from pipeline.backends.runner import EngineRunner
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import DataError, EngineError, ModelError
from pipeline.predictor import Predictor
from tests.unit.backends.fakes import PLAN, FakeCuda, Network, Tensor, fake_trt, plan_manifest

SIZE = 8
CLASSES = tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in ("dark", "bright"))


def bright(x: NDArray[Any]) -> NDArray[Any]:
    return (x[..., 0] > 127).astype(np.uint8)


def threshold(shape: tuple[int, ...], *profile: tuple[int, ...]) -> Network:
    """uint8 images, (N, H, W, 1), to labels."""
    return Network(shape, lambda shape: shape[:3], bright, "UINT8", profile)


CARD = ModelCard("t", PreprocessingConfig(height=SIZE, width=SIZE, channels="grey"), CLASSES)
FIXED = threshold((1, SIZE, SIZE, 1))
FREE = threshold((-1, -1, -1, 1), (1, 4, 4, 1), (2, 8, 8, 1), (3, 16, 16, 1))
NETWORKS = {"fixed": FIXED, "free": FREE}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


@pytest.fixture(params=["fixed", "free"])
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture
def predictor(gpu: FakeCuda) -> Callable[..., Predictor]:
    def make(network: Network, **keys: Any) -> Predictor:
        return Predictor(EngineRunner(fake_trt(gpu, network), PLAN), CARD, **keys)

    return make


def drawn(count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8))


def balanced(gpu: FakeCuda) -> bool:
    """Whether everything made has been released."""
    pairs = [
        ("StreamCreateWithFlags", "StreamDestroy"),
        ("EventCreateWithFlags", "EventDestroy"),
        ("GraphInstantiate", "GraphExecDestroy"),
    ]
    return not gpu.live and all(gpu.calls[f"cuda{made}"] == gpu.calls[f"cuda{gone}"] for made, gone in pairs)


@pytest.mark.parametrize("refuse", [False, True])
def test_a_lane_allocates_nothing_in_the_steady_state(gpu: FakeCuda, refuse: bool) -> None:
    gpu.refuse_capture = refuse
    lane = EngineLane(EngineRunner(fake_trt(gpu, FREE), PLAN))
    for shape, runs in (((2, 8, 8, 1), 6), ((3, 4, 4, 1), 1), ((1, 16, 16, 1), 4)):
        for run in range(runs):
            if run == 2:
                before = gpu.calls.copy()
            batch = np.random.default_rng(run).integers(0, 256, shape, dtype=np.uint8)
            lane.memory(shape)[:] = batch
            lane.start()
            np.testing.assert_array_equal(lane.finish(), bright(batch))
        made = {name for name in gpu.calls - before if "Malloc" in name or "Instantiate" in name or "Create" in name}
        assert not made or runs < 3
    assert gpu.calls["cudaGraphLaunch"] == (0 if refuse else 5 + 3)
    lane.close()
    assert not gpu.live


def test_a_lane_outlives_refused_shapes_and_failed_runs(gpu: FakeCuda) -> None:
    trt = fake_trt(gpu, FREE)
    lane = EngineLane(EngineRunner(trt, PLAN))
    with pytest.raises(EngineError, match="was not built for"):
        lane.memory((9, 8, 8, 1))
    lane.memory((1, 8, 8, 1))[:] = 200
    trt.context.fails = True
    with pytest.raises(EngineError, match="failed to run"):
        lane.start()
    lane.settle()
    trt.context.fails = False
    lane.memory((1, 8, 8, 1))[:] = 200
    lane.start()
    assert (lane.finish() == 1).all()


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_predictions_come_in_order(
    gpu: FakeCuda, predictor: Callable[..., Predictor], network: Network, streams: int
) -> None:
    images = [*drawn(9), *drawn(3, (5, 7)), *drawn(8), *drawn(2, (20, 37))]
    with predictor(network, streams=streams) as made:
        for _ in range(2):
            for image, result in zip(images, made.predict(images), strict=True):
                np.testing.assert_array_equal(result.labels, image > 127)
        assert gpu.calls["cudaStreamCreateWithFlags"] == streams
        assert (gpu.calls["cudaEventSynchronize"] > 0) == (streams > 1)  # a thread gives up its core
    assert balanced(gpu)


def test_one_image_at_a_time_needs_one_lane(gpu: FakeCuda, predictor: Callable[..., Predictor]) -> None:
    with predictor(FIXED) as made:
        for image in drawn(5):
            np.testing.assert_array_equal(made(image), image > 127)
    assert gpu.calls["cudaStreamCreateWithFlags"] == 1
    assert gpu.calls["cudaMalloc"] == 2
    assert gpu.calls["cudaGraphLaunch"] == 4
    assert not gpu.calls["cudaEventSynchronize"]  # it is waited for on the core


def test_threads_share_the_lanes(gpu: FakeCuda, predictor: Callable[..., Predictor], network: Network) -> None:
    images = drawn(200)
    with predictor(network) as made, ThreadPoolExecutor(8) as pool:
        pieces = [images[start : start + 1 + start % 7] for start in range(0, 190, 3)]
        for piece, results in zip(pieces, pool.map(made.predict, pieces), strict=True):
            for image, result in zip(piece, results, strict=True):
                np.testing.assert_array_equal(result.labels, image > 127)
    assert balanced(gpu)


def test_an_error_in_the_middle_gives_every_lane_back(gpu: FakeCuda, predictor: Callable[..., Predictor]) -> None:
    bad = np.full((SIZE, SIZE), 128, np.uint8)
    wrong = Network(FIXED.shape, FIXED.output, lambda x: np.full(x.shape[:3], 7 if (x == 128).all() else 0), "UINT8")
    images = drawn(10)
    with predictor(wrong, streams=3) as made:
        for place in (0, 1, 4, 9):
            with pytest.raises(ModelError, match="gives class 7"):
                made.predict([*images[:place], bad, *images[place:]])
        assert len(made.predict(images)) == 10
        assert gpu.calls["cudaStreamCreateWithFlags"] == 3
    assert balanced(gpu)


def test_an_engines_manifest_says_what_to_feed(
    gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fed = []

    def compute(x: NDArray[Any]) -> NDArray[Any]:
        fed.append(x.shape)
        return bright(x)

    network = dataclasses.replace(FREE, compute=compute)
    monkeypatch.setattr(engines, "APIS", {"tensorrt": lambda: fake_trt(gpu, network)})
    (tmp_path / "model.engine").write_bytes(PLAN)
    manifest = plan_manifest(
        inputs=(TensorSpec("x", ("n", "h", "w", 1), "uint8"),),
        outputs=(TensorSpec("y", ("n", "h", "w"), "uint8"),),
        profiles={"x": Profile(*FREE.profile)},
        card=CARD,
        multiples={"h": 3, "width": 5},
        aligns_corners=True,
    )
    (tmp_path / "manifest.json").write_bytes(to_json(manifest))
    with Predictor(tmp_path / "model.engine") as made:
        for image in (*drawn(1, (3, 11)), *drawn(1, (40, 9))):
            np.testing.assert_array_equal(made(image), image > 127)
    assert {shape[1] % 3 for shape in fed} == {shape[2] % 5 for shape in fed} == {0}
    assert max(shape[1] for shape in fed) == 15
    assert [record.levelname for record in caplog.records if "align_corners" in record.getMessage()] == ["WARNING"]


def test_an_engine_without_manifest_needs_trust_and_a_card(
    gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "APIS", {"tensorrt": lambda: fake_trt(gpu, FIXED)})
    path = tmp_path / "model.engine"
    path.write_bytes(PLAN)
    with pytest.raises(EngineError, match=r"there is no .*manifest\.json"):
        Predictor(path, CARD)
    with pytest.raises(ModelError, match="does not say how images are preprocessed"):
        Predictor(path, trust=True)
    assert balanced(gpu)
    (image,) = drawn(1)
    with Predictor(path, CARD, trust=True) as made:
        np.testing.assert_array_equal(made(image), image > 127)


def stacked(count: int, size: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.uint8]:
    return np.stack(drawn(count, size))[..., np.newaxis]


@pytest.mark.parametrize("refuse", [False, True])
def test_images_on_the_gpu_give_labels_there(
    gpu: FakeCuda, predictor: Callable[..., Predictor], network: Network, refuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.refuse_capture = refuse
    kinds: list[int] = []
    copy = gpu.cudaMemcpyAsync
    monkeypatch.setattr(gpu, "cudaMemcpyAsync", lambda *given: (kinds.append(given[3]), copy(*given))[1])
    kept = []
    with predictor(network) as made:
        for count in (1, 3, 7, 7, 1):  # more than a batch, and less
            images = stacked(count)
            labels = made.predict_on_gpu(Tensor(images))
            assert (labels.shape, labels.dtype) == (images.shape[:3], np.uint8)
            kept.append((images, labels))
        assert set(kinds) == {3}  # nothing but copies within the GPU
        assert gpu.calls["cudaMallocHost"] == 0
        assert (gpu.calls["cudaGraphLaunch"] == 0) == refuse
        mixed = drawn(2)
        for image, result in zip(mixed, made.predict(mixed), strict=True):  # the lanes serve the host as before
            np.testing.assert_array_equal(result.labels, image > 127)
        again = made.predict_on_gpu(Tensor(torch.from_numpy(kept[2][0])))
        np.testing.assert_array_equal(again.numpy(), bright(kept[2][0]))
    for images, labels in kept:  # which outlive the predictor
        np.testing.assert_array_equal(labels.numpy(), bright(images))
    del labels, kept, again
    assert balanced(gpu)


def test_results_are_images_for_the_next_network(gpu: FakeCuda, predictor: Callable[..., Predictor]) -> None:
    class Channelled:  # as torch's .unsqueeze(-1)
        def __init__(self, labels: Any) -> None:
            self.labels = labels
            shape = (*labels.shape, 1)
            self.__cuda_array_interface__ = {**labels.__cuda_array_interface__, "shape": shape}

    images = stacked(2)
    inverse = Network(FIXED.shape, FIXED.output, lambda x: (x[..., 0] == 0).astype(np.uint8), "UINT8")
    with predictor(FIXED) as first, predictor(inverse) as second:
        found = second.predict_on_gpu(Channelled(first.predict_on_gpu(Tensor(images))))
    np.testing.assert_array_equal(found.numpy(), 1 - bright(images))
    del found
    assert balanced(gpu)


def test_threads_share_the_lanes_on_the_gpu(
    gpu: FakeCuda, predictor: Callable[..., Predictor], network: Network
) -> None:
    batches = [stacked(1 + index % 5) + index for index in range(60)]
    with predictor(network) as made, ThreadPoolExecutor(8) as pool:
        for images, labels in zip(batches, pool.map(made.predict_on_gpu, map(Tensor, batches)), strict=True):
            np.testing.assert_array_equal(labels.numpy(), bright(images))
    del labels
    assert balanced(gpu)


@pytest.mark.parametrize(
    ("network", "changes", "images", "expected"),
    [
        (FIXED, {}, stacked(1, (8, 9)), "(N, 8, 8, 1)"),
        (FIXED, {}, stacked(1)[0], "(N, 8, 8, 1)"),
        (FIXED, {}, stacked(1).repeat(3, axis=3), "(N, 8, 8, 1)"),
        (FIXED, {}, stacked(1).astype(np.float32), "uint8 (N, 8, 8, 1)"),
        (FIXED, {}, stacked(1)[:0], "(N, 8, 8, 1)"),
        (FIXED, {}, stacked(1)[..., 0], "(N, 8, 8, 1)"),
        (FREE, {}, stacked(1, (3, 8)), "(N, 4…16, 4…16, 1)"),
        (FREE, {}, stacked(1, (8, 17)), "(N, 4…16, 4…16, 1)"),
        (FREE, {"resize": "stretch", "channels": "bgr"}, stacked(1, (9, 8)), "(N, 8, 8, 3), channels in the order bgr"),
    ],
)
def test_images_on_the_gpu_are_neither_converted_nor_resized(
    gpu: FakeCuda, network: Network, changes: dict[str, Any], images: NDArray[Any], expected: str
) -> None:
    card = dataclasses.replace(CARD, preprocessing=CARD.preprocessing.model_copy(update=changes))
    with Predictor(EngineRunner(fake_trt(gpu, network), b"plan"), card, streams=1) as made:
        for _ in range(2):  # would wait for ever for a lane that is lost
            with pytest.raises(DataError, match="as the network takes them") as caught:
                made.predict_on_gpu(Tensor(images))
        assert expected in caught.value.expected
        assert str(images.shape) in caught.value.got


def test_what_only_the_host_can_do_is_refused(gpu: FakeCuda, predictor: Callable[..., Predictor]) -> None:
    floats = Network((1, 1, SIZE, SIZE), lambda shape: shape[:3], bright)
    with predictor(floats) as made, pytest.raises(ModelError, match="normalised on the host") as caught:
        made.predict_on_gpu(Tensor(stacked(1)))
    assert "--bake-input image" in caught.value.fix
    with predictor(FIXED) as made, pytest.raises(DataError, match="cannot be read in GPU memory"):
        made.predict_on_gpu(stacked(1))
    with pytest.raises(ValueError, match="closed"):
        made.predict_on_gpu(Tensor(stacked(1)))
    two = ModelCard("t", CARD.preprocessing.model_copy(update={"channels": "rgb"}), CLASSES)
    with (
        Predictor(EngineRunner(fake_trt(gpu, FIXED), b"plan"), two) as made,
        pytest.raises(ModelError, match="does not take these images"),
    ):
        made.predict_on_gpu(Tensor(stacked(1).repeat(3, axis=3)))
    assert balanced(gpu)


def test_after_a_failure_on_the_gpu_nothing_is_left_and_the_predictor_goes_on(gpu: FakeCuda) -> None:
    trt = fake_trt(gpu, FIXED)
    images = stacked(3)
    with Predictor(EngineRunner(trt, b"plan"), CARD, streams=1) as made:
        trt.context.fails = True
        with pytest.raises(EngineError, match="failed to run") as caught:
            made.predict_on_gpu(Tensor(images))
        del caught
        trt.context.fails = False
        gpu.memory_left = 0
        with pytest.raises(EngineError, match="out of memory"):
            made.predict_on_gpu(Tensor(images))
        gpu.memory_left = 1 << 30
        np.testing.assert_array_equal(made.predict_on_gpu(Tensor(images)).numpy(), bright(images))
    assert balanced(gpu)


def test_less_memory_means_fewer_lanes(gpu: FakeCuda, predictor: Callable[..., Predictor]) -> None:
    trt = fake_trt(gpu, FREE)
    created = trt.Runtime
    runtimes = []

    def runtime(logger: Any) -> Any:
        runtimes.append(created(logger))
        if len(runtimes) > 2:
            raise EngineError("the GPU is out of memory")
        return runtimes[-1]

    trt.Runtime = runtime
    lanes = Lanes(EngineRunner(trt, PLAN), 5)
    assert [lanes.take(wait=False) is None for _ in range(3)] == [False, False, True]
    assert lanes.most == 2


def test_lent_lanes_are_closed_when_they_come_back(gpu: FakeCuda) -> None:
    lanes = Lanes(EngineRunner(fake_trt(gpu, FIXED), PLAN), 1)
    lane = lanes.take(wait=True)
    assert lane is not None
    lane.memory(FIXED.shape)[:] = 255
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lanes.take, wait=True)
        lanes.close()
        with pytest.raises(ValueError, match="closed"):
            waiting.result(10)
    lane.start()
    assert (lane.finish() == 1).all()
    lanes.give(lane)
    assert balanced(gpu)
    lanes.close()
    with pytest.raises(ValueError, match="closed"):
        lanes.take(wait=True)
