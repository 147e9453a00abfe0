"""Pruning: half of the weights zero, and a network that still answers alike; on the shipped UNet for cells."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from PIL import Image

from pipeline.artifacts import from_json
from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.calibration.table import CalibrationTable
from pipeline.config import EngineConfig, load_config
from pipeline.data.dataset import Dataset, Sample, image_folder
from pipeline.data.preprocessing import preprocess
from pipeline.data.synthetic import draw_cells
from pipeline.errors import BuildFolderError, CheckFailed, DataError, ModelError, UnsupportedError
from pipeline.graph.half import to_half
from pipeline.graph.io import load_model, read_card, save_model, sha256_model, write_card
from pipeline.graph.placement import activation_tensors
from pipeline.graph.shapes import with_weights
from pipeline.graph.sparsity import is_sparse, prunable
from pipeline.pruning import prune as prune_graph
from pipeline.run import Run
from pipeline.stages.engine import build_engine
from pipeline.stages.prune import PruningReport, prune
from tests.conftest import Result
from tests.integration.test_bad_input import fails, leftovers
from tests.unit.graph.test_sparsity import chain

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

Command = Callable[..., Result]
STEPS, BATCH, IMAGES, SIZE = 80, 2, 24, 96
ROOT = Path(__file__).parents[2]
SPEC = load_config(ROOT / "configs" / "cells.yaml").preprocessing.model_copy(update={"height": SIZE, "width": SIZE})
SPEC_OF_ANY = SPEC.model_copy(update={"height": None, "width": None, "resize": "none"})
GRAPHS = EngineConfig(backend="onnxruntime", sparsity=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruning")


@pytest.fixture(scope="module")
def clean(folder: Path) -> Path:
    """The shipped, trained UNet for cells, for small images."""
    sizes = [*(f"preprocessing.{side}={SIZE}" for side in ("height", "width")), "preprocessing.resize=stretch"]
    config = load_config(ROOT / "configs" / "cells.yaml", [*sizes, "data.validation_images=2"])
    with Run(config, folder / "build") as run:
        return run.clean()


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    made = folder / "images"
    made.mkdir()
    for seed in range(IMAGES):
        Image.fromarray(draw_cells(seed, SIZE)[0]).save(made / f"{seed:03d}.png")
    return made


@pytest.fixture(scope="module")
def dataset(images: Path) -> Dataset:
    return image_folder(images, "grey")


def pruned_to(clean: Path, dataset: Dataset, target: Path, steps: int = STEPS) -> PruningReport:
    return prune(clean, dataset, SPEC, target, target.with_suffix(".json"), steps=steps, batch=BATCH)


@pytest.fixture(scope="module")
def made(clean: Path, dataset: Dataset, folder: Path) -> tuple[Path, PruningReport]:
    return folder / "pruned.onnx", pruned_to(clean, dataset, folder / "pruned.onnx")


def classes(model: Path) -> NDArray[np.int64]:
    """Of images that neither taught nor judged."""
    with OnnxRuntimeRunner(model) as runner:
        shown = [preprocess(draw_cells(seed, SIZE)[0][..., np.newaxis], SPEC)[np.newaxis] for seed in range(50, 56)]
        return np.concatenate([next(iter(runner({"image": image}).values())).argmax(1) for image in shown])


def ranges(model: Path) -> CalibrationTable:
    """Of a calibration that nobody made."""
    return CalibrationTable("entropy", dict.fromkeys(activation_tensors(load_model(model)), 4.0))


def weights(model: ModelProto) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_every_convolution_that_sparse_kernels_run_is_sparse(clean: Path, made: tuple[Path, PruningReport]) -> None:
    before, after = load_model(clean), load_model(made[0])
    nodes = {node.name: node for node in prunable(before)}
    assert len(nodes) > 5
    assert set(made[1].result.convolutions) == set(nodes)
    dense, sparse = weights(before), weights(after)
    assert all(is_sparse(sparse[node.input[1]]) for node in nodes.values())
    others = [node for node in before.graph.node if node.op_type == "Conv" and node.name not in nodes]
    assert others
    assert all((sparse[node.input[1]] != 0).mean() > 0.99 for node in others)
    zeros = sum((sparse[node.input[1]] == 0).sum() for node in nodes.values())
    assert made[1].result.weights[0] // 2 == pytest.approx(zeros, rel=0.01)
    assert made[1].result.weights[1] == sum(dense[n.input[1]].size for n in before.graph.node if n.op_type == "Conv")


def test_the_pruned_network_answers_as_the_whole_one(clean: Path, made: tuple[Path, PruningReport]) -> None:
    result = made[1].result
    assert result.held_out == 6
    assert result.loss_after < result.loss_pruned / 2
    assert result.agreement_pruned is not None
    assert result.agreement_after is not None
    assert result.agreement_after > result.agreement_pruned + 0.05
    found = (classes(made[0]) == classes(clean)).mean()
    assert found > 0.85
    assert found == pytest.approx(result.agreement_after, abs=0.05)


def test_the_graph_is_otherwise_the_same(clean: Path, made: tuple[Path, PruningReport]) -> None:
    before, after = load_model(clean), load_model(made[0])
    assert list(before.graph.node) == list(after.graph.node)
    assert read_card(before) == read_card(after)
    assert made[1] == from_json(PruningReport, made[0].with_suffix(".json"))
    assert (made[1].clean_sha256, made[1].pruned_sha256) == (sha256_model(clean), sha256_model(made[0]))


def test_pruning_twice_gives_the_same(clean: Path, dataset: Dataset, tmp_path: Path) -> None:
    first, second = (pruned_to(clean, dataset, tmp_path / name, 3) for name in ("a.onnx", "b.onnx"))
    assert first.pruned_sha256 == second.pruned_sha256


@pytest.mark.parametrize(("sparse", "warned"), [(False, True), (True, False)], ids=["whole", "pruned"])
def test_an_engine_says_how_many_convolutions_are_sparse(
    clean: Path,
    made: tuple[Path, PruningReport],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sparse: bool,
    warned: bool,
) -> None:
    graph = made[0] if sparse else clean
    with caplog.at_level(logging.WARNING):
        build_engine(graph, "int8", GRAPHS, ranges(graph), None, None, tmp_path / "out", None)
    count = len(made[1].result.convolutions)
    assert (f"engine.sparsity: 0 of {count} convolutions" in caplog.text) == warned


def test_rounding_keeps_the_zeros(made: tuple[Path, PruningReport], tmp_path: Path) -> None:
    build_engine(made[0], "int8", GRAPHS, ranges(made[0]), None, None, tmp_path / "out", None)
    typed = load_model(tmp_path / "out" / "model.onnx")
    producers = {node.output[0]: node for node in typed.graph.node}
    arrays = weights(typed)
    for node in typed.graph.node:
        if node.name in made[1].result.convolutions:
            back = producers[node.input[1]]
            source, scale, _ = producers[back.input[0]].input
            steps = np.rint(arrays[source] / arrays[scale][:, None, None, None])
            assert is_sparse(steps), node.name


def test_the_command(clean: Path, images: Path, tmp_path: Path, unet_trt: Command) -> None:
    target = tmp_path / "sparse.onnx"
    done = unet_trt("prune", clean, "--images", images, "-o", target, "--steps", 2, "--batch", 2)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == str(target)
    assert f"unet-trt validate {clean} --engine {target}" in done.out + done.err
    assert "weights that are zero" in done.err
    report = json.loads((tmp_path / "sparse.onnx.json").read_text())
    assert report["result"]["steps"] == 2
    judged = unet_trt("validate", clean, "--engine", target, "--images", images, "-o", tmp_path / "judged")
    assert judged.code in (0, 1), judged.err
    assert (tmp_path / "judged" / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", 0), "pruning takes no such steps"),
        (("--batch", 0), "pruning takes no such batch"),
        (("--seed", -1), "pruning takes no such seed"),
    ],
    ids=["steps", "batch", "seed"],
)
def test_impossible_options(
    clean: Path, images: Path, tmp_path: Path, unet_trt: Command, options: tuple[str, int], said: str
) -> None:
    fails(unet_trt("prune", clean, "--images", images, "-o", tmp_path / "sparse.onnx", *options), 2, said)
    assert leftovers(tmp_path) == []
    assert not list(tmp_path.glob("*.onnx*"))


def test_too_few_images(clean: Path, tmp_path: Path, unet_trt: Command) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for seed in range(3):
        Image.fromarray(draw_cells(seed, SIZE)[0]).save(few / f"{seed}.png")
    fails(
        unet_trt("prune", clean, "--images", few, "-o", tmp_path / "sparse.onnx"), 2, "3 images are too few for pruning"
    )
    assert leftovers(tmp_path) == []
    assert not list(tmp_path.glob("*.onnx*"))


def test_the_graph_itself_is_not_overwritten(clean: Path, images: Path, unet_trt: Command) -> None:
    before = clean.read_bytes()
    fails(unet_trt("prune", clean, "--images", images, "-o", clean), 2, "would overwrite what it is made from")
    assert clean.read_bytes() == before


def test_images_of_different_sizes_with_free_sizes(tmp_path: Path) -> None:
    save_model(chain(1, 32, 32, 2), tmp_path / "free.onnx")

    def load(name: str) -> Sample:
        return Sample(name, draw_cells(int(name), 32 if int(name) % 2 else 48)[0][..., np.newaxis], None)

    mixed = Dataset(tuple(str(place) for place in range(8)), load)
    with pytest.raises(DataError, match="the images of a step have different sizes") as caught:
        prune(tmp_path / "free.onnx", mixed, SPEC_OF_ANY, tmp_path / "o.onnx", tmp_path / "o.json", steps=9, batch=4)
    assert "--batch 1" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["free.onnx"]


def test_a_convolution_of_the_image_itself(tmp_path: Path) -> None:
    model = chain(32, 32, 2)
    rng = np.random.default_rng(0)
    judge, *batches = (rng.standard_normal((2, 32, 8, 8)).astype(np.float32) for _ in range(3))
    changed, result = prune_graph(model, batches, [judge], 2)
    assert result.convolutions == ("c0",)
    assert is_sparse(weights(changed)["w0"])


def test_weights_in_fp16(clean: Path, dataset: Dataset, tmp_path: Path) -> None:
    save_model(to_half(load_model(clean)), tmp_path / "half.onnx")
    with pytest.raises(ModelError, match="are not float32"):
        pruned_to(tmp_path / "half.onnx", dataset, tmp_path / "out.onnx", 1)


def test_a_network_that_gives_nan_is_told_before_it_learns() -> None:
    model = chain(3, 32, 32, 2)
    broken = with_weights(model, {"w0": np.full_like(weights(model)["w0"], np.nan)})
    batches = [np.ones((1, 3, 16, 16), np.float32)]
    with pytest.raises(CheckFailed, match="nan before it learns"):
        prune_graph(broken, batches, batches, 1)


def test_a_target_that_cannot_be_written_is_told_before_the_work(clean: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(BuildFolderError, match="cannot write"):
        pruned_to(clean, dataset, tmp_path / "missing" / "out.onnx", 1_000_000)


def test_a_network_without_masks_is_pruned_by_its_values(clean: Path, dataset: Dataset, tmp_path: Path) -> None:
    model = load_model(clean)
    card = read_card(model)
    assert card is not None
    write_card(model, replace(card, task="tensors"))
    save_model(model, tmp_path / "tensors.onnx")
    masks = pruned_to(clean, dataset, tmp_path / "masks-pruned.onnx", 2).result
    values = pruned_to(tmp_path / "tensors.onnx", dataset, tmp_path / "values-pruned.onnx", 2).result
    assert values.agreement_pruned is values.agreement_after is None
    assert masks.agreement_after is not None
    assert values.loss_pruned != pytest.approx(masks.loss_pruned, rel=0.01)


def test_a_network_without_wide_convolutions(dataset: Dataset, tmp_path: Path) -> None:
    save_model(chain(1, 8, 16, 2), tmp_path / "narrow.onnx")
    with pytest.raises(ModelError, match="no convolution whose weights can be pruned"):
        pruned_to(tmp_path / "narrow.onnx", dataset, tmp_path / "out.onnx", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["narrow.onnx"]


def test_torch_is_needed(clean: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedError, match="pruning needs torch"):
        pruned_to(clean, dataset, tmp_path / "out.onnx", 1)
    assert leftovers(tmp_path) == []
    assert not list(tmp_path.glob("*.onnx*"))
