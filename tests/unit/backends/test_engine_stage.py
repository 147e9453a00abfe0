"""The engine stage's checks: profiles, tables, what is written where."""

import os

import onnx
import pytest

from pipeline.artifacts import EngineManifest, Profile, TensorSpec, from_json, sha256_bytes, sha256_file
from pipeline.backends.base import BuildResult, Capabilities
from pipeline.backends.registry import Resolved
from pipeline.calibration.report import CalibrationReport
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, ProfileRange
from pipeline.errors import BuildFolderError, CalibrationError, ConfigError, EngineError, UnsupportedError
from pipeline.graph.placement import implicit_ranges
from pipeline.graph.promises import write_multiples, write_raw_names
from pipeline.stages import engine
from pipeline.stages.engine import build_engine, build_engine_file, make_profiles
from tests.tiny_unet import images, observed_table, save, tiny_unet

RANGE = ProfileRange(min=1, opt=2, max=4)
SIDE = ProfileRange(min=32, opt=64, max=128)
SPEC = (TensorSpec("image", (1, 3, 32, 32), "float32"),)


def dynamic(*shape, dtype="float32"):
    return (TensorSpec("image", shape, dtype),)


def test_static_model_has_no_profile():
    assert make_profiles(SPEC, {}) == {}


def test_profile_of_a_dynamic_batch():
    assert make_profiles(dynamic("n", 3, 32, 32), {"batch": RANGE}) == {
        "image": Profile((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
    }


def test_profile_of_all_axes():
    made = make_profiles(dynamic("n", 3, "h", "w"), {"batch": RANGE, "height": SIDE, "width": SIDE})
    assert made["image"].max == (4, 3, 128, 128)


def test_profile_of_channels_last():
    made = make_profiles(dynamic(1, "h", 640, 3, dtype="uint8"), {"height": SIDE})
    assert made["image"].opt == (1, 64, 640, 3)


def test_dynamic_axis_without_a_range():
    with pytest.raises(ConfigError, match=r"engine\.profile\.height is not given"):
        make_profiles(dynamic("n", 3, "h", 32), {"batch": RANGE})


def test_range_for_a_fixed_axis():
    with pytest.raises(ConfigError, match=r"engine\.profile\.width is given, but the model fixes its width"):
        make_profiles(dynamic("n", 3, 32, 32), {"batch": RANGE, "width": SIDE})


@pytest.mark.parametrize("shape", [(1, "c", 32, 32), ("n", 10)])
def test_a_dynamic_axis_that_no_key_describes(shape):
    with pytest.raises(ConfigError, match="no profile key describes it"):
        make_profiles(dynamic(*shape), {"batch": RANGE})


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def table(model):
    return observed_table(model, images(2))


@pytest.fixture
def clean(model, tmp_path):
    return save(model, tmp_path / "clean.onnx")


class FakeBuilder:
    """Builds the bytes of the graph that it is asked to build."""

    def __init__(self, capabilities):
        self.name, self._capabilities, self.requests = capabilities.name, capabilities, []

    def capabilities(self):
        return self._capabilities

    def build(self, request):
        self.requests.append(request)
        return BuildResult(request.model.read_bytes(), SPEC, SPEC, 1.25, "cold", ("a note",))


@pytest.fixture
def use(monkeypatch):
    def make(route, **capabilities):
        builder = FakeBuilder(Capabilities("tensorrt", "8.6.0", True, True, **capabilities))
        monkeypatch.setattr(engine, "resolve", lambda *_: Resolved(builder, route, builder.capabilities()))
        return builder

    return make


def run(clean, precision, table, folder, **config):
    return build_engine(clean, precision, EngineConfig(**config), table, "c" * 64, None, folder, folder / "timing")


def test_implicit_builds_the_clean_graph_with_the_table(use, clean, table, tmp_path):
    builder = use("implicit")
    manifest = run(clean, "int8", table, tmp_path / "int8")
    (request,) = builder.requests
    assert request.model == clean
    assert request.table == implicit_ranges(onnx.load(clean), table)
    assert request.timing_cache is not None
    assert not (tmp_path / "int8" / "model.onnx").exists()
    assert manifest == from_json(EngineManifest, tmp_path / "int8" / "manifest.json")
    assert manifest.engine_sha256 == sha256_bytes((tmp_path / "int8" / "model.engine").read_bytes())
    assert manifest.onnx_sha256 == sha256_file(clean)
    assert (manifest.cache_sha256, manifest.route, manifest.timing_cache) == ("c" * 64, "implicit", "cold")
    assert "a note" in manifest.notes


@pytest.mark.parametrize("coordinates", ["align_corners", "half_pixel"])
def test_the_manifest_says_what_the_graph_says_of_sizes(use, tmp_path, coordinates):
    use("implicit")
    model = tiny_unet(size="free")
    write_multiples(model, {"height": 8, "width": 4})
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    next(a for a in resize.attribute if a.name == "coordinate_transformation_mode").s = coordinates.encode()
    clean = save(model, tmp_path / "clean.onnx")
    manifest = run(clean, "fp32", None, tmp_path / "fp32", profile={"height": SIDE, "width": SIDE})
    assert manifest.multiples == {"height": 8, "width": 4}
    assert manifest.aligns_corners is (coordinates == "align_corners")


@pytest.mark.parametrize(("typed", "scale"), [(True, "float16"), (False, "float32")])
def test_explicit_int8_has_fp16_around_it_where_types_are_strong(use, clean, table, tmp_path, typed, scale):
    builder = use("explicit", strongly_typed=typed)
    run(clean, "int8", table, tmp_path / "int8")
    assert builder.requests[0].table is None
    written = onnx.load(tmp_path / "int8" / "model.onnx")
    scales = {node.input[1] for node in written.graph.node if node.op_type == "QuantizeLinear"}
    types = {
        onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name for t in written.graph.initializer if t.name in scales
    }
    assert types == {scale}


def test_fp32_explicit_is_the_clean_graph_and_has_no_cache(use, clean, table, tmp_path):
    use("explicit", strongly_typed=True)
    manifest = run(clean, "fp32", table, tmp_path / "fp32")
    assert (tmp_path / "fp32" / "model.onnx").exists()
    assert manifest.cache_sha256 is None


def test_implicit_refuses_a_table_with_a_gap(use, clean, table, tmp_path):
    use("implicit")
    amax = {name: value for name, value in table.amax.items() if name != "logits"}
    with pytest.raises(CalibrationError, match="lacks 1 of the ranges") as caught:
        run(clean, "int8", CalibrationTable("entropy", amax), tmp_path / "int8", route="implicit")
    assert caught.value.got == "1 missing: logits"
    assert not list((tmp_path / "int8").iterdir())


def test_what_else_a_cache_names_is_dropped_and_told(use, clean, table, tmp_path):
    builder = use("implicit")
    more = {**table.amax, "(Unnamed Layer* 3) [Shuffle]": 1.0, "strange": 1.0}
    manifest = run(clean, "int8", CalibrationTable("entropy", more, 8502), tmp_path / "int8", route="implicit")
    assert builder.requests[0].table.amax == implicit_ranges(onnx.load(clean), table).amax
    assert "1 ranges of tensors that the graph does not have: strange" in manifest.notes
    assert any("its header names TensorRT 8502" in note for note in manifest.notes)


def test_a_cache_in_the_raw_exports_names(use, clean, table, tmp_path):
    builder = use("implicit")
    model = onnx.load(clean)
    some = [name for name in table.amax if name not in ("image", "logits")][:2]
    write_raw_names(model, {name: f"/raw/{name}" for name in some})
    onnx.save(model, tmp_path / "named.onnx")
    old = {f"/raw/{name}" if name in some else name: value for name, value in table.amax.items()}
    manifest = run(tmp_path / "named.onnx", "int8", CalibrationTable("entropy", old), tmp_path / "o", route="implicit")
    assert builder.requests[0].table.amax == implicit_ranges(onnx.load(clean), table).amax
    assert any(note.startswith("2 ranges of the calibration cache were found under") for note in manifest.notes)


def test_a_cache_that_was_made_for_another_graph(use, clean, table, tmp_path):
    use("explicit")
    report = CalibrationReport("entropy", "cpu", 2048, 1, ("a",), "i", "0" * 64, "p", "c", (), 1.0, 1.0)
    with pytest.raises(CalibrationError, match="was made for another graph"):
        run(clean, "int8", CalibrationTable("entropy", table.amax, 8600, report), tmp_path / "int8")
    assert not list((tmp_path / "int8").iterdir())


def test_timing_cache_switched_off(use, clean, tmp_path):
    builder = use("implicit")
    run(clean, "fp16", None, tmp_path / "fp16", timing_cache=False)
    assert builder.requests[0].timing_cache is None


def test_int8_without_a_table_comes_before_everything_else(clean, tmp_path):
    with pytest.raises(CalibrationError, match="needs a calibration table"):
        run(clean, "int8", None, tmp_path / "int8")


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_exclusions_on_the_implicit_route_are_handed_to_the_builder(use, clean, table, tmp_path, precision):
    builder = use("implicit")
    run(clean, precision, table, tmp_path / precision, exclude=("head", "down*"))
    assert builder.requests[0].half_nodes == ("down0", "down1", "head")
    assert builder.requests[0].precision == precision
    assert builder.requests[0].table is not None


def test_exclusions_on_the_explicit_route_are_in_the_graph(use, clean, table, tmp_path):
    builder = use("explicit", strongly_typed=True)
    manifest = run(clean, "mixed", table, tmp_path / "mixed", exclude=("head",))
    assert builder.requests[0].half_nodes == ()
    assert (manifest.precision, manifest.cache_sha256) == ("mixed", "c" * 64)
    graph = onnx.load(tmp_path / "mixed" / "model.onnx").graph
    convolutions = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    assert convolutions["head"] == "head.weight"
    assert sum("dequant" in weight.lower() or weight != f"{n}.weight" for n, weight in convolutions.items()) == 5


@pytest.mark.parametrize("precision", ["int8", "mixed"])
@pytest.mark.parametrize("route", ["implicit", "explicit"])
def test_without_a_convolution_in_int8_it_is_fp16(use, clean, table, tmp_path, route, precision):
    """A builder that is told of INT8 asks for ranges, which nothing needs here."""
    builder = use(route, strongly_typed=route == "explicit")
    manifest = run(clean, precision, table, tmp_path / precision, exclude=("*",))
    (request,) = builder.requests
    assert (request.precision, request.table, request.half_nodes) == ("fp16", None, ())
    assert manifest.precision == precision
    assert "no convolution in INT8: built as FP16" in " ".join(manifest.notes)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_onnxruntime_gets_the_typed_graph_alone(clean, table, tmp_path, precision):
    folder = tmp_path / precision
    assert run(clean, precision, table, folder, backend="onnxruntime") is None
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("bound", "sizes"), [("min", (30, 32, 64)), ("opt", (32, 50, 64)), ("max", (32, 64, 66))])
def test_sizes_that_the_network_cannot_take(use, tmp_path, bound, sizes):
    use("implicit")
    clean = save(tiny_unet(1, size="side"), tmp_path / "dynamic.onnx")
    wrong = ProfileRange(min=sizes[0], opt=sizes[1], max=sizes[2])
    bad = getattr(wrong, bound)
    with pytest.raises(ConfigError, match=f"the network takes no width of {bad}: at join1") as caught:
        run(clean, "fp16", None, tmp_path / "out", profile={"height": SIDE, "width": wrong})
    assert caught.value.got == f"engine.profile.width.{bound} {bad}"
    assert caught.value.expected == f"sizes such as {bad - 2} or {bad + 2}"
    assert not (tmp_path / "out").exists()


def test_sizes_that_the_network_can_take(use, tmp_path):
    builder = use("implicit")
    clean = save(tiny_unet(1, size="side"), tmp_path / "dynamic.onnx")
    run(clean, "fp16", None, tmp_path / "out", profile={"height": SIDE, "width": SIDE})
    assert builder.requests[0].profiles["image"].max == (1, 3, 128, 128)


def test_the_manifest_says_how_it_was_built(use, clean, tmp_path):
    use("implicit")
    run(clean, "fp16", None, tmp_path / "fp16", refit=True, optimization_level=5)
    options = from_json(EngineManifest, tmp_path / "fp16" / "manifest.json").options
    assert (options["refit"], options["optimization_level"], options["sparsity"]) == (True, 5, False)


@pytest.mark.parametrize(
    ("precision", "sparse", "noted"),
    [
        ("fp16", False, "engine.sparsity is for INT8: fp16 has dense kernels"),
        ("fp32", False, "engine.sparsity is for INT8: fp32 has dense kernels"),
        ("int8", True, "engine.sparsity: 0 of"),
        ("mixed", True, "engine.sparsity: 0 of"),
    ],
)
def test_sparse_kernels_are_for_int8(use, clean, table, tmp_path, caplog, precision, sparse, noted):
    builder = use("implicit")
    run(clean, precision, table, tmp_path / "out", sparsity=True)
    manifest = from_json(EngineManifest, tmp_path / "out" / "manifest.json")
    assert builder.requests[0].config.sparsity is manifest.options["sparsity"] is sparse
    assert any(note.startswith(noted) for note in manifest.notes)
    assert ("it changes nothing; `unet-trt prune` makes such weights" in caplog.text) is sparse


def test_sparse_kernels_where_some_convolutions_stay_fp16(use, clean, table, tmp_path, monkeypatch, caplog):
    use("implicit")
    monkeypatch.setattr(engine, "sparse_convolutions", lambda _: (2, 2))
    run(clean, "int8", table, tmp_path / "whole", sparsity=True)
    assert "see that validation passes" not in caplog.text
    run(clean, "int8", table, tmp_path / "partly", sparsity=True, exclude=["down0"])
    assert "convolutions that stay FP16 may get sparse kernels too" in caplog.text


def test_sparse_kernels_for_a_network_of_few_channels(use, clean, table, tmp_path, monkeypatch, caplog):
    use("implicit")
    monkeypatch.setattr(engine, "sparse_convolutions", lambda _: (0, 0))
    run(clean, "int8", table, tmp_path / "out", sparsity=True)
    assert "finds no convolution of 32 or more input channels" in caplog.text
    assert "unet-trt prune" not in caplog.text


class TestFile:
    """``unet-trt engine CLEAN.onnx -o model.engine``."""

    def build(self, clean, target, **config):
        return build_engine_file(clean, "fp16", EngineConfig(**config), None, None, None, target)

    def test_manifest_and_typed_graph_lie_beside_it(self, use, clean, tmp_path):
        use("explicit", strongly_typed=True)
        before = clean.read_bytes()
        self.build(clean, tmp_path / "clean.engine")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "clean.engine",
            "clean.onnx",
            "clean.typed.onnx",
            "manifest.json",
        ]
        assert clean.read_bytes() == before

    def test_another_engines_manifest_is_not_replaced(self, use, clean, tmp_path):
        use("implicit")
        self.build(clean, tmp_path / "a.engine")
        self.build(clean, tmp_path / "a.engine")
        with pytest.raises(EngineError, match=r"another engine, a\.engine"):
            self.build(clean, tmp_path / "b.engine")

    def test_a_failed_build_leaves_nothing(self, use, clean, tmp_path):
        def fail(request):
            raise EngineError("refused")

        use("implicit").build = fail
        with pytest.raises(EngineError, match="refused"):
            self.build(clean, tmp_path / "out" / "a.engine")
        assert list((tmp_path / "out").iterdir()) == []

    def test_what_killed_builds_left_is_cleared(self, use, clean, tmp_path):
        use("implicit")
        for name in (".a.engine.99.partial", ".b.engine.99.partial"):
            (tmp_path / name).mkdir()
        self.build(clean, tmp_path / "a.engine")
        assert [path.name for path in tmp_path.glob(".*")] == [".b.engine.99.partial"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_a_folder_that_cannot_be_written(self, use, clean, tmp_path):
        use("implicit")
        (tmp_path / "fixed").mkdir(mode=0o500)
        with pytest.raises(BuildFolderError, match="cannot write"):
            self.build(clean, tmp_path / "fixed" / "a.engine")

    def test_a_file_where_a_folder_should_be(self, use, clean, tmp_path):
        use("implicit")
        (tmp_path / "file").touch()
        with pytest.raises(BuildFolderError, match="cannot write"):
            self.build(clean, tmp_path / "file" / "a.engine")

    def test_onnxruntime_makes_no_engine_file(self, clean, tmp_path):
        with pytest.raises(UnsupportedError, match="builds no engines"):
            self.build(clean, tmp_path / "a.engine", backend="onnxruntime")
