"""One precision against FP32 on ONNX Runtime and against the labels, on real images."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CompareFunc, RunResults
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from pipeline.artifacts import ModelCard, TensorSpec, to_json
from pipeline.backends.base import Runner, feed_image
from pipeline.config import Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.pictures import mask_png, overlay_png, palette
from pipeline.data.preprocessing import Pixels
from pipeline.errors import DataError, ModelError
from pipeline.graph.deployment import output_kind
from pipeline.judging import Judge
from pipeline.progress import track
from pipeline.reports import Candidate, ValidationReport
from pipeline.values import TensorJudge

log = logging.getLogger(__name__)
REFERENCE = "onnxruntime-fp32"

DATA_LOADER = '''"""The preprocessed images of this comparison, for `polygraphy run --data-loader-script`."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    yield from load_json(str(Path(__file__).parent / "inputs.json"))
'''


class _Adapter(BaseRunner):  # type: ignore[misc]
    """A runner of ours, already loaded, as Polygraphy's Comparator wants it."""

    def __init__(self, runner: Runner, name: str) -> None:
        super().__init__(name=name, prefix=name)
        self.runner = runner

    def activate_impl(self) -> None: ...

    def deactivate_impl(self) -> None: ...

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.runner.inputs:
            metadata.add(spec.name, np.dtype(spec.dtype), spec.shape)
        return metadata

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        started = time.perf_counter()
        # Polygraphy hashes and stores arrays, and takes contiguous ones only.
        outputs = {name: np.ascontiguousarray(array) for name, array in self.runner(feed_dict).items()}
        self.inference_time = time.perf_counter() - started
        return outputs


@contextlib.contextmanager
def _polygraphy() -> Iterator[None]:
    """Polygraphy quiet, and its errors as the project's own."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except PolygraphyException as error:
        raise ModelError(f"Polygraphy cannot compare the outputs: {error}") from error


def validate(
    reference: Runner,
    candidate: Runner,
    what: Candidate,
    dataset: Dataset,
    card: ModelCard,
    config: ValidateConfig,
    folder: Path,
    reference_path: str = "model.onnx",
) -> ValidationReport:
    """Run both on every image and write ``report.json``, masks, overlays and Polygraphy's run results to ``folder``.

    Logits and probabilities are compared value by value, and as masks. Labels are compared as masks alone: the
    difference of two class ids means nothing. With the card's ``task`` tensors, values alone are compared.

    Args:
        reference: FP32 on ONNX Runtime.
        candidate: the engine, or its typed graph on ONNX Runtime.
        dataset: images with labels, or without (then only agreement with FP32 is judged).
        reference_path: where the reference's ONNX file lies, seen from ``folder``; for the printed command.

    Raises:
        DataError: no image.
        ModelError: the two take different inputs, or give different outputs or shapes.
        ConfigError: the config names a budget that needs labels, and there are none.
    """
    started = time.perf_counter()
    if not len(dataset):
        raise DataError("there is no image to validate on", expected="at least one validation image")
    if _forms(candidate.inputs) != _forms(reference.inputs):
        raise ModelError(
            "the candidate's inputs are not the reference's",
            expected=", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in reference.inputs),
            got=", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in candidate.inputs),
            fix="validate the engine with the ONNX file it was built from",
        )
    kind = output_kind(reference.outputs[0])
    has_masks = card.task == "segmentation"
    judge = Judge(card, config, what.precision, kind) if has_masks else TensorJudge(config, what.precision)
    masks_only = has_masks and kind == "labels"
    compare = None if masks_only else _comparison(judge.tolerance)
    runners = [_Adapter(candidate, f"{what.ran.replace(' ', '-')}-{what.precision}"), _Adapter(reference, REFERENCE)]
    saved: list[tuple[dict[str, Any], RunResults]] = []
    pictures: list[str] = []
    for index, sample in enumerate(track(dataset, f"validating {what.precision}", len(dataset))):
        feed = feed_image(candidate.inputs[0], sample.image, card.preprocessing, f"the image {sample.name}")
        if index == 0:
            judge.require_labels(sample.label is not None)
        with _polygraphy():
            results = Comparator.run(runners, data_loader=[feed])
        ours, theirs = (dict(iterations[0].items()) for _, iterations in results.items())
        mask = judge.add(sample, ours, theirs, compare(results) if compare else None)
        if index < config.saved_runs:
            saved.append((feed, results))
        if mask is not None and index < config.pictures:
            pictures += _draw(sample, mask, card, folder)
    _save_runs(saved, folder)
    repeat = () if masks_only else _commands(what, judge.tolerance, reference_path)
    report = judge.report(what, repeat, tuple(pictures), started)
    (folder / "report.json").write_bytes(to_json(report))
    return report


def _forms(specs: Sequence[TensorSpec]) -> list[tuple[str, str, int]]:
    return [(spec.name, spec.dtype, len(spec.shape)) for spec in specs]


def _comparison(tolerance: Tolerance) -> Callable[[RunResults], bool]:
    """Whether Polygraphy finds every output of one image within the tolerance."""
    t = tolerance
    compare = CompareFunc.simple(check_error_stat=t.statistic, rtol=t.rtol, atol=t.atol, error_quantile=t.quantile)

    def within(results: RunResults) -> bool:
        with _polygraphy():
            return bool(Comparator.compare_accuracy(results, compare_func=compare))

    return within


def _draw(sample: Sample, mask: Pixels, card: ModelCard, folder: Path) -> list[str]:
    """Mask, overlay, and what they belong to: the image and its label map."""
    colours = palette(card.classes, card.void)
    channels = card.preprocessing.channels
    files = {
        f"masks/{sample.name}.png": mask_png(mask, colours),
        f"overlays/{sample.name}.png": overlay_png(sample.image, mask, colours, channels),
        f"images/{sample.name}.png": overlay_png(sample.image, mask, colours, channels, strength=0),
    }
    if sample.label is not None:
        files[f"labels/{sample.name}.png"] = mask_png(sample.label, colours)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return list(files)


def _save_runs(saved: list[tuple[dict[str, Any], RunResults]], folder: Path) -> None:
    if not saved:
        return
    with _polygraphy():
        save_json([feed for feed, _ in saved], str(folder / "inputs.json"))
        for index, file in enumerate(("candidate.json", "reference.json")):
            runs = [list(results.items())[index] for _, results in saved]
            RunResults([(runs[0][0], [iterations[0] for _, iterations in runs])]).save(str(folder / file))
    (folder / "data_loader.py").write_text(DATA_LOADER, encoding="utf-8")


def _commands(what: Candidate, tolerance: Tolerance, reference_path: str) -> tuple[str, ...]:
    """``polygraphy run`` lines; the loaded results are the second, so the reference of Polygraphy's relative error."""
    t = tolerance
    bounds = ["--atol", f"{t.atol:g}", "--rtol", f"{t.rtol:g}", "--check-error-stat", t.statistic]
    bounds += ["--error-quantile", f"{t.quantile:g}"] if t.statistic == "quantile" else []
    loader = ["--data-loader-script", "data_loader.py"]
    again = ["polygraphy", "run", reference_path, "--onnxrt", *loader, "--load-outputs", "candidate.json", *bounds]
    commands = [shlex.join(again)]
    if not what.emulated:
        engine = f"../../engine/{what.precision}/model.engine"
        run = ["polygraphy", "run", engine, "--model-type", "engine", "--trt", *loader]
        commands.append(shlex.join([*run, "--load-outputs", "reference.json", *bounds]))
    return tuple(commands)
