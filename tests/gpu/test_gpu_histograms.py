"""Calibration on the GPU: the kernels against Histogram, bit for bit, and the whole path against ONNX Runtime.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones.
"""

import itertools

import numpy as np
import pytest
from onnx import numpy_helper

from pipeline.artifacts import ModelCard
from pipeline.backends import cuda
from pipeline.backends.cpu_histograms import cpu_histograms
from pipeline.backends.gpu_histograms import gpu_histograms, why_no_gpu_calibration
from pipeline.calibration.algorithms import ALGORITHMS
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig
from pipeline.errors import CalibrationError
from pipeline.graph.deployment import bake
from pipeline.graph.placement import activation_tensors
from tests.tiny_unet import SIZE, images, save, tiny_unet
from tests.unit.backends.test_gpu_histograms import CASES, counted, reference, relu, same

MISSING = why_no_gpu_calibration()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING or "available")]

SETTINGS = EngineConfig(backend="tensorrt", workspace_mib=1024)
LEAK_BYTES = 32 << 20


def named(count, **changes):
    return [(f"image {i}", feeds["image"]) for i, feeds in enumerate(images(count, **changes))]


class TestKernels:
    @pytest.mark.parametrize("case", CASES)
    def test_counts_are_those_of_the_cpu(self, case):
        ((have,), bad) = counted([CASES[case]])
        same(have, reference(CASES[case]))
        assert bad == [0]

    def test_all_cases_at_once_and_twice(self):
        arrays = list(CASES.values())
        results, _ = counted(arrays, [array[::-1] for array in arrays])
        for have, array in zip(results, arrays, strict=True):
            same(have, reference(array, array))

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    def test_any_order_gives_the_same(self, order):
        arrays = [relu(30001, scale, seed) for seed, scale in enumerate((1e-3, 1.0, 40.0, 3e30))]
        arrays[1] *= -1
        ((have,), _) = counted(*([arrays[i]] for i in order))
        same(have, reference(*arrays))

    def test_ranges_that_grow_one_doubling_at_a_time(self):
        arrays = [np.full(100, 1.5 * 2.0**power, np.float32) for power in range(-16, 4)]
        ((have,), _) = counted(*([array] for array in arrays))
        same(have, reference(*arrays))

    def test_large_tensors(self):
        rng = np.random.default_rng(0)
        groups = [
            [
                np.maximum(rng.standard_normal(20_000_003, np.float32), 0),
                rng.standard_normal(3_000_001, np.float32) * np.float32(10.0**place),
                np.zeros(5_000_000, np.float32),
                np.full(4_000_000, 6, np.float32),
            ]
            for place in range(3)
        ]
        results, _ = counted(*groups)
        for index, have in enumerate(results):
            same(have, reference(*(group[index] for group in groups)))

    def test_values_that_are_not_finite_are_counted(self):
        bad = relu(1_000_000)
        bad[[3, 700, 2500]] = np.nan
        bad[[4, 999_999]] = np.inf, -np.inf
        results, not_finite = counted([bad, relu(4321)], [bad, relu(4321, 3.0, 1)])
        assert not_finite == [10, 0]
        same(results[1], reference(relu(4321), relu(4321, 3.0, 1)))


class TestWhole:
    @pytest.mark.parametrize("batch", [1, "batch"])
    def test_as_on_the_cpu(self, tmp_path, batch):
        model = tiny_unet(batch)
        tensors = activation_tensors(model)
        clean = save(model, tmp_path / "clean.onnx")
        given = named(8, batch=1 if batch == 1 else 2)
        found, wanted = gpu_histograms(clean, tensors, given, SETTINGS), cpu_histograms(model, tensors, given)
        for have, want in zip(found, wanted, strict=True):
            assert have.tensor == want.tensor
            assert have.total == want.total
            bound = 1e-4 * want.amax
            assert (have.minimum, have.maximum) == pytest.approx((want.minimum, want.maximum), rel=0, abs=bound)
            entropy = [ALGORITHMS["entropy"](histogram, 2048) for histogram in (have, want)]
            assert entropy[0] == pytest.approx(entropy[1], rel=0.01), have.tensor
        same(found[tensors.index("image")], wanted[tensors.index("image")])

    def test_from_images_to_labels(self, tmp_path):
        """TensorRT 8.6.0 takes uint8 as inputs and outputs alone, and here labels are no output."""
        spec = PreprocessingConfig(height=SIZE, width=SIZE, channels="rgb", mean=(0.5,), std=(0.25,))
        card = ModelCard("tiny", spec, tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in "abc"))
        model = bake(tiny_unet(), card, input="image", output="labels")
        tensors = activation_tensors(model)
        rng = np.random.default_rng(0)
        given = [(f"image {i}", rng.integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)) for i in range(4)]
        found = gpu_histograms(save(model, tmp_path / "clean.onnx"), tensors, given, SETTINGS)
        for have, want in zip(found, cpu_histograms(model, tensors, given), strict=True):
            assert (have.tensor, have.total) == (want.tensor, want.total)
            assert have.amax == pytest.approx(want.amax, rel=1e-3)

    def test_weights_that_overflow(self, tmp_path):
        model = tiny_unet()
        for tensor in model.graph.initializer:
            if tensor.name == "bottom.weight":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(3e38), tensor.name))
        clean = save(model, tmp_path / "clean.onnx")
        with pytest.raises(CalibrationError, match=r"tensor bottom\.out holds NaN or infinite values .* image 0"):
            gpu_histograms(clean, activation_tensors(model), named(4), SETTINGS)

    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_an_image_that_overflows(self, tmp_path, place):
        clean = save(tiny_unet(), tmp_path / "clean.onnx")
        given = named(5)
        given[place][1][:] = np.finfo(np.float32).max
        with pytest.raises(CalibrationError, match=rf"tensor down0\.out .* image {place}\n") as caught:
            gpu_histograms(clean, activation_tensors(tiny_unet()), given, SETTINGS)
        assert "values are not finite" in caught.value.got

    def test_errors_of_the_images_come_as_they_are(self, tmp_path):
        def broken():
            yield from named(3)
            raise RuntimeError("the fourth image is damaged")

        clean = save(tiny_unet(), tmp_path / "clean.onnx")
        with pytest.raises(RuntimeError, match="fourth image is damaged"):
            gpu_histograms(clean, activation_tensors(tiny_unet()), broken(), SETTINGS)

    def test_memory_comes_back(self, tmp_path):
        model = tiny_unet()
        clean = save(model, tmp_path / "clean.onnx")

        def run():
            gpu_histograms(clean, activation_tensors(model), named(4), SETTINGS)
            return cuda.free_memory()[0]

        run()
        before = run()
        for _ in range(3):
            after = run()
        assert before - after < LEAK_BYTES
