"""Commands that write weights: train, weights convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import load_settings, own_file, required
from pipeline.cli.endings import suggest_next
from pipeline.cli.options import BUILD, ConfigOption, JsonOption, SetOption
from pipeline.printing import print_json, print_table
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
