"""The composer: runs stages in their order, and skips what is unchanged (``pipeline.record``)."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import (
    EngineManifest,
    ModelCard,
    from_json,
    sha256_file,
    sha256_json,
    to_json,
    write_atomically,
)
from pipeline.config import PATH_KEYS, QUANTIZED, Config, EngineConfig, Precision
from pipeline.data.dataset import Dataset, content_hashes, open_dataset
from pipeline.errors import CheckFailed, ConfigError, DataError, PipelineError, UnsupportedError
from pipeline.record import BuildFolder, Origin, hash_of
from pipeline.reports import Accuracy, BenchmarkReport, Candidate, PicturesReport, ValidationReport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.artifacts import TensorSpec
    from pipeline.backends.base import Runner
    from pipeline.backends.registry import Resolved
    from pipeline.calibration.table import CalibrationTable
    from pipeline.contest import Choices
    from pipeline.data.dataset import Sample
    from pipeline.drift import DriftReport
    from pipeline.fleet.fleet import Fleet
    from pipeline.graph.levels import Block
    from pipeline.mixed.report import MixReport
    from pipeline.rivals import Built
    from pipeline.stages.package import Judged
    from pipeline.stages.report import Provenance

log = logging.getLogger(__name__)
# Images on which tensors are compared layer by layer.
LAYER_IMAGES = 4


class Run:
    """One config in one build folder; use as a context manager, which holds the folder's lock.

    Every stage's method makes sure of the stages before it, and runs at most once.

    Args:
        config: with its overrides applied.
        build: the folder above ``<config>/``.
        force: make every stage anew.
        fleet: calibrate and validate there; what they give is the same, and so reused either way.
    """

    def __init__(self, config: Config, build: Path, *, force: bool = False, fleet: Fleet | None = None) -> None:
        self.config = config
        self._fleet = fleet
        self.folder = build / config.name
        data = config.data
        self.card = ModelCard(
            config.name, config.preprocessing, data.classes, data.void, data.label_values, config.task
        )
        self._kept = BuildFolder(self.folder, config.name, force=force)

    def __enter__(self) -> Run:
        self._kept.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._kept.__exit__(*exc)

    # ------------------------------------------------------------------ stages

    def export(self) -> Path:
        """The raw ONNX file."""
        from pipeline.graph.io import sha256_model
        from pipeline.networks import factory_file
        from pipeline.stages.export import export

        network, images = self.config.network, self._validation().first(self.config.export.compare_images)
        return (
            self._kept.stage(
                "export",
                lambda folder: export(network, self.config.export, self.card, [self._input(s) for s in images], folder),
                config=[self.config.export, self.card, network.factory, network.arguments],
                parents={
                    "weights": hash_of(network.weights),
                    "onnx": sha256_model(network.onnx) if network.onnx else None,
                    "factory": hash_of(factory_file(network.factory)) if network.factory else None,
                    "images": images.fingerprint(),
                },
                tools=("torch", "onnxscript") if network.onnx is None else (),
            )
            / "model.onnx"
        )

    def clean(self) -> Path:
        """The cleaned ONNX file, equalized where the config wants it."""
        from pipeline.stages.clean import clean

        raw = self.export()
        cleaned = (
            self._kept.stage(
                "clean",
                lambda folder: clean(
                    raw,
                    folder / "model.onnx",
                    folder / "report.json",
                    self.config.clean.tolerance,
                    profiles={str(axis): sizes for axis, sizes in self.config.engine.profile.items()},
                    input=self.config.clean.input,
                    output=self.config.clean.output,
                ),
                # What equalizing adds is a stage of its own.
                config=[self.config.clean.model_copy(update={"equalize": 0}), self.config.engine.profile],
                parents={"raw": hash_of(raw)},
                tools=("onnx", "onnx-graphsurgeon", "onnxruntime"),
            )
            / "model.onnx"
        )
        return self._equalized(cleaned) if self.config.clean.equalize else cleaned

    def _equalized(self, cleaned: Path) -> Path:
        from pipeline.stages.equalize import equalize

        config = self.config
        images, validation = self._calibration(config.clean.equalize), self._validation()
        return (
            self._kept.stage(
                "equalize",
                lambda folder: equalize(
                    cleaned,
                    images,
                    config.preprocessing,
                    folder / "model.onnx",
                    folder / "report.json",
                    config.clean.tolerance,
                    self._validation_hashes,
                ),
                config=[config.clean.tolerance, config.preprocessing],
                parents={
                    "clean": hash_of(cleaned),
                    "images": images.fingerprint(),
                    "validation": validation.fingerprint(),
                },
                tools=("numpy", "onnxruntime"),
            )
            / "model.onnx"
        )

    def calibrate(self) -> Path:
        """The calibration cache."""
        from pipeline.calibration.report import CACHE_FILE, REPORT_FILE
        from pipeline.stages.calibrate import calibrate, resolve_calibrator

        cleaned, config = self.clean(), self.config.calibrate
        images = self._calibration(config.images)
        validation = self._validation()
        calibrator = resolve_calibrator(config.calibrator)
        tools = ("numpy", "onnxruntime", *(() if calibrator == "cpu" else ("tensorrt",)))
        if config.refine_steps:
            # Often made by an interpreter that has torch: one that has not takes the result as it is.
            tools = ("torch",)
        return (
            self._kept.stage(
                "calibrate",
                lambda folder: calibrate(
                    cleaned,
                    images,
                    config,
                    self.config.preprocessing,
                    folder / CACHE_FILE,
                    folder / REPORT_FILE,
                    validation=self._validation_hashes,
                    engine=self.config.engine,
                    fleet=self._fleet,
                ),
                config=[config, self.config.preprocessing, *self._judged_by()],
                parents={
                    "clean": hash_of(cleaned),
                    "images": images.fingerprint(),
                    "validation": validation.fingerprint(),
                },
                tools=tools,
            )
            / CACHE_FILE
        )

    def mix(self) -> MixReport:
        """The choice of mixed precision: see ``pipeline.stages.mix``.

        Raises:
            ConfigError: the task has no masks, whose budget it would keep.
        """
        from pipeline.calibration.table import read_cache
        from pipeline.mixed.held_out import hold_out
        from pipeline.mixed.report import MixReport
        from pipeline.stages.calibrate import calibrate
        from pipeline.stages.mix import REPORT, mix

        if self.config.task != "segmentation":
            raise ConfigError(
                "mixed precision keeps a budget of masks",
                expected="task: segmentation",
                got=f"task: {self.config.task}",
                fix="use INT8, and name what stays FP16 in engine.exclude",
            )
        target, config = self._resolved("mixed"), self.config
        cleaned, cache, validation = self.clean(), self.calibrate(), self._validation()
        timed = self._runs("mixed")
        split = open_dataset(config.data, config.preprocessing, "calibration")
        chosen = split.choose(config.calibrate.images, config.calibrate.seed)
        images, rest = hold_out(split, chosen, config.mixed.images, config.mixed.seed)

        def make(folder: Path) -> None:
            ranges = cache
            if len(rest) < len(chosen):
                ranges = folder / "ranges.cache"
                report = ranges.with_name("ranges.cache.json")
                calibrate(cleaned, rest, config.calibrate, config.preprocessing, ranges, report, engine=config.engine)
            with self._choices() if timed else contextlib.nullcontext() as timer:
                mix(
                    cleaned,
                    read_cache(ranges),
                    images,
                    config,
                    self.card,
                    target.capabilities.device,
                    folder,
                    others=self._validation_hashes,
                    timer=timer,
                )

        folder = self._kept.stage(
            "mixed",
            make,
            config=[
                config.mixed,
                config.calibrate,
                config.engine,
                config.benchmark if timed else None,
                self.card,
                target.identity(),
            ],
            parents={
                "clean": hash_of(cleaned),
                "cache": hash_of(cache),
                "images": images.fingerprint(),
                "ranges": rest.fingerprint(),
                "validation": validation.fingerprint(),
            },
            tools=("onnx", "onnxruntime"),
        )
        return from_json(MixReport, folder / REPORT)

    def engine(self, precision: Precision) -> Path:
        """The folder of one engine: ``model.engine`` with its manifest, or the typed ``model.onnx`` alone."""
        return self._kept.stage(
            f"engine/{precision}",
            lambda folder: self._build(self.clean(), precision, self._settings(precision), folder),
            config=[self._settings(precision), self.card, self._resolved(precision).identity()],
            parents={"clean": hash_of(self.clean()), "cache": hash_of(self._cache(precision))},
            tools=("onnx", "onnx-graphsurgeon"),
        )

    def validate(self, precision: Precision) -> ValidationReport:
        """The verdict on one precision; a failed one is returned too, and judged again by the next run."""
        from pipeline.backends.onnxruntime import OnnxRuntimeRunner
        from pipeline.stages.validate import validate

        cleaned, engine, dataset = self.clean(), self.engine(precision), self._validation()
        what, opens = self._candidate(precision, engine)

        def opened() -> AbstractContextManager[Runner]:
            return opens() if self._fleet is None or what.emulated else self._fleet.host_runner(opens)

        def make(folder: Path) -> None:
            with OnnxRuntimeRunner(cleaned) as reference, opened() as candidate:
                validate(
                    reference,
                    candidate,
                    what,
                    dataset,
                    self.card,
                    self.config.validate_,
                    folder,
                    "../../clean/model.onnx",
                    self._fleet,
                )

        target = self._kept.stage(
            f"validate/{precision}",
            make,
            config=[
                self.config.validate_.tolerance(precision, self.config.task),
                self.config.validate_,
                self.card,
                what.ran,
                what.emulated,
            ],
            parents={"clean": hash_of(cleaned), "model": what.model_sha256, "images": dataset.fingerprint()},
            tools=("onnxruntime", "polygraphy"),
            keep=lambda folder: from_json(ValidationReport, folder / "report.json").passed,
        )
        return from_json(ValidationReport, target / "report.json")

    def layers(self, precision: Precision) -> DriftReport:
        """Every tensor of the clean graph against the engine's, where it runs here, or else against the typed graph's,
        emulated; on the first validation images.

        Raises:
            UnsupportedError: the implicit route without a GPU: it has no typed graph.
        """
        from pipeline.backends.base import feed_image
        from pipeline.drift import DriftReport, drift, emulated
        from pipeline.graph.io import load_model, model_inputs

        cleaned, typed, dataset = (
            self.clean(),
            self.engine(precision) / "model.onnx",
            self._validation().first(LAYER_IMAGES),
        )
        what, opens = self._candidate(precision, typed.parent)
        if what.emulated and not typed.is_file():
            raise UnsupportedError(
                "the implicit route has no typed graph whose tensors could be compared",
                expected="a GPU that runs the engine, or engine.route: explicit",
                fix="give --set engine.route=explicit; ranges and INT8 arithmetic are the same there",
            )

        def make(folder: Path) -> None:
            clean = load_model(cleaned)
            graph = load_model(typed) if typed.is_file() else clean
            (spec,) = model_inputs(clean)
            feeds = [feed_image(spec, s.image, self.config.preprocessing, f"the image {s.name}") for s in dataset]
            names = dataset.names
            if what.emulated:
                ran = f"{what.ran}, emulating the typed graph"
                report = drift(clean, graph, emulated(graph), feeds, ran, names=names)
            else:
                shown = functools.partial(self._shown, precision)
                # One engine for all: its fusions, and so its values, depend on what is shown.
                report = drift(clean, graph, shown, feeds, what.ran, names=names, limit=math.inf, engine=opens)
            write_atomically(folder / "report.json", to_json(report))

        target = self._kept.stage(f"layers/{precision}", make, **self._of_layers(precision))
        return from_json(DriftReport, target / "report.json")

    def known_layers(self, precision: Precision) -> DriftReport | None:
        """The report of ``layers``, where it was made and nothing has changed since."""
        from pipeline.drift import DriftReport

        name = f"layers/{precision}"
        if not self._kept.is_current(name, **self._of_layers(precision)):
            return None
        return from_json(DriftReport, self.folder / name / "report.json")

    def _of_layers(self, precision: Precision) -> Origin:
        what, _ = self._candidate(precision, self.engine(precision))
        images = self._validation().first(LAYER_IMAGES)
        return {
            "config": [self.config.preprocessing, what.ran],
            "parents": {
                "clean": hash_of(self.clean()),
                "model": what.model_sha256,
                "images": images.fingerprint(),
            },
            "tools": ("onnxruntime",),
        }

    def benchmark(self, precisions: Sequence[Precision]) -> BenchmarkReport:
        """Latencies of what runs here. Timings are facts of their moment, but are kept while nothing changes.

        Where INT8 runs, FP16 is built and timed too, so that INT8 is judged. ``benchmark.candidates`` are timed beside
        the engines.
        """
        from pipeline.rivals import Built, line_up
        from pipeline.stages.benchmark import benchmark

        cleaned, chosen = self.clean(), self.config.benchmark.rivals
        built: list[Built] = []
        not_run: dict[str, str] = {}
        hashes: dict[str, str | None] = {}
        sibling: list[Precision] = ["fp16"] if "int8" in precisions and self._runs("int8") else []
        timed = list(dict.fromkeys([*precisions, *sibling]))
        for precision in timed:
            try:
                engine = self.engine(precision)
            except PipelineError as error:
                if precision in precisions:
                    raise
                not_run[precision] = error.problem  # nobody asked for the sibling
                continue
            plan = engine / "model.engine"
            target, (what, opens) = self._resolved(precision), self._candidate(precision, engine)
            hashes[precision] = what.model_sha256
            if what.emulated:
                not_run[precision] = target.capabilities.why_not_run or "no engine was built"
            else:
                known = self._accuracy(precision, what.model_sha256)
                built.append(Built(precision, plan, what.ran, opens, precision, known))
        if "raw-engine" in chosen:
            self._add_raw_engine(built, not_run)
        device, feed = self._resolved(precisions[0]).capabilities.device, self._feed()
        contest = line_up(self.config, cleaned, built, wants_gpu=device is not None)

        target_folder = self._kept.stage(
            "benchmark",
            lambda folder: benchmark(
                contest.contestants,
                {**not_run, **contest.absent},
                feed,
                device,
                self.config.benchmark,
                folder,
                graph=cleaned,
                wants_verdict="int8" in precisions,
                masks=self.config.task == "segmentation",
                own_clocks=contest.own_clocks,
            ),
            config=[
                self.config.benchmark,
                list(precisions),
                device.name if device else None,
                {each.name: each.accuracy for each in built},
            ],
            parents={"clean": hash_of(cleaned), **hashes, **{each.name: hash_of(each.plan) for each in built}},
            tools=("onnxruntime", *(("torch",) if chosen else ())),
        )
        return from_json(BenchmarkReport, target_folder / "report.json")

    def pictures(self, precisions: Sequence[Precision]) -> Path | None:
        """The folder of pictures: the validation images on which a precision agrees least with FP32; None where there
        are no masks to show."""
        from pipeline.backends.onnxruntime import OnnxRuntimeRunner
        from pipeline.stages.pictures import draw

        if self.config.task == "tensors":
            return None
        cleaned, dataset, settings = self.clean(), self._validation(), self.config.validate_
        found = {precision: self._candidate(precision, self.engine(precision)) for precision in precisions}
        agreement = dict.fromkeys(dataset.names, 1.0)
        for precision in precisions:
            for image in self.validate(precision).images:
                if image.agreement is not None:
                    agreement[image.name] = min(agreement[image.name], image.agreement)
        worst = sorted(dataset.names, key=lambda name: agreement[name])[: settings.pictures]
        # FP32, emulated, is the reference itself.
        drawn = {p: opens for p, (what, opens) in found.items() if not (p == "fp32" and what.emulated)}

        def make(folder: Path) -> None:
            with contextlib.ExitStack() as stack:
                reference = stack.enter_context(OnnxRuntimeRunner(cleaned))
                runners = {precision: stack.enter_context(opens()) for precision, opens in drawn.items()}
                samples = (dataset.load(name) for name in worst)
                draw(reference, runners, samples, len(worst), self.card, settings.near_tie, folder)

        return self._kept.stage(
            "pictures",
            make,
            config=[settings.near_tie, self.card, worst, list(drawn)],
            parents={
                "clean": hash_of(cleaned),
                "images": dataset.fingerprint(),
                **{precision: what.model_sha256 for precision, (what, _) in found.items()},
            },
            tools=("onnxruntime", "pillow"),
        )

    def report(self, precisions: Sequence[Precision]) -> Path:
        """The HTML page."""
        from pipeline.calibration.report import CalibrationReport
        from pipeline.cleaning_report import CleaningReport
        from pipeline.stages.report import Inputs, write_report

        # What this machine lacks is said before the first minute of work, not after it.
        for precision in precisions:
            self._resolved(precision)
        validations = {precision: self.validate(precision) for precision in precisions}
        timings, pictures = self.benchmark(precisions), self.pictures(precisions)
        layers = {p: found for p in precisions if (found := self.known_layers(p)) is not None}
        engines = {precision: self.folder / "engine" / precision for precision in precisions}
        built = {p: folder for p, folder in engines.items() if (folder / "model.engine").is_file()}
        names = ["clean", "benchmark", *(["pictures"] if pictures else []), *(f"validate/{p}" for p in precisions)]
        names += [*(["calibrate"] if set(QUANTIZED) & set(precisions) else []), *(f"layers/{p}" for p in layers)]
        names += ["mixed"] if "mixed" in precisions else []
        reports = {f"{name}/report.json": sha256_file(self.folder / name / "report.json") for name in names}
        provenance = self._provenance(reports)

        def make(folder: Path) -> None:
            blocks, planned = self._blocks(engines)
            calibration = self.folder / "calibrate" / "report.json"
            inputs = Inputs(
                card=self.card,
                validations=validations,
                benchmark=timings,
                pictures=from_json(PicturesReport, pictures / "report.json") if pictures else None,
                pictures_folder=pictures or Path(),
                manifests={p: from_json(EngineManifest, folder / "manifest.json") for p, folder in built.items()},
                engine_bytes={p: (folder / "model.engine").stat().st_size for p, folder in built.items()},
                cleaning=from_json(CleaningReport, self.folder / "clean" / "report.json"),
                calibration=from_json(CalibrationReport, calibration) if set(QUANTIZED) & set(precisions) else None,
                layers=layers,
                blocks=blocks,
                planned=planned,
                provenance=provenance,
                mixed=self.mix() if "mixed" in precisions else None,
            )
            write_report(inputs, folder)

        return (
            self._kept.stage(
                "report",
                make,
                config=[list(precisions), provenance.config],
                parents={**reports, **provenance.models},
                tools=("jinja2",),
            )
            / "index.html"
        )

    def verdict(self, precisions: Sequence[Precision], page: Path | None = None) -> None:
        """Raise CheckFailed where a precision did not pass; every report stands by then.

        Args:
            page: that shows these very verdicts; None where none was made of them.
        """
        failed = [(p, check) for p in precisions for check in self.validate(p).checks if not check.passed]
        if not failed:
            return
        reports = dict.fromkeys(str(self.folder / "validate" / p / "report.json") for p, _ in failed)
        raise CheckFailed(
            f"{len(failed)} check(s) of {self.config.name} failed",
            expected="every figure within its bound (validate.tolerances)",
            got="; ".join(
                f"{p}: {check.name} {check.shown} ({check.limit})"
                + (f", worst: {', '.join(map(str, check.offenders))}" if check.offenders else "")
                for p, check in failed
            ),
            fix=f"look at {page}" if page else f"look at {', '.join(reports)}, or make the page: unet-trt report",
        )

    def judged(self, precision: Precision) -> Judged:
        """What packages of one precision are made from.

        Raises:
            CheckFailed: it has not passed validation.
        """
        from pipeline.stages.package import Judged

        engine, batch = self.engine(precision), self.config.engine.profile.get("batch")
        self.verdict([precision])
        report = self.folder / "validate" / precision / "report.json"
        return Judged(self.card, precision, engine, self._cache(precision), report, batch.max if batch else None)

    def network_sha256(self) -> str:
        """What the network is made from: its factory with arguments and weights, or the ONNX file's content."""
        from pipeline.graph.io import sha256_model

        network = self.config.network
        if network.onnx is not None:
            return sha256_model(network.onnx)
        return sha256_json([network.factory, network.arguments, hash_of(network.weights)])

    def check_speedup_can_be_judged(self, precisions: Sequence[Precision]) -> None:
        """Raise where ``require_speedup`` could not answer: before the first minute of work, not after it.

        Raises:
            ConfigError: INT8 is not among the precisions.
            UnsupportedError: no engine runs on this machine.
        """
        if "int8" not in precisions:
            raise ConfigError(
                "--require-speedup compares INT8 with FP16",
                expected="int8 among the precisions",
                got=", ".join(precisions),
                fix="add -p int8, or leave --require-speedup out",
            )
        if not self._runs("int8"):
            known = self._resolved("int8").capabilities
            raise UnsupportedError(
                "--require-speedup needs a machine that runs engines; this one does not",
                got=known.why_not_run or f"backend: {known.name}, which builds no engines",
                fix="run it on a GPU host, or leave --require-speedup out",
            )

    def require_speedup(self, precisions: Sequence[Precision]) -> None:
        """Raise where INT8 is not surely faster than FP16; the report stands by then.

        Raises:
            CheckFailed: it is not worthwhile.
            ConfigError, UnsupportedError: as ``check_speedup_can_be_judged``.
        """
        self.check_speedup_can_be_judged(precisions)
        verdict = self.benchmark(precisions).verdict
        if verdict is None or verdict.worthwhile is None:
            raise UnsupportedError(
                verdict.sentence if verdict else "INT8 was not judged", fix="run it on a GPU host that builds engines"
            )
        if not verdict.worthwhile:
            raise CheckFailed(
                verdict.sentence,
                expected=f"an interval above {verdict.min_speedup:g} (benchmark.min_speedup)",
                got=" ".join(verdict.reasons),
                fix="see the time of each layer in benchmark/report.json; use FP16 if it cannot be helped",
            )

    # ------------------------------------------------------------------ parts

    def _cache(self, precision: Precision) -> Path | None:
        return self.calibrate() if precision in QUANTIZED else None

    def _settings(self, precision: Precision) -> EngineConfig:
        """How an engine is built; mixed precision leaves out what its search chose."""
        settings = self.config.engine
        return _leaving_out(settings, self.mix().patterns) if precision == "mixed" else settings

    def _build(
        self, model: Path, precision: Precision, settings: EngineConfig, folder: Path, shown: tuple[str, ...] = ()
    ) -> None:
        """Build an engine of a graph with this folder's calibration and timing cache."""
        from pipeline.stages.engine import build_engine

        cache = self._cache(precision)
        timing_cache = self.folder / "timing.cache" if settings.timing_cache else None
        card, network = self.card, self.config.network
        build_engine(
            model, precision, settings, _table(cache), hash_of(cache), card, folder, timing_cache, network, shown
        )

    @contextlib.contextmanager
    def _shown(self, precision: Precision, tensors: Sequence[str]) -> Iterator[Runner]:
        """An engine that gives these tensors too, as long as it is needed."""
        from pipeline.engines import load_engine

        with tempfile.TemporaryDirectory(prefix="unet-trt-") as folder:
            self._build(self.clean(), precision, self._settings(precision), Path(folder), tuple(tensors))
            with load_engine(Path(folder) / "model.engine") as runner:
                yield runner

    def _calibration(self, count: int) -> Dataset:
        """So many images of the calibration split, the same ones each time."""
        split = open_dataset(self.config.data, self.config.preprocessing, "calibration")
        return split.choose(count, self.config.calibrate.seed)

    def _validation(self) -> Dataset:
        dataset = open_dataset(self.config.data, self.config.preprocessing, "validation")
        return dataset.first(self.config.validate_.images)

    @functools.cached_property
    def _validation_hashes(self) -> dict[str, str]:
        return content_hashes(self._validation())

    def _judged_by(self) -> list[Any]:
        """What ``algorithm: auto`` and refinement depend on beside the calibration's own settings."""
        engine, config = self.config.engine, self.config.calibrate
        return (
            [engine.exclude, engine.qdq, engine.input_bits] if config.algorithm == "auto" or config.refine_steps else []
        )

    def _input(self, sample: Sample) -> NDArray[np.float32]:
        """One preprocessed image; with ``resize: none`` its size has to be the configured one."""
        from pipeline.data.preprocessing import preprocess

        spec = self.config.preprocessing
        image = preprocess(sample.image, spec)
        if image.shape[1:] != (spec.height, spec.width) and not {"height", "width"} <= set(self.config.export.dynamic):
            raise DataError(
                f"the image {sample.name} has another size than the network's input",
                expected=f"{spec.width}×{spec.height} (width × height)",
                got=f"{image.shape[2]}×{image.shape[1]}",
                fix="set preprocessing.height and width, or preprocessing.resize to stretch or letterbox",
            )
        return image

    @functools.cache  # noqa: B019 - a Run lives as long as its process works on the folder
    def _resolved(self, precision: Precision) -> Resolved:
        from pipeline.backends.registry import resolve

        return resolve(self.config.engine.backend, precision, self.config.engine.route)

    def _runs(self, precision: Precision) -> bool:
        """Whether an engine of this precision is built and runs on this machine."""
        target = self._resolved(precision)
        return target.builder is not None and target.capabilities.runs

    def _choices(self) -> Choices:
        """Times choices of mixed precision on this machine's GPU, on the first validation image."""
        from pipeline.contest import Choices
        from pipeline.stages.mix import excluded

        settings, feed = self.config.engine, self._feed()

        def build(half: Sequence[str], folder: Path) -> None:
            chosen = _leaving_out(settings, [*settings.exclude, *excluded(half)])
            self._build(self.clean(), "mixed", chosen, folder)

        return Choices(build, feed, self.config.benchmark, self.clean())

    def _feed(self) -> Callable[[TensorSpec], NDArray[Any]]:
        """Makes an input of the first validation image."""
        from pipeline.backends.base import feed_image

        sample, spec = self._validation()[0], self.config.preprocessing
        return lambda source: feed_image(source, sample.image, spec, f"the image {sample.name}")[source.name]

    def _candidate(
        self, precision: Precision, engine: Path
    ) -> tuple[Candidate, Callable[[], AbstractContextManager[Runner]]]:
        """What validation judges: the engine where it runs, else its typed graph on ONNX Runtime."""
        from pipeline.backends.onnxruntime import emulate
        from pipeline.engines import load_engine

        plan, typed, target = engine / "model.engine", engine / "model.onnx", self._resolved(precision)
        sha = hash_of(plan) if plan.is_file() else None
        if sha is not None and target.capabilities.runs:
            ran = f"{target.capabilities.name} {target.capabilities.version}"
            what = Candidate(precision, False, ran, sha, sha, target.route)
            return what, functools.partial(load_engine, plan)
        what = Candidate(precision, True, self._emulator(), hash_of(typed) or "", sha, target.route)
        return what, functools.partial(emulate, typed)

    def _add_raw_engine(self, built: list[Built], not_run: dict[str, str]) -> None:
        """FP16 from the graph as exported, which shows what cleaning gains; only where engines run."""
        from pipeline.engines import load_engine
        from pipeline.rivals import RAW_ENGINE, Built

        try:
            target, raw = self._resolved("fp16"), self.export()
            if not self._runs("fp16"):
                raise UnsupportedError(target.capabilities.why_not_run or "no engine runs on this machine")
            settings = self.config.engine.model_copy(update={"source": "onnx"})
            folder = self._kept.stage(
                "raw-engine",
                lambda folder: self._build(raw, "fp16", settings, folder),
                config=[settings, self.card, target.identity()],
                parents={"raw": hash_of(raw)},
                tools=("onnx", "onnx-graphsurgeon"),
            )
        except PipelineError as error:
            not_run[RAW_ENGINE] = error.problem
            return
        plan, ran = folder / "model.engine", f"{target.capabilities.name} {target.capabilities.version}"
        built.append(Built(RAW_ENGINE, plan, ran, functools.partial(load_engine, plan)))

    def _accuracy(self, precision: Precision, sha256: str) -> Accuracy | None:
        """What the last validation found of this very engine; None where there was none."""
        file = self.folder / "validate" / precision / "report.json"
        if not file.is_file():
            return None
        report = from_json(ValidationReport, file)
        if report.candidate.model_sha256 != sha256:
            return None
        return Accuracy(report.agreement, report.scores.mean_iou if report.scores else None, report.passed)

    def _emulator(self) -> str:
        """What runs typed graphs; an engine that was defined layer by layer has none of its own, only a twin."""
        twin = " on the ONNX twin" if self.config.engine.source == "network-api" else ""
        return f"ONNX Runtime {importlib.metadata.version('onnxruntime')}{twin}"

    def _blocks(self, engines: Mapping[Precision, Path]) -> tuple[tuple[Block, ...], dict[Precision, dict[str, str]]]:
        """The clean graph's blocks at the configured size, and what the typed graphs' convolutions compute in."""
        import numpy as np

        from pipeline.backends.base import feed_image
        from pipeline.graph.io import load_model, model_inputs
        from pipeline.graph.levels import blocks, convolution_precisions

        model, size = load_model(self.clean()), self.config.preprocessing
        blank = np.zeros((size.height, size.width, size.channel_count), np.uint8)
        feeds = feed_image(model_inputs(model)[0], blank, size)
        shapes = {name: array.shape for name, array in feeds.items()}
        typed = {precision: folder / "model.onnx" for precision, folder in engines.items()}
        planned = {p: convolution_precisions(load_model(file)) for p, file in typed.items() if file.is_file()}
        return blocks(model, shapes), planned

    def _provenance(self, reports: dict[str, str]) -> Provenance:
        from pipeline.stages.report import Provenance

        files = self._kept.outputs()
        models = {name: sha for name, sha in files.items() if name.endswith((".onnx", ".cache", ".engine"))}
        return Provenance(models, reports, self._kept.tools(), _as_yaml(self.config))


def _leaving_out(settings: EngineConfig, patterns: Sequence[str]) -> EngineConfig:
    return settings.model_copy(update={"exclude": tuple(patterns)})


def _as_yaml(config: Config) -> str:
    """What the configuration names, overrides included; paths below the current folder are relative to it."""
    import yaml

    named = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for key in PATH_KEYS:
        section, name = key.split(".")
        if named[section].get(name):
            named[section][name] = named[section][name].removeprefix(f"{Path.cwd()}{os.sep}")
    return yaml.safe_dump(named, sort_keys=False, allow_unicode=True)


def _table(cache: Path | None) -> CalibrationTable | None:
    from pipeline.calibration.table import read_cache

    return read_cache(cache) if cache else None
