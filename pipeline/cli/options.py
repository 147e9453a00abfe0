"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None, typer.Option("-c", "--config", help="Configuration file, such as configs/cells.yaml.")
]
PrecisionsOption = Annotated[
    list[str] | None, typer.Option("-p", "--precision", help="fp32, fp16, int8 or mixed; repeat for several.")
]
BackendOption = Annotated[str | None, typer.Option("--backend", help="auto, tensorrt, tensorrt-rtx or onnxruntime.")]
RouteOption = Annotated[str | None, typer.Option("--route", help="auto, implicit or explicit.")]
BuildOption = Annotated[Path, typer.Option("--build-dir", help="Folder for everything that is made.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the configuration: section.key=value.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Make every stage anew.")]
RequireSpeedupOption = Annotated[
    bool, typer.Option("--require-speedup", help="Fail where INT8 is not surely faster than FP16.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DistributedOption = Annotated[
    bool, typer.Option("--distributed", help="On Ray: all cores and GPUs of this machine, or of --address's cluster.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="HOST:PORT of a running Ray cluster, or auto; with --distributed.")
]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes with a core each, with --distributed.", show_default="all cores")
]
BUILD = Path("build")
