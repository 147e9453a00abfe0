"""Real TensorRT-RTX builds on whatever machine this is: no GPU is needed to build, and most have none to run on."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.artifacts import ModelCard, sha256_bytes, sha256_file
from pipeline.backends import cuda
from pipeline.backends.tensorrt_rtx import RtxBuilder
from pipeline.config import ClassConfig, EngineConfig, PreprocessingConfig, ProfileRange
from pipeline.engines import load_engine, read_manifest
from pipeline.errors import EngineError, UnsupportedError
from pipeline.stages.engine import build_engine, build_engine_file
from tests.tiny_unet import images, observed_table, reference, save, tiny_unet

KNOWN = RtxBuilder().capabilities()
pytestmark = pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build)

CARD = ModelCard(
    "tiny",
    PreprocessingConfig(height=32, width=32),
    (ClassConfig(name="a", colour=(0, 0, 0)), ClassConfig(name="b", colour=(9, 9, 9))),
)
RTX = EngineConfig(backend="tensorrt-rtx")


@pytest.fixture(scope="module")
def table():
    return observed_table(tiny_unet(), images(4))


@pytest.fixture
def clean(tmp_path):
    return save(tiny_unet(), tmp_path / "clean.onnx")


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensors_that_are_shown_become_outputs(clean, table, tmp_path, precision):
    shown = ("down0.out.relu", "resized", "logits")
    manifest = build_engine(clean, precision, RTX, table, None, CARD, tmp_path / "out", None, shown=shown)
    assert [spec.name for spec in manifest.outputs] == ["logits", "down0.out.relu", "resized"]
    with pytest.raises(EngineError, match="the network has no tensor nowhere"):
        build_engine(clean, precision, RTX, table, None, CARD, tmp_path / "not", None, shown=("nowhere",))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_builds_with_its_manifest_and_typed_graph(clean, table, tmp_path, precision):
    folder = tmp_path / precision
    timing = tmp_path / "timing.cache"
    manifest = build_engine(clean, precision, RTX, table, "c" * 64, CARD, folder, timing)
    assert manifest == read_manifest(folder)
    assert manifest.engine_sha256 == sha256_file(folder / "model.engine")
    assert manifest.onnx_sha256 == sha256_file(clean)
    assert manifest.cache_sha256 == ("c" * 64 if precision == "int8" else None)
    assert (manifest.backend, manifest.backend_version) == ("tensorrt-rtx", KNOWN.version)
    assert manifest.device is None
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(manifest.target_capabilities)
    assert "9.0" not in manifest.target_capabilities
    assert manifest.card == CARD
    # Images come in and logits go out as float32 at every precision.
    assert {spec.dtype for spec in (*manifest.inputs, *manifest.outputs)} == {"float32"}
    assert manifest.inputs[0].shape == (1, 3, 32, 32)
    assert manifest.timing_cache == "none"
    assert not timing.exists()
    assert ("QuantizeLinear" in operators(folder / "model.onnx")) is (precision == "int8")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("fp16", 0.02), ("int8", 0.2)])
def test_the_typed_graph_is_the_network(clean, table, tmp_path, precision, tolerance):
    build_engine(clean, precision, RTX, table, None, None, tmp_path / "out", None)
    (feeds,) = images(1, seed=9)
    want = reference(onnx.load(clean), feeds)
    have = reference(onnx.load(tmp_path / "out" / "model.onnx"), feeds)
    assert abs(have - want).max() <= tolerance * abs(want).max()


def test_the_same_graph_gives_engines_of_differing_precisions(clean, table, tmp_path):
    made = {}
    for precision in ("fp32", "fp16", "int8"):
        build_engine(clean, precision, RTX, table, None, None, tmp_path / precision, None)
        made[precision] = sha256_bytes((tmp_path / precision / "model.engine").read_bytes())
    assert len(set(made.values())) == 3


def test_a_dynamic_batch_builds_with_its_profile(table, tmp_path):
    clean = save(tiny_unet("batch"), tmp_path / "clean.onnx")
    config = EngineConfig(backend="tensorrt-rtx", profile={"batch": ProfileRange(min=1, opt=2, max=4)})
    manifest = build_engine(clean, "int8", config, table, None, None, tmp_path / "out", None)
    assert manifest.inputs[0].shape == ("batch", 3, 32, 32)
    assert manifest.outputs[0].shape[0] in ("batch", "logits_0")
    assert manifest.profiles["image"].max == (4, 3, 32, 32)


def test_all_axes_dynamic(tmp_path):
    clean = save(tiny_unet("batch", size="side"), tmp_path / "clean.onnx")
    side = ProfileRange(min=32, opt=64, max=96)
    config = EngineConfig(
        backend="tensorrt-rtx", profile={"batch": ProfileRange(min=1, opt=1, max=2), "height": side, "width": side}
    )
    manifest = build_engine(clean, "fp16", config, None, None, None, tmp_path / "out", None)
    assert manifest.profiles["image"].opt == (1, 3, 64, 64)


def test_a_node_that_the_parser_refuses_is_named(tmp_path):
    clean = save(tiny_unet(antialias=True), tmp_path / "clean.onnx")
    with pytest.raises(EngineError) as caught:
        build_engine(clean, "fp32", RTX, None, None, None, tmp_path / "out", None)
    line = str(caught.value).splitlines()[0]
    assert "node up1 (Resize)" in line
    assert "Antialiasing is not supported" in line


@pytest.mark.parametrize(
    "options",
    [
        {"workspace_mib": 64},
        {"optimization_level": 0},
        {"optimization_level": 5},
        {"tf32": True},
        {"sparsity": True},
        {"profiling": "none"},
    ],
    ids=str,
)
def test_options_that_rtx_has(clean, table, tmp_path, options):
    config = EngineConfig(backend="tensorrt-rtx", **options)
    precision = "int8" if "sparsity" in options else "fp16"
    manifest = build_engine(clean, precision, config, table, None, None, tmp_path / "out", None)
    assert options.items() <= manifest.options.items()


def test_options_that_rtx_refuses(clean, tmp_path):
    config = EngineConfig(backend="tensorrt-rtx", hardware_compatible=True)
    with pytest.raises(UnsupportedError, match=r"does not offer engine\.hardware_compatible: .*unsupported in"):
        build_engine(clean, "fp16", config, None, None, None, tmp_path / "out", None)


@pytest.mark.skipif(KNOWN.device is not None, reason="refused without a GPU")
@pytest.mark.parametrize("option", ["refit", "version_compatible"])
def test_options_that_rtx_fails_on_are_named(clean, tmp_path, option):
    """It accepts them; building then needs a GPU, or a library that its package does not hold."""
    config = EngineConfig(backend="tensorrt-rtx", **{option: True})
    with pytest.raises(EngineError, match="cannot build the engine") as caught:
        build_engine(clean, "fp16", config, None, None, None, tmp_path / "out", None)
    assert f"without engine.{option}" in caught.value.fix


BUILD = """
import logging
import sys
from pathlib import Path
from pipeline.backends import tensorrt_rtx
from pipeline.config import EngineConfig
from pipeline.stages.engine import build_engine_file
tensorrt_rtx.api()
source, target = map(Path, sys.argv[1:])
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
print("ready", flush=True)
build_engine_file(source, "fp16", EngineConfig(backend="tensorrt-rtx"), None, None, None, target)
"""


def start_building(source: Path, target: Path, until: str = "ready") -> subprocess.Popen[str]:
    """In a process of its own; returns when it has imported everything, or logged what it is waited for."""
    command = [sys.executable, "-c", BUILD, str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(until in line for line in iter(process.stdout.readline, ""))
    return process


def test_two_builds_at_once_into_one_folder(clean, tmp_path):
    other = save(tiny_unet(seed=1), tmp_path / "other.onnx")
    out = tmp_path / "out"
    builds = [start_building(source, out / "a.engine") for source in (clean, other, clean)]
    assert [process.wait(60) for process in builds] == [0, 0, 0], [p.communicate() for p in builds]
    assert sorted(path.name for path in out.iterdir()) == ["a.engine", "a.typed.onnx", "manifest.json"]
    manifest = read_manifest(out)
    assert manifest.engine_sha256 == sha256_file(out / "a.engine")
    assert manifest.onnx_sha256 in (sha256_file(clean), sha256_file(other))


def test_a_second_engine_in_the_folder_is_refused_though_both_begin_at_once(clean, tmp_path):
    builds = [start_building(clean, tmp_path / "out" / name) for name in ("a.engine", "b.engine")]
    assert sorted(process.wait(60) for process in builds) == [0, 1]
    assert len(list((tmp_path / "out").glob("*.engine"))) == 1


def chain(length: int) -> onnx.ModelProto:
    """Convolutions behind one another: 1500 keep the builder busy for seconds."""
    values = {f"w{i}": np.full((8, 8, 3, 3), 0.01 * (i % 7), np.float32) for i in range(length)}
    names = ["image", *(f"x{i}" for i in range(length - 1)), "logits"]
    nodes = [
        helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], f"conv{i}", pads=[1] * 4) for i in range(length)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 32, 32]) for name in ("image", "logits")]
    weights = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("where", ["ready", "building the fp16 engine"], ids=["in Python", "in TensorRT"])
def test_an_interrupted_build_leaves_nothing(tmp_path, where):
    """TensorRT's bindings would swallow a KeyboardInterrupt."""
    source = save(chain(1500), tmp_path / "chain.onnx")
    process = start_building(source, tmp_path / "out" / "a.engine", where)
    time.sleep(0.3)
    assert process.poll() is None, "the build is too quick for this test"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said
    assert time.monotonic() - started < 60
    assert not list((tmp_path / "out").glob("**/*"))


def test_building_says_nothing_on_the_terminal(clean, tmp_path, capfd, caplog):
    caplog.set_level(logging.WARNING)
    build_engine(clean, "fp16", RTX, None, None, None, tmp_path / "out", None)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_file_of_ones_own(clean, tmp_path):
    build_engine_file(clean, "fp16", RTX, None, None, None, tmp_path / "out" / "tiny.engine")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "tiny.engine",
        "tiny.typed.onnx",
    ]


def test_loading_where_it_cannot_run_says_why(clean, tmp_path):
    if KNOWN.runs:
        pytest.skip("this GPU runs TensorRT-RTX engines")
    build_engine(clean, "fp16", RTX, None, None, None, tmp_path / "out", None)
    with pytest.raises(UnsupportedError, match=r"no NVIDIA driver|no usable GPU|runs on compute capability"):
        load_engine(tmp_path / "out" / "model.engine")


@pytest.mark.parametrize(
    "damage",
    [lambda plan: plan[:-1], lambda plan: plan[:99] + bytes([plan[99] ^ 1]) + plan[100:], lambda plan: b""],
    ids=["truncated", "one bit flipped", "emptied"],
)
@pytest.mark.parametrize("name", ["model.engine", "own.engine"])
def test_an_edited_engine_is_refused_without_a_gpu_too(clean, tmp_path, name, damage):
    path = tmp_path / "out" / name
    build_engine_file(clean, "fp16", RTX, None, None, None, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EngineError, match="changed, truncated or replaced"):
        load_engine(path)


@pytest.mark.skipif(not KNOWN.runs, reason=KNOWN.why_not_run or "runs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.02), ("int8", 0.2)])
def test_engines_run_where_the_gpu_is_a_target(clean, table, tmp_path, precision, tolerance):
    build_engine(clean, precision, RTX, table, None, None, tmp_path / "out", None)
    (feeds,) = images(1, seed=9)
    want = reference(onnx.load(clean), feeds)
    with load_engine(tmp_path / "out" / "model.engine") as runner:
        have = runner(feeds)["logits"]
        assert (runner.device_milliseconds(feeds, 0.1, 0.0) > 0).all()
    assert abs(have - want).max() <= tolerance * abs(want).max()
    assert not cuda.why_no_gpu()
