"""The build steps that TensorRT and TensorRT-RTX share, over a fake library."""

from types import SimpleNamespace

import pytest

from pipeline.artifacts import Profile
from pipeline.backends import cuda, nvinfer
from pipeline.backends.base import BuildRequest
from pipeline.backends.trt_api import logger
from pipeline.config import EngineConfig
from pipeline.errors import EngineError, UnsupportedError
from tests.tiny_unet import save, tiny_unet


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Config:
    """Remembers what is set."""

    def __init__(self, trt):
        self.trt, self.flags, self.tactics, self.cache, self.refused = trt, {"TF32": True}, 0b11111, None, False
        self.refuses_timing = self.complains_of_timing = False

    def set_memory_pool_limit(self, pool, size):
        self.pool = (pool, size)

    def set_flag(self, flag):
        self.flags[flag] = True

    def clear_flag(self, flag):
        self.flags[flag] = False

    def get_tactic_sources(self):
        return self.tactics

    def set_tactic_sources(self, value):
        self.tactics = value

    def create_timing_cache(self, data):
        self.offered = data
        if self.complains_of_timing:
            logger(self.trt).log(ILogger.WARNING, "The timing cache will not be used!")
        return SimpleNamespace(serialize=lambda: data + b"+")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return not ignore_mismatch and not (self.refuses_timing and self.offered)

    def get_timing_cache(self):
        return self.cache

    def add_optimization_profile(self, profile):
        return -1 if self.refused else 0


class Tensor(SimpleNamespace):
    def __init__(self, name, shape, kind="FLOAT"):
        super().__init__(name=name, shape=shape, dtype=SimpleNamespace(name=kind))


class Library(SimpleNamespace):
    """Fake API module: ``refusals`` are parser errors, ``plan`` is what a build gives."""

    def __init__(self, request, shape=(1, 3, 32, 32)):
        super().__init__(
            __name__=f"trt_{request.node.name}",
            __version__="8.6.0",
            ILogger=ILogger,
            refusals=[],
            plan=b"plan",
            says=[],
            flags_of_network=None,
            NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
            BuilderFlag=SimpleNamespace(TF32="TF32", FP16="FP16"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
            ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED", NONE="NONE"),
            TacticSource=SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2, JIT_CONVOLUTIONS=4),
        )
        network = SimpleNamespace(
            num_inputs=1,
            num_outputs=1,
            get_input=lambda _: Tensor("image", shape),
            get_output=lambda _: Tensor("logits", shape, "HALF"),
        )
        self.config = Config(self)
        self.profile = SimpleNamespace(sizes=None)
        self.profile.set_shape = lambda name, *sizes: setattr(self.profile, "sizes", (name, *sizes))

        def create_network(flags):
            self.flags_of_network = flags
            return network

        def build(network, config):
            for severity, text in self.says:
                logger(self).log(severity, text)
            return self.plan

        self.Builder = lambda _: SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: self.profile,
            build_serialized_network=build,
        )
        self.OnnxParser = lambda network, log: SimpleNamespace(
            parse_from_file=lambda path: not self.refusals,
            num_errors=len(self.refusals),
            get_error=lambda index: self.refusals[index],
        )


@pytest.fixture
def trt(request):
    return Library(request)


@pytest.fixture
def ask(tmp_path):
    model = save(tiny_unet(), tmp_path / "model.onnx")

    def make(**changes):
        return BuildRequest(
            **{"model": model, "precision": "fp32", "route": "implicit", "config": EngineConfig(), **changes}
        )

    return make


def test_what_the_config_says_reaches_the_builder(trt, ask):
    trt.config.builder_optimization_level = 3
    settings = EngineConfig(workspace_mib=7, optimization_level=1, tf32=False)
    result = nvinfer.build(trt, ask(config=settings), strongly_typed=True)
    assert result.plan == b"plan"
    assert trt.config.pool == ("WORKSPACE", 7 << 20)
    assert trt.config.builder_optimization_level == 1
    assert trt.config.flags["TF32"] is False
    assert trt.config.tactics == 0b11000
    assert trt.flags_of_network == 1  # EXPLICIT_BATCH; this library offers no STRONGLY_TYPED
    assert [(spec.name, spec.dtype) for spec in (*result.inputs, *result.outputs)] == [
        ("image", "float32"),
        ("logits", "float16"),
    ]
    assert result.timing_cache == "none"


def test_every_refused_node_is_named_though_the_parser_gives_an_index_alone(trt, ask):
    where = {"func": lambda: "importResize", "code": lambda: 9}
    trt.refusals = [
        SimpleNamespace(node=lambda: 6, desc=lambda: "no antialiasing", **where),
        SimpleNamespace(node=lambda: -1, desc=lambda: "no such opset", **where),
    ]
    with pytest.raises(EngineError) as caught:
        nvinfer.build(trt, ask(), strongly_typed=False)
    node = tiny_unet().graph.node[6]
    assert f"node {node.name} ({node.op_type}): no antialiasing [importResize]" in caught.value.problem
    assert "the model: no such opset" in caught.value.problem


def test_a_build_given_up_says_why(trt, ask):
    trt.plan, trt.says = None, [(ILogger.ERROR, "[a.cpp::b::3] Error Code 10: no implementation for node x")]
    with pytest.raises(EngineError, match="cannot build the engine: Error Code 10: no implementation") as caught:
        nvinfer.build(trt, ask(), strongly_typed=False)
    assert "without" not in caught.value.fix
    with pytest.raises(EngineError) as caught:
        nvinfer.build(trt, ask(config=EngineConfig(tf32=True, workspace_mib=8)), strongly_typed=False)
    assert "or without engine.workspace_mib and engine.tf32" in caught.value.fix


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            [(ILogger.ERROR, "[a.cpp::b::1] Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)")],
            "4,096 MiB",
        ),
        ([(ILogger.ERROR, "Requested amount of GPU memory (1048576 bytes) could not be allocated.")], "1 MiB"),
        (
            [
                (ILogger.WARNING, "Skipping tactic 3 due to insufficient memory on requested size of 2097152 detected"),
                (ILogger.WARNING, "Skipping tactic 4 due to insufficient memory on requested size of 3145728 detected"),
                (ILogger.ERROR, "Could not find any implementation for node conv"),
            ],
            "3 MiB",
        ),
        ([(ILogger.ERROR, "Cuda Runtime (out of memory)")], "more GPU memory"),
    ],
)
def test_lack_of_memory_says_what_was_needed(monkeypatch, trt, ask, said, wanted):
    monkeypatch.setattr(cuda, "free_memory", lambda: (1 << 30, 8 << 30))
    trt.plan, trt.says = None, said
    with pytest.raises(EngineError, match="cannot build the engine") as caught:
        nvinfer.build(trt, ask(), strongly_typed=False)
    assert caught.value.expected.startswith(wanted)
    assert caught.value.got == "1,024 MiB free of 8,192"
    assert "engine.workspace_mib" in caught.value.fix


def test_what_tensorrt_recovered_from_is_logged_and_noted(trt, ask, caplog):
    trt.says = [(ILogger.ERROR, "[a.cpp::b::3] Myelin error")]
    result = nvinfer.build(trt, ask(), strongly_typed=False)
    assert result.notes == ("TensorRT reported and recovered from: Myelin error",)
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", result.notes[0])]


def test_a_refused_node_comes_with_a_way_out(trt, ask, tmp_path):
    antialiased = tiny_unet(antialias=True)
    place = next(i for i, node in enumerate(antialiased.graph.node) if node.name == "up1")
    where = {"func": lambda: "importResize", "code": lambda: 9}
    trt.refusals = [SimpleNamespace(node=lambda: place, desc=lambda: "no antialiasing", **where)]
    with pytest.raises(EngineError, match=r"node up1 \(Resize\)") as caught:
        nvinfer.build(trt, ask(model=save(antialiased, tmp_path / "antialiased.onnx")), strongly_typed=False)
    assert caught.value.fix.startswith("up1: interpolate with antialias=False")


def test_no_builder_on_this_machine(trt, ask):
    def refuse(_):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = refuse
    with pytest.raises(UnsupportedError, match="cannot start on this machine"):
        nvinfer.build(trt, ask(), strongly_typed=False)


OWNER = "TensorRT 8.6.0, a GPU"


def timed(trt, request, owner=OWNER):
    return nvinfer.build(trt, request, strongly_typed=False, timing_owner=owner)


def test_timing_cache_cold_then_warm(trt, ask, tmp_path):
    path = tmp_path / "folder" / "timing.cache"
    assert timed(trt, ask(timing_cache=path)).timing_cache == "cold"
    assert path.read_bytes().endswith(b"\n+")
    assert timed(trt, ask(timing_cache=path)).timing_cache == "warm"
    assert path.read_bytes().endswith(b"\n++")


@pytest.mark.parametrize(
    "damage", [lambda data: data + b"?", lambda data: data[:-1], lambda data: b"damaged", lambda _: b""]
)
def test_damaged_timing_cache_is_set_aside(trt, ask, tmp_path, damage):
    path = tmp_path / "timing.cache"
    timed(trt, ask(timing_cache=path))
    path.write_bytes(damaged := damage(path.read_bytes()))
    result = timed(trt, ask(timing_cache=path))
    assert result.timing_cache == "cold"
    assert "set aside as timing.cache.damaged" in result.notes[0]
    assert (tmp_path / "timing.cache.damaged").read_bytes() == damaged
    assert timed(trt, ask(timing_cache=path)).timing_cache == "warm"


def test_timing_cache_of_another_gpu_is_set_aside(trt, ask, tmp_path):
    path = tmp_path / "timing.cache"
    timed(trt, ask(timing_cache=path))
    assert timed(trt, ask(timing_cache=path), "TensorRT 8.6.0, another GPU").timing_cache == "cold"
    assert (tmp_path / "timing.cache.damaged").exists()


def test_a_timing_cache_that_tensorrt_refuses_is_set_aside(trt, ask, tmp_path):
    path = tmp_path / "timing.cache"
    timed(trt, ask(timing_cache=path))
    trt.config.refuses_timing = True
    result = timed(trt, ask(timing_cache=path))
    assert result.timing_cache == "cold"
    assert any("TensorRT refuses it" in note for note in result.notes)


def test_what_tensorrt_says_of_a_cache_that_it_takes_is_noted(trt, ask, tmp_path):
    path = tmp_path / "timing.cache"
    timed(trt, ask(timing_cache=path))
    trt.config.complains_of_timing = True
    result = timed(trt, ask(timing_cache=path))
    assert result.timing_cache == "warm"
    assert any("The timing cache will not be used" in note for note in result.notes)


def test_a_timing_cache_that_cannot_be_kept_costs_a_note(trt, ask, tmp_path):
    (tmp_path / "file").write_text("")
    result = timed(trt, ask(timing_cache=tmp_path / "file" / "timing.cache"))
    assert result.plan == b"plan"
    assert any("timing cache" in note for note in result.notes)


def test_a_flag_that_the_library_lacks(trt):
    with pytest.raises(EngineError, match="no builder flag INT8") as caught:
        nvinfer.set_flag(trt, trt.config, "INT8")
    assert "route: explicit" in caught.value.fix


def profile(*batches):
    return Profile(*((batch, 3, 32, 32) for batch in batches))


class TestProfiles:
    @pytest.fixture
    def trt(self, request):
        return Library(request, shape=(-1, 3, 32, 32))

    def test_reaches_the_builder(self, trt, ask):
        result = nvinfer.build(trt, ask(profiles={"image": profile(1, 2, 4)}), strongly_typed=False)
        assert trt.profile.sizes == ("image", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
        assert result.inputs[0].shape == ("image_0", 3, 32, 32)

    def test_missing(self, trt, ask):
        with pytest.raises(EngineError, match="input image has dynamic axes and no profile"):
            nvinfer.build(trt, ask(), strongly_typed=False)

    def test_against_fixed_sizes(self, trt, ask):
        wrong = Profile((1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 64, 32))
        with pytest.raises(EngineError, match="does not fit its shape") as caught:
            nvinfer.build(trt, ask(profiles={"image": wrong}), strongly_typed=False)
        assert caught.value.got == "(1, 3, 64, 32)"

    def test_refused_by_the_library(self, trt, ask):
        trt.config.refused = True
        with pytest.raises(EngineError, match="refuses the profile of image"):
            nvinfer.build(trt, ask(profiles={"image": profile(1, 2, 4)}), strongly_typed=False)
