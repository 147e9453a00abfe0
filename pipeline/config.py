"""The models of ``configs/*.yaml``: unknown keys, wrong types and impossible combinations end in ConfigError.

Relative paths in a file are relative to that file; relative paths given with ``--set`` are relative to the current
folder. ``$NAME`` and ``${NAME}`` in a path are replaced from the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from pipeline.errors import ConfigError
from pipeline.slips import did_you_mean, nearest

Task = Literal["segmentation", "tensors"]
Precision = Literal["fp32", "fp16", "int8", "mixed"]
BackendName = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]
Route = Literal["auto", "implicit", "explicit"]
Source = Literal["onnx", "network-api"]
Axis = Literal["batch", "height", "width"]
Algorithm = Literal["entropy", "minmax", "percentile", "mse"]
Placement = Literal["convolutions", "shared"]
Calibrator = Literal["auto", "cpu", "gpu", "tensorrt"]
Rival = Literal[
    "torch-fp32",
    "torch-tf32",
    "torch-fp16",
    "torch-compile",
    "torch-compile-max-autotune",
    "onnxruntime-cuda",
    "raw-engine",
    "polygraphy",
    "trtexec",
]

# Built when nobody names any; mixed only on request, since its search takes long.
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
ALL_PRECISIONS: tuple[Precision, ...] = (*PRECISIONS, "mixed")
# What calibrated ranges are needed for.
QUANTIZED: tuple[Precision, ...] = ("int8", "mixed")
# The one factory that engine.source: network-api knows.
UNET = "models.unet:UNet"
PATH_KEYS = ("network.weights", "network.onnx", "data.root")


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    text = os.path.expandvars(str(path))
    unset = re.findall(r"\$\{?(\w+)\}?", text)
    if unset:
        raise ValueError(f"the environment variable {unset[0]} is not set")
    return Path(base, text).resolve()


ConfigPath = Annotated[Path, AfterValidator(_resolve)]
Colour = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]


class Strict(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkConfig(Strict):
    """Where the network comes from: a torch factory with weights, or an ONNX file."""

    factory: str | None = Field(None, pattern=r"^[\w.]+:\w+$", description="package.module:callable")
    arguments: dict[str, Any] = Field(
        {}, description="of the factory; what it can infer from the weights may be left out"
    )
    weights: ConfigPath | None = Field(None, description=".safetensors, .pth, .pt or .wts with a state dict")
    onnx: ConfigPath | None = Field(None, description="an ONNX file, in place of factory, arguments and weights")

    @model_validator(mode="after")
    def _one_source(self) -> NetworkConfig:
        if (self.factory is None) == (self.onnx is None):
            raise ValueError("give either factory (with weights) or onnx, not both")
        if self.onnx is not None and (self.weights or self.arguments):
            raise ValueError("weights and arguments belong to factory; an onnx file holds its own weights")
        return self


class PreprocessingConfig(Strict):
    """Image (uint8, HWC) to network input (float32, CHW): resize, channel order, ``(x * scale - mean) / std``.

    It has to be what the network was trained with.
    """

    height: int = Field(gt=0, description="of the network's input, in pixels")
    width: int = Field(gt=0, description="of the network's input, in pixels")
    resize: Literal["stretch", "letterbox", "none"] = Field(
        "none",
        description="stretch: to height × width; letterbox: keep the proportions and pad; none: images have that size, "
        "and prediction cuts larger ones into tiles",
    )
    interpolation: Literal["bilinear", "nearest"] = Field("bilinear", description="of the image, where it is resized")
    channels: Literal["grey", "rgb", "bgr"] = Field("rgb", description="that the network takes, in this order")
    scale: float = Field(1 / 255, gt=0, description="factor of the 8-bit values")
    mean: tuple[float, ...] = Field((0.0,), description="subtracted after scale; one value, or one a channel")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), description="divided by after mean; one value, or one a channel"
    )
    pad_value: int = Field(0, ge=0, le=255, description="8-bit value of what letterbox adds")

    @property
    def channel_count(self) -> int:
        return 1 if self.channels == "grey" else 3

    @model_validator(mode="after")
    def _lengths(self) -> PreprocessingConfig:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channel_count):
                raise ValueError(f"{name} needs 1 or {self.channel_count} values for channels: {self.channels}")
        return self


class ClassConfig(Strict):
    """One class of the label maps; its id is its place in the list."""

    name: str = Field(description="in reports; no two alike")
    colour: Colour = Field(description="red, green, blue of masks and overlays, 0 to 255 each")
    category: str | None = Field(None, description="group of classes that is judged as one too, as Cityscapes does")


class SplitConfig(Strict):
    """Folders of one split, relative to ``data.root``; labels may be absent where none are needed.

    Or patterns such as ``leftImg8bit/train/*/*_leftImg8bit.png``: files are called by what the star of the last part
    stands for.
    """

    images: str = Field(description="folder or pattern of images")
    labels: str | None = Field(None, description="folder or pattern of label maps, which have the images' names")


class DataConfig(Strict):
    """The images that the network is trained, calibrated and validated on."""

    kind: Literal["cells", "shapes", "folder"] = Field(
        description="folder: image files; cells: built-in images with label maps; shapes: built-in images with boxes"
    )
    classes: tuple[ClassConfig, ...] = Field(
        (), max_length=255, description="in the order of their ids; two or more, but for task: tensors"
    )
    void: int | None = Field(None, ge=0, le=255, description="label value that no metric counts")
    label_values: dict[int, int] | None = Field(None, description="value in the label file -> class id; default: equal")
    seed: int = Field(0, description="of built-in images, and of the choice of a validation split")
    root: ConfigPath | None = Field(None, description="folder that the splits are relative to; kind: folder only")
    train: SplitConfig | None = Field(None, description="needed with kind: folder; calibration images come from here")
    validation: SplitConfig | None = Field(None, description="that judges engines; default: a share of train")
    calibration: SplitConfig | None = Field(None, description="default: a seeded choice of the training images")
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="of train, where no validation split is named")
    train_images: int = Field(400, gt=0, description="cells and shapes only")
    validation_images: int = Field(32, gt=0, description="cells and shapes only")

    @model_validator(mode="after")
    def _kind(self) -> DataConfig:
        if self.kind == "folder" and (self.root is None or self.train is None):
            raise ValueError("kind: folder needs root and train")
        if self.kind != "folder" and (self.root or self.train or self.validation or self.calibration):
            raise ValueError(
                f"kind: {self.kind} is generated; root, train, validation and calibration belong to kind: folder"
            )
        if self.void is not None and self.void < len(self.classes):
            raise ValueError(f"void is {self.void}, which is the id of class {self.classes[self.void].name!r}")
        without = [c.name for c in self.classes if c.category is None]
        if 0 < len(without) < len(self.classes):
            raise ValueError(f"give every class a category, or none: {without[0]!r} has none")
        names = [c.name for c in self.classes]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two classes are named {twice[0]!r}")
        return self


class ExportConfig(Strict):
    """torch -> ONNX."""

    opset: int = Field(19, ge=11, le=23, description="of the ONNX file; dynamo writes 18 at least")
    exporter: Literal["dynamo", "torchscript"] = Field("dynamo", description="try the other where one refuses")
    batch: int = Field(1, gt=0, description="of a static graph, and the example of a dynamic one")
    dynamic: tuple[Axis, ...] = Field((), description="axes left free; each needs engine.profile")
    outputs: tuple[str, ...] = Field((), description="names, of task: tensors; default: output_0, output_1, …")
    compare_images: int = Field(2, gt=0, description="images on which torch and ONNX Runtime are compared")
    tolerance: float = Field(1e-3, gt=0, description="max |torch - onnx| / max |torch|")


class CleanConfig(Strict):
    """Graph rewriting."""

    tolerance: float = Field(
        1e-5, gt=0, description="largest accepted change of any output, relative to its largest value"
    )
    input: Literal["float", "image"] = Field("float", description="image: uint8 (N, H, W, C), normalised in the graph")
    output: Literal["logits", "labels", "probabilities"] = Field(
        "logits", description="labels: uint8 (N, H, W); probabilities: softmax over the classes"
    )
    equalize: int = Field(
        0, ge=0, description="calibration images by which a tensor's channels get like ranges, for INT8; 0: as they are"
    )


class CalibrateConfig(Strict):
    """How activation ranges are chosen."""

    algorithm: Algorithm | Literal["auto"] = Field(
        "entropy", description="auto: the one whose INT8 masks agree best with FP32's on held-out calibration images"
    )
    calibrator: Calibrator = Field(
        "auto", description="where activations are computed; auto: gpu where that is possible, otherwise cpu"
    )
    images: int = Field(32, gt=0, description="how many, of a seeded choice")
    batch: int = Field(1, gt=0, description="images fed at a time; the graph's batch has to be free or as many")
    bins: int = Field(2048, ge=256, description="of the histograms that entropy and mse search")
    percentile: float = Field(99.99, gt=0, le=100, description="of algorithm: percentile")
    skip_bad: bool = Field(False, description="go on without images that cannot be decoded")
    refine_steps: int = Field(
        0, ge=0, description="of gradient descent on ranges and biases towards FP32's scores; needs torch; 0: none"
    )
    refine_batch: int = Field(4, gt=0, description="images of one such step")
    seed: int = Field(0, description="of the choice of images, and of their order in refinement")

    @model_validator(mode="after")
    def _offered(self) -> CalibrateConfig:
        if self.calibrator == "tensorrt" and self.algorithm not in ("entropy", "minmax"):
            raise ValueError(f"calibrator: tensorrt offers the algorithms entropy and minmax, not {self.algorithm}")
        return self


class ProfileRange(Strict):
    """Sizes of one dynamic axis that an engine accepts."""

    min: int = Field(gt=0, description="smallest size")
    opt: int = Field(gt=0, description="size that kernels are chosen for")
    max: int = Field(gt=0, description="largest size")
    multiple_of: int = Field(
        1,
        gt=0,
        description="a promise that no other size is ever given, so that nodes which align sizes can go",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ProfileRange:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        for name in ("min", "opt", "max"):
            if getattr(self, name) % self.multiple_of:
                raise ValueError(f"{name} is {getattr(self, name)}, which is no multiple of {self.multiple_of}")
        return self


class EngineConfig(Strict):
    """ONNX -> engine."""

    precisions: tuple[Precision, ...] = Field(PRECISIONS, min_length=1, description="that are built by default")
    backend: BackendName = Field(
        "auto",
        description="auto: TensorRT where it can build here, else TensorRT-RTX; onnxruntime: typed graphs, no engine",
    )
    route: Route = Field(
        "auto",
        description="implicit: flags and calibration cache; explicit: typed graph with Q/DQ; auto: explicit for INT8, "
        "and wherever there are no flags",
    )
    source: Source = Field(
        "onnx", description="network-api: the UNet layer by layer from its weights, without an ONNX parser"
    )
    workspace_mib: int = Field(4096, gt=0, description="GPU memory that one layer may use while it runs")
    optimization_level: int = Field(
        3, ge=0, le=5, description="how many kernels are tried; 5: most, and slowest to build"
    )
    timing_iterations: int = Field(
        1, ge=1, le=100, description="how often each kernel is timed; more: a steadier choice, slower to build"
    )
    build_threads: int = Field(
        1, ge=1, le=256, description="threads that TensorRT may build with, to compile kernels for instance"
    )
    tf32: bool = Field(False, description="let FP32 layers compute in TF32: faster, with a mantissa of 10 bits")
    sparsity: bool = Field(
        False, description="in INT8, kernels for weights of which 2 in 4 are zero, as `unet-trt prune` leaves them"
    )
    hardware_compatible: bool = Field(False, description="for every GPU from Ampere on; slower than for this one alone")
    version_compatible: bool = Field(False, description="for later TensorRT of this major version too")
    refit: bool = Field(False, description="weights can be replaced in the engine; fewer fusions")
    profiling: Literal["detailed", "none"] = Field(
        "detailed", description="what `inspect` and profilers see of the layers; costs no time at inference"
    )
    timing_cache: bool = Field(True, description="reuse kernel times of earlier builds on this GPU")
    profile: dict[Axis, ProfileRange] = Field({}, description="sizes of each axis that the graph leaves free")
    exclude: tuple[str, ...] = Field((), description="node name patterns of convolutions that stay unquantized")
    qdq: Placement = Field(
        "shared",
        description="INT8 on the explicit route; convolutions: they alone; shared: pools, resizes, pads and "
        "concatenations too, with one range for all that they join",
    )
    fuse_resize: bool = Field(
        False,
        description="a Relu that changes no value between each Resize and its Concat: TensorRT then writes the one "
        "into the other, which is a few percent faster; builds can take twice as long; not in FP32",
    )
    input_bits: Literal[8, 9, 10] = Field(
        8,
        description="of the image in INT8, on the explicit route: 9 and 10 quantize it 2 and 4 times with staggered "
        "steps, for the convolutions that read it",
    )


class Tolerance(Strict):
    """When a precision counts as good enough, against FP32 on ONNX Runtime.

    ``atol``, ``rtol`` and ``statistic`` are Polygraphy's: an element fails only where it exceeds both; a statistic
    other than ``elemwise`` is compared instead of every element. Drops are fractions of 1, from FP32's figure on the
    labels to the candidate's; null judges none. A budget that needs labels is an error where there are no labels,
    unless it is a default.
    """

    atol: float = Field(ge=0, description="absolute tolerance of the outputs")
    rtol: float = Field(ge=0, description="relative tolerance of the outputs")
    statistic: Literal["elemwise", "max", "mean", "median", "quantile"] = Field(
        "elemwise", description="of the errors, that is held to atol and rtol"
    )
    quantile: float = Field(0.99, gt=0, le=1, description="of statistic: quantile")
    min_signal_to_error_db: float | None = Field(None, description="of every output, against FP32's")
    min_agreement: float | None = Field(None, ge=0, le=1, description="share of pixels with FP32's class")
    max_miou_drop: float | None = Field(None, ge=0, le=1, description="of mean IoU; needs labels")
    max_class_iou_drop: float | None = Field(None, ge=0, le=1, description="of any class's IoU; needs labels")
    max_dice_drop: float | None = Field(None, ge=0, le=1, description="of mean Dice; needs labels")
    min_boundary_f: float | None = Field(None, ge=0, le=1, description="mean boundary F-score against FP32's masks")
    max_boundary_f_drop: float | None = Field(None, ge=0, le=1, description="of mean boundary F-score; needs labels")

    def named_mask_budgets(self) -> list[str]:
        """Budgets that the config names and that only masks can keep."""
        keys = ("min_agreement", "min_boundary_f")
        named = [key for key in keys if key in self.model_fields_set and getattr(self, key) is not None]
        return [*named, *self.named_label_budgets()]

    def named_label_budgets(self) -> list[str]:
        """Budgets that the config names and that cannot be judged without labels."""
        keys = ("max_miou_drop", "max_class_iou_drop", "max_dice_drop", "max_boundary_f_drop")
        return [key for key in keys if key in self.model_fields_set and getattr(self, key) is not None]


DEFAULT_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=1e-3, rtol=1e-3, min_agreement=0.9995, max_miou_drop=0.0005, max_class_iou_drop=0.002),
    "fp16": Tolerance(
        atol=0.1, rtol=0.01, statistic="quantile", min_agreement=0.998, max_miou_drop=0.002, max_class_iou_drop=0.01
    ),
    "int8": Tolerance(
        atol=1.0, rtol=0.1, statistic="mean", min_agreement=0.97, max_miou_drop=0.01, max_class_iou_drop=0.03
    ),
    "mixed": Tolerance(
        atol=1.0, rtol=0.1, statistic="mean", min_agreement=0.97, max_miou_drop=0.001, max_class_iou_drop=0.02
    ),
}


# Of outputs whose unit and range nobody knows: energy against that of the error.
DEFAULT_TENSOR_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=1e-3, rtol=1e-3, statistic="mean", min_signal_to_error_db=80),
    "fp16": Tolerance(atol=0.1, rtol=0.01, statistic="mean", min_signal_to_error_db=40),
    "int8": Tolerance(atol=1.0, rtol=0.1, statistic="mean", min_signal_to_error_db=15),
}


class MixedConfig(Strict):
    """``precision: mixed``: which convolutions stay FP16 so that the masks keep a budget at the least latency.

    Both budgets hold on calibration images that chose no range, and are judged on whole graphs. The default drop is
    about a third of what ``validate`` allows: images that trained the network lose less than others (docs/mixed.md).
    """

    max_miou_drop: float | None = Field(
        0.0003, ge=0, le=1, description="fraction of 1, from FP32's mean IoU; needs labels"
    )
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="share of pixels with FP32's class; needed where there are no labels"
    )
    judge_by: Literal["figure", "interval"] = Field(
        "interval", description="interval: the upper end of the drop's 95 % interval over images has to keep the budget"
    )
    images: int = Field(64, gt=0, description="held out from the calibration split; fewer where it is small")
    sensitivity_images: int = Field(
        8, gt=0, description="of these, evenly spread, on which single convolutions are tried"
    )
    candidates: int = Field(40, ge=4, description="whole graphs that are judged at most")
    finalists: int = Field(4, gt=0, description="of those within the budget, how many a GPU times")
    seed: int = Field(0, description="of the choice of held-out images")

    @model_validator(mode="after")
    def _judged(self) -> MixedConfig:
        if self.max_miou_drop is None and self.min_agreement is None:
            raise ValueError("give max_miou_drop or min_agreement: without a budget all INT8 is best")
        return self


class ValidateConfig(Strict):
    """Which images judge an engine, and the bounds."""

    images: int | None = Field(None, gt=0, description="the first N validation images; default: all")
    pictures: int = Field(4, ge=0, description="images whose masks and overlays are written; the page shows as many")
    saved_runs: int = Field(2, ge=0, description="images whose raw outputs are saved as Polygraphy JSON")
    boundary_tolerance: float = Field(
        0.0075, gt=0, le=0.1, description="share of the image's diagonal by which outlines may differ"
    )
    near_tie: float = Field(
        0.01, ge=0, le=1, description="share of FP32's output range; flipped pixels of a smaller margin count apart"
    )
    resamples: int = Field(1000, ge=100, le=100_000, description="of images, for confidence intervals")
    seed: int = Field(0, description="of the resamples")
    tolerances: dict[Precision, Tolerance] = Field({}, description="budgets that replace a precision's defaults")

    def tolerance(self, precision: Precision, task: Task = "segmentation") -> Tolerance:
        defaults = DEFAULT_TOLERANCES if task == "segmentation" else DEFAULT_TENSOR_TOLERANCES
        return self.tolerances.get(precision, defaults[precision])


class BenchmarkConfig(Strict):
    """How long each candidate is timed."""

    seconds: float = Field(3.0, gt=0, description="per candidate, after warm-up")
    warmup_seconds: float = Field(0.5, ge=0, description="at least; engines go on until their latency is stable")
    rounds: int = Field(12, ge=6, description="of engines taking turns; fewer than 6 give no interval of 95 %")
    min_speedup: float = Field(1.0, gt=0, description="INT8 is worthwhile where it is surely faster than FP16 by more")
    candidates: tuple[Rival, ...] | Literal["all"] = Field(
        (), description="timed beside FP32 on the CPU and the engines"
    )
    torch_python: str | None = Field(None, description="interpreter of the torch candidates; default: this one")
    compile_seconds: float = Field(300.0, gt=0, description="time limit of each torch.compile")
    throughput: bool = Field(False, description="time batches and streams too")
    batches: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (1, 2, 4, 8), min_length=1, description="of those, each candidate's are timed that it takes"
    )
    streams: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 2, 3, 4), min_length=1, description="of engines")

    @property
    def rivals(self) -> tuple[Rival, ...]:
        return get_args(Rival) if self.candidates == "all" else self.candidates


class TrainConfig(Strict):
    """Recipe of ``unet-trt train``."""

    steps: int = Field(1500, gt=0, description="of the optimizer, a batch each")
    batch: int = Field(4, gt=0, description="images a step")
    crop: tuple[int, int] | None = Field(None, description="height, width; default: whole images")
    learning_rate: float = Field(3e-3, gt=0, description="the highest; it rises first and then falls")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    dice_weight: float = Field(0.5, ge=0, description="of the Dice loss, beside cross-entropy with 1")
    class_weights: tuple[float, ...] | None = Field(None, description="of cross-entropy, one a class; default: equal")
    augment: tuple[Literal["flip_horizontal", "flip_vertical", "rotate", "brightness", "scale", "elastic"], ...] = (
        Field((), description="random changes of training images")
    )
    seed: int = Field(0, description="of initial weights, order and augmentation")


class Config(Strict):
    """One network and its data, from weights to verdict."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the folder below build/")
    task: Task = Field(
        "segmentation", description="tensors: any network of one image, judged by its outputs' values alone"
    )
    network: NetworkConfig
    data: DataConfig
    preprocessing: PreprocessingConfig
    export: ExportConfig = ExportConfig()
    clean: CleanConfig = CleanConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    engine: EngineConfig = EngineConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    mixed: MixedConfig = MixedConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        missing = [axis for axis in self.export.dynamic if axis not in self.engine.profile]
        if missing:
            raise ValueError(
                f"export.dynamic names {missing[0]}, so engine.profile.{missing[0]} needs min, opt and max"
            )
        extra = [axis for axis in self.engine.profile if axis not in self.export.dynamic]
        if extra and self.network.onnx is None:
            raise ValueError(f"engine.profile.{extra[0]} is given, but export.dynamic does not name {extra[0]}")
        if self.task == "segmentation":
            self._has_masks()
        else:
            self._has_no_masks()
        weights = self.train.class_weights
        if weights is not None and len(weights) != len(self.data.classes):
            raise ValueError(f"train.class_weights needs {len(self.data.classes)} values, got {len(weights)}")
        if self.engine.route == "implicit" and self.engine.backend in ("tensorrt-rtx", "onnxruntime"):
            raise ValueError(f"route: implicit needs a TensorRT with calibrators, not backend: {self.engine.backend}")
        if self.engine.route == "implicit" and self.engine.input_bits > 8:
            raise ValueError("route: implicit takes the image in 8 bits alone, so engine.input_bits needs: explicit")
        if self.engine.source == "network-api":
            self._defines_unet()
        return self

    def _has_masks(self) -> None:
        if len(self.data.classes) < 2:
            raise ValueError(f"data.classes needs two classes or more, got {len(self.data.classes)}")
        if self.data.kind == "shapes":
            raise ValueError("data.kind: shapes has boxes and no label maps, so it needs task: tensors")
        if self.export.outputs:
            raise ValueError("export.outputs belongs to task: tensors; a segmentation network's output is its logits")
        for precision, tolerance in self.validate_.tolerances.items():
            missing = [key for key in ("min_agreement", "max_miou_drop") if key not in tolerance.model_fields_set]
            if missing:
                raise ValueError(f"validate.tolerances.{precision} needs {missing[0]}; null judges none")

    def _has_no_masks(self) -> None:
        if self.clean.output != "logits":
            raise ValueError(f"clean.output: {self.clean.output} needs classes by pixel, so task: segmentation")
        if self.calibrate.algorithm == "auto":
            raise ValueError("calibrate.algorithm: auto compares masks, so it needs task: segmentation; name another")
        if "mixed" in self.engine.precisions:
            raise ValueError("engine.precisions: mixed keeps a budget of masks, so it needs task: segmentation")
        for precision, tolerance in self.validate_.tolerances.items():
            budgets = tolerance.named_mask_budgets()
            if budgets:
                where = f"validate.tolerances.{precision}.{budgets[0]}"
                raise ValueError(f"{where} judges masks, so it needs task: segmentation")

    def _defines_unet(self) -> None:
        if self.network.factory != UNET or self.network.weights is None:
            raise ValueError(f"engine.source: network-api needs network.factory: {UNET} and network.weights")
        if (self.clean.input, self.clean.output) != ("float", "logits"):
            raise ValueError("engine.source: network-api has no clean.input or clean.output but float and logits")
        if self.engine.backend == "onnxruntime":
            raise ValueError("engine.source: network-api needs a TensorRT, not backend: onnxruntime")
        if self.engine.input_bits > 8:
            raise ValueError("engine.source: network-api takes the image in 8 bits alone, so no engine.input_bits")
        if self.calibrate.refine_steps:
            raise ValueError("engine.source: network-api takes the weights' biases, so no calibrate.refine_steps")
        if self.engine.fuse_resize:
            raise ValueError("engine.source: network-api defines the network as it is, so no engine.fuse_resize")
        if self.clean.equalize:
            raise ValueError("engine.source: network-api takes the weights as they are, so no clean.equalize")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``a.b=value`` overrides (values are YAML).

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), wrong type, impossible combination.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}{did_you_mean(path)}",
            expected="a YAML file such as configs/cells.yaml",
            fix="check -c / CONFIG=, or write one with `unet-trt init`",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: {error}", fix="name a YAML file") from error
    return parse_config(text, path, overrides)


def parse_config(text: str, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a text, as ``load_config`` reads it from a file.

    Args:
        path: of the file that holds the text, or will; relative paths are relative to it.

    Raises:
        ConfigError: as ``load_config``.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", fix="correct the file at the place named") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds no mapping", expected="keys such as name, network, data", got=type(raw).__name__
        )
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(raw, context={"base": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path} is not a valid configuration", *_explain(error)])) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not an assignment", expected="--set section.key=value", got=override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not valid YAML", got=text) from error
    value = _seen_from_here(key, value)
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {parent} holds no keys", got=f"{parent}: {child!r}")
        target = child
    target[last] = value


def _seen_from_here(key: str, value: Any) -> Any:
    """Paths of an override, at its key or within the mapping that it sets, belong to the working folder."""
    if isinstance(value, dict):
        return {name: _seen_from_here(f"{key}.{name}", each) for name, each in value.items()}
    return str(Path.cwd() / Path(value).expanduser()) if key in PATH_KEYS and isinstance(value, str) else value


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            near = nearest(str(item["loc"][-1]), known)
            lines.append(f"  {where}: unknown key{near or '; known keys: ' + ', '.join(known)}")
        else:
            got = "" if item["type"] == "missing" or not item["loc"] else f" (got {str(item['input'])[:120]!r})"
            values = re.findall("'([^']*)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
            near = nearest(str(item["input"]), values)
            lines.append(f"  {where}: {item['msg'].removeprefix('Value error, ')}{got}{near}")
        if item["loc"] == ("data", "root"):
            lines.append("  to fix: set the variable, or give --set data.root=FOLDER")
    return lines


def _keys_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] | None = Config
    for part in location:
        fields = {f.alias or name: f.annotation for name, f in model.model_fields.items()} if model else {}
        # What is no field is a key of a mapping, or a place in a list: the model is that of its values.
        model = _model_in(fields[str(part)]) if str(part) in fields else model
    return [f.alias or name for name, f in model.model_fields.items()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model within a type such as ``dict[str, Model]`` or ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
