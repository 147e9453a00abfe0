"""The program ``unet-trt``: its commands in their order, exit codes.

Each module has the commands of a theme. Heavy modules are imported inside the commands, so --help is quick.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from pipeline.cli.building import calibrate, clean, engine, export
from pipeline.cli.deployment import package, predict
from pipeline.cli.diagnosis import doctor, inspect
from pipeline.cli.evaluation import benchmark, regress, validate
from pipeline.cli.logs import set_up_logging
from pipeline.cli.weights import convert_weights, prune, train
from pipeline.cli.whole import init, report, run

__all__ = ["GLOBAL_FLAGS", "app", "main"]

log = logging.getLogger("pipeline")
# Accepted before and behind the command's name.
GLOBAL_FLAGS = ("--debug", "--quiet")
app = typer.Typer(
    help="From a trained UNet to a TensorRT engine whose accuracy can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(init, run, report),
    *(export, clean, prune, calibrate, engine, validate, benchmark, regress, train),
    *(package, predict, inspect, doctor),
):
    app.command()(command)
weights_app = typer.Typer(help="Weights files.", no_args_is_help=True)
weights_app.command("convert")(convert_weights)
app.add_typer(weights_app, name="weights")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log message.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log warnings only.")] = False,
) -> None:
    set_up_logging(debug, quiet)


def main() -> None:
    """Entry point of ``unet-trt``.

    Exits 0 done and passed, 1 a check failed, 2 bad input, 3 not on this machine, 130 interrupted.
    """
    from pipeline.errors import PipelineError

    if not (sys.stderr.isatty() or os.environ.get("FORCE_COLOR")):
        # Typer colours its messages on GitHub's runners, where no terminal is either.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    arguments = sys.argv[1:]
    flags = [a for a in arguments if a in GLOBAL_FLAGS]
    try:
        app([*flags, *(a for a in arguments if a not in GLOBAL_FLAGS)], prog_name="unet-trt", standalone_mode=True)
    except PipelineError as error:
        if "--debug" in flags:
            log.exception("failed")
        print(f"unet-trt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        # Nothing should come here; what does is a defect of the program, told without a traceback.
        if "--debug" in flags:
            log.exception("failed")
        fix = "run again with --debug, and report what it prints"
        print(f"unet-trt: unexpected {type(error).__name__}: {error}\n  to fix: {fix}", file=sys.stderr)
        sys.exit(PipelineError.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not _is_interrupt(stop):
            raise
        print("unet-trt: interrupted; finished stages are kept", file=sys.stderr)
        sys.exit(130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the cause, of which typer makes a silent exit of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
