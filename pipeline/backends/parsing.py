"""What TensorRT's ONNX parser says of a graph, before anything is built; needs no GPU where TensorRT-RTX is installed.

The parsers are native code that some valid graphs crash (recursive functions, nodes without outputs), so they run in a
process of their own: ``python -m pipeline.backends.parsing MODEL``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.backends import nvinfer, tensorrt, tensorrt_rtx
from pipeline.backends.nvinfer import RefusedNode
from pipeline.errors import UnsupportedError

ROOT = Path(__file__).parent.parent.parent
SECONDS = 600
PARSERS: tuple[tuple[str, Callable[[], Any], Callable[[Any], bool]], ...] = (
    ("tensorrt", tensorrt.api, tensorrt.strongly_typed),
    ("tensorrt-rtx", tensorrt_rtx.api, nvinfer.strongly_typed_offered),
)


@dataclass(frozen=True)
class ParserVerdict:
    """Whether a parser reads a graph.

    Attributes:
        parser: ``tensorrt`` or ``tensorrt-rtx``; None where none is installed, or none works here.
        version: the library's.
        accepted: None where no parser gave a verdict; ``note`` says why.
        refused: every node that the parser names.
        note: what else there is to say, in one line.
    """

    parser: str | None = None
    version: str | None = None
    accepted: bool | None = None
    refused: tuple[RefusedNode, ...] = ()
    note: str = ""


VERDICT = TypeAdapter(ParserVerdict)


def parse_verdict(model: Path) -> ParserVerdict:
    """Let the parser read an ONNX file with its external data: TensorRT's where it works, else TensorRT-RTX's.

    Nothing that the libraries print reaches this process's terminal. A graph that crashes the parser is refused.
    """
    command = [sys.executable, "-m", __name__, str(model.resolve())]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return ParserVerdict(note=f"the parser gave no verdict within {SECONDS} s")
    verdicts = []
    for line in done.stdout.splitlines():
        try:
            verdicts.append(VERDICT.validate_json(line))
        except ValidationError as error:
            return ParserVerdict(note=f"the parser's process answered something else: {error.errors()[0]['msg']}")
    if done.returncode == 0 and verdicts:
        return verdicts[-1]
    if done.returncode < 0 and verdicts:
        name = signal.Signals(-done.returncode).name
        begun = verdicts[-1]
        return ParserVerdict(begun.parser, begun.version, False, (), f"the graph crashes the parser ({name})")
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return ParserVerdict(note=f"the parser's process ended with {done.returncode}: {said[-1] if said else 'no reason'}")


def _judge(model: Path, say: Callable[[ParserVerdict], None]) -> None:
    """Say who parses, then the verdict, so that a crash can be laid at the right door."""
    missing = []
    for name, api, strongly_typed in PARSERS:
        try:
            trt = api()
            builder = nvinfer.create_builder(trt)
        except UnsupportedError as error:
            missing.append(error.problem)
            continue
        say(ParserVerdict(name, trt.__version__))
        network = nvinfer.create_network(trt, builder, strongly_typed=strongly_typed(trt))
        refused = nvinfer.read(trt, network, model)
        say(ParserVerdict(name, trt.__version__, not refused, refused))
        return
    say(ParserVerdict(note=f"no ONNX parser works here: {'; '.join(missing)}"))


def _main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print stays out of the answer
    with os.fdopen(answers, "wb") as out:

        def say(verdict: ParserVerdict) -> None:
            out.write(VERDICT.dump_json(verdict) + b"\n")
            out.flush()

        _judge(Path(sys.argv[1]), say)


if __name__ == "__main__":
    _main()
