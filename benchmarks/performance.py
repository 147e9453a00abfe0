"""Which form of a UNet TensorRT runs fastest, beside what a user would run instead. Every try, with what was expected.

    python benchmarks/performance.py export FOLDER                     needs torch, no GPU
    python benchmarks/performance.py torch FOLDER                      needs torch with CUDA
    python benchmarks/performance.py engines FOLDER -o RESULT.json     needs TensorRT on a GPU
        [--networks unet camvid] [--camvid DIR] [--date 2026-11-21] [--seconds 400] [--tries PATTERN…]

``unet`` has 64 base channels and biases that differ, as training leaves them; ``unet-nearest`` doubles pixels
instead of interpolating; ``unet-upconv`` has a 3×3 convolution and Relu behind that; ``camvid`` is the shipped network.
``engines`` builds the tries of ``TRIES`` one after the other, times all of them in turns (A B A B …), and writes the
result after each step. It goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from pipeline.config import CalibrateConfig, Config, EngineConfig, load_config
from pipeline.metrics.interleaving import interleave

REPOSITORY = Path(__file__).resolve().parent.parent
LARGE = {"in_channels": 1, "classes": 4, "base_channels": 64}
NETWORKS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "unet": ("cells", LARGE),
    "unet-nearest": ("cells", {**LARGE, "upsampling": "nearest"}),
    "unet-upconv": ("cells", {**LARGE, "upsampling": "nearest"}),
    "camvid": ("camvid", None),
}
OPSET, LARGE_BATCH, CALIBRATION_IMAGES = 19, 8, 16
SLICE_SECONDS, SLICE_WARMUP_SECONDS, ROUNDS = 0.06, 0.015, 8
COPIES = ("reformat", "concat")
# What the driver lets persist of an H200's 50 MiB of L2.
PERSISTING_L2_BYTES = 32 << 20
TORCH_RUNS, TORCH_WARM_UPS = 200, 50


@dataclass(frozen=True)
class Try:
    """One engine.

    Attributes:
        expected: what was predicted of it before it was measured.
        kind: how its types are chosen; ``own``: by TensorRT's own INT8 calibrator.
        edit: of ``variants.EDITS``, made in the clean graph.
        qdq: ``shared`` gives all that a pool, resize or concatenation joins one range.
        level, iterations: ``engine.optimization_level`` and ``timing_iterations``.
        raw: the graph as exported.
        keep: share of the L2 cache in which TensorRT may keep activations (``persistent_cache_limit``).
        threads: ``engine.build_threads``.
        fresh: without the kernel times of earlier builds, so that it may choose others.
        narrow: pairs before each Resize and the Relu behind it, so that both work on INT8.
        sparse: two of four weights are zero (timing only: the network was not trained so), and kernels may know it.
        takes: type and format of the image, of ``FORMATS``; int8: in steps of the calibration's.
        gives: that of the logits.
    """

    expected: str
    kind: Literal["fp32", "fp16", "explicit", "implicit", "own"] = "fp16"
    edit: str | None = None
    qdq: Literal["convolutions", "shared"] = "shared"
    exclude: Literal["first", "last"] | None = None
    level: int = 3
    iterations: int = 1
    batch: int = 1
    raw: bool = False
    keep: float = 0
    threads: int = 1
    narrow: bool = False
    fresh: bool = False
    sparse: bool = False
    takes: str = "float32"
    gives: str = "float32"


RELU, LAST = "relu after resize", "relu after the last resize"
CONV, DEPTHWISE = "convolution after resize", "depthwise after resize"
SPLIT, TIMES_ONE, EIGHT = "split convolutions", "input times one", "input of 8 channels"
TRANSPOSED, FOLDED = "transposed upsampling", "folded upsampling"
# A tensor of an engine: type, and TensorRT's name of the format.
FORMATS = {
    "float32": ("FLOAT", "LINEAR"),
    "half": ("HALF", "LINEAR"),
    "half by 8": ("HALF", "HWC8"),
    "int8": ("INT8", "LINEAR"),
    "int8 by 4": ("INT8", "CHW4"),
    "int8 by 32": ("INT8", "CHW32"),
}
TRIES = {
    "fp32": Try("in TF32, which TensorRT may use: less than the 3.98 ms of torch in TF32", "fp32"),
    "fp16": Try("four copies, of each Resize's result into its Concat, cost 0.06 of 0.75 ms"),
    "int8": Try("what is pooled and concatenated is requantized", "explicit", qdq="convolutions"),
    "int8, shared": Try("nothing is requantized: 0.05 ms less", "explicit"),
    "int8, shared, relu at the last": Try(
        "half of what all four give, in a quarter of the build time", "explicit", LAST
    ),
    "fp16, relu at the last": Try("half of what all four give, in a quarter of the build time", edit=LAST),
    "int8, shared, relu": Try("no copies into Concats: 0.02 ms less", "explicit", RELU),
    "int8, shared, relu in int8": Try(
        "Resize and Relu move half the bytes: 0.01 ms less", "explicit", RELU, narrow=True
    ),
    "int8, shared, relu in int8, level 5": Try("all together: 0.45 ms", "explicit", RELU, level=5, narrow=True),
    "int8, shared, relu in int8, batch 8": Try("0.30 ms an image", "explicit", RELU, batch=LARGE_BATCH, narrow=True),
    "int8, shared, takes int8": Try("quantizing the image, 0.018 ms, goes", "explicit", takes="int8"),
    "int8, shared, takes int8 by 4": Try("as the first kernel reads it: 0.015 ms less", "explicit", takes="int8 by 4"),
    "int8, shared, takes int8 by 32": Try("as wide as kernels compute: slower", "explicit", takes="int8 by 32"),
    "int8, shared, gives half": Try(
        "the last convolution writes half the bytes: 0.005 ms less", "explicit", gives="half"
    ),
    "int8, shared, relu in int8, takes int8 by 4, gives half": Try(
        "all together: 0.43 ms", "explicit", RELU, narrow=True, takes="int8 by 4", gives="half"
    ),
    "fp16, takes half": Try("0.008 ms less", takes="half"),
    "fp16, takes half by 8, gives half": Try(
        "no copies of image and logits: 0.02 ms less", takes="half by 8", gives="half"
    ),
    "fp16, relu, takes half by 8, gives half": Try("all together: 0.70 ms", edit=RELU, takes="half by 8", gives="half"),
    "int8, shared, sparse": Try("TensorRT 8.6 finds no zeros behind Q/DQ: equal", "explicit", sparse=True),
    "int8, shared, relu in int8, sparse": Try(
        "both gains together: 0.42 ms", "explicit", RELU, narrow=True, sparse=True
    ),
    "int8, shared, sparse, batch 8": Try("as implicit: 0.34 ms an image", "explicit", batch=LARGE_BATCH, sparse=True),
    "implicit, sparse": Try("convolutions of 256 channels and more a third faster: 0.42 ms", "implicit", sparse=True),
    "implicit, sparse, batch 8": Try("0.28 ms an image", "implicit", batch=LARGE_BATCH, sparse=True),
    "fp16, sparse": Try("convolutions of 256 channels and more a third faster", sparse=True),
    "int8, shared, relu, level 5": Try("both gains together: 0.45 ms", "explicit", RELU, level=5),
    "fp16, relu": Try("a pointwise kernel writes into the Concat: 0.03 ms less", edit=RELU),
    "int8, shared, timed 8 times": Try("a steadier choice of kernels, 1 percent", "explicit", iterations=8),
    "int8, shared, level 5": Try("more kernels to choose from, a few percent", "explicit", level=5),
    "int8, shared, kept in L2": Try("activations of 16 MB fit into half of 50 MB: 5 percent", "explicit", keep=0.5),
    "fp16, kept in L2": Try("activations of 32 MB do not fit: equal", keep=0.5),
    "int8, shared, batch 8": Try("0.30 ms an image", "explicit", batch=LARGE_BATCH),
    "int8, shared, relu, batch 8": Try("0.30 ms an image", "explicit", RELU, batch=LARGE_BATCH),
    "fp16, transposed": Try("neither Resizes nor copies, 3 percent more arithmetic: 0.68 ms", edit=TRANSPOSED),
    "int8, shared, transposed": Try("the same: 0.43 ms", "explicit", TRANSPOSED),
    "int8, shared, transposed, level 5": Try("a few percent less", "explicit", TRANSPOSED, level=5),
    "int8, shared, transposed, batch 8": Try("0.31 ms an image", "explicit", TRANSPOSED, batch=LARGE_BATCH),
    "fp16, folded": Try("4 instead of 9 multiplications a value, no Resize: a tenth less", edit=FOLDED),
    "int8, shared, folded": Try("4 instead of 9 multiplications a value, no Resize: a tenth less", "explicit", FOLDED),
    "fp16, 16 threads": Try("kernels are compiled at once: built in half the time", threads=16),
    "int8, shared, 16 threads": Try("kernels are compiled at once: built in 20 s", "explicit", threads=16),
    "int8, shared, level 2": Try("fewer kernels tried: built in 15 s, as fast", "explicit", level=2),
    "raw, fp16": Try("copies and constants that cleaning removes", raw=True),
    "fp16, again": Try("builds vary by 1 percent", fresh=True),
    "int8, shared, again": Try("builds vary by 1 percent", "explicit", fresh=True),
    "fp16, once more": Try("builds vary by 1 percent", fresh=True),
    "int8, shared, once more": Try("builds vary by 1 percent", "explicit", fresh=True),
    "fp16, convolution": Try("a convolution writes into the Concat: 0.03 ms less", edit=CONV),
    "fp16, depthwise": Try("so does a depthwise one, with less arithmetic", edit=DEPTHWISE),
    "int8, shared, convolution": Try("no copies into Concats: 0.04 ms less", "explicit", CONV),
    "int8, shared, depthwise": Try("no copies into Concats: 0.04 ms less", "explicit", DEPTHWISE),
    "fp16, convolution, input times one": Try("the input's copy, 0.016 ms, becomes a quick kernel", edit=TIMES_ONE),
    "fp16, convolution, input of 8 channels": Try("a tensor core kernel for the first layer", edit=EIGHT),
    "int8, shared, convolution, batch 8": Try("0.30 ms an image", "explicit", CONV, batch=LARGE_BATCH),
    "fp16, level 5": Try("more kernels to choose from, a few percent", level=5),
    "int8, shared, first in fp16": Try("the first layer has little to gain", "explicit", exclude="first"),
    "int8, shared, last in fp16": Try("the last layer is limited by memory", "explicit", exclude="last"),
    "int8, shared, split": Try("no Concat at all, at the price of one more addition", "explicit", SPLIT),
    "fp16, split": Try("no Concat at all, at the price of one more addition", edit=SPLIT),
    "implicit": Try("as explicit", "implicit"),
    "raw, own calibrator": Try("what a user of TensorRT alone gets", "own", raw=True),
}


def export(folder: Path, name: str) -> None:
    """Write ``raw.onnx`` and ``raw-8.onnx`` (batch 8), as torch's exporter leaves them."""
    import torch

    module, config = _module(name), _config(name, ".")
    spec = config.preprocessing
    for batch in (1, LARGE_BATCH):
        target = _raw(folder, name, batch)
        target.parent.mkdir(parents=True, exist_ok=True)
        example = torch.zeros(batch, spec.channel_count, spec.height, spec.width)
        with torch.inference_mode():
            torch.onnx.export(
                module,
                (example,),
                str(target),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
            )


def torch_rows(name: str) -> dict[str, Any]:
    """Median milliseconds of one inference, by CUDA events, of what a user of torch alone would run."""
    import torch

    module, spec = _module(name).cuda(), _config(name, ".").preprocessing
    image = torch.randn(1, spec.channel_count, spec.height, spec.width, device="cuda")
    last: Any = {"memory_format": torch.channels_last}

    def tf32(on: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

    def timed(run: Any, fed: Any) -> float:
        with torch.inference_mode():
            for _ in range(TORCH_WARM_UPS):
                run(fed)
            marks = [
                [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
                for _ in range(TORCH_RUNS)
            ]
            for before, after in marks:
                before.record()
                run(fed)
                after.record()
            torch.cuda.synchronize()
        return round(float(np.median([before.elapsed_time(after) for before, after in marks])), 5)

    rows: dict[str, float] = {}
    tf32(False)
    rows["torch eager, FP32"] = timed(module, image)
    tf32(True)
    rows["torch eager, TF32"] = timed(module, image)
    half = module.half().to(**last)
    fed = image.half().to(**last)
    rows["torch eager, FP16 channels-last"] = timed(half, fed)
    compiled = torch.compile(half, mode="max-autotune")
    rows["torch.compile max-autotune, FP16 channels-last"] = timed(compiled, fed)
    return {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "median_ms": rows}


class Bench:
    """Engines of one network on one GPU, in a result file that is written after every step."""

    def __init__(self, folder: Path, name: str, result: dict[str, Any], output: Path, root: str) -> None:
        from pipeline.backends.onnxruntime import OnnxRuntimeRunner
        from pipeline.backends.tensorrt import api
        from pipeline.data.dataset import open_dataset
        from pipeline.data.preprocessing import preprocess

        self.trt, self.folder, self.name, self.output = api(), folder, name, output
        self.config = _config(name, root)
        self.result = result
        self.rows: dict[str, Any] = result["networks"].setdefault(name, {}).setdefault("tries", {})
        (sample,) = open_dataset(self.config.data, self.config.preprocessing, "validation").first(1)
        self.image = preprocess(sample.image, self.config.preprocessing)[np.newaxis]
        with OnnxRuntimeRunner(_raw(folder, name, 1)) as runner:
            self.reference = runner({"image": self.image})["logits"]

    def build(self, label: str, tried: Try) -> None:
        """Build one engine and look into it; what fails is recorded, as it must not end the run."""
        from pipeline.backends.base import BuildRequest
        from pipeline.backends.layers import parse_layers
        from pipeline.backends.tensorrt import TensorrtBuilder
        from pipeline.graph.io import save_model

        if label in self.rows and (self._plan(label).exists() or "error" in self.rows[label]):
            return
        row: dict[str, Any] = {"expected": tried.expected}
        try:
            model, table = self._graph(tried)
            path = self.folder / self.name / f"{_stem(label)}.onnx"
            save_model(model, path)
            request = BuildRequest(
                path,
                tried.kind if tried.kind in ("fp32", "fp16") else "int8",
                "explicit" if tried.kind == "explicit" else "implicit",
                EngineConfig(
                    backend="tensorrt",
                    optimization_level=tried.level,
                    timing_iterations=tried.iterations,
                    build_threads=tried.threads,
                    sparsity=tried.sparse,
                ),
                table,
                timing_cache=None if tried.fresh else self._timings(tried),
                define=functools.partial(_define, path, tried),
            )
            made = TensorrtBuilder().build(request)
            self._plan(label).write_bytes(made.plan)
            with self._runner(label) as runner:
                feeds = self._feeds(tried)
                logits = runner(feeds)["logits"]
                times = runner.profile(feeds)
                layers = parse_layers(runner.layers())
            row |= {
                "build_seconds": round(made.seconds, 2),
                "timing_cache": made.timing_cache,
                "engine_bytes": len(made.plan),
                "layers": len(layers),
                "copies": sum(layer.group in COPIES for layer in layers),
                "copies_ms": round(sum(times.get(layer.name, 0) for layer in layers if layer.group in COPIES), 5),
                "agreement": float((logits.argmax(1) == self.reference.argmax(1)).mean()),
                "max_relative_error": float(np.abs(logits - self.reference).max() / np.abs(self.reference).max()),
                "profile_ms": {layer.name: round(times.get(layer.name, 0), 5) for layer in layers},
            }
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:600]
            self._plan(label).unlink(missing_ok=True)
        self.rows[label] = row
        self.save()
        shown = {key: value for key, value in row.items() if key not in ("expected", "profile_ms", "engine_bytes")}
        print(f"{self.name}: {label}: {shown}", flush=True)

    def time(self) -> None:
        """All engines there are, in turns."""
        labels = [label for label in TRIES if label in self.rows and self._plan(label).exists()]
        if not labels:
            return
        with ExitStack() as stack:
            runners = {label: stack.enter_context(self._runner(label)) for label in labels}
            for label, runner in runners.items():
                if TRIES[label].keep:
                    runner._context.persistent_cache_limit = int(TRIES[label].keep * PERSISTING_L2_BYTES)

            feeds = {label: self._feeds(TRIES[label]) for label in labels}

            def turn(label: str) -> NDArray[np.float64]:
                times: NDArray[np.float64] = runners[label].device_milliseconds(
                    feeds[label], SLICE_SECONDS, SLICE_WARMUP_SECONDS
                )
                return times

            turns = interleave({label: functools.partial(turn, label) for label in labels}, ROUNDS)
            for label in labels:
                found = turns.latency(label)
                self.rows[label] |= {
                    "median_ms": round(found.median, 5),
                    "interval_ms": [round(found.low, 5), round(found.high, 5)],
                    "cuda_graph": runners[label].captured,
                }
                print(f"{self.name}: {label:36} {found.median:.4f} ms [{found.low:.4f}, {found.high:.4f}]", flush=True)
        self.save()

    def save(self) -> None:
        self.output.write_text(json.dumps(self.result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _graph(self, tried: Try) -> tuple[Any, Any]:
        """The graph to build, and the table that the implicit route needs."""
        from variants import EDITS, half_of_weights, resizes_in_int8, without_quantizing

        from pipeline.backends.tensorrt import calibrate_with_tensorrt
        from pipeline.graph.io import load_model
        from pipeline.graph.placement import implicit_ranges
        from pipeline.graph.quantize import quantize

        path = _raw(self.folder, self.name, tried.batch)
        if tried.raw:
            if tried.kind == "fp16":
                return load_model(path), None
            batches = [{"image": self.image}] * 2
            return load_model(path), calibrate_with_tensorrt(path, batches, "entropy", EngineConfig())
        model = load_model(self._clean(tried.batch))
        convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
        exclude = {"first": convolutions[:1], "last": convolutions[-1:], None: []}[tried.exclude]
        for edit in (EDITS[tried.edit][1] if tried.edit else None, half_of_weights if tried.sparse else None):
            model = _edited(model, edit)
        if tried.kind in ("fp32", "fp16"):
            return model, None
        table = self._table(model)
        if tried.kind == "implicit":
            return model, implicit_ranges(model, table)
        typed = quantize(model, table, half=False, exclude=exclude, qdq=tried.qdq)
        typed = _edited(typed, resizes_in_int8 if tried.narrow else None)
        return _edited(typed, without_quantizing if tried.takes.startswith("int8") else None), None

    def _clean(self, batch: int) -> Path:
        from pipeline.stages.clean import clean

        raw = _raw(self.folder, self.name, batch)
        target = raw.with_name(raw.name.replace("raw", "clean"))
        if not target.exists():
            clean(raw, target, None, self.config.clean.tolerance)
        return target

    def _table(self, model: Any) -> Any:
        """Ranges from our GPU calibrator; a tensor that an edit added has the range of what it was made from."""
        from pipeline.calibration.table import read_cache
        from pipeline.data.dataset import open_dataset
        from pipeline.graph.placement import activation_tensors
        from pipeline.stages.calibrate import calibrate

        clean, cache = self._clean(1), self._cache()
        if not cache.exists():
            samples = open_dataset(self.config.data, self.config.preprocessing, "train").first(CALIBRATION_IMAGES)
            settings = CalibrateConfig(calibrator="gpu", images=CALIBRATION_IMAGES)
            calibrate(clean, samples, settings, self.config.preprocessing, cache, cache.with_suffix(".json"))
        table = read_cache(cache)
        makers = {node.output[0]: node.input[0] for node in model.graph.node}
        amax = dict(table.amax)
        for tensor in activation_tensors(model):
            amax.setdefault(tensor, amax[makers[tensor]] if tensor in makers else max(amax.values()))
        return replace(table, amax=amax, report=None)

    def _cache(self) -> Path:
        return self._clean(1).with_suffix(".cache")

    def _feeds(self, tried: Try) -> dict[str, NDArray[Any]]:
        from pipeline.calibration.table import read_cache

        image: NDArray[Any] = self.image
        if tried.takes.startswith("int8"):
            step = np.float32(read_cache(self._cache()).amax["image"] / 127)
            image = np.clip(np.rint(image / step), -128, 127).astype(np.int8)
        elif tried.takes.startswith("half"):
            image = image.astype(np.float16)
        return {"image": np.repeat(image, tried.batch, axis=0)}

    def _runner(self, label: str) -> Any:
        from formats import FormattedRunner

        return FormattedRunner(self.trt, self._plan(label).read_bytes())

    def _timings(self, tried: Try) -> Path:
        """The timing cache, shared by builds of the same settings alone."""
        settings = f"{tried.kind}-{tried.level}-{tried.iterations}-{tried.threads}-{tried.sparse}"
        return self.folder / self.name / f"{'raw' if tried.raw else 'clean'}-{settings}.timing"

    def _plan(self, label: str) -> Path:
        return self.folder / self.name / f"{_stem(label)}.engine"


def _edited(model: ModelProto, edit: Callable[[ModelProto], ModelProto | None] | None) -> ModelProto:
    """What an edit makes of a model that has something of its kind; without an edit the model."""
    if edit is None:
        return model
    result = edit(model)
    assert result is not None
    return result


def _define(path: Path, tried: Try, trt: Any, network: Any) -> None:
    """Read the graph into the network, and give its image and its logits their formats."""
    from pipeline.backends.nvinfer import parse

    parse(trt, network, path)
    for tensor, wanted in ((network.get_input(0), tried.takes), (network.get_output(0), tried.gives)):
        if wanted != "float32":
            kind, form = FORMATS[wanted]
            tensor.dtype = getattr(trt.DataType, kind)
            tensor.allowed_formats = 1 << int(getattr(trt.TensorFormat, form))


def _module(name: str) -> Any:
    """The network in eval mode; a fresh one gets the statistics and biases of a trained one, the same at every call."""
    import torch

    from pipeline.networks import build_network

    _, arguments = NETWORKS[name]
    update = {} if arguments is None else {"arguments": arguments, "weights": None}
    torch.manual_seed(0)
    module: Any = build_network(_config(name, ".").network.model_copy(update=update)).eval()
    if name == "unet-upconv":
        for block in (module.up1, module.up2, module.up3, module.up4):
            channels = block.conv.double_conv[0].in_channels // 2
            block.up = torch.nn.Sequential(block.up, torch.nn.Conv2d(channels, channels, 3, padding=1), torch.nn.ReLU())
    if arguments is not None:
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                with torch.no_grad():
                    layer.running_mean.normal_(0, 0.1)
                    layer.running_var.uniform_(0.5, 1.5)
                    layer.weight.uniform_(0.8, 1.2)
                    layer.bias.normal_(0, 0.1)
    return module


def _config(name: str, root: str) -> Config:
    config, _ = NETWORKS[name]
    return load_config(REPOSITORY / "configs" / f"{config}.yaml", [] if config == "cells" else [f"data.root={root}"])


def _raw(folder: Path, name: str, batch: int) -> Path:
    return folder / name / ("raw.onnx" if batch == 1 else f"raw-{batch}.onnx")


def _stem(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label)


def engines(options: argparse.Namespace) -> None:
    from pipeline.backends import cuda
    from pipeline.backends.tensorrt import api

    end = time.monotonic() + options.seconds
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result: dict[str, Any] = {
        "date": options.date or now,
        "device": asdict(cuda.current_device()),
        "tensorrt": api().__version__,
        "method": f"CUDA events around each inference, CUDA graphs, {ROUNDS} rounds (A B B A) in turns of "
        f"{SLICE_SECONDS} s an engine after warm-up; median of the rounds and its distribution-free interval; "
        f"torch: median of {TORCH_RUNS} inferences, its own process, CUDA events",
        "networks": {},
    }
    if options.output.exists():
        result |= json.loads(options.output.read_text(encoding="utf-8"))
    for place, name in enumerate(options.networks):
        bench = Bench(options.folder, name, result, options.output, options.camvid)
        rows = options.folder / name / "torch.json"
        if rows.exists():
            result["networks"][name]["torch"] = json.loads(rows.read_text(encoding="utf-8"))
        share = time.monotonic() + (end - time.monotonic()) / (len(options.networks) - place)
        for label, tried in TRIES.items():
            if any(fnmatchcase(label, pattern) for pattern in options.tries):
                if time.monotonic() > share:
                    print(f"{name}: the time is up before {label}", flush=True)
                    break
                bench.build(label, tried)
        bench.time()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting, torching, building = (commands.add_parser(name) for name in ("export", "torch", "engines"))
    for command in (exporting, torching, building):
        command.add_argument("folder", type=Path)
        command.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    building.add_argument("-o", "--output", type=Path, required=True)
    building.add_argument("--camvid", default=".", help="the images' folder")
    building.add_argument("--date", help="of the measurement, where the machine's clock is wrong")
    building.add_argument("--seconds", type=float, default=math.inf, help="no build begins later")
    building.add_argument("--tries", nargs="+", default=["*"], help="patterns of labels")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    if options.command == "engines":
        engines(options)
        return
    for name in options.networks:
        if options.command == "export":
            export(options.folder, name)
        else:
            rows = torch_rows(name)
            (options.folder / name / "torch.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            print(name, rows["median_ms"], flush=True)


if __name__ == "__main__":
    main()
