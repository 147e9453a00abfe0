"""One precision against FP32 on ONNX Runtime and against the labels, on real images."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CompareFunc, RunResults
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from pipeline.artifacts import ModelCard, TensorSpec, output_kind, to_json
from pipeline.backends.base import Runner, feed_image
from pipeline.config import Tolerance, ValidateConfig
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.inputs import THREADS, on_threads
from pipeline.data.pictures import mask_png, overlay_png, palette
from pipeline.data.preprocessing import Pixels
from pipeline.errors import DataError, ModelError
from pipeline.judging import Judge, MeasuredImage
from pipeline.progress import track
from pipeline.reports import Candidate, ValidationReport
from pipeline.values import MeasuredValues, TensorJudge

if TYPE_CHECKING:
    from pipeline.fleet.fleet import Fleet

log = logging.getLogger(__name__)
REFERENCE = "onnxruntime-fp32"
# Of outputs that wait to be compared.
WAITING_BYTES = 1 << 28

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
    fleet: Fleet | None = None,
) -> ValidationReport:
    """Run both on every image and write ``report.json``, masks, overlays and Polygraphy's run results to ``folder``.

    Logits and probabilities are compared value by value, and as masks. Labels are compared as masks alone: the
    difference of two class ids means nothing. With the card's ``task`` tensors, values alone are compared.

    Args:
        reference: FP32 on ONNX Runtime.
        candidate: the engine, or its typed graph on ONNX Runtime.
        dataset: images with labels, or without (then only agreement with FP32 is judged).
        reference_path: where the reference's ONNX file lies, seen from ``folder``; for the printed command.
        fleet: run both there, where they are opened anew; the figures are the same to the last bit, since images are
            measured one by one and counted here, in the dataset's order.

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
    comparison = _Comparison(reference, candidate, what, dataset, card, config)
    judge = comparison.judge
    saved: list[tuple[dict[str, Any], RunResults]] = []
    pictures: list[str] = []
    for index, image in enumerate(_compared(comparison, f"validating {what.precision}", fleet)):
        if index == 0:
            judge.require_labels(image.labelled)
        judge.count(image.measured)  # type: ignore[arg-type]
        if image.run is not None:
            saved.append(image.run)
        if image.drawn is not None:
            pictures += _draw(*image.drawn, card, folder)
    _save_runs(saved, folder)
    repeat = () if comparison.compare is None else _commands(what, judge.tolerance, reference_path)
    report = judge.report(what, repeat, tuple(pictures), started)
    (folder / "report.json").write_bytes(to_json(report))
    return report


@dataclass(frozen=True)
class _Compared:
    """One image, run on both sides.

    Attributes:
        drawn: of the first images: what is drawn, with the candidate's mask.
        run: what was fed, and both sides' outputs, of the first images, which are saved.
    """

    measured: MeasuredImage | MeasuredValues
    labelled: bool
    drawn: tuple[Sample, Pixels] | None
    run: tuple[dict[str, Any], RunResults] | None


class _Comparison:
    """Runs both sides on images of a dataset, by their places in it. Pickled where its runners can be."""

    def __init__(
        self,
        reference: Runner,
        candidate: Runner,
        what: Candidate,
        dataset: Dataset,
        card: ModelCard,
        config: ValidateConfig,
    ) -> None:
        self._given = reference, candidate, what, dataset, card, config
        self.source, self.dataset, self.card, self.config = candidate.inputs[0], dataset, card, config
        kind, has_masks = output_kind(reference.outputs[0]), card.task == "segmentation"
        self.judge = Judge(card, config, what.precision, kind) if has_masks else TensorJudge(config, what.precision)
        self.compare = None
        if not has_masks or kind != "labels":
            t = self.judge.tolerance
            self.compare = CompareFunc.simple(
                check_error_stat=t.statistic, rtol=t.rtol, atol=t.atol, error_quantile=t.quantile
            )
        ours = _Adapter(candidate, f"{what.ran.replace(' ', '-')}-{what.precision}")
        self.runners = [ours, _Adapter(reference, REFERENCE)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Comparison, self._given

    def __call__(self, places: Sequence[int], again: bool = False) -> list[_Compared]:
        with _polygraphy():
            return [self.compared(place, *self.run(place)) for place in places]

    def run(self, place: int) -> tuple[Sample, dict[str, Any], RunResults]:
        """An image, what is fed of it, and what both sides give, which is theirs no longer."""
        sample = self.dataset[place]
        feed = feed_image(self.source, sample.image, self.card.preprocessing, f"the image {sample.name}")
        return sample, feed, Comparator.run(self.runners, data_loader=[feed])

    def compared(self, place: int, sample: Sample, feed: dict[str, Any], results: RunResults) -> _Compared:
        """What comes of it; may be called on several threads."""
        config = self.config
        ours, theirs = (dict(iterations[0].items()) for _, iterations in results.items())
        within = bool(Comparator.compare_accuracy(results, compare_func=self.compare)) if self.compare else None
        measured, mask = self.judge.measure(sample, ours, theirs, within)
        return _Compared(
            measured,
            sample.label is not None,
            (sample, mask) if mask is not None and place < config.pictures else None,
            (feed, results) if place < config.saved_runs else None,
        )


def _compared(comparison: _Comparison, what: str, fleet: Fleet | None) -> Iterator[_Compared]:
    """The dataset's images, in order."""
    places = range(len(comparison.dataset))
    if fleet is None:
        with _polygraphy():
            yield from _overlapped(comparison, track(places, what, len(places)))
    else:
        for part in fleet.in_order(comparison, places, what, lambda place: comparison.dataset.names[place]):
            yield from part


def _overlapped(comparison: _Comparison, places: Iterable[int]) -> Iterator[_Compared]:
    """Images run one after the other, while those before are compared on threads."""

    def work() -> Iterator[tuple[int, Callable[[], _Compared]]]:
        for place in places:
            sample, feed, results = comparison.run(place)
            size = sum(array.nbytes for _, (outputs,) in results.items() for array in outputs.values())
            yield size, partial(comparison.compared, place, sample, feed, results)

    return on_threads(work(), THREADS, THREADS, WAITING_BYTES)


def _forms(specs: Sequence[TensorSpec]) -> list[tuple[str, str, int]]:
    return [(spec.name, spec.dtype, len(spec.shape)) for spec in specs]


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
