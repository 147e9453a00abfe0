"""What cleaning is worth on a GPU: raw export against cleaned graph as TensorRT engines, and what else removes copies.

    python benchmarks/cleaning.py export FOLDER [--networks N…] [--weights TRAINED.safetensors]    needs torch, no GPU
    python benchmarks/cleaning.py prepare FOLDER [--networks N…] [--isbi DIR] [--camvid DIR]       needs neither
    python benchmarks/cleaning.py measure FOLDER -o RESULT.json [--date 2026-11-21] [--seconds 600]   needs the GPU

``export`` writes ``FOLDER/<network>/raw.onnx``. ``prepare`` cleans it, calibrates the raw and the clean graph each in
its own tensor names on the same images, types both for explicit INT8, and edits clean graphs into variants
(variants.py). ``measure`` builds every engine, times the engines of one comparison in turns (A B A B …) and writes the
result after each step; called again, it goes on where it stopped.
The weights of ``unet-trained``: ``unet-trt train -c configs/cells.yaml --set network.arguments.base_channels=64 -o F``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import CalibrateConfig, Config, EngineConfig, ProfileRange, load_config
from pipeline.metrics.interleaving import interleave
from pipeline.metrics.latency import CONFIDENCE, Estimate

REPOSITORY = Path(__file__).resolve().parent.parent
LARGE = {"in_channels": 1, "classes": 4, "base_channels": 64}
OPSET = 19
# Layers that compute nothing.
COPIES = ("reformat", "concat")
SLICE_SECONDS, SLICE_WARMUP_SECONDS = 0.08, 0.02


@dataclass(frozen=True)
class Network:
    """One raw graph.

    Attributes:
        config: in ``configs/``; names the data.
        arguments: of a freshly initialised network; None for the config's own, with its weights.
        trained: whether ``--weights`` are loaded.
        variants: names in ``variants.EDITS``; "shared scales" for the INT8 graphs with common ranges.
        engines: kinds of engine that are built of it. Implicit INT8 takes longest, so only the large network has it.
        channels_last: made from that network's clean graph instead of exported.
    """

    config: str
    arguments: Mapping[str, Any] | None = None
    trained: bool = False
    exporter: str = "torchscript"
    dynamic: bool = False
    variants: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("fp16", "int8-explicit")
    channels_last: str | None = None


SHARED = "shared scales"
SAME_RESULT = ("swapped concat", "separate pads")
OTHER_RESIZE = ("depthwise linear", "half pixel", "nearest asymmetric", "nearest half pixel", "depthwise nearest")
# What an INT8 engine would answer no differently.
FP16_ONLY = ("separate pads", "nearest half pixel")
ALL_ENGINES = ("fp16", "int8-implicit", "int8-explicit")
NETWORKS = {
    "unet": Network("cells", LARGE, variants=(*SAME_RESULT, *OTHER_RESIZE, SHARED), engines=ALL_ENGINES),
    "unet-trained": Network("cells", LARGE, trained=True, engines=ALL_ENGINES),
    "isbi-torchscript": Network("isbi"),
    "camvid-torchscript": Network("camvid"),
    "isbi-dynamo": Network("isbi", exporter="dynamo"),
    "camvid-dynamo": Network("camvid", exporter="dynamo"),
    "isbi-dynamic": Network("isbi", dynamic=True, engines=("fp16",)),
    "isbi-channels-last": Network("isbi", channels_last="isbi-torchscript"),
    "unet-transposed": Network("cells", {**LARGE, "upsampling": "transposed"}, variants=("depth to space",)),
}
# Most important first: what a run that is cut short leaves out is at the end.
ORDER = (
    ("unet", "fp16"),
    ("unet", "int8"),
    ("unet-trained", "fp16"),
    ("unet-trained", "int8"),
    ("isbi-torchscript", "fp16"),
    ("unet", "int8 variants"),
    ("unet", "fp16 variants"),
    ("camvid-torchscript", "fp16"),
    ("isbi-torchscript", "int8"),
    ("camvid-torchscript", "int8"),
    ("isbi-dynamic", "fp16"),
    ("isbi-channels-last", "fp16"),
    ("isbi-dynamo", "fp16"),
    ("isbi-dynamo", "int8"),
    ("isbi-channels-last", "int8"),
    ("unet-transposed", "fp16 variants"),
    ("unet-transposed", "int8 variants"),
    ("camvid-dynamo", "fp16"),
    ("camvid-dynamo", "int8"),
)


# export


def export(folder: Path, name: str, weights: Path | None) -> None:
    """Write ``raw.onnx`` of one network, as torch's exporter leaves it."""
    import torch

    from pipeline.networks import build_network

    network, config = NETWORKS[name], _config(name, {})
    settings: dict[str, Any] = {}
    if network.arguments is not None:
        settings = {"arguments": dict(network.arguments), "weights": weights if network.trained else None}
    torch.manual_seed(0)
    module = build_network(config.network.model_copy(update=settings)).eval()
    spec = config.preprocessing
    example = torch.zeros(1, spec.channel_count, spec.height, spec.width)
    target = folder / name / "raw.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"opset_version": OPSET, "input_names": ["image"], "output_names": ["logits"]}
    with torch.inference_mode():
        if network.exporter == "dynamo":
            program = torch.onnx.export(module, (example,), dynamo=True, verbose=False, **shared)
            assert program is not None
            program.save(str(target), external_data=False)
        else:
            axes = {0: "batch", 2: "height", 3: "width"}
            torch.onnx.export(
                module,
                (example,),
                str(target),
                dynamo=False,
                dynamic_axes={"image": axes, "logits": axes} if network.dynamic else None,
                **shared,
            )


# prepare


def prepare(folder: Path, name: str, roots: Mapping[str, str], image_count: int) -> None:
    """Everything of one network that needs no GPU; ``index.json``, written last, lists the graphs."""
    import onnx
    from variants import EDITS, as_channels_last

    from pipeline.data.dataset import open_dataset
    from pipeline.data.preprocessing import preprocess
    from pipeline.graph.io import load_model, save_model
    from pipeline.graph.placement import shared_ranges
    from pipeline.graph.quantize import quantize

    network, config, home = NETWORKS[name], _config(name, roots), folder / name
    raw, clean = home / "raw.onnx", home / "clean.onnx"
    if network.channels_last is not None:
        home.mkdir(exist_ok=True)
        save_model(as_channels_last(load_model(folder / network.channels_last / "clean.onnx")), raw)
    command = [sys.executable, "-m", "pipeline", "clean", str(raw), "-o", str(clean)]
    subprocess.run([*command, "--report", str(home / "clean.json")], cwd=REPOSITORY, check=True)
    (sample,) = open_dataset(config.data, config.preprocessing, "validation").first(1)
    image = preprocess(sample.image, config.preprocessing)[np.newaxis]
    np.save(home / "image.npy", image)
    reference = _run(raw, image)
    np.save(home / "reference.npy", reference)

    graphs: dict[str, dict[str, Any]] = {}

    def add(label: str, path: Path, about: str, table: Any = None, typed: onnx.ModelProto | None = None) -> None:
        model = load_model(path)
        entry: dict[str, Any] = {"about": about, "nodes": len(model.graph.node), "engines": {}}
        if typed is None:
            entry["engines"]["fp16"] = {"model": path.name}
            entry["max_relative_difference"] = _relative(_run(path, image), reference)
        if table is not None:
            text = home / f"{path.stem if typed is None else _stem(label)}.cache"
            text.write_text(table.to_cache(8600), encoding="utf-8")
            if "int8-implicit" in network.engines:
                entry["engines"]["int8-implicit"] = {"model": path.name, "table": text.name}
            try:
                typed = quantize(model, table, half=False) if typed is None else typed
                save_model(typed, home / f"{text.stem}-int8.onnx")
                entry["engines"]["int8-explicit"] = {"model": f"{text.stem}-int8.onnx"}
            except Exception as error:  # a graph that the explicit route refuses is a result
                entry["no_explicit_int8"] = str(error)
        graphs[label] = entry

    tables: dict[str, Any] = dict.fromkeys(("raw", "clean"))
    if network.engines != ("fp16",):
        samples = open_dataset(config.data, config.preprocessing, "train").first(image_count)
        tables = {path.stem: _calibrate(path, samples, config) for path in (raw, clean)}
    add("raw", raw, "as exported", tables["raw"])
    add("clean", clean, "as cleaned", tables["clean"])
    cleaned, table = load_model(clean), tables["clean"]
    for label in network.variants:
        if label in EDITS:
            about, edit = EDITS[label]
            edited = edit(cleaned)
            if edited is None:
                raise ValueError(f"the clean graph of {name} has nothing that {label!r} could change")
            path = home / f"{_stem(label)}.onnx"
            save_model(edited, path)
            add(label, path, about, None if label in FP16_ONLY else _calibrated_like(edited, table))
    if SHARED in network.variants:
        about = "one range for all that a pool, resize or concatenation joins, and Q/DQ pairs there too"
        common = shared_ranges(cleaned, table, ())
        add(SHARED, clean, about, common, quantize(cleaned, table, half=False, qdq="shared"))
    (home / "index.json").write_text(
        json.dumps({"calibration_images": image_count, "graphs": graphs}, indent=2), encoding="utf-8"
    )


def _calibrate(path: Path, samples: Any, config: Config) -> Any:
    from pipeline.calibration.table import read_cache
    from pipeline.stages.calibrate import calibrate

    cache = path.with_name(f"{path.stem}-calibration.cache")
    calibrate(path, samples, CalibrateConfig(), config.preprocessing, cache, cache.with_suffix(".json"))
    return read_cache(cache)


def _calibrated_like(edited: Any, table: Any) -> Any:
    """The table with ranges for tensors that an edit added: the largest range there is (their speed is what counts)."""
    from pipeline.calibration.table import CalibrationTable
    from pipeline.graph.placement import activation_tensors

    largest = max(table.amax.values())
    return CalibrationTable(table.algorithm, {t: table.amax.get(t, largest) for t in activation_tensors(edited)})


def _run(path: Path, image: NDArray[np.float32]) -> NDArray[np.float32]:
    from pipeline.backends.onnxruntime import OnnxRuntimeRunner

    with OnnxRuntimeRunner(path) as runner:
        return runner({runner.inputs[0].name: image})[runner.outputs[0].name]


def _relative(got: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.abs(got - reference).max() / np.abs(reference).max())


def _stem(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label.lower())


# measure


@dataclass(frozen=True)
class Candidate:
    """One engine to build; ``kind`` is a precision, with its route for INT8."""

    network: str
    graph: str
    kind: str
    model: Path
    table: Path | None

    @property
    def key(self) -> str:
        return f"{self.network} / {self.graph} / {self.kind}"

    @property
    def timing_cache(self) -> str:
        """Trained and fresh weights, both exporters, and a clean graph and its variants, share one cache."""
        family = NETWORKS[self.network].config if not self.network.startswith("unet") else "unet"
        return f"{family}-{'raw' if self.graph == 'raw' else 'clean'}-{self.kind}.timing"


def candidates(folder: Path, network: str, kind: str) -> list[Candidate]:
    """The engines of one comparison; none where the network was not prepared."""
    index = folder / network / "index.json"
    if not index.exists():
        return []
    precision, variants = kind.partition(" ")[0], kind.endswith("variants")
    found = []
    for graph, entry in json.loads(index.read_text(encoding="utf-8"))["graphs"].items():
        if graph != "clean" and variants == (graph == "raw"):
            continue
        if not variants and graph not in ("raw", "clean"):
            continue
        for name in NETWORKS[network].engines:
            made = entry["engines"].get(name)
            slow = variants and name == "int8-implicit" and graph not in ("clean", SHARED)
            if made is not None and name.startswith(precision) and not slow:
                table = folder / network / made["table"] if "table" in made else None
                found.append(Candidate(network, graph, name, folder / network / made["model"], table))
    # The first is what the others are compared with; explicit INT8 is the pipeline's route.
    return sorted(found, key=lambda candidate: candidate.kind == "int8-implicit") if variants else found


class Bench:
    """Engines and timings of one GPU, kept in a result file after every step."""

    def __init__(self, folder: Path, output: Path, level: int, rounds: int, date: str | None, seconds: float) -> None:
        from pipeline.backends import cuda
        from pipeline.backends.tensorrt import api

        self.folder, self.output, self.rounds = folder, output, rounds
        self.plans, self.end = folder / "engines", time.monotonic() + seconds
        self.plans.mkdir(exist_ok=True)
        self.settings = EngineConfig(backend="tensorrt", optimization_level=level)
        self.trt = api()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.result: dict[str, Any] = {
            "date": date or now,
            "device": asdict(cuda.current_device()),
            "tensorrt": self.trt.__version__,
            "python": platform.python_version(),
            "method": f"batch 1, CUDA events around each inference, CUDA graphs, {rounds} rounds (A B B A) in turns of "
            f"{SLICE_SECONDS} s an engine after warm-up; median of the rounds, and its distribution-free "
            f"interval of at least {CONFIDENCE:.0%}; ratios are taken within a round, to the first engine",
            "optimization_level": level,
            "graphs": {},
            "engines": {},
            "comparisons": {},
        }
        if output.exists():
            self.result |= json.loads(output.read_text(encoding="utf-8"))

    def save(self) -> None:
        self.output.write_text(json.dumps(self.result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end

    def compare(self, network: str, kind: str) -> str:
        """Build and time what belongs to one comparison; a line on what became of it."""
        name = f"{network}, {kind}"
        known = self.result["comparisons"].get(name)
        chosen = candidates(self.folder, network, kind)
        if known is not None and known["complete"]:
            return f"{name}: done before"
        if not chosen:
            return f"{name}: not prepared"
        self._describe(network)
        built = [candidate for candidate in chosen if not self.over and self._build(candidate)]
        tried = [candidate for candidate in chosen if candidate.key in self.result["engines"]]
        if len(built) < 2:
            return f"{name}: {len(built)} of {len(chosen)} engines, nothing to compare"
        started = time.monotonic()
        timings = self._time(built)
        self.result["comparisons"][name] = {
            "complete": len(tried) == len(chosen),
            "seconds": round(time.monotonic() - started, 1),
            **timings,
        }
        self.save()
        lines = [f"{name}:"]
        for key, row in timings["engines"].items():
            engine, ratio = self.result["engines"][key], timings["ratios"][key]
            low, high = row["interval_ms"]
            lines.append(
                f"  {key:62} {row['median_ms']:.4f} ms [{low:.4f}, {high:.4f}]  × {ratio['median']:.4f}"
                f"  layers {engine['layers']} copies {engine['copies']} ({engine.get('copy_share', 0):.0%} of time)"
                f"  same class {engine['agreement']:.4f}  {engine['build_seconds']:.0f} s {engine['timing_cache']}"
            )
        return "\n".join(lines)

    def _describe(self, network: str) -> None:
        home = self.folder / network
        graphs = json.loads((home / "index.json").read_text(encoding="utf-8"))["graphs"]
        self.result["graphs"][network] = {
            label: {key: value for key, value in entry.items() if key != "engines"} for label, entry in graphs.items()
        }

    def _build(self, candidate: Candidate) -> bool:
        """Whether there is an engine; failures are recorded, as one of them must not end the run."""
        from pipeline.backends.base import BuildRequest
        from pipeline.backends.tensorrt import TensorrtBuilder
        from pipeline.calibration.table import read_cache
        from pipeline.graph.io import load_model, model_inputs
        from pipeline.stages.engine import make_profiles

        engines, plan = self.result["engines"], self._plan(candidate)
        if candidate.key in engines:
            return plan.exists()
        engines[candidate.key] = {"error": "the process ended while it built this engine"}
        self.save()
        try:
            inputs = model_inputs(load_model(candidate.model))
            ranges = {}
            if NETWORKS[candidate.network].dynamic:
                sizes = np.load(self.folder / candidate.network / "image.npy").shape
                axes = zip(("batch", "height", "width"), (sizes[0], sizes[2], sizes[3]), strict=True)
                ranges = {axis: ProfileRange(min=size, opt=size, max=size) for axis, size in axes}
            request = BuildRequest(
                candidate.model,
                "fp16" if candidate.kind == "fp16" else "int8",
                "explicit" if candidate.kind == "int8-explicit" else "implicit",
                self.settings,
                read_cache(candidate.table) if candidate.table else None,
                profiles=make_profiles(inputs, ranges),  # type: ignore[arg-type]
                timing_cache=self.plans / candidate.timing_cache,
            )
            made = TensorrtBuilder().build(request)
            plan.write_bytes(made.plan)
            engines[candidate.key] = {
                "build_seconds": round(made.seconds, 2),
                "timing_cache": made.timing_cache,
                "engine_bytes": len(made.plan),
                "notes": [note[:300] for note in made.notes[:4]],
                **self._inspect(candidate),
            }
        except Exception as error:
            engines[candidate.key] = {"error": f"{type(error).__name__}: {error}"[:600]}
            plan.unlink(missing_ok=True)
        self.save()
        return plan.exists()

    def _inspect(self, candidate: Candidate) -> dict[str, Any]:
        """Layers, and how close the engine's result is to the raw graph's in FP32 on ONNX Runtime."""
        from pipeline.backends.layers import parse_layers
        from pipeline.backends.runner import EngineRunner

        plan, home = self._plan(candidate), self.folder / candidate.network
        image, reference = np.load(home / "image.npy"), np.load(home / "reference.npy")
        with EngineRunner(self.trt, plan.read_bytes()) as runner:
            (got,) = runner({runner.inputs[0].name: image}).values()
            text = runner.layers()
        plan.with_suffix(".json").write_text(text, encoding="utf-8")
        layers = parse_layers(text)
        return {
            "layers": len(layers),
            "layer_types": dict(Counter(layer.type or "unknown" for layer in layers).most_common()),
            "copies": sum(layer.group in COPIES for layer in layers),
            "agreement": float((got.argmax(1) == reference.argmax(1)).mean()),
            "max_relative_error": _relative(got.astype(np.float32), reference),
        }

    def _time(self, built: Sequence[Candidate]) -> dict[str, Any]:
        from pipeline.backends.runner import EngineRunner

        with ExitStack() as stack:
            runners: dict[str, tuple[Any, dict[str, Any]]] = {}
            for candidate in built:
                runner = stack.enter_context(EngineRunner(self.trt, self._plan(candidate).read_bytes()))
                image = np.load(self.folder / candidate.network / "image.npy")
                runners[candidate.key] = runner, {runner.inputs[0].name: image}

            def turn(key: str) -> NDArray[np.float64]:
                runner, feeds = runners[key]
                times: NDArray[np.float64] = runner.device_milliseconds(feeds, SLICE_SECONDS, SLICE_WARMUP_SECONDS)
                return times

            turns = interleave({key: functools.partial(turn, key) for key in runners}, self.rounds)
            captured = {key: runner.captured for key, (runner, _) in runners.items()}
            for key, (runner, feeds) in runners.items():
                shares = _profile(runner, feeds)
                (self.plans / f"{_stem(key)}.profile.json").write_text(
                    json.dumps(shares.pop("layers", {}), indent=1), encoding="utf-8"
                )
                self.result["engines"][key].update(shares)
        first = next(iter(turns.rounds))
        return {
            "rounds": self.rounds,
            "turns_before": turns.warm_ups,
            "settled": turns.settled,
            "engines": {
                key: {
                    "median_ms": round(turns.latency(key).median, 5),
                    "interval_ms": _interval(turns.latency(key)),
                    "cuda_graph": captured[key],
                    "rounds_ms": [round(value, 5) for value in times],
                }
                for key, times in turns.rounds.items()
            },
            "ratios": {
                key: {
                    "median": round(turns.ratio(key, first).median, 5),
                    "interval": _interval(turns.ratio(key, first)),
                }
                for key in turns.rounds
            },
        }

    def _plan(self, candidate: Candidate) -> Path:
        return self.plans / f"{_stem(candidate.key)}.engine"


def _profile(runner: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """GPU milliseconds of copies, their share, and of each layer. Layer by layer an engine is slower than whole."""
    from pipeline.backends.layers import parse_layers

    try:
        mean: dict[str, float] = runner.profile(feeds)
    except Exception as error:
        return {"profile_error": str(error)[:300]}
    copies = sum(mean.get(layer.name, 0) for layer in parse_layers(runner.layers()) if layer.group in COPIES)
    return {
        "copy_ms": round(copies, 5),
        "copy_share": round(copies / sum(mean.values()), 4),
        "layers": {name: round(ms, 5) for name, ms in mean.items()},
    }


def _interval(found: Estimate) -> list[float]:
    return [round(found.low, 5), round(found.high, 5)]


def dry_run(folder: Path, chosen: Sequence[tuple[str, str]]) -> None:
    """Without a GPU: which engines would be built, and what TensorRT-RTX's parser says of their graphs."""
    import tensorrt_rtx

    from pipeline.backends import nvinfer

    for network, kind in chosen:
        print(f"{network}, {kind}:", flush=True)
        for candidate in candidates(folder, network, kind):
            builder = nvinfer.create_builder(tensorrt_rtx)
            parsed = nvinfer.create_network(tensorrt_rtx, builder, strongly_typed=True)
            try:
                nvinfer.parse(tensorrt_rtx, parsed, candidate.model)
                verdict = f"{parsed.num_layers} layers parsed"
            except Exception as error:
                verdict = f"REFUSED: {error}"
            print(f"  {candidate.key:62} {candidate.timing_cache:36} {verdict}", flush=True)


def _config(name: str, roots: Mapping[str, str]) -> Config:
    """The config of a network; its data lies in the current folder where no root is given, and is not looked at."""
    config = NETWORKS[name].config
    sets = [f"data.root={roots.get(config, '.')}"] if config != "cells" else []
    return load_config(REPOSITORY / "configs" / f"{config}.yaml", sets)


def _chosen(only: Sequence[str], skip: Sequence[str]) -> list[tuple[str, str]]:
    def match(pair: tuple[str, str], patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(", ".join(pair), pattern) for pattern in patterns)

    return [pair for pair in ORDER if (not only or match(pair, only)) and not match(pair, skip)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting, preparing, measuring = (commands.add_parser(name) for name in ("export", "prepare", "measure"))
    for command in (exporting, preparing, measuring):
        command.add_argument("folder", type=Path)
    for command in (exporting, preparing):
        command.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    exporting.add_argument("--weights", type=Path, help="of unet-trained")
    preparing.add_argument("--isbi", default=".")
    preparing.add_argument("--camvid", default=".")
    preparing.add_argument("--images", type=int, default=2, help="calibration images")
    measuring.add_argument("-o", "--output", type=Path, required=True)
    measuring.add_argument("--only", action="append", default=[], help="pattern of comparisons: 'unet, *'")
    measuring.add_argument("--skip", action="append", default=[])
    measuring.add_argument("--seconds", type=float, default=math.inf, help="no build or comparison begins later")
    measuring.add_argument("--rounds", type=int, default=12)
    measuring.add_argument("--level", type=int, default=3, help="builder optimization level")
    measuring.add_argument("--date", help="of the measurement, where the machine's clock is wrong")
    measuring.add_argument("--dry-run", action="store_true", help="no GPU: parse with TensorRT-RTX")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.command == "export":
        for name in options.networks:
            if NETWORKS[name].channels_last is None and not (NETWORKS[name].trained and options.weights is None):
                export(folder, name, options.weights)
                print(f"exported {name}", flush=True)
    elif options.command == "prepare":
        roots = {"isbi": options.isbi, "camvid": options.camvid}
        failed: list[str] = []
        for name in options.networks:
            started = time.monotonic()
            try:
                prepare(folder, name, roots, options.images)
                print(f"prepared {name} in {time.monotonic() - started:.0f} s", flush=True)
            except Exception as error:  # the other networks are still worth measuring
                failed.append(name)
                print(f"{name} could not be prepared: {type(error).__name__}: {error}", flush=True)
        if failed:
            sys.exit(1)
    elif options.dry_run:
        dry_run(folder, _chosen(options.only, options.skip))
    else:
        bench = Bench(folder, options.output, options.level, options.rounds, options.date, options.seconds)
        for network, kind in _chosen(options.only, options.skip):
            if bench.over:
                print("the time is up", flush=True)
                break
            print(bench.compare(network, kind), flush=True)


if __name__ == "__main__":
    main()
