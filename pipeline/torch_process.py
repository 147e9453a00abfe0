"""A torch network timed in a process of its own, which takes turns with what runs in this one.

The process may be another interpreter's: TensorRT's own often has no torch. A network that crashes, hangs or takes all
memory takes nothing else with it, and torch's memory is counted apart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import TensorSpec
from pipeline.config import CleanConfig, NetworkConfig, PreprocessingConfig
from pipeline.contenders import Contender
from pipeline.data.preprocessing import coefficients
from pipeline.errors import UnsupportedError

ROOT = Path(__file__).resolve().parent.parent
# What that interpreter has itself goes first: this one's packages may be of another Python.
PROGRAM = f"import sys; sys.path.append({str(ROOT)!r}); from pipeline.torch_worker import main; main()"
# For torch to be imported from a slow disk and to choose its kernels; compilers get a limit of their own.
ANSWER_SECONDS = 180.0
# What belongs to this interpreter and breaks another: where its library is, and TensorRT's libraries before torch's.
OWN_VARIABLES = ("PYTHONHOME", "LD_LIBRARY_PATH")
# Between the end of a process's output and its own.
ENDING_SECONDS = 5.0
LAST_WORDS = 2000


@dataclass(frozen=True)
class Variant:
    """How torch runs a network: ``mode`` is torch.compile's, None for eager."""

    precision: Literal["fp32", "tf32", "fp16"]
    mode: Literal["default", "max-autotune"] | None = None


def torch_python(given: str | None) -> str:
    """The interpreter that has torch: the one named, or this one.

    Raises:
        UnsupportedError: there is no such program, or this interpreter has no torch and none is named.
    """
    if given is not None:
        found = shutil.which(Path(given).expanduser())
        if found is None:
            raise UnsupportedError(
                f"there is no interpreter {given}",
                expected="a Python that has torch",
                fix="correct --torch-python (benchmark.torch_python)",
            )
        return found
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(
            "torch is not installed for this Python", fix="name a Python that has it with --torch-python"
        )
    return sys.executable


class TorchProcess(Contender):
    """A network that torch runs.

    Args:
        source: the graph's input, which the network gets too.
        baked: what of preprocessing and decision the graph does, and the network's callers do here.
        wants_gpu: refuse to run on the CPU.
        first_seconds: time limit of the first inference, in which torch.compile works.

    Raises:
        UnsupportedError: torch or a package is missing there, it sees no GPU, the network cannot be made or does not
            run, the process crashes or hangs. All methods raise it.
    """

    def __init__(
        self,
        python: str,
        network: NetworkConfig,
        variant: Variant,
        source: TensorSpec,
        preprocessing: PreprocessingConfig,
        baked: CleanConfig,
        *,
        wants_gpu: bool,
        first_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.source, self.ran = source, python
        self._compiled, self._first_seconds = variant.mode is not None, first_seconds
        self._buffer = b""
        scaling = [values.tolist() for values in coefficients(preprocessing)] if baked.input == "image" else [None] * 2
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._process, self._requests, self._answers = _start(python, self._stderr)
            stack.callback(self._stop)
            about = self._ask(
                "begin",
                ANSWER_SECONDS,
                network=network.model_dump(mode="json"),
                precision=variant.precision,
                mode=variant.mode,
                wants_gpu=wants_gpu,
                factor=scaling[0],
                offset=scaling[1],
                output=baked.output,
            )
            self.ran, self.on_gpu = about["ran"], about["on_gpu"]
            self._stack = stack.pop_all()

    def feed(self, batch: NDArray[Any]) -> NDArray[Any]:
        source, target = self._folder / "in.npy", self._folder / "out.npy"
        np.save(source, batch)
        self._ask("feed", self._first_seconds, source=str(source), target=str(target))
        output: NDArray[Any] = np.load(target)
        return output

    def host_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        return self._times("on_host", seconds, warmup_seconds)

    def gpu_milliseconds(self, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        return self._times("on_gpu", seconds, warmup_seconds)

    def transfers(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        answer = self._ask("transfers", ANSWER_SECONDS)
        self.gpu_bytes = answer["bytes"]
        return np.array(answer["up"]), np.array(answer["down"])

    def takes(self, batch: int) -> bool:
        """Any batch where it is eager; compiled, it is for the one that the graph has."""
        return super().takes(batch) if self._compiled else True

    def close(self) -> None:
        self._stack.close()

    def _times(self, do: str, seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
        limit = ANSWER_SECONDS + seconds + warmup_seconds
        answer = self._ask(do, limit, seconds=seconds, warmup_seconds=warmup_seconds)
        return np.array(answer["milliseconds"], np.float64)

    def _ask(self, do: str, limit: float, **arguments: Any) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps([do, arguments]).encode() + b"\n")
        except (BrokenPipeError, ValueError) as error:  # of a process that has gone, and of one that was stopped
            raise self._gone() from error
        answer: dict[str, Any] = json.loads(self._line(do, limit))
        if "error" in answer:
            raise UnsupportedError(f"{self.ran}: {answer['error']}")
        return answer

    def _line(self, do: str, limit: float) -> bytes:
        """The next answer; the process is stopped where none comes in time."""
        end = time.monotonic() + limit
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                self._stop()
                if do == "feed" and self._compiled:
                    raise UnsupportedError(
                        f"torch.compile had not finished after {limit:g} s, and was stopped",
                        fix="raise benchmark.compile_seconds",
                    )
                raise UnsupportedError(f"{self.ran}: no answer ({do}) after {limit:g} s; the process was stopped")
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                raise self._gone()
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _gone(self) -> UnsupportedError:
        """The error of a process that has ended, or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_SECONDS)
        code = self._stop()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - LAST_WORDS))
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        return UnsupportedError(f"{self.ran}: the process ended ({how}): {words[-1] if words else 'without a word'}")

    def _stop(self) -> int:
        """Stop the process and all that it has started; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._requests, self._answers):
            pipe.close()
        return self._process.wait()


def environment_of(python: str) -> dict[str, str]:
    """The variables for a process of that interpreter: this one's, but for what is meant for this one alone."""
    return {key: value for key, value in os.environ.items() if python == sys.executable or key not in OWN_VARIABLES}


def _start(python: str, stderr: IO[bytes]) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    """The process, the pipe to it and the pipe from it."""
    try:
        # A group of its own: compilers start processes, which have to go with it.
        process = subprocess.Popen(
            [python, "-c", PROGRAM],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment_of(python),
            start_new_session=True,
        )
    except OSError as error:
        raise UnsupportedError(f"{python} cannot be started: {error.strerror}", expected="a Python") from error
    assert process.stdin is not None
    assert process.stdout is not None
    return process, process.stdin, process.stdout
