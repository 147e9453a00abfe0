"""What goes into a Triton model repository, and what its check finds, with no server."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.artifacts import (
    Device,
    EngineManifest,
    ModelCard,
    Profile,
    ServedModel,
    TensorSpec,
    sha256_bytes,
    sha256_file,
    to_json,
)
from pipeline.config import ClassConfig, PreprocessingConfig
from pipeline.errors import BuildFolderError, ConfigError, PipelineError, UnsupportedError
from pipeline.graph.io import save_model, write_card
from pipeline.graph.promises import write_multiples
from pipeline.inspection import inspect_file
from pipeline.serving.repository import CONFIG, check_model, versions
from pipeline.stages.package import Judged, package_archive, package_triton
from tests.onnx_unet import clean_unet, drawn_unet

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'unet-trt[serve]'")

CLASSES = tuple(ClassConfig(name=name, colour=(9, 9, 9)) for name in ("sky", "road", "car", "tree"))
CARD = ModelCard("street", PreprocessingConfig(height=32, width=48), CLASSES)
PLAN = b"an engine"


def judged(folder: Path, shape: tuple[int | str, ...], *, seed: int = 0, most: int | None = None) -> Judged:
    """The typed graph of a UNet with drawn weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = clean_unet(drawn_unet(seed), shape)
    write_card(model, CARD)
    write_multiples(model, {"h": 16, "width": 16})
    save_model(model, folder / "model.onnx")
    (folder / "report.json").write_text("{}")
    return Judged(CARD, "fp32", folder, None, folder / "report.json", most)


def with_engine(one: Judged, backend: str, shape: tuple[int | str, ...], profile: Profile | None = None) -> Judged:
    """The same beside an engine, which only Triton on a GPU could load: its manifest says what it is."""
    manifest = EngineManifest(
        engine_sha256=sha256_bytes(PLAN),
        onnx_sha256="0" * 64,
        cache_sha256=None,
        precision="fp16",
        route="implicit",
        backend=backend,
        backend_version="10.3.0",
        device=Device("NVIDIA L4", "8.9", "550.90"),
        target_capabilities=(),
        inputs=(TensorSpec("image", shape, "float32"),),
        outputs=(TensorSpec("labels", (shape[0], *shape[2:]), "uint8"),),
        profiles={"image": profile} if profile else {},
        card=CARD,
        build_seconds=1.0,
        timing_cache="none",
        created="2026-11-21T00:00:00+00:00",
    )
    one.plan.write_bytes(PLAN)
    (one.engine / "manifest.json").write_bytes(to_json(manifest))
    return dataclasses.replace(one, precision="fp16")


def test_onnx_with_free_sizes(tmp_path: Path) -> None:
    one = judged(tmp_path / "engine", ("n", 3, "h", "w"), most=6)
    folder = package_triton(one, tmp_path / "repository", instances=2)
    assert folder == tmp_path / "repository" / "street_fp32" / "1"
    config = check_model(folder.parent)
    assert (config.platform, config.max_batch_size, config.default_model_filename) == (
        "onnxruntime_onnx",
        6,
        "model.onnx",
    )
    (source,), (result,) = config.input, config.output
    assert (source.name, source.data_type, list(source.dims)) == ("image", 11, [3, -1, -1])
    assert (result.name, result.data_type, list(result.dims)) == ("logits", 11, [4, -1, -1])
    assert result.label_filename == "labels.txt"
    assert (folder.parent / "labels.txt").read_text() == "sky\nroad\ncar\ntree\n"
    (group,) = config.instance_group
    assert (group.count, group.KIND_AUTO) == (2, group.kind)
    assert config.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["image"].dims)) for w in config.model_warmup] == [
        (1, [3, 32, 48]),
        (6, [3, 32, 48]),
    ]
    served = served_model(config)
    assert served == ServedModel(CARD, "fp32", {}, {"height": 16, "width": 16}, True)
    assert config.parameters["unet_trt.sha256.1"].string_value == sha256_file(folder / "model.onnx")


def served_model(config: object) -> ServedModel:
    from pydantic import TypeAdapter

    text = config.parameters["unet_trt.model"].string_value  # type: ignore[attr-defined]
    return TypeAdapter(ServedModel).validate_json(text)


def test_a_fixed_batch_is_left_alone(tmp_path: Path) -> None:
    folder = package_triton(judged(tmp_path / "engine", (2, 3, 32, 48)), tmp_path / "repository", platform="python")
    config = check_model(folder.parent)
    facts = inspect_file(folder.parent / CONFIG)
    assert (facts["runs on"], facts["versions"], facts["inputs"]) == ("python", [1], {"image": "FP32 [2, 3, 32, 48]"})
    assert (config.backend, config.max_batch_size, list(config.input[0].dims)) == ("python", 0, [2, 3, 32, 48])
    assert not config.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["image"].dims)) for w in config.model_warmup] == [(1, [2, 3, 32, 48])]
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.py"]


def test_an_engine_of_tensorrt(tmp_path: Path) -> None:
    shape = ("n", 3, 32, 48)
    profile = Profile((1, 3, 32, 48), (4, 3, 32, 48), (5, 3, 32, 48))
    one = with_engine(judged(tmp_path / "engine", shape), "tensorrt", shape, profile)
    folder = package_triton(one, tmp_path / "repository", name="fast")
    config = check_model(folder.parent)
    assert (config.name, config.platform, config.max_batch_size) == ("fast", "tensorrt_plan", 5)
    assert (config.output[0].data_type, list(config.output[0].dims)) == (2, [32, 48])
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert config.optimization.cuda.graphs
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.plan"]
    assert served_model(config).profiles == {"image": profile}


def test_other_libraries_engines_are_none_for_triton(tmp_path: Path) -> None:
    shape = (1, 3, 32, 48)
    one = with_engine(judged(tmp_path / "engine", shape), "tensorrt-rtx", shape)
    assert check_model(package_triton(one, tmp_path / "repository").parent).platform == "onnxruntime_onnx"
    with pytest.raises(UnsupportedError, match="no engine that Triton runs"):
        package_triton(one, tmp_path / "repository", platform="tensorrt_plan")
    one.typed.unlink()
    with pytest.raises(UnsupportedError, match="no typed graph"):
        package_triton(one, tmp_path / "repository")


def test_versions(tmp_path: Path) -> None:
    repository, shape = tmp_path / "repository", ("n", 3, 32, 48)
    first = package_triton(judged(tmp_path / "one", shape), repository)
    kept = first / "model.onnx", (first / "model.onnx").read_bytes()
    second = package_triton(judged(tmp_path / "two", shape, seed=1), repository)
    assert second.name == "2"
    config = check_model(first.parent)
    assert {key for key in config.parameters if "sha256" in key} == {"unet_trt.sha256.1", "unet_trt.sha256.2"}
    with pytest.raises(BuildFolderError, match=r"version 1 .* exists"):
        package_triton(judged(tmp_path / "three", shape, seed=2), repository, version=1)
    assert kept[0].read_bytes() == kept[1]
    package_triton(judged(tmp_path / "three", shape, seed=2), repository, version=1, overwrite=True)
    assert kept[0].read_bytes() != kept[1]
    before = contents(repository)
    with pytest.raises(BuildFolderError, match=r"versions with another config\.pbtxt") as caught:
        package_triton(judged(tmp_path / "four", (1, 3, 32, 48)), repository)
    assert "max_batch_size" in caught.value.expected
    assert contents(repository) == before, "something of a refused version was left"
    check_model(first.parent)
    assert versions(first.parent) == [1, 2]


def test_a_server_that_polls_sees_whole_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, seen = tmp_path / "repository", []
    package_triton(judged(tmp_path / "one", (1, 3, 32, 48)), repository, name="first")

    def check(model: Path) -> object:
        seen.append([sorted(path.name for path in repository.rglob("*"))])
        return check_model(model)

    monkeypatch.setattr("pipeline.serving.repository.check_model", check)
    package_triton(judged(tmp_path / "two", (1, 3, 32, 48)), repository, name="second")
    assert seen == [[["1", "config.pbtxt", "first", "labels.txt", "model.onnx"]]]
    assert versions(repository / "second") == [1]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name: "logits"', 'name: "scores"', "outputs of version 1"),
        ("dims: 48", "dims: 64", "inputs of version 1"),
        ("TYPE_FP32", "TYPE_FP16", "inputs of version 1"),
        ("dims: 1", "dims: 1\nmax_batch_size: 4", "max_batch_size"),
        ('name: "street_fp32"', 'name: "street"', "its name"),
        ('platform: "onnxruntime_onnx"', 'platform: "tensorflow"', "platform"),
        ("input {", "inputs {", "no configuration of Triton's"),
        ("unet_trt.sha256.1", "unet_trt.sha256.9", "model.onnx of version 1"),
        ("unet_trt.model", "some.model", "unet_trt.model"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, before: str, after: str, message: str) -> None:
    model = package_triton(judged(tmp_path / "engine", (1, 3, 32, 48)), tmp_path / "repository").parent
    text = (model / CONFIG).read_text()
    assert before in text
    (model / CONFIG).write_text(text.replace(before, after, 1))
    with pytest.raises(BuildFolderError, match=message):
        inspect_file(model / CONFIG)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = package_triton(judged(tmp_path / "engine", (1, 3, 32, 48)), tmp_path / "repository")
    (folder.parent / "labels.txt").write_text("sky\n")
    with pytest.raises(BuildFolderError, match=r"labels\.txt"):
        check_model(folder.parent)
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(BuildFolderError, match=r"model\.onnx of version 1"):
        check_model(folder.parent)
    (folder / "model.onnx").unlink()
    with pytest.raises(BuildFolderError, match="version 1"):
        check_model(folder.parent)


def test_bad_input(tmp_path: Path) -> None:
    one = judged(tmp_path / "engine", (1, 3, 32, 48))
    for arguments in ({"name": "a/b"}, {"name": ".."}, {"version": 0}, {"instances": 0}):
        with pytest.raises(ConfigError):
            package_triton(one, tmp_path / "repository", **arguments)  # type: ignore[arg-type]
    (tmp_path / "repository" / "street_fp32").mkdir(parents=True)
    with pytest.raises(BuildFolderError, match=r"no config\.pbtxt|has no config"):
        package_triton(one, tmp_path / "repository")
    (tmp_path / "file").touch()
    with pytest.raises(BuildFolderError, match="cannot write"):
        package_triton(one, tmp_path / "file")
    with pytest.raises(ConfigError, match="no name of an archive"):
        package_archive(one, tmp_path / "archive.tar")
    package_archive(one, tmp_path / "street.zip")
    with pytest.raises(BuildFolderError, match="exists already"):
        package_archive(one, tmp_path / "street.zip")
    tensors = dataclasses.replace(one, card=dataclasses.replace(CARD, task="tensors"))
    with pytest.raises(PipelineError, match="writes masks"):
        package_archive(tensors, tmp_path / "tensors.zip")
    assert not list(tmp_path.rglob("*.partial"))
