"""Predictor on engines: equal to the plain runner over many batches, from many threads, and no GPU memory left behind.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones.
"""

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import ModelCard
from pipeline.backends import cuda
from pipeline.backends.gpu_array import GpuArray
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig, ProfileRange
from pipeline.data.preprocessing import normalise
from pipeline.engines import load_engine
from pipeline.errors import DataError, EngineError, ModelError
from pipeline.graph.deployment import bake
from pipeline.predictor import Predictor
from pipeline.stages.engine import build_engine
from pipeline.stages.predict import Wanted, helpers_for, predict
from tests.tiny_unet import CLASSES, SIZE, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="rgb", mean=(0.5,), std=(0.25,))
CARD = ModelCard("tiny", SPEC, tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in "abc"[:CLASSES]))
FREE = {
    "batch": ProfileRange(min=1, opt=2, max=4),
    "height": ProfileRange(min=16, opt=32, max=64),
    "width": ProfileRange(min=16, opt=32, max=64),
}
LEAK_BYTES = 32 << 20


def settings(**changes):
    return EngineConfig(backend="tensorrt", workspace_mib=1024, **{"optimization_level": 0, **changes})


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Engines by name: static from images to labels, static from floats to logits, free in all sizes to labels."""
    root = tmp_path_factory.mktemp("engines")
    free = tiny_unet("batch", size="free")
    graphs = {
        "labels": (bake(tiny_unet(), CARD, input="image", output="labels"), {}),
        "logits": (tiny_unet(), {}),
        "free": (bake(free, CARD, input="image", output="labels"), FREE),
    }
    for name, (graph, profile) in graphs.items():
        clean = save(graph, root / f"{name}.onnx")
        build_engine(clean, "fp16", settings(profile=profile), None, None, CARD, root / name, None)
    return {name: root / name / "model.engine" for name in graphs}


def drawn(count, height=SIZE, width=SIZE):
    coarse = np.random.default_rng(height).integers(0, 256, (count, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return list(coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width])


def plain(path, images):
    """Labels by the plain runner, image by image."""
    with load_engine(path) as runner:
        (source,), (result,) = runner.inputs, runner.outputs
        for image in images:
            one = image if source.dtype == "uint8" else normalise(image, SPEC)
            output = runner({source.name: np.ascontiguousarray(one[np.newaxis])})[result.name][0]
            yield output if output.ndim == 2 else output.argmax(0)


@pytest.mark.parametrize("name", ["labels", "logits", "free"])
@pytest.mark.parametrize("streams", [1, 3])
def test_equal_to_the_plain_runner_over_many_batches(engines, name, streams):
    images = drawn(50)
    wanted = list(plain(engines[name], images))
    with Predictor(engines[name], batch=1, streams=streams) as predictor:
        for _ in range(4):
            for want, result in zip(wanted, predictor.predict(images), strict=True):
                np.testing.assert_array_equal(result.labels, want)
        for want, image in zip(wanted, images, strict=True):
            np.testing.assert_array_equal(predictor(image), want)


def test_batches_and_changing_sizes(engines):
    sizes = [(32, 32), (48, 64), (32, 32), (64, 64)]
    groups = [drawn(7, *size) for size in sizes]
    with Predictor(engines["free"]) as predictor:
        assert predictor.batch == 4
        for images in (*groups, [image for group in groups for image in group]):
            wanted = plain(engines["free"], images)
            differing = [
                (result.labels != want).mean() for want, result in zip(wanted, predictor.predict(images), strict=True)
            ]
            assert np.mean(differing) < 1e-3  # other kernels at other batches round otherwise
        assert predictor(drawn(1, 200, 100)[0]).shape == (200, 100)


@pytest.mark.parametrize("name", ["labels", "free"])
def test_threads_share_a_predictor(engines, name):
    images = drawn(240)
    wanted = list(plain(engines[name], images))
    with Predictor(engines[name], batch=1) as predictor, ThreadPoolExecutor(8) as pool:
        pieces = [slice(start, start + 1 + start % 9) for start in range(0, 230, 2)]
        for piece, results in zip(
            pieces, pool.map(lambda piece: predictor.predict(images[piece]), pieces), strict=True
        ):
            for want, result in zip(wanted[piece], results, strict=True):
                np.testing.assert_array_equal(result.labels, want)


def test_graphs_are_captured_and_nothing_is_allocated_in_the_steady_state(engines, monkeypatch):
    images = drawn(30)
    with Predictor(engines["labels"]) as predictor:
        predictor.predict(images)
        called, real = set(), cuda.call
        monkeypatch.setattr(cuda, "call", lambda function, *rest: (called.add(function), real(function, *rest))[1])
        predictor.predict(images)
        steady = set(called)
    assert steady == {"cudaGraphLaunch", "cudaStreamSynchronize"}


def test_closing_frees_the_gpus_memory(engines):
    def run(name):
        with Predictor(engines[name]) as predictor:
            predictor.predict(drawn(20))
            within = cuda.free_memory()[0]
        return within, cuda.free_memory()[0]

    for name in ("labels", "free"):
        run(name)
        _, before = run(name)
        for _ in range(3):
            _, after = run(name)
        assert before - after < LEAK_BYTES


def test_errors_give_every_lane_back(engines):
    images = drawn(10)
    one = ModelCard("one", SPEC, CARD.classes[:1])
    with Predictor(engines["labels"], one, streams=2) as predictor:
        for _ in range(4):  # would wait for ever for a lane that is lost
            with pytest.raises(ModelError, match="its card names 1 classes"):
                predictor.predict(images)
    grey = ModelCard("grey", SPEC.model_copy(update={"channels": "grey"}), CARD.classes)
    with Predictor(engines["labels"], grey) as predictor, pytest.raises(ModelError, match="does not take these images"):
        predictor.predict(images)


def test_sizes_outside_of_the_profile_are_the_projects_own_error(engines):
    stretched = ModelCard("s", SPEC.model_copy(update={"height": 128, "width": 128, "resize": "stretch"}), CARD.classes)
    with Predictor(engines["free"], stretched) as predictor, pytest.raises(EngineError, match="was not built for"):
        predictor(drawn(1)[0])


class Interface:
    """An array on the GPU by the CUDA array interface alone, as numba's, still being written on a stream."""

    def __init__(self, array, stream):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": int(stream)}


def on_gpu(images, stream):
    """Images as an array on the GPU, whose upload is under way on the stream."""
    batch = np.stack(images)
    buffer = cuda.DeviceBuffer(batch.nbytes)
    buffer.upload(batch, stream)  # pageable memory is staged before the call returns
    return GpuArray(buffer, batch.shape, batch.dtype)


@pytest.mark.parametrize("name", ["labels", "free"])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_images_on_the_gpu_give_labels_there(engines, name, count):
    images = drawn(count)
    wanted = np.stack(list(plain(engines[name], images)))
    stream = cuda.Stream()
    with Predictor(engines[name], batch=1) as predictor:
        given = on_gpu(images, stream)
        for _ in range(4):
            by_interface = predictor.predict_on_gpu(Interface(given, stream))
            np.testing.assert_array_equal(by_interface.numpy(), wanted)
            by_dlpack = predictor.predict_on_gpu(given)
        np.testing.assert_array_equal(predictor(images[0]), wanted[0])
    np.testing.assert_array_equal(by_dlpack.numpy(), wanted)  # which outlives the predictor
    stream.close()


def test_on_the_gpu_only_the_result_is_allocated_and_it_is_freed(engines, monkeypatch):
    stream = cuda.Stream()
    with Predictor(engines["labels"]) as predictor:
        given = on_gpu(drawn(5), stream)
        for _ in range(2):
            predictor.predict_on_gpu(given)
        called, real = Counter(), cuda.call
        monkeypatch.setattr(cuda, "call", lambda function, *rest: (called.update([function]), real(function, *rest))[1])
        for _ in range(50):
            predictor.predict_on_gpu(given)
    assert called["cudaMalloc"] == called["cudaFree"] - len(("input", "output")) == 50
    assert called["cudaGraphLaunch"] == 250
    assert "cudaMallocHost" not in called
    stream.close()


def test_tensors_of_torch_on_the_gpu(engines):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no GPU")
    images = drawn(6)
    wanted = torch.tensor(np.stack(list(plain(engines["labels"], images))))
    with Predictor(engines["labels"]) as predictor:
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):  # whose work the engine has to wait for
            tensor = torch.tensor(np.stack(images)).cuda()
            for _ in range(100):
                tensor = tensor.flip(0)
            result = predictor.predict_on_gpu(tensor)
        shared = torch.from_dlpack(result)
        assert shared.data_ptr() == result.address == torch.as_tensor(result, device="cuda").data_ptr()
        del result
        with pytest.raises(DataError, match="strides"):
            predictor.predict_on_gpu(tensor[:, :, ::2])
    assert torch.equal(shared.cpu(), wanted)


def test_after_running_out_of_memory_the_predictor_goes_on(engines):
    (image,) = drawn(1)
    with Predictor(engines["labels"]) as predictor:
        before = predictor(image)
        with pytest.raises(EngineError, match="out of memory"):
            cuda.DeviceBuffer(4 * cuda.free_memory()[1])
        for _ in range(3):
            np.testing.assert_array_equal(predictor(image), before)


@pytest.mark.parametrize("count", [0, 4], ids=["threads", "processes"])
def test_a_folder(engines, tmp_path, count):
    images = drawn(40)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "in" / f"{number:02}.png")
    helpers = helpers_for([tmp_path / "in"], tmp_path / "out", count)
    with helpers or contextlib.nullcontext(), Predictor(engines["labels"]) as predictor:
        outcome = predict(predictor, "m", [tmp_path / "in"], Wanted(tmp_path / "out"), None, helpers)
    assert (outcome.done, outcome.failed) == (40, 0)
    for number, want in enumerate(plain(engines["labels"], images)):
        with Image.open(tmp_path / "out" / f"{number:02}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), want)
