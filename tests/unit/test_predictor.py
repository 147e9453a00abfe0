"""Predictor on stand-in networks: what they are fed, and what becomes of what they give."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.artifacts import ModelCard, Profile, TensorSpec
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import ConfigError, DataError, EngineError, ModelError
from pipeline.graph.io import write_card
from pipeline.graph.promises import write_multiples
from pipeline.predictor import Predictor
from tests.tiny_unet import save, tiny_unet

CLASSES = tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in ("dark", "bright"))
Size = int | str


class Threshold:
    """Bright is what is above 127: as logits, probabilities or labels of float32 or uint8 images, pixel by pixel."""

    def __init__(
        self, height: Size, width: Size, *, batch: Size = 1, output: str = "logits", image: bool = False
    ) -> None:
        source = (batch, height, width, 1) if image else (batch, 1, height, width)
        result = (batch, height, width) if output == "labels" else (batch, 2, height, width)
        self.inputs = (TensorSpec("image", source, "uint8" if image else "float32"),)
        self.outputs = (TensorSpec(output, result, "uint8" if output == "labels" else "float32"),)
        self.image, self.output = image, output
        self.profiles: dict[str, Profile] = {}
        self.fed: list[tuple[int, ...]] = []
        self.closed = 0

    def __call__(self, feeds: Any) -> dict[str, NDArray[Any]]:
        x = feeds["image"]
        self.fed.append(x.shape)
        scores = x[..., 0] / np.float32(255) if self.image else x[:, 0]
        if self.output == "labels":
            return {"labels": (scores > 0.5).astype(np.uint8)}
        both = np.stack([1 - scores, scores], 1)
        return {self.output: (20 * both if self.output == "logits" else both).astype(np.float32)}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Threshold:
        return self

    def __exit__(self, *exc: object) -> None: ...


def card(height: int = 8, width: int = 8, **keys: Any) -> ModelCard:
    spec = PreprocessingConfig.model_validate({"height": height, "width": width, "channels": "grey", **keys})
    return ModelCard("threshold", spec, CLASSES)


@pytest.mark.parametrize("output", ["logits", "probabilities", "labels"])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 20), (1, 200), (100, 7), (90, 110)])
def test_every_size_and_kind_of_model(
    output: str, image: bool, size: tuple[int, int], rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, size, dtype=np.uint8)
    network = Threshold(8, 8, output=output, image=image)
    with Predictor(network, card()) as predictor:
        np.testing.assert_array_equal(predictor(pixels), pixels > 127)
        if output == "labels":
            with pytest.raises(ModelError, match="labels alone"):
                predictor.predict([pixels], probabilities=True)
            return
        (result,) = predictor.predict([pixels], probabilities=True)
    assert result.probabilities is not None
    assert (result.probabilities.shape, result.probabilities.dtype) == ((2, *size), np.float32)
    np.testing.assert_allclose(result.probabilities.sum(0), 1, atol=1e-5)
    if output == "probabilities":
        np.testing.assert_allclose(result.probabilities[1], pixels / 255, atol=1e-5)


def test_mixed_sizes_share_batches_in_order(rng: np.random.Generator) -> None:
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((8, 8), (4, 6), (8, 8), (8, 8), (4, 6))]
    network = Threshold("height", "width", batch="batch")
    with Predictor(network, card(), batch=2) as predictor:
        for image, result in zip(images, predictor.predict(images), strict=True):
            np.testing.assert_array_equal(result.labels, image > 127)
    assert sorted(network.fed) == [(1, 1, 8, 8), (2, 1, 4, 6), (2, 1, 8, 8)]
    fixed = Threshold(8, 8, batch=3)
    with Predictor(fixed, card()) as predictor:
        assert len(predictor.predict(images)) == 5
    assert set(fixed.fed) == {(3, 1, 8, 8)}


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_resized_images_get_masks_of_their_own_size(resize: str) -> None:
    pixels = np.zeros((40, 100), np.uint8)
    pixels[:, 50:] = 255
    with Predictor(Threshold(16, 16), card(16, 16, resize=resize, pad_value=200)) as predictor:
        (result,) = predictor.predict([pixels], probabilities=True)
    assert result.labels.shape == (40, 100)
    assert (result.labels == (pixels > 0)).mean() > 0.95
    assert result.probabilities is not None
    assert (result.probabilities.argmax(0) == result.labels).mean() > 0.95


def test_free_sizes_keep_to_the_profile() -> None:
    network = Threshold("height", "width", batch="batch")
    network.profiles = {"image": Profile((2, 1, 16, 16), (2, 1, 32, 32), (4, 1, 64, 64))}
    with Predictor(network, card()) as predictor:
        assert predictor.batch == 4
        for size in ((5, 30), (64, 64), (65, 200)):
            assert predictor(np.zeros(size, np.uint8)).shape == size
    assert all(2 <= n <= 4 and 16 <= h <= 64 and 16 <= w <= 64 for n, _, h, w in network.fed)
    smaller = Threshold("height", "width")
    with Predictor(smaller, card(), tile=32, overlap=8) as predictor:
        predictor(np.zeros((20, 100), np.uint8))
    assert {shape[2] for shape in smaller.fed} == {20}
    assert max(shape[3] for shape in smaller.fed) == 32


def test_threads_share_a_predictor_and_closing_releases_it(rng: np.random.Generator) -> None:
    images = [rng.integers(0, 256, (30, 30 + index), dtype=np.uint8) for index in range(20)]
    network = Threshold(16, 16)
    with Predictor(network, card()) as predictor, ThreadPoolExecutor(4) as pool:
        for image, mask in zip(images, pool.map(predictor, images), strict=True):
            np.testing.assert_array_equal(mask, image > 127)
    predictor.close()
    assert network.closed == 1
    with pytest.raises(ValueError, match="closed"):
        predictor(images[0])


def free_unet(path: Path, coordinates: str, **multiples: int) -> Path:
    """An ONNX file of a network with two levels, so for multiples of 4, and three classes."""
    model = tiny_unet(size="free")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = coordinates.encode()
    write_multiples(model, multiples)
    spec = PreprocessingConfig(height=32, width=32, channels="rgb")
    write_card(model, ModelCard("tiny", spec, tuple(ClassConfig(name=n, colour=(0, 0, 0)) for n in "abc")))
    return save(model, path)


def test_sizes_are_multiples_of_what_was_promised(tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (30, 45, 3), dtype=np.uint8)
    with Predictor(free_unet(tmp_path / "any.onnx", "half_pixel")) as predictor, pytest.raises(ModelError):
        predictor(image)
    path = free_unet(tmp_path / "a.onnx", "half_pixel", free_height=4, width=4)  # by the axis' name, and by its role
    with Predictor(path) as predictor:
        whole = predictor(np.pad(image, ((0, 2), (0, 3), (0, 0)), mode="reflect"))
        np.testing.assert_array_equal(predictor(image), whole[:30, :45])
        assert predictor(image[:1, :1]).shape == (1, 1)


@pytest.mark.parametrize("coordinates", ["align_corners", "half_pixel"])
def test_tiles_of_networks_that_align_corners_are_warned_of_once(
    coordinates: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = np.zeros((64, 96, 3), np.uint8)
    with Predictor(free_unet(tmp_path / "a.onnx", coordinates), tile=32) as predictor:
        predictor(large[:32, :32])
        assert not caplog.records
        for _ in range(2):
            predictor(large)
    warned = [record.getMessage() for record in caplog.records if "align_corners" in record.getMessage()]
    assert len(warned) == (coordinates == "align_corners")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"streams": 0}, "0 streams"),
        ({"batch": 0}, "batch of 0"),
        ({"tile": 0}, "tiles of 0"),
        ({"tile": 64, "overlap": 64}, "overlap of 64"),
    ],
)
def test_impossible_settings(keys: dict[str, int], message: str) -> None:
    network = Threshold("height", "width", batch="batch")
    with pytest.raises(ConfigError, match=message):
        Predictor(network, card(), **keys)
    assert network.closed == 1


def test_what_does_not_fit_the_card(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not say how images are preprocessed"):
        Predictor(Threshold(8, 8))
    three = ModelCard("three", card().preprocessing, (*CLASSES, CLASSES[0]))
    with pytest.raises(ModelError, match="scores 2 classes, and its card names 3"):
        Predictor(Threshold(8, 8), three)(np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="no image"):
        Predictor(Threshold(8, 8), card())(np.zeros((0, 3), np.uint8))
    with pytest.raises(EngineError, match="cannot read the engine"):
        Predictor(tmp_path / "none.engine")


def test_arrays_on_the_gpu_need_an_engine() -> None:
    with (
        Predictor(Threshold(8, 8, image=True), card()) as predictor,
        pytest.raises(ModelError, match="of the GPU") as caught,
    ):
        predictor.predict_on_gpu(np.zeros((1, 8, 8, 1), np.uint8))
    assert caught.value.expected == "an engine"


def test_tensors_of_torch_are_read_where_they_are() -> None:
    tensor = torch.arange(64, dtype=torch.uint8).reshape(8, 8) * 4
    with Predictor(Threshold(8, 8), card()) as predictor:
        (result,) = predictor.predict([tensor])
    np.testing.assert_array_equal(result.labels, tensor.numpy() > 127)


def test_importing_the_package_loads_nothing() -> None:
    program = "import sys, pipeline; print('numpy' in sys.modules); from pipeline import Predictor; print(Predictor)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "<class 'pipeline.predictor.Predictor'>"]
