"""Commands that write weights: train, prune, weights convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import card_of, load_settings, own_file, required
from pipeline.cli.endings import suggest_next
from pipeline.cli.options import BUILD, ConfigOption, JsonOption, SetOption
from pipeline.printing import print_json, print_pruning, print_table, suggest
from pipeline.progress import working


def train(
    config: ConfigOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: the config's network.weights.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train the network from scratch and write its weights with a card."""
    from pipeline.stages.train import train as train_network

    settings = load_settings(config, overrides)
    target = required(output or settings.network.weights, "-o WEIGHTS.safetensors")
    result = train_network(settings, target)
    if json:
        print_json(result)
        return
    rows = [(one.name, shown) for one, shown in zip(settings.data.classes, result.shown_iou, strict=True)]
    print_table(("class", "IoU, validation images"), rows, file=sys.stderr)
    print(f"{target}: mIoU {result.mean_iou_half:.4f} in {result.seconds:.0f} s")
    suggest_next("run", config, BUILD, overrides)


def prune(
    model: Annotated[Path, typer.Argument(help="CLEAN.onnx.")],
    images: Annotated[Path, typer.Option(help="Folder of images, which need no labels; not those of validation.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PRUNED.onnx; its report is <this>.json.")],
    steps: Annotated[int, typer.Option(help="Of gradient descent; camvid takes 22 a second on an H200.")] = 2000,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the images' order, and of which are mirrored.")] = 0,
    json: JsonOption = False,
) -> None:
    """Set half of the inner convolutions' weights to zero for sparse kernels, and teach the rest to make up for it."""
    import itertools

    from pipeline.data.dataset import image_folder
    from pipeline.graph.io import model_files
    from pipeline.stages.prune import prune as prune_file

    card = card_of(model)
    dataset = image_folder(images.absolute(), card.preprocessing.channels)
    inputs = [*model_files(model), *itertools.chain.from_iterable(dataset.files.values())]
    target = own_file(output, inputs)
    report = own_file(target.with_name(f"{target.name}.json"), inputs)
    result = prune_file(
        model.absolute(), dataset, card.preprocessing, target, report, steps=steps, batch=batch, seed=seed
    )
    if json:
        print_json(result)
        return
    print_pruning(result)
    print(target)
    suggest("unet-trt", "validate", model, "--engine", target, "--images", "DIR", "--labels", "DIR")


def convert_weights(
    source: Annotated[Path, typer.Argument(help="A.pth, .pt, .safetensors or .wts.")],
    target: Annotated[Path, typer.Argument(help="B.wts, .safetensors, .pth or .pt; the endings say the formats.")],
    like: Annotated[
        Path | None, typer.Option(help="Weights of the same network, for the shapes that .wts does not hold.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Or a configuration that names the network.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write the weights of one file into another, bit by bit."""
    from pipeline.stages.weights import convert_weights as convert

    network = load_settings(config, overrides).network if config else None
    target = own_file(target, [source, *([like] if like else [])])
    with working("converting"):
        count = convert(source, target, like, network)
    if json:
        print_json({"file": str(target), "tensors": count})
    else:
        print(f"{target}: {count} tensors")
