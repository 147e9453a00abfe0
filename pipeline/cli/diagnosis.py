"""Commands that look: inspect at a file, doctor at this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption
from pipeline.printing import print_abilities, print_account, print_facts, print_json, suggest


def inspect(
    file: Annotated[Path, typer.Argument(help="An .onnx, .engine, .cache, .json or .pbtxt file.")],
    json: JsonOption = False,
) -> None:
    """Say what a file holds; of an engine also where its time goes, where it runs."""
    from pipeline.inspection import inspect_file

    facts = inspect_file(file)
    account = None if json else facts.pop("account", None)
    print_facts(facts, json)
    if account:
        print_account(account)


def doctor(json: JsonOption = False) -> None:
    """Say what this machine can do, why not, and what to install."""
    from pipeline.doctor import examine_machine

    facts = examine_machine()
    if json:
        print_json(facts)
    else:
        print_abilities(facts)
        suggest("unet-trt", "init", "CHECKPOINT", "IMAGES")
