"""TensorRT on a GPU: every precision by every route, calibration, profiles, timing cache, running, loading.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones.
"""

import contextlib
import functools
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.artifacts import EngineManifest
from pipeline.backends import cuda
from pipeline.backends.registry import resolve
from pipeline.backends.runner import EngineRunner
from pipeline.backends.tensorrt import TensorrtBuilder, api, calibrate_with_tensorrt
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, ProfileRange
from pipeline.drift import drift
from pipeline.engines import load_engine
from pipeline.errors import CalibrationError, ConfigError, EngineError, UnsupportedError
from pipeline.graph.shapes import with_weights
from pipeline.graph.sparsity import kept_weights, prunable
from pipeline.stages.engine import build_engine
from tests.tiny_unet import images, observed_table, reference, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

# Largest accepted error of the logits, relative to the largest logit. The tiny network has random weights, so its INT8
# error is larger than a trained one's.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.2}
VARIANTS = [(precision, route) for precision in TOLERANCE for route in ("implicit", "explicit")]
BATCHES = {"batch": ProfileRange(min=1, opt=2, max=4)}


# TensorRT 8.6.0 fails on small INT8 networks at level 1 ("Assertion engine failed", refitUtils.cpp); 0 and 3 build.
def settings(route="auto", **changes):
    return EngineConfig(backend="tensorrt", route=route, workspace_mib=1024, **{"optimization_level": 0, **changes})


def needs(route):
    if route not in KNOWN.routes:
        pytest.skip(f"TensorRT {KNOWN.version} has no {route} route")


def error(have, want):
    """Largest difference relative to the largest value."""
    return float(np.abs(have - want).max() / np.abs(want).max())


@pytest.fixture(scope="module")
def table():
    return observed_table(tiny_unet(), images(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engines")
    save(tiny_unet(), made / "clean.onnx")
    return made


@pytest.fixture(scope="module")
def engine(folder, table):
    """The folder of one static engine, built once for all tests."""
    made = {}

    def get(precision, route):
        needs(route)
        if (precision, route) not in made:
            clean, target = folder / "clean.onnx", folder / f"{precision}-{route}"
            build_engine(
                clean,
                precision,
                settings(route),
                table,
                "c" * 64,
                None,
                target,
                folder / "timing.cache",
            )
            made[precision, route] = target
        return made[precision, route]

    return get


def manifest_of(target):
    return json.loads((target / "manifest.json").read_text())


def test_capabilities_describe_the_gpu():
    assert KNOWN.device is not None
    assert KNOWN.device.name
    major, minor = KNOWN.device.compute_capability.split(".")
    assert int(major) >= 5
    assert int(minor) < 10
    assert KNOWN.device.driver
    assert KNOWN.runs
    assert "explicit" in KNOWN.routes
    assert resolve("auto", "fp16", "auto").capabilities.name == "tensorrt"


@pytest.mark.parametrize(("precision", "route"), VARIANTS)
def test_engine_agrees_with_onnx_runtime(engine, precision, route):
    target = engine(precision, route)
    with load_engine(target / "model.engine") as runner:
        for feeds in images(3, seed=7):
            want = reference(tiny_unet(), feeds)
            have = runner(feeds)["logits"]
            assert have.dtype == np.float32
            assert error(have, want) < TOLERANCE[precision]
    manifest = manifest_of(target)
    assert (manifest["precision"], manifest["route"]) == (precision, route)
    assert manifest["device"]["name"] == KNOWN.device.name
    assert (target / "model.onnx").exists() is (route == "explicit")


@pytest.mark.parametrize("route", ["implicit", "explicit"])
def test_int8_engines_hold_int8_layers(engine, route):
    with load_engine(engine("int8", route) / "model.engine") as runner:
        assert "Int8" in runner.layers()


@pytest.mark.parametrize("route", ["implicit", "explicit"])
def test_an_int8_engine_of_sparse_weights_agrees_with_onnx_runtime(tmp_path, route):
    needs(route)
    whole = tiny_unet()
    kernels = {node.input[1] for node in prunable(whole)}
    arrays = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer if t.name in kernels}
    pruned = with_weights(whole, {name: array * kept_weights(np.abs(array)) for name, array in arrays.items()})
    clean, chosen = save(pruned, tmp_path / "clean.onnx"), settings(route, sparsity=True, optimization_level=3)
    ranges = observed_table(pruned, images(8))
    manifest = build_engine(clean, "int8", chosen, ranges, None, None, tmp_path / "out", None)
    assert f"engine.sparsity: {len(kernels)} of {len(kernels)} convolutions" in " ".join(manifest.notes)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        for feeds in images(3, seed=7):
            assert error(runner(feeds)["logits"], reference(pruned, feeds)) < TOLERANCE["int8"]


def test_an_explicit_engine_agrees_with_its_typed_graph(engine):
    target = engine("int8", "explicit")
    typed = onnx.load(target / "model.onnx")
    (feeds,) = images(1, seed=8)
    with load_engine(target / "model.engine") as runner:
        assert error(runner(feeds)["logits"], reference(typed, feeds)) < 0.1


@pytest.mark.parametrize("bits", [9, 10])
def test_an_engine_with_finer_steps_of_the_image_agrees_with_its_typed_graph(folder, table, bits):
    target = folder / f"bits-{bits}"
    changed = settings("explicit", input_bits=bits)
    build_engine(folder / "clean.onnx", "int8", changed, table, None, None, target, folder / "timing.cache")
    typed = onnx.load(target / "model.onnx")
    assert sum("shifted" in node.name for node in typed.graph.node) == 2 ** (bits - 8)
    (feeds,) = images(1, seed=8)
    with load_engine(target / "model.engine") as runner:
        assert error(runner(feeds)["logits"], reference(typed, feeds)) < 0.1


def test_implicit_int8_uses_the_tables_ranges(folder, table):
    needs("implicit")
    (feeds,) = images(1, seed=7)
    want = reference(tiny_unet(), feeds)
    tight = CalibrationTable("entropy", {name: amax / 20 for name, amax in table.amax.items()})
    target = folder / "tight"
    build_engine(folder / "clean.onnx", "int8", settings("implicit"), tight, None, None, target, None)
    with load_engine(target / "model.engine") as runner:
        assert error(runner(feeds)["logits"], want) > TOLERANCE["int8"]


def test_a_table_that_lacks_ranges_is_refused(folder, table):
    needs("implicit")
    partial = CalibrationTable("entropy", {name: amax for name, amax in table.amax.items() if name != "resized"})
    with pytest.raises(CalibrationError, match="lacks 1 of the ranges"):
        build_engine(folder / "clean.onnx", "int8", settings("implicit"), partial, None, None, folder / "no", None)


def test_ranges_that_differ_across_a_resize(folder, table, tmp_path):
    """TensorRT 8.6.0's INT8 Resize ignores the change: without the join of ranges all that it gives would be halved."""
    needs("implicit")
    half = CalibrationTable("entropy", {**table.amax, "resized": table.amax["resized"] / 2})
    build_engine(folder / "clean.onnx", "int8", settings("implicit"), half, None, None, tmp_path, None)
    (feeds,) = images(1, seed=7)
    with load_engine(tmp_path / "model.engine") as runner:
        assert error(runner(feeds)["logits"], reference(tiny_unet(), feeds)) < TOLERANCE["int8"]


@pytest.mark.parametrize(("precision", "route"), [("fp16", "implicit"), ("int8", "explicit"), ("int8", "implicit")])
def test_layer_by_layer(engine, folder, table, tmp_path, precision, route):
    needs(route)
    target, feeds = engine(precision, route), images(2)
    typed = target / "model.onnx"

    @contextlib.contextmanager
    def showing(tensors):
        made = tmp_path / "shown"
        timing = folder / "timing.cache"
        build_engine(folder / "clean.onnx", precision, settings(route), table, None, None, made, timing, None, tensors)
        with load_engine(made / "model.engine") as runner:
            yield runner

    own = functools.partial(load_engine, target / "model.engine")
    graph = onnx.load(typed) if typed.exists() else tiny_unet()
    report = drift(tiny_unet(), graph, showing, feeds, "TensorRT", limit=math.inf, engine=own)
    figures = {entry.tensor: entry.sqnr_db for entry in report.tensors}
    print(precision, route, {tensor: round(ratio or 0, 1) for tensor, ratio in figures.items()}, report.notes)
    assert report.jump is None
    assert all(ratio is None or ratio > (10 if precision == "int8" else 40) for ratio in figures.values())
    assert set(report.missing) == {
        node.output[0] for node in tiny_unet().graph.node if node.op_type == "Conv" and node.output[0] != "logits"
    }
    assert len(report.notes) == 1


class TestCalibration:
    """TensorRT's own calibrator."""

    @pytest.fixture(autouse=True)
    def implicit(self):
        needs("implicit")

    def test_minmax_finds_the_largest_values(self, folder, table):
        found = calibrate_with_tensorrt(folder / "clean.onnx", images(8), "minmax", settings())
        assert found.algorithm == "minmax"
        for node in tiny_unet().graph.node:
            if node.op_type in ("Conv", "ConvTranspose"):
                name = node.input[0]
                assert found.amax[name] == pytest.approx(table.amax[name], rel=0.05)

    def test_entropy_table_builds_an_engine(self, folder, table):
        found = calibrate_with_tensorrt(folder / "clean.onnx", images(8), "entropy", settings())
        assert found.algorithm == "entropy"
        ratios = {name: found.amax[name] / table.amax[name] for name in found.amax if name in table.amax}
        # TensorRT's own histogram reaches a little beyond the largest value.
        assert 0.5 < min(ratios.values()) <= max(ratios.values()) < 1.1, ratios
        target = folder / "entropy"
        build_engine(folder / "clean.onnx", "int8", settings("implicit"), found, None, None, target, None)
        (feeds,) = images(1, seed=7)
        with load_engine(target / "model.engine") as runner:
            assert error(runner(feeds)["logits"], reference(tiny_unet(), feeds)) < 0.5

    def test_a_dynamic_batch_takes_the_batches_size(self, tmp_path, table):
        clean = save(tiny_unet("batch"), tmp_path / "clean.onnx")
        found = calibrate_with_tensorrt(clean, images(2, batch=2), "minmax", settings(profile=BATCHES))
        assert found.amax["image"] > 0

    def test_an_error_in_the_data_surfaces(self, folder):
        def broken():
            yield from images(1)
            raise RuntimeError("the second image is damaged")

        with pytest.raises(RuntimeError, match="second image is damaged"):
            calibrate_with_tensorrt(folder / "clean.onnx", broken(), "entropy", settings())

    def test_batches_that_differ(self, folder):
        with pytest.raises(CalibrationError, match="batch 1 does not fit input image"):
            calibrate_with_tensorrt(folder / "clean.onnx", [*images(1), *images(1, batch=2)], "entropy", settings())

    def test_no_images(self, folder):
        with pytest.raises(CalibrationError, match="no calibration images"):
            calibrate_with_tensorrt(folder / "clean.onnx", [], "entropy", settings())


@pytest.mark.parametrize(("precision", "route"), [("fp16", "implicit"), ("int8", "implicit"), ("int8", "explicit")])
def test_dynamic_batch(tmp_path, table, precision, route):
    needs(route)
    model = tiny_unet("batch")
    clean = save(model, tmp_path / "clean.onnx")
    manifest = build_engine(
        clean, precision, settings(route, profile=BATCHES), table, None, None, tmp_path / "out", None
    )
    assert manifest.inputs[0].shape == ("batch", 3, 32, 32)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        assert runner.inputs == manifest.inputs
        assert runner.profiles == manifest.profiles
        for batch in (2, 1, 4, 3, 4):
            (feeds,) = images(1, batch=batch, seed=batch)
            have = runner(feeds)["logits"]
            assert have.shape[0] == batch
            assert error(have, reference(model, feeds)) < TOLERANCE[precision]
        with pytest.raises(EngineError, match="not built for"):
            runner(images(1, batch=5)[0])
        (feeds,) = images(1, batch=4)
        assert (runner.device_milliseconds(feeds, 0.05, 0.0) > 0).all()


def test_dynamic_size_runs_within_its_profile(tmp_path):
    model = tiny_unet(1, size="side")
    clean = save(model, tmp_path / "clean.onnx")
    side = ProfileRange(min=32, opt=64, max=96)
    build_engine(
        clean, "fp16", settings(profile={"height": side, "width": side}), None, None, None, tmp_path / "out", None
    )
    rng = np.random.default_rng(0)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        for height, width in ((32, 32), (96, 64)):
            feeds = {"image": rng.standard_normal((1, 3, height, width)).astype(np.float32)}
            have = runner(feeds)["logits"]
            assert have.shape == (1, 3, height, width)
            assert error(have, reference(model, feeds)) < TOLERANCE["fp16"]


def test_a_dynamic_batch_needs_a_profile(tmp_path):
    clean = save(tiny_unet("batch"), tmp_path / "clean.onnx")
    with pytest.raises(ConfigError, match=r"engine\.profile\.batch is not given"):
        build_engine(clean, "fp16", settings(), None, None, None, tmp_path / "out", None)


def test_timing_cache_cold_warm_damaged(folder, tmp_path):
    timing = tmp_path / "timing.cache"

    def build() -> EngineManifest:
        made = build_engine(
            folder / "clean.onnx", "fp16", settings(optimization_level=1), None, None, None, tmp_path / "out", timing
        )
        assert made is not None
        return made

    assert build().timing_cache == "cold"
    assert timing.stat().st_size > 0
    warm = build()
    assert warm.timing_cache == "warm"
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        (feeds,) = images(1)
        assert error(runner(feeds)["logits"], reference(tiny_unet(), feeds)) < TOLERANCE["fp16"]
    timing.write_bytes(b"this is no timing cache" * 10)
    damaged = build()
    assert damaged.timing_cache == "cold"
    assert any("set aside" in note for note in damaged.notes)
    assert (tmp_path / "timing.cache.damaged").exists()
    assert build().timing_cache == "warm"


@pytest.mark.parametrize(
    "options",
    [
        {"tf32": True},
        {"sparsity": True},
        {"hardware_compatible": True},
        {"version_compatible": True},
        {"refit": True},
        {"profiling": "none"},
        {"fuse_resize": True},
    ],
    ids=str,
)
def test_options(folder, table, tmp_path, options):
    (name,) = options
    precision = "int8" if name == "sparsity" else "fp16"
    try:
        manifest = build_engine(
            folder / "clean.onnx", precision, settings(**options), table, None, None, tmp_path / "out", None
        )
    except (UnsupportedError, EngineError) as refused:  # a version-compatible build needs TensorRT's lean runtime
        said, why = str(refused), refused.problem
    else:
        said = why = ""
    if said:
        assert f"engine.{name}" in said
        pytest.skip(why)
    assert options.items() <= manifest.options.items()
    (feeds,) = images(1, seed=7)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        assert error(runner(feeds)["logits"], reference(tiny_unet(), feeds)) < TOLERANCE[precision]


def test_an_interrupted_build_leaves_nothing(folder, tmp_path):
    """Where this TensorRT has no progress monitor the build ends first, and is thrown away."""
    code = (
        "import logging, sys\nfrom pathlib import Path\nfrom pipeline.config import EngineConfig\n"
        "from pipeline.stages.engine import build_engine_file\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "build_engine_file(Path(sys.argv[1]), 'fp16', EngineConfig(backend='tensorrt', optimization_level=5),"
        " None, None, None, Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "clean.onnx"), str(tmp_path / "out" / "a.engine")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("building the fp16 engine" in line for line in iter(process.stdout.readline, ""))
    time.sleep(0.5)
    assert process.poll() is None, "the build is too quick for this test"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said
    assert not list((tmp_path / "out").glob("**/*"))


def test_sizes_that_the_network_cannot_take(tmp_path):
    clean = save(tiny_unet(1, size="side"), tmp_path / "clean.onnx")
    good, odd = ProfileRange(min=32, opt=64, max=96), ProfileRange(min=30, opt=64, max=96)
    with pytest.raises(ConfigError, match="takes no width of 30"):
        build_engine(
            clean, "fp16", settings(profile={"height": good, "width": odd}), None, None, None, tmp_path / "out", None
        )


def test_a_refused_node_is_named(tmp_path):
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MaxPool", ["image"], ["small", "places"], "shrink", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxUnpool", ["small", "places"], ["logits"], "grow", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    image, logits = (value(name, TensorProto.FLOAT, [1, 3, 32, 32]) for name in ("image", "logits"))
    graph = helper.make_graph(nodes, "segnet", [image], [logits])
    clean = tmp_path / "clean.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), clean)
    with pytest.raises(EngineError) as caught:
        build_engine(clean, "fp32", settings(), None, None, None, tmp_path / "out", None)
    line = str(caught.value).splitlines()[0]
    assert "shrink (MaxPool)" in line or "grow (MaxUnpool)" in line


def test_an_engine_from_image_to_mask(tmp_path):
    """uint8 NHWC in, uint8 mask out: the network with its preprocessing and ArgMax inside."""
    inner = tiny_unet()
    image = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, 32, 32, 3])
    mask = helper.make_tensor_value_info("mask", TensorProto.UINT8, [1, 32, 32])
    before = [
        helper.make_node("Cast", ["pixels"], ["float"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "to_planes", perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "range"], ["image"], "normalise"),
    ]
    after = [
        helper.make_node("ArgMax", ["logits"], ["classes"], "argmax", axis=1, keepdims=0),
        helper.make_node("Cast", ["classes"], ["mask"], "to_mask", to=TensorProto.UINT8),
    ]
    weights = [*inner.graph.initializer, onnx.numpy_helper.from_array(np.float32(127), "range")]
    graph = helper.make_graph([*before, *inner.graph.node, *after], "image_to_mask", [image], [mask], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    clean = save(model, tmp_path / "clean.onnx")
    manifest = build_engine(clean, "fp32", settings(), None, None, None, tmp_path / "out", None)
    assert manifest.inputs[0].dtype == "uint8"
    assert manifest.outputs[0].dtype == "uint8"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127)
    want = reference(inner, {"image": planes}).argmax(1)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        assert (runner({"pixels": pixels})["mask"] == want).mean() > 0.99


class TestRunner:
    def test_results_stay_when_the_next_image_runs(self, engine):
        one, two = images(2, seed=5)
        with load_engine(engine("fp32", KNOWN.routes[0]) / "model.engine") as runner:
            first = runner(one)["logits"]
            kept = first.copy()
            runner(two)
            assert np.array_equal(first, kept)
            assert np.array_equal(runner(one)["logits"], kept)

    def test_gpu_times(self, engine):
        (feeds,) = images(1)
        with load_engine(engine("fp16", KNOWN.routes[0]) / "model.engine") as runner:
            before = runner(feeds)["logits"]
            times = runner.device_milliseconds(feeds, 0.3, 0.1)
            assert runner.captured
            assert len(times) > 100
            assert np.isfinite(times).all()
            assert 0 < np.median(times) < 50
            there, back = runner.transfer_milliseconds(feeds)
            assert (there > 0).all()
            assert (back > 0).all()
            assert np.array_equal(runner(feeds)["logits"], before)

    def test_memory_comes_back(self, engine):
        (feeds,) = images(1)
        path = engine("fp16", KNOWN.routes[0]) / "model.engine"

        def cycle():
            with load_engine(path) as runner:
                runner(feeds)
                runner.device_milliseconds(feeds, 0.01, 0.0)

        cycle()
        free, _ = cuda.free_memory()
        for _ in range(10):
            cycle()
        assert free - cuda.free_memory()[0] < 32 << 20

    def test_out_of_memory_is_an_engine_error(self):
        with pytest.raises(EngineError, match="out of memory") as caught:
            cuda.DeviceBuffer(1 << 48)
        assert "MiB free of" in caught.value.got
        cuda.DeviceBuffer(1 << 20).close()

    def test_what_is_no_engine(self):
        with pytest.raises(EngineError, match="cannot load the engine on this GPU"):
            EngineRunner(api(), b"this is no engine" * 100)


class TestManifest:
    @pytest.fixture
    def copy(self, engine, tmp_path):
        source = engine("fp16", KNOWN.routes[0])
        (tmp_path / "model.engine").write_bytes((source / "model.engine").read_bytes())

        def edit(**changes):
            (tmp_path / "manifest.json").write_text(json.dumps({**manifest_of(source), **changes}))
            return tmp_path / "model.engine"

        return edit

    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"backend_version": "8.5.3"}, "was built with tensorrt 8.5.3"),
            ({"device": {"name": "NVIDIA L4", "compute_capability": "8.9", "driver": "1"}}, "was built on a NVIDIA L4"),
            ({"engine_sha256": "0" * 64}, "is not the file that its manifest describes"),
        ],
    )
    def test_mismatch(self, copy, changes, line):
        with pytest.raises(EngineError) as caught:
            load_engine(copy(**changes))
        assert line in str(caught.value).splitlines()[0]

    def test_trust(self, copy):
        (feeds,) = images(1)
        with load_engine(copy(backend_version="8.5.3"), trust=True) as runner:
            assert runner(feeds)["logits"].shape == (1, 3, 32, 32)

    def test_truncated(self, copy):
        path = copy()
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(EngineError, match="changed, truncated"):
            load_engine(path)


def test_excluded_nodes_stay_unquantized(folder, table):
    target = folder / "excluded"
    build_engine(
        folder / "clean.onnx", "int8", settings("explicit", exclude=("head",)), table, None, None, target, None
    )
    typed = onnx.load(target / "model.onnx")
    (head,) = [node for node in typed.graph.node if node.name == "head"]
    producers = {name: node.op_type for node in typed.graph.node for name in node.output}
    assert producers.get(head.input[0]) != "DequantizeLinear"
    (feeds,) = images(1, seed=7)
    with load_engine(target / "model.engine") as runner:
        assert error(runner(feeds)["logits"], reference(tiny_unet(), feeds)) < TOLERANCE["int8"]


def test_an_implicit_route_that_this_tensorrt_lacks(folder, table):
    if "implicit" in KNOWN.routes:
        pytest.skip(f"TensorRT {KNOWN.version} has it")
    with pytest.raises(UnsupportedError):
        build_engine(folder / "clean.onnx", "int8", settings("implicit"), table, None, None, folder / "none", None)
